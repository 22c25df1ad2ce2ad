package consul

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// buffer keeps a log that others write.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) lines(level string) (out []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for line := range strings.Lines(b.b.String()) {
		if strings.Contains(line, "level="+level) {
			out = append(out, line)
		}
	}
	return out
}

// follow is run with a client and a log of the test's own.
func (m *mesh) follow(c Config) *buffer {
	c.Addr = m.agent.Addr()
	client, err := NewClient(c)
	require.NoError(m.t, err)
	log := &buffer{}
	m.w = NewSource(client, "www-proxy", slog.New(slog.NewTextHandler(log, nil)))
	done := make(chan error, 1)
	ctx := m.t.Context()
	go func() { done <- m.w.Run(ctx, func(s *connect.Snapshot) { m.last.Store(s) }) }()
	m.t.Cleanup(func() { require.NoError(m.t, <-done) })
	return log
}

// A token file that has changed is read again: whoever rotates tokens deletes the old one.
func TestTokenFileIsReadAgain(t *testing.T) {
	m := newMesh(t)
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte("first\n"), 0o600))
	m.agent.Token("first")
	log := m.follow(Config{TokenFile: file})
	m.until("two endpoints", count(2))
	require.NoError(t, os.WriteFile(file, []byte("the second\n"), 0o600))
	m.agent.Token("the second")
	m.endpoints("passing", 1, 2, 3)
	m.until("three endpoints", count(3))
	require.Empty(t, log.lines("WARN"))
	// A token that is gone is named as the reason, once.
	m.agent.Token("third")
	require.Eventually(t, func() bool { return len(log.lines("WARN")) == 1 }, 10*time.Second, 5*time.Millisecond)
	require.Contains(t, log.lines("WARN")[0], "it does not exist, or not any more")
	require.NoError(t, os.WriteFile(file, []byte("third"), 0o600))
	m.endpoints("passing", 1)
	m.until("one endpoint", count(1))
}

// Watches that are always cut after the same time ask again with a shorter wait, and log nothing.
func TestCutWatches(t *testing.T) {
	m := newMesh(t)
	m.agent.CutAfter(1200 * time.Millisecond)
	log := m.follow(Config{})
	m.until("two endpoints", count(2))
	require.Eventually(t, func() bool { return time.Duration(m.w.client.wait.Load()) == shortest }, 20*time.Second, 5*time.Millisecond)
	m.endpoints("passing")
	m.until("none, and none is held", count(0))
	require.Zero(t, m.w.Held())
	require.Empty(t, log.lines("WARN"))
	require.Empty(t, log.lines("INFO"))
	for _, f := range m.w.Feeds() {
		require.Zero(t, f.Errors, f.Name)
	}
	require.Less(t, m.agent.Asked("/v1/agent/connect/ca/roots"), 100, "no flood")
}

// An agent that goes away is one line in the log, however many watches meet it, and one more
// when it is back.
func TestAgentAwayIsOneLine(t *testing.T) {
	m := newMesh(t)
	log := m.follow(Config{})
	m.until("two endpoints", count(2))
	m.agent.Fail(503)
	require.Eventually(t, func() bool {
		n := 0
		for _, f := range m.w.Feeds() {
			if f.Err != "" {
				n++
			}
		}
		return n >= 6
	}, 10*time.Second, 5*time.Millisecond)
	require.Len(t, log.lines("WARN"), 1, "%s", log.lines("WARN"))
	require.NotContains(t, log.lines("WARN")[0], "http://")
	m.agent.Fail(0)
	require.Eventually(t, func() bool { return len(log.lines("INFO")) > 0 }, 40*time.Second, 5*time.Millisecond)
	require.Eventually(t, func() bool {
		for _, f := range m.w.Feeds() {
			if f.Err != "" {
				return false
			}
		}
		return true
	}, 40*time.Second, 5*time.Millisecond)
	require.Len(t, log.lines("INFO"), 1, "%s", log.lines("INFO"))
}

