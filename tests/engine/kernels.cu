/* See kernels.h.  Compiled by nvcc, or as C by tests/fakecuda/kernels_engine.c, which defines KERNEL, DEVICE, and the
 * grid's variables itself. */
#include "tests/engine/kernels.h"

#ifdef __CUDACC__
#define KERNEL(name) extern "C" __global__ void name##_kernel(struct name##_args a)
#define DEVICE       static __device__ __forceinline__
#define ATOMIC_ADD(at, n) atomicAdd(at, n)
DEVICE uint64_t now_ns(void)
{
    uint64_t ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}
DEVICE float widen(uint16_t bf16)
{
    return __uint_as_float((uint32_t)bf16 << 16);
}
#define EXPF  expf
#define SQRTF sqrtf
#endif

#include "common/digest.h"

#define INDEX ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x)

/* The order of decoder.c: lane i takes every eighth product, (0+4)+(2+6) and (1+5)+(3+7), then the rest. */
DEVICE float lanes_sum(const float *s)
{
    float a = s[0] + s[4], b = s[1] + s[5], c = s[2] + s[6], d = s[3] + s[7];
    return (a + c) + (b + d);
}

DEVICE float dot_bf16(const uint16_t *w, const float *x, uint32_t n)
{
    float s[8] = {0, 0, 0, 0, 0, 0, 0, 0}, rest = 0;
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (uint32_t k = 0; k < 8; k++)
            s[k] += widen(w[i + k]) * x[i + k];
    for (; i < n; i++)
        rest += widen(w[i]) * x[i];
    return lanes_sum(s) + rest;
}

DEVICE float dot_f32(const float *v, const float *x, uint32_t n)
{
    float s[8] = {0, 0, 0, 0, 0, 0, 0, 0}, rest = 0;
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (uint32_t k = 0; k < 8; k++)
            s[k] += v[i + k] * x[i + k];
    for (; i < n; i++)
        rest += v[i] * x[i];
    return lanes_sum(s) + rest;
}

KERNEL(embed)
{
    uint64_t at = INDEX, t = at / a.hidden;
    if (t < a.n && (uint32_t)a.tokens[t] < a.vocab)
        a.out[at] = widen(a.embed[(uint64_t)a.tokens[t] * a.hidden + at % a.hidden]);
}

KERNEL(norm)
{
    uint64_t row = INDEX;
    if (row >= a.rows)
        return;
    const float *x = a.x + row * a.width;
    float *out = a.out + row * a.width;
    float scale = 1.0f / SQRTF(dot_f32(x, x, a.width) / (float)a.width + a.eps);
    for (uint32_t i = 0; i < a.width; i++)
        out[i] = widen(a.weight[i]) * (x[i] * scale);
}

KERNEL(matmul)
{
    uint64_t t = INDEX / a.rows, r = INDEX % a.rows;
    if (t >= a.n)
        return;
    float *out = a.out + t * a.out_stride + r;
    float y = dot_bf16(a.w + r * a.cols, a.x + t * a.cols, a.cols);
    *out = a.add ? *out + y : y;
}

KERNEL(rope)
{
    uint32_t half = a.head_dim / 2;
    uint64_t i = INDEX % half, head = INDEX / half, t = head / a.heads;
    if (t >= a.n)
        return;
    float *x = a.x + head * a.head_dim;
    const float *cosine = a.rope + (a.first + t) * a.head_dim;
    float p = x[i], q = x[half + i], c = cosine[i], s = cosine[half + i];
    x[i] = p * c - q * s;
    x[half + i] = q * c + p * s;
}

/* p = softmax(p) over n entries */
DEVICE void softmax(float *p, uint32_t n)
{
    float top = p[0], sum = 0;
    for (uint32_t i = 1; i < n; i++)
        top = p[i] > top ? p[i] : top;
    for (uint32_t i = 0; i < n; i++)
        sum += p[i] = EXPF(p[i] - top);
    for (uint32_t i = 0; i < n; i++)
        p[i] /= sum;
}

