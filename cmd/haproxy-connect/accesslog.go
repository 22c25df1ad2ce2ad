package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// accessLine passes on a line that HAProxy logs: an access line to the sink that is wanted,
// any other line, which is about HAProxy itself, to our own log.
func (s *running) accessLine(line string) {
	rest, ok := strings.CutPrefix(line, render.AccessMark)
	if !ok {
		s.log.Debug("haproxy", "says", line)
		return
	}
	sink := "stdout" // a sink that Consul names counts only without -access-log
	if snap := s.newest.Load(); s.conf.accessLog == "" && snap != nil && snap.AccessLog.Sink != "" {
		sink = snap.AccessLog.Sink
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

// accessFile is the access log when Consul names a file for it.
type accessFile struct {
	sync.Mutex // two HAProxy processes may log at the same time
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

// openLog opens the log file that Consul names. As root it refuses system directories and paths that another
// user could redirect: neither Consul nor such a user may make us write into a file that is no log.
func openLog(path string) (*os.File, error) {
	if os.Geteuid() == 0 {
		for _, system := range []string{"/etc/", "/usr/", "/bin/", "/sbin/", "/lib", "/boot/", "/root/", "/proc/", "/sys/"} {
			if strings.HasPrefix(filepath.Clean(path)+"/", system) {
				return nil, fmt.Errorf("%s: a log must not lie in a system directory when started by root", path)
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
			err = fmt.Errorf("%s: the log must be a regular file of our own, with one link", path)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
