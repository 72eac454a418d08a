/* Shape, binding and arithmetic of the reference model.  See decoder.h.  Any thread. */
#include "tests/engine/decoder.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES     8 /* partial sums of a dot product: short error chains, and vectors */
#define TOP_K_MAX 64

/* ---- configuration ---- */

static int config_u32(const json_t *root, const char *key, bool needed, uint32_t fallback, uint32_t *ret_value,
                      struct err *err)
{
    const json_t *v = json_object_get(root, key);
    if (!v || json_is_null(v)) {
        if (needed)
            return err_set(err, ERR_INVALID, "config.json has no \"%s\"", key);
        *ret_value = fallback;
        return 0;
    }
    json_int_t n = json_integer_value(v);
    if (!json_is_integer(v) || n < 1 || n > INT32_MAX)
        return err_set(err, ERR_INVALID, "config.json: \"%s\" is not a positive whole number", key);
    *ret_value = (uint32_t)n;
    return 0;
}

static int config_rope(const json_t *root, float *ret_theta, struct err *err)
{
    const json_t *rope = json_object_get(root, "rope_parameters");
    const json_t *scaling = json_object_get(root, "rope_scaling");
    const json_t *type = json_object_get(rope, "rope_type");
    if ((json_is_string(type) && strcmp(json_string_value(type), "default") != 0) || json_is_object(scaling))
        return err_set(err, ERR_UNSUPPORTED, "config.json: only the default rotary embedding is implemented");
    const json_t *theta = json_object_get(rope, "rope_theta");
    if (!theta)
        theta = json_object_get(root, "rope_theta");
    *ret_theta = json_is_number(theta) ? (float)json_number_value(theta) : 10000.0f;
    return 0;
}

static int config_read(const json_t *root, struct decoder_config *c, struct err *err)
{
    int rc;
    if ((rc = config_u32(root, "hidden_size", true, 0, &c->hidden, err)) ||
        (rc = config_u32(root, "num_hidden_layers", true, 0, &c->layers, err)) ||
        (rc = config_u32(root, "num_attention_heads", true, 0, &c->heads, err)) ||
        (rc = config_u32(root, "num_key_value_heads", false, c->heads, &c->kv_heads, err)) ||
        (rc = config_u32(root, "head_dim", false, c->hidden / c->heads, &c->head_dim, err)) ||
        (rc = config_u32(root, "vocab_size", true, 0, &c->vocab, err)) ||
        (rc = config_u32(root, "max_position_embeddings", true, 0, &c->max_positions, err)) ||
        (rc = config_u32(root, "num_experts", false, 0, &c->experts, err)) ||
        (rc = config_u32(root, "num_local_experts", c->experts == 0, c->experts, &c->experts, err)) ||
        (rc = config_u32(root, "num_experts_per_tok", true, 0, &c->top_k, err)) ||
        (rc = config_u32(root, "intermediate_size", false, 0, &c->expert_hidden, err)) ||
        (rc = config_u32(root, "moe_intermediate_size", c->expert_hidden == 0, c->expert_hidden, &c->expert_hidden,
                         err)))
        return rc;
    const json_t *act = json_object_get(root, "hidden_act");
    if (json_is_string(act) && strcmp(json_string_value(act), "silu") != 0)
        return err_set(err, ERR_UNSUPPORTED, "config.json: hidden_act \"%s\" is not implemented",
                       json_string_value(act));
    const json_t *window = json_object_get(root, "sliding_window"), *use = json_object_get(root, "use_sliding_window");
    if (json_is_integer(window) && !json_is_false(use) && json_integer_value(window) < (json_int_t)c->max_positions)
        return err_set(err, ERR_UNSUPPORTED, "config.json: sliding window attention is not implemented");
    const json_t *eps = json_object_get(root, "rms_norm_eps");
    c->rms_eps = json_is_number(eps) ? (float)json_number_value(eps) : 1e-6f;
    c->norm_topk = !json_is_false(json_object_get(root, "norm_topk_prob")); /* absent: the family always renormalises */
    c->tie_embeddings = json_is_true(json_object_get(root, "tie_word_embeddings"));
    if (c->heads % c->kv_heads != 0 || c->head_dim % 2 != 0 || c->top_k > c->experts || c->top_k > TOP_K_MAX)
        return err_set(err, ERR_INVALID, "config.json: heads %u, kv heads %u, head_dim %u, top-k %u of %u do not fit",
                       c->heads, c->kv_heads, c->head_dim, c->top_k, c->experts);
    return config_rope(root, &c->rope_theta, err);
}

