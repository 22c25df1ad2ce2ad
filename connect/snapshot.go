// Package connect says what the mesh wants of one proxy, in the mesh's words: the Snapshot,
// made of listeners, groups and targets. It does no I/O and knows neither Consul's API nor
// HAProxy, nor what kind of proxy it is: kinds differ in which nouns they publish.
//
// Invariants: a Snapshot is complete when it is published and never changes afterwards;
// slices are sorted, so that equal wants compare and render equal; nouns refer to each
// other by name, and a noun that did not change is the same pointer in the next Snapshot,
// which is how later stages keep the cost of a change proportional to the change.
// Strings still come from Consul: whoever writes them anywhere quotes or refuses.
//
// It may import certs and intentions.
package connect

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/certs"
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

// ParseProtocol reads a protocol's name in any case; ok is false for a name that
// Consul does not know, which counts as tcp.
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

// LeafName names a leaf certificate of the Snapshot.
type LeafName string

// BundleName names a bundle of roots of the Snapshot.
type BundleName string

// Names of what every proxy has: its own leaf, and the roots of its own trust domain.
const (
	OwnLeaf   LeafName   = "leaf"
	OwnBundle BundleName = "roots"
)

// Snapshot is everything the mesh wants, at one moment.
type Snapshot struct {
	Proxy     Proxy
	Listeners []*Listener // sorted by Role and Name, and unique in both
	Groups    []*Group    // sorted by Name
	Targets   []*Target   // sorted by Name
	Leaves    map[LeafName]*certs.Leaf
	Bundles   map[BundleName]*certs.Roots
	AccessLog AccessLog // of every listener
	Incoming  TLS       // of callers' connections
	Outgoing  TLS       // of our connections to the mesh
	Telemetry Telemetry
	Snippets  map[SnippetName]string // lines, each with its end; none is empty
	Notices   []Notice               // sorted
	Peers     []Peer                 // sorted by Name; for people
}

// Same reports whether two snapshots are equal; nouns are compared by their pointers.
func (s *Snapshot) Same(o *Snapshot) bool {
	return o != nil && s.Proxy == o.Proxy && s.AccessLog == o.AccessLog && s.Telemetry == o.Telemetry && s.Incoming == o.Incoming && s.Outgoing == o.Outgoing &&
		slices.Equal(s.Listeners, o.Listeners) && slices.Equal(s.Groups, o.Groups) && slices.Equal(s.Targets, o.Targets) &&
		maps.Equal(s.Leaves, o.Leaves) && maps.Equal(s.Bundles, o.Bundles) && maps.Equal(s.Snippets, o.Snippets) && slices.Equal(s.Notices, o.Notices) && slices.Equal(s.Peers, o.Peers)
}

// Leaf returns the proxy's own leaf.
func (s *Snapshot) Leaf() *certs.Leaf { return s.Leaves[OwnLeaf] }

// Roots returns the roots of the proxy's own trust domain.
func (s *Snapshot) Roots() *certs.Roots { return s.Bundles[OwnBundle] }

// Group finds a group by its name, or nil.
func (s *Snapshot) Group(name GroupName) *Group {
	i, ok := slices.BinarySearchFunc(s.Groups, name, func(g *Group, n GroupName) int { return strings.Compare(string(g.Name), string(n)) })
	if !ok {
		return nil
	}
	return s.Groups[i]
}

// Target finds a target by its name, or nil.
func (s *Snapshot) Target(name TargetName) *Target {
	i, ok := slices.BinarySearchFunc(s.Targets, name, func(t *Target, n TargetName) int { return strings.Compare(string(t.Name), string(n)) })
	if !ok {
		return nil
	}
	return s.Targets[i]
}

// Public is the listener that the mesh calls, or nil: the service only calls others. Of a
// gateway it is one of its Exported listeners, whose policies are the same.
func (s *Snapshot) Public() *Listener {
	for _, l := range s.Listeners {
		if l.Role == Public || l.Role == Exported {
			return l
		}
	}
	return nil
}

// Upstreams are the listeners of the application's own calls.
func (s *Snapshot) Upstreams() []*Listener {
	for i, l := range s.Listeners {
		if l.Role == Local {
			return s.Listeners[i:]
		}
	}
	return nil
}

// Generation names the content of all policies, as this version of the program reads it. It is
// the same after a restart, and changes as soon as any caller may be judged otherwise.
func (s *Snapshot) Generation(version string) string {
	text := version
	for _, l := range s.Listeners {
		for i := range l.Branches {
			if g := l.Branches[i].Guard; g != nil {
				text += fmt.Sprintf("\x00%s\x00%d\x00%s", l.Name, i, g.Policy.Digest())
			}
		}
	}
	return Digest(text)
}

// Endpoints counts the endpoints that a listener leads to.
func (s *Snapshot) Endpoints(l *Listener) (n int) {
	for i := range l.Branches {
		l.Branches[i].Chain.Groups(func(name GroupName) {
			if g := s.Group(name); g != nil {
				for _, t := range g.Targets {
					if target := s.Target(t); target != nil {
						n += len(target.Endpoints)
					}
				}
			}
		})
	}
	return n
}

// Warnings say where callers are let in without mutual TLS and intentions.
func (s *Snapshot) Warnings() (out []string) {
	for _, l := range s.Listeners {
		out = append(out, l.Warnings()...)
	}
	return out
}

// Proxy is the registration itself.
type Proxy struct {
	ID          string // of the proxy
	Service     string // the represented service's name; of a gateway its own
	Kind        string // in words, for people: "" is a sidecar
	Node        string
	Namespace   string // "default" in the community edition
	Partition   string
	Datacenter  string
	TrustDomain string
}

// Peer is another cluster with which this one is peered.
type Peer struct {
	Name, State        string // State as Consul spells it: ACTIVE, PENDING, FAILING ...
	TrustDomain        string // "": its roots are not known
	Imported, Exported int    // services
}

// TLS is which versions and ciphers may be used. The zero value is TLS 1.2 at least.
type TLS struct {
	Min, Max string // "1.0" to "1.3"; "" is the default
	Ciphers  string // of TLS 1.2 and before, by their names in IANA's registry, with commas; "" is the default
}

// Telemetry is where others may read metrics, apart from the admin address.
type Telemetry struct {
	Prometheus string // address:port of /metrics, "" for none
	Stats      string // address:port of /stats and /stats/prometheus, "" for none
}

// AccessLog is the access log that proxy-defaults ask for. The zero value logs nothing.
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
