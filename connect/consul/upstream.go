package consul

import (
	"cmp"
	"slices"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// upstream is one upstream of a sidecar, and what is known of it. It costs nothing while
// nothing of it changes.
type upstream struct {
	*declared
	client    *Client
	own       string   // datacenter
	consumers []string // peers that it is exported to, if it is
	asked     watch    // the chain, or the query

	made   *made // what is in force
	next   *made // what comes into force once its targets were heard of; nil: nothing
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
	asked []watch // for its instances, and what else is about it

	turn   uint64 // of the newest answer that noun was made from
	domain string
	noun   *connect.Target
}

// newUpstream begins as if the chain were the default one.
func newUpstream(c *Client, d *declared, own string) *upstream {
	u := &upstream{declared: d, client: c, own: own}
	switch {
	case d.query:
		u.asked = c.query(d, own)
	case d.peer != "":
		u.asked = c.peered(destination{service: d.service, peer: d.peer})
	default:
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
	if u.protocol != "" && u.peer == "" { // what a peer says of its own service counts
		protocol = u.protocol
	}
	if idle == 0 {
		idle = idleOf(protocol)
	}
	extras := u.extras.fit(protocol, u.where, &m.notices)
	snippet := connect.UpstreamSnippet
	if extras.snippets[snippet] != "" {
		snippet = ownSnippet(u.declared)
	}
	longest := time.Duration(0)
	for _, r := range c.groups {
		g := r.group
		g.Protocol, g.Idle, g.Limits, g.Passive = protocol, idle, u.limits, u.passive
		g.Affinity, g.SlowStart, g.Queue, g.Snippet = extras.affinity, extras.slow, extras.queue, snippet
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
	m.listener = &connect.Listener{Name: u.declared.name, Role: connect.Local, Bind: u.bind, Extras: extras.listener, Origin: registered + ": " + u.where, Branches: []connect.Branch{{Protocol: protocol, Chain: connect.Chain{Routes: c.routes}}}}
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
	one := &aim{name: to.name() + connect.TargetName(u.suffix), of: to}
	switch {
	case u.query:
		one.name, one.asked = connect.TargetName(u.group), []watch{u.asked}
	case to.peer != "":
		one.asked = []watch{u.client.peered(to), u.client.peerings()}
		if to.via != "" {
			one.asked = append(one.asked, u.client.meshGateways())
		}
	case to.via != "":
		one.asked = []watch{u.client.endpoints(to.directly()), u.client.meshGateways()}
	default:
		one.asked = []watch{u.client.endpoints(to)}
	}
	m.aims = append(m.aims, one)
	return one
}

// instances are who may be called; false: nothing was heard yet.
func (a *aim) instances(st *state, own string) (instances, bool) {
	if a.of.via == "" {
		return heard[instances](st, a.asked[0].key)
	}
	g, known := heard[gateways](st, a.asked[len(a.asked)-1].key)
	out := g.through(a.of, own)
	behind, named := heard[instances](st, a.asked[0].key)
	if a.of.peer != "" {
		out.ids, out.sni, known = behind.ids, behind.sni, known && named
	}
	if named && len(behind.endpoints) == 0 {
		out.endpoints = nil // gateways of a service without a healthy instance lead nowhere
	}
	return out, known
}

// targetGrace bounds how long an upstream keeps its old targets while of one of the new
// ones nothing was heard.
const targetGrace = 5 * time.Second

// follow reads the chain if it has changed, and puts it into force once every target was heard
// of, or after targetGrace; until then the old chain serves, if its own targets were heard of. It
// also serves on if the new chain cannot be read.
func (u *upstream) follow(st *state) {
	if turn := st.turnOf(u.asked.key); !u.query && turn != u.turn {
		u.turn = turn
		switch compiled, err := u.read(st); {
		case err != nil:
			u.broken = err.Error()
		case compiled != nil:
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

// read is what the chain says now. Of a peer's service only the protocol is known; nil: it is
// as it was.
func (u *upstream) read(st *state) (*compiled, error) {
	if u.peer == "" {
		c, _ := heard[*chain](st, u.asked.key)
		return u.compile(c, u.own)
	}
	list, _ := heard[instances](st, u.asked.key)
	if !u.made.assumed && (list.protocol == "" || list.protocol == u.made.listener.Protocol()) {
		return nil, nil
	}
	c := directly(u.declared)
	if list.protocol != "" {
		c.protocol = list.protocol
	}
	return c, nil
}

// heard reports whether something was heard of every target.
func (m *made) heard(st *state) bool {
	return !slices.ContainsFunc(m.aims, func(a *aim) bool {
		return slices.ContainsFunc(a.asked, func(w watch) bool { return st.turnOf(w.key) == 0 })
	})
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
				out = append(out, a.asked...)
			}
			if list, ok := a.instances(st, u.own); ok && list.hosts {
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
	u.made.listener = to.listener(u.made.listener)
	return u.lead(st, to, domain)
}

// lead adds the groups and targets that an upstream leads to.
func (u *upstream) lead(st *state, to *nouns, domain string) bool {
	m := u.made
	for i, g := range m.groups {
		m.groups[i] = to.group(g)
	}
	for _, a := range m.aims {
		a.add(st, to, domain, u.own)
	}
	return !m.assumed && m.heard(st)
}

// peers are those whose roots an upstream needs.
func (u *upstream) peers(visit func(peer string)) {
	for _, a := range u.made.aims {
		if a.of.peer != "" {
			visit(a.of.peer)
		}
	}
}

func (a *aim) add(st *state, to *nouns, domain, own string) {
	turn := uint64(0)
	for i := range a.asked {
		turn = max(turn, st.turnOf(a.asked[i].key))
	}
	if list, _ := a.instances(st, own); a.noun == nil || a.turn != turn || a.domain != domain || list.hosts {
		a.noun = &connect.Target{Name: a.name, Service: a.of.service, Subset: a.of.subset, Datacenter: list.dc, Peer: a.of.peer, Endpoints: st.addressed(list.endpoints),
			Dial: connect.Dial{Bundle: connect.OwnBundle, Leaf: connect.OwnLeaf, SNI: list.sni}}
		if a.of.peer != "" {
			a.noun.Dial.Bundle = bundleOf(a.of.peer)
		}
		for _, id := range list.ids {
			id.TrustDomain = cmp.Or(id.TrustDomain, domain)
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
