package scripttest

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

var (
	soakFor  = flag.Duration("soak", 45*time.Second, "how long TestSoak goes on")
	soakSeed = flag.Uint64("seed", 0, "what TestSoak draws from; 0 for a new one, which is printed")
)

// Soak tries to break a small mesh by random changes and faults: see testdata/soak. It prints
// each step, and -seed repeats the steps in the same order.
func Soak(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul and HAProxy")
	}
	consul := need(t, consulPath())
	version := cmp.Or(*onlyHAProxy, "3.2")
	path := Versions(t)[version]
	t.Parallel() // with the scripts
	testscript.Run(t, testscript.Params{
		Dir:   filepath.Join("..", "..", "testdata", "soak"),
		Setup: func(e *testscript.Env) error { return newWorld(e, consul, path, version) }, Cmds: worldCommands, RequireUniqueNames: true,
	})
}

// unauthorized counts the messages of a caller that is never allowed which have reached an application.
var unauthorized atomic.Int64

const forbidden = "this must not arrive"

// soak is one run.
type soak struct {
	w    *world
	ts   *testscript.TestScript
	r    *rand.Rand
	size map[string]int // endpoints by service
	more bool           // www has a third upstream
	evil atomic.Pointer[tls.Certificate]
	slow time.Duration // the longest time to converge
	took map[string]int
}

// happening is a step, drawn as often as its weight says; calls may fail during an excused one. When
// do returns, everything must have converged, unless the step is excused: then recovered waits for it.
type happening struct {
	name    string
	weight  int
	excused bool
	do      func(s *soak)
}

var happenings = []happening{
	{"endpoints", 10, false, func(s *soak) { s.scale(); s.settled() }},
	{"many endpoints", 3, false, func(s *soak) {
		for range 5 {
			s.scale()
		}
		s.settled()
	}},
	{"intentions", 6, false, func(s *soak) {
		service, addr := "api", "127.0.0.1:"+s.ts.Getenv("PUB1")
		if s.r.IntN(2) == 0 {
			service, addr = "db", "127.0.0.1:"+s.ts.Getenv("PUB2")
		}
		s.run("intention", "deny", "other", service)
		s.run("mesh-call", map[string]string{"api": "403", "db": "refused"}[service], addr, "other")
		s.run("intention", "delete", "other", service)
		s.run("mesh-call", "ok", addr, "other")
	}},
	{"intentions of others", 3, false, func(s *soak) { s.run("churn-intentions", s.pick("api", "db"), "20") }},
	{"roots", 2, false, func(s *soak) {
		s.run("rotate-roots")
		s.run("leaf-root", "127.0.0.1:"+s.ts.Getenv("PUB1"), "127.0.0.1:"+s.ts.Getenv("PUB2"))
	}},
	{"upstreams", 3, false, func(s *soak) {
		s.more = !s.more
		if s.more {
			s.run("register", "www2.json")
			s.run("http", "200", "http://127.0.0.1:"+s.ts.Getenv("UP3")+"/")
			return
		}
		s.run("register", "www.json")
		s.eventually("the listener is gone", func() error {
			c, err := net.Dial("tcp", "127.0.0.1:"+s.ts.Getenv("UP3"))
			if err == nil {
				c.Close()
				return errors.New("it listens")
			}
			return nil
		})
	}},
	{"chains", 6, false, (*soak).chain},
	{"inbound settings", 2, false, func(s *soak) { s.run("register", s.pick("api.json", "api2.json", "db.json", "db2.json")) }},
	{"agent in trouble", 4, false, func(s *soak) {
		s.run("fault", s.pick("429", "500", "403", "half", "slow", "skew"))
		s.scale()
		s.traffic()
		s.run("fault", "none")
		s.settled()
	}},
	{"servers away", 2, false, func(s *soak) {
		s.run("consul-stop")
		s.traffic()
		s.run("consul-start")
		s.scale()
		s.settled()
	}},
	{"token", 2, false, func(s *soak) {
		s.run("token-revoke", "TOKEN")
		s.run("fault", "none") // ends the blocking queries; when they are asked again, Consul refuses them
		s.traffic()
		s.run("token-restore", "TOKEN")
		s.scale()
		s.settled()
	}},
	{"disk full", 2, false, func(s *soak) {
		small := filepath.Join(s.w.dir, "www")
		s.run("full", small)
		s.scale()
		s.settled()
		s.note("rm %s", filepath.Join(small, "filler"))
		s.ts.Check(os.Remove(filepath.Join(small, "filler")))
	}},
	{"files removed", 2, false, func(s *soak) {
		file := filepath.Join(s.w.dir, s.pick("api/tls/leaf.pem", "db/haproxy.cfg", "www/tls/roots.pem"))
		s.note("rm %s", file)
		s.ts.Check(os.Remove(file))
		s.eventually(file+" is back", func() error { _, err := os.Stat(file); return err })
	}},
	{"HAProxy killed", 2, true, func(s *soak) {
		s.run("kill-haproxy", s.pick("api", "db", "www"), s.pick("worker", "master"))
	}},
	{"we are killed", 2, true, func(s *soak) {
		name := s.pick("api", "db", "www")
		s.run("signal", name, "KILL")
		s.run("exited", name, "-1")
		s.start(name)
	}},
	{"we are restarted", 2, true, func(s *soak) {
		name := s.pick("api", "db", "www")
		s.run("drop", "session") // a drain would wait for it
		s.run("signal", name, "TERM")
		s.run("exited", name, "0")
		s.start(name)
	}},
}

