/* Repair: what a death does.  Part of the coordinator's core; pure.
 *
 * A rank of the view that is gone, or whose engine is gone, leaves the others inside a step that never ends.  The
 * survivors are pulled out (RESET) and go on in a view without it, if every expert still has a copy on them.  Otherwise
 * the view waits for the lost rank: its agent may come back with the weights, its engine may attach again. */
#include <stdio.h>
#include <string.h>

#include "coordinator/core_internal.h"

/* Ranks that can serve; *ret_whole tells that they hold every expert. */
static uint32_t repair_survivors(struct coordinator *c, uint32_t *ret_peers, bool *ret_whole)
{
    int32_t from[RANKS_MAX];
    uint32_t n = 0;
    for (uint32_t r = 0; r < c->view->n; r++) {
        if (setup_fault(c, r))
            continue;
        ret_peers[n] = members_find(c, c->view->members[r].id);
        from[n++] = (int32_t)r;
    }
    *ret_whole = false;
    if (n == 0)
        return 0;
    /* A map on its way to the journal counts already: what it retires may be announced at any moment. */
    const struct view *d = c->durable.view;
    struct expert_map *map = expert_map_select(d && d->epoch == c->view->epoch ? d->map : c->view->map, from, n);
    uint64_t lost = map ? plan_cover_from_dormant(map) : 1;
    *ret_whole = lost == 0;
    if (lost)
        snprintf(c->degraded, sizeof(c->degraded),
                 "%llu experts (of all layers) have no copy on the %u ranks that are left", (unsigned long long)lost,
                 n);
    expert_map_unref(map);
    return n;
}

/* The epoch that was open when the coordinator went down goes on: gates stay shut until a repair commits. */
void repair_resume(struct coordinator *c)
{
    if (!c->durable.open.epoch || c->durable.open.flip != FLIP_RESET) {
        commit_start(c, FLIP_RESET, setup_target(c));
        return;
    }
    commit_resume(c, setup_target(c));
}

/* The repair in progress still fits those who are left? */
static bool repair_fits(const struct coordinator *c, const uint32_t *peers, uint32_t n)
{
    if (c->op.decided || c->durable.open.n != n)
        return false;
    for (uint32_t i = 0; i < n; i++)
        if (c->op.peer[i] != peers[i])
            return false;
    return true;
}

/* Whatever runs gives way.  False when it cannot yet. */
static bool repair_clear_way(struct coordinator *c)
{
    if (c->op.phase == PHASE_NONE)
        return true;
    if (c->durable.open.kind != OP_REPAIR && !c->op.decided) {
        operation_abort(c, ERR_ABORTED, "a rank was lost");
        return c->op.phase == PHASE_NONE;
    }
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        if (c->commit.state == COMMIT_GOING && !c->durable.open.stays[i] && !arrivals_has(&c->commit.flipped, c->op.peer[i]))
            members_evict(c, c->op.peer[i], "its view was torn before it had left");
    commit_done(&c->commit); /* a RESET is overtaken, never aborted */
    operation_end(c, c->op.decided ? OUTCOME_DONE : OUTCOME_FAILED,
                  c->op.decided ? "committed; a rank was lost before everything had settled" : "another rank was lost");
    return true;
}

/* A leaver that dies before the switch tears the old view's steps, although the new view does not name it. */
static bool repair_leaver_lost(const struct coordinator *c)
{
    const struct op_record *r = &c->durable.open;
    if (c->commit.state != COMMIT_GOING || c->commit.kind != FLIP_VIEW)
        return false;
    for (uint32_t i = 0; i < r->n; i++) {
        const struct peer *p = &c->peers[c->op.peer[i]];
        bool same = p->member.incarnation == r->parties[i].incarnation;
        if (!r->stays[i] && !arrivals_has(&c->commit.flipped, c->op.peer[i]) && (!same || p->gone || !p->engine))
            return true;
    }
    return false;
}

void repair_check(struct coordinator *c)
{
    uint32_t peers[RANKS_MAX], faults = 0, n;
    bool whole;
    if (!c->view || c->commit.state == COMMIT_DECIDING)
        return;
    for (uint32_t r = 0; r < c->view->n; r++)
        faults += setup_fault(c, r);
    if (faults || repair_leaver_lost(c))
        c->torn = true;
    if (!c->torn) {
        c->degraded[0] = '\0';
        return;
    }
    n = repair_survivors(c, peers, &whole);
    if (c->durable.open.kind == OP_REPAIR && c->op.phase != PHASE_NONE && repair_fits(c, peers, n))
        return;
    if (c->durable.open.kind == OP_REPAIR && c->op.decided && !faults)
        return;
    if (!repair_clear_way(c))
        return;
    if (!whole) {
        if (n == 0 && !c->degraded[0])
            snprintf(c->degraded, sizeof(c->degraded), "no rank of the view is left");
        return;
    }
    if (faults)
        core_log(c, CORE_WARN, "repair: the view goes on with %u of %u ranks", n, c->view->n);
    else
        core_log(c, CORE_WARN, "repair: every rank is back, the torn step is retried");
    for (uint32_t r = 0; r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        if (setup_fault(c, r) && c->peers[p].member.incarnation == c->view->members[r].incarnation) {
            members_evict(c, p, "the view goes on without it");
            c->peers[p].gone = true;
        }
    }
    c->degraded[0] = '\0';
    if (setup_repair(c, peers, n) < 0)
        return;
    operation_open_repair(c, n);
}
