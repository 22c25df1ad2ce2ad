package scripttest

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// benchAnswer is the command bench-answer ADDR H2C-ADDR: the application of the benchmarks, a
// process of its own. It answers each HTTP/1.1 request with the same few bytes, /bulk with 64
// MB, and every HTTP/2 request at the second address with the few bytes. It does no more than
// it must, so that the proxies are what is measured.
func benchAnswer() {
	ln, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		panic(err)
	}
	h2, err := net.Listen("tcp", os.Args[2])
	if err != nil {
		panic(err)
	}
	body := strings.Repeat("x", 100)
	go func() {
		srv := &http.Server{Protocols: unencryptedHTTP2(), Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })}
		_ = srv.Serve(h2)
	}()
	small := []byte("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + body)
	chunk := bytes.Repeat([]byte("x"), 256<<10)
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			br := bufio.NewReader(c)
			for {
				bulk, first := false, true
				for {
					line, err := br.ReadSlice('\n')
					if err != nil {
						return
					}
					if first {
						bulk, first = bytes.HasPrefix(line, []byte("GET /bulk")), false
					}
					if len(line) <= 2 {
						break
					}
				}
				if !bulk {
					if _, err := c.Write(small); err != nil {
						return
					}
					continue
				}
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", bulkSize)
				for n := 0; n < bulkSize; n += len(chunk) {
					if _, err := c.Write(chunk); err != nil {
						return
					}
				}
			}
		}()
	}
}

const bulkSize = 64 << 20

// client is one connection of the benchmark's load.
type client interface {
	get(path string) (int64, error)
	close()
}

// bareHTTP speaks as little HTTP/1.1 as there is, to cost little beside what it measures.
type bareHTTP struct {
	c  net.Conn
	br *bufio.Reader
}

func (p *bareHTTP) get(path string) (int64, error) {
	if _, err := io.WriteString(p.c, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return 0, err
	}
	size, status := int64(-1), ""
	for {
		line, err := p.br.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		if len(line) <= 2 {
			break
		}
		if status == "" {
			status = string(line)
		}
		if name, value, ok := bytes.Cut(line, []byte(":")); ok && bytes.EqualFold(name, []byte("Content-Length")) {
			size, _ = strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 64)
		}
	}
	if !strings.Contains(status, " 200 ") || size < 0 {
		return 0, fmt.Errorf("answer %q of %d bytes", status, size)
	}
	n, err := io.CopyN(io.Discard, p.br, size)
	return n, err
}

func (p *bareHTTP) close() { p.c.Close() }

type overH2 struct {
	http *http.Client
	addr string
}

func (o *overH2) get(path string) (int64, error) {
	res, err := o.http.Get("http://" + o.addr + path)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	return n, err
}

func (o *overH2) close() { o.http.CloseIdleConnections() }

// peer is one of the contenders that are compared: an address to call, and the processes that serve it.
type peer struct {
	name, kind, addr string
	proxies, agents  []int // pids of the data plane, and of what runs beside it
	rounds           map[string][]figures
	idle, loaded     float64 // MB
}

type figures struct {
	rate           float64 // requests, connections or MB per second
	cpu, agentCPU  float64 // us per request or connection, ms per MB
	latencies      []time.Duration
	p50, p99, p999 time.Duration
}

func (p *peer) dial() (client, error) {
	if p.kind == "http2" {
		return &overH2{&http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{Protocols: unencryptedHTTP2()}}, p.addr}, nil
	}
	c, err := net.DialTimeout("tcp", p.addr, 10*time.Second)
	if err != nil {
		return nil, err
	}
	return &bareHTTP{c, bufio.NewReaderSize(c, 64<<10)}, c.SetDeadline(time.Now().Add(time.Minute))
}

func cpuOfAll(pids []int) (sum time.Duration) {
	for _, p := range pids {
		sum += cpuOf(p)
	}
	return sum
}