func (s *soak) start(name string) {
	args := []string{name, "-sidecar-for", name, "-access-log", "off"}
	if name == "www" {
		args = append(args, "-http-addr", s.ts.Getenv("BETWEEN"), "-token", s.ts.Getenv("TOKEN"))
	}
	s.run("sidecar", args...)
}

func (s *soak) pick(of ...string) string { return of[s.r.IntN(len(of))] }

func (s *soak) note(format string, args ...any) {
	fmt.Printf("soak: %s > %s\n", time.Now().UTC().Format(time.StampMilli), fmt.Sprintf(format, args...))
}

// run executes a command of the scripts and prints it, so that it can be pasted into a script.
func (s *soak) run(command string, args ...string) {
	s.note("%s %s", command, strings.Join(args, " "))
	s.w.commands[command](s.ts, false, args)
}

func (s *soak) eventually(what string, try func() error) {
	if err := eventually(patience, try); err != nil {
		s.ts.Fatalf("%s: %v\n%s", what, err, s.w.allLogs())
	}
}

func (s *soak) scale() {
	service := s.pick("api", "db")
	args := []string{service, strconv.Itoa(1 + s.r.IntN(12))}
	if s.r.IntN(3) == 0 {
		args = append(args, "roll")
	}
	s.run("scale", args...)
	s.size[service], _ = strconv.Atoi(args[1])
}

// settled waits until HAProxy has the endpoints that are registered.
func (s *soak) settled() {
	s.run("endpoints", s.ts.Getenv("WWW_ADMIN"), strconv.Itoa(s.size["api"]+s.size["db"]))
}

// traffic waits for calls to be answered, whatever is wrong just now.
func (s *soak) traffic() {
	for name, l := range s.w.loads {
		had := l.good.Load()
		s.eventually("calls of "+name+" are answered", func() error {
			if l.good.Load() < had+100 {
				return fmt.Errorf("%d answered", l.good.Load()-had)
			}
			return nil
		})
	}
}

// recovered waits until everything works again after a fault that calls may have noticed, and opens the held session anew.
func (s *soak) recovered() {
	s.run("http", "200", "http://127.0.0.1:"+s.ts.Getenv("UP1")+"/")
	s.run("tcp", "ok", "127.0.0.1:"+s.ts.Getenv("UP2"), "ping", "db ping")
	s.settled()
	for name, l := range s.w.loads { // calls that began before may still fail
		failed, since := l.failed.Load(), l.good.Load()
		s.eventually("calls of "+name+" go well again", func() error {
			if now := l.failed.Load(); now != failed {
				failed, since = now, l.good.Load()
			}
			if l.good.Load() < since+100 {
				return fmt.Errorf("%d in a row", l.good.Load()-since)
			}
			return nil
		})
	}
	_ = s.w.idle["session"].Close()
	s.run("hold", "session", "127.0.0.1:"+s.ts.Getenv("UP2"))
}

// intrude sends forbidden to each address in turn, as a caller that is never allowed, until end is closed.
func (s *soak) intrude(end chan struct{}, tries *atomic.Int64, addrs ...string) {
	for i := 0; ; i++ {
		select {
		case <-end:
			return
		case <-time.After(20 * time.Millisecond):
		}
		conf := &tls.Config{InsecureSkipVerify: true}
		if cert := s.evil.Load(); i%5 != 0 { // every fifth try has no certificate at all
			conf.Certificates = []tls.Certificate{*cert}
		}
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 2 * time.Second}, "tcp", addrs[i%len(addrs)], conf)
		if err != nil {
			continue
		}
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		fmt.Fprintf(c, "GET /%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n%s\n", strings.ReplaceAll(forbidden, " ", "-"), forbidden)
		_, _ = io.Copy(io.Discard, io.LimitReader(c, 4096))
		c.Close()
		tries.Add(1)
	}
}

// holdings are what one sidecar holds.
type holdings struct {
	goroutines, files, haproxies, memory int
	kept                                 paths // what lies in the run directory
}

