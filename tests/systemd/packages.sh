#!/usr/bin/env bash
# The packages of `make deb` in a clean Debian 12 tree: installed, used, upgraded, removed, purged.
#
#   tests/systemd/packages.sh BUILD [TREE]          as root
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$1 base=${2:-$1/debian-tree}
[ "$(id -u)" = 0 ] || { echo "needs root"; exit 77; }
tests/systemd/tree.sh "$base"
d=$(mktemp -d /tmp/eep-packages.XXXXXX)
finish() {
    umount -l "$d/tree" "$d" 2>/dev/null || true
    rm -rf "$d"
}
trap finish EXIT
passed=0
pass() { passed=$((passed + 1)); printf 'ok    %s\n' "$*"; }
fail() { printf 'FAIL  %s\n' "$*" >&2; exit 1; }

mount -t tmpfs tmpfs "$d"
mkdir "$d/upper" "$d/work" "$d/tree"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$d/upper,workdir=$d/work" "$d/tree"
tree=$d/tree
inside() { unshare -m -p -f --root="$tree" -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive \
    sh -c 'mount -t proc proc /proc; exec "$@"' sh "$@"; }
files() { (cd "$tree" && find etc/eep usr/bin/eep* lib/systemd/system/eep* usr/lib/*/libeep* usr/include/eep.h usr/share/man -name '*' 2>/dev/null | grep -E 'eep' | sort) || true; }

before=$(files)
mkdir "$tree/debs" && cp "$build"/deb/*.deb "$tree/debs" && rm -f "$tree"/debs/*dbgsym*
inside sh -c 'dpkg -i /debs/*.deb' >"$d/log" 2>&1 || { cat "$d/log"; fail "dpkg -i"; }
for name in bin/eep-coordinator bin/eep-agent bin/eep-keeper bin/eepctl bin/eep-ca include/eep.h; do
    [ -e "$tree/usr/$name" ] || fail "/usr/$name is not there"
done
inside id eep >/dev/null || fail "no user eep"
[ "$(stat -c %a "$tree/etc/eep/tls")" = 750 ] || fail "/etc/eep/tls"
inside eep-coordinator --config /etc/eep/coordinator.conf --check-config >/dev/null || fail "coordinator.conf"
inside eep-agent --id a --config /etc/eep/agent.conf --check-config >/dev/null || fail "agent.conf"
inside eepctl -c unix:/nonexistent status 2>/dev/null && fail "eepctl" || [ $? = 3 ] || fail "eepctl"
[ -L "$tree/etc/systemd/system/multi-user.target.wants/eep-coordinator.service" ] || fail "the coordinator is not enabled"
pass "installed"

echo "lease-ms = 4000" >>"$tree/etc/eep/coordinator.conf"
mkdir "$d/next"
for deb in "$tree"/debs/*.deb; do # the same with a higher version
    dpkg-deb -R "$deb" "$d/next/x"
    sed -i -E 's/0\.1\.0/0.1.1/' "$d/next/x/DEBIAN/control"
    dpkg-deb -b "$d/next/x" "$d/next/$(basename "$deb")" >/dev/null
    rm -r "$d/next/x"
done
rm "$tree"/debs/* && mv "$d"/next/*.deb "$tree/debs"
inside sh -c 'dpkg -i /debs/*.deb' >"$d/log" 2>&1 || { cat "$d/log"; fail "upgrade"; }
inside dpkg-query -W -f '${Version}\n' eep-agent | grep -qx 0.1.1 || fail "the upgrade has not come"
grep -qx "lease-ms = 4000" "$tree/etc/eep/coordinator.conf" || fail "the upgrade has overwritten a configuration file"
pass "upgraded; changed configuration is kept"

packages="libeep-dev libeep0 eepctl eep-agent eep-coordinator eep-common"
inside dpkg -r $packages >"$d/log" 2>&1 || { cat "$d/log"; fail "remove"; }
[ -e "$tree/etc/eep/coordinator.conf" ] || fail "removing took the configuration"
[ ! -e "$tree/usr/bin/eep-agent" ] || fail "removing left a program"
inside dpkg -P $packages >"$d/log" 2>&1 || { cat "$d/log"; fail "purge"; }
left=$(comm -13 <(echo "$before") <(files) | grep -v -x -e etc/eep -e etc/eep/tls || true)
[ -z "$left" ] || fail "purging left $left"
pass "removed, purged"
printf '%d passed, 0 failed\n' "$passed"
