#!/usr/bin/env bash
# Builds the image twice from nothing: the same layers must come out, in less than 120 MB,
# and what is in them must run without root, capabilities and a writable file system.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() {
	printf 'image: %s\n' "$*" >&2
	exit 1
}
layers() { docker image inspect -f '{{json .RootFS.Layers}} {{json .Config}}' "$1"; }
for name in haproxy-connect haproxy-connect:again; do
	docker build -q --no-cache --network="${DOCKER_BUILD_NETWORK:-default}" -f docker/Dockerfile --target haproxy-connect -t $name . >/dev/null
done
[ "$(layers haproxy-connect)" = "$(layers haproxy-connect:again)" ] || fail "two builds differ: $(layers haproxy-connect) $(layers haproxy-connect:again)"
docker rmi haproxy-connect:again >/dev/null
size=$(docker image inspect -f '{{.Size}}' haproxy-connect)
[ "$size" -lt 120000000 ] || fail "$size bytes: want less than 120 MB"
docker run --rm --read-only --cap-drop ALL --security-opt no-new-privileges --network none haproxy-connect version
echo "image: $((size / 1000000)) MB, two builds the same"
