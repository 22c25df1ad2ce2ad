package runtimeapi

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

// Process is one worker that a master knows.
type Process struct {
	PID int
	Old bool // it was replaced, and finishes its sessions
}

// ParseProcesses reads the workers of `show proc`, which only a master answers
// (HAProxy's management guide, section 9.4.1).
func ParseProcesses(text string) (out []Process) {
	old, workers := false, false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") {
			old = strings.HasPrefix(line, "# old workers")
			workers = old || strings.HasPrefix(line, "# workers")
			continue
		}
		f := strings.Fields(line)
		if !workers || len(f) < 2 || f[1] != "worker" {
			continue
		}
		if pid, err := strconv.Atoi(f[0]); err == nil && pid > 1 {
			out = append(out, Process{PID: pid, Old: old})
		}
	}
	return out
}

// Session is one stream of a worker.
type Session struct {
	ID                string         // a hexadecimal number, fit for a command
	Frontend, Backend string         // Backend "<NONE>": the stream has not been let in yet
	From              netip.AddrPort // of the client; the zero value for one on a unix socket
}

// ParseSessions reads `show sess`. A line is (HAProxy's management guide):
//
//	0x55f3c8: proto=tcpv4 src=10.0.0.1:51234 fe=public be=local_app srv=app ...
func ParseSessions(text string) (out []Session) {
	for line := range strings.Lines(text) {
		if s, ok := parseSession(line); ok {
			out = append(out, s)
		}
	}
	return out
}

func parseSession(line string) (s Session, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 4 {
		return s, false
	}
	id, is := strings.CutSuffix(fields[0], ":")
	// The ID becomes part of a command: nothing but a number may.
	if digits, hex := strings.CutPrefix(id, "0x"); !is || !hex || digits == "" || strings.Trim(digits, "0123456789abcdef") != "" {
		return s, false
	}
	s.ID = id
	for _, f := range fields[1:] {
		name, value, _ := strings.Cut(f, "=")
		switch {
		case name == "fe" && s.Frontend == "":
			s.Frontend = value
		case name == "be" && s.Backend == "":
			s.Backend = value
		case name == "src" && !s.From.IsValid():
			s.From = address(value)
		}
	}
	return s, s.Frontend != ""
}

// address reads "10.0.0.1:80", "::1:80" or "[::1]:80"; the zero value is anything else.
func address(s string) netip.AddrPort {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return netip.AddrPort{}
	}
	host, err := netip.ParseAddr(strings.Trim(s[:i], "[]"))
	port, perr := strconv.ParseUint(s[i+1:], 10, 16)
	if err != nil || perr != nil || host.Zone() != "" {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(host.Unmap(), uint16(port))
}

// Detail is what `show sess <id>` tells of one stream. The zero value: there is none.
type Detail struct {
	From   netip.AddrPort
	Status int // of its HTTP answer; 0 while it has none
}

// ParseDetail reads `show sess <id>`. Its first line has source=10.0.0.1:51234, and the
// line of an HTTP stream that begins with txn= has status=-1 or 200.
func ParseDetail(text string) (d Detail) {
	for f := range strings.FieldsSeq(text) {
		if v, is := strings.CutPrefix(f, "source="); is && !d.From.IsValid() {
			d.From = address(v)
		}
		if v, is := strings.CutPrefix(f, "status="); is {
			n, _ := strconv.Atoi(v) // -1 before there is an answer
			d.Status = max(n, 0)
			break
		}
	}
	return d
}

// ParseStats reads `show stat`. The first line names the columns; each other line becomes a map
// from these names to its values.
func ParseStats(text string) ([]map[string]string, error) {
	lines := csv.NewReader(strings.NewReader(strings.TrimSpace(strings.TrimPrefix(text, "# "))))
	lines.FieldsPerRecord = -1
	head, err := lines.Read()
	if err != nil {
		return nil, fmt.Errorf("show stat: %w", err)
	}
	var rows []map[string]string
	for {
		line, err := lines.Read()
		if errors.Is(err, io.EOF) {
			return rows, nil
		}
		if err != nil {
			return nil, fmt.Errorf("show stat: %w", err)
		}
		row := make(map[string]string, len(head))
		for i, name := range head {
			if i < len(line) {
				row[name] = line[i]
			}
		}
		rows = append(rows, row)
	}
}

// ParseServers reads the names, as backend/server, of `show servers state` (HAProxy's
// management guide): the columns 2 and 4 of each line.
func ParseServers(text string) map[string]bool {
	have := map[string]bool{}
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) >= 8 && f[0] != "#" {
			have[f[1]+"/"+f[3]] = true
		}
	}
	return have
}

// ParseCertificate reads the serial number of `show ssl cert FILE`; "" is an answer without
// one.
func ParseCertificate(text string) string {
	for line := range strings.Lines(text) {
		if serial, ok := strings.CutPrefix(strings.TrimSpace(line), "Serial: "); ok {
			return serial
		}
	}
	return ""
}

// ParseMap reads `show map FILE`: each line has an address, a key, and as its rest the value.
func ParseMap(text string) map[string]string {
	entries := map[string]string{}
	for line := range strings.Lines(text) {
		_, entry, ok := strings.Cut(strings.TrimSpace(line), " ")
		if key, value, both := strings.Cut(entry, " "); ok && both {
			entries[key] = value
		}
	}
	return entries
}

// ParsePID reads the process of `show info`; 0 is an answer without one.
func ParsePID(text string) int {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "Pid: "); ok {
			pid, _ := strconv.Atoi(strings.TrimSpace(rest))
			return max(pid, 0)
		}
	}
	return 0
}