// A service name that no certificate can have is logged as the reason.
func TestNamesThatSPIFFEDoesNotAllow(t *testing.T) {
	for _, name := range []string{"web:80", "we b", "über", "*web", ".."} {
		m := newMesh(t)
		m.agent.Set("/v1/agent/service/www-proxy", fmt.Sprintf(`{"Kind":"connect-proxy","ID":"www-proxy","Port":21000,"Datacenter":"dc1","ContentHash":"1",
			"Proxy":{"DestinationServiceName":%q,"LocalServicePort":8080}}`, name))
		log := m.follow(Config{})
		require.Eventually(t, func() bool { return len(log.lines("WARN")) > 0 }, 10*time.Second, time.Millisecond)
		require.Contains(t, log.lines("WARN")[0], "cannot be part of a SPIFFE ID")
		require.Contains(t, log.lines("WARN")[0], "register the service under another name")
		require.Error(t, Registration{Service: name, Port: 1}.Validate())
	}
	for _, name := range []string{"-x", "-", "--", "-i", "-f"} {
		require.NoError(t, Registration{Service: name, Port: 1}.Validate())
	}
}

// Instances with a host name are called at its addresses.
func TestHostNames(t *testing.T) {
	m := newMesh(t)
	m.agent.Set("/v1/health/connect/db", `[{"Node":{"Node":"n","Address":"10.0.0.1"},"Service":{"ID":"db1","Address":"localhost","Port":20001,"Weights":{"Passing":1,"Warning":1}}},
		{"Node":{"Node":"n","Address":"10.0.0.1"},"Service":{"ID":"db2","Address":"10.0.0.7","Port":20002,"Weights":{"Passing":1,"Warning":1}}},
		{"Node":{"Node":"n","Address":"10.0.0.1"},"Service":{"ID":"db3","Address":"nobody.invalid","Port":20003,"Weights":{"Passing":1,"Warning":1}}}]`)
	log := m.follow(Config{})
	s := m.until("addresses of localhost", func(s *connect.Snapshot) bool {
		for _, e := range target(s, 0).Endpoints {
			if e.Address == "127.0.0.1" && e.ID == "db1" {
				return true
			}
		}
		return false
	})
	for _, e := range target(s, 0).Endpoints {
		require.True(t, isAddress(e.Address), e.Address)
		require.NotEqual(t, "db3", e.ID)
	}
	require.Eventually(t, func() bool { return len(log.lines("WARN")) > 0 }, 20*time.Second, 5*time.Millisecond)
	require.Contains(t, log.lines("WARN")[0], "nobody.invalid")
}

// If ACLs hide services from the token, the error says so, not just that a service is missing.
func TestHiddenByACLs(t *testing.T) {
	m := newMesh(t)
	m.agent.Set("/v1/agent/services", `{}`)
	client, err := NewClient(Config{Addr: m.agent.Addr(), Token: "powerless"})
	require.NoError(t, err)
	_, err = client.Lookup(t.Context(), Selector{SidecarFor: "web"})
	require.ErrorIs(t, err, ErrNotRegistered)
	require.NotContains(t, err.Error(), "ACL")
	m.agent.Header("X-Consul-Default-Acl-Policy", "deny")
	_, err = client.Lookup(t.Context(), Selector{SidecarFor: "web"})
	require.NotContains(t, err.Error(), "ACL")
	m.agent.Header("X-Consul-Results-Filtered-By-Acls", "true")
	_, err = client.Lookup(t.Context(), Selector{SidecarFor: "web"})
	require.ErrorIs(t, err, ErrNotRegistered)
	require.ErrorContains(t, err, "hidden by ACLs")
	m.agent.Header("X-Consul-Results-Filtered-By-Acls", "false")
	client, err = NewClient(Config{Addr: m.agent.Addr()})
	require.NoError(t, err)
	_, err = client.Lookup(t.Context(), Selector{SidecarFor: "web"})
	require.ErrorContains(t, err, "there is no token")
}

