/* Checks a plan by walking it, slot by slot, as the agents would carry it out.  Pure.
 *
 * Shares nothing with the planner: a mistake there must show here.  What is checked:
 *   shape     parties, rounds and indices in range; moves and retires sorted by round
 *   target    invariants of a map, its entries among them (also at the commit); leavers route nothing; every expert
 *             live on the ranks after the commit; no expert twice on a rank unless it is so now
 *   retire    the slot is live then, and its expert stays live elsewhere on a serving rank
 *   wake      the slot holds something and is not live
 *   move      the source holds the expert and is not written in the same round; leavers send only before the commit;
 *             the slot written belongs to a rank that stays, is not live, and is written once a round; an expert
 *             arrives at a rank once
 *   commit    every expert is live on the ranks that stay and join
 *   end       what lies in the slots of the final ranks, and what is live, is the target; the counts are right
 *   load      while nobody leaves, no layer's highest load is above that of now */
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner.h"

struct walk {
    const struct plan_input *in;
    const struct plan *plan;
    uint32_t layers, logical, parties, slots;
    size_t cells;
    bool committed;
    int32_t *held;      /* [cells] */
    uint8_t *live;      /* [cells] routed to; on a joiner: will be, from the commit on */
    uint32_t *written;  /* [cells] round + 1 in which it was last written */
    uint8_t *arrived;   /* [layers][parties][logical] */
    uint32_t *replicas; /* [layers][logical] live on serving ranks */
};

static bool walk_leaves(const struct walk *w, uint32_t party)
{
    return w->in->leaving != NULL && w->in->leaving[party] != 0;
}

static bool walk_joins(const struct walk *w, uint32_t party)
{
    return w->in->joining != NULL && w->in->joining[party] != 0;
}

static bool walk_serves(const struct walk *w, uint32_t party)
{
    return w->committed ? !walk_leaves(w, party) : !walk_joins(w, party);
}

static size_t walk_cell(const struct walk *w, uint32_t layer, uint32_t party, uint32_t slot)
{
    return ((size_t)layer * w->parties + party) * w->slots + slot;
}

static uint32_t cell_party(const struct walk *w, size_t cell)
{
    return (uint32_t)(cell / w->slots % w->parties);
}

static uint32_t *walk_replicas(const struct walk *w, size_t cell)
{
    return &w->replicas[cell / w->slots / w->parties * w->logical + (size_t)w->held[cell]];
}

static void walk_count(struct walk *w)
{
    memset(w->replicas, 0, (size_t)w->layers * w->logical * sizeof *w->replicas);
    for (size_t i = 0; i < w->cells; i++)
        if (w->live[i] && walk_serves(w, cell_party(w, i)))
            ++*walk_replicas(w, i);
}

static int walk_covered(const struct walk *w, const char *when, struct err *err)
{
    for (size_t i = 0; i < (size_t)w->layers * w->logical; i++)
        if (w->replicas[i] == 0)
            return err_set(err, ERR_INVALID, "expert %zu of layer %zu has no live replica %s", i % w->logical,
                           i / w->logical, when);
    return 0;
}

static int check_shape(const struct plan_input *in, const struct plan *plan, struct err *err)
{
    const struct expert_map *now = in->now, *target = plan->target;
    if (!target || plan->parties != now->ranks || target->ranks != now->ranks || target->layers != now->layers ||
        target->logical != now->logical || target->slots != now->slots)
        return err_set(err, ERR_INVALID, "the plan's target has not the shape of the present map");
    uint32_t rounds = plan->rounds_before + plan->rounds_after, at = 0;
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const struct move *m = &plan->moves[i];
        if (m->layer >= now->layers || m->expert >= now->logical || m->src >= now->ranks || m->dst >= now->ranks ||
            m->src_slot >= now->slots || m->dst_slot >= now->slots || m->round >= rounds)
            return err_set(err, ERR_INVALID, "move %u is out of range", i);
        if (m->round < at)
            return err_set(err, ERR_INVALID, "move %u of round %u comes after one of round %u", i, m->round, at);
        at = m->round;
    }
    at = 0;
    for (uint32_t i = 0; i < plan->n_retires; i++) {
        const struct retire *r = &plan->retires[i];
        if (r->layer >= now->layers || r->party >= now->ranks || r->slot >= now->slots || r->round > rounds)
            return err_set(err, ERR_INVALID, "retire %u is out of range", i);
        if (r->round < at)
            return err_set(err, ERR_INVALID, "retire %u of round %u comes after one of round %u", i, r->round, at);
        at = r->round;
    }
    at = 0;
    for (uint32_t i = 0; i < plan->n_wakes; i++) {
        const struct retire *r = &plan->wakes[i];
        if (r->layer >= now->layers || r->party >= now->ranks || r->slot >= now->slots || r->round > rounds)
            return err_set(err, ERR_INVALID, "wake %u is out of range", i);
        if (r->round < at)
            return err_set(err, ERR_INVALID, "wake %u of round %u comes after one of round %u", i, r->round, at);
        at = r->round;
    }
    return 0;
}

