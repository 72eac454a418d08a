/* Experts that lost their last copy are read again by the ranks that are left: out of the memory of agents that have
 * them and do not serve (no engine, or leaving), from the rank's own checkpoint, or from the checkpoint of any agent.
 * Part of the coordinator's core; pure.
 *
 * It is a step of a repair: between the promises, with which every engine has left its step, and the decision.  So
 * nobody reads the slots that are written, and the view that is decided is whole.
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
#define RELOAD_RETRY_NS (30000 * MS) /* an agent from which nothing could be read is asked again after this */

/* This agent can read experts of the model that serves.  A sealed one is in no checkpoint, whoever has one of its shape. */
static bool reload_can(const struct coordinator *c, uint32_t peer)
{
    const struct peer *p = &c->peers[peer];
    const struct model *m = c->durable.model;
    return p->conn && p->can_load && m && !m->sealed && p->layers == m->layers && p->logical == m->logical &&
           c->now_ns >= p->reload_ns;
}

/* Others can read from this agent. */
static bool source_can(const struct coordinator *c, uint32_t peer)
{
    const struct peer *p = &c->peers[peer];
    return p->conn && !p->gone && !p->evicted && !p->silent && c->now_ns >= p->lend_ns;
}

/* It has weights, and is none of the ranks that go on: it lacks an engine, or has left and not let go yet. */
static bool source_holds(const struct coordinator *c, uint32_t peer, const uint32_t *peers, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if (peers[i] == peer)
            return false;
    return source_can(c, peer) && (members_rank(c, peer) >= 0 || c->peers[peer].holds);
}

static bool source_known(const struct operation *op, uint32_t peer)
{
    for (uint32_t i = 0; i < op->n_sources; i++)
        if (op->source[i] == peer)
            return true;
    return false;
}

static void source_add(struct coordinator *c, uint32_t peer)
{
    struct operation *op = &c->op;
    if (op->n_sources < RANKS_MAX && !source_known(op, peer))
        op->source[op->n_sources++] = peer;
}

/* Who holds weights comes first, then checkpoints: of spare agents before those of ranks, which read for themselves. */
static void sources_find(struct coordinator *c, const uint32_t *peers, uint32_t n)
{
    struct operation *op = &c->op;
    free(op->source);
    op->source = calloc(RANKS_MAX, sizeof(*op->source));
    op->n_sources = op->n_holders = 0;
    if (!op->source)
        abort();
    for (uint32_t i = 0; i < c->n_peers; i++)
        if (source_holds(c, i, peers, n))
            source_add(c, i);
    op->n_holders = op->n_sources;
    for (int ranks = 0; ranks < 2; ranks++)
        for (uint32_t i = 0; i < c->n_peers; i++)
            if (source_can(c, i) && reload_can(c, i) && (members_rank(c, i) >= 0) == ranks)
                source_add(c, i);
}

