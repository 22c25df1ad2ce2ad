package consul

import (
	"context"
	"fmt"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// roots returns the watch for the roots of our own trust domain; its answers are *certs.Roots.
func (c *Client) roots() watch {
	return watch{key: "roots", name: "roots", // it shapes: a gateway needs a leaf for each set of roots
		same: sameRoots,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			list, meta, err := c.api.Agent().ConnectCARoots(cur.options(ctx))
			if err != nil {
				return nil, err
			}
			var pems []string
			for _, r := range list.Roots {
				pems = append(pems, r.RootCertPEM) // active or not: leaves of the old one still live
			}
			roots, err := certs.ParseRoots(list.TrustDomain, pems)
			if err != nil {
				return nil, fmt.Errorf("roots: %w", err)
			}
			cur.advance(meta)
			return roots, nil
		}}
}

// leaf returns the watch for the leaf of a service; its answers are *certs.Leaf.
func (c *Client) leaf(service string) watch {
	return watch{key: "leaf\x00" + service, name: "leaf", shapes: never,
		same: func(a, b any) bool { return a.(*certs.Leaf).Fingerprint == b.(*certs.Leaf).Fingerprint },
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			got, meta, err := c.api.Agent().ConnectCALeaf(service, cur.options(ctx))
			if err != nil {
				return nil, err
			}
			leaf, err := certs.ParseLeaf(got.CertPEM, got.PrivateKeyPEM)
			if err != nil {
				return nil, err
			}
			if leaf.ID.Service != service {
				return nil, fmt.Errorf("the agent answered with the leaf of %q for %q", leaf.ID.Service, service)
			}
			cur.advance(meta)
			cur.pause = leafPause
			return leaf, nil
		}}
}
