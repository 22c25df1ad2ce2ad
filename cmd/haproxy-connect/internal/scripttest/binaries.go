package scripttest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// cacheDir is where `make deps` puts Consul and the HAProxy versions.
func cacheDir() string {
	if d := os.Getenv("HAPROXY_CONNECT_CACHE"); d != "" {
		return d
	}
	base, err := os.UserCacheDir()
	if err != nil {
		base = os.TempDir() // no home: nothing is cached there either
	}
	return filepath.Join(base, "haproxy-connect")
}

// need returns where a binary is. Without it the test fails in CI and is skipped elsewhere.
func need(t testing.TB, path string) string {
	t.Helper()
	full, err := exec.LookPath(path)
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("%s is missing: run make deps", path)
		}
		t.Skipf("%s is missing: run make deps", path)
	}
	return full
}

// Versions are the HAProxy binaries under test, by name.
func Versions(t testing.TB) map[string]string {
	return map[string]string{
		"2.6": need(t, "haproxy"),
		"3.0": need(t, filepath.Join(cacheDir(), "bin", "haproxy-3.0")),
		"3.2": need(t, filepath.Join(cacheDir(), "bin", "haproxy-3.2")),
		"3.4": need(t, filepath.Join(cacheDir(), "bin", "haproxy-3.4")),
	}
}

// ShortDir is a temporary directory whose path leaves room for socket names.
func ShortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/tmp", "hc")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	return dir
}
