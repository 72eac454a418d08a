/* The sets, the loads, and how they change.  Pure. */
#include "coordinator/place.h"

#include "coordinator/split.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

int place_init(struct place *p, uint32_t ranks, uint32_t slots, uint32_t experts, double cross_cost, struct err *err)
{
    *p = (struct place){.ranks = ranks, .slots = slots, .experts = experts, .words = (ranks + 63) / 64};
    p->cost[TIER_NODE] = 1;
    p->cost[TIER_CROSS] = cross_cost;
    size_t n = experts;
    p->weight = calloc(n, sizeof *p->weight);
    p->share = calloc(n, sizeof *p->share);
    p->less = calloc(n, sizeof *p->less);
    p->more = calloc(n, sizeof *p->more);
    p->heat = calloc(n, sizeof *p->heat);
    p->load = calloc(ranks, sizeof *p->load);
    p->count = calloc(n, sizeof *p->count);
    p->item = calloc((size_t)ranks * slots, sizeof *p->item);
    p->items = calloc(ranks, sizeof *p->items);
    p->room = calloc(ranks, sizeof *p->room);
    p->on = calloc(n * p->words, sizeof *p->on);
    p->tier = calloc(n * ranks, sizeof *p->tier);
    p->kept = calloc((size_t)ranks * slots, sizeof *p->kept);
    p->n_kept = calloc(ranks, sizeof *p->n_kept);
    p->cap_log = 256;
    p->log = calloc(p->cap_log, sizeof *p->log);
    if (!p->weight || !p->share || !p->less || !p->more || !p->heat || !p->load || !p->count || !p->item || !p->items ||
        !p->room || !p->on || !p->tier || !p->kept || !p->n_kept || !p->log) {
        place_done(p);
        return err_set(err, ERR_NOMEM, "no memory to plan %u ranks of %u experts", ranks, experts);
    }
    return 0;
}

void place_done(struct place *p)
{
    free(p->weight);
    free(p->share);
    free(p->less);
    free(p->more);
    free(p->heat);
    free(p->load);
    free(p->count);
    free(p->item);
    free(p->items);
    free(p->room);
    free(p->on);
    free(p->tier);
    free(p->kept);
    free(p->n_kept);
    free(p->log);
}

void place_reset(struct place *p, const double *weight)
{
    p->total = 0;
    for (uint32_t e = 0; e < p->experts; e++) {
        p->weight[e] = weight[e];
        p->total += weight[e];
        p->share[e] = p->less[e] = p->more[e] = p->heat[e] = 0;
    }
    p->mean = p->total / p->ranks;
    memset(p->load, 0, p->ranks * sizeof *p->load);
    memset(p->count, 0, p->experts * sizeof *p->count);
    memset(p->items, 0, p->ranks * sizeof *p->items);
    memset(p->on, 0, (size_t)p->experts * p->words * sizeof *p->on);
    memset(p->tier, TIER_CROSS, (size_t)p->experts * p->ranks);
    memset(p->room, 0, p->ranks * sizeof *p->room);
    memset(p->n_kept, 0, p->ranks * sizeof *p->n_kept);
    p->arrivals = 0;
    p->tried = 0;
    p->n_log = 0;
}

static void load_add(struct place *p, uint32_t rank, double delta)
{
    const uint16_t *item = p->item + (size_t)rank * p->slots;
    p->load[rank] += delta;
    for (uint32_t i = 0; i < p->items[rank]; i++)
        p->heat[item[i]] += delta;
}

/* The expert has `count` replicas from now on; those that it is on now change by what that means. */
static void count_set(struct place *p, uint32_t e, uint16_t count)
{
    double w = p->weight[e], was = p->share[e], is = count ? w / count : 0;
    p->share[e] = is;
    p->less[e] = count > 1 ? w / (count - 1) - is : 0;
    p->more[e] = count ? is - w / (count + 1) : 0;
    p->count[e] = count;
    const uint64_t *on = p->on + (size_t)e * p->words;
    for (uint32_t word = 0; word < p->words; word++)
        for (uint64_t bits = on[word]; bits; bits &= bits - 1)
            load_add(p, word * 64 + (uint32_t)__builtin_ctzll(bits), is - was);
}

static void add(struct place *p, uint32_t rank, uint32_t e)
{
    count_set(p, e, (uint16_t)(p->count[e] + 1));
    p->on[(size_t)e * p->words + rank / 64] |= 1ULL << (rank % 64);
    p->item[(size_t)rank * p->slots + p->items[rank]++] = (uint16_t)e;
    p->heat[e] += p->load[rank];
    load_add(p, rank, p->share[e]);
    if (place_tier(p, rank, e) != TIER_HELD) {
        p->arrivals++;
        p->room[rank]--;
    }
}

static void drop(struct place *p, uint32_t rank, uint32_t e)
{
    uint16_t *item = p->item + (size_t)rank * p->slots;
    uint32_t i = 0;
    while (item[i] != e)
        i++;
    load_add(p, rank, -p->share[e]);
    item[i] = item[--p->items[rank]];
    p->heat[e] -= p->load[rank];
    p->on[(size_t)e * p->words + rank / 64] &= ~(1ULL << (rank % 64));
    count_set(p, e, (uint16_t)(p->count[e] - 1));
    if (p->count[e] == 0)
        p->heat[e] = 0; /* what rounding left */
    if (place_tier(p, rank, e) != TIER_HELD) {
        p->arrivals--;
        p->room[rank]++;
    }
}

