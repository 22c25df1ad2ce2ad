package consul

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Watcher follows one proxy. Make it with NewWatcher.
type Watcher struct {
	client  *Client
	proxyID string
	log     *slog.Logger
	feeds   feeds
	updates chan func(*state)
	held    atomic.Uint64
	wg      sync.WaitGroup
}

// NewWatcher makes a watcher of the proxy with this ID.
func NewWatcher(c *Client, proxyID string, log *slog.Logger) *Watcher {
	return &Watcher{client: c, proxyID: proxyID, log: log, feeds: feeds{log: log}, updates: make(chan func(*state), 16)}
}

// Feeds tells the condition of each watch, sorted by name.
func (w *Watcher) Feeds() []Feed {
	out := w.feeds.list()
	slices.SortFunc(out, func(a, b Feed) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Held counts the times that an upstream kept endpoints which had all gone just after
// Consul came back.
func (w *Watcher) Held() uint64 { return w.held.Load() }

func (w *Watcher) send(ctx context.Context, f func(*state)) bool {
	select {
	case w.updates <- f:
		return true
	case <-ctx.Done():
		return false
	}
}

// state is what the mesh said last. Only Run's goroutine touches it.
type state struct {
	service   *api.AgentService
	proxy     connect.Proxy
	inbound   connect.Inbound
	declared  []declared
	made      []made          // beside declared
	moved     bool            // declared is new
	notices   connect.Notices // of the registration
	roots     *certs.Roots
	leaf      *certs.Leaf
	matched   []intentions.Intention
	mesh      meshEntry
	heard     struct{ intentions, defaults, mesh, providers bool }
	allow     bool // default policy
	answers   map[string]*resolved
	hosts     map[string]*host // by name
	policy    *intentions.Policy
	policyFor intentions.Config

	tlsMode map[string]api.MutualTLSMode // by kind of config entry

	providers       []*intentions.Provider
	providerNotices connect.Notices

	extensionNotices connect.Notices
	dirty            bool
}

// resolved is what is known of one destination.
type resolved struct {
	destination string

	ctx      context.Context // of its watches
	cancel   context.CancelFunc
	until    time.Time // late is held back; zero: nothing is
	late     connect.Target
	chain    bool // heard
	protocol connect.Protocol
	connect  time.Duration
	target   connect.Target
	notices  connect.Notices
	turn     int // counts changes of protocol, connect, target and notices
}

// made is an upstream as last published, and what it was made of: one of which nothing
// has changed costs nothing.
type made struct {
	up     *connect.Upstream // nil before the first time
	turn   int               // of what is known of its destination
	domain string            // "": it must be made again
}

// declare takes the upstreams of a registration. One that comes out the same is the same
// pointer.
func (st *state) declare(list []declared) {
	old := make(map[string]*connect.Upstream, len(st.made))
	for _, m := range st.made {
		if m.up != nil {
			old[m.up.Name] = m.up
		}
	}
	st.declared, st.moved, st.made = list, true, make([]made, len(list))
	for i := range list {
		st.made[i].up = old[list[i].up.Name]
	}
}

// Run follows the agent until ctx ends; it returns when its last goroutine has.
// publish is called from one goroutine, in order, only with complete snapshots.
func (w *Watcher) Run(ctx context.Context, publish func(*connect.Snapshot)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer w.wg.Wait()
	defer cancel()
	st := &state{tlsMode: map[string]api.MutualTLSMode{}, answers: map[string]*resolved{}, hosts: map[string]*host{}}
	w.start(ctx, "registration", w.fetchService(ctx))
	w.start(ctx, "roots", w.fetchRoots)
	w.start(ctx, "mesh", w.fetchMesh)
	var identityStarted string
	providersStarted, modeStarted := false, false
	stopIdentity := func() {}
	defer func() { stopIdentity() }()
	// The first snapshot waits a moment for slow upstreams: without it the first
	// configuration would have listeners that change their mode right away.
	var grace <-chan time.Time
	over := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case f := <-w.updates:
			f(st)
		case <-grace:
			over, grace = true, nil
		}
		for drained := false; !drained; { // one publish for everything that waits
			select {
			case f := <-w.updates:
				f(st)
			default:
				drained = true
			}
		}
		if st.service == nil {
			continue
		}
		if name := st.proxy.Service; name != identityStarted {
			stopIdentity()
			ictx, cancel := context.WithCancel(ctx)
			stopIdentity = cancel
			identityStarted = name
			st.leaf, st.heard.intentions, st.heard.defaults = nil, false, false
			w.start(ictx, "leaf", w.fetchLeaf(name))
			w.start(ictx, "intentions", w.fetchIntentions(name))
			w.wg.Add(1)
			go func() {
				defer w.wg.Done()
				w.poll(ictx, "default policy", 30*time.Second, w.fetchDefault(name))
			}()
			w.wg.Add(1)
			go func() {
				defer w.wg.Done()
				defer w.feeds.drop("extensions")
				w.poll(ictx, "extensions", extensionsEvery, w.fetchExtensions(name))
			}()
		}
		if !providersStarted && slices.ContainsFunc(st.matched, requiresToken) {
			providersStarted = true
			w.start(ctx, "jwt providers", w.fetchProviders)
		}
		if st.service.Proxy.Mode == api.ProxyModeTransparent && !modeStarted {
			modeStarted = true
			w.start(ctx, "service-defaults", w.fetchTLSMode(api.ServiceDefaults, st.proxy.Service))
			w.start(ctx, "proxy-defaults", w.fetchTLSMode(api.ProxyDefaults, api.ProxyConfigGlobal))
		}
		if st.moved {
			w.syncUpstreams(ctx, st)
			st.moved = false
		}
		if st.dirty {
			w.syncHosts(ctx, st)
			if snap := st.snapshot(); snap != nil {
				if !over && !st.resolved() {
					if grace == nil {
						grace = time.After(firstGrace)
					}
					continue
				}
				over = true
				st.dirty = false
				publish(snap)
			}
		}
	}
}

