package consul

import (
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// Every way to the agent: plain, HTTPS with a private CA, a unix socket; the token
// from flag, file and environment.
func TestWaysToTheAgent(t *testing.T) {
	token := ""
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token = r.Header.Get("X-Consul-Token")
		_, _ = w.Write([]byte(`{"p":{"ID":"p","Kind":"connect-proxy","Proxy":{"DestinationServiceID":"web"}}}`))
	})
	dir := t.TempDir()
	plain, secure := httptest.NewServer(h), httptest.NewTLSServer(h)
	defer plain.Close()
	defer secure.Close()
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	require.NoError(t, err)
	srv := &http.Server{Handler: h}
	go func() { _ = srv.Serve(ln) }()
	defer srv.Close()
	ca := filepath.Join(dir, "ca.pem")
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600))
	file := filepath.Join(dir, "token")
	require.NoError(t, os.WriteFile(file, []byte("from-file\n"), 0o600))

	look := func(c Config) error {
		client, err := NewClient(c)
		require.NoError(t, err)
		id, err := client.Lookup(t.Context(), Selector{SidecarFor: "web"})
		if err == nil {
			require.Equal(t, "p", id)
		}
		return err
	}
	require.NoError(t, look(Config{Addr: plain.URL, Token: "from-flag"}))
	require.Equal(t, "from-flag", token)
	require.NoError(t, look(Config{Addr: plain.Listener.Addr().String(), TokenFile: file}))
	require.Equal(t, "from-file", token)
	require.NoError(t, look(Config{Addr: "unix://" + ln.Addr().String()}))
	require.NoError(t, look(Config{Addr: secure.URL, CAFile: ca}))
	require.NoError(t, look(Config{Addr: secure.URL, CAFile: ca, TLSServerName: "example.com"}))
	require.Error(t, look(Config{Addr: secure.URL}), "a CA we do not know")
	require.Error(t, look(Config{Addr: secure.URL, CAFile: ca, TLSServerName: "other.test"}))

	t.Setenv("CONSUL_HTTP_ADDR", plain.URL)
	t.Setenv("CONSUL_HTTP_TOKEN", "from-environment")
	require.NoError(t, look(Config{}))
	require.Equal(t, "from-environment", token)
	require.NoError(t, look(Config{Token: "flag-wins"}))
	require.Equal(t, "flag-wins", token)
	t.Setenv("CONSUL_HTTP_ADDR", secure.URL)
	t.Setenv("CONSUL_CACERT", ca)
	require.NoError(t, look(Config{}))
	t.Setenv("CONSUL_HTTP_TOKEN_FILE", filepath.Join(dir, "none"))
	_, err = NewClient(Config{})
	require.ErrorContains(t, err, "CONSUL_HTTP_TOKEN_FILE")
}
