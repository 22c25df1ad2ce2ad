package consul

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// apiGateway is the kind of proxy that lets clients outside the mesh in, as an api-gateway entry and the
// routes that are bound to its listeners say.
type apiGateway struct{ edge }

func newAPIGateway(c *Client, registration string) kind {
	return &apiGateway{newEdge(c, registration)}
}

// boundGateway is what Consul has bound to the listeners of a gateway (bound-api-gateway).
type boundGateway struct{ Listeners []boundListener }

type boundListener struct {
	Name                 string
	Routes, Certificates []api.ResourceReference
}

// Watches for the entries that a gateway is made of.
func (k *apiGateway) entry() watch {
	return entries[api.APIGatewayConfigEntry](k.client, api.APIGateway, k.service.Service)
}

func (k *apiGateway) bound() watch {
	return entries[boundGateway](k.client, "bound-api-gateway", k.service.Service)
}

func (c *Client) httpRoutes() watch {
	return entries[api.HTTPRouteConfigEntry](c, api.HTTPRoute, "")
}
func (c *Client) tcpRoutes() watch { return entries[api.TCPRouteConfigEntry](c, api.TCPRoute, "") }

func (c *Client) inlineCertificates() watch {
	return entries[api.InlineCertificateConfigEntry](c, api.InlineCertificate, "")
}

func (c *Client) fileCertificates() watch {
	return entries[api.FileSystemCertificateConfigEntry](c, api.FileSystemCertificate, "")
}

func (k *apiGateway) wants(st *state) []watch {
	k.decode(st)
	c := k.client
	out := append(k.always(), k.entry(), k.bound(), c.httpRoutes(), c.tcpRoutes(), c.inlineCertificates(), c.fileCertificates())
	for _, l := range k.listeners(st) {
		for _, x := range l.services {
			x.follow(st)
			out = append(out, x.wants(st)...)
		}
		for _, one := range l.certificates {
			if one.file != nil {
				out = append(out, *one.file)
			}
		}
	}
	return out
}

// apiListener is a listener that serves something.
type apiListener struct {
	name         string
	port         int
	protocol     connect.Protocol
	tls          connect.TLS
	secured      bool // it names certificates
	sites        []apiSite
	tcp          string               // service
	services     map[string]*upstream // by name
	certificates []apiCertificate
}

// apiSite is one host, with its rules in the order in which they match.
type apiSite struct {
	host  string
	rules []apiRule
}

type apiRule struct {
	route string
	match api.HTTPMatch
	rule  *api.HTTPRouteRule
}

// apiCertificate is an inline one, or one of a file.
type apiCertificate struct {
	name string
	leaf *certs.Leaf
	file *watch
}

// listeners are those that Consul has bound routes to, and has not found in conflict.
func (k *apiGateway) listeners(st *state) (out []*apiListener) {
	list, _ := heard[[]api.APIGatewayConfigEntry](st, k.entry().key)
	bound, _ := heard[[]boundGateway](st, k.bound().key)
	if len(list) == 0 || len(bound) == 0 {
		return nil
	}
	old := k.services
	k.services = map[string]*upstream{}
	for i := range list[0].Listeners {
		l := &list[0].Listeners[i]
		if conflicted(&list[0], l.Name) || !port(l.Port) {
			continue
		}
		at := slices.IndexFunc(bound[0].Listeners, func(b boundListener) bool { return b.Name == l.Name })
		if at < 0 {
			continue
		}
		var ignored connect.Notices // Consul takes no other values
		one := &apiListener{name: l.Name, port: l.Port, services: map[string]*upstream{}, secured: len(l.TLS.Certificates) > 0,
			tls: (&tlsSettings{l.TLS.MinVersion, l.TLS.MaxVersion, l.TLS.CipherSuites}).decode("TLS", &ignored)}
		one.protocol = connect.TCP
		if strings.EqualFold(l.Protocol, "http") {
			one.protocol = connect.HTTP
			one.sites = k.sites(st, l, bound[0].Listeners[at].Routes)
		} else {
			one.tcp = k.tcp(st, bound[0].Listeners[at].Routes)
		}
		k.lead(one, old)
		one.certificates = k.certificates(st, bound[0].Listeners[at].Certificates)
		out = append(out, one)
	}
	return out
}

// conflicted reports whether Consul has found that a listener's routes contradict each other.
func conflicted(e *api.APIGatewayConfigEntry, listener string) bool {
	return slices.ContainsFunc(e.Status.Conditions, func(c api.Condition) bool {
		return c.Type == "Conflicted" && c.Status == api.ConditionStatusTrue && c.Resource != nil && c.Resource.SectionName == listener
	})
}

