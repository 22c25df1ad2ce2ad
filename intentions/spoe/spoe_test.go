package spoe

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"

	"io"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

const td = "11111111-2222-3333-4444-555555555555.consul"

// caller makes DER certificates.
func caller(t testing.TB, services ...string) []byte {
	ca, err := certs.NewAuthority(td)
	require.NoError(t, err)
	var uris []*url.URL
	for _, s := range services {
		u, err := url.Parse(ca.ID(s).String())
		require.NoError(t, err)
		uris = append(uris, u)
	}
	chain, _, err := ca.Sign(uris, time.Now(), time.Hour)
	require.NoError(t, err)
	block, _ := pem.Decode([]byte(chain))
	return block.Bytes
}

// use puts a policy into force, and returns its generation.
func use(a *Agent, p *intentions.Policy) string {
	a.SetPolicy(p, p.Digest())
	return p.Digest()
}

func policy(allow ...string) *intentions.Policy {
	c := intentions.Config{Destination: "api", TrustDomain: td, HTTP: true}
	for _, a := range allow {
		c.Intentions = append(c.Intentions, intentions.Intention{Source: intentions.Source{Name: a}, Allow: true, Precedence: 9})
	}
	c.Intentions = append(c.Intentions, intentions.Intention{Source: intentions.Source{Name: "l7"}, Precedence: 9,
		Permissions: []intentions.Permission{{Allow: true, PathPrefix: "/ok", Headers: []intentions.HeaderMatch{{Name: "x-key", Exact: "1"}}}}})
	return intentions.NewPolicy(c)
}

// haproxy is HAProxy's side of a connection.
type haproxy struct {
	t testing.TB
	c net.Conn
	b []byte
}

func (h *haproxy) send(b []byte) {
	_, err := h.c.Write(b)
	require.NoError(h.t, err)
}

func helloFrame(check bool) []byte {
	b := beginFrame(nil, frameHAProxyHello, 0, 0)
	b = appendString(appendText(b, "supported-versions"), "2.0")
	b = appendVarint(append(appendText(b, "max-frame-size"), typeUint32), maxFrame)
	b = appendString(appendText(b, "capabilities"), "pipelining,async")
	if check {
		b = append(appendText(b, "healthcheck"), typeBool|boolTrue)
	}
	return endFrame(b, 0)
}

func binaryArg(b []byte, name string, v []byte) []byte {
	b = append(appendText(b, name), typeBinary)
	return append(appendVarint(b, uint64(len(v))), v...)
}

func notifyConnection(id uint64, der []byte) []byte {
	b := beginFrame(nil, frameNotify, id, 1)
	b = append(appendText(b, MessageConnection), 1)
	return endFrame(binaryArg(b, ArgCert, der), 0)
}

func headersBin(kv ...string) []byte {
	var b []byte
	for _, s := range kv {
		b = appendText(b, s)
	}
	return append(b, 0, 0)
}

func notifyRequest(id uint64, der []byte, method, path string, headers []byte) []byte {
	b := beginFrame(nil, frameNotify, id, 1)
	b = append(appendText(b, MessageRequest), 4)
	b = binaryArg(b, ArgCert, der)
	b = appendString(appendText(b, ArgMethod), method)
	b = appendString(appendText(b, ArgPath), path)
	return endFrame(binaryArg(b, ArgHeaders, headers), 0)
}

// ack reads one answer: its stream and the variables it sets.
func (h *haproxy) ack() (uint64, map[string]string) {
	require.NoError(h.t, h.c.SetReadDeadline(time.Now().Add(10*time.Second)))
	f, err := readFrame(h.c, h.b)
	require.NoError(h.t, err)
	require.Equal(h.t, byte(frameAck), f.kind)
	vars := map[string]string{}
	for b := f.payload; len(b) > 0; {
		require.Equal(h.t, []byte{1, 3}, b[:2])
		name, rest, ok := text(b[3:])
		require.True(h.t, ok)
		v, rest, ok := typed(rest)
		require.True(h.t, ok)
		vars[string(name)] = string(v.bytes)
		b = rest
	}
	return f.stream, vars
}

