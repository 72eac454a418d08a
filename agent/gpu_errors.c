/* Failed calls of the CUDA driver and of NCCL, counted. */
#include "agent/gpu_errors.h"

#include <stdatomic.h>

static atomic_uint_least64_t counts[GPU_ERRORS];

void gpu_error_count(enum gpu_error library)
{
    atomic_fetch_add_explicit(&counts[library], 1, memory_order_relaxed);
}

uint64_t gpu_errors(enum gpu_error library)
{
    return atomic_load_explicit(&counts[library], memory_order_relaxed);
}
