/* Polish, shift, prune, cover.  Pure.
 *
 * Two unique experts that two ranks hold now are never exchanged: carrying that out would need staging. */
#include "coordinator/place_search.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LOOK        0.8  /* of the way to the limit, after which uneven shares are tried again */
#define EPSILON     1e-9 /* of the mean: what does not count as an improvement */
#define HOT_MAX     4
#define COLD_MAX    8
#define POLISH_COLD 64

enum change_kind {
    CHANGE_NONE = 0,
    CHANGE_MUTE,
    CHANGE_ADD,
    CHANGE_RELOCATE,
    CHANGE_REPLACE,
    CHANGE_EVICT,
    CHANGE_EXCHANGE,
    CHANGE_ROTATE
};

/* x leaves or is added: from `from`, onto `to`; z leaves `to` (EXCHANGE: for `from`; ROTATE: for the rank in the upper
 * half of z, neither has more than 16 bits, and small is fast here). */
struct change {
    enum change_kind kind;
    uint32_t from, to, x, z;
    double value; /* the lower the better */
};

static void change_offer(struct change *best, struct change c)
{
    if (c.value < best->value)
        *best = c;
}

static void change_apply(struct place *p, const struct change *c)
{
    switch (c->kind) {
    case CHANGE_NONE:
        break;
    case CHANGE_MUTE:
        place_remove(p, c->from, c->x);
        break;
    case CHANGE_ADD:
        place_add(p, c->to, c->x);
        break;
    case CHANGE_RELOCATE:
        place_remove(p, c->from, c->x);
        place_add(p, c->to, c->x);
        break;
    case CHANGE_REPLACE:
        place_remove(p, c->to, c->z);
        place_add(p, c->to, c->x);
        break;
    case CHANGE_EVICT:
        place_remove(p, c->to, c->z);
        place_remove(p, c->from, c->x);
        place_add(p, c->to, c->x);
        break;
    case CHANGE_EXCHANGE:
        place_remove(p, c->to, c->z);
        place_remove(p, c->from, c->x);
        place_add(p, c->to, c->x);
        place_add(p, c->from, c->z);
        break;
    case CHANGE_ROTATE:
        place_remove(p, c->to, c->z & UINT16_MAX);
        place_remove(p, c->from, c->x);
        place_add(p, c->to, c->x);
        place_add(p, c->z >> 16, c->z & UINT16_MAX);
        break;
    }
}

/* ---- polish ---- */

/* The n ranks with the highest (sign 1) or lowest (sign -1) load; open: of those where something may arrive. */
static uint32_t extremes(const struct place *p, double sign, bool open, uint32_t n, uint32_t *ret_ranks)
{
    uint32_t found = 0;
    for (uint32_t r = 0; r < p->ranks; r++) {
        uint32_t i = found;
        if (open && place_closed(p, r))
            continue;
        while (i > 0 && sign * p->load[r] > sign * p->load[ret_ranks[i - 1]])
            i--;
        if (i >= n)
            continue;
        if (found < n)
            found++;
        for (uint32_t k = found - 1; k > i; k--)
            ret_ranks[k] = ret_ranks[k - 1];
        ret_ranks[i] = r;
    }
    return found;
}

/* The highest load among the ranks of e, without one of them, if all of them change by delta. */
static double others_max(const struct place *p, uint32_t e, uint32_t without, double delta)
{
    double max = 0;
    const uint64_t *on = p->on + (size_t)e * p->words;
    for (uint32_t word = 0; word < p->words; word++) {
        for (uint64_t bits = on[word]; bits; bits &= bits - 1) {
            uint32_t r = word * 64 + (uint32_t)__builtin_ctzll(bits);
            if (r != without && p->load[r] + delta > max)
                max = p->load[r] + delta;
        }
    }
    return max;
}

