package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// Config of a Process.
type Config struct {
	Binary *Binary
	Dir    string // run directory
	File   string // the configuration, absolute; also how an orphan is recognised
	Log    *slog.Logger
	Line   func(line string) // each line HAProxy logs; nil drops them
	// Serving is called after each start or restart, when a fresh worker serves.
	Serving func()
	// Died is called when HAProxy has ended without being asked to, or could not be started.
	Died func(err error)
}

const (
	startWait  = 60 * time.Second
	reloadWait = 60 * time.Second
	pollEvery  = 4 * time.Millisecond
	askAgain   = 250 * time.Millisecond
	minBackoff = 100 * time.Millisecond
	maxBackoff = 15 * time.Second
	stable     = 30 * time.Second // a run of this length forgets earlier crashes
	maxLogLine = 32 << 10
)

// pids matches the process ids in HAProxy's messages. Without removing them every repetition
// would look like a new message.
var pids = regexp.MustCompile(`\(\d+\)`)

// Process is one HAProxy in master-worker mode. Make it with New, then Run it;
// nothing starts before Start is called.
type Process struct {
	conf    Config
	start   chan chan error
	replace chan chan error
	drain   chan time.Duration

	mu     sync.Mutex
	master int // pid, 0 while there is none
	said   map[string]time.Time
	lost   []int // processes that no command reaches any more
	alerts ring
	up     atomic.Bool

	refusals atomic.Uint64
	inherits atomic.Bool
	ending   atomic.Bool // HAProxy was asked to end: what it says about that is no alert
}

// New makes a process that is not running.
func New(c Config) *Process {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Process{conf: c, start: make(chan chan error), replace: make(chan chan error), drain: make(chan time.Duration, 1), said: map[string]time.Time{}}
}

func (p *Process) masterSocket() string { return p.conf.Dir + "/sock/master" }

// Do runs one command on the current worker, by way of the master, which knows
// which one that is.
func (p *Process) Do(ctx context.Context, command string, payload []byte) (string, error) {
	return runtimeapi.Socket(p.masterSocket()).Do(ctx, "@1 "+command, payload)
}

// Up reports whether a worker serves.
func (p *Process) Up() bool { return p.up.Load() }

// Check asks the binary about a configuration file.
func (p *Process) Check(ctx context.Context, file string) error {
	return p.conf.Binary.Check(ctx, file)
}

// Start starts HAProxy and returns once a worker serves, or with the reason why
// none does. Run must be running.
func (p *Process) Start(ctx context.Context) error { return p.ask(ctx, p.start) }

// Replace starts another HAProxy from the files beside the running one, which finishes its
// sessions. It is needed when the sockets of the running one were removed: no command and no
// reload reaches it then. Both listen for a moment.
func (p *Process) Replace(ctx context.Context) error { return p.ask(ctx, p.replace) }

