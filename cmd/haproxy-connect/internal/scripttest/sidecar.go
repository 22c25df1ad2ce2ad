package scripttest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

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

// cmdSidecar runs "sidecar NAME [flags]": it starts the program and waits until it is ready;
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

// cmdSignal runs "signal NAME TERM|KILL|INT|HUP": it sends the sidecar a signal.
func (w *world) cmdSignal(ts *testscript.TestScript, _ bool, args []string) {
	sig := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP}[args[1]]
	ts.Check(w.cars[args[0]].Process.Signal(sig))
}

// cmdExited runs "exited NAME CODE": it waits for the sidecar to end with this exit code (-1: by a signal).
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

// cmdLog runs "log NAME REGEXP": it waits until the log of the sidecar matches. "! log": it must not match now.
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

func (w *world) allLogs() string {
	var b strings.Builder
	for n, l := range w.logs {
		said := strings.SplitAfter(l.String(), "\n")
		calls := 0 // the last 200 lines of the access log are enough
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

// cmdKillHAProxy runs "kill-haproxy NAME worker|master": it kills the HAProxy of a sidecar.
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

// cmdHAProxies runs "haproxies NAME COUNT": it waits until the sidecar has COUNT processes of HAProxy.
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

// cmdReloads runs "reloads ADMIN MOST [REASON...]": HAProxy must have been reloaded at most
// MOST times, not counting the start and reloads for a REASON.
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
