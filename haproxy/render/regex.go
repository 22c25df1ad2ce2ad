package render

import (
	"errors"
	"fmt"
	"regexp/syntax"
	"strings"
	"unicode"
	"unicode/utf8"
)

// matchLimit bounds the steps of a match: a pattern that goes astray costs 0.3 ms of a
// thread and does not match, where HAProxy's own bound would cost 20.
const matchLimit = "(*LIMIT_MATCH=20000)"

// pattern translates a regular expression of RE2, as Consul means it, into one of PCRE2 as
// HAProxy uses it: on bytes, without Unicode. It matches a whole text. What PCRE2 cannot
// express is an error, never a pattern that matches something else.
func pattern(re string) (string, error) {
	body, err := expression(re, "")
	if err != nil {
		return "", err
	}
	return matchLimit + `\A(?:` + body + `)\z`, nil
}

// expression is a pattern without its anchors, for a part of a larger text. Nothing in it
// matches one of the bytes in without.
func expression(re, without string) (string, error) {
	tree, err := syntax.Parse(re, syntax.Perl)
	if err != nil {
		return "", err
	}
	p := &printer{within: without}
	p.print(tree)
	if p.err == nil && p.b.Len() > 16<<10 {
		p.err = errors.New("a pattern this long is not taken over")
	}
	if p.err != nil {
		return "", fmt.Errorf("regular expression %.80q: %w", re, p.err)
	}
	return p.b.String(), nil
}

// printer writes a parse tree byte by byte.
type printer struct {
	b      strings.Builder
	within string // bytes that no class takes
	err    error
}

func (p *printer) print(re *syntax.Regexp) {
	switch re.Op {
	case syntax.OpNoMatch:
		p.b.WriteString(`(?!)`)
	case syntax.OpEmptyMatch:
	case syntax.OpLiteral:
		for _, r := range re.Rune {
			p.set(folded(r, re.Flags&syntax.FoldCase != 0))
		}
	case syntax.OpCharClass:
		p.set(set{re.Rune})
	case syntax.OpAnyCharNotNL:
		p.set(anyNotNL)
	case syntax.OpAnyChar:
		p.set(anyRune)
	case syntax.OpBeginLine:
		p.b.WriteString(`(?<![^\x0a])`)
	case syntax.OpEndLine:
		p.b.WriteString(`(?![^\x0a])`)
	case syntax.OpBeginText:
		p.b.WriteString(`\A`)
	case syntax.OpEndText:
		p.b.WriteString(`\z`)
	case syntax.OpWordBoundary:
		p.b.WriteString(`\b`)
	case syntax.OpNoWordBoundary:
		p.b.WriteString(`\B`)
	case syntax.OpCapture:
		p.group(re.Sub[0])
	case syntax.OpConcat:
		for _, sub := range re.Sub {
			p.print(sub)
		}
	case syntax.OpAlternate:
		p.b.WriteString(`(?:`)
		for i, sub := range re.Sub {
			if i > 0 {
				p.b.WriteByte('|')
			}
			p.print(sub)
		}
		p.b.WriteByte(')')
	case syntax.OpStar:
		p.repeat(re.Sub[0], 0, -1)
	case syntax.OpPlus:
		p.repeat(re.Sub[0], 1, -1)
	case syntax.OpQuest:
		p.repeat(re.Sub[0], 0, 1)
	case syntax.OpRepeat:
		p.repeat(re.Sub[0], re.Min, re.Max)
	default:
		p.err = fmt.Errorf("%s is not taken over", re.Op)
	}
}

func (p *printer) group(re *syntax.Regexp) {
	p.b.WriteString(`(?:`)
	p.print(re)
	p.b.WriteByte(')')
}

// repeat writes a loop; most < 0 is without end. A character beyond ASCII is several bytes: a
// loop without end takes them byte by byte after the required repetitions, which needs no
// stack.
func (p *printer) repeat(re *syntax.Regexp, least, most int) {
	if re.Op == syntax.OpEmptyMatch {
		return
	}
	if s, ok := setOf(re); ok && most < 0 && s.allBeyond() {
		if least > 0 {
			p.group(re)
			p.times(least, least)
		}
		p.b.WriteString(s.bytes(p.within, true))
		p.b.WriteByte('*')
		return
	}
	p.group(re)
	p.times(least, most)
}

