#!/usr/bin/env bash
# PyTorch over eep-coordinator's TCPStore port: the store's calls, gloo and nccl process groups (each job twice in a row),
# PyTorch's own store tests as far as they can be had, and rates against PyTorch's own server.
# Needs a built eep-coordinator and PyTorch 2.4 or newer; a GPU only for nccl.
# usage: tests/gpu/tcpstore.sh [BUILD]      PYTHON (python3), RANKS (4), BENCH=1, PYTORCH_TESTS (folder of test_store.py)
set -u
cd "$(dirname "$0")/../.."
BUILD=${1:-build} PYTHON=${PYTHON:-python3} RANKS=${RANKS:-4}
dir=$(mktemp -d)
"$BUILD/eep-coordinator" --state "$dir/state" --listen 127.0.0.1:0 --tcpstore-listen 127.0.0.1:0/job \
    --tcpstore-listen 127.0.0.1:0/suite --tcpstore-grace-ms 500 --port-file "$dir/ports" 2>"$dir/log" &
pid=$!
trap 'kill $pid 2>/dev/null; wait $pid 2>/dev/null; rm -rf "$dir"' EXIT
for _ in $(seq 100); do [ -s "$dir/ports" ] && break; sleep 0.1; done
own=$(sed -n 1p "$dir/ports") port=$(sed -n '2s/.*://p' "$dir/ports") suite=$(sed -n '3s/.*://p' "$dir/ports")
[ -n "$port" ] || { echo "eep-coordinator did not start:"; cat "$dir/log"; exit 1; }
passed=0 failed=0 skipped=0
run() {
    if "$PYTHON" tests/gpu/tcpstore.py "$@"; then passed=$((passed + 1))
    elif [ $? = 77 ]; then skipped=$((skipped + 1)); echo "skipped: $*"
    else failed=$((failed + 1)); echo "FAILED: $*"; tail -n 5 "$dir/log"; fi
}
run store 127.0.0.1 "$port"
for backend in gloo nccl; do
    for _ in first second; do # the same job, twice in a row
        sleep 1.5
        run job "$backend" "$RANKS" 127.0.0.1 "$port"
    done
done
run suite 127.0.0.1 "$suite"
[ -z "${BENCH:-}" ] || { sleep 1.5; run bench 127.0.0.1 "$port" "$BUILD/tests/bench_tcpstore" "$own"; }
grep cut-off "$dir/log"
printf '%d passed, %d failed, %d skipped\n' $passed $failed $skipped
[ $failed = 0 ]
