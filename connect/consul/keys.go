package consul

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// keys reads an opaque, weakly typed configuration map. A value that cannot be used
// becomes a notice, and the default stays; a key that nobody asked for becomes a notice, too.
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

// balance accepts a setting that Envoy needs, while HAProxy balances by itself.
func (k *keys) balance(name string) {
	if s := k.string(name); s != "" && s != "none" && s != "exact_balance" {
		k.bad(name, s, "exact_balance")
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

// blocks opens every map of a list; a single map is a list of one.
func (k *keys) blocks(name string) (out []*keys) {
	k.asked[name] = true
	var list []any
	switch v := k.m[name].(type) {
	case nil:
	case []any:
		list = v
	case []map[string]any:
		for _, m := range v {
			list = append(list, m)
		}
	default:
		list = []any{v}
	}
	for _, v := range list {
		m, isMap := v.(map[string]any)
		if !isMap {
			k.bad(name, v, "a map")
			continue
		}
		out = append(out, newKeys(k.where, m, k.notices))
	}
	return out
}

// envoyOnly are keys for other proxies, mostly Envoy (Consul docs), and why they are ignored;
// "": the key is Envoy's own.
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
