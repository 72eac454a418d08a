/* The coordinator's core against scripted agents: what the tests of its stories share.
 *
 * The rig answers every message as a healthy agent would, at once; a test switches single answers off, cuts
 * connections, restarts the core from what its journal holds, and reads phases and messages back as text. */
#ifndef EEP_TESTS_COORDINATOR_RIG_H
#define EEP_TESTS_COORDINATOR_RIG_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core.h"

#define AGENTS 6
#define MS 1000000ULL

struct fake {
    bool up, engine, has_view, mute; /* mute: answers nothing */
    enum op_stage silent;            /* does not answer this stage */
    enum op_stage silent_once;       /* the same, the first time it is asked */
    enum op_stage fails;             /* answers this stage with an error */
    int fails_with;                  /* which; 0 = ERR_NOMEM */
    uint64_t asked;                  /* the last stage's attempt */
    bool strict;                     /* of the last DRAIN */
    unsigned drains;
    bool leaves;                     /* it is not in the view that it has last been told */
    bool no_promise, refuses, no_flip;
    uint64_t incarnation, conn, applied, promised, op;
    uint64_t step; /* next step of its engine */
    unsigned engines; /* that it had before this one: each has an endpoint of its own */
    enum op_role role;
    unsigned got[64]; /* messages by type */
    bool no_checkpoint;
    bool reload_own;       /* of the last RELOAD: its own checkpoint is good for it, */
    char reload_from[128]; /* and others are: "gpu2* gpu0 ", the star: it holds weights */
};

struct rig {
    struct coordinator *core;
    struct coordinator_config config; /* rig_start gives the defaults */
    struct coordinator_actions out;
    struct fake a[AGENTS];
    struct durable disk;
    bool has_disk, hold_journal, hold_plans;
    struct plan_job *jobs[8]; /* that are held */
    unsigned n_jobs;
    uint64_t now, conn, held_seq;
    char phases[2048];
    char reply[512];
    int reply_code;
    uint64_t reply_op;
    uint32_t reply_outcome;
    unsigned zombies_said; /* lines about gpu3 that is gone */
    unsigned replies, go_before_commit, prepares, leads[16];
    uint64_t epochs[16], grace;
    struct durable pending[64];
    uint64_t pending_seq[64];
    unsigned pending_parts[64], n_pending;
};

static inline void rig_event(struct rig *r, struct coordinator_event *ev);

static inline void rig_send(struct rig *r, int i, struct msg *m)
{
    struct coordinator_event ev = {.type = CE_MSG, .conn = r->a[i].conn, .msg = m, .wall_ms = 1};
    if (r->a[i].up && r->core)
        rig_event(r, &ev);
    msg_done(m);
}

static inline void rig_hello(struct rig *r, int i)
{
    struct fake *a = &r->a[i];
    struct msg m = {.type = MSG_HELLO};
    a->conn = ++r->conn;
    a->up = true;
    snprintf(m.hello.id, sizeof(m.hello.id), "gpu%d", i);
    snprintf(m.hello.address, sizeof(m.hello.address), "127.0.0.1:%d", 1000 + i);
    snprintf(m.hello.endpoint, sizeof(m.hello.endpoint), "engine%d.%u", i, a->engines);
    m.hello.incarnation = a->incarnation;
    m.hello.can_load = !a->no_checkpoint;
    m.hello.masks = true;
    m.hello.layers = 2;
    m.hello.logical = 8;
    m.hello.op = a->op;
    m.hello.applied_epoch = a->applied;
    m.hello.promised_epoch = a->promised;
    m.hello.limit = a->step + 3;
    m.hello.next = a->step;
    m.hello.engine = a->has_view ? PROMISE_RUNNING : PROMISE_JOINER;
    m.hello.dispatch = a->engine ? DISPATCH_SOURCE_ROUTED : DISPATCH_NONE;
    rig_send(r, i, &m);
}

