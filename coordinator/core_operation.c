/* The life of an operation: accepted, prepared, committed, settled; or aborted.  Part of the coordinator's core; pure.
 *
 *   start        OPEN ALLOCATE KV ENGINE_PREPARE PROMISE DECIDE GO FINISH
 *   scale up     OPEN ALLOCATE GROUP_ID GROUP MAPPING WEIGHTS KV ENGINE_PREPARE PROMISE DECIDE GO
 *                (RETIRE GRACE FILL)* FINISH
 *   scale down   OPEN GROUP_ID GROUP MAPPING (RETIRE GRACE FILL)* DRAIN ENGINE_PREPARE PROMISE DECIDE GO LET_GO FINISH
 *   repair       OPEN PROMISE DECIDE GO FINISH
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
        "NONE",  "OPEN", "PENDING", "ALLOCATE",       "GROUP_ID", "GROUP",  "MAPPING", "WEIGHTS", "KV",    "RETIRE",
        "GRACE", "FILL", "DRAIN",   "ENGINE_PREPARE", "PROMISE",  "DECIDE", "GO",      "LET_GO",  "FINISH"};
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
    blob_unref(op->group_id);
    plan_unref(op->plan);
    expert_map_unref((struct expert_map *)(uintptr_t)op->in.now);
    free((void *)(uintptr_t)op->in.leaving);
    free((void *)(uintptr_t)op->in.joining);
    free((void *)(uintptr_t)op->in.node);
    view_unref(op->proposed);
    expert_map_unref(op->load_map);
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
    core_journal(c, DURABLE_META | DURABLE_OP, CONT_OPENED);
}

void operation_open_repair(struct coordinator *c, uint32_t ranks)
{
    c->durable.open.target = ranks;
    operation_open(c);
}

static void operation_drop(struct coordinator *c)
{
    operation_clear(c);
    op_record_done(&c->durable.open);
    c->durable.open = (struct op_record){0};
}

/* The same key again: the same operation, running or ended; or a conflict. */
static bool operation_same_key(struct coordinator *c, uint64_t request, const struct scale_request *s)
{
    const struct op_record *r = NULL;
    if (s->key[0] && c->op.phase != PHASE_NONE && strcmp(c->durable.open.key, s->key) == 0)
        r = &c->durable.open;
    else if (s->key[0] && strcmp(c->last.record.key, s->key) == 0)
        r = &c->last.record;
    if (!r)
        return false;
    if (r->target != s->target)
        core_reply(c, request, ERR_CONFLICT, r->op, r->outcome, NULL,
                   "operation id %s belongs to operation %llu, a scale to %u: use another id for %u", s->key,
                   (unsigned long long)r->op, r->target, s->target);
    else
        core_reply(c, request, 0, r->op, r->outcome, NULL, "operation %llu has this id already",
                   (unsigned long long)r->op);
    return true;
}

static int operation_dry_run(struct coordinator *c, uint64_t request, struct err *err)
{
    const struct op_record *r = &c->durable.open;
    if (r->kind == OP_START) {
        core_reply(c, request, 0, 0, OUTCOME_DONE, NULL, "would start on %u ranks, each loading its experts", r->n);
        return 0;
    }
    int rc = setup_plan(c, err);
    if (rc < 0)
        return rc;
    core_reply(c, request, 0, 0, OUTCOME_DONE, c->op.plan, "would scale from %u to %u ranks and move %llu bytes",
               c->view->n, r->target, (unsigned long long)c->op.bytes_planned);
    return 0;
}

