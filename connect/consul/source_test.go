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
	w     *Source
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
	m.agent.Set("/v1/peerings", `[]`)
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
	m.w = NewSource(client, "www-proxy", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan error, 1)
	go func() { done <- m.w.Run(ctx, func(s *connect.Snapshot) { m.last.Store(s) }) }()
	m.t.Cleanup(func() {
		cancel()
		require.NoError(m.t, <-done)
	})
}

// until waits for a snapshot for which is returns true.
func (m *mesh) until(what string, is func(*connect.Snapshot) bool) *connect.Snapshot {
	m.t.Helper()
	var s *connect.Snapshot
	require.Eventually(m.t, func() bool { s = m.last.Load(); return s != nil && is(s) }, 10*time.Second, 2*time.Millisecond, what)
	return s
}

func count(n int) func(*connect.Snapshot) bool {
	return func(s *connect.Snapshot) bool {
		return len(s.Upstreams()) == 1 && len(target(s, 0).Endpoints) == n
	}
}

// group and target return the first group and target that an upstream leads to.
func group(s *connect.Snapshot, i int) *connect.Group {
	return s.Group(s.Upstreams()[i].Branches[0].Chain.Routes[0].Splits[0].Group)
}

func target(s *connect.Snapshot, i int) *connect.Target { return s.Target(group(s, i).Targets[0]) }

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
	u, to := s.Upstreams()[0], target(s, 0)
	require.Equal(t, 7*time.Second, group(s, 0).Connect)
	require.Equal(t, "spiffe://"+domain+"/ns/default/dc/dc1/svc/db", to.Dial.IDs[0].String())
	require.False(t, s.Public().Policy().Decide(m.ca.ID("any"), nil).Allow)

	m.agent.Set("/v1/connect/intentions/match", `{"www":[{"SourceName":"shop","Action":"allow","Precedence":9},{"SourceName":"jwt","Action":"allow","Precedence":9,"JWT":{"Providers":[{"Name":"x"}]}}]}`)
	s = m.until("an intention", func(s *connect.Snapshot) bool { return s.Public().Policy().Decide(m.ca.ID("shop"), nil).Allow })
	require.Same(t, u, s.Upstreams()[0], "what did not change is the same pointer")
	require.Same(t, to, target(s, 0))
	require.False(t, s.Public().Policy().Decide(m.ca.ID("jwt"), nil).Allow, "a token that is demanded cannot be ignored")

	m.endpoints("passing", 1, 2, 3)
	s = m.until("three endpoints", count(3))
	require.NotSame(t, to, target(s, 0))
	require.Same(t, u, s.Upstreams()[0])
	m.endpoints("critical", 1, 2, 3)
	m.until("no endpoints, as nothing was wrong with the agent", count(0))

	other, err := certs.NewAuthority(domain)
	require.NoError(t, err)
	m.roots(m.ca, other)
	m.until("two roots", func(s *connect.Snapshot) bool { return s.Roots().Count == 2 })
	before := s.Leaf()
	m.leaf()
	s = m.until("a new leaf", func(s *connect.Snapshot) bool { return s.Leaf().Fingerprint != before.Fingerprint })

	u = s.Upstreams()[0]
	m.agent.Set("/v1/agent/service/www-proxy", `{"Kind":"connect-proxy","ID":"www-proxy","Service":"www-proxy","Port":21000,"Datacenter":"dc1","ContentHash":"2",
		"Proxy":{"DestinationServiceName":"www","LocalServicePort":8080,"Upstreams":[{"DestinationName":"cache","LocalBindPort":2},{"DestinationName":"db","LocalBindPort":1}]}}`)
	s = m.until("another upstream", func(s *connect.Snapshot) bool { return len(s.Upstreams()) == 2 })
	require.Same(t, u, s.Upstreams()[1], "what did not change is the same pointer")
	m.agent.Set("/v1/discovery-chain/db", `{"Chain":{"ServiceName":"db","Protocol":"http","StartNode":"resolver:db","Nodes":{"resolver:db":{"Type":"resolver","Name":"db","Resolver":{"ConnectTimeout":"7s","Target":"t"}}},"Targets":{"t":{"ID":"t","Service":"db","Datacenter":"dc1"}}}}`)
	m.until("another protocol", func(s *connect.Snapshot) bool { return s.Upstreams()[1].Protocol() == connect.HTTP })
	m.ca, err = certs.NewAuthority("22222222-2222-3333-4444-555555555555.consul")
	require.NoError(t, err)
	m.leaf()
	m.roots(m.ca)
	m.until("another cluster", func(s *connect.Snapshot) bool {
		return target(s, 1).Dial.IDs[0].TrustDomain == m.ca.TrustDomain
	})
}