static inline void rig_stage(struct rig *r, int i, const struct msg_stage *s)
{
    struct fake *a = &r->a[i];
    struct msg m = {.type = MSG_STAGE_DONE};
    a->asked = s->attempt;
    if (s->stage == STAGE_RELOAD) {
        a->reload_own = s->load;
        a->reload_from[0] = '\0';
        for (uint32_t k = 0; k < s->n_sources; k++) {
            size_t used = strlen(a->reload_from);
            snprintf(a->reload_from + used, sizeof(a->reload_from) - used, "%s%s ", s->sources[k].id,
                     k < s->n_holders ? "*" : "");
        }
    }
    if (s->stage == STAGE_DRAIN)
        a->strict = s->strict, a->drains++;
    if (s->stage == a->silent)
        return;
    if (s->stage == a->silent_once) {
        a->silent_once = 0;
        return;
    }
    if (s->stage == STAGE_GRACE)
        r->grace = s->step;
    m.stage_done.op = s->op;
    m.stage_done.stage = s->stage;
    m.stage_done.round = s->round;
    m.stage_done.attempt = s->attempt;
    m.stage_done.value = s->stage == STAGE_KV ? 1000 + (uint64_t)i : 0;
    if (s->stage == a->fails) {
        m.stage_done.code = a->fails_with ? a->fails_with : ERR_NOMEM;
        snprintf(m.stage_done.text, sizeof(m.stage_done.text), "no memory for 80 GiB");
    }
    if (s->stage == STAGE_GROUP_ID)
        m.stage_done.blob = blob_new("secret", 6);
    if (s->stage == STAGE_ALLOCATE && s->load) {
        m.stage_done.model = model_new(2, 8, 4, 1);
        m.stage_done.model->manifest = blob_new("manifest", 8);
        m.stage_done.model->manifest_digest = 42;
        m.stage_done.model->expert_bytes = 100;
        m.stage_done.model->dense_bytes = 1000;
    }
    rig_send(r, i, &m);
}

/* What a healthy agent answers. */
static inline void rig_receive(struct rig *r, int i, const struct msg *got)
{
    struct fake *a = &r->a[i];
    struct msg m = {0};
    a->got[got->type]++;
    if (a->mute)
        return;
    switch (got->type) {
    case MSG_OP_BEGIN:
        a->op = got->op_begin.op;
        a->role = got->op_begin.role;
        break;
    case MSG_OP_END:
    case MSG_OP_ABORT:
        a->op = 0;
        break;
    case MSG_STAGE:
        rig_stage(r, i, &got->stage);
        break;
    case MSG_PREPARE:
        if (a->no_promise)
            break;
        m.type = a->refuses ? MSG_REFUSE : MSG_PROMISE;
        if (a->refuses) {
            m.refuse.epoch = got->prepare.epoch;
            snprintf(m.refuse.why, sizeof(m.refuse.why), "not prepared");
        } else {
            a->promised = got->prepare.epoch;
            m.promise.epoch = got->prepare.epoch;
            m.promise.incarnation = a->incarnation;
            m.promise.engine = a->has_view ? PROMISE_RUNNING : PROMISE_JOINER;
            m.promise.limit = a->has_view ? a->step + 3 : 0;
            m.promise.next = a->step;
        }
        rig_send(r, i, &m);
        break;
    case MSG_WELCOME: /* a reconnect repeats what is true */
        if (!a->has_view || a->promised)
            break;
        m.type = MSG_FLIPPED;
        m.flipped.epoch = a->applied;
        rig_send(r, i, &m);
        break;
    case MSG_GO:
        r->go_before_commit += !r->has_disk || r->disk.commit.epoch != got->go.epoch;
        a->promised = 0;
        a->applied = got->go.epoch;
        a->has_view = true;
        a->leaves = true;
        for (uint32_t k = 0; k < got->go.view->n; k++)
            a->leaves &= got->go.view->members[k].incarnation != a->incarnation;
        a->step = got->go.step;
        if (a->no_flip)
            break;
        m.type = MSG_FLIPPED;
        m.flipped.epoch = got->go.epoch;
        m.flipped.hold_ns = 1000 * (uint64_t)i;
        rig_send(r, i, &m);
        break;
    case MSG_ABORT:
        a->promised = 0;
        break;
    case MSG_DISMISS:
        if (!a->leaves)
            break;
        a->has_view = a->leaves = false;
        m.type = MSG_STAGE_DONE;
        m.stage_done.op = got->op_end.op;
        m.stage_done.stage = STAGE_LET_GO;
        rig_send(r, i, &m);
        break;
    case MSG_MAP:
        m.type = MSG_MAP_ACK;
        m.map_ack.version = got->map.map->version;
        m.map_ack.step = a->step + 10 + (uint64_t)i;
        rig_send(r, i, &m);
        break;
    default:
        break;
    }
}

