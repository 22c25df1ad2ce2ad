package consul

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// meshGateway is the kind of proxy that passes connections of the mesh on by the name that
// they ask for: to services of its own datacenter, and to gateways of other datacenters and
// of peers. It ends no TLS of theirs.
type meshGateway struct {
	gateway
	exported map[string]*upstream // by service
	leaf     *certs.Leaf          // of the last roots that a leaf was signed under
	policy   *intentions.Policy
	policyOf intentions.Config
}

func newMeshGateway(c *Client, registration string) kind {
	return &meshGateway{gateway: newGateway(c, registration), exported: map[string]*upstream{}}
}

// federates reports whether servers of other datacenters are reached through this gateway.
func (k *meshGateway) federates() bool { return k.service.Meta["consul-wan-federation"] == "1" }

func (k *meshGateway) wants(st *state) []watch {
	k.decode(st)
	c := k.client
	out := []watch{c.roots(), c.mesh(), c.services(), c.resolvers(), c.meshGateways(), c.peerings(), c.exports()}
	if mesh, _ := heard[meshEntry](st, c.mesh().key); k.federates() || mesh.peersThroughGateways() {
		out = append(out, c.servers())
	}
	for _, d := range k.local(st) {
		out = append(out, k.endpoints(st, d))
	}
	list, _ := heard[peerings](st, c.peerings().key)
	for _, p := range list.list {
		for _, s := range p.StreamStatus.ImportedServices {
			if d, ok := importedFrom(p.Name, s); ok {
				out = append(out, c.peered(d))
			}
		}
	}
	http := false
	for _, x := range k.exports(st) {
		x.follow(st)
		out = append(out, x.wants(st)...)
		http = http || x.made.listener.Protocol().IsHTTP()
	}
	if roots, ok := heard[*certs.Roots](st, c.roots().key); ok && http {
		out = append(out, k.signed(roots))
	}
	return out
}

// signed is the watch for the gateway's own leaf, which is needed only where TLS of peers ends here.
func (k *meshGateway) signed(roots *certs.Roots) watch {
	return k.client.signed(certs.MeshGateway(roots.TrustDomain, k.own()), nil, roots.Fingerprint)
}

// manyServices is how many services a gateway follows by a connection each where the agent
// does not speak HTTP/2: it allows one address 200 of them. More are asked for in turn.
const (
	manyServices = 64
	servicesTurn = 2 * time.Second
)

// endpoints is the watch for one of the destinations in our own datacenter.
func (k *meshGateway) endpoints(st *state, d destination) watch {
	w := k.client.endpoints(d)
	if list, _ := heard[serviceNames](st, k.client.services().key); len(list) > manyServices && !strings.HasPrefix(k.client.addr, "https") {
		w.every = servicesTurn
		w.key += "\x00in turn"
	}
	return w
}

// local are the services of our own datacenter and their subsets.
func (k *meshGateway) local(st *state) (out []destination) {
	names, _ := heard[serviceNames](st, k.client.services().key)
	entries, _ := heard[resolvers](st, k.client.resolvers().key)
	for _, name := range names {
		r := entries[name]
		if r == nil || r.DefaultSubset == "" {
			out = append(out, destination{service: name, dc: k.own()})
		}
		if r == nil {
			continue
		}
		for _, subset := range slices.Sorted(maps.Keys(r.Subsets)) {
			def := r.Subsets[subset]
			out = append(out, destination{service: name, dc: k.own(), subset: subset, filter: def.Filter, onlyPassing: def.OnlyPassing})
		}
	}
	return out
}

// relay is the table of a gateway on its way: which name leads where.
type relay struct {
	to       *nouns
	branches []connect.Branch
	taken    map[string]bool
	notices  *connect.Notices
}

// name leads a name, or an ending after "*", to a target. The first that asks for it has it.
func (r *relay) name(sni string, t *connect.Target) {
	sni = strings.ToLower(sni)
	if r.taken[sni] {
		return
	}
	r.taken[sni] = true
	r.to.target(t)
	r.to.group(&connect.Group{Name: connect.GroupName(t.Name), Protocol: connect.TCP, Targets: []connect.TargetName{t.Name}, Connect: defaultConnect})
	r.branches = append(r.branches, connect.Branch{Match: connect.Match{SNI: sni}, Protocol: connect.TCP, Chain: connect.Direct(connect.GroupName(t.Name))})
}

