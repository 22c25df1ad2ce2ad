package render

import (
	"maps"
	"slices"
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
func assign(class string, values map[string]bool, prev *SlotTable) *SlotTable {
	t := &SlotTable{Class: class, Size: minSlots, Used: make(map[string]int, len(values))}
	var fresh []string
	if prev != nil {
		t.Size = prev.Size
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
	} else {
		fresh = slices.Collect(maps.Keys(values))
	}
	slices.Sort(fresh)
	// Also a slot just left is not given away in the same step: its last
	// connections are still being made.
	taken := map[int]bool{}
	if prev != nil && len(fresh) > 0 {
		for _, id := range prev.Used {
			taken[id] = true
		}
	}
	next := 1
	for _, v := range fresh {
		for taken[next] {
			next++
		}
		taken[next] = true
		t.Used[v] = next
	}
	for t.Size < 2*len(t.Used) || t.Size < next {
		t.Size *= 2
	}
	return t
}
