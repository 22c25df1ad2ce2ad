package render

import (
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// minRelays is how many backends a relay starts with. Backends cannot be added without a
// reload, so there are always more than targets: services come and go without one.
const minRelays = 64

// RelayTable assigns the targets of relays to backends, which are all alike: backend n is of
// Targets[n]. Treat as read-only.
type RelayTable struct {
	Targets []connect.TargetName // "" of a free one
	used    int
	next    int // where the search for a free one begins: one that became free is not given away at once
}

// relayed is what was made of relays last.
type relayed struct {
	listeners []*connect.Listener
	table     *RelayTable
	targets   []*connect.Target // by number
	sections  []*Section
}

// relays renders what connections that are passed on lead to: a backend for each target, and
// the names by which they are asked for.
func (f *file) relays() {
	var list []*connect.Listener
	for _, l := range f.snap.Listeners {
		if l.Role == connect.Relay {
			list = append(list, l)
		}
	}
	if len(list) == 0 {
		return
	}
	old := f.old.relayed
	now := &relayed{listeners: list}
	if old == nil || !slices.Equal(old.listeners, list) || f.prev == nil || f.prev.Relays != old.table {
		now.table = assignRelays(f.table(), f.destinations(list))
		f.names(list, now.table)
	} else {
		now.table = old.table
		f.Maps[NamesMap], f.Maps[EndingsMap] = f.prev.Maps[NamesMap], f.prev.Maps[EndingsMap]
	}
	f.Relays = now.table
	head := f.must(section(Backend, relayBackend(0)).add("mode tcp").add("timeout connect 5s").add("timeout server 25h").add("timeout tunnel 25h").
		add("balance roundrobin"), "a target that connections are passed on to")
	if head == nil {
		return
	}
	now.targets, now.sections = make([]*connect.Target, len(now.table.Targets)), make([]*Section, len(now.table.Targets))
	for n, name := range now.table.Targets {
		if name != "" {
			now.targets[n] = f.snap.Target(name)
		}
		if old != nil && n < len(old.targets) && old.targets[n] == now.targets[n] {
			now.sections[n] = old.sections[n]
		} else {
			now.sections[n] = f.relaySection(head, n, now.targets[n])
		}
	}
	f.Sections = append(f.Sections, now.sections...)
	f.next.relayed = now
}

// table is the assignment that runs.
func (f *file) table() *RelayTable {
	if f.prev != nil && f.prev.Relays != nil {
		return f.prev.Relays
	}
	return &RelayTable{}
}

// destinations are the targets that relays lead to, in their order.
func (f *file) destinations(list []*connect.Listener) (out []connect.TargetName) {
	seen := map[connect.TargetName]bool{}
	for _, l := range list {
		for i := range l.Branches {
			l.Branches[i].Chain.Groups(func(name connect.GroupName) {
				if t := f.destination(name); t != "" && !seen[t] {
					seen[t] = true
					out = append(out, t)
				}
			})
		}
	}
	return out
}

// destination is the target of a group that connections are passed on to.
func (f *file) destination(name connect.GroupName) connect.TargetName {
	if g := f.snap.Group(name); g != nil && len(g.Targets) > 0 {
		return g.Targets[0]
	}
	return ""
}

// assignRelays gives every target a backend of its own and takes it from the others.
func assignRelays(old *RelayTable, wanted []connect.TargetName) *RelayTable {
	t := &RelayTable{Targets: slices.Clone(old.Targets), used: len(wanted), next: old.next}
	need := make(map[connect.TargetName]bool, len(wanted))
	for _, name := range wanted {
		need[name] = true
	}
	for n, name := range t.Targets {
		if name != "" && !need[name] {
			t.Targets[n] = ""
		}
		delete(need, name)
	}
	for len(t.Targets) < minRelays || len(t.Targets)*3 < t.used*4 {
		t.Targets = append(t.Targets, make([]connect.TargetName, max(minRelays, len(t.Targets)))...)
	}
	for _, name := range wanted {
		if !need[name] {
			continue
		}
		for t.Targets[t.next%len(t.Targets)] != "" {
			t.next++
		}
		t.next %= len(t.Targets)
		t.Targets[t.next] = name
		t.next++
	}
	if slices.Equal(t.Targets, old.Targets) {
		return old
	}
	return t
}

// names are the maps by which a connection finds its backend.
func (f *file) names(list []*connect.Listener, t *RelayTable) {
	at := make(map[connect.TargetName]int, t.used)
	for n, name := range t.Targets {
		at[name] = n
	}
	exact, endings := map[string]string{}, map[string]string{}
	for _, l := range list {
		for i := range l.Branches {
			b := &l.Branches[i]
			b.Chain.Groups(func(group connect.GroupName) {
				to, name := relayBackend(at[f.destination(group)]), strings.ToLower(b.Match.SNI)
				ending, is := strings.CutPrefix(name, "*")
				if _, err := word("server name", ending); err != nil || len(ending) < 2 {
					return
				}
				if is {
					endings[ending] = to
				} else {
					exact[name] = to
				}
			})
		}
	}
	for file, entries := range map[string]map[string]string{NamesMap: exact, EndingsMap: endings} {
		m := &LiveMap{Read: true, Backends: true, Entries: make([]Entry, 0, len(entries))}
		for key, value := range entries {
			m.Entries = append(m.Entries, Entry{key, value})
		}
		slices.SortFunc(m.Entries, func(a, b Entry) int { return a.Compare(b) })
		if f.prev != nil && f.prev.Maps[file] != nil && f.prev.Maps[file].same(m) {
			m = f.prev.Maps[file]
		}
		f.Maps[file] = m
	}
}

// relaySection is the backend of one number: all differ in their name and their servers alone.
func (f *file) relaySection(head *Section, n int, t *connect.Target) *Section {
	sec := *head
	sec.Name = relayBackend(n)
	sec.ID = string(Backend) + " " + sec.Name
	sec.Head = strings.Replace(head.Head, relayBackend(0)+" ", sec.Name+" ", 1)
	if t != nil {
		sec.Group, sec.Target = connect.GroupName(t.Name), t.Name
		if t.Dial.How == connect.Inner {
			sec.Servers = []Server{{Name: "inner", Address: "unix@" + f.path(innerSocket(t.Service)), Weight: 1, Options: " send-proxy-v2"}}
		}
		seen := map[string]bool{}
		for i := range t.Endpoints {
			e := &t.Endpoints[i]
			s := Server{Address: net.JoinHostPort(e.Address, strconv.Itoa(e.Port)), Weight: min(max(e.Weight, 1), 256)}
			s.Name = e.Name + "." + digest(s.Address)
			if _, err := word("endpoint", s.Name+s.Address); err == nil && !seen[s.Name] {
				seen[s.Name] = true
				sec.Servers = append(sec.Servers, s)
			}
		}
	}
	sec.text = sec.assemble()
	return &sec
}

// relay is a listener that passes connections on by the name that they ask for, as they come.
func (f *file) relay(l *connect.Listener) *builder {
	b := section(Frontend, frontendName(l)).add("mode tcp")
	b.add("bind %s", bind(b, l.Bind)).add("timeout client %s", ms(l.Idle))
	f.log(b, false)
	const hello = "{ req.ssl_hello_type 1 }"
	b.add("tcp-request inspect-delay 5s")
	b.add("tcp-request content set-var(txn.to) req.ssl_sni,lower,map_str(%s) if %s", f.path(NamesMap), hello)
	b.add("tcp-request content set-var(txn.to) req.ssl_sni,lower,map_end(%s) if %s !{ var(txn.to) -m found }", f.path(EndingsMap), hello)
	b.add("tcp-request content accept if %s { var(txn.to) -m found }", hello)
	// What is no TLS is refused at its first byte, and who is silent in the end.
	b.add("tcp-request content reject if %s or { req.len gt 0 } !{ req.payload(0,1),hex -m str 16 } or WAIT_END", hello)
	return b.add("%s", "use_backend %[var(txn.to)]")
}
