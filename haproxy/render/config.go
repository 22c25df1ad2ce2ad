// Package render turns a connect.Snapshot into a Config: the files HAProxy reads.
// It is pure: no I/O, no clock, the same input gives the same output. It is the
// only user of config-parser, and the only place that names a section, file, socket or map.
//
// Invariants: nothing from Consul becomes more than one word of one line (word
// refuses, it never repairs); a section that config-parser would change is an
// error; a TLS connector is made in one place and always has chain verification,
// the roots of exactly that trust domain, the identity filter and its guard rule; a key is
// never part of a Config, only of the Leaf it points to.
//
// It may import connect, certs, intentions, intentions/spoe (names of messages and variables
// only) and lua. haproxy, haproxy/selftest and cmd use it.
package render

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// Originator says who speaks TLS to upstreams.
type Originator string

// The originators: Lua is HAProxy itself with the identity filter, Go is the Go dialer.
const (
	Lua Originator = "haproxy"
	Go  Originator = "go"
)

// AccessLog is the form of HAProxy's log lines.
type AccessLog string

// Forms of the access log.
const (
	LogOff  AccessLog = "off"
	LogText AccessLog = "text"
	LogJSON AccessLog = "json"
)

// Options are decided by the operator and by HAProxy's version.
type Options struct {
	Version       string // of this program: verdicts of another version are not kept
	Dir           string // run directory, absolute, plain characters
	User, Group   string // of the worker; "" keeps ours
	Threads       int    // 0: 2
	MaxConn       int    // 0: 4096
	MaxFiles      int    // limit of open files, which sockets and connections share; 0: none
	HardStopAfter time.Duration
	AccessLog     AccessLog // "": as Consul says, else off
	Originator    Originator
	// ExplainDenials tells denied callers why, in a response header.
	ExplainDenials bool
	// MaxAge of a caller's connection, 0 for none: the first answer after it closes the
	// connection. Connections that get no answer are ended by cmd.
	MaxAge time.Duration
	// AgentTimeout bounds how long a verdict may take; 0: 1 s.
	AgentTimeout time.Duration

	HelloTimeout bool // the version has timeout client-hs (3.0+)
	DropTrailers bool // the version can drop the trailers of a request (3.2+)
	LosesAnswers bool // the version loses an answer to who still sends (before 3.0)
	TimesUploads bool // the version counts a pause of an upload as the server's silence (before 3.0)
	BufferCache  bool // the version can keep more buffers for each thread (3.0+)
	LuaBool      bool // the version wants tune.lua.bool-sample-conversion (3.1+)
	SPOP         bool // the version has mode spop (3.1+), and keeps connections to the agent only in it
}

// path of a file under the run directory.
func (o *Options) path(p string) string { return o.Dir + "/" + p }

// Config is what HAProxy should run. Treat as read-only.
type Config struct {
	Sections []*Section
	// By path under Dir:
	Files   map[string]string   // read when HAProxy starts; never a key
	Maps    map[string]*LiveMap // change while HAProxy runs
	Leaves  map[string]*certs.Leaf
	Bundles map[string]*certs.Roots

	Slots map[string]*SlotTable // by the name of the class
	// Relays is which backend of a relay is whose; nil: there is no relay.
	Relays *RelayTable
	Dir    string
	// Verified names the roots that pooled connections were verified by: when one is
	// removed, every server of an HTTP upstream gets a new name, and the old ones go
	// with their pools. "" at the start.
	Verified string
}

// LiveMap is a map file whose entries HAProxy takes while it runs. Treat as read-only.
type LiveMap struct {
	Entries []Entry // in the order of Entry.Compare
	// Read: a section reads it. HAProxy knows no other map.
	Read bool
	// Routes is true for a map of routes, whose entries belong to the frontend as it is (see
	// carried). Backends is true if values are names of backends with bars between them.
	Routes, Backends bool
}

// Entry of a map: two words.
type Entry struct{ Key, Value string }

// Compare orders entries by key, a shorter key first, so that numbers are in numerical order.
func (e Entry) Compare(o Entry) int {
	return cmp.Or(len(e.Key)-len(o.Key), strings.Compare(e.Key, o.Key))
}

// same reports whether two maps do not differ, so that neither the file nor HAProxy needs a
// change.
func (m *LiveMap) same(o *LiveMap) bool {
	return m.Read == o.Read && m.Routes == o.Routes && m.Backends == o.Backends && slices.Equal(m.Entries, o.Entries)
}

// Text is the file.
func (m *LiveMap) Text() string {
	size := 0
	for i := range m.Entries {
		size += len(m.Entries[i].Key) + len(m.Entries[i].Value) + 2
	}
	var b strings.Builder
	b.Grow(size)
	for i := range m.Entries {
		b.WriteString(m.Entries[i].Key)
		b.WriteByte(' ')
		b.WriteString(m.Entries[i].Value)
		b.WriteByte('\n')
	}
	return b.String()
}

