package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
)

// revocations ends what is open of callers that the policy denies now: after each change
// of the policy, after each change of HAProxy's worker, and after a failure again, until
// one pass over all workers had none.
type revocations struct {
	log    *slog.Logger
	dir    string
	agent  *spoe.Agent
	proc   *process.Process
	newest func() *connect.Snapshot
	maxAge time.Duration // of a caller's connection; 0: none
	wake   chan struct{}

	ended   atomic.Uint64
	errors  atomic.Uint64
	pending atomic.Bool // a pass is due, or has failed and will be repeated

	// Only Run's goroutine:
	judged    *intentions.Policy // that of the last complete pass
	inherited string             // its digest, when a predecessor made that pass
	told      string
	forbidden bool // it was said that idle connections cannot be ended
}

// Times between passes that fail.
const (
	revokeAgain  = 200 * time.Millisecond
	revokeLast   = 10 * time.Second
	revokePass   = 10 * time.Second // of one pass
	revokeWorker = 3 * time.Second  // of all workers' sessions: what is left is for the next pass
)

// judgedFile holds the digest of the policy by which all open sessions were judged. A
// successor reads it: it does not know who the callers of the sessions are that it finds.
const judgedFile = "judged"

// Due says that a pass will be due, before anybody is answered by the new policy.
func (r *revocations) Due() { r.pending.Store(true) }

// Wake asks for a pass.
func (r *revocations) Wake() {
	r.Due()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run works until ctx ends.
func (r *revocations) Run(ctx context.Context) {
	var aged <-chan time.Time
	if r.maxAge > 0 {
		t := time.NewTicker(min(max(r.maxAge/10, time.Second), time.Minute))
		defer t.Stop()
		aged = t.C
	}
	again := time.NewTimer(time.Hour)
	again.Stop()
	defer again.Stop()
	wait := revokeAgain
	for {
		old := false
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
			wait = revokeAgain
		case <-again.C:
		case <-aged:
			old = true
		}
		if !r.due() { // nobody can be here, and a start of HAProxy wakes us
			r.pending.Store(false)
			continue
		}
		r.pending.Store(true)
		err := r.pass(ctx, old)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			again.Stop()
			r.pending.Store(len(r.wake) > 0)
			if r.told != "" {
				r.told = ""
				r.log.Info("everything that is open was judged by the policy in force")
			}
			continue
		}
		r.errors.Add(1)
		if text := err.Error(); text != r.told && r.proc.Up() {
			r.told = text
			r.log.Warn("cannot end everything that is open of callers that are denied now; trying again", "error", err,
				"try", "does HAProxy answer on its sockets, and is the limit of open files high enough?")
		}
		again.Reset(wait)
		wait = min(2*wait, revokeLast)
	}
}

// due reports whether there is anything to judge. While HAProxy does not run there is
// nothing; its start wakes us.
func (r *revocations) due() bool {
	snap := r.newest()
	if snap == nil || snap.Public() == nil || !r.proc.Up() && !r.proc.Inherits() {
		return false
	}
	return true
}

// inherit reads by what policy a predecessor has judged the sessions of its HAProxy.
func (r *revocations) inherit() {
	if b, err := os.ReadFile(filepath.Join(r.dir, judgedFile)); err == nil {
		r.inherited = string(b)
	}
}

func (r *revocations) pass(ctx context.Context, old bool) error {
	snap, policy := r.newest(), r.agent.Policy()
	if r.judged == nil && r.inherited == policy.Digest() {
		r.judged = policy
	}
	ctx, cancel := context.WithTimeout(ctx, revokePass)
	defer cancel()
	workers, err := r.proc.Workers(ctx)
	public := snap.Public()
	http := public.Protocol().IsHTTP()
	judge := func(from netip.AddrPort, pending bool) haproxy.Verdict {
		switch r.agent.Judge(from, pending, r.judged) {
		case spoe.Ends:
			return haproxy.End
		case spoe.Unknown: // it was judged with the others, if the policy is the same
			if r.judged != policy {
				return haproxy.End
			}
		case spoe.EndsTunnels:
			return haproxy.EndTunnel
		}
		return haproxy.Keep
	}
	ofSessions := judge
	if old && !http { // a request that has begun is not cut for the age of its connection
		ofSessions = func(from netip.AddrPort, pending bool) haproxy.Verdict {
			if r.tooOld(from) {
				return haproxy.End
			}
			return judge(from, pending)
		}
	}
	ended, live, e := r.endSessions(ctx, workers, ofSessions)
	err = errors.Join(err, e)
	if r.judged != policy && r.agent.AnyDenied() {
		if n := r.proc.EndLost(); n > 0 {
			r.log.Warn("ended a HAProxy that no command reaches, as it may have sessions of a caller that is denied now", "processes", n)
		}
	}
	if http { // a connection between two requests is no session
		idle, e := process.EndConnections(workers, public.Bind.Port, func(w process.Worker, from netip.AddrPort) bool {
			// One that nobody is known of may be new, but not in a worker that accepts no more.
			if live[from] || judge(from, !w.Old) != haproxy.End && !(old && r.tooOld(from)) {
				live[from] = true
				return false
			}
			return true
		})
		ended += idle
		err = errors.Join(err, r.permitted(e))
	}
	r.ended.Add(uint64(ended))
	if ended > 0 {
		r.log.Info("ended open sessions of callers that are denied now, or whose connection is too old", "sessions", ended)
	}
	if err != nil {
		return err
	}
	r.agent.Forget(live) // only now is all known that lives
	if r.judged != policy || r.inherited != "" {
		r.judged, r.inherited = policy, ""
		return certs.WriteFile(filepath.Join(r.dir, judgedFile), []byte(policy.Digest()), 0o600)
	}
	return nil
}

// endSessions asks all workers at once: one that hangs keeps none of the others waiting. One
// that was replaced is told the generation of the policy first.
func (r *revocations) endSessions(ctx context.Context, workers []process.Worker, judge func(netip.AddrPort, bool) haproxy.Verdict) (ended int, live map[netip.AddrPort]bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, revokeWorker)
	defer cancel()
	live = map[netip.AddrPort]bool{}
	var mu sync.Mutex
	var all sync.WaitGroup
	for _, w := range workers {
		all.Go(func() {
			var told error
			if w.Old {
				told = haproxy.TellGeneration(ctx, w.Do, r.dir, r.agent.Generation())
			}
			n, stay, e := haproxy.EndSessions(ctx, w.Do, judge)
			mu.Lock()
			defer mu.Unlock()
			ended, err = ended+n, errors.Join(err, told, e)
			for _, from := range stay {
				live[from] = true
			}
		})
	}
	all.Wait()
	return ended, live, err
}

// permitted tells once what will never work, and passes on what may work again.
func (r *revocations) permitted(err error) error {
	if !errors.Is(err, process.ErrNotPermitted) {
		return err
	}
	if !r.forbidden {
		r.forbidden = true
		r.log.Warn("idle connections of callers that are denied now stay open; what they ask next is denied", "error", err,
			"try", "a worker of another user needs the capability CAP_SYS_PTRACE")
	}
	return nil
}

func (r *revocations) tooOld(from netip.AddrPort) bool {
	since, ok := r.agent.Since(from)
	return ok && r.maxAge > 0 && time.Since(since) > r.maxAge
}
