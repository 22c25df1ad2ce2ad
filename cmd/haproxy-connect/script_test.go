package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

var onlyHAProxy = flag.String("haproxy-version", "", "run the scripts on this version of HAProxy only: 2.6, 3.0 or 3.2")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"haproxy-connect": main, "relay": relay, "bench-answer": benchAnswer})
}

var measure = flag.Bool("measure", false, "run the scripts of testdata/measure, which print and judge nothing")

// TestMeasure runs the scripts of testdata/measure, for make bench.
func TestMeasure(t *testing.T) {
	if !*measure {
		t.Skip("only with -measure")
	}
	consul := need(t, consulPath())
	for version, path := range versions(t) {
		t.Run(version, func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Dir:   filepath.Join("..", "..", "testdata", "measure"),
				Setup: func(e *testscript.Env) error { return newWorld(e, consul, path, version) }, Cmds: worldCommands, RequireUniqueNames: true,
				Condition: func(cond string) (bool, error) { return cond == "v"+version, nil },
			})
		})
	}
}

// TestScripts runs every script of testdata/scripts on every version of HAProxy,
// with a Consul of its own, and drives the program as a user does. A script of
// testdata/usage needs neither.
func TestScripts(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul and HAProxy")
	}
	consul := need(t, consulPath())
	for version, path := range versions(t) {
		if *onlyHAProxy != "" && *onlyHAProxy != version {
			continue
		}
		t.Run(version, func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Dir:   filepath.Join("..", "..", "testdata", "scripts"),
				Setup: func(e *testscript.Env) error { return newWorld(e, consul, path, version) },
				Cmds:  worldCommands, Condition: func(cond string) (bool, error) { return cond == "v"+version, nil },
				RequireUniqueNames: true,
			})
		})
	}
}

// TestUsage runs the scripts that need neither Consul nor HAProxy.
func TestUsage(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: filepath.Join("..", "..", "testdata", "usage"), RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error { e.Setenv("HOME", e.WorkDir); return nil },
		Cmds:  map[string]func(*testscript.TestScript, bool, []string){"bad": cmdBad}})
}

// bad REGEXP ARGS...: the program refuses these arguments with exit code 2 and one
// line that matches.
func cmdBad(ts *testscript.TestScript, _ bool, args []string) {
	var errw bytes.Buffer
	cmd := exec.Command("haproxy-connect", args[1:]...)
	bin, err := exec.LookPath(filepath.Join(strings.Split(ts.Getenv("PATH"), string(os.PathListSeparator))[0], "haproxy-connect"))
	ts.Check(err)
	cmd.Path, cmd.Err = bin, nil
	cmd.Dir, cmd.Stderr = ts.MkAbs("."), &errw
	cmd.Env = append(os.Environ(), "HAPROXY_CONNECT_THREADS="+ts.Getenv("HAPROXY_CONNECT_THREADS"), "CONSUL_HTTP_ADDR="+ts.Getenv("CONSUL_HTTP_ADDR"))
	_ = cmd.Run()
	text := strings.TrimSuffix(errw.String(), "\n")
	last := text[strings.LastIndex(text, "\n")+1:] // logs may come before it, and nothing else
	for line := range strings.Lines(text[:len(text)-len(last)]) {
		if !strings.HasPrefix(line, "time=") {
			ts.Fatalf("%q: more than one line: %.500q", args[1:], text)
		}
	}
	if code := cmd.ProcessState.ExitCode(); code != exitUsage || !regexp.MustCompile(args[0]).MatchString(last) {
		ts.Fatalf("%q: exit code %d, says %q; want code 2 and %q", args[1:], code, text, args[0])
	}
}

func consulPath() string {
	if p, err := exec.LookPath("consul"); err == nil {
		return p
	}
	return filepath.Join(cacheDir(), "bin", "consul-1.21.0")
}

// patience is for a condition to come true on a busy machine. An agent whose first full
// sync meets a registration tells its servers nothing, of a check that passes for one, for
// up to 30 s (agent/ae: retryFullSyncState).
const patience = 40 * time.Second

// world is what one script runs in: a Consul, applications, sidecars.
type world struct {
	datacenters map[string]string // HTTP addresses, by name
	env         *testscript.Env
	consul      string
	haproxy     string
	version     string
	dir         string // short, for sockets
	httpAt      string
	args        []string

	agent  *exec.Cmd
	cars   map[string]*exec.Cmd
	logs   map[string]*logBuffer
	loads  map[string]*load
	counts map[string]*atomic.Int64
	idle   map[string]net.Conn
	ca     *certs.Authority
	before *certs.Authority // whose root ca replaced

	serf     int    // the server's port
	policy   string // its default policy
	between  *between
	servers  map[string]string
	tokens   map[string][2]string
	issuers  map[string]*issuer
	scaled   map[string][2]int
	occupied map[string]net.Listener
	peers    []*peer
	commands map[string]func(*testscript.TestScript, bool, []string)
}

type worldKey struct{}

func newWorld(e *testscript.Env, consul, haproxy, version string) error {
	dir, err := os.MkdirTemp("/tmp", "hc")
	if err != nil {
		return err
	}
	w := &world{env: e, consul: consul, haproxy: haproxy, version: version, dir: dir, cars: map[string]*exec.Cmd{}, logs: map[string]*logBuffer{},
		loads: map[string]*load{}, counts: map[string]*atomic.Int64{}, idle: map[string]net.Conn{},
		servers: map[string]string{}, tokens: map[string][2]string{}, issuers: map[string]*issuer{},
		scaled: map[string][2]int{}, occupied: map[string]net.Listener{}, commands: worldCommands}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	e.Values[worldKey{}] = w
	e.Setenv("HAPROXY", haproxy)
	e.Setenv("DIR", dir)
	e.Setenv("BIG", strings.Repeat("0123456789", 6000))
	e.Setenv("LONG", strings.Repeat("a", 5000))
	e.Setenv("CONSUL_HTTP_TOKEN", "mastertoken")
	e.Defer(w.close)
	return nil
}