/* x from the hottest rank to another one for nothing: alone, or against something there. */
static void polish_pair(struct place *p, uint32_t hottest, uint32_t to, uint32_t x, struct change *best)
{
    double a = p->share[x], top = p->load[hottest], low = p->load[to];
    p->work++;
    enum place_tier at = place_tier(p, hottest, x), there = place_price(p, to, x);
    if (there == TIER_HELD && !place_full(p, to)) {
        double dy = p->more[x], after = low + a - dy;
        double max = fmax(after, others_max(p, x, to, -dy));
        change_offer(best, (struct change){CHANGE_ADD, 0, to, x, 0, max});
    }
    if (there > at || (there != TIER_HELD && place_closed(p, to)))
        return;
    if (!place_full(p, to))
        change_offer(best, (struct change){CHANGE_RELOCATE, hottest, to, x, 0, fmax(low + a, top - a)});
    p->work += p->items[to] / 4;
    const uint16_t *item = p->item + (size_t)to * p->slots;
    for (uint32_t i = 0; i < p->items[to]; i++) {
        uint32_t z = item[i];
        double d = a - p->share[z];
        if (d <= 0 || fmax(top - d, low + d) >= best->value || place_on(p, hottest, z) ||
            place_tier(p, hottest, z) > place_tier(p, to, z) ||
            (at == TIER_HELD && place_tier(p, hottest, z) != TIER_HELD && place_closed(p, hottest) &&
             p->arrivals >= p->over))
            continue;
        change_offer(best, (struct change){CHANGE_EXCHANGE, hottest, to, x, z, fmax(top - d, low + d)});
    }
}

/* x arrives in the place of z, which goes back to where it is held. */
static void polish_rotate(struct place *p, uint32_t hottest, uint32_t to, uint32_t x, uint32_t z, struct change *best)
{
    double a = p->share[x], c = p->share[z], top = p->load[hottest] - a, low = p->load[to] + a - c;
    if (top >= best->value || low >= best->value)
        return;
    const uint8_t *tier = p->tier + (size_t)z * p->ranks, *end = tier + p->ranks;
    for (const uint8_t *at = tier; at < end && (at = memchr(at, TIER_HELD, (size_t)(end - at))) != NULL; at++) {
        uint32_t home = (uint32_t)(at - tier);
        double there = (home == hottest ? top : p->load[home]) + c;
        if (there < best->value && home != to && !place_on(p, home, z) && (home == hottest || !place_full(p, home)))
            change_offer(best,
                         (struct change){CHANGE_ROTATE, hottest, to, x, z | home << 16, fmax(fmax(top, low), there)});
    }
}

/* A replica on another rank gives way to x, for nothing: one that is redundant, or that has somewhere else to go. */
static void polish_there(struct place *p, uint32_t hottest, uint32_t to, uint32_t x, struct change *best)
{
    const uint16_t *item = p->item + (size_t)to * p->slots;
    double a = p->share[x], dy = p->more[x], b = a - dy, low = p->load[to], top = p->load[hottest];
    enum place_tier there = place_tier(p, to, x), at = place_tier(p, hottest, x);
    p->work += p->items[to] / 4;
    for (uint32_t i = 0; i < p->items[to]; i++) {
        uint32_t z = item[i];
        enum place_tier tier = place_tier(p, to, z);
        if (tier < there)
            continue;
        if (p->fills && tier != TIER_HELD)
            polish_rotate(p, hottest, to, x, z, best);
        if (p->count[z] < 2)
            continue;
        double left = low - p->share[z], dz = p->less[z];
        double with_z = place_on(p, hottest, z) ? dz : 0;
        if (left + b < best->value && top - dy + with_z < best->value) {
            double max = fmax(fmax(left + b, top - dy + with_z), others_max(p, z, to, dz));
            change_offer(best, (struct change){CHANGE_REPLACE, hottest, to, x, z, max});
        }
        if ((p->fills || there <= at) && left + a < best->value && top - a + with_z < best->value) {
            double max = fmax(fmax(left + a, top - a + with_z), others_max(p, z, to, dz));
            change_offer(best, (struct change){CHANGE_EVICT, hottest, to, x, z, max});
        }
    }
}

/* A redundant replica on the hottest rank gives way to one of something lighter, for nothing. */
static void polish_here(struct place *p, uint32_t hottest, uint32_t z, struct change *best)
{
    enum place_tier tier = place_tier(p, hottest, z);
    double left = p->load[hottest] - p->share[z], rest = others_max(p, z, hottest, p->less[z]);
    if (fmax(left, rest) >= best->value)
        return;
    p->work += p->experts / 2;
    for (uint32_t y = 0; y < p->experts; y++) {
        double b = p->share[y] - p->more[y];
        if (left + b < best->value && !place_on(p, hottest, y) && place_tier(p, hottest, y) <= tier)
            change_offer(best, (struct change){CHANGE_REPLACE, 0, hottest, y, z, fmax(left + b, rest)});
    }
}

/* x to where it is held already. */
static void polish_held(struct place *p, uint32_t hottest, uint32_t x, struct change *best)
{
    const uint8_t *tier = p->tier + (size_t)x * p->ranks, *end = tier + p->ranks;
    for (const uint8_t *at = tier; at < end && (at = memchr(at, TIER_HELD, (size_t)(end - at))) != NULL; at++)
        if (!place_on(p, (uint32_t)(at - tier), x))
            polish_pair(p, hottest, (uint32_t)(at - tier), x, best);
}

