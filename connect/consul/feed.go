package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"syscall"
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
	// Leaves that are about to expire are renewed as fast as they are asked for: each
	// costs a server a signature, and HAProxy 2.6 has crashed after hundreds of new leaves.
	leafPause = time.Second
)

// cursor is where a blocking query goes on.
type cursor struct {
	index uint64
	hash  string
	pause time.Duration // between answers, if more than minPause
	wait  time.Duration // at most for an answer, if not waitTime
	heard uint64        // the index of the last answer, as Consul said it
}

// options asks for what is newer than the cursor.
func (c *cursor) options(ctx context.Context) *api.QueryOptions {
	return (&api.QueryOptions{AllowStale: true, WaitIndex: c.index, WaitHash: c.hash, WaitTime: cmp.Or(c.wait, waitTime)}).WithContext(ctx)
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
		c.hash, c.heard = m.LastContentHash, m.LastIndex
	}
}

// history recognises answers from the past: a server that reads its log again after a restart
// has, for a moment, the intentions, roots and instances of long ago, and gives them to queries
// that need no leader. If the state was really set back, restored from a backup or begun anew,
// such answers are believed after pastFor.
type history struct {
	index uint64    // of the last answer that was believed
	since time.Time // when answers began to be older than index; zero: they are not
}

const pastFor = 10 * time.Second

// past reports whether an answer of this index, heard now, is not to be believed yet.
func (h *history) past(index uint64, now time.Time) bool {
	if index < h.index {
		if h.since.IsZero() {
			h.since = now
		}
		if now.Sub(h.since) < pastFor {
			return true
		}
	}
	h.index, h.since = index, time.Time{}
	return false
}

// Feed is the condition of one watch, for status and metrics.
type Feed struct {
	Name    string
	Err     string // "" while it works
	Since   time.Time
	Errors  uint64
	Answers uint64
	away    bool // the last error means that the agent or its servers are away
}

// feeds keeps the conditions; watches write, anybody reads.
type feeds struct {
	mu   sync.Mutex
	all  map[*Feed]bool
	log  *slog.Logger
	away int       // how many watches have found the agent or its servers away
	back time.Time // when a watch last recovered from that

	failing int             // watches that fail
	since   time.Time       // when the first of them began to fail
	told    map[string]bool // kinds of errors that were logged since then
}

// settled returns when the last failing watch recovered: now while any still fails, the zero
// time if none ever failed. All watches count, since a single watch may not notice a restart,
// which the agent's streams hide.
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

// open adds the feed of a watch.
func (f *feeds) open(name string) *Feed {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all == nil {
		f.all = map[*Feed]bool{}
	}
	one := &Feed{Name: name, Since: time.Now()}
	f.all[one] = true
	return one
}

// ok counts an answer. It logs that Consul answers again only once no watch fails any more; the
// recovery of a single watch is a debug line.
func (f *feeds) ok(one *Feed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one.Answers++
	f.setAway(one, false)
	if one.Err == "" {
		return
	}
	one.Err = ""
	f.recovered()
	if f.failing > 0 {
		f.log.Debug("Consul answers a watch again", "watch", one.Name, "after", time.Since(one.Since).Round(time.Millisecond))
	}
	one.Since = time.Now()
}

// recovered counts one failing watch less, and logs the recovery of the last one.
func (f *feeds) recovered() {
	if f.failing--; f.failing == 0 {
		f.log.Info("Consul answers again", "after", time.Since(f.since).Round(time.Millisecond))
		clear(f.told)
	}
}

// failed counts an error. Until no watch fails any more it warns once of each kind of error, with
// what to try: an agent that is away is one trouble, however many watches meet it.
func (f *feeds) failed(one *Feed, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	one.Errors++
	f.setAway(one, !refused(err))
	text := trouble(err)
	if one.Err == "" {
		one.Since = time.Now()
		if f.failing++; f.failing == 1 {
			f.since = one.Since
		}
	}
	level := slog.LevelDebug
	if f.told == nil {
		f.told = map[string]bool{}
	}
	kind := text
	if Unreachable(err) { // refused, reset, timed out: nobody is there
		kind = "unreachable"
	}
	if !f.told[kind] && len(f.told) < 100 {
		f.told[kind] = true
		level = slog.LevelWarn
	}
	if one.Err != text {
		f.log.Log(context.Background(), level, "cannot read from Consul; the last answer stays in force", "watch", one.Name, "error", text, "try", hint(err))
	}
	one.Err = text
}

// sourcePort matches our own end of a connection in an error; its port differs each time.
var sourcePort = regexp.MustCompile(`(?:read|write) (tcp|unix) [^ ]+->`)

// trouble returns the text of an error without the URL, which differs from watch to watch.
func trouble(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return sourcePort.ReplaceAllString(err.Error(), "$1 ")
}