func start(t testing.TB, a *Agent) (connect func() *haproxy, stop func()) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Serve(ctx, ln) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			require.NoError(t, <-done)
		})
	}
	t.Cleanup(stop)
	return func() *haproxy {
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		h := &haproxy{t: t, c: c, b: make([]byte, maxFrame)}
		h.send(helloFrame(false))
		f, err := readFrame(c, h.b)
		require.NoError(t, err)
		require.Equal(t, byte(frameAgentHello), f.kind)
		return h
	}, stop
}

func TestAgentAnswers(t *testing.T) {
	var mu sync.Mutex
	var told []string
	a := New(Options{Denied: func(source string, d intentions.Decision) {
		mu.Lock()
		told = append(told, source+" "+d.Rule)
		mu.Unlock()
	}})
	connect, _ := start(t, a)
	h := connect()
	web, db, l7, two, none := caller(t, "web"), caller(t, "db"), caller(t, "l7"), caller(t, "web", "db"), caller(t)
	ask := func(der []byte) map[string]string {
		h.send(notifyConnection(7, der))
		stream, vars := h.ack()
		require.Equal(t, uint64(7), stream)
		return vars
	}
	require.Equal(t, Deny, ask(web)[VarVerdict], "before any policy")
	first := use(a, policy("web"))
	got := ask(web)
	require.Equal(t, Allow, got[VarVerdict])
	require.Equal(t, first, got[VarGeneration])
	require.Equal(t, "web", got[VarService])
	require.Equal(t, "web=>api", got[VarRule])
	require.Equal(t, Deny, ask(db)[VarVerdict])
	require.Equal(t, Deny, ask(db)[VarVerdict], "again, from the cache")
	for _, der := range [][]byte{two, none, nil, []byte("junk"), web[:len(web)-1]} {
		require.Equal(t, Deny, ask(der)[VarVerdict])
	}
	require.Equal(t, Ask, ask(l7)[VarVerdict])
	second := use(a, policy("db"))
	require.NotEqual(t, first, second)
	require.Equal(t, Deny, ask(web)[VarVerdict], "a swap is seen by the next question")
	require.Equal(t, Allow, ask(db)[VarVerdict])

	request := func(path string, headers []byte) string {
		h.send(notifyRequest(9, l7, "GET", path, headers))
		_, vars := h.ack()
		return vars[VarRequestVerdict]
	}
	require.Equal(t, Allow, request("/ok/x", headersBin("host", "a", "x-key", "1")))
	require.Equal(t, Deny, request("/ok/x", headersBin("host", "a")))
	require.Equal(t, Deny, request("/no", headersBin("x-key", "1")))
	require.Equal(t, Deny, request("/ok", []byte{5, 'x'}), "headers that cannot be read")
	require.Equal(t, Deny, request("/ok", nil))
	mu.Lock()
	defer mu.Unlock()
	count := 0
	for _, s := range told {
		if strings.HasSuffix(s, "/svc/db default") {
			count++
		}
	}
	require.Equal(t, 1, count, "each kind of deny is told once: %q", told)
}

type tally struct{ n int }

func (c *tally) Inc() { c.n++ }

// The counter of an answer is looked up once, however many questions it answers.
func TestCountersAreLookedUpOnce(t *testing.T) {
	looked, total := 0, &tally{}
	a := New(Options{Count: func(string, intentions.Decision) Counter { looked++; return total }})
	use(a, policy("web"))
	c := a.newConn()
	f, err := parseFrame(notifyRequest(1, caller(t, "l7"), "GET", "/ok", headersBin("x-key", "1"))[4:])
	require.NoError(t, err)
	for range 100 {
		_, err = c.notify(nil, f)
		require.NoError(t, err)
	}
	require.Equal(t, 100, total.n)
	require.Equal(t, 2, looked, "one for the connection, one for the permission")
}

