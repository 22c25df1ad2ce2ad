package haproxy

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// fakeServers answers `show stat` and takes weights.
type fakeServers struct {
	mu         sync.Mutex
	names      []string
	good, bad  map[string]int
	weight     map[string]int
	connecting int // commands that would make a connection
}

func newFakeServers(n int) *fakeServers {
	f := &fakeServers{good: map[string]int{}, bad: map[string]int{}, weight: map[string]int{}}
	for i := range n {
		name := fmt.Sprintf("e%d", i)
		f.names = append(f.names, name)
		f.weight[name] = 5
	}
	return f
}

// change does something to the servers between two rounds.
func (f *fakeServers) change(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

func (f *fakeServers) now(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.weight[name]
}

func (f *fakeServers) do(_ context.Context, c string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if strings.HasPrefix(c, "show stat") {
		out := "# pxname,svname,weight,mode,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,wretr,eresp,econ\n"
		for _, n := range f.names {
			out += fmt.Sprintf("api,%s,%d,http,0,%d,0,0,%d,0,0,0\n", n, f.weight[n], f.good[n], f.bad[n])
		}
		return out, nil
	}
	var full string
	var weight int
	if _, err := fmt.Sscanf(c, "set server %s weight %d", &full, &weight); err != nil {
		f.connecting++
		return "", nil
	}
	f.weight[strings.TrimPrefix(full, "api/")] = weight
	return "", nil
}

func (f *fakeServers) out() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.weight {
		if w == 0 {
			n++
		}
	}
	return n
}

func ejector(f *fakeServers, p connect.PassiveHealth) *Ejector {
	sec := &render.Section{Kind: render.Backend, Name: "api", Passive: &p}
	for _, n := range f.names {
		sec.Servers = append(sec.Servers, render.Server{Name: n, Weight: 5})
	}
	conf := &render.Config{Sections: []*render.Section{sec}}
	return &Ejector{Do: f.do, Running: func() *render.Config { return conf }, Log: slog.New(slog.DiscardHandler)}
}

func run(t *testing.T, e *Ejector) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); e.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	time.Sleep(ejectEvery / 2) // what follows falls between two rounds
}

func percent(n int) *int { return &n }

func TestEjection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeServers(3)
		e := ejector(f, connect.PassiveHealth{Interval: 10 * time.Second, MaxFailures: 3, BaseEjection: 30 * time.Second, MaxEjected: percent(100), Enforced: 100})
		run(t, e)
		f.change(func() { f.bad["e0"] = 2 })
		time.Sleep(time.Second)
		require.Zero(t, f.out(), "two failures are not three")
		f.change(func() { f.good["e0"]++ })
		time.Sleep(time.Second)
		f.change(func() { f.bad["e0"] += 2 })
		time.Sleep(time.Second)
		require.Zero(t, f.out(), "a success between")
		f.change(func() { f.bad["e0"]++ })
		time.Sleep(time.Second)
		require.Equal(t, 0, f.now("e0"))
		list, total := e.List()
		require.Len(t, list, 1)
		require.Equal(t, uint64(1), total)
		// The endpoint stays out although something else gives it its weight back, and returns
		// when its time is over.
		f.change(func() { f.weight["e0"] = 5 })
		time.Sleep(time.Second)
		require.Equal(t, 0, f.now("e0"))
		time.Sleep(27 * time.Second)
		require.Equal(t, 0, f.now("e0"))
		time.Sleep(3 * time.Second)
		require.Equal(t, 5, f.now("e0"))
		// The second time is longer.
		f.change(func() { f.bad["e0"] += 3 })
		time.Sleep(31 * time.Second)
		require.Equal(t, 0, f.now("e0"))
		time.Sleep(31 * time.Second)
		require.Equal(t, 5, f.now("e0"))
		// And it is forgotten after a while without trouble.
		time.Sleep(2 * time.Minute)
		f.change(func() { f.bad["e0"] += 3 })
		time.Sleep(31 * time.Second)
		require.Equal(t, 5, f.now("e0"))
		// Never everything.
		f.change(func() {
			for _, n := range f.names {
				f.bad[n] += 10
			}
		})
		time.Sleep(time.Second)
		require.Equal(t, 2, f.out())
		f.change(func() { require.Zero(t, f.connecting) })
	})
}

func TestEjectionIsBounded(t *testing.T) {
	for _, c := range []struct {
		n    int
		most *int
		want int
	}{{1, nil, 0}, {2, nil, 1}, {3, nil, 1}, {25, nil, 2}, {3, percent(100), 2}, {4, percent(50), 2}, {9, percent(10), 0}, {10, percent(10), 1}, {5, percent(0), 0}} {
		require.Equal(t, c.want, allowed(&connect.PassiveHealth{MaxEjected: c.most}, c.n), "%+v", c)
	}
}

// A reload begins at zero, and a version may count an answer that never came twice.
func TestCounters(t *testing.T) {
	row := func(good, bad, eresp int) map[string]string {
		return map[string]string{"mode": "http", "hrsp_2xx": strconv.Itoa(good), "hrsp_5xx": strconv.Itoa(bad), "eresp": strconv.Itoa(eresp)}
	}
	p := &connect.PassiveHealth{Interval: time.Hour}
	o := &outlier{}
	o.count(row(10, 0, 0), false, p, time.Now())
	o.count(row(10, 3, 0), false, p, time.Now())
	require.Equal(t, 3, o.failures)
	o.count(row(0, 2, 0), false, p, time.Now())
	require.Equal(t, 5, o.failures, "after a reload")
	o.count(row(1, 2, 0), false, p, time.Now())
	require.Zero(t, o.failures)
	o.count(row(1, 2, 4), true, p, time.Now())
	require.Equal(t, 2, o.failures)
	tcp := &outlier{}
	tcp.count(map[string]string{"mode": "tcp", "bout": "0", "econ": "2"}, true, p, time.Now())
	require.Equal(t, 2, tcp.failures)
	tcp.count(map[string]string{"mode": "tcp", "bout": "9", "econ": "2"}, true, p, time.Now())
	require.Zero(t, tcp.failures)
}
