package render

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// pool is the backend of one target of a group.
type pool struct {
	group         *connect.Group
	target        *connect.Target
	variant       variant
	at            struct{ group, target int } // where they stood in the snapshot
	head          *Section                    // without its servers
	class         *Class                      // of their slots; nil: they need none
	values        []string                    // of the endpoints' slots
	serverOptions string                      // of servers outside the mesh
	files         map[string]string           // that these read
	leaf          connect.LeafName            // that these are shown; "": none
	counted       *ledger                     // that counts the values
	slots         []int                       // as assigned when full was made
	full          *Section                    // with its servers
	verified      string                      // Config.Verified when full was made
	last          *front                      // that leads here; nil: none does
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

// pool renders the backend of the target at a place of a group; if only endpoints have changed,
// the head is reused. fresh has the pools already made for this snapshot.
func (f *file) pool(w *way, place int, fresh map[string]*pool) (*pool, error) {
	g, name := w.group, w.backend(place)
	if p := fresh[name]; p != nil {
		return p, nil
	}
	t := f.snap.Target(g.Targets[place])
	if t == nil {
		return nil, fmt.Errorf("there is no target %.80q", g.Targets[place])
	}
	old := f.old.byName().pools[name]
	if old != nil && old.group == g && old.target == t && old.variant.key() == w.key() {
		fresh[name] = old
		return old, nil
	}
	if _, err := word("target name", name); err != nil {
		return nil, err
	}
	p := &pool{group: g, target: t, variant: w.variant}
	p.at.group = slices.Index(f.snap.Groups, g)
	p.at.target = slices.Index(f.snap.Targets, t)
	b := section(Backend, name)
	comment := "the application"
	switch t.Dial.How {
	case connect.App:
		f.app(b, g, t)
	case connect.Outside:
		comment = fmt.Sprintf("target %s: %s, outside the mesh", t.Name, g.Protocol)
		f.outside(b, p)
	default:
		comment = fmt.Sprintf("target %s: %s, its endpoints", t.Name, g.Protocol)
		if err := f.mesh(b, p); err != nil {
			return nil, err
		}
		f.snippet(b, g.Snippet)
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
	sec.Role, sec.Group, sec.Origin = connect.Public, g.Name, g.Origin
	if t.Dial.How == connect.Mesh || t.Dial.How == connect.Outside {
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
	if t.Dial.SNI != "" {
		b.check("server name", t.Dial.SNI)
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
	b.because(g.Origin)
	balance(b, &g.Balance)
	b.because("")
	if g.Affinity != "" {
		b.add("cookie %s httponly indirect nocache insert", b.check("cookie", g.Affinity))
	}
	waiting(b, g)
	if wait := g.Queue.Timeout; wait > 0 && !http {
		b.add("timeout queue %s", ms(wait))
	}
	switch class := f.classOf(g, t); {
	case http:
		f.requestsTo(b, p)
		p.class = &class
	case class.Go:
		p.class = &class
	default:
		guard(b, idList(t.Dial.IDs))
	}
	if p.class != nil {
		for i := range t.Endpoints {
			p.values = append(p.values, slotValue(t, &t.Endpoints[i]))
		}
	}
	return nil
}

// requestsTo is what a backend of the mesh does with requests.
func (f *file) requestsTo(b *builder, p *pool) {
	g, v := p.group, &p.variant
	wait := min(g.Idle, defaultQueue)
	if g.Queue.Timeout > 0 {
		wait = g.Queue.Timeout
	}
	b.add("timeout queue %s", ms(wait))
	b.add("http-reuse always")
	if v.total {
		b.add("filter %s", lua.TotalFilter)
	}
	if v.limit {
		limit(b, g, "be_conn")
	}
	hashKey(b, &g.Balance)
	retries(b, v.retry, g.Protocol)
	if v.timed {
		b.add("http-request set-timeout server var(txn.silence) if { var(txn.silence) -m found }")
		b.add("http-request set-timeout tunnel var(txn.idle) if { var(txn.idle) -m found }")
	}
	f.uploads(b, g.Idle)
}

// notRepeated keeps HAProxy from repeating a request that is not safe to repeat: the server may
// already have begun it.
const notRepeated = "http-request disable-l7-retry unless METH_GET || METH_HEAD || METH_OPTIONS || { method PUT DELETE TRACE }"

// retries says when a request is tried at another endpoint. A connection that could not be made
// and one that was closed look the same here, so only requests that are safe to repeat are
// tried again. A route that asks for more conditions repeats every request, as with Envoy, if
// the body has come within a second and fits a buffer.
func retries(b *builder, r *connect.Retry, p connect.Protocol) {
	if r == nil {
		b.add("retry-on conn-failure empty-response")
		b.add(notRepeated)
		return
	}
	on := []string{"conn-failure", "empty-response"}
	every := len(r.Codes) > 0
	for _, c := range r.Conditions {
		switch c {
		case "reset", "refused-stream":
			on, every = append(on, "junk-response"), true
		case "gateway-error":
			on, every = append(on, "junk-response", "502", "503", "504"), true
		case "5xx":
			on, every = append(on, "junk-response", "500", "501", "502", "503", "504", "response-timeout"), true
		}
	}
	for _, code := range r.Codes {
		on = append(on, strconv.Itoa(code))
	}
	slices.Sort(on)
	b.add("retries %d", r.Tries)
	b.add("retry-on %s", strings.Join(slices.Compact(on), " "))
	switch {
	case !every:
		b.add(notRepeated)
	case p != connect.GRPC: // a stream of gRPC may have no end
		b.add("http-request wait-for-body time 1s unless METH_GET || METH_HEAD")
	}
}

// balance says how endpoints are chosen. HAProxy's hash-key is not used: it ends the process
// where servers are unix sockets.
func balance(b *builder, how *connect.Balance) {
	switch how.Policy {
	case connect.LeastRequest:
		b.add("balance random(%d)", max(how.Choices, 2))
	case connect.Random:
		b.add("balance random(1)")
	case connect.Hash:
		b.add("balance hash var(txn.hk)").add("hash-type consistent wt6 avalanche")
	default:
		b.add("balance roundrobin")
	}
}

// hashKey puts together what is hashed. Without any part endpoints are taken in turn.
func hashKey(b *builder, how *connect.Balance) {
	if how.Policy != connect.Hash {
		return
	}
	for i := range how.Hash {
		p := &how.Hash[i]
		part, done := fmt.Sprintf("txn.p%d", i), ""
		if i > 0 {
			done = " unless { var(txn.hashed) -m found }"
		}
		switch {
		case p.SourceIP:
			b.add("http-request set-var(%s) src%s", part, done)
		case p.Query != "":
			b.add("http-request set-var(%s) url_param(%s)%s", part, b.check("query parameter", p.Query), done)
		case p.Cookie != "":
			cookie(b, p, part, done)
		default:
			name := b.check("header", p.Header)
			b.add("http-request set-var(%s) req.fhdr(%s)%s", part, name, done)
		}
		if i == 0 {
			b.add("http-request set-var(txn.hk) var(%s) if { var(%s) -m found }", part, part)
		} else {
			b.add("http-request set-var(txn.hk) var(txn.hk),concat(|,%s) if { var(%s) -m found } { var(txn.hk) -m found }", part, part)
			b.add("http-request set-var(txn.hk) var(%s) if { var(%s) -m found } !{ var(txn.hk) -m found }", part, part)
		}
		if p.Terminal {
			b.add("http-request set-var(txn.hashed) bool(true) if { var(txn.hk) -m found }")
		}
	}
}

// cookie hashes by a cookie, and makes one for who has none if the policy says so.
func cookie(b *builder, p *connect.HashPolicy, part, done string) {
	name := b.check("cookie", p.Cookie)
	b.add("http-request set-var(%s) req.cook(%s)%s", part, name, done)
	b.add("http-request unset-var(%s) if { var(%s) -m len 0 }", part, part)
	if !p.Generate {
		return
	}
	made := strings.Replace(part, "txn.p", "txn.made", 1)
	when := fmt.Sprintf(" if !{ var(%s) -m found }", part)
	if done != "" {
		when += " !{ var(txn.hashed) -m found }"
	}
	b.add("http-request set-var(%s) uuid()%s", made, when)
	b.add("http-request set-var(%s) var(%s) if { var(%s) -m found }", part, made, made)
	rest := ""
	if p.TTL > 0 {
		rest += fmt.Sprintf("; Max-Age=%d", max(int(p.TTL.Seconds()), 1))
	}
	if p.Path != "" {
		rest += "; Path=" + b.check("cookie's path", p.Path)
	}
	// Without quotes, which HAProxy would take for a part of the value.
	b.add("%s", fmt.Sprintf(`http-response add-header set-cookie "%s=%%[var(%s)]%s; HttpOnly" if { var(%s) -m found }`, name, made, rest, made))
}

// limit refuses what is over a group's limits at once, as Envoy does. used counts the
// requests under way.
func limit(b *builder, g *connect.Group, used string) {
	l := g.Limits
	most := or(l.MaxConcurrentRequests, -1)
	if (l.MaxConnections != nil || l.MaxPendingRequests != nil) && !g.Protocol.IsHTTP2() {
		// A connection has one request at a time: MaxConnections of them are under way, which
		// maxConn divides among the endpoints, and MaxPendingRequests more wait.
		if n := or(l.MaxConnections, envoyLimit) + or(l.MaxPendingRequests, envoyLimit); most < 0 || n < most {
			most = n
		}
	}
	over := "ge"
	if used == "be_conn" { // of the backend itself, which counts this request already
		over = "gt"
	}
	if most >= 0 {
		b.add(`http-request return status 503 content-type text/plain string "upstream limit reached" hdr x-envoy-overloaded true if { %s %s %d }`, used, over, most)
	}
}

// envoyLimit is Envoy's default for each limit, which applies where only another limit is set.
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

// uploads keeps HAProxy 2.6 from counting a pause in an upload as silence of the server. For an
// upload the server's timeout is 5 minutes at least, also for the answer, as nothing can
// shorten it again once the upload is complete.
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

// idList writes the expected identities. It is never empty: "nobody" is no server's identity.
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

// assign gives every endpoint that needs a slot one, and completes the backends with their
// servers. A pool that is complete and already counted by the ledger costs nothing.
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
	ids20 := hashIDs(g, t)
	for i := range t.Endpoints {
		e := &t.Endpoints[i]
		s := Server{Name: e.Name, Weight: min(max(e.Weight, 1), 256), MaxConn: queued(g, maxConn(g, t))}
		if t.Dial.How == connect.Outside {
			s.Address, s.Options = net.JoinHostPort(e.Address, strconv.Itoa(e.Port)), p.serverOptions
		} else if p.class != nil {
			s.Slot = Slot{Class: sec.class, ID: ids[i]}
			s.Address = "unix@" + f.path(SlotSocket(s.Slot))
			if g.Protocol.IsHTTP2() {
				s.Options = " proto h2"
			}
		} else {
			s.Address = net.JoinHostPort(e.Address, strconv.Itoa(e.Port))
			s.Options = f.tlsOptions(Class{Leaf: t.Dial.Leaf, Bundle: t.Dial.Bundle})
		}
		s.Options += serverExtras(g, net.JoinHostPort(e.Address, strconv.Itoa(e.Port)))
		if ids20 != nil {
			s.Options += " id " + strconv.Itoa(ids20[i])
			s.Weight = min(16*s.Weight, 256) // so many points in the ring
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

// hashIDs are the IDs that place servers in the hash ring. They are made from the address, so
// that every sidecar places an endpoint alike; HAProxy takes 20 bits. nil: the group does not
// hash.
func hashIDs(g *connect.Group, t *connect.Target) []int {
	if g.Balance.Policy != connect.Hash {
		return nil
	}
	const most = 1<<20 - 1
	out := make([]int, len(t.Endpoints))
	taken := map[int]bool{}
	for i := range t.Endpoints {
		e := &t.Endpoints[i]
		sum := sha256.Sum256([]byte(net.JoinHostPort(e.Address, strconv.Itoa(e.Port))))
		n := int(binary.BigEndian.Uint32(sum[:4])%most) + 1
		for taken[n] {
			n = n%most + 1
		}
		taken[n], out[i] = true, n
	}
	return out
}
