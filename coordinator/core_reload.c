/* Experts that lost their last copy are read again from the checkpoint, by the ranks that are left.  Part of the
 * coordinator's core; pure.
 *
 * It is a step of a repair: between the promises, with which every engine has left its step, and the decision.  So nobody
 * reads the slots that are written, and the view that is decided is whole.
 *
 *   repair   OPEN PROMISE RELOAD DECIDE GO FINISH
 *
 * Slots to be overwritten are void in the journal's map before anybody writes there: when the repair is overtaken by
 * another death, or by a restart of this process, nothing counts on what lay in them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"
#include "coordinator/reload.h"

#define MS              1000000ULL
#define RELOAD_RETRY_NS (30000 * MS) /* an agent whose file could not be read is asked again after this */

/* This agent can read experts of the model that serves. */
static bool reload_can(const struct coordinator *c, uint32_t peer)
{
    const struct peer *p = &c->peers[peer];
    const struct model *m = c->durable.model;
    return p->conn && p->can_load && m && p->layers == m->layers && p->logical == m->logical && c->now_ns >= p->reload_ns;
}

/* A rank whose agent is there with its weights, and which lacks nothing but an engine, is worth waiting for. */
static bool reload_hopes(const struct coordinator *c)
{
    for (uint32_t r = 0; r < c->view->n; r++) {
        const struct member *m = &c->view->members[r];
        uint32_t p = setup_fault(c, r) ? members_find(c, m->id) : NOBODY;
        if (p != NOBODY && c->peers[p].conn && !c->peers[p].gone && c->peers[p].member.incarnation == m->incarnation)
            return true;
    }
    return false;
}

/* A map of an operation that gave way is on its way to the journal: it is announced as the one that is durable then. */
static bool reload_map_pending(const struct coordinator *c)
{
    for (const struct pending_write *w = c->writes; w; w = w->next)
        if (w->what == CONT_MAP)
            return true;
    return false;
}

static bool reload_is_due(const struct coordinator *c)
{
    return !reload_map_pending(c) && c->config.reload_after_ms &&
           (!reload_hopes(c) || c->now_ns >= c->unwhole_ns + c->config.reload_after_ms * MS);
}

/* The slots that are to be overwritten are void from now on, in what is written with the operation. */
static void reload_void_view(struct coordinator *c, const uint32_t *peers, uint32_t n)
{
    int32_t to[RANKS_MAX];
    struct view *view = view_copy(c->durable.view);
    struct expert_map *map = view ? expert_map_copy(view->map) : NULL;
    if (!map)
        abort();
    for (uint32_t r = 0; r < view->n; r++) {
        to[r] = -1;
        for (uint32_t i = 0; i < n; i++)
            if (strcmp(c->peers[peers[i]].member.id, view->members[r].id) == 0)
                to[r] = (int32_t)i;
    }
    reload_void(map, c->op.reload, to);
    map->version = ++c->durable.map_version;
    expert_map_unref(view->map);
    view->map = map;
    view_unref(c->durable.view);
    c->durable.view = view;
}

/* What the service waits for, in c->degraded. */
void reload_say(struct coordinator *c)
{
    char names[128];
    if (!c->op.reload || c->op.reloaded)
        return;
    if (c->op.phase == PHASE_RELOAD)
        core_names(c, &c->op.stage, names, sizeof(names));
    snprintf(c->degraded, sizeof(c->degraded), "%llu experts (of all layers) that lost their last copy are read again "
             "from the checkpoint%s%s", (unsigned long long)c->op.reloads, c->op.phase == PHASE_RELOAD ? ", by " : "",
             c->op.phase == PHASE_RELOAD ? names : "");
}

/* The ranks that are left lack experts: begins a repair that brings them back.  False, with c->degraded saying what is
 * waited for, when that cannot be, or not yet. */
