package consul

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

const (
	hostEvery    = 10 * time.Second // how often names are looked up: their addresses may change
	maxAddresses = 32               // of one name
)

// hostName reports whether a text can be asked of a name server.
func hostName(s string) bool {
	return s != "" && len(s) <= 253 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	})
}

func isAddress(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

// lookupError is an answer of the name server, not of Consul.
type lookupError struct{ error }

// address returns the watch for the addresses of a host name that instances are registered
// with; its answers are []string, sorted. Only host names of endpoints are looked up.
func address(name string) watch {
	return watch{key: "address\x00" + name, name: "address of " + name, every: hostEvery, shapes: never, fetch: func(ctx context.Context, _ *cursor) (any, error) {
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		if err == nil && len(ips) == 0 {
			err = errors.New("no address")
		}
		if err != nil {
			return nil, lookupError{fmt.Errorf("an instance is registered with the host name %s, which cannot be looked up: %w", name, err)}
		}
		var list []string
		for _, ip := range ips {
			list = append(list, ip.Unmap().WithZone("").String())
		}
		slices.Sort(list)
		list = slices.Compact(list)
		return list[:min(len(list), maxAddresses)], nil
	}}
}

// named reports whether an endpoint has a host name in place of an address.
func named(e connect.Endpoint) bool { return !isAddress(e.Address) }

// addressed replaces endpoints that have a host name by one for each of its addresses, as
// last heard of.
func (st *state) addressed(list []connect.Endpoint) []connect.Endpoint {
	if !slices.ContainsFunc(list, named) {
		return list
	}
	var out []connect.Endpoint
	taken := map[string]bool{}
	for _, e := range list {
		if !named(e) {
			out = append(out, e)
			continue
		}
		known, _ := heard[[]string](st, address(e.Address).key)
		for _, a := range known {
			one := e
			one.Address = a
			at := net.JoinHostPort(a, fmt.Sprint(e.Port))
			if one.Name = endpointName(e.Node, e.ID, at); !taken[at] {
				taken[at] = true
				out = append(out, one)
			}
		}
	}
	slices.SortFunc(out, func(a, b connect.Endpoint) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func endpointName(node, id, at string) string {
	return connect.SafeName(node+"."+id) + "." + connect.Digest(at)
}
