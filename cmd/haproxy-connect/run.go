package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/consul"
	"github.com/haproxy-connect/haproxy-connect/connect/dialer"
	"github.com/haproxy-connect/haproxy-connect/haproxy"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/haproxy/selftest"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/jwt"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
)

// urgent is cancelled by hurry, which the second signal calls: everything then ends at once.
var urgent, hurry = context.WithCancel(context.Background())

// sidecar holds what exists from the start of the program; running adds the parts that are made later.
type sidecar struct {
	conf    *config
	app     *app // nil unless we run the application
	log     *slog.Logger
	out     io.Writer
	errw    io.Writer
	client  *consul.Client
	metrics *metrics

	phase    atomic.Pointer[string]  // what the sidecar waits for until running is set
	running  atomic.Pointer[running] // nil before everything in it is made
	stopping atomic.Bool
	stop     context.CancelCauseFunc
	newest   atomic.Pointer[connect.Snapshot]
	heard    atomic.Int64 // unix nanoseconds of the newest snapshot
}

// running is a sidecar with all its parts. It is published as a whole: whoever loads
// sidecar.running finds all of them, or nil.
type running struct {
	*sidecar
	place
	source  *consul.Source
	agent   *spoe.Agent
	tokens  *jwt.Verifier
	proc    *process.Process
	manager *haproxy.Manager
	dial    *dialer.Dialer
	revoke  *revocations
	ejector *haproxy.Ejector

	access   accessFile
	restarts atomic.Uint64
	noticed  map[connect.Notice]bool
}

// place is the HAProxy binary, the account of its worker, and the run directory with its lock.
type place struct {
	binary  *process.Binary
	account process.Account
	dir     string
	lock    *os.File
}

func (s *sidecar) waiting(what string) { s.phase.Store(&what) }

func cmdRun(ctx context.Context, args []string, out, errw io.Writer) error {
	var c config
	var app []string
	if i := slices.Index(args, "--"); i >= 0 {
		args, app = args[:i], args[i+1:]
		if len(app) == 0 {
			return usagef("--: want a command after it")
		}
		path, err := exec.LookPath(app[0])
		if err != nil {
			return usagef("-- %q: not found or not executable", app[0])
		}
		app = append([]string{path}, app[1:]...)
	}
	fs := newFlags(program, &c)
	version := fs.Bool("version", false, "print versions and exit")
	if err := parse(fs, &c, args); err != nil {
		return err
	}
	if *version {
		return printVersion(ctx, &c, out)
	}
	if len(c.args) > 0 {
		return usagef("unexpected argument %q; an application to run comes after --", c.args[0])
	}
	if err := c.validate(); err != nil {
		return err
	}
	client, err := consul.NewClient(c.consul)
	if err != nil {
		return usageError{err}
	}
	s := &sidecar{app: newApp(app), conf: &c, log: c.logger(errw), out: out, errw: errw, client: client}
	for _, w := range c.warnings {
		s.log.Warn(w)
	}
	if err := s.run(ctx); err != nil || s.app == nil {
		return err
	}
	return s.app.exit()
}

// run starts the admin listener before everything else and ends it last: its /ready says what the sidecar is waiting for.
func (s *sidecar) run(ctx context.Context) error {
	_ = notifySocket() // no child may inherit the variable
	ctx, s.stop = context.WithCancelCause(ctx)
	defer s.stop(nil)
	s.waiting("HAProxy's binary")
	s.metrics = newMetrics(s)

	// Data lives longer than control: the agent must answer the last worker.
	data, dataCtx := errgroup.WithContext(urgent)
	dataCtx, endData := context.WithCancel(dataCtx)
	defer endData()
	admin, err := s.listenAdmin(dataCtx, data)
	if err != nil {
		return err
	}
	if admin != "" {
		s.log.Info("status, metrics and statistics", "address", "http://"+admin)
	}
	err = s.serve(ctx, dataCtx, data)
	endData()
	if e := data.Wait(); err == nil && !errors.Is(e, context.Canceled) {
		err = e
	}
	if cause := context.Cause(ctx); err != nil && ctx.Err() != nil && errors.Is(err, cause) {
		err = nil // the stop was requested while the sidecar still waited
	}
	return err
}

