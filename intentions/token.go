package intentions

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"
)

// Provider is an issuer of JSON Web Tokens, as Consul's config entry jwt-provider describes
// it. It must not be changed.
type Provider struct {
	Name      string
	Issuer    string   // "iss" must be this, unless ""
	Audiences []string // "aud" must have one of these, unless none
	Locations []TokenLocation
	ForwardTo string        // request header that receives the payload; "": none
	Pad       bool          // forward the payload with base64 padding
	ClockSkew time.Duration // allowed for "exp" and "nbf"
	Keys      KeySource
}

// TokenLocation is where a token may be: exactly one of Header, Query and Cookie is set.
type TokenLocation struct {
	Header, Prefix string // lower case; what precedes the token in its value
	Keep           bool   // the application receives the header too
	Query, Cookie  string
}

// KeySource is where a provider's keys come from: exactly one of Inline, File and URI
// is set.
type KeySource struct {
	Inline string // a JSON Web Key Set
	File   string
	URI    string

	Timeout            time.Duration // of one request
	CacheFor           time.Duration // between requests
	MinRetry, MaxRetry time.Duration
	CAs                string // PEM that the URI's server must chain to, "" the system's
	CAFile             string // a file of such PEM, which replaces CAs and is read for each request
}

// Variable returns the name of HAProxy's variable for the payload of the provider's token. It
// is made of a digest, so that it fits a configuration whatever the provider is called.
func (p *Provider) Variable() string {
	sum := sha256.Sum256([]byte(p.Name))
	return "jwt_" + hex.EncodeToString(sum[:6])
}

// Requirement asks for a verified token of a provider, with these claims.
type Requirement struct {
	Provider string
	Claims   []Claim
	provider *Provider
}

// Claim asks for a claim that is a string and equals Value: numbers, booleans and lists never
// match (as in Consul and Envoy). Path leads through nested objects.
type Claim struct {
	Path  []string
	Value string
}

// Token is a verified JSON Web Token.
type Token struct {
	Claims  map[string]any
	Payload string // base64url without padding
}

// Tokens finds and verifies the token that a request carries for a provider. If t is nil, why
// says what is missing or wrong. Package intentions/jwt implements it.
type Tokens interface {
	Token(p *Provider, r *Request) (t *Token, why string)
}

// needs returns the requirements with their providers looked up, and notes these providers in
// p.providers.
func (p *Policy) needs(list []Requirement) []Requirement {
	list = slices.Clone(list)
	for i := range list {
		for _, one := range p.conf.Providers {
			if one.Name == list[i].Provider {
				list[i].provider = one
				if !slices.Contains(p.providers, one) {
					p.providers = append(p.providers, one)
				}
			}
		}
	}
	return list
}

// Providers returns the providers of all tokens that the intentions require, sorted by name.
func (p *Policy) Providers() []*Provider {
	if p == nil {
		return nil
	}
	return p.providers
}

// unmet says why none of the requirements is met; "" if one is, or there is none.
func unmet(list []Requirement, r *Request) string {
	if len(list) == 0 {
		return ""
	}
	why := make([]string, 0, 2)
	for i := range list {
		reason := list[i].unmet(r)
		if reason == "" {
			return ""
		}
		why = append(why, reason)
	}
	return strings.Join(why, "; ")
}

func (q *Requirement) unmet(r *Request) string {
	switch {
	case q.provider == nil:
		return "jwt-provider " + q.Provider + " is not known"
	case r.Tokens == nil:
		return "tokens cannot be verified here"
	}
	t, why := r.Tokens.Token(q.provider, r)
	if t == nil {
		return "token of " + q.Provider + ": " + why
	}
	for _, c := range q.Claims {
		var at any = t.Claims
		for _, key := range c.Path {
			m, _ := at.(map[string]any)
			at = m[key]
		}
		if s, ok := at.(string); !ok || s != c.Value {
			return "token of " + q.Provider + ": claim " + strings.Join(c.Path, ".") + " is not " + c.Value
		}
	}
	return ""
}
