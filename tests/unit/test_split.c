/* Uneven splits: against what can be proved to be the best, and as whole numbers of entries in a map. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/topology.h"
#include "coordinator/split.h"
#include "tests/harness/suite.h"
#include "tests/placement/cases.h"

#define PARTIES 12
#define SLOTS   9
#define EXPERTS 40

/* A layer in which every expert lies on one rank at least, never twice on one; some copies are dormant. */
struct layer {
    uint32_t parties, slots, experts;
    int32_t held[PARTIES * SLOTS];
    uint8_t live[PARTIES * SLOTS], which[PARTIES];
    double weight[4 * EXPERTS];
};

static void layer_random(struct layer *l, uint64_t *rng)
{
    memset(l, 0, sizeof *l);
    l->parties = 2 + (uint32_t)(case_random(rng) % (PARTIES - 1));
    l->slots = 1 + (uint32_t)(case_random(rng) % SLOTS);
    uint32_t cells = l->parties * l->slots;
    l->experts = 1 + (uint32_t)(case_random(rng) % (cells < EXPERTS ? cells : EXPERTS));
    for (uint32_t i = 0; i < cells; i++) { /* slot by slot over the ranks, so that one rank has the same one late */
        uint32_t cell = i % l->parties * l->slots + i / l->parties, e = i;
        if (i >= l->experts)
            e = (uint32_t)(case_random(rng) % l->experts);
        bool there = false;
        for (uint32_t s = cell / l->slots * l->slots; s < cell; s++)
            there |= l->held[s] == (int32_t)e;
        l->held[cell] = there ? -1 : (int32_t)e;
        l->live[cell] = !there && (i < l->experts || case_random(rng) % 4 != 0);
    }
    memset(l->which, 1, l->parties);
    for (uint32_t i = 0; i < 4 * l->experts; i++)
        l->weight[i] = case_random(rng) % 16 ? exp(1.5 * case_normal(rng)) : 0;
    l->weight[0] += 1e-3;
}

static double layer_peak(const struct layer *l, const uint8_t *live)
{
    double count[EXPERTS] = {0}, peak = 0;
    uint32_t cells = l->parties * l->slots;
    for (uint32_t i = 0; i < cells; i++)
        if (live[i])
            count[l->held[i]] += live[i];
    for (uint32_t r = 0; r < l->parties; r++) {
        double load = 0;
        for (uint32_t i = r * l->slots; i < (r + 1) * l->slots; i++)
            load += live[i] ? l->weight[l->held[i]] * live[i] / count[l->held[i]] : 0;
        peak = fmax(peak, load);
    }
    return peak;
}

static struct split_map map_of(struct layer *l)
{
    return (struct split_map){.parties = l->parties,
                              .slots = l->slots,
                              .experts = l->experts,
                              .held = l->held,
                              .live = l->live,
                              .which = l->which,
                              .weight = l->weight,
                              .samples = 1};
}

/* 10 + 4 against 10 by halves; 8 + 4 against 12 as it can be. */
START_TEST(halves_are_not_enough)
{
    struct split s = {0};
    struct layer l = {
        .parties = 2, .slots = 2, .experts = 2, .held = {0, 1, 0, -1}, .live = {1, 1, 1, 0}, .which = {1, 1}};
    l.weight[0] = 20;
    l.weight[1] = 4;
    struct split_map m = map_of(&l);
    ck_assert_double_eq(layer_peak(&l, l.live), 14);
    ck_assert_int_eq(split_map(&s, &m), 0);
    ck_assert_double_eq_tol(layer_peak(&l, l.live), 12, 1e-9);
    ck_assert_uint_eq(l.live[0], 2);
    ck_assert_uint_eq(l.live[2], 3);
    ck_assert_uint_eq(l.live[1], 1);
    /* what is even already stays so, and old entries do not matter */
    l.weight[1] = 0;
    ck_assert_int_eq(split_map(&s, &m), 0);
    ck_assert_uint_eq(l.live[0], 1);
    ck_assert_uint_eq(l.live[2], 1);
    split_done(&s);
}
END_TEST

/* A dormant copy wakes where that helps, and what gets nothing becomes dormant; without `wake` neither. */
START_TEST(copies_wake)
{
    for (int wake = 0; wake < 2; wake++) {
        struct split s = {0};
        struct layer l = {
            .parties = 2, .slots = 2, .experts = 2, .held = {0, 1, 1, 0}, .live = {1, 1, 1, 0}, .which = {1, 1}};
        l.weight[0] = 30;
        l.weight[1] = 10;
        struct split_map m = map_of(&l);
        m.wake = wake;
        ck_assert_int_eq(split_map(&s, &m), 0);
        ck_assert_double_eq_tol(layer_peak(&l, l.live), wake ? 20 : 30, 0.2);
        ck_assert(!wake == !l.live[3]);
        split_done(&s);
    }
}
END_TEST

