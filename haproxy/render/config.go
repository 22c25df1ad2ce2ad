// Package render turns a connect.Snapshot into a Config: the files HAProxy reads.
// It is pure: no I/O, no clock, the same input gives the same output. It is the
// only user of config-parser.
//
// Invariants: nothing from Consul becomes more than one word of one line (word
// refuses, it never repairs); a section that config-parser would change is an
// error; a TLS connector is made in one place and always has chain verification,
// the trust domain's own roots, the identity filter and its guard rule; a key is
// never part of a Config, only of the Leaf it points to.
//
// It may import connect, certs, intentions/spoe (names of messages and variables
// only) and lua. haproxy and cmd use it.
package render

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	parser "github.com/haproxytech/config-parser/v5"
	"github.com/haproxytech/config-parser/v5/options"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
)

// Originator says who speaks TLS to upstreams.
type Originator string

// HAProxy itself with the identity filter, or the Go dialer.
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
	Dir           string // run directory, absolute, plain characters
	User, Group   string // of the worker; "" keeps ours
	Threads       int    // 0: 2
	MaxConn       int    // 0: 4096
	Files         int    // limit of open files, which sockets and connections share; 0: none
	HardStopAfter time.Duration
	AccessLog     AccessLog // "": as Consul says, else off
	Originator    Originator
	// ExplainDenials tells denied callers why, in a response header.
	ExplainDenials bool
	// MaxAge of a caller's connection, 0 for none: an answer after it closes the
	// connection. Whoever wires this ends those that do not ask.
	MaxAge time.Duration

	access connect.AccessLog // of the snapshot

	HelloTimeout bool // the version has timeout client-hs (3.0+)
	DropTrailers bool // the version can drop the trailers of a request (3.2+)
	LosesAnswers bool // the version loses an answer to who still sends (before 3.0)
	TimesUploads bool // the version counts a pause of an upload as the server's silence (before 3.0)
	BufferCache  bool // the version can keep more buffers for each thread (3.0+)
	LuaBool      bool // the version wants tune.lua.bool-sample-conversion (3.1+)
	SPOP         bool // the version has mode spop (3.1+), and keeps connections to the agent only in it
}

// Config is what HAProxy should run. Treat as read-only.
type Config struct {
	Sections []*Section
	Files    map[string]string // by path under Dir; never a key
	Slots    map[string]*SlotTable
	Leaf     *certs.Leaf
	Roots    *certs.Roots
	Dir      string
	// Generation of the policy: changes at run time, through a map.
	Generation string
	// Verified names the roots that pooled connections were verified by: when one is
	// removed, every server of an HTTP upstream gets a new name, and the old ones go
	// with their pools. "" at the start.
	Verified string
}

// Section is one section of the file. Head does not contain its servers.
type Section struct {
	Comment string
	Head    string // ends in a newline
	Name    string // "backend redis.default.dc1"
	Servers []Server
	// Upstream names the upstream that the section is of; "" for every other section.
	Upstream string
	Passive  *connect.PassiveHealth // of a backend: ejection of endpoints that fail; nil for none
	class    string                 // of the slots its servers use
	text     string                 // as in the file
}

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

// Slot is what a server of an HTTP upstream goes through; zero for tcp.
type Slot struct {
	Class string
	ID    int
}

