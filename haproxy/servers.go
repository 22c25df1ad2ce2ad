package haproxy

import (
	"context"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// deleteServers removes servers whose last session has ended.
func (m *Manager) deleteServers(ctx context.Context) {
	if len(m.deleting) == 0 || !m.conf.Proxy.Up() {
		return
	}
	for full, since := range m.deleting {
		// The server drains first: maintenance closes idle connections, and a request that has
		// just picked one of them would be lost.
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

// drifted compares what HAProxy has with what it should have: servers, entries of maps,
// leaf certificates. Where it does not answer there is nothing to compare.
func (m *Manager) drifted(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, command)
	defer cancel()
	out, err := m.conf.Proxy.Do(ctx, "show servers state", nil)
	if err != nil {
		return false
	}
	missing, extra := m.otherServers(runtimeapi.ParseServers(out))
	entries := m.otherEntries(ctx)
	leaf := m.otherLeaf(ctx)
	if missing+extra+entries == 0 && leaf == "" {
		return false
	}
	m.conf.Log.Warn("HAProxy is not in the state it was left in; repairing", "missing", missing, "unknown", extra, "map_entries", entries, "other_leaf", leaf)
	m.broken = true
	m.mu.Lock()
	m.status.Drifts++
	m.mu.Unlock()
	return true
}

// otherServers counts the servers that HAProxy lacks, and those in our backends that it should
// not have.
func (m *Manager) otherServers(have map[string]bool) (missing, extra int) {
	ours := map[string]bool{}
	for _, s := range m.running.Sections {
		if len(s.Servers) == 0 {
			continue
		}
		ours[s.Name] = true
		for i := range s.Servers {
			full := s.Name + "/" + s.Servers[i].Name
			if !have[full] {
				missing++
			}
			delete(have, full)
		}
	}
	for full := range have {
		if backend, _, _ := strings.Cut(full, "/"); ours[backend] && m.deleting[full].IsZero() {
			extra++
		}
	}
	return missing, extra
}

// otherEntries counts the map entries that HAProxy lacks or has with another value.
func (m *Manager) otherEntries(ctx context.Context) (other int) {
	for name, live := range m.running.Maps {
		if !live.Read {
			continue
		}
		out, err := m.conf.Proxy.Do(ctx, "show map "+m.running.Dir+"/"+name, nil)
		if err != nil {
			continue
		}
		have := runtimeapi.ParseMap(out)
		for _, e := range live.Entries {
			if have[e.Key] != e.Value {
				other++
			}
		}
	}
	return other
}

// otherLeaf returns the serial number of a leaf that HAProxy uses in place of the one it
// should, "" if there is none.
func (m *Manager) otherLeaf(ctx context.Context) string {
	for name, leaf := range m.running.Leaves {
		out, err := m.conf.Proxy.Do(ctx, "show ssl cert "+m.running.Dir+"/"+name, nil)
		if err != nil {
			continue
		}
		if serial := runtimeapi.ParseCertificate(out); serial != "" && serial != leaf.Serial {
			return serial
		}
	}
	return ""
}
