#!/usr/bin/env bash
# Everything that several GPUs are needed for, in one call of under ten minutes; nothing is compiled.  `--help` shows this.
#
#   tests/gpu/several.sh BUILD [OUT]     (the folder of a build, or bin of an unpacked bundle with tests; OUT: a folder)
#
# Parts (PARTS names some of them), one agent and engine a GPU:
#   scale     a Qwen3-30B-A3B shaped checkpoint 2 -> 4 -> 8 -> 6 (not the last ranks) -> 4 -> 8, by cuda_peer and by nccl; on
#             fewer GPUs 1 -> 2 -> 4 -> 3 (not the first) -> 2 -> 4, or 1 -> 2 -> 1 (not the first) -> 2; every slot is verified after each
#   shared    2 -> 4 -> 8 -> 6 -> 4 -> 8 with agents that share the GPUs, 8 layers (where there are fewer than 8 GPUs)
#   deepseek  DeepSeek-V3 shaped layers over all GPUs, and back
#   plain     for the shapes and bytes of all these operations: plain groups of ncclSend and ncclRecv (of 4.5 MiB each, the mean of
#             an expert's parts, 1024 a group), ncclBroadcast, and plain copies, beside the transports alone.  Wants one of the parts before; otherwise half of the GPUs to the others
#   sweep     channels of NCCL; groupings of both transports; the best is chosen and set beside what agents use
#   comm      communicators made, warmed, ended, by the number of ranks (more than GPUs: they share)
#   beside    matrix products on every GPU while weights move by cuda_peer, by nccl, and with a throttle (python3 with PyTorch)
#
# Environment: GPUS (those there are: 1, shared by all agents, 2, 4 or 8), LIMIT (570 seconds: parts that do not fit any more
# fail), LAYERS (48; on one GPU 8), PYTHON (python3), SMALL=1 (the script itself, on the stand-ins of tests/fakecuda and
# tests/fakenccl with small models, in less than two minutes: `make fakecuda` builds them; OUT is not kept unless it is named).
#
# Prints a table.  OUT/several.jsonl has all figures, an object a line, with "name", "part", "transport", "ranks", "bytes" and
# "seconds" wherever they make sense; OUT also the logs.  Bytes are those that the rank gets that gets most, "gbps" 10^9 of them a
# second.
#   run          what was run, on what (first line; `several.py check` tells by it which rows have to be there)
#   operation    ranks_from, ranks, leave, bytes (moved, all ranks), bytes_needed and bytes_hard (the bounds), balance_before, _after,
#                _ceiling, pause_seconds (of the engine held longest), commit_seconds, phases, peak_mib (a number a GPU), verified_slots,
#                bad_slots; of a rebalance limit_mib_s (0: none)
#   weights, fill, group   of an operation's work: round, senders, seconds, gbps, and ratio_group, ratio_copies: how long plain
#                groups, or copies, of the same bytes need, by what it took; ratio_wire: of 370 GB/s
#   plain.round, plain.dense   a transport alone: seconds (median), best_seconds, gbps; plain_seconds, plain_gbps, ratio_plain
#   sweep.round, sweep.dense   the same with group_ops, group_bytes, op_bytes, in_flight, chunk_bytes or streams, batched; default
#   chosen       the best of a sweep ("of"), if it is 2 % faster than what agents use; default_gbps and ratio_default beside it;
#                default: nothing is, they stay
#   comm         made_and_warmed_seconds, again_seconds, left_seconds, closed_seconds; plain: made_, warmed_, exchanged_, ended_seconds
#   steps        gpu, beside ("alone", "sending", "receiving", and the limit if there is one), by, steps, median_ms, p99_ms
# A part that fails, or a row that is missing, makes the exit status 1 and does not keep the others from running.
set -u
case ${1:-} in
    -h | --help) sed -n '2,/^set -u/{ /^set -u/d; s/^# \{0,1\}//p }' "$0"; exit 0 ;;
    '' | -*) echo "usage: several.sh BUILD [OUT], or --help" >&2; exit 2 ;;
esac
build=$(cd "$1" && pwd) || exit 2
out=${2:-several}
here=$(cd "$(dirname "$0")" && pwd)
small=${SMALL:-}
python=${PYTHON:-python3}
parts=${PARTS:-scale shared deepseek plain sweep comm beside}
failed=0
for part in $parts; do
    case $part in
        scale | shared | deepseek | plain | sweep | comm | beside) ;;
        *) echo "several.sh: there is no part '$part'; see --help" >&2; exit 2 ;;
    esac
done
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
if [ -n "$small" ]; then
    [ -e "$build/fakecuda/libnccl.so.2" ] || { echo "several.sh: SMALL=1 needs $build/fakecuda, which make fakecuda builds where CUDA's and NCCL's headers are" >&2; exit 77; }
    export LD_LIBRARY_PATH=$build/fakecuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} FAKECUDA_GPUS=${GPUS:-2} FAKECUDA_STATE=several$$
    export PATH=$here/../fakecuda:$PATH EEP_BIN=$build
