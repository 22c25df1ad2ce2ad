package consul

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// signMethod signs a request for a certificate: field 1 of the question is the request, field 2 of
// the answer the chain, both PEM (proto-public/pbconnectca).
const signMethod = "/hashicorp.consul.connectca.ConnectCAService/Sign"

// signed returns the watch for a leaf that is signed for a key made here; its answers are
// *certs.Leaf. under names the roots: with others, another leaf is needed.
func (c *Client) signed(id certs.SPIFFEID, dnsNames []string, under string) watch {
	var have *certs.Leaf
	return watch{key: "signed\x00" + id.String() + "\x00" + strings.Join(dnsNames, "\x00") + "\x00" + under, name: "leaf of the gateway", every: signedEvery, shapes: never,
		same: func(a, b any) bool { return a == b },
		fetch: func(ctx context.Context, _ *cursor) (any, error) {
			if have != nil && time.Now().Before(renewAt(have)) {
				return have, nil
			}
			leaf, err := c.sign(ctx, id, dnsNames)
			if err != nil {
				return nil, err
			}
			have = leaf
			return leaf, nil
		}}
}

// signedEvery is how often it is seen whether a leaf must be renewed.
const signedEvery = 10 * time.Second

// renewAt is when a leaf has lived more than half of its life, as agents renew theirs.
func renewAt(l *certs.Leaf) time.Time {
	return l.NotBefore.Add(l.NotAfter.Sub(l.NotBefore) * 6 / 10)
}

// sign has the agent sign for a new key, which never leaves this process but for HAProxy.
func (c *Client) sign(ctx context.Context, id certs.SPIFFEID, dnsNames []string) (*certs.Leaf, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{uri}, DNSNames: dnsNames}, key)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	request := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})
	answer, err := c.grpc.call(ctx, signMethod, protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), request))
	var status grpcError
	switch {
	case errors.As(err, &status) && status.code == grpcDenied && id.Gateway():
		return nil, rightError{fmt.Errorf("a leaf for %s: %w", id, err), "mesh:write"}
	case errors.As(err, &status) && status.code == grpcDenied:
		return nil, rightError{fmt.Errorf("a leaf for %s: %w", id, err), "service:write on " + id.Service}
	case errors.As(err, &status):
		return nil, fmt.Errorf("a leaf for %s: %w", id, err)
	case err != nil:
		return nil, grpcAway{fmt.Errorf("a leaf for %s, from the agent's gRPC port %s: %w", id, c.grpc.addr, err)}
	}
	chain, err := texts(answer, 2)
	if err != nil || len(chain) != 1 {
		return nil, fmt.Errorf("a leaf for %s: the answer has no chain (%v)", id, err)
	}
	leaf, err := certs.ParseLeaf(chain[0], string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	if err != nil {
		return nil, err
	}
	if leaf.ID != id {
		return nil, fmt.Errorf("the agent signed for %s in place of %s", leaf.ID, id)
	}
	return leaf, nil
}

// grpcAway is of a gRPC port that does not answer, while the agent may be well.
type grpcAway struct{ error }

func (e grpcAway) Unwrap() error { return e.error }
