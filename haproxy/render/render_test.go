package render

import (
	"fmt"
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
	"github.com/haproxy-connect/haproxy-connect/intentions"
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
	s := &connect.Snapshot{
		Proxy: connect.Proxy{ID: "www-sidecar-proxy", Service: "www", Datacenter: "dc1", TrustDomain: p.ca.TrustDomain},
		Inbound: connect.Inbound{Address: "0.0.0.0", Port: 21000, Protocol: connect.HTTP, Local: connect.Local{Address: "127.0.0.1", Port: 8080},
			LocalConnectTimeout: 5 * time.Second, LocalRequestTimeout: 15 * time.Second, LocalIdleTimeout: time.Minute},
		Leaf: p.leaf, Roots: p.roots, Policy: &intentions.Policy{},
	}
	for i := range n {
		s.Upstreams = append(s.Upstreams, p.upstream(fmt.Sprintf("http%d", i), connect.HTTP, 10000+2*i, e), p.upstream(fmt.Sprintf("tcp%d", i), connect.TCP, 10001+2*i, e))
	}
	return s
}

func (p identityPair) upstream(name string, proto connect.Protocol, port, e int) *connect.Upstream {
	u := &connect.Upstream{Name: name, Protocol: proto, ConnectTimeout: 5 * time.Second, IdleTimeout: time.Minute,
		Listen: connect.Listener{Address: "127.0.0.1", Port: port},
		Target: connect.Target{Name: name + ".default.dc1", Service: name, Datacenter: "dc1", IDs: []certs.SPIFFEID{p.ca.ID(name)}}}
	for j := range e {
		u.Target.Endpoints = append(u.Target.Endpoints, connect.Endpoint{Name: fmt.Sprintf("n%d.%s", j, name), Address: fmt.Sprintf("10.0.%d.%d", j/250, j%250+1), Port: 20000, Weight: 1})
	}
	return u
}

func mustRender(t testing.TB, s *connect.Snapshot, o Options, prev *Config) *Config {
	o.Dir = "/run/x"
	r, err := New(o)
	require.NoError(t, err)
	c, refused, err := r.Render(s, "g", prev)
	require.NoError(t, err)
	require.Empty(t, refused)
	return c
}

