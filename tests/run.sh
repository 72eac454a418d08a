#!/usr/bin/env bash
# Runs the test programs and counts: unit tests (two at a time), then the simulation and integration tests one by one.
# Tests of GPU paths run on the CUDA driver of tests/fakecuda and the NCCL of tests/fakenccl (where the build has one); on a GPU tests/gpu/contract.sh
# runs them.
# usage: BUILD=build SIM_SEEDS=2000 tests/run.sh UNIT... -- INTEGRATION...
set -u
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build}
export EEP_BIN=$BUILD
fakecuda=$(cd "$BUILD" && pwd)/fakecuda
# Two GPUs, whose memory is counted over all processes of this run, and which take their time.
on_fakecuda=(env "LD_LIBRARY_PATH=$fakecuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" FAKECUDA_GPUS=2 "FAKECUDA_STATE=run$$"
    FAKECUDA_DELAY_US=200)
results=$(mktemp) # a line for each: how it ended, its name
# Ends a process and what it has started.
end_tree() {
    local child
    for child in $(cat "/proc/$1/task/$1/children" 2>/dev/null); do end_tree "$child"; done
    kill "$1" 2>/dev/null
}
lane=
trap '[ -z "$lane" ] || end_tree "$lane"; rm -f "$results"' EXIT
trap 'exit 130' INT TERM # seen between two tests
run() { # name, command...
    local name=$1 begin=$SECONDS out state text
    shift
    if out=$("$@" 2>&1); then
        state=ok
        text="  $(printf '%s\n' "$out" | grep -E '^[0-9]+%|passed' | tail -n 1)
$(printf '%s\n' "$out" | grep ' not tested: ' | sed 's/^/      /')"
    elif [ $? = 77 ]; then
        state=skip
        text="  $(printf '%s\n' "$out" | tail -n 1)"
    else
        state=FAIL
        text="
$(printf '%s\n' "$out" | tail -n 60 | sed 's/^/    | /')"
    fi
    printf '%-5s %-28s %3ds%s\n' $state "$name" $((SECONDS - begin)) "${text%$'\n'}" # at once: others may write as well
    printf '%s %s\n' $state "$name" >>"$results"
}
# One after another.
run_all() {
    local t driver
    for t in "$@"; do
        driver=()
        if uses_fakecuda "$t"; then
            driver=("${on_fakecuda[@]}")
            [ "$t" != itest_gpu_faults ] || driver+=(FAKECUDA_DELAY_US=0)
        fi
        run "$t" "${driver[@]}" timeout 900 "$BUILD/tests/$t"
    done
}
uses_fakecuda() {
    case $1 in
    test_memory | test_transport_gpu | test_libeep_gpu | test_reference_model | test_fakecuda | test_cuda_faults | \
        itest_checkpoint) [ -e "$fakecuda/libcuda.so.1" ] ;;
    itest_gpu_faults) [ -e "$fakecuda/libnccl.so.2" ] ;;
    *) return 1 ;;
    esac
}
count() { grep -c "^$1 " "$results"; }
units=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    units+=("$1")
    shift
done
integrations=("${@:2}")
integration=${#integrations[@]}

# Two at a time: what needs the GPUs of tests/fakecuda, whose memory is counted, and all the others.
on_gpus=() others=()
for t in "${units[@]}"; do
    if uses_fakecuda "$t"; then on_gpus+=("$t"); else others+=("$t"); fi
done
run_all "${on_gpus[@]}" &
lane=$!
run_all "${others[@]}"
if [ $integration -gt 0 ]; then
    for f in ${FUZZ:-}; do
        mutations=20000
        [ "$f" = checkpoint ] && mutations=4000 # it writes files
        [ "$f" = tcpstore_run ] && mutations=200 # each is a connection
        run "fuzz corpus: $f" "$BUILD/tests/replay_$f" "tests/fuzz/corpus/$f" "$mutations"
    done
fi
wait $lane
lane=

if [ $integration -gt 0 ]; then
    if [ "${SIM_SEEDS:-0}" -gt 0 ]; then
        run completion tests/integration/completion.sh "$BUILD"
        run simulation "$BUILD/tests/eep-sim" --seeds "$SIM_SEEDS"
        run messages tests/docs/messages.sh
        run units tests/systemd/units.sh "$BUILD"
        run alerts tests/systemd/alerts.sh
        run two_nodes tests/systemd/two_nodes.sh "$BUILD"
        # shows what the simulation finds, not what a sanitizer does
        [ -n "${SANITIZE:-}" ] || run planted-mistakes tests/sim/bugs.sh "$BUILD/tests/eep-sim"
        # strace and a leak checker cannot both trace a process
        [ -n "${SANITIZE:-}" ] || run steps_no_syscall tests/integration/steps_no_syscall.sh "$BUILD"
    fi
    run_all "${integrations[@]}"

    # The same cluster with its weights in GPU memory: scaling, and the demo, over cuda_peer.
    on_gpu=(env "LD_LIBRARY_PATH=$fakecuda${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" FAKECUDA_GPUS=2 "FAKECUDA_STATE=run$$"
        EEP_TEST_MEMORY=cuda EEP_TEST_TRANSPORT=cuda_peer)
    if [ -e "$fakecuda/libcuda.so.1" ]; then
        # A sanitizer sees the same code in the demos, and needs minutes for these.
        for t in itest_scale itest_readopt; do
            [ -n "${SANITIZE:-}" ] || run "$t, cuda_peer" "${on_gpu[@]}" timeout 900 "$BUILD/tests/$t"
        done
        run "demo, cuda_peer" "${on_gpu[@]}" timeout 900 "$BUILD/tests/eep-demo" --sequence 2,4,3,2 --settle-ms 200
        run "demo, auto" "${on_gpu[@]}" EEP_TEST_TRANSPORT=auto timeout 900 "$BUILD/tests/eep-demo" --sequence 2,3,2 --settle-ms 200
        if [ -e "$fakecuda/libnccl.so.2" ]; then
            run "demo, nccl" "${on_gpu[@]}" EEP_TEST_TRANSPORT=nccl timeout 900 "$BUILD/tests/eep-demo" --sequence 2,4,3,2 \
                --settle-ms 200
        fi
        # what is measured on several GPUs, as far as it can be tried here
        [ "${SIM_SEEDS:-0}" = 0 ] || [ -n "${SANITIZE:-}" ] || run several_gpus tests/integration/several_gpus.sh "$BUILD"
    else
        no_gpu() { echo "this build has no cuda.h"; return 77; }
        run "itest_scale, cuda_peer" no_gpu
        run "itest_readopt, cuda_peer" no_gpu
        run "demo, cuda_peer" no_gpu
    fi
fi
printf '%d passed, %d failed, %d skipped\n' "$(count ok)" "$(count FAIL)" "$(count skip)"
! sed -n 's/^FAIL /failed: /p' "$results" | grep .
