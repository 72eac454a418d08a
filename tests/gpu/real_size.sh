#!/usr/bin/env bash
# Scaling a checkpoint of real size with the real daemons, every slot verified after each operation; nothing is compiled.
#
#   tests/gpu/real_size.sh BUILD [TRANSPORT]     (the folder of a build, or bin of an unpacked bundle with tests)
#
# Environment: MODEL (arguments of eep-make-checkpoint: --model qwen3-30b-a3b --layers 16), CHECKPOINT (a folder that is
# there, instead), STEPS ("2 4 3 2 4"; "3:gpu0,gpu2" names who leaves; each rank has the slots that the fewest ranks need,
# or SLOTS), REBALANCE (MiB/s, such as "0 2000", 0 = no limit: after the steps, so often under a load that changes), MEMORY
# (cuda), LOGS (a folder for the agents' logs, and of each operation step-N.json: what was asked for and GPU memory, op-N.json
# and plan-N.json: what eepctl says of it and of its bounds, verify-N.json).  TRANSPORT: auto, cuda_peer or nccl.  Agent i uses GPU i modulo their
# number.  The engines attach and answer, but have no requests: nobody knows the right tokens of random weights.  Prints
# what each operation took, moved, and its bounds; what loading and each round of moves reached; GPU memory at its highest.
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
    [ -z "${LOGS:-}" ] || { mkdir -p "$LOGS" && cp "$dir"/*.log "$dir"/*.json "$LOGS" 2>/dev/null; }
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
# The highest of every GPU since the line $1 of the watch.
gpu_peak() {
    tail -n +"$1" "$dir/memory" 2>/dev/null | awk -F', ' '{ if ($2 > m[$1]) m[$1] = $2; if ($1 >= n) n = $1 + 1 }
        END { for (i = 0; i < n; i++) printf "%s%s", m[i], i + 1 < n ? " " : "" }'
}
lines() { wc -l <"$dir/memory"; }

checkpoint=${CHECKPOINT:-}
if [ -z "$checkpoint" ]; then
    checkpoint=$dir/checkpoint
    # shellcheck disable=SC2086 # several words
    "$build/tests/eep-make-checkpoint" ${MODEL:---model qwen3-30b-a3b --layers 16} "$checkpoint" | tail -n 1 || exit 1
fi
counts=$(printf '%s\n' $steps | sed 's/:.*//' | sort -n)
most=$(tail -n 1 <<<"$counts")
least=$(head -n 1 <<<"$counts")
first=${steps%% *}
gpus=1
[ "$memory" != cuda ] || gpus=$("$build/eep-agent" --list-gpus | wc -l)
[ "$gpus" -gt 0 ] || fail "no GPU here"
start coordinator "$build/eep-coordinator" --listen "$EEP_COORDINATOR" --state "$dir/state" --min-ranks "$least" \
    --slots "${SLOTS:-0}" --load-window-ms 200 --load-horizon-ms 2000 --load-samples 2
: >"$dir/memory"
[ "$memory" != cuda ] ||
    start watch sh -c "exec nvidia-smi --query-gpu=index,memory.used --format=csv,noheader,nounits -lms 50 >$dir/memory"
for ((i = 0; i < 100; i++)); do "$build/eepctl" status >"$dir/out" 2>&1 && break || sleep 0.1; done
for ((i = 0; i < most; i++)); do
    where=(--memory "$memory")
    [ "$memory" != cuda ] || where=(--memory "cuda:$((i % gpus))" --transport "$transport")
    [ "$memory" != cuda ] || [ "$most" -le "$gpus" ] || where+=(--shared-gpu)
    [ "$i" -ge "$first" ] || where+=(--checkpoint "$checkpoint")
    start "agent-$i" "$build/eep-agent" --id "gpu$i" --coordinator "$EEP_COORDINATOR" --engine-socket "$dir/e$i.sock" "${where[@]}"
    start "engine-$i" "$build/tests/eep-idle-engine" "$dir/e$i.sock" ${REBALANCE:+4}
done
# What was asked for, of operation $k; further pairs of JSON as arguments.
step_note() {
    local IFS=,
    "$build/eepctl" -o json watch >"$dir/op-$k.json"
    printf '{"index": %d, "from": %d, "to": %d, "took_ms": %d%s}\n' "$k" "$from" "$n" "$took" "${*:+, $*}" >"$dir/step-$k.json"
}
k=0 from=0
echo "$gpus GPUs, $most agents, $memory, $transport; GPU memory in use before, MiB: $(gpu_memory)"
for step in $steps; do
    n=${step%%:*}
    leave=()
    [ "$n" = "$step" ] || for a in $(tr , ' ' <<<"${step#*:}"); do leave+=(--remove "$a"); done
    [ "$from" = 0 ] || "$build/eepctl" -o json scale --to "$n" "${leave[@]}" --wait-for-agents=60 --dry-run >"$dir/plan-$k.json"
    line=$(($(lines) + 1))
    begin=$(date +%s%N)
    "$build/eepctl" scale --to "$n" "${leave[@]}" --wait-for-agents=60 --timeout 300 >"$dir/out" 2>&1 || { cat "$dir/out"; fail "scale --to $n failed"; }
    took=$((($(date +%s%N) - begin) / 1000000))
    verify=$(date +%s%N)
    "$build/eepctl" -o json verify >"$dir/verify-$k.json" 2>"$dir/verified" || { cat "$dir/verif"*; fail "verify failed"; }
    verify=$((($(date +%s%N) - verify) / 1000000))
    echo
    echo "## scale --to $n ${leave[*]}: $took ms; verify: $verify ms, $(sed -n 's/.*"text": "\(.*\)".*/\1/p' "$dir/verify-$k.json")"
    echo "GPU memory, MiB: $(gpu_memory) now, $(gpu_peak "$line") at its highest"
    tail -n 6 "$dir/out"
    step_note "\"leave\": \"${step#"$n"}\"" "\"verify_ms\": $verify" "\"peak_mib\": \"$(gpu_peak "$line")\""
    from=$n k=$((k + 1))
done
for limit in ${REBALANCE:-}; do
    sleep 5 # another popularity, and windows of it
    "$build/eepctl" -o json rebalance --dry-run >"$dir/plan-$k.json"
    line=$(($(lines) + 1))
    begin=$(date +%s%N)
    throttle=()
    [ "$limit" = 0 ] || throttle=(--bandwidth "$limit")
    "$build/eepctl" rebalance "${throttle[@]}" --timeout 120 >"$dir/out" 2>&1 || { cat "$dir/out"; fail "rebalance failed"; }
    took=$((($(date +%s%N) - begin) / 1000000))
    echo
    echo "## rebalance --bandwidth $limit: $took ms"
    tail -n 6 "$dir/out"
    step_note "\"limit_mib_s\": $limit" "\"peak_mib\": \"$(gpu_peak "$line")\""
    k=$((k + 1))
done
[ -z "${REBALANCE:-}" ] || "$build/eepctl" verify | tail -n 1
"$build/eepctl" -o json history >"$dir/history.log" # bounds, balances and phases of all of them
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
