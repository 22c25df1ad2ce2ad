package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/consul"
	"github.com/haproxy-connect/haproxy-connect/connect/dialer"
	"github.com/haproxy-connect/haproxy-connect/haproxy"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/jwt"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// urgent ends everything at once; the second signal calls hurry.
var urgent, hurry = context.WithCancel(context.Background())

// sidecar is one running sidecar: what the admin listener shows.
type sidecar struct {
	conf    *config
	app     *app // nil unless we run the application
	log     *slog.Logger
	out     io.Writer
	errw    io.Writer
	access  accessFile
	begun   time.Time
	binary  *process.Binary
	account process.Account
	dir     string
	lock    *os.File
	client  *consul.Client
	watcher *consul.Watcher
	agent   *spoe.Agent
	tokens  *jwt.Verifier
	proc    *process.Process
	manager *haproxy.Manager
	dial    *dialer.Dialer // nil unless Go originates
	metrics *metrics

	phase    atomic.Pointer[string] // what it waits for, "" once everything runs
	stopping atomic.Bool
	stop     context.CancelCauseFunc
	newest   atomic.Pointer[connect.Snapshot]
	heard    atomic.Int64 // unix nanoseconds of the newest snapshot
	restarts atomic.Uint64
	revoke   *revocations
	ejector  *haproxy.Ejector
	noticed  map[connect.Notice]bool
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
	s := &sidecar{app: newApp(app), conf: &c, log: c.logger(errw), out: out, errw: errw, begun: time.Now(), client: client, noticed: map[connect.Notice]bool{}}
	for _, w := range c.warnings {
		s.log.Warn(w)
	}
	if err := s.run(ctx); err != nil || s.app == nil {
		return err
	}
	return s.app.exit()
}

// run starts in the order of the design, and stops in the reverse.
func (s *sidecar) run(ctx context.Context) error {
	_ = notifySocket() // before any child
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
		err = nil // asked to stop while it waited
	}
	return err
}

func (s *sidecar) serve(ctx, dataCtx context.Context, data *errgroup.Group) (err error) {
	if s.binary, err = process.Find(ctx, s.conf.haproxy); err != nil {
		return usageError{err}
	}
	if s.account, err = process.WorkerAccount(s.conf.user); err != nil {
		return usageError{err}
	}
	if err := checkFiles(s.conf, s.log); err != nil {
		return err
	}

	tested, testEnded := make(chan error, 1), make(chan struct{}) // beside the wait for Consul
	testCtx, endTest := context.WithCancel(dataCtx)
	go func() { defer close(testEnded); tested <- s.selfTest(testCtx) }()
	defer func() { endTest(); <-testEnded }() // it leaves no directory behind

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
		// First of all on the way out: nobody should be sent here any more.
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
	s.dir = s.conf.dir(id)
	if err := process.PrepareDir(s.dir, s.account); err != nil {
		return err
	}
	if s.lock, err = lockDir(s.dir); err != nil {
		return err
	}
	defer func() { s.lock.Close() }()

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
	return s.start(ctx, dataCtx, data, id, originator)
}

