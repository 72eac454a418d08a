/* What the coordinator does beside operations, by an operator's word or by itself: operations are paused and resumed,
 * an agent that stops is drained, a view is scaled back to the strength that it had, and one that cannot be repaired is
 * given up, so that a cold start can follow.  Part of the coordinator's core; pure. */
#include <stdio.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define MS                1000000ULL
#define LEAVE_RETRY_NS    (1000 * MS)  /* after the drain of an agent that stops was aborted */
#define BACK_GRACE_NS     (5000 * MS)  /* how long to wait for spares enough for the whole strength */
#define BACK_RETRY_NS     (5000 * MS)  /* after an attempt; doubled each time ... */
#define BACK_RETRY_MAX_NS (60000 * MS) /* ... up to this */

/* ---- pause and resume ---- */

bool upkeep_halts(struct coordinator *c)
{
    struct operation *op = &c->op;
    if (!c->durable.paused || op->unattended || c->durable.open.kind == OP_REPAIR || op->phase == PHASE_LET_GO)
        return false;
    if (!op->halted_ns) {
        op->halted_ns = c->now_ns;
        op->deadline_ns = 0;
        c->changed = true;
        core_log(c, CORE_INFO, "operation %llu stands still after %s, because operations are paused",
                 (unsigned long long)c->durable.open.op, op_phase_name(op->phase));
    }
    return true;
}

static void upkeep_go_on(struct coordinator *c)
{
    struct operation *op = &c->op;
    if (!op->halted_ns)
        return;
    if (op->timeout_ns)
        op->timeout_ns += c->now_ns - op->halted_ns;
    if (op->wait_ns)
        op->wait_ns += c->now_ns - op->halted_ns;
    op->halted_ns = 0;
    if (op->phase == PHASE_PENDING)
        operation_peer_ready(c);
    else
        operation_next(c);
}

void upkeep_pause(struct coordinator *c, uint64_t request, bool pause, const char *why)
{
    struct durable *d = &c->durable;
    if (pause == d->paused) {
        core_reply(c, request, 0, d->open.op, OUTCOME_DONE, NULL, pause ? "paused already" : "nothing was paused");
        return;
    }
    d->paused = pause;
    d->paused_ms = pause ? c->wall_ms : 0;
    snprintf(d->paused_why, sizeof(d->paused_why), "%s", pause && why ? why : "");
    core_log(c, CORE_WARN, pause ? "operations are paused: %s" : "operations are resumed%s",
             pause ? (d->paused_why[0] ? d->paused_why : "no reason given") : "");
    c->changed = true;
    if (c->pause_request)
        core_reply(c, c->pause_request, ERR_CONFLICT, 0, 0, NULL, "overtaken by a later pause or resume");
    c->pause_request = request;
    core_journal(c, DURABLE_META, CONT_PAUSED);
}

void upkeep_paused(struct coordinator *c)
{
    uint64_t request = c->pause_request, op = c->durable.open.op;
    c->pause_request = 0;
    if (request && c->durable.paused)
        core_reply(c, request, 0, op, OUTCOME_DONE, NULL,
                   "paused: no operation begins, and one that runs stands still "
                   "before its next phase, until `eepctl resume`; repairs go on");
    else if (request)
        core_reply(c, request, 0, op, OUTCOME_DONE, NULL, "resumed");
    if (!c->durable.paused)
        upkeep_go_on(c);
}

/* ---- agents that stop ---- */

void upkeep_leave(struct coordinator *c, uint32_t peer)
{
    struct peer *p = &c->peers[peer];
    if (!c->view || members_rank(c, peer) < 0)
        return;
    if (!p->leaves)
        core_log(c, CORE_INFO, "agent %s asks to be drained", p->member.id);
    p->leaves = true;
}

/* Whatever an operator has begun gives way to it, as far as it can. */
static bool leave_clear_way(struct coordinator *c, uint32_t peer)
{
    int party = operation_party(c, peer);
    if (c->op.phase == PHASE_NONE)
        return true;
    if (!c->op.unattended && party >= 0 && c->durable.open.stays[party] && c->durable.open.kind != OP_REPAIR)
        operation_abort(c, "agent %s is being stopped", c->peers[peer].member.id);
    return c->op.phase == PHASE_NONE;
}

/* It still waits for it, as long as its own limit lets it. */
static void leave_again(struct coordinator *c, const struct op_record *ended)
{
    if (ended->kind != OP_SCALE_DOWN || ended->outcome != OUTCOME_ABORTED || !c->op.unattended || c->op.dropped)
        return;
    for (uint32_t i = 0; i < ended->n; i++) {
        struct peer *p = &c->peers[c->op.peer[i]];
        if (!ended->stays[i] && p->member.incarnation == ended->parties[i].incarnation)
            p->leaves = true;
    }
    c->leave_ns = c->now_ns + LEAVE_RETRY_NS;
}

