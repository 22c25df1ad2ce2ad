// Package process finds the HAProxy binary, knows what its version can do, and
// runs it: start, check, reload, drain, restart after a crash, and the end of an
// orphan that a killed predecessor left.
//
// Invariants: exactly one master per run directory; a configuration is checked by HAProxy
// before it replaces one that works; a child never outlives Run unless we are killed, and then
// the next Run takes it over or ends it. It may import haproxy/runtimeapi; haproxy uses it
// through small interfaces of its own.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Version of HAProxy.
type Version struct{ Major, Minor, Patch int }

// Less orders versions.
func (v Version) Less(major, minor, patch int) bool {
	if v.Major != major {
		return v.Major < major
	}
	if v.Minor != minor {
		return v.Minor < minor
	}
	return v.Patch < patch
}

// String is "3.2.26".
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// LogValue makes a JSON log show the version as text.
func (v Version) LogValue() slog.Value { return slog.StringValue(v.String()) }

// Features are the choices that depend on the version, decided once.
type Features struct {
	SyncReload    bool // 3.0: `reload` on the master socket answers when it is done
	WaitRemovable bool // 3.0: `wait ... srv-removable`
	HelloTimeout  bool // 3.0: timeout client-hs bounds the handshake of a caller
	LosesAnswers  bool // before 3.0: an answer is lost to a caller that still sends
	TimesUploads  bool // before 3.0: a pause of an upload counts as silence of the server
	BufferCache   bool // 3.0: tune.memory.hot-size
	HoldsFirst    bool // 3.2: data and end of a client that come before the TLS handshake is over are kept
	DropTrailers  bool // 3.2: option http-drop-request-trailers
	LuaBool       bool // 3.1: wants tune.lua.bool-sample-conversion
	SPOP          bool // 3.1: mode spop
	ServerCookies bool // 3.0: servers with a cookie can be added while it runs
	CACommit      bool // 3.2.8: `commit ssl ca-file` works (haproxy/haproxy#3165)
}

// Features of a version.
func (v Version) Features() Features {
	return Features{
		SyncReload:    !v.Less(3, 0, 0),
		WaitRemovable: !v.Less(3, 0, 0),
		HelloTimeout:  !v.Less(3, 0, 0),
		LosesAnswers:  v.Less(3, 0, 0),
		TimesUploads:  v.Less(3, 0, 0),
		BufferCache:   !v.Less(3, 0, 0),
		HoldsFirst:    !v.Less(3, 2, 0),
		DropTrailers:  !v.Less(3, 2, 0),
		LuaBool:       !v.Less(3, 1, 0),
		SPOP:          !v.Less(3, 1, 0),
		ServerCookies: !v.Less(3, 0, 0),
		CACommit:      !v.Less(3, 2, 8),
	}
}

// Names lists the features that are on, for `version`.
func (f Features) Names() []string {
	var out []string
	for _, x := range []struct {
		on   bool
		name string
	}{{f.SyncReload, "sync-reload"}, {f.WaitRemovable, "wait-removable"}, {f.HelloTimeout, "hello-timeout"}, {f.DropTrailers, "drop-trailers"}, {f.LuaBool, "lua-bool"}, {f.SPOP, "spop"}, {f.ServerCookies, "server-cookies"}, {f.CACommit, "ca-commit"}} {
		if x.on {
			out = append(out, x.name)
		}
	}
	return out
}

// Bugs lists the faults of a version that matter here, in words for an operator.
func (v Version) Bugs() (out []string) {
	f := v.Features()
	if !f.CACommit {
		out = append(out, "this version cannot change roots while it runs: each rotation of the CA is a reload (haproxy/haproxy#3165)")
	}
	if !f.DropTrailers {
		out = append(out, "this version passes the trailers of chunked requests on: an application that reads them as headers may take them for ours (X-Forwarded-Client-Cert)")
	}
	if !f.HoldsFirst {
		out = append(out, "this version drops what a client of a tcp upstream says if it ends its side within the first milliseconds (echo | nc -N): -originator go does not")
	}
	if f.TimesUploads {
		out = append(out, "2.6 cannot begin the 15 seconds of an answer when an upload is complete: an answer to a chunked upload has 5 minutes")
	}
	if f.LosesAnswers {
		out = append(out, "2.6 loses an application's answer to a caller that still sends, if the application closes at once without reading on")
	}
	if v.Less(3, 0, 0) {
		out = append(out, "2.6 gives a caller that sends nothing 5 minutes (tcp: an hour) for its handshake: as many of them as half of -max-conn keep others out")
		out = append(out, "2.6 crashed in our tests after hundreds of changes of the leaf under load; it is started again within half a second")
	}
	return out
}

