/* The coordinator's core: construction, the step function, replies and status.  See core.h; pure. */
#include "coordinator/core.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

void coordinator_config_default(struct coordinator_config *ret_config)
{
    *ret_config = (struct coordinator_config){
        .lease_ms = 3000,
        .heartbeat_ms = 500,
        .lead_ms = 250,
        .lead_min_ms = 40,
        .promise_attempts = 6,
        .flipped_ms = 10000,
        .indoubt_ms = 30000,
        .stage_ms = 30000,
        .transfer_ms = 60000,
        .drain_ms = 30000,
        .on_prepare_timeout = ENGINE_ABORT,
        .on_drain_timeout = ENGINE_CONTINUE,
        .slots = 0,
        .min_ranks = 2,
        .commit_balance = 0.98,
        .cross_cost = 4,
        .dip = 0.02,
        .load_window_ms = 5000,
        .load_horizon_ms = 300000,
        .load_samples = 16,
        .rebalance_after_ms = 60000,
        .rebalance_every_ms = 600000,
        .rebalance_horizon_ms = 1800000,
        .reload_after_ms = 10000,
    };
}

struct coordinator_action *core_act(struct coordinator *c, enum coordinator_action_type type)
{
    struct coordinator_actions *out = c->out;
    if (out->n == out->cap) {
        size_t cap = out->cap ? out->cap * 2 : 32;
        struct coordinator_action *v = realloc(out->v, cap * sizeof(*v));
        if (!v)
            abort(); /* a coordinator that cannot say what it decided must not go on: the journal has it */
        out->v = v;
        out->cap = cap;
    }
    struct coordinator_action *a = &out->v[out->n++];
    memset(a, 0, sizeof(*a));
    a->type = type;
    return a;
}

static void action_done(struct coordinator_action *a)
{
    msg_done(&a->msg);
    plan_unref(a->plan);
    plan_job_free(a->job);
    if (a->durable) {
        durable_done(a->durable);
        free(a->durable);
    }
}

void coordinator_actions_clear(struct coordinator_actions *actions)
{
    for (size_t i = 0; i < actions->n; i++)
        action_done(&actions->v[i]);
    actions->n = 0;
}

void coordinator_actions_done(struct coordinator_actions *actions)
{
    coordinator_actions_clear(actions);
    free(actions->v);
    *actions = (struct coordinator_actions){0};
}

void core_log(struct coordinator *c, int level, const char *fmt, ...)
{
    struct coordinator_action *a = core_act(c, CA_LOG);
    a->level = level;
    a->op = c->durable.open.op;
    a->epoch = c->view ? c->view->epoch : 0;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(a->text, sizeof(a->text), fmt, ap);
    va_end(ap);
}

void core_reply(struct coordinator *c, uint64_t request, int code, uint64_t op, uint32_t outcome, struct plan *plan,
                const char *fmt, ...)
{
    struct coordinator_action *a = core_act(c, CA_REPLY);
    a->request = request;
    a->code = code;
    a->op = op;
    a->outcome = outcome;
    a->plan = plan_ref(plan);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(a->text, sizeof(a->text), fmt, ap);
    va_end(ap);
}

void core_journal(struct coordinator *c, unsigned parts, enum continuation what)
{
    struct durable *copy = calloc(1, sizeof(*copy));
    struct pending_write *w = calloc(1, sizeof(*w));
    if (!copy || !w || durable_copy(copy, &c->durable) < 0)
        abort();
    struct coordinator_action *a = core_act(c, CA_JOURNAL);
    a->seq = ++c->seq;
    a->parts = parts;
    a->durable = copy;
    *w = (struct pending_write){
        .seq = a->seq, .op = c->durable.open.op, .epoch = c->commit.epoch, .what = what};
    *c->writes_end = w;
    c->writes_end = &w->next;
}

struct msg *core_send(struct coordinator *c, uint32_t peer, enum msg_type type)
{
    if (!c->peers[peer].conn)
        return NULL;
    struct coordinator_action *a = core_act(c, CA_SEND);
    a->conn = c->peers[peer].conn;
    a->msg.type = type;
    return &a->msg;
}

void core_names(const struct coordinator *c, const struct arrivals *set, char *ret_text, size_t size)
{
    size_t used = 0;
    if (size)
        ret_text[0] = '\0';
    for (size_t i = 0; i < set->n && used + 1 < size; i++) {
        if (set->v[i].arrived)
            continue;
        int k = snprintf(ret_text + used, size - used, "%s%s", used ? ", " : "", c->peers[set->v[i].id].member.id);
        used += k > 0 ? (size_t)k : 0;
    }
}

