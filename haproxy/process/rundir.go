package process

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
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

// PrepareDir makes the run directory. It is closed to others, and the worker can change neither
// the keys nor the directory of the sockets. Nobody but root and us may be able to replace a
// part of the path: whoever can, could act as our user.
func PrepareDir(dir string, a Account) error {
	fail := func(err error) error { return fmt.Errorf("-run-dir %q: %w", dir, plain(err)) }
	if err := makeParents(filepath.Dir(dir), a); err != nil {
		return fail(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fail(err)
	}
	if err := Trusted(dir); err != nil {
		return fail(err)
	}
	if err := passable(filepath.Dir(dir), a); err != nil {
		return fail(err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fail(err)
	}
	if !info.IsDir() {
		return fail(errors.New("not a directory"))
	}
	if owner(info) != os.Geteuid() {
		return fail(fmt.Errorf("belongs to user %d, not to us: somebody else could change the configuration", owner(info)))
	}
	mode := os.FileMode(0o700)
	if a.User != "" {
		// The worker passes through to its sockets, and can change nothing here.
		mode = 0o710
		if err := os.Lchown(dir, os.Geteuid(), a.GID); err != nil {
			return fail(err)
		}
	}
	if err := os.Chmod(dir, mode); err != nil {
		return fail(err)
	}
	for _, sub := range []string{"tls", "maps"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fail(err)
		}
	}
	if err := OwnSocketDir(filepath.Join(dir, "sock"), a); err != nil {
		return fail(err)
	}
	return nil
}

// plain leaves the operation and the path, which the message names already, out of an error.
func plain(err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

func owner(info os.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

// makeParents makes what is missing of a path, below what can be trusted. The worker may
// pass through it, and list nothing.
func makeParents(dir string, a Account) error {
	if _, err := os.Stat(dir); err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	up := filepath.Dir(dir)
	if err := makeParents(up, a); err != nil {
		return err
	}
	if err := Trusted(up); err != nil {
		return err
	}
	mode := os.FileMode(0o700)
	if a.User != "" {
		mode = 0o711
	}
	if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// passable reports why the worker cannot go through a directory to its sockets.
func passable(dir string, a Account) error {
	if a.User == "" || a.UID == 0 {
		return nil
	}
	for ; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if ok && info.Mode()&0o001 == 0 && !(int(st.Uid) == a.UID && info.Mode()&0o100 != 0) && !(int(st.Gid) == a.GID && info.Mode()&0o010 != 0) {
			return fmt.Errorf("HAProxy's worker runs as %s, who may not pass through %s; choose another directory or another -user", a.User, dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

// Trusted returns an error if somebody else could replace a part of a path. Every directory and
// link on the way must be root's or ours. Others may write only to a sticky directory, such as
// /tmp, and to a mounted volume of root's: orchestrators make those writable for everybody in
// the container (emptyDir of Kubernetes, the directories of a task of Nomad). A part that does
// not exist yet is trusted.
func Trusted(path string) error {
	if err := trusted(filepath.Clean(path)); err != nil {
		return err
	}
	resolved, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return plain(err)
	}
	return trusted(resolved)
}

func trusted(path string) error {
	if !filepath.IsAbs(path) {
		return errors.New("not an absolute path")
	}
	if up := filepath.Dir(path); up != path {
		if err := trusted(up); err != nil {
			return err
		}
	}
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return plain(err)
	}
	if o := owner(info); o != 0 && o != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, who could replace what is in it; choose a path of root's or of our own", path, o)
	}
	if !info.IsDir() || info.Mode()&os.ModeSticky != 0 {
		return nil
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	ownGroup := ok && (st.Gid == 0 || int(st.Gid) == os.Getegid() && os.Getegid() == os.Geteuid()) // root's group, or a private group of our user
	if (info.Mode()&0o002 != 0 || info.Mode()&0o020 != 0 && !ownGroup) && !(owner(info) == 0 && mounted(path)) {
		return fmt.Errorf("others may write to %s, and could replace what is in it; choose another path, or chmod go-w", path)
	}
	return nil
}

// mounted reports whether something is mounted at a path (proc(5), mountinfo).
func mounted(path string) bool {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && path != "/" && strings.NewReplacer(`\040`, " ", `\134`, `\`).Replace(f[4]) == path {
			return true
		}
	}
	return false
}

// OwnSocketDir makes a directory for sockets that the worker and we enter and only we
// change: what we do by name in it must not lead elsewhere. The parent must be such a
// directory, or the run directory. A directory of the worker's own, as earlier versions
// made it, is taken back, and a link that the worker may have left is removed.
func OwnSocketDir(dir string, a Account) error {
	mode := os.FileMode(0o700)
	if a.User != "" {
		mode = 0o710
	}
	info, err := os.Lstat(dir)
	if err == nil && !info.IsDir() {
		if err := os.Remove(dir); err != nil {
			return err
		}
		err = os.ErrNotExist
	}
	if errors.Is(err, os.ErrNotExist) {
		if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		info, err = os.Lstat(dir)
	}
	if err != nil {
		return err
	}
	if o := owner(info); !info.IsDir() || o != os.Geteuid() && o != a.UID {
		return fmt.Errorf("%s is not a directory of ours", dir)
	}
	if a.User == "" {
		return nil
	}
	if err := os.Lchown(dir, os.Geteuid(), a.GID); err != nil {
		return err
	}
	return os.Chmod(dir, mode)
}
