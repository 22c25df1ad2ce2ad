package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/consul"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/jwt"
)

// release is set by the linker.
var release = ""

func version() string {
	if release != "" {
		return release
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

func cmdVersion(ctx context.Context, args []string, out, errw io.Writer) error {
	var c config
	if err := parse(newFlags("version", &c), &c, args); err != nil {
		return err
	}
	return printVersion(ctx, &c, out)
}

// printVersion prints that a part is missing instead of failing for it.
func printVersion(ctx context.Context, c *config, out io.Writer) error {
	info, _ := debug.ReadBuildInfo()
	fmt.Fprintf(out, "haproxy-connect %s (%s)\n", version(), info.GoVersion)
	if bin, err := process.Find(ctx, c.haproxy); err != nil {
		fmt.Fprintf(out, "haproxy         none: %v\n", err)
	} else {
		fmt.Fprintf(out, "haproxy         %s at %s, features %s\n", bin.Version, bin.Path, cmp.Or(strings.Join(bin.Version.Features().Names(), " "), "none"))
	}
	client, err := consul.NewClient(c.consul)
	if err != nil {
		return usageError{err}
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	v := client.Version(ctx)
	if v == "" {
		v = "unknown (no answer, or the token lacks agent:read)"
	}
	fmt.Fprintf(out, "consul          %s at %s\n", v, client.Addr())
	return nil
}

// once connects, watches until the first complete snapshot, and stops.
func once(ctx context.Context, c *config, log *slog.Logger) (*connect.Snapshot, string, error) {
	client, err := consul.NewClient(c.consul)
	if err != nil {
		return nil, "", usageError{err}
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	id, err := client.Lookup(ctx, c.which)
	if err != nil {
		return nil, "", err
	}
	w := consul.NewSource(client, id, log)
	var got *connect.Snapshot
	if err := w.Run(ctx, func(s *connect.Snapshot) {
		if got == nil {
			got = s
			cancel()
		}
	}); err != nil {
		return nil, "", err
	}
	if got == nil {
		var why []string
		for _, f := range w.Feeds() {
			if f.Err != "" {
				why = append(why, f.Name+": "+f.Err)
			}
		}
		return nil, "", fmt.Errorf("Consul at %s gave no complete answer within 15s %s", client.Addr(), strings.Join(why, "; "))
	}
	return got, id, nil
}

func cmdRender(ctx context.Context, args []string, out, errw io.Writer) error {
	var c config
	fs := newFlags("render", &c)
	explain := fs.Bool("explain", false, "say after each line of haproxy.cfg what in Consul made it")
	if err := parse(fs, &c, args); err != nil {
		return err
	}
	if err := c.validate(); err != nil {
		return err
	}
	bin, err := process.Find(ctx, c.haproxy)
	if err != nil {
		return usageError{err}
	}
	log := c.logger(errw)
	snap, id, err := once(ctx, &c, log)
	if err != nil {
		return err
	}
	if err := checkFiles(&c, log); err != nil {
		return err
	}
	account, err := process.WorkerAccount(c.user)
	if err != nil {
		return usageError{err}
	}
	originator := render.Originator(c.originator)
	if originator == "auto" {
		originator = render.Lua
	}
	r, err := render.New(c.render(c.dir(id), account, bin, originator))
	if err != nil {
		return err
	}
	conf, refused, err := r.Render(snap, nil)
	if err != nil {
		return err
	}
	for _, n := range snap.Notices {
		fmt.Fprintln(errw, n)
	}
	for _, r := range refused {
		fmt.Fprintln(errw, r)
	}
	if *explain {
		fmt.Fprint(out, conf.Explained())
		return nil
	}
	printFiles(out, conf)
	return nil
}

// cmdCheck answers "may this caller?" from the agent, without the sidecar.
func cmdCheck(ctx context.Context, args []string, out, errw io.Writer) error {
	var c config
	fs := newFlags("check", &c)
	source := fs.String("source", "", "calling service's `name` or SPIFFE ID")
	method := fs.String("method", "", "HTTP `method` of the request")
	path := fs.String("path", "", "`path` of the request; a query only matters for tokens")
	var headers stringsFlag
	fs.Var(&headers, "header", "request header `name=value`; may be repeated")
	explain := fs.Bool("explain", false, "also list every intention and why it did or did not decide")
	if err := parse(fs, &c, args); err != nil {
		return err
	}
	if *source == "" {
		return usagef("-source is required: the calling service's name or SPIFFE ID")
	}
	if err := c.validate(); err != nil {
		return err
	}
	var req *intentions.Request
	if *method != "" || *path != "" || len(headers) > 0 {
		req = &intentions.Request{Method: *method}
		req.Path, req.Query, _ = strings.Cut(*path, "?")
		if req.Method == "" {
			req.Method = http.MethodGet
		}
		if req.Path == "" {
			req.Path = "/"
		}
		for _, h := range headers {
			k, v, ok := strings.Cut(h, "=")
			if !ok || k == "" {
				return usagef("-header %q: want name=value", h)
			}
			req.Headers = append(req.Headers, intentions.Header{Name: strings.ToLower(k), Value: v})
		}
	}
	snap, _, err := once(ctx, &c, c.logger(errw))
	if err != nil {
		return err
	}
	policy := snap.Public().Policy()
	if policy == nil {
		return fmt.Errorf("nobody can call %s: it only calls others, as its registration names no port of the application", snap.Proxy.Service)
	}
	from := certs.SPIFFEID{TrustDomain: snap.Proxy.TrustDomain, Partition: "default", Namespace: "default", Datacenter: snap.Proxy.Datacenter, Service: *source}
	if strings.HasPrefix(*source, "spiffe:") {
		if from, err = certs.ParseID(*source); err != nil {
			return usagef("-source %q: %v", *source, err)
		}
	}
	if req != nil {
		wait, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		tokens := jwt.New(wait, c.logger(errw))
		tokens.Use(policy.Providers())
		tokens.Ready(wait)
		req.Tokens = tokens
	}
	d := policy.Decide(from, req)
	verdict := "deny"
	switch {
	case d.PerRequest:
		verdict = "deny (give -method and -path: it depends on the request)"
	case d.Allow:
		verdict = "allow"
	}
	fmt.Fprintf(out, "%s\nsource:      %s\ndestination: %s\nrule:        %s\nreason:      %s\n", verdict, from, snap.Proxy.Service, d.Rule, policy.Explain(from, req))
	if *explain {
		fmt.Fprintln(out, "considered:")
		for _, line := range policy.Considered(from) {
			fmt.Fprintln(out, "  "+line)
		}
	}
	if !d.Allow {
		return silent{exitFailure}
	}
	return nil
}

// adminFlags returns the flags of a command that talks to a running sidecar.
func adminFlags(name string, addr *string) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	fs.StringVar(addr, "admin-addr", cmp.Or(os.Getenv("HAPROXY_CONNECT_ADMIN_ADDR"), "127.0.0.1:1936"), "`address:port` of the running sidecar (HAPROXY_CONNECT_ADMIN_ADDR)")
	return fs
}

func parseAdmin(fs *flag.FlagSet, addr *string, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return helpError{fs}
		}
		return flagError(fs, err)
	}
	if fs.NArg() > 0 {
		return usagef("unexpected argument %q", fs.Arg(0))
	}
	if *addr == "" {
		return usagef("-admin-addr is empty: want address:port")
	}
	return checkAdmin(*addr)
}

// ask requests a page of a running sidecar.
func ask(ctx context.Context, method, addr, path string) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	req, err := http.NewRequestWithContext(ctx, method, "http://"+addr+path, nil)
	if err != nil {
		cancel()
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("no sidecar answers at -admin-addr %s: %w", addr, errors.Unwrap(err))
	}
	res.Body = &cancelBody{res.Body, cancel}
	return res, nil
}

