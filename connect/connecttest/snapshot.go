package connecttest

import (
	"slices"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Snapshot makes the snapshot of a service www without listeners: nobody calls it, and it
// calls nobody.
func Snapshot(leaf *certs.Leaf, roots *certs.Roots) *connect.Snapshot {
	return &connect.Snapshot{
		Proxy:   connect.Proxy{ID: "www-sidecar-proxy", Service: "www", Datacenter: "dc1", TrustDomain: roots.TrustDomain},
		Leaves:  map[connect.LeafName]*certs.Leaf{connect.OwnLeaf: leaf},
		Bundles: map[connect.BundleName]*certs.Roots{connect.OwnBundle: roots},
	}
}

// Way is a listener that leads to a group of one target.
type Way struct {
	Listener *connect.Listener
	Group    *connect.Group
	Target   *connect.Target
}

func way(l *connect.Listener, p connect.Protocol, group connect.GroupName, t *connect.Target) Way {
	l.Branches = []connect.Branch{{Protocol: p, Chain: connect.Direct(group)}}
	t.Name = connect.TargetName(group)
	return Way{l, &connect.Group{Name: group, Protocol: p, Targets: []connect.TargetName{t.Name}, Connect: 5 * time.Second, Idle: time.Minute}, t}
}

// Public is where callers come, and the application behind it. Nobody is let in.
func Public(p connect.Protocol) Way {
	w := way(&connect.Listener{Name: "public", Role: connect.Public, Bind: connect.Bind{Address: "0.0.0.0", Port: 21000}, Idle: time.Minute}, p, "local_app",
		&connect.Target{Dial: connect.Dial{How: connect.App}, Endpoints: []connect.Endpoint{{Name: "app", Address: "127.0.0.1", Port: 8080, Weight: 1}}})
	w.Listener.Branches[0].Guard = &connect.Guard{Leaf: connect.OwnLeaf, Callers: connect.OwnBundle, Policy: &intentions.Policy{}}
	return w
}

// Upstream makes an upstream whose endpoints must have this identity.
func Upstream(name string, p connect.Protocol, port int, id certs.SPIFFEID, endpoints ...connect.Endpoint) Way {
	return way(&connect.Listener{Name: name, Role: connect.Local, Bind: connect.Bind{Address: "127.0.0.1", Port: port}, Idle: 5 * time.Minute}, p,
		connect.GroupName(name+".default.dc1"), &connect.Target{Service: name, Datacenter: "dc1", Endpoints: endpoints,
			Dial: connect.Dial{IDs: []certs.SPIFFEID{id}, Leaf: connect.OwnLeaf, Bundle: connect.OwnBundle}})
}

// But returns a copy of the way with a change. The copy has its own nouns, which change may edit.
func (w Way) But(change func(*Way)) Way {
	l, g, t := *w.Listener, *w.Group, *w.Target
	l.Branches = slices.Clone(l.Branches)
	out := Way{&l, &g, &t}
	change(&out)
	return out
}

// Add puts ways into a snapshot, in the place of those of the same name.
func Add(s *connect.Snapshot, ways ...Way) {
	for _, w := range ways {
		Remove(s, w)
		s.Listeners, s.Groups, s.Targets = append(s.Listeners, w.Listener), append(s.Groups, w.Group), append(s.Targets, w.Target)
	}
	slices.SortFunc(s.Listeners, func(a, b *connect.Listener) int {
		if a.Role != b.Role {
			return int(a.Role - b.Role)
		}
		return strings.Compare(a.Name, b.Name)
	})
	slices.SortFunc(s.Groups, func(a, b *connect.Group) int { return strings.Compare(string(a.Name), string(b.Name)) })
	slices.SortFunc(s.Targets, func(a, b *connect.Target) int { return strings.Compare(string(a.Name), string(b.Name)) })
}

// Remove takes ways out of a snapshot, by name. Other snapshots keep theirs.
func Remove(s *connect.Snapshot, ways ...Way) {
	for _, w := range ways {
		s.Listeners = slices.DeleteFunc(slices.Clone(s.Listeners), func(l *connect.Listener) bool { return l.Role == w.Listener.Role && l.Name == w.Listener.Name })
		s.Groups = slices.DeleteFunc(slices.Clone(s.Groups), func(g *connect.Group) bool { return g.Name == w.Group.Name })
		s.Targets = slices.DeleteFunc(slices.Clone(s.Targets), func(t *connect.Target) bool { return t.Name == w.Target.Name })
	}
}
