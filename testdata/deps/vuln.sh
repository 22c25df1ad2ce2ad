#!/usr/bin/env bash
# Known vulnerabilities of what the program calls, by Go's own database, which is a Go
# module: its address in the net is not needed. VULNDB=latest asks for the newest; without
# it the version is fixed, so that a commit that passed does not fail by itself.
set -euo pipefail
version=${VULNDB:-v0.0.0-20261105234957-e22db6528018}
cache=${HAPROXY_CONNECT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/haproxy-connect}
json=$(cd /tmp && GOFLAGS=-mod=mod go mod download -json "golang.org/x/vulndb@$version")
value() { sed -n "s/^\t\"$1\": \"\(.*\)\",*$/\1/p" <<<"$json"; }
db=$cache/vulndb/$(value Version)
if [ ! -d "$db/index" ]; then
	mkdir -p "$cache/vulndb"
	rm -rf "$db.new"
	go run "golang.org/x/vulndb/cmd/indexdb@$(value Version)" -vulns "$(value Dir)/data/osv" -out "$db.new" 2>/dev/null
	mv "$db.new" "$db"
fi
# Only what we call counts; its own text says what to do about it.
go run golang.org/x/vuln/cmd/govulncheck@v1.9.0 -db "file://$db" -show version ./cmd/haproxy-connect
