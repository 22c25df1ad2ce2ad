package render

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/connecttest"
)

type identityPair struct {
	leaf  *certs.Leaf
	roots *certs.Roots
	ca    *certs.Authority
}

func newIdentity(t testing.TB) identityPair {
	ca, err := certs.NewAuthority("11111111-2222-3333-4444-555555555555.consul")
	require.NoError(t, err)
	leaf, err := ca.Leaf("www", time.Hour)
	require.NoError(t, err)
	roots, err := ca.Roots()
	require.NoError(t, err)
	return identityPair{leaf, roots, ca}
}

// snapshot has n upstreams of each kind with e endpoints.
func (p identityPair) snapshot(n, e int) *connect.Snapshot {
	s := connecttest.Snapshot(p.leaf, p.roots)
	connecttest.Add(s, connecttest.Public(connect.HTTP))
	for i := range n {
		connecttest.Add(s, p.upstream(fmt.Sprintf("http%d", i), connect.HTTP, 10000+2*i, e), p.upstream(fmt.Sprintf("tcp%d", i), connect.TCP, 10001+2*i, e))
	}
	return s
}

func (p identityPair) upstream(name string, proto connect.Protocol, port, e int) connecttest.Way {
	var list []connect.Endpoint
	for j := range e {
		list = append(list, connect.Endpoint{Name: fmt.Sprintf("n%d.%s", j, name), Address: fmt.Sprintf("10.0.%d.%d", j/250, j%250+1), Port: 20000, Weight: 1})
	}
	return connecttest.Upstream(name, proto, port, p.ca.ID(name), list...)
}

// alone is a snapshot with these upstreams.
func (p identityPair) alone(ways ...connecttest.Way) *connect.Snapshot {
	s := p.snapshot(0, 0)
	connecttest.Add(s, ways...)
	return s
}

func mustRender(t testing.TB, s *connect.Snapshot, o Options, prev *Config) *Config {
	o.Dir = "/run/x"
	r, err := New(o)
	require.NoError(t, err)
	c, refused, err := r.Render(s, prev)
	require.NoError(t, err)
	require.Empty(t, refused)
	return c
}

// Every connector has the four parts without which it must not exist: chain
// verification, the roots, the identity filter with at least one name, its guard.
func TestNoConnectorWithoutItsGuard(t *testing.T) {
	p := newIdentity(t)
	s := p.snapshot(2, 2)
	none := p.upstream("none", connect.TCP, 9001, 0)
	none.Target.Dial.IDs = nil
	connecttest.Add(s, p.upstream("grpc", connect.GRPC, 9000, 1), none)
	for _, o := range []Options{{}, {LuaBool: true, User: "haproxy", Group: "haproxy", AccessLog: LogJSON}, {AccessLog: LogText}} {
		c := mustRender(t, s, o, nil)
		connectors := 0
		for _, sec := range c.Sections {
			text := sec.Head
			for _, srv := range sec.Servers {
				text += srv.Line() + "\n"
			}
			tls := regexp.MustCompile(`(?m)^\s*server .* ssl `).FindAllString(text, -1)
			if len(tls) == 0 && !strings.Contains(text, "lua.spiffe") {
				continue
			}
			connectors++
			for _, line := range strings.Split(text, "\n") {
				if strings.Contains(line, " ssl ") && strings.Contains(line, "server ") {
					require.Contains(t, line, "verify required")
					require.Contains(t, line, "ca-file /run/x/tls/roots.pem")
					require.NotContains(t, line, " sni ")
				}
			}
			require.Contains(t, text, "mode tcp", "the filter works in TCP mode only")
			require.Regexp(t, `(?m)^\s*filter lua\.spiffe (slot|nobody|spiffe://\S+)`, text)
			require.Regexp(t, `(?m)^\s*tcp-request content reject unless \{ var\(txn\.spiffe_armed\) -m bool \}$`, text)
		}
		require.GreaterOrEqual(t, connectors, 5)
		require.NotContains(t, c.Text(), "PRIVATE")
		for _, f := range c.Files {
			require.NotContains(t, f, "PRIVATE")
		}
	}
	require.NotContains(t, mustRender(t, s, Options{Originator: Go}, nil).Text(), " ssl crt /run", "the Go originator leaves no TLS server behind")
}

func TestSameInputSameText(t *testing.T) {
	p := newIdentity(t)
	s := p.snapshot(3, 3)
	require.Equal(t, mustRender(t, s, Options{}, nil).Text(), mustRender(t, s, Options{}, nil).Text())
}

