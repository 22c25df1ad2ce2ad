package connect

import (
	"strings"
	"time"
)

// Chain says which request, or which connection, goes where. The first route that matches
// is taken; a request that no route matches is answered 404. tcp has one route, which matches
// everything.
type Chain struct{ Routes []Route }

// Direct is the chain that leads everything to one group.
func Direct(g GroupName) Chain {
	return Chain{Routes: []Route{{Splits: []Split{{Weight: Whole, Group: g}}}}}
}

// Whole is the weight of a split that has everything.
const Whole = 10000

// Route is what becomes of the requests that match.
type Route struct {
	Match   HTTPMatch
	Rewrite string // replaces the path, or the prefix of it, that Match names; "": nothing is replaced
	// Timeout limits the whole answer, from the end of the request. 0: only silence ends an answer
	// (Idle, or the group's). < 0: no limit, but a silence of Idle, or of 5 minutes, ends an answer.
	Timeout time.Duration
	Idle    time.Duration // silence of the server that ends a request; 0: the group's, or 5 minutes where Timeout is set
	Retry   Retry
	Request HeaderEdits // after those of the split that is taken
	Answer  HeaderEdits
	Splits  []Split // at least one
	Origin  string  // what in Consul says so, in words
	// Of an Edge listener: routes of one site follow each other, and only requests for its hosts
	// look at them. The edits come after those of the route.
	Site                    string // fit for a name; "" of any other listener
	Hosts                   []string
	SiteRequest, SiteAnswer HeaderEdits
}

// HTTPMatch is a condition on a request. The zero value matches everything.
type HTTPMatch struct {
	PathExact, PathPrefix string
	PathRegex             string // RE2, of the whole path
	IgnoreCase            bool   // of PathExact and PathPrefix
	Methods               []string
	Headers               []HeaderMatch // all of them
	Query                 []QueryMatch  // all of them
}

// Everything reports whether every request matches.
func (m *HTTPMatch) Everything() bool {
	return m.PathExact == "" && (m.PathPrefix == "" || m.PathPrefix == "/") && m.PathRegex == "" && len(m.Methods)+len(m.Headers)+len(m.Query) == 0
}

// HeaderMatch is a condition on a request header, whose lines are joined by commas. One of
// Present, Exact, Prefix, Suffix, Contains and Regex is set. A header that is not there
// meets no condition on its value, inverted or not.
type HeaderMatch struct {
	Name                            string
	Present                         bool
	Exact, Prefix, Suffix, Contains string
	Regex                           string // RE2, of the whole value
	Invert                          bool
}

// QueryMatch is a condition on the first query parameter of a name, as it is written. One
// of Present, Exact and Regex is set.
type QueryMatch struct {
	Name    string
	Present bool
	Exact   string
	Regex   string // RE2, of the whole value
}

// HeaderEdits change headers in this order: Remove deletes headers, Add adds lines beside those
// that are there, Set replaces what is there. Values are in Envoy's format.
type HeaderEdits struct {
	Remove   []string
	Add, Set []Header // sorted by name
}

// Header is a header's name and value.
type Header struct{ Name, Value string }

// Empty reports whether nothing is changed.
func (e *HeaderEdits) Empty() bool { return len(e.Remove)+len(e.Add)+len(e.Set) == 0 }

// Retry is when a request is tried at another endpoint. The zero value leaves that to the
// data plane, which repeats what is safe to repeat.
type Retry struct {
	Tries      int      // at most, beside the first
	Conditions []string // as Consul spells them; sorted
	Codes      []int    // of answers; sorted
}

// Any reports whether a route asks for retries of its own.
func (r *Retry) Any() bool { return len(r.Conditions)+len(r.Codes) > 0 }

// Split is the share of a route's requests that one group has.
type Split struct {
	Weight  int // of the sum of all weights, which is about Whole
	Group   GroupName
	Request HeaderEdits
	Answer  HeaderEdits
	Origin  string // what in Consul says so, in words; "" of what no entry splits
}

// Groups visits every group that the chain leads to, as often as splits name it.
func (c *Chain) Groups(visit func(GroupName)) {
	for i := range c.Routes {
		for j := range c.Routes[i].Splits {
			visit(c.Routes[i].Splits[j].Group)
		}
	}
}

