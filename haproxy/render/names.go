package render

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// Every name of a section, a file, a socket and a map is spelled in this file and nowhere
// else.

// Kind is the keyword that a section begins with.
type Kind string

// The kinds.
const (
	Global   Kind = "global"
	Defaults Kind = "defaults"
	Frontend Kind = "frontend"
	Backend  Kind = "backend"
)

// Names of sections that are of no listener. HAProxy 2.6 heeds abortonclose only where a
// frontend inherits it, and it must not be where TCP connections may be half closed: hence
// two defaults.
const (
	allDefaults, httpDefaults = "mesh", "mesh_http"
	adminFrontend             = "admin"
	authzBackend              = "authz"
)

// Names of sections of the public listener. Where mutual TLS is permissive, the door stands
// before it and tells TLS from plain connections.
const (
	publicFrontend = "public"
	exportedPrefix = "exported_"
	door           = "permissive"
	doorToTLS      = "permissive_tls"
)

// frontendName is the name of a listener's frontend. An upstream's has a prefix, as the
// upstream may have the name of another listener.
func frontendName(l *connect.Listener) string {
	switch l.Role {
	case connect.Local:
		return "up_" + l.Name
	case connect.Exported:
		return exportedPrefix + l.Name
	case connect.Edge:
		return "edge_" + l.Name
	}
	return l.Name
}

// backendName is the name of the backend for the target at a place of a group. Names that
// Consul chose have no colon, so ":or:" cannot make a name twice.
func backendName(g *connect.Group, place int) string {
	if place == 0 {
		return string(g.Name)
	}
	return fmt.Sprintf("%s:or:%s", g.Name, g.Targets[place])
}

// Guarded reports whether a session of this frontend and backend belongs to a caller who needs
// a verdict: it is at the public listener, or on its way there through the door.
func Guarded(frontend, backend string) bool {
	return frontend == publicFrontend || strings.HasPrefix(frontend, exportedPrefix) || frontend == door && backend == doorToTLS
}

// Paths under the run directory.
const (
	MainFile      = "haproxy.cfg"
	SPOEFile      = "spoe.cfg"
	LeafList      = "tls/leaf.list"
	PolicyMap     = "maps/policy.map"
	LegsMap       = "maps/legs.map"    // where the splits of a route end
	WaysMap       = "maps/ways.map"    // the backends of a split, in failover order
	NamesMap      = "maps/names.map"   // of relays: backends by the name that is asked for
	EndingsMap    = "maps/endings.map" // and by its ending
	HostsMap      = "maps/hosts.map"   // of edges: sites by host
	BeginningsMap = "maps/begins.map"  // and by its beginning
	PolicyKey     = "generation"
	DrainingKey   = "draining" // in PolicyMap while we stop
	StatsSocket   = "sock/stats"
	AdminSocket   = "sock/admin"
	AuthzSocket   = "sock/authz"
	publicSocket  = "sock/public" // of the public frontend behind the door
	MasterSocket  = "sock/master" // made by the process, not by the configuration
	slotDir       = "sock/"
)

// LeafFile is the path of a leaf certificate and its key.
func LeafFile(n connect.LeafName) string { return "tls/" + connect.SafeName(string(n)) + ".pem" }

// BundleFile is the path of a bundle of roots.
func BundleFile(n connect.BundleName) string { return "tls/" + connect.SafeName(string(n)) + ".pem" }

// Class is what the connectors that share a set of sockets have in common.
type Class struct {
	ALPN    string // protocol that is offered; "" none
	Timeout time.Duration
	Leaf    connect.LeafName
	Bundle  connect.BundleName
	Go      bool // the Go originator listens on its sockets
}

// Name of the class, fit for a file and a section.
func (c Class) Name() string {
	kind := "t"
	switch c.ALPN {
	case "h2":
		kind = "h2"
	case "http/1.1":
		kind = "h1"
	}
	if c.Go {
		kind = "g" + kind
	}
	name := fmt.Sprintf("%s-%d", kind, c.Timeout.Milliseconds())
	if c.Leaf != connect.OwnLeaf || c.Bundle != connect.OwnBundle {
		name += "-" + connect.Digest(string(c.Leaf)+"\x00"+string(c.Bundle))
	}
	return name
}

// parseClass reads a name. With another leaf or bundle than our own the class is whole once
// somebody wants it; ok is false for what is no class.
func parseClass(name string) (c Class, ok bool) {
	kind, rest, _ := strings.Cut(name, "-")
	timeout, other, foreign := strings.Cut(rest, "-")
	n, err := strconv.Atoi(timeout)
	c = Class{Timeout: time.Duration(n) * time.Millisecond, Leaf: connect.OwnLeaf, Bundle: connect.OwnBundle}
	kind, c.Go = strings.CutPrefix(kind, "g")
	switch kind {
	case "h2":
		c.ALPN = "h2"
	case "h1":
		c.ALPN = "http/1.1"
	}
	own := c.Name()
	if foreign {
		own, c.Leaf, c.Bundle = own+"-"+other, "", ""
	}
	return c, err == nil && own == name && (c.Go || !foreign)
}

// SlotMapFile is the path of the map of a class, by its name.
func SlotMapFile(class string) string { return "maps/" + class + ".map" }

// SlotDir is the directory of the sockets of a class, by its name.
func SlotDir(class string) string { return slotDir + class }

// SlotSocket is the path of one slot's socket.
func SlotSocket(s Slot) string { return fmt.Sprintf("%s/%d", SlotDir(s.Class), s.ID) }

// slotID keeps socket IDs clear of those HAProxy numbers itself.
func slotID(n int) int { return 1000 + n }

// Key is a slot's key in the map of its class.
func (s Slot) Key() string { return strconv.Itoa(slotID(s.ID)) }

// rateTable is the backend that counts for one of a listener's rates. Listeners' own names have no
// colon.
func rateTable(l *connect.Listener, n int) string {
	return fmt.Sprintf("%s:rate:%d", frontendName(l), n+1)
}

// innerSocket is where the listener of this name is reached from inside.
func innerSocket(name string) string { return "sock/inner-" + connect.Digest(name) }

// relayBackend is one of those that a relay passes connections on to.
func relayBackend(n int) string { return fmt.Sprintf("relay_%d", n) }

// Names of the sections of a class's connectors.
func connectorFrontend(class string) string { return "connect_" + class }
func connectorBackend(class string) string  { return "tls_" + class }
