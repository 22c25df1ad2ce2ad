package haproxy

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/tools/txtar"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/connect/connecttest"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
	"github.com/haproxy-connect/haproxy-connect/intentions"
)

var update = flag.Bool("update", false, "write what the tests get as what they expect")

// planCase is one side of a case in testdata/plan.
type planCase struct {
	Inbound    connect.Protocol // "": a client only
	Policy     string           // any text: another text is another policy
	Leaf, Root int              // which of the test's certificates
	Upstreams  []planUpstream
}

type planUpstream struct {
	Name      string
	Protocol  connect.Protocol
	Port      int
	Connect   string
	Passive   bool
	Endpoints []planEndpoint
}

type planEndpoint struct {
	Name, Address string
	Port, Weight  int
}

type planCerts struct {
	cas    [2]*certs.Authority
	leaves [2]*certs.Leaf
}

func newPlanCerts(t testing.TB) *planCerts {
	var p planCerts
	for i := range p.cas {
		var err error
		p.cas[i], err = certs.NewAuthority("11111111-2222-3333-4444-555555555555.consul")
		require.NoError(t, err)
		p.leaves[i], err = p.cas[i].Leaf("www", time.Hour)
		require.NoError(t, err)
	}
	return &p
}

func (c planCase) render(t testing.TB, p *planCerts, r *render.Renderer, prev *render.Config) *render.Config {
	roots, err := p.cas[c.Root].Roots()
	require.NoError(t, err)
	s := connecttest.Snapshot(p.leaves[c.Leaf], roots)
	if c.Inbound != "" {
		public := connecttest.Public(c.Inbound)
		public.Listener.Branches[0].Guard.Policy = intentions.NewPolicy(intentions.Config{Destination: c.Policy})
		connecttest.Add(s, public)
	}
	for _, u := range c.Upstreams {
		var list []connect.Endpoint
		for _, e := range u.Endpoints {
			list = append(list, connect.Endpoint{Name: e.Name, Address: e.Address, Port: e.Port, Weight: e.Weight})
		}
		up := connecttest.Upstream(u.Name, u.Protocol, u.Port, p.cas[0].ID(u.Name), list...)
		if timeout, err := time.ParseDuration(u.Connect); err == nil {
			up.Group.Connect = timeout
		}
		if u.Passive {
			up.Group.Passive = &connect.PassiveHealth{Interval: time.Second, MaxFailures: 3, BaseEjection: 30 * time.Second}
		}
		connecttest.Add(s, up)
	}
	conf, refused, err := r.Render(s, prev)
	require.NoError(t, err)
	require.Empty(t, refused)
	return conf
}

// TestPlan: two states in a file, and the plan between them as text.
func TestPlan(t *testing.T) {
	files, err := filepath.Glob("../testdata/plan/*.txtar")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	p := newPlanCerts(t)
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			require.NoError(t, err)
			var now, want planCase
			got := map[string]*txtar.File{}
			for i := range ar.Files {
				got[ar.Files[i].Name] = &ar.Files[i]
			}
			require.NoError(t, json.Unmarshal(got["running.json"].Data, &now))
			require.NoError(t, json.Unmarshal(got["want.json"].Data, &want))
			r, err := render.New(render.Options{Dir: "/run/x"})
			require.NoError(t, err)
			running := now.render(t, p, r, nil)
			next := want.render(t, p, r, running)
			for name, can := range map[string]Features{"plan": {}, "plan-ca-commit": {CACommit: true}} {
				text := NewPlan(running, next, can).String()
				if got[name] == nil {
					continue
				}
				if *update {
					got[name].Data = []byte(text)
					continue
				}
				require.Equal(t, string(got[name].Data), text)
			}
			require.True(t, NewPlan(next, next, Features{}).Empty(), "a second time there is nothing to do")
			if *update {
				require.NoError(t, os.WriteFile(file, txtar.Format(ar), 0o644))
			}
		})
	}
}

func TestPlanPrintsNoKey(t *testing.T) {
	p := newPlanCerts(t)
	r, err := render.New(render.Options{Dir: "/run/x"})
	require.NoError(t, err)
	a := planCase{}.render(t, p, r, nil)
	b := planCase{Leaf: 1}.render(t, p, r, a)
	text := NewPlan(a, b, Features{}).String()
	require.Contains(t, text, "set ssl cert")
	require.NotContains(t, text, "KEY")
}

func BenchmarkPlanOneFlip(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("%d-upstreams", n), func(b *testing.B) {
			p := newPlanCerts(b)
			r, err := render.New(render.Options{Dir: "/run/x"})
			require.NoError(b, err)
			var c planCase
			for i := range n {
				one := planUpstream{Name: fmt.Sprintf("u%d", i), Protocol: connect.HTTP, Port: 10000 + i}
				for j := range 10 {
					one.Endpoints = append(one.Endpoints, planEndpoint{fmt.Sprintf("e%d", j), fmt.Sprintf("10.0.%d.%d", i%250, j+1), 20000, 1})
				}
				c.Upstreams = append(c.Upstreams, one)
			}
			full := c.render(b, p, r, nil)
			c.Upstreams[0].Endpoints = c.Upstreams[0].Endpoints[:9]
			less := c.render(b, p, r, full)
			b.ReportAllocs()
			for b.Loop() {
				if plan := NewPlan(full, less, Features{}); plan.Reload != "" || len(plan.Commands) != 2 {
					b.Fatal(plan)
				}
			}
		})
	}
}
