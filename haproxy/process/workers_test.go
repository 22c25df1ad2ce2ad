package process

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// TestWorkerThatHasGone: no master is asked for it, as it might keep the connection.
func TestWorkerThatHasGone(t *testing.T) {
	cmd := exec.Command("true")
	require.NoError(t, cmd.Run())
	nobody := runtimeapi.Socket(filepath.Join(t.TempDir(), "master"))
	_, err := Worker{PID: cmd.Process.Pid, socket: nobody, prefix: "@!1 "}.Do(t.Context(), "show sess")
	require.ErrorIs(t, err, runtimeapi.ErrGone)
	_, err = Worker{PID: cmd.Process.Pid, socket: nobody, prefix: "@1 "}.Do(t.Context(), "show sess")
	require.NotErrorIs(t, err, runtimeapi.ErrGone, "there will be a next one: ask")
	require.Error(t, err)
}
