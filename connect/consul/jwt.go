package consul

import (
	"context"
	"encoding/base64"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Defaults of a jwt-provider; the first two are Envoy's.
const (
	keysTimeout  = 5 * time.Second
	keysCacheFor = 10 * time.Minute
	clockSkew    = 30 * time.Second
)

// providers are the jwt-provider entries that can be used, and what cannot.
type providers struct {
	list    []*intentions.Provider // sorted by name
	notices connect.Notices
}

// providers returns the watch for every jwt-provider; its answers are providers. It is wanted
// once an intention requires a token: most services need none, and a watch costs a connection.
func (c *Client) providers() watch {
	return watch{key: "jwt providers", name: "jwt providers", shapes: never, fetch: func(ctx context.Context, cur *cursor) (any, error) {
		list, meta, err := c.api.ConfigEntries().List(api.JWTProvider, cur.options(ctx))
		if err != nil {
			return nil, err
		}
		cur.advance(meta)
		var out providers
		for _, e := range list {
			if entry, ok := e.(*api.JWTProviderConfigEntry); ok {
				if p := provider(entry, &out.notices); p != nil {
					out.list = append(out.list, p)
				}
			}
		}
		slices.SortFunc(out.list, func(a, b *intentions.Provider) int { return strings.Compare(a.Name, b.Name) })
		return out, nil
	}}
}

// provider translates one entry; nil when it cannot be used: then the intentions that
// name it deny.
func provider(e *api.JWTProviderConfigEntry, n *connect.Notices) *intentions.Provider {
	where := "jwt-provider " + e.Name
	p := &intentions.Provider{Name: e.Name, Issuer: e.Issuer, Audiences: e.Audiences, ClockSkew: clockSkew}
	if e.ClockSkewSeconds > 0 && e.ClockSkewSeconds < 86400 {
		p.ClockSkew = time.Duration(e.ClockSkewSeconds) * time.Second
	}
	refuse := func(key, value, why string) *intentions.Provider {
		n.Add(where, key, value, why+"; intentions that require its tokens deny")
		return nil
	}
	if e.JSONWebKeySet == nil {
		return refuse("json_web_key_set", "", "there is none")
	}
	switch l, r := e.JSONWebKeySet.Local, e.JSONWebKeySet.Remote; {
	case l != nil && l.JWKS != "":
		raw, err := base64.StdEncoding.DecodeString(l.JWKS)
		if err != nil {
			return refuse("json_web_key_set.local.jwks", "", "not base64")
		}
		p.Keys.Inline = string(raw)
	case l != nil && l.Filename != "":
		p.Keys.File = l.Filename
	case r != nil:
		u, err := url.Parse(r.URI)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return refuse("json_web_key_set.remote.uri", r.URI, "want an http or https address")
		}
		p.Keys = intentions.KeySource{URI: r.URI, Timeout: keysTimeout, CacheFor: keysCacheFor}
		if r.RequestTimeoutMs > 0 {
			p.Keys.Timeout = min(time.Duration(r.RequestTimeoutMs)*time.Millisecond, time.Minute)
		}
		if r.CacheDuration > 0 {
			p.Keys.CacheFor = max(r.CacheDuration, time.Second)
		}
		if r.RetryPolicy != nil && r.RetryPolicy.RetryPolicyBackOff != nil {
			b := r.RetryPolicy.RetryPolicyBackOff
			p.Keys.MinRetry, p.Keys.MaxRetry = min(b.BaseInterval, time.Minute), min(b.MaxInterval, time.Hour)
		}
		if why := authorities(r, &p.Keys); why != "" {
			return refuse("json_web_key_set.remote.jwks_cluster.tls_certificates", "", why)
		}
	default:
		return refuse("json_web_key_set", "", "neither local nor remote")
	}
	for _, l := range e.Locations {
		switch {
		case l == nil:
		case l.Header != nil:
			if !headerName(l.Header.Name) {
				return refuse("locations.header.name", l.Header.Name, "not the name of a header")
			}
			p.Locations = append(p.Locations, intentions.TokenLocation{Header: strings.ToLower(l.Header.Name), Prefix: l.Header.ValuePrefix, Keep: l.Header.Forward})
		case l.QueryParam != nil && l.QueryParam.Name != "":
			p.Locations = append(p.Locations, intentions.TokenLocation{Query: l.QueryParam.Name})
		case l.Cookie != nil && l.Cookie.Name != "":
			p.Locations = append(p.Locations, intentions.TokenLocation{Cookie: l.Cookie.Name})
		}
	}
	if len(p.Locations) == 0 {
		p.Locations = []intentions.TokenLocation{{Header: "authorization", Prefix: "Bearer "}, {Query: "access_token"}}
	}
	if f := e.Forwarding; f != nil {
		if !headerName(f.HeaderName) {
			return refuse("forwarding.header_name", f.HeaderName, "not the name of a header")
		}
		p.ForwardTo, p.Pad = f.HeaderName, f.PadForwardPayloadHeader
	}
	return p
}

// authorities reads the CAs that the key server's certificate must chain to. why, if not "", is
// the reason why they cannot be used.
func authorities(r *api.RemoteJWKS, k *intentions.KeySource) (why string) {
	if r.JWKSCluster == nil || r.JWKSCluster.TLSCertificates == nil {
		return ""
	}
	t := r.JWKSCluster.TLSCertificates
	if t.CaCertificateProviderInstance != nil {
		return "a certificate provider instance is Envoy's"
	}
	if ca := t.TrustedCA; ca != nil {
		switch {
		case ca.InlineString != "":
			k.CAs = ca.InlineString
		case len(ca.InlineBytes) > 0:
			k.CAs = string(ca.InlineBytes)
		case ca.EnvironmentVariable != "":
			k.CAs = os.Getenv(ca.EnvironmentVariable)
		case ca.Filename != "":
			k.CAFile = ca.Filename
		}
		if k.CAs == "" && k.CAFile == "" {
			return "trusted_ca is empty"
		}
	}
	return ""
}