void operation_scale(struct coordinator *c, uint64_t request, const struct scale_request *s)
{
    if (operation_same_key(c, request, s))
        return;
    uint32_t n = c->view ? c->view->n : 0;
    const struct op_record *r = &c->durable.open;
    if (c->op.phase != PHASE_NONE) {
        core_reply(c, request, ERR_CONFLICT, r->op, 0, NULL,
                   "operation %llu (%s to %u ranks) is running, in %s: wait for it, or `eepctl abort` it",
                   (unsigned long long)r->op, op_kind_name(r->kind), r->target, op_phase_name(c->op.phase));
        return;
    }
    if (s->target == 0) {
        core_reply(c, request, ERR_INVALID, 0, 0, NULL, "0 ranks cannot serve: scale to 1 or more");
        return;
    }
    if (s->target == n && s->n_remove == 0) {
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
    if (wait)
        op_record_done(&c->durable.open);
    if (wait)
        c->durable.open = (struct op_record){.kind = n ? OP_SCALE_UP : OP_START};
    snprintf(c->durable.open.key, sizeof(c->durable.open.key), "%s", s->key);
    c->durable.open.target = s->target;
    c->op.waits_for_agents = wait;
    c->op.accept = request;
    if (wait)
        c->op.wait_ns = c->now_ns + s->wait_agents_ms * MS;
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
    core_reply(c, request, 0, r->op, 0, NULL, "operation %llu is being aborted", (unsigned long long)r->op);
    operation_abort(c, ERR_ABORTED, "aborted by the operator");
}

static void operation_answer(struct coordinator *c, uint64_t request, const struct op_record *r)
{
    int code = r->outcome == OUTCOME_DONE ? 0 : r->outcome == OUTCOME_ABORTED ? ERR_ABORTED : ERR_IO;
    core_reply(c, request, code, r->op, r->outcome, NULL, "%s", r->why);
}

void operation_watch(struct coordinator *c, uint64_t request, uint64_t op)
{
    if (c->op.phase != PHASE_NONE && (!op || c->durable.open.op == op)) {
        if (c->n_waiters == WAITERS_MAX) {
            core_reply(c, request, ERR_LIMIT, op, 0, NULL, "%u clients wait for operations already", WAITERS_MAX);
            return;
        }
        c->waiters[c->n_waiters].request = request;
        c->waiters[c->n_waiters++].op = c->durable.open.op;
    } else if (op && c->last.record.op == op) {
        operation_answer(c, request, &c->last.record);
    } else {
        core_reply(c, request, ERR_NOTFOUND, op, 0, NULL, "operation %llu is not known here: see `eepctl history`",
                   (unsigned long long)op);
    }
}

/* ---- stages ---- */

static bool stage_concerns(const struct coordinator *c, enum op_stage stage, uint32_t i)
{
    const struct op_record *r = &c->durable.open;
    bool joins = i >= r->n_old, leaves = !r->stays[i];
    switch (stage) {
    case STAGE_ALLOCATE:
        return joins;
    case STAGE_GROUP_ID:
        return i == 0;
    case STAGE_KV:
    case STAGE_ENGINE_PREPARE:
        return !leaves;
    case STAGE_DRAIN:
    case STAGE_LET_GO:
        return leaves;
    case STAGE_GRACE: /* those whose slots this round overwrites, and that serve */
        for (uint32_t k = 0; k < c->op.plan->n_moves; k++)
            if (c->op.plan->moves[k].round == c->op.round && c->op.plan->moves[k].dst == i)
                return members_rank(c, c->op.peer[i]) >= 0;
        return false;
    default:
        return true;
    }
}

static void stage_send(struct coordinator *c, enum op_stage stage, uint32_t i)
{
    struct operation *op = &c->op;
    struct msg *m = core_send(c, op->peer[i], MSG_STAGE);
    if (!m)
        return;
    struct msg_stage *s = &m->stage;
    s->op = c->durable.open.op;
    s->stage = stage;
    s->round = stage == STAGE_FILL || stage == STAGE_GRACE ? op->round : 0;
    s->attempt = op->stage_attempt;
    s->deadline_ms = stage == STAGE_DRAIN                               ? c->config.drain_ms
                     : stage == STAGE_WEIGHTS || stage == STAGE_FILL ? c->config.transfer_ms
                                                                        : c->config.stage_ms;
    switch (stage) {
    case STAGE_ALLOCATE:
        s->load = c->durable.open.kind == OP_START;
        s->map = expert_map_ref(op->load_map);
        break;
    case STAGE_GROUP:
        s->blob = blob_ref(op->group_id);
        break;
    case STAGE_MAPPING:
        s->plan = plan_ref(op->plan);
        s->plan_digest = expert_map_digest(op->plan->target);
        break;
    case STAGE_ENGINE_PREPARE:
        s->view = view_ref(op->proposed);
        break;
    case STAGE_GRACE:
        s->step = op->stage_step;
        if (c->bug == COORDINATOR_BUG_GRACE_BY_OWN_ACK)
            for (size_t k = 0; k < c->map_acks.n; k++)
                if (c->map_acks.v[k].id == op->peer[i])
                    s->step = c->map_acks.v[k].value;
        break;
    default:
        break;
    }
}

/* Asks everybody whom the stage concerns; operation_next follows when all have answered. */
void operation_stage(struct coordinator *c, enum op_phase phase, enum op_stage stage)
{
    struct operation *op = &c->op;
    operation_phase(c, phase, "");
    op->stage_kind = stage;
    op->stage_attempt++;
    bool moves = stage == STAGE_WEIGHTS || stage == STAGE_FILL || stage == STAGE_ALLOCATE;
    op->deadline_ns = c->now_ns + (moves ? c->config.transfer_ms : c->config.stage_ms) * MS;
    for (uint32_t i = 0; i < c->durable.open.n; i++) {
        op->bytes_done += op->progress[i];
        op->progress[i] = 0;
    }
    arrivals_reset(&op->stage);
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        if (stage_concerns(c, stage, i) &&
            arrivals_expect(&op->stage, op->peer[i], c->durable.open.parties[i].incarnation) < 0)
            abort();
    for (uint32_t i = 0; i < c->durable.open.n && stage != STAGE_LET_GO; i++)
        if (stage_concerns(c, stage, i))
            stage_send(c, stage, i);
    if (arrivals_complete(&op->stage))
        operation_next(c);
}

static void operation_notify(struct coordinator *c, enum notify_type what)
{
    for (uint32_t i = 0; i < c->durable.open.n_old; i++) {
        struct msg *m = core_send(c, c->op.peer[i], MSG_NOTIFY);
        if (!m)
            continue;
        m->notify.op = c->durable.open.op;
        m->notify.what = what;
    }
    core_log(c, CORE_INFO, "%s: %zu engines counted", notify_name(what), c->op.stage.n);
}

static void send_op_begin(struct coordinator *c, uint32_t i)
{
    const struct op_record *r = &c->durable.open;
    struct msg *m = core_send(c, c->op.peer[i], MSG_OP_BEGIN);
    if (!m)
        return;
    struct msg_op_begin *b = &m->op_begin;
    b->op = r->op;
    b->kind = r->kind;
    b->role = i >= r->n_old                                            ? ROLE_NEW
              : r->kind == OP_SCALE_UP                                 ? ROLE_EXISTING
              : r->stays[i]                                            ? ROLE_REMAINING
                                                                       : ROLE_REMOVING;
    b->n = r->n;
    b->self = i;
    b->n_old = r->n_old;
    b->parties = calloc(r->n, sizeof(*b->parties));
    if (!b->parties)
        abort();
    memcpy(b->parties, r->parties, r->n * sizeof(*b->parties));
    b->model = r->kind == OP_START ? NULL : model_ref(c->durable.model);
}

/* ---- from phase to phase ---- */

static void operation_draining(struct coordinator *c, bool draining)
{
    if (!c->view)
        return;
    struct view *view = view_copy(c->view);
    if (!view)
        abort();
    for (uint32_t i = 0; i < c->durable.open.n; i++) {
        int rank = members_rank(c, c->op.peer[i]);
        if (rank >= 0)
            view->members[rank].draining = draining && !c->durable.open.stays[i];
    }
    view_unref(c->view);
    c->view = view;
    c->changed = true;
}

static void operation_begin(struct coordinator *c)
{
    struct operation *op = &c->op;
    const struct op_record *r = &c->durable.open;
    op->announced = true;
    for (uint32_t i = 0; i < r->n; i++)
        send_op_begin(c, i);
    switch ((enum op_kind)r->kind) {
    case OP_START:
    case OP_SCALE_UP:
        operation_stage(c, PHASE_ALLOCATE, STAGE_ALLOCATE);
        break;
    case OP_SCALE_DOWN:
        operation_draining(c, true);
        for (uint32_t i = 0; i < r->n; i++) {
            if (r->stays[i])
                continue;
            if (arrivals_expect(&op->drained, op->peer[i], r->parties[i].incarnation) < 0)
                abort();
            stage_send(c, STAGE_DRAIN, i);
        }
        operation_stage(c, PHASE_GROUP_ID, STAGE_GROUP_ID);
        break;
    case OP_REPAIR:
        operation_phase(c, PHASE_PROMISE, "repair");
        commit_start(c, FLIP_RESET, setup_target(c));
        break;
    }
}

/* Everything that must be there before the operation begins is there? */
static bool operation_ready(struct coordinator *c)
{
    struct operation *op = &c->op;
    if (c->durable.open.kind == OP_REPAIR)
        return true;
    if (op->waits_for_agents) {
        struct err err = {0};
        struct scale_request s = {.target = c->durable.open.target};
        int rc = setup_scale(c, &s, &err);
        if (rc == ERR_NOTFOUND || rc == ERR_UNREACHABLE)
            return false;
        if (rc < 0) {
            operation_abort(c, rc, "%s", err.text);
            return false;
        }
        op->waits_for_agents = false;
        op->wait_ns = 0;
        operation_phase(c, PHASE_OPEN, "enough agents are there");
        core_journal(c, DURABLE_META | DURABLE_OP, CONT_OPENED);
        return false;
    }
    return arrivals_complete(&c->map_acks);
}

void operation_opened(struct coordinator *c, uint64_t op)
{
    if (c->op.phase != PHASE_OPEN || c->durable.open.op != op)
        return;
    if (c->op.accept)
        core_reply(c, c->op.accept, 0, op, OUTCOME_RUNNING, NULL, "operation %llu is accepted", (unsigned long long)op);
    c->op.accept = 0;
    operation_phase(c, PHASE_PENDING, c->op.waits_for_agents ? "waits for agents" : "");
    operation_peer_ready(c);
}

void operation_peer_ready(struct coordinator *c)
{
    if (c->op.phase == PHASE_PENDING && operation_ready(c) && c->op.phase == PHASE_PENDING)
        operation_begin(c);
}

static void operation_propose(struct coordinator *c)
{
    struct view *view = setup_target(c);
    view_unref(c->op.proposed);
    c->op.proposed = view;
    operation_stage(c, PHASE_ENGINE_PREPARE, STAGE_ENGINE_PREPARE);
}

void operation_next(struct coordinator *c)
{
    struct operation *op = &c->op;
    const struct op_record *r = &c->durable.open;
    struct err err = {0};
    switch (op->phase) {
    case PHASE_ALLOCATE:
        operation_notify(c, NOTIFY_NEW_CORE_ENGINES_INIT_READY);
        if (r->kind == OP_START)
            operation_stage(c, PHASE_KV, STAGE_KV);
        else
            operation_stage(c, PHASE_GROUP_ID, STAGE_GROUP_ID);
        break;
    case PHASE_GROUP_ID:
        operation_stage(c, PHASE_GROUP, STAGE_GROUP);
        break;
    case PHASE_GROUP:
        if (setup_plan(c, &err) < 0)
            operation_abort(c, err.code, "no plan: %s", err.text);
        else
            operation_stage(c, PHASE_MAPPING, STAGE_MAPPING);
        break;
    case PHASE_MAPPING:
        if (r->kind == OP_SCALE_DOWN) {
            rounds_run(c);
            break;
        }
        operation_notify(c, NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY);
        operation_stage(c, PHASE_WEIGHTS, STAGE_WEIGHTS);
        break;
    case PHASE_WEIGHTS:
        op->round = op->plan->rounds_before;
        operation_stage(c, PHASE_KV, STAGE_KV);
        break;
    case PHASE_KV:
    case PHASE_DRAIN:
        operation_propose(c);
        break;
    case PHASE_RETIRE:
    case PHASE_GRACE:
    case PHASE_FILL:
        rounds_next(c);
        break;
    case PHASE_ENGINE_PREPARE:
        operation_phase(c, PHASE_PROMISE, "every engine is prepared");
        commit_start(c, FLIP_VIEW, view_ref(op->proposed));
        break;
    case PHASE_LET_GO:
        for (uint32_t i = 0; i < r->n; i++) {
            struct msg *m = core_send(c, op->peer[i], MSG_NOTIFY);
            if (m) {
                m->notify.op = r->op;
                m->notify.what = NOTIFY_SHUTDOWN_COMPLETE;
            }
        }
        operation_end(c, OUTCOME_DONE, op->why);
        break;
    default:
        break;
    }
}

/* All rounds of this side of the commit are done. */
void operation_rounds_done(struct coordinator *c)
{
    if (c->op.decided) {
        operation_end(c, OUTCOME_DONE, c->op.why);
        return;
    }
    operation_phase(c, PHASE_DRAIN, "the experts have moved");
    c->op.deadline_ns = c->now_ns + (c->config.drain_ms + c->config.stage_ms) * MS;
    if (arrivals_complete(&c->op.drained))
        operation_next(c);
}

void operation_committed(struct coordinator *c)
{
    c->op.decided = true;
    operation_phase(c, PHASE_GO, "decided");
}

void operation_settled(struct coordinator *c)
{
    if (c->durable.commit.step > c->grace_step)
        c->grace_step = c->durable.commit.step;
    arrivals_reset(&c->map_acks);
    c->map_announced = 0;
    if (c->durable.open.kind == OP_REPAIR)
        c->torn = false;
    if (c->op.phase != PHASE_GO)
        return;
    if (c->durable.open.kind == OP_SCALE_DOWN)
        operation_stage(c, PHASE_LET_GO, STAGE_LET_GO);
    else if (c->durable.open.kind == OP_SCALE_UP && c->op.plan)
        rounds_run(c);
    else
        operation_end(c, OUTCOME_DONE, c->op.why);
}

void operation_commit_failed(struct coordinator *c, const char *why)
{
    if (c->op.decided)
        operation_end(c, OUTCOME_DONE, "committed; the fill after the commit is incomplete");
    else
        operation_abort(c, ERR_ABORTED, "%s", why);
}

/* ---- the end ---- */

void operation_end(struct coordinator *c, enum op_outcome outcome, const char *why)
{
    struct durable *d = &c->durable;
    char text[256];
    snprintf(text, sizeof(text), "%s", why); /* may lie in what is cleared below */
    for (uint32_t i = 0; outcome == OUTCOME_DONE && c->op.announced && i < d->open.n; i++) {
        struct msg *m = core_send(c, c->op.peer[i], MSG_OP_END);
        if (m)
            m->op_end.op = d->open.op;
    }
    for (uint32_t i = 0; c->op.progress && i < d->open.n; i++)
        c->op.bytes_done += c->op.progress[i];
    operation_phase(c, PHASE_FINISH, outcome == OUTCOME_DONE ? "done" : text);
    snprintf(d->open.why, sizeof(d->open.why), "%s", text);
    d->open.outcome = outcome;
    d->open.ended_ms = c->wall_ms;
    d->open.bytes = c->op.bytes_done;

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
    core_journal(c, DURABLE_META | DURABLE_OP | DURABLE_HISTORY, CONT_ENDED);
    c->changed = true;
}

void operation_ended(struct coordinator *c, uint64_t op)
{
    const struct op_record *r = c->last.record.op == op ? &c->last.record : NULL;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < c->n_waiters; i++) {
        if (c->waiters[i].op != op || !r)
            c->waiters[kept++] = c->waiters[i];
        else
            operation_answer(c, c->waiters[i].request, r);
    }
    c->n_waiters = kept;
}