int decoder_config_parse(const char *json, struct decoder_config *ret_config, struct err *err)
{
    json_error_t why;
    json_t *root = json_loads(json ? json : "", 0, &why);
    if (!root)
        return err_set(err, ERR_INVALID, "config.json does not parse: line %d: %s", why.line, why.text);
    struct decoder_config c = {0};
    int rc = config_read(root, &c, err);
    json_decref(root);
    if (rc == 0)
        *ret_config = c;
    return rc;
}

/* ---- binding ---- */

struct binder {
    decoder_find_fn *find;
    void *user;
    struct err *err;
};

static int bind_check(struct binder *b, const char *name, const struct decoder_tensor *t, uint32_t skip, uint64_t rows,
                      uint64_t cols)
{
    bool fits = cols ? t->dims == skip + 2 && t->shape[skip] == rows && t->shape[skip + 1] == cols
                     : t->dims == skip + 1 && t->shape[skip] == rows;
    if (!fits)
        return err_set(b->err, ERR_INVALID, "tensor %s has not the shape that config.json implies", name);
    if (strcmp(t->dtype, "BF16") != 0)
        return err_set(b->err, ERR_UNSUPPORTED, "tensor %s is %s; the reference engine reads BF16", name, t->dtype);
    if ((uintptr_t)t->data % 2 != 0)
        return err_set(b->err, ERR_INVALID, "tensor %s is not aligned", name);
    return 0;
}

/* A dense tensor [rows] or [rows, cols]; ret_data NULL when it does not exist and is optional. */
static int bind_dense(struct binder *b, bool optional, uint64_t rows, uint64_t cols, const uint16_t **ret_data,
                      const char *name)
{
    struct decoder_tensor t = {0};
    int rc = b->find(b->user, name, &t);
    if (rc == ERR_NOTFOUND && optional) {
        *ret_data = NULL;
        return 0;
    }
    if (rc)
        return err_set(b->err, rc, "the weights have no tensor %s", name);
    rc = bind_check(b, name, &t, 0, rows, cols);
    if (rc == 0)
        *ret_data = t.data;
    return rc;
}

static int bind_layer_dense(struct binder *b, uint32_t layer, bool optional, uint64_t rows, uint64_t cols,
                            const uint16_t **ret_data, const char *what)
{
    char name[192];
    snprintf(name, sizeof name, "model.layers.%u.%s.weight", layer, what);
    return bind_dense(b, optional, rows, cols, ret_data, name);
}

static int bind_part(struct binder *b, struct decoder *m, uint32_t layer, const char *part, uint64_t rows,
                     uint64_t cols, const uint8_t **ret_data, uint64_t *ret_stride)
{
    char name[192];
    struct decoder_tensor t = {0};
    snprintf(name, sizeof name, "layers.%u.experts.%s", layer, part);
    int rc = b->find(b->user, name, &t);
    if (rc)
        return err_set(b->err, rc, "the weights have no tensor %s", name);
    rc = bind_check(b, name, &t, 1, rows, cols);
    if (rc)
        return rc;
    if (m->slots == 0)
        m->slots = (uint32_t)t.shape[0];
    if (t.shape[0] != m->slots || t.stride < rows * cols * 2 || t.stride % 2 != 0)
        return err_set(b->err, ERR_INVALID, "tensor %s: slots or stride do not fit", name);
    *ret_data = t.data;
    *ret_stride = t.stride;
    return 0;
}

