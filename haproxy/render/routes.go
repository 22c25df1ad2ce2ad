package render

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/lua"
)

// variant is what routes may ask for and HAProxy has only once per backend: each variant is a
// backend of its own. The zero variant belongs to routes that ask for nothing.
type variant struct {
	retry *connect.Retry
	total bool // the whole answer has a time limit
	timed bool // some route sets how long the server may be silent
	limit bool // the backend itself enforces the group's limits
}

// key tells variants apart.
func (v *variant) key() string { return fmt.Sprint(v.suffix(), v.timed, v.limit) }

// suffix tells the backends of the variants of a group apart.
func (v *variant) suffix() string {
	out := ""
	if v.retry != nil {
		out += ":r" + digest(fmt.Sprint(*v.retry))[:8]
	}
	if v.total {
		out += ":total"
	}
	return out
}

// way is where one split of a route leads.
type way struct {
	group *connect.Group
	variant
}

// plain reports whether a chain leads everything to one group and changes nothing.
func plain(c *connect.Chain) bool {
	if len(c.Routes) != 1 || len(c.Routes[0].Splits) != 1 {
		return false
	}
	r := &c.Routes[0]
	s := &r.Splits[0]
	return r.Site == "" && r.Match.Everything() && r.Rewrite == "" && r.Timeout == 0 && r.Idle == 0 && !r.Retry.Any() &&
		r.Request.Empty() && r.Answer.Empty() && s.Request.Empty() && s.Answer.Empty()
}

// routed reports whether a listener needs what Lua does for routes.
func routed(l *connect.Listener) bool {
	return (l.Role == connect.Local || l.Role == connect.Exported) && l.Protocol().IsHTTP() && !plain(&l.Branches[0].Chain) || l.Role == connect.Edge && l.Protocol().IsHTTP()
}

// ways are where a chain leads: for each route, for each split.
func ways(s *connect.Snapshot, c *connect.Chain) (out [][]way, err error) {
	simple := plain(c)
	timed := slices.ContainsFunc(c.Routes, func(r connect.Route) bool { return r.Timeout != 0 || r.Idle != 0 })
	for i := range c.Routes {
		r := &c.Routes[i]
		if len(r.Splits) == 0 {
			return nil, fmt.Errorf("route %d leads nowhere", i+1)
		}
		v := variant{total: r.Timeout > 0, timed: timed, limit: !simple}
		if r.Retry.Any() {
			v.retry = &r.Retry
		}
		var legs []way
		for j := range r.Splits {
			g := s.Group(r.Splits[j].Group)
			if g == nil {
				return nil, fmt.Errorf("there is no group %.80q", r.Splits[j].Group)
			}
			one := way{g, v}
			one.limit = one.limit || len(g.Targets) > 1
			legs = append(legs, one)
		}
		out = append(out, legs)
	}
	return out, nil
}

// direct leads everything to the targets of a group in their order.
func direct(b *builder, w *way) {
	for i := range w.group.Targets {
		if len(w.group.Targets) > 1 {
			name := b.check("target", w.backend(i))
			b.add("use_backend %s if { nbsrv(%s) gt 0 }", name, name)
		}
	}
	b.add("default_backend %s", b.check("group", w.backend(0)))
}

// lead adds the backends of ways, each once.
func (f *file) lead(made *front, to [][]way, fresh map[string]*pool) error {
	seen := map[string]bool{}
	for i := range to {
		for j := range to[i] {
			w := &to[i][j]
			for place := range w.group.Targets {
				if seen[w.backend(place)] {
					continue
				}
				seen[w.backend(place)] = true
				p, err := f.pool(w, place, fresh)
				if err != nil {
					return err
				}
				made.pools = append(made.pools, p)
			}
		}
	}
	return nil
}

// backend is the name of the backend for the target at a place of the group.
func (w *way) backend(place int) string { return backendName(w.group, place) + w.suffix() }

