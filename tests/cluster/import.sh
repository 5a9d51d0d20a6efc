#!/bin/bash
# Brings an image of the Docker engine at DOCKER_HOST into the cluster: import.sh NAME:TAG. It is called
# registry.invalid/NAME:TAG there, and has a digest as if it had come from a registry.
set -euo pipefail
ROOT=${ROOT:?the folder of get-deps.sh}; RUN=${RUN:?the folder of up.sh}
export PATH="$PATH:$ROOT/usr/bin"
ctr() { command ctr -a "$RUN/containerd/c.sock" -n k8s.io "$@"; }
docker save "$1" | ctr images import - >/dev/null
own=$(ctr images ls -q | grep "/$1\$" | grep -v '^registry.invalid/' | head -1)
digest=$(ctr images ls "name==$own" | awk 'NR == 2 { print $3 }')
ctr images tag --force "$own" "registry.invalid/$1" >/dev/null
ctr images tag --force "$own" "registry.invalid/${1%:*}@$digest" >/dev/null
ctr images rm "$own" >/dev/null
