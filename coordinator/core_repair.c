/* Repair: what a death does.  Part of the coordinator's core; pure.
 *
 * A rank of the view that is gone, or whose engine is gone, leaves the others inside a step that never ends.  The
 * survivors are pulled out (RESET) and go on in a view without it, if every expert still has a copy on them, or can be
 * read from the checkpoint again (core_reload.c).  Otherwise the view waits for the lost rank: its agent may come back
 * with the weights, its engine may attach again.  A step can also be torn without a loss, when engines cannot reach one another: then all of them retry it in a new view. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define REPAIR_RETRY_NS 100000000ULL      /* between two retries with the same ranks; doubled each time ... */
#define REPAIR_RETRY_MAX_NS 10000000000ULL /* ... up to this */
#define REPAIR_CALM_NS 60000000000ULL     /* a view that worked for so long counts as sound again */

/* What the ranks that can serve hold, with every dormant copy that is needed routed to; they lack *ret_lost experts. */
static struct expert_map *repair_left(const struct coordinator *c, uint64_t *ret_lost)
{
    int32_t from[RANKS_MAX];
    uint32_t n = 0;
    for (uint32_t r = 0; r < c->view->n; r++)
        if (!setup_fault(c, r))
            from[n++] = (int32_t)r;
    /* A map on its way to the journal counts already: what it retires may be announced at any moment. */
    const struct view *d = c->durable.view;
    struct expert_map *map = expert_map_select(d && d->epoch == c->view->epoch ? d->map : c->view->map, from, n);
    if (!map)
        abort();
    *ret_lost = plan_cover_from_dormant(map);
    return map;
}

