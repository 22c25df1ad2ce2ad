package haproxy

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// ahead applies what needs no reload before the reload itself: policies, endpoints and leaves
// wait neither until the structure is quiet nor for a reload that fails.
func (m *Manager) ahead(ctx context.Context, snap *connect.Snapshot, want *render.Config) error {
	if m.running == nil || m.broken || !m.conf.Proxy.Up() {
		return nil
	}
	if !m.conf.Features.CACommit && m.rooted(want) {
		now := *snap
		now.Bundles = maps.Clone(snap.Bundles)
		for name := range now.Bundles {
			if have := m.running.Bundles[render.BundleFile(name)]; have != nil {
				now.Bundles[name] = have // what is verified meanwhile is verified by these
			}
		}
		var err error
		if want, _, err = m.conf.Renderer.Render(&now, m.running); err != nil {
			return stage("render", "correct what the message names in Consul", err)
		}
	}
	part := render.Merge(m.running, want)
	plan := NewPlan(m.running, part, m.conf.Features)
	if plan.Reload != "" || plan.Empty() {
		return nil
	}
	return m.live(ctx, applied{part, m.ran, m.served}, plan)
}

// rooted reports whether want has other roots in a bundle that HAProxy reads already.
func (m *Manager) rooted(want *render.Config) bool {
	for name, roots := range want.Bundles {
		if have := m.running.Bundles[name]; have != nil && have.Fingerprint != roots.Fingerprint {
			return true
		}
	}
	return false
}

// lineOf finds the line that HAProxy names when it refuses a configuration.
var lineOf = regexp.MustCompile(`candidate\.cfg:(\d+)\]`)

// exclude leaves out the upstreams whose sections have a line that HAProxy refuses, until they
// or their groups change: the other upstreams must not suffer for them. found is false if err
// names no such line.
func (m *Manager) exclude(snap *connect.Snapshot, want *render.Config, err error) (found bool) {
	var se *stageError
	if !errors.As(err, &se) || se.stage != "check" {
		return false
	}
	for _, named := range lineOf.FindAllStringSubmatch(err.Error(), -1) {
		line, _ := strconv.Atoi(named[1]) // digits
		sec := want.At(line)
		if sec == nil || !sec.Role.Optional() {
			continue
		}
		for _, l := range snap.Listeners {
			if !l.Role.Optional() {
				continue
			}
			if l.Role == sec.Role && l.Name == sec.Listener || sec.Group != "" && l.LeadsTo(sec.Group) {
				m.excluded[l] = exclusion{fmt.Errorf("HAProxy refuses its configuration: %w", se.err), groups(snap, l)}
				found = true
			}
		}
	}
	return found
}

// exclusion is why a listener is left out, and the groups that it led to: with other groups it
// is tried again.
type exclusion struct {
	err    error
	groups []*connect.Group
}

func groups(s *connect.Snapshot, l *connect.Listener) (out []*connect.Group) {
	for i := range l.Branches {
		l.Branches[i].Chain.Groups(func(name connect.GroupName) { out = append(out, s.Group(name)) })
	}
	return out
}

// without is a list of listeners without those that were refused.
func without(list []*connect.Listener, refused []*render.Refused) []*connect.Listener {
	if len(refused) == 0 {
		return list
	}
	return slices.DeleteFunc(slices.Clone(list), func(l *connect.Listener) bool {
		return slices.ContainsFunc(refused, func(r *render.Refused) bool { return r.Listener == l && r.Site == "" })
	})
}

func (m *Manager) done(now applied) {
	m.applied = now
	m.keep(now.ran)
	m.mu.Lock()
	m.status.Ready, m.status.Running = true, now.running
	m.status.Deleting = len(m.deleting)
	m.mu.Unlock()
}

