#!/bin/bash
# Starts a one-node Kubernetes cluster, loopback only. Usage: ./up.sh [control|full]   (default full)
#   control = etcd + kube-apiserver only (envtest-like);  full = + scheduler, controller-manager, containerd, kubelet
set -euo pipefail
MODE=${1:-full}
P=$(cd "$(dirname "$0")" && pwd)
BIN=${BIN:-$P/bin}
RUN=${RUN:-$P/run}
ROOT=${ROOT:-$P/root}
API_PORT=${API_PORT:-16443}; ETCD_PORT=${ETCD_PORT:-12379}; ETCD_PEER=${ETCD_PEER:-12380}
KUBELET_PORT=${KUBELET_PORT:-10250}
NODE=${NODE:-localhost}
SVC_CIDR=10.96.0.0/16
export PATH="$PATH:$ROOT/usr/sbin:$ROOT/usr/bin:$ROOT/sbin"
mkdir -p "$RUN"/{pki,log,pid,etcd,kubelet,containerd,cni/conf,conf}
chmod 700 "$RUN/pki"
say(){ printf '[%3ds] %s\n' "$SECONDS" "$*"; }
spawn(){ # name cmd...
  local n=$1; shift
  if [ -f "$RUN/pid/$n" ] && kill -0 "$(cat "$RUN/pid/$n")" 2>/dev/null; then say "$n already running"; return; fi
  setsid nohup "$@" >"$RUN/log/$n.log" 2>&1 < /dev/null &
  echo $! >"$RUN/pid/$n"
}
alive(){ kill -0 "$(cat "$RUN/pid/$1")" 2>/dev/null || { echo "$1 died:"; tail -20 "$RUN/log/$1.log"; exit 1; }; }

# ---------- PKI (ECDSA P-256, PKCS#8 keys) ----------
cd "$RUN/pki"
key(){ openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key" 2>/dev/null; }
if [ ! -f ca.crt ]; then
  key ca; openssl req -x509 -new -key ca.key -days 365 -subj /CN=probe-ca -out ca.crt \
     -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign,digitalSignature
fi
issue(){ # name subj eku san
  [ -f "$1.crt" ] && return
  key "$1"
  { echo "basicConstraints=critical,CA:FALSE"; echo "keyUsage=critical,digitalSignature"; echo "extendedKeyUsage=$3"; [ -z "${4:-}" ] || echo "subjectAltName=$4"; } > "$1.ext"
  openssl req -new -key "$1.key" -subj "$2" 2>/dev/null | openssl x509 -req -CA ca.crt -CAkey ca.key -set_serial 0x$(openssl rand -hex 8) -days 365 -extfile "$1.ext" -out "$1.crt" 2>/dev/null
}
issue apiserver /CN=kube-apiserver serverAuth "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1"
issue kubelet-server "/CN=kubelet" serverAuth "DNS:localhost,DNS:$NODE,IP:127.0.0.1"
issue admin "/O=system:masters/CN=probe-admin" clientAuth
issue apiserver-kubelet "/O=system:masters/CN=kube-apiserver-kubelet-client" clientAuth
issue kubelet "/O=system:nodes/CN=system:node:$NODE" clientAuth
issue scheduler "/CN=system:kube-scheduler" clientAuth
issue kcm "/CN=system:kube-controller-manager" clientAuth
[ -f sa.key ] || { openssl genrsa -out sa.key 2048 2>/dev/null; openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null; }
kc(){ # name -> kubeconfig with embedded credentials
  cat > "$RUN/$1.kubeconfig" <<K
apiVersion: v1
kind: Config
clusters: [{name: probe, cluster: {server: "https://127.0.0.1:$API_PORT", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 $1.crt), client-key-data: $(base64 -w0 $1.key)}}]
contexts: [{name: probe, context: {cluster: probe, user: $1}}]
current-context: probe
K
  chmod 600 "$RUN/$1.kubeconfig"
}
for u in admin kubelet scheduler kcm; do kc $u; done
cd "$P"
say "pki ready"

