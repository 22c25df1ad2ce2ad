package main

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/haproxy-connect/haproxy-connect/"

// mayImport is the table of rooms in haproxy/README.md: what each package may import of
// ours. A package that is not listed fails.
var mayImport = map[string][]string{
	"cmd/haproxy-connect":                     {"certs", "connect", "connect/consul", "connect/dialer", "haproxy", "haproxy/process", "haproxy/render", "haproxy/runtimeapi", "haproxy/selftest", "intentions", "intentions/jwt", "intentions/spoe", "lua"},
	"cmd/haproxy-connect/internal/scripttest": {"certs", "connect", "connect/consul", "haproxy/runtimeapi"},
	"certs":               {},
	"connect":             {"certs", "intentions"},
	"connect/connecttest": {"connect", "certs", "intentions"},
	"connect/consul":      {"connect", "certs", "intentions"},
	"connect/dialer":      {"certs"},
	"haproxy":             {"connect", "certs", "haproxy/render", "haproxy/runtimeapi"},
	"haproxy/process":     {"haproxy/runtimeapi"},
	"haproxy/render":      {"connect", "certs", "intentions", "intentions/spoe", "lua"},
	"haproxy/runtimeapi":  {},
	"haproxy/selftest":    {"connect", "certs", "intentions", "haproxy", "haproxy/render"},
	"intentions":          {"certs"},
	"intentions/jwt":      {"intentions"},
	"intentions/spoe":     {"intentions", "certs"},
	"lua":                 {},
}

// only maps an external library to the one package that may import it; tests and scripttest may too.
var only = map[string]string{
	"github.com/hashicorp/consul/api":      "connect/consul",
	"github.com/haproxytech/config-parser": "haproxy/render",
	"github.com/spiffe/go-spiffe":          "certs",
	"github.com/go-jose/go-jose":           "intentions/jwt",
	"github.com/prometheus/client_golang":  "cmd/haproxy-connect",
	"golang.org/x/sync":                    "cmd/haproxy-connect",
	"golang.org/x/net":                     "cmd/haproxy-connect",
	"github.com/hashicorp/go-sockaddr":     "connect/consul",
	"golang.org/x/sys":                     "haproxy/process",
}

func TestArchitecture(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,Doc", module+"...").Output()
	require.NoError(t, err)
	seen := 0
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var p struct {
			ImportPath, Doc string
			Imports         []string
		}
		require.NoError(t, d.Decode(&p))
		name := strings.TrimPrefix(p.ImportPath, module)
		may, listed := mayImport[name]
		if !listed {
			t.Errorf("package %s is not in the table of rooms", name)
			continue
		}
		seen++
		if p.Doc == "" {
			t.Errorf("package %s has no doc comment", name)
		}
		for _, imp := range p.Imports {
			if ours, ok := strings.CutPrefix(imp, module); ok && !slices.Contains(may, ours) {
				t.Errorf("%s imports %s, which its room does not allow", name, ours)
			}
			for lib, home := range only {
				if strings.HasPrefix(imp, lib) && name != home && !strings.HasSuffix(name, "/scripttest") {
					t.Errorf("%s imports %s, whose only home is %s", name, imp, home)
				}
			}
			if imp == "github.com/hashicorp/consul" || strings.HasPrefix(imp, "github.com/hashicorp/consul/agent") {
				t.Errorf("%s imports Consul's root module", name)
			}
		}
	}
	require.Equal(t, len(mayImport), seen, "packages found")
}