/* [layers][logical] what the holders among the ranks of the view have; what others hold is not known here. */
static uint8_t *sources_hold(const struct coordinator *c)
{
    const struct view *d = c->durable.view;
    const struct expert_map *map = d && d->epoch == c->view->epoch ? d->map : c->view->map;
    uint8_t *has = calloc((size_t)map->layers * map->logical + 1, 1);
    if (!has)
        abort();
    for (uint32_t i = 0; i < c->op.n_holders; i++) {
        int rank = members_rank(c, c->op.source[i]);
        for (uint32_t layer = 0; rank >= 0 && layer < map->layers; layer++)
            for (uint32_t slot = 0; slot < map->slots; slot++) {
                int32_t e = map->held[expert_map_at(map, layer, (uint32_t)rank, slot)];
                if (e >= 0)
                    has[(size_t)layer * map->logical + (uint32_t)e] = 1;
            }
    }
    return has;
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
    return c->config.reload_after_ms &&
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

const char *reload_from(const struct operation *op)
{
    return op->copied == 0             ? "from the checkpoint"
           : op->copied == op->reloads ? "out of the memory of agents that do not serve"
                                       : "out of memory and from the checkpoint";
}

/* What the service waits for, in c->degraded. */
void reload_say(struct coordinator *c)
{
    char names[128];
    if (!c->op.reload || c->op.reloaded)
        return;
    if (c->op.phase == PHASE_RELOAD)
        core_names(c, &c->op.stage, names, sizeof(names));
    snprintf(c->degraded, sizeof(c->degraded),
             "%llu experts (of all layers) that lost their last copy are read again "
             "%s%s%.80s",
             (unsigned long long)c->op.reloads, reload_from(&c->op), c->op.phase == PHASE_RELOAD ? ", by " : "",
             c->op.phase == PHASE_RELOAD ? names : "");
}

/* How many of the experts without a live copy are in `copied`. */
static uint64_t lost_copied(const struct expert_map *left, const uint8_t *copied)
{
    uint64_t n = 0;
    for (uint32_t layer = 0; layer < left->layers; layer++)
        for (uint32_t e = 0; e < left->logical; e++)
            n += copied[(size_t)layer * left->logical + e] && !expert_map_live_count(left, layer, (int32_t)e, NULL);
    return n;
}

/* How many of them are read out of memory. */
static uint64_t reload_copied(const struct expert_map *load, const uint8_t *copied)
{
    uint64_t n = 0;
    for (uint32_t layer = 0; layer < load->layers; layer++)
        for (uint32_t at = 0; at < load->ranks * load->slots; at++) {
            int32_t e = load->held[(size_t)layer * load->ranks * load->slots + at];
            n += e >= 0 && copied[(size_t)layer * load->logical + (uint32_t)e];
        }
    return n;
}

static void reload_say_why(struct coordinator *c, const struct expert_map *left, uint64_t unplaced, bool somebody)
{
    snprintf(c->degraded, sizeof(c->degraded),
             "%llu experts (of all layers) have no copy on the %u ranks that are left, and %s for %llu of them",
             (unsigned long long)expert_map_missing(left), left->ranks,
             somebody ? "there is no room" : "no agent has the checkpoint", (unsigned long long)unplaced);
}

/* Who reads what, by those who can be read from now, into the ranks that are left (peers).  False: nothing, or not what has
 * to be; c->degraded says so. */
bool reload_place(struct coordinator *c, const uint32_t *peers, uint32_t n, const struct expert_map *left,
                  enum reload_extent extent, struct expert_map **ret_load)
{
    static const uint8_t nobody[RANKS_MAX];
    uint8_t can[RANKS_MAX];
    uint64_t placed, unplaced;
    sources_find(c, peers, n);
    bool others = c->op.n_sources > c->op.n_holders, somebody = others;
    for (uint32_t i = 0; i < n; i++)
        somebody |= can[i] = reload_can(c, peers[i]);
    uint8_t *copied = sources_hold(c);
    const struct reload_means means = {.can_load = extent == RELOAD_COPIES ? nobody : can,
                                       .others_load = extent != RELOAD_COPIES && others,
                                       .copied = copied};
    if (reload_plan(left, &means, ret_load, &placed, &unplaced) < 0)
        abort();
    c->op.reloads = placed;
    c->op.copied = reload_copied(*ret_load, copied);
    bool enough = extent == RELOAD_COPIES ? placed == lost_copied(left, copied) : extent == RELOAD_ALL ? !unplaced : placed > 0;
    free(copied);
    c->op.masked = extent == RELOAD_COPIES ? unplaced : 0;
    c->mask.unplaced = extent == RELOAD_WHAT_FITS && somebody ? unplaced : 0;
    if (enough)
        return true;
    reload_say_why(c, left, unplaced, somebody);
    expert_map_unref(*ret_load);
    return false;
}

/* All of them will come back: nothing is masked for ever. */
static bool reload_possible(struct coordinator *c, const uint32_t *peers, uint32_t n, const struct expert_map *left)
{
    struct expert_map *load;
    if (!reload_place(c, peers, n, left, RELOAD_ALL, &load))
        return false;
    expert_map_unref(load);
    return true;
}

/* It lacks nothing that it has not been serving without: a step of a masked view was torn. */
static bool reload_masked_before(struct coordinator *c, const struct expert_map *left)
{
    return expert_map_missing(left) <= mask_count(c);
}

/* How it goes on without waiting for the checkpoint, if the policy says so; else with it, if that is due. */
static bool reload_choose(struct coordinator *c, const uint32_t *peers, uint32_t n, const struct expert_map *left,
                          struct expert_map **ret_load)
{
    if (mask_allowed(c, peers, n) && (reload_masked_before(c, left) || reload_possible(c, peers, n, left)) &&
        reload_place(c, peers, n, left, RELOAD_COPIES, ret_load)) {
        if (c->op.reloads == 0) {
            expert_map_unref(*ret_load);
            *ret_load = NULL;
        }
        return true;
    }
    return reload_is_due(c) && reload_place(c, peers, n, left, RELOAD_ALL, ret_load);
}

/* The ranks that are left lack experts: begins a repair that brings them back.  False, with c->degraded saying what is
 * waited for, when that cannot be, or not yet. */
bool reload_begin(struct coordinator *c, const uint32_t *peers, uint32_t n, const struct expert_map *left)
{
    struct expert_map *load;
    if (!c->unwhole_ns)
        c->unwhole_ns = c->now_ns;
    if (reload_map_pending(c) || !c->durable.view || c->durable.view->epoch != c->view->epoch ||
        !reload_choose(c, peers, n, left, &load))
        return false;
    if (setup_repair(c, peers, n) < 0) {
        expert_map_unref(load);
        return false;
    }
    c->op.reload = load;
    c->op.bytes_planned = c->op.reloads * c->durable.model->expert_bytes;
    if (load && c->bug != COORDINATOR_BUG_RELOAD_VOID_FORGOTTEN)
        reload_void_view(c, peers, n);
    if (load)
        core_log(c, CORE_WARN, "repair: the view goes on with %u of %u ranks, and reads %llu experts again %s", n, c->view->n,
                 (unsigned long long)c->op.reloads, reload_from(&c->op));
    if (c->op.masked)
        core_log(c, CORE_WARN, "repair: the view goes on with %u of %u ranks, and without %llu experts until they have been "
                 "read again", n, c->view->n, (unsigned long long)c->op.masked);
    reload_say(c);
    operation_open_by_itself(c, n);
    return true;
}

/* Its record is durable, and with it the void slots. */
void reload_opened(struct coordinator *c)
{
    if (!c->op.reload || c->durable.open.kind != OP_REPAIR || !c->durable.view || c->durable.view->epoch != c->view->epoch)
        return;
    view_unref(c->view);
    c->view = view_ref(c->durable.view);
    c->changed = true;
}

/* Every engine has left its step.  True: the decision has to wait. */
bool reload_promised(struct coordinator *c)
{
    if (!c->op.reload || c->durable.open.kind != OP_REPAIR || c->op.reloaded || c->bug == COORDINATOR_BUG_RELOAD_UNAWAITED)
        return false;
    operation_stage(c, PHASE_RELOAD, STAGE_RELOAD);
    if (c->op.phase == PHASE_RELOAD)
        reload_say(c);
    return true;
}

/* What a party is asked to read, and from whom it may. */
void reload_ask(const struct coordinator *c, uint32_t party, struct msg_stage *s)
{
    const struct operation *op = &c->op;
    s->map = expert_map_ref(op->reload);
    s->step = c->durable.open.kind == OP_REPAIR ? 0 : c->grace_step;
    s->load = reload_can(c, op->peer[party]);
    s->sources = calloc(op->n_sources + 1, sizeof(*s->sources));
    if (!s->sources)
        abort();
    for (uint32_t i = 0; i < op->n_sources; i++) {
        if (op->source[i] == op->peer[party])
            continue;
        s->n_holders += i < op->n_holders;
        s->sources[s->n_sources++] = c->peers[op->source[i]].member;
    }
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
    if (c->durable.open.kind == OP_REPAIR)
        commit_reloaded(c);
    else
        rounds_next(c);
}

/* The repair ends; repair_check begins another, which does without this agent's file.  So it is with masked experts. */
static void reload_give_up(struct coordinator *c, const char *why)
{
    if (c->durable.open.kind != OP_REPAIR) {
        operation_abort(c, "%s", why);
        return;
    }
    commit_done(&c->commit);
    operation_end(c, OUTCOME_FAILED, why);
}

/* What was to be read from them has not come. */
static void sources_rest(struct coordinator *c)
{
    for (uint32_t i = 0; i < c->op.n_sources; i++)
        c->peers[c->op.source[i]].lend_ns = c->now_ns + RELOAD_RETRY_NS;
}

void reload_failed(struct coordinator *c, uint32_t peer, int code, const char *text)
{
    char why[256];
    struct peer *p = &c->peers[peer];
    bool never = code == ERR_CONFLICT || code == ERR_INVALID; /* a folder that is not there may be mounted again */
    if (reload_can(c, peer))
        p->reload_ns = never ? UINT64_MAX : c->now_ns + RELOAD_RETRY_NS;
    else
        sources_rest(c);
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
    sources_rest(c);
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
    for (uint32_t i = 0; i < c->n_peers; i++) {
        if (c->peers[i].reload_ns > c->now_ns && c->peers[i].reload_ns < first)
            first = c->peers[i].reload_ns;
        if (c->peers[i].lend_ns > c->now_ns && c->peers[i].lend_ns < first)
            first = c->peers[i].lend_ns;
    }
    return first;
}
