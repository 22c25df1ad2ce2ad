package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/connecttest"
)

const domain = "11111111-2222-3333-4444-555555555555.consul"

// mesh is a fake agent with www, which calls db.
type mesh struct {
	t     *testing.T
	agent *connecttest.Agent
	ca    *certs.Authority
	w     *Watcher
	last  atomic.Pointer[connect.Snapshot]
}

func newMesh(t *testing.T) *mesh {
	m := &mesh{t: t, agent: connecttest.New()}
	t.Cleanup(m.agent.Close)
	var err error
	m.ca, err = certs.NewAuthority(domain)
	require.NoError(t, err)
	m.roots(m.ca)
	m.leaf()
	m.agent.Set("/v1/agent/service/www-proxy", `{"Kind":"connect-proxy","ID":"www-proxy","Service":"www-proxy","Port":21000,"Datacenter":"dc1","ContentHash":"1",
		"Proxy":{"DestinationServiceName":"www","LocalServicePort":8080,"Upstreams":[{"DestinationName":"db","LocalBindPort":1}]}}`)
	m.agent.Set("/v1/connect/intentions/match", `{"www":null}`)
	m.agent.Set("/v1/config/mesh", `[]`)
	m.agent.Set("/v1/agent/connect/authorize", `{"Authorized":false}`)
	m.agent.Set("/v1/discovery-chain/db", `{"Chain":{"ServiceName":"db","Protocol":"tcp","StartNode":"resolver:db","Nodes":{"resolver:db":{"Type":"resolver","Name":"db","Resolver":{"ConnectTimeout":"7s","Target":"t"}}},"Targets":{"t":{"ID":"t","Service":"db","Datacenter":"dc1"}}}}`)
	m.endpoints("passing", 1, 2)
	return m
}

func (m *mesh) roots(cas ...*certs.Authority) {
	var list []any
	for _, ca := range cas {
		list = append(list, map[string]any{"RootCert": ca.CertPEM})
	}
	b, err := json.Marshal(map[string]any{"TrustDomain": cas[0].TrustDomain, "Roots": list})
	require.NoError(m.t, err)
	m.agent.Set("/v1/agent/connect/ca/roots", string(b))
}

func (m *mesh) leaf() {
	leaf, err := m.ca.Leaf("www", time.Hour)
	require.NoError(m.t, err)
	chain, key, _ := strings.Cut(string(leaf.PEM()), "-----BEGIN EC")
	b, err := json.Marshal(map[string]any{"CertPEM": chain, "PrivateKeyPEM": "-----BEGIN EC" + key})
	require.NoError(m.t, err)
	m.agent.Set("/v1/agent/connect/ca/leaf/www", string(b))
}

func (m *mesh) endpoints(status string, ids ...int) {
	var list []any
	for _, id := range ids {
		list = append(list, map[string]any{"Node": map[string]any{"Node": "n", "Address": "10.0.0.1"}, "Service": map[string]any{"ID": fmt.Sprint("db", id), "Port": 20000 + id, "Weights": map[string]int{"Passing": 1, "Warning": 1}},
			"Checks": []any{map[string]any{"Status": status}}})
	}
	b, err := json.Marshal(list)
	require.NoError(m.t, err)
	m.agent.Set("/v1/health/connect/db", string(b))
}

func (m *mesh) run() {
	client, err := NewClient(Config{Addr: m.agent.Addr()})
	require.NoError(m.t, err)
	m.w = NewWatcher(client, "www-proxy", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan error, 1)
	go func() { done <- m.w.Run(ctx, func(s *connect.Snapshot) { m.last.Store(s) }) }()
	m.t.Cleanup(func() {
		cancel()
		require.NoError(m.t, <-done)
	})
}

// until waits for a snapshot that is so.
func (m *mesh) until(what string, is func(*connect.Snapshot) bool) *connect.Snapshot {
	m.t.Helper()
	var s *connect.Snapshot
	require.Eventually(m.t, func() bool { s = m.last.Load(); return s != nil && is(s) }, 10*time.Second, 2*time.Millisecond, what)
	return s
}

func count(n int) func(*connect.Snapshot) bool {
	return func(s *connect.Snapshot) bool {
		return len(s.Upstreams) == 1 && len(s.Upstreams[0].Target.Endpoints) == n
	}
}

