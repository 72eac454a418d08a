/* All layers together: which round of which layer runs when, and who sends.  Pure.
 *
 * Rounds of layers that dip run beside one another while their dips together stay within the budget, a part of the sum
 * of the layers' highest loads, which is what a step takes.
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

/* Who sends less in this round, then in all of them so far. */
static bool sender_before(const uint32_t *sent, const uint32_t *total, uint32_t a, uint32_t b)
{
    return sent[a] < sent[b] || (sent[a] == sent[b] && total[a] < total[b]);
}

/* Fewest candidates first, each onto the least busy sender; then moves sources as long as that levels them. */
static void picks_level(struct pick *picks, size_t n, uint32_t *sent, uint32_t *total)
{
    qsort(picks, n, sizeof *picks, pick_compare);
    for (size_t i = 0; i < n; i++) {
        for (uint32_t k = 1; k < picks[i].n; k++)
            if (sender_before(sent, total, picks[i].from[k].party, picks[i].from[picks[i].chosen].party))
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
        total[picks[i].move->src]++;
    }
}

/* Sources of the moves of one round; `map` holds what is there while it runs. */
static int round_sources(const struct planner *p, const struct expert_map *map, const uint8_t *excluded,
                         struct move *moves, size_t n, uint32_t *total, struct err *err)
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
        picks_level(picks, n, sent, total);
    for (size_t i = 0; i < n; i++)
        free(picks[i].tiered);
free_all:
    holders_done(&holders);
    free(sent);
    free(picks);
    return rc;
}

/* ---- when ---- */

struct timetable {
    uint32_t *round; /* of planner.dips: the plan's round in which this round of a layer runs, from the phase's first */
    uint32_t n[PLAN_PHASES];
};

/* Rounds of one phase: in each, every layer whose next round still fits into the dip, at least one. */
static void phase_schedule(const struct planner *p, enum planner_phase phase, uint32_t *next, struct timetable *t)
{
    double budget = 0;
    uint32_t left = 0;
    for (uint32_t layer = 0; layer < p->layers; layer++) {
        next[layer] = 0;
        budget += p->rounds[layer].peak[phase] * p->options.dip;
        left += p->rounds[layer].n[phase];
    }
    for (uint32_t round = 0; left; round++) {
        double dip = 0;
        bool any = false;
        for (int alone = 0; alone < 2 && !any; alone++) { /* a round that dips too much by itself runs alone */
            for (uint32_t layer = 0; layer < p->layers && !(alone && any); layer++) {
                const struct layer_rounds *r = &p->rounds[layer];
                size_t at = r->first[phase] + next[layer];
                if (next[layer] == r->n[phase] || (!alone && p->dips[at] > 0 && dip + p->dips[at] > budget))
                    continue;
                dip += p->dips[at];
                t->round[at] = round;
                next[layer]++;
                left--;
                any = true;
            }
        }
        t->n[phase] = round + 1;
    }
}

/* The plan's round of a step; what ends a layer's phase comes with the map after its last round. */
static uint32_t step_round(const struct planner *p, const struct timetable *t, const struct step *step)
{
    const struct layer_rounds *r = &p->rounds[step->layer];
    uint32_t base = step->phase == PHASE_AFTER ? t->n[PHASE_BEFORE] : 0;
    if (step->round < r->n[step->phase])
        return base + t->round[r->first[step->phase] + step->round];
    if (step->phase == PHASE_BEFORE)
        return t->n[PHASE_BEFORE]; /* with the commit */
    if (r->n[step->phase] == 0)
        return base;
    return base + t->round[r->first[step->phase] + step->round - 1] + 1;
}

static int step_compare(const void *va, const void *vb)
{
    const struct step *a = va, *b = vb;
    if (a->round != b->round)
        return a->round < b->round ? -1 : 1;
    if (a->layer != b->layer)
        return a->layer < b->layer ? -1 : 1;
    if (a->party != b->party)
        return a->party < b->party ? -1 : 1;
    if (a->slot != b->slot)
        return a->slot < b->slot ? -1 : 1;
    return (int)a->kind - (int)b->kind;
}

/* What the commit mutes and the round that begins with it wakes, or the other way round, is one flip: nothing. */
static size_t steps_cancel(struct step *steps, size_t n)
{
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        const struct step *a = &steps[i], *b = a + 1;
        if (i + 1 < n && a->kind == STEP_RETIRE && b->kind == STEP_WAKE && a->round == b->round &&
            a->layer == b->layer && a->party == b->party && a->slot == b->slot)
            i++;
        else
            steps[kept++] = *a;
    }
    return kept;
}

