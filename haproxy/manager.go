package haproxy

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// proxy is what the Manager needs of a running HAProxy (process.Process).
type proxy interface {
	Check(ctx context.Context, file string) error
	Start(ctx context.Context) error // returns once it serves; nothing to do when it does
	Reload(ctx context.Context) error
	Up() bool
	// Inherits reports whether a predecessor's HAProxy still has the listeners; Start then
	// takes them over.
	Inherits() bool
	// Replace starts another HAProxy from the files beside the running one, whose sessions go
	// on. It is needed when the sockets of the running one are lost.
	Replace(ctx context.Context) error
	Do(ctx context.Context, command string, payload []byte) (string, error)
}

// renderer is render.Renderer.
type renderer interface {
	Render(s *connect.Snapshot, prev *render.Config) (*render.Config, []*render.Refused, error)
}

// Config of a Manager.
type Config struct {
	Dir      string
	Renderer renderer
	Proxy    proxy
	Features Features
	Log      *slog.Logger
	// Inherited are the slots of a predecessor's HAProxy that still runs, or nil.
	Inherited *render.Config
	// SocketDir makes a directory for sockets of the worker.
	SocketDir func(dir string) error
	// Restore makes the run directory and what is not HAProxy's in it anew, after
	// somebody removed it. Nil is fine.
	Restore func() error
	// SocketPath reports why a socket must not be made at a path that Consul names. Nil
	// allows any.
	SocketPath func(path string) error
	// Reloaded is told when another worker has taken over. Nil is fine.
	Reloaded func()
	// Applied is called with a configuration before HAProxy uses its new slots: the Go dialer
	// must listen on them first. It may be nil.
	Applied func(*render.Config) error
}

// Timing of the loop.
const (
	quiet       = 200 * time.Millisecond // structure must be still this long
	atMost      = 2 * time.Second        // but never waits longer than this
	reloadEvery = time.Second
	firstRetry  = 500 * time.Millisecond
	lastRetry   = 30 * time.Second
	deleteEvery = 250 * time.Millisecond
	drainFor    = time.Second
	driftEvery  = 30 * time.Second
	command     = 10 * time.Second
	portEvery   = 5 * time.Second
	lookEvery   = time.Second
)

// Status of a Manager, for people and metrics.
type Status struct {
	Ready      bool
	Err        string // of the last attempt, "" when it worked
	Stage      string // where it failed
	Reloads    map[Reason]uint64
	LastReload string
	Errors     map[string]uint64 // by stage
	Commands   uint64
	Drifts     uint64
	Refused    []string
	Running    *render.Config
	Deleting   int
}

// Manager makes HAProxy match the newest Snapshot. Make it with NewManager.
type Manager struct {
	conf Config
	wake chan struct{}

	mu     sync.Mutex
	want   *connect.Snapshot
	status Status

	// Only Run's goroutine:
	applied
	pace
	taken    map[*connect.Listener]bool      // their address is another process's
	excluded map[*connect.Listener]exclusion // HAProxy refuses these as they are
	snippets snippets
	broken   bool                 // runtime state is unknown: the next step is a reload
	unsaved  bool                 // the files are older than what runs
	damage   string               // a file or socket that is gone
	deleting map[string]time.Time // servers that get nothing new, and since when
	lastErr  string
}

// applied is what HAProxy runs. The zero value is nothing.
type applied struct {
	running *render.Config
	ran     *connect.Snapshot // the snapshot that the structure of running was made from
	served  served
}

// pace is how structural changes wait for each other.
type pace struct {
	since    time.Time // when the first waiting change came; zero while none waits
	last     string    // the change as last seen
	reloaded time.Time
}

// wait is how long a structural change waits: until it is still, so that ten changes are one
// reload, and not too soon after the last one. 0: it waits no longer.
func (p *pace) wait(detail string, now time.Time) time.Duration {
	if p.since.IsZero() {
		p.since, p.last = now, ""
	}
	due := p.since.Add(atMost)
	if detail != p.last {
		p.last = detail
		if now.Add(quiet).Before(due) {
			return quiet
		}
	}
	if next := p.reloaded.Add(reloadEvery); now.Before(due) && now.Before(next) {
		return next.Sub(now)
	}
	return 0
}

// NewManager makes a manager that does nothing before Run.
func NewManager(c Config) *Manager {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Manager{conf: c, wake: make(chan struct{}, 1), deleting: map[string]time.Time{}, excluded: map[*connect.Listener]exclusion{},
		status: Status{Reloads: map[Reason]uint64{}, Errors: map[string]uint64{}}}
}

// Want never blocks; the newest snapshot wins.
func (m *Manager) Want(s *connect.Snapshot) {
	m.mu.Lock()
	m.want = s
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Restarted wakes the loop after HAProxy was started anew from the files.
func (m *Manager) Restarted() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Status is a copy.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.status
	s.Reloads, s.Errors = clone(s.Reloads), clone(s.Errors)
	return s
}

func clone[K comparable](in map[K]uint64) map[K]uint64 {
	out := make(map[K]uint64, len(in))
	for k, v := range in {
		out[k] = v
	}
	return out
}

