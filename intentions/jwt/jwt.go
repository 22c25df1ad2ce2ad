// Package jwt verifies the JSON Web Tokens that intentions require: where a token is,
// who signed it, for whom and until when. It is the only user of go-jose.
//
// Invariants: a token that cannot be verified meets no requirement; keys are fetched beside the
// traffic, never in it, so that a key server that hangs, fails or lies costs at most the
// requests that need its tokens; fetched keys stay in use until newer ones are fetched; the
// memory for tokens is bounded.
//
// It may import intentions; cmd uses it.
package jwt

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// Limits and times.
const (
	maxToken   = 8 << 10 // bytes of a token
	maxKeys    = 1 << 20 // bytes of a key set
	maxCached  = 256     // verified tokens in each part of the cache
	fileEvery  = 30 * time.Second
	soonest    = 10 * time.Second // between two requests for an unknown key
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

// algorithms are those of Envoy's jwt_verify_lib.
var algorithms = []jose.SignatureAlgorithm{
	jose.ES256, jose.ES384, jose.ES512, jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
	jose.HS256, jose.HS384, jose.HS512, jose.EdDSA,
}

// Verifier implements intentions.Tokens. Make it with New.
type Verifier struct {
	ctx context.Context
	log *slog.Logger
	wg  sync.WaitGroup

	mu   sync.Mutex // of Use
	sets atomic.Pointer[map[string]*keySet]

	cache [16]struct {
		sync.Mutex
		seen map[cacheKey]*verified
	}
}

type cacheKey struct {
	keys *keys
	sum  [sha256.Size]byte
}

// verified is the cached result of checking a token's signature. What depends on the time or
// on the provider's settings is checked on every use.
type verified struct {
	token              *intentions.Token
	why                string // why token is nil
	notBefore, expires time.Time
}

// keys are one answer of a source.
type keys struct{ jose.JSONWebKeySet }

// keySet is the state of one provider's keys and of fetching them.
type keySet struct {
	source  intentions.KeySource
	name    string
	stop    context.CancelFunc
	now     atomic.Pointer[keys]
	unknown chan struct{} // asks follow to fetch soon: a token named a key ID that no key has

	mu      sync.Mutex
	err     string
	fetched time.Time
	errors  uint64
}

// Status of one provider's keys.
type Status struct {
	Provider string
	Keys     int
	Fetched  time.Time
	Err      string
	Errors   uint64
}

// New makes a verifier without providers; it stops when ctx ends. Wait returns when it has.
func New(ctx context.Context, log *slog.Logger) *Verifier {
	v := &Verifier{ctx: ctx, log: log}
	v.sets.Store(&map[string]*keySet{})
	return v
}

// Wait returns when the last request for keys has ended, after New's context has.
func (v *Verifier) Wait() { v.wg.Wait() }

// Use makes these the providers whose tokens can be verified. Keys of a source that
// stays are kept.
func (v *Verifier) Use(providers []*intentions.Provider) {
	v.mu.Lock()
	defer v.mu.Unlock()
	old := *v.sets.Load()
	next := make(map[string]*keySet, len(providers))
	for _, p := range providers {
		if have := old[p.Name]; have != nil && have.source == p.Keys {
			next[p.Name] = have
			continue
		}
		ctx, cancel := context.WithCancel(v.ctx)
		k := &keySet{source: p.Keys, name: p.Name, stop: cancel, unknown: make(chan struct{}, 1)}
		next[p.Name] = k
		if p.Keys.Inline != "" {
			v.take(k, []byte(p.Keys.Inline), nil)
			continue
		}
		v.wg.Add(1)
		go func() {
			defer v.wg.Done()
			v.follow(ctx, k)
		}()
	}
	v.sets.Store(&next)
	for name, k := range old {
		if next[name] != k {
			k.stop()
		}
	}
}

// Status of every provider, sorted by name.
func (v *Verifier) Status() []Status {
	var out []Status
	for name, k := range *v.sets.Load() {
		s := Status{Provider: name}
		if have := k.now.Load(); have != nil {
			s.Keys = len(have.Keys)
		}
		k.mu.Lock()
		s.Fetched, s.Err, s.Errors = k.fetched, k.err, k.errors
		k.mu.Unlock()
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.Provider, b.Provider) })
	return out
}

