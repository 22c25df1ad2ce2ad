package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/haproxy/runtimeapi"
)

// Times of a drain.
const (
	leaveFor = 5 * time.Second // the longest wait for callers to go elsewhere
	// Where a gateway is, callers learn late: Consul writes a datacenter's gateways down every 5 s at most
	// (agent/consul, loopRateLimit), and copies that to the other datacenters.
	leaveGatewayFor = 20 * time.Second
	quietFor        = 300 * time.Millisecond // callers that send no request for so long have gone elsewhere
)

// idleGrace is how long a drain waits, after the last request, for callers to close connections that they do
// not use: an answer or Consul tells them that this instance goes. Then the connections are cut.
const idleGrace = 3 * time.Second

// drainInbound leaves the mesh, stops accepting callers and waits until their sessions have ended and
// their kept connections are closed or long unused; the upstreams stay open meanwhile,
// as the application needs them to finish.
func (s *running) drainInbound(ctx context.Context, id string) {
	if !s.proc.Up() || s.conf.drain == 0 {
		return
	}
	snap := s.newest.Load()
	if snap == nil || !slices.ContainsFunc(snap.Listeners, func(l *connect.Listener) bool {
		return l.Role == connect.Public || l.Role == connect.Relay || l.Role == connect.Edge
	}) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.conf.drain)
	defer cancel()
	fronts := map[string]bool{}
	for _, sec := range s.manager.Status().Running.Sections {
		if sec.Kind == render.Frontend && sec.Role.Callers() {
			fronts[sec.Name] = true
		}
	}
	if slices.ContainsFunc(snap.Listeners, func(l *connect.Listener) bool {
		return l.Role != connect.Local && l.Role != connect.Open && l.Protocol().IsHTTP()
	}) {
		if _, err := s.proc.Do(ctx, fmt.Sprintf("add map %s/%s %s 1", s.dir, render.PolicyMap, render.DrainingKey), nil); err != nil {
			return
		}
	}
	if !s.conf.register { // with -register the proxy is deregistered by now
		quick, done := context.WithTimeout(ctx, 2*time.Second)
		err := s.client.Leave(quick, id)
		done()
		if err != nil {
			s.log.Warn("cannot leave the mesh before the listener closes; callers notice by themselves", "error", err, "try", "is the agent there, and may the token write the service?")
		}
	}
	most := leaveFor
	if slices.ContainsFunc(snap.Listeners, func(l *connect.Listener) bool { return l.Role == connect.Relay }) {
		most = leaveGatewayFor
	}
	s.quiet(ctx, fronts, most)
	for name := range fronts {
		if _, err := s.proc.Do(ctx, "shutdown frontend "+name, nil); err != nil {
			return
		}
	}
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	last, served := time.Now(), ""
	for {
		// A connection between two requests is counted by its frontend, but is no session.
		open, requests, err := s.inboundUse(ctx, fronts)
		if err != nil {
			return
		}
		busy, err := s.inboundSessions(ctx, fronts)
		if err != nil {
			return
		}
		if busy > 0 || requests != served {
			last, served = time.Now(), requests
		}
		if open == 0 && busy == 0 || busy == 0 && time.Since(last) > idleGrace {
			return
		}
		select {
		case <-ctx.Done():
			s.log.Warn("sessions are still open after the drain timeout; they are cut", "open", max(open, busy))
			return
		case <-t.C:
		}
	}
}

// quiet waits until callers have sent no request for quietFor, at most so long.
func (s *running) quiet(ctx context.Context, fronts map[string]bool, most time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	last, seen := time.Now(), ""
	for time.Since(last) < quietFor {
		_, requests, err := s.inboundUse(ctx, fronts)
		if err != nil {
			return
		}
		if requests != seen {
			last, seen = time.Now(), requests
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// inboundUse is how many connections callers have open, and a text that changes with
// each request of theirs.
func (s *running) inboundUse(ctx context.Context, fronts map[string]bool) (open int, requests string, err error) {
	rows, err := s.haproxyStats(ctx, 1)
	for _, row := range rows {
		if fronts[row["pxname"]] {
			n, _ := strconv.Atoi(row["scur"])
			open += n
			requests += row["req_tot"] + "/" + row["stot"] + " "
		}
	}
	return open, requests, err
}

func (s *running) inboundSessions(ctx context.Context, fronts map[string]bool) (n int, err error) {
	out, err := s.proc.Do(ctx, "show sess", nil)
	if err != nil {
		return 0, err
	}
	for _, one := range runtimeapi.ParseSessions(out) {
		if fronts[one.Frontend] {
			n++
		}
	}
	return n, nil
}
