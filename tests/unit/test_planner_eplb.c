/* The EPLB planner: every case of the public code's fixture, the case of its README, and refused shapes. */
#include <check.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner_eplb.h"
#include "tests/harness/suite.h"

#define FIXTURE "tests/data/eplb_cases.json"

struct placed {
    int32_t *phy2log;
    uint32_t *logcnt;
};

static int place(struct eplb_input in, struct placed *ret_placed, struct err *err)
{
    ret_placed->phy2log = malloc((size_t)in.layers * in.physical * sizeof(int32_t));
    ret_placed->logcnt = malloc((size_t)in.layers * in.logical * sizeof(uint32_t));
    ck_assert(ret_placed->phy2log && ret_placed->logcnt);
    return eplb_place(&in, ret_placed->phy2log, ret_placed->logcnt, err);
}

static void placed_done(struct placed *p)
{
    free(p->phy2log);
    free(p->logcnt);
}

static uint32_t size_of(const json_t *item, const char *key)
{
    const json_t *value = json_object_get(item, key);
    ck_assert_msg(json_is_integer(value), "%s is missing", key);
    return (uint32_t)json_integer_value(value);
}

static json_int_t cell(const json_t *item, const char *key, uint32_t row, uint32_t column)
{
    const json_t *value = json_array_get(json_array_get(json_object_get(item, key), row), column);
    ck_assert_msg(json_is_number(value), "%s [%u][%u] is missing", key, row, column);
    return (json_int_t)json_number_value(value);
}

static void check_case(const json_t *item, size_t number)
{
    struct eplb_input in = {.layers = size_of(item, "layers"),
                            .logical = size_of(item, "logical"),
                            .physical = size_of(item, "physical"),
                            .groups = size_of(item, "groups"),
                            .nodes = size_of(item, "nodes"),
                            .gpus = size_of(item, "gpus")};
    float *load = malloc((size_t)in.layers * in.logical * sizeof *load);
    ck_assert_ptr_nonnull(load);
    for (uint32_t i = 0; i < in.layers * in.logical; i++)
        load[i] = (float)cell(item, "load", i / in.logical, i % in.logical);
    in.load = load;
    struct placed got;
    struct err err = {0};
    ck_assert_msg(place(in, &got, &err) == 0, "case %zu: %s", number, err.text);
    for (uint32_t i = 0; i < in.layers * in.physical; i++)
        ck_assert_msg(got.phy2log[i] == cell(item, "phy2log", i / in.physical, i % in.physical),
                      "case %zu: phy2log [%u][%u] is %d", number, i / in.physical, i % in.physical, got.phy2log[i]);
    for (uint32_t i = 0; i < in.layers * in.logical; i++)
        ck_assert_int_eq(got.logcnt[i], cell(item, "logcnt", i / in.logical, i % in.logical));
    placed_done(&got);
    free(load);
}

START_TEST(fixture)
{
    json_error_t error;
    json_t *cases = json_load_file(FIXTURE, 0, &error);
    ck_assert_msg(cases, "%s: %s", FIXTURE, error.text);
    size_t n = json_array_size(cases);
    ck_assert_uint_eq(n, 11);
    for (size_t i = 0; i < n; i++)
        check_case(json_array_get(cases, i), i);
    json_decref(cases);
}
END_TEST

START_TEST(public_readme)
{
    static const float load[24] = {90, 132, 40,  61, 104, 165, 39,  4,   73,  56, 183, 86,
                                   20, 107, 104, 64, 19,  197, 187, 157, 172, 86, 16,  27};
    static const int32_t phy2log[32] = {5, 6,  5, 7, 8, 4,  3, 4, 10, 9, 10, 2, 0, 1, 11, 1,
                                        7, 10, 6, 8, 6, 11, 8, 9, 2,  4, 5,  1, 5, 0, 3,  1};
    static const uint32_t logcnt[24] = {1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1};
    struct placed got;
    ck_assert_int_eq(place((struct eplb_input){2, 12, 16, 4, 2, 8, load}, &got, NULL), 0);
    ck_assert_mem_eq(got.phy2log, phy2log, sizeof phy2log);
    ck_assert_mem_eq(got.logcnt, logcnt, sizeof logcnt);
    placed_done(&got);
}
END_TEST

/* Three groups do not divide by two nodes: the same as one group on one node. */
START_TEST(falls_back_to_global)
{
    static const float load[12] = {90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86};
    struct placed a, b;
    ck_assert_int_eq(place((struct eplb_input){1, 12, 16, 3, 2, 8, load}, &a, NULL), 0);
    ck_assert_int_eq(place((struct eplb_input){1, 12, 16, 1, 1, 8, load}, &b, NULL), 0);
    ck_assert_mem_eq(a.phy2log, b.phy2log, 16 * sizeof *a.phy2log);
    placed_done(&a);
    placed_done(&b);
}
END_TEST

START_TEST(refuses)
{
    static const struct {
        struct eplb_input in;
        int rc;
        const char *text;
    } wrong[] = {
        {{1, 12, 16, 4, 2, 5, NULL}, ERR_INVALID, "16 physical slots do not divide by 5 GPUs"},
        {{1, 12, 16, 8, 2, 8, NULL}, ERR_INVALID, "12 experts do not divide by 8 groups"},
        {{1, 12, 15, 4, 2, 5, NULL}, ERR_INVALID, "5 GPUs do not divide by 2 nodes"},
        {{1, 12, 8, 4, 2, 8, NULL}, ERR_LIMIT, "12 experts do not fit into 8"},
        {{1, 12, 16, 4, 0, 8, NULL}, ERR_INVALID, "at least 1"},
    };
    float load[12] = {1};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        struct eplb_input in = wrong[i].in;
        struct placed got;
        struct err err = {0};
        in.load = load;
        ck_assert_int_eq(place(in, &got, &err), wrong[i].rc);
        ck_assert_msg(strstr(err.text, wrong[i].text), "%s", err.text);
        placed_done(&got);
    }
    load[3] = -1;
    struct placed got;
    ck_assert_int_eq(place((struct eplb_input){1, 12, 16, 4, 2, 8, load}, &got, NULL), ERR_INVALID);
    placed_done(&got);
}
END_TEST

START_TEST(idle_layer_is_spread)
{
    static const float load[24] = {[12] = 5, 1};
    struct placed got;
    ck_assert_int_eq(place((struct eplb_input){2, 12, 24, 1, 1, 4, load}, &got, NULL), 0);
    for (int e = 0; e < 12; e++)
        ck_assert_uint_eq(got.logcnt[e], 2);
    ck_assert_uint_gt(got.logcnt[12], 2);
    placed_done(&got);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("planner_eplb");
    TCase *tc = tcase_create("eplb");
    tcase_add_test(tc, fixture);
    tcase_add_test(tc, public_readme);
    tcase_add_test(tc, falls_back_to_global);
    tcase_add_test(tc, refuses);
    tcase_add_test(tc, idle_layer_is_spread);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
