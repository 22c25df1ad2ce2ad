package consul

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// declared is one upstream of the registration, decoded. Nothing in it changes afterwards.
type declared struct {
	name     string            // of its listener
	group    connect.GroupName // of the group that everything goes to
	query    bool
	service  string // or the prepared query
	dc       string
	other    bool   // dc is not ours
	peer     string // "": our own cluster
	gateway  api.MeshGatewayMode
	where    string // for notices
	suffix   string // ends the names of its targets, so that they are nobody else's; "" shares them
	bind     connect.Bind
	protocol connect.Protocol // "": the chain's
	connect  time.Duration    // 0: the chain's
	idle     time.Duration    // 0: by protocol
	limits   connect.Limits
	passive  *connect.PassiveHealth
	poll     time.Duration
	extras   extras
}

// upstreams decodes the upstreams of a registration. A broken upstream is left out
// with a notice; the others stay. own are the addresses of the public side.
func upstreams(s *api.AgentService, own []connect.Bind, n *connect.Notices) []*declared {
	var out []*declared
	used := map[string]bool{} // names of listeners, and after a zero byte of groups
	taken := map[int][]connect.Bind{}
	for _, b := range own {
		taken[b.Port] = append(taken[b.Port], b)
	}
	sockets := map[string]bool{}
	for _, u := range s.Proxy.Upstreams {
		if u.DestinationName == "*" || (u.LocalBindPort == 0 && u.LocalBindSocketPath == "") {
			continue // central defaults, not a listener
		}
		d := &declared{query: u.DestinationType == api.UpstreamDestTypePreparedQuery, service: u.DestinationName, dc: u.Datacenter}
		d.where = "upstream " + u.DestinationName
		if err := certs.ServiceName(d.service); err != nil && !d.query {
			n.Add(d.where, "destination_name", u.DestinationName, err.Error()+"; the upstream is left out")
			continue
		}
		if d.service == "" || len(d.service) > 256 || strings.ContainsFunc(d.service, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' || r == '?' || r == '#' || r == '%' }) || strings.Contains(d.service, "..") {
			n.Add(d.where, "destination_name", u.DestinationName, "not a service's name; the upstream is left out")
			continue
		}
		if d.peer = u.DestinationPeer; d.peer != "" {
			d.where += " of peer " + d.peer
			if d.query || d.dc != "" || certs.ServiceName(d.peer) != nil {
				n.Add(d.where, "destination_peer", d.peer, "want the name of a peer, a service and no datacenter; the upstream is left out")
				continue
			}
		}
		if d.dc == "" {
			d.dc = s.Datacenter
		}
		if d.gateway = u.MeshGateway.Mode; d.gateway == api.MeshGatewayModeDefault {
			d.gateway = s.Proxy.MeshGateway.Mode
		}
		if d.query && d.dc != s.Datacenter && d.gateway != api.MeshGatewayModeDefault && d.gateway != api.MeshGatewayModeNone {
			n.Add(d.where, "mesh_gateway.mode", string(d.gateway), "instances of a prepared query are called at their WAN address")
		}
		for key, v := range map[string]string{"destination_namespace": u.DestinationNamespace, "destination_partition": u.DestinationPartition} {
			if v != "" && v != "default" {
				n.Add(d.where, key, v, "namespaces and partitions are enterprise features and not supported; the default one is called")
			}
		}
		if !d.listener(u, n) {
			continue
		}
		d.other = d.dc != s.Datacenter
		if b := d.bind; b.SocketPath != "" && sockets[b.SocketPath] || slices.ContainsFunc(taken[b.Port], b.Clashes) {
			n.Add(d.where, "local_bind_port", fmt.Sprintf("%s%s:%d", b.SocketPath, b.Address, b.Port), "another listener of this proxy has it; the upstream is left out")
			continue
		} else if b.SocketPath != "" {
			sockets[b.SocketPath] = true
		} else {
			taken[b.Port] = append(taken[b.Port], b)
		}
		d.settings(u, n)
		name := connect.SafeName(d.service)
		if d.query {
			name += ".query"
		}
		d.name, d.group = name, connect.GroupName(name+".default."+connect.SafeName(d.dc))
		switch {
		case d.peer != "":
			d.name += "." + connect.SafeName(d.peer)
			d.group = connect.GroupName(name + ".default." + connect.SafeName(d.peer) + ".peer")
		case d.other:
			d.name += "." + connect.SafeName(d.dc)
		}
		for again, first := 2, *d; used[d.name] || used["\x00"+string(d.group)]; again++ {
			d.name = fmt.Sprintf("%s_%d", first.name, again)
			d.group = connect.GroupName(fmt.Sprintf("%s_%d", first.group, again))
		}
		used[d.name], used["\x00"+string(d.group)] = true, true
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b *declared) int { return strings.Compare(a.name, b.name) })
	return out
}

