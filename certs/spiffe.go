package certs

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SPIFFEID is the identity of one service of the mesh,
// spiffe://<trust domain>[/ap/<partition>]/ns/<namespace>/dc/<datacenter>/svc/<service>,
// the form of Consul's agent/connect/uri_service.go. The zero value is nobody.
type SPIFFEID struct {
	TrustDomain string
	Partition   string // "default" when the URI names none
	Namespace   string
	Datacenter  string
	Service     string
}

// maxID bounds an ID: RFC-wise a URI has no limit, SPIFFE says 2048 bytes.
const maxID = 2048

var errNotService = errors.New("not the SPIFFE ID of a Consul service (spiffe://<trust domain>/ns/<namespace>/dc/<datacenter>/svc/<service>)")

// ParseID reads a service identity. Percent-encoding, empty segments, upper-case
// trust domains and anything that is not the exact form are refused.
func ParseID(s string) (SPIFFEID, error) {
	if len(s) > maxID {
		return SPIFFEID{}, fmt.Errorf("SPIFFE ID of %d bytes: at most %d", len(s), maxID)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return SPIFFEID{}, fmt.Errorf("SPIFFE ID %q: %w", s, err)
	}
	out := SPIFFEID{TrustDomain: id.TrustDomain().Name(), Partition: "default"}
	part := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
	if len(part) == 8 && part[0] == "ap" {
		out.Partition, part = part[1], part[2:]
	}
	if len(part) != 6 || part[0] != "ns" || part[2] != "dc" || part[4] != "svc" {
		return SPIFFEID{}, fmt.Errorf("SPIFFE ID %q: %w", s, errNotService)
	}
	out.Namespace, out.Datacenter, out.Service = part[1], part[3], part[5]
	return out, nil
}

// ParseTrustDomain checks a trust domain's name.
func ParseTrustDomain(s string) (string, error) {
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil || strings.Contains(s, "/") {
		return "", fmt.Errorf("trust domain %q: not a valid SPIFFE trust domain", s)
	}
	return td.Name(), nil
}

// FromURL reads the identity of a parsed URI, which must be in plain form.
func FromURL(u *url.URL) (SPIFFEID, error) {
	if u.RawPath != "" || u.ForceQuery || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return SPIFFEID{}, fmt.Errorf("SPIFFE ID %q: %w", u.String(), errNotService)
	}
	return ParseID(u.String())
}

// FromCertificate returns the one identity of a certificate. No URI SAN, or more
// than one, is an error: who carries two names must not choose between them.
func FromCertificate(c *x509.Certificate) (SPIFFEID, error) {
	if len(c.URIs) != 1 {
		return SPIFFEID{}, fmt.Errorf("certificate has %d URI SANs, want exactly one", len(c.URIs))
	}
	return FromURL(c.URIs[0])
}

// String is the URI, or "" for nobody.
func (id SPIFFEID) String() string {
	if id == (SPIFFEID{}) {
		return ""
	}
	ap := ""
	if id.Partition != "" && id.Partition != "default" {
		ap = "/ap/" + id.Partition
	}
	return "spiffe://" + id.TrustDomain + ap + "/ns/" + id.Namespace + "/dc/" + id.Datacenter + "/svc/" + id.Service
}

// SNI is the server name that Consul's proxies send for this service, with an
// optional subset (agent/connect/sni.go).
func (id SPIFFEID) SNI(subset string) string {
	name := id.Service
	if subset != "" {
		name = subset + "." + name
	}
	if id.Partition != "" && id.Partition != "default" {
		return name + "." + id.Namespace + "." + id.Partition + "." + id.Datacenter + ".internal-v1." + id.TrustDomain
	}
	return name + "." + id.Namespace + "." + id.Datacenter + ".internal." + id.TrustDomain
}
