package consul

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// chain is asked for the compiled discovery chain of an upstream; the answer is
// *api.CompiledDiscoveryChain.
func (c *Client) chain(d *declared) watch {
	return watch{key: "chain\x00" + d.service + "\x00" + d.dc, name: "chain of " + destination{service: d.service, dc: d.dc, other: d.other}.said(),
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			got, meta, err := c.api.DiscoveryChain().Get(d.service, &api.DiscoveryChainOptions{EvaluateInDatacenter: d.dc}, cur.cached(ctx))
			if err != nil {
				return nil, err
			}
			if got == nil || got.Chain == nil {
				return nil, errors.New("empty discovery chain")
			}
			cur.advance(meta)
			return got.Chain, nil
		}}
}

// resolved is what a chain leads to.
type resolved struct {
	to       destination
	protocol connect.Protocol
	connect  time.Duration
	notices  connect.Notices
}

// resolve walks to the one destination that everything goes to, and says what it left out.
func (d *declared) resolve(chain *api.CompiledDiscoveryChain, own string) resolved {
	r := resolved{to: destination{service: d.service, dc: d.dc, other: d.other}, connect: defaultConnect}
	r.protocol, _ = connect.ParseProtocol(chain.Protocol)
	node := chain.Nodes[chain.StartNode]
	for range len(chain.Nodes) + 1 {
		if node == nil || node.Type == api.DiscoveryGraphNodeTypeResolver {
			break
		}
		node = chain.Nodes[d.onward(node, &r.notices)]
	}
	if node == nil || node.Resolver == nil {
		return r
	}
	if t := node.Resolver.ConnectTimeout; t > 0 && t <= maxDuration {
		r.connect = t
	}
	if node.Resolver.Failover != nil {
		r.notices.Add(d.where, "service-resolver failover", d.service, "failover is not supported yet")
	}
	if t := chain.Targets[node.Resolver.Target]; t != nil {
		r.to = destination{service: t.Service, dc: t.Datacenter, other: t.Datacenter != own, subset: t.ServiceSubset, filter: t.Subset.Filter, onlyPassing: t.Subset.OnlyPassing}
	}
	if node.LoadBalancer != nil && node.LoadBalancer.Policy != "" {
		r.notices.Add(d.where, "service-resolver load_balancer", node.LoadBalancer.Policy, "the policy is not supported yet; requests are balanced by weight")
	}
	return r
}

// onward is the node that a router or a splitter leads to.
func (d *declared) onward(node *api.DiscoveryGraphNode, n *connect.Notices) (next string) {
	switch node.Type {
	case api.DiscoveryGraphNodeTypeRouter:
		if len(node.Routes) > 1 {
			n.Add(d.where, "service-router", d.service, "routes are not supported yet; everything takes the last, default route")
		}
		if last := len(node.Routes) - 1; last >= 0 {
			return node.Routes[last].NextNode
		}
	case api.DiscoveryGraphNodeTypeSplitter:
		if len(node.Splits) > 1 {
			n.Add(d.where, "service-splitter", d.service, "splits are not supported yet; everything takes the heaviest leg")
		}
		heaviest := float32(-1)
		for _, s := range node.Splits {
			if s.Weight > heaviest {
				heaviest, next = s.Weight, s.NextNode
			}
		}
	}
	return next
}
