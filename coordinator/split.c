/* Water-filling, and whole numbers of entries.  See split.h; pure.  Maps are in split_map.c. */
#include "coordinator/split.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/topology.h"

#define SWEEPS   24   /* over all experts, at most */
#define ROUNDED  2    /* further ones, in whole numbers */
#define NEAR     5e-4 /* of the mean load: that near to the level is near enough */
#define MANY     16   /* entries, at least, of an expert on three ranks or more */
#define RELIEVES 64   /* of the hottest rank, at most */
#define HOPE     6    /* sweeps like the last one within which a search must be there */
#define SETTLED  2e-4 /* of the highest load: a sweep that gains less is the last */

struct split_added {
    uint32_t expert;
    struct split_at at;
};

/* What a rank carries besides an expert, in loads of that expert; which of its replicas lies there. */
struct split_base {
    double level;
    uint32_t at, entries;
};

void split_done(struct split *s)
{
    free(s->expert);
    free(s->start);
    free(s->order);
    free(s->at);
    free(s->added);
    free(s->first);
    free(s->scale);
    free(s->load);
    free(s->base);
    free(s->fixed);
    *s = (struct split){0};
}

static bool grow(void *array, size_t n, size_t size)
{
    void **at = array, *bigger = realloc(*at, n * size);
    if (bigger)
        *at = bigger;
    return bigger != NULL;
}

static int split_room(struct split *s, uint32_t ranks, uint32_t experts, size_t places, uint32_t samples)
{
    if (experts > s->cap_experts) {
        if (!grow(&s->expert, experts, sizeof *s->expert) || !grow(&s->order, experts, sizeof *s->order) ||
            !grow(&s->first, experts, sizeof *s->first) || !grow(&s->start, (size_t)experts + 1, sizeof *s->start))
            return ERR_NOMEM;
        s->cap_experts = experts;
    }
    if (places > s->cap_at) {
        if (!grow(&s->at, places, sizeof *s->at) || !grow(&s->added, places, sizeof *s->added))
            return ERR_NOMEM;
        s->cap_at = places;
    }
    if (ranks > s->cap_ranks || samples > s->cap_samples) {
        if (!grow(&s->scale, samples, sizeof *s->scale) || !grow(&s->base, ranks, sizeof *s->base) ||
            !grow(&s->fixed, ranks, sizeof *s->fixed) || !grow(&s->load, (size_t)ranks * samples, sizeof *s->load))
            return ERR_NOMEM;
        s->cap_ranks = ranks;
        s->cap_samples = samples;
    }
    return 0;
}

int split_begin(struct split *s, uint32_t ranks, uint32_t experts, size_t places, const double *weight,
                uint32_t samples)
{
    int rc = split_room(s, ranks, experts, places, samples);
    if (rc < 0)
        return rc;
    s->ranks = ranks;
    s->experts = experts;
    s->samples = samples;
    s->weight = weight;
    s->n_added = 0;
    memset(s->load, 0, (size_t)ranks * samples * sizeof *s->load);
    for (uint32_t k = 0; k < samples; k++) {
        double sum = 0;
        for (uint32_t e = 0; e < experts; e++)
            sum += weight[(size_t)k * experts + e];
        s->scale[k] = sum > 0 ? ranks / sum : 0;
    }
    return 0;
}

static double split_weight(const struct split *s, uint32_t k, uint32_t expert)
{
    return s->weight[(size_t)k * s->experts + expert] * s->scale[k];
}

static void load_change(struct split *s, uint32_t expert, uint32_t rank, double part)
{
    for (uint32_t k = 0; k < s->samples; k++)
        s->load[(size_t)k * s->ranks + rank] += part * split_weight(s, k, expert);
}

void split_fix(struct split *s, uint32_t expert, uint32_t rank, double part)
{
    load_change(s, expert, rank, part);
}

void split_add(struct split *s, uint32_t expert, uint32_t rank, size_t cell, double part)
{
    s->added[s->n_added++] = (struct split_added){.expert = expert, .at = {.rank = rank, .cell = cell, .part = part}};
    load_change(s, expert, rank, part);
}

/* By weight, of the first sample if there are several. */
static void experts_sort(struct split *s)
{
    for (uint32_t i = 0; i < s->n; i++)
        s->order[i] = i;
    for (uint32_t gap = s->n / 2; gap; gap /= 2) {
        for (uint32_t i = gap; i < s->n; i++) {
            uint32_t move = s->order[i], j = i;
            double weight = s->weight[s->expert[move]];
            for (; j >= gap && s->weight[s->expert[s->order[j - gap]]] < weight; j -= gap)
                s->order[j] = s->order[j - gap];
            s->order[j] = move;
        }
    }
}

