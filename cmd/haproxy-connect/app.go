package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// app is the application that the sidecar runs: the command after --.
type app struct {
	args []string

	mu    sync.Mutex
	cmd   *exec.Cmd
	began chan struct{} // closed when it runs
	done  chan struct{} // closed when it has ended, or could not be started
	err   error         // why it could not be started
}

func newApp(args []string) *app {
	if len(args) == 0 {
		return nil
	}
	return &app{args: args, began: make(chan struct{}), done: make(chan struct{})}
}

// forwarded are the signals that are the application's own business. SIGTERM and
// SIGINT are not: they begin the ordered stop.
var forwarded = []os.Signal{syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGQUIT, syscall.SIGALRM, syscall.SIGCONT}

// runApp starts the application when the sidecar is ready, and stops the sidecar when
// the application ends.
func (s *sidecar) runApp(ctx context.Context) {
	if !s.awaitReady(ctx) {
		return
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	if err := s.app.start(); err != nil {
		s.log.Error("cannot start the application", "command", s.app.args[0], "error", err)
		s.stop(err)
		return
	}
	s.log.Info("the application runs", "command", s.app.args[0], "pid", s.app.cmd.Process.Pid)
	for {
		select {
		case <-ctx.Done():
			return
		case sig := <-signals:
			_ = s.app.cmd.Process.Signal(sig)
		case <-s.app.done:
			s.stop(errors.New("the application has ended: " + s.app.cmd.ProcessState.String()))
			return
		}
	}
}

func (a *app) start() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	cmd := exec.Command(a.args[0], a.args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// The application must not see our token. CONSUL_HTTP_TOKEN, which both may need, is passed on.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "HAPROXY_CONNECT_TOKEN=") })
	// The application has a process group of its own: a Ctrl-C in the terminal must begin the ordered stop, not end the
	// application. If we are killed, the kernel sends it SIGTERM: it must not stay behind without a sidecar.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if a.err = cmd.Start(); a.err != nil {
		close(a.done)
		return a.err
	}
	a.cmd = cmd
	close(a.began)
	go func() {
		_ = cmd.Wait()
		close(a.done)
	}()
	return nil
}

// stop asks the application to end, and ends it after the timeout or when ctx ends. It
// returns when the application has ended, at once if it never ran.
func (a *app) stop(ctx context.Context, timeout time.Duration, log *slog.Logger) {
	a.mu.Lock()
	cmd := a.cmd
	a.mu.Unlock()
	if cmd == nil {
		return
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case <-a.done:
		return
	case <-t.C:
		log.Warn("the application has not ended in time; it is killed", "timeout", timeout, "try", "-app-timeout")
	case <-ctx.Done():
	}
	_ = cmd.Process.Kill()
	<-a.done
}

// exit returns the application's exit code as ours: 128 plus the signal's number if a signal
// ended it, 126 if it could not be started.
func (a *app) exit() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.err != nil:
		return silent{126}
	case a.cmd == nil:
		return nil
	}
	status, ok := a.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return silent{128 + int(status.Signal())}
	}
	if code := a.cmd.ProcessState.ExitCode(); code != 0 {
		return silent{code}
	}
	return nil
}

// reapOrphans reaps the zombies that nobody else waits for: as process 1 of a container we
// inherit every process whose parent has ended. The code that started our own children reaps
// them immediately; a zombie seen in two consecutive scans is therefore an orphan.
func reapOrphans(ctx context.Context) {
	if os.Getpid() != 1 {
		return
	}
	t := time.NewTicker(5 * time.Second)
	defer t.Stop()
	last := map[int]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := map[int]bool{}
		for _, pid := range zombies() {
			if last[pid] {
				var status syscall.WaitStatus
				_, _ = syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
			} else {
				now[pid] = true
			}
		}
		last = now
	}
}

// zombies returns the pids of our children that have ended but were not reaped.
func zombies() (out []int) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	self := strconv.Itoa(os.Getpid())
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + d.Name() + "/stat")
		if err != nil {
			continue
		}
		// The process name comes first, in parentheses, and may itself contain parentheses: skip to the last one.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) > 1 && f[0] == "Z" && f[1] == self {
			out = append(out, pid)
		}
	}
	return out
}

// notify tells systemd (Type=notify) our state; without NOTIFY_SOCKET it does nothing.
func notify(state string) {
	socket := notifySocket()
	if socket == "" {
		return
	}
	if socket[0] == '@' { // an abstract socket
		socket = "\x00" + socket[1:]
	}
	c, err := net.Dial("unixgram", socket)
	if err != nil {
		return // systemd will say that it heard nothing
	}
	defer c.Close()
	_, _ = io.WriteString(c, state)
}

// notifySocket returns systemd's address and removes it from the environment: our children
// must not notify systemd.
var notifySocket = sync.OnceValue(func() string {
	defer os.Unsetenv("NOTIFY_SOCKET")
	return os.Getenv("NOTIFY_SOCKET")
})
