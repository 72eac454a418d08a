/* The memory of a manifest's regions, and the ranges in it.  See weights.h.  Worker thread. */
#include "agent/weights.h"

#include <stdlib.h>
#include <string.h>

#include "common/digest.h"

/* A model comes over the wire: its figures must be those of its manifest before they index anything. */
static int model_check(const struct model *model, const struct manifest *m, struct err *err)
{
    uint32_t n_dense = 0;
    for (uint32_t i = 0; i < m->n_regions; i++)
        n_dense += m->regions[i].kind == REGION_DENSE;
    if (model->layers != m->layers || model->logical != m->logical || model->slots != m->slots ||
        model->n_dense != n_dense)
        return err_set(
            err, ERR_CORRUPT,
            "the model (%u layers, %u experts, %u slots, %u dense) is not that of its manifest (%u, %u, %u, %u)",
            model->layers, model->logical, model->slots, model->n_dense, m->layers, m->logical, m->slots, n_dense);
    if (model->manifest_digest != manifest_digest(model->manifest))
        return err_set(err, ERR_CORRUPT, "the model's manifest does not have the digest %016llx that it should",
                       (unsigned long long)model->manifest_digest);
    return 0;
}

static int region_adopt(struct memory_backend *memory, const struct region *r, int *fd, struct memory_region *ret_region,
                        struct err *err)
{
    if (*fd < 0)
        return err_set(err, ERR_NOTFOUND, "region \"%s\" was not kept", r->name);
    int rc = memory->adopt(memory, *fd, (size_t)r->bytes, ret_region, err);
    if (rc < 0)
        return err_wrap(err, "region \"%s\"", r->name);
    *fd = -1;
    return 0;
}

/* fds NULL: new memory. */
static int weights_make(struct memory_backend *memory, struct model *model, int *fds, size_t n,
                        struct weights **ret_weights, struct err *err)
{
    if (!model->manifest)
        return err_set(err, ERR_INVALID, "the model has no manifest");
    struct weights *w = calloc(1, sizeof *w);
    if (!w)
        return err_set(err, ERR_NOMEM, "out of memory");
    w->memory = memory;
    int rc = manifest_decode(model->manifest, &w->manifest, err);
    if (rc < 0)
        goto free_weights;
    rc = model_check(model, &w->manifest, err);
    if (rc < 0)
        goto free_weights;
    rc = ERR_NOMEM;
    w->regions = calloc(w->manifest.n_regions + 1u, sizeof *w->regions);
    if (!w->regions) {
        err_set(err, rc, "out of memory");
        goto free_weights;
    }
    for (uint32_t i = 0; i < w->manifest.n_regions; i++)
        w->regions[i].fd = -1;
    if (fds && n != w->manifest.n_regions) {
        rc = err_set(err, ERR_CONFLICT, "%zu regions were kept, the manifest has %u", n, w->manifest.n_regions);
        goto free_weights;
    }
    for (uint32_t i = 0; i < w->manifest.n_regions; i++) {
        const struct region *r = &w->manifest.regions[i];
        rc = fds ? region_adopt(memory, r, &fds[i], &w->regions[i], err)
                 : memory->alloc(memory, r->name, (size_t)r->bytes, &w->regions[i], err);
        if (rc < 0)
            goto free_weights;
    }
    w->model = model_ref(model);
    *ret_weights = w;
    return 0;
free_weights:
    weights_free(w);
    return rc;
}

int weights_allocate(struct memory_backend *memory, struct model *model, struct weights **ret_weights, struct err *err)
{
    return weights_make(memory, model, NULL, 0, ret_weights, err);
}

int weights_adopt(struct memory_backend *memory, struct model *model, int *fds, size_t n, struct weights **ret_weights,
                  struct err *err)
{
    return weights_make(memory, model, fds, n, ret_weights, err);
}

void weights_free(struct weights *w)
{
    if (!w)
        return;
    for (uint32_t i = 0; w->regions && i < w->manifest.n_regions; i++)
        w->memory->release(w->memory, &w->regions[i]);
    free(w->regions);
    manifest_done(&w->manifest);
    model_unref(w->model);
    free(w);
}

