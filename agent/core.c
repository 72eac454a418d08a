/* The agent's core: the step function, the link to the coordinator, deadlines.  Pure; the thread that drives it.
 *
 * Every step goes: what the fresh snapshot of the page allows, then the event itself, then the checks of what is being
 * waited for. */
#include "agent/core.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

struct agent_core *agent_core_new(const struct agent_config *config, uint64_t now_ns)
{
    struct agent_core *core = acore_alloc(1, sizeof(*core));
    core->config = *config;
    core->now_ns = now_ns;
    core->alone_since_ns = now_ns;
    core->heartbeat_ms = 500;
    core->indoubt_ms = 30000;
    core->heartbeat_ns = core->doubt_ns = core->page_tick_ns = core->resume_ns = CORE_NEVER;
    core->engine.kv_bytes = NO_LIMIT;
    return core;
}

void agent_core_free(struct agent_core *core)
{
    if (!core)
        return;
    agent_operation_clear(core);
    agent_work_clear(core);
    view_unref(core->view);
    view_unref(core->before);
    expert_map_unref(core->map);
    model_unref(core->model);
    free(core);
}

void agent_core_plant(struct agent_core *core, enum agent_bug bug)
{
    core->bug = bug;
}

bool acore_member(const struct agent_core *core)
{
    return core->view != NULL;
}

/* ---- link ---- */

static void link_lost(struct agent_core *core)
{
    if (core->welcomed)
        core->alone_since_ns = core->now_ns;
    core->linked = core->welcomed = false;
    core->heartbeat_ns = CORE_NEVER;
}

void acore_illegal(struct agent_core *core, const char *fmt, ...)
{
    char text[192];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    acore_log(core, AGENT_LOG_ERROR, "the coordinator broke the protocol: %s; the connection is dropped", text);
    acore_act(core, AA_RECONNECT);
    link_lost(core);
}

void acore_hello(struct agent_core *core)
{
    if (!core->linked)
        return;
    core->engine.changed_unsaid = false;
    const struct core_engine *e = &core->engine;
    const struct core_promise *p = &core->promise;
    bool seals = e->attached && e->seals;
    struct agent_action *a = acore_act(core, AA_SEND);
    struct msg_hello *h = &a->msg.hello;
    a->msg.type = MSG_HELLO;
    memcpy(h->id, core->config.id, sizeof(h->id));
    memcpy(h->address, core->config.address, sizeof(h->address));
    memcpy(h->data_address, core->config.data_address, sizeof(h->data_address));
    h->incarnation = core->config.incarnation;
    h->node = core->config.node;
    h->slots = core->config.slots;
    h->masks = e->attached && e->masks;
    h->can_load = core->config.can_load || seals;
    h->layers = seals ? e->layers : core->config.layers;
    h->logical = seals ? e->logical : core->config.logical;
    h->op = agent_operation_running(core) && !core->op.ended ? core->op.op : 0;
    h->applied_epoch = core->applied_epoch;
    h->promised_epoch = p->epoch;
    h->limit = p->epoch ? p->limit : 0;
    h->next = p->epoch ? p->next : core->page.intent + 1;
    h->wave = p->epoch ? p->wave : core->page.wave;
    h->engine = p->epoch ? p->engine : agent_commit_engine(core);
    h->map_version = core->map ? core->map->version : 0;
    h->dispatch = e->attached ? e->dispatch : DISPATCH_NONE;
    if (e->attached)
        memcpy(h->endpoint, e->endpoint, sizeof(h->endpoint));
}

static void link_up(struct agent_core *core)
{
    core->linked = true;
    core->welcomed = false;
    if (!core->restored) /* else when the engine is back */
        acore_hello(core);
}

