package render

import (
	"cmp"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// connections is how many connections there may be at once. A connection to an HTTP upstream
// holds four descriptors: both ends of the application's and of the connector's connection.
// Each listener holds one. slots is nil for the share of callers, which must not change as
// often as the number of slots.
func (o *Options) connections(slots map[string]*SlotTable, upstreams int) int {
	if o.MaxFiles == 0 {
		return o.MaxConn
	}
	taken := 300 + (upstreams+255)/256*256 // in steps: one upstream more is no other limit
	for _, t := range slots {
		taken += t.Size
	}
	return max(50, min(o.MaxConn, (o.MaxFiles-taken)/5))
}

// maxOldWorkers caps replaced workers that still have sessions: each keeps its whole
// memory. The oldest is ended when there would be more.
const maxOldWorkers = 20

// process adds the sections that are of no listener.
func (f *file) process() {
	if f.LuaBool {
		// Must come before lua-load, and the parser moves what it does not know to the end.
		f.add(global("Lua's booleans").add("tune.lua.bool-sample-conversion normal"), "for the Lua filter below")
	}
	f.add(global("experimental directives").add("expose-experimental-directives"), "for normalize-uri, which HAProxy still calls experimental")
	if f.LosesAnswers { // in a section of its own: the parser takes only one such line in each
		f.add(global("denials").add("lua-load-per-thread %s", f.path(lua.DenyFile)), "denials that callers hear while they still send")
	}
	if slices.ContainsFunc(f.snap.Listeners, routed) {
		f.Files[lua.RoutesFile] = lua.Routes
		f.add(global("routes").add("lua-load-per-thread %s", f.path(lua.RoutesFile)), "conditions and time limits of routes")
	}
	if slices.ContainsFunc(f.snap.Listeners, limitsBodies) {
		f.Files[lua.BodyFile] = lua.Body
		f.add(global("bodies").add("lua-load-per-thread %s", f.path(lua.BodyFile)), "limits of requests' bodies")
	}
	f.add(f.snippet(f.settings(f.snap.Incoming, f.snap.Outgoing), connect.GlobalSnippet), "the process")
	f.limits = len(f.Sections)
	f.Sections = append(f.Sections, nil) // see limit
	f.add(f.snippet(defaults(), connect.DefaultsSnippet), "defaults of every proxy below")
	f.add(section(Defaults, httpDefaults+" from "+allDefaults).add("option abortonclose"), "what is asked of an application ends with who asked")
	f.add(f.admin(), "statistics and metrics, for haproxy-connect alone")
	if f.snap.Public() != nil {
		f.add(f.authz(), "the agent that knows the intentions")
	}
}

// opensslNames are ciphers as OpenSSL calls them, by their names in IANA's registry.
var opensslNames = strings.NewReplacer("TLS_", "", "_WITH_AES_128_GCM_", "-AES128-GCM-", "_WITH_AES_256_GCM_", "-AES256-GCM-", "_WITH_AES_128_CBC_", "-AES128-", "_WITH_AES_256_CBC_", "-AES256-",
	"_WITH_CHACHA20_POLY1305_SHA256", "-CHACHA20-POLY1305", "_", "-", ",", ":")

// tlsOf sets the versions and ciphers of one direction.
func tlsOf(g *builder, side string, t connect.TLS) {
	most := ""
	if t.Max != "" {
		most = " ssl-max-ver TLSv" + t.Max
	}
	g.add("ssl-default-%s-options ssl-min-ver TLSv%s%s no-tls-tickets", side, cmp.Or(t.Min, "1.2"), most)
	if t.Ciphers != "" {
		g.add("ssl-default-%s-ciphers %s", side, g.check("ciphers", opensslNames.Replace(t.Ciphers)))
	}
}

// settings of the process.
func (o *Options) settings(in, out connect.TLS) *builder {
	g := global("")
	if o.User != "" {
		g.add("user %s", g.check("user", o.User))
	}
	if o.Group != "" {
		g.add("group %s", g.check("group", o.Group))
	}
	g.add("nbthread %d", o.Threads)
	owner := ""
	if o.User != "" {
		owner = " user " + o.User
	}
	g.add("stats socket unix@%s mode 600%s level admin expose-fd listeners", o.path(StatsSocket), owner) // a successor takes the listeners over
	g.add("mworker-max-reloads %d", maxOldWorkers)
	g.add("stats timeout 1m")
	g.add("log stdout len 8192 format raw local0 info")
	g.add("hard-stop-after %s", ms(o.HardStopAfter))
	// Both are needed to switch resumption off: a resumed session is not verified again.
	g.add("tune.ssl.cachesize 0")
	g.add("tune.ssl.default-dh-param 2048")
	g.because("mesh entry")
	tlsOf(g, "bind", in)
	tlsOf(g, "server", out)
	g.because("")
	// Sizes as Envoy under Consul has them: 60 KiB of headers in a few hundred lines, and room
	// for our own. They are the same in every proxy: a request that is too large for the next
	// proxy would end the other requests on the same connection of HTTP/2.
	g.add("tune.bufsize 73728").add("tune.maxrewrite 8192").add("tune.http.maxhdr 256")
	if o.BufferCache { // as many of them as of HAProxy's own size, or each request costs a tenth more
		g.add("tune.memory.hot-size 2359296")
	}
	g.add("httpclient.ssl.verify none") // unused; spares loading the system's CAs
	return g.add("lua-load-per-thread %s", o.path(lua.SpiffeFile))
}

func defaults() *builder {
	return section(Defaults, allDefaults).
		add("mode tcp").
		add("log global").
		add("option dontlognull").
		add("option clitcpka").
		add("option srvtcpka").
		add("option redispatch 1").
		add("timeout http-request 30s").
		add("timeout connect 5s").
		add("timeout client 1h"). // also for a client that has sent everything and waits for the answer
		add("timeout queue 5s").
		add("timeout server 1h").
		add("timeout tunnel 1h").
		add("timeout http-keep-alive 5m").
		add("retries 3")
}

// owned is the suffix of a bind line on a socket that only the worker may use.
func (o *Options) owned() string {
	if o.User != "" {
		return " mode 600 user " + o.User
	}
	return " mode 600"
}

func (o *Options) admin() *builder {
	return section(Frontend, adminFrontend).
		add("mode http").
		add("bind unix@%s%s", o.path(AdminSocket), o.owned()).
		add("no log").
		add("stats enable").
		add("stats show-legends").
		add("stats uri /stats").
		add("http-request use-service prometheus-exporter if { path /metrics }")
}

func (o *Options) authz() *builder {
	mode := "tcp"
	if o.SPOP {
		mode = "spop"
	}
	return section(Backend, authzBackend).
		add("mode %s", mode).
		add("timeout connect 1s").
		add("timeout server 24h").
		add("server agent unix@%s", o.path(AuthzSocket))
}
