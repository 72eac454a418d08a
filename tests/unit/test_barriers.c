/* Named barriers: release, retries, deadlines, withdrawal, reuse of a name. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/barriers.h"
#include "tests/harness/suite.h"

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

static int arrive(uint64_t request, const char *name, uint32_t size, const char *member, uint64_t deadline)
{
    return barriers_arrive(b,
                           &(struct barrier_arrival){.request = request, .name = name, .size = size, .member = member,
                                                     .deadline_ns = deadline},
                           &err);
}

static int arrive_expecting(uint64_t request, uint32_t size, const char *member, const char *const *expected)
{
    return barriers_arrive(b,
                           &(struct barrier_arrival){.request = request, .name = "x", .size = size, .member = member,
                                                     .expected = expected, .n_expected = size, .deadline_ns = 100},
                           &err);
}

#define ARRIVE(request, name, size, member, deadline)                                                                  \
    ck_assert_int_eq(arrive(request, name, size, member, deadline), 0)

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
    expect_wake(0, 1, ERR_STALE);
    ck_assert_ptr_nonnull(strstr(wake.text, "retry"));
    ck_assert(!barriers_next_wake(b, 0, &wake));
    ARRIVE(3, "x", 2, "b", 100);
    expect_wake(0, 2, 0);
    uint64_t round = wake.round;
    expect_wake(0, 3, 0);
    ck_assert_uint_eq(wake.round, round);
}
END_TEST

START_TEST(retry_outlives_first_wait)
{
    ARRIVE(1, "x", 2, "a", 100);
    ARRIVE(2, "x", 2, "a", 200);
    barriers_cancel(b, 1); /* its connection is gone, the retry still waits */
    ck_assert(!barriers_next_wake(b, 100, &wake));
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

START_TEST(place_of_a_late_member_is_free)
{
    ARRIVE(1, "x", 2, "a", 10);
    expect_wake(10, 1, ERR_TIMEOUT);
    ARRIVE(2, "x", 2, "b", 100);
    ck_assert(!barriers_next_wake(b, 10, &wake));
    ARRIVE(3, "x", 2, "c", 100);
    expect_wake(10, 2, 0);
    expect_wake(10, 3, 0);
}
END_TEST

START_TEST(ranks_that_are_missing_are_named)
{
    ARRIVE(1, "x", 4, "0", 100);
    ARRIVE(2, "x", 4, "2", 100);
    ck_assert_int_eq(arrive(3, "x", 4, "4", 100), ERR_CONFLICT); /* one too many */
    ck_assert_ptr_nonnull(strstr(err.text, "one too many"));
    expect_wake(100, 1, ERR_TIMEOUT);
    ck_assert_str_eq(wake.text, "barrier 'x': 2 of 4 members are missing at the deadline; missing: 1, 3");
    expect_wake(100, 2, ERR_TIMEOUT);
}
END_TEST

START_TEST(expected_members_are_named)
{
    static const char *const abc[] = {"a", "b", "c"}, *const abd[] = {"a", "b", "d"}, *const aba[] = {"a", "b", "a"};
    ck_assert_int_eq(arrive_expecting(1, 3, "a", aba), ERR_INVALID);
    ck_assert_uint_eq(barriers_count(b), 0);
    ck_assert_int_eq(arrive_expecting(1, 3, "a", abc), 0);
    ck_assert_int_eq(arrive_expecting(2, 3, "b", abd), ERR_CONFLICT);
    ck_assert_int_eq(arrive(2, "x", 3, "d", 100), ERR_CONFLICT);
    ck_assert_ptr_nonnull(strstr(err.text, "one too many"));
    ARRIVE(2, "x", 3, "b", 100);
    expect_wake(100, 1, ERR_TIMEOUT);
    ck_assert_str_eq(wake.text, "barrier 'x': 1 of 3 members are missing at the deadline; missing: c");
    expect_wake(100, 2, ERR_TIMEOUT);
    ARRIVE(1, "x", 3, "z", 100); /* who is there may turn out to be a stranger */
    ck_assert_int_eq(arrive_expecting(2, 3, "a", abc), ERR_CONFLICT);
    ARRIVE(3, "x", 3, "y", 100); /* the refused call has left nothing behind */
    ARRIVE(4, "x", 3, "x", 100);
    expect_wake(0, 1, 0);
    expect_wake(0, 3, 0);
    expect_wake(0, 4, 0);
}
END_TEST

