package scripttest

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// cmdRotateRoots runs "rotate-roots [TTL]": it gives Consul's CA a new key and root. The
// script then has the key too: mesh-call and tls-server sign with it. Leaves live for TTL,
// less the minute that Consul dates them back.
func (w *world) cmdRotateRoots(ts *testscript.TestScript, _ bool, args []string) {
	ttl := "72h"
	if len(args) > 0 {
		ttl = args[0]
	}
	w.before = w.ca
	var err error
	w.ca, err = certs.NewAuthority(w.trustDomain(ts))
	ts.Check(err)
	body, err := json.Marshal(map[string]any{"Provider": "consul", "Config": map[string]any{
		"PrivateKey": w.ca.KeyPEM, "RootCert": w.ca.CertPEM, "LeafCertTTL": ttl, "IntermediateCertTTL": "8760h",
		"SkipValidate": true, "CSRMaxPerSecond": 1000,
	}})
	ts.Check(err)
	_, err = w.call(http.MethodPut, "/v1/connect/ca/configuration", body)
	ts.Check(err)
}

// trustDomain is that of the cluster that the script is about now.
func (w *world) trustDomain(ts *testscript.TestScript) string {
	var roots struct{ TrustDomain string }
	b, err := w.call(http.MethodGet, "/v1/connect/ca/roots", nil)
	ts.Check(err)
	ts.Check(json.Unmarshal(b, &roots))
	return roots.TrustDomain
}

// cmdLeafRoot runs "leaf-root ADDR...": it waits until each listener presents a leaf of the newest root, and
// with it the cross-signed certificate by which a peer that only knows the root before can verify the leaf.
func (w *world) cmdLeafRoot(ts *testscript.TestScript, _ bool, args []string) {
	for _, addr := range args {
		err := eventually(2*patience, func() error {
			b, err := w.call(http.MethodGet, "/v1/connect/ca/roots", nil)
			if err != nil {
				return err
			}
			var list struct {
				Roots []struct {
					RootCert string
					Active   bool
				}
			}
			if err := json.Unmarshal(b, &list); err != nil {
				return err
			}
			pool := x509.NewCertPool()
			for _, r := range list.Roots {
				if r.Active {
					pool.AppendCertsFromPEM([]byte(r.RootCert))
				}
			}
			conf := &tls.Config{InsecureSkipVerify: true}
			conf.VerifyConnection = func(cs tls.ConnectionState) error {
				_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
				if err != nil || w.before == nil {
					return err
				}
				block, _ := pem.Decode([]byte(w.before.CertPEM))
				before, err := x509.ParseCertificate(block.Bytes)
				if err != nil {
					return err
				}
				if len(cs.PeerCertificates) != 2 {
					return fmt.Errorf("the chain has %d certificates", len(cs.PeerCertificates))
				}
				cross := cs.PeerCertificates[1]
				if !bytes.Equal(cross.AuthorityKeyId, before.SubjectKeyId) { // OpenSSL compares the two, Go does not
					return errors.New("the cross-signed certificate names another key than that of the root before")
				}
				return errors.Join(cross.CheckSignatureFrom(before), cs.PeerCertificates[0].CheckSignatureFrom(cross))
			}
			c, err := tls.Dial("tcp", addr, conf)
			if err == nil {
				c.Close()
			} else if strings.Contains(err.Error(), "certificate required") {
				err = nil
			}
			return err
		})
		if err != nil {
			ts.Fatalf("%s: %v\n%s", addr, err, w.allLogs())
		}
	}
}

