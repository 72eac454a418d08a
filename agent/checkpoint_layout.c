/* The loader's layout.
 *
 * Dense tensors, in the order of their names, share one region, each at a multiple of 256 bytes.  A part of an expert
 * is one tensor, or two alike one under the other: as rows where the first dimension counts rows of the weights, or
 * blocks of them, else as a dimension of two.  Slots follow one another without padding, so that an engine sees one
 * array [slots, ...].  Worker thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint_internal.h"

#define DENSE_ALIGN 256u

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

/* Two tensors one under the other: twice the rows, if rows they are; false: that has too many dimensions. */
static bool stack_two(const struct piece *p, uint64_t rows, struct tensor *t)
{
    if (p->dims > 0 && rows % p->shape[0] == 0) {
        t->shape[0] *= 2;
        return true;
    }
    if (p->dims == TENSOR_DIMS_MAX)
        return false;
    memmove(&t->shape[1], &t->shape[0], p->dims * sizeof t->shape[0]);
    t->shape[0] = 2;
    t->dims++;
    return true;
}

/* The rows of the gate projection itself, which come first among the tails. */
static uint64_t gate_rows(const struct checkpoint *c, uint32_t layer)
{
    struct piece first = checkpoint_piece(c, layer, 0, 0);
    return first.dims > 0 ? first.shape[0] : 1;
}

static int expert_lay_out(const struct checkpoint *c, uint32_t layer, const struct part *part, struct manifest *m,
                          struct err *err)
{
    struct piece first = checkpoint_piece(c, layer, 0, part->tails[0]);
    struct region *r = &m->regions[m->n_regions];
    struct tensor *t = &m->tensors[m->n_tensors++];
    *r = (struct region){.kind = REGION_EXPERT, .layer = layer, .slots = m->slots};
    snprintf(r->name, sizeof r->name, "layers.%u.experts.%s", layer, part->name);
    snprintf(r->part, sizeof r->part, "%s", part->name);
    r->slot_bytes = r->stride = first.bytes * part->n;
    r->bytes = r->stride * r->slots;
    *t = (struct tensor){.region = m->n_regions++, .dims = first.dims};
    memcpy(t->shape, first.shape, first.dims * sizeof t->shape[0]);
    snprintf(t->name, sizeof t->name, "%s", r->name);
    strcpy(t->dtype, first.tensor->dtype);
    if (part->n == 2 && !stack_two(&first, gate_rows(c, layer), t))
        return err_set(err, ERR_UNSUPPORTED, "%s: \"%s\" has too many dimensions", c->dir, first.tensor->name);
    return 0;
}

int checkpoint_manifest(const struct checkpoint *c, uint32_t slots, struct manifest *ret_m, struct err *err)
{
    struct manifest m = {.producer = MANIFEST_LOADER, .layers = c->layers, .logical = c->experts, .slots = slots};
    size_t parts = (size_t)c->layers * c->n_parts;
    m.regions = calloc(parts + 1, sizeof *m.regions);
    m.tensors = calloc(parts + c->n_dense + 1, sizeof *m.tensors);
    m.config = strdup(c->config.text);
    int rc = 0;
    if (!m.regions || !m.tensors || !m.config)
        rc = err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0)
        rc = dense_lay_out(c, &m, err);
    for (uint32_t layer = 0; layer < c->layers && rc == 0; layer++)
        for (size_t i = 0; i < c->n_parts && rc == 0; i++)
            rc = expert_lay_out(c, layer, &c->parts[i], &m, err);
    if (rc == 0)
        rc = manifest_validate(&m, err);
    if (rc < 0) {
        manifest_done(&m);
        return rc;
    }
    *ret_m = m;
    return 0;
}

int checkpoint_manifest_digest(const struct checkpoint *c, uint32_t slots, uint64_t *ret_digest, struct err *err)
{
    struct manifest m;
    struct blob *blob;
    int rc = checkpoint_manifest(c, slots, &m, err);
    if (rc < 0)
        return rc;
    rc = manifest_encode(&m, &blob, err);
    manifest_done(&m);
    if (rc < 0)
        return rc;
    *ret_digest = manifest_digest(blob);
    blob_unref(blob);
    return 0;
}
