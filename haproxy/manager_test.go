package haproxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/connecttest"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// fakeProxy records what it is told; faults are fields.
type fakeProxy struct {
	mu                  sync.Mutex
	up                  bool
	starts, reloads     int
	replaced            int
	checkErr, reloadErr error
	commands            []string
	fail                string // commands that contain it are refused
	refuse              string // a configuration with this line is refused
	file                string
	loaded              string // haproxy.cfg at the last start or reload
}

func (f *fakeProxy) Check(_ context.Context, file string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.refuse != "" {
		b, _ := os.ReadFile(file)
		for i, line := range strings.Split(string(b), "\n") {
			if strings.HasPrefix(line, f.refuse) {
				return fmt.Errorf("HAProxy refuses the configuration: [ALERT] config : parsing [%s:%d] : no", file, i+1)
			}
		}
	}
	return f.checkErr
}

func (f *fakeProxy) load() {
	b, _ := os.ReadFile(f.file)
	f.loaded = string(b)
	sock := filepath.Join(filepath.Dir(f.file), "sock")
	classes, _ := filepath.Glob(sock + "/*-*")
	for i := range classes {
		classes[i] += "/1"
	}
	for _, name := range append(classes, sock+"/stats", sock+"/admin", sock+"/authz", sock+"/master") {
		_ = os.WriteFile(name, nil, 0o600)
	}
}

func (f *fakeProxy) Start(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.up = true
	f.starts++
	f.load()
	return nil
}

func (f *fakeProxy) Reload(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reloadErr != nil {
		return f.reloadErr
	}
	f.reloads++
	f.load()
	return nil
}

func (f *fakeProxy) Inherits() bool { return false }

func (f *fakeProxy) Replace(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.replaced++
	f.load()
	return nil
}

func (f *fakeProxy) replacements() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replaced
}

func (f *fakeProxy) Up() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.up
}

func (f *fakeProxy) Do(_ context.Context, text string, _ []byte) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.commands = append(f.commands, text)
	switch {
	case f.fail != "" && strings.Contains(text, f.fail):
		return "no", nil
	case strings.HasPrefix(text, "add server"):
		return "New server registered.", nil
	case strings.HasPrefix(text, "del server"):
		return "Server deleted.", nil
	case strings.HasPrefix(text, "set ssl"):
		return "Transaction created for certificate!", nil
	case strings.HasPrefix(text, "commit ssl"):
		return "Committing.\nSuccess!", nil
	case strings.HasPrefix(text, "show ssl"):
		return "Status: Used", nil
	case strings.HasPrefix(text, "show servers state"):
		return "1\n# be_id be_name srv_id srv_name", errors.New("not asked in this test")
	}
	return "", nil
}

func (f *fakeProxy) counts() (starts, reloads int, commands []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.starts, f.reloads, append([]string(nil), f.commands...)
}

type bed struct {
	t     *testing.T
	proxy *fakeProxy
	m     *Manager
	ca    *certs.Authority
	leaf  *certs.Leaf
	roots *certs.Roots
	stop  func()
}

// newBed runs a manager inside a synctest bubble.
func newBed(t *testing.T) *bed {
	dir := filepath.Join(t.TempDir())
	if len(dir) > 60 {
		var err error
		dir, err = os.MkdirTemp("/tmp", "hcm")
		require.NoError(t, err)
		t.Cleanup(func() { os.RemoveAll(dir) })
	}
	for _, sub := range []string{"tls", "maps", "sock"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, sub), 0o700))
	}
	ca, err := certs.NewAuthority("11111111-2222-3333-4444-555555555555.consul")
	require.NoError(t, err)
	leaf, err := ca.Leaf("www", 72*time.Hour)
	require.NoError(t, err)
	roots, err := ca.Roots()
	require.NoError(t, err)
	r, err := render.New(render.Options{Dir: dir})
	require.NoError(t, err)
	b := &bed{t: t, proxy: &fakeProxy{file: filepath.Join(dir, render.MainFile)}, ca: ca, leaf: leaf, roots: roots}
	b.m = NewManager(Config{Dir: dir, Renderer: r, Proxy: b.proxy,
		SocketDir: func(d string) error { return os.MkdirAll(d, 0o700) }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- b.m.Run(ctx) }()
	b.stop = func() {
		cancel()
		require.NoError(t, <-done)
	}
	return b
}

