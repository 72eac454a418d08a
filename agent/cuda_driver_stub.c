/* Stands in for cuda_driver.c in a build without CUDA's headers: there are no GPUs that it could know of. */
#include "agent/gpu.h"

static int no_backend(struct err *err)
{
    return err_set(err, ERR_UNSUPPORTED, "this build has no GPU backend: cuda.h was not found when it was made");
}

int gpu_list(struct gpu *ret_gpus, size_t max, size_t *ret_n, struct err *err)
{
    (void)ret_gpus, (void)max, (void)ret_n;
    return no_backend(err);
}

int gpu_find(const char *which, struct gpu *ret_gpu, struct err *err)
{
    (void)which, (void)ret_gpu;
    return no_backend(err);
}
