/* Map changes inside a view: retire, grace, fill, activate.  Part of the coordinator's core; pure.
 *
 *   round_run --(map written to the journal, announced)--> RETIRE --every rank applied it--> GRACE
 *      ^                                                                                        | holders completed T-1
 *      |                                                                                        v
 *      +---------- next round: its map activates what this one filled <---- verified ---------- FILL
 *
 * With source-routed dispatch a map is announced and acknowledged with s_i, the first step that uses it; with replicated
 * dispatch it goes through promise and go like a view.  Either way T (grace_step) bounds the steps that may still read
 * a retired slot, and no slot is written before its holder has completed step T-1. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

/* With no commit ahead the last round is activated by a map of its own. */
static bool rounds_last(const struct coordinator *c)
{
    return c->op.decided || c->durable.open.kind == OP_REBALANCE;
}

static uint32_t rounds_limit(const struct coordinator *c)
{
    const struct plan *p = c->op.plan;
    return rounds_last(c) ? p->rounds_before + p->rounds_after : p->rounds_before;
}

static bool rounds_replicated(const struct coordinator *c)
{
    for (uint32_t r = 0; r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        if (c->peers[p].dispatch == DISPATCH_REPLICATED)
            return true;
    }
    return false;
}

/* The planted mistake: stop routing to an expert's only live replica. */
static void rounds_uncover(struct expert_map *map)
{
    for (size_t i = 0; i < (size_t)map->ranks * map->slots; i++)
        if (map->live[i] && expert_map_live_count(map, 0, map->held[i], NULL) == 1) {
            map->live[i] = 0;
            return;
        }
}

/* The map at the start of round op.round, by the ranks of the present view. */
static struct expert_map *rounds_map(struct coordinator *c)
{
    int32_t from[RANKS_MAX];
    for (uint32_t r = 0; r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        from[r] = operation_party(c, p);
    }
    bool last = c->op.round >= rounds_limit(c);
    struct expert_map *over = last ? plan_map_after(&c->op.in, c->op.plan, c->op.round)
                                   : plan_map_during(&c->op.in, c->op.plan, c->op.round);
    struct expert_map *map = over ? expert_map_select(over, from, c->view->n) : NULL;
    expert_map_unref(over);
    if (!map)
        abort();
    if (c->bug == COORDINATOR_BUG_RETIRE_UNCOVERED && !last)
        rounds_uncover(map);
    return map;
}

static struct view *rounds_view(struct coordinator *c, struct expert_map *map)
{
    struct view *view = view_copy(c->view);
    if (!view)
        abort();
    expert_map_unref(view->map);
    view->map = map;
    return view;
}

/* Masked experts are not copied from ranks of the view: they have none. */
static void rounds_fill(struct coordinator *c)
{
    if (c->op.reload && c->bug == COORDINATOR_BUG_MASKED_UNREAD) {
        c->op.round++;
        rounds_run(c);
    } else if (c->op.reload) {
        operation_stage(c, PHASE_RELOAD, STAGE_RELOAD);
    } else {
        operation_stage(c, PHASE_FILL, STAGE_FILL);
    }
}

static void rounds_grace(struct coordinator *c)
{
    if (c->op.round >= rounds_limit(c)) {
        operation_rounds_done(c);
        return;
    }
    if (c->bug == COORDINATOR_BUG_FILL_WITHOUT_GRACE) {
        rounds_fill(c);
        return;
    }
    c->op.stage_step = c->grace_step;
    operation_stage(c, PHASE_GRACE, STAGE_GRACE);
}

void rounds_run(struct coordinator *c)
{
    if (c->op.round >= rounds_limit(c) && !rounds_last(c)) {
        operation_rounds_done(c); /* the commit's own map activates what the last round filled */
        return;
    }
    struct expert_map *map = rounds_map(c);
    operation_phase(c, PHASE_RETIRE, c->op.round < rounds_limit(c) ? "next round" : "the last round is activated");
    c->op.deadline_ns = c->now_ns + 1000000ULL * c->config.stage_ms;
    c->durable.open.round = c->op.round;
    if (expert_map_digest(map) == expert_map_digest(c->view->map)) {
        expert_map_unref(map); /* nothing to retire, nothing to activate */
        rounds_grace(c);
        return;
    }
    if (rounds_replicated(c)) {
        commit_start(c, FLIP_MAP, rounds_view(c, map));
        return;
    }
    map->version = ++c->durable.map_version;
    struct view *view = rounds_view(c, map);
    view_unref(c->durable.view);
    c->durable.view = view;
    core_journal(c, DURABLE_VIEW | DURABLE_META | DURABLE_OP, CONT_MAP);
}

