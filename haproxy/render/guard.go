package render

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// forwardsCert reports whether the application is told the caller's certificate: as
// in Consul, not with grpc.
func forwardsCert(l *connect.Listener) bool {
	if l.Role == connect.Exported { // the service learns from it who calls
		return l.Protocol().IsHTTP() && !l.Guard().SanitizeXFCC
	}
	return l.Protocol().IsHTTP() && l.Protocol() != connect.GRPC && !l.Guard().SanitizeXFCC
}

// spoe is the configuration of the filter: what is asked, and when.
func (o *Options) spoe(l *connect.Listener) string {
	chain := ""
	if forwardsCert(l) {
		chain = " " + spoe.ArgChain + "=var(txn.chain)"
	}
	name := ""
	if l.Policy().Several() { // which service it is about
		name = " " + spoe.ArgServerName + "=ssl_fc_sni"
	}
	return `# What HAProxy asks the authorization agent.
[hc]
spoe-agent hc
    groups ` + spoe.MessageConnection + ` ` + spoe.MessageRequest + `
    option var-prefix hc
    option set-on-error error
    timeout hello 2s
    timeout idle 1h
    timeout processing ` + o.AgentTimeout.String() + `
    use-backend ` + authzBackend + `

spoe-message ` + spoe.MessageConnection + `
    args ` + spoe.ArgCert + `=ssl_c_der ` + spoe.ArgSource + `=src ` + spoe.ArgPort + `=src_port ` + spoe.ArgDestination + `=dst ` + spoe.ArgDestinationPort + `=dst_port ` +
		spoe.ArgServerName + `=ssl_fc_sni` + chain + `

spoe-message ` + spoe.MessageRequest + `
    args ` + spoe.ArgCert + `=ssl_c_der ` + spoe.ArgMethod + `=method ` + spoe.ArgPath + `=path ` + spoe.ArgQuery + `=query ` + spoe.ArgHeaders + `=req.hdrs_bin` + name + `

spoe-group ` + spoe.MessageConnection + `
    messages ` + spoe.MessageConnection + `

spoe-group ` + spoe.MessageRequest + `
    messages ` + spoe.MessageRequest + `
`
}

const sess, txn = "sess.hc.", "txn.hc."

// token forwards what the verified token of a provider says, and takes the token away
// where its location says so.
func (b *builder) token(p *intentions.Provider) {
	verified := fmt.Sprintf("{ var(%s%s) -m found }", txn, p.Variable())
	if p.ForwardTo != "" {
		b.add("http-request set-header %s %%[var(%s%s)] if %s", b.check("forwarding.header_name", p.ForwardTo), txn, p.Variable(), verified)
	}
	for _, l := range p.Locations {
		if l.Header != "" && !l.Keep {
			b.add("http-request del-header %s if %s", b.check("locations.header.name", l.Header), verified)
		}
	}
}

// maxChain is how many bytes of certificates X-Forwarded-Client-Cert is made of at most.
const maxChain = 5000

const (
	// closedQuotes is text in which every quote has its end: quoted parts may have escapes.
	closedQuotes = `'^[^"\\]*("[^"\\]*(\\.[^"\\]*)*"[^"\\]*)*$'`
	// notAnEscape is a percent sign without two hexadecimal digits.
	notAnEscape = `'%(?![0-9A-Fa-f]{2})'`
)

