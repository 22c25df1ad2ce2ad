package consul

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// terminatingGateway is the kind of proxy by which services outside the mesh are members of it: it has
// the leaf and the intentions of each, and calls them as its entry says.
type terminatingGateway struct {
	client       *Client
	registration string // the watch's key

	turn    uint64 // of the registration from which the fields below were decoded
	service *api.AgentService
	binds   []gatewayBind
	seen    seen
	notices connect.Notices

	policies map[string]*intentions.Policy // by service
	several  *intentions.Policy
	nouns    *nouns
}

func newTerminatingGateway(c *Client, registration string) kind {
	return &terminatingGateway{client: c, registration: registration, policies: map[string]*intentions.Policy{}, nouns: &nouns{}}
}

// linked is a service that an entry links to a gateway; the library's type leaves AutoHostRewrite out.
type linked struct {
	Service                        struct{ Name string }
	CAFile, CertFile, KeyFile, SNI string
	ServiceKind                    string
	AutoHostRewrite                bool
}

// links returns the watch for the services of a terminating gateway, wildcards resolved; its answers are
// []linked, sorted by name.
func (c *Client) links(gateway string) watch {
	return watch{key: "links\x00" + gateway, name: "services of the gateway", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		var list []linked
		meta, err := c.api.Raw().Query("/v1/catalog/gateway-services/"+gateway, &list, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		list = slices.DeleteFunc(list, func(s linked) bool { return certs.ServiceName(s.Service.Name) != nil })
		slices.SortFunc(list, func(a, b linked) int { return strings.Compare(a.Service.Name, b.Service.Name) })
		return list, nil
	}}
}

// outside returns the watch for the instances of a service outside the mesh; its answers are instances.
func (c *Client) outside(d destination) watch {
	about := "outside\x00" + d.service + "\x00" + d.subset
	return watch{key: fmt.Sprintf("%s\x00%s\x00%t", about, d.filter, d.onlyPassing), subject: about, name: "instances of " + d.said(), void: noInstances, shapes: namedInstances,
		fetch: func(ctx context.Context, cur *cursor) (any, error) {
			q := cur.cached(ctx)
			q.Filter = d.filter
			list, meta, err := c.api.Health().Service(d.service, "", false, q)
			if err != nil {
				return nil, err
			}
			cur.advance(meta)
			return instances{dc: d.dc}.found(endpoints(list, false, d.onlyPassing)), nil
		}}
}

// rootsFile returns the watch for a file of roots; its answers are strings.
func rootsFile(path string) watch {
	return watch{key: "roots file\x00" + path, name: "roots " + path, every: pemEvery, shapes: never, same: func(a, b any) bool { return a == b },
		fetch: func(context.Context, *cursor) (any, error) {
			b, err := os.ReadFile(path)
			if err != nil {
				return nil, fileError{err}
			}
			if !x509.NewCertPool().AppendCertsFromPEM(b) {
				return nil, fileError{errors.New(path + ": no certificate in it")}
			}
			return string(b), nil
		}}
}

func (k *terminatingGateway) decode(st *state) {
	turn := st.turnOf(k.registration)
	if k.turn == turn {
		return
	}
	k.turn = turn
	k.service, _ = heard[*api.AgentService](st, k.registration)
	k.notices = nil
	k.binds, k.seen = gatewayBinds(k.service, &k.notices)
}

// protocol is asked for by the chain, which knows every default.
func (k *terminatingGateway) protocol(service string) watch {
	return k.client.chain(&declared{service: service, dc: k.service.Datacenter})
}

func (k *terminatingGateway) wants(st *state) []watch {
	k.decode(st)
	c := k.client
	out := []watch{c.roots(), c.mesh(), c.resolvers(), c.links(k.service.Service)}
	list, _ := heard[[]linked](st, c.links(k.service.Service).key)
	for i := range list {
		s := &list[i]
		name := s.Service.Name
		out = append(out, c.leaf(name), c.intentions(name), c.defaultAllow(name), k.protocol(name))
		for _, d := range k.subsets(st, name) {
			out = append(out, c.outside(d))
			if all, ok := heard[instances](st, c.outside(d).key); ok && all.hosts {
				out = append(out, addresses(all)...)
			}
		}
		if s.CAFile != "" {
			out = append(out, rootsFile(s.CAFile))
		}
		if s.CertFile != "" {
			out = append(out, pemFile(s.CertFile, cmp.Or(s.KeyFile, s.CertFile)))
		}
	}
	return out
}

