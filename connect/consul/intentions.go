package consul

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// wireIntention is api.Intention with the field that the library leaves out.
type wireIntention struct {
	api.Intention
	JWT *api.IntentionJWTRequirement
}

// tokens translates a requirement; nil requires nothing.
func tokens(r *api.IntentionJWTRequirement) (out []intentions.Requirement) {
	if r == nil {
		return nil
	}
	for _, p := range r.Providers {
		if p == nil {
			continue
		}
		one := intentions.Requirement{Provider: p.Name}
		for _, c := range p.VerifyClaims {
			if c != nil {
				one.Claims = append(one.Claims, intentions.Claim{Path: c.Path, Value: c.Value})
			}
		}
		out = append(out, one)
	}
	return out
}

// intentions returns the watch for all intentions that name a destination; its answers are
// []intentions.Intention.
func (c *Client) intentions(service string) watch {
	return watch{key: "intentions\x00" + service, name: "intentions", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		var got map[string][]wireIntention
		ctx = context.WithValue(ctx, queryKey{}, url.Values{"by": {"destination"}, "name": {service}})
		meta, err := c.api.Raw().Query("/v1/connect/intentions/match", &got, cur.cached(ctx))
		if err != nil {
			return nil, err
		}
		if _, ok := got[service]; !ok && len(got) != 0 {
			return nil, errors.New("the agent answered for another destination")
		}
		cur.advance(meta)
		return translate(got[service]), nil
	}}
}

func requiresToken(i intentions.Intention) bool {
	return len(i.Tokens) > 0 || slices.ContainsFunc(i.Permissions, func(p intentions.Permission) bool { return len(p.Tokens) > 0 })
}

func translate(in []wireIntention) []intentions.Intention {
	out := make([]intentions.Intention, 0, len(in))
	for _, i := range in {
		o := intentions.Intention{
			Source:     intentions.Source{Name: i.SourceName, Namespace: i.SourceNS, Partition: i.SourcePartition, Peer: i.SourcePeer},
			Allow:      i.Action == api.IntentionActionAllow,
			Precedence: i.Precedence,
		}
		if i.SourceSamenessGroup != "" {
			o.Allow, o.Unsupported = false, "sameness groups are an enterprise feature that is not supported"
		}
		o.Tokens = tokens(i.JWT)
		for _, p := range i.Permissions {
			if p == nil {
				continue
			}
			perm := intentions.Permission{Allow: p.Action == api.IntentionActionAllow}
			if h := p.HTTP; h != nil {
				perm.PathExact, perm.PathPrefix, perm.PathRegex, perm.Methods = h.PathExact, h.PathPrefix, h.PathRegex, h.Methods
				for _, m := range h.Header {
					perm.Headers = append(perm.Headers, intentions.HeaderMatch{Name: m.Name, Present: m.Present, Exact: m.Exact,
						Prefix: m.Prefix, Suffix: m.Suffix, Contains: m.Contains, Regex: m.Regex, Invert: m.Invert, IgnoreCase: m.IgnoreCase})
				}
			}
			perm.Tokens = tokens(p.JWT)
			o.Permissions = append(o.Permissions, perm)
		}
		out = append(out, o)
	}
	return out
}

// defaultProbe is a caller that no intention can name. The authorize endpoint ignores
// its trust domain and datacenter.
const defaultProbe = "spiffe://00000000-0000-0000-0000-000000000000.consul/ns/haproxy-connect-asks-for-the-default/dc/none/svc/nobody"

// defaultEvery is how often the default policy is asked for.
const defaultEvery = 30 * time.Second

// defaultAllow returns the watch for the effective default policy; its answers are bool, true to
// allow. It asks about defaultProbe: an identity of a namespace that no intention of the
// community edition can name always gets the default.
func (c *Client) defaultAllow(service string) watch {
	return watch{key: "default policy\x00" + service, name: "default policy", every: defaultEvery, shapes: never,
		fetch: func(ctx context.Context, _ *cursor) (any, error) { return c.authorize(ctx, service, defaultProbe) }}
}

// never is the shapes function of watches whose answers do not change what else is asked.
func never(any) bool { return false }

func (c *Client) authorize(ctx context.Context, target, uri string) (bool, error) {
	done := make(chan struct{})
	var got *api.AgentAuthorize
	var err error
	go func() { // the library gives this call no context
		defer close(done)
		got, err = c.api.Agent().ConnectAuthorize(&api.AgentAuthorizeParams{Target: target, ClientCertURI: uri, ClientCertSerial: "00"})
	}()
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case <-done:
	}
	if err != nil {
		return false, err
	}
	return got.Authorized, nil
}
