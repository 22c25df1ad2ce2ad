package render

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/go-multierror"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
)

// bind is where a listener listens.
func bind(b *builder, at connect.Bind) string {
	if at.SocketPath != "" {
		mode := at.SocketMode
		if mode == "" {
			mode = "600"
		}
		return "unix@" + b.check("socket path", at.SocketPath) + " mode " + mode
	}
	return b.check("listener", net.JoinHostPort(at.Address, strconv.Itoa(at.Port)))
}

// callers renders a listener that others connect to.
func (f *file) callers(made *front, to [][]way) (out []*Section) {
	l := made.listener
	add := func(b *builder, comment string) {
		if sec := f.must(b, comment); sec != nil {
			own := *sec
			own.Role, own.Listener, own.Origin = l.Role, l.Name, l.Origin
			out = append(out, &own)
		}
	}
	if l.Role == connect.Open {
		add(f.open(l), "WARNING: "+l.Opened+", no TLS and no intentions")
		return out
	}
	if l.Role == connect.Relay {
		add(f.relay(l), "connections of the mesh, passed on by the name that they ask for")
		return out
	}
	f.Files[SPOEFile] = f.spoe(l)
	if counters, err := f.tables(l); err != nil {
		f.wrong = multierror.Append(f.wrong, err)
	} else {
		out = append(out, counters...)
	}
	add(f.public(made, to), "callers: mutual TLS, judged per connection and policy, per request where an intention has permissions")
	if plain := plainBranch(l); plain != nil {
		const warning = "WARNING: permissive mutual TLS, plain connections are let in without intentions"
		add(f.door(l, plain), warning)
		add(f.doorToTLS(l), warning)
	}
	return out
}

// optional renders a listener without which the others go on.
func (f *file) optional(made *front, to [][]way) (err error) {
	l := made.listener
	var b *builder
	comment := "clients outside the mesh"
	if l.Role == connect.Exported {
		f.Files[SPOEFile] = f.spoe(l)
		b, comment = f.public(made, to), "who calls a service that the gateway stands for: mutual TLS"
	} else {
		b = f.edge(made, to)
	}
	if made.sections, err = f.tables(l); err != nil {
		return err
	}
	sec, err := f.build(b, comment)
	if err != nil {
		return err
	}
	own := *sec
	own.Role, own.Listener, own.Origin = l.Role, l.Name, l.Origin
	made.sections = append(made.sections, &own)
	return nil
}

// plainBranch is the branch of a public listener that lets in whoever does not speak TLS,
// or nil.
func plainBranch(l *connect.Listener) *connect.Branch {
	for i := range l.Branches {
		if l.Branches[i].Guard == nil {
			return &l.Branches[i]
		}
	}
	return nil
}

// public is a listener that the mesh calls, or peers through our own gateway.
func (f *file) public(made *front, to [][]way) *builder {
	l := made.listener
	b := section(Frontend, frontendName(l))
	http := l.Protocol().IsHTTP()
	b.mode(http)
	alpn := ""
	if http {
		b.add("option idle-close-on-response")
		alpn = " alpn http/1.1"
	}
	if l.Protocol().IsHTTP2() {
		alpn = " alpn h2,http/1.1"
	}
	at := ""
	switch {
	case l.Role == connect.Exported:
		at = "unix@" + f.path(innerSocket(l.Name)) + f.owned() + " accept-proxy"
	case plainBranch(l) != nil: // the door has it
		at = "unix@" + f.path(publicSocket) + f.owned() + " accept-proxy"
	default:
		at = bind(b, l.Bind)
	}
	b.add("bind %s ssl crt-list %s ca-file %s verify required%s", at, f.path(f.listOf(b, l)), f.path(BundleFile(l.Guard().Callers)), alpn)
	b.add("timeout client %s", ms(l.Idle))
	if f.HelloTimeout { // or whoever connects and says nothing would stay for the time above
		b.add("timeout client-hs 10s")
	}
	// Callers who are not known yet may not take what the application's own calls need.
	b.add("maxconn %d", max(f.share/2, 1))
	most(b, l)
	b.add("filter spoe engine hc config %s", f.path(SPOEFile))
	f.log(b, http)
	if l.Role != connect.Exported {
		f.routes(b, &l.Branches[0].Chain)
	}
	if http {
		f.judgeRequests(b, l)
	} else {
		judgeConnections(b)
	}
	switch {
	case l.Role != connect.Exported:
	case plain(&l.Branches[0].Chain):
		direct(b, &to[0][0])
	default:
		f.chain(b, made, to)
	}
	rates(b, l)
	body(b, l)
	return f.snippet(b, connect.PublicSnippet)
}

