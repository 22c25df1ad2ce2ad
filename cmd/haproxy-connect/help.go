package main

import (
	"flag"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"
)

// helpError asks for the help of a command. It is no failure.
type helpError struct{ fs *flag.FlagSet }

func (h helpError) Error() string { return "help" }

// help prints what a command is for and its own flags; for the program itself, the usage and
// all flags.
func help(fs *flag.FlagSet, w io.Writer) {
	defer fs.SetOutput(io.Discard)
	if fs.Name() == program {
		fmt.Fprintf(w, "%s\nFlags:\n", usage)
		fs.SetOutput(w)
		fs.PrintDefaults()
		return
	}
	fmt.Fprintf(w, "haproxy-connect %s [flags]\n", fs.Name())
	for line := range strings.Lines(usage) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), fs.Name()+" "); ok {
			fmt.Fprintf(w, "  %s\n", strings.TrimSpace(rest))
		}
	}
	common := newFlags(program, &config{})
	own := flag.NewFlagSet(fs.Name(), flag.ContinueOnError)
	own.SetOutput(w)
	shared := false
	fs.VisitAll(func(f *flag.Flag) {
		if f.Name == "admin-addr" && fs.Lookup("http-addr") == nil || common.Lookup(f.Name) == nil {
			own.Var(f.Value, f.Name, f.Usage)
			own.Lookup(f.Name).DefValue = f.DefValue
			return
		}
		shared = true
	})
	own.PrintDefaults()
	if shared {
		fmt.Fprintln(w, "and the flags of haproxy-connect itself, which say where Consul is and which sidecar is meant: haproxy-connect -h")
	}
}

// program is the name of the flag set of the run command, whose flags most commands share.
const program = "haproxy-connect"

var invalid = regexp.MustCompile(`^invalid (?:boolean )?value (".*") for (?:flag )?-([^ :]+): .*$`)

// flagError is the flag package's error on one line, with what would be right.
func flagError(fs *flag.FlagSet, err error) error {
	text := oneLine(err).Error()
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		if near := nearest(fs, name); near != "" {
			text += "; did you mean -" + near + "?"
		} else {
			text += "; haproxy-connect -h lists them"
		}
	}
	if m := invalid.FindStringSubmatch(text); m != nil {
		if f := fs.Lookup(m[2]); f != nil {
			text = fmt.Sprintf("invalid value %s for flag -%s: %s", m[1], m[2], wanted(f))
		}
	}
	return usagef("%s", text)
}

// wanted says what values a flag takes.
func wanted(f *flag.Flag) string {
	g, ok := f.Value.(flag.Getter)
	if !ok {
		return "not a value of this flag"
	}
	switch g.Get().(type) {
	case time.Duration:
		return "want a duration such as 30s or 5m"
	case int:
		return "want a whole number"
	case bool:
		return "want true or false"
	}
	return "not a value of this flag"
}

// nearest is the flag that a name was probably meant for, or "".
func nearest(fs *flag.FlagSet, name string) string {
	best, least := "", 3
	if i := strings.IndexByte(name, '='); i >= 0 {
		name = name[:i]
	}
	fs.VisitAll(func(f *flag.Flag) {
		if d := distance(name, f.Name); d < least && d < len(name) {
			best, least = f.Name, d
		}
	})
	return best
}

// distance counts the letters that have to be put in, left out or changed.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		last := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := last
			if a[i] != b[j] {
				d = min(last, row[j], row[j+1]) + 1
			}
			last, row[j+1] = row[j+1], d
		}
	}
	return row[len(b)]
}

// strangers returns a warning for each HAPROXY_CONNECT_ variable that no flag reads: a
// misspelt name would otherwise be ignored in silence. Variables that Kubernetes and Docker
// add for a service called haproxy-connect are not reported.
func strangers(fs *flag.FlagSet, environ []string) (out []string) {
	for _, v := range environ {
		name, _, _ := strings.Cut(v, "=")
		rest, ok := strings.CutPrefix(name, "HAPROXY_CONNECT_")
		if !ok || name == "HAPROXY_CONNECT_CACHE" || strings.HasPrefix(rest, "PORT_") || strings.HasPrefix(rest, "SERVICE_") {
			continue
		}
		flagName := strings.ToLower(strings.ReplaceAll(rest, "_", "-"))
		if fs.Lookup(flagName) != nil {
			continue
		}
		text := name + " in the environment is no flag of this program, and is ignored"
		if near := nearest(fs, flagName); near != "" {
			text += "; did you mean HAPROXY_CONNECT_" + strings.ToUpper(strings.ReplaceAll(near, "-", "_")) + "?"
		}
		out = append(out, text)
	}
	slices.Sort(out)
	return out
}

// injected reports a variable that Docker or Kubernetes sets for a service that is called
// haproxy-connect: HAPROXY_CONNECT_PORT=tcp://10.0.0.1:80.
func injected(name, value string) bool {
	return name == "HAPROXY_CONNECT_PORT" && strings.Contains(value, "://")
}
