#!/usr/bin/env bash
# docker.sh COMMAND...: runs a command with a Docker engine that has compose and the base
# images of docker/Dockerfile. An engine that answers is used as it is. Otherwise one is
# started for the command and ended with it, which touches neither firewall nor routes;
# what its containers see is this machine only. A base image that cannot be pulled is made
# of Debian's packages, under the same name.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${HAPROXY_CONNECT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/haproxy-connect}
work=$cache/docker
export PATH=$PATH:/usr/sbin:/usr/local/go/bin
say() { printf 'docker: %s\n' "$*"; }
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo

# Debian 12 has neither compose v2 nor a client for BuildKit; Debian 13's run on it. A
# private list and pin leave /etc/apt as it is.
packages() {
	local apt=$work/apt suite=trixie
	mkdir -p "$apt/parts" "$apt/prefs" "$apt/lists/partial"
	cp /etc/apt/sources.list.d/debian.sources "$apt/parts/"
	sed "s/bookworm/$suite/g" /etc/apt/sources.list.d/debian.sources >"$apt/parts/$suite.sources"
	printf 'Package: *\nPin: release n=%s*\nPin-Priority: 100\n\nPackage: docker.io docker-cli docker-compose docker-buildx\nPin: release n=%s*\nPin-Priority: 990\n' \
		$suite $suite >"$apt/prefs/$suite"
	printf 'Dir::Etc::SourceParts "%s";\nDir::Etc::PreferencesParts "%s";\nDir::State::Lists "%s";\nAPT::Sandbox::User "root";\n' \
		"$apt/parts/" "$apt/prefs/" "$apt/lists/" >"$apt/apt.conf"
	say "installing $*"
	local policy=/usr/sbin/policy-rc.d made=
	if [ ! -e $policy ]; then
		printf '#!/bin/sh\nexit 101\n' | $sudo tee $policy >/dev/null
		$sudo chmod +x $policy
		made=yes
	fi
	$sudo env APT_CONFIG="$apt/apt.conf" apt-get update -qq
	$sudo env APT_CONFIG="$apt/apt.conf" DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
	[ -z "$made" ] || $sudo rm -f $policy
}

stop() {
	local pid
	docker ps -aq | xargs -r docker rm -f >/dev/null 2>&1 || true
	docker image prune -f >/dev/null 2>&1 || true
	docker builder prune -f --keep-storage 4GB >/dev/null 2>&1 || true
	pid=$(cat "$work/engine.pid" 2>/dev/null) || return 0
	$sudo kill "$pid" 2>/dev/null || return 0
	for _ in $(seq 300); do
		$sudo kill -0 "$pid" 2>/dev/null || return 0
		sleep 0.1
	done
}

need=()
docker buildx version >/dev/null 2>&1 || need+=(docker-buildx)
docker compose version >/dev/null 2>&1 || need+=(docker-compose)
command -v curl >/dev/null || need+=(curl)
mkdir -p "$work"
if ! docker info >/dev/null 2>&1; then
	command -v dockerd >/dev/null || need+=(docker.io docker-cli containerd runc tini iptables)
	[ ${#need[@]} = 0 ] || packages "${need[@]}"
	say "starting an engine"
	export DOCKER_HOST=unix://$work/engine.sock
	$sudo setsid dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/engine.pid" -H "$DOCKER_HOST" \
		--iptables=false --ip6tables=false --ip-forward=false --bridge=none >"$work/engine.log" 2>&1 </dev/null &
	trap stop EXIT
	limit=$((SECONDS + 60))
	until docker info >/dev/null 2>&1; do
		[ $SECONDS -lt $limit ] || { tail -n 20 "$work/engine.log" >&2; say "no engine after 60 s, see above" >&2; exit 1; }
		sleep 0.1
	done
	# Its containers have no network of their own while they are built.
	export DOCKER_BUILD_NETWORK=host
elif [ ${#need[@]} -gt 0 ]; then
	packages "${need[@]}"
fi

has() { docker image inspect "$1" >/dev/null 2>&1 || timeout 300 docker pull -q "$1" >/dev/null 2>&1; }
base() { # NAME [TAR ARGUMENTS...], a Dockerfile on standard input
	local name=$1 dir
	shift
	say "making $name"
	dir=$(mktemp -d)
	cat >"$dir/Dockerfile"
	tar -c -C "$dir" Dockerfile "$@" | docker build -q --network=host -t "$name" - >/dev/null
	rm -r "$dir"
}

if ! has debian:trixie-slim; then
	command -v mmdebstrap >/dev/null || packages mmdebstrap
	say "making debian:trixie-slim"
	certs=/usr/local/share/ca-certificates
	$sudo env TMPDIR=/dev/shm mmdebstrap --quiet --variant=minbase --components=main \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
		--customize-hook="mkdir -p \"\$1$certs\"; cp $certs/*.crt \"\$1$certs/\" 2>/dev/null || true" \
		--customize-hook='printf "%s\n" "Dir::Cache::pkgcache \"\";" "Dir::Cache::srcpkgcache \"\";" "Acquire::Languages \"none\";" >"$1/etc/apt/apt.conf.d/docker-clean"; rm -f "$1"/var/cache/apt/*.bin' \
		trixie "$work/base.tar" >/dev/null
	docker import --change 'CMD ["bash"]' "$work/base.tar" debian:trixie-slim >/dev/null
	$sudo rm -f "$work/base.tar"
fi
if ! has golang:1.26-trixie; then
	base golang:1.26-trixie --transform 's,^\./,go/,S' -C "$(go env GOROOT)" --exclude=./test --exclude=./api --exclude=./doc . <<-'EOF'
		FROM debian:trixie-slim
		RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates git make && rm -rf /var/lib/apt/lists/*
		COPY go /usr/local/go
		ENV GOPATH=/go GOTOOLCHAIN=local PATH=/go/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
	EOF
fi
if ! has hashicorp/consul:1.21.0; then
	consul=$(command -v consul || echo "$cache/bin/consul-1.21.0")
	[ -x "$consul" ] || "$here/deps.sh"
	base hashicorp/consul:1.21.0 --transform 's,^consul.*,consul,' -C "$(dirname "$consul")" "$(basename "$consul")" <<-'EOF'
		FROM debian:trixie-slim
		COPY consul /bin/consul
	EOF
fi
say "ready: engine $(docker version -f '{{.Server.Version}}'), compose $(docker compose version --short)"
"$@"
