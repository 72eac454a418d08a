#!/bin/sh
# Figures of the GPU transports, each beside its floor in the same run; nothing is compiled here.
#
#   tests/gpu/bench.sh build [RAW]     (the folder of a build with tests/bench_peer and tests/bench_nccl, or bin of an
#                                       unpacked bundle; RAW: the file for all figures, default bench-gpu.txt)
#
# Prints a table of ratios; 8 to 10 minutes at most.  With several GPUs also between them.
set -u

build=${1:?usage: bench.sh BUILD [RAW]}
raw=${2:-bench-gpu.txt}
failed=0
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
run() {
    echo "## $*" >>"$raw"
    timeout 150 "$@" >>"$raw" 2>&1
    rc=$?
    [ $rc = 0 ] || [ $rc = 77 ] || { echo "FAILED ($rc): $*; see $raw" >&2; failed=1; }
}
: >"$raw"
"$build/eep-agent" --list-gpus | tee -a "$raw"
gpus=$("$build/eep-agent" --list-gpus | wc -l)
run "$build/tests/bench_peer" 256 9437184
run "$build/tests/bench_peer" 1024 9437184
run "$build/tests/bench_peer" 64 44040192
[ "$gpus" -lt 2 ] || run "$build/tests/bench_peer" 256 9437184 1
for ranks in 2 4 8; do
    run "$build/tests/bench_nccl" --ranks $ranks --slots $((128 / ranks))
    [ "$gpus" -lt $ranks ] || run "$build/tests/bench_nccl" --ranks $ranks --gpus
done
awk '
/^## /       { run = substr($0, 4); sub(/^[^ ]*\//, "", run); printf "\n%s\n", run; next }
/^# /        { print "  " substr($0, 3); next }
$1 != "figure" { next }
{
    value[$2] = $3
    name = $2
    base = name; sub(/\.(median|best)$/, "", base)
    if (name ~ /^digest\./ && name !~ /floor$/) { base = name; sub(/\.[^.]*$/, "", base) }
    floor = base ".floor"
    ratio = name !~ /floor$/ && floor in value && value[floor] > 0 ? sprintf("%6.1f %% of the floor", 100 * $3 / value[floor]) : ""
    printf "  %-44s %10s %-5s %s\n", name, $3, $4, ratio
}' "$raw"
echo
echo "raw figures: $raw"
exit $failed
