package consul

import (
	"slices"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// upstream is one of a sidecar's, and what is known of it. One of which nothing has changed
// costs nothing.
type upstream struct {
	*declared
	client *Client
	own    string // datacenter
	asked  watch  // the chain, or the query

	made   *made // what is in force
	next   *made // what is to be, once its targets were heard of; nil: nothing is
	since  time.Time
	turn   uint64 // of the chain as last read
	broken string // why the chain as last read is not in force; "" if it is
}

// made is what a chain has become.
type made struct {
	assumed  bool // nothing was heard of the chain yet
	listener *connect.Listener
	groups   []*connect.Group
	aims     []*aim
	notices  connect.Notices
}

// aim is one target of an upstream, as last made.
type aim struct {
	name  connect.TargetName
	of    destination
	asked watch

	turn   uint64 // that noun was made in
	domain string
	noun   *connect.Target
}

// newUpstream begins as if the chain were the default one.
func newUpstream(c *Client, d *declared, own string) *upstream {
	u := &upstream{declared: d, client: c, own: own}
	if d.query {
		u.asked = c.query(d, own)
	} else {
		u.asked = c.chain(d)
	}
	u.made = u.make(directly(d))
	u.made.assumed = !d.query
	return u
}

// make makes the nouns of what a chain says.
func (u *upstream) make(c *compiled) *made {
	m := &made{notices: c.notices}
	protocol, idle := c.protocol, u.idle
	if u.protocol != "" {
		protocol = u.protocol
	}
	if idle == 0 {
		idle = idleOf(protocol)
	}
	longest := time.Duration(0)
	for _, r := range c.groups {
		g := r.group
		g.Protocol, g.Idle, g.Limits, g.Passive = protocol, idle, u.limits, u.passive
		if u.connect > 0 {
			g.Connect = u.connect
		}
		longest = max(longest, g.Connect)
		for _, to := range r.targets {
			one := u.aim(m, to)
			if !slices.Contains(g.Targets, one.name) {
				g.Targets = append(g.Targets, one.name)
			}
		}
		m.groups = append(m.groups, &g)
	}
	m.listener = &connect.Listener{Name: u.declared.name, Role: connect.Local, Bind: u.bind, Branches: []connect.Branch{{Protocol: protocol, Chain: connect.Chain{Routes: c.routes}}}}
	if protocol.IsHTTP() {
		idle = max(idle, defaultHTTPIdle) // the client may be idle longer than a request may take
	} else {
		m.listener.MaxConnections = u.limits.MaxConnections
	}
	m.listener.Idle = max(idle, 5*longest)
	return m
}

// aim adds a destination to what is made, once.
func (u *upstream) aim(m *made, to destination) *aim {
	for _, one := range m.aims {
		if one.of == to {
			return one
		}
	}
	one := &aim{name: to.name(), of: to}
	if u.query {
		one.name, one.asked = connect.TargetName(u.group), u.asked
	} else {
		one.asked = u.client.endpoints(to)
	}
	m.aims = append(m.aims, one)
	return one
}

// targetGrace bounds how long an upstream keeps its old targets while of one of the new
// ones nothing was heard.
const targetGrace = 5 * time.Second

// follow looks at the chain, and takes what it has become when every target was heard of, or
// when that takes too long: till then what was in force serves. A chain that cannot be read
// leaves it in force, too.
func (u *upstream) follow(st *state) {
	if turn := st.turnOf(u.asked.key); !u.query && turn != u.turn {
		u.turn = turn
		c, _ := heard[*chain](st, u.asked.key)
		switch compiled, err := u.compile(c, u.own); {
		case err != nil:
			u.broken = err.Error()
		default:
			u.next, u.since, u.broken = u.make(compiled), time.Now(), ""
		}
	}
	if u.next == nil {
		return
	}
	if late := u.since.Add(targetGrace); !u.next.heard(st) && u.made.heard(st) && time.Now().Before(late) {
		st.wakeAt(late)
		return
	}
	u.made, u.next = u.next, nil
	st.shaped = true // what was in force is not asked for any more
}

// heard reports whether something was heard of every target.
func (m *made) heard(st *state) bool {
	return !slices.ContainsFunc(m.aims, func(a *aim) bool { return st.turnOf(a.asked.key) == 0 })
}

func (u *upstream) wants(st *state) []watch {
	u.follow(st)
	out := []watch{u.asked}
	for _, m := range []*made{u.made, u.next} {
		if m == nil || m.assumed {
			continue
		}
		for _, a := range m.aims {
			if !u.query {
				out = append(out, a.asked)
			}
			if list, ok := heard[instances](st, a.asked.key); ok && list.hosts {
				out = append(out, addresses(list)...)
			}
		}
	}
	return out
}

// addresses are the watches for the host names of instances.
func addresses(list instances) (out []watch) {
	for _, e := range list.endpoints {
		if named(e) {
			out = append(out, address(e.Address))
		}
	}
	return out
}

// add adds the nouns of an upstream, and reports whether everything was heard of.
func (u *upstream) add(st *state, to *nouns, domain string) bool {
	u.follow(st)
	m := u.made
	m.listener = to.listener(m.listener)
	for i, g := range m.groups {
		m.groups[i] = to.group(g)
	}
	for _, a := range m.aims {
		a.add(st, to, domain)
	}
	return !m.assumed && m.heard(st)
}

func (a *aim) add(st *state, to *nouns, domain string) {
	turn := st.turnOf(a.asked.key)
	if list, _ := heard[instances](st, a.asked.key); a.noun == nil || a.turn != turn || a.domain != domain || list.hosts {
		a.noun = &connect.Target{Name: a.name, Service: a.of.service, Subset: a.of.subset, Datacenter: list.dc, Endpoints: st.addressed(list.endpoints),
			Dial: connect.Dial{Bundle: connect.OwnBundle, Leaf: connect.OwnLeaf}}
		for _, id := range list.ids {
			id.TrustDomain = domain
			a.noun.Dial.IDs = append(a.noun.Dial.IDs, id)
		}
		a.turn, a.domain = turn, domain
	}
	a.noun = to.target(a.noun)
}

// notices of what is not honoured.
func (u *upstream) notices() connect.Notices {
	n := u.made.notices
	if u.broken != "" {
		n = append(slices.Clone(n), connect.Notice{Where: u.where, Key: "discovery chain", Why: u.broken + "; the last one stays in force"})
	}
	return n
}
