package render

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
)

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
