package process

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// worker is an account that is not ours. Tests that run as root play it by Chown.
var worker = Account{User: "nobody", Group: "nogroup", UID: 65534, GID: 65534}

func asRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, which CI has")
	}
}

func shortTemp(t *testing.T) string {
	dir, err := os.MkdirTemp("/tmp", "hcp")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestTrusted(t *testing.T) {
	asRoot(t)
	base := shortTemp(t)
	at := func(parts ...string) string { return filepath.Join(append([]string{base}, parts...)...) }
	require.NoError(t, os.MkdirAll(at("ours", "below"), 0o755))
	require.NoError(t, os.Mkdir(at("open"), 0o755))
	require.NoError(t, os.Chmod(at("open"), 0o777))
	require.NoError(t, os.Mkdir(at("open", "below"), 0o700))
	require.NoError(t, os.Mkdir(at("sticky"), 0o755))
	require.NoError(t, os.Chmod(at("sticky"), 0o777|os.ModeSticky))
	require.NoError(t, os.Mkdir(at("sticky", "ours"), 0o700))
	require.NoError(t, os.Mkdir(at("sticky", "theirs"), 0o700))
	require.NoError(t, os.Chown(at("sticky", "theirs"), worker.UID, worker.GID))
	require.NoError(t, os.Mkdir(at("group"), 0o755))
	require.NoError(t, os.Chmod(at("group"), 0o775))
	require.NoError(t, os.Chown(at("group"), 0, 100))
	require.NoError(t, os.Symlink(at("ours"), at("link")))
	require.NoError(t, os.Symlink(at("ours"), at("theirlink")))
	require.NoError(t, os.Lchown(at("theirlink"), worker.UID, worker.GID))
	require.NoError(t, os.Symlink(at("open", "below"), at("to-open")))
	for path, good := range map[string]bool{
		at("ours", "below"): true, at("ours", "missing", "too"): true, at("sticky", "ours", "x"): true, at("link", "below"): true, "/run": true, "/var/run": true,
		at("open", "below"): false, at("sticky", "theirs", "x"): false, at("group", "x"): false, at("theirlink", "below"): false, at("to-open"): false, "relative": false,
	} {
		err := Trusted(path)
		require.Equal(t, good, err == nil, "%s: %v", path, err)
	}
}

// A volume that an orchestrator mounts is writable for everybody in the container.
func TestVolumes(t *testing.T) {
	asRoot(t)
	volume := filepath.Join(shortTemp(t), "volume")
	require.NoError(t, os.Mkdir(volume, 0o755))
	require.NoError(t, syscall.Mount("tmpfs", volume, "tmpfs", 0, "mode=0777"))
	t.Cleanup(func() { _ = syscall.Unmount(volume, 0) })
	require.NoError(t, Trusted(filepath.Join(volume, "web")))
	require.NoError(t, os.Chown(volume, worker.UID, worker.GID))
	require.Error(t, Trusted(filepath.Join(volume, "web")), "not of root's")
}

// Another user who made the parent of the run directory could swap what is in it.
func TestPlantedRunDirectory(t *testing.T) {
	asRoot(t)
	base := shortTemp(t)
	planted := filepath.Join(base, "planted")
	require.NoError(t, os.Mkdir(planted, 0o700))
	require.NoError(t, os.Chown(planted, worker.UID, worker.GID))
	require.ErrorContains(t, PrepareDir(filepath.Join(planted, "web"), Account{}), "who could replace")
	require.NoError(t, os.Chown(planted, 0, 0))
	require.NoError(t, os.Chmod(planted, 0o777))
	require.ErrorContains(t, PrepareDir(filepath.Join(planted, "web"), Account{}), "others may write")
	require.NoError(t, os.Chmod(planted, 0o755))
	require.NoError(t, PrepareDir(filepath.Join(planted, "a", "b", "web"), Account{}))
}

// Whatever the worker's account does in what it may enter, root follows no link of its.
func TestWorkerCannotSteerRoot(t *testing.T) {
	asRoot(t)
	base := shortTemp(t)
	require.NoError(t, os.Chmod(base, 0o755))
	dir := filepath.Join(base, "web")
	require.NoError(t, PrepareDir(dir, worker))
	require.NoError(t, OwnSocketDir(filepath.Join(dir, "sock", "h1-5000"), worker))
	for _, name := range []string{"", "sock", "sock/h1-5000", "tls", "maps"} {
		info, err := os.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Zero(t, owner(info), name)
		require.Zero(t, info.Mode()&0o022, "the worker may not write to %q", name)
	}
	// In an earlier version the directories belonged to the worker, which could leave links in
	// them.
	secret := filepath.Join(base, "secret")
	require.NoError(t, os.Mkdir(secret, 0o700))
	require.NoError(t, os.Remove(filepath.Join(dir, "sock", "h1-5000")))
	require.NoError(t, os.Chown(filepath.Join(dir, "sock"), worker.UID, worker.GID))
	require.NoError(t, os.Symlink(secret, filepath.Join(dir, "sock", "h1-5000")))
	require.NoError(t, PrepareDir(dir, worker))
	require.NoError(t, OwnSocketDir(filepath.Join(dir, "sock", "h1-5000"), worker))
	info, err := os.Stat(secret)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o700), info.Mode().Perm())
	require.Equal(t, 0, int(info.Sys().(*syscall.Stat_t).Gid), "root gave away what a link led to")
	info, err = os.Lstat(filepath.Join(dir, "sock", "h1-5000"))
	require.NoError(t, err)
	require.True(t, info.IsDir())
	// And what is somebody else's is not taken.
	require.NoError(t, os.Chown(filepath.Join(dir, "sock", "h1-5000"), 12345, 0))
	require.ErrorContains(t, OwnSocketDir(filepath.Join(dir, "sock", "h1-5000"), worker), "not a directory of ours")
}

// A process in another mount namespace has another file at the same path.
func TestStrangersAreNotOurs(t *testing.T) {
	asRoot(t)
	file := filepath.Join(shortTemp(t), "haproxy.cfg")
	start := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		require.NoError(t, cmd.Start())
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd
	}
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	ours := start("tail", "-f", file) // looks like HAProxy to whoever reads its command line
	stranger := start("unshare", "-m", "tail", "-f", file)
	for _, cmd := range []*exec.Cmd{ours, stranger} {
		require.Eventually(t, func() bool {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
			return string(b) == "tail\x00-f\x00"+file+"\x00"
		}, 10*time.Second, 5*time.Millisecond)
	}
	require.Equal(t, []int{ours.Process.Pid}, running(file))
}

// HAProxy shows its environment to whoever reaches its sockets.
func TestNoTokenInTheEnvironment(t *testing.T) {
	t.Setenv("CONSUL_HTTP_TOKEN", "secret")
	t.Setenv("HAPROXY_CONNECT_TOKEN", "secret")
	t.Setenv("NOTIFY_SOCKET", "/x")
	for _, v := range environment() {
		require.NotContains(t, v, "secret")
		require.NotContains(t, v, "NOTIFY_SOCKET")
	}
	require.Contains(t, environment(), "PATH="+os.Getenv("PATH"))
}
