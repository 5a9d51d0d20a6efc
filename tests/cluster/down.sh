#!/bin/bash
# Stops what up.sh started (by pid file only) and, with --wipe, deletes its state.
P=$(cd "$(dirname "$0")" && pwd); RUN=${RUN:-$P/run}; ROOT=${ROOT:-$P/root}
export PATH="$PATH:$ROOT/usr/bin"
CTR="ctr -a $RUN/containerd/c.sock -n k8s.io"
stop(){ [ -f "$RUN/pid/$1" ] || return; p=$(cat "$RUN/pid/$1"); kill "$p" 2>/dev/null; for i in $(seq 1 100); do kill -0 "$p" 2>/dev/null || break; sleep 0.1; done; kill -9 "$p" 2>/dev/null; rm -f "$RUN/pid/$1"; }
stop fake-device-plugin; stop kubelet
if [ -S "$RUN/containerd/c.sock" ]; then
  NETNS=$(for c in $($CTR containers ls -q 2>/dev/null); do $CTR containers info "$c" 2>/dev/null | grep -oE '/(var/)?run/netns/cni-[0-9a-f-]+'; done | sort -u)
  for c in $($CTR tasks ls -q 2>/dev/null); do $CTR tasks rm -f "$c" >/dev/null 2>&1; done
  for c in $($CTR containers ls -q 2>/dev/null); do $CTR containers rm "$c" >/dev/null 2>&1; done
fi
for c in kube-scheduler kube-controller-manager kube-apiserver etcd containerd; do stop $c; done
grep -oE " $RUN/[^ ]+" /proc/self/mountinfo | sort -ru | while read -r m; do umount -l "$m" 2>/dev/null; done
for n in ${NETNS:-}; do umount "$n" 2>/dev/null; rm -f "$n"; done
ip link show kprobe0 >/dev/null 2>&1 && ip link del kprobe0
while read -r k v; do echo "$v" > "/proc/sys/${k//.//}"; done 2>/dev/null < <(cat "$RUN/sysctl.saved" 2>/dev/null); rm -f "$RUN/sysctl.saved"
if [ "${1:-}" = --wipe ]; then
  find /sys/fs/cgroup/*/kubepods /sys/fs/cgroup/kubepods -depth -type d -exec rmdir {} \; 2>/dev/null
  rm -rf /var/lib/kubelet/device-plugins; rmdir /var/lib/kubelet /var/log/pods /var/log/containers /var/lib/cni/results /var/lib/cni 2>/dev/null
fi
[ "${1:-}" = --wipe ] && rm -rf "$RUN"
true