static void log_step(struct place *p, uint32_t rank, uint32_t e, bool added)
{
    if (p->n_log == p->cap_log) {
        struct place_step *log = realloc(p->log, 2 * p->cap_log * sizeof *log);
        if (!log) {
            p->broken = true;
            return;
        }
        p->log = log;
        p->cap_log *= 2;
    }
    p->log[p->n_log++] = (struct place_step){.rank = (uint16_t)rank, .expert = (uint16_t)e, .added = added};
}

void place_hold(struct place *p, uint32_t rank, uint32_t expert)
{
    uint8_t *tier = &p->tier[(size_t)expert * p->ranks + rank];
    if (*tier != TIER_HELD && p->n_kept[rank] < p->slots)
        p->kept[(size_t)rank * p->slots + p->n_kept[rank]++] = (uint16_t)expert;
    *tier = TIER_HELD;
}

void place_add(struct place *p, uint32_t rank, uint32_t expert)
{
    assert(!place_on(p, rank, expert) && !place_full(p, rank));
    add(p, rank, expert);
    log_step(p, rank, expert, true);
}

void place_remove(struct place *p, uint32_t rank, uint32_t expert)
{
    assert(place_on(p, rank, expert));
    drop(p, rank, expert);
    log_step(p, rank, expert, false);
}

void place_rewind(struct place *p, size_t n_log)
{
    while (p->n_log > n_log) {
        const struct place_step *step = &p->log[--p->n_log];
        if (step->added)
            drop(p, step->rank, step->expert);
        else
            add(p, step->rank, step->expert);
    }
}

double place_max(const struct place *p)
{
    double max[4] = {0}; /* four chains: the comparisons of one would wait for one another */
    uint32_t r = 0;
    for (; r + 4 <= p->ranks; r += 4)
        for (uint32_t i = 0; i < 4; i++)
            max[i] = p->load[r + i] > max[i] ? p->load[r + i] : max[i];
    for (; r < p->ranks; r++)
        max[0] = p->load[r] > max[0] ? p->load[r] : max[0];
    max[0] = max[1] > max[0] ? max[1] : max[0];
    max[2] = max[3] > max[2] ? max[3] : max[2];
    return max[2] > max[0] ? max[2] : max[0];
}

uint32_t place_hottest(const struct place *p)
{
    double max = place_max(p);
    uint32_t r = 0;
    while (r + 1 < p->ranks && p->load[r] < max)
        r++;
    return r;
}

#define WHOLE 0.998 /* of the limit, for what shares lose when they become whole numbers */

/* What the rank holds beside its set stays, if nothing has to be overwritten. */
static bool keeps_all(const struct place *p, uint32_t rank)
{
    uint32_t beside = 0;
    for (uint32_t i = 0; i < p->n_kept[rank]; i++)
        beside += !place_on(p, rank, p->kept[(size_t)rank * p->slots + i]);
    return p->items[rank] + beside <= p->slots;
}

double place_peak(struct place *p, double limit)
{
    double max = place_max(p);
    if (max <= limit || !p->split || p->mean <= 0)
        return max;
    if (split_begin(p->split, p->ranks, p->experts, 2 * (size_t)p->ranks * p->slots, p->weight, 1) < 0) {
        p->broken = true;
        return max;
    }
    for (uint32_t r = 0; r < p->ranks; r++) {
        const uint16_t *item = p->item + (size_t)r * p->slots, *kept = p->kept + (size_t)r * p->slots;
        bool keeps = keeps_all(p, r);
        for (uint32_t i = 0; i < p->items[r]; i++)
            split_add(p->split, item[i], r, 0, 1.0 / p->count[item[i]]);
        for (uint32_t i = 0; keeps && i < p->n_kept[r]; i++)
            if (!place_on(p, r, kept[i]))
                split_add(p->split, kept[i], r, 0, 0);
    }
    split_end(p->split);
    p->work += p->experts;
    return split_highest(p->split, limit / p->mean * WHOLE) * p->mean <= limit * WHOLE ? limit : max;
}

double place_balance(const struct place *p)
{
    double max = place_max(p);
    return max > 0 ? p->mean / max : 1;
}

static uint32_t common_ranks(const struct place *p, uint32_t x, uint32_t y)
{
    uint32_t n = 0;
    for (uint32_t word = 0; word < p->words; word++)
        n += (uint32_t)__builtin_popcountll(p->on[(size_t)x * p->words + word] & p->on[(size_t)y * p->words + word]);
    return n;
}

double phi_replace(const struct place *p, uint32_t rank, uint32_t x, uint32_t y)
{
    double dx = p->less[x], dy = p->more[y], d = p->share[y] - dy - p->share[x], l = p->load[rank];
    return 2 * (l * d + dx * (p->heat[x] - l) - dy * p->heat[y]) + d * d + (p->count[x] - 1) * dx * dx +
           p->count[y] * dy * dy - 2 * dx * dy * common_ranks(p, x, y);
}

double phi_evict_relocate(const struct place *p, uint32_t from, uint32_t to, uint32_t x, uint32_t z)
{
    double dz = p->less[z], d_to = p->share[x] - p->share[z];
    bool both = place_on(p, from, z);
    double d_from = (both ? dz : 0) - p->share[x], rest = p->heat[z] - p->load[to] - (both ? p->load[from] : 0);
    return 2 * (p->load[to] * d_to + p->load[from] * d_from + dz * rest) + d_to * d_to + d_from * d_from +
           (p->count[z] - 1 - both) * dz * dz;
}
