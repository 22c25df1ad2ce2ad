package consul

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// peerMeta is what the instances of a peer's service say of it; the library's type leaves it
// out (agent/structs, PeeringServiceMeta).
type peerMeta struct {
	SNI      []string
	SpiffeID []string
	Protocol string
}

// peered returns the watch for a service of a peer; its answers are instances: one endpoint for each
// gateway of the peer, as Consul shows no more of it.
func (c *Client) peered(d destination) watch {
	return watch{key: "peered\x00" + d.service + "\x00" + d.peer, name: "endpoints of " + d.said(), void: noInstances,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			var body bytes.Buffer
			q := cur.cached(context.WithValue(ctx, bodyKey{}, &body))
			q.Peer = d.peer
			list, meta, err := c.api.Health().Connect(d.service, "", false, q)
			if err != nil {
				return nil, err
			}
			var whole []struct {
				Service struct{ Connect struct{ PeerMeta *peerMeta } }
			}
			if err := json.Unmarshal(body.Bytes(), &whole); err != nil {
				return nil, fmt.Errorf("%s of peer %s: %w", d.service, d.peer, err)
			}
			cur.advance(meta)
			var out instances
			for _, one := range whole {
				if m := one.Service.Connect.PeerMeta; m != nil {
					out.meta(m)
				}
			}
			return out.found(endpoints(list, true, false)), nil
		}}
}

// meta takes what an instance of a peer's service says. What is no identity names nobody.
func (i *instances) meta(m *peerMeta) {
	for _, text := range m.SpiffeID {
		if id, err := certs.ParseID(text); err == nil && !slices.Contains(i.ids, id) {
			i.ids = append(i.ids, id)
		}
	}
	slices.SortFunc(i.ids, func(a, b certs.SPIFFEID) int { return strings.Compare(a.String(), b.String()) })
	if len(m.SNI) > 0 && hostName(m.SNI[0]) {
		i.sni = m.SNI[0]
	}
	if p, known := connect.ParseProtocol(m.Protocol); known {
		i.protocol = p
	}
}

// peering is one peer, as far as it is of use here.
type peering struct {
	Name, State, PeerServerName string
	PeerServerAddresses         []string
	PeerCAPems                  []string
	StreamStatus                struct{ ImportedServices, ExportedServices []string }

	roots *certs.Roots // nil: they are not known, or may not be used
}

// peerings are all peers, sorted by name; denied: the token may not read them.
type peerings struct {
	list   []peering
	denied bool
}

// peeringWait is how long a question for peers blocks while there are any: an answer has news that
// wakes no question, as what is imported and new roots.
const peeringWait = 10 * time.Second

// deniedAgain is how often a right that the token lacks is tried again.
const deniedAgain = 30 * time.Second

// peerings returns the watch for all peers; its answers are peerings. A token that loses the right
// takes away nothing that was known.
func (c *Client) peerings() watch {
	known, some := false, false
	return watch{key: "peerings", name: "peers", shapes: func(any) bool { return true }, same: samePeerings,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			var list []peering
			q := cur.options(ctx)
			if some {
				q.WaitTime = min(q.WaitTime, peeringWait)
			}
			meta, err := c.api.Raw().Query("/v1/peerings", &list, q)
			if isStatus(err, 403) && !known {
				cur.pause = deniedAgain
				return peerings{denied: true}, nil
			}
			if isStatus(err, 404) || err != nil && strings.Contains(err.Error(), "peering must be enabled") { // an agent without peering
				cur.pause = deniedAgain
				return peerings{}, nil
			}
			if err != nil {
				return nil, err
			}
			cur.advance(meta)
			known, some = true, len(list) > 0
			list = slices.DeleteFunc(list, func(p peering) bool { return certs.ServiceName(p.Name) != nil })
			slices.SortFunc(list, func(a, b peering) int { return strings.Compare(a.Name, b.Name) })
			for i := range list {
				if roots, err := peerRoots(list[i].PeerCAPems); err == nil {
					list[i].roots = roots
				}
			}
			return peerings{list: list}, nil
		}}
}

