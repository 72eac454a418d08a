/* The life of an operation: accepted, prepared, committed, settled; or aborted.  Part of the coordinator's core; pure.
 *
 *   start        OPEN ALLOCATE KV ENGINE_PREPARE PROMISE DECIDE GO FINISH
 *   scale up     OPEN ALLOCATE GROUP_ID GROUP PLAN MAPPING WEIGHTS KV ENGINE_PREPARE PROMISE DECIDE GO
 *                (RETIRE GRACE FILL)* FINISH
 *   scale down   OPEN GROUP_ID GROUP PLAN MAPPING (RETIRE GRACE FILL)* DRAIN ENGINE_PREPARE PROMISE DECIDE GO LET_GO FINISH
 *   repair       OPEN PROMISE (RELOAD) DECIDE GO FINISH
 *   rebalance    OPEN PLAN GROUP_ID GROUP MAPPING (RETIRE GRACE FILL)* FINISH
 *
 * Before DECIDE any failure aborts: the old membership serves on with the latest committed map.  From DECIDE on the
 * operation only goes forward; a failure after the commit leaves slots unfilled, never a rank out. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define MS 1000000ULL

const char *op_phase_name(enum op_phase phase)
{
    static const char *const names[PHASES] = {
        "NONE",  "OPEN", "PENDING", "ALLOCATE",       "GROUP_ID", "GROUP",  "PLAN",   "MAPPING", "WEIGHTS", "KV",    "RETIRE",
        "GRACE", "FILL", "DRAIN",   "ENGINE_PREPARE", "PROMISE",  "RELOAD", "DECIDE", "GO",      "LET_GO",  "FINISH"};
    return names[phase];
}

int operation_party(const struct coordinator *c, uint32_t peer)
{
    const struct op_record *r = &c->durable.open;
    if (c->op.phase == PHASE_NONE)
        return -1;
    for (uint32_t i = 0; i < r->n; i++)
        if (c->op.peer[i] == peer && r->parties[i].incarnation == c->peers[peer].member.incarnation)
            return (int)i;
    return -1;
}

const struct arrivals *operation_awaited(const struct coordinator *c)
{
    switch (c->op.phase) {
    case PHASE_RETIRE: /* source-routed: acknowledgements; replicated: a commit */
        if (c->commit.state == COMMIT_IDLE)
            return &c->map_acks;
        return c->commit.state == COMMIT_PREPARING ? &c->commit.promised : &c->commit.flipped;
    case PHASE_PROMISE:
        return &c->commit.promised;
    case PHASE_GO:
        return &c->commit.flipped;
    case PHASE_DRAIN:
        return &c->op.drained;
    default:
        return &c->op.stage;
    }
}

void operation_phase(struct coordinator *c, enum op_phase phase, const char *why)
{
    struct operation *op = &c->op;
    if (op->phase != PHASE_NONE) {
        uint64_t ns = c->now_ns - op->phase_since_ns;
        uint32_t i = 0;
        while (i < op->n_times && op->times[i].phase != op->phase)
            i++;
        if (i < PHASE_TIMES) {
            op->times[i].phase = op->phase;
            op->times[i].ns += ns;
            if (i == op->n_times)
                op->n_times++;
        }
    }
    struct coordinator_action *a = core_act(c, CA_PHASE);
    a->op = c->durable.open.op;
    a->epoch = c->commit.epoch ? c->commit.epoch : c->view ? c->view->epoch : 0;
    snprintf(a->text, sizeof(a->text), "%s -> %s %s", op_phase_name(op->phase), op_phase_name(phase), why);
    op->phase = phase;
    op->phase_since_ns = c->now_ns;
    op->deadline_ns = 0;
    c->changed = true;
}

void operation_clear(struct coordinator *c)
{
    struct operation *op = &c->op;
    free(op->peer);
    free(op->progress);
    free(op->expected);
    blob_unref(op->group_id);
    plan_unref(op->plan);
    plan_input_done(&op->in);
    view_unref(op->proposed);
    expert_map_unref(op->load_map);
    expert_map_unref(op->reload);
    free(op->source);
    struct arrivals stage = op->stage, drained = op->drained;
    memset(op, 0, sizeof(*op));
    op->stage = stage;
    op->drained = drained;
    arrivals_reset(&op->stage);
    arrivals_reset(&op->drained);
}

/* ---- requests ---- */

static void operation_open(struct coordinator *c)
{
    c->op.started_ns = c->now_ns;
    c->durable.open.started_ms = c->wall_ms;
    c->durable.open.op = ++c->durable.op;
    operation_phase(c, PHASE_OPEN, op_kind_name(c->durable.open.kind));
    core_journal(c, DURABLE_META | DURABLE_OP | (c->op.reload ? DURABLE_VIEW : 0), CONT_OPENED);
}

