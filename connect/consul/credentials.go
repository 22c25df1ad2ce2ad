package consul

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
)

// credentials adds to each request what the files hold now: the token and, through the
// transport, the certificates. The library reads the files only once, but whoever rotates
// credentials rewrites the files, and what was read at the start stops working.
type credentials struct {
	tokenFile string
	tls       api.TLSConfig
	files     []string // of tls, those that are named
	fresh     func() *http.Transport

	mu     sync.Mutex
	looked time.Time
	stamps map[string]stamp
	token  string // "": the library's own token is used
	next   *http.Transport
}

// stamp tells contents of a file apart.
type stamp struct {
	at   time.Time
	size int64
}

const lookEvery = time.Second // at the files, at most

// newCredentials begins with the transport that the library made of the same files.
func newCredentials(conf *api.Config, first *http.Transport) *credentials {
	c := &credentials{tokenFile: conf.TokenFile, tls: conf.TLSConfig, next: first, stamps: map[string]stamp{}}
	for _, f := range []string{c.tls.CAFile, c.tls.CertFile, c.tls.KeyFile} {
		if f != "" {
			c.files = append(c.files, f)
		}
	}
	c.fresh = func() *http.Transport {
		t := first.Clone()
		t.TLSClientConfig = nil // NewHttpClient makes it anew from the files
		return t
	}
	c.look(true)
	return c
}

// RoundTrip sends a request. A request that is forbidden is sent once more if the token file
// has another token by now.
func (c *credentials) RoundTrip(r *http.Request) (*http.Response, error) {
	token, next := c.now(false)
	res, err := next.RoundTrip(withToken(r, token))
	if err != nil || res.StatusCode != http.StatusForbidden || c.tokenFile == "" || r.Body != nil && r.GetBody == nil {
		return res, err
	}
	newer, next := c.now(true)
	if newer == token {
		return res, nil
	}
	again := withToken(r, newer)
	if r.GetBody != nil {
		if again.Body, err = r.GetBody(); err != nil {
			return res, nil
		}
	}
	res.Body.Close()
	return next.RoundTrip(again)
}

func withToken(r *http.Request, token string) *http.Request {
	if token == "" {
		return r
	}
	r = r.Clone(r.Context())
	r.Header.Set("X-Consul-Token", token)
	return r
}

// now returns the token and the transport to use. It looks at the files first, but no more often
// than lookEvery unless always is set.
func (c *credentials) now(always bool) (string, *http.Transport) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if always || time.Since(c.looked) > lookEvery {
		c.look(false)
	}
	return c.token, c.next
}

// look reads files that have changed. A file that cannot be read, perhaps as it is just being
// written, leaves what is in use. The caller holds c.mu, except at the start.
func (c *credentials) look(first bool) {
	c.looked = time.Now()
	if c.tokenFile != "" && (c.changed(c.tokenFile) || first) {
		if b, err := os.ReadFile(c.tokenFile); err == nil && strings.TrimSpace(string(b)) != "" {
			c.token = strings.TrimSpace(string(b))
		}
	}
	moved := false
	for _, f := range c.files {
		moved = c.changed(f) || moved
	}
	if !moved || first {
		return
	}
	t := c.fresh()
	if _, err := api.NewHttpClient(t, c.tls); err != nil { // it sets the transport's TLS
		for _, f := range c.files {
			delete(c.stamps, f) // a pair that does not match yet: again
		}
		return
	}
	c.next.CloseIdleConnections()
	c.next = t
}

func (c *credentials) changed(file string) bool {
	info, err := os.Stat(file)
	if err != nil {
		return false
	}
	now := stamp{info.ModTime(), info.Size()}
	if was, ok := c.stamps[file]; ok && was == now {
		return false
	}
	c.stamps[file] = now
	return true
}

// checkEnvironment refuses values that the library only warns of: it ignores an unreadable
// CONSUL_HTTP_SSL, and takes an unreadable CONSUL_HTTP_SSL_VERIFY for false.
func checkEnvironment() error {
	for _, name := range []string{api.HTTPSSLEnvName, api.HTTPSSLVerifyEnvName} {
		switch v := strings.ToLower(os.Getenv(name)); v {
		case "", "1", "t", "true", "0", "f", "false":
		default:
			return fmt.Errorf("%s %q: want true or false", name, os.Getenv(name))
		}
	}
	return nil
}
