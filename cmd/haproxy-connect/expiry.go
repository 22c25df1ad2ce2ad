package main

import (
	"context"
	"time"

	"github.com/haproxy-connect/haproxy-connect/certs"
)

// watchExpiry warns when a leaf nears its end: the agent renews a leaf at 60 to 90 % of its
// life, so an older leaf is not being renewed.
func (s *sidecar) watchExpiry(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	var leaf *certs.Leaf
	told := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		snap := s.newest.Load()
		if snap == nil {
			continue
		}
		if snap.Leaf() != leaf {
			leaf, told = snap.Leaf(), 0
		}
		if leaf == nil { // of a gateway that ends no TLS
			continue
		}
		stage := expiryStage(leaf.Remaining(time.Now()))
		if stage <= told {
			continue
		}
		told = stage
		left := time.Until(leaf.NotAfter).Round(time.Second)
		if left <= 0 {
			s.log.Error("the leaf certificate has expired: peers refuse us", "serial", leaf.Serial, "try", "is the agent reachable, and are its servers?")
		} else {
			s.log.Warn("the leaf certificate nears its end and was not renewed", "serial", leaf.Serial, "left", left, "try", "is the agent reachable, and are its servers?")
		}
	}
}

// expiryStage counts the warnings due: at 8 % of the life, 4 %, 1 %, and at the end.
func expiryStage(remaining float64) int {
	n := 0
	for _, limit := range []float64{0.08, 0.04, 0.01, 0} {
		if remaining <= limit {
			n++
		}
	}
	return n
}