// start wires the arrows of the design and waits for the end.
func (s *sidecar) start(ctx, dataCtx context.Context, data *errgroup.Group, id string, originator render.Originator) error {
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

	procCtx, endProc := context.WithCancel(dataCtx)
	defer endProc()
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
		Dir:       s.dir, Renderer: renderer, Proxy: s.proc, Can: haproxy.Can{CACommit: f.CACommit}, Log: s.log,
		Generation: s.agent.Generation,
		SocketDir:  func(d string) error { return process.OwnSocketDir(d, s.account) },
		Restore:    func() error { return s.restoreDir(dataCtx, data) },
		SocketPath: socketPath, Reloaded: s.revoke.Wake,
	}
	if originator == render.Go {
		s.dial = dialer.New(s.log, s.own)
		data.Go(func() error { return s.dial.Run(dataCtx) })
		conf.Applied = s.dialSlots
	}
	s.manager = haproxy.NewManager(conf)
	s.watcher = consul.NewWatcher(s.client, id, s.log)
	s.waiting("")

	procDone := make(chan error, 1)
	go func() { procDone <- s.proc.Run(procCtx) }()
	control, controlCtx := errgroup.WithContext(ctx)
	control.Go(func() error { return s.manager.Run(controlCtx) })
	control.Go(func() error { return s.watcher.Run(controlCtx, s.publish) })
	control.Go(func() error { s.watchExpiry(controlCtx); return nil })
	control.Go(func() error { s.revoke.Run(controlCtx); return nil })
	control.Go(func() error { s.ejector.Run(controlCtx); return nil })
	data.Go(func() error { s.telemetry(dataCtx); return nil })
	control.Go(func() error { s.comeBack(controlCtx, id); return nil })
	if s.app != nil {
		control.Go(func() error { s.runApp(controlCtx); return nil })
	}
	s.log.Info("sidecar starts", "proxy", id, "haproxy", s.binary.Version, "run_dir", s.dir, "agent", s.client.Addr())
	err = control.Wait() // ctx ended, or a part failed

	s.stopping.Store(true)
	notify("STOPPING=1")
	s.log.Info("stopping", "cause", context.Cause(ctx), "drain_timeout", s.conf.drain)
	s.drainInbound(dataCtx, id)
	if s.app != nil { // it may still need its upstreams to finish
		s.app.stop(dataCtx, s.conf.appTimeout, s.log)
	}
	s.proc.Drain(2 * time.Second)
	if e := <-procDone; err == nil {
		err = e
	}
	return errors.Join(err, s.cleanDir())
}

// slotsOnDisk reads the slots that a predecessor's HAProxy uses.
func slotsOnDisk(dir string) *render.Config {
	files, _ := filepath.Glob(filepath.Join(dir, render.SlotMapFile("*")))
	text := map[string]string{}
	for _, f := range files {
		class := strings.TrimSuffix(filepath.Base(f), ".map")
		if b, err := os.ReadFile(f); err == nil && render.SlotMapFile(class) != render.PolicyMap {
			text[class] = string(b)
		}
	}
	return render.Slots(text)
}

// awaitReady returns once there is no reason not to be ready; false when ctx ends first.
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

// comeBack takes back, once callers can be served, what an earlier stop has left: see
// drainInbound.
func (s *sidecar) comeBack(ctx context.Context, id string) {
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
	_ = consul.Retry(ctx, never, func(err error) { // ends well, or with ctx
		s.log.Warn("cannot see whether an earlier stop left the proxy in maintenance", "error", err, "try", "consul maint -disable -service="+id+", if callers do not find it")
	}, func(ctx context.Context) error { return s.client.Return(ctx, id) })
}

