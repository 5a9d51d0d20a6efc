# Sourced by scripts/quickstart and scripts/test: words to the person, installing what is missing, building.
# shellcheck shell=bash disable=SC2034

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
static_target=$(uname -m)-unknown-linux-gnu
release=$root/target/release
mlad=$root/target/$static_target/release/mlad

say() { printf '==> %s\n' "$*" >&2; }

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# Runs something as root: directly, or by sudo.
as_root() {
  if [[ $(id -u) == 0 ]]; then "$@"; else sudo --preserve-env=DOCKER_HOST,MLAD_CACHE,HOME "$@"; fi
}

# require COMMAND=PACKAGE …: installs the Debian packages of the commands that are missing; on other systems
# says exactly what is missing.
require() {
  local pair missing=() commands=()
  for pair in "$@"; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%=*}" >/dev/null && continue
    commands+=("${pair%%=*}")
    missing+=("${pair#*=}")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null ||
    fail "please install: ${commands[*]} (Debian calls the packages: ${missing[*]}), then start this again"
  say "installing ${missing[*]}"
  local log
  log=$(mktemp)
  # policy-rc.d keeps a package from starting its service: what is needed is started, and stopped, here.
  if ! { as_root apt-get update -q && as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y -q --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -20 "$log" >&2
    fail "apt-get could not install ${missing[*]} (all it said: $log)"
  fi
  rm -f "$log"
}

# Builds the programs, the simulated NVML library and the static mlad.
build() {
  command -v cargo >/dev/null ||
    fail "Rust is missing: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml") or later with rustup, then start this again"
  require cc=gcc
  say "building (some minutes the first time)"
  local quiet=()
  [[ -t 2 ]] || quiet=(--quiet)
  (cd "$root" && cargo build --release --locked "${quiet[@]}" -p mlad-gateway -p mlad-allocator -p nvml-sim) ||
    fail "the build failed; what cargo said stands above"
  # Static, so that it runs in any image.
  (cd "$root" && RUSTFLAGS='-C target-feature=+crt-static' \
    cargo build --release --locked "${quiet[@]}" --target "$static_target" -p mlad) ||
    fail "the static build of mlad failed; what cargo said stands above"
}

# wait_for SECONDS COMMAND…: until COMMAND succeeds, for so long.
wait_for() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 0.2
  done
}