// WriteFiles writes the files of a configuration, all but haproxy.cfg itself, and makes the
// directories of its sockets. old, if not nil, is the configuration that the files on disk are
// of: what is the same in both is not written again.
func WriteFiles(dir string, c, old *render.Config, socketDir func(dir string) error) error {
	if old == nil {
		old = &render.Config{}
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	for class := range c.Slots {
		if err := socketDir(path(render.SlotDir(class))); err != nil {
			return err
		}
	}
	for name, text := range c.Files {
		if old.Files[name] != text {
			if err := certs.WriteFile(path(name), []byte(text), 0o600); err != nil {
				return err
			}
		}
	}
	for name, live := range c.Maps {
		if old.Maps[name] != live {
			if err := certs.WriteTo(path(name), strings.NewReader(live.Text()), 0o600); err != nil {
				return err
			}
		}
	}
	for name, roots := range c.Bundles {
		if was := old.Bundles[name]; was == nil || was.Fingerprint != roots.Fingerprint {
			if err := certs.WriteFile(path(name), []byte(roots.PEM), 0o600); err != nil {
				return err
			}
		}
	}
	for name, leaf := range c.Leaves {
		if was := old.Leaves[name]; was == nil || was.Fingerprint != leaf.Fingerprint {
			if err := certs.WriteFile(path(name), leaf.PEM(), 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

const tryDisk = "is the run directory writable and the disk not full? (-run-dir)"

// reload writes everything, lets HAProxy check it, and switches over.
func (m *Manager) reload(ctx context.Context, want *render.Config, plan Plan) (err error) {
	begun := time.Now()
	if err := WriteFiles(m.conf.Dir, want, nil, m.conf.SocketDir); err != nil {
		return stage("write", tryDisk, err)
	}
	main := filepath.Join(m.conf.Dir, render.MainFile)
	defer func() {
		// A restart must not read a configuration that could not be switched to.
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
	m.tidy(want)
	return nil
}

// tidy removes the files that only the configuration before read.
func (m *Manager) tidy(want *render.Config) {
	if m.running == nil {
		return
	}
	remove := func(name string) {
		if err := os.Remove(filepath.Join(m.conf.Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			m.conf.Log.Warn("a file that is not needed any more stays", "error", err)
		}
	}
	unneeded(m.running.Files, want.Files, remove)
	unneeded(m.running.Maps, want.Maps, remove)
	unneeded(m.running.Leaves, want.Leaves, remove)
	unneeded(m.running.Bundles, want.Bundles, remove)
}

// unneeded visits what is in old and not in now.
func unneeded[T any](old, now map[string]T, visit func(name string)) {
	for name := range old {
		if _, needed := now[name]; !needed {
			visit(name)
		}
	}
}

// newWorker tells that another worker serves now.
func (m *Manager) newWorker() {
	if m.conf.Reloaded != nil {
		m.conf.Reloaded()
	}
}

// save puts all files of a configuration in place; old, if any, is what they have.
func (m *Manager) save(c, old *render.Config) error {
	if err := WriteFiles(m.conf.Dir, c, old, m.conf.SocketDir); err != nil {
		return err
	}
	return certs.WriteTo(filepath.Join(m.conf.Dir, render.MainFile), c, 0o600)
}

// live changes HAProxy while it runs, and the files with it. A disk that is full does
// not keep an endpoint or a leaf from HAProxy: the files follow when they can.
func (m *Manager) live(ctx context.Context, next applied, plan Plan) error {
	want, old := next.running, m.running
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
	for i := range plan.Commands {
		if err := m.command(ctx, &plan.Commands[i]); err != nil {
			m.broken = true
			return stage("command", "nothing: a reload follows by itself", err)
		}
	}
	m.mu.Lock()
	m.status.Commands += uint64(len(plan.Commands))
	m.mu.Unlock()
	m.conf.Log.Debug("changed without a reload", "commands", len(plan.Commands))
	m.done(next)
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

func (m *Manager) command(ctx context.Context, c *Command) error {
	name := c.server()
	switch c.Kind {
	case AddServer:
		if _, draining := m.deleting[name]; draining {
			return m.takeBack(ctx, c)
		}
		if err := m.do(ctx, c.Text(), nil, "New server registered"); err != nil {
			return err
		}
		return m.do(ctx, "enable server "+name, nil, "")
	case RemoveServer:
		if err := m.do(ctx, c.Text(), nil, ""); err != nil {
			return err
		}
		m.deleting[name] = time.Now()
		return nil
	case SetBundle:
		return m.swap(ctx, "ca-file", c)
	case SetLeaf:
		return m.swap(ctx, "cert", c)
	}
	return m.do(ctx, c.Text(), nil, "")
}

// takeBack puts a server that still drains back to work. Its name ends in a digest of its
// address and options, so those are the same; weight and limit are set again.
func (m *Manager) takeBack(ctx context.Context, c *Command) error {
	name := c.server()
	delete(m.deleting, name)
	for _, limit := range []bool{false, true} {
		set := Command{Kind: SetServer, Backend: c.Backend, Server: c.Server, Limit: limit}
		if err := m.do(ctx, set.Text(), nil, ""); err != nil {
			return err
		}
	}
	return m.do(ctx, "set server "+name+" state ready", nil, "")
}

// swap replaces a certificate file in memory and proves that it is in use: some
// versions say "Success!" and change nothing (haproxy/haproxy#3165).
func (m *Manager) swap(ctx context.Context, kind string, c *Command) error {
	// One payload is limited to 16 KiB (tune.bufsize).
	if len(c.Payload) > 15000 {
		return errors.New("too large for a command")
	}
	err := m.do(ctx, c.Text(), c.Payload, "ransaction")
	if err == nil {
		err = m.do(ctx, "commit ssl "+kind+" "+c.File, nil, "Success!")
	}
	if err == nil {
		err = m.do(ctx, "show ssl "+kind+" "+c.File, nil, "Status: Used")
	}
	if err != nil {
		_ = m.do(ctx, "abort ssl "+kind+" "+c.File, nil, "")
		return err
	}
	if c.Kind == SetLeaf {
		m.conf.Log.Info("the leaf certificate was replaced without a reload", "file", filepath.Base(c.File))
		return nil
	}
	m.conf.Log.Info("the roots were replaced without a reload", "file", filepath.Base(c.File))
	return nil
}
