package consul

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// destination is a service, or a subset of it, whose instances are asked for.
type destination struct {
	service, dc string
	other       bool   // dc is not ours
	subset      string // "": the service as a whole
	filter      string // of the subset
	onlyPassing bool
	peer        string // "": our own cluster
	via         string // viaLocal, viaRemote; "": the instances themselves are called
	sni         string // by which gateways know it
}

// ids are who may answer for it, without the trust domain.
func (d destination) ids() []certs.SPIFFEID { return []certs.SPIFFEID{id(d.service, d.dc)} }

// directly is the destination without gateways on the way: whose health counts.
func (d destination) directly() destination {
	d.via, d.sni = "", ""
	return d
}

// name of the target that a destination is.
func (d destination) name() connect.TargetName {
	place := connect.SafeName(d.dc)
	if d.peer != "" {
		place = connect.SafeName(d.peer) + ".peer"
	}
	name := connect.SafeName(d.service) + ".default." + place
	if d.subset != "" {
		name = connect.SafeName(d.subset) + "." + name
	}
	if d.via != "" {
		name += ".via." + d.via
	}
	return connect.TargetName(name)
}

// said is a destination in words.
func (d destination) said() string {
	name := d.service
	if d.subset != "" {
		name = d.subset + " of " + name
	}
	if d.other {
		name += " in " + d.dc
	}
	if d.peer != "" {
		name += " of peer " + d.peer
	}
	return name
}

// instances is the answer to the question which instances may be called.
type instances struct {
	dc        string
	ids       []certs.SPIFFEID   // without trust domain if it is ours: the roots may arrive later than this; sorted
	endpoints []connect.Endpoint // perhaps with host names in place of addresses
	hosts     bool               // some endpoints have host names
	sni       string             // by which a gateway knows it
	protocol  connect.Protocol   // of a peer's service, as the peer says
}

// found completes an answer by the endpoints in it.
func (i instances) found(list []connect.Endpoint) instances {
	i.endpoints, i.hosts = list, slices.ContainsFunc(list, named)
	return i
}

// noInstances and namedInstances are void and shapes of watches for instances.
func noInstances(v any) bool { return len(v.(instances).endpoints) == 0 }

func namedInstances(v any) bool { return v.(instances).hosts }

// id is a service's identity, without the trust domain.
func id(service, dc string) certs.SPIFFEID {
	return certs.SPIFFEID{Partition: "default", Namespace: "default", Datacenter: dc, Service: service}
}

// endpoints returns the watch for the instances of a destination; its answers are instances.
func (c *Client) endpoints(d destination) watch {
	about := "endpoints\x00" + d.service + "\x00" + d.dc + "\x00" + d.subset
	return watch{key: fmt.Sprintf("%s\x00%s\x00%t\x00%s", about, d.filter, d.onlyPassing, d.sni), subject: about, name: "endpoints of " + d.said(), void: noInstances, shapes: namedInstances,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			q := cur.cached(ctx)
			q.Filter = d.filter
			q.Datacenter = d.dc
			// Not "passing": a warning still counts, with its own weight.
			list, meta, err := c.api.Health().Connect(d.service, "", false, q)
			if err != nil {
				return nil, err
			}
			cur.advance(meta)
			cur.pause = time.Duration(len(list)) * pauseEach
			out := instances{dc: d.dc, ids: d.ids()}
			if slices.ContainsFunc(list, terminating) {
				out.sni = d.sni
			}
			return out.found(endpoints(list, d.other, d.onlyPassing)), nil
		}}
}

// terminating reports whether an instance is a gateway to a service outside the mesh.
func terminating(e *api.ServiceEntry) bool {
	return e != nil && e.Service != nil && e.Service.Kind == api.ServiceKindTerminatingGateway
}

// query returns the watch that executes a prepared query every d.poll; its answers are instances.
// d.dc is the datacenter that evaluates the query, own is ours.
func (c *Client) query(d *declared, own string) watch {
	about := "query\x00" + d.service + "\x00" + d.dc
	name := "query " + d.service
	if d.other {
		name += " in " + d.dc
	}
	return watch{key: about + "\x00" + d.poll.String(), subject: about, name: name, every: d.poll, void: noInstances, shapes: namedInstances,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			q := cur.options(ctx)
			q.WaitIndex, q.WaitTime, q.Connect, q.Datacenter = 0, 0, true, d.dc
			got, _, err := c.api.PreparedQuery().Execute(d.service, q)
			if err != nil {
				return nil, err
			}
			if got == nil {
				return nil, errors.New("empty answer")
			}
			var list []*api.ServiceEntry
			out := instances{dc: got.Datacenter}
			for i := range got.Nodes {
				e := &got.Nodes[i]
				list = append(list, e)
				if e.Service == nil {
					continue
				}
				one := id(e.Service.Service, got.Datacenter)
				if e.Service.Proxy != nil && e.Service.Proxy.DestinationServiceName != "" {
					one.Service = e.Service.Proxy.DestinationServiceName
				}
				if !slices.Contains(out.ids, one) {
					out.ids = append(out.ids, one)
				}
			}
			slices.SortFunc(out.ids, func(a, b certs.SPIFFEID) int { return strings.Compare(a.String(), b.String()) })
			return out.found(endpoints(list, got.Datacenter != own, false)), nil
		}}
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