func (w *world) close() {
	for _, l := range w.loads {
		l.stop()
	}
	for _, c := range w.idle {
		c.Close()
	}
	for _, c := range w.cars {
		_ = c.Process.Signal(syscall.SIGINT)
		_ = c.Process.Signal(syscall.SIGTERM) // the second ends it at once
	}
	for id, c := range w.cars {
		done := make(chan struct{})
		go func() { _, _ = c.Process.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(patience):
			_ = c.Process.Kill()
		}
		_ = exec.Command("pkill", "-9", "-f", filepath.Join(w.dir, id, "haproxy.cfg")).Run()
	}
	if w.agent != nil {
		_ = w.agent.Process.Kill()
		_ = w.agent.Wait()
	}
	os.RemoveAll(w.dir)
}

func inWorld(f func(w *world, ts *testscript.TestScript, neg bool, args []string)) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		f(ts.Value(worldKey{}).(*world), ts, neg, args)
	}
}

var worldCommands = map[string]func(*testscript.TestScript, bool, []string){
	"config-delete": inWorld((*world).cmdConfigDelete), "shares": inWorld((*world).cmdShares), "agree": inWorld((*world).cmdAgree), "datacenter": inWorld((*world).cmdDatacenter),
	"between": inWorld((*world).cmdBetween), "fault": inWorld((*world).cmdFault), "said": inWorld((*world).cmdSaid),
	"servers": inWorld((*world).cmdServers), "consul-client": inWorld((*world).cmdConsulClient), "forget": inWorld((*world).cmdForget), "cut": inWorld((*world).cmdCut), "status": inWorld((*world).cmdStatusSays),
	"token": inWorld((*world).cmdToken), "token-revoke": inWorld((*world).cmdTokenRevoke), "token-restore": inWorld((*world).cmdTokenRestore),
	"scraped": inWorld((*world).cmdScraped), "notified": inWorld((*world).cmdNotified), "json-lines": inWorld((*world).cmdJSONLines), "logged": inWorld((*world).cmdLogged), "page": inWorld((*world).cmdPage), "drop": inWorld((*world).cmdDrop), "toggle": inWorld((*world).cmdToggle), "authz-cost": inWorld((*world).cmdAuthzCost), "apply-time": inWorld((*world).cmdApplyTime), "issuer": inWorld((*world).cmdIssuer), "jwt": inWorld((*world).cmdJWT), "header": inWorld((*world).cmdHeader),
	"mesh-hold": inWorld((*world).cmdMeshHold), "mesh-held": inWorld((*world).cmdMeshHeld),
	"mesh-get": inWorld((*world).cmdMeshGet), "differential": inWorld((*world).cmdDifferential), "check-agrees": inWorld((*world).cmdCheckAgrees),
	"bench-app": inWorld((*world).cmdBenchApp), "bench-identity": inWorld((*world).cmdBenchIdentity), "peer": inWorld((*world).cmdPeer), "bench": inWorld((*world).cmdBench), "soak": inWorld((*world).cmdSoak), "intentions-cost": inWorld((*world).cmdIntentionsCost), "scale-cost": inWorld((*world).cmdScaleCost),
	"small-disk": inWorld((*world).cmdSmallDisk), "full": inWorld((*world).cmdFull),
	"consul": inWorld((*world).cmdConsul), "consul-stop": inWorld((*world).cmdConsulStop), "consul-start": inWorld((*world).cmdConsulStart),
	"app": inWorld((*world).cmdApp), "port": inWorld((*world).cmdPort), "register": inWorld((*world).cmdRegister), "deregister": inWorld((*world).cmdDeregister),
	"config": inWorld((*world).cmdConfig), "intention": inWorld((*world).cmdIntention), "sidecar": inWorld((*world).cmdSidecar),
	"post": inWorld((*world).cmdPost), "signal": inWorld((*world).cmdSignal), "exited": inWorld((*world).cmdExited), "log": inWorld((*world).cmdLog),
	"http": inWorld((*world).cmdHTTP), "tcp": inWorld((*world).cmdTCP), "load": inWorld((*world).cmdLoad), "load-stop": inWorld((*world).cmdLoadStop),
	"rotate-roots": inWorld((*world).cmdRotateRoots), "leaf-root": inWorld((*world).cmdLeafRoot), "kill-haproxy": inWorld((*world).cmdKillHAProxy),
	"mesh-call": inWorld((*world).cmdMeshCall), "tls-server": inWorld((*world).cmdTLSServer), "received": inWorld((*world).cmdReceived), "reloads": inWorld((*world).cmdReloads),
	"flap": inWorld((*world).cmdFlap), "churn-intentions": inWorld((*world).cmdChurn), "route-times": inWorld((*world).cmdRouteTimes), "raw": inWorld((*world).cmdRaw), "grpc": inWorld((*world).cmdGRPC), "scale": inWorld((*world).cmdScale), "occupy": inWorld((*world).cmdOccupy), "free": inWorld((*world).cmdFree), "endpoints": inWorld((*world).cmdEndpoints),
	"hold": inWorld((*world).cmdHold), "held": inWorld((*world).cmdHeld), "haproxies": inWorld((*world).cmdHAProxies),
}

// logBuffer keeps what a sidecar says.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// nextPort hands out ports below those that the kernel gives to connections, each once:
// a port that was free a moment ago must not be somebody's in the next.
var nextPort atomic.Int32

func freePort() (int, error) {
	const first, count = 10000, 20000
	nextPort.CompareAndSwap(0, int32(os.Getpid()*97%count)+1)
	for range count {
		p := first + int(nextPort.Add(1))%count
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", p))
		if err == nil {
			return p, ln.Close()
		}
	}
	return 0, errors.New("no free port")
}

func eventually(limit time.Duration, try func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(15 * time.Millisecond)
	}
}

