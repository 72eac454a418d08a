/* The rules of a manifest, and what follows from one.  The encoding is in manifest_wire.c.  Pure. */
#include "agent/manifest.h"

#include <stdlib.h>
#include <string.h>

#include "agent/dtype.h"
#include "agent/weights.h"
#include "common/digest.h"

void manifest_done(struct manifest *m)
{
    free(m->regions);
    free(m->tensors);
    free(m->config);
    *m = (struct manifest){0};
}

/* ---- names: sorted pointers, so that a thousand tensors are no thousand squared comparisons ---- */

static int name_compare(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Checks that n strings, `stride` bytes apart, are terminated, not empty and all different. */
static int names_check(const char *what, const char *first, size_t stride, size_t max, uint32_t n, struct err *err)
{
    if (n == 0)
        return 0;
    const char **sorted = malloc(n * sizeof *sorted);
    if (!sorted)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = 0;
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        sorted[i] = first + i * stride;
        if (!memchr(sorted[i], '\0', max) || sorted[i][0] == '\0')
            rc = err_set(err, ERR_INVALID, "manifest: the name of %s %u is empty or too long", what, i);
    }
    if (rc == 0)
        qsort(sorted, n, sizeof *sorted, name_compare);
    for (uint32_t i = 1; i < n && rc == 0; i++)
        if (strcmp(sorted[i - 1], sorted[i]) == 0)
            rc = err_set(err, ERR_INVALID, "manifest: two %ss are called \"%s\"", what, sorted[i]);
    free(sorted);
    return rc;
}

/* ---- regions ---- */

static int region_check(const struct manifest *m, const struct region *r, struct err *err)
{
    if (r->kind == REGION_DENSE) {
        if (r->bytes == 0)
            return err_set(err, ERR_INVALID, "manifest: dense region \"%s\" is empty", r->name);
        return 0;
    }
    if (r->kind != REGION_EXPERT)
        return err_set(err, ERR_INVALID, "manifest: region \"%s\" is neither dense nor expert", r->name);
    if (r->layer >= m->layers)
        return err_set(err, ERR_INVALID, "manifest: region \"%s\" is of layer %u, but there are %u MoE layers", r->name,
                       r->layer, m->layers);
    if (!memchr(r->part, '\0', sizeof r->part) || r->part[0] == '\0')
        return err_set(err, ERR_INVALID, "manifest: the part of region \"%s\" is empty or too long", r->name);
    if (r->slots != m->slots)
        return err_set(err, ERR_INVALID, "manifest: region \"%s\" has %u slots, but a rank has %u", r->name, r->slots,
                       m->slots);
    if (r->slot_bytes == 0 || r->stride < r->slot_bytes)
        return err_set(err, ERR_INVALID, "manifest: region \"%s\" has slots of %llu bytes, %llu bytes apart", r->name,
                       (unsigned long long)r->slot_bytes, (unsigned long long)r->stride);
    uint64_t bytes;
    if (__builtin_mul_overflow((uint64_t)r->slots, r->stride, &bytes) || bytes != r->bytes)
        return err_set(err, ERR_INVALID, "manifest: region \"%s\" has %llu bytes, not slots x stride = %u x %llu",
                       r->name, (unsigned long long)r->bytes, r->slots, (unsigned long long)r->stride);
    return 0;
}

static int expert_compare(const void *a, const void *b)
{
    const struct region *x = *(const struct region *const *)a, *y = *(const struct region *const *)b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return strcmp(x->part, y->part);
}

/* Every layer has the same parts: sorted by (layer, part), layer l is a copy of layer 0. */
static int parts_check(const struct manifest *m, const struct region **sorted, size_t n, struct err *err)
{
    size_t parts = 0;
    while (parts < n && sorted[parts]->layer == 0)
        parts++;
    for (size_t i = 1; i < n; i++)
        if (expert_compare(&sorted[i - 1], &sorted[i]) == 0)
            return err_set(err, ERR_INVALID, "manifest: regions \"%s\" and \"%s\" are both part \"%s\" of layer %u",
                           sorted[i - 1]->name, sorted[i]->name, sorted[i]->part, sorted[i]->layer);
    if (parts == 0)
        return err_set(err, ERR_INVALID, "manifest: layer 0 has no expert region");
    if (parts > SLOT_EXTENTS_MAX)
        return err_set(err, ERR_INVALID, "manifest: an expert has %zu parts, at most %d can be moved", parts,
                       SLOT_EXTENTS_MAX);
    for (uint32_t layer = 0; layer < m->layers; layer++)
        for (size_t k = 0; k < parts; k++) {
            size_t i = layer * parts + k;
            if (i >= n || sorted[i]->layer != layer || strcmp(sorted[i]->part, sorted[k]->part) != 0)
                return err_set(err, ERR_INVALID, "manifest: layer %u does not have the parts of layer 0 (\"%s\")",
                               layer, sorted[k]->part);
        }
    return 0;
}

