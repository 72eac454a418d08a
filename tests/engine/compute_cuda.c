/* The arithmetic of a step on the GPU that the weights lie on: the kernels of kernels.cu, launched by the driver on one
 * stream.  The exchange between ranks goes over the host, so every layer is waited for twice.  See compute.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/cuda_driver.h"
#include "tests/engine/compute.h"

/* Memory on the device with a pinned twin on the host. */
struct buffer {
    CUdeviceptr at;
    void *host;
    size_t bytes;
};

enum kernel_index {
#define KERNEL_INDEX(name) KERNEL_##name,
    KERNEL_TABLE(KERNEL_INDEX) KERNELS
#undef KERNEL_INDEX
};
static const char *const kernel_names[] = {
#define KERNEL_NAME(name) #name "_kernel",
    KERNEL_TABLE(KERNEL_NAME)
#undef KERNEL_NAME
};

/* Consecutive tokens of one sequence. */
struct run {
    uint32_t first, n;
};

struct compute_cuda {
    struct compute base; /* first: the pointers are exchanged */
    struct cuda_device *device;
    CUstream stream;
    CUmodule module;
    CUfunction kernels[KERNELS];
    CUdeviceptr rope;
    const struct forward_token *tokens;
    uint32_t n;
    struct run *runs;
    uint32_t n_runs, room;
    struct buffer token, x, h, q, att, scores, y;         /* of the own tokens */
    struct buffer route_h, route_logits, choices;         /* of tokens that are routed */
    struct buffer items, item_h, gate_up, act, out, wrong; /* of the experts' items */
    struct buffer logits;
};

static const struct cuda_driver *driver(const struct compute_cuda *c)
{
    return &c->device->driver;
}

static int settle(struct compute_cuda *c, struct err *err)
{
    return cuda_check(driver(c), driver(c)->cuStreamSynchronize(c->stream), err, "compute on GPU %d",
                      c->device->gpu.index);
}

/* ---- buffers ---- */

static void buffer_done(struct compute_cuda *c, struct buffer *b)
{
    if (b->at)
        (void)driver(c)->cuMemFree(b->at);
    if (b->host)
        (void)driver(c)->cuMemFreeHost(b->host);
    *b = (struct buffer){0};
}

/* What was in it is lost when it grows. */
static int buffer_fit(struct compute_cuda *c, struct buffer *b, size_t bytes, struct err *err)
{
    if (bytes <= b->bytes)
        return 0;
    size_t room = b->bytes ? b->bytes : 4096;
    while (room < bytes)
        room *= 2;
    int rc = settle(c, err);
    if (rc)
        return rc;
    buffer_done(c, b);
    rc = cuda_check(driver(c), driver(c)->cuMemAlloc(&b->at, room), err, "allocate %zu bytes of GPU memory", room);
    if (rc == 0)
        rc = cuda_check(driver(c), driver(c)->cuMemHostAlloc(&b->host, room, 0), err, "pin %zu bytes", room);
    if (rc == 0)
        b->bytes = room;
    else
        buffer_done(c, b);
    return rc;
}

static int buffer_up(struct compute_cuda *c, struct buffer *b, const void *from, size_t bytes, struct err *err)
{
    if (bytes == 0)
        return 0;
    memcpy(b->host, from, bytes);
    return cuda_check(driver(c), driver(c)->cuMemcpyHtoDAsync(b->at, b->host, bytes, c->stream), err,
                      "copy %zu bytes to the GPU", bytes);
}

static int buffer_down(struct compute_cuda *c, struct buffer *b, size_t bytes, struct err *err)
{
    if (bytes == 0)
        return 0;
    return cuda_check(driver(c), driver(c)->cuMemcpyDtoHAsync(b->host, b->at, bytes, c->stream), err,
                      "copy %zu bytes from the GPU", bytes);
}

static void *on_device(CUdeviceptr at)
{
    return (void *)(uintptr_t)at; /* for the kernels alone */
}

/* ---- launches ---- */

static int launch(struct compute_cuda *c, enum kernel_index which, void *args, uint64_t threads, struct err *err)
{
    void *params[] = {args};
    if (threads == 0)
        return 0;
    return cuda_check(driver(c),
                      driver(c)->cuLaunchKernel(c->kernels[which],
                                                (unsigned)((threads + KERNEL_THREADS - 1) / KERNEL_THREADS), 1, 1,
                                                KERNEL_THREADS, 1, 1, 0, c->stream, params, NULL),
                      err, "start %s", kernel_names[which]);
}

