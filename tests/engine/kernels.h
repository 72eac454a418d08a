/* The kernels of the reference engine, and their arguments: one struct each, passed by value.
 *
 * kernels.cu is compiled by nvcc for GPUs, and by the host's C compiler for the fake driver (tests/fakecuda), which runs
 * the very same functions.  So: the common subset of C and CUDA, one thread per element or per row, no shared memory, no
 * warp operations, and nothing whose result depends on the order of threads but sums of integers.
 *
 * The order of every sum is that of decoder.c (eight lanes, then the rest), and nothing is contracted to fused
 * multiply-adds: a token's result is the same bits whatever else is in the batch and wherever an expert lies. */
#ifndef EEP_TESTS_ENGINE_KERNELS_H
#define EEP_TESTS_ENGINE_KERNELS_H

#include <stdint.h>

#define KERNEL_THREADS 128u /* of a block; the grid covers the elements */

/* out[t] = embed[token[t]]; a thread per (t, i) */
struct embed_args {
    const uint16_t *embed;
    const int32_t *tokens;
    float *out;
    uint32_t n, hidden, vocab;
};
/* out[r] = weight * x[r] / rms(x[r]); a thread per row, out may be x */
struct norm_args {
    const float *x;
    const uint16_t *weight;
    float *out;
    uint32_t rows, width;
    float eps;
};
/* out[t * out_stride + r] (+)= W[r] . x[t]; a thread per (t, r) */
struct matmul_args {
    const uint16_t *w; /* [rows][cols] */
    const float *x;    /* [n][cols] */
    float *out;
    uint32_t n, rows, cols, out_stride, add;
};
/* Rotates the heads of token t for position first + t, in place; a thread per (t, head, i < head_dim / 2) */
struct rope_args {
    float *x; /* [n][heads * head_dim] */
    const float *rope; /* [positions][head_dim] */
    uint32_t n, heads, head_dim, first, positions;
};
/* Attention of n consecutive tokens of one sequence, from position `first` on; a thread per (t, head) */
struct attend_args {
    const float *q, *k, *v; /* q [n][heads * head_dim]; k and v [positions][kv_heads * head_dim] */
    float *scores;          /* [n * heads][first + n] */
    float *out;             /* [n][heads * head_dim] */
    uint32_t n, first, heads, kv_heads, head_dim, positions;
};
/* Softmax over the router's logits, the top_k experts, and for each the replica that computes it, by the device's maps;
 * a thread per token */
struct choice {
    uint32_t expert;
    int32_t physical; /* -1: the map has no replica */
    float weight;
};
struct topk_args {
    float *logits; /* [n][experts], spoilt */
    const int32_t *logical_to_physical_map, *logical_replica_count; /* of this layer */
    struct choice *out; /* [n][top_k] */
    uint64_t step;
    uint32_t n, experts, top_k, norm, max_replicas, source;
};
/* The items that this rank computes: that the slot holds the expert (or nothing, in its grace), and the load; a thread
 * per item */
struct item {
    uint32_t slot, expert;
};
struct items_args {
    const struct item *items;
    const int32_t *held;      /* of this layer and rank, [slots] */
    unsigned long long *load; /* [slots] */
    uint32_t *wrong;          /* 1 + the first item found wrong */
    uint32_t n, slots;
};
/* out[t] = x[t] W(slot of t), W [rows][cols] as the layout has it; a thread per (t, output) */
struct expert_args {
    const struct item *items;
    const uint8_t *w; /* slot 0 */
    const float *x;   /* [n][in] */
    float *out;       /* [n][outs] */
    uint64_t stride;  /* bytes from slot to slot */
    uint32_t n, in, outs, slots, transposed; /* transposed: W is [in][outs], else [outs][in] */
};
/* out[t][i] = silu(gate[t][i]) * up[t][i]; a thread per (t, i) */
struct act_args {
    const float *gate_up; /* [n][2 * inner] */
    float *out;           /* [n][inner] */
    uint32_t n, inner;
};
/* x += y; a thread per element */
struct add_args {
    float *x;
    const float *y;
    uint64_t n;
};
/* Every thread spins for so long */
struct spin_args {
    uint64_t ns;
};

#define KERNEL_TABLE(X)                                                                                                \
    X(embed) X(norm) X(matmul) X(rope) X(attend) X(topk) X(items) X(expert) X(act) X(add) X(spin)

/* A fatbin for cuModuleLoadData; NULL in a build without nvcc (kernels_image.c, kernels_image_stub.c). */
const void *kernels_image(void);

#endif
