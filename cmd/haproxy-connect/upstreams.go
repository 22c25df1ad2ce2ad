package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

type statusUpstream struct {
	Name      string           `json:"name"`
	Listen    string           `json:"listen"`
	Protocol  string           `json:"protocol"`
	Target    string           `json:"target"` // the first target of the chain's last group; most chains have only one group
	Expects   []string         `json:"expects"`
	Routes    []statusRoute    `json:"routes"`
	Endpoints []statusEndpoint `json:"endpoints"`
}

// statusRoute is a route of the discovery chain; a request takes the first route that matches.
type statusRoute struct {
	Match   string        `json:"match"`
	Rewrite string        `json:"rewrite,omitempty"`
	Timeout string        `json:"timeout,omitempty"`
	Retries int           `json:"retries,omitempty"`
	Splits  []statusSplit `json:"splits"`
}

type statusSplit struct {
	Percent float64        `json:"percent"`
	Balance string         `json:"balance,omitempty"` // empty: round robin
	Targets []statusTarget `json:"targets"`           // in failover order
}

type statusTarget struct {
	Name      string `json:"name"`
	Endpoints int    `json:"endpoints"`
	Used      bool   `json:"used"`
	Why       string `json:"why,omitempty"` // why the target is not used
}

// upstreamStatus returns the status of one upstream: where its routes lead, and the endpoints of its targets.
func upstreamStatus(snap *connect.Snapshot, l *connect.Listener, running *render.Config, stats map[string]map[string]string) statusUpstream {
	one := statusUpstream{Name: l.Name, Protocol: string(l.Protocol()), Listen: l.Bind.String(), Expects: []string{}, Routes: []statusRoute{}, Endpoints: []statusEndpoint{}}
	chain := &l.Branches[0].Chain
	for i := range chain.Routes {
		one.Routes = append(one.Routes, routeStatus(snap, &chain.Routes[i]))
	}
	seen := map[*connect.Target]bool{}
	chain.Groups(func(name connect.GroupName) {
		g := snap.Group(name)
		if g == nil {
			return
		}
		for place, target := range g.Targets {
			t := snap.Target(target)
			if place == 0 {
				one.Target = string(target)
			}
			if t == nil || seen[t] {
				continue
			}
			seen[t] = true
			for _, id := range t.Dial.IDs {
				if text := id.String(); !slices.Contains(one.Expects, text) {
					one.Expects = append(one.Expects, text)
				}
			}
			one.Endpoints = append(one.Endpoints, endpointStatus(g, t, running, stats)...)
		}
	})
	return one
}

func routeStatus(snap *connect.Snapshot, r *connect.Route) statusRoute {
	out := statusRoute{Match: r.Match.String(), Rewrite: label(r.Rewrite), Retries: r.Retry.Tries}
	if r.Timeout > 0 {
		out.Timeout = r.Timeout.String()
	}
	sum := 0
	for i := range r.Splits {
		sum += r.Splits[i].Weight
	}
	for i := range r.Splits {
		s := &r.Splits[i]
		one := statusSplit{Percent: float64(s.Weight) * 100 / float64(max(sum, 1))}
		g := snap.Group(s.Group)
		if g == nil {
			continue
		}
		one.Balance = string(g.Balance.Policy)
		before := ""
		for _, name := range g.Targets {
			t := statusTarget{Name: string(name)}
			if target := snap.Target(name); target != nil {
				t.Endpoints = len(target.Endpoints)
			}
			switch {
			case t.Endpoints == 0:
				t.Why = "no healthy endpoint"
			case before != "":
				t.Why = before + " has healthy endpoints"
			default:
				t.Used, before = true, t.Name
			}
			one.Targets = append(one.Targets, t)
		}
		out.Splits = append(out.Splits, one)
	}
	return out
}

// endpointStatus returns the endpoints of a target, each with HAProxy's statistics of its
// server.
func endpointStatus(g *connect.Group, t *connect.Target, running *render.Config, stats map[string]map[string]string) []statusEndpoint {
	list := make([]statusEndpoint, len(t.Endpoints))
	for i, e := range t.Endpoints {
		list[i] = statusEndpoint{Target: string(t.Name), Name: e.ID, Node: e.Node, Address: fmt.Sprintf("%s:%d", e.Address, e.Port), Weight: e.Weight}
	}
	if running == nil {
		return list
	}
	sec := running.Pool(g.Name, t.Name)
	if sec == nil || len(sec.Servers) != len(list) {
		return list // HAProxy does not run the newest endpoints yet
	}
	for i := range list {
		row := stats[sec.Name+"/"+sec.Servers[i].Name]
		list[i].Health = row["status"]
		list[i].Sessions, _ = strconv.Atoi(row["scur"])
		answered, _ := strconv.Atoi(row["bout"])
		list[i].Verified = answered > 0
		list[i].Latency, _ = strconv.Atoi(row["ttime"])
		if g.Protocol.IsHTTP() {
			list[i].Latency, _ = strconv.Atoi(row["rtime"])
		}
	}
	return list
}

// simple reports whether the upstream has one route to one target, so that a list of routes would say nothing.
func (u *statusUpstream) simple() bool {
	return len(u.Routes) == 1 && len(u.Routes[0].Splits) == 1 && len(u.Routes[0].Splits[0].Targets) == 1
}

// tree is the routes of an upstream as lines for a terminal.
func (u *statusUpstream) tree() (out []string) {
	for i, r := range u.Routes {
		line := fmt.Sprintf("%d. %s", i+1, r.Match)
		if r.Rewrite != "" {
			line += ", becomes " + r.Rewrite
		}
		if r.Timeout != "" {
			line += ", within " + r.Timeout
		}
		out = append(out, line)
		for _, s := range r.Splits {
			var targets []string
			for _, t := range s.Targets {
				text := fmt.Sprintf("%s (%d endpoints)", t.Name, t.Endpoints)
				if t.Why != "" {
					text = fmt.Sprintf("%s (not used: %s)", t.Name, t.Why)
				}
				targets = append(targets, text)
			}
			out = append(out, fmt.Sprintf("   %g %% to %s", s.Percent, strings.Join(targets, ", then ")))
		}
	}
	return out
}
