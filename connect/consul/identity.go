package consul

import (
	"context"
	"fmt"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

func (w *Watcher) fetchRoots(ctx context.Context, c *cursor) (func(*state), error) {
	list, meta, err := w.client.api.Agent().ConnectCARoots(c.options(ctx))
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
	c.advance(meta)
	return func(st *state) {
		if st.roots == nil || st.roots.Fingerprint != roots.Fingerprint || st.roots.TrustDomain != roots.TrustDomain {
			st.roots, st.proxy.TrustDomain, st.dirty = roots, roots.TrustDomain, true
		}
	}, nil
}

func (w *Watcher) fetchLeaf(service string) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		got, meta, err := w.client.api.Agent().ConnectCALeaf(service, c.options(ctx))
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
		c.advance(meta)
		c.pause = leafPause
		return func(st *state) {
			if st.leaf == nil || st.leaf.Fingerprint != leaf.Fingerprint {
				st.leaf, st.dirty = leaf, true
			}
		}, nil
	}
}
