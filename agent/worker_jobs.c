/* What the worker does, one function a kind of work.  Worker thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint.h"
#include "agent/weights.h"
#include "agent/worker_internal.h"
#include "common/clock.h"

#define PROGRESS_BYTES (1u << 20)

/* ---- calls of the transport: deadline renewed by progress ---- */

struct transfer_state {
    struct worker *w;
    const struct job *job;
    struct transport_call call;
    uint64_t before; /* bytes of the calls before this one */
};

static void transfer_renew(struct transfer_state *t)
{
    t->call.deadline_ns = clock_now_ns() + (uint64_t)t->w->config.transfer_timeout_ms * 1000000u;
}

static void transfer_progress(void *user, uint64_t bytes)
{
    struct transfer_state *t = user;
    transfer_renew(t);
    worker_progress(t->w, t->job, t->before + bytes);
}

static void transfer_init(struct transfer_state *t, struct worker *w, const struct job *job)
{
    *t = (struct transfer_state){.w = w, .job = job};
    t->call = (struct transport_call){.cancel_fd = w->cancel_fd, .progress = transfer_progress, .user = t};
    transfer_renew(t);
}

/* ---- weights ---- */

/* The operation's model knows the digests of experts that other ranks loaded.  Models are immutable once shared, so the
 * weights get a new one: the operation's, completed by what we knew. */
static int model_update(struct worker *w, struct model *model, struct err *err)
{
    struct model *mine = w->weights->model;
    if (!model || model == mine)
        return 0;
    if (model->manifest_digest != mine->manifest_digest)
        return err_set(err, ERR_CONFLICT, "the regions here are of manifest %016llx, but the operation is about %016llx",
                       (unsigned long long)mine->manifest_digest, (unsigned long long)model->manifest_digest);
    struct model *merged = model_new(mine->layers, mine->logical, mine->slots, mine->n_dense);
    if (!merged)
        return err_set(err, ERR_NOMEM, "out of memory");
    merged->manifest = blob_ref(mine->manifest);
    merged->manifest_digest = mine->manifest_digest;
    merged->expert_bytes = mine->expert_bytes;
    merged->dense_bytes = mine->dense_bytes;
    int rc = model_merge(merged, model, err);
    if (rc == 0)
        rc = model_merge(merged, mine, err);
    if (rc < 0) {
        model_unref(merged);
        return rc;
    }
    w->weights->model = merged;
    model_unref(mine);
    return 0;
}

static int job_allocate(struct worker *w, const struct job *job, struct err *err)
{
    if (!job->work.model)
        return err_set(err, ERR_INVALID, "there is no model to allocate memory for");
    if (w->weights)
        return model_update(w, job->work.model, err); /* the same regions serve again */
    struct weights *weights;
    int rc = weights_allocate(w->config.memory, job->work.model, &weights, err);
    if (rc == 0)
        worker_weights_set(w, weights);
    return rc;
}

struct load_state {
    struct worker *w;
    const struct job *job;
    uint64_t reported, bytes;
};

static bool load_progress(void *user, uint64_t bytes)
{
    struct load_state *state = user;
    state->bytes = bytes;
    if (bytes - state->reported >= PROGRESS_BYTES) {
        state->reported = bytes;
        worker_progress(state->w, state->job, bytes);
    }
    return worker_cancelled(state->w);
}

static int load_into(struct worker *w, const struct job *job, struct checkpoint *c, struct model *model,
                     struct worker_result *ret_result, struct err *err)
{
    struct weights *weights;
    int rc = weights_allocate(w->config.memory, model, &weights, err);
    if (rc < 0)
        return rc;
    struct load_state state = {.w = w, .job = job};
    rc = checkpoint_load(c, weights, job->work.map, job->work.self, load_progress, &state, err);
    if (rc < 0) {
        weights_free(weights);
        return rc;
    }
    worker_weights_set(w, weights);
    ret_result->model = model_ref(model);
    ret_result->bytes = state.bytes;
    return 0;
}

