package process

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// EndConnections shuts down accepted connections on a local port whose peer is to be dropped,
// in every worker. HAProxy's commands reach only connections that have a stream; a connection
// that is idle between two requests has none. The kernel lends us the worker's descriptors
// (pidfd_getfd, Linux 5.6), as we are its parent. Without root that needs no permission; root
// needs CAP_SYS_PTRACE, as the worker runs as another user. Without that permission the error
// is ErrNotPermitted.
func EndConnections(workers []Worker, port int, drop func(w Worker, from netip.AddrPort) bool) (ended int, err error) {
	var forbidden error // returned only if there is no other error, which a retry might cure
	for _, w := range workers {
		n, e := endConnections(strconv.Itoa(w.PID), port, func(from netip.AddrPort) bool { return drop(w, from) })
		ended += n
		switch {
		case e == nil, errors.Is(e, unix.ESRCH), errors.Is(e, os.ErrNotExist):
		case errors.Is(e, os.ErrPermission):
			forbidden = fmt.Errorf("idle connections of worker %d: %w", w.PID, ErrNotPermitted)
		default:
			err = errors.Join(err, fmt.Errorf("idle connections of worker %d: %w", w.PID, e))
		}
	}
	if err == nil {
		err = forbidden
	}
	return ended, err
}

// ErrNotPermitted means that the kernel does not give us a worker's connections, and that a
// retry will not change that.
var ErrNotPermitted = errors.New("not permitted")

func endConnections(pid string, port int, drop func(netip.AddrPort) bool) (ended int, err error) {
	n, err := strconv.Atoi(pid)
	if err != nil {
		return 0, err
	}
	handle, err := unix.PidfdOpen(n, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(handle)
	dir := "/proc/" + pid + "/fd"
	list, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	for _, e := range list {
		if to, err := os.Readlink(dir + "/" + e.Name()); err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		number, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(handle, number, 0)
		if errors.Is(err, unix.EBADF) {
			continue // closed meanwhile
		}
		if err != nil {
			return ended, err
		}
		local, _ := unix.Getsockname(fd)
		peer, _ := unix.Getpeername(fd)
		if address(local).Port() == uint16(port) && address(peer).IsValid() && drop(address(peer)) && unix.Shutdown(fd, unix.SHUT_RDWR) == nil {
			ended++
		}
		unix.Close(fd)
	}
	return ended, nil
}

// address is the zero AddrPort for what is not TCP.
func address(a unix.Sockaddr) netip.AddrPort {
	switch s := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(s.Addr), uint16(s.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(s.Addr).Unmap(), uint16(s.Port))
	}
	return netip.AddrPort{}
}