// want publishes upstreams by name; each digit after ":" is an endpoint.
func (b *bed) want(ups ...string) { b.m.Want(b.snapshot(ups...)) }

func (b *bed) snapshot(ups ...string) *connect.Snapshot {
	s := connecttest.Snapshot(b.leaf, b.roots)
	for i, spec := range ups {
		name, n, _ := strings.Cut(spec, ":")
		var list []connect.Endpoint
		for j := range len(n) {
			list = append(list, connect.Endpoint{Name: "e" + n[j:j+1], Address: "10.0.0.1", Port: 20000 + int(n[j]), Weight: 1})
		}
		up := connecttest.Upstream(name, connect.HTTP, 0, b.ca.ID(name), list...)
		up.Listener.Bind = connect.Bind{SocketPath: fmt.Sprintf("/tmp/hcm-%d.sock", i)}
		connecttest.Add(s, up)
	}
	return s
}

func endpointLines(conf string) int {
	return len(regexp.MustCompile(`(?m)^\s+server e\d\.`).FindAllString(conf, -1))
}

func TestEndpointsGoOutAtOnceWithoutReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("api:1")
		synctest.Wait()
		starts, reloads, commands := b.proxy.counts()
		require.Equal(t, []int{1, 0, 0}, []int{starts, reloads, len(commands)})
		begun := time.Now()
		b.want("api:12")
		synctest.Wait()
		require.Zero(t, time.Since(begun), "nothing waits")
		_, reloads, commands = b.proxy.counts()
		require.Zero(t, reloads)
		require.Len(t, commands, 3) // map, add, enable
		disk, err := os.ReadFile(b.proxy.file)
		require.NoError(t, err)
		require.Equal(t, 2, endpointLines(string(disk)), "the file describes what runs")
		b.want("api:2")
		synctest.Wait()
		time.Sleep(2 * time.Second)
		_, reloads, commands = b.proxy.counts()
		require.Zero(t, reloads)
		require.Contains(t, strings.Join(commands, "\n"), "del server api.default.dc1/e1.")
	})
}

func TestStructureIsCoalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("a:1")
		synctest.Wait()
		time.Sleep(5 * time.Second)
		names := []string{"a:1"}
		for _, n := range []string{"b:1", "c:1", "d:1", "e:1"} { // each 100 ms: never quiet for 200
			names = append(names, n)
			b.want(names...)
			time.Sleep(100 * time.Millisecond)
		}
		_, reloads, _ := b.proxy.counts()
		require.Zero(t, reloads)
		time.Sleep(300 * time.Millisecond)
		_, reloads, _ = b.proxy.counts()
		require.Equal(t, 1, reloads)
		require.Equal(t, uint64(1), b.m.Status().Reloads[Upstreams])
		// Never quiet: at most two seconds all the same.
		begun := time.Now()
		for i := range 40 {
			names = append(names, string(rune('f'+i))+"x:1")
			b.want(names...)
			time.Sleep(100 * time.Millisecond)
			if _, n, _ := b.proxy.counts(); n > 1 {
				break
			}
		}
		require.LessOrEqual(t, time.Since(begun), 2500*time.Millisecond)
	})
}

func TestLastGoodWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("a:1")
		synctest.Wait()
		good := b.proxy.loaded
		time.Sleep(5 * time.Second)
		b.proxy.checkErr = errors.New("HAProxy does not like it")
		b.want("a:1", "b:1")
		time.Sleep(10 * time.Second)
		_, reloads, _ := b.proxy.counts()
		require.Zero(t, reloads)
		require.Equal(t, "check", b.m.Status().Stage)
		require.Contains(t, b.m.Status().Err, "does not like it")
		disk, err := os.ReadFile(b.proxy.file)
		require.NoError(t, err)
		require.Equal(t, good, string(disk), "a restart would read the last good one")
		b.proxy.mu.Lock()
		b.proxy.checkErr = nil
		b.proxy.mu.Unlock()
		time.Sleep(time.Minute)
		_, reloads, _ = b.proxy.counts()
		require.Equal(t, 1, reloads, "it is tried again by itself")
		require.Empty(t, b.m.Status().Err)
	})
}

func TestFailedCommandBecomesReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("a:1")
		synctest.Wait()
		b.proxy.fail = "add server"
		b.want("a:12")
		time.Sleep(10 * time.Second)
		_, reloads, _ := b.proxy.counts()
		require.Equal(t, 1, reloads)
		require.Equal(t, uint64(1), b.m.Status().Reloads[Repair])
		require.Equal(t, 2, endpointLines(b.proxy.loaded))
	})
}

func TestReturningEndpointIsTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("a:12")
		synctest.Wait()
		b.proxy.fail = "del server" // sessions are open
		b.want("a:1")
		time.Sleep(time.Second)
		b.want("a:12")
		synctest.Wait()
		_, reloads, commands := b.proxy.counts()
		require.Zero(t, reloads)
		require.Contains(t, commands[len(commands)-1], "state ready")
		require.NotContains(t, strings.Join(commands, "\n"), "add server")
	})
}

func TestLeafIsSwappedLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("a:1")
		synctest.Wait()
		var err error
		b.leaf, err = b.ca.Leaf("www", time.Hour)
		require.NoError(t, err)
		b.want("a:1")
		synctest.Wait()
		_, reloads, commands := b.proxy.counts()
		require.Zero(t, reloads)
		require.Contains(t, strings.Join(commands, "\n"), "commit ssl cert")
		disk, err := os.ReadFile(filepath.Join(filepath.Dir(b.proxy.file), render.LeafFile(connect.OwnLeaf)))
		require.NoError(t, err)
		require.Equal(t, string(b.leaf.PEM()), string(disk))
	})
}

// Files and sockets that somebody removed come back, a full disk keeps nothing from
// HAProxy, and the files follow when they can.
func TestRunDirectoryIsRestored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		dir := filepath.Dir(b.proxy.file)
		b.m.conf.Restore = func() error {
			for _, sub := range []string{"tls", "maps", "sock/h1-1000"} {
				if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
					return err
				}
			}
			return nil
		}
		b.want("api:1")
		synctest.Wait()
		require.NoError(t, os.RemoveAll(filepath.Join(dir, "tls")))
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		require.FileExists(t, filepath.Join(dir, render.LeafFile(connect.OwnLeaf)))
		require.Zero(t, b.proxy.replacements(), "the sockets are there")
		require.NoError(t, os.RemoveAll(dir))
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		require.Equal(t, 1, b.proxy.replacements())
		disk, err := os.ReadFile(b.proxy.file)
		require.NoError(t, err)
		require.Equal(t, 1, endpointLines(string(disk)))
		require.Equal(t, uint64(2), b.m.Status().Drifts)

		// A file where a directory should be is as bad as a full disk, and works for root too.
		require.NoError(t, os.RemoveAll(filepath.Join(dir, "maps")))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "maps"), nil, 0o600))
		b.want("api:12")
		synctest.Wait()
		_, _, commands := b.proxy.counts()
		require.Contains(t, strings.Join(commands, "\n"), "add server api.default.dc1/e2.")
		require.Equal(t, "write", b.m.Status().Stage)
		n := len(commands)
		require.NoError(t, os.Remove(filepath.Join(dir, "maps")))
		require.NoError(t, os.Mkdir(filepath.Join(dir, "maps"), 0o700))
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Empty(t, b.m.Status().Stage)
		_, reloads, commands := b.proxy.counts()
		require.Zero(t, reloads)
		require.Len(t, commands, n+2, "nothing is said twice, but for the search for drift")
		disk, err = os.ReadFile(b.proxy.file)
		require.NoError(t, err)
		require.Equal(t, 2, endpointLines(string(disk)))
	})
}

// BenchmarkFlip is all that one endpoint costs us, but for Consul's answer: render,
// plan, files and commands, with a HAProxy that does nothing.
func BenchmarkFlip(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("%dx10", n), func(b *testing.B) { benchmarkChange(b, n, 10, 1) })
	}
}