func samePeerings(a, b any) bool {
	x, y := a.(peerings), b.(peerings)
	return x.denied == y.denied && slices.EqualFunc(x.list, y.list, func(p, q peering) bool {
		return p.Name == q.Name && p.State == q.State && p.PeerServerName == q.PeerServerName && slices.Equal(p.PeerServerAddresses, q.PeerServerAddresses) &&
			slices.Equal(p.PeerCAPems, q.PeerCAPems) && slices.Equal(p.StreamStatus.ImportedServices, q.StreamStatus.ImportedServices) &&
			slices.Equal(p.StreamStatus.ExportedServices, q.StreamStatus.ExportedServices)
	})
}

// find is the peer of this name, or nil.
func (p *peerings) find(name string) *peering {
	for i := range p.list {
		if p.list[i].Name == name {
			return &p.list[i]
		}
	}
	return nil
}

// shown are the peers, for people.
func (p *peerings) shown() (out []connect.Peer) {
	for i := range p.list {
		one := &p.list[i]
		shown := connect.Peer{Name: one.Name, State: one.State, Imported: len(one.StreamStatus.ImportedServices), Exported: len(one.StreamStatus.ExportedServices)}
		if one.roots != nil {
			shown.TrustDomain = one.roots.TrustDomain
		}
		out = append(out, shown)
	}
	return out
}

// trusted are the peers whose roots are known and whose trust domain is nobody else's: neither ours
// nor that of another peer, or one of them could vouch for the other's services.
func (p *peerings) trusted(own string, n *connect.Notices) (out []*peering) {
	claimed := map[string][]string{}
	for i := range p.list {
		if one := &p.list[i]; one.roots != nil {
			claimed[one.roots.TrustDomain] = append(claimed[one.roots.TrustDomain], one.Name)
		}
	}
	for i := range p.list {
		one := &p.list[i]
		switch {
		case one.roots == nil:
		case one.roots.TrustDomain == own:
			n.Add("peer "+one.Name, "trust domain", own, "it is our own; nobody of this peer is believed")
		case len(claimed[one.roots.TrustDomain]) > 1:
			n.Add("peer "+one.Name, "trust domain", one.roots.TrustDomain, "other peers claim it too ("+strings.Join(claimed[one.roots.TrustDomain], ", ")+"); nobody of these peers is believed")
		default:
			out = append(out, one)
		}
	}
	return out
}

// rightError is of a question that the token may not ask.
type rightError struct {
	error
	right string
}

func (e rightError) Unwrap() error { return e.error }

func sameRoots(a, b any) bool {
	x, y := a.(*certs.Roots), b.(*certs.Roots)
	return x.Fingerprint == y.Fingerprint && x.TrustDomain == y.TrustDomain
}

// peerRoots are the roots of a peer, whose trust domain is in them.
func peerRoots(pems []string) (*certs.Roots, error) {
	for _, text := range pems {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		for _, u := range cert.URIs {
			if u.Scheme == "spiffe" && u.Host != "" {
				return certs.ParseRoots(u.Host, pems)
			}
		}
	}
	return nil, errors.New("no root names a trust domain")
}

// callersOf are the callers of trusted peers, for the guard of a listener.
func callersOf(list []*peering, own string) (out []connect.PeerCallers) {
	for _, p := range list {
		out = append(out, connect.PeerCallers{Peer: p.Name, Bundle: bundleOf(p.Name), Suffix: ".default.default." + p.Name + ".external." + own})
	}
	return out
}

// domains are the trust domains of peers, by name.
func domains(list []*peering) map[string]string {
	out := make(map[string]string, len(list))
	for _, p := range list {
		out[p.Name] = p.roots.TrustDomain
	}
	return out
}

// bundleOf names the roots of a peer.
func bundleOf(peer string) connect.BundleName {
	return connect.BundleName("peer-" + connect.SafeName(peer))
}