# ---------- etcd ----------
spawn etcd "$ROOT/usr/bin/etcd" --name probe --data-dir "$RUN/etcd" --unsafe-no-fsync \
  --listen-client-urls http://127.0.0.1:$ETCD_PORT --advertise-client-urls http://127.0.0.1:$ETCD_PORT \
  --listen-peer-urls http://127.0.0.1:$ETCD_PEER --initial-advertise-peer-urls http://127.0.0.1:$ETCD_PEER \
  --initial-cluster probe=http://127.0.0.1:$ETCD_PEER --logger zap

# ---------- kube-apiserver ----------
ADM=""; [ "$MODE" = control ] && ADM="--disable-admission-plugins=ServiceAccount"
spawn kube-apiserver "$BIN/kube-apiserver" \
  --etcd-servers=http://127.0.0.1:$ETCD_PORT --bind-address=127.0.0.1 --secure-port=$API_PORT ${INSECURE_PORT_FLAG:---insecure-port=0} \
  --tls-cert-file="$RUN/pki/apiserver.crt" --tls-private-key-file="$RUN/pki/apiserver.key" --client-ca-file="$RUN/pki/ca.crt" \
  --kubelet-client-certificate="$RUN/pki/apiserver-kubelet.crt" --kubelet-client-key="$RUN/pki/apiserver-kubelet.key" \
  --kubelet-certificate-authority="$RUN/pki/ca.crt" --kubelet-preferred-address-types=Hostname \
  --service-account-issuer=https://kubernetes.default.svc --service-account-signing-key-file="$RUN/pki/sa.key" --service-account-key-file="$RUN/pki/sa.pub" \
  --service-cluster-ip-range=$SVC_CIDR --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction $ADM \
  --endpoint-reconciler-type=none --allow-privileged=true --profiling=false --cert-dir="$RUN/pki/unused" --v=1

if [ "$MODE" = full ]; then
  # ---------- containerd (private instance) ----------
  cat > "$RUN/conf/containerd.toml" <<T
version = 2
root = "$RUN/containerd/root"
state = "$RUN/containerd/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs","io.containerd.snapshotter.v1.zfs","io.containerd.snapshotter.v1.aufs","io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "$RUN/containerd/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$RUN/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.invalid/pause:1"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$ROOT/usr/lib/cni"
    conf_dir = "$RUN/cni/conf"
