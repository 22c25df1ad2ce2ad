package consul

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// ingressGateway is the kind of proxy that lets clients outside the mesh in, as an ingress-gateway
// entry says.
type ingressGateway struct{ edge }

func newIngressGateway(c *Client, registration string) kind {
	return &ingressGateway{newEdge(c, registration)}
}

func (k *ingressGateway) entry() watch {
	return entries[api.IngressGatewayConfigEntry](k.client, api.IngressGateway, k.service.Service)
}

// listed is the entry, nil while there is none.
func (k *ingressGateway) listed(st *state) *api.IngressGatewayConfigEntry {
	list, _ := heard[[]api.IngressGatewayConfigEntry](st, k.entry().key)
	if len(list) == 0 {
		return nil
	}
	return &list[0]
}

func (k *ingressGateway) wants(st *state) []watch {
	k.decode(st)
	c := k.client
	out := append(k.always(), k.entry(), c.gatewayServices(k.service.Service))
	for _, l := range k.listeners(st) {
		for _, s := range l.services {
			s.x.follow(st)
			out = append(out, s.x.wants(st)...)
		}
		out = append(out, l.files...)
		if roots, ok := heard[*certs.Roots](st, c.roots().key); ok && l.ownTLS {
			out = append(out, k.signed(st, roots))
		}
	}
	return out
}

// signed is the watch for the leaf that is shown to clients: the gateway's own, with the names of its
// hosts.
func (k *ingressGateway) signed(st *state, roots *certs.Roots) watch {
	dc := k.own()
	names := []string{"*.ingress." + serverDomain, "*.ingress." + dc + "." + serverDomain}
	if e := k.listed(st); e != nil {
		for _, l := range e.Listeners {
			for _, s := range l.Services {
				for _, h := range s.Hosts {
					if host, _, _ := strings.Cut(h, ":"); edgeHost(host) && host != "*" && !strings.HasSuffix(host, "*") && !slices.Contains(names, host) {
						names = append(names, host)
					}
				}
			}
		}
	}
	own := id(k.service.Service, dc)
	own.TrustDomain = roots.TrustDomain
	return k.client.signed(own, names, roots.Fingerprint)
}

// ingressListener is a listener of the entry, with what stands behind it.
type ingressListener struct {
	port     int
	protocol connect.Protocol
	services []ingressService
	ownTLS   bool
	tls      connect.TLS
	files    []watch // certificates
}

type ingressService struct {
	x     *upstream
	hosts []string
	entry api.IngressService
	file  *watch // of its own certificate; nil: that of the listener
}

// listeners are those of the entry, with the services that Consul binds to them.
func (k *ingressGateway) listeners(st *state) (out []*ingressListener) {
	e := k.listed(st)
	bound, _ := heard[[]boundService](st, k.client.gatewayServices(k.service.Service).key)
	if e == nil {
		return nil
	}
	old := k.services
	k.services = map[string]*upstream{}
	for i := range e.Listeners {
		l := &e.Listeners[i]
		protocol, known := connect.ParseProtocol(l.Protocol)
		if !known || !port(l.Port) {
			continue // Consul takes no such entry
		}
		one := &ingressListener{port: l.Port, protocol: protocol}
		k.tls(e, l, one)
		for j := range bound {
			s := &bound[j]
			if s.Port != l.Port {
				continue
			}
			at := slices.IndexFunc(l.Services, func(w api.IngressService) bool { return w.Name == s.Service.Name })
			if at < 0 {
				at = slices.IndexFunc(l.Services, func(w api.IngressService) bool { return w.Name == "*" })
			}
			if at < 0 {
				continue // an answer of before the entry
			}
			one.services = append(one.services, k.bound(e, &l.Services[at], s, one, old))
		}
		out = append(out, one)
	}
	return out
}

// bound is one service at a listener.
func (k *ingressGateway) bound(e *api.IngressGatewayConfigEntry, w *api.IngressService, s *boundService, l *ingressListener, old map[string]*upstream) ingressService {
	x := k.upstream(&declared{name: fmt.Sprintf("%d.%s", l.port, connect.SafeName(s.Service.Name)), service: s.Service.Name, protocol: l.protocol,
		where: fmt.Sprintf("ingress listener %d, service %s", l.port, s.Service.Name), limits: ingressLimits(w, e.Defaults), passive: ingressHealth(w, e.Defaults)}, old)
	out := ingressService{x: x, entry: *w}
	for _, h := range s.Hosts {
		if edgeHost(h) {
			out.hosts = append(out.hosts, h)
		}
	}
	if len(s.Hosts) == 0 {
		out.hosts = []string{s.Service.Name + ".ingress.*"}
	}
	if w.TLS != nil && w.TLS.SDS != nil {
		if file, ok := sdsFile(k.sds, w.TLS.SDS.CertResource); ok {
			f := pemFile(file, file)
			out.file = &f
			l.files = append(l.files, f)
		}
	}
	return out
}