// GroupName names a group of the Snapshot and is fit for a backend's name.
type GroupName string

// Group is a list of targets in failover order, and how they are called. Its settings hold for
// each target by itself.
type Group struct {
	Name       GroupName
	Protocol   Protocol
	Targets    []TargetName  // the next one only while those before have no healthy endpoint
	Connect    time.Duration // until a connection is made, handshake included; > 0
	Idle       time.Duration // silence of the server that ends a tcp session or a request; < 0: none, 0: the default of every group
	Balance    Balance
	Limits     Limits
	Passive    *PassiveHealth // nil: none asked for
	ForwardFor bool           // tell the client's address in X-Forwarded-For
	Host       string         // replaces the host that was asked for; "": it stays
	Affinity   string         // a cookie that keeps a client at its endpoint; "": none
	SlowStart  time.Duration  // how long a new endpoint takes to get its whole share; 0: none
	Queue      Queue
	Snippet    SnippetName // its lines, in every backend of the group; "": none
	Origin     string      // what in Consul says so, in words
}

// Balance is how the endpoints of a target are chosen. The zero value takes them in turn,
// by weight.
type Balance struct {
	Policy  BalancePolicy
	Choices int          // LeastRequest: so many endpoints are drawn, and the least busy is taken
	Hash    []HashPolicy // Hash: what is hashed; requests with the same values go to the same endpoint
}

// BalancePolicy names a way to choose endpoints.
type BalancePolicy string

// The policies.
const (
	RoundRobin   BalancePolicy = ""
	LeastRequest BalancePolicy = "least_request"
	Random       BalancePolicy = "random"
	Hash         BalancePolicy = "hash"
)

// HashPolicy is one part of what is hashed. One of Header, Cookie, Query and SourceIP is set.
type HashPolicy struct {
	Header, Cookie, Query string
	SourceIP              bool
	// Generate makes the cookie for clients that have none; with TTL 0 it is a session cookie.
	Generate bool
	TTL      time.Duration
	Path     string
	Terminal bool // if this policy or one before it found a value, the later ones do not count
}

// Limits of each target of a group; a nil field is unlimited.
type Limits struct {
	MaxConnections, MaxPendingRequests, MaxConcurrentRequests *int
}

// PassiveHealth takes an endpoint that fails in practice out of rotation, for
// BaseEjection times the number of its recent ejections.
type PassiveHealth struct {
	Interval     time.Duration // after so long in rotation, one ejection fewer is remembered
	MaxFailures  int           // in a row
	BaseEjection time.Duration
	MaxEjected   *int // percent of the endpoints; nil: 10, but one at least
	Enforced     int  // percent of the ejections that are carried out
}

// String is a condition in words, for people.
func (m *HTTPMatch) String() string {
	var out []string
	add := func(s string) { out = append(out, s) }
	switch {
	case m.PathExact != "":
		add("path is " + quote(m.PathExact))
	case m.PathRegex != "":
		add("path matches " + quote(m.PathRegex))
	case m.PathPrefix != "":
		add("path begins with " + quote(m.PathPrefix))
	}
	if len(m.Methods) > 0 {
		add("method is " + quote(strings.Join(m.Methods, " or ")))
	}
	for _, h := range m.Headers {
		not := ""
		if h.Invert {
			not = "not "
		}
		add("header " + quote(h.Name) + " is " + not + h.condition())
	}
	for _, q := range m.Query {
		condition := "present"
		switch {
		case q.Exact != "":
			condition = quote(q.Exact)
		case q.Regex != "":
			condition = "like " + quote(q.Regex)
		}
		add("query " + quote(q.Name) + " is " + condition)
	}
	if len(out) == 0 {
		return "everything"
	}
	return strings.Join(out, ", ")
}

func (h *HeaderMatch) condition() string {
	for _, c := range [][2]string{{"", h.Exact}, {"beginning with ", h.Prefix}, {"ending in ", h.Suffix}, {"with ", h.Contains}, {"like ", h.Regex}} {
		if c[1] != "" {
			return c[0] + quote(c[1])
		}
	}
	return "present"
}
