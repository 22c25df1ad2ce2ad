package consul

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// kind is one kind of proxy: the only place that knows what it needs of Consul, and which
// nouns it becomes. Only Run's goroutine calls it.
type kind interface {
	// wants is every watch that the state needs now, any number of levels deep.
	wants(st *state) []watch
	// assemble makes the snapshot; nil while something that must be known is not. slow:
	// something that a snapshot can do without has not been heard yet.
	assemble(st *state) (snap *connect.Snapshot, slow bool)
}

// kinds are the kinds of proxy that this program can be.
var kinds = map[api.ServiceKind]func(c *Client, registration string) kind{
	api.ServiceKindConnectProxy:       newSidecar,
	api.ServiceKindMeshGateway:        newMeshGateway,
	api.ServiceKindIngressGateway:     newIngressGateway,
	api.ServiceKindAPIGateway:         newAPIGateway,
	api.ServiceKindTerminatingGateway: newTerminatingGateway,
}

// Source follows one proxy. Make it with NewSource.
type Source struct {
	client  *Client
	proxyID string
	log     *slog.Logger
	feeds   feeds
	updates chan update
	held    atomic.Uint64
	wg      sync.WaitGroup
}

// NewSource makes a source of the proxy with this ID.
func NewSource(c *Client, proxyID string, log *slog.Logger) *Source {
	return &Source{client: c, proxyID: proxyID, log: log, feeds: feeds{log: log}, updates: make(chan update, 16)}
}

// Feeds tells the condition of each watch, sorted by name.
func (s *Source) Feeds() []Feed {
	out := s.feeds.list()
	slices.SortFunc(out, func(a, b Feed) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Held counts the times that a target kept endpoints which had all gone just after
// Consul came back.
func (s *Source) Held() uint64 { return s.held.Load() }

// firstGrace bounds how long slow answers may delay the first snapshot: without it the
// first configuration would have listeners that change their mode right away.
const firstGrace = 300 * time.Millisecond

// Run follows the agent until ctx ends; it returns when its last goroutine has.
// publish is called from one goroutine, in order, only with complete snapshots.
func (s *Source) Run(ctx context.Context, publish func(*connect.Snapshot)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer s.wg.Wait()
	defer cancel()
	st := &state{answers: map[string]*answer{}}
	registration := s.client.registration(s.proxyID)
	var proxy kind
	var is api.ServiceKind
	wants := func() []watch {
		out := []watch{registration}
		if r, ok := heard[*api.AgentService](st, registration.key); ok {
			if proxy == nil || is != r.Kind {
				proxy, is = kinds[r.Kind](s.client, registration.key), r.Kind
			}
			out = append(out, proxy.wants(st)...)
		}
		return out
	}
	s.sync(ctx, st, wants)
	var last *connect.Snapshot
	var grace <-chan time.Time // not nil while it runs
	first := true
	again := time.NewTimer(time.Hour)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case u := <-s.updates:
			s.take(st, u)
			for len(s.updates) > 0 { // one publish for everything that waits
				s.take(st, <-s.updates)
			}
		case <-grace:
			first, st.dirty = false, true
		case <-again.C:
			st.dirty, st.shaped = true, true
		}
		if !st.dirty || proxy == nil && !st.shaped {
			continue
		}
		st.wake = time.Time{}
		if st.shaped {
			s.sync(ctx, st, wants)
		}
		if proxy == nil {
			continue
		}
		snap, slow := proxy.assemble(st)
		if st.shaped {
			s.sync(ctx, st, wants)
		}
		if !st.wake.IsZero() {
			again.Reset(time.Until(st.wake))
		}
		switch {
		case snap == nil:
		case first && slow:
			if grace == nil {
				grace = time.After(firstGrace)
			}
		default:
			if first, st.dirty = false, false; !snap.Same(last) {
				last = snap
				publish(snap)
			}
		}
	}
}

// registration returns the watch for the proxy's own registration; its answers are
// *api.AgentService.
func (c *Client) registration(id string) watch {
	return watch{key: "registration\x00" + id, name: "registration",
		same: func(a, b any) bool {
			return a.(*api.AgentService).ContentHash == b.(*api.AgentService).ContentHash
		},
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			r, meta, err := c.api.Agent().Service(id, cur.options(ctx))
			if err != nil {
				return nil, err
			}
			if kinds[r.Kind] == nil || r.Proxy == nil && r.Kind == api.ServiceKindConnectProxy {
				return nil, fmt.Errorf("service %q is of kind %q: service is not a Connect proxy or gateway that is supported", id, r.Kind)
			}
			if r.Kind == api.ServiceKindConnectProxy {
				if err := certs.ServiceName(r.Proxy.DestinationServiceName); err != nil {
					return nil, nameError{err}
				}
			}
			cur.advance(meta)
			cur.index = 0 // this endpoint blocks on the hash alone
			return r, nil
		}}
}

// nameError is of a service that no certificate can be issued for.
type nameError struct{ error }
