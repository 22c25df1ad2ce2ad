package render

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

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
