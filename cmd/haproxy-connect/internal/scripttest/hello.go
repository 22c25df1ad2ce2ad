package scripttest

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// single writes byte by byte, each in a segment of its own.
type single struct{ net.Conn }

func (s single) Write(b []byte) (int, error) {
	for i := range b {
		if _, err := s.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
	}
	return len(b), nil
}

// cmdHello runs "hello ok|closed ADDR SNI [single] [size=N]": it begins a TLS handshake that asks for a
// name, "-" for none, "HERE" in it the trust domain of the cluster; single sends each byte in a segment
// of its own, and size makes the hello about so many bytes long. The server's half must come, or the
// connection must be closed within a second.
func (w *world) cmdHello(ts *testscript.TestScript, _ bool, args []string) {
	name, err := strconv.Unquote(`"` + args[2] + `"`)
	ts.Check(err)
	if strings.Contains(name, "HERE") {
		name = strings.ReplaceAll(name, "HERE", w.trustDomain(ts))
	}
	conf := &tls.Config{InsecureSkipVerify: true, ServerName: name}
	if name == "-" {
		conf.ServerName = ""
	}
	slow := false
	for _, a := range args[3:] {
		if size, ok := strings.CutPrefix(a, "size="); ok {
			n, err := strconv.Atoi(size)
			ts.Check(err)
			for range n / 201 {
				conf.NextProtos = append(conf.NextProtos, strings.Repeat("x", 200))
			}
		} else if slow = a == "single"; !slow {
			ts.Fatalf("hello: %q is unknown", a)
		}
	}
	once := func() error {
		c, err := net.DialTimeout("tcp", args[1], time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		begun := time.Now()
		if slow {
			c = single{c}
		}
		err = tls.Client(c, conf).Handshake()
		if took := time.Since(begun); args[0] == "closed" && took > time.Second {
			return fmt.Errorf("it took %s", took)
		}
		return err
	}
	err = eventually(patience, func() error {
		switch err := once(); {
		case args[0] == "closed" && err == nil:
			return errors.New("served")
		case args[0] == "ok":
			return err
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("hello %v: %v\n%s", args, err, w.allLogs())
	}
}

// cmdEdgeGet runs "edge-get STATUS ADDR SNI HOST NAMES [REGEXP]": it makes a request over TLS that asks for the
// name SNI ("-": none) and the host HOST, until the certificate's names, the status and the body match.
func (w *world) cmdEdgeGet(ts *testscript.TestScript, _ bool, args []string) {
	names, body := regexp.MustCompile(args[4]), regexp.MustCompile(strings.Join(args[5:], " "))
	conf := &tls.Config{InsecureSkipVerify: true, ServerName: strings.Trim(args[2], "-")}
	got := ""
	err := eventually(patience, func() error {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", args[1], conf)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		cert := c.ConnectionState().PeerCertificates[0]
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", args[3])
		b, err := io.ReadAll(c)
		got = fmt.Sprintf("%v %v %.300s", cert.DNSNames, cert.URIs, b)
		if !names.MatchString(strings.Join(cert.DNSNames, " ")) || !strings.HasPrefix(string(b), "HTTP/1.1 "+args[0]+" ") || !body.Match(b) {
			return fmt.Errorf("not yet (%v)", err)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("edge-get %v: %s: %v\n%s", args, got, err, w.allLogs())
	}
}

// cmdTLSApp runs "tls-app NAME CERT KEY": it starts an application that speaks TLS with a certificate that
// is no leaf of the mesh, at $NAME_PORT.
func (w *world) cmdTLSApp(ts *testscript.TestScript, _ bool, args []string) {
	pair, err := tls.LoadX509KeyPair(args[1], args[2])
	ts.Check(err)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}})
	ts.Check(err)
	w.env.Defer(func() { ln.Close() })
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	ts.Setenv(envName(args[0])+"_PORT", port)
	go func() {
		_ = http.Serve(ln, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { fmt.Fprintf(rw, "%s by TLS for %s", args[0], r.Host) }))
	}()
}
