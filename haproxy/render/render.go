package render

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-multierror"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// Renderer keeps the sections of upstreams that have not changed since the last
// call; the result is the same as without it.
type Renderer struct {
	opt        Options
	cache      map[*connect.Upstream]*cached
	made       map[string]*Section // sections by what went into them
	connectors map[connectorKey][]*Section
	book       *ledger // of last
	last       *Config // nil: none that the book and the cache go with
}

type connectorKey struct {
	class string
	size  int
}

// cached is what one upstream became.
type cached struct {
	front, back *Section // back without its servers
	what, lines string   // what these were made of
	values      []string // of its endpoints' slots
	slots       []int    // as assigned when full was made
	full        *Section // back with its servers
	verified    string   // Config.Verified when full was made
}

// New makes a renderer for one run directory.
func New(o Options) (*Renderer, error) {
	if _, err := word("run directory", o.Dir); err != nil {
		return nil, err
	}
	if len(o.Dir) > 64 {
		return nil, fmt.Errorf("run directory %q: at most 64 characters, or the sockets in it would not fit (-run-dir)", o.Dir)
	}
	if o.Threads == 0 {
		o.Threads = 2
	}
	if o.MaxConn == 0 {
		o.MaxConn = 4096
	}
	if o.Originator == "" {
		o.Originator = Lua
	}
	if o.HardStopAfter == 0 {
		o.HardStopAfter = 30 * time.Minute
	}
	return &Renderer{opt: o, cache: map[*connect.Upstream]*cached{}, connectors: map[connectorKey][]*Section{}}, nil
}

// Refused is an upstream that cannot be rendered: it is left out, the others stay.
type Refused struct {
	Upstream string // "" when it is the service's own side
	Err      error
}

func (r *Refused) Error() string {
	if r.Upstream == "" {
		return fmt.Sprintf("a part of the registration is left out: %v", r.Err)
	}
	return fmt.Sprintf("upstream %.80q is left out: %v", r.Upstream, r.Err)
}
func (r *Refused) Unwrap() error { return r.Err }

// Render makes the configuration for a snapshot. prev, if any, keeps the slots of
// endpoints that stay. The refusals are upstreams that were left out; err means
// that nothing can be rendered.
func (r *Renderer) Render(s *connect.Snapshot, generation string, prev *Config) (c *Config, refused []*Refused, err error) {
	if s.Leaf == nil || s.Roots == nil {
		return nil, nil, errors.New("no leaf or no roots")
	}
	o := &r.opt
	if o.access != s.Inbound.AccessLog {
		o.access, r.cache, r.last = s.Inbound.AccessLog, nil, nil // every listener is another
	}
	c = &Config{Leaf: s.Leaf, Roots: s.Roots, Dir: o.Dir, Generation: generation, Files: map[string]string{}, Slots: map[string]*SlotTable{}}
	c.Files[lua.SpiffeFile] = lua.Spiffe
	if o.LosesAnswers {
		c.Files[lua.DenyFile] = lua.Deny
	}
	c.Files[LeafList] = o.path(LeafFile) + " dummy.invalid\n" // haproxy.md, fact 3: a name filter, or 2.6 forgets client verification
	c.Files[PolicyMap] = PolicyKey + " " + generation + "\n"

	keep := map[string]*Section{}
	wrong := &multierror.Error{ErrorFormat: oneLine} // everything at once, not the first alone
	add := func(b *builder, comment string, e error) {
		if e == nil {
			var sec *Section
			if sec, e = r.build(b, comment, keep); e == nil {
				c.Sections = append(c.Sections, sec)
				return
			}
		}
		wrong = multierror.Append(wrong, e)
	}
	for _, g := range o.global(&s.Inbound) {
		add(g.builder, g.what, nil)
	}
	connections := len(c.Sections) // known when the sockets are
	c.Sections = append(c.Sections, nil)
	add(o.defaults(), "defaults of every proxy below", nil)
	add(section("defaults", httpDefaults+" from "+allDefaults).add("option abortonclose"), "what is asked of an application ends with who asked", nil)
	add(o.admin(), "statistics and metrics, for haproxy-connect alone", nil)
	if s.Inbound.Port != 0 {
		c.Files[SPOEFile] = o.spoe(&s.Inbound)
		add(o.authz(), "the agent that knows the intentions", nil)
		limits := o.share(len(s.Upstreams))
		ours := ourHeaders(&s.Inbound, s.Policy)
		b, e := o.public(s, limits)
		add(b, "callers: mutual TLS, judged per connection and policy, per request where an intention has permissions", e)
		for _, b := range o.permissive(&s.Inbound, limits) {
			add(b, "WARNING: permissive mutual TLS, plain connections are let in without intentions", nil)
		}
		if s.Inbound.UnsecuredPort != 0 {
			add(o.unsecured(&s.Inbound, ours, limits), "WARNING: unsecured_bind_port, no TLS and no intentions", nil)
		}
		b, e = o.local(&s.Inbound)
		add(b, "the application", e)
		for _, group := range exposeGroups(s.Inbound.Expose) {
			list, e := o.expose(&s.Inbound, group, ours, limits)
			if e != nil {
				wrong = multierror.Append(wrong, e)
			}
			for _, b := range list {
				add(b, "WARNING: exposed paths, no TLS and no intentions", nil)
			}
		}
	}
	if wrong.Len() > 0 {
		return nil, nil, wrong
	}

	if prev != nil {
		c.Verified = prev.Verified
		if prev.Roots != nil && !s.Roots.Includes(prev.Roots) {
			c.Verified = s.Roots.Fingerprint
		}
	}
	// Upstreams: one that cannot be rendered must not take the others down. What was
	// rendered last is only worth something beside the Config it went into.
	book, known := r.book, r.cache
	if prev == nil || prev != r.last {
		book, known = newLedger(prev), nil
	}
	r.last = nil // until all of this is through
	var byName map[string]*cached
	before := func(name string) *cached {
		if byName == nil {
			byName = make(map[string]*cached, len(r.cache))
			for u, c := range r.cache {
				byName[u.Name] = c
			}
		}
		return byName[name]
	}
	next := make(map[*connect.Upstream]*cached, len(s.Upstreams))
	for _, u := range s.Upstreams {
		hit := r.cache[u]
		if hit == nil {
			var e error
			if hit, e = o.upstream(u, before(u.Name)); e != nil {
				refused = append(refused, &Refused{Upstream: u.Name, Err: e})
				continue
			}
			if hit.back.class != "" {
				for i := range u.Target.Endpoints {
					hit.values = append(hit.values, slotValue(&u.Target, &u.Target.Endpoints[i]))
				}
			}
		}
		if class := hit.back.class; class != "" && known[u] == nil {
			book.want(class, hit.values)
		}
		next[u] = hit
	}
	for u, old := range known {
		if next[u] == nil && old.back.class != "" {
			book.drop(old.back.class, old.values)
		}
	}
	book.assign(o.Files / 2)
	whole := true
	for _, u := range s.Upstreams {
		hit := next[u]
		if hit == nil {
			continue
		}
		if hit.full == nil || known[u] == nil || hit.verified != c.Verified {
			ids := book.of(hit.back.class, hit.values)
			if hit.full == nil || hit.verified != c.Verified || !slices.Equal(ids, hit.slots) {
				full, e := o.servers(u, hit.back, ids, c.Verified)
				if e != nil {
					refused = append(refused, &Refused{Upstream: u.Name, Err: e})
					delete(next, u)
					whole = false // the book counts it, the cache does not
					continue
				}
				hit.full, hit.slots, hit.verified = full, ids, c.Verified
			}
		}
		c.Sections = append(c.Sections, hit.front, hit.full)
	}
	c.Slots = book.published()
	if c.Sections[connections], err = r.build(section("global", "").add("maxconn %d", o.connections(c.Slots, len(s.Upstreams))), "what the limit of open files leaves beside the sockets", keep); err != nil {
		return nil, nil, err
	}
	connectors := map[connectorKey][]*Section{}
	for _, class := range slices.Sorted(maps.Keys(c.Slots)) {
		t := c.Slots[class]
		if o.Originator == Go {
			continue // the dialer listens on the slots
		}
		if file := SlotMapFile(class); prev != nil && prev.Slots[class] == t && prev.Files[file] != "" {
			c.Files[file] = prev.Files[file]
		} else {
			c.Files[file] = t.SlotMap()
		}
		k := connectorKey{class, t.Size}
		if connectors[k] = r.connectors[k]; connectors[k] == nil {
			if connectors[k], err = o.connector(t); err != nil {
				return nil, nil, err
			}
		}
		c.Sections = append(c.Sections, connectors[k]...)
	}
	r.cache, r.made, r.connectors, r.book = next, keep, connectors, book
	if whole {
		r.last = c
	}
	return c, refused, nil
}

