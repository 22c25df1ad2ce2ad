package spoe

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"hash"
	"net/netip"
	"unsafe"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// answer is what one certificate gets within one generation.
type answer struct {
	actions []byte
	id      certs.SPIFFEID
	source  string
	policy  *intentions.Policy // that judged
	valid   bool               // the certificate has an identity
	allowed bool               // or judged per request: the caller may be forwarded
	counter Counter
	byRule  map[counted]Counter // counters of its other verdicts: on requests and server names
}

// counted is a verdict, and whose it is: of a gateway that of who is behind it.
type counted struct {
	source string
	intentions.Decision
}

// maxCounted bounds the counters that one certificate's answer keeps at hand.
const maxCounted = 1024

// count counts a request's verdict; the counter is looked up once per rule.
func (ans *answer) count(a *Agent, source string, d intentions.Decision) {
	key := counted{source, d}
	c, ok := ans.byRule[key]
	if !ok {
		if ans.byRule == nil || len(ans.byRule) >= maxCounted {
			ans.byRule = map[counted]Counter{}
		}
		c = a.counter(source, d)
		ans.byRule[key] = c
	}
	c.Inc()
}

// conn is the state of one connection; only its goroutine touches it.
type conn struct {
	agent     *Agent
	epoch     *epoch
	answers   map[[sha256.Size]byte]*answer
	forwarded map[[sha256.Size]byte][]byte // the action that sets VarXFCC, by certificate and chain
	kept      int                          // bytes in forwarded
	request   intentions.Request
	out       []byte
	hash      hash.Hash
	key       [sha256.Size]byte // the result of digest, here because it needs no allocation then
}

func (a *Agent) newConn() *conn {
	return &conn{agent: a, answers: map[[sha256.Size]byte]*answer{}, forwarded: map[[sha256.Size]byte][]byte{},
		request: intentions.Request{Tokens: a.opt.Tokens}, out: make([]byte, 0, 1024), hash: sha256.New()}
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
	if c.kept > maxForwarded {
		clear(c.forwarded)
		c.kept = 0
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
			out = c.perConnection(out, &m)
		case MessageRequest:
			out = c.perRequest(out, &m)
		default:
			return out[:from], fmt.Errorf("unknown message %.40q", name)
		}
	}
	return endFrame(out, from), nil
}

type message struct {
	cert, chain, method, path, query, headers, serverName []byte
	xfcc                                                  bool
	src, dst                                              netip.Addr
	port, dstPort                                         uint16
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
	case ArgServerName:
		m.serverName = v.bytes
	case ArgSource:
		m.src = v.address()
	case ArgPort:
		m.port = uint16(v.num)
	case ArgDestination:
		m.dst = v.address()
	case ArgDestinationPort:
		m.dstPort = uint16(v.num)
	}
}

// address returns the IP address in a value, or the zero Addr if there is none.
func (v value) address() netip.Addr {
	if addr, ok := netip.AddrFromSlice(v.bytes); ok && (v.kind == typeIPv4 || v.kind == typeIPv6) {
		return addr.Unmap()
	}
	return netip.Addr{}
}

// perConnection judges a connection: by the caller's certificate, and by the name that
// it asked for.
func (c *conn) perConnection(out []byte, m *message) []byte {
	ans := c.answer(m.cert, m.serverName)
	if ans.valid && m.src.IsValid() {
		c.agent.remember(netip.AddrPortFrom(m.src, m.port), netip.AddrPortFrom(m.dst, m.dstPort), who{ans.id, ans.policy.Destination()}, ans.allowed)
	}
	if ans.allowed {
		if d, ok := ans.policy.Accepts(alias(m.serverName), ans.id); !ok {
			ans.count(c.agent, ans.source, d)
			d.Reason += ": " + printable(string(m.serverName))
			c.agent.report(c.epoch, ans.source, d)
			return c.verdict(out, Deny, ans, d)
		}
	}
	ans.counter.Inc()
	out = append(out, ans.actions...)
	// A denied caller's chain is none of our business: it must cost nothing.
	if m.xfcc && ans.allowed {
		out = append(out, c.forward(m.cert, m.chain, ans.source)...)
	}
	return out
}