static int norm(struct compute_cuda *c, CUdeviceptr x, const uint16_t *weight, CUdeviceptr out, uint32_t rows,
                uint32_t width, struct err *err)
{
    struct norm_args a = {on_device(x), weight, on_device(out), rows, width, c->base.model->config.rms_eps};
    return launch(c, KERNEL_norm, &a, rows, err);
}

static int matmul(struct compute_cuda *c, const uint16_t *w, CUdeviceptr x, CUdeviceptr out, uint32_t n, uint32_t rows,
                  uint32_t cols, bool add, struct err *err)
{
    struct matmul_args a = {w, on_device(x), on_device(out), n, rows, cols, rows, add};
    return launch(c, KERNEL_matmul, &a, (uint64_t)n * rows, err);
}

static int heads(struct compute_cuda *c, CUdeviceptr x, const uint16_t *weight, uint32_t n, uint32_t n_heads,
                 uint32_t first, struct err *err)
{
    const struct decoder_config *m = &c->base.model->config;
    int rc = weight ? norm(c, x, weight, x, n * n_heads, m->head_dim, err) : 0;
    struct rope_args a = {on_device(x), on_device(c->rope), n, n_heads, m->head_dim, first, m->max_positions};
    return rc ? rc : launch(c, KERNEL_rope, &a, (uint64_t)n * n_heads * (m->head_dim / 2), err);
}

/* ---- a step ---- */

static int runs_find(struct compute_cuda *c, struct err *err)
{
    const struct forward_token *t = c->tokens;
    if (c->n > c->room) {
        struct run *runs = realloc(c->runs, c->n * sizeof *runs);
        if (!runs)
            return err_set(err, ERR_NOMEM, "out of memory for a step of %u tokens", c->n);
        c->runs = runs;
        c->room = c->n;
    }
    c->n_runs = 0;
    for (uint32_t i = 0; i < c->n; i++) {
        bool on = i > 0 && t[i].kv == t[i - 1].kv && t[i].position == t[i - 1].position + 1;
        if (!on)
            c->runs[c->n_runs++] = (struct run){.first = i};
        c->runs[c->n_runs - 1].n++;
    }
    return 0;
}

static int step_room(struct compute_cuda *c, uint32_t n, size_t scores, struct err *err)
{
    const struct decoder_config *m = &c->base.model->config;
    size_t hidden = (size_t)n * m->hidden * sizeof(float), q = (size_t)n * m->heads * m->head_dim * sizeof(float);
    int rc = buffer_fit(c, &c->token, n * sizeof(int32_t), err);
    struct buffer *const wide[] = {&c->x, &c->h, &c->y}, *const narrow[] = {&c->q, &c->att};
    for (size_t i = 0; i < 3 && rc == 0; i++)
        rc = buffer_fit(c, wide[i], hidden, err);
    for (size_t i = 0; i < 2 && rc == 0; i++)
        rc = buffer_fit(c, narrow[i], q, err);
    return rc ? rc : buffer_fit(c, &c->scores, scores * sizeof(float), err);
}

/* Of the run that needs most. */
static size_t scores_of(const struct compute_cuda *c)
{
    size_t most = 0;
    for (uint32_t i = 0; i < c->n_runs; i++) {
        const struct run *r = &c->runs[i];
        size_t need = (size_t)r->n * c->base.model->config.heads * (c->tokens[r->first].position + r->n);
        most = need > most ? need : most;
    }
    return most;
}

static int cuda_begin(struct compute *self, const struct forward_token *tokens, uint32_t n, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    const struct decoder *m = self->model;
    c->tokens = tokens;
    c->n = n;
    int rc = runs_find(c, err);
    if (rc == 0)
        rc = step_room(c, n, scores_of(c), err);
    if (rc || n == 0)
        return rc;
    int32_t *ids = c->token.host;
    for (uint32_t i = 0; i < n; i++)
        ids[i] = tokens[i].token;
    rc = cuda_check(driver(c), driver(c)->cuMemcpyHtoDAsync(c->token.at, ids, n * sizeof *ids, c->stream), err,
                    "copy tokens to the GPU");
    struct embed_args a = {m->embed,        on_device(c->token.at), on_device(c->x.at), n, m->config.hidden,
                           m->config.vocab};
    return rc ? rc : launch(c, KERNEL_embed, &a, (uint64_t)n * m->config.hidden, err);
}

