// Package intentions decides who may call: Policy.Decide answers for one caller,
// from data held in memory.
//
// Invariants: a Policy never changes after NewPolicy; the zero Policy denies
// everybody; a question that cannot be answered is a deny. Decide does no I/O,
// takes no lock and allocates nothing for a connection.
//
// The semantics are Consul's (docs: connect/intentions; source:
// agent/xds/rbac.go): the matching intention of the highest precedence decides
// alone. One that has permissions hides every lower one even when none of its
// permissions matches: then the default policy answers.
//
// It may import certs. intentions/jwt, intentions/spoe, connect, connect/consul,
// connect/connecttest, haproxy/render, haproxy/selftest and cmd use it.
package intentions

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// Wildcard stands for every source.
const Wildcard = "*"

// Intention is one rule about who may call our service, as the match API lists it.
type Intention struct {
	Source      Source
	Allow       bool // when there are no permissions
	Permissions []Permission
	Tokens      []Requirement // one of them must be met, whatever else matches
	Precedence  int
	Unsupported string // why the intention can only deny here; "" if it is supported
}

// Source names callers; Name and Namespace may be Wildcard.
type Source struct {
	Name, Namespace, Partition string
	Peer                       string // "" is our own cluster
}

// String is the source as Consul's UI shows it.
func (s Source) String() string {
	out := s.Name
	if s.Namespace != "" && s.Namespace != "default" {
		out = s.Namespace + "/" + out
	}
	if s.Peer != "" {
		out = "peer " + s.Peer + " " + out
	}
	return out
}

// Permission is one L7 rule: every part that is set must match.
type Permission struct {
	Allow                            bool
	PathExact, PathPrefix, PathRegex string
	Methods                          []string
	Headers                          []HeaderMatch
	Tokens                           []Requirement // one of them must be met, or a match denies
	regex                            *regexp.Regexp
	label                            string
}

// HeaderMatch is one condition on a header, as Consul's IntentionHTTPHeaderPermission.
type HeaderMatch struct {
	Name                                   string
	Present                                bool
	Exact, Prefix, Suffix, Contains, Regex string
	Invert, IgnoreCase                     bool
	label                                  string // "header x-y"
	regex                                  *regexp.Regexp
}

// Config is everything a Policy is made of.
type Config struct {
	Destination  string            // our service's name
	TrustDomain  string            // our own; callers of another one are denied, unless it is a peer's
	ServerName   string            // the SNI that names our service; if "", Accepts accepts every name
	Community    bool              // the agent is Consul's community edition: it has one namespace and one partition
	Peers        map[string]string // peer name -> its trust domain; no two are the same, and none is our own
	Gateway      certs.SPIFFEID    // of our own cluster's mesh gateways, which call in the name of peers' services where HTTP is set; zero: nobody may
	HTTP         bool              // false: an intention with permissions or tokens denies
	Providers    []*Provider       // the jwt-providers that are known
	DefaultAllow bool
	Intentions   []Intention
}

// Policy is the compiled form. The zero value denies everybody.
type Policy struct {
	conf     Config
	valid    bool
	digest   string
	external string            // what names end in by which peers ask
	rules    []rule            // by falling precedence
	exact    map[sourceKey]int // first rule that names the source exactly
	wild     []int             // rules with a wildcard anywhere
	fallback Decision          // the default

	byService, byName map[string]*Policy // of several services; nil: of one

	providers []*Provider // that the rules name
	written   []Intention // the intention of each rule as it was given, for Same
}

type sourceKey struct{ trustDomain, partition, namespace, name string }

type rule struct {
	Intention
	trustDomain string
	decision    Decision // for a connection
	final       Decision // for a request with the tokens that the intention requires, if it has no permissions
}

