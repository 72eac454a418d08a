/* Experts that have lost their last copy: the worker of a rank that is left reads them again, into slots that nobody reads,
 * of weights that are in use otherwise.  In this order: out of the memory of agents that have them and do not serve, from
 * the own checkpoint, from whatever the other agents have.  And the other side: what is read here for others.
 * Worker thread. */
#include <stdlib.h>
#include <string.h>

#include "agent/checkpoint.h"
#include "agent/weights.h"
#include "agent/worker_internal.h"

#define SOURCE_MS 15000u /* to connect, and of a call: less than the stage may take */

struct reload {
    struct worker *w;
    const struct job *job;
    struct expert_sources *sources;
    struct expert_map *left; /* what is still to be read, at party self */
    uint8_t *buffer;         /* [EXPERT_READ_MAX] */
    uint64_t bytes, reported, total;
    struct err last; /* why a source has not given what it was asked for */
};

/* Looked at again and again; meanwhile others read here, who may be asked for something themselves. */
static bool reload_cancelled(void *user)
{
    const struct reload *r = user;
    worker_lend(r->w);
    return worker_cancelled(r->w);
}

static bool reload_progress(void *user, uint64_t bytes)
{
    struct reload *r = user;
    if (r->bytes + bytes - r->reported >= 1u << 20) {
        r->reported = r->bytes + bytes;
        worker_progress(r->w, r->job, r->reported, r->total);
    }
    return reload_cancelled(r);
}

/* The reads of one expert from one source, some of them ahead of the one whose bytes are taken. */
struct reads {
    struct expert_read next;
    uint64_t end; /* bytes of the expert */
    struct expert_read ahead[EXPERT_READS_AHEAD];
    uint64_t calls[EXPERT_READS_AHEAD];
    unsigned first, n;
};

static int reads_ask(struct reload *r, struct reads *x, uint32_t source, struct err *err)
{
    int rc = 0;
    while (x->n < EXPERT_READS_AHEAD && x->next.offset < x->end && rc == 0) {
        unsigned at = (x->first + x->n) % EXPERT_READS_AHEAD;
        uint64_t left = x->end - x->next.offset;
        x->next.length = left < EXPERT_READ_MAX ? (uint32_t)left : EXPERT_READ_MAX;
        rc = expert_sources_begin(r->sources, source, &x->next, &x->calls[at], err);
        if (rc < 0)
            return rc;
        x->ahead[at] = x->next;
        x->next.offset += x->next.length;
        x->n++;
    }
    return rc;
}

/* The oldest one. */
static int reads_take(struct reload *r, struct reads *x, uint32_t source, struct expert_read *ret_read, struct err *err)
{
    *ret_read = x->ahead[x->first];
    uint64_t call = x->calls[x->first];
    x->first = (x->first + 1) % EXPERT_READS_AHEAD;
    x->n--;
    return expert_sources_end(r->sources, source, call, ret_read, r->buffer, err);
}

/* One expert from one source, compared with the digest that the model was started with. */
static int expert_copy(struct reload *r, uint32_t source, bool memory_only, uint32_t layer, uint32_t slot, uint32_t expert,
                       struct err *err)
{
    struct weights *weights = r->w->weights;
    struct expert_read read;
    struct err ignored;
    struct reads x = {.next = {.manifest = weights->model->manifest_digest,
                               .slots = weights->manifest.slots,
                               .layer = layer,
                               .expert = expert,
                               .memory_only = memory_only},
                      .end = weights_slot_bytes(weights, layer)};
    int rc;
    do {
        rc = reads_ask(r, &x, source, err);
        if (rc == 0)
            rc = reads_take(r, &x, source, &read, err);
        if (rc == 0)
            rc = weights_slot_write(weights, layer, slot, read.offset, r->buffer, read.length, err);
        if (rc == 0)
            (void)reload_progress(r, read.offset + read.length);
    } while (rc == 0 && (x.n > 0 || x.next.offset < x.end));
    while (x.n > 0 && rc != ERR_ABORTED) /* the same answer, most likely; the connection may be asked for others */
        (void)reads_take(r, &x, source, &read, &ignored);
    if (rc == 0)
        rc = weights_slot_verify(weights, layer, slot, expert, err);
    if (rc == ERR_CORRUPT)
        err_wrap(err, "as read from agent %s", r->job->work.sources[source].id);
    if (rc == 0)
        r->bytes += x.end;
    return rc;
}

/* From the first of the sources that has it; 0 also when none has: then it stays in `left`. */
static int expert_find(struct reload *r, uint32_t n, bool memory_only, uint32_t layer, uint32_t slot, struct err *err)
{
    int32_t *held = &r->left->held[expert_map_at(r->left, layer, r->job->work.self, slot)];
    for (uint32_t i = 0; i < n && *held >= 0; i++) {
        int rc = expert_copy(r, i, memory_only, layer, slot, (uint32_t)*held, err);
        if (rc == ERR_ABORTED)
            return rc;
        if (rc == 0)
            *held = -1;
        else
            r->last = *err;
    }
    return 0;
}

/* From the first n sources. */
static int reload_from(struct reload *r, uint32_t n, bool memory_only, struct err *err)
{
    int rc = 0;
    for (uint32_t layer = 0; layer < r->left->layers && n && rc == 0; layer++)
        for (uint32_t slot = 0; slot < r->left->slots && rc == 0; slot++)
            rc = expert_find(r, n, memory_only, layer, slot, err);
    return rc;
}

