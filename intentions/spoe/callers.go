package spoe

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

const (
	maxCallers = 4096 // addresses in by, and as many in old, of each shard
	maxAtOnce  = 8    // identities remembered for one address and port of a caller
)

// callers remembers who connected from which address, bounded.
type callers struct {
	mu      sync.Mutex
	by, old map[netip.AddrPort][]known // old: what by was when it was full
}

// who is a caller, and the service that it called, by which a policy of several is asked.
type who struct {
	id      certs.SPIFFEID
	service string
}

// known is the caller of one connection. The caller's address and port alone do not identify
// a connection: the caller may use them toward two of our addresses.
type known struct {
	to netip.AddrPort // our end
	who
	since time.Time
	let   bool // true if it was let in at least once; if not, it has nothing open but its refusal
}

func (c *callers) get(from netip.AddrPort) []known {
	if list, ok := c.by[from]; ok {
		return list
	}
	return c.old[from]
}

func (a *Agent) callersOf(from netip.AddrPort) *callers { return &a.callers[from.Port()%64] }

// remember records who connected from one address to another, and whether that caller was let
// in. It replaces the caller that was recorded for the two addresses before.
func (a *Agent) remember(from, to netip.AddrPort, caller who, let bool) {
	c := a.callersOf(from)
	c.mu.Lock()
	defer c.mu.Unlock()
	list := c.get(from)
	at := slices.IndexFunc(list, func(k known) bool { return k.to == to })
	_, current := c.by[from]
	same := at >= 0 && list[at].who == caller
	if same && current && (list[at].let || !let) {
		return
	}
	next := make([]known, 0, len(list)+1)
	for i := range list {
		if i != at && len(next) < maxAtOnce-1 {
			next = append(next, list[i])
		}
	}
	since := time.Now()
	if same {
		since, let = list[at].since, let || list[at].let
	}
	next = append([]known{{to, caller, since, let}}, next...) // the newest is the last to be dropped
	if c.by == nil || len(c.by) >= maxCallers {
		c.by, c.old = map[netip.AddrPort][]known{}, c.by
	}
	c.by[from] = next
	if len(c.by) == maxCallers/2 && a.opt.Crowded != nil {
		a.opt.Crowded()
	}
}

// Judgement is what becomes of a session that is open when the policy changes.
type Judgement int

// The judgements.
const (
	Stays       Judgement = iota
	EndsTunnels           // its caller is judged per request, by a new rule; a tunnel has no more requests
	Ends
	Unknown // no caller is remembered at this address, and who it was must not be guessed
)

// Judge applies the policy in force to what is open from an address. before is the policy by
// which it was last judged, nil if there is none. waits is true while HAProxy still waits for a
// verdict on the session, which therefore must not be ended as Unknown. A caller that was
// never let in stays: it hears its refusal. Where several identities are known, the session
// ends if any of them is denied.
func (a *Agent) Judge(from netip.AddrPort, waits bool, before *intentions.Policy) Judgement {
	list := a.caller(from)
	if len(list) == 0 {
		if waits {
			return Stays
		}
		return Unknown
	}
	policy, out := a.Policy(), Stays
	for _, one := range list {
		if !one.let {
			continue
		}
		own := policy.Of(one.service)
		switch d := own.Decide(one.id, nil); {
		case !d.Allow && !d.PerRequest:
			return Ends
		case d.PerRequest && !own.Same(before.Of(one.service), one.id):
			out = EndsTunnels
		}
	}
	return out
}

// AnyDenied reports whether the policy in force denies somebody who has connected.
func (a *Agent) AnyDenied() bool {
	for i := range a.callers {
		c := &a.callers[i]
		c.mu.Lock()
		var from []netip.AddrPort
		for _, all := range []map[netip.AddrPort][]known{c.by, c.old} {
			for at := range all {
				from = append(from, at)
			}
		}
		c.mu.Unlock()
		for _, at := range from {
			if a.Judge(at, true, nil) == Ends {
				return true
			}
		}
	}
	return false
}

// Since returns when the agent was first asked about the longest known caller from this address;
// ok is false if none is known.
func (a *Agent) Since(from netip.AddrPort) (since time.Time, ok bool) {
	for _, who := range a.caller(from) {
		if !ok || who.since.Before(since) {
			since, ok = who.since, true
		}
	}
	return since, ok
}

func (a *Agent) caller(from netip.AddrPort) []known {
	c := a.callersOf(from)
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.get(from) // a list is never changed, only replaced
}

// Forget drops the callers of addresses that are not in live, from each shard that is at least
// half full.
func (a *Agent) Forget(live map[netip.AddrPort]bool) {
	for i := range a.callers {
		c := &a.callers[i]
		c.mu.Lock()
		if len(c.by)+len(c.old) >= maxCallers/2 {
			keep := map[netip.AddrPort][]known{}
			for from := range live {
				if list := c.get(from); len(list) > 0 && a.callersOf(from) == c {
					keep[from] = list
				}
			}
			c.by, c.old = keep, nil
		}
		c.mu.Unlock()
	}
}
