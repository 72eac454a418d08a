/* What the worker does for the core: submission, completion, progress.  Part of the agent's core; pure.
 *
 * Clean-up (GROUP_DESTROY, RELEASE) belongs to no operation, so that cancelling one does not cancel it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

void agent_work_clear(struct agent_core *core)
{
    while (core->works) {
        struct core_work *w = core->works;
        core->works = w->next;
        free(w);
    }
}

/* What a transfer needs of the operation. */
static void work_fill_parties(const struct agent_core *core, struct work *w)
{
    const struct core_op *op = &core->op;
    w->n = op->n;
    w->self = op->self;
    /* In a cold start everybody has loaded the dense weights: nobody needs them. */
    w->dense_from = op->kind == OP_START ? op->n : op->n_old;
    w->parties = acore_alloc(op->n, sizeof(*w->parties));
    memcpy(w->parties, op->parties, op->n * sizeof(*w->parties));
    w->plan = plan_ref(op->plan);
}

const char *work_kind_name(enum work_kind kind)
{
    switch (kind) {
    case WORK_ALLOCATE: return "ALLOCATE";
    case WORK_LOAD: return "LOAD";
    case WORK_GROUP_ID: return "GROUP_ID";
    case WORK_GROUP: return "GROUP";
    case WORK_WEIGHTS: return "WEIGHTS";
    case WORK_FILL: return "FILL";
    case WORK_GROUP_DESTROY: return "GROUP_DESTROY";
    case WORK_RELEASE: return "RELEASE";
    case WORK_VERIFY: return "VERIFY";
    case WORK_RELOAD: return "RELOAD";
    }
    return "?";
}

struct work *agent_work_submit(struct agent_core *core, enum work_kind kind, const struct core_stage *s,
                               uint64_t request)
{
    struct core_work *record = acore_alloc(1, sizeof(*record));
    record->id = ++core->last_work;
    record->kind = kind;
    record->request = request;
    if (s) {
        record->op = core->op.op;
        record->stage = s->stage;
        record->round = s->round;
        record->attempt = s->attempt;
    }
    record->next = core->works;
    core->works = record;

    struct work *w = &acore_act(core, AA_WORK)->work;
    w->id = record->id;
    w->kind = kind;
    w->op = record->op;
    if (kind != WORK_GROUP_ID && kind != WORK_GROUP_DESTROY && kind != WORK_RELEASE)
        w->model = model_ref(core->model);
    if (s) {
        w->round = s->round;
        work_fill_parties(core, w);
    }
    return w;
}

bool agent_work_take_over(struct agent_core *core, const struct core_stage *before, const struct core_stage *s)
{
    for (struct core_work *w = core->works; w; w = w->next)
        if (w->op == core->op.op && w->stage == before->stage && w->round == before->round && w->attempt == before->attempt) {
            w->attempt = s->attempt;
            return true;
        }
    return false;
}

void agent_work_group_destroy(struct agent_core *core)
{
    if (!core->group)
        return;
    core->group = false;
    agent_work_submit(core, WORK_GROUP_DESTROY, NULL, 0);
}

/* ---- verify ---- */

static void work_verified(struct agent_core *core, uint64_t request, const struct agent_event *event)
{
    struct msg *m = acore_send(core, MSG_VERIFIED);
    if (!m)
        return;
    m->verified.request = request;
    if (!event)
        return; /* nothing is held here */
    m->verified.slots = event->value;
    m->verified.dense = core->model ? core->model->n_dense : 0;
    m->verified.bytes = event->bytes;
    m->verified.bad = event->bad ? event->bad : event->code ? 1 : 0;
    snprintf(m->verified.text, sizeof(m->verified.text), "%s", event->text ? event->text : "");
}

void agent_work_verify(struct agent_core *core, uint64_t request)
{
    if (!core->weights || !core->map) {
        work_verified(core, request, NULL);
        return;
    }
    struct work *w = agent_work_submit(core, WORK_VERIFY, NULL, request);
    w->map = expert_map_ref(core->map);
    w->self = core->map_rank;
}

/* ---- completion ---- */

static void work_allocated(struct agent_core *core, enum work_kind kind, const struct agent_event *event)
{
    core->weights = true;
    if (kind == WORK_LOAD && event->model) {
        model_unref(core->model);
        core->model = model_ref(event->model);
    }
    if (core->engine.attached)
        acore_act(core, AA_ENGINE_REGIONS);
}

static void work_stage_done(struct agent_core *core, const struct core_work *w, const struct agent_event *event)
{
    int code = event->code;
    if (w->op != core->op.op || !agent_operation_running(core))
        return; /* the operation has ended meanwhile */
    struct core_stage *s = agent_stage_find(core, w->stage, w->round, w->attempt);
    if (!s || s->state != STAGE_RUNNING)
        return;
    if (core->bug == AGENT_BUG_DIGEST_UNCHECKED && code == ERR_CORRUPT)
        code = 0;
    if (!code && w->kind == WORK_LOAD && !event->model)
        code = ERR_INVALID;
    if (!code && (w->kind == WORK_ALLOCATE || w->kind == WORK_LOAD))
        work_allocated(core, w->kind, event);
    struct msg_stage_done *d = agent_stage_answer(core, s, code, event->text);
    d->bytes = event->bytes;
    if (!code && w->kind == WORK_GROUP_ID)
        d->blob = blob_ref(event->blob);
    if (!code && w->kind == WORK_LOAD)
        d->model = model_ref(event->model);
    agent_stage_answered(core, s);
}

void agent_work_answer(struct agent_core *core, const struct agent_event *event)
{
    struct core_work **at = &core->works;
    while (*at && (*at)->id != event->work_id)
        at = &(*at)->next;
    struct core_work *w = *at;
    if (!w)
        return;
    *at = w->next;
    switch (w->kind) {
    case WORK_VERIFY: work_verified(core, w->request, event); break;
    case WORK_GROUP_DESTROY: break;
    case WORK_RELEASE: agent_release_work_done(core, w->id); break;
    default: work_stage_done(core, w, event); break;
    }
    free(w);
}

void agent_work_progress(struct agent_core *core, const struct agent_event *event)
{
    struct core_op *op = &core->op;
    if (!agent_operation_running(core) || core->now_ns < op->progress_ns)
        return;
    struct msg *m = acore_send(core, MSG_PROGRESS);
    if (!m)
        return;
    op->progress_ns = core->now_ns + CORE_PROGRESS_NS;
    m->progress.op = op->op;
    m->progress.bytes = event->value;
    m->progress.total = event->bytes;
}