// sites are the hosts of a listener's routes, each with the rules that are for it: the longer path first,
// then more headers, then more query parameters (agent/consul/discoverychain).
func (k *apiGateway) sites(st *state, l *api.APIGatewayListener, refs []api.ResourceReference) (out []apiSite) {
	routes, _ := heard[[]api.HTTPRouteConfigEntry](st, k.client.httpRoutes().key)
	for i := range routes {
		r := &routes[i]
		if !slices.ContainsFunc(refs, func(ref api.ResourceReference) bool { return ref.Kind == api.HTTPRoute && ref.Name == r.Name }) {
			continue
		}
		for _, host := range hostsOf(r.Hostnames, l.Hostname) {
			at := slices.IndexFunc(out, func(s apiSite) bool { return s.host == host })
			if at < 0 {
				at, out = len(out), append(out, apiSite{host: host})
			}
			for j := range r.Rules {
				rule := &r.Rules[j]
				matches := rule.Matches
				if len(matches) == 0 {
					matches = []api.HTTPMatch{{Path: api.HTTPPathMatch{Match: api.HTTPPathMatchPrefix, Value: "/"}}}
				}
				for _, m := range matches {
					out[at].rules = append(out[at].rules, apiRule{fmt.Sprintf("http-route %s, rule %d", r.Name, j+1), m, rule})
				}
			}
		}
	}
	for i := range out {
		slices.SortStableFunc(out[i].rules, func(a, b apiRule) int {
			return cmp.Or(len(b.match.Path.Value)-len(a.match.Path.Value), len(b.match.Headers)-len(a.match.Headers), len(b.match.Query)-len(a.match.Query))
		})
	}
	slices.SortFunc(out, func(a, b apiSite) int { return strings.Compare(a.host, b.host) })
	return out
}

// hostsOf are the hosts of a route that a listener has, too. A route without hosts has the listener's.
func hostsOf(route []string, listener string) (out []string) {
	if listener == "" {
		listener = "*"
	}
	if len(route) == 0 {
		return []string{listener}
	}
	covers := func(wide, narrow string) bool {
		ending, wild := strings.CutPrefix(wide, "*")
		return wide == narrow || wild && strings.HasSuffix(narrow, ending)
	}
	for _, h := range route {
		switch {
		case !edgeHost(h):
		case covers(listener, h):
			out = append(out, h)
		case covers(h, listener):
			out = append(out, listener)
		}
	}
	return out
}

// tcp is the service of the one route of a listener.
func (k *apiGateway) tcp(st *state, refs []api.ResourceReference) string {
	routes, _ := heard[[]api.TCPRouteConfigEntry](st, k.client.tcpRoutes().key)
	for i := range routes {
		r := &routes[i]
		if len(r.Services) > 0 && slices.ContainsFunc(refs, func(ref api.ResourceReference) bool { return ref.Kind == api.TCPRoute && ref.Name == r.Name }) {
			return r.Services[0].Name
		}
	}
	return ""
}

// lead makes the services of a listener.
func (k *apiGateway) lead(l *apiListener, old map[string]*upstream) {
	add := func(name string) {
		if certs.ServiceName(name) != nil || l.services[name] != nil {
			return
		}
		l.services[name] = k.upstream(&declared{name: connect.SafeName(l.name) + "." + connect.SafeName(name), service: name, protocol: l.protocol, where: "service " + name}, old)
	}
	if l.tcp != "" {
		add(l.tcp)
	}
	for _, s := range l.sites {
		for _, r := range s.rules {
			for _, one := range r.rule.Services {
				add(one.Name)
			}
		}
	}
}

// certificates of a listener, those that can be read.
func (k *apiGateway) certificates(st *state, refs []api.ResourceReference) (out []apiCertificate) {
	inline, _ := heard[[]api.InlineCertificateConfigEntry](st, k.client.inlineCertificates().key)
	files, _ := heard[[]api.FileSystemCertificateConfigEntry](st, k.client.fileCertificates().key)
	for _, ref := range refs {
		for i := range inline {
			if c := &inline[i]; ref.Kind == api.InlineCertificate && c.Name == ref.Name {
				one := apiCertificate{name: c.Name}
				if leaf, err := pair(c.Certificate, c.PrivateKey); err == nil {
					one.leaf = leaf
				}
				out = append(out, one)
			}
		}
		for i := range files {
			if c := &files[i]; ref.Kind == api.FileSystemCertificate && c.Name == ref.Name {
				w := pemFile(c.Certificate, c.PrivateKey)
				out = append(out, apiCertificate{name: c.Name, file: &w})
			}
		}
	}
	return out
}

