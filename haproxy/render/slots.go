package render

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// minSlots is how many sockets a class starts with. Sockets cannot be added
// without a reload, so there are always at least twice as many as endpoints: a
// rolling replacement of all of them needs none.
const minSlots = 256

// slots assigns endpoints to sockets; endpoints that stay keep theirs.
type slots struct {
	prev   map[string]*SlotTable
	wanted map[string]map[string]bool
	tables map[string]*SlotTable
}

func newSlots(prev *Config) *slots {
	s := &slots{wanted: map[string]map[string]bool{}, tables: map[string]*SlotTable{}}
	if prev != nil {
		s.prev = prev.Slots
	}
	return s
}

// class makes the connectors of a class exist, also while it has no endpoint:
// the first one must not need a reload.
func (s *slots) class(name string) {
	if s.wanted[name] == nil {
		s.wanted[name] = map[string]bool{}
	}
}

func (s *slots) want(class string, values []string) {
	s.class(class)
	for _, v := range values {
		s.wanted[class][v] = true
	}
}

// of looks up what assign gave.
func (s *slots) of(class string, values []string) []int {
	if class == "" || len(values) == 0 {
		return nil
	}
	out := make([]int, len(values))
	for i, v := range values {
		out[i] = s.tables[class].Used[v]
	}
	return out
}

func (s *slots) assign() {
	for class := range s.prev { // a class that became empty keeps its sockets
		s.class(class)
	}
	for class, values := range s.wanted {
		s.tables[class] = assign(class, values, s.prev[class])
	}
}

// assign gives every value a slot; a table that stays the same is the same pointer.
//
// A slot belongs for ever to the identities it was first given to: a worker that is
// being replaced still sends by its own idea of a slot, and what it means for one
// service must never arrive at another.
func assign(class string, values map[string]bool, prev *SlotTable) *SlotTable {
	t := &SlotTable{Class: class, Size: minSlots, Used: make(map[string]int, len(values)), Owner: map[int]string{}}
	var fresh []string
	if prev == nil {
		fresh = slices.Collect(maps.Keys(values))
	} else {
		t.Size, t.Owner = prev.Size, prev.Owner
		for v := range values {
			if id := prev.Used[v]; id != 0 {
				t.Used[v] = id
			} else {
				fresh = append(fresh, v)
			}
		}
		if len(fresh) == 0 && len(t.Used) == len(prev.Used) {
			return prev
		}
	}
	if len(fresh) > 0 {
		t.Owner = maps.Clone(t.Owner)
		t.give(fresh, prev)
	}
	for t.Size < 2*len(t.Used) || t.Size < len(t.Owner) {
		t.Size *= 2
	}
	return t
}

// give finds a slot for each value: a free one of the same identities, else a new one.
// A slot just left is not given away in the same step: connections that are being
// made still mean its old endpoint.
func (t *SlotTable) give(fresh []string, prev *SlotTable) {
	slices.Sort(fresh)
	busy := map[int]bool{}
	if prev != nil {
		for _, id := range prev.Used {
			busy[id] = true
		}
	}
	free := map[string][]int{}
	for _, id := range slices.Sorted(maps.Keys(t.Owner)) {
		if !busy[id] {
			free[t.Owner[id]] = append(free[t.Owner[id]], id)
		}
	}
	for _, v := range fresh {
		ids := identities(v)
		id := len(t.Owner) + 1 // owned slots are 1 to len(Owner)
		if list := free[ids]; len(list) > 0 {
			id, free[ids] = list[0], list[1:]
		}
		t.Owner[id] = ids
		t.Used[v] = id
	}
}

// identities is the part of a slot's value after the address.
func identities(v string) string {
	_, rest, _ := strings.Cut(v, "|")
	_, rest, _ = strings.Cut(rest, "|")
	return rest
}

// Slots reads back what SlotMap wrote: the assignments of a HAProxy that still runs
// while a new sidecar takes over. What cannot be read is not assigned.
func Slots(maps map[string]string) *Config {
	c := &Config{Slots: map[string]*SlotTable{}}
	for class, text := range maps {
		t := &SlotTable{Class: class, Size: minSlots, Used: map[string]int{}, Owner: map[int]string{}}
		most := 0
		for line := range strings.Lines(text) {
			key, value, ok := strings.Cut(strings.TrimSpace(line), " ")
			id, err := strconv.Atoi(key)
			if id -= slotID(0); !ok || err != nil || id < 1 || id > 1<<20 {
				continue
			}
			t.Used[value], t.Owner[id] = id, identities(value)
			most = max(most, id)
		}
		for id := 1; id <= most; id++ { // the gaps may mean something to the old worker
			if _, ok := t.Owner[id]; !ok {
				t.Owner[id] = "unknown"
			}
		}
		for t.Size < 2*len(t.Used) || t.Size < most {
			t.Size *= 2
		}
		c.Slots[class] = t
	}
	return c
}
