package scripttest

import (
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// fill makes services s0 to sN-1 of ten endpoints each, on a node that nobody runs.
func (w *world) fill(ts *testscript.TestScript, n int) {
	type op map[string]any
	ops := []op{{"Node": op{"Verb": "set", "Node": op{"Node": "filled", "Address": "127.0.0.1"}}}}
	flush := func() {
		body, err := json.Marshal(ops)
		ts.Check(err)
		_, err = w.call(http.MethodPut, "/v1/txn", body)
		ts.Check(err)
		ops = nil
	}
	for i := range n {
		for j := range 10 {
			ops = append(ops, op{"Service": op{"Verb": "set", "Node": "filled", "Service": op{
				"Kind": "connect-proxy", "ID": fmt.Sprintf("s%d-%d", i, j), "Service": fmt.Sprintf("s%d-proxy", i),
				"Address": fmt.Sprintf("127.%d.%d.%d", 3+j, i/250, 1+i%250), "Port": 7, "Proxy": op{"DestinationServiceName": fmt.Sprintf("s%d", i)}}}})
			if len(ops) == 64 { // Consul takes no more at once
				flush()
			}
		}
	}
	if len(ops) > 0 {
		flush()
	}
}

// cmdScaleCost runs "scale-cost SIZE...": it measures a sidecar with SIZE upstreams of ten endpoints, half of
// them http; the last is api, which is served. It prints a table, with the exponent of each law.
func (w *world) cmdScaleCost(ts *testscript.TestScript, _ bool, args []string) {
	type law struct {
		name, unit string
		of         []float64
	}
	laws := []*law{{name: "memory of haproxy-connect", unit: "MB"}, {name: "memory of HAProxy", unit: "MB"}, {name: "start to ready", unit: "ms"}, {name: "start to every upstream served", unit: "ms"},
		{name: "change routed, p50", unit: "ms"}, {name: "CPU of haproxy-connect per change", unit: "ms"}, {name: "CPU of HAProxy per change", unit: "ms"}, {name: "reload for an upstream more", unit: "ms"}}
	var sizes []float64
	url := "http://127.0.0.1:" + ts.Getenv("UP1") + "/"
	for _, arg := range args {
		n, err := strconv.Atoi(arg)
		ts.Check(err)
		sizes = append(sizes, float64(n))
		w.fill(ts, n)
		register := func(upstreams int) {
			var list []string
			for i := range upstreams - 1 {
				list = append(list, fmt.Sprintf(`{"DestinationName":"s%d","LocalBindAddress":"127.2.%d.%d","LocalBindPort":7000,"Config":{"protocol":%q}}`, i, i/250, 1+i%250, []string{"tcp", "http"}[i%2]))
			}
			list = append(list, fmt.Sprintf(`{"DestinationName":"api","LocalBindPort":%s}`, ts.Getenv("UP1")))
			_, err := w.call(http.MethodPut, "/v1/agent/service/register", []byte(`{"Name":"big","Connect":{"SidecarService":{"Proxy":{"Upstreams":[`+strings.Join(list, ",")+`]}}}}`))
			ts.Check(err)
		}
		register(n)
		w.cmdScale(ts, false, []string{"api", "1"})
		begun := time.Now()
		runDir := fmt.Sprintf("/dev/shm/hcs-%d-%d", os.Getpid(), n) // in memory, as /run is
		w.env.Defer(func() { _ = os.RemoveAll(runDir) })
		w.cmdSidecar(ts, true, []string{"big", "-sidecar-for", "big", "-access-log", "off", "-run-dir", runDir})
		pid := w.cars["big"].Process.Pid
		admin := ts.Getenv("BIG_ADMIN")
		waitFor := func(what string, limit time.Duration, ok func() bool) {
			if err := eventually(limit, func() error {
				if ok() {
					return nil
				}
				return fmt.Errorf("not: %s", what)
			}); err != nil {
				ts.Fatalf("%d upstreams: %v\n%s", n, err, w.logs["big"])
			}
		}
		waitFor("ready", 6*patience, func() bool { return ready(admin) == nil })
		laws[2].of = append(laws[2].of, ms(time.Since(begun)))
		waitFor("all served", 6*patience, func() bool {
			return upstreamsWithEndpoints(admin) == n
		})
		laws[3].of = append(laws[3].of, ms(time.Since(begun)))
		// So many endpoints need more sockets, which takes one more reload: wait until it is over.
		haproxies, since := descendants(pid), time.Now()
		waitFor("at rest", 6*patience, func() bool {
			if now := descendants(pid); !slices.Equal(now, haproxies) {
				haproxies, since = now, time.Now()
			}
			return time.Since(since) > 5*time.Second
		})
		const changes = 20
		c0, h0 := cpuOf(pid), cpuOfAll(haproxies)
		times := w.routeTimes(ts, "api", url, changes)
		laws[4].of = append(laws[4].of, ms(times[len(times)/2]))
		laws[5].of = append(laws[5].of, ms(cpuOf(pid)-c0)/(2*changes))
		laws[6].of = append(laws[6].of, ms(cpuOfAll(haproxies)-h0)/(2*changes))
		laws[0].of = append(laws[0].of, memoryOf(pid))
		laws[1].of = append(laws[1].of, memoryOf(descendants(pid)...))
		register(n + 1)
		took := regexp.MustCompile(`reason=upstreams .*took=([0-9.]+m?s)`)
		waitFor("a reload", 3*patience, func() bool { return took.MatchString(w.logs["big"].String()) })
		d, err := time.ParseDuration(took.FindStringSubmatch(w.logs["big"].String())[1])
		ts.Check(err)
		laws[7].of = append(laws[7].of, ms(d))
		w.cmdSignal(ts, false, []string{"big", "TERM"})
		w.cmdExited(ts, false, []string{"big", "0"})
	}
	var table strings.Builder
	fmt.Fprintf(&table, "| upstreams, ten endpoints each | %s | grows with the size to the power of |\n|---|%s---|\n", strings.Join(args, " | "), strings.Repeat("---|", len(args)))
	for _, l := range laws {
		fmt.Fprintf(&table, "| %s, %s |", l.name, l.unit)
		for _, v := range l.of {
			fmt.Fprintf(&table, " %g |", round(v))
		}
		fmt.Fprintf(&table, " %.2f |\n", exponent(sizes, l.of))
	}
	for line := range strings.Lines(table.String()) {
		fmt.Printf("measured: HAProxy %s: %s", w.version, line)
	}
	if *Update {
		intoReadme(ts, "scale", table.String())
		var lines []series
		for _, i := range []int{0, 1, 4, 5} {
			s := series{name: laws[i].name + ", " + laws[i].unit}
			for k := range sizes {
				s.points = append(s.points, point{sizes[k], max(laws[i].of[k], 0.01)})
			}
			lines = append(lines, s)
		}
		writePlot(ts, "scale.svg", plot{title: "Memory, and what a change costs, against upstreams", x: "upstreams, ten endpoints each", y: "MB, ms", lines: lines})
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// exponent returns the exponent of the power law that fits best.
func exponent(x, y []float64) float64 {
	var n, sx, sy, sxx, sxy float64
	for i := range x {
		if y[i] <= 0 {
			continue
		}
		a, b := math.Log(x[i]), math.Log(y[i])
		n, sx, sy, sxx, sxy = n+1, sx+a, sy+b, sxx+a*a, sxy+a*b
	}
	return (n*sxy - sx*sy) / (n*sxx - sx*sx)
}

// upstreamsWithEndpoints counts the upstreams that have endpoints, by the metrics of a sidecar.
func upstreamsWithEndpoints(admin string) (n int) {
	text, err := scrape(admin)
	if err != nil {
		return 0
	}
	for _, m := range regexp.MustCompile(`(?m)^haproxy_connect_upstream_endpoints\{[^}]*\} (\d+)$`).FindAllStringSubmatch(text, -1) {
		if m[1] != "0" {
			n++
		}
	}
	return n
}

// cmdIntentionsCost runs "intentions-cost SERVICE ADDR INTENTIONS CALLERS": it prints how long it takes until
// so many intentions are in force, the memory they hold, and what it costs to let so many callers in.
func (w *world) cmdIntentionsCost(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[2])
	ts.Check(err)
	callers, err := strconv.Atoi(args[3])
	ts.Check(err)
	pid := w.cars[args[0]].Process.Pid
	before := memoryOf(pid)
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf(`{"Name":"caller%d","Action":%q}`, i, []string{"deny", "allow"}[i%2]))
	}
	c0 := cpuOf(pid)
	_, err = w.call(http.MethodPut, "/v1/config", []byte(`{"Kind":"service-intentions","Name":"`+args[0]+`","Sources":[`+strings.Join(list, ",")+`]}`))
	ts.Check(err)
	begun := time.Now()
	w.cmdMeshCall(ts, false, []string{"403", args[1], fmt.Sprintf("caller%d", (n-1)/2*2)})
	took, cpu := time.Since(begun), cpuOf(pid)-c0
	c0, begun = cpuOf(pid), time.Now()
	for i := range callers {
		w.cmdMeshCall(ts, false, []string{"ok", args[1], fmt.Sprintf("caller%d", 2*i+1)})
	}
	fmt.Printf("measured: HAProxy %s: %d intentions in force %s after Consul took them, CPU %s, memory %.1f -> %.1f MB; %d callers of their own certificates: %.0f us of ours each, %.2f ms each in all\n",
		w.version, n, took.Round(time.Millisecond), cpu, before, memoryOf(pid), callers, float64((cpuOf(pid)-c0).Microseconds())/float64(callers), ms(time.Since(begun))/float64(callers))
}
