/* The operation that this agent takes part in, and its machine: how it begins, ends, is aborted or overtaken.
 * Part of the agent's core; pure. */
#include <stdlib.h>
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

bool agent_operation_running(const struct agent_core *core)
{
    return core->op.op && !machine_final(core->op.state);
}

/* ---- the machine ---- */

static void operation_transition(struct agent_core *core, enum machine_state to, enum machine_event event)
{
    struct agent_action *a = acore_act(core, AA_TRANSITION);
    a->role = core->op.role;
    a->from = core->op.state;
    a->to = to;
    a->event = event;
    a->op = core->op.op;
    a->epoch = core->promise.epoch ? core->promise.epoch : core->applied_epoch;
    core->op.state = to;
}

bool agent_operation_may(const struct agent_core *core, enum machine_event event)
{
    return agent_operation_running(core) && machine_next(core->op.role, core->op.state, event) != MS_NONE;
}

bool agent_operation_move(struct agent_core *core, enum machine_event event)
{
    if (!agent_operation_may(core, event))
        return false;
    operation_transition(core, machine_next(core->op.role, core->op.state, event), event);
    return true;
}

/* ---- begin and end ---- */

void agent_operation_clear(struct agent_core *core)
{
    struct core_op *op = &core->op;
    agent_stage_clear(core);
    free(op->parties);
    plan_unref(op->plan);
    memset(op, 0, sizeof(*op));
}

/* No longer needed once the machine is final; the answers stay, so that they can be repeated. */
static void operation_drop_plan(struct agent_core *core)
{
    plan_unref(core->op.plan);
    core->op.plan = NULL;
    core->op.prepared = false;
    agent_work_group_destroy(core);
}

/* A joiner that has promised: to the coordinator it may be a rank already, whose GO is under way. */
static bool begin_awaits_go(const struct agent_core *core)
{
    return core->joining && core->promise.epoch;
}

static const char *begin_objection(const struct agent_core *core, const struct msg_op_begin *m)
{
    if (!m->op || m->role < ROLE_EXISTING || m->role > ROLE_REMOVING)
        return "it names no operation or no role";
    if (!m->n || m->n > RANKS_MAX || m->self >= m->n || m->n_old > m->n || !m->parties)
        return "its parties do not add up";
    if (strcmp(m->parties[m->self].id, core->config.id) != 0 ||
        m->parties[m->self].incarnation != core->config.incarnation)
        return "its party is not this incarnation of this agent";
    if (m->role == ROLE_NEW && acore_member(core))
        return "this agent is in the view already";
    if (m->role != ROLE_NEW && !acore_member(core) && !begin_awaits_go(core))
        return "this agent is not in the view";
    return NULL;
}

void agent_operation_begin(struct agent_core *core, const struct msg_op_begin *m)
{
    struct core_op *op = &core->op;
    if (m->op && m->op <= op->op)
        return; /* a repeat, or stale */
    const char *objection = begin_objection(core, m);
    if (objection) {
        acore_illegal(core, "OP_BEGIN of operation %llu: %s", U(m->op), objection);
        return;
    }
    if (agent_operation_running(core))
        agent_operation_overtaken(core, m->op, m->role != ROLE_NEW);
    agent_restore_drop_op(core);
    agent_operation_clear(core);
    core->joining |= m->role == ROLE_NEW;
    op->op = m->op;
    op->kind = (enum op_kind)m->kind;
    op->role = (enum op_role)m->role;
    op->n = m->n;
    op->n_old = m->n_old;
    op->self = m->self;
    op->parties = acore_alloc(m->n, sizeof(*op->parties));
    memcpy(op->parties, m->parties, m->n * sizeof(*op->parties));
    if (m->model) {
        model_unref(core->model);
        core->model = model_ref(m->model);
    }
    operation_transition(core, machine_start(op->role), ME_EVENTS);
    /* Re-adopted with the promise that it gave in this repair: it is not asked again. */
    if (op->kind == OP_REPAIR && core->promise.epoch && core->promise.kind == FLIP_RESET)
        agent_operation_move(core, ME_ENGINE_PREPARE);
}

