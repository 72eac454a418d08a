/* The loader's layout, and the bytes from the files into it.
 *
 * Dense tensors, in the order of their names, share one region, each at a multiple of 256 bytes.  The fuse recipes make
 * the expert parts: w13 is [2I, H], gate rows then up rows; w2 is [H, I].  Slots follow one another without padding, so
 * that an engine sees one array [slots, ...].  Worker thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint_internal.h"

#define DENSE_ALIGN 256u
#define COPY_BYTES  (4u << 20) /* between two looks at progress and cancellation */
#define PRODUCER    "loader"

/* A part is its pieces, one under the other. */
static const struct {
    const char *part;
    enum piece pieces[2];
    uint32_t n;
} recipes[] = {
    {"w13", {PIECE_GATE, PIECE_UP}, 2},
    {"w2", {PIECE_DOWN}, 1},
};
#define RECIPES (sizeof recipes / sizeof recipes[0])

/* ---- the layout ---- */

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

static void expert_lay_out(const struct checkpoint *c, uint32_t layer, size_t recipe, struct manifest *m)
{
    const struct safetensors_tensor *first = checkpoint_piece(c, layer, 0, recipes[recipe].pieces[0]);
    struct region *r = &m->regions[m->n_regions];
    struct tensor *t = &m->tensors[m->n_tensors++];
    *r = (struct region){.kind = REGION_EXPERT, .layer = layer, .slots = m->slots};
    snprintf(r->name, sizeof r->name, "layers.%u.experts.%s", layer, recipes[recipe].part);
    snprintf(r->part, sizeof r->part, "%s", recipes[recipe].part);
    r->slot_bytes = r->stride = first->bytes * recipes[recipe].n;
    r->bytes = r->stride * r->slots;
    *t = (struct tensor){
        .region = m->n_regions++,
        .dims = 2,
        .shape = {first->shape[0] * recipes[recipe].n, first->shape[1]},
    };
    snprintf(t->name, sizeof t->name, "%s", r->name);
    strcpy(t->dtype, first->dtype);
}

int checkpoint_manifest(const struct checkpoint *c, uint32_t slots, struct manifest *ret_m, struct err *err)
{
    struct manifest m = {.producer = PRODUCER, .layers = c->layers, .logical = c->experts, .slots = slots};
    size_t parts = (size_t)c->layers * RECIPES;
    m.regions = calloc(parts + 1, sizeof *m.regions);
    m.tensors = calloc(parts + c->n_dense + 1, sizeof *m.tensors);
    m.config = strdup(c->config);
    int rc = 0;
    if (!m.regions || !m.tensors || !m.config)
        rc = err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0)
        rc = dense_lay_out(c, &m, err);
    for (uint32_t layer = 0; layer < c->layers && rc == 0; layer++)
        for (size_t recipe = 0; recipe < RECIPES; recipe++)
            expert_lay_out(c, layer, recipe, &m);
    if (rc == 0)
        rc = manifest_validate(&m, err);
    if (rc < 0) {
        manifest_done(&m);
        return rc;
    }
    *ret_m = m;
    return 0;
}

/* ---- the bytes ---- */

struct load {
    struct checkpoint *c;
    struct weights *w;
    bool (*progress)(void *user, uint64_t bytes);
    void *user;
    uint64_t bytes;
};

static int load_bytes(struct load *load, const struct safetensors_tensor *t, struct memory_region *region,
                      size_t offset, struct err *err)
{
    struct memory_backend *memory = load->w->memory;
    for (size_t done = 0; done < t->bytes;) {
        size_t len = (size_t)t->bytes - done;
        if (len > COPY_BYTES)
            len = COPY_BYTES;
        int rc = memory->write(memory, region, offset + done, t->data + done, len, err);
        if (rc < 0)
            return err_wrap(err, "%s: tensor \"%s\"", load->c->dir, t->name);
        done += len;
        load->bytes += len;
        load->c->bytes_read += len;
        if (load->progress && load->progress(load->user, load->bytes))
            return err_set(err, ERR_ABORTED, "%s: loading was cancelled after %llu bytes", load->c->dir,
                           (unsigned long long)load->bytes);
    }
    return 0;
}