/* Ranks that can serve; *ret_whole tells that they hold every expert. */
static uint32_t repair_survivors(struct coordinator *c, uint32_t *ret_peers, bool *ret_whole)
{
    uint32_t n = 0;
    for (uint32_t r = 0; r < c->view->n; r++)
        if (!setup_fault(c, r))
            ret_peers[n++] = members_find(c, c->view->members[r].id);
    *ret_whole = false;
    if (n == 0)
        return 0;
    uint64_t lost;
    struct expert_map *map = repair_left(c, &lost);
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

/* Its view is torn before everybody had flipped.  If it had, the others may still read its weights, in their last steps of
 * the old view: it is put out when the repair has voided those. */
static void repair_leaver(struct coordinator *c, uint32_t peer)
{
    if (arrivals_has(&c->commit.flipped, peer))
        c->peers[peer].holds = true;
    else
        members_evict(c, peer, "its view was torn before it had left");
}

/* Whatever runs gives way.  False when it cannot yet. */
static bool repair_clear_way(struct coordinator *c)
{
    if (c->op.phase == PHASE_NONE)
        return true;
    if (c->durable.open.kind != OP_REPAIR && !c->op.decided) {
        operation_abort(c, "a rank was lost");
        return c->op.phase == PHASE_NONE;
    }
    for (uint32_t i = 0; i < c->durable.open.n && c->commit.state == COMMIT_GOING; i++)
        if (!c->durable.open.stays[i])
            repair_leaver(c, c->op.peer[i]);
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

/* Everybody lives, but the communicators of the view are broken: the step is retried in a new one by the same ranks. */
void repair_torn(struct coordinator *c, uint32_t peer, const struct msg_engine *engine)
{
    const struct commit *k = &c->commit;
    if (!c->view)
        return;
    /* Before its switch a rank reports the view that it is in; after a RESET nobody is in an older one. */
    bool before = k->state == COMMIT_GOING && k->kind != FLIP_RESET && operation_party(c, peer) >= 0 &&
                  !arrivals_has(&k->flipped, peer) && engine->torn_epoch < c->view->epoch;
    bool now = engine->torn_epoch == c->view->epoch && (members_rank(c, peer) >= 0 || k->state == COMMIT_GOING);
    if (!before && !now)
        return;
    core_log(c, CORE_ERROR, "agent %s: %s", c->peers[peer].member.id, engine->why);
    c->torn = true;
    c->torn_epoch = c->view->epoch;
}

/* A pair of engines that cannot talk to each other would otherwise be repaired in a loop. */
bool repair_waits(const struct coordinator *c)
{
    return c->torn && c->now_ns < c->retry_ns;
}

void repair_missing(const struct coordinator *c, char *ret_text, size_t size)
{
    ret_text[0] = '\0';
    for (uint32_t r = 0; c->view && r < c->view->n; r++) {
        const struct member *m = &c->view->members[r];
        uint32_t p = setup_fault(c, r) ? members_find(c, m->id) : NOBODY;
        size_t used = strlen(ret_text);
        if (p == NOBODY)
            continue;
        bool here = c->peers[p].conn && c->peers[p].member.incarnation == m->incarnation;
        snprintf(ret_text + used, size - used, "%s%s (%s)", used ? ", " : "", m->id,
                 here && !c->peers[p].engine ? "no engine" : "lost");
    }
}

static void repair_pace(struct coordinator *c)
{
    c->retries = c->retried_ns && c->now_ns < c->retried_ns + REPAIR_CALM_NS ? c->retries + 1 : 0;
    c->retried_ns = c->now_ns;
    uint64_t wait = c->retries < 7 ? REPAIR_RETRY_NS << c->retries : REPAIR_RETRY_MAX_NS;
    c->retry_ns = c->now_ns + wait;
}

/* Only now: until the decision it may turn out that the view cannot do without it, or its engine may come back. */
void repair_committed(struct coordinator *c)
{
    const struct commit_record *r = &c->durable.commit;
    for (uint32_t k = 0; k < c->n_peers; k++) {
        struct peer *p = &c->peers[k];
        bool old = member_find(r->old, r->n_old, &p->member) >= 0;
        bool leaver = p->conn && p->holds; /* of an earlier view: nobody is in those steps with it any more */
        if (members_rank(c, k) >= 0 || (!old && !leaver))
            continue;
        members_evict(c, k, "the view goes on without it");
        p->gone = true;
    }
}

static uint32_t repair_faults(const struct coordinator *c)
{
    uint32_t faults = 0;
    for (uint32_t r = 0; r < c->view->n; r++)
        faults += setup_fault(c, r);
    return faults;
}

/* Without those who were silent it does not go: they are asked again.  False when there are none. */
static bool repair_ask_silent(struct coordinator *c)
{
    bool any = false;
    for (uint32_t r = 0; r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        any |= p != NOBODY && c->peers[p].silent;
        if (p != NOBODY)
            c->peers[p].silent = false;
    }
    return any;
}

static void repair_reload(struct coordinator *c, const uint32_t *peers, uint32_t n)
{
    uint64_t lost;
    struct expert_map *left = repair_left(c, &lost);
    bool begun = reload_begin(c, peers, n, left); /* what keeps it from that is in c->degraded */
    if (begun && n == c->view->n) /* a step of a view with masked experts was torn */
        repair_pace(c);
    expert_map_unref(left);
}

void repair_check(struct coordinator *c)
{
    uint32_t peers[RANKS_MAX], faults, n;
    bool whole;
    if (!c->view || c->commit.state == COMMIT_DECIDING)
        return;
    faults = repair_faults(c);
    if (faults || repair_leaver_lost(c))
        c->torn = true;
    if (!c->torn) {
        c->unwhole_ns = 0;
        mask_check(c);
        return;
    }
    n = repair_survivors(c, peers, &whole);
    if (!whole && repair_ask_silent(c)) {
        n = repair_survivors(c, peers, &whole);
        faults = repair_faults(c);
    }
    bool again = n == c->view->n; /* it may lack experts even so: masked ones */
    if (whole)
        c->unwhole_ns = 0;
    if (c->durable.open.kind == OP_REPAIR && c->op.phase != PHASE_NONE && repair_fits(c, peers, n)) {
        reload_say(c);
        return;
    }
    if (c->durable.open.kind == OP_REPAIR && c->op.decided && !faults)
        return;
    if (again && repair_waits(c)) {
        snprintf(c->degraded, sizeof(c->degraded), "a step failed on %u ranks that are all there; it is retried soon",
                 n);
        return;
    }
    if (!repair_clear_way(c))
        return;
    if (!whole) {
        if (n == 0 && !c->degraded[0])
            snprintf(c->degraded, sizeof(c->degraded), "no rank of the view is left");
        if (n)
            repair_reload(c, peers, n);
        return;
    }
    if (faults)
        core_log(c, CORE_WARN, "repair: the view goes on with %u of %u ranks", n, c->view->n);
    else
        core_log(c, CORE_WARN, "repair: every rank is there, the torn step is retried");
    if (again)
        repair_pace(c);
    c->degraded[0] = '\0';
    if (setup_repair(c, peers, n) < 0)
        return;
    operation_open_by_itself(c, n);
}