// publish takes a new snapshot: the policy is in force before anything else.
func (s *sidecar) publish(snap *connect.Snapshot) {
	old := s.newest.Swap(snap)
	s.heard.Store(time.Now().UnixNano())
	if old == nil || old.Policy != snap.Policy {
		s.tokens.Use(snap.Policy.Providers())
		s.agent.SetPolicy(snap.Policy)
		s.revoke.Wake()
	}
	if s.dial != nil && (old == nil || old.Leaf != snap.Leaf || old.Roots != snap.Roots) {
		s.dial.SetIdentity(snap.Leaf, snap.Roots)
	}
	if len(s.noticed) > 1000 {
		clear(s.noticed) // said again rather than remembered for ever
	}
	for _, n := range snap.Notices {
		if !s.noticed[n] {
			s.noticed[n] = true
			s.log.Warn(n.String())
		}
	}
	for _, w := range snap.Inbound.Warnings() {
		if old == nil || !slices.Contains(old.Inbound.Warnings(), w) {
			s.log.Warn(w)
		}
	}
	if old == nil || old.Leaf != snap.Leaf {
		s.log.Info("leaf certificate", "id", snap.Leaf.ID, "serial", snap.Leaf.Serial, "until", snap.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	s.manager.Want(snap)
}

// watchExpiry warns when a leaf nears its end: the agent renews at 60 to 90 % of the
// life, so what is older than that is not being renewed.
func (s *sidecar) watchExpiry(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	var leaf *certs.Leaf
	told := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		snap := s.newest.Load()
		if snap == nil {
			continue
		}
		if snap.Leaf != leaf {
			leaf, told = snap.Leaf, 0
		}
		stage := expiryStage(leaf.Remaining(time.Now()))
		if stage <= told {
			continue
		}
		told = stage
		left := time.Until(leaf.NotAfter).Round(time.Second)
		if left <= 0 {
			s.log.Error("the leaf certificate has expired: peers refuse us", "serial", leaf.Serial, "try", "is the agent reachable, and are its servers?")
		} else {
			s.log.Warn("the leaf certificate nears its end and was not renewed", "serial", leaf.Serial, "left", left, "try", "is the agent reachable, and are its servers?")
		}
	}
}

// expiryStage counts the warnings due: at 8 % of the life, 4 %, 1 %, and at the end.
func expiryStage(remaining float64) int {
	n := 0
	for _, limit := range []float64{0.08, 0.04, 0.01, 0} {
		if remaining <= limit {
			n++
		}
	}
	return n
}

func (s *sidecar) denied(source string, d intentions.Decision) {
	s.metrics.denied(source, d)
	s.log.Warn("caller denied", "source", source, "destination", s.agent.Policy().Destination(), "rule", d.Rule, "reason", d.Reason)
}

// dialSlots tells the Go originator what each socket stands for.
func (s *sidecar) dialSlots(c *render.Config) error {
	want := map[string]dialer.Endpoint{}
	for class, t := range c.Slots {
		t.Each(func(value string, n int) {
			addr, ids := render.ParseSlotValue(value)
			want[filepath.Join(s.dir, render.SlotSocket(render.Slot{Class: class, ID: n}))] = dialer.Endpoint{
				Address: addr, IDs: ids, ALPN: render.ClassALPN(class), Timeout: render.ClassTimeout(class)}
		})
	}
	return s.dial.Set(want)
}

func (s *sidecar) own(path string) error {
	if s.account.User == "" {
		return nil
	}
	return os.Lchown(path, s.account.UID, s.account.GID)
}

func (s *sidecar) listenAuthz() (net.Listener, error) {
	path := filepath.Join(s.dir, render.AuthzSocket)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// The path may be another listener's by the time this one is closed.
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(path, 0o600), s.own(path)); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// retry waits for Consul with one clear line per kind of trouble.
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
func (s *sidecar) selfTest(ctx context.Context) error {
	// Beside the run directories, which is the one place that must be writable.
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
	conf.MaxConn, conf.Files = 100, 0
	err := haproxy.SelfTest(ctx, run, conf,
		func(d string) error { return process.OwnSocketDir(d, s.account) },
		func(ctx context.Context, file string) (func(), error) { return s.binary.Once(ctx, run, file) })
	if err == nil {
		s.log.Debug("self-test passed", "took", time.Since(begun).Round(time.Millisecond))
	}
	return err
}

// Times of a drain.
const (
	leaveFor = 5 * time.Second        // at most, for callers to go elsewhere
	quietFor = 300 * time.Millisecond // without a request: they have
)

// idleGrace is how long callers have to notice, by an answer or by Consul, that this
// instance goes, before connections that nobody uses are cut.
const idleGrace = 3 * time.Second

// drainInbound leaves the mesh, stops accepting callers and waits until their sessions have ended and
// their kept connections are closed or long unused; the upstreams stay open meanwhile,
// as the application needs them to finish.
func (s *sidecar) drainInbound(ctx context.Context, id string) {
	if !s.proc.Up() || s.conf.drain == 0 {
		return
	}
	snap := s.newest.Load()
	if snap == nil || snap.Inbound.Port == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.conf.drain)
	defer cancel()
	fronts := map[string]bool{}
	for _, sec := range s.manager.Status().Running.Sections {
		name, ok := strings.CutPrefix(sec.Name, "frontend ")
		if ok && (name == "public" || name == "permissive" || name == "unsecured" || strings.HasPrefix(name, "expose_")) {
			fronts[name] = true
		}
	}
	if snap.Inbound.Protocol.IsHTTP() {
		if _, err := s.proc.Do(ctx, fmt.Sprintf("add map %s/%s %s 1", s.dir, render.PolicyMap, render.DrainingKey), nil); err != nil {
			return
		}
	}
	if !s.conf.register { // else it is deregistered by now
		quick, done := context.WithTimeout(ctx, 2*time.Second)
		err := s.client.Leave(quick, id)
		done()
		if err != nil {
			s.log.Warn("cannot leave the mesh before the listener closes; callers notice by themselves", "error", err, "try", "is the agent there, and may the token write the service?")
		}
	}
	s.quiet(ctx, fronts)
	for name := range fronts {
		if _, err := s.proc.Do(ctx, "shutdown frontend "+name, nil); err != nil {
			return
		}
	}
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	last, served := time.Now(), ""
	for {
		// A connection between two requests is counted by its frontend, but is no session.
		open, requests, err := s.inboundUse(ctx, fronts)
		if err != nil {
			return
		}
		busy, err := s.inboundSessions(ctx, fronts)
		if err != nil {
			return
		}
		if busy > 0 || requests != served {
			last, served = time.Now(), requests
		}
		if open == 0 && busy == 0 || busy == 0 && time.Since(last) > idleGrace {
			return
		}
		select {
		case <-ctx.Done():
			s.log.Warn("sessions are still open after the drain timeout; they are cut", "open", max(open, busy))
			return
		case <-t.C:
		}
	}
}

