package render

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-multierror"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// Renderer keeps the sections of upstreams that have not changed since the last
// call; the result is the same as without it.
type Renderer struct {
	opt        Options
	cache      map[*connect.Upstream]*cached
	made       map[string]*Section // sections by what went into them
	connectors map[connectorKey][]*Section
	book       *ledger // of last
	last       *Config // nil: none that the book and the cache go with
}

type connectorKey struct {
	class string
	size  int
}

// cached is what one upstream became.
type cached struct {
	front, back *Section // back without its servers
	what, lines string   // what these were made of
	values      []string // of its endpoints' slots
	slots       []int    // as assigned when full was made
	full        *Section // back with its servers
	verified    string   // Config.Verified when full was made
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
	return &Renderer{opt: o, cache: map[*connect.Upstream]*cached{}, connectors: map[connectorKey][]*Section{}}, nil
}

// Refused is an upstream that cannot be rendered: it is left out, the others stay.
type Refused struct {
	Upstream string // "" when it is the service's own side
	Err      error
}

func (r *Refused) Error() string {
	if r.Upstream == "" {
		return fmt.Sprintf("a part of the registration is left out: %v", r.Err)
	}
	return fmt.Sprintf("upstream %.80q is left out: %v", r.Upstream, r.Err)
}
func (r *Refused) Unwrap() error { return r.Err }