static int bind_layer(struct binder *b, struct decoder *m, uint32_t l)
{
    const struct decoder_config *c = &m->config;
    struct decoder_layer *y = &m->layer[l];
    uint64_t h = c->hidden, q = (uint64_t)c->heads * c->head_dim, kv = (uint64_t)c->kv_heads * c->head_dim;
    uint64_t i = c->expert_hidden;
    bool rows = m->layout == DECODER_LAYOUT_ROWS;
    int rc;
    if ((rc = bind_layer_dense(b, l, false, h, 0, &y->input_norm, "input_layernorm")) ||
        (rc = bind_layer_dense(b, l, false, h, 0, &y->post_norm, "post_attention_layernorm")) ||
        (rc = bind_layer_dense(b, l, false, q, h, &y->q, "self_attn.q_proj")) ||
        (rc = bind_layer_dense(b, l, false, kv, h, &y->k, "self_attn.k_proj")) ||
        (rc = bind_layer_dense(b, l, false, kv, h, &y->v, "self_attn.v_proj")) ||
        (rc = bind_layer_dense(b, l, false, h, q, &y->o, "self_attn.o_proj")) ||
        (rc = bind_layer_dense(b, l, true, c->head_dim, 0, &y->q_norm, "self_attn.q_norm")) ||
        (rc = bind_layer_dense(b, l, true, c->head_dim, 0, &y->k_norm, "self_attn.k_norm")) ||
        (rc = bind_layer_dense(b, l, true, c->experts, h, &y->router, "mlp.gate")))
        return rc;
    if (!y->router && (rc = bind_layer_dense(b, l, false, c->experts, h, &y->router, "block_sparse_moe.gate")))
        return rc;
    rc = bind_part(b, m, l, rows ? "w13" : "w13t", rows ? 2 * i : h, rows ? h : 2 * i, &y->w13, &y->w13_stride);
    return rc ? rc : bind_part(b, m, l, rows ? "w2" : "w2t", rows ? h : i, rows ? i : h, &y->w2, &y->w2_stride);
}

/* cos and sin of every position, as the reference computes them: inverse frequencies and angles in float32. */
static int rope_table(struct decoder *m)
{
    uint32_t half = m->config.head_dim / 2;
    m->rope = calloc(m->config.max_positions, m->config.head_dim * sizeof *m->rope);
    if (!m->rope)
        return ERR_NOMEM;
    for (uint32_t p = 0; p < m->config.max_positions; p++) {
        for (uint32_t i = 0; i < half; i++) {
            float inverse = 1.0f / powf(m->config.rope_theta, (float)(2 * i) / (float)m->config.head_dim);
            float angle = (float)p * inverse;
            m->rope[(size_t)p * 2 * half + i] = cosf(angle);
            m->rope[(size_t)p * 2 * half + half + i] = sinf(angle);
        }
    }
    return 0;
}

int decoder_bind(const char *config_json, decoder_find_fn *find, void *user, struct decoder *ret_model, struct err *err)
{
    struct decoder m = {0};
    struct binder b = {find, user, err};
    struct decoder_tensor probe;
    int rc = decoder_config_parse(config_json, &m.config, err);
    if (rc)
        return rc;
    m.layout = find(user, "layers.0.experts.w13t", &probe) == 0 ? DECODER_LAYOUT_TRANSPOSED : DECODER_LAYOUT_ROWS;
    m.layer = calloc(m.config.layers, sizeof *m.layer);
    if (!m.layer || rope_table(&m)) {
        rc = err_set(err, ERR_NOMEM, "out of memory for the tables of the model");
        goto fail;
    }
    const struct decoder_config *c = &m.config;
    if ((rc = bind_dense(&b, false, c->vocab, c->hidden, &m.embed, "model.embed_tokens.weight")) ||
        (rc = bind_dense(&b, false, c->hidden, 0, &m.norm, "model.norm.weight")) ||
        (rc = bind_dense(&b, c->tie_embeddings, c->vocab, c->hidden, &m.lm_head, "lm_head.weight")))
        goto fail;
    if (!m.lm_head)
        m.lm_head = m.embed;
    for (uint32_t l = 0; l < c->layers; l++) {
        if ((rc = bind_layer(&b, &m, l)))
            goto fail;
    }
    *ret_model = m;
    return 0;
fail:
    decoder_done(&m);
    return rc;
}