void operation_abort(struct coordinator *c, int code, const char *fmt, ...)
{
    if (c->op.phase == PHASE_NONE || c->op.decided)
        return;
    if (c->commit.state == COMMIT_DECIDING && c->bug != COORDINATOR_BUG_ABORT_WHILE_DECIDING)
        return; /* nothing may abort here */
    (void)code;
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
    if (c->op.announced && c->durable.open.kind == OP_SCALE_DOWN)
        operation_draining(c, false);
    operation_end(c, OUTCOME_ABORTED, why);
}

/* ---- what agents say ---- */

void operation_stage_done(struct coordinator *c, uint32_t peer, const struct msg_stage_done *d)
{
    struct operation *op = &c->op;
    struct op_record *r = &c->durable.open;
    int party = operation_party(c, peer);
    if (party < 0 || d->op != r->op)
        return;
    const char *id = c->peers[peer].member.id;
    if (d->code < 0 && !op->decided) {
        operation_abort(c, d->code, "agent %s: %s: %.180s", id, op_stage_name(d->stage), d->text);
        return;
    }
    if (d->code < 0 && d->stage != STAGE_LET_GO) {
        core_log(c, CORE_ERROR, "agent %s: %s of operation %llu: %s", id, op_stage_name(d->stage),
                 (unsigned long long)r->op, d->text);
        snprintf(op->why, sizeof(op->why), "committed; the fill after the commit is incomplete: agent %s: %.120s", id,
                 d->text);
        operation_end(c, OUTCOME_DONE, op->why);
        return;
    }
    if (d->stage == STAGE_DRAIN) {
        arrivals_add(&op->drained, peer, c->peers[peer].member.incarnation, 0);
        if (op->phase == PHASE_DRAIN && arrivals_complete(&op->drained))
            operation_next(c);
        return;
    }
    if (d->stage != op->stage_kind || (d->stage != STAGE_LET_GO && d->attempt != op->stage_attempt) ||
        arrivals_add(&op->stage, peer, c->peers[peer].member.incarnation, d->value) != ARRIVAL_COUNTED)
        return;
    op->progress[party] = d->bytes;
    c->changed = true;
    if (d->stage == STAGE_GROUP_ID && d->blob) {
        blob_unref(op->group_id);
        op->group_id = blob_ref(d->blob);
    }
    if (d->stage == STAGE_ALLOCATE && d->model) {
        struct err err = {0};
        if (!c->durable.model || !c->view) {
            /* a cold start: the first one to report sets the model, the others must agree */
            if (c->op.stage.missing + 1 == c->op.stage.n) {
                model_unref(c->durable.model);
                c->durable.model = model_ref(d->model);
            } else if (model_merge(c->durable.model, d->model, &err) < 0) {
                operation_abort(c, err.code, "agent %s has loaded something else: %s", id, err.text);
                return;
            }
        }
    }
    if (arrivals_complete(&op->stage))
        operation_next(c);
}

