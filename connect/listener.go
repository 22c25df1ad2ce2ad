package connect

import (
	"fmt"
	"strconv"
	"time"

	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Role is how a listener treats whoever connects.
type Role int

// The roles. The zero Role is none.
const (
	Public   Role = iota + 1 // mutual TLS and intentions: callers of the mesh
	Open                     // plain on purpose: no TLS, no intentions
	Relay                    // the mesh, whose connections are passed on by the name that they ask for
	Exported                 // mutual TLS: who calls a service that a gateway stands for; a Relay passes them on to here
	Edge                     // clients outside the mesh, which a gateway lets in
	Local                    // the application, which calls an upstream
)

// Callers reports whether others connect to the listener, and not our own application.
func (r Role) Callers() bool {
	return r == Public || r == Open || r == Relay || r == Exported || r == Edge
}

// Optional reports whether the other listeners go on without one of this role that cannot be rendered:
// each leads to another service.
func (r Role) Optional() bool { return r == Local || r == Edge || r == Exported }

func (r Role) String() string {
	switch r {
	case Public:
		return "public"
	case Open:
		return "open"
	case Relay:
		return "relay"
	case Exported:
		return "exported"
	case Edge:
		return "edge"
	case Local:
		return "local"
	}
	return "none"
}

// Listener is one address that the proxy listens on, and where its connections go.
type Listener struct {
	Name string // fit for any name in HAProxy; with the role Local it is the upstream's name
	Role Role
	// Opened names the setting that makes a listener Open, as its documentation spells it.
	Opened string
	// From is who may connect besides this host itself, by address; nil: anybody.
	From []string
	Bind Bind
	Idle time.Duration // silence that ends a connection; 0: the default of every listener
	// MaxConnections limits the connections; one more is refused at once. nil: unlimited.
	MaxConnections *int
	Extras         Extras
	Door           *Door    // of Edge; nil: plain connections, whose paths are normalized as by default
	Origin         string   // what in Consul says so, in words
	Branches       []Branch // the first that matches
}

// Bind is an address that is listened on: SocketPath, if set, wins.
type Bind struct {
	Address    string
	Port       int
	SocketPath string
	SocketMode string // octal, "" for the default 0600
	Inner      bool   // nothing else is set: only a target of this proxy leads here, see Inner
}

// String is the address or the path, for people.
func (b Bind) String() string {
	if b.Inner {
		return "inside"
	}
	if b.SocketPath != "" {
		return b.SocketPath
	}
	return b.Address + ":" + strconv.Itoa(b.Port)
}

// Clashes reports whether both cannot be listened on at the same time.
func (b Bind) Clashes(o Bind) bool {
	if b.Inner || o.Inner {
		return false
	}
	if b.SocketPath != "" || o.SocketPath != "" {
		return b.SocketPath == o.SocketPath
	}
	anywhere := func(a string) bool { return a == "0.0.0.0" || a == "::" }
	return b.Port == o.Port && (b.Address == o.Address || anywhere(b.Address) || anywhere(o.Address))
}

// Branch is one way through a listener.
type Branch struct {
	Match    Match
	Protocol Protocol
	Guard    *Guard // nil: whoever connects is let in
	Chain    Chain
}

// Match says which connections take a branch. The zero value is all of them.
type Match struct {
	// Port is the connection's original destination port, before it was redirected to the listener.
	Port int
	// SNI is the name that the caller asks for, in lower case; with "*." before it every
	// name that ends so.
	SNI string
}

// Guard says who we are at a branch, and who may come in.
type Guard struct {
	Leaf         LeafName
	Callers      BundleName
	Peers        []PeerCallers // sorted by Peer
	Foreign      bool          // callers are of peers: what they say of who called them counts for nothing
	Policy       *intentions.Policy
	Normalize    Normalize
	SanitizeXFCC bool   // remove X-Forwarded-Client-Cert instead of setting it
	CallerHeader string // request header that receives the caller's service name
}

// Door is how an Edge listener lets clients in.
type Door struct {
	Certificates []Certificate // none: no TLS. The first is shown to who asks for no name of the others
	TLS          TLS
	Normalize    Normalize
}

// Certificate is one that is shown to clients outside the mesh.
type Certificate struct {
	Leaf  LeafName
	Names []string // that it is shown for; perhaps with a leading "*."
}

// PeerCallers are those of one peer: they ask by names that end in Suffix, and are verified by the
// peer's roots.
type PeerCallers struct {
	Peer   string
	Bundle BundleName
	Suffix string // begins with a dot
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

// LeadsTo reports whether any way through the listener leads to a group.
func (l *Listener) LeadsTo(g GroupName) (leads bool) {
	for i := range l.Branches {
		l.Branches[i].Chain.Groups(func(name GroupName) { leads = leads || name == g })
	}
	return leads
}

// Protocol returns the protocol of the first branch, which most connections take; tcp if there is none.
func (l *Listener) Protocol() Protocol {
	if len(l.Branches) == 0 { // a Relay of which no name leads anywhere yet
		return TCP
	}
	return l.Branches[0].Protocol
}

// Guard of the first branch, or nil.
func (l *Listener) Guard() *Guard {
	if len(l.Branches) == 0 {
		return nil
	}
	return l.Branches[0].Guard
}

// Policy is what decides who may come in; nil: the listener asks nobody.
func (l *Listener) Policy() *intentions.Policy {
	if l == nil || l.Guard() == nil {
		return nil
	}
	return l.Guard().Policy
}

// Warnings say where callers are let in without mutual TLS and intentions.
func (l *Listener) Warnings() (out []string) {
	anybody := ": no TLS, no intentions, anybody who reaches it is let in"
	if l.From != nil {
		anybody = " to this host and its agent: no TLS, no intentions"
	}
	for _, b := range l.Branches {
		switch {
		case !l.Role.Callers() || l.Role == Relay || l.Role == Exported || l.Role == Edge || b.Guard != nil:
		case l.Role == Public:
			out = append(out, fmt.Sprintf("mutual TLS is permissive: plain connections to port %d are let in%s", b.Match.Port, anybody))
		default:
			all := false
			for _, r := range b.Chain.Routes {
				if r.Match.PathExact != "" {
					out = append(out, fmt.Sprintf("path %s is exposed on port %d%s", quote(r.Match.PathExact), l.Bind.Port, anybody))
				} else {
					all = true
				}
			}
			if all {
				out = append(out, fmt.Sprintf("%s is open, port %d%s", l.Opened, l.Bind.Port, anybody))
			}
		}
	}
	return out
}
