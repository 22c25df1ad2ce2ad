package runtimeapi

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestGone: a master that does not know a process says so and may leave the connection
// open; nobody waits for its end.
func TestGone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	defer ln.Close()
	answers := make(chan string, 1)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			defer c.Close() // only when the test is over: a master may never close it
			_, _ = io.WriteString(c, <-answers)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	const answer = "Can't find the target PID matching the prefix '@!7'\n"
	answers <- answer
	_, err = Socket(path).Do(ctx, "@!7 show sess", nil)
	require.ErrorIs(t, err, ErrGone)
	require.ErrorIs(t, err, ErrKept)
	require.NoError(t, ctx.Err())
	// The same text from a worker is an ordinary answer, whose end is awaited.
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	answers <- answer
	_, err = Socket(path).Do(short, "show sess", nil)
	require.NotErrorIs(t, err, ErrGone)
	require.Error(t, err)
}
