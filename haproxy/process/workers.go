package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// Worker is one process that serves connections: the current worker, one that a reload
// replaced, or one of a HAProxy that a killed predecessor of ours left.
type Worker struct {
	PID    int
	Old    bool // it accepts nothing new
	socket runtimeapi.Socket
	prefix string
}

// Do runs one command of the runtime API on the worker. If an old worker has ended, with all
// its sessions, the error is runtimeapi.ErrGone; if the current one has, it is another error,
// as a new worker will follow.
func (w Worker) Do(ctx context.Context, command string) (string, error) {
	old := strings.HasPrefix(w.prefix, "@!")
	if old && errors.Is(syscall.Kill(w.PID, 0), syscall.ESRCH) {
		return "", runtimeapi.ErrGone // not asked of the master, which might keep the connection: see ErrKept
	}
	out, err := w.socket.Do(ctx, w.prefix+command, nil)
	if errors.Is(err, runtimeapi.ErrGone) && !old {
		return "", errors.New("HAProxy has no worker at the moment")
	}
	return out, err
}

// beforeSockets is the pattern of the master sockets that predecessors had.
const beforeSockets = "before-*"

// Workers lists every process of ours that may still have sessions. An error means that
// there may be more of them than it lists.
func (p *Process) Workers(ctx context.Context) ([]Worker, error) {
	out, wrong := workersOf(ctx, runtimeapi.Socket(p.masterSocket()), "@1 ")
	sockets, _ := filepath.Glob(filepath.Join(p.conf.Dir, "sock", beforeSockets)) // the pattern is good
	for _, s := range sockets {
		list, err := workersOf(ctx, runtimeapi.Socket(s), "")
		if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) { // its master has gone, and its workers with it
			_ = os.Remove(s)
			continue
		}
		if err != nil {
			wrong = errors.Join(wrong, fmt.Errorf("a predecessor's HAProxy: %w", err))
		}
		for i := range list {
			list[i].Old = true
		}
		out = append(out, list...)
	}
	return out, wrong
}

// masterAnswers is how long a master, which has nothing else to do, may take to name its
// workers.
const masterAnswers = 3 * time.Second

// workersOf asks a master for its workers. current, if not "", is the prefix of commands to the
// worker that is not old: they reach its successor if it is replaced meanwhile.
func workersOf(ctx context.Context, master runtimeapi.Socket, current string) (out []Worker, err error) {
	ctx, cancel := context.WithTimeout(ctx, masterAnswers)
	defer cancel()
	text, err := master.Do(ctx, "show proc", nil)
	if err != nil {
		return nil, err
	}
	for _, one := range runtimeapi.ParseProcesses(text) {
		w := Worker{PID: one.PID, Old: one.Old, socket: master, prefix: "@!" + strconv.Itoa(one.PID) + " "}
		if !one.Old && current != "" {
			w.prefix = current
		}
		out = append(out, w)
	}
	if len(out) == 0 {
		return nil, errors.New("HAProxy's master names no worker")
	}
	return out, nil
}

// keepReach moves the master socket of a HAProxy that is to be replaced aside before the
// successor's socket takes its name; the old master goes on answering there. If somebody
// removed the socket, its processes are remembered as lost.
func (p *Process) keepReach(pids []int) {
	if len(pids) == 0 {
		return
	}
	aside := filepath.Join(p.conf.Dir, "sock", strings.Replace(beforeSockets, "*", strconv.Itoa(slices.Min(pids)), 1))
	if err := os.Rename(p.masterSocket(), aside); err == nil {
		return
	}
	p.mu.Lock()
	p.lost = append(p.lost, pids...)
	p.mu.Unlock()
}

// EndLost kills the processes of ours that no command reaches, with their sessions. It is
// called when a caller is denied now who may have sessions there.
func (p *Process) EndLost() (ended int) {
	p.mu.Lock()
	lost := p.lost
	p.lost = nil
	p.mu.Unlock()
	for _, pid := range running(p.conf.File) {
		if slices.Contains(lost, pid) && syscall.Kill(pid, syscall.SIGKILL) == nil {
			ended++
		}
	}
	return ended
}