struct coordinator *coordinator_new(const struct coordinator_config *config, const struct durable *recovered,
                                    uint64_t now_ns)
{
    struct coordinator *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->config = *config;
    c->now_ns = now_ns;
    c->writes_end = &c->writes;
    balance_init(c);
    arrivals_init(&c->map_acks);
    arrivals_init(&c->commit.promised);
    arrivals_init(&c->commit.flipped);
    arrivals_init(&c->op.stage);
    arrivals_init(&c->op.drained);
    arrivals_init(&c->verify.missing);
    if (!recovered)
        return c;
    if (durable_copy(&c->durable, recovered) < 0)
        goto fail;
    op_record_done(&c->durable.ended);
    c->durable.ended = (struct op_record){0};
    c->view = view_ref(c->durable.view);
    c->recovering = true;
    if (c->view && members_recover(c, c->view) < 0)
        goto fail;
    return c;
fail:
    coordinator_free(c);
    return NULL;
}

void coordinator_free(struct coordinator *c)
{
    if (!c)
        return;
    operation_clear(c);
    arrivals_done(&c->op.stage);
    arrivals_done(&c->op.drained);
    commit_done(&c->commit);
    arrivals_done(&c->commit.promised);
    arrivals_done(&c->commit.flipped);
    arrivals_done(&c->map_acks);
    arrivals_done(&c->verify.missing);
    load_done(&c->load);
    op_record_done(&c->last.record);
    plan_unref((struct plan *)(uintptr_t)c->last.plan);
    durable_done(&c->durable);
    view_unref(c->view);
    expert_map_unref(c->mask.map);
    for (struct pending_write *w = c->writes, *next; w; w = next) {
        next = w->next;
        free(w);
    }
    free(c->peers);
    free(c);
}

static void journaled(struct coordinator *c, uint64_t seq)
{
    while (c->writes && c->writes->seq <= seq) {
        struct pending_write w = *c->writes;
        free(c->writes);
        c->writes = w.next;
        if (!c->writes)
            c->writes_end = &c->writes;
        switch (w.what) {
        case CONT_NONE:
            break;
        case CONT_OPENED:
            operation_opened(c, w.op);
            break;
        case CONT_EPOCH:
            commit_epoch_durable(c, w.epoch);
            break;
        case CONT_DECIDED:
            commit_decided(c, w.epoch);
            break;
        case CONT_MAP:
            rounds_map_durable(c);
            break;
        case CONT_PAUSED:
            upkeep_paused(c);
            break;
        case CONT_RESTARTED:
            upkeep_restarted(c);
            break;
        }
    }
}

/* ---- the step ---- */

static void message(struct coordinator *c, uint64_t conn, const struct msg *m)
{
    if (m->type == MSG_HELLO) {
        members_hello(c, conn, &m->hello);
        return;
    }
    uint32_t peer = members_by_conn(c, conn);
    if (peer == NOBODY) {
        struct coordinator_action *a = core_act(c, CA_CLOSE);
        a->conn = conn;
        snprintf(a->text, sizeof(a->text), "%s before HELLO", msg_type_name(m->type));
        return;
    }
    c->peers[peer].heard_ns = c->now_ns;
    switch (m->type) {
    case MSG_HEARTBEAT:
        break;
    case MSG_ENGINE:
        members_engine(c, peer, &m->engine);
        break;
    case MSG_STAGE_DONE:
        operation_stage_done(c, peer, &m->stage_done);
        break;
    case MSG_PROGRESS:
        operation_progress(c, peer, &m->progress);
        break;
    case MSG_PROMISE:
        commit_promise(c, peer, &m->promise);
        break;
    case MSG_REFUSE:
        commit_refuse(c, peer, &m->refuse);
        break;
    case MSG_FLIPPED:
        commit_flipped(c, peer, &m->flipped);
        break;
    case MSG_MAP_ACK:
        rounds_map_ack(c, peer, &m->map_ack);
        break;
    case MSG_VERIFIED:
        verify_result(c, peer, &m->verified);
        break;
    case MSG_LEAVE:
        upkeep_leave(c, peer);
        break;
    case MSG_LOAD:
        balance_window(c, peer, &m->load);
        break;
    default: {
        struct coordinator_action *a = core_act(c, CA_CLOSE);
        a->conn = conn;
        snprintf(a->text, sizeof(a->text), "agent %s sent %s, which only a coordinator sends",
                 c->peers[peer].member.id, msg_type_name(m->type));
        members_disconnected(c, peer);
    }
    }
}