func used(c *Config, class string) map[string]int {
	out := map[string]int{}
	c.Slots[class].Each(func(v string, id int) { out[v] = id })
	return out
}

func TestSlotsStayWithTheirEndpoints(t *testing.T) {
	p := newIdentity(t)
	first := mustRender(t, p.snapshot(1, 10), Options{}, nil)
	more := mustRender(t, p.snapshot(1, 20), Options{}, first)
	for v, id := range used(first, "h1-5000") {
		require.Equal(t, id, used(more, "h1-5000")[v])
	}
	less := mustRender(t, p.snapshot(1, 1), Options{}, more)
	require.Equal(t, more.Slots["h1-5000"].Size, less.Slots["h1-5000"].Size, "sockets are not taken away")
	grown := mustRender(t, p.snapshot(1, 200), Options{}, less)
	require.GreaterOrEqual(t, grown.Slots["h1-5000"].Size, 400)
	seen := map[int]bool{}
	for _, id := range used(grown, "h1-5000") {
		require.False(t, seen[id], "two endpoints in slot %d", id)
		seen[id] = true
		require.True(t, id >= 1 && id <= grown.Slots["h1-5000"].Size)
	}
}

// Sockets and connections share the limit of open files: HAProxy does not start beyond it.
func TestOpenFilesSuffice(t *testing.T) {
	p := newIdentity(t)
	for _, endpoints := range []int{10, 200, 1500, 3000} {
		const limit = 6000
		c := mustRender(t, p.snapshot(1, endpoints), Options{MaxFiles: limit, MaxConn: 8192}, nil)
		size := c.Slots["h1-5000"].Size
		require.GreaterOrEqual(t, size, endpoints)
		most := regexp.MustCompile(`(?m)^  maxconn (\d+)$`).FindStringSubmatch(c.Text())
		require.NotNil(t, most)
		n, err := strconv.Atoi(most[1])
		require.NoError(t, err)
		require.Less(t, size+2*n+300, limit, "%d endpoints: %d sockets, %d connections", endpoints, size, n)
	}
}

// One upstream that cannot be written leaves the others alone.
func TestBadUpstreamIsLeftOut(t *testing.T) {
	p := newIdentity(t)
	s := p.snapshot(1, 1)
	bad := p.upstream("fine", connect.HTTP, 7000, 1)
	bad.Target.Endpoints[0].Name = "x\n  server evil 6.6.6.6:666"
	lost := p.upstream("lost", connect.TCP, 7001, 1)
	lost.Listener.Branches[0].Chain = connect.Direct("nobody")
	connecttest.Add(s, bad, lost)
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(t, err)
	c, refused, err := r.Render(s, nil)
	require.NoError(t, err)
	require.Len(t, refused, 2)
	require.Same(t, bad.Listener, refused[0].Listener)
	require.NotContains(t, refused[0].Error(), "\n")
	require.ErrorContains(t, refused[1], "there is no group")
	require.NotNil(t, c.Find(Backend, "tcp0.default.dc1"))
	require.NotContains(t, c.Text(), "evil")
}

// route changes the only route of a way.
func route(change func(*connect.Route)) func(*connecttest.Way) {
	return func(w *connecttest.Way) {
		c := &w.Listener.Branches[0].Chain
		c.Routes = slices.Clone(c.Routes)
		change(&c.Routes[0])
	}
}

