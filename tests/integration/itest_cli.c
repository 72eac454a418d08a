/* eepctl against a real cluster: what it says, and with which exit code. */
#include "tests/integration/itest.h"

START_TEST(wrong_use_gets_a_sentence_and_its_exit_code)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    CTL(&c, 2, "scale");
    CTL(&c, 2, "scale", "--to", "many");
    CTL(&c, 2, "frobnicate");
    CTL(&c, 1, "scale", "--to", "9");
    CTL_SAYS("spare");
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "scale", "--to", "2");
    CTL_SAYS("nothing to do");
    CTL(&c, 1, "scale", "--to", "1");
    CTL_SAYS("cannot hold");
    CTL(&c, 1, "drain", "gpu7");
    CTL_SAYS("gpu7");
    CTL(&c, 1, "abort");
    CTL(&c, 0, "scale", "--to", "3", "--dry-run");
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "version");
    CTL(&c, 0, "agents");
    CTL_SAYS("gpu2");
    CTL(&c, 0, "-o", "json", "status");
    json_t *root = json_loads(ctl_out, JSON_DISABLE_EOF_CHECK, NULL);
    ck_assert(json_is_object(root));
    json_decref(root);
    cluster_signal(&c.coordinator, SIGTERM);
    (void)cluster_wait(&c.coordinator, 5000);
    CTL(&c, 3, "status");
    cluster_coordinator_start(&c);
    cluster_wait_agents(&c, 3, 10000);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(one_operation_at_a_time_and_ctrl_c_detaches)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 2});
    CTL(&c, 0, "scale", "--to", "2");
    kill(c.agent[2], SIGSTOP);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "3", NULL});
    cluster_sleep_ms(300);
    CTL(&c, 7, "scale", "--to", "3");
    CTL_SAYS("is running");
    cluster_signal(&scale, SIGINT);
    (void)cluster_wait(&scale, 5000);
    char *text = cluster_read(&c, "scale.log");
    ck_assert_msg(text && strstr(text, "eepctl watch"), "%s", text);
    free(text);
    CTL(&c, 0, "abort");
    kill(c.agent[2], SIGCONT);
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "scale", "--to", "3", "--wait-for-agents=20");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(the_store)
{
    struct cluster c;
    struct cluster_options o = {.agents = 0};
    itest_start(&c, o);
    CTL(&c, 0, "kv", "put", "run/lr", "0.1");
    CTL(&c, 0, "kv", "get", "run/lr");
    CTL_SAYS("0.1");
    CTL(&c, 0, "kv", "put", "run/steps", "7");
    CTL(&c, 0, "kv", "list", "run/");
    CTL_SAYS("run/steps");
    CTL(&c, 0, "kv", "del", "run/lr");
    CTL(&c, 1, "kv", "get", "run/lr");
    CTL_SAYS("run/lr");
    CTL(&c, 0, "kv", "add", "run/steps", "35", "--request", "r1");
    CTL(&c, 0, "kv", "add", "run/steps", "35", "--request", "r1");
    CTL_SAYS("42");
    CTL(&c, 7, "kv", "cas", "run/steps", "0", "--missing");
    CTL_SAYS("it is 42");
    CTL(&c, 0, "kv", "cas", "run/steps", "43", "--expect", "42");
    CTL(&c, 2, "kv", "cas", "run/steps", "43");
    CTL(&c, 2, "kv", "add", "run/steps", "many");
    CTL(&c, 0, "kv", "queue", "push", "q", "item");
    CTL(&c, 0, "kv", "queue", "len", "q");
    CTL(&c, 0, "kv", "queue", "pop", "q");
    CTL_SAYS("item");
    CTL(&c, 1, "kv", "queue", "pop", "q", "--wait", "0.1");
    CTL_SAYS("by the deadline");
    CTL(&c, 2, "kv", "queue", "pop");
    CTL(&c, 0, "kv", "stat");
    CTL_SAYS("durability fsync");
    CTL(&c, 0, "barrier", "list");
    CTL(&c, 1, "barrier", "show", "nobody");
    CTL_SAYS("nobody waits");
    CTL(&c, 0, "kv", "put", "run/e", "1", "--ephemeral");
    /* durable keys come back after kill -9, ephemeral ones do not */
    cluster_signal(&c.coordinator, SIGKILL);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    CTL(&c, 0, "kv", "get", "run/steps");
    CTL_SAYS("43");
    CTL(&c, 1, "kv", "get", "run/e");
    CTL(&c, 1, "kv", "watch", "--from", "1");
    CTL_SAYS("compacted");
    /* a second coordinator on the same state */
    pid_t first = c.coordinator;
    cluster_coordinator_start(&c);
    int code = cluster_wait(&c.coordinator, 5000);
    ck_assert_int_ne(code, 0);
    ck_assert_int_ne(code, -1);
    c.coordinator = first;
    CTL(&c, 0, "kv", "get", "run/steps");
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, wrong_use_gets_a_sentence_and_its_exit_code);
    tcase_add_test(t, one_operation_at_a_time_and_ctrl_c_detaches);
    tcase_add_test(t, the_store);
}

int main(void)
{
    return itest_main("eepctl", add, 120);
}
