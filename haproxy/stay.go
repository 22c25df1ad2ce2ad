package haproxy

import (
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// stay puts upstreams that cannot be rendered, or that HAProxy refuses, back as they ran last,
// so that a broken config entry takes nothing down. If none of them ran, the result has the
// same nouns as snap.
func (m *Manager) stay(snap *connect.Snapshot, refused []*render.Refused) *connect.Snapshot {
	out := *snap
	for _, r := range refused {
		if r.Site != "" || !r.Listener.Role.Optional() || m.ran == nil || m.taken[r.Listener] {
			continue
		}
		old := m.served.find(r.Listener)
		if old == nil || old == r.Listener {
			continue
		}
		r.Stays = true
		out.Listeners = replace(out.Listeners, old, func(a, b *connect.Listener) int {
			if a.Role != b.Role {
				return int(a.Role - b.Role)
			}
			return strings.Compare(a.Name, b.Name)
		})
		for _, g := range groups(m.ran, old) {
			if g == nil {
				continue
			}
			out.Groups = replace(out.Groups, g, func(a, b *connect.Group) int { return strings.Compare(string(a.Name), string(b.Name)) })
			for _, name := range g.Targets {
				if t := m.ran.Target(name); t != nil && out.Target(name) == nil {
					out.Targets = replace(out.Targets, t, func(a, b *connect.Target) int { return strings.Compare(string(a.Name), string(b.Name)) })
				}
			}
		}
	}
	return &out
}

// replace returns a copy of a sorted list with one in the place of the element that order finds
// equal, or inserted if there is none.
func replace[T any](list []*T, one *T, order func(a, b *T) int) []*T {
	i, found := slices.BinarySearchFunc(list, one, order)
	list = slices.Clone(list)
	if found {
		list[i] = one
		return list
	}
	return slices.Insert(list, i, one)
}
