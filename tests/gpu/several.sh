#!/usr/bin/env bash
# Everything that several GPUs are needed for, in one call of under ten minutes; nothing is compiled.
#
#   tests/gpu/several.sh BUILD [OUT]     (the folder of a build, or bin of an unpacked bundle with tests; OUT: a folder)
#
# Environment: GPUS (as many as there are: 2, 4 or 8), LIMIT (570 seconds: parts that do not fit any more fail), PARTS ("scale shared deepseek floors channels beside"), LAYERS (48), BESIDE ("cuda_peer nccl throttle"),
# SMALL=1 (tries the script itself where no GPU is: host memory, small models, only scale and shared).
#
#   scale     a Qwen3-30B-A3B shaped checkpoint, one agent and engine a GPU: out, back in without the first ranks, out again;
#             every slot verified after each operation; by cuda_peer, and by nccl
#   shared    2 -> 4 -> 8 -> 6 (not the last ranks) -> 4 -> 8 with agents that share the GPUs, 8 layers
#   deepseek  DeepSeek-V3 shaped layers over all GPUs
#   floors    rounds and copies against plain operations of the same bytes in the same run (bench.sh)
#   channels  the same rounds of nccl with 4 to 32 channels
#   beside    matrix products on every GPU while weights move, by either transport, and with a throttle
#
# Prints a table of each part, and writes all figures and logs to OUT.  A part that fails does not keep the others from running.
set -u
build=$(cd "${1:?usage: several.sh BUILD [OUT]}" && pwd)
out=${2:-several}
here=$(cd "$(dirname "$0")" && pwd)
small=${SMALL:-}
gpus=${GPUS:-$("$build/eep-agent" --list-gpus 2>/dev/null | wc -l)}
parts=${PARTS:-scale shared deepseek floors channels beside}
python=${PYTHON:-python3}
failed=0
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
mkdir -p "$out"
out=$(cd "$out" && pwd)
models=$(mktemp -d "${TMPDIR:-/dev/shm}/eep-several-XXXXXX")
pids=()
clean() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null; done
    wait 2>/dev/null
    rm -rf "$models"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
[ -z "$small" ] || { export MEMORY=host; gpus=2 parts="scale shared"; }
[ "$gpus" -ge 2 ] || { echo "several.sh: $gpus GPUs here; it takes 2 or more (SMALL=1 tries the script itself)" >&2; exit 1; }

say() { printf '\n# %s (%s s)\n' "$*" "$SECONDS"; }
fail() { echo "several.sh: FAILED: $*" >&2; failed=1; }
wanted() { [[ " $parts " == *" $1 "* ]]; }
model() { # name, arguments of eep-make-checkpoint: once, into $models/name
    local name=$1
    shift
    [ -d "$models/$name" ] || timeout "$(within 200)" "$build/tests/eep-make-checkpoint" -q "$@" "$models/$name" || fail "checkpoint $name"
}
# What is left of ten minutes, at most $1 seconds; the script ends by itself, with its figures.
within() { local left=$((${LIMIT:-570} - SECONDS)); echo $((left < $1 ? (left > 1 ? left : 1) : $1)); }
real() { # name, seconds, transport, what to show; the rest from the environment
    local name=$1 limit=$2 transport=$3
    LOGS=$out/$name timeout -k 10 "$(within "$limit")" "$here/real_size.sh" "$build" "$transport" >"$out/$name.txt" 2>&1 ||
        fail "$name: see $out/$name.txt"
    grep -E "${4:-.}" "$out/$name.txt"
}
qwen=(--model qwen3-30b-a3b --layers "${LAYERS:-48}") few=(--model qwen3-30b-a3b --layers 8) deepseek=(--model deepseek-v3 --layers 6)
[ -z "$small" ] || { qwen=(--model olmoe-1b-7b --layers 1 --experts 16 --vocabulary 512) few=("${qwen[@]}"); }
case $gpus in
    2|3) steps="1 2 1:gpu0 2" ;;
    4|5|6|7) steps="1 2 4 3:gpu0 2 4" ;;
    *) steps="2 4 8 6:gpu0,gpu3 4 8" ;;
