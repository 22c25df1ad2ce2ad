package certs

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SPIFFEID is the identity of one service of the mesh,
// spiffe://<trust domain>[/ap/<partition>]/ns/<namespace>/dc/<datacenter>/svc/<service>,
// or that of the mesh gateways of a datacenter,
// spiffe://<trust domain>[/ap/<partition>]/gateway/mesh/dc/<datacenter>: the forms of Consul's
// agent/connect, uri_service.go and uri_mesh_gateway.go. The zero value is nobody.
type SPIFFEID struct {
	TrustDomain string
	Partition   string // "default" when the URI names none
	Namespace   string // "" of a gateway
	Datacenter  string
	Service     string // "" of a gateway
}

// MeshGateway is the identity of the mesh gateways of a datacenter.
func MeshGateway(trustDomain, datacenter string) SPIFFEID {
	return SPIFFEID{TrustDomain: trustDomain, Partition: "default", Datacenter: datacenter}
}

// Gateway reports whether the identity is that of mesh gateways, which stand for nobody
// themselves.
func (id SPIFFEID) Gateway() bool { return id.Service == "" && id.TrustDomain != "" }

// maxID bounds an ID: the RFC sets no limit for a URI, the SPIFFE standard sets 2048 bytes.
const maxID = 2048

var errNotService = errors.New("not the SPIFFE ID of a Consul service (spiffe://<trust domain>/ns/<namespace>/dc/<datacenter>/svc/<service>) or mesh gateway")

// ParseID reads the identity of a service or of mesh gateways. Percent-encoding, empty segments, upper-case
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
	if len(part) == 6 && part[0] == "ap" && part[2] == "gateway" {
		out.Partition, part = part[1], part[2:]
	}
	if len(part) == 4 && part[0] == "gateway" && part[1] == "mesh" && part[2] == "dc" {
		out.Datacenter = part[3]
		return out, nil
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

// ServiceName reports why a service of this name cannot have a SPIFFE ID: Consul
// registers names that the SPIFFE standard does not allow in a path.
func ServiceName(name string) error {
	if err := spiffeid.ValidatePathSegment(name); err != nil {
		return fmt.Errorf("service name %q cannot be part of a SPIFFE ID: it may have letters, digits, \".\", \"-\" and \"_\", and is neither \".\" nor \"..\"", name)
	}
	return nil
}

// FromCertificate returns the one identity of a certificate. No URI SAN, or more
// than one, is an error: a peer with two names must not choose between them.
func FromCertificate(c *x509.Certificate) (SPIFFEID, error) {
	uris, err := uriSANs(c)
	if err != nil {
		return SPIFFEID{}, err
	}
	if len(uris) != 1 {
		return SPIFFEID{}, fmt.Errorf("certificate has %d URI SANs, want exactly one", len(uris))
	}
	return ParseID(uris[0])
}

// uriSANs reads the URI SANs as they are written in the certificate. crypto/x509 parses
// them, after which "SPIFFE://" and an empty "#" or "?" can no longer be told from the
// plain form, which the Lua filter insists on.
func uriSANs(c *x509.Certificate) (out []string, err error) {
	malformed := errors.New("the certificate's subject alternative names are malformed")
	for _, e := range c.Extensions {
		if !e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			continue
		}
		var names asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) > 0 || names.Tag != asn1.TagSequence || names.Class != asn1.ClassUniversal {
			return nil, malformed
		}
		for rest := names.Bytes; len(rest) > 0; {
			var one asn1.RawValue
			if rest, err = asn1.Unmarshal(rest, &one); err != nil {
				return nil, malformed
			}
			if one.Class == asn1.ClassContextSpecific && one.Tag == 6 { // uniformResourceIdentifier, RFC 5280 4.2.1.6
				out = append(out, string(one.Bytes))
			}
		}
	}
	return out, nil
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
	if id.Gateway() {
		return "spiffe://" + id.TrustDomain + ap + "/gateway/mesh/dc/" + id.Datacenter
	}
	return "spiffe://" + id.TrustDomain + ap + "/ns/" + id.Namespace + "/dc/" + id.Datacenter + "/svc/" + id.Service
}

// LogValue is the URI, in a log of JSON too.
func (id SPIFFEID) LogValue() slog.Value { return slog.StringValue(id.String()) }

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
