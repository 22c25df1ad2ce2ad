package scripttest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// cmdApp runs "app NAME tcp|banner|http|http2|grpc|socket|switch|late [ADDR]": it starts an application that
// answers with its name, at $NAME_PORT or, of kind socket, at $DIR/NAME.sock. What it receives is counted.
func (w *world) cmdApp(ts *testscript.TestScript, _ bool, args []string) {
	name, kind, addr := args[0], args[1], "127.0.0.1:0"
	if len(args) > 2 {
		addr = args[2]
	}
	ln, err := net.Listen("tcp", addr)
	if kind == "socket" {
		ln, err = net.Listen("unix", filepath.Join(w.dir, name+".sock"))
		kind = "http"
		if err == nil {
			err = os.Chmod(filepath.Join(w.dir, name+".sock"), 0o666)
		}
	}
	ts.Check(err)
	w.env.Defer(func() { ln.Close() })
	if a, ok := ln.Addr().(*net.TCPAddr); ok {
		ts.Setenv(envName(name)+"_PORT", strconv.Itoa(a.Port))
	}
	count := &atomic.Int64{}
	w.counts[name], w.counts[name+" fails"], w.counts[name+" given up"], w.counts[name+" at once"] = count, &atomic.Int64{}, &atomic.Int64{}, &atomic.Int64{}
	serveApp(ln, name, kind, w.counts)
}

func unencryptedHTTP2() *http.Protocols {
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	return &p
}

func serveApp(ln net.Listener, name, kind string, counts map[string]*atomic.Int64) {
	count, fails, given := counts[name], counts[name+" fails"], counts[name+" given up"]
	under := &atOnce{most: counts[name+" at once"]}
	switch kind {
	case "switch":
		go serveSwitch(ln, count)
	case "late":
		go serveLate(ln)
	case "tcp", "banner":
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					if kind == "banner" {
						fmt.Fprintf(c, "hello from %s\n", name)
					}
					br := bufio.NewReader(c)
					for {
						line, err := br.ReadString('\n')
						count.Add(int64(len(line)))
						if strings.Contains(line, forbidden) {
							unauthorized.Add(1)
						}
						if err != nil {
							return
						}
						fmt.Fprintf(c, "%s %s", name, line)
					}
				}()
			}
		}()
	case "grpc":
		srv := grpc.NewServer()
		healthpb.RegisterHealthServer(srv, health.NewServer())
		go func() { _ = srv.Serve(ln) }()
	default:
		h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			count.Add(1)
			if strings.Contains(r.URL.Path, strings.ReplaceAll(forbidden, " ", "-")) {
				unauthorized.Add(1)
			}
			under.begin()
			defer under.now.Add(-1)
			if misbehave(rw, r, name, fails, given) {
				return
			}
			b, _ := io.ReadAll(r.Body)
			if d, err := time.ParseDuration(r.URL.Query().Get("sleep")); err == nil {
				time.Sleep(d)
			}
			drip(rw, r)
			rw.Header().Set("Trailer", "Grpc-Status")
			var others []string // headers with a _, which CGI does not tell from a -
			for k := range r.Header {
				if strings.Contains(k, "_") {
					others = append(others, k)
				}
			}
			fmt.Fprintf(rw, "%s %s %s %s body=%d xfcc=%q caller=%q authorization=%q token=%q others=%q", name, r.Proto, r.Method, r.RequestURI, len(b),
				r.Header.Values("X-Forwarded-Client-Cert"), r.Header.Values("X-Caller"), r.Header.Values("Authorization"), r.Header.Values("X-Token"), others)
			rw.Header().Set("Grpc-Status", "0")
		})
		srv := &http.Server{Handler: h, MaxHeaderBytes: 1 << 20}
		if kind == "http2" {
			srv.Protocols = unencryptedHTTP2()
		}
		go func() { _ = srv.Serve(ln) }()
	}
}

// drip answers a byte every tenth of a second, as many as the request asks for.
func drip(rw http.ResponseWriter, r *http.Request) {
	n, _ := strconv.Atoi(r.URL.Query().Get("drip"))
	for range n {
		_, _ = rw.Write([]byte("."))
		rw.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}
