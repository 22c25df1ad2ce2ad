package render

import (
	"maps"
	"slices"
	"strings"
)

// Merge returns the configuration that HAProxy can be brought to from running without a reload:
// the structure is that of running, and what can change at run time is taken from want. A
// backend whose head or whose number of sockets changes keeps its servers, and a slot keeps its
// endpoint as long as a server of running may use it. The bundles of both must be the same, or
// replaceable live.
func Merge(running, want *Config) *Config {
	out := *running
	out.Leaves, out.Bundles, out.Verified = common(running.Leaves, want.Leaves), common(running.Bundles, want.Bundles), want.Verified
	out.Maps, out.Slots = common(running.Maps, want.Maps), make(map[string]*SlotTable, len(running.Slots))
	same := map[string]bool{"": true} // classes whose servers may change
	for class, now := range running.Slots {
		next := want.Slots[class]
		if next == nil || next.Size != now.Size {
			out.Slots[class] = now
			if m := running.Maps[SlotMapFile(class)]; m != nil {
				out.Maps[SlotMapFile(class)] = m
			}
			continue
		}
		same[class] = true
		out.Slots[class] = now.with(next)
		if out.Maps[SlotMapFile(class)] != nil {
			out.Maps[SlotMapFile(class)] = out.Slots[class].live()
		}
	}
	for name, m := range out.Maps {
		out.Maps[name] = carried(running, running.Maps[name], m)
	}
	for name, m := range out.Maps { // the running sections decide which maps are read
		if now := running.Maps[name]; now.Read != m.Read {
			out.Maps[name] = &LiveMap{Entries: m.Entries, Read: now.Read, Routes: now.Routes, Backends: now.Backends}
		}
	}
	wanted := make(map[string]*Section, len(want.Sections))
	for _, s := range want.Sections {
		wanted[s.ID] = s
	}
	out.Sections = make([]*Section, len(running.Sections))
	for i, s := range running.Sections {
		out.Sections[i] = s
		if w := wanted[s.ID]; w != nil && s.Target+w.Target != "" && w.Head == s.Head && w.class == s.class && same[w.class] {
			out.Sections[i] = w
		}
	}
	return &out
}

// carried is a map of backends as it is wanted, but for what HAProxy cannot be told yet: one
// that leads to a backend that does not run keeps what it says. An entry of routes stays until
// the reload, as long as they do.
func carried(running *Config, now, next *LiveMap) *LiveMap {
	if now == nil || !now.Routes && !now.Backends {
		return next
	}
	runs := make(map[string]bool, len(running.Sections))
	for _, s := range running.Sections {
		runs[s.Name] = runs[s.Name] || s.Kind == Backend
	}
	led := func(v string) bool {
		return !slices.ContainsFunc(strings.Split(v, "|"), func(name string) bool { return !runs[name] })
	}
	if !now.Routes {
		was := make(map[string]string, len(now.Entries))
		for _, e := range now.Entries {
			was[e.Key] = e.Value
		}
		out := &LiveMap{Read: now.Read, Backends: true}
		for _, e := range next.Entries {
			if !led(e.Value) {
				e.Value = was[e.Key]
			}
			if e.Value != "" {
				out.Entries = append(out.Entries, e)
			}
		}
		return out
	}
	wanted := make(map[string]string, len(next.Entries))
	for _, e := range next.Entries {
		wanted[e.Key] = e.Value
	}
	out := &LiveMap{Read: now.Read, Routes: true, Backends: now.Backends, Entries: slices.Clone(now.Entries)}
	for i := range out.Entries {
		e := &out.Entries[i]
		v, ok := wanted[e.Key]
		if ok && (!now.Backends || led(v)) {
			e.Value = v
		}
	}
	return out
}

// common returns running with the values of want where it has them: what is new waits for the
// reload, and what is gone may still be used until then.
func common[T any](running, want map[string]T) map[string]T {
	out := maps.Clone(running)
	for name := range running {
		if v, ok := want[name]; ok {
			out[name] = v
		}
	}
	return out
}

// with returns the table with the endpoints of both. No endpoint is in two slots and no slot
// has two endpoints, as a slot that becomes free is not given away at once (see ledger.assign).
func (t *SlotTable) with(next *SlotTable) *SlotTable {
	if t == next {
		return t
	}
	out := *next
	out.Values = append([]string(nil), next.Values...)
	for len(out.Values) < len(t.Values) {
		out.Values = append(out.Values, "")
	}
	for i, v := range t.Values {
		if out.Values[i] == "" && v != "" {
			out.Values[i] = v
			out.used++
		}
	}
	return &out
}