void decoder_done(struct decoder *m)
{
    free(m->layer);
    free(m->rope);
    memset(m, 0, sizeof *m);
}

/* ---- keys and values ---- */

uint64_t decoder_kv_bytes(const struct decoder_config *c, uint32_t positions)
{
    return (uint64_t)c->layers * 2 * positions * c->kv_heads * c->head_dim * sizeof(float);
}

int decoder_kv_init(const struct decoder_config *c, uint32_t positions, struct decoder_kv *ret_kv, struct err *err)
{
    float *data = calloc(1, decoder_kv_bytes(c, positions));
    if (!data)
        return err_set(err, ERR_NOMEM, "out of memory for %u positions of keys and values", positions);
    ret_kv->positions = positions;
    ret_kv->data = data;
    return 0;
}

void decoder_kv_done(struct decoder_kv *kv)
{
    free(kv->data);
    memset(kv, 0, sizeof *kv);
}

static float *kv_at(const struct decoder *m, const struct decoder_kv *kv, uint32_t layer, uint32_t value,
                    uint32_t position)
{
    size_t width = (size_t)m->config.kv_heads * m->config.head_dim;
    return kv->data + ((((size_t)layer * 2 + value) * kv->positions) + position) * width;
}

/* ---- arithmetic ---- */

/* Eight partial sums as two vectors of four, in the vector extensions of gcc and clang: the same bits on every machine
 * whose base instruction set has no fused multiply-add, and several times as fast as one sum. */
#define HALF (LANES / 2)
typedef float half_f32 __attribute__((vector_size(HALF * 4)));
typedef uint16_t lanes_u16 __attribute__((vector_size(LANES * 2)));
struct lanes {
    half_f32 lo, hi;
};

static inline float widen(uint16_t bf16)
{
    uint32_t bits = (uint32_t)bf16 << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Eight elements of bf16: the upper halves of floats (little-endian). */
static inline struct lanes lanes_widen(const uint16_t *w)
{
    lanes_u16 zero = {0}, v;
    memcpy(&v, w, sizeof v);
    return (struct lanes){(half_f32)__builtin_shufflevector(zero, v, 0, 8, 1, 9, 2, 10, 3, 11),
                          (half_f32)__builtin_shufflevector(zero, v, 4, 12, 5, 13, 6, 14, 7, 15)};
}

static inline struct lanes lanes_load(const float *x)
{
    struct lanes l;
    memcpy(&l.lo, x, sizeof l.lo);
    memcpy(&l.hi, x + HALF, sizeof l.hi);
    return l;
}

static inline float lanes_sum(struct lanes l)
{
    half_f32 s = l.lo + l.hi;
    return (s[0] + s[2]) + (s[1] + s[3]);
}

static float dot_bf16(const uint16_t *w, const float *x, uint32_t n)
{
    struct lanes sum = {{0}, {0}};
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        struct lanes a = lanes_widen(w + i), b = lanes_load(x + i);
        sum.lo += a.lo * b.lo;
        sum.hi += a.hi * b.hi;
    }
    float rest = 0;
    for (; i < n; i++)
        rest += widen(w[i]) * x[i];
    return lanes_sum(sum) + rest;
}

static float dot_f32(const float *v, const float *x, uint32_t n)
{
    struct lanes sum = {{0}, {0}};
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        struct lanes a = lanes_load(v + i), b = lanes_load(x + i);
        sum.lo += a.lo * b.lo;
        sum.hi += a.hi * b.hi;
    }
    float rest = 0;
    for (; i < n; i++)
        rest += v[i] * x[i];
    return lanes_sum(sum) + rest;
}

