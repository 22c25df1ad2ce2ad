package consul

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// Finding is one thing that was looked at, for people.
type Finding struct {
	What  string
	Level Level
	Text  string // what was found
	Fix   string // what to do about it, "" when nothing
}

// Level of a finding.
type Level string

// The levels: all well, worth knowing, will not work.
const (
	OK   Level = "ok"
	Warn Level = "warn"
	Fail Level = "fail"
)

// Facts are what later checks need of Consul; empty parts could not be learnt.
type Facts struct {
	ProxyID string
	Listens []string // addresses that the sidecar will listen on
}

// Examine asks the agent everything a sidecar asks, once, and says what would not work.
func (c *Client) Examine(ctx context.Context, w Selector) (f Facts, out []Finding) {
	say := func(what string, level Level, text, fix string) { out = append(out, Finding{what, level, text, fix}) }
	q := (&api.QueryOptions{AllowStale: true}).WithContext(ctx)

	begun := time.Now()
	head, err := c.head(ctx)
	if err != nil {
		say("agent", Fail, fmt.Sprintf("%s does not answer: %v", c.addr, err), "start the agent, or give its address: -http-addr, CONSUL_HTTP_ADDR")
		return f, out
	}
	version := c.Version(ctx)
	switch {
	case version == "":
		say("agent", OK, fmt.Sprintf("%s answers in %s (its version needs agent:read)", c.addr, time.Since(begun).Round(time.Millisecond)), "")
	case older(version, 1, 13):
		say("agent", Warn, c.addr+" is Consul "+version, "tested with 1.21; Consul before 1.13 lacks what a sidecar asks for")
	default:
		say("agent", OK, fmt.Sprintf("%s is Consul %s, answers in %s", c.addr, version, time.Since(begun).Round(time.Millisecond)), "")
	}
	if date, err := http.ParseTime(head.Get("Date")); err == nil {
		skew := time.Since(date).Abs()
		if skew > 5*time.Second {
			say("clock", Fail, fmt.Sprintf("this machine and the agent's differ by %s", skew.Round(time.Second)), "set the clocks (NTP): certificates and tokens are judged by them")
		} else {
			say("clock", OK, "within "+skew.Round(time.Second).String()+" of the agent's", "")
		}
	}

	c.examineToken(ctx, say)
	id, err := c.Lookup(ctx, w)
	switch {
	case isStatus(err, 403) && strings.Contains(err.Error(), "ACL not found"):
		say("registration", Fail, "cannot be looked up: the token is unknown", "the token does not exist, or not any more: give another (-token-file)")
		return f, out
	case isStatus(err, 403):
		say("registration", Fail, "the token may not read services", "use a token with a service identity of the service: -token-file")
		return f, out
	case err != nil:
		say("registration", Fail, err.Error(), "register the service with a sidecar, or check the ID: consul catalog services")
		return f, out
	}
	f.ProxyID = id
	s, _, err := c.api.Agent().Service(id, q)
	if err != nil {
		say("registration", Fail, err.Error(), hint(err))
		return f, out
	}
	if s.Kind != api.ServiceKindConnectProxy {
		f.Listens = c.examineGateway(ctx, s, say)
		return f, out
	}
	name := s.Proxy.DestinationServiceName
	say("registration", OK, fmt.Sprintf("%s is the sidecar of %s", id, name), "")
	if err := certs.ServiceName(name); err != nil {
		say("name", Fail, err.Error(), "register the service under another name")
	}
	f.Listens = listens(s)

	roots, leaf := c.examineIdentity(ctx, name, say)
	if roots != nil && leaf != nil {
		if err := leaf.Verify(roots); err != nil {
			say("chain", Fail, fmt.Sprintf("the leaf does not chain to the roots: %v", err), "wait for the agent to renew it; if it stays, restart the agent")
		} else {
			say("chain", OK, "the leaf chains to a listed root", "")
		}
	}
	match := q.WithContext(context.WithValue(ctx, queryKey{}, url.Values{"by": {"destination"}, "name": {name}}))
	if _, err := c.api.Raw().Query("/v1/connect/intentions/match", &map[string]any{}, match); err != nil {
		say("intentions", Fail, "cannot be read: "+err.Error(), "the token needs intentions:read on "+name+", which a service identity has")
	} else if allow, err := c.authorize(ctx, name, defaultProbe); err != nil {
		say("intentions", Fail, "the default policy cannot be learnt: "+err.Error(), "the token needs service:write on "+name+", which a service identity has")
	} else if allow {
		say("intentions", Warn, "the default is allow: every service may call "+name+" that no intention denies", `set default_intention_policy = "deny", or ACLs with default_policy = "deny"`)
	} else {
		say("intentions", OK, "can be read; the default is deny", "")
	}
	c.examineUpstreams(ctx, s, say)
	c.examineBudget(ctx, s, say)
	return f, out
}