static CUdeviceptr kv_at(const struct decoder_config *m, const struct decoder_kv *kv, uint32_t layer, uint32_t value,
                         uint32_t position)
{
    size_t width = (size_t)m->kv_heads * m->head_dim;
    return (CUdeviceptr)(uintptr_t)kv->data +
           ((((size_t)layer * 2 + value) * kv->positions) + position) * width * sizeof(float);
}

static int run_attend(struct compute_cuda *c, uint32_t layer, const struct run *r, struct err *err)
{
    const struct decoder_config *m = &c->base.model->config;
    const struct decoder_layer *y = &c->base.model->layer[layer];
    const struct forward_token *t = &c->tokens[r->first];
    uint32_t kv_width = m->kv_heads * m->head_dim, q_width = m->heads * m->head_dim;
    CUdeviceptr h = c->h.at + (size_t)r->first * m->hidden * sizeof(float);
    CUdeviceptr q = c->q.at + (size_t)r->first * q_width * sizeof(float);
    CUdeviceptr k = kv_at(m, t->kv, layer, 0, t->position), v = kv_at(m, t->kv, layer, 1, t->position);
    int rc = matmul(c, y->k, h, k, r->n, kv_width, m->hidden, false, err);
    if (rc == 0)
        rc = matmul(c, y->v, h, v, r->n, kv_width, m->hidden, false, err);
    if (rc == 0)
        rc = heads(c, q, y->q_norm, r->n, m->heads, t->position, err);
    if (rc == 0)
        rc = heads(c, k, y->k_norm, r->n, m->kv_heads, t->position, err);
    struct attend_args a = {.q = on_device(q),
                            .k = on_device(kv_at(m, t->kv, layer, 0, 0)),
                            .v = on_device(kv_at(m, t->kv, layer, 1, 0)),
                            .scores = on_device(c->scores.at),
                            .out = on_device(c->att.at + (size_t)r->first * q_width * sizeof(float)),
                            .n = r->n,
                            .first = t->position,
                            .heads = m->heads,
                            .kv_heads = m->kv_heads,
                            .head_dim = m->head_dim,
                            .positions = t->kv->positions};
    return rc ? rc : launch(c, KERNEL_attend, &a, (uint64_t)r->n * m->heads, err);
}

static int cuda_attend(struct compute *self, uint32_t layer, float *ret_h, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    const struct decoder_config *m = &self->model->config;
    const struct decoder_layer *y = &self->model->layer[layer];
    uint32_t q_width = m->heads * m->head_dim;
    size_t bytes = (size_t)c->n * m->hidden * sizeof(float);
    if (c->n == 0)
        return 0;
    int rc = norm(c, c->x.at, y->input_norm, c->h.at, c->n, m->hidden, err);
    if (rc == 0)
        rc = matmul(c, y->q, c->h.at, c->q.at, c->n, q_width, m->hidden, false, err);
    for (uint32_t i = 0; i < c->n_runs && rc == 0; i++)
        rc = run_attend(c, layer, &c->runs[i], err);
    if (rc == 0)
        rc = matmul(c, y->o, c->att.at, c->x.at, c->n, m->hidden, q_width, true, err);
    if (rc == 0)
        rc = norm(c, c->x.at, y->post_norm, c->h.at, c->n, m->hidden, err);
    if (rc == 0)
        rc = buffer_down(c, &c->h, bytes, err);
    if (rc == 0)
        rc = settle(c, err);
    if (rc == 0)
        memcpy(ret_h, c->h.host, bytes);
    return rc;
}

static int cuda_add(struct compute *self, const float *y, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    uint64_t n = (uint64_t)c->n * self->model->config.hidden;
    int rc = buffer_up(c, &c->y, y, n * sizeof(float), err);
    struct add_args a = {on_device(c->x.at), on_device(c->y.at), n};
    return rc ? rc : launch(c, KERNEL_add, &a, n, err);
}