/* By expert, as they were added.  What is on one rank only is part of what that rank carries, and no question. */
void split_end(struct split *s)
{
    uint32_t *first = s->first;
    memset(first, 0, s->experts * sizeof *first);
    for (uint32_t i = 0; i < s->n_added; i++)
        first[s->added[i].expert]++;
    s->n = s->places = 0;
    for (uint32_t e = 0; e < s->experts; e++) {
        uint32_t count = first[e];
        first[e] = UINT32_MAX;
        if (count < 2)
            continue;
        first[e] = s->start[s->n] = s->places;
        s->expert[s->n++] = e;
        s->places += count;
    }
    s->start[s->n] = s->places;
    for (uint32_t i = 0; i < s->n_added; i++)
        if (first[s->added[i].expert] != UINT32_MAX)
            s->at[first[s->added[i].expert]++] = s->added[i].at;
    experts_sort(s);
}

/* The highest load; of several samples one over the mean of their balances. */
double split_peak(const struct split *s)
{
    double sum = 0;
    uint32_t n = 0;
    for (uint32_t k = 0; k < s->samples; k++) {
        const double *load = s->load + (size_t)k * s->ranks;
        double max = 0;
        for (uint32_t r = 0; r < s->ranks; r++)
            max = load[r] > max ? load[r] : max;
        if (max <= 0)
            continue;
        sum += 1 / max;
        n++;
    }
    return n ? n / sum : 0;
}

/* Bases of an expert's ranks, lowest first.  The sum over samples of a rank's squared load is, up to what the expert
 * does not change, its squared weights times (level + part) squared: several samples look like one.  0: it has no load.
 */
static uint32_t expert_bases(struct split *s, uint32_t i)
{
    uint32_t e = s->expert[i], first = s->start[i], n = s->start[i + 1] - first;
    double squares = 0;
    for (uint32_t k = 0; k < s->samples; k++)
        squares += split_weight(s, k, e) * split_weight(s, k, e);
    if (squares <= 0)
        return 0;
    double one = split_weight(s, 0, e) / squares;
    for (uint32_t j = 0; j < n; j++) {
        const struct split_at *at = &s->at[first + j];
        double level = one * s->load[at->rank] - at->part;
        for (uint32_t k = 1; k < s->samples; k++)
            level += split_weight(s, k, e) * s->load[(size_t)k * s->ranks + at->rank] / squares;
        uint32_t to = j;
        for (; to > 0 && s->base[to - 1].level > level; to--)
            s->base[to] = s->base[to - 1];
        s->base[to] = (struct split_base){.level = level, .at = first + j};
    }
    return n;
}

/* Up to which level the lowest of n bases are filled by one load of the expert. */
static double water_level(const struct split_base *base, uint32_t n)
{
    double sum = 1;
    for (uint32_t j = 0; j < n; j++) {
        sum += base[j].level;
        if (j + 1 == n || sum <= base[j + 1].level * (j + 1))
            return sum / (j + 1);
    }
    return 0;
}

static void expert_part(struct split *s, uint32_t i, uint32_t at, double part)
{
    if (part != s->at[at].part)
        load_change(s, s->expert[i], s->at[at].rank, part - s->at[at].part);
    s->at[at].part = part;
}

/* The usual case, at once: one sample, two ranks. */
static void expert_level(struct split *s, uint32_t i)
{
    struct split_at *a = &s->at[s->start[i]], *b = a + 1;
    double weight = split_weight(s, 0, s->expert[i]), *at_a = &s->load[a->rank], *at_b = &s->load[b->rank];
    double left_a = *at_a - a->part * weight, left_b = *at_b - b->part * weight;
    double to_a = (weight + left_b - left_a) / 2; /* in loads */
    to_a = to_a < 0 ? 0 : to_a > weight ? weight : to_a;
    *at_a = left_a + to_a;
    *at_b = left_b + weight - to_a;
    a->part = weight > 0 ? to_a / weight : a->part;
    b->part = weight > 0 ? 1 - a->part : b->part;
}

