package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"text/template"
)

// completions are the scripts for each shell, made of the commands and flags there are.
var completions = map[string]string{
	"bash": `# source <(haproxy-connect completion bash)
_haproxy_connect() {
	local cur=${COMP_WORDS[COMP_CWORD]}
	COMPREPLY=()
	case ${COMP_WORDS[COMP_CWORD-1]} in
{{range .Flags}}{{if .Choices}}	-{{.Name}}) mapfile -t COMPREPLY < <(compgen -W "{{range .Choices}}{{.}} {{end}}" -- "$cur"); return ;;
{{end}}{{end}}	esac
	if [[ $cur == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "{{range .Flags}}-{{.Name}} {{end}}" -- "$cur")
	elif [[ $COMP_CWORD == 1 ]]; then
		mapfile -t COMPREPLY < <(compgen -W "{{range .Commands}}{{.}} {{end}}" -- "$cur")
	fi
}
complete -o default -F _haproxy_connect haproxy-connect
`,
	"zsh": `#compdef haproxy-connect
_arguments '1::command:({{range .Commands}}{{.}} {{end}})'{{range .Flags}} \
	'-{{.Name}}[{{.Help}}]{{if .Choices}}:value:({{range .Choices}}{{.}} {{end}}){{else if not .Bool}}:value:_files{{end}}'{{end}}
`,
	"fish": `{{range .Commands}}complete -c haproxy-connect -n __fish_use_subcommand -f -a {{.}}
{{end}}{{range .Flags}}complete -c haproxy-connect -o {{.Name}}{{if .Choices}} -x -a '{{range .Choices}}{{.}} {{end}}'{{else if not .Bool}} -r{{end}} -d '{{.Help}}'
{{end}}`,
}

type completionFlag struct {
	Name, Help string
	Bool       bool
	Choices    []string
}

// choices are the values of a flag whose help lists them.
var choices = regexp.MustCompile("`([a-z0-9]+(?:\\|[a-z0-9]+)+)`")

// flagsOf returns the flags of a command: run with -h, a command returns them in a helpError.
func flagsOf(name string) *flag.FlagSet {
	var asked helpError
	if err := commands[name](context.Background(), []string{"-h"}, io.Discard, io.Discard); errors.As(err, &asked) {
		return asked.fs
	}
	return flag.NewFlagSet(name, flag.ContinueOnError)
}

func cmdCompletion(_ context.Context, args []string, out, _ io.Writer) error {
	if len(args) == 1 && (args[0] == "-h" || args[0] == "-help" || args[0] == "--help") {
		return helpError{flag.NewFlagSet("completion", flag.ContinueOnError)}
	}
	if len(args) != 1 || completions[args[0]] == "" {
		return usagef("completion: want bash, zsh or fish")
	}
	var data struct {
		Commands []string
		Flags    []completionFlag
	}
	for name := range commands {
		data.Commands = append(data.Commands, name)
	}
	slices.Sort(data.Commands)
	// A description loses the characters that would end a word in one of the shells.
	help := strings.NewReplacer("'", "", "`", "", "[", "(", "]", ")", "://", "", ":", " ", `\`, "", "$", "")
	seen := map[string]bool{}
	for _, name := range data.Commands {
		flagsOf(name).VisitAll(func(f *flag.Flag) {
			if aliases[f.Name] != "" || obsolete[f.Name] != "" || seen[f.Name] {
				return
			}
			seen[f.Name] = true
			one := completionFlag{Name: f.Name, Help: help.Replace(f.Usage)}
			b, _ := f.Value.(interface{ IsBoolFlag() bool })
			one.Bool = b != nil && b.IsBoolFlag()
			if m := choices.FindStringSubmatch(f.Usage); m != nil {
				one.Choices = strings.Split(m[1], "|")
			}
			data.Flags = append(data.Flags, one)
		})
	}
	slices.SortFunc(data.Flags, func(a, b completionFlag) int { return strings.Compare(a.Name, b.Name) })
	t, err := template.New("").Parse(completions[args[0]])
	if err != nil {
		return fmt.Errorf("completion: %w", err)
	}
	return t.Execute(out, data)
}