// Decision is the verdict on a connection or a request, and what decided it.
type Decision struct {
	Allow bool
	// PerRequest means that the answer depends on the request: Allow is false, and Decide must
	// be asked about each request.
	PerRequest bool
	// Rule names what decided, one word for log and metric; for example
	// "web=>api", "*=>api", "default", "identity", "web=>api#2" for a permission.
	Rule string
	// Reason says the same in words.
	Reason string
}

// NewPolicy compiles a Config. An intention with a permission that cannot be compiled
// denies, and its reason says why; the other intentions work as usual.
func NewPolicy(c Config) *Policy {
	p := &Policy{conf: c, valid: true, digest: digest(c), external: ".external." + strings.ToLower(c.TrustDomain), exact: map[sourceKey]int{}}
	verb := "denies"
	if c.DefaultAllow {
		verb = "allows"
	}
	p.fallback = Decision{Allow: c.DefaultAllow, Rule: "default", Reason: "no intention matches and the default policy " + verb}

	list := slices.Clone(c.Intentions)
	slices.SortStableFunc(list, func(a, b Intention) int { return b.Precedence - a.Precedence })
	for _, in := range list {
		r := rule{Intention: in, trustDomain: c.TrustDomain}
		if in.Source.Peer != "" {
			td, ok := c.Peers[in.Source.Peer]
			if !ok {
				continue // nobody can present an identity of a peer we do not know
			}
			r.trustDomain = td
		}
		name := in.Source.String() + "=>" + c.Destination
		switch {
		case in.Unsupported != "":
			r.decision = Decision{Rule: name, Reason: "intention " + name + ": " + in.Unsupported}
		case len(in.Permissions) > 0 && !c.HTTP:
			r.decision = Decision{Rule: name, Reason: "intention " + name + " has L7 permissions, but the service speaks tcp"}
		case len(in.Tokens) > 0 && !c.HTTP:
			r.decision = Decision{Rule: name, Reason: "intention " + name + " requires a JSON Web Token, but the service speaks tcp"}
		case len(in.Permissions) > 0:
			r.decision = Decision{PerRequest: true, Rule: name, Reason: "intention " + name + " decides per request"}
			r.Permissions = slices.Clone(in.Permissions)
			for i := range r.Permissions {
				if err := r.Permissions[i].compile(fmt.Sprintf("%s#%d", name, i+1)); err != nil {
					r.decision = Decision{Rule: name, Reason: "intention " + name + ": " + err.Error()}
					break
				}
				r.Permissions[i].Tokens = p.needs(r.Permissions[i].Tokens)
			}
		case in.Allow:
			r.decision = Decision{Allow: true, Rule: name, Reason: "intention " + name + " allows"}
		default:
			r.decision = Decision{Rule: name, Reason: "intention " + name + " denies"}
		}
		r.Tokens = p.needs(r.Tokens)
		if r.final = r.decision; len(r.Tokens) > 0 && !r.decision.PerRequest && r.decision.Allow {
			r.decision = Decision{PerRequest: true, Rule: name, Reason: "intention " + name + " decides per request"}
		}
		at := len(p.rules)
		p.rules, p.written = append(p.rules, r), append(p.written, in)
		s := in.Source
		if s.Name == Wildcard || s.Namespace == Wildcard {
			p.wild = append(p.wild, at)
			continue
		}
		k := sourceKey{r.trustDomain, orDefault(s.Partition), orDefault(s.Namespace), s.Name}
		if _, taken := p.exact[k]; !taken {
			p.exact[k] = at
		}
	}
	slices.SortFunc(p.providers, func(a, b *Provider) int { return strings.Compare(a.Name, b.Name) })
	return p
}

func orDefault(s string) string {
	if s == "" {
		return "default"
	}
	return s
}

// Config returns what the policy was made of; it must not be changed.
func (p *Policy) Config() Config {
	if p == nil {
		return Config{}
	}
	return p.conf
}

// Digest identifies what the policy says: policies of equal Configs have the same digest.
func (p *Policy) Digest() string {
	if p == nil || !p.valid {
		return "none"
	}
	return p.digest
}