/* Says once what a fault means to the service, and when it is over. */
static void service_log(struct coordinator *c, bool was_torn, const char *was_degraded)
{
    if (c->degraded[0] && strcmp(c->degraded, was_degraded) != 0 && !c->torn) {
        core_log(c, CORE_WARN, "%s", c->degraded);
    } else if (c->degraded[0] && strcmp(c->degraded, was_degraded) != 0) {
        char missing[256];
        repair_missing(c, missing, sizeof(missing));
        if (c->op.reload)
            core_log(c, CORE_ERROR, "not serving: %s; lost is %s", c->degraded, missing);
        else
            core_log(c, CORE_ERROR, "not serving: %s; waits for %s", c->degraded, missing[0] ? missing : "its ranks");
    }
    if (was_torn && !c->torn && c->view)
        core_log(c, CORE_INFO, "serving again, %llu ms after the fault was noticed",
                 (unsigned long long)((c->now_ns - c->torn_ns) / 1000000));
}

void coordinator_step(struct coordinator *c, uint64_t now_ns, const struct coordinator_event *ev,
                      struct coordinator_actions *out)
{
    /* After a long stop of our own nobody is late: their heartbeats wait in the sockets. */
    uint64_t gap = now_ns - c->now_ns;
    if (gap > 2000000ULL * c->config.heartbeat_ms)
        for (size_t i = 0; i < c->n_peers; i++)
            c->peers[i].heard_ns += gap;
    c->now_ns = now_ns;
    if (ev->wall_ms)
        c->wall_ms = ev->wall_ms;
    c->out = out;
    bool was_torn = c->torn;
    char was_degraded[sizeof(c->degraded)];
    memcpy(was_degraded, c->degraded, sizeof(was_degraded));
    if (c->recovering) {
        c->recovering = false;
        operation_recover(c);
    }
    switch (ev->type) {
    case CE_MSG:
        message(c, ev->conn, ev->msg);
        break;
    case CE_DISCONNECTED: {
        uint32_t peer = members_by_conn(c, ev->conn);
        if (peer != NOBODY)
            members_disconnected(c, peer);
        break;
    }
    case CE_JOURNALED:
        journaled(c, ev->seq);
        break;
    case CE_TICK:
        break;
    case CE_SCALE:
        operation_scale(c, ev->request, ev->scale, ev->known);
        break;
    case CE_ABORT:
        operation_abort_request(c, ev->request, ev->op);
        break;
    case CE_VERIFY:
        verify_start(c, ev->request);
        break;
    case CE_PAUSE:
        upkeep_pause(c, ev->request, ev->yes, ev->text);
        break;
    case CE_PLANNED:
        plan_arrived(c, ev->job);
        break;
    case CE_RESTART:
        upkeep_restart(c, ev->request, ev->yes);
        break;
    }
    members_tick(c);
    commit_tick(c);
    operation_tick(c);
    verify_check(c);
    if (c->torn && !was_torn)
        c->torn_ns = c->now_ns;
    repair_check(c);
    if (c->torn && !was_torn)
        c->torn_ns = c->now_ns;
    upkeep_check(c);
    balance_tick(c);
    service_log(c, was_torn, was_degraded);
    if (c->changed) {
        core_act(c, CA_CHANGED);
        c->changed = false;
    }
    c->out = NULL;
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
    return b && b < a ? b : a;
}

uint64_t coordinator_deadline(const struct coordinator *c)
{
    if (c->recovering)
        return 0;
    uint64_t d = members_deadline(c);
    if (c->commit.state == COMMIT_PREPARING || c->commit.state == COMMIT_GOING)
        d = earlier(d, c->commit.deadline_ns);
    if (c->op.phase != PHASE_NONE) {
        d = earlier(d, c->op.deadline_ns);
        d = earlier(d, c->op.halted_ns ? 0 : c->op.wait_ns);
        if (!c->op.decided && !c->op.halted_ns)
            d = earlier(d, c->op.timeout_ns);
    }
    if (c->verify.request)
        d = earlier(d, c->verify.deadline_ns);
    d = earlier(d, balance_deadline(c));
    if (repair_waits(c))
        d = earlier(d, c->retry_ns);
    d = earlier(d, reload_deadline(c));
    d = earlier(d, mask_deadline(c));
    return earlier(d, upkeep_deadline(c));
}

void coordinator_plant(struct coordinator *c, enum coordinator_bug bug)
{
    c->bug = bug;
}
