package render

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-multierror"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// Renderer keeps the sections of nouns that have not changed since the last call; the
// result is the same as without it.
type Renderer struct {
	opt      Options
	access   connect.AccessLog // of the last snapshot
	snippets map[connect.SnippetName]string
	memory   memory
	ledger   *ledger // of last
	last     *Config // the Config that ledger and memory belong to; nil: they belong to none
}

// New makes a renderer for one run directory.
func New(o Options) (*Renderer, error) {
	if _, err := word("run directory", o.Dir); err != nil {
		return nil, err
	}
	if len(o.Dir) > 64 {
		return nil, fmt.Errorf("run directory %q: at most 64 characters, or the sockets in it would not fit (-run-dir)", o.Dir)
	}
	if o.Threads == 0 {
		o.Threads = 2
	}
	if o.MaxConn == 0 {
		o.MaxConn = 4096
	}
	if o.Originator == "" {
		o.Originator = Lua
	}
	if o.HardStopAfter == 0 {
		o.HardStopAfter = 30 * time.Minute
	}
	if o.AgentTimeout == 0 {
		o.AgentTimeout = time.Second
	}
	return &Renderer{opt: o}, nil
}

// Refused is a listener that cannot be rendered: it is left out, the others stay.
type Refused struct {
	Listener *connect.Listener
	Site     string // of an Edge listener: that alone is left out; "": all of it is
	Err      error
	Stays    bool // what ran in its place still does
}

func (r *Refused) Error() string {
	if r.Site != "" {
		return fmt.Sprintf("host %.80q of listener %.80q is left out: %v", r.Site, r.Listener.Name, r.Err)
	}
	if !r.Listener.Role.Optional() {
		return fmt.Sprintf("a part of the registration is left out: %v", r.Err)
	}
	if r.Stays {
		return fmt.Sprintf("%s %.80q stays as it was: %v", r.what(), r.Listener.Name, r.Err)
	}
	return fmt.Sprintf("%s %.80q is left out: %v", r.what(), r.Listener.Name, r.Err)
}

func (r *Refused) what() string {
	switch r.Listener.Role {
	case connect.Edge:
		return "listener"
	case connect.Exported:
		return "service"
	}
	return "upstream"
}

func (r *Refused) Unwrap() error { return r.Err }

// Render makes the configuration for a snapshot. prev, if any, keeps the slots of
// endpoints that stay. The refusals are upstreams that were left out; err means
// that nothing can be rendered.
func (r *Renderer) Render(s *connect.Snapshot, prev *Config) (*Config, []*Refused, error) {
	if s.Roots() == nil {
		return nil, nil, errors.New("no roots")
	}
	if s.Leaf() == nil && slices.ContainsFunc(s.Listeners, func(l *connect.Listener) bool { return l.Role == connect.Public || l.Role == connect.Local }) {
		return nil, nil, errors.New("no leaf")
	}
	if r.access != s.AccessLog || !maps.Equal(r.snippets, s.Snippets) {
		r.access, r.snippets, r.memory, r.last = s.AccessLog, s.Snippets, memory{}, nil // they are in sections of any noun
	}
	f := r.begin(s, prev)
	f.process()
	open := f.listeners()
	if f.wrong.Len() > 0 {
		return nil, nil, f.wrong
	}
	r.last = nil // ledger and memory belong to no Config until all of this has succeeded
	f.gather(open)
	f.assign()
	f.place(open)
	f.relays()
	if f.wrong.Len() > 0 {
		return nil, nil, f.wrong
	}
	if err := f.connectors(); err != nil {
		return nil, nil, err
	}
	if err := f.limit(); err != nil {
		return nil, nil, err
	}
	r.memory, r.ledger, r.last = f.next, f.ledger, f.Config
	return f.Config, f.refused, nil
}

// file is one configuration on its way.
type file struct {
	*Config
	*Options
	snap      *connect.Snapshot
	prev      *Config
	old, next memory
	ledger    *ledger
	share     int // limit of connections, of which the listeners of callers get a part
	limits    int // index of the section with the limit of connections
	refused   []*Refused
	wrong     *multierror.Error
}

