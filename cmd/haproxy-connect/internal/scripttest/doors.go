package scripttest

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func init() {
	for name, f := range map[string]func(*world, *testscript.TestScript, bool, []string){
		"mesh-raw": (*world).cmdMeshRaw, "mesh-websocket": (*world).cmdMeshWebSocket, "silent": (*world).cmdSilent, "mesh-chain": (*world).cmdMeshChain,
		"plain-raw": (*world).cmdPlainRaw, "half-close": (*world).cmdHalfClose, "give-up": (*world).cmdGiveUp, "slow-upload": (*world).cmdSlowUpload,
		"large": (*world).cmdLarge, "spread": (*world).cmdSpread, "file": (*world).cmdFile, "stop-master": (*world).cmdStopMaster, "early-answer": (*world).cmdEarlyAnswer,
		"burst": (*world).cmdBurst, "at-once": (*world).cmdAtOnce, "counted": (*world).cmdCounted, "fails": (*world).cmdFails,
	} {
		worldCommands[name] = inWorld(f)
	}
}

// caller returns the TLS configuration of a caller with a leaf of service. It verifies no
// server: the listener's decision is what is tested.
func (w *world) caller(ts *testscript.TestScript, service string) *tls.Config {
	leaf, err := w.ca.Leaf(service, time.Hour)
	ts.Check(err)
	return &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{leaf.TLS()}}
}

func unquoted(ts *testscript.TestScript, s string) string {
	out, err := strconv.Unquote(`"` + strings.ReplaceAll(s, `"`, `\"`) + `"`)
	ts.Check(err)
	return out
}

// exchange writes and returns what is answered until the end, or a second of silence.
func exchange(c net.Conn, text string) string {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		return "cannot write: " + err.Error()
	}
	var got bytes.Buffer
	buf := make([]byte, 4096)
	for {
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(buf)
		got.Write(buf[:n])
		if err != nil {
			return got.String()
		}
	}
}

// cmdMeshRaw runs "mesh-raw WANT ADDR SERVICE TEXT": it sends TEXT byte for byte as a caller, and the
// answer must begin with WANT; "! mesh-raw" wants another answer. In TEXT \r\n ends a line.
func (w *world) cmdMeshRaw(ts *testscript.TestScript, neg bool, args []string) {
	c, err := tls.Dial("tcp", args[1], w.caller(ts, args[2]))
	ts.Check(err)
	w.compare(ts, neg, args[0], exchange(c, unquoted(ts, args[3])), args)
}

// cmdPlainRaw runs "plain-raw WANT ADDR TEXT": it is mesh-raw without TLS.
func (w *world) cmdPlainRaw(ts *testscript.TestScript, neg bool, args []string) {
	c, err := net.DialTimeout("tcp", args[1], 5*time.Second)
	ts.Check(err)
	w.compare(ts, neg, args[0], exchange(c, unquoted(ts, args[2])), args)
}

func (w *world) compare(ts *testscript.TestScript, neg bool, want, got string, args []string) {
	if regexp.MustCompile(`(?s)^`+want).MatchString(got) == neg {
		ts.Fatalf("%q answers %.600q, want %s\n%s", args, got, want, w.allLogs())
	}
}

// cmdMeshWebSocket runs "mesh-websocket NAME ADDR SERVICE PATH": it opens a WebSocket to an
// application of kind switch, and keeps it as a session.
func (w *world) cmdMeshWebSocket(ts *testscript.TestScript, _ bool, args []string) {
	conf := w.caller(ts, args[2])
	if err := eventually(patience, func() error {
		c, err := tls.Dial("tcp", args[1], conf)
		if err != nil {
			return err
		}
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", args[3])
		br := bufio.NewReader(c)
		res, err := http.ReadResponse(br, nil)
		if err == nil && res.StatusCode != http.StatusSwitchingProtocols {
			err = errors.New(res.Status)
		}
		if err == nil {
			_, err = io.WriteString(c, "ping\n")
		}
		if err == nil {
			_, err = br.ReadString('\n')
		}
		if err != nil {
			c.Close()
			return err
		}
		w.idle[args[0]] = c
		return nil
	}); err != nil {
		ts.Fatalf("mesh-websocket: %v\n%s", err, w.allLogs())
	}
}

// cmdSilent runs "silent N ADDR": it opens N connections that send nothing, until the script ends.
func (w *world) cmdSilent(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	for range n {
		c, err := net.DialTimeout("tcp", args[1], 5*time.Second)
		if err != nil {
			return // refusing the connection is fine too
		}
		w.env.Defer(func() { c.Close() })
	}
}