func (w *Watcher) start(ctx context.Context, name string, f fetch) {
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		defer w.feeds.drop(name)
		w.follow(ctx, name, f)
	}()
}

func (w *Watcher) fetchService(run context.Context) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		s, meta, err := w.client.api.Agent().Service(w.proxyID, c.options(ctx))
		if err != nil {
			return nil, err
		}
		if s.Kind != api.ServiceKindConnectProxy || s.Proxy == nil {
			return nil, fmt.Errorf("service %q is of kind %q, not a Connect proxy", w.proxyID, s.Kind)
		}
		if err := certs.ServiceName(s.Proxy.DestinationServiceName); err != nil {
			return nil, nameError{err}
		}
		c.advance(meta)
		c.index = 0 // this endpoint blocks on the hash alone
		return func(st *state) {
			if st.service != nil && st.service.ContentHash == s.ContentHash {
				return
			}
			var n connect.Notices
			st.inbound = inbound(s, &n)
			st.declare(upstreams(s, st.inbound.Listeners(), &n))
			st.notices = n
			st.service = s
			st.proxy.ID, st.proxy.ServiceID, st.proxy.Service = s.ID, s.Proxy.DestinationServiceID, s.Proxy.DestinationServiceName
			st.proxy.Namespace, st.proxy.Partition, st.proxy.Datacenter = s.Namespace, s.Partition, s.Datacenter
			st.dirty = true
		}, nil
	}
}

// nameError is of a service that no certificate can be issued for.
type nameError struct{ error }

func (w *Watcher) fetchRoots(ctx context.Context, c *cursor) (func(*state), error) {
	list, meta, err := w.client.api.Agent().ConnectCARoots(c.options(ctx))
	if err != nil {
		return nil, err
	}
	var pems []string
	for _, r := range list.Roots {
		pems = append(pems, r.RootCertPEM) // active or not: leaves of the old one still live
	}
	roots, err := certs.ParseRoots(list.TrustDomain, pems)
	if err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	c.advance(meta)
	return func(st *state) {
		if st.roots == nil || st.roots.Fingerprint != roots.Fingerprint || st.roots.TrustDomain != roots.TrustDomain {
			st.roots, st.proxy.TrustDomain, st.dirty = roots, roots.TrustDomain, true
		}
	}, nil
}

