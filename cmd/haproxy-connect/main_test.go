package main

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/haproxy-connect/haproxy-connect/cmd/haproxy-connect/internal/scripttest"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) { scripttest.Main(m, main) }

// TestScripts runs testdata/scripts; the commands that scripts may use are in internal/scripttest.
func TestScripts(t *testing.T) { scripttest.Scripts(t) }

func TestUsage(t *testing.T) { scripttest.Usage(t) }

func TestMeasure(t *testing.T) { scripttest.Measure(t) }

func TestSoak(t *testing.T) { scripttest.Soak(t) }

// TestUnit checks that systemd accepts the unit and finds it closed enough.
func TestUnit(t *testing.T) {
	unit, err := os.ReadFile(filepath.Join("..", "..", "docker", "systemd", "haproxy-connect@.service"))
	require.NoError(t, err)
	dir := t.TempDir()
	file := filepath.Join(dir, "haproxy-connect@web.service")
	// The binary need not be installed here.
	require.NoError(t, os.WriteFile(file, bytes.ReplaceAll(unit, []byte("/usr/local/bin/haproxy-connect"), []byte("/bin/true")), 0o644))
	for _, args := range [][]string{{"verify", "--man=no", file}, {"security", "--offline=yes", "--threshold=20", "--no-pager", file}} {
		out, err := exec.Command("systemd-analyze", args...).CombinedOutput()
		require.NoError(t, err, "systemd-analyze %v: %s", args, out)
	}
}

// What says by which policy all was judged is gone before another policy is in force.
func TestOutdated(t *testing.T) {
	r := &revocations{dir: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	file := filepath.Join(r.dir, judgedFile)
	one, two := intentions.NewPolicy(intentions.Config{Destination: "one"}), intentions.NewPolicy(intentions.Config{Destination: "two"})
	require.NoError(t, os.WriteFile(file, []byte(one.Digest()), 0o600))
	r.Outdated(one)
	require.FileExists(t, file)
	require.True(t, r.pending.Load())
	r.Outdated(two)
	require.NoFileExists(t, file)
	r.Outdated(two)
}
