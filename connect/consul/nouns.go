package consul

import (
	"cmp"
	"reflect"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// nouns collects the listeners, groups and targets of one snapshot. A noun that is equal to the
// one before it is the same pointer, by which readers of snapshots see what has changed.
type nouns struct {
	listeners kept[listenerKey, connect.Listener]
	groups    kept[connect.GroupName, connect.Group]
	targets   kept[connect.TargetName, connect.Target]
}

// listenerKey tells listeners apart: an upstream may have the name of one of our own listeners.
type listenerKey struct {
	role connect.Role
	name string
}

// kept is nouns of one kind, by name and in the order in which they came.
type kept[K comparable, T any] struct {
	now, before map[K]*T
	list        []*T
}

func (k *kept[K, T]) next() kept[K, T] {
	return kept[K, T]{make(map[K]*T, len(k.now)), k.now, make([]*T, 0, len(k.list))}
}

// add adds a noun once, and returns the pointer that stands for it: the one of the snapshot
// before, if the two are equal.
func (k *kept[K, T]) add(name K, one *T) *T {
	if have := k.now[name]; have != nil {
		return have
	}
	if old := k.before[name]; old != nil && (old == one || reflect.DeepEqual(old, one)) {
		one = old
	}
	k.now[name] = one
	k.list = append(k.list, one)
	return one
}

// next begins the nouns of another snapshot.
func (n *nouns) next() *nouns {
	return &nouns{n.listeners.next(), n.groups.next(), n.targets.next()}
}

func (n *nouns) listener(l *connect.Listener) *connect.Listener {
	return n.listeners.add(listenerKey{l.Role, l.Name}, l)
}

func (n *nouns) group(g *connect.Group) *connect.Group { return n.groups.add(g.Name, g) }

func (n *nouns) target(t *connect.Target) *connect.Target { return n.targets.add(t.Name, t) }

// into sorts them into a snapshot. They come nearly sorted.
func (n *nouns) into(s *connect.Snapshot) {
	s.Listeners, s.Groups, s.Targets = n.listeners.list, n.groups.list, n.targets.list
	slices.SortFunc(s.Listeners, func(a, b *connect.Listener) int {
		return cmp.Or(int(a.Role-b.Role), strings.Compare(a.Name, b.Name))
	})
	slices.SortFunc(s.Groups, func(a, b *connect.Group) int { return strings.Compare(string(a.Name), string(b.Name)) })
	slices.SortFunc(s.Targets, func(a, b *connect.Target) int { return strings.Compare(string(a.Name), string(b.Name)) })
}