// memory keeps what the last rendering made, by the nouns that it was made of. The zero memory
// is empty.
type memory struct {
	sections   map[string]*Section // by what went into them
	fronts     map[*connect.Listener]*front
	pools      []*pool // of those, each once
	connectors map[connectorKey][]*Section
	relayed    *relayed
	named      *names // made when it is asked for
}

// names finds by name what the last rendering made, for where a noun has changed but a part of
// the result may be the same.
type names struct {
	fronts map[string]*front
	pools  map[string]*pool
}

func (m *memory) byName() *names {
	if m.named == nil {
		m.named = &names{make(map[string]*front, len(m.fronts)), make(map[string]*pool, len(m.pools))}
		for _, one := range m.fronts {
			m.named.fronts[one.listener.Name] = one
		}
		for _, p := range m.pools {
			m.named.pools[p.head.Name] = p
		}
	}
	return m.named
}

type connectorKey struct {
	class string
	size  int
}

// begin starts a configuration with its files.
func (r *Renderer) begin(s *connect.Snapshot, prev *Config) *file {
	c := &Config{Dir: r.opt.Dir, Files: map[string]string{}, Maps: map[string]*LiveMap{}, Slots: map[string]*SlotTable{},
		Leaves: map[string]*certs.Leaf{}, Bundles: map[string]*certs.Roots{}}
	f := &file{Config: c, Options: &r.opt, snap: s, prev: prev, old: r.memory, ledger: r.ledger,
		wrong: &multierror.Error{ErrorFormat: oneLine},
		next:  memory{sections: map[string]*Section{}, fronts: make(map[*connect.Listener]*front, len(r.memory.fronts)), connectors: map[connectorKey][]*Section{}}}
	// What was rendered last is only worth something beside the Config it went into.
	if prev == nil || prev != r.last {
		f.ledger = newLedger(prev)
	}
	if leaf := s.Leaf(); leaf != nil {
		c.Leaves[LeafFile(connect.OwnLeaf)] = leaf // others where they are shown
	}
	c.Bundles[BundleFile(connect.OwnBundle)] = s.Roots() // others are the Go originator's
	c.Files[lua.SpiffeFile] = lua.Spiffe
	if f.LosesAnswers {
		c.Files[lua.DenyFile] = lua.Deny
	}
	f.leafList()
	c.Maps[PolicyMap] = &LiveMap{Entries: []Entry{{PolicyKey, s.Generation(r.opt.Version)}}}
	if prev != nil {
		c.Verified = prev.Verified
		if was := prev.Bundles[BundleFile(connect.OwnBundle)]; was != nil && !s.Roots().Includes(was) {
			c.Verified = s.Roots().Fingerprint
		}
	}
	f.share = f.connections(nil, len(s.Upstreams()))
	return f
}

// add appends a section that every configuration needs.
func (f *file) add(b *builder, comment string) {
	if sec := f.must(b, comment); sec != nil {
		f.Sections = append(f.Sections, sec)
	}
}

// must renders a section without which there is no configuration; it returns nil if that fails,
// and then Render fails.
func (f *file) must(b *builder, comment string) *Section {
	sec, err := f.build(b, comment)
	if err != nil {
		f.wrong = multierror.Append(f.wrong, err) // everything at once, not the first alone
	}
	return sec
}

// build makes a section, or finds the one made of the same lines last time.
func (f *file) build(b *builder, comment string) (*Section, error) {
	key := comment + "\x00" + b.id() + "\x00" + b.text()
	sec := f.old.sections[key]
	if sec == nil || b.err != nil {
		var err error
		if sec, err = b.build(comment); err != nil {
			return nil, err
		}
	}
	f.next.sections[key] = sec
	return sec, nil
}

// front is what a listener became, and the backends that it leads to.
type front struct {
	listener *connect.Listener
	chain    *connect.Chain // of its first branch, without sites that cannot be rendered
	sections []*Section
	pools    []*pool
	live     []liveEntry // of the maps that its routes read
}

