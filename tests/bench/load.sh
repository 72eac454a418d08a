#!/bin/sh
# make bench-load: how fast a checkpoint loads, beside plain reads of the same files.
#
#   tests/bench/load.sh build/tests
#
# BENCH_LOAD_DIR: a checkpoint that is there; without it one is made in BENCH_LOAD_TMP (/dev/shm) with BENCH_LOAD_MODEL
# (layers and experts of Qwen3-30B-A3B), and removed at the end.  BENCH_LOAD_MEMORY: host (default) or cuda.
set -eu

tests=${1:?usage: load.sh FOLDER (of bench_load and eep-make-checkpoint)}
model=${BENCH_LOAD_MODEL:---model qwen3-30b-a3b --layers 4 --experts 64}
dir=${BENCH_LOAD_DIR:-}
made=
trap '[ -z "$made" ] || rm -rf "$made"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -z "$dir" ]; then
    made=$(mktemp -d "${BENCH_LOAD_TMP:-/dev/shm}/eep-load-XXXXXX")
    dir=$made/checkpoint
    # shellcheck disable=SC2086 # several words
    "$tests/eep-make-checkpoint" $model "$dir"
fi
echo "$(nproc) cores, $(uname -sr), $(date -u '+%Y-%m-%d %H:%M UTC'), load average $(cut -d' ' -f1 /proc/loadavg)"
"$tests/bench_load" --memory "${BENCH_LOAD_MEMORY:-host}" --runs "${BENCH_LOAD_RUNS:-5}" "$dir"
# The same bytes through dd, from the page cache as above.
began=$(date +%s%N)
bytes=0
for file in "$dir"/*.safetensors; do
    dd if="$file" of=/dev/null bs=4M 2>/dev/null
    bytes=$((bytes + $(stat -L -c %s "$file")))
done
ended=$(date +%s%N)
echo "dd of the same files, once: $(echo "$bytes $began $ended" | awk '{printf "%.2f GB/s", $1 / ($3 - $2)}')"
