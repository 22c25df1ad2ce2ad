package scripttest

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func consulPath() string {
	if p, err := exec.LookPath("consul"); err == nil {
		return p
	}
	return filepath.Join(cacheDir(), "bin", "consul-1.21.0")
}

// cmdConsul runs "consul [ACLPOLICY [INTENTIONPOLICY [CONFIGURATION]]]": it starts a server with ACLs.
func (w *world) cmdConsul(ts *testscript.TestScript, _ bool, args []string) {
	policy, extra := "deny", ""
	if len(args) > 0 {
		policy = args[0]
	}
	if len(args) > 1 {
		extra = fmt.Sprintf("default_intention_policy = %q\n", args[1])
	}
	p := freePorts(ts, 5)
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
	if len(args) > 2 {
		w.more = filepath.Join(w.dir, "more.hcl")
		ts.Check(os.WriteFile(w.more, []byte(args[2]+"\n"), 0o600))
		w.args = append(w.args, "-config-file", w.more)
	}
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

// call sends a request to Consul's HTTP API and returns the body; a status other than 2xx is an error.
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

// cmdPost runs "post PATH FILE": it makes any other write to Consul.
func (w *world) cmdPost(ts *testscript.TestScript, _ bool, args []string) {
	_, err := w.call(http.MethodPost, args[0], w.file(ts, args[1]))
	ts.Check(err)
}

// cmdIntention runs "intention allow|deny|delete SOURCE DESTINATION": it writes or deletes an intention.
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