// Section is one section of the file. Head does not contain its servers.
type Section struct {
	ID       string // tells the sections of a Config apart
	Kind     Kind
	Name     string                 // "" of a global one
	Role     connect.Role           // of a frontend its listener's; of a backend Public if it is the application, Local if not; else none
	Listener string                 // the name of that listener, of a frontend
	Passive  *connect.PassiveHealth // of a backend: ejection of endpoints that fail; nil for none
	Group    connect.GroupName      // of a backend
	Target   connect.TargetName     // of a backend whose servers are endpoints of the mesh
	Comment  string
	Snippet  connect.SnippetName // whose lines end Head; "": it has none
	Origin   string              // what in Consul made the section, in words; "": it is always there
	Head     string              // ends in a newline
	Servers  []Server
	class    string            // of the slots its servers use
	lines    string            // what Head was made of
	text     string            // as in the file
	origins  map[string]string // of lines that something else made
}

// Title is the first line of a section, without the defaults that it inherits.
func (s *Section) Title() string { return strings.TrimSpace(string(s.Kind) + " " + s.Name) }

func (s *Section) assemble() string {
	var b strings.Builder
	b.WriteString("\n# ")
	b.WriteString(s.Comment)
	b.WriteString("\n")
	b.WriteString(s.Head)
	for i := range s.Servers {
		b.WriteString("  ")
		b.WriteString(s.Servers[i].Line())
		b.WriteString("\n")
	}
	return b.String()
}

// Server is one line that the runtime API can add and remove.
type Server struct {
	Name    string
	Address string // as HAProxy takes it
	Weight  int
	Options string // the rest, without weight
	MaxConn int    // of the server, 0 for no limit; changes at run time as the weight does
	Slot    Slot
}

// Slot is the socket to which a server leads if HAProxy's connector or the Go originator speaks
// to the endpoint. The zero Slot means that the server is the endpoint itself.
type Slot struct {
	Class string // its name
	ID    int
}

// Line is the server as in the file.
func (s *Server) Line() string {
	return fmt.Sprintf("server %s %s weight %d%s", s.Name, s.Address, s.Weight, s.settings())
}

func (s *Server) settings() string {
	if s.MaxConn > 0 {
		return s.Options + " maxconn " + strconv.Itoa(s.MaxConn)
	}
	return s.Options
}

// Added is the server as the runtime API's "add server" takes it, without its backend.
func (s *Server) Added() string {
	return fmt.Sprintf("%s %s weight %d%s", s.Name, s.Address, s.Weight, s.settings())
}

const firstLine = "# Written by haproxy-connect from what Consul says; changes here are lost.\n"

// WriteTo writes the whole haproxy.cfg.
func (c *Config) WriteTo(w io.Writer) (int64, error) {
	b := bufio.NewWriterSize(w, 64<<10)
	n, _ := b.WriteString(firstLine)
	for _, s := range c.Sections {
		more, _ := b.WriteString(s.text) // an error stays for Flush
		n += more
	}
	return int64(n), b.Flush()
}

// Explained is the whole haproxy.cfg with what made each line: of a section before it, of a
// line that something else made after it.
func (c *Config) Explained() string {
	var b strings.Builder
	b.WriteString(firstLine)
	for _, s := range c.Sections {
		origin := cmp.Or(s.Origin, "haproxy-connect itself")
		inSnippet := false
		for line := range strings.Lines(s.text) {
			line = strings.TrimSuffix(line, "\n")
			text := strings.TrimSpace(line)
			inSnippet = inSnippet || strings.HasPrefix(text, "# snippet ")
			why := s.origins[text]
			switch {
			case strings.HasPrefix(text, "server ") && s.Target != "":
				why = "instances of " + string(s.Target)
			case inSnippet:
				why = "registration, snippet " + string(s.Snippet)
			}
			if strings.HasPrefix(line, "# ") {
				why = origin
			}
			b.WriteString(line)
			if text != "" && why != "" && (why != origin || strings.HasPrefix(line, "# ")) {
				b.WriteString("   # <- " + plainText(why))
			}
			b.WriteString("\n")
		}
	}
	return b.String()
}

// plainText is text from Consul within a comment.
func plainText(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

// Text is the whole haproxy.cfg.
func (c *Config) Text() string {
	var b strings.Builder
	_, _ = c.WriteTo(&b) // a Builder never fails
	return b.String()
}

// At is the section that has a line of the file, counted from 1, or nil.
func (c *Config) At(line int) *Section {
	at := strings.Count(firstLine, "\n")
	for _, s := range c.Sections {
		if at += strings.Count(s.text, "\n"); line <= at {
			return s
		}
	}
	return nil
}

// Pool is a backend of a group that has the endpoints of a target, or nil.
func (c *Config) Pool(g connect.GroupName, t connect.TargetName) *Section {
	for _, s := range c.Sections {
		if s.Group == g && s.Target == t {
			return s
		}
	}
	return nil
}

// Find returns a section by kind and name, or nil.
func (c *Config) Find(k Kind, name string) *Section {
	for _, s := range c.Sections {
		if s.Kind == k && s.Name == name {
			return s
		}
	}
	return nil
}