void operation_open_by_itself(struct coordinator *c, uint32_t ranks)
{
    c->durable.open.target = ranks;
    operation_open(c);
}

void operation_drop(struct coordinator *c)
{
    operation_clear(c);
    op_record_done(&c->durable.open);
    c->durable.open = (struct op_record){0};
}

/* The same key again: the same operation, running or ended; or a conflict. */
static bool operation_same_key(struct coordinator *c, uint64_t request, const struct scale_request *s,
                               const struct op_record *known)
{
    const struct op_record *r = NULL;
    if (s->key[0] && c->op.phase != PHASE_NONE && strcmp(c->durable.open.key, s->key) == 0)
        r = &c->durable.open;
    else if (s->key[0] && strcmp(c->last.record.key, s->key) == 0)
        r = &c->last.record;
    else if (s->key[0] && known)
        r = known;
    if (!r)
        return false;
    bool rebalance = r->kind == OP_REBALANCE;
    if (rebalance != s->rebalance)
        core_reply(c, request, ERR_CONFLICT, r->op, r->outcome, NULL,
                   "operation id %s belongs to operation %llu, a %s: use another id", s->key, (unsigned long long)r->op,
                   op_kind_name(r->kind));
    else if (!rebalance && r->target != s->target)
        core_reply(c, request, ERR_CONFLICT, r->op, r->outcome, NULL,
                   "operation id %s belongs to operation %llu, a scale to %u: use another id for %u", s->key,
                   (unsigned long long)r->op, r->target, s->target);
    else
        core_reply(c, request, 0, r->op, r->outcome, NULL, "operation %llu has this id already",
                   (unsigned long long)r->op);
    return true;
}

/* A drain of agents of which none serves, or is about to, is done: a script may rely on that. */
static bool operation_drained_already(struct coordinator *c, uint64_t request, const struct scale_request *s)
{
    if (!s->drain || s->n_remove == 0)
        return false;
    for (uint32_t i = 0; i < s->n_remove; i++) {
        uint32_t peer = members_find(c, s->remove[i]);
        if (peer == NOBODY || operation_party(c, peer) >= 0 || (c->view && view_rank(c->view, s->remove[i]) >= 0))
            return false;
    }
    core_reply(c, request, 0, 0, OUTCOME_DONE, NULL, "agent %s%s serves nothing", s->remove[0],
               s->n_remove > 1 ? " (and the others)" : "");
    return true;
}

/* Answered when the plan is there; until then nothing is occupied by it. */
static int operation_dry_run(struct coordinator *c, uint64_t request, struct err *err)
{
    const struct op_record *r = &c->durable.open;
    if (r->kind != OP_START)
        return plan_ask(c, PLAN_DRY_RUN, request, 0, err);
    core_reply(c, request, 0, 0, OUTCOME_DONE, NULL, "would start on %u ranks, each loading its experts", r->n);
    return 0;
}

void operation_scale(struct coordinator *c, uint64_t request, const struct scale_request *s,
                     const struct op_record *known)
{
    if (operation_same_key(c, request, s, known) || operation_drained_already(c, request, s))
        return;
    uint32_t n = c->view ? c->view->n : 0;
    const struct op_record *r = &c->durable.open;
    if (c->durable.paused && !s->dry_run && !s->unattended) {
        core_reply(c, request, ERR_CONFLICT, r->op, 0, NULL, "operations are paused%s%s: `eepctl resume` ends that",
                   c->durable.paused_why[0] ? ", because: " : "", c->durable.paused_why);
        return;
    }
    if (c->op.phase != PHASE_NONE) {
        core_reply(c, request, ERR_CONFLICT, r->op, 0, NULL,
                   "operation %llu (%s to %u ranks) is running, in %s: wait for it, or `eepctl abort` it",
                   (unsigned long long)r->op, op_kind_name(r->kind), r->target, op_phase_name(c->op.phase));
        return;
    }
    if (s->rebalance && n == 0) {
        core_reply(c, request, ERR_NOTFOUND, 0, 0, NULL, "no view is committed yet, so there is nothing to rebalance");
        return;
    }
    if (s->target == 0 && n == 0 && s->n_remove) {
        core_reply(c, request, ERR_NOTFOUND, 0, 0, NULL, "no view is committed yet, so there is no rank to take away");
        return;
    }
    if (s->target == 0 && !s->rebalance) {
        core_reply(c, request, ERR_INVALID, 0, 0, NULL, "0 ranks cannot serve: scale to 1 or more");
        return;
    }
    if (s->target == n && s->n_remove == 0 && !s->rebalance) {
        core_reply(c, request, 0, 0, OUTCOME_DONE, NULL, "%u ranks already: nothing to do", n);
        return;
    }
    struct err err = {0};
    int rc = setup_scale(c, s, &err);
    bool wait = rc == ERR_NOTFOUND && s->target > n && s->wait_agents_ms && !s->dry_run;
    if (rc == 0 && s->dry_run)
        rc = operation_dry_run(c, request, &err);
    if ((rc < 0 && !wait) || s->dry_run) {
        if (rc < 0)
            core_reply(c, request, rc, 0, 0, NULL, "%s", err.text);
        operation_drop(c);
        return;
    }
    if (wait) {
        op_record_done(&c->durable.open);
        c->durable.open = (struct op_record){.kind = n ? OP_SCALE_UP : OP_START};
        c->op.wait_ns = c->now_ns + s->wait_agents_ms * MS;
    }
    snprintf(c->durable.open.key, sizeof(c->durable.open.key), "%s", s->key);
    c->durable.open.target = s->rebalance ? n : s->target;
    c->op.automatic = s->automatic;
    c->op.mib_s = s->mib_s ? s->mib_s : c->config.rebalance_mib_s;
    c->op.waits_for_agents = wait;
    c->op.accept = request;
    c->op.unattended = s->unattended;
    silent_policy(c, s->on_engine_timeout);
    if (s->timeout_ms)
        c->op.timeout_ns = c->now_ns + s->timeout_ms * MS;
    operation_open(c);
}