func (s *sidecar) serve(ctx, dataCtx context.Context, data *errgroup.Group) (err error) {
	r := &running{sidecar: s, noticed: map[connect.Notice]bool{}}
	if r.binary, err = process.Find(ctx, s.conf.haproxy); err != nil {
		return usageError{err}
	}
	if r.account, err = process.WorkerAccount(s.conf.user); err != nil {
		return usageError{err}
	}
	if err := checkFiles(s.conf, s.log); err != nil {
		return err
	}

	tested, testEnded := make(chan error, 1), make(chan struct{}) // the self-test runs while we wait for Consul
	testCtx, endTest := context.WithCancel(dataCtx)
	go func() { defer close(testEnded); tested <- r.selfTest(testCtx) }()
	defer func() { endTest(); <-testEnded }() // wait, so that the self-test removes its directory

	if s.conf.register {
		err := s.retry(ctx, "the agent, to register", func(ctx context.Context) error { return s.client.Register(ctx, s.conf.registration) })
		if err != nil {
			return err
		}
		var beat sync.WaitGroup
		beatCtx, endBeat := context.WithCancel(dataCtx)
		beat.Add(1)
		go func() {
			defer beat.Done()
			s.client.Beat(beatCtx, s.conf.registration, s.log, func() (bool, string) {
				reasons := s.reasons()
				return len(reasons) == 0, strings.Join(reasons, "; ")
			})
		}()
		// A stop deregisters first of all: Consul must send no new caller here.
		defer beat.Wait()
		defer endBeat()
		context.AfterFunc(ctx, endBeat)
	}

	var id string
	if err := s.retry(ctx, "a registration", func(ctx context.Context) (err error) {
		id, err = s.client.Lookup(ctx, s.conf.which)
		return err
	}); err != nil {
		return err
	}
	r.dir = s.conf.dir(id)
	if err := process.PrepareDir(r.dir, r.account); err != nil {
		return err
	}
	if r.lock, err = lockDir(r.dir); err != nil {
		return err
	}
	defer func() { r.lock.Close() }()

	originator := render.Originator(s.conf.originator)
	s.waiting("the self-test")
	if err := <-tested; err != nil {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case originator == "auto":
			s.log.Warn("this HAProxy does not pass the self-test; TLS to upstreams is spoken by the Go originator", "error", err)
			originator = render.Go
		case originator == render.Lua:
			return fmt.Errorf("%w; -originator auto or go would run without HAProxy's connectors", err)
		default:
			s.log.Warn("this HAProxy does not pass the self-test of its connectors, which are not used", "error", err)
		}
	} else if originator == "auto" {
		originator = render.Lua
	}
	return r.start(ctx, dataCtx, data, id, originator)
}

// wire makes every part, and starts those that HAProxy depends on: the authorization agent and
// the Go originator, if it is used.
func (s *running) wire(ctx, dataCtx context.Context, data *errgroup.Group, id string, originator render.Originator) error {
	f := s.binary.Version.Features()
	renderer, err := render.New(s.conf.render(s.dir, s.account, s.binary, originator))
	if err != nil {
		return err
	}
	s.tokens = jwt.New(dataCtx, s.log)
	data.Go(func() error { <-dataCtx.Done(); s.tokens.Wait(); return nil })
	s.revoke = &revocations{log: s.log, dir: s.dir, newest: s.newest.Load, maxAge: s.conf.maxAge, wake: make(chan struct{}, 1)}
	s.agent = spoe.New(spoe.Options{Log: s.log, Count: s.metrics.authorization, Denied: s.denied, Tokens: s.tokens, Crowded: s.revoke.Wake})
	ln, err := s.listenAuthz()
	if err != nil {
		return err
	}
	data.Go(func() error { return s.agent.Serve(dataCtx, ln) })

	s.proc = process.New(process.Config{
		Binary: s.binary, Dir: s.dir, File: filepath.Join(s.dir, render.MainFile), Log: s.log, Line: s.accessLine,
		Serving: func() {
			if n := s.restarts.Load(); n > 0 {
				s.log.Info("HAProxy serves again", "restarts", n)
			}
			s.manager.Restarted()
			s.revoke.Wake()
		},
		Died: func(error) { s.restarts.Add(1) },
	})
	s.revoke.agent, s.revoke.proc = s.agent, s.proc
	s.ejector = &haproxy.Ejector{Log: s.log, Twice: f.SyncReload, Running: func() *render.Config { return s.manager.Status().Running },
		Do: func(ctx context.Context, c string) (string, error) { return s.proc.Do(ctx, c, nil) }}
	var inherited *render.Config
	if s.proc.FindPredecessor(ctx) {
		inherited = slotsOnDisk(s.dir)
		s.revoke.inherit()
	}
	conf := haproxy.Config{
		Inherited: inherited,
		Dir:       s.dir, Renderer: renderer, Proxy: s.proc, Features: haproxy.Features{CACommit: f.CACommit, ServerCookies: f.ServerCookies}, Log: s.log,
		SocketDir:  func(d string) error { return process.OwnSocketDir(d, s.account) },
		Restore:    func() error { return s.restoreDir(dataCtx, data) },
		SocketPath: socketPath, Reloaded: s.revoke.Wake,
	}
	s.dial = dialer.New(s.log, s.own)
	data.Go(func() error { return s.dial.Run(dataCtx) })
	conf.Applied = s.dialSlots
	s.manager = haproxy.NewManager(conf)
	s.source = consul.NewSource(s.client, id, s.log)
	return nil
}

