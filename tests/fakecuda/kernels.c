/* The kernels that a module of any image has, by name, as functions on the host: one call does the work of the whole
 * grid.  To add one, write the function and a line in the table.  A stream's thread. */
#include <string.h>

#include "agent/digest_kernel.h"
#include "common/digest.h"
#include "tests/fakecuda/fakecuda.h"

/* agent/digest_kernel.cu: (const struct digest_piece *pieces, unsigned n, u64 *sums) */
static CUresult digest_kernel(struct fake_launch *launch, void **args)
{
    CUdeviceptr pieces_at = *(CUdeviceptr *)args[0], sums_at = *(CUdeviceptr *)args[2];
    unsigned n = *(unsigned *)args[1];
    const struct digest_piece *pieces = fake_use(&launch->use, pieces_at, n * sizeof *pieces, false);
    if (!pieces || pieces_at % sizeof(uint64_t) != 0 || sums_at % sizeof(uint64_t) != 0)
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    if (launch->block[0] != DIGEST_KERNEL_THREADS) /* its loops are made for so many */
        return CUDA_ERROR_LAUNCH_FAILED;
    for (unsigned i = 0; i < n; i++) {
        const struct digest_piece *p = &pieces[i];
        const void *bytes = fake_use(&launch->use, p->at, p->len, false);
        uint64_t *sum = fake_use(&launch->use, sums_at + p->sum * sizeof *sum, sizeof *sum, true);
        if (!bytes || !sum)
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        __atomic_fetch_add(sum, digest_bytes(bytes, p->len, p->first_word), __ATOMIC_SEQ_CST);
    }
    return CUDA_SUCCESS;
}

/* tests/engine/kernels.cu, in kernels_engine.c */
#define ENGINE_ENTRY(name) {#name "_kernel", fake_##name, {sizeof(struct name##_args)}},

static const struct fake_kernel kernels[] = {
    {DIGEST_KERNEL_NAME, digest_kernel, {8, 4, 8}},
    KERNEL_TABLE(ENGINE_ENTRY)
};

const struct fake_kernel *fake_kernel_find(const char *name)
{
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++)
        if (strcmp(kernels[i].name, name) == 0)
            return &kernels[i];
    return NULL;
}
