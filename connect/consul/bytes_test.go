package consul

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

func TestTexts(t *testing.T) {
	m := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 7)
	m = protowire.AppendString(protowire.AppendTag(m, 2, protowire.BytesType), "one")
	m = protowire.AppendString(protowire.AppendTag(m, 3, protowire.BytesType), "other")
	m = protowire.AppendString(protowire.AppendTag(m, 2, protowire.BytesType), "two")
	got, err := texts(m, 2)
	require.NoError(t, err)
	require.Equal(t, []string{"one", "two"}, got)
	_, err = texts(m[:len(m)-1], 2)
	require.Error(t, err)
}

// FuzzBytes reads what comes from a gRPC port and from files as those would be read.
func FuzzBytes(f *testing.F) {
	ca, err := certs.NewAuthority("11111111-2222-3333-4444-555555555555.consul")
	require.NoError(f, err)
	f.Add([]byte("\x12\x03one"))
	f.Add([]byte(ca.CertPEM + ca.KeyPEM))
	f.Add([]byte("-----BEGIN X-----\n-----END "))
	f.Fuzz(func(t *testing.T, b []byte) {
		if list, err := texts(b, 2); err == nil {
			for _, s := range list {
				require.Contains(t, string(b), s)
			}
		}
		require.NotContains(t, blocks(string(b), "CERTIFICATE"), "PRIVATE KEY-----\n")
		_, _ = pair(string(b), string(b))
		_, _ = peerRoots([]string{string(b)})
	})
}

// Hosts of a route are those that its listener has, too.
func TestHostsOf(t *testing.T) {
	for _, c := range []struct {
		route    []string
		listener string
		want     []string
	}{
		{nil, "", []string{"*"}}, {nil, "*.a.com", []string{"*.a.com"}}, {[]string{"x.a.com", "b.com"}, "*.a.com", []string{"x.a.com"}},
		{[]string{"*.a.com"}, "x.a.com", []string{"x.a.com"}}, {[]string{"*"}, "x.a.com", []string{"x.a.com"}}, {[]string{"x.a.com"}, "", []string{"x.a.com"}},
		{[]string{"bad host", "a\nb"}, "", nil},
	} {
		require.Equal(t, c.want, hostsOf(c.route, c.listener), "%v", c)
	}
	for _, bad := range []string{"", "a b", "a\nb", "*a*", "a*b", "{x}", "a,b", strings.Repeat("x", 300)} {
		require.False(t, edgeHost(bad), bad)
	}
}
