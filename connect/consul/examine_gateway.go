package consul

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// examineGateway asks everything that a mesh gateway asks, once, and names each right that is
// missing. It returns the addresses that the gateway will listen on.
func (c *Client) examineGateway(ctx context.Context, s *api.AgentService, say sayer) (listens []string) {
	say("registration", OK, fmt.Sprintf("%s is a gateway of kind %s", s.ID, s.Kind), "")
	var n connect.Notices
	binds, _ := gatewayBinds(s, &n)
	for _, b := range binds {
		listens = append(listens, net.JoinHostPort(b.bind.Address, strconv.Itoa(b.bind.Port)))
	}
	for _, one := range n.Sorted() {
		say("registration", Warn, one.String(), "")
	}
	if len(listens) == 0 {
		say("listener", Fail, "the registration has no address to listen on", "register it with -address, or with envoy_gateway_bind_addresses")
	}
	ask := func(what string, w watch) any {
		v, err := w.fetch(ctx, &cursor{})
		if err != nil {
			say(what, Fail, "cannot be read: "+err.Error(), hint(err))
		}
		return v
	}
	roots, _ := ask("roots", c.roots()).(*certs.Roots)
	switch s.Kind {
	case api.ServiceKindTerminatingGateway:
		c.examineTerminating(s, say, ask)
		return listens
	case api.ServiceKindIngressGateway:
		c.examineIngress(s, say, ask)
		return listens
	case api.ServiceKindAPIGateway:
		c.examineAPI(s, say, ask)
		return listens
	}
	if names, ok := ask("services", c.services()).(serviceNames); ok {
		level, text, fix := OK, fmt.Sprintf("%d may be read", len(names)), ""
		if len(names) == 0 {
			level, text, fix = Warn, "none may be read", `the token needs service_prefix "" and node_prefix "" with read: Consul leaves out what it may not read`
		}
		say("services", level, text, fix)
	}
	if all, ok := ask("mesh gateways", c.meshGateways()).(gateways); ok {
		say("datacenters", OK, fmt.Sprintf("mesh gateways of %d are known", len(all)), "")
	}
	if p, ok := ask("peers", c.peerings()).(peerings); ok {
		switch {
		case p.denied:
			say("peers", Warn, "the token lacks peering:read", `what is imported from peers is not passed on: peering = "read"`)
		case len(p.list) == 0:
			say("peers", OK, "none", "")
		}
		for _, one := range p.shown() {
			level, fix := OK, ""
			if one.State != "ACTIVE" {
				level, fix = Warn, "is the peer's cluster up, and reachable by the servers?"
			}
			say("peers", level, fmt.Sprintf("%s is %s, %d services imported, %d exported", one.Name, one.State, one.Imported, one.Exported), fix)
		}
	}
	x, ok := ask("exported services", c.exports()).(exportedServices)
	switch {
	case !ok:
	case x.denied:
		say("exported services", Warn, "the token lacks mesh:read", `what is exported to peers is not passed on: mesh = "read"`)
	default:
		say("exported services", OK, strconv.Itoa(len(x.list)), "")
		if roots != nil && len(x.list) > 0 {
			c.examineSigning(ctx, certs.MeshGateway(roots.TrustDomain, s.Datacenter), say)
		}
	}
	return listens
}

// examineIngress looks at what an ingress gateway is to serve.
func (c *Client) examineIngress(s *api.AgentService, say sayer, ask func(what string, w watch) any) {
	if leaf, ok := ask("leaf", c.leaf(s.Service)).(*certs.Leaf); ok {
		say("leaf", OK, "of "+leaf.ID.String(), "")
	}
	list, ok := ask("ingress-gateway", entries[api.IngressGatewayConfigEntry](c, api.IngressGateway, s.Service)).([]api.IngressGatewayConfigEntry)
	switch {
	case !ok:
	case len(list) == 0:
		say("ingress-gateway", Warn, "there is no entry of the name "+s.Service, "write one: nothing is served before")
	default:
		say("ingress-gateway", OK, fmt.Sprintf("%d listeners", len(list[0].Listeners)), "")
	}
	bound, ok := ask("services", c.gatewayServices(s.Service)).([]boundService)
	if ok && len(bound) == 0 && len(list) > 0 {
		say("services", Warn, "none is bound to a listener", "do they exist, with the protocol of the listener?")
	} else if ok {
		say("services", OK, fmt.Sprintf("%d are bound to listeners", len(bound)), "")
	}
}

// examineTerminating looks at what a terminating gateway is to serve.
func (c *Client) examineTerminating(s *api.AgentService, say sayer, ask func(what string, w watch) any) {
	list, ok := ask("services", c.gatewayServices(s.Service)).([]boundService)
	if ok && len(list) == 0 {
		say("services", Warn, "none is linked to "+s.Service, "write a terminating-gateway entry of this name: nobody is served before")
	}
	for i := range list {
		name := list[i].Service.Name
		if leaf, ok := ask("service "+name, c.leaf(name)).(*certs.Leaf); ok {
			say("service "+name, OK, "leaf of "+leaf.ID.String(), "")
		}
		if list[i].CAFile != "" {
			ask("service "+name, rootsFile(list[i].CAFile))
		}
	}
}

// examineAPI looks at what an API gateway is to serve.
func (c *Client) examineAPI(s *api.AgentService, say sayer, ask func(what string, w watch) any) {
	if leaf, ok := ask("leaf", c.leaf(s.Service)).(*certs.Leaf); ok {
		say("leaf", OK, "of "+leaf.ID.String(), "")
	}
	k := &apiGateway{edge{gateway: gateway{client: c, service: s}}}
	list, ok := ask("api-gateway", k.entry()).([]api.APIGatewayConfigEntry)
	switch {
	case !ok:
	case len(list) == 0:
		say("api-gateway", Warn, "there is no entry of the name "+s.Service, "write one: nothing is served before")
	default:
		for _, l := range list[0].Listeners {
			if conflicted(&list[0], l.Name) {
				say("api-gateway", Warn, "the routes of listener "+l.Name+" contradict each other; it serves nothing", "consul config read -kind api-gateway -name "+s.Service+" tells which")
			}
		}
		say("api-gateway", OK, fmt.Sprintf("%d listeners", len(list[0].Listeners)), "")
	}
	routes, ok := ask("routes", c.httpRoutes()).([]api.HTTPRouteConfigEntry)
	if ok && len(routes) == 0 {
		say("routes", Warn, "no http-route can be read", `if there are some, the token lacks mesh:read: mesh = "read"`)
	} else if ok {
		say("routes", OK, fmt.Sprintf("%d http-routes can be read", len(routes)), "")
	}
}

// examineSigning tries what is needed only where a service of http is exported.
func (c *Client) examineSigning(ctx context.Context, id certs.SPIFFEID, say sayer) {
	_, err := c.sign(ctx, id, nil)
	var right rightError
	switch {
	case err == nil:
		say("leaf", OK, "the agent signs for "+id.String(), "")
	case errors.As(err, &right):
		say("leaf", Warn, "the token lacks "+right.right, `exported services of http are not passed on: mesh = "write"`)
	default:
		say("leaf", Warn, err.Error(), hint(err))
	}
}
