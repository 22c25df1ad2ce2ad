package haproxy

import (
	"context"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const sessions = `0x7f01: proto=unix_stream src=unix:1 fe=GLOBAL be=<NONE> srv=<none> ts=00
0x7f02: proto=tcpv4 src=10.0.0.1:1000 fe=public be=local_app srv=app ts=00 epoch=0
0x7f03: proto=tcpv4 src=10.0.0.2:1000 fe=public be=local_app srv=app ts=00
0x7f04: proto=tcpv4 src=10.0.0.1:1001 fe=up_db be=db srv=x ts=00
0x7f05: proto=tcpv6 src=::1:1002 fe=public be=local_app srv=app ts=00
0x7f06: proto=tcpv4 src=10.0.0.3:1 fe=public be=<NONE> srv=<none>
garbage
`

func TestEndSessions(t *testing.T) {
	var done []string
	worker := func(_ context.Context, c string) (string, error) {
		if c == "show sess" {
			return sessions, nil
		}
		done = append(done, c)
		return "", nil
	}
	bad := map[string]bool{"10.0.0.1:1000": true, "[::1]:1002": true, "10.0.0.3:1": true, "10.0.0.1:1001": true}
	ended, live, err := EndSessions(t.Context(), []Worker{worker}, func(a netip.AddrPort, waits bool) bool { return !waits && bad[a.String()] })
	require.NoError(t, err)
	require.Equal(t, 2, ended)
	require.Equal(t, "shutdown session 0x7f02 shutdown session 0x7f05", strings.Join(done, " "))
	require.Equal(t, map[netip.AddrPort]bool{netip.MustParseAddrPort("10.0.0.2:1000"): true, netip.MustParseAddrPort("10.0.0.3:1"): true}, live)
}

func FuzzParseSession(f *testing.F) {
	for line := range strings.Lines(sessions) {
		f.Add(line)
	}
	f.Add("0x;: 0 src=0.0.0.0:0 fe=public")
	number := regexp.MustCompile(`^0x[0-9a-f]+$`)
	f.Fuzz(func(t *testing.T, line string) {
		id, from, _, ok := parseSession(line)
		if ok && (!number.MatchString(id) || !from.IsValid()) {
			t.Fatalf("%q: %q %v", line, id, from)
		}
	})
}