static void link_welcome(struct agent_core *core, const struct msg_welcome *m)
{
    if (core->welcomed)
        return;
    core->welcomed = true;
    core->lease_ms = m->lease_ms;
    core->heartbeat_ms = m->heartbeat_ms ? m->heartbeat_ms : core->heartbeat_ms;
    core->indoubt_ms = m->indoubt_ms ? m->indoubt_ms : core->indoubt_ms;
    core->heartbeat_ns = core->now_ns + core->heartbeat_ms * CORE_MS;
    if (m->member && !core->applied_epoch)
        acore_log(core, AGENT_LOG_ERROR, "the coordinator has this incarnation in epoch %llu, whose GO it never took",
                  U(m->view ? m->view->epoch : 0));
    agent_engine_lease(core);
    agent_engine_said(core);
    if (core->flipped_epoch && core->flipped_epoch == core->applied_epoch)
        agent_commit_repeat_flipped(core);
    agent_stage_repeat_let_go(core);
    if (core->stopping && (core->view || core->before))
        acore_send(core, MSG_LEAVE);
}

static void link_message(struct agent_core *core, const struct msg *m)
{
    if (!core->linked)
        return; /* from a connection that was given up */
    if (!core->welcomed && m->type != MSG_WELCOME && m->type != MSG_EVICTED) {
        acore_illegal(core, "%s before WELCOME", msg_type_name(m->type));
        return;
    }
    switch (m->type) {
    case MSG_WELCOME: link_welcome(core, &m->welcome); return;
    case MSG_EVICTED: agent_release_evicted(core, m->evicted.why); return;
    case MSG_OP_BEGIN: agent_operation_begin(core, &m->op_begin); return;
    case MSG_STAGE: agent_stage_command(core, &m->stage); return;
    case MSG_NOTIFY: agent_operation_notify(core, &m->notify); return;
    case MSG_OP_END: agent_operation_end(core, &m->op_end); return;
    case MSG_OP_ABORT: agent_operation_abort(core, &m->op_end); return;
    case MSG_PREPARE: agent_commit_prepare(core, &m->prepare); return;
    case MSG_GO: agent_commit_go(core, &m->go); return;
    case MSG_ABORT: agent_commit_abort(core, &m->abort); return;
    case MSG_DISMISS: agent_release_dismiss(core, &m->op_end); return;
    case MSG_MAP: agent_engine_map(core, &m->map); return;
    case MSG_VERIFY: agent_work_verify(core, m->verify.request); return;
    default: acore_illegal(core, "%s is not for an agent", msg_type_name(m->type)); return;
    }
}

static void link_heartbeat(struct agent_core *core)
{
    if (!core->welcomed || core->now_ns < core->heartbeat_ns)
        return;
    acore_send(core, MSG_HEARTBEAT);
    core->heartbeat_ns = core->now_ns + core->heartbeat_ms * CORE_MS;
}

/* ---- the step ---- */

static void step_event(struct agent_core *core, const struct agent_event *e)
{
    switch (e->type) {
    case AE_LINK_UP: link_up(core); return;
    case AE_LINK_DOWN: link_lost(core); return;
    case AE_MSG: link_message(core, e->msg); return;
    case AE_TICK:
    case AE_PAGE:
    case AE_BELL: return; /* the checks before and after do it */
    case AE_WORK_DONE: agent_work_answer(core, e); return;
    case AE_WORK_PROGRESS: agent_work_progress(core, e); return;
    case AE_ENGINE_ATTACHED: agent_engine_attached(core, e); return;
    case AE_ENGINE_DETACHED: agent_engine_gone(core, e->text); return;
    case AE_ENGINE_ENDPOINT: agent_engine_moved(core, e->endpoint); return;
    case AE_ENGINE_RESUMED: agent_restore_resumed(core, e); return;
    case AE_ENGINE_PREPARED: agent_stage_prepared(core, e); return;
    case AE_ENGINE_DRAINED: agent_stage_drained(core, NULL); return;
    case AE_ENGINE_SEALED: agent_stage_sealed(core, e); return;
    case AE_ENGINE_LEFT_STEP:
        agent_commit_left_step(core, e->value);
        if (e->epoch)
            agent_engine_failed(core, e->epoch, e->value);
        return;
    case AE_ENGINE_RELEASED: agent_release_engine_free(core); return;
    case AE_ENGINE_WAVE: agent_engine_wave(core, e->value); return;
    case AE_PEER_WAVE: agent_engine_peer_wave(core, e->epoch, e->value); return;
    case AE_STOP: agent_release_stop(core); return;
    }
}