static int job_load(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    const struct expert_map *map = job->work.map;
    if (!w->config.checkpoint)
        return err_set(err, ERR_INVALID, "this agent has no checkpoint path (start it with --checkpoint)");
    if (!map)
        return err_set(err, ERR_INVALID, "there is no map that says which experts to load");
    if (w->config.slots != 0 && w->config.slots != map->slots)
        return err_set(err, ERR_CONFLICT, "the map has %u slots per rank, but this agent is configured for %u", map->slots,
                       w->config.slots);
    if (w->weights)
        return err_set(err, ERR_CONFLICT, "this agent holds weights already; release them before loading others");
    struct checkpoint *c;
    struct manifest manifest;
    struct model *model;
    int rc = checkpoint_open(w->config.checkpoint, &c, err);
    if (rc < 0)
        return rc;
    rc = checkpoint_manifest(c, map->slots, &manifest, err);
    if (rc < 0)
        goto close_checkpoint;
    rc = manifest_model(&manifest, &model, err);
    manifest_done(&manifest);
    if (rc < 0)
        goto close_checkpoint;
    rc = load_into(w, job, c, model, ret_result, err);
    model_unref(model);
close_checkpoint:
    checkpoint_close(c);
    return rc;
}

/* ---- the group ---- */

static void group_drop(struct worker *w)
{
    w->config.transport->destroy(w->group);
    w->group = NULL;
}

static int job_group(struct worker *w, const struct job *job, struct err *err)
{
    struct transfer_state t;
    transfer_init(&t, w, job);
    group_drop(w); /* one at a time: the one before belonged to an operation that is over */
    int rc = w->config.transport->group_create(w->config.transport, job->work.blob, job->work.parties, job->work.n,
                                               job->work.self, &t.call, &w->group, err);
    if (rc == 0) {
        w->group_n = job->work.n;
        w->group_self = job->work.self;
    }
    return rc;
}

/* ---- transfers ---- */

static int transfer_ready(const struct worker *w, const struct work *work, struct err *err)
{
    if (!w->weights)
        return err_set(err, ERR_INVALID, "no memory is allocated that weights could be moved to or from");
    if (!w->group)
        return err_set(err, ERR_INVALID, "there is no group to move weights in");
    if (!work->plan)
        return err_set(err, ERR_INVALID, "there is no plan that says what to move");
    if (work->plan->parties != w->group_n || work->self != w->group_self)
        return err_set(err, ERR_INVALID, "the plan is for party %u of %u, but the group was made as party %u of %u",
                       work->self, work->plan->parties, w->group_self, w->group_n);
    return 0;
}

static int move_check(const struct worker *w, const struct move *m, struct err *err)
{
    const struct manifest *manifest = &w->weights->manifest;
    if (m->layer >= manifest->layers || m->expert >= manifest->logical || m->src_slot >= manifest->slots ||
        m->dst_slot >= manifest->slots || m->src >= w->group_n || m->dst >= w->group_n)
        return err_set(err, ERR_INVALID,
                       "the plan moves layer %u expert %u from party %u slot %u to party %u slot %u, which is out of bounds",
                       m->layer, m->expert, m->src, m->src_slot, m->dst, m->dst_slot);
    return 0;
}

/* The moves of one round that we have a part in, in the plan's order: both ends of a pair see the same sequence. */
static int round_transfers(struct worker *w, const struct job *job, struct transfer **ret_items, size_t *ret_n,
                           struct err *err)
{
    const struct plan *plan = job->work.plan;
    uint32_t self = job->work.self;
    size_t n = 0;
    for (uint32_t i = 0; i < plan->n_moves; i++)
        n += plan->moves[i].round == job->work.round && (plan->moves[i].src == self || plan->moves[i].dst == self);
    struct transfer *items = calloc(n + 1, sizeof *items);
    if (!items)
        return err_set(err, ERR_NOMEM, "out of memory");
    n = 0;
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const struct move *m = &plan->moves[i];
        if (m->round != job->work.round || (m->src != self && m->dst != self))
            continue;
        int rc = move_check(w, m, err);
        if (rc < 0) {
            free(items);
            return rc;
        }
        struct transfer *t = &items[n++];
        t->src = m->src;
        t->dst = m->dst;
        if (m->src == self)
            t->n = (uint32_t)weights_slot(w->weights, m->layer, m->src_slot, t->from, SLOT_EXTENTS_MAX);
        if (m->dst == self)
            t->n = (uint32_t)weights_slot(w->weights, m->layer, m->dst_slot, t->to, SLOT_EXTENTS_MAX);
    }
    *ret_items = items;
    *ret_n = n;
    return 0;
}

