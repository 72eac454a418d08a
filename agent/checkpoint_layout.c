/* The loader's layout.
 *
 * Dense tensors, in the order of their names, share one region, each at a multiple of 256 bytes.  The fuse recipes make
 * the expert parts: w13 is [2I, H], gate rows then up rows; w2 is [H, I]; where weights are quantised in blocks, their
 * scales are parts of the same shape in blocks.  Slots follow one another without padding, so that an engine sees one
 * array [slots, ...].  Worker thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint_internal.h"

#define DENSE_ALIGN 256u
#define PRODUCER    "loader"

const struct recipe checkpoint_recipes[RECIPES_MAX] = {
    {"w13", {PIECE_GATE, PIECE_UP}, 2},
    {"w2", {PIECE_DOWN}, 1},
    {"w13_scale_inv", {PIECE_GATE_SCALE, PIECE_UP_SCALE}, 2},
    {"w2_scale_inv", {PIECE_DOWN_SCALE}, 1},
};

static uint64_t dense_align(uint64_t offset)
{
    return (offset + DENSE_ALIGN - 1) / DENSE_ALIGN * DENSE_ALIGN;
}

/* Region 0, if there are dense tensors that have bytes. */
static int dense_lay_out(const struct checkpoint *c, struct manifest *m, struct err *err)
{
    uint64_t end = 0;
    for (size_t i = 0; i < c->n_dense; i++) {
        const struct safetensors_tensor *from = c->dense[i];
        struct tensor *t = &m->tensors[m->n_tensors];
        if (from->bytes == 0)
            continue;
        if (strlen(from->name) >= sizeof t->name)
            return err_set(err, ERR_LIMIT, "%s: the name of tensor \"%.64s...\" has more than %zu bytes", c->dir,
                           from->name, sizeof t->name - 1);
        strcpy(t->name, from->name);
        strcpy(t->dtype, from->dtype);
        t->offset = dense_align(end);
        t->dims = from->dims;
        memcpy(t->shape, from->shape, sizeof t->shape);
        end = t->offset + from->bytes;
        m->n_tensors++;
    }
    if (end > 0)
        m->regions[m->n_regions++] = (struct region){.kind = REGION_DENSE, .name = "dense", .bytes = end};
    return 0;
}

static void expert_lay_out(const struct checkpoint *c, uint32_t layer, const struct recipe *recipe, struct manifest *m)
{
    const struct safetensors_tensor *first = checkpoint_piece(c, layer, 0, recipe->pieces[0]);
    struct region *r = &m->regions[m->n_regions];
    struct tensor *t = &m->tensors[m->n_tensors++];
    *r = (struct region){.kind = REGION_EXPERT, .layer = layer, .slots = m->slots};
    snprintf(r->name, sizeof r->name, "layers.%u.experts.%s", layer, recipe->part);
    snprintf(r->part, sizeof r->part, "%s", recipe->part);
    r->slot_bytes = r->stride = first->bytes * recipe->n;
    r->bytes = r->stride * r->slots;
    *t = (struct tensor){
        .region = m->n_regions++,
        .dims = 2,
        .shape = {first->shape[0] * recipe->n, first->shape[1]},
    };
    snprintf(t->name, sizeof t->name, "%s", r->name);
    strcpy(t->dtype, first->dtype);
}

int checkpoint_manifest(const struct checkpoint *c, uint32_t slots, struct manifest *ret_m, struct err *err)
{
    struct manifest m = {.producer = PRODUCER, .layers = c->layers, .logical = c->experts, .slots = slots};
    size_t parts = (size_t)c->layers * c->n_recipes;
    m.regions = calloc(parts + 1, sizeof *m.regions);
    m.tensors = calloc(parts + c->n_dense + 1, sizeof *m.tensors);
    m.config = strdup(c->config);
    int rc = 0;
    if (!m.regions || !m.tensors || !m.config)
        rc = err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0)
        rc = dense_lay_out(c, &m, err);
    for (uint32_t layer = 0; layer < c->layers && rc == 0; layer++)
        for (size_t i = 0; i < c->n_recipes; i++)
            expert_lay_out(c, layer, &checkpoint_recipes[i], &m);
    if (rc == 0)
        rc = manifest_validate(&m, err);
    if (rc < 0) {
        manifest_done(&m);
        return rc;
    }
    *ret_m = m;
    return 0;
}
