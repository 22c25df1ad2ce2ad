package intentions

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

const td = "11111111-2222-3333-4444-555555555555.consul"

func id(service string) certs.SPIFFEID {
	return certs.SPIFFEID{TrustDomain: td, Partition: "default", Namespace: "default", Datacenter: "dc1", Service: service}
}

func src(name string) Source { return Source{Name: name, Namespace: "default", Partition: "default"} }

func TestZeroPolicyDenies(t *testing.T) {
	var zero Policy
	require.False(t, zero.Decide(id("web"), nil).Allow)
	var none *Policy
	require.False(t, none.Decide(id("web"), &Request{}).Allow)
}

func TestPrecedence(t *testing.T) {
	for _, c := range []struct {
		name   string
		list   []Intention
		dflt   bool
		caller string
		allow  bool
		rule   string
	}{
		{"default deny", nil, false, "web", false, "default"},
		{"default allow", nil, true, "web", true, "default"},
		{"exact allow over wildcard deny", []Intention{{Source: src("*"), Precedence: 8}, {Source: src("web"), Allow: true, Precedence: 9}}, false, "web", true, "web=>api"},
		{"wildcard for others", []Intention{{Source: src("*"), Precedence: 8}, {Source: src("web"), Allow: true, Precedence: 9}}, true, "db", false, "*=>api"},
		{"wildcard to api hides exact to all", []Intention{{Source: src("web"), Allow: true, Precedence: 6}, {Source: src("*"), Precedence: 8}}, true, "web", false, "*=>api"},
		{"exact to all over all to all", []Intention{{Source: src("*"), Precedence: 5}, {Source: src("web"), Allow: true, Precedence: 6}}, false, "web", true, "web=>api"},
		{"permissions on tcp deny", []Intention{{Source: src("web"), Precedence: 9, Permissions: []Permission{{Allow: true}}}}, true, "web", false, "web=>api"},
		{"unsupported denies", []Intention{{Source: src("web"), Allow: true, Precedence: 9, Unsupported: "it wants a token"}}, true, "web", false, "web=>api"},
		{"peer of the same name is another", []Intention{{Source: Source{Name: "web", Peer: "east"}, Precedence: 9}}, true, "web", true, "default"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := NewPolicy(Config{Destination: "api", TrustDomain: td, DefaultAllow: c.dflt, Intentions: c.list})
			d := p.Decide(id(c.caller), nil)
			require.Equal(t, c.allow, d.Allow, d.Reason)
			require.Equal(t, c.rule, d.Rule)
			require.NotEmpty(t, d.Reason)
		})
	}
}

func TestForeignTrustDomainIsDenied(t *testing.T) {
	p := NewPolicy(Config{Destination: "api", TrustDomain: td, DefaultAllow: true, Peers: map[string]string{"east": "east.consul"},
		Intentions: []Intention{{Source: Source{Name: "web", Peer: "east"}, Precedence: 9}, {Source: Source{Name: "*", Peer: "east"}, Allow: true, Precedence: 8}}})
	stranger := id("web")
	stranger.TrustDomain = "elsewhere.consul"
	require.False(t, p.Decide(stranger, nil).Allow)
	peer := id("web")
	peer.TrustDomain = "east.consul"
	require.False(t, p.Decide(peer, nil).Allow)
	peer.Service = "db"
	require.True(t, p.Decide(peer, nil).Allow)
	require.True(t, p.Decide(id("web"), nil).Allow)
}

func TestForeignNamespaceIsDenied(t *testing.T) {
	for name, change := range map[string]func(*certs.SPIFFEID){
		"namespace": func(id *certs.SPIFFEID) { id.Namespace = "other" },
		"partition": func(id *certs.SPIFFEID) { id.Partition = "other" },
	} {
		caller := id("web")
		change(&caller)
		p := NewPolicy(Config{Destination: "api", TrustDomain: td, DefaultAllow: true, Community: true,
			Intentions: []Intention{{Source: src("*"), Precedence: 8}}})
		d := p.Decide(caller, nil)
		require.False(t, d.Allow, name)
		require.Equal(t, "identity", d.Rule, name)
		// The enterprise edition has them, and the default policy answers.
		p = NewPolicy(Config{Destination: "api", TrustDomain: td, DefaultAllow: true})
		require.True(t, p.Decide(caller, nil).Allow, name)
	}
}

