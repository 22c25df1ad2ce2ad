// Package connect says what the mesh wants of one sidecar, in the mesh's words:
// the Snapshot. It does no I/O and knows neither Consul's API nor HAProxy.
//
// Invariants: a Snapshot is complete when it is published and never changes
// afterwards; slices are sorted, so that equal wants compare and render equal;
// an Upstream that did not change is the same pointer in the next Snapshot, which
// is how later stages keep the cost of a change proportional to the change.
// Strings still come from Consul: whoever writes them anywhere quotes or refuses.
//
// It may import certs and intentions.
package connect

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Protocol of a service, as Consul means it. The zero value is tcp.
type Protocol string

// The protocols; anything else counts as tcp.
const (
	TCP   Protocol = "tcp"
	HTTP  Protocol = "http"
	HTTP2 Protocol = "http2"
	GRPC  Protocol = "grpc"
)

// ParseProtocol lower-cases; ok is false for a name Consul does not know, which
// counts as tcp.
func ParseProtocol(s string) (p Protocol, ok bool) {
	switch p := Protocol(strings.ToLower(strings.TrimSpace(s))); p {
	case TCP, HTTP, HTTP2, GRPC:
		return p, true
	case "":
		return TCP, true
	}
	return TCP, false
}

// IsHTTP reports whether requests can be seen.
func (p Protocol) IsHTTP() bool { return p == HTTP || p.IsHTTP2() }

// IsHTTP2 reports whether only HTTP/2 is spoken.
func (p Protocol) IsHTTP2() bool { return p == HTTP2 || p == GRPC }

// Snapshot is everything the mesh wants, at one moment.
type Snapshot struct {
	Proxy     Proxy
	Inbound   Inbound
	Upstreams []*Upstream // sorted by Name
	Leaf      *certs.Leaf
	Roots     *certs.Roots
	Policy    *intentions.Policy
	Notices   []Notice // sorted
}

// Proxy is the registration itself.
type Proxy struct {
	ID          string // of the sidecar
	Service     string // the represented service's name
	ServiceID   string
	Node        string
	Namespace   string // "default" in the community edition
	Partition   string
	Datacenter  string
	TrustDomain string
}

// Telemetry is where others may read metrics, apart from the admin address.
type Telemetry struct {
	Prometheus string // address:port of /metrics, "" for none
	Stats      string // address:port of /stats and /stats/prometheus, "" for none
}

// AccessLog is what proxy-defaults say of it. The zero value is none.
type AccessLog struct {
	Enabled bool
	JSON    string // Envoy's format as a JSON object; "" and no Text: Envoy's default fields
	Text    string // Envoy's format as text
	Sink    string // "stdout", "stderr", or a path
}

// SPIFFEID is the identity that the leaf of this proxy must carry.
func (p Proxy) SPIFFEID() certs.SPIFFEID {
	return certs.SPIFFEID{TrustDomain: p.TrustDomain, Partition: orDefault(p.Partition),
		Namespace: orDefault(p.Namespace), Datacenter: p.Datacenter, Service: p.Service}
}

func orDefault(s string) string {
	if s == "" {
		return "default"
	}
	return s
}

// Inbound is the public side. Port 0: the service only calls others.
type Inbound struct {
	Address string
	Port    int
	Protocol
	Local Local

	LocalConnectTimeout time.Duration // > 0
	LocalRequestTimeout time.Duration // < 0: none
	LocalIdleTimeout    time.Duration // > 0
	MaxConnections      int           // 0: unlimited
	BalanceExact        bool          // spread accepted connections over the threads
	UnsecuredPort       int           // a plain listener beside the mesh; 0: none
	ForwardFor          bool
	CallerHeader        string // request header that receives the caller's service name
	Expose              []ExposePath
	Normalize           Normalize
	SanitizeXFCC        bool // remove X-Forwarded-Client-Cert instead of setting it
	// PermissivePort lets in plain TCP that was sent to this port before it was
	// redirected to ours (MutualTLSMode permissive), no TLS, no intentions; 0: none.
	PermissivePort int
	Telemetry      Telemetry
	AccessLog      AccessLog // of every listener
}

// Normalize is what happens to a request before intentions look at it and the
// application receives it (Consul's mesh.HTTP.Incoming.RequestNormalization). The
// zero value is Consul's default.
type Normalize struct {
	KeepPath       bool // InsecureDisablePathNormalization
	MergeSlashes   bool
	EscapedSlashes EscapedSlashes // "" keeps them
	Underscores    Underscores    // "" allows them
}

// EscapedSlashes says what becomes of %2F and %5C in a path.
type EscapedSlashes string

// Underscores says what becomes of headers with an underscore in their name.
type Underscores string

// The choices, as Consul spells them.
const (
	SlashesReject   EscapedSlashes = "REJECT_REQUEST"
	SlashesRedirect EscapedSlashes = "UNESCAPE_AND_REDIRECT"
	SlashesForward  EscapedSlashes = "UNESCAPE_AND_FORWARD"
	SlashesKeep     EscapedSlashes = "KEEP_UNCHANGED"

	UnderscoresReject Underscores = "REJECT_REQUEST"
	UnderscoresDrop   Underscores = "DROP_HEADER"
	UnderscoresAllow  Underscores = "ALLOW"
)

