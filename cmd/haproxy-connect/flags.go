package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/consul"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// config is every setting, checked.
type config struct {
	which        consul.Selector
	consul       consul.Config
	register     bool
	registration consul.Registration
	haproxy      string
	runDir       string
	user         string
	threads      int
	maxConn      int
	files        int // limit of open files; 0: practically unlimited
	adminAddr    string
	accessLog    string
	originator   string

	explainDenials bool
	maxAge         time.Duration
	appTimeout     time.Duration
	drain          time.Duration
	hardStop       time.Duration
	logLevel       string
	logJSON        bool
	configFile     string
	args           []string
	warnings       []string
}

// stringsFlag may be given several times.
type stringsFlag []string

func (s *stringsFlag) String() string     { return strings.Join(*s, ",") }
func (s *stringsFlag) Set(v string) error { *s = append(*s, v); return nil }

// environment names a second variable for some flags; every flag has HAPROXY_CONNECT_<FLAG>.
// Consul's library reads the CONSUL_* variables itself.
var environment = map[string]string{"sidecar-for": "CONNECT_SIDECAR_FOR", "proxy-id": "CONNECT_PROXY_ID"}

// aliases maps flags of the old haproxy-consul-connect to the names they have now.
var aliases = map[string]string{"haproxy-cfg-base-path": "run-dir", "stats-addr": "admin-addr"}

// obsolete flags are accepted and say why they do nothing.
var obsolete = map[string]string{
	"enable-intentions":      "intentions are always enforced",
	"dataplane":              "no dataplane API is used",
	"stats-service-register": "register the metrics port with Consul yourself, if you need it there",
}