func TestAcceptsServerNames(t *testing.T) {
	p := NewPolicy(Config{Destination: "s2", TrustDomain: td, ServerName: id("s2").SNI("")})
	for name, want := range map[string]bool{
		"": true, "s2": true, "s2.service.consul": true, "s2.connect.consul": true, "anything.example.com": true,
		"s2.default.dc1.internal." + td: true, "S2.Default.DC1.INTERNAL." + td: true, "v1.s2.default.dc1.internal." + td: true,
		"s2.default.dc1.internal." + td + ".": true,
		"s1.default.dc1.internal." + td:       false, "s2.default.dc2.internal." + td: false, "xs2.default.dc1.internal." + td: false,
		"s2.default.dc1.external.x." + td:              true, // not of a form that Consul makes
		"s2.default.default.dc1.internal-v1." + td:     false,
		"s2.default.dc1.external." + td:                false,
		"s1.default.dc1.internal.another-trust-domain": true,
	} {
		_, got := p.Accepts(name, certs.SPIFFEID{TrustDomain: p.conf.TrustDomain})
		require.Equal(t, want, got, name)
	}
}

func TestSame(t *testing.T) {
	perm := func(path string) []Intention {
		return []Intention{{Source: src("web"), Precedence: 9, Permissions: []Permission{{Allow: true, PathRegex: path}}}}
	}
	policy := func(list []Intention, allow bool) *Policy {
		return NewPolicy(Config{Destination: "api", TrustDomain: td, HTTP: true, DefaultAllow: allow, Intentions: list})
	}
	require.True(t, policy(perm("/a"), false).Same(policy(perm("/a"), false), id("web")))
	require.False(t, policy(perm("/a"), false).Same(policy(perm("/b"), false), id("web")))
	require.False(t, policy(perm("/a"), false).Same(policy(perm("/a"), true), id("web")), "the default answers where no permission matches")
	require.True(t, policy(perm("/a"), false).Same(policy(perm("/b"), false), id("db")))
	require.False(t, policy(nil, true).Same(policy(nil, false), id("db")))
	require.False(t, policy(perm("/a"), false).Same(policy(nil, false), id("web")))
}

