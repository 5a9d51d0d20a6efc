# Sourced by the scripts: words to the person, installing what is missing, building.
# shellcheck shell=bash disable=SC2034

# A step that fails says where, in functions and substitutions too.
set -E
trap 'printf "%s: line %s: this failed: %s\n" "${0##*/}" "$LINENO" "$BASH_COMMAND" >&2' ERR

# Where Debian keeps what only root calls (nft, iptables, dockerd).
export PATH=$PATH:/usr/sbin:/sbin
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Tells what one checkout starts from what another does.
checkout=$(printf %s "$root" | sha256sum | cut -c1-8)
# Programs are looked for there, whatever the person's own settings say.
export CARGO_TARGET_DIR=$root/target
static_target=$(uname -m)-unknown-linux-gnu
release=$CARGO_TARGET_DIR/release
mlad=$CARGO_TARGET_DIR/$static_target/release/mlad

# Tests need their programs soon rather than fast: MLAD's own crates are then compiled without optimisation, which
# takes a quarter of the time, and everything else is the same. (MLAD_OPTIMISE=yes scripts/test: with it.)
cargo_options=(--release --locked)
if [[ ${MLAD_OPTIMISE-yes} == no ]]; then
  for crate in mlad mlad-allocator mlad-gateway mlad-tests nvml-sim; do
    cargo_options+=(--config "profile.release.package.$crate.opt-level=0")
  done
fi

say() { printf '==> %s\n' "$*" >&2; }

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# Runs something as root: directly, or by sudo.
as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  else
    command -v sudo >/dev/null || fail "this needs root: become root, or install sudo"
    sudo --preserve-env=DOCKER_HOST,MLAD_CACHE,HOME "$@"
  fi
}

# require COMMAND=PACKAGE …: installs the Debian packages of the commands that are missing; on other systems
# says exactly what is missing.
require() {
  local pair missing=() commands=()
  for pair in "$@"; do
    command -v "${pair%%=*}" >/dev/null && continue
    commands+=("${pair%%=*}")
    missing+=("${pair#*=}")
  done
  ((${#missing[@]} == 0)) || install_packages "${commands[*]}" "${missing[@]}"
}

# A C compiler that finds its headers: on Debian `gcc` alone comes without those of libc.
require_compiler() {
  printf '#include <stdlib.h>\n' | cc -fsyntax-only -x c - 2>/dev/null ||
    install_packages "a C compiler with the headers of libc" build-essential
}

require_rust() {
  command -v cargo >/dev/null ||
    fail "Rust is missing: install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml") or later with rustup, then start this again"
}

# install_packages WHAT PACKAGE …
install_packages() {
  local what=$1 log
  shift
  command -v apt-get >/dev/null || fail "please install: $what (Debian calls the packages: $*), then start this again"
  say "installing $*"
  log=$(mktemp)
  # policy-rc.d keeps a package from starting its service: what is needed is started, and stopped, here.
  if ! { as_root apt-get update -q && as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y -q --no-install-recommends "$@"; } >"$log" 2>&1; then
    tail -20 "$log" >&2
    fail "apt-get could not install $* (all it said: $log)"
  fi
  rm -f "$log"
}

# Builds the programs, the simulated NVML library and the static mlad. Always the whole workspace: with the same
# selection of packages every command selects the same features, and a dependency is compiled once.
build() {
  require_rust
  require_compiler
  say "building (some minutes the first time)"
  local quiet=()
  [[ -t 2 ]] || quiet=(--quiet)
  (cd "$root" && cargo build "${cargo_options[@]}" "${quiet[@]}" --workspace) ||
    fail "the build failed; what cargo said stands above"
  # Static, so that it runs in any image.
  (cd "$root" && RUSTFLAGS='-C target-feature=+crt-static' \
    cargo build "${cargo_options[@]}" "${quiet[@]}" --workspace --bin mlad --target "$static_target") ||
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

# end_process PID WORD SECONDS: ends a process if WORD is in its command line (a process id written down long ago
# may be somebody else's by now): politely, and after so many seconds at once.
end_process() {
  local pid=$1 word=$2 patience=$3
  is_ours "$pid" "$word" || return 0
  as_root kill "$pid" 2>/dev/null || :
  wait_for "$patience" not_running "$pid" || as_root kill -9 "$pid" || :
}

# is_ours PID WORD
is_ours() { [[ $1 =~ ^[0-9]+$ && $(as_root cat "/proc/$1/cmdline" 2>/dev/null | tr '\0' ' ') == *"$2"* ]]; }

not_running() { ! as_root kill -0 "$1" 2>/dev/null; }
