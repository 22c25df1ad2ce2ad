package intentions

import (
	"slices"
	"strings"
)

// Request is what an L7 permission may look at. Names of Headers are lower case.
type Request struct {
	Method  string
	Path    string // without query string, normalised by the caller
	Headers []Header
	Query   string // without "?"; tokens may be in it
	Tokens  Tokens // verifies the tokens; if nil, no required token is ever met
}

// Header is one header line.
type Header struct{ Name, Value string }

// header joins repeated lines with commas, as Envoy does before it matches.
func (r *Request) header(name string) (string, bool) {
	value, found := "", false
	for i := range r.Headers {
		if r.Headers[i].Name != name {
			continue
		}
		if !found {
			value, found = r.Headers[i].Value, true
			continue
		}
		value += "," + r.Headers[i].Value
	}
	return value, found
}

// mismatch names the first part of the permission that the request does not match, or returns
// "" if all match. It does not look at tokens.
func (m *Permission) mismatch(r *Request) string {
	if len(m.Methods) > 0 && !slices.Contains(m.Methods, r.Method) {
		return "method"
	}
	switch {
	case m.PathExact != "" && r.Path != m.PathExact,
		m.PathPrefix != "" && !strings.HasPrefix(r.Path, m.PathPrefix),
		m.regex != nil && !m.regex.MatchString(r.Path):
		return "path"
	}
	for i := range m.Headers {
		if !m.Headers[i].matches(r) {
			return m.Headers[i].label
		}
	}
	return ""
}

// matches follows Envoy's HeaderUtility::matchHeaders: an empty header is present, and
// an absent one meets no condition on a value, inverted or not.
func (h *HeaderMatch) matches(r *Request) bool {
	value, found := r.header(h.Name)
	switch {
	case h.Present:
		return found != h.Invert
	case !found:
		return false
	}
	met, known := h.meets(value)
	return known && met != h.Invert
}

// meets compares a value with the condition; known is false for a condition of a kind
// that this program does not know, which never matches.
func (h *HeaderMatch) meets(value string) (met, known bool) {
	if h.IgnoreCase {
		value = strings.ToLower(value)
	}
	switch {
	case h.Exact != "":
		return value == h.Exact, true
	case h.Prefix != "":
		return strings.HasPrefix(value, h.Prefix), true
	case h.Suffix != "":
		return strings.HasSuffix(value, h.Suffix), true
	case h.Contains != "":
		return strings.Contains(value, h.Contains), true
	case h.regex != nil:
		return h.regex.MatchString(value), true
	}
	return false, false
}
