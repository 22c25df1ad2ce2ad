package main

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// config-delete KIND NAME
func (w *world) cmdConfigDelete(ts *testscript.TestScript, _ bool, args []string) {
	_, err := w.call(http.MethodDelete, "/v1/config/"+args[0]+"/"+args[1], nil)
	ts.Check(err)
}

// answerOf is the first word of an answer: who gave it; "" with another status than 200.
func answerOf(client *http.Client, url, header, value string) (string, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	if header != "" {
		req.Header.Set(header, value)
	}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s answers %d %.200s (%v)", url, res.StatusCode, b, err)
	}
	who, _, _ := strings.Cut(string(b), " ")
	return who, nil
}

// shares URL N NAME=LO-HI... counts who answers N requests; it is tried again until it is so.
func (w *world) cmdShares(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	client := &http.Client{Timeout: 10 * time.Second}
	err = eventually(patience, func() error {
		count := map[string]int{}
		for range n {
			who, err := answerOf(client, args[0], "", "")
			if err != nil {
				return err
			}
			count[who]++
		}
		sum := 0
		for _, want := range args[2:] {
			var lo, hi int
			name, span, _ := strings.Cut(want, "=")
			if _, err := fmt.Sscanf(span, "%d-%d", &lo, &hi); err != nil {
				return err
			}
			sum += count[name]
			if count[name] < lo || count[name] > hi {
				return fmt.Errorf("%s answers %d of %d, want %s: %v", name, count[name], n, span, count)
			}
		}
		if sum != n {
			return fmt.Errorf("somebody else answers: %v", count)
		}
		return nil
	})
	if err != nil {
		ts.Fatalf("%v\n%s", err, w.allLogs())
	}
}

// agree HEADER N LEAST URL...: the same value of a header has the same answer at every
// address, of LEAST instances at least.
func (w *world) cmdAgree(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	least, err := strconv.Atoi(args[2])
	ts.Check(err)
	client := &http.Client{Timeout: 10 * time.Second}
	seen := map[string]bool{}
	for i := range n {
		first := ""
		for _, url := range append(args[3:], args[3:]...) {
			who, err := answerOf(client, url, args[0], fmt.Sprint("value", i))
			ts.Check(err)
			if first == "" {
				first = who
			}
			if who != first {
				ts.Fatalf("value%d: %s and %s\n%s", i, first, who, w.allLogs())
			}
			seen[who] = true
		}
	}
	if len(seen) < least {
		ts.Fatalf("only %v answer", seen)
	}
}
