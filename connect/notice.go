package connect

import (
	"slices"
	"strings"
)

// Notice is something in Consul that is not honoured, and why.
type Notice struct {
	Where string // "proxy", "upstream NAME"
	Key   string
	Value string // as found, may be hostile
	Why   string
}

// String quotes whatever came from outside.
func (n Notice) String() string {
	s := "ignored " + quote(n.Where) + " " + quote(n.Key)
	if n.Value != "" {
		s += " = " + quote(n.Value)
	}
	return s + ": " + n.Why
}

// Notices are collected while decoding and sorted before they are published.
type Notices []Notice

// Add appends a notice.
func (n *Notices) Add(where, key, value, why string) {
	*n = append(*n, Notice{Where: where, Key: key, Value: value, Why: why})
}

// Sorted returns them in a stable order without repetitions.
func (n Notices) Sorted() []Notice {
	out := slices.Clone(n)
	slices.SortFunc(out, func(a, b Notice) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}

// quote keeps text from outside on one line and short.
func quote(s string) string {
	if len(s) > 120 {
		s = s[:120] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == 0xfffd || (r >= 0x80 && r < 0xa0) || r == 0x2028 || r == 0x2029 {
			return '?'
		}
		return r
	}, s)
}
