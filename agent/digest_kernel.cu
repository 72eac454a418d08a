/* The digest of common/digest.h over ranges in GPU memory, all of them in one launch.
 *
 * Compiled by nvcc to a fatbin that digest_kernel.c carries; launched by memory_cuda.c through the driver.  Pieces may
 * be digested in any order: a block takes every n-th piece, a thread every 256th pair of words in it. */

#include "agent/digest_kernel.h"
#include "common/digest.h"

typedef unsigned long long u64;

/* Word i of data that begins `shift` bits into *base.  Aligned words that hold any byte of it lie in its region. */
static __device__ __forceinline__ u64 load(const u64 *base, u64 i, unsigned shift)
{
    u64 word = base[i] >> shift;
    return shift == 0 ? word : word | base[i + 1] << (64 - shift);
}

/* This thread's part of a piece. */
static __device__ u64 piece_part(const unsigned char *data, u64 len, u64 first_word)
{
    const u64 threads = DIGEST_KERNEL_THREADS, me = threadIdx.x;
    const u64 words = len / 8;
    const unsigned shift = (unsigned)((u64)data % 8) * 8;
    const u64 *base = (const u64 *)(data - shift / 8);
    u64 total = 0;

    if ((u64)data % 16 == 0) {
        const ulonglong2 *pairs = (const ulonglong2 *)data;
        const u64 n = words / 2, step = threads * 2 * DIGEST_KEY;
        u64 key = (first_word + me * 2 + 1) * DIGEST_KEY, i = me;
        for (; i + 3 * threads < n; i += 4 * threads) {
            ulonglong2 p[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                p[k] = __ldcs(&pairs[i + k * threads]);
#pragma unroll
            for (int k = 0; k < 4; k++, key += step)
                total += digest_mix_key(p[k].x, key) + digest_mix_key(p[k].y, key + DIGEST_KEY);
        }
        for (; i < n; i += threads, key += step) {
            ulonglong2 p = __ldcs(&pairs[i]);
            total += digest_mix_key(p.x, key) + digest_mix_key(p.y, key + DIGEST_KEY);
        }
        if (words % 2 != 0 && me == 0)
            total += digest_mix(base[words - 1], first_word + words - 1);
    } else {
        for (u64 i = me; i < words; i += threads)
            total += digest_mix(load(base, i, shift), first_word + i);
    }

    if (len % 8 != 0 && me == 0) { /* a last word of fewer bytes: padded, and their number mixed in */
        u64 word = 0, index = first_word + words;
        for (u64 i = 0; i < len % 8; i++)
            word |= (u64)data[words * 8 + i] << (8 * i);
        total += digest_mix(word, index) + digest_mix(len % 8, ~index);
    }
    return total;
}

/* What a warp has for a sum.  Warps add on their own, so that none waits for another between two pieces. */
static __device__ void sum_add(u64 *sum, u64 total)
{
    for (int k = 16; k > 0; k /= 2)
        total += __shfl_down_sync(0xffffffffu, total, k);
    if (threadIdx.x % 32 == 0)
        atomicAdd(sum, total);
}

extern "C" __global__ void __launch_bounds__(DIGEST_KERNEL_THREADS)
digest_kernel(const struct digest_piece *pieces, unsigned int n, u64 *sums)
{
    u64 total = 0, sum = 0;
    for (unsigned int i = blockIdx.x; i < n; i += gridDim.x) {
        const struct digest_piece piece = pieces[i];
        if (piece.sum != sum) { /* of one large range, all goes into one addition */
            sum_add(&sums[sum], total);
            total = 0;
            sum = piece.sum;
        }
        total += piece_part((const unsigned char *)piece.at, piece.len, piece.first_word);
    }
    sum_add(&sums[sum], total);
}
