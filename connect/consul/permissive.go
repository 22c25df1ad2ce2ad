package consul

import (
	"context"

	"github.com/hashicorp/consul/api"
)

// fetchTLSMode follows MutualTLSMode of one config entry, service-defaults or
// proxy-defaults: the registration does not carry it. It only means something with
// transparent proxying, and is only started then. The list form keeps the index
// while there is no entry.
func (w *Watcher) fetchTLSMode(kind, name string) fetch {
	return func(ctx context.Context, c *cursor) (func(*state), error) {
		list, meta, err := w.client.api.ConfigEntries().List(kind, c.options(ctx))
		if err != nil {
			return nil, err
		}
		c.advance(meta)
		mode := api.MutualTLSModeDefault
		for _, e := range list {
			switch one := e.(type) {
			case *api.ServiceConfigEntry:
				if one.Name == name {
					mode = one.MutualTLSMode
				}
			case *api.ProxyConfigEntry:
				if one.Name == name {
					mode = one.MutualTLSMode
				}
			}
		}
		return func(st *state) {
			if have, ok := st.tlsMode[kind]; !ok || have != mode {
				st.tlsMode[kind], st.dirty = mode, true
			}
		}, nil
	}
}

// permissive: the service's own entry wins over the defaults for all.
func (st *state) permissive() bool {
	mode := st.tlsMode[api.ServiceDefaults]
	if mode == api.MutualTLSModeDefault {
		mode = st.tlsMode[api.ProxyDefaults]
	}
	p := st.service.Proxy
	return p.Mode == api.ProxyModeTransparent && p.LocalServicePort > 0 && p.LocalServiceSocketPath == "" && mode == api.MutualTLSModePermissive
}
