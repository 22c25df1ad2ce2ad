package consul

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// meshEntry is what this program reads of the config entry "mesh". The zero value is
// a mesh without one.
type meshEntry struct {
	Peering *struct{ PeerThroughMeshGateways bool }
	TLS     *struct{ Incoming, Outgoing *tlsSettings }
	HTTP    *struct {
		SanitizeXForwardedClientCert bool
		Incoming                     *struct {
			RequestNormalization *struct {
				InsecureDisablePathNormalization, MergeSlashes             bool
				PathWithEscapedSlashesAction, HeadersWithUnderscoresAction string
			}
		}
	}
}

type tlsSettings struct {
	TLSMinVersion, TLSMaxVersion string
	CipherSuites                 []string
}

var tlsVersions = map[string]string{"": "", "TLS_AUTO": "", "TLSv1_0": "1.0", "TLSv1_1": "1.1", "TLSv1_2": "1.2", "TLSv1_3": "1.3"}

// tlsCiphers are those that Consul knows (types/tls.go).
var tlsCiphers = []string{
	"TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA", "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
	"TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
}

// peersThroughGateways reports whether the servers of peers talk through mesh gateways.
func (m *meshEntry) peersThroughGateways() bool {
	return m.Peering != nil && m.Peering.PeerThroughMeshGateways
}

// tls reads the versions and ciphers of both directions. An unknown version becomes the
// default, which is no weaker; an unknown cipher is left out.
func (m *meshEntry) tls(n *connect.Notices) (in, out connect.TLS) {
	if m.TLS == nil {
		return in, out
	}
	return m.TLS.Incoming.decode("TLS.Incoming", n), m.TLS.Outgoing.decode("TLS.Outgoing", n)
}

func (s *tlsSettings) decode(key string, n *connect.Notices) (out connect.TLS) {
	if s == nil {
		return out
	}
	for _, v := range []struct {
		name, value string
		to          *string
	}{{"TLSMinVersion", s.TLSMinVersion, &out.Min}, {"TLSMaxVersion", s.TLSMaxVersion, &out.Max}} {
		version, known := tlsVersions[v.value]
		if !known {
			n.Add("mesh", key+"."+v.name, v.value, "not known; the default is used")
		}
		*v.to = version
	}
	if out.Max != "" && cmp.Or(out.Min, "1.2") > out.Max {
		n.Add("mesh", key+".TLSMaxVersion", s.TLSMaxVersion, "less than the minimum; there is no maximum")
		out.Max = ""
	}
	var ciphers []string
	for _, c := range s.CipherSuites {
		if slices.Contains(tlsCiphers, c) {
			ciphers = append(ciphers, c)
		} else {
			n.Add("mesh", key+".CipherSuites", c, "not known; it is left out")
		}
	}
	out.Ciphers = strings.Join(ciphers, ",")
	return out
}

// mesh returns the watch for the mesh entry; its answers are meshEntry. It asks for the list
// of entries: a query for the single entry loses the index while there is no entry.
func (c *Client) mesh() watch {
	return watch{key: "mesh", name: "mesh", fetch: func(ctx context.Context, cur *cursor) (any, error) {
		var list []meshEntry
		meta, err := c.api.Raw().Query("/v1/config/mesh", &list, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		var entry meshEntry
		if len(list) > 0 {
			entry = list[0]
		}
		return entry, nil
	}}
}

// decode reads the settings that concern callers of HTTP. An unknown action
// is the strictest one: a request must not pass for want of a word.
func (m *meshEntry) decode(n *connect.Notices) (out connect.Normalize, sanitize bool) {
	if m.HTTP == nil {
		return out, false
	}
	sanitize = m.HTTP.SanitizeXForwardedClientCert
	if m.HTTP.Incoming == nil || m.HTTP.Incoming.RequestNormalization == nil {
		return out, sanitize
	}
	r := m.HTTP.Incoming.RequestNormalization
	out.KeepPath, out.MergeSlashes = r.InsecureDisablePathNormalization, r.MergeSlashes
	switch a := connect.EscapedSlashes(r.PathWithEscapedSlashesAction); a {
	case "", "IMPLEMENTATION_SPECIFIC_DEFAULT", connect.SlashesKeep:
	case connect.SlashesReject, connect.SlashesRedirect, connect.SlashesForward:
		out.EscapedSlashes = a
	default:
		n.Add("mesh", "PathWithEscapedSlashesAction", string(a), "not known; such requests are rejected")
		out.EscapedSlashes = connect.SlashesReject
	}
	switch a := connect.Underscores(r.HeadersWithUnderscoresAction); a {
	case "", connect.UnderscoresAllow:
	case connect.UnderscoresReject, connect.UnderscoresDrop:
		out.Underscores = a
	default:
		n.Add("mesh", "HeadersWithUnderscoresAction", string(a), "not known; such requests are rejected")
		out.Underscores = connect.UnderscoresReject
	}
	return out, sanitize
}

// tlsMode returns the watch for the MutualTLSMode of one config entry, service-defaults or
// proxy-defaults, which the registration does not carry; its answers are api.MutualTLSMode.
// A query for the list keeps the index while there is no entry.
func (c *Client) tlsMode(kind, name string) watch {
	return watch{key: "tls mode\x00" + kind + "\x00" + name, name: kind, shapes: never, fetch: func(ctx context.Context, cur *cursor) (any, error) {
		list, meta, err := c.api.ConfigEntries().List(kind, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
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
		return mode, nil
	}}
}

// extensionsEvery is how often the entries are read: they are only named to people, and a
// blocking query for each would cost a connection.
const extensionsEvery = time.Minute

// extensions returns the watch for the EnvoyExtensions of the service and of all proxies; its
// answers are connect.Notices. Consul does not merge them into the registration, but applies
// them in its servers (agent/envoyextensions).
func (c *Client) extensions(service string) watch {
	return watch{key: "extensions\x00" + service, name: "extensions", every: extensionsEvery, shapes: never, fetch: func(ctx context.Context, _ *cursor) (any, error) {
		var n connect.Notices
		q := (&api.QueryOptions{AllowStale: true, UseCache: false}).WithContext(ctx)
		for _, one := range []struct{ kind, name string }{{api.ServiceDefaults, service}, {api.ProxyDefaults, api.ProxyConfigGlobal}} {
			entry, _, err := c.api.ConfigEntries().Get(one.kind, one.name, q)
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
		return n, nil
	}}
}
