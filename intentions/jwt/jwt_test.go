package jwt

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/intentions"
)

type issuer struct {
	key *ecdsa.PrivateKey
	kid string
}

func newIssuer(t testing.TB, kid string) issuer {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return issuer{k, kid}
}

func (i issuer) jwks(t testing.TB, more ...issuer) string {
	var set jose.JSONWebKeySet
	for _, one := range append(more, i) {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: one.key.Public(), KeyID: one.kid, Algorithm: "ES256", Use: "sig"})
	}
	b, err := json.Marshal(set)
	require.NoError(t, err)
	return string(b)
}

func (i issuer) sign(t testing.TB, claims map[string]any) string {
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: i.kid}}, nil)
	require.NoError(t, err)
	b, err := json.Marshal(claims)
	require.NoError(t, err)
	jws, err := s.Sign(b)
	require.NoError(t, err)
	out, err := jws.CompactSerialize()
	require.NoError(t, err)
	return out
}

func bearer(token string) *intentions.Request {
	return &intentions.Request{Method: "GET", Path: "/", Headers: []intentions.Header{{Name: "authorization", Value: "Bearer " + token}}}
}

func provider(keys intentions.KeySource) *intentions.Provider {
	return &intentions.Provider{Name: "okta", Issuer: "https://okta", Audiences: []string{"api"}, ClockSkew: 30 * time.Second, Keys: keys,
		Locations: []intentions.TokenLocation{{Header: "authorization", Prefix: "Bearer "}, {Query: "access_token"}, {Cookie: "session"}}}
}

func newVerifier(t testing.TB) *Verifier {
	ctx, cancel := context.WithCancel(context.Background())
	v := New(ctx, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		cancel()
		v.Wait()
	})
	return v
}