static bool polish_step(struct place *p, uint32_t hottest)
{
    struct change best = {.value = p->load[hottest] - EPSILON * p->mean};
    const uint16_t *item = p->item + (size_t)hottest * p->slots;
    uint32_t cold[POLISH_COLD], n_cold = 0;
    for (uint32_t i = 0; i < p->items[hottest]; i++) {
        uint32_t x = item[i];
        bool arrived = place_tier(p, hottest, x) != TIER_HELD;
        if (p->count[x] > 1) {
            double after = fmax(p->load[hottest] - p->share[x], others_max(p, x, hottest, p->less[x]));
            change_offer(&best, (struct change){CHANGE_MUTE, hottest, 0, x, 0, after});
        }
        if (p->count[x] > 1 && p->swap)
            polish_here(p, hottest, x, &best);
        polish_held(p, hottest, x, &best);
        if (!arrived && !p->swap)
            continue;
        if (n_cold == 0)
            n_cold = extremes(p, -1, false, p->wide ? POLISH_COLD : POLISH_COLD / 5, cold);
        for (uint32_t k = 0; k < n_cold && p->load[cold[k]] < best.value; k++) {
            if (place_on(p, cold[k], x))
                continue;
            if ((arrived || (p->fills && p->room[cold[k]] > 0)) && place_tier(p, cold[k], x) != TIER_HELD)
                polish_pair(p, hottest, cold[k], x, &best);
            if (p->swap)
                polish_there(p, hottest, cold[k], x, &best);
        }
    }
    change_apply(p, &best);
    return best.kind != CHANGE_NONE;
}

void place_polish(struct place *p, double limit)
{
    /* The maximum, and with several ranks at it their number, fall at every step; the bound is for rounding. */
    for (uint32_t step = 0; step < 8 * p->ranks * p->slots; step++) {
        uint32_t hottest = place_hottest(p);
        if (p->load[hottest] <= limit || !polish_step(p, hottest))
            return;
    }
}

/* ---- shift ---- */

struct shift {
    const struct place_style *style;
    uint32_t hot[HOT_MAX], cold[COLD_MAX], n_hot, n_cold;
    struct change best;
};

static void shift_offer(struct shift *s, enum change_kind kind, uint32_t from, uint32_t to, uint32_t x, uint32_t z,
                        double gain, double cost)
{
    if (gain >= 0 || cost >= PLACE_NEVER / 2 ||
        (cost <= 0 && s->style->polish)) /* polishing might take back what is free, for ever */
        return;
    /* without it, what costs nothing comes first, by its gain */
    double value = cost > 0 ? gain / cost : gain * 16;
    if (value < s->best.value)
        s->best = (struct change){kind, from, to, x, z, value};
}

static bool kept_unique(const struct place *p, uint32_t rank, uint32_t e)
{
    return p->count[e] == 1 && place_tier(p, rank, e) == TIER_HELD;
}

static void shift_pair(struct place *p, struct shift *s, uint32_t from, uint32_t to, uint32_t x)
{
    const uint16_t *item = p->item + (size_t)to * p->slots;
    double a = p->share[x], cost = place_cost(p, to, x), refund = place_cost(p, from, x);
    bool on = place_on(p, to, x);
    bool small = a <= s->style->piece * p->mean && !(p->rigid && kept_unique(p, from, x));
    double leaves = p->load[from] - a;
    double factor = leaves >= s->style->leave * p->mean ? 1 : 0.25;
    if (!on && !place_full(p, to)) {
        shift_offer(s, CHANGE_ADD, from, to, x, 0, phi_add(p, to, x), cost);
        if (small)
            shift_offer(s, CHANGE_RELOCATE, from, to, x, 0, factor * phi_relocate(p, from, to, a), cost - refund);
        if (cost > 0)
            return; /* room is as good as what could make room */
    }
    p->work += 1 + p->items[to];
    for (uint32_t i = 0; i < p->items[to] && !on; i++) {
        uint32_t z = item[i];
        double back = place_cost(p, to, z);
        if (p->count[z] > 1) {
            shift_offer(s, CHANGE_REPLACE, from, to, x, z, phi_replace(p, to, z, x), cost - back);
            if (small)
                shift_offer(s, CHANGE_EVICT, from, to, x, z, factor * phi_evict_relocate(p, from, to, x, z),
                            cost - refund - back);
        }
        double d = a - p->share[z];
        if (d <= 0 || place_on(p, from, z) || (kept_unique(p, from, x) && kept_unique(p, to, z)) ||
            (p->rigid && (kept_unique(p, from, x) || kept_unique(p, to, z))))
            continue;
        shift_offer(s, CHANGE_EXCHANGE, from, to, x, z, phi_relocate(p, from, to, d),
                    cost - refund + place_cost(p, from, z) - back);
    }
}

