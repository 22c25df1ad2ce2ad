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
	hostEvery    = 10 * time.Second // names are looked up; what a name means may change
	maxAddresses = 32               // of one name
)

// host is a name that instances are registered with instead of an address.
type host struct {
	cancel    context.CancelFunc
	addresses []string // as last heard; nil: nothing yet
}

// hostName reports whether a text can be asked of a name server.
func hostName(s string) bool {
	return s != "" && len(s) <= 253 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.')
	})
}

// syncHosts looks up the names that endpoints have, and no others.
func (w *Watcher) syncHosts(ctx context.Context, st *state) {
	wanted := map[string]bool{}
	for _, r := range st.answers {
		for i := range r.target.Endpoints {
			if name := r.target.Endpoints[i].Address; !isAddress(name) {
				wanted[name] = true
			}
		}
	}
	for name := range wanted {
		if st.hosts[name] != nil {
			continue
		}
		hctx, cancel := context.WithCancel(ctx)
		st.hosts[name] = &host{cancel: cancel}
		w.wg.Add(1)
		feed := "address of " + name
		go func() {
			defer w.wg.Done()
			defer w.feeds.drop(feed)
			w.poll(hctx, feed, hostEvery, fetchHost(name))
		}()
	}
	for name, h := range st.hosts {
		if !wanted[name] {
			h.cancel()
			delete(st.hosts, name)
		}
	}
}

func isAddress(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

// lookupError is an answer of the name server, not of Consul.
type lookupError struct{ error }

func fetchHost(name string) fetch {
	return func(ctx context.Context, _ *cursor) (func(*state), error) {
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
		list = list[:min(len(list), maxAddresses)]
		return func(st *state) {
			h := st.hosts[name]
			if h == nil || slices.Equal(h.addresses, list) {
				return
			}
			h.addresses, st.dirty = list, true
			for _, r := range st.answers {
				if slices.ContainsFunc(r.target.Endpoints, func(e connect.Endpoint) bool { return e.Address == name }) {
					r.turn++
				}
			}
		}, nil
	}
}

// addressed replaces endpoints that have a host name by one for each of its addresses, as
// last heard of.
func (st *state) addressed(list []connect.Endpoint) []connect.Endpoint {
	if !slices.ContainsFunc(list, func(e connect.Endpoint) bool { return !isAddress(e.Address) }) {
		return list
	}
	var out []connect.Endpoint
	taken := map[string]bool{}
	for _, e := range list {
		addresses := []string{e.Address}
		if h := st.hosts[e.Address]; !isAddress(e.Address) {
			addresses = nil
			if h != nil {
				addresses = h.addresses
			}
		}
		for _, a := range addresses {
			one := e
			one.Address = a
			if at := net.JoinHostPort(a, fmt.Sprint(e.Port)); a != e.Address {
				one.Name = endpointName(e.Node, e.ID, at)
				if taken[at] {
					continue
				}
				taken[at] = true
			}
			out = append(out, one)
		}
	}
	slices.SortFunc(out, func(a, b connect.Endpoint) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func endpointName(node, id, at string) string {
	return connect.SafeName(node+"."+id) + "." + connect.Digest(at)
}
