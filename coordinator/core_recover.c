/* What a restarted coordinator does with the operation that the journal left open.  Part of its core; pure.
 *
 * One rule: decided goes on, a repair goes on under its own epoch, everything else is aborted. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

static void recover_parties(struct coordinator *c)
{
    struct op_record *r = &c->durable.open;
    c->op.peer = calloc(r->n + 1, sizeof(*c->op.peer));
    c->op.progress = calloc(r->n + 1, sizeof(*c->op.progress));
    c->op.expected = calloc(r->n + 1, sizeof(*c->op.expected));
    if (!c->op.peer || !c->op.progress || !c->op.expected)
        abort();
    for (uint32_t i = 0; i < r->n; i++)
        c->op.peer[i] = members_find(c, r->parties[i].id);
    c->op.started_ns = c->op.phase_since_ns = c->now_ns;
}

/* A decision whose operation was closed already (a repair was to follow): its parties, from the decision itself. */
static void recover_orphan(struct coordinator *c)
{
    const struct commit_record *k = &c->durable.commit;
    struct op_record *r = &c->durable.open;
    r->op = k->op;
    r->kind = OP_SCALE_UP;
    r->n_old = k->n_old;
    r->target = k->view->n;
    r->parties = calloc(k->n_old + k->view->n + 1, sizeof(*r->parties));
    r->stays = calloc(k->n_old + k->view->n + 1, 1);
    if (!r->parties || !r->stays)
        abort();
    for (uint32_t i = 0; i < k->n_old; i++) {
        r->parties[r->n] = k->old[i];
        r->stays[r->n++] = view_rank(k->view, k->old[i].id) >= 0;
    }
    for (uint32_t i = 0; i < k->view->n; i++) {
        bool old = false;
        for (uint32_t j = 0; j < k->n_old; j++)
            old |= strcmp(k->old[j].id, k->view->members[i].id) == 0;
        if (old)
            continue;
        r->parties[r->n] = k->view->members[i];
        r->stays[r->n++] = 1;
    }
}

/* With replicated dispatch the last decision may be that of a map, after the one of the view: the view tells. */
static bool recover_is_committed(const struct coordinator *c)
{
    const struct op_record *r = &c->durable.open;
    uint32_t stays = 0;
    for (uint32_t i = 0; i < r->n; i++) {
        if (r->stays[i] != (c->view && member_find(c->view->members, c->view->n, &r->parties[i]) >= 0))
            return false;
        stays += r->stays[i];
    }
    return c->view && stays == c->view->n;
}

/* The rest of a scale-up: slots that its plan has yet to fill.  False: nothing is known of it. */
static bool recover_plan(struct coordinator *c)
{
    const struct op_record *r = &c->durable.open;
    struct operation *op = &c->op;
    if (r->kind != OP_SCALE_UP || !r->plan || r->plan->target->ranks != r->n || r->planned_over->ranks != r->n)
        return false;
    uint8_t *leaving = calloc(r->n, 1), *joining = calloc(r->n, 1);
    uint32_t *node = calloc(r->n, sizeof(*node));
    if (!leaving || !joining || !node)
        abort();
    for (uint32_t i = 0; i < r->n; i++) {
        joining[i] = i >= r->n_old;
        node[i] = r->parties[i].node;
    }
    op->plan = plan_ref(r->plan);
    op->in = (struct plan_input){
        .now = expert_map_ref(r->planned_over), .leaving = leaving, .joining = joining, .node = node};
    struct err err;
    if (plan_validate(&op->in, op->plan, &err) < 0) {
        core_log(c, CORE_ERROR, "the plan of operation %llu in the journal is not followed: %s", (unsigned long long)r->op,
                 err.text);
        plan_unref(op->plan);
        op->plan = NULL;
        return false;
    }
    op->round = r->round;
    op->stage_attempt = c->now_ns; /* no answer to a question of before counts */
    return true;
}

/* A repair that was to read experts again knows no more which, and begins anew when the agents are back. */
static bool recover_is_whole(struct coordinator *c)
{
    struct err err;
    struct view *target = setup_target(c);
    bool whole = expert_map_validate(target->map, NULL, &err) == 0;
    view_unref(target);
    return whole;
}

void operation_recover(struct coordinator *c)
{
    struct op_record *r = &c->durable.open;
    const struct commit_record *k = &c->durable.commit;
    bool unsettled = k->epoch && !k->settled;
    if (!r->op && unsettled)
        recover_orphan(c);
    if (!r->op) {
        rounds_recover(c);
        return;
    }
    for (uint32_t i = 0; i < r->n; i++)
        if (members_find(c, r->parties[i].id) == NOBODY) {
            struct view one = {.n = 1, .members = &r->parties[i]};
            if (members_recover(c, &one) < 0)
                abort();
        }
    recover_parties(c);
    bool decided = r->kind != OP_REBALANCE && k->epoch && k->op == r->op && (k->kind != FLIP_MAP || recover_is_committed(c));
    c->op.phase = PHASE_OPEN;
    c->op.announced = true;
    core_log(c, CORE_WARN, "recovered operation %llu (%s to %u ranks), %s", (unsigned long long)r->op,
             op_kind_name(r->kind), r->target,
             decided ? "decided: it goes on" : r->kind == OP_REPAIR ? "a repair: it goes on" : "undecided: it is aborted");
    /* A repair goes before what it repairs: those who lack the older decision get it with their HELLO. */
    bool repairs = r->kind == OP_REPAIR && k->op != r->op;
    if (unsettled && !repairs) {
        c->op.decided = decided;
        if (decided)
            (void)recover_plan(c);
        if (decided && k->kind != FLIP_MAP) {
            snprintf(c->op.why, sizeof(c->op.why), "committed; the coordinator restarted meanwhile");
            operation_phase(c, PHASE_GO, "recovered");
        } else {
            operation_phase(c, PHASE_RETIRE, "recovered");
        }
        commit_recover(c);
        return;
    }
    rounds_recover(c);
    if (decided && recover_plan(c)) {
        c->op.decided = c->op.resumed = true;
        operation_phase(c, PHASE_RETIRE, "recovered; the map in use is acknowledged once more");
        c->op.deadline_ns = c->now_ns + 1000000ULL * (c->config.lease_ms + c->config.stage_ms);
    } else if (decided) {
        c->op.decided = true;
        operation_end(c, OUTCOME_DONE, "committed; the coordinator restarted before the slots were all filled");
    } else if (r->kind == OP_REPAIR && !recover_is_whole(c)) {
        c->torn = true;
        operation_end(c, OUTCOME_FAILED, "the coordinator restarted while experts were read again");
    } else if (r->kind == OP_REPAIR && c->bug != COORDINATOR_BUG_RESET_ABORTED_AFTER_RESTART) {
        c->torn = true;
        operation_phase(c, PHASE_PROMISE, "recovered");
        repair_resume(c);
    } else {
        operation_abort(c, "the coordinator restarted before the decision");
    }
}
