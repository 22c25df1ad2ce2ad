package connect

import "time"

// Chain says which request, or which connection, goes where. The first route that matches
// is taken; what none matches is answered 404.
type Chain struct{ Routes []Route }

// Direct is the chain that leads everything to one group.
func Direct(g GroupName) Chain {
	return Chain{Routes: []Route{{Splits: []Split{{Weight: whole, Group: g}}}}}
}

// whole is the sum of the weights of a route's splits.
const whole = 10000

// Route is what becomes of the requests that match.
type Route struct {
	Match  HTTPMatch
	Splits []Split
}

// HTTPMatch is a condition on a request. The zero value matches everything.
type HTTPMatch struct {
	PathExact string
}

// Split is the share of a route's requests that one group has.
type Split struct {
	Weight int // of 10,000
	Group  GroupName
}

// Groups visits every group that the chain leads to, one that is named twice twice.
func (c *Chain) Groups(visit func(GroupName)) {
	for i := range c.Routes {
		for j := range c.Routes[i].Splits {
			visit(c.Routes[i].Splits[j].Group)
		}
	}
}

// GroupName names a group of the Snapshot and is fit for a backend's name.
type GroupName string

// Group is targets in failover order, and how they are called. What it says holds for each
// of its targets.
type Group struct {
	Name       GroupName
	Protocol   Protocol
	Targets    []TargetName
	Connect    time.Duration // until a connection is made, handshake included; > 0
	Idle       time.Duration // silence of the server that ends a tcp session or a request; < 0: none, 0: the default of every group
	Limits     Limits
	Passive    *PassiveHealth // nil: none asked for
	ForwardFor bool           // tell the client's address in X-Forwarded-For
}

// Limits of each target of a group; a nil field is unlimited.
type Limits struct {
	MaxConnections, MaxPendingRequests, MaxConcurrentRequests *int
}

// PassiveHealth takes an endpoint out of rotation that fails in practice, for
// BaseEjection times the number of its recent ejections.
type PassiveHealth struct {
	Interval     time.Duration // in which an ejection less is remembered
	MaxFailures  int           // in a row
	BaseEjection time.Duration
	MaxEjected   *int // percent of the endpoints; nil: 10, but one at least
	Enforced     int  // percent of the ejections that are carried out
}