// consul ACLPOLICY [INTENTIONPOLICY [CONFIGURATION]] starts a server with ACLs.
func (w *world) cmdConsul(ts *testscript.TestScript, _ bool, args []string) {
	policy, extra := "deny", ""
	if len(args) > 0 {
		policy = args[0]
	}
	if len(args) > 1 {
		extra = fmt.Sprintf("default_intention_policy = %q\n", args[1])
	}
	if len(args) > 2 {
		extra += args[2] + "\n"
	}
	var p [5]int
	for i := range p {
		var err error
		p[i], err = freePort()
		ts.Check(err)
	}
	ts.Setenv("EXPOSE", strconv.Itoa(p[4])) // the only port that the agent exposes a check at
	conf := fmt.Sprintf(`%sdata_dir = %q
server = true
bootstrap_expect = 1
bind_addr = "127.0.0.1"
log_level = "warn"
performance { raft_multiplier = 1 }
connect { enabled = true }
addresses { http = "127.0.0.1 unix://%s" }
acl { enabled = true, default_policy = %q, tokens { initial_management = "mastertoken", agent = "mastertoken" } }
ports { http = %d, server = %d, serf_lan = %d, serf_wan = %d, dns = -1, grpc = -1, grpc_tls = -1, expose_min_port = %d, expose_max_port = %d }
`, extra, filepath.Join(w.dir, "consul"), filepath.Join(w.dir, "consul.sock"), policy, p[0], p[1], p[2], p[3], p[4], p[4]+1)
	file := filepath.Join(w.dir, "consul.hcl")
	ts.Check(os.WriteFile(file, []byte(conf), 0o600))
	w.serf, w.policy = p[2], policy
	w.args = []string{"agent", "-config-file", file, "-node", "node1"}
	w.httpAt = fmt.Sprintf("127.0.0.1:%d", p[0])
	ts.Setenv("CONSUL_HTTP_ADDR", w.httpAt)
	w.cmdConsulStart(ts, false, nil)
}

func (w *world) cmdConsulStart(ts *testscript.TestScript, _ bool, _ []string) {
	w.agent = exec.Command(w.consul, w.args...)
	out := &logBuffer{}
	w.agent.Stdout, w.agent.Stderr = out, out
	w.agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(w.agent.Start())
	err := eventually(3*patience, func() error {
		_, err := w.call(http.MethodGet, "/v1/connect/ca/roots", nil)
		if err == nil {
			_, err = w.call(http.MethodGet, "/v1/acl/token/self", nil)
		}
		return err
	})
	if err != nil {
		ts.Fatalf("Consul does not start: %v\n%s", err, out)
	}
}

func (w *world) cmdConsulStop(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(w.agent.Process.Kill())
	_ = w.agent.Wait()
	w.agent = nil
}

// call asks Consul.
func (w *world) call(method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequest(method, "http://"+w.httpAt+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Consul-Token", "mastertoken")
	res, err := (&http.Client{Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s %s", method, path, res.Status, b)
	}
	return b, err
}

func envName(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }

// port NAME...: sets $NAME to a free port.
func (w *world) cmdPort(ts *testscript.TestScript, _ bool, args []string) {
	for _, a := range args {
		p, err := freePort()
		ts.Check(err)
		ts.Setenv(a, strconv.Itoa(p))
	}
}

// app NAME tcp|banner|http|http2|socket [ADDR]: an application that answers with its
// name, on $NAME_PORT. What it received is counted.
func (w *world) cmdApp(ts *testscript.TestScript, _ bool, args []string) {
	name, kind, addr := args[0], args[1], "127.0.0.1:0"
	if len(args) > 2 {
		addr = args[2]
	}
	ln, err := net.Listen("tcp", addr)
	if kind == "socket" {
		ln, err = net.Listen("unix", filepath.Join(w.dir, name+".sock"))
		kind = "http"
		if err == nil {
			err = os.Chmod(filepath.Join(w.dir, name+".sock"), 0o666)
		}
	}
	ts.Check(err)
	w.env.Defer(func() { ln.Close() })
	if a, ok := ln.Addr().(*net.TCPAddr); ok {
		ts.Setenv(envName(name)+"_PORT", strconv.Itoa(a.Port))
	}
	count := &atomic.Int64{}
	w.counts[name], w.counts[name+" fails"], w.counts[name+" given up"], w.counts[name+" at once"] = count, &atomic.Int64{}, &atomic.Int64{}, &atomic.Int64{}
	serveApp(ln, name, kind, w.counts)
}

func unencryptedHTTP2() *http.Protocols {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &p
}

func serveApp(ln net.Listener, name, kind string, counts map[string]*atomic.Int64) {
	count, fails, given := counts[name], counts[name+" fails"], counts[name+" given up"]
	under := &atOnce{most: counts[name+" at once"]}
	switch kind {
	case "switch":
		go serveSwitch(ln, count)
	case "late":
		go serveLate(ln)
	case "tcp", "banner":
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					if kind == "banner" {
						fmt.Fprintf(c, "hello from %s\n", name)
					}
					br := bufio.NewReader(c)
					for {
						line, err := br.ReadString('\n')
						count.Add(int64(len(line)))
						if strings.Contains(line, forbidden) {
							unauthorized.Add(1)
						}
						if err != nil {
							return
						}
						fmt.Fprintf(c, "%s %s", name, line)
					}
				}()
			}
		}()
	case "grpc":
		srv := grpc.NewServer()
		healthpb.RegisterHealthServer(srv, health.NewServer())
		go func() { _ = srv.Serve(ln) }()
	default:
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			count.Add(1)
			if strings.Contains(r.URL.Path, strings.ReplaceAll(forbidden, " ", "-")) {
				unauthorized.Add(1)
			}
			under.begin()
			defer under.now.Add(-1)
			if misbehave(rw, r, name, fails, given) {
				return
			}
			b, _ := io.ReadAll(r.Body)
			if d, err := time.ParseDuration(r.URL.Query().Get("sleep")); err == nil {
				time.Sleep(d)
			}
			rw.Header().Set("Trailer", "Grpc-Status")
			var others []string // that CGI would read as one of ours
			for k := range r.Header {
				if strings.Contains(k, "_") {
					others = append(others, k)
				}
			}
			fmt.Fprintf(rw, "%s %s %s %s body=%d xfcc=%q caller=%q authorization=%q token=%q others=%q", name, r.Proto, r.Method, r.RequestURI, len(b),
				r.Header.Values("X-Forwarded-Client-Cert"), r.Header.Values("X-Caller"), r.Header.Values("Authorization"), r.Header.Values("X-Token"), others)
			rw.Header().Set("Grpc-Status", "0")
		})
		srv := &http.Server{Handler: h, MaxHeaderBytes: 1 << 20}
		if kind == "http2" {
			srv.Protocols = unencryptedHTTP2()
		}
		go func() { _ = srv.Serve(ln) }()
	}
}

