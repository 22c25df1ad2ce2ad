#!/usr/bin/env bash
# Follows the README's "Your own service in five minutes", word for word: a command that
# the README does not have is not run, and the registration is the README's own.
set -euo pipefail
fail() {
	printf 'guide: %s\n' "$*" >&2
	tail -n 20 /tmp/*.log >&2
	exit 1
}
section=$(sed -n '/^## Your own service/,/^## Command line/p' README.md)
written() { grep -qF -- "$1" <<<"$section" || fail "the README does not say: $1"; }
step() { # COMMAND: runs it
	written "$1"
	printf '$ %s\n' "$1"
	eval "$1"
}
background() {
	written "$1"
	printf '$ %s &\n' "$1"
	eval "exec $1" >"/tmp/$2.log" 2>&1 &
}
until_() {
	local limit=$((SECONDS + 30))
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $limit ] || fail "not within 30 s: $*"
		sleep 0.05
	done
}
background 'consul agent -dev' consul
until_ consul catalog services
step 'make build'
sed -n '/{"service": {"name": "web"/,/^$/p' <<<"$section" >web.json
[ -s web.json ] || fail "the README has no registration"
step 'consul services register web.json'
background 'bin/haproxy-connect -sidecar-for web' sidecar
until_ curl -f 127.0.0.1:1936/ready
step 'curl 127.0.0.1:1936/ready'
step 'bin/haproxy-connect status' | tee /tmp/status.log
grep -q '^db ' /tmp/status.log || fail "status does not list db"
step 'bin/haproxy-connect doctor -sidecar-for web'
step 'bin/haproxy-connect check -sidecar-for web -source shop -explain'
kill %2
wait %2 || fail "the sidecar does not stop cleanly: $?"
consul services deregister -id web
background 'bin/haproxy-connect -register -service web -port 8080 -upstream db:5432' registered
until_ curl -f 127.0.0.1:1936/ready
echo "guide: followed"
