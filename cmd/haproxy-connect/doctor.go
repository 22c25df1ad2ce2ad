package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect/consul"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
)

// cmdDoctor looks at everything a sidecar needs before it is started, or while it runs,
// and names one fix per finding. Exit code 1 if something will not work.
func cmdDoctor(ctx context.Context, args []string, out, errw io.Writer) error {
	var c config
	fs := newFlags("doctor", &c)
	if err := parse(fs, &c, args); err != nil {
		return err
	}
	if err := c.validate(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client, err := consul.NewClient(c.consul)
	if err != nil {
		return usageError{err}
	}
	facts, found := client.Examine(ctx, c.which)
	dir := c.dir(cmp.Or(facts.ProxyID, "unknown"))
	found = slices.Concat(examineHAProxy(ctx, &c), examineMachine(&c, dir), found, examinePorts(&c, dir, facts))
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	bad := 0
	for _, f := range found {
		fmt.Fprintf(w, "%s\t%s\t%s\n", f.Level, label(f.What), plain(f.Text, 400))
		if f.Fix != "" {
			fmt.Fprintf(w, "\t\t-> %s\n", f.Fix)
		}
		if f.Level == consul.Fail {
			bad++
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if bad > 0 {
		return silent{exitFailure}
	}
	return nil
}

func examineHAProxy(ctx context.Context, c *config) []consul.Finding {
	b, err := process.Find(ctx, c.haproxy)
	if err != nil {
		return []consul.Finding{{What: "haproxy", Level: consul.Fail, Text: err.Error(), Fix: "apt install haproxy (2.6 or later), or -haproxy PATH"}}
	}
	text := fmt.Sprintf("%s at %s", b.Version, b.Path)
	if names := b.Version.Features().Names(); len(names) > 0 {
		text += ", " + strings.Join(names, ", ")
	}
	out := []consul.Finding{{What: "haproxy", Level: consul.OK, Text: text}}
	for _, bug := range b.Version.Bugs() {
		out = append(out, consul.Finding{What: "haproxy", Level: consul.Warn, Text: bug, Fix: "3.2.8 or later has none of these"})
	}
	return out
}

func examineMachine(c *config, dir string) (out []consul.Finding) {
	say := func(what string, level consul.Level, text, fix string) {
		out = append(out, consul.Finding{What: what, Level: level, Text: text, Fix: fix})
	}
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err == nil {
		switch {
		case r.Max < 1024:
			say("open files", consul.Fail, fmt.Sprintf("the limit is %d", r.Max), "ulimit -n 65536, LimitNOFILE=65536 or --ulimit nofile=65536")
		case r.Max < 10000:
			say("open files", consul.Warn, fmt.Sprintf("the limit of %d allows about %d connections", r.Max, (r.Max-300)/5), "ulimit -n 65536, LimitNOFILE=65536 or --ulimit nofile=65536")
		default:
			say("open files", consul.OK, fmt.Sprintf("the limit is %d", r.Max), "")
		}
	}
	account, err := process.WorkerAccount(c.user)
	if err != nil {
		say("worker", consul.Fail, err.Error(), "-user NAME of an account that exists")
		return out
	}
	if account.User != "" {
		say("worker", consul.OK, "HAProxy's worker runs as "+account.User, "")
	}
	if err := writable(dir, account); err != nil {
		say("run directory", consul.Fail, err.Error(), "make it writable for this user, or give another: -run-dir")
	} else {
		say("run directory", consul.OK, dir, "")
	}
	return out
}

// writable makes the run directory and writes to it, as a trial, and removes what it made.
func writable(dir string, a process.Account) error {
	made := ""
	for up := dir; ; up = filepath.Dir(up) {
		if _, err := os.Stat(up); err == nil || up == filepath.Dir(up) {
			break
		}
		made = up
	}
	err := process.PrepareDir(dir, a)
	if err == nil {
		probe := filepath.Join(dir, "doctor")
		if err = os.WriteFile(probe, nil, 0o600); err != nil {
			err = fmt.Errorf("-run-dir %q: %w", dir, errors.Unwrap(err))
		}
		_ = os.Remove(probe)
	}
	if made != "" {
		_ = os.RemoveAll(made)
	}
	return err
}

// examinePorts tries every address, unless our own sidecar has it.
func examinePorts(c *config, dir string, f consul.Facts) (out []consul.Finding) {
	lock, err := lockDir(dir)
	if err == nil {
		lock.Close()
		_ = os.Remove(filepath.Join(dir, lockFile))
	} else if !errors.Is(err, os.ErrNotExist) {
		return []consul.Finding{{What: "ports", Level: consul.OK, Text: "a sidecar runs in " + dir + " and has them"}}
	}
	addrs := f.Listens
	if c.adminAddr != "" {
		addrs = append(slices.Clone(addrs), c.adminAddr)
	}
	for _, addr := range addrs {
		ln, err := net.Listen("tcp", addr)
		if err == nil {
			ln.Close()
			continue
		}
		fix := "end what listens there (ss -ltnp), or change the port in the registration"
		if addr == c.adminAddr {
			fix = "end what listens there (ss -ltnp), or -admin-addr"
		}
		var sys syscall.Errno
		text := err.Error()
		if errors.As(err, &sys) {
			text = sys.Error()
		}
		out = append(out, consul.Finding{What: "ports", Level: consul.Fail, Text: "cannot listen on " + addr + ": " + text, Fix: fix})
	}
	if len(out) == 0 {
		out = append(out, consul.Finding{What: "ports", Level: consul.OK, Text: strings.Join(addrs, ", ")})
	}
	return out
}