// start runs the parts and waits for the end.
func (s *running) start(ctx, dataCtx context.Context, data *errgroup.Group, id string, originator render.Originator) error {
	if err := s.wire(ctx, dataCtx, data, id, originator); err != nil {
		return err
	}
	s.sidecar.running.Store(s)
	procCtx, endProc := context.WithCancel(dataCtx)
	defer endProc()
	procDone := make(chan error, 1)
	go func() { procDone <- s.proc.Run(procCtx) }()
	control, controlCtx := errgroup.WithContext(ctx)
	control.Go(func() error { return s.manager.Run(controlCtx) })
	control.Go(func() error { return s.source.Run(controlCtx, s.publish) })
	control.Go(func() error { s.watchExpiry(controlCtx); return nil })
	control.Go(func() error { s.revoke.Run(controlCtx); return nil })
	control.Go(func() error { s.ejector.Run(controlCtx); return nil })
	data.Go(func() error { s.telemetry(dataCtx); return nil })
	control.Go(func() error { s.comeBack(controlCtx, id); return nil })
	if s.app != nil {
		control.Go(func() error { s.runApp(controlCtx); return nil })
	}
	s.log.Info("sidecar starts", "proxy", id, "haproxy", s.binary.Version, "run_dir", s.dir, "agent", s.client.Addr())
	err := control.Wait() // ctx ended, or a part failed

	s.stopping.Store(true)
	notify("STOPPING=1")
	s.log.Info("stopping", "cause", context.Cause(ctx), "drain_timeout", s.conf.drain)
	s.drainInbound(dataCtx, id)
	if s.app != nil { // before HAProxy ends: the application may need its upstreams to finish
		s.app.stop(dataCtx, s.conf.appTimeout, s.log)
	}
	s.proc.Drain(2 * time.Second)
	if e := <-procDone; err == nil {
		err = e
	}
	return errors.Join(err, s.cleanDir())
}

// awaitReady waits until the sidecar is ready and returns true, or false if ctx ends first.
func (s *sidecar) awaitReady(ctx context.Context) bool {
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for len(s.reasons()) > 0 {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
		}
	}
	return true
}

// comeBack waits until the sidecar is ready and the application runs, tells systemd, and ends
// the maintenance in which an earlier stop left the proxy: see drainInbound.
func (s *running) comeBack(ctx context.Context, id string) {
	if !s.awaitReady(ctx) {
		return
	}
	if s.app != nil {
		select {
		case <-ctx.Done():
			return
		case <-s.app.began:
		}
	}
	s.log.Info("ready")
	notify("READY=1\nSTATUS=serving")
	never := func(error) bool { return false }
	_ = consul.Retry(ctx, never, func(err error) { // never fails for good: it succeeds, or ctx ends
		s.log.Warn("cannot see whether an earlier stop left the proxy in maintenance", "error", err, "try", "consul maint -disable -service="+id+", if callers do not find it")
	}, func(ctx context.Context) error { return s.client.Return(ctx, id) })
}

