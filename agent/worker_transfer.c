/* The worker's groups and transfers: dense weights to joiners, the moves of a round, and proof of what arrived.
 * Worker thread. */
#include <poll.h>
#include <stdlib.h>

#include "agent/weights.h"
#include "agent/worker_internal.h"
#include "common/clock.h"
#include "common/digest.h"

#define PACE_MS 100 /* a batch of a limited transfer */

/* ---- calls of the transport: deadline renewed by progress ---- */

struct transfer_state {
    struct worker *w;
    const struct job *job;
    struct transport_call call;
    uint64_t before;       /* bytes of the calls before this one */
    struct slot_in *slots; /* of the round's items */
};

/* What an item of a round has brought so far, digested while it was in the cache. */
struct slot_in {
    const struct transfer *item;
    uint64_t digest, bytes; /* bytes: those in the digest */
};

static void transfer_renew(struct transfer_state *t)
{
    t->call.deadline_ns = clock_now_ns() + (uint64_t)t->w->config.transfer_timeout_ms * 1000000u;
    worker_sign(t->w, t->call.deadline_ns);
}

static void transfer_progress(void *user, uint64_t bytes)
{
    struct transfer_state *t = user;
    worker_progress(t->w, t->job, t->before + bytes, 0);
    transfer_renew(t);
}

static void transfer_init(struct transfer_state *t, struct worker *w, const struct job *job)
{
    *t = (struct transfer_state){.w = w, .job = job};
    t->call = (struct transport_call){.cancel_fd = w->cancel_fd, .progress = transfer_progress, .user = t};
    transfer_renew(t);
}

/* A piece that cannot be digested is left out, so that the whole slot is read again by round_verify. */
static void transfer_arrived(void *user, size_t item, uint32_t extent, size_t offset, size_t len)
{
    struct transfer_state *t = user;
    struct slot_in *slot = &t->slots[item];
    const struct extent *to = &slot->item->to[extent];
    struct memory_backend *memory = t->w->config.memory;
    uint64_t word = offset / 8, digest;
    for (uint32_t k = 0; k < extent; k++)
        word += digest_words(slot->item->to[k].len);
    struct err err = {0};
    if (memory->digest(memory, to->region, to->offset + offset, len, word, &digest, &err) < 0)
        return;
    slot->digest += digest;
    slot->bytes += len;
}

/* ---- the group ---- */

void worker_group_drop(struct worker *w)
{
    w->config.transport->destroy(w->group);
    w->group = NULL;
}

int worker_job_group(struct worker *w, const struct job *job, struct err *err)
{
    struct transfer_state t;
    transfer_init(&t, w, job);
    worker_group_drop(w); /* one at a time: the one before belonged to an operation that is over */
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
        return err_set(
            err, ERR_INVALID,
            "the plan moves layer %u expert %u from party %u slot %u to party %u slot %u, which is out of bounds",
            m->layer, m->expert, m->src, m->src_slot, m->dst, m->dst_slot);
    return 0;
}

/* Moves of the plan, by index, that are made together. */
struct batch {
    uint32_t from, end;
    uint64_t bytes; /* the most that come to one party */
};