func (w *Watcher) fetchLeaf(service string) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		got, meta, err := w.client.api.Agent().ConnectCALeaf(service, c.options(ctx))
		if err != nil {
			return nil, err
		}
		leaf, err := certs.ParseLeaf(got.CertPEM, got.PrivateKeyPEM)
		if err != nil {
			return nil, err
		}
		if leaf.ID.Service != service {
			return nil, fmt.Errorf("the agent answered with the leaf of %q for %q", leaf.ID.Service, service)
		}
		c.advance(meta)
		c.pause = leafPause
		return func(st *state) {
			if st.leaf == nil || st.leaf.Fingerprint != leaf.Fingerprint {
				st.leaf, st.dirty = leaf, true
			}
		}, nil
	}
}

// wireIntention is api.Intention with the field that the library leaves out.
type wireIntention struct {
	api.Intention
	JWT *api.IntentionJWTRequirement
}

// tokens translates a requirement; nil requires nothing.
func tokens(r *api.IntentionJWTRequirement) (out []intentions.Requirement) {
	if r == nil {
		return nil
	}
	for _, p := range r.Providers {
		if p == nil {
			continue
		}
		one := intentions.Requirement{Provider: p.Name}
		for _, c := range p.VerifyClaims {
			if c != nil {
				one.Claims = append(one.Claims, intentions.Claim{Path: c.Path, Value: c.Value})
			}
		}
		out = append(out, one)
	}
	return out
}

func (w *Watcher) fetchIntentions(service string) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		var got map[string][]wireIntention
		ctx = context.WithValue(ctx, queryKey{}, url.Values{"by": {"destination"}, "name": {service}})
		meta, err := w.client.api.Raw().Query("/v1/connect/intentions/match", &got, c.cached(ctx))
		if err != nil {
			return nil, err
		}
		if _, ok := got[service]; !ok && len(got) != 0 {
			return nil, errors.New("the agent answered for another destination")
		}
		c.advance(meta)
		list := translate(got[service])
		return func(st *state) {
			if !st.heard.intentions || !reflect.DeepEqual(st.matched, list) {
				st.matched, st.heard.intentions, st.dirty = list, true, true
			}
		}, nil
	}
}

func requiresToken(i intentions.Intention) bool {
	return len(i.Tokens) > 0 || slices.ContainsFunc(i.Permissions, func(p intentions.Permission) bool { return len(p.Tokens) > 0 })
}

func translate(in []wireIntention) []intentions.Intention {
	out := make([]intentions.Intention, 0, len(in))
	for _, i := range in {
		o := intentions.Intention{
			Source:     intentions.Source{Name: i.SourceName, Namespace: i.SourceNS, Partition: i.SourcePartition, Peer: i.SourcePeer},
			Allow:      i.Action == api.IntentionActionAllow,
			Precedence: i.Precedence,
		}
		if i.SourceSamenessGroup != "" {
			o.Allow, o.Unsupported = false, "sameness groups are an enterprise feature that is not supported"
		}
		o.Tokens = tokens(i.JWT)
		for _, p := range i.Permissions {
			if p == nil {
				continue
			}
			perm := intentions.Permission{Allow: p.Action == api.IntentionActionAllow}
			if h := p.HTTP; h != nil {
				perm.PathExact, perm.PathPrefix, perm.PathRegex, perm.Methods = h.PathExact, h.PathPrefix, h.PathRegex, h.Methods
				for _, m := range h.Header {
					perm.Headers = append(perm.Headers, intentions.HeaderMatch{Name: m.Name, Present: m.Present, Exact: m.Exact,
						Prefix: m.Prefix, Suffix: m.Suffix, Contains: m.Contains, Regex: m.Regex, Invert: m.Invert, IgnoreCase: m.IgnoreCase})
				}
			}
			perm.Tokens = tokens(p.JWT)
			o.Permissions = append(o.Permissions, perm)
		}
		out = append(out, o)
	}
	return out
}