func (w *world) file(ts *testscript.TestScript, name string) []byte {
	return []byte(os.Expand(ts.ReadFile(name), ts.Getenv))
}

func (w *world) cmdRegister(ts *testscript.TestScript, _ bool, args []string) {
	for _, a := range args {
		_, err := w.call(http.MethodPut, "/v1/agent/service/register", w.file(ts, a))
		ts.Check(err)
	}
}

func (w *world) cmdDeregister(ts *testscript.TestScript, _ bool, args []string) {
	for _, a := range args {
		_, err := w.call(http.MethodPut, "/v1/agent/service/deregister/"+a, nil)
		ts.Check(err)
	}
}

func (w *world) cmdConfig(ts *testscript.TestScript, _ bool, args []string) {
	for _, a := range args {
		_, err := w.call(http.MethodPut, "/v1/config", w.file(ts, a))
		ts.Check(err)
	}
}

// post PATH FILE: any other write to Consul.
func (w *world) cmdPost(ts *testscript.TestScript, _ bool, args []string) {
	_, err := w.call(http.MethodPost, args[0], w.file(ts, args[1]))
	ts.Check(err)
}

// intention allow|deny|delete SOURCE DESTINATION
func (w *world) cmdIntention(ts *testscript.TestScript, _ bool, args []string) {
	path := "/v1/connect/intentions/exact?source=" + url.QueryEscape(args[1]) + "&destination=" + url.QueryEscape(args[2])
	var err error
	if args[0] == "delete" {
		_, err = w.call(http.MethodDelete, path, nil)
	} else {
		_, err = w.call(http.MethodPut, path, []byte(`{"Action":"`+args[0]+`"}`))
	}
	ts.Check(err)
}

// sidecar NAME [flags]: starts the program and waits until it is ready;
// $NAME_ADMIN is its admin address. "! sidecar" does not wait.
func (w *world) cmdSidecar(ts *testscript.TestScript, neg bool, args []string) {
	name := args[0]
	admin, err := freePort()
	ts.Check(err)
	addr := fmt.Sprintf("127.0.0.1:%d", admin)
	ts.Setenv(envName(name)+"_ADMIN", addr)
	bin, err := exec.LookPath("haproxy-connect")
	if err != nil {
		bin, err = os.Executable()
	}
	ts.Check(err)
	cmd := exec.Command(bin, append([]string{"-haproxy", w.haproxy, "-admin-addr", addr, "-run-dir", filepath.Join(w.dir, name), "-access-log", "text"}, args[1:]...)...)
	cmd.Args[0] = "haproxy-connect"
	cmd.Env = append(os.Environ(), "CONSUL_HTTP_ADDR="+ts.Getenv("CONSUL_HTTP_ADDR"), "CONSUL_HTTP_TOKEN=mastertoken", "PATH="+ts.Getenv("PATH"))
	if n := ts.Getenv("NOTIFY_SOCKET"); n != "" {
		cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+n)
	}
	log := &logBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	ts.Check(cmd.Start())
	if old := w.logs[name]; old != nil {
		w.logs[name+", before"] = old
	}
	w.cars[name], w.logs[name] = cmd, log
	w.env.T().Log("sidecar", name, "pid", cmd.Process.Pid, "admin", addr)
	if neg {
		return
	}
	if err := eventually(patience, func() error { return ready(addr) }); err != nil {
		ts.Fatalf("sidecar %s: %v\n%s", name, err, log)
	}
}

func ready(addr string) error {
	res, err := http.Get("http://" + addr + "/ready")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("not ready: %s", b)
	}
	return nil
}

// scrape is what a sidecar shows at /metrics, without servers in maintenance.
func scrape(admin string) (string, error) {
	res, err := http.Get("http://" + admin + "/metrics?no-maint")
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

// signal NAME TERM|KILL|INT|HUP
func (w *world) cmdSignal(ts *testscript.TestScript, _ bool, args []string) {
	sig := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP}[args[1]]
	ts.Check(w.cars[args[0]].Process.Signal(sig))
}

// exited NAME CODE: the sidecar ends, with this exit code (-1: by a signal).
func (w *world) cmdExited(ts *testscript.TestScript, _ bool, args []string) {
	c := w.cars[args[0]]
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	select {
	case <-done:
	case <-time.After(2 * patience):
		ts.Fatalf("%s does not end:\n%s", args[0], w.logs[args[0]])
	}
	delete(w.cars, args[0])
	if got := strconv.Itoa(c.ProcessState.ExitCode()); got != args[1] {
		ts.Fatalf("%s ended with %s, want %s:\n%s", args[0], got, args[1], w.logs[args[0]])
	}
}

// log NAME REGEXP: the sidecar says so, sooner or later. "! log": it has not.
func (w *world) cmdLog(ts *testscript.TestScript, neg bool, args []string) {
	re, err := regexp.Compile(args[1])
	ts.Check(err)
	l := w.logs[args[0]]
	if neg {
		if re.MatchString(l.String()) {
			ts.Fatalf("%s says %s:\n%s", args[0], args[1], l)
		}
		return
	}
	if err := eventually(patience, func() error {
		if re.MatchString(l.String()) {
			return nil
		}
		return errors.New("not said")
	}); err != nil {
		ts.Fatalf("%s never says %q:\n%s", args[0], args[1], l)
	}
}

