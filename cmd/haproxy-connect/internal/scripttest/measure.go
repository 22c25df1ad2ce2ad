package scripttest

import (
	"context"
	"crypto/sha1"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
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
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// variant is a HAProxy that runs a changed copy of the public side of a sidecar's configuration.
type variant struct {
	name string
	addr string
	cmd  *exec.Cmd
	cost map[string][]measured // by load
}

type measured struct{ rate, haproxy, agent float64 }

// cmdAuthzCost runs "authz-cost NAME SERVICE": it measures what authorization costs the
// sidecar NAME, per request on kept connections and per new connection. The kinds of
// authorization below are measured in turns and printed as ratios to the first, none.
func (w *world) cmdAuthzCost(ts *testscript.TestScript, _ bool, args []string) {
	const rounds, long = 3, 1500 * time.Millisecond
	dir := filepath.Join(w.dir, args[0])
	leaf, err := w.ca.Leaf(args[1], time.Hour)
	ts.Check(err)
	sum := sha1.Sum(leaf.TLS().Certificate[0])
	native := filepath.Join(w.dir, "callers.map")
	ts.Check(os.WriteFile(native, []byte(fmt.Sprintf("%X allow\n", sum)), 0o644))
	raw, err := os.ReadFile(filepath.Join(dir, "haproxy.cfg"))
	ts.Check(err)
	ask := regexp.MustCompile(`(?m)^.*(filter spoe|sess\.hc|txn\.verdict|txn\.stale|txn\.policy|txn\.xfcc|send-spoe).*\n`)
	whole := publicOnly(string(raw))
	base := regexp.MustCompile(`(?m)^.*(X-Forwarded-Client-Cert|txn\.xfcc).*\n`).ReplaceAllString(whole, "")
	kinds := []struct{ name, text string }{
		{"none", ask.ReplaceAllString(base, "")},
		{"native map", strings.Replace(ask.ReplaceAllString(base, ""), "  default_backend local_app\n", fmt.Sprintf(
			"  http-request set-var(sess.v) ssl_c_sha1,hex,map_str(%s) unless { var(sess.v) -m found }\n  http-request return status 403 unless { var(sess.v) -m str allow }\n  default_backend local_app\n", native), 1)},
		{"SPOE per connection", base},
		{"SPOE per request", strings.Replace(base, "  http-request send-spoe-group hc request if { var(txn.verdict) -m str ask }\n", "  http-request send-spoe-group hc request\n", 1)},
		{"and the certificate", whole}, // per connection, and X-Forwarded-Client-Cert with all of it
	}
	var all []*variant
	for i, k := range kinds {
		port, err := freePort()
		ts.Check(err)
		v := &variant{name: k.name, addr: fmt.Sprintf("127.0.0.1:%d", port), cost: map[string][]measured{}}
		text := regexp.MustCompile(`(?m)^  bind \S+ ssl`).ReplaceAllString(k.text, "  bind "+v.addr+" ssl")
		file := filepath.Join(w.dir, fmt.Sprintf("variant%d.cfg", i))
		ts.Check(os.WriteFile(file, []byte(text), 0o600))
		v.cmd = exec.Command(w.haproxy, "-db", "-f", file)
		out := &logBuffer{}
		v.cmd.Stdout, v.cmd.Stderr = out, out
		v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		ts.Check(v.cmd.Start())
		defer func() {
			_ = v.cmd.Process.Kill()
			_ = v.cmd.Wait()
		}()
		if err := eventually(patience, func() error { _, err := drive(v.addr, leaf.TLS(), 1, time.Millisecond, true); return err }); err != nil {
			ts.Fatalf("%s: %v\n%s\n%s", k.name, err, out, text)
		}
		all = append(all, v)
	}
	agent := w.cars[args[0]].Process.Pid
	for range rounds {
		for _, kept := range []bool{true, false} {
			load := map[bool]string{true: "request", false: "connection"}[kept]
			for _, v := range all {
				h0, a0, begun := cpuOf(v.cmd.Process.Pid), cpuOf(agent), time.Now()
				n, err := drive(v.addr, leaf.TLS(), 8, long, kept)
				ts.Check(err)
				v.cost[load] = append(v.cost[load], measured{float64(n) / time.Since(begun).Seconds(),
					float64((cpuOf(v.cmd.Process.Pid) - h0).Microseconds()) / float64(n), float64((cpuOf(agent) - a0).Microseconds()) / float64(n)})
			}
		}
	}
	for _, load := range []string{"request", "connection"} {
		none := middle(all[0].cost[load])
		for _, v := range all {
			m := middle(v.cost[load])
			fmt.Printf("measured: HAProxy %s: per %-10s %-19s %6.0f/s x%.2f, CPU us: HAProxy %5.0f (%+4.0f), agent %3.0f\n",
				w.version, load, v.name, m.rate, m.rate/none.rate, m.haproxy, m.haproxy-none.haproxy, m.agent)
		}
	}
}

// middle is the round with the median of HAProxy's cost.
func middle(m []measured) measured {
	m = slices.Clone(m)
	slices.SortFunc(m, func(a, b measured) int { return int(1000 * (a.haproxy - b.haproxy)) })
	return m[len(m)/2]
}

// publicOnly keeps what the public side needs of a sidecar's configuration.
func publicOnly(text string) string {
	var out []string
	for _, section := range strings.Split(text, "\n\n") {
		lines := strings.Split(strings.TrimSpace(section), "\n")
		for len(lines) > 0 && strings.HasPrefix(lines[0], "#") {
			lines = lines[1:]
		}
		if len(lines) == 0 {
			continue
		}
		switch lines[0] {
		case "global", "defaults mesh", "backend authz", "frontend public", "backend local_app":
			out = append(out, strings.Join(slices.DeleteFunc(lines, func(l string) bool {
				return strings.Contains(l, "stats socket") || strings.Contains(l, "mworker") || strings.Contains(l, "log-format")
			}), "\n"))
		}
	}
	return strings.Join(out, "\n\n") + "\n"
}

// drive calls addr as fast as it can for long, on kept connections or each time on a new one, and counts the calls.
func drive(addr string, cert tls.Certificate, workers int, long time.Duration, kept bool) (n int64, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	var count atomic.Int64
	var wg sync.WaitGroup
	failed := make(chan error, workers)
	for range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: !kept,
				TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}},
				DialContext:     (&net.Dialer{Timeout: 5 * time.Second}).DialContext}}
			defer client.CloseIdleConnections()
			for {
				res, err := client.Get("https://" + addr + "/")
				if err == nil {
					_, _ = io.Copy(io.Discard, res.Body)
					res.Body.Close()
					if res.StatusCode != http.StatusOK {
						err = errors.New(res.Status)
					}
				}
				if err != nil {
					failed <- err
					return
				}
				count.Add(1)
				if ctx.Err() != nil {
					return
				}
			}
		}()
	}
	wg.Wait()
	select {
	case err = <-failed:
	default:
	}
	return count.Load(), err
}

// cpuOf returns the CPU time that a process has used so far.
func cpuOf(pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100 on Linux
}
