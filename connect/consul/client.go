// Package consul turns what the local Consul agent says into a connect.Snapshot.
// It is the only user of hashicorp/consul/api and the only place that changes
// when another source of the mesh (ConnectCA, xDS) is added.
//
// Invariants: nothing is published before registration, roots, leaf, intentions
// and default policy have arrived once; an upstream that is slow or broken is
// published without endpoints and holds up nobody; an error never removes what
// was known; one goroutine owns the state, every watch sends it updates.
//
// It may import connect, certs and intentions; only cmd uses it.
package consul

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/hashicorp/consul/api"
)

// Config says how to reach the agent. Empty fields fall back to Consul's own
// environment variables (CONSUL_HTTP_ADDR and so on), then to its defaults.
type Config struct {
	Addr                                                 string // host:port, http://, https:// or unix://
	Token, TokenFile                                     string
	CAFile, CAPath, ClientCert, ClientKey, TLSServerName string
	Namespace, Partition                                 string
	GRPCAddr, GRPCCAFile                                 string // as -http-addr, of the gRPC port
	Snippets                                             bool   // lines in HAProxy's own words are taken from registrations
}

// Client talks to one agent.
type Client struct {
	api      *api.Client
	addr     string
	grpc     *grpcPort
	snippets bool         // see Config
	wait     atomic.Int64 // of blocking queries, as time.Duration; see shorten
}

// NewClient checks the configuration without connecting. Errors name the flag.
func NewClient(c Config) (*Client, error) {
	conf := api.DefaultConfig()
	if c.Addr != "" {
		conf.Address = c.Addr
	}
	if err := checkAddr(conf.Address); err != nil {
		return nil, err
	}
	if err := checkEnvironment(); err != nil {
		return nil, err
	}
	if c.Token != "" {
		conf.Token = c.Token
		conf.TokenFile = ""
	}
	if c.TokenFile != "" {
		conf.TokenFile = c.TokenFile
	}
	if conf.TokenFile != "" {
		if _, err := os.ReadFile(conf.TokenFile); err != nil {
			return nil, fmt.Errorf("-token-file %q (or CONSUL_HTTP_TOKEN_FILE): %w", conf.TokenFile, errors.Unwrap(err))
		}
	}
	for _, f := range []struct {
		flag, given string
		to          *string
	}{
		{"-ca-file", c.CAFile, &conf.TLSConfig.CAFile},
		{"-ca-path", c.CAPath, &conf.TLSConfig.CAPath},
		{"-client-cert", c.ClientCert, &conf.TLSConfig.CertFile},
		{"-client-key", c.ClientKey, &conf.TLSConfig.KeyFile},
	} {
		if f.given != "" {
			*f.to = f.given
		}
		if *f.to != "" {
			if _, err := os.Stat(*f.to); err != nil {
				return nil, fmt.Errorf("%s %q: %w", f.flag, *f.to, errors.Unwrap(err))
			}
		}
	}
	if (conf.TLSConfig.CertFile == "") != (conf.TLSConfig.KeyFile == "") {
		return nil, errors.New("-client-cert and -client-key: give both or none")
	}
	if c.TLSServerName != "" {
		conf.TLSConfig.Address = c.TLSServerName
	}
	if c.Namespace != "" {
		conf.Namespace = c.Namespace
	}
	if c.Partition != "" {
		conf.Partition = c.Partition
	}
	// One idle connection per watch, or each poll would dial anew.
	conf.Transport.MaxIdleConnsPerHost = 64
	// Over HTTPS the agent speaks HTTP/2: all watches share one connection.
	conf.Transport.ForceAttemptHTTP2 = true
	client, err := api.NewClient(conf)
	if err != nil {
		return nil, fmt.Errorf("Consul client: %w", err)
	}
	out := &Client{api: client, addr: conf.Address, snippets: c.Snippets}
	out.wait.Store(int64(waitTime))
	transport, ok := conf.HttpClient.Transport.(*http.Transport) // the library's own, for unix sockets another one
	if !ok {
		return nil, errors.New("Consul client: its transport is of an unknown kind")
	}
	files := newCredentials(conf, transport)
	conf.HttpClient.Transport = withQuery{files}
	own := conf.Token
	out.grpc, err = newGRPCPort(cmp.Or(c.GRPCAddr, os.Getenv("CONSUL_GRPC_ADDR"), defaultGRPC), cmp.Or(c.GRPCCAFile, os.Getenv("CONSUL_GRPC_CACERT")), func() string {
		token, _ := files.now(false)
		return cmp.Or(token, own)
	})
	return out, err
}