static bool shift_step(struct place *p, const struct place_style *style)
{
    struct shift s = {.style = style};
    s.n_hot = extremes(p, 1, false, style->hot, s.hot);
    s.n_cold = extremes(p, -1, true, style->cold, s.cold);
    s.best.value = -EPSILON * p->mean * p->mean;
    for (uint32_t h = 0; h < s.n_hot; h++) {
        uint32_t from = s.hot[h];
        if (p->load[from] <= p->mean)
            continue;
        const uint16_t *item = p->item + (size_t)from * p->slots;
        for (uint32_t i = 0; i < p->items[from]; i++) {
            if (p->count[item[i]] > 1)
                shift_offer(&s, CHANGE_MUTE, from, 0, item[i], 0, phi_remove(p, from, item[i]), 0);
            for (uint32_t c = 0; c < s.n_cold; c++)
                if (s.cold[c] != from && p->load[s.cold[c]] < p->load[from])
                    shift_pair(p, &s, from, s.cold[c], item[i]);
        }
    }
    change_apply(p, &s.best);
    return s.best.kind != CHANGE_NONE;
}

/* A further replica of the hottest rank's largest expert, on the coldest rank that can take it. */
static bool shift_force(struct place *p)
{
    uint32_t from = place_hottest(p), cold[COLD_MAX], n = extremes(p, -1, true, COLD_MAX, cold);
    struct change best = {.value = 0};
    const uint16_t *item = p->item + (size_t)from * p->slots;
    for (uint32_t c = 0; c < n && best.kind == CHANGE_NONE; c++) {
        uint32_t to = cold[c];
        for (uint32_t i = 0; i < p->items[from]; i++) {
            uint32_t x = item[i];
            if (to == from || place_on(p, to, x) || -p->share[x] >= best.value || place_cost(p, to, x) >= PLACE_NEVER)
                continue;
            if (!place_full(p, to)) {
                best = (struct change){CHANGE_ADD, from, to, x, 0, -p->share[x]};
                continue;
            }
            uint32_t victim = p->slots; /* the redundant one that carries the least */
            const uint16_t *there = p->item + (size_t)to * p->slots;
            for (uint32_t k = 0; k < p->items[to]; k++)
                if (p->count[there[k]] > 1 && (victim == p->slots || p->share[there[k]] < p->share[there[victim]]))
                    victim = k;
            if (victim < p->slots)
                best = (struct change){CHANGE_REPLACE, from, to, x, there[victim], -p->share[x]};
        }
    }
    change_apply(p, &best);
    return best.kind != CHANGE_NONE;
}

/* A state that was the best so far. */
struct mark {
    size_t n_log;
    uint32_t arrivals;
    double max;
};

struct marks {
    struct mark *v;
    size_t n, cap;
    double looked; /* highest load when it was looked last what uneven shares can do */
};

static void marks_add(struct place *p, struct marks *marks)
{
    if (marks->n == marks->cap) {
        size_t cap = marks->cap ? 2 * marks->cap : 64;
        struct mark *v = realloc(marks->v, cap * sizeof *v);
        if (!v) {
            p->broken = true;
            return;
        }
        marks->v = v;
        marks->cap = cap;
    }
    marks->v[marks->n++] = (struct mark){p->n_log, p->arrivals, place_max(p)};
}

/* Along the hull of balance over arrivals while it is steeper than lambda. */
static size_t marks_choose(const struct place *p, const struct marks *marks, double lambda)
{
    size_t at = lambda > 0 ? 0 : marks->n - 1;
    for (bool on = lambda > 0; on;) {
        double steepest = lambda;
        size_t next = at;
        for (size_t i = at + 1; i < marks->n; i++) {
            const struct mark *a = &marks->v[at], *b = &marks->v[i];
            double gain = p->mean / b->max - p->mean / a->max, n = (double)b->arrivals - a->arrivals;
            double slope = n > 0 ? gain / n : INFINITY;
            if (slope >= steepest) {
                steepest = slope;
                next = i;
            }
        }
        on = next != at;
        at = next;
    }
    return at;
}

