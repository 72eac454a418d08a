/* Who takes part in an operation, what moves, and the view that it proposes.  Part of the coordinator's core; pure. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"
#include "coordinator/reload.h"

bool setup_fault(const struct coordinator *c, uint32_t rank)
{
    const struct member *m = &c->view->members[rank];
    uint32_t p = members_find(c, m->id);
    return p == NOBODY || c->peers[p].gone || !c->peers[p].engine || c->peers[p].silent ||
           c->peers[p].member.incarnation != m->incarnation;
}

static int setup_parties(struct coordinator *c, const uint32_t *peers, const uint8_t *stays, uint32_t n,
                         uint32_t n_old)
{
    struct op_record *r = &c->durable.open;
    free(r->parties);
    free(r->stays);
    free(c->op.peer);
    free(c->op.progress);
    free(c->op.expected);
    r->parties = calloc(n + 1, sizeof(*r->parties));
    r->stays = calloc(n + 1, 1);
    c->op.peer = calloc(n + 1, sizeof(*c->op.peer));
    c->op.progress = calloc(n + 1, sizeof(*c->op.progress));
    c->op.expected = calloc(n + 1, sizeof(*c->op.expected));
    if (!r->parties || !r->stays || !c->op.peer || !c->op.progress || !c->op.expected)
        return ERR_NOMEM;
    r->n = n;
    r->n_old = n_old;
    for (uint32_t i = 0; i < n; i++) {
        r->parties[i] = c->peers[peers[i]].member;
        r->parties[i].serving = c->peers[peers[i]].engine;
        r->stays[i] = stays[i];
        c->op.peer[i] = peers[i];
    }
    return 0;
}

static int setup_slots(const struct coordinator *c, uint32_t logical, uint32_t target, uint32_t *ret_slots,
                       struct err *err)
{
    uint32_t min = c->config.min_ranks ? c->config.min_ranks : 1;
    uint32_t slots = c->durable.model ? c->durable.model->slots : c->config.slots;
    if (!slots)
        slots = (logical + min - 1) / min;
    if ((uint64_t)slots * target < logical)
        return err_set(err, ERR_LIMIT, "%u ranks of %u slots cannot hold %u experts a layer: scale to %u or more",
                       target, slots, logical, (logical + slots - 1) / slots);
    *ret_slots = slots;
    return 0;
}

static int setup_members_ready(const struct coordinator *c, struct err *err)
{
    for (uint32_t r = 0; c->view && r < c->view->n; r++) {
        uint32_t p = members_find(c, c->view->members[r].id);
        if (setup_fault(c, r))
            return err_set(err, ERR_CONFLICT, "rank %u (agent %s) is lost and is being repaired: try again later", r,
                           c->view->members[r].id);
        if (!c->peers[p].conn)
            return err_set(err, ERR_UNREACHABLE, "rank %u (agent %s) is not connected: try again when it is", r,
                           c->view->members[r].id);
    }
    if (c->torn)
        return err_set(err, ERR_CONFLICT, "a step of the view has failed and is being repaired: try again later");
    return 0;
}

static int setup_down(struct coordinator *c, const struct scale_request *s, struct err *err)
{
    uint32_t n = c->view->n, peers[RANKS_MAX], slots;
    uint8_t stays[RANKS_MAX];
    if (s->n_remove > n - s->target)
        return err_set(err, ERR_INVALID, "%u agents are named to leave, but from %u to %u only %u do", s->n_remove, n,
                       s->target, n - s->target);
    for (uint32_t r = 0; r < n; r++) {
        peers[r] = members_find(c, c->view->members[r].id);
        stays[r] = 1;
    }
    uint32_t leave = n - s->target;
    for (uint32_t i = 0; i < s->n_remove; i++) {
        int rank = view_rank(c->view, s->remove[i]);
        if (rank < 0)
            return err_set(err, ERR_NOTFOUND, "agent %s is not a rank of the view: see `eepctl status`", s->remove[i]);
        leave -= stays[rank];
        stays[rank] = 0;
    }
    int rc = setup_slots(c, c->durable.model->logical, s->target, &slots, err);
    if (rc < 0)
        return rc;
    for (uint32_t r = n; r-- > 0 && leave;) {
        leave -= stays[r];
        stays[r] = 0;
    }
    c->durable.open.kind = OP_SCALE_DOWN;
    return setup_parties(c, peers, stays, n, n) < 0 ? err_set(err, ERR_NOMEM, "out of memory") : 0;
}

static int setup_up(struct coordinator *c, const struct scale_request *s, struct err *err)
{
    uint32_t n = c->view ? c->view->n : 0, peers[RANKS_MAX], slots = 0;
    uint8_t stays[RANKS_MAX];
    memset(stays, 1, sizeof(stays));
    if (s->n_remove)
        return err_set(err, ERR_INVALID, "agents can only be named to leave when the number of ranks goes down");
    if (s->target > RANKS_MAX)
        return err_set(err, ERR_LIMIT, "at most %u ranks are supported", RANKS_MAX);
    for (uint32_t r = 0; r < n; r++)
        peers[r] = members_find(c, c->view->members[r].id);
    uint32_t spare = members_spares(c, n == 0, peers + n, s->target - n);
    if (n + spare < s->target)
        return err_set(err, ERR_NOTFOUND,
                       "%u ranks need %u more agents with an engine%s, and %u %s spare: start more, or wait for them "
                       "with --wait-for-agents",
                       s->target, s->target - n, n ? "" : " and a checkpoint", spare, spare == 1 ? "is" : "are");
    uint32_t logical = c->durable.model ? c->durable.model->logical : c->peers[peers[0]].logical;
    uint32_t layers = c->durable.model ? c->durable.model->layers : c->peers[peers[0]].layers;
    int rc = setup_slots(c, logical, s->target, &slots, err);
    if (rc < 0)
        return rc;
    c->durable.open.kind = n ? OP_SCALE_UP : OP_START;
    if (setup_parties(c, peers, stays, s->target, n) < 0)
        return err_set(err, ERR_NOMEM, "out of memory");
    if (n)
        return 0;
    for (uint32_t i = 1; i < s->target; i++)
        if (c->peers[peers[i]].layers != layers || c->peers[peers[i]].logical != logical)
            return err_set(err, ERR_CONFLICT, "agents %s and %s would load different models, %u layers of %u experts and %u of %u; "
                           "start them with the same --checkpoint",
                           c->peers[peers[0]].member.id, c->peers[peers[i]].member.id, layers, logical,
                           c->peers[peers[i]].layers, c->peers[peers[i]].logical);
    expert_map_unref(c->op.load_map);
    c->op.load_map = NULL;
    return plan_initial(layers, logical, s->target, slots, &c->op.load_map, err);
}

static int setup_rebalance(struct coordinator *c, struct err *err)
{
    uint32_t n = c->view->n, peers[RANKS_MAX];
    uint8_t stays[RANKS_MAX];
    memset(stays, 1, sizeof(stays));
    for (uint32_t r = 0; r < n; r++)
        peers[r] = members_find(c, c->view->members[r].id);
    c->durable.open.kind = OP_REBALANCE;
    return setup_parties(c, peers, stays, n, n) < 0 ? err_set(err, ERR_NOMEM, "out of memory") : 0;
}

int setup_restore(struct coordinator *c, struct err *err)
{
    int rc = setup_members_ready(c, err);
    return rc < 0 ? rc : setup_rebalance(c, err);
}

int setup_scale(struct coordinator *c, const struct scale_request *s, struct err *err)
{
    int rc = setup_members_ready(c, err);
    if (rc < 0)
        return rc;
    if (mask_count(c))
        return err_set(err, ERR_CONFLICT, "the view serves without %llu experts (of all layers) until they have been read "
                       "again: try again later, or see `eepctl status` for what they wait for",
                       (unsigned long long)mask_count(c));
    if (s->rebalance)
        return setup_rebalance(c, err);
    return c->view && s->target < c->view->n ? setup_down(c, s, err) : setup_up(c, s, err);
}

int setup_repair(struct coordinator *c, const uint32_t *peers, uint32_t n)
{
    uint8_t stays[RANKS_MAX];
    memset(stays, 1, sizeof(stays));
    c->durable.open.kind = OP_REPAIR;
    return setup_parties(c, peers, stays, n, n);
}

/* The members of the target, with what is known of them now (an engine may have changed its endpoint). */
struct view *setup_target(struct coordinator *c)
{
    const struct op_record *r = &c->durable.open;
    int32_t from[RANKS_MAX];
    uint32_t n = 0;
    uint64_t kv = arrivals_min(&c->op.stage);
    for (uint32_t i = 0; i < r->n; i++)
        if (r->stays[i])
            from[n++] = (int32_t)i;
    struct view *view = view_new(n);
    if (!view)
        abort();
    for (uint32_t i = 0; i < n; i++) {
        view->members[i] = c->peers[c->op.peer[from[i]]].member;
        view->members[i].serving = true;
    }
    view->manifest_digest = c->durable.model->manifest_digest;
    view->kv_bytes = c->op.stage_kind == STAGE_KV && c->op.stage.n ? kv : c->view ? c->view->kv_bytes : NO_LIMIT;
    struct expert_map *over = NULL;
    if (r->kind == OP_START) {
        over = expert_map_ref(c->op.load_map);
    } else if (r->kind == OP_REPAIR) {
        for (uint32_t i = 0; i < n; i++)
            from[i] = view_rank(c->view, view->members[i].id);
        over = expert_map_ref(c->view->map);
    } else {
        over = plan_map_after(&c->op.in, c->op.plan, c->op.plan->rounds_before);
    }
    view->map = over ? expert_map_select(over, from, n) : NULL;
    expert_map_unref(over);
    if (!view->map)
        abort();
    if (r->kind == OP_REPAIR)
        plan_cover_from_dormant(view->map);
    if (c->op.reload)
        reload_apply(view->map, c->op.reload);
    return view;
}
