package haproxy

import (
	"context"
	"net/netip"
	"strings"

	"github.com/hashicorp/go-multierror"
)

// Worker is one worker of HAProxy, the current or a replaced one: it runs a command
// of the runtime API and returns the answer.
type Worker func(ctx context.Context, command string) (string, error)

// EndSessions ends the sessions of the public listener whose caller is denied now,
// in every worker; others are untouched. live are the callers' addresses of the
// sessions that stay. waits: the session has not been let in yet, so that whoever is
// asked about it is asked now. A worker that does not answer has none, or ends with an error.
func EndSessions(ctx context.Context, workers []Worker, denied func(from netip.AddrPort, waits bool) bool) (ended int, live map[netip.AddrPort]bool, err error) {
	live = map[netip.AddrPort]bool{}
	var wrong *multierror.Error
	for _, do := range workers {
		out, err := do(ctx, "show sess")
		if err != nil {
			wrong = multierror.Append(wrong, err)
			continue
		}
		for line := range strings.Lines(out) {
			id, from, waits, ok := parseSession(line)
			switch {
			case !ok:
			case !denied(from, waits):
				live[from] = true
			default:
				if _, err := do(ctx, "shutdown session "+id); err != nil {
					wrong = multierror.Append(wrong, err)
					continue
				}
				ended++
			}
		}
	}
	return ended, live, wrong.ErrorOrNil()
}

// parseSession reads a line of `show sess`; ok is false unless it is about the
// public listener. The format (HAProxy's management guide):
//
//	0x55f3c8: proto=tcpv4 src=10.0.0.1:51234 fe=public be=local_app srv=app ...
func parseSession(line string) (id string, from netip.AddrPort, waits, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 4 {
		return "", from, false, false
	}
	id, is := strings.CutSuffix(fields[0], ":")
	// The ID becomes part of a command: nothing but a number may.
	if digits, hex := strings.CutPrefix(id, "0x"); !is || !hex || strings.Trim(digits, "0123456789abcdef") != "" || digits == "" {
		return "", from, false, false
	}
	public := false
	for _, f := range fields[1:] {
		if f == "fe=public" {
			public = true
		} else if f == "be=<NONE>" {
			waits = true
		} else if addr, is := strings.CutPrefix(f, "src="); is {
			i := strings.LastIndexByte(addr, ':')
			if i < 0 {
				return "", from, false, false
			}
			host := strings.Trim(addr[:i], "[]")
			var err error
			if from, err = netip.ParseAddrPort("[" + host + "]" + addr[i:]); err != nil {
				if from, err = netip.ParseAddrPort(addr); err != nil {
					return "", from, false, false
				}
			}
		}
	}
	return id, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), waits, public && from.IsValid()
}
