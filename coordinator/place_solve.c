/* Bounds, several starts, and the fill.  Pure. */
#include "coordinator/place_solve.h"

#include "coordinator/place_joint.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The first is for everybody, the others while there is work left or the goal is not reached. */
static const struct place_style styles[] = {
    {.hot = 2, .cold = 4, .piece = 0.5, .leave = 0.9, .polish = true},
    {.hot = 2, .cold = 4, .piece = 0.5, .leave = 0.9, .polish = false},
    {.hot = 2, .cold = 4, .piece = 0.5, .leave = 0.9, .polish = true, .wide = true},
    {.hot = 2, .cold = 4, .piece = 0.5, .leave = 0.9, .polish = true, .wide = true, .swap = true},
    {.hot = 1, .cold = 8, .piece = 0.6, .leave = 0.9, .polish = true, .wide = true},
    {.hot = 4, .cold = 8, .piece = 1.0, .leave = 0.9, .polish = true, .wide = true, .swap = true},
    {.hot = 4, .cold = 8, .piece = 1.0, .leave = 0.9, .polish = false},
    {.hot = 1, .cold = 1, .piece = 0.8, .leave = 0.95, .polish = true, .wide = true},
};
#define STYLES (sizeof styles / sizeof styles[0])

/* ---- bounds ---- */

static int compare_descending(const void *va, const void *vb)
{
    double a = *(const double *)va, b = *(const double *)vb;
    return a > b ? -1 : a < b;
}

/* Without a spare slot: the load of the rank that has the heaviest expert, at best. */
static double heaviest_with_coldest(const struct place *p)
{
    double *sorted = malloc(p->experts * sizeof *sorted);
    if (!sorted)
        return 0;
    memcpy(sorted, p->weight, p->experts * sizeof *sorted);
    qsort(sorted, p->experts, sizeof *sorted, compare_descending);
    double sum = sorted[0];
    for (uint32_t i = 1; i < p->slots; i++)
        sum += sorted[p->experts - i];
    free(sorted);
    return sum;
}

double place_ceiling(const struct place *p)
{
    uint64_t spare = (uint64_t)p->ranks * p->slots;
    if (p->total <= 0 || spare < p->experts)
        return 1;
    spare -= p->experts;
    /* Only an expert with more than the mean matters; the spare slots go where a replica is the largest. */
    double worst = p->mean;
    uint16_t *count = NULL;
    for (uint32_t e = 0; e < p->experts && !count; e++)
        if (p->weight[e] > p->mean)
            count = calloc(p->experts, sizeof *count);
    for (; count;) {
        uint32_t top = 0;
        double share = 0;
        for (uint32_t e = 0; e < p->experts; e++) {
            if (p->weight[e] <= p->mean || p->weight[e] / (count[e] + 1) <= share)
                continue;
            share = p->weight[e] / (count[e] + 1);
            top = e;
        }
        worst = fmax(p->mean, share);
        if (share <= p->mean || spare == 0 || count[top] + 1u == p->ranks)
            break;
        spare--;
        count[top]++;
    }
    free(count);
    if ((uint64_t)p->ranks * p->slots == p->experts)
        worst = fmax(worst, heaviest_with_coldest(p));
    return p->mean / worst;
}

uint32_t place_bound_balance(const struct place *p, uint32_t survivors, double balance)
{
    double limit = p->mean / balance, excess = p->total - survivors * limit;
    if (excess <= 0 || p->total <= 0)
        return 0;
    double *sorted = malloc(p->experts * sizeof *sorted);
    if (!sorted)
        return 0;
    memcpy(sorted, p->weight, p->experts * sizeof *sorted);
    qsort(sorted, p->experts, sizeof *sorted, compare_descending);
    uint32_t pieces = 0;
    for (uint32_t e = 0; e < p->experts && excess > 1e-12 * p->total; e++) {
        for (double left = sorted[e]; left > 0 && excess > 1e-12 * p->total; left -= limit, pieces++)
            excess -= fmin(left, limit);
    }
    free(sorted);
    return pieces;
}

/* ---- starts ---- */

struct solution {
    struct place_step *step; /* from the common start */
    size_t n, cap;
    uint32_t arrivals;
    double max;
    bool set;
};

static bool solution_keep(struct solution *s, struct place *p, size_t start, double max)
{
    size_t n = p->n_log - start;
    if (n > s->cap) {
        struct place_step *step = realloc(s->step, n * sizeof *step);
        if (!step) {
            p->broken = true;
            return false;
        }
        s->step = step;
        s->cap = n;
    }
    if (n)
        memcpy(s->step, p->log + start, n * sizeof *s->step);
    s->n = n;
    s->arrivals = p->arrivals;
    s->max = max;
    s->set = true;
    return true;
}

