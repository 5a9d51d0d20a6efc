# Sourced: a Docker engine of our own, for machines where none runs and for tests.
# shellcheck shell=bash disable=SC2034,SC2016

engine_packages=(dockerd=docker.io docker=docker.io iptables=iptables nft=nftables debootstrap=debootstrap)

# engine_answers SOCKET
engine_answers() { as_root docker -H "unix://$1" version >/dev/null 2>&1; }

# engine_start FOLDER SOCKET: starts dockerd with its data in FOLDER, its process id in FOLDER/engine.pid (written at
# once: dockerd itself writes its own only when it is half-way up, and may have to be ended before).
# The default bridge is left out, so that it does not meet another engine's.
engine_start() {
  local folder=$1 socket=$2 run
  run=$(dirname "$socket")
  ! engine_answers "$socket" || return 0
  as_root mkdir -p "$folder" "$run"
  as_root rm -f "$folder/dockerd.pid"
  say "starting a Docker engine (log: $folder/dockerd.log)"
  as_root sh -c 'exec setsid "$@" </dev/null >>"$0/dockerd.log" 2>&1 & echo $! >"$0/engine.pid"' "$folder" \
    dockerd --data-root "$folder/data" --exec-root "$run/exec" --pidfile "$folder/dockerd.pid" \
    -H "unix://$socket" --bridge none --log-level warn
  wait_for 60 engine_answers "$socket" || {
    as_root tail -5 "$folder/dockerd.log" >&2
    fail "the Docker engine did not start within 60 seconds (its log: $folder/dockerd.log)"
  }
}

# engine_stop FOLDER SOCKET: ends the engine that engine_start started, if it did.
engine_stop() {
  local folder=$1 socket=$2 pid
  pid=$(as_root cat "$folder/engine.pid" 2>/dev/null) || return 0
  end_process "$pid" "$folder/data" 60
  as_root rm -rf "$folder/engine.pid" "$(dirname "$socket")"
}

# engine_wipe FOLDER: removes the data of an engine that was stopped.
engine_wipe() {
  awk -v folder="$1/" 'index($2, folder) == 1 { print $2 }' /proc/mounts | sort -r | as_root xargs -r umount
  as_root rm -rf "$1"
}
