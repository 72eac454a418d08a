#!/bin/sh
# A Debian 12 tree with what the programs need, by debootstrap, unless it is there.
#   tests/systemd/tree.sh TREE       DEBIAN_MIRROR: where from (default: debootstrap's own)
set -eu
[ ! -e "$1/lib/systemd/systemd" ] || exit 0
command -v debootstrap >/dev/null || { echo "needs debootstrap (a Debian package), or a tree that it has made"; exit 77; }
debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,iproute2,procps,libevent-2.1-7,libevent-openssl-2.1-7,libevent-pthreads-2.1-7,libprotobuf-c1,liblmdb0,libjansson4,libinih1,libssl3 \
    bookworm "$1" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$1.log" 2>&1 || { tail "$1.log"; exit 1; }
