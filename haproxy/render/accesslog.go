package render

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// accessFormat is an access log in HAProxy's words, for frontends of one mode.
type accessFormat struct {
	line   string   // of log-format, quoted as a configuration wants it
	before []string // rules that remember what is only known early
}

// AccessMark precedes every line of the access log, to tell it from what HAProxy says.
const AccessMark = "access "

// defaultFields are those of Envoy under Consul (proxy-defaults, access_logs) in
// alphabetical order, as Envoy writes them, then ours.
var defaultFields = [][2]string{
	{"authority", "%REQ(:AUTHORITY)%"}, {"bytes_received", "%BYTES_RECEIVED%"}, {"bytes_sent", "%BYTES_SENT%"},
	{"connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"}, {"downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"},
	{"downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"}, {"duration", "%DURATION%"}, {"method", "%REQ(:METHOD)%"},
	{"path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"}, {"protocol", "%PROTOCOL%"}, {"request_id", "%REQ(X-REQUEST-ID)%"},
	{"requested_server_name", "%REQUESTED_SERVER_NAME%"}, {"response_code", "%RESPONSE_CODE%"}, {"response_code_details", "%RESPONSE_CODE_DETAILS%"},
	{"response_flags", "%RESPONSE_FLAGS%"}, {"route_name", "%ROUTE_NAME%"}, {"start_time", "%START_TIME%"},
	{"upstream_cluster", "%UPSTREAM_CLUSTER%"}, {"upstream_host", "%UPSTREAM_HOST%"}, {"upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"},
	{"upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"}, {"upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"},
	{"user_agent", "%REQ(USER-AGENT)%"}, {"x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"},
	{"listener", "%LISTENER%"}, {"source", "%DOWNSTREAM_PEER_URI_SAN%"}, {"verdict", "%VERDICT%"}, {"rule", "%RULE%"}, {"reason", "%REASON%"},
}

var operator = regexp.MustCompile(`%([A-Z_]+)(?:\(([^)%]*)\))?(?::\d+)?%`)

// quoteFormat makes literal text safe in a quoted log-format.
var quoteFormat = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, `%`, `%%`, `#`, `\#`)

// access translates what Consul says of the access log. The format was checked when it
// was decoded; what is unknown in it is logged as "-", or null in JSON.
func access(a connect.AccessLog, http bool) accessFormat {
	t := &translation{http: http}
	switch {
	case a.Text != "":
		t.line = quoteFormat.Replace(AccessMark) + t.text(a.Text, false)
	case a.JSON != "":
		var v any
		if err := json.Unmarshal([]byte(a.JSON), &v); err != nil {
			return access(connect.AccessLog{}, http)
		}
		t.line = quoteFormat.Replace(AccessMark) + t.value(v)
	default:
		part := make([]string, len(defaultFields))
		for i, f := range defaultFields {
			part[i] = `\"` + f[0] + `\":` + t.value(f[1])
		}
		t.line = quoteFormat.Replace(AccessMark) + "{" + strings.Join(part, ",") + "}"
	}
	return accessFormat{line: t.line, before: t.before}
}

type translation struct {
	http   bool
	line   string
	before []string
}

// value is one part of a JSON format.
func (t *translation) value(v any) string {
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for i, k := range keys {
			keys[i] = literal(k) + ":" + t.value(v[k])
		}
		return "{" + strings.Join(keys, ",") + "}"
	case []any:
		part := make([]string, len(v))
		for i := range v {
			part[i] = t.value(v[i])
		}
		return "[" + strings.Join(part, ",") + "]"
	case string:
		if m := operator.FindStringSubmatch(v); m != nil && m[0] == v { // alone: a number stays one
			switch expr, number := t.expr(m[1], m[2], true); {
			case expr == "":
				return "null"
			case number:
				return expr
			default:
				return `\"` + expr + `\"`
			}
		}
		return `\"` + t.text(v, true) + `\"`
	}
	return quoteFormat.Replace(marshal(v))
}

// marshal is json.Marshal without its escapes for web pages.
func marshal(v any) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return "null"
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// literal is a JSON string, quoted for the configuration.
func literal(s string) string { return quoteFormat.Replace(marshal(s)) }

// text replaces the operators of a format; inside is text within a JSON string.
func (t *translation) text(s string, inside bool) string {
	var out strings.Builder
	plain := func(part string) {
		if inside {
			part = marshal(part)
			part = part[1 : len(part)-1]
		}
		out.WriteString(quoteFormat.Replace(part))
	}
	last := 0
	for _, at := range operator.FindAllStringSubmatchIndex(s, -1) {
		plain(s[last:at[0]])
		arg := ""
		if at[4] >= 0 {
			arg = s[at[4]:at[5]]
		}
		expr, _ := t.expr(s[at[2]:at[3]], arg, inside)
		if expr == "" {
			expr = "-"
		}
		out.WriteString(expr)
		last = at[1]
	}
	plain(s[last:])
	return out.String()
}

