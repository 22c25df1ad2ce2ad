package render

import "maps"

// Merge is what of want HAProxy can be brought to without a reload, from running: its
// structure stays, and what changes at run time is taken from want. A backend whose head
// or whose number of sockets changes keeps its servers, and a slot keeps its endpoint as
// long as a server of running may use it. It is for roots that can be replaced live, or
// that are the same in both.
func Merge(running, want *Config) *Config {
	out := *running
	out.Leaf, out.Roots, out.Generation, out.Verified = want.Leaf, want.Roots, want.Generation, want.Verified
	out.Files, out.Slots = maps.Clone(running.Files), make(map[string]*SlotTable, len(running.Slots))
	same := map[string]bool{"": true} // classes whose servers may change
	for class, now := range running.Slots {
		next := want.Slots[class]
		if next == nil || next.Size != now.Size {
			out.Slots[class] = now
			continue
		}
		same[class] = true
		out.Slots[class] = now.with(next)
		if file := SlotMapFile(class); running.Files[file] != "" || want.Files[file] != "" {
			out.Files[file] = out.Slots[class].SlotMap()
		}
	}
	if text, ok := want.Files[PolicyMap]; ok {
		out.Files[PolicyMap] = text
	}
	wanted := make(map[string]*Section, len(want.Sections))
	for _, s := range want.Sections {
		wanted[s.Name] = s
	}
	out.Sections = make([]*Section, len(running.Sections))
	for i, s := range running.Sections {
		out.Sections[i] = s
		if w := wanted[s.Name]; w != nil && s.Upstream != "" && w.Head == s.Head && w.class == s.class && same[w.class] {
			out.Sections[i] = w
		}
	}
	return &out
}

// with is the table with the endpoints of both: none is in two slots, and no slot has two,
// as a slot that becomes free is not given away at once (see ledger.assign).
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