// oneLine keeps a list of errors on one line of the log.
func oneLine(errs []error) string {
	text := make([]string, len(errs))
	for i, e := range errs {
		text[i] = e.Error()
	}
	return strings.Join(text, "; ")
}

// build makes a section, or finds the one made of the same lines last time.
func (r *Renderer) build(b *builder, comment string, keep map[string]*Section) (*Section, error) {
	key := comment + "\x00" + b.kind + "\x00" + b.name + "\x00" + strings.Join(b.lines, "\x00")
	if sec := r.made[key]; sec != nil && b.err == nil {
		keep[key] = sec
		return sec, nil
	}
	sec, err := b.build(comment)
	if err == nil {
		keep[key] = sec
	}
	return sec, err
}

func (o *Options) path(p string) string { return o.Dir + "/" + p }

type globalSection struct {
	*builder
	what string
}

// connections is how many there may be at once. One of an HTTP upstream holds four
// descriptors, both ends of the caller's and of the connector's, and each listener one.
func (o *Options) connections(slots map[string]*SlotTable, upstreams int) int {
	if o.Files == 0 {
		return o.MaxConn
	}
	taken := 300 + (upstreams+255)/256*256 // in steps: one upstream more is no other limit
	for _, t := range slots {
		taken += t.Size
	}
	return max(50, min(o.MaxConn, (o.Files-taken)/5))
}

// share is what the inbound listeners divide: the connections that there may be beside
// the fewest sockets. It does not follow the sockets, whose number changes more often.
func (o *Options) share(upstreams int) int { return o.connections(nil, upstreams) }

// maxOldWorkers caps replaced workers that still have sessions: each keeps its whole
// memory. The oldest is ended when there would be more.
const maxOldWorkers = 20

