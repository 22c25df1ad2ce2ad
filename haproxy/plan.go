// Package haproxy makes a running HAProxy match the mesh: the Plan, which is the
// difference between two configurations as a value that can be printed, and the
// Manager, the loop that carries it out.
//
// Invariants: what runs stays until its successor was checked by HAProxy itself;
// any failure leaves it running, is logged once with the next thing to try, is
// counted, and is retried with backoff; the files on disk always describe what
// runs, so that a crash or restart begins from the present; a backend is emptied
// only because Consul says so, never because of an error.
//
// It may import connect, certs, haproxy/render and haproxy/runtimeapi; haproxy/selftest and cmd
// use it.
package haproxy

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// Plan is how to get from one Config to another. The zero Plan has nothing to do.
type Plan struct {
	Reload   Reason // "" when commands suffice
	Detail   string // what changed, for the log
	Commands []Command
}

// Reason of a reload: a bounded set, fit for a metric's label.
type Reason string

// The reasons.
const (
	Start     Reason = "start"
	Structure Reason = "structure" // a listener, protocol, timeout, limit or target
	Upstreams Reason = "upstreams" // a listener was added or removed, mostly that of an upstream
	Routes    Reason = "routes"    // a chain leads to other backends
	RootsCA   Reason = "roots"     // on versions that cannot change them live
	SlotsFull Reason = "slots"     // a class of slots needs more sockets
	Repair    Reason = "repair"    // a command failed, or HAProxy had drifted
	Inbound   Reason = "inbound"   // a listener of callers or the application behind it
)

// Reasons lists every Reason.
var Reasons = []Reason{Start, Structure, Upstreams, Routes, RootsCA, SlotsFull, Repair, Inbound}

// Kind says what a command is for; the order of Kinds is the order of a Plan.
type Kind int

// Kinds of commands.
const (
	SetEntry Kind = iota // of a map
	AddServer
	SetServer // weight or limit
	RemoveServer
	RemoveEntry
	SetBundle // before SetLeaf: accept by the new root before showing a leaf of it
	SetLeaf
)

// Command is one change that HAProxy takes while it runs. Its text is made when it is sent.
type Command struct {
	Kind    Kind
	File    string // of a map, bundle or leaf: its path
	Key     string // of an entry
	Value   string
	New     bool   // SetEntry: the key is not in the map yet
	Backend string // of a server
	Server  render.Server
	Limit   bool   // SetServer: the limit of connections, not the weight
	Payload []byte // SetBundle, SetLeaf; it travels apart and is never printed
}

// server is the name by which commands call a server.
func (c *Command) server() string { return c.Backend + "/" + c.Server.Name }

// Text is the line of the runtime API.
func (c *Command) Text() string {
	switch c.Kind {
	case SetEntry:
		verb := "set"
		if c.New {
			verb = "add"
		}
		return fmt.Sprintf("%s map %s %s %s", verb, c.File, c.Key, c.Value)
	case AddServer:
		return "add server " + c.Backend + "/" + c.Server.Added()
	case SetServer:
		if c.Limit {
			return fmt.Sprintf("set maxconn server %s %d", c.server(), c.Server.MaxConn)
		}
		return fmt.Sprintf("set server %s weight %d", c.server(), c.Server.Weight)
	case RemoveServer:
		return fmt.Sprintf("set server %s state drain", c.server())
	case RemoveEntry:
		return fmt.Sprintf("del map %s %s", c.File, c.Key)
	case SetBundle:
		return "set ssl ca-file " + c.File
	}
	return "set ssl cert " + c.File
}

// String prints the plan for people and for tests.
func (p Plan) String() string {
	if p.Reload != "" {
		return fmt.Sprintf("reload (%s): %s\n", p.Reload, p.Detail)
	}
	var b strings.Builder
	for i := range p.Commands {
		c := &p.Commands[i]
		b.WriteString(c.Text())
		if c.Payload != nil {
			b.WriteString(" <payload>")
		}
		b.WriteString("\n")
	}
	if b.Len() == 0 {
		return "nothing to do\n"
	}
	return b.String()
}

// Empty reports whether nothing needs to be done.
func (p Plan) Empty() bool { return p.Reload == "" && len(p.Commands) == 0 }

// Features are what this HAProxy can change while it runs.
type Features struct {
	CACommit      bool // roots
	ServerCookies bool // servers with a cookie can be added
}

// NewPlan returns the way from running to want. running is nil while nothing runs.
func NewPlan(running, want *render.Config, can Features) Plan {
	if running == nil {
		return Plan{Reload: Start, Detail: "the first configuration"}
	}
	if p := structure(running, want); p.Reload != "" {
		return p
	}
	var p Plan
	p.maps(running, want)
	for i, now := range running.Sections {
		if now != want.Sections[i] {
			p.servers(now, want.Sections[i])
		}
	}
	if !can.ServerCookies && slices.ContainsFunc(p.Commands, func(c Command) bool { return c.Kind == AddServer && strings.Contains(c.Server.Options, " cookie ") }) {
		return Plan{Reload: Structure, Detail: "this version of HAProxy cannot add an endpoint with a cookie live"}
	}
	p.leaves(running, want)
	if p.bundles(running, want); p.changes(SetBundle) && !can.CACommit {
		return Plan{Reload: RootsCA, Detail: "the roots changed and this version of HAProxy cannot change them live"}
	}
	slices.SortStableFunc(p.Commands, func(a, b Command) int { return int(a.Kind) - int(b.Kind) })
	return p
}

func (p *Plan) changes(k Kind) bool {
	return slices.ContainsFunc(p.Commands, func(c Command) bool { return c.Kind == k })
}

