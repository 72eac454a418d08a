/* Named barriers: release, retries, deadlines, withdrawal, reuse of a name. */
#include <check.h>
#include <stdlib.h>

#include "coordinator/barriers.h"

static struct barriers *b;
static struct err err;
static struct barrier_wake wake;

static void setup(void)
{
    b = barriers_new();
    ck_assert_ptr_nonnull(b);
}
static void teardown(void)
{
    barriers_free(b);
}

#define ARRIVE(request, name, size, member, deadline)                                                                  \
    ck_assert_int_eq(barriers_arrive(b, request, name, size, member, deadline, &err), 0)

static void expect_wake(uint64_t now, uint64_t request, int code)
{
    ck_assert(barriers_next_wake(b, now, &wake));
    ck_assert_uint_eq(wake.request, request);
    ck_assert_int_eq(wake.code, code);
}

START_TEST(releases_together)
{
    ARRIVE(1, "x", 3, "a", 100);
    ARRIVE(2, "x", 3, "b", 100);
    ck_assert(!barriers_next_wake(b, 50, &wake));
    ck_assert_uint_eq(barriers_deadline(b), 100);
    ARRIVE(3, "x", 3, "c", 100);
    ck_assert_uint_eq(barriers_deadline(b), 0);
    expect_wake(50, 1, 0);
    expect_wake(50, 2, 0);
    expect_wake(50, 3, 0);
    ck_assert(!barriers_next_wake(b, 1000, &wake));
    ck_assert_uint_eq(barriers_count(b), 0);
    ARRIVE(4, "x", 2, "a", 100); /* the name is free, also for another size */
    ARRIVE(5, "x", 2, "b", 100);
    expect_wake(50, 4, 0);
    expect_wake(50, 5, 0);
}
END_TEST

START_TEST(retry_counts_once)
{
    ARRIVE(1, "x", 2, "a", 100);
    ARRIVE(2, "x", 2, "a", 100);
    ck_assert(!barriers_next_wake(b, 0, &wake));
    ARRIVE(3, "x", 2, "b", 100);
    expect_wake(0, 1, 0);
    expect_wake(0, 2, 0);
    expect_wake(0, 3, 0);
}
END_TEST

START_TEST(retry_outlives_first_wait)
{
    ARRIVE(1, "x", 2, "a", 100);
    ARRIVE(2, "x", 2, "a", 200);
    barriers_cancel(b, 1); /* its connection is gone, the retry still waits */
    ARRIVE(3, "x", 2, "b", 200);
    expect_wake(0, 2, 0);
    expect_wake(0, 3, 0);
    ck_assert(!barriers_next_wake(b, 1000, &wake));
}
END_TEST

START_TEST(deadline_names_who_is_there)
{
    ARRIVE(1, "x", 4, "a", 100);
    ARRIVE(2, "x", 4, "b", 100);
    ARRIVE(3, "x", 4, "c", 200);
    expect_wake(100, 1, ERR_TIMEOUT);
    ck_assert_str_eq(wake.text, "barrier 'x': 1 of 4 members are missing at the deadline; arrived: a, b, c");
    expect_wake(100, 2, ERR_TIMEOUT);
    ck_assert_str_eq(wake.text, "barrier 'x': 1 of 4 members are missing at the deadline; arrived: a, b, c");
    ck_assert(!barriers_next_wake(b, 100, &wake));
    ck_assert_uint_eq(barriers_deadline(b), 200);
    expect_wake(200, 3, ERR_TIMEOUT);
    ck_assert_str_eq(wake.text, "barrier 'x': 3 of 4 members are missing at the deadline; arrived: c");
    ck_assert_uint_eq(barriers_count(b), 0);
}
END_TEST

START_TEST(withdrawn_arrival_does_not_release)
{
    ARRIVE(1, "x", 2, "a", 100);
    barriers_cancel(b, 1);
    ck_assert_uint_eq(barriers_count(b), 0);
    ARRIVE(2, "x", 2, "b", 100);
    ck_assert(!barriers_next_wake(b, 0, &wake));
    ARRIVE(3, "x", 3 - 1, "a", 100);
    expect_wake(0, 2, 0);
    expect_wake(0, 3, 0);
}
END_TEST

START_TEST(place_of_a_withdrawn_member_is_free)
{
    ARRIVE(1, "x", 2, "a", 10);
    ARRIVE(2, "x", 2, "a", 100);
    expect_wake(10, 1, ERR_TIMEOUT); /* a still waits by request 2 */
    ARRIVE(3, "x", 2, "c", 100);
    expect_wake(10, 2, 0);
    expect_wake(10, 3, 0);
}
END_TEST

START_TEST(refuses_nonsense)
{
    ARRIVE(1, "x", 3, "a", 100);
    ck_assert_int_eq(barriers_arrive(b, 2, "x", 2, "b", 100, &err), ERR_CONFLICT);
    ck_assert_int_eq(barriers_arrive(b, 2, "", 2, "b", 100, &err), ERR_INVALID);
    ck_assert_int_eq(barriers_arrive(b, 2, "y", 0, "b", 100, &err), ERR_INVALID);
    ck_assert_int_eq(barriers_arrive(b, 2, "y", BARRIER_SIZE_MAX + 1, "b", 100, &err), ERR_INVALID);
    ck_assert_int_eq(barriers_arrive(b, 2, "y", 2, "", 100, &err), ERR_INVALID);
    ck_assert_uint_eq(barriers_count(b), 1);
}
END_TEST

START_TEST(size_one_needs_nobody_else)
{
    ARRIVE(1, "x", 1, "a", 100);
    expect_wake(0, 1, 0);
    ck_assert_uint_eq(barriers_count(b), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("barriers");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, releases_together);
    tcase_add_test(tc, retry_counts_once);
    tcase_add_test(tc, retry_outlives_first_wait);
    tcase_add_test(tc, deadline_names_who_is_there);
    tcase_add_test(tc, withdrawn_arrival_does_not_release);
    tcase_add_test(tc, place_of_a_withdrawn_member_is_free);
    tcase_add_test(tc, refuses_nonsense);
    tcase_add_test(tc, size_one_needs_nobody_else);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
