package scripttest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/consul"
)

// cmdDifferential runs "differential ROUNDS": each round draws intentions for 24 destinations,
// with wildcards on both sides. For every pair of services our Policy must decide what
// Consul's own intentions/check and agent/connect/authorize say.
func (w *world) cmdDifferential(ts *testscript.TestScript, _ bool, args []string) {
	const destinations = 24
	rounds, err := strconv.Atoi(args[0])
	ts.Check(err)
	random := rand.New(rand.NewPCG(4, 2))
	sources := []string{"web", "shop", "db", "cron", "x-y", "other"}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, destinations)
	defer func() {
		cancel()
		for range destinations {
			<-done
		}
	}()
	client, err := consul.NewClient(consul.Config{Addr: w.httpAt, Token: "mastertoken"})
	ts.Check(err)
	var newest [destinations]atomic.Pointer[connect.Snapshot]
	for i := range destinations {
		name := fmt.Sprintf("dest%d", i)
		protocol := "tcp"
		if i%2 == 0 { // L7 permissions are only taken for http
			protocol = "http"
		}
		_, err := w.call(http.MethodPut, "/v1/config", []byte(fmt.Sprintf(`{"Kind":"service-defaults","Name":%q,"Protocol":%q}`, name, protocol)))
		ts.Check(err)
		_, err = w.call(http.MethodPut, "/v1/agent/service/register", []byte(fmt.Sprintf(`{"Name":%q,"Port":%d,"Connect":{"SidecarService":{"Port":%d}}}`, name, 1000+i, 2000+i)))
		ts.Check(err)
		go func() {
			done <- consul.NewSource(client, name+"-sidecar-proxy", slog.New(slog.DiscardHandler)).Run(ctx, newest[i].Store)
		}()
	}
	action := func() string { return []string{"allow", "deny"}[random.IntN(2)] }
	put := func(dest string, l7 bool) {
		if random.IntN(4) == 0 {
			_, err := w.call(http.MethodDelete, "/v1/config/service-intentions/"+url.PathEscape(dest), nil)
			ts.Check(err)
			return
		}
		var list []string
		for _, s := range append([]string{"*"}, sources...) {
			switch {
			case random.IntN(3) > 0:
			case l7 && random.IntN(4) == 0:
				list = append(list, fmt.Sprintf(`{"Name":%q,"Permissions":[{"Action":"allow","HTTP":{"PathPrefix":"/"}}]}`, s))
			default:
				list = append(list, fmt.Sprintf(`{"Name":%q,"Action":%q}`, s, action()))
			}
		}
		if len(list) == 0 {
			list = []string{fmt.Sprintf(`{"Name":"nobody","Action":%q}`, action())}
		}
		_, err := w.call(http.MethodPut, "/v1/config", []byte(fmt.Sprintf(`{"Kind":"service-intentions","Name":%q,"Sources":[%s]}`, dest, strings.Join(list, ","))))
		ts.Check(err)
	}
	compared, allowed := 0, 0
	for round := range rounds {
		put("*", false)
		for i := range destinations {
			put(fmt.Sprintf("dest%d", i), i%2 == 0)
		}
		for i := range destinations {
			dest := fmt.Sprintf("dest%d", i)
			for _, source := range sources {
				check, authorized, err := w.consulSays(newest[i].Load(), source, dest)
				ts.Check(err)
				if check != authorized {
					ts.Fatalf("Consul contradicts itself about %s=>%s: check %v, authorize %v", source, dest, check, authorized)
				}
				err = eventually(patience, func() error { // the watch may be a moment behind
					snap := newest[i].Load()
					if snap == nil {
						return errors.New("no snapshot")
					}
					from := certs.SPIFFEID{TrustDomain: snap.Proxy.TrustDomain, Partition: "default", Namespace: "default", Datacenter: "dc1", Service: source}
					if d := snap.Public().Policy().Decide(from, nil); d.Allow != check {
						return fmt.Errorf("round %d, %s=>%s: Consul says %v, the policy %v by %s:\n%s", round, source, dest, check, d.Allow, d.Rule, strings.Join(snap.Public().Policy().Considered(from), "\n"))
					}
					return nil
				})
				ts.Check(err)
				if compared++; check {
					allowed++
				}
			}
		}
	}
	ts.Logf("%d verdicts agree, %d of them allow", compared, allowed)
	if allowed*10 < compared || allowed*10 > compared*9 {
		ts.Fatalf("%d of %d allow: the sets say little", allowed, compared)
	}
}

// consulSays asks Consul's two APIs.
func (w *world) consulSays(snap *connect.Snapshot, source, dest string) (check, authorized bool, err error) {
	b, err := w.call(http.MethodGet, "/v1/connect/intentions/check?source="+source+"&destination="+dest, nil)
	if err != nil {
		return false, false, err
	}
	var one struct{ Allowed bool }
	if err := json.Unmarshal(b, &one); err != nil {
		return false, false, err
	}
	uri := "spiffe://x.consul/ns/default/dc/dc1/svc/" + source
	if snap != nil {
		uri = strings.Replace(uri, "x.consul", snap.Proxy.TrustDomain, 1)
	}
	body := fmt.Sprintf(`{"Target":%q,"ClientCertURI":%q,"ClientCertSerial":"00"}`, dest, uri)
	if b, err = w.call(http.MethodPost, "/v1/agent/connect/authorize?fresh="+dest, []byte(body)); err != nil {
		return false, false, err
	}
	var two struct{ Authorized bool }
	err = json.Unmarshal(b, &two)
	return one.Allowed, two.Authorized, err
}

