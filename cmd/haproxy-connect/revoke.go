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

// revocations ends the open sessions and idle connections of callers that the policy now
// denies. It passes over all workers after each change of the policy and of HAProxy's worker,
// and repeats a pass that fails.
type revocations struct {
	log    *slog.Logger
	dir    string
	agent  *spoe.Agent
	proc   *process.Process
	newest func() *connect.Snapshot
	maxAge time.Duration // the longest life of a caller's connection; 0: unlimited
	wake   chan struct{}

	ended   atomic.Uint64
	errors  atomic.Uint64
	pending atomic.Bool // a pass is due, or has failed and will be repeated

	// Only Run's goroutine uses these:
	judged    *intentions.Policy // the policy of the last complete pass
	inherited string             // the digest of that policy, if a predecessor made the pass
	told      string
	forbidden bool // the log already says that idle connections cannot be ended
}

// Times of a pass.
const (
	revokeAgain  = 200 * time.Millisecond // until a pass that failed is repeated for the first time
	revokeLast   = 10 * time.Second       // the longest wait between repetitions
	revokePass   = 10 * time.Second       // the longest that one pass may take
	revokeWorker = 3 * time.Second        // of it for the sessions of all workers; the next pass takes the rest
)

// judgedFile holds the digest of the policy by which all open sessions were judged. A
// successor reads it, as it does not know the callers of the sessions that it finds.
const judgedFile = "judged"

// Due marks a pass as pending. It is called before the new policy answers anybody, so that no
// status claims that everything was judged by it.
func (r *revocations) Due() { r.pending.Store(true) }

// Outdated marks a pass as pending, as Due does, because of another policy. What a successor would read
// is removed first: sessions that the new policy lets in were not judged by the one before, which may
// come back while nobody is there to judge them.
func (r *revocations) Outdated(by *intentions.Policy) {
	r.Due()
	file := filepath.Join(r.dir, judgedFile)
	if b, err := os.ReadFile(file); err == nil && string(b) == by.Digest() {
		return // a predecessor has judged by this very policy
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		r.log.Warn("a successor may keep sessions that it should end", "error", err, "try", "is the run directory writable? (-run-dir)")
	}
}

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
		if !r.due() { // there is nothing to judge, and the next start of HAProxy wakes us
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

// inherit reads the digest of the policy by which a predecessor judged the sessions of its HAProxy.
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
		case spoe.Unknown: // the caller was judged before if the policy is the same, else it must not stay
			if r.judged != policy {
				return haproxy.End
			}
		case spoe.EndsTunnels:
			return haproxy.EndTunnel
		}
		return haproxy.Keep
	}
	ofSessions := judge
	if old && !http { // an HTTP request under way is not cut because its connection is old
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
			// A connection whose caller is unknown may be new, but not in an old worker, which accepts none.
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
	r.agent.Forget(live) // only a complete pass knows every live session
	if r.judged != policy || r.inherited != "" {
		r.judged, r.inherited = policy, ""
		return certs.WriteFile(filepath.Join(r.dir, judgedFile), []byte(policy.Digest()), 0o600)
	}
	return nil
}

// endSessions asks all workers at once, so that a worker that hangs does not delay the others.
// A replaced worker is first told the generation of the policy.
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

// permitted drops ErrNotPermitted, which trying again would not cure, after one warning; it returns any other error.
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
