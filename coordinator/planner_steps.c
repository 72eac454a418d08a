/* The order in which a layer's slots are written: hitless, in rounds of its own.  Pure.
 *
 * A round retires what it will overwrite, where the expert has another live replica on a serving rank; it writes every
 * slot that is then not live; and what it wrote is routed to when the next round begins.  A written slot is final, so
 * every round makes progress, unless all that is left are unique experts that wait for one another's slots.  Then a
 * slot that is empty, dormant or redundant is borrowed for one of them: its copy there is routed to until the circle
 * has closed, and stays dormant, or gives the slot back to what is to be routed to there. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner_work.h"

/* A layer in one phase. */
struct order {
    struct planner *p;
    enum planner_phase phase;
    uint32_t layer, round;
    int32_t *held, *goal; /* [parties * slots] */
    uint8_t *live, *goal_live;
    uint8_t *serving;   /* [parties] in this phase */
    uint8_t *pending;   /* [parties * slots] */
    int32_t *back;      /* [parties * slots]: what a borrowed slot goes back to, or -1 */
    uint8_t *back_live; /* [parties * slots]: and with how many entries */
    uint8_t *filled;    /* [parties * slots]: written before */
    uint8_t *uneven;    /* [logical]: some replica has more than one entry */
    uint8_t *mute;      /* [parties * slots]: borrowed, to be dormant when the phase ends */
    uint16_t *replicas; /* [logical]: live, on serving ranks */
    uint32_t n_pending, borrowed;
};

static void order_step(struct order *o, enum step_kind kind, size_t cell)
{
    struct planner *p = o->p;
    if (p->n_steps == p->cap_steps) {
        size_t cap = p->cap_steps ? 2 * p->cap_steps : 1024;
        struct step *steps = realloc(p->steps, cap * sizeof *steps);
        if (!steps) {
            p->place.broken = true;
            return;
        }
        p->steps = steps;
        p->cap_steps = cap;
    }
    struct step *step = &p->steps[p->n_steps++];
    *step = (struct step){.kind = kind,
                          .phase = o->phase,
                          .layer = o->layer,
                          .party = (uint32_t)(cell / p->slots),
                          .slot = (uint32_t)(cell % p->slots),
                          .round = o->round};
    if (kind == STEP_MOVE) {
        step->expert = (uint32_t)o->goal[cell];
        step->dormant = !o->goal_live[cell] && !o->mute[cell];
    }
}

static void order_dip(struct order *o, double dip)
{
    struct planner *p = o->p;
    if (p->n_dips == p->cap_dips) {
        size_t cap = p->cap_dips ? 2 * p->cap_dips : 256;
        double *dips = realloc(p->dips, cap * sizeof *dips);
        if (!dips) {
            p->place.broken = true;
            return;
        }
        p->dips = dips;
        p->cap_dips = cap;
    }
    p->dips[p->n_dips++] = dip;
}

static bool order_serves(const struct order *o, size_t cell)
{
    return o->serving[cell / o->p->slots];
}

/* An expert whose replicas change has one entry for each until the phase ends, as in plan_map_after. */
static void order_live(struct order *o, size_t cell, bool live)
{
    int32_t expert = o->held[cell];
    if (order_serves(o, cell))
        o->replicas[expert] = (uint16_t)(o->replicas[expert] + (live ? 1 : -1));
    o->live[cell] = live;
    if (!o->uneven[expert])
        return;
    for (size_t i = 0; i < (size_t)o->p->parties * o->p->slots; i++)
        if (o->live[i] && o->held[i] == expert)
            o->live[i] = 1;
    o->uneven[expert] = 0;
}

static void order_retire(struct order *o, size_t cell)
{
    order_step(o, STEP_RETIRE, cell);
    order_live(o, cell, false);
}

static void order_wake(struct order *o, size_t cell)
{
    order_step(o, STEP_WAKE, cell);
    order_live(o, cell, true);
}

