package haproxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/hashicorp/go-multierror"

	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// Runner is a worker of HAProxy, the current or a replaced one: it runs a command
// of the runtime API and returns the answer.
type Runner func(ctx context.Context, command string) (string, error)

// Verdict is what becomes of a session.
type Verdict int

// The verdicts. EndTunnel ends a session only if it has become a tunnel: its answer was 101.
const (
	Keep Verdict = iota
	EndTunnel
	End
)

// EndSessions ends, in one worker, the sessions of callers that judge is against, and touches
// no other. live are the callers' addresses of the sessions that stay. pending tells judge that
// HAProxy is still waiting for a verdict on the session; such a session must not be cut as
// unknown. A worker that does not answer is an error: it may have sessions that should end.
func EndSessions(ctx context.Context, do Runner, judge func(from netip.AddrPort, pending bool) Verdict) (ended int, live []netip.AddrPort, err error) {
	out, err := do(ctx, "show sess")
	if errors.Is(err, runtimeapi.ErrGone) {
		return 0, nil, nil
	}
	if err != nil {
		return 0, nil, err
	}
	var wrong *multierror.Error
	for _, s := range runtimeapi.ParseSessions(out) {
		if !s.From.IsValid() || !render.Guarded(s.Frontend, s.Backend) {
			continue
		}
		end, stays, err := ends(ctx, do, s, judge)
		if err == nil && end {
			_, err = do(ctx, "shutdown session "+s.ID)
		}
		switch {
		case errors.Is(err, runtimeapi.ErrGone):
			return ended, nil, nil
		case err != nil:
			wrong = multierror.Append(wrong, err)
		case end:
			ended++
		case stays:
			live = append(live, s.From)
		}
	}
	return ended, live, wrong.ErrorOrNil()
}

// ends asks judge about a session. Before the session is ended it asks the worker whose the
// session's number is now: HAProxy gives the number of an ended session to the next one, which
// may be another caller's. A session that has ended meanwhile neither ends nor stays: its
// connection may be idle.
func ends(ctx context.Context, do Runner, s runtimeapi.Session, judge func(netip.AddrPort, bool) Verdict) (end, stays bool, err error) {
	verdict := judge(s.From, s.Backend == "<NONE>")
	if verdict == Keep {
		return false, true, nil
	}
	out, err := do(ctx, "show sess "+s.ID)
	if err != nil {
		return false, false, err
	}
	const switchingProtocols = 101
	now := runtimeapi.ParseDetail(out)
	end = verdict == End || now.Status == switchingProtocols
	return end && now.From == s.From, !end && now.From == s.From, nil
}

// TellGeneration tells a replaced worker the generation of the policy, as the plan's commands
// reach only the current worker. When the generation changes, a connection that is kept alive
// is judged again.
func TellGeneration(ctx context.Context, do Runner, dir, generation string) error {
	out, err := do(ctx, "set map "+dir+"/"+render.PolicyMap+" "+render.PolicyKey+" "+generation)
	if errors.Is(err, runtimeapi.ErrGone) {
		return nil
	}
	if err != nil || strings.TrimSpace(out) == "" || strings.Contains(out, "nknown map") { // a listener of tcp has none
		return err
	}
	return fmt.Errorf("a replaced worker does not take the policy's generation: %.200q", out)
}
