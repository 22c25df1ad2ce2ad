package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// listenAdmin serves the admin address; "" when there is none.
func (s *sidecar) listenAdmin(ctx context.Context, g *errgroup.Group) (string, error) {
	if s.conf.adminAddr == "" {
		return "", nil
	}
	ln, err := net.Listen("tcp", s.conf.adminAddr)
	if err != nil {
		return "", usagef("-admin-addr %q: cannot listen: %v; give another, or an empty one for none", s.conf.adminAddr, errors.Unwrap(err))
	}
	mux := http.NewServeMux()
	servePage(mux)
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /ready", s.ready)
	mux.HandleFunc("GET /status.json", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, s.status()) })
	mux.HandleFunc("GET /config", s.config)
	mux.HandleFunc("GET /metrics", s.serveMetrics)
	mux.Handle("GET /stats", s.stats())
	mux.HandleFunc("POST /drain", loopback(s.quit))
	mux.HandleFunc("POST /quit", loopback(s.quit))
	srv := server(named(mux, s.conf.adminAddr))
	g.Go(func() error {
		if err := srv.Serve(limited(ln)); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("admin listener: %w", err)
		}
		return nil
	})
	context.AfterFunc(ctx, func() { srv.Close() })
	return ln.Addr().String(), nil
}

// server returns an HTTP server with tight limits: whoever reaches its listener could
// otherwise use up the descriptors, which it shares with the authorization agent.
func server(h http.Handler) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
}

// maxPages is how many connections a listener for pages and metrics has at once.
const maxPages = 64

func limited(ln net.Listener) net.Listener { return netutil.LimitListener(ln, maxPages) }

// named refuses a request whose Host is not an address, localhost or the name in -admin-addr:
// a web page could otherwise give its own name our address and read what we serve (DNS
// rebinding). Health and metrics are served under any name.
func named(h http.Handler, listen string) http.Handler {
	own, _, _ := net.SplitHostPort(listen) // validated
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/metrics", "/ready", "/live":
			h.ServeHTTP(w, r)
			return
		}
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		host = strings.TrimSuffix(strings.ToLower(strings.Trim(host, "[]")), ".")
		if _, err := netip.ParseAddr(host); err != nil && host != "localhost" && (own == "" || host != strings.ToLower(own)) {
			http.Error(w, "this name is not ours: use an address, localhost, or the name in -admin-addr", http.StatusMisdirectedRequest)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // the client may be gone
}

// loopback refuses requests from other hosts and from web pages: the handlers behind it change something.
func loopback(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.RemoteAddr)
		if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() || r.Header.Get("Origin") != "" {
			http.Error(w, "only from this host", http.StatusForbidden)
			return
		}
		h(w, r)
	}
}

func (s *sidecar) quit(w http.ResponseWriter, r *http.Request) {
	s.stopping.Store(true)
	fmt.Fprintln(w, "draining")
	s.stop(fmt.Errorf("%s by the admin address", r.URL.Path[1:]))
}

// reasons says why the sidecar is not ready; empty when it is. It never blocks.
func (s *sidecar) reasons() []string {
	var out []string
	if s.stopping.Load() {
		out = append(out, "stopping")
	}
	r := s.running.Load()
	if r == nil {
		return append(out, "waiting for "+*s.phase.Load())
	}
	snap := s.newest.Load()
	if snap == nil {
		out = append(out, "waiting for the first complete answer of Consul")
		for _, f := range r.source.Feeds() {
			if f.Err != "" {
				out = append(out, f.Name+": "+f.Err)
			} else if f.Answers == 0 {
				out = append(out, f.Name+": not heard yet")
			}
		}
		return out
	}
	st := r.manager.Status()
	if !st.Ready {
		out = append(out, "HAProxy has not taken a configuration yet")
		if st.Err != "" {
			out = append(out, st.Err)
		}
	} else if !r.proc.Up() {
		out = append(out, "HAProxy is not running")
	}
	if leaf := snap.Leaf(); leaf != nil && time.Now().After(leaf.NotAfter) {
		out = append(out, "the leaf certificate has expired")
	}
	return out
}

// oldWorkers counts the replaced workers that still have sessions; 0 while there is no HAProxy.
func (s *running) oldWorkers(ctx context.Context) (n int) {
	workers, _ := s.proc.Workers(ctx)
	for _, w := range workers {
		if w.Old {
			n++
		}
	}
	return n
}

func (s *sidecar) ready(w http.ResponseWriter, _ *http.Request) {
	reasons := append([]string{}, s.reasons()...) // [] rather than null
	code := http.StatusOK
	if len(reasons) > 0 {
		code = http.StatusServiceUnavailable
	}
	answer(w, code, map[string]any{"ready": len(reasons) == 0, "reasons": reasons})
}