// cmdMeshChain runs "mesh-chain WANT ADDR SERVICE N": it calls with N more certificates behind its leaf.
func (w *world) cmdMeshChain(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[3])
	ts.Check(err)
	conf := w.caller(ts, args[2])
	for i := range n {
		more, err := w.ca.Leaf(fmt.Sprintf("junk%d", i), time.Hour)
		ts.Check(err)
		conf.Certificates[0].Certificate = append(conf.Certificates[0].Certificate, more.TLS().Certificate[0])
	}
	c, err := tls.Dial("tcp", args[1], conf)
	ts.Check(err)
	w.compare(ts, neg, args[0], exchange(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), args)
}

// cmdHalfClose runs "half-close ADDR WAIT [PAUSE]": it sends all it has to send, ends its side, at once or
// after PAUSE, and waits for the answer of an application of kind late, which comes after WAIT.
func (w *world) cmdHalfClose(ts *testscript.TestScript, _ bool, args []string) {
	wait, err := time.ParseDuration(args[1])
	ts.Check(err)
	got, err := func() (string, error) {
		c, err := net.DialTimeout("tcp", args[0], 5*time.Second)
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(wait + 20*time.Second))
		if _, err := fmt.Fprintf(c, "%s\n", wait); err != nil {
			return "", err
		}
		if len(args) > 2 {
			pause, err := time.ParseDuration(args[2])
			ts.Check(err)
			time.Sleep(pause) // what is tested is that time passes
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			return "", err
		}
		b, err := io.ReadAll(c)
		return string(b), err
	}()
	if err != nil || got != "late answer\n" {
		ts.Fatalf("half-close: %q, %v\n%s", got, err, w.allLogs())
	}
}

// cmdGiveUp runs "give-up APP URL close|reset": it sends a request to an application that
// waits, and leaves; the application must notice within 3 s.
func (w *world) cmdGiveUp(ts *testscript.TestScript, _ bool, args []string) {
	u, err := url.Parse(args[1])
	ts.Check(err)
	count := w.counts[args[0]+" given up"]
	before := count.Load()
	c, err := net.DialTimeout("tcp", u.Host, 5*time.Second)
	ts.Check(err)
	began := w.counts[args[0]].Load()
	_, err = fmt.Fprintf(c, "POST /?hang=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nok")
	ts.Check(err)
	if err := eventually(patience, func() error {
		if w.counts[args[0]].Load() == began {
			return errors.New("the request never arrives")
		}
		return nil
	}); err != nil {
		ts.Fatalf("give-up: %v\n%s", err, w.allLogs())
	}
	if args[2] == "reset" {
		ts.Check(c.(*net.TCPConn).SetLinger(0))
	}
	c.Close()
	if err := eventually(3*time.Second, func() error {
		if count.Load() == before {
			return errors.New("the application does not notice")
		}
		return nil
	}); err != nil {
		ts.Fatalf("give-up %s: %v\n%s", args[2], err, w.allLogs())
	}
}

// cmdSlowUpload runs "slow-upload URL PAUSE": it uploads in two parts, with a pause between them.
func (w *world) cmdSlowUpload(ts *testscript.TestScript, _ bool, args []string) {
	wait, err := time.ParseDuration(args[1])
	ts.Check(err)
	r, pw := io.Pipe()
	go func() {
		fmt.Fprint(pw, strings.Repeat("a", 1000))
		time.Sleep(wait) // what is tested is that time passes
		fmt.Fprint(pw, strings.Repeat("b", 1000))
		pw.Close()
	}()
	res, err := (&http.Client{Timeout: wait + 20*time.Second}).Post(args[0], "text/plain", r)
	ts.Check(err)
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusOK || !bytes.Contains(b, []byte("body=2000")) {
		ts.Fatalf("slow-upload: %s %.300s\n%s", res.Status, b, w.allLogs())
	}
}

