#!/usr/bin/env bash
# The measurements of tests/gpu/several.sh, small and on the stand-ins for libcuda and libnccl: every row that is expected on
# GPUs is there, one that is missing is noticed, and nothing is left behind after Ctrl-C.
#
#   tests/integration/several_gpus.sh BUILD
set -u
build=$(cd "${1:?usage: several_gpus.sh BUILD}" && pwd)
gpu=$(cd "$(dirname "$0")/../gpu" && pwd)
command -v python3 >/dev/null || { echo "there is no python3"; exit 77; }
[ -e "$build/fakecuda/libnccl.so.2" ] || { echo "this build has no nccl.h"; exit 77; }
d=$(mktemp -d /tmp/eep-several-test.XXXXXX)
trap 'rm -rf "$d"' EXIT
fail() { echo "several_gpus: $*"; exit 1; }
export SMALL=1 TMPDIR=$d/tmp
mkdir "$TMPDIR"

"$gpu/several.sh" --help | grep -q 'PARTS names some' || fail "no help"
said=$(PARTS="scale nonsense" "$gpu/several.sh" "$build" 2>&1) && fail "a part that there is not is run"
[ "$said" = "several.sh: there is no part 'nonsense'; see --help" ] || fail "of a part that there is not it says: $said"
said=$(GPUS=3 SMALL='' "$gpu/several.sh" "$build" 2>&1) && fail "three GPUs are found here"
[ "$(wc -l <<<"$said")" = 1 ] || fail "too few GPUs are not said in a sentence: $said"

"$gpu/several.sh" "$build" "$d/out" >"$d/said" 2>&1 || { cat "$d/said"; fail "exit status $?"; }
rows=$(grep -o '[0-9]* expected rows are there: passed' "$d/said") || fail "it does not count its rows"

# Each kind of row, left out.
for name in operation weights fill group plain.round plain.dense sweep.round sweep.dense chosen comm steps; do
    grep -v "\"name\": \"$name\"" "$d/out/several.jsonl" >"$d/less.jsonl"
    said=$(python3 "$gpu/several.py" check "$d/less.jsonl") && fail "nobody misses rows called $name"
    grep -q '^missing: ' <<<"$said" || fail "it does not say which rows called $name are missing"
done
sed 's/"bad_slots": 0/"bad_slots": 1/' "$d/out/several.jsonl" >"$d/less.jsonl"
! python3 "$gpu/several.py" check "$d/less.jsonl" >/dev/null || fail "slots that are not as loaded go through"

# Ctrl-C, and an end by somebody else, in the middle of an operation; INT is ignored by what runs in the background, unless...
for signal in INT TERM; do
    env --default-signal=INT "$gpu/several.sh" "$build" "$d/ended" >"$d/said" 2>&1 &
    pid=$!
    for ((i = 0; i < 300; i++)); do
        grep -q '^# scale' "$d/said" && compgen -G "$TMPDIR/eep-real-*/agent-0.log" >/dev/null && break
        sleep 0.1
    done
    kill -$signal $pid
    wait $pid
    rc=$?
    [ $rc = 130 ] || [ $rc = 143 ] || { cat "$d/said"; fail "exit status $rc after SIG$signal"; }
    [ -z "$(ls -A "$TMPDIR")" ] || fail "after SIG$signal there are $(ls "$TMPDIR")"
    for left in /proc/[0-9]*/cmdline; do
        left=$({ tr '\0' ' ' <"$left"; } 2>/dev/null) && [[ $left != *"$TMPDIR"* ]] || [ -z "$left" ] || fail "after SIG$signal there is: $left"
    done
done
echo "$rows"