func digest(c Config) string {
	text, err := json.Marshal(c)
	if err != nil { // cannot happen: JSON can express every field
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256(text))
}

// Destination is the service the policy protects.
func (p *Policy) Destination() string { return p.conf.Destination }

var (
	noPolicy  = Decision{Rule: "none", Reason: "no policy is known yet"}
	foreignTD = Decision{Rule: "identity", Reason: "the caller belongs to another trust domain"}
	foreignNS = Decision{Rule: "identity", Reason: "the caller's identity is of a namespace or partition, which the community edition of Consul does not have"}
	gatewayID = Decision{Rule: "identity", Reason: "the caller is a mesh gateway, which no intention can name"}
	peerName  = Decision{Rule: "identity", Reason: "the caller belongs to a peer, but did not ask by the name that is that peer's"}
	behind    = Decision{PerRequest: true, Rule: "gateway", Reason: "the caller is our mesh gateway: who is behind it decides per request"}
	foreignSN = Decision{Rule: ServerNameRule, Reason: "the caller asked by SNI for another service of the mesh"}
)

// match finds the rule for a caller, without looking at a request.
func (p *Policy) match(from certs.SPIFFEID) (int, Decision) {
	if p == nil || !p.valid {
		return -1, noPolicy
	}
	if from.Gateway() {
		if p.conf.HTTP && from == p.conf.Gateway {
			return -1, behind
		}
		return -1, gatewayID
	}
	// The community edition signs identities of other namespaces and partitions for whoever may
	// write the service, but no intention can name them: with such an identity a denied caller
	// would get the default policy.
	if p.conf.Community && from.TrustDomain == p.conf.TrustDomain && (from.Namespace != "default" || from.Partition != "default") {
		return -1, foreignNS
	}
	at := -1
	if i, ok := p.exact[sourceKey{from.TrustDomain, from.Partition, from.Namespace, from.Service}]; ok {
		at = i
	}
	for _, i := range p.wild {
		if at >= 0 && i > at {
			break
		}
		r := &p.rules[i]
		if r.trustDomain == from.TrustDomain && orDefault(r.Source.Partition) == from.Partition &&
			(r.Source.Namespace == Wildcard || orDefault(r.Source.Namespace) == from.Namespace) &&
			(r.Source.Name == Wildcard || r.Source.Name == from.Service) {
			at = i
			break
		}
	}
	if at >= 0 {
		return at, p.rules[at].decision
	}
	if from.TrustDomain != p.conf.TrustDomain && !p.peerDomain(from.TrustDomain) {
		return -1, foreignTD
	}
	return -1, p.fallback
}

// Accepts judges the server name that a caller sent (SNI), "" if none. It refuses the mesh's
// name of another service: a caller that was led to the wrong place must not be served by us.
// It accepts names outside the mesh, which Connect-native applications send. A peer's caller
// must ask by the name that is that peer's: by it HAProxy has chosen the roots that the caller was
// verified by, so that no authority can vouch for another trust domain than its own.
func (p *Policy) Accepts(serverName string, from certs.SPIFFEID) (Decision, bool) {
	if p == nil || !p.valid {
		return noPolicy, false
	}
	name, own := strings.ToLower(strings.TrimSuffix(serverName, ".")), strings.ToLower(p.conf.ServerName)
	if from.TrustDomain != p.conf.TrustDomain {
		if peer := p.peerOf(name); peer == "" || p.conf.Peers[peer] != from.TrustDomain {
			return peerName, false
		}
		return Decision{}, true
	}
	if p.peerOf(name) != "" { // verified by the peer's roots
		return foreignSN, false
	}
	if serverName == "" || p.conf.ServerName == "" {
		return Decision{}, true
	}
	if name == own || strings.HasSuffix(name, "."+own) { // a name that ends in own is a subset of our service
		return Decision{}, true
	}
	rest, ofMesh := strings.CutSuffix(name, "."+strings.ToLower(p.conf.TrustDomain))
	if !ofMesh {
		return Decision{}, true
	}
	for _, kind := range []string{".internal", ".internal-v1", ".external"} {
		if strings.HasSuffix(rest, kind) {
			return foreignSN, false
		}
	}
	return Decision{}, true
}

