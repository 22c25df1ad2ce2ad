package haproxy

import (
	"context"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// deleteServers removes servers whose last session has ended.
func (m *Manager) deleteServers(ctx context.Context) {
	if len(m.deleting) == 0 || !m.conf.Proxy.Up() {
		return
	}
	for full, since := range m.deleting {
		// First only drained: maintenance closes idle connections, and one that a
		// request has just picked would be lost with it.
		if time.Since(since) < drainFor {
			continue
		}
		if err := m.do(ctx, "set server "+full+" state maint", nil, ""); err != nil && !strings.Contains(err.Error(), "No such") {
			continue
		}
		err := m.do(ctx, "del server "+full, nil, "Server deleted")
		if err == nil || strings.Contains(err.Error(), "No such") { // the second: HAProxy was restarted meanwhile
			delete(m.deleting, full)
		}
	}
	m.mu.Lock()
	m.status.Deleting = len(m.deleting)
	m.mu.Unlock()
}

// drifted compares the servers HAProxy has with those it should have.
func (m *Manager) drifted(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, command)
	defer cancel()
	out, err := m.conf.Proxy.Do(ctx, "show servers state", nil)
	if err != nil {
		return false
	}
	have := map[string]bool{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 8 || f[0] == "#" {
			continue
		}
		have[f[1]+"/"+f[3]] = true
	}
	missing, extra := 0, 0
	for _, s := range m.running.Sections {
		backend := strings.TrimPrefix(s.Name, "backend ")
		for i := range s.Servers {
			full := backend + "/" + s.Servers[i].Name
			if !have[full] {
				missing++
			}
			delete(have, full)
		}
	}
	for full := range have {
		backend, _, _ := strings.Cut(full, "/")
		if sec := m.running.Find("backend " + backend); sec != nil && len(sec.Servers) > 0 && m.deleting[full].IsZero() {
			extra++
		}
	}
	leaf := ""
	if out, err := m.conf.Proxy.Do(ctx, "show ssl cert "+m.running.Dir+"/"+render.LeafFile, nil); err == nil {
		for line := range strings.Lines(out) {
			if serial, ok := strings.CutPrefix(strings.TrimSpace(line), "Serial: "); ok && serial != m.running.Leaf.Serial {
				leaf = serial
			}
		}
	}
	if missing+extra == 0 && leaf == "" {
		return false
	}
	m.conf.Log.Warn("HAProxy is not in the state it was left in; repairing", "missing", missing, "unknown", extra, "other_leaf", leaf)
	m.broken = true
	m.mu.Lock()
	m.status.Drifts++
	m.mu.Unlock()
	return true
}
