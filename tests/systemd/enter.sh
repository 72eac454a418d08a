#!/bin/sh
# Becomes systemd in a tree, as process 1 of the namespaces that unshare has made: see boot.sh.
#   enter.sh TREE
set -eu
tree=$1
mount --make-rprivate /
mount --bind "$tree" "$tree"
cd "$tree"
mkdir -p proc sys run tmp old
mount -t proc proc proc
mount -t sysfs sysfs sys 2>/dev/null || mount -t tmpfs tmpfs sys
mkdir -p sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs tmpfs dev
mkdir dev/shm dev/pts dev/mqueue dev/hugepages
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
for node in null zero full random urandom tty; do : >"dev/$node"; mount --bind "/dev/$node" "dev/$node"; done
pivot_root . old
umount -l /old
mount --make-rshared / # as systemd does where it is not told that it is in a container: credentials are mounted by a child of its
ip link set lo up 2>/dev/null || true
hostname eep-test
exec env -i container=unshare PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --log-target=console \
    --show-status=false systemd.unit=multi-user.target </dev/null
