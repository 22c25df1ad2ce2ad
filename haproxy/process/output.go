package process

import (
	"bufio"
	"bytes"
	"io"
	"strings"
	"sync"
	"time"
)

// read hands on lines of any length, cut to maxLogLine: the child must never block
// on a full pipe.
func (p *Process) read(r io.ReadCloser, do func(string)) {
	defer r.Close()
	br := bufio.NewReaderSize(r, maxLogLine)
	for {
		line, more, err := br.ReadLine()
		if err != nil {
			return
		}
		text := string(line)
		for more && err == nil {
			_, more, err = br.ReadLine()
		}
		do(text)
	}
}

// line takes what HAProxy logs. From 3.0 on the Lua filter's words come here.
func (p *Process) line(s string) {
	if p.refused(s) {
		return
	}
	if p.conf.Line != nil {
		p.conf.Line(s)
	}
}

// alert logs what HAProxy says about itself, and keeps it for an error.
func (p *Process) alert(s string) {
	if s = strings.TrimSpace(s); s == "" {
		return
	}
	p.alerts.add(s)
	if p.refused(s) {
		return
	}
	switch {
	case p.ending.Load(), strings.Contains(s, "Lua filter 'spiffe'"), strings.Contains(s, "Lua filter 'total'"):
		// The Lua filters end a stream by an error: spiffe to refuse an identity, total when an
		// answer takes too long.
		p.conf.Log.Debug("haproxy", "says", clean(s))
	case strings.HasPrefix(s, "[ALERT]") && p.first(pids.ReplaceAllString(s, "")):
		p.conf.Log.Warn("haproxy", "says", clean(s))
	default:
		p.conf.Log.Debug("haproxy", "says", clean(s))
	}
}

// refused recognises the filter's message about a server of a wrong identity.
func (p *Process) refused(s string) bool {
	before, what, ok := strings.Cut(s, "identity refused: ")
	if !ok || strings.Contains(before, "access") {
		return false
	}
	p.refusals.Add(1)
	if p.first(what) {
		p.conf.Log.Warn("an upstream showed a wrong identity", "endpoint", clean(what), "try", "is the registered address really this service's?")
	}
	return true
}

// Refusals counts connections to upstreams that showed a wrong identity.
func (p *Process) Refusals() uint64 { return p.refusals.Load() }

// first reports whether a message may be logged: each at most once a minute.
func (p *Process) first(what string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if last, ok := p.said[what]; ok && now.Sub(last) < time.Minute {
		return false
	}
	if len(p.said) >= 256 {
		clear(p.said)
	}
	p.said[what] = now
	return true
}

// clean keeps a line of a child fit for a log.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}

// ring keeps the last lines.
type ring struct {
	mu    sync.Mutex
	lines []string
}

// Write makes a ring the stderr of a child, for Once.
func (r *ring) Write(b []byte) (int, error) {
	for line := range bytes.Lines(b) {
		r.add(strings.TrimSpace(string(line)))
	}
	return len(b), nil
}

func (r *ring) add(s string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lines = append(r.lines, s); len(r.lines) > 20 {
		r.lines = r.lines[1:]
	}
}

func (r *ring) reset() {
	r.mu.Lock()
	r.lines = nil
	r.mu.Unlock()
}

func (r *ring) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lines) == 0 {
		return "it said nothing"
	}
	return alerts([]byte(strings.Join(r.lines, "\n")))
}
