#!/usr/bin/env bash
# How long a view is without experts after two of four ranks are gone, by where their last copies come from; nothing is
# compiled, and it needs no GPU (MEMORY=host).
#
#   tests/gpu/lost.sh BUILD      (the folder of a build, or bin of an unpacked bundle with tests)
#
#   hold    killed with their agents; engines are held until the checkpoint has been read
#   mask    the same with --on-lost-experts mask: served without these experts until then
#   memory  one is killed with its agent, of the other the engine alone: out of its agent's memory
#   lent    hold, where the rank with room has no checkpoint: it reads another agent's
#
# Environment: MODEL (arguments of eep-make-checkpoint: --model qwen3-30b-a3b --layers 8), CHECKPOINT (a folder that is there,
# instead), MEMORY (cuda), CASES ("hold mask memory lent"), TIMES (3).  Every slot is verified at the end.  Engines answer
# and have no requests.  Prints for each case, in ms after the kill: the view serves again, and has every expert again.
set -u

build=$(cd "${1:?usage: lost.sh BUILD}" && pwd)
memory=${MEMORY:-cuda}
dir=$(mktemp -d "${TMPDIR:-/dev/shm}/eep-lost-XXXXXX")
pids=() agents=() engines=()
export EEP_COORDINATOR=unix:$dir/c.sock

stop() {
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2>/dev/null; done
    sleep 0.5
    for pid in ${pids[@]+"${pids[@]}"}; do kill -9 "$pid" 2>/dev/null; done
    wait 2>/dev/null
    pids=() agents=() engines=()
}
trap 'stop; [ -n "${KEEP:-}" ] || rm -rf "$dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
fail() { echo "lost.sh: $*" >&2; tail -n 5 "$dir"/*.log >&2; exit 1; }
now() { echo $(($(date +%s%N) / 1000000)); }

checkpoint=${CHECKPOINT:-}
if [ -z "$checkpoint" ]; then
    checkpoint=$dir/checkpoint
    # shellcheck disable=SC2086 # several words
    "$build/tests/eep-make-checkpoint" ${MODEL:---model qwen3-30b-a3b --layers 8} "$checkpoint" | tail -n 1 || exit 1
fi
gpus=1
[ "$memory" != cuda ] || gpus=$("$build/eep-agent" --list-gpus | wc -l)

start() { # case: four ranks, whose slots hold every expert twice
    local i policy=hold
    [ "$1" != mask ] || policy=mask
    "$build/eep-coordinator" --listen "$EEP_COORDINATOR" --state "$dir/state" --lease-ms 1000 --reload-after-ms 100 \
        --on-lost-experts "$policy" >"$dir/coordinator.log" 2>&1 &
    pids+=($!)
    for ((i = 0; i < 100; i++)); do "$build/eepctl" status >/dev/null 2>&1 && break || sleep 0.1; done
    for ((i = 0; i < 4; i++)); do
        local where=(--memory "$memory")
        [ "$memory" != cuda ] || where=(--memory "cuda:$((i % gpus))")
        [ "$memory" != cuda ] || [ "$gpus" -ge 4 ] || where+=(--shared-gpu)
        [ "$1" = lent ] && [ "$i" -ge 2 ] || where+=(--checkpoint "$checkpoint")
        "$build/eep-agent" --id "gpu$i" --coordinator "$EEP_COORDINATOR" --engine-socket "$dir/e$i.sock" "${where[@]}" \
            >"$dir/agent-$i.log" 2>&1 &
        pids+=($!) agents+=($!)
        "$build/tests/eep-idle-engine" "$dir/e$i.sock" >"$dir/engine-$i.log" 2>&1 &
        pids+=($!) engines+=($!)
    done
    for n in 2 4; do
        "$build/eepctl" scale --to $n --wait-for-agents=60 --timeout 300 >"$dir/out" 2>&1 || { cat "$dir/out"; fail "scale --to $n failed"; }
    done
}

once() { # case
    local began serving="" whole="" status
    start "$1"
    kill -STOP "${agents[1]}" # both are seen to be gone at once
    kill -9 "${agents[3]}" "${engines[3]}" "${engines[1]}"
    if [ "$1" = memory ]; then kill -CONT "${agents[1]}"; else kill -9 "${agents[1]}"; fi
    began=$(now)
    while [ -z "$whole" ]; do
        [ $(($(now) - began)) -lt ${LIMIT:-120000} ] || fail "not whole after 120 s: $status"
        status=$("$build/eepctl" status 2>&1)
        grep -q '2 ranks,' <<<"$status" || continue
        [ -n "$serving" ] || { grep -q 'degraded' <<<"$status" && ! grep -q masked <<<"$status"; } || serving=$(($(now) - began))
        grep -q degraded <<<"$status" || whole=$(($(now) - began))
    done
    "$build/eepctl" verify >"$dir/verified" 2>&1 || { cat "$dir/verified"; fail "verify failed"; }
    # the last word on what was read, and from where
    read -r experts where <<<"$(sed -nE 's/.*what="(.*reads )?([0-9]+) (masked )?experts (are read )?again ([a-z ]+)[",].*/\2 \5/p' "$dir/coordinator.log" | tail -n 1)"
    printf '%-7s %7d %7d   %s experts, %s\n' "$1" "$serving" "$whole" "$experts" "$where"
    stop
    rm -rf "$dir/state"
}

printf '%-7s %7s %7s   ms after the kill; lease 1000 ms, %s memory, %d GPUs\n' case serving whole "$memory" "$gpus"
for case in ${CASES:-hold mask memory lent}; do
    for ((k = 0; k < ${TIMES:-3}; k++)); do once "$case"; done
done