// structure finds what the runtime API cannot change.
func structure(running, want *render.Config) Plan {
	if len(running.Sections) == len(want.Sections) {
		same := true
		for i, s := range running.Sections {
			w := want.Sections[i]
			same = same && (s == w || s.ID == w.ID && s.Head == w.Head)
		}
		if same {
			return otherFiles(running, want)
		}
	}
	have := make(map[string]*render.Section, len(running.Sections))
	for _, s := range running.Sections {
		have[s.ID] = s
	}
	var added, changed []string
	reason, listeners := Structure, false
	same := len(running.Sections) == len(want.Sections)
	for i, s := range want.Sections {
		old := have[s.ID]
		delete(have, s.ID)
		switch {
		case old == nil:
			added = append(added, s.Title())
			listeners = listeners || s.Listener != ""
		case old.Head != s.Head:
			changed = append(changed, s.Title())
			if s.Role.Callers() {
				reason = Inbound
			}
		}
		same = same && running.Sections[i].ID == s.ID
	}
	var gone []string
	for _, s := range have {
		gone = append(gone, s.Title())
		listeners = listeners || s.Listener != ""
	}
	slices.Sort(gone)
	for class, t := range want.Slots {
		if old := running.Slots[class]; old != nil && old.Size != t.Size {
			return Plan{Reload: SlotsFull, Detail: fmt.Sprintf("%s needs %d sockets, has %d", class, t.Size, old.Size)}
		}
	}
	switch {
	case len(added)+len(gone) > 0:
		if reason = Routes; listeners {
			reason = Upstreams
		}
		return Plan{Reload: reason, Detail: detail(list("added", added), list("removed", gone), list("changed", changed))}
	case len(changed) > 0:
		return Plan{Reload: reason, Detail: list("changed", changed)}
	case !same:
		return Plan{Reload: Structure, Detail: "the order of sections"}
	}
	return otherFiles(running, want)
}

// otherFiles finds changed files that HAProxy only reads when it starts.
func otherFiles(running, want *render.Config) Plan {
	for name, text := range want.Files {
		if running.Files[name] != text {
			return Plan{Reload: Structure, Detail: "changed " + name}
		}
	}
	return Plan{}
}

func list(what string, names []string) string {
	if len(names) == 0 {
		return ""
	}
	more := ""
	if len(names) > 5 {
		names, more = names[:5], fmt.Sprintf(" and %d more", len(names)-5)
	}
	return what + " " + strings.Join(names, ", ") + more
}

func detail(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), "; ")
}

// maps brings every map up to date that HAProxy knows.
func (p *Plan) maps(running, want *render.Config) {
	for _, name := range slices.Sorted(maps.Keys(want.Maps)) {
		now, next := running.Maps[name], want.Maps[name]
		if now == nil || now == next || !next.Read {
			continue
		}
		file := want.Dir + "/" + name
		set := func(e render.Entry, fresh bool) {
			p.Commands = append(p.Commands, Command{Kind: SetEntry, File: file, Key: e.Key, Value: e.Value, New: fresh})
		}
		was, is := now.Entries, next.Entries
		for len(was)+len(is) > 0 {
			switch {
			case len(was) == 0 || len(is) > 0 && is[0].Compare(was[0]) < 0:
				set(is[0], true)
				is = is[1:]
			case len(is) == 0 || was[0].Compare(is[0]) < 0:
				p.Commands = append(p.Commands, Command{Kind: RemoveEntry, File: file, Key: was[0].Key})
				was = was[1:]
			default:
				if was[0].Value != is[0].Value {
					set(is[0], false)
				}
				was, is = was[1:], is[1:]
			}
		}
	}
}

// servers brings the endpoints of a backend up to date.
func (p *Plan) servers(now, want *render.Section) {
	if len(now.Servers) == 0 && len(want.Servers) == 0 {
		return
	}
	change := func(k Kind, s *render.Server, limit bool) {
		p.Commands = append(p.Commands, Command{Kind: k, Backend: want.Name, Server: *s, Limit: limit})
	}
	old := make(map[string]*render.Server, len(now.Servers))
	for i := range now.Servers {
		old[now.Servers[i].Name] = &now.Servers[i]
	}
	for i := range want.Servers {
		s := &want.Servers[i]
		was := old[s.Name]
		delete(old, s.Name)
		switch {
		case was == nil:
			change(AddServer, s, false)
			continue
		case was.Weight != s.Weight:
			change(SetServer, s, false)
		}
		if was.MaxConn != s.MaxConn {
			change(SetServer, s, true)
		}
	}
	for i := range now.Servers {
		if s := &now.Servers[i]; old[s.Name] != nil {
			change(RemoveServer, s, false)
		}
	}
}

// bundles and leaves replace certificates in place; Manager.swap then checks that HAProxy shows
// each as used.
func (p *Plan) bundles(running, want *render.Config) {
	for _, name := range slices.Sorted(maps.Keys(want.Bundles)) {
		if now, next := running.Bundles[name], want.Bundles[name]; now != nil && now.Fingerprint != next.Fingerprint {
			p.Commands = append(p.Commands, Command{Kind: SetBundle, File: want.Dir + "/" + name, Payload: []byte(next.PEM)})
		}
	}
}

func (p *Plan) leaves(running, want *render.Config) {
	for _, name := range slices.Sorted(maps.Keys(want.Leaves)) {
		if now, next := running.Leaves[name], want.Leaves[name]; now != nil && now.Fingerprint != next.Fingerprint {
			p.Commands = append(p.Commands, Command{Kind: SetLeaf, File: want.Dir + "/" + name, Payload: next.PEM()})
		}
	}
}
