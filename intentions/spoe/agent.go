// Package spoe is the agent that HAProxy asks "may this caller?", over its
// stream processing offload protocol (SPOP 2.0, HAProxy's doc/SPOE.txt).
//
// Invariants: an answer is computed from the Policy of one generation, read once;
// whatever cannot be understood is answered with a deny or with a closed
// connection, which HAProxy's rules treat as a deny; memory is bounded for any
// input; the way from question to cached answer takes no lock and allocates
// nothing. A certificate is parsed by crypto/x509, never searched.
//
// It may import intentions and certs; only cmd wires it.
package spoe

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Names that the rendered configuration and the agent share.
const (
	MessageConnection = "connection" // asked once per connection and policy generation
	MessageRequest    = "request"    // asked per request when the intention has permissions
	ArgCert           = "cert"       // the caller's certificate, DER
	ArgMethod         = "method"
	ArgPath           = "path"
	ArgHeaders        = "headers" // req.hdrs_bin
	ArgSource         = "src"     // the caller's address and port, to find its session again
	ArgPort           = "port"
	ArgChain          = "chain" // more certificates of the caller, DER, one after the other; also none wants VarXFCC
	ArgQuery          = "query"

	// Variables, in HAProxy under the prefix of the agent. Session scope:
	VarVerdict    = "verdict"    // Allow, Deny or Ask
	VarGeneration = "generation" // of the policy that decided
	VarSource     = "source"     // SPIFFE ID of the caller
	VarService    = "service"    // its service name
	VarRule       = "rule"
	VarReason     = "reason" // in words
	VarXFCC       = "xfcc"   // what X-Forwarded-Client-Cert says of the caller, without By
	// Transaction scope; the payload of a verified token is in intentions.Provider.Variable:
	VarRequestVerdict = "request_verdict" // Allow or Deny
	VarRequestRule    = "request_rule"
	VarRequestReason  = "request_reason"

	Allow = "allow"
	Deny  = "deny"
	Ask   = "ask"
)

// Counter counts one kind of answer.
type Counter interface{ Inc() }

// Options of an Agent. The zero value is usable.
type Options struct {
	Log *slog.Logger
	// Count returns the counter of an answer; it is asked once per answer and
	// generation, not per question. Nil counts nothing.
	Count func(source string, d intentions.Decision) Counter
	// Tokens verifies what intentions may require. Nil: a required token is never there.
	Tokens intentions.Tokens
	// Crowded asks for Forget: many addresses are remembered. It must not block.
	Crowded func()
	// Denied is told the first deny of each source, rule and generation.
	Denied func(source string, d intentions.Decision)
}

const (
	maxConns    = 4096 // HAProxy opens at most a few per thread; this bounds a hostile peer
	maxAnswers  = 4096 // cached answers per connection to HAProxy
	maxHeaders  = 512
	maxReported = 1024
	helloWait   = 5 * time.Second
	writeWait   = 2 * time.Second
)

// Agent answers for the current Policy. Use New.
type Agent struct {
	opt     Options
	epoch   string
	current atomic.Pointer[epoch]
	count   atomic.Uint64
	conns   atomic.Int64

	mu       sync.Mutex
	reported map[string]bool

	callers [64]callers // by address, so that connections do not wait for each other
}

// callers remembers who connected from which address, bounded.
type callers struct {
	mu      sync.Mutex
	by, old map[netip.AddrPort]known // old: what by was when it was full
}

type known struct {
	id    certs.SPIFFEID
	since time.Time
}

func (c *callers) get(from netip.AddrPort) (known, bool) {
	who, ok := c.by[from]
	if !ok {
		who, ok = c.old[from]
	}
	return who, ok
}

const maxCallers = 4096 // in each of the parts

func (a *Agent) callersOf(from netip.AddrPort) *callers { return &a.callers[from.Port()%64] }

// remember keeps who connected from an address until somebody else does.
func (a *Agent) remember(from netip.AddrPort, id certs.SPIFFEID) {
	c := a.callersOf(from)
	c.mu.Lock()
	defer c.mu.Unlock()
	if who, ok := c.by[from]; ok && who.id == id {
		return
	}
	since := time.Now()
	if who, ok := c.old[from]; ok && who.id == id {
		since = who.since
	}
	if c.by == nil || len(c.by) >= maxCallers {
		c.by, c.old = map[netip.AddrPort]known{}, c.by
	}
	c.by[from] = known{id, since}
	if len(c.by) == maxCallers/2 && a.opt.Crowded != nil {
		a.opt.Crowded()
	}
}

