// Command haproxy-connect runs HAProxy as the sidecar proxy of one service of
// Consul's mesh. Every flag is in the README beside this file.
//
// This package wires the others together: flags and environment, signals, the
// order of start and stop, the admin listener, exit codes. Nothing imports it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// usageError is bad input: one line, exit code 2.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// silent ends the program with a code and without a message.
type silent struct{ code int }

func (s silent) Error() string { return fmt.Sprintf("exit code %d", s.code) }

func main() { os.Exit(realMain(os.Args[1:], os.Stdout, os.Stderr)) }

var commands map[string]func(ctx context.Context, args []string, out, errw io.Writer) error

func init() { // cmdCompletion reads commands: a literal would be an initialization cycle
	commands = map[string]func(ctx context.Context, args []string, out, errw io.Writer) error{
		"completion": cmdCompletion,
		"run":        cmdRun, "render": cmdRender, "version": cmdVersion, "check": cmdCheck,
		"status": cmdStatus, "wait": cmdWait, "drain": cmdDrain, "doctor": cmdDoctor,
	}
}

func realMain(args []string, out, errw io.Writer) int {
	name := "run"
	if len(args) > 0 {
		if _, ok := commands[args[0]]; ok {
			name, args = args[0], args[1:]
		} else if args[0] == "help" && len(args) > 1 && commands[args[1]] != nil {
			name, args = args[1], []string{"-h"}
		} else if args[0] == "help" {
			fmt.Fprint(out, usage)
			return exitOK
		} else if len(args[0]) > 0 && args[0][0] != '-' {
			fmt.Fprintf(errw, "haproxy-connect: %q is not a command; see haproxy-connect help\n", args[0])
			return exitUsage
		}
	}
	// The first signal asks to stop, the second ends everything at once.
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	go reapOrphans(context.Background())
	go func() {
		s := <-signals
		stop(fmt.Errorf("signal %v", s))
		<-signals
		hurry()
	}()
	err := commands[name](ctx, args, out, errw)
	var use usageError
	var quiet silent
	var asked helpError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &asked):
		help(asked.fs, out)
		return exitOK
	case errors.As(err, &quiet):
		return quiet.code
	case errors.As(err, &use):
		fmt.Fprintf(errw, "haproxy-connect: %v\n", oneLine(err))
		return exitUsage
	}
	fmt.Fprintf(errw, "haproxy-connect: %v\n", oneLine(err))
	return exitFailure
}

const usage = `Usage: haproxy-connect -sidecar-for ID [flags]      run the sidecar of a service
       haproxy-connect -proxy-id ID [flags]         run this registered proxy
       haproxy-connect -sidecar-for ID [flags] -- command args
                                                    also run the application: from ready to drained
       haproxy-connect -register -service NAME -port PORT [-upstream name:port] [flags]
       haproxy-connect render|check|status|doctor|wait|drain|version [flags]

Commands:
  render    print the files that HAProxy would read, without keys
  check     -source NAME [-method M -path P -header K=V]: may this caller? exit 0 allow, 1 deny
  status    what the running sidecar does
  doctor    what would keep a sidecar from working, and what to do about each
  wait      until the running sidecar is ready (-timeout 1m; -once asks once)
  drain     the running sidecar: finish what is open and end
  completion  bash, zsh or fish: a script for the shell
  version   of this program, HAProxy and Consul, and the features in use

haproxy-connect -h lists every flag. Exit codes: 0 clean, 1 failure, 2 usage.
`