/* Rolls back what the operation made.  A promise is not touched: only ABORT or GO of its epoch releases it. */
static void operation_roll_back(struct agent_core *core, bool keep)
{
    struct agent_action *a = acore_act(core, AA_WORK_CANCEL);
    a->op = core->op.op;
    if (!core->op.decided && !(core->joining && keep)) {
        a = acore_act(core, AA_ENGINE_ABORT);
        a->op = core->op.op;
    }
    operation_drop_plan(core);
    if (core->joining && !keep)
        agent_release_begin(core, false, core->op.op, 0);
}

void agent_operation_overtaken(struct agent_core *core, uint64_t by, bool keep)
{
    acore_log(core, AGENT_LOG_WARN, "operation %llu is overtaken by operation %llu", U(core->op.op), U(by));
    if (agent_operation_move(core, ME_ABORT) || agent_operation_move(core, ME_END))
        operation_roll_back(core, keep);
}

void agent_operation_flipped(struct agent_core *core, uint64_t op)
{
    if (core->op.op != op)
        return;
    agent_operation_move(core, ME_FLIPPED);
    if (core->op.ended && agent_operation_move(core, ME_END))
        operation_drop_plan(core);
}

/* An operation that was decided may be ended while its flip is still ahead of us (a repair follows, or our link was
 * down): the machine ends after the flip, or is overtaken. */
void agent_operation_end(struct agent_core *core, const struct msg_op_end *m)
{
    if (m->op != core->op.op || !agent_operation_running(core))
        return; /* a repeat */
    if (agent_operation_move(core, ME_END)) {
        operation_drop_plan(core);
        return;
    }
    if (core->op.decided || core->promise.epoch) {
        core->op.ended = true;
        return;
    }
    acore_log(core, AGENT_LOG_ERROR, "operation %llu is ended in %s: %s", U(m->op), machine_state_name(core->op.state),
              m->why);
    if (agent_operation_move(core, ME_ABORT))
        operation_roll_back(core, false);
}

/* The promise was withdrawn: an operation that was ended in expectation of its GO has not been decided after all. */
void agent_operation_unpromised(struct agent_core *core)
{
    if (core->op.ended && !core->op.decided && agent_operation_move(core, ME_ABORT))
        operation_roll_back(core, false);
}

void agent_operation_abort(struct agent_core *core, const struct msg_op_end *m)
{
    if (m->op != core->op.op || !agent_operation_running(core))
        return;
    if (core->op.decided || !agent_operation_may(core, ME_ABORT)) {
        acore_illegal(core, "OP_ABORT of operation %llu after its decision", U(m->op));
        core->op.ended = true; /* over it is, and HELLO does not mention it again */
        if (agent_operation_move(core, ME_END))
            operation_drop_plan(core);
        return;
    }
    acore_log(core, AGENT_LOG_WARN, "operation %llu is aborted: %s", U(m->op), m->why);
    agent_operation_move(core, ME_ABORT);
    operation_roll_back(core, false);
}

void agent_operation_notify(struct agent_core *core, const struct msg_notify *m)
{
    if (m->op != core->op.op || !agent_operation_running(core) || m->what > NOTIFY_SHUTDOWN_COMPLETE)
        return;
    unsigned bit = 1u << m->what;
    if (core->op.notified & bit)
        return;
    enum machine_event event = ME_EVENTS;
    if (m->what == NOTIFY_NEW_CORE_ENGINES_INIT_READY)
        event = ME_NEW_CORE_ENGINES_INIT_READY;
    else if (m->what == NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY)
        event = ME_NEW_CORE_ENGINES_WEIGHTS_INIT_READY;
    if (event != ME_EVENTS && !agent_operation_may(core, event)) {
        acore_illegal(core, "%s in %s of operation %llu", notify_name((enum notify_type)m->what),
                      machine_state_name(core->op.state), U(m->op));
        return;
    }
    core->op.notified |= bit;
    if (event != ME_EVENTS)
        agent_operation_move(core, event);
    else
        acore_log(core, AGENT_LOG_INFO, "%s epoch %llu op %llu", notify_name((enum notify_type)m->what),
                  U(core->applied_epoch), U(m->op));
}