type cancelBody struct {
	io.ReadCloser
	cancel func()
}

func (c *cancelBody) Close() error { defer c.cancel(); return c.ReadCloser.Close() }

func cmdWait(ctx context.Context, args []string, out, errw io.Writer) error {
	var addr string
	fs := adminFlags("wait", &addr)
	limit := fs.Duration("timeout", time.Minute, "give up after this `duration`")
	onlyOnce := fs.Bool("once", false, "ask once")
	if err := parseAdmin(fs, &addr, args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	why := "not asked"
	for {
		res, err := ask(ctx, http.MethodGet, addr, "/ready")
		if ctx.Err() != nil {
			return fmt.Errorf("not ready after %s: %s", *limit, why)
		}
		if err != nil {
			why = err.Error()
		} else {
			var got struct{ Reasons []string }
			_ = json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&got)
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
			why = strings.Join(got.Reasons, "; ")
		}
		if *onlyOnce {
			return fmt.Errorf("not ready: %s", why)
		}
		select {
		case <-ctx.Done():
		case <-t.C:
		}
	}
}

func cmdDrain(ctx context.Context, args []string, out, errw io.Writer) error {
	var addr string
	fs := adminFlags("drain", &addr)
	wait := fs.Bool("wait", false, "return when the sidecar has ended")
	if err := parseAdmin(fs, &addr, args); err != nil {
		return err
	}
	res, err := ask(ctx, http.MethodPost, addr, "/drain")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the sidecar at %s answers %s", addr, res.Status)
	}
	fmt.Fprintf(out, "the sidecar at %s finishes what is open, and ends\n", addr)
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for *wait {
		if res, err := ask(ctx, http.MethodGet, addr, "/live"); err != nil {
			break
		} else {
			res.Body.Close()
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
	}
	return nil
}