// passed is a target that connections are passed on to.
func passed(name connect.TargetName, d destination, list []connect.Endpoint) *connect.Target {
	return &connect.Target{Name: name, Service: d.service, Subset: d.subset, Datacenter: d.dc, Peer: d.peer, Endpoints: list, Dial: connect.Dial{How: connect.Pass}}
}

func (k *meshGateway) assemble(st *state) (snap *connect.Snapshot, slow bool) {
	k.decode(st)
	c := k.client
	roots, haveRoots := heard[*certs.Roots](st, c.roots().key)
	_, haveNames := heard[serviceNames](st, c.services().key)
	if !haveRoots || !haveNames {
		return nil, true
	}
	notices := slices.Clone(k.notices)
	r := &relay{to: k.nouns.next(), taken: map[string]bool{}, notices: &notices}
	slow = k.services(st, r, roots.TrustDomain)
	slow = k.datacenters(st, r, roots.TrustDomain) || slow
	slow = k.servers(st, r, roots.TrustDomain) || slow
	all, _ := heard[peerings](st, c.peerings().key)
	peers := all.trusted(roots.TrustDomain, &notices)
	slow = k.peers(st, r, roots, peers) || slow
	k.relays(r)
	snap = &connect.Snapshot{Proxy: k.proxy("mesh gateway", roots.TrustDomain), Leaves: map[connect.LeafName]*certs.Leaf{}, Bundles: bundles(roots, peers), Peers: all.shown()}
	if k.leaf != nil {
		snap.Leaves[connect.OwnLeaf] = k.leaf
	}
	k.end(snap, r.to, notices)
	return snap, slow
}

// relayIdle is long: the servers' gossip of other datacenters goes through here, too.
const relayIdle = 24 * time.Hour

// services leads the names of services to their sidecars.
func (k *meshGateway) services(st *state, r *relay, domain string) (slow bool) {
	entries, _ := heard[resolvers](st, k.client.resolvers().key)
	for _, d := range k.local(st) {
		list, ok := heard[instances](st, k.endpoints(st, d).key)
		slow = slow || !ok
		if ok && len(list.endpoints) == 0 && d.subset == "" {
			continue // most names in the catalog are of no service of the mesh
		}
		t := passed(d.name(), d, list.endpoints)
		name := id(d.service, d.dc)
		name.TrustDomain = domain
		r.name(name.SNI(d.subset), t)
		if e := entries[d.service]; e != nil && e.DefaultSubset == d.subset {
			r.name(name.SNI(""), t)
		}
	}
	return slow || st.turnOf(k.client.resolvers().key) == 0
}

// datacenters leads everything that is of another datacenter to its gateways.
func (k *meshGateway) datacenters(st *state, r *relay, domain string) (slow bool) {
	all, ok := heard[gateways](st, k.client.meshGateways().key)
	for _, dc := range slices.Sorted(maps.Keys(all)) {
		if dc == k.own() {
			continue
		}
		d := destination{dc: dc}
		t := passed(connect.TargetName("gateways."+connect.SafeName(dc)), d, all[dc].wan)
		r.name("*."+dc+".internal."+domain, t)
		if k.federates() {
			r.name("server."+dc+"."+serverDomain, t)
			r.name("*.server."+dc+"."+serverDomain, t)
		}
	}
	return !ok
}

// serverDomain is what the names of Consul's servers end in: the agent's DNS domain, which no
// API tells who may only read services.
const serverDomain = "consul"

// servers leads to Consul's own servers: by their names for servers of other datacenters,
// and by one name for those of peers.
func (k *meshGateway) servers(st *state, r *relay, domain string) (slow bool) {
	mesh, haveMesh := heard[meshEntry](st, k.client.mesh().key)
	if !k.federates() && !mesh.peersThroughGateways() {
		return !haveMesh
	}
	list, ok := heard[[]server](st, k.client.servers().key)
	var rpc, peering []connect.Endpoint
	for _, s := range list {
		rpc = append(rpc, s.rpc)
		if s.grpc.Port != 0 && !s.replica {
			peering = append(peering, s.grpc)
		}
	}
	d := destination{service: "consul", dc: k.own()}
	if k.federates() {
		for _, s := range list {
			name := strings.ToLower(s.node)
			r.name(name+".server."+k.own()+"."+serverDomain, passed(connect.TargetName("server."+connect.SafeName(name)), d, []connect.Endpoint{s.rpc}))
		}
		r.name("server."+k.own()+"."+serverDomain, passed("servers", d, rpc))
	}
	if mesh.peersThroughGateways() {
		r.name("server."+k.own()+".peering."+domain, passed("servers.peering", d, peering))
	}
	return !ok || !haveMesh
}

