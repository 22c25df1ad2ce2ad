#!/usr/bin/env bash
# Follows the README's guide in a clean container without a network.
set -euo pipefail
cd "$(dirname "$0")/../.."
docker build -q --network="${DOCKER_BUILD_NETWORK:-default}" -f testdata/guide/Dockerfile -t haproxy-connect/guide .
docker run --rm --network none --tmpfs /run haproxy-connect/guide