// withQuery adds the query parameters that a context carries, and hands the answer's header
// and body back. The library's raw call, which is needed where the library's types leave
// fields out, takes only a path.
type withQuery struct{ next http.RoundTripper }

type queryKey struct{}

// headerKey carries a *http.Header, which receives that of the answer.
type headerKey struct{}

// bodyKey carries a *bytes.Buffer, which receives the body of the answer as it is read: for
// calls that the library can only make with its own types.
type bodyKey struct{}

func (w withQuery) RoundTrip(r *http.Request) (*http.Response, error) {
	if q, ok := r.Context().Value(queryKey{}).(url.Values); ok {
		r = r.Clone(r.Context())
		all := r.URL.Query()
		for k, v := range q {
			all[k] = v
		}
		r.URL.RawQuery = all.Encode()
	}
	res, err := w.next.RoundTrip(r)
	if to, ok := r.Context().Value(headerKey{}).(*http.Header); ok && err == nil {
		*to = res.Header
		if res.Request != nil && res.Request.Header.Get("X-Consul-Token") != "" {
			to.Set("X-Haproxy-Connect-Token", "yes") // our own header, which hidden reads
		}
	}
	if to, ok := r.Context().Value(bodyKey{}).(*bytes.Buffer); ok && err == nil {
		to.Reset()
		res.Body = struct {
			io.Reader
			io.Closer
		}{io.TeeReader(res.Body, to), res.Body}
	}
	return res, err
}

// checkAddr refuses what the library would only refuse at the first request.
func checkAddr(addr string) error {
	bad := func(why string) error {
		return fmt.Errorf("-http-addr %q (or CONSUL_HTTP_ADDR): %s; give host:port, http://host:port, https://host:port or unix:///path", addr, why)
	}
	scheme, rest, found := strings.Cut(addr, "://")
	if !found {
		scheme, rest = "http", addr
	}
	switch scheme {
	case "unix":
		if rest == "" {
			return bad("no path")
		}
		return nil
	case "http", "https":
		u, err := url.Parse(scheme + "://" + rest)
		if err != nil || u.Host == "" {
			return bad("no host")
		}
		if p := u.Port(); p != "" {
			if _, err := net.LookupPort("tcp", p); err != nil {
				return bad("bad port")
			}
		}
		return nil
	}
	return bad("unknown scheme")
}

// Addr is where the agent is, for messages.
func (c *Client) Addr() string { return c.addr }

// Selector names the proxy to run: exactly one field is set.
// Gateway is a kind of gateway, in the words of the command line; with a ProxyID it is the
// kind that the proxy must be of.
type Selector struct{ ProxyID, SidecarFor, SidecarForTag, Gateway string }

// GatewayKinds are the kinds of gateways that this program can be, by their names on the
// command line.
var GatewayKinds = map[string]api.ServiceKind{"mesh": api.ServiceKindMeshGateway, "ingress": api.ServiceKindIngressGateway, "api": api.ServiceKindAPIGateway, "terminating": api.ServiceKindTerminatingGateway}

// ErrNotRegistered: the agent answers, but has no such proxy yet.
var ErrNotRegistered = errors.New("not registered yet")

