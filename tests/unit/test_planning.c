/* Plans on threads: what comes back is what the planner makes, whatever else is being made, and nothing is left behind.
 */
#include <check.h>
#include <poll.h>

#include "coordinator/planning.h"
#include "tests/harness/suite.h"
#include "tests/placement/cases.h"

/* A job owns its input. */
static struct plan_job *job_new(const struct case_shape *shape, uint32_t layers, uint64_t seq)
{
    struct placement_case c;
    struct plan_job *job = calloc(1, sizeof *job);
    ck_assert_ptr_nonnull(job);
    case_init(&c, shape, layers, CASE_LOGNORMAL, false, seq);
    free(c.before);
    job->in = c.in;
    job->seq = seq;
    plan_options_default(&job->options);
    return job;
}

static struct plan_job *next(struct planning *planning)
{
    struct plan_job *job;
    struct pollfd poll_fd = {.fd = planning_fd(planning), .events = POLLIN};
    while (!(job = planning_completed(planning)))
        ck_assert_int_eq(poll(&poll_fd, 1, 30000), 1);
    return job;
}

START_TEST(plans_come_back)
{
    enum { N = 24 };
    struct planning *planning = NULL;
    struct err err = {0};
    bool seen[N] = {false};
    ck_assert_int_eq(planning_new(&planning, &err), 0);
    ck_assert_ptr_null(planning_completed(planning));
    for (uint64_t i = 0; i < N; i++)
        planning_submit(planning, job_new(&case_shapes[i % CASE_SHAPES], 1 + (uint32_t)i % 3, i));
    for (int i = 0; i < N; i++) {
        struct plan_job *job = next(planning), *same;
        ck_assert_msg(job->code == 0, "%s", job->err.text);
        ck_assert(!seen[job->seq]);
        seen[job->seq] = true;
        same = job_new(&case_shapes[job->seq % CASE_SHAPES], 1 + (uint32_t)job->seq % 3, job->seq);
        plan_job_run(same);
        ck_assert_uint_eq(expert_map_digest(job->plan->target), expert_map_digest(same->plan->target));
        ck_assert_uint_eq(job->plan->n_moves, same->plan->n_moves);
        plan_job_free(same);
        plan_job_free(job);
    }
    struct pollfd poll_fd = {.fd = planning_fd(planning), .events = POLLIN};
    ck_assert_int_eq(poll(&poll_fd, 1, 0), 0); /* and the loop is not woken for nothing */
    planning_free(planning);
}
END_TEST

START_TEST(mistakes_come_back)
{
    struct planning *planning = NULL;
    struct err err = {0};
    ck_assert_int_eq(planning_new(&planning, &err), 0);
    struct plan_job *job = job_new(&case_shapes[0], 1, 1);
    ((double *)(uintptr_t)job->in.load)[3] = -1;
    planning_submit(planning, job);
    ck_assert_ptr_eq(next(planning), job);
    ck_assert_int_eq(job->code, ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(job->err.text, "load of expert 3"));
    plan_job_free(job);
    planning_free(planning);
    planning_free(NULL);
}
END_TEST

/* It ends while plans are being made, and with some that nobody has fetched. */
START_TEST(it_ends_with_plans_under_way)
{
    struct err err = {0};
    for (int round = 0; round < 8; round++) {
        struct planning *planning = NULL;
        ck_assert_int_eq(planning_new(&planning, &err), 0);
        for (uint64_t i = 0; i < 6; i++)
            planning_submit(planning, job_new(&case_shapes[(size_t)round], 4, i));
        if (round % 2)
            plan_job_free(next(planning));
        planning_free(planning);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("planning");
    TCase *tc = tcase_create("planning");
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, plans_come_back);
    tcase_add_test(tc, mistakes_come_back);
    tcase_add_test(tc, it_ends_with_plans_under_way);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