// peers leads what is imported to the peers' gateways, what is exported to its sidecars, and
// the servers' own traffic to those of peers.
func (k *meshGateway) peers(st *state, r *relay, roots *certs.Roots, trusted []*peering) (slow bool) {
	c := k.client
	list, ok := heard[peerings](st, c.peerings().key)
	mesh, _ := heard[meshEntry](st, c.mesh().key)
	if list.denied {
		r.notices.Add("mesh gateway", "peering:read", "", "the token lacks it: what is imported from peers is not passed on")
	}
	for _, p := range list.list {
		if mesh.peersThroughGateways() && p.PeerServerName != "" && hostName(p.PeerServerName) {
			r.name(p.PeerServerName, passed(connect.TargetName("servers."+connect.SafeName(p.Name)+".peer"), destination{service: "consul", peer: p.Name}, peerServers(p.PeerServerAddresses)))
		}
		for _, s := range p.StreamStatus.ImportedServices {
			d, valid := importedFrom(p.Name, s)
			if !valid {
				continue
			}
			if in, known := heard[instances](st, c.peered(d).key); known && in.sni != "" {
				r.name(in.sni, passed(d.name(), d, in.endpoints))
			} else {
				slow = slow || !known
			}
		}
	}
	return k.exporting(st, r, roots, trusted) || slow || !ok
}

// exporting leads the names by which peers ask for exported services: of tcp to their sidecars, of
// http and its kin to a listener of our own, which sends requests on by the service's chain.
func (k *meshGateway) exporting(st *state, r *relay, roots *certs.Roots, peers []*peering) (slow bool) {
	exports, ok := heard[exportedServices](st, k.client.exports().key)
	if exports.denied {
		r.notices.Add("mesh gateway", "mesh:read", "", "the token lacks it: services that are exported to peers are not passed on")
	}
	if leaf, ok := heard[*certs.Leaf](st, k.signed(roots).key); ok {
		k.leaf = leaf
	}
	for _, x := range k.exports(st) {
		x.follow(st)
		var to *connect.Target
		if x.made.listener.Protocol().IsHTTP() {
			if k.leaf == nil {
				slow = true
				continue
			}
			slow = !k.ends(st, r.to, x, roots, peers) || slow
			to = &connect.Target{Name: connect.TargetName("exported." + connect.SafeName(x.service)), Service: x.made.listener.Name, Dial: connect.Dial{How: connect.Inner}}
		} else if to = k.passedOn(st, x); to == nil {
			slow = true
			continue
		}
		*r.notices = append(*r.notices, x.notices()...)
		for _, peer := range x.consumers {
			r.name(externalSNI(x.service, peer, roots.TrustDomain), to)
		}
	}
	return slow || !ok
}

// passedOn is the first target of a tcp service's chain that has an instance, in failover order.
func (k *meshGateway) passedOn(st *state, x *upstream) (to *connect.Target) {
	for _, a := range x.made.aims {
		if a.of.peer != "" || a.of.dc != k.own() {
			continue
		}
		list, _ := a.instances(st, k.own())
		if to == nil || len(to.Endpoints) == 0 {
			to = passed(a.name, a.of, st.addressed(list.endpoints))
		}
	}
	return to
}

// ends adds the listener at which TLS of peers' callers ends. Which of them may call is for the
// service's sidecar to decide, which reads in X-Forwarded-Client-Cert who calls.
func (k *meshGateway) ends(st *state, to *nouns, x *upstream, roots *certs.Roots, peers []*peering) bool {
	heard := x.lead(st, to, roots.TrustDomain)
	in := x.made.listener
	to.listener(&connect.Listener{Name: in.Name, Role: connect.Exported, Origin: "exported-services", Bind: connect.Bind{Inner: true}, Idle: in.Idle, Branches: []connect.Branch{{
		Protocol: in.Protocol(), Chain: in.Branches[0].Chain,
		Guard: &connect.Guard{Leaf: connect.OwnLeaf, Callers: connect.OwnBundle, Foreign: true, Policy: k.lets(roots.TrustDomain, peers), Peers: callersOf(peers, roots.TrustDomain),
			Normalize: connect.Normalize{KeepPath: true}}}}})
	return heard
}