// Local is where the application listens: SocketPath, if set, wins.
type Local struct {
	Address    string
	Port       int
	SocketPath string
}

// ExposePath opens one exact path of the application without mutual TLS.
type ExposePath struct {
	Path       string
	LocalPort  int
	ListenPort int
	Protocol
}

// Listener is where the application reaches an upstream.
type Listener struct {
	Address    string
	Port       int
	SocketPath string
	SocketMode string // octal, "" for the default 0600
}

// Clashes reports whether both cannot be listened on at the same time.
func (l Listener) Clashes(o Listener) bool {
	if l.SocketPath != "" || o.SocketPath != "" {
		return l.SocketPath == o.SocketPath
	}
	anywhere := func(a string) bool { return a == "0.0.0.0" || a == "::" }
	return l.Port == o.Port && (l.Address == o.Address || anywhere(l.Address) || anywhere(o.Address))
}

// Warnings say where the application can be reached without mutual TLS and intentions.
func (in *Inbound) Warnings() (out []string) {
	if in.Port == 0 {
		return nil
	}
	const anybody = ": no TLS, no intentions, anybody who reaches it is let in"
	if in.UnsecuredPort != 0 {
		out = append(out, fmt.Sprintf("unsecured_bind_port is open, port %d%s", in.UnsecuredPort, anybody))
	}
	if in.PermissivePort != 0 {
		out = append(out, fmt.Sprintf("mutual TLS is permissive: plain connections to port %d are let in%s", in.PermissivePort, anybody))
	}
	for _, e := range in.Expose {
		out = append(out, fmt.Sprintf("path %s is exposed on port %d%s", quote(e.Path), e.ListenPort, anybody))
	}
	return out
}

// Listeners are what the inbound side listens on.
func (in *Inbound) Listeners() []Listener {
	if in.Port == 0 {
		return nil
	}
	out := []Listener{{Address: in.Address, Port: in.Port}}
	if in.UnsecuredPort != 0 {
		out = append(out, Listener{Address: "0.0.0.0", Port: in.UnsecuredPort})
	}
	for _, e := range in.Expose {
		out = append(out, Listener{Address: in.Address, Port: e.ListenPort})
	}
	return out
}

// Without is the inbound side without one of its listeners, which is not the public one.
func (in Inbound) Without(l Listener) Inbound {
	if in.UnsecuredPort == l.Port {
		in.UnsecuredPort = 0
	}
	in.Expose = slices.DeleteFunc(slices.Clone(in.Expose), func(e ExposePath) bool { return e.ListenPort == l.Port })
	return in
}

// Upstream is one destination of our service.
type Upstream struct {
	Name   string // unique in the Snapshot and fit for any name in HAProxy
	Listen Listener
	Protocol
	Target Target

	ConnectTimeout time.Duration // > 0
	IdleTimeout    time.Duration // > 0: silence of the server that ends a tcp session or a request
	Limits         Limits
	Passive        *PassiveHealth // nil: none asked for
	BalanceExact   bool
}

// Limits of an upstream; a nil field is unlimited.
type Limits struct {
	MaxConnections, MaxPendingRequests, MaxConcurrentRequests *int
}

// PassiveHealth takes an endpoint out of rotation that fails in practice, for
// BaseEjection times the number of its recent ejections.
type PassiveHealth struct {
	Interval     time.Duration // in which an ejection less is remembered
	MaxFailures  int           // in a row
	BaseEjection time.Duration
	MaxEjected   *int // percent of the endpoints; nil: 10, but one at least
	Enforced     int  // percent of the ejections that are carried out
}

// Target is what an upstream resolves to: who may answer, and where.
type Target struct {
	Name       string // unique in the Snapshot, fit for a backend's name
	Service    string // or the prepared query's name
	Datacenter string
	IDs        []certs.SPIFFEID // whoever answers must be one of these; sorted; none: nobody
	SNI        string
	Endpoints  []Endpoint // healthy ones; sorted by Name
}

// Endpoint is one instance that may be called.
type Endpoint struct {
	Name    string // after node and instance; unique for this address in its target
	Node    string
	ID      string // service instance
	Address string // IP, or a host name
	Port    int
	Weight  int // 1 to 128
}

// Notice is something in Consul that is not honoured, and why.
type Notice struct {
	Where string // "proxy", "upstream NAME"
	Key   string
	Value string // as found, may be hostile
	Why   string
}

// String quotes whatever came from outside.
func (n Notice) String() string {
	s := "ignored " + quote(n.Where) + " " + quote(n.Key)
	if n.Value != "" {
		s += " = " + quote(n.Value)
	}
	return s + ": " + n.Why
}

// Notices are collected while decoding and sorted before they are published.
type Notices []Notice

// Add appends one.
func (n *Notices) Add(where, key, value, why string) {
	*n = append(*n, Notice{Where: where, Key: key, Value: value, Why: why})
}

// Sorted returns them in a stable order without repetitions.
func (n Notices) Sorted() []Notice {
	out := slices.Clone(n)
	slices.SortFunc(out, func(a, b Notice) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}

func quote(s string) string {
	if len(s) > 120 {
		s = s[:120] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == 0xfffd || (r >= 0x80 && r < 0xa0) || r == 0x2028 || r == 0x2029 {
			return '?'
		}
		return r
	}, s)
}