static uint64_t reload_bytes(const struct reload *r)
{
    uint64_t sum = 0;
    for (uint32_t layer = 0; layer < r->left->layers; layer++)
        for (uint32_t slot = 0; slot < r->left->slots; slot++)
            if (r->left->held[expert_map_at(r->left, layer, r->job->work.self, slot)] >= 0)
                sum += weights_slot_bytes(r->w->weights, layer);
    return sum;
}

/* The rest, from this agent's own files. */
static int reload_from_checkpoint(struct reload *r, struct err *err)
{
    uint64_t bytes = reload_bytes(r);
    struct checkpoint *c;
    if (bytes == 0)
        return 0;
    if (!r->w->config.checkpoint)
        return err_set(err, ERR_NOTFOUND, "this agent has no checkpoint path (start it with --checkpoint)");
    int rc = checkpoint_open(r->w->config.checkpoint, &c, err);
    if (rc < 0)
        return rc;
    rc = checkpoint_reload(c, r->w->weights, r->left, r->job->work.self, reload_progress, r, err);
    checkpoint_close(c);
    if (rc == 0)
        r->bytes += bytes;
    return rc;
}

/* What nobody had. */
static int reload_missing(const struct reload *r, struct err *err)
{
    for (uint32_t layer = 0; layer < r->left->layers; layer++)
        for (uint32_t slot = 0; slot < r->left->slots; slot++) {
            int32_t expert = r->left->held[expert_map_at(r->left, layer, r->job->work.self, slot)];
            if (expert >= 0)
                return err_set(err, r->last.code < 0 ? r->last.code : ERR_NOTFOUND, "expert %d of MoE layer %u: %s", expert,
                               layer, r->last.code < 0 ? r->last.text : "no other agent is named that has it");
        }
    return 0;
}

static int reload_run(struct reload *r, struct err *err)
{
    const struct work *work = &r->job->work;
    int rc = reload_from(r, work->n_holders, true, err);
    if (rc == 0 && work->load)
        return reload_from_checkpoint(r, err);
    if (rc == 0)
        rc = reload_from(r, work->n_sources, false, err);
    return rc < 0 ? rc : reload_missing(r, err);
}

int worker_job_reload(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    const struct work *work = &job->work;
    if (!work->map || !w->weights)
        return err_set(err, ERR_INVALID, work->map ? "this agent holds no weights" : "there is no map that says which experts to load");
    int rc = worker_model_update(w, work->model, err);
    if (rc < 0)
        return rc;
    struct reload r = {.w = w, .job = job};
    const struct expert_sources_config config = {
        .self = w->config.peer, .tls = w->config.tls, .members = work->sources, .n = work->n_sources,
        .timeout_ms = SOURCE_MS, .cancelled = reload_cancelled, .user = &r,
    };
    rc = expert_sources_open(&config, &r.sources, err);
    if (rc < 0)
        return rc;
    r.left = expert_map_copy(work->map);
    r.buffer = malloc(EXPERT_READ_MAX);
    if (r.left && r.buffer) {
        r.total = reload_bytes(&r);
        rc = reload_run(&r, err);
    } else {
        rc = err_set(err, ERR_NOMEM, "out of memory");
    }
    ret_result->bytes = r.bytes;
    free(r.buffer);
    expert_map_unref(r.left);
    expert_sources_close(r.sources);
    return rc;
}

/* ---- for others ---- */

void worker_lent_close(struct worker *w)
{
    checkpoint_close(w->lent);
    w->lent = NULL;
}

static int lent_open(struct worker *w, const struct expert_read *read, struct err *err)
{
    if (!w->config.checkpoint)
        return err_set(err, ERR_NOTFOUND, "it does not hold that expert, and has no checkpoint");
    w->lent_slots = read->slots;
    int rc = checkpoint_open(w->config.checkpoint, &w->lent, err);
    return rc < 0 ? rc : checkpoint_manifest_digest(w->lent, read->slots, &w->lent_manifest, err);
}

static int read_checkpoint(struct worker *w, const struct expert_read *read, void *ret_data, struct err *err)
{
    if (w->lent && w->lent_slots != read->slots)
        worker_lent_close(w);
    int rc = w->lent ? 0 : lent_open(w, read, err);
    if (rc == 0 && w->lent_manifest != read->manifest)
        rc = err_set(err, ERR_CONFLICT, "its checkpoint is of another model or layout than the one that serves");
    if (rc == 0)
        rc = checkpoint_expert_read(w->lent, read->layer, read->expert, read->offset, ret_data, read->length, err);
    if (rc < 0)
        worker_lent_close(w);
    return rc;
}

int worker_job_expert_read(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    const struct expert_read *read = &job->read;
    void *data = malloc(read->length);
    int rc = data ? 0 : err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0 && job->slot < 0)
        rc = read_checkpoint(w, read, data, err);
    else if (rc == 0 && (!w->weights || w->weights->model->manifest_digest != read->manifest))
        rc = err_set(err, ERR_CONFLICT, "it holds the weights of another model or layout now");
    else if (rc == 0)
        rc = weights_slot_read(w->weights, read->layer, (uint32_t)job->slot, read->offset, data, read->length, err);
    if (rc == 0 && !(ret_result->blob = blob_new(data, read->length)))
        rc = err_set(err, ERR_NOMEM, "out of memory");
    ret_result->bytes = read->length;
    free(data);
    return rc;
}