// Denied reports whether the policy in force denies the session from this address.
// A session of which nothing is known is denied, as who called must not be guessed,
// unless it still waits to be let in: then the question is yet to come.
func (a *Agent) Denied(from netip.AddrPort, waits bool) bool {
	who, ok := a.caller(from)
	if !ok {
		return !waits
	}
	d := a.Policy().Decide(who.id, nil)
	return !d.Allow && !d.PerRequest
}

// Since is when the caller from this address was first asked about; ok is false if
// that is not known.
func (a *Agent) Since(from netip.AddrPort) (since time.Time, ok bool) {
	who, ok := a.caller(from)
	return who.since, ok
}

func (a *Agent) caller(from netip.AddrPort) (known, bool) {
	c := a.callersOf(from)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.get(from)
}

// Forget drops every address but those of sessions that live.
func (a *Agent) Forget(live map[netip.AddrPort]bool) {
	for i := range a.callers {
		c := &a.callers[i]
		c.mu.Lock()
		if len(c.by)+len(c.old) >= maxCallers/2 {
			keep := map[netip.AddrPort]known{}
			for from := range live {
				if who, ok := c.get(from); ok && a.callersOf(from) == c {
					keep[from] = who
				}
			}
			c.by, c.old = keep, nil
		}
		c.mu.Unlock()
	}
}

// epoch is one policy with its generation.
type epoch struct {
	policy     *intentions.Policy
	generation string
}

// New makes an agent that denies everybody until SetPolicy.
func New(o Options) *Agent {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	a := &Agent{opt: o, epoch: hex.EncodeToString(b[:]), reported: map[string]bool{}}
	a.current.Store(&epoch{policy: &intentions.Policy{}, generation: a.epoch + "-0"})
	return a
}

// SetPolicy swaps the policy and returns the name of its generation, which no
// other run of any agent uses: verdicts of other generations are stale.
func (a *Agent) SetPolicy(p *intentions.Policy) string {
	e := &epoch{policy: p, generation: a.epoch + "-" + strconv.FormatUint(a.count.Add(1), 10)}
	a.current.Store(e)
	a.mu.Lock()
	clear(a.reported)
	a.mu.Unlock()
	return e.generation
}

// Generation names the policy in force.
func (a *Agent) Generation() string { return a.current.Load().generation }

// Policy is the one in force.
func (a *Agent) Policy() *intentions.Policy { return a.current.Load().policy }

// Serve answers on ln until ctx ends, then closes ln and every connection and
// returns when their goroutines have. It returns nil after ctx ended.
func (a *Agent) Serve(ctx context.Context, ln net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	pause := 5 * time.Millisecond
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("authorization socket: %w", err)
			}
			// Descriptors may have run out: wait, or the loop would spin.
			a.opt.Log.Warn("authorization socket cannot accept", "error", err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
			pause = min(2*pause, time.Second)
			continue
		}
		pause = 5 * time.Millisecond
		if a.conns.Add(1) > maxConns {
			a.conns.Add(-1)
			c.Close()
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer a.conns.Add(-1)
			unhook := context.AfterFunc(ctx, func() { c.Close() })
			defer unhook()
			defer c.Close()
			if err := a.serveConn(c); err != nil && ctx.Err() == nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				a.opt.Log.Debug("authorization connection ended", "error", err)
			}
		}()
	}
}

// answer is what one certificate gets within one generation.
type answer struct {
	actions []byte
	id      certs.SPIFFEID
	source  string
	valid   bool // the certificate has an identity
	counter Counter
	byRule  map[intentions.Decision]Counter // of its requests
}

// count counts a request's verdict; the counter is looked up once per rule.
func (ans *answer) count(a *Agent, d intentions.Decision) {
	c, ok := ans.byRule[d]
	if !ok {
		if ans.byRule == nil {
			ans.byRule = map[intentions.Decision]Counter{}
		}
		c = a.counter(ans.source, d)
		ans.byRule[d] = c
	}
	c.Inc()
}

// conn is the state of one connection; only its goroutine touches it.
type conn struct {
	agent   *Agent
	epoch   *epoch
	answers map[[sha256.Size]byte]*answer
	request intentions.Request
	out     []byte
	hash    hash.Hash
}

func (a *Agent) newConn() *conn {
	return &conn{agent: a, answers: map[[sha256.Size]byte]*answer{}, request: intentions.Request{Tokens: a.opt.Tokens}, out: make([]byte, 0, 1024), hash: sha256.New()}
}

