package consul

import (
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// gateway is what every kind of gateway has in common.
type gateway struct {
	client       *Client
	registration string // the watch's key

	turn    uint64 // of the registration from which the fields below were decoded
	service *api.AgentService
	binds   []gatewayBind
	seen    seen
	notices connect.Notices

	nouns *nouns
}

func newGateway(c *Client, registration string) gateway {
	return gateway{client: c, registration: registration, nouns: &nouns{}}
}

// decode reads the registration if it has changed, and reports whether it has.
func (k *gateway) decode(st *state) bool {
	turn := st.turnOf(k.registration)
	if k.turn == turn {
		return false
	}
	k.turn = turn
	k.service, _ = heard[*api.AgentService](st, k.registration)
	k.notices = nil
	k.binds, k.seen = gatewayBinds(k.service, &k.notices)
	return true
}

// own is the datacenter of the gateway.
func (k *gateway) own() string { return k.service.Datacenter }

// proxy says who the gateway is; kind is in words.
func (k *gateway) proxy(kind, trustDomain string) connect.Proxy {
	return connect.Proxy{ID: k.service.ID, Service: k.service.Service, Kind: kind, Namespace: k.service.Namespace, Partition: k.service.Partition,
		Datacenter: k.own(), TrustDomain: trustDomain}
}

// relays adds a listener at each address, by which names lead to their targets.
func (k *gateway) relays(r *relay) {
	slices.SortFunc(r.branches, func(a, b connect.Branch) int { return strings.Compare(a.Match.SNI, b.Match.SNI) })
	for _, b := range k.binds {
		r.to.listener(&connect.Listener{Name: b.name, Role: connect.Relay, Bind: b.bind, Idle: relayIdle, Branches: r.branches})
	}
}

// end completes a snapshot.
func (k *gateway) end(snap *connect.Snapshot, to *nouns, notices connect.Notices) {
	k.nouns = to
	snap.Notices = notices.Sorted()
	k.seen.into(snap)
	to.into(snap)
}
