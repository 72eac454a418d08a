/* Experts that nobody has in memory, and restores that meet faults of their own: with the real daemons under load; nobody
 * starts again what was killed. */
#include <unistd.h>

#include "tests/integration/itest.h"

#define QUICK "--slots", "8", "--lead-ms", "100", "--heartbeat-ms", "200"

/* Rank 3 is dead, rank 1 has lost its engine, and its agent, the only one that has some experts, stands still while they
 * are to be read from it. */
static void stand_still(struct cluster *c, const char *dispatch)
{
    itest_serve_four(c, (struct cluster_options){
                 .layout = "fused", .dispatch = dispatch,
                 .coordinator_args = {QUICK, "--lease-ms", "3000", "--reload-after-ms", "1000", NULL}});
    kill(c->agent[1], SIGSTOP); /* together: the first death alone is repaired without */
    itest_kill_rank(c, 3);
    cluster_signal(&c->engine[1], SIGKILL);
    kill(c->agent[1], SIGCONT);
    itest_wait_status(c, "no copy on the 2 ranks that are left", 10000);
    kill(c->agent[1], SIGSTOP);
    itest_wait_status(c, "phase RELOAD", 10000);
}

static void serves_all(struct cluster *c)
{
    itest_wait_ranks(c, 2, 30000);
    CTL(c, 0, "verify");
    cluster_sleep_ms(300);
    itest_fed(c);
    CTL(c, 0, "status");
    ck_assert_msg(!strstr(ctl_out, "degraded"), "%s", ctl_out);
    ck_assert_int_eq(cluster_stop(c, false), 0);
}

START_TEST(a_source_that_stands_still_is_waited_for)
{
    struct cluster c;
    stand_still(&c, "replicated");
    kill(c.agent[1], SIGCONT);
    serves_all(&c);
}
END_TEST

START_TEST(the_coordinator_dies_while_experts_are_read)
{
    struct cluster c;
    stand_still(&c, NULL);
    cluster_signal(&c.coordinator, SIGKILL);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    kill(c.agent[1], SIGCONT);
    serves_all(&c);
}
END_TEST

/* It has the memory of a source and no room for all; the repair that has begun is overtaken, and again when it is back. */
START_TEST(another_engine_dies_while_experts_are_read)
{
    struct cluster c;
    stand_still(&c, NULL);
    cluster_signal(&c.engine[2], SIGKILL);
    itest_wait_status(&c, "no copy on the 1 ranks that are left", 10000);
    ck_assert_int_eq(cluster_engine_start(&c, 2), 0);
    kill(c.agent[1], SIGCONT);
    serves_all(&c);
}
END_TEST

/* The source dies in the middle, with the last copies; it has been said whom the view waits for. */
START_TEST(the_source_dies_while_it_is_read_from)
{
    struct cluster c;
    stand_still(&c, NULL);
    cluster_signal(&c.agent[1], SIGKILL);
    itest_wait_status(&c, "no agent has the checkpoint", 10000);
    ck_assert_int_eq(itest_ranks(&c), 4);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Nothing could ever bring them back: agents that have a checkpoint of the same shape cannot, either. */
START_TEST(what_an_engine_has_sealed_is_not_masked)
{
    struct cluster c;
    itest_serve_four(&c, (struct cluster_options){.layout = "fused", .coordinator_args = {QUICK, "--lease-ms", "1500", "--on-lost-experts", "mask", NULL}});
    itest_kill_two(&c);
    itest_wait_status(&c, "no agent has the checkpoint", 10000);
    cluster_sleep_ms(500);
    ck_assert_int_eq(itest_ranks(&c), 4);
    CTL(&c, 0, "history");
    ck_assert_msg(!strstr(ctl_out, "cannot read experts again"), "%s", ctl_out);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, a_source_that_stands_still_is_waited_for);
    tcase_add_test(t, the_coordinator_dies_while_experts_are_read);
    tcase_add_test(t, another_engine_dies_while_experts_are_read);
    tcase_add_test(t, the_source_dies_while_it_is_read_from);
    tcase_add_test(t, what_an_engine_has_sealed_is_not_masked);
}

int main(void)
{
    return suite_main("mask", add, 120);
}
