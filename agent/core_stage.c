/* The stages of an operation: what the coordinator commands, and the answers.  Part of the agent's core; pure.
 *
 * A stage is one record, found by (stage, round, attempt): running, or finished with the answer that was given, which
 * is repeated when the command is.  What the worker or the engine does for a stage ends in agent_stage_answer. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

/* What the stage's command, or its success, means to the machine; ME_EVENTS = nothing. */
static enum machine_event stage_event(enum op_stage stage)
{
    switch (stage) {
    case STAGE_ALLOCATE: return ME_INIT_DONE;
    case STAGE_GROUP: return ME_GROUP_DONE;
    case STAGE_MAPPING: return ME_MAPPING_DONE;
    case STAGE_WEIGHTS: return ME_WEIGHTS_DONE;
    case STAGE_KV: return ME_KV_DONE;
    case STAGE_ENGINE_PREPARE: return ME_ENGINE_PREPARE;
    case STAGE_GRACE:
    case STAGE_FILL: return ME_RESHUFFLE;
    default: return ME_EVENTS;
    }
}

/* These tell the machine when the command comes, the others when it has been carried out. */
static bool stage_moves_at_once(enum op_stage stage)
{
    return stage == STAGE_ENGINE_PREPARE || stage == STAGE_GRACE || stage == STAGE_FILL;
}

/* ---- answers ---- */

static void stage_free(struct core_stage *s)
{
    expert_map_unref(s->map);
    plan_unref(s->plan);
    free(s->sources);
    msg_done(&s->answer);
    free(s);
}

void agent_stage_clear(struct agent_core *core)
{
    while (core->op.stages) {
        struct core_stage *s = core->op.stages;
        core->op.stages = s->next;
        stage_free(s);
    }
}

struct core_stage *agent_stage_find(struct agent_core *core, enum op_stage stage, uint32_t round, uint64_t attempt)
{
    for (struct core_stage *s = core->op.stages; s; s = s->next)
        if (s->stage == stage && s->round == round && s->attempt == attempt)
            return s;
    return NULL;
}

static bool stage_is_latest(const struct agent_core *core, enum op_stage stage, uint32_t round, uint64_t attempt)
{
    for (const struct core_stage *s = core->op.stages; s; s = s->next)
        if (s->stage == stage && s->round == round && s->attempt > attempt)
            return false;
    return true;
}

static struct core_stage *stage_add(struct agent_core *core, enum op_stage stage, uint32_t round, uint64_t attempt)
{
    struct core_stage *s = acore_alloc(1, sizeof(*s));
    s->stage = stage;
    s->round = round;
    s->attempt = attempt;
    s->state = STAGE_RUNNING;
    s->deadline_ns = CORE_NEVER;
    s->next = core->op.stages;
    core->op.stages = s;
    return s;
}

struct msg_stage_done *agent_stage_answer(struct agent_core *core, struct core_stage *s, int code, const char *text)
{
    struct msg_stage_done *d = &s->answer.stage_done;
    s->state = STAGE_FINISHED;
    s->answer.type = MSG_STAGE_DONE;
    d->op = core->op.op;
    d->stage = s->stage;
    d->round = s->round;
    d->attempt = s->attempt;
    d->code = code;
    snprintf(d->text, sizeof(d->text), "%s", text && *text ? text : code ? err_code_name(code) : "");
    return d;
}

static void stage_send(struct agent_core *core, const struct core_stage *s)
{
    struct msg *m = acore_send(core, MSG_STAGE_DONE);
    if (m)
        msg_copy(m, &s->answer);
}

void agent_stage_answered(struct agent_core *core, struct core_stage *s)
{
    const struct msg_stage_done *d = &s->answer.stage_done;
    if (d->code)
        acore_log(core, AGENT_LOG_ERROR, "%s of operation %llu failed: %s", op_stage_name(s->stage), U(d->op), d->text);
    stage_send(core, s);
    enum machine_event event = stage_event(s->stage);
    if (!d->code && event != ME_EVENTS && !stage_moves_at_once(s->stage) &&
        stage_is_latest(core, s->stage, s->round, s->attempt))
        agent_operation_move(core, event);
}

void agent_stage_end(struct agent_core *core, struct core_stage *s, int code, const char *text)
{
    agent_stage_answer(core, s, code, text);
    agent_stage_answered(core, s);
}

