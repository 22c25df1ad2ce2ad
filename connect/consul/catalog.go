package consul

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// serviceNames are the names of all services of a datacenter that may be of the mesh, sorted.
type serviceNames []string

// services returns the watch for the names of all services; its answers are serviceNames. A sidecar that
// registered itself may be all that the catalog has of its service, which it names.
func (c *Client) services() watch {
	return watch{key: "services", name: "services", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		all, meta, err := c.api.Catalog().Services(cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		names := map[string]bool{}
		for name := range all {
			name = strings.TrimSuffix(name, "-sidecar-proxy")
			if name != "consul" && certs.ServiceName(name) == nil {
				names[name] = true
			}
		}
		return serviceNames(slices.Sorted(maps.Keys(names))), nil
	}}
}

// resolvers are the service-resolver entries, by service.
type resolvers map[string]*api.ServiceResolverConfigEntry

// resolvers returns the watch for all entries; its answers are resolvers.
func (c *Client) resolvers() watch {
	return watch{key: "resolvers", name: "service-resolver", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		list, meta, err := c.api.ConfigEntries().List(api.ServiceResolver, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		out := resolvers{}
		for _, e := range list {
			if r, ok := e.(*api.ServiceResolverConfigEntry); ok {
				out[r.Name] = r
			}
		}
		return out, nil
	}}
}

// server is one of Consul's servers.
type server struct {
	node      string
	rpc, grpc connect.Endpoint // Port 0 of grpc: it has none with TLS
	replica   bool
}

// servers returns the watch for Consul's own servers; its answers are []server, sorted.
func (c *Client) servers() watch {
	return watch{key: "servers", name: "servers", shapes: never, fetch: func(ctx context.Context, cur *cursor) (any, error) {
		list, meta, err := c.api.Health().Service("consul", "", false, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		out := []server{}
		for _, e := range list {
			for _, at := range endpoints([]*api.ServiceEntry{e}, false, false) {
				s := server{node: e.Node.Node, rpc: at, replica: e.Service.Meta["read_replica"] == "true"}
				if p, err := strconv.Atoi(e.Service.Meta["grpc_tls_port"]); err == nil && port(p) {
					s.grpc = at
					s.grpc.Port = p
				}
				out = append(out, s)
			}
		}
		slices.SortFunc(out, func(a, b server) int { return strings.Compare(a.rpc.Name, b.rpc.Name) })
		return out, nil
	}}
}

// importedFrom is a service that a peer exports to us. The list has names, with a namespace
// before them in the enterprise edition.
func importedFrom(peer, name string) (destination, bool) {
	name = name[strings.LastIndex(name, "/")+1:]
	return destination{service: name, peer: peer}, certs.ServiceName(name) == nil
}

// peerServers are the addresses of a peer's servers.
func peerServers(list []string) (out []connect.Endpoint) {
	for _, text := range list {
		host, p, err := net.SplitHostPort(text)
		n, perr := strconv.Atoi(p)
		if ip, err2 := netip.ParseAddr(host); err == nil && perr == nil && err2 == nil && port(n) {
			out = append(out, connect.Endpoint{Name: endpointName("server", host, text), Node: "server", ID: host, Address: ip.Unmap().String(), Port: n, Weight: 1})
		}
	}
	slices.SortFunc(out, func(a, b connect.Endpoint) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// exportedServices are the services that are exported; denied: the token may not read them.
type exportedServices struct {
	list []struct {
		Service   string
		Consumers struct{ Peers []string }
	}
	denied bool
}

// exports returns the watch for the exported services, as Consul resolves the entry; its answers
// are exportedServices. A token that loses the right takes away nothing that was known.
func (c *Client) exports() watch {
	known := false
	return watch{key: "exports", name: "exported services", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		var out exportedServices
		meta, err := c.api.Raw().Query("/v1/exported-services", &out.list, cur.options(ctx))
		if isStatus(err, 403) && !known {
			cur.pause = deniedAgain
			return exportedServices{denied: true}, nil
		}
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		known = true
		return out, nil
	}}
}
