package consul

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// compiled is what a chain says, in our words.
type compiled struct {
	protocol connect.Protocol
	routes   []connect.Route
	groups   []*resolvedGroup
	notices  connect.Notices
}

// resolvedGroup is a resolver node and the group that it becomes, without the settings of
// the upstream itself.
type resolvedGroup struct {
	node    string
	group   connect.Group
	targets []destination
}

// compiler goes through one chain for one upstream.
type compiler struct {
	*compiled
	chain *chain
	up    *declared
	own   string                    // datacenter
	seen  map[string]*resolvedGroup // by node
}

// directly returns the chain that is used until the real one is known: it leads straight to
// the upstream's own service.
func directly(d *declared) *compiled {
	to := destination{service: d.service, dc: d.dc, other: d.other}
	if d.peer != "" {
		to = d.peered(d.service, d.peer, d.gateway)
	}
	g := &resolvedGroup{group: connect.Group{Name: d.group, Connect: defaultConnect}, targets: []destination{to}}
	return &compiled{protocol: connect.TCP, routes: connect.Direct(d.group).Routes, groups: []*resolvedGroup{g}}
}

// compile reads a chain. It fails if the chain leads nowhere; the last one then stays in force.
func (d *declared) compile(c *chain, own string) (*compiled, error) {
	to := &compiler{compiled: &compiled{}, chain: c, up: d, own: own, seen: map[string]*resolvedGroup{}}
	to.protocol, _ = connect.ParseProtocol(c.Protocol)
	if d.protocol != "" {
		to.protocol = d.protocol
	}
	start := c.Nodes[c.StartNode]
	if start == nil {
		return nil, fmt.Errorf("the chain has no node %q to start at", c.StartNode)
	}
	routes := []chainRoute{{NextNode: c.StartNode}}
	if start.Type == api.DiscoveryGraphNodeTypeRouter {
		routes = start.Routes
	}
	for i := range routes {
		r, err := to.route(&routes[i], i+1)
		if err != nil {
			return nil, err
		}
		to.routes = append(to.routes, r)
		if r.Match.Everything() {
			break // no later one can match
		}
	}
	if start.Type == api.DiscoveryGraphNodeTypeResolver && to.protocol.IsHTTP() {
		to.routes[0].Timeout = start.Resolver.RequestTimeout.within()
	}
	to.name()
	return to.compiled, nil
}

// name gives the groups their names: the only one has that of the upstream.
func (c *compiler) name() {
	names := map[connect.GroupName]connect.GroupName{}
	for _, g := range c.groups {
		name := connect.GroupName(c.up.name + ":to:" + string(g.targets[0].name())) // a colon is in no name that Consul chose
		if len(c.groups) == 1 {
			name = c.up.group
		}
		for again := 2; names[name] != ""; again++ {
			name += connect.GroupName("_" + strconv.Itoa(again))
		}
		names[name] = name
		g.group.Name = name
	}
	for i := range c.routes {
		for j := range c.routes[i].Splits {
			s := &c.routes[i].Splits[j]
			s.Group = c.seen[string(s.Group)].group.Name // till now its node
		}
	}
}

// notice adds a notice about a config entry of which the chain is made.
func (c *compiler) notice(key, value, why string) { c.notices.Add(c.up.where, key, value, why) }

func (c *compiler) route(in *chainRoute, number int) (out connect.Route, err error) {
	key := fmt.Sprintf("service-router route %d", number)
	if def := in.Definition; def != nil {
		if def.Match != nil && def.Match.HTTP != nil {
			out.Match = def.Match.HTTP.match()
		}
		if to := def.Destination; to != nil {
			out.Timeout, out.Idle = to.RequestTimeout.within(), max(to.IdleTimeout.within(), 0)
			out.Rewrite = to.PrefixRewrite
			out.Retry = c.retry(to, key)
			out.Request, out.Answer = c.edits(to.RequestHeaders, key), c.edits(to.ResponseHeaders, key)
		}
	}
	if in.Definition != nil {
		out.Origin = fmt.Sprintf("service-router %s, route %d", c.chain.ServiceName, number)
	}
	out.Splits, err = c.splits(in.NextNode)
	return out, err
}

func (m *routeMatch) match() connect.HTTPMatch {
	out := connect.HTTPMatch{PathExact: m.PathExact, PathPrefix: m.PathPrefix, PathRegex: m.PathRegex, IgnoreCase: m.CaseInsensitive, Methods: m.Methods}
	for _, h := range m.Header {
		out.Headers = append(out.Headers, connect.HeaderMatch{Name: strings.ToLower(h.Name), Present: h.Present, Exact: h.Exact, Prefix: h.Prefix, Suffix: h.Suffix, Contains: h.Contains, Regex: h.Regex, Invert: h.Invert})
	}
	for _, q := range m.QueryParam {
		out.Query = append(out.Query, connect.QueryMatch{Name: q.Name, Present: q.Present, Exact: q.Exact, Regex: q.Regex})
	}
	return out
}

