package haproxy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// served is the listeners of the configuration that runs. The zero value is none.
type served struct {
	listeners []*connect.Listener
	held      map[connect.Bind][]connect.Bind // by port or path; nil: not made yet
}

// listenable returns snap without the listeners whose address another process has: for one of
// them HAProxy would refuse to start at all, or at a reload close every listener for as long as
// it tries. A listener of callers that already runs at another address stays there.
func (m *Manager) listenable(snap *connect.Snapshot) (*connect.Snapshot, []*render.Refused, error) {
	less := *snap
	for l, why := range m.excluded {
		if !slices.Contains(snap.Listeners, l) || !slices.Equal(groups(snap, l), why.groups) {
			delete(m.excluded, l)
		}
	}
	var taken []*render.Refused
	m.taken = nil
	inherits := m.conf.Proxy.Inherits()
	less.Listeners = make([]*connect.Listener, 0, len(snap.Listeners))
	for i, l := range snap.Listeners {
		err := m.excluded[l].err
		if err == nil && !inherits && !m.served.holds(i, l) {
			err = m.bindable(l.Bind)
		}
		if err == nil {
			less.Listeners = append(less.Listeners, l)
			continue
		}
		if m.excluded[l].err == nil {
			if m.taken == nil {
				m.taken = map[*connect.Listener]bool{}
			}
			m.taken[l] = true
		}
		if l.Role.Optional() {
			taken = append(taken, &render.Refused{Listener: l, Err: err})
			continue
		}
		now := m.served.find(l)
		if now == nil && l.Role == connect.Public {
			return nil, nil, stage("listen", "end what listens there (ss -ltnp), or change the port in the registration", fmt.Errorf("the public listener: %w", err))
		}
		taken = append(taken, &render.Refused{Listener: l, Err: fmt.Errorf("a listener of the service: %w", err)})
		if now != nil {
			less.Listeners = append(less.Listeners, now)
		}
	}
	return &less, taken, nil
}

// find returns the running listener with the role and name of l, or nil.
func (s *served) find(l *connect.Listener) *connect.Listener {
	for _, now := range s.listeners {
		if now.Role == l.Role && now.Name == l.Name {
			return now
		}
	}
	return nil
}

// holds reports whether HAProxy has the address of l, for any of our listeners. That is also
// true while HAProxy is started again: it may already listen there. i is where l is in its
// snapshot, and in the running list too unless listeners came or went.
func (s *served) holds(i int, l *connect.Listener) bool {
	if i < len(s.listeners) && s.listeners[i].Bind == l.Bind {
		return true
	}
	place := func(b connect.Bind) connect.Bind { return connect.Bind{Port: b.Port, SocketPath: b.SocketPath} }
	if s.held == nil {
		s.held = map[connect.Bind][]connect.Bind{}
		for _, have := range s.listeners {
			at := place(have.Bind)
			s.held[at] = append(s.held[at], have.Bind)
		}
	}
	return slices.ContainsFunc(s.held[place(l.Bind)], l.Bind.Clashes)
}

// bindable returns why HAProxy could not listen on an address, or nil. It listens there for a
// moment to find out.
func (m *Manager) bindable(l connect.Bind) error {
	if l.SocketPath != "" {
		if err := m.bindableSocket(l.SocketPath); err != nil {
			return fmt.Errorf("local_bind_socket_path %q: %w", l.SocketPath, err)
		}
		return nil
	}
	addr := net.JoinHostPort(l.Address, strconv.Itoa(l.Port))
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("cannot listen on %s%s", addr, because(err))
	}
	return ln.Close()
}

// bindableSocket returns why HAProxy must not make a socket at path, or nil. HAProxy would
// replace any file there, so only a socket on which nobody listens may be there. Nothing at
// path is changed.
func (m *Manager) bindableSocket(path string) error {
	dir := filepath.Dir(path)
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return errors.New("its directory does not exist")
	}
	if m.conf.SocketPath != nil {
		if err := m.conf.SocketPath(path); err != nil {
			return err
		}
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return errors.New("something else than a socket is there, and stays")
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return errors.New("another process listens there")
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() != 0 && int(st.Uid) != os.Geteuid() {
			return fmt.Errorf("the socket there belongs to user %d, not to us", st.Uid)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot be looked at%s", because(err))
	}
	ln, err := net.Listen("unix", fmt.Sprintf("%s.%d", path, os.Getpid()))
	if err != nil {
		return fmt.Errorf("cannot make a socket in its directory%s", because(err))
	}
	return ln.Close()
}

// because returns the system's reason in err without the address, which the message has
// already; "" if there is none.
func because(err error) string {
	var sys syscall.Errno
	if errors.As(err, &sys) {
		return ": " + sys.Error()
	}
	return ""
}
