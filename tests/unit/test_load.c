/* Load: windows of the agents' counters, samples at the coordinator, the balance of a map. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "agent/load_window.h"
#include "coordinator/load.h"
#include "tests/harness/suite.h"

#define MS UINT64_C(1000000)

/* ---- windows ---- */

START_TEST(a_window_is_what_the_counters_grew_by)
{
    uint64_t tokens[4] = {10, 20, 30, 40};
    struct load_window w = {0};
    struct load_counters now = {.tokens = tokens, .layers = 2, .slots = 2, .epoch = 3, .map_version = 7};
    struct msg_load load = {0};
    ck_assert(!load_window_next(&w, &now, 1000 * MS, &load)); /* it begins */
    tokens[1] += 5;
    tokens[2] += 7;
    ck_assert(load_window_next(&w, &now, 1500 * MS, &load));
    ck_assert_uint_eq(load.epoch, 3);
    ck_assert_uint_eq(load.map_version, 7);
    ck_assert_uint_eq(load.window_ms, 500);
    ck_assert_uint_eq(load.layers, 2);
    ck_assert_uint_eq(load.slots, 2);
    uint64_t grown[4] = {0, 5, 7, 0};
    ck_assert_int_eq(memcmp(load.tokens, grown, sizeof grown), 0);
    free(load.tokens);
    ck_assert(!load_window_next(&w, &now, 2000 * MS, &load)); /* idle */
    memset(tokens, 0, sizeof tokens);                         /* another engine, which counts from 0 */
    tokens[0] = 2;
    ck_assert(load_window_next(&w, &now, 2500 * MS, &load));
    ck_assert_uint_eq(load.tokens[0], 2);
    ck_assert_uint_eq(load.tokens[3], 0);
    free(load.tokens);
    load_window_done(&w);
}
END_TEST

START_TEST(a_window_over_a_change_does_not_count)
{
    uint64_t tokens[6] = {1};
    struct load_window w = {0};
    struct load_counters now = {.tokens = tokens, .layers = 2, .slots = 2, .epoch = 3, .map_version = 7};
    struct msg_load load = {0};
    for (int change = 0; change < 4; change++) {
        load_window_next(&w, &now, 0, &load);
        now.epoch += change == 0;
        now.map_version += change == 1;
        now.slots += change == 2;
        if (change == 3)
            now.epoch = 0; /* no view */
        tokens[0]++;
        ck_assert(!load_window_next(&w, &now, MS, &load));
        now.epoch = 9;
        load_window_next(&w, &now, MS, &load);
        tokens[0]++;
        ck_assert(load_window_next(&w, &now, 2 * MS, &load)); /* the next one does */
        free(load.tokens);
    }
    now.tokens = NULL;
    ck_assert(!load_window_next(&w, &now, 3 * MS, &load));
    load_window_done(&w);
}
END_TEST

/* ---- samples ---- */

/* Two ranks of two slots, one layer, three experts: {0, 1}, {2, 0}. */
static struct expert_map *map_make(void)
{
    static const int32_t held[4] = {0, 1, 2, 0};
    struct expert_map *map = expert_map_new(1, 3, 2, 2);
    memcpy(map->held, held, sizeof held);
    memset(map->live, 1, 4);
    return map;
}

static bool add(struct load_history *l, const struct expert_map *map, uint32_t rank, uint64_t a, uint64_t b,
                uint64_t now_ms)
{
    uint64_t tokens[2] = {a, b};
    struct msg_load window = {.layers = 1, .slots = 2, .window_ms = 10, .tokens = tokens};
    return load_add(l, map, rank, &window, now_ms * MS);
}