/* No expert twice on a rank of the target, unless that many copies lie there now. */
static int check_duplicates(const struct walk *w, struct err *err)
{
    uint32_t *count = calloc(2 * (size_t)w->logical, sizeof *count);
    if (!count)
        return err_set(err, ERR_NOMEM, "no memory to check a plan");
    int rc = 0;
    for (size_t row = 0; row < (size_t)w->layers * w->parties && rc == 0; row++) {
        memset(count, 0, 2 * (size_t)w->logical * sizeof *count);
        for (uint32_t slot = 0; slot < w->slots; slot++) {
            int32_t was = w->in->now->held[row * w->slots + slot], is = w->plan->target->held[row * w->slots + slot];
            if (was >= 0)
                count[was]++;
            if (is >= 0)
                count[w->logical + (uint32_t)is]++;
        }
        for (uint32_t e = 0; e < w->logical && rc == 0; e++)
            if (count[w->logical + e] > 1 && count[w->logical + e] > count[e])
                rc = err_set(err, ERR_INVALID, "the target puts %u copies of expert %u of layer %zu on party %zu",
                             count[w->logical + e], e, row / w->parties, row % w->parties);
    }
    free(count);
    return rc;
}

static int check_target(const struct walk *w, struct err *err)
{
    const struct expert_map *target = w->plan->target;
    uint8_t *serving = calloc(w->parties, 1);
    if (!serving)
        return err_set(err, ERR_NOMEM, "no memory to check a plan");
    for (uint32_t party = 0; party < w->parties; party++)
        serving[party] = !walk_leaves(w, party);
    int rc = expert_map_validate(target, serving, err);
    if (rc < 0)
        err_wrap(err, "target");
    else if (w->plan->at_commit && (rc = expert_map_validate(w->plan->at_commit, serving, err)) < 0)
        err_wrap(err, "map at the commit");
    free(serving);
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < w->cells; i++)
        if (target->live[i] && walk_leaves(w, cell_party(w, i)))
            return err_set(err, ERR_INVALID, "the target routes to party %u, which leaves", cell_party(w, i));
    return check_duplicates(w, err);
}

static int walk_wake(struct walk *w, const struct retire *r, struct err *err)
{
    size_t cell = walk_cell(w, r->layer, r->party, r->slot);
    if (!walk_serves(w, r->party) || w->live[cell] || w->held[cell] < 0)
        return err_set(err, ERR_INVALID, "round %u wakes layer %u party %u slot %u, which is not dormant", r->round,
                       r->layer, r->party, r->slot);
    w->live[cell] = 1;
    ++*walk_replicas(w, cell);
    return 0;
}

static int walk_retire(struct walk *w, const struct retire *r, struct err *err)
{
    size_t cell = walk_cell(w, r->layer, r->party, r->slot);
    if (!walk_serves(w, r->party) || !w->live[cell])
        return err_set(err, ERR_INVALID, "round %u retires layer %u party %u slot %u, which is not live", r->round,
                       r->layer, r->party, r->slot);
    if (--*walk_replicas(w, cell) == 0)
        return err_set(err, ERR_INVALID, "round %u retires the last live replica of expert %d of layer %u, on party %u",
                       r->round, w->held[cell], r->layer, r->party);
    w->live[cell] = 0;
    return 0;
}

/* The destination of a move, in the state after the round's retires. */
static int walk_write(struct walk *w, const struct move *m, struct err *err)
{
    size_t cell = walk_cell(w, m->layer, m->dst, m->dst_slot);
    if (walk_leaves(w, m->dst))
        return err_set(err, ERR_INVALID, "round %u writes to party %u, which leaves", m->round, m->dst);
    if (w->live[cell])
        return err_set(err, ERR_INVALID, "round %u writes layer %u party %u slot %u while it is live", m->round,
                       m->layer, m->dst, m->dst_slot);
    if (w->written[cell] == m->round + 1)
        return err_set(err, ERR_INVALID, "round %u writes layer %u party %u slot %u twice", m->round, m->layer, m->dst,
                       m->dst_slot);
    w->written[cell] = m->round + 1;
    if (m->src == m->dst)
        return 0;
    uint8_t *arrived = &w->arrived[((size_t)m->layer * w->parties + m->dst) * w->logical + m->expert];
    if (*arrived)
        return err_set(err, ERR_INVALID, "expert %u of layer %u arrives at party %u twice", m->expert, m->layer,
                       m->dst);
    *arrived = 1;
    return 0;
}

