/* Rounds, moves and sources from a target.  Pure.
 *
 *   joining             round 0, before the commit: cover and quota; one round after it: fill
 *   leaving only        one round before the commit: cover and fill, with the leavers as sources
 *   neither             one round after (there is no commit): fill
 *
 * Sources: the same rank, the same node, another node; within that the holder that sends the least in this round,
 * moves with the fewest holders first, levelled once more when all are assigned. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner_work.h"

/* A slot that holds something, found by expert. */
struct holder {
    uint32_t party, slot;
};

/* The holders of every expert of every layer: those of (layer, e) are at[start[layer * logical + e]] up to the next
 * start, by party and slot. */
struct holders {
    size_t *start; /* [layers * logical + 1] */
    struct holder *at;
};

/* A move whose source is being chosen. */
struct pick {
    struct move *move;
    const struct holder *from; /* candidates, of the best tier only */
    struct holder *tiered;     /* owned storage of `from` */
    uint32_t n, chosen;
};

static void holders_done(struct holders *h)
{
    free(h->start);
    free(h->at);
}

static int holders_init(struct holders *ret_holders, const struct expert_map *map, const uint8_t *excluded)
{
    size_t row = (size_t)map->ranks * map->slots, cells = map->layers * row;
    size_t experts = (size_t)map->layers * map->logical;
    struct holders h = {.start = calloc(experts + 2, sizeof *h.start), .at = calloc(cells, sizeof *h.at)};
    if (!h.start || !h.at) {
        holders_done(&h);
        return ERR_NOMEM;
    }
    /* Counting sort: counts shifted by two, so that after the second walk start[i] is where i begins. */
    for (int walk = 0; walk < 2; walk++) {
        for (size_t i = 0; i < cells; i++) {
            uint32_t party = (uint32_t)(i % row / map->slots);
            if (map->held[i] < 0 || (excluded && excluded[party]))
                continue;
            size_t key = i / row * map->logical + (size_t)map->held[i];
            if (walk == 0)
                h.start[key + 2]++;
            else
                h.at[h.start[key + 1]++] = (struct holder){.party = party, .slot = (uint32_t)(i % map->slots)};
        }
        for (size_t i = 2; walk == 0 && i < experts + 2; i++)
            h.start[i] += h.start[i - 1];
    }
    *ret_holders = h;
    return 0;
}

static int source_tier(const struct plan_input *in, uint32_t src, uint32_t dst)
{
    if (src == dst)
        return 0;
    return !in->node || in->node[src] == in->node[dst] ? 1 : 2;
}

/* Candidates of the best tier, one slot a party. */
static int pick_init(struct pick *pick, const struct planner *p, const struct holders *h, struct move *move,
                     struct err *err)
{
    size_t key = (size_t)move->layer * p->logical + move->expert;
    size_t n = h->start[key + 1] - h->start[key];
    const struct holder *all = h->at + h->start[key];
    *pick = (struct pick){.move = move, .tiered = calloc(n ? n : 1, sizeof *pick->tiered)};
    if (!pick->tiered)
        return err_set(err, ERR_NOMEM, "no memory to choose sources");
    int best = 3;
    for (size_t i = 0; i < n; i++) {
        int tier = source_tier(p->in, all[i].party, move->dst);
        if (tier > best)
            continue;
        if (tier < best)
            pick->n = 0;
        best = tier;
        if (pick->n == 0 || pick->tiered[pick->n - 1].party != all[i].party)
            pick->tiered[pick->n++] = all[i];
    }
    pick->from = pick->tiered;
    if (pick->n == 0)
        return err_set(err, ERR_NOTFOUND, "expert %u of layer %u is held nowhere: it cannot be copied", move->expert,
                       move->layer);
    return 0;
}

static int pick_compare(const void *va, const void *vb)
{
    const struct pick *a = va, *b = vb;
    if (a->n != b->n)
        return a->n < b->n ? -1 : 1;
    return a->move < b->move ? -1 : a->move > b->move; /* as they were */
}

/* Fewest candidates first, each onto the least busy sender; then moves sources as long as that levels them. */
static void picks_level(struct pick *picks, size_t n, uint32_t *sent)
{
    qsort(picks, n, sizeof *picks, pick_compare);
    for (size_t i = 0; i < n; i++) {
        for (uint32_t k = 1; k < picks[i].n; k++)
            if (sent[picks[i].from[k].party] < sent[picks[i].from[picks[i].chosen].party])
                picks[i].chosen = k;
        sent[picks[i].from[picks[i].chosen].party]++;
    }
    bool changed = true;
    for (int pass = 0; pass < 16 && changed; pass++) {
        changed = false;
        for (size_t i = 0; i < n; i++) {
            for (uint32_t k = 0; k < picks[i].n; k++) {
                uint32_t to = picks[i].from[k].party, at = picks[i].from[picks[i].chosen].party;
                if (sent[to] + 1 >= sent[at])
                    continue;
                sent[to]++;
                sent[at]--;
                picks[i].chosen = k;
                changed = true;
            }
        }
    }
    for (size_t i = 0; i < n; i++) {
        picks[i].move->src = picks[i].from[picks[i].chosen].party;
        picks[i].move->src_slot = picks[i].from[picks[i].chosen].slot;
    }
}