// Who connected from an address is remembered, so that a new deny finds its session.
func TestDeniedSessions(t *testing.T) {
	a := New(Options{})
	use(a, policy("web"))
	connect, _ := start(t, a)
	h := connect()
	from := netip.MustParseAddrPort("10.1.2.3:40000")
	b := beginFrame(nil, frameNotify, 1, 1)
	b = append(appendText(b, MessageConnection), 3)
	b = binaryArg(b, ArgCert, caller(t, "web"))
	b = append(append(appendText(b, ArgSource), typeIPv4), 10, 1, 2, 3)
	b = appendVarint(append(appendText(b, ArgPort), typeInt32), 40000)
	h.send(endFrame(b, 0))
	_, vars := h.ack()
	require.Equal(t, Allow, vars[VarVerdict])
	require.Equal(t, Stays, a.Judge(from, false, nil))
	require.False(t, a.AnyDenied())
	use(a, policy("db"))
	require.Equal(t, Ends, a.Judge(from, false, nil))
	require.True(t, a.AnyDenied())
	other := netip.MustParseAddrPort("10.1.2.3:40001")
	require.Equal(t, Unknown, a.Judge(other, false, nil), "a session that was let in by somebody else")
	require.Equal(t, Stays, a.Judge(other, true, nil), "a session that waits is asked about now")
	// Who was never let in has nothing to end but its refusal, which it should hear.
	evil := netip.MustParseAddrPort("10.1.2.3:40002")
	a.remember(evil, netip.AddrPort{}, a.caller(from)[0].who, false)
	require.Equal(t, Stays, a.Judge(evil, false, nil))
	a.remember(evil, netip.AddrPort{}, a.caller(from)[0].who, true)
	a.remember(evil, netip.AddrPort{}, a.caller(from)[0].who, false)
	require.Equal(t, Ends, a.Judge(evil, false, nil), "it was let in once")
	a.Forget(nil)
}

// Two callers may have the same address and port toward two addresses of ours: a deny
// of one of them finds its session, whoever came last.
func TestTwoIdentitiesAtOneAddress(t *testing.T) {
	a := New(Options{})
	use(a, policy("web", "db"))
	from := netip.MustParseAddrPort("10.1.2.3:40000")
	one, two := netip.MustParseAddrPort("10.0.0.1:443"), netip.MustParseAddrPort("10.0.0.2:443")
	service := func(name string) certs.SPIFFEID {
		_, id, err := identity(caller(t, name))
		require.NoError(t, err)
		return id
	}
	a.remember(from, one, who{service("web"), ""}, true)
	a.remember(from, two, who{service("db"), ""}, true)
	require.Equal(t, Stays, a.Judge(from, false, nil))
	use(a, policy("db"))
	require.Equal(t, Ends, a.Judge(from, false, nil), "web was there first")
	use(a, policy("web"))
	require.Equal(t, Ends, a.Judge(from, false, nil), "db came last")
	a.remember(from, two, who{service("web"), ""}, true)
	require.Equal(t, Stays, a.Judge(from, false, nil), "db has gone: its address is web's now")
	for i := range 3 * maxAtOnce {
		a.remember(from, netip.AddrPortFrom(one.Addr(), uint16(i+1)), who{service("web"), ""}, true)
	}
	require.Len(t, a.caller(from), maxAtOnce)
}

