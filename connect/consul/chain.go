package consul

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// hop is the service that a chain leads to.
type hop struct {
	service, dc, filter, sni string
	onlyPassing              bool
}

// followService follows the chain, and the endpoints of the target it leads to.
func (w *Watcher) followService(ctx context.Context, name string, d declared) {
	hops := make(chan hop)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Add(1)
	go func() {
		defer wg.Done()
		defer w.feeds.drop("chain of " + name)
		w.follow(ctx, "chain of "+name, func(ctx context.Context, c *cursor) (func(*state), error) {
			got, meta, err := w.client.api.DiscoveryChain().Get(d.service, &api.DiscoveryChainOptions{EvaluateInDatacenter: d.dc}, c.cached(ctx))
			if err != nil {
				return nil, err
			}
			if got == nil || got.Chain == nil {
				return nil, errors.New("empty discovery chain")
			}
			c.advance(meta)
			h, timeout, notices := walk(got.Chain, d)
			select {
			case hops <- h:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			proto, _ := connect.ParseProtocol(got.Chain.Protocol)
			return func(st *state) {
				r := st.answers[d.key]
				if r == nil {
					return
				}
				if !r.chain || r.protocol != proto || r.connect != timeout || !reflect.DeepEqual(r.notices, notices) {
					r.chain, r.protocol, r.connect, r.notices, st.dirty = true, proto, timeout, notices, true
					r.turn++
				}
			}, nil
		})
	}()
	var last hop
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case <-ctx.Done():
			return
		case h := <-hops:
			if h == last {
				continue
			}
			last = h
			stop()
			hctx, cancel := context.WithCancel(ctx)
			stop = cancel
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer w.feeds.drop("endpoints of " + name)
				w.follow(hctx, "endpoints of "+name, w.fetchEndpoints(d, h))
			}()
		}
	}
}

// walk finds the one target that everything goes to, and says what it left out.
func walk(chain *api.CompiledDiscoveryChain, d declared) (hop, time.Duration, connect.Notices) {
	var n connect.Notices
	h := hop{service: d.service, dc: d.dc}
	timeout := defaultConnect
	node := chain.Nodes[chain.StartNode]
	for range len(chain.Nodes) + 1 {
		if node == nil {
			break
		}
		switch node.Type {
		case api.DiscoveryGraphNodeTypeRouter:
			if len(node.Routes) == 0 {
				node = nil
				break
			}
			if len(node.Routes) > 1 {
				n.Add(d.where, "service-router", d.service, "routes are not supported yet; everything takes the last, default route")
			}
			node = chain.Nodes[node.Routes[len(node.Routes)-1].NextNode]
			continue
		case api.DiscoveryGraphNodeTypeSplitter:
			best := -1
			for i, s := range node.Splits {
				if best < 0 || s.Weight > node.Splits[best].Weight {
					best = i
				}
			}
			if best < 0 {
				node = nil
				break
			}
			if len(node.Splits) > 1 {
				n.Add(d.where, "service-splitter", d.service, "splits are not supported yet; everything takes the heaviest leg")
			}
			node = chain.Nodes[node.Splits[best].NextNode]
			continue
		case api.DiscoveryGraphNodeTypeResolver:
			if r := node.Resolver; r != nil {
				if r.ConnectTimeout > 0 && r.ConnectTimeout <= maxDuration {
					timeout = r.ConnectTimeout
				}
				if r.Failover != nil {
					n.Add(d.where, "service-resolver failover", d.service, "failover is not supported yet")
				}
				if t := chain.Targets[r.Target]; t != nil {
					h = hop{service: t.Service, dc: t.Datacenter, filter: t.Subset.Filter, onlyPassing: t.Subset.OnlyPassing, sni: t.SNI}
				}
			}
			if node.LoadBalancer != nil && node.LoadBalancer.Policy != "" {
				n.Add(d.where, "service-resolver load_balancer", node.LoadBalancer.Policy, "the policy is not supported yet; requests are balanced by weight")
			}
		}
		break
	}
	return h, timeout, n
}