// Line is the server as in the file.
func (s Server) Line() string {
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

// Text is the whole haproxy.cfg.
func (c *Config) Text() string {
	var b strings.Builder
	_, _ = c.WriteTo(&b) // a Builder never fails
	return b.String()
}

// slotID keeps socket IDs clear of those HAProxy numbers itself.
func slotID(n int) int { return 1000 + n }

// Key is a slot's key in the map of its class.
func (s Slot) Key() string { return fmt.Sprint(slotID(s.ID)) }

// UpstreamAt names the upstream whose section has a line of the file, counted from 1; ""
// if that line is of no upstream.
func (c *Config) UpstreamAt(line int) string {
	at := strings.Count(firstLine, "\n")
	for _, s := range c.Sections {
		if at += strings.Count(s.text, "\n"); line <= at {
			return s.Upstream
		}
	}
	return ""
}

// Find returns a section by name, or nil.
func (c *Config) Find(name string) *Section {
	for _, s := range c.Sections {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// Paths under the run directory.
const (
	MainFile     = "haproxy.cfg"
	SPOEFile     = "spoe.cfg"
	LeafFile     = "tls/leaf.pem"
	LeafList     = "tls/leaf.list"
	RootsFile    = "tls/roots.pem"
	PolicyMap    = "maps/policy.map"
	PolicyKey    = "generation"
	DrainingKey  = "draining" // in PolicyMap while we stop
	StatsSocket  = "sock/stats"
	AdminSocket  = "sock/admin"
	AuthzSocket  = "sock/authz"
	PublicSocket = "sock/public" // of the public frontend, when another one is before it
	MasterSocket = "sock/master" // made by the process, not by the configuration
	slotDir      = "sock/"
)

// Inbound reports whether a session of this frontend and backend is of a caller of the
// mesh: at the public listener, or on its way there through the permissive one.
func Inbound(frontend, backend string) bool {
	return frontend == "public" || frontend == "permissive" && backend == "permissive_tls"
}

// SlotMapFile is the path of a class's map.
func SlotMapFile(class string) string { return "maps/" + class + ".map" }

// SlotSocket is the path of one slot's socket.
func SlotSocket(s Slot) string { return fmt.Sprintf("%s%s/%d", slotDir, s.Class, s.ID) }

// word refuses anything that could end a word or a line of the configuration, or
// mean something to HAProxy's parser: quotes, escapes, variables, comments.
func word(what, s string) (string, error) {
	if s == "" {
		return "", fmt.Errorf("%s is empty", what)
	}
	if len(s) > 4096 {
		return "", fmt.Errorf("%s has %d bytes: at most 4096", what, len(s))
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; c <= ' ' || c > '~' || strings.IndexByte("\"'\\#$%{}()`,", c) >= 0 {
			return "", fmt.Errorf("%s %.80q: character %q cannot be written into a configuration", what, s, c)
		}
	}
	return s, nil
}

// builder collects the lines of one section; the first error stays.
type builder struct {
	kind, name string
	from       string // the defaults that the section inherits
	lines      []string
	err        error
}

// section begins one. A proxy names the defaults that it inherits: HAProxy would take the
// last ones before it.
func section(kind, name string) *builder {
	b := &builder{kind: kind, name: name}
	if kind == "frontend" || kind == "backend" {
		b.from = allDefaults
	}
	return b
}

// http makes a section of HTTP mode.
func (b *builder) http() *builder {
	b.from = httpDefaults
	return b.add("mode http")
}

// add takes a line whose variable parts were checked by the caller.
func (b *builder) add(format string, args ...any) *builder {
	line := format
	if len(args) > 0 {
		line = fmt.Sprintf(format, args...)
	}
	if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }) && b.err == nil {
		b.err = fmt.Errorf("%s %s: control character in line %q", b.kind, b.name, line)
	}
	b.lines = append(b.lines, line)
	return b
}

// word adds "prefix value" after checking the value.
func (b *builder) word(prefix, what, value string) *builder {
	v, err := word(what, value)
	if err != nil && b.err == nil {
		b.err = err
	}
	return b.add("%s %s", prefix, v)
}

// build runs the section through config-parser and insists on getting back the
// lines that went in: a line the parser drops or rewrites would not be what was
// decided here.
func (b *builder) build(comment string) (*Section, error) {
	title := strings.TrimSpace(b.kind + " " + b.name)
	if b.err != nil {
		return nil, fmt.Errorf("%s: %w", title, b.err)
	}
	if strings.ContainsFunc(comment, func(r rune) bool { return r < ' ' || r > '~' }) {
		return nil, fmt.Errorf("%s: the comment is not plain text", title)
	}
	first := title
	if b.from != "" {
		first += " from " + b.from
	}
	raw := first + "\n  " + strings.Join(b.lines, "\n  ") + "\n"
	p, err := parser.New(options.Reader(strings.NewReader(raw)), options.NoNamedDefaultsFrom)
	if err != nil {
		return nil, fmt.Errorf("%s: config-parser: %w", title, err)
	}
	text := strings.TrimLeft(p.String(), "\n")
	got := map[string]int{}
	for line := range strings.Lines(text) {
		got[strings.TrimSpace(line)]++
	}
	for _, line := range b.lines {
		if got[line]--; got[line] < 0 {
			return nil, fmt.Errorf("%s: config-parser changed or dropped the line %q", title, line)
		}
	}
	if n := strings.Count(text, "\n"); n != len(b.lines)+1 {
		return nil, fmt.Errorf("%s: config-parser made %d lines of %d", title, n, len(b.lines)+1)
	}
	sec := &Section{Comment: comment, Head: text, Name: title}
	sec.text = sec.assemble()
	return sec, nil
}

func ms(d time.Duration) string {
	if d <= 0 {
		d = 24 * 24 * time.Hour
	}
	return fmt.Sprintf("%dms", max(d.Milliseconds(), 1))
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
