package consul

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

func leadsTo(service string) string {
	return `{"Chain":{"ServiceName":"db","Protocol":"tcp","StartNode":"resolver:x","Nodes":{"resolver:x":{"Type":"resolver","Name":"x","Resolver":{"ConnectTimeout":"7s","Target":"t"}}},"Targets":{"t":{"ID":"t","Service":"` + service + `","Datacenter":"dc1"}}}}`
}

// A chain that leads to another target comes into force once the target's endpoints were heard
// of; a chain that leads nowhere never does.
func TestANewTargetIsWaitedFor(t *testing.T) {
	m := newMesh(t)
	m.run()
	m.until("two endpoints", count(2))
	m.agent.Set("/v1/discovery-chain/db", leadsTo("other"))
	require.Eventually(t, func() bool {
		for _, f := range m.w.Feeds() {
			if f.Name == "endpoints of other" && f.Errors > 0 {
				return true
			}
		}
		return false
	}, 10*time.Second, time.Millisecond)
	require.Equal(t, "db", target(m.last.Load(), 0).Service)
	m.agent.Set("/v1/health/connect/other", `[{"Node":{"Node":"n","Address":"10.0.0.9"},"Service":{"ID":"o","Port":1,"Weights":{"Passing":1,"Warning":1}}}]`)
	s := m.until("the other one", func(s *connect.Snapshot) bool { return target(s, 0).Service == "other" })
	require.Len(t, target(s, 0).Endpoints, 1)
	require.Eventually(t, func() bool {
		return !slices.ContainsFunc(m.w.Feeds(), func(f Feed) bool { return f.Name == "endpoints of db" })
	}, 10*time.Second, time.Millisecond, "what is not wanted is not asked for")
	m.agent.Set("/v1/discovery-chain/db", `{"Chain":{"Protocol":"tcp","StartNode":"nowhere"}}`)
	s = m.until("the broken chain is named", func(s *connect.Snapshot) bool { return len(s.Notices) > 0 })
	require.Contains(t, s.Notices[0].String(), "the last one stays in force")
	require.Equal(t, "other", target(s, 0).Service)
}

// FuzzChain checks that any chain is compiled or refused, that its targets have safe names, and
// that its routes lead to groups that exist.
func FuzzChain(f *testing.F) {
	f.Add([]byte(`{"Protocol":"http","StartNode":"r","Nodes":{"r":{"Type":"router","Routes":[{"Definition":{"Match":{"HTTP":{"PathExact":"/x"}},"Destination":{"RequestTimeout":"1s","NumRetries":2,"RetryOn":["5xx"],"RequestHeaders":{"Set":{"a":"b"}}}},"NextNode":"s"}]},"s":{"Type":"splitter","Splits":[{"Weight":99.99,"NextNode":"x"},{"Weight":0.01,"NextNode":"x"}]},"x":{"Type":"resolver","Resolver":{"ConnectTimeout":5000000000,"Target":"t","Failover":{"Targets":["t","u"]}},"LoadBalancer":{"Policy":"ring_hash","HashPolicies":[{"Field":"cookie","FieldValue":"c","CookieConfig":{"TTL":1}}]}}},"Targets":{"t":{"Service":"a","Datacenter":"dc1"},"u":{"Service":"b","Datacenter":"dc2"}}}`))
	f.Add([]byte(`{"StartNode":"r","Nodes":{"r":{"Type":"router","Routes":[{"NextNode":"r"}]}}}`))
	f.Add([]byte(`{"StartNode":"x","Nodes":{"x":{"Type":"resolver"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var c chain
		if json.Unmarshal(b, &c) != nil {
			return
		}
		d := &declared{name: "up", group: "up.default.dc1", service: "up", dc: "dc1", where: "upstream up"}
		got, err := d.compile(&c, "dc1")
		if err != nil {
			return
		}
		groups := map[connect.GroupName]bool{}
		for _, g := range got.groups {
			groups[g.group.Name] = true
			for _, to := range g.targets {
				if name := string(to.name()); strings.ContainsAny(name, " \n\"'\\#|/") {
					t.Fatalf("%q is a target's name", name)
				}
			}
		}
		all := connect.Chain{Routes: got.routes}
		all.Groups(func(name connect.GroupName) {
			if !groups[name] {
				t.Fatalf("there is no group %q", name)
			}
		})
		for _, n := range got.notices {
			if strings.ContainsAny(n.String(), "\n\r\x00") {
				t.Fatalf("%q", n.String())
			}
		}
	})
}

// An upstream whose query changes keeps what is known until the new query is answered.
func TestAnotherQuestionLosesNothing(t *testing.T) {
	m := newMesh(t)
	m.run()
	m.until("two endpoints", count(2))
	m.agent.Set("/v1/discovery-chain/db", `broken`)
	m.agent.Set("/v1/agent/service/www-proxy", `{"Kind":"connect-proxy","ID":"www-proxy","Port":21000,"Datacenter":"dc1","ContentHash":"2",
		"Proxy":{"DestinationServiceName":"www","LocalServicePort":8080,"Upstreams":[{"DestinationName":"db","LocalBindPort":1,"Config":{"connect_timeout_ms":1234}}]}}`)
	s := m.until("another timeout", func(s *connect.Snapshot) bool { return group(s, 0).Connect == 1234*time.Millisecond })
	require.Len(t, target(s, 0).Endpoints, 2)
}