func (a *Agent) serveConn(nc net.Conn) error {
	r := bufio.NewReaderSize(nc, maxFrame+4)
	buf := make([]byte, maxFrame)
	c := a.newConn()
	if err := nc.SetDeadline(time.Now().Add(helloWait)); err != nil {
		return err
	}
	f, err := readFrame(r, buf)
	if err != nil {
		return err
	}
	reply, check, err := hello(f)
	if err != nil {
		_, _ = nc.Write(disconnect(statusInvalid, err.Error()))
		return err
	}
	if _, err := nc.Write(reply); err != nil || check {
		return err
	}
	if err := nc.SetDeadline(time.Time{}); err != nil {
		return err
	}
	for {
		f, err := readFrame(r, buf)
		if err != nil {
			return err
		}
		switch f.kind {
		case frameNotify:
			c.out, err = c.notify(c.out, f)
			if err != nil {
				_, _ = nc.Write(disconnect(statusInvalid, err.Error()))
				return err
			}
		case frameHAProxyDisconnect:
			_, _ = nc.Write(disconnect(statusNormal, "normal"))
			return nil
		default:
			return fmt.Errorf("unexpected frame of type %d", f.kind)
		}
		// Answer a burst with one write, but never wait for more of it.
		if r.Buffered() > 0 && len(c.out) < maxFrame {
			continue
		}
		if err := nc.SetWriteDeadline(time.Now().Add(writeWait)); err != nil {
			return err
		}
		if _, err := nc.Write(c.out); err != nil {
			return err
		}
		c.out = c.out[:0]
	}
}

// hello answers HAPROXY-HELLO. check: HAProxy only tests that we are alive.
func hello(f frame) (reply []byte, check bool, err error) {
	if f.kind != frameHAProxyHello || f.flags&flagFin == 0 {
		return nil, false, errors.New("the first frame is not a whole HAPROXY-HELLO")
	}
	version, size := false, uint64(0)
	if _, err := eachPair(f.payload, -1, func(k []byte, v value) {
		switch string(k) {
		case "supported-versions":
			for one := range strings.SplitSeq(string(v.bytes), ",") {
				major, _, _ := strings.Cut(strings.TrimSpace(one), ".")
				version = version || major == "2"
			}
		case "max-frame-size":
			size = v.num
		case "healthcheck":
			check = v.kind == typeBool && v.num == 1
		}
	}); err != nil {
		return nil, false, err
	}
	if !version {
		return nil, false, errors.New("HAProxy does not offer SPOP version 2")
	}
	if size < 256 {
		return nil, false, errors.New("max-frame-size below 256")
	}
	b := beginFrame(nil, frameAgentHello, 0, 0)
	b = appendString(appendText(b, "version"), "2.0")
	b = append(appendText(b, "max-frame-size"), typeUint32)
	b = appendVarint(b, min(size, maxFrame))
	b = appendString(appendText(b, "capabilities"), "pipelining")
	return endFrame(b, 0), check, nil
}

func disconnect(status uint64, message string) []byte {
	b := beginFrame(nil, frameAgentDisconnect, 0, 0)
	b = appendVarint(append(appendText(b, "status-code"), typeUint32), status)
	b = appendString(appendText(b, "message"), message)
	return endFrame(b, 0)
}

// notify appends the ACK of one NOTIFY to out.
func (c *conn) notify(out []byte, f frame) ([]byte, error) {
	if f.flags&flagFin == 0 || f.flags&flagAbort != 0 {
		return out, errors.New("fragmented frame: never offered")
	}
	// One generation answers the whole frame.
	if now := c.agent.current.Load(); now != c.epoch {
		c.epoch = now
		clear(c.answers)
	}
	from := len(out)
	out = beginFrame(out, frameAck, f.stream, f.id)
	for rest := f.payload; len(rest) > 0; {
		name, after, ok := text(rest)
		if !ok || len(after) == 0 {
			return out[:from], errShort
		}
		n := int(after[0])
		var m message
		var err error
		rest, err = eachPair(after[1:], n, m.set)
		if err != nil {
			return out[:from], err
		}
		switch string(name) {
		case MessageConnection:
			ans := c.answer(m.cert, m.chain, m.xfcc)
			ans.counter.Inc()
			if ans.valid && m.src.IsValid() {
				c.agent.remember(netip.AddrPortFrom(m.src, m.port), ans.id)
			}
			out = append(out, ans.actions...)
		case MessageRequest:
			out = c.perRequest(out, &m)
		default:
			return out[:from], fmt.Errorf("unknown message %.40q", name)
		}
	}
	return endFrame(out, from), nil
}