// requests refuses, on every listener before the application, what would get around the rules:
// a tunnel, which CONNECT makes and an upgrade to anything but WebSocket; a path that no rule
// can name; a method in lower case, which may mean one thing to the application and another to
// a rule. It removes Connection, with which a caller could have our own headers dropped.
func requests(b *builder) {
	b.add("http-request return status 405 if METH_CONNECT")
	b.add("http-request return status 400 if { method -m reg -- [a-z] }")
	b.add("http-request return status 400 unless { path -m beg -- / } or METH_OPTIONS { url -m str -- * }")
	b.add("http-request set-var(txn.websocket) bool(true) if { req.fhdr_cnt(Upgrade) eq 1 } { req.fhdr(Upgrade) -i -m str -- websocket }")
	b.add("http-request del-header Upgrade unless { var(txn.websocket) -m bool }")
	b.add("http-request del-header HTTP2-Settings")
	b.add("http-request del-header Connection unless { var(txn.websocket) -m bool }")
	b.add("http-request set-header Connection Upgrade if { var(txn.websocket) -m bool }")
	// An application that switches protocols although it was not asked to would open a tunnel
	// too.
	b.add("http-response return status 502 if { status 101 } !{ var(txn.websocket) -m bool }")
}

// ourHeaders are the headers that tell the application who called; nobody but us may set them.
func (f *file) ourHeaders() []string {
	out := []string{"X-Forwarded-Client-Cert"}
	public := f.snap.Public()
	if public == nil {
		return out
	}
	if h := public.Guard().CallerHeader; h != "" {
		out = append(out, h)
	}
	for _, one := range public.Policy().Providers() {
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
		part[i] = strings.ReplaceAll(regexp.QuoteMeta(strings.ToLower(b.check("header", name))), "-", "[-_]")
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
		// A percent sign that begins no escape would begin one when its neighbour is decoded:
		// %7%33.
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

// judgeConnections asks about each connection.
func judgeConnections(b *builder) {
	b.add("tcp-request inspect-delay 5s")
	b.add("tcp-request content send-spoe-group hc %s", spoe.MessageConnection)
	b.add("tcp-request content reject unless { var(%s%s) -m str %s }", sess, spoe.VarVerdict, spoe.Allow)
}

// judgeRequests lets no request pass that the policy of this moment does not allow, and
// tells the application who calls.
func (f *file) judgeRequests(b *builder, l *connect.Listener) {
	g := l.Guard()
	f.Maps[PolicyMap].Read = true
	says(b, "before the application", "the application closed the connection without an answer", "the application refuses connections", "the application did not answer in time")
	requests(b)
	normalize(b, g.Normalize)

	// A verdict is kept per connection and asked again when the policy's generation
	// has moved. It is forgotten before it is asked, so that an agent that does not
	// answer leaves none; then it is copied, as another stream of the connection may
	// be asking while this one waits.
	fresh := fmt.Sprintf("{ var(%s%s),strcmp(txn.policy) eq 0 }", sess, spoe.VarGeneration)
	b.add("http-request set-var(txn.policy) str(%s),map_str(%s)", PolicyKey, f.path(PolicyMap))
	b.add("http-request set-var(txn.stale) bool(true) unless %s", fresh)
	b.add("http-request unset-var(%s%s) if { var(txn.stale) -m bool }", sess, spoe.VarVerdict)
	b.add("http-request unset-var(%s%s) if { var(txn.stale) -m bool }", sess, spoe.VarGeneration)
	if forwardsCert(l) { // a longer chain is not forwarded: the question must fit into a frame
		b.add("http-request set-var(txn.chain) ssl_c_chain_der if { var(txn.stale) -m bool } { ssl_c_chain_der,length le %d }", maxChain)
	}
	b.add("http-request send-spoe-group hc %s if { var(txn.stale) -m bool }", spoe.MessageConnection)
	b.add("http-request set-var(txn.verdict) var(%s%s)", sess, spoe.VarVerdict)
	// A caller that asked for another service gets no answer that it could take for that
	// service's.
	b.add("http-request reject if { var(%s%s) -m str %s }", sess, spoe.VarRule, intentions.ServerNameRule)
	for _, p := range g.Policy.Providers() {
		if p.ForwardTo != "" { // only we may say what a token says
			b.add("http-request del-header %s", p.ForwardTo)
		}
	}
	ask := fmt.Sprintf("{ var(txn.verdict) -m str %s }", spoe.Ask)
	b.add("http-request send-spoe-group hc %s if %s", spoe.MessageRequest, ask)
	if f.logs() || f.ExplainDenials {
		b.add("http-request set-var(txn.rule) var(%s%s)", sess, spoe.VarRule)
		b.add("http-request set-var(txn.reason) var(%s%s)", sess, spoe.VarReason)
		b.add("http-request set-var(txn.rule) var(%s%s) if %s", txn, spoe.VarRequestRule, ask)
		b.add("http-request set-var(txn.reason) var(%s%s) if %s", txn, spoe.VarRequestReason, ask)
	}
	b.add("http-request set-var(txn.verdict) var(%s%s) if %s", txn, spoe.VarRequestVerdict, ask)
	if f.logs() && f.peers() {
		b.add("http-request set-var(txn.source) var(%s%s)", sess, spoe.VarSource)
		b.add("http-request set-var(txn.source) var(%s%s) if { var(%s%s) -m found }", txn, spoe.VarRequestSource, txn, spoe.VarRequestSource)
	}
	explain := ""
	if f.ExplainDenials {
		explain = " hdr X-Denied-Reason %[var(txn.reason)]"
	}
	if f.LosesAnswers {
		if f.ExplainDenials {
			b.add("http-request set-var(txn.explain) bool(true)")
		}
		b.add("http-request use-service %s if !{ var(txn.verdict) -m str %s } { req.ver 1.0 1.1 } !METH_GET !METH_HEAD", lua.DenyService, spoe.Allow)
	}
	b.add(`http-request return status 403 content-type text/plain string "RBAC: access denied"%s unless { var(txn.verdict) -m str %s }`, explain, spoe.Allow)
	for _, p := range g.Policy.Providers() {
		b.token(p)
	}
	own := "nobody"
	if leaf := f.snap.Leaves[g.Leaf]; leaf != nil {
		own = b.check("own identity", leaf.ID.String())
	}
	const header = "X-Forwarded-Client-Cert"
	if forwardsCert(l) {
		// What an earlier hop said is kept before what is known here. No proxy of the mesh
		// sends the header in more than one line: then nothing of it is kept.
		element := fmt.Sprintf("By=%s;%%[var(%s%s)]", own, sess, spoe.VarXFCC)
		// With an open quote in theirs, ours would become a part of it.
		if !g.Foreign {
			b.add("http-request set-var(txn.xfcc) req.fhdr(%s) if { req.fhdr_cnt(%s) eq 1 } { req.fhdr(%s) -m reg -- %s }", header, header, header, closedQuotes)
		}
		spellings(b, f.ourHeaders())
		b.add("http-request set-header %s %s", header, element)
		b.add("http-request set-header %s %%[var(txn.xfcc)],%%[req.fhdr(%s)] if { var(txn.xfcc) -m found }", header, header)
	} else {
		b.add("http-request del-header %s", header)
		spellings(b, f.ourHeaders())
	}
	closing(b, f)
	if f.MaxAge > 0 {
		b.add("tcp-request session set-var(sess.born) date()")
		b.add("http-after-response set-header Connection close if { date(),sub(sess.born) ge %d }", int(f.MaxAge.Seconds()))
	}
	// Always set, never added: a caller cannot forge who called.
	if g.CallerHeader != "" {
		b.add("http-request set-header %s %%[var(%s%s)]", g.CallerHeader, sess, spoe.VarService)
		if len(g.Peers) > 0 {
			b.add("http-request set-header %s %%[var(%s%s)] if { var(%s%s) -m found }", g.CallerHeader, txn, spoe.VarRequestService, txn, spoe.VarRequestService)
		}
	}
}

// closing has answers close their connections while we stop: the caller goes elsewhere.
func closing(b *builder, f *file) {
	b.add("http-after-response set-header Connection close if { str(%s),map_str(%s) -m found }", DrainingKey, f.path(PolicyMap))
}