/* The moves of one round that we have a part in, in the plan's order: both ends of a pair see the same sequence. */
static int round_transfers(struct worker *w, const struct job *job, const struct batch *batch,
                           struct transfer **ret_items, size_t *ret_n, struct err *err)
{
    const struct plan *plan = job->work.plan;
    uint32_t self = job->work.self;
    size_t n = 0;
    for (uint32_t i = batch->from; i < batch->end; i++)
        n += plan->moves[i].round == job->work.round && (plan->moves[i].src == self || plan->moves[i].dst == self);
    struct transfer *items = calloc(n + 1, sizeof *items);
    if (!items)
        return err_set(err, ERR_NOMEM, "out of memory");
    n = 0;
    for (uint32_t i = batch->from; i < batch->end; i++) {
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

/* No slot is written twice in one round: what was digested as it came would not be what lies there at the end. */
static int round_check(const struct worker *w, const struct transfer *items, size_t n, uint32_t self, struct err *err)
{
    const struct manifest *m = &w->weights->manifest;
    uint8_t *written = calloc((size_t)m->n_regions + 1, m->slots);
    if (!written)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        if (items[i].dst != self || items[i].n == 0)
            continue;
        const struct extent *to = &items[i].to[0];
        size_t region = (size_t)(to->region - w->weights->regions), slot = to->offset / m->regions[region].stride;
        if (written[region * m->slots + slot]++)
            rc = err_set(err, ERR_INVALID, "the plan writes slot %zu of MoE layer %u twice in one round", slot,
                         m->regions[region].layer);
    }
    free(written);
    return rc;
}

/* The slot's digest was taken while the bytes came. */
static bool slot_digested(const struct slot_in *in)
{
    uint64_t bytes = 0;
    for (uint32_t k = 0; k < in->item->n; k++)
        bytes += in->item->to[k].len;
    return in->bytes == bytes && bytes > 0;
}

static int round_found(void *user, const struct slot_claim *claim, int rc, struct err *err)
{
    const struct work *work = user;
    if (rc == ERR_CORRUPT)
        return err_wrap(err, "received from %s",
                        claim->from < work->n && work->parties ? work->parties[claim->from].id : "a party");
    return rc;
}

/* Slots that were not digested as they came - local copies, and all of them on GPUs - are read again together. */
static int round_verify(struct worker *w, const struct job *job, const struct batch *batch,
                        const struct slot_in *slots, size_t n, struct err *err)
{
    const struct work *work = &job->work;
    struct slot_claim *claims = calloc(n + 1, sizeof *claims);
    size_t item = 0, n_claims = 0;
    int rc = claims ? 0 : err_set(err, ERR_NOMEM, "out of memory");
    for (uint32_t i = batch->from; i < batch->end && rc == 0; i++) {
        const struct move *m = &work->plan->moves[i];
        if (m->round != work->round || (m->src != work->self && m->dst != work->self))
            continue;
        const struct slot_in *in = &slots[item++]; /* as round_transfers made them */
        const struct slot_claim claim = {.place = {m->layer, m->dst_slot}, .expert = m->expert, .from = m->src};
        if (m->dst != work->self)
            continue;
        if (!slot_digested(in))
            claims[n_claims++] = claim;
        else
            rc = round_found((void *)(uintptr_t)work, &claim,
                             weights_slot_check(w->weights, m->layer, m->dst_slot, m->expert, in->digest, err), err);
    }
    if (rc == 0)
        rc = worker_slots_verify(w, claims, n_claims, round_found, (void *)(uintptr_t)work, err);
    free(claims);
    return rc;
}

static int batch_move(struct worker *w, const struct job *job, const struct batch *batch, struct transfer_state *t,
                      uint64_t *bytes, struct err *err)
{
    struct transfer *items = NULL;
    size_t n = 0;
    int rc = round_transfers(w, job, batch, &items, &n, err);
    if (rc < 0)
        return rc;
    uint64_t received = 0;
    struct slot_in *slots = calloc(n + 1, sizeof *slots);
    rc = slots ? round_check(w, items, n, job->work.self, err) : err_set(err, ERR_NOMEM, "out of memory");
    if (rc < 0)
        goto free_items;
    for (size_t i = 0; i < n; i++)
        slots[i].item = &items[i];
    t->before = *bytes;
    t->slots = slots;
    t->call.arrived = transfer_arrived;
    transfer_renew(t);
    rc = w->config.transport->move(w->group, items, n, &t->call, &received, err);
    t->call.arrived = NULL;
    *bytes += received;
    if (rc == 0)
        rc = round_verify(w, job, batch, slots, n, err);
free_items:
    free(slots);
    free(items);
    return rc;
}

/* ---- pace ---- */

/* From `from` on as much as may come to a party in PACE_MS, at least one expert each; without a limit all of the plan.
 * Every party computes the same batches: the calls of the transport are made by all of them together. */
static struct batch batch_next(const struct worker *w, const struct work *work, uint32_t from)
{
    const struct plan *plan = work->plan;
    struct batch batch = {.from = from, .end = plan->n_moves};
    uint64_t expert = w->weights->model->expert_bytes, most = work->bandwidth / 1000 * PACE_MS, into[RANKS_MAX] = {0};
    for (uint32_t i = from; i < plan->n_moves && work->bandwidth; i++) {
        const struct move *m = &plan->moves[i];
        if (m->round != work->round || m->src == m->dst || m->dst >= RANKS_MAX)
            continue;
        if (into[m->dst] && into[m->dst] + expert > most) {
            batch.end = i;
            break;
        }
        into[m->dst] += expert;
        batch.bytes = into[m->dst] > batch.bytes ? into[m->dst] : batch.bytes;
    }
    return batch;
}

/* Until the batch has taken as long as the bandwidth asks for, but not so long that a peer which does not wait with us
 * would run into its deadline. */
static int pace_wait(const struct worker *w, const struct work *work, const struct batch *batch, uint64_t begun_ns,
                     struct err *err)
{
    uint64_t ms = batch->bytes * 1000 / work->bandwidth, spent_ms = (clock_now_ns() - begun_ns) / 1000000;
    if (ms > w->config.transfer_timeout_ms / 4)
        ms = w->config.transfer_timeout_ms / 4;
    struct pollfd cancel = {.fd = w->cancel_fd, .events = POLLIN};
    if (ms > spent_ms && poll(&cancel, 1, (int)(ms - spent_ms)) > 0)
        return err_set(err, ERR_ABORTED, "the transfer was cancelled");
    return 0;
}

static int round_move(struct worker *w, const struct job *job, struct transfer_state *t, uint64_t *bytes,
                      struct err *err)
{
    struct batch batch = {0};
    int rc = 0;
    do {
        uint64_t begun_ns = clock_now_ns();
        batch = batch_next(w, &job->work, batch.end);
        rc = batch_move(w, job, &batch, t, bytes, err);
        if (rc == 0 && batch.bytes)
            rc = pace_wait(w, &job->work, &batch, begun_ns, err);
    } while (rc == 0 && batch.end < job->work.plan->n_moves);
    return rc;
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
        have[i] = i < job->work.dense_from ? TRANSPORT_HAS : TRANSPORT_WANTS;
    uint64_t received = 0;
    int rc = w->config.transport->broadcast(w->group, extents, n, have, &t->call, &received, err);
    free(extents);
    *bytes += received;
    return rc;
}

static int dense_found(void *user, int rc, struct err *err)
{
    (void)user, (void)err;
    return rc;
}

int worker_job_fill(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err)
{
    int rc = transfer_ready(w, &job->work, err);
    if (rc == 0)
        rc = worker_model_update(w, job->work.model, err);
    if (rc < 0)
        return rc;
    struct transfer_state t;
    transfer_init(&t, w, job);
    if (job->work.kind == WORK_WEIGHTS && job->work.dense_from < w->group_n)
        rc = dense_broadcast(w, job, &t, &ret_result->bytes, err);
    if (rc == 0)
        rc = round_move(w, job, &t, &ret_result->bytes, err);
    if (rc == 0 && job->work.kind == WORK_WEIGHTS && job->work.self >= job->work.dense_from)
        rc = worker_dense_verify(w, dense_found, NULL, err);
    return rc;
}
