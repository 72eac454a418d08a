/* Arrival sets and the deep copies of the durable state. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "common/err.h"
#include "coordinator/arrivals.h"
#include "coordinator/durable.h"
#include "tests/harness/suite.h"

START_TEST(counts_once_by_incarnation)
{
    struct arrivals set;
    arrivals_init(&set);
    ck_assert(arrivals_complete(&set));
    ck_assert_uint_eq(arrivals_max(&set), 0);
    ck_assert_uint_eq(arrivals_min(&set), UINT64_MAX);
    ck_assert_int_eq(arrivals_expect(&set, 4, 100), 0);
    ck_assert_int_eq(arrivals_expect(&set, 4, 100), 0); /* one expectation */
    ck_assert_int_eq(arrivals_expect(&set, 9, 200), 0);
    ck_assert_uint_eq(set.missing, 2);
    ck_assert_int_eq(arrivals_add(&set, 4, 101, 1), ARRIVAL_STRANGER);
    ck_assert_int_eq(arrivals_add(&set, 5, 100, 1), ARRIVAL_STRANGER);
    ck_assert_int_eq(arrivals_add(&set, 4, 100, 30), ARRIVAL_COUNTED);
    ck_assert_int_eq(arrivals_add(&set, 4, 100, 99), ARRIVAL_AGAIN);
    ck_assert(arrivals_has(&set, 4));
    ck_assert(!arrivals_has(&set, 9));
    ck_assert(!arrivals_has(&set, 5));
    ck_assert(!arrivals_complete(&set));
    ck_assert_int_eq(arrivals_expect(&set, 4, 100), 0); /* expecting again does not forget */
    ck_assert_int_eq(arrivals_add(&set, 9, 200, 20), ARRIVAL_COUNTED);
    ck_assert(arrivals_complete(&set));
    ck_assert_uint_eq(arrivals_max(&set), 30); /* the repeated arrival brought nothing */
    ck_assert_uint_eq(arrivals_min(&set), 20);
    ck_assert_int_eq(arrivals_expect(&set, 9, 201), 0); /* a new process of the same agent has not arrived */
    ck_assert(!arrivals_complete(&set));
    ck_assert_int_eq(arrivals_add(&set, 9, 200, 5), ARRIVAL_STRANGER);
    ck_assert_uint_eq(arrivals_min(&set), 30);
    arrivals_reset(&set);
    ck_assert(arrivals_complete(&set));
    ck_assert_int_eq(arrivals_add(&set, 4, 100, 1), ARRIVAL_STRANGER);
    arrivals_done(&set);
}
END_TEST

START_TEST(many)
{
    struct arrivals set;
    arrivals_init(&set);
    for (uint32_t i = 0; i < 300; i++)
        ck_assert_int_eq(arrivals_expect(&set, i, i + 1), 0);
    for (uint32_t i = 0; i < 300; i++) {
        ck_assert(!arrivals_complete(&set));
        ck_assert_int_eq(arrivals_add(&set, 299 - i, 300 - i, i), ARRIVAL_COUNTED);
    }
    ck_assert(arrivals_complete(&set));
    ck_assert_uint_eq(arrivals_max(&set), 299);
    ck_assert_uint_eq(arrivals_min(&set), 0);
    arrivals_done(&set);
}
END_TEST

START_TEST(durable_is_copied_deeply)
{
    struct durable a = {.epoch = 7, .map_version = 9, .op = 3}, b;
    a.view = view_new(2);
    a.model = model_new(1, 2, 2, 0);
    a.open = (struct op_record){.op = 3, .n = 2, .n_old = 1, .key = "k"};
    a.open.parties = calloc(2, sizeof *a.open.parties);
    a.open.stays = calloc(2, 1);
    strcpy(a.open.parties[1].id, "g1");
    a.open.stays[1] = 1;
    a.commit = (struct commit_record){.epoch = 7, .view = view_ref(a.view), .n_old = 1, .step = 5};
    a.commit.old = calloc(1, sizeof *a.commit.old);
    strcpy(a.commit.old[0].id, "g0");
    a.ended = (struct op_record){.op = 2, .n = 0};

    ck_assert_int_eq(durable_copy(&b, &a), 0);
    strcpy(a.open.parties[1].id, "xx");
    a.open.stays[1] = 0;
    strcpy(a.commit.old[0].id, "yy");
    durable_done(&a);
    ck_assert_ptr_null(a.view);
    ck_assert_str_eq(b.open.parties[1].id, "g1");
    ck_assert_uint_eq(b.open.stays[1], 1);
    ck_assert_str_eq(b.open.key, "k");
    ck_assert_str_eq(b.commit.old[0].id, "g0");
    ck_assert_uint_eq(b.commit.step, 5);
    ck_assert_uint_eq(b.view->n, 2);
    ck_assert_ptr_eq(b.view, b.commit.view);
    ck_assert_uint_eq(b.ended.op, 2);
    ck_assert_ptr_null(b.ended.parties);
    durable_done(&b);

    struct durable none = {.epoch = 1};
    ck_assert_int_eq(durable_copy(&b, &none), 0);
    durable_done(&b);
    durable_done(&none);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("arrivals");
    TCase *tc = tcase_create("arrivals");
    tcase_add_test(tc, counts_once_by_incarnation);
    tcase_add_test(tc, many);
    tcase_add_test(tc, durable_is_copied_deeply);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
