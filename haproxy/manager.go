package haproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// proxy is what the Manager needs of a running HAProxy (process.Process).
type proxy interface {
	Check(ctx context.Context, file string) error
	Start(ctx context.Context) error // returns once it serves; nothing to do when it does
	Reload(ctx context.Context) error
	Up() bool
	// Inherits: a predecessor's HAProxy still has the listeners; Start takes them over.
	Inherits() bool
	// Replace starts another HAProxy from the files beside the one that runs, whose
	// sessions go on: for when its sockets are lost.
	Replace(ctx context.Context) error
	Do(ctx context.Context, command string, payload []byte) (string, error)
}

// renderer is render.Renderer.
type renderer interface {
	Render(s *connect.Snapshot, generation string, prev *render.Config) (*render.Config, []*render.Refused, error)
}

// Config of a Manager.
type Config struct {
	Dir        string
	Renderer   renderer
	Proxy      proxy
	Can        Can
	Log        *slog.Logger
	Generation func() string // of the policy in force
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
	// Applied is told of each configuration that runs, before HAProxy uses a new
	// slot of it: the Go dialer must listen first. Nil is fine.
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
	running  *render.Config
	served   served
	excluded map[*connect.Upstream]error // HAProxy refuses these as they are
	broken   bool                        // runtime state is unknown: the next step is a reload
	unsaved  bool                        // the files are older than what runs
	damage   string                      // a file or socket that is gone
	deleting map[string]time.Time        // servers that get nothing new, and since when
	reloaded time.Time
	lastErr  string
}

// served is what the listeners of a configuration were made of.
type served struct {
	upstreams []*connect.Upstream
	inbound   *connect.Inbound                        // nil: nothing runs
	held      map[connect.Listener][]connect.Listener // by port or path; nil: not made yet
}