// peerOf is the peer that asks by a name, <service>.default.default.<peer>.external.<our trust
// domain>; "" if no peer does. The service need not be ours: chains redirect.
func (p *Policy) peerOf(name string) string {
	rest, external := strings.CutSuffix(name, p.external)
	if !external {
		return ""
	}
	part := strings.Split(rest, ".")
	if len(part) != 4 || part[1] != "default" || part[2] != "default" {
		return ""
	}
	return part[3]
}

// Behind returns whose request it is: from's own, or if from is our own mesh gateway that of the
// peer's service which the gateway names in X-Forwarded-Client-Cert. ok is false if the gateway
// names nobody who may be behind it.
func (p *Policy) Behind(from certs.SPIFFEID, req *Request) (id certs.SPIFFEID, ok bool) {
	if p == nil || from != p.conf.Gateway || !from.Gateway() {
		return from, true
	}
	text := ""
	for _, h := range req.Headers {
		if strings.EqualFold(h.Name, "x-forwarded-client-cert") {
			if text != "" {
				return from, false
			}
			text = h.Value
		}
	}
	id, err := certs.ParseID(firstURI(text))
	return id, err == nil && !id.Gateway() && id.TrustDomain != p.conf.TrustDomain && p.peerDomain(id.TrustDomain)
}

// firstURI is the only URI in the first element of X-Forwarded-Client-Cert, "" if there is not one.
func firstURI(header string) (uri string) {
	quoted, from, n := false, 0, 0
	part := func(s string) {
		if key, value, _ := strings.Cut(strings.TrimSpace(s), "="); strings.EqualFold(key, "uri") {
			uri, n = value, n+1
		}
	}
	for i := 0; i <= len(header); i++ {
		switch {
		case i == len(header) || !quoted && header[i] == ',':
			part(header[from:i])
			if n != 1 || quoted {
				return ""
			}
			return uri
		case quoted && header[i] == '\\':
			i++
		case header[i] == '"':
			quoted = !quoted
		case !quoted && header[i] == ';':
			part(header[from:i])
			from = i + 1
		}
	}
	return ""
}

// ServerNameRule is the Rule of the Decision by which Accepts refuses a server name.
const ServerNameRule = "server-name"

// Same reports whether o judges a caller by the same rule as p, so that sessions which p let
// in may go on.
func (p *Policy) Same(o *Policy, from certs.SPIFFEID) bool {
	if p == o {
		return true
	}
	at, d := p.match(from)
	other, od := o.match(from)
	if d != od || (at < 0) != (other < 0) {
		return false
	}
	if at < 0 {
		return true
	}
	// The compiled parts follow from the rest: what was written is compared.
	return p.fallback == o.fallback && reflect.DeepEqual(p.written[at], o.written[other]) && reflect.DeepEqual(p.providers, o.providers)
}

func (p *Policy) peerDomain(td string) bool {
	for _, have := range p.conf.Peers {
		if have == td {
			return true
		}
	}
	return false
}

// Decide answers for a connection (req nil) or for one request of it. When a
// connection's answer depends on the request, PerRequest is set and Allow is not.
func (p *Policy) Decide(from certs.SPIFFEID, req *Request) Decision {
	at, d := p.match(from)
	if !d.PerRequest || req == nil || at < 0 { // of a gateway it is another caller who decides: see Behind
		return d
	}
	r := &p.rules[at]
	if why := unmet(r.Tokens, req); why != "" {
		return Decision{Rule: d.Rule, Reason: "intention " + d.Rule + " requires a token; " + why}
	}
	if len(r.Permissions) == 0 {
		return r.final
	}
	for i := range r.Permissions {
		perm := &r.Permissions[i]
		if perm.mismatch(req) != "" {
			continue
		}
		if why := unmet(perm.Tokens, req); why != "" {
			return Decision{Rule: perm.label, Reason: "the permission requires a token; " + why}
		}
		if perm.Allow {
			return Decision{Allow: true, Rule: perm.label, Reason: "a permission allows"}
		}
		return Decision{Rule: perm.label, Reason: "a permission denies"}
	}
	d = p.fallback
	d.Reason = "no permission of the intention matches; the default policy answers"
	return d
}

