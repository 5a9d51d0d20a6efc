# Sourced: a real Kubernetes of one node, for tests. What it is made of lies in tests/cluster.
# shellcheck shell=bash disable=SC2154

# cluster_start FOLDER: compiles it if the cache has none, starts it with everything of it in FOLDER, and gives it
# the images of the tests and the rights of a gateway. Sets MLAD_TEST_CLUSTER and MLAD_TEST_KUBECONFIG.
cluster_start() {
  local folder=$1 reference
  require kubectl=kubernetes-client openssl=openssl ip=iproute2 curl=curl python3=python3 strip=binutils
  export ROOT=$cluster_cache/root BIN=$cluster_cache/bin RUN=$folder
  cluster_programs
  say "starting a Kubernetes (logs: $folder/log)"
  mkdir -p "$folder"
  "$root/tests/cluster/up.sh" >"$folder/up.log" 2>&1 || {
    tail -20 "$folder/up.log" >&2
    fail "the cluster did not start (all it said: $folder/up.log)"
  }
  "$root/images/build" agent --program "$mlad" >&2
  for reference in mlad/base:1 mlad/agent:1; do
    "$root/tests/cluster/import.sh" "$reference"
  done
  cluster_gateway "$folder"
  export MLAD_TEST_CLUSTER=$folder MLAD_TEST_KUBECONFIG=$folder/gateway.kubeconfig
}

# The programs of the cluster, in the cache. What is half-made never gets its name.
cluster_programs() {
  local stamp
  stamp=$(cat "$root/tests/cluster/"{get-deps.sh,make-k8s.sh,k8sall-main.go} | sha256sum | cut -c1-16)
  [[ $(cat "$cluster_cache/made" 2>/dev/null) != "$stamp" ]] || return 0
  say "compiling Kubernetes, once (2 to 6 minutes; log: $cluster_cache/log)"
  rm -rf "$cluster_cache"
  mkdir -p "$cluster_cache"
  { "$root/tests/cluster/get-deps.sh" "$ROOT" && "$root/tests/cluster/make-k8s.sh" "$cluster_cache/work" "$BIN"; } \
    >"$cluster_cache/log" 2>&1 || fail "Kubernetes cannot be made (all it said: $cluster_cache/log)"
  rm -rf "$cluster_cache/work"
  echo "$stamp" >"$cluster_cache/made"
}

# A kubeconfig with the rights of a gateway and no others, as config/kubernetes gives them.
cluster_gateway() {
  local folder=$1 admin=(kubectl --kubeconfig "$1/admin.kubeconfig") token secret
  "${admin[@]}" apply -k "$root/config/kubernetes/base" >/dev/null
  wait_for 30 cluster_token "$folder" || fail "the cluster makes no token for the gateway's service account"
  secret=$(cluster_token "$folder")
  token=$("${admin[@]}" -n mlad-system get secret "$secret" -o 'jsonpath={.data.token}' | base64 -d)
  (
    umask 077
    sed "s/client-certificate-data: .*/token: $token}}]/" "$folder/admin.kubeconfig" >"$folder/gateway.kubeconfig"
  )
}

# The name of the secret with the service account's token.
cluster_token() {
  local name
  name=$(kubectl --kubeconfig "$1/admin.kubeconfig" -n mlad-system get serviceaccount mlad-gateway \
    -o 'jsonpath={.secrets[0].name}') && [[ -n $name ]] && echo "$name"
}

# cluster_stop FOLDER
cluster_stop() {
  [[ -d $1 ]] || return 0
  RUN=$1 ROOT=$cluster_cache/root BIN=$cluster_cache/bin "$root/tests/cluster/down.sh" --wipe >/dev/null 2>&1 || :
}

cluster_cache=${MLAD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mlad}/cluster