/* Writes what is pending and not live; joiners alone, or everybody.  Returns how many. */
static uint32_t order_write(struct order *o, bool joiners)
{
    struct planner *p = o->p;
    uint32_t n = 0;
    for (size_t cell = 0; o->n_pending && cell < (size_t)p->parties * p->slots; cell++) {
        if (!o->pending[cell] || o->live[cell] || (joiners && !planner_joins(p->in, (uint32_t)(cell / p->slots))))
            continue;
        order_step(o, STEP_MOVE, cell);
        o->pending[cell] = 2; /* written in this round: routed to when it is over */
        n++;
    }
    return n;
}

static void order_activate(struct order *o)
{
    for (size_t cell = 0; cell < (size_t)o->p->parties * o->p->slots; cell++) {
        if (o->pending[cell] != 2)
            continue;
        o->pending[cell] = 0;
        o->n_pending--;
        o->held[cell] = o->goal[cell];
        o->filled[cell] = 1;
        if (o->goal_live[cell] || o->mute[cell])
            order_live(o, cell, true);
    }
    o->round++;
}

/* Retires what is to be overwritten, the lightest replicas first: they are missed the least. */
static void order_retires(struct order *o)
{
    const struct planner *p = o->p;
    for (;;) {
        size_t best = SIZE_MAX;
        double least = INFINITY;
        for (size_t cell = 0; cell < (size_t)p->parties * p->slots; cell++) {
            if (!o->pending[cell] || !o->live[cell] || o->replicas[o->held[cell]] < 2)
                continue;
            double share = p->weight[o->held[cell]] / o->replicas[o->held[cell]];
            if (share < least) {
                least = share;
                best = cell;
            }
        }
        if (best == SIZE_MAX)
            return;
        order_retire(o, best);
    }
}

/* A unique expert that is to be overwritten, and has a dormant copy that is to be routed to: now.  The others wake with
 * the flip that mutes their like, or one would be out of balance for a while. */
static void order_wakes(struct order *o)
{
    size_t cells = (size_t)o->p->parties * o->p->slots;
    for (size_t cell = 0; cell < cells; cell++) {
        if (!o->pending[cell] || !o->live[cell] || o->replicas[o->held[cell]] > 1)
            continue;
        for (size_t i = 0; i < cells; i++)
            if (o->held[i] == o->held[cell] && !o->pending[i] && !o->live[i] && o->goal_live[i] && order_serves(o, i))
                order_wake(o, i);
    }
}

/* Also in the end: nothing arrives at a rank twice. */
static bool holds(const struct order *o, uint32_t party, int32_t expert)
{
    const struct planner *p = o->p;
    const int32_t *target = p->target->held + (size_t)o->layer * p->parties * p->slots;
    for (size_t i = (size_t)party * p->slots; i < (size_t)(party + 1) * p->slots; i++)
        if (o->held[i] == expert || o->goal[i] == expert || target[i] == expert)
            return true;
    return false;
}

/* A slot to borrow for an expert: empty, then dormant, then redundant. */
static size_t borrow_slot(const struct order *o, int32_t expert)
{
    const struct planner *p = o->p;
    size_t best = SIZE_MAX;
    int best_rate = 0;
    for (size_t cell = 0; cell < (size_t)p->parties * p->slots; cell++) {
        uint32_t party = (uint32_t)(cell / p->slots);
        if (o->pending[cell] || !p->final[party] || !o->serving[party] || o->mute[cell])
            continue;
        if (o->filled[cell] && o->goal_live[cell])
            continue; /* it would have to arrive a second time */
        int rate = o->held[cell] < 0                                 ? 3
                   : !o->live[cell] && !o->goal_live[cell]           ? 2
                   : o->live[cell] && o->replicas[o->held[cell]] > 1 ? 1
                                                                     : 0;
        if (rate > best_rate && !holds(o, party, expert)) {
            best = cell;
            best_rate = rate;
        }
    }
    return best;
}

