#!/bin/sh
# The contract suites of GPU memory and of the transports between GPUs, on a machine with a GPU (figures: bench.sh):
#
#   tests/gpu/contract.sh build        (the folder of a build; its test programs must be there:
#                                       make build/tests/test_memory build/tests/test_transport_gpu
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
if [ "$("$build/eep-agent" --list-gpus | wc -l)" -gt 1 ]; then
    run "$build/tests/test_transport_gpu"
fi
exit $failed