size_t weights_slot(struct weights *w, uint32_t layer, uint32_t slot, struct extent *ret_extents, size_t max)
{
    size_t n = 0;
    for (uint32_t i = 0; i < w->manifest.n_regions && n < max; i++) {
        const struct region *r = &w->manifest.regions[i];
        if (r->kind != REGION_EXPERT || r->layer != layer || slot >= r->slots)
            continue;
        ret_extents[n++] = (struct extent){
            .region = &w->regions[i],
            .offset = (size_t)(slot * r->stride),
            .len = (size_t)r->slot_bytes,
        };
    }
    return n;
}

uint64_t weights_slot_bytes(struct weights *w, uint32_t layer)
{
    struct extent parts[SLOT_EXTENTS_MAX];
    size_t n = weights_slot(w, layer, 0, parts, SLOT_EXTENTS_MAX);
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += parts[i].len;
    return sum;
}

/* One of `out` and `in` is NULL. */
static int slot_bytes_move(struct weights *w, uint32_t layer, uint32_t slot, uint64_t offset, uint8_t *out,
                           const uint8_t *in, size_t len, struct err *err)
{
    struct extent parts[SLOT_EXTENTS_MAX];
    size_t n = weights_slot(w, layer, slot, parts, SLOT_EXTENTS_MAX);
    uint64_t at = 0, end = offset + len;
    int rc = 0;
    if (n == 0 || end < offset || end > weights_slot_bytes(w, layer))
        return err_set(err, ERR_INVALID, "bytes %llu + %zu of slot %u of MoE layer %u are not there",
                       (unsigned long long)offset, len, slot, layer);
    for (size_t i = 0; i < n && rc == 0; i++) {
        uint64_t from = offset > at ? offset : at, until = end < at + parts[i].len ? end : at + parts[i].len;
        size_t there = parts[i].offset + (size_t)(from - at), here = (size_t)(from - offset);
        if (from < until && out)
            rc = w->memory->read(w->memory, parts[i].region, there, out + here, (size_t)(until - from), err);
        else if (from < until)
            rc = w->memory->write(w->memory, parts[i].region, there, in + here, (size_t)(until - from), err);
        at += parts[i].len;
    }
    return rc;
}

int weights_slot_read(struct weights *w, uint32_t layer, uint32_t slot, uint64_t offset, void *ret_data, size_t len,
                      struct err *err)
{
    return slot_bytes_move(w, layer, slot, offset, ret_data, NULL, len, err);
}

int weights_slot_write(struct weights *w, uint32_t layer, uint32_t slot, uint64_t offset, const void *data, size_t len,
                       struct err *err)
{
    return slot_bytes_move(w, layer, slot, offset, NULL, data, len, err);
}

size_t weights_dense(struct weights *w, struct extent *ret_extents, size_t max)
{
    size_t n = 0;
    for (uint32_t i = 0; i < w->manifest.n_regions && n < max; i++)
        if (w->manifest.regions[i].kind == REGION_DENSE)
            ret_extents[n++] = (struct extent){
                .region = &w->regions[i],
                .len = (size_t)w->manifest.regions[i].bytes,
            };
    return n;
}

/* Digests of parts, each part of ranges[i] counted into ret_digests[of[i]]. */
static int digests_sum(struct weights *w, const struct memory_range *ranges, const size_t *of, size_t n,
                       uint64_t *ret_digests, size_t n_digests, struct err *err)
{
    uint64_t *parts = calloc(n + 1, sizeof *parts);
    int rc = parts ? w->memory->digests(w->memory, ranges, n, parts, err) : err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0) {
        memset(ret_digests, 0, n_digests * sizeof *ret_digests);
        for (size_t i = 0; i < n; i++)
            ret_digests[of[i]] += parts[i];
        for (size_t i = 0; i < n_digests; i++)
            ret_digests[i] = weights_digest_known(ret_digests[i]);
    }
    free(parts);
    return rc;
}

