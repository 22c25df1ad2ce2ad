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

// peered is asked for a service of a peer. The answer is instances: one endpoint for each
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

// peeringEvery is how often a peer's roots are asked for: the question cannot block, and a
// rotation shows both for long.
const peeringEvery = 10 * time.Second

// bundle is asked for the roots of a peer; the answer is *certs.Roots.
func (c *Client) bundle(peer string) watch {
	return watch{key: "bundle\x00" + peer, name: "roots of peer " + peer, every: peeringEvery, shapes: never, same: sameRoots,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			got, _, err := c.api.Peerings().Read(ctx, peer, cur.options(ctx))
			if isStatus(err, 403) {
				return nil, rightError{fmt.Errorf("the roots of peer %s: %w", peer, err), "peering:read"}
			}
			if err != nil {
				return nil, err
			}
			if got == nil {
				return nil, fmt.Errorf("there is no peer %s", peer)
			}
			return peerRoots(got.PeerCAPems)
		}}
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

// bundleOf names the roots of a peer.
func bundleOf(peer string) connect.BundleName {
	return connect.BundleName("peer-" + connect.SafeName(peer))
}
