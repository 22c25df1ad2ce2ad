package haproxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// fakeProxy records what it is told; faults are fields.
type fakeProxy struct {
	mu                  sync.Mutex
	up                  bool
	starts, reloads     int
	checkErr, reloadErr error
	commands            []string
	fail                string // commands that contain it are refused
	file                string
	loaded              string // haproxy.cfg at the last start or reload
}

func (f *fakeProxy) Check(context.Context, string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.checkErr
}

func (f *fakeProxy) load() {
	b, _ := os.ReadFile(f.file)
	f.loaded = string(b)
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
	b.m = NewManager(Config{Dir: dir, Renderer: r, Proxy: b.proxy, Generation: func() string { return "g" },
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

// want publishes upstreams by name; the number after ":" is the count of endpoints.
func (b *bed) want(ups ...string) {
	s := &connect.Snapshot{Proxy: connect.Proxy{Service: "www", Datacenter: "dc1", TrustDomain: b.ca.TrustDomain}, Leaf: b.leaf, Roots: b.roots, Policy: &intentions.Policy{}}
	for i, spec := range ups {
		name, n, _ := strings.Cut(spec, ":")
		u := &connect.Upstream{Name: name, Protocol: connect.HTTP, ConnectTimeout: time.Second, IdleTimeout: time.Minute,
			Listen: connect.Listener{SocketPath: fmt.Sprintf("/tmp/hcm-%d.sock", i), SocketMode: "600"}, Target: connect.Target{Name: name + ".default.dc1", IDs: []certs.SPIFFEID{b.ca.ID(name)}}}
		for j := range len(n) {
			u.Target.Endpoints = append(u.Target.Endpoints, connect.Endpoint{Name: "e" + n[j:j+1], Address: "10.0.0.1", Port: 20000 + int(n[j]), Weight: 1})
		}
		s.Upstreams = append(s.Upstreams, u)
	}
	b.m.Want(s)
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
		disk, err := os.ReadFile(filepath.Join(filepath.Dir(b.proxy.file), render.LeafFile))
		require.NoError(t, err)
		require.Equal(t, string(b.leaf.PEM()), string(disk))
	})
}