// cmdLarge runs "large STATUS URL header|cookie|lines|target|answer KB [h2]": a request or an
// answer of that size must get a status that matches STATUS, a regular expression, at once.
func (w *world) cmdLarge(ts *testscript.TestScript, _ bool, args []string) {
	kb, err := strconv.Atoi(args[3])
	ts.Check(err)
	req, err := http.NewRequest(http.MethodGet, args[1], nil)
	ts.Check(err)
	text := strings.Repeat("x", kb<<10)
	switch args[2] {
	case "header":
		req.Header.Set("X-Large", text)
	case "cookie":
		req.Header.Set("Cookie", "a="+text)
	case "lines":
		for i := range kb * 1024 / 600 {
			req.Header.Set(fmt.Sprintf("X-Line-%d", i), text[:580])
		}
	case "target":
		req.URL.RawQuery = "x=" + text
	case "answer":
		req.URL.RawQuery = "answer=" + args[3]
	}
	if len(args) == 4 && args[0] != "200" && args[2] != "answer" { // the answer may come before all is sent
		c, err := net.DialTimeout("tcp", req.URL.Host, 5*time.Second)
		ts.Check(err)
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_ = req.Write(c)
		line, err := bufio.NewReader(c).ReadString('\n')
		if !regexp.MustCompile(" (?:" + args[0] + ") ").MatchString(line) {
			ts.Fatalf("large %q: %q, %v\n%s", args, line, err, w.allLogs())
		}
		return
	}
	tr := &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 1 << 20}
	if len(args) > 4 {
		tr = &http.Transport{Protocols: unencryptedHTTP2(), MaxResponseHeaderBytes: 1 << 20}
	}
	res, err := (&http.Client{Timeout: 5 * time.Second, Transport: tr}).Do(req)
	ts.Check(err)
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	if !regexp.MustCompile(args[0]).MatchString(strconv.Itoa(res.StatusCode)) {
		ts.Fatalf("large %q: %s %.300s\n%s", args, res.Status, b, w.allLogs())
	}
}

// cmdSpread runs "spread N ADDR NAME=COUNT...": it makes N tcp calls, one after the other;
// each application must get its share, within a fifth.
func (w *world) cmdSpread(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := map[string]int{}
	for range n {
		c, err := net.DialTimeout("tcp", args[1], 5*time.Second)
		ts.Check(err)
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintln(c, "who")
		line, err := bufio.NewReader(c).ReadString('\n')
		c.Close()
		ts.Check(err)
		name, _, _ := strings.Cut(line, " ")
		got[name]++
	}
	for _, a := range args[2:] {
		name, count, _ := strings.Cut(a, "=")
		want, err := strconv.Atoi(count)
		ts.Check(err)
		if d := got[name] - want; d*d*25 > want*want+25*25 {
			ts.Fatalf("spread: %v, want %q", got, args[2:])
		}
	}
}

// cmdFile runs "file make|theirs|stale PATH": it makes a file, a directory of another user or a stale socket.
// "file same PATH" wants the file as it was made, "file absent PATTERN" wants no file that matches.
func (w *world) cmdFile(ts *testscript.TestScript, _ bool, args []string) {
	path := args[1]
	switch args[0] {
	case "make":
		ts.Check(os.WriteFile(path, []byte("precious"), 0o644))
	case "same":
		b, err := os.ReadFile(path)
		ts.Check(err)
		if info, err := os.Lstat(path); err != nil || !info.Mode().IsRegular() || string(b) != "precious" {
			ts.Fatalf("%s is not what it was: %q", path, b)
		}
	case "theirs":
		ts.Check(os.Mkdir(path, 0o777))
		ts.Check(os.Chmod(path, 0o777))
		ts.Check(os.Chown(path, 65534, 65534))
	case "stale":
		ln, err := net.Listen("unix", path)
		ts.Check(err)
		ln.(*net.UnixListener).SetUnlinkOnClose(false)
		ts.Check(ln.Close())
	case "absent":
		if list, _ := filepath.Glob(path); len(list) > 0 {
			ts.Fatalf("there is %q", list)
		}
	default:
		ts.Fatalf("file %q", args)
	}
}

// cmdStopMaster runs "stop-master NAME stop|go": it stops HAProxy's master, which then does not answer, or lets it go on.
func (w *world) cmdStopMaster(ts *testscript.TestScript, _ bool, args []string) {
	sig := syscall.SIGSTOP
	if args[1] == "go" {
		sig = syscall.SIGCONT
	}
	self := w.cars[args[0]].Process.Pid
	list, err := os.ReadDir("/proc")
	ts.Check(err)
	for _, d := range list {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + d.Name() + "/stat")
		if err != nil {
			continue
		}
		rest := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if cmd, _ := os.ReadFile("/proc/" + d.Name() + "/cmdline"); rest[1] == strconv.Itoa(self) && bytes.Contains(cmd, []byte("haproxy.cfg")) {
			ts.Check(syscall.Kill(pid, sig))
		}
	}
}

