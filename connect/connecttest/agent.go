// Package connecttest is a Consul agent for tests, as httptest is a server for
// tests: it serves captured answers by path, with Consul's blocking queries.
//
// It may import certs, connect and intentions; only tests use it.
package connecttest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Agent answers requests. Make it with New, and Close it.
type Agent struct {
	srv *httptest.Server

	mu      sync.Mutex
	changed chan struct{}
	answers map[string]*answer
	fail    int
	asked   map[string]int
	cut     time.Duration
	token   string
	header  http.Header
}

type answer struct {
	body  string
	index uint64
}

// New starts an agent without answers: everything is 404.
func New() *Agent {
	a := &Agent{changed: make(chan struct{}), answers: map[string]*answer{}, asked: map[string]int{}}
	a.srv = httptest.NewServer(http.HandlerFunc(a.serve))
	return a
}

// Close ends every blocked query and the server.
func (a *Agent) Close() {
	a.srv.CloseClientConnections()
	a.srv.Close()
}

// Addr is host:port.
func (a *Agent) Addr() string { return strings.TrimPrefix(a.srv.URL, "http://") }

// Set gives a path its answer and wakes the queries that wait for it. The body may
// be anything: also what no agent would ever say.
func (a *Agent) Set(path, body string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	one := a.answers[path]
	if one == nil {
		one = &answer{index: 9}
		a.answers[path] = one
	}
	one.body = body
	one.index++
	a.wake()
}

// Fail makes every request answer this status, until Fail(0).
func (a *Agent) Fail(status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fail = status
	a.wake()
}

// CutAfter closes the connection of every query that has waited for so long without an answer,
// as a load balancer with a time limit does; 0 lets queries wait.
func (a *Agent) CutAfter(d time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cut = d
	a.wake()
}

// Token makes every request with another token fail, until Token("").
func (a *Agent) Token(t string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.token = t
	a.wake()
}

// Header adds a header to every answer.
func (a *Agent) Header(name, value string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.header == nil {
		a.header = http.Header{}
	}
	a.header.Set(name, value)
}

// Asked counts the requests for a path.
func (a *Agent) Asked(path string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[path]
}

// wake wakes the queries that wait. The caller holds a.mu.
func (a *Agent) wake() {
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *Agent) serve(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // or the server does not see that its client has gone
	path := r.URL.Path
	index, _ := strconv.ParseUint(r.URL.Query().Get("index"), 10, 64)
	hash := r.URL.Query().Get("hash")
	a.mu.Lock()
	a.asked[path]++
	deadline := time.After(time.Minute)
	for name, list := range a.header {
		w.Header()[name] = list
	}
	if a.cut > 0 {
		deadline = time.After(a.cut)
	}
	for {
		one, fail, changed, cut := a.answers[path], a.fail, a.changed, a.cut
		if a.token != "" && r.Header.Get("X-Consul-Token") != a.token {
			a.mu.Unlock()
			http.Error(w, "ACL not found", http.StatusForbidden)
			return
		}
		if fail != 0 {
			a.mu.Unlock()
			http.Error(w, "the test says so", fail)
			return
		}
		if one == nil {
			a.mu.Unlock()
			http.Error(w, "unknown service ID", http.StatusNotFound)
			return
		}
		sum := sha256.Sum256([]byte(one.body))
		now := hex.EncodeToString(sum[:8])
		if one.index > index && now != hash {
			body, at := one.body, one.index
			a.mu.Unlock()
			w.Header().Set("X-Consul-Index", fmt.Sprint(at))
			w.Header().Set("X-Consul-ContentHash", now)
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write([]byte(body))
			return
		}
		a.mu.Unlock()
		select {
		case <-changed:
		case <-deadline:
			if cut > 0 {
				if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
					c.Close()
				}
			}
			return
		case <-r.Context().Done():
			return
		}
		a.mu.Lock()
	}
}
