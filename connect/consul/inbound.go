package consul

import (
	"fmt"
	"slices"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// inbound is the public side of a registration, decoded. If bind.Port is 0, the service only
// calls others.
type inbound struct {
	bind         connect.Bind
	protocol     connect.Protocol
	app          connect.Endpoint
	connect      time.Duration
	request      time.Duration // < 0: none
	idle         time.Duration
	most         *int // connections; nil: unlimited
	unsecured    int  // port of a plain listener beside the mesh; 0: none
	forwardFor   bool
	callerHeader string
	expose       []exposed
	checks       bool // expose.checks
	telemetry    connect.Telemetry
	accessLog    connect.AccessLog
	extras       extras
}

// exposed is one exact path of the application that is open without mutual TLS.
type exposed struct {
	path      string
	app, port int
	protocol  connect.Protocol
	from      []string // see connect.Listener
}

func (in *inbound) unsecuredBind() connect.Bind {
	return connect.Bind{Address: "0.0.0.0", Port: in.unsecured}
}

func (in *inbound) exposeBind(port int) connect.Bind {
	return connect.Bind{Address: in.bind.Address, Port: port}
}

// binds are what the public side listens on.
func (in *inbound) binds() []connect.Bind {
	if in.bind.Port == 0 {
		return nil
	}
	out := []connect.Bind{in.bind}
	if in.unsecured != 0 {
		out = append(out, in.unsecuredBind())
	}
	for _, e := range in.expose {
		out = append(out, in.exposeBind(e.port))
	}
	return out
}

// registered is the origin of what a registration says; Consul merges two entries into it.
const registered = "registration, with service-defaults and proxy-defaults"

// Names of the groups, and of their targets, that are the application.
const (
	appGroup        = "local_app"
	permissiveGroup = "permissive_app"
)

// add makes the nouns of the public side. permissive lets in plain connections whose original
// destination was the application's own port; checks are the paths that the agent's checks ask for.
func (in *inbound) add(to *nouns, guard *connect.Guard, permissive bool, checks []exposed) {
	if in.bind.Port == 0 {
		return
	}
	public := &connect.Listener{Name: "public", Role: connect.Public, Bind: in.bind, Idle: in.idle, MaxConnections: in.most, Extras: in.extras.listener, Origin: registered,
		Branches: []connect.Branch{{Protocol: in.protocol, Guard: guard, Chain: connect.Direct(appGroup)}}}
	app := &connect.Group{Name: appGroup, Protocol: in.protocol, Connect: in.connect, Idle: in.idle, ForwardFor: in.forwardFor,
		Limits: connect.Limits{MaxConnections: in.most}}
	if in.protocol.IsHTTP() {
		app.Idle = in.request
	}
	if permissive {
		public.Branches = append(public.Branches, connect.Branch{Match: connect.Match{Port: in.app.Port}, Protocol: connect.TCP, Chain: connect.Direct(permissiveGroup)})
		in.group(to, &connect.Group{Name: permissiveGroup, Protocol: connect.TCP, Connect: in.connect, Idle: in.idle}, in.app)
	}
	to.listener(public)
	in.group(to, app, in.app)
	if in.unsecured != 0 {
		to.listener(&connect.Listener{Name: "unsecured", Role: connect.Open, Opened: "unsecured_bind_port", Origin: registered, Bind: in.unsecuredBind(),
			Branches: []connect.Branch{{Protocol: in.protocol, Chain: connect.Direct(appGroup)}}})
	}
	in.exposed(to, "expose.paths", in.expose)
	in.exposed(to, "expose.checks", slices.DeleteFunc(slices.Clone(checks), func(c exposed) bool {
		return slices.ContainsFunc(in.binds(), in.exposeBind(c.port).Clashes)
	}))
}

// exposed makes a listener for each port, with a route for each path.
func (in *inbound) exposed(to *nouns, setting string, list []exposed) {
	var chain connect.Chain
	for i, e := range list {
		name := fmt.Sprintf("expose_%d", e.port)
		group := connect.GroupName(fmt.Sprintf("%s_%d_app", name, len(chain.Routes)))
		route := connect.Direct(group).Routes[0]
		route.Match.PathExact = e.path
		chain.Routes = append(chain.Routes, route)
		app := in.app
		if e.app != 0 {
			app = connect.Endpoint{Name: "app", Address: in.app.Address, Port: e.app, Weight: 1}
		}
		in.group(to, &connect.Group{Name: group, Protocol: e.protocol, Connect: in.connect}, app)
		if i+1 < len(list) && list[i+1].port == e.port {
			continue
		}
		to.listener(&connect.Listener{Name: name, Role: connect.Open, Opened: setting, From: e.from, Origin: registered, Bind: in.exposeBind(e.port),
			Branches: []connect.Branch{{Protocol: connect.HTTP, Chain: chain}}})
		chain = connect.Chain{}
	}
}

// group makes a group of the application, and its target of the same name.
func (in *inbound) group(to *nouns, g *connect.Group, app connect.Endpoint) {
	g.Targets, g.Origin = []connect.TargetName{connect.TargetName(g.Name)}, registered
	to.group(g)
	to.target(&connect.Target{Name: g.Targets[0], Dial: connect.Dial{How: connect.App}, Endpoints: []connect.Endpoint{app}})
}
