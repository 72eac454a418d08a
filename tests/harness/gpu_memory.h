/* How much memory of the GPUs is in use, by whatever process.  gpu_memory.c, or gpu_memory_stub.c in a build without
 * cuda.h.  It opens each GPU in this process, and keeps it open. */
#ifndef EEP_TESTS_HARNESS_GPU_MEMORY_H
#define EEP_TESTS_HARNESS_GPU_MEMORY_H

#include <stdint.h>

/* Of the first n GPUs together; 0 when it cannot be told. */
uint64_t gpu_memory_used(int n);

#endif
