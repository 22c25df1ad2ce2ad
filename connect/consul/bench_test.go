package consul

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/hashicorp/consul/api"
	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// What one change of an endpoint costs before anybody hears of it.
func BenchmarkAssembleOneFlip(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("%d-upstreams", n), func(b *testing.B) {
			ca, err := certs.NewAuthority(domain)
			require.NoError(b, err)
			leaf, err := ca.Leaf("www", 1<<40)
			require.NoError(b, err)
			roots, err := ca.Roots()
			require.NoError(b, err)
			s := NewSource(&Client{}, "www", slog.New(slog.DiscardHandler))
			st := &state{answers: map[string]*answer{}}
			hear := func(w watch, v any) *answer {
				a := &answer{watch: w}
				st.answers[w.key] = a
				st.set(a, v)
				return a
			}
			r := &api.AgentService{Kind: api.ServiceKindConnectProxy, ID: "www", Port: 21000, Datacenter: "dc1", Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: "www", LocalServicePort: 8080}}
			for i := range n {
				r.Proxy.Upstreams = append(r.Proxy.Upstreams, api.Upstream{DestinationName: fmt.Sprint("up", i), LocalBindPort: 10000 + i})
			}
			c := s.client
			reg := c.registration("www")
			hear(reg, r)
			hear(c.roots(), roots)
			hear(c.leaf("www"), leaf)
			hear(c.intentions("www"), []intentions.Intention{})
			hear(c.defaultAllow("www"), false)
			hear(c.mesh(), meshEntry{})
			k := newSidecar(c, reg.key)
			var last *answer
			full, less := instances{dc: "dc1"}, instances{dc: "dc1"}
			for j := range 10 {
				full.endpoints = append(full.endpoints, connect.Endpoint{Name: fmt.Sprint("e", j), Address: fmt.Sprintf("10.0.0.%d", j), Port: 1, Weight: 1})
			}
			less.endpoints = full.endpoints[:9]
			for i := range n {
				name := fmt.Sprint("up", i)
				d := &declared{service: name, dc: "dc1", group: "x"}
				hear(c.chain(d), &chain{Protocol: "http", StartNode: "r", Nodes: map[string]*chainNode{"r": {Type: "resolver", Resolver: &chainResolver{Target: "t"}}}, Targets: map[string]*chainTarget{"t": {Service: name, Datacenter: "dc1"}}})
				last = hear(c.endpoints(destination{service: name, dc: "dc1"}), full)
			}
			k.wants(st)
			snap, slow := k.assemble(st)
			require.False(b, slow)
			require.Len(b, snap.Upstreams(), n)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				v := full
				if i%2 == 0 {
					v = less
				}
				st.set(last, v)
				next, _ := k.assemble(st)
				if next.Same(snap) {
					b.Fatal("nothing has changed")
				}
				snap = next
			}
		})
	}
}