// Render makes the configuration for a snapshot. prev, if any, keeps the slots of
// endpoints that stay. The refusals are upstreams that were left out; err means
// that nothing can be rendered.
func (r *Renderer) Render(s *connect.Snapshot, generation string, prev *Config) (c *Config, refused []*Refused, err error) {
	if s.Leaf == nil || s.Roots == nil {
		return nil, nil, errors.New("no leaf or no roots")
	}
	o := &r.opt
	if o.access != s.Inbound.AccessLog {
		o.access, r.cache, r.last = s.Inbound.AccessLog, nil, nil // every listener is another
	}
	c = &Config{Leaf: s.Leaf, Roots: s.Roots, Dir: o.Dir, Generation: generation, Files: map[string]string{}, Slots: map[string]*SlotTable{}}
	c.Files[lua.SpiffeFile] = lua.Spiffe
	if o.LosesAnswers {
		c.Files[lua.DenyFile] = lua.Deny
	}
	c.Files[LeafList] = o.path(LeafFile) + " dummy.invalid\n" // haproxy.md, fact 3: a name filter, or 2.6 forgets client verification
	c.Files[PolicyMap] = PolicyKey + " " + generation + "\n"

	keep := map[string]*Section{}
	wrong := &multierror.Error{ErrorFormat: oneLine} // everything at once, not the first alone
	add := func(b *builder, comment string, e error) {
		if e == nil {
			var sec *Section
			if sec, e = r.build(b, comment, keep); e == nil {
				c.Sections = append(c.Sections, sec)
				return
			}
		}
		wrong = multierror.Append(wrong, e)
	}
	for _, g := range o.global(&s.Inbound) {
		add(g.builder, g.what, nil)
	}
	connections := len(c.Sections) // known when the sockets are
	c.Sections = append(c.Sections, nil)
	add(o.defaults(), "defaults of every proxy below", nil)
	add(section("defaults", httpDefaults+" from "+allDefaults).add("option abortonclose"), "what is asked of an application ends with who asked", nil)
	add(o.admin(), "statistics and metrics, for haproxy-connect alone", nil)
	if s.Inbound.Port != 0 {
		c.Files[SPOEFile] = o.spoe(&s.Inbound)
		add(o.authz(), "the agent that knows the intentions", nil)
		limits := o.share(len(s.Upstreams))
		ours := ourHeaders(&s.Inbound, s.Policy)
		b, e := o.public(s, limits)
		add(b, "callers: mutual TLS, judged per connection and policy, per request where an intention has permissions", e)
		for _, b := range o.permissive(&s.Inbound, limits) {
			add(b, "WARNING: permissive mutual TLS, plain connections are let in without intentions", nil)
		}
		if s.Inbound.UnsecuredPort != 0 {
			add(o.unsecured(&s.Inbound, ours, limits), "WARNING: unsecured_bind_port, no TLS and no intentions", nil)
		}
		b, e = o.local(&s.Inbound)
		add(b, "the application", e)
		for _, group := range exposeGroups(s.Inbound.Expose) {
			list, e := o.expose(&s.Inbound, group, ours, limits)
			if e != nil {
				wrong = multierror.Append(wrong, e)
			}
			for _, b := range list {
				add(b, "WARNING: exposed paths, no TLS and no intentions", nil)
			}
		}
	}
	if wrong.Len() > 0 {
		return nil, nil, wrong
	}

	if prev != nil {
		c.Verified = prev.Verified
		if prev.Roots != nil && !s.Roots.Includes(prev.Roots) {
			c.Verified = s.Roots.Fingerprint
		}
	}
	// Upstreams: one that cannot be rendered must not take the others down. What was
	// rendered last is only worth something beside the Config it went into.
	book, known := r.book, r.cache
	if prev == nil || prev != r.last {
		book, known = newLedger(prev), nil
	}
	r.last = nil // until all of this is through
	var byName map[string]*cached
	before := func(name string) *cached {
		if byName == nil {
			byName = make(map[string]*cached, len(r.cache))
			for u, c := range r.cache {
				byName[u.Name] = c
			}
		}
		return byName[name]
	}
	next := make(map[*connect.Upstream]*cached, len(s.Upstreams))
	for _, u := range s.Upstreams {
		hit := r.cache[u]
		if hit == nil {
			var e error
			if hit, e = o.upstream(u, before(u.Name)); e != nil {
				refused = append(refused, &Refused{Upstream: u.Name, Err: e})
				continue
			}
			if hit.back.class != "" {
				for i := range u.Target.Endpoints {
					hit.values = append(hit.values, slotValue(&u.Target, &u.Target.Endpoints[i]))
				}
			}
		}
		if class := hit.back.class; class != "" && known[u] == nil {
			book.want(class, hit.values)
		}
		next[u] = hit
	}
	for u, old := range known {
		if next[u] == nil && old.back.class != "" {
			book.drop(old.back.class, old.values)
		}
	}
	book.assign(o.Files / 2)
	whole := true
	for _, u := range s.Upstreams {
		hit := next[u]
		if hit == nil {
			continue
		}
		if hit.full == nil || known[u] == nil || hit.verified != c.Verified {
			ids := book.of(hit.back.class, hit.values)
			if hit.full == nil || hit.verified != c.Verified || !slices.Equal(ids, hit.slots) {
				full, e := o.servers(u, hit.back, ids, c.Verified)
				if e != nil {
					refused = append(refused, &Refused{Upstream: u.Name, Err: e})
					delete(next, u)
					whole = false // the book counts it, the cache does not
					continue
				}
				hit.full, hit.slots, hit.verified = full, ids, c.Verified
			}
		}
		c.Sections = append(c.Sections, hit.front, hit.full)
	}
	c.Slots = book.published()
	if c.Sections[connections], err = r.build(section("global", "").add("maxconn %d", o.connections(c.Slots, len(s.Upstreams))), "what the limit of open files leaves beside the sockets", keep); err != nil {
		return nil, nil, err
	}
	connectors := map[connectorKey][]*Section{}
	for _, class := range slices.Sorted(maps.Keys(c.Slots)) {
		t := c.Slots[class]
		if o.Originator == Go {
			continue // the dialer listens on the slots
		}
		if file := SlotMapFile(class); prev != nil && prev.Slots[class] == t && prev.Files[file] != "" {
			c.Files[file] = prev.Files[file]
		} else {
			c.Files[file] = t.SlotMap()
		}
		k := connectorKey{class, t.Size}
		if connectors[k] = r.connectors[k]; connectors[k] == nil {
			if connectors[k], err = o.connector(t); err != nil {
				return nil, nil, err
			}
		}
		c.Sections = append(c.Sections, connectors[k]...)
	}
	r.cache, r.made, r.connectors, r.book = next, keep, connectors, book
	if whole {
		r.last = c
	}
	return c, refused, nil
}

// oneLine keeps a list of errors on one line of the log.
func oneLine(errs []error) string {
	text := make([]string, len(errs))
	for i, e := range errs {
		text[i] = e.Error()
	}
	return strings.Join(text, "; ")
}

// build makes a section, or finds the one made of the same lines last time.
func (r *Renderer) build(b *builder, comment string, keep map[string]*Section) (*Section, error) {
	key := comment + "\x00" + b.kind + "\x00" + b.name + "\x00" + strings.Join(b.lines, "\x00")
	if sec := r.made[key]; sec != nil && b.err == nil {
		keep[key] = sec
		return sec, nil
	}
	sec, err := b.build(comment)
	if err == nil {
		keep[key] = sec
	}
	return sec, err
}

func (o *Options) path(p string) string { return o.Dir + "/" + p }
