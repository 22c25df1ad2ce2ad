package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-sockaddr/template"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// Registration is a sidecar or a gateway that registers itself.
type Registration struct {
	Service   string // the represented service; of a gateway its own name, "" for that of its kind
	Port      int    // of the application; 0: a client only
	Instance  string // tells replicas on one agent apart; "" for the only one, "hostname" for this host's name
	Listen    string // address:port of the public listener; the address may be a go-sockaddr template. "" picks a free port
	Upstreams []string

	// Of a gateway:
	Gateway         string   // its kind, see GatewayKinds; "" for a sidecar
	Address, WAN    string   // addr:port for its own datacenter and for others, perhaps templates of go-sockaddr; "" of Address picks a private one, port 8443
	Binds           []string // name=addr:port to listen on in place of Address
	ExposeServers   bool     // servers of other datacenters reach ours through it
	DeregisterAfter time.Duration
}

// Ports that Consul itself gives to sidecars.
const firstPort, lastPort = 21000, 21255

// ID of the sidecar, as Consul names those it makes; a gateway has its own name.
func (r Registration) ID() string {
	if r.Gateway != "" {
		return cmp.Or(r.Service, string(GatewayKinds[r.Gateway]))
	}
	return r.of() + "-sidecar-proxy"
}

// of is the ID of the represented instance.
func (r Registration) of() string {
	switch r.Instance {
	case "":
		return r.Service
	case "hostname":
		if host, err := os.Hostname(); err == nil {
			return r.Service + "-" + host
		}
	}
	return r.Service + "-" + r.Instance
}

func (r Registration) check() string { return "service:" + r.ID() + ":haproxy-connect" }

// ParseUpstream reads name[.query]:[addr:]port.
func ParseUpstream(s string) (api.Upstream, error) {
	bad := func() (api.Upstream, error) {
		return api.Upstream{}, fmt.Errorf("-upstream %q: want name:port or name:address:port, the name may end in .query", s)
	}
	name, rest, ok := strings.Cut(s, ":")
	if !ok || name == "" {
		return bad()
	}
	u := api.Upstream{DestinationType: api.UpstreamDestTypeService, DestinationName: strings.TrimSuffix(name, ".service")}
	if q, is := strings.CutSuffix(name, ".query"); is {
		u.DestinationType, u.DestinationName = api.UpstreamDestTypePreparedQuery, q
	}
	portText := rest
	if strings.Contains(rest, ":") {
		host, p, err := net.SplitHostPort(rest)
		if err != nil || net.ParseIP(host) == nil {
			return bad()
		}
		u.LocalBindAddress, portText = host, p
	}
	n, err := strconv.Atoi(portText)
	if err != nil || !port(n) || u.DestinationName == "" {
		return bad()
	}
	u.LocalBindPort = n
	return u, nil
}

// build makes the registration as Consul takes it. Errors name the flag.
func (r Registration) build() (*api.AgentServiceRegistration, error) {
	if r.Gateway != "" {
		return r.gateway()
	}
	reg := &api.AgentServiceRegistration{
		Kind: api.ServiceKindConnectProxy, ID: r.ID(), Name: r.Service + "-sidecar-proxy",
		Proxy: &api.AgentServiceConnectProxyConfig{DestinationServiceName: r.Service, DestinationServiceID: r.of(), LocalServicePort: r.Port},
		// Beat keeps the check passing: only a sidecar that serves is.
		Check: &api.AgentServiceCheck{CheckID: r.check(), Name: "haproxy-connect is ready", TTL: "30s", Status: api.HealthCritical},
	}
	if r.Port != 0 {
		reg.Proxy.LocalServiceAddress = "127.0.0.1"
	}
	for _, s := range r.Upstreams {
		u, err := ParseUpstream(s)
		if err != nil {
			return nil, err
		}
		reg.Proxy.Upstreams = append(reg.Proxy.Upstreams, u)
	}
	if r.Listen != "" {
		at, err := listenAddress("-listen", r.Listen)
		if err != nil {
			return nil, err
		}
		reg.Address, reg.Port = at.Address, at.Port
	}
	return reg, nil
}

// listenAddress reads address:port or :port, perhaps a template, as the -address of Consul's
// Envoy command is.
func listenAddress(flag, given string) (at api.ServiceAddress, err error) {
	text, err := template.Parse(given)
	if err != nil {
		return at, fmt.Errorf("%s %q: %s", flag, given, err)
	}
	host, p, err := net.SplitHostPort(text)
	n, perr := strconv.Atoi(p)
	if err != nil || perr != nil || !port(n) || host != "" && net.ParseIP(host) == nil {
		return at, fmt.Errorf("%s %q: want address:port or :port%s", flag, given, meaning(given, text))
	}
	return api.ServiceAddress{Address: host, Port: n}, nil
}