// Run works until ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	var (
		retry    = firstRetry
		timer    = time.NewTimer(time.Hour)
		deletes  = time.NewTicker(deleteEvery)
		drift    = time.NewTicker(driftEvery)
		look     = time.NewTicker(lookEvery)
		applying *connect.Snapshot
	)
	defer timer.Stop()
	defer deletes.Stop()
	defer drift.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		case <-timer.C:
		case <-deletes.C:
			m.deleteServers(ctx)
			continue
		case <-look.C:
			if m.running == nil || m.damage != "" || !m.damaged() {
				continue
			}
		case <-drift.C:
			if m.running == nil || m.broken || !m.conf.Proxy.Up() || !m.drifted(ctx) {
				continue
			}
		}
		m.mu.Lock()
		snap := m.want
		m.mu.Unlock()
		if snap == nil {
			continue
		}
		if snap != applying {
			applying, retry = snap, firstRetry // a new wish is tried at once
		}
		wait, err := m.step(ctx, snap)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			m.failed(err)
			wait = retry - retry/10 + rand.N(retry/5)
			retry = min(2*retry, lastRetry)
		case wait == 0:
			m.worked()
			retry = firstRetry
			if len(m.taken) > 0 {
				wait = portEvery // a port that another process has may become free
			}
		}
		if wait > 0 {
			timer.Reset(wait)
		}
	}
}

// Stages are where an attempt can fail: a bounded set, fit for a metric's label.
var Stages = []string{"listen", "render", "write", "check", "originator", "reload", "command", "restore", "apply"}

// stageError says where an attempt failed.
type stageError struct {
	stage, try string
	err        error
}

func (e *stageError) Error() string { return e.stage + ": " + e.err.Error() }
func (e *stageError) Unwrap() error { return e.err }

func stage(name, try string, err error) error {
	if err == nil {
		return nil
	}
	return &stageError{name, try, err}
}

// pids matches the process ids in HAProxy's messages. Without removing them every repetition
// would look like a new message.
var pids = regexp.MustCompile(`\(\d+\)`)

func (m *Manager) failed(err error) {
	name, try := "apply", ""
	var se *stageError
	if errors.As(err, &se) {
		name, try = se.stage, se.try
	}
	if text := pids.ReplaceAllString(err.Error(), ""); text != m.lastErr {
		m.lastErr = text
		m.conf.Log.Error("cannot bring HAProxy up to date; what runs stays", "error", text, "try", try)
	}
	m.mu.Lock()
	m.status.Err, m.status.Stage = err.Error(), name
	m.status.Errors[name]++
	m.mu.Unlock()
}

func (m *Manager) worked() {
	if m.lastErr != "" {
		m.conf.Log.Info("HAProxy is up to date again")
		m.lastErr = ""
	}
	m.mu.Lock()
	m.status.Err, m.status.Stage = "", ""
	m.mu.Unlock()
}

// step tries to make HAProxy match a snapshot. A positive wait means that it is not done yet
// and must be called again after that time.
func (m *Manager) step(ctx context.Context, snap *connect.Snapshot) (wait time.Duration, err error) {
	next, want, err := m.render(snap)
	if err != nil {
		return 0, err
	}
	if m.damage != "" {
		if err := m.restore(ctx); err != nil {
			return 0, err
		}
	}
	plan := NewPlan(m.running, want, m.conf.Features)
	if plan.Reload == "" && (m.broken || !m.conf.Proxy.Up()) {
		plan = Plan{Reload: Repair, Detail: "the state of HAProxy is not known"}
	}
	if plan.Reload == "" {
		m.since = time.Time{}
		if plan.Empty() && !m.unsaved {
			m.done(next)
			return 0, nil
		}
		return 0, m.live(ctx, next, plan)
	}
	if err := m.ahead(ctx, next.ran, want); err != nil {
		return 0, err
	}
	if plan.Reload != Start && m.conf.Proxy.Up() {
		if wait := m.wait(plan.Detail, time.Now()); wait > 0 {
			return wait, nil
		}
	}
	m.since = time.Time{}
	if err := m.reload(ctx, want, plan); err != nil {
		if m.atFault(next.ran, want, err) {
			return time.Millisecond, nil // try again at once, without what is refused
		}
		return 0, err
	}
	m.done(next)
	return 0, nil
}

// render makes the configuration of what can be served, and says what cannot.
func (m *Manager) render(snap *connect.Snapshot) (next applied, want *render.Config, err error) {
	snap, said := m.judged(snap)
	open, refused, err := m.listenable(snap)
	if err != nil {
		return next, nil, err
	}
	prev := m.running
	if prev == nil {
		prev = m.conf.Inherited // slots, if a predecessor's HAProxy uses them
	}
	const try = "correct what the message names in Consul"
	want, more, err := m.conf.Renderer.Render(open, prev)
	if err != nil {
		return next, nil, stage("render", try, err)
	}
	refused = append(more, refused...)
	if back := m.stay(open, refused); !back.Same(open) {
		open = back
		if want, more, err = m.conf.Renderer.Render(open, prev); err != nil {
			return next, nil, stage("render", try, err)
		}
		refused = append(refused, more...)
	}
	m.refusals(refused, said)
	return applied{want, open, served{listeners: without(open.Listeners, refused)}}, want, nil
}

func (m *Manager) refusals(refused []*render.Refused, text []string) {
	for _, r := range refused {
		text = append(text, r.Error())
	}
	m.mu.Lock()
	old := strings.Join(m.status.Refused, "\n")
	m.status.Refused = text
	m.mu.Unlock()
	if now := strings.Join(text, "\n"); now != old {
		for _, t := range text {
			m.conf.Log.Warn(t)
		}
	}
}