// splits returns the splits of the node that a route leads to; if that node is no splitter, a
// single split has everything.
func (c *compiler) splits(next string) (out []connect.Split, err error) {
	node := c.chain.Nodes[next]
	if node == nil {
		return nil, fmt.Errorf("the chain has no node %q", next)
	}
	if node.Type != api.DiscoveryGraphNodeTypeSplitter {
		return []connect.Split{{Weight: connect.Whole, Group: connect.GroupName(next)}}, c.resolve(next)
	}
	for _, s := range node.Splits {
		one := connect.Split{Weight: int(math.Round(s.Weight * 100)), Group: connect.GroupName(s.NextNode), Origin: "service-splitter " + service(node.Name)}
		if s.Definition != nil {
			one.Request, one.Answer = c.edits(s.Definition.RequestHeaders, "service-splitter"), c.edits(s.Definition.ResponseHeaders, "service-splitter")
		}
		if err := c.resolve(s.NextNode); err != nil {
			return nil, err
		}
		out = append(out, one)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the splitter %q has no legs", node.Name)
	}
	return out, nil
}

// service is whose splitter a node is: nodes are named "service.namespace.partition".
func service(node string) string {
	name, _, _ := strings.Cut(node, ".default.default")
	return name
}

// resolve makes the group of a resolver node, once.
func (c *compiler) resolve(name string) error {
	node := c.chain.Nodes[name]
	if node == nil || node.Resolver == nil {
		return fmt.Errorf("the chain has no resolver %q", name)
	}
	if c.seen[name] != nil {
		return nil
	}
	r := node.Resolver
	g := &resolvedGroup{node: name, group: connect.Group{Connect: defaultConnect, Origin: "the default service-resolver"}}
	if t := c.chain.Targets[r.Target]; t != nil && !r.Default {
		g.group.Origin = "service-resolver " + t.Service
	}
	if t := r.ConnectTimeout.within(); t > 0 {
		g.group.Connect = t
	}
	if node.LoadBalancer != nil {
		g.group.Balance = c.balance(node.LoadBalancer)
	}
	targets := []string{r.Target}
	if r.Failover != nil {
		targets = append(targets, r.Failover.Targets...)
	}
	for i, name := range targets {
		t := c.chain.Targets[name]
		switch {
		case t == nil && i == 0:
			return fmt.Errorf("the chain has no target %q", name)
		case t == nil:
			continue
		}
		d := c.destination(t)
		if !slices.Contains(g.targets, d) {
			g.targets = append(g.targets, d)
		}
	}
	if len(g.targets) == 0 {
		return fmt.Errorf("no target of %q can be called", name)
	}
	c.seen[name] = g
	c.groups = append(c.groups, g)
	return nil
}

// destination is whose instances a target means.
func (c *compiler) destination(t *chainTarget) destination {
	mode := api.MeshGatewayMode(t.MeshGateway.Mode)
	if t.Peer != "" {
		return c.up.peered(t.Service, t.Peer, mode)
	}
	d := destination{service: t.Service, dc: t.Datacenter, other: t.Datacenter != c.own, subset: t.ServiceSubset, filter: t.Subset.Filter, onlyPassing: t.Subset.OnlyPassing}
	if hostName(t.SNI) {
		d.sni = t.SNI
	}
	if d.other && d.sni != "" && (mode == api.MeshGatewayModeLocal || mode == api.MeshGatewayModeRemote) {
		d.via = string(mode)
	}
	return d
}