/* Not asked for by a STAGE: the answer to DISMISS. */
void agent_stage_let_go(struct agent_core *core, uint64_t op)
{
    if (op && op == core->op.op) {
        struct core_stage *s = agent_stage_find(core, STAGE_LET_GO, 0, 0);
        if (!s)
            s = stage_add(core, STAGE_LET_GO, 0, 0);
        agent_stage_end(core, s, 0, NULL);
        return;
    }
    struct msg *m = acore_send(core, MSG_STAGE_DONE); /* an operation of before a restart of the operation's record */
    if (m) {
        m->stage_done.op = op;
        m->stage_done.stage = STAGE_LET_GO;
    }
}

void agent_stage_repeat_let_go(struct agent_core *core)
{
    const struct core_stage *s = agent_stage_find(core, STAGE_LET_GO, 0, 0);
    if (s && s->state == STAGE_FINISHED)
        stage_send(core, s);
}

/* ---- the stages ---- */

void agent_stage_allocate(struct agent_core *core, struct core_stage *s)
{
    if (core->release.state != RELEASE_NONE) {
        s->state = STAGE_DEFERRED; /* the regions of an earlier operation are not free yet */
        return;
    }
    s->state = STAGE_RUNNING;
    if (s->load && !s->map) {
        agent_stage_end(core, s, ERR_INVALID, "ALLOCATE of a cold start without a map");
        return;
    }
    if (!s->load && !core->model) {
        agent_stage_end(core, s, ERR_INVALID, "ALLOCATE without a model; OP_BEGIN carries it");
        return;
    }
    bool seals = core->engine.attached && core->engine.seals;
    if (s->load && !seals && !core->config.can_load) {
        agent_stage_end(core, s, ERR_NOTFOUND, "no checkpoint is configured and no engine that seals is attached");
        return;
    }
    core->weights_touched = true;
    if (s->load && seals) {
        struct agent_action *a = acore_act(core, AA_ENGINE_LOAD);
        a->map = expert_map_ref(s->map);
        a->self = core->op.self;
        a->op = core->op.op;
        a->attempt = s->attempt;
        return;
    }
    struct work *w = agent_work_submit(core, s->load ? WORK_LOAD : WORK_ALLOCATE, s, 0);
    w->map = expert_map_ref(s->map);
}

void agent_stage_sealed(struct agent_core *core, const struct agent_event *event)
{
    struct core_stage *s = core->op.stages;
    while (s && !(s->stage == STAGE_ALLOCATE && s->load && s->state == STAGE_RUNNING))
        s = s->next;
    if (!s || !agent_operation_running(core))
        return; /* aborted meanwhile */
    if (event->code || !event->model) {
        agent_stage_end(core, s, event->code ? event->code : ERR_INVALID,
                  event->text ? event->text : "sealed without a model");
        return;
    }
    core->weights = true;
    model_unref(core->model);
    core->model = model_ref(event->model);
    struct msg_stage_done *d = agent_stage_answer(core, s, 0, NULL);
    d->model = model_ref(event->model);
    d->bytes = event->bytes;
    agent_stage_answered(core, s);
}

static void stage_mapping(struct agent_core *core, struct core_stage *s, const struct msg_stage *m)
{
    const struct plan *plan = m->plan;
    const struct model *model = core->model;
    char text[160];
    if (!plan || !plan->target || plan->parties != core->op.n || plan->target->ranks != core->op.n) {
        snprintf(text, sizeof(text), "the plan is not over the %u parties of the operation", core->op.n);
        agent_stage_end(core, s, ERR_INVALID, text);
        return;
    }
    if (!model) {
        agent_stage_end(core, s, ERR_INVALID, "a plan for a model that this agent does not know");
        return;
    }
    const struct expert_map *t = plan->target;
    if (t->layers != model->layers || t->logical != model->logical || t->slots != model->slots) {
        snprintf(text, sizeof(text), "the plan is for %u layers, %u experts, %u slots; the model has %u, %u, %u",
                 t->layers, t->logical, t->slots, model->layers, model->logical, model->slots);
        agent_stage_end(core, s, ERR_INVALID, text);
        return;
    }
    if (expert_map_digest(t) != m->plan_digest) {
        agent_stage_end(core, s, ERR_CORRUPT, "the target map does not match its digest");
        return;
    }
    plan_unref(core->op.plan);
    core->op.plan = plan_ref(m->plan);
    agent_stage_end(core, s, 0, NULL);
}

/* A coordinator that was restarted asks again for moves that are under way, or done.  They are made once: a peer that has
 * not heard of them before makes them once as well, and each end waits for the other. */