// NewManager makes a manager that does nothing before Run.
func NewManager(c Config) *Manager {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Manager{conf: c, wake: make(chan struct{}, 1), deleting: map[string]time.Time{}, excluded: map[*connect.Upstream]error{},
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

// Restarted tells that HAProxy was started anew from the files.
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
		since    time.Time // first structural change that waits
		last     string    // the change as last seen
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
		wait, err := m.step(ctx, snap, &since, &last)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			m.failed(err)
			wait = retry - retry/10 + rand.N(retry/5)
			retry = min(2*retry, lastRetry)
		} else if wait == 0 || wait == portEvery {
			m.worked()
			retry = firstRetry
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

// pids in HAProxy's messages would make every one of them new.
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

// step tries to make HAProxy match a snapshot. A positive wait means: not yet.
func (m *Manager) step(ctx context.Context, snap *connect.Snapshot, since *time.Time, last *string) (wait time.Duration, err error) {
	open, taken, err := m.listenable(snap)
	if err != nil {
		return 0, err
	}
	prev := m.running
	if prev == nil {
		prev = m.conf.Inherited // slots, if a predecessor's HAProxy uses them
	}
	want, refused, err := m.conf.Renderer.Render(open, m.conf.Generation(), prev)
	if err != nil {
		return 0, stage("render", "correct what the message names in Consul", err)
	}
	m.refusals(append(refused, taken...))
	next := served{upstreams: without(open.Upstreams, refused), inbound: &open.Inbound}
	defer func() {
		// A port that another process has may become free: look again.
		if err == nil && wait == 0 && len(taken) > 0 {
			wait = portEvery
		}
	}()
	if m.damage != "" {
		if err := m.restore(ctx); err != nil {
			return 0, err
		}
	}
	plan := NewPlan(m.running, want, m.conf.Can)
	if plan.Reload == "" && (m.broken || !m.conf.Proxy.Up()) {
		plan = Plan{Reload: Repair, Detail: "the state of HAProxy is not known"}
	}
	if plan.Reload == "" {
		*since = time.Time{}
		if plan.Empty() && !m.unsaved {
			m.done(want, next)
			return 0, nil
		}
		return 0, m.live(ctx, want, next, plan)
	}
	if err := m.ahead(ctx, open, want); err != nil {
		return 0, err
	}
	if plan.Reload != Start && m.conf.Proxy.Up() {
		// Structure: wait until it is still, so that ten changes are one reload.
		now := time.Now()
		if since.IsZero() {
			*since, *last = now, ""
		}
		due := since.Add(atMost)
		if plan.Detail != *last {
			*last = plan.Detail
			if q := now.Add(quiet); q.Before(due) {
				return quiet, nil
			}
		}
		if next := m.reloaded.Add(reloadEvery); now.Before(due) && now.Before(next) {
			return next.Sub(now), nil
		}
	}
	*since = time.Time{}
	if err := m.reload(ctx, want, plan); err != nil {
		if m.exclude(open.Upstreams, want, err) {
			return time.Millisecond, nil // again, without it
		}
		return 0, err
	}
	m.done(want, next)
	return 0, nil
}

// ahead applies, before a reload, what needs none: policies, endpoints and the leaf wait
// neither for the structure to be still nor for a reload that fails.
func (m *Manager) ahead(ctx context.Context, snap *connect.Snapshot, want *render.Config) error {
	if m.running == nil || m.broken || !m.conf.Proxy.Up() {
		return nil
	}
	if !m.conf.Can.CACommit && m.running.Roots.Fingerprint != want.Roots.Fingerprint {
		now := *snap
		now.Roots = m.running.Roots // what is verified meanwhile is verified by these
		var err error
		if want, _, err = m.conf.Renderer.Render(&now, m.conf.Generation(), m.running); err != nil {
			return stage("render", "correct what the message names in Consul", err)
		}
	}
	part := render.Merge(m.running, want)
	plan := NewPlan(m.running, part, m.conf.Can)
	if plan.Reload != "" || plan.Empty() {
		return nil
	}
	return m.live(ctx, part, m.served, plan)
}

// lineOf finds the line that HAProxy names when it refuses a configuration.
var lineOf = regexp.MustCompile(`candidate\.cfg:(\d+)\]`)

// exclude leaves out, from now on and as it is, the upstream whose line HAProxy refuses:
// the others must not suffer for it.
func (m *Manager) exclude(list []*connect.Upstream, want *render.Config, err error) bool {
	var se *stageError
	if !errors.As(err, &se) || se.stage != "check" {
		return false
	}
	for _, found := range lineOf.FindAllStringSubmatch(err.Error(), -1) {
		line, _ := strconv.Atoi(found[1]) // digits
		name := want.UpstreamAt(line)
		for _, u := range list {
			if name != "" && u.Name == name {
				m.excluded[u] = fmt.Errorf("HAProxy refuses its configuration: %w", se.err)
				return true
			}
		}
	}
	return false
}

// without is a list of upstreams without those that were refused.
func without(list []*connect.Upstream, refused []*render.Refused) []*connect.Upstream {
	if len(refused) == 0 {
		return list
	}
	gone := map[string]bool{}
	for _, r := range refused {
		gone[r.Upstream] = true
	}
	return slices.DeleteFunc(slices.Clone(list), func(u *connect.Upstream) bool { return gone[u.Name] })
}

func (m *Manager) refusals(refused []*render.Refused) {
	var text []string
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

func (m *Manager) done(want *render.Config, now served) {
	m.running, m.served = want, now
	m.mu.Lock()
	m.status.Ready, m.status.Running = true, want
	m.status.Deleting = len(m.deleting)
	m.mu.Unlock()
}

// write puts the files of a configuration in place, all but haproxy.cfg itself.
func (m *Manager) write(c *render.Config, old *render.Config) error {
	path := func(name string) string { return filepath.Join(m.conf.Dir, name) }
	for class := range c.Slots {
		if err := m.conf.SocketDir(filepath.Join(m.conf.Dir, "sock", class)); err != nil {
			return err
		}
	}
	for name, text := range c.Files {
		if old != nil && old.Files[name] == text {
			continue
		}
		if err := certs.WriteTo(path(name), strings.NewReader(text), 0o600); err != nil {
			return err
		}
	}
	if old == nil || old.Roots.Fingerprint != c.Roots.Fingerprint {
		if err := certs.WriteFile(path(render.RootsFile), []byte(c.Roots.PEM), 0o600); err != nil {
			return err
		}
	}
	if old == nil || old.Leaf.Fingerprint != c.Leaf.Fingerprint {
		return certs.WriteFile(path(render.LeafFile), c.Leaf.PEM(), 0o600)
	}
	return nil
}

const tryDisk = "is the run directory writable and the disk not full? (-run-dir)"

// reload writes everything, lets HAProxy check it, and switches over.
func (m *Manager) reload(ctx context.Context, want *render.Config, plan Plan) (err error) {
	begun := time.Now()
	if err := m.write(want, nil); err != nil {
		return stage("write", tryDisk, err)
	}
	main := filepath.Join(m.conf.Dir, render.MainFile)
	defer func() {
		// What could not be switched to must not be what a restart would read.
		if err != nil && m.running != nil && !m.broken {
			err = errors.Join(err, m.save(m.running, nil))
		}
	}()
	candidate := filepath.Join(m.conf.Dir, "candidate.cfg")
	if err := certs.WriteTo(candidate, want, 0o600); err != nil {
		return stage("write", tryDisk, err)
	}
	if err := m.conf.Proxy.Check(ctx, candidate); err != nil {
		return stage("check", "read "+candidate+" at the line it names", err)
	}
	if err := os.Rename(candidate, main); err != nil {
		return stage("write", tryDisk, err)
	}
	if m.conf.Applied != nil {
		if err := m.conf.Applied(want); err != nil {
			return stage("originator", "is the run directory writable?", err)
		}
	}
	if !m.conf.Proxy.Up() {
		err = m.conf.Proxy.Start(ctx)
	} else {
		err = m.conf.Proxy.Reload(ctx)
	}
	if err != nil {
		return stage("reload", "is a port taken by another process? The message names it", err)
	}
	m.broken, m.unsaved = false, false
	m.reloaded = time.Now()
	clear(m.deleting)
	m.conf.Log.Info("HAProxy runs a new configuration", "reason", plan.Reload, "detail", plan.Detail, "took", time.Since(begun).Round(time.Millisecond))
	m.mu.Lock()
	m.status.Reloads[plan.Reload]++
	m.status.LastReload = string(plan.Reload) + ": " + plan.Detail
	m.mu.Unlock()
	m.newWorker()
	return nil
}

// newWorker tells that another worker serves now.
func (m *Manager) newWorker() {
	if m.conf.Reloaded != nil {
		m.conf.Reloaded()
	}
}

// save puts all files of a configuration in place; old, if any, is what they have.
func (m *Manager) save(c, old *render.Config) error {
	if err := m.write(c, old); err != nil {
		return err
	}
	return certs.WriteTo(filepath.Join(m.conf.Dir, render.MainFile), c, 0o600)
}

// live changes HAProxy while it runs, and the files with it. A disk that is full does
// not keep an endpoint or a leaf from HAProxy: the files follow when they can.
func (m *Manager) live(ctx context.Context, want *render.Config, now served, plan Plan) error {
	old := m.running
	if m.unsaved {
		old = nil
	}
	saved := stage("write", tryDisk, m.save(want, old))
	m.unsaved = saved != nil
	if m.conf.Applied != nil {
		if err := m.conf.Applied(want); err != nil {
			m.broken = true
			return stage("originator", "is the run directory writable?", err)
		}
	}
	for _, c := range plan.Commands {
		if err := m.command(ctx, c, want); err != nil {
			m.broken = true
			return stage("command", "nothing: a reload follows by itself", err)
		}
	}
	m.mu.Lock()
	m.status.Commands += uint64(len(plan.Commands))
	m.mu.Unlock()
	m.conf.Log.Debug("changed without a reload", "commands", len(plan.Commands))
	m.done(want, now)
	return saved
}

// sockets lists one of each directory of sockets that a configuration has.
func sockets(c *render.Config) []string {
	out := []string{render.StatsSocket, render.AdminSocket, render.AuthzSocket, render.MasterSocket}
	for class, t := range c.Slots {
		id := 0
		if c.Find("frontend connect_"+class) != nil {
			id = 1
		} else { // the Go dialer listens on those in use
			t.Each(func(_ string, used int) { id = used })
		}
		if id != 0 {
			out = append(out, render.SlotSocket(render.Slot{Class: class, ID: id}))
		}
	}
	return out
}

// missing is the first of these files that is gone, "" if none is.
func (m *Manager) missing(names []string) string {
	for _, name := range names {
		if _, err := os.Lstat(filepath.Join(m.conf.Dir, name)); errors.Is(err, os.ErrNotExist) {
			return name
		}
	}
	return ""
}

// damaged looks for files and sockets that somebody removed: without them a new
// connection of an HTTP upstream, a verdict or a command has nowhere to go.
func (m *Manager) damaged() bool {
	m.damage = m.missing(append(sockets(m.running), render.MainFile, render.LeafFile, render.RootsFile))
	if m.damage != "" {
		m.conf.Log.Warn("somebody removed a part of the run directory; restoring it", "missing", m.damage)
	}
	return m.damage != ""
}

// restore makes the run directory whole again. Lost sockets need another HAProxy:
// nothing can give a listener its path back.
func (m *Manager) restore(ctx context.Context) error {
	const try = "can the run directory be written to? (-run-dir)"
	lost := m.missing(sockets(m.running)) != ""
	if m.conf.Restore != nil {
		if err := m.conf.Restore(); err != nil {
			return stage("restore", try, err)
		}
	}
	if err := m.save(m.running, nil); err != nil {
		return stage("restore", try, err)
	}
	if m.conf.Applied != nil {
		if err := m.conf.Applied(m.running); err != nil {
			return stage("originator", try, err)
		}
	}
	if lost {
		again := m.conf.Proxy.Replace
		if !m.conf.Proxy.Up() { // it died of it, or with it
			again = m.conf.Proxy.Start
		}
		if err := again(ctx); err != nil {
			return stage("restore", "is a port taken by another process? The message names it", err)
		}
		clear(m.deleting)
		m.reloaded = time.Now()
		m.newWorker()
	}
	m.conf.Log.Info("the run directory is whole again")
	m.damage, m.unsaved = "", false
	m.broken = m.broken && !lost
	m.mu.Lock()
	m.status.Drifts++
	m.mu.Unlock()
	return nil
}

func (m *Manager) do(ctx context.Context, text string, payload []byte, want string) error {
	ctx, cancel := context.WithTimeout(ctx, command)
	defer cancel()
	out, err := m.conf.Proxy.Do(ctx, text, payload)
	if err != nil {
		return err
	}
	if want == "" && strings.TrimSpace(out) != "" || !strings.Contains(out, want) {
		return fmt.Errorf("%.120q answered %.200q", text, out)
	}
	return nil
}

func (m *Manager) command(ctx context.Context, c Command, want *render.Config) error {
	switch c.Kind {
	case Add:
		if _, draining := m.deleting[c.Server]; draining {
			// It is still there, draining: take it back. Its name stands for the
			// same address and options.
			delete(m.deleting, c.Server)
			if err := m.do(ctx, weight(c.Server, &c.Set).Text, nil, ""); err != nil {
				return err
			}
			if err := m.do(ctx, maxConn(c.Server, &c.Set).Text, nil, ""); err != nil {
				return err
			}
			return m.do(ctx, "set server "+c.Server+" state ready", nil, "")
		}
		if err := m.do(ctx, c.Text, nil, c.Want); err != nil {
			return err
		}
		return m.do(ctx, "enable server "+c.Server, nil, "")
	case Remove:
		if err := m.do(ctx, c.Text, nil, c.Want); err != nil {
			return err
		}
		if c.Server != "" {
			m.deleting[c.Server] = time.Now()
		}
		return nil
	case Cert:
		return m.swap(ctx, "cert", want.Dir+"/"+render.LeafFile, c)
	case CA:
		return m.swap(ctx, "ca-file", want.Dir+"/"+render.RootsFile, c)
	}
	return m.do(ctx, c.Text, c.Payload, c.Want)
}

// swap replaces a certificate file in memory and proves that it is in use: some
// versions say "Success!" and change nothing (haproxy/haproxy#3165).
func (m *Manager) swap(ctx context.Context, kind, file string, c Command) error {
	// One payload is limited to 16 KiB (tune.bufsize).
	if len(c.Payload) > 15000 {
		return errors.New("too large for a command")
	}
	err := m.do(ctx, c.Text, c.Payload, "ransaction")
	if err == nil {
		err = m.do(ctx, "commit ssl "+kind+" "+file, nil, "Success!")
	}
	if err == nil {
		err = m.do(ctx, "show ssl "+kind+" "+file, nil, "Status: Used")
	}
	if err != nil {
		_ = m.do(ctx, "abort ssl "+kind+" "+file, nil, "")
		return err
	}
	if kind == "cert" {
		m.conf.Log.Info("the leaf certificate was replaced without a reload")
		return nil
	}
	m.conf.Log.Info("the roots were replaced without a reload")
	return nil
}

// deleteServers removes servers whose last session has ended.
func (m *Manager) deleteServers(ctx context.Context) {
	if len(m.deleting) == 0 || !m.conf.Proxy.Up() {
		return
	}
	for full, since := range m.deleting {
		// First only drained: maintenance closes idle connections, and one that a
		// request has just picked would be lost with it.
		if time.Since(since) < drainFor {
			continue
		}
		if err := m.do(ctx, "set server "+full+" state maint", nil, ""); err != nil && !strings.Contains(err.Error(), "No such") {
			continue
		}
		err := m.do(ctx, "del server "+full, nil, "Server deleted")
		if err == nil || strings.Contains(err.Error(), "No such") { // the second: HAProxy was restarted meanwhile
			delete(m.deleting, full)
		}
	}
	m.mu.Lock()
	m.status.Deleting = len(m.deleting)
	m.mu.Unlock()
}

// drifted compares the servers HAProxy has with those it should have.
func (m *Manager) drifted(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, command)
	defer cancel()
	out, err := m.conf.Proxy.Do(ctx, "show servers state", nil)
	if err != nil {
		return false
	}
	have := map[string]bool{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 8 || f[0] == "#" {
			continue
		}
		have[f[1]+"/"+f[3]] = true
	}
	missing, extra := 0, 0
	for _, s := range m.running.Sections {
		backend := strings.TrimPrefix(s.Name, "backend ")
		for i := range s.Servers {
			full := backend + "/" + s.Servers[i].Name
			if !have[full] {
				missing++
			}
			delete(have, full)
		}
	}
	for full := range have {
		backend, _, _ := strings.Cut(full, "/")
		if sec := m.running.Find("backend " + backend); sec != nil && len(sec.Servers) > 0 && m.deleting[full].IsZero() {
			extra++
		}
	}
	leaf := ""
	if out, err := m.conf.Proxy.Do(ctx, "show ssl cert "+m.running.Dir+"/"+render.LeafFile, nil); err == nil {
		for line := range strings.Lines(out) {
			if serial, ok := strings.CutPrefix(strings.TrimSpace(line), "Serial: "); ok && serial != m.running.Leaf.Serial {
				leaf = serial
			}
		}
	}
	if missing+extra == 0 && leaf == "" {
		return false
	}
	m.conf.Log.Warn("HAProxy is not in the state it was left in; repairing", "missing", missing, "unknown", extra, "other_leaf", leaf)
	m.broken = true
	m.mu.Lock()
	m.status.Drifts++
	m.mu.Unlock()
	return true
}
