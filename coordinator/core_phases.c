/* From phase to phase: how an operation begins, which stage follows which, and what its commit means to it.
 * Part of the coordinator's core; pure.  The order of the phases is in core_operation.c. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define MS 1000000ULL

void operation_announce(struct coordinator *c, uint32_t i)
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

void operation_draining(struct coordinator *c, bool draining)
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

/* A rebalance that only changes the routing needs no group. */
static void operation_have_plan(struct coordinator *c)
{
    if (c->durable.open.kind != OP_REBALANCE)
        operation_stage(c, PHASE_MAPPING, STAGE_MAPPING);
    else if (c->op.plan->n_moves)
        operation_stage(c, PHASE_GROUP_ID, STAGE_GROUP_ID);
    else
        rounds_run(c);
}

static void operation_begin(struct coordinator *c)
{
    struct operation *op = &c->op;
    const struct op_record *r = &c->durable.open;
    op->announced = true;
    for (uint32_t i = 0; i < r->n; i++)
        operation_announce(c, i);
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
            operation_ask(c, STAGE_DRAIN, i);
        }
        operation_stage(c, PHASE_GROUP_ID, STAGE_GROUP_ID);
        break;
    case OP_REBALANCE:
        if (op->plan) /* of masked experts */
            rounds_run(c);
        else
            plan_operation(c);
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
            operation_abort(c, "%s", err.text);
            return false;
        }
        op->waits_for_agents = false;
        op->wait_ns = 0;
        operation_phase(c, PHASE_OPEN, "enough agents are there");
        core_journal(c, DURABLE_META | DURABLE_OP, CONT_OPENED);
        return false;
    }
    /* A map change that an aborted operation left behind settles first, with either kind of dispatch. */
    return arrivals_complete(&c->map_acks) && c->commit.state == COMMIT_IDLE;
}

void operation_opened(struct coordinator *c, uint64_t op)
{
    if (c->op.phase != PHASE_OPEN || c->durable.open.op != op)
        return;
    reload_opened(c);
    if (c->op.accept)
        core_reply(c, c->op.accept, 0, op, OUTCOME_RUNNING, NULL, "operation %llu is accepted", (unsigned long long)op);
    c->op.accept = 0;
    operation_phase(c, PHASE_PENDING, c->op.waits_for_agents ? "waits for agents" : "the journal has it");
    operation_peer_ready(c);
}

void operation_peer_ready(struct coordinator *c)
{
    if (c->op.phase == PHASE_PENDING && operation_ready(c) && c->op.phase == PHASE_PENDING && !upkeep_halts(c))
        operation_begin(c);
}

/* The fill after the commit must not end with this process. */
static void operation_remember(struct coordinator *c)
{
    struct op_record *r = &c->durable.open;
    if (r->kind != OP_SCALE_UP || r->plan || !c->op.plan)
        return;
    r->plan = plan_ref(c->op.plan);
    r->planned_over = expert_map_ref((struct expert_map *)(uintptr_t)c->op.in.now);
    r->round = c->op.round;
}

static void operation_propose(struct coordinator *c)
{
    struct view *view = setup_target(c);
    view_unref(c->op.proposed);
    c->op.proposed = view;
    c->op.held[0] = '\0';
    operation_stage(c, PHASE_ENGINE_PREPARE, STAGE_ENGINE_PREPARE);
}

void operation_next(struct coordinator *c)
{
    struct operation *op = &c->op;
    const struct op_record *r = &c->durable.open;
    if (upkeep_halts(c))
        return;
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
        if (r->kind != OP_REBALANCE)
            plan_operation(c);
        else
            operation_stage(c, PHASE_MAPPING, STAGE_MAPPING);
        break;
    case PHASE_PLAN:
        operation_have_plan(c);
        break;
    case PHASE_MAPPING:
        if (r->kind == OP_SCALE_DOWN || r->kind == OP_REBALANCE) {
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
        if (op->held[0]) {
            silent_settle(c, false);
            break;
        }
        operation_remember(c);
        operation_phase(c, PHASE_PROMISE, "every engine is prepared");
        commit_start(c, FLIP_VIEW, view_ref(op->proposed));
        break;
    case PHASE_RELOAD:
        reload_done(c);
        break;
    case PHASE_LET_GO:
        operation_notify(c, NOTIFY_SHUTDOWN_COMPLETE);
        operation_end(c, OUTCOME_DONE, op->why);
        break;
    default:
        break;
    }
}

/* All rounds of this side of the commit are done. */
void operation_rounds_done(struct coordinator *c)
{
    if (c->op.decided || c->durable.open.kind == OP_REBALANCE) {
        operation_end(c, OUTCOME_DONE, c->op.why);
        return;
    }
    char names[160], why[256];
    core_names(c, &c->op.drained, names, sizeof(names));
    snprintf(why, sizeof(why), "the experts have moved: %s%s", names[0] ? "awaits " : "every leaver is drained", names);
    operation_phase(c, PHASE_DRAIN, why);
    c->op.deadline_ns = c->now_ns + (c->config.drain_ms + c->config.stage_ms) * MS;
    if (arrivals_complete(&c->op.drained))
        operation_next(c);
}

void operation_committed(struct coordinator *c)
{
    c->op.decided = true;
    operation_phase(c, PHASE_GO, "decided");
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        c->peers[c->op.peer[i]].silent = false; /* everybody has promised, or was not asked */
    if (c->durable.open.kind == OP_REPAIR)
        repair_committed(c);
}

void operation_settled(struct coordinator *c)
{
    if (c->durable.commit.step > c->grace_step)
        c->grace_step = c->durable.commit.step;
    arrivals_reset(&c->map_acks);
    c->map_announced = 0;
    if (c->durable.open.kind == OP_REPAIR)
        c->torn = c->torn_epoch >= c->view->epoch; /* failed again already */
    if (c->op.phase != PHASE_GO)
        return;
    bool leave = false;
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        leave |= !c->durable.open.stays[i];
    if (leave)
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
        operation_abort(c, "%s", why);
}
