#!/usr/bin/env bash
# Follows the README's "Your own service in five minutes", word for word: a command that
# the README does not have is not run, and the registration is the README's own.
set -euo pipefail
fail() {
	printf 'guide: %s\n' "$*" >&2
	tail -n 20 /tmp/*.log >&2
	exit 1
}
section=$(sed -n '/^## Your own service/,/^## What is supported/p' README.md)
written() { grep -qF -- "$1" <<<"$section" || fail "the README does not say: $1"; }
step() { # COMMAND: runs it
	written "$1"
	printf '$ %s\n' "$1"
	eval "$1"
}
background() {
	written "$1"
	printf '$ %s &\n' "$1"
	case $2 in registered) set -- "$1 -admin-addr 127.0.0.1:1938" "$2" ;; esac # beside the others
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
for name in web api; do
	sed -n "/{\"service\": {\"name\": \"$name\"/,/^\$/p" <<<"$section" >"$name.json"
	[ -s "$name.json" ] || fail "the README has no registration of $name"
done
step 'consul services register web.json api.json'
background 'python3 -m http.server 9090 --bind 127.0.0.1' api
background 'bin/haproxy-connect -sidecar-for api' api-sidecar
background 'bin/haproxy-connect -sidecar-for web -admin-addr 127.0.0.1:1937' web-sidecar
until_ curl -f 127.0.0.1:1936/ready
step 'curl 127.0.0.1:1936/ready'
until_ sh -c 'bin/haproxy-connect status -admin-addr 127.0.0.1:1937 | grep -q "^api .*:21"'
step 'bin/haproxy-connect status'
until_ curl -f 127.0.0.1:9191/
step 'curl 127.0.0.1:9191/' | grep -qi '<html' || fail "api does not answer"
step 'consul intention create -deny web api'
until_ sh -c '! curl -sf 127.0.0.1:9191/'
until_ sh -c 'curl -sf http://127.0.0.1:1936/status.json | grep -q "intention web=.*api denies"'
written 'http://127.0.0.1:1936 says who was denied'
step 'bin/haproxy-connect check -sidecar-for api -source web -explain' | tee /tmp/check.log || true
grep -q '^deny' /tmp/check.log || fail "check does not say deny"
step 'bin/haproxy-connect doctor -sidecar-for api' || fail "doctor finds something wrong"
background 'bin/haproxy-connect -register -service shop -port 8081 -upstream api:9192' registered
written '-register -service shop'
echo "guide: followed"