static bool stage_moved(struct agent_core *core, struct core_stage *s)
{
    for (struct core_stage *before = s->next; before; before = before->next) {
        if (before->stage != s->stage || before->round != s->round || before->plan != s->plan)
            continue;
        const struct msg_stage_done *d = &before->answer.stage_done;
        if (before->state == STAGE_RUNNING && agent_work_take_over(core, before, s)) {
            (void)agent_stage_answer(core, before, ERR_STALE, "asked again"); /* nobody waits for it */
            return true;
        }
        if (before->state == STAGE_FINISHED && d->code == 0) {
            agent_stage_answer(core, s, 0, NULL)->bytes = d->bytes;
            agent_stage_answered(core, s);
            return true;
        }
    }
    return false;
}

static void stage_transfer(struct agent_core *core, struct core_stage *s, uint64_t bandwidth)
{
    if (!core->op.plan) {
        agent_stage_end(core, s, ERR_NOTFOUND, "no plan: MAPPING has not been carried out here");
        return;
    }
    s->plan = plan_ref(core->op.plan);
    if (stage_moved(core, s))
        return;
    struct work *w = agent_work_submit(core, s->stage == STAGE_WEIGHTS ? WORK_WEIGHTS : WORK_FILL, s, 0);
    w->bandwidth = bandwidth;
}

static void stage_group(struct agent_core *core, struct core_stage *s, struct blob *blob)
{
    if (!blob) {
        agent_stage_end(core, s, ERR_INVALID, "GROUP without the group's id");
        return;
    }
    agent_work_group_destroy(core); /* of an earlier attempt */
    struct work *w = agent_work_submit(core, WORK_GROUP, s, 0);
    w->blob = blob_ref(blob);
    core->group = true;
}

/* Its peers shall be heard before the coordinator gives up, so that it knows whom they have waited for. */
static uint64_t prepare_ms(uint32_t deadline_ms)
{
    return (uint64_t)deadline_ms * 3 / 4;
}

static void stage_engine_prepare(struct agent_core *core, struct core_stage *s, struct view *view, uint32_t deadline_ms)
{
    core->op.prepared = false;
    core->op.prepare_attempt = s->attempt;
    if (view && acore_member(core) && view_rank(view, core->config.id) < 0) { /* it did not prepare, and leaves */
        core->op.prepared = true;
        agent_stage_end(core, s, 0, NULL);
        return;
    }
    if (!view || !core->engine.attached) {
        agent_stage_end(core, s, view ? ERR_NOTFOUND : ERR_INVALID, view ? "no engine is attached" : "no view to prepare");
        return;
    }
    struct agent_action *a = acore_act(core, AA_ENGINE_PREPARE);
    a->view = view_ref(view);
    a->op = core->op.op;
    a->attempt = s->attempt;
    a->value = prepare_ms(deadline_ms);
}

void agent_stage_prepared(struct agent_core *core, const struct agent_event *event)
{
    if (!agent_operation_running(core) || event->op != core->op.op)
        return;
    struct core_stage *s = core->op.stages;
    while (s && !(s->stage == STAGE_ENGINE_PREPARE && s->attempt == event->attempt && s->state == STAGE_RUNNING))
        s = s->next;
    if (!s)
        return;
    if (event->attempt == core->op.prepare_attempt)
        core->op.prepared = event->code == 0;
    agent_stage_end(core, s, event->code, event->text);
}

static void stage_drain(struct agent_core *core, struct core_stage *s, uint32_t deadline_ms, bool strict)
{
    s->strict = strict;
    if (!core->engine.attached) {
        agent_stage_end(core, s, 0, NULL);
        return;
    }
    s->deadline_ns = core->now_ns + deadline_ms * CORE_MS;
    struct agent_action *a = acore_act(core, AA_ENGINE_DRAIN);
    a->value = deadline_ms;
    a->op = core->op.op;
}

void agent_stage_drained(struct agent_core *core, const char *text)
{
    for (struct core_stage *s = core->op.stages; s && agent_operation_running(core); s = s->next)
        if (s->stage == STAGE_DRAIN && s->state == STAGE_RUNNING)
            agent_stage_end(core, s, 0, text);
}

static void stage_kv(struct agent_core *core, struct core_stage *s)
{
    struct msg_stage_done *d = agent_stage_answer(core, s, 0, NULL);
    d->value = core->engine.attached ? core->engine.kv_bytes : NO_LIMIT;
    agent_stage_answered(core, s);
}

