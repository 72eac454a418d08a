/* Letting go: a leaver that is dismissed, a joiner whose operation is aborted, an agent that is evicted or stopped.
 * Part of the agent's core; pure.
 *
 *   DISMISS, or abort of a joiner
 *     --> RELEASE_ENGINE (engine unmaps: released, detached, or 5 s and it is cut off)
 *     --> RELEASE_WORK   (group and regions are freed)
 *     --> a spare again; a leaver answers LET_GO */
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

/* The page as a spare has it: no flip, nothing to run, the gate open.  Whatever view the engine still knows is revoked,
 * so that it begins no step until the next GO. */
static void release_page(struct agent_core *core)
{
    agent_engine_void(core);
    acore_page(core, PAGE_FLIP_VIEW, 0);
    acore_page(core, PAGE_RUN_TO, 0);
    acore_page(core, PAGE_MAP_PENDING, 0);
    acore_page(core, PAGE_GATE, GATE_OPEN);
    core->run_to = 0;
}

static void release_forget_weights(struct agent_core *core)
{
    core->weights = core->weights_touched = false;
    expert_map_unref(core->map);
    core->map = NULL;
    core->map_unacked = core->map_flip = core->map_step = 0;
}

static void release_finish(struct agent_core *core)
{
    struct core_release r = core->release;
    memset(&core->release, 0, sizeof(core->release));
    release_forget_weights(core);
    if (r.let_go) {
        view_unref(core->before);
        core->before = NULL;
        release_page(core);
        acore_log(core, AGENT_LOG_INFO, "LET_GO epoch %llu op %llu: weights and communicators are released", U(r.epoch),
                  U(r.op));
        agent_stage_let_go(core, r.op);
        agent_operation_move(core, ME_LET_GO);
    } else {
        acore_log(core, AGENT_LOG_INFO, "operation %llu: weights and communicators are released", U(r.op));
    }
    if (core->stopping) {
        acore_act(core, AA_EXIT)->value = AGENT_EXIT_STOPPED;
        return;
    }
    for (struct core_stage *s = core->op.stages; s && agent_operation_running(core); s = s->next)
        if (s->stage == STAGE_ALLOCATE && s->state == STAGE_DEFERRED) {
            agent_stage_allocate(core, s);
            return;
        }
}

static void release_work(struct agent_core *core)
{
    agent_work_group_destroy(core);
    if (!core->weights_touched) {
        release_finish(core);
        return;
    }
    core->release.state = RELEASE_WORK;
    agent_work_submit(core, WORK_RELEASE, NULL, 0);
    core->release.work_id = core->last_work;
}

void agent_release_begin(struct agent_core *core, bool let_go, uint64_t op, uint64_t epoch)
{
    struct core_release *r = &core->release;
    core->joining = false;
    r->let_go |= let_go;
    if (let_go) {
        r->op = op;
        r->epoch = epoch;
    }
    if (r->state != RELEASE_NONE)
        return;
    r->op = op;
    bool mapped = core->weights || (core->weights_touched && core->engine.seals);
    if (!core->engine.attached || !mapped) {
        release_work(core);
        return;
    }
    r->state = RELEASE_ENGINE;
    r->deadline_ns = core->now_ns + CORE_RELEASE_NS;
    acore_act(core, AA_ENGINE_RELEASE);
}

void agent_release_engine_free(struct agent_core *core)
{
    if (core->release.state == RELEASE_ENGINE)
        release_work(core);
}

void agent_release_work_done(struct agent_core *core, uint64_t work_id)
{
    if (core->release.state == RELEASE_WORK && core->release.work_id == work_id)
        release_finish(core);
}

void agent_release_check_deadline(struct agent_core *core)
{
    if (core->release.state == RELEASE_ENGINE && core->now_ns >= core->release.deadline_ns)
        agent_engine_cut(core, "it did not release the weights"); /* comes back through release_engine_free */
}

/* DISMISS goes to every party of an operation; it means something to those who are not in the view any more. */
void agent_release_dismiss(struct agent_core *core, const struct msg_op_end *m)
{
    if (m->epoch < core->applied_epoch || (core->view && m->epoch == core->applied_epoch))
        return; /* stale; or a rank of the view */
    if (core->release.let_go)
        return;
    if (!core->view && !core->before) {
        if (core->joining)
            return; /* of an epoch before it began to join */
        agent_stage_let_go(core, m->op); /* it had let go already, or never held anything */
        return;
    }
    acore_log(core, AGENT_LOG_INFO, "DISMISS epoch %llu op %llu: lets go", U(m->epoch), U(m->op));
    if (core->engine.attached && (core->view || core->flip.epoch)) /* it may be inside a step for ever */
        agent_engine_cut(core, "the view has gone on without this rank");
    else if (core->view || core->flip.epoch)
        agent_engine_void(core); /* for an engine that attaches later: the flip stands in the page */
    if (core->seen_epoch < m->epoch)
        core->seen_epoch = m->epoch;
    if (core->applied_epoch < m->epoch)
        core->applied_epoch = m->epoch;
    memset(&core->promise, 0, sizeof(core->promise));
    memset(&core->fence, 0, sizeof(core->fence));
    memset(&core->flip, 0, sizeof(core->flip));
    if (agent_operation_running(core) && (core->op.op != m->op || core->op.ended))
        agent_operation_overtaken(core, m->op, true); /* its flip will not come any more */
    if (!core->before)
        core->before = view_ref(core->view); /* until it has let go, HELLO says that it holds something */
    view_unref(core->view);
    core->view = NULL;
    agent_release_begin(core, true, m->op, m->epoch);
}

/* No further step, and never one that was promised away: the engine may just have announced that one, and be turned back. */
static void release_shut_gate(struct agent_core *core)
{
    const struct core_promise *p = &core->promise;
    uint64_t gate = core->page.intent + 1;
    if (p->epoch && p->engine != PROMISE_JOINER && p->limit < gate)
        gate = p->limit;
    if (core->flip.leaver && core->flip.step < gate)
        gate = core->flip.step;
    if (core->view || core->flip.epoch || !core->before) /* that of a leaver that has left is shut */
        acore_page(core, PAGE_GATE, gate);
}

/* This incarnation is out: nothing of it may touch the view again. */
void agent_release_evicted(struct agent_core *core, const char *why)
{
    acore_log(core, AGENT_LOG_ERROR, "EVICTED epoch %llu op %llu: %s", U(core->applied_epoch), U(core->op.op), why);
    release_shut_gate(core);
    if (core->engine.attached)
        agent_engine_cut(core, "the agent is evicted");
    struct agent_action *a = acore_act(core, AA_WORK_CANCEL);
    a->op = core->op.op;
    agent_work_group_destroy(core);
    if (core->weights_touched)
        agent_work_submit(core, WORK_RELEASE, NULL, 0);
    release_forget_weights(core);
    a = acore_act(core, AA_EXIT);
    a->value = core->stopping ? AGENT_EXIT_STOPPED : AGENT_EXIT_EVICTED;
}

/* SIGTERM.  A rank asks to be drained first; the second SIGTERM does not ask. */
void agent_release_stop(struct agent_core *core)
{
    bool again = core->stopping, holds = core->view || core->before;
    core->stopping = true;
    if (!again && holds && core->welcomed) {
        acore_log(core, AGENT_LOG_INFO, "asks to leave the view before it stops");
        acore_send(core, MSG_LEAVE);
        return;
    }
    acore_act(core, AA_EXIT)->value = AGENT_EXIT_STOPPED;
}
