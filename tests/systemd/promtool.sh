#!/bin/sh
# promtool alone, out of Debian's package prometheus: installing that would also bring a server that starts.
#   tests/systemd/promtool.sh [FOLDER]          as root; default /usr/local/bin
set -eu
to=${1:-/usr/local/bin}
d=$(mktemp -d /tmp/eep-promtool.XXXXXX)
trap 'rm -rf "$d"' EXIT
chmod 755 "$d"
[ -w "$to" ] || { echo "promtool: cannot write in $to; run 'make deps-test' once as root" >&2; exit 1; }
fetch() { (cd "$d" && apt-get -qq download prometheus) 2>"$d/said"; }
fetch || { apt-get -qq update && fetch; } || { cat "$d/said" >&2; exit 1; }
dpkg -x "$d"/prometheus_*.deb "$d/x"
install -m 755 "$d/x/usr/bin/promtool" "$to"