// Ready waits until every provider has keys or an error, or ctx ends: for a command
// that asks once.
func (v *Verifier) Ready(ctx context.Context) {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for slices.ContainsFunc(v.Status(), func(s Status) bool { return s.Keys == 0 && s.Err == "" }) {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// follow keeps the keys of a file or a URI current.
func (v *Verifier) follow(ctx context.Context, k *keySet) {
	retry := max(k.source.MinRetry, firstRetry)
	for {
		var raw []byte
		var err error
		wait := fileEvery
		if k.source.File != "" {
			raw, err = readFile(k.source.File)
		} else {
			raw, err = fetch(ctx, k.source)
			wait = k.source.CacheFor
		}
		if ctx.Err() != nil {
			return
		}
		if v.take(k, raw, err) {
			retry = max(k.source.MinRetry, firstRetry)
		} else {
			wait = retry
			retry = min(2*retry, max(cmp.Or(k.source.MaxRetry, lastRetry), firstRetry))
		}
		began := time.Now()
		t := time.NewTimer(wait - wait/10 + rand.N(wait/5+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		case <-k.unknown:
			t.Stop()
			rest := time.NewTimer(min(soonest, wait) - time.Since(began))
			select {
			case <-ctx.Done():
				rest.Stop()
				return
			case <-rest.C:
			}
		}
	}
}

// take parses an answer and makes it the current key set. If there is an error it keeps the
// current one, and logs the error unless the last one was the same.
func (v *Verifier) take(k *keySet, raw []byte, err error) bool {
	var next *keys
	if err == nil {
		next, err = parse(raw)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil {
		k.errors++
		if text := err.Error(); text != k.err {
			k.err = text
			v.log.Warn("cannot read the keys of a jwt-provider; requests that need its tokens are judged by the keys there were", "provider", k.name, "error", text,
				"try", "is its key set reachable from here, and a JSON Web Key Set?")
		}
		return false
	}
	if k.err != "" {
		k.err = ""
		v.log.Info("the keys of a jwt-provider can be read again", "provider", k.name)
	}
	k.fetched = time.Now()
	k.now.Store(next)
	return true
}

// parse reads a JSON Web Key Set. It leaves out keys that it cannot use, which may be meant for
// other software; a set without a usable key is an error.
func parse(raw []byte) (*keys, error) {
	var list struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, errors.New("not a JSON Web Key Set")
	}
	out := &keys{}
	for _, one := range list.Keys {
		var k jose.JSONWebKey
		if err := k.UnmarshalJSON(one); err == nil && k.Valid() && (k.Use == "" || k.Use == "sig") {
			if !k.IsPublic() { // a private key verifies by its public part
				if _, symmetric := k.Key.([]byte); !symmetric {
					k = k.Public()
				}
			}
			out.Keys = append(out.Keys, k)
		}
	}
	if len(out.Keys) == 0 {
		return nil, errors.New("the JSON Web Key Set has no key that can verify a signature")
	}
	return out, nil
}

// readFile reads a regular file of at most maxKeys bytes. A pipe or a device, whose name
// Consul may give as well, would be waited for without end or read without end.
func readFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	return limited(f)
}

func limited(r io.Reader) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxKeys+1))
	if err == nil && len(raw) > maxKeys {
		err = fmt.Errorf("more than %d bytes", maxKeys)
	}
	return raw, err
}

func fetch(ctx context.Context, s intentions.KeySource) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	authorities := []byte(s.CAs)
	if s.CAFile != "" {
		var err error
		if authorities, err = readFile(s.CAFile); err != nil {
			return nil, fmt.Errorf("trusted_ca: %w", err)
		}
	}
	if s.CAFile != "" || s.CAs != "" {
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(authorities) {
			return nil, errors.New("the certificate authorities of jwks_cluster cannot be read")
		}
	}
	tr := &http.Transport{TLSClientConfig: conf, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, ForceAttemptHTTP2: true}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.URI, nil)
	if err != nil {
		return nil, err
	}
	res, err := (&http.Client{Transport: tr, CheckRedirect: sameHost}).Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the method and the URL around it
		}
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, errors.New("status " + res.Status)
	}
	return limited(res.Body)
}

// sameHost follows a redirect only within the host that the provider names, and never
// from https to http: whoever answers there would decide which tokens are good.
func sameHost(next *http.Request, before []*http.Request) error {
	first := before[0].URL
	if len(before) > 5 || next.URL.Hostname() != first.Hostname() || first.Scheme == "https" && next.URL.Scheme != "https" {
		return fmt.Errorf("redirected to %s://%s, which is another host than the provider's", next.URL.Scheme, next.URL.Host)
	}
	return nil
}

// maxCandidates bounds how many tokens for one provider a request may carry, as each costs the
// check of a signature.
const maxCandidates = 16

// Token implements intentions.Tokens. When a request carries several tokens for a
// provider, each must be good, as with Envoy: the application might read another one
// than the one that was verified. The first is returned.
func (v *Verifier) Token(p *intentions.Provider, r *intentions.Request) (*intentions.Token, string) {
	set := (*v.sets.Load())[p.Name]
	if set == nil {
		return nil, "the provider is not in use"
	}
	have := set.now.Load()
	if have == nil {
		return nil, "the provider's keys are not known yet"
	}
	var first *intentions.Token
	n := 0
	for i := range p.Locations {
		for raw := range candidates(&p.Locations[i], r) {
			if n++; n > maxCandidates {
				return nil, "there are too many"
			}
			t, why := v.verify(p, set, have, raw)
			if t == nil {
				if n > 1 {
					why += ", and every token of a request must be good"
				}
				return nil, why
			}
			if first == nil {
				first = t
			}
		}
	}
	if first == nil {
		return nil, "missing"
	}
	return first, ""
}