// newFlags returns the flags of a command. The flag package prints nothing itself: realMain prints errors and help, once.
func newFlags(name string, c *config) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	str := func(p *string, name, def, help string) { fs.StringVar(p, name, def, help) }
	str(&c.which.SidecarFor, "sidecar-for", "", "`ID` of the service whose sidecar to run")
	str(&c.which.ProxyID, "proxy-id", "", "`ID` of the proxy's own registration")
	str(&c.which.SidecarForTag, "sidecar-for-tag", "", "run the sidecar of the one service with this `tag`")
	str(&c.consul.Addr, "http-addr", "", "Consul agent: host:port, http://, https:// or unix:// `address` (CONSUL_HTTP_ADDR)")
	str(&c.consul.Token, "token", "", "ACL `token`; prefer -token-file, others can see flags (CONSUL_HTTP_TOKEN)")
	str(&c.consul.TokenFile, "token-file", "", "`file` with the ACL token (CONSUL_HTTP_TOKEN_FILE)")
	str(&c.consul.CAFile, "ca-file", "", "CA `file` for the agent's HTTPS (CONSUL_CACERT)")
	str(&c.consul.CAPath, "ca-path", "", "CA `directory` for the agent's HTTPS (CONSUL_CAPATH)")
	str(&c.consul.ClientCert, "client-cert", "", "client certificate `file` for the agent's HTTPS (CONSUL_CLIENT_CERT)")
	str(&c.consul.ClientKey, "client-key", "", "its key `file` (CONSUL_CLIENT_KEY)")
	str(&c.consul.TLSServerName, "tls-server-name", "", "`name` to expect in the agent's certificate (CONSUL_TLS_SERVER_NAME)")
	str(&c.consul.Namespace, "namespace", "", "enterprise `namespace` (CONSUL_NAMESPACE)")
	str(&c.consul.Partition, "partition", "", "enterprise `partition` (CONSUL_PARTITION)")
	fs.BoolVar(&c.register, "register", false, "register the sidecar, and deregister it on exit")
	str(&c.registration.Service, "service", "", "with -register: `name` of the service")
	fs.IntVar(&c.registration.Port, "port", 0, "with -register: `port` of the application on 127.0.0.1; 0 for a client only")
	str(&c.registration.Instance, "register-id", "", "with -register: `ID` that tells this replica from others on the same agent; hostname for this host's name")
	str(&c.registration.Listen, "listen", "", "with -register: `address:port` of the public listener, or a template such as '{{ GetInterfaceIP \"eth0\" }}:21000' (default: a free port from 21000 on)")
	str(&c.consul.GRPCAddr, "grpc-addr", "", "the agent's gRPC port, which signs for gateways: host:port, http://, https:// or unix:// `address` (CONSUL_GRPC_ADDR; default 127.0.0.1:8502)")
	str(&c.consul.GRPCCAFile, "grpc-ca-file", "", "CA `file` of the gRPC port; it means TLS (CONSUL_GRPC_CACERT)")
	gatewayFlags(fs, c)
	fs.Var((*stringsFlag)(&c.registration.Upstreams), "upstream", "with -register: `name:port` or name:address:port; may be repeated")
	str(&c.haproxy, "haproxy", "haproxy", "HAProxy binary, a `path` or a name on PATH")
	str(&c.runDir, "run-dir", "", "`directory` for configuration, keys and sockets (default /run/haproxy-connect/<proxy-id>)")
	str(&c.user, "user", "", "unprivileged `user` of HAProxy's worker when started by root (default haproxy, else nobody)")
	fs.IntVar(&c.threads, "threads", 2, "HAProxy's `threads`")
	fs.IntVar(&c.maxConn, "max-conn", 0, "most concurrent `connections` (default: from the limit of open files)")
	str(&c.adminAddr, "admin-addr", "127.0.0.1:1936", "`address:port` of status, metrics and statistics; empty for none")
	str(&c.accessLog, "access-log", "", "access log on standard output: `off|text|json` (default: as access_logs of proxy-defaults says, else off)")
	fs.DurationVar(&c.maxAge, "max-connection-age", 0, "how long a caller's connection may last before it must connect, and be judged, anew: `duration`, 0 for ever")
	fs.BoolVar(&c.consul.Snippets, "allow-snippets", false, "take lines in HAProxy's own words from registrations (haproxy.snippets): whoever may write a service then decides what its HAProxy does")
	fs.BoolVar(&c.explainDenials, "explain-denials", false, "tell denied HTTP callers why, in the response header X-Denied-Reason")
	str(&c.originator, "originator", "haproxy", "who speaks TLS to upstreams: haproxy; go; auto (go when the self-test of haproxy fails): `haproxy|go|auto`")
	fs.DurationVar(&c.drain, "drain-timeout", 30*time.Second, "how long open sessions may go on after a stop: `duration`")
	fs.DurationVar(&c.appTimeout, "app-timeout", 30*time.Second, "how long the application after -- may take to end: `duration`")
	fs.DurationVar(&c.hardStop, "hard-stop-after", 30*time.Minute, "how long sessions of a replaced HAProxy worker may go on: `duration`")
	str(&c.logLevel, "log-level", "info", "`debug|info|warn|error`")
	fs.BoolVar(&c.logJSON, "log-json", false, "log in JSON")
	str(&c.configFile, "config-file", "", "JSON `file` with flags as keys, for what neither flag nor environment sets")
	for old, now := range aliases {
		f := fs.Lookup(now)
		fs.Var(f.Value, old, "old name of -"+now)
	}
	for old, why := range obsolete {
		fs.Var(noop{&c.warnings, old, why}, old, "accepted, does nothing: "+why)
	}
	fs.Usage = func() {}
	return fs
}

// gatewayFlags are those of gateways, as Consul's Envoy command has them.
func gatewayFlags(fs *flag.FlagSet, c *config) {
	str := func(p *string, name, def, help string) { fs.StringVar(p, name, def, help) }
	str(&c.which.Gateway, "gateway", "", "run a gateway of this `kind`: mesh, ingress, api or terminating")
	str(&c.registration.Address, "address", "", "with -gateway and -register: `address:port` for its own datacenter, or a template (default: a private address, port 8443)")
	str(&c.registration.WAN, "wan-address", "", "with -gateway and -register: `address:port` for other datacenters and peers, or a template")
	fs.Var((*stringsFlag)(&c.registration.Binds), "bind-address", "with -gateway and -register: `name=address:port` to listen on in place of -address; may be repeated")
	fs.BoolVar(&c.registration.ExposeServers, "expose-servers", false, "with -gateway mesh and -register: servers of other datacenters reach ours through it (WAN federation)")
	fs.DurationVar(&c.registration.DeregisterAfter, "deregister-after-critical", 6*time.Hour, "with -gateway and -register: Consul forgets a gateway that was critical for this `duration`")
}

type noop struct {
	warnings *[]string
	name     string
	why      string
}

func (n noop) String() string   { return "" }
func (n noop) IsBoolFlag() bool { return n.name == "enable-intentions" }
func (n noop) Set(string) error {
	*n.warnings = append(*n.warnings, fmt.Sprintf("-%s does nothing: %s", n.name, n.why))
	return nil
}