// ask has Run's goroutine do something and waits for the result.
func (p *Process) ask(ctx context.Context, what chan chan error) error {
	reply := make(chan error, 1)
	select {
	case what <- reply:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-reply:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Drain asks HAProxy to accept nothing new and to end when its sessions have, at
// the latest after d. Run returns then.
func (p *Process) Drain(d time.Duration) {
	select {
	case p.drain <- d:
	default:
	}
}

// Run keeps HAProxy running from the first Start until Drain is through or ctx
// ends (then at once). It returns after the last process of its own has gone.
func (p *Process) Run(ctx context.Context) error {
	var reply chan error
	select {
	case <-ctx.Done():
		return nil
	case <-p.drain:
		return nil
	case reply = <-p.start:
	}
	backoff, served, last := minBackoff, false, ""
	for {
		began := time.Now()
		c, err := p.takeOver(ctx)
		p.up.Store(err == nil) // before anybody is told
		if reply != nil {
			reply <- err
			reply = nil
		}
		if err == nil {
			served, last = true, ""
			if p.conf.Serving != nil {
				p.conf.Serving()
			}
			var asked bool
			asked, err = p.watch(ctx, c)
			p.up.Store(false)
			if asked {
				return nil
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		EndOrphans(p.conf.File, p.conf.Log)
		if p.conf.Died != nil {
			p.conf.Died(err)
		}
		if time.Since(began) > stable {
			backoff = minBackoff
		}
		if !served {
			// It never ran: whoever called Start knows why, and will try again.
			select {
			case reply = <-p.start:
				continue
			case <-p.drain:
			case <-ctx.Done():
			}
			return nil
		}
		if text := pids.ReplaceAllString(err.Error(), ""); text != last {
			last = text
			p.conf.Log.Error("HAProxy ended; starting it again from the files, which are current", "error", err, "in", backoff)
		}
		t := time.NewTimer(backoff + rand.N(backoff/4))
		backoff = min(2*backoff, maxBackoff)
		select {
		case <-t.C:
		case reply = <-p.start: // Start was called again, perhaps with a better configuration
			t.Stop()
		case <-p.drain:
			t.Stop()
			return nil
		case <-ctx.Done():
			t.Stop()
			return nil
		}
	}
}

// Inherits reports whether the HAProxy of a killed predecessor still serves.
func (p *Process) Inherits() bool { return p.inherits.Load() }

// FindPredecessor looks for the HAProxy that a killed predecessor left with this
// configuration. When it serves, Start will take its listeners over without a gap;
// when it does not, it is ended.
func (p *Process) FindPredecessor(ctx context.Context) bool {
	if len(running(p.conf.File)) == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := runtimeapi.Socket(p.statsSocket()).Do(ctx, "show info", nil); err != nil {
		n := EndOrphans(p.conf.File, p.conf.Log)
		p.conf.Log.Warn("ended the HAProxy that a killed predecessor left", "processes", n)
		return false
	}
	p.inherits.Store(true)
	return true
}

func (p *Process) statsSocket() string { return p.conf.Dir + "/sock/stats" }

// takeOver starts a master. If a predecessor's HAProxy serves, the new one takes its listeners,
// and once the new one serves, the old one is asked to finish its sessions.
func (p *Process) takeOver(ctx context.Context) (*child, error) {
	if !p.inherits.Load() {
		return p.spawn(ctx)
	}
	defer p.inherits.Store(false)
	old := running(p.conf.File)
	p.keepReach(old)
	c, err := p.spawn(ctx, "-x", p.statsSocket())
	if err != nil {
		p.conf.Log.Warn("cannot take over from the predecessor's HAProxy; ending it first", "error", err)
		EndOrphans(p.conf.File, p.conf.Log)
		return p.spawn(ctx)
	}
	for _, pid := range old {
		_ = syscall.Kill(pid, syscall.SIGUSR1) // finish and end; gone already is fine
	}
	p.conf.Log.Warn("took over from the HAProxy that a killed predecessor left", "processes", len(old))
	return c, nil
}

// beside starts another master while one runs, then asks that one to finish. Their
// listeners share the ports for a moment; the new one's sockets replace those by name.
func (p *Process) beside(ctx context.Context) (*child, error) {
	old := running(p.conf.File)
	p.keepReach(old)
	c, err := p.spawn(ctx)
	if err != nil {
		return nil, err
	}
	for _, pid := range old {
		_ = syscall.Kill(pid, syscall.SIGUSR1)
	}
	return c, nil
}

type child struct {
	cmd  *exec.Cmd
	done chan error
	out  *os.File
	err  *os.File
}

// spawn starts a master and waits until its worker answers.
func (p *Process) spawn(ctx context.Context, args ...string) (*child, error) {
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		outR.Close()
		outW.Close()
		return nil, err
	}
	p.alerts.reset()
	once, cancel := context.WithTimeout(ctx, askAgain)
	defer cancel()
	old, _ := p.worker(once) // the worker to be replaced answers too, and is not the one to wait for
	if old == 0 && len(args) > 0 {
		old, _ = p.pid(ctx, func(ctx context.Context, text string) (string, error) {
			return runtimeapi.Socket(p.statsSocket()).Do(ctx, text, nil)
		})
	}
	cmd := exec.Command(p.conf.Binary.Path, append([]string{"-W", "-S", p.masterSocket() + ",mode,600", "-f", p.conf.File}, args...)...)
	cmd.Stdout, cmd.Stderr = outW, errW
	cmd.Dir, cmd.Env = p.conf.Dir, environment()
	// HAProxy gets its own process group: a terminal's Ctrl-C must reach only us, as we decide
	// how HAProxy ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	outW.Close()
	errW.Close()
	if err != nil {
		outR.Close()
		errR.Close()
		return nil, fmt.Errorf("cannot start %s: %w", p.conf.Binary.Path, err)
	}
	c := &child{cmd: cmd, done: make(chan error, 1), out: outR, err: errR}
	go p.read(outR, p.line)
	go p.read(errR, p.alert)
	go func() {
		c.done <- cmd.Wait()
		close(c.done)
	}()
	p.setMaster(cmd.Process.Pid)
	if err := p.await(ctx, c.done, old, startWait); err != nil {
		p.abandon(c)
		return nil, fmt.Errorf("HAProxy does not start: %w", err)
	}
	return c, nil
}

func (p *Process) setMaster(pid int) {
	p.mu.Lock()
	p.master = pid
	p.mu.Unlock()
}

// await polls until a worker other than old answers.
func (p *Process) await(ctx context.Context, died <-chan error, old int, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for patience := askAgain; ; {
		// A master that has no worker yet may never answer a command: ask again. The wait grows
		// each time, as a master keeps ten connections at most and the worker may take long to
		// start.
		once, cancel := context.WithTimeout(ctx, patience)
		pid, err := p.worker(once)
		if errors.Is(err, runtimeapi.ErrKept) {
			<-once.Done()
			err = once.Err()
		}
		cancel()
		if err == nil && pid != 0 && pid != old {
			return nil
		}
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) {
			patience *= 2
		}
		select {
		case err := <-died:
			return exited(err, p.alerts.text())
		case <-ctx.Done():
			return fmt.Errorf("no worker answers within %s: %s", limit, p.alerts.text())
		case <-t.C:
		}
	}
}

// worker is the pid of the worker that serves.
func (p *Process) worker(ctx context.Context) (int, error) {
	return p.pid(ctx, func(ctx context.Context, text string) (string, error) { return p.Do(ctx, text, nil) })
}

func (p *Process) pid(ctx context.Context, do func(context.Context, string) (string, error)) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := do(ctx, "show info")
	if err != nil {
		return 0, err
	}
	return runtimeapi.ParsePID(out), nil
}

// Reload lets a new worker take over with the configuration on disk; the old one
// ends when its sessions have. On an error the old worker still serves.
func (p *Process) Reload(ctx context.Context) error {
	if !p.up.Load() {
		return errors.New("HAProxy is not running")
	}
	old, err := p.worker(ctx)
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, reloadWait)
	defer cancel()
	out, err := runtimeapi.Socket(p.masterSocket()).Do(ctx, "reload", nil)
	if p.conf.Binary.Version.Features().SyncReload {
		if err != nil {
			return fmt.Errorf("reload: %w", err)
		}
		if !strings.HasPrefix(out, "Success=1") {
			return fmt.Errorf("reload refused: %s", alerts([]byte(out)))
		}
		return nil
	}
	// 2.6 answers nothing, or drops the connection while it executes itself anew.
	if err := p.await(ctx, nil, old, reloadWait); err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	return nil
}

