package consul

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// Defaults of Consul and Envoy for a sidecar (reference: Consul's docs,
// "Envoy proxy configuration"), and where they name none, ours.
const (
	defaultConnect     = 5 * time.Second
	defaultRequest     = 15 * time.Second
	defaultStream      = time.Hour // gRPC: a stream may be silent for long
	defaultHTTPIdle    = 5 * time.Minute
	defaultTCPIdle     = time.Hour
	defaultUpstreamReq = time.Minute
	defaultPoll        = 30 * time.Second
	maxDuration        = 24 * 24 * time.Hour // HAProxy's timers hold 2^31 ms
)

func port(n int) bool { return n > 0 && n < 65536 }

// ipAddress reads an IP address; anything else becomes a notice, and def is used.
func ipAddress(where, key, v, def string, n *connect.Notices) string {
	if v == "" {
		return def
	}
	if v == "localhost" {
		return "127.0.0.1"
	}
	ip, err := netip.ParseAddr(v)
	if err != nil || ip.Zone() != "" {
		n.Add(where, key, v, "want an IP address; "+def+" is used")
		return def
	}
	return ip.String()
}

// socket keeps an absolute path that a configuration can hold.
func socket(where, key, v string, n *connect.Notices) string {
	if v == "" {
		return ""
	}
	// 108 bytes is the kernel's limit; HAProxy adds a suffix while it binds.
	if !plainPath(v) || len(v) > 90 {
		n.Add(where, key, v, "want an absolute path of at most 90 plain characters")
		return ""
	}
	return v
}

// plainPath reports whether a path can stand in a configuration as it is.
func plainPath(s string) bool {
	return strings.HasPrefix(s, "/") && len(s) <= 1000 && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r > '~' || strings.ContainsRune("\"'\\#,$@%(){}`", r)
	})
}

// decodeInbound reads the public side of a registration.
func decodeInbound(s *api.AgentService, n *connect.Notices) *inbound {
	const where = "proxy"
	p := s.Proxy
	k := newKeys(where, p.Config, n)
	in := &inbound{protocol: k.protocol(connect.TCP)}
	switch mode := k.string("local_service_mode"); mode { // the 2018 demo's key
	case "":
	case "http":
		in.protocol = connect.HTTP
	case "tcp":
		in.protocol = connect.TCP
	default:
		k.bad("local_service_mode", mode, "http or tcp")
	}
	def := "0.0.0.0"
	if ip, err := netip.ParseAddr(s.Address); err == nil {
		def = ip.String()
	}
	in.bind.Address = ipAddress(where, "bind_address", k.string("bind_address"), def, n)
	in.bind.Port = k.int(s.Port, 1, 65535, "bind_port")
	// A client-only service registers no port of its own; then nothing listens.
	in.app = connect.Endpoint{
		Name:    "app",
		Address: ipAddress(where, "local_service_address", p.LocalServiceAddress, "127.0.0.1", n),
		Port:    p.LocalServicePort,
		Weight:  1,
	}
	if v := k.string("local_service_address"); v != "" && p.LocalServiceAddress == "" { // the old program's key
		in.app.Address = ipAddress(where, "local_service_address", v, "127.0.0.1", n)
	}
	if lp := k.int(0, 1, 65535, "local_service_port"); lp != 0 && in.app.Port == 0 {
		in.app.Port = lp
	}
	in.app.SocketPath = socket(where, "local_service_socket_path", p.LocalServiceSocketPath, n)
	if in.app.SocketPath == "" && !port(in.app.Port) {
		in.bind.Port = 0
	}

	in.timeouts(k)
	if most := k.int(0, 0, 1<<30, "max_inbound_connections"); most > 0 {
		in.most = &most
	}
	k.balance("balance_inbound_connections") // HAProxy spreads connections over its threads anyway
	in.forwardFor = k.bool(false, "enable_forwardfor")
	if h := k.string("appname_header"); h != "" {
		if headerName(h) {
			in.callerHeader = h
		} else {
			k.bad("appname_header", h, "a header's name")
		}
	}
	in.unsecured = k.int(0, 1, 65535, "unsecured_bind_port")
	in.telemetry = telemetry(k)
	k.get(sdsKey) // of gateways
	in.extras = k.extras(false).fit(in.protocol, where, n)
	k.rest()

	in.paths(p.Expose.Paths, n)
	in.checks = p.Expose.Checks
	if p.Mode == api.ProxyModeTransparent {
		n.Add(where, "mode", string(p.Mode), "transparent proxying of upstreams is not supported; declare each upstream with a port")
	}
	in.accessLog = accessLog(p.AccessLogs, n)
	in.apart(n)
	return in
}

