/* The reference engine's kernels on the fake driver: tests/engine/kernels.cu itself, compiled by the host's compiler, and
 * run thread after thread.  What is written here are the lengths behind the pointers of each kernel's arguments, so that
 * an access outside of what is mapped fails as on a GPU.  A stream's thread. */
#include <math.h>
#include <string.h>
#include <time.h>

#include "tests/fakecuda/fakecuda.h"

struct index3 {
    unsigned x;
};
static _Thread_local struct index3 blockIdx, threadIdx, blockDim;

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline float widen(uint16_t bf16)
{
    uint32_t bits = (uint32_t)bf16 << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

#define KERNEL(name)      static void name##_thread(struct name##_args a)
#define DEVICE            static inline
#define ATOMIC_ADD(at, n) __atomic_fetch_add(at, n, __ATOMIC_SEQ_CST)
#define EXPF              expf
#define SQRTF             sqrtf
#include "tests/engine/kernels.cu"

/* Makes a pointer of the arguments one of this process; notes when it is none of the device. */
#define USE(pointer, n, write)                                                                                         \
    do {                                                                                                               \
        size_t use_bytes = (size_t)(n) * sizeof *(pointer);                                                            \
        void *use_at = use_bytes ? fake_use(&launch->use, (CUdeviceptr)(uintptr_t)(pointer), use_bytes, write) : NULL; \
        if (use_bytes && !use_at)                                                                                      \
            return CUDA_ERROR_ILLEGAL_ADDRESS;                                                                         \
        memcpy(&(pointer), &use_at, sizeof use_at);                                                                    \
    } while (0)

/* Every thread of the grid, one after the other. */
#define RUN(name)                                                                                                      \
    do {                                                                                                               \
        blockDim.x = launch->block[0];                                                                                 \
        for (blockIdx.x = 0; blockIdx.x < launch->grid[0]; blockIdx.x++)                                               \
            for (threadIdx.x = 0; threadIdx.x < launch->block[0]; threadIdx.x++)                                       \
                name##_thread(a);                                                                                      \
        return CUDA_SUCCESS;                                                                                           \
    } while (0)

#define ENTRY(name)                                                                                                    \
    static CUresult name##_run(struct fake_launch *launch, struct name##_args a);                                      \
    CUresult fake_##name(struct fake_launch *launch, void **args)                                                      \
    {                                                                                                                  \
        struct name##_args a;                                                                                          \
        memcpy(&a, args[0], sizeof a);                                                                                 \
        return name##_run(launch, a);                                                                                  \
    }                                                                                                                  \
    static CUresult name##_run(struct fake_launch *launch, struct name##_args a)

ENTRY(embed)
{
    USE(a.embed, (size_t)a.vocab * a.hidden, false);
    USE(a.tokens, a.n, false);
    USE(a.out, (size_t)a.n * a.hidden, true);
    RUN(embed);
}

ENTRY(norm)
{
    USE(a.x, (size_t)a.rows * a.width, false);
    USE(a.weight, a.width, false);
    USE(a.out, (size_t)a.rows * a.width, true);
    RUN(norm);
}

ENTRY(matmul)
{
    USE(a.w, (size_t)a.rows * a.cols, false);
    USE(a.x, (size_t)a.n * a.cols, false);
    USE(a.out, (size_t)(a.n - 1) * a.out_stride + a.rows, true);
    RUN(matmul);
}

ENTRY(rope)
{
    USE(a.x, (size_t)a.n * a.heads * a.head_dim, true);
    USE(a.rope, (size_t)a.positions * a.head_dim, false);
    RUN(rope);
}

ENTRY(attend)
{
    size_t q = (size_t)a.n * a.heads * a.head_dim, kv = (size_t)(a.first + a.n) * a.kv_heads * a.head_dim;
    USE(a.q, q, false);
    USE(a.k, kv, false);
    USE(a.v, kv, false);
    USE(a.scores, (size_t)a.n * a.heads * (a.first + a.n), true);
    USE(a.out, q, true);
    RUN(attend);
}

ENTRY(topk)
{
    USE(a.logits, (size_t)a.n * a.experts, true);
    USE(a.logical_to_physical_map, (size_t)a.experts * a.max_replicas, false);
    USE(a.logical_replica_count, a.experts, false);
    USE(a.out, (size_t)a.n * a.top_k, true);
    RUN(topk);
}

ENTRY(items)
{
    USE(a.items, a.n, false);
    USE(a.held, a.slots, false);
    USE(a.load, a.slots, true);
    USE(a.wrong, 1, true);
    RUN(items);
}

ENTRY(expert)
{
    USE(a.items, a.n, false);
    USE(a.w, (a.slots - 1) * a.stride + (size_t)a.in * a.outs * 2, false);
    USE(a.x, (size_t)a.n * a.in, false);
    USE(a.out, (size_t)a.n * a.outs, true);
    RUN(expert);
}

ENTRY(act)
{
    USE(a.gate_up, (size_t)a.n * 2 * a.inner, false);
    USE(a.out, (size_t)a.n * a.inner, true);
    RUN(act);
}

ENTRY(add)
{
    USE(a.x, a.n, true);
    USE(a.y, a.n, false);
    RUN(add);
}

/* On a GPU all its threads spin at the same time. */
ENTRY(spin)
{
    struct timespec t = {(time_t)(a.ns / 1000000000u), (long)(a.ns % 1000000000u)};
    (void)launch;
    (void)spin_thread;
    nanosleep(&t, NULL);
    return CUDA_SUCCESS;
}