// cmdEarlyAnswer runs "early-answer N ADDR STATUS": an HTTP/1 client sends 2 MB and reads
// nothing until it has sent all of it, or cannot. In each of N tries it must get the answer.
func (w *world) cmdEarlyAnswer(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	part := bytes.Repeat([]byte("x"), 16<<10)
	for i := range n {
		c, err := net.DialTimeout("tcp", args[1], 5*time.Second)
		ts.Check(err)
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", 128*len(part))
		for range 128 {
			if _, err := c.Write(part); err != nil {
				break
			}
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		c.Close()
		if !strings.Contains(line, " "+args[2]+" ") {
			ts.Fatalf("try %d: %q, %v\n%s", i, line, err, w.allLogs())
		}
	}
}

// cmdCounted runs "counted NAME METRIC REGEXP": it waits until the metric of a sidecar matches.
func (w *world) cmdCounted(ts *testscript.TestScript, _ bool, args []string) {
	w.cmdHTTP(ts, false, []string{"200", "http://" + ts.Getenv(envName(args[0])+"_ADMIN") + "/metrics", `(?m)^` + args[1] + ` ` + args[2] + `$`})
}

// cmdFails runs "fails APP on|off": an application of kind http answers 503 to everything, or no longer.
func (w *world) cmdFails(ts *testscript.TestScript, _ bool, args []string) {
	n := int64(0)
	if args[1] == "on" {
		n = 1
	}
	w.counts[args[0]+" fails"].Store(n)
}

// cmdBurst runs "burst N URL STATUS=COUNT...": it sends N requests at once; COUNT of the answers must have STATUS.
func (w *world) cmdBurst(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	codes := make(chan int, n)
	for range n {
		go func() {
			res, err := (&http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get(args[1])
			if err != nil {
				codes <- 0
				return
			}
			_, _ = io.Copy(io.Discard, res.Body)
			res.Body.Close()
			codes <- res.StatusCode
		}()
	}
	got := map[string]int{}
	for range n {
		got[strconv.Itoa(<-codes)]++
	}
	for _, a := range args[2:] {
		code, count, _ := strings.Cut(a, "=")
		if strconv.Itoa(got[code]) != count {
			ts.Fatalf("burst: %v, want %q\n%s", got, args[2:], w.allLogs())
		}
	}
}

// cmdAtOnce runs "at-once APP N": the most requests that were under way at a time, since the
// command was last used, must be N.
func (w *world) cmdAtOnce(ts *testscript.TestScript, _ bool, args []string) {
	if got := w.counts[args[0]+" at once"].Swap(0); strconv.FormatInt(got, 10) != args[1] {
		ts.Fatalf("at-once: %d, want %s", got, args[1])
	}
}

// atOnce keeps the greatest number of requests under way.
type atOnce struct {
	now  atomic.Int64
	most *atomic.Int64
}

func (a *atOnce) begin() {
	n := a.now.Add(1)
	for {
		m := a.most.Load()
		if n <= m || a.most.CompareAndSwap(m, n) {
			return
		}
	}
}

// serveSwitch answers every request with 101 and echoes what follows: an application that
// opens a tunnel whenever it is let.
func serveSwitch(ln net.Listener, count *atomic.Int64) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			br := bufio.NewReader(c)
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			proto := req.Header.Get("Upgrade")
			if proto == "" {
				proto = "anything"
			}
			fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n", proto)
			for {
				line, err := br.ReadString('\n')
				count.Add(int64(len(line)))
				if err != nil {
					return
				}
				fmt.Fprintf(c, "tunnel %s", line)
			}
		}()
	}
}

// serveLate reads to the end of what is sent, which is a duration, and answers after so long.
func serveLate(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			b, _ := io.ReadAll(c)
			wait, _ := time.ParseDuration(strings.TrimSpace(string(b)))
			time.Sleep(wait) // the lateness itself
			fmt.Fprintln(c, "late answer")
		}()
	}
}

// misbehave does what the query asks of an application of kind http, and reports whether it has answered.
func misbehave(rw http.ResponseWriter, r *http.Request, name string, fails, given *atomic.Int64) bool {
	if fails.Load() != 0 {
		http.Error(rw, name+" fails", http.StatusServiceUnavailable)
		return true
	}
	q := r.URL.Query()
	if q.Has("hang") {
		_, _ = io.Copy(io.Discard, r.Body)
		select {
		case <-r.Context().Done():
			given.Add(1)
		case <-time.After(30 * time.Second):
		}
		return true
	}
	if kb, err := strconv.Atoi(q.Get("answer")); err == nil {
		rw.Header().Set("X-Large", strings.Repeat("y", kb<<10))
	}
	return false
}
