/* The engine: attached or gone, waves, and maps inside a view.  Part of the agent's core; pure.
 *
 * The page and its gate survive the engine: a death and a new attachment change neither. */
#include <stdio.h>
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

static void engine_say(struct agent_core *core)
{
    struct core_engine *e = &core->engine;
    struct msg *m = acore_send(core, MSG_ENGINE);
    if (!m) {
        e->changed_unsaid = true;
        return;
    }
    bool seals = e->attached && e->seals;
    e->changed_unsaid = false;
    m->engine.attached = e->attached;
    m->engine.dispatch = e->attached ? e->dispatch : DISPATCH_NONE;
    m->engine.masks = e->attached && e->masks;
    m->engine.can_load = core->config.can_load || seals;
    m->engine.layers = seals ? e->layers : core->config.layers;
    m->engine.logical = seals ? e->logical : core->config.logical;
    if (e->torn_epoch == core->applied_epoch)
        m->engine.torn_epoch = e->torn_epoch;
    if (e->attached)
        memcpy(m->engine.endpoint, e->endpoint, sizeof(m->engine.endpoint));
    if (!e->attached || m->engine.torn_epoch)
        memcpy(m->engine.why, e->why, sizeof(m->engine.why));
}

/* After WELCOME.  A torn view is told again (the word may have got lost) even if all is well with the engine by now: the
 * peers' communicators lead to one that is dead, or are broken. */
void agent_engine_said(struct agent_core *core)
{
    struct core_engine *e = &core->engine;
    if (e->changed_unsaid || (e->torn_epoch && e->torn_epoch == core->applied_epoch))
        engine_say(core);
}

static void engine_commit(struct agent_core *core, struct view *view, struct expert_map *map, uint64_t step)
{
    struct agent_action *a = acore_act(core, AA_ENGINE_COMMIT);
    a->value = step;
    a->epoch = view->epoch;
    a->view = view_copy(view);
    if (!a->view) {
        a->view = view_ref(view);
        return;
    }
    expert_map_unref(a->view->map);
    a->view->map = expert_map_ref(map);
}

static void engine_give_map(struct agent_core *core, struct expert_map *map)
{
    struct agent_action *a = acore_act(core, AA_ENGINE_MAP);
    a->map = expert_map_ref(map);
    a->value = map->version;
    acore_page(core, PAGE_MAP_PENDING, map->version);
}

void agent_engine_catch_up(struct agent_core *core, uint64_t view, bool regions)
{
    const struct core_flip *f = &core->flip;
    struct view *now = agent_commit_view_now(core);
    bool torn = core->fence.epoch || (core->promise.epoch && core->promise.kind == FLIP_RESET);
    if (core->weights && core->release.state == RELEASE_NONE && !regions)
        acore_act(core, AA_ENGINE_REGIONS);
    if (now && !torn) {
        struct expert_map *map = f->epoch ? now->map : core->map;
        if (now->epoch > view)
            engine_commit(core, now, map, core->page.intent + 1);
        engine_give_map(core, map);
    }
    if (f->epoch && core->view && f->epoch > view)
        engine_commit(core, core->view, core->map, f->step);
    if (now || f->epoch)
        acore_act(core, AA_WAKE);
}

/* Twice the lease: it ends only when the coordinator looks, and the view may wait longer for a rank. */
void agent_engine_lease(struct agent_core *core)
{
    if (!core->engine.attached || !core->lease_ms)
        return;
    struct agent_action *a = acore_act(core, AA_ENGINE_LEASE);
    a->value = 2 * (uint64_t)core->lease_ms;
    a->epoch = core->indoubt_ms;
}

void agent_engine_take(struct agent_core *core, const struct agent_event *event)
{
    struct core_engine *e = &core->engine;
    e->attached = true;
    e->seals = event->seals;
    e->masks = event->masks;
    e->dispatch = event->dispatch;
    e->layers = event->layers;
    e->logical = event->logical;
    e->kv_bytes = event->kv_bytes;
    memset(e->endpoint, 0, sizeof(e->endpoint));
    snprintf(e->endpoint, sizeof(e->endpoint), "%s", event->endpoint ? event->endpoint : "");
}