// timeouts reads the timeouts toward the application.
func (in *inbound) timeouts(k *keys) {
	in.connect = nonZero(k.ms(defaultConnect, "local_connect_timeout_ms"), defaultConnect)
	if _, _, ok := k.get("connect_timeout"); ok { // the old program's key
		in.connect = k.duration(in.connect, "connect_timeout")
	}
	request := defaultRequest
	switch {
	case in.protocol == connect.GRPC:
		request = defaultStream
	case !in.protocol.IsHTTP():
		request = -1
	}
	in.request = request
	if _, _, ok := k.get("local_request_timeout_ms"); ok {
		if in.request = k.ms(request, "local_request_timeout_ms"); in.request == 0 {
			in.request = -1
		}
	} else if _, _, ok := k.get("read_timeout"); ok {
		in.request = k.duration(request, "read_timeout")
	}
	idle := defaultTCPIdle
	if in.protocol.IsHTTP() {
		idle = defaultHTTPIdle
	}
	in.idle = nonZero(k.ms(idle, "local_idle_timeout_ms"), maxDuration)
}

// paths reads expose.paths.
func (in *inbound) paths(list []api.ExposePath, n *connect.Notices) {
	const where = "proxy"
	for _, e := range list {
		x := exposed{path: e.Path, app: e.LocalPathPort, port: e.ListenerPort, protocol: connect.HTTP}
		if proto, ok := connect.ParseProtocol(e.Protocol); ok && proto == connect.HTTP2 {
			x.protocol = connect.HTTP2
		} else if e.Protocol != "" && proto != connect.HTTP {
			n.Add(where, "expose.paths.protocol", e.Protocol, "want http or http2; http is used")
		}
		if !port(x.app) || !port(x.port) || !plainPath(x.path) {
			n.Add(where, "expose.paths", fmt.Sprintf("%s %d %d", e.Path, e.ListenerPort, e.LocalPathPort), "want a path of plain characters from / on, and two ports; it is not exposed")
			continue
		}
		in.expose = append(in.expose, x)
	}
	slices.SortFunc(in.expose, func(a, b exposed) int {
		return cmp.Or(a.port-b.port, strings.Compare(a.path, b.path))
	})
}

// apart removes listeners that clash with another listener of the service: each of the two
// would get half of the connections.
func (in *inbound) apart(n *connect.Notices) {
	const why = "another listener of the service has this port; this one is left out"
	if in.unsecured != 0 && in.bind.Clashes(in.unsecuredBind()) {
		n.Add("proxy", "unsecured_bind_port", strconv.Itoa(in.unsecured), why)
		in.unsecured = 0
	}
	in.expose = slices.DeleteFunc(in.expose, func(e exposed) bool {
		b := in.exposeBind(e.port)
		clashes := b.Clashes(in.bind) || in.unsecured != 0 && b.Clashes(in.unsecuredBind())
		if clashes {
			n.Add("proxy", "expose.paths.listener_port", strconv.Itoa(e.port), why)
		}
		return clashes
	})
}

// accessLog reads the access log's settings from proxy-defaults. It ignores DisableListenerLogs,
// which is about Envoy's logs of connections that match no listener: we have no such connections.
func accessLog(a *api.AccessLogsConfig, n *connect.Notices) (out connect.AccessLog) {
	if a == nil || !a.Enabled {
		return out
	}
	out = connect.AccessLog{Enabled: true, JSON: a.JSONFormat, Text: strings.TrimRight(a.TextFormat, "\r\n"), Sink: "stdout"}
	switch a.Type {
	case api.DefaultLogSinkType, api.StdOutLogSinkType:
	case api.StdErrLogSinkType:
		out.Sink = "stderr"
	case api.FileLogSinkType:
		if !plainPath(a.Path) {
			n.Add("proxy", "access_logs.path", a.Path, "want an absolute path of plain characters; the log goes to standard output")
		} else {
			out.Sink = a.Path
		}
	default:
		n.Add("proxy", "access_logs.type", string(a.Type), "want stdout, stderr or file; the log goes to standard output")
	}
	if out.JSON != "" && !json.Valid([]byte(out.JSON)) {
		n.Add("proxy", "access_logs.json_format", out.JSON, "not JSON; Envoy's default fields are logged")
		out.JSON = ""
	}
	if strings.ContainsFunc(out.JSON+out.Text, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || r > '~' }) || strings.Contains(out.Text, "\n") || len(out.JSON)+len(out.Text) > 4096 {
		n.Add("proxy", "access_logs", "", "want a format of at most 4096 plain characters on one line; Envoy's default fields are logged")
		out.JSON, out.Text = "", ""
	}
	return out
}

// telemetry reads the addresses at which metrics are to be served.
func telemetry(k *keys) (t connect.Telemetry) {
	for key, to := range map[string]*string{"envoy_prometheus_bind_addr": &t.Prometheus, "envoy_stats_bind_addr": &t.Stats} {
		v := k.string(key)
		if v == "" {
			continue
		}
		if a, err := netip.ParseAddrPort(v); err != nil || a.Port() == 0 || a.Addr().Zone() != "" {
			k.bad(key, v, "an IP address and a port, such as 0.0.0.0:9102")
		} else {
			*to = a.String()
		}
	}
	return t
}

func nonZero(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return d
}

// headerName reports whether a text names a header and no option of HAProxy's.
func headerName(s string) bool {
	return s != "" && s[0] != '-' && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-')
	})
}
