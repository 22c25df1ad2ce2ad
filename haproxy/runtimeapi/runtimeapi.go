// Package runtimeapi talks to HAProxy's runtime API: one connection, one command,
// one answer, a deadline.
//
// Invariants: a command is one line, checked before it is sent; a payload goes
// apart and never into an error; an answer is bounded. It imports nothing of ours;
// haproxy/process and haproxy use it.
package runtimeapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// Socket is the path of a stats or master socket.
type Socket string

const (
	maxAnswer = 64 << 20
	timeout   = 10 * time.Second // for a caller without a deadline
)

// Do sends a command and returns HAProxy's whole answer, without the blank lines
// around it. payload, if any, follows as HAProxy's "<<" form; it must not contain a
// blank line. An answer that says that the command failed is not an error here.
func (s Socket) Do(ctx context.Context, command string, payload []byte) (string, error) {
	if err := Check(command); err != nil {
		return "", err
	}
	line := command + "\n"
	if payload != nil {
		text := strings.TrimRight(string(payload), "\n")
		if text == "" || strings.Contains(text, "\n\n") {
			return "", fmt.Errorf("command %q: the payload is empty or has a blank line", command)
		}
		line = command + " <<\n" + text + "\n\n"
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", string(s))
	if err != nil {
		return "", fmt.Errorf("HAProxy's socket: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(c, line); err != nil {
		return "", fmt.Errorf("command %q: %w", command, err)
	}
	// The master socket of 2.6 goes on waiting for commands until our side is closed.
	if err := c.(*net.UnixConn).CloseWrite(); err != nil {
		return "", fmt.Errorf("command %q: %w", command, err)
	}
	b, err := readAnswer(io.LimitReader(c, maxAnswer), line[0] == '@')
	if errors.Is(err, ErrGone) && c.SetReadDeadline(time.Now().Add(closes)) == nil {
		if _, e := c.Read(make([]byte, 1)); errors.Is(e, os.ErrDeadlineExceeded) {
			err = ErrKept
		}
	}
	if err != nil {
		return "", fmt.Errorf("command %q: %w", command, err)
	}
	return strings.Trim(string(b), "\n"), nil
}

// ErrGone is a master's answer that it has no such process, or none any more.
var ErrGone = errors.New("HAProxy's master has no such process")

// ErrKept is ErrGone from a master that has not closed the connection. A master can keep ten
// such connections at most, so the next question should take its time.
var ErrKept = fmt.Errorf("%w, and keeps the connection", ErrGone)

// closes is how long a master may take to close the connection after it has answered that a
// process is gone.
const closes = 50 * time.Millisecond

// gone is how a master's answer begins if it has no such process.
const gone = "Can't find the target PID matching the prefix"

// readAnswer reads to the end. A master says that it has no such process and then, one
// time in seven, leaves the connection open (measured with 3.0 and 3.2): that line is the end.
func readAnswer(r io.Reader, ofMaster bool) ([]byte, error) {
	var b bytes.Buffer
	part := make([]byte, 16<<10)
	for {
		n, err := r.Read(part)
		b.Write(part[:n])
		if ofMaster && bytes.HasPrefix(b.Bytes(), []byte(gone)) && bytes.HasSuffix(b.Bytes(), []byte("\n")) {
			return nil, ErrGone
		}
		if err == io.EOF {
			return b.Bytes(), nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// Check refuses what would be more than one command: HAProxy separates commands
// by ";" and newline, and reads "<<" as the start of a payload.
func Check(command string) error {
	if command == "" || len(command) > 15000 {
		return fmt.Errorf("command of %d bytes: must be 1 to 15000", len(command))
	}
	if strings.ContainsFunc(command, func(r rune) bool { return r < ' ' || r > '~' || r == ';' || r == '\\' }) || strings.Contains(command, "<<") {
		return errors.New("command with a character that could start another one")
	}
	return nil
}
