package scripttest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// between is an HTTP proxy before Consul's agent that a script can make misbehave.
type between struct {
	addr string
	mu   sync.Mutex
	mode string
	cut  chan struct{}  // closed when the mode changes, to end the requests that wait
	seen map[string]int // requests in this mode, by path
}

// cmdBetween runs "between": it starts the proxy; $BETWEEN is its address.
func (w *world) cmdBetween(ts *testscript.TestScript, _ bool, _ []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	w.env.Defer(func() { ln.Close() })
	b := &between{addr: ln.Addr().String(), cut: make(chan struct{}), seen: map[string]int{}}
	w.between = b
	ts.Setenv("BETWEEN", b.addr)
	target := w.httpAt
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: target})
			r.Out.Header.Del("Accept-Encoding")
		},
		FlushInterval: -1,
		ErrorHandler:  func(rw http.ResponseWriter, _ *http.Request, _ error) { http.Error(rw, "cut", http.StatusBadGateway) },
		ModifyResponse: func(res *http.Response) error {
			mode, _ := b.now()
			if mode == "skew" {
				res.Header.Set("Date", time.Now().Add(time.Hour).UTC().Format(http.TimeFormat))
			}
			if mode == "oldroot" && res.Request.URL.Path == "/v1/agent/connect/ca/roots" {
				return onlyActive(res)
			}
			return nil
		},
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		mode, cut := b.now()
		if status, err := strconv.Atoi(mode); err == nil {
			http.Error(rw, "as told", status)
			return
		}
		if mode == "half" && b.count(r.URL.Path)%2 == 0 {
			http.Error(rw, "half of them", http.StatusInternalServerError)
			return
		}
		if mode == "slow" {
			time.Sleep(300 * time.Millisecond)
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		go func() {
			select {
			case <-cut:
				cancel()
			case <-ctx.Done():
			}
		}()
		proxy.ServeHTTP(rw, r.WithContext(ctx))
	})}
	go func() { _ = srv.Serve(ln) }()
}

func (b *between) now() (string, chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mode, b.cut
}

// cmdFault runs "fault none|STATUS|half|slow|oldroot|skew": every request gets this status,
// every second one for a path fails, each takes 0.3 s longer, inactive roots are left out of the list, or
// the agent's clock is an hour ahead. Requests that wait are ended.
func (w *world) cmdFault(_ *testscript.TestScript, _ bool, args []string) {
	b := w.between
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mode = args[0]
	close(b.cut)
	b.cut = make(chan struct{})
	b.seen = map[string]int{}
}

// count counts the requests for a path since the mode changed: the second fails, whatever else is asked.
func (b *between) count(path string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen[path]++
	return b.seen[path]
}

// onlyActive leaves inactive roots out of an answer.
func onlyActive(res *http.Response) error {
	var list map[string]any
	if err := json.NewDecoder(res.Body).Decode(&list); err != nil {
		return err
	}
	res.Body.Close()
	roots, _ := list["Roots"].([]any)
	list["Roots"] = slices.DeleteFunc(roots, func(r any) bool { return r.(map[string]any)["Active"] != true })
	out, err := json.Marshal(list)
	if err != nil {
		return err
	}
	res.Body, res.ContentLength = io.NopCloser(bytes.NewReader(out)), int64(len(out))
	res.Header.Set("Content-Length", strconv.Itoa(len(out)))
	return nil
}

