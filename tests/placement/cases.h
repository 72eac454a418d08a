/* Cases for the planners, the same in tests, benchmarks and the plot: skewed loads from a seed, a present map from EPLB
 * for the load of before, and an operation on it. */
#ifndef EEP_TESTS_PLACEMENT_CASES_H
#define EEP_TESTS_PLACEMENT_CASES_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner.h"
#include "coordinator/planner_eplb.h"

enum case_load { CASE_LOGNORMAL, CASE_ZIPF, CASE_HOT, CASE_ZERO, CASE_LOADS };

struct case_shape {
    uint32_t experts, from, to, slots;
    /* the figures to reach, of a layer: arrivals to balance 0.98, hard bound, arrivals to full (0: none), balance then
     */
    double arrivals, hard, full, balance;
};

static const struct case_shape case_shapes[] = {
    {64, 2, 4, 32, 12, 0, 64, 0.999},         {64, 4, 8, 16, 14, 0, 64, 0.999},
    {256, 4, 8, 64, 42, 0, 256, 0.999},       {256, 16, 24, 18, 39, 0, 144, 0.999},
    {256, 8, 4, 64, 85, 85, 85, 1.000},       {256, 8, 9, 36, 11, 0, 36, 0.999},
    {128, 6, 5, 26, 18.2, 18.1, 18.1, 0.994}, {256, 32, 48, 9, 63, 0, 144, 0.998},
    {384, 64, 96, 7, 109, 0, 224, 0.998},     {128, 16, 15, 9, 16, 7.2, 0, 0},
    {256, 9, 8, 36, 23.7, 23.7, 23.7, 0.997}, {256, 8, 8, 36, 1, 0, 0, 0.981},
};
#define CASE_SHAPES (sizeof case_shapes / sizeof case_shapes[0])

struct placement_case {
    struct expert_map *now;
    uint8_t *leaving, *joining;
    float *before;
    double *load;
    struct plan_input in;
};

static inline uint64_t case_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

static inline double case_uniform(uint64_t *state)
{
    return ((double)(case_random(state) >> 11) + 0.5) / 9007199254740992.0;
}

static inline double case_normal(uint64_t *state)
{
    return sqrt(-2 * log(case_uniform(state))) * cos(6.283185307179586 * case_uniform(state));
}

/* The load of before, and after a drift of sigma. */
static inline void case_loads(struct placement_case *c, uint32_t layers, uint32_t experts, enum case_load kind,
                              double drift, uint64_t *rng)
{
    for (uint32_t layer = 0; layer < layers; layer++) {
        float *row = c->before + (size_t)layer * experts;
        double sum = 0;
        for (uint32_t e = 0; e < experts; e++) {
            row[e] = kind == CASE_ZIPF ? (float)(1e6 / (e + 1)) : (float)(1000 * exp(case_normal(rng)));
            sum += (double)row[e];
        }
        for (uint32_t e = experts - 1; kind == CASE_ZIPF && e > 0; e--) { /* not in the order of their numbers */
            uint32_t other = (uint32_t)(case_random(rng) % (e + 1));
            float swap = row[e];
            row[e] = row[other];
            row[other] = swap;
        }
        if (kind == CASE_HOT)
            row[case_random(rng) % experts] = (float)(sum / 4); /* a fifth of all */
        for (uint32_t e = 0; e < experts; e++)
            c->load[(size_t)layer * experts + e] =
                kind == CASE_ZERO ? 0 : (double)row[e] * exp(drift * case_normal(rng));
    }
}

/* Exits when out of memory: tests. */
static inline void case_init(struct placement_case *c, const struct case_shape *s, uint32_t layers, enum case_load kind,
                             bool random_leavers, uint64_t seed)
{
    uint32_t parties = s->from > s->to ? s->from : s->to, physical = s->from * s->slots;
    uint64_t rng = seed;
    size_t n = (size_t)layers * s->experts;
    *c = (struct placement_case){.now = expert_map_new(layers, s->experts, parties, s->slots),
                                 .leaving = calloc(parties, 1),
                                 .joining = calloc(parties, 1),
                                 .before = calloc(n, sizeof(float)),
                                 .load = calloc(n, sizeof(double))};
    int32_t *phy2log = calloc((size_t)layers * physical, sizeof *phy2log);
    uint32_t *logcnt = calloc(n, sizeof *logcnt);
    if (!c->now || !c->leaving || !c->joining || !c->before || !c->load || !phy2log || !logcnt)
        exit(3);
    case_loads(c, layers, s->experts, kind, 0.3, &rng);
    struct eplb_input eplb = {layers, s->experts, physical, 1, 1, s->from, c->before};
    struct err err = {0};
    if (eplb_place(&eplb, phy2log, logcnt, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        exit(3);
    }
    for (uint32_t layer = 0; layer < layers; layer++) {
        for (uint32_t i = 0; i < physical; i++) {
            size_t at = expert_map_at(c->now, layer, i / s->slots, i % s->slots);
            c->now->held[at] = phy2log[(size_t)layer * physical + i];
            c->now->live[at] = 1;
        }
    }
    for (uint32_t party = s->from; party < parties; party++)
        c->joining[party] = 1;
    for (uint32_t left = s->from > s->to ? s->from - s->to : 0, party = s->from; left; left--) {
        party--;
        while (random_leavers && c->leaving[party = (uint32_t)(case_random(&rng) % s->from)])
            ;
        c->leaving[party] = 1;
    }
    c->in = (struct plan_input){.now = c->now, .leaving = c->leaving, .joining = c->joining, .load = c->load};
    free(phy2log);
    free(logcnt);
}

static inline void case_done(struct placement_case *c)
{
    expert_map_unref(c->now);
    free(c->leaving);
    free(c->joining);
    free(c->before);
    free(c->load);
}

#endif