// defaultProbe is a caller that no intention can name. The authorize endpoint ignores
// its trust domain and datacenter.
const defaultProbe = "spiffe://00000000-0000-0000-0000-000000000000.consul/ns/haproxy-connect-asks-for-the-default/dc/none/svc/nobody"

// fetchDefault learns the effective default policy: an identity of a namespace
// that no intention of the community edition can name always gets the default.
func (w *Watcher) fetchDefault(service string) fetch {
	return func(ctx context.Context, _ *cursor) (func(*state), error) {
		got, err := w.client.authorize(ctx, service, defaultProbe)
		if err != nil {
			return nil, err
		}
		return func(st *state) {
			if !st.heard.defaults || st.allow != got {
				st.allow, st.heard.defaults, st.dirty = got, true, true
			}
		}, nil
	}
}

func (c *Client) authorize(ctx context.Context, target, uri string) (bool, error) {
	done := make(chan struct{})
	var got *api.AgentAuthorize
	var err error
	go func() { // the library gives this call no context
		defer close(done)
		got, err = c.api.Agent().ConnectAuthorize(&api.AgentAuthorizeParams{Target: target, ClientCertURI: uri, ClientCertSerial: "00"})
	}()
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case <-done:
	}
	if err != nil {
		return false, err
	}
	return got.Authorized, nil
}

// syncUpstreams starts a watch for each destination and stops those that are gone.
func (w *Watcher) syncUpstreams(ctx context.Context, st *state) {
	wanted := map[string]bool{}
	for _, d := range st.declared {
		wanted[d.key] = true
		if st.answers[d.key] != nil {
			continue
		}
		uctx, cancel := context.WithCancel(ctx)
		r := &resolved{ctx: uctx, cancel: cancel, destination: d.destination}
		for _, old := range st.answers { // asked in another way, it is known all the same
			if old.destination == d.destination {
				r.chain, r.protocol, r.connect, r.target, r.notices, r.turn = old.chain, old.protocol, old.connect, old.target, old.notices, old.turn
			}
		}
		st.answers[d.key] = r
		name := d.service
		if d.dc != st.proxy.Datacenter {
			name += " in " + d.dc
		}
		if d.query {
			w.wg.Add(1)
			feed := "query " + name
			go func() {
				defer w.wg.Done()
				defer w.feeds.drop(feed)
				w.poll(uctx, feed, d.poll, w.fetchQuery(d))
			}()
			continue
		}
		w.wg.Add(1)
		go func() {
			defer w.wg.Done()
			w.followService(uctx, name, d)
		}()
	}
	for key, r := range st.answers {
		if !wanted[key] {
			r.cancel()
			delete(st.answers, key)
			st.dirty = true
		}
	}
}

// hop is the service that a chain leads to.
type hop struct {
	service, dc, filter, sni string
	onlyPassing              bool
}

// followService follows the chain, and the endpoints of the target it leads to.
func (w *Watcher) followService(ctx context.Context, name string, d declared) {
	hops := make(chan hop)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Add(1)
	go func() {
		defer wg.Done()
		defer w.feeds.drop("chain of " + name)
		w.follow(ctx, "chain of "+name, func(ctx context.Context, c *cursor) (func(*state), error) {
			got, meta, err := w.client.api.DiscoveryChain().Get(d.service, &api.DiscoveryChainOptions{EvaluateInDatacenter: d.dc}, c.cached(ctx))
			if err != nil {
				return nil, err
			}
			if got == nil || got.Chain == nil {
				return nil, errors.New("empty discovery chain")
			}
			c.advance(meta)
			h, timeout, notices := walk(got.Chain, d)
			select {
			case hops <- h:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			proto, _ := connect.ParseProtocol(got.Chain.Protocol)
			return func(st *state) {
				r := st.answers[d.key]
				if r == nil {
					return
				}
				if !r.chain || r.protocol != proto || r.connect != timeout || !reflect.DeepEqual(r.notices, notices) {
					r.chain, r.protocol, r.connect, r.notices, st.dirty = true, proto, timeout, notices, true
					r.turn++
				}
			}, nil
		})
	}()
	var last hop
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case <-ctx.Done():
			return
		case h := <-hops:
			if h == last {
				continue
			}
			last = h
			stop()
			hctx, cancel := context.WithCancel(ctx)
			stop = cancel
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer w.feeds.drop("endpoints of " + name)
				w.follow(hctx, "endpoints of "+name, w.fetchEndpoints(d, h))
			}()
		}
	}
}

