/* The reference model: a decoder with mixture-of-experts layers (Qwen3-MoE, Mixtral and their like) in plain C.
 *
 * Its shape comes from config.json and from which tensors exist, never from the family's name.  Weights stay where they
 * are (bf16, borrowed) and are widened to float32 on the fly; all arithmetic is float32.
 *
 * Every function computes one token at a time, always in the same order: a token's result does not depend on what else
 * is in the batch, nor on the rank that computes an expert.  Results are therefore equal bit for bit for every
 * placement of experts and for prefill as for decoding.  No globals; a struct decoder is read-only once bound, any
 * thread. */
#ifndef EEP_TESTS_ENGINE_DECODER_H
#define EEP_TESTS_ENGINE_DECODER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

struct decoder_config {
    uint32_t hidden, layers, heads, kv_heads, head_dim, vocab, max_positions;
    uint32_t experts, top_k, expert_hidden;
    float rms_eps, rope_theta;
    bool norm_topk, tie_embeddings;
};
/* Reads what the forward pass needs; ERR_UNSUPPORTED where the model needs more than is implemented here. */
int decoder_config_parse(const char *json, struct decoder_config *ret_config, struct err *err) MUST_CHECK;

/* A tensor by name, or ERR_NOTFOUND.  Expert parts ("layers.0.experts.w13") have a shape that begins with the slots. */
struct decoder_tensor {
    const void *data;
    const char *dtype;
    uint32_t dims;
    uint64_t shape[6];
    uint64_t stride; /* expert parts: bytes from slot to slot */
};
typedef int decoder_find_fn(void *user, const char *name, struct decoder_tensor *ret_tensor);

/* How the experts lie: as the checkpoint has them, or as the engine's own layout has them. */
enum decoder_layout {
    DECODER_LAYOUT_ROWS = 1,   /* w13 [2I, H] gate then up, w2 [H, I] */
    DECODER_LAYOUT_TRANSPOSED, /* w13t [H, 2I], w2t [I, H] */
};

struct decoder_layer {
    const uint16_t *input_norm, *post_norm, *q, *k, *v, *o, *q_norm, *k_norm, *router;
    const uint8_t *w13, *w2; /* slot 0 */
    uint64_t w13_stride, w2_stride;
};
struct decoder {
    struct decoder_config config;
    enum decoder_layout layout;
    uint32_t slots;
    const uint16_t *embed, *norm, *lm_head;
    struct decoder_layer *layer; /* [config.layers], owned */
    float *rope;                 /* [max_positions][head_dim]: cos of the first half, sin of the second; owned */
};
/* Binds every tensor and checks its type and shape. */
int decoder_bind(const char *config_json, decoder_find_fn *find, void *user, struct decoder *ret_model,
                 struct err *err) MUST_CHECK;
void decoder_done(struct decoder *m);

/* The keys and values of one sequence. */
struct decoder_kv {
    uint32_t positions; /* room */
    float *data;        /* [layers][2][positions][kv_heads * head_dim] */
};
uint64_t decoder_kv_bytes(const struct decoder_config *c, uint32_t positions);
int decoder_kv_init(const struct decoder_config *c, uint32_t positions, struct decoder_kv *ret_kv,
                    struct err *err) MUST_CHECK;
void decoder_kv_done(struct decoder_kv *kv);

/* ---- pieces, in the order of a layer; x is the residual stream [hidden] of one token ---- */
void decoder_embed(const struct decoder *m, int32_t token, float *ret_x);
/* Writes the keys and values of this position.  ret_q: [heads * head_dim]. */
void decoder_qkv(const struct decoder *m, uint32_t layer, const float *x, uint32_t position, struct decoder_kv *kv,
                 float *ret_q);
/* Attention over positions 0..position, whose keys and values are written; adds to x. */
int decoder_attend(const struct decoder *m, uint32_t layer, const float *q, uint32_t position,
                   const struct decoder_kv *kv, float *x) MUST_CHECK;
/* ret_h: the normed hidden state that the router and the experts read. */
void decoder_moe_input(const struct decoder *m, uint32_t layer, const float *x, float *ret_h);
/* The top_k experts in descending order of probability (ties: lower index) and their weights. */
void decoder_route(const struct decoder *m, uint32_t layer, const int32_t *replicas, const float *h, uint32_t *ret_expert,
                   float *ret_weight);
/* One expert on one token.  scratch: [3 * expert_hidden]. */
void decoder_expert(const struct decoder *m, uint32_t layer, uint32_t slot, const float *h, float *scratch,
                    float *ret_out);
void decoder_logits(const struct decoder *m, const float *x, float *ret_logits);
int32_t decoder_argmax(const float *logits, uint32_t n);

#endif