static void solution_restore(const struct solution *s, struct place *p, size_t start)
{
    place_rewind(p, start);
    for (size_t i = 0; i < s->n; i++) {
        if (s->step[i].added)
            place_add(p, s->step[i].rank, s->step[i].expert);
        else
            place_remove(p, s->step[i].rank, s->step[i].expert);
    }
}

/* What an arrival buys is worth lambda; beyond the limit balance is worth nothing. */
static double worth(const struct place *p, double max, uint32_t arrivals, double limit, double lambda)
{
    return (max > 0 ? p->mean / fmax(max, limit) : 1) - lambda * arrivals;
}

/* Within the limit with fewer arrivals, then the lower maximum; with lambda, what is worth more. */
static bool solution_beaten(const struct solution *s, const struct place *p, double max, double limit, double lambda)
{
    if (s->set && lambda > 0)
        return worth(p, max, p->arrivals, limit, lambda) > worth(p, s->max, s->arrivals, limit, lambda);
    if (!s->set || (max <= limit) != (s->max <= limit))
        return !s->set || max <= limit;
    if (max <= limit && p->arrivals != s->arrivals)
        return p->arrivals < s->arrivals;
    return max < s->max * (1 - 1e-9);
}

static double goal_limit(const struct place *p, const struct place_goal *goal)
{
    double limit = fmax(p->mean / goal->balance, p->mean / place_ceiling(p) * 1.005);
    return fmin(limit, fmax(goal->peak_max, p->mean * 1.0001));
}

void place_solve(struct place *p, const struct place_goal *goal)
{
    double limit = goal_limit(p, goal);
    uint64_t begun = p->work;
    size_t start = p->n_log;
    struct solution best = {0};
    for (size_t i = 0; i < STYLES; i++) {
        place_rewind(p, start);
        place_cover(p);
        uint32_t room = UINT32_MAX - p->arrivals, more = goal->arrivals_max < room ? goal->arrivals_max : room;
        p->swap = p->wide = false;
        place_polish(p, limit);
        uint32_t least = p->arrivals;
        double at_first = place_max(p), max = place_shift(p, &styles[i], limit, p->arrivals + more, goal->lambda);
        p->tried = at_first;
        if (place_max(p) <= limit) {
            place_prune(p, limit);
            max = place_max(p);
        }
        if (solution_beaten(&best, p, max, limit, goal->lambda) && !solution_keep(&best, p, start, max))
            break;
        if (best.max <= limit && best.arrivals <= least)
            break; /* for nothing */
        if (p->broken || p->work - begun > (best.max <= limit ? 1 : 32) * goal->work)
            break;
    }
    if (!p->broken)
        solution_restore(&best, p, start);
    p->tried = 0;
    p->swap = true;
    size_t mark = p->n_log;
    bool shared = place_max(p) > limit && best.max <= limit;
    place_polish(p, p->mean * 1.0005); /* what is free is taken beyond the goal as well */
    if (shared && place_peak(p, limit) > limit)
        place_rewind(p, mark); /* it has taken from the uneven shares what they need */
    free(best.step);
}

/* ---- fill ---- */

/* Neither the maximum nor phi: a high power of the loads, in turn with the maximum while that gains. */
static void settle_joint(struct place *p, const struct place_style *by_max, double limit)
{
    const struct place_joint goal = {
        .samples = 1, .weight = p->weight, .balance = 0.9995, .peak_max = INFINITY, .held_only = true};
    double was;
    int turns = 0;
    do {
        was = place_max(p);
        place_joint(p, &goal);
        place_shift(p, by_max, limit, UINT32_MAX, 0);
    } while (++turns < 3 && place_max(p) < was * (1 - 1e-4));
}

/* Without more arrivals than into empty slots: by phi, which can cross what the maximum cannot, and by the maximum.
 * What is to arrive may still become something else. */
static void place_settle(struct place *p, bool thorough)
{
    static const struct place_style by_max = {
        .hot = 4, .cold = 8, .piece = 1, .polish = true, .wide = true, .swap = true};
    static const struct place_style by_phi = {.hot = 4, .cold = 8, .piece = 1};
    double node = p->cost[TIER_NODE], cross = p->cost[TIER_CROSS], crowd = p->crowd, limit = p->mean * 1.0005;
    p->fills = true;
    p->crowd = PLACE_NEVER;
    p->cost[TIER_NODE] = p->cost[TIER_CROSS] = PLACE_NEVER;
    place_shift(p, &by_max, limit, UINT32_MAX, 0);
    place_shift(p, &by_phi, limit, UINT32_MAX, 0);
    place_shift(p, &by_max, limit, UINT32_MAX, 0);
    if (thorough)
        settle_joint(p, &by_max, limit);
    p->cost[TIER_NODE] = node;
    p->cost[TIER_CROSS] = cross;
    p->crowd = crowd;
    p->fills = false;
}

