#!/usr/bin/env bash
# Runs the test programs one after another and counts: unit tests, the simulation, integration tests.
# usage: BUILD=build SIM_SEEDS=2000 tests/run.sh UNIT... -- INTEGRATION...
set -u
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build}
export EEP_BIN=$BUILD
passed=0 failed=0 skipped=0
run() { # name, command...
    local name=$1 begin=$SECONDS out
    shift
    if out=$("$@" 2>&1); then
        passed=$((passed + 1))
        printf 'ok    %-28s %3ds  %s\n' "$name" $((SECONDS - begin)) "$(printf '%s\n' "$out" | grep -E '^[0-9]+%|passed' | tail -n 1)"
    elif [ $? = 77 ]; then
        skipped=$((skipped + 1))
        printf 'skip  %-28s %3ds  %s\n' "$name" $((SECONDS - begin)) "$(printf '%s\n' "$out" | tail -n 1)"
    else
        failed=$((failed + 1))
        printf 'FAIL  %-28s %3ds\n' "$name" $((SECONDS - begin))
        printf '%s\n' "$out" | tail -n 60 | sed 's/^/    | /'
    fi
}
part=unit
for t in "$@"; do
    if [ "$t" = -- ]; then
        part=integration
        for f in ${FUZZ:-}; do
            run "fuzz corpus: $f" "$BUILD/tests/replay_$f" "tests/fuzz/corpus/$f" 20000
        done
        if [ "${SIM_SEEDS:-0}" -gt 0 ]; then
            run simulation "$BUILD/tests/eep-sim" --seeds "$SIM_SEEDS"
            run planted-mistakes tests/sim/bugs.sh "$BUILD/tests/eep-sim"
            # strace and a leak checker cannot both trace a process
            [ -n "${SANITIZE:-}" ] || run steps_no_syscall tests/integration/steps_no_syscall.sh "$BUILD"
        fi
        continue
    fi
    run "$t" timeout 900 "$BUILD/tests/$t"
done
printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" = 0 ]
