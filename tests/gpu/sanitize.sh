#!/bin/sh
# compute-sanitizer's memcheck over our kernels and GPU memory: the memory contract, and a short load of block-scaled
# experts (DeepSeek-V3's shape, one layer).  One line a program with the number of errors; 0 when there are none.
#
#   tests/gpu/sanitize.sh build        (the folder of a build; make build/tests/test_memory build/tests/itest_checkpoint
#                                       build/tests/eep-make-checkpoint)
#
# The whole output is kept in the folder that $OUT names, or removed.  Calls that the driver refuses are no errors: the
# suites make some on purpose, and check themselves what they answer.
set -u

build=${1:?usage: sanitize.sh BUILD}
tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || {
    echo "sanitize.sh: compute-sanitizer is not here (it is in the CUDA toolkit)" >&2
    exit 77
}
if ! "$build/eep-agent" --list-gpus >/dev/null 2>&1; then
    echo "sanitize.sh: no GPU here: $("$build/eep-agent" --list-gpus 2>&1)" >&2
    exit 77
fi
logs=${OUT:-}
[ -n "$logs" ] || { logs=$(mktemp -d) && trap 'rm -rf "$logs"' EXIT; }
failed=0
check() { # name, command...
    name=$1 log=$logs/sanitize-$1.log
    shift
    EEP_BIN=$build timeout 500 "$tool" --tool memcheck --report-api-errors no --target-processes all --error-exitcode 9 "$@" \
        >"$log" 2>&1
    rc=$?
    # one summary for each process that used the GPU
    summaries=$(grep -c 'ERROR SUMMARY' "$log")
    errors=$(sed -n 's/.*ERROR SUMMARY: \([0-9]*\) error.*/\1/p' "$log" | awk '{ n += $1 } END { print n + 0 }')
    echo "$name: $errors errors in $summaries processes, exit status $rc"
    if [ "$rc" -ne 0 ] || [ "$errors" -ne 0 ] || [ "$summaries" -eq 0 ]; then
        failed=1
        tail -n 30 "$log"
    fi
}
check test_memory "$build/tests/test_memory"
check load env CK_RUN_CASE="GPU memory" "$build/tests/itest_checkpoint"
exit $failed
