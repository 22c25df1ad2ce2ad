package consul

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
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
