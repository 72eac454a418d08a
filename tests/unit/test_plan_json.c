/* Planning offline: both policies through JSON, the plan carried out on a model of the slots, and refused input. */
#include <check.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/plan_json.h"
#include "tests/harness/suite.h"

static json_t *parse(const char *text)
{
    json_error_t error;
    json_t *value = json_loads(text, 0, &error);
    ck_assert_msg(value, "%s: %s", error.text, text);
    return value;
}

static json_t *must(enum plan_policy policy, const char *text)
{
    json_t *in = parse(text), *out = NULL;
    struct err err = {0};
    ck_assert_msg(plan_json(policy, in, &out, &err) == 0, "%s", err.text);
    json_decref(in);
    return out;
}

static json_int_t cell(const json_t *matrix, size_t row, size_t column)
{
    const json_t *value = json_array_get(json_array_get(matrix, row), column);
    ck_assert(json_is_integer(value));
    return json_integer_value(value);
}

START_TEST(eplb)
{
    json_t *out = must(PLAN_EPLB, "{\"load\": [[90,132,40,61,104,165,39,4,73,56,183,86],"
                                  "[20,107,104,64,19,197,187,157,172,86,16,27]],"
                                  "\"physical\": 16, \"groups\": 4, \"nodes\": 2, \"gpus\": 8}");
    json_t *want = parse("[[5,6,5,7,8,4,3,4,10,9,10,2,0,1,11,1],[7,10,6,8,6,11,8,9,2,4,5,1,5,0,3,1]]");
    ck_assert(json_equal(json_object_get(out, "phy2log"), want));
    ck_assert_int_eq(cell(json_object_get(out, "logcnt"), 0, 5), 2);
    json_decref(want);
    json_decref(out);
}
END_TEST

/* 3 ranks of 3 slots; rank 0 leaves, two join as 4 and 3: target ranks are old 1, old 2, joiner 4, joiner 3. */
#define MIXED                                                                                                          \
    "{\"load\": [[50,10,30,5,20,15]], \"physical\": 12, \"groups\": 1, \"nodes\": 1, \"gpus\": 4, "                    \
    "\"current\": [[0,1,2, 3,4,5, 0,3,-1]], \"slots_per_rank\": 3, \"leave\": [0], \"join\": [4,3], "                  \
    "\"target_balance\": 0.95, \"expert_bytes\": 100}"

START_TEST(elastic_is_carried_out)
{
    json_t *out = must(PLAN_ELASTIC, MIXED);
    const json_t *moves = json_object_get(out, "moves"), *phy2log = json_object_get(out, "phy2log"), *move;
    /* what lies in the slots of old ranks 0 to 2 and joiners 3 and 4 */
    int held[5][3] = {{0, 1, 2}, {3, 4, 5}, {0, 3, -1}, {-1, -1, -1}, {-1, -1, -1}};
    const int old_of[4] = {1, 2, 4, 3};
    size_t i;
    json_int_t round = 0, before = json_integer_value(json_object_get(out, "rounds_before_commit")), arrivals[2] = {0};
    json_array_foreach(moves, i, move)
    {
        json_int_t dst = json_integer_value(json_array_get(move, 1)), src = json_integer_value(json_array_get(move, 2));
        json_int_t expert = json_integer_value(json_array_get(move, 3)),
                   at = json_integer_value(json_array_get(move, 4));
        ck_assert_int_ge(at, round);
        round = at;
        ck_assert(src != 0 || at < before); /* a leaver sends only before the commit */
        bool there = false;
        for (int slot = 0; slot < 3; slot++)
            there |= held[src][slot] == expert;
        ck_assert_msg(there, "rank %d has no expert %d", (int)src, (int)expert);
        held[old_of[dst / 3]][dst % 3] = (int)expert;
        arrivals[at < before] += old_of[dst / 3] != src;
    }
    for (int slot = 0; slot < 12; slot++)
        if (cell(phy2log, 0, (size_t)slot) >= 0)
            ck_assert_int_eq(held[old_of[slot / 3]][slot % 3], cell(phy2log, 0, (size_t)slot));
    ck_assert_int_eq(arrivals[1], json_integer_value(json_object_get(out, "arrivals_before_commit")));
    ck_assert_int_eq(arrivals[0] + arrivals[1], json_integer_value(json_object_get(out, "arrivals_total")));
    ck_assert_int_eq(json_integer_value(json_object_get(out, "bytes_total")), 100 * (arrivals[0] + arrivals[1]));
    ck_assert_int_eq(json_integer_value(json_object_get(json_object_get(out, "bounds"), "hard")), 2); /* 1 and 2 */
    for (int e = 0; e < 6; e++)
        ck_assert_int_ge(cell(json_object_get(out, "logcnt"), 0, (size_t)e), 1);
    static const char *const numbers[] = {"balance_before", "balance_at_commit", "balance_after", "balance_ceiling"};
    for (size_t k = 0; k < 4; k++)
        ck_assert(json_is_real(json_object_get(out, numbers[k])));
    json_t *again = must(PLAN_ELASTIC, MIXED);
    ck_assert(json_equal(out, again));
    json_decref(again);
    json_decref(out);
}
END_TEST