// BenchmarkEndpoints is one upstream that goes from nothing to 2,000 endpoints and back.
func BenchmarkEndpoints(b *testing.B) { benchmarkChange(b, 1, 2000, 2000) }

// benchmarkChange takes the last endpoints of one upstream away and gives them back.
func benchmarkChange(b *testing.B, upstreams, endpoints, change int) {
	ca, err := certs.NewAuthority("11111111-2222-3333-4444-555555555555.consul")
	require.NoError(b, err)
	leaf, err := ca.Leaf("www", 72*time.Hour)
	require.NoError(b, err)
	roots, err := ca.Roots()
	require.NoError(b, err)
	dir, err := os.MkdirTemp("/dev/shm", "hcb") // a run directory is in memory, as /run is
	require.NoError(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	for _, sub := range []string{"tls", "maps", "sock"} {
		require.NoError(b, os.Mkdir(filepath.Join(dir, sub), 0o700))
	}
	r, err := render.New(render.Options{Dir: dir})
	require.NoError(b, err)
	proxy := &fakeProxy{file: filepath.Join(dir, render.MainFile)}
	m := NewManager(Config{Dir: dir, Renderer: r, Proxy: proxy, SocketDir: func(d string) error { return os.MkdirAll(d, 0o700) }})
	full := connecttest.Snapshot(leaf, roots)
	var ways []connecttest.Way
	for i := range upstreams {
		name := fmt.Sprintf("u%d", i)
		var list []connect.Endpoint
		for j := range endpoints {
			list = append(list, connect.Endpoint{Name: fmt.Sprintf("e%d", j), Address: fmt.Sprintf("10.%d.%d.%d", i%250, j/250, j%250+1), Port: 20000, Weight: 1})
		}
		up := connecttest.Upstream(name, connect.HTTP, 0, ca.ID(name), list...)
		up.Listener.Bind = connect.Bind{SocketPath: fmt.Sprintf("/tmp/hcb-%d.sock", i)}
		ways = append(ways, up)
	}
	connecttest.Add(full, ways...)
	first := *full.Targets[0]
	first.Endpoints = first.Endpoints[:endpoints-change]
	step := func(s *connect.Snapshot) {
		for {
			wait, err := m.step(b.Context(), s)
			require.NoError(b, err)
			if wait == 0 {
				return
			}
			time.Sleep(wait)
		}
	}
	step(full)
	less := *full
	b.ReportAllocs()
	begun := cpu()
	for i := 0; b.Loop(); i++ {
		if i%2 == 1 {
			step(full)
			continue
		}
		less.Targets = slices.Clone(full.Targets)
		one := first
		less.Targets[0] = &one
		step(&less)
		clear(m.deleting)
	}
	b.ReportMetric(float64(cpu()-begun)/float64(b.N)/1e6, "cpu-ms/op")
	_, reloads, _ := proxy.counts()
	require.LessOrEqual(b, reloads, 2, "more sockets, once, before the loop settles")
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// If HAProxy refuses a line of one upstream, that upstream is left out and no other.
func TestARefusedUpstreamIsLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("api:1")
		synctest.Wait()
		b.proxy.mu.Lock()
		b.proxy.refuse = "frontend up_bad"
		b.proxy.mu.Unlock()
		b.want("api:1", "bad:1", "db:1")
		time.Sleep(5 * time.Second)
		st := b.m.Status()
		require.Empty(t, st.Err)
		require.NotNil(t, st.Running.Find(render.Frontend, "up_db"))
		require.NotNil(t, st.Running.Find(render.Frontend, "up_api"))
		require.Nil(t, st.Running.Find(render.Frontend, "up_bad"))
		require.Len(t, st.Refused, 1)
		require.Contains(t, st.Refused[0], "HAProxy refuses its configuration")
	})
}