static int cuda_logits(struct compute *self, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    const struct decoder *m = self->model;
    size_t row = m->config.vocab * sizeof(float);
    uint32_t asked = 0;
    for (uint32_t i = 0; i < c->n; i++)
        asked += c->tokens[i].logits != NULL;
    int rc = buffer_fit(c, &c->logits, asked * row, err);
    if (rc == 0 && c->n)
        rc = norm(c, c->x.at, m->norm, c->h.at, c->n, m->config.hidden, err);
    for (uint32_t i = 0, at = 0; i < c->n && rc == 0; i++)
        if (c->tokens[i].logits)
            rc = matmul(c, m->lm_head, c->h.at + (size_t)i * m->config.hidden * sizeof(float), c->logits.at + at++ * row,
                        1, m->config.vocab, m->config.hidden, false, err);
    if (rc == 0)
        rc = buffer_down(c, &c->logits, asked * row, err);
    if (rc == 0)
        rc = settle(c, err);
    for (uint32_t i = 0, at = 0; i < c->n && rc == 0; i++)
        if (c->tokens[i].logits)
            memcpy(c->tokens[i].logits, (uint8_t *)c->logits.host + at++ * row, row);
    return rc;
}

/* ---- routing and experts ---- */

static int route_room(struct compute_cuda *c, uint32_t n, struct err *err)
{
    const struct decoder_config *m = &c->base.model->config;
    int rc = buffer_fit(c, &c->route_h, (size_t)n * m->hidden * sizeof(float), err);
    if (rc == 0)
        rc = buffer_fit(c, &c->route_logits, (size_t)n * m->experts * sizeof(float), err);
    return rc ? rc : buffer_fit(c, &c->choices, (size_t)n * m->top_k * sizeof(struct choice), err);
}

static int cuda_route(struct compute *self, uint32_t layer, const struct compute_maps *maps, uint32_t source,
                      const float *h, uint32_t n, struct choice *ret_choices, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    const struct decoder_config *m = &self->model->config;
    const struct eep_maps *p = maps->maps;
    size_t bytes = (size_t)n * m->hidden * sizeof *h, choices = (size_t)n * m->top_k * sizeof *ret_choices;
    if (n == 0)
        return 0;
    int rc = route_room(c, n, err);
    if (rc == 0)
        rc = buffer_up(c, &c->route_h, h, bytes, err);
    if (rc == 0)
        rc = matmul(c, self->model->layer[layer].router, c->route_h.at, c->route_logits.at, n, m->experts, m->hidden,
                    false, err);
    if (rc)
        return rc;
    struct topk_args a = {
        .logits = on_device(c->route_logits.at),
        .logical_to_physical_map =
            p->device_logical_to_physical_map + (size_t)layer * p->logical * p->max_replicas,
        .logical_replica_count = p->device_logical_replica_count + (size_t)layer * p->logical,
        .out = on_device(c->choices.at),
        .step = maps->step,
        .n = n,
        .experts = m->experts,
        .top_k = m->top_k,
        .norm = m->norm_topk,
        .max_replicas = p->max_replicas,
        .source = source,
    };
    rc = launch(c, KERNEL_topk, &a, n, err);
    if (rc == 0)
        rc = buffer_down(c, &c->choices, choices, err);
    if (rc == 0)
        rc = settle(c, err);
    if (rc == 0)
        memcpy(ret_choices, c->choices.host, choices);
    return rc;
}

static int items_room(struct compute_cuda *c, uint32_t n, struct err *err)
{
    const struct decoder_config *m = &c->base.model->config;
    size_t hidden = (size_t)n * m->hidden * sizeof(float), inner = (size_t)n * m->expert_hidden * sizeof(float);
    int rc = buffer_fit(c, &c->items, n * sizeof(struct item), err);
    if (rc == 0)
        rc = buffer_fit(c, &c->item_h, hidden, err);
    if (rc == 0)
        rc = buffer_fit(c, &c->gate_up, 2 * inner, err);
    if (rc == 0)
        rc = buffer_fit(c, &c->act, inner, err);
    if (rc == 0)
        rc = buffer_fit(c, &c->out, hidden, err);
    return rc ? rc : buffer_fit(c, &c->wrong, sizeof(uint32_t), err);
}

static int items_check(struct compute_cuda *c, uint32_t layer, const struct compute_maps *maps, uint32_t n,
                       struct err *err)
{
    const struct eep_maps *p = maps->maps;
    struct items_args a = {
        .items = on_device(c->items.at),
        .held = p->device_physical_to_logical_map + ((size_t)layer * p->max_ranks + maps->self) * p->slots,
        .load = (unsigned long long *)p->device_expert_load + (size_t)layer * p->slots,
        .wrong = on_device(c->wrong.at),
        .n = n,
        .slots = p->slots,
    };
    int rc = cuda_check(driver(c), driver(c)->cuMemsetD8Async(c->wrong.at, 0, sizeof(uint32_t), c->stream), err,
                        "clear a word");
    if (rc == 0)
        rc = launch(c, KERNEL_items, &a, n, err);
    return rc ? rc : buffer_down(c, &c->wrong, sizeof(uint32_t), err);
}

