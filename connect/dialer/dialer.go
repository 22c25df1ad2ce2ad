// Package dialer is the Go originator: plain bytes on a unix socket in, mutual TLS
// with a server of an exactly expected SPIFFE ID out. It takes the place of the
// connectors inside HAProxy where these cannot be used: same sockets, same rules.
//
// Invariants: no byte of a client leaves before the server's chain was verified
// against the roots and its one URI SAN is one of those expected; a socket that
// names no endpoint is not listened on. It may import certs; only cmd wires it.
package dialer

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// Endpoint is where the bytes of one socket go. Leaf and Bundle are names of those that
// SetIdentity was given.
type Endpoint struct {
	Leaf, Bundle string
	Address      string   // host:port
	IDs          []string // SPIFFE IDs of which the server must have one
	ALPN         string   // "" offers none
	SNI          string   // "" sends none
	Timeout      time.Duration
}

func (e Endpoint) equal(o Endpoint) bool {
	return e.Leaf == o.Leaf && e.Bundle == o.Bundle && e.Address == o.Address && e.ALPN == o.ALPN && e.SNI == o.SNI && e.Timeout == o.Timeout && slices.Equal(e.IDs, o.IDs)
}

// Dialer serves sockets. The zero value is not usable; see New.
type Dialer struct {
	log *slog.Logger
	own func(path string) error

	identity atomic.Pointer[identity]

	mu     sync.Mutex
	ctx    context.Context // of Run; nil before and after
	served map[string]*socket
	wg     sync.WaitGroup
}

type identity struct {
	leaves   map[string]tls.Certificate
	bundles  map[string]*x509.CertPool
	min, max uint16
	ciphers  []uint16
}

type socket struct {
	ln       net.Listener
	endpoint atomic.Pointer[Endpoint]
}

// New makes a dialer. own, if not nil, is called with the path of each new socket, to give the
// socket to the user who may connect to it.
func New(log *slog.Logger, own func(path string) error) *Dialer {
	return &Dialer{log: log, own: own, served: map[string]*socket{}}
}

// Versions are which versions of TLS ("1.0" to "1.3") and which ciphers (names in IANA's
// registry, with commas) may be used. The zero value is TLS 1.2 at least.
type Versions struct{ Min, Max, Ciphers string }

// SetIdentity swaps leaves, bundles and versions; connections made from now on use them.
func (d *Dialer) SetIdentity(leaves map[string]*certs.Leaf, bundles map[string]*certs.Roots, v Versions) {
	numbers := map[string]uint16{"1.0": tls.VersionTLS10, "1.1": tls.VersionTLS11, "1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}
	id := &identity{leaves: map[string]tls.Certificate{}, bundles: map[string]*x509.CertPool{}, min: cmp.Or(numbers[v.Min], tls.VersionTLS12), max: numbers[v.Max]}
	for name, leaf := range leaves {
		id.leaves[name] = leaf.TLS()
	}
	for name, roots := range bundles {
		id.bundles[name] = roots.Pool()
	}
	for _, c := range tls.CipherSuites() {
		if slices.Contains(strings.Split(v.Ciphers, ","), c.Name) {
			id.ciphers = append(id.ciphers, c.ID)
		}
	}
	d.identity.Store(id)
}

// Run serves until ctx ends, then closes everything and returns when the last
// connection has ended.
func (d *Dialer) Run(ctx context.Context) error {
	d.mu.Lock()
	d.ctx = ctx
	for _, s := range d.served {
		d.start(s)
	}
	d.mu.Unlock()
	<-ctx.Done()
	d.mu.Lock()
	d.ctx = nil
	for path, s := range d.served {
		s.ln.Close()
		delete(d.served, path)
	}
	d.mu.Unlock()
	d.wg.Wait()
	return nil
}

// Set serves exactly the wanted sockets, by path. Connections of a socket that is
// not wanted any more live on.
func (d *Dialer) Set(want map[string]Endpoint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for path, e := range want {
		if s := d.served[path]; s != nil {
			if !s.endpoint.Load().equal(e) {
				s.endpoint.Store(&e)
			}
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		ln, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		if err := os.Chmod(path, 0o600); err != nil {
			ln.Close()
			return err
		}
		if d.own != nil {
			if err := d.own(path); err != nil {
				ln.Close()
				return err
			}
		}
		s := &socket{ln: ln}
		s.endpoint.Store(&e)
		d.served[path] = s
		if d.ctx != nil {
			d.start(s)
		}
	}
	for path, s := range d.served {
		if _, ok := want[path]; !ok {
			s.ln.Close()
			delete(d.served, path)
		}
	}
	return nil
}

// start begins to accept connections on a socket. The caller holds d.mu.
func (d *Dialer) start(s *socket) {
	ctx := d.ctx
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		for {
			c, err := s.ln.Accept()
			if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
				return
			}
			if err != nil {
				select { // descriptors ran out: do not spin
				case <-ctx.Done():
					return
				case <-time.After(50 * time.Millisecond):
				}
				continue
			}
			d.wg.Add(1)
			go func() {
				defer d.wg.Done()
				d.serve(ctx, c.(*net.UnixConn), *s.endpoint.Load())
			}()
		}
	}()
}

