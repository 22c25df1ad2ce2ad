#!/usr/bin/env bash
# Walks the story of the compose mesh and checks every step. The mesh is brought up if it
# is not there, and left as it was found. Needs docker compose and curl.
set -euo pipefail
cd "$(dirname "$0")"
began=$SECONDS
scratch=$(mktemp -d)
export COMPOSE_ANSI=never
dc() { docker compose "$@" </dev/null; }
inside() { dc exec -T "$@"; } # SERVICE COMMAND...
consul() { inside consul consul "$@"; }
page() { curl -sS -m 10 "$@"; }
www=http://127.0.0.1:8080

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() {
	printf 'tour: %s\n' "$*" >&2
	dc logs --tail 25 >&2 || true
	exit 1
}
# until_ SECONDS WHAT COMMAND...: waits on a condition, never on a time.
until_() {
	local limit=$((SECONDS + $1)) what=$2
	shift 2
	until "$@" >"$scratch/last" 2>&1; do
		[ $SECONDS -lt $limit ] || { cat "$scratch/last" >&2; fail "$what: not within the time ($*)"; }
		sleep 0.05
	done
}
finish() {
	load_stop >/dev/null 2>&1 || true
	if [ -n "${mine:-}" ]; then dc down -v --remove-orphans >/dev/null 2>&1 || true; fi
	rm -rf "$scratch"
}

# Load beside www, through its sidecar, until load_end, which shows that nothing failed.
load_pid=
load_begin() {
	mkfifo "$scratch/load.in"
	docker compose exec -T www node /app/load.js <"$scratch/load.in" >"$scratch/load.out" 2>&1 &
	load_pid=$!
	exec 7>"$scratch/load.in"
	until_ 10 "the load begins" grep -q begun "$scratch/load.out"
}
load_stop() {
	[ -n "$load_pid" ] || return 0
	exec 7>&-
	wait "$load_pid" || true
	load_pid=
	rm -f "$scratch/load.in"
}
load_end() {
	load_stop
	tail -n 1 "$scratch/load.out"
	grep -q '"failed":0' "$scratch/load.out" || fail "requests failed while $1"
	grep -q '"api":[1-9][0-9]*,"redis":[1-9]' "$scratch/load.out" || fail "there was no load while $1"
}