void operation_abort_request(struct coordinator *c, uint64_t request, uint64_t op)
{
    const struct op_record *r = &c->durable.open;
    if (c->op.phase == PHASE_NONE || (op && op != r->op)) {
        core_reply(c, request, ERR_NOTFOUND, op, 0, NULL, "no such operation is running");
        return;
    }
    if (c->op.decided || c->commit.state == COMMIT_DECIDING || r->kind == OP_REPAIR) {
        core_reply(c, request, ERR_CONFLICT, r->op, 0, NULL,
                   "operation %llu (%s) is past its decision and will complete: scale back afterwards",
                   (unsigned long long)r->op, op_kind_name(r->kind));
        return;
    }
    c->op.dropped = true;
    core_reply(c, request, 0, r->op, 0, NULL, "operation %llu is being aborted", (unsigned long long)r->op);
    operation_abort(c, "aborted by the operator");
}

/* ---- the end ---- */

void operation_end(struct coordinator *c, enum op_outcome outcome, const char *why)
{
    struct durable *d = &c->durable;
    char text[256];
    snprintf(text, sizeof(text), "%s", why); /* may lie in what is cleared below */
    if (outcome == OUTCOME_DONE)
        upkeep_report(c, text, sizeof(text));
    for (uint32_t i = 0; outcome == OUTCOME_DONE && c->op.announced && i < d->open.n; i++) {
        struct msg *m = core_send(c, c->op.peer[i], MSG_OP_END);
        if (m)
            m->op_end.op = d->open.op;
    }
    for (uint32_t i = 0; c->op.progress && i < d->open.n; i++) {
        c->op.bytes_done += c->op.progress[i];
        c->op.progress[i] = 0;
    }
    char how[512];
    snprintf(how, sizeof(how), "%s%s%s; %llu ms, moved %llu of %llu bytes, longest hold %llu us",
             outcome == OUTCOME_DONE ? "done" : outcome == OUTCOME_ABORTED ? "aborted" : "failed", text[0] ? ": " : "", text,
             (unsigned long long)((c->now_ns - c->op.started_ns) / 1000000), (unsigned long long)c->op.bytes_done,
             (unsigned long long)c->op.bytes_planned, (unsigned long long)(d->open.hold_ns_max / 1000));
    operation_phase(c, PHASE_FINISH, how);
    snprintf(d->open.why, sizeof(d->open.why), "%s", text);
    d->open.outcome = outcome;
    d->open.ended_ms = c->wall_ms;
    d->open.bytes = c->op.bytes_done;
    plan_unref(d->open.plan);
    expert_map_unref(d->open.planned_over);
    d->open.plan = NULL;
    d->open.planned_over = NULL;
    d->open.n_phases = 0;
    for (uint32_t i = 0; i < c->op.n_times && i < OP_PHASES_MAX; i++) {
        struct phase_time *t = &d->open.phases[d->open.n_phases++];
        snprintf(t->phase, sizeof(t->phase), "%s", op_phase_name(c->op.times[i].phase));
        t->ns = c->op.times[i].ns;
    }
    upkeep_ended(c, &d->open);

    struct op_info info;
    struct coordinator_status status;
    coordinator_status(c, c->now_ns, &status);
    info = status.op;
    info.plan = plan_ref(c->op.plan);
    info.phase = outcome == OUTCOME_DONE ? "DONE" : outcome == OUTCOME_ABORTED ? "ABORTED" : "FAILED";
    info.awaited[0] = '\0';
    op_record_done(&c->last.record);
    plan_unref((struct plan *)(uintptr_t)c->last.plan);
    if (op_record_copy(&info.record, &d->open) < 0)
        abort();
    c->last = info;
    op_record_done(&d->ended);
    d->ended = d->open;
    d->open = (struct op_record){0};
    uint64_t accept = c->op.accept;
    operation_clear(c);
    if (accept) /* it ended before it was accepted */
        core_reply(c, accept, ERR_ABORTED, d->ended.op, outcome, NULL, "%s", text);
    core_journal(c, DURABLE_META | DURABLE_OP | DURABLE_HISTORY, CONT_NONE);
    c->changed = true;
}

