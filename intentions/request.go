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
	Tokens  Tokens // nil: a required token is never there
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

// mismatch is "" when everything matches but tokens, else what does not.
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
		if m.Headers[i].matches(r) == m.Headers[i].Invert {
			return m.Headers[i].label
		}
	}
	return ""
}

func (h *HeaderMatch) matches(r *Request) bool {
	value, found := r.header(h.Name)
	if h.Present {
		// Consul's suite counts an empty header as absent (case l7-intentions).
		return found && value != ""
	}
	if !found {
		return false
	}
	if h.IgnoreCase {
		value = strings.ToLower(value)
	}
	switch {
	case h.Exact != "":
		return value == h.Exact
	case h.Prefix != "":
		return strings.HasPrefix(value, h.Prefix)
	case h.Suffix != "":
		return strings.HasSuffix(value, h.Suffix)
	case h.Contains != "":
		return strings.Contains(value, h.Contains)
	case h.regex != nil:
		return h.regex.MatchString(value)
	}
	return false // a condition of a kind we do not know never matches
}
