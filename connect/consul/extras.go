package consul

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// extras are the keys of ours under "haproxy": what HAProxy can do beyond what Consul knows.
type extras struct {
	listener connect.Extras
	affinity string
	slow     time.Duration
	queue    connect.Queue
	snippets map[connect.SnippetName]string
}

// extras reads those of the proxy, or of an upstream.
func (k *keys) extras(upstream bool) (out extras) {
	k = k.sub("haproxy")
	if k == nil {
		return out
	}
	out.listener.Rates = k.rates()
	out.listener.MaxBody = k.int(0, 1, math.MaxInt32, "max_request_bytes")
	out.snippets = map[connect.SnippetName]string{}
	if upstream {
		out.affinity = k.cookie()
		out.slow = k.duration(0, "slow_start")
		if q := k.sub("queue"); q != nil {
			out.queue = connect.Queue{PerEndpoint: q.int(0, 1, 1<<20, "per_endpoint"), Max: q.int(0, 1, 1<<20, "max"), Timeout: q.duration(0, "timeout")}
			q.rest()
		}
		k.snippet(out.snippets, "snippet", connect.UpstreamSnippet)
	} else if s := k.sub("snippets"); s != nil {
		for _, name := range []connect.SnippetName{connect.GlobalSnippet, connect.DefaultsSnippet, connect.PublicSnippet, connect.UpstreamSnippet} {
			s.snippet(out.snippets, string(name), name)
		}
		s.rest()
	}
	k.rest()
	return out
}

// rates reads blocks of rate_limit.
func (k *keys) rates() (out []connect.RateLimit) {
	for _, one := range k.blocks("rate_limit") {
		r := connect.RateLimit{Requests: one.int(0, 1, math.MaxInt32, "requests"), Per: one.duration(time.Second, "per"), Path: one.string("path_prefix")}
		one.rest()
		switch {
		case r.Requests == 0:
			one.notices.Add(k.where, "haproxy.rate_limit", "", "want requests, a number above 0; there is no such limit")
		case r.Path != "" && !plainPath(r.Path):
			one.notices.Add(k.where, "haproxy.rate_limit.path_prefix", r.Path, "want a plain path that begins with /; there is no such limit")
		case len(out) == connect.MaxRates:
			one.notices.Add(k.where, "haproxy.rate_limit", fmt.Sprint(r.Requests), fmt.Sprintf("HAProxy counts %d at most; there is no such limit", connect.MaxRates))
		default:
			out = append(out, r)
		}
	}
	return out
}

func (k *keys) cookie() string {
	name := k.string("session_affinity_cookie")
	if name != "" && !cookieName(name) {
		k.bad("session_affinity_cookie", name, "the name of a cookie")
		return ""
	}
	return name
}

// fit leaves out what a protocol does not have.
func (e extras) fit(p connect.Protocol, where string, n *connect.Notices) extras {
	if p.IsHTTP() {
		return e
	}
	none := func(key string) {
		n.Add(where, "haproxy."+key, "", "only http, http2 and grpc have it; it does nothing here")
	}
	if e.listener.MaxBody > 0 {
		none("max_request_bytes")
		e.listener.MaxBody = 0
	}
	if e.affinity != "" {
		none("session_affinity_cookie")
		e.affinity = ""
	}
	under := func(r connect.RateLimit) bool { return r.Path != "" }
	if slices.ContainsFunc(e.listener.Rates, under) {
		none("rate_limit.path_prefix")
		e.listener.Rates = slices.DeleteFunc(slices.Clone(e.listener.Rates), under)
	}
	return e
}

// snippet reads lines in HAProxy's own words.
func (k *keys) snippet(to map[connect.SnippetName]string, key string, name connect.SnippetName) {
	text := strings.TrimSpace(k.string(key))
	if text == "" {
		return
	}
	if len(text) > 64<<10 {
		k.notices.Add(k.where, "haproxy "+key, "", "more than 64 KiB; it is not used")
		return
	}
	to[name] = text + "\n"
}