static int items_compute(struct compute_cuda *c, uint32_t layer, uint32_t n, struct err *err)
{
    const struct decoder *m = c->base.model;
    const struct decoder_layer *y = &m->layer[layer];
    uint32_t hidden = m->config.hidden, inner = m->config.expert_hidden;
    uint32_t transposed = m->layout == DECODER_LAYOUT_TRANSPOSED;
    struct expert_args up = {on_device(c->items.at), y->w13, on_device(c->item_h.at), on_device(c->gate_up.at),
                             y->w13_stride,          n,      hidden,                  2 * inner,
                             m->slots,               transposed};
    struct act_args act = {on_device(c->gate_up.at), on_device(c->act.at), n, inner};
    struct expert_args down = {on_device(c->items.at), y->w2, on_device(c->act.at), on_device(c->out.at), y->w2_stride,
                               n, inner, hidden, m->slots, transposed};
    int rc = launch(c, KERNEL_expert, &up, (uint64_t)n * 2 * inner, err);
    if (rc == 0)
        rc = launch(c, KERNEL_act, &act, (uint64_t)n * inner, err);
    return rc ? rc : launch(c, KERNEL_expert, &down, (uint64_t)n * hidden, err);
}

static int cuda_experts(struct compute *self, uint32_t layer, const struct compute_maps *maps, const struct item *items,
                        const float *h, uint32_t n, float *ret_out, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    size_t bytes = (size_t)n * self->model->config.hidden * sizeof *h;
    if (n == 0)
        return 0;
    int rc = items_room(c, n, err);
    if (rc == 0)
        rc = buffer_up(c, &c->items, items, n * sizeof *items, err);
    if (rc == 0)
        rc = buffer_up(c, &c->item_h, h, bytes, err);
    if (rc == 0)
        rc = items_check(c, layer, maps, n, err);
    if (rc == 0)
        rc = items_compute(c, layer, n, err);
    if (rc == 0)
        rc = buffer_down(c, &c->out, bytes, err);
    if (rc == 0)
        rc = settle(c, err);
    if (rc)
        return rc;
    uint32_t wrong = *(const uint32_t *)c->wrong.host;
    if (wrong)
        return err_set(err, ERR_CORRUPT, "a token for expert %u in slot %u of layer %u, which holds another expert",
                       items[wrong - 1].expert, items[wrong - 1].slot, layer);
    memcpy(ret_out, c->out.host, bytes);
    return 0;
}

static int cuda_busy(struct compute *self, uint32_t us, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    struct spin_args a = {(uint64_t)us * 1000};
    return launch(c, KERNEL_spin, &a, 64 * KERNEL_THREADS, err);
}

/* ---- keys and values ---- */

static int cuda_kv_init(struct compute *self, uint32_t positions, struct decoder_kv *ret_kv, struct err *err)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    size_t bytes = decoder_kv_bytes(&self->model->config, positions);
    CUdeviceptr at;
    int rc = cuda_check(driver(c), driver(c)->cuMemAlloc(&at, bytes), err, "allocate %zu bytes for keys and values",
                        bytes);
    if (rc == 0)
        *ret_kv = (struct decoder_kv){.positions = positions, .data = on_device(at)};
    return rc;
}

static void cuda_kv_done(struct compute *self, struct decoder_kv *kv)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    if (kv->data && settle(c, NULL) == 0)
        (void)driver(c)->cuMemFree((CUdeviceptr)(uintptr_t)kv->data);
    *kv = (struct decoder_kv){0};
}

/* ---- open and close ---- */

static void cuda_close(struct compute *self)
{
    struct compute_cuda *c = (struct compute_cuda *)self;
    struct buffer *const all[] = {&c->token,   &c->x,     &c->h,      &c->q,       &c->att, &c->scores,
                                  &c->y,       &c->route_h, &c->route_logits, &c->choices, &c->items, &c->item_h,
                                  &c->gate_up, &c->act,   &c->out,    &c->wrong,   &c->logits};
    if (cuda_device_use(c->device, NULL) == 0) {
        if (c->stream)
            (void)driver(c)->cuStreamSynchronize(c->stream);
        for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
            buffer_done(c, all[i]);
        if (c->rope)
            (void)driver(c)->cuMemFree(c->rope);
        if (c->module)
            (void)driver(c)->cuModuleUnload(c->module);
        if (c->stream)
            (void)driver(c)->cuStreamDestroy(c->stream);
    }
    cuda_device_close(c->device);
    free(c->runs);
    free(c);
}