func TestExtensionsAreNamed(t *testing.T) {
	m := newMesh(t)
	m.agent.Set("/v1/config/service-defaults/www", `{"Kind":"service-defaults","Name":"www","EnvoyExtensions":[{"Name":"builtin/lua"}]}`)
	m.follow(Config{})
	m.until("a notice", func(s *connect.Snapshot) bool {
		for _, n := range s.Notices {
			if n.Key == "EnvoyExtensions" && n.Value == "builtin/lua" {
				return true
			}
		}
		return false
	})
}

// Blocks of HCL arrive as lists of one.
func TestListsOfOne(t *testing.T) {
	var n connect.Notices
	service := &api.AgentService{Kind: api.ServiceKindConnectProxy, Port: 21000, Datacenter: "dc1", Proxy: &api.AgentServiceConnectProxyConfig{
		LocalServicePort: 8080, Config: map[string]any{"protocol": []any{"http"}, "local_request_timeout_ms": []any{2000.0}},
		Upstreams: []api.Upstream{{DestinationName: "db", LocalBindPort: 1, Config: map[string]any{
			"connect_timeout_ms":   []any{[]any{700.0}},
			"limits":               []any{map[string]any{"max_connections": []any{3.0}, "max_pending_requests": 4.0}},
			"passive_health_check": []map[string]any{{"interval": []any{"22s"}, "max_failures": 2.0, "max_ejection_percent": []any{50.0}}},
		}}}}}
	in := decodeInbound(service, &n)
	require.Equal(t, connect.HTTP, in.protocol)
	require.Equal(t, 2*time.Second, in.request)
	up := upstreams(service, nil, &n)[0]
	require.Empty(t, n)
	require.Equal(t, 700*time.Millisecond, up.connect)
	require.Equal(t, []int{3, 4}, []int{*up.limits.MaxConnections, *up.limits.MaxPendingRequests})
	require.Equal(t, []any{22 * time.Second, 2, 50}, []any{up.passive.Interval, up.passive.MaxFailures, *up.passive.MaxEjected})
}

// If listeners of one service clash, the public one stays.
func TestOwnListenersClash(t *testing.T) {
	for name, c := range map[string]struct {
		config map[string]any
		paths  []api.ExposePath
		left   []int
	}{
		"unsecured on the public port": {map[string]any{"unsecured_bind_port": 21000.0}, nil, []int{21000}},
		"exposed on the public port":   {nil, []api.ExposePath{{Path: "/m", LocalPathPort: 8080, ListenerPort: 21000}}, []int{21000}},
		"exposed on the unsecured":     {map[string]any{"unsecured_bind_port": 9000.0}, []api.ExposePath{{Path: "/m", LocalPathPort: 8080, ListenerPort: 9000}}, []int{21000, 9000}},
		"apart":                        {map[string]any{"unsecured_bind_port": 9000.0}, []api.ExposePath{{Path: "/m", LocalPathPort: 8080, ListenerPort: 9001}}, []int{21000, 9000, 9001}},
	} {
		var n connect.Notices
		in := decodeInbound(&api.AgentService{Port: 21000, Proxy: &api.AgentServiceConnectProxyConfig{LocalServicePort: 8080, Config: c.config, Expose: api.ExposeConfig{Paths: c.paths}}}, &n)
		var ports []int
		for _, l := range in.binds() {
			ports = append(ports, l.Port)
		}
		require.Equal(t, c.left, ports, name)
		require.Equal(t, name != "apart", len(n) > 0, name)
	}
}