esac

if wanted scale; then
    model qwen "${qwen[@]}"
    for transport in cuda_peer nccl; do
        say "scale $steps, ${qwen[*]}, by $transport"
        CHECKPOINT=$models/qwen STEPS=$steps real "scale-$transport" 120 $transport
    done
fi
if wanted beside && [ -d "$models/qwen" ] || { wanted beside && model qwen "${qwen[@]}"; }; then
    again=$(for ((i = 0; i < 10; i++)); do printf '%s ' "$gpus" 1; done)
    for transport in ${BESIDE:-cuda_peer nccl throttle}; do
        for ((g = 0; g < gpus; g++)); do
            "$python" "$here/beside.py" load $g "$out/steps-$transport-$g.txt" 2>>"$out/beside.log" &
            pids+=($!)
        done
        sleep 12 # the products are warm, and have run alone for a while
        say "beside: $transport"
        if [ $transport = throttle ]; then # many ranks with little room: so that much has to move
            CHECKPOINT=$models/qwen STEPS=8 SLOTS=17 REBALANCE="0 0 0 2000 2000 2000 500 500" real beside-$transport 150 cuda_peer \
                '^##|moved|arrivals|FILL.*MB/s'
        else
            CHECKPOINT=$models/qwen STEPS="1 $again" real beside-$transport 110 $transport ' MB/s'
        fi
        for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null; wait "$pid" 2>/dev/null; done
        pids=()
        for ((g = 0; g < gpus; g++)); do
            files[g]=$out/steps-$transport-$g.txt logs[g]=$out/beside-$transport/agent-$g.log
            for ((a = g + gpus; a < 8; a += gpus)); do
                [ ! -e "$out/beside-$transport/agent-$a.log" ] || logs[g]+=,$out/beside-$transport/agent-$a.log
            done
        done
        "$python" "$here/beside.py" report "${files[@]}" -- "${logs[@]}" >"$out/beside-$transport.report" || fail "report of $transport"
        cat "$out/beside-$transport.report"
    done
fi
rm -rf "$models/qwen"
if wanted shared; then
    model few "${few[@]}"
    say "agents that share the GPUs, 2 4 8 6:gpu0,gpu3 4 8, ${few[*]}"
    CHECKPOINT=$models/few STEPS="2 4 8 6:gpu0,gpu3 4 8" real shared 120 cuda_peer
    rm -rf "$models/few"
fi
if wanted deepseek; then
    model deepseek "${deepseek[@]}"
    say "scale ${steps%% *} $gpus ${steps%% *}, ${deepseek[*]}"
    CHECKPOINT=$models/deepseek STEPS="${steps%% *} $gpus ${steps%% *}" real deepseek 100 auto
    rm -rf "$models/deepseek"
fi
if wanted channels; then
    say "rounds of nccl over $gpus GPUs by channels: ours, and the plain group, GB/s"
    for n in 4 8 16 24 32; do
        NCCL_MIN_NCHANNELS=$n NCCL_MAX_NCHANNELS=$n timeout "$(within 60)" "$build/tests/bench_nccl" --ranks "$((gpus < 8 ? gpus : 8))" --slots 32 --gpus \
            >"$out/channels-$n.txt" 2>&1 || fail "bench_nccl with $n channels"
        awk -v n=$n '$1 == "figure" && $2 ~ /round(\.floor|\.best)?$/ { sub(/.*\.round/, "round", $2); line = line sprintf("  %s %s", $2, $3) }
            END { printf "%3d channels%s\n", n, line }' "$out/channels-$n.txt"
    done
fi
if wanted floors; then
    say "against plain operations"
    timeout "$(within 200)" "$here/bench.sh" "$build" "$out/bench-gpu.txt" >"$out/floors.txt" 2>&1 || fail "bench.sh"
    cat "$out/floors.txt"
fi
say "all of it; figures and logs in $out"
exit $failed