// subsets are a service as a whole and its subsets. The default subset answers for the whole.
func (k *terminatingGateway) subsets(st *state, service string) (out []destination) {
	entries, _ := heard[resolvers](st, k.client.resolvers().key)
	whole := destination{service: service, dc: k.service.Datacenter}
	r := entries[service]
	if r == nil {
		return []destination{whole}
	}
	if def, ok := r.Subsets[r.DefaultSubset]; ok {
		whole.filter, whole.onlyPassing = def.Filter, def.OnlyPassing
	}
	out = append(out, whole)
	for _, subset := range slices.Sorted(maps.Keys(r.Subsets)) {
		def := r.Subsets[subset]
		out = append(out, destination{service: service, dc: k.service.Datacenter, subset: subset, filter: def.Filter, onlyPassing: def.OnlyPassing})
	}
	return out
}

func (k *terminatingGateway) assemble(st *state) (snap *connect.Snapshot, slow bool) {
	k.decode(st)
	c := k.client
	roots, haveRoots := heard[*certs.Roots](st, c.roots().key)
	list, haveLinks := heard[[]linked](st, c.links(k.service.Service).key)
	if !haveRoots || !haveLinks {
		return nil, true
	}
	notices := slices.Clone(k.notices)
	mesh, haveMesh := heard[meshEntry](st, c.mesh().key)
	slow = !haveMesh
	normalize, _ := mesh.decode(&notices)
	incoming, _ := mesh.tls(&notices)
	snap = &connect.Snapshot{
		Proxy: connect.Proxy{ID: k.service.ID, Service: k.service.Service, Kind: "terminating gateway", Namespace: k.service.Namespace, Partition: k.service.Partition,
			Datacenter: k.service.Datacenter, TrustDomain: roots.TrustDomain},
		Incoming: incoming, Leaves: map[connect.LeafName]*certs.Leaf{}, Bundles: map[connect.BundleName]*certs.Roots{connect.OwnBundle: roots},
	}
	r := &relay{to: k.nouns.next(), taken: map[string]bool{}, notices: &notices}
	served := map[string]*linked{}
	names := map[string]string{}
	for i := range list {
		s := &list[i]
		if !k.known(st, s, roots, &notices) {
			slow = true
			continue
		}
		served[s.Service.Name] = s
		own := id(s.Service.Name, k.service.Datacenter)
		own.TrustDomain = roots.TrustDomain
		for _, d := range k.subsets(st, s.Service.Name) {
			names[own.SNI(d.subset)] = s.Service.Name
		}
	}
	policy := k.decides(names)
	for _, name := range slices.Sorted(maps.Keys(served)) {
		for _, d := range k.subsets(st, name) {
			k.serve(st, r, snap, served[name], d, policy, normalize)
		}
	}
	slices.SortFunc(r.branches, func(a, b connect.Branch) int { return strings.Compare(a.Match.SNI, b.Match.SNI) })
	for _, b := range k.binds {
		r.to.listener(&connect.Listener{Name: b.name, Role: connect.Relay, Bind: b.bind, Idle: relayIdle, Branches: r.branches})
	}
	k.nouns = r.to
	k.seen.into(snap)
	snap.Notices = notices.Sorted()
	r.to.into(snap)
	return snap, slow
}

// known reports whether everything is known without which a service must not be served, and keeps its
// policy.
func (k *terminatingGateway) known(st *state, s *linked, roots *certs.Roots, n *connect.Notices) bool {
	c, name := k.client, s.Service.Name
	where := "linked service " + name
	if s.ServiceKind == "destination" {
		n.Add(where, "destination", "", "destinations of transparent proxies are not supported; it is not served")
		return true
	}
	leaf, haveLeaf := heard[*certs.Leaf](st, c.leaf(name).key)
	list, haveIntentions := heard[[]intentions.Intention](st, c.intentions(name).key)
	allow, haveDefault := heard[bool](st, c.defaultAllow(name).key)
	says, haveProtocol := heard[*chain](st, k.protocol(name).key)
	if !haveLeaf || !haveIntentions || !haveDefault || !haveProtocol || leaf.ID.TrustDomain != roots.TrustDomain {
		n.Add(where, "leaf, intentions", "", "they are not known yet; the token needs service:write on "+name)
		return false
	}
	protocol, _ := connect.ParseProtocol(says.Protocol)
	own := id(name, k.service.Datacenter)
	own.TrustDomain = roots.TrustDomain
	conf := intentions.Config{Destination: name, TrustDomain: roots.TrustDomain, ServerName: own.SNI(""), Community: k.service.Namespace == "" && k.service.Partition == "",
		HTTP: protocol.IsHTTP(), DefaultAllow: allow, Intentions: list}
	if p := k.policies[name]; p == nil || !reflect.DeepEqual(p.Config(), conf) {
		k.policies[name] = intentions.NewPolicy(conf)
	}
	return true
}

