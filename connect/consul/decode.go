package consul

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
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

// keys reads an opaque, weakly typed configuration map: a value that cannot be
// used keeps the default and becomes a notice, a key nobody asked for too.
type keys struct {
	where   string
	m       map[string]any
	asked   map[string]bool
	notices *connect.Notices
}

func newKeys(where string, m map[string]any, n *connect.Notices) *keys {
	return &keys{where: where, m: m, asked: map[string]bool{}, notices: n}
}

// get finds a key in the spellings Consul uses: snake_case from users, CamelCase
// where Consul merged a config entry.
func (k *keys) get(names ...string) (string, any, bool) {
	for _, n := range names {
		k.asked[n] = true
	}
	for _, n := range names {
		if v := single(k.m[n]); v != nil {
			return n, v, true
		}
	}
	return "", nil, false
}

// single unwraps lists of one: a block written in HCL arrives as such a list, and Consul's
// own decoding takes it for what is in it (lib/decode, HookWeakDecodeFromSlice).
func single(v any) any {
	for {
		switch list := v.(type) {
		case []any:
			if len(list) != 1 {
				return v
			}
			v = list[0]
		case []map[string]any:
			if len(list) != 1 {
				return v
			}
			return list[0]
		default:
			return v
		}
	}
}

func (k *keys) bad(name string, v any, want string) {
	k.notices.Add(k.where, name, fmt.Sprint(v), "want "+want+"; the default is used")
}

func number(v any) (float64, bool) {
	switch t := v.(type) {
	case float64:
		return t, true
	case int:
		return float64(t), true
	case bool:
		return 0, false
	case string:
		f, err := strconv.ParseFloat(strings.TrimSpace(t), 64)
		return f, err == nil
	}
	return 0, false
}

func (k *keys) int(def, lo, hi int, names ...string) int {
	name, v, ok := k.get(names...)
	if !ok {
		return def
	}
	f, ok := number(v)
	if !ok || f != float64(int64(f)) || f < float64(lo) || f > float64(hi) {
		k.bad(name, v, fmt.Sprintf("a whole number from %d to %d", lo, hi))
		return def
	}
	return int(f)
}

// limit is an int that may be absent.
func (k *keys) limit(names ...string) *int {
	if _, _, ok := k.get(names...); !ok {
		return nil
	}
	n := k.int(-1, 0, 1<<30, names...)
	if n < 0 {
		return nil
	}
	return &n
}

func (k *keys) ms(def time.Duration, name string) time.Duration {
	n := k.int(-1, 0, int(maxDuration/time.Millisecond), name)
	if n < 0 {
		return def
	}
	return time.Duration(n) * time.Millisecond
}

// duration takes "30s", or a number of nanoseconds as Consul merges them.
func (k *keys) duration(def time.Duration, names ...string) time.Duration {
	name, v, ok := k.get(names...)
	if !ok {
		return def
	}
	var d time.Duration
	if s, isText := v.(string); isText {
		parsed, err := time.ParseDuration(s)
		if err != nil {
			k.bad(name, v, `a duration such as "30s"`)
			return def
		}
		d = parsed
	} else if f, isNumber := number(v); isNumber {
		d = time.Duration(f)
	} else {
		k.bad(name, v, `a duration such as "30s"`)
		return def
	}
	if d <= 0 || d > maxDuration {
		k.bad(name, v, "a duration above 0 and up to 576h")
		return def
	}
	return d
}

func (k *keys) bool(def bool, name string) bool {
	_, v, ok := k.get(name)
	if !ok {
		return def
	}
	switch t := v.(type) {
	case bool:
		return t
	case string:
		if b, err := strconv.ParseBool(t); err == nil {
			return b
		}
	case float64:
		if t == 0 || t == 1 {
			return t == 1
		}
	}
	k.bad(name, v, "true or false")
	return def
}

func (k *keys) string(name string) string {
	_, v, ok := k.get(name)
	if !ok {
		return ""
	}
	switch v.(type) {
	case string, float64, bool:
		return fmt.Sprint(v)
	}
	k.bad(name, v, "a string")
	return ""
}