// Errors of every kind leave the last good state in force; if some watches fail, the
// others go on.
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
	s := m.until("intentions still arrive", func(s *connect.Snapshot) bool { return s.Public().Policy().Decide(m.ca.ID("shop"), nil).Allow })
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
	s := m.until("the agent is heard again", func(s *connect.Snapshot) bool { return s.Public().Policy().Decide(m.ca.ID("shop"), nil).Allow })
	require.True(t, count(2)(s))
	require.Eventually(t, func() bool { return feed().Err == "" }, 10*time.Second, time.Millisecond)
	m.agent.Set("/v1/connect/intentions/match", `{"www":[{"SourceName":"cart","Action":"allow","Precedence":9}]}`)
	s = m.until("what came before is applied", func(s *connect.Snapshot) bool { return s.Public().Policy().Decide(m.ca.ID("cart"), nil).Allow })
	require.True(t, count(2)(s))
	m.endpoints("passing", 2)
	m.until("what is passing counts at once", count(1))
}

// found is the answer of a watch for endpoints.
func found(list ...connect.Endpoint) instances { return instances{}.found(list) }

func TestWhatWouldEmptyATargetWaits(t *testing.T) {
	one, other := connect.Endpoint{Name: "one", Address: "10.0.0.1"}, connect.Endpoint{Name: "other", Address: "10.0.0.2"}
	type hear = func(...connect.Endpoint)
	type after = func(time.Duration, ...connect.Endpoint)
	run := func(name string, f func(w *Source, intentions, roots *Feed, hear hear, after after)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewSource(nil, "", slog.New(slog.DiscardHandler))
				a := &answer{watch: watch{key: "db", void: noInstances, shapes: namedInstances}, ctx: t.Context()}
				st := &state{answers: map[string]*answer{"db": a}}
				hear := func(list ...connect.Endpoint) { w.take(st, update{a, found(list...)}) }
				hear(one)
				f(w, w.feeds.open("intentions"), w.feeds.open("roots"), hear, func(d time.Duration, want ...connect.Endpoint) {
					time.Sleep(d)
					synctest.Wait()
					for len(w.updates) > 0 {
						w.take(st, <-w.updates)
					}
					require.Equal(t, found(want...), a.value)
				})
				time.Sleep(time.Minute) // the last of the waits
			})
		})
	}
	away, denied := errors.New("connection refused"), api.StatusError{Code: 403}
	run("not without trouble", func(_ *Source, _, _ *Feed, hear hear, after after) {
		hear()
		after(0)
	})
	run("not when Consul only says no", func(w *Source, intentions, _ *Feed, hear hear, after after) {
		w.feeds.failed(intentions, away)
		w.feeds.ok(intentions)
		time.Sleep(restartGrace)
		w.feeds.failed(intentions, denied)
		hear()
		after(0)
	})
	run("from when the last watch was answered again", func(w *Source, intentions, roots *Feed, hear hear, after after) {
		w.feeds.failed(intentions, away)
		w.feeds.failed(roots, away)
		time.Sleep(time.Hour)
		w.feeds.ok(roots)
		time.Sleep(time.Hour)
		w.feeds.failed(intentions, denied)
		time.Sleep(5 * time.Second)
		hear()
		after(restartGrace-6*time.Second, one)
		after(time.Second)
	})
	run("a watch that ends in trouble is not waited for", func(w *Source, _, _ *Feed, hear hear, after after) {
		chain := w.feeds.open("chain of api")
		w.feeds.failed(chain, away)
		w.feeds.drop(chain)
		time.Sleep(restartGrace)
		hear()
		after(0)
	})
	run("what is heard meanwhile does not prolong it", func(w *Source, intentions, _ *Feed, hear hear, after after) {
		w.feeds.failed(intentions, away)
		hear()
		after(10*time.Second, one)
		hear()
		after(restartGrace-11*time.Second, one)
		after(time.Second)
		require.EqualValues(t, 1, w.Held())
	})
	run("an endpoint ends it", func(w *Source, intentions, _ *Feed, hear hear, after after) {
		w.feeds.failed(intentions, away)
		hear()
		after(time.Second, one)
		hear(other)
		after(0, other)
		after(restartGrace, other)
	})
}

// Of several answers that are held back, the last one comes into force.
func TestTheLastThatWasHeardCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewSource(nil, "", slog.New(slog.DiscardHandler))
		a := &answer{watch: watch{key: "q", void: noInstances}, ctx: t.Context()}
		st := &state{answers: map[string]*answer{"q": a}}
		w.feeds.failed(w.feeds.open("intentions"), errors.New("connection refused"))
		first, last := found(connect.Endpoint{Name: "one"}), instances{dc: "dc2"}
		w.take(st, update{a, first})
		w.take(st, update{a, instances{dc: "dc1"}})
		w.take(st, update{a, last})
		require.Equal(t, first, a.value)
		w.take(st, <-w.updates)
		require.Equal(t, last, a.value)
		w.take(st, update{a, nil})
		require.Equal(t, last, a.value, "nothing is held any more")
	})
}