func TestPermissions(t *testing.T) {
	h := func(m HeaderMatch) []Permission { return []Permission{{Allow: true, Headers: []HeaderMatch{m}}} }
	req := func(path string, kv ...string) *Request {
		r := &Request{Method: "GET", Path: path}
		for i := 0; i < len(kv); i += 2 {
			r.Headers = append(r.Headers, Header{kv[i], kv[i+1]})
		}
		return r
	}
	for _, c := range []struct {
		name  string
		perms []Permission
		req   *Request
		want  bool
	}{
		{"exact path", []Permission{{Allow: true, PathExact: "/a"}}, req("/a"), true},
		{"exact path, other", []Permission{{Allow: true, PathExact: "/a"}}, req("/a/"), false},
		{"prefix", []Permission{{Allow: true, PathPrefix: "/a"}}, req("/a/b"), true},
		{"regex is a full match", []Permission{{Allow: true, PathRegex: "/a[0-9]"}}, req("/a12"), false},
		{"regex alternation is a full match", []Permission{{Allow: true, PathRegex: "/a|/b"}}, req("/ax"), false},
		{"regex", []Permission{{Allow: true, PathRegex: "/a[0-9]+"}}, req("/a12"), true},
		{"regex sees no line end trick", []Permission{{Allow: true, PathRegex: "/a"}}, req("/a\n"), false},
		{"method", []Permission{{Allow: true, Methods: []string{"PUT", "GET"}}}, req("/"), true},
		{"other method", []Permission{{Allow: true, Methods: []string{"PUT"}}}, req("/"), false},
		{"first match decides", []Permission{{PathPrefix: "/admin"}, {Allow: true, PathPrefix: "/"}}, req("/admin/x"), false},
		{"second match", []Permission{{PathPrefix: "/admin"}, {Allow: true, PathPrefix: "/"}}, req("/x"), true},
		{"present", h(HeaderMatch{Name: "X-A", Present: true}), req("/", "x-a", "1"), true},
		{"present and empty", h(HeaderMatch{Name: "X-A", Present: true}), req("/", "x-a", ""), true},
		{"present and empty, inverted", h(HeaderMatch{Name: "X-A", Present: true, Invert: true}), req("/", "x-a", ""), false},
		{"present, inverted", h(HeaderMatch{Name: "X-A", Present: true, Invert: true}), req("/"), true},
		{"exact", h(HeaderMatch{Name: "x-a", Exact: "One"}), req("/", "x-a", "One"), true},
		{"exact, case", h(HeaderMatch{Name: "x-a", Exact: "One"}), req("/", "x-a", "one"), false},
		{"exact, ignoring case", h(HeaderMatch{Name: "x-a", Exact: "One", IgnoreCase: true}), req("/", "x-a", "oNE"), true},
		{"prefix of header", h(HeaderMatch{Name: "x-a", Prefix: "On"}), req("/", "x-a", "One"), true},
		{"suffix of header", h(HeaderMatch{Name: "x-a", Suffix: "ne"}), req("/", "x-a", "One"), true},
		{"contains", h(HeaderMatch{Name: "x-a", Contains: "n"}), req("/", "x-a", "One"), true},
		{"regex of header is a full match", h(HeaderMatch{Name: "x-a", Regex: "O"}), req("/", "x-a", "One"), false},
		{"repeated header is joined", h(HeaderMatch{Name: "x-a", Exact: "1,2"}), req("/", "x-a", "1", "x-a", "2"), true},
		{"inverted exact, header absent", h(HeaderMatch{Name: "x-a", Exact: "1", Invert: true}), req("/"), false},
		{"inverted exact, another value", h(HeaderMatch{Name: "x-a", Exact: "1", Invert: true}), req("/", "x-a", "2"), true},
		{"inverted regex, header absent", h(HeaderMatch{Name: "x-a", Regex: "1", Invert: true}), req("/"), false},
		{"inverted exact, repeated header", h(HeaderMatch{Name: "x-a", Exact: "1,1", Invert: true}), req("/", "x-a", "1", "x-a", "1"), false},
		{"an inverted condition that says nothing", h(HeaderMatch{Name: "x-a", Invert: true}), req("/", "x-a", "1"), false},
		{"a condition that says nothing", h(HeaderMatch{Name: "x-a"}), req("/", "x-a", "1"), false},
		{"all parts must match", []Permission{{Allow: true, PathExact: "/a", Methods: []string{"PUT"}}}, req("/a"), false},
		{"a regex that does not compile denies", []Permission{{Allow: true, PathRegex: "("}}, req("/"), false},
		{"a regex that closes the anchors' group denies", []Permission{{Allow: true, PathRegex: "/ok)|(?:.*"}}, req("/secret"), false},
		{"a header's regex that closes the group denies", h(HeaderMatch{Name: "x-a", Regex: "1)|(?:.*"}), req("/", "x-a", "2"), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := NewPolicy(Config{Destination: "api", TrustDomain: td, HTTP: true,
				Intentions: []Intention{{Source: src("web"), Precedence: 9, Permissions: c.perms}, {Source: src("*"), Allow: true, Precedence: 8}}})
			d := p.Decide(id("web"), c.req)
			require.Equal(t, c.want, d.Allow, "%s: %s", d.Rule, d.Reason)
			require.False(t, p.Decide(id("web"), nil).Allow, "a connection is not allowed before its requests")
		})
	}
}