// walk finds the one target that everything goes to, and says what it left out.
func walk(chain *api.CompiledDiscoveryChain, d declared) (hop, time.Duration, connect.Notices) {
	var n connect.Notices
	h := hop{service: d.service, dc: d.dc}
	timeout := defaultConnect
	node := chain.Nodes[chain.StartNode]
	for range len(chain.Nodes) + 1 {
		if node == nil {
			break
		}
		switch node.Type {
		case api.DiscoveryGraphNodeTypeRouter:
			if len(node.Routes) == 0 {
				node = nil
				break
			}
			if len(node.Routes) > 1 {
				n.Add(d.where, "service-router", d.service, "routes are not supported yet; everything takes the last, default route")
			}
			node = chain.Nodes[node.Routes[len(node.Routes)-1].NextNode]
			continue
		case api.DiscoveryGraphNodeTypeSplitter:
			best := -1
			for i, s := range node.Splits {
				if best < 0 || s.Weight > node.Splits[best].Weight {
					best = i
				}
			}
			if best < 0 {
				node = nil
				break
			}
			if len(node.Splits) > 1 {
				n.Add(d.where, "service-splitter", d.service, "splits are not supported yet; everything takes the heaviest leg")
			}
			node = chain.Nodes[node.Splits[best].NextNode]
			continue
		case api.DiscoveryGraphNodeTypeResolver:
			if r := node.Resolver; r != nil {
				if r.ConnectTimeout > 0 && r.ConnectTimeout <= maxDuration {
					timeout = r.ConnectTimeout
				}
				if r.Failover != nil {
					n.Add(d.where, "service-resolver failover", d.service, "failover is not supported yet")
				}
				if t := chain.Targets[r.Target]; t != nil {
					h = hop{service: t.Service, dc: t.Datacenter, filter: t.Subset.Filter, onlyPassing: t.Subset.OnlyPassing, sni: t.SNI}
				}
			}
			if node.LoadBalancer != nil && node.LoadBalancer.Policy != "" {
				n.Add(d.where, "service-resolver load_balancer", node.LoadBalancer.Policy, "the policy is not supported yet; requests are balanced by weight")
			}
		}
		break
	}
	return h, timeout, n
}

func (w *Watcher) fetchEndpoints(d declared, h hop) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		q := c.cached(ctx)
		q.Filter = h.filter
		q.Datacenter = h.dc
		// Not "passing": a warning still counts, with its own weight.
		list, meta, err := w.client.api.Health().Connect(h.service, "", false, q)
		if err != nil {
			return nil, err
		}
		c.advance(meta)
		c.pause = time.Duration(len(list)) * pauseEach
		return func(st *state) {
			// The trust domain is filled in when a snapshot is made: the roots may
			// arrive later than this.
			ids := []certs.SPIFFEID{{Partition: "default", Namespace: "default", Datacenter: h.dc, Service: h.service}}
			t := connect.Target{Service: h.service, Datacenter: h.dc, IDs: ids, SNI: h.sni,
				Endpoints: endpoints(list, h.dc != st.proxy.Datacenter, h.onlyPassing)}
			w.retarget(st, d, t)
		}, nil
	}
}