static int cancelled_check(struct worker *w, struct err *err)
{
    return worker_cancelled(w) ? err_set(err, ERR_ABORTED, "cancelled") : 0;
}

static int round_verify(struct worker *w, const struct job *job, struct err *err)
{
    const struct plan *plan = job->work.plan;
    int rc = 0;
    for (uint32_t i = 0; i < plan->n_moves && rc == 0; i++) {
        const struct move *m = &plan->moves[i];
        if (m->round != job->work.round || m->dst != job->work.self)
            continue;
        rc = cancelled_check(w, err);
        if (rc == 0)
            rc = weights_slot_verify(w->weights, m->layer, m->dst_slot, m->expert, err);
        if (rc == ERR_CORRUPT)
            return err_wrap(err, "received from %s",
                            m->src < job->work.n && job->work.parties ? job->work.parties[m->src].id : "a party");
    }
    return rc;
}

static int dense_verify(struct worker *w, uint32_t i, struct err *err)
{
    const struct model *model = w->weights->model;
    uint64_t have;
    if (model->dense_digest[i] == 0)
        return err_set(err, ERR_CORRUPT, "dense region %u cannot be verified: its digest is not known here", i);
    int rc = weights_dense_digest(w->weights, i, &have, err);
    if (rc == 0 && have != model->dense_digest[i])
        rc = err_set(err, ERR_CORRUPT, "dense region %u has digest %016llx, not %016llx", i, (unsigned long long)have,
                     (unsigned long long)model->dense_digest[i]);
    return rc;
}

static int round_move(struct worker *w, const struct job *job, struct transfer_state *t, uint64_t *bytes, struct err *err)
{
    struct transfer *items = NULL;
    size_t n = 0;
    int rc = round_transfers(w, job, &items, &n, err);
    if (rc < 0)
        return rc;
    uint64_t received = 0;
    t->before = *bytes;
    transfer_renew(t);
    rc = w->config.transport->move(w->group, items, n, &t->call, &received, err);
    free(items);
    *bytes += received;
    return rc == 0 ? round_verify(w, job, err) : rc;
}

static int dense_broadcast(struct worker *w, const struct job *job, struct transfer_state *t, uint64_t *bytes,
                           struct err *err)
{
    uint8_t have[RANKS_MAX] = {0};
    size_t n = w->weights->model->n_dense;
    struct extent *extents = calloc(n + 1, sizeof *extents);
    if (!extents)
        return err_set(err, ERR_NOMEM, "out of memory");
    n = weights_dense(w->weights, extents, n);
    for (uint32_t i = 0; i < w->group_n; i++)
        have[i] = i < job->work.dense_from;
    uint64_t received = 0;
    int rc = w->config.transport->broadcast(w->group, extents, n, have, &t->call, &received, err);
    free(extents);
    *bytes += received;
    return rc;
}

static int job_fill(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    int rc = transfer_ready(w, &job->work, err);
    if (rc == 0)
        rc = model_update(w, job->work.model, err);
    if (rc < 0)
        return rc;
    struct transfer_state t;
    transfer_init(&t, w, job);
    if (job->work.kind == WORK_WEIGHTS && job->work.dense_from < w->group_n)
        rc = dense_broadcast(w, job, &t, &ret_result->bytes, err);
    if (rc == 0)
        rc = round_move(w, job, &t, &ret_result->bytes, err);
    if (job->work.kind == WORK_WEIGHTS && job->work.self >= job->work.dense_from)
        for (uint32_t i = 0; i < w->weights->model->n_dense && rc == 0; i++)
            rc = dense_verify(w, i, err);
    return rc;
}

/* ---- verify ---- */

static void verify_count(struct worker_result *result, int rc, const struct err *err)
{
    if (rc == 0)
        return;
    if (result->bad++ == 0)
        snprintf(result->text, sizeof result->text, "%.*s", (int)sizeof result->text - 1, err->text);
}

