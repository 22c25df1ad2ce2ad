package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/haproxy-connect/haproxy-connect/haproxy"
	"github.com/haproxy-connect/haproxy-connect/intentions"
	"github.com/haproxy-connect/haproxy-connect/intentions/spoe"
)

// maxCallers bounds the label values of authorizations_total: callers beyond it
// are counted together.
const maxCallers = 500

// metrics collects our own metrics; HAProxy's exporter adds its own to the same scrape.
type metrics struct {
	side     *sidecar
	registry *prometheus.Registry
	authz    *prometheus.CounterVec

	mu      sync.Mutex
	callers map[string]*seen

	reloads, applyErrors, ignored, leafLeft, leafEnd, age, commands, drifts, restarts, endpoints, held, watchErrors, ready, refused, revoked, revokePending, revokeErrors, ejected, ejections, oldWorkers, draining, jwksKeys, jwksErrors *prometheus.Desc
}

func newMetrics(s *sidecar) *metrics {
	const ns = "haproxy_connect_"
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(ns+name, help, labels, nil)
	}
	m := &metrics{
		side: s, registry: prometheus.NewRegistry(), callers: map[string]*seen{},
		authz: prometheus.NewCounterVec(prometheus.CounterOpts{Name: ns + "authorizations_total",
			Help: "Verdicts by caller's SPIFFE ID, verdict and the rule that decided."}, []string{"source", "verdict", "rule"}),
		reloads:       d("reloads_total", "Reloads of HAProxy by reason.", "reason"),
		applyErrors:   d("apply_errors_total", "Failed attempts to bring HAProxy up to date, by stage.", "stage"),
		ignored:       d("config_ignored", "Settings in Consul that are not honoured, by key; 1 each.", "key"),
		leafLeft:      d("leaf_expiry_seconds", "Seconds until the leaf certificate ends; negative once it has."),
		leafEnd:       d("leaf_not_after_timestamp_seconds", "When the leaf certificate ends, as Unix time."),
		age:           d("snapshot_age_seconds", "Seconds since the mesh last changed for this sidecar."),
		commands:      d("runtime_commands_total", "Changes made to HAProxy without a reload."),
		drifts:        d("drifts_total", "Times HAProxy was found in another state than it was left in."),
		restarts:      d("haproxy_restarts_total", "Times HAProxy ended without being asked to."),
		endpoints:     d("upstream_endpoints", "Endpoints that may be called, by upstream.", "upstream"),
		held:          d("endpoints_held_total", "Times an upstream kept endpoints that all went just after Consul came back."),
		watchErrors:   d("watch_errors_total", "Errors of Consul's agent, by watch.", "watch"),
		revoked:       d("revoked_sessions_total", "Open sessions ended because their caller was denied meanwhile."),
		revokePending: d("revocation_pending", "1 while open sessions wait to be judged by the policy in force."),
		revokeErrors:  d("revocation_errors_total", "Failed attempts to judge all open sessions by the policy in force; each is repeated."),
		ejected:       d("ejected_endpoints", "Endpoints that are not called for a while, as they failed (passive_health_check)."),
		ejections:     d("ejections_total", "Times an endpoint was taken out of rotation, as it failed (passive_health_check)."),
		oldWorkers:    d("old_workers", "Replaced workers of HAProxy that still have sessions."),
		draining:      d("draining_servers", "Endpoints that are gone and still have sessions."),
		refused:       d("identity_refusals_total", "Connections to upstreams that were refused because the server showed a wrong identity."),
		jwksKeys:      d("jwks_keys", "Keys of a jwt-provider that intentions require tokens of.", "provider"),
		jwksErrors:    d("jwks_errors_total", "Failed attempts to read the keys of a jwt-provider.", "provider"),
		ready:         d("ready", "1 when the sidecar is ready."),
	}
	m.registry.MustRegister(m, m.authz, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// authorization returns the counter of one kind of verdict; the agent asks for it once per verdict and policy generation.
func (m *metrics) authorization(source string, d intentions.Decision) spoe.Counter {
	verdict := spoe.Deny
	switch {
	case d.PerRequest:
		verdict = spoe.Ask
	case d.Allow:
		verdict = spoe.Allow
	}
	who := m.caller(source)
	if who.other {
		source = "others"
	}
	prom := m.authz.WithLabelValues(source, verdict, d.Rule)
	switch verdict {
	case spoe.Deny:
		return &tally{prom, &who.denied}
	case spoe.Allow:
		return &tally{prom, &who.allowed}
	}
	return prom // the status page counts the verdict on each request that follows instead
}

// seen counts the verdicts on one caller and keeps its last deny.
type seen struct {
	source          string
	other           bool // stands for callers beyond maxCallers
	allowed, denied atomic.Uint64
	last            atomic.Pointer[intentions.Decision] // the last deny
}

// tally counts for Prometheus and for the status page.
type tally struct {
	prom prometheus.Counter
	n    *atomic.Uint64
}

func (t *tally) Inc() {
	t.prom.Inc()
	t.n.Add(1)
}

func (m *metrics) caller(source string) *seen {
	m.mu.Lock()
	defer m.mu.Unlock()
	who := m.callers[source]
	if who == nil && len(m.callers) >= maxCallers {
		source = "others"
		who = m.callers[source]
	}
	if who == nil {
		who = &seen{source: source, other: source == "others"}
		m.callers[source] = who
	}
	return who
}

// denied keeps why a caller was denied.
func (m *metrics) denied(source string, d intentions.Decision) { m.caller(source).last.Store(&d) }

// list is every caller, sorted by name.
func (m *metrics) list() (out []statusCaller) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, who := range m.callers {
		one := statusCaller{Source: who.source, Allowed: who.allowed.Load(), Denied: who.denied.Load()}
		if d := who.last.Load(); d != nil {
			one.Rule, one.Reason = d.Rule, d.Reason
		}
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b statusCaller) int { return strings.Compare(a.Source, b.Source) })
	return out
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.reloads, m.applyErrors, m.ignored, m.leafLeft, m.leafEnd, m.age, m.commands, m.drifts, m.restarts, m.endpoints, m.held, m.watchErrors, m.ready, m.refused, m.revoked, m.revokePending, m.revokeErrors, m.ejected, m.ejections, m.oldWorkers, m.draining, m.jwksKeys, m.jwksErrors} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	s := m.side
	ready := 0.0
	if len(s.reasons()) == 0 {
		ready = 1
	}
	gauge(m.ready, ready)
	r := s.running.Load()
	if r == nil {
		counter(m.restarts, 0)
		return
	}
	counter(m.restarts, r.restarts.Load())
	counter(m.refused, r.proc.Refusals())
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	gauge(m.oldWorkers, float64(r.oldWorkers(ctx)))
	counter(m.revoked, r.revoke.ended.Load())
	counter(m.revokeErrors, r.revoke.errors.Load())
	pending := 0.0
	if r.revoke.pending.Load() {
		pending = 1
	}
	gauge(m.revokePending, pending)
	out, ejections := r.ejector.List()
	gauge(m.ejected, float64(len(out)))
	counter(m.ejections, ejections)
	gauge(m.draining, float64(r.manager.Status().Deleting))
	st := r.manager.Status()
	for _, reason := range haproxy.Reasons { // a reason that has not occurred is shown as 0: a rate needs a first value
		counter(m.reloads, st.Reloads[reason], string(reason))
	}
	for _, stage := range haproxy.Stages {
		counter(m.applyErrors, st.Errors[stage], stage)
	}
	counter(m.commands, st.Commands)
	counter(m.drifts, st.Drifts)
	watches := map[string]uint64{} // summed by name: two watches may ask about the same thing in two ways
	for _, f := range r.source.Feeds() {
		watches[f.Name] += f.Errors
	}
	for name, errors := range watches {
		counter(m.watchErrors, errors, name)
	}
	counter(m.held, r.source.Held())
	for _, p := range r.tokens.Status() {
		gauge(m.jwksKeys, float64(p.Keys), label(p.Provider))
		counter(m.jwksErrors, p.Errors, label(p.Provider))
	}
	snap := s.newest.Load()
	if snap == nil {
		return
	}
	if leaf := snap.Leaf(); leaf != nil {
		gauge(m.leafLeft, time.Until(leaf.NotAfter).Seconds())
		gauge(m.leafEnd, float64(leaf.NotAfter.Unix()))
	}
	gauge(m.age, time.Since(time.Unix(0, s.heard.Load())).Seconds())
	seen := map[string]bool{}
	for _, n := range snap.Notices {
		if !seen[n.Key] && len(seen) < 100 {
			seen[n.Key] = true
			gauge(m.ignored, 1, label(n.Key))
		}
	}
	for _, l := range snap.Upstreams() {
		gauge(m.endpoints, float64(snap.Endpoints(l)), l.Name)
	}
}

// label bounds a label value that came from Consul.
func label(s string) string { return plain(s, 100) }

// plain makes text from outside fit for a terminal: printable ASCII only, cut to most bytes.
func plain(s string, most int) string {
	b := []byte(s[:min(len(s), most)])
	for i := range b {
		if b[i] < ' ' || b[i] > '~' {
			b[i] = '?'
		}
	}
	return string(b)
}

// serveMetrics writes our metrics, then HAProxy's: their names never collide.
func (s *sidecar) serveMetrics(w http.ResponseWriter, r *http.Request) {
	plain := r.Clone(r.Context())
	plain.Header.Set("Accept", "text/plain;version=0.0.4")
	promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{DisableCompression: true}).ServeHTTP(w, plain)
	run := s.running.Load()
	if run == nil {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://haproxy/metrics?"+r.URL.RawQuery, nil)
	if err != nil {
		return
	}
	t := run.transport()
	defer t.CloseIdleConnections()
	res, err := t.RoundTrip(req)
	if err != nil {
		fmt.Fprintln(w, "# HAProxy does not answer")
		return
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusOK {
		_, _ = io.Copy(w, res.Body)
	}
}