// parse reads flags, then environment, then the file. Every error names its source.
func parse(fs *flag.FlagSet, c *config, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return helpError{fs}
		}
		return flagError(fs, err)
	}
	c.args = fs.Args()
	if len(c.args) > 0 && fs.Name() != program {
		return usagef("unexpected argument %q", c.args[0])
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) {
		given[f.Name] = true
		if now, ok := aliases[f.Name]; ok {
			given[now] = true
		}
	})
	set := func(name, value, from string) error {
		given[name] = true
		if err := fs.Set(name, value); err != nil {
			return usagef("%s: %q: %s", from, value, wanted(fs.Lookup(name)))
		}
		return nil
	}
	var err error
	fs.VisitAll(func(f *flag.Flag) {
		if given[f.Name] || aliases[f.Name] != "" || obsolete[f.Name] != "" {
			return
		}
		own := "HAPROXY_CONNECT_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		for _, name := range []string{own, environment[f.Name]} {
			if v, ok := os.LookupEnv(name); ok && v != "" && !given[f.Name] && !injected(name, v) && err == nil {
				err = set(f.Name, v, name)
			}
		}
	})
	c.warnings = append(c.warnings, strangers(fs, os.Environ())...)
	if err == nil && c.configFile != "" {
		err = fromFile(fs, c.configFile, given, set)
	}
	return err
}

func fromFile(fs *flag.FlagSet, file string, given map[string]bool, set func(name, value, from string) error) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return usagef("-config-file %q: %v", file, unwrapPath(err))
	}
	var m map[string]any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber() // 1000000 stays "1000000": a float64 would become "1e+06"
	if err := d.Decode(&m); err != nil {
		return usagef("-config-file %q: not a JSON object of flags: %v", file, err)
	}
	for _, k := range slices.Sorted(maps.Keys(m)) { // the same error each time
		v := m[k]
		if fs.Lookup(k) == nil {
			return usagef("-config-file %q: key %q is not a flag", file, k)
		}
		if given[k] {
			continue
		}
		values := []any{v}
		if list, ok := v.([]any); ok {
			values = list
		}
		for _, one := range values {
			switch one.(type) {
			case string, bool, json.Number:
			default:
				return usagef("-config-file %q: key %q: want a string, a number, true or false, or a list of them", file, k)
			}
			if err := set(k, fmt.Sprint(one), fmt.Sprintf("-config-file %q: key %q", file, k)); err != nil {
				return err
			}
		}
	}
	return nil
}

