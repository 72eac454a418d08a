#!/bin/sh
# Deaths in the middle of what GPU transports do, on a machine with a GPU; nothing is compiled here.
#
#   tests/gpu/faults.sh build [CHECKPOINT]    (the folder of a build: eep-agent, eep-coordinator, eepctl, tests/eep-engine,
#                                              tests/eep-feeder, tests/itest_gpu_faults, tests/nccl_abort)
#
# Real agents (--memory cuda --shared-gpu) over nccl and cuda_peer, killed and stopped while a group is created, while
# weights move and while a group ends; then the same at the level of the transport, where the places are exact.  Prints
# after how long the operation ended.  A larger checkpoint makes the moves last longer.
set -u

build=${1:?usage: faults.sh BUILD [CHECKPOINT]}
cd "$(dirname "$0")/../.." || exit 1
[ -z "${2:-}" ] || export MODEL="$2"
export EEP_BIN="$build" EEP_FAULTS=all NCCL_NVLS_ENABLE="${NCCL_NVLS_ENABLE:-0}"
failed=0
timeout 560 "$build/tests/itest_gpu_faults" || failed=1
timeout 560 "$build/tests/nccl_abort" || failed=1
exit $failed
