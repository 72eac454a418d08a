/* Stands in for compute_cuda.c in a build without CUDA's headers. */
#include <string.h>

#include "tests/engine/compute.h"

int compute_cuda_open(const struct decoder *model, int device, uint32_t sequences, uint32_t chunk,
                      struct compute **ret_compute, struct err *err)
{
    (void)model, (void)sequences, (void)chunk, (void)ret_compute;
    return err_set(err, ERR_UNSUPPORTED, "the weights lie on GPU %d, and this build of the engine has no cuda.h", device);
}

int compute_write(int device, void *dst, const void *src, size_t bytes, struct err *err)
{
    if (device >= 0)
        return err_set(err, ERR_UNSUPPORTED, "the weights lie on GPU %d, and this build of the engine has no cuda.h",
                       device);
    memcpy(dst, src, bytes);
    return 0;
}