func (k *keys) protocol(def connect.Protocol) connect.Protocol {
	s := k.string("protocol")
	if s == "" {
		return def
	}
	p, ok := connect.ParseProtocol(s)
	if !ok {
		k.bad("protocol", s, "tcp, http, http2 or grpc")
	}
	return p
}

func (k *keys) balance(name string) bool {
	switch s := k.string(name); s {
	case "", "none":
		return false
	case "exact_balance":
		return true
	default:
		k.bad(name, s, "exact_balance")
		return false
	}
}

// sub opens a nested map.
func (k *keys) sub(name string) *keys {
	_, v, ok := k.get(name)
	if !ok {
		return nil
	}
	m, isMap := v.(map[string]any)
	if !isMap {
		k.bad(name, v, "a map")
		return nil
	}
	return newKeys(k.where, m, k.notices)
}

// envoyOnly are keys that speak Envoy's own language (Consul docs).
var envoyOnly = map[string]string{
	"envoy_public_listener_json": "", "envoy_listener_tracing_json": "", "envoy_local_cluster_json": "", "envoy_listener_json": "",
	"envoy_cluster_json": "", "envoy_bootstrap_json_tpl": "", "envoy_extra_static_clusters_json": "",
	"envoy_extra_static_listeners_json": "", "envoy_extra_stats_sinks_json": "", "envoy_stats_config_json": "",
	"envoy_tracing_json": "", "xds_fetch_timeout_ms": "", "envoy_telemetry_collector_bind_socket_dir": "",
	"envoy_statsd_url": "metrics are pulled from -admin-addr under /metrics", "envoy_dogstatsd_url": "metrics are pulled from -admin-addr under /metrics",
	"envoy_stats_tags": "metrics are pulled from -admin-addr under /metrics", "envoy_stats_flush_interval": "metrics are pulled, not pushed",
	"syslog_server": "logs go to standard output", "handshake_timeout_ms": "the built-in proxy's key; use connect_timeout_ms of the caller",
}

// rest reports every key that nobody asked for.
func (k *keys) rest() {
	for name, v := range k.m {
		if k.asked[name] {
			continue
		}
		why, known := envoyOnly[name]
		switch {
		case known && why == "":
			why = "it is Envoy's own and has no meaning for HAProxy"
		case !known:
			why = "no such key is known"
		}
		text := fmt.Sprint(v)
		if known {
			text = "" // may be long
		}
		k.notices.Add(k.where, name, text, why)
	}
}

func port(n int) bool { return n > 0 && n < 65536 }