/* A better state?  Then it is marked. */
static bool shift_mark(struct place *p, struct marks *marks, uint32_t arrivals_max)
{
    if (p->arrivals > arrivals_max || (marks->n && place_max(p) >= marks->v[marks->n - 1].max * (1 - EPSILON)))
        return false;
    marks_add(p, marks);
    return true;
}

/* Do uneven shares reach the limit?  Asked when the load has come a good part nearer to it. */
static void marks_look(struct place *p, struct marks *marks, double limit)
{
    double max = place_max(p);
    if (p->broken || (marks->looked > 0 && max - limit > LOOK * (marks->looked - limit)))
        return;
    marks->looked = max;
    marks->v[marks->n - 1].max = place_peak(p, limit);
}

double place_shift(struct place *p, const struct place_style *style, double limit, uint32_t arrivals_max, double lambda)
{
    struct marks marks = {.looked = p->tried};
    uint32_t forced = 0, idle = 0;
    p->swap = style->swap;
    p->wide = style->wide;
    marks_add(p, &marks);
    for (uint32_t step = 0; step < 4 * p->ranks * p->slots && idle < 64 && !p->broken; step++, idle++) {
        if (style->polish || forced)
            place_polish(p, limit);
        if (shift_mark(p, &marks, arrivals_max) || step == 0) {
            idle = 0;
            marks_look(p, &marks, limit);
        }
        if (p->broken || marks.v[marks.n - 1].max <= limit || p->arrivals >= arrivals_max)
            break;
        if (!shift_step(p, style) && (++forced > 4 || !shift_force(p)))
            break;
    }
    double peak = place_max(p);
    if (!p->broken) {
        if (marks.v[marks.n - 1].max > limit)
            shift_mark(p, &marks, arrivals_max);
        size_t chosen = marks_choose(p, &marks, lambda);
        place_rewind(p, marks.v[chosen].n_log);
        peak = marks.v[chosen].max;
    }
    free(marks.v);
    return peak;
}

/* ---- prune ---- */

static bool prune_one(struct place *p, uint32_t rank, uint32_t e, double limit)
{
    size_t start = p->n_log;
    uint32_t arrivals = p->arrivals;
    if (p->count[e] > 1) {
        place_remove(p, rank, e);
        place_polish(p, limit);
        if (place_max(p) <= limit && p->arrivals < arrivals)
            return true;
        place_rewind(p, start);
        return false;
    }
    for (uint32_t back = 0; back < p->ranks; back++) {
        if (place_tier(p, back, e) != TIER_HELD || place_full(p, back))
            continue;
        place_remove(p, rank, e);
        place_add(p, back, e);
        place_polish(p, limit);
        if (place_max(p) <= limit && p->arrivals < arrivals)
            return true;
        place_rewind(p, start);
    }
    return false;
}

void place_prune(struct place *p, double limit)
{
    for (uint32_t rank = 0; rank < p->ranks; rank++) {
        for (uint32_t i = 0; i < p->items[rank]; i++) {
            uint32_t e = p->item[(size_t)rank * p->slots + i];
            if (place_tier(p, rank, e) != TIER_HELD && prune_one(p, rank, e, limit))
                i = (uint32_t)-1; /* the set has changed: from its beginning */
        }
    }
}

/* ---- cover ---- */

static void cover_one(struct place *p, uint32_t e)
{
    struct change best = {.value = INFINITY};
    for (uint32_t to = 0; to < p->ranks; to++) {
        double w = p->weight[e], far = place_cost(p, to, e) * p->mean * p->mean * 4 * p->ranks;
        if (!place_full(p, to)) {
            change_offer(&best, (struct change){CHANGE_ADD, 0, to, e, 0, 2 * w * p->load[to] + w * w + far});
            continue;
        }
        const uint16_t *item = p->item + (size_t)to * p->slots;
        for (uint32_t i = 0; i < p->items[to]; i++) {
            uint32_t z = item[i];
            if (p->count[z] < 2)
                continue;
            double l = p->load[to] - p->share[z];
            double phi = phi_remove(p, to, z) + 2 * w * l + w * w + far;
            change_offer(&best, (struct change){CHANGE_REPLACE, 0, to, e, z, phi});
        }
    }
    change_apply(p, &best);
}

void place_cover(struct place *p)
{
    for (;;) {
        uint32_t lost = p->experts;
        for (uint32_t e = 0; e < p->experts; e++)
            if (p->count[e] == 0 && (lost == p->experts || p->weight[e] > p->weight[lost]))
                lost = e;
        if (lost == p->experts)
            return;
        cover_one(p, lost);
    }
}
