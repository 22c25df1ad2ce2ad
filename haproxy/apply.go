package haproxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// ahead applies, before a reload, what needs none: policies, endpoints and the leaf wait
// neither for the structure to be still nor for a reload that fails.
func (m *Manager) ahead(ctx context.Context, snap *connect.Snapshot, want *render.Config) error {
	if m.running == nil || m.broken || !m.conf.Proxy.Up() {
		return nil
	}
	if !m.conf.Can.CACommit && m.running.Roots.Fingerprint != want.Roots.Fingerprint {
		now := *snap
		now.Roots = m.running.Roots // what is verified meanwhile is verified by these
		var err error
		if want, _, err = m.conf.Renderer.Render(&now, m.conf.Generation(), m.running); err != nil {
			return stage("render", "correct what the message names in Consul", err)
		}
	}
	part := render.Merge(m.running, want)
	plan := NewPlan(m.running, part, m.conf.Can)
	if plan.Reload != "" || plan.Empty() {
		return nil
	}
	return m.live(ctx, part, m.served, plan)
}

// lineOf finds the line that HAProxy names when it refuses a configuration.
var lineOf = regexp.MustCompile(`candidate\.cfg:(\d+)\]`)

// exclude leaves out, from now on and as it is, the upstream whose line HAProxy refuses:
// the others must not suffer for it.
func (m *Manager) exclude(list []*connect.Upstream, want *render.Config, err error) bool {
	var se *stageError
	if !errors.As(err, &se) || se.stage != "check" {
		return false
	}
	for _, found := range lineOf.FindAllStringSubmatch(err.Error(), -1) {
		line, _ := strconv.Atoi(found[1]) // digits
		name := want.UpstreamAt(line)
		for _, u := range list {
			if name != "" && u.Name == name {
				m.excluded[u] = fmt.Errorf("HAProxy refuses its configuration: %w", se.err)
				return true
			}
		}
	}
	return false
}

// without is a list of upstreams without those that were refused.
func without(list []*connect.Upstream, refused []*render.Refused) []*connect.Upstream {
	if len(refused) == 0 {
		return list
	}
	gone := map[string]bool{}
	for _, r := range refused {
		gone[r.Upstream] = true
	}
	return slices.DeleteFunc(slices.Clone(list), func(u *connect.Upstream) bool { return gone[u.Name] })
}

func (m *Manager) done(want *render.Config, now served) {
	m.running, m.served = want, now
	m.mu.Lock()
	m.status.Ready, m.status.Running = true, want
	m.status.Deleting = len(m.deleting)
	m.mu.Unlock()
}

// write puts the files of a configuration in place, all but haproxy.cfg itself.
func (m *Manager) write(c *render.Config, old *render.Config) error {
	path := func(name string) string { return filepath.Join(m.conf.Dir, name) }
	for class := range c.Slots {
		if err := m.conf.SocketDir(filepath.Join(m.conf.Dir, "sock", class)); err != nil {
			return err
		}
	}
	for name, text := range c.Files {
		if old != nil && old.Files[name] == text {
			continue
		}
		if err := certs.WriteTo(path(name), strings.NewReader(text), 0o600); err != nil {
			return err
		}
	}
	if old == nil || old.Roots.Fingerprint != c.Roots.Fingerprint {
		if err := certs.WriteFile(path(render.RootsFile), []byte(c.Roots.PEM), 0o600); err != nil {
			return err
		}
	}
	if old == nil || old.Leaf.Fingerprint != c.Leaf.Fingerprint {
		return certs.WriteFile(path(render.LeafFile), c.Leaf.PEM(), 0o600)
	}
	return nil
}

const tryDisk = "is the run directory writable and the disk not full? (-run-dir)"

// reload writes everything, lets HAProxy check it, and switches over.
func (m *Manager) reload(ctx context.Context, want *render.Config, plan Plan) (err error) {
	begun := time.Now()
	if err := m.write(want, nil); err != nil {
		return stage("write", tryDisk, err)
	}
	main := filepath.Join(m.conf.Dir, render.MainFile)
	defer func() {
		// What could not be switched to must not be what a restart would read.
		if err != nil && m.running != nil && !m.broken {
			err = errors.Join(err, m.save(m.running, nil))
		}
	}()
	candidate := filepath.Join(m.conf.Dir, "candidate.cfg")
	if err := certs.WriteTo(candidate, want, 0o600); err != nil {
		return stage("write", tryDisk, err)
	}
	if err := m.conf.Proxy.Check(ctx, candidate); err != nil {
		return stage("check", "read "+candidate+" at the line it names", err)
	}
	if err := os.Rename(candidate, main); err != nil {
		return stage("write", tryDisk, err)
	}
	if m.conf.Applied != nil {
		if err := m.conf.Applied(want); err != nil {
			return stage("originator", "is the run directory writable?", err)
		}
	}
	if !m.conf.Proxy.Up() {
		err = m.conf.Proxy.Start(ctx)
	} else {
		err = m.conf.Proxy.Reload(ctx)
	}
	if err != nil {
		return stage("reload", "is a port taken by another process? The message names it", err)
	}
	m.broken, m.unsaved = false, false
	m.reloaded = time.Now()
	clear(m.deleting)
	m.conf.Log.Info("HAProxy runs a new configuration", "reason", plan.Reload, "detail", plan.Detail, "took", time.Since(begun).Round(time.Millisecond))
	m.mu.Lock()
	m.status.Reloads[plan.Reload]++
	m.status.LastReload = string(plan.Reload) + ": " + plan.Detail
	m.mu.Unlock()
	m.newWorker()
	return nil
}