// Every connector has the four parts without which it must not exist: chain
// verification, the roots, the identity filter with at least one name, its guard.
func TestNoConnectorWithoutItsGuard(t *testing.T) {
	p := newIdentity(t)
	s := p.snapshot(2, 2)
	s.Upstreams = append(s.Upstreams, p.upstream("grpc", connect.GRPC, 9000, 1), p.upstream("none", connect.TCP, 9001, 0))
	s.Upstreams[len(s.Upstreams)-1].Target.IDs = nil
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
		c := mustRender(t, p.snapshot(1, endpoints), Options{Files: limit, MaxConn: 8192}, nil)
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
	s.Upstreams = append(s.Upstreams, bad)
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(t, err)
	c, refused, err := r.Render(s, "g", nil)
	require.NoError(t, err)
	require.Len(t, refused, 1)
	require.NotContains(t, refused[0].Error(), "\n")
	require.NotNil(t, c.Find("backend tcp0.default.dc1"))
	require.NotContains(t, c.Text(), "evil")
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
		s.Inbound.Expose = []connect.ExposePath{{Path: "/" + v, LocalPort: 1, ListenPort: 2, Protocol: connect.HTTP}}
		s.Inbound.Local.SocketPath = "/" + v
		for i, set := range []func(u *connect.Upstream){
			func(u *connect.Upstream) { u.Name = v },
			func(u *connect.Upstream) { u.Target.Name = v },
			func(u *connect.Upstream) { u.Target.Endpoints[0].Name = v },
			func(u *connect.Upstream) { u.Target.Endpoints[0].Address = v },
			func(u *connect.Upstream) { u.Target.IDs[0].Service = v },
			func(u *connect.Upstream) { u.Target.IDs[0].TrustDomain = v },
			func(u *connect.Upstream) { u.Listen = connect.Listener{SocketPath: "/" + v, SocketMode: "600"} },
			func(u *connect.Upstream) { u.Listen.Address = v },
		} {
			for _, proto := range []connect.Protocol{connect.TCP, connect.HTTP} {
				u := p.upstream(fmt.Sprintf("u%d%s", i, proto), proto, 3000+i, 1)
				set(u)
				s.Upstreams = append(s.Upstreams, u)
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
	good, _, err := r.Render(build("harmless"), "g", nil)
	if err != nil {
		f.Fatal(err)
	}
	most := kinds(good.Text())
	for n, c := range kinds(good.Files[SlotMapFile("h1-5000")]) {
		_ = n
		most["map"] += c
	}
	f.Fuzz(func(t *testing.T, v string) {
		c, _, err := r.Render(build(v), "g", nil)
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
		for _, n := range kinds(c.Files[SlotMapFile("h1-5000")]) {
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
			prev, _, err := r.Render(s, "g", nil)
			require.NoError(b, err)
			u := *s.Upstreams[0]
			u.Target.Endpoints = u.Target.Endpoints[:9]
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				next := *s
				next.Upstreams = append([]*connect.Upstream(nil), s.Upstreams...)
				if i%2 == 0 {
					one := u
					next.Upstreams[0] = &one
				}
				if prev, _, err = r.Render(&next, "g", prev); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// A renderer that knows what it rendered last makes what one makes that knows nothing,
// whatever comes and goes.
func TestRendererRemembersNothingThatMatters(t *testing.T) {
	p := newIdentity(t)
	random := rand.New(rand.NewPCG(1, 2))
	full := p.snapshot(8, 12)
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(t, err)
	var prev *Config
	last := full
	for step := range 300 {
		s := *full
		s.Upstreams = nil
		for i, u := range full.Upstreams {
			switch old := last.Upstreams; random.IntN(5) {
			case 0: // gone
			case 1, 2: // other endpoints
				one := *u
				one.Target.Endpoints = nil
				for _, e := range u.Target.Endpoints {
					if random.IntN(3) > 0 {
						one.Target.Endpoints = append(one.Target.Endpoints, e)
					}
				}
				s.Upstreams = append(s.Upstreams, &one)
			default: // as before
				if j := slices.IndexFunc(old, func(o *connect.Upstream) bool { return o.Name == u.Name }); j >= 0 {
					s.Upstreams = append(s.Upstreams, old[j])
				} else {
					s.Upstreams = append(s.Upstreams, full.Upstreams[i])
				}
			}
		}
		if random.IntN(25) == 0 {
			full.Inbound.AccessLog.Enabled = !full.Inbound.AccessLog.Enabled
		}
		if random.IntN(20) == 0 { // another trust: roots replaced
			q := newIdentity(t)
			s.Roots = q.roots
			full.Roots = q.roots
		}
		got, refused, err := r.Render(&s, "g", prev)
		require.NoError(t, err)
		require.Empty(t, refused)
		want := mustRender(t, &s, Options{}, prev)
		require.Equal(t, want.Text(), got.Text(), "step %d", step)
		require.Equal(t, want.Files, got.Files)
		require.Equal(t, want.Slots, got.Slots)
		if random.IntN(7) > 0 { // else it was refused, and what ran goes on
			prev = got
		}
		last = &s
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
		for _, s := range c.Find("backend " + backend).Servers {
			out += s.Name + " "
		}
		return out
	}
	s := p.snapshot(1, 3)
	first := mustRender(t, s, Options{}, nil)
	s.Roots = both
	added := mustRender(t, s, Options{}, first)
	s.Roots = q.roots
	removed := mustRender(t, s, Options{}, added)
	again := mustRender(t, s, Options{}, removed)
	http, tcp := s.Upstreams[0].Target.Name, s.Upstreams[1].Target.Name
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
	gone := p.snapshot(0, 0)
	gone.Upstreams = []*connect.Upstream{p.upstream("another", connect.HTTP, 9000, 20)}
	second := mustRender(t, gone, Options{}, first)
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
	back := Slots(map[string]string{"h1-5000": second.Files[SlotMapFile("h1-5000")]})
	require.Equal(t, used(second, "h1-5000"), used(back, "h1-5000"))
	fourth := mustRender(t, p.snapshot(1, 10), Options{}, back)
	for v, id := range used(fourth, "h1-5000") {
		require.Greater(t, id, 30, v)
	}
	require.Empty(t, Slots(map[string]string{"x": "junk\n1 2\n-5 x\n"}).Slots["x"].Values)
}

// Whoever chooses names and addresses so that two endpoints become one server takes down
// nobody: HAProxy would refuse the whole configuration.
func TestTwoServersOfOneName(t *testing.T) {
	p := newIdentity(t)
	s := p.snapshot(0, 0)
	u := p.upstream("db", connect.TCP, 9000, 2)
	u.Target.Endpoints[1] = u.Target.Endpoints[0]
	s.Upstreams = append(s.Upstreams, u, p.upstream("api", connect.HTTP, 9001, 2))
	c := mustRender(t, s, Options{}, nil)
	require.Len(t, c.Find("backend "+u.Target.Name).Servers, 1)
	require.Len(t, c.Find("backend "+s.Upstreams[len(s.Upstreams)-1].Target.Name).Servers, 2)
}

func TestMerge(t *testing.T) {
	p := newIdentity(t)
	now := p.snapshot(0, 0)
	api, db := p.upstream("api", connect.HTTP, 9001, 2), p.upstream("db", connect.TCP, 9000, 1)
	now.Upstreams = []*connect.Upstream{api, db}
	running := mustRender(t, now, Options{}, nil)
	next := *now
	more := *api
	more.Target.Endpoints = append(slices.Clone(api.Target.Endpoints[1:]), connect.Endpoint{Name: "new", Address: "10.9.9.9", Port: 1, Weight: 1})
	next.Upstreams = []*connect.Upstream{&more, p.upstream("other", connect.TCP, 9003, 1)}
	want := mustRender(t, &next, Options{}, running)
	merged := Merge(running, want)
	require.Len(t, merged.Sections, len(running.Sections))
	require.NotNil(t, merged.Find("frontend up_db"), "what is to go stays until the reload")
	require.Nil(t, merged.Find("frontend up_other"))
	require.Equal(t, want.Find("backend "+api.Target.Name).Servers, merged.Find("backend "+api.Target.Name).Servers)
	have := used(merged, "h1-5000")
	for v, id := range used(want, "h1-5000") {
		require.Equal(t, id, have[v])
	}
	for v, id := range used(running, "h1-5000") {
		require.Equal(t, id, have[v], "a server of what runs may still use it")
	}
	again := mustRender(t, &next, Options{}, merged)
	require.Equal(t, used(want, "h1-5000"), used(again, "h1-5000"))
}
