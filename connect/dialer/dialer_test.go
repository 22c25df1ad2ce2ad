package dialer

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// server echoes what it hears, with a service's leaf; read counts the bytes that it heard.
func server(t *testing.T, ca *certs.Authority, service string) (addr string, read *atomic.Int64) {
	leaf, err := ca.Leaf(service, time.Hour)
	require.NoError(t, err)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{leaf.TLS()}, ClientAuth: tls.RequireAnyClientCert})
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	read = &atomic.Int64{}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				n, _ := io.Copy(c, c)
				read.Add(n)
			}()
		}
	}()
	return ln.Addr().String(), read
}

// Bytes reach only a server of the expected identity: no byte reaches a server of another
// service or of another authority.
func TestOnlyTheExpectedServerHearsAByte(t *testing.T) {
	const domain = "11111111-2222-3333-4444-555555555555.consul"
	ca, err := certs.NewAuthority(domain)
	require.NoError(t, err)
	foreign, err := certs.NewAuthority(domain)
	require.NoError(t, err)
	leaf, err := ca.Leaf("www", time.Hour)
	require.NoError(t, err)
	roots, err := ca.Roots()
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	d := New(slog.New(slog.DiscardHandler), nil)
	theirs, err := foreign.Roots()
	require.NoError(t, err)
	d.SetIdentity(map[string]*certs.Leaf{"leaf": leaf}, map[string]*certs.Roots{"roots": roots, "theirs": theirs}, Versions{Min: "1.3"})
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	defer func() {
		cancel()
		require.NoError(t, <-done)
	}()
	dir := t.TempDir()
	want := map[string]Endpoint{}
	heard := map[string]*atomic.Int64{}
	for name, ca := range map[string]*certs.Authority{"api": ca, "other": ca, "foreign": foreign} {
		service := name
		if name == "foreign" {
			service = "api"
		}
		addr, read := server(t, ca, service)
		heard[name] = read
		want[filepath.Join(dir, name)] = Endpoint{Leaf: "leaf", Bundle: "roots", Address: addr, IDs: []string{ca.ID("api").String()}, Timeout: 5 * time.Second}
		if name == "foreign" {
			peer, nobody := want[filepath.Join(dir, name)], want[filepath.Join(dir, name)]
			peer.Bundle, nobody.Bundle = "theirs", "unknown"
			want[filepath.Join(dir, "peer")], want[filepath.Join(dir, "nobody")] = peer, nobody
		}
	}
	require.NoError(t, d.Set(want))
	call := func(name string) string {
		c, err := net.Dial("unix", filepath.Join(dir, name))
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		_, _ = io.WriteString(c, "secret")
		_ = c.(*net.UnixConn).CloseWrite()
		got, _ := io.ReadAll(c)
		return string(got)
	}
	require.Equal(t, "secret", call("api"))
	require.Empty(t, call("other"))
	require.Empty(t, call("foreign"))
	require.Empty(t, call("nobody"))
	require.Zero(t, heard["other"].Load())
	require.Zero(t, heard["foreign"].Load())
	require.Equal(t, "secret", call("peer"), "each endpoint has the roots of its own trust domain")
	// A socket that is not wanted any more is not listened on.
	require.NoError(t, d.Set(map[string]Endpoint{filepath.Join(dir, "api"): want[filepath.Join(dir, "api")]}))
	_, err = net.Dial("unix", filepath.Join(dir, "other"))
	require.Error(t, err)
	require.Equal(t, "secret", call("api"))
}
