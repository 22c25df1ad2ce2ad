package haproxy

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/haproxy-connect/haproxy-connect/certs"
	"github.com/haproxy-connect/haproxy-connect/connect"
	"github.com/haproxy-connect/haproxy-connect/haproxy/render"
)

// snippets judges lines in HAProxy's own words, which only HAProxy can judge: what it refuses is
// replaced by what it took last, or left out. What it took outlives this process, so that a
// HAProxy that has forgotten a word does not take the proxy down. The zero value knows nothing.
type snippets struct {
	loaded  bool
	good    map[connect.SnippetName]string // taken last, by any HAProxy; as in the file
	refused map[connect.SnippetName][]refusedText
	used    map[connect.SnippetName]string // of the snapshot that is tried now
}

type refusedText struct {
	text string
	err  error
}

// snippetsFile keeps what HAProxy took last.
const snippetsFile = "snippets.json"

// judged returns snap with the snippets that may be used, and says which may not.
func (m *Manager) judged(snap *connect.Snapshot) (*connect.Snapshot, []string) {
	s := &m.snippets
	if len(snap.Snippets) == 0 {
		s.refused, s.used = nil, nil
		return snap, nil
	}
	if !s.loaded {
		s.loaded = true
		if b, err := os.ReadFile(filepath.Join(m.conf.Dir, snippetsFile)); err == nil {
			_ = json.Unmarshal(b, &s.good) // a file that cannot be read is of no use, and harms nobody
		}
	}
	out := *snap
	out.Snippets = map[connect.SnippetName]string{}
	var said []string
	for _, name := range slices.Sorted(maps.Keys(snap.Snippets)) {
		text := snap.Snippets[name]
		err := s.why(name, text)
		if err == nil {
			out.Snippets[name] = text
			continue
		}
		instead := "it is left out"
		if last := s.good[name]; last != "" && s.why(name, last) == nil {
			out.Snippets[name] = last
			instead = "the last one that HAProxy took stays"
		}
		said = append(said, fmt.Sprintf("snippet %.80q is not used: %v; %s", name, err, instead))
	}
	for name := range s.refused {
		if snap.Snippets[name] == "" {
			delete(s.refused, name)
		}
	}
	s.used = out.Snippets
	return &out, said
}

// why is the reason not to use a text, or nil.
func (s *snippets) why(name connect.SnippetName, text string) error {
	for _, r := range s.refused[name] {
		if r.text == text {
			return r.err
		}
	}
	return render.CheckSnippet(text)
}

// atFault finds what HAProxy refused, and takes it out: the snippet in whose section it names a
// line; else what it has never taken; else the upstreams whose lines it names; else, where it refuses the
// configuration itself, every snippet that it has not taken yet. found is false if nothing is at fault.
func (m *Manager) atFault(snap *connect.Snapshot, want *render.Config, err error) (found bool) {
	var se *stageError
	if !errors.As(err, &se) || se.stage != "check" && se.stage != "reload" {
		return false
	}
	named := map[connect.SnippetName]bool{}
	for _, line := range lineOf.FindAllStringSubmatch(err.Error(), -1) {
		n, _ := strconv.Atoi(line[1]) // digits
		if sec := want.At(n); sec != nil {
			named[sec.Snippet] = true
		}
	}
	s := &m.snippets
	return m.suspect(se.err, func(name connect.SnippetName, _ string) bool { return named[name] }) ||
		m.suspect(se.err, func(name connect.SnippetName, text string) bool { return s.good[name] != text }) ||
		m.exclude(snap, want, err) ||
		se.stage == "check" && m.suspect(se.err, func(connect.SnippetName, string) bool { return true })
}

// suspect refuses those snippets which the running HAProxy has not taken.
func (m *Manager) suspect(err error, which func(name connect.SnippetName, text string) bool) (found bool) {
	s := &m.snippets
	for name, text := range s.used {
		if m.ran != nil && m.ran.Snippets[name] == text || !which(name, text) {
			continue
		}
		if s.refused == nil {
			s.refused = map[connect.SnippetName][]refusedText{}
		}
		s.refused[name] = append(s.refused[name], refusedText{text, fmt.Errorf("HAProxy refuses it: %w", err)})
		found = true
	}
	return found
}

// keep remembers what HAProxy has taken.
func (m *Manager) keep(ran *connect.Snapshot) {
	s := &m.snippets
	if maps.Equal(s.good, ran.Snippets) {
		return
	}
	s.good = maps.Clone(ran.Snippets)
	text, err := json.MarshalIndent(s.good, "", "  ")
	if err == nil {
		err = certs.WriteFile(filepath.Join(m.conf.Dir, snippetsFile), text, 0o600)
	}
	if err != nil {
		m.conf.Log.Warn("the snippets that HAProxy took are not remembered", "error", err, "try", tryDisk)
	}
}