// decides is the policy of all services, the same pointer while nothing of it changes.
func (k *terminatingGateway) decides(names map[string]string) *intentions.Policy {
	var list []*intentions.Policy
	for _, service := range slices.Compact(slices.Sorted(maps.Values(names))) {
		if p := k.policies[service]; p != nil {
			list = append(list, p)
		}
	}
	next := intentions.NewSeveral(list, names)
	if k.several == nil || k.several.Digest() != next.Digest() {
		k.several = next
	}
	return k.several
}

// serve adds the nouns of a service or one of its subsets.
func (k *terminatingGateway) serve(st *state, r *relay, snap *connect.Snapshot, s *linked, d destination, policy *intentions.Policy, normalize connect.Normalize) {
	c, name := k.client, s.Service.Name
	if k.policies[name] == nil {
		return
	}
	leaf, _ := heard[*certs.Leaf](st, c.leaf(name).key)
	says, _ := heard[*chain](st, k.protocol(name).key)
	protocol, _ := connect.ParseProtocol(says.Protocol)
	list, _ := heard[instances](st, c.outside(d).key)
	where := "linked service " + name
	server, ok := k.server(st, s, snap, where, r.notices)
	if !ok {
		list.endpoints = nil
	}
	at := string(d.name()) + ".outside"
	target := &connect.Target{Name: connect.TargetName(at), Service: name, Subset: d.subset, Datacenter: d.dc, Endpoints: st.addressed(list.endpoints), Dial: connect.Dial{How: connect.Outside, Server: server}}
	group := &connect.Group{Name: connect.GroupName(at), Protocol: protocol, Targets: []connect.TargetName{target.Name}, Connect: defaultConnect, Idle: idleOf(protocol), Origin: "terminating-gateway " + k.service.Service}
	if s.AutoHostRewrite {
		group.Host = hostOf(list, where, r.notices)
	}
	r.to.target(target)
	r.to.group(group)
	shown := connect.LeafName("leaf-" + connect.SafeName(name))
	snap.Leaves[shown] = leaf
	inner := connect.SafeName(cmp.Or(d.subset, "whole")) + "." + connect.SafeName(name)
	r.to.listener(&connect.Listener{Name: inner, Role: connect.Exported, Origin: group.Origin, Bind: connect.Bind{Inner: true}, Idle: max(group.Idle, defaultHTTPIdle), Branches: []connect.Branch{{
		Protocol: protocol, Chain: connect.Direct(group.Name), Guard: &connect.Guard{Leaf: shown, Callers: connect.OwnBundle, Policy: policy, Normalize: normalize, SanitizeXFCC: true}}}})
	own := leaf.ID
	r.name(own.SNI(d.subset), &connect.Target{Name: connect.TargetName("inner." + inner), Service: inner, Datacenter: d.dc, Dial: connect.Dial{How: connect.Inner}})
}

// server is how a linked service is verified; ok is false while it cannot be called.
func (k *terminatingGateway) server(st *state, s *linked, snap *connect.Snapshot, where string, n *connect.Notices) (out *connect.Server, ok bool) {
	if s.CAFile == "" {
		return nil, true // as with Consul's own proxies: no TLS
	}
	roots, known := heard[string](st, rootsFile(s.CAFile).key)
	if !known {
		n.Add(where, "ca_file", s.CAFile, "it cannot be read yet; the service is not called")
		return nil, false
	}
	if _, err := netip.ParseAddr(s.SNI); s.SNI != "" && (err == nil || !hostName(s.SNI)) {
		n.Add(where, "sni", s.SNI, "only a DNS name can be verified; the service is not called")
		return nil, false
	}
	out = &connect.Server{RootsPEM: roots, Name: s.SNI}
	if s.CertFile != "" {
		pair, known := heard[*certs.Leaf](st, pemFile(s.CertFile, cmp.Or(s.KeyFile, s.CertFile)).key)
		if !known {
			n.Add(where, "cert_file", s.CertFile, "it cannot be read yet, or has no key; the service is not called")
			return nil, false
		}
		out.Leaf = connect.LeafName("outside-" + connect.Digest(s.CertFile+"\x00"+s.KeyFile))
		snap.Leaves[out.Leaf] = pair
	}
	return out, true
}

// hostOf is the host name that all instances have, "" if they have none.
func hostOf(list instances, where string, n *connect.Notices) string {
	host := ""
	for _, e := range list.endpoints {
		switch {
		case !named(e):
		case host == "" || host == e.Address:
			host = e.Address
		default:
			n.Add(where, "host", e.Address, "the instances have several host names; the host of a request stays as it is")
			return ""
		}
	}
	return host
}