/* The source of a move; the destinations of the whole round are known by now. */
static int walk_read(const struct walk *w, const struct move *m, struct err *err)
{
    size_t cell = walk_cell(w, m->layer, m->src, m->src_slot);
    if (w->committed && walk_leaves(w, m->src))
        return err_set(err, ERR_INVALID, "round %u reads from party %u, which has left", m->round, m->src);
    if (w->written[cell] == m->round + 1)
        return err_set(err, ERR_INVALID, "round %u reads layer %u party %u slot %u while it is written", m->round,
                       m->layer, m->src, m->src_slot);
    if (w->held[cell] != (int32_t)m->expert)
        return err_set(err, ERR_INVALID, "round %u reads expert %u from layer %u party %u slot %u, which holds %d",
                       m->round, m->expert, m->layer, m->src, m->src_slot, w->held[cell]);
    return 0;
}

/* What the map announced at the start of a round changes: wakes first, since all of it is one flip. */
static int walk_flip(struct walk *w, uint32_t round, struct err *err)
{
    const struct plan *plan = w->plan;
    int rc = 0;
    for (uint32_t i = 0; i < plan->n_wakes && rc == 0; i++)
        if (plan->wakes[i].round == round)
            rc = walk_wake(w, &plan->wakes[i], err);
    for (uint32_t i = 0; i < plan->n_retires && rc == 0; i++)
        if (plan->retires[i].round == round)
            rc = walk_retire(w, &plan->retires[i], err);
    return rc;
}

static int walk_round(struct walk *w, uint32_t round, struct err *err)
{
    const struct plan *plan = w->plan;
    int rc = 0;
    for (uint32_t i = 0; i < plan->n_moves && rc == 0; i++)
        if (plan->moves[i].round == round)
            rc = walk_write(w, &plan->moves[i], err);
    for (uint32_t i = 0; i < plan->n_moves && rc == 0; i++)
        if (plan->moves[i].round == round)
            rc = walk_read(w, &plan->moves[i], err);
    for (uint32_t i = 0; i < plan->n_moves && rc == 0; i++) {
        const struct move *m = &plan->moves[i];
        if (m->round != round)
            continue;
        size_t cell = walk_cell(w, m->layer, m->dst, m->dst_slot);
        w->held[cell] = (int32_t)m->expert;
        w->live[cell] = !m->dormant;
    }
    return rc;
}

/* The map announced at the start of `round`, which the commit brings if it is the first one after it. */
static int walk_map(struct walk *w, uint32_t round, struct err *err)
{
    walk_count(w);
    int rc = walk_flip(w, round, err);
    if (rc == 0)
        rc = walk_covered(w, w->committed ? "after the commit" : "before the commit", err);
    return rc < 0 ? err_wrap(err, "round %u", round) : 0;
}

static int check_end(struct walk *w, struct err *err)
{
    const struct plan *plan = w->plan;
    for (size_t i = 0; i < w->cells; i++) {
        if (walk_leaves(w, cell_party(w, i)))
            continue;
        if (w->held[i] != plan->target->held[i] || w->live[i] != (plan->target->live[i] > 0))
            return err_set(err, ERR_INVALID,
                           "layer %zu party %u slot %zu ends with expert %d (live %u), the target is %d (live %u)",
                           i / w->slots / w->parties, cell_party(w, i), i % w->slots, w->held[i], w->live[i],
                           plan->target->held[i], plan->target->live[i]);
    }
    uint64_t before = 0, after = 0;
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        if (plan->moves[i].src == plan->moves[i].dst)
            continue;
        if (plan->moves[i].round < plan->rounds_before)
            before++;
        else
            after++;
    }
    if (before != plan->arrivals_before || after != plan->arrivals_after)
        return err_set(err, ERR_INVALID, "the plan says %llu + %llu arrivals and has %llu + %llu",
                       (unsigned long long)plan->arrivals_before, (unsigned long long)plan->arrivals_after,
                       (unsigned long long)before, (unsigned long long)after);
    if (before + after < plan->bound_hard || plan->bound_fill < plan->bound_hard)
        return err_set(err, ERR_INVALID, "the plan has fewer arrivals than its own hard bound, or fill < hard");
    return 0;
}