// Neither an answer to a watch that is not wanted any more nor an equal answer changes the state;
// another question about the same subject begins with what is known.
func TestWatchesAreWantedByTheState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSource(&Client{}, "", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		defer s.wg.Wait()
		defer cancel()
		st := &state{answers: map[string]*answer{}}
		asked := map[string]int{}
		ask := func(key, subject string) watch {
			return watch{key: key, name: key, subject: subject, every: time.Hour, fetch: func(context.Context, *cursor) (any, error) {
				asked[key]++
				return key, nil
			}}
		}
		list := []watch{ask("a", "x"), ask("a", "x"), ask("b", "")}
		wants := func() []watch { return list }
		s.sync(ctx, st, wants)
		synctest.Wait()
		require.Equal(t, map[string]int{"a": 1, "b": 1}, asked, "equal questions are asked once")
		for len(s.updates) > 0 {
			s.take(st, <-s.updates)
		}
		old, turn := st.answers["a"], st.turn
		s.take(st, update{old, "a"})
		require.Equal(t, turn, st.turn, "the same answer is no change")
		list = []watch{ask("a2", "x")}
		s.sync(ctx, st, wants)
		require.Len(t, st.answers, 1)
		got, ok := heard[string](st, "a2")
		require.True(t, ok)
		require.Equal(t, "a", got)
		synctest.Wait()
		require.Len(t, s.Feeds(), 1)
		turn = st.turn
		s.take(st, update{old, "late"})
		require.Equal(t, turn, st.turn)
	})
}

func TestRestartDoesNotEmptyAQueryEither(t *testing.T) {
	m := newMesh(t)
	client, err := NewClient(Config{Addr: m.agent.Addr()})
	require.NoError(t, err)
	w := NewSource(client, "", slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	defer w.wg.Wait()
	defer cancel()
	a := &answer{watch: client.query(&declared{query: true, service: "q"}, "dc1"), ctx: ctx}
	st := &state{answers: map[string]*answer{a.key: a}}
	ask := func() int {
		v, err := a.fetch(ctx, &cursor{})
		require.NoError(t, err)
		w.take(st, update{a, v})
		return len(a.value.(instances).endpoints)
	}
	m.agent.Set("/v1/query/q/execute", `{"Datacenter":"dc1","Nodes":[{"Node":{"Node":"n","Address":"10.0.0.1"},"Service":{"ID":"db1","Service":"db","Port":20001}}]}`)
	require.Equal(t, 1, ask())
	m.agent.Set("/v1/query/q/execute", `{"Datacenter":"dc1","Nodes":[]}`)
	w.feeds.failed(w.feeds.open("intentions"), errors.New("connection refused"))
	require.Equal(t, 1, ask())
}

func TestLookup(t *testing.T) {
	agent := connecttest.New()
	defer agent.Close()
	client, err := NewClient(Config{Addr: agent.Addr()})
	require.NoError(t, err)
	agent.Set("/v1/agent/services", `{}`)
	_, err = client.Lookup(t.Context(), Selector{SidecarFor: "web"})
	require.EqualError(t, err, "No sidecar proxy registered for web: not registered yet")
	require.ErrorIs(t, err, ErrNotRegistered)
	_, err = client.Lookup(t.Context(), Selector{ProxyID: "none"})
	require.ErrorIs(t, err, ErrNotRegistered)
	agent.Set("/v1/agent/services", `{"p1":{"ID":"p1","Kind":"connect-proxy","Proxy":{"DestinationServiceID":"WEB"}},"web":{"ID":"web","Tags":["a"]}}`)
	for _, w := range []Selector{{SidecarFor: "web"}, {SidecarForTag: "a"}} {
		id, err := client.Lookup(t.Context(), w)
		require.NoError(t, err)
		require.Equal(t, "p1", id)
	}
	agent.Set("/v1/agent/services", `{"p1":{"ID":"p1","Kind":"connect-proxy","Proxy":{"DestinationServiceID":"web"}},"p2":{"ID":"p2","Kind":"connect-proxy","Proxy":{"DestinationServiceID":"web"}}}`)
	_, err = client.Lookup(t.Context(), Selector{SidecarFor: "web"})
	require.ErrorContains(t, err, "More than one sidecar proxy registered for web.")
	require.ErrorContains(t, err, "p1, p2")
	require.False(t, errors.Is(err, ErrNotRegistered))
	agent.Set("/v1/agent/service/web", `{"ID":"web","Kind":""}`)
	_, err = client.Lookup(t.Context(), Selector{ProxyID: "web"})
	require.ErrorContains(t, err, "not a Connect proxy")
	_, err = client.Lookup(t.Context(), Selector{})
	require.Error(t, err)
}
