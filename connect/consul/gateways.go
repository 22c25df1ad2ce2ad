package consul

import (
	"context"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// gateways are the mesh gateways that may be called, by datacenter.
type gateways map[string]gatewayAddresses

// gatewayAddresses are where the gateways of a datacenter are: for its own members, and for
// those of other datacenters.
type gatewayAddresses struct{ lan, wan []connect.Endpoint }

// meshGateways returns the watch for the mesh gateways of all datacenters; its answers are gateways.
// Every datacenter knows them all, also while another one cannot be reached.
func (c *Client) meshGateways() watch {
	return watch{key: "mesh gateways", name: "mesh gateways", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		var all map[string][]*api.ServiceEntry
		meta, err := c.api.Raw().Query("/v1/internal/federation-states/mesh-gateways", &all, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		out := make(gateways, len(all))
		for dc, list := range all {
			out[dc] = gatewayAddresses{endpoints(list, false, false), endpoints(list, true, false)}
		}
		return out, nil
	}}
}

// Ways to a destination outside our own datacenter, as Consul spells them.
const (
	viaLocal  = string(api.MeshGatewayModeLocal)  // a gateway of our own datacenter
	viaRemote = string(api.MeshGatewayModeRemote) // a gateway of the destination's
)

// through is the answer of who may be called where a destination is behind gateways.
func (g gateways) through(d destination, own string) instances {
	out := instances{dc: d.dc, sni: d.sni}
	if d.peer == "" {
		out.ids = d.ids()
	}
	list := g[own].lan
	if d.via == viaRemote {
		list = g[d.dc].wan
	}
	return out.found(list)
}