// A reference that follows the documentation word for word, without indexes.
func slow(list []Intention, caller string, dflt bool) bool {
	best := -1
	for i, in := range list {
		if (in.Source.Name == caller || in.Source.Name == "*") && (best < 0 || in.Precedence > list[best].Precedence) {
			best = i
		}
	}
	if best < 0 {
		return dflt
	}
	return list[best].Allow
}

func TestAgreesWithReference(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	names := []string{"a", "b", "c", "d", "*"}
	for n := range 20000 {
		var list []Intention
		used := map[string]bool{}
		for range r.IntN(8) {
			name, toAll := names[r.IntN(len(names))], r.IntN(2) == 0
			key := fmt.Sprint(name, toAll)
			if used[key] {
				continue
			}
			used[key] = true
			prec := map[[2]bool]int{{false, false}: 9, {true, false}: 8, {false, true}: 6, {true, true}: 5}[[2]bool{name == "*", toAll}]
			list = append(list, Intention{Source: src(name), Allow: r.IntN(2) == 0, Precedence: prec})
		}
		dflt := r.IntN(2) == 0
		p := NewPolicy(Config{Destination: "api", TrustDomain: td, DefaultAllow: dflt, Intentions: list})
		for _, c := range names[:4] {
			require.Equal(t, slow(list, c, dflt), p.Decide(id(c), nil).Allow, "case %d, caller %s: %+v", n, c, list)
		}
	}
}

func TestDecideAllocatesNothing(t *testing.T) {
	var list []Intention
	for i := range 1000 {
		list = append(list, Intention{Source: src(fmt.Sprint("s", i)), Allow: true, Precedence: 9})
	}
	p := NewPolicy(Config{Destination: "api", TrustDomain: td, Intentions: list})
	caller := id("s500")
	require.Zero(t, testing.AllocsPerRun(100, func() {
		if !p.Decide(caller, nil).Allow {
			t.Fatal("denied")
		}
	}))
}

func BenchmarkDecide(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		var list []Intention
		for i := range n {
			list = append(list, Intention{Source: src(fmt.Sprint("s", i)), Allow: true, Precedence: 9})
		}
		p := NewPolicy(Config{Destination: "api", TrustDomain: td, Intentions: append(list, Intention{Source: src("*"), Precedence: 8})})
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			caller := id(fmt.Sprint("s", n/2))
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(caller, nil)
			}
		})
	}
}

