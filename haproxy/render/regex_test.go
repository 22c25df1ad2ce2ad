package render

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func TestPattern(t *testing.T) {
	for re, want := range map[string]string{
		`/v[0-9]+`:   `[\x2f][\x76](?:[\x30-\x39])+`,
		`a.*`:        `[\x61][\x00-\x09\x0b-\x7f\x80-\xff]*`,
		`(?i)k`:      `(?:[\x4b\x6b]|\xe2\x84\xaa)`,
		`é`:          `\xc3\xa9`,
		`(a|b)?`:     `(?:(?:[\x61-\x62]))?`,
		`^a$`:        `\A[\x61]\z`,
		`a{2,3}b{4}`: `(?:[\x61]){2,3}(?:[\x62]){4}`,
	} {
		got, err := expression(re, "")
		require.NoError(t, err, re)
		require.Equal(t, want, got, re)
	}
	for _, re := range []string{`(`, `a(?=b)`, `\C`, `\pL`, `[α-ω]{2}[а-я]\pN`, `(?<n>`, `\1`} {
		_, err := pattern(re)
		require.Error(t, err, re)
	}
}

// randomPattern is an expression of the grammar that Consul's users have.
func randomPattern(r *rand.Rand, depth int) string {
	atoms := []string{"a", "b", "/", "é", ".", `\d`, `\w`, `\s`, `[ab/]`, `[^a]`, `\.`, "x", "(?i:a)", `[é]`, `\b`, "-", `\x{e9}`, "^", "$"}
	if depth == 0 {
		return atoms[r.IntN(len(atoms))]
	}
	sub := func() string { return randomPattern(r, depth-1) }
	switch r.IntN(7) {
	case 0:
		return sub() + sub()
	case 1:
		return "(" + sub() + "|" + sub() + ")"
	case 2:
		return "(?:" + sub() + ")*"
	case 3:
		return "(?:" + sub() + ")+"
	case 4:
		return "(" + sub() + ")?"
	case 5:
		return fmt.Sprintf("(?:%s){%d,%d}", sub(), r.IntN(2), 1+r.IntN(2))
	}
	return sub() + sub() + sub()
}

// PCRE2 matches what Go matches and nothing else, byte by byte.
func TestPatternsAgreeWithPCRE2(t *testing.T) {
	grep, err := exec.LookPath("grep")
	require.NoError(t, err)
	r := rand.New(rand.NewPCG(7, 11))
	letters := []string{"a", "b", "/", "é", "A", "x", "1", " ", ".", "-", "ſ", "_", "\t"}
	tried := 0
	for range 400 {
		re := randomPattern(r, 1+r.IntN(3))
		p, err := expression(re, "")
		if err != nil {
			continue
		}
		whole := regexp.MustCompile(`\A(?:` + re + `)\z`)
		var texts []string
		for range 40 {
			text := ""
			for range r.IntN(7) {
				text += letters[r.IntN(len(letters))]
			}
			texts = append(texts, text)
		}
		cmd := exec.Command(grep, "-z", "-a", "-n", "-P", "-e", `\A(?:`+p+`)\z`)
		cmd.Env = []string{"LC_ALL=C"}
		cmd.Stdin = strings.NewReader(strings.Join(texts, "\x00") + "\x00")
		out, err := cmd.Output()
		if exit, is := err.(*exec.ExitError); is {
			require.Equal(t, 1, exit.ExitCode(), "%s: %s", p, exit.Stderr)
		} else {
			require.NoError(t, err)
		}
		matched := map[int]bool{}
		for line := range bytes.SplitSeq(out, []byte{0}) {
			var n int
			if _, err := fmt.Sscanf(string(line), "%d:", &n); err == nil {
				matched[n-1] = true
			}
		}
		for i, text := range texts {
			require.Equal(t, whole.MatchString(text), matched[i], "%q as %q on %q", re, p, text)
			tried++
		}
	}
	require.Greater(t, tried, 8000)
}

// Whatever an entry says, a pattern is plain text in one line, or refused.
func FuzzPattern(f *testing.F) {
	for _, re := range []string{"/v[0-9]+/.*", "(a+)+b", "(?i)straße", "[^\n]", "a{1000}", "'", "\\x00", "(?s).", "\xff", "[[:alpha:]]"} {
		f.Add(re)
	}
	f.Fuzz(func(t *testing.T, re string) {
		p, err := pattern(re)
		if err != nil {
			return
		}
		if !utf8.ValidString(p) || strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r > '~' || r == '\'' || r == '#' }) {
			t.Fatalf("%q became %q", re, p)
		}
		if _, err := regexp.Compile(re); err != nil {
			t.Fatalf("%q is none to Go, and became %q: %v", re, p, err)
		}
	})
}
