#!/usr/bin/env bash
# PyTorch over eep-coordinator's TCPStore port: the store's calls (tests/python/test_tcpstore.py), gloo and nccl process groups
# (each job twice in a row), PyTorch's own store tests where they can be had, and rates against PyTorch's own server.
# Needs a built eep-coordinator and PyTorch 2.4 or newer; a GPU only for nccl.
# usage: tests/gpu/tcpstore.sh [BUILD]      PYTHON (python3), RANKS (4), BENCH=1, TORCH_TESTS (PyTorch's test_store.py)
set -u
cd "$(dirname "$0")/../.."
BUILD=${1:-build} PYTHON=${PYTHON:-python3} RANKS=${RANKS:-4}
dir=$(mktemp -d)
"$BUILD/eep-coordinator" --state "$dir/state" --listen 127.0.0.1:0 --tcpstore-listen 127.0.0.1:0/job \
    --tcpstore-grace-ms 500 --port-file "$dir/ports" 2>"$dir/log" &
pid=$!
trap 'kill $pid 2>/dev/null; wait $pid 2>/dev/null; rm -rf "$dir"' EXIT
for _ in $(seq 100); do [ -s "$dir/ports" ] && break; sleep 0.1; done
own=$(sed -n 1p "$dir/ports") port=$(sed -n '2s/.*://p' "$dir/ports")
[ -n "$port" ] || { echo "eep-coordinator did not start:"; cat "$dir/log"; exit 1; }
passed=0 failed=0 skipped=0
run() {
    if "$PYTHON" "$@"; then passed=$((passed + 1))
    elif [ $? = 77 ]; then skipped=$((skipped + 1)); echo "skipped: $*"
    else failed=$((failed + 1)); echo "FAILED: $*"; tail -n 5 "$dir/log"; fi
}
export EEP_BIN=$BUILD PYTHONDONTWRITEBYTECODE=1
if "$PYTHON" -c 'import torch.distributed' 2>/dev/null; then
    run tests/python/test_tcpstore.py
    [ -z "${TORCH_TESTS:-}" ] || run tests/python/torch_upstream.py "$TORCH_TESTS"
fi
for backend in gloo nccl; do
    for _ in first second; do # the same job, twice in a row
        sleep 1.5
        run tests/gpu/tcpstore.py job "$backend" "$RANKS" 127.0.0.1 "$port"
    done
done
[ -z "${BENCH:-}" ] || { sleep 1.5; run tests/gpu/tcpstore.py bench 127.0.0.1 "$port" "$BUILD/tests/bench_tcpstore" "$own"; }
grep cut-off "$dir/log"
printf '%d passed, %d failed, %d skipped\n' $passed $failed $skipped
[ $failed = 0 ]