metric() { # SERVICE NAME: the sum of it
	inside "$1" bash -c 'exec 3<>/dev/tcp/127.0.0.1/1936; printf "GET /metrics HTTP/1.0\r\n\r\n" >&3; cat <&3' | awk -v n="$2" 'index($1, n) == 1 { s += $2 } END { print s + 0 }'
}
endpoints() { [ "$(metric www "haproxy_connect_upstream_endpoints{upstream=\"api\"}")" = "$1" ]; }
visitor() { page $www/ | grep -q 'You are visitor'; }
no_redis() { page $www/ | grep -q 'No Redis'; }
answers() { [ "$(page -o /dev/null -w '%{http_code}' -X "$1" "$www/api/things/1")" = "$2" ]; }
operate() { page -f -X "$1" -H "X-Consul-Token: $token" --data-binary @- "http://127.0.0.1:8500/v1/$2"; } # METHOD PATH, the body on standard input
root() { operate GET connect/ca/roots </dev/null | sed -n 's/.*"ActiveRootID": *"\([^"]*\)".*/\1/p'; }
leaves() { dc logs --no-log-prefix "$1" | grep -c 'msg="leaf certificate"'; }
replaced() { [ "$(leaves "$1")" -gt "$2" ]; }

if [ -z "$(dc ps -q www 2>/dev/null)" ]; then
	mine=yes
fi
trap finish EXIT
say "the mesh: docker compose -f docker/compose.yaml up --wait"
dc up -d --wait --wait-timeout 180 >"$scratch/up" 2>&1 || { cat "$scratch/up" >&2; fail "the mesh does not come up"; }
token=$(inside consul cat /consul/operator/token)
for pair in "www redis" "www api"; do consul intention delete ${pair} >/dev/null 2>&1 || true; done
consul config delete -kind service-intentions -name api >/dev/null 2>&1 || true
until_ 20 "www's sidecar finds api" endpoints 1
inside www haproxy-connect status

inside www bash -c '[ "$(id -u)" = 10001 ] && ! touch /x 2>/dev/null && grep -q "^CapEff:.0*$" /proc/self/status && grep -q "^NoNewPrivs:.1$" /proc/self/status' ||
	fail "www's container is not as hardened as compose.yaml says"

say "1. nothing is allowed: www may not call redis, and the log says why"
until_ 15 "denied" no_redis
page $www/
until_ 5 "the reason" sh -c "docker compose logs --no-log-prefix redis | grep 'caller denied' | tail -n 1 | grep default"
sed 's/^\x1b\[2K//' "$scratch/last"
inside redis haproxy-connect check -service redis -source www && fail "check says allow"

say "2. the intention www => redis: allowed at once"
consul intention create -allow www redis
until_ 15 "allowed" visitor
page $www/

say "3. it is taken back: a connection that is open ends, and the next is denied"
docker compose exec -T www bash -c 'exec 3<>/dev/tcp/127.0.0.1/6379; printf "SUBSCRIBE news\r\n" >&3; cat <&3; echo cut' </dev/null >"$scratch/open" 2>&1 &
until_ 10 "a subscription is open" grep -q subscribe "$scratch/open"
consul intention delete www redis
until_ 10 "the subscription is cut" grep -q '^cut' "$scratch/open"
until_ 10 "denied again" no_redis
page $www/
consul intention create -allow www redis

say "4. api by method: GET is allowed, DELETE is not"
inside consul bash -c 'consul config write - <<-HCL
	Kind = "service-intentions"
	Name = "api"
	Sources = [{ Name = "www", Permissions = [{ Action = "allow", HTTP = { PathPrefix = "/things", Methods = ["GET"] } }] }]
	HCL'
until_ 15 "GET is allowed" answers GET 200
until_ 5 "DELETE is denied" answers DELETE 403
page $www/api/things
page -X DELETE $www/api/things/1
echo
inside api haproxy-connect check -service api -register-id hostname -source www -method DELETE -path /things/1 && fail "check says allow"
until_ 10 "redis too" visitor

if [ -n "${SCREENSHOTS:-}" ]; then # a directory, for pictures of www's page and of redis's
	for one in light:1:1936 dark:0:1937; do
		IFS=: read -r theme scheme port <<<"$one"
		chromium-headless-shell --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,1250 --virtual-time-budget=3000 \
			--blink-settings=preferredColorScheme=$scheme --screenshot="$SCREENSHOTS/page-$theme.png" http://127.0.0.1:$port/ 2>/dev/null
	done
fi

say "5. new leaves and a new root, under load"
load_begin
declare -A had
for s in redis api www; do had[$s]=$(leaves $s); done
old=$(root)
bits=$(operate GET connect/ca/configuration </dev/null | grep -q '"PrivateKeyBits": *384' && echo 256 || echo 384)
printf '{"Provider": "consul", "Config": {"PrivateKeyType": "ec", "PrivateKeyBits": %d, "CSRMaxPerSecond": 1000}}' "$bits" | operate PUT connect/ca/configuration
[ "$(root)" != "$old" ] || fail "the root is still $old"
for s in redis api www; do until_ 60 "$s has a leaf of the new root" replaced $s "${had[$s]}"; done
load_end "certificates changed"

say "6. api from 1 to 20 and back to 1, under load"
load_begin
dc up -d --no-recreate --scale api=20 --wait --wait-timeout 180 api >"$scratch/up" 2>&1 || { cat "$scratch/up" >&2; fail "20 replicas do not come up"; }
until_ 30 "20 endpoints" endpoints 20
for _ in $(seq 60); do page $www/api/things; done | sort | uniq -c | sort -rn | sed -n '1,3p;$p'
dc up -d --no-recreate --scale api=1 api >"$scratch/up" 2>&1 || { cat "$scratch/up" >&2; fail "19 replicas do not end"; }
until_ 60 "1 endpoint" endpoints 1
load_end "api was scaled"

say "7. www's agent is killed: what runs goes on; it comes back: what changed arrives"
load_begin
before=$(metric www haproxy_connect_watch_errors_total)
misses_it() { [ "$(metric www haproxy_connect_watch_errors_total)" -gt "$before" ]; }
dc kill www-agent >/dev/null 2>&1
until_ 30 "www notices that its agent is away" misses_it
visitor || fail "www does not work without its agent"
consul intention delete www redis
until_ 15 "redis's own sidecar denies at once" no_redis
consul intention create -allow www redis
until_ 15 "and allows" visitor
load_stop # some were denied, as they should
load_begin
dc up -d --no-recreate www-agent >/dev/null 2>&1
dc up -d --no-recreate --scale api=2 --wait api >/dev/null 2>&1
until_ 60 "www hears of a second api" endpoints 2
load_end "the agent came back"
dc up -d --no-recreate --scale api=1 api >/dev/null 2>&1
until_ 60 "1 endpoint" endpoints 1

say "8. an impostor: the catalog says that api is also where redis is"
address=$(dc exec -T redis hostname -i | tr -d '[:space:]')
refused=$(metric www haproxy_connect_identity_refusals_total)
load_begin
printf '{"Node": "ghost", "Address": "%s", "Service": {"Kind": "connect-proxy", "ID": "ghost", "Service": "api-sidecar-proxy", "Address": "%s", "Port": 21000, "Proxy": {"DestinationServiceName": "api"}}}' "$address" "$address" | operate PUT catalog/register >/dev/null
until_ 15 "www hears of it" endpoints 2
more_refused() { page $www/api/things >/dev/null; [ "$(metric www haproxy_connect_identity_refusals_total)" -gt "$refused" ]; }
until_ 15 "www refuses it" more_refused
echo "refused $(metric www haproxy_connect_identity_refusals_total) times: a valid certificate, of another service"
printf '{"Node": "ghost"}' | operate PUT catalog/deregister >/dev/null
until_ 15 "it is gone" endpoints 1
load_end "an impostor was there"
inside redis redis-cli info errorstats | grep -i 'unknown\|attack' && fail "redis got what was meant for api"

say "reloads, with their reasons"
for s in redis api www; do
	printf '%s: ' $s
	inside $s bash -c 'exec 3<>/dev/tcp/127.0.0.1/1936; printf "GET /metrics HTTP/1.0\r\n\r\n" >&3; grep "^haproxy_connect_reloads_total.* [1-9]" <&3' | sed 's/.*reason="\(.*\)"} /\1 /' | paste -sd, -
done
consul intention delete www redis >/dev/null
consul config delete -kind service-intentions -name api >/dev/null
say "every step is as it should be, after $((SECONDS - began)) s"
