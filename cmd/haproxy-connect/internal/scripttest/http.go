package scripttest

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	grpcstatus "google.golang.org/grpc/status"
)

// cmdHTTP runs "http STATUS[|STATUS]... URL [REGEXP] [h2] [-H k=v] [-X METHOD] [-body|-chunked N] [-within D]":
// it repeats the request until status and body are as wanted, which may take D at most.
func (w *world) cmdHTTP(ts *testscript.TestScript, neg bool, args []string) {
	want, target := args[0], args[1]
	re, tr, method := regexp.MustCompile(""), http.RoundTripper(&http.Transport{DisableKeepAlives: true}), http.MethodGet
	header, within, begun := http.Header{}, patience, time.Now()
	body := func() io.Reader { return nil }
	for i := 2; i < len(args); i++ {
		switch args[i] {
		case "h2":
			tr = &http.Transport{Protocols: unencryptedHTTP2()}
		case "-H":
			i++
			k, v, _ := strings.Cut(args[i], "=")
			header[k] = append(header[k], v) // as it is spelled
		case "-X":
			i++
			method = args[i]
		case "-body", "-chunked":
			i++
			n, err := strconv.Atoi(args[i])
			ts.Check(err)
			body = func() io.Reader { return strings.NewReader(strings.Repeat("x", n)) }
			if args[i-1] == "-chunked" {
				body = func() io.Reader { return io.MultiReader(strings.NewReader(strings.Repeat("x", n))) }
			}
		case "-within":
			i++
			var err error
			within, err = time.ParseDuration(args[i])
			ts.Check(err)
		default:
			re = regexp.MustCompile(args[i])
		}
	}
	if path, rest, ok := strings.Cut(strings.TrimPrefix(target, "unix:"), "|"); ok {
		target = "http://unix" + rest
		tr = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}}
	}
	client := &http.Client{Transport: tr, Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	last := ""
	err := eventually(patience, func() error {
		req, err := http.NewRequest(method, target, body())
		if err != nil {
			return err
		}
		req.Header = header
		req.Host = cmp.Or(header.Get("Host"), req.Host)
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		last = fmt.Sprintf("%d %s", res.StatusCode, b)
		if err != nil || !slices.Contains(strings.Split(want, "|"), strconv.Itoa(res.StatusCode)) || !re.Match(b) {
			return fmt.Errorf("%s answers %.2000s (%v), want %s %s", target, last, err, want, re)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
	if took := time.Since(begun); took > within {
		ts.Fatalf("%s took %s, at most %s\n%s", target, took, within, w.allLogs())
	}
	ts.Logf("after %s: %.300s", time.Since(begun).Round(time.Millisecond), last)
}

// cmdGRPC runs "grpc ok|denied ADDR": it repeats a real gRPC call, unary and streaming, until it succeeds or is denied.
func (w *world) cmdGRPC(ts *testscript.TestScript, _ bool, args []string) {
	conn, err := grpc.NewClient("passthrough:///"+args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	err = eventually(patience, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c := healthpb.NewHealthClient(conn)
		res, err := c.Check(ctx, &healthpb.HealthCheckRequest{})
		if args[0] == "denied" {
			if grpcstatus.Code(err) != codes.PermissionDenied {
				return fmt.Errorf("want PermissionDenied, got %v", err)
			}
			return nil
		}
		if err != nil || res.Status != healthpb.HealthCheckResponse_SERVING {
			return fmt.Errorf("%v %w", res, err)
		}
		stream, err := c.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	})
	if err != nil {
		ts.Fatalf("grpc %s: %v\n%s", args[1], err, w.allLogs())
	}
}

// cmdTCP runs "tcp ok|refused ADDR [TEXT] [EXPECT]": it sends a line, again and again, until a
// line that contains EXPECT comes back (ok), or nothing does (refused).
func (w *world) cmdTCP(ts *testscript.TestScript, _ bool, args []string) {
	send, expect := "ping", ""
	if len(args) > 2 {
		send = args[2]
	}
	if len(args) > 3 {
		expect = args[3]
	}
	err := eventually(patience, func() error {
		got, err := tcpOnce(args[1], send)
		switch {
		case args[0] == "ok" && (err != nil || !strings.Contains(got, expect)):
			return fmt.Errorf("%s: got %q (%v)", args[1], got, err)
		case args[0] == "refused" && (err == nil || got != ""):
			return fmt.Errorf("%s: served: %q", args[1], got)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
}

func dialAny(addr string) (net.Conn, error) {
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	c, err := net.DialTimeout(network, addr, 5*time.Second)
	if err == nil {
		err = c.SetDeadline(time.Now().Add(10 * time.Second))
	}
	return c, err
}

func tcpOnce(addr, send string) (string, error) {
	c, err := dialAny(addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, send+"\n"); err != nil {
		return "", err
	}
	return bufio.NewReader(c).ReadString('\n')
}

// cmdRaw runs "raw REGEXP ADDR TARGET [HEADER:VALUE]": it repeats a request whose target is
// sent as it is until the answer, on one line from the status on, matches.
func (w *world) cmdRaw(ts *testscript.TestScript, _ bool, args []string) {
	re := regexp.MustCompile("^" + args[0])
	extra := "Host: x\r\n"
	if len(args) > 3 && strings.HasPrefix(args[3], "Host:") {
		extra = args[3] + "\r\n"
	} else if len(args) > 3 {
		extra += args[3] + "\r\n"
	}
	last := ""
	if err := eventually(patience, func() error {
		c, err := dialAny(args[1])
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\n%sConnection: close\r\n\r\n", args[2], extra); err != nil {
			return err
		}
		b, err := io.ReadAll(c)
		last = strings.Join(strings.Fields(strings.TrimPrefix(string(b), "HTTP/1.1 ")), " ")
		if err != nil || !re.MatchString(last) {
			return fmt.Errorf("%s answers %.500q (%v), want %s", args[2], last, err, re)
		}
		return nil
	}); err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
}
