// Package certs holds what proves identity in the mesh: the leaf certificate
// and key of our own service, the roots that are trusted, SPIFFE IDs as Consul
// writes them, and the files in which HAProxy reads all three.
//
// Invariants: a Leaf and a Roots are validated when they are made and never
// change afterwards. A key is written only through WriteFile with mode 0600,
// and no String or error of this package contains one. SPIFFE IDs are parsed by
// go-spiffe and compared whole, never as substrings.
//
// Everything may import it; it imports nothing of ours.
package certs

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Leaf is a certificate chain with its private key, the leaf first.
// The zero value proves nothing and is refused by the renderer.
type Leaf struct {
	ID          SPIFFEID
	ChainPEM    string // leaf, then the intermediates a peer may need
	keyPEM      string
	NotBefore   time.Time
	NotAfter    time.Time
	Serial      string   // hexadecimal, as `show ssl cert` prints it (upper case)
	Fingerprint string   // SHA-256 of the whole chain, hexadecimal
	Names       []string // of a pair: its common name and its DNS names
	pair        tls.Certificate
}

// ParsePair reads a certificate of any other purpose than the mesh's, with its key; it has no ID.
// The error never quotes the key.
func ParsePair(chainPEM, keyPEM string) (*Leaf, error) {
	l, cert, err := parse(chainPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	l.Names = cert.DNSNames
	if name := cert.Subject.CommonName; name != "" && !slices.Contains(l.Names, name) {
		l.Names = append([]string{name}, l.Names...)
	}
	return l, nil
}

// ParseLeaf checks that chain and key belong together, that the leaf carries
// exactly one SPIFFE ID, and takes its dates. The error never quotes the key.
func ParseLeaf(chainPEM, keyPEM string) (*Leaf, error) {
	l, cert, err := parse(chainPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	if l.ID, err = FromCertificate(cert); err != nil {
		return nil, fmt.Errorf("leaf certificate: %w", err)
	}
	return l, nil
}

// parse reads a chain and its key, and checks that they belong together.
func parse(chainPEM, keyPEM string) (*Leaf, *x509.Certificate, error) {
	chain, err := normalizePEM(chainPEM, "CERTIFICATE")
	if err != nil {
		return nil, nil, fmt.Errorf("leaf certificate: %w", err)
	}
	key, err := normalizePEM(keyPEM, "PRIVATE KEY")
	if err != nil {
		return nil, nil, errors.New("leaf key: not a PEM private key")
	}
	pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
	if err != nil {
		return nil, nil, fmt.Errorf("leaf certificate and key: %w", err)
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return nil, nil, fmt.Errorf("leaf certificate: %w", err)
	}
	pair.Leaf = cert
	sum := sha256.Sum256([]byte(chain))
	return &Leaf{
		ChainPEM: chain, keyPEM: key,
		NotBefore: cert.NotBefore, NotAfter: cert.NotAfter,
		Serial:      strings.ToUpper(hex.EncodeToString(cert.SerialNumber.Bytes())),
		Fingerprint: hex.EncodeToString(sum[:]),
		pair:        pair,
	}, cert, nil
}

// PEM is chain and key in one block without blank lines, the form that both the
// file and HAProxy's `set ssl cert` payload need.
func (l *Leaf) PEM() []byte { return []byte(l.ChainPEM + l.keyPEM) }

// TLS is the leaf for crypto/tls.
func (l *Leaf) TLS() tls.Certificate { return l.pair }

// Verify checks the chain against the roots, as of now.
func (l *Leaf) Verify(r *Roots) error {
	between := x509.NewCertPool()
	for _, der := range l.pair.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(c)
		}
	}
	_, err := l.pair.Leaf.Verify(x509.VerifyOptions{Roots: r.pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err
}

// Remaining is the part of the leaf's life that is left, from 1 down to 0, and
// negative after its end.
func (l *Leaf) Remaining(now time.Time) float64 {
	life := l.NotAfter.Sub(l.NotBefore)
	if life <= 0 {
		return 0
	}
	return float64(l.NotAfter.Sub(now)) / float64(life)
}

// String names the leaf without its key.
func (l *Leaf) String() string {
	if l == nil {
		return "no leaf"
	}
	return fmt.Sprintf("leaf %s serial %s until %s", l.ID, l.Serial, l.NotAfter.UTC().Format(time.RFC3339))
}

// Roots are all certificate authorities of one trust domain that may have
// signed a peer: the active one and every other that is still listed.
type Roots struct {
	TrustDomain string
	PEM         string // every root, sorted by fingerprint, no blank lines
	Fingerprint string // SHA-256 of PEM, hexadecimal
	Count       int
	List        []Root // sorted by NotAfter
	pool        *x509.CertPool
}

// Root describes one root for people.
type Root struct {
	Name     string
	NotAfter time.Time
}

// ParseRoots reads the PEM of each root. An entry without a certificate is an error, and so
// is an empty list: trusting nothing must never look like trusting anything.
func ParseRoots(trustDomain string, pems []string) (*Roots, error) {
	if _, err := ParseTrustDomain(trustDomain); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var blocks []string
	var list []Root
	pool := x509.NewCertPool()
	for i, p := range pems {
		text, err := normalizePEM(p, "CERTIFICATE")
		if err != nil {
			return nil, fmt.Errorf("root %d: %w", i+1, err)
		}
		for rest := []byte(text); len(rest) > 0; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("root %d: %w", i+1, err)
			}
			one := string(pem.EncodeToMemory(block))
			if !seen[one] {
				seen[one] = true
				blocks = append(blocks, one)
				pool.AddCert(cert)
				list = append(list, Root{cert.Subject.CommonName, cert.NotAfter})
			}
		}
	}
	if len(blocks) == 0 {
		return nil, errors.New("no root certificate")
	}
	slices.Sort(blocks)
	slices.SortFunc(list, func(a, b Root) int { return cmp.Or(a.NotAfter.Compare(b.NotAfter), strings.Compare(a.Name, b.Name)) })
	all := strings.Join(blocks, "")
	sum := sha256.Sum256([]byte(all))
	return &Roots{TrustDomain: trustDomain, PEM: all, Fingerprint: hex.EncodeToString(sum[:]), Count: len(blocks), List: list, pool: pool}, nil
}

