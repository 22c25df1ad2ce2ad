// Package scripttest is the world in which scripts drive the built program as a user does: a
// Consul and a HAProxy of their own, applications, sidecars, load, faults. A script is a file
// in testdata; its commands are methods of world, in a file for each noun.
//
// Invariants: nothing is mocked; whatever a script starts ends with it; a command that waits
// has a deadline. Only tests of cmd/haproxy-connect import it.
package scripttest

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

var onlyHAProxy = flag.String("haproxy-version", "", "run the scripts on this version of HAProxy only: 2.6, 3.0, 3.2 or 3.4")

// Update is the flag by which tests write what they get as what they expect.
var Update = flag.Bool("update", false, "write what the tests get as what they expect")

// Main runs the tests of the package whose main function is program; scripts run it as haproxy-connect.
func Main(m *testing.M, program func()) {
	testscript.Main(m, map[string]func(){"haproxy-connect": program, "relay": relay, "bench-answer": benchAnswer})
}

var measure = flag.Bool("measure", false, "run the scripts of testdata/measure, which print and judge nothing")

// Measure runs the scripts of testdata/measure, for make bench.
func Measure(t *testing.T) {
	if !*measure {
		t.Skip("only with -measure")
	}
	consul := need(t, consulPath())
	for version, path := range Versions(t) {
		t.Run(version, func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Dir:   filepath.Join("..", "..", "testdata", "measure"),
				Setup: func(e *testscript.Env) error { return newWorld(e, consul, path, version) }, Cmds: worldCommands, RequireUniqueNames: true,
				Condition: func(cond string) (bool, error) { return cond == "v"+version, nil },
			})
		})
	}
}

// ours are scripts about this program and Consul, in which HAProxy does what it does in any version:
// they run on the oldest version and on the one that is recommended. All others run on every version.
var ours = []string{"app", "checks", "churn", "doctor", "faults", "federation", "jwt", "l7", "lifecycle", "outage", "rundir", "scale", "taken"}

// everywhere reports whether every script runs on a version.
func everywhere(version string) bool {
	return version == "2.6" || version == "3.2" || *onlyHAProxy == version
}

// isVersion reports whether a condition holds: v3.2 of this version alone, v3.2+ also of later ones.
func isVersion(cond, version string) bool {
	least, later := strings.CutSuffix(cond, "+")
	return cond == "v"+version || later && "v"+version >= least
}

// Scripts runs the scripts of testdata/scripts on every version of HAProxy, each time with a
// Consul of its own.
func Scripts(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul and HAProxy")
	}
	consul := need(t, consulPath())
	for version, path := range Versions(t) {
		if *onlyHAProxy != "" && *onlyHAProxy != version {
			continue
		}
		files, err := filepath.Glob(filepath.Join("..", "..", "testdata", "scripts", "*.txtar"))
		if err != nil {
			t.Fatal(err)
		}
		if !everywhere(version) {
			files = slices.DeleteFunc(files, func(f string) bool { return slices.Contains(ours, strings.TrimSuffix(filepath.Base(f), ".txtar")) })
		}
		t.Run(version, func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Files: files,
				Setup: func(e *testscript.Env) error { return newWorld(e, consul, path, version) },
				Cmds:  worldCommands, Condition: func(cond string) (bool, error) { return isVersion(cond, version), nil },
				RequireUniqueNames: true,
			})
		})
	}
}

// Usage runs the scripts that need neither Consul nor HAProxy.
func Usage(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: filepath.Join("..", "..", "testdata", "usage"), RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error { e.Setenv("HOME", e.WorkDir); return nil },
		Cmds:  map[string]func(*testscript.TestScript, bool, []string){"bad": cmdBad}})
}

// usage is the exit code of arguments that are refused.
const usage = 2

// cmdBad runs "bad REGEXP ARGS...": the program must refuse these arguments with exit code 2
// and one line that matches.
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
	if code := cmd.ProcessState.ExitCode(); code != usage || !regexp.MustCompile(args[0]).MatchString(last) {
		ts.Fatalf("%q: exit code %d, says %q; want code 2 and %q", args[1:], code, text, args[0])
	}
}

// patience is how long a condition may take to come true on a busy machine. An agent whose
// first full sync meets a registration may tell its servers nothing, not even that a check
// passes, for up to 30 s (agent/ae: retryFullSyncState).
const patience = 40 * time.Second