// closed lets so many clients call path as fast as they can, on kept connections or each time
// on a new one.
func (p *peer) closed(clients int, long time.Duration, path string, kept bool) (f figures, err error) {
	var n, size atomic.Int64
	var wg sync.WaitGroup
	failed := make(chan error, clients)
	c0, a0, begun := cpuOfAll(p.proxies), cpuOfAll(p.agents), time.Now()
	for range clients {
		wg.Add(1)
		go func() {
			defer wg.Done()
			var c client
			var err error
			for time.Since(begun) < long {
				if c == nil {
					if c, err = p.dial(); err != nil {
						failed <- err
						return
					}
				}
				got, err := c.get(path)
				if err != nil {
					failed <- fmt.Errorf("%s: %w", p.name, err)
					return
				}
				n.Add(1)
				size.Add(got)
				if !kept {
					c.close()
					c = nil
				}
			}
			if c != nil {
				c.close()
			}
		}()
	}
	wg.Wait()
	took := time.Since(begun).Seconds()
	count := float64(n.Load())
	if path == "/bulk" {
		count = float64(size.Load()) / 1e6
	}
	f = figures{rate: count / took, cpu: float64((cpuOfAll(p.proxies) - c0).Microseconds()) / count, agentCPU: float64((cpuOfAll(p.agents) - a0).Microseconds()) / count}
	select {
	case err = <-failed:
	default:
	}
	return f, err
}

// open begins requests at a fixed rate, whether or not earlier ones were answered: the time of
// a request that has to wait for a free client counts from when it was due.
func (p *peer) open(rate int, long time.Duration) (f figures, err error) {
	const clients = 32
	total := int64(float64(rate) * long.Seconds())
	gap := time.Second / time.Duration(rate)
	var next atomic.Int64
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed := make(chan error, clients)
	var ready sync.WaitGroup
	begin := make(chan struct{})
	var begun time.Time
	for range clients {
		wg.Add(1)
		ready.Add(1)
		go func() {
			defer wg.Done()
			c, err := p.dial()
			if err == nil {
				_, err = c.get("/")
			}
			ready.Done()
			if err != nil {
				failed <- err
				return
			}
			defer c.close()
			<-begin
			var mine []time.Duration
			for {
				i := next.Add(1) - 1
				if i >= total {
					break
				}
				due := begun.Add(time.Duration(i) * gap)
				if wait := time.Until(due); wait > 0 {
					time.Sleep(wait)
					due = time.Now() // a late wake-up is the client's own delay, not the proxy's
				}
				if _, err := c.get("/"); err != nil {
					failed <- fmt.Errorf("%s at %d/s: %w", p.name, rate, err)
					break
				}
				mine = append(mine, time.Since(due))
			}
			mu.Lock()
			f.latencies = append(f.latencies, mine...)
			mu.Unlock()
		}()
	}
	ready.Wait()
	begun = time.Now()
	close(begin)
	wg.Wait()
	f.percentiles()
	select {
	case err = <-failed:
	default:
	}
	return f, err
}

func (f *figures) percentiles() {
	slices.Sort(f.latencies)
	if n := len(f.latencies); n > 0 {
		f.p50, f.p99, f.p999 = f.latencies[n/2], f.latencies[n*99/100], f.latencies[n*999/1000]
	}
}

// memoryOf returns the memory of processes in MB; what they share is divided among them (Pss).
func memoryOf(pids ...int) (sum float64) {
	for _, p := range pids {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p))
		for line := range strings.Lines(string(b)) {
			if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
				kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
				sum += kb / 1000
			}
		}
	}
	return sum
}

// descendants returns the pids of all descendants of a process, such as the HAProxy master and workers of a sidecar.
func descendants(pid int) (out []int) {
	b, _ := exec.Command("pgrep", "-P", strconv.Itoa(pid)).Output()
	for f := range strings.FieldsSeq(string(b)) {
		n, _ := strconv.Atoi(f)
		out = append(append(out, n), descendants(n)...)
	}
	return out
}

