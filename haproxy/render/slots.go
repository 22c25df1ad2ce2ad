package render

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// minSlots is how many sockets a class starts with. Sockets cannot be added without a reload,
// so there are always at least twice as many as endpoints: a rolling replacement of all
// endpoints needs no reload.
const minSlots = 256

// SlotTable assigns endpoints to the sockets of one class of connectors. Slots count
// from 1: slot n is Values[n-1]. Treat as read-only.
//
// A slot belongs for ever to the identities it was first given to: a worker that is being
// replaced still uses the slots as it knew them, and what it sends to one service must never
// arrive at another.
type SlotTable struct {
	Class  Class
	Size   int      // sockets that exist
	Values []string // "address|port|id|id" of the endpoint in each slot, "" in a free one
	Owners []string // "id|id" of every slot that was ever used
	used   int
}

// Each visits the slots in use.
func (t *SlotTable) Each(do func(value string, id int)) {
	for i, v := range t.Values {
		if v != "" {
			do(v, i+1)
		}
	}
}

// slotKeys are the keys of slots that were ever used, made once: a map has thousands.
var slotKeys struct {
	sync.Mutex
	of []string
}

func slotKey(id int) string {
	slotKeys.Lock()
	defer slotKeys.Unlock()
	for len(slotKeys.of) <= id {
		slotKeys.of = append(slotKeys.of, Slot{ID: len(slotKeys.of)}.Key())
	}
	return slotKeys.of[id]
}

// live is the map of the class: where each slot in use leads.
func (t *SlotTable) live() *LiveMap {
	m := &LiveMap{Entries: make([]Entry, 0, t.used), Read: !t.Class.Go}
	t.Each(func(v string, id int) { m.Entries = append(m.Entries, Entry{slotKey(id), v}) })
	return m
}

// ledger counts how many upstreams want each slot value, so that a rendering costs only what
// has changed. It belongs to the Config that was rendered last.
type ledger struct {
	tables  map[string]*SlotTable
	refs    map[string]map[string]*ref // by class and value
	changed map[string][]string        // values, by class
}

// ref is one value: how many upstreams have it, and its slot, 0 while it has none.
type ref struct{ wanted, id int }

// newLedger begins with the slots of prev, which nobody wants yet.
func newLedger(prev *Config) *ledger {
	l := &ledger{tables: map[string]*SlotTable{}, refs: map[string]map[string]*ref{}, changed: map[string][]string{}}
	if prev == nil {
		return l
	}
	for class, t := range prev.Slots {
		l.tables[class] = t
		refs := make(map[string]*ref, t.used)
		t.Each(func(v string, id int) {
			refs[v] = &ref{id: id}
			l.changed[class] = append(l.changed[class], v)
		})
		l.refs[class] = refs
	}
	return l
}

// want counts the values of an upstream in. It makes the class even if that has no endpoint
// yet: the first endpoint must not need a reload.
func (l *ledger) want(of Class, values []string) {
	class := of.Name()
	refs := l.refs[class]
	if refs == nil {
		refs = map[string]*ref{}
		l.refs[class] = refs
		l.tables[class] = &SlotTable{Class: of, Size: minSlots}
	}
	if t := l.tables[class]; t.Class != of { // inherited: it was known by its name alone
		whole := *t
		whole.Class = of
		l.tables[class] = &whole
	}
	for _, v := range values {
		r := refs[v]
		if r == nil {
			r = &ref{}
			refs[v] = r
			l.changed[class] = append(l.changed[class], v)
		}
		r.wanted++
	}
}

// drop counts the values of an upstream out again.
func (l *ledger) drop(class string, values []string) {
	for _, v := range values {
		if r := l.refs[class][v]; r != nil {
			r.wanted--
			l.changed[class] = append(l.changed[class], v)
		}
	}
}

// of looks up what assign gave.
func (l *ledger) of(class string, values []string) []int {
	if class == "" || len(values) == 0 {
		return nil
	}
	out := make([]int, len(values))
	for i, v := range values {
		if r := l.refs[class][v]; r != nil {
			out[i] = r.id
		}
	}
	return out
}

