package intentions

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// NewSeveral returns the policy of a proxy that stands for several services: it is asked by the
// server name that a caller sent, and then for the service. names are the server names of each
// service; a name of none is denied.
func NewSeveral(list []*Policy, names map[string]string) *Policy {
	out := &Policy{valid: true, byService: map[string]*Policy{}, byName: map[string]*Policy{}}
	text := ""
	for _, p := range list {
		out.byService[p.Destination()] = p
		text += p.Destination() + "\x00" + p.Digest() + "\x00"
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if p := out.byService[names[name]]; p != nil {
			out.byName[strings.ToLower(name)] = p
			text += name + "\x00" + names[name] + "\x00"
		}
	}
	out.digest = fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
	return out
}

// Several reports whether the policy must be asked For a server name.
func (p *Policy) Several() bool { return p != nil && p.byName != nil }

// For returns the policy of the service that a server name stands for: p itself if it is of one
// service, and one that denies everybody if nobody has the name.
func (p *Policy) For(serverName string) *Policy {
	if !p.Several() {
		return p
	}
	return orNobody(p.byName[strings.ToLower(strings.TrimSuffix(serverName, "."))])
}

// Of is For by the service's name.
func (p *Policy) Of(service string) *Policy {
	if !p.Several() {
		return p
	}
	return orNobody(p.byService[service])
}

func orNobody(p *Policy) *Policy {
	if p == nil {
		return &Policy{}
	}
	return p
}
