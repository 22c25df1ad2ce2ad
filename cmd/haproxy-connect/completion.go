package main

import (
	"context"
	"flag"
	"fmt"
	"io"
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
	'-{{.Name}}[{{.Help}}]{{if not .Bool}}:value:_files{{end}}'{{end}}
`,
	"fish": `{{range .Commands}}complete -c haproxy-connect -n __fish_use_subcommand -f -a {{.}}
{{end}}{{range .Flags}}complete -c haproxy-connect -o {{.Name}}{{if not .Bool}} -r{{end}} -d '{{.Help}}'
{{end}}`,
}

type completionFlag struct {
	Name, Help string
	Bool       bool
}

func cmdCompletion(_ context.Context, args []string, out, errw io.Writer) error {
	if len(args) != 1 || completions[args[0]] == "" {
		return usagef("completion: want bash, zsh or fish")
	}
	var c config
	fs := newFlags("completion", &c, errw)
	var data struct {
		Commands []string
		Flags    []completionFlag
	}
	for name := range commands {
		data.Commands = append(data.Commands, name)
	}
	slices.Sort(data.Commands)
	// What ends a word in one of the shells is nobody's loss in a description.
	help := strings.NewReplacer("'", "", "`", "", "[", "(", "]", ")", ":", ",", `\`, "", "$", "")
	fs.VisitAll(func(f *flag.Flag) {
		if aliases[f.Name] != "" || obsolete[f.Name] != "" {
			return
		}
		b, _ := f.Value.(interface{ IsBoolFlag() bool })
		data.Flags = append(data.Flags, completionFlag{f.Name, help.Replace(f.Usage), b != nil && b.IsBoolFlag()})
	})
	t, err := template.New("").Parse(completions[args[0]])
	if err != nil {
		return fmt.Errorf("completion: %w", err)
	}
	return t.Execute(out, data)
}
