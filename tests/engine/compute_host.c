/* The arithmetic of a step on the host, token by token, by decoder.c.  See compute.h. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/digest.h"
#include "tests/engine/compute.h"

#define TOP_K_ROOM 64

struct compute_host {
    struct compute base; /* first: the pointers are exchanged */
    const struct forward_token *tokens;
    uint32_t n;
    float *x, *q; /* [n][hidden], [n][heads * head_dim] */
    size_t room;
};

static int host_begin(struct compute *self, const struct forward_token *tokens, uint32_t n, struct err *err)
{
    struct compute_host *c = (struct compute_host *)self;
    const struct decoder_config *m = &self->model->config;
    size_t q_width = (size_t)m->heads * m->head_dim;
    if (n > c->room) {
        float *x = realloc(c->x, n * (m->hidden + q_width) * sizeof *x);
        if (!x)
            return err_set(err, ERR_NOMEM, "out of memory for a step of %u tokens", n);
        c->x = x;
        c->room = n;
    }
    c->q = c->x + c->room * m->hidden;
    c->tokens = tokens;
    c->n = n;
    for (uint32_t i = 0; i < n; i++)
        decoder_embed(self->model, tokens[i].token, c->x + (size_t)i * m->hidden);
    return 0;
}

static int host_attend(struct compute *self, uint32_t layer, float *ret_h, struct err *err)
{
    struct compute_host *c = (struct compute_host *)self;
    const struct decoder *m = self->model;
    size_t hidden = m->config.hidden, q_width = (size_t)m->config.heads * m->config.head_dim;
    const struct forward_token *t = c->tokens;
    /* All keys before any attention: a prompt's tokens see one another. */
    for (uint32_t i = 0; i < c->n; i++)
        decoder_qkv(m, layer, c->x + i * hidden, t[i].position, t[i].kv, c->q + i * q_width);
    for (uint32_t i = 0; i < c->n; i++) {
        if (decoder_attend(m, layer, c->q + i * q_width, t[i].position, t[i].kv, c->x + i * hidden))
            return err_set(err, ERR_NOMEM, "out of memory for attention");
        decoder_moe_input(m, layer, c->x + i * hidden, ret_h + i * hidden);
    }
    return 0;
}

static int host_add(struct compute *self, const float *y, struct err *err)
{
    struct compute_host *c = (struct compute_host *)self;
    (void)err;
    for (size_t i = 0; i < (size_t)c->n * self->model->config.hidden; i++)
        c->x[i] += y[i];
    return 0;
}

static int host_logits(struct compute *self, struct err *err)
{
    struct compute_host *c = (struct compute_host *)self;
    (void)err;
    for (uint32_t i = 0; i < c->n; i++)
        if (c->tokens[i].logits)
            decoder_logits(self->model, c->x + (size_t)i * self->model->config.hidden, c->tokens[i].logits);
    return 0;
}

/* The physical slot that computes this choice: spread over the replicas, the same on every rank that asks. */
static int32_t pick(const struct compute_maps *m, uint32_t layer, uint32_t expert, uint32_t source, uint32_t token)
{
    const struct eep_maps *maps = m->maps;
    size_t at = (size_t)layer * maps->logical + expert;
    int32_t count = maps->logical_replica_count[at];
    if (count < 1 || (uint32_t)count > maps->max_replicas)
        return -1;
    uint64_t seed = digest_mix(((uint64_t)source << 32) | token, m->step);
    return maps->logical_to_physical_map[at * maps->max_replicas + seed % (uint32_t)count];
}

static int host_route(struct compute *self, uint32_t layer, const struct compute_maps *maps, uint32_t source,
                      const float *h, uint32_t n, struct choice *ret_choices, struct err *err)
{
    const struct decoder_config *c = &self->model->config;
    uint32_t expert[TOP_K_ROOM];
    float weight[TOP_K_ROOM];
    (void)err;
    for (uint32_t i = 0; i < n; i++) {
        decoder_route(self->model, layer, maps->maps->logical_replica_count + (size_t)layer * c->experts,
                      h + (size_t)i * c->hidden, expert, weight);
        for (uint32_t k = 0; k < c->top_k; k++)
            ret_choices[(size_t)i * c->top_k + k] =
                (struct choice){expert[k], pick(maps, layer, expert[k], source, i), weight[k]};
    }
    return 0;
}

static int host_experts(struct compute *self, uint32_t layer, const struct compute_maps *m, const struct item *items,
                        const float *h, uint32_t n, float *ret_out, struct err *err)
{
    const struct eep_maps *maps = m->maps;
    size_t hidden = self->model->config.hidden;
    float scratch[3 * self->model->config.expert_hidden];
    const int32_t *held = maps->physical_to_logical_map + ((size_t)layer * maps->max_ranks + m->self) * maps->slots;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = items[i].slot, expert = items[i].expert;
        if (slot >= maps->slots || (held[slot] >= 0 && (uint32_t)held[slot] != expert))
            return err_set(err, ERR_CORRUPT, "a token for expert %u in slot %u of layer %u, which holds expert %d",
                           expert, slot, layer, slot < maps->slots ? held[slot] : -1);
        decoder_expert(self->model, layer, slot, h + i * hidden, scratch, ret_out + i * hidden);
        __atomic_fetch_add(&maps->expert_load[(size_t)layer * maps->slots + slot], 1, __ATOMIC_RELAXED);
    }
    return 0;
}

static int host_busy(struct compute *self, uint32_t us, struct err *err)
{
    struct timespec begin, now;
    (void)self, (void)err;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    do
        clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - begin.tv_sec) * 1000000 + (now.tv_nsec - begin.tv_nsec) / 1000 < (long)us);
    return 0;
}

static int host_kv_init(struct compute *self, uint32_t positions, struct decoder_kv *ret_kv, struct err *err)
{
    return decoder_kv_init(&self->model->config, positions, ret_kv, err);
}

static void host_kv_done(struct compute *self, struct decoder_kv *kv)
{
    (void)self;
    decoder_kv_done(kv);
}

static void host_close(struct compute *self)
{
    struct compute_host *c = (struct compute_host *)self;
    free(c->x);
    free(c);
}

int compute_host_open(const struct decoder *model, struct compute **ret_compute, struct err *err)
{
    struct compute_host *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NOMEM, "out of memory");
    c->base = (struct compute){.name = "host",
                               .model = model,
                               .begin = host_begin,
                               .attend = host_attend,
                               .add = host_add,
                               .logits = host_logits,
                               .route = host_route,
                               .experts = host_experts,
                               .busy = host_busy,
                               .kv_init = host_kv_init,
                               .kv_done = host_kv_done,
                               .close = host_close};
    *ret_compute = &c->base;
    return 0;
}
