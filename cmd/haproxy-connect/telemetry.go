package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"
)

// telemetry serves metrics at the addresses that Consul's central configuration names, apart from the
// admin address: a scraped address may be open to the network, the admin address may not.
func (s *sidecar) telemetry(ctx context.Context) {
	prometheus, stats := http.NewServeMux(), http.NewServeMux()
	prometheus.HandleFunc("GET /metrics", s.serveMetrics)
	stats.HandleFunc("GET /stats/prometheus", s.serveMetrics)
	stats.Handle("GET /stats", s.stats())
	servers := [2]struct {
		key     string
		handler http.Handler
		addr    string
		srv     *http.Server
		told    string
	}{{key: "envoy_prometheus_bind_addr", handler: prometheus}, {key: "envoy_stats_bind_addr", handler: stats}}
	t := time.NewTicker(250 * time.Millisecond)
	defer t.Stop()
	defer func() {
		for _, one := range servers {
			if one.srv != nil {
				one.srv.Close()
			}
		}
	}()
	for {
		if snap := s.newest.Load(); snap != nil {
			want := [2]string{snap.Telemetry.Prometheus, snap.Telemetry.Stats}
			for i := range servers {
				one := &servers[i]
				if one.addr == want[i] {
					continue
				}
				if one.srv != nil {
					one.srv.Close()
					one.srv = nil
				}
				one.addr = ""
				if want[i] == "" {
					continue
				}
				ln, err := net.Listen("tcp", want[i])
				if err != nil {
					if err.Error() != one.told {
						one.told = err.Error()
						s.log.Warn("cannot serve metrics where Consul wants them; trying again", "key", one.key, "value", want[i], "error", err, "try", "is the port taken?")
					}
					continue
				}
				one.addr, one.told = want[i], ""
				srv := server(one.handler)
				one.srv = srv
				s.log.Info("metrics for others", "key", one.key, "address", "http://"+want[i])
				go func() {
					if err := srv.Serve(limited(ln)); !errors.Is(err, http.ErrServerClosed) {
						s.log.Warn("metrics for others ended", "error", err)
					}
				}()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