func (k *apiGateway) assemble(st *state) (snap *connect.Snapshot, slow bool) {
	k.decode(st)
	e := k.begin(st, "API gateway")
	for _, w := range []watch{k.entry(), k.bound(), k.client.httpRoutes(), k.client.tcpRoutes()} {
		if e == nil || st.turnOf(w.key) == 0 {
			return nil, true
		}
	}
	k.unbound(st, &e.notices)
	for _, l := range k.listeners(st) {
		k.listen(st, e, l)
	}
	return k.done(e)
}

// unbound names what serves nothing: listeners in conflict, and routes that Consul has not bound.
func (k *apiGateway) unbound(st *state, n *connect.Notices) {
	list, _ := heard[[]api.APIGatewayConfigEntry](st, k.entry().key)
	if len(list) == 0 {
		return
	}
	for _, l := range list[0].Listeners {
		if conflicted(&list[0], l.Name) {
			n.Add("api-gateway "+k.service.Service, "listener", l.Name, "its routes contradict each other; it serves nothing")
		}
	}
	said := func(kind, name string, parents []api.ResourceReference, status api.ConfigEntryStatus) {
		if !slices.ContainsFunc(parents, func(p api.ResourceReference) bool { return p.Name == k.service.Service }) {
			return
		}
		for _, c := range status.Conditions {
			if c.Type == "Bound" && c.Status != api.ConditionStatusTrue && c.Resource != nil && c.Resource.Name == k.service.Service {
				n.Add(kind, name, c.Resource.SectionName, "Consul has not bound it: "+c.Message)
			}
		}
	}
	routes, _ := heard[[]api.HTTPRouteConfigEntry](st, k.client.httpRoutes().key)
	for i := range routes {
		said("http-route", routes[i].Name, routes[i].Parents, routes[i].Status)
	}
	tcp, _ := heard[[]api.TCPRouteConfigEntry](st, k.client.tcpRoutes().key)
	for i := range tcp {
		said("tcp-route", tcp[i].Name, tcp[i].Parents, tcp[i].Status)
	}
}

// listen adds the nouns of a listener.
func (k *apiGateway) listen(st *state, e *edgeSnap, l *apiListener) {
	door := k.door(st, e, l)
	if door == nil {
		return
	}
	idle := time.Duration(0)
	for _, name := range slices.Sorted(maps.Keys(l.services)) {
		e.behind(st, l.services[name])
		idle = max(idle, l.services[name].made.listener.Idle)
	}
	chain := connect.Chain{}
	if x := l.services[l.tcp]; x != nil && l.protocol == connect.TCP {
		chain = x.made.listener.Branches[0].Chain
	}
	for _, s := range l.sites {
		for _, r := range s.rules {
			if route, serves := k.route(l, &r, &e.notices); serves {
				route.Site, route.Hosts = connect.SafeName(s.host), hostsAt([]string{s.host}, l.port)
				chain.Routes = append(chain.Routes, route)
			}
		}
	}
	k.open(e, connect.SafeName(l.name), l.port, connect.Listener{Idle: idle, Door: door, Origin: "api-gateway " + k.service.Service + ", listener " + l.name,
		Branches: []connect.Branch{{Protocol: l.protocol, Chain: chain}}})
}

// route makes one rule for one match. Each service has its share of what its own chain makes of it.
func (k *apiGateway) route(l *apiListener, r *apiRule, n *connect.Notices) (out connect.Route, serves bool) {
	c := &compiler{compiled: &compiled{}, up: &declared{where: r.route}}
	defer func() { *n = append(*n, c.notices...) }()
	out.Origin, out.Match = r.route, apiMatch(&r.match)
	f := &r.rule.Filters
	if f.URLRewrite != nil {
		out.Rewrite = f.URLRewrite.Path
	}
	if t := f.TimeoutFilter; t != nil {
		out.Timeout, out.Idle = t.RequestTimeout, max(t.IdleTimeout, 0)
	}
	if t := f.RetryFilter; t != nil {
		out.Retry = c.retry(&routeDestination{NumRetries: t.NumRetries, RetryOn: t.RetryOn, RetryOnStatusCodes: t.RetryOnStatusCodes, RetryOnConnectFailure: t.RetryOnConnectFailure}, "filter")
	}
	out.Request, out.Answer = c.filters(f.Headers), c.filters(r.rule.ResponseFilters.Headers)
	one := len(r.rule.Services) == 1
	for _, s := range r.rule.Services {
		x := l.services[s.Name]
		if x == nil || s.Weight <= 0 && !one {
			continue
		}
		routes := x.made.listener.Branches[0].Chain.Routes
		last := &routes[len(routes)-1] // a router of the service's own is not asked, as in Consul's chain
		own, answer := c.filters(s.Filters.Headers), connect.HeaderEdits{}
		if one {
			answer = c.filters(s.ResponseFilters.Headers)
			if s.Filters.URLRewrite != nil {
				out.Rewrite = s.Filters.URLRewrite.Path
			}
			if out.Timeout == 0 {
				out.Timeout = last.Timeout
			}
		}
		for _, leg := range last.Splits {
			leg.Weight *= max(s.Weight, 1)
			leg.Request, leg.Answer = together(leg.Request, own), together(leg.Answer, answer)
			out.Splits = append(out.Splits, leg)
		}
	}
	return out, len(out.Splits) > 0
}