static int regions_check(const struct manifest *m, struct err *err)
{
    const struct region **experts = malloc((m->n_regions + 1u) * sizeof *experts);
    if (!experts)
        return err_set(err, ERR_NOMEM, "out of memory");
    size_t n = 0;
    uint64_t sum = 0;
    int rc = 0;
    for (uint32_t i = 0; i < m->n_regions && rc == 0; i++) {
        const struct region *r = &m->regions[i];
        rc = region_check(m, r, err);
        if (rc == 0 && (__builtin_add_overflow(sum, r->bytes, &sum) || sum > INT64_MAX))
            rc = err_set(err, ERR_INVALID, "manifest: the sizes of the regions up to \"%s\" overflow", r->name);
        if (r->kind == REGION_EXPERT)
            experts[n++] = r;
    }
    if (rc == 0 && n > 0)
        qsort(experts, n, sizeof *experts, expert_compare);
    if (rc == 0)
        rc = parts_check(m, experts, n, err);
    free(experts);
    return rc;
}

static int tensor_check(const struct manifest *m, const struct tensor *t, struct err *err)
{
    if (t->region >= m->n_regions)
        return err_set(err, ERR_INVALID, "manifest: tensor \"%s\" lies in region %u of %u", t->name, t->region,
                       m->n_regions);
    const struct region *r = &m->regions[t->region];
    uint32_t bits = memchr(t->dtype, '\0', sizeof t->dtype) ? dtype_bits(t->dtype) : 0;
    if (bits == 0)
        return err_set(err, ERR_INVALID, "manifest: tensor \"%s\" has unknown dtype \"%.16s\"", t->name, t->dtype);
    uint64_t bytes, room = r->kind == REGION_EXPERT ? r->slot_bytes : r->bytes;
    if (t->dims > TENSOR_DIMS_MAX || !dtype_bytes(bits, t->dims, t->shape, &bytes))
        return err_set(err, ERR_INVALID, "manifest: the shape of tensor \"%s\" is out of bounds", t->name);
    if (t->offset > room || bytes > room - t->offset)
        return err_set(err, ERR_INVALID, "manifest: tensor \"%s\" (%llu bytes at %llu) reaches out of region \"%s\"",
                       t->name, (unsigned long long)bytes, (unsigned long long)t->offset, r->name);
    return 0;
}

int manifest_validate(const struct manifest *m, struct err *err)
{
    if (!memchr(m->producer, '\0', sizeof m->producer) || m->producer[0] == '\0')
        return err_set(err, ERR_INVALID, "manifest: the producer is empty or too long");
    if (m->layers == 0 || m->logical == 0 || m->slots == 0)
        return err_set(err, ERR_INVALID, "manifest: %u MoE layers, %u experts, %u slots: none of them may be 0",
                       m->layers, m->logical, m->slots);
    if (m->logical > INT32_MAX)
        return err_set(err, ERR_INVALID, "manifest: %u experts are too many", m->logical);
    if ((m->n_regions > 0 && !m->regions) || (m->n_tensors > 0 && !m->tensors))
        return err_set(err, ERR_INVALID, "manifest: arrays are missing");
    int rc = names_check("region", m->regions ? m->regions->name : NULL, sizeof *m->regions, REGION_NAME_MAX,
                         m->n_regions, err);
    if (rc == 0)
        rc = names_check("tensor", m->tensors ? m->tensors->name : NULL, sizeof *m->tensors, REGION_NAME_MAX * 2,
                         m->n_tensors, err);
    if (rc == 0)
        rc = regions_check(m, err);
    for (uint32_t i = 0; i < m->n_tensors && rc == 0; i++)
        rc = tensor_check(m, &m->tensors[i], err);
    return rc;
}

/* ---- figures ---- */

/* Layers may differ in size: that of the largest. */
uint64_t manifest_expert_bytes(const struct manifest *m)
{
    uint64_t largest = 0;
    for (uint32_t layer = 0; layer < m->layers; layer++) {
        uint64_t sum = 0;
        for (uint32_t i = 0; i < m->n_regions; i++)
            if (m->regions[i].kind == REGION_EXPERT && m->regions[i].layer == layer)
                sum += m->regions[i].slot_bytes;
        if (sum > largest)
            largest = sum;
    }
    return largest;
}

uint64_t manifest_dense_bytes(const struct manifest *m)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < m->n_regions; i++)
        if (m->regions[i].kind == REGION_DENSE)
            sum += m->regions[i].bytes;
    return sum;
}

uint64_t manifest_digest(const struct blob *blob)
{
    return digest_bytes(blob->data, blob->len, 0);
}

int manifest_model(const struct manifest *m, struct model **ret_model, struct err *err)
{
    struct blob *blob;
    int rc = manifest_encode(m, &blob, err);
    if (rc < 0)
        return rc;
    uint32_t n_dense = 0;
    for (uint32_t i = 0; i < m->n_regions; i++)
        n_dense += m->regions[i].kind == REGION_DENSE;
    struct model *model = model_new(m->layers, m->logical, m->slots, n_dense);
    if (!model) {
        blob_unref(blob);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    model->manifest = blob;
    model->manifest_digest = manifest_digest(blob);
    model->expert_bytes = manifest_expert_bytes(m);
    model->dense_bytes = manifest_dense_bytes(m);
    model->sealed = strcmp(m->producer, MANIFEST_LOADER) != 0;
    *ret_model = model;
    return 0;
}
