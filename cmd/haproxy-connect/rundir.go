package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

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

func (s *running) own(path string) error {
	if s.account.User == "" {
		return nil
	}
	return os.Lchown(path, s.account.UID, s.account.GID)
}

func (s *running) listenAuthz() (net.Listener, error) {
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

// restoreDir makes our socket and lock anew after somebody removed them from the run
// directory. What HAProxy has open in the old directory stays open.
func (s *running) restoreDir(ctx context.Context, data *errgroup.Group) error {
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
		data.Go(func() error { return s.agent.Serve(ctx, ln) }) // beside the old listener, whose connections live on
	}
	if s.dial != nil {
		return s.dial.Set(nil) // the manager then sets its sockets again, which makes them anew
	}
	return nil
}

// cleanDir removes what we wrote, and the directory if nothing else is in it.
func (s *running) cleanDir() error {
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
