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

// checks is asked for the checks of a service that the agent sends to an exposed port; the
// answer is []exposed. The API tells the port, and what the check said last, which begins with
// the address that was asked (agent/checks, check.go): until a check has run once its path is
// not known. The application is taken to answer it where it answers everything else.
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

// checked begins what a check says of its last try, that worked or did not.
var checked = regexp.MustCompile(`^(?:HTTP [A-Z]+ (https?://[^ ]+): \d|[A-Z][a-z]+ "(https?://[^ "]+)": )`)

// checkedPath is the path that an HTTP check asked for at its exposed port; "" is not known.
// What comes after is of the application, and not looked at.
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

// host is the agent's own address, if it is one.
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