// Explain returns the reason for a decision in more detail than Decide, at a higher cost: where
// no permission matched, it names what failed to match in the first few.
func (p *Policy) Explain(from certs.SPIFFEID, req *Request) string {
	at, d := p.match(from)
	if req == nil || !d.PerRequest || at < 0 {
		return d.Reason
	}
	d = p.Decide(from, req)
	r := &p.rules[at]
	if d.Rule != p.fallback.Rule || len(r.Permissions) == 0 {
		return d.Reason
	}
	const most = 5
	var why []string
	for i := range r.Permissions {
		if i == most {
			why = append(why, fmt.Sprintf("%d more", len(r.Permissions)-most))
			break
		}
		why = append(why, fmt.Sprintf("#%d: %s", i+1, r.Permissions[i].mismatch(req)))
	}
	return fmt.Sprintf("no permission of intention %s=>%s matches (%s) and %s", r.Source, p.conf.Destination, strings.Join(why, ", "),
		strings.TrimPrefix(p.fallback.Reason, "no intention matches and "))
}

// Considered lists every intention with the reason why it did or did not decide,
// highest precedence first; the last line is the default policy. For people.
func (p *Policy) Considered(from certs.SPIFFEID) []string {
	at, d := p.match(from)
	var out []string
	for i := range p.rules {
		r := &p.rules[i]
		line := fmt.Sprintf("%d %s=>%s", r.Precedence, r.Source, p.conf.Destination)
		switch {
		case i == at:
			line += ": decides (" + d.Reason + ")"
		case at >= 0 && i > at:
			line += ": hidden by a higher precedence"
		default:
			line += ": another source"
		}
		out = append(out, line)
	}
	if p == nil || !p.valid {
		return []string{noPolicy.Reason}
	}
	line := "default policy " + map[bool]string{true: "allow", false: "deny"}[p.conf.DefaultAllow]
	if at < 0 {
		line += ": decides"
	}
	return append(out, line)
}

func (m *Permission) compile(label string) error {
	m.label = label
	m.Headers = slices.Clone(m.Headers)
	if m.PathRegex != "" {
		re, err := fullMatch(m.PathRegex)
		if err != nil {
			return fmt.Errorf("path regex %q: %w", m.PathRegex, err)
		}
		m.regex = re
	}
	for i := range m.Headers {
		h := &m.Headers[i]
		h.Name = strings.ToLower(h.Name)
		h.label = "header " + h.Name
		if h.IgnoreCase {
			h.Exact, h.Prefix, h.Suffix, h.Contains = strings.ToLower(h.Exact), strings.ToLower(h.Prefix), strings.ToLower(h.Suffix), strings.ToLower(h.Contains)
		}
		if h.Regex != "" {
			re, err := fullMatch(h.Regex)
			if err != nil {
				return fmt.Errorf("regex %q of header %q: %w", h.Regex, h.Name, err)
			}
			h.regex = re
		}
	}
	return nil
}

// fullMatch compiles a regular expression that must match the whole string, as Envoy's
// do. The expression is compiled alone first: otherwise an unbalanced ")" in it would
// end the group and free what follows from the anchors.
func fullMatch(re string) (*regexp.Regexp, error) {
	if _, err := regexp.Compile(re); err != nil {
		return nil, err
	}
	return regexp.Compile(`\A(?:` + re + `)\z`)
}