int weights_slot_digests(struct weights *w, const struct weights_place *places, size_t n, uint64_t *ret_digests,
                         struct err *err)
{
    struct memory_range *ranges = calloc(n * SLOT_EXTENTS_MAX + 1, sizeof *ranges);
    size_t *of = calloc(n * SLOT_EXTENTS_MAX + 1, sizeof *of), n_ranges = 0;
    int rc = ranges && of ? 0 : err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < n && rc == 0; i++) {
        struct extent extents[SLOT_EXTENTS_MAX];
        size_t k = weights_slot(w, places[i].layer, places[i].slot, extents, SLOT_EXTENTS_MAX);
        uint64_t words = 0;
        if (k == 0)
            rc = err_set(err, ERR_INVALID, "the weights have no slot %u in MoE layer %u", places[i].slot,
                         places[i].layer);
        for (size_t part = 0; part < k; part++) {
            ranges[n_ranges] =
                (struct memory_range){extents[part].region, extents[part].offset, extents[part].len, words};
            of[n_ranges++] = i;
            words += digest_words(extents[part].len);
        }
    }
    if (rc == 0)
        rc = digests_sum(w, ranges, of, n_ranges, ret_digests, n, err);
    free(ranges);
    free(of);
    return rc;
}

int weights_dense_digests(struct weights *w, uint64_t *ret_digests, struct err *err)
{
    size_t max = w->model->n_dense, n;
    struct extent *extents = calloc(max + 1, sizeof *extents);
    struct memory_range *ranges = calloc(max + 1, sizeof *ranges);
    size_t *of = calloc(max + 1, sizeof *of);
    int rc = extents && ranges && of ? 0 : err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0) {
        n = weights_dense(w, extents, max);
        for (size_t i = 0; i < n; i++) {
            ranges[i] = (struct memory_range){extents[i].region, extents[i].offset, extents[i].len, 0};
            of[i] = i;
        }
        rc = digests_sum(w, ranges, of, n, ret_digests, n, err);
    }
    free(extents);
    free(ranges);
    free(of);
    return rc;
}

int weights_slot_digest(struct weights *w, uint32_t layer, uint32_t slot, uint64_t *ret_digest, struct err *err)
{
    const struct weights_place place = {layer, slot};
    uint64_t digest;
    int rc = weights_slot_digests(w, &place, 1, &digest, err);
    if (rc == 0)
        *ret_digest = digest;
    return rc;
}

int weights_dense_digest(struct weights *w, uint32_t dense_index, uint64_t *ret_digest, struct err *err)
{
    uint32_t seen = 0;
    for (uint32_t i = 0; i < w->manifest.n_regions; i++) {
        const struct region *r = &w->manifest.regions[i];
        if (r->kind != REGION_DENSE || seen++ != dense_index)
            continue;
        uint64_t digest;
        int rc = w->memory->digest(w->memory, &w->regions[i], 0, (size_t)r->bytes, 0, &digest, err);
        if (rc == 0)
            *ret_digest = weights_digest_known(digest);
        return rc;
    }
    return err_set(err, ERR_INVALID, "the weights have no dense region %u", dense_index);
}

int weights_slot_check(const struct weights *w, uint32_t layer, uint32_t slot, uint32_t expert, uint64_t digest,
                       struct err *err)
{
    const struct model *model = w->model;
    if (layer >= model->layers || expert >= model->logical)
        return err_set(err, ERR_INVALID, "the model has no expert %u in MoE layer %u", expert, layer);
    uint64_t want = model->expert_digest[(size_t)layer * model->logical + expert], have = weights_digest_known(digest);
    if (want == 0)
        return err_set(err, ERR_CORRUPT, "layer %u slot %u cannot be verified: no digest of expert %u is known here",
                       layer, slot, expert);
    if (have != want)
        return err_set(err, ERR_CORRUPT, "layer %u slot %u does not hold expert %u: its digest is %016llx, not %016llx",
                       layer, slot, expert, (unsigned long long)have, (unsigned long long)want);
    return 0;
}

int weights_slot_verify(struct weights *w, uint32_t layer, uint32_t slot, uint32_t expert, struct err *err)
{
    uint64_t digest;
    int rc = weights_slot_digest(w, layer, slot, &digest, err);
    return rc < 0 ? rc : weights_slot_check(w, layer, slot, expert, digest, err);
}

int weights_dense_check(const struct weights *w, uint32_t dense_index, uint64_t digest, struct err *err)
{
    const struct model *model = w->model;
    uint64_t want = model->dense_digest[dense_index], have = weights_digest_known(digest);
    if (want == 0)
        return err_set(err, ERR_CORRUPT, "dense region %u cannot be verified: its digest is not known here",
                       dense_index);
    if (have != want)
        return err_set(err, ERR_CORRUPT, "dense region %u has digest %016llx, not %016llx", dense_index,
                       (unsigned long long)have, (unsigned long long)want);
    return 0;
}