// publish puts a new snapshot into force: its policy first, its configuration last.
func (s *running) publish(snap *connect.Snapshot) {
	old := s.newest.Swap(snap)
	s.heard.Store(time.Now().UnixNano())
	if policy := snap.Public().Policy(); policy != nil && (old == nil || old.Public().Policy() != policy) {
		s.tokens.Use(policy.Providers())
		s.revoke.Outdated(policy)
		s.agent.SetPolicy(policy, snap.Generation(version()))
		s.revoke.Wake()
	}
	if old == nil || !maps.Equal(old.Leaves, snap.Leaves) || !maps.Equal(old.Bundles, snap.Bundles) || old.Outgoing != snap.Outgoing {
		s.dial.SetIdentity(byText(snap.Leaves), byText(snap.Bundles), dialer.Versions(snap.Outgoing))
	}
	if len(s.noticed) > 1000 {
		clear(s.noticed) // logging a notice again is better than remembering every one for ever
	}
	for _, n := range snap.Notices {
		if !s.noticed[n] {
			s.noticed[n] = true
			s.log.Warn(n.String())
		}
	}
	for _, w := range snap.Warnings() {
		if old == nil || !slices.Contains(old.Warnings(), w) {
			s.log.Warn(w)
		}
	}
	if leaf := snap.Leaf(); leaf != nil && (old == nil || old.Leaf() != leaf) {
		s.log.Info("leaf certificate", "id", leaf.ID, "serial", leaf.Serial, "until", leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	s.manager.Want(snap)
}

func (s *running) denied(source string, d intentions.Decision) {
	s.metrics.denied(source, d)
	s.log.Warn("caller denied", "source", source, "destination", s.agent.Policy().Destination(), "rule", d.Rule, "reason", d.Reason)
}

// dialSlots tells the Go originator what each socket stands for.
func (s *running) dialSlots(c *render.Config) error {
	want := map[string]dialer.Endpoint{}
	for name, t := range c.Slots {
		if !t.Class.Go {
			continue
		}
		t.Each(func(value string, n int) {
			addr, ids, sni := render.ParseSlotValue(value)
			want[filepath.Join(s.dir, render.SlotSocket(render.Slot{Class: name, ID: n}))] = dialer.Endpoint{
				Leaf: string(t.Class.Leaf), Bundle: string(t.Class.Bundle), Address: addr, IDs: ids, SNI: sni, ALPN: t.Class.ALPN, Timeout: max(t.Class.Timeout, time.Millisecond)}
		})
	}
	return s.dial.Set(want)
}

// byText is a map for who does not know the mesh's types of names.
func byText[K ~string, V any](in map[K]V) map[string]V {
	out := make(map[string]V, len(in))
	for name, v := range in {
		out[string(name)] = v
	}
	return out
}

// retry repeats try until Consul answers or refuses for good, and logs an error only if it differs from the one before.
func (s *sidecar) retry(ctx context.Context, what string, try func(context.Context) error) error {
	s.waiting(what + " at " + s.client.Addr())
	final := func(err error) bool {
		return err != nil && !errors.Is(err, consul.ErrNotRegistered) && !consul.Retryable(err)
	}
	return consul.Retry(ctx, final, func(err error) {
		s.waiting(fmt.Sprintf("%s at %s: %v", what, s.client.Addr(), err))
		s.log.Warn("waiting for "+what, "agent", s.client.Addr(), "because", err)
	}, try)
}

// selfTest proves the connectors on this binary, in a directory of its own.
func (s *running) selfTest(ctx context.Context) error {
	// -run-dir, or else the parent of the run directories, is the one place that must be writable.
	base := s.conf.runDir
	if base == "" {
		base = filepath.Dir(s.conf.dir("any"))
	} else if err := process.PrepareDir(base, s.account); err != nil {
		return err
	}
	run := filepath.Join(base, fmt.Sprintf("self-%d", os.Getpid()))
	defer os.RemoveAll(run)
	if err := process.PrepareDir(run, s.account); err != nil {
		return err
	}
	begun := time.Now()
	conf := s.conf.render(run, s.account, s.binary, render.Lua)
	conf.MaxConn, conf.MaxFiles = 100, 0
	err := selftest.Run(ctx, run, conf,
		func(d string) error { return process.OwnSocketDir(d, s.account) },
		func(ctx context.Context, file string) (func(), error) { return s.binary.Once(ctx, run, file) })
	if err == nil {
		s.log.Debug("self-test passed", "took", time.Since(begun).Round(time.Millisecond))
	}
	return err
}
