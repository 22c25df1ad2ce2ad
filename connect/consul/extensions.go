package consul

import (
	"context"
	"reflect"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// extensionsEvery is how often the entries are read: they are only named to people, and a
// blocking query for each would cost a connection.
const extensionsEvery = time.Minute

// fetchExtensions names the EnvoyExtensions of the service and of all proxies. Consul does
// not merge them into the registration, but applies them in its servers (agent/envoyextensions).
func (w *Watcher) fetchExtensions(service string) fetch {
	return func(ctx context.Context, _ *cursor) (func(*state), error) {
		var n connect.Notices
		q := (&api.QueryOptions{AllowStale: true, UseCache: false}).WithContext(ctx)
		for _, one := range []struct{ kind, name string }{{api.ServiceDefaults, service}, {api.ProxyDefaults, api.ProxyConfigGlobal}} {
			entry, _, err := w.client.api.ConfigEntries().Get(one.kind, one.name, q)
			if isStatus(err, 404) || isStatus(err, 403) { // there is none, or none for us
				continue
			}
			if err != nil {
				return nil, err
			}
			var list []api.EnvoyExtension
			switch e := entry.(type) {
			case *api.ServiceConfigEntry:
				list = e.EnvoyExtensions
			case *api.ProxyConfigEntry:
				list = e.EnvoyExtensions
			}
			for _, x := range list {
				n.Add(one.kind+" "+one.name, "EnvoyExtensions", x.Name, "it is Envoy's own and has no meaning for HAProxy")
			}
		}
		return func(st *state) {
			if !reflect.DeepEqual(st.extensionNotices, n) {
				st.extensionNotices, st.dirty = n, true
			}
		}, nil
	}
}