// http STATUS URL [REGEXP] [h2] [-H k=v] [-X METHOD]: the answer is so, sooner or later.
func (w *world) cmdHTTP(ts *testscript.TestScript, neg bool, args []string) {
	want, target := args[0], args[1]
	re, tr, method := regexp.MustCompile(""), http.RoundTripper(&http.Transport{DisableKeepAlives: true}), http.MethodGet
	header, within, begun := http.Header{}, patience, time.Now()
	for i := 2; i < len(args); i++ {
		switch args[i] {
		case "h2":
			tr = &http.Transport{Protocols: unencryptedHTTP2()}
		case "-H":
			i++
			k, v, _ := strings.Cut(args[i], "=")
			header[k] = append(header[k], v) // as it is spelled
		case "-X":
			i++
			method = args[i]
		case "-within":
			i++
			var err error
			within, err = time.ParseDuration(args[i])
			ts.Check(err)
		default:
			re = regexp.MustCompile(args[i])
		}
	}
	if path, rest, ok := strings.Cut(strings.TrimPrefix(target, "unix:"), "|"); ok {
		target = "http://unix" + rest
		tr = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}}
	}
	client := &http.Client{Transport: tr, Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	last := ""
	err := eventually(patience, func() error {
		req, err := http.NewRequest(method, target, nil)
		if err != nil {
			return err
		}
		req.Header = header
		req.Host = cmp.Or(header.Get("Host"), req.Host)
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		last = fmt.Sprintf("%d %s", res.StatusCode, b)
		if err != nil || !slices.Contains(strings.Split(want, "|"), strconv.Itoa(res.StatusCode)) || !re.Match(b) {
			return fmt.Errorf("%s answers %.2000s (%v), want %s %s", target, last, err, want, re)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
	if took := time.Since(begun); took > within {
		ts.Fatalf("%s took %s, at most %s\n%s", target, took, within, w.allLogs())
	}
	ts.Logf("after %s: %.300s", time.Since(begun).Round(time.Millisecond), last)
}

func (w *world) allLogs() string {
	var b strings.Builder
	for n, l := range w.logs {
		said := strings.SplitAfter(l.String(), "\n")
		calls := 0 // of the access log, the last are enough
		for i := len(said) - 1; i >= 0; i-- {
			if strings.Contains(said[i], " source=") && !strings.Contains(said[i], "level=") {
				if calls++; calls > 200 {
					said[i] = ""
				}
			}
		}
		fmt.Fprintf(&b, "---- %s\n%s\n", n, strings.Join(said, ""))
	}
	return b.String()
}

// grpc ok|denied ADDR: a real gRPC call, unary and streaming.
func (w *world) cmdGRPC(ts *testscript.TestScript, _ bool, args []string) {
	conn, err := grpc.NewClient("passthrough:///"+args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	err = eventually(patience, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c := healthpb.NewHealthClient(conn)
		res, err := c.Check(ctx, &healthpb.HealthCheckRequest{})
		if args[0] == "denied" {
			if grpcstatus.Code(err) != codes.PermissionDenied {
				return fmt.Errorf("want PermissionDenied, got %v", err)
			}
			return nil
		}
		if err != nil || res.Status != healthpb.HealthCheckResponse_SERVING {
			return fmt.Errorf("%v %w", res, err)
		}
		stream, err := c.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	})
	if err != nil {
		ts.Fatalf("grpc %s: %v\n%s", args[1], err, w.allLogs())
	}
}

// tcp ok|refused ADDR [TEXT] [EXPECT]: one line there, one back.
func (w *world) cmdTCP(ts *testscript.TestScript, _ bool, args []string) {
	send, expect := "ping", ""
	if len(args) > 2 {
		send = args[2]
	}
	if len(args) > 3 {
		expect = args[3]
	}
	err := eventually(patience, func() error {
		got, err := tcpOnce(args[1], send)
		switch {
		case args[0] == "ok" && (err != nil || !strings.Contains(got, expect)):
			return fmt.Errorf("%s: got %q (%v)", args[1], got, err)
		case args[0] == "refused" && (err == nil || got != ""):
			return fmt.Errorf("%s: served: %q", args[1], got)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
}

func dialAny(addr string) (net.Conn, error) {
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	c, err := net.DialTimeout(network, addr, 5*time.Second)
	if err == nil {
		err = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	return c, err
}

func tcpOnce(addr, send string) (string, error) {
	c, err := dialAny(addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, send+"\n"); err != nil {
		return "", err
	}
	return bufio.NewReader(c).ReadString('\n')
}

// load is a client that counts: keep-alive HTTP, or a TCP line per connection.
type load struct {
	end          chan struct{}
	once         sync.Once
	wg           sync.WaitGroup
	good, failed atomic.Int64
	first        atomic.Pointer[string]
}

func (l *load) stop() {
	l.once.Do(func() { close(l.end) })
	l.wg.Wait()
}

// load NAME URL|ADDR [get]: starts two clients, which GET and POST in turn.
func (w *world) cmdLoad(ts *testscript.TestScript, _ bool, args []string) {
	l := &load{end: make(chan struct{})}
	w.loads[args[0]] = l
	for i := range 2 {
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			client := &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{IdleConnTimeout: 30 * time.Second}}
			for n := 0; ; n++ {
				select {
				case <-l.end:
					return
				case <-time.After(2 * time.Millisecond):
				}
				begun := time.Now()
				if err := oneCall(client, args[1], len(args) < 3 && (n+i)%2 == 0); err != nil {
					text := fmt.Sprintf("begun %s, after %s: %v", begun.UTC().Format(time.StampMilli), time.Since(begun).Round(time.Millisecond), err)
					l.first.CompareAndSwap(nil, &text)
					l.failed.Add(1)
				} else {
					l.good.Add(1)
				}
			}
		}()
	}
}

func oneCall(client *http.Client, target string, post bool) error {
	if !strings.HasPrefix(target, "http") {
		got, err := tcpOnce(target, "ping")
		if err == nil && !strings.HasSuffix(got, "ping\n") {
			err = fmt.Errorf("got %q", got)
		}
		return err
	}
	var res *http.Response
	var err error
	if post {
		res, err = client.Post(target, "text/plain", strings.NewReader("some body"))
	} else {
		res, err = client.Get(target)
	}
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.100s", res.Status, b)
	}
	return err
}

// load-stop NAME [MOST]: no more than MOST (0) calls have failed, and some went well.
func (w *world) cmdLoadStop(ts *testscript.TestScript, _ bool, args []string) {
	l := w.loads[args[0]]
	most := int64(0)
	if len(args) > 1 {
		most, _ = strconv.ParseInt(args[1], 10, 64)
	}
	_ = eventually(patience, func() error { // it must have had the time to say something
		if l.good.Load()+l.failed.Load() < 50 {
			return errors.New("too few")
		}
		return nil
	})
	l.stop()
	ts.Logf("load %s: %d good, %d failed", args[0], l.good.Load(), l.failed.Load())
	if most >= 0 && (l.good.Load() == 0 || l.failed.Load() > most) { // below 0: whatever happened
		first := ""
		if p := l.first.Load(); p != nil {
			first = *p
		}
		ts.Fatalf("load %s: %d good, %d failed, the first: %s\n%s", args[0], l.good.Load(), l.failed.Load(), first, w.allLogs())
	}
}

// rotate-roots [TTL] gives Consul's CA a new key and root, of which the script then
// also has the key: mesh-call and tls-server sign with it. Leaves live for TTL, less
// the minute that Consul dates them back.
func (w *world) cmdRotateRoots(ts *testscript.TestScript, _ bool, args []string) {
	ttl := "72h"
	if len(args) > 0 {
		ttl = args[0]
	}
	var roots struct{ TrustDomain string }
	b, err := w.call(http.MethodGet, "/v1/connect/ca/roots", nil)
	ts.Check(err)
	ts.Check(json.Unmarshal(b, &roots))
	w.before = w.ca
	w.ca, err = certs.NewAuthority(roots.TrustDomain)
	ts.Check(err)
	body, err := json.Marshal(map[string]any{"Provider": "consul", "Config": map[string]any{
		"PrivateKey": w.ca.KeyPEM, "RootCert": w.ca.CertPEM, "LeafCertTTL": ttl, "IntermediateCertTTL": "8760h",
		"SkipValidate": true, "CSRMaxPerSecond": 1000,
	}})
	ts.Check(err)
	_, err = w.call(http.MethodPut, "/v1/connect/ca/configuration", body)
	ts.Check(err)
}

// leaf-root ADDR...: each listener sooner or later presents a leaf of the newest root,
// with the cross-signed one by which those verify it who know only the root before.
func (w *world) cmdLeafRoot(ts *testscript.TestScript, _ bool, args []string) {
	for _, addr := range args {
		err := eventually(2*patience, func() error {
			b, err := w.call(http.MethodGet, "/v1/connect/ca/roots", nil)
			if err != nil {
				return err
			}
			var list struct {
				Roots []struct {
					RootCert string
					Active   bool
				}
			}
			if err := json.Unmarshal(b, &list); err != nil {
				return err
			}
			pool := x509.NewCertPool()
			for _, r := range list.Roots {
				if r.Active {
					pool.AppendCertsFromPEM([]byte(r.RootCert))
				}
			}
			conf := &tls.Config{InsecureSkipVerify: true}
			conf.VerifyConnection = func(cs tls.ConnectionState) error {
				_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
				if err != nil || w.before == nil {
					return err
				}
				block, _ := pem.Decode([]byte(w.before.CertPEM))
				before, err := x509.ParseCertificate(block.Bytes)
				if err != nil {
					return err
				}
				if len(cs.PeerCertificates) != 2 {
					return fmt.Errorf("the chain has %d certificates", len(cs.PeerCertificates))
				}
				cross := cs.PeerCertificates[1]
				if !bytes.Equal(cross.AuthorityKeyId, before.SubjectKeyId) { // OpenSSL minds, Go does not
					return errors.New("the cross-signed certificate names another key than that of the root before")
				}
				return errors.Join(cross.CheckSignatureFrom(before), cs.PeerCertificates[0].CheckSignatureFrom(cross))
			}
			c, err := tls.Dial("tcp", addr, conf)
			if err == nil {
				c.Close()
			} else if strings.Contains(err.Error(), "certificate required") {
				err = nil
			}
			return err
		})
		if err != nil {
			ts.Fatalf("%s: %v\n%s", addr, err, w.allLogs())
		}
	}
}

// kill-haproxy NAME worker|master
func (w *world) cmdKillHAProxy(ts *testscript.TestScript, _ bool, args []string) {
	out, err := exec.Command("pgrep", "-f", "--", "-f "+filepath.Join(w.dir, args[0], "haproxy.cfg")).Output()
	ts.Check(err)
	self := w.cars[args[0]].Process.Pid
	killed := 0
	for _, f := range strings.Fields(string(out)) {
		stat, err := os.ReadFile("/proc/" + f + "/stat")
		if err != nil {
			continue
		}
		rest := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		master := rest[1] == strconv.Itoa(self)
		if master == (args[1] == "master") {
			pid, _ := strconv.Atoi(f)
			ts.Check(syscall.Kill(pid, syscall.SIGKILL))
			killed++
		}
	}
	if killed == 0 {
		ts.Fatalf("no %s of %s among %q", args[1], args[0], out)
	}
}

// haproxies NAME COUNT: so many HAProxy processes run for this sidecar, sooner or later.
func (w *world) cmdHAProxies(ts *testscript.TestScript, _ bool, args []string) {
	last := ""
	if err := eventually(patience, func() error {
		out, _ := exec.Command("pgrep", "-f", "--", "-f "+filepath.Join(w.dir, args[0], "haproxy.cfg")).Output()
		if last = strings.Join(strings.Fields(string(out)), " "); strconv.Itoa(len(strings.Fields(last))) != args[1] {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		ts.Fatalf("HAProxy processes %s, want %s\n%s", last, args[1], w.allLogs())
	}
}

// reloads ADMIN MOST [REASON...]: HAProxy was reloaded at most so often, the start
// and the named reasons apart.
func (w *world) cmdReloads(ts *testscript.TestScript, _ bool, args []string) {
	res, err := http.Get("http://" + args[0] + "/status.json")
	ts.Check(err)
	defer res.Body.Close()
	var got struct {
		Reloads map[string]int
		Last    string `json:"last_reload"`
	}
	ts.Check(json.NewDecoder(res.Body).Decode(&got))
	most, _ := strconv.Atoi(args[1])
	n := 0
	for reason, count := range got.Reloads {
		excused := reason == "start"
		for _, a := range args[2:] {
			excused = excused || a == reason
		}
		if !excused {
			n += count
		}
	}
	if n > most {
		ts.Fatalf("%d reloads, want at most %d: %v, the last: %s\n%s", n, most, got.Reloads, got.Last, w.allLogs())
	}
}

// hold NAME ADDR: opens a TCP session and keeps it. held NAME open|closed [-within D].
func (w *world) cmdHold(ts *testscript.TestScript, _ bool, args []string) {
	if err := eventually(patience, func() error {
		c, err := dialAny(args[1])
		if err != nil {
			return err
		}
		if err := pingOn(c); err != nil {
			c.Close()
			return err
		}
		w.idle[args[0]] = c
		return nil
	}); err != nil {
		ts.Fatalf("hold %s: %v\n%s", args[0], err, w.allLogs())
	}
}

func pingOn(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "still\n"); err != nil {
		return err
	}
	b := make([]byte, 1024)
	_, err := c.Read(b)
	return err
}

func (w *world) cmdHeld(ts *testscript.TestScript, _ bool, args []string) {
	c := w.idle[args[0]]
	if args[1] == "open" {
		if err := pingOn(c); err != nil {
			ts.Fatalf("the session %s has ended: %v\n%s", args[0], err, w.allLogs())
		}
		return
	}
	limit := patience
	if len(args) > 3 {
		var err error
		limit, err = time.ParseDuration(args[3])
		ts.Check(err)
	}
	ts.Check(c.SetReadDeadline(time.Now().Add(limit)))
	b := make([]byte, 1)
	if _, err := c.Read(b); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		ts.Fatalf("the session %s is still open (%v)\n%s", args[0], err, w.allLogs())
	}
}

// mesh-call ok|refused|403 ADDR none|foreign|expired|two-uris|SERVICE [sni=NAME]: a
// caller of its own, straight to a public listener.
func (w *world) cmdMeshCall(ts *testscript.TestScript, _ bool, args []string) {
	conf := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} // the listener is what is tested
	for _, a := range args[3:] {
		conf.ServerName, _ = strings.CutPrefix(a, "sni=")
		conf.ServerName = strings.ReplaceAll(conf.ServerName, "TRUSTDOMAIN", w.ca.TrustDomain)
	}
	if who := args[2]; who != "none" {
		ca, from, service := w.ca, time.Now().Add(-time.Minute), who
		var err error
		switch who {
		case "foreign":
			ca, err = certs.NewAuthority(w.ca.TrustDomain)
			ts.Check(err)
			service = "www"
		case "expired":
			from, service = time.Now().Add(-2*time.Hour), "www"
		case "two-uris":
			service = "www"
		}
		u, err := url.Parse(ca.ID(service).String())
		ts.Check(err)
		uris := []*url.URL{u}
		if who == "two-uris" {
			second, err := url.Parse(ca.ID("other").String())
			ts.Check(err)
			uris = append(uris, second)
		}
		chain, key, err := ca.Sign(uris, from, time.Hour)
		ts.Check(err)
		pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
		ts.Check(err)
		conf.Certificates = []tls.Certificate{pair}
	}
	once := func() (string, error) {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", args[1], conf)
		if err != nil {
			return "", err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return "", err
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			return "", err
		}
		b, err := bufio.NewReader(c).ReadString('\n')
		if b != "" {
			err = nil
		}
		return b, err
	}
	got := ""
	err := eventually(patience, func() error {
		var err error
		got, err = once()
		switch args[0] {
		case "ok":
			if err == nil && strings.Contains(got, " 403 ") {
				err = errors.New("denied")
			}
			return err
		case "403":
			if err == nil && !strings.Contains(got, " 403 ") {
				err = errors.New("not a 403")
			}
			return err
		}
		if err == nil {
			return errors.New("served")
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("mesh-call %v: %q: %v\n%s", args, got, err, w.allLogs())
	}
}

// tls-server NAME SERVICE silent|banner|slow|echo|http: a server on $NAME_PORT with a valid
// leaf of SERVICE; what it reads after the handshake is counted.
func (w *world) cmdTLSServer(ts *testscript.TestScript, _ bool, args []string) {
	name, kind := args[0], args[2]
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	w.env.Defer(func() { ln.Close() })
	port := strconv.Itoa(ln.Addr().(*net.TCPAddr).Port)
	ts.Setenv(envName(name)+"_PORT", port)
	uri := w.ca.ID(args[1]).String()
	if args[1] == "PORT" { // a certificate that names its own port, which no service is called
		uri = port
	}
	u, err := url.Parse(uri)
	ts.Check(err)
	chain, key, err := w.ca.Sign([]*url.URL{u}, time.Now().Add(-time.Minute), time.Hour)
	ts.Check(err)
	pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
	ts.Check(err)
	count, hellos := &atomic.Int64{}, &atomic.Int64{}
	w.counts[name], w.counts[name+"-hellos"] = count, hellos
	conf := &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			hellos.Add(1)
			if kind == "slow" {
				time.Sleep(300 * time.Millisecond)
			}
			return nil, nil
		}}
	serve := func(c net.Conn) {
		defer c.Close()
		if kind == "banner" {
			fmt.Fprintf(c, "hello from %s\n", name)
		}
		b := make([]byte, 32<<10)
		for {
			n, err := c.Read(b)
			count.Add(int64(n))
			if err != nil {
				return
			}
			switch kind {
			case "echo", "slow":
				_, _ = c.Write(b[:n])
			case "http":
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(name), name)
			}
		}
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(tls.Server(c, conf))
		}
	}()
}

// received NAME COUNT|+: so much arrived at an application or tls-server (bytes, or
// requests of an HTTP application); "+" is more than nothing.
func (w *world) cmdReceived(ts *testscript.TestScript, _ bool, args []string) {
	got := w.counts[args[0]].Load()
	if args[1] == "+" && got > 0 || strconv.FormatInt(got, 10) == args[1] {
		return
	}
	ts.Fatalf("%s received %d, want %s\n%s", args[0], got, args[1], w.allLogs())
}

// scale SERVICE COUNT: so many instances of a service, each a listener of a running
// sidecar (by its address on the loopback network), registered and deregistered
// one by one in rolling order. $<SERVICE>_PUBLIC is the sidecar's port.
func (w *world) cmdScale(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	have := w.scaled[args[0]]
	from := 0
	if len(args) > 2 && args[2] == "roll" { // replace all: new ones first
		from = have[1]
	}
	for i := from; i < from+n; i++ {
		if i >= have[0] && i < have[1] {
			continue
		}
		body := fmt.Sprintf(`{"Kind":"connect-proxy","Name":"%[1]s-many","ID":"%[1]s-%[2]d","Address":"127.0.%[3]d.%[4]d","Port":%[5]s,"Proxy":{"DestinationServiceName":"%[1]s"}}`,
			args[0], i, 1+i/200, 1+i%200, ts.Getenv(envName(args[0])+"_PUBLIC"))
		_, err := w.call(http.MethodPut, "/v1/agent/service/register", []byte(body))
		ts.Check(err)
	}
	for i := have[0]; i < have[1]; i++ {
		if i < from || i >= from+n {
			_, err := w.call(http.MethodPut, fmt.Sprintf("/v1/agent/service/deregister/%s-%d", args[0], i), nil)
			ts.Check(err)
		}
	}
	w.scaled[args[0]] = [2]int{from, from + n}
}

// endpoints ADMIN COUNT: the sidecar knows so many endpoints in all, and HAProxy
// has so many servers that are not draining.
func (w *world) cmdEndpoints(ts *testscript.TestScript, _ bool, args []string) {
	last := 0
	if err := eventually(patience, func() error {
		text, err := scrape(args[0])
		if err != nil {
			return err
		}
		last = len(regexp.MustCompile(`(?m)^haproxy_server_weight\{proxy="[^"]*\.default\.dc1",server="[^"]*"\} [1-9]`).FindAllString(text, -1))
		if strconv.Itoa(last) != args[1] {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		listed := ""
		for service := range w.scaled {
			list, err := w.call(http.MethodGet, "/v1/health/connect/"+service+"?passing", nil)
			listed += fmt.Sprintf("; Consul lists %d of %s (%v)", strings.Count(string(list), `"connect-proxy"`), service, err)
		}
		ts.Fatalf("HAProxy has %d servers, want %s%s\n%s", last, args[1], listed, w.allLogs())
	}
}

// occupy PORT: another process's listener; free PORT ends it.
func (w *world) cmdOccupy(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:"+args[0])
	ts.Check(err)
	w.occupied[args[0]] = ln
	w.env.Defer(func() { ln.Close() })
}

func (w *world) cmdFree(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(w.occupied[args[0]].Close())
}

// flap SERVICE N: the last of three instances of scale goes and comes N times, as fast as Consul takes it.
func (w *world) cmdFlap(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	for range n / 2 {
		for _, count := range []string{"2", "3"} {
			w.cmdScale(ts, false, []string{args[0], count})
		}
	}
}

// churn-intentions DESTINATION N: N changes that leave www allowed throughout.
func (w *world) cmdChurn(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	for i := range n / 2 {
		source := fmt.Sprintf("caller%d", i%7)
		w.cmdIntention(ts, false, []string{"deny", source, args[0]})
		w.cmdIntention(ts, false, []string{"allow", source, args[0]})
	}
}

// raw REGEXP ADDR TARGET [HEADER:VALUE]: a request whose target is sent as it is; the
// answer, on one line from the status on, is so sooner or later.
func (w *world) cmdRaw(ts *testscript.TestScript, _ bool, args []string) {
	re := regexp.MustCompile("^" + args[0])
	extra := ""
	if len(args) > 3 {
		extra = args[3] + "\r\n"
	}
	last := ""
	if err := eventually(patience, func() error {
		c, err := dialAny(args[1])
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\n%sConnection: close\r\n\r\n", args[2], extra); err != nil {
			return err
		}
		b, err := io.ReadAll(c)
		last = strings.Join(strings.Fields(strings.TrimPrefix(string(b), "HTTP/1.1 ")), " ")
		if err != nil || !re.MatchString(last) {
			return fmt.Errorf("%s answers %.500q (%v), want %s", args[2], last, err, re)
		}
		return nil
	}); err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
}

// route-times SERVICE URL N: from Consul's answer to a registration until a request
// is served by it, N times; prints the distribution and judges nothing.
func (w *world) cmdRouteTimes(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[2])
	ts.Check(err)
	times := w.routeTimes(ts, args[0], args[1], n)
	fmt.Printf("measured: HAProxy %s: Consul write to request served, %d times: p50 %s, p90 %s, p99 %s, max %s\n",
		w.version, n, times[n/2], times[n*9/10], times[n*99/100], times[n-1])
}

// routeTimes of n registrations, sorted; each is deregistered before the next. They come
// apart: a watch that answers more often than every 20 ms is made to wait.
func (w *world) routeTimes(ts *testscript.TestScript, service, url string, n int) (times []time.Duration) {
	client := &http.Client{Timeout: 5 * time.Second}
	status := func() int {
		res, err := client.Get(url)
		if err != nil {
			return 0
		}
		defer res.Body.Close()
		_, _ = io.Copy(io.Discard, res.Body)
		return res.StatusCode
	}
	until := func(want int) {
		if err := eventually(patience, func() error {
			if status() != want {
				return errors.New("not yet")
			}
			return nil
		}); err != nil {
			ts.Fatalf("%s never answers %d\n%s", url, want, w.allLogs())
		}
	}
	for range n {
		w.cmdScale(ts, false, []string{service, "0"})
		until(http.StatusServiceUnavailable)
		time.Sleep(100 * time.Millisecond)
		w.cmdScale(ts, false, []string{service, "1"})
		begun := time.Now()
		for status() != http.StatusOK {
			if time.Since(begun) > patience {
				ts.Fatalf("not routed")
			}
			time.Sleep(200 * time.Microsecond)
		}
		times = append(times, time.Since(begun))
	}
	slices.Sort(times)
	return times
}