func (o *Options) global(in *connect.Inbound) []globalSection {
	var out []globalSection
	if o.LuaBool {
		// Must come before lua-load, and the parser moves what it does not know to the end.
		out = append(out, globalSection{section("global", "").add("tune.lua.bool-sample-conversion normal"), "for the Lua filter below"})
	}
	out = append(out, globalSection{section("global", "").add("expose-experimental-directives"), "for normalize-uri, which HAProxy still calls experimental"})
	g := section("global", "")
	if o.User != "" {
		g.word("user", "user", o.User)
	}
	if o.Group != "" {
		g.word("group", "group", o.Group)
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
	g.add("ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets")
	g.add("ssl-default-server-options ssl-min-ver TLSv1.2 no-tls-tickets")
	// As Envoy under Consul takes them: 60 KiB of headers and a few hundred lines, and room
	// for our own. It is the same in every proxy: one that sends more than the next one
	// takes would lose the requests beside it on the same connection of HTTP/2.
	g.add("tune.bufsize 73728").add("tune.maxrewrite 8192").add("tune.http.maxhdr 256")
	if o.BufferCache { // as many of them as of HAProxy's own size, or each request costs a tenth more
		g.add("tune.memory.hot-size 2359296")
	}
	g.add("httpclient.ssl.verify none") // unused; spares loading the system's CAs
	g.add("lua-load-per-thread %s", o.path(lua.SpiffeFile))
	if o.LosesAnswers { // the parser takes one such line in a section
		out = append(out, globalSection{section("global", "").add("lua-load-per-thread %s", o.path(lua.DenyFile)), "denials that callers hear while they still send"})
	}
	return append(out, globalSection{g, "the process"})
}

// Names of defaults sections. HAProxy 2.6 heeds abortonclose only where a frontend
// inherits it, and it must not be where TCP connections may be half closed.
const allDefaults, httpDefaults = "mesh", "mesh_http"

func (o *Options) defaults() *builder {
	return section("defaults", allDefaults).
		add("mode tcp").
		add("log global").
		add("option dontlognull").
		add("option clitcpka").
		add("option srvtcpka").
		add("option redispatch 1").
		add("timeout http-request 30s").
		add("timeout connect 5s").
		add("timeout client 1h"). // also of one who has said all it has to say and waits for the answer
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
	return section("frontend", "admin").
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
	return section("backend", "authz").
		add("mode %s", mode).
		add("timeout connect 1s").
		add("timeout server 24h").
		add("server agent unix@%s", o.path(AuthzSocket))
}

// forwardsCert reports whether the application is told the caller's certificate: as
// in Consul, not with grpc.
func forwardsCert(in *connect.Inbound) bool {
	return in.Protocol.IsHTTP() && in.Protocol != connect.GRPC && !in.SanitizeXFCC
}

// spoe is the configuration of the filter: what is asked, and when.
func (o *Options) spoe(in *connect.Inbound) string {
	chain := ""
	if forwardsCert(in) {
		chain = " " + spoe.ArgChain + "=var(txn.chain)"
	}
	return `# What HAProxy asks the authorization agent.
[hc]
spoe-agent hc
    groups ` + spoe.MessageConnection + ` ` + spoe.MessageRequest + `
    option var-prefix hc
    option set-on-error error
    timeout hello 2s
    timeout idle 1h
    timeout processing 1s
    use-backend authz

spoe-message ` + spoe.MessageConnection + `
    args ` + spoe.ArgCert + `=ssl_c_der ` + spoe.ArgSource + `=src ` + spoe.ArgPort + `=src_port ` + spoe.ArgDestination + `=dst ` + spoe.ArgDestinationPort + `=dst_port ` +
		spoe.ArgServerName + `=ssl_fc_sni` + chain + `

spoe-message ` + spoe.MessageRequest + `
    args ` + spoe.ArgCert + `=ssl_c_der ` + spoe.ArgMethod + `=method ` + spoe.ArgPath + `=path ` + spoe.ArgQuery + `=query ` + spoe.ArgHeaders + `=req.hdrs_bin

spoe-group ` + spoe.MessageConnection + `
    messages ` + spoe.MessageConnection + `

spoe-group ` + spoe.MessageRequest + `
    messages ` + spoe.MessageRequest + `
`
}

const sess, txn = "sess.hc.", "txn.hc."

// public is the listener that the mesh calls.
func (o *Options) public(s *connect.Snapshot, limits int) (*builder, error) {
	in := &s.Inbound
	b := section("frontend", "public")
	http := in.Protocol.IsHTTP()
	if http {
		b.http().add("option idle-close-on-response")
	} else {
		b.add("mode tcp")
	}
	alpn := ""
	switch {
	case in.Protocol.IsHTTP2():
		alpn = " alpn h2,http/1.1"
	case in.Protocol.IsHTTP():
		alpn = " alpn http/1.1"
	}
	listen, err := word("bind address", net.JoinHostPort(in.Address, strconv.Itoa(in.Port)))
	if err != nil {
		return nil, err
	}
	if in.PermissivePort != 0 { // another listener has it, which tells TLS from the rest
		listen = "unix@" + o.path(PublicSocket) + o.owned() + " accept-proxy"
	}
	b.add("bind %s ssl crt-list %s ca-file %s verify required%s", listen, o.path(LeafList), o.path(RootsFile), alpn)
	b.add("timeout client %s", ms(in.LocalIdleTimeout))
	if o.HelloTimeout { // or whoever connects and says nothing would stay for the time above
		b.add("timeout client-hs 10s")
	}
	// Callers who are not known yet may not take what the application's own calls need.
	b.add("maxconn %d", max(limits/2, 1))
	if in.MaxConnections > 0 {
		b.add("tcp-request connection reject if { fe_conn gt %d }", in.MaxConnections)
	}
	b.add("filter spoe engine hc config %s", o.path(SPOEFile))
	o.log(b, in.Protocol.IsHTTP())
	b.add("default_backend local_app")

	if !http {
		b.add("tcp-request inspect-delay 5s")
		b.add("tcp-request content send-spoe-group hc %s", spoe.MessageConnection)
		b.add("tcp-request content reject unless { var(%s%s) -m str %s }", sess, spoe.VarVerdict, spoe.Allow)
		return b, nil
	}

	says(b, "before the application", "the application closed the connection without an answer", "the application refuses connections", "the application did not answer in time")
	requests(b)
	normalize(b, in.Normalize)

	// A verdict is kept per connection and asked again when the policy's generation
	// has moved. It is forgotten before it is asked, so that an agent that does not
	// answer leaves none; then it is copied, as another stream of the connection may
	// be asking while this one waits.
	fresh := fmt.Sprintf("{ var(%s%s),strcmp(txn.policy) eq 0 }", sess, spoe.VarGeneration)
	b.add("http-request set-var(txn.policy) str(%s),map_str(%s)", PolicyKey, o.path(PolicyMap))
	b.add("http-request set-var(txn.stale) bool(true) unless %s", fresh)
	b.add("http-request unset-var(%s%s) if { var(txn.stale) -m bool }", sess, spoe.VarVerdict)
	b.add("http-request unset-var(%s%s) if { var(txn.stale) -m bool }", sess, spoe.VarGeneration)
	if forwardsCert(in) { // a longer chain is not forwarded: the question must fit into a frame
		b.add("http-request set-var(txn.chain) ssl_c_chain_der if { var(txn.stale) -m bool } { ssl_c_chain_der,length le %d }", maxChain)
	}
	b.add("http-request send-spoe-group hc %s if { var(txn.stale) -m bool }", spoe.MessageConnection)
	b.add("http-request set-var(txn.verdict) var(%s%s)", sess, spoe.VarVerdict)
	// Who asked for another service gets no answer that could be taken for that one's.
	b.add("http-request reject if { var(%s%s) -m str %s }", sess, spoe.VarRule, intentions.ServerNameRule)
	for _, p := range s.Policy.Providers() {
		if p.ForwardTo != "" { // only we may say what a token says
			b.add("http-request del-header %s", p.ForwardTo)
		}
	}
	ask := fmt.Sprintf("{ var(txn.verdict) -m str %s }", spoe.Ask)
	b.add("http-request send-spoe-group hc %s if %s", spoe.MessageRequest, ask)
	if o.logs() || o.ExplainDenials {
		b.add("http-request set-var(txn.rule) var(%s%s)", sess, spoe.VarRule)
		b.add("http-request set-var(txn.reason) var(%s%s)", sess, spoe.VarReason)
		b.add("http-request set-var(txn.rule) var(%s%s) if %s", txn, spoe.VarRequestRule, ask)
		b.add("http-request set-var(txn.reason) var(%s%s) if %s", txn, spoe.VarRequestReason, ask)
	}
	b.add("http-request set-var(txn.verdict) var(%s%s) if %s", txn, spoe.VarRequestVerdict, ask)
	explain := ""
	if o.ExplainDenials {
		explain = " hdr X-Denied-Reason %[var(txn.reason)]"
	}
	if o.LosesAnswers {
		if o.ExplainDenials {
			b.add("http-request set-var(txn.explain) bool(true)")
		}
		b.add("http-request use-service %s if !{ var(txn.verdict) -m str %s } { req.ver 1.0 1.1 } !METH_GET !METH_HEAD", lua.DenyService, spoe.Allow)
	}
	b.add(`http-request return status 403 content-type text/plain string "RBAC: access denied"%s unless { var(txn.verdict) -m str %s }`, explain, spoe.Allow)
	for _, p := range s.Policy.Providers() {
		if err := b.token(p); err != nil {
			return nil, err
		}
	}
	own := s.Proxy.SPIFFEID().String()
	if _, err := word("own identity", own); err != nil {
		return nil, err
	}
	const header = "X-Forwarded-Client-Cert"
	if forwardsCert(in) {
		// What one earlier hop said is kept before what is known here; more than one
		// line of it no proxy of the mesh sends.
		element := fmt.Sprintf("By=%s;%%[var(%s%s)]", own, sess, spoe.VarXFCC)
		// An open quote in it would make ours a part of theirs.
		b.add("http-request set-var(txn.xfcc) req.fhdr(%s) if { req.fhdr_cnt(%s) eq 1 } { req.fhdr(%s) -m reg -- %s }", header, header, header, closedQuotes)
		spellings(b, ourHeaders(in, s.Policy))
		b.add("http-request set-header %s %s", header, element)
		b.add("http-request set-header %s %%[var(txn.xfcc)],%%[req.fhdr(%s)] if { var(txn.xfcc) -m found }", header, header)
	} else {
		b.add("http-request del-header %s", header)
		spellings(b, ourHeaders(in, s.Policy))
	}
	// While we stop, an answer closes its connection: the caller goes elsewhere.
	b.add("http-after-response set-header Connection close if { str(%s),map_str(%s) -m found }", DrainingKey, o.path(PolicyMap))
	if o.MaxAge > 0 {
		b.add("tcp-request session set-var(sess.born) date()")
		b.add("http-after-response set-header Connection close if { date(),sub(sess.born) ge %d }", int(o.MaxAge.Seconds()))
	}
	// Always set, never added: a caller cannot forge who called.
	if in.CallerHeader != "" {
		b.add("http-request set-header %s %%[var(%s%s)]", in.CallerHeader, sess, spoe.VarService)
	}
	return b, nil
}

// token forwards what the verified token of a provider says, and takes the token away
// where its location says so.
func (b *builder) token(p *intentions.Provider) error {
	verified := fmt.Sprintf("{ var(%s%s) -m found }", txn, p.Variable())
	if p.ForwardTo != "" {
		if _, err := word("forwarding.header_name", p.ForwardTo); err != nil {
			return err
		}
		b.add("http-request set-header %s %%[var(%s%s)] if %s", p.ForwardTo, txn, p.Variable(), verified)
	}
	for _, l := range p.Locations {
		if l.Header != "" && !l.Keep {
			if _, err := word("locations.header.name", l.Header); err != nil {
				return err
			}
			b.add("http-request del-header %s if %s", l.Header, verified)
		}
	}
	return nil
}

// maxChain is how many bytes of certificates X-Forwarded-Client-Cert is made of at most.
const maxChain = 5000

const (
	// closedQuotes is text in which every quote has its end: quoted parts may have escapes.
	closedQuotes = `'^[^"\\]*("[^"\\]*(\\.[^"\\]*)*"[^"\\]*)*$'`
	// notAnEscape is a percent sign without two hexadecimal digits.
	notAnEscape = `'%(?![0-9A-Fa-f]{2})'`
)

// requests refuses at every door to the application what would pass the rules behind it:
// a tunnel, of which CONNECT makes one and an upgrade to anything but WebSocket; a path
// that no rule can name; a method that is another to the application than to a rule. It
// takes away Connection, with which a caller could have our own headers dropped.
func requests(b *builder) {
	b.add("http-request return status 405 if METH_CONNECT")
	b.add("http-request return status 400 if { method -m reg -- [a-z] }")
	b.add("http-request return status 400 unless { path -m beg -- / } or METH_OPTIONS { url -m str -- * }")
	b.add("http-request set-var(txn.websocket) bool(true) if { req.fhdr_cnt(Upgrade) eq 1 } { req.fhdr(Upgrade) -i -m str -- websocket }")
	b.add("http-request del-header Upgrade unless { var(txn.websocket) -m bool }")
	b.add("http-request del-header HTTP2-Settings")
	b.add("http-request del-header Connection unless { var(txn.websocket) -m bool }")
	b.add("http-request set-header Connection Upgrade if { var(txn.websocket) -m bool }")
	// An application that switches all the same would open a tunnel all the same.
	b.add("http-response return status 502 if { status 101 } !{ var(txn.websocket) -m bool }")
}

// ourHeaders are those by which only we tell the application who called.
func ourHeaders(in *connect.Inbound, p *intentions.Policy) []string {
	out := []string{"X-Forwarded-Client-Cert"}
	if in.CallerHeader != "" {
		out = append(out, in.CallerHeader)
	}
	for _, one := range p.Providers() {
		if one.ForwardTo != "" {
			out = append(out, one.ForwardTo)
		}
	}
	return out
}

// spellings removes headers with an underscore that CGI and WSGI read as one of ours.
func spellings(b *builder, names []string) {
	part := make([]string, len(names))
	for i, name := range names {
		if _, err := word("header", name); err != nil && b.err == nil {
			b.err = err
		}
		part[i] = strings.ReplaceAll(regexp.QuoteMeta(strings.ToLower(name)), "-", "[-_]")
	}
	b.add("http-request del-header '^(%s)$' -m reg if { req.hdr_names -m sub -- _ }", strings.Join(part, "|"))
}

// noCaller removes our headers where there is no caller to tell of.
func noCaller(b *builder, names []string) {
	for _, name := range names {
		b.add("http-request del-header %s", name)
	}
	spellings(b, names)
}

// normalize brings a request into the one form that intentions are matched against
// and the application receives, or refuses it: otherwise /a/../secret would not be
// /secret to a rule that names it. The order is Envoy's: backslashes and escaped
// slashes, then unreserved characters, then dot segments, then slashes.
func normalize(b *builder, n connect.Normalize) {
	const escaped = "{ path -i -m reg -- %2f|%5c }"
	if !n.KeepPath || n.EscapedSlashes != "" {
		// What is no escape would become one when its neighbour is decoded: %7%33.
		b.add("http-request return status 400 if { path -m reg -- %s }", notAnEscape)
	}
	switch n.Underscores {
	case connect.UnderscoresReject:
		b.add("http-request return status 400 if { req.hdr_names -m sub -- _ }")
	case connect.UnderscoresDrop:
		b.add("http-request del-header _ -m sub")
	}
	switch n.EscapedSlashes {
	case connect.SlashesReject:
		b.add("http-request return status 400 if %s", escaped)
	case connect.SlashesRedirect:
		// Of slashes at its beginning one stays: two would be another host.
		b.add(`http-request redirect location "%%[path,regsub(%%2f,/,gi),regsub(%%5c,/,gi),regsub(^[/]+,/)]" code 307 if %s !{ query -m found }`, escaped)
		b.add(`http-request redirect location "%%[path,regsub(%%2f,/,gi),regsub(%%5c,/,gi),regsub(^[/]+,/)]?%%[query]" code 307 if %s`, escaped)
	case connect.SlashesForward:
		b.add(`http-request set-path "%%[path,regsub(%%2f,/,gi),regsub(%%5c,/,gi)]" if %s`, escaped)
	}
	if !n.KeepPath {
		b.add("%s", `http-request set-path "%[path,regsub(\\x5c,/,g)]" if { path -m reg -- \\x5c }`)
		// The query is put aside meanwhile: it is the application's, as it came.
		b.add("%s", "http-request set-var(txn.query) pathq,regsub(^[^?]*,) if { path -m sub -- % }")
		b.add("%s", "http-request set-pathq %[path] if { var(txn.query) -m found }")
		b.add("http-request normalize-uri percent-decode-unreserved strict if { var(txn.query) -m found }")
		b.add("%s", "http-request set-pathq %[path]%[var(txn.query)] if { var(txn.query) -m found }")
		b.add("http-request normalize-uri path-strip-dot")
		b.add("http-request normalize-uri path-strip-dotdot full")
	}
	if n.MergeSlashes {
		b.add("http-request normalize-uri path-merge-slashes")
	}
}

// log sets the access log of a frontend.
func (o *Options) log(b *builder, http bool) {
	var f accessFormat
	switch {
	case o.AccessLog == LogText:
		at, shape := "sess.hc", "%ci:%cp %ft %b/%s %B %Tt %ts "
		if http { // judged per request in effect
			at, shape = "txn", "%ci:%cp %ft %b/%s %ST %B %Ta %tsc %{+Q}r "
		}
		f.line = AccessMark + shape + `source=%[var(sess.hc.source)] verdict=%[var(` + at + `.verdict)] rule=%[var(` + at + `.rule)] reason=%{+Q}[var(` + at + `.reason)]`
	case o.AccessLog == LogJSON:
		f = access(connect.AccessLog{}, http)
	case o.AccessLog == "" && o.access.Enabled:
		f = access(o.access, http)
	default:
		b.add("no log")
		return
	}
	for _, rule := range f.before {
		b.add("%s", rule)
	}
	b.add("%s", `log-format "`+f.line+`"`)
}

// logs reports whether there is an access log.
func (o *Options) logs() bool {
	return o.AccessLog == LogText || o.AccessLog == LogJSON || o.AccessLog == "" && o.access.Enabled
}

// permissive is the listener before the public one that lets in plain TCP to the
// application's own port (before it was redirected here), for services that are on
// their way into the mesh.
func (o *Options) permissive(in *connect.Inbound, limits int) []*builder {
	if in.PermissivePort == 0 {
		return nil
	}
	front := section("frontend", "permissive").add("mode tcp").
		add("bind %s", net.JoinHostPort(in.Address, strconv.Itoa(in.Port))).
		add("maxconn %d", max(limits/2, 1)).
		add("timeout client %s", ms(in.LocalIdleTimeout))
	o.log(front, false)
	const hello = "{ req.ssl_hello_type 1 }"
	front.add("tcp-request inspect-delay 5s"). // a client that waits for the server to speak first
							add("tcp-request content accept if %s", hello).
							add("tcp-request content reject unless { dst_port eq %d }", in.PermissivePort).
							add("use_backend permissive_tls if %s", hello).
							add("default_backend permissive_app")
	tls := section("backend", "permissive_tls").add("mode tcp").add("timeout server %s", ms(in.LocalIdleTimeout)).
		add("timeout tunnel %s", ms(in.LocalIdleTimeout)).
		add("server public unix@%s send-proxy-v2", o.path(PublicSocket))
	app := section("backend", "permissive_app").add("mode tcp").add("timeout connect %s", ms(in.LocalConnectTimeout)).
		add("timeout server %s", ms(in.LocalIdleTimeout)).
		add("timeout tunnel %s", ms(in.LocalIdleTimeout)).
		word("server app", "local application's address", net.JoinHostPort(in.Local.Address, strconv.Itoa(in.Local.Port)))
	return []*builder{front, tls, app}
}

// unsecured is the 2018 demo's plain listener: never a mesh caller.
func (o *Options) unsecured(in *connect.Inbound, ours []string, limits int) *builder {
	b := section("frontend", "unsecured")
	if in.Protocol.IsHTTP() {
		b.http()
	} else {
		b.add("mode tcp")
	}
	b.add("bind %s", net.JoinHostPort("0.0.0.0", strconv.Itoa(in.UnsecuredPort)))
	b.add("maxconn %d", max(limits/8, 1))
	o.log(b, in.Protocol.IsHTTP())
	if in.Protocol.IsHTTP() {
		requests(b)
		noCaller(b, ours)
	}
	return b.add("default_backend local_app")
}

func (o *Options) local(in *connect.Inbound) (*builder, error) {
	b := section("backend", "local_app")
	proto := ""
	if in.Protocol.IsHTTP() {
		b.http().add("http-reuse safe")
		if in.ForwardFor {
			b.add("option forwardfor")
		}
		if o.DropTrailers && !in.Protocol.IsHTTP2() { // CGI and WSGI may read them as headers
			b.add("option http-drop-request-trailers")
		}
		if in.Protocol.IsHTTP2() {
			proto = " proto h2"
		}
		b.add("timeout server %s", ms(in.LocalRequestTimeout))
		o.uploads(b, in.LocalRequestTimeout)
	} else {
		b.add("mode tcp").add("timeout server %s", ms(in.LocalIdleTimeout))
		b.add("timeout tunnel %s", ms(in.LocalIdleTimeout)) // it counts once both sides are connected
	}
	b.add("timeout connect %s", ms(in.LocalConnectTimeout))
	addr := "unix@" + in.Local.SocketPath
	if in.Local.SocketPath == "" {
		addr = net.JoinHostPort(in.Local.Address, strconv.Itoa(in.Local.Port))
	}
	if _, err := word("local application's address", addr); err != nil {
		return nil, err
	}
	limit := ""
	if in.MaxConnections > 0 {
		limit = fmt.Sprintf(" maxconn %d", in.MaxConnections)
	}
	return b.add("server app %s%s%s", addr, proto, limit), nil
}

func exposeGroups(paths []connect.ExposePath) [][]connect.ExposePath {
	var out [][]connect.ExposePath
	for i, p := range paths {
		if i > 0 && paths[i-1].ListenPort == p.ListenPort {
			out[len(out)-1] = append(out[len(out)-1], p)
			continue
		}
		out = append(out, []connect.ExposePath{p})
	}
	return out
}

// expose opens exact paths of the application without mutual TLS.
func (o *Options) expose(in *connect.Inbound, group []connect.ExposePath, ours []string, limits int) ([]*builder, error) {
	port := group[0].ListenPort
	front := section("frontend", fmt.Sprintf("expose_%d", port)).http().
		add("bind %s", net.JoinHostPort(in.Address, strconv.Itoa(port))).
		add("maxconn %d", max(limits/8, 1))
	o.log(front, true)
	requests(front)
	noCaller(front, ours)
	list := []*builder{front}
	known := ""
	for i, p := range group {
		path, err := word("exposed path", p.Path)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("expose_%d_%d_app", port, i)
		known += " " + path
		front.add("use_backend %s if { path -m str -- %s }", name, path)
		proto := ""
		if p.Protocol == connect.HTTP2 {
			proto = " proto h2"
		}
		list = append(list, section("backend", name).http().add("timeout connect %s", ms(in.LocalConnectTimeout)).
			add("server app %s%s", net.JoinHostPort(in.Local.Address, strconv.Itoa(p.LocalPort)), proto))
	}
	front.add("http-request return status 404 unless { path -m str --%s }", known)
	return list, nil
}

// upstream makes the listener and the backend of one upstream, without servers.
// before, if not nil, is what the upstream was: often only endpoints have changed.
func (o *Options) upstream(u *connect.Upstream, before *cached) (made *cached, err error) {
	for _, n := range []struct{ what, text string }{{"upstream name", u.Name}, {"target name", u.Target.Name}} {
		if _, err := word(n.what, n.text); err != nil {
			return nil, err
		}
	}
	for _, id := range u.Target.IDs {
		if _, err := certs.ParseID(id.String()); err != nil {
			return nil, fmt.Errorf("expected identity: %w", err)
		}
	}
	http := u.Protocol.IsHTTP()
	f, b := section("frontend", "up_"+u.Name), section("backend", u.Target.Name)
	if http {
		f.http()
		b.http()
	} else {
		f.add("mode tcp")
		b.add("mode tcp").add("timeout tunnel %s", ms(u.IdleTimeout))
	}
	if p := u.Listen.SocketPath; p != "" {
		f.word("bind", "socket path", "unix@"+p)
		f.lines[len(f.lines)-1] += " mode " + u.Listen.SocketMode
	} else {
		f.word("bind", "listener", net.JoinHostPort(u.Listen.Address, strconv.Itoa(u.Listen.Port)))
	}
	o.log(f, http)
	b.add("timeout connect %s", ms(u.ConnectTimeout)).add("timeout server %s", ms(u.IdleTimeout))
	// HTTP: the client may be idle longer than a request may take.
	idle := u.IdleTimeout
	if http {
		idle = max(idle, 5*time.Minute)
	}
	f.add("timeout client %s", ms(max(idle, 5*u.ConnectTimeout)))
	limit(f, u, http)
	slots := ""
	if http {
		f.add("option idle-close-on-response") // or a reload would cut idle keep-alives under a request
		f.add("http-request del-header X-Forwarded-Client-Cert")
		says(f, "calling "+u.Name, "no endpoint answered", "no healthy endpoint", "the endpoint did not answer in time")
		// Nothing of an endpoint was heard: to callers that is Envoy's 503.
		f.add("http-response set-var(txn.answered) bool(true)")
		f.add("http-after-response set-status 503 if { status 502 } !{ var(txn.answered) -m bool }")
		b.add("timeout queue %s", ms(min(u.IdleTimeout, defaultQueue)))
		b.add("balance roundrobin").add("http-reuse always")
		b.add("retry-on conn-failure empty-response")
		// A request that may not be repeated is not: the server may have begun it.
		b.add("http-request disable-l7-retry unless METH_GET || METH_HEAD || METH_OPTIONS || { method PUT DELETE TRACE }")
		slots = class(u)
		o.uploads(b, u.IdleTimeout)
	} else {
		if o.logs() { // also of a client that waits for the server to speak first
			f.add("no option dontlognull")
		}
		b.add("balance roundrobin")
		if o.Originator == Lua {
			guard(b, idList(u.Target.IDs))
		} else {
			slots = class(u)
		}
	}
	f.add("default_backend %s", u.Target.Name)
	what := fmt.Sprintf("upstream %s: %s", u.Name, u.Protocol)
	lines := strings.Join(f.lines, "\n") + "\n\n" + strings.Join(b.lines, "\n")
	if u.Passive != nil { // of the section, not of its text
		lines += fmt.Sprintf("\n\n%+v %d", *u.Passive, or(u.Passive.MaxEjected, -1))
	}
	if f.err == nil && b.err == nil && before != nil && before.lines == lines && before.what == what {
		return &cached{front: before.front, back: before.back, lines: lines, what: what}, nil
	}
	front, err := f.build(what + ", what the application calls")
	if err != nil {
		return nil, err
	}
	back, err := b.build(what + ", its endpoints")
	if err != nil {
		return nil, err
	}
	front.Upstream, back.Upstream, back.Passive = u.Name, u.Name, u.Passive
	back.class = slots
	return &cached{front: front, back: back, lines: lines, what: what}, nil
}

// limit refuses what is over an upstream's limits at once, as Envoy does.
func limit(f *builder, u *connect.Upstream, http bool) {
	l := u.Limits
	if !http {
		if l.MaxConnections != nil {
			f.add("tcp-request connection reject if { fe_conn gt %d }", *l.MaxConnections)
		}
		return
	}
	most := -1
	if l.MaxConcurrentRequests != nil {
		most = *l.MaxConcurrentRequests
	}
	if (l.MaxConnections != nil || l.MaxPendingRequests != nil) && !u.Protocol.IsHTTP2() {
		// A connection has one request at a time: so many are under way, maxConn divides
		// them among the endpoints, and so many more wait.
		if n := or(l.MaxConnections, envoyLimit) + or(l.MaxPendingRequests, envoyLimit); most < 0 || n < most {
			most = n
		}
	}
	if most >= 0 {
		f.add(`http-request return status 503 content-type text/plain string "upstream limit reached" hdr x-envoy-overloaded true if { be_conn(%s) ge %d }`, u.Target.Name, most)
	}
}

// envoyLimit is Envoy's default of each limit, which counts where another one is set.
const envoyLimit = 1024

func or(n *int, def int) int {
	if n == nil {
		return def
	}
	return *n
}

// maxConn is the share of an endpoint in the connections that an upstream may have at
// once; more requests wait. 0 is no limit: with HTTP/2 a connection has many requests.
func maxConn(u *connect.Upstream) int {
	l := u.Limits
	if l.MaxConnections == nil && l.MaxPendingRequests == nil || !u.Protocol.IsHTTP() || u.Protocol.IsHTTP2() || len(u.Target.Endpoints) == 0 {
		return 0
	}
	n := or(l.MaxConnections, envoyLimit)
	return (n + len(u.Target.Endpoints) - 1) / len(u.Target.Endpoints)
}

// uploads keeps HAProxy 2.6 from taking a pause of who sends a body for the silence of the
// one who waits for it. While a request comes in, and afterwards too, its answer then has
// as long as an idle client, since nothing can shorten it again.
func (o *Options) uploads(b *builder, silence time.Duration) {
	if !o.TimesUploads || silence < 0 {
		return
	}
	b.add("http-request set-var(txn.size) req.body_size")
	b.add("http-request set-var(txn.size) req.hdr_val(content-length) if { req.hdr(content-length) -m found }")
	b.add("http-request set-var(txn.upload) bool(true) if { req.hdr(transfer-encoding) -m found } || !{ req.hdr(content-length) -m found } { method POST PUT PATCH DELETE } || { req.body_len,sub(txn.size) lt 0 }")
	b.add("http-request set-timeout server %s if { var(txn.upload) -m bool }", ms(max(silence, 5*time.Minute)))
}

// defaultQueue is how long a request waits for one of the connections that a limit
// allows: as long as Envoy gives the whole request.
const defaultQueue = 15 * time.Second

// says makes errors of our own tell who is speaking: the application, its sidecar and
// its caller's sidecar would otherwise look the same.
func says(b *builder, who, bad, unavailable, late string) {
	for _, e := range []struct {
		status int
		text   string
	}{{502, bad}, {503, unavailable}, {504, late}} {
		b.add(`http-error status %d content-type text/plain string "haproxy-connect (%s): %s"`, e.status, who, e.text)
	}
}

// idList is never empty: without an expected identity nobody is the right one.
func idList(ids []certs.SPIFFEID) string {
	if len(ids) == 0 {
		return "nobody"
	}
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = id.String()
	}
	return strings.Join(out, " ")
}

