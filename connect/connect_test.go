package connect

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/intentions"
)

func TestSafeName(t *testing.T) {
	require.Equal(t, "api-1.x_y", SafeName("api-1.x_y"))
	seen := map[string]bool{}
	for _, s := range []string{"", "-x", "a b", "a\nb", "a/b", "ä", strings.Repeat("x", 200), strings.Repeat("x", 201)} {
		name := SafeName(s)
		require.NotEmpty(t, name)
		require.NotEqual(t, byte('-'), name[0], s)
		require.NotContains(t, name, " ")
		require.False(t, seen[name], "%q and another one are %q", s, name)
		seen[name] = true
	}
}

func TestClashes(t *testing.T) {
	at := func(addr string, port int) Bind { return Bind{Address: addr, Port: port} }
	require.True(t, at("127.0.0.1", 1).Clashes(at("127.0.0.1", 1)))
	require.True(t, at("0.0.0.0", 1).Clashes(at("127.0.0.1", 1)))
	require.True(t, at("10.0.0.1", 1).Clashes(at("::", 1)))
	require.False(t, at("127.0.0.1", 1).Clashes(at("127.0.0.1", 2)))
	require.False(t, at("127.0.0.1", 1).Clashes(at("127.0.0.2", 1)))
	require.True(t, Bind{SocketPath: "/a"}.Clashes(Bind{SocketPath: "/a"}))
	require.False(t, Bind{SocketPath: "/a"}.Clashes(at("127.0.0.1", 0)))
}

// Only listeners that let callers in without mutual TLS and intentions have warnings.
func TestWarnings(t *testing.T) {
	guarded := Branch{Guard: &Guard{}, Chain: Direct("app")}
	public := &Listener{Role: Public, Branches: []Branch{guarded}}
	require.Empty(t, public.Warnings())
	public.Branches = append(public.Branches, Branch{Match: Match{Port: 8080}, Chain: Direct("app")})
	require.Len(t, public.Warnings(), 1)
	require.Contains(t, public.Warnings()[0], "plain connections to port 8080 are let in: no TLS, no intentions, anybody")
	open := &Listener{Role: Open, Opened: "unsecured_bind_port", Bind: Bind{Port: 9}, Branches: []Branch{{Chain: Direct("app")}}}
	require.Equal(t, []string{"unsecured_bind_port is open, port 9: no TLS, no intentions, anybody who reaches it is let in"}, open.Warnings())
	open.Branches[0].Chain.Routes[0].Match.PathExact = "/x\ny"
	open.From = []string{}
	require.Equal(t, []string{"path /x?y is exposed on port 9 to this host and its agent: no TLS, no intentions"}, open.Warnings())
	require.Empty(t, (&Listener{Role: Local, Branches: []Branch{{Chain: Direct("api")}}}).Warnings())
}

func TestMatchInWords(t *testing.T) {
	for want, m := range map[string]HTTPMatch{
		"everything": {PathPrefix: ""},
		"path is /x": {PathExact: "/x"},
		"path begins with /, method is GET or PUT": {PathPrefix: "/", Methods: []string{"GET", "PUT"}},
		"path matches /v[0-9]?":                    {PathRegex: "/v[0-9]\n"},
		"header x is not like a.b, header y is present, query q is 1, query r is present": {
			Headers: []HeaderMatch{{Name: "x", Regex: "a.b", Invert: true}, {Name: "y", Present: true}}, Query: []QueryMatch{{Name: "q", Exact: "1"}, {Name: "r", Present: true}}},
	} {
		require.Equal(t, want, m.String())
	}
	require.True(t, (&HTTPMatch{PathPrefix: "/"}).Everything())
	require.False(t, (&HTTPMatch{PathPrefix: "/", Methods: []string{"GET"}}).Everything())
}

// The generation is the same as long as nobody is judged otherwise.
func TestGeneration(t *testing.T) {
	with := func(c intentions.Config) *Snapshot {
		return &Snapshot{Listeners: []*Listener{{Role: Public, Name: "public", Branches: []Branch{{Guard: &Guard{Policy: intentions.NewPolicy(c)}}}}}}
	}
	one := with(intentions.Config{Destination: "api"})
	require.Equal(t, one.Generation("v1"), with(intentions.Config{Destination: "api"}).Generation("v1"))
	require.NotEqual(t, one.Generation("v1"), one.Generation("v2"))
	require.NotEqual(t, one.Generation("v1"), with(intentions.Config{Destination: "api", DefaultAllow: true}).Generation("v1"))
	require.NotEqual(t, one.Generation("v1"), (&Snapshot{}).Generation("v1"))
}
