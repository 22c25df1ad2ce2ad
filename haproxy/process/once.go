package process

import (
	"context"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// Once starts a plain HAProxy without a master, for the self-test, and returns when
// it answers on its stats socket (under dir). stop ends it and waits.
func (b *Binary) Once(ctx context.Context, dir, file string) (stop func(), err error) {
	var said ring
	cmd := exec.Command(b.Path, "-db", "-f", file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Stderr, cmd.Env = &said, environment()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	stats := runtimeapi.Socket(filepath.Join(dir, "sock", "stats"))
	for {
		if _, err := stats.Do(ctx, "show info", nil); err == nil {
			break
		}
		t := time.NewTimer(pollEvery)
		select {
		case err := <-done:
			t.Stop()
			return nil, exited(err, said.text())
		case <-ctx.Done():
			t.Stop()
			_ = cmd.Process.Kill()
			<-done
			return nil, exited(ctx.Err(), said.text())
		case <-t.C:
		}
	}
	return func() {
		_ = cmd.Process.Kill()
		<-done
	}, nil
}