// FuzzNothingAddsALine: whatever a string of the mesh contains, the configuration
// never has a line more than with a harmless one, and no line of another kind.
func FuzzNothingAddsALine(f *testing.F) {
	for _, s := range []string{"x", "a\nb", "a b", `a"b`, "a'b", "a#b", "%[src]", "$HOME", "a\x00b", "\\", "\r\n  http-request allow", strings.Repeat("x", 10000),
		"unix@/etc/passwd", "::1", "a,b", "a|b", "{x}", "ipv4@1.2.3.4", "\u2028", "é"} {
		f.Add(s)
	}
	p := newIdentity(f)
	build := func(v string) *connect.Snapshot {
		s := p.snapshot(0, 0)
		app := connecttest.Public(connect.HTTP)
		app.Target.Endpoints[0].SocketPath = "/" + v
		open := connecttest.Public(connect.HTTP).But(func(w *connecttest.Way) {
			w.Listener.Name, w.Listener.Role, w.Group.Name, w.Target.Name = "expose_2", connect.Open, "exposed", "exposed"
			w.Listener.Branches[0] = connect.Branch{Protocol: connect.HTTP, Chain: connect.Direct("exposed")}
			w.Listener.Branches[0].Chain.Routes[0].Match.PathExact = "/" + v
			w.Group.Targets = []connect.TargetName{"exposed"}
		})
		connecttest.Add(s, app, open)
		for i, set := range []func(w *connecttest.Way){
			func(w *connecttest.Way) { w.Listener.Name = v },
			func(w *connecttest.Way) {
				w.Target.Name, w.Group.Targets[0] = connect.TargetName(v), connect.TargetName(v)
			},
			func(w *connecttest.Way) {
				w.Group.Name, w.Listener.Branches[0].Chain = connect.GroupName(v), connect.Direct(connect.GroupName(v))
			},
			func(w *connecttest.Way) { w.Target.Endpoints[0].Name = v },
			func(w *connecttest.Way) { w.Target.Endpoints[0].Address = v },
			func(w *connecttest.Way) { w.Target.Dial.IDs[0].Service = v },
			func(w *connecttest.Way) { w.Target.Dial.IDs[0].TrustDomain = v },
			func(w *connecttest.Way) {
				w.Target.Dial.Leaf, w.Target.Dial.Bundle = connect.LeafName(v), connect.BundleName(v)
			},
			func(w *connecttest.Way) { w.Listener.Bind = connect.Bind{SocketPath: "/" + v} },
			func(w *connecttest.Way) { w.Listener.Bind.Address = v },
			route(func(r *connect.Route) { r.Match.PathExact = v }),
			route(func(r *connect.Route) { r.Match.PathPrefix, r.Match.IgnoreCase, r.Rewrite = v, true, v }),
			route(func(r *connect.Route) { r.Match.PathRegex = v }),
			route(func(r *connect.Route) { r.Match.Methods = []string{v} }),
			route(func(r *connect.Route) {
				r.Match.Headers = []connect.HeaderMatch{{Name: v, Present: true}, {Name: v, Exact: "x"}}
			}),
			route(func(r *connect.Route) {
				r.Match.Headers = []connect.HeaderMatch{{Name: "a", Exact: v}, {Name: "a", Prefix: v}, {Name: "b", Suffix: v}, {Name: "b", Contains: v}, {Name: "c", Regex: v, Invert: true}}
			}),
			route(func(r *connect.Route) {
				r.Match.Query = []connect.QueryMatch{{Name: v, Present: true}, {Name: v, Exact: v}, {Name: v, Regex: v}}
			}),
			route(func(r *connect.Route) {
				r.Request = connect.HeaderEdits{Set: []connect.Header{{Name: "a", Value: v}}, Remove: []string{v}}
				r.Answer = connect.HeaderEdits{Add: []connect.Header{{Name: v, Value: v}}}
			}),
			func(w *connecttest.Way) {
				w.Group.Balance = connect.Balance{Policy: connect.Hash, Hash: []connect.HashPolicy{{Header: v}, {Cookie: v, Generate: true, Path: "/" + v}, {Query: v}}}
			},
		} {
			for _, proto := range []connect.Protocol{connect.TCP, connect.HTTP} {
				w := p.upstream(fmt.Sprintf("u%d%s", i, proto), proto, 3000+i, 1)
				set(&w)
				connecttest.Add(s, w)
			}
		}
		return s
	}
	kinds := func(text string) map[string]int {
		out := map[string]int{}
		for line := range strings.Lines(text) {
			if w := strings.Fields(line); len(w) > 0 {
				out[w[0]]++
			}
		}
		return out
	}
	r, err := New(Options{Dir: "/run/x"})
	if err != nil {
		f.Fatal(err)
	}
	good, _, err := r.Render(build("harmless"), nil)
	if err != nil {
		f.Fatal(err)
	}
	most := kinds(good.Text())
	for n, c := range kinds(good.Maps[SlotMapFile("h1-5000")].Text()) {
		_ = n
		most["map"] += c
	}
	f.Fuzz(func(t *testing.T, v string) {
		c, _, err := r.Render(build(v), nil)
		if err != nil {
			if strings.ContainsFunc(err.Error(), func(r rune) bool { return r == '\r' || r == 0 }) {
				t.Fatalf("the error carries control characters: %q", err)
			}
			return
		}
		for kind, n := range kinds(c.Text()) {
			if n > most[kind] {
				t.Fatalf("%q makes %d lines of %q, a harmless string %d:\n%s", v, n, kind, most[kind], c.Text())
			}
		}
		maps := 0
		for _, n := range kinds(c.Maps[SlotMapFile("h1-5000")].Text()) {
			maps += n
		}
		if maps > most["map"] {
			t.Fatalf("%q makes %d lines in the map", v, maps)
		}
	})
}

