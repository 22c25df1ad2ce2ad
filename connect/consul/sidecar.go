package consul

import (
	"reflect"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// sidecar is the kind of proxy that stands beside one instance of a service.
type sidecar struct {
	client       *Client
	registration string // the watch's key

	turn     uint64 // of the registration that follows
	service  *api.AgentService
	inbound  *inbound
	declared []*declared
	notices  connect.Notices

	upstreams map[string]*upstream // by name
	nouns     *nouns
	policy    *intentions.Policy
	policyFor intentions.Config
}

func newSidecar(c *Client, registration string) kind {
	return &sidecar{client: c, registration: registration, upstreams: map[string]*upstream{}, nouns: &nouns{}}
}

// decode reads the registration when it is another.
func (k *sidecar) decode(st *state) {
	turn := st.turnOf(k.registration)
	if k.turn == turn {
		return
	}
	k.turn = turn
	k.service, _ = heard[*api.AgentService](st, k.registration)
	k.notices = nil
	k.inbound = decodeInbound(k.service, &k.notices)
	k.declared = upstreams(k.service, k.inbound.binds(), &k.notices)
	old := k.upstreams
	k.upstreams = make(map[string]*upstream, len(k.declared))
	for _, d := range k.declared {
		u := old[d.name]
		if u == nil || !reflect.DeepEqual(u.declared, d) {
			u = newUpstream(k.client, d, k.service.Datacenter)
		}
		k.upstreams[d.name] = u
	}
}

func (k *sidecar) name() string { return k.service.Proxy.DestinationServiceName }

func (k *sidecar) transparent() bool { return k.service.Proxy.Mode == api.ProxyModeTransparent }

// tlsModes are the entries that may say that mutual TLS is permissive, of which the first
// that says anything counts. That only means something with transparent proxying.
func (k *sidecar) tlsModes() []watch {
	return []watch{k.client.tlsMode(api.ServiceDefaults, k.name()), k.client.tlsMode(api.ProxyDefaults, api.ProxyConfigGlobal)}
}

func (k *sidecar) wants(st *state) []watch {
	k.decode(st)
	c, name := k.client, k.name()
	out := []watch{c.roots(), c.mesh(), c.leaf(name), c.intentions(name), c.defaultAllow(name), c.extensions(name)}
	if k.requiresTokens(st) {
		out = append(out, c.providers())
	}
	if k.transparent() {
		out = append(out, k.tlsModes()...)
	}
	for _, d := range k.declared {
		out = append(out, k.upstreams[d.name].wants(st)...)
	}
	return out
}

func (k *sidecar) requiresTokens(st *state) bool {
	list, _ := heard[[]intentions.Intention](st, k.client.intentions(k.name()).key)
	return slices.ContainsFunc(list, requiresToken)
}

func (k *sidecar) permissive(st *state) bool {
	if p := k.service.Proxy; !k.transparent() || p.LocalServicePort <= 0 || p.LocalServiceSocketPath != "" {
		return false
	}
	for _, w := range k.tlsModes() {
		if mode, _ := heard[api.MutualTLSMode](st, w.key); mode != api.MutualTLSModeDefault {
			return mode == api.MutualTLSModePermissive
		}
	}
	return false
}

func (k *sidecar) assemble(st *state) (snap *connect.Snapshot, slow bool) {
	k.decode(st)
	c, name := k.client, k.name()
	roots, haveRoots := heard[*certs.Roots](st, c.roots().key)
	leaf, haveLeaf := heard[*certs.Leaf](st, c.leaf(name).key)
	list, haveIntentions := heard[[]intentions.Intention](st, c.intentions(name).key)
	allow, haveDefault := heard[bool](st, c.defaultAllow(name).key)
	if !haveRoots || !haveLeaf || !haveIntentions || !haveDefault {
		return nil, true
	}
	if leaf.ID.TrustDomain != roots.TrustDomain {
		return nil, true // a new cluster: the other half is on its way
	}
	mesh, haveMesh := heard[meshEntry](st, c.mesh().key)
	tokens, haveProviders := heard[providers](st, c.providers().key)
	slow = !haveMesh || !haveProviders && k.requiresTokens(st)
	if k.transparent() {
		for _, w := range k.tlsModes() {
			slow = slow || st.turnOf(w.key) == 0
		}
	}
	named, _ := heard[connect.Notices](st, c.extensions(name).key)

	notices := slices.Concat(k.notices, tokens.notices, named)
	proxy := connect.Proxy{ID: k.service.ID, Service: name, Namespace: k.service.Namespace, Partition: k.service.Partition,
		Datacenter: k.service.Datacenter, TrustDomain: roots.TrustDomain}
	guard := &connect.Guard{Leaf: connect.OwnLeaf, Callers: connect.OwnBundle, CallerHeader: k.inbound.callerHeader, Policy: k.decides(proxy, list, allow, tokens.list)}
	guard.Normalize, guard.SanitizeXFCC = mesh.decode(&notices)

	now := k.nouns.next()
	k.inbound.add(now, guard, k.permissive(st))
	for _, d := range k.declared {
		u := k.upstreams[d.name]
		slow = !u.add(st, now, roots.TrustDomain) || slow
		notices = append(notices, u.made.notices...)
	}
	k.nouns = now
	snap = &connect.Snapshot{Proxy: proxy, AccessLog: k.inbound.accessLog, Telemetry: k.inbound.telemetry, Notices: notices.Sorted(),
		Leaves: map[connect.LeafName]*certs.Leaf{connect.OwnLeaf: leaf}, Bundles: map[connect.BundleName]*certs.Roots{connect.OwnBundle: roots}}
	now.into(snap)
	return snap, slow
}

// decides is the policy of what was heard: the same one as long as that is the same.
func (k *sidecar) decides(p connect.Proxy, list []intentions.Intention, allow bool, tokens []*intentions.Provider) *intentions.Policy {
	conf := intentions.Config{Destination: p.Service, TrustDomain: p.TrustDomain,
		ServerName: p.SPIFFEID().SNI(""), Community: p.Namespace == "" && p.Partition == "",
		HTTP: k.inbound.protocol.IsHTTP(), DefaultAllow: allow, Intentions: list, Providers: tokens}
	if k.policy == nil || !reflect.DeepEqual(conf, k.policyFor) {
		k.policy, k.policyFor = intentions.NewPolicy(conf), conf
	}
	return k.policy
}

// upstream is one of a sidecar's, and what is known of it. One of which nothing has changed
// costs nothing.
type upstream struct {
	*declared
	client *Client
	own    string // datacenter
	asked  watch  // the chain, or the query

	made  made // what is in force
	next  made // what is to be, once its target was heard of
	since time.Time
}

// made is what a chain has become.
type made struct {
	turn     uint64 // of the chain; 0: it was not heard yet
	listener *connect.Listener
	group    *connect.Group
	target   watch
	name     connect.TargetName
	service  string
	notices  connect.Notices

	of     uint64 // the turn that noun was made in
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
	u.made = u.make(resolved{to: destination{service: d.service, dc: d.dc, other: d.other}, protocol: connect.TCP, connect: defaultConnect})
	return u
}

// make makes the nouns of what the chain leads to.
func (u *upstream) make(r resolved) made {
	m := made{name: r.to.name(), service: r.to.service, notices: r.notices}
	if u.query {
		m.name, m.target = connect.TargetName(u.group), u.asked
	} else {
		m.target = u.client.endpoints(r.to)
	}
	protocol, timeout, idle := r.protocol, r.connect, u.idle
	if u.protocol != "" {
		protocol = u.protocol
	}
	if u.connect > 0 {
		timeout = u.connect
	}
	if idle == 0 {
		switch {
		case protocol == connect.GRPC:
			idle = defaultStream
		case protocol.IsHTTP():
			idle = defaultUpstreamReq
		default:
			idle = defaultTCPIdle
		}
	}
	m.group = &connect.Group{Name: u.group, Protocol: protocol, Targets: []connect.TargetName{m.name}, Connect: timeout, Idle: idle, Limits: u.limits, Passive: u.passive}
	m.listener = &connect.Listener{Name: u.declared.name, Role: connect.Local, Bind: u.bind, Branches: []connect.Branch{{Protocol: protocol, Chain: connect.Direct(u.group)}}}
	if protocol.IsHTTP() {
		idle = max(idle, defaultHTTPIdle) // the client may be idle longer than a request may take
	} else {
		m.listener.MaxConnections = u.limits.MaxConnections
	}
	m.listener.Idle = max(idle, 5*timeout)
	return m
}

// follow looks at the chain, and takes what it has become when its target was heard of, or
// when that takes too long: till then what was in force serves.
func (u *upstream) follow(st *state) {
	turn := st.turnOf(u.asked.key)
	if chain, ok := heard[*api.CompiledDiscoveryChain](st, u.asked.key); ok && turn != u.made.turn && turn != u.next.turn {
		u.next, u.since = u.make(u.resolve(chain, u.own)), time.Now()
		u.next.turn = turn
	}
	if u.next.turn == 0 {
		return
	}
	late := u.since.Add(targetGrace)
	if st.turnOf(u.next.target.key) == 0 && st.turnOf(u.made.target.key) != 0 && time.Now().Before(late) {
		st.wakeAt(late)
		return
	}
	u.made, u.next = u.next, made{}
}

// targetGrace bounds how long an upstream keeps its old target while of the new one nothing
// was heard.
const targetGrace = 5 * time.Second

func (u *upstream) wants(st *state) []watch {
	u.follow(st)
	out := []watch{u.asked}
	for _, m := range []*made{&u.made, &u.next} {
		if m.turn == 0 || u.query {
			continue
		}
		out = append(out, m.target)
		if list, ok := heard[instances](st, m.target.key); ok && namedInstances(list) {
			out = append(out, addresses(list)...)
		}
	}
	if u.query {
		if list, ok := heard[instances](st, u.asked.key); ok && namedInstances(list) {
			out = append(out, addresses(list)...)
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
	m := &u.made
	to.listener(m.listener)
	to.group(m.group)
	turn := st.turnOf(m.target.key)
	if list, _ := heard[instances](st, m.target.key); m.noun == nil || m.of != turn || m.domain != domain || namedInstances(list) {
		m.noun = &connect.Target{Name: m.name, Service: m.service, Datacenter: list.dc, Endpoints: st.addressed(list.endpoints),
			Dial: connect.Dial{Bundle: connect.OwnBundle, Leaf: connect.OwnLeaf}}
		for _, id := range list.ids {
			id.TrustDomain = domain
			m.noun.Dial.IDs = append(m.noun.Dial.IDs, id)
		}
		m.of, m.domain = turn, domain
	}
	m.noun = to.target(m.noun)
	return turn != 0 && (u.query || m.turn != 0)
}