START_TEST(samples_sum_over_replicas_and_end_with_their_time)
{
    struct expert_map *map = map_make();
    struct load_history l;
    load_init(&l, 400 * MS, 4);
    ck_assert_uint_eq(load_samples(&l), 0);
    ck_assert_ptr_null(load_sum(&l));
    ck_assert(add(&l, map, 0, 5, 6, 1000));
    ck_assert(add(&l, map, 1, 7, 8, 1010));
    double *sum = load_sum(&l);
    ck_assert_double_eq(sum[0], 5 + 8);
    ck_assert_double_eq(sum[1], 6);
    ck_assert_double_eq(sum[2], 7);
    free(sum);
    ck_assert_uint_eq(l.v[0].windows, 2);
    ck_assert(add(&l, map, 0, 1, 0, 1095)); /* 105 ms after it began: the next sample */
    ck_assert_uint_eq(l.n, 2);
    ck_assert_uint_eq(load_samples(&l), 1); /* which has said too little yet */
    ck_assert(add(&l, map, 0, 100, 0, 1096));
    ck_assert_uint_eq(load_samples(&l), 2);
    double *matrix = load_matrix(&l); /* 26 and 101 tokens: both count the same */
    ck_assert_double_eq_tol(matrix[0] + matrix[1] + matrix[2], 63.5, 1e-9);
    ck_assert_double_eq_tol(matrix[3] + matrix[4] + matrix[5], 63.5, 1e-9);
    free(matrix);
    load_done(&l);
    expert_map_unref(map);
}
END_TEST

START_TEST(memory_is_bounded_and_the_horizon_ends)
{
    struct expert_map *map = map_make();
    struct load_history l;
    load_init(&l, 400 * MS, 4);
    for (uint64_t t = 0; t < 50; t++)
        ck_assert(add(&l, map, 0, t + 1, 0, 1000 + 110 * t));
    ck_assert_uint_eq(l.n, 4);
    ck_assert_double_eq(l.v[3].tokens[0], 50);
    ck_assert(add(&l, map, 0, 9, 0, 90000)); /* what came long before goes when something new is there */
    ck_assert_uint_eq(l.n, 1);
    double *sum = load_sum(&l);
    ck_assert_double_eq(sum[0], 9);
    free(sum);
    load_done(&l);
    load_init(&l, 400 * MS, 1000);
    ck_assert_uint_eq(l.samples, LOAD_SAMPLES_MAX);
    load_done(&l);
    expert_map_unref(map);
}
END_TEST

START_TEST(what_does_not_fit_is_left_out)
{
    struct expert_map *map = map_make(), *other = expert_map_new(1, 4, 2, 2);
    struct load_history l;
    load_init(&l, 400 * MS, 4);
    ck_assert(!add(&l, NULL, 0, 1, 1, 1000));
    ck_assert(!add(&l, map, 2, 1, 1, 1000));
    uint64_t tokens[4] = {1, 1, 1, 1};
    struct msg_load window = {.layers = 2, .slots = 2, .tokens = tokens};
    ck_assert(!load_add(&l, map, 0, &window, 1000 * MS));
    map->held[0] = -1; /* a void slot counts for nobody */
    map->live[0] = 0;
    ck_assert(add(&l, map, 0, 100, 1, 1000));
    ck_assert_double_eq(l.v[0].total, 1);
    for (uint32_t i = 0; i < 4; i++)
        other->held[i] = (int32_t)i;
    ck_assert(add(&l, other, 1, 1, 2, 1001)); /* another model: counted anew */
    ck_assert_uint_eq(l.n, 1);
    ck_assert_double_eq(l.v[0].tokens[3], 2);
    load_done(&l);
    expert_map_unref(map);
    expert_map_unref(other);
}
END_TEST

START_TEST(balance_of_a_map)
{
    struct expert_map *map = map_make();
    const double load[3] = {4, 1, 3}, none[3] = {0};
    ck_assert_double_eq_tol(load_balance(map, load), 4.0 / 5, 1e-12); /* 2 + 1 and 3 + 2 */
    map->live[3] = 0;                                                 /* dormant */
    ck_assert_double_eq_tol(load_balance(map, load), 4.0 / 5, 1e-12); /* 4 + 1 and 3 */
    map->live[3] = 1;
    map->live[0] = 3; /* 3 and 1 of 4 tokens instead of two each */
    ck_assert_double_eq_tol(load_balance(map, load), 1, 1e-12);
    ck_assert_double_eq(load_balance(map, none), 1);
    expert_map_unref(map);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("load");
    TCase *t = tcase_create("load");
    tcase_add_test(t, a_window_is_what_the_counters_grew_by);
    tcase_add_test(t, a_window_over_a_change_does_not_count);
    tcase_add_test(t, samples_sum_over_replicas_and_end_with_their_time);
    tcase_add_test(t, memory_is_bounded_and_the_horizon_ends);
    tcase_add_test(t, what_does_not_fit_is_left_out);
    tcase_add_test(t, balance_of_a_map);
    suite_add_tcase(s, t);
    return suite_run(s);
}