static void leave_check(struct coordinator *c)
{
    if (c->now_ns < c->leave_ns)
        return;
    for (uint32_t i = 0; i < c->n_peers; i++) {
        struct peer *p = &c->peers[i];
        if (!p->leaves)
            continue;
        if (!p->conn || p->gone || !c->view || members_rank(c, i) < 0) {
            p->leaves = false; /* it says so again when it is back */
            continue;
        }
        if (c->torn || mask_count(c) || !leave_clear_way(c, i))
            continue;
        const char *id = p->member.id;
        struct scale_request leave = {.target = c->view->n - 1, .n_remove = 1, .remove = &id, .unattended = true};
        p->leaves = false;
        operation_scale(c, 0, &leave, NULL);
        return;
    }
}

/* ---- back to full strength ---- */

void upkeep_ended(struct coordinator *c, const struct op_record *ended)
{
    struct durable *d = &c->durable;
    uint32_t n = c->view ? c->view->n : 0;
    leave_again(c, ended);
    bool by_operator = ended->kind != OP_REPAIR && !c->op.unattended;
    if (ended->kind == OP_REPAIR) {
        if (n < d->wanted && !c->short_ns)
            c->short_ns = c->torn_ns ? c->torn_ns : c->now_ns;
        c->back_wait_ns = 0;
        c->back_ns = c->now_ns;
        return;
    }
    if (ended->kind == OP_REBALANCE)
        return; /* nobody has asked for another number of ranks */
    if (ended->outcome == OUTCOME_DONE && n && (by_operator || ended->kind == OP_SCALE_DOWN))
        d->wanted = c->op.left_out ? ended->target : n; /* a drained agent was one too many */
    else if (ended->outcome == OUTCOME_ABORTED && c->op.dropped)
        d->wanted = n; /* the operator does not want it */
    if (n >= d->wanted)
        c->short_ns = 0;
}

/* Says how long it took, before the record is closed. */
void upkeep_report(struct coordinator *c, char *text, size_t size)
{
    const struct op_record *r = &c->durable.open;
    uint32_t n = c->view ? c->view->n : 0;
    size_t used = strlen(text);
    if (used + 1 >= size)
        return;
    if ((r->kind == OP_SCALE_UP || r->kind == OP_START) && c->short_ns && n >= c->durable.wanted)
        snprintf(text + used, size - used, "%sfull strength again, %llu ms after the fault was noticed",
                 used ? "; " : "", (unsigned long long)((c->now_ns - c->short_ns) / MS));
    else if (r->kind == OP_REPAIR && c->op.decided && c->torn_ns && !text[0])
        snprintf(text + used, size - used, "serving again with %u ranks, %llu ms after the fault was noticed", n,
                 (unsigned long long)((c->now_ns - c->torn_ns) / MS));
}

static bool back_is_due(const struct coordinator *c)
{
    if (c->durable.paused || !c->durable.wanted || c->op.phase != PHASE_NONE || c->torn)
        return false;
    if (!c->view)
        return c->config.restart_after_ms > 0;
    return c->config.scale_back && c->view->n < c->durable.wanted && !c->mask.count;
}

static void back_check(struct coordinator *c)
{
    uint32_t spares[RANKS_MAX], n = c->view ? c->view->n : 0;
    if (!back_is_due(c))
        return;
    uint32_t spare = members_spares(c, n == 0, spares, c->durable.wanted - n);
    if (!spare || c->now_ns < c->back_ns + c->back_wait_ns)
        return;
    if (n + spare < c->durable.wanted && c->now_ns < c->back_ns + c->back_wait_ns + BACK_GRACE_NS)
        return; /* more may come */
    struct scale_request back = {.target = n + spare, .unattended = true};
    core_log(c, CORE_WARN, "%u ranks are wanted and %u serve: scales to %u by itself", c->durable.wanted, n, n + spare);
    c->back_ns = c->now_ns;
    c->back_wait_ns = c->back_wait_ns * 2 > BACK_RETRY_NS ? c->back_wait_ns * 2 : BACK_RETRY_NS;
    c->back_wait_ns = c->back_wait_ns < BACK_RETRY_MAX_NS ? c->back_wait_ns : BACK_RETRY_MAX_NS;
    operation_scale(c, 0, &back, NULL);
}

/* ---- giving a view up ---- */

/* Every rank that is missing has ended: nobody is left to wait for. */
static bool view_is_lost(const struct coordinator *c)
{
    bool any = false;
    for (uint32_t r = 0; r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        bool here =
            p != NOBODY && !c->peers[p].gone && c->peers[p].member.incarnation == c->view->members[r].incarnation;
        any |= !here;
        if (here && setup_fault(c, r))
            return false; /* its engine may attach again */
    }
    return any;
}

static void view_end_operation(struct coordinator *c)
{
    if (c->op.phase == PHASE_NONE)
        return;
    if (c->durable.open.kind != OP_REPAIR && !c->op.decided) {
        operation_abort(c, "the view is given up");
    } else {
        commit_done(&c->commit);
        operation_end(c, OUTCOME_FAILED, "the view is given up");
    }
}

