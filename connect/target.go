package connect

import "github.com/haproxy-connect/haproxy-connect/certs"

// TargetName names a target of the Snapshot.
type TargetName string

// Target is who may answer a call, and at which endpoints.
type Target struct {
	Name       TargetName
	Service    string // or the prepared query's name
	Subset     string // "": the service as a whole
	Datacenter string
	Peer       string // "": our own cluster
	Dial       Dial
	Endpoints  []Endpoint // healthy ones; sorted by Name
}

// Dial is how a target is reached.
type Dial struct {
	How    How
	IDs    []certs.SPIFFEID // Mesh: the server must have one of these identities; sorted; none: no server is accepted
	Bundle BundleName       // Mesh: whoever answers must be certified by it
	Leaf   LeafName         // Mesh: who we are
	SNI    string           // Mesh: the name that is asked for, where a gateway reads it; "": none is sent
	Server *Server          // Outside: how the server is verified; nil: no TLS
}

// Server is how a server outside the mesh is verified, and who we are to it.
type Server struct {
	RootsPEM string
	Name     string   // DNS name that is asked for and that its certificate must have; "": any that the roots certify
	Leaf     LeafName // our own certificate; "": none
}

// How a target is reached. The zero value is Mesh.
type How int

// The ways.
const (
	Mesh    How = iota // mutual TLS
	App                // our own application, plain
	Pass               // a connection of others, whose TLS is not ours to end
	Outside            // a server outside the mesh
	Inner              // the Exported listener of this proxy that is named as the service is
)

func (h How) String() string {
	switch h {
	case App:
		return "app"
	case Pass:
		return "pass"
	case Outside:
		return "outside"
	case Inner:
		return "inner"
	}
	return "mesh"
}

// Endpoint is one instance that may be called.
type Endpoint struct {
	Name       string // after node and instance; unique for this address in its target
	Node       string
	ID         string // service instance
	Address    string // IP
	Port       int
	SocketPath string // App: wins over address and port
	Weight     int    // 1 to 128
}
