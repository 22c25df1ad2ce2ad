package consul

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"
	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

func TestParseUpstream(t *testing.T) {
	u, err := ParseUpstream("db:6379")
	require.NoError(t, err)
	require.Equal(t, api.Upstream{DestinationType: "service", DestinationName: "db", LocalBindPort: 6379}, u)
	u, err = ParseUpstream("find.query:127.0.0.2:1")
	require.NoError(t, err)
	require.Equal(t, api.Upstream{DestinationType: "prepared_query", DestinationName: "find", LocalBindAddress: "127.0.0.2", LocalBindPort: 1}, u)
	for _, bad := range []string{"", "db", ":1", "db:", "db:0", "db:65536", "db:x:1", "db:1.2.3.4:x", ".query:1"} {
		_, err := ParseUpstream(bad)
		require.Error(t, err, bad)
	}
}

// Both spellings that Consul uses are read; what is wrong keeps its default.
func TestKeys(t *testing.T) {
	s := &api.AgentService{Address: "10.0.0.1", Port: 21000, Datacenter: "dc1", Proxy: &api.AgentServiceConnectProxyConfig{LocalServicePort: 8080,
		Config: map[string]any{"protocol": "HTTP2", "local_request_timeout_ms": 0.0, "local_connect_timeout_ms": "1500", "max_inbound_connections": 7.0},
		Upstreams: []api.Upstream{
			{DestinationName: "a", LocalBindPort: 1, Config: map[string]any{
				"limits":               map[string]any{"MaxConnections": 3.0},
				"passive_health_check": map[string]any{"Interval": 22e9, "max_failures": 2.0}}},
			{DestinationName: "b", LocalBindPort: 1},
			{DestinationName: "c", LocalBindPort: 21000, LocalBindAddress: "10.0.0.1"},
			{DestinationName: "*", LocalBindPort: 5},
			{DestinationName: "d"},
			{DestinationName: "a", Datacenter: "dc2", LocalBindPort: 2, DestinationNamespace: "team", MeshGateway: api.MeshGatewayConfig{Mode: api.MeshGatewayModeLocal}},
		}}}
	var n connect.Notices
	in := decodeInbound(s, &n)
	require.Equal(t, connect.HTTP2, in.protocol)
	require.Equal(t, "10.0.0.1", in.bind.Address)
	require.Negative(t, in.request)
	require.Equal(t, "1.5s", in.connect.String())
	require.Equal(t, 7, *in.most)
	ups := upstreams(s, in.binds(), &n)
	require.Len(t, ups, 2)
	require.Equal(t, "a", ups[0].name)
	require.Equal(t, "a.dc2", ups[1].name, "the same service in two datacenters is two upstreams")
	require.NotEqual(t, ups[0].group, ups[1].group)
	require.Equal(t, 3, *ups[0].limits.MaxConnections)
	require.Equal(t, "22s", ups[0].passive.Interval.String())
	require.Equal(t, 2, ups[0].passive.MaxFailures)
	require.Len(t, n.Sorted(), 3, "b and c clash, a namespace is not honoured: %v", n)
}

func TestClientOnly(t *testing.T) {
	var n connect.Notices
	in := decodeInbound(&api.AgentService{Port: 21000, Proxy: &api.AgentServiceConnectProxyConfig{}}, &n)
	require.Zero(t, in.bind.Port, "no application, no listener")
}