static bool step_waits_for_page(struct agent_core *core)
{
    if (core->fence.epoch || core->flip.epoch || core->map_unacked)
        return true;
    for (const struct core_stage *s = core->op.stages; s; s = s->next)
        if (s->stage == STAGE_GRACE && s->state == STAGE_RUNNING)
            return true;
    return false;
}

void agent_core_step(struct agent_core *core, uint64_t now_ns, const struct agent_event *event,
                     struct agent_actions *out)
{
    core->now_ns = now_ns;
    core->page = event->page;
    core->out = out;
    /* First, because the snapshot is younger than the gate here: what writes the gate below waits for the next one. */
    if (core->fence.epoch)
        agent_commit_event(core);
    agent_commit_check_flip(core);
    step_event(core, event);
    agent_commit_check_flip(core);
    agent_stage_check(core);
    agent_engine_check_map(core);
    agent_engine_watch(core);
    agent_release_check_deadline(core);
    agent_restore_check(core);
    agent_commit_check_doubt(core);
    link_heartbeat(core);
    core->page_tick_ns = step_waits_for_page(core) ? now_ns + CORE_PAGE_TICK_NS : CORE_NEVER;
    core->out = NULL;
}

uint64_t agent_core_deadline(const struct agent_core *core)
{
    uint64_t first = core->page_tick_ns;
    first = core->heartbeat_ns < first ? core->heartbeat_ns : first;
    first = core->doubt_ns < first ? core->doubt_ns : first;
    first = core->resume_ns < first ? core->resume_ns : first;
    if (core->watch.inside && !core->watch.said && core->watch.since_ns + core->config.hang_ns < first)
        first = core->watch.since_ns + core->config.hang_ns;
    if (core->release.state == RELEASE_ENGINE && core->release.deadline_ns < first)
        first = core->release.deadline_ns;
    if (core->fence.state == FENCE_LEAVE && core->fence.deadline_ns < first)
        first = core->fence.deadline_ns;
    for (const struct core_stage *s = core->op.stages; s && agent_operation_running(core); s = s->next)
        if (s->state == STAGE_RUNNING && s->stage == STAGE_DRAIN && s->deadline_ns < first)
            first = s->deadline_ns;
    return first;
}

int32_t agent_core_slot(const struct agent_core *core, uint64_t manifest, uint32_t layer, uint32_t expert)
{
    const struct expert_map *map = core->map;
    if (!core->weights || !core->model || core->model->manifest_digest != manifest || !map || layer >= map->layers)
        return -1;
    for (uint32_t slot = 0; slot < map->slots; slot++)
        if (map->held[expert_map_at(map, layer, core->map_rank, slot)] == (int32_t)expert)
            return (int32_t)slot;
    return -1;
}

void agent_core_status(const struct agent_core *core, struct agent_status *ret_status)
{
    *ret_status = (struct agent_status){
        .state = core->op.state,
        .role = core->op.role,
        .op = core->op.op,
        .applied_epoch = core->applied_epoch,
        .promised_epoch = core->promise.epoch,
        .limit = core->promise.limit,
        .map_version = core->map ? core->map->version : 0,
        .linked = core->linked,
        .welcomed = core->welcomed,
        .engine = core->engine.attached,
        .flip_pending = core->flip.epoch != 0,
        .resuming = core->restored,
        .view = agent_commit_view_now(core),
    };
}