// address keeps an IP address that may be listened on.
func address(where, key, v, def string, n *connect.Notices) string {
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

// inbound reads the public side of a registration.
func inbound(s *api.AgentService, n *connect.Notices) connect.Inbound {
	const where = "proxy"
	p := s.Proxy
	k := newKeys(where, p.Config, n)
	in := connect.Inbound{Protocol: k.protocol(connect.TCP)}
	switch mode := k.string("local_service_mode"); mode { // the 2018 demo's key
	case "":
	case "http":
		in.Protocol = connect.HTTP
	case "tcp":
		in.Protocol = connect.TCP
	default:
		k.bad("local_service_mode", mode, "http or tcp")
	}
	def := "0.0.0.0"
	if ip, err := netip.ParseAddr(s.Address); err == nil {
		def = ip.String()
	}
	in.Address = address(where, "bind_address", k.string("bind_address"), def, n)
	in.Port = k.int(s.Port, 1, 65535, "bind_port")
	// A client-only service registers no port of its own; then nothing listens.
	in.Local = connect.Local{
		Address: address(where, "local_service_address", p.LocalServiceAddress, "127.0.0.1", n),
		Port:    p.LocalServicePort,
	}
	if v := k.string("local_service_address"); v != "" && p.LocalServiceAddress == "" { // the old program's key
		in.Local.Address = address(where, "local_service_address", v, "127.0.0.1", n)
	}
	if lp := k.int(0, 1, 65535, "local_service_port"); lp != 0 && in.Local.Port == 0 {
		in.Local.Port = lp
	}
	in.Local.SocketPath = socket(where, "local_service_socket_path", p.LocalServiceSocketPath, n)
	if in.Local.SocketPath == "" && !port(in.Local.Port) {
		in.Port = 0
	}

	in.LocalConnectTimeout = nonZero(k.ms(defaultConnect, "local_connect_timeout_ms"), defaultConnect)
	if _, _, ok := k.get("connect_timeout"); ok { // the old program's key
		in.LocalConnectTimeout = k.duration(in.LocalConnectTimeout, "connect_timeout")
	}
	request := defaultRequest
	switch {
	case in.Protocol == connect.GRPC:
		request = defaultStream
	case !in.Protocol.IsHTTP():
		request = -1
	}
	in.LocalRequestTimeout = request
	if _, _, ok := k.get("local_request_timeout_ms"); ok {
		if in.LocalRequestTimeout = k.ms(request, "local_request_timeout_ms"); in.LocalRequestTimeout == 0 {
			in.LocalRequestTimeout = -1
		}
	} else if _, _, ok := k.get("read_timeout"); ok {
		in.LocalRequestTimeout = k.duration(request, "read_timeout")
	}
	idle := defaultTCPIdle
	if in.Protocol.IsHTTP() {
		idle = defaultHTTPIdle
	}
	in.LocalIdleTimeout = nonZero(k.ms(idle, "local_idle_timeout_ms"), maxDuration)
	in.MaxConnections = k.int(0, 0, 1<<30, "max_inbound_connections")
	in.BalanceExact = k.balance("balance_inbound_connections")
	in.ForwardFor = k.bool(false, "enable_forwardfor")
	if h := k.string("appname_header"); h != "" {
		if headerName(h) {
			in.CallerHeader = h
		} else {
			k.bad("appname_header", h, "a header's name")
		}
	}
	in.UnsecuredPort = k.int(0, 1, 65535, "unsecured_bind_port")
	in.Telemetry = telemetry(k)
	k.rest()

	for _, e := range p.Expose.Paths {
		x := connect.ExposePath{Path: e.Path, LocalPort: e.LocalPathPort, ListenPort: e.ListenerPort, Protocol: connect.HTTP}
		if proto, ok := connect.ParseProtocol(e.Protocol); ok && proto == connect.HTTP2 {
			x.Protocol = connect.HTTP2
		} else if e.Protocol != "" && proto != connect.HTTP {
			n.Add(where, "expose.paths.protocol", e.Protocol, "want http or http2; http is used")
		}
		if !port(x.LocalPort) || !port(x.ListenPort) || !plainPath(x.Path) {
			n.Add(where, "expose.paths", fmt.Sprintf("%s %d %d", e.Path, e.ListenerPort, e.LocalPathPort), "want a path of plain characters from / on, and two ports; it is not exposed")
			continue
		}
		in.Expose = append(in.Expose, x)
	}
	slices.SortFunc(in.Expose, func(a, b connect.ExposePath) int {
		if a.ListenPort != b.ListenPort {
			return a.ListenPort - b.ListenPort
		}
		return strings.Compare(a.Path, b.Path)
	})
	if p.Expose.Checks {
		n.Add(where, "expose.checks", "true", "Consul's HTTP API does not tell the path of a check; use expose.paths")
	}
	if p.Mode == api.ProxyModeTransparent {
		n.Add(where, "mode", string(p.Mode), "transparent proxying of upstreams is not supported; declare each upstream with a port")
	}
	in.AccessLog = accessLog(p.AccessLogs, n)
	apart(&in, n)
	return in
}

// apart takes away listeners that meet another one of the service: half of the connections
// would land on either.
func apart(in *connect.Inbound, n *connect.Notices) {
	const why = "another listener of the service has this port; this one is left out"
	public := connect.Listener{Address: in.Address, Port: in.Port}
	unsecured := connect.Listener{Address: "0.0.0.0", Port: in.UnsecuredPort}
	if in.UnsecuredPort != 0 && public.Clashes(unsecured) {
		n.Add("proxy", "unsecured_bind_port", strconv.Itoa(in.UnsecuredPort), why)
		in.UnsecuredPort = 0
	}
	in.Expose = slices.DeleteFunc(in.Expose, func(e connect.ExposePath) bool {
		l := connect.Listener{Address: in.Address, Port: e.ListenPort}
		clashes := l.Clashes(public) || in.UnsecuredPort != 0 && l.Clashes(unsecured)
		if clashes {
			n.Add("proxy", "expose.paths.listener_port", strconv.Itoa(e.ListenPort), why)
		}
		return clashes
	})
}

// accessLog reads the settings of proxy-defaults. Envoy's listener logs, which
// DisableListenerLogs is about, are of connections that match no listener: we have none.
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

// telemetry reads where metrics are asked for.
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

// declared is one upstream of the registration, decoded.
type declared struct {
	key string // of the watch: everything that is asked

	destination string // what is asked about
	query       bool
	service     string
	dc          string
	where       string
	up          connect.Upstream
	protocol    *connect.Protocol // nil: the chain's
	connect     bool              // connect timeout was set
	idle        bool
	poll        time.Duration
}

// upstreams decodes every listener of a registration. A broken one is left out
// with a notice; the others stay. own are the listeners of the inbound side.
func upstreams(s *api.AgentService, own []connect.Listener, n *connect.Notices) []declared {
	var out []declared
	used := map[string]int{}
	taken := map[int][]connect.Listener{}
	for _, l := range own {
		taken[l.Port] = append(taken[l.Port], l)
	}
	sockets := map[string]bool{}
	for _, u := range s.Proxy.Upstreams {
		if u.DestinationName == "*" || (u.LocalBindPort == 0 && u.LocalBindSocketPath == "") {
			continue // central defaults, not a listener
		}
		d := declared{query: u.DestinationType == api.UpstreamDestTypePreparedQuery, service: u.DestinationName, dc: u.Datacenter}
		d.where = "upstream " + u.DestinationName
		if err := certs.ServiceName(d.service); err != nil && !d.query {
			n.Add(d.where, "destination_name", u.DestinationName, err.Error()+"; the upstream is left out")
			continue
		}
		if d.service == "" || len(d.service) > 256 || strings.ContainsFunc(d.service, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' || r == '?' || r == '#' || r == '%' }) || strings.Contains(d.service, "..") {
			n.Add(d.where, "destination_name", u.DestinationName, "not a service's name; the upstream is left out")
			continue
		}
		if u.DestinationPeer != "" {
			n.Add(d.where, "destination_peer", u.DestinationPeer, "cluster peering is not supported; the upstream is left out")
			continue
		}
		if d.dc == "" {
			d.dc = s.Datacenter
		}
		gateway := u.MeshGateway.Mode
		if gateway == api.MeshGatewayModeDefault {
			gateway = s.Proxy.MeshGateway.Mode
		}
		if d.dc != s.Datacenter && gateway != api.MeshGatewayModeDefault && gateway != api.MeshGatewayModeNone {
			n.Add(d.where, "mesh_gateway.mode", string(gateway), "mesh gateways are not supported; instances are dialled at their WAN address")
		}
		for key, v := range map[string]string{"destination_namespace": u.DestinationNamespace, "destination_partition": u.DestinationPartition} {
			if v != "" && v != "default" {
				n.Add(d.where, key, v, "an enterprise feature that is not supported; the default one is called")
			}
		}
		if !d.listener(u, n) {
			continue
		}
		if l := d.up.Listen; l.SocketPath != "" && sockets[l.SocketPath] || slices.ContainsFunc(taken[l.Port], l.Clashes) {
			n.Add(d.where, "local_bind_port", fmt.Sprintf("%s%s:%d", l.SocketPath, l.Address, l.Port), "another listener of this proxy has it; the upstream is left out")
			continue
		} else if l.SocketPath != "" {
			sockets[l.SocketPath] = true
		} else {
			taken[l.Port] = append(taken[l.Port], l)
		}
		d.settings(u, n)
		name := connect.SafeName(d.service)
		if d.query {
			name += ".query"
		}
		d.up.Name, d.up.Target.Name = name, name+".default."+connect.SafeName(d.dc)
		if d.dc != s.Datacenter {
			d.up.Name += "." + connect.SafeName(d.dc)
		}
		if used[d.up.Target.Name]++; used[d.up.Target.Name] > 1 {
			again := fmt.Sprintf("_%d", used[d.up.Target.Name])
			d.up.Name += again
			d.up.Target.Name += again
		}
		d.destination = fmt.Sprintf("%t\x00%s\x00%s", d.query, d.service, d.dc)
		d.key = d.destination
		if d.query { // asked so often: another interval is another watch
			d.key += "\x00" + d.poll.String()
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b declared) int { return strings.Compare(a.up.Name, b.up.Name) })
	return out
}

func (d *declared) listener(u api.Upstream, n *connect.Notices) bool {
	l := &d.up.Listen
	if u.LocalBindSocketPath != "" {
		if l.SocketPath = socket(d.where, "local_bind_socket_path", u.LocalBindSocketPath, n); l.SocketPath == "" {
			return false
		}
		l.SocketMode = "600"
		if m := u.LocalBindSocketMode; m != "" {
			if v, err := strconv.ParseUint(m, 8, 16); err != nil || v > 0o777 {
				n.Add(d.where, "local_bind_socket_mode", m, "want an octal mode such as 0660; 0600 is used")
			} else {
				l.SocketMode = strconv.FormatUint(v, 8)
			}
		}
		return true
	}
	if !port(u.LocalBindPort) {
		n.Add(d.where, "local_bind_port", strconv.Itoa(u.LocalBindPort), "want a port from 1 to 65535; the upstream is left out")
		return false
	}
	l.Address, l.Port = address(d.where, "local_bind_address", u.LocalBindAddress, "127.0.0.1", n), u.LocalBindPort
	return true
}

func (d *declared) settings(u api.Upstream, n *connect.Notices) {
	k := newKeys(d.where, u.Config, n)
	if _, _, ok := k.get("protocol"); ok {
		p := k.protocol(connect.TCP)
		d.protocol = &p
	}
	d.up.ConnectTimeout = defaultConnect
	if _, _, ok := k.get("connect_timeout_ms"); ok {
		d.connect = true
		d.up.ConnectTimeout = nonZero(k.ms(defaultConnect, "connect_timeout_ms"), defaultConnect)
	} else if _, _, ok := k.get("connect_timeout"); ok {
		d.connect = true
		d.up.ConnectTimeout = k.duration(defaultConnect, "connect_timeout")
	}
	if _, _, ok := k.get("read_timeout"); ok {
		d.idle = true
		d.up.IdleTimeout = k.duration(defaultUpstreamReq, "read_timeout")
	}
	d.poll = max(k.duration(defaultPoll, "poll_interval"), time.Second)
	if l := k.sub("limits"); l != nil {
		d.up.Limits = connect.Limits{
			MaxConnections:        l.limit("max_connections", "MaxConnections"),
			MaxPendingRequests:    l.limit("max_pending_requests", "MaxPendingRequests"),
			MaxConcurrentRequests: l.limit("max_concurrent_requests", "MaxConcurrentRequests"),
		}
		l.rest()
	}
	if h := k.sub("passive_health_check"); h != nil {
		d.up.Passive = &connect.PassiveHealth{
			Interval:     h.duration(10*time.Second, "interval", "Interval"),
			MaxFailures:  h.int(5, 1, 1<<20, "max_failures", "MaxFailures"),
			BaseEjection: h.duration(30*time.Second, "base_ejection_time", "BaseEjectionTime"),
		}
		d.up.Passive.Enforced = h.int(100, 0, 100, "enforcing_consecutive_5xx", "EnforcingConsecutive5xx")
		if _, _, ok := h.get("max_ejection_percent", "MaxEjectionPercent"); ok {
			if pct := h.int(-1, 0, 100, "max_ejection_percent", "MaxEjectionPercent"); pct >= 0 {
				d.up.Passive.MaxEjected = &pct
			}
		}
		if d.up.Passive.Enforced == 0 {
			d.up.Passive = nil
		}
		h.rest()
	}
	d.up.BalanceExact = k.balance("balance_outbound_connections")
	k.get("mesh_gateway") // merged by Consul beside the structured field
	k.rest()
}