START_TEST(rebalance_and_samples)
{
    json_t *out = must(PLAN_ELASTIC, "{\"load\": [[[9,1,1,1]],[[7,3,1,1]]], \"physical\": 6, \"gpus\": 2, "
                                     "\"current\": [[0,1,2, 0,3,-1]], \"slots_per_rank\": 3}");
    ck_assert_uint_eq(json_array_size(json_object_get(out, "balance_samples")), 2);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "rounds_after_commit")), 0);
    ck_assert(json_equal(json_object_get(out, "phy2log"), json_object_get(out, "phy2log_at_commit")));
    ck_assert(json_real_value(json_object_get(out, "balance_after")) >=
              json_real_value(json_object_get(out, "balance_before")) - 1e-9);
    json_decref(out);
}
END_TEST

/* Two ranks of two slots, expert 0 on both: by halves 10 + 4 against 10; entries can make it 8 + 4 against 12. */
#define UNEVEN                                                                                                         \
    "{\"load\": [[20,4,0]], \"physical\": 4, \"gpus\": 2, \"slots_per_rank\": 2, \"current\": [[0,1, 0,2]]"

START_TEST(entries_are_shown)
{
    json_t *even = must(PLAN_ELASTIC, UNEVEN "}"), *out = must(PLAN_ELASTIC, UNEVEN ", \"uneven\": true}");
    ck_assert_ptr_null(json_object_get(even, "entries"));
    ck_assert_double_eq_tol(json_real_value(json_object_get(out, "balance_after")), 1, 1e-3);
    ck_assert_int_eq(json_integer_value(json_object_get(out, "arrivals_total")), 0);
    const json_t *entries = json_object_get(out, "entries");
    ck_assert(json_equal(json_object_get(out, "entries_at_commit"), entries));
    ck_assert_int_eq(cell(entries, 0, 1), 1);
    ck_assert_int_eq(cell(entries, 0, 3), 1);
    ck_assert_int_eq(cell(entries, 0, 0) * 12, cell(entries, 0, 2) * 8); /* shares of 8 and 12 */
    json_decref(out);

    out = must(PLAN_ELASTIC, UNEVEN ", \"uneven\": true, \"entries\": [[2,1, 3,1]]}");
    ck_assert_double_eq_tol(json_real_value(json_object_get(out, "balance_before")), 1, 1e-9);
    json_decref(out);
    json_decref(even);
}
END_TEST

/* The good input with one field replaced (value NULL: taken away). */
static void refused(enum plan_policy policy, const char *key, const char *value, const char *sentence)
{
    json_t *in = parse(MIXED), *out = NULL;
    struct err err = {0};
    json_error_t error;
    if (value)
        json_object_set_new(in, key, json_loads(value, JSON_DECODE_ANY, &error));
    else
        json_object_del(in, key);
    int rc = plan_json(policy, in, &out, &err);
    ck_assert_msg(rc == ERR_INVALID || rc == ERR_LIMIT, "%s %s: %d", key, value ? value : "", rc);
    ck_assert_ptr_null(out);
    ck_assert_msg(strstr(err.text, sentence), "%s %s: %s", key, value ? value : "", err.text);
    json_decref(in);
}