// quiet waits until callers have stopped calling.
func (s *sidecar) quiet(ctx context.Context, fronts map[string]bool) {
	ctx, cancel := context.WithTimeout(ctx, leaveFor)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	last, seen := time.Now(), ""
	for time.Since(last) < quietFor {
		_, requests, err := s.inboundUse(ctx, fronts)
		if err != nil {
			return
		}
		if requests != seen {
			last, seen = time.Now(), requests
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// inboundUse is how many connections callers have open, and a text that changes with
// each request of theirs.
func (s *sidecar) inboundUse(ctx context.Context, fronts map[string]bool) (open int, requests string, err error) {
	rows, err := s.haproxyStats(ctx, 1)
	for _, row := range rows {
		if fronts[row["pxname"]] {
			n, _ := strconv.Atoi(row["scur"])
			open += n
			requests += row["req_tot"] + "/" + row["stot"] + " "
		}
	}
	return open, requests, err
}

func (s *sidecar) inboundSessions(ctx context.Context, fronts map[string]bool) (n int, err error) {
	out, err := s.proc.Do(ctx, "show sess", nil)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(out) {
		for f := range fronts {
			if strings.Contains(line, " fe="+f+" ") {
				n++
			}
		}
	}
	return n, nil
}

// accessLine hands on what HAProxy logs: access lines to where they are wanted, the
// rest, which is about HAProxy itself, to our own log.
func (s *sidecar) accessLine(line string) {
	rest, ok := strings.CutPrefix(line, render.AccessMark)
	if !ok {
		s.log.Debug("haproxy", "says", line)
		return
	}
	sink := "stdout" // nothing that Consul names is written to unless it was looked at
	if snap := s.newest.Load(); s.conf.accessLog == "" && snap != nil && snap.Inbound.AccessLog.Sink != "" {
		sink = snap.Inbound.AccessLog.Sink
	}
	switch sink {
	case "stdout":
		fmt.Fprintln(s.out, rest)
	case "stderr":
		fmt.Fprintln(s.errw, rest)
	default:
		s.access.Lock()
		defer s.access.Unlock()
		if err := s.access.write(sink, rest); err != nil && err.Error() != s.access.told {
			s.access.told = err.Error()
			s.log.Warn("cannot write the access log; its lines are lost", "error", err, "try", "access_logs.path of proxy-defaults must be writable here")
		}
	}
}

// accessFile is the access log in a file.
type accessFile struct {
	sync.Mutex // two HAProxies may have something to say
	path, told string
	f          *os.File
	looked     time.Time
}

// write appends a line. A file that was moved away, as by logrotate, is opened anew
// within a second.
func (a *accessFile) write(path, line string) error {
	if a.f != nil && (a.path != path || time.Since(a.looked) > time.Second && a.moved()) {
		a.f.Close()
		a.f = nil
	}
	if a.f == nil {
		f, err := openLog(path)
		if err != nil {
			return err
		}
		a.f, a.path, a.told = f, path, ""
	}
	_, err := fmt.Fprintln(a.f, line)
	return err
}

func (a *accessFile) moved() bool {
	a.looked = time.Now()
	now, err := os.Stat(a.path)
	if err != nil {
		return true
	}
	open, err := a.f.Stat()
	return err != nil || !os.SameFile(now, open)
}

// openLog opens a file that Consul names. As root it must not be steered, by Consul or by
// whoever may write to a directory on the way, into what is no log.
func openLog(path string) (*os.File, error) {
	if os.Geteuid() == 0 {
		for _, system := range []string{"/etc/", "/usr/", "/bin/", "/sbin/", "/lib", "/boot/", "/root/", "/proc/", "/sys/"} {
			if strings.HasPrefix(filepath.Clean(path)+"/", system) {
				return nil, fmt.Errorf("%s: no place for a log when started by root", path)
			}
		}
		if err := process.Trusted(filepath.Dir(path)); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		st, ok := info.Sys().(*syscall.Stat_t)
		if !info.Mode().IsRegular() || ok && (st.Nlink > 1 || int(st.Uid) != os.Geteuid()) {
			err = fmt.Errorf("%s: not a file of our own", path)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// socketPath reports why root must not make a socket at a path that Consul names: whoever
// may replace a directory on the way could have root change another file.
func socketPath(path string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return process.Trusted(filepath.Dir(path))
}

const lockFile = "lock"

// lockDir keeps a second sidecar out of a run directory.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("-run-dir %q: another haproxy-connect runs in it", dir)
	}
	return f, nil
}

// restoreDir makes anew what somebody removed from the run directory: our own socket
// and lock. What HAProxy has open of the old directory stays open.
func (s *sidecar) restoreDir(ctx context.Context, data *errgroup.Group) error {
	if err := process.PrepareDir(s.dir, s.account); err != nil {
		return err
	}
	gone := func(name string) bool {
		_, err := os.Lstat(filepath.Join(s.dir, name))
		return errors.Is(err, os.ErrNotExist)
	}
	if gone(lockFile) {
		f, err := lockDir(s.dir)
		if err != nil {
			return err
		}
		s.lock.Close()
		s.lock = f
	}
	if gone(render.AuthzSocket) {
		ln, err := s.listenAuthz()
		if err != nil {
			return err
		}
		data.Go(func() error { return s.agent.Serve(ctx, ln) }) // beside the old one, whose connections live
	}
	if s.dial != nil {
		return s.dial.Set(nil) // the manager lists its sockets again
	}
	return nil
}

// cleanDir removes what we wrote, and the directory if nothing else is in it.
func (s *sidecar) cleanDir() error {
	var err error
	for _, name := range []string{"tls", "sock", "maps", render.MainFile, render.SPOEFile, lua.SpiffeFile, lua.DenyFile, "candidate.cfg", judgedFile, lockFile} {
		err = errors.Join(err, os.RemoveAll(filepath.Join(s.dir, name)))
	}
	_ = os.Remove(s.dir) // not empty: somebody else's files
	return err
}

// checkFiles looks at the limit of open files, which bounds sockets and connections.
func checkFiles(c *config, log *slog.Logger) error {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return err
	}
	if r.Max < 5_000_000 {
		c.files = int(r.Max)
	}
	if c.files > 0 && c.files < 550 {
		return fmt.Errorf("the limit of open files is %d: raise it to 1024 at least (ulimit -n, LimitNOFILE=)", r.Max)
	}
	if most := c.files / 5; c.files > 0 && c.maxConn > most {
		log.Warn("-max-conn is more than the limit of open files allows", "max_conn", c.maxConn, "used", most, "limit", r.Max)
	}
	c.maxConn = cmp.Or(c.maxConn, 8192)
	return nil
}
