#!/bin/sh
# Plants each known mistake in turn and shows after how many seeds and events the simulator finds it.
# Usage: tests/sim/bugs.sh [SIMULATOR] [SEEDS]        exit 1 if one is not found
sim=${1:-build/tests/eep-sim}
seeds=${2:-20000}
missed=0

printf '%-28s %7s %8s  %s\n' mistake seed event violation
for bug in $("$sim" --list-bugs); do
    out=$("$sim" --bug "$bug" --seeds "$seeds" --expect-violation)
    if [ $? -eq 0 ]; then
        printf '%s\n' "$out" | sed -n "s/^seed \([0-9]*\) FAILED at event \([0-9]*\): \(.*\)/\1 \2 \3/p" | head -n 1 |
            while read -r seed event text; do
                printf '%-28s %7s %8s  %s\n' "$bug" "$seed" "$event" "$text"
            done
    else
        printf '%-28s %7s %8s  NOT FOUND in %s seeds\n' "$bug" - - "$seeds"
        missed=$((missed + 1))
    fi
done
[ "$missed" -eq 0 ] || { echo "$missed not found"; exit 1; }
