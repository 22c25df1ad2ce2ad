package render

import (
	"fmt"
	"slices"
	"strings"

	"github.com/haproxy-connect/haproxy-connect/connect"
)

// sectionWords begin a section, or decide whether the lines after them count.
var sectionWords = []string{"global", "defaults", "frontend", "backend", "listen", "userlist", "peers", "resolvers", "mailers", "cache", "program", "http-errors", "ring",
	"log-forward", "fcgi-app", "crt-store", "traces", "acme", "log-profile", "healthcheck", "mailer"}

// CheckSnippet reports why lines cannot stand in a section. HAProxy itself judges the rest.
func CheckSnippet(text string) error {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		first, _, _ := strings.Cut(strings.ReplaceAll(line, "\t", " "), " ")
		switch {
		case slices.Contains(sectionWords, first) || strings.HasPrefix(first, "."):
			return fmt.Errorf("%.80q begins another section or a condition", line)
		case strings.ContainsFunc(line, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
			return fmt.Errorf("%.80q has a control character", line)
		}
	}
	return nil
}

// snippet ends a section with the lines of this name, if there are any. They come last: what
// was decided before them stays decided.
func (f *file) snippet(b *builder, name connect.SnippetName) *builder {
	text := f.snap.Snippets[name]
	if name == "" || text == "" {
		return b
	}
	b.fail(CheckSnippet(text))
	b.snippet = name
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			b.raw = append(b.raw, line)
		}
	}
	return b
}
