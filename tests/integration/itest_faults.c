/* Deaths, with the real daemons under load: of a joiner, of an engine, of an agent, of the coordinator. */
#include "tests/integration/itest.h"

/* A new agent that dies while joining: the old view serves on, and the same command works again. */
START_TEST(a_joiner_that_dies_aborts_the_operation_only)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 4, .loaders = 2, .step_ms = 10});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "6");
    cluster_sleep_ms(200);
    kill(c.agent[3], SIGSTOP); /* it will be asked and never answer */
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "4", NULL});
    cluster_sleep_ms(300);
    cluster_signal(&c.agent[3], SIGKILL);
    int code = cluster_wait(&scale, 20000);
    char *data = cluster_read(&c, "scale.out"), *text = cluster_read(&c, "scale.log");
    ck_assert_msg(code == 6, "exit %d: %s%s", code, data, text);
    ck_assert_msg(strstr(data, "gpu3") || strstr(text, "gpu3"), "%s%s", data, text);
    free(data);
    free(text);
    ck_assert_int_eq(itest_ranks(&c), 2);
    cluster_signal(&c.engine[3], SIGTERM);
    (void)cluster_wait(&c.engine[3], 5000);
    cluster_agent_start(&c, 3);
    cluster_engine_start(&c, 3);
    CTL(&c, 0, "scale", "--to", "4", "--wait-for-agents=20");
    ck_assert_int_eq(itest_ranks(&c), 4);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* With two copies of every expert a dead engine costs its rank, and no request. */
START_TEST(an_engine_that_dies_while_serving_is_repaired_away)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 4, .loaders = 4, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "4");
    itest_feed(&c, "8");
    cluster_sleep_ms(500);
    cluster_signal(&c.engine[1], SIGKILL);
    itest_wait_ranks(&c, 3, 20000);
    cluster_sleep_ms(500);
    cluster_engine_start(&c, 1);
    CTL(&c, 0, "scale", "--to", "4", "--wait-for-agents=20");
    CTL(&c, 0, "verify");
    cluster_sleep_ms(300);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(an_agent_that_dies_while_serving_is_repaired_away)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 4, .loaders = 4, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "4");
    itest_feed(&c, "8");
    cluster_sleep_ms(500);
    cluster_signal(&c.agent[0], SIGKILL);
    cluster_signal(&c.engine[0], SIGKILL);
    itest_wait_ranks(&c, 3, 20000);
    cluster_agent_start(&c, 0);
    cluster_engine_start(&c, 0);
    CTL(&c, 0, "scale", "--to", "4", "--wait-for-agents=20");
    CTL(&c, 0, "verify");
    cluster_sleep_ms(300);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* With no step running: no engine notices, and the coordinator does. */
START_TEST(an_agent_that_dies_while_nothing_is_served_is_repaired_away)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 4, .loaders = 4, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "4");
    cluster_sleep_ms(500);
    cluster_signal(&c.agent[0], SIGKILL);
    cluster_signal(&c.engine[0], SIGKILL);
    itest_wait_ranks(&c, 3, 20000);
    cluster_signal(&c.engine[1], SIGKILL);
    itest_wait_ranks(&c, 2, 20000);
    cluster_sleep_ms(500); /* that agent begins anew */
    cluster_agent_start(&c, 0);
    cluster_engine_start(&c, 0);
    cluster_engine_start(&c, 1);
    CTL(&c, 0, "scale", "--to", "4", "--wait-for-agents=20");
    CTL(&c, 0, "verify");
    itest_feed(&c, "8");
    cluster_sleep_ms(500);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* On two ranks no expert has a second copy: the view waits for the engine, and goes on when it attaches again. */
START_TEST(an_engine_without_copies_elsewhere_is_waited_for)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 2, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    cluster_sleep_ms(500);
    cluster_signal(&c.engine[1], SIGKILL);
    itest_wait_status(&c, "no copy", 10000);
    cluster_engine_start(&c, 1);
    cluster_sleep_ms(2000);
    CTL(&c, 0, "status");
    ck_assert(strstr(ctl_out, "no copy") == NULL);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(the_coordinator_may_die_and_nobody_notices)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "kv", "put", "a", "1");
    itest_feed(&c, "4");
    cluster_sleep_ms(300);
    cluster_signal(&c.coordinator, SIGKILL);
    cluster_sleep_ms(700);
    cluster_coordinator_start(&c);
    CTL(&c, 0, "scale", "--to", "3", "--wait-for-agents=20");
    ck_assert_int_eq(itest_ranks(&c), 3);
    /* and in the middle of an operation */
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "2", NULL});
    cluster_sleep_ms(60);
    cluster_signal(&c.coordinator, SIGKILL);
    cluster_sleep_ms(200);
    cluster_coordinator_start(&c);
    int code = cluster_wait(&scale, 30000);
    ck_assert_msg(code == 0 || code == 6 || code == 3, "exit %d", code);
    cluster_wait_agents(&c, 3, 10000);
    if (itest_ranks(&c) == 3)
        CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, a_joiner_that_dies_aborts_the_operation_only);
    tcase_add_test(t, an_engine_that_dies_while_serving_is_repaired_away);
    tcase_add_test(t, an_agent_that_dies_while_serving_is_repaired_away);
    tcase_add_test(t, an_agent_that_dies_while_nothing_is_served_is_repaired_away);
    tcase_add_test(t, an_engine_without_copies_elsewhere_is_waited_for);
    tcase_add_test(t, the_coordinator_may_die_and_nobody_notices);
}

int main(void)
{
    return suite_main("faults", add, 180);
}
