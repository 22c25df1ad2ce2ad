package render

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// pool is the backend of one target of a group.
type pool struct {
	group    *connect.Group
	target   *connect.Target
	at       struct{ group, target int } // where they stood in the snapshot
	head     *Section                    // without its servers
	class    *Class                      // of their slots; nil: they need none
	values   []string                    // of the endpoints' slots
	counted  *ledger                     // that counts the values
	slots    []int                       // as assigned when full was made
	full     *Section                    // with its servers
	verified string                      // Config.Verified when full was made
	last     *front                      // that leads here; nil: none does
}

// follow reports whether a snapshot has the same group and target.
func (p *pool) follow(s *connect.Snapshot) bool {
	if at := p.at.group; (at >= len(s.Groups) || s.Groups[at] != p.group) && s.Group(p.group.Name) != p.group {
		return false
	}
	if at := p.at.target; at < len(s.Targets) && s.Targets[at] == p.target {
		return true
	}
	return s.Target(p.target.Name) == p.target
}

// pool renders the backend of the target that has a place in a group; often only endpoints
// have changed. fresh are those of this snapshot.
func (f *file) pool(g *connect.Group, place int, fresh map[string]*pool) (*pool, error) {
	name := backendName(g, place)
	if p := fresh[name]; p != nil {
		return p, nil
	}
	t := f.snap.Target(g.Targets[place])
	if t == nil {
		return nil, fmt.Errorf("there is no target %.80q", g.Targets[place])
	}
	old := f.old.byName().pools[name]
	if old != nil && old.group == g && old.target == t {
		return old, nil
	}
	if _, err := word("target name", name); err != nil {
		return nil, err
	}
	p := &pool{group: g, target: t}
	p.at.group = slices.Index(f.snap.Groups, g)
	p.at.target = slices.Index(f.snap.Targets, t)
	b := section(Backend, name)
	comment := "the application"
	if t.Dial.How == connect.App {
		f.app(b, g, t)
	} else {
		comment = fmt.Sprintf("target %s: %s, its endpoints", t.Name, g.Protocol)
		if err := f.mesh(b, p); err != nil {
			return nil, err
		}
	}
	fresh[name] = p
	if old != nil && old.head.madeOf(b, comment) && samePassive(old.head.Passive, g.Passive) {
		p.head = old.head
		return p, nil
	}
	sec, err := b.build(comment)
	if err != nil {
		delete(fresh, name)
		return nil, err
	}
	sec.Role, sec.Group = connect.Public, g.Name
	if t.Dial.How == connect.Mesh {
		sec.Role, sec.Target, sec.Passive = connect.Local, t.Name, g.Passive
	}
	if p.class != nil {
		sec.class = p.class.Name()
	}
	p.head = sec
	return p, nil
}

func samePassive(a, b *connect.PassiveHealth) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Interval == b.Interval && a.MaxFailures == b.MaxFailures && a.BaseEjection == b.BaseEjection && a.Enforced == b.Enforced && or(a.MaxEjected, -1) == or(b.MaxEjected, -1)
}

// app is our own application.
func (f *file) app(b *builder, g *connect.Group, t *connect.Target) {
	http := g.Protocol.IsHTTP()
	b.mode(http)
	proto := ""
	if http {
		b.add("http-reuse safe")
		if g.ForwardFor {
			b.add("option forwardfor")
		}
		if f.DropTrailers && !g.Protocol.IsHTTP2() { // CGI and WSGI may read them as headers
			b.add("option http-drop-request-trailers")
		}
		if g.Protocol.IsHTTP2() {
			proto = " proto h2"
		}
	}
	if g.Idle != 0 {
		b.add("timeout server %s", ms(g.Idle))
		if http {
			f.uploads(b, g.Idle)
		} else {
			b.add("timeout tunnel %s", ms(g.Idle)) // it counts once both sides are connected
		}
	}
	b.add("timeout connect %s", ms(g.Connect))
	for i := range t.Endpoints {
		e := &t.Endpoints[i]
		addr := "unix@" + e.SocketPath
		if e.SocketPath == "" {
			addr = net.JoinHostPort(e.Address, strconv.Itoa(e.Port))
		}
		limit := ""
		if n := or(g.Limits.MaxConnections, 0); n > 0 {
			limit = fmt.Sprintf(" maxconn %d", n)
		}
		b.add("server %s %s%s%s", b.check("endpoint", e.Name), b.check("local application's address", addr), proto, limit)
	}
}

