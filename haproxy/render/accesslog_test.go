package render

import (
	"encoding/json"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

func TestAccessFormats(t *testing.T) {
	for name, c := range map[string]struct {
		log  connect.AccessLog
		http string
		tcp  string
	}{
		"operators":    {connect.AccessLog{Text: "%REQ(:METHOD)% %RESPONSE_CODE% %BYTES_SENT%"}, `access %[capture.req.method] %ST %B`, `access - - %B`},
		"alternatives": {connect.AccessLog{Text: "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH):20%"}, `access %[capture.req.uri,bytes(0,640)]`, `access -`},
		"literals":     {connect.AccessLog{Text: `100% "a" \ $x #`}, `access 100%% \"a\" \\ \$x \#`, `access 100%% \"a\" \\ \$x \#`},
		"unknown":      {connect.AccessLog{Text: "%NOPE% %REQ(bad name)%"}, `access - -`, `access - -`},
		"json":         {connect.AccessLog{JSON: `{"b":"%DURATION%","a":["%RESPONSE_CODE% x",1.5,null]}`}, `access {\"a\":[\"%ST x\",1.5,null],\"b\":%Ta}`, `access {\"a\":[\"- x\",1.5,null],\"b\":%Tt}`},
	} {
		require.Equal(t, c.http, access(c.log, true).line, name)
		require.Equal(t, c.tcp, access(c.log, false).line, name)
	}
}

// Whatever the format is, it stays within the quotes of one line, and the rules before
// it are of a known form.
func FuzzAccessFormat(f *testing.F) {
	f.Add(`%REQ(X-A?:PATH)% %RESP(b)% "\`)
	f.Add(`{"a":"%START_TIME%","b":[1,{"c":"%REQ(USER-AGENT)% x"}]}`)
	quoted := regexp.MustCompile(`^(?:[^"\\]|\\.)*$`)
	rule := regexp.MustCompile(`^(tcp-request session|http-request|http-response) set-var\((sess|txn)\.al_[a-z0-9_]+\) (date\(\)|(ssl_fc_sni|(req|res)\.hdr\([a-z0-9-]+\)),bytes\(0,(128|192)\),regsub\(\[\[:cntrl:\]\],\?,g\))$`)
	f.Fuzz(func(t *testing.T, s string) {
		logs := []connect.AccessLog{{Text: s}}
		if json.Valid([]byte(s)) {
			logs = append(logs, connect.AccessLog{JSON: s})
		}
		for _, log := range logs {
			for _, http := range []bool{true, false} {
				a := access(log, http)
				if !quoted.MatchString(regexp.MustCompile(`[\r\n]`).ReplaceAllString(a.line, "")) { // lines are refused by the builder
					t.Fatalf("%q leaves its quotes: %q", s, a.line)
				}
				for _, b := range a.before {
					if !rule.MatchString(b) {
						t.Fatalf("%q makes the rule %q", s, b)
					}
				}
			}
		}
	})
}
