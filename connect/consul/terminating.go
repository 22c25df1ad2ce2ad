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

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// terminatingGateway is the kind of proxy by which services outside the mesh are members of it: it has
// the leaf and the intentions of each, and calls them as its entry says.
type terminatingGateway struct {
	gateway
	policies map[string]*intentions.Policy // by service
	several  *intentions.Policy
}

func newTerminatingGateway(c *Client, registration string) kind {
	return &terminatingGateway{gateway: newGateway(c, registration), policies: map[string]*intentions.Policy{}}
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

// protocol is asked for by the chain, which knows every default.
func (k *terminatingGateway) protocol(service string) watch {
	return k.client.chain(&declared{service: service, dc: k.own()})
}

func (k *terminatingGateway) wants(st *state) []watch {
	k.decode(st)
	c := k.client
	out := []watch{c.roots(), c.mesh(), c.resolvers(), c.gatewayServices(k.service.Service)}
	list, _ := heard[[]boundService](st, c.gatewayServices(k.service.Service).key)
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
	whole := destination{service: service, dc: k.own()}
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
		out = append(out, destination{service: service, dc: k.own(), subset: subset, filter: def.Filter, onlyPassing: def.OnlyPassing})
	}
	return out
}

func (k *terminatingGateway) assemble(st *state) (snap *connect.Snapshot, slow bool) {
	k.decode(st)
	c := k.client
	roots, haveRoots := heard[*certs.Roots](st, c.roots().key)
	list, haveLinks := heard[[]boundService](st, c.gatewayServices(k.service.Service).key)
	if !haveRoots || !haveLinks {
		return nil, true
	}
	notices := slices.Clone(k.notices)
	mesh, haveMesh := heard[meshEntry](st, c.mesh().key)
	slow = !haveMesh
	normalize, _ := mesh.decode(&notices)
	incoming, _ := mesh.tls(&notices)
	snap = &connect.Snapshot{Proxy: k.proxy("terminating gateway", roots.TrustDomain), Incoming: incoming,
		Leaves: map[connect.LeafName]*certs.Leaf{}, Bundles: bundles(roots, nil)}
	r := &relay{to: k.nouns.next(), taken: map[string]bool{}, notices: &notices}
	served := map[string]*boundService{}
	names := map[string]string{}
	for i := range list {
		s := &list[i]
		if !k.known(st, s, roots, &notices) {
			slow = true
			continue
		}
		served[s.Service.Name] = s
		own := id(s.Service.Name, k.own())
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
	k.relays(r)
	k.end(snap, r.to, notices)
	return snap, slow
}

// known reports whether everything is known without which a service must not be served, and keeps its
// policy.
func (k *terminatingGateway) known(st *state, s *boundService, roots *certs.Roots, n *connect.Notices) bool {
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
	own := id(name, k.own())
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
func (k *terminatingGateway) serve(st *state, r *relay, snap *connect.Snapshot, s *boundService, d destination, policy *intentions.Policy, normalize connect.Normalize) {
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
func (k *terminatingGateway) server(st *state, s *boundService, snap *connect.Snapshot, where string, n *connect.Notices) (out *connect.Server, ok bool) {
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
