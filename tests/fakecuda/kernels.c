/* The kernels that a module of any image has, by name, as functions on the host: one call does the work of the whole
 * grid.  To add one, write the function and a line in the table.  A stream's thread. */
#include <string.h>

#include "common/digest.h"
#include "tests/fakecuda/fakecuda.h"

/* agent/digest_kernel.cu: (const u8 *data, u64 len, u64 first_word, u64 *sum) */
static CUresult digest_kernel(struct fake_launch *launch, void **args)
{
    CUdeviceptr data = *(CUdeviceptr *)args[0], sum = *(CUdeviceptr *)args[3];
    size_t len = (size_t) * (unsigned long long *)args[1];
    const void *bytes = fake_use(&launch->use, data, len, false);
    uint64_t *total = fake_use(&launch->use, sum, sizeof *total, true);
    if (!bytes || !total || sum % sizeof *total != 0)
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    if (launch->block[0] % 32 != 0 || launch->block[0] > 256) /* it adds up warps, eight at most */
        return CUDA_ERROR_LAUNCH_FAILED;
    __atomic_fetch_add(total, digest_bytes(bytes, len, *(unsigned long long *)args[2]), __ATOMIC_SEQ_CST);
    return CUDA_SUCCESS;
}

static const struct fake_kernel kernels[] = {
    {"digest_kernel", digest_kernel, {8, 8, 8, 8}},
};

const struct fake_kernel *fake_kernel_find(const char *name)
{
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++)
        if (strcmp(kernels[i].name, name) == 0)
            return &kernels[i];
    return NULL;
}