void operation_abort(struct coordinator *c, const char *fmt, ...)
{
    if (c->op.phase == PHASE_NONE || c->op.decided)
        return;
    if (c->commit.state == COMMIT_DECIDING && c->bug != COORDINATOR_BUG_ABORT_WHILE_DECIDING)
        return; /* nothing may abort here */
    char why[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof(why), fmt, ap);
    va_end(ap);
    core_log(c, CORE_WARN, "operation %llu is aborted in %s: %s", (unsigned long long)c->durable.open.op,
             op_phase_name(c->op.phase), why);
    commit_cancel(c, why);
    for (uint32_t i = 0; c->op.announced && i < c->durable.open.n; i++) {
        struct msg *m = core_send(c, c->op.peer[i], MSG_OP_ABORT);
        if (!m)
            continue;
        m->op_end.op = c->durable.open.op;
        snprintf(m->op_end.why, sizeof(m->op_end.why), "%s", why);
    }
    if (c->op.announced && (c->durable.open.kind == OP_SCALE_DOWN || c->op.left_out))
        operation_draining(c, false);
    operation_end(c, OUTCOME_ABORTED, why);
}

void operation_peer_gone(struct coordinator *c, uint32_t peer, const char *why)
{
    int party = operation_party(c, peer);
    const struct op_record *r = &c->durable.open;
    if (party < 0 || r->kind == OP_REPAIR)
        return; /* a repair waits for the lease, then repair_check starts it anew */
    if (!c->op.decided) {
        if (c->bug == COORDINATOR_BUG_INCARNATION_IGNORED && c->commit.state == COMMIT_PREPARING)
            return;
        if (c->bug == COORDINATOR_BUG_COUNT_BY_ID && c->commit.state == COMMIT_IDLE && (uint32_t)party >= r->n_old)
            return;
        operation_abort(c, "agent %s (%s rank) in %s: %s", c->peers[peer].member.id,
                        (uint32_t)party >= r->n_old ? "new" : r->stays[party] ? "existing" : "leaving",
                        op_phase_name(c->op.phase), why);
        return;
    }
    if (c->op.phase == PHASE_LET_GO && c->peers[peer].gone) {
        arrivals_add(&c->op.stage, peer, r->parties[party].incarnation, 0);
        if (arrivals_complete(&c->op.stage))
            operation_next(c);
    }
}

void operation_tick(struct coordinator *c)
{
    struct operation *op = &c->op;
    char names[160];
    if (op->phase == PHASE_NONE)
        return;
    if (op->halted_ns)
        return; /* paused: no time is running */
    if (op->wait_ns && op->phase == PHASE_PENDING && c->now_ns >= op->wait_ns) {
        struct err err = {0};
        struct scale_request s = {.target = c->durable.open.target};
        int rc = setup_scale(c, &s, &err);
        operation_abort(c, "%s", rc < 0 ? err.text : "agents came too late");
        return;
    }
    if (op->timeout_ns && c->now_ns >= op->timeout_ns && !op->decided && c->commit.state != COMMIT_DECIDING) {
        operation_abort(c, "its time-out passed in %s", op_phase_name(op->phase));
        return;
    }
    if (!op->deadline_ns || c->now_ns < op->deadline_ns)
        return;
    op->deadline_ns = 0;
    core_names(c, operation_awaited(c), names, sizeof(names));
    if (op->phase == PHASE_PLAN)
        snprintf(names, sizeof(names), "the planner");
    if (op->phase == PHASE_RELOAD) {
        reload_late(c);
    } else if (!op->decided && op->phase == PHASE_ENGINE_PREPARE) {
        silent_settle(c, true);
    } else if (!op->decided) {
        operation_abort(c, "no answer from %s in %s by its deadline", names, op_phase_name(op->phase));
    } else if (op->phase != PHASE_GO) {
        snprintf(op->why, sizeof(op->why), "committed; no answer from %s in %s", names, op_phase_name(op->phase));
        operation_end(c, OUTCOME_DONE, op->why);
    }
}