func BenchmarkRenderOneFlip(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("%d-upstreams", n), func(b *testing.B) {
			p := newIdentity(b)
			s := p.snapshot(n/2, 10)
			r, err := New(Options{Dir: "/run/x"})
			require.NoError(b, err)
			prev, _, err := r.Render(s, nil)
			require.NoError(b, err)
			whole := *s.Targets[0]
			less := whole
			less.Endpoints = less.Endpoints[:9]
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				next := *s
				next.Targets = slices.Clone(s.Targets)
				one := whole
				if i%2 == 0 {
					one = less
				}
				next.Targets[0] = &one
				if prev, _, err = r.Render(&next, prev); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A renderer that knows what it rendered last makes the same as a new one, whatever comes and
// goes.
func TestRendererRemembersNothingThatMatters(t *testing.T) {
	p := newIdentity(t)
	random := rand.New(rand.NewPCG(1, 2))
	full := p.snapshot(0, 0)
	ways := map[string]connecttest.Way{}
	for i := range 16 {
		name, proto := fmt.Sprint("u", i), []connect.Protocol{connect.TCP, connect.HTTP}[i%2]
		ways[name] = p.upstream(name, proto, 9000+i, 12)
	}
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(t, err)
	var prev *Config
	last := map[string]connecttest.Way{}
	for step := range 300 {
		s := *full
		now := map[string]connecttest.Way{}
		for _, name := range slices.Sorted(maps.Keys(ways)) {
			switch old, had := last[name]; random.IntN(6) {
			case 0: // gone
			case 1, 2: // other endpoints
				now[name] = ways[name].But(func(w *connecttest.Way) {
					w.Target.Endpoints = nil
					for _, e := range ways[name].Target.Endpoints {
						if random.IntN(3) > 0 {
							w.Target.Endpoints = append(w.Target.Endpoints, e)
						}
					}
				})
			case 3: // led to what another one leads to
				now[name] = ways[name].But(func(w *connecttest.Way) { w.Listener.Branches[0].Chain = connect.Direct(ways["u1"].Group.Name) })
			default: // as before
				if now[name] = ways[name]; had {
					now[name] = old
				}
			}
		}
		if _, there := now["u1"]; !there {
			now["u1"] = ways["u1"]
		}
		for _, w := range now {
			connecttest.Add(&s, w)
		}
		if random.IntN(25) == 0 {
			full.AccessLog.Enabled = !full.AccessLog.Enabled
			s.AccessLog = full.AccessLog
		}
		if random.IntN(20) == 0 { // another trust: roots replaced
			q := newIdentity(t)
			full.Bundles = map[connect.BundleName]*certs.Roots{connect.OwnBundle: q.roots}
			s.Bundles = full.Bundles
		}
		got, refused, err := r.Render(&s, prev)
		require.NoError(t, err)
		require.Empty(t, refused)
		want := mustRender(t, &s, Options{}, prev)
		require.Equal(t, want.Text(), got.Text(), "step %d", step)
		require.Equal(t, want.Files, got.Files)
		require.Equal(t, want.Maps, got.Maps)
		require.Equal(t, want.Slots, got.Slots)
		if random.IntN(7) > 0 { // else it was refused, and what ran goes on
			prev = got
		}
		last = now
	}
}

// When a root is removed, what it verified must not be used again: every server of an
// HTTP upstream is another one, so that the old ones go with their pools.
func TestRemovedRootRenamesServers(t *testing.T) {
	p, q := newIdentity(t), newIdentity(t)
	both, err := certs.ParseRoots(p.ca.TrustDomain, []string{p.roots.PEM, q.roots.PEM})
	require.NoError(t, err)
	names := func(c *Config, backend string) string {
		out := ""
		for _, s := range c.Find(Backend, backend).Servers {
			out += s.Name + " "
		}
		return out
	}
	s := p.snapshot(1, 3)
	roots := func(r *certs.Roots) { s.Bundles = map[connect.BundleName]*certs.Roots{connect.OwnBundle: r} }
	first := mustRender(t, s, Options{}, nil)
	roots(both)
	added := mustRender(t, s, Options{}, first)
	roots(q.roots)
	removed := mustRender(t, s, Options{}, added)
	again := mustRender(t, s, Options{}, removed)
	http, tcp := "http0.default.dc1", "tcp0.default.dc1"
	require.Equal(t, names(first, http), names(added, http))
	require.NotEqual(t, names(added, http), names(removed, http))
	require.Equal(t, names(removed, http), names(again, http))
	require.Equal(t, names(first, tcp), names(again, tcp), "a tcp upstream pools nothing")
	require.Equal(t, first.Slots, again.Slots)
}

// What a replaced worker means by a slot must never become another service.
func TestSlotsNeverChangeTheirIdentity(t *testing.T) {
	p := newIdentity(t)
	first := mustRender(t, p.snapshot(1, 10), Options{}, nil)
	second := mustRender(t, p.alone(p.upstream("another", connect.HTTP, 9000, 20)), Options{}, first)
	third := mustRender(t, p.snapshot(1, 10), Options{}, second)
	owner := map[int]string{}
	for _, c := range []*Config{first, second, third} {
		for v, id := range used(c, "h1-5000") {
			who := identities(v)
			require.NotEmpty(t, who)
			if owner[id] == "" {
				owner[id] = who
			}
			require.Equal(t, owner[id], who, "slot %d", id)
		}
	}
	require.Equal(t, used(first, "h1-5000"), used(third, "h1-5000"), "its own free slots are used again")
	back := Slots(map[string]string{"h1-5000": second.Maps[SlotMapFile("h1-5000")].Text()})
	require.Equal(t, used(second, "h1-5000"), used(back, "h1-5000"))
	fourth := mustRender(t, p.snapshot(1, 10), Options{}, back)
	for v, id := range used(fourth, "h1-5000") {
		require.Greater(t, id, 30, v)
	}
	require.Empty(t, Slots(map[string]string{"h1-7": "junk\n1 2\n-5 x\n"}).Slots["h1-7"].Values)
	require.Empty(t, Slots(map[string]string{"policy": "generation x\n", "h1-7-abc": "1001 x"}).Slots)
}

// Two endpoints whose names and addresses make the same server take nobody down: HAProxy would
// refuse the whole configuration.
func TestTwoServersOfOneName(t *testing.T) {
	p := newIdentity(t)
	u := p.upstream("db", connect.TCP, 9000, 2)
	u.Target.Endpoints[1] = u.Target.Endpoints[0]
	c := mustRender(t, p.alone(u, p.upstream("api", connect.HTTP, 9001, 2)), Options{}, nil)
	require.Len(t, c.Find(Backend, "db.default.dc1").Servers, 1)
	require.Len(t, c.Find(Backend, "api.default.dc1").Servers, 2)
}

func TestMerge(t *testing.T) {
	p := newIdentity(t)
	api, db := p.upstream("api", connect.HTTP, 9001, 2), p.upstream("db", connect.TCP, 9000, 1)
	running := mustRender(t, p.alone(api, db), Options{}, nil)
	more := api.But(func(w *connecttest.Way) {
		w.Target.Endpoints = append(slices.Clone(api.Target.Endpoints[1:]), connect.Endpoint{Name: "new", Address: "10.9.9.9", Port: 1, Weight: 1})
	})
	next := p.alone(more, p.upstream("other", connect.TCP, 9003, 1))
	want := mustRender(t, next, Options{}, running)
	merged := Merge(running, want)
	require.Len(t, merged.Sections, len(running.Sections))
	require.NotNil(t, merged.Find(Frontend, "up_db"), "what is to go stays until the reload")
	require.Nil(t, merged.Find(Frontend, "up_other"))
	require.Equal(t, want.Find(Backend, "api.default.dc1").Servers, merged.Find(Backend, "api.default.dc1").Servers)
	have := used(merged, "h1-5000")
	for v, id := range used(want, "h1-5000") {
		require.Equal(t, id, have[v])
	}
	for v, id := range used(running, "h1-5000") {
		require.Equal(t, id, have[v], "a server of what runs may still use it")
	}
	again := mustRender(t, next, Options{}, merged)
	require.Equal(t, used(want, "h1-5000"), used(again, "h1-5000"))
}

func TestCheckSnippet(t *testing.T) {
	for _, good := range []string{"timeout check 3s\n", "http-request set-header x \"a b\"\n\thttp-request del-header y\n", "# backend\n", "\n"} {
		require.NoError(t, CheckSnippet(good), good)
	}
	for _, bad := range []string{"backend x\n", "  frontend\ty\n", ".if 0\n", "a\rb\n", "a\x00\n", "timeout check 3s\nlisten x\n"} {
		require.Error(t, CheckSnippet(bad), bad)
	}
}