/* dense[] without the empty ones is in the order of the manifest's tensors. */
static int load_dense(struct load *load, struct err *err)
{
    const struct manifest *m = &load->w->manifest;
    uint32_t at = 0;
    for (size_t i = 0; i < load->c->n_dense; i++) {
        const struct safetensors_tensor *t = load->c->dense[i];
        if (t->bytes == 0)
            continue;
        int rc = load_bytes(load, t, &load->w->regions[m->tensors[at].region], (size_t)m->tensors[at].offset, err);
        if (rc < 0)
            return rc;
        at++;
    }
    struct model *model = load->w->model;
    for (uint32_t i = 0; i < model->n_dense; i++) {
        int rc = weights_dense_digest(load->w, i, &model->dense_digest[i], err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int load_expert(struct load *load, uint32_t layer, uint32_t slot, uint32_t expert, struct err *err)
{
    struct extent parts[RECIPES];
    if (weights_slot(load->w, layer, slot, parts, RECIPES) != RECIPES)
        return err_set(err, ERR_INVALID, "the weights have no slot %u in MoE layer %u", slot, layer);
    for (size_t recipe = 0; recipe < RECIPES; recipe++) {
        size_t offset = parts[recipe].offset;
        for (uint32_t k = 0; k < recipes[recipe].n; k++) {
            const struct safetensors_tensor *t = checkpoint_piece(load->c, layer, expert, recipes[recipe].pieces[k]);
            int rc = load_bytes(load, t, parts[recipe].region, offset, err);
            if (rc < 0)
                return rc;
            offset += (size_t)t->bytes;
        }
    }
    struct model *model = load->w->model;
    return weights_slot_digest(load->w, layer, slot, &model->expert_digest[(size_t)layer * model->logical + expert],
                               err);
}

/* The weights must be those of checkpoint_manifest(), else offsets would mean something else. */
static int load_check(const struct checkpoint *c, const struct weights *w, const struct expert_map *map, uint32_t rank,
                      struct err *err)
{
    struct manifest m;
    struct blob *blob;
    int rc = checkpoint_manifest(c, w->manifest.slots, &m, err);
    if (rc < 0)
        return rc;
    rc = manifest_encode(&m, &blob, err);
    manifest_done(&m);
    if (rc < 0)
        return rc;
    bool same = manifest_digest(blob) == w->model->manifest_digest;
    blob_unref(blob);
    if (!same)
        return err_set(err, ERR_CONFLICT, "%s: the regions were allocated for another checkpoint or layout", c->dir);
    if (map->layers != c->layers || map->logical != c->experts || map->slots != w->manifest.slots || rank >= map->ranks)
        return err_set(err, ERR_INVALID,
                       "%s: the map has %u layers, %u experts, %u slots and %u ranks; that does not fit %u layers, "
                       "%u experts, %u slots at rank %u",
                       c->dir, map->layers, map->logical, map->slots, map->ranks, c->layers, c->experts,
                       w->manifest.slots, rank);
    return 0;
}

int checkpoint_load(struct checkpoint *c, struct weights *w, const struct expert_map *map, uint32_t rank,
                    bool (*progress)(void *user, uint64_t bytes), void *user, struct err *err)
{
    struct load load = {.c = c, .w = w, .progress = progress, .user = user};
    int rc = load_check(c, w, map, rank, err);
    if (rc == 0)
        rc = load_dense(&load, err);
    for (uint32_t layer = 0; layer < map->layers && rc == 0; layer++)
        for (uint32_t slot = 0; slot < map->slots && rc == 0; slot++) {
            int32_t expert = map->held[expert_map_at(map, layer, rank, slot)];
            if (expert >= (int32_t)c->experts)
                rc = err_set(err, ERR_INVALID, "the map puts expert %d into layer %u, which has %u", expert, layer,
                             c->experts);
            else if (expert >= 0)
                rc = load_expert(&load, layer, slot, (uint32_t)expert, err);
        }
    return rc;
}