void agent_engine_attached(struct agent_core *core, const struct agent_event *event)
{
    agent_restore_overtaken(core, "another engine attached to its re-adopted agent");
    if (core->engine.attached)
        agent_engine_gone(core, "another engine took its place");
    agent_engine_take(core, event);
    acore_log(core, AGENT_LOG_INFO, "engine attached, endpoint %.100s", core->engine.endpoint);
    if (core->bug == AGENT_BUG_ATTACH_CLEARS_GATE)
        acore_page(core, PAGE_GATE, GATE_OPEN);
    agent_engine_lease(core);
    agent_engine_catch_up(core, 0, false);
    engine_say(core);
}

void agent_engine_moved(struct agent_core *core, const char *endpoint)
{
    struct core_engine *e = &core->engine;
    if (!e->attached)
        return;
    memset(e->endpoint, 0, sizeof(e->endpoint));
    snprintf(e->endpoint, sizeof(e->endpoint), "%s", endpoint ? endpoint : "");
    acore_log(core, AGENT_LOG_INFO, "the engine's endpoint is %.100s now", e->endpoint);
    engine_say(core);
}

static void engine_lost(struct agent_core *core, const char *why)
{
    struct core_engine *e = &core->engine;
    /* A leaver that stands at its boundary has nothing to do with the others' steps any more. */
    bool torn = core->view || (core->flip.epoch && !agent_commit_flip_done(core));
    e->attached = false;
    snprintf(e->why, sizeof(e->why), "%s", why ? why : "gone");
    acore_log(core, core->view ? AGENT_LOG_ERROR : AGENT_LOG_INFO, "engine gone: %s", e->why);
    acore_page(core, PAGE_ENGINE_STATE, PAGE_ENGINE_NONE);
    core->page.engine_state = PAGE_ENGINE_NONE;
    if (torn)
        e->torn_epoch = core->applied_epoch;
    /* The view is torn: another engine that attaches begins no step in it, or it could get more than one step ahead of
     * the others, or, on a leaver, run on after FLIPPED. */
    if (core->view || core->before)
        agent_engine_void(core);
    engine_say(core);
    agent_stage_engine_gone(core);
    agent_release_engine_free(core);
}

/* The engine lives, its step does not: something between the engines is broken.  Its peers may know nothing of it and
 * wait in that step, so the coordinator is asked for a RESET. */
void agent_engine_failed(struct agent_core *core, uint64_t view, uint64_t step)
{
    struct core_engine *e = &core->engine;
    const struct view *now = agent_commit_view_now(core);
    bool known = (now && now->epoch == view) || (core->view && core->view->epoch == view);
    if (!e->attached || !known || view <= core->revoked || core->bug == AGENT_BUG_FAILURE_UNSAID)
        return; /* of a view that is left anyway */
    e->torn_epoch = core->applied_epoch;
    snprintf(e->why, sizeof(e->why), "step %llu of epoch %llu failed", U(step), U(view));
    acore_log(core, AGENT_LOG_ERROR, "%s, though no engine is known to be lost", e->why);
    engine_say(core);
}

/* All ranks hang in the step in which one does, and who it is, is not known here: a RESET takes everybody out, and the
 * engine that does not come out of its step is cut off then, by its own agent. */
static void engine_hangs(struct agent_core *core)
{
    struct core_engine *e = &core->engine;
    core->watch.said = true;
    e->torn_epoch = core->applied_epoch;
    snprintf(e->why, sizeof(e->why), "step %llu of epoch %llu has not ended after %llu ms", U(core->page.intent),
             U(core->page.cur_view), U(core->config.hang_ns / CORE_MS));
    acore_log(core, AGENT_LOG_ERROR, "%s", e->why);
    engine_say(core);
}

void agent_engine_watch(struct agent_core *core)
{
    struct core_watch *w = &core->watch;
    const struct page_snapshot *p = &core->page;
    bool serves = core->engine.attached && !core->restored && (core->view || core->flip.epoch);
    bool inside = serves && p->engine_state == PAGE_ENGINE_RUNNING && p->intent > p->done && p->cur_view > core->revoked;
    if (!core->config.hang_ns)
        return;
    if (!inside || !w->inside || p->intent != w->intent || p->done != w->done)
        *w = (struct core_watch){.intent = p->intent, .done = p->done, .since_ns = core->now_ns, .inside = inside};
    else if (!w->said && core->now_ns >= w->since_ns + core->config.hang_ns)
        engine_hangs(core);
}

void agent_engine_gone(struct agent_core *core, const char *why)
{
    agent_restore_overtaken(core, why);
    if (core->engine.attached)
        engine_lost(core, why);
}