// world is what one script runs in: a Consul, applications, sidecars.
type world struct {
	datacenters map[string]string // HTTP addresses, by name
	grpc        map[string]string // of clusters, by name
	env         *testscript.Env
	consul      string
	haproxy     string
	version     string
	dir         string // short, for sockets
	httpAt      string
	args        []string
	more        string // a file with the rest of the configuration of Consul; "": there is none

	agent  *exec.Cmd
	cars   map[string]*exec.Cmd
	logs   map[string]*logBuffer
	loads  map[string]*load
	counts map[string]*atomic.Int64
	idle   map[string]net.Conn
	ca     *certs.Authority
	before *certs.Authority // the authority that ca replaced

	serf     int    // the server's port for Serf on the LAN
	policy   string // the server's default ACL policy
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
		_ = c.Process.Signal(syscall.SIGTERM) // the second signal ends the sidecar at once
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
	"config-delete": inWorld((*world).cmdConfigDelete), "shares": inWorld((*world).cmdShares), "stays": inWorld((*world).cmdStays), "agree": inWorld((*world).cmdAgree), "truncated": inWorld((*world).cmdTruncated), "datacenter": inWorld((*world).cmdDatacenter), "server-tls": inWorld((*world).cmdServerTLS), "edge-get": inWorld((*world).cmdEdgeGet), "tls-app": inWorld((*world).cmdTLSApp), "hello": inWorld((*world).cmdHello), "cluster": inWorld((*world).cmdCluster), "peering": inWorld((*world).cmdPeering),
	"between": inWorld((*world).cmdBetween), "fault": inWorld((*world).cmdFault), "said": inWorld((*world).cmdSaid),
	"servers": inWorld((*world).cmdServers), "consul-client": inWorld((*world).cmdConsulClient), "forget": inWorld((*world).cmdForget), "cut": inWorld((*world).cmdCut), "status": inWorld((*world).cmdStatusSays),
	"token": inWorld((*world).cmdToken), "token-revoke": inWorld((*world).cmdTokenRevoke), "token-restore": inWorld((*world).cmdTokenRestore),
	"scraped": inWorld((*world).cmdScraped), "notified": inWorld((*world).cmdNotified), "json-lines": inWorld((*world).cmdJSONLines), "logged": inWorld((*world).cmdLogged), "page": inWorld((*world).cmdPage), "drop": inWorld((*world).cmdDrop), "toggle": inWorld((*world).cmdToggle), "authz-cost": inWorld((*world).cmdAuthzCost), "apply-time": inWorld((*world).cmdApplyTime), "issuer": inWorld((*world).cmdIssuer), "jwt": inWorld((*world).cmdJWT), "header": inWorld((*world).cmdHeader),
	"mesh-hold": inWorld((*world).cmdMeshHold), "mesh-held": inWorld((*world).cmdMeshHeld),
	"mesh-get": inWorld((*world).cmdMeshGet), "differential": inWorld((*world).cmdDifferential), "check-agrees": inWorld((*world).cmdCheckAgrees),
	"bench-app": inWorld((*world).cmdBenchApp), "bench-identity": inWorld((*world).cmdBenchIdentity), "peer": inWorld((*world).cmdPeer), "costs": inWorld((*world).cmdCosts), "routes-entry": inWorld((*world).cmdRoutesEntry), "bench": inWorld((*world).cmdBench), "soak": inWorld((*world).cmdSoak), "intentions-cost": inWorld((*world).cmdIntentionsCost), "scale-cost": inWorld((*world).cmdScaleCost),
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

// nextPort counts the ports that freePort hands out, each once and below those that the kernel
// gives to connections: a port that was free a moment ago must not be taken a moment later.
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

func envName(s string) string { return strings.ToUpper(strings.ReplaceAll(s, "-", "_")) }

// cmdPort runs "port NAME...": it sets each $NAME to a free port.
func (w *world) cmdPort(ts *testscript.TestScript, _ bool, args []string) {
	for _, a := range args {
		p, err := freePort()
		ts.Check(err)
		ts.Setenv(a, strconv.Itoa(p))
	}
}

func (w *world) file(ts *testscript.TestScript, name string) []byte {
	return []byte(os.Expand(ts.ReadFile(name), ts.Getenv))
}

// freePorts are n of them.
func freePorts(ts *testscript.TestScript, n int) (out []int) {
	for range n {
		p, err := freePort()
		ts.Check(err)
		out = append(out, p)
	}
	return out
}