T
  cat > "$RUN/cni/conf/10-probe.conflist" <<C
{"cniVersion":"0.4.0","name":"probe","plugins":[
 {"type":"bridge","bridge":"kprobe0","isGateway":true,"ipMasq":false,"hairpinMode":true,
  "ipam":{"type":"host-local","dataDir":"$RUN/cni/ipam","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
C
  # pulls go to a closed loopback port: a missing image fails at once and nothing (not even DNS) leaves the machine
  spawn containerd env HTTP_PROXY=http://127.0.0.1:1 HTTPS_PROXY=http://127.0.0.1:1 NO_PROXY=localhost,127.0.0.1 "${CONTAINERD:-containerd}" --config "$RUN/conf/containerd.toml"
fi

K="kubectl --kubeconfig $RUN/admin.kubeconfig"
for i in $(seq 1 240); do alive etcd; alive kube-apiserver; [ "$($K get --raw /readyz 2>/dev/null)" = ok ] && break; sleep 0.25; done
[ "$($K get --raw /readyz)" = ok ]; say "kube-apiserver ready: $($K version -o json 2>/dev/null | grep -A8 serverVersion | grep gitVersion | tr -d ' ,')"
if [ "$MODE" = full ]; then
  # ---------- images (built from Debian's static busybox; no registry needed) ----------
  CTR="ctr -a $RUN/containerd/c.sock -n k8s.io"
  for i in $(seq 1 100); do $CTR version >/dev/null 2>&1 && break; sleep 0.1; done
  if ! $CTR images ls -q | grep -q registry.invalid/pause; then
    if [ -z "${BUSYBOX:-}" ]; then BUSYBOX=/bin/busybox; [ -x "$BUSYBOX" ] || BUSYBOX=$ROOT/bin/busybox; fi
    "$P/mkimages.py" "$RUN/images.tar" "$BUSYBOX"
    $CTR images import "$RUN/images.tar" >/dev/null
  fi
  say "images: $($CTR images ls -q | tr '\n' ' ')"
  cat > "$RUN/conf/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: $KUBELET_PORT
readOnlyPort: 0
healthzBindAddress: 127.0.0.1
healthzPort: 10248
tlsCertFile: $RUN/pki/kubelet-server.crt
tlsPrivateKeyFile: $RUN/pki/kubelet-server.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $RUN/pki/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
cgroupRoot: /
failSwapOn: false
resolvConf: ""
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
hairpinMode: none
makeIPTablesUtilChains: false
evictionHard: {memory.available: 100Mi, nodefs.available: 1Gi}
imageGCHighThresholdPercent: 100
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
serializeImagePulls: false
Y
  # kubelet rewrites these; down.sh puts them back
  [ -f "$RUN/sysctl.saved" ] || for k in vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes; do
    echo "$k $(cat /proc/sys/${k//.//})"; done > "$RUN/sysctl.saved"
  spawn kube-scheduler "$BIN/kube-scheduler" --kubeconfig="$RUN/scheduler.kubeconfig" --leader-elect=false --bind-address=127.0.0.1 --secure-port=10259 ${PORT0_FLAG:---port=0} --cert-dir="$RUN/pki/sched" --authentication-kubeconfig="$RUN/scheduler.kubeconfig" --authorization-kubeconfig="$RUN/scheduler.kubeconfig"
  spawn kube-controller-manager "$BIN/kube-controller-manager" --kubeconfig="$RUN/kcm.kubeconfig" --leader-elect=false --bind-address=127.0.0.1 --secure-port=10257 ${PORT0_FLAG:---port=0} --cert-dir="$RUN/pki/kcmserv" \
     --authentication-kubeconfig="$RUN/kcm.kubeconfig" --authorization-kubeconfig="$RUN/kcm.kubeconfig" \
     --service-account-private-key-file="$RUN/pki/sa.key" --root-ca-file="$RUN/pki/ca.crt" --use-service-account-credentials=true --flex-volume-plugin-dir="$RUN/kcm-flex"
  spawn kubelet "$BIN/kubelet" --config="$RUN/conf/kubelet.yaml" --kubeconfig="$RUN/kubelet.kubeconfig" --hostname-override="$NODE" \
     --root-dir="$RUN/kubelet" --container-runtime=remote --container-runtime-endpoint="unix://$RUN/containerd/c.sock" \
     --runtime-cgroups=/ --kubelet-cgroups=/ --register-node=true --volume-plugin-dir="$RUN/kubelet/volplugins"
  for i in $(seq 1 240); do for c in containerd kube-scheduler kube-controller-manager kubelet; do alive $c; done
    $K wait --for=condition=Ready node/$NODE --timeout=2s >/dev/null 2>&1 && break; sleep 0.25; done
  $K wait --for=condition=Ready node/$NODE --timeout=5s >/dev/null
  for i in $(seq 1 240); do $K -n default get sa default >/dev/null 2>&1 && break; sleep 0.25; done
  say "node $NODE Ready"
  if [ -n "${DEVICES:-}" ]; then   # e.g. DEVICES="nvidia.com/mig-1g.10gb=7 nvidia.com/gpu=2"
    spawn fake-device-plugin "$BIN/fake-device-plugin" $DEVICES
    r=${DEVICES%%=*}; for i in $(seq 1 100); do [ -n "$($K get node $NODE -o jsonpath="{.status.allocatable.${r//./\\.}}")" ] && break; sleep 0.2; done
    say "devices: $($K get node $NODE -o jsonpath='{.status.allocatable}')"
  fi
fi
echo "export KUBECONFIG=$RUN/admin.kubeconfig"