// cmdSaid runs "said NAME COUNT REGEXP": it waits until the log of the sidecar matches at least COUNT times.
func (w *world) cmdSaid(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[1])
	ts.Check(err)
	re, err := regexp.Compile(args[2])
	ts.Check(err)
	got := 0
	if err := eventually(4*patience, func() error {
		if got = len(re.FindAllString(w.logs[args[0]].String(), -1)); got < want {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		ts.Fatalf("%s says %q %d times, want %d:\n%s", args[0], args[2], got, want, w.logs[args[0]])
	}
}

// cmdServers runs "servers ADMIN keep|same|changed": it remembers the names of HAProxy's
// servers, or compares them with those remembered.
func (w *world) cmdServers(ts *testscript.TestScript, _ bool, args []string) {
	var got string
	err := eventually(patience, func() error {
		text, err := scrape(args[0])
		if err != nil {
			return err
		}
		got = fmt.Sprint(regexp.MustCompile(`(?m)^haproxy_server_weight\{proxy="[^"]*\.default\.dc1",server="[^"]*"\} `).FindAllString(text, -1))
		if args[1] == "keep" {
			w.servers[args[0]] = got
		} else if (got == w.servers[args[0]]) != (args[1] == "same") {
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("servers %s before, %s now: want %s\n%s", w.servers[args[0]], got, args[1], w.allLogs())
	}
}

// cmdConsulClient runs "consul-client": it starts a client agent beside the server, on the
// same machine; from here on scripts and sidecars talk to it.
func (w *world) cmdConsulClient(ts *testscript.TestScript, _ bool, _ []string) {
	var p [2]int
	for i := range p {
		var err error
		p[i], err = freePort()
		ts.Check(err)
	}
	conf := fmt.Sprintf(`data_dir = %q
bind_addr = "127.0.0.1"
log_level = "warn"
retry_join = ["127.0.0.1:%d"]
retry_interval = "1s"
acl { enabled = true, default_policy = %q, tokens { agent = "mastertoken", default = "mastertoken" } }
ports { http = %d, serf_lan = %d, dns = -1, grpc = -1, grpc_tls = -1 }
`, filepath.Join(w.dir, "client"), w.serf, w.policy, p[0], p[1])
	file := filepath.Join(w.dir, "client.hcl")
	ts.Check(os.WriteFile(file, []byte(conf), 0o600))
	cmd := exec.Command(w.consul, "agent", "-config-file", file, "-node", "node2")
	out := &logBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(cmd.Start())
	w.env.Defer(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	w.httpAt = fmt.Sprintf("127.0.0.1:%d", p[0])
	ts.Setenv("CONSUL_HTTP_ADDR", w.httpAt)
	if err := eventually(3*patience, func() error {
		_, err := w.call(http.MethodGet, "/v1/agent/connect/ca/roots", nil)
		return err
	}); err != nil {
		ts.Fatalf("the client agent does not start: %v\n%s", err, out)
	}
}

// cmdForget runs "forget ID": the servers deregister a service that the client agent still has.
func (w *world) cmdForget(ts *testscript.TestScript, _ bool, args []string) {
	_, err := w.call(http.MethodPut, "/v1/catalog/deregister", fmt.Appendf(nil, `{"Node":"node2","ServiceID":%q}`, args[0]))
	ts.Check(err)
}

// cmdToken runs "token NAME SERVICE": it makes an ACL token for this service; $NAME is its secret.
// "token-revoke NAME" deletes the token and "token-restore NAME" makes the same one again.
func (w *world) cmdToken(ts *testscript.TestScript, _ bool, args []string) {
	digits := fmt.Sprintf("%012x", time.Now().UnixNano()&0xffffffffffff)
	secret, accessor := "aaaaaaaa-0000-4000-8000-"+digits, "bbbbbbbb-0000-4000-8000-"+digits
	w.tokens[args[0]] = [2]string{accessor, fmt.Sprintf(`{"AccessorID":%q,"SecretID":%q,"ServiceIdentities":[{"ServiceName":%q}]}`, accessor, secret, args[1])}
	ts.Setenv(args[0], secret)
	w.cmdTokenRestore(ts, false, args)
}

func (w *world) cmdTokenRestore(ts *testscript.TestScript, _ bool, args []string) {
	_, err := w.call(http.MethodPut, "/v1/acl/token", []byte(w.tokens[args[0]][1]))
	ts.Check(err)
}

func (w *world) cmdTokenRevoke(ts *testscript.TestScript, _ bool, args []string) {
	_, err := w.call(http.MethodDelete, "/v1/acl/token/"+w.tokens[args[0]][0], nil)
	ts.Check(err)
}

// cmdCut runs "cut NAME MIN MAX": the held session, in constant use, must end between MIN and
// MAX from now.
func (w *world) cmdCut(ts *testscript.TestScript, _ bool, args []string) {
	least, err := time.ParseDuration(args[1])
	ts.Check(err)
	most, err := time.ParseDuration(args[2])
	ts.Check(err)
	begun := time.Now()
	for pingOn(w.idle[args[0]]) == nil {
		if time.Since(begun) > most {
			ts.Fatalf("the session %s still lives after %s\n%s", args[0], most, w.allLogs())
		}
		time.Sleep(20 * time.Millisecond)
	}
	if took := time.Since(begun); took < least {
		ts.Fatalf("the session %s was cut after %s, not before %s\n%s", args[0], took, least, w.allLogs())
	}
}

// cmdApplyTime runs "apply-time ADMIN COUNT": it prints how long it takes from now until HAProxy has COUNT endpoints.
func (w *world) cmdApplyTime(ts *testscript.TestScript, _ bool, args []string) {
	begun := time.Now()
	w.cmdEndpoints(ts, false, args)
	fmt.Printf("measured: HAProxy %s: %s endpoints, the last served %s after Consul took it\n", w.version, args[1], time.Since(begun).Round(time.Millisecond))
}

// cmdToggle runs "toggle ADMIN N FILE FILE": it registers the two in turn, N times in all,
// each after the reload for the one before.
func (w *world) cmdToggle(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	count := func() (sum int) {
		res, err := http.Get("http://" + args[0] + "/status.json")
		if err != nil {
			return 0
		}
		defer res.Body.Close()
		var got struct{ Reloads map[string]int }
		_ = json.NewDecoder(res.Body).Decode(&got)
		for _, c := range got.Reloads {
			sum += c
		}
		return sum
	}
	for i := range n {
		before := count()
		w.cmdRegister(ts, false, args[2+i%2:3+i%2])
		if err := eventually(patience, func() error {
			if count() == before {
				return errors.New("no reload")
			}
			return nil
		}); err != nil {
			ts.Fatalf("toggle %d: %v\n%s", i, err, w.allLogs())
		}
	}
}

// cmdSmallDisk runs "small-disk DIR": it mounts a file system of 3 MB at DIR; "full DIR" fills it to the last byte.
func (w *world) cmdSmallDisk(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.MkdirAll(args[0], 0o755))
	ts.Check(syscall.Mount("tmpfs", args[0], "tmpfs", 0, "size=3m,mode=0755"))
	w.env.Defer(func() { _ = syscall.Unmount(args[0], syscall.MNT_DETACH) })
}

func (w *world) cmdFull(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.Create(filepath.Join(args[0], "filler"))
	ts.Check(err)
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

// cmdStatusSays runs "status ADMIN REGEXP": it waits until /status.json matches; "! status" until it no longer does.
func (w *world) cmdStatusSays(ts *testscript.TestScript, neg bool, args []string) {
	re := regexp.MustCompile(args[1])
	last := ""
	if err := eventually(2*patience, func() error {
		res, err := http.Get("http://" + args[0] + "/status.json")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		last = string(b)
		if re.Match(b) == neg {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		ts.Fatalf("status of %s: want %s (not: %v):\n%s\n%s", args[0], args[1], neg, last, strings.TrimSpace(w.allLogs()))
	}
}

// cmdDrop runs "drop NAME": it closes a held session.
func (w *world) cmdDrop(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(w.idle[args[0]].Close())
}

// relay is the command relay ADDR [URL], an application that scripts start: it answers with
// its name, or with what URL answers, and ends in order on SIGTERM.
func relay() {
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if len(os.Args) < 3 {
			fmt.Fprint(rw, "relay")
			return
		}
		req, err := http.NewRequestWithContext(r.Context(), r.Method, os.Args[2], strings.NewReader("relayed"))
		if err != nil {
			http.Error(rw, err.Error(), http.StatusInternalServerError)
			return
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			http.Error(rw, err.Error(), http.StatusBadGateway)
			return
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != http.StatusOK {
			http.Error(rw, fmt.Sprint(res.Status, err), http.StatusBadGateway)
			return
		}
		fmt.Fprintf(rw, "relayed %s", b)
	})
	srv := &http.Server{Addr: os.Args[1], Handler: h}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		_ = srv.Shutdown(context.Background())
	}()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	<-done
}

// cmdPage runs "page ADMIN REGEXP...": it waits until the status page, as a browser makes it,
// matches all of these; "! page": none.
func (w *world) cmdPage(ts *testscript.TestScript, neg bool, args []string) {
	browser, err := exec.LookPath("chromium-headless-shell")
	ts.Check(err)
	dom := ""
	err = eventually(patience, func() error {
		out, err := exec.Command(browser, "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom",
			"--user-data-dir="+filepath.Join(w.dir, "browser"), "http://"+args[0]+"/").Output()
		if err != nil {
			return err
		}
		dom = string(out)
		for _, a := range args[1:] {
			if regexp.MustCompile(a).MatchString(dom) == neg {
				return fmt.Errorf("want %s (not: %v)", a, neg)
			}
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("page of %s: %v\n%s\n%s", args[0], err, dom, w.allLogs())
	}
}

// cmdNotified runs "notified": it plays systemd's side of Type=notify, on $NOTIFY_SOCKET.
// "notified STATE" waits until it was told STATE.
func (w *world) cmdNotified(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) == 0 {
		path := filepath.Join(w.dir, "notify")
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
		ts.Check(err)
		w.env.Defer(func() { c.Close() })
		ts.Setenv("NOTIFY_SOCKET", path)
		log := &logBuffer{}
		w.logs["systemd"] = log
		go func() { _, _ = io.Copy(log, c) }()
		return
	}
	w.cmdLog(ts, false, []string{"systemd", args[0]})
}

// cmdJSONLines runs "json-lines NAME": every line of the sidecar's access log must be JSON, and there must be some.
func (w *world) cmdJSONLines(ts *testscript.TestScript, _ bool, args []string) {
	n := 0
	for line := range strings.Lines(w.logs[args[0]].String()) {
		if strings.HasPrefix(line, "{") {
			n++
			if !json.Valid([]byte(line)) {
				ts.Fatalf("not JSON: %s", line)
			}
		}
	}
	if n == 0 {
		ts.Fatalf("no line of JSON")
	}
}

// cmdLogged runs "logged NAME|FILE REGEXP URL|ADDR [H=V]": it repeats a request to URL, or a connection to
// ADDR, until the log of the sidecar, or the file, matches: the configuration may still be on its way.
func (w *world) cmdLogged(ts *testscript.TestScript, _ bool, args []string) {
	re := regexp.MustCompile(args[1])
	last := ""
	if err := eventually(patience, func() error {
		if !strings.HasPrefix(args[2], "http") {
			_, _ = tcpOnce(args[2], "ping") // served or not, it is logged
		} else {
			_, _ = getOnce(args[2:]) // here too
		}
		if log := w.logs[args[0]]; log != nil {
			last = log.String()
		} else if b, err := os.ReadFile(args[0]); err != nil {
			return err
		} else {
			last = string(b)
		}
		if !re.MatchString(last) {
			return errors.New("not there")
		}
		return nil
	}); err != nil {
		ts.Fatalf("%s: %v, want %s:\n%s\n%s", args[0], err, re, last, w.allLogs())
	}
}

// cmdScraped runs "scraped ADMIN,ADMIN FILE...": every metric that the files name must be in a
// scrape of one of these sidecars, with a value.
func (w *world) cmdScraped(ts *testscript.TestScript, _ bool, args []string) {
	var all string
	for _, admin := range strings.Split(args[0], ",") {
		text, err := scrape(admin)
		ts.Check(err)
		all += text
	}
	found := 0
	for _, file := range args[1:] {
		text, err := os.ReadFile(filepath.Join("..", "..", file))
		ts.Check(err)
		for _, name := range regexp.MustCompile(`\bhaproxy_[a-z_]+`).FindAllString(string(text), -1) {
			if !regexp.MustCompile(`(?m)^` + name + `(\{.*\})? \S+$`).MatchString(all) {
				ts.Fatalf("%s asks for %s, which is not in a scrape", file, name)
			}
			found++
		}
	}
	if found < 20 {
		ts.Fatalf("%d metrics named: what became of the files?", found)
	}
}