// expr is an operator of Envoy in HAProxy's words, "" if there is none.
func (t *translation) expr(name, arg string, inJSON bool) (expr string, number bool) {
	sample := func(s string) string {
		if inJSON {
			s += ",json(utf8s)"
		}
		return "%[" + s + "]"
	}
	at := "sess.hc"
	if t.http {
		at = "txn"
	}
	switch name {
	case "START_TIME":
		return "%[var(" + t.remember("start", "date()") + "),utime(%Y-%m-%dT%H:%M:%S)]Z", false
	case "BYTES_RECEIVED":
		return "%U", true
	case "BYTES_SENT":
		return "%B", true
	case "DURATION":
		if t.http {
			return "%Ta", true
		}
		return "%Tt", true
	case "DOWNSTREAM_REMOTE_ADDRESS":
		return "%ci:%cp", false
	case "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT":
		return "%ci", false
	case "DOWNSTREAM_LOCAL_ADDRESS":
		return "%fi:%fp", false
	case "UPSTREAM_HOST":
		return "%si:%sp", false
	case "UPSTREAM_LOCAL_ADDRESS":
		return "%bi:%bp", false
	case "UPSTREAM_CLUSTER":
		return "%b", false
	case "RESPONSE_FLAGS":
		return "%ts", false
	case "LISTENER":
		return "%f", false
	case "REQUESTED_SERVER_NAME":
		return sample("var(" + t.remember("sni", "ssl_fc_sni") + ")"), false
	case "DOWNSTREAM_PEER_URI_SAN":
		return sample("var(sess.hc.source)"), false
	case "VERDICT", "RULE", "REASON":
		return sample("var(" + at + "." + strings.ToLower(name) + ")"), false
	}
	if !t.http {
		return "", false
	}
	switch name {
	case "RESPONSE_CODE":
		return "%ST", true
	case "PROTOCOL":
		return sample("capture.req.ver"), false
	case "REQ":
		for _, h := range strings.Split(arg, "?") { // the first alternative that is not a header of Envoy's own
			switch h = strings.ToLower(h); {
			case h == ":method":
				return sample("capture.req.method"), false
			case h == ":path":
				return sample(fmt.Sprintf("capture.req.uri,bytes(0,%d)", longestPath)), false
			case h == ":authority":
				return sample("var(" + t.remember("h_host", "req.hdr(host)") + ")"), false
			case strings.HasPrefix(h, ":") || strings.HasPrefix(h, "x-envoy-"):
			case plainHeader.MatchString(h):
				return sample("var(" + t.remember("h_"+strings.ReplaceAll(h, "-", "_"), "req.hdr("+h+")") + ")"), false
			}
		}
	case "RESP":
		switch h := strings.ToLower(arg); {
		case h == "x-envoy-upstream-service-time":
			return "%Tr", true
		case plainHeader.MatchString(h):
			return sample("var(" + t.remember("r_"+strings.ReplaceAll(h, "-", "_"), "res.hdr("+h+")") + ")"), false
		}
	}
	return "", false
}

var plainHeader = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// Bounds, in bytes, of what a caller can write into one field of a line: a line that HAProxy
// cuts is no JSON any more. A line with all of Envoy's default fields, in JSON, fits into what
// a pipe takes at once (4,096 bytes).
const (
	longestField = 128
	longestAgent = 192
	longestPath  = 640
)

// bounded is a sample cut to its bound, and without what a terminal would obey.
func bounded(sample string) string {
	most := longestField
	if sample == "req.hdr(user-agent)" {
		most = longestAgent
	}
	return fmt.Sprintf("%s,bytes(0,%d),regsub([[:cntrl:]],?,g)", sample, most)
}

// remember keeps a sample in a variable until the line is written.
func (t *translation) remember(name, sample string) string {
	if name != "start" {
		sample = bounded(sample)
	}
	scope, rule := "sess.al_", "tcp-request session set-var(sess.al_%s) %s"
	if t.http {
		scope, rule = "txn.al_", "http-request set-var(txn.al_%s) %s"
		if strings.HasPrefix(sample, "res.") {
			rule = "http-response set-var(txn.al_%s) %s"
		}
	}
	if line := fmt.Sprintf(rule, name, sample); !slices.Contains(t.before, line) {
		t.before = append(t.before, line)
	}
	return scope + name
}