type sayer func(what string, level Level, text, fix string)

func (c *Client) head(ctx context.Context) (http.Header, error) {
	var h http.Header
	ctx = context.WithValue(ctx, headerKey{}, &h)
	if _, err := c.api.Raw().Query("/v1/agent/services", &map[string]any{}, (&api.QueryOptions{}).WithContext(ctx)); err != nil && !isStatus(err, 403) {
		return nil, err
	}
	return h, nil
}

func (c *Client) examineIdentity(ctx context.Context, name string, say sayer) (roots *certs.Roots, leaf *certs.Leaf) {
	q := (&api.QueryOptions{}).WithContext(ctx)
	list, _, err := c.api.Agent().ConnectCARoots(q)
	if err != nil {
		say("roots", Fail, "cannot be read: "+err.Error(), "enable Connect in the servers' configuration: connect { enabled = true }")
		return nil, nil
	}
	var pems []string
	for _, r := range list.Roots {
		pems = append(pems, r.RootCertPEM)
	}
	if roots, err = certs.ParseRoots(list.TrustDomain, pems); err != nil {
		say("roots", Fail, err.Error(), "is the CA provider of Consul healthy?")
		return nil, nil
	}
	say("roots", OK, fmt.Sprintf("%d, the first ends %s", roots.Count, roots.List[0].NotAfter.UTC().Format(time.DateOnly)), "")
	got, _, err := c.api.Agent().ConnectCALeaf(name, q)
	if err == nil {
		leaf, err = certs.ParseLeaf(got.CertPEM, got.PrivateKeyPEM)
	}
	switch {
	case isStatus(err, 403):
		say("leaf", Fail, "the token may not have the certificate of "+name, "the token needs service:write on "+name+", which a service identity has")
		return roots, nil
	case err != nil:
		say("leaf", Fail, err.Error(), hint(err))
		return roots, nil
	}
	switch left := time.Until(leaf.NotAfter); {
	case left <= 0 || time.Now().Before(leaf.NotBefore):
		say("leaf", Fail, fmt.Sprintf("is not valid now: from %s until %s", leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339)), "set this machine's clock; if it is right, the agent does not renew: look at its log")
	case left < time.Hour:
		say("leaf", Warn, "ends in "+left.Round(time.Second).String(), "the agent renews at 60 to 90 % of the life; if it does not, look at its log")
	default:
		say("leaf", OK, leaf.ID.String()+", "+left.Round(time.Minute).String()+" left", "")
	}
	return roots, leaf
}

func (c *Client) examineUpstreams(ctx context.Context, s *api.AgentService, say sayer) {
	for _, u := range s.Proxy.Upstreams {
		if u.DestinationName == "*" || u.LocalBindPort == 0 && u.LocalBindSocketPath == "" || u.DestinationType == api.UpstreamDestTypePreparedQuery || u.DestinationPeer != "" {
			continue
		}
		what := "upstream " + u.DestinationName
		list, _, err := c.api.Health().Connect(u.DestinationName, "", true, (&api.QueryOptions{AllowStale: true, Datacenter: u.Datacenter}).WithContext(ctx))
		switch {
		case err != nil:
			say(what, Fail, "its endpoints cannot be read: "+err.Error(), hint(err))
		case len(list) == 0:
			say(what, Warn, "has no healthy endpoint", "is it registered with a sidecar, and do its checks pass? With ACLs, may the token read it?")
		default:
			c.examineEndpoints(what, list, u.Datacenter != "" && u.Datacenter != s.Datacenter, say)
		}
	}
}