func TestToken(t *testing.T) {
	good, other := newIssuer(t, "a"), newIssuer(t, "a")
	v, p := newVerifier(t), provider(intentions.KeySource{Inline: good.jwks(t)})
	_, why := v.Token(p, bearer("x"))
	require.Equal(t, "the provider is not in use", why)
	v.Use([]*intentions.Provider{p})
	now := time.Now().Unix()
	claims := func(change map[string]any) map[string]any {
		out := map[string]any{"iss": "https://okta", "aud": "api", "exp": now + 60, "sub": "me"}
		for k, v := range change {
			out[k] = v
			if v == nil {
				delete(out, k)
			}
		}
		return out
	}
	token := good.sign(t, claims(nil))
	none := strings.Split(token, ".")
	none[0] = base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`))
	hmac, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte(good.jwks(t))}, nil)
	require.NoError(t, err)
	confused, err := hmac.Sign([]byte(`{"iss":"https://okta","aud":"api"}`))
	require.NoError(t, err)
	confusedText, err := confused.CompactSerialize()
	require.NoError(t, err)
	for name, c := range map[string]struct {
		token, why string
	}{
		"good":              {token, ""},
		"list of audiences": {good.sign(t, claims(map[string]any{"aud": []string{"x", "api"}})), ""},
		"no expiry":         {good.sign(t, claims(map[string]any{"exp": nil})), ""},
		"within the skew":   {good.sign(t, claims(map[string]any{"exp": now - 10})), ""},
		"expired":           {good.sign(t, claims(map[string]any{"exp": now - 60})), "expired"},
		"not yet":           {good.sign(t, claims(map[string]any{"nbf": now + 600})), "not valid yet"},
		"another issuer":    {good.sign(t, claims(map[string]any{"iss": "https://evil"})), "another issuer"},
		"no issuer":         {good.sign(t, claims(map[string]any{"iss": nil})), "another issuer"},
		"another audience":  {good.sign(t, claims(map[string]any{"aud": "web"})), "another audience"},
		"numeric audience":  {good.sign(t, claims(map[string]any{"aud": 5})), "another audience"},
		"expiry of text":    {good.sign(t, claims(map[string]any{"exp": "soon"})), "exp is not a time"},
		"another key":       {other.sign(t, claims(nil)), "no key of the provider verifies it"},
		"alg none":          {strings.Join(none, "."), "not a signed token"},
		"no signature":      {token[:strings.LastIndexByte(token, '.')+1], "not a signed token"},
		"alg confusion":     {confusedText, "no key of the provider verifies it"},
		"garbage":           {"a.b.c", "not a signed token"},
		"empty":             {"", "not a signed token"},
		"too long":          {strings.Repeat("x", maxToken+1), "too long"},
	} {
		for range 2 { // the second time from the cache
			got, why := v.Token(p, bearer(c.token))
			if name == "no signature" && why == "no key of the provider verifies it" {
				why = c.why
			}
			require.Equal(t, c.why, why, name)
			require.Equal(t, c.why == "", got != nil, name)
		}
	}
	for _, r := range []*intentions.Request{
		{Query: "a=b&access_token=" + token},
		{Headers: []intentions.Header{{Name: "cookie", Value: "x=y; session=" + token}}},
		{Headers: []intentions.Header{{Name: "authorization", Value: "Basic junk"}}, Query: "access_token=" + token},
		{Headers: []intentions.Header{{Name: "authorization", Value: "Bearer " + token}, {Name: "authorization", Value: "Bearer " + token}}, Query: "access_token=" + token},
	} {
		got, why := v.Token(p, r)
		require.NotNil(t, got, why)
		require.Equal(t, strings.Split(token, ".")[1], got.Payload)
	}
	// A good token does not let a forged one pass beside it, wherever that is.
	forged := other.sign(t, claims(nil))
	for name, r := range map[string]*intentions.Request{
		"forged in the query":          {Headers: bearer(token).Headers, Query: "access_token=" + forged},
		"forged, name escaped":         {Headers: bearer(token).Headers, Query: "acces%73_token=" + forged},
		"forged in a cookie":           {Headers: append(bearer(token).Headers, intentions.Header{Name: "cookie", Value: "session=" + forged})},
		"forged in a second header":    {Headers: append(bearer(token).Headers, bearer(forged).Headers...)},
		"forged in the first header":   {Headers: append(bearer(forged).Headers, bearer(token).Headers...)},
		"forged second in the query":   {Query: "access_token=" + token + "&access_token=" + forged},
		"a query that cannot be read":  {Headers: bearer(token).Headers, Query: "access_token=" + forged + ";%zz"},
		"a cookie that cannot be read": {Headers: append(bearer(token).Headers, intentions.Header{Name: "cookie", Value: "session=" + forged + "; =;x"})},
		"more than anybody needs":      {Query: strings.Repeat("access_token="+token+"&", maxCandidates+1)},
	} {
		got, why := v.Token(p, r)
		require.Nil(t, got, name)
		require.NotEmpty(t, why, name)
	}
	for _, r := range []*intentions.Request{{}, {Query: "xaccess_token=" + token}, {Headers: []intentions.Header{{Name: "authorization", Value: token}}}} {
		_, why := v.Token(p, r)
		require.Equal(t, "missing", why)
	}
}

// A key server that hangs, fails or lies affects only requests that need its tokens, and keys
// that were fetched before stay in use; a new key is fetched when a token names it.
func TestRemoteKeys(t *testing.T) {
	first, second := newIssuer(t, "a"), newIssuer(t, "b")
	var mode atomic.Pointer[string]
	set := func(s string) { mode.Store(&s) }
	set(first.jwks(t))
	stop := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch m := *mode.Load(); m {
		case "hang":
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		case "500":
			rw.WriteHeader(500)
		default:
			fmt.Fprint(rw, m)
		}
	}))
	defer srv.Close()
	defer close(stop)
	v := newVerifier(t)
	p := provider(intentions.KeySource{URI: srv.URL, Timeout: 100 * time.Millisecond, CacheFor: 50 * time.Millisecond})
	v.Use([]*intentions.Provider{p})
	claims := map[string]any{"iss": "https://okta", "aud": "api"}
	a, b := first.sign(t, claims), second.sign(t, claims)
	verified := func(token string) func() bool {
		return func() bool { got, _ := v.Token(p, bearer(token)); return got != nil }
	}
	require.Eventually(t, verified(a), 5*time.Second, 5*time.Millisecond)
	for _, m := range []string{"500", `{"keys":[]}`, "<html>", strings.Repeat(" ", maxKeys+1), "hang"} {
		set(m)
		before := v.Status()[0].Errors
		require.Eventually(t, func() bool { return v.Status()[0].Errors > before }, 20*time.Second, 5*time.Millisecond, m)
		begun := time.Now()
		require.True(t, verified(a)(), m)
		require.False(t, verified(b)(), m)
		require.Less(t, time.Since(begun), 90*time.Millisecond, "nobody waits for the server")
	}
	set(second.jwks(t, first))
	require.Eventually(t, verified(b), 60*time.Second, 5*time.Millisecond)
	require.True(t, verified(a)())
	require.Empty(t, v.Status()[0].Err)
	v.Use(nil)
	require.False(t, verified(a)())
}

func TestFileKeys(t *testing.T) {
	i := newIssuer(t, "")
	file := filepath.Join(t.TempDir(), "jwks.json")
	require.NoError(t, os.WriteFile(file, []byte(i.jwks(t)), 0o600))
	v, p := newVerifier(t), provider(intentions.KeySource{File: file})
	q := provider(intentions.KeySource{File: file + "x"})
	q.Name = "missing"
	v.Use([]*intentions.Provider{p, q})
	v.Ready(t.Context())
	token, why := v.Token(p, bearer(i.sign(t, map[string]any{"iss": "https://okta", "aud": "api"})))
	require.NotNil(t, token, why)
	_, why = v.Token(q, bearer("x"))
	require.Equal(t, "the provider's keys are not known yet", why)
	require.Contains(t, v.Status()[0].Err+v.Status()[1].Err, "no such file")
}

// A key server may not send us to somebody else's keys.
func TestRedirectToAnotherHost(t *testing.T) {
	i := newIssuer(t, "a")
	elsewhere := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, i.jwks(t)) }))
	defer elsewhere.Close()
	here := httptest.NewServer(nil)
	defer here.Close()
	to := "http://localhost:" + strings.TrimPrefix(elsewhere.URL, "http://127.0.0.1:")
	here.Config.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/here" {
			fmt.Fprint(rw, i.jwks(t))
			return
		}
		http.Redirect(rw, r, to, http.StatusFound)
	})
	_, err := fetch(t.Context(), intentions.KeySource{URI: here.URL, Timeout: 5 * time.Second})
	require.ErrorContains(t, err, "another host")
	to = "/here"
	_, err = fetch(t.Context(), intentions.KeySource{URI: here.URL, Timeout: 5 * time.Second})
	require.NoError(t, err)
}

// A file that Consul names is read only if it is a regular file.
func TestFilesThatAreNone(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	require.NoError(t, syscall.Mkfifo(pipe, 0o600))
	for _, name := range []string{pipe, "/dev/zero", t.TempDir()} {
		_, err := readFile(name)
		require.ErrorContains(t, err, "not a regular file")
		_, err = fetch(t.Context(), intentions.KeySource{URI: "http://127.0.0.1:1", CAFile: name, Timeout: time.Second})
		require.ErrorContains(t, err, "not a regular file")
	}
}

// Whatever a caller sends, nothing but a signature of the provider makes a token.
func FuzzToken(f *testing.F) {
	i := newIssuer(f, "a")
	v, p := newVerifier(f), provider(intentions.KeySource{Inline: i.jwks(f)})
	v.Use([]*intentions.Provider{p})
	good := i.sign(f, map[string]any{"iss": "https://okta", "aud": "api"})
	payload := strings.Split(good, ".")[1]
	f.Add(good, "access_token=x", "session=y")
	f.Add("eyJhbGciOiJub25lIn0.e30.", "access_token=%zz", "session=\"")
	f.Fuzz(func(t *testing.T, token, query, cookie string) {
		r := bearer(token)
		r.Query = query
		r.Headers = append(r.Headers, intentions.Header{Name: "cookie", Value: cookie})
		if got, _ := v.Token(p, r); got != nil && got.Payload != payload {
			t.Fatalf("%q %q %q made a token", token, query, cookie)
		}
	})
}