// newWorker tells that another worker serves now.
func (m *Manager) newWorker() {
	if m.conf.Reloaded != nil {
		m.conf.Reloaded()
	}
}

// save puts all files of a configuration in place; old, if any, is what they have.
func (m *Manager) save(c, old *render.Config) error {
	if err := m.write(c, old); err != nil {
		return err
	}
	return certs.WriteTo(filepath.Join(m.conf.Dir, render.MainFile), c, 0o600)
}

// live changes HAProxy while it runs, and the files with it. A disk that is full does
// not keep an endpoint or a leaf from HAProxy: the files follow when they can.
func (m *Manager) live(ctx context.Context, want *render.Config, now served, plan Plan) error {
	old := m.running
	if m.unsaved {
		old = nil
	}
	saved := stage("write", tryDisk, m.save(want, old))
	m.unsaved = saved != nil
	if m.conf.Applied != nil {
		if err := m.conf.Applied(want); err != nil {
			m.broken = true
			return stage("originator", "is the run directory writable?", err)
		}
	}
	for _, c := range plan.Commands {
		if err := m.command(ctx, c, want); err != nil {
			m.broken = true
			return stage("command", "nothing: a reload follows by itself", err)
		}
	}
	m.mu.Lock()
	m.status.Commands += uint64(len(plan.Commands))
	m.mu.Unlock()
	m.conf.Log.Debug("changed without a reload", "commands", len(plan.Commands))
	m.done(want, now)
	return saved
}

func (m *Manager) do(ctx context.Context, text string, payload []byte, want string) error {
	ctx, cancel := context.WithTimeout(ctx, command)
	defer cancel()
	out, err := m.conf.Proxy.Do(ctx, text, payload)
	if err != nil {
		return err
	}
	if want == "" && strings.TrimSpace(out) != "" || !strings.Contains(out, want) {
		return fmt.Errorf("%.120q answered %.200q", text, out)
	}
	return nil
}

func (m *Manager) command(ctx context.Context, c Command, want *render.Config) error {
	switch c.Kind {
	case Add:
		if _, draining := m.deleting[c.Server]; draining {
			// It is still there, draining: take it back. Its name stands for the
			// same address and options.
			delete(m.deleting, c.Server)
			if err := m.do(ctx, weight(c.Server, &c.Set).Text, nil, ""); err != nil {
				return err
			}
			if err := m.do(ctx, maxConn(c.Server, &c.Set).Text, nil, ""); err != nil {
				return err
			}
			return m.do(ctx, "set server "+c.Server+" state ready", nil, "")
		}
		if err := m.do(ctx, c.Text, nil, c.Want); err != nil {
			return err
		}
		return m.do(ctx, "enable server "+c.Server, nil, "")
	case Remove:
		if err := m.do(ctx, c.Text, nil, c.Want); err != nil {
			return err
		}
		if c.Server != "" {
			m.deleting[c.Server] = time.Now()
		}
		return nil
	case Cert:
		return m.swap(ctx, "cert", want.Dir+"/"+render.LeafFile, c)
	case CA:
		return m.swap(ctx, "ca-file", want.Dir+"/"+render.RootsFile, c)
	}
	return m.do(ctx, c.Text, c.Payload, c.Want)
}

// swap replaces a certificate file in memory and proves that it is in use: some
// versions say "Success!" and change nothing (haproxy/haproxy#3165).
func (m *Manager) swap(ctx context.Context, kind, file string, c Command) error {
	// One payload is limited to 16 KiB (tune.bufsize).
	if len(c.Payload) > 15000 {
		return errors.New("too large for a command")
	}
	err := m.do(ctx, c.Text, c.Payload, "ransaction")
	if err == nil {
		err = m.do(ctx, "commit ssl "+kind+" "+file, nil, "Success!")
	}
	if err == nil {
		err = m.do(ctx, "show ssl "+kind+" "+file, nil, "Status: Used")
	}
	if err != nil {
		_ = m.do(ctx, "abort ssl "+kind+" "+file, nil, "")
		return err
	}
	if kind == "cert" {
		m.conf.Log.Info("the leaf certificate was replaced without a reload")
		return nil
	}
	m.conf.Log.Info("the roots were replaced without a reload")
	return nil
}