bool reload_begin(struct coordinator *c, const uint32_t *peers, uint32_t n, const struct expert_map *left, uint64_t lost)
{
    uint8_t can[RANKS_MAX];
    uint32_t able = 0;
    struct expert_map *load;
    uint64_t placed, unplaced;
    if (!c->unwhole_ns)
        c->unwhole_ns = c->now_ns;
    if (!reload_is_due(c) || !c->durable.view || c->durable.view->epoch != c->view->epoch)
        return false;
    for (uint32_t i = 0; i < n; i++)
        able += can[i] = reload_can(c, peers[i]);
    if (reload_plan(left, can, &load, &placed, &unplaced) < 0)
        abort();
    if (unplaced) {
        snprintf(c->degraded, sizeof(c->degraded),
                 able ? "%llu experts (of all layers) have no copy on the %u ranks that are left, and there is no room for %llu "
                        "of them on the %u with a checkpoint"
                      : "%llu experts (of all layers) have no copy on the %u ranks that are left, none of which has a checkpoint",
                 (unsigned long long)lost, n, (unsigned long long)unplaced, able);
        expert_map_unref(load);
        return false;
    }
    if (setup_repair(c, peers, n) < 0) {
        expert_map_unref(load);
        return false;
    }
    c->op.reload = load;
    c->op.reloads = placed;
    c->op.bytes_planned = placed * c->durable.model->expert_bytes;
    if (c->bug != COORDINATOR_BUG_RELOAD_VOID_FORGOTTEN)
        reload_void_view(c, peers, n);
    core_log(c, CORE_WARN, "repair: the view goes on with %u of %u ranks, and reads %llu experts again from the checkpoint", n,
             c->view->n, (unsigned long long)placed);
    reload_say(c);
    operation_open_repair(c, n);
    return true;
}

/* Its record is durable, and with it the void slots. */
void reload_opened(struct coordinator *c)
{
    if (!c->op.reload || !c->durable.view || c->durable.view->epoch != c->view->epoch)
        return;
    view_unref(c->view);
    c->view = view_ref(c->durable.view);
    c->changed = true;
}

/* Every engine has left its step.  True: the decision has to wait. */
bool reload_promised(struct coordinator *c)
{
    if (!c->op.reload || c->op.reloaded || c->bug == COORDINATOR_BUG_RELOAD_UNAWAITED)
        return false;
    operation_stage(c, PHASE_RELOAD, STAGE_RELOAD);
    if (c->op.phase == PHASE_RELOAD)
        reload_say(c);
    return true;
}

bool reload_concerns(const struct coordinator *c, uint32_t party)
{
    const struct expert_map *load = c->op.reload;
    for (uint32_t layer = 0; load && layer < load->layers; layer++)
        for (uint32_t slot = 0; slot < load->slots; slot++)
            if (load->held[expert_map_at(load, layer, party, slot)] >= 0)
                return true;
    return false;
}

void reload_done(struct coordinator *c)
{
    c->op.reloaded = true;
    commit_reloaded(c);
}

/* The repair ends; repair_check begins another, which does without this agent's file. */
static void reload_give_up(struct coordinator *c, const char *why)
{
    commit_done(&c->commit);
    operation_end(c, OUTCOME_FAILED, why);
}

void reload_failed(struct coordinator *c, uint32_t peer, int code, const char *text)
{
    char why[256];
    struct peer *p = &c->peers[peer];
    bool never = code == ERR_NOTFOUND || code == ERR_CONFLICT || code == ERR_INVALID;
    p->reload_ns = never ? UINT64_MAX : c->now_ns + RELOAD_RETRY_NS;
    snprintf(why, sizeof(why), "agent %s cannot read experts again: %.150s", p->member.id, text);
    core_log(c, CORE_ERROR, "%s", why);
    reload_give_up(c, why);
}

/* Those who owe the stage are out of it. */
void reload_late(struct coordinator *c)
{
    char names[128], why[256];
    core_names(c, &c->op.stage, names, sizeof(names));
    for (size_t i = 0; i < c->op.stage.n; i++)
        if (!c->op.stage.v[i].arrived)
            c->peers[c->op.stage.v[i].id].reload_ns = c->now_ns + RELOAD_RETRY_NS;
    snprintf(why, sizeof(why), "no progress of %s in RELOAD", names);
    core_log(c, CORE_ERROR, "%s", why);
    reload_give_up(c, why);
}

/* When something that was not due becomes so. */
uint64_t reload_deadline(const struct coordinator *c)
{
    uint64_t first = UINT64_MAX;
    if (!c->unwhole_ns || !c->config.reload_after_ms || c->op.phase != PHASE_NONE)
        return first;
    uint64_t due = c->unwhole_ns + c->config.reload_after_ms * MS;
    if (c->now_ns < due)
        first = due;
    for (uint32_t i = 0; i < c->n_peers; i++)
        if (c->peers[i].reload_ns > c->now_ns && c->peers[i].reload_ns < first)
            first = c->peers[i].reload_ns;
    return first;
}