/* A slot that the target leaves as the commit does keeps what was borrowed. */
static void order_keep(struct order *o, size_t slot, int32_t expert)
{
    size_t at = (size_t)o->layer * o->p->parties * o->p->slots + slot;
    struct expert_map *target = o->p->target;
    if (o->phase == PHASE_BEFORE && !target->live[at] && target->held[at] == o->goal[slot])
        target->held[at] = expert;
}

/* Slots that were borrowed from what is to be routed to there: it comes back. */
static void order_give_back(struct order *o)
{
    for (size_t cell = 0; o->n_pending == 0 && cell < (size_t)o->p->parties * o->p->slots; cell++) {
        if (o->back[cell] < 0)
            continue;
        o->goal[cell] = o->back[cell];
        o->goal_live[cell] = o->back_live[cell];
        o->back[cell] = -1;
        o->mute[cell] = 0;
        o->pending[cell] = 1;
        o->n_pending = 1; /* one after the other: each is a round that surely has an order */
    }
}

/* All that is pending is unique.  Gives one of these experts a second home, so that its slot can be written. */
static bool order_borrow(struct order *o)
{
    /* What waits for a joiner to serve would hold the slot until the commit; and a borrow ends a circle, or there is
     * none. */
    if ((o->phase == PHASE_BEFORE && o->p->n_joining) || o->borrowed++ > o->p->logical)
        return false;
    for (size_t cell = 0; cell < (size_t)o->p->parties * o->p->slots; cell++) {
        if (!o->pending[cell])
            continue;
        size_t slot = borrow_slot(o, o->held[cell]);
        if (slot == SIZE_MAX)
            continue;
        if (o->live[slot])
            order_retire(o, slot);
        if (o->goal_live[slot])
            o->back[slot] = o->goal[slot];
        o->back_live[slot] = o->goal_live[slot];
        order_keep(o, slot, o->held[cell]);
        o->goal[slot] = o->held[cell];
        o->goal_live[slot] = 0;
        o->mute[slot] = 1;
        o->pending[slot] = 1;
        o->n_pending++;
        return true;
    }
    return false;
}

static double order_peak(const struct order *o)
{
    return planner_peak(o->p, o->held, o->live, o->serving, NULL);
}

/* What the dips of the phase are measured against: the highest load when it begins, or, where that is more because
 * ranks leave, the one that the commit brings.  What every step is about to take anyway is no dip. */
static double order_base(const struct order *o)
{
    double peak = order_peak(o);
    if (o->phase == PHASE_BEFORE && o->p->n_leaving)
        peak = fmax(peak, planner_peak(o->p, o->goal, o->goal_live, o->p->final, NULL));
    return peak;
}

static int order_rounds(struct order *o, struct err *err)
{
    struct layer_rounds *rounds = &o->p->rounds[o->layer];
    bool joins = o->phase == PHASE_BEFORE && o->p->n_joining;
    rounds->first[o->phase] = o->p->n_dips;
    rounds->peak[o->phase] = order_base(o);
    if (joins && order_write(o, true)) {
        order_dip(o, 0);
        order_activate(o);
    } else if (joins && o->n_pending) { /* the first round is for joiners alone */
        order_dip(o, 0);
        o->round++;
    }
    while (o->n_pending && !o->p->place.broken) {
        order_wakes(o);
        order_retires(o);
        double dip = fmax(order_peak(o) - rounds->peak[o->phase], 0);
        if (!order_write(o, false)) {
            if (!order_borrow(o))
                return err_set(err, ERR_CONFLICT, "layer %u: the moves have no order", o->layer);
            dip = fmax(order_peak(o) - rounds->peak[o->phase], 0);
            order_write(o, false);
        }
        order_dip(o, dip);
        order_activate(o);
        order_give_back(o);
    }
    rounds->n[o->phase] = o->round;
    return 0;
}

