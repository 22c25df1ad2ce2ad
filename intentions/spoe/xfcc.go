package spoe

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"regexp"
	"strings"
)

const (
	maxXFCC      = 6 << 10 // of one caller; HAProxy writes it into a header of each request
	maxForwarded = 1 << 20 // bytes of it that a connection of HAProxy keeps
)

// forward finds or makes the action that sets VarXFCC.
func (c *conn) forward(der, chain []byte, source string) []byte {
	key := c.digest(der, chain)
	if action, ok := c.forwarded[key]; ok {
		return action
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil // cannot happen: only a caller with a parsed certificate is allowed
	}
	action := appendSetVar(nil, scopeSession, VarXFCC, xfcc(cert, chain, source))
	c.forwarded[key] = action
	c.kept += len(key) + len(action)
	return action
}

// hostName is a DNS name that cannot end an element of the header, or begin another: a
// CA signs whatever a caller writes into its request.
var hostName = regexp.MustCompile(`^[A-Za-z0-9.*_-]{1,253}$`)

// xfcc returns Envoy's element of X-Forwarded-Client-Cert from Hash on (Envoy's docs:
// config/http/http_conn_man/headers), for a caller whose chain HAProxy has verified. If the
// element would be longer than maxXFCC, it has only the caller's digest and identity.
func xfcc(cert *x509.Certificate, chain []byte, uri string) string {
	sum := sha256.Sum256(cert.Raw)
	var b strings.Builder
	fmt.Fprintf(&b, `Hash=%x;Cert="%s";Chain="`, sum, encoded(cert.Raw))
	b.WriteString(encoded(cert.Raw))
	if list, err := x509.ParseCertificates(chain); err == nil {
		for _, one := range list {
			if !one.Equal(cert) { // the leaf was written above, whether or not the chain repeats it
				b.WriteString(encoded(one.Raw))
			}
		}
	}
	fmt.Fprintf(&b, `";Subject="%s";URI=%s`, printable(cert.Subject.String()), uri)
	for _, name := range cert.DNSNames {
		if hostName.MatchString(name) {
			b.WriteString(";DNS=" + name)
		}
	}
	if b.Len() > maxXFCC {
		return fmt.Sprintf("Hash=%x;URI=%s", sum, uri)
	}
	return b.String()
}

// encoded is a certificate as PEM, escaped for a URL as Envoy does.
func encoded(der []byte) string {
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return strings.NewReplacer("\n", "%0A", " ", "%20", "+", "%2B", "/", "%2F", "=", "%3D").Replace(text)
}
