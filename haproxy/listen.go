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

// listenable leaves out what another process listens on already: HAProxy would refuse to
// start for one listener, and take the others down, or at a reload close all of them for
// as long as it tries. An upstream is left out; the inbound side stays as it runs.
func (m *Manager) listenable(snap *connect.Snapshot) (*connect.Snapshot, []*render.Refused, error) {
	less := *snap
	taken := m.listenableUpstreams(&less)
	if m.conf.Proxy.Inherits() {
		return &less, taken, nil
	}
	for _, l := range snap.Inbound.Listeners() {
		if m.served.holds(l) {
			continue // HAProxy has it, or binds it beside what it has
		}
		err := m.bindable(l)
		if err == nil {
			continue
		}
		const try = "end what listens there (ss -ltnp), or change the port in the registration"
		if m.served.inbound == nil && l.Port == snap.Inbound.Port {
			return nil, nil, stage("listen", try, fmt.Errorf("the public listener: %w", err))
		}
		taken = append(taken, &render.Refused{Err: fmt.Errorf("a listener of the service: %w", err)})
		if m.served.inbound != nil { // a change of it: what runs stays
			less.Inbound = *m.served.inbound
			break
		}
		less.Inbound = less.Inbound.Without(l)
	}
	return &less, taken, nil
}

// listenableUpstreams takes upstreams out of a snapshot, and says which and why.
func (m *Manager) listenableUpstreams(snap *connect.Snapshot) (taken []*render.Refused) {
	all := snap.Upstreams
	for u := range m.excluded {
		if !slices.Contains(all, u) {
			delete(m.excluded, u)
		}
	}
	held := func(i int, u *connect.Upstream) bool {
		if have := m.served.upstreams; i < len(have) && have[i].Name == u.Name && have[i].Listen == u.Listen {
			return true
		}
		return m.served.holds(u.Listen)
	}
	inherits := m.conf.Proxy.Inherits()
	var open []*connect.Upstream
	for i, u := range all {
		err := m.excluded[u]
		if err == nil && !inherits && !held(i, u) {
			err = m.bindable(u.Listen)
		}
		if err != nil {
			if taken == nil {
				open = append(open, all[:i]...)
			}
			taken = append(taken, &render.Refused{Upstream: u.Name, Err: err})
			continue
		}
		if taken != nil {
			open = append(open, u)
		}
	}
	if taken != nil {
		snap.Upstreams = open
	}
	return taken
}

// holds reports whether HAProxy listens there, for whatever of ours: also while it is
// being started again, when it may have its listeners already.
func (s *served) holds(l connect.Listener) bool {
	if s.held == nil {
		s.held = map[connect.Listener][]connect.Listener{}
		add := func(l connect.Listener) {
			key := connect.Listener{Port: l.Port, SocketPath: l.SocketPath}
			s.held[key] = append(s.held[key], l)
		}
		for _, u := range s.upstreams {
			add(u.Listen)
		}
		if s.inbound != nil {
			for _, l := range s.inbound.Listeners() {
				add(l)
			}
		}
	}
	return slices.ContainsFunc(s.held[connect.Listener{Port: l.Port, SocketPath: l.SocketPath}], l.Clashes)
}

// bindable tries an address and gives it back.
func (m *Manager) bindable(l connect.Listener) error {
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

// bindableSocket touches nothing that is there: HAProxy would put its socket in the place
// of any file.
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

// because is the cause of an error without the address, which its reader has already.
func because(err error) string {
	var sys syscall.Errno
	if errors.As(err, &sys) {
		return ": " + sys.Error()
	}
	return ""
}