func TestNothingBeforeEverythingIsHeard(t *testing.T) {
	for _, missing := range []string{"/v1/agent/connect/ca/roots", "/v1/agent/connect/ca/leaf/www", "/v1/connect/intentions/match", "/v1/agent/connect/authorize"} {
		t.Run(missing, func(t *testing.T) {
			m := newMesh(t)
			m.agent.Set(missing, `broken`)
			m.run()
			require.Eventually(t, func() bool {
				asked, answered := 0, 0
				for _, f := range m.w.Feeds() {
					if f.Errors > 0 {
						asked++
					}
					if f.Answers > 0 {
						answered++
					}
				}
				return asked > 0 && answered >= 5
			}, 10*time.Second, 5*time.Millisecond)
			require.Nil(t, m.last.Load())
		})
	}
}

func TestChangesArrive(t *testing.T) {
	m := newMesh(t)
	m.run()
	s := m.until("two endpoints", count(2))
	u := s.Upstreams[0]
	require.Equal(t, 7*time.Second, u.ConnectTimeout)
	require.Equal(t, "spiffe://"+domain+"/ns/default/dc/dc1/svc/db", u.Target.IDs[0].String())
	require.False(t, s.Policy.Decide(m.ca.ID("any"), nil).Allow)

	m.agent.Set("/v1/connect/intentions/match", `{"www":[{"SourceName":"shop","Action":"allow","Precedence":9},{"SourceName":"jwt","Action":"allow","Precedence":9,"JWT":{"Providers":[{"Name":"x"}]}}]}`)
	s = m.until("an intention", func(s *connect.Snapshot) bool { return s.Policy.Decide(m.ca.ID("shop"), nil).Allow })
	require.Same(t, u, s.Upstreams[0], "what did not change is the same pointer")
	require.False(t, s.Policy.Decide(m.ca.ID("jwt"), nil).Allow, "a token that is demanded cannot be ignored")

	m.endpoints("passing", 1, 2, 3)
	s = m.until("three endpoints", count(3))
	require.NotSame(t, u, s.Upstreams[0])
	m.endpoints("critical", 1, 2, 3)
	m.until("no endpoints, as nothing was wrong with the agent", count(0))

	other, err := certs.NewAuthority(domain)
	require.NoError(t, err)
	m.roots(m.ca, other)
	m.until("two roots", func(s *connect.Snapshot) bool { return s.Roots.Count == 2 })
	before := s.Leaf
	m.leaf()
	s = m.until("a new leaf", func(s *connect.Snapshot) bool { return s.Leaf.Fingerprint != before.Fingerprint })

	u = s.Upstreams[0]
	m.agent.Set("/v1/agent/service/www-proxy", `{"Kind":"connect-proxy","ID":"www-proxy","Service":"www-proxy","Port":21000,"Datacenter":"dc1","ContentHash":"2",
		"Proxy":{"DestinationServiceName":"www","LocalServicePort":8080,"Upstreams":[{"DestinationName":"cache","LocalBindPort":2},{"DestinationName":"db","LocalBindPort":1}]}}`)
	s = m.until("another upstream", func(s *connect.Snapshot) bool { return len(s.Upstreams) == 2 })
	require.Same(t, u, s.Upstreams[1], "what did not change is the same pointer")
	m.agent.Set("/v1/discovery-chain/db", `{"Chain":{"ServiceName":"db","Protocol":"http","StartNode":"resolver:db","Nodes":{"resolver:db":{"Type":"resolver","Name":"db","Resolver":{"ConnectTimeout":"7s","Target":"t"}}},"Targets":{"t":{"ID":"t","Service":"db","Datacenter":"dc1"}}}}`)
	m.until("another protocol", func(s *connect.Snapshot) bool { return s.Upstreams[1].Protocol == connect.HTTP })
	m.ca, err = certs.NewAuthority("22222222-2222-3333-4444-555555555555.consul")
	require.NoError(t, err)
	m.leaf()
	m.roots(m.ca)
	m.until("another cluster", func(s *connect.Snapshot) bool {
		return s.Upstreams[1].Target.IDs[0].TrustDomain == m.ca.TrustDomain
	})
}

// Errors of every kind leave the last good state; half of the watches failing leaves
// the others working.
func TestFailStatic(t *testing.T) {
	for _, status := range []int{403, 429, 500, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			m := newMesh(t)
			m.run()
			good := m.until("two endpoints", count(2))
			m.agent.Fail(status)
			require.Eventually(t, func() bool {
				for _, f := range m.w.Feeds() {
					if f.Err == "" && f.Name != "default policy" && f.Name != "extensions" {
						return false
					}
				}
				return true
			}, 10*time.Second, 5*time.Millisecond, "%v", m.w.Feeds())
			require.Same(t, good, m.last.Load())
			m.endpoints("passing", 1, 2, 3)
			m.agent.Fail(0)
			m.until("it converges", count(3))
		})
	}
	m := newMesh(t)
	m.run()
	m.until("two endpoints", count(2))
	m.agent.Set("/v1/health/connect/db", `{"not":"a list"}`)
	m.agent.Set("/v1/agent/connect/ca/roots", `null`)
	m.agent.Set("/v1/connect/intentions/match", `{"www":[{"SourceName":"shop","Action":"allow","Precedence":9}]}`)
	s := m.until("intentions still arrive", func(s *connect.Snapshot) bool { return s.Policy.Decide(m.ca.ID("shop"), nil).Allow })
	require.True(t, count(2)(s))
}

