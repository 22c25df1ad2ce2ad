package scripttest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// load is a client that counts: keep-alive HTTP, or a TCP line per connection.
type load struct {
	end          chan struct{}
	once         sync.Once
	wg           sync.WaitGroup
	good, failed atomic.Int64
	first        atomic.Pointer[string]
}

func (l *load) stop() {
	l.once.Do(func() { close(l.end) })
	l.wg.Wait()
}

// cmdLoad runs "load NAME URL|ADDR [get]": it starts two clients, which GET and POST in turn, or only GET.
func (w *world) cmdLoad(ts *testscript.TestScript, _ bool, args []string) {
	l := &load{end: make(chan struct{})}
	w.loads[args[0]] = l
	for i := range 2 {
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			client := &http.Client{Timeout: 15 * time.Second, Transport: &http.Transport{IdleConnTimeout: 30 * time.Second}}
			for n := 0; ; n++ {
				select {
				case <-l.end:
					return
				case <-time.After(2 * time.Millisecond):
				}
				begun := time.Now()
				if err := oneCall(client, args[1], len(args) < 3 && (n+i)%2 == 0); err != nil {
					text := fmt.Sprintf("begun %s, after %s: %v", begun.UTC().Format(time.StampMilli), time.Since(begun).Round(time.Millisecond), err)
					l.first.CompareAndSwap(nil, &text)
					l.failed.Add(1)
				} else {
					l.good.Add(1)
				}
			}
		}()
	}
}

func oneCall(client *http.Client, target string, post bool) error {
	if !strings.HasPrefix(target, "http") {
		got, err := tcpOnce(target, "ping")
		if err == nil && !strings.HasSuffix(got, "ping\n") {
			err = fmt.Errorf("got %q", got)
		}
		return err
	}
	var res *http.Response
	var err error
	if post {
		res, err = client.Post(target, "text/plain", strings.NewReader("some body"))
	} else {
		res, err = client.Get(target)
	}
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.100s", res.Status, b)
	}
	return err
}

// cmdLoadStop runs "load-stop NAME [MOST]": it ends the load. At most MOST calls (default 0)
// may have failed, and some must have succeeded.
func (w *world) cmdLoadStop(ts *testscript.TestScript, _ bool, args []string) {
	l := w.loads[args[0]]
	most := int64(0)
	if len(args) > 1 {
		most, _ = strconv.ParseInt(args[1], 10, 64)
	}
	_ = eventually(patience, func() error { // with fewer calls the load proves nothing
		if l.good.Load()+l.failed.Load() < 50 {
			return errors.New("too few")
		}
		return nil
	})
	l.stop()
	ts.Logf("load %s: %d good, %d failed", args[0], l.good.Load(), l.failed.Load())
	if most >= 0 && (l.good.Load() == 0 || l.failed.Load() > most) { // below 0: any outcome is fine
		first := ""
		if p := l.first.Load(); p != nil {
			first = *p
		}
		ts.Fatalf("load %s: %d good, %d failed, the first: %s\n%s", args[0], l.good.Load(), l.failed.Load(), first, w.allLogs())
	}
}

// cmdHold runs "hold NAME ADDR": it opens a TCP session and keeps it. "held NAME open|closed
// [-within D]": the session must still be open, or end in time.
func (w *world) cmdHold(ts *testscript.TestScript, _ bool, args []string) {
	if err := eventually(patience, func() error {
		c, err := dialAny(args[1])
		if err != nil {
			return err
		}
		if err := pingOn(c); err != nil {
			c.Close()
			return err
		}
		w.idle[args[0]] = c
		return nil
	}); err != nil {
		ts.Fatalf("hold %s: %v\n%s", args[0], err, w.allLogs())
	}
}

func pingOn(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "still\n"); err != nil {
		return err
	}
	b := make([]byte, 1024)
	_, err := c.Read(b)
	return err
}

func (w *world) cmdHeld(ts *testscript.TestScript, _ bool, args []string) {
	c := w.idle[args[0]]
	if args[1] == "open" {
		if err := pingOn(c); err != nil {
			ts.Fatalf("the session %s has ended: %v\n%s", args[0], err, w.allLogs())
		}
		return
	}
	limit := patience
	if len(args) > 3 {
		var err error
		limit, err = time.ParseDuration(args[3])
		ts.Check(err)
	}
	ts.Check(c.SetReadDeadline(time.Now().Add(limit)))
	b := make([]byte, 1)
	if _, err := c.Read(b); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		ts.Fatalf("the session %s is still open (%v)\n%s", args[0], err, w.allLogs())
	}
}