func (h holdings) String() string {
	return fmt.Sprintf("%d goroutines, %d open files, %d HAProxies, %d files, %d MB", h.goroutines, h.files, h.haproxies, len(h.kept), h.memory)
}

// paths are sorted.
type paths []string

// without returns the paths that are not in b.
func (p paths) without(b paths) []string {
	return slices.DeleteFunc(slices.Clone(p), func(path string) bool { _, ok := slices.BinarySearch(b, path); return ok })
}

func (s *soak) usage(name string) (u holdings) {
	text, err := scrape(s.ts.Getenv(envName(name) + "_ADMIN"))
	s.ts.Check(err)
	of := func(metric string) int {
		m := regexp.MustCompile(`(?m)^` + metric + ` (\S+)$`).FindStringSubmatch(text)
		if m == nil {
			s.ts.Fatalf("%s does not show %s", name, metric)
		}
		v, _ := strconv.ParseFloat(m[1], 64)
		return int(v)
	}
	pids := descendants(s.w.cars[name].Process.Pid)
	u = holdings{goroutines: of("go_goroutines"), files: of("process_open_fds"), haproxies: len(pids), memory: int(memoryOf(append(pids, s.w.cars[name].Process.Pid)...))}
	for _, pid := range pids {
		list, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		u.files += len(list)
	}
	_ = filepath.WalkDir(filepath.Join(s.w.dir, name), func(path string, _ fs.DirEntry, _ error) error { u.kept = append(u.kept, path); return nil })
	slices.Sort(u.kept)
	return u
}

// kept describes the sessions that keep the old workers of a sidecar alive.
func (w *world) kept(name string) string {
	master := runtimeapi.Socket(filepath.Join(w.dir, name, "sock", "master"))
	ask := func(command string) string {
		out, err := master.Do(context.Background(), command, nil)
		return fmt.Sprintln(out, err)
	}
	out := ask("show proc")
	_, old, _ := strings.Cut(out, "# old workers")
	for _, m := range regexp.MustCompile(`(?m)^(\d+)\s+worker`).FindAllStringSubmatch(old, -1) {
		out += m[1] + ":\n" + ask("@!"+m[1]+" show sess all")
	}
	return out
}

// rest brings the mesh back to where it began and returns what each sidecar then holds.
func (s *soak) rest() map[string]holdings {
	for _, service := range []string{"api", "db"} {
		s.run("scale", service, "1")
		s.size[service] = 1
	}
	s.run("register", "api.json", "db.json", "www.json")
	for entry := range chains {
		_, err := s.w.call(http.MethodDelete, "/v1/config/"+entry, nil)
		s.ts.Check(err)
	}
	s.more = false
	s.settled()
	_ = s.w.idle["session"].Close() // an open session keeps its worker alive
	out := map[string]holdings{}
	for _, name := range []string{"api", "db", "www"} {
		// An old worker ends when its own pools are empty: every 30 s HAProxy purges half of what the
		// previous purge found in excess.
		err := eventually(5*patience, func() error {
			text, err := scrape(s.ts.Getenv(envName(name) + "_ADMIN"))
			if err == nil && !regexp.MustCompile(`(?m)^haproxy_connect_old_workers 0$`).MatchString(text) {
				err = errors.New("old workers")
			}
			if err == nil && !regexp.MustCompile(`(?m)^haproxy_connect_draining_servers 0$`).MatchString(text) {
				err = errors.New("draining servers")
			}
			return err
		})
		if err != nil {
			s.ts.Fatalf("%s is not at rest: %v\n%s\n%s", name, err, s.w.kept(name), s.w.allLogs())
		}
		out[name] = s.usage(name)
	}
	s.run("hold", "session", "127.0.0.1:"+s.ts.Getenv("UP2"))
	return out
}