static inline void rig_durable(struct rig *r)
{
    while (r->n_pending && !r->hold_journal) {
        if (r->has_disk)
            durable_done(&r->disk);
        r->disk = r->pending[0];
        r->has_disk = true;
        uint64_t seq = r->pending_seq[0];
        r->n_pending--;
        memmove(r->pending, r->pending + 1, r->n_pending * sizeof(r->pending[0]));
        memmove(r->pending_seq, r->pending_seq + 1, r->n_pending * sizeof(r->pending_seq[0]));
        struct coordinator_event ev = {.type = CE_JOURNALED, .seq = seq};
        rig_event(r, &ev);
    }
}

/* The plans that were held, or the one that has just been asked for. */
static inline void rig_plans(struct rig *r)
{
    while (r->n_jobs) {
        struct plan_job *job = r->jobs[0];
        struct coordinator_event ev = {.type = CE_PLANNED, .job = job};
        memmove(r->jobs, r->jobs + 1, --r->n_jobs * sizeof(r->jobs[0]));
        plan_job_run(job);
        rig_event(r, &ev);
        plan_job_free(job);
    }
}

static inline void rig_event(struct rig *r, struct coordinator_event *ev)
{
    struct coordinator_actions out = {0};
    coordinator_step(r->core, r->now, ev, &out);
    for (size_t k = 0; k < out.n; k++) {
        struct coordinator_action *x = &out.v[k];
        if (x->type == CA_PHASE) {
            const char *to = strstr(x->text, "-> ");
            size_t used = strlen(r->phases);
            if (to)
                snprintf(r->phases + used, sizeof(r->phases) - used, "%.*s ", (int)strcspn(to + 3, " "), to + 3);
        } else if (x->type == CA_REPLY && x->request) {
            r->replies++;
            r->reply_code = x->code;
            r->reply_op = x->op;
            r->reply_outcome = x->outcome;
            snprintf(r->reply, sizeof(r->reply), "%s", x->text);
        } else if (x->type == CA_LOG) {
            r->zombies_said += strstr(x->text, "gpu3") && (strstr(x->text, "evicted") || strstr(x->text, "disconnected"));
        } else if (x->type == CA_JOURNAL) {
            ck_assert_uint_lt(r->n_pending, 64);
            ck_assert_int_eq(durable_copy(&r->pending[r->n_pending], x->durable), 0);
            r->pending_seq[r->n_pending++] = x->seq;
        }
    }
    /* agents answer after the step, in order; a send to a connection that was replaced is lost */
    for (size_t k = 0; k < out.n; k++) {
        struct coordinator_action *x = &out.v[k];
        for (int i = 0; i < AGENTS && (x->type == CA_SEND || x->type == CA_CLOSE); i++) {
            if (!r->a[i].up || r->a[i].conn != x->conn)
                continue;
            if (x->type == CA_CLOSE)
                r->a[i].up = false;
            else if (x->msg.type == MSG_PREPARE && i == 0 && r->prepares < 16) {
                r->leads[r->prepares] = x->msg.prepare.lead_ms;
                r->epochs[r->prepares++] = x->msg.prepare.epoch;
            }
            if (x->type == CA_SEND)
                rig_receive(r, i, &x->msg);
            break;
        }
        if (x->type == CA_JOURNAL)
            rig_durable(r);
        if (x->type == CA_PLAN) {
            ck_assert_uint_lt(r->n_jobs, 8);
            r->jobs[r->n_jobs++] = x->job;
            x->job = NULL;
            if (!r->hold_plans)
                rig_plans(r);
        }
    }
    coordinator_actions_done(&out);
}

