package render

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/haproxy-connect/haproxy-connect/connect"

	parser "github.com/haproxytech/config-parser/v5"
	"github.com/haproxytech/config-parser/v5/options"
)

// word refuses anything that could end a word or a line of the configuration, or
// mean something to HAProxy's parser: quotes, escapes, variables, comments.
func word(what, s string) (string, error) {
	if s == "" {
		return "", fmt.Errorf("%s is empty", what)
	}
	if len(s) > 4096 {
		return "", fmt.Errorf("%s has %d bytes: at most 4096", what, len(s))
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; c <= ' ' || c > '~' || strings.IndexByte("\"'\\#$%{}()`,", c) >= 0 {
			return "", fmt.Errorf("%s %.80q: character %q cannot be written into a configuration", what, s, c)
		}
	}
	return s, nil
}

// builder collects the lines of one section; the first error stays.
type builder struct {
	kind    Kind
	name    string
	purpose string // tells sections without a name apart
	from    string // the defaults that the section inherits
	lines   []string
	origin  string            // of the lines that are added now; "" is that of the section
	origins map[string]string // of lines that have another one than the section
	snippet connect.SnippetName
	raw     []string // lines of the snippet, which come last
	err     error
}

// section begins a section. A frontend or backend names the defaults that it inherits: HAProxy
// would otherwise take those that come last before it.
func section(kind Kind, name string) *builder {
	b := &builder{kind: kind, name: name}
	if kind == Frontend || kind == Backend {
		b.from = allDefaults
	}
	return b
}

// global begins one of the sections of the whole process, which differ in their purpose.
func global(purpose string) *builder { return &builder{kind: Global, purpose: purpose} }

// mode sets the mode, and with it the defaults to inherit.
func (b *builder) mode(http bool) *builder {
	if !http {
		return b.add("mode tcp")
	}
	b.from = httpDefaults
	return b.add("mode http")
}

// add takes a line whose variable parts were checked by the caller.
func (b *builder) add(format string, args ...any) *builder {
	line := format
	if len(args) > 0 {
		line = fmt.Sprintf(format, args...)
	}
	if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		b.fail(fmt.Errorf("%s %s: control character in line %q", b.kind, b.name, line))
	}
	if b.origin != "" {
		if b.origins == nil {
			b.origins = map[string]string{}
		}
		b.origins[line] = b.origin
	}
	b.lines = append(b.lines, line)
	return b
}

func (b *builder) fail(err error) {
	if b.err == nil {
		b.err = err
	}
}

// because sets the origin of the lines that follow; "" is that of the section.
func (b *builder) because(origin string) *builder {
	b.origin = origin
	return b
}

// check is a value that may stand in a line; the section fails if it may not.
func (b *builder) check(what, value string) string {
	v, err := word(what, value)
	if err != nil {
		b.fail(err)
	}
	return v
}

// id tells a section from the others of its Config.
func (b *builder) id() string {
	return strings.TrimSpace(string(b.kind) + " " + b.name + b.purpose)
}

// build runs the section through config-parser and insists on getting back the
// lines that went in: a line the parser drops or rewrites would not be what was
// decided here.
func (b *builder) build(comment string) (*Section, error) {
	title := strings.TrimSpace(string(b.kind) + " " + b.name)
	if b.err != nil {
		return nil, fmt.Errorf("%s: %w", title, b.err)
	}
	if strings.ContainsFunc(comment, func(r rune) bool { return r < ' ' || r > '~' }) {
		return nil, fmt.Errorf("%s: the comment is not plain text", title)
	}
	first := title
	if b.from != "" {
		first += " from " + b.from
	}
	raw := first + "\n  " + strings.Join(b.lines, "\n  ") + "\n"
	p, err := parser.New(options.Reader(strings.NewReader(raw)), options.NoNamedDefaultsFrom)
	if err != nil {
		return nil, fmt.Errorf("%s: config-parser: %w", title, err)
	}
	text := strings.TrimLeft(p.String(), "\n")
	got := map[string]int{}
	for line := range strings.Lines(text) {
		got[strings.TrimSpace(line)]++
	}
	for _, line := range b.lines {
		if got[line]--; got[line] < 0 {
			return nil, fmt.Errorf("%s: config-parser changed or dropped the line %q", title, line)
		}
	}
	if n := strings.Count(text, "\n"); n != len(b.lines)+1 {
		return nil, fmt.Errorf("%s: config-parser made %d lines of %d", title, n, len(b.lines)+1)
	}
	if b.snippet != "" { // not through the parser, which does not know every word
		text += "  # snippet " + string(b.snippet) + "\n  " + strings.Join(b.raw, "\n  ") + "\n"
	}
	sec := &Section{ID: b.id(), Kind: b.kind, Name: b.name, Comment: comment, Head: text, Snippet: b.snippet, lines: b.text(), origins: b.origins}
	sec.text = sec.assemble()
	return sec, nil
}

func (b *builder) text() string {
	return strings.Join(b.lines, "\n") + "\x00" + string(b.snippet) + "\x00" + strings.Join(b.raw, "\n")
}

// madeOf reports whether a section was made of just this.
func (s *Section) madeOf(b *builder, comment string) bool {
	return b.err == nil && s.ID == b.id() && s.Comment == comment && s.lines == b.text()
}

// ms writes a duration as HAProxy takes it. Zero or less means no limit, which is written as 24
// days.
func ms(d time.Duration) string {
	if d <= 0 {
		d = 24 * 24 * time.Hour
	}
	return fmt.Sprintf("%dms", max(d.Milliseconds(), 1))
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:8])
}