fi
there=$("$build/eep-agent" --list-gpus 2>/dev/null | wc -l)
gpus=${GPUS:-$there}
if [ "$there" -lt 1 ] || [ "$gpus" -lt 1 ] || [ "$gpus" -gt "$there" ]; then
    echo "several.sh: $there GPUs here, ${GPUS:-1 or more} wanted: run it where they are, or with SMALL=1 to try the script itself" >&2
    exit 1
fi
[ "$gpus" -ge "$there" ] || export CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))
models=$(mktemp -d "${TMPDIR:-/dev/shm}/eep-several-XXXXXX") || exit 1
[ -z "$small" ] || out=${2:-$models/out}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
raw=$out/several.jsonl
declare -A pids=()
clean() {
    trap '' INT TERM
    for pid in "${!pids[@]}"; do kill "$pid" 2>/dev/null; done
    wait 2>/dev/null
    rm -rf "$models"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n# %s (%s s)\n' "$*" "$SECONDS"; }
fail() { echo "several.sh: FAILED: $*" >&2; failed=1; }
wanted() { [[ " $parts " == *" $1 "* ]]; }
several() { "$python" "$here/several.py" "$@"; }
# A command for at most $1 seconds, and not longer than what is left of all; in the background, so that Ctrl-C ends it.
limited() {
    local left=$((${LIMIT:-570} - SECONDS)) limit=$1 pid rc
    shift
    [ "$left" -gt 1 ] || left=1
    timeout -k 10 $((left < limit ? left : limit)) "$@" &
    pid=$!
    pids[$pid]=1
    wait "$pid"
    rc=$?
    unset "pids[$pid]"
    return $rc
}
model() { # name, arguments of eep-make-checkpoint: once, into $models/name
    local name=$1
    shift
    [ -d "$models/$name" ] || limited 200 "$build/tests/eep-make-checkpoint" -q "$@" "$models/$name" || fail "checkpoint $name"
}
# part, what it is called in the figures, seconds, transport; the rest from the environment
real() {
    local part=$1 by=$2 limit=$3 transport=$4 folder=$out/$1-$2
    rm -rf "$folder"
    LOGS=$folder limited "$limit" "$here/real_size.sh" "$build" "$transport" >"$folder.txt" 2>&1 || fail "$part by $by: see $folder.txt"
    grep -E '^## (scale|rebalance)|pause' "$folder.txt"
    several operations "$raw" "$folder" part="$part" transport="$transport" by="$by" gpus="$gpus" || fail "figures of $part by $by"
}
# part, name of its log, seconds, arguments of bench_several
bench() {
    local part=$1 log=$out/$2 limit=$3
    shift 3
    limited "$limit" "$build/tests/bench_several" "$@" >"$log.jsonl" 2>"$log.err" || fail "bench_several $*: $(tail -n 1 "$log.err")"
    several add "$raw" part="$part" <"$log.jsonl" || fail "figures of bench_several $*"
}

steps="2 4 8 6:gpu0,gpu3 4 8" shared=$steps
case $gpus in
    1) steps="1 2 4 3:gpu0 2 4" ;;
    2 | 3) steps="1 2 1:gpu0 2" ;;
    4 | 5 | 6 | 7) steps="1 2 4 3:gpu0 2 4" ;;
    *) parts=" $parts " parts=${parts/ shared / } ;; # it is the same as scale
esac
most=$((gpus > 1 ? gpus : 2)) ranks="1 2 4 8"
deep="1 $most 1"
[ "$gpus" -lt 8 ] || deep="$((gpus / 2)) $most $((gpus / 2))"
qwen=(--model qwen3-30b-a3b --layers "${LAYERS:-$((gpus > 1 ? 48 : 8))}") few=(--model qwen3-30b-a3b --layers 8) deepseek=(--model deepseek-v3 --layers $((gpus > 1 ? 6 : 4)))
channels="4 8 16 24 32" moved=(--slots 256 --dense-bytes 1073741824)
again=$(for ((i = 0; i < 8; i++)); do printf '%s ' "$most" 1; done)
throttle=(STEPS=8 SLOTS=17 "REBALANCE=0 0 2000 2000 500")
warm=12
[ "$gpus" -gt 1 ] || again="2 1 2"
[ "$gpus" -gt 1 ] || moved=(--slots 8 --dense-bytes 67108864 --rounds 3) # NCCL goes over sockets between ranks of a GPU
if [ -n "$small" ]; then
    qwen=(--model olmoe-1b-7b --layers 1 --experts 16 --vocabulary 512) few=("${qwen[@]}")
    deepseek=(--model deepseek-v3 --layers 1 --dense-layers 0 --experts 8 --vocabulary 512)
    channels="4 8" moved=(--slots 8 --slot-bytes 98304 --dense-bytes 2097152 --rounds 2) warm=1 shared="2 4 3:gpu0 4" ranks="1 2 4"
    again="$most 1 $most" throttle=("STEPS=$((gpus > 4 ? gpus : 4))" SLOTS=5 "REBALANCE=0 60")
