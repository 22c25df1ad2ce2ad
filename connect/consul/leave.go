package consul

import (
	"context"
	"fmt"
	"strings"

	"github.com/hashicorp/consul/api"
)

// leaving marks the maintenance that is ours: an operator's own is never ended.
const leaving = "haproxy-connect: the sidecar is stopping"

// Leave makes Consul list this proxy as critical at once, so that callers go elsewhere
// before its listener closes. It needs what a service identity grants.
func (c *Client) Leave(ctx context.Context, proxyID string) error {
	return c.api.Agent().EnableServiceMaintenanceOpts(proxyID, leaving, (&api.QueryOptions{}).WithContext(ctx))
}

// Return ends the maintenance that an earlier Leave of this proxy has begun.
func (c *Client) Return(ctx context.Context, proxyID string) error {
	q := (&api.QueryOptions{}).WithContext(ctx)
	checks, err := c.api.Agent().ChecksWithFilterOpts(fmt.Sprintf("ServiceID == %q", proxyID), q)
	if err != nil {
		return err
	}
	for _, check := range checks {
		if strings.HasPrefix(check.CheckID, "_service_maintenance:") && check.Notes == leaving {
			return c.api.Agent().DisableServiceMaintenanceOpts(proxyID, q)
		}
	}
	return nil
}
