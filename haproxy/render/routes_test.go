package render

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/connecttest"
)

// However many conditions a route has, no line has more words than HAProxy takes.
func TestManyConditions(t *testing.T) {
	p := newIdentity(t)
	w := p.upstream("api", connect.HTTP, 9000, 1)
	one := w.Listener.Branches[0].Chain.Routes[0]
	many := one
	for i := range 40 {
		many.Match.Headers = append(many.Match.Headers, connect.HeaderMatch{Name: fmt.Sprintf("h%d", i), Exact: "v", Invert: i%2 == 0})
		many.Match.Query = append(many.Match.Query, connect.QueryMatch{Name: fmt.Sprintf("q%d", i), Present: true})
	}
	w.Listener.Branches[0].Chain.Routes = []connect.Route{many, many, one}
	c := mustRender(t, p.alone(w), Options{}, nil)
	text := c.Find(Frontend, "up_api").Head
	for line := range strings.Lines(text) {
		require.LessOrEqual(t, len(strings.Fields(line)), 64, line)
	}
	require.Equal(t, 2, strings.Count(text, "set-var(txn.route) int(1)")+strings.Count(text, "set-var(txn.route) int(2)"))
	require.Equal(t, 160, strings.Count(text, " -- 'v' }")+strings.Count(text, "query -m reg"))
}

// Cuts divide 2^32 as the weights say, whatever their sum.
func TestCuts(t *testing.T) {
	split := func(weights ...int) (out []connect.Split) {
		for _, w := range weights {
			out = append(out, connect.Split{Weight: w})
		}
		return out
	}
	require.Empty(t, cuts(split(10000)))
	require.Equal(t, "2147483648", cuts(split(5000, 5000)))
	require.Equal(t, "0", cuts(split(0, 10000)))
	require.Equal(t, "4294967296", cuts(split(10000, 0)))
	require.Equal(t, "429539|859079", cuts(split(1, 1, 9997)))
	require.Equal(t, "", cuts(split(0, 0)))
}

// What a map of routes says belongs to just these routes: other conditions read other
// entries, other weights the same ones.
func TestRoutesReadTheirOwnEntries(t *testing.T) {
	p := newIdentity(t)
	with := func(path string, weight int) connecttest.Way {
		return p.upstream("api", connect.HTTP, 9000, 1).But(func(w *connecttest.Way) {
			g := w.Group.Name
			w.Listener.Branches[0].Chain.Routes = []connect.Route{
				{Match: connect.HTTPMatch{PathExact: path}, Splits: []connect.Split{{Weight: weight, Group: g}, {Weight: 100 - weight, Group: g}}}, connect.Direct(g).Routes[0]}
		})
	}
	keys := func(c *Config) (out []string) {
		for _, e := range c.Maps[WaysMap].Entries {
			out = append(out, e.Key)
		}
		return out
	}
	first := mustRender(t, p.alone(with("/a", 10)), Options{}, nil)
	heavier := mustRender(t, p.alone(with("/a", 90)), Options{}, first)
	require.Equal(t, first.Find(Frontend, "up_api").Head, heavier.Find(Frontend, "up_api").Head, "weights need no reload")
	require.Equal(t, keys(first), keys(heavier))
	require.NotEqual(t, first.Maps[LegsMap].Text(), heavier.Maps[LegsMap].Text())
	other := mustRender(t, p.alone(with("/b", 10)), Options{}, first)
	for _, key := range keys(other) {
		require.NotContains(t, keys(first), key)
	}
	merged := Merge(first, other)
	require.Equal(t, first.Maps[WaysMap].Text(), merged.Maps[WaysMap].Text(), "until the reload what runs reads what it read")
	require.Equal(t, first.Maps[LegsMap].Text(), merged.Maps[LegsMap].Text())
}

