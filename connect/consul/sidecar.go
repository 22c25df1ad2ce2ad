package consul

import (
	"cmp"
	"reflect"
	"slices"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// sidecar is the kind of proxy that stands beside one instance of a service.
type sidecar struct {
	client       *Client
	registration string // the watch's key

	turn     uint64 // of the registration from which the fields below were decoded
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

// decode reads the registration if it has changed.
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

// tlsModes returns the watches for the entries that may make mutual TLS permissive; the first
// entry that sets a mode counts. The mode only means something with transparent proxying.
func (k *sidecar) tlsModes() []watch {
	return []watch{k.client.tlsMode(api.ServiceDefaults, k.name()), k.client.tlsMode(api.ProxyDefaults, api.ProxyConfigGlobal)}
}

func (k *sidecar) wants(st *state) []watch {
	k.decode(st)
	c, name := k.client, k.name()
	out := []watch{c.roots(), c.mesh(), c.leaf(name), c.intentions(name), c.defaultAllow(name), c.extensions(name)}
	if k.inbound.bind.Port != 0 {
		out = append(out, c.peerings())
	}
	if k.requiresTokens(st) {
		out = append(out, c.providers())
	}
	if k.transparent() {
		out = append(out, k.tlsModes()...)
	}
	if k.inbound.checks {
		out = append(out, c.checks(k.service.Proxy.DestinationServiceID))
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
	all, havePeers := heard[peerings](st, c.peerings().key)
	slow = slow || !havePeers && k.inbound.bind.Port != 0
	peers := all.trusted(roots.TrustDomain, &notices)
	k.unknown(&all, list, &notices)
	guard := &connect.Guard{Leaf: connect.OwnLeaf, Callers: connect.OwnBundle, CallerHeader: k.inbound.callerHeader, Policy: k.decides(proxy, list, allow, tokens.list, peers), Peers: callersOf(peers, roots.TrustDomain)}
	guard.Normalize, guard.SanitizeXFCC = mesh.decode(&notices)
	incoming, outgoing := mesh.tls(&notices)

	now := k.nouns.next()
	checks, haveChecks := heard[[]exposed](st, c.checks(k.service.Proxy.DestinationServiceID).key)
	slow = slow || k.inbound.checks && !haveChecks
	k.inbound.add(now, guard, k.permissive(st), checks)
	for _, d := range k.declared {
		u := k.upstreams[d.name]
		slow = !u.add(st, now, roots.TrustDomain) || slow
		notices = append(notices, u.notices()...)
	}
	k.nouns = now
	snippets := k.snippets(&notices)
	snap = &connect.Snapshot{Snippets: snippets, Peers: all.shown(), Proxy: proxy, AccessLog: k.inbound.accessLog, Telemetry: k.inbound.telemetry, Incoming: incoming, Outgoing: outgoing, Notices: notices.Sorted(),
		Leaves: map[connect.LeafName]*certs.Leaf{connect.OwnLeaf: leaf}, Bundles: bundles(roots, peers)}
	now.into(snap)
	return snap, slow
}

// unknown says which right is missing where callers or upstreams of peers need it.
func (k *sidecar) unknown(p *peerings, list []intentions.Intention, n *connect.Notices) {
	if !p.denied {
		if p.list != nil {
			k.called(func(d *declared, peer string) {
				if p.find(peer) == nil {
					n.Add(d.where, "peer", peer, "there is no such peer; nobody of it is called")
				}
			})
		}
		return
	}
	const why = "the token lacks this right, without which the roots of peers are not known: "
	k.called(func(d *declared, peer string) {
		n.Add(d.where, "peering:read", "", why+"nobody of peer "+peer+" is called")
	})
	if slices.ContainsFunc(list, func(i intentions.Intention) bool { return i.Source.Peer != "" }) {
		n.Add("intentions", "peering:read", "", why+"callers of peers are denied")
	}
}

// called visits every peer that an upstream leads to.
func (k *sidecar) called(visit func(d *declared, peer string)) {
	for _, d := range k.declared {
		k.upstreams[d.name].peers(func(peer string) { visit(d, peer) })
	}
}

// bundles are our own roots and those of every peer. A peer whose roots are not known is called by
// nobody, and calls nobody.
func bundles(own *certs.Roots, peers []*peering) map[connect.BundleName]*certs.Roots {
	out := map[connect.BundleName]*certs.Roots{connect.OwnBundle: own}
	for _, p := range peers {
		out[bundleOf(p.Name)] = p.roots
	}
	return out
}

// decides returns the policy made from what was heard; while that does not change, it is the
// same pointer.
func (k *sidecar) decides(p connect.Proxy, list []intentions.Intention, allow bool, tokens []*intentions.Provider, peers []*peering) *intentions.Policy {
	conf := intentions.Config{Destination: p.Service, TrustDomain: p.TrustDomain,
		ServerName: p.SPIFFEID().SNI(""), Community: p.Namespace == "" && p.Partition == "",
		HTTP: k.inbound.protocol.IsHTTP(), DefaultAllow: allow, Intentions: list, Providers: tokens,
		Peers: domains(peers), Gateway: certs.MeshGateway(p.TrustDomain, p.Datacenter)}
	if k.policy == nil || !reflect.DeepEqual(conf, k.policyFor) {
		k.policy, k.policyFor = intentions.NewPolicy(conf), conf
	}
	return k.policy
}

// snippets are the lines in HAProxy's own words, if they are allowed.
func (k *sidecar) snippets(n *connect.Notices) map[connect.SnippetName]string {
	out := map[connect.SnippetName]string{}
	add := func(where string, list map[connect.SnippetName]string, own connect.SnippetName) {
		for name, text := range list {
			if !k.client.snippets {
				n.Add(where, "haproxy snippet "+string(name), "", "it is only used with -allow-snippets")
				continue
			}
			out[cmp.Or(own, name)] = text
		}
	}
	add("proxy", k.inbound.extras.snippets, "")
	for _, d := range k.declared {
		add(d.where, d.extras.snippets, ownSnippet(d))
	}
	return out
}

// ownSnippet names the lines of one upstream.
func ownSnippet(d *declared) connect.SnippetName {
	return connect.UpstreamSnippet + " " + connect.SnippetName(d.name)
}