// tls reads what a listener shows: a certificate of the directory, or the gateway's own leaf.
func (k *ingressGateway) tls(e *api.IngressGatewayConfigEntry, l *api.IngressListener, to *ingressListener) {
	t := e.TLS
	if l.TLS != nil {
		t = *l.TLS
		t.Enabled = t.Enabled || e.TLS.Enabled
		if t.SDS == nil {
			t.SDS = e.TLS.SDS
		} else if e.TLS.SDS != nil {
			t.SDS = &api.GatewayTLSSDSConfig{CertResource: cmp.Or(t.SDS.CertResource, e.TLS.SDS.CertResource)}
		}
		t.TLSMinVersion, t.TLSMaxVersion = cmp.Or(t.TLSMinVersion, e.TLS.TLSMinVersion), cmp.Or(t.TLSMaxVersion, e.TLS.TLSMaxVersion)
		if len(t.CipherSuites) == 0 {
			t.CipherSuites = e.TLS.CipherSuites
		}
	}
	var ignored connect.Notices // Consul takes no other values
	to.tls = (&tlsSettings{t.TLSMinVersion, t.TLSMaxVersion, t.CipherSuites}).decode("TLS", &ignored)
	if t.SDS != nil {
		if file, ok := sdsFile(k.sds, t.SDS.CertResource); ok {
			to.files = append([]watch{pemFile(file, file)}, to.files...)
			return
		}
	}
	to.ownTLS = t.Enabled
}

func ingressLimits(w *api.IngressService, d *api.IngressServiceConfig) connect.Limits {
	if d == nil {
		d = &api.IngressServiceConfig{}
	}
	one := func(own, def *uint32) *int {
		if own == nil || *own == 0 {
			own = def
		}
		if own == nil || *own == 0 {
			return nil
		}
		n := int(*own)
		return &n
	}
	return connect.Limits{MaxConnections: one(w.MaxConnections, d.MaxConnections), MaxPendingRequests: one(w.MaxPendingRequests, d.MaxPendingRequests),
		MaxConcurrentRequests: one(w.MaxConcurrentRequests, d.MaxConcurrentRequests)}
}

func ingressHealth(w *api.IngressService, d *api.IngressServiceConfig) *connect.PassiveHealth {
	h := w.PassiveHealthCheck
	if h == nil && d != nil {
		h = d.PassiveHealthCheck
	}
	if h == nil {
		return nil
	}
	out := &connect.PassiveHealth{Interval: h.Interval, MaxFailures: int(h.MaxFailures), BaseEjection: 30 * time.Second, Enforced: 100}
	if out.Interval <= 0 {
		out.Interval = 10 * time.Second
	}
	if out.MaxFailures == 0 {
		out.MaxFailures = 5
	}
	if h.BaseEjectionTime != nil && *h.BaseEjectionTime > 0 {
		out.BaseEjection = *h.BaseEjectionTime
	}
	if h.EnforcingConsecutive5xx != nil {
		if out.Enforced = int(*h.EnforcingConsecutive5xx); out.Enforced == 0 {
			return nil
		}
	}
	if h.MaxEjectionPercent != nil {
		n := int(*h.MaxEjectionPercent)
		out.MaxEjected = &n
	}
	return out
}

func (k *ingressGateway) assemble(st *state) (snap *connect.Snapshot, slow bool) {
	k.decode(st)
	e := k.begin(st, "ingress gateway")
	if e == nil || st.turnOf(k.entry().key) == 0 || st.turnOf(k.client.gatewayServices(k.service.Service).key) == 0 {
		return nil, true
	}
	for _, l := range k.listeners(st) {
		k.listen(st, e, l)
	}
	return k.done(e)
}

// listen adds the nouns of a listener.
func (k *ingressGateway) listen(st *state, e *edgeSnap, l *ingressListener) {
	door := k.door(st, e, l)
	if door == nil {
		return // nothing is served where TLS is asked for and there is no certificate
	}
	chain, idle, most := connect.Chain{}, time.Duration(0), (*int)(nil)
	for _, s := range l.services {
		e.behind(st, s.x)
		in := s.x.made.listener
		idle = max(idle, in.Idle)
		if !l.protocol.IsHTTP() {
			chain, most = in.Branches[0].Chain, in.MaxConnections
			break // Consul binds one alone
		}
		request, answer := edits(s.x.where, s.entry.RequestHeaders, "request_headers", &e.notices), edits(s.x.where, s.entry.ResponseHeaders, "response_headers", &e.notices)
		chain.Routes = append(chain.Routes, site(s.x, connect.SafeName(s.x.service), hostsAt(s.hosts, l.port), request, answer)...)
	}
	k.open(e, strconv.Itoa(l.port), l.port, connect.Listener{Idle: idle, MaxConnections: most, Door: door, Origin: "ingress-gateway " + k.service.Service, Branches: []connect.Branch{{Protocol: l.protocol, Chain: chain}}})
}

// door is what a listener shows to clients; nil: it must not be opened.
func (k *ingressGateway) door(st *state, e *edgeSnap, l *ingressListener) *connect.Door {
	door := &connect.Door{TLS: l.tls, Normalize: e.normalize}
	show := func(w watch, names []string) bool {
		leaf, known := heard[*certs.Leaf](st, w.key)
		if known {
			e.show(door, connect.Digest(w.key), leaf, names)
			return true
		}
		e.notices.Add(fmt.Sprintf("ingress listener %d", l.port), "tls", "", "its certificate is not known yet ("+w.name+"); it is not shown")
		e.slow = true
		return false
	}
	switch {
	case l.ownTLS:
		if !show(k.signed(st, e.roots), nil) {
			return nil
		}
	case len(l.files) > 0 && !slices.ContainsFunc(l.services, func(s ingressService) bool { return s.file != nil && s.file.key == l.files[0].key }):
		if !show(l.files[0], nil) {
			return nil
		}
	}
	for _, s := range l.services {
		if s.file == nil {
			continue
		}
		var names []string
		for _, h := range s.hosts {
			if host, _, _ := strings.Cut(h, ":"); host != "*" && !strings.HasSuffix(host, "*") {
				names = append(names, host)
			}
		}
		show(*s.file, names)
	}
	if len(l.files) > 0 && len(door.Certificates) == 0 {
		return nil
	}
	return door
}
