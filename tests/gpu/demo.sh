#!/bin/sh
# The demo with its weights in GPU memory, and libeep's own tests, on a machine with a GPU; nothing is compiled here.
#
#   tests/gpu/demo.sh build [CYCLES]     (the folder of a build, or of an unpacked bundle with tests: it has eep-agent,
#                                         tests/eep-demo, tests/eep-engine, tests/eep-feeder, tests/test_libeep_gpu)
#
# 2 -> 4 -> 3 -> 2 -> 8 -> 4 ranks, CYCLES times (20) over cuda_peer, then a few cycles over NCCL; the agents share what
# GPUs there are.  Ends with a table; what each run said is in $OUT (default: a temporary folder).  Less than 3 minutes
# for the cycles over cuda_peer.  MODEL names another checkpoint with its reference, BUSY_US makes steps heavier.
set -u

build=${1:?usage: demo.sh BUILD [CYCLES]}
cycles=${2:-20}
here=$(cd "$(dirname "$0")" && pwd)
model=${MODEL:-$here/../data/qwen3-moe-tiny}
out=${OUT:-$(mktemp -d)}
failed=0
export EEP_BIN="$build"
mkdir -p "$out"

# Several agents of one host talk to each other by sockets; see docs/gpu.md.
export NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"

demo() { # name, arguments...
    name=$1
    shift
    begin=$(date +%s)
    timeout 400 "$build/tests/eep-demo" --model "$model" --memory cuda --sequence 2,4,3,2,8,4 --settle-ms 100 \
        --busy-us "${BUSY_US:-2000}" --step-ms "${STEP_MS:-5}" --concurrency 16 "$@" >"$out/$name.txt" 2>&1
    rc=$?
    [ $rc = 0 ] || failed=1
    echo "$name rc=$rc seconds=$(($(date +%s) - begin))" >>"$out/results"
}

: >"$out/results"
"$build/eep-agent" --list-gpus
echo "## test_libeep_gpu"
timeout 200 "$build/tests/test_libeep_gpu" || failed=1
demo cuda_peer --transport cuda_peer --cycles "$cycles"
demo nccl --transport nccl --cycles 3
demo fused_replicated --transport cuda_peer --cycles 2 --layout fused --dispatch replicated

while read -r name result; do
    echo
    echo "## demo $name: $result"
    if grep -q '^report' "$out/$name.txt"; then
        sed -n '/^report/,$p' "$out/$name.txt"
    else
        tail -n 40 "$out/$name.txt"
    fi
done <"$out/results"
echo
echo "what each run said: $out"
exit $failed