func oneLine(err error) error {
	return fmt.Errorf("%s", strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", " "))
}

func unwrapPath(err error) error {
	if p, ok := err.(*os.PathError); ok {
		return p.Err
	}
	return err
}

// validate checks what belongs to every command that talks to Consul.
func (c *config) validate() error {
	n := 0
	for _, s := range []string{c.which.ProxyID, c.which.SidecarFor, c.which.SidecarForTag} {
		if s != "" {
			n++
		}
	}
	if err := c.gateway(); err != nil {
		return err
	}
	switch {
	case c.register && n > 0:
		return usagef("-register and -sidecar-for, -proxy-id or -sidecar-for-tag: give one of them")
	case !c.register && n == 0 && c.which.Gateway == "":
		return usagef("No proxy ID specified. One of -proxy-id, -sidecar-for, -gateway, -sidecar-for-tag or -register is required")
	case n > 1:
		return usagef("-proxy-id, -sidecar-for and -sidecar-for-tag: give one of them")
	}
	if c.register {
		if err := c.registration.Validate(); err != nil {
			return usageError{err}
		}
		c.which.ProxyID = c.registration.ID()
	} else if c.which.Gateway == "" && c.registration.Service != "" || c.registration.Port != 0 || c.registration.Instance != "" || c.registration.Listen != "" || len(c.registration.Upstreams) > 0 {
		return usagef("-service, -port, -register-id, -listen and -upstream only go with -register")
	}
	switch c.accessLog {
	case "", "off", "text", "json":
	default:
		return usagef("-access-log %q: want off, text or json", c.accessLog)
	}
	switch c.originator {
	case "haproxy", "go", "auto":
	default:
		return usagef("-originator %q: want haproxy, go or auto", c.originator)
	}
	if c.threads < 1 || c.threads > 64 {
		return usagef("-threads %d: want 1 to 64", c.threads)
	}
	if c.maxConn < 0 || c.maxConn > 1_000_000 {
		return usagef("-max-conn %d: want 1 to 1000000, or 0 to derive it", c.maxConn)
	}
	if c.drain < 0 || c.drain > 24*time.Hour {
		return usagef("-drain-timeout %s: want 0s to 24h", c.drain)
	}
	if c.appTimeout < 0 || c.appTimeout > 24*time.Hour {
		return usagef("-app-timeout %s: want 0s to 24h", c.appTimeout)
	}
	if c.hardStop < time.Second || c.hardStop > 24*24*time.Hour {
		return usagef("-hard-stop-after %s: want 1s to 576h", c.hardStop)
	}
	if c.maxAge != 0 && (c.maxAge < time.Second || c.maxAge > 24*365*time.Hour) {
		return usagef("-max-connection-age %s: want 1s to 8760h, or 0 for no limit", c.maxAge)
	}
	if _, err := c.level(); err != nil {
		return err
	}
	if err := checkAdmin(c.adminAddr); err != nil {
		return err
	}
	if c.runDir != "" {
		// The self-test runs in a directory below it.
		if _, err := render.New(render.Options{Dir: c.runDir + "/self-1234567"}); err != nil {
			return usagef("-run-dir %q: want a path of at most 50 plain characters", c.runDir)
		}
		if !filepath.IsAbs(c.runDir) {
			return usagef("-run-dir %q: want an absolute path", c.runDir)
		}
	}
	return nil
}

// gateway checks what goes with a gateway alone.
func (c *config) gateway() error {
	if c.which.Gateway == "" {
		if r := &c.registration; r.Address != "" || r.WAN != "" || len(r.Binds) > 0 || r.ExposeServers {
			return usagef("-address, -wan-address, -bind-address and -expose-servers only go with -gateway")
		}
		return nil
	}
	if _, known := consul.GatewayKinds[c.which.Gateway]; !known {
		return usagef("-gateway %q: Gateway must be one of: api, terminating, mesh, or ingress", c.which.Gateway)
	}
	if c.which.SidecarFor != "" || c.which.SidecarForTag != "" {
		return usagef("-gateway and -sidecar-for: give one of them")
	}
	if c.register {
		c.registration.Gateway = c.which.Gateway
	}
	return nil
}

func checkAdmin(addr string) error {
	if addr == "" {
		return nil
	}
	_, p, err := net.SplitHostPort(addr)
	if n, e := strconv.Atoi(p); err != nil || e != nil || n < 0 || n > 65535 {
		return usagef("-admin-addr %q: want address:port, or nothing for none", addr)
	}
	return nil
}

func (c *config) level() (slog.Level, error) {
	switch strings.ToLower(c.logLevel) {
	case "trace", "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error", "err":
		return slog.LevelError, nil
	}
	return 0, usagef("-log-level %q: want debug, info, warn or error", c.logLevel)
}

func (c *config) logger(w io.Writer) *slog.Logger {
	level, _ := c.level() // validated
	o := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // in JSON too
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}}
	if c.logJSON {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

// render is what a Renderer must know of flags and the machine.
func (c *config) render(dir string, a process.Account, b *process.Binary, o render.Originator) render.Options {
	f := b.Version.Features()
	return render.Options{Version: version(), Dir: dir, User: a.User, Group: a.Group, Threads: c.threads, MaxConn: c.maxConn, MaxFiles: c.files, HardStopAfter: c.hardStop,
		AccessLog: render.AccessLog(c.accessLog), ExplainDenials: c.explainDenials, MaxAge: c.maxAge, Originator: o, HelloTimeout: f.HelloTimeout, DropTrailers: f.DropTrailers, LosesAnswers: f.LosesAnswers, TimesUploads: f.TimesUploads, BufferCache: f.BufferCache, LuaBool: f.LuaBool, SPOP: f.SPOP}
}

// dir is the run directory of a proxy.
func (c *config) dir(proxyID string) string {
	if c.runDir != "" {
		return filepath.Clean(c.runDir)
	}
	base := "/run/haproxy-connect"
	if os.Geteuid() != 0 {
		base = os.Getenv("XDG_RUNTIME_DIR")
		if base == "" {
			base = filepath.Join(os.TempDir(), "haproxy-connect-"+uid())
		} else {
			base = filepath.Join(base, "haproxy-connect")
		}
	}
	name := connect.SafeName(proxyID)
	if len(base)+1+len(name) > 60 {
		name = connect.Digest(proxyID)
	}
	return filepath.Join(base, name)
}

func uid() string {
	u, err := user.Current()
	if err != nil {
		return strconv.Itoa(os.Geteuid())
	}
	return u.Uid
}