// mesh is an upstream's target. Whatever could be wrong with its endpoints is found here.
func (f *file) mesh(b *builder, p *pool) error {
	g, t := p.group, p.target
	for _, id := range t.Dial.IDs {
		if _, err := certs.ParseID(id.String()); err != nil {
			return fmt.Errorf("expected identity: %w", err)
		}
	}
	for i := range t.Endpoints {
		e := &t.Endpoints[i]
		b.check("endpoint", e.Name)
		b.check("endpoint address", net.JoinHostPort(e.Address, strconv.Itoa(e.Port)))
	}
	http := g.Protocol.IsHTTP()
	b.mode(http)
	if !http {
		b.add("timeout tunnel %s", ms(g.Idle))
	}
	b.add("timeout connect %s", ms(g.Connect)).add("timeout server %s", ms(g.Idle))
	b.add("balance roundrobin")
	switch class := classOf(g, t); {
	case http:
		b.add("timeout queue %s", ms(min(g.Idle, defaultQueue)))
		b.add("http-reuse always")
		b.add("retry-on conn-failure empty-response")
		// A request that may not be repeated is not: the server may have begun it.
		b.add("http-request disable-l7-retry unless METH_GET || METH_HEAD || METH_OPTIONS || { method PUT DELETE TRACE }")
		f.uploads(b, g.Idle)
		p.class = &class
	case f.Originator == Lua:
		guard(b, idList(t.Dial.IDs))
	default:
		p.class = &class
	}
	if p.class != nil {
		for i := range t.Endpoints {
			p.values = append(p.values, slotValue(t, &t.Endpoints[i]))
		}
	}
	return nil
}

// limit refuses what is over a group's limits at once, as Envoy does.
func limit(b *builder, g *connect.Group) {
	l := g.Limits
	most := or(l.MaxConcurrentRequests, -1)
	if (l.MaxConnections != nil || l.MaxPendingRequests != nil) && !g.Protocol.IsHTTP2() {
		// A connection has one request at a time: so many are under way, maxConn divides
		// them among the endpoints, and so many more wait.
		if n := or(l.MaxConnections, envoyLimit) + or(l.MaxPendingRequests, envoyLimit); most < 0 || n < most {
			most = n
		}
	}
	if most >= 0 {
		b.add(`http-request return status 503 content-type text/plain string "upstream limit reached" hdr x-envoy-overloaded true if { be_conn(%s) ge %d }`, g.Name, most)
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

// maxConn is the share of an endpoint in the connections that a target may have at
// once; more requests wait. 0 is no limit: with HTTP/2 a connection has many requests.
func maxConn(g *connect.Group, t *connect.Target) int {
	l := g.Limits
	if l.MaxConnections == nil && l.MaxPendingRequests == nil || !g.Protocol.IsHTTP() || g.Protocol.IsHTTP2() || len(t.Endpoints) == 0 {
		return 0
	}
	n := or(l.MaxConnections, envoyLimit)
	return (n + len(t.Endpoints) - 1) / len(t.Endpoints)
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

// assign gives every endpoint that needs one a slot, and completes the backends with their
// servers. A pool that the ledger knows, and that has them, costs nothing.
func (f *file) assign() {
	var changed []*pool
	for _, p := range f.next.pools {
		if p.full == nil || p.counted != f.ledger || p.verified != f.Verified {
			changed = append(changed, p)
		}
		if p.class != nil && p.counted != f.ledger {
			f.ledger.want(*p.class, p.values)
		}
		p.counted = f.ledger
	}
	for _, p := range f.old.pools {
		if p.class != nil && p.last == nil && p.counted == f.ledger {
			f.ledger.drop(p.class.Name(), p.values)
			p.counted = nil
		}
	}
	f.ledger.assign(f.MaxFiles / 2)
	for _, p := range changed {
		if p.target.Dial.How == connect.App {
			p.full, p.verified = p.head, f.Verified
			continue
		}
		ids := f.ledger.of(p.head.class, p.values)
		if p.full == nil || p.verified != f.Verified || !slices.Equal(ids, p.slots) {
			p.full, p.slots, p.verified = f.servers(p, ids), ids, f.Verified
		}
	}
	f.Slots = f.ledger.published()
}

// servers completes a backend's section with its endpoints.
func (f *file) servers(p *pool, ids []int) *Section {
	g, t := p.group, p.target
	sec := *p.head
	sec.Servers = make([]Server, 0, len(t.Endpoints))
	seen := make(map[string]bool, len(t.Endpoints))
	for i := range t.Endpoints {
		e := &t.Endpoints[i]
		s := Server{Name: e.Name, Weight: min(max(e.Weight, 1), 256), MaxConn: maxConn(g, t)}
		if p.class != nil {
			s.Slot = Slot{Class: sec.class, ID: ids[i]}
			s.Address = "unix@" + f.path(SlotSocket(s.Slot))
			if g.Protocol.IsHTTP2() {
				s.Options = " proto h2"
			}
		} else {
			s.Address = net.JoinHostPort(e.Address, strconv.Itoa(e.Port))
			s.Options = f.tlsOptions(Class{Leaf: t.Dial.Leaf, Bundle: t.Dial.Bundle})
		}
		// A name must never stand for two things while an old server drains.
		what := s.Address + s.Options
		if g.Protocol.IsHTTP() {
			s.Options += " pool-max-conn 100 pool-purge-delay 30s"
			what = s.Address + s.Options + f.Verified
		}
		s.Name += "." + digest(what)
		if seen[s.Name] {
			continue // two endpoints with the digest of one: HAProxy would refuse all of it
		}
		seen[s.Name] = true
		sec.Servers = append(sec.Servers, s)
	}
	sec.text = sec.assemble()
	return &sec
}
