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

// declared is one upstream of the registration, decoded.
type declared struct {
	key string // of the watch: everything that is asked

	destination string // what is asked about
	query       bool
	service     string
	dc          string
	where       string
	up          connect.Upstream
	protocol    *connect.Protocol // nil: the chain's
	connect     bool              // connect timeout was set
	idle        bool
	poll        time.Duration
}

// upstreams decodes every listener of a registration. A broken one is left out
// with a notice; the others stay. own are the listeners of the inbound side.
func upstreams(s *api.AgentService, own []connect.Listener, n *connect.Notices) []declared {
	var out []declared
	used := map[string]int{}
	taken := map[int][]connect.Listener{}
	for _, l := range own {
		taken[l.Port] = append(taken[l.Port], l)
	}
	sockets := map[string]bool{}
	for _, u := range s.Proxy.Upstreams {
		if u.DestinationName == "*" || (u.LocalBindPort == 0 && u.LocalBindSocketPath == "") {
			continue // central defaults, not a listener
		}
		d := declared{query: u.DestinationType == api.UpstreamDestTypePreparedQuery, service: u.DestinationName, dc: u.Datacenter}
		d.where = "upstream " + u.DestinationName
		if err := certs.ServiceName(d.service); err != nil && !d.query {
			n.Add(d.where, "destination_name", u.DestinationName, err.Error()+"; the upstream is left out")
			continue
		}
		if d.service == "" || len(d.service) > 256 || strings.ContainsFunc(d.service, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' || r == '?' || r == '#' || r == '%' }) || strings.Contains(d.service, "..") {
			n.Add(d.where, "destination_name", u.DestinationName, "not a service's name; the upstream is left out")
			continue
		}
		if u.DestinationPeer != "" {
			n.Add(d.where, "destination_peer", u.DestinationPeer, "cluster peering is not supported; the upstream is left out")
			continue
		}
		if d.dc == "" {
			d.dc = s.Datacenter
		}
		gateway := u.MeshGateway.Mode
		if gateway == api.MeshGatewayModeDefault {
			gateway = s.Proxy.MeshGateway.Mode
		}
		if d.dc != s.Datacenter && gateway != api.MeshGatewayModeDefault && gateway != api.MeshGatewayModeNone {
			n.Add(d.where, "mesh_gateway.mode", string(gateway), "mesh gateways are not supported; instances are dialled at their WAN address")
		}
		for key, v := range map[string]string{"destination_namespace": u.DestinationNamespace, "destination_partition": u.DestinationPartition} {
			if v != "" && v != "default" {
				n.Add(d.where, key, v, "an enterprise feature that is not supported; the default one is called")
			}
		}
		if !d.listener(u, n) {
			continue
		}
		if l := d.up.Listen; l.SocketPath != "" && sockets[l.SocketPath] || slices.ContainsFunc(taken[l.Port], l.Clashes) {
			n.Add(d.where, "local_bind_port", fmt.Sprintf("%s%s:%d", l.SocketPath, l.Address, l.Port), "another listener of this proxy has it; the upstream is left out")
			continue
		} else if l.SocketPath != "" {
			sockets[l.SocketPath] = true
		} else {
			taken[l.Port] = append(taken[l.Port], l)
		}
		d.settings(u, n)
		name := connect.SafeName(d.service)
		if d.query {
			name += ".query"
		}
		d.up.Name, d.up.Target.Name = name, name+".default."+connect.SafeName(d.dc)
		if d.dc != s.Datacenter {
			d.up.Name += "." + connect.SafeName(d.dc)
		}
		if used[d.up.Target.Name]++; used[d.up.Target.Name] > 1 {
			again := fmt.Sprintf("_%d", used[d.up.Target.Name])
			d.up.Name += again
			d.up.Target.Name += again
		}
		d.destination = fmt.Sprintf("%t\x00%s\x00%s", d.query, d.service, d.dc)
		d.key = d.destination
		if d.query { // asked so often: another interval is another watch
			d.key += "\x00" + d.poll.String()
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b declared) int { return strings.Compare(a.up.Name, b.up.Name) })
	return out
}

func (d *declared) listener(u api.Upstream, n *connect.Notices) bool {
	l := &d.up.Listen
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
	l.Address, l.Port = address(d.where, "local_bind_address", u.LocalBindAddress, "127.0.0.1", n), u.LocalBindPort
	return true
}

func (d *declared) settings(u api.Upstream, n *connect.Notices) {
	k := newKeys(d.where, u.Config, n)
	if _, _, ok := k.get("protocol"); ok {
		p := k.protocol(connect.TCP)
		d.protocol = &p
	}
	d.up.ConnectTimeout = defaultConnect
	if _, _, ok := k.get("connect_timeout_ms"); ok {
		d.connect = true
		d.up.ConnectTimeout = nonZero(k.ms(defaultConnect, "connect_timeout_ms"), defaultConnect)
	} else if _, _, ok := k.get("connect_timeout"); ok {
		d.connect = true
		d.up.ConnectTimeout = k.duration(defaultConnect, "connect_timeout")
	}
	if _, _, ok := k.get("read_timeout"); ok {
		d.idle = true
		d.up.IdleTimeout = k.duration(defaultUpstreamReq, "read_timeout")
	}
	d.poll = max(k.duration(defaultPoll, "poll_interval"), time.Second)
	if l := k.sub("limits"); l != nil {
		d.up.Limits = connect.Limits{
			MaxConnections:        l.limit("max_connections", "MaxConnections"),
			MaxPendingRequests:    l.limit("max_pending_requests", "MaxPendingRequests"),
			MaxConcurrentRequests: l.limit("max_concurrent_requests", "MaxConcurrentRequests"),
		}
		l.rest()
	}
	if h := k.sub("passive_health_check"); h != nil {
		d.up.Passive = &connect.PassiveHealth{
			Interval:     h.duration(10*time.Second, "interval", "Interval"),
			MaxFailures:  h.int(5, 1, 1<<20, "max_failures", "MaxFailures"),
			BaseEjection: h.duration(30*time.Second, "base_ejection_time", "BaseEjectionTime"),
		}
		d.up.Passive.Enforced = h.int(100, 0, 100, "enforcing_consecutive_5xx", "EnforcingConsecutive5xx")
		if _, _, ok := h.get("max_ejection_percent", "MaxEjectionPercent"); ok {
			if pct := h.int(-1, 0, 100, "max_ejection_percent", "MaxEjectionPercent"); pct >= 0 {
				d.up.Passive.MaxEjected = &pct
			}
		}
		if d.up.Passive.Enforced == 0 {
			d.up.Passive = nil
		}
		h.rest()
	}
	d.up.BalanceExact = k.balance("balance_outbound_connections")
	k.get("mesh_gateway") // merged by Consul beside the structured field
	k.rest()
}