func (w *Watcher) fetchQuery(d declared) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		q := c.options(ctx)
		q.WaitIndex, q.WaitTime, q.Connect, q.Datacenter = 0, 0, true, d.dc
		got, _, err := w.client.api.PreparedQuery().Execute(d.service, q)
		if err != nil {
			return nil, err
		}
		if got == nil {
			return nil, errors.New("empty answer")
		}
		var list []*api.ServiceEntry
		for i := range got.Nodes {
			list = append(list, &got.Nodes[i])
		}
		return func(st *state) {
			seen := map[certs.SPIFFEID]bool{}
			t := connect.Target{Service: d.service, Datacenter: got.Datacenter}
			for _, e := range list {
				if e.Service == nil {
					continue
				}
				id := certs.SPIFFEID{Partition: "default", Namespace: "default", Datacenter: got.Datacenter, Service: e.Service.Service}
				if e.Service.Proxy != nil && e.Service.Proxy.DestinationServiceName != "" {
					id.Service = e.Service.Proxy.DestinationServiceName
				}
				if !seen[id] {
					seen[id] = true
					t.IDs = append(t.IDs, id)
				}
			}
			slices.SortFunc(t.IDs, func(a, b certs.SPIFFEID) int { return strings.Compare(a.String(), b.String()) })
			t.Endpoints = endpoints(list, got.Datacenter != st.proxy.Datacenter, false)
			w.retarget(st, d, t)
		}, nil
	}
}

// restartGrace is how long after trouble with Consul an upstream keeps its endpoints
// although all of them have gone at once. A restarted agent calls every check critical
// until it has run; a server that is elected before gossip has reached it deregisters
// the nodes it has not heard of (agent/consul, reconcileReaped), until their agents
// notice.
const restartGrace = 15 * time.Second

// retarget sets the target of a destination, but holds back what would empty it within
// restartGrace. What comes meanwhile does not prolong that.
func (w *Watcher) retarget(st *state, d declared, t connect.Target) {
	r := st.answers[d.key]
	if r == nil || len(t.Endpoints) > 0 || len(r.target.Endpoints) == 0 || r.target.Service != t.Service {
		st.setTarget(d, t)
		return
	}
	if !r.until.IsZero() {
		r.late = t
		return
	}
	until := w.feeds.settled().Add(restartGrace)
	wait := time.Until(until)
	if wait <= 0 {
		st.setTarget(d, t)
		return
	}
	r.until, r.late = until, t
	w.held.Add(1)
	w.log.Warn("all endpoints have gone just after Consul came back; the last ones stay for now", "upstream", d.up.Name, "for", wait.Round(time.Second),
		"try", "nothing, if they return; else: are the instances registered, and do their checks pass?")
	ctx := r.ctx
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		if pause(ctx, wait) {
			w.send(ctx, func(st *state) {
				if st.answers[d.key] == r && r.until.Equal(until) {
					st.setTarget(d, r.late)
				}
			})
		}
	}()
}

func (st *state) setTarget(d declared, t connect.Target) {
	r := st.answers[d.key]
	if r == nil {
		return
	}
	r.until, r.late = time.Time{}, connect.Target{}
	if !reflect.DeepEqual(r.target, t) {
		r.target, st.dirty = t, true
		r.turn++
	}
}