/* A mismatch is a finding, not a failure: all of them are counted. */
static int job_verify(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    const struct expert_map *map = job->work.map;
    if (!w->weights)
        return err_set(err, ERR_INVALID, "this agent holds no weights to verify");
    int rc = model_update(w, job->work.model, err);
    if (rc < 0)
        return rc;
    const struct manifest *m = &w->weights->manifest;
    if (!map || map->layers != m->layers || map->slots != m->slots || job->work.self >= map->ranks)
        return err_set(err, ERR_INVALID, "the map does not fit the weights that are held here");
    const struct model *model = w->weights->model;
    for (uint32_t i = 0; i < model->n_dense && rc == 0; i++) {
        verify_count(ret_result, dense_verify(w, i, err), err);
        rc = cancelled_check(w, err);
    }
    ret_result->bytes = model->dense_bytes;
    for (uint32_t layer = 0; layer < map->layers; layer++)
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            int32_t expert = map->held[expert_map_at(map, layer, job->work.self, slot)];
            if (expert < 0)
                continue;
            if (rc == 0)
                rc = cancelled_check(w, err);
            if (rc < 0)
                return rc;
            verify_count(ret_result, weights_slot_verify(w->weights, layer, slot, (uint32_t)expert, err), err);
            ret_result->value++;
            ret_result->bytes += model->expert_bytes;
        }
    return rc;
}

/* ---- an engine that lays out its own weights ---- */

void worker_sealing_free(struct worker *w)
{
    for (size_t i = 0; i < w->n_sealing; i++)
        w->config.memory->release(w->config.memory, &w->sealing[i].memory);
    free(w->sealing);
    w->sealing = NULL;
    w->n_sealing = 0;
}

static int job_region_alloc(struct worker *w, const struct job *job, struct err *err)
{
    const struct region *region = job->region;
    if (w->weights)
        return err_set(err, ERR_CONFLICT, "this agent holds weights already; region \"%s\" cannot be added", region->name);
    for (size_t i = 0; i < w->n_sealing; i++)
        if (strcmp(w->sealing[i].region.name, region->name) == 0)
            return err_set(err, ERR_CONFLICT, "region \"%s\" was allocated before", region->name);
    struct sealing *sealing = realloc(w->sealing, (w->n_sealing + 1) * sizeof *sealing);
    if (!sealing)
        return err_set(err, ERR_NOMEM, "out of memory");
    w->sealing = sealing;
    sealing[w->n_sealing].region = *region;
    int rc = w->config.memory->alloc(w->config.memory, region->name, (size_t)region->bytes,
                                     &sealing[w->n_sealing].memory, err);
    if (rc == 0)
        *job->ret_region = sealing[w->n_sealing++].memory;
    return rc;
}

/* Each region of the manifest is one that was allocated, and none is left over. */
static int seal_match(const struct worker *w, struct weights *weights, struct err *err)
{
    const struct manifest *m = &weights->manifest;
    if (m->n_regions != w->n_sealing)
        return err_set(err, ERR_INVALID, "the engine allocated %zu regions, but its layout has %u", w->n_sealing,
                       m->n_regions);
    for (uint32_t i = 0; i < m->n_regions; i++) {
        size_t k = 0;
        while (k < w->n_sealing && strcmp(w->sealing[k].region.name, m->regions[i].name) != 0)
            k++;
        if (k == w->n_sealing || w->sealing[k].memory.bytes != m->regions[i].bytes)
            return err_set(err, ERR_INVALID, "the layout's region \"%s\" of %llu bytes was not allocated like that",
                           m->regions[i].name, (unsigned long long)m->regions[i].bytes);
        weights->regions[i] = w->sealing[k].memory;
    }
    return 0;
}