// guard arms the identity filter, and refuses where it is not armed. With the
// options of tlsOptions these are the four parts without which no connector exists.
func guard(b *builder, ids string) {
	b.add("filter %s %s", lua.SpiffeFilter, ids)
	b.add("tcp-request content reject unless { var(%s) -m bool }", lua.SpiffeArmed)
}

func (o *Options) tlsOptions(alpn string) string {
	s := fmt.Sprintf(" ssl crt %s ca-file %s verify required no-ssl-reuse", o.path(LeafFile), o.path(RootsFile))
	if alpn != "" {
		s += " alpn " + alpn
	}
	return s
}

// class groups upstreams whose connectors are alike.
func class(u *connect.Upstream) string {
	kind := "t"
	switch {
	case u.Protocol.IsHTTP2():
		kind = "h2"
	case u.Protocol.IsHTTP():
		kind = "h1"
	}
	return fmt.Sprintf("%s-%d", kind, u.ConnectTimeout.Milliseconds())
}

// ClassALPN is the protocol that connectors of a class offer; "" none.
func ClassALPN(class string) string {
	switch {
	case strings.HasPrefix(class, "h2-"):
		return "h2"
	case strings.HasPrefix(class, "h1-"):
		return "http/1.1"
	}
	return ""
}

// ClassTimeout bounds connecting and shaking hands in a class.
func ClassTimeout(class string) time.Duration {
	_, t, _ := strings.Cut(class, "-")
	n, _ := strconv.Atoi(t)
	return time.Duration(max(n, 1)) * time.Millisecond
}

