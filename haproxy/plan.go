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
// It may import connect, certs and haproxy/render; cmd wires it.
package haproxy

import (
	"fmt"
	stdmaps "maps"
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
	Upstreams Reason = "upstreams" // one was added or removed
	RootsCA   Reason = "roots"     // on versions that cannot change them live
	SlotsFull Reason = "slots"     // more endpoints of HTTP upstreams than sockets
	Repair    Reason = "repair"    // a command failed, or HAProxy had drifted
	Inbound   Reason = "inbound"   // the public listener or the application behind it
)

// Reasons are all of them.
var Reasons = []Reason{Start, Structure, Upstreams, RootsCA, SlotsFull, Repair, Inbound}

// Kind says what a command is for; the order of Kinds is the order of a Plan.
type Kind int

// Kinds of commands.
const (
	Map Kind = iota
	Add
	Weight
	Remove
	Unmap
	CA // before Cert: accept by the new root before showing a leaf of it
	Cert
)

// Command is one line of the runtime API. A payload travels apart and is never printed.
type Command struct {
	Kind    Kind
	Text    string
	Payload []byte
	Want    string        // the answer must contain it; "" wants an empty answer
	Server  string        // backend/server that Add, Weight and Remove are about
	Set     render.Server // Add: what is added
}

// String prints the plan for people and for tests.
func (p Plan) String() string {
	if p.Reload != "" {
		return fmt.Sprintf("reload (%s): %s\n", p.Reload, p.Detail)
	}
	var b strings.Builder
	for _, c := range p.Commands {
		b.WriteString(c.Text)
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

// Can is what this HAProxy can change while it runs.
type Can struct{ CACommit bool }

// NewPlan compares. running nil means that nothing runs.
func NewPlan(running, want *render.Config, can Can) Plan {
	if running == nil {
		return Plan{Reload: Start, Detail: "the first configuration"}
	}
	if p := structure(running, want); p.Reload != "" {
		return p
	}
	if running.Roots.Fingerprint != want.Roots.Fingerprint && !can.CACommit {
		return Plan{Reload: RootsCA, Detail: "the roots changed and this version of HAProxy cannot change them live"}
	}
	var p Plan
	maps(running, want, &p)
	for i, now := range running.Sections {
		if now != want.Sections[i] {
			servers(now, want.Sections[i], &p)
		}
	}
	certificates(running, want, &p)
	slices.SortStableFunc(p.Commands, func(a, b Command) int { return int(a.Kind) - int(b.Kind) })
	return p
}

// structure finds what the runtime API cannot change.
func structure(running, want *render.Config) Plan {
	if len(running.Sections) == len(want.Sections) {
		same := true
		for i, s := range running.Sections {
			w := want.Sections[i]
			same = same && (s == w || key(s) == key(w) && s.Head == w.Head)
		}
		if same {
			return files(running, want)
		}
	}
	have := make(map[string]*render.Section, len(running.Sections))
	for _, s := range running.Sections {
		have[key(s)] = s
	}
	var added, changed []string
	same := len(running.Sections) == len(want.Sections)
	for i, s := range want.Sections {
		old := have[key(s)]
		delete(have, key(s))
		switch {
		case old == nil:
			added = append(added, s.Name)
		case old.Head != s.Head:
			changed = append(changed, s.Name)
		}
		same = same && key(running.Sections[i]) == key(s)
	}
	var gone []string
	for _, s := range have {
		gone = append(gone, s.Name)
	}
	slices.Sort(gone)
	for class, t := range want.Slots {
		if old := running.Slots[class]; old != nil && old.Size != t.Size {
			return Plan{Reload: SlotsFull, Detail: fmt.Sprintf("%s needs %d sockets, has %d", class, t.Size, old.Size)}
		}
	}
	switch {
	case len(added)+len(gone) > 0:
		return Plan{Reload: Upstreams, Detail: detail(list("added", added), list("removed", gone), list("changed", changed))}
	case len(changed) > 0:
		reason := Structure
		if slices.Contains(changed, "frontend public") || slices.Contains(changed, "backend local_app") {
			reason = Inbound
		}
		return Plan{Reload: reason, Detail: list("changed", changed)}
	case !same:
		return Plan{Reload: Structure, Detail: "the order of sections"}
	}
	return files(running, want)
}

// files finds changed files that HAProxy only reads when it starts.
func files(running, want *render.Config) Plan {
	for name, text := range want.Files {
		if running.Files[name] != text && !strings.HasPrefix(name, "maps/") {
			return Plan{Reload: Structure, Detail: "changed " + name}
		}
	}
	return Plan{}
}

// key tells sections apart, also two global ones.
func key(s *render.Section) string {
	if s.Name == "global" {
		return s.Name + s.Comment
	}
	return s.Name
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

// maps brings the slots' maps and the policy's generation up to date.
func maps(running, want *render.Config, p *Plan) {
	for _, class := range slices.Sorted(stdmaps.Keys(want.Slots)) {
		now, next := running.Slots[class], want.Slots[class]
		if now == next {
			continue
		}
		file := want.Dir + "/" + render.SlotMapFile(class)
		if _, ok := want.Files[render.SlotMapFile(class)]; !ok {
			continue // the Go dialer's slots have no map
		}
		for i := range max(len(now.Values), len(next.Values)) {
			was, is := value(now, i), value(next, i)
			if was == is {
				continue
			}
			key := render.Slot{ID: i + 1}.Key()
			switch {
			case is == "":
				p.Commands = append(p.Commands, Command{Kind: Unmap, Text: fmt.Sprintf("del map %s %s", file, key)})
			case was == "":
				p.Commands = append(p.Commands, Command{Kind: Map, Text: fmt.Sprintf("add map %s %s %s", file, key, is)})
			default:
				p.Commands = append(p.Commands, Command{Kind: Map, Text: fmt.Sprintf("set map %s %s %s", file, key, is)})
			}
		}
	}
	if running.Generation != want.Generation && uses(want, render.PolicyMap) {
		p.Commands = append(p.Commands, Command{Kind: Map, Text: fmt.Sprintf("set map %s/%s %s %s", want.Dir, render.PolicyMap, render.PolicyKey, want.Generation)})
	}
}

func value(t *render.SlotTable, i int) string {
	if i >= len(t.Values) {
		return ""
	}
	return t.Values[i]
}

// uses reports whether the public frontend reads a map; HAProxy knows no other.
func uses(c *render.Config, file string) bool {
	s := c.Find("frontend public")
	return s != nil && strings.Contains(s.Head, file)
}

func weight(full string, s *render.Server) Command {
	return Command{Kind: Weight, Server: full, Text: fmt.Sprintf("set server %s weight %d", full, s.Weight)}
}

func maxConn(full string, s *render.Server) Command {
	return Command{Kind: Weight, Server: full, Text: fmt.Sprintf("set maxconn server %s %d", full, s.MaxConn)}
}

func servers(now, want *render.Section, p *Plan) {
	if len(now.Servers) == 0 && len(want.Servers) == 0 {
		return
	}
	backend := strings.TrimPrefix(want.Name, "backend ")
	old := make(map[string]*render.Server, len(now.Servers))
	for i := range now.Servers {
		old[now.Servers[i].Name] = &now.Servers[i]
	}
	for i := range want.Servers {
		s := &want.Servers[i]
		full := backend + "/" + s.Name
		was := old[s.Name]
		delete(old, s.Name)
		if was == nil {
			p.Commands = append(p.Commands, Command{Kind: Add, Server: full, Set: *s,
				Text: "add server " + backend + "/" + s.Added(), Want: "New server registered"})
			continue
		}
		if was.Weight != s.Weight {
			p.Commands = append(p.Commands, weight(full, s))
		}
		if was.MaxConn != s.MaxConn {
			p.Commands = append(p.Commands, maxConn(full, s))
		}
	}
	for i := range now.Servers {
		if name := now.Servers[i].Name; old[name] != nil {
			full := backend + "/" + name
			p.Commands = append(p.Commands, Command{Kind: Remove, Server: full, Text: fmt.Sprintf("set server %s state drain", full)})
		}
	}
}

// certificates replaces leaf and roots in place; Manager proves each by "Used".
func certificates(running, want *render.Config, p *Plan) {
	if running.Roots.Fingerprint != want.Roots.Fingerprint {
		p.Commands = append(p.Commands, Command{Kind: CA, Text: "set ssl ca-file " + want.Dir + "/" + render.RootsFile, Payload: []byte(want.Roots.PEM)})
	}
	if running.Leaf.Fingerprint != want.Leaf.Fingerprint {
		p.Commands = append(p.Commands, Command{Kind: Cert, Text: "set ssl cert " + want.Dir + "/" + render.LeafFile, Payload: want.Leaf.PEM()})
	}
}