// filters reads header filters of a route.
func (c *compiler) filters(list []api.HTTPHeaderFilter) (out connect.HeaderEdits) {
	for _, f := range list {
		out = together(out, c.edits(&api.HTTPHeaderModifiers{Add: f.Add, Set: f.Set, Remove: f.Remove}, "header filter"))
	}
	return out
}

// together is both edits, one after the other.
func together(a, b connect.HeaderEdits) connect.HeaderEdits {
	return connect.HeaderEdits{Remove: slices.Concat(a.Remove, b.Remove), Add: slices.Concat(a.Add, b.Add), Set: slices.Concat(a.Set, b.Set)}
}

func apiMatch(m *api.HTTPMatch) (out connect.HTTPMatch) {
	switch m.Path.Match {
	case api.HTTPPathMatchExact:
		out.PathExact = m.Path.Value
	case api.HTTPPathMatchRegularExpression:
		out.PathRegex = m.Path.Value
	default:
		out.PathPrefix = m.Path.Value
	}
	if m.Method != "" {
		out.Methods = []string{string(m.Method)}
	}
	for _, h := range m.Headers {
		one := connect.HeaderMatch{Name: strings.ToLower(h.Name)}
		switch h.Match {
		case api.HTTPHeaderMatchPrefix:
			one.Prefix = h.Value
		case api.HTTPHeaderMatchSuffix:
			one.Suffix = h.Value
		case api.HTTPHeaderMatchPresent:
			one.Present = true
		case api.HTTPHeaderMatchRegularExpression:
			one.Regex = h.Value
		default:
			one.Exact = h.Value
		}
		out.Headers = append(out.Headers, one)
	}
	for _, q := range m.Query {
		one := connect.QueryMatch{Name: q.Name}
		switch q.Match {
		case api.HTTPQueryMatchPresent:
			one.Present = true
		case api.HTTPQueryMatchRegularExpression:
			one.Regex = q.Value
		default:
			one.Exact = q.Value
		}
		out.Query = append(out.Query, one)
	}
	return out
}

// door is what a listener shows to clients; nil: it must not be opened. The only certificate is shown to
// everybody. Of several each is shown for its names; a name of two, or of none, gets the gateway's own
// leaf, as with Consul's own proxies. A file has no names there: the first takes all.
func (k *apiGateway) door(st *state, e *edgeSnap, l *apiListener) *connect.Door {
	door := &connect.Door{TLS: l.tls, Normalize: e.normalize}
	if !l.secured {
		return door
	}
	shown := k.usable(st, e, l)
	if len(shown) == 0 {
		return nil // nothing is served without TLS where TLS is asked for
	}
	claimed := map[string]int{}
	for _, c := range shown {
		for _, name := range c.leaf.Names {
			claimed[strings.ToLower(name)]++
		}
	}
	if at := slices.IndexFunc(shown, func(c apiCertificate) bool { return c.file != nil }); at >= 0 || len(l.certificates) == 1 {
		e.show(door, shown[max(at, 0)].name, shown[max(at, 0)].leaf, nil)
	} else {
		door.Certificates = []connect.Certificate{{Leaf: connect.OwnLeaf}}
	}
	for i := range shown {
		var names []string
		for _, name := range shown[i].leaf.Names {
			if name = strings.ToLower(name); claimed[name] == 1 && edgeHost(name) && name != "*" && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		if shown[i].file == nil && len(l.certificates) > 1 && len(names) > 0 {
			e.show(door, shown[i].name, shown[i].leaf, names)
		}
	}
	return door
}

// usable are the certificates of a listener that can be shown.
func (k *apiGateway) usable(st *state, e *edgeSnap, l *apiListener) (out []apiCertificate) {
	for _, c := range l.certificates {
		if c.file != nil {
			c.leaf, _ = heard[*certs.Leaf](st, c.file.key)
			e.slow = e.slow || c.leaf == nil
		}
		if c.leaf == nil {
			e.notices.Add("api-gateway listener "+l.name, "certificate", c.name, "it cannot be used: a certificate and its key are wanted, which have not ended")
			continue
		}
		out = append(out, c)
	}
	return out
}
