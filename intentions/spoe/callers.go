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
	maxCallers = 4096 // in each of the parts
	maxAtOnce  = 8    // identities remembered for one address and port of a caller
)

// callers remembers who connected from which address, bounded.
type callers struct {
	mu      sync.Mutex
	by, old map[netip.AddrPort][]known // old: what by was when it was full
}

// known is one connection of a caller. The caller's address and port alone do not tell
// connections apart: they may be the same toward two addresses of ours.
type known struct {
	to    netip.AddrPort // our end
	id    certs.SPIFFEID
	since time.Time
	let   bool // in, once at least: of one that never was nothing is open but a refusal
}

func (c *callers) get(from netip.AddrPort) []known {
	if list, ok := c.by[from]; ok {
		return list
	}
	return c.old[from]
}

func (a *Agent) callersOf(from netip.AddrPort) *callers { return &a.callers[from.Port()%64] }

// remember keeps who connected from one address to another until somebody else does, and
// whether it was let in.
func (a *Agent) remember(from, to netip.AddrPort, id certs.SPIFFEID, let bool) {
	c := a.callersOf(from)
	c.mu.Lock()
	defer c.mu.Unlock()
	list := c.get(from)
	at := slices.IndexFunc(list, func(k known) bool { return k.to == to })
	_, current := c.by[from]
	same := at >= 0 && list[at].id == id
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
	next = append([]known{{to, id, since, let}}, next...) // the newest is the last to be dropped
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
	EndsTunnels           // its requests are judged one by one, but a tunnel has none any more
	Ends
	Unknown // nobody is remembered there: who called must not be guessed
)

// Judge applies the policy in force to what is open from an address. before is the
// policy by which it was last judged; nil is none. A session that still waits to be let in
// stays: the question is yet to come. So does one that was never let in: it hears its
// refusal. Where several identities are known, the session ends if any of them is denied.
func (a *Agent) Judge(from netip.AddrPort, waits bool, before *intentions.Policy) Judgement {
	list := a.caller(from)
	if len(list) == 0 {
		if waits {
			return Stays
		}
		return Unknown
	}
	policy, out := a.Policy(), Stays
	for _, who := range list {
		if !who.let {
			continue
		}
		switch d := policy.Decide(who.id, nil); {
		case !d.Allow && !d.PerRequest:
			return Ends
		case d.PerRequest && !policy.Same(before, who.id):
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

// Since is when the first caller from this address was first asked about; ok is false if
// that is not known.
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

// Forget drops every address but those of sessions that live.
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