// Includes reports whether every root of o is still one of these.
func (r *Roots) Includes(o *Roots) bool {
	if r.Fingerprint == o.Fingerprint {
		return true
	}
	for block := range strings.SplitAfterSeq(o.PEM, "-----END CERTIFICATE-----\n") {
		if !strings.Contains(r.PEM, block) {
			return false
		}
	}
	return true
}

// Pool is the roots for crypto/x509.
func (r *Roots) Pool() *x509.CertPool { return r.pool }

// normalizePEM re-encodes blocks whose type ends in kind, and refuses any other block. Text
// between blocks, which a hostile writer may use for something else, is dropped.
func normalizePEM(in, kind string) (string, error) {
	var out bytes.Buffer
	for rest := []byte(in); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if !strings.HasSuffix(block.Type, kind) {
			return "", fmt.Errorf("a PEM block is %q, not %s", block.Type, kind)
		}
		if err := pem.Encode(&out, &pem.Block{Type: block.Type, Bytes: block.Bytes}); err != nil {
			return "", err
		}
	}
	if out.Len() == 0 {
		return "", fmt.Errorf("no PEM block of type %s", kind)
	}
	return out.String(), nil
}

// KeyKind names the key's algorithm for the status page.
func (l *Leaf) KeyKind() string {
	switch k := l.pair.PrivateKey.(type) {
	case *ecdsa.PrivateKey:
		return "EC " + k.Params().Name
	case *rsa.PrivateKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PrivateKey:
		return "Ed25519"
	}
	return "unknown"
}