// Lookup finds the ID of the proxy to run, by Consul's own rules and with its
// own messages (command/connect/proxy, LookupProxyIDForSidecar). Errors that
// waiting may cure wrap ErrNotRegistered.
func (c *Client) Lookup(ctx context.Context, w Selector) (string, error) {
	var head http.Header
	q := (&api.QueryOptions{}).WithContext(context.WithValue(ctx, headerKey{}, &head))
	none := func(format string, args ...any) error {
		return fmt.Errorf("%w%s", fmt.Errorf(format+": %w", append(args, ErrNotRegistered)...), hidden(head))
	}
	switch {
	case w.ProxyID != "":
		s, _, err := c.api.Agent().Service(w.ProxyID, q)
		if isStatus(err, 404) {
			return "", none("No proxy with ID %s registered", w.ProxyID)
		}
		if err != nil {
			return "", fmt.Errorf("Failed looking up proxy info for %s: %w", w.ProxyID, err)
		}
		if kinds[s.Kind] == nil {
			return "", fmt.Errorf("service %q is not a Connect proxy or gateway that is supported: its kind is %q", w.ProxyID, s.Kind)
		}
		if w.Gateway != "" && s.Kind != GatewayKinds[w.Gateway] {
			return "", fmt.Errorf("-gateway %s: service %q is of kind %q", w.Gateway, w.ProxyID, s.Kind)
		}
		return w.ProxyID, nil
	case w.Gateway != "":
		kind := GatewayKinds[w.Gateway]
		all, err := c.api.Agent().ServicesWithFilterOpts(fmt.Sprintf("Kind == %q", kind), q)
		if err != nil {
			return "", fmt.Errorf("Failed looking up %s proxy info: %w", kind, err)
		}
		ids := slices.Sorted(maps.Keys(all))
		switch len(ids) {
		case 0:
			return "", none("No %s services registered with this agent", kind)
		case 1:
			return ids[0], nil
		}
		return "", fmt.Errorf("Cannot lookup the %s's proxy ID because multiple are registered with the agent: start it with -proxy-id and one of these IDs: %s", kind, strings.Join(ids, ", "))
	case w.SidecarForTag != "":
		all, err := c.api.Agent().ServicesWithFilterOpts("", q)
		if err != nil {
			return "", fmt.Errorf("Failed looking up sidecar proxy info for tag %s: %w", w.SidecarForTag, err)
		}
		var ids []string
		for id, s := range all {
			if s.Kind == "" && slices.Contains(s.Tags, w.SidecarForTag) {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		switch len(ids) {
		case 0:
			return "", none("No service with tag %s registered", w.SidecarForTag)
		case 1:
			return c.Lookup(ctx, Selector{SidecarFor: ids[0]})
		}
		return "", fmt.Errorf("More than one service with tag %s registered: start the proxy with -sidecar-for and one of these IDs: %s", w.SidecarForTag, strings.Join(ids, ", "))
	case w.SidecarFor != "":
		all, err := c.api.Agent().ServicesWithFilterOpts(`Kind == "connect-proxy"`, q)
		if err != nil {
			return "", fmt.Errorf("Failed looking up sidecar proxy info for %s: %w", w.SidecarFor, err)
		}
		var ids []string
		for id, s := range all {
			if s.Kind == api.ServiceKindConnectProxy && s.Proxy != nil && strings.EqualFold(s.Proxy.DestinationServiceID, w.SidecarFor) {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		switch len(ids) {
		case 0:
			return "", none("No sidecar proxy registered for %s", w.SidecarFor)
		case 1:
			return ids[0], nil
		}
		return "", fmt.Errorf("More than one sidecar proxy registered for %s.\n    Start proxy with -proxy-id and one of the following IDs: %s", w.SidecarFor, strings.Join(ids, ", "))
	}
	return "", errors.New("No proxy ID specified. One of -proxy-id, -sidecar-for or -sidecar-for-tag is required")
}

// hidden explains that a list may be empty because ACLs hide what is there, which Consul tells in
// headers; "" if it does not say so.
func hidden(h http.Header) string {
	switch {
	case h.Get("X-Consul-Results-Filtered-By-Acls") == "true":
		return "; the token may not see what there is: results were hidden by ACLs, and a service identity of the service would show them (-token-file)"
	case h.Get("X-Consul-Default-Acl-Policy") == "deny" && h.Get("X-Haproxy-Connect-Token") == "":
		return "; there is no token, and ACLs deny by default: give one with a service identity of the service (-token-file)"
	}
	return ""
}

// Unreachable reports whether an error means that no agent answered at all.
func Unreachable(err error) bool {
	var op *net.OpError
	var u *url.Error
	return errors.As(err, &op) || errors.As(err, &u)
}

func isStatus(err error, code int) bool {
	var s api.StatusError
	return errors.As(err, &s) && s.Code == code
}

// Version is the agent's, or "" when the token may not read it.
func (c *Client) Version(ctx context.Context) string {
	var self struct{ Config struct{ Version string } }
	if _, err := c.api.Raw().Query("/v1/agent/self", &self, (&api.QueryOptions{}).WithContext(ctx)); err != nil {
		return ""
	}
	return self.Config.Version
}

// Retryable reports whether waiting may cure an error: nobody answers, the agent
// is starting or overloaded, or the token is not known yet.
func Retryable(err error) bool {
	if Unreachable(err) || errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	var s api.StatusError
	return errors.As(err, &s) && (s.Code == 403 || s.Code == 429 || s.Code >= 500)
}