static char shown[256];
static bool show_one(void *user, const char *member, bool arrived)
{
    (void)user;
    size_t at = strlen(shown);
    snprintf(shown + at, sizeof shown - at, "%s%s ", arrived ? "+" : "-", member);
    return true;
}
static bool list_one(void *user, const struct barrier_info *info)
{
    snprintf(shown + strlen(shown), sizeof shown - strlen(shown), "%s:%u/%u ", info->name, info->arrived, info->size);
    return user == NULL;
}

START_TEST(shows_who_waits)
{
    struct barrier_info info;
    ARRIVE(1, "x", 3, "1", 100);
    ARRIVE(2, "y", 2, "a", 90);
    shown[0] = '\0';
    barriers_list(b, list_one, NULL);
    ck_assert_str_eq(shown, "x:1/3 y:1/2 ");
    shown[0] = '\0';
    ck_assert_int_eq(barriers_show(b, "x", &info, show_one, NULL, &err), 0);
    ck_assert_str_eq(shown, "+1 -0 -2 ");
    ck_assert_uint_eq(info.deadline_ns, 100);
    shown[0] = '\0';
    ck_assert_int_eq(barriers_show(b, "y", &info, show_one, NULL, &err), 0);
    ck_assert_str_eq(shown, "+a "); /* nobody has said who else comes */
    ck_assert_int_eq(barriers_show(b, "z", &info, show_one, NULL, &err), ERR_NOTFOUND);
}
END_TEST

/* Arrivals, retries, cancellations at random; a table by hand says who must be released. */
START_TEST(random_arrivals)
{
    enum { SIZE = 4, REQUESTS = 4000 };
    uint64_t state = 11 + (uint64_t)_i, at[SIZE] = {0}; /* request by which a member waits; 0 = it does not */
    for (uint64_t request = 1; request <= REQUESTS; request++) {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        uint32_t r = (uint32_t)(state >> 33), m = r % SIZE;
        const char *const names[SIZE] = {"a", "b", "c", "d"};
        if (r % 7 == 0) {
            if (at[m])
                barriers_cancel(b, at[m]);
            at[m] = 0;
            continue;
        }
        ARRIVE(request, "x", SIZE, names[m], UINT64_MAX);
        if (at[m])
            expect_wake(0, at[m], ERR_STALE);
        at[m] = request;
        bool full = at[0] && at[1] && at[2] && at[3];
        for (int i = 0; full && i < SIZE; i++) {
            ck_assert(barriers_next_wake(b, 0, &wake));
            ck_assert_int_eq(wake.code, 0);
            int who = 0;
            while (who < SIZE && at[who] != wake.request)
                who++;
            ck_assert_int_lt(who, SIZE);
            at[who] = 0;
        }
        ck_assert(!barriers_next_wake(b, 0, &wake));
    }
}
END_TEST

START_TEST(refuses_nonsense)
{
    ARRIVE(1, "x", 3, "a", 100);
    ck_assert_int_eq(arrive(2, "x", 2, "b", 100), ERR_CONFLICT);
    ck_assert_int_eq(arrive(2, "", 2, "b", 100), ERR_INVALID);
    ck_assert_int_eq(arrive(2, "y", 0, "b", 100), ERR_INVALID);
    ck_assert_int_eq(arrive(2, "y", BARRIER_SIZE_MAX + 1, "b", 100), ERR_INVALID);
    ck_assert_int_eq(arrive(2, "y", 2, "", 100), ERR_INVALID);
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
    tcase_add_test(tc, place_of_a_late_member_is_free);
    tcase_add_test(tc, ranks_that_are_missing_are_named);
    tcase_add_test(tc, expected_members_are_named);
    tcase_add_test(tc, shows_who_waits);
    tcase_add_loop_test(tc, random_arrivals, 0, 5);
    tcase_add_test(tc, refuses_nonsense);
    tcase_add_test(tc, size_one_needs_nobody_else);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