// chain leads the requests of an upstream. The first route that matches is remembered by its
// number, the split by its own, and two maps, which change while HAProxy runs, say where
// that leads: legs.map has the cuts between the splits of a route, and ways.map the backends
// of each, in failover order.
func (f *file) chain(b *builder, made *front, to [][]way) {
	c := made.chain
	n := newNaming(b)
	if made.listener.Role == connect.Edge {
		f.site(n, c)
	}
	n.headers(c)
	names := routeKeys(c)
	for i := range c.Routes {
		b.because(c.Routes[i].Origin)
		n.route(&c.Routes[i], i, names[i])
	}
	b.because("")
	most, depth := 1, 1
	for i := range to {
		most = max(most, len(to[i]))
		for j := range to[i] {
			depth = max(depth, len(to[i][j].group.Targets))
		}
	}
	// The key has a digest of these rules: what runs must not take entries of other rules for
	// its own.
	key := fmt.Sprintf("%s@%s/", b.name, digest(fmt.Sprint(b.lines, most, depth))[:8])
	b.add("http-request set-var(txn.way) str(%s),concat(,txn.route)", b.check("upstream name", key))
	f.draw(b, most)
	b.add("http-request set-var(txn.way) var(txn.way),concat(/,txn.leg)")
	b.add("http-request set-var(txn.list) var(txn.way),map_str(%s)", f.path(WaysMap))
	if made.listener.Role == connect.Edge {
		b.add("http-request return status 404 unless { var(txn.list) -m found }")
	}
	b.add("http-request set-var(txn.be) var(txn.list),word(1,|)")
	for i := 2; i <= depth; i++ {
		b.add("http-request set-var(txn.be) var(txn.list),word(%d,|) if !{ var(txn.be),nbsrv -m int gt 0 } { var(txn.list),word(%d,|),nbsrv -m int gt 0 }", i, i)
	}
	for i := range c.Routes {
		n.changes(&c.Routes[i], i, names[i])
	}
	b.because("")
	b.add("%s", "use_backend %[var(txn.be)]")
	made.live = live(key, names, c, to)
	if made.listener.Role == connect.Edge {
		made.live = append(made.live, f.hosts(b, c)...)
	}
}

// draw takes one of the splits of a route, by chance. The last split is taken when txn.leg is
// not set.
func (f *file) draw(b *builder, most int) {
	if most < 2 {
		return
	}
	b.add("http-request set-var(txn.cuts) var(txn.way),map_str(%s)", f.path(LegsMap))
	b.add("http-request set-var(txn.draw) rand if { var(txn.cuts) -m found }")
	for i := 1; i < most; i++ {
		b.add("http-request set-var(txn.cut) var(txn.cuts),word(%d,|) if { var(txn.cuts) -m found } !{ var(txn.leg) -m found }", i)
		b.add("http-request set-var(txn.leg) int(%d) if { var(txn.cut) -m found } !{ var(txn.leg) -m found } { var(txn.draw),sub(txn.cut) -m int lt 0 }", i)
	}
}

// liveEntry is an entry of one of the maps of routes.
type liveEntry struct {
	file string
	Entry
}

// live is the entries of a chain.
func live(key string, names []string, c *connect.Chain, to [][]way) (out []liveEntry) {
	for i := range c.Routes {
		route := key + names[i]
		if cuts := cuts(c.Routes[i].Splits); cuts != "" {
			out = append(out, liveEntry{LegsMap, Entry{route, cuts}})
		}
		for j := range to[i] {
			leg := ""
			if j+1 < len(to[i]) {
				leg = strconv.Itoa(j + 1)
			}
			var list []string
			for place := range to[i][j].group.Targets {
				list = append(list, to[i][j].backend(place))
			}
			out = append(out, liveEntry{WaysMap, Entry{route + "/" + leg, strings.Join(list, "|")}})
		}
	}
	return out
}

// need makes a map of routes, which a section reads even if it has no entry.
func (f *file) need(file string) *LiveMap {
	m := f.Maps[file]
	if m == nil {
		m = &LiveMap{Read: true, Routes: true, Backends: file == WaysMap}
		f.Maps[file] = m
	}
	return m
}

func (f *file) entry(e liveEntry) {
	m := f.need(e.file)
	m.Entries = append(m.Entries, e.Entry)
}

// cuts are the points between 0 and 2^32 at which one split of a route ends and the next
// begins. A single split has none: "".
func cuts(splits []connect.Split) string {
	sum, till := 0, 0
	for i := range splits {
		sum += splits[i].Weight
	}
	var out []string
	for i := 0; i+1 < len(splits) && sum > 0; i++ {
		till += splits[i].Weight
		out = append(out, strconv.FormatInt(int64(till)<<32/int64(sum), 10))
	}
	return strings.Join(out, "|")
}

// naming renders the conditions and changes of routes into a frontend.
type naming struct {
	b    *builder
	vars map[string]string // of header values, by header
}