// Health and weights of endpoints count as with Envoy under Consul.
func TestEndpoints(t *testing.T) {
	entry := func(id, addr string, w api.AgentWeights, status ...string) *api.ServiceEntry {
		e := &api.ServiceEntry{Node: &api.Node{Node: "n", Address: "10.9.9.9", TaggedAddresses: map[string]string{"wan": "203.0.113.9"}},
			Service: &api.AgentService{ID: id, Address: addr, Port: 20000, Weights: w, TaggedAddresses: map[string]api.ServiceAddress{}}}
		for _, s := range status {
			e.Checks = append(e.Checks, &api.HealthCheck{Status: s})
		}
		return e
	}
	one := api.AgentWeights{Passing: 1, Warning: 1}
	list := []*api.ServiceEntry{
		entry("ok", "10.0.0.1", one, "passing"), entry("warn", "10.0.0.2", api.AgentWeights{Passing: 10, Warning: 3}, "passing", "warning"),
		entry("crit", "10.0.0.3", one, "passing", "critical"), entry("zero", "10.0.0.4", api.AgentWeights{Passing: 0, Warning: 1}, "passing"),
		entry("heavy", "10.0.0.5", api.AgentWeights{Passing: 1000, Warning: 1}), entry("node", "", one), entry("name", "some.host", one), entry("bad name", "some host", one), entry("bad line", "a\nb", one),
		entry("twin", "10.0.0.1", one), nil, {},
	}
	weights := func(got []connect.Endpoint) map[string]int {
		out := map[string]int{}
		for _, e := range got {
			out[e.ID+"@"+e.Address] = e.Weight
		}
		return out
	}
	require.Equal(t, map[string]int{"ok@10.0.0.1": 1, "warn@10.0.0.2": 3, "heavy@10.0.0.5": 128, "node@10.9.9.9": 1, "name@some.host": 1}, weights(endpoints(list, false, false)))
	require.NotContains(t, weights(endpoints(list, false, true)), "warn@10.0.0.2")
	require.Contains(t, weights(endpoints(list, true, false)), "node@203.0.113.9")
}

// FuzzRegistration checks that decoding never panics and never lets a name or an
// address through that is not plain, whatever a registration says.
func FuzzRegistration(f *testing.F) {
	f.Add([]byte(`{"Kind":"connect-proxy","Address":"1.2.3.4","Port":1,"Proxy":{"DestinationServiceName":"a","LocalServicePort":1,"Config":{"protocol":"http","limits":{"max_connections":"5"}},"Upstreams":[{"DestinationName":"b","LocalBindPort":2,"Config":{"connect_timeout_ms":1}}],"Expose":{"Paths":[{"Path":"/x","LocalPathPort":1,"ListenerPort":2}]}}}`))
	f.Add([]byte(`{"Proxy":{"Upstreams":[{"DestinationName":"a\nb","LocalBindSocketPath":"/tmp/x\n","LocalBindSocketMode":"9"}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s api.AgentService
		if json.Unmarshal(b, &s) != nil || s.Proxy == nil {
			return
		}
		var n connect.Notices
		in := decodeInbound(&s, &n)
		ups := upstreams(&s, in.binds(), &n)
		for _, u := range ups {
			if u.name != connect.SafeName(u.name) && len(u.name) < 80 || strings.ContainsAny(u.bind.Address+u.bind.SocketPath+u.bind.SocketMode, " \n\"'\\#") {
				t.Fatalf("%+v", u)
			}
			if u.connect < 0 || u.bind.Port < 0 || u.bind.Port > 65535 {
				t.Fatalf("%+v", u)
			}
		}
		if strings.ContainsAny(in.bind.Address+in.app.Address+in.app.SocketPath+in.callerHeader, " \n\"'\\#") {
			t.Fatalf("%+v", in)
		}
		for _, one := range n.Sorted() {
			if strings.ContainsAny(one.String(), "\n\r\x00") {
				t.Fatalf("%q", one.String())
			}
		}
	})
}

// Whatever services are called, no two upstreams share a listener or a group.
func TestUpstreamsAreApart(t *testing.T) {
	s := &api.AgentService{Port: 21000, Datacenter: "dc1", Proxy: &api.AgentServiceConnectProxyConfig{LocalServicePort: 8080}}
	for i, u := range []api.Upstream{{DestinationName: "api"}, {DestinationName: "api", Datacenter: "dc1"}, {DestinationName: "api_2"}, {DestinationName: "api", Datacenter: "dc2"}, {DestinationName: "api.dc2"},
		{DestinationName: "x.query"}, {DestinationName: "x", DestinationType: api.UpstreamDestTypePreparedQuery}, {DestinationName: "api_2_2"}} {
		u.LocalBindPort = 9000 + i
		s.Proxy.Upstreams = append(s.Proxy.Upstreams, u)
	}
	var n connect.Notices
	names, groups := map[string]bool{}, map[connect.GroupName]bool{}
	for _, d := range upstreams(s, nil, &n) {
		names[d.name], groups[d.group] = true, true
	}
	require.Empty(t, n)
	require.Len(t, names, len(s.Proxy.Upstreams), "%v", names)
	require.Len(t, groups, len(s.Proxy.Upstreams), "%v", groups)
}
