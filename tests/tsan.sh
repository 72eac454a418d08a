#!/usr/bin/env bash
# ThreadSanitizer over everything that has threads: the agent's worker (also over GPU memory, on tests/fakecuda), libeep, the
# journal's and the store's writers, the planner's threads, the log; as unit tests, and as real daemons that scale under load.
# usage: tests/tsan.sh [build]      build: only that
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILD=build-tsan SANITIZE=thread OPT="-O1 -g" WERROR=1
# test_cuda_faults ends some hundred processes: no second of waiting in each
export TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1:exitcode=66}:atexit_sleep_ms=50
units="test_worker test_expert_read test_libeep test_libeep_orphan test_transport test_journal test_log test_rpc test_page test_fakecuda test_memory"
units="$units test_cuda_faults test_checkpoint test_control test_tcpstore test_planning test_store_log"
make -j2 all fakecuda $(printf "$BUILD/tests/%s " $units) $BUILD/tests/itest_scale $BUILD/tests/itest_faults $BUILD/tests/itest_readopt $BUILD/tests/itest_chaos \
  $BUILD/tests/itest_checkpoint >/dev/null
[ "${1:-}" != build ] || exit 0
SIM_SEEDS=0 tests/run.sh $units -- itest_scale itest_faults itest_readopt itest_chaos itest_checkpoint