func (d *Dialer) serve(ctx context.Context, in *net.UnixConn, e Endpoint) {
	defer in.Close()
	out, err := d.dial(ctx, e)
	if err != nil {
		if ctx.Err() == nil {
			var wrong *wrongIdentity
			if errors.As(err, &wrong) {
				d.log.Warn("an upstream showed a wrong identity", "endpoint", e.Address, "error", err, "try", "is the registered address really this service's?")
			} else {
				d.log.Debug("cannot reach an endpoint", "endpoint", e.Address, "error", err)
			}
		}
		return
	}
	defer out.Close()
	stop := context.AfterFunc(ctx, func() { in.Close(); out.Close() })
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := io.Copy(out, in); err != nil {
			out.Close()
			return
		}
		_ = out.CloseWrite()
	}()
	if _, err := io.Copy(in, out); err != nil {
		in.Close()
	} else {
		_ = in.CloseWrite()
	}
	<-done
}

// wrongIdentity is the error of a server whose chain is good, but whose SPIFFE ID is not expected.
type wrongIdentity struct{ got string }

func (w *wrongIdentity) Error() string { return fmt.Sprintf("it presented %q", w.got) }

func (d *Dialer) dial(ctx context.Context, e Endpoint) (*tls.Conn, error) {
	id := d.identity.Load()
	if id == nil {
		return nil, errors.New("no identity yet")
	}
	leaf, roots := id.leaves[e.Leaf], id.bundles[e.Bundle]
	if roots == nil || len(leaf.Certificate) == 0 {
		return nil, fmt.Errorf("no leaf %q or no roots %q yet", e.Leaf, e.Bundle)
	}
	ctx, cancel := context.WithTimeout(ctx, e.Timeout)
	defer cancel()
	conf := &tls.Config{
		Certificates: []tls.Certificate{leaf}, MinVersion: id.min, MaxVersion: id.max, CipherSuites: id.ciphers, ServerName: e.SNI,
		// crypto/tls does not compare names in URIs. VerifyConnection does the whole
		// verification; it would for resumed sessions, too, but there are none.
		InsecureSkipVerify:     true,
		SessionTicketsDisabled: true,
		VerifyConnection:       func(cs tls.ConnectionState) error { return verify(cs, roots, e.IDs) },
	}
	if e.ALPN != "" {
		conf.NextProtos = []string{e.ALPN}
	}
	nd := net.Dialer{KeepAlive: 30 * time.Second}
	raw, err := nd.DialContext(ctx, "tcp", e.Address)
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, conf)
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

func verify(cs tls.ConnectionState, roots *x509.CertPool, ids []string) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("no server certificate")
	}
	leaf, between := cs.PeerCertificates[0], x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		between.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return err
	}
	id, err := certs.FromCertificate(leaf)
	if err != nil {
		return err
	}
	if !slices.Contains(ids, id.String()) {
		return &wrongIdentity{got: id.String()}
	}
	return nil
}
