/* Waiting for steps that may still read what will be overwritten, and reading lost experts into it.  Part of the agent's core;
 * pure. */
#include <stdlib.h>
#include <string.h>

#include "agent/core_internal.h"

/* What is overwritten is void from here on, also to a process that re-adopts the weights. */
static void stage_void(struct agent_core *core, const struct expert_map *load)
{
    struct expert_map *map = expert_map_copy(core->map);
    if (!map)
        abort();
    for (uint32_t layer = 0; layer < load->layers; layer++)
        for (uint32_t slot = 0; slot < load->slots; slot++)
            if (load->held[expert_map_at(load, layer, core->op.self, slot)] >= 0) {
                size_t at = expert_map_at(map, layer, core->map_rank, slot);
                map->held[at] = -1;
                map->live[at] = 0;
            }
    expert_map_unref(core->map);
    core->map = map;
}

static void stage_reload_run(struct agent_core *core, struct core_stage *s)
{
    s->state = STAGE_RUNNING;
    stage_void(core, s->map);
    struct work *w = agent_work_submit(core, WORK_RELOAD, s, 0);
    w->map = expert_map_ref(s->map);
    w->load = s->load;
    w->sources = s->sources; /* the worker's now */
    w->n_sources = s->n_sources;
    w->n_holders = s->n_holders;
    s->sources = NULL;
    s->n_sources = s->n_holders = 0;
}

static bool grace_over(const struct agent_core *core, const struct core_stage *s)
{
    if (s->stage == STAGE_RELOAD && core->op.kind == OP_REPAIR)
        return !core->engine.attached || core->page.done >= core->page.launched;
    return s->step == 0 || !core->engine.attached || core->page.done + 1 >= s->step ||
           core->bug == AGENT_BUG_NO_GRACE || (core->bug == AGENT_BUG_GRACE_BEGUN && core->page.intent >= s->step);
}

/* A GRACE, or a RELOAD that has not begun for the same reason. */
static bool grace_waits(const struct core_stage *s)
{
    return (s->stage == STAGE_GRACE && s->state == STAGE_RUNNING) ||
           (s->stage == STAGE_RELOAD && s->state == STAGE_DEFERRED);
}

static void grace_end(struct agent_core *core, struct core_stage *s)
{
    if (s->stage == STAGE_RELOAD)
        stage_reload_run(core, s);
    else
        agent_stage_end(core, s, 0, NULL);
}

/* The smallest step that one of them waits for; 0 = none does. */
static uint64_t grace_awaited(const struct agent_core *core)
{
    uint64_t least = 0;
    for (const struct core_stage *s = core->op.stages; s; s = s->next)
        if (grace_waits(s) && (!least || s->step - 1 < least))
            least = s->step - 1;
    return least;
}

static void grace_ask(struct agent_core *core, bool want_page)
{
    uint64_t done = grace_awaited(core);
    if (done == core->notify_done)
        return;
    core->notify_done = done;
    acore_page(core, PAGE_NOTIFY_DONE, done);
    core->out->v[core->out->n - 1].want_page = want_page;
}

void agent_stage_grace(struct agent_core *core, struct core_stage *s)
{
    if (grace_over(core, s))
        grace_end(core, s);
    else
        grace_ask(core, true); /* the step may end between the snapshot and the store: look again */
}

/* In a view that serves: some of these slots may be read, by steps to come. */
static bool stage_routed(const struct agent_core *core, const struct expert_map *load)
{
    for (uint32_t layer = 0; layer < load->layers; layer++)
        for (uint32_t slot = 0; slot < load->slots; slot++)
            if (load->held[expert_map_at(load, layer, core->op.self, slot)] >= 0 &&
                core->map->live[expert_map_at(core->map, layer, core->map_rank, slot)])
                return true;
    return false;
}

static const char *stage_reload_objection(const struct agent_core *core, const struct expert_map *map)
{
    const struct model *model = core->model;
    bool repair = core->op.kind == OP_REPAIR && core->promise.epoch && core->promise.kind == FLIP_RESET;
    if (!repair && core->op.kind != OP_REBALANCE)
        return "RELOAD outside of a repair that was promised: the engine may be reading the slots";
    if (!core->weights || !model || !core->map)
        return "RELOAD at an agent that holds no weights";
    if (!map || map->ranks != core->op.n || map->layers != model->layers || map->logical != model->logical ||
        map->slots != model->slots || core->map->layers != map->layers || core->map->slots != map->slots)
        return "RELOAD without a map of the model's shape";
    if (!repair && stage_routed(core, map))
        return "RELOAD into slots that the map in use routes to";
    return NULL;
}

/* Repair: the engine begins no step before GO; what it has launched before has to be off the device.  Masked experts: like
 * GRACE before a FILL. */
void agent_stage_reload(struct agent_core *core, struct core_stage *s, const struct msg_stage *m)
{
    const char *objection = stage_reload_objection(core, m->map);
    s->load = m->load && core->config.can_load;
    if (objection || (!s->load && !m->n_sources)) {
        agent_stage_end(core, s, objection ? ERR_INVALID : ERR_NOTFOUND,
                  objection ? objection : "no checkpoint is configured here (--checkpoint), and no other agent is named that has one");
        return;
    }
    s->map = expert_map_ref(m->map);
    s->sources = acore_alloc(m->n_sources, sizeof(*s->sources));
    if (m->n_sources)
        memcpy(s->sources, m->sources, m->n_sources * sizeof(*s->sources));
    s->n_sources = m->n_sources;
    s->n_holders = m->n_holders;
    s->step = core->op.kind == OP_REPAIR ? core->page.launched + 1 : m->step;
    s->state = STAGE_DEFERRED;
    agent_stage_grace(core, s);
}

/* Steps have completed, or the engine is gone: which of them are over? */
void agent_grace_check(struct agent_core *core)
{
    bool ended = false;
    for (struct core_stage *s = core->op.stages; s; s = s->next)
        if (grace_waits(s) && grace_over(core, s)) {
            grace_end(core, s);
            ended = true;
        }
    if (ended)
        grace_ask(core, false);
}