// A tunnel outlives the request that opened it: it ends when its caller is judged by
// another rule.
func TestTunnelsEndWithTheirRule(t *testing.T) {
	a := New(Options{})
	before := policy("web")
	use(a, before)
	from := netip.MustParseAddrPort("10.1.2.3:40000")
	_, l7, err := identity(caller(t, "l7"))
	require.NoError(t, err)
	a.remember(from, netip.AddrPort{}, who{l7, ""}, true)
	require.Equal(t, Stays, a.Judge(from, false, before))
	require.Equal(t, EndsTunnels, a.Judge(from, false, nil), "nothing is known of the policy before")
	use(a, policy("db"))
	require.Equal(t, Stays, a.Judge(from, false, before), "the rule of l7 is the same")
	use(a, intentions.NewPolicy(intentions.Config{Destination: "api", TrustDomain: td, HTTP: true, Intentions: []intentions.Intention{
		{Source: intentions.Source{Name: "l7", Namespace: "default"}, Precedence: 9, Permissions: []intentions.Permission{{PathPrefix: "/ok"}}}}}))
	require.Equal(t, EndsTunnels, a.Judge(from, false, before))
}

// Only the mesh's name of another service is refused, and the refusal is reported.
func TestServerNames(t *testing.T) {
	var told []string
	a := New(Options{Denied: func(source string, d intentions.Decision) { told = append(told, d.Rule+" "+d.Reason) }})
	own := "api.default.dc1.internal." + td
	use(a, intentions.NewPolicy(intentions.Config{Destination: "api", TrustDomain: td, ServerName: own, DefaultAllow: true}))
	c := a.newConn()
	c.epoch = a.current.Load()
	for name, want := range map[string]string{own: Allow, "": Allow, "api.service.consul": Allow, "db.default.dc1.internal." + td: Deny} {
		out := c.perConnection(nil, &message{cert: caller(t, "web"), serverName: []byte(name)})
		require.True(t, bytes.HasPrefix(out, appendSetVar(nil, scopeSession, VarVerdict, want)), name)
	}
	require.Equal(t, []string{"server-name the caller asked by SNI for another service of the mesh: db.default.dc1.internal." + td}, told)
}

// What a certificate names cannot be read as an element of the header, or as its end.
func TestForwardedCertificate(t *testing.T) {
	a := New(Options{})
	use(a, policy("web"))
	c := a.newConn()
	c.epoch = a.current.Load()
	template, err := x509.ParseCertificate(caller(t, "web"))
	require.NoError(t, err)
	template.DNSNames = []string{"good.example", `x,By=y;URI=spiffe://z`, `a"b`, "under_score.*", strings.Repeat("a", 254), "ü", "a b"}
	require.Equal(t, []string{"DNS=good.example", "DNS=under_score.*"}, strings.Split(xfcc(template, nil, "spiffe://x"), ";")[5:])
	junk := caller(t, "db")
	forwarded := func(service string, chain []byte) string {
		out := string(c.perConnection(nil, &message{cert: caller(t, service), chain: chain, xfcc: true}))
		_, text, _ := strings.Cut(out, "\x04"+VarXFCC)
		return text
	}
	require.Contains(t, forwarded("web", nil), "URI=spiffe://")
	require.Empty(t, forwarded("db", junk), "a denied caller is not forwarded")
	long := forwarded("web", bytes.Repeat(junk, 30))
	require.Contains(t, long, "URI=spiffe://")
	require.NotContains(t, long, "Chain=")
}

// Whatever chains a caller shows, what is remembered of them is bounded, and nothing is
// remembered of one that is denied.
func TestMemoryOfChains(t *testing.T) {
	a := New(Options{})
	use(a, policy("web"))
	c := a.newConn()
	web, db := caller(t, "web"), caller(t, "db")
	for i := range 4000 {
		chain := append(slices.Clone(db), byte(i), byte(i>>8))
		for _, der := range [][]byte{web, db} {
			b := beginFrame(nil, frameNotify, 1, 1)
			b = append(appendText(b, MessageConnection), 2)
			b = binaryArg(binaryArg(b, ArgCert, der), ArgChain, chain)
			f, err := parseFrame(endFrame(b, 0)[4:])
			require.NoError(t, err)
			_, err = c.notify(nil, f)
			require.NoError(t, err)
		}
		require.Less(t, c.kept, 2*maxForwarded)
	}
	require.Len(t, c.answers, 2)
}

