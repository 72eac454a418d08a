#!/bin/sh
# The contract suites of GPU memory and of the transport between GPUs, and their figures, on a machine with a GPU:
#
#   tests/gpu/contract.sh build        (the folder of a build; its test programs must be there:
#                                       make build/tests/test_memory build/tests/test_transport_gpu build/tests/bench_gpu
#                                       build/tests/nccl_abort)
#
# With several GPUs the transport suite runs twice: all parties on the first one, then spread over all.
set -u

build=${1:?usage: contract.sh BUILD}
failed=0
run() {
    echo "## $*"
    timeout 200 "$@" || { echo "FAILED ($?): $*"; failed=1; }
}
run "$build/eep-agent" --list-gpus
run "$build/tests/test_memory"
run env CUDA_VISIBLE_DEVICES=0 "$build/tests/test_transport_gpu"
run env CUDA_VISIBLE_DEVICES=0 "$build/tests/nccl_abort"
run env CUDA_VISIBLE_DEVICES=0 "$build/tests/bench_gpu"
run env CUDA_VISIBLE_DEVICES=0 "$build/tests/bench_gpu" 1024 9437184
run env CUDA_VISIBLE_DEVICES=0 "$build/tests/bench_gpu" 64 44040192
if [ "$("$build/eep-agent" --list-gpus | wc -l)" -gt 1 ]; then
    run "$build/tests/test_transport_gpu"
    run "$build/tests/bench_gpu" 256 9437184 1
fi
exit $failed
