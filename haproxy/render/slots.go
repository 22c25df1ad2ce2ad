package render

import (
	"maps"
	"slices"
)

// minSlots is how many sockets a class starts with. Sockets cannot be added
// without a reload, so there are always at least twice as many as endpoints: a
// rolling replacement of all of them needs none.
const minSlots = 64

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

func (s *slots) want(class, value string) {
	s.class(class)
	s.wanted[class][value] = true
}

func (s *slots) assign() {
	for class, prev := range s.prev { // a class that became empty keeps its sockets
		if prev != nil {
			s.class(class)
		}
	}
	for class, values := range s.wanted {
		t := &SlotTable{Class: class, Size: minSlots, Used: make(map[string]int, len(values))}
		taken := map[int]bool{}
		if prev := s.prev[class]; prev != nil {
			t.Size = prev.Size
			for v, id := range prev.Used {
				if values[v] {
					t.Used[v] = id
				}
				// Also a slot just left is not given away in the same step: its last
				// connections are still being made.
				taken[id] = true
			}
		}
		next := 1
		for _, v := range slices.Sorted(maps.Keys(values)) {
			if t.Used[v] != 0 {
				continue
			}
			for taken[next] {
				next++
			}
			taken[next] = true
			t.Used[v] = next
		}
		for t.Size < 2*len(t.Used) || t.Size < next {
			t.Size *= 2
		}
		s.tables[class] = t
	}
}
