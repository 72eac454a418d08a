#!/usr/bin/env bash
# The PyTorch engine on a GPU (or several): right tokens while ranks come and go, then a model of real proportions.
# Needs PyTorch with CUDA and transformers 5; nothing is compiled or installed.  About 5 minutes.
#
#   tests/gpu/torch.sh BUILD [tiny|real|restart|graphs|fp8|compare ...]     (the folder of a build, or bin of an unpacked bundle with tests)
#
#   tiny     eep-demo 2 -> 4 -> 3 -> 2 with Qwen3-MoE and Mixtral in float32: every token must be the reference's
#   real     Qwen3-30B-A3B's shape in bf16: a run on 2 ranks, and one that scales 2 -> 4 -> 3 -> 2 under the same requests;
#            tokens a second as CSV, pauses, requests lost, and the tokens of both runs compared
#   restart  an engine is killed and started: how long until its weights are bound again, against loading the checkpoint
#   graphs   decoding by CUDA graphs: the tiny models as above, then the real shape: against the tokens of eager decoding while
#            maps flip (a rebalance) and ranks come and go; not run unless named
#   fp8      experts in fp8, quantised and sealed by the engines of the cold start: tokens of 2 ranks, and the same while maps flip
#            and ranks come and go; not run unless named
#   compare  the same model from 2 to 4 ranks by eep (TRANSPORTS), by a scheme that stops everything, by a restart: one table
#            (compare.py), about 5 minutes; not run unless named
#
# Environment: PYTHON (python3), EXCHANGE (nccl; gloo goes through the host), LAYERS (8), MEMORY (cuda, or host to try the
# script itself), TRANSPORT (cuda_peer), REQUESTS (240; compare: 160), TOKENS (64), TRANSPORTS (cuda_peer,nccl), COMPARE_S
# (420: the most it may take), TOTAL_S (seconds after which whatever runs is ended), CHECKPOINT (a folder that is there), OUT (a
# folder for CSV, tokens and logs).  Agents share GPUs where there are fewer than 4.
set -u
if [ -n "${TOTAL_S:-}" ]; then # signals all that runs in it
    limit=$TOTAL_S
    unset TOTAL_S
    exec timeout -k 30 "$limit" bash "$0" "$@"
