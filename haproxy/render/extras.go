package render

import (
	"fmt"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// rates counts what each client asks, and refuses what is over a limit.
func rates(b *builder, l *connect.Listener) {
	client := "var(" + sess + spoe.VarSource + ")"
	if l.Role == connect.Local {
		client = "int(1)"
	}
	for i := range l.Extras.Rates {
		r := &l.Extras.Rates[i]
		table, counter, rules := rateTable(l, i), fmt.Sprintf("sc%d", i), "tcp-request content"
		when, rate, refuse := "", "conn_rate", "reject"
		if l.Protocol().IsHTTP() {
			rules, rate = "http-request", "http_req_rate"
			refuse = `return status 429 content-type text/plain string "rate limit" hdr x-envoy-ratelimited true`
			if r.Path != "" {
				when = fmt.Sprintf(" if { path -m beg -- %s }", b.check("path", r.Path))
			}
		}
		b.add("%s track-%s %s table %s%s", rules, counter, client, table, when)
		b.add("%s %s if { %s_%s(%s) gt %d }", rules, refuse, counter, rate, table, r.Requests)
	}
}

// tables are the counters of rates.
func (f *file) tables(l *connect.Listener) (out []*Section, err error) {
	kind, rate := "string len 256 size 100k", "conn_rate"
	if l.Role == connect.Local {
		kind = "integer size 1k"
	}
	if l.Protocol().IsHTTP() {
		rate = "http_req_rate"
	}
	for i := range l.Extras.Rates {
		per := ms(l.Extras.Rates[i].Per)
		b := section(Backend, rateTable(l, i)).add("mode tcp").add("stick-table type %s expire %s store %s(%s)", kind, per, rate, per)
		sec, err := b.build("what each client has asked")
		if err != nil {
			return nil, err
		}
		sec.Origin = l.Origin
		out = append(out, sec)
	}
	return out, nil
}

// body refuses a request whose body is too large: at once if its length is announced.
func body(b *builder, l *connect.Listener) {
	if n := l.Extras.MaxBody; n > 0 {
		b.add("filter %s %d", lua.BodyFilter, n)
		b.add(`http-request return status 413 content-type text/plain string "the request is too large" if { req.body_size gt %d }`, n)
	}
}

// limitsBodies reports whether a listener needs what Lua does for bodies.
func limitsBodies(l *connect.Listener) bool { return l.Extras.MaxBody > 0 }

// serverExtras are the options of a group's servers. address tells endpoints apart in every
// sidecar alike.
func serverExtras(g *connect.Group, address string) (out string) {
	if g.Affinity != "" {
		out += " cookie " + digest(address)
	}
	if g.SlowStart > 0 {
		out += " slowstart " + ms(g.SlowStart)
	}
	return out
}

// waiting refuses what would have too many others before it in the queue.
func waiting(b *builder, g *connect.Group) {
	if g.Queue.Max == 0 {
		return
	}
	if !g.Protocol.IsHTTP() {
		b.add("tcp-request content reject if { queue ge %d }", g.Queue.Max)
		return
	}
	b.add(`http-request return status 503 content-type text/plain string "too many requests wait" if { queue ge %d }`, g.Queue.Max)
}

// queued is the limit of one endpoint, where the group bounds what is under way there.
func queued(g *connect.Group, most int) int {
	if n := g.Queue.PerEndpoint; n > 0 && (most == 0 || n < most) {
		return n
	}
	return most
}

// outside is a target that is no part of the mesh: without TLS, or with what its entry demands.
func (f *file) outside(b *builder, p *pool) {
	g, t := p.group, p.target
	http := g.Protocol.IsHTTP()
	b.mode(http)
	b.add("timeout connect %s", ms(g.Connect)).add("timeout server %s", ms(g.Idle))
	if http {
		b.add("http-reuse safe")
		b.add("http-request del-header X-Forwarded-Client-Cert")
		if g.Host != "" {
			b.add("http-request set-header Host %s", b.check("host", g.Host))
		}
		if g.Protocol.IsHTTP2() {
			p.serverOptions += " proto h2"
		}
	} else {
		b.add("timeout tunnel %s", ms(g.Idle))
	}
	balance(b, &g.Balance)
	for i := range t.Endpoints {
		b.check("endpoint", t.Endpoints[i].Name)
	}
	s := t.Dial.Server
	if s == nil {
		return
	}
	roots := "tls/outside-" + digest(s.RootsPEM) + ".pem"
	p.files = map[string]string{roots: s.RootsPEM}
	p.serverOptions += " ssl verify required ca-file " + f.path(roots)
	if s.Name != "" {
		name := b.check("server name", s.Name)
		p.serverOptions += " sni str(" + name + ") verifyhost " + name
	}
	if s.Leaf != "" {
		if f.snap.Leaves[s.Leaf] == nil {
			b.fail(fmt.Errorf("there is no certificate %.80q", s.Leaf))
		}
		p.leaf = s.Leaf
		p.serverOptions += " crt " + f.path(LeafFile(s.Leaf))
	}
}

// read adds the files that the servers of a pool outside the mesh are verified by.
func (f *file) read(p *pool) {
	for name, text := range p.files {
		f.Files[name] = text
	}
	if leaf := f.snap.Leaves[p.leaf]; p.leaf != "" && leaf != nil {
		f.Leaves[LeafFile(p.leaf)] = leaf
	}
}