// A restarted agent calls every check critical until it has run.
func TestRestartedAgentDoesNotEmptyABackend(t *testing.T) {
	m := newMesh(t)
	m.run()
	m.until("two endpoints", count(2))
	feed := func() (one Feed) {
		for _, f := range m.w.Feeds() {
			if f.Name == "endpoints of db" {
				one = f
			}
		}
		return one
	}
	m.agent.Fail(500)
	require.Eventually(t, func() bool { return feed().Err != "" }, 10*time.Second, time.Millisecond)
	m.endpoints("critical", 1, 2)
	m.agent.Set("/v1/connect/intentions/match", `{"www":[{"SourceName":"shop","Action":"allow","Precedence":9}]}`)
	m.agent.Fail(0)
	s := m.until("the agent is heard again", func(s *connect.Snapshot) bool { return s.Policy.Decide(m.ca.ID("shop"), nil).Allow })
	require.True(t, count(2)(s))
	require.Eventually(t, func() bool { return feed().Err == "" }, 10*time.Second, time.Millisecond)
	m.agent.Set("/v1/connect/intentions/match", `{"www":[{"SourceName":"cart","Action":"allow","Precedence":9}]}`)
	s = m.until("what came before is applied", func(s *connect.Snapshot) bool { return s.Policy.Decide(m.ca.ID("cart"), nil).Allow })
	require.True(t, count(2)(s))
	m.endpoints("passing", 2)
	m.until("what is passing counts at once", count(1))
}

func TestWhatWouldEmptyAnUpstreamWaits(t *testing.T) {
	one, other := connect.Endpoint{Name: "one"}, connect.Endpoint{Name: "other"}
	run := func(name string, f func(w *Watcher, hear func(...connect.Endpoint), after func(time.Duration, ...connect.Endpoint))) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWatcher(nil, "", slog.New(slog.DiscardHandler))
				d := declared{up: connect.Upstream{Name: "db"}, key: "db"}
				st := &state{answers: map[string]*resolved{"db": {ctx: t.Context()}}}
				hear := func(list ...connect.Endpoint) { w.retarget(st, d, connect.Target{Service: "db", Endpoints: list}) }
				hear(one)
				f(w, hear, func(d time.Duration, want ...connect.Endpoint) {
					time.Sleep(d)
					synctest.Wait()
					for len(w.updates) > 0 {
						(<-w.updates)(st)
					}
					require.Equal(t, want, st.answers["db"].target.Endpoints)
				})
				time.Sleep(time.Minute) // the last of the waits
			})
		})
	}
	away, denied := errors.New("connection refused"), api.StatusError{Code: 403}
	run("not without trouble", func(w *Watcher, hear func(...connect.Endpoint), after func(time.Duration, ...connect.Endpoint)) {
		hear()
		after(0)
	})
	run("not when Consul only says no", func(w *Watcher, hear func(...connect.Endpoint), after func(time.Duration, ...connect.Endpoint)) {
		w.feeds.failed("intentions", away)
		w.feeds.ok("intentions")
		time.Sleep(restartGrace)
		w.feeds.failed("intentions", denied)
		hear()
		after(0)
	})
	run("from when the last watch was answered again", func(w *Watcher, hear func(...connect.Endpoint), after func(time.Duration, ...connect.Endpoint)) {
		w.feeds.failed("intentions", away)
		w.feeds.failed("roots", away)
		time.Sleep(time.Hour)
		w.feeds.ok("roots")
		time.Sleep(time.Hour)
		w.feeds.failed("intentions", denied)
		time.Sleep(5 * time.Second)
		hear()
		after(restartGrace-6*time.Second, one)
		after(time.Second)
	})
	run("a watch that ends in trouble is not waited for", func(w *Watcher, hear func(...connect.Endpoint), after func(time.Duration, ...connect.Endpoint)) {
		w.feeds.failed("chain of api", away)
		w.feeds.drop("chain of api")
		time.Sleep(restartGrace)
		hear()
		after(0)
	})
	run("what is heard meanwhile does not prolong it", func(w *Watcher, hear func(...connect.Endpoint), after func(time.Duration, ...connect.Endpoint)) {
		w.feeds.failed("intentions", away)
		hear()
		after(10*time.Second, one)
		hear()
		after(restartGrace-11*time.Second, one)
		after(time.Second)
		require.EqualValues(t, 1, w.Held())
	})
	run("an endpoint ends it", func(w *Watcher, hear func(...connect.Endpoint), after func(time.Duration, ...connect.Endpoint)) {
		w.feeds.failed("intentions", away)
		hear()
		after(time.Second, one)
		hear(other)
		after(0, other)
		after(restartGrace, other)
	})
}

