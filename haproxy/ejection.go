package haproxy

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// Ejector takes endpoints that fail in practice out of rotation and gives them back. It reads
// HAProxy's own counters, so that no endpoint gets a connection that the application did not
// ask for. It is Envoy's outlier detection by consecutive failures, for upstreams that ask for
// it (passive_health_check): each further ejection lasts longer, at most a share of the
// endpoints is ejected at once, and one always stays.
type Ejector struct {
	Do      Runner                // on the current worker
	Running func() *render.Config // what HAProxy runs, nil before it does
	Twice   bool                  // the version (3.0+) counts each missing answer as two errors
	Log     *slog.Logger

	servers map[string]*outlier // by backend/server; only Run's goroutine touches it
	out     atomic.Pointer[[]Ejected]
	total   atomic.Uint64
}

// Times of ejections.
const (
	ejectEvery  = 500 * time.Millisecond // counters are read
	maxEjection = 5 * time.Minute        // Envoy's max_ejection_time, unless the base is longer
)

// outlier is what is known of one server.
type outlier struct {
	good, bad uint64    // counters as last read
	failures  int       // since the last good answer
	times     int       // ejections that are remembered
	until     time.Time // zero: not ejected
	seen      time.Time // start of the interval after which one ejection is forgotten
	alive     bool      // found in the last round
}

// Ejected is one endpoint that is out of rotation.
type Ejected struct {
	Server string // backend/server
	Until  time.Time
}

// List returns the endpoints that are out of rotation, sorted by name, and how many ejections
// there have been in all.
func (e *Ejector) List() (out []Ejected, total uint64) {
	if list := e.out.Load(); list != nil {
		out = *list
	}
	return out, e.total.Load()
}

func (e *Ejector) publish() {
	var out []Ejected
	for name, o := range e.servers {
		if !o.until.IsZero() {
			out = append(out, Ejected{name, o.until})
		}
	}
	slices.SortFunc(out, func(a, b Ejected) int { return strings.Compare(a.Server, b.Server) })
	e.out.Store(&out)
}

// Run works until ctx ends.
func (e *Ejector) Run(ctx context.Context) {
	t := time.NewTicker(ejectEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			e.round(ctx)
		}
	}
}

// round looks at every backend that asks for ejection.
func (e *Ejector) round(ctx context.Context) {
	running := e.Running()
	if running == nil {
		return
	}
	defer e.publish()
	for _, o := range e.servers {
		o.alive = false
	}
	for _, sec := range running.Sections {
		if sec.Passive != nil && len(sec.Servers) > 0 {
			e.backend(ctx, sec)
		}
	}
	for name, o := range e.servers {
		if !o.alive {
			delete(e.servers, name)
		}
	}
}

// backend reads the counters of one backend, and ejects and gives back. Without an answer
// of HAProxy everything stays.
func (e *Ejector) backend(ctx context.Context, sec *render.Section) {
	ctx, cancel := context.WithTimeout(ctx, command)
	defer cancel()
	name := sec.Name
	text, err := e.Do(ctx, "show stat "+name+" 4 -1")
	rows, perr := runtimeapi.ParseStats(text)
	if err != nil || perr != nil {
		for i := range sec.Servers {
			if o := e.servers[name+"/"+sec.Servers[i].Name]; o != nil {
				o.alive = true
			}
		}
		return
	}
	weights := map[string]string{}
	out := 0
	now := time.Now()
	for _, row := range rows {
		i := slices.IndexFunc(sec.Servers, func(s render.Server) bool { return s.Name == row["svname"] })
		if i < 0 {
			continue // it is being removed
		}
		full := name + "/" + row["svname"]
		weights[full] = row["weight"]
		o := e.server(full, now)
		o.count(row, e.Twice, sec.Passive, now)
		if !o.until.IsZero() {
			out++
		}
	}
	for i := range sec.Servers {
		s := &sec.Servers[i]
		full := name + "/" + s.Name
		o := e.servers[full]
		weight, known := weights[full]
		switch {
		case o == nil || !known:
		case !o.until.IsZero() && now.After(o.until):
			if e.set(ctx, full, s.Weight) {
				o.until, o.failures, o.seen = time.Time{}, 0, now
				out--
				e.Log.Info("an endpoint is called again after its ejection", "server", full)
			}
		case !o.until.IsZero():
			if weight != "0" { // a reload, or a new weight in Consul, has given it back
				e.set(ctx, full, 0)
			}
		case o.failures >= sec.Passive.MaxFailures:
			o.failures = 0
			if out >= allowed(sec.Passive, len(sec.Servers)) || rand.IntN(100) >= sec.Passive.Enforced || !e.set(ctx, full, 0) {
				continue
			}
			out++
			o.times++
			e.total.Add(1)
			wait := min(sec.Passive.BaseEjection*time.Duration(o.times), max(maxEjection, sec.Passive.BaseEjection))
			o.until, o.seen = now.Add(wait), now
			e.Log.Warn("an endpoint fails and is not called for a while", "server", full, "failures", sec.Passive.MaxFailures, "for", wait,
				"try", "look at this instance: its application, or the sidecar before it")
		}
	}
}

// allowed is how many of n endpoints may be out at once. One always stays. Where no share
// is set, Consul documents 10 % and one at least; a share that is set counts as it is, as
// with Envoy 1.31 and later: 10 % of nine endpoints are none.
func allowed(p *connect.PassiveHealth, n int) int {
	most := max(n/10, 1)
	if p.MaxEjected != nil {
		most = n * *p.MaxEjected / 100
	}
	return min(most, n-1)
}

func (e *Ejector) server(full string, now time.Time) *outlier {
	o := e.servers[full]
	if o == nil {
		o = &outlier{seen: now}
		if e.servers == nil {
			e.servers = map[string]*outlier{}
		}
		e.servers[full] = o
	}
	o.alive = true
	return o
}

// count takes a row of `show stat`. Only differences count: a reload begins at zero.
func (o *outlier) count(row map[string]string, twice bool, p *connect.PassiveHealth, now time.Time) {
	n := func(name string) uint64 {
		v, _ := strconv.ParseUint(row[name], 10, 64) // empty for what the mode does not count
		return v
	}
	unanswered := n("eresp")
	if twice {
		unanswered /= 2
	}
	good, bad := n("hrsp_1xx")+n("hrsp_2xx")+n("hrsp_3xx")+n("hrsp_4xx"), n("hrsp_5xx")+max(n("wretr"), unanswered+n("econ"))
	if row["mode"] == "tcp" || row["hrsp_2xx"] == "" {
		good, bad = n("bout"), max(n("wretr"), n("econ")) // bytes of the endpoint are its success
	}
	if good < o.good || bad < o.bad {
		o.good, o.bad = 0, 0
	}
	switch {
	case good > o.good:
		o.failures = 0
	case bad > o.bad:
		o.failures += int(bad - o.bad)
	}
	if o.until.IsZero() && o.times > 0 && now.Sub(o.seen) >= p.Interval {
		o.times, o.seen = o.times-1, now
	}
	o.good, o.bad = good, bad
}

func (e *Ejector) set(ctx context.Context, full string, weight int) bool {
	out, err := e.Do(ctx, fmt.Sprintf("set server %s weight %d", full, weight))
	return err == nil && strings.TrimSpace(out) == ""
}