type statusEndpoint struct {
	Target  string `json:"target"`
	Name    string `json:"name"`
	Node    string `json:"node"`
	Address string `json:"address"`
	Weight  int    `json:"weight"`
	// From HAProxy's statistics, which begin anew at each start and reload:
	Health   string `json:"health,omitempty"`
	Sessions int    `json:"sessions"`
	Latency  int    `json:"latency_ms"`
	Verified bool   `json:"verified"` // the endpoint has answered, and nothing passes before its identity is verified
}

type statusCaller struct {
	Source  string `json:"source"`
	Allowed uint64 `json:"allowed"`
	Denied  uint64 `json:"denied"`
	Rule    string `json:"rule,omitempty"` // of the last deny
	Reason  string `json:"reason,omitempty"`
}

type statusRoot struct {
	Name  string    `json:"name"`
	Until time.Time `json:"until"`
}

type statusFeed struct {
	Name    string    `json:"name"`
	Error   string    `json:"error,omitempty"`
	Since   time.Time `json:"since"`
	Answers uint64    `json:"answers"`
	Errors  uint64    `json:"errors"`
}

type statusReport struct {
	Version   string            `json:"version"`
	HAProxy   string            `json:"haproxy,omitempty"`
	Ready     bool              `json:"ready"`
	Reasons   []string          `json:"reasons,omitempty"`
	Proxy     string            `json:"proxy,omitempty"`
	Service   string            `json:"service,omitempty"`
	Kind      string            `json:"kind,omitempty"` // of a gateway
	SPIFFEID  string            `json:"spiffe_id,omitempty"`
	Listen    string            `json:"listen,omitempty"`
	Protocol  string            `json:"protocol,omitempty"`
	Leaf      map[string]string `json:"leaf,omitempty"`
	Roots     int               `json:"roots,omitempty"`
	RootList  []statusRoot      `json:"root_list,omitempty"`
	Callers   []statusCaller    `json:"callers,omitempty"`
	Refusals  uint64            `json:"identity_refusals"`
	Upstreams []statusUpstream  `json:"upstreams"`
	Relays    []statusRelay     `json:"relays,omitempty"`  // of a gateway: which name leads where
	Refused   uint64            `json:"refused,omitempty"` // connections to a gateway that asked for no name of those
	Peers     []statusPeer      `json:"peers,omitempty"`
	Feeds     []statusFeed      `json:"consul"`
	Reloads   map[string]uint64 `json:"reloads"`
	Last      string            `json:"last_reload,omitempty"`
	Commands  uint64            `json:"runtime_commands"`
	Error     string            `json:"error,omitempty"`
	Warnings  []string          `json:"warnings,omitempty"`
	Ignored   []string          `json:"ignored"`
	Policy    string            `json:"policy_generation,omitempty"`
	Old       int               `json:"old_workers"`
	Deleting  int               `json:"draining_servers"`
	Restarts  uint64            `json:"haproxy_restarts"`
	Revoked   uint64            `json:"revoked_sessions"`
	Pending   bool              `json:"revocation_pending"` // open sessions still wait to be judged by the policy in force
	Known     bool              `json:"known"`              // false while the sidecar is set up: empty fields mean unknown
}

func (s *sidecar) status() statusReport {
	out := statusReport{Version: version(), Reasons: s.reasons(), Upstreams: []statusUpstream{}, Feeds: []statusFeed{}, Ignored: []string{}, Reloads: map[string]uint64{}}
	out.Ready = len(out.Reasons) == 0
	r := s.running.Load()
	if r == nil {
		return out
	}
	out.HAProxy = r.binary.Version.String()
	for _, f := range r.source.Feeds() {
		out.Feeds = append(out.Feeds, statusFeed{f.Name, f.Err, f.Since, f.Answers, f.Errors})
	}
	st := r.manager.Status()
	for reason, n := range st.Reloads {
		out.Reloads[string(reason)] = n
	}
	out.Last, out.Commands, out.Error, out.Policy = st.LastReload, st.Commands, st.Err, r.agent.Generation()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	out.Old, out.Revoked, out.Pending = r.oldWorkers(ctx), r.revoke.ended.Load(), r.revoke.pending.Load()
	out.Known = true
	out.Deleting, out.Restarts = st.Deleting, r.restarts.Load()
	snap := s.newest.Load()
	if snap == nil {
		return out
	}
	out.Proxy, out.Service, out.Kind = snap.Proxy.ID, snap.Proxy.Service, snap.Proxy.Kind
	if public := snap.Public(); public != nil && !public.Bind.Inner {
		out.Listen, out.Protocol = public.Bind.String(), string(public.Protocol())
	}
	if leaf := snap.Leaf(); leaf != nil {
		out.SPIFFEID = leaf.ID.String()
		out.Leaf = map[string]string{"serial": leaf.Serial, "until": leaf.NotAfter.UTC().Format(time.RFC3339),
			"left": time.Until(leaf.NotAfter).Round(time.Second).String(), "key": leaf.KeyKind()}
	}
	out.Roots = snap.Roots().Count
	for _, root := range snap.Roots().List {
		out.RootList = append(out.RootList, statusRoot{root.Name, root.NotAfter})
	}
	out.Callers, out.Refusals = s.metrics.list(), r.proc.Refusals()
	stats := r.endpointStats(ctx)
	out.Warnings = snap.Warnings()
	out.Relays, out.Refused = relayStatus(snap, st.Running, stats), refusedNames(snap, stats)
	for _, p := range snap.Peers {
		out.Peers = append(out.Peers, statusPeer{p.Name, p.State, p.TrustDomain, p.Imported, p.Exported})
	}
	for _, l := range snap.Listeners {
		if l.Role != connect.Local && l.Role != connect.Edge {
			continue
		}
		out.Upstreams = append(out.Upstreams, upstreamStatus(snap, l, st.Running, stats))
	}
	for _, n := range snap.Notices {
		out.Ignored = append(out.Ignored, n.String())
	}
	out.Ignored = append(out.Ignored, st.Refused...)
	return out
}