static int cuda_kernels(struct compute_cuda *c, struct err *err)
{
    const void *image = kernels_image();
    if (!image)
        return err_set(err, ERR_UNSUPPORTED, "this build of the engine has no kernels: nvcc was not found");
    int rc = cuda_check(driver(c), driver(c)->cuModuleLoadData(&c->module, image), err, "load the engine's kernels");
    for (size_t i = 0; i < KERNELS && rc == 0; i++)
        rc = cuda_check(driver(c), driver(c)->cuModuleGetFunction(&c->kernels[i], c->module, kernel_names[i]), err,
                        "find %s", kernel_names[i]);
    return rc;
}

static int cuda_rope(struct compute_cuda *c, struct err *err)
{
    const struct decoder *m = c->base.model;
    size_t bytes = (size_t)m->config.max_positions * m->config.head_dim * sizeof *m->rope;
    int rc = cuda_check(driver(c), driver(c)->cuMemAlloc(&c->rope, bytes), err, "allocate %zu bytes of GPU memory", bytes);
    if (rc == 0)
        rc = cuda_check(driver(c), driver(c)->cuMemcpyHtoDAsync(c->rope, m->rope, bytes, c->stream), err,
                        "copy the angles to the GPU");
    return rc ? rc : settle(c, err);
}

static int device_at(int device, struct cuda_device **ret_device, struct err *err)
{
    char which[16];
    snprintf(which, sizeof which, "%d", device);
    return cuda_device_open(which, ret_device, err);
}

int compute_cuda_open(const struct decoder *model, int device, uint32_t sequences, uint32_t chunk,
                      struct compute **ret_compute, struct err *err)
{
    uint32_t tokens = sequences * chunk;
    struct compute_cuda *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = device_at(device, &c->device, err);
    if (rc) {
        free(c);
        return rc;
    }
    c->base = (struct compute){.name = "cuda",
                               .model = model,
                               .begin = cuda_begin,
                               .attend = cuda_attend,
                               .add = cuda_add,
                               .logits = cuda_logits,
                               .route = cuda_route,
                               .experts = cuda_experts,
                               .busy = cuda_busy,
                               .kv_init = cuda_kv_init,
                               .kv_done = cuda_kv_done,
                               .close = cuda_close};
    rc = cuda_check(driver(c), driver(c)->cuStreamCreate(&c->stream, CU_STREAM_NON_BLOCKING), err, "create a stream");
    c->base.stream = c->stream;
    if (rc == 0)
        rc = cuda_kernels(c, err);
    if (rc == 0)
        rc = cuda_rope(c, err);
    if (rc == 0)
        rc = step_room(c, tokens, (size_t)tokens * model->config.heads * 64, err);
    if (rc == 0)
        rc = route_room(c, tokens, err);
    if (rc == 0)
        rc = items_room(c, tokens * model->config.top_k, err);
    if (rc == 0)
        rc = buffer_fit(c, &c->logits, (size_t)sequences * model->config.vocab * sizeof(float), err);
    if (rc) {
        cuda_close(&c->base);
        return rc;
    }
    *ret_compute = &c->base;
    return 0;
}

int compute_write(int device, void *dst, const void *src, size_t bytes, struct err *err)
{
    struct cuda_device *d;
    if (device < 0) {
        memcpy(dst, src, bytes);
        return 0;
    }
    int rc = device_at(device, &d, err); /* the context is there already: this is cheap */
    if (rc)
        return rc;
    CUstream stream = NULL;
    rc = cuda_check(&d->driver, d->driver.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), err, "create a stream");
    if (rc == 0) {
        rc = cuda_check(&d->driver, d->driver.cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)dst, src, bytes, stream), err,
                        "copy %zu bytes to the GPU", bytes);
        if (rc == 0)
            rc = cuda_check(&d->driver, d->driver.cuStreamSynchronize(stream), err, "copy %zu bytes to the GPU", bytes);
        (void)d->driver.cuStreamDestroy(stream);
    }
    cuda_device_close(d);
    return rc;
}
