package scripttest

import (
	"errors"
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
)

// cmdScale runs "scale SERVICE COUNT [roll]": it registers and deregisters instances of a
// service, one by one, until there are COUNT; roll replaces them all, new ones first. Each
// instance is the same running sidecar, at port $SERVICE_PUBLIC of another loopback address.
func (w *world) cmdScale(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	have := w.scaled[args[0]]
	from := 0
	if len(args) > 2 && args[2] == "roll" { // replace all: new ones first
		from = have[1]
	}
	for i := from; i < from+n; i++ {
		if i >= have[0] && i < have[1] {
			continue
		}
		body := fmt.Sprintf(`{"Kind":"connect-proxy","Name":"%[1]s-many","ID":"%[1]s-%[2]d","Address":"127.0.%[3]d.%[4]d","Port":%[5]s,"Proxy":{"DestinationServiceName":"%[1]s"}}`,
			args[0], i, 1+i/200, 1+i%200, ts.Getenv(envName(args[0])+"_PUBLIC"))
		_, err := w.call(http.MethodPut, "/v1/agent/service/register", []byte(body))
		ts.Check(err)
	}
	for i := have[0]; i < have[1]; i++ {
		if i < from || i >= from+n {
			_, err := w.call(http.MethodPut, fmt.Sprintf("/v1/agent/service/deregister/%s-%d", args[0], i), nil)
			ts.Check(err)
		}
	}
	w.scaled[args[0]] = [2]int{from, from + n}
}

// cmdEndpoints runs "endpoints ADMIN COUNT": it waits until HAProxy has COUNT servers in all
// that are not draining.
func (w *world) cmdEndpoints(ts *testscript.TestScript, _ bool, args []string) {
	last := 0
	if err := eventually(patience, func() error {
		text, err := scrape(args[0])
		if err != nil {
			return err
		}
		last = len(regexp.MustCompile(`(?m)^haproxy_server_weight\{proxy="[^"]*\.default\.dc1",server="[^"]*"\} [1-9]`).FindAllString(text, -1))
		if strconv.Itoa(last) != args[1] {
			return errors.New("not yet")
		}
		return nil
	}); err != nil {
		listed := ""
		for service := range w.scaled {
			list, err := w.call(http.MethodGet, "/v1/health/connect/"+service+"?passing", nil)
			listed += fmt.Sprintf("; Consul lists %d of %s (%v)", strings.Count(string(list), `"connect-proxy"`), service, err)
		}
		ts.Fatalf("HAProxy has %d servers, want %s%s\n%s", last, args[1], listed, w.allLogs())
	}
}

// cmdOccupy runs "occupy PORT": it listens at the port, as another process would, until "free PORT".
func (w *world) cmdOccupy(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:"+args[0])
	ts.Check(err)
	w.occupied[args[0]] = ln
	w.env.Defer(func() { ln.Close() })
}

func (w *world) cmdFree(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(w.occupied[args[0]].Close())
}

// cmdFlap runs "flap SERVICE N": the last of three instances of scale goes and comes, N
// changes in all, as fast as Consul takes them.
func (w *world) cmdFlap(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	for range n / 2 {
		for _, count := range []string{"2", "3"} {
			w.cmdScale(ts, false, []string{args[0], count})
		}
	}
}

// cmdChurn runs "churn-intentions DESTINATION N": it makes N changes that leave www allowed throughout.
func (w *world) cmdChurn(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	for i := range n / 2 {
		source := fmt.Sprintf("caller%d", i%7)
		w.cmdIntention(ts, false, []string{"deny", source, args[0]})
		w.cmdIntention(ts, false, []string{"allow", source, args[0]})
	}
}

// cmdRouteTimes runs "route-times SERVICE URL N": it prints how long it takes, N times, from
// Consul's answer to a registration until a request is served by it.
func (w *world) cmdRouteTimes(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[2])
	ts.Check(err)
	times := w.routeTimes(ts, args[0], args[1], n)
	fmt.Printf("measured: HAProxy %s: Consul write to request served, %d times: p50 %s, p90 %s, p99 %s, max %s\n",
		w.version, n, times[n/2], times[n*9/10], times[n*99/100], times[n-1])
}

// routeTimes returns, sorted, how long each of n registrations takes to be served; each is deregistered before
// the next. They are spaced out, as a watch that answers more often than every 20 ms is made to wait.
func (w *world) routeTimes(ts *testscript.TestScript, service, url string, n int) (times []time.Duration) {
	client := &http.Client{Timeout: 5 * time.Second}
	status := func() int {
		res, err := client.Get(url)
		if err != nil {
			return 0
		}
		defer res.Body.Close()
		_, _ = io.Copy(io.Discard, res.Body)
		return res.StatusCode
	}
	until := func(want int) {
		if err := eventually(patience, func() error {
			if status() != want {
				return errors.New("not yet")
			}
			return nil
		}); err != nil {
			ts.Fatalf("%s never answers %d\n%s", url, want, w.allLogs())
		}
	}
	for range n {
		w.cmdScale(ts, false, []string{service, "0"})
		until(http.StatusServiceUnavailable)
		time.Sleep(100 * time.Millisecond)
		w.cmdScale(ts, false, []string{service, "1"})
		begun := time.Now()
		for status() != http.StatusOK {
			if time.Since(begun) > patience {
				ts.Fatalf("not routed")
			}
			time.Sleep(200 * time.Microsecond)
		}
		times = append(times, time.Since(begun))
	}
	slices.Sort(times)
	return times
}