// slotValue is what a connector must know of an endpoint: where, and who.
func slotValue(t *connect.Target, e *connect.Endpoint) string {
	return e.Address + "|" + strconv.Itoa(e.Port) + lua.SpiffeIDsMark + strings.ReplaceAll(idList(t.IDs), " ", lua.SpiffeIDsMark)
}

// ParseSlotValue takes apart what slotValue made.
func ParseSlotValue(v string) (addr string, ids []string) {
	part := strings.Split(v, "|")
	if len(part) < 3 {
		return "", nil
	}
	return net.JoinHostPort(part[0], part[1]), part[2:]
}

// servers completes a backend's section with its endpoints.
func (o *Options) servers(u *connect.Upstream, head *Section, ids []int, verified string) (*Section, error) {
	sec := *head
	sec.Servers = make([]Server, 0, len(u.Target.Endpoints))
	seen := make(map[string]bool, len(u.Target.Endpoints))
	for i := range u.Target.Endpoints {
		e := &u.Target.Endpoints[i]
		name, err := word("endpoint", e.Name)
		if err != nil {
			return nil, err
		}
		s := Server{Name: name, Weight: min(max(e.Weight, 1), 256)}
		if head.class != "" {
			s.Slot = Slot{Class: head.class, ID: ids[i]}
			s.Address = "unix@" + o.path(SlotSocket(s.Slot))
			if u.Protocol.IsHTTP2() {
				s.Options = " proto h2"
			}
		} else {
			if s.Address, err = word("endpoint address", net.JoinHostPort(e.Address, strconv.Itoa(e.Port))); err != nil {
				return nil, err
			}
			s.Options = o.tlsOptions("")
		}
		if u.Protocol.IsHTTP() {
			s.Options += " pool-max-conn 100 pool-purge-delay 30s"
		}
		s.MaxConn = maxConn(u)
		// A name must never stand for two things while an old server drains.
		what := s.Address + s.Options
		if u.Protocol.IsHTTP() {
			what += verified
		}
		s.Name += "." + digest(what)
		if seen[s.Name] {
			continue // two endpoints with the digest of one: HAProxy would refuse all of it
		}
		seen[s.Name] = true
		sec.Servers = append(sec.Servers, s)
	}
	sec.text = sec.assemble()
	return &sec, nil
}