/* Where the walk begins: the present map. */
static int walk_init(struct walk *w, struct err *err)
{
    const struct expert_map *now = w->in->now;
    size_t experts = (size_t)w->layers * w->logical;
    w->held = malloc(w->cells * sizeof *w->held);
    w->live = malloc(w->cells);
    w->written = calloc(w->cells, sizeof *w->written);
    w->arrived = calloc(experts * w->parties, 1);
    w->replicas = calloc(experts, sizeof *w->replicas);
    if (!w->held || !w->live || !w->written || !w->arrived || !w->replicas)
        return err_set(err, ERR_NOMEM, "no memory to check a plan");
    memcpy(w->held, now->held, w->cells * sizeof *w->held);
    for (size_t i = 0; i < w->cells; i++)
        w->live[i] = now->live[i] > 0;
    return 0;
}

static void walk_done(struct walk *w)
{
    free(w->held);
    free(w->live);
    free(w->written);
    free(w->arrived);
    free(w->replicas);
}

static bool has_leavers(const struct walk *w)
{
    for (uint32_t party = 0; party < w->parties; party++)
        if (walk_leaves(w, party))
            return true;
    return false;
}

/* The highest load on a rank in a layer, as a map routes it; share is scratch. */
static double layer_peak(const struct walk *w, const struct expert_map *map, uint32_t layer, double *share)
{
    const double *load = w->in->load ? w->in->load + (size_t)layer * w->logical : NULL;
    size_t first = walk_cell(w, layer, 0, 0), n = (size_t)w->parties * w->slots;
    double total = 0, peak = 0, sum = 0;
    memset(share, 0, w->logical * sizeof *share);
    for (uint32_t e = 0; load && e < w->logical; e++)
        total += load[e];
    for (size_t i = first; i < first + n; i++)
        if (map->live[i])
            share[map->held[i]] += map->live[i];
    for (uint32_t e = 0; e < w->logical; e++)
        share[e] = (total > 0 ? load[e] : 1) / share[e];
    for (size_t i = first; i < first + n; i++) {
        sum = (i - first) % w->slots ? sum : 0;
        sum += map->live[i] ? share[map->held[i]] * map->live[i] : 0;
        peak = sum > peak ? sum : peak;
    }
    return peak;
}

static int check_peaks(const struct walk *w, struct err *err)
{
    double *share = calloc(w->logical, sizeof *share);
    if (!share)
        return err_set(err, ERR_NOMEM, "no memory to check a plan");
    int rc = 0;
    for (uint32_t layer = 0; layer < w->layers && rc == 0; layer++) {
        double was = layer_peak(w, w->in->now, layer, share), is = layer_peak(w, w->plan->target, layer, share);
        if (is > was * (1 + 1e-6))
            rc = err_set(err, ERR_INVALID, "the highest load of layer %u goes from %g up to %g", layer, was, is);
    }
    free(share);
    return rc;
}

int plan_validate(const struct plan_input *in, const struct plan *plan, struct err *err)
{
    int rc = check_shape(in, plan, err);
    if (rc < 0)
        return rc;
    struct walk w = {.in = in,
                     .plan = plan,
                     .layers = in->now->layers,
                     .logical = in->now->logical,
                     .parties = in->now->ranks,
                     .slots = in->now->slots,
                     .cells = (size_t)in->now->layers * in->now->ranks * in->now->slots};
    rc = check_target(&w, err);
    if (rc == 0)
        rc = walk_init(&w, err);
    uint32_t rounds = plan->rounds_before + plan->rounds_after;
    for (uint32_t round = 0; round <= rounds && rc == 0; round++) {
        if (round == plan->rounds_before) { /* what the last round before the commit brought must not be all there is */
            walk_count(&w);
            rc = walk_covered(&w, "before the commit", err);
            w.committed = true;
        }
        if (rc == 0)
            rc = walk_map(&w, round, err);
        if (rc == 0 && round < rounds)
            rc = walk_round(&w, round, err);
    }
    if (rc == 0)
        rc = check_end(&w, err);
    if (rc == 0 && !has_leavers(&w))
        rc = check_peaks(&w, err);
    walk_done(&w);
    return rc;
}
