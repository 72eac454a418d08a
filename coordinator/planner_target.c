/* The target map, per layer: keep, cover, quota, fill.  Pure.
 *
 * keep    survivors hold on to all that they have.
 * cover   an expert that no survivor holds goes into an empty slot, else over a redundant replica: dormant ones
 *         first, then those of an expert that lies twice on the same rank, then where it costs the least balance.
 *         A kept copy is overwritten only while another kept copy of its expert remains, hence everything that is
 *         overwritten can be retired at once and one round is enough: no cycles, no staging.  There is always room:
 *         the slots that are empty or redundant are final slots - distinct kept experts >= experts lost.
 * quota   each joiner gets ceil(experts / ranks) experts before the commit.
 * fill    what is still empty gets replicas, the expert with the most load per replica first.
 *
 * An expert never gets a second slot on one rank. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner_work.h"

/* One layer while it is being planned.  A replica of e carries weight[e] / copies[e]. */
struct layer_work {
    struct planner *p;
    uint32_t layer;
    int32_t *held;      /* [parties * slots]: the target's row of this layer */
    uint8_t *origin;    /* the same shape */
    uint16_t *on;       /* [parties][logical]: slots of a final party that hold the expert */
    uint32_t *copies;   /* [logical]: over final parties */
    double *weight;     /* [logical] */
    double *heat;       /* [logical]: sum over its copies of the load of their ranks */
    double *load;       /* [parties] */
    uint32_t *empty;    /* [parties] */
    uint32_t *budget;   /* [parties]: scratch of layer_spread */
    uint8_t *exhausted; /* [logical]: scratch of layer_spread */
};

static int layer_work_init(struct layer_work *w, struct planner *p, struct err *err)
{
    size_t parties = p->parties, logical = p->logical;
    memset(w, 0, sizeof *w);
    w->p = p;
    w->on = calloc(parties * logical, sizeof *w->on);
    w->copies = calloc(logical, sizeof *w->copies);
    w->weight = calloc(logical, sizeof *w->weight);
    w->heat = calloc(logical, sizeof *w->heat);
    w->load = calloc(parties, sizeof *w->load);
    w->empty = calloc(parties, sizeof *w->empty);
    w->budget = calloc(parties, sizeof *w->budget);
    w->exhausted = calloc(logical, 1);
    if (!w->on || !w->copies || !w->weight || !w->heat || !w->load || !w->empty || !w->budget || !w->exhausted)
        return err_set(err, ERR_NOMEM, "no memory to plan %u parties of %u experts", p->parties, p->logical);
    return 0;
}

static void layer_work_done(struct layer_work *w)
{
    free(w->on);
    free(w->copies);
    free(w->weight);
    free(w->heat);
    free(w->load);
    free(w->empty);
    free(w->budget);
    free(w->exhausted);
}

static uint16_t *layer_on(const struct layer_work *w, uint32_t party, uint32_t expert)
{
    return &w->on[(size_t)party * w->p->logical + expert];
}

static void layer_load_add(struct layer_work *w, uint32_t party, double delta)
{
    const int32_t *held = w->held + (size_t)party * w->p->slots;
    w->load[party] += delta;
    for (uint32_t slot = 0; slot < w->p->slots; slot++)
        if (held[slot] >= 0)
            w->heat[held[slot]] += delta;
}

/* The share of every copy of the expert changes as its number of copies goes from `before` to `after`. */
static void layer_share_change(struct layer_work *w, uint32_t expert, uint32_t before, uint32_t after)
{
    if (before == 0 || after == 0)
        return;
    double delta = w->weight[expert] / after - w->weight[expert] / before;
    for (uint32_t party = 0; party < w->p->parties; party++) {
        uint16_t here = *layer_on(w, party, expert);
        if (here)
            layer_load_add(w, party, delta * here);
    }
}

static void layer_place(struct layer_work *w, uint32_t party, uint32_t expert, enum slot_origin origin)
{
    uint32_t slot = 0;
    while (w->held[(size_t)party * w->p->slots + slot] >= 0)
        slot++;
    layer_share_change(w, expert, w->copies[expert], w->copies[expert] + 1);
    w->held[(size_t)party * w->p->slots + slot] = (int32_t)expert;
    w->origin[(size_t)party * w->p->slots + slot] = (uint8_t)origin;
    ++*layer_on(w, party, expert);
    w->copies[expert]++;
    w->empty[party]--;
    w->heat[expert] += w->load[party];
    layer_load_add(w, party, w->weight[expert] / w->copies[expert]);
}