// Binary is an HAProxy that can be run.
type Binary struct {
	Path    string
	Version Version
	Raw     string // first line of -v
}

var versionLine = regexp.MustCompile(`version (\d+)\.(\d+)(?:\.(\d+)|-dev\d+)?`)

// Find looks a binary up, on PATH when path has no slash, and reads its version.
func Find(ctx context.Context, path string) (*Binary, error) {
	if path == "" {
		path = "haproxy"
	}
	full, err := lookPath(path)
	if err != nil {
		return nil, fmt.Errorf("-haproxy %q: not found or not executable; install HAProxy 2.6 or later, or give its path", path)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, full, "-vv")
	cmd.Env = environment()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("-haproxy %q: -vv fails: %w", full, err)
	}
	first, _, _ := bytes.Cut(out, []byte("\n"))
	m := versionLine.FindSubmatch(first)
	if m == nil {
		return nil, fmt.Errorf("-haproxy %q: this is not HAProxy, it says %.80q", full, first)
	}
	b := &Binary{Path: full, Raw: string(first)}
	b.Version.Major, _ = strconv.Atoi(string(m[1]))
	b.Version.Minor, _ = strconv.Atoi(string(m[2]))
	b.Version.Patch, _ = strconv.Atoi(string(m[3]))
	if b.Version.Less(2, 6, 0) {
		return nil, fmt.Errorf("-haproxy %q: version %s, want 2.6 or later", full, b.Version)
	}
	for _, need := range []struct{ token, what string }{{"+LUA", "Lua"}, {"+OPENSSL", "OpenSSL"}, {"+PROMEX", "the Prometheus exporter"}} {
		if !bytes.Contains(out, []byte(need.token)) {
			return nil, fmt.Errorf("-haproxy %q: built without %s (%s)", full, need.what, need.token)
		}
	}
	return b, nil
}

// lookPath also looks where Debian puts HAProxy, which is not on the PATH of an ordinary
// user.
func lookPath(name string) (string, error) {
	full, err := exec.LookPath(name)
	if err != nil && !strings.Contains(name, "/") {
		for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
			if full, err := exec.LookPath(dir + "/" + name); err == nil {
				return full, nil
			}
		}
	}
	return full, err
}

// environment returns the variables of ours that HAProxy gets, not all: HAProxy shows its
// environment to whoever reaches its sockets, and ours may hold the ACL token.
func environment() []string {
	var out []string
	for _, name := range []string{"PATH", "HOME", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OPENSSL_CONF", "OPENSSL_MODULES"} {
		if v, ok := os.LookupEnv(name); ok {
			out = append(out, name+"="+v)
		}
	}
	return out
}

// Check asks the binary whether it takes a configuration. The error holds the
// lines that say why not.
func (b *Binary) Check(ctx context.Context, file string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.Path, "-c", "-f", file)
	cmd.Env = environment()
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s -c did not finish: %w", b.Path, ctx.Err())
	}
	return errors.New("HAProxy refuses the configuration: " + alerts(out))
}

// alerts keeps the lines that matter of what HAProxy prints.
func alerts(out []byte) string {
	var keep []byte
	for line := range bytes.Lines(out) {
		if bytes.Contains(line, []byte("[ALERT]")) {
			keep = append(keep, bytes.TrimSpace(line)...)
			keep = append(keep, "; "...)
		}
	}
	if len(keep) == 0 {
		keep = bytes.TrimSpace(out)
	}
	const most = 2000
	if len(keep) > most {
		keep = append(keep[:most:most], "..."...)
	}
	return strconv.QuoteToASCII(string(bytes.TrimSuffix(keep, []byte("; "))))
}
