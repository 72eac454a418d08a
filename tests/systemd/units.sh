#!/bin/sh
# The units as `make install` writes them: systemd-analyze finds no mistake, and does not call them more exposed than we say.
#
#   tests/systemd/units.sh BUILD
set -eu
cd "$(dirname "$0")/../.."
build=$1
command -v systemd-analyze >/dev/null || {
    echo "no systemd-analyze here"
    [ "${CI:-}" = true ] && exit 1
    exit 77
}
d=$(mktemp -d /tmp/eep-units.XXXXXX)
trap 'rm -rf "$d"' EXIT

make --no-print-directory -s install BUILD="$build" PREFIX="$d" >/dev/null
units=$d/lib/systemd/system
export SYSTEMD_UNIT_PATH="$units:"
said=$(cd "$units" && systemd-analyze verify ./*.socket ./*.target ./eep-coordinator.service ./eep-agent@gpu0.service 2>&1) || {
    echo "$said"; exit 1; }
[ -z "$said" ] || { echo "systemd-analyze verify: $said"; exit 1; }

most_exposed() { # unit, ten times the exposure that it may have
    systemd-analyze security --offline=true --threshold="$2" --no-pager "$units/$1" >"$d/said" 2>&1 || {
        cat "$d/said"; echo "$1 is more exposed than $2 / 10"; exit 1; }
    grep Overall "$d/said" | sed 's/.*for //; s/ [A-Z].*//'
}
most_exposed eep-coordinator.service 15
most_exposed eep-agent@.service 25
# what is offered to start must be there
for program in $(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$units"/*.service); do [ -x "$program" ]; done
systemd-sysusers --dry-run "$d/lib/sysusers.d/eep.conf" >/dev/null 2>&1
echo "verify passed"
