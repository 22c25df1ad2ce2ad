// Package selftest proves on the actual binary that HAProxy, with the configuration that render
// makes, gives no byte to an impostor and lets no caller in who may not come in.
//
// Invariants: it uses what render makes and nothing else; whatever it starts has ended when Run
// returns, and listens only on loopback and in its own directory. It may import connect, certs,
// intentions, haproxy and haproxy/render; cmd uses it.
package selftest

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

// ErrInsecure means that this HAProxy fails a check of the self-test.
var ErrInsecure = errors.New("self-test failed")

// Run runs the configuration that render makes on the actual binary, against
// servers of a throw-away mesh on loopback, and proves: an impostor with another
// service's valid certificate reads no byte, its honest twin is served, a caller
// without a certificate is refused, and so is every caller while no agent answers.
//
// dir is an empty run directory of its own. run starts HAProxy with a file and
// returns when it serves; stop ends it.
func Run(ctx context.Context, dir string, o render.Options, socketDir func(string) error,
	run func(ctx context.Context, file string) (stop func(), err error)) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	mesh, err := newThrowAway()
	if err != nil {
		return err
	}
	defer mesh.close()
	snap := mesh.snapshot(dir)
	o.Dir, o.AccessLog = dir, render.LogOff
	o.AgentTimeout = 50 * time.Millisecond // no agent answers here, and some versions wait for it this long
	r, err := render.New(o)
	if err != nil {
		return err
	}
	conf, refused, err := r.Render(snap, nil)
	if err != nil {
		return err
	}
	if len(refused) > 0 {
		return refused[0]
	}
	if err := haproxy.WriteFiles(dir, conf, nil, socketDir); err != nil {
		return err
	}
	file := filepath.Join(dir, render.MainFile)
	if err := os.WriteFile(file, []byte(conf.Text()), 0o600); err != nil {
		return err
	}
	stop, err := run(ctx, file)
	if err != nil {
		return fmt.Errorf("self-test: %w", err)
	}
	defer stop()

	var wg sync.WaitGroup
	errs := make(chan error, 8)
	check := func(what string, f func() error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := f(); err != nil {
				errs <- fmt.Errorf("%w: %s: %w", ErrInsecure, what, err)
			}
		}()
	}
	sock := func(name string) string { return filepath.Join(dir, name) }
	check("an honest tcp server", func() error { return expect(ctx, sock("tcp-honest"), "ping\n", "ping") })
	check("an honest http server", func() error { return expect(ctx, sock("http-honest"), request, "HTTP/1.1 200") })
	check("an impostor in tcp", func() error {
		return mesh.impostor(ctx, &mesh.tcp, sock("tcp-impostor"), strings.Repeat("secret", 10000), "")
	})
	check("an impostor in http", func() error {
		return mesh.impostor(ctx, &mesh.http, sock("http-impostor"), request, "HTTP/1.1 5")
	})
	check("a caller without a certificate", func() error { return mesh.refused(ctx, sock(publicSocket), false) })
	check("a caller while no agent answers", func() error { return mesh.refused(ctx, sock(publicSocket), true) })
	wg.Wait()
	close(errs)
	return <-errs
}

// request is a POST, which HAProxy does not repeat: a refusal comes back at once.
const request = "POST / HTTP/1.1\r\nHost: selftest\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

// publicSocket is where the public listener listens. A free port might have been taken by the
// time HAProxy binds it.
const publicSocket = "callers"

// throwAway is a mesh of two services, honest and impostor; impostor answers at two of the
// addresses where honest is expected.
type throwAway struct {
	ca        *certs.Authority
	roots     *certs.Roots
	leaf      *certs.Leaf
	tcp, http fake // the impostors
	addr      map[string]int
	listeners []net.Listener
}

// fake counts what an impostor got.
type fake struct{ greeted, read atomic.Int64 }

func newThrowAway() (*throwAway, error) {
	ca, err := certs.NewAuthority("00000000-0000-0000-0000-00000000cafe.consul")
	if err != nil {
		return nil, err
	}
	t := &throwAway{ca: ca, addr: map[string]int{}}
	if t.roots, err = ca.Roots(); err != nil {
		return nil, err
	}
	if t.leaf, err = ca.Leaf("selftest", time.Hour); err != nil {
		return nil, err
	}
	for _, s := range []struct {
		name, service string
		count         *fake
		serve         func(c net.Conn)
	}{
		{"tcp-honest", "honest", nil, func(c net.Conn) { _, _ = io.Copy(c, c) }},
		{"http-honest", "honest", nil, answerHTTP},
		{"tcp-impostor", "impostor", &t.tcp, nil},
		{"http-impostor", "impostor", &t.http, nil},
	} {
		leaf, err := ca.Leaf(s.service, time.Hour)
		if err != nil {
			return nil, err
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		t.listeners = append(t.listeners, ln)
		t.addr[s.name] = ln.Addr().(*net.TCPAddr).Port
		conf := &tls.Config{Certificates: []tls.Certificate{leaf.TLS()}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"http/1.1"}}
		go accept(ln, conf, s.count, s.serve)
	}
	return t, nil
}

