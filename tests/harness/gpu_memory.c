/* See gpu_memory.h. */
#include "tests/harness/gpu_memory.h"

#include <stdio.h>

#include "agent/cuda_driver.h"

#define GPUS_MAX 16

uint64_t gpu_memory_used(int n)
{
    static struct cuda_device *devices[GPUS_MAX];
    uint64_t used = 0;
    for (int i = 0; i < n && i < GPUS_MAX; i++) {
        char which[16];
        size_t available = 0, total = 0;
        snprintf(which, sizeof which, "%d", i);
        if (!devices[i] && cuda_device_open(which, &devices[i], NULL) < 0)
            return 0;
        if (cuda_device_use(devices[i], NULL) < 0 ||
            devices[i]->driver.cuMemGetInfo(&available, &total) != CUDA_SUCCESS)
            return 0;
        used += total - available;
    }
    return used;
}
