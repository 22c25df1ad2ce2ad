package consul

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// checksEvery is how often the agent is asked which of its checks go through us.
const checksEvery = 2 * time.Second

// checks returns the watch for the checks of a service that the agent sends to an exposed port;
// its answers are []exposed. The API tells the port and the check's last output, which begins
// with the address that was asked (agent/checks, check.go): until a check has run once, its path
// is not known. The application is assumed to answer a check where it answers everything else.
func (c *Client) checks(serviceID string) watch {
	return watch{key: "checks\x00" + serviceID, name: "checks", every: checksEvery, shapes: never, fetch: func(ctx context.Context, _ *cursor) (any, error) {
		list, err := c.api.Agent().ChecksWithFilterOpts(fmt.Sprintf("ServiceID == %q", serviceID), (&api.QueryOptions{}).WithContext(ctx))
		if err != nil {
			return nil, err
		}
		out := []exposed{}
		for _, check := range list {
			one := exposed{port: check.ExposedPort, path: checkedPath(check), protocol: connect.HTTP, from: c.host()}
			if check.Type == "grpc" {
				one.path, one.protocol = "/grpc.health.v1.Health/Check", connect.HTTP2
			}
			if port(one.port) && one.path != "" && !slices.ContainsFunc(out, func(o exposed) bool { return o.port == one.port && o.path == one.path }) {
				out = append(out, one)
			}
		}
		slices.SortFunc(out, func(a, b exposed) int { return cmp.Or(a.port-b.port, strings.Compare(a.path, b.path)) })
		return out, nil
	}}
}

// checked matches how a check's output begins, after a try that was answered or one that was not.
var checked = regexp.MustCompile(`^(?:HTTP [A-Z]+ (https?://[^ ]+): \d|[A-Z][a-z]+ "(https?://[^ "]+)": )`)

// checkedPath returns the path that an HTTP check asked for at its exposed port; "": not known.
// The rest of the output comes from the application and is not looked at.
func checkedPath(check *api.AgentCheck) string {
	m := checked.FindStringSubmatch(check.Output)
	if m == nil {
		return ""
	}
	u, err := url.Parse(m[1] + m[2])
	if err != nil || u.Port() != fmt.Sprint(check.ExposedPort) {
		return ""
	}
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	if !plainPath(path) {
		return ""
	}
	return path
}

// host returns the agent's own address, or an empty list if it has a host name or a unix socket.
// It never returns nil, which would let anybody in (see connect.Listener).
func (c *Client) host() []string {
	addr := c.addr
	if _, rest, ok := strings.Cut(addr, "://"); ok {
		addr = rest
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil || !isAddress(host) {
		return []string{}
	}
	return []string{host}
}