// drop removes the feed of a watch.
func (f *feeds) drop(one *Feed) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.setAway(one, false)
	if one.Err != "" {
		f.recovered()
	}
	delete(f.all, one)
}

func (f *feeds) list() []Feed {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Feed, 0, len(f.all))
	for one := range f.all {
		out = append(out, *one)
	}
	return out
}

// refused reports whether the agent is well in spite of the error: it answers 4xx, or the fault
// is in a service's name or with the name server.
func refused(err error) bool {
	var s api.StatusError
	var name nameError
	var lookup lookupError
	var status grpcError
	var away grpcAway
	var file fileError
	return errors.As(err, &s) && s.Code/100 == 4 || errors.As(err, &status) || errors.As(err, &away) || errors.As(err, &file) || errors.As(err, &name) || errors.As(err, &lookup)
}

// cut reports whether a blocking query was ended from outside, by whoever limits how long
// an answer may take: Consul 1.22 after 30 s, a load balancer. An agent that has gone ends
// it in the same way, and refuses the next one.
func cut(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		isStatus(err, 502) || isStatus(err, 504) || strings.Contains(err.Error(), "server closed") || strings.Contains(err.Error(), "GOAWAY") || strings.Contains(err.Error(), "stream error") // over HTTP/2
}

// shorten makes later blocking queries wait less than a query that was cut after so long.
func (c *Client) shorten(after time.Duration) {
	next := max(min(after, time.Duration(c.wait.Load()))*3/4, shortest)
	for {
		have := c.wait.Load()
		if int64(next) >= have || c.wait.CompareAndSwap(have, int64(next)) {
			return
		}
	}
}

const shortest = time.Second // no blocking query waits less

// hint names the next thing to try.
func hint(err error) string {
	var name nameError
	var lookup lookupError
	var right rightError
	var away grpcAway
	var file fileError
	switch {
	case errors.As(err, &file):
		return "is it there, readable for us, with a certificate and its key?"
	case errors.As(err, &right):
		return "give the token " + right.right
	case errors.As(err, &away):
		return "is the agent's gRPC port open (ports.grpc), and is it the one of -grpc-addr?"
	case errors.As(err, &name):
		return "register the service under another name"
	case errors.As(err, &lookup):
		return "does this machine's name server know it? Else register the instance with an address"
	case isStatus(err, 403) && strings.Contains(err.Error(), "ACL not found"):
		return "check the token: it does not exist, or not any more (-token-file is read again when it changes)"
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

// follow repeats a blocking query for ever: answers go to the owner of the state,
// errors are counted and retried with backoff and jitter.
func (s *Source) follow(a *answer, f *Feed) {
	ctx := a.ctx
	var cur cursor
	backoff := minBackoff
	burst, last := 2, time.Now()
	var before history
	for {
		cur.wait = time.Duration(s.client.wait.Load())
		asked := time.Now()
		value, err := once(ctx, &cur, a.fetch)
		if ctx.Err() != nil {
			return
		}
		if took := time.Since(asked); err != nil && cur != (cursor{pause: cur.pause, wait: cur.wait}) && took >= shortest && cut(err) {
			s.client.shorten(took)
			continue // where it was, at once
		}
		if err != nil {
			s.feeds.failed(f, err)
			cur = cursor{pause: cur.pause}
			if !pause(ctx, jitter(backoff)) {
				return
			}
			backoff = min(2*backoff, maxBackoff)
			continue
		}
		if before.past(cur.heard, time.Now()) {
			cur = cursor{pause: cur.pause}
			if !pause(ctx, jitter(minBackoff)) {
				return
			}
			continue
		}
		backoff = minBackoff
		s.feeds.ok(f)
		if !s.send(a, value) {
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

func once(ctx context.Context, cur *cursor, f fetch) (value any, err error) {
	ctx, cancel := context.WithTimeout(ctx, queryLimit)
	defer cancel()
	// A library that meets an answer it did not expect must not end the sidecar.
	defer func() {
		if r := recover(); r != nil {
			value, err = nil, fmt.Errorf("unreadable answer: %v", r)
		}
	}()
	return f(ctx, cur)
}

// poll repeats a query that cannot block.
func (s *Source) poll(a *answer, f *Feed) {
	backoff := minBackoff
	for {
		value, err := once(a.ctx, &cursor{}, a.fetch)
		if a.ctx.Err() != nil {
			return
		}
		wait := a.every
		if err != nil {
			s.feeds.failed(f, err)
			wait = min(backoff, a.every)
			backoff = min(2*backoff, maxBackoff)
		} else {
			backoff = minBackoff
			s.feeds.ok(f)
			if !s.send(a, value) {
				return
			}
		}
		if !pause(a.ctx, jitter(wait)) {
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