// A CA file that has changed is read again: the agent's certificate is of another CA now.
func TestTLSFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{}`) })
	serve := func(addr string) *httptest.Server {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		require.NoError(t, err)
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			IsCA: true, BasicConstraintsValid: true}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		require.NoError(t, err)
		s := httptest.NewUnstartedServer(h)
		if addr != "" {
			s.Listener.Close()
			require.Eventually(t, func() bool { s.Listener, err = net.Listen("tcp", addr); return err == nil }, 5*time.Second, 10*time.Millisecond)
		}
		s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
		s.StartTLS()
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		require.NoError(t, os.WriteFile(ca, append(text, strings.Repeat("\n", len(addr))...), 0o600)) // of another size
		return s
	}
	first := serve("")
	t.Setenv("CONSUL_HTTP_SSL_VERIFY", "true")
	client, err := NewClient(Config{Addr: first.URL, CAFile: ca})
	require.NoError(t, err)
	ask := func() error {
		_, err := client.Lookup(t.Context(), Selector{SidecarFor: "web"})
		return err
	}
	require.ErrorIs(t, ask(), ErrNotRegistered)
	addr := first.Listener.Addr().String()
	first.Close()
	second := serve(addr)
	defer second.Close()
	require.Eventually(t, func() bool { return errors.Is(ask(), ErrNotRegistered) }, 10*time.Second, 50*time.Millisecond, "%v", ask())
}

// A changed poll_interval takes effect while the upstream stays.
func TestPollIntervalChanges(t *testing.T) {
	m := newMesh(t)
	registration := func(hash, interval string) {
		m.agent.Set("/v1/agent/service/www-proxy", `{"Kind":"connect-proxy","ID":"www-proxy","Port":21000,"Datacenter":"dc1","ContentHash":"`+hash+`",
			"Proxy":{"DestinationServiceName":"www","LocalServicePort":8080,"Upstreams":[{"DestinationType":"prepared_query","DestinationName":"q","LocalBindPort":1,"Config":{"poll_interval":"`+interval+`"}}]}}`)
	}
	registration("1", "1h")
	m.agent.Set("/v1/query/q/execute", `{"Service":"db","Datacenter":"dc1","Nodes":[{"Node":{"Node":"n","Address":"10.0.0.1"},"Service":{"ID":"db1","Service":"db","Port":1}}]}`)
	m.follow(Config{})
	first := m.until("the query was answered", count(1))
	registration("2", "1s")
	require.Eventually(t, func() bool { return m.agent.Asked("/v1/query/q/execute") >= 3 }, 10*time.Second, 5*time.Millisecond)
	require.Same(t, target(first, 0), target(m.last.Load(), 0), "nothing else has changed")
}

// A server that reads its log again after a restart answers from the past: it allows what was
// denied since, and does not know the roots of today. Such answers are not believed, unless the
// server goes on giving them.
func TestThePastIsNotBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewSource(nil, "", slog.New(slog.DiscardHandler))
		w.client = &Client{}
		var now atomic.Uint64
		var failing atomic.Bool
		now.Store(100)
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var heard []uint64
		a := &answer{ctx: ctx}
		a.fetch = func(ctx context.Context, c *cursor) (any, error) {
			if c.index == now.Load() {
				pause(ctx, 100*time.Millisecond) // nothing new
			}
			if failing.Load() {
				return nil, syscall.ECONNREFUSED
			}
			index := now.Load()
			c.advance(&api.QueryMeta{LastIndex: index})
			return index, nil
		}
		go w.follow(a, w.feeds.open("intentions"))
		go func() {
			for u := range w.updates {
				mu.Lock()
				heard = append(heard, u.value.(uint64))
				mu.Unlock()
			}
		}()
		at := func(d time.Duration, want uint64) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			require.Equal(t, want, heard[len(heard)-1])
			require.NotContains(t, heard, uint64(40))
		}
		at(time.Second, 100)
		failing.Store(true)
		at(2*time.Second, 100)
		failing.Store(false)
		now.Store(40) // it reads its log
		at(3*time.Second, 100)
		now.Store(90)
		at(3*time.Second, 100)
		now.Store(101)
		at(2*time.Second, 101)
		now.Store(7) // begun anew
		at(8*time.Second, 101)
		at(4*time.Second, 7)
		now.Store(8)
		at(time.Second, 8)
		cancel()
		close(w.updates)
		synctest.Wait()
	})
}
