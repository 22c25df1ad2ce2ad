package runtimeapi

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Lines as HAProxy 2.6, 3.0 and 3.2 print them.
const (
	processes = `#<PID>          <type>          <reloads>       <uptime>        <version>
1162            master          2 [failed: 0]   0d00h02m07s     2.6.12
# workers
1271            worker          0               0d00h00m00s     2.6.12
# old workers
1233            worker          1               0d00h00m43s     2.6.12
# programs
77              worker          0               0d00h00m00s     -
`
	sessions = `0x7f01: proto=unix_stream src=unix:1 fe=GLOBAL be=<NONE> srv=<none> ts=00
0x7f02: proto=tcpv4 src=10.0.0.1:1000 fe=public be=local_app srv=app ts=00 epoch=0
0x7f05: proto=tcpv6 src=::1:1002 fe=public be=local_app srv=app ts=00
0x7f06: proto=tcpv4 src=10.0.0.3:1 fe=public be=<NONE> srv=<none>
garbage
`
	detail = `0x7f02: [30/Nov/2026:12:00:00.000000] id=0x7f02 proto=tcpv4 source=10.0.0.1:1000
  flags=0x4ce, conn_retries=0, conn_exp=<NEVER>
  frontend=public (id=3 mode=http), listener=? (id=1) addr=10.0.0.9:21000
  txn=0x55 flags=0x83000 meth=1 status=101 req.st=MSG_TUNNEL rsp.st=MSG_TUNNEL
`
)

func TestShow(t *testing.T) {
	require.Equal(t, []Process{{PID: 1271}, {PID: 1233, Old: true}}, ParseProcesses(processes))
	require.Equal(t, []Session{
		{"0x7f01", "GLOBAL", "<NONE>", netip.AddrPort{}},
		{"0x7f02", "public", "local_app", netip.MustParseAddrPort("10.0.0.1:1000")},
		{"0x7f05", "public", "local_app", netip.MustParseAddrPort("[::1]:1002")},
		{"0x7f06", "public", "<NONE>", netip.MustParseAddrPort("10.0.0.3:1")},
	}, ParseSessions(sessions))
	require.Equal(t, Detail{netip.MustParseAddrPort("10.0.0.1:1000"), 101}, ParseDetail(detail))
	require.Zero(t, ParseDetail("txn=0x55 status=-1"))
	require.Zero(t, ParseDetail("Session not found.\n"))
	rows, err := ParseStats("# pxname,svname,status\npublic,FRONTEND,OPEN\napi,\"e,1\"\n")
	require.NoError(t, err)
	require.Equal(t, []map[string]string{{"pxname": "public", "svname": "FRONTEND", "status": "OPEN"}, {"pxname": "api", "svname": "e,1"}}, rows)
	_, err = ParseStats("")
	require.Error(t, err)
	require.Equal(t, map[string]bool{"api/n1": true}, ParseServers("1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight\n3 api 1 n1 10.0.0.1 2 0 1 1 5\n3 api\n"))
	require.Equal(t, map[string]string{"1001": "10.0.0.1|2|spiffe://x y", "k": "v"}, ParseMap("0x55d 1001 10.0.0.1|2|spiffe://x y\n0x55e k v\n\nbroken\n"))
	require.Equal(t, "0A1B", ParseCertificate("Filename: x\nStatus: Used\nSerial: 0A1B\nnotBefore: y\n"))
	require.Empty(t, ParseCertificate("no"))
	require.Equal(t, 42, ParsePID("Name: HAProxy\nPid: 42\nUptime: 0d\n"))
	require.Zero(t, ParsePID("Pid: -1\n"))
}

// Whatever a worker prints, nothing but a number becomes part of a command.
func FuzzShow(f *testing.F) {
	for _, text := range []string{processes, sessions, detail, "0x;: 0 src=0.0.0.0:0 fe=public", "# pxname,svname\n\"a\nb\",c"} {
		f.Add(text)
	}
	number := regexp.MustCompile(`^0x[0-9a-f]+$`)
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range ParseSessions(text) {
			if !number.MatchString(s.ID) || s.Frontend == "" {
				t.Fatalf("%q: %+v", text, s)
			}
		}
		for _, p := range ParseProcesses(text) {
			if p.PID < 2 {
				t.Fatalf("%q: %+v", text, p)
			}
		}
		if ParseDetail(text).Status < 0 {
			t.Fatalf("%q: a negative status", text)
		}
		for name := range ParseServers(text) {
			if !strings.Contains(name, "/") || strings.ContainsAny(name, " \n") {
				t.Fatalf("%q: the server %q", text, name)
			}
		}
		for key := range ParseMap(text) {
			if strings.ContainsAny(key, " \n") {
				t.Fatalf("%q: the key %q", text, key)
			}
		}
		if strings.Contains(ParseCertificate(text), "\n") {
			t.Fatalf("%q: a serial number of two lines", text)
		}
		rows, err := ParseStats(text)
		for _, r := range rows {
			for name := range r {
				if !strings.Contains(text, strings.ReplaceAll(name, `"`, ``)) && err == nil && !strings.ContainsAny(text, "\"\r") {
					t.Fatalf("%q: %q comes from nowhere", text, name)
				}
			}
		}
	})
}
