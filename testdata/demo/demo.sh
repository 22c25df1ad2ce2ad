#!/usr/bin/env bash
# A real mesh on this machine: Consul with ACLs and default deny, redis and www with
# a sidecar each, and the story of an intention. Ctrl-C ends it and cleans up.
# CHECK=1 walks the story and ends, non-zero on any miss.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)
cache=${HAPROXY_CONNECT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/haproxy-connect}
export PATH=$PATH:/usr/sbin:$top/bin
consul=$(command -v consul || echo "$cache/bin/consul-1.21.0")
connect=$top/bin/haproxy-connect
work=$(mktemp -d /tmp/hc-demo.XXXXXX)
chmod 711 "$work"
pids=()
began=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() {
	printf 'demo: %s\n' "$*" >&2
	for log in "$work"/*.log; do printf -- '--- %s\n' "$log" >&2; tail -n 25 "$log" >&2; done
	exit 1
}
cleanup() {
	trap - EXIT INT TERM
	for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
		kill "${pids[i]}" 2>/dev/null || true
		wait "${pids[i]}" 2>/dev/null || true
	done
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 0' INT TERM

# until SECONDS WHAT COMMAND...: waits on a condition, never on a time.
until_() {
	local limit=$((SECONDS + $1)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $limit ] || fail "$what: not within the time ($*)"
		sleep 0.05
	done
}
run() { # NAME COMMAND...
	local name=$1
	shift
	"$@" >"$work/$name.log" 2>&1 &
	pids+=($!)
}

for port in 8500 6379 6380 8080 21000 21001 21002 1936 1937; do
	if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
		fail "port $port is taken: end what listens on it and try again"
	fi
done

say "Consul, ACLs on, default deny"
cat >"$work/consul.hcl" <<HCL
acl {
  enabled        = true
  default_policy = "deny"
  tokens { initial_management = "mastertoken", agent = "mastertoken" }
}
performance { raft_multiplier = 1 }
HCL
run consul "$consul" agent -dev -log-level=warn -config-file="$work/consul.hcl"
export CONSUL_HTTP_TOKEN=mastertoken
until_ 30 "Consul elects a leader" "$consul" acl token read -self
until_ 30 "Consul's certificate authority" curl -fsS http://127.0.0.1:8500/v1/connect/ca/roots

say "a token for each service: it may do what its sidecar needs, and no more"
for s in redis www; do
	"$consul" acl token create -format=json -service-identity "$s" | sed -n 's/.*"SecretID": "\(.*\)".*/\1/p' >"$work/$s.token"
	[ -s "$work/$s.token" ] || fail "no token for $s"
done

cat >"$work/redis.json" <<'JSON'
{"service": {"name": "redis", "port": 6380,
  "connect": {"sidecar_service": {"port": 21001, "checks": [{"alias_service": "redis"}]}}}}
JSON
cat >"$work/www.json" <<'JSON'
{"service": {"name": "www", "port": 8080,
  "connect": {"sidecar_service": {"port": 21000, "checks": [{"alias_service": "www"}], "proxy": {
    "config": {"protocol": "http", "unsecured_bind_port": 21002},
    "upstreams": [{"destination_name": "redis", "local_bind_port": 6379}]}}}}}
JSON
for s in redis www; do CONSUL_HTTP_TOKEN=$(cat "$work/$s.token") "$consul" services register "$work/$s.json" >/dev/null; done

say "the applications, and a sidecar for each"
run redis redis-server --port 6380 --bind 127.0.0.1 --save "" --appendonly no --dir "$work"
run www node "$top/docker/mesh/www.js"
run redis-sidecar "$connect" -sidecar-for redis -token-file "$work/redis.token" -run-dir "$work/r" -admin-addr 127.0.0.1:1937
run www-sidecar "$connect" -sidecar-for www -token-file "$work/www.token" -run-dir "$work/w" -admin-addr 127.0.0.1:1936
for port in 1936 1937; do "$connect" wait -timeout 30s -admin-addr "127.0.0.1:$port" || fail "the sidecar at $port is not ready"; done
until_ 15 "redis answers" redis-cli -p 6380 ping
until_ 15 "www's sidecar knows redis's" sh -c "'$connect' status | grep -q 'redis .*127.0.0.1:21001'"
echo "ready after $((SECONDS - began)) s"

visit() { curl -sS -m 10 http://127.0.0.1:21002/; }
served() { visit | grep -q "visitor number"; }
denied() { visit | grep -q "No Redis"; }

say "1. no intention: www may not reach redis"
until_ 15 "denied by default" denied
visit
until_ 5 "the reason in the log" grep -q "caller denied.*svc/www destination=redis rule=default" "$work/redis-sidecar.log"
grep "caller denied" "$work/redis-sidecar.log" | tail -1
"$connect" check -sidecar-for redis -source www && fail "check says allow"

say "2. the intention www => redis: allowed at once"
"$consul" intention create -allow www redis
until_ 15 "allowed" served
visit
visit
"$connect" check -sidecar-for redis -source www || fail "check says deny"

say "3. the intention is deleted: denied again"
"$consul" intention delete www redis
until_ 15 "denied again" denied
visit
curl -fsS http://127.0.0.1:1937/metrics | grep 'haproxy_connect_authorizations_total{' || fail "no verdicts in the metrics"
reloads=$(curl -fsS http://127.0.0.1:1937/status.json | tr -d ' \n' | sed 's/.*"reloads":{\([^}]*\)}.*/\1/')
echo "reloads of redis's HAProxy: $reloads"
[ "$reloads" = '"start":1' ] || fail "HAProxy was reloaded: $reloads"

if [ -n "${CHECK:-}" ]; then
	say "every step is as it should be, after $((SECONDS - began)) s"
	echo "demo: 1 passed, 0 failed"
	exit 0
fi
"$consul" intention create -allow www redis >/dev/null
say "the mesh is up (www may call redis now); Ctrl-C ends it"
cat <<TXT
  Consul's UI            http://127.0.0.1:8500/ui   (token: mastertoken)
  www                    http://127.0.0.1:21002/
  www's sidecar          http://127.0.0.1:1936/   and /metrics /status.json /config /stats
  redis's sidecar        http://127.0.0.1:1937/   and /metrics /status.json /config /stats
  toggle the intention   CONSUL_HTTP_TOKEN=mastertoken $consul intention delete www redis
TXT
wait # until Ctrl-C, or until everything has ended by itself
