#!/usr/bin/env bash
# Everything the tests and the demo need that is not Go: Debian's HAProxy, Redis,
# Node.js and a browser by apt, HAProxy 3.0, 3.2 and 3.4 unpacked beside it, and a Consul built
# once from the module in testdata/consul. What is there already is left alone. With the
# argument bench also what the benchmarks compare with.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${HAPROXY_CONNECT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/haproxy-connect}
mkdir -p "$cache/bin"
say() { printf 'deps: %s\n' "$*"; }

missing=()
want() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing+=("$2"); }
want haproxy haproxy
want redis-server redis-server
want redis-cli redis-tools
want node nodejs
want patchelf patchelf
want curl curl
want pgrep procps
want systemd-analyze systemd
want chromium-headless-shell chromium-headless-shell
if [ "${1:-}" = bench ]; then
	want stunnel4 stunnel4
	want gcc "gcc libc6-dev"
	[ -e /usr/include/ltdl.h ] || missing+=(libltdl-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
	say "installing ${missing[*]}"
	sudo=
	[ "$(id -u)" = 0 ] || sudo=sudo
	export DEBIAN_FRONTEND=noninteractive
	$sudo apt-get update -qq
	# Services of these packages must not start: the demo runs its own. policy-rc.d is
	# Debian's way to say so; one that is there already is left alone.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$policy" ]; then
		printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
		$sudo chmod +x "$policy"
		trap '$sudo rm -f "$policy"' EXIT
	fi
	$sudo apt-get install -y -qq --no-install-recommends ${missing[*]} >/dev/null
fi

"$here/haproxy.sh" trixie 3.0 "$cache"
"$here/haproxy.sh" sid 3.2 "$cache"
"$here/haproxy.sh" experimental 3.4 "$cache"

consul=$cache/bin/consul-1.21.0
if ! command -v consul >/dev/null 2>&1 && ! "$consul" version >/dev/null 2>&1; then
	say "building Consul 1.21.0, once; this takes some minutes"
	(cd "$here/../consul" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$consul.$$" github.com/hashicorp/consul)
	mv "$consul.$$" "$consul"
fi
if [ "${1:-}" = bench ] && ! [ -x "$cache/bin/ghostunnel" ]; then
	say "building ghostunnel, once"
	(cd "$here/../ghostunnel" && CGO_ENABLED=1 go build -trimpath -ldflags "-s -w" -o "$cache/bin/ghostunnel" github.com/ghostunnel/ghostunnel)
fi
say "ready: $(PATH=$PATH:/usr/sbin haproxy -v | head -1)"