func cmdStatus(ctx context.Context, args []string, out, errw io.Writer) error {
	var addr string
	fs := adminFlags("status", &addr)
	if err := parseAdmin(fs, &addr, args); err != nil {
		return err
	}
	res, err := ask(ctx, http.MethodGet, addr, "/status.json")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	var s statusReport
	if err := json.NewDecoder(io.LimitReader(res.Body, 64<<20)).Decode(&s); err != nil {
		return fmt.Errorf("-admin-addr %s: this is not haproxy-connect: %w", addr, err)
	}
	state := "ready"
	if !s.Ready {
		state = "not ready: " + strings.Join(s.Reasons, "; ")
	}
	if s.Service == "" {
		fmt.Fprintf(out, "haproxy-connect %s, %s\nnothing is known of the service yet\n", s.Version, state)
		return nil
	}
	fmt.Fprintf(out, "%s (%s), HAProxy %s: %s\n", s.Service, s.Proxy, s.HAProxy, state)
	if s.SPIFFEID != "" {
		fmt.Fprintf(out, "identity %s, leaf left %s\n", s.SPIFFEID, s.Leaf["left"])
	}
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	printRelays(w, &s)
	if s.Kind == "" || len(s.Upstreams) > 0 {
		fmt.Fprintln(w, "\nUPSTREAM\tPROTOCOL\tLISTEN\tENDPOINT\tNODE\tWEIGHT")
	}
	for _, u := range s.Upstreams {
		if len(u.Endpoints) == 0 {
			fmt.Fprintf(w, "%s\t%s\t%s\tnone\t\t\n", u.Name, u.Protocol, label(u.Listen))
		}
		for _, e := range u.Endpoints {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\n", u.Name, u.Protocol, label(u.Listen), label(e.Address), label(e.Node), e.Weight)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for i := range s.Upstreams {
		if u := &s.Upstreams[i]; !u.simple() {
			fmt.Fprintf(out, "\nroutes of %s:\n  %s\n", u.Name, strings.Join(u.tree(), "\n  "))
		}
	}
	for _, f := range s.Feeds {
		if f.Error != "" {
			fmt.Fprintf(out, "Consul, %s: %s\n", f.Name, f.Error)
		}
	}
	for _, i := range s.Warnings {
		fmt.Fprintln(out, "WARNING:", i)
	}
	for _, i := range s.Ignored {
		fmt.Fprintln(out, i)
	}
	return nil
}