func TestPipelinedAndParallel(t *testing.T) {
	a := New(Options{})
	use(a, policy("web"))
	connect, _ := start(t, a)
	web, db := caller(t, "web"), caller(t, "db")
	var wg sync.WaitGroup
	for range 20 {
		h := connect()
		wg.Add(1)
		go func() {
			defer wg.Done()
			var burst []byte
			for i := range uint64(50) {
				der := web
				if i%2 == 1 {
					der = db
				}
				burst = append(burst, notifyConnection(i, der)...)
			}
			go h.c.Write(burst)
			for i := range uint64(50) {
				stream, vars := h.ack()
				if want := map[bool]string{true: Allow, false: Deny}[i%2 == 0]; stream != i || vars[VarVerdict] != want {
					t.Errorf("stream %d: %v, want %d %s", stream, vars, i, want)
				}
			}
		}()
	}
	wg.Wait()
}

func TestMalformedEndsTheConnection(t *testing.T) {
	a := New(Options{})
	connect, _ := start(t, a)
	long := make([]byte, 4)
	binary.BigEndian.PutUint32(long, maxFrame+1)
	frag := notifyConnection(1, nil)
	frag[8] = 0 // not the last fragment
	for i, bad := range [][]byte{long, {0, 0, 0, 1, 3}, helloFrame(false), frag,
		endFrame(append(beginFrame(nil, frameNotify, 1, 1), 200), 0),
		endFrame(append(appendText(beginFrame(nil, frameNotify, 1, 1), "unknown"), 0), 0)} {
		h := connect()
		h.send(bad)
		require.NoError(t, h.c.SetReadDeadline(time.Now().Add(10*time.Second)))
		_, err := io.Copy(io.Discard, h.c)
		require.NoError(t, err, "case %d: the connection ends", i)
	}
	h := connect() // and others are still served
	h.send(notifyConnection(1, nil))
	_, vars := h.ack()
	require.Equal(t, Deny, vars[VarVerdict])
}

// Thousands of connections, one of which never reads and one of which sends byte by
// byte: the others are answered, and the greedy one is ended, in bounded memory.
func TestThousandsOfConnections(t *testing.T) {
	a := New(Options{})
	use(a, policy("web"))
	connect, _ := start(t, a)
	raw := notifyConnection(1, caller(t, "web"))
	greedy := connect()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if _, err := greedy.c.Write(raw); err != nil {
				return
			}
		}
	}()
	slow := connect()
	slowly := make(chan struct{})
	go func() {
		defer close(slowly)
		for i := range raw {
			if _, err := slow.c.Write(raw[i : i+1]); err != nil {
				return
			}
		}
	}()
	all := make([]*haproxy, 2000)
	for i := range all {
		all[i] = connect()
	}
	for round := range 3 {
		for _, h := range all {
			h.send(raw)
		}
		for i, h := range all {
			_, vars := h.ack()
			require.Equal(t, Allow, vars[VarVerdict], "connection %d, round %d", i, round)
		}
	}
	<-slowly
	_, vars := slow.ack()
	require.Equal(t, Allow, vars[VarVerdict])
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("whoever never reads is still written to")
	}
}