// cmdSoak runs "soak": see Soak.
func (w *world) cmdSoak(ts *testscript.TestScript, _ bool, _ []string) {
	seed := cmp.Or(*soakSeed, uint64(time.Now().UnixNano()))
	s := &soak{w: w, ts: ts, r: rand.New(rand.NewPCG(seed, 0)), size: map[string]int{"api": 1, "db": 1}, took: map[string]int{}}
	fmt.Printf("soak: HAProxy %s, for %s, -seed %d\n", w.version, *soakFor, seed)
	newEvil := func() {
		leaf, err := w.ca.Leaf("evil", time.Hour)
		ts.Check(err)
		cert := leaf.TLS()
		s.evil.Store(&cert)
	}
	newEvil()
	var tries atomic.Int64
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	addrs := []string{"127.0.0.1:" + ts.Getenv("PUB1"), "127.0.0.1:" + ts.Getenv("PUB2")} // two goroutines must not share the script's variables
	go func() { defer wg.Done(); s.intrude(end, &tries, addrs...) }()
	defer func() { close(end); wg.Wait() }()

	total := 0
	for _, h := range happenings {
		total += h.weight
	}
	s.traffic()
	before := s.rest()
	base := map[string]int64{}
	for begun := time.Now(); time.Since(begun) < *soakFor; {
		n := s.r.IntN(total)
		i := slices.IndexFunc(happenings, func(h happening) bool { n -= h.weight; return n < 0 })
		h := happenings[i]
		for name, l := range w.loads {
			base[name] = l.failed.Load()
			l.first.Store(nil)
		}
		s.note("# %s", h.name)
		s.took[h.name]++
		since := time.Now()
		h.do(s)
		newEvil()
		s.slow = max(s.slow, time.Since(since))
		if h.excused {
			s.recovered()
		} else {
			s.traffic()
			s.run("held", "session", "open")
			for name, l := range w.loads {
				if failed := l.failed.Load() - base[name]; failed > 0 {
					ts.Fatalf("-seed %d: %s: %d calls of %s failed, the first: %s\n%s", seed, h.name, failed, name, *l.first.Load(), w.allLogs())
				}
			}
		}
		if n := unauthorized.Load(); n > 0 {
			ts.Fatalf("-seed %d: %s: %d messages of a caller who is never allowed have arrived\n%s", seed, h.name, n, w.allLogs())
		}
	}
	if tries.Load() == 0 {
		ts.Fatalf("nobody has tried what is forbidden")
	}
	after := map[string]holdings{}
	worse := func() (err error) {
		for name, b := range before {
			a := s.usage(name)
			after[name] = a
			if a.goroutines > b.goroutines+10 || a.files > b.files+30 || a.haproxies != b.haproxies || len(a.kept) > len(b.kept)+2 || a.memory > b.memory*3/2+20 {
				err = fmt.Errorf("%s held %v, holds %v; new files: %s", name, b, a, a.kept.without(b.kept))
			}
		}
		return err
	}
	s.rest()
	s.eventually("what was held is let go", worse)
	fmt.Printf("soak: HAProxy %s: %v; %d+%d calls, %d intrusions refused, slowest step %s; held before %v, after %v\n", w.version, s.took,
		w.loads["api"].good.Load(), w.loads["db"].good.Load(), tries.Load(), s.slow.Round(time.Millisecond), before, after)
}

// chains are bodies of config entries of every kind that shapes a discovery chain, by kind and name.
// Each leads to the same services and to one backend of each, as settled counts servers. None changes
// the connect timeout of http: that would be another class of sockets, which stay.
var chains = map[string][]string{
	"service-router/api": {
		`"Routes":[{"Match":{"HTTP":{"PathPrefix":"/","Methods":["POST"]}},"Destination":{"RequestHeaders":{"Set":{"x-token":"posted"}}}},{"Match":{"HTTP":{"PathRegex":"/.*"}},"Destination":{"RequestHeaders":{"Set":{"x-token":"got"}}}}]`,
		`"Routes":[{"Match":{"HTTP":{"PathExact":"/"}},"Destination":{"PrefixRewrite":"/other"}}]`,
	},
	"service-splitter/api": {
		`"Splits":[{"Weight":50,"RequestHeaders":{"Set":{"x-token":"a"}}},{"Weight":50,"RequestHeaders":{"Set":{"x-token":"b"}}}]`,
		`"Splits":[{"Weight":1,"RequestHeaders":{"Set":{"x-token":"a"}}},{"Weight":99,"RequestHeaders":{"Set":{"x-token":"b"}}}]`,
	},
	"service-resolver/api": {
		`"LoadBalancer":{"Policy":"maglev","HashPolicies":[{"SourceIP":true}]}`,
		`"LoadBalancer":{"Policy":"least_request"}`,
		`"LoadBalancer":{"Policy":"random"}`,
	},
	"service-resolver/db": {`"ConnectTimeout":"4s"`, `"ConnectTimeout":"6s"`},
}

// chain writes or deletes one of the entries.
func (s *soak) chain() {
	which := s.pick(slices.Sorted(maps.Keys(chains))...)
	kind, name, _ := strings.Cut(which, "/")
	list := chains[which]
	n := s.r.IntN(len(list) + 1)
	var err error
	if n == len(list) {
		_, err = s.w.call(http.MethodDelete, "/v1/config/"+which, nil)
	} else {
		_, err = s.w.call(http.MethodPut, "/v1/config", fmt.Appendf(nil, `{"Kind":%q,"Name":%q,%s}`, kind, name, list[n]))
	}
	s.ts.Check(err)
	s.traffic()
	s.settled()
}
