package certs

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const td = "11111111-2222-3333-4444-555555555555.consul"

func TestParseID(t *testing.T) {
	id, err := ParseID("spiffe://" + td + "/ns/default/dc/dc1/svc/web")
	require.NoError(t, err)
	require.Equal(t, SPIFFEID{TrustDomain: td, Partition: "default", Namespace: "default", Datacenter: "dc1", Service: "web"}, id)
	require.Equal(t, "web.default.dc1.internal."+td, id.SNI(""))
	require.Equal(t, "v1.web.default.dc1.internal."+td, id.SNI("v1"))
	id, err = ParseID("spiffe://" + td + "/ap/east/ns/default/dc/dc1/svc/web")
	require.NoError(t, err)
	require.Equal(t, "east", id.Partition)
	require.Equal(t, "web.default.east.dc1.internal-v1."+td, id.SNI(""))
	gateway := MeshGateway(td, "dc1")
	require.Equal(t, "spiffe://"+td+"/gateway/mesh/dc/dc1", gateway.String())
	for _, text := range []string{gateway.String(), "spiffe://" + td + "/ap/default/gateway/mesh/dc/dc1"} {
		id, err = ParseID(text)
		require.NoError(t, err)
		require.Equal(t, gateway, id)
		require.True(t, id.Gateway())
	}
	for _, bad := range []string{
		"", "spiffe://", "spiffe://" + td, "spiffe://" + td + "/", "http://" + td + "/ns/default/dc/dc1/svc/web",
		"spiffe://" + td + "/ns/default/dc/dc1/svc/", "spiffe://" + td + "/ns/default/dc/dc1/svc/web/", "spiffe://" + td + "/ns/default/dc/dc1/svc/web/x",
		"spiffe://" + td + "/ns/default/dc/dc1/svc/w%65b", "spiffe://" + td + "/ns/default/dc/dc1/svc/web?x", "spiffe://" + td + "/ns/default/dc/dc1/svc/web#x",
		"spiffe://user@" + td + "/ns/default/dc/dc1/svc/web", "spiffe://" + td + ":1/ns/default/dc/dc1/svc/web", "SPIFFE://" + td + "/ns/default/dc/dc1/svc/web",
		"spiffe://" + strings.ToUpper("a"+td) + "/ns/default/dc/dc1/svc/web", "spiffe://" + td + "//ns/default/dc/dc1/svc/web",
		"spiffe://" + td + "/ns/default/dc/../svc/web", "spiffe://" + td + "/gateway/mesh/dc/", "spiffe://" + td + "/gateway/mesh/dc/dc1/svc/x", "spiffe://" + td + "/gateway/api/dc/dc1", "spiffe://" + td + "/ap//gateway/mesh/dc/dc1", "spiffe://" + td + "/ns/default/dc/dc1/svc/web\n",
		"spiffe://" + td + "/ns/default/dc/dc1/svc/" + strings.Repeat("x", 3000),
	} {
		_, err := ParseID(bad)
		require.Error(t, err, bad)
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("spiffe://" + td + "/ns/default/dc/dc1/svc/web")
	f.Add("spiffe://" + td + "/ap/x/ns/default/dc/dc1/svc/web")
	f.Add("spiffe://a/ns/%2e/dc/a/svc/b")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err != nil {
			return
		}
		// An accepted ID has one spelling: no service has two names, no two services share a name.
		back := id.String()
		if back != s && s != strings.Replace(back, td, td, 1) && !strings.Contains(s, "/ap/default/") {
			t.Fatalf("%q reads as %q", s, back)
		}
		if strings.ContainsAny(s, " \n\r\t\"'%\\|") {
			t.Fatalf("accepted %q", s)
		}
	})
}

func TestLeafAndRoots(t *testing.T) {
	ca, err := NewAuthority(td)
	require.NoError(t, err)
	leaf, err := ca.Leaf("web", time.Hour)
	require.NoError(t, err)
	require.Equal(t, "web", leaf.ID.Service)
	require.InDelta(t, 1, leaf.Remaining(time.Now().Add(-time.Minute)), 0.05)
	require.Negative(t, leaf.Remaining(time.Now().Add(2*time.Hour)))
	require.NotContains(t, leaf.String(), "KEY")
	require.NotContains(t, string(leaf.PEM()), "\n\n")

	other, err := ca.Leaf("web", time.Hour)
	require.NoError(t, err)
	_, err = ParseLeaf(leaf.ChainPEM, other.keyPEM)
	require.Error(t, err)
	require.NotContains(t, err.Error(), "KEY-----")
	_, err = ParseLeaf("junk", "junk")
	require.Error(t, err)

	one, _ := url.Parse(ca.ID("web").String())
	two, _ := url.Parse(ca.ID("db").String())
	for _, uris := range [][]*url.URL{nil, {one, two}} {
		chain, key, err := ca.Sign(uris, time.Now(), time.Hour)
		require.NoError(t, err)
		_, err = ParseLeaf(chain, key)
		require.ErrorContains(t, err, "URI SANs")
	}

	roots, err := ca.Roots()
	require.NoError(t, err)
	second, err := NewAuthority(td)
	require.NoError(t, err)
	both, err := ParseRoots(td, []string{second.CertPEM, "text before\n" + ca.CertPEM + "\n\ntext after", ca.CertPEM})
	require.NoError(t, err)
	require.Equal(t, 2, both.Count)
	swapped, err := ParseRoots(td, []string{ca.CertPEM, second.CertPEM})
	require.NoError(t, err)
	require.Equal(t, both.PEM, swapped.PEM, "order does not matter")
	require.NotEqual(t, roots.Fingerprint, both.Fingerprint)
	for _, bad := range [][]string{nil, {""}, {"junk"}, {leaf.keyPEM}} {
		_, err = ParseRoots(td, bad)
		require.Error(t, err)
	}
	_, err = ParseRoots("not a domain", []string{ca.CertPEM})
	require.Error(t, err)
}

// FromCertificate refuses spellings that crypto/x509 hides when it parses the URI.
func TestSpellingsOfAnIdentity(t *testing.T) {
	ca, err := NewAuthority(td)
	require.NoError(t, err)
	plain := ca.ID("web").String()
	for spelling, good := range map[string]bool{
		plain: true, "SPIFFE" + strings.TrimPrefix(plain, "spiffe"): false, plain + "#": false, plain + "?": false,
		strings.Replace(plain, "web", "%77eb", 1): false, strings.Replace(plain, "://", "://u@", 1): false,
	} {
		san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(spelling)}})
		require.NoError(t, err)
		_, err = FromCertificate(&x509.Certificate{Extensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}}})
		require.Equal(t, good, err == nil, "%s: %v", spelling, err)
	}
	_, err = FromCertificate(&x509.Certificate{Extensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: []byte{0x30, 0x05, 0x86}}}})
	require.ErrorContains(t, err, "malformed")
}

func TestServiceName(t *testing.T) {
	for name, good := range map[string]bool{"web": true, "-x": true, "-": true, "a.b_C-9": true, "...": true,
		"": false, ".": false, "..": false, "web:80": false, "we b": false, "über": false, "*web": false, "a/b": false} {
		require.Equal(t, good, ServiceName(name) == nil, name)
	}
}

func TestWriteFileReplacesWithItsMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(path, []byte("old"), 0o644))
	require.NoError(t, WriteFile(path, []byte("new"), 0o600))
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, entries, 1, "no temporary file stays")
	require.Error(t, WriteFile(filepath.Join(path, "no"), nil, 0o600))
}