// examineEndpoints counts as the sidecar itself does.
func (c *Client) examineEndpoints(what string, list []*api.ServiceEntry, wan bool, say sayer) {
	all := endpoints(list, wan, false)
	names := 0
	for _, e := range all {
		if isAddress(e.Address) {
			continue
		}
		names++
		if _, err := net.LookupHost(e.Address); err != nil {
			say(what, Fail, "an instance is registered with the host name "+e.Address+", which cannot be looked up: "+err.Error(), "does this machine's name server know it? Else register the instance with an address")
		}
	}
	switch {
	case len(all) == 0:
		say(what, Warn, fmt.Sprintf("of %d healthy instances none has an address and a port that can be called", len(list)), "register them with an address")
	case len(all) == 1:
		say(what, OK, "1 healthy endpoint", "")
	default:
		say(what, OK, fmt.Sprintf("%d healthy endpoints", len(all)), "")
	}
	if names > 0 {
		say(what, OK, fmt.Sprintf("%d of them with a host name, which is looked up every %s", names, hostEvery), "")
	}
}

// examineToken says whose token it is.
func (c *Client) examineToken(ctx context.Context, say sayer) {
	token, _, err := c.api.ACL().TokenReadSelf((&api.QueryOptions{}).WithContext(ctx))
	switch {
	case err != nil && strings.Contains(err.Error(), "ACL support disabled"):
		say("token", OK, "none is needed: the agent has no ACLs", "")
	case isStatus(err, 403):
		say("token", Fail, "the token is unknown: "+trouble(err), "it does not exist, or not any more: give another (-token-file)")
	case err != nil:
		say("token", Warn, "cannot be read: "+trouble(err), hint(err))
	case token.AccessorID == "00000000-0000-0000-0000-000000000002":
		say("token", Warn, "none was given: the anonymous token is used", "with ACLs, give one with a service identity of the service: -token-file")
	default:
		var has []string
		for _, id := range token.ServiceIdentities {
			has = append(has, "service identity "+id.ServiceName)
		}
		for _, p := range token.Policies {
			has = append(has, "policy "+p.Name)
		}
		for _, r := range token.Roles {
			has = append(has, "role "+r.Name)
		}
		text := "accessor " + token.AccessorID + ", " + cmp.Or(strings.Join(has, ", "), "without any policy")
		if token.ExpirationTime != nil {
			text += ", expires " + token.ExpirationTime.UTC().Format(time.RFC3339)
			if time.Until(*token.ExpirationTime) < time.Hour {
				say("token", Warn, text, "write a new one into the -token-file before it expires; it is read again when it changes")
				return
			}
		}
		level, fix := OK, ""
		if len(has) == 0 {
			level, fix = Warn, "such a token sees nothing where ACLs deny by default: give it a service identity of the service"
		}
		say("token", level, text, fix)
	}
}

// examineBudget compares the watches of this agent's sidecars with its limit of
// connections for one client address, which all of them share.
func (c *Client) examineBudget(ctx context.Context, own *api.AgentService, say sayer) {
	const each, limit = 7, 200 // watches of a sidecar without upstreams; Consul's default
	if strings.HasPrefix(c.addr, "https") {
		return // HTTP/2: one connection
	}
	all, err := c.api.Agent().ServicesWithFilterOpts(`Kind == "connect-proxy"`, (&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return
	}
	sum := 0
	for _, s := range all {
		sum += each
		if s.Proxy != nil {
			sum += 2 * len(s.Proxy.Upstreams)
		}
	}
	text := fmt.Sprintf("%d sidecars of this agent hold about %d connections to it, this one %d", len(all), sum, each+2*len(own.Proxy.Upstreams))
	if sum > limit {
		say("watches", Warn, text+fmt.Sprintf("; its default limit is %d for one address", limit), "raise limits.http_max_conns_per_client of the agent, or use HTTPS, where all watches share one connection")
	} else {
		say("watches", OK, text, "")
	}
}

// listens returns the addresses that a registration makes its sidecar listen on.
func listens(s *api.AgentService) (out []string) {
	var ignored connect.Notices // said by the sidecar itself
	binds := decodeInbound(s, &ignored).binds()
	for _, d := range upstreams(s, binds, &ignored) {
		binds = append(binds, d.bind)
	}
	for _, b := range binds {
		if b.SocketPath == "" {
			out = append(out, b.String())
		}
	}
	slices.Sort(out)
	return out
}

func older(version string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(version, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a < major || a == major && b < minor
}