static int seal_digests(struct weights *weights, const struct expert_map *map, uint32_t self, struct err *err)
{
    struct model *model = weights->model;
    if (map->layers != model->layers || map->logical != model->logical || map->slots != model->slots ||
        self >= map->ranks)
        return err_set(err, ERR_INVALID,
                       "the engine's layout has %u layers, %u experts and %u slots, but the map has %u, %u and %u",
                       model->layers, model->logical, model->slots, map->layers, map->logical, map->slots);
    int rc = 0;
    for (uint32_t i = 0; i < model->n_dense && rc == 0; i++)
        rc = weights_dense_digest(weights, i, &model->dense_digest[i], err);
    for (uint32_t layer = 0; layer < map->layers && rc == 0; layer++)
        for (uint32_t slot = 0; slot < map->slots && rc == 0; slot++) {
            int32_t expert = map->held[expert_map_at(map, layer, self, slot)];
            if (expert >= 0 && (uint32_t)expert < model->logical)
                rc = weights_slot_digest(weights, layer, slot,
                                         &model->expert_digest[(size_t)layer * model->logical + (uint32_t)expert], err);
        }
    return rc;
}

static int job_seal(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    if (job->code < 0)
        return err_set(err, job->code, "%s", job->err.text);
    if (w->weights)
        return err_set(err, ERR_CONFLICT, "this agent holds weights already; others cannot be sealed");
    struct weights *weights = calloc(1, sizeof *weights);
    if (!weights)
        return err_set(err, ERR_NOMEM, "out of memory");
    weights->memory = w->config.memory;
    int rc = manifest_decode(job->manifest, &weights->manifest, err);
    if (rc == 0)
        rc = manifest_model(&weights->manifest, &weights->model, err);
    if (rc == 0) {
        weights->regions = calloc(weights->manifest.n_regions + 1u, sizeof *weights->regions);
        rc = weights->regions ? seal_match(w, weights, err) : err_set(err, ERR_NOMEM, "out of memory");
    }
    if (rc == 0)
        rc = seal_digests(weights, job->work.map, job->work.self, err);
    if (rc < 0) {
        free(weights->regions); /* the memory stays with the engine's allocations, for another attempt */
        weights->regions = NULL;
        weights_free(weights);
        return rc;
    }
    free(w->sealing);
    w->sealing = NULL;
    w->n_sealing = 0;
    worker_weights_set(w, weights);
    ret_result->model = model_ref(weights->model);
    ret_result->bytes = weights->model->dense_bytes;
    return 0;
}

/* ---- one job ---- */

static int job_work(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    struct weights *weights = w->weights;
    switch (job->work.kind) {
    case WORK_ALLOCATE:
        return job_allocate(w, job, err);
    case WORK_LOAD:
        return job_load(w, job, ret_result, err);
    case WORK_GROUP_ID:
        return w->config.transport->group_id(w->config.transport, &ret_result->blob, err);
    case WORK_GROUP:
        return job_group(w, job, err);
    case WORK_WEIGHTS:
    case WORK_FILL:
        return job_fill(w, job, ret_result, err);
    case WORK_GROUP_DESTROY:
        group_drop(w);
        return 0;
    case WORK_RELEASE:
        worker_weights_set(w, NULL);
        weights_free(weights);
        return 0;
    case WORK_VERIFY:
        return job_verify(w, job, ret_result, err);
    }
    return err_set(err, ERR_INVALID, "the worker knows no work of kind %d", (int)job->work.kind);
}

void worker_job_run(struct worker *w, struct job *job, struct worker_result *ret_result)
{
    struct err err = {0};
    int rc = 0;
    /* Cleaning up is never cancelled. */
    bool clean_up = job->work.kind == WORK_GROUP_DESTROY || job->work.kind == WORK_RELEASE;
    switch (job->kind) {
    case JOB_WORK:
        rc = clean_up ? 0 : cancelled_check(w, &err);
        if (rc == 0)
            rc = job_work(w, job, ret_result, &err);
        break;
    case JOB_REGION_ALLOC:
        job->code = job_region_alloc(w, job, &job->err);
        return;
    case JOB_SEAL:
        rc = job_seal(w, job, ret_result, &err);
        break;
    case JOB_SEAL_DISCARD:
        worker_sealing_free(w);
        return;
    }
    ret_result->code = rc;
    if (rc < 0)
        snprintf(ret_result->text, sizeof ret_result->text, "%.*s", (int)sizeof ret_result->text - 1, err.text);
}