// lets is the policy of listeners of our own: whoever a peer's roots verify as a service of that
// peer.
func (k *meshGateway) lets(domain string, peers []*peering) *intentions.Policy {
	conf := intentions.Config{Destination: k.service.Service, TrustDomain: domain, Peers: domains(peers), HTTP: true, DefaultAllow: true}
	if k.policy == nil || !reflect.DeepEqual(conf, k.policyOf) {
		k.policy, k.policyOf = intentions.NewPolicy(conf), conf
	}
	return k.policy
}

// externalSNI is the name by which a peer asks for a service of ours; peer is our name of it
// (agent/connect, PeeredServiceSNI).
func externalSNI(service, peer, domain string) string {
	return fmt.Sprintf("%s.default.default.%s.external.%s", service, peer, domain)
}

// exports are the exported services. Each is an upstream of ours, with the whole chain.
func (k *meshGateway) exports(st *state) (out []*upstream) {
	list, _ := heard[exportedServices](st, k.client.exports().key)
	old := k.exported
	k.exported = make(map[string]*upstream, len(old))
	for _, e := range list.list {
		if certs.ServiceName(e.Service) != nil || len(e.Consumers.Peers) == 0 {
			continue
		}
		x := old[e.Service]
		if x == nil {
			name := connect.SafeName(e.Service)
			x = newUpstream(k.client, &declared{name: name, group: connect.GroupName(name + ".exported"), suffix: ".exported", service: e.Service, dc: k.own(), where: "exported service " + e.Service}, k.own())
		}
		k.exported[e.Service] = x
		x.consumers = e.Consumers.Peers
		out = append(out, x)
	}
	return out
}

// gatewayBind is one address that a gateway listens on.
type gatewayBind struct {
	name string
	bind connect.Bind
}

// seen is what others may see of a gateway.
type seen struct {
	accessLog connect.AccessLog
	telemetry connect.Telemetry
}

// into a snapshot.
func (t *seen) into(s *connect.Snapshot) { s.AccessLog, s.Telemetry = t.accessLog, t.telemetry }

// gatewayBinds reads what a gateway's registration makes it listen on, and who may see what of it.
func gatewayBinds(s *api.AgentService, n *connect.Notices) (out []gatewayBind, t seen) {
	var config map[string]any
	if s.Proxy != nil {
		config = s.Proxy.Config
	}
	k := newKeys("proxy", config, n)
	add := func(name, address string, p int) {
		b := connect.Bind{Address: ipAddress("proxy", name, address, "0.0.0.0", n), Port: p}
		if !port(p) && s.Kind != api.ServiceKindIngressGateway && s.Kind != api.ServiceKindAPIGateway { // entries name the ports of these
			n.Add("proxy", name, fmt.Sprint(p), "want a port from 1 to 65535; it is not listened on")
			return
		}
		if !slices.ContainsFunc(out, func(o gatewayBind) bool { return o.bind.Clashes(b) }) {
			out = append(out, gatewayBind{"relay_" + connect.SafeName(name), b})
		}
	}
	if !k.bool(false, "envoy_gateway_no_default_bind") {
		add("default", s.Address, s.Port)
	}
	if k.bool(false, "envoy_gateway_bind_tagged_addresses") {
		for _, tag := range slices.Sorted(maps.Keys(s.TaggedAddresses)) {
			if a := s.TaggedAddresses[tag]; isAddress(a.Address) {
				add(tag, a.Address, a.Port)
			}
		}
	}
	if binds := k.sub("envoy_gateway_bind_addresses"); binds != nil {
		for _, name := range slices.Sorted(maps.Keys(binds.m)) {
			if one := binds.sub(name); one != nil {
				_, address, _ := one.get("address", "Address")
				text, _ := address.(string)
				add(name, text, one.int(0, 0, 65535, "port", "Port"))
				one.rest()
			}
		}
	}
	k.get("connect_timeout_ms")
	for _, dead := range []string{sdsKey, "protocol", "bind_address", "bind_port", "envoy_dns_discovery_type"} {
		k.get(dead)
	}
	t.telemetry = telemetry(k)
	if s.Proxy != nil {
		t.accessLog = accessLog(s.Proxy.AccessLogs, n)
	}
	k.rest()
	slices.SortFunc(out, func(a, b gatewayBind) int { return cmp.Compare(a.name, b.name) })
	return out, t
}
