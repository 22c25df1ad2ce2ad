package consul

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// grpcPort calls the agent's gRPC port, which alone signs for a gateway. The two messages that
// are exchanged have one field each; a library for gRPC would weigh more than this program.
type grpcPort struct {
	addr   string // host:port, or unix:///path
	client *http.Client
	token  func() string
}

// defaultGRPC is where the agent listens by default.
const defaultGRPC = "127.0.0.1:8502"

// newGRPCPort reads -grpc-addr and its variables as Consul's Envoy command does: https:// or
// CONSUL_GRPC_CACERT mean TLS.
func newGRPCPort(addr, caFile string, token func() string) (*grpcPort, error) {
	bad := func(why string) error {
		return fmt.Errorf("-grpc-addr %q (or CONSUL_GRPC_ADDR): %s; give host:port, http://host:port, https://host:port or unix:///path", addr, why)
	}
	scheme, rest, found := strings.Cut(addr, "://")
	if !found {
		scheme, rest = "http", addr
	}
	p := &grpcPort{addr: rest, token: token}
	t := &http.Transport{Protocols: new(http.Protocols), IdleConnTimeout: time.Minute}
	switch {
	case scheme == "unix" && rest != "":
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", rest)
		}
		p.addr = "agent"
	case scheme == "http", scheme == "https":
		if u, err := url.Parse("http://" + rest); err != nil || u.Hostname() == "" || u.Port() == "" {
			return nil, bad("no host and port")
		}
	default:
		return nil, bad("unknown scheme")
	}
	if scheme == "https" || caFile != "" && scheme != "unix" {
		t.Protocols.SetHTTP2(true)
		t.ForceAttemptHTTP2 = true
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		if caFile != "" {
			pem, err := os.ReadFile(caFile)
			if err != nil {
				return nil, fmt.Errorf("-grpc-ca-file %q (or CONSUL_GRPC_CACERT): %w", caFile, errors.Unwrap(err))
			}
			t.TLSClientConfig.RootCAs = x509.NewCertPool()
			if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("-grpc-ca-file %q (or CONSUL_GRPC_CACERT): no certificate in it", caFile)
			}
		}
		p.addr = "https://" + p.addr
	} else {
		t.Protocols.SetUnencryptedHTTP2(true)
		p.addr = "http://" + p.addr
	}
	p.client = &http.Client{Transport: t}
	return p, nil
}

// grpcError is an error that the agent answered, by its code.
type grpcError struct {
	code int
	text string
}

func (e grpcError) Error() string { return fmt.Sprintf("gRPC status %d: %s", e.code, e.text) }

// grpcDenied is the code of a question that the token may not ask (grpc/codes).
const grpcDenied = 7

// maxMessage bounds an answer.
const maxMessage = 1 << 20

// call makes a unary call.
func (p *grpcPort) call(ctx context.Context, method string, message []byte) ([]byte, error) {
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.addr+method, bytes.NewReader(frame))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	if token := p.token(); token != "" {
		req.Header.Set("X-Consul-Token", token)
	}
	res, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxMessage))
	if err != nil {
		return nil, err
	}
	status := res.Trailer.Get("Grpc-Status")
	text := res.Trailer.Get("Grpc-Message")
	if status == "" { // an error comes without a body
		status, text = res.Header.Get("Grpc-Status"), res.Header.Get("Grpc-Message")
	}
	if code, err := strconv.Atoi(status); err != nil {
		return nil, fmt.Errorf("no answer of gRPC (HTTP %s)", res.Status)
	} else if code != 0 {
		if plain, err := url.PathUnescape(text); err == nil {
			text = plain
		}
		return nil, grpcError{code, text}
	}
	if len(body) < 5 || body[0] != 0 || int(binary.BigEndian.Uint32(body[1:5])) != len(body)-5 {
		return nil, errors.New("an answer of gRPC that is no single message")
	}
	return body[5:], nil
}

// texts are the values of one field of a message, which has their bytes.
func texts(message []byte, field protowire.Number) (out []string, err error) {
	for len(message) > 0 {
		n, kind, size := protowire.ConsumeTag(message)
		if size < 0 {
			return nil, protowire.ParseError(size)
		}
		message = message[size:]
		if n == field && kind == protowire.BytesType {
			v, size := protowire.ConsumeBytes(message)
			if size < 0 {
				return nil, protowire.ParseError(size)
			}
			out, message = append(out, string(v)), message[size:]
			continue
		}
		if size = protowire.ConsumeFieldValue(n, kind, message); size < 0 {
			return nil, protowire.ParseError(size)
		}
		message = message[size:]
	}
	return out, nil
}
