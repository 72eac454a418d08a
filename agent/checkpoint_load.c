/* The bytes from the files into the regions.
 *
 *   this thread:  stage_take -> put |                                   | take -> stage_write -> (copy to the device)
 *   the readers:                    | read the piece into the stage     |
 *
 * Up to READINGS pieces are being read while earlier ones are on their way to the device, so disk, page cache and copy
 * overlap; nothing is copied that need not be.  Where a stage is the region itself, the readers also take the digests,
 * while the bytes are in the cache; elsewhere the device takes them of what it has, when everything has been sent.
 * Memory above the weights: at most MEMORY_STAGES * MEMORY_STAGE_BYTES (64 MiB) pinned for a device, none on the host.
 * Worker thread. */
#include <stdlib.h>

#include "agent/checkpoint_internal.h"
#include "agent/checkpoint_readers.h"
#include "common/digest.h"

#define CANCEL_MS 100 /* between two looks at it while nothing comes from the disk */

/* What belongs to a reading of the same place in the ring. */
struct piece_sent {
    struct memory_stage stage;
    uint64_t *sum; /* where its digest is added */
};

struct load {
    struct checkpoint *c;
    struct weights *w;
    bool (*progress)(void *user, uint64_t bytes);
    void *user;
    uint64_t bytes;
    bool digests; /* taken by the readers */
    bool again;   /* experts alone, of which the model knows what they must be */
    struct readers *readers;
    struct piece_sent sent[READINGS];
    size_t put, taken;           /* counted for sent[] */
    struct weights_place *slots; /* that are loaded, and their digests, and whose they are */
    uint64_t *sums;
    uint64_t **targets;
    size_t n_slots;
};

/* ---- pieces ---- */

static int load_cancelled(struct load *load, struct err *err)
{
    if (load->progress && load->progress(load->user, load->bytes))
        return err_set(err, ERR_ABORTED, "%s: loading was cancelled after %llu bytes", load->c->dir,
                       (unsigned long long)load->bytes);
    return 0;
}

/* Sends the oldest piece on its way, when it is read. */
static int piece_finish(struct load *load, struct err *err)
{
    struct memory_backend *memory = load->w->memory;
    const struct piece_sent *sent = &load->sent[load->taken % READINGS];
    const struct reading *reading;
    int rc = 0;
    while (!(reading = readers_take(load->readers, CANCEL_MS)))
        if ((rc = load_cancelled(load, err)) < 0)
            return rc;
    load->taken++;
    if (reading->code < 0)
        return err_set(err, reading->code, "%s", reading->err.text);
    rc = memory->stage_write(memory, &sent->stage, err);
    if (rc < 0)
        return err_wrap(err, "%s: tensor \"%s\"", load->c->dir, reading->tensor->name);
    *sent->sum += reading->digest;
    load->bytes += reading->len;
    load->c->bytes_read += reading->len;
    return load_cancelled(load, err);
}

static int pieces_finish(struct load *load, struct err *err)
{
    int rc = 0;
    while (rc == 0 && !readers_empty(load->readers))
        rc = piece_finish(load, err);
    return rc;
}

/* Where a piece goes, and what its digest is a part of. */
struct target {
    struct memory_region *region;
    size_t offset;
    size_t gap;          /* bytes of zeros after it that belong to the digest */
    uint64_t first_word; /* its first word's place in the digest */
    uint64_t *sum;
};

static int load_piece(struct load *load, const struct piece *piece, const struct target *to, struct err *err)
{
    struct memory_backend *memory = load->w->memory;
    for (size_t done = 0; done < piece->bytes;) {
        size_t len = (size_t)piece->bytes - done;
        if (len > MEMORY_STAGE_BYTES)
            len = MEMORY_STAGE_BYTES;
        int rc = readers_full(load->readers) ? piece_finish(load, err) : 0;
        if (rc < 0)
            return rc;
        struct piece_sent *sent = &load->sent[load->put % READINGS];
        rc = memory->stage_take(memory, to->region, to->offset + done, len, &sent->stage, err);
        if (rc < 0)
            return err_wrap(err, "%s: tensor \"%s\"", load->c->dir, piece->tensor->name);
        sent->sum = to->sum;
        struct reading reading = {
            .tensor = piece->tensor,
            .from = piece->from + done,
            .data = sent->stage.data,
            .len = len,
            .in_place = memory->in_place,
        };
        if (load->digests) {
            reading.digest_len = done + len == piece->bytes ? len + to->gap : len;
            reading.first_word = to->first_word + done / 8;
        }
        readers_put(load->readers, &reading);
        load->put++;
        done += len;
    }
    return 0;
}

/* ---- dense tensors and experts ---- */