//go:embed page
var page embed.FS

// servePage serves the status page, whose script reads /status.json.
func servePage(mux *http.ServeMux) {
	files, err := fs.Sub(page, "page")
	if err != nil {
		panic(err) // embedded
	}
	server := http.FileServerFS(files)
	for _, path := range []string{"GET /{$}", "GET /page.css", "GET /page.js"} {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
			h.Set("X-Content-Type-Options", "nosniff")
			h.Set("Referrer-Policy", "no-referrer")
			h.Set("Cache-Control", "no-cache")
			server.ServeHTTP(w, r)
		})
	}
}

// endpointStats reads HAProxy's statistics of servers, by backend and server name, and of frontends, by
// name and "FRONTEND".
func (s *running) endpointStats(ctx context.Context) map[string]map[string]string {
	if !s.proc.Up() {
		return nil
	}
	all := map[string]map[string]string{}
	rows, _ := s.haproxyStats(ctx, 1+4) // without them the page says "unknown"
	for _, row := range rows {
		all[row["pxname"]+"/"+row["svname"]] = row
	}
	return all
}

// haproxyStats reads `show stat`: of frontends (1), backends (2) or servers (4), or the sum of these.
func (s *running) haproxyStats(ctx context.Context, kind int) ([]map[string]string, error) {
	out, err := s.proc.Do(ctx, fmt.Sprintf("show stat -1 %d -1", kind), nil)
	if err != nil {
		return nil, err
	}
	return runtimeapi.ParseStats(out)
}

func (s *sidecar) config(w http.ResponseWriter, _ *http.Request) {
	run := s.running.Load()
	if run == nil || run.manager.Status().Running == nil {
		http.Error(w, "HAProxy has not taken a configuration yet", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	printFiles(w, run.manager.Status().Running)
}

// printFiles prints every file of a configuration but keys.
func printFiles(w io.Writer, c *render.Config) {
	fmt.Fprintf(w, "==> %s/%s\n%s\n", c.Dir, render.MainFile, c.Text())
	for _, n := range slices.Sorted(maps.Keys(c.Files)) {
		text := c.Files[n]
		if filepath.Ext(n) == ".lua" {
			text = "(the identity filter, as built in)\n"
		}
		fmt.Fprintf(w, "==> %s/%s\n%s\n", c.Dir, n, text)
	}
	for _, n := range slices.Sorted(maps.Keys(c.Maps)) {
		fmt.Fprintf(w, "==> %s/%s\n%s\n", c.Dir, n, c.Maps[n].Text())
	}
	for _, n := range slices.Sorted(maps.Keys(c.Leaves)) {
		fmt.Fprintf(w, "==> %s/%s\n%s(key redacted)\n\n", c.Dir, n, c.Leaves[n].ChainPEM)
	}
	for _, n := range slices.Sorted(maps.Keys(c.Bundles)) {
		fmt.Fprintf(w, "==> %s/%s\n%s", c.Dir, n, c.Bundles[n].PEM)
	}
}

// transport reaches HAProxy's own pages, on a socket of the run directory.
func (s *running) transport() *http.Transport {
	return &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(s.dir, render.AdminSocket))
	}, DisableKeepAlives: true, ResponseHeaderTimeout: 10 * time.Second}
}

func (s *sidecar) stats() http.Handler {
	p := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "haproxy" },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			http.Error(w, "HAProxy is not running", http.StatusServiceUnavailable)
		},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		run := s.running.Load()
		if run == nil {
			http.Error(w, "HAProxy is not running yet", http.StatusServiceUnavailable)
			return
		}
		t := run.transport()
		defer t.CloseIdleConnections()
		one := *p
		one.Transport = t
		one.ServeHTTP(w, r)
	})
}