type message struct {
	cert, chain, method, path, query, headers []byte
	xfcc                                      bool
	src                                       netip.Addr
	port                                      uint16
}

func (m *message) set(key []byte, v value) {
	switch string(key) {
	case ArgCert:
		m.cert = v.bytes
	case ArgMethod:
		m.method = v.bytes
	case ArgPath:
		m.path = v.bytes
	case ArgHeaders:
		m.headers = v.bytes
	case ArgChain:
		m.chain, m.xfcc = v.bytes, true
	case ArgQuery:
		m.query = v.bytes
	case ArgSource:
		if addr, ok := netip.AddrFromSlice(v.bytes); ok && (v.kind == typeIPv4 || v.kind == typeIPv6) {
			m.src = addr.Unmap()
		}
	case ArgPort:
		m.port = uint16(v.num)
	}
}

// answer finds or makes the answer for a certificate, and for the chain it came with
// if X-Forwarded-Client-Cert is wanted.
func (c *conn) answer(der, chain []byte, forward bool) *answer {
	var key [sha256.Size]byte
	c.hash.Reset()
	c.hash.Write(der)
	if forward {
		c.hash.Write(forwarded)
		c.hash.Write(chain)
	}
	c.hash.Sum(key[:0])
	if ans, ok := c.answers[key]; ok {
		return ans
	}
	if len(c.answers) >= maxAnswers {
		clear(c.answers)
	}
	ans := &answer{}
	var d intentions.Decision
	cert, id, err := identity(der)
	if err != nil {
		d = intentions.Decision{Rule: "identity", Reason: err.Error()}
	} else {
		ans.id, ans.valid, ans.source = id, true, id.String()
		d = c.epoch.policy.Decide(id, nil)
	}
	verdict := Deny
	switch {
	case d.PerRequest:
		verdict = Ask
	case d.Allow:
		verdict = Allow
	}
	b := appendSetVar(nil, scopeSession, VarVerdict, verdict)
	b = appendSetVar(b, scopeSession, VarGeneration, c.epoch.generation)
	b = appendSetVar(b, scopeSession, VarSource, ans.source)
	b = appendSetVar(b, scopeSession, VarService, ans.id.Service)
	b = appendSetVar(b, scopeSession, VarReason, sentence(d.Reason))
	if ans.valid && forward {
		b = appendSetVar(b, scopeSession, VarXFCC, xfcc(cert, chain, ans.source))
	}
	ans.actions = appendSetVar(b, scopeSession, VarRule, printable(d.Rule))
	ans.counter = c.agent.counter(ans.source, d)
	if verdict == Deny {
		c.agent.report(c.epoch, ans.source, d)
	}
	c.answers[key] = ans
	return ans
}

// forwarded tells answers with X-Forwarded-Client-Cert from those without.
var forwarded = []byte("forwarded")

// maxPayloads bounds what tokens add to one frame.
const maxPayloads = 12 << 10

func (c *conn) perRequest(out []byte, m *message) []byte {
	ans := c.answer(m.cert, nil, false)
	d := intentions.Decision{Rule: "identity", Reason: "the certificate has no service identity"}
	from := len(out)
	if ans.valid {
		// The strings alias the frame, which outlives the decision and nothing else.
		c.request.Method, c.request.Path, c.request.Query = alias(m.method), alias(m.path), alias(m.query)
		if parseHeaders(m.headers, &c.request) {
			if d = c.epoch.policy.Decide(ans.id, &c.request); d.Allow {
				out = c.payloads(out)
			}
		} else {
			d = intentions.Decision{Rule: "headers", Reason: "the request's headers cannot be read"}
		}
	}
	if len(out)-from > maxPayloads {
		out, d = out[:from], intentions.Decision{Rule: "tokens", Reason: "the payloads of the request's tokens are too long"}
	}
	ans.count(c.agent, d)
	if d.Allow {
		out = appendSetVar(out, scopeTransaction, VarRequestVerdict, Allow)
	} else {
		if ans.valid && d.Rule != "headers" && d.Rule != "tokens" {
			d.Reason = c.epoch.policy.Explain(ans.id, &c.request)
		}
		c.agent.report(c.epoch, ans.source, d)
		out = appendSetVar(out, scopeTransaction, VarRequestVerdict, Deny)
		out = appendSetVar(out, scopeTransaction, VarRequestReason, sentence(d.Reason))
	}
	return appendSetVar(out, scopeTransaction, VarRequestRule, printable(d.Rule))
}