/* dense[] without the empty ones is in the order of the manifest's tensors, and they share region 0. */
static int load_dense(struct load *load, uint64_t *ret_sum, struct err *err)
{
    const struct manifest *m = &load->w->manifest;
    uint32_t at = 0;
    for (size_t i = 0; i < load->c->n_dense; i++) {
        const struct safetensors_tensor *t = load->c->dense[i];
        if (t->bytes == 0)
            continue;
        const struct tensor *here = &m->tensors[at++];
        bool last = at == m->n_tensors || m->tensors[at].region != here->region;
        struct target to = {
            .region = &load->w->regions[here->region],
            .offset = (size_t)here->offset,
            .gap = last ? 0 : (size_t)(m->tensors[at].offset - here->offset - t->bytes),
            .first_word = here->offset / 8,
            .sum = ret_sum,
        };
        const struct piece piece = {.tensor = t, .bytes = t->bytes};
        int rc = load_piece(load, &piece, &to, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int load_expert(struct load *load, uint32_t layer, uint32_t slot, uint32_t expert, struct err *err)
{
    const struct checkpoint *c = load->c;
    struct model *model = load->w->model;
    struct extent parts[SLOT_EXTENTS_MAX];
    if (weights_slot(load->w, layer, slot, parts, SLOT_EXTENTS_MAX) != c->n_parts)
        return err_set(err, ERR_INVALID, "the weights have no slot %u in MoE layer %u", slot, layer);
    size_t at = load->n_slots++;
    load->slots[at] = (struct weights_place){layer, slot};
    load->targets[at] = &model->expert_digest[(size_t)layer * model->logical + expert];
    uint64_t words = 0;
    for (size_t i = 0; i < c->n_parts; i++) {
        size_t done = 0;
        for (uint32_t k = 0; k < c->parts[i].n; k++) {
            const struct piece piece = checkpoint_piece(c, layer, expert, c->parts[i].tails[k]);
            struct target to = {
                .region = parts[i].region,
                .offset = parts[i].offset + done,
                .first_word = words + done / 8,
                .sum = &load->sums[at],
            };
            int rc = load_piece(load, &piece, &to, err);
            if (rc < 0)
                return rc;
            done += (size_t)piece.bytes;
        }
        words += digest_words(parts[i].len);
    }
    return 0;
}

static int load_experts(struct load *load, const struct expert_map *map, uint32_t rank, struct err *err)
{
    int rc = 0;
    for (uint32_t layer = 0; layer < map->layers && rc == 0; layer++)
        for (uint32_t slot = 0; slot < map->slots && rc == 0; slot++) {
            int32_t expert = map->held[expert_map_at(map, layer, rank, slot)];
            if (expert >= (int32_t)load->c->experts)
                rc = err_set(err, ERR_INVALID, "the map puts expert %d into layer %u, which has %u", expert, layer,
                             load->c->experts);
            else if (expert >= 0)
                rc = load_expert(load, layer, slot, (uint32_t)expert, err);
        }
    return rc;
}

/* ---- digests ---- */

/* A digest can be taken piece by piece when every piece begins at a word of it. */
static bool words_whole(const struct checkpoint *c)
{
    for (size_t i = 0; i < c->n_parts; i++)
        for (uint32_t layer = 0; layer < c->layers && c->parts[i].n > 1; layer++)
            if (checkpoint_piece(c, layer, 0, c->parts[i].tails[0]).bytes % 8 != 0)
                return false;
    return true;
}

static int load_compare(const struct load *load, size_t i, struct err *err)
{
    const struct model *model = load->w->model;
    size_t at = (size_t)(load->targets[i] - model->expert_digest);
    unsigned layer = (unsigned)(at / model->logical), expert = (unsigned)(at % model->logical);
    if (!*load->targets[i])
        return err_set(err, ERR_NOTFOUND, "nobody knows the digest of expert %u of MoE layer %u", expert, layer);
    if (*load->targets[i] != weights_digest_known(load->sums[i]))
        return err_set(err, ERR_CORRUPT,
                       "%s: expert %u of MoE layer %u is not what the model was started with: has the checkpoint been "
                       "changed?",
                       load->c->dir, expert, layer);
    return 0;
}

/* What the readers added up, or what the memory says now, into the model; or against it. */
static int load_digests(struct load *load, uint64_t dense_sum, struct err *err)
{
    struct model *model = load->w->model;
    int rc = load->digests ? 0 : weights_slot_digests(load->w, load->slots, load->n_slots, load->sums, err);
    for (size_t i = 0; i < load->n_slots && rc == 0; i++)
        if (load->again)
            rc = load_compare(load, i, err);
        else
            *load->targets[i] = weights_digest_known(load->sums[i]);
    if (load->again)
        return rc;
    for (uint32_t i = 0; i < model->n_dense && rc == 0; i++)
        if (load->digests)
            model->dense_digest[i] = weights_digest_known(dense_sum);
        else
            rc = weights_dense_digest(load->w, i, &model->dense_digest[i], err);
    return rc;
}

/* ---- all of it ---- */

uint64_t checkpoint_load_bytes(const struct checkpoint *c, const struct expert_map *map, uint32_t rank)
{
    uint64_t sum = checkpoint_reload_bytes(c, map, rank);
    for (size_t i = 0; i < c->n_dense; i++)
        sum += c->dense[i]->bytes;
    return sum;
}

uint64_t checkpoint_expert_bytes(const struct checkpoint *c, uint32_t layer)
{
    uint64_t sum = 0;
    for (uint32_t k = 0; k < c->n_tails; k++)
        sum += checkpoint_piece(c, layer, 0, k).bytes;
    return sum;
}

int checkpoint_expert_read(const struct checkpoint *c, uint32_t layer, uint32_t expert, uint64_t offset, void *ret_data,
                           size_t len, struct err *err)
{
    uint64_t at = 0, end = offset + len;
    uint8_t *to = ret_data;
    int rc = 0;
    if (layer >= c->layers || expert >= c->experts || end < offset || end > checkpoint_expert_bytes(c, layer))
        return err_set(err, ERR_INVALID, "%s: bytes %llu + %zu of expert %u of MoE layer %u are not there", c->dir,
                       (unsigned long long)offset, len, expert, layer);
    for (uint32_t i = 0; i < c->n_parts; i++)
        for (uint32_t k = 0; k < c->parts[i].n && rc == 0; k++) {
            const struct piece piece = checkpoint_piece(c, layer, expert, c->parts[i].tails[k]);
            uint64_t from = offset > at ? offset : at, until = end < at + piece.bytes ? end : at + piece.bytes;
            if (from < until)
                rc = safetensors_read(piece.tensor, piece.from + (from - at), to + (from - offset),
                                      (size_t)(until - from), err);
            at += piece.bytes;
        }
    return rc;
}

uint64_t checkpoint_reload_bytes(const struct checkpoint *c, const struct expert_map *map, uint32_t rank)
{
    uint64_t sum = 0;
    for (uint32_t layer = 0; layer < map->layers && layer < c->layers; layer++)
        for (uint32_t slot = 0; slot < map->slots; slot++)
            if (map->held[expert_map_at(map, layer, rank, slot)] >= 0)
                sum += checkpoint_expert_bytes(c, layer);
    return sum;
}

/* The weights must be those of checkpoint_manifest(), else offsets would mean something else. */
static int load_check(const struct checkpoint *c, const struct weights *w, const struct expert_map *map, uint32_t rank,
                      struct err *err)
{
    uint64_t digest;
    int rc = checkpoint_manifest_digest(c, w->manifest.slots, &digest, err);
    if (rc < 0)
        return rc;
    if (digest != w->model->manifest_digest)
        return err_set(err, ERR_CONFLICT, "%s: the regions were allocated for another checkpoint or layout", c->dir);
    if (map->layers != c->layers || map->logical != c->experts || map->slots != w->manifest.slots || rank >= map->ranks)
        return err_set(err, ERR_INVALID,
                       "%s: the map has %u layers, %u experts, %u slots and %u ranks; that does not fit %u layers, "
                       "%u experts, %u slots at rank %u",
                       c->dir, map->layers, map->logical, map->slots, map->ranks, c->layers, c->experts,
                       w->manifest.slots, rank);
    return 0;
}

static int load_all(struct load *load, const struct expert_map *map, uint32_t rank, struct err *err)
{
    uint64_t dense_sum = 0;
    int rc = readers_start(load->c->n_readers, &load->readers, err);
    if (rc < 0)
        return err_wrap(err, "%s", load->c->dir);
    rc = load->again ? 0 : load_dense(load, &dense_sum, err);
    if (rc == 0)
        rc = load_experts(load, map, rank, err);
    if (rc == 0)
        rc = pieces_finish(load, err);
    readers_stop(load->readers); /* before the stages go: they write there */
    load->w->memory->stages_free(load->w->memory);
    return rc < 0 ? rc : load_digests(load, dense_sum, err);
}

static int load_run(struct checkpoint *c, struct weights *w, const struct expert_map *map, uint32_t rank, bool again,
                    bool (*progress)(void *user, uint64_t bytes), void *user, struct err *err)
{
    struct load load = {.c = c, .w = w, .again = again, .progress = progress, .user = user};
    int rc = load_check(c, w, map, rank, err);
    if (rc < 0)
        return rc;
    size_t most = (size_t)map->layers * map->slots;
    load.digests = w->memory->in_place && words_whole(c);
    load.slots = calloc(most + 1, sizeof *load.slots);
    load.sums = calloc(most + 1, sizeof *load.sums);
    load.targets = calloc(most + 1, sizeof *load.targets);
    if (load.slots && load.sums && load.targets)
        rc = load_all(&load, map, rank, err);
    else
        rc = err_set(err, ERR_NOMEM, "out of memory");
    free(load.slots);
    free(load.sums);
    free(load.targets);
    return rc;
}

int checkpoint_load(struct checkpoint *c, struct weights *w, const struct expert_map *map, uint32_t rank,
                    bool (*progress)(void *user, uint64_t bytes), void *user, struct err *err)
{
    return load_run(c, w, map, rank, false, progress, user, err);
}

int checkpoint_reload(struct checkpoint *c, struct weights *w, const struct expert_map *map, uint32_t rank,
                      bool (*progress)(void *user, uint64_t bytes), void *user, struct err *err)
{
    return load_run(c, w, map, rank, true, progress, user, err);
}
