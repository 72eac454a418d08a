/* What the rest of the agent may know of GPUs: a list, without any type of CUDA.
 *
 * cuda_driver.c where the build found cuda.h, cuda_driver_stub.c elsewhere.  Any thread; may block for a second, since
 * the driver starts. */
#ifndef EEP_AGENT_GPU_H
#define EEP_AGENT_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define GPU_UUID_MAX 48 /* "GPU-" and 36 digits and dashes */

struct gpu {
    int index;
    char uuid[GPU_UUID_MAX];
    char name[128];
    uint64_t bytes;
    bool exports; /* its memory can be handed to another process as a descriptor */
};

/* The GPUs of this machine that the driver lets us see, by index; at most max of them, *ret_n is how many there are. */
int gpu_list(struct gpu *ret_gpus, size_t max, size_t *ret_n, struct err *err) MUST_CHECK;

/* The GPU that `which` names: "" = the first, an index, or a unique beginning of a UUID.  Makes no context. */
int gpu_find(const char *which, struct gpu *ret_gpu, struct err *err) MUST_CHECK;

#endif