// A snippet that HAProxy refuses is replaced by the last one that it took, also by another
// Manager, and takes no upstream down.
func TestARefusedSnippet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		with := func(text string) {
			s := b.snapshot("api:1")
			s.Snippets = map[connect.SnippetName]string{connect.DefaultsSnippet: text}
			b.m.Want(s)
			time.Sleep(5 * time.Second)
		}
		with("timeout check 3s\n")
		require.Empty(t, b.m.Status().Refused)
		b.proxy.mu.Lock()
		b.proxy.refuse = "  timeout check soon"
		b.proxy.mu.Unlock()
		with("timeout check soon\n")
		st := b.m.Status()
		require.Empty(t, st.Err)
		require.Len(t, st.Refused, 1)
		require.Contains(t, st.Refused[0], "the last one that HAProxy took stays")
		require.Contains(t, st.Running.Text(), "timeout check 3s")
		require.NotNil(t, st.Running.Find(render.Frontend, "up_api"))

		m := NewManager(b.m.conf) // the next process, and a HAProxy that has forgotten the word
		snap := b.snapshot("api:1")
		snap.Snippets = map[connect.SnippetName]string{connect.DefaultsSnippet: "timeout check soon\n"}
		used, _ := m.judged(snap)
		require.Contains(t, used.Snippets[connect.DefaultsSnippet], "soon", "it is tried")
		require.True(t, m.atFault(used, st.Running, stage("check", "", errors.New("no"))))
		used, _ = m.judged(snap)
		require.Contains(t, used.Snippets[connect.DefaultsSnippet], "3s")
		require.True(t, m.atFault(used, st.Running, stage("check", "", errors.New("no"))))
		used, said := m.judged(snap)
		require.Empty(t, used.Snippets)
		require.Contains(t, said[0], "it is left out")
	})
}

// While a reload fails, what needs no reload goes on: endpoints, policies, the leaf.
func TestAFailingReloadHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBed(t)
		defer b.stop()
		b.want("api:1")
		synctest.Wait()
		b.proxy.mu.Lock()
		b.proxy.reloadErr = errors.New("a port is taken")
		b.proxy.mu.Unlock()
		b.want("api:1", "db:1")
		time.Sleep(5 * time.Second)
		require.Contains(t, b.m.Status().Err, "a port is taken")
		_, _, before := b.proxy.counts()
		leaf, err := b.ca.Leaf("www", 72*time.Hour)
		require.NoError(t, err)
		b.leaf = leaf
		b.want("api:13", "db:1")
		time.Sleep(5 * time.Second)
		_, _, commands := b.proxy.counts()
		text := strings.Join(commands[len(before):], "\n")
		require.Contains(t, text, "add server api.default.dc1/e3.")
		require.Contains(t, text, "commit ssl cert")
		require.NotContains(t, text, "db.default.dc1")
		require.Equal(t, 1, strings.Count(text, "add server"), "once, not with each try")
		conf, err := os.ReadFile(b.proxy.file)
		require.NoError(t, err)
		require.Equal(t, 2, endpointLines(string(conf)), "the file says what runs")
		require.NotContains(t, string(conf), "up_db")
		b.proxy.mu.Lock()
		b.proxy.reloadErr = nil
		b.proxy.mu.Unlock()
		time.Sleep(time.Minute)
		require.Empty(t, b.m.Status().Err)
		require.NotNil(t, b.m.Status().Running.Find(render.Frontend, "up_db"))
	})
}

// The Go originator listens on the sockets in use alone: another one is not missing.
func TestSocketsToLookFor(t *testing.T) {
	class := render.Class{Go: true, Timeout: 5 * time.Second, Leaf: connect.OwnLeaf, Bundle: connect.OwnBundle}
	table := &render.SlotTable{Class: class, Size: 256, Values: []string{"", "10.0.0.1|1|x"}}
	c := &render.Config{Slots: map[string]*render.SlotTable{class.Name(): table}, Maps: map[string]*render.LiveMap{render.SlotMapFile(class.Name()): {}}}
	id := 0
	table.Each(func(_ string, used int) { id = used })
	require.NotEqual(t, 1, id)
	require.Contains(t, sockets(c), render.SlotSocket(render.Slot{Class: class.Name(), ID: id}))
	require.NotContains(t, sockets(c), render.SlotSocket(render.Slot{Class: class.Name(), ID: 1}))
	table.Values = nil
	require.Len(t, sockets(c), 4, "none is in use")
}