func (p *printer) times(least, most int) {
	switch {
	case least == 0 && most < 0:
		p.b.WriteByte('*')
	case least == 1 && most < 0:
		p.b.WriteByte('+')
	case least == 0 && most == 1:
		p.b.WriteByte('?')
	case least == 1 && most == 1:
	case most < 0:
		fmt.Fprintf(&p.b, "{%d,}", least)
	case least == most:
		fmt.Fprintf(&p.b, "{%d}", least)
	default:
		fmt.Fprintf(&p.b, "{%d,%d}", least, most)
	}
}

// set is characters, as pairs of first and last.
type set struct{ pairs []rune }

var (
	anyRune  = set{[]rune{0, unicode.MaxRune}}
	anyNotNL = set{[]rune{0, '\n' - 1, '\n' + 1, unicode.MaxRune}}
)

// setOf returns the characters of a class or a dot; false for any other expression.
func setOf(re *syntax.Regexp) (set, bool) {
	switch re.Op {
	case syntax.OpCharClass:
		return set{re.Rune}, true
	case syntax.OpAnyChar:
		return anyRune, true
	case syntax.OpAnyCharNotNL:
		return anyNotNL, true
	}
	return set{}, false
}

// folded is a character, with all its cases if fold is set.
func folded(r rune, fold bool) set {
	out := set{[]rune{r, r}}
	if fold {
		for next := unicode.SimpleFold(r); next != r; next = unicode.SimpleFold(next) {
			out.pairs = append(out.pairs, next, next)
		}
	}
	return out
}

// allBeyond reports whether every character beyond ASCII is in the set.
func (s set) allBeyond() bool {
	for i := 0; i < len(s.pairs); i += 2 {
		if s.pairs[i] <= utf8.RuneSelf && s.pairs[i+1] == unicode.MaxRune {
			return true
		}
	}
	return false
}

// bytes is the class of the set's ASCII characters but those in without; "" is none. high
// adds every byte beyond ASCII.
func (s set) bytes(without string, high bool) string {
	var in [utf8.RuneSelf]bool
	for i := 0; i < len(s.pairs); i += 2 {
		for r := s.pairs[i]; r <= s.pairs[i+1] && r < utf8.RuneSelf; r++ {
			in[r] = strings.IndexByte(without, byte(r)) < 0
		}
	}
	var b strings.Builder
	for first := 0; first < len(in); first++ {
		if !in[first] {
			continue
		}
		last := first
		for last+1 < len(in) && in[last+1] {
			last++
		}
		fmt.Fprintf(&b, `\x%02x`, first)
		if last > first {
			fmt.Fprintf(&b, `-\x%02x`, last)
		}
		first = last
	}
	if high {
		b.WriteString(`\x80-\xff`)
	}
	if b.Len() == 0 {
		return ""
	}
	return "[" + b.String() + "]"
}

// beyond is every character of UTF-8 of more than one byte.
const beyond = `[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}`

// mostBeyond is how many characters beyond ASCII a class may name.
const mostBeyond = 64

// set writes one of these characters.
func (p *printer) set(s set) {
	var out []string
	if ascii := s.bytes(p.within, false); ascii != "" {
		out = append(out, ascii)
	}
	if s.allBeyond() {
		out = append(out, beyond)
	} else {
		for i := 0; i < len(s.pairs); i += 2 {
			for r := max(s.pairs[i], utf8.RuneSelf); r <= s.pairs[i+1]; r++ {
				if len(out) > mostBeyond {
					p.err = errors.New("a class with some characters beyond ASCII, but not all, is not taken over")
					return
				}
				text := ""
				for _, c := range []byte(string(r)) {
					text += fmt.Sprintf(`\x%02x`, c)
				}
				out = append(out, text)
			}
		}
	}
	switch {
	case len(out) == 0:
		p.b.WriteString(`(?!)`)
	case len(out) == 1 && out[0] != beyond:
		p.b.WriteString(out[0])
	default:
		p.b.WriteString(`(?:` + strings.Join(out, "|") + `)`)
	}
}