// A peer's authority vouches for its own trust domain alone, and only our own gateway speaks in
// the name of a peer's services.
func TestPeers(t *testing.T) {
	const a, b = "aaaaaaaa-2222-3333-4444-555555555555.consul", "bbbbbbbb-2222-3333-4444-555555555555.consul"
	of := func(domain, name string) certs.SPIFFEID {
		return certs.SPIFFEID{TrustDomain: domain, Partition: "default", Namespace: "default", Datacenter: "x", Service: name}
	}
	gateway := certs.MeshGateway(td, "dc1")
	conf := Config{Destination: "s2", TrustDomain: td, ServerName: id("s2").SNI(""), Community: true, HTTP: true, Gateway: gateway,
		Peers: map[string]string{"alpha": a, "beta": b}, Intentions: []Intention{
			{Source: Source{Name: "web", Peer: "alpha"}, Allow: true, Precedence: 9},
			{Source: src("web"), Allow: false, Precedence: 9}}}
	p := NewPolicy(conf)
	require.True(t, p.Decide(of(a, "web"), nil).Allow)
	require.False(t, p.Decide(of(b, "web"), nil).Allow)
	require.False(t, p.Decide(of("cccccccc-2222-3333-4444-555555555555.consul", "web"), nil).Allow)
	name := func(peer string) string { return "s9.default.default." + peer + ".external." + td }
	for _, c := range []struct {
		sni  string
		from certs.SPIFFEID
		want bool
	}{
		{name("alpha"), of(a, "web"), true}, {name("beta"), of(a, "web"), false}, {name("gamma"), of(a, "web"), false}, {"", of(a, "web"), false},
		{id("s2").SNI(""), of(a, "web"), false}, {name("alpha"), of(td, "web"), false}, {id("s2").SNI(""), of(td, "web"), true},
		{"x." + name("alpha"), of(a, "web"), false}, {name("alpha") + ".", of(a, "web"), true},
	} {
		_, got := p.Accepts(c.sni, c.from)
		require.Equal(t, c.want, got, "%s %s", c.sni, c.from)
	}
	require.Zero(t, testing.AllocsPerRun(100, func() { p.Accepts("", of(td, "web")) }))
	require.Zero(t, testing.AllocsPerRun(100, func() { p.Accepts(id("s2").SNI(""), of(td, "web")) })-testing.AllocsPerRun(100, func() { _ = id("s2").SNI("") }))
	require.True(t, p.Decide(gateway, nil).PerRequest)
	require.False(t, p.Decide(certs.MeshGateway(td, "dc2"), nil).PerRequest, "of another datacenter")
	require.False(t, p.Decide(certs.MeshGateway(a, "dc1"), nil).PerRequest, "a peer's")
	conf.HTTP = false
	require.False(t, NewPolicy(conf).Decide(gateway, nil).PerRequest)
	uri := "URI=" + of(a, "web").String()
	for header, want := range map[string]bool{
		uri: true, "Hash=1;Cert=\"a,URI=x;\\\"\";" + uri + ";DNS=x": true, uri + ",URI=spiffe://x": true, "By=x;uri=" + of(a, "web").String(): true,
		"": false, "By=x": false, uri + ";" + uri: false, "Subject=\"" + uri + "\"": false, "Cert=\"" + uri: false,
		"URI=" + of(td, "web").String(): false, "URI=" + gateway.String(): false, "URI=" + certs.MeshGateway(a, "x").String(): false, "By=x," + uri: false,
	} {
		req := &Request{Method: "GET", Path: "/", Headers: []Header{{"x-forwarded-client-cert", header}}}
		from, ok := p.Behind(gateway, req)
		require.Equal(t, want, ok, header)
		if ok {
			require.True(t, p.Decide(from, req).Allow)
		}
	}
	_, ok := p.Behind(gateway, &Request{Headers: []Header{{"x-forwarded-client-cert", uri}, {"X-Forwarded-Client-Cert", uri}}})
	require.False(t, ok)
	from, ok := p.Behind(of(td, "web"), &Request{Headers: []Header{{"x-forwarded-client-cert", uri}}})
	require.True(t, ok && from == of(td, "web"), "nobody else speaks for a peer")
}

// A policy of several services is asked by server name; a name of nobody is denied.
func TestSeveral(t *testing.T) {
	one := NewPolicy(Config{Destination: "one", TrustDomain: td, DefaultAllow: true})
	two := NewPolicy(Config{Destination: "two", TrustDomain: td})
	names := map[string]string{"one.x": "one", "v1.one.x": "one", "two.x": "two", "gone.x": "gone"}
	p := NewSeveral([]*Policy{one, two}, names)
	require.True(t, p.Several())
	require.False(t, one.Several())
	require.Same(t, one, one.For("anything"))
	require.Same(t, one, p.For("V1.One.X."))
	require.Same(t, two, p.Of("two"))
	for _, name := range []string{"", "gone.x", "three.x", "x"} {
		require.False(t, p.For(name).Decide(id("web"), nil).Allow, name)
	}
	require.False(t, p.Decide(id("web"), nil).Allow, "without a name nobody is let in")
	require.NotEqual(t, p.Digest(), NewSeveral([]*Policy{one}, names).Digest())
	names["three.x"] = "two"
	require.NotEqual(t, p.Digest(), NewSeveral([]*Policy{one, two}, names).Digest())
	var none *Policy
	require.False(t, none.Several())
	require.Nil(t, none.Of("x"))
}