/* ret = W x, W bf16 [rows, cols] */
static void matvec(const uint16_t *w, const float *x, uint32_t rows, uint32_t cols, float *ret)
{
    for (uint32_t r = 0; r < rows; r++)
        ret[r] = dot_bf16(w + (size_t)r * cols, x, cols);
}

/* ret = x W, W bf16 [rows, cols]: the transposed layout */
static void vecmat(const uint16_t *w, const float *x, uint32_t rows, uint32_t cols, float *ret)
{
    memset(ret, 0, cols * sizeof *ret);
    for (uint32_t r = 0; r < rows; r++, w += cols) {
        uint32_t c = 0;
        for (; c + LANES <= cols; c += LANES) {
            struct lanes a = lanes_widen(w + c), b = lanes_load(ret + c);
            b.lo += a.lo * x[r];
            b.hi += a.hi * x[r];
            memcpy(ret + c, &b.lo, sizeof b.lo);
            memcpy(ret + c + HALF, &b.hi, sizeof b.hi);
        }
        for (; c < cols; c++)
            ret[c] += x[r] * widen(w[c]);
    }
}

static void rms_norm(const float *x, const uint16_t *weight, uint32_t n, float eps, float *ret)
{
    float scale = 1.0f / sqrtf(dot_f32(x, x, n) / (float)n + eps);
    for (uint32_t i = 0; i < n; i++)
        ret[i] = widen(weight[i]) * (x[i] * scale);
}

/* Rotates in place: x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin over the halves (rotate_half). */
static void rope_apply(const struct decoder *m, uint32_t position, float *head)
{
    uint32_t half = m->config.head_dim / 2;
    const float *cosine = m->rope + (size_t)position * 2 * half, *sine = cosine + half;
    for (uint32_t i = 0; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cosine[i] - b * sine[i];
        head[half + i] = b * cosine[i] + a * sine[i];
    }
}

void decoder_embed(const struct decoder *m, int32_t token, float *ret_x)
{
    const uint16_t *row = m->embed + (size_t)token * m->config.hidden;
    for (uint32_t i = 0; i < m->config.hidden; i++)
        ret_x[i] = widen(row[i]);
}

static void heads_finish(const struct decoder *m, const uint16_t *norm, uint32_t heads, uint32_t position, float *x)
{
    uint32_t d = m->config.head_dim;
    for (uint32_t h = 0; h < heads; h++) {
        float *head = x + (size_t)h * d;
        if (norm)
            rms_norm(head, norm, d, m->config.rms_eps, head);
        rope_apply(m, position, head);
    }
}

void decoder_qkv(const struct decoder *m, uint32_t layer, const float *x, uint32_t position, struct decoder_kv *kv,
                 float *ret_q)
{
    const struct decoder_config *c = &m->config;
    const struct decoder_layer *y = &m->layer[layer];
    uint32_t kv_width = c->kv_heads * c->head_dim;
    float h[c->hidden];
    float *k = kv_at(m, kv, layer, 0, position);
    rms_norm(x, y->input_norm, c->hidden, c->rms_eps, h);
    matvec(y->q, h, c->heads * c->head_dim, c->hidden, ret_q);
    matvec(y->k, h, kv_width, c->hidden, k);
    matvec(y->v, h, kv_width, c->hidden, kv_at(m, kv, layer, 1, position));
    heads_finish(m, y->q_norm, c->heads, position, ret_q);
    heads_finish(m, y->k_norm, c->kv_heads, position, k);
}

/* p = softmax(p) over n entries */
static void softmax(float *p, uint32_t n)
{
    float top = p[0], sum = 0;
    for (uint32_t i = 1; i < n; i++)
        top = p[i] > top ? p[i] : top;
    for (uint32_t i = 0; i < n; i++)
        sum += p[i] = expf(p[i] - top);
    for (uint32_t i = 0; i < n; i++)
        p[i] /= sum;
}