func TestOnlyTheTargetsOwnEndpointsAreHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWatcher(nil, "", slog.New(slog.DiscardHandler))
		d := declared{key: "db"}
		r := &resolved{ctx: t.Context()}
		st := &state{answers: map[string]*resolved{"db": r}}
		target := func(service, dc string, list ...connect.Endpoint) connect.Target {
			return connect.Target{Service: service, Datacenter: dc, Endpoints: list}
		}
		w.feeds.failed("intentions", errors.New("connection refused"))
		w.retarget(st, d, target("db", "dc1", connect.Endpoint{Name: "one"}))
		w.retarget(st, d, target("db", "dc1"))
		w.retarget(st, d, target("db", "dc2"))
		require.Equal(t, target("db", "dc1", connect.Endpoint{Name: "one"}), r.target)
		(<-w.updates)(st)
		require.Equal(t, target("db", "dc2"), r.target, "the last that was heard")
		w.retarget(st, d, target("db", "dc1", connect.Endpoint{Name: "one"}))
		w.retarget(st, d, target("db2", "dc1"))
		require.Equal(t, target("db2", "dc1"), r.target, "a redirect counts at once")
	})
}

func TestRestartDoesNotEmptyAQueryEither(t *testing.T) {
	m := newMesh(t)
	client, err := NewClient(Config{Addr: m.agent.Addr()})
	require.NoError(t, err)
	w := NewWatcher(client, "", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	defer w.wg.Wait()
	defer cancel()
	st := &state{answers: map[string]*resolved{"q": {ctx: ctx}}}
	ask := func() int {
		apply, err := w.fetchQuery(declared{query: true, service: "q", key: "q"})(ctx, &cursor{})
		require.NoError(t, err)
		apply(st)
		return len(st.answers["q"].target.Endpoints)
	}
	m.agent.Set("/v1/query/q/execute", `{"Datacenter":"dc1","Nodes":[{"Node":{"Node":"n","Address":"10.0.0.1"},"Service":{"ID":"db1","Service":"db","Port":20001}}]}`)
	require.Equal(t, 1, ask())
	m.agent.Set("/v1/query/q/execute", `{"Datacenter":"dc1","Nodes":[]}`)
	w.feeds.failed("intentions", errors.New("connection refused"))
	require.Equal(t, 1, ask())
}

func TestLookup(t *testing.T) {
	agent := connecttest.New()
	defer agent.Close()
	client, err := NewClient(Config{Addr: agent.Addr()})
	require.NoError(t, err)
	agent.Set("/v1/agent/services", `{}`)
	_, err = client.Lookup(t.Context(), Which{SidecarFor: "web"})
	require.EqualError(t, err, "No sidecar proxy registered for web: not registered yet")
	require.ErrorIs(t, err, ErrNotRegistered)
	_, err = client.Lookup(t.Context(), Which{ProxyID: "none"})
	require.ErrorIs(t, err, ErrNotRegistered)
	agent.Set("/v1/agent/services", `{"p1":{"ID":"p1","Kind":"connect-proxy","Proxy":{"DestinationServiceID":"WEB"}},"web":{"ID":"web","Tags":["a"]}}`)
	for _, w := range []Which{{SidecarFor: "web"}, {SidecarForTag: "a"}} {
		id, err := client.Lookup(t.Context(), w)
		require.NoError(t, err)
		require.Equal(t, "p1", id)
	}
	agent.Set("/v1/agent/services", `{"p1":{"ID":"p1","Kind":"connect-proxy","Proxy":{"DestinationServiceID":"web"}},"p2":{"ID":"p2","Kind":"connect-proxy","Proxy":{"DestinationServiceID":"web"}}}`)
	_, err = client.Lookup(t.Context(), Which{SidecarFor: "web"})
	require.ErrorContains(t, err, "More than one sidecar proxy registered for web.")
	require.ErrorContains(t, err, "p1, p2")
	require.False(t, errors.Is(err, ErrNotRegistered))
	agent.Set("/v1/agent/service/web", `{"ID":"web","Kind":""}`)
	_, err = client.Lookup(t.Context(), Which{ProxyID: "web"})
	require.ErrorContains(t, err, "not a Connect proxy")
	_, err = client.Lookup(t.Context(), Which{})
	require.Error(t, err)
}
