package haproxy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// sockets lists the sockets to look for: those that every configuration has, and one in the
// directory of each class of slots.
func sockets(c *render.Config) []string {
	out := []string{render.StatsSocket, render.AdminSocket, render.AuthzSocket, render.MasterSocket}
	for class, t := range c.Slots {
		id := 1         // HAProxy's connectors have every socket
		if t.Class.Go { // the Go originator listens on those in use
			id = 0
			t.Each(func(_ string, used int) { id = used })
		}
		if id != 0 {
			out = append(out, render.SlotSocket(render.Slot{Class: class, ID: id}))
		}
	}
	return out
}

// files lists what HAProxy reads when it starts and cannot do without.
func files(c *render.Config) []string {
	out := []string{render.MainFile}
	for name := range c.Leaves {
		out = append(out, name)
	}
	for name := range c.Bundles {
		out = append(out, name)
	}
	return out
}

// missing is the first of these files that is gone, "" if none is.
func (m *Manager) missing(names []string) string {
	for _, name := range names {
		if _, err := os.Lstat(filepath.Join(m.conf.Dir, name)); errors.Is(err, os.ErrNotExist) {
			return name
		}
	}
	return ""
}

// damaged looks for files and sockets that somebody removed: without them a new
// connection of an HTTP upstream, a verdict or a command has nowhere to go.
func (m *Manager) damaged() bool {
	m.damage = m.missing(append(sockets(m.running), files(m.running)...))
	if m.damage != "" {
		m.conf.Log.Warn("somebody removed a part of the run directory; restoring it", "missing", m.damage)
	}
	return m.damage != ""
}

// restore makes the run directory whole again. Lost sockets need another HAProxy:
// nothing can give a listener its path back.
func (m *Manager) restore(ctx context.Context) error {
	const try = "can the run directory be written to? (-run-dir)"
	lost := m.missing(sockets(m.running)) != ""
	if m.conf.Restore != nil {
		if err := m.conf.Restore(); err != nil {
			return stage("restore", try, err)
		}
	}
	if err := m.save(m.running, nil); err != nil {
		return stage("restore", try, err)
	}
	if m.conf.Applied != nil {
		if err := m.conf.Applied(m.running); err != nil {
			return stage("originator", try, err)
		}
	}
	if lost {
		again := m.conf.Proxy.Replace
		if !m.conf.Proxy.Up() { // HAProxy has ended, because of the loss or together with it
			again = m.conf.Proxy.Start
		}
		if err := again(ctx); err != nil {
			return stage("restore", "is a port taken by another process? The message names it", err)
		}
		clear(m.deleting)
		m.reloaded = time.Now()
		m.newWorker()
	}
	m.conf.Log.Info("the run directory is whole again")
	m.damage, m.unsaved = "", false
	m.broken = m.broken && !lost
	m.mu.Lock()
	m.status.Drifts++
	m.mu.Unlock()
	return nil
}