// unreadable stands for the token that may be in a query or a cookie which cannot be parsed. No
// key verifies it, so that the request is denied.
const unreadable = "unreadable"

// candidates are the tokens at one location.
func candidates(l *intentions.TokenLocation, r *intentions.Request) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		switch {
		case l.Header != "":
			for _, h := range r.Headers {
				if h.Name == l.Header {
					if raw, ok := strings.CutPrefix(h.Value, l.Prefix); ok && !yield(strings.TrimSpace(raw)) {
						return
					}
				}
			}
		case l.Query != "":
			if !strings.Contains(r.Query, l.Query) && !strings.ContainsAny(r.Query, "%+") { // the name may be escaped
				return
			}
			q, err := url.ParseQuery(r.Query)
			for _, raw := range q[l.Query] {
				if !yield(raw) {
					return
				}
			}
			if err != nil && strings.Contains(r.Query, l.Query) {
				yield(unreadable)
			}
		case l.Cookie != "":
			for _, h := range r.Headers {
				if h.Name != "cookie" {
					continue
				}
				list, err := http.ParseCookie(h.Value)
				if err != nil && strings.Contains(h.Value, l.Cookie) && !yield(unreadable) {
					return
				}
				for _, c := range list {
					if c.Name == l.Cookie && !yield(c.Value) {
						return
					}
				}
			}
		}
	}
}

func (v *Verifier) verify(p *intentions.Provider, set *keySet, have *keys, raw string) (*intentions.Token, string) {
	if len(raw) > maxToken {
		return nil, "too long"
	}
	key := cacheKey{have, sha256.Sum256([]byte(p.Name + "\x00" + raw))}
	part := &v.cache[key.sum[0]%16]
	part.Lock()
	got := part.seen[key]
	part.Unlock()
	if got == nil {
		var unknown bool
		got, unknown = check(have, raw)
		if unknown {
			select {
			case set.unknown <- struct{}{}:
			default:
			}
		}
		part.Lock()
		if part.seen == nil || len(part.seen) >= maxCached {
			part.seen = map[cacheKey]*verified{}
		}
		part.seen[key] = got
		part.Unlock()
	}
	now := time.Now()
	switch {
	case got.token == nil:
		return nil, got.why
	case !got.expires.IsZero() && now.After(got.expires.Add(p.ClockSkew)):
		return nil, "expired"
	case now.Before(got.notBefore.Add(-p.ClockSkew)):
		return nil, "not valid yet"
	case p.Issuer != "" && got.token.Claims["iss"] != p.Issuer:
		return nil, "another issuer"
	case !forUs(p.Audiences, got.token.Claims["aud"]):
		return nil, "another audience"
	}
	return got.token, ""
}

// check verifies a signature and reads the claims. unknown is true if the token names a key ID
// that no key has.
func check(have *keys, raw string) (got *verified, unknown bool) {
	jws, err := jose.ParseSignedCompact(raw, algorithms)
	if err != nil {
		return &verified{why: "not a signed token"}, false
	}
	header := jws.Signatures[0].Header
	var payload []byte
	named := false
	for i := range have.Keys {
		k := &have.Keys[i]
		if header.KeyID != "" && k.KeyID != "" {
			if k.KeyID != header.KeyID {
				continue
			}
			named = true
		}
		if k.Algorithm != "" && k.Algorithm != header.Algorithm {
			continue
		}
		if payload, err = jws.Verify(k.Key); err == nil {
			break
		}
		payload = nil
	}
	if payload == nil {
		return &verified{why: "no key of the provider verifies it"}, header.KeyID != "" && !named
	}
	t := &intentions.Token{Payload: base64.RawURLEncoding.EncodeToString(payload)}
	if err := json.Unmarshal(payload, &t.Claims); err != nil || t.Claims == nil {
		return &verified{why: "its claims are not a JSON object"}, false
	}
	got = &verified{token: t}
	var ok bool
	if got.expires, ok = date(t.Claims["exp"]); !ok {
		return &verified{why: "exp is not a time"}, false
	}
	if got.notBefore, ok = date(t.Claims["nbf"]); !ok {
		return &verified{why: "nbf is not a time"}, false
	}
	return got, false
}

// date reads a NumericDate (RFC 7519); none is the zero time.
func date(claim any) (time.Time, bool) {
	if claim == nil {
		return time.Time{}, true
	}
	n, ok := claim.(float64)
	if !ok || n < 0 || n > 1e12 {
		return time.Time{}, false
	}
	return time.Unix(int64(n), 0), true
}

func forUs(audiences []string, claim any) bool {
	if len(audiences) == 0 {
		return true
	}
	switch aud := claim.(type) {
	case string:
		return slices.Contains(audiences, aud)
	case []any:
		return slices.ContainsFunc(aud, func(one any) bool {
			s, ok := one.(string)
			return ok && slices.Contains(audiences, s)
		})
	}
	return false
}