// most refuses at once what would be more than a listener's connections.
func most(b *builder, l *connect.Listener) {
	if l.MaxConnections != nil {
		b.add("tcp-request connection reject if { fe_conn gt %d }", *l.MaxConnections)
	}
}

// routes leads what a listener lets in to its backends.
func (f *file) routes(b *builder, c *connect.Chain) {
	known := ""
	for i := range c.Routes {
		r := &c.Routes[i]
		to := b.check("group", string(r.Splits[0].Group))
		if r.Match.PathExact == "" {
			b.add("default_backend %s", to)
			return
		}
		path := b.check("exposed path", r.Match.PathExact)
		known += " " + path
		b.add("use_backend %s if { path -m str -- %s }", to, path)
	}
	b.add("http-request return status 404 unless { path -m str --%s }", known)
}

// log sets the access log of a frontend.
func (f *file) log(b *builder, http bool) {
	var form accessFormat
	switch {
	case f.AccessLog == LogText:
		at, shape := "sess.hc", "%ci:%cp %ft %b/%s %B %Tt %ts "
		if http { // judged per request in effect
			at, shape = "txn", "%ci:%cp %ft %b/%s %ST %B %Ta %tsc %{+Q}r "
		}
		form.line = AccessMark + shape + `source=%[var(sess.hc.source)] verdict=%[var(` + at + `.verdict)] rule=%[var(` + at + `.rule)] reason=%{+Q}[var(` + at + `.reason)]`
	case f.AccessLog == LogJSON:
		form = access(connect.AccessLog{}, http)
	case f.AccessLog == "" && f.snap.AccessLog.Enabled:
		form = access(f.snap.AccessLog, http)
	default:
		b.add("no log")
		return
	}
	if http && f.peers() { // of a request that our gateway passes on, who is behind it
		form.line = strings.ReplaceAll(form.line, "var("+sess+spoe.VarSource+")", "var(txn.source)")
	}
	for _, rule := range form.before {
		b.add("%s", rule)
	}
	b.add("%s", `log-format "`+form.line+`"`)
}

// peers reports whether services of peers may call.
func (f *file) peers() bool {
	public := f.snap.Public()
	return public != nil && len(public.Guard().Peers) > 0
}

// logs reports whether there is an access log.
func (f *file) logs() bool {
	return f.AccessLog == LogText || f.AccessLog == LogJSON || f.AccessLog == "" && f.snap.AccessLog.Enabled
}

// door has the public listener's address where mutual TLS is permissive. It passes TLS on to
// the public listener, and lets plain TCP in that was meant for the application's own port
// before it was redirected here, for services that are on their way into the mesh.
func (f *file) door(l *connect.Listener, plain *connect.Branch) *builder {
	b := section(Frontend, door).add("mode tcp")
	b.add("bind %s", bind(b, l.Bind)).
		add("maxconn %d", max(f.share/2, 1)).
		add("timeout client %s", ms(l.Idle))
	f.log(b, false)
	const hello = "{ req.ssl_hello_type 1 }"
	b.add("tcp-request inspect-delay 5s"). // a client that waits for the server to speak first
						add("tcp-request content accept if %s", hello).
						add("tcp-request content reject unless { dst_port eq %d }", plain.Match.Port).
						add("use_backend %s if %s", doorToTLS, hello)
	f.routes(b, &plain.Chain)
	return b
}

func (f *file) doorToTLS(l *connect.Listener) *builder {
	return section(Backend, doorToTLS).add("mode tcp").add("timeout server %s", ms(l.Idle)).
		add("timeout tunnel %s", ms(l.Idle)).
		add("server public unix@%s send-proxy-v2", f.path(publicSocket))
}