/* What has arrived is held from now on. */
static void fill_hold(struct place *p)
{
    for (uint32_t r = 0; r < p->ranks; r++)
        for (uint32_t i = 0; i < p->items[r]; i++)
            place_hold(p, r, p->item[(size_t)r * p->slots + i]);
}

static uint32_t fill_room(const struct place *p)
{
    int32_t room = 0;
    for (uint32_t r = 0; r < p->ranks; r++)
        room += p->room[r] > 0 ? p->room[r] : 0;
    return (uint32_t)room;
}

static uint16_t *fill_holders(const struct place *p)
{
    uint16_t *holders = calloc(p->experts, sizeof *holders);
    for (uint32_t r = 0; holders && r < p->ranks; r++) {
        const uint16_t *item = p->item + (size_t)r * p->slots, *kept = p->kept + (size_t)r * p->slots;
        for (uint32_t i = 0; i < p->n_kept[r]; i++)
            holders[kept[i]]++;
        for (uint32_t i = 0; i < p->items[r]; i++)
            holders[item[i]] = (uint16_t)(holders[item[i]] + (place_tier(p, r, item[i]) != TIER_HELD));
    }
    return holders;
}

/* Each time onto the coldest rank with an empty slot, what the fewest ranks hold, of that the largest replica: a second
 * copy of everything is what a death and a later scale-down need.  dormant: held, but not routed to. */
static void fill_rest(struct place *p, bool dormant)
{
    uint16_t *holders = fill_holders(p);
    p->broken |= !holders;
    while (holders) {
        uint32_t to = p->ranks, best = p->experts;
        for (uint32_t r = 0; r < p->ranks; r++)
            if (p->room[r] > 0 && !place_full(p, r) && (to == p->ranks || p->load[r] < p->load[to]))
                to = r;
        if (to == p->ranks)
            break;
        for (uint32_t e = 0; e < p->experts; e++) {
            if (place_tier(p, to, e) == TIER_HELD || place_on(p, to, e))
                continue;
            if (best == p->experts || holders[e] < holders[best] ||
                (holders[e] == holders[best] && p->share[e] > p->share[best]))
                best = e;
        }
        if (best == p->experts) {
            p->room[to] = 0; /* it holds them all */
            continue;
        }
        if (dormant) {
            place_hold(p, to, best);
            p->room[to]--;
        } else {
            place_add(p, to, best);
        }
        holders[best]++;
    }
    free(holders);
}

/* Is every expert on two ranks or more? */
static bool fill_is_redundant(struct place *p)
{
    uint16_t *holders = fill_holders(p);
    bool redundant = holders != NULL;
    for (uint32_t e = 0; e < p->experts && redundant; e++)
        redundant = holders[e] > 1;
    p->broken |= !holders;
    free(holders);
    return redundant;
}

#define FILL_ENOUGH 0.998 /* balance below which the fill may also overwrite what is held ... */
#define FILL_EVEN   1.003 /* highest load of uneven shares with which nothing is exchanged any more */
#define FILL_OVER   14    /* ... with so many times fewer arrivals than into empty slots */

void place_fill(struct place *p)
{
    static const struct place_style useful = {
        .hot = 2, .cold = 8, .piece = 0.5, .leave = 0.9, .polish = true, .wide = true};
    fill_hold(p);
    uint32_t room = fill_room(p), arrivals = p->arrivals;
    if (room)
        place_shift(p, &useful, p->mean * 1.001, arrivals + room, 0);
    double before = place_max(p);
    size_t start = p->n_log;
    fill_rest(p, false);
    bool redundant = fill_is_redundant(p);
    if (redundant)
        fill_hold(p); /* a death that loses nothing is worth more than the last percent */
    /* Enough by uneven shares as it is; or nothing can arrive, and they make the best of what is there anyway. */
    bool even = p->split && (!room || place_peak(p, p->mean * FILL_EVEN) <= p->mean * FILL_EVEN);
    if (!even)
        place_settle(p, room > 0);
    if (!even && place_max(p) > before) { /* the rest stays dormant */
        place_rewind(p, start);
        place_settle(p, room > 0);
    }
    if (room && !even && !redundant && place_balance(p) < FILL_ENOUGH) {
        p->over = arrivals + room + room / FILL_OVER;
        place_settle(p, room > 0);
        p->over = 0;
    }
    fill_hold(p);
    fill_rest(p, true);
}