void agent_stage_check(struct agent_core *core)
{
    if (!agent_operation_running(core))
        return;
    agent_grace_check(core);
    for (struct core_stage *s = core->op.stages; s; s = s->next)
        if (s->stage == STAGE_DRAIN && s->state == STAGE_RUNNING && core->now_ns >= s->deadline_ns)
            agent_stage_end(core, s, s->strict ? ERR_TIMEOUT : 0, "the engine is not drained by the deadline");
}

void agent_stage_engine_gone(struct agent_core *core)
{
    core->op.prepared = false;
    if (!agent_operation_running(core))
        return;
    for (struct core_stage *s = core->op.stages; s; s = s->next) {
        if (s->state != STAGE_RUNNING)
            continue;
        bool loading = s->stage == STAGE_ALLOCATE && s->load && core->engine.seals;
        if (s->stage == STAGE_ENGINE_PREPARE || loading)
            agent_stage_end(core, s, ERR_UNREACHABLE, "the engine is gone");
    }
    agent_stage_drained(core, NULL);
    /* GRACE is over by itself: nothing runs any more that could still read */
}

/* ---- dispatch ---- */

static void stage_start(struct agent_core *core, const struct msg_stage *m)
{
    struct core_stage *s = stage_add(core, (enum op_stage)m->stage, m->round, m->attempt);
    acore_log(core, AGENT_LOG_INFO, "%s begins, round %u, to be answered within %u ms", op_stage_name(s->stage), m->round,
              m->deadline_ms);
    if (stage_moves_at_once(s->stage))
        agent_operation_move(core, stage_event(s->stage));
    switch (s->stage) {
    case STAGE_ALLOCATE:
        s->load = m->load;
        s->map = expert_map_ref(m->map);
        agent_stage_allocate(core, s);
        return;
    case STAGE_GROUP_ID: agent_work_submit(core, WORK_GROUP_ID, s, 0); return;
    case STAGE_GROUP: stage_group(core, s, m->blob); return;
    case STAGE_MAPPING: stage_mapping(core, s, m); return;
    case STAGE_WEIGHTS:
    case STAGE_FILL: stage_transfer(core, s, m->bandwidth); return;
    case STAGE_KV: stage_kv(core, s); return;
    case STAGE_ENGINE_PREPARE: stage_engine_prepare(core, s, m->view, m->deadline_ms); return;
    case STAGE_DRAIN: stage_drain(core, s, m->deadline_ms, m->strict); return;
    case STAGE_GRACE:
        s->step = m->step;
        agent_stage_grace(core, s);
        return;
    case STAGE_RELOAD: agent_stage_reload(core, s, m); return;
    case STAGE_LET_GO:
    case STAGE_MAX: return; /* refused before */
    }
}

/* An operation that this agent is not in (any more): the coordinator should not wait for it. */
static void stage_decline(struct agent_core *core, const struct msg_stage *m, int code, const char *text)
{
    struct msg *answer = acore_send(core, MSG_STAGE_DONE);
    if (!answer)
        return;
    struct msg_stage_done *d = &answer->stage_done;
    d->op = m->op;
    d->stage = m->stage;
    d->round = m->round;
    d->attempt = m->attempt;
    d->code = code;
    snprintf(d->text, sizeof(d->text), "%s", text);
}

void agent_stage_command(struct agent_core *core, const struct msg_stage *m)
{
    if (m->stage < STAGE_ALLOCATE || m->stage == STAGE_LET_GO || m->stage >= STAGE_MAX) {
        acore_illegal(core, "STAGE %u is not for an agent", m->stage);
        return;
    }
    if (m->op != core->op.op) {
        if (m->op > core->op.op)
            stage_decline(core, m, ERR_NOTFOUND, "this agent is in no such operation");
        return;
    }
    enum op_stage stage = (enum op_stage)m->stage;
    const struct core_stage *known = agent_stage_find(core, stage, m->round, m->attempt);
    if (known) {
        if (known->state == STAGE_FINISHED)
            stage_send(core, known);
        return;
    }
    if (!agent_operation_running(core)) {
        stage_decline(core, m, ERR_ABORTED, "the operation has ended here");
        return;
    }
    if (!stage_is_latest(core, stage, m->round, m->attempt))
        return; /* overtaken by a later attempt */
    enum machine_event event = stage_event(stage);
    if (event != ME_EVENTS && !agent_operation_may(core, event)) {
        acore_illegal(core, "STAGE %s in %s of operation %llu", op_stage_name(stage),
                      machine_state_name(core->op.state), U(m->op));
        return;
    }
    stage_start(core, m);
}