static const char given_up[] = "the view was given up, to start anew from the checkpoint";

static uint32_t view_cast_out(struct coordinator *c)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->n_peers; i++) {
        struct peer *p = &c->peers[i];
        if (members_rank(c, i) < 0 && !(p->conn && p->holds))
            continue;
        n += !p->gone;
        if (c->bug == COORDINATOR_BUG_EVICTED_BEFORE_DURABLE)
            members_evict(c, i, given_up);
        p->outcast = p->gone = true;
        p->engine = false;
    }
    return n;
}

static void view_give_up(struct coordinator *c, const char *why, uint32_t *ret_evicted)
{
    struct durable *d = &c->durable;
    core_log(c, CORE_ERROR, "the view of epoch %llu is given up: %s", (unsigned long long)c->view->epoch, why);
    view_end_operation(c);
    *ret_evicted = view_cast_out(c);
    c->restarts++;
    if (!d->wanted)
        d->wanted = c->view->n;
    commit_done(&c->commit);
    if (!c->short_ns && c->torn)
        c->short_ns = c->torn_ns;
    arrivals_reset(&c->map_acks);
    c->map_announced = c->grace_step = c->torn_epoch = 0;
    c->torn = false;
    c->lost_ns = c->unwhole_ns = 0;
    c->degraded[0] = '\0';
    view_unref(c->view);
    view_unref(d->view);
    model_unref(d->model);
    commit_record_done(&d->commit);
    c->view = d->view = NULL;
    d->model = NULL;
    d->commit = (struct commit_record){0};
    c->back_ns = c->now_ns;
    c->back_wait_ns = 0;
    c->changed = true;
    core_journal(c, DURABLE_META | DURABLE_VIEW | DURABLE_OP | DURABLE_COMMIT | DURABLE_MODEL, CONT_RESTARTED);
}

void upkeep_restart(struct coordinator *c, uint64_t request, bool force)
{
    uint32_t evicted;
    if (!c->view && !c->restarts) {
        core_reply(c, request, 0, 0, OUTCOME_DONE, NULL, "there is no view to give up");
        return;
    }
    if (c->commit.state == COMMIT_DECIDING || c->restarts) {
        core_reply(c, request, ERR_CONFLICT, 0, 0, NULL, "a decision is just being written: try again");
        return;
    }
    if (!c->degraded[0] && !force) {
        core_reply(
            c, request, ERR_CONFLICT, 0, 0, NULL,
            "the view serves every expert: giving it up would only lose requests (--force does it nevertheless)");
        return;
    }
    c->restart_request = request;
    view_give_up(c, "asked by the operator", &evicted);
    c->restart_evicted = evicted;
}

bool upkeep_gives_up(const struct coordinator *c)
{
    return c->restarts > 0;
}

void upkeep_restarted(struct coordinator *c)
{
    c->restarts--;
    for (uint32_t i = 0; i < c->n_peers; i++) {
        if (c->peers[i].outcast)
            members_evict(c, i, given_up);
        c->peers[i].outcast = false;
    }
    if (c->restart_request)
        core_reply(c, c->restart_request, 0, 0, OUTCOME_DONE, NULL, "the view is given up; %u agents begin anew",
                   c->restart_evicted);
    c->restart_request = 0;
}

static void lost_check(struct coordinator *c)
{
    uint32_t evicted;
    bool lost = c->view && c->torn && c->degraded[0] && c->commit.state == COMMIT_IDLE && view_is_lost(c);
    if (!lost)
        c->lost_ns = 0;
    else if (!c->lost_ns)
        c->lost_ns = c->now_ns;
    uint64_t wait_ns = c->config.restart_after_ms * MS;
    if (lost && wait_ns && c->now_ns >= c->lost_ns + wait_ns)
        view_give_up(c, "experts are lost, and no agent that held them is left", &evicted);
}

/* ---- */

void upkeep_check(struct coordinator *c)
{
    lost_check(c);
    leave_check(c);
    back_check(c);
}

uint64_t upkeep_deadline(const struct coordinator *c)
{
    uint64_t first = UINT64_MAX;
    for (uint32_t i = 0; c->now_ns < c->leave_ns && i < c->n_peers; i++)
        if (c->peers[i].leaves)
            first = c->leave_ns;
    if (c->lost_ns && c->lost_ns + c->config.restart_after_ms * MS < first && c->config.restart_after_ms)
        first = c->lost_ns + c->config.restart_after_ms * MS;
    if (back_is_due(c)) {
        uint64_t due = c->back_ns + c->back_wait_ns;
        due = c->now_ns < due ? due : due + BACK_GRACE_NS;
        if (c->now_ns < due && due < first)
            first = due; /* later than that it waits for a spare, whose HELLO comes by itself */
    }
    return first;
}