static void layer_remove(struct layer_work *w, uint32_t party, uint32_t slot)
{
    int32_t *held = &w->held[(size_t)party * w->p->slots + slot];
    uint32_t expert = (uint32_t)*held;
    layer_load_add(w, party, -w->weight[expert] / w->copies[expert]);
    w->heat[expert] -= w->load[party];
    *held = -1;
    --*layer_on(w, party, expert);
    w->copies[expert]--;
    w->empty[party]++;
    layer_share_change(w, expert, w->copies[expert] + 1, w->copies[expert]);
}

/* Loads of the layer; all ones when nothing is known, so that idle layers are spread evenly. */
static void layer_weights(struct layer_work *w)
{
    const double *load = w->p->in->load;
    double sum = 0;
    for (uint32_t e = 0; load && e < w->p->logical; e++)
        sum += load[(size_t)w->layer * w->p->logical + e];
    for (uint32_t e = 0; e < w->p->logical; e++)
        w->weight[e] = sum > 0 ? load[(size_t)w->layer * w->p->logical + e] : 1;
}

/* Final parties keep what they hold; the rows of leavers are empty in the target. */
static void layer_keep(struct layer_work *w)
{
    struct planner *p = w->p;
    const struct expert_map *now = p->in->now;
    memset(w->on, 0, (size_t)p->parties * p->logical * sizeof *w->on);
    memset(w->copies, 0, p->logical * sizeof *w->copies);
    memset(w->heat, 0, p->logical * sizeof *w->heat);
    memset(w->load, 0, p->parties * sizeof *w->load);
    memset(w->empty, 0, p->parties * sizeof *w->empty);
    for (uint32_t party = 0; party < p->parties; party++) {
        for (uint32_t slot = 0; slot < p->slots && p->final[party]; slot++) {
            int32_t e = now->held[expert_map_at(now, w->layer, party, slot)];
            w->held[(size_t)party * p->slots + slot] = e;
            if (e < 0) {
                w->empty[party]++;
                continue;
            }
            ++*layer_on(w, party, (uint32_t)e);
            w->copies[e]++;
        }
    }
    for (uint32_t party = 0; party < p->parties; party++) {
        const int32_t *held = w->held + (size_t)party * p->slots;
        for (uint32_t slot = 0; slot < p->slots; slot++)
            if (held[slot] >= 0)
                w->load[party] += w->weight[held[slot]] / w->copies[held[slot]];
        for (uint32_t slot = 0; slot < p->slots; slot++)
            if (held[slot] >= 0)
                w->heat[held[slot]] += w->load[party];
    }
}

static void layer_bounds(const struct layer_work *w)
{
    struct planner *p = w->p;
    uint64_t hard = 0, fill = 0;
    for (uint32_t e = 0; e < p->logical; e++)
        hard += w->copies[e] == 0;
    for (uint32_t party = 0; party < p->parties; party++) {
        if (!p->final[party])
            continue;
        uint32_t missing = 0; /* experts that are not on this rank */
        for (uint32_t e = 0; e < p->logical; e++)
            missing += *layer_on(w, party, e) == 0;
        fill += missing < w->empty[party] ? missing : w->empty[party];
    }
    p->bound_hard += hard;
    p->bound_fill += hard > fill ? hard : fill;
}

/* Of the parties with room (budget), one without the expert: the least loaded, then the emptiest.  -1: none. */
static int64_t layer_best_party(const struct layer_work *w, const uint32_t *room, uint32_t expert)
{
    int64_t best = -1;
    for (uint32_t party = 0; party < w->p->parties; party++) {
        if (room[party] == 0 || !w->p->final[party] || *layer_on(w, party, expert))
            continue;
        if (best < 0 || w->load[party] < w->load[best] ||
            (!(w->load[party] > w->load[best]) && w->empty[party] > w->empty[best]))
            best = party;
    }
    return best;
}

struct victim {
    uint32_t party, slot;
    bool found, live, twice;
    double left, share; /* load of its rank without it; share of the remaining copies */
};

static bool victim_better(const struct victim *a, const struct victim *b)
{
    if (!b->found || a->live != b->live)
        return !b->found || !a->live;
    if (a->twice != b->twice)
        return a->twice;
    if (a->left < b->left || a->left > b->left)
        return a->left < b->left;
    return a->share < b->share;
}