int decoder_attend(const struct decoder *m, uint32_t layer, const float *q, uint32_t position,
                   const struct decoder_kv *kv, float *x)
{
    const struct decoder_config *c = &m->config;
    uint32_t d = c->head_dim, group = c->heads / c->kv_heads, width = c->heads * d;
    float scale = 1.0f / sqrtf((float)d);
    float *scores = malloc(((size_t)position + 1 + width + c->hidden) * sizeof *scores);
    if (!scores)
        return ERR_NOMEM;
    float *out = scores + position + 1, *projected = out + width;
    memset(out, 0, width * sizeof *out);
    for (uint32_t h = 0; h < c->heads; h++) {
        size_t at = (size_t)(h / group) * d;
        for (uint32_t p = 0; p <= position; p++)
            scores[p] = dot_f32(q + (size_t)h * d, kv_at(m, kv, layer, 0, p) + at, d) * scale;
        softmax(scores, position + 1);
        for (uint32_t p = 0; p <= position; p++) {
            const float *v = kv_at(m, kv, layer, 1, p) + at;
            for (uint32_t i = 0; i < d; i++)
                out[(size_t)h * d + i] += scores[p] * v[i];
        }
    }
    matvec(m->layer[layer].o, out, c->hidden, width, projected);
    for (uint32_t i = 0; i < c->hidden; i++)
        x[i] += projected[i];
    free(scores);
    return 0;
}

void decoder_moe_input(const struct decoder *m, uint32_t layer, const float *x, float *ret_h)
{
    rms_norm(x, m->layer[layer].post_norm, m->config.hidden, m->config.rms_eps, ret_h);
}

void decoder_route(const struct decoder *m, uint32_t layer, const int32_t *replicas, const float *h, uint32_t *ret_expert,
                   float *ret_weight)
{
    const struct decoder_config *c = &m->config;
    float p[c->experts], sum = 0;
    matvec(m->layer[layer].router, h, c->experts, c->hidden, p);
    softmax(p, c->experts);
    for (uint32_t e = 0; e < c->experts; e++)
        if (replicas[e] == 0) /* masked */
            p[e] = -1.0f;
    for (uint32_t k = 0; k < c->top_k; k++) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < c->experts; e++)
            best = p[e] > p[best] ? e : best; /* strictly: a tie stays with the lower index */
        bool none = p[best] < 0; /* fewer are left than a token takes */
        ret_expert[k] = none ? ret_expert[0] : best;
        ret_weight[k] = none ? 0 : p[best];
        sum += ret_weight[k];
        p[best] = -1.0f;
    }
    for (uint32_t k = 0; c->norm_topk && k < c->top_k; k++)
        ret_weight[k] /= sum;
}

void decoder_expert(const struct decoder *m, uint32_t layer, uint32_t slot, const float *h, float *scratch,
                    float *ret_out)
{
    const struct decoder_layer *y = &m->layer[layer];
    uint32_t hidden = m->config.hidden, inner = m->config.expert_hidden;
    const uint16_t *w13 = (const uint16_t *)(const void *)(y->w13 + slot * y->w13_stride);
    const uint16_t *w2 = (const uint16_t *)(const void *)(y->w2 + slot * y->w2_stride);
    float *gate = scratch, *up = scratch + inner, *act = scratch + 2 * (size_t)inner;
    if (m->layout == DECODER_LAYOUT_ROWS)
        matvec(w13, h, 2 * inner, hidden, gate);
    else
        vecmat(w13, h, hidden, 2 * inner, gate);
    for (uint32_t i = 0; i < inner; i++)
        act[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    if (m->layout == DECODER_LAYOUT_ROWS)
        matvec(w2, act, hidden, inner, ret_out);
    else
        vecmat(w2, act, inner, hidden, ret_out);
}

void decoder_logits(const struct decoder *m, const float *x, float *ret_logits)
{
    float h[m->config.hidden];
    rms_norm(x, m->norm, m->config.hidden, m->config.rms_eps, h);
    matvec(m->lm_head, h, m->config.vocab, m->config.hidden, ret_logits);
}

int32_t decoder_argmax(const float *logits, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        best = logits[i] > logits[best] ? i : best;
    return (int32_t)best;
}