func newNaming(b *builder) *naming { return &naming{b: b, vars: map[string]string{}} }

// pseudo has HAProxy's samples for what Envoy treats as headers but are none.
var pseudo = map[string]string{":path": "pathq", ":method": "method", ":authority": "req.fhdr(host)"}

// headers keeps the values of the headers that conditions look at in variables, the lines of
// one header joined.
func (n *naming) headers(c *connect.Chain) {
	for i := range c.Routes {
		for _, h := range c.Routes[i].Match.Headers {
			if h.Present || n.vars[h.Name] != "" || pseudo[h.Name] != "" {
				continue
			}
			name := n.header(h.Name)
			v := fmt.Sprintf("txn.h%d", len(n.vars))
			n.vars[h.Name] = v
			n.b.add("http-request set-var(%s) req.fhdr(%s)", v, name)
			n.b.add("http-request set-var(%s) lua.%s(%s) if { req.fhdr_cnt(%s) gt 1 }", v, lua.Joined, name, name)
		}
	}
}

var headerNames = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$`)

// header is a name that may stand in a rule.
func (n *naming) header(name string) string {
	if !headerNames.MatchString(name) {
		n.b.fail(fmt.Errorf("%.80q is not the name of a header", name))
	}
	return name
}

// quoted is a text within single quotes, where nothing but their end means anything.
func (n *naming) quoted(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		n.b.fail(fmt.Errorf("%.80q has a control character", s))
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// braces is a pattern "}" as a regular expression: HAProxy would take it for the end of the
// condition.
var braces = map[string]string{"str": `^\x7d$`, "beg": `^\x7d`, "end": `\x7d$`, "sub": `\x7d`}

// is is a condition on a text.
func (n *naming) is(sample, how, text string, fold bool) string {
	if text == "}" {
		how, text = "reg", braces[how]
	}
	i := ""
	if fold {
		i = "-i "
	}
	return fmt.Sprintf("{ %s %s-m %s -- %s }", sample, i, how, n.quoted(text))
}

func (n *naming) like(sample, re string) string {
	p, err := pattern(re)
	if err != nil {
		n.b.fail(err)
	}
	return fmt.Sprintf("{ %s -m reg -- %s }", sample, n.quoted(p))
}

// route writes the rule that sets txn.route to the name of the first route that matches: its number, at an
// edge a text.
func (n *naming) route(r *connect.Route, i int, name string) {
	set := fmt.Sprintf("http-request set-var(txn.route) int(%d)", i+1)
	var when []string
	switch {
	case r.Site != "":
		if name == r.Site {
			return // the site itself is its route
		}
		// Until a route is found txn.route is the site.
		set = fmt.Sprintf("http-request set-var(txn.route) str(%s)", name)
		when = append(when, fmt.Sprintf("{ var(txn.route) -m str %s }", r.Site))
	case i > 0:
		when = append(when, "!{ var(txn.route) -m found }")
	}
	if when = append(when, n.conditions(&r.Match)...); len(when) > 0 {
		set += " if " + n.all(when)
	}
	n.b.add("%s", set)
}

// mostWords is how many words of conditions a line may have: HAProxy takes 64 in all.
const mostWords = 48

// all joins conditions that must hold at once. What would be too long for one line goes into
// variables first.
func (n *naming) all(when []string) string {
	var line []string
	words, parts := 0, 0
	for _, c := range when {
		if more := len(strings.Fields(c)); words+more > mostWords && len(line) > 0 {
			v := fmt.Sprintf("txn.m%d", parts)
			n.b.add("http-request unset-var(%s)", v)
			n.b.add("%s", fmt.Sprintf("http-request set-var(%s) bool(true) if %s", v, strings.Join(line, " ")))
			line, words, parts = []string{"{ var(" + v + ") -m bool }"}, 6, parts+1
		}
		line, words = append(line, c), words+len(strings.Fields(c))
	}
	return strings.Join(line, " ")
}

// conditions are all that must hold.
func (n *naming) conditions(m *connect.HTTPMatch) (out []string) {
	switch {
	case m.PathExact != "":
		out = append(out, n.is("path", "str", m.PathExact, m.IgnoreCase))
	case m.PathRegex != "":
		out = append(out, n.like("path", m.PathRegex))
	case m.PathPrefix != "" && m.PathPrefix != "/":
		out = append(out, n.is("path", "beg", m.PathPrefix, m.IgnoreCase))
	}
	if len(m.Methods) > 0 {
		for _, one := range m.Methods {
			n.b.check("method", one)
		}
		out = append(out, "{ method "+strings.Join(m.Methods, " ")+" }")
	}
	for i := range m.Headers {
		out = append(out, n.onHeader(&m.Headers[i])...)
	}
	for i := range m.Query {
		out = append(out, n.onQuery(&m.Query[i]))
	}
	return out
}

func (n *naming) onHeader(h *connect.HeaderMatch) (out []string) {
	not := ""
	if h.Invert {
		not = "!"
	}
	sample := pseudo[h.Name]
	if h.Present {
		if sample != "" {
			return []string{not + "{ always_true }"}
		}
		return []string{fmt.Sprintf("%s{ req.fhdr_cnt(%s) gt 0 }", not, n.header(h.Name))}
	}
	if sample == "" {
		sample = "var(" + n.vars[h.Name] + ")"
	}
	if h.Invert && pseudo[h.Name] == "" {
		out = append(out, "{ "+sample+" -m found }") // a missing header meets no condition, inverted or not
	}
	switch {
	case h.Regex != "":
		return append(out, not+n.like(sample, h.Regex))
	case h.Prefix != "":
		return append(out, not+n.is(sample, "beg", h.Prefix, false))
	case h.Suffix != "":
		return append(out, not+n.is(sample, "end", h.Suffix, false))
	case h.Contains != "":
		return append(out, not+n.is(sample, "sub", h.Contains, false))
	}
	return append(out, not+n.is(sample, "str", h.Exact, false))
}

// onQuery is a condition on the first query parameter of a name, as the query has it, not
// decoded.
func (n *naming) onQuery(q *connect.QueryMatch) string {
	name := escaped(q.Name)
	if q.Present {
		return "{ query -m reg -- " + n.quoted(`(?:^|&)`+name+`(?:[=&]|$)`) + " }"
	}
	value, empty := escaped(q.Exact), ""
	if q.Regex != "" {
		var err error
		if value, err = expression(q.Regex, "&"); err != nil {
			n.b.fail(err)
		}
		if whole, err := regexp.Compile(`\A(?:` + q.Regex + `)\z`); err == nil && whole.MatchString("") {
			empty = `|(?=(?:&|$))` // the name alone has an empty value
		}
	}
	return "{ query -m reg -- " + n.quoted(matchLimit+`^(?:(?!`+name+`(?:[=&]|$))[^&]*&)*`+name+`(?:=(?:`+value+`)`+empty+`)(?:&|$)`) + " }"
}

// escaped is a text as a pattern.
func escaped(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, `\x%02x`, s[i])
	}
	return b.String()
}

// changes writes what a route does to its requests and to their answers: first the header edits
// of the split, then those of the route, and last the path, as header values may name the
// original one.
func (n *naming) changes(r *connect.Route, i int, name string) {
	when := fmt.Sprintf("{ var(txn.route) -m int %d }", i+1)
	if r.Site != "" {
		when = fmt.Sprintf("{ var(txn.route) -m str %s }", name)
	}
	for i := range r.Splits {
		leg := "!{ var(txn.leg) -m found }"
		if i+1 < len(r.Splits) {
			leg = fmt.Sprintf("{ var(txn.leg) -m int %d }", i+1)
		}
		n.b.because(r.Splits[i].Origin)
		n.edit("http-request", &r.Splits[i].Request, when+" "+leg)
		n.edit("http-response", &r.Splits[i].Answer, when+" "+leg)
	}
	n.b.because(r.Origin)
	n.edit("http-request", &r.Request, when)
	n.edit("http-response", &r.Answer, when)
	n.edit("http-request", &r.SiteRequest, when)
	n.edit("http-response", &r.SiteAnswer, when)
	if silence := silenceOf(r); silence > 0 {
		n.b.add("http-request set-var(txn.silence) int(%d) if %s", max(silence.Milliseconds(), 1), when)
	}
	if r.Timeout > 0 { // a WebSocket has no end that could be waited for
		n.b.add("http-request set-var(txn.total) int(%d) if %s !{ req.fhdr_cnt(upgrade) gt 0 }", max(r.Timeout.Milliseconds(), 1), when)
	}
	if r.Idle > 0 {
		n.b.add("http-request set-var(txn.idle) int(%d) if %s", max(r.Idle.Milliseconds(), 1), when)
	}
	n.rewrite(r, when)
}

// longIdle is how long a stream may be silent where a route sets its timeout but not its idle
// timeout, as with Envoy.
const longIdle = 5 * time.Minute

// silenceOf is how long a server may be silent on a route; 0: as long as its backend says.
func silenceOf(r *connect.Route) time.Duration {
	idle := r.Idle
	if idle == 0 {
		idle = longIdle
	}
	switch {
	case r.Timeout > 0:
		return min(r.Timeout, idle)
	case r.Timeout < 0:
		return idle
	}
	return r.Idle
}

// rewrite replaces what the match names, a prefix of the path or the whole path. The query
// stays.
func (n *naming) rewrite(r *connect.Route, when string) {
	if r.Rewrite == "" || r.Match.PathRegex != "" {
		return
	}
	if strings.ContainsFunc(r.Rewrite, func(c rune) bool { return c <= ' ' || c >= 0x7f }) || r.Rewrite[0] != '/' {
		n.b.fail(fmt.Errorf("prefix_rewrite %.80q: want a path of plain characters from / on", r.Rewrite))
		return
	}
	to := strings.ReplaceAll(r.Rewrite, "%", "%%")
	if r.Match.PathExact == "" {
		to += fmt.Sprintf("%%[path,bytes(%d)]", max(len(r.Match.PathPrefix), 1))
	}
	n.b.add("%s", "http-request set-path "+n.quoted(to)+" if "+when)
}

// edit renders header rules in Envoy's order.
func (n *naming) edit(rule string, e *connect.HeaderEdits, when string) {
	for _, name := range e.Remove {
		n.b.add("%s del-header %s if %s", rule, n.header(name), when)
	}
	for _, h := range e.Add {
		n.b.add("%s", fmt.Sprintf("%s add-header %s %s if %s", rule, n.header(h.Name), n.value(&h, rule), when))
	}
	for _, h := range e.Set {
		n.b.add("%s", fmt.Sprintf("%s set-header %s %s if %s", rule, n.header(h.Name), n.value(&h, rule), when))
	}
}

// variables are the variables of Envoy's format that HAProxy knows, in requests and in answers.
var variables = map[string]string{
	"DOWNSTREAM_REMOTE_ADDRESS": "%[src]:%[src_port]", "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": "%[src]",
	"DOWNSTREAM_DIRECT_REMOTE_ADDRESS": "%[src]:%[src_port]", "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT": "%[src]",
	"DOWNSTREAM_LOCAL_ADDRESS": "%[dst]:%[dst_port]", "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": "%[dst]", "DOWNSTREAM_LOCAL_PORT": "%[dst_port]",
	"PROTOCOL": "%HV", "START_TIME": "%[date,utime(%Y-%m-%dT%H:%M:%SZ)]", "HOSTNAME": "%H",
}

var envoyVariable = regexp.MustCompile(`%%|%([A-Z_]+)(?:\(([^)%]*)\))?(?::\d+)?%`)

// value is what a header is set to: Envoy's format in HAProxy's words.
func (n *naming) value(h *connect.Header, rule string) string {
	var out strings.Builder
	at := 0
	plain := func(s string) {
		if strings.Contains(s, "%") {
			n.b.fail(fmt.Errorf("header %s: %.80q has a single %%; a literal one is written %%%%", h.Name, h.Value))
		}
		out.WriteString(s)
	}
	for _, m := range envoyVariable.FindAllStringSubmatchIndex(h.Value, -1) {
		plain(h.Value[at:m[0]])
		at = m[1]
		if m[2] < 0 {
			out.WriteString("%%")
			continue
		}
		name, arg := h.Value[m[2]:m[3]], ""
		if m[4] >= 0 {
			arg = h.Value[m[4]:m[5]]
		}
		out.WriteString(n.variable(name, arg, rule))
	}
	plain(h.Value[at:])
	return n.quoted(out.String())
}

func (n *naming) variable(name, arg, rule string) string {
	if v := variables[name]; v != "" && arg == "" {
		return v
	}
	switch {
	case name == "RESPONSE_CODE" && rule == "http-response":
		return "%[status]"
	case name == "REQ" && rule == "http-request":
		first, _, _ := strings.Cut(arg, "?")
		if sample := pseudo[strings.ToLower(first)]; sample != "" {
			return "%[" + sample + "]"
		}
		return "%[req.fhdr(" + n.header(first) + ")]"
	}
	n.b.fail(fmt.Errorf("%%%s%% in a header's value: HAProxy has no such variable here", name))
	return ""
}
