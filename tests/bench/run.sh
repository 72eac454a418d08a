#!/bin/sh
# make bench: the figures of docs/figures.md, as markdown on standard output.  Takes about six minutes.
#
#   EEP_BIN=build tests/bench/run.sh build/tests
#
# BENCH_CYCLES: up/down cycles of bench_scale (10).
set -eu

tests=${1:?usage: run.sh FOLDER (of the bench_ programs)}
cycles=${BENCH_CYCLES:-10}
export EEP_BIN="${EEP_BIN:-build}"

model=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)
memory=$(awk '/^MemTotal:/ { printf "%.0f GB", $2 / 1e6 }' /proc/meminfo)
echo "# make bench"
echo
echo "- date: $(date -u '+%Y-%m-%d %H:%M UTC')"
echo "- machine: $(nproc) cores (${model:-unknown processor}), $memory of memory, load average $(cut -d' ' -f1 /proc/loadavg) at the start"
echo "- kernel: $(uname -sr) $(uname -m)"

failed=0
run() {
    echo
    echo "## $1"
    echo
    shift
    "$@" || { echo "FAILED: $*" >&2; failed=1; }
}
run "placement" "$tests/bench_planner"
run "transfer" "$tests/bench_transfer"
run "scaling, default lead" "$tests/bench_scale" --cycles "$cycles"
run "scaling, --lead-ms 60" "$tests/bench_scale" --cycles "$cycles" --lead-ms 60
run "store against Redis" "$tests/bench_store" --million
run "barriers, joins, memory" "$tests/bench_barrier"
echo
echo "load average $(cut -d' ' -f1 /proc/loadavg) at the end"
exit $failed