func TestStopEndsOpenConnections(t *testing.T) {
	a := New(Options{})
	connect, stop := start(t, a)
	h := connect()
	stop()
	require.NoError(t, h.c.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err := h.c.Read(make([]byte, 1))
	require.Error(t, err)
}

func TestVarint(t *testing.T) {
	for _, v := range []uint64{0, 1, 239, 240, 241, 2287, 2288, 264431, 264432, 1 << 20, 1 << 40, 1<<63 - 1, 1 << 63, 1<<64 - 1} {
		got, rest, ok := varint(append(appendVarint(nil, v), 9))
		require.True(t, ok)
		require.Equal(t, v, got)
		require.Equal(t, []byte{9}, rest)
	}
}

// FuzzFrame: whatever arrives, the agent neither panics nor allows.
func FuzzFrame(f *testing.F) {
	der := caller(f, "web")
	f.Add(helloFrame(true)[4:])
	f.Add(notifyConnection(1, der)[4:])
	f.Add(notifyRequest(1, der, "GET", "/ok", headersBin("x-key", "1"))[4:])
	f.Add([]byte{3, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	a := New(Options{})
	use(a, intentions.NewPolicy(intentions.Config{Destination: "api", TrustDomain: td, HTTP: true}))
	with := func(message string, args ...string) []byte {
		b := beginFrame(nil, frameNotify, 1, 1)
		b = append(appendText(b, message), byte(len(args)/2+1))
		b = binaryArg(b, ArgCert, der)
		for i := 0; i < len(args); i += 2 {
			b = binaryArg(b, args[i], []byte(args[i+1]))
		}
		return endFrame(b, 0)[4:]
	}
	f.Add(with(MessageConnection, ArgChain, string(der)))
	f.Add(with(MessageConnection, ArgChain, "junk", ArgSource, "\x7f\x00\x00\x01", ArgPort, "1"))
	f.Add(with(MessageRequest, ArgMethod, "GET", ArgPath, "/", ArgQuery, "access_token=x", ArgHeaders, "\x01a\x01b\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		fr, err := parseFrame(b)
		if err != nil {
			return
		}
		_, _, _, _ = hello(fr)
		c := a.newConn()
		out, err := c.notify(nil, fr)
		if err != nil {
			if len(out) != 0 {
				t.Fatal("part of an answer was left")
			}
			return
		}
		if bytes.Contains(out, []byte("\x08\x05allow")) {
			t.Fatalf("allowed: %q", out)
		}
		if n := binary.BigEndian.Uint32(out); int(n) != len(out)-4 {
			t.Fatalf("frame says %d bytes, has %d", n, len(out)-4)
		}
	})
}

func BenchmarkAnswer(b *testing.B) {
	a := New(Options{})
	use(a, policy("web"))
	frames := map[string][]byte{"connection": notifyConnection(1, caller(b, "web")),
		"request": notifyRequest(1, caller(b, "l7"), "GET", "/ok", headersBin("host", "x", "x-key", "1"))}
	for name, raw := range frames {
		b.Run(name, func(b *testing.B) {
			c := a.newConn()
			f, err := parseFrame(raw[4:])
			require.NoError(b, err)
			var out []byte
			b.ReportAllocs()
			for b.Loop() {
				if out, err = c.notify(out[:0], f); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAgent is the agent alone, over its socket as HAProxy uses it: a few
// connections, each with one question at a time.
func BenchmarkAgent(b *testing.B) {
	a := New(Options{})
	use(a, policy("web"))
	ln, err := net.Listen("unix", filepath.Join(b.TempDir(), "s"))
	require.NoError(b, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- a.Serve(ctx, ln) }()
	defer func() {
		cancel()
		<-done
	}()
	const clients = 4
	raw := notifyConnection(1, caller(b, "web"))
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	b.ResetTimer()
	for range clients {
		c, err := net.Dial("unix", ln.Addr().String())
		require.NoError(b, err)
		defer c.Close()
		h := &haproxy{t: b, c: c, b: make([]byte, maxFrame)}
		h.send(helloFrame(false))
		_, err = readFrame(c, h.b)
		require.NoError(b, err)
		wg.Add(1)
		go func() {
			defer wg.Done()
			times := make([]time.Duration, 0, b.N/clients)
			buf := make([]byte, 64<<10)
			for range b.N / clients {
				begun := time.Now()
				if _, err := c.Write(raw); err != nil {
					b.Error(err)
					return
				}
				if _, err := c.Read(buf); err != nil {
					b.Error(err)
					return
				}
				times = append(times, time.Since(begun))
			}
			mu.Lock()
			all = append(all, times...)
			mu.Unlock()
		}()
	}
	wg.Wait()
	b.StopTimer()
	if len(all) > 0 {
		slices.Sort(all)
		b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "decisions/s")
		b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-us")
	}
}
