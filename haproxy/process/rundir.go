package process

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// Account is who the worker runs as; the zero value is ourselves.
type Account struct {
	User, Group string
	UID, GID    int
}

// WorkerAccount picks the unprivileged account of the worker: name, or when that
// is empty "haproxy" or "nobody". Not being root, there is no choice.
func WorkerAccount(name string) (Account, error) {
	if os.Geteuid() != 0 {
		if name != "" {
			return Account{}, fmt.Errorf("-user %q: only root can change the user", name)
		}
		return Account{UID: os.Geteuid(), GID: os.Getegid()}, nil
	}
	names := []string{"haproxy", "nobody"}
	if name != "" {
		names = []string{name}
	}
	for _, n := range names {
		u, err := user.Lookup(n)
		if err != nil {
			continue
		}
		g, err := user.LookupGroupId(u.Gid)
		if err != nil {
			continue
		}
		a := Account{User: u.Username, Group: g.Name}
		a.UID, _ = strconv.Atoi(u.Uid)
		a.GID, _ = strconv.Atoi(u.Gid)
		if a.UID == 0 {
			return Account{User: u.Username, Group: g.Name}, nil
		}
		return a, nil
	}
	return Account{}, fmt.Errorf("-user %q: no such user", names[0])
}

// PrepareDir makes the run directory: closed to others, its keys closed to the
// worker too, its sockets the worker's.
func PrepareDir(dir string, a Account) error {
	// Parents may be passed through, not listed: the worker goes to its sockets.
	if err := os.MkdirAll(filepath.Dir(dir), 0o711); err != nil {
		return fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
	}
	for up := filepath.Dir(dir); a.User != "" && a.UID != 0; up = filepath.Dir(up) {
		info, err := os.Stat(up)
		if err != nil {
			return fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if ok && info.Mode()&0o001 == 0 && !(int(st.Uid) == a.UID && info.Mode()&0o100 != 0) && !(int(st.Gid) == a.GID && info.Mode()&0o010 != 0) {
			return fmt.Errorf("-run-dir %q: HAProxy's worker runs as %s, who may not pass through %s; choose another directory or another -user", dir, a.User, up)
		}
		if up == filepath.Dir(up) {
			break
		}
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("-run-dir %q: belongs to user %d, not to us: somebody else could change the configuration", dir, st.Uid)
	}
	mode := os.FileMode(0o700)
	if a.User != "" {
		// The worker passes through to its sockets, and can change nothing here.
		mode = 0o710
		if err := os.Chown(dir, os.Geteuid(), a.GID); err != nil {
			return fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
		}
	}
	if err := os.Chmod(dir, mode); err != nil {
		return fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
	}
	for _, sub := range []string{"tls", "maps", "sock"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
		}
	}
	return OwnSocketDir(filepath.Join(dir, "sock"), a)
}

// OwnSocketDir makes a directory for sockets that only the worker and we enter.
func OwnSocketDir(dir string, a Account) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if a.User == "" {
		return nil
	}
	return os.Chown(dir, a.UID, a.GID)
}