// watch waits for the end of a child; asked is true when it was wanted.
func (p *Process) watch(ctx context.Context, c *child) (asked bool, err error) {
	defer p.setMaster(0)
	for {
		select {
		case err := <-c.done:
			p.closePipes(c)
			return false, exited(err, p.alerts.text())
		case reply := <-p.start:
			reply <- nil // it runs already
		case reply := <-p.replace:
			next, err := p.beside(ctx)
			if err == nil {
				c = next
			}
			reply <- err
		case d := <-p.drain:
			p.conf.Log.Info("draining HAProxy", "at_most", d)
			p.end(c, syscall.SIGUSR1, d)
			return true, nil
		case <-ctx.Done():
			p.end(c, syscall.SIGTERM, 2*time.Second)
			return true, nil
		}
	}
}

// exited says how HAProxy ended and what it said before.
func exited(err error, said string) error {
	if err == nil {
		err = errors.New("exit status 0")
	}
	return fmt.Errorf("HAProxy ended (%w): %s", err, said)
}

// end sends a signal, then stronger ones, until the child has gone.
func (p *Process) end(c *child, first syscall.Signal, patience time.Duration) {
	defer p.closePipes(c)
	p.ending.Store(true)
	for _, step := range []struct {
		sig  syscall.Signal
		wait time.Duration
	}{{first, patience}, {syscall.SIGTERM, 2 * time.Second}, {syscall.SIGKILL, 5 * time.Second}} {
		_ = c.cmd.Process.Signal(step.sig)
		t := time.NewTimer(step.wait)
		select {
		case <-c.done:
			t.Stop()
			EndOrphans(p.conf.File, p.conf.Log)
			return
		case <-t.C:
		}
	}
	EndOrphans(p.conf.File, p.conf.Log)
}

// abandon ends a child that did not come to serve, with its workers and no others.
func (p *Process) abandon(c *child) {
	defer p.closePipes(c)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		_ = syscall.Kill(-c.cmd.Process.Pid, sig)
		t := time.NewTimer(2 * time.Second)
		select {
		case <-c.done:
			t.Stop()
			// Its worker holds the listeners until it is gone.
			for range 250 {
				if syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL) != nil {
					return
				}
				time.Sleep(pollEvery)
			}
			return
		case <-t.C:
		}
	}
}

func (p *Process) closePipes(c *child) {
	c.out.Close()
	c.err.Close()
}