KERNEL(attend)
{
    uint64_t at = INDEX, t = at / a.heads, head = at % a.heads;
    if (t >= a.n)
        return;
    uint32_t d = a.head_dim, seen = a.first + (uint32_t)t + 1;
    uint64_t width = (uint64_t)a.kv_heads * d, from = head / (a.heads / a.kv_heads) * d;
    float scale = 1.0f / SQRTF((float)d);
    const float *q = a.q + at * d;
    float *scores = a.scores + at * (a.first + a.n), *out = a.out + at * d;
    for (uint32_t p = 0; p < seen; p++)
        scores[p] = dot_f32(q, a.k + p * width + from, d) * scale;
    softmax(scores, seen);
    for (uint32_t i = 0; i < d; i++)
        out[i] = 0;
    for (uint32_t p = 0; p < seen; p++)
        for (uint32_t i = 0; i < d; i++)
            out[i] += scores[p] * a.v[p * width + from + i];
}

KERNEL(topk)
{
    uint64_t t = INDEX;
    if (t >= a.n)
        return;
    float *p = a.logits + t * a.experts, sum = 0;
    struct choice *out = a.out + t * a.top_k;
    uint64_t seed = digest_mix(((uint64_t)a.source << 32) | t, a.step);
    softmax(p, a.experts);
    for (uint32_t e = 0; e < a.experts; e++)
        if (a.logical_replica_count[e] == 0) /* masked */
            p[e] = -1.0f;
    for (uint32_t k = 0; k < a.top_k; k++) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < a.experts; e++)
            best = p[e] > p[best] ? e : best; /* strictly: a tie stays with the lower index */
        bool none = p[best] < 0; /* fewer are left than a token takes */
        uint32_t expert = none ? out[0].expert : best;
        int32_t count = a.logical_replica_count[expert];
        out[k].expert = expert;
        out[k].weight = none ? 0 : p[best];
        out[k].physical = -1;
        if (count >= 1 && (uint32_t)count <= a.max_replicas)
            out[k].physical = a.logical_to_physical_map[(uint64_t)expert * a.max_replicas + seed % (uint32_t)count];
        sum += out[k].weight;
        p[best] = -1.0f;
    }
    for (uint32_t k = 0; a.norm && k < a.top_k; k++)
        out[k].weight /= sum;
}

KERNEL(items)
{
    uint64_t i = INDEX;
    if (i >= a.n)
        return;
    struct item item = a.items[i];
    int32_t held = item.slot < a.slots ? a.held[item.slot] : -2;
    if (held == -2 || (held >= 0 && (uint32_t)held != item.expert))
        *a.wrong = (uint32_t)i + 1;
    else
        ATOMIC_ADD(&a.load[item.slot], 1ull);
}

KERNEL(expert)
{
    uint64_t t = INDEX / a.outs, r = INDEX % a.outs;
    if (t >= a.n || a.items[t].slot >= a.slots)
        return;
    const uint16_t *w = (const uint16_t *)(const void *)(a.w + a.items[t].slot * a.stride);
    const float *x = a.x + t * a.in;
    float y = 0;
    if (a.transposed) {
        for (uint32_t i = 0; i < a.in; i++)
            y += widen(w[(uint64_t)i * a.outs + r]) * x[i];
    } else {
        y = dot_bf16(w + r * a.in, x, a.in);
    }
    a.out[t * a.outs + r] = y;
}

KERNEL(act)
{
    uint64_t at = INDEX, t = at / a.inner, i = at % a.inner;
    if (t >= a.n)
        return;
    float gate = a.gate_up[t * 2 * a.inner + i], up = a.gate_up[t * 2 * a.inner + a.inner + i];
    a.out[at] = gate / (1.0f + EXPF(-gate)) * up;
}

KERNEL(add)
{
    uint64_t i = INDEX;
    if (i < a.n)
        a.x[i] += a.y[i];
}

KERNEL(spin)
{
    uint64_t begin = now_ns();
    while (now_ns() - begin < a.ns)
        ;
}
