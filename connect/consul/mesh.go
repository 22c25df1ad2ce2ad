package consul

import (
	"context"
	"reflect"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// meshEntry is what this program reads of the config entry "mesh". The zero value is
// a mesh without one.
type meshEntry struct {
	TLS  map[string]any
	HTTP *struct {
		SanitizeXForwardedClientCert bool
		Incoming                     *struct {
			RequestNormalization *struct {
				InsecureDisablePathNormalization, MergeSlashes             bool
				PathWithEscapedSlashesAction, HeadersWithUnderscoresAction string
			}
		}
	}
}

// fetchMesh follows the entry in its list form: the single form loses the index
// while there is none.
func (w *Watcher) fetchMesh(ctx context.Context, c *cursor) (func(*state), error) {
	var list []meshEntry
	meta, err := w.client.api.Raw().Query("/v1/config/mesh", &list, c.options(ctx))
	if err != nil {
		return nil, err
	}
	c.advance(meta)
	var entry meshEntry
	if len(list) > 0 {
		entry = list[0]
	}
	return func(st *state) {
		if !st.heard.mesh || !reflect.DeepEqual(st.mesh, entry) {
			st.mesh, st.heard.mesh, st.dirty = entry, true, true
		}
	}, nil
}

// decode reads the settings that concern a sidecar's inbound side. An unknown action
// is the strictest one: a request must not pass for want of a word.
func (m *meshEntry) decode(n *connect.Notices) (out connect.Normalize, sanitize bool) {
	if len(m.TLS) > 0 {
		n.Add("mesh", "TLS", "", "minimum versions and ciphers are not supported yet; TLS 1.2 is the minimum")
	}
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