// cmdCheckAgrees runs "check-agrees SERVICE CALLER ADDR COUNT": for COUNT random requests of
// the caller, the answer at ADDR, its upstream, must be what the check command says.
func (w *world) cmdCheckAgrees(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[3])
	ts.Check(err)
	random := rand.New(rand.NewPCG(1, uint64(n)))
	pick := func(list ...string) string { return list[random.IntN(len(list))] }
	bin, err := exec.LookPath(filepath.Join(strings.Split(ts.Getenv("PATH"), ":")[0], "haproxy-connect"))
	ts.Check(err)
	allowed := 0
	for range n {
		method := pick("GET", "GET", "PUT", "POST", "DELETE")
		path := pick("/exact", "/exact/", "/prefix", "/prefix/a", "/prefix/secret", "/regex1", "/regex12x", "/put", "/", "/other")
		header := pick("", "", "X-Test-Present=1", "X-Test-Exact=exact", "X-Test-Exact=Exact", "X-Test-Prefix=prefixed", "X-Test-Suffix=suffix-", "X-Test-Contains=in", "X-Test-Regex=reg1", "X-Test-Case=MIXED", "X-Test-Present=")
		req, err := http.NewRequest(method, "http://"+args[2]+path, nil)
		ts.Check(err)
		flags := []string{"check", "-http-addr", w.httpAt, "-token", "mastertoken", "-sidecar-for", args[0], "-source", args[1], "-method", method, "-path", path}
		if k, v, ok := strings.Cut(header, "="); ok {
			req.Header.Set(k, v)
			flags = append(flags, "-header", header)
		}
		res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
		ts.Check(err)
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		var out bytes.Buffer
		cmd := exec.Command(bin, flags...)
		cmd.Args[0] = "haproxy-connect"
		cmd.Stdout, cmd.Stderr = &out, &out
		_ = cmd.Run()
		code := cmd.ProcessState.ExitCode()
		if want := map[int]int{200: 0, 403: 1}[res.StatusCode]; code != want || res.StatusCode != 200 && res.StatusCode != 403 {
			ts.Fatalf("%s %s %s: the data path answers %d, check ends with %d:\n%s\n%s", method, path, header, res.StatusCode, code, &out, w.allLogs())
		}
		if code == 0 {
			allowed++
		}
	}
	if allowed == 0 || allowed == n {
		ts.Fatalf("%d of %d allowed: the requests say nothing", allowed, n)
	}
}

// cmdMeshHold runs "mesh-hold NAME ADDR SERVICE": it opens a connection to a public listener as a caller,
// sends one request and keeps it open. "mesh-held NAME": the connection must answer another request.
func (w *world) cmdMeshHold(ts *testscript.TestScript, _ bool, args []string) {
	leaf, err := w.ca.Leaf(args[2], time.Hour)
	ts.Check(err)
	if err := eventually(patience, func() error {
		c, err := tls.Dial("tcp", args[1], &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf.TLS()}})
		if err != nil {
			return err
		}
		if err := getOn(c); err != nil {
			c.Close()
			return err
		}
		w.idle[args[0]] = c
		return nil
	}); err != nil {
		ts.Fatalf("mesh-hold: %v\n%s", err, w.allLogs())
	}
}

func (w *world) cmdMeshHeld(ts *testscript.TestScript, neg bool, args []string) {
	if err := getOn(w.idle[args[0]]); (err != nil) != neg {
		ts.Fatalf("the connection %s: %v\n%s", args[0], err, w.allLogs())
	}
}

// getOn sends one request on a connection and leaves it open.
func getOn(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, res.Body)
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

// cmdMeshGet runs "mesh-get REGEXP ADDR SERVICE [HEADER:VALUE]... [body:TEXT]": it calls a
// public listener directly, as SERVICE, until the answer matches.
func (w *world) cmdMeshGet(ts *testscript.TestScript, _ bool, args []string) {
	re := regexp.MustCompile(args[0])
	leaf, err := w.ca.Leaf(args[2], time.Hour)
	ts.Check(err)
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf.TLS()}}}}
	last := ""
	if err := eventually(patience, func() error {
		req, err := http.NewRequest(http.MethodPost, "https://"+args[1]+"/", nil)
		if err != nil {
			return err
		}
		for _, h := range args[3:] {
			k, v, _ := strings.Cut(h, ":")
			if k == "body" {
				req.Body, req.ContentLength = io.NopCloser(strings.NewReader(v)), int64(len(v))
				continue
			}
			req.Header[k] = append(req.Header[k], v) // as it is spelled
		}
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if last = string(b); err != nil || !re.MatchString(last) {
			return fmt.Errorf("%s: %w", res.Status, errors.Join(err, errors.New("another answer")))
		}
		return nil
	}); err != nil {
		ts.Fatalf("mesh-get: %v: %.3000s\nwant %s\n%s", err, last, re, w.allLogs())
	}
}