static void rounds_send(struct coordinator *c, uint32_t peer)
{
    struct msg *m = core_send(c, peer, MSG_MAP);
    if (!m)
        return;
    m->map.epoch = c->view->epoch;
    m->map.op = c->durable.open.op;
    m->map.map = expert_map_ref(c->view->map);
}

static void rounds_announce(struct coordinator *c)
{
    c->map_announced = c->view->map->version;
    arrivals_reset(&c->map_acks);
    for (uint32_t r = 0; r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        if (arrivals_expect(&c->map_acks, p, c->view->members[r].incarnation) < 0)
            abort();
    }
    for (uint32_t r = 0; r < c->view->n; r++)
        rounds_send(c, members_find(c, c->view->members[r].id));
}

void rounds_map_durable(struct coordinator *c)
{
    /* Also when the operation was aborted meanwhile: the journal has this map, so everybody gets it. */
    if (!c->durable.view || !c->view || c->durable.view->epoch != c->view->epoch)
        return;
    struct view *view = view_copy(c->durable.view);
    if (!view)
        abort();
    for (uint32_t r = 0; r < view->n; r++) {
        view->members[r].draining = c->view->members[r].draining;
        memcpy(view->members[r].endpoint, c->view->members[r].endpoint, sizeof(view->members[r].endpoint));
    }
    view_unref(c->view);
    c->view = view;
    c->changed = true;
    core_log(c, CORE_INFO, "map %llu of epoch %llu is announced", (unsigned long long)view->map->version,
             (unsigned long long)view->epoch);
    rounds_announce(c);
}

void rounds_map_ack(struct coordinator *c, uint32_t peer, const struct msg_map_ack *ack)
{
    if (ack->version != c->map_announced ||
        arrivals_add(&c->map_acks, peer, c->peers[peer].member.incarnation, ack->step) != ARRIVAL_COUNTED)
        return;
    c->changed = true;
    if (!arrivals_complete(&c->map_acks))
        return;
    uint64_t step = arrivals_max(&c->map_acks);
    if (step > c->grace_step)
        c->grace_step = step;
    if (c->op.phase == PHASE_RETIRE && c->op.resumed) {
        c->op.resumed = false;
        rounds_run(c); /* which steps may read what is known again */
    } else if (c->op.phase == PHASE_RETIRE) {
        rounds_grace(c);
    } else {
        operation_peer_ready(c);
    }
}

void rounds_flipped(struct coordinator *c)
{
    if (c->durable.commit.step > c->grace_step)
        c->grace_step = c->durable.commit.step;
    if (c->op.phase == PHASE_RETIRE && c->op.plan)
        rounds_grace(c);
    else if (c->op.phase != PHASE_RETIRE)
        operation_peer_ready(c);
    else if (c->op.decided)
        operation_end(c, OUTCOME_DONE, "committed; the coordinator restarted before the slots were all filled");
    else
        operation_abort(c, "the coordinator restarted before the decision");
}

void rounds_next(struct coordinator *c)
{
    if (c->op.phase == PHASE_GRACE) {
        rounds_fill(c);
    } else if (c->op.phase == PHASE_FILL || c->op.phase == PHASE_RELOAD) {
        c->op.round++;
        rounds_run(c);
    }
}

void rounds_hello(struct coordinator *c, uint32_t peer)
{
    if (members_rank(c, peer) < 0 || !c->map_announced || c->map_announced != c->view->map->version)
        return;
    if (!arrivals_has(&c->map_acks, peer) && c->peers[peer].applied_epoch == c->view->epoch)
        rounds_send(c, peer);
}

/* After a restart: s_i are asked for again, so that T is known before any slot is written. */
void rounds_recover(struct coordinator *c)
{
    if (c->view)
        rounds_announce(c);
}

void rounds_peer_gone(struct coordinator *c, uint32_t peer)
{
    (void)peer;
    bool waiting = !arrivals_complete(&c->map_acks);
    for (size_t i = 0; waiting && i < c->map_acks.n; i++)
        if (!c->map_acks.v[i].arrived && !c->peers[c->map_acks.v[i].id].gone)
            return;
    if (waiting) {
        arrivals_reset(&c->map_acks); /* only the dead are missing; the repair that follows makes a new view */
        operation_peer_ready(c);
    }
}