/* The redundant kept replica that is missed the least. */
static struct victim layer_victim(const struct layer_work *w)
{
    struct planner *p = w->p;
    struct victim best = {.found = false};
    for (uint32_t party = 0; party < p->parties; party++) {
        for (uint32_t slot = 0; slot < p->slots && p->final[party]; slot++) {
            size_t at = (size_t)party * p->slots + slot;
            int32_t e = w->held[at];
            if (e < 0 || w->origin[at] != SLOT_KEPT || w->copies[e] < 2)
                continue;
            struct victim v = {.party = party,
                               .slot = slot,
                               .found = true,
                               .live = p->in->now->live[expert_map_at(p->in->now, w->layer, party, slot)],
                               .twice = *layer_on(w, party, (uint32_t)e) > 1,
                               .left = w->load[party] - w->weight[e] / w->copies[e],
                               .share = w->weight[e] / (w->copies[e] - 1)};
            if (victim_better(&v, &best))
                best = v;
        }
    }
    return best;
}

/* Experts without a copy on the final parties, heaviest first. */
static int layer_cover(struct layer_work *w, struct err *err)
{
    struct planner *p = w->p;
    for (;;) {
        int64_t lost = -1;
        for (uint32_t e = 0; e < p->logical; e++)
            if (w->copies[e] == 0 && (lost < 0 || w->weight[e] > w->weight[lost]))
                lost = e;
        if (lost < 0)
            return 0;
        int64_t party = layer_best_party(w, w->empty, (uint32_t)lost);
        if (party < 0) {
            struct victim v = layer_victim(w);
            if (!v.found) /* plan_make has compared capacity and experts */
                return err_set(err, ERR_LIMIT, "no slot is left for expert %d of layer %u", (int)lost, w->layer);
            layer_remove(w, v.party, v.slot);
            party = v.party;
        }
        layer_place(w, (uint32_t)party, (uint32_t)lost, SLOT_COVER);
    }
}

/* Is one more replica of a worth more than one of b?  Most load per replica, then fewest replicas, then the one whose
 * ranks are the busiest. */
static bool layer_hotter(const struct layer_work *w, uint32_t a, uint32_t b)
{
    double share_a = w->weight[a] / w->copies[a], share_b = w->weight[b] / w->copies[b];
    if (share_a < share_b || share_a > share_b)
        return share_a > share_b;
    if (w->copies[a] != w->copies[b])
        return w->copies[a] < w->copies[b];
    return w->heat[a] / w->copies[a] > w->heat[b] / w->copies[b];
}

/* Spends w->budget[party] slots on replicas.  An expert that lies on all parties with budget stays exhausted:
 * budgets only shrink. */
static void layer_spread(struct layer_work *w, enum slot_origin origin)
{
    memset(w->exhausted, 0, w->p->logical);
    for (;;) {
        int64_t hottest = -1;
        for (uint32_t e = 0; e < w->p->logical; e++)
            if (!w->exhausted[e] && (hottest < 0 || layer_hotter(w, e, (uint32_t)hottest)))
                hottest = e;
        if (hottest < 0)
            return;
        int64_t party = layer_best_party(w, w->budget, (uint32_t)hottest);
        if (party < 0) {
            w->exhausted[hottest] = 1;
            continue;
        }
        layer_place(w, (uint32_t)party, (uint32_t)hottest, origin);
        w->budget[party]--;
    }
}

static void layer_quota(struct layer_work *w)
{
    struct planner *p = w->p;
    uint32_t quota = (p->logical + p->n_final - 1) / p->n_final;
    if (quota > p->slots)
        quota = p->slots;
    for (uint32_t party = 0; party < p->parties; party++) {
        uint32_t used = p->slots - w->empty[party];
        w->budget[party] = planner_joins(p->in, party) && quota > used ? quota - used : 0;
    }
    layer_spread(w, SLOT_QUOTA);
}

static void layer_fill(struct layer_work *w)
{
    memcpy(w->budget, w->empty, w->p->parties * sizeof *w->budget);
    layer_spread(w, SLOT_FILL);
}

int planner_target(struct planner *p, struct err *err)
{
    struct layer_work w;
    int rc = layer_work_init(&w, p, err);
    for (uint32_t layer = 0; layer < p->layers && rc == 0; layer++) {
        size_t row = (size_t)layer * p->parties * p->slots;
        w.layer = layer;
        w.held = p->target->held + row;
        w.origin = p->origin + row;
        layer_weights(&w);
        layer_keep(&w);
        layer_bounds(&w);
        rc = layer_cover(&w, err);
        if (rc < 0)
            break;
        if (p->n_joining)
            layer_quota(&w);
        layer_fill(&w);
    }
    layer_work_done(&w);
    if (rc < 0)
        return rc;
    size_t cells = (size_t)p->layers * p->parties * p->slots;
    for (size_t i = 0; i < cells; i++)
        p->target->live[i] = p->target->held[i] >= 0;
    return 0;
}