/* The best is reached when nobody who is on the hottest ranks could also be on another one; and in whole numbers
 * nothing is lost, nothing has too many entries, and it is never worse than even shares. */
START_TEST(random_layers)
{
    struct split s = {0};
    uint64_t rng = 77;
    double lost = 0;
    uint32_t n = 600;
    for (uint32_t i = 0; i < n; i++) {
        struct layer l;
        layer_random(&l, &rng);
        uint32_t cells = l.parties * l.slots;
        struct split_map m = map_of(&l);
        uint8_t even[PARTIES * SLOTS];
        memcpy(even, l.live, sizeof even);
        m.wake = i % 2;
        ck_assert_int_eq(split_map(&s, &m), 0);
        double whole = layer_peak(&l, l.live);
        ck_assert_msg(whole <= layer_peak(&l, even) * (1 + 1e-9), "layer %u: %g", i, whole);
        uint32_t entries[EXPERTS] = {0};
        for (uint32_t c = 0; c < cells; c++) {
            ck_assert(m.wake || !l.live[c] == !even[c] || even[c]);
            if (l.live[c])
                entries[l.held[c]] += l.live[c];
        }
        for (uint32_t e = 0; e < l.experts; e++)
            ck_assert_msg(entries[e] >= 1 && entries[e] <= ENTRIES_MAX, "layer %u: expert %u has %u", i, e, entries[e]);

        double total = 0;
        for (uint32_t e = 0; e < l.experts; e++)
            total += l.weight[e];
        ck_assert_int_eq(split_begin(&s, l.parties, l.experts, cells, l.weight, 1), 0);
        for (uint32_t c = 0; c < cells; c++)
            if (even[c] || (m.wake && l.held[c] >= 0)) {
                uint32_t count = 0;
                for (uint32_t k = 0; k < cells; k++)
                    count += even[k] && l.held[k] == l.held[c];
                split_add(&s, (uint32_t)l.held[c], c / l.slots, c, even[c] ? 1.0 / count : 0);
            }
        split_end(&s);
        double best = split_highest(&s, 0);
        for (uint32_t k = 0; k < s.n; k++) {
            bool hot = false;
            double coldest = INFINITY;
            for (uint32_t at = s.start[k]; at < s.start[k + 1]; at++) {
                hot |= s.at[at].part * s.weight[s.expert[k]] > 0.01 * total / l.parties &&
                       s.load[s.at[at].rank] >= best * (1 - 1e-9);
                coldest = fmin(coldest, s.load[s.at[at].rank]);
            }
            ck_assert_msg(!hot || coldest > best * 0.985, "layer %u: an expert is on a rank of %g, another is at %g", i,
                          best, coldest);
        }
        lost += whole / (best * total / l.parties) - 1;
    }
    printf("whole numbers against the best: %.4f more, in the mean of %u layers\n", lost / n, n);
    ck_assert(lost / n < 0.005);
    split_done(&s);
}
END_TEST

/* Several samples: the mean of their balances does not fall. */
START_TEST(samples)
{
    struct split s = {0};
    uint64_t rng = 5;
    for (uint32_t i = 0; i < 200; i++) {
        struct layer l;
        layer_random(&l, &rng);
        struct split_map m = map_of(&l);
        m.samples = 4;
        double mean[2] = {0};
        uint8_t even[PARTIES * SLOTS];
        memcpy(even, l.live, sizeof even);
        ck_assert_int_eq(split_map(&s, &m), 0);
        for (int k = 0; k < 4; k++) {
            struct layer one = l;
            double total = 0;
            memcpy(one.weight, l.weight + (size_t)k * l.experts, l.experts * sizeof *l.weight);
            for (uint32_t e = 0; e < l.experts; e++)
                total += one.weight[e];
            mean[0] += total > 0 ? total / layer_peak(&one, even) : 0;
            mean[1] += total > 0 ? total / layer_peak(&one, l.live) : 0;
        }
        ck_assert_msg(mean[1] >= mean[0] * (1 - 1e-9), "layer %u: %g, not %g", i, mean[1], mean[0]);
    }
    split_done(&s);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("split");
    TCase *tc = tcase_create("split");
    tcase_add_test(tc, halves_are_not_enough);
    tcase_add_test(tc, copies_wake);
    tcase_add_test(tc, random_layers);
    tcase_add_test(tc, samples);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
