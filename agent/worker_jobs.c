/* What the worker does, one function a kind of work: memory, loading.  Groups and transfers are in worker_transfer.c,
 * verifying in worker_verify.c, sealing in worker_seal.c, lost experts in worker_reload.c.  Worker thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint.h"
#include "agent/weights.h"
#include "agent/worker_internal.h"

#define PROGRESS_BYTES (1u << 20)

/* ---- weights ---- */

/* The operation's model knows the digests of experts that other ranks loaded.  Models are immutable once shared, so the
 * weights get a new one: the operation's, completed by what we knew. */
int worker_model_update(struct worker *w, struct model *model, struct err *err)
{
    struct model *mine = w->weights->model;
    if (!model || model == mine)
        return 0;
    if (model->manifest_digest != mine->manifest_digest)
        return err_set(err, ERR_CONFLICT,
                       "the regions here are of manifest %016llx, but the operation is about %016llx",
                       (unsigned long long)mine->manifest_digest, (unsigned long long)model->manifest_digest);
    struct model *merged = model_new(mine->layers, mine->logical, mine->slots, mine->n_dense);
    if (!merged)
        return err_set(err, ERR_NOMEM, "out of memory");
    merged->manifest = blob_ref(mine->manifest);
    merged->manifest_digest = mine->manifest_digest;
    merged->expert_bytes = mine->expert_bytes;
    merged->dense_bytes = mine->dense_bytes;
    merged->sealed = mine->sealed;
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
        return worker_model_update(w, job->work.model, err); /* the same regions serve again */
    struct weights *weights;
    int rc = weights_allocate(w->config.memory, job->work.model, &weights, err);
    if (rc == 0)
        worker_weights_set(w, weights);
    return rc;
}

struct load_state {
    struct worker *w;
    const struct job *job;
    uint64_t reported, bytes, total;
};

static bool load_progress(void *user, uint64_t bytes)
{
    struct load_state *state = user;
    state->bytes = bytes;
    if (bytes - state->reported >= PROGRESS_BYTES) {
        state->reported = bytes;
        worker_progress(state->w, state->job, bytes, state->total);
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
    struct load_state state = {
        .w = w, .job = job, .total = checkpoint_load_bytes(c, job->work.map, job->work.self)};
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
        return err_set(err, ERR_CONFLICT, "the map has %u slots per rank, but this agent is configured for %u",
                       map->slots, w->config.slots);
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

int worker_cancelled_check(struct worker *w, struct err *err)
{
    return worker_cancelled(w) ? err_set(err, ERR_ABORTED, "cancelled") : 0;
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
        return worker_job_group(w, job, err);
    case WORK_WEIGHTS:
    case WORK_FILL:
        return worker_job_fill(w, job, ret_result, err);
    case WORK_GROUP_DESTROY:
        worker_group_drop(w);
        return 0;
    case WORK_RELEASE:
        worker_weights_set(w, NULL);
        weights_free(weights);
        return 0;
    case WORK_VERIFY:
        return worker_job_verify(w, job, ret_result, err);
    case WORK_RELOAD:
        return worker_job_reload(w, job, ret_result, err);
    }
    return err_set(err, ERR_INVALID, "the worker knows no work of kind %d", (int)job->work.kind);
}

void worker_job_run(struct worker *w, struct job *job, struct worker_result *ret_result)
{
    struct err err = {0};
    int rc = 0;
    if (job->kind != JOB_EXPERT_READ)
        worker_lent_close(w);
    /* Cleaning up is never cancelled. */
    bool clean_up = job->work.kind == WORK_GROUP_DESTROY || job->work.kind == WORK_RELEASE;
    switch (job->kind) {
    case JOB_WORK:
        rc = clean_up ? 0 : worker_cancelled_check(w, &err);
        if (rc == 0)
            rc = job_work(w, job, ret_result, &err);
        break;
    case JOB_REGION_ALLOC:
        job->code = worker_job_region_alloc(w, job, &job->err);
        return;
    case JOB_ADOPT:
        job->code = worker_job_adopt(w, job, &job->err);
        return;
    case JOB_SEAL:
        rc = worker_job_seal(w, job, ret_result, &err);
        break;
    case JOB_SEAL_DISCARD:
        worker_sealing_free(w);
        return;
    case JOB_EXPERT_READ:
        rc = worker_job_expert_read(w, job, ret_result, &err);
        break;
    }
    ret_result->code = rc;
    if (rc < 0)
        snprintf(ret_result->text, sizeof ret_result->text, "%.*s", (int)sizeof ret_result->text - 1, err.text);
}