// cmdMeshCall runs "mesh-call ok|refused|403 ADDR none|foreign|expired|two-uris|SERVICE [sni=NAME] [tls=1.2] [of=HERE]": it calls a
// public listener directly, without a sidecar, with the certificate that is named, until the outcome is as wanted.
func (w *world) cmdMeshCall(ts *testscript.TestScript, _ bool, args []string) {
	conf := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12} // the listener is what is tested
	here := false
	for _, a := range args[3:] {
		if a == "tls=1.2" {
			conf.MaxVersion = tls.VersionTLS12
			continue
		}
		if a == "of=HERE" {
			here = true
			continue
		}
		conf.ServerName, _ = strings.CutPrefix(a, "sni=")
		if strings.Contains(a, "HERE") {
			conf.ServerName = strings.ReplaceAll(conf.ServerName, "HERE", w.trustDomain(ts))
		}
		conf.ServerName = strings.ReplaceAll(conf.ServerName, "TRUSTDOMAIN", w.ca.TrustDomain)
	}
	if who := args[2]; who != "none" {
		ca, from, service := w.ca, time.Now().Add(-time.Minute), who
		var err error
		switch who {
		case "foreign":
			ca, err = certs.NewAuthority(w.ca.TrustDomain)
			ts.Check(err)
			service = "www"
		case "expired":
			from, service = time.Now().Add(-2*time.Hour), "www"
		case "two-uris":
			service = "www"
		}
		id := ca.ID(service)
		if here {
			id.TrustDomain = w.trustDomain(ts)
		}
		u, err := url.Parse(id.String())
		ts.Check(err)
		uris := []*url.URL{u}
		if who == "two-uris" {
			second, err := url.Parse(ca.ID("other").String())
			ts.Check(err)
			uris = append(uris, second)
		}
		chain, key, err := ca.Sign(uris, from, time.Hour)
		ts.Check(err)
		pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
		ts.Check(err)
		conf.Certificates = []tls.Certificate{pair}
	}
	once := func() (string, error) {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", args[1], conf)
		if err != nil {
			return "", err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return "", err
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			return "", err
		}
		b, err := bufio.NewReader(c).ReadString('\n')
		if b != "" {
			err = nil
		}
		return b, err
	}
	got := ""
	err := eventually(patience, func() error {
		var err error
		got, err = once()
		switch args[0] {
		case "ok":
			if err == nil && strings.Contains(got, " 403 ") {
				err = errors.New("denied")
			}
			return err
		case "403":
			if err == nil && !strings.Contains(got, " 403 ") {
				err = errors.New("not a 403")
			}
			return err
		}
		if err == nil {
			return errors.New("served")
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("mesh-call %v: %q: %v\n%s", args, got, err, w.allLogs())
	}
}

// cmdTLSServer runs "tls-server NAME SERVICE silent|banner|slow|echo|http": it starts a server on
// $NAME_PORT with a valid leaf of SERVICE. What the server reads after the handshake is counted.
func (w *world) cmdTLSServer(ts *testscript.TestScript, _ bool, args []string) {
	name, kind := args[0], args[2]
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	w.env.Defer(func() { ln.Close() })
	port := strconv.Itoa(ln.Addr().(*net.TCPAddr).Port)
	ts.Setenv(envName(name)+"_PORT", port)
	uri := w.ca.ID(args[1]).String()
	if args[1] == "PORT" { // the certificate names the port instead of a service
		uri = port
	}
	u, err := url.Parse(uri)
	ts.Check(err)
	chain, key, err := w.ca.Sign([]*url.URL{u}, time.Now().Add(-time.Minute), time.Hour)
	ts.Check(err)
	pair, err := tls.X509KeyPair([]byte(chain), []byte(key))
	ts.Check(err)
	count, hellos := &atomic.Int64{}, &atomic.Int64{}
	w.counts[name], w.counts[name+"-hellos"] = count, hellos
	conf := &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			hellos.Add(1)
			if kind == "slow" {
				time.Sleep(300 * time.Millisecond)
			}
			return nil, nil
		}}
	serve := func(c net.Conn) {
		defer c.Close()
		if kind == "banner" {
			fmt.Fprintf(c, "hello from %s\n", name)
		}
		b := make([]byte, 32<<10)
		for {
			n, err := c.Read(b)
			count.Add(int64(n))
			if err != nil {
				return
			}
			switch kind {
			case "echo", "slow":
				_, _ = c.Write(b[:n])
			case "http":
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(name), name)
			}
		}
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go serve(tls.Server(c, conf))
		}
	}()
}

// cmdReceived runs "received NAME COUNT|+": an application or tls-server must have received
// COUNT bytes, or requests if it is an HTTP application; "+" is more than nothing.
func (w *world) cmdReceived(ts *testscript.TestScript, _ bool, args []string) {
	got := w.counts[args[0]].Load()
	if args[1] == "+" && got > 0 || strconv.FormatInt(got, 10) == args[1] {
		return
	}
	ts.Fatalf("%s received %d, want %s\n%s", args[0], got, args[1], w.allLogs())
}