// endpoints keeps the instances that may be called: any critical check takes one
// out, a warning keeps it at its own weight (agent/structs CheckServiceNodes and
// agent/xds/endpoints.go).
func endpoints(list []*api.ServiceEntry, wan, onlyPassing bool) []connect.Endpoint {
	var out []connect.Endpoint
	taken := map[string]bool{}
	for _, e := range list {
		if e == nil || e.Service == nil || e.Node == nil {
			continue
		}
		status := e.Checks.AggregatedStatus()
		weight := e.Service.Weights.Passing
		if e.Service.Weights == (api.AgentWeights{}) {
			weight = 1 // an agent that sends none
		}
		switch status {
		case api.HealthPassing:
		case api.HealthWarning:
			if onlyPassing {
				continue
			}
			if e.Service.Weights != (api.AgentWeights{}) {
				weight = e.Service.Weights.Warning
			}
		default:
			continue
		}
		if weight <= 0 {
			continue
		}
		host, p := e.Service.Address, e.Service.Port
		if host == "" {
			host = e.Node.Address
		}
		if wan {
			if a, ok := e.Service.TaggedAddresses["wan"]; ok && a.Address != "" {
				host, p = a.Address, a.Port
			} else if a := e.Node.TaggedAddresses["wan"]; a != "" && e.Service.Address == "" {
				host = a
			}
		}
		if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() == "" {
			host = ip.Unmap().String()
		} else if !hostName(host) {
			continue
		}
		if !port(p) {
			continue
		}
		addr := net.JoinHostPort(host, strconv.Itoa(p))
		if taken[addr] {
			continue
		}
		taken[addr] = true
		out = append(out, connect.Endpoint{
			Name: endpointName(e.Node.Node, e.Service.ID, addr),
			Node: e.Node.Node, ID: e.Service.ID, Address: host, Port: p, Weight: min(weight, 128),
		})
	}
	slices.SortFunc(out, func(a, b connect.Endpoint) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// firstGrace bounds how long upstreams may delay the first snapshot.
const firstGrace = 300 * time.Millisecond

// resolved reports whether what a snapshot can do without has been heard of.
func (st *state) resolved() bool {
	if !st.heard.mesh || !st.heard.providers && slices.ContainsFunc(st.matched, requiresToken) {
		return false
	}
	for _, d := range st.declared {
		if r := st.answers[d.key]; r == nil || r.target.Service == "" || (!r.chain && !d.query) {
			return false
		}
	}
	return true
}

// snapshot is nil while something that must be known has not been heard.
func (st *state) snapshot() *connect.Snapshot {
	if st.service == nil || st.roots == nil || st.leaf == nil || !st.heard.intentions || !st.heard.defaults {
		return nil
	}
	if st.leaf.ID.TrustDomain != st.roots.TrustDomain {
		return nil // a new cluster: the other half is on its way
	}
	snap := &connect.Snapshot{Proxy: st.proxy, Inbound: st.inbound, Leaf: st.leaf, Roots: st.roots}
	notices := slices.Concat(st.notices, st.providerNotices, st.extensionNotices)
	snap.Inbound.Normalize, snap.Inbound.SanitizeXFCC = st.mesh.decode(&notices)
	if st.permissive() {
		snap.Inbound.PermissivePort = st.service.Proxy.LocalServicePort
	}
	snap.Upstreams = make([]*connect.Upstream, 0, len(st.declared))
	for i := range st.declared {
		d, m := &st.declared[i], &st.made[i]
		r := st.answers[d.key]
		notices = append(notices, r.notices...)
		if m.turn != r.turn || m.domain != st.roots.TrustDomain {
			u := d.upstream(r, st.roots.TrustDomain)
			u.Target.Endpoints = st.addressed(u.Target.Endpoints)
			if m.up == nil || !reflect.DeepEqual(*m.up, u) {
				m.up = &u
			}
			m.turn, m.domain = r.turn, st.roots.TrustDomain
		}
		snap.Upstreams = append(snap.Upstreams, m.up)
	}
	conf := intentions.Config{Destination: st.proxy.Service, TrustDomain: st.proxy.TrustDomain,
		ServerName: st.proxy.SPIFFEID().SNI(""), Community: st.proxy.Namespace == "" && st.proxy.Partition == "",
		HTTP: st.inbound.Protocol.IsHTTP(), DefaultAllow: st.allow, Intentions: st.matched, Providers: st.providers}
	if st.policy == nil || !reflect.DeepEqual(conf, st.policyFor) {
		st.policy, st.policyFor = intentions.NewPolicy(conf), conf
	}
	snap.Policy = st.policy
	snap.Notices = notices.Sorted()
	return snap
}

// upstream is what was declared, with what is known of its destination.
func (d *declared) upstream(r *resolved, domain string) connect.Upstream {
	u := d.up
	t := u.Target.Name
	u.Target = r.target
	u.Target.IDs = slices.Clone(r.target.IDs)
	for i := range u.Target.IDs {
		u.Target.IDs[i].TrustDomain = domain
	}
	u.Protocol = r.protocol
	if !d.connect && r.connect > 0 {
		u.ConnectTimeout = r.connect
	}
	u.Target.Name = t
	if d.protocol != nil {
		u.Protocol = *d.protocol
	}
	if u.Protocol == "" {
		u.Protocol = connect.TCP
	}
	if !d.idle {
		switch {
		case u.Protocol == connect.GRPC:
			u.IdleTimeout = defaultStream
		case u.Protocol.IsHTTP():
			u.IdleTimeout = defaultUpstreamReq
		default:
			u.IdleTimeout = defaultTCPIdle
		}
	}
	return u
}