static inline void rig_config(struct coordinator_config *ret_config)
{
    coordinator_config_default(ret_config);
    ret_config->slots = 4;
}

static inline void rig_start_with(struct rig *r, int agents, const struct coordinator_config *config)
{
    memset(r, 0, sizeof(*r));
    r->now = 1000 * MS;
    r->config = *config;
    r->core = coordinator_new(&r->config, NULL, r->now);
    for (int i = 0; i < agents; i++) {
        r->a[i].engine = true;
        r->a[i].incarnation = 100 + (uint64_t)i;
        rig_hello(r, i);
    }
}

static inline void rig_start(struct rig *r, int agents)
{
    struct coordinator_config config;
    rig_config(&config);
    rig_start_with(r, agents, &config);
}

static inline void rig_stop(struct rig *r)
{
    while (r->n_jobs)
        plan_job_free(r->jobs[--r->n_jobs]);
    coordinator_free(r->core);
    for (unsigned i = 0; i < r->n_pending; i++)
        durable_done(&r->pending[i]);
    if (r->has_disk)
        durable_done(&r->disk);
}

static inline void rig_scale(struct rig *r, uint32_t target, const char *remove)
{
    struct scale_request s = {.target = target, .n_remove = remove ? 1 : 0, .remove = &remove};
    struct coordinator_event ev = {.type = CE_SCALE, .request = 1, .scale = &s, .wall_ms = 1};
    r->phases[0] = '\0';
    rig_event(r, &ev);
}

static inline void rig_advance(struct rig *r, uint64_t ms)
{
    for (uint64_t end = r->now + ms * MS; r->now < end;) {
        r->now += 100 * MS;
        for (int i = 0; i < AGENTS; i++) {
            struct msg m = {.type = MSG_HEARTBEAT};
            if (r->a[i].up && !r->a[i].mute)
                rig_send(r, i, &m);
        }
        struct coordinator_event ev = {.type = CE_TICK};
        rig_event(r, &ev);
    }
}

static inline void rig_cut(struct rig *r, int i)
{
    struct coordinator_event ev = {.type = CE_DISCONNECTED, .conn = r->a[i].conn};
    r->a[i].up = false;
    rig_event(r, &ev);
}

static inline void rig_restart(struct rig *r)
{
    coordinator_free(r->core);
    for (unsigned i = 0; i < r->n_pending; i++)
        durable_done(&r->pending[i]);
    r->n_pending = 0;
    r->hold_journal = false;
    r->core = coordinator_new(&r->config, r->has_disk ? &r->disk : NULL, r->now);
    struct coordinator_event ev = {.type = CE_TICK};
    rig_event(r, &ev);
    for (int i = 0; i < AGENTS; i++)
        if (r->a[i].up)
            rig_hello(r, i);
}

static inline struct coordinator_status status(struct rig *r)
{
    struct coordinator_status s;
    coordinator_status(r->core, r->now, &s);
    return s;
}

static inline uint32_t view_ranks(struct rig *r)
{
    const struct view *view = status(r).view;
    return view ? view->n : 0;
}
#define CK_RANKS(r, ranks) ck_assert_uint_eq(view_ranks(r), ranks)

#endif
