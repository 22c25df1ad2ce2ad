package haproxy

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

const sessions = `0x7f01: proto=unix_stream src=unix:1 fe=GLOBAL be=<NONE> srv=<none> ts=00
0x7f02: proto=tcpv4 src=10.0.0.1:1000 fe=public be=local_app srv=app ts=00 epoch=0
0x7f03: proto=tcpv4 src=10.0.0.2:1000 fe=public be=local_app srv=app ts=00
0x7f04: proto=tcpv4 src=10.0.0.1:1001 fe=up_db be=db srv=x ts=00
0x7f05: proto=tcpv6 src=::1:1002 fe=public be=local_app srv=app ts=00
0x7f06: proto=tcpv4 src=10.0.0.3:1 fe=public be=<NONE> srv=<none>
0x7f07: proto=tcpv4 src=10.0.0.4:1 fe=public be=local_app srv=app
0x7f08: proto=tcpv4 src=10.0.0.4:2 fe=public be=local_app srv=app
0x7f09: proto=tcpv4 src=10.0.0.1:1000 fe=permissive be=permissive_tls srv=public
0x7f0c: proto=tcpv4 src=10.0.0.1:1000 fe=public be=local_app srv=app
0x7f0d: proto=tcpv4 src=10.0.0.1:1000 fe=public be=local_app srv=app
0x7f0a: proto=tcpv4 src=10.0.0.1:1000 fe=permissive be=permissive_app srv=app
garbage
`

func TestEndSessions(t *testing.T) {
	var done []string
	worker := func(_ context.Context, c string) (string, error) {
		switch c {
		case "show sess":
			return sessions, nil
		case "show sess 0x7f02", "show sess 0x7f09":
			return c[10:] + ": [30/Nov/2026:13:29:25.722263] id=0 proto=tcpv4 source=10.0.0.1:1000\n", nil
		case "show sess 0x7f05":
			return "0x7f05: id=0 proto=tcpv6 source=::1:1002\n", nil
		case "show sess 0x7f0c": // the number is another caller's session by now
			return "0x7f0c: id=0 proto=tcpv4 source=10.0.0.2:1000\n", nil
		case "show sess 0x7f0d":
			return "Session not found.\n", nil
		case "show sess 0x7f07":
			return "0x7f07: id=1 source=10.0.0.4:1\n txn=0x5 flags=0x1 meth=1 status=101 req.st=MSG_TUNNEL", nil
		case "show sess 0x7f08":
			return "0x7f08: id=2 source=10.0.0.4:2\n txn=0x5 flags=0x1 meth=1 status=200 req.st=MSG_DATA", nil
		}
		done = append(done, c)
		return "", nil
	}
	bad := map[string]Verdict{"10.0.0.1:1000": End, "[::1]:1002": End, "10.0.0.3:1": End, "10.0.0.1:1001": End, "10.0.0.4:1": EndTunnel, "10.0.0.4:2": EndTunnel}
	judge := func(a netip.AddrPort, pending bool) Verdict {
		if pending {
			return Keep
		}
		return bad[a.String()]
	}
	ended, live, err := EndSessions(t.Context(), worker, judge)
	require.NoError(t, err)
	require.Equal(t, 4, ended)
	require.Equal(t, "shutdown session 0x7f02 shutdown session 0x7f05 shutdown session 0x7f07 shutdown session 0x7f09", strings.Join(done, " "))
	require.ElementsMatch(t, []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:1000"), netip.MustParseAddrPort("10.0.0.3:1"),
		netip.MustParseAddrPort("10.0.0.4:2")}, live)
	// A worker that does not answer may have sessions that should have ended; one that has
	// gone has none.
	for answer, want := range map[error]string{errors.New("away"): "away", runtimeapi.ErrGone: ""} {
		silent := func(context.Context, string) (string, error) { return "", answer }
		for _, err := range []error{TellGeneration(t.Context(), silent, "/run/x", "g"), second(EndSessions(t.Context(), silent, judge))} {
			if want == "" {
				require.NoError(t, err)
				continue
			}
			require.ErrorContains(t, err, want)
		}
	}
}

func second(_ int, _ []netip.AddrPort, err error) error { return err }

func TestTellGeneration(t *testing.T) {
	for answer, good := range map[string]bool{"": true, "Unknown map identifier. Please use #<id> or <file>.": true, "Out of memory": false} {
		err := TellGeneration(t.Context(), func(_ context.Context, c string) (string, error) {
			require.Equal(t, "set map /run/x/maps/policy.map generation g", c)
			return answer, nil
		}, "/run/x", "g")
		require.Equal(t, good, err == nil, "%q: %v", answer, err)
	}
}
