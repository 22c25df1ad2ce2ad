package render

import (
	"fmt"
	"net"
	"strconv"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

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