/* Sources of the moves of one round; `map` holds what is there while it runs. */
static int round_sources(const struct planner *p, const struct expert_map *map, const uint8_t *excluded,
                         struct move *moves, size_t n, struct err *err)
{
    struct holders holders = {NULL, NULL};
    struct pick *picks = calloc(n ? n : 1, sizeof *picks);
    uint32_t *sent = calloc(p->parties, sizeof *sent);
    int rc = ERR_NOMEM;
    if (!picks || !sent || holders_init(&holders, map, excluded) < 0) {
        err_set(err, rc, "no memory to choose the sources of %zu moves", n);
        goto free_all;
    }
    rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = pick_init(&picks[i], p, &holders, &moves[i], err);
    if (rc == 0)
        picks_level(picks, n, sent);
    for (size_t i = 0; i < n; i++)
        free(picks[i].tiered);
free_all:
    holders_done(&holders);
    free(sent);
    free(picks);
    return rc;
}

static uint32_t move_round(const struct planner *p, uint8_t origin)
{
    return p->n_joining && origin == SLOT_FILL ? 1 : 0;
}

/* Moves and retires in the order round, layer, party, slot. */
static void plan_collect(const struct planner *p, struct plan *plan)
{
    const struct expert_map *now = p->in->now;
    uint32_t moves = 0, retires = 0;
    for (uint32_t round = 0; round < plan->rounds_before + plan->rounds_after; round++) {
        for (uint32_t layer = 0; layer < p->layers; layer++) {
            for (uint32_t party = 0; party < p->parties; party++) {
                for (uint32_t slot = 0; slot < p->slots; slot++) {
                    size_t at = expert_map_at(now, layer, party, slot);
                    if (p->origin[at] == SLOT_KEPT || move_round(p, p->origin[at]) != round)
                        continue;
                    plan->moves[moves++] = (struct move){.layer = layer,
                                                         .expert = (uint32_t)p->target->held[at],
                                                         .dst = party,
                                                         .dst_slot = slot,
                                                         .round = round};
                    if (now->live[at])
                        plan->retires[retires++] =
                            (struct retire){.layer = layer, .party = party, .slot = slot, .round = round};
                }
            }
        }
    }
}

/* Chooses the sources round by round: what arrived in a round can be sent on in the next. */
static int plan_sources(const struct planner *p, struct plan *plan, struct err *err)
{
    int rc = 0;
    uint32_t from = 0;
    for (uint32_t round = 0; round < plan->rounds_before + plan->rounds_after && rc == 0; round++) {
        uint32_t to = from;
        while (to < plan->n_moves && plan->moves[to].round == round)
            to++;
        struct expert_map *map = plan_map_during(p->in, plan, round);
        if (!map)
            return err_set(err, ERR_NOMEM, "no memory for the map of round %u", round);
        const uint8_t *gone = round < plan->rounds_before ? NULL : p->in->leaving;
        rc = round_sources(p, map, gone, plan->moves + from, to - from, err);
        expert_map_unref(map);
        from = to;
    }
    return rc;
}

int planner_rounds(const struct planner *p, struct plan **ret_plan, struct err *err)
{
    size_t cells = (size_t)p->layers * p->parties * p->slots;
    uint32_t count[2] = {0, 0}, retires = 0;
    for (size_t i = 0; i < cells; i++) {
        if (p->origin[i] == SLOT_KEPT)
            continue;
        count[move_round(p, p->origin[i])]++;
        retires += p->in->now->live[i];
    }
    struct plan *plan = plan_new(p->parties, count[0] + count[1], retires);
    if (!plan)
        return err_set(err, ERR_NOMEM, "no memory for a plan of %u moves", count[0] + count[1]);
    plan->target = expert_map_ref(p->target);
    plan->bound_hard = p->bound_hard;
    plan->bound_fill = p->bound_fill;
    plan->rounds_before = p->n_joining || (p->n_leaving && count[0]) ? 1 : 0;
    if (p->n_joining)
        plan->rounds_after = count[1] ? 1 : 0;
    else if (!p->n_leaving)
        plan->rounds_after = count[0] ? 1 : 0;
    plan_collect(p, plan);
    int rc = plan_sources(p, plan, err);
    if (rc < 0) {
        plan_unref(plan);
        return rc;
    }
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        bool arrives = plan->moves[i].src != plan->moves[i].dst;
        if (plan->moves[i].round < plan->rounds_before)
            plan->arrivals_before += arrives;
        else
            plan->arrivals_after += arrives;
    }
    *ret_plan = plan;
    return 0;
}