func accept(ln net.Listener, conf *tls.Config, count *fake, serve func(net.Conn)) {
	for {
		raw, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer raw.Close()
			mine := conf.Clone()
			if count != nil {
				// Counted at the hello: HAProxy may hang up before the handshake ends here.
				mine.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
					count.greeted.Add(1)
					return nil, nil
				}
			}
			c := tls.Server(raw, mine)
			if err := c.Handshake(); err != nil {
				return
			}
			if count == nil {
				serve(c)
				return
			}
			n, _ := io.Copy(io.Discard, c)
			count.read.Add(n)
		}()
	}
}

func answerHTTP(c net.Conn) {
	br := bufio.NewReader(c)
	for {
		line, err := br.ReadString('\n')
		if err != nil {
			return
		}
		if strings.TrimSpace(line) == "" {
			break
		}
	}
	_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
}

func (t *throwAway) close() {
	for _, ln := range t.listeners {
		ln.Close()
	}
}

func (t *throwAway) snapshot(dir string) *connect.Snapshot {
	s := &connect.Snapshot{
		Proxy:   connect.Proxy{ID: "selftest", Service: "selftest", Datacenter: "dc1", TrustDomain: t.ca.TrustDomain},
		Leaves:  map[connect.LeafName]*certs.Leaf{connect.OwnLeaf: t.leaf},
		Bundles: map[connect.BundleName]*certs.Roots{connect.OwnBundle: t.roots},
	}
	bind := func(name string) connect.Bind { return connect.Bind{SocketPath: filepath.Join(dir, name)} }
	add := func(l *connect.Listener, p connect.Protocol, g *connect.Guard, target *connect.Target) {
		group := connect.GroupName("to-" + l.Name)
		l.Branches = []connect.Branch{{Protocol: p, Guard: g, Chain: connect.Direct(group)}}
		target.Name = connect.TargetName(group)
		s.Listeners = append(s.Listeners, l)
		s.Groups = append(s.Groups, &connect.Group{Name: group, Protocol: p, Targets: []connect.TargetName{target.Name}, Connect: 5 * time.Second, Idle: 10 * time.Second})
		s.Targets = append(s.Targets, target)
	}
	add(&connect.Listener{Name: "callers", Role: connect.Public, Bind: bind(publicSocket), Idle: 5 * time.Second}, connect.HTTP,
		&connect.Guard{Leaf: connect.OwnLeaf, Callers: connect.OwnBundle, Policy: &intentions.Policy{}},
		&connect.Target{Dial: connect.Dial{How: connect.App}, Endpoints: []connect.Endpoint{{Name: "app", Address: "127.0.0.1", Port: t.addr["http-honest"]}}})
	for _, name := range []string{"http-honest", "http-impostor", "tcp-honest", "tcp-impostor"} {
		p := connect.TCP
		if strings.HasPrefix(name, "http") {
			p = connect.HTTP
		}
		add(&connect.Listener{Name: name, Role: connect.Local, Bind: bind(name), Idle: 25 * time.Second}, p, nil,
			&connect.Target{Service: "honest", Dial: connect.Dial{IDs: []certs.SPIFFEID{t.ca.ID("honest")}, Leaf: connect.OwnLeaf, Bundle: connect.OwnBundle},
				Endpoints: []connect.Endpoint{{Name: name, Address: "127.0.0.1", Port: t.addr[name], Weight: 1}}})
	}
	return s
}

func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	return c, c.SetDeadline(deadline)
}

// expect sends a text and fails unless the answer begins with want.
func expect(ctx context.Context, path, send, want string) error {
	c, err := dialUnix(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, send); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	if string(got) != want {
		return fmt.Errorf("answered %q, want %q", got, want)
	}
	return nil
}

// impostor sends a text to an impostor. It fails unless the connection ends with an error page
// at most, and the impostor was greeted but read nothing.
func (t *throwAway) impostor(ctx context.Context, f *fake, path, send, most string) error {
	c, err := dialUnix(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	_, _ = io.WriteString(c, send) // may be cut short, which is right
	got, err := io.ReadAll(c)
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("the connection to an impostor stays open")
	}
	if len(got) > 0 && (most == "" || !strings.HasPrefix(string(got), most)) {
		return fmt.Errorf("the client got %.60q", got)
	}
	if f.greeted.Load() == 0 {
		return errors.New("the impostor was never reached: the test proves nothing")
	}
	if n := f.read.Load(); n != 0 {
		return fmt.Errorf("the impostor read %d bytes", n)
	}
	return nil
}

// refused fails unless the public listener turns a caller away: with a certificate by a 403,
// without one by no answer at all.
func (t *throwAway) refused(ctx context.Context, path string, withCert bool) error {
	conf := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} // the server is not what is tested
	if withCert {
		conf.Certificates = []tls.Certificate{t.leaf.TLS()}
	}
	raw, err := dialUnix(ctx, path)
	if err != nil {
		return err
	}
	defer raw.Close()
	c := tls.Client(raw, conf)
	if err := c.HandshakeContext(ctx); err != nil {
		if withCert {
			return fmt.Errorf("the handshake fails with a good certificate: %w", err)
		}
		return nil // refused in the handshake
	}
	if _, err := io.WriteString(c, request); err != nil {
		return nil
	}
	got, _ := io.ReadAll(c)
	if withCert && !strings.HasPrefix(string(got), "HTTP/1.1 403") {
		return fmt.Errorf("answered %.60q, want a 403", got)
	}
	if !withCert && len(got) > 0 {
		return fmt.Errorf("answered %.60q, want no answer", got)
	}
	return nil
}
