package consul

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

func (w *Watcher) fetchEndpoints(d declared, h hop) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		q := c.cached(ctx)
		q.Filter = h.filter
		q.Datacenter = h.dc
		// Not "passing": a warning still counts, with its own weight.
		list, meta, err := w.client.api.Health().Connect(h.service, "", false, q)
		if err != nil {
			return nil, err
		}
		c.advance(meta)
		c.pause = time.Duration(len(list)) * pauseEach
		return func(st *state) {
			// The trust domain is filled in when a snapshot is made: the roots may
			// arrive later than this.
			ids := []certs.SPIFFEID{{Partition: "default", Namespace: "default", Datacenter: h.dc, Service: h.service}}
			t := connect.Target{Service: h.service, Datacenter: h.dc, IDs: ids, SNI: h.sni,
				Endpoints: endpoints(list, h.dc != st.proxy.Datacenter, h.onlyPassing)}
			w.retarget(st, d, t)
		}, nil
	}
}

func (w *Watcher) fetchQuery(d declared) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		q := c.options(ctx)
		q.WaitIndex, q.WaitTime, q.Connect, q.Datacenter = 0, 0, true, d.dc
		got, _, err := w.client.api.PreparedQuery().Execute(d.service, q)
		if err != nil {
			return nil, err
		}
		if got == nil {
			return nil, errors.New("empty answer")
		}
		var list []*api.ServiceEntry
		for i := range got.Nodes {
			list = append(list, &got.Nodes[i])
		}
		return func(st *state) {
			seen := map[certs.SPIFFEID]bool{}
			t := connect.Target{Service: d.service, Datacenter: got.Datacenter}
			for _, e := range list {
				if e.Service == nil {
					continue
				}
				id := certs.SPIFFEID{Partition: "default", Namespace: "default", Datacenter: got.Datacenter, Service: e.Service.Service}
				if e.Service.Proxy != nil && e.Service.Proxy.DestinationServiceName != "" {
					id.Service = e.Service.Proxy.DestinationServiceName
				}
				if !seen[id] {
					seen[id] = true
					t.IDs = append(t.IDs, id)
				}
			}
			slices.SortFunc(t.IDs, func(a, b certs.SPIFFEID) int { return strings.Compare(a.String(), b.String()) })
			t.Endpoints = endpoints(list, got.Datacenter != st.proxy.Datacenter, false)
			w.retarget(st, d, t)
		}, nil
	}
}

// restartGrace is how long after trouble with Consul an upstream keeps its endpoints
// although all of them have gone at once. A restarted agent calls every check critical
// until it has run; a server that is elected before gossip has reached it deregisters
// the nodes it has not heard of (agent/consul, reconcileReaped), until their agents
// notice.
const restartGrace = 15 * time.Second

// retarget sets the target of a destination, but holds back what would empty it within
// restartGrace. What comes meanwhile does not prolong that.
func (w *Watcher) retarget(st *state, d declared, t connect.Target) {
	r := st.answers[d.key]
	if r == nil || len(t.Endpoints) > 0 || len(r.target.Endpoints) == 0 || r.target.Service != t.Service {
		st.setTarget(d, t)
		return
	}
	if !r.until.IsZero() {
		r.late = t
		return
	}
	until := w.feeds.settled().Add(restartGrace)
	wait := time.Until(until)
	if wait <= 0 {
		st.setTarget(d, t)
		return
	}
	r.until, r.late = until, t
	w.held.Add(1)
	w.log.Warn("all endpoints have gone just after Consul came back; the last ones stay for now", "upstream", d.up.Name, "for", wait.Round(time.Second),
		"try", "nothing, if they return; else: are the instances registered, and do their checks pass?")
	ctx := r.ctx
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		if pause(ctx, wait) {
			w.send(ctx, func(st *state) {
				if st.answers[d.key] == r && r.until.Equal(until) {
					st.setTarget(d, r.late)
				}
			})
		}
	}()
}

func (st *state) setTarget(d declared, t connect.Target) {
	r := st.answers[d.key]
	if r == nil {
		return
	}
	r.until, r.late = time.Time{}, connect.Target{}
	if !reflect.DeepEqual(r.target, t) {
		r.target, st.dirty = t, true
		r.turn++
	}
}

// endpoints keeps the instances that may be called: any critical check takes one
// out, a warning keeps it at its own weight (agent/structs CheckServiceNodes and
// agent/xds/endpoints.go).
func endpoints(list []*api.ServiceEntry, wan, onlyPassing bool) []connect.Endpoint {
	var out []connect.Endpoint
	taken := map[string]bool{}
	for _, e := range list {
		if e == nil || e.Service == nil || e.Node == nil {
			continue
		}
		status := e.Checks.AggregatedStatus()
		weight := e.Service.Weights.Passing
		if e.Service.Weights == (api.AgentWeights{}) {
			weight = 1 // an agent that sends none
		}
		switch status {
		case api.HealthPassing:
		case api.HealthWarning:
			if onlyPassing {
				continue
			}
			if e.Service.Weights != (api.AgentWeights{}) {
				weight = e.Service.Weights.Warning
			}
		default:
			continue
		}
		if weight <= 0 {
			continue
		}
		host, p := e.Service.Address, e.Service.Port
		if host == "" {
			host = e.Node.Address
		}
		if wan {
			if a, ok := e.Service.TaggedAddresses["wan"]; ok && a.Address != "" {
				host, p = a.Address, a.Port
			} else if a := e.Node.TaggedAddresses["wan"]; a != "" && e.Service.Address == "" {
				host = a
			}
		}
		if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() == "" {
			host = ip.Unmap().String()
		} else if !hostName(host) {
			continue
		}
		if !port(p) {
			continue
		}
		addr := net.JoinHostPort(host, strconv.Itoa(p))
		if taken[addr] {
			continue
		}
		taken[addr] = true
		out = append(out, connect.Endpoint{
			Name: endpointName(e.Node.Node, e.Service.ID, addr),
			Node: e.Node.Node, ID: e.Service.ID, Address: host, Port: p, Weight: min(weight, 128),
		})
	}
	slices.SortFunc(out, func(a, b connect.Endpoint) int { return strings.Compare(a.Name, b.Name) })
	return out
}