// verdict appends the actions that tell HAProxy the verdict on a connection.
func (c *conn) verdict(out []byte, verdict string, ans *answer, d intentions.Decision) []byte {
	out = appendSetVar(out, scopeSession, VarVerdict, verdict)
	out = appendSetVar(out, scopeSession, VarGeneration, c.epoch.generation)
	out = appendSetVar(out, scopeSession, VarSource, ans.source)
	out = appendSetVar(out, scopeSession, VarService, ans.id.Service)
	out = appendSetVar(out, scopeSession, VarReason, sentence(d.Reason))
	return appendSetVar(out, scopeSession, VarRule, printable(d.Rule))
}

func (c *conn) digest(der, chain []byte) [sha256.Size]byte {
	c.hash.Reset()
	c.hash.Write(der)
	c.hash.Write(chain)
	c.hash.Sum(c.key[:0])
	return c.key
}

// answer finds or makes the answer for a certificate and, where the policy is of several services, for
// the server name that the caller sent.
func (c *conn) answer(der, serverName []byte) *answer {
	policy := c.epoch.policy
	if policy.Several() {
		policy = policy.For(alias(serverName))
	} else {
		serverName = nil
	}
	key := c.digest(der, serverName)
	if ans, ok := c.answers[key]; ok {
		return ans
	}
	if len(c.answers) >= maxAnswers {
		clear(c.answers)
	}
	ans := &answer{policy: policy}
	var d intentions.Decision
	_, id, err := identity(der)
	if err != nil {
		d = intentions.Decision{Rule: "identity", Reason: err.Error()}
	} else {
		ans.id, ans.valid, ans.source = id, true, id.String()
		d = policy.Decide(id, nil)
	}
	verdict := Deny
	switch {
	case d.PerRequest:
		verdict, ans.allowed = Ask, true
	case d.Allow:
		verdict, ans.allowed = Allow, true
	}
	ans.actions = c.verdict(nil, verdict, ans, d)
	ans.counter = c.agent.counter(ans.source, d)
	if verdict == Deny {
		c.agent.report(c.epoch, ans.source, d)
	}
	c.answers[key] = ans
	return ans
}

// maxPayloads bounds what tokens add to one frame.
const maxPayloads = 12 << 10

func (c *conn) perRequest(out []byte, m *message) []byte {
	ans := c.answer(m.cert, m.serverName)
	d := intentions.Decision{Rule: "identity", Reason: "the certificate has no service identity"}
	from := len(out)
	caller, source := ans.id, ans.source
	if ans.valid {
		// The strings alias the frame's buffer: they are valid only until this frame is answered.
		c.request.Method, c.request.Path, c.request.Query = alias(m.method), alias(m.path), alias(m.query)
		if parseHeaders(m.headers, &c.request) {
			var known bool
			if caller, known = ans.policy.Behind(ans.id, &c.request); !known {
				d = intentions.Decision{Rule: "identity", Reason: "our mesh gateway does not name a peer's service in X-Forwarded-Client-Cert"}
			} else if d = ans.policy.Decide(caller, &c.request); d.Allow {
				out = c.payloads(out)
			}
			if caller != ans.id {
				source = caller.String()
				out = appendSetVar(out, scopeTransaction, VarRequestSource, source)
				out = appendSetVar(out, scopeTransaction, VarRequestService, caller.Service)
			}
		} else {
			d = intentions.Decision{Rule: "headers", Reason: "the request's headers cannot be read"}
		}
	}
	if len(out)-from > maxPayloads {
		out, d = out[:from], intentions.Decision{Rule: "tokens", Reason: "the payloads of the request's tokens are too long"}
	}
	ans.count(c.agent, source, d)
	if d.Allow {
		out = appendSetVar(out, scopeTransaction, VarRequestVerdict, Allow)
	} else {
		if ans.valid && d.Rule != "headers" && d.Rule != "tokens" && d.Rule != "identity" {
			d.Reason = ans.policy.Explain(caller, &c.request)
		}
		c.agent.report(c.epoch, source, d)
		out = appendSetVar(out, scopeTransaction, VarRequestVerdict, Deny)
		out = appendSetVar(out, scopeTransaction, VarRequestReason, sentence(d.Reason))
	}
	return appendSetVar(out, scopeTransaction, VarRequestRule, printable(d.Rule))
}

// payloads appends the actions that give HAProxy the payloads of the request's verified tokens.
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
