package certs

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"time"
)

// Authority is a throw-away certificate authority that signs leaves of the shape
// Consul's CA gives them: EC P-256, empty subject, one critical URI SAN. The
// start-up self-test and the tests use it; nothing of the mesh ever trusts it.
type Authority struct {
	TrustDomain string
	cert        *x509.Certificate
	key         *ecdsa.PrivateKey
	CertPEM     string
	KeyPEM      string // for a test's Consul to sign with
}

// NewAuthority makes a root valid for a year.
func NewAuthority(trustDomain string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	// The key ID is made as Consul makes it (agent/connect, KeyId): Consul's cross-signed root
	// refers to the key by this ID, and OpenSSL finds no issuer with another ID.
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	name := sha256.Sum256(public)
	tmpl := &x509.Certificate{
		SerialNumber: serial(), SubjectKeyId: name[:], Subject: pkix.Name{CommonName: "throw-away " + trustDomain},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:     []*url.URL{{Scheme: "spiffe", Host: trustDomain}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return &Authority{TrustDomain: trustDomain, cert: cert, key: key, KeyPEM: keyPEM,
		CertPEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}, nil
}

func encodeKey(key *ecdsa.PrivateKey) (string, error) {
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw})), nil
}

// Roots is the authority as trusted roots.
func (a *Authority) Roots() (*Roots, error) { return ParseRoots(a.TrustDomain, []string{a.CertPEM}) }

// ID is the identity of a service of this authority's trust domain.
func (a *Authority) ID(service string) SPIFFEID {
	return SPIFFEID{TrustDomain: a.TrustDomain, Partition: "default", Namespace: "default", Datacenter: "dc1", Service: service}
}

// Leaf signs a leaf for one service.
func (a *Authority) Leaf(service string, life time.Duration) (*Leaf, error) {
	u, err := url.Parse(a.ID(service).String())
	if err != nil {
		return nil, err
	}
	chain, key, err := a.Sign([]*url.URL{u}, time.Now().Add(-time.Minute), life)
	if err != nil {
		return nil, err
	}
	return ParseLeaf(chain, key)
}

// Sign makes a certificate with any URIs, dates and DNS names, also ones that must be refused.
func (a *Authority) Sign(uris []*url.URL, from time.Time, life time.Duration, names ...string) (chainPEM, keyPEM string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), NotBefore: from, NotAfter: from.Add(life), URIs: uris, DNSNames: names,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageDataEncipherment | x509.KeyUsageKeyAgreement,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return "", "", err
	}
	if keyPEM, err = encodeKey(key); err != nil {
		return "", "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), keyPEM, nil
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // the kernel's random source does not fail
	}
	return n
}
