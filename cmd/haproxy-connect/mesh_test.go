package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/tools/txtar"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/cmd/haproxy-connect/internal/scripttest"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/connecttest"
	"github.com/haproxy-connect/haproxy-connect/connect/consul"
	"github.com/haproxy-connect/haproxy-connect/haproxy"
	"github.com/haproxy-connect/haproxy-connect/haproxy/process"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

const meshDomain = "11111111-2222-3333-4444-555555555555.consul"

// meshAgent serves the answers of a case, with roots and a leaf made here.
func meshAgent(t testing.TB, ar *txtar.Archive, service string) *connecttest.Agent {
	a := connecttest.New()
	t.Cleanup(a.Close)
	ca, err := certs.NewAuthority(meshDomain)
	require.NoError(t, err)
	leaf, err := ca.Leaf(service, time.Hour)
	require.NoError(t, err)
	roots, err := json.Marshal(map[string]any{"TrustDomain": meshDomain, "ActiveRootID": "a", "Roots": []any{map[string]any{"ID": "a", "RootCert": ca.CertPEM, "Active": true}}})
	require.NoError(t, err)
	chain, key, _ := strings.Cut(string(leaf.PEM()), "-----BEGIN EC PRIVATE KEY-----")
	pair, err := json.Marshal(map[string]any{"CertPEM": chain, "PrivateKeyPEM": "-----BEGIN EC PRIVATE KEY-----" + key, "Service": service})
	require.NoError(t, err)
	a.Set("/v1/agent/connect/ca/roots", string(roots))
	a.Set("/v1/agent/connect/ca/leaf/"+service, string(pair))
	a.Set("/v1/config/mesh", "[]")
	a.Set("/v1/peerings", "[]")
	a.Set("/v1/agent/connect/authorize", `{"Authorized":false,"Reason":"captured"}`)
	for _, f := range ar.Files {
		if path, ok := strings.CutPrefix(f.Name, "consul/"); ok {
			a.Set("/"+path, string(f.Data))
		}
	}
	return a
}

// TestMesh renders the captured answers of Consul in each file of testdata/mesh and compares
// the result with the one in the file. HAProxy itself checks every configuration.
func TestMesh(t *testing.T) {
	files, err := filepath.Glob("../../testdata/mesh/*.txtar")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			require.NoError(t, err)
			agent := meshAgent(t, ar, "www")
			client, err := consul.NewClient(consul.Config{Addr: agent.Addr(), Snippets: true})
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			var snap *connect.Snapshot
			w := consul.NewSource(client, "www-sidecar-proxy", slog.New(slog.DiscardHandler))
			still := time.AfterFunc(time.Hour, cancel) // when the snapshot has not changed for a while: all was heard
			require.NoError(t, w.Run(ctx, func(s *connect.Snapshot) {
				snap = s
				still.Reset(400 * time.Millisecond)
			}))
			require.NotNil(t, snap, "%+v", w.Feeds())
			r, err := render.New(render.Options{Dir: "/run/x", AccessLog: render.LogText})
			require.NoError(t, err)
			conf, refused, err := r.Render(snap, nil)
			require.NoError(t, err)
			var notices strings.Builder
			for _, n := range snap.Notices {
				require.NotContains(t, n.String(), "\n")
				fmt.Fprintln(&notices, n)
			}
			for _, one := range refused {
				fmt.Fprintln(&notices, one)
			}
			got := map[string]string{"snapshot": snap.Text(), "haproxy.cfg": fewSockets(conf.Text()), "explained": fewSockets(conf.Explained()), "notices": notices.String()}
			for name, text := range conf.Files {
				if filepath.Ext(name) != ".lua" {
					got[name] = text
				}
			}
			for name, live := range conf.Maps {
				got[name] = live.Text()
			}
			for i := range ar.Files {
				f := &ar.Files[i]
				text, ok := got[f.Name]
				switch {
				case !ok:
				case *scripttest.Update:
					f.Data = []byte(text)
				default:
					require.Equal(t, string(f.Data), text)
				}
			}
			if *scripttest.Update {
				require.NoError(t, os.WriteFile(file, txtar.Format(ar), 0o644))
			}
			for version, path := range scripttest.Versions(t) {
				checkConfig(t, version, path, snap)
			}
		})
	}
}

// fewSockets keeps the first two of each run of connector sockets and counts the rest: there are hundreds.
func fewSockets(conf string) string {
	socket := regexp.MustCompile(`^  bind unix@\S+/\d+ id \d+ mode 600$`)
	var out []string
	n := 0
	for line := range strings.Lines(conf) {
		if !socket.MatchString(strings.TrimSuffix(line, "\n")) {
			if n > 2 {
				out = append(out, fmt.Sprintf("  (%d more sockets)\n", n-2))
			}
			n = 0
			out = append(out, line)
			continue
		}
		if n++; n <= 2 {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}

// checkConfig lets HAProxy read what is rendered for its version.
func checkConfig(t *testing.T, version, path string, snap *connect.Snapshot) {
	bin, err := process.Find(t.Context(), path)
	require.NoError(t, err)
	for _, originator := range []render.Originator{render.Lua, render.Go} {
		for _, log := range []render.AccessLog{render.LogOff, render.LogJSON} {
			dir := scripttest.ShortDir(t)
			conf := (&config{threads: 2, maxConn: 4096, accessLog: string(log)}).render(dir, process.Account{}, bin, originator)
			r, err := render.New(conf)
			require.NoError(t, err)
			made, _, err := r.Render(snap, nil)
			require.NoError(t, err)
			for _, sub := range []string{"tls", "maps", "sock"} {
				require.NoError(t, os.Mkdir(filepath.Join(dir, sub), 0o700))
			}
			require.NoError(t, haproxy.WriteFiles(dir, made, nil, func(dir string) error { return os.Mkdir(dir, 0o700) }))
			main := filepath.Join(dir, render.MainFile)
			require.NoError(t, os.WriteFile(main, []byte(made.Text()), 0o600))
			require.NoError(t, bin.Check(t.Context(), main), "HAProxy %s, originator %s, log %s", version, originator, log)
		}
	}
}