// gateway is the registration of a gateway: as Consul's Envoy command makes it, but for the
// check, which is held up by Beat.
func (r Registration) gateway() (*api.AgentServiceRegistration, error) {
	lan, err := listenAddress("-address", cmp.Or(r.Address, "{{ GetPrivateIP }}:8443"))
	if err != nil {
		return nil, err
	}
	reg := &api.AgentServiceRegistration{
		Kind: GatewayKinds[r.Gateway], ID: r.ID(), Name: r.ID(), Address: lan.Address, Port: lan.Port,
		TaggedAddresses: map[string]api.ServiceAddress{"lan": lan}, Proxy: &api.AgentServiceConnectProxyConfig{Config: map[string]any{}},
		Check: &api.AgentServiceCheck{CheckID: r.check(), Name: "haproxy-connect is ready", TTL: "30s", Status: api.HealthCritical},
	}
	if r.DeregisterAfter > 0 {
		reg.Check.DeregisterCriticalServiceAfter = r.DeregisterAfter.String()
	}
	if r.WAN != "" {
		wan, err := listenAddress("-wan-address", r.WAN)
		if err != nil {
			return nil, err
		}
		reg.TaggedAddresses["wan"] = wan
	}
	binds := map[string]any{}
	for _, text := range r.Binds {
		name, at, found := strings.Cut(text, "=")
		one, err := listenAddress("-bind-address", at)
		if !found || name == "" || err != nil {
			return nil, fmt.Errorf("-bind-address %q: want name=address:port", text)
		}
		binds[name] = map[string]any{"Address": one.Address, "Port": one.Port}
	}
	if len(binds) > 0 {
		reg.Proxy.Config["envoy_gateway_bind_addresses"], reg.Proxy.Config["envoy_gateway_no_default_bind"] = binds, true
	}
	if r.ExposeServers {
		reg.Meta = map[string]string{"consul-wan-federation": "1"}
	}
	return reg, nil
}

func meaning(given, got string) string {
	if given == got {
		return ""
	}
	return fmt.Sprintf("; the template gives %q", got)
}

// Validate reports the first thing wrong with a registration.
func (r Registration) Validate() error {
	if r.Gateway != "" {
		_, err := r.build()
		return err
	}
	if r.Service == "" {
		return errors.New("-register needs -service NAME")
	}
	if err := certs.ServiceName(r.Service); err != nil {
		return fmt.Errorf("-service %q: %w", r.Service, err)
	}
	if r.Port < 0 || r.Port > 65535 {
		return fmt.Errorf("-port %d: want 1 to 65535", r.Port)
	}
	_, err := r.build()
	return err
}

// Register registers the sidecar with the agent. Without r.Listen, the sidecar keeps
// the port that is registered under its ID already, or gets one of Consul's own range that is
// free on this host and in the agent.
func (c *Client) Register(ctx context.Context, r Registration) error {
	reg, err := r.build()
	if err != nil {
		return err
	}
	if reg.Port == 0 { // Consul wants one also of a client, which does not listen on it
		if reg.Port, err = c.freePort(ctx, r.ID()); err != nil {
			return err
		}
	}
	return c.api.Agent().ServiceRegisterOpts(reg, (api.ServiceRegisterOpts{}).WithContext(ctx))
}

func (c *Client) freePort(ctx context.Context, id string) (int, error) {
	all, err := c.api.Agent().ServicesWithFilterOpts("", (&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return 0, err
	}
	taken := map[int]bool{}
	for sid, s := range all {
		if sid == id && port(s.Port) {
			return s.Port, nil
		}
		taken[s.Port] = true
	}
	for p := firstPort; p <= lastPort; p++ {
		if taken[p] {
			continue
		}
		ln, err := net.Listen("tcp", ":"+strconv.Itoa(p))
		if err == nil {
			ln.Close()
			return p, nil
		}
	}
	return 0, fmt.Errorf("no free port from %d to %d for the sidecar; give one with -listen", firstPort, lastPort)
}

// Beat keeps the sidecar's check in the state that ready reports, and registers the sidecar
// again if the agent has lost it, until ctx ends; then it deregisters the sidecar.
func (c *Client) Beat(ctx context.Context, r Registration, log *slog.Logger, ready func() (bool, string)) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	var last string
	var told time.Time
	for {
		ok, why := ready()
		status := api.HealthPassing
		if !ok {
			status = api.HealthCritical
		}
		if now := status + why; now != last || time.Since(told) > 10*time.Second {
			err := c.api.Agent().UpdateTTLOpts(r.check(), why, status, (&api.QueryOptions{}).WithContext(ctx))
			switch {
			case err == nil:
				last, told = now, time.Now()
			case isStatus(err, 404) || isStatus(err, 500):
				if err := c.Register(ctx, r); err == nil {
					log.Info("registered the sidecar again: the agent had lost it", "id", r.ID())
				}
			}
		}
		select {
		case <-t.C:
			continue
		case <-ctx.Done():
		}
		break
	}
	// The context is over, but the agent must still be told.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := c.api.Agent().ServiceDeregisterOpts(r.ID(), (&api.QueryOptions{}).WithContext(ctx)); err != nil {
		log.Warn("cannot deregister the sidecar", "id", r.ID(), "error", err, "try", "consul services deregister -id="+r.ID())
		return
	}
	log.Info("deregistered the sidecar", "id", r.ID())
}