// connector is hop 2 of a class: from the socket of a slot to mutual TLS with the
// endpoint that the slot's map names.
func (o *Options) connector(t *SlotTable) ([]*Section, error) {
	in, out := section("frontend", "connect_"+t.Class), section("backend", "tls_"+t.Class)
	in.add("mode tcp").add("no log").add("timeout client 25h") // hop 1 decides when to close
	for i := 1; i <= t.Size; i++ {
		in.add("bind unix@%s id %d%s", o.path(SlotSocket(Slot{Class: t.Class, ID: i})), slotID(i), o.owned())
	}
	in.add("tcp-request content set-var(%s) so_id,map_int(%s)", lua.SpiffeIDsVar, o.path(SlotMapFile(t.Class)))
	in.add("tcp-request content reject unless { var(%s) -m found }", lua.SpiffeIDsVar)
	in.add("tcp-request content set-dst var(%s),field(1,|)", lua.SpiffeIDsVar)
	in.add("tcp-request content set-dst-port var(%s),field(2,|)", lua.SpiffeIDsVar)
	in.add("default_backend tls_%s", t.Class)
	out.add("mode tcp").add("retries 0").add("timeout connect %s", ms(ClassTimeout(t.Class))).add("timeout server 25h").add("timeout tunnel 25h")
	guard(out, lua.SpiffeSlot)
	out.add("server endpoint 0.0.0.0:0%s", o.tlsOptions(ClassALPN(t.Class)))
	a, err := in.build("connectors: a socket for each endpoint of an HTTP upstream")
	if err != nil {
		return nil, err
	}
	b, err := out.build("connectors: mutual TLS, the server's SPIFFE ID checked before any byte")
	if err != nil {
		return nil, err
	}
	return []*Section{a, b}, nil
}
