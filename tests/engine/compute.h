/* Who does the arithmetic of a step: the host (compute_host.c, over decoder.h) or the GPU that the weights lie on
 * (compute_cuda.c, over kernels.cu).  A table of functions, with one contract:
 *
 * Whatever is handed over here is host memory.  Results are there on return.  A token's results do not depend on what
 * else is in the batch, nor on the rank and the slot of an expert.  Stepping thread; each step begins with begin(), and
 * a step that failed is simply begun again. */
#ifndef EEP_TESTS_ENGINE_COMPUTE_H
#define EEP_TESTS_ENGINE_COMPUTE_H

#include "agent/libeep/eep.h"
#include "tests/engine/decoder.h"
#include "tests/engine/kernels.h"

/* Tokens of one sequence come in the order of their positions; those before the first of them are in kv. */
struct forward_token {
    int32_t token;
    uint32_t position;
    struct decoder_kv *kv; /* borrowed */
    float *logits;         /* [vocab], or NULL when nobody asks */
};
/* The maps that decide who computes a choice, and the present step, which spreads choices over replicas. */
struct compute_maps {
    const struct eep_maps *maps;
    uint32_t self; /* rank */
    uint64_t step;
};

struct compute {
    const char *name;
    const struct decoder *model; /* borrowed */
    /* The tokens of a step, borrowed until logits(). */
    int (*begin)(struct compute *self, const struct forward_token *tokens, uint32_t n, struct err *err);
    /* Attention of one layer.  ret_h: [n][hidden], what the router and the experts read. */
    int (*attend)(struct compute *self, uint32_t layer, float *ret_h, struct err *err);
    /* Adds the experts' sum [n][hidden] to the residual stream. */
    int (*add)(struct compute *self, const float *y, struct err *err);
    /* For the tokens that ask. */
    int (*logits)(struct compute *self, struct err *err);
    /* Routes n tokens of rank `source`, any n: [n][top_k] choices in descending order of weight. */
    int (*route)(struct compute *self, uint32_t layer, const struct compute_maps *maps, uint32_t source, const float *h,
                 uint32_t n, struct choice *ret_choices, struct err *err);
    /* Experts of this rank: out[i] = expert in slot items[i].slot on h[i].  ERR_CORRUPT when the map says that the slot
     * holds another expert; a retired slot may still be asked for during its grace. */
    int (*experts)(struct compute *self, uint32_t layer, const struct compute_maps *maps, const struct item *items,
                   const float *h, uint32_t n, float *ret_out, struct err *err);
    /* Keeps what computes busy for so long, in the order of the step. */
    int (*busy)(struct compute *self, uint32_t us, struct err *err);
    int (*kv_init)(struct compute *self, uint32_t positions, struct decoder_kv *ret_kv, struct err *err);
    void (*kv_done)(struct compute *self, struct decoder_kv *kv);
    void *stream; /* for eep_step_begin and eep_step_end */
    void (*close)(struct compute *self);
};

int compute_host_open(const struct decoder *model, struct compute **ret_compute, struct err *err) MUST_CHECK;
/* The model's tensors are device pointers of this CUDA device; its rope table is copied.  There is room for so many
 * sequences, each with `chunk` tokens in a step; it grows when more come, but in a step for which all ranks wait. */
int compute_cuda_open(const struct decoder *model, int device, uint32_t sequences, uint32_t chunk,
                      struct compute **ret_compute, struct err *err) MUST_CHECK;
/* Copies to memory of the weights: plainly when device is -1.  Complete on return. */
int compute_write(int device, void *dst, const void *src, size_t bytes, struct err *err) MUST_CHECK;

#endif