/* All views up to the applied one are void: no engine begins a step in them any more. */
void agent_engine_void(struct agent_core *core)
{
    if (core->revoked == core->applied_epoch)
        return;
    core->revoked = core->applied_epoch;
    acore_page(core, PAGE_REVOKED, core->revoked);
}

/* And the engine that is attached leaves the step it is in. */
void agent_engine_revoke(struct agent_core *core, const char *why)
{
    agent_engine_void(core);
    struct agent_action *a = acore_act(core, AA_ENGINE_REVOKE);
    a->epoch = core->applied_epoch;
    snprintf(a->text, sizeof(a->text), "%s", why);
}

void agent_engine_cut(struct agent_core *core, const char *why)
{
    agent_engine_revoke(core, why);
    acore_say(core, AA_ENGINE_DETACH, why);
    engine_lost(core, why);
}

/* ---- waves ---- */

void agent_engine_wave(struct agent_core *core, uint64_t step)
{
    struct view *now = agent_commit_view_now(core);
    if (!now && !core->view)
        return;
    struct agent_action *a = acore_act(core, AA_PEER_WAVE);
    a->epoch = core->page.cur_view ? core->page.cur_view : core->applied_epoch;
    a->value = step;
    a->view = view_ref(now && now->epoch == a->epoch ? now : core->view);
}

/* "Run step n": the engine does so behind its gate, like every other step. */
void agent_engine_peer_wave(struct agent_core *core, uint64_t epoch, uint64_t step)
{
    const struct view *now = agent_commit_view_now(core);
    bool known = (now && now->epoch == epoch) || (core->view && core->view->epoch == epoch);
    if (!known || step == UINT64_MAX || step + 1 <= core->run_to)
        return;
    core->run_to = step + 1;
    acore_page(core, PAGE_RUN_TO, core->run_to);
    acore_act(core, AA_WAKE);
}

/* ---- maps inside a view ---- */

static void engine_ack_map(struct agent_core *core)
{
    struct msg *m = acore_send(core, MSG_MAP_ACK);
    if (!m)
        return;
    m->map_ack.version = core->map->version;
    m->map_ack.step = core->map_step;
}

/* The first step that uses the map is known when the engine has it. */
void agent_engine_check_map(struct agent_core *core)
{
    uint64_t version = core->map_unacked;
    if (!version || core->flip.epoch)
        return; /* a map that came with the view is applied by the flip */
    if (version != core->map_flip && core->engine.attached) {
        if (core->page.map_applied < version)
            return;
        core->map_step = core->page.map_applied_step;
    } else if (version != core->map_flip) {
        core->map_step = 0; /* no engine reads it */
    }
    core->map_unacked = 0;
    acore_log(core, AGENT_LOG_INFO, "MAP %llu epoch %llu op %llu: in use from step %llu on", U(version),
              U(core->applied_epoch), U(core->op.op), U(core->map_step));
    engine_ack_map(core);
}

static bool map_fits(const struct agent_core *core, const struct expert_map *map)
{
    const struct expert_map *now = core->map;
    return map && now && map->layers == now->layers && map->logical == now->logical && map->ranks == now->ranks &&
           map->slots == now->slots;
}

void agent_engine_map(struct agent_core *core, const struct msg_map *m)
{
    if (!core->view || m->epoch != core->applied_epoch) {
        acore_log(core, AGENT_LOG_WARN, "a map for epoch %llu, which is not in use, is ignored", U(m->epoch));
        return;
    }
    if (!map_fits(core, m->map)) {
        acore_illegal(core, "a map of another shape for epoch %llu", U(m->epoch));
        return;
    }
    uint64_t version = m->map->version;
    if (version < core->map->version)
        return; /* stale */
    if (version == core->map->version) {
        core->map_unacked = version; /* asked again */
        return;
    }
    if (core->flip.epoch) {
        acore_illegal(core, "map %llu before the flip to epoch %llu has settled", U(version), U(m->epoch));
        return;
    }
    expert_map_unref(core->map);
    core->map = expert_map_ref(m->map);
    if (agent_operation_running(core) && core->op.op == m->op && agent_operation_may(core, ME_RESHUFFLE))
        agent_operation_move(core, ME_RESHUFFLE);
    if (core->bug == AGENT_BUG_MAP_ACK_FIRST) {
        core->map_step = core->page.intent + 1;
        engine_ack_map(core);
    } else {
        core->map_unacked = version;
    }
    if (core->engine.attached) {
        engine_give_map(core, core->map);
        acore_act(core, AA_WAKE);
    }
}