/* One sample: levels in loads, which become those of the ranks. */
static void expert_fill_one(struct split *s, uint32_t i)
{
    double weight = split_weight(s, 0, s->expert[i]), sum = weight, level = 0;
    uint32_t first = s->start[i], n = s->start[i + 1] - first, wet = 0;
    if (weight <= 0)
        return;
    for (uint32_t j = 0; j < n; j++) {
        const struct split_at *at = &s->at[first + j];
        double base = s->load[at->rank] - at->part * weight;
        uint32_t to = j;
        for (; to > 0 && s->base[to - 1].level > base; to--)
            s->base[to] = s->base[to - 1];
        s->base[to] = (struct split_base){.level = base, .at = first + j};
    }
    do {
        sum += s->base[wet++].level;
        level = sum / wet;
    } while (wet < n && s->base[wet].level < level);
    for (uint32_t j = 0; j < n; j++) {
        struct split_at *at = &s->at[s->base[j].at];
        at->part = j < wet ? (level - s->base[j].level) / weight : 0;
        s->load[at->rank] = j < wet ? level : s->base[j].level;
    }
}

static void expert_fill(struct split *s, uint32_t i)
{
    if (s->samples == 1 && s->start[i + 1] - s->start[i] == 2) {
        expert_level(s, i);
        return;
    }
    if (s->samples == 1) {
        expert_fill_one(s, i);
        return;
    }
    uint32_t n = expert_bases(s, i);
    double level = n ? water_level(s->base, n) : 0;
    for (uint32_t j = 0; j < n; j++)
        expert_part(s, i, s->base[j].at, fmax(level - s->base[j].level, 0));
}

/* The highest load of what has no choice. */
static double split_fixed(struct split *s)
{
    double highest = 0;
    memcpy(s->fixed, s->load, s->ranks * sizeof *s->fixed);
    for (uint32_t i = 0; i < s->n; i++)
        for (uint32_t at = s->start[i]; at < s->start[i + 1]; at++)
            s->fixed[s->at[at].rank] -= s->at[at].part * split_weight(s, 0, s->expert[i]);
    for (uint32_t r = 0; r < s->ranks; r++)
        highest = fmax(highest, s->fixed[r]);
    return highest;
}

double split_highest(struct split *s, double limit)
{
    double peak = split_peak(s), fixed = s->samples == 1 ? split_fixed(s) : 0;
    if (fixed > limit && limit > 0)
        return fixed;
    for (uint32_t sweep = 0; sweep < SWEEPS && peak > limit; sweep++) {
        double was = peak;
        for (uint32_t i = 0; i < s->n; i++)
            expert_fill(s, s->order[i]);
        peak = split_peak(s);
        if (peak > was * (1 - SETTLED) || (limit > 0 && peak - limit > HOPE * (was - peak)))
            break;
    }
    return peak;
}

/* ---- whole numbers ---- */

/* total entries, as near to the level as they come; returns the sum of the squares of level and part.  Only the first
 * n bases are below the level. */
static double entries_try(struct split_base *base, uint32_t n, double level, uint32_t total)
{
    uint32_t left = total;
    for (uint32_t j = 0; j < n; j++) {
        base[j].entries = (uint32_t)((level - base[j].level) * total + 1e-9);
        left -= base[j].entries < left ? base[j].entries : left;
    }
    for (; left; left--) { /* each to whom it makes the lowest */
        uint32_t to = 0;
        for (uint32_t j = 1; j < n; j++)
            if (base[j].level * total + base[j].entries < base[to].level * total + base[to].entries)
                to = j;
        base[to].entries++;
    }
    double squares = 0, part = 1.0 / total;
    for (uint32_t j = 0; j < n; j++) {
        double to = base[j].level + base[j].entries * part;
        squares += to * to;
    }
    return squares;
}

/* The same for two, of which the first wants so much: what one gets too much the other lacks. */
static double two_try(double level, double first, uint32_t total)
{
    double want = first * total, whole = (double)(int)(want + 0.5), off = (whole - want) / total;
    return 2 * (level * level + off * off);
}

/* How many of the bases are below the level, or just at it. */
static uint32_t bases_wet(const struct split_base *base, uint32_t n, double level)
{
    uint32_t wet = 1;
    while (wet < n && base[wet].level < level)
        wet++;
    return wet;
}

/* The bases are those of the expert. */
static void expert_take(struct split *s, uint32_t i, uint32_t n, uint32_t total)
{
    double level = water_level(s->base, n);
    uint32_t wet = bases_wet(s->base, n, level);
    entries_try(s->base, wet, level, total);
    for (uint32_t j = wet; j < n; j++)
        s->base[j].entries = 0;
    for (uint32_t j = 0; j < n; j++) {
        s->at[s->base[j].at].entries = s->base[j].entries;
        expert_part(s, i, s->base[j].at, (double)s->base[j].entries / total);
    }
}

