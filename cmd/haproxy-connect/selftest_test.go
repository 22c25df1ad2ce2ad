package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/haproxy/selftest"
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

// need fails in CI and skips elsewhere.
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

// versions are the HAProxy binaries under test, by name.
func versions(t testing.TB) map[string]string {
	return map[string]string{
		"2.6": need(t, "haproxy"),
		"3.0": need(t, filepath.Join(cacheDir(), "bin", "haproxy-3.0")),
		"3.2": need(t, filepath.Join(cacheDir(), "bin", "haproxy-3.2")),
	}
}

// shortDir is a temporary directory whose path leaves room for socket names.
func shortDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/tmp", "hc")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	return dir
}

func TestSelfTest(t *testing.T) {
	for name, path := range versions(t) {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			bin, err := process.Find(ctx, path)
			require.NoError(t, err)
			account, err := process.WorkerAccount("")
			require.NoError(t, err)
			dir := filepath.Join(shortDir(t), "run")
			require.NoError(t, process.PrepareDir(dir, account))
			f := bin.Version.Features()
			err = selftest.Run(ctx, dir, render.Options{User: account.User, Group: account.Group, LuaBool: f.LuaBool, SPOP: f.SPOP},
				func(d string) error { return process.OwnSocketDir(d, account) },
				func(ctx context.Context, file string) (func(), error) { return bin.Once(ctx, dir, file) })
			if err != nil {
				b, _ := os.ReadFile(filepath.Join(dir, render.MainFile))
				t.Logf("%s", b)
			}
			require.NoError(t, err)
		})
	}
}
