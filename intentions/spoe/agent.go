// Package spoe is the agent that HAProxy asks "may this caller?", over its
// stream processing offload protocol (SPOP 2.0, HAProxy's doc/SPOE.txt).
//
// Invariants: an answer is computed from the Policy of one generation, read once;
// whatever cannot be understood is answered with a deny or with a closed
// connection, which HAProxy's rules treat as a deny; memory is bounded for any
// input; a cached answer costs no allocation, and no lock but that of the shard
// which remembers the caller. A certificate is parsed by crypto/x509, never searched.
//
// It may import intentions and certs. haproxy/render uses its names; only cmd runs it.
package spoe

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Names that the rendered configuration and the agent share.
const (
	MessageConnection  = "connection" // asked once per connection and policy generation
	MessageRequest     = "request"    // asked per request when the intention has permissions
	ArgCert            = "cert"       // the caller's certificate, DER
	ArgMethod          = "method"
	ArgPath            = "path"
	ArgHeaders         = "headers" // req.hdrs_bin
	ArgSource          = "src"     // the caller's address and port, to find its session again
	ArgPort            = "port"
	ArgDestination     = "dst" // our address and port: the caller's alone do not identify a connection
	ArgDestinationPort = "dst_port"
	ArgServerName      = "sni" // that the caller sent
	// ArgChain carries the rest of the caller's chain, concatenated DER. Its presence, even
	// empty, asks for VarXFCC.
	ArgChain = "chain"
	ArgQuery = "query"

	// Variables that the agent sets; HAProxy puts the agent's prefix before them. Session scope:
	VarVerdict    = "verdict"    // Allow, Deny or Ask
	VarGeneration = "generation" // of the policy that decided
	VarSource     = "source"     // SPIFFE ID of the caller
	VarService    = "service"    // its service name
	VarRule       = "rule"
	VarReason     = "reason" // in words
	VarXFCC       = "xfcc"   // what X-Forwarded-Client-Cert says of the caller, without By
	// Transaction scope; intentions.Provider.Variable names that of a verified token's payload:
	VarRequestVerdict = "request_verdict" // Allow or Deny
	VarRequestRule    = "request_rule"
	VarRequestReason  = "request_reason"
	// Only of a request that our mesh gateway passes on for a peer's service:
	VarRequestSource  = "request_source"  // that service's SPIFFE ID
	VarRequestService = "request_service" // and its name

	Allow = "allow"
	Deny  = "deny"
	Ask   = "ask"
)

// Counter counts one kind of answer.
type Counter interface{ Inc() }

// Options of an Agent. The zero value is usable.
type Options struct {
	Log *slog.Logger
	// Count returns the counter of an answer. It is called when an answer is cached, not for
	// each question. Nil counts nothing.
	Count func(source string, d intentions.Decision) Counter
	// Tokens verifies what intentions may require. Nil: a required token is never there.
	Tokens intentions.Tokens
	// Crowded is called when so many callers are remembered that Forget should be called soon.
	// It must not block.
	Crowded func()
	// Denied is told the first deny of each source, rule and generation.
	Denied func(source string, d intentions.Decision)
}

const (
	maxConns    = 4096 // HAProxy opens at most a few per thread; this bounds a hostile peer
	maxAnswers  = 4096 // cached answers per connection to HAProxy
	maxHeaders  = 512
	maxReported = 1024
	maxHello    = 16380 // bytes of the first frame
	helloWait   = 5 * time.Second
	writeWait   = 2 * time.Second
)

// Agent answers for the current Policy. Use New.
type Agent struct {
	opt     Options
	current atomic.Pointer[epoch]
	conns   atomic.Int64

	mu       sync.Mutex
	reported map[string]bool

	callers [64]callers // shards by the caller's port, so that connections seldom wait for each other
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
	a := &Agent{opt: o, reported: map[string]bool{}}
	a.current.Store(&epoch{policy: &intentions.Policy{}, generation: "none"})
	return a
}

// SetPolicy replaces the policy. generation identifies what it says: HAProxy asks again where it
// holds a verdict of another generation, and keeps one of the same, even from an earlier process.
func (a *Agent) SetPolicy(p *intentions.Policy, generation string) {
	a.current.Store(&epoch{policy: p, generation: generation})
	a.mu.Lock()
	clear(a.reported)
	a.mu.Unlock()
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

func (a *Agent) serveConn(nc net.Conn) error {
	r := bufio.NewReaderSize(nc, maxHello+4)
	c := a.newConn()
	if err := nc.SetDeadline(time.Now().Add(helloWait)); err != nil {
		return err
	}
	f, err := readFrame(r, make([]byte, maxHello))
	if err != nil {
		return err
	}
	reply, size, check, err := hello(f)
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
	// HAProxy sends nothing before it has read the answer, so that nothing is buffered.
	r = bufio.NewReaderSize(nc, size+4)
	buf := make([]byte, size)
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
		if r.Buffered() > 0 && len(c.out) < maxHello {
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

// hello answers HAPROXY-HELLO. size is the longest frame that either side may send. check is
// true if HAProxy only tests that the agent is alive.
func hello(f frame) (reply []byte, size int, check bool, err error) {
	if f.kind != frameHAProxyHello || f.flags&flagFin == 0 {
		return nil, 0, false, errors.New("the first frame is not a whole HAPROXY-HELLO")
	}
	version, offered := false, uint64(0)
	if _, err := eachPair(f.payload, -1, func(k []byte, v value) {
		switch string(k) {
		case "supported-versions":
			for one := range strings.SplitSeq(string(v.bytes), ",") {
				major, _, _ := strings.Cut(strings.TrimSpace(one), ".")
				version = version || major == "2"
			}
		case "max-frame-size":
			offered = v.num
		case "healthcheck":
			check = v.kind == typeBool && v.num == 1
		}
	}); err != nil {
		return nil, 0, false, err
	}
	if !version {
		return nil, 0, false, errors.New("HAProxy does not offer SPOP version 2")
	}
	if offered < 256 {
		return nil, 0, false, errors.New("max-frame-size below 256")
	}
	size = int(min(offered, maxFrame))
	b := beginFrame(nil, frameAgentHello, 0, 0)
	b = appendString(appendText(b, "version"), "2.0")
	b = append(appendText(b, "max-frame-size"), typeUint32)
	b = appendVarint(b, uint64(size))
	b = appendString(appendText(b, "capabilities"), "pipelining")
	return endFrame(b, 0), size, check, nil
}

func disconnect(status uint64, message string) []byte {
	b := beginFrame(nil, frameAgentDisconnect, 0, 0)
	b = appendVarint(append(appendText(b, "status-code"), typeUint32), status)
	b = appendString(appendText(b, "message"), message)
	return endFrame(b, 0)
}