// balance reads a load-balancing policy. As with Consul's own proxies, tcp has no hash
// policies; its endpoints are then taken at random.
func (c *compiler) balance(lb *loadBalancer) (out connect.Balance) {
	switch lb.Policy {
	case "", "round_robin":
	case "random":
		out.Policy = connect.Random
	case "least_request":
		out.Policy, out.Choices = connect.LeastRequest, 2
		if lb.LeastRequestConfig != nil && lb.LeastRequestConfig.ChoiceCount > 0 {
			out.Choices = min(lb.LeastRequestConfig.ChoiceCount, 64)
		}
	case "ring_hash", "maglev":
		if !c.protocol.IsHTTP() {
			out.Policy = connect.Random
			return out
		}
		out.Policy = connect.Hash
	default:
		c.notice("service-resolver load_balancer", lb.Policy, "no such policy is known; endpoints are taken in turn")
	}
	if out.Policy != connect.Hash {
		return out
	}
	for _, p := range lb.HashPolicies {
		one := connect.HashPolicy{SourceIP: p.SourceIP, Terminal: p.Terminal}
		switch {
		case p.SourceIP:
		case p.Field == "header" && headerName(p.FieldValue):
			one.Header = strings.ToLower(p.FieldValue)
		case p.Field == "cookie" && cookieName(p.FieldValue):
			one.Cookie = p.FieldValue
			if cc := p.CookieConfig; cc != nil && (cc.Session || cc.TTL > 0) {
				one.Generate, one.TTL, one.Path = true, max(cc.TTL.within(), 0), cc.Path
				if one.Path != "" && !plainPath(one.Path) {
					c.notice("service-resolver hash_policies.cookie_config.path", one.Path, "not a plain path; the cookie has none")
					one.Path = ""
				}
			}
		case p.Field == "query_parameter" && headerName(strings.ReplaceAll(p.FieldValue, "_", "-")):
			one.Query = p.FieldValue
		default:
			c.notice("service-resolver hash_policies", p.Field+" "+p.FieldValue, "not a name that HAProxy can look for; this part is not hashed")
			continue
		}
		out.Hash = append(out.Hash, one)
	}
	if len(out.Hash) == 0 { // as with Consul's own: any endpoint
		out.Policy = connect.Random
	}
	return out
}

// cookieName reports whether a text can name a cookie.
func cookieName(s string) bool {
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	})
}

// retryConditions and retryCodes are those that HAProxy can retry on.
var (
	retryConditions = []string{"5xx", "gateway-error", "reset", "connect-failure", "refused-stream"}
	retryCodes      = []int{401, 403, 404, 408, 425, 500, 501, 502, 503, 504}
)

func (c *compiler) retry(to *routeDestination, key string) (out connect.Retry) {
	if to.RetryOnConnectFailure {
		out.Conditions = append(out.Conditions, "connect-failure")
	}
	for _, one := range to.RetryOn {
		if !slices.Contains(retryConditions, one) {
			c.notice(key+" retry_on", one, "a condition that HAProxy cannot see; this one does not retry")
			continue
		}
		out.Conditions = append(out.Conditions, one)
	}
	for _, code := range to.RetryOnStatusCodes {
		if !slices.Contains(retryCodes, int(code)) {
			c.notice(key+" retry_on_status_codes", strconv.Itoa(int(code)), "HAProxy does not retry on it")
			continue
		}
		out.Codes = append(out.Codes, int(code))
	}
	slices.Sort(out.Conditions)
	slices.Sort(out.Codes)
	out.Conditions, out.Codes = slices.Compact(out.Conditions), slices.Compact(out.Codes)
	if out.Any() {
		out.Tries = min(max(int(to.NumRetries), 1), 100)
	}
	return out
}

// edits reads header rules. A rule that cannot be used is left out with a notice.
func (c *compiler) edits(m *api.HTTPHeaderModifiers, key string) (out connect.HeaderEdits) {
	if m == nil {
		return out
	}
	read := func(in map[string]string) (list []connect.Header) {
		for name, value := range in {
			if why := editable(name, value); why != "" {
				c.notice(key+" headers", name+": "+value, why+"; this rule is left out")
				continue
			}
			list = append(list, connect.Header{Name: strings.ToLower(name), Value: value})
		}
		slices.SortFunc(list, func(a, b connect.Header) int { return strings.Compare(a.Name, b.Name) })
		return list
	}
	out.Add, out.Set = read(m.Add), read(m.Set)
	for _, name := range m.Remove {
		if why := editable(name, ""); why != "" {
			c.notice(key+" headers", name, why+"; this rule is left out")
			continue
		}
		out.Remove = append(out.Remove, strings.ToLower(name))
	}
	slices.Sort(out.Remove)
	return out
}

// editable says why a header cannot be changed by an entry; "" if it can.
func editable(name, value string) string {
	switch {
	case !headerName(strings.ReplaceAll(name, "_", "-")):
		return "not the name of a header"
	case strings.EqualFold(name, "host"), strings.EqualFold(name, "connection"), strings.EqualFold(name, "transfer-encoding"), strings.EqualFold(name, "content-length"), strings.EqualFold(name, "upgrade"):
		return "no rule may change this header"
	case len(value) > 4096:
		return "a value of more than 4096 bytes"
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
		return "a control character in the value"
	}
	return ""
}

// idleOf returns how long a server may be silent, by protocol, where the upstream sets no time.
func idleOf(p connect.Protocol) time.Duration {
	switch {
	case p == connect.GRPC:
		return defaultStream
	case p.IsHTTP():
		return defaultUpstreamReq
	}
	return defaultTCPIdle
}