START_TEST(refuses)
{
    refused(PLAN_EPLB, "load", NULL, "`load` must be");
    refused(PLAN_EPLB, "load", "[]", "`load` must be");
    refused(PLAN_EPLB, "load", "[[1,2],[3]]", "layer 1 of `load`");
    refused(PLAN_EPLB, "load", "[[1,-2]]", "must be a number >= 0");
    refused(PLAN_EPLB, "load", "[[1,\"x\"]]", "must be a number >= 0");
    refused(PLAN_EPLB, "load", "[[[1,2]],[[1,2],[3,4]]]", "the same 1 layers");
    refused(PLAN_EPLB, "physical", NULL, "`physical` is missing");
    refused(PLAN_EPLB, "physical", "13", "13 physical slots do not divide by 4 GPUs");
    refused(PLAN_EPLB, "physical", "4", "6 experts do not fit into 4");
    refused(PLAN_EPLB, "groups", "4", "6 experts do not divide by 4 groups");
    refused(PLAN_EPLB, "gpus", "0", "`gpus` must be a whole number from 1");
    refused(PLAN_EPLB, "gpus", "1.5", "`gpus` must be a whole number");
    refused(PLAN_ELASTIC, "current", NULL, "`current` must be");
    refused(PLAN_ELASTIC, "current", "[[0,1,2,3,4,5,0,3,9]]", "must be an expert below 6, or -1");
    refused(PLAN_ELASTIC, "current", "[[0,1,2,3,4,-1,0,3,-1]]", "expert 5 of layer 0 is nowhere");
    refused(PLAN_ELASTIC, "current", "[[0,1,2,3]]", "no ranks of 3");
    refused(PLAN_ELASTIC, "slots_per_rank", NULL, "`slots_per_rank` is missing");
    refused(PLAN_ELASTIC, "physical", "13", "`physical` is 13");
    refused(PLAN_ELASTIC, "leave", "[3]", "none of 0 to 2");
    refused(PLAN_ELASTIC, "leave", "[0,0]", "rank 0 twice");
    refused(PLAN_ELASTIC, "leave", "[0,1]", "are not the 4 `gpus`");
    refused(PLAN_ELASTIC, "join", "[3,5]", "from 3 to 4");
    refused(PLAN_ELASTIC, "join", "[3,3]", "rank 3 twice");
    refused(PLAN_ELASTIC, "target_balance", "1.5", "target balance is 1.5");
    refused(PLAN_ELASTIC, "target_balance", "\"high\"", "must be a number");
    refused(PLAN_ELASTIC, "uneven", "1", "`uneven` must be true or false");
    refused(PLAN_ELASTIC, "entries", "[]", "`entries` must be [layers]");
    refused(PLAN_ELASTIC, "entries", "[[1,1,1]]", "layer 0 of `entries` must be an array of 9");
    refused(PLAN_ELASTIC, "entries", "[[1,1,1,1,1,1,1,1,1]]", "slot 8 of layer 0 of `entries`");
    refused(PLAN_ELASTIC, "entries", "[[1,1,0,1,1,1,1,1,0]]", "slot 2 of layer 0 of `entries`");
    refused(PLAN_ELASTIC, "entries", "[[65,1,1,1,1,1,1,1,0]]", "slot 0 of layer 0 of `entries`");
    refused(PLAN_ELASTIC, "entries", "[[60,1,1,1,1,1,9,1,0]]", "2 replicas of expert 0 of layer 0 have 69 entries");
    refused(PLAN_ELASTIC, "lambda", "-1", "lambda is -1");
    refused(PLAN_ELASTIC, "cross_cost", "0", "costs 0");
    refused(PLAN_ELASTIC, "dip", "0", "dip is 0");
    json_t *in = parse("[1]"), *out = NULL;
    ck_assert_int_eq(plan_json(PLAN_ELASTIC, in, &out, NULL), ERR_INVALID);
    json_decref(in);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("plan_json");
    TCase *tc = tcase_create("plan_json");
    tcase_add_test(tc, eplb);
    tcase_add_test(tc, elastic_is_carried_out);
    tcase_add_test(tc, rebalance_and_samples);
    tcase_add_test(tc, entries_are_shown);
    tcase_add_test(tc, refuses);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