// open is a plain listener before the application, without TLS and intentions: it tells the
// application of no caller.
func (f *file) open(l *connect.Listener) *builder {
	b := section(Frontend, frontendName(l))
	http := l.Protocol().IsHTTP()
	b.mode(http)
	b.add("bind %s", bind(b, l.Bind)).add("maxconn %d", max(f.share/8, 1))
	if l.From != nil { // a connection of this host has the same address at both ends, or comes from the loopback
		near := "127.0.0.0/8 ::1"
		for _, one := range l.From {
			near += " " + b.check("address", one)
		}
		b.add("tcp-request connection set-var(sess.from) src")
		b.add("tcp-request connection reject unless { src %s } || { dst,strcmp(sess.from) eq 0 }", near)
	}
	f.log(b, http)
	if http {
		requests(b)
		noCaller(b, f.ourHeaders())
	}
	f.routes(b, &l.Branches[0].Chain)
	return b
}

// upstream writes the frontend where the application calls an upstream. before, if not nil, is
// what the last rendering made: it is reused if nothing has changed.
func (f *file) upstream(made *front, to [][]way, before *front) error {
	l := made.listener
	b := section(Frontend, "")
	b.name = b.check("upstream name", frontendName(l))
	protocol := l.Protocol()
	http := protocol.IsHTTP()
	b.mode(http)
	b.add("bind %s", bind(b, l.Bind))
	f.log(b, http)
	b.add("timeout client %s", ms(l.Idle))
	most(b, l)
	rates(b, l)
	body(b, l)
	if http {
		if one := &to[0][0]; !one.limit {
			limit(b, one.group, fmt.Sprintf("be_conn(%s)", one.backend(0)))
		}
		b.add("option idle-close-on-response") // or a reload would cut idle keep-alives under a request
		b.add("http-request del-header X-Forwarded-Client-Cert")
		says(b, "calling "+l.Name, "no endpoint answered", "no healthy endpoint", "the endpoint did not answer in time")
		// If no endpoint has answered, the caller gets 503 in place of 502, as with Envoy.
		b.add("http-response set-var(txn.answered) bool(true)")
		b.add("http-after-response set-status 503 if { status 502 } !{ var(txn.answered) -m bool }")
	} else if f.logs() { // also of a client that waits for the server to speak first
		b.add("no option dontlognull")
	}
	if http && !plain(&l.Branches[0].Chain) {
		f.chain(b, made, to)
	} else {
		direct(b, &to[0][0])
	}
	comment := fmt.Sprintf("upstream %s: %s, what the application calls", l.Name, protocol)
	if before != nil && before.sections[0].madeOf(b, comment) && slices.Equal(before.listener.Extras.Rates, l.Extras.Rates) {
		made.sections = before.sections
		return nil
	}
	sec, err := b.build(comment)
	if err != nil {
		return err
	}
	sec.Role, sec.Listener, sec.Origin = l.Role, l.Name, l.Origin
	counters, err := f.tables(l)
	made.sections = append([]*Section{sec}, counters...)
	return err
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

// listOf is the file that says which leaf a listener shows. A gateway that stands for several services
// has one for each.
func (f *file) listOf(b *builder, l *connect.Listener) string {
	name := l.Guard().Leaf
	if name == connect.OwnLeaf {
		return LeafList
	}
	if leaf := f.snap.Leaves[name]; leaf != nil {
		f.Leaves[LeafFile(name)] = leaf
	} else {
		b.fail(fmt.Errorf("there is no leaf %.80q", name))
	}
	list := "tls/" + connect.SafeName(l.Name) + ".list"
	f.Files[list] = f.path(LeafFile(name)) + " dummy.invalid\n"
	return list
}

// leafList says which leaf is shown, and by which roots a caller is verified: by our own, but for
// the names by which a peer's services ask. A line without a name would make 2.6 forget to verify
// anybody, once the leaf is replaced.
func (f *file) leafList() {
	if f.snap.Leaf() == nil {
		return
	}
	leaf := f.path(LeafFile(connect.OwnLeaf))
	text := leaf + " dummy.invalid\n"
	if public := f.snap.Public(); public != nil {
		for _, p := range public.Guard().Peers {
			suffix, err := word("peer", p.Suffix)
			roots := f.snap.Bundles[p.Bundle]
			if err != nil || roots == nil {
				continue // nobody of this peer is let in
			}
			f.Bundles[BundleFile(p.Bundle)] = roots
			text += fmt.Sprintf("%s [ca-file %s verify required] *%s\n", leaf, f.path(BundleFile(p.Bundle)), suffix)
		}
	}
	f.Files[LeafList] = text
}