// peered is a service of a peer. Its gateways are called, but in mode local one of ours.
func (d *declared) peered(service, peer string, mode api.MeshGatewayMode) destination {
	to := destination{service: service, peer: peer}
	if mode == api.MeshGatewayModeDefault {
		mode = d.gateway
	}
	if mode == api.MeshGatewayModeLocal {
		to.via = viaLocal
	}
	return to
}

func (d *declared) listener(u api.Upstream, n *connect.Notices) bool {
	l := &d.bind
	if u.LocalBindSocketPath != "" {
		if l.SocketPath = socket(d.where, "local_bind_socket_path", u.LocalBindSocketPath, n); l.SocketPath == "" {
			return false
		}
		l.SocketMode = "600"
		if m := u.LocalBindSocketMode; m != "" {
			if v, err := strconv.ParseUint(m, 8, 16); err != nil || v > 0o777 {
				n.Add(d.where, "local_bind_socket_mode", m, "want an octal mode such as 0660; 0600 is used")
			} else {
				l.SocketMode = strconv.FormatUint(v, 8)
			}
		}
		return true
	}
	if !port(u.LocalBindPort) {
		n.Add(d.where, "local_bind_port", strconv.Itoa(u.LocalBindPort), "want a port from 1 to 65535; the upstream is left out")
		return false
	}
	l.Address, l.Port = ipAddress(d.where, "local_bind_address", u.LocalBindAddress, "127.0.0.1", n), u.LocalBindPort
	return true
}

func (d *declared) settings(u api.Upstream, n *connect.Notices) {
	k := newKeys(d.where, u.Config, n)
	if _, _, ok := k.get("protocol"); ok {
		d.protocol = k.protocol(connect.TCP)
	}
	if _, _, ok := k.get("connect_timeout_ms"); ok {
		d.connect = nonZero(k.ms(defaultConnect, "connect_timeout_ms"), defaultConnect)
	} else if _, _, ok := k.get("connect_timeout"); ok {
		d.connect = k.duration(defaultConnect, "connect_timeout")
	}
	if _, _, ok := k.get("read_timeout"); ok {
		d.idle = k.duration(defaultUpstreamReq, "read_timeout")
	}
	d.poll = max(k.duration(defaultPoll, "poll_interval"), time.Second)
	if l := k.sub("limits"); l != nil {
		d.limits = connect.Limits{
			MaxConnections:        l.limit("max_connections", "MaxConnections"),
			MaxPendingRequests:    l.limit("max_pending_requests", "MaxPendingRequests"),
			MaxConcurrentRequests: l.limit("max_concurrent_requests", "MaxConcurrentRequests"),
		}
		l.rest()
	}
	if h := k.sub("passive_health_check"); h != nil {
		d.passive = &connect.PassiveHealth{
			Interval:     h.duration(10*time.Second, "interval", "Interval"),
			MaxFailures:  h.int(5, 1, 1<<20, "max_failures", "MaxFailures"),
			BaseEjection: h.duration(30*time.Second, "base_ejection_time", "BaseEjectionTime"),
		}
		d.passive.Enforced = h.int(100, 0, 100, "enforcing_consecutive_5xx", "EnforcingConsecutive5xx")
		if _, _, ok := h.get("max_ejection_percent", "MaxEjectionPercent"); ok {
			if pct := h.int(-1, 0, 100, "max_ejection_percent", "MaxEjectionPercent"); pct >= 0 {
				d.passive.MaxEjected = &pct
			}
		}
		if d.passive.Enforced == 0 {
			d.passive = nil
		}
		h.rest()
	}
	d.extras = k.extras(true)
	k.balance("balance_outbound_connections") // HAProxy spreads connections over its threads anyway
	k.get("mesh_gateway")                     // Consul merges it in; the structured field says the same
	k.rest()
}