/* What the phase leaves live or dormant beyond what it wrote. */
static void order_end(struct order *o)
{
    for (size_t cell = 0; cell < (size_t)o->p->parties * o->p->slots; cell++) {
        if (!o->p->final[cell / o->p->slots])
            continue;
        if (o->live[cell] && !o->goal_live[cell])
            order_retire(o, cell);
        else if (!o->live[cell] && o->goal_live[cell])
            order_wake(o, cell);
        o->mute[cell] = 0;
    }
    for (size_t cell = 0; cell < (size_t)o->p->parties * o->p->slots; cell++)
        if (o->p->final[cell / o->p->slots])
            o->live[cell] = o->goal_live[cell];
}

static int order_init(struct order *o, struct planner *p, uint32_t layer)
{
    size_t cells = (size_t)p->parties * p->slots;
    *o = (struct order){.p = p, .layer = layer};
    o->held = malloc(cells * sizeof *o->held);
    o->live = malloc(cells);
    o->serving = malloc(p->parties);
    o->pending = calloc(cells, 1);
    o->mute = calloc(cells, 1);
    o->filled = calloc(cells, 1);
    o->back = malloc(cells * sizeof *o->back);
    for (size_t i = 0; o->back && i < cells; i++)
        o->back[i] = -1;
    o->replicas = calloc(p->logical, sizeof *o->replicas);
    o->uneven = calloc(p->logical, 1);
    o->back_live = calloc(cells, 1);
    bool all = o->held && o->live && o->serving && o->pending && o->mute && o->filled && o->back && o->replicas;
    return all && o->uneven && o->back_live ? 0 : ERR_NOMEM;
}

static void order_done(struct order *o)
{
    free(o->held);
    free(o->live);
    free(o->serving);
    free(o->pending);
    free(o->mute);
    free(o->filled);
    free(o->back);
    free(o->replicas);
    free(o->uneven);
    free(o->back_live);
}

static void order_phase(struct order *o, enum planner_phase phase, struct expert_map *goal)
{
    const struct planner *p = o->p;
    size_t cells = (size_t)p->parties * p->slots;
    o->phase = phase;
    o->round = 0;
    o->goal = goal->held + o->layer * cells;
    o->goal_live = goal->live + o->layer * cells;
    memset(o->replicas, 0, p->logical * sizeof *o->replicas);
    memset(o->uneven, 0, p->logical);
    for (uint32_t party = 0; party < p->parties; party++)
        o->serving[party] = phase == PHASE_BEFORE ? !planner_joins(p->in, party) : p->final[party];
    for (size_t i = 0; i < cells; i++) {
        o->pending[i] = p->final[i / p->slots] && o->goal[i] >= 0 && o->goal[i] != o->held[i];
        o->n_pending += o->pending[i];
        if (o->live[i] && order_serves(o, i))
            o->replicas[o->held[i]]++;
        if (o->live[i] > 1)
            o->uneven[o->held[i]] = 1;
    }
}

int planner_steps(struct planner *p, uint32_t layer, struct err *err)
{
    size_t cells = (size_t)p->parties * p->slots, n_steps = p->n_steps, n_dips = p->n_dips;
    struct order o;
    int rc = order_init(&o, p, layer);
    if (rc < 0) {
        order_done(&o);
        return err_set(err, rc, "no memory to order the moves of %u parties", p->parties);
    }
    memcpy(o.held, p->in->now->held + layer * cells, cells * sizeof *o.held);
    memcpy(o.live, p->in->now->live + layer * cells, cells);
    bool commits = p->n_joining || p->n_leaving;
    if (!commits) /* one phase: all of it after */
        memset(&p->rounds[layer], 0, sizeof p->rounds[layer]);
    if (commits) {
        order_phase(&o, PHASE_BEFORE, p->commit);
        rc = order_rounds(&o, err);
        if (rc == 0)
            order_end(&o);
    }
    if (rc == 0) {
        order_phase(&o, PHASE_AFTER, p->target);
        rc = order_rounds(&o, err);
    }
    if (rc == 0)
        order_end(&o);
    if (rc < 0) {
        p->n_steps = n_steps;
        p->n_dips = n_dips;
    }
    order_done(&o);
    return rc;
}