// assign gives every wanted value a slot and frees the slots of values that nobody wants any
// more. A table that does not change stays the same pointer. All classes together have at most
// most sockets (0: no limit), unless the slots that were ever used need more.
func (l *ledger) assign(most int) {
	for class, values := range l.changed {
		delete(l.changed, class)
		refs := l.refs[class]
		var fresh []string
		var gone []int
		for _, v := range values {
			switch r := refs[v]; {
			case r == nil: // named twice
			case r.wanted <= 0:
				delete(refs, v)
				if r.id != 0 {
					gone = append(gone, r.id)
				}
			case r.id == 0:
				fresh = append(fresh, v)
			}
		}
		if len(fresh)+len(gone) == 0 {
			continue
		}
		old := l.tables[class]
		slices.Sort(fresh)
		fresh = slices.Compact(fresh) // one that came, went and came again is named twice
		t := &SlotTable{Class: old.Class, Size: old.Size, Values: slices.Clone(old.Values), Owners: old.Owners, used: old.used + len(fresh) - len(gone)}
		t.give(fresh, refs)
		for _, id := range gone { // only now: connections that are being made still mean the old endpoint
			t.Values[id-1] = ""
		}
		t.grow()
		if most := most / len(l.tables); most > 0 && t.Size > most {
			t.Size = max(old.Size, most, (len(t.Owners)+minSlots-1)/minSlots*minSlots)
		}
		l.tables[class] = t
	}
}

func (t *SlotTable) grow() {
	for t.Size < 2*t.used || t.Size < len(t.Owners) {
		t.Size *= 2
	}
}

// give finds a slot for each value: a free one of the same identities, else a new one.
func (t *SlotTable) give(fresh []string, refs map[string]*ref) {
	if len(fresh) == 0 {
		return
	}
	free := map[string][]int{}
	for _, v := range fresh {
		free[identities(v)] = nil
	}
	for i, owner := range t.Owners {
		if t.Values[i] == "" {
			if list, asked := free[owner]; asked {
				free[owner] = append(list, i+1)
			}
		}
	}
	t.Owners = slices.Clone(t.Owners)
	for _, v := range fresh {
		owner := identities(v)
		id := len(t.Owners) + 1
		if list := free[owner]; len(list) > 0 {
			id, free[owner] = list[0], list[1:]
		} else {
			t.Owners, t.Values = append(t.Owners, owner), append(t.Values, "")
		}
		t.Values[id-1] = v
		refs[v].id = id
	}
}

// published is the tables as they are now.
func (l *ledger) published() map[string]*SlotTable { return maps.Clone(l.tables) }

// identities is the part of a slot's value after the address.
func identities(v string) string {
	_, rest, _ := strings.Cut(v, "|")
	_, rest, _ = strings.Cut(rest, "|")
	return rest
}

// Slots reads back the maps of classes, by their names: the assignments of a HAProxy that still runs
// while a new sidecar takes over. What cannot be read is not assigned; a gap may mean
// something to the old worker and is given to nobody. Maps of other things are passed over.
func Slots(maps map[string]string) *Config {
	c := &Config{Slots: map[string]*SlotTable{}}
	for name, text := range maps {
		class, ok := parseClass(name)
		if !ok {
			continue
		}
		t := &SlotTable{Class: class, Size: minSlots}
		for line := range strings.Lines(text) {
			key, value, ok := strings.Cut(strings.TrimSpace(line), " ")
			id, err := strconv.Atoi(key)
			if id -= slotID(0); !ok || err != nil || id < 1 || id > 1<<20 {
				continue
			}
			for len(t.Owners) < id {
				t.Owners, t.Values = append(t.Owners, "unknown"), append(t.Values, "")
			}
			if t.Values[id-1] == "" {
				t.used++
			}
			t.Values[id-1], t.Owners[id-1] = value, identities(value)
		}
		t.grow()
		c.Slots[name] = t
	}
	return c
}
