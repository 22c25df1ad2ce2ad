package spoe

import (
	"strings"

	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// report calls Options.Denied for the first deny of each source and rule in a generation.
func (a *Agent) report(e *epoch, source string, d intentions.Decision) {
	if a.opt.Denied == nil {
		return
	}
	key := e.generation + " " + d.Rule + " " + source
	a.mu.Lock()
	first := !a.reported[key] && len(a.reported) < maxReported
	if first {
		a.reported[key] = true
	}
	a.mu.Unlock()
	if first {
		a.opt.Denied(source, d)
	}
}

// sentence keeps a reason, which quotes Consul, fit for a log line and a header.
func sentence(s string) string {
	words := strings.FieldsFunc(s, func(r rune) bool { return r == ' ' })
	for i := range words {
		words[i] = printable(words[i])
	}
	s = strings.Join(words, " ")
	return s[:min(len(s), 400)]
}

// printable makes one word that comes from Consul or a caller fit for a log line and a header.
func printable(s string) string {
	clean := func(r rune) rune {
		if r <= ' ' || r > '~' || r == '"' || r == '\\' {
			return '?'
		}
		return r
	}
	if len(s) > 200 {
		s = s[:200]
	}
	return strings.Map(clean, s)
}