// background starts a process of a peer; it ends with the script.
func (w *world) background(ts *testscript.TestScript, env []string, name string, args ...string) int {
	cmd := exec.Command(name, args...)
	out := &logBuffer{}
	w.logs[fmt.Sprintf("%s %d", filepath.Base(name), len(w.logs))] = out
	cmd.Stdout, cmd.Stderr, cmd.Env = out, out, append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ts.Check(cmd.Start())
	w.env.Defer(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd.Process.Pid
}

// cmdBenchApp runs "bench-app NAME": it starts bench-answer at $NAME_PORT, and with HTTP/2 at $NAME_H2_PORT.
func (w *world) cmdBenchApp(ts *testscript.TestScript, _ bool, args []string) {
	w.cmdPort(ts, false, []string{envName(args[0]) + "_PORT", envName(args[0]) + "_H2_PORT"})
	bin := filepath.Join(strings.Split(ts.Getenv("PATH"), string(os.PathListSeparator))[0], "bench-answer")
	addr := "127.0.0.1:" + ts.Getenv(envName(args[0])+"_PORT")
	w.background(ts, nil, bin, addr, "127.0.0.1:"+ts.Getenv(envName(args[0])+"_H2_PORT"))
	ts.Check(eventually(patience, func() error {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err
	}))
}

// cmdPeer runs "peer NAME KIND ADDR SOURCE...": it adds a contender. A source is a sidecar of
// ours (car:NAME), a HAProxy with a configuration of the script (haproxy:FILE), Consul's own
// proxy (consul:SERVICE), stunnel (stunnel:FILE) or ghostunnel (ghostunnel:FILE, a file of
// arguments).
func (w *world) cmdPeer(ts *testscript.TestScript, _ bool, args []string) {
	p := &peer{name: args[0], kind: args[1], addr: args[2], rounds: map[string][]figures{}}
	for _, source := range args[3:] {
		kind, what, _ := strings.Cut(source, ":")
		file := filepath.Join(w.dir, what)
		if kind == "haproxy" || kind == "stunnel" {
			ts.Check(os.WriteFile(file, w.file(ts, what), 0o600))
		}
		switch kind {
		case "car":
			pid := w.cars[what].Process.Pid
			p.agents = append(p.agents, pid)
			p.proxies = append(p.proxies, descendants(pid)...)
		case "haproxy":
			p.proxies = append(p.proxies, w.background(ts, nil, w.haproxy, "-db", "-f", file))
		case "stunnel":
			p.proxies = append(p.proxies, w.background(ts, nil, "stunnel4", file))
		case "ghostunnel":
			p.proxies = append(p.proxies, w.background(ts, nil, filepath.Join(cacheDir(), "bin", "ghostunnel"), strings.Fields(string(w.file(ts, what)))...))
		case "consul":
			p.proxies = append(p.proxies, w.background(ts, []string{"CONSUL_HTTP_ADDR=" + w.httpAt, "CONSUL_HTTP_TOKEN=mastertoken"}, w.consul, "connect", "proxy", "-sidecar-for", what))
		default:
			ts.Fatalf("peer %s: what is %q?", args[0], source)
		}
	}
	if err := eventually(patience, func() error {
		c, err := p.dial()
		if err != nil {
			return err
		}
		defer c.close()
		_, err = c.get("/")
		return err
	}); err != nil {
		ts.Fatalf("%s does not answer: %v\n%s", p.name, err, w.allLogs())
	}
	w.peers = append(w.peers, p)
}

// cmdBenchIdentity runs "bench-identity": it writes ca.pem, and peer.pem with a certificate
// and key of the mesh's CA that the peers without Consul use on both sides.
func (w *world) cmdBenchIdentity(ts *testscript.TestScript, _ bool, _ []string) {
	id, err := url.Parse(w.ca.ID("peer").String())
	ts.Check(err)
	chain, key, err := w.ca.Sign([]*url.URL{id}, time.Now().Add(-time.Minute), time.Hour, "localhost")
	ts.Check(err)
	ts.Check(os.WriteFile(filepath.Join(w.dir, "peer.pem"), []byte(chain+key), 0o600))
	ts.Check(os.WriteFile(filepath.Join(w.dir, "ca.pem"), []byte(w.ca.CertPEM), 0o600))
	ts.Setenv("PEER_ID", id.String())
	ts.Setenv("TRUSTDOMAIN", w.ca.TrustDomain)
}

var rates = []int{500, 1000, 2000, 4000}

// cmdBench runs "bench ROUNDS": it compares all peers in turns and prints the table; with
// -update it also writes the table and the plot beside it.
func (w *world) cmdBench(ts *testscript.TestScript, _ bool, args []string) {
	rounds, err := strconv.Atoi(args[0])
	ts.Check(err)
	const long = 1500 * time.Millisecond
	for _, p := range w.peers {
		p.idle = memoryOf(slices.Concat(p.proxies, p.agents)...)
	}
	check := func(p *peer, name string, f figures, err error) {
		if err != nil {
			ts.Fatalf("%s, %s: %v\n%s", p.name, name, err, w.allLogs())
		}
		p.rounds[name] = append(p.rounds[name], f)
	}
	for range rounds {
		for _, p := range w.peers {
			f, err := p.closed(16, long, "/", true)
			check(p, "requests", f, err)
		}
		for _, rate := range rates {
			for _, p := range w.peers {
				f, err := p.open(rate, long)
				check(p, strconv.Itoa(rate), f, err)
			}
		}
		for _, p := range w.peers {
			if p.kind == "http2" {
				continue // its clients keep one connection
			}
			f, err := p.closed(8, long, "/", false)
			check(p, "connections", f, err)
			f, err = p.closed(2, long, "/bulk", true)
			check(p, "bulk", f, err)
			p.loaded = memoryOf(slices.Concat(p.proxies, p.agents)...)
		}
	}
	w.table(ts)
}

// median returns the median, the least and the greatest of one figure over the rounds.
func (p *peer) median(load string, of func(figures) float64) (mid, low, high float64) {
	var all []float64
	for _, f := range p.rounds[load] {
		all = append(all, of(f))
	}
	if len(all) == 0 {
		return 0, 0, 0
	}
	slices.Sort(all)
	return all[len(all)/2], all[0], all[len(all)-1]
}

// cmdCosts runs "costs ROUNDS TABLE": it measures kept requests, new connections and MB of every contender,
// in turns, and prints them beside the first one; -update writes the table.
func (w *world) cmdCosts(ts *testscript.TestScript, _ bool, args []string) {
	rounds, err := strconv.Atoi(args[0])
	ts.Check(err)
	const long = 1500 * time.Millisecond
	kinds := []struct {
		name, path string
		clients    int
		kept       bool
	}{{"requests", "/", 16, true}, {"connections", "/", 8, false}, {"bulk", "/bulk", 2, true}}
	for range rounds {
		for _, k := range kinds {
			for _, p := range w.peers {
				f, err := p.closed(k.clients, long, k.path, k.kept)
				if err != nil {
					ts.Fatalf("%s, %s: %v\n%s", p.name, k.name, err, w.allLogs())
				}
				p.rounds[k.name] = append(p.rounds[k.name], f)
			}
		}
	}
	var b strings.Builder
	fmt.Fprintln(&b, "| | CPU per request, us | of the first | CPU per new connection, us | of the first | CPU per MB, ms | of the first | memory, MB |")
	fmt.Fprintln(&b, "|---|---|---|---|---|---|---|---|")
	cpu := func(f figures) float64 { return f.cpu + f.agentCPU }
	for _, p := range w.peers {
		fmt.Fprintf(&b, "| %s |", p.name)
		for _, k := range kinds {
			mid, low, high := p.median(k.name, cpu)
			first, _, _ := w.peers[0].median(k.name, cpu)
			fmt.Fprintf(&b, " %.4g (%.4g-%.4g) | x%.2f |", mid, low, high, mid/first)
		}
		fmt.Fprintf(&b, " %.0f |\n", memoryOf(slices.Concat(p.proxies, p.agents)...))
	}
	for line := range strings.Lines(b.String()) {
		fmt.Print("measured: ", line)
	}
	if *Update {
		intoReadme(ts, args[1], b.String())
	}
}

func (w *world) table(ts *testscript.TestScript) {
	limit := map[string]*peer{} // by kind: the hand-written HAProxy pair, the best that this data plane can do
	for _, p := range w.peers {
		if strings.HasPrefix(p.name, "HAProxy pair") {
			limit[p.kind] = p
		}
	}
	limit["http2"] = limit["http"]
	var b strings.Builder
	fmt.Fprintln(&b, "| | requests/s | CPU of both proxies per request, us (ours beside HAProxy) | requests per CPU-second, of a HAProxy pair | p50 / p99 / p99.9 at 1,000/s, ms | p99 at 4,000/s, ms | new connections/s | their CPU, us | MB/s | both sides' memory idle, loaded, MB |")
	fmt.Fprintln(&b, "|---|---|---|---|---|---|---|---|---|---|")
	rate := func(f figures) float64 { return f.rate }
	cpu := func(f figures) float64 { return f.cpu + f.agentCPU }
	agent := func(f figures) float64 { return f.agentCPU }
	spread := func(mid, low, high float64) string {
		if mid == 0 {
			return "-"
		}
		return fmt.Sprintf("%.0f (%.0f-%.0f)", mid, low, high)
	}
	text := func(d time.Duration) string { return fmt.Sprintf("%.2f", ms(d)) }
	var lines []series
	for _, p := range w.peers {
		all := map[int]*figures{}
		line := series{name: p.name}
		for _, r := range rates {
			f := &figures{}
			for _, one := range p.rounds[strconv.Itoa(r)] {
				f.latencies = append(f.latencies, one.latencies...)
			}
			f.percentiles()
			all[r] = f
			line.points = append(line.points, point{float64(r), ms(f.p99)})
		}
		lines = append(lines, line)
		mid, low, high := p.median("requests", rate)
		cost, costLow, costHigh := p.median("requests", cpu)
		own, _, _ := p.median("requests", agent)
		ratio := "-"
		if of := limit[p.kind]; of != nil && cost > 0 {
			best, _, _ := of.median("requests", cpu)
			ratio = fmt.Sprintf("x%.2f", best/cost)
		}
		conns, connsLow, connsHigh := p.median("connections", rate)
		connCPU, _, _ := p.median("connections", cpu)
		bulk, _, _ := p.median("bulk", rate)
		mem := "-"
		if len(p.proxies) > 0 {
			mem = fmt.Sprintf("%.0f, %.0f", p.idle, cmp.Or(p.loaded, p.idle))
		}
		fmt.Fprintf(&b, "| %s | %s | %s%s | %s | %s / %s / %s | %s | %s | %.0f | %.0f | %s |\n", p.name, spread(mid, low, high), spread(cost, costLow, costHigh),
			map[bool]string{true: fmt.Sprintf(" (%.0f)", own)}[len(p.agents) > 0], ratio,
			text(all[1000].p50), text(all[1000].p99), text(all[1000].p999), text(all[4000].p99), spread(conns, connsLow, connsHigh), connCPU, bulk, mem)
		for _, r := range rates {
			_, p99Low, p99High := p.median(strconv.Itoa(r), func(f figures) float64 { return ms(f.p99) })
			fmt.Printf("measured: HAProxy %s: %-40s at %d/s: p50 %s, p99 %s (rounds %.2f-%.2f), p99.9 %s ms\n", w.version, p.name, r, text(all[r].p50), text(all[r].p99), p99Low, p99High, text(all[r].p999))
		}
	}
	for line := range strings.Lines(b.String()) {
		fmt.Print("measured: ", line)
	}
	if *Update {
		intoReadme(ts, "peers", b.String())
		writePlot(ts, "latency.svg", plot{title: "p99 against load (both hops, 32 connections)", x: "requests per second", y: "ms", lines: lines})
	}
}

// intoReadme replaces the text between the marks of name in testdata/measure/README.md.
func intoReadme(ts *testscript.TestScript, name, text string) {
	file := filepath.Join(sourceDir(ts), "testdata", "measure", "README.md")
	raw, err := os.ReadFile(file)
	ts.Check(err)
	before, rest, ok := strings.Cut(string(raw), "<!-- "+name+" -->\n")
	_, after, ok2 := strings.Cut(rest, "<!-- /"+name+" -->")
	if !ok || !ok2 {
		ts.Fatalf("testdata/measure/README.md has no marks for %s", name)
	}
	ts.Check(os.WriteFile(file, []byte(before+"<!-- "+name+" -->\n"+text+"<!-- /"+name+" -->"+after), 0o644))
}

// cmdRoutesEntry runs "routes-entry NAME SERVICE N": it writes a service-router entry of N routes, none of
// which matches what is measured, for a service NAME that leads to SERVICE.
func (w *world) cmdRoutesEntry(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[2])
	ts.Check(err)
	var routes []string
	for i := range n {
		routes = append(routes, fmt.Sprintf(`{"Match":{"HTTP":{"PathPrefix":"/never/%d"}},"Destination":{"Service":%q}}`, i, args[1]))
	}
	routes = append(routes, fmt.Sprintf(`{"Destination":{"Service":%q}}`, args[1]))
	_, err = w.call(http.MethodPut, "/v1/config", fmt.Appendf(nil, `{"Kind":"service-router","Name":%q,"Routes":[%s]}`, args[0], strings.Join(routes, ",")))
	ts.Check(err)
}
