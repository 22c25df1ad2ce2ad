package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// statusRelay is one target of a gateway, and the names that lead there.
type statusRelay struct {
	Names       []string         `json:"names"` // "*." before an ending
	Target      string           `json:"target"`
	Datacenter  string           `json:"datacenter,omitempty"`
	Peer        string           `json:"peer,omitempty"`
	Connections int              `json:"connections"` // since HAProxy was last started or reloaded
	BytesIn     uint64           `json:"bytes_in"`
	BytesOut    uint64           `json:"bytes_out"`
	Endpoints   []statusEndpoint `json:"endpoints"`
}

// statusPeer is a cluster with which this one is peered.
type statusPeer struct {
	Name        string `json:"name"`
	State       string `json:"state"`
	TrustDomain string `json:"trust_domain,omitempty"`
	Imported    int    `json:"imported_services"`
	Exported    int    `json:"exported_services"`
}

// refusedNames counts the connections to a gateway that asked for no name which leads anywhere, since
// HAProxy was last started or reloaded.
func refusedNames(snap *connect.Snapshot, stats map[string]map[string]string) (n uint64) {
	for _, l := range snap.Listeners {
		if l.Role == connect.Relay {
			refused, _ := strconv.ParseUint(stats[l.Name+"/FRONTEND"]["dreq"], 10, 64)
			n += refused
		}
	}
	return n
}

// relayStatus tells where a gateway passes connections on to, sorted by target.
func relayStatus(snap *connect.Snapshot, running *render.Config, stats map[string]map[string]string) []statusRelay {
	by := map[connect.TargetName]*statusRelay{}
	for _, l := range snap.Listeners {
		if l.Role != connect.Relay {
			continue
		}
		for i := range l.Branches {
			b := &l.Branches[i]
			b.Chain.Groups(func(name connect.GroupName) { relayTarget(snap, name, b.Match.SNI, by, running, stats) })
		}
	}
	out := make([]statusRelay, 0, len(by))
	for _, one := range by {
		out = append(out, *one)
	}
	slices.SortFunc(out, func(a, b statusRelay) int { return cmp.Compare(a.Target, b.Target) })
	return out
}

func relayTarget(snap *connect.Snapshot, group connect.GroupName, sni string, by map[connect.TargetName]*statusRelay, running *render.Config, stats map[string]map[string]string) {
	g := snap.Group(group)
	if g == nil || len(g.Targets) == 0 {
		return
	}
	one := by[g.Targets[0]]
	if one != nil {
		if !slices.Contains(one.Names, sni) {
			one.Names = append(one.Names, sni)
		}
		return
	}
	t := snap.Target(g.Targets[0])
	if t == nil {
		return
	}
	one = &statusRelay{Names: []string{sni}, Target: string(t.Name), Datacenter: t.Datacenter, Peer: t.Peer, Endpoints: endpointStatus(g, t, running, stats)}
	by[t.Name] = one
	if running == nil {
		return
	}
	if sec := running.Pool(g.Name, t.Name); sec != nil {
		for i := range sec.Servers {
			row := stats[sec.Name+"/"+sec.Servers[i].Name]
			n, _ := strconv.Atoi(row["stot"])
			in, _ := strconv.ParseUint(row["bin"], 10, 64)
			sent, _ := strconv.ParseUint(row["bout"], 10, 64)
			one.Connections, one.BytesIn, one.BytesOut = one.Connections+n, one.BytesIn+in, one.BytesOut+sent
		}
	}
}

// printRelays prints the table of a gateway for a terminal.
func printRelays(w io.Writer, s *statusReport) {
	if len(s.Relays) == 0 && s.Kind != "mesh gateway" {
		return
	}
	fmt.Fprintln(w, "\nNAME\tLEADS TO\tENDPOINT\tNODE\tCONNECTIONS")
	for _, r := range s.Relays {
		for _, name := range r.Names {
			if len(r.Endpoints) == 0 {
				fmt.Fprintf(w, "%s\t%s\tnone\t\t%d\n", label(name), label(r.Target), r.Connections)
			}
			for _, e := range r.Endpoints {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\n", label(name), label(r.Target), label(e.Address), label(e.Node), r.Connections)
			}
		}
	}
	fmt.Fprintf(w, "\nrefused, as they asked for no such name: %d\n", s.Refused)
	if len(s.Peers) > 0 {
		fmt.Fprintln(w, "\nPEER\tSTATE\tIMPORTED\tEXPORTED\tTRUST DOMAIN")
	}
	for _, p := range s.Peers {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\n", label(p.Name), label(p.State), p.Imported, p.Exported, label(cmp.Or(p.TrustDomain, "its roots are not known")))
	}
}