/* Chooses the sources round by round: what arrived in a round can be sent on in the next. */
static int plan_sources(const struct planner *p, struct plan *plan, struct err *err)
{
    struct expert_map *map = expert_map_copy(p->in->now);
    uint32_t *total = calloc(p->parties, sizeof *total);
    int rc = map && total ? 0 : err_set(err, ERR_NOMEM, "no memory to choose sources");
    for (uint32_t from = 0, to; from < plan->n_moves && rc == 0; from = to) {
        uint32_t round = plan->moves[from].round;
        for (to = from; to < plan->n_moves && plan->moves[to].round == round; to++)
            map->held[expert_map_at(map, plan->moves[to].layer, plan->moves[to].dst, plan->moves[to].dst_slot)] = -1;
        rc = round_sources(p, map, round < plan->rounds_before ? NULL : p->in->leaving, plan->moves + from, to - from,
                           total, err);
        for (uint32_t i = from; i < to; i++) {
            const struct move *m = &plan->moves[i];
            map->held[expert_map_at(map, m->layer, m->dst, m->dst_slot)] = (int32_t)m->expert;
        }
    }
    expert_map_unref(map);
    free(total);
    return rc;
}

/* Steps of one kind, sorted by round, into the plan. */
static void plan_fill_in(const struct step *steps, size_t n, struct plan *plan)
{
    uint32_t moves = 0, retires = 0, wakes = 0;
    for (size_t i = 0; i < n; i++) {
        const struct step *s = &steps[i];
        if (s->kind == STEP_MOVE)
            plan->moves[moves++] = (struct move){.layer = s->layer,
                                                 .expert = s->expert,
                                                 .dst = s->party,
                                                 .dst_slot = s->slot,
                                                 .round = s->round,
                                                 .dormant = s->dormant};
        else
            (s->kind == STEP_RETIRE ? plan->retires : plan->wakes)[s->kind == STEP_RETIRE ? retires++ : wakes++] =
                (struct retire){.layer = s->layer, .party = s->party, .slot = s->slot, .round = s->round};
    }
}

static void plan_report(const struct planner *p, struct plan *plan)
{
    plan->bound_hard = p->bound_hard;
    plan->bound_fill = p->bound_fill;
    plan->bound_balance = p->bound_balance;
    plan->balance_before = p->balance_before / p->layers;
    plan->balance_at_commit = p->balance_at_commit / p->layers;
    plan->balance_after = p->balance_after / p->layers;
    plan->balance_ceiling = p->balance_ceiling / p->layers;
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        bool arrives = plan->moves[i].src != plan->moves[i].dst;
        if (plan->moves[i].round < plan->rounds_before)
            plan->arrivals_before += arrives;
        else
            plan->arrivals_after += arrives;
    }
}

static int rounds_plan(const struct planner *p, const struct timetable *t, struct plan **ret_plan, struct err *err)
{
    uint32_t count[3] = {0, 0, 0};
    for (size_t i = 0; i < p->n_steps; i++)
        p->steps[i].round = step_round(p, t, &p->steps[i]);
    if (p->n_steps)
        qsort(p->steps, p->n_steps, sizeof *p->steps, step_compare);
    size_t n = steps_cancel(p->steps, p->n_steps);
    for (size_t i = 0; i < n; i++)
        count[p->steps[i].kind]++;
    struct plan *plan = plan_new(p->parties, count[STEP_MOVE], count[STEP_RETIRE]);
    if (plan)
        plan->wakes = calloc(count[STEP_WAKE] + 1, sizeof *plan->wakes);
    if (!plan || !plan->wakes) {
        plan_unref(plan);
        return err_set(err, ERR_NOMEM, "no memory for a plan of %u moves", count[STEP_MOVE]);
    }
    plan->n_wakes = count[STEP_WAKE];
    plan->target = expert_map_ref(p->target);
    if (p->n_joining || p->n_leaving)
        plan->at_commit = expert_map_ref(p->commit);
    plan->rounds_before = t->n[PHASE_BEFORE];
    plan->rounds_after = t->n[PHASE_AFTER];
    plan_fill_in(p->steps, n, plan);
    int rc = plan_sources(p, plan, err);
    if (rc < 0) {
        plan_unref(plan);
        return rc;
    }
    plan_report(p, plan);
    *ret_plan = plan;
    return 0;
}

int planner_rounds(const struct planner *p, struct plan **ret_plan, struct err *err)
{
    struct timetable t = {.round = calloc(p->n_dips + 1, sizeof *t.round)};
    uint32_t *next = calloc(p->layers, sizeof *next);
    int rc = t.round && next ? 0 : err_set(err, ERR_NOMEM, "no memory for the rounds of %u layers", p->layers);
    for (int phase = PHASE_BEFORE; phase < PLAN_PHASES && rc == 0; phase++)
        phase_schedule(p, (enum planner_phase)phase, next, &t);
    if (rc == 0 && p->n_joining && t.n[PHASE_BEFORE] == 0)
        t.n[PHASE_BEFORE] = 1; /* joiners are asked to receive, be it nothing */
    if (rc == 0)
        rc = rounds_plan(p, &t, ret_plan, err);
    free(t.round);
    free(next);
    return rc;
}