fi
build=$(cd "${1:?usage: torch.sh BUILD [PART ...]}" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
parts=${*:-tiny real restart}
PYTHON=${PYTHON:-python3} memory=${MEMORY:-cuda} transport=${TRANSPORT:-cuda_peer} exchange=${EXCHANGE:-nccl}
out=${OUT:-$(mktemp -d)}
dir=$(mktemp -d "${TMPDIR:-/dev/shm}/eep-torch-XXXXXX")
mkdir -p "$out"
python=$root/agent/python
[ -d "$python" ] || python=$root/python # of a bundle
export PYTHONPATH=$python:${PYTHONPATH:-} EEP_BIN=$build NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
export EEP_COORDINATOR=unix:$dir/c.sock TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
for lib in "${EEP_LIB:-}" "$build/libeep.so" "$build/../lib/libeep.so.0"; do
    [ -n "$lib" ] && [ -e "$lib" ] && export EEP_LIB=$lib && break
done
engine=$python/examples/torch_engine
pids=() engine_pid=() engine_options=() failed=0 gpus=0 is_up=
down() { # all that was started, and what it logged: to $out/$1
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill "${pids[i]}" 2>/dev/null; done
    for ((n = 0; n < 50; n++)); do kill -0 "${pids[@]}" 2>/dev/null || break; sleep 0.1; done
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null; done
    wait "${pids[@]}" 2>/dev/null
    mkdir -p "$out/$1" && mv "$dir"/*.log "$dir"/*.trace "$out/$1" 2>/dev/null
    rm -rf "$dir/state" "$dir"/*.sock "$dir/ports"
    pids=() engine_pid=() is_up=
}
clean() {
    down logs
    rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
say() { printf '\n## %s (%s s)\n' "$*" "$SECONDS"; }
fail() { echo "torch.sh: $*" >&2; tail -n 4 "$dir"/*.log >&2; failed=1; }
start() { # log, command...
    local log=$dir/$1.log
    shift
    "$@" >>"$log" 2>&1 &
    pids+=($!)
}
"$PYTHON" -c 'import torch, transformers, sys
print("torch", torch.__version__, "transformers", transformers.__version__, torch.cuda.device_count(), "GPUs")
sys.exit(0 if torch.cuda.is_available() or sys.argv[1] == "host" else 1)' "$memory" || { echo "no PyTorch with a GPU here"; exit 77; }
shared=()
if [ "$memory" = cuda ]; then
    gpus=$("$build/eep-agent" --list-gpus | wc -l)
    [ "$gpus" -ge 4 ] || shared=(--shared-gpu)
    "$build/eep-agent" --list-gpus
else
    transport=host exchange=gloo
fi

tiny() { # name, model, engine's options...
    local name=$1 model=$2
    shift 2
    say "tiny: $name, 2 -> 4 -> 3 -> 2, float32, $exchange $*"
    EEP_ENGINE="$PYTHON $engine --dtype float32 --exchange $exchange ${shared[*]:-} $* 2>>$out/tiny-$name.log" TERM=dumb timeout 170 \
        "$build/tests/eep-demo" --model "$model" --memory "$memory" --transport "$transport" --sequence 2,4,3,2 --settle-ms 1000 \
        --step-ms 5 >"$out/tiny-$name.txt" 2>&1
    rc=$?
    if [ $rc = 0 ]; then sed -n '/^report/,$p' "$out/tiny-$name.txt"; else fail "demo $name: exit status $rc"; tail -n 30 "$out/tiny-$name.txt" "$out/tiny-$name.log"; fi
}

serve() { # i: an engine for agent i
    start "engine-$1" "$PYTHON" "$engine" --socket "$dir/e$1.sock" --exchange "$exchange" "${shared[@]}" --max-batch 8 \
        --prefill 32 --max-length 256 --attach-ms 60000 --trace "$dir/engine-$1.trace" "${engine_options[@]}"
    engine_pid[$1]=$!
}
views() { grep -c 'event=view ' "$dir/engine-$1.log"; }
engines() { "$build/eepctl" -o json agents 2>/dev/null | "$PYTHON" -c 'import json, sys; print(sum(bool(a["engine"]) for a in json.load(sys.stdin)["agents"]))'; }
await_engines() { for ((n = 0; n < 600; n++)); do [ "$(engines)" = "$1" ] && return 0; sleep 0.2; done; fail "engines did not attach"; return 1; }
checkpoint() { # sets $checkpoint
    [ -z "${checkpoint:-}" ] || return 0
    checkpoint=${CHECKPOINT:-$dir/checkpoint}
    [ -n "${CHECKPOINT:-}" ] || "$build/tests/eep-make-checkpoint" --model qwen3-30b-a3b --layers "${LAYERS:-8}" "$checkpoint" | tail -n 1
}
up() { # name, engines' options...: coordinator, 4 agents, 4 engines, 2 ranks
    [ "$is_up" != "$*" ] || return 0
    [ -z "$is_up" ] || down "logs$is_up"
    engine_options=("${@:2}")
    checkpoint
    local slots=0 weights=(--checkpoint "$checkpoint") # engines that bring their own layout: the agents read nothing
    if [ "$1" = fp8 ]; then
        weights=()
        slots=$("$build/eepctl" -o json model inspect "$checkpoint" | "$PYTHON" -c 'import json, sys; print(-(-json.load(sys.stdin)["logical_experts"] // 2))')
        engine_options+=(--checkpoint "$checkpoint")
    fi
    start coordinator "$build/eep-coordinator" --listen "$EEP_COORDINATOR" --state "$dir/state" --tcpstore-listen 127.0.0.1:0/engines \
        --port-file "$dir/ports" --drain-ms 60000 --slots "$slots"
    for ((n = 0; n < 100; n++)); do "$build/eepctl" status >/dev/null 2>&1 && break; sleep 0.1; done
    EEP_TCPSTORE=$(sed -n 2p "$dir/ports" | sed 's|/.*||') && export EEP_TCPSTORE
    for i in 0 1 2 3; do
        where=(--memory "$memory" --transport "$transport")
        [ "$memory" != cuda ] || where=(--memory "cuda:$((i % gpus))" --transport "$transport" "${shared[@]}")
        start "agent-$i" "$build/eep-agent" --id "gpu$i" --coordinator "$EEP_COORDINATOR" --engine-socket "$dir/e$i.sock" \
            "${weights[@]}" "${where[@]}"
        serve "$i"
    done
    is_up=$*
    await_engines 4 && "$build/eepctl" scale --to 2 --timeout 120 || { fail "cold start"; down logs-failed; return 1; }
}
load() { # name, more...
    local name=$1
    shift
    "$PYTHON" "$engine/load.py" --ctl "$build/eepctl -c $EEP_COORDINATOR" --requests "${REQUESTS:-240}" --concurrency 16 --prompt 32 \
        --max-tokens "${TOKENS:-64}" --limit 110 --csv "$out/$name.csv" --tokens "$out/$name.json" "$@"
}

real() {
    say "real: Qwen3-30B-A3B's shape, ${LAYERS:-8} layers, bf16, $exchange"
    up eager || return
    load warm --requests 16 --max-tokens 16 >/dev/null
    say "2 ranks, not scaled"
    unscaled || return
    say "the same requests, 2 -> 4 -> 3 -> 2"
    load scaled --compare "$out/unscaled.json" >"$out/scaled.txt" 2>&1 &
    local pid=$!
    for n in 4 3 2; do
        sleep "${SETTLE:-3}"
        echo "$(date +%s.%N) scale --to $n" >>"$out/events.txt"
        "$build/eepctl" scale --to "$n" --timeout 100 || fail "scale --to $n"
        echo "$(date +%s.%N) $n ranks" >>"$out/events.txt"
    done
    wait $pid || failed=1
    cat "$out/scaled.txt"
    "$build/eepctl" verify || fail "verify"
    echo "flips as the engines saw them (held_us: the pause; switch_us: taking the prepared group):"
    grep -h 'event=view ' "$dir"/engine-*.log | sed 's/.*event=view //' | sort -t= -k2n
}

restart() {
    say "restart: an engine with its weights resident"
    up eager || return
    i=$("$build/eepctl" -o json status | "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["view"]["members"][-1]["id"][3:])')
    before=$(views "$i")
    begin=$(date +%s%N)
    kill -9 "${engine_pid[$i]}"
    serve "$i"
    for ((n = 0; n < 600; n++)); do [ "$(views "$i")" = "$before" ] || break; sleep 0.1; done
    load restarted --requests 4 --max-tokens 2 --concurrency 4
    echo "kill -9 to four requests answered: $((($(date +%s%N) - begin) / 1000000)) ms; of it binding the weights:"
    grep -h 'event=bound' "$dir/engine-$i.log" | tail -n 1 | sed 's/.*event=bound //'
    "$PYTHON" - "$checkpoint" "$memory" <<'PY'
import sys, time
import torch
from transformers import AutoModelForCausalLM
begin = time.time()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to("cuda" if sys.argv[2] == "cuda" else "cpu")
if sys.argv[2] == "cuda":
    torch.cuda.synchronize()
print(f"transformers' from_pretrained of the same checkpoint (all experts, from the page cache): {time.time() - begin:.2f} s")
PY
}

changes() { # name, run whose tokens it must have: ranks come and go and experts are placed anew
    local name=$1
    load "$name" --compare "$out/$2.json" >"$out/$name.txt" 2>&1 &
    local pid=$!
    for what in "scale --to 4" rebalance "scale --to 3" "scale --to 2"; do
        sleep "${SETTLE:-3}"
        echo "$name: $what"
        # shellcheck disable=SC2086
        timeout 100 "$build/eepctl" $what || fail "$name: $what"
    done
    wait $pid || fail "$name: requests lost, or tokens changed"
    cat "$out/$name.txt"
}
unscaled() { # what eager decoding on 2 ranks gives, once
    [ ! -e "$out/unscaled.json" ] || return 0
    up eager && load warm --requests 16 --max-tokens 16 >/dev/null && load unscaled || { fail "the unscaled run"; return 1; }
}
graphs() {
    tiny qwen3-moe-graphs "$root/tests/data/qwen3-moe-tiny" --graphs
    tiny mixtral-graphs "$root/tests/data/mixtral-tiny" --graphs
    say "graphs: Qwen3-30B-A3B's shape, ${LAYERS:-8} layers, bf16, $exchange"
    unscaled || return
    up graphs --graphs || return
    load warm --requests 16 --max-tokens 16 >/dev/null
    say "graphs: 2 ranks, not scaled, against eager decoding"
    load graphs-unscaled --compare "$out/unscaled.json" || fail "graphs against eager decoding"
    say "graphs: the same requests, 2 -> 4, rebalance, 4 -> 3 -> 2"
    changes graphs-scaled unscaled
    grep -h 'event=prepared .*graph=True' "$dir"/engine-*.log | sed 's/.*event=/  /'
    grep -hq 'event=map ' "$dir"/engine-*.log || fail "graphs: no map changed under a graph"
    echo "maps changed under a graph: $(grep -hc 'event=map ' "$dir"/engine-*.log | paste -sd+ | sed 's/.*/echo $((&))/' | sh) times"
    grep -h 'event=view ' "$dir"/engine-*.log | sed 's/.*event=view //' | sort -t= -k2n
}

fp8() {
    say "fp8: Qwen3-30B-A3B's shape, ${LAYERS:-8} layers, experts in fp8, $exchange"
    up fp8 --layout fp8 || return
    load warm --requests 16 --max-tokens 16 >/dev/null
    load fp8-unscaled || fail "fp8, not scaled"
    say "fp8: the same requests, 2 -> 4, rebalance, 4 -> 3 -> 2"
    changes fp8-scaled fp8-unscaled
    "$build/eepctl" verify || fail "verify"
    grep -h 'event=sealed' "$dir"/engine-*.log | sed 's/.*event=/  /'
    [ "$(cat "$dir"/engine-*.log | grep -c 'event=sealed')" = 2 ] || fail "fp8: not the two engines of the cold start alone have quantised"
}

compare() {
    say "compare: 2 -> 4 ranks, Qwen3-30B-A3B's shape, ${LAYERS:-8} layers"
    checkpoint
    local transports=host
    [ "$memory" != cuda ] || transports=${TRANSPORTS:-cuda_peer,nccl}
    timeout -k 30 "${COMPARE_S:-420}" "$PYTHON" "$here/compare.py" --bin "$build" --checkpoint "$checkpoint" --out "$out/compare" \
        --memory "$memory" --transports "$transports" --requests "${REQUESTS:-160}" --max-tokens "${TOKENS:-64}" ${COMPARE:-} ||
        fail "compare: exit status $?"
}

for part in $parts; do
    case $part in
    tiny) tiny qwen3-moe "$root/tests/data/qwen3-moe-tiny"; tiny mixtral "$root/tests/data/mixtral-tiny" ;;
    real | restart | graphs | fp8 | compare) $part ;;
    *) echo "torch.sh: no part is called '$part'" >&2; exit 2 ;;
    esac
done
echo
echo "CSV, tokens, logs: $out"
[ $failed = 0 ] && echo good || echo "NOT GOOD"
exit $failed