void operation_progress(struct coordinator *c, uint32_t peer, const struct msg_progress *p)
{
    int party = operation_party(c, peer);
    if (party < 0 || p->op != c->durable.open.op)
        return;
    c->op.progress[party] = p->bytes;
    if (c->op.deadline_ns && (c->op.phase == PHASE_WEIGHTS || c->op.phase == PHASE_FILL || c->op.phase == PHASE_ALLOCATE))
        c->op.deadline_ns = c->now_ns + c->config.transfer_ms * MS;
    c->changed = true;
}

/* An agent is back: what it missed of the operation is said again. */
void operation_hello(struct coordinator *c, uint32_t peer, const struct msg_hello *hello)
{
    const struct op_record *r = &c->durable.open;
    bool same = c->op.phase != PHASE_NONE && hello->op == r->op;
    if (hello->op && !same) {
        bool done = hello->op == c->durable.commit.op || (hello->op == c->last.record.op && c->last.record.outcome == OUTCOME_DONE);
        struct msg *m = core_send(c, peer, done ? MSG_OP_END : MSG_OP_ABORT);
        m->op_end.op = hello->op;
        snprintf(m->op_end.why, sizeof(m->op_end.why), "operation %llu has ended", (unsigned long long)hello->op);
    }
    int party = operation_party(c, peer);
    if (party < 0 || !c->op.announced)
        return;
    if (!same)
        send_op_begin(c, (uint32_t)party);
    if ((c->op.phase == PHASE_GRACE || c->op.phase == PHASE_FILL) && !arrivals_has(&c->op.stage, peer) &&
        stage_concerns(c, c->op.stage_kind, (uint32_t)party))
        stage_send(c, c->op.stage_kind, (uint32_t)party);
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
        operation_abort(c, ERR_ABORTED, "agent %s (%s rank) in %s: %s", c->peers[peer].member.id,
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
    if (op->wait_ns && op->phase == PHASE_PENDING && c->now_ns >= op->wait_ns) {
        struct err err = {0};
        struct scale_request s = {.target = c->durable.open.target};
        int rc = setup_scale(c, &s, &err);
        operation_abort(c, ERR_TIMEOUT, "%s", rc < 0 ? err.text : "agents came too late");
        return;
    }
    if (op->timeout_ns && c->now_ns >= op->timeout_ns && !op->decided && c->commit.state != COMMIT_DECIDING) {
        operation_abort(c, ERR_TIMEOUT, "its time-out passed in %s", op_phase_name(op->phase));
        return;
    }
    if (!op->deadline_ns || c->now_ns < op->deadline_ns)
        return;
    op->deadline_ns = 0;
    core_names(c, op->phase == PHASE_RETIRE ? &c->map_acks : op->phase == PHASE_DRAIN ? &op->drained : &op->stage,
               names, sizeof(names));
    if (!op->decided) {
        operation_abort(c, ERR_TIMEOUT, "no answer from %s in %s by its deadline", names, op_phase_name(op->phase));
    } else if (op->phase != PHASE_GO) {
        snprintf(op->why, sizeof(op->why), "committed; no answer from %s in %s", names, op_phase_name(op->phase));
        operation_end(c, OUTCOME_DONE, op->why);
    }
}

/* ---- after a restart of the coordinator ---- */

static void recover_parties(struct coordinator *c)
{
    struct op_record *r = &c->durable.open;
    c->op.peer = calloc(r->n + 1, sizeof(*c->op.peer));
    c->op.progress = calloc(r->n + 1, sizeof(*c->op.progress));
    if (!c->op.peer || !c->op.progress)
        abort();
    for (uint32_t i = 0; i < r->n; i++)
        c->op.peer[i] = members_find(c, r->parties[i].id);
    c->op.started_ns = c->op.phase_since_ns = c->now_ns;
}

/* A decision whose operation was closed already (a repair was to follow): its parties, from the decision itself. */
static void recover_orphan(struct coordinator *c)
{
    const struct commit_record *k = &c->durable.commit;
    struct op_record *r = &c->durable.open;
    r->op = k->op;
    r->kind = OP_SCALE_UP;
    r->n_old = k->n_old;
    r->target = k->view->n;
    r->parties = calloc(k->n_old + k->view->n + 1, sizeof(*r->parties));
    r->stays = calloc(k->n_old + k->view->n + 1, 1);
    if (!r->parties || !r->stays)
        abort();
    for (uint32_t i = 0; i < k->n_old; i++) {
        r->parties[r->n] = k->old[i];
        r->stays[r->n++] = view_rank(k->view, k->old[i].id) >= 0;
    }
    for (uint32_t i = 0; i < k->view->n; i++) {
        bool old = false;
        for (uint32_t j = 0; j < k->n_old; j++)
            old |= strcmp(k->old[j].id, k->view->members[i].id) == 0;
        if (old)
            continue;
        r->parties[r->n] = k->view->members[i];
        r->stays[r->n++] = 1;
    }
}

void operation_recover(struct coordinator *c)
{
    struct op_record *r = &c->durable.open;
    const struct commit_record *k = &c->durable.commit;
    bool unsettled = k->epoch && !k->settled;
    if (!r->op && unsettled)
        recover_orphan(c);
    if (!r->op) {
        rounds_recover(c);
        return;
    }
    for (uint32_t i = 0; i < r->n; i++)
        if (members_find(c, r->parties[i].id) == NOBODY) {
            struct view one = {.n = 1, .members = &r->parties[i]};
            if (members_recover(c, &one) < 0)
                abort();
        }
    recover_parties(c);
    bool decided = k->epoch && k->op == r->op && k->kind != FLIP_MAP;
    c->op.phase = PHASE_OPEN;
    c->op.announced = true;
    core_log(c, CORE_WARN, "recovered operation %llu (%s to %u ranks), %s", (unsigned long long)r->op,
             op_kind_name(r->kind), r->target,
             decided ? "decided: it goes on" : r->kind == OP_REPAIR ? "a repair: it goes on" : "undecided: it is aborted");
    if (unsettled) {
        if (decided) {
            c->op.decided = true;
            snprintf(c->op.why, sizeof(c->op.why), "committed; the coordinator restarted meanwhile");
            operation_phase(c, PHASE_GO, "recovered");
        } else {
            operation_phase(c, PHASE_RETIRE, "recovered");
        }
        commit_recover(c);
        return;
    }
    rounds_recover(c);
    if (decided) {
        c->op.decided = true;
        operation_end(c, OUTCOME_DONE, "committed; the coordinator restarted before the slots were all filled");
    } else if (r->kind == OP_REPAIR && c->bug != COORDINATOR_BUG_RESET_ABORTED_AFTER_RESTART) {
        c->torn = true;
        operation_phase(c, PHASE_PROMISE, "recovered");
        repair_resume(c);
    } else {
        operation_abort(c, ERR_ABORTED, "the coordinator restarted before the decision");
    }
}