// payloads tells HAProxy what the verified tokens of a request say.
func (c *conn) payloads(out []byte) []byte {
	for _, p := range c.epoch.policy.Providers() {
		if c.request.Tokens == nil {
			break
		}
		if t, _ := c.request.Tokens.Token(p, &c.request); t != nil {
			payload := t.Payload
			if p.Pad {
				payload += "==="[:(4-len(payload)%4)%4]
			}
			out = appendSetVar(out, scopeTransaction, p.Variable(), payload)
		}
	}
	return out
}

// xfcc is Envoy's element of X-Forwarded-Client-Cert from Hash on (Envoy's docs:
// config/http/http_conn_man/headers), for a caller whose chain HAProxy has verified.
func xfcc(cert *x509.Certificate, chain []byte, uri string) string {
	sum := sha256.Sum256(cert.Raw)
	var b strings.Builder
	fmt.Fprintf(&b, `Hash=%x;Cert="%s";Chain="`, sum, encoded(cert.Raw))
	b.WriteString(encoded(cert.Raw))
	if list, err := x509.ParseCertificates(chain); err == nil {
		for _, one := range list {
			if !one.Equal(cert) { // a server's TLS library leaves the leaf out
				b.WriteString(encoded(one.Raw))
			}
		}
	}
	fmt.Fprintf(&b, `";Subject="%s";URI=%s`, printable(cert.Subject.String()), uri)
	for _, name := range cert.DNSNames {
		b.WriteString(";DNS=" + printable(name))
	}
	if b.Len() > maxPayloads {
		return fmt.Sprintf("Hash=%x;URI=%s", sum, uri)
	}
	return b.String()
}

// encoded is a certificate as PEM, escaped for a URL as Envoy does.
func encoded(der []byte) string {
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return strings.NewReplacer("\n", "%0A", " ", "%20", "+", "%2B", "/", "%2F", "=", "%3D").Replace(text)
}

// identity parses the caller's certificate; HAProxy has verified its chain.
func identity(der []byte) (*x509.Certificate, certs.SPIFFEID, error) {
	if len(der) == 0 {
		return nil, certs.SPIFFEID{}, errors.New("no client certificate")
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, certs.SPIFFEID{}, errors.New("the client certificate cannot be parsed")
	}
	id, err := certs.FromCertificate(cert)
	return cert, id, err
}

// parseHeaders reads req.hdrs_bin: name and value, each with its length, ended by
// two empty strings. More lines than maxHeaders cannot be judged.
func parseHeaders(b []byte, r *intentions.Request) bool {
	r.Headers = r.Headers[:0]
	for {
		name, rest, ok := text(b)
		if !ok {
			return false
		}
		val, rest, ok := text(rest)
		if !ok {
			return false
		}
		if len(name) == 0 && len(val) == 0 {
			return len(rest) == 0
		}
		if len(r.Headers) == maxHeaders {
			return false
		}
		r.Headers = append(r.Headers, intentions.Header{Name: alias(name), Value: alias(val)})
		b = rest
	}
}

func alias(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

type nothing struct{}

func (nothing) Inc() {}

func (a *Agent) counter(source string, d intentions.Decision) Counter {
	if a.opt.Count == nil {
		return nothing{}
	}
	return a.opt.Count(source, d)
}

// report tells each kind of deny once per generation.
func (a *Agent) report(e *epoch, source string, d intentions.Decision) {
	if a.opt.Denied == nil {
		return
	}
	key := e.generation + " " + d.Rule + " " + source
	a.mu.Lock()
	first := !a.reported[key] && len(a.reported) < maxReported
	if first {
		a.reported[key] = true
	}
	a.mu.Unlock()
	if first {
		a.opt.Denied(source, d)
	}
}

// sentence keeps a reason, which quotes Consul, fit for a log line and a header.
func sentence(s string) string {
	words := strings.FieldsFunc(s, func(r rune) bool { return r == ' ' })
	for i := range words {
		words[i] = printable(words[i])
	}
	s = strings.Join(words, " ")
	return s[:min(len(s), 400)]
}

// printable keeps text from Consul fit for a log line and a header.
func printable(s string) string {
	clean := func(r rune) rune {
		if r <= ' ' || r > '~' || r == '"' || r == '\\' {
			return '?'
		}
		return r
	}
	if len(s) > 200 {
		s = s[:200]
	}
	return strings.Map(clean, s)
}
