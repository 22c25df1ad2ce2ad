package main

import (
	"flag"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
)

func document(t *testing.T, name string) string {
	b, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(b)
}

// TestTablesOfTheProgram checks that README.md names every command, flag and metric, and that
// its tables name no flag or metric that the program does not have.
func TestTablesOfTheProgram(t *testing.T) {
	text := document(t, "README.md")
	known := map[string]bool{}
	for name := range commands {
		if name != "run" {
			require.Contains(t, text, "haproxy-connect "+name, "command")
		}
		flagsOf(name).VisitAll(func(f *flag.Flag) {
			known[f.Name] = true
			require.Regexp(t, "`[^`]*-"+regexp.QuoteMeta(f.Name)+"\\b", text, "flag")
		})
	}
	for _, m := range regexp.MustCompile("(?m)^\\| (`-[^|]+)\\|").FindAllStringSubmatch(text, -1) {
		for _, name := range regexp.MustCompile("`-([a-z-]+)`").FindAllStringSubmatch(m[1], -1) {
			require.True(t, known[name[1]], "the table has -%s, the program has not", name[1])
		}
	}
	ours := map[string]bool{"haproxy_connect_authorizations_total": true}
	descs := make(chan *prometheus.Desc, 100)
	newMetrics(&sidecar{}).Describe(descs)
	close(descs)
	name := regexp.MustCompile(`fqName: "([^"]+)"`)
	for d := range descs {
		ours[name.FindStringSubmatch(d.String())[1]] = true
	}
	for metric := range ours {
		require.Contains(t, text, "`"+metric, "metric")
	}
	for _, m := range regexp.MustCompile("`(haproxy_connect_[a-z_]+)").FindAllStringSubmatch(text, -1) {
		require.True(t, ours[m[1]], "the table has %s, the program has not", m[1])
	}
}

// TestTableOfRooms checks that the table of rooms in haproxy/README.md says what mayImport says.
func TestTableOfRooms(t *testing.T) {
	rows := map[string][]string{}
	table, _, _ := strings.Cut(document(t, "../../haproxy/README.md"), "## An endpoint's path")
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z/-]+)` \\| [^|]+ \\| ([^|]+) \\|$").FindAllStringSubmatch(table, -1) {
		var may []string
		if m[2] != "-" {
			may = strings.Split(m[2], ", ")
		}
		rows[m[1]] = may
	}
	for room, may := range mayImport {
		got, listed := rows[room]
		require.True(t, listed, room)
		if slices.Equal(got, []string{"all"}) {
			continue
		}
		require.ElementsMatch(t, may, got, room)
	}
}
