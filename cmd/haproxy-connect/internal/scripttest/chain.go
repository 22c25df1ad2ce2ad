package scripttest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// cmdConfigDelete runs "config-delete KIND NAME": it deletes a config entry.
func (w *world) cmdConfigDelete(ts *testscript.TestScript, _ bool, args []string) {
	_, err := w.call(http.MethodDelete, "/v1/config/"+args[0]+"/"+args[1], nil)
	ts.Check(err)
}

// answerOf returns the first word of an answer: the name of the application that gave it. A
// status other than 200 is an error.
func answerOf(client *http.Client, url, header, value string) (string, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	if header != "" {
		req.Header.Set(header, value)
	}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answers %d %.200s (%v)", url, res.StatusCode, b, err)
	}
	who, _, _ := strings.Cut(string(b), " ")
	return who, nil
}

// cmdShares runs "shares URL N NAME=LO-HI...": it sends N requests, again and again, until
// each application NAME has answered LO to HI of them, and no other application any.
func (w *world) cmdShares(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	client := &http.Client{Timeout: 10 * time.Second}
	err = eventually(patience, func() error {
		count := map[string]int{}
		for range n {
			who, err := answerOf(client, args[0], "", "")
			if err != nil {
				return err
			}
			count[who]++
		}
		sum := 0
		for _, want := range args[2:] {
			var lo, hi int
			name, span, _ := strings.Cut(want, "=")
			if _, err := fmt.Sscanf(span, "%d-%d", &lo, &hi); err != nil {
				return err
			}
			sum += count[name]
			if count[name] < lo || count[name] > hi {
				return fmt.Errorf("%s answers %d of %d, want %s: %v", name, count[name], n, span, count)
			}
		}
		if sum != n {
			return fmt.Errorf("somebody else answers: %v", count)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
}

// cmdAgree runs "agree HEADER N LEAST URL...": for each of N values of HEADER, the same
// application must answer at every URL; at least LEAST applications must answer in all.
func (w *world) cmdAgree(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	least, err := strconv.Atoi(args[2])
	ts.Check(err)
	client := &http.Client{Timeout: 10 * time.Second}
	seen := map[string]bool{}
	for i := range n {
		first := ""
		for _, url := range append(args[3:], args[3:]...) {
			who, err := answerOf(client, url, args[0], fmt.Sprint("value", i))
			ts.Check(err)
			if first == "" {
				first = who
			}
			if who != first {
				ts.Fatalf("value%d: %s and %s\n%s", i, first, who, w.allLogs())
			}
			seen[who] = true
		}
	}
	if len(seen) < least {
		ts.Fatalf("only %v answer", seen)
	}
}

// cmdDatacenter runs "datacenter dc1|dc2": the commands that follow are about this datacenter. The second one
// is started, joined to the first over the WAN, when it is first named; the first must be its primary.
func (w *world) cmdDatacenter(ts *testscript.TestScript, _ bool, args []string) {
	if w.datacenters == nil {
		w.datacenters = map[string]string{"dc1": w.httpAt}
	}
	if w.datacenters[args[0]] == "" {
		w.datacenters[args[0]] = w.secondDatacenter(ts, args...)
	}
	w.httpAt = w.datacenters[args[0]]
	ts.Setenv("CONSUL_HTTP_ADDR", w.httpAt)
}

// cmdServerTLS runs "server-tls": it makes a certificate for the servers of dc1 and dc2, for RPC between
// them: $DIR/consul-agent-ca.pem, $DIR/dc1-server-consul-0.pem and $DIR/dc1-server-consul-0-key.pem.
func (w *world) cmdServerTLS(ts *testscript.TestScript, _ bool, _ []string) {
	for _, args := range [][]string{{"tls", "ca", "create"}, {"tls", "cert", "create", "-server", "-dc", "dc1", "-additional-dnsname", "server.dc2.consul",
		"-additional-dnsname", "node1.server.dc1.consul", "-additional-dnsname", "dc2-node.server.dc2.consul"}} {
		cmd := exec.Command(w.consul, args...)
		cmd.Dir = w.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			ts.Fatalf("consul %v: %v\n%s", args, err, out)
		}
	}
}

// cmdCluster runs "cluster NAME": what follows is about the cluster of that name, a Consul of its own,
// which is started when it is first named; "cluster dc1" is the first one. $CONSUL_GRPC_ADDR is its
// gRPC port.
func (w *world) cmdCluster(ts *testscript.TestScript, _ bool, args []string) {
	if w.datacenters == nil {
		w.datacenters = map[string]string{"dc1": w.httpAt}
		w.grpc = map[string]string{"dc1": ts.Getenv("CONSUL_GRPC_ADDR")}
	}
	if w.datacenters[args[0]] == "" {
		p := freePorts(ts, 6)
		w.datacenters[args[0]] = w.anotherServer(ts, args[0], fmt.Sprintf("127.0.0.1:%d", p[0]), fmt.Sprintf(`data_dir = %q
datacenter = %q
server = true
bootstrap_expect = 1
bind_addr = "127.0.0.1"
log_level = "warn"
performance { raft_multiplier = 1 }
connect { enabled = true }
acl { enabled = true, default_policy = %q, tokens { initial_management = "mastertoken", agent = "mastertoken" } }
ports { http = %d, server = %d, serf_lan = %d, serf_wan = %d, dns = -1, grpc = %d, grpc_tls = %d }
default_intention_policy = "deny"
`, filepath.Join(w.dir, args[0]), args[0], w.policy, p[0], p[1], p[2], p[3], p[4], p[5]))
		w.grpc[args[0]] = fmt.Sprintf("127.0.0.1:%d", p[4])
	}
	w.httpAt = w.datacenters[args[0]]
	ts.Setenv("CONSUL_HTTP_ADDR", w.httpAt)
	ts.Setenv("CONSUL_GRPC_ADDR", w.grpc[args[0]])
}

// cmdPeering runs "peering ACCEPTOR NAME DIALER NAME": two clusters become peers; each NAME is that of
// the other one, as the cluster before it calls it.
func (w *world) cmdPeering(ts *testscript.TestScript, _ bool, args []string) {
	now := w.httpAt
	defer func() { w.httpAt = now }()
	post := func(cluster, path, body string) []byte {
		w.httpAt = w.datacenters[cluster]
		var out []byte
		if err := eventually(patience, func() (err error) {
			out, err = w.call(http.MethodPost, path, []byte(body))
			return err
		}); err != nil {
			ts.Fatalf("%s: %v", path, err)
		}
		return out
	}
	var token struct{ PeeringToken string }
	ts.Check(json.Unmarshal(post(args[0], "/v1/peering/token", fmt.Sprintf(`{"PeerName":%q}`, args[1])), &token))
	post(args[2], "/v1/peering/establish", fmt.Sprintf(`{"PeerName":%q,"PeeringToken":%q}`, args[3], token.PeeringToken))
	for cluster, name := range map[string]string{args[0]: args[1], args[2]: args[3]} {
		w.httpAt = w.datacenters[cluster]
		if err := eventually(patience, func() error {
			b, err := w.call(http.MethodGet, "/v1/peering/"+name, nil)
			if err == nil && !strings.Contains(string(b), `"State":"ACTIVE"`) {
				err = fmt.Errorf("%s", b)
			}
			return err
		}); err != nil {
			ts.Fatalf("peering %s of %s: %v", name, cluster, err)
		}
	}
}

var serfWAN = regexp.MustCompile(`serf_wan = (\d+)`)

func (w *world) secondDatacenter(ts *testscript.TestScript, args ...string) string {
	name := args[0]
	primary, err := os.ReadFile(filepath.Join(w.dir, "consul.hcl"))
	ts.Check(err)
	join := fmt.Sprintf("retry_join_wan = [\"127.0.0.1:%s\"]", serfWAN.FindSubmatch(primary)[1])
	if len(args) > 1 {
		join = args[1]
	}
	p := freePorts(ts, 4)
	return w.anotherServer(ts, name, fmt.Sprintf("127.0.0.1:%d", p[0]), fmt.Sprintf(`data_dir = %q
datacenter = %q
%s
server = true
bootstrap_expect = 1
bind_addr = "127.0.0.1"
log_level = "warn"
performance { raft_multiplier = 1 }
connect { enabled = true }
acl { enabled = true, default_policy = %q, enable_token_replication = true, tokens { replication = "mastertoken", agent = "mastertoken" } }
ports { http = %d, server = %d, serf_lan = %d, serf_wan = %d, dns = -1, grpc = -1, grpc_tls = -1 }
`, filepath.Join(w.dir, name), name, join, w.policy, p[0], p[1], p[2], p[3]), "-config-file", w.more)
}

// anotherServer starts a server with this configuration, which answers at the address, and returns the address.
func (w *world) anotherServer(ts *testscript.TestScript, name, at, conf string, flags ...string) string {
	file := filepath.Join(w.dir, name+".hcl")
	ts.Check(os.WriteFile(file, []byte(conf), 0o600))
	cmd := exec.Command(w.consul, append([]string{"agent", "-config-file", file, "-node", name + "-node"}, flags...)...)
	out := &logBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(cmd.Start())
	w.env.Defer(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	first := w.httpAt
	defer func() { w.httpAt = first }()
	w.httpAt = at
	if err := eventually(3*patience, func() error {
		_, err := w.call(http.MethodGet, "/v1/acl/token/self", nil)
		if err == nil {
			_, err = w.call(http.MethodGet, "/v1/agent/connect/ca/leaf/any", nil)
		}
		if err == nil { // an agent that has not told its servers anything yet may tell them nothing for a while
			_, err = w.call(http.MethodPut, "/v1/agent/service/register", []byte(`{"Name":"probe"}`))
		}
		if err == nil {
			var b []byte
			if b, err = w.call(http.MethodGet, "/v1/catalog/service/probe", nil); err == nil && !strings.Contains(string(b), "probe") {
				err = errors.New("the agent has told its servers nothing yet")
			}
		}
		if err == nil {
			_, err = w.call(http.MethodPut, "/v1/agent/service/deregister/probe", nil)
		}
		return err
	}); err != nil {
		ts.Fatalf("the server of %s does not start: %v\n%s", name, err, out)
	}
	return at
}

// cmdTruncated runs "truncated URL LEAST MOST": the answer must begin, and be cut off LEAST to MOST after the request.
func (w *world) cmdTruncated(ts *testscript.TestScript, _ bool, args []string) {
	least, err := time.ParseDuration(args[1])
	ts.Check(err)
	most, err := time.ParseDuration(args[2])
	ts.Check(err)
	begun := time.Now()
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}} // a kept connection may belong to a replaced worker
	res, err := client.Get(args[0])
	ts.Check(err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if took := time.Since(begun); err == nil || len(b) == 0 || took < least || took > most {
		ts.Fatalf("%s: %d bytes in %s, then %v\n%s", args[0], len(b), took, err, w.allLogs())
	}
}

// cmdStays runs "stays URL N": each of eight clients with cookies must be answered by one application
// N times, and not all by the same; "! stays": by more than one.
func (w *world) cmdStays(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	err = eventually(patience, func() error { // a new endpoint may be slow to get its share
		all := map[string]bool{}
		for range 8 {
			jar, err := cookiejar.New(nil)
			ts.Check(err)
			client := &http.Client{Timeout: 10 * time.Second, Jar: jar}
			own := map[string]bool{}
			for range n {
				who, err := answerOf(client, args[0], "x-none", "")
				ts.Check(err)
				own[who], all[who] = true, true
			}
			if len(own) > 1 && !neg {
				ts.Fatalf("answered by %v\n%s", own, w.allLogs())
			}
			if len(own) == 1 && neg {
				return fmt.Errorf("only %v answer", own)
			}
		}
		if len(all) < 2 {
			return fmt.Errorf("only %v answer", all)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
}