// listeners renders every listener and what it leads to. An upstream that cannot be
// rendered must not take the others down.
func (f *file) listeners() (open []*front) {
	open = make([]*front, 0, len(f.snap.Listeners))
	fresh := map[string]*pool{} // of this snapshot, by name
	for _, l := range f.snap.Listeners {
		one := f.old.fronts[l]
		if one == nil || !f.same(one) {
			var err error
			if one, err = f.front(l, fresh); err != nil {
				if !l.Role.Optional() {
					f.wrong = multierror.Append(f.wrong, err)
				} else {
					f.refused = append(f.refused, &Refused{Listener: l, Err: err})
				}
				continue
			}
		}
		if open = append(open, one); l.Role == connect.Local {
			f.next.fronts[l] = one
		}
		for _, e := range one.live {
			f.entry(e)
		}
	}
	for name, m := range f.Maps {
		slices.SortFunc(m.Entries, func(a, b Entry) int { return a.Compare(b) })
		if f.prev != nil && f.prev.Maps[name] != nil && f.prev.Maps[name].same(m) {
			f.Maps[name] = f.prev.Maps[name]
		}
	}
	return open
}

// same reports whether nothing has changed of what a listener leads to.
func (f *file) same(one *front) bool {
	for _, p := range one.pools {
		if !p.follow(f.snap) {
			return false
		}
	}
	return true
}

// front renders one listener and what it leads to.
func (f *file) front(l *connect.Listener, fresh map[string]*pool) (*front, error) {
	made := &front{listener: l}
	if len(l.Branches) > 0 {
		made.chain = &l.Branches[0].Chain
	}
	if l.Role == connect.Edge && l.Protocol().IsHTTP() {
		made.chain = f.sound(l)
	}
	if l.Role == connect.Relay {
		made.sections = f.callers(made, nil)
		return made, nil
	}
	var all [][]way
	for i := range l.Branches {
		chain := &l.Branches[i].Chain
		if i == 0 {
			chain = made.chain
		}
		to, err := ways(f.snap, chain)
		if err != nil {
			return nil, err
		}
		if l.Role == connect.Local {
			err = f.upstream(made, to, f.old.byName().fronts[l.Name])
		}
		if err != nil {
			return nil, err
		}
		all = append(all, to...)
	}
	switch l.Role {
	case connect.Local:
	case connect.Edge, connect.Exported:
		if err := f.optional(made, all); err != nil {
			return nil, err
		}
	default:
		made.sections = f.callers(made, all)
	}
	return made, f.lead(made, all, fresh)
}

// gather lists the backends, each once, and with the last listener that leads there.
func (f *file) gather(open []*front) {
	f.next.pools = make([]*pool, 0, len(f.old.pools))
	for _, p := range f.old.pools {
		p.last = nil
	}
	for _, one := range open {
		for _, p := range one.pools {
			if p.last == nil {
				f.next.pools = append(f.next.pools, p)
				f.read(p)
			}
			p.last = one
		}
	}
}

// place writes the sections: a backend follows the last listener that leads to it.
func (f *file) place(open []*front) {
	for _, one := range open {
		f.Sections = append(f.Sections, one.sections...)
		for _, p := range one.pools {
			if p.last == one {
				f.Sections = append(f.Sections, p.full)
			}
		}
	}
}

// connectors adds the map of each class of slots, and the connectors that HAProxy has for it.
func (f *file) connectors() error {
	for _, name := range slices.Sorted(maps.Keys(f.Slots)) {
		t := f.Slots[name]
		path := SlotMapFile(name)
		if f.prev != nil && f.prev.Slots[name] == t && f.prev.Maps[path] != nil {
			f.Maps[path] = f.prev.Maps[path]
		} else {
			f.Maps[path] = t.live()
		}
		if t.Class.Go { // the Go originator listens; the map is for a successor of ours
			continue
		}
		key := connectorKey{name, t.Size}
		made := f.old.connectors[key]
		if made == nil {
			var err error
			if made, err = f.connector(t); err != nil {
				return err
			}
		}
		f.next.connectors[key] = made
		f.Sections = append(f.Sections, made...)
	}
	return nil
}

// limit writes maxconn: what the limit of open files leaves beside the sockets, whose number is
// known only now.
func (f *file) limit() (err error) {
	b := global("connections").add("maxconn %d", f.connections(f.Slots, len(f.snap.Upstreams())))
	f.Sections[f.limits], err = f.build(b, "what the limit of open files leaves beside the sockets")
	return err
}

// oneLine keeps a list of errors on one line of the log.
func oneLine(errs []error) string {
	text := make([]string, len(errs))
	for i, e := range errs {
		text[i] = e.Error()
	}
	return strings.Join(text, "; ")
}