// A broken route of one host takes down neither the other hosts nor the listener.
func TestABrokenHostIsLeftOut(t *testing.T) {
	p := newIdentity(t)
	s := connecttest.Snapshot(p.leaf, p.roots)
	connecttest.Add(s, p.upstream("api", connect.HTTP, 9000, 1))
	route := func(site, host, path string) connect.Route {
		r := connect.Direct("api.default.dc1").Routes[0]
		r.Site, r.Hosts, r.Match.PathRegex = site, []string{host}, path
		return r
	}
	s.Listeners = append(s.Listeners, &connect.Listener{Name: "web", Role: connect.Edge, Bind: connect.Bind{Address: "127.0.0.1", Port: 9999}, Branches: []connect.Branch{{Protocol: connect.HTTP,
		Chain: connect.Chain{Routes: []connect.Route{route("good", "good.example.com", "/a"), route("bad", "bad.example.com", `\pL`), route("other", "other.example.com", "")}}}}})
	slices.SortFunc(s.Listeners, func(a, b *connect.Listener) int { return int(a.Role) - int(b.Role) })
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(t, err)
	c, refused, err := r.Render(s, nil)
	require.NoError(t, err)
	require.Len(t, refused, 1)
	require.Contains(t, refused[0].Error(), `host "bad" of listener "web" is left out`)
	require.NotNil(t, c.Find(Frontend, "edge_web"))
	require.Contains(t, c.Maps[HostsMap].Text(), "good.example.com")
	require.NotContains(t, c.Maps[HostsMap].Text(), "bad.example.com")
}

// relays is a snapshot of a gateway with n names.
func relays(t testing.TB, n int) *connect.Snapshot {
	p := newIdentity(t)
	s := connecttest.Snapshot(p.leaf, p.roots)
	l := &connect.Listener{Name: "relay_default", Role: connect.Relay, Bind: connect.Bind{Address: "127.0.0.1", Port: 8443}, Idle: time.Hour}
	for i := range n {
		name := fmt.Sprintf("svc%05d", i)
		s.Groups = append(s.Groups, &connect.Group{Name: connect.GroupName(name), Targets: []connect.TargetName{connect.TargetName(name)}, Connect: time.Second})
		s.Targets = append(s.Targets, &connect.Target{Name: connect.TargetName(name), Dial: connect.Dial{How: connect.Pass}, Endpoints: []connect.Endpoint{{Name: "e", Address: "10.0.0.1", Port: 1000 + i%60000, Weight: 1}}})
		l.Branches = append(l.Branches, connect.Branch{Match: connect.Match{SNI: name + ".default.dc1.internal.x.consul"}, Chain: connect.Direct(connect.GroupName(name))})
	}
	s.Listeners = []*connect.Listener{l}
	return s
}

// A service more changes two lines of maps and one backend, whose number nobody else has.
func TestRelayAddsLive(t *testing.T) {
	full, less := relays(t, 101), relays(t, 100)
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(t, err)
	a, _, err := r.Render(less, nil)
	require.NoError(t, err)
	b, _, err := r.Render(full, a)
	require.NoError(t, err)
	require.Equal(t, len(a.Sections), len(b.Sections), "there are backends to spare")
	changed := 0
	for i := range a.Sections {
		require.Equal(t, a.Sections[i].Head, b.Sections[i].Head)
		if a.Sections[i] != b.Sections[i] && len(a.Sections[i].Servers) != len(b.Sections[i].Servers) {
			changed++
		}
	}
	require.Equal(t, 1, changed)
	require.Len(t, b.Maps[NamesMap].Entries, 101)
	c, _, err := r.Render(less, b)
	require.NoError(t, err)
	d, _, err := r.Render(full, c)
	require.NoError(t, err)
	at := func(c *Config) int { return slices.Index(c.Relays.Targets, "svc00100") }
	require.Negative(t, at(c))
	require.NotEqual(t, at(b), at(d), "a backend that became free is not given away at once")
}

// A gateway of 10,000 names: one more, one less.
func BenchmarkRelay10000(b *testing.B) {
	full := relays(b, 10000)
	less := *full
	one := *full.Listeners[0]
	one.Branches = one.Branches[:len(one.Branches)-1]
	less.Listeners = []*connect.Listener{&one}
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(b, err)
	prev, _, err := r.Render(full, nil)
	require.NoError(b, err)
	for i := 0; b.Loop(); i++ {
		s := full
		if i%2 == 0 {
			s = &less
		}
		prev, _, err = r.Render(s, prev)
		require.NoError(b, err)
	}
}

// A gateway of which no name leads anywhere listens.
func TestAnEmptyRelay(t *testing.T) {
	s := relays(t, 0)
	r, err := New(Options{Dir: "/run/x"})
	require.NoError(t, err)
	c, _, err := r.Render(s, nil)
	require.NoError(t, err)
	require.NotNil(t, c.Find(Frontend, "relay_default"))
	require.Equal(t, connect.TCP, s.Listeners[0].Protocol())
	require.Nil(t, s.Listeners[0].Policy())
}
