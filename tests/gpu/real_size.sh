#!/usr/bin/env bash
# Scaling a checkpoint of real size with the real daemons, every slot verified after each operation; nothing is compiled.
#
#   tests/gpu/real_size.sh BUILD [TRANSPORT]     (the folder of a build, or bin of an unpacked bundle with tests)
#
# Environment: MODEL (arguments of eep-make-checkpoint: --model qwen3-30b-a3b --layers 16), CHECKPOINT (a folder that is
# there, instead), STEPS ("2 4 3 2 4"; each rank has the slots that the fewest ranks need), MEMORY (cuda).  TRANSPORT: auto,
# cuda_peer or nccl.  Agent i uses GPU i modulo their number.  The engines attach and answer, but have no requests: nobody
# knows the right tokens of random weights.  Prints what each operation took, moved, and its bounds; what loading and each
# round of moves reached; GPU memory in use.
set -u

build=$(cd "${1:?usage: real_size.sh BUILD [TRANSPORT]}" && pwd)
transport=${2:-auto}
memory=${MEMORY:-cuda}
steps=${STEPS:-2 4 3 2 4}
dir=$(mktemp -d "${TMPDIR:-/dev/shm}/eep-real-XXXXXX")
pids=()
export EEP_COORDINATOR=unix:$dir/c.sock NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

clean() {
    # engines first: an agent whose engine is gone lets go at once
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2>/dev/null; done
    sleep 0.5
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null; done
    wait 2>/dev/null
    rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
fail() { echo "real_size.sh: $*" >&2; tail -n 5 "$dir"/*.log >&2; exit 1; }
start() { # log, command...
    local log=$dir/$1.log
    shift
    "$@" >"$log" 2>&1 &
    pids+=($!)
}
gpu_memory() { nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2>/dev/null | paste -sd' '; }

checkpoint=${CHECKPOINT:-}
if [ -z "$checkpoint" ]; then
    checkpoint=$dir/checkpoint
    # shellcheck disable=SC2086 # several words
    "$build/tests/eep-make-checkpoint" ${MODEL:---model qwen3-30b-a3b --layers 16} "$checkpoint" | tail -n 1 || exit 1
fi
most=$(printf '%s\n' $steps | sort -n | tail -n 1)
least=$(printf '%s\n' $steps | sort -n | head -n 1)
gpus=1
[ "$memory" != cuda ] || gpus=$("$build/eep-agent" --list-gpus | wc -l)
[ "$gpus" -gt 0 ] || fail "no GPU here"
start coordinator "$build/eep-coordinator" --listen "$EEP_COORDINATOR" --state "$dir/state" --min-ranks "$least"
for ((i = 0; i < 100; i++)); do "$build/eepctl" status >"$dir/out" 2>&1 && break || sleep 0.1; done
for ((i = 0; i < most; i++)); do
    where=(--memory "$memory")
    [ "$memory" != cuda ] || where=(--memory "cuda:$((i % gpus))" --transport "$transport")
    [ "$memory" != cuda ] || [ "$most" -le "$gpus" ] || where+=(--shared-gpu)
    [ "$i" -ge "${steps%% *}" ] || where+=(--checkpoint "$checkpoint")
    start "agent-$i" "$build/eep-agent" --id "gpu$i" --coordinator "$EEP_COORDINATOR" --engine-socket "$dir/e$i.sock" "${where[@]}"
    start "engine-$i" "$build/tests/eep-idle-engine" "$dir/e$i.sock"
done
echo "$gpus GPUs, $most agents, $memory, $transport; GPU memory in use before, MiB: $(gpu_memory)"
for n in $steps; do
    begin=$(date +%s%N)
    "$build/eepctl" scale --to "$n" --wait-for-agents=60 --timeout 300 >"$dir/out" 2>&1 || { cat "$dir/out"; fail "scale --to $n failed"; }
    took=$((($(date +%s%N) - begin) / 1000000))
    verify=$(date +%s%N)
    "$build/eepctl" verify >"$dir/verified" 2>&1 || { cat "$dir/verified"; fail "verify failed"; }
    verify=$((($(date +%s%N) - verify) / 1000000))
    echo
    echo "## scale --to $n: $took ms; verify: $verify ms, $(tail -n 1 "$dir/verified"); GPU memory in use, MiB: $(gpu_memory)"
    tail -n 6 "$dir/out"
done
echo
echo "## what the workers did, of all agents: longest ms, MB in all, MB/s of the one that got most"
grep -h 'event=work ' "$dir"/agent-*.log | grep -E 'work=(LOAD|WEIGHTS|FILL|VERIFY|GROUP|ALLOCATE) ' | awk '
{
    for (i = 1; i <= NF; i++) { split($i, a, "="); v[a[1]] = a[2] }
    key = sprintf("op %-3s %-9s round %s", v["op"], v["work"], v["round"])
    if (v["us"] > us[key]) us[key] = v["us"]
    if (v["bytes"] >= most[key]) { most[key] = v["bytes"]; rate[key] = v["bytes_per_s"] }
    sum[key] += v["bytes"]
    n[key]++
}
END {
    for (key in n)
        printf "%s  %2d agents or times %9.1f ms %10.1f MB %9.0f MB/s\n", key, n[key], us[key] / 1000, sum[key] / 1e6, rate[key] / 1e6
}' | sort -k2n -k3,3
