package consul

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

const (
	waitTime   = 5 * time.Minute                         // of a blocking query, Consul's default
	queryLimit = waitTime + waitTime/16 + 30*time.Second // Consul adds up to wait/16
	minBackoff = 500 * time.Millisecond
	maxBackoff = 30 * time.Second
	minPause   = 20 * time.Millisecond // between answers of one watch, after a burst of two
	// Every answer lists every instance: while thousands are replaced, reading all of
	// them again for each would cost the agent and us more than the traffic does.
	pauseEach = 100 * time.Microsecond
	// Leaves of a lifetime that is nearly over are renewed as fast as they are asked
	// for: each costs a server a signature, and HAProxy 2.6 has crashed after hundreds.
	leafPause = time.Second
)

// cursor is where a blocking query goes on.
type cursor struct {
	index uint64
	hash  string
	pause time.Duration // between answers, if more than minPause
}

// options asks for what is newer than the cursor.
func (c *cursor) options(ctx context.Context) *api.QueryOptions {
	return (&api.QueryOptions{AllowStale: true, WaitIndex: c.index, WaitHash: c.hash, WaitTime: waitTime}).WithContext(ctx)
}

// cached is options answered by the agent's cache, which spares the servers.
func (c *cursor) cached(ctx context.Context) *api.QueryOptions {
	q := c.options(ctx)
	q.AllowStale, q.UseCache = false, true
	return q
}

// advance follows Consul's rules: an index that goes back starts over, 0 counts as 1.
func (c *cursor) advance(m *api.QueryMeta) {
	switch {
	case m == nil:
	case m.LastIndex < c.index:
		c.index = 0
	default:
		c.index = max(m.LastIndex, 1)
	}
	if m != nil {
		c.hash = m.LastContentHash
	}
}

// Feed is the condition of one watch, for status and metrics.
type Feed struct {
	Name    string
	Err     string // "" while it works
	Since   time.Time
	Errors  uint64
	Answers uint64
	away    bool // the error is of an agent or servers that are not there
}

// feeds keeps the conditions; watches write, anybody reads.
type feeds struct {
	mu   sync.Mutex
	all  map[string]*Feed
	log  *slog.Logger
	away int       // how many are
	back time.Time // when the last one ceased to be
}

// settled is since when the agent and its servers have answered every watch: now, while
// they do not; the zero time, if they always have. It is of all watches because
// one may see nothing of a restart: the agent's streams hide it.
func (f *feeds) settled() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away > 0 {
		return time.Now()
	}
	return f.back
}

func (f *feeds) setAway(one *Feed, away bool) {
	switch {
	case away && !one.away:
		f.away++
	case !away && one.away:
		f.away--
		f.back = time.Now()
	}
	one.away = away
}

func (f *feeds) get(name string) *Feed {
	if f.all == nil {
		f.all = map[string]*Feed{}
	}
	one := f.all[name]
	if one == nil {
		one = &Feed{Name: name, Since: time.Now()}
		f.all[name] = one
	}
	return one
}

// ok logs only the end of a trouble.
func (f *feeds) ok(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one := f.get(name)
	one.Answers++
	f.setAway(one, false)
	if one.Err != "" {
		one.Err = ""
		f.log.Info("Consul answers again", "watch", name, "after", time.Since(one.Since).Round(time.Millisecond))
		one.Since = time.Now()
	}
}

// failed logs the first of a row of the same errors, with what to try.
func (f *feeds) failed(name string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one := f.get(name)
	one.Errors++
	f.setAway(one, !refused(err))
	text := err.Error()
	if one.Err == "" {
		one.Since = time.Now()
	}
	if one.Err != text {
		f.log.Warn("cannot read from Consul; the last answer stays in force", "watch", name, "error", text, "try", hint(err))
	}
	one.Err = text
}

func (f *feeds) drop(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if one := f.all[name]; one != nil {
		f.setAway(one, false)
		delete(f.all, name)
	}
}

func (f *feeds) list() []Feed {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Feed, 0, len(f.all))
	for _, one := range f.all {
		out = append(out, *one)
	}
	return out
}

// refused reports an answer of an agent that is well: 4xx.
func refused(err error) bool {
	var s api.StatusError
	return errors.As(err, &s) && s.Code/100 == 4
}

// hint names the next thing to try.
func hint(err error) string {
	switch {
	case isStatus(err, 429):
		return "the agent limits requests: raise limits.http_max_conns_per_client (default 200 for all sidecars of this host)"
	case isStatus(err, 403):
		return "check the token: a service identity for this service grants what a sidecar reads"
	case isStatus(err, 404):
		return "the registration is gone from the agent: register it again"
	case isStatus(err, 500):
		return "the agent cannot reach its servers or they have no leader"
	case errors.Is(err, context.DeadlineExceeded):
		return "the agent does not answer: is it overloaded?"
	}
	return "is the agent running at -http-addr?"
}

// fetch asks once and returns what to do with the answer.
type fetch func(ctx context.Context, c *cursor) (func(*state), error)

// follow repeats a blocking query for ever: answers go to the owner of the state,
// errors are counted and retried with backoff and jitter.
func (w *Watcher) follow(ctx context.Context, name string, f fetch) {
	var cur cursor
	backoff := minBackoff
	burst, last := 2, time.Now()
	for {
		apply, err := w.once(ctx, &cur, f)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			w.feeds.failed(name, err)
			cur = cursor{pause: cur.pause}
			if !pause(ctx, jitter(backoff)) {
				return
			}
			backoff = min(2*backoff, maxBackoff)
			continue
		}
		backoff = minBackoff
		w.feeds.ok(name)
		if apply != nil && !w.send(ctx, apply) {
			return
		}
		// A token bucket: an endpoint that flaps must not spin this loop.
		if since := time.Since(last); since > time.Second {
			burst = 2
		}
		last = time.Now()
		if burst > 0 {
			burst--
		} else if !pause(ctx, max(minPause, cur.pause)) {
			return
		}
	}
}

func (w *Watcher) once(ctx context.Context, cur *cursor, f fetch) (apply func(*state), err error) {
	ctx, cancel := context.WithTimeout(ctx, queryLimit)
	defer cancel()
	// A library that meets an answer it did not expect must not end the sidecar.
	defer func() {
		if r := recover(); r != nil {
			apply, err = nil, fmt.Errorf("unreadable answer: %v", r)
		}
	}()
	return f(ctx, cur)
}

// poll repeats a query that cannot block.
func (w *Watcher) poll(ctx context.Context, name string, every time.Duration, f fetch) {
	backoff := minBackoff
	for {
		apply, err := w.once(ctx, &cursor{}, f)
		if ctx.Err() != nil {
			return
		}
		wait := every
		if err != nil {
			w.feeds.failed(name, err)
			wait = min(backoff, every)
			backoff = min(2*backoff, maxBackoff)
		} else {
			backoff = minBackoff
			w.feeds.ok(name)
			if apply != nil && !w.send(ctx, apply) {
				return
			}
		}
		if !pause(ctx, jitter(wait)) {
			return
		}
	}
}

// jitter spreads by a tenth either way.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Retry calls try until it succeeds, fails for good or ctx ends; say is told of
// each error that differs from the one before.
func Retry(ctx context.Context, final func(error) bool, say func(error), try func(context.Context) error) error {
	backoff, last := minBackoff, ""
	for {
		err := try(ctx)
		if err == nil || final(err) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err.Error() != last {
			last = err.Error()
			say(err)
		}
		if !pause(ctx, jitter(backoff)) {
			return context.Cause(ctx)
		}
		backoff = min(2*backoff, 5*time.Second)
	}
}
