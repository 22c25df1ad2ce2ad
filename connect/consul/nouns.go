package consul

import (
	"cmp"
	"reflect"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// nouns are those of one snapshot, and of the one before: one that comes out the same is
// the same pointer, which is how whoever reads snapshots sees what has changed.
type nouns struct {
	listeners map[listenerKey]*connect.Listener
	groups    map[connect.GroupName]*connect.Group
	targets   map[connect.TargetName]*connect.Target
	before    *nouns
}

// listenerKey tells listeners apart: an upstream may be called as a listener of ours is.
type listenerKey struct {
	role connect.Role
	name string
}

// next begins the nouns of another snapshot.
func (n *nouns) next() *nouns {
	n.before = nil
	return &nouns{listeners: make(map[listenerKey]*connect.Listener, len(n.listeners)), groups: make(map[connect.GroupName]*connect.Group, len(n.groups)),
		targets: make(map[connect.TargetName]*connect.Target, len(n.targets)), before: n}
}

func keep[K comparable, T any](all, before map[K]*T, name K, one *T) *T {
	if old := before[name]; old != nil && (old == one || reflect.DeepEqual(old, one)) {
		one = old
	}
	all[name] = one
	return one
}

func (n *nouns) listener(l *connect.Listener) *connect.Listener {
	return keep(n.listeners, n.before.listeners, listenerKey{l.Role, l.Name}, l)
}

func (n *nouns) group(g *connect.Group) *connect.Group {
	return keep(n.groups, n.before.groups, g.Name, g)
}

func (n *nouns) target(t *connect.Target) *connect.Target {
	return keep(n.targets, n.before.targets, t.Name, t)
}

// into sorts them into a snapshot.
func (n *nouns) into(s *connect.Snapshot) {
	s.Listeners = sorted(n.listeners, func(a, b *connect.Listener) int {
		return cmp.Or(int(a.Role-b.Role), strings.Compare(a.Name, b.Name))
	})
	s.Groups = sorted(n.groups, func(a, b *connect.Group) int { return strings.Compare(string(a.Name), string(b.Name)) })
	s.Targets = sorted(n.targets, func(a, b *connect.Target) int { return strings.Compare(string(a.Name), string(b.Name)) })
}

func sorted[K comparable, T any](all map[K]*T, order func(a, b *T) int) []*T {
	out := make([]*T, 0, len(all))
	for _, one := range all {
		out = append(out, one)
	}
	slices.SortFunc(out, order)
	return out
}