/* The number of entries with which the expert comes nearest to the level: the smallest that is near enough. */
static void expert_round(struct split *s, uint32_t i, bool keep)
{
    uint32_t n = expert_bases(s, i), best = 0;
    if (n == 0 || n > ENTRIES_MAX)
        return;
    double level = water_level(s->base, n), least = DBL_MAX, weight = split_weight(s, 0, s->expert[i]);
    uint32_t wet = bases_wet(s->base, n, level);
    double enough = wet * level * level + wet * (NEAR * NEAR) / fmax(weight * weight, 1e-12);
    if (keep) { /* only what is better than it is */
        least = 0;
        for (uint32_t j = 0; j < n; j++) {
            double part = s->at[s->base[j].at].part, to = s->base[j].level + part;
            least += j < wet ? to * to : part * (2 * s->base[j].level + part);
        }
    }
    double first = level - s->base[0].level;
    uint32_t stride = wet > 4   ? 4
                      : wet > 2 ? 2
                                : 1; /* that many are slow to try, and about as good as their neighbours */
    for (uint32_t total = stride > 1 ? MANY : 1; total <= ENTRIES_MAX && least > enough; total += stride) {
        double squares = wet == 2 ? two_try(level, first, total) : entries_try(s->base, wet, level, total);
        if (squares < least * (1 - 1e-9)) {
            least = squares;
            best = total;
        }
    }
    if (best)
        expert_take(s, i, n, best);
}

/* Another number of entries for an expert of the hottest rank, with which the highest of its ranks is as low as can be.
 */
static double expert_relieve(struct split *s, uint32_t i, double least, uint32_t *ret_total)
{
    uint32_t n = expert_bases(s, i);
    if (n == 0 || n > ENTRIES_MAX)
        return INFINITY;
    double level = water_level(s->base, n), weight = split_weight(s, 0, s->expert[i]), best = INFINITY;
    uint32_t wet = bases_wet(s->base, n, level);
    if (level * weight >= least)
        return INFINITY; /* not even in parts of any size */
    for (uint32_t total = wet > 2 ? MANY : 1; total <= ENTRIES_MAX; total++) {
        double highest = 0;
        entries_try(s->base, wet, level, total);
        for (uint32_t j = 0; j < wet; j++)
            highest = fmax(highest, s->base[j].level + (double)s->base[j].entries / total);
        if (highest * weight >= best)
            continue;
        best = highest * weight;
        *ret_total = total;
    }
    return best;
}

/* While the hottest rank can be relieved by one of its experts. */
static void split_relieve(struct split *s)
{
    for (uint32_t step = 0; step < RELIEVES; step++) {
        uint32_t hot = 0, best = s->n, best_total = 0;
        for (uint32_t r = 1; r < s->ranks; r++)
            hot = s->load[r] > s->load[hot] ? r : hot;
        double least = s->load[hot] * (1 - 1e-6);
        for (uint32_t i = 0; i < s->n; i++) {
            uint32_t at = s->start[i], total = 0;
            while (at < s->start[i + 1] && (s->at[at].rank != hot || s->at[at].entries == 0))
                at++;
            double highest = at < s->start[i + 1] ? expert_relieve(s, i, least, &total) : INFINITY;
            if (highest < least) {
                least = highest;
                best = i;
                best_total = total;
            }
        }
        if (best == s->n)
            return;
        expert_take(s, best, expert_bases(s, best), best_total);
    }
}

/* Those without a load, and those on more ranks than there may be entries: one each of what is routed to already. */
static void expert_even(struct split *s, uint32_t i, const uint8_t *live)
{
    uint32_t n = 0;
    for (uint32_t at = s->start[i]; at < s->start[i + 1]; at++)
        n += s->at[at].entries = live[s->at[at].cell] > 0;
    for (uint32_t at = s->start[i]; at < s->start[i + 1]; at++)
        expert_part(s, i, at, (double)s->at[at].entries / n);
}

/* The heaviest first: the others still give way like water. */
void split_round(struct split *s, const uint8_t *live)
{
    double ideal = split_highest(s, 0);
    for (uint32_t i = 0; i < s->n; i++) {
        expert_even(s, s->order[i], live);
        expert_round(s, s->order[i], false);
    }
    for (uint32_t pass = 0; pass < ROUNDED && split_peak(s) > ideal * (1 + NEAR); pass++)
        for (uint32_t i = 0; i < s->n; i++)
            expert_round(s, s->order[i], true);
    if (s->samples == 1 && split_peak(s) > ideal * (1 + NEAR))
        split_relieve(s);
}