fi
[ "$gpus" -gt 1 ] || throttle=(STEPS=4 SLOTS=33 "REBALANCE=0 0 2000 500")
[ "$gpus" -gt 1 ] || [ -z "$small" ] || throttle=("STEPS=$((gpus > 4 ? gpus : 4))" SLOTS=5 "REBALANCE=0 60")

: >"$raw"
several add "$raw" name=run gpus="$gpus" parts="$parts" device="\"$("$build/eep-agent" --list-gpus | head -n 1 | tr -d '"\\')\"" small="${small:-0}" \
    steps_scale="\"$steps\"" by_scale="cuda_peer nccl" steps_shared="\"$shared\"" by_shared=cuda_peer \
    steps_deepseek="\"$deep\"" by_deepseek=auto channels="\"$channels\"" comm="\"$ranks\"" beside="cuda_peer nccl throttle" <<<'{}' || exit 1

if wanted scale || wanted beside; then
    say "writing ${qwen[*]}"
    model qwen "${qwen[@]}"
fi
if wanted scale; then
    for transport in cuda_peer nccl; do
        say "scale $steps by $transport"
        CHECKPOINT=$models/qwen STEPS=$steps real scale $transport 120 $transport
    done
fi
if wanted beside && [ -z "$small" ] && ! "$python" -c 'import torch' 2>/dev/null; then
    fail "beside: $python has no PyTorch (PYTHON names another)"
elif wanted beside; then
    for by in cuda_peer nccl throttle; do
        load=() files=() logs=()
        for ((g = 0; g < gpus; g++)); do
            files[g]=$out/steps-$by-$g.txt
            "$python" "$here/beside.py" load "$([ -n "$small" ] && echo cpu || echo $g)" "${files[g]}" 2>>"$out/beside.log" &
            load+=($!) pids[$!]=1
        done
        limited 60 sleep $warm # the products are warm, and have run alone for a while
        say "beside: $by"
        if [ $by = throttle ]; then # many ranks with little room: so that much has to move
            export "${throttle[@]}"
            CHECKPOINT=$models/qwen real beside $by 120 cuda_peer
            unset STEPS SLOTS REBALANCE
        else
            CHECKPOINT=$models/qwen STEPS="1 $again" real beside $by 100 $by
        fi
        for pid in "${load[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; unset "pids[$pid]"; done
        for ((g = 0; g < gpus; g++)); do
            for ((a = g; a < 8; a += gpus)); do
                [ ! -e "$out/beside-$by/agent-$a.log" ] || logs[g]=${logs[g]:+${logs[g]},}$out/beside-$by/agent-$a.log
            done
        done
        "$python" "$here/beside.py" report "${files[@]}" -- "${logs[@]}" >"$out/beside-$by.jsonl" || fail "steps beside $by"
        several add "$raw" part=beside by=$by <"$out/beside-$by.jsonl" || fail "figures of steps beside $by"
    done
fi
rm -rf "$models/qwen"
if wanted shared; then
    say "agents that share the GPUs: scale $shared, ${few[*]}"
    model few "${few[@]}"
    CHECKPOINT=$models/few STEPS=$shared real shared cuda_peer 120 cuda_peer
    rm -rf "$models/few"
fi
if wanted deepseek; then
    say "scale $deep, ${deepseek[*]}"
    model deepseek "${deepseek[@]}"
    CHECKPOINT=$models/deepseek STEPS=$deep real deepseek auto 100 auto
    rm -rf "$models/deepseek"
fi
if wanted plain; then
    say "the same bytes by plain operations"
    bench plain plain-half 60 measure --ranks $most "${moved[@]}"
    while read -r n senders slots slot dense; do
        rounds=5
        # over sockets between ranks of one GPU a GB takes a second: fewer bytes will do for the bandwidth
        [ "$n" -le "$gpus" ] || { slots=$((slots > 8 ? 8 : slots)) dense=$((dense > 67108864 ? 67108864 : dense)) rounds=3; }
        [ -z "$small" ] || slots=2 dense=4194304 rounds=2
        bench plain "plain-$n-$senders-$slots" 60 measure --ranks "$n" --senders "$senders" --slots "$slots" --slot-bytes "$slot" \
            --dense-bytes "$dense" --rounds $rounds
    done < <(several shapes "$raw" 8)
fi
if wanted sweep; then
    say "channels of NCCL: $channels; then groupings"
    bench channels channels-own 60 measure --ranks $most "${moved[@]}"
    for n in $channels; do
        NCCL_MIN_NCHANNELS=$n NCCL_MAX_NCHANNELS=$n bench channels "channels-$n" 60 measure --ranks $most "${moved[@]}"
    done
    bench sweep sweep 120 sweep --ranks $most "${moved[@]}"
fi
if wanted comm; then
    say "communicators of $ranks ranks"
    for n in $ranks; do
        bench comm "comm-$n" 40 comm --ranks "$n" --slots 1 --dense-bytes 1048576
    done
fi
several ratios "$raw" || fail "ratios"
several table "$raw" | tee "$out/table.txt"
several check "$raw" || fail "rows are missing"
say "all of it; figures and logs in $out, all raw figures in $raw"
exit $failed
