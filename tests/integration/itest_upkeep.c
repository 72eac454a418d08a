/* What an operator does beside scaling, and what the coordinator does by itself: pause and resume, drains that a script
 * can rely on, agents that are stopped in the middle of an operation, views that are given up, the way back to full
 * strength, engines that hang.  With the real daemons under load. */
#include "tests/integration/itest.h"

static const char *const quick[] = {"--slots", "8", "--lead-ms", "100", "--lease-ms", "1500", "--heartbeat-ms", "200"};

static struct cluster_options with(struct cluster_options o, const char *const *more)
{
    int n = 0;
    for (; n < (int)(sizeof quick / sizeof quick[0]); n++)
        o.coordinator_args[n] = quick[n];
    for (int i = 0; more && more[i]; i++)
        o.coordinator_args[n++] = more[i];
    return o;
}

/* The end of a command that was started before. */
static int ended(struct cluster *c, pid_t *pid, const char *name, int timeout_ms)
{
    char file[64];
    int code = cluster_wait(pid, timeout_ms);
    ctl_out[0] = '\0';
    static const char *const ends[] = {"out", "log"};
    for (int i = 0; i < 2; i++) {
        snprintf(file, sizeof file, "%s.%s", name, ends[i]);
        char *text = cluster_read(c, file);
        size_t used = strlen(ctl_out);
        snprintf(ctl_out + used, sizeof ctl_out - used, "%s", text ? text : "");
        free(text);
    }
    return code;
}

/* The supervisor: starts engines again that have ended. */
static void supervise(struct cluster *c)
{
    for (int i = 0; i < c->options.agents; i++)
        if (c->agent[i] > 0 && (cluster_wait(&c->engine[i], 0) >= 0 || !c->engine[i]))
            cluster_engine_start(c, i);
}

static void supervise_until(struct cluster *c, const char *status_says, int timeout_ms)
{
    for (uint64_t end = cluster_now_ms() + (uint64_t)timeout_ms; cluster_now_ms() < end; cluster_sleep_ms(100)) {
        supervise(c);
        (void)cluster_ctl(c, ctl_out, sizeof ctl_out, "status", NULL);
        if (strstr(ctl_out, status_says))
            return;
    }
    ck_abort_msg("status never said \"%s\": %s; logs in %s", status_says, ctl_out, c->dir);
}

START_TEST(paused_operations_stand_still_and_go_on)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    CTL(&c, 0, "pause", "--reason", "the switches are replaced");
    CTL(&c, 7, "scale", "--to", "3");
    CTL_SAYS("the switches are replaced");
    CTL_SAYS("eepctl resume");
    CTL(&c, 0, "scale", "--to", "3", "--dry-run");
    CTL(&c, 0, "status");
    CTL_SAYS("operations are paused since ");
    /* it outlasts the coordinator */
    cluster_signal(&c.coordinator, SIGKILL);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    ck_assert_int_eq(cluster_wait_agents(&c, 3, 20000), 0);
    CTL(&c, 7, "scale", "--to", "3");
    CTL(&c, 0, "resume");
    CTL(&c, 0, "resume");

    /* one that runs: it waits for an agent until the pause has come, and so stands still */
    kill(c.agent[2], SIGSTOP);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "3", NULL});
    itest_wait_status(&c, "phase ALLOCATE", 5000);
    CTL(&c, 0, "pause");
    kill(c.agent[2], SIGCONT);
    itest_wait_status(&c, "awaited: `eepctl resume`", 5000);
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "resume");
    ck_assert_msg(ended(&c, &scale, "scale", 20000) == 0, "%s", ctl_out);
    ck_assert_int_eq(itest_ranks(&c), 3);
    CTL(&c, 0, "history", "--phases");
    CTL_SAYS("ALLOCATE");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(a_drain_says_that_the_agent_is_safe_to_terminate)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "drain", "gpu2"); /* it never served */
    CTL_SAYS("gpu2: safe to terminate");
    CTL(&c, 1, "drain", "gpu9");
    CTL(&c, 0, "scale", "--to", "3");
    itest_feed(&c, "4");
    /* behind an operation that is under way */
    CTL(&c, 0, "pause");
    pid_t drain = cluster_ctl_start(&c, "drain", (const char *[]){"drain", "gpu0", NULL});
    cluster_sleep_ms(500);
    ck_assert_int_eq(cluster_wait(&drain, 0), -1);
    CTL(&c, 0, "resume");
    ck_assert_msg(ended(&c, &drain, "drain", 20000) == 0, "%s", ctl_out);
    CTL_SAYS("gpu0: safe to terminate");
    CTL(&c, 0, "drain", "gpu0"); /* and once more */
    CTL_SAYS("gpu0: safe to terminate");
    CTL(&c, 1, "drain", "gpu1"); /* one rank cannot hold all experts */
    ck_assert_msg(!strstr(ctl_out, "safe to terminate"), "%s", ctl_out);
    cluster_signal(&c.agent[0], SIGKILL);
    cluster_sleep_ms(300);
    itest_fed(&c);
    cluster_signal(&c.engine[0], SIGKILL); /* its agent is gone */
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(a_rank_that_is_stopped_in_an_operation_aborts_it_and_is_drained)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 4, .loaders = 3, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "3");
    itest_feed(&c, "4");
    kill(c.agent[3], SIGSTOP);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "4", NULL});
    itest_wait_status(&c, "phase ALLOCATE", 5000);
    cluster_signal(&c.agent[1], SIGTERM);
    ck_assert_msg(ended(&c, &scale, "scale", 10000) == 6, "%s", ctl_out);
    CTL_SAYS("gpu1 is being stopped");
    kill(c.agent[3], SIGCONT);
    itest_wait_ranks(&c, 2, 20000);
    ck_assert_int_eq(cluster_wait(&c.agent[1], 10000), 0);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    cluster_signal(&c.engine[1], SIGKILL);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* It asks to be drained, which two ranks cannot do; then it goes nevertheless. */
START_TEST(a_rank_that_cannot_be_drained_stops_after_its_limit)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){
                        .agents = 2, .loaders = 2, .step_ms = 5, .agent_args = {"--stop-after", "1000", NULL}});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    uint64_t began = cluster_now_ms();
    kill(c.agent[1], SIGTERM);
    ck_assert_int_eq(cluster_wait(&c.agent[1], 10000), 0);
    uint64_t took = cluster_now_ms() - began;
    ck_assert_msg(took >= 1000 && took < 5000, "after %llu ms", (unsigned long long)took);
    char *text = cluster_read(&c, "agent-1.log");
    ck_assert_msg(strstr(text, "event=stopping-undrained waited_ms=1000"), "%s", text);
    free(text);
    itest_wait_status(&c, "no copy", 10000);
    CTL(&c, 0, "restart"); /* its weights are gone */
    (void)cluster_wait(&c.engine[1], 5000);
    cluster_agent_start(&c, 1);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "2", "--wait-for-agents=20", NULL});
    supervise_until(&c, "operation 2: start to 2 ranks, done", 20000);
    ck_assert_msg(ended(&c, &scale, "scale", 5000) == 0, "%s", ctl_out);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* On two ranks each holds experts of its own: without one of them, for good, the view can only be given up. */
START_TEST(a_view_that_is_lost_can_be_given_up_and_starts_anew)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 2, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 7, "restart"); /* it serves */
    itest_feed(&c, "4");
    cluster_sleep_ms(300);
    cluster_signal(&c.agent[1], SIGKILL);
    cluster_signal(&c.engine[1], SIGKILL);
    itest_wait_status(&c, "no copy", 10000);
    CTL_SAYS("awaited: gpu1 (lost), since ");
    CTL_SAYS("`eepctl restart` gives the view up");
    cluster_agent_start(&c, 1);
    cluster_engine_start(&c, 1);
    CTL(&c, 0, "restart");
    CTL(&c, 0, "restart"); /* there is nothing left to give up */
    /* the engine that served was cut off with its agent's incarnation */
    supervise_until(&c, "2 spare agents", 10000);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "2", "--wait-for-agents=20", NULL});
    supervise_until(&c, "operation 2: start to 2 ranks, done", 20000);
    ck_assert_msg(ended(&c, &scale, "scale", 5000) == 0, "%s", ctl_out);
    CTL(&c, 0, "verify");
    cluster_sleep_ms(300);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(by_policy_a_repaired_view_gets_its_strength_back)
{
    struct cluster c;
    itest_start(&c, with((struct cluster_options){.agents = 5, .loaders = 4, .step_ms = 5},
                         (const char *[]){"--scale-back", NULL}));
    CTL(&c, 0, "scale", "--to", "4");
    itest_feed(&c, "4");
    cluster_sleep_ms(300);
    cluster_signal(&c.agent[2], SIGKILL);
    cluster_signal(&c.engine[2], SIGKILL);
    itest_wait_status(&c, "full strength again", 20000);
    ck_assert_int_eq(itest_ranks(&c), 4);
    CTL(&c, 0, "history");
    CTL_SAYS("serving again with 3 ranks");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

START_TEST(by_policy_a_lost_view_starts_anew_from_the_checkpoint)
{
    struct cluster c;
    itest_start(&c, with((struct cluster_options){.agents = 2, .loaders = 2, .step_ms = 5},
                         (const char *[]){"--restart-after-ms", "500", NULL}));
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    cluster_sleep_ms(300);
    cluster_signal(&c.agent[1], SIGKILL);
    cluster_signal(&c.engine[1], SIGKILL);
    cluster_agent_start(&c, 1);
    cluster_engine_start(&c, 1);
    supervise_until(&c, "operation 2: start to 2 ranks, done", 20000);
    CTL(&c, 0, "history");
    CTL_SAYS("full strength again");
    char *log = cluster_read(&c, "coordinator.log");
    ck_assert_msg(log && !strstr(log, "serving again"), "it says that it serves when its view was given up; logs in %s", c.dir);
    free(log);
    CTL(&c, 0, "verify");
    cluster_sleep_ms(300);
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Every engine hangs in the step of the one that does; only that one is cut off. */
START_TEST(an_engine_that_hangs_in_a_step_is_cut_off_and_may_attach_again)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){
                        .agents = 4, .loaders = 4, .step_ms = 5, .agent_args = {"--step-limit-ms", "1000", NULL}});
    CTL(&c, 0, "scale", "--to", "4");
    itest_feed(&c, "6");
    cluster_sleep_ms(300);
    kill(c.engine[2], SIGSTOP);
    itest_wait_ranks(&c, 3, 20000);
    CTL(&c, 0, "history");
    CTL_SAYS("serving again with 3 ranks");
    kill(c.engine[2], SIGCONT);
    ck_assert_int_ge(cluster_wait(&c.engine[2], 10000), 0); /* it was told that it is detached */
    cluster_engine_start(&c, 2);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "4", "--wait-for-agents=20", NULL});
    supervise_until(&c, "scale-up to 4 ranks, done", 20000);
    ck_assert_msg(ended(&c, &scale, "scale", 5000) == 0, "%s", ctl_out);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* The coordinator dies when the new rank has just begun its first step: the next one fills what was to be filled. */
START_TEST(the_fill_after_a_commit_outlives_the_coordinator)
{
    struct cluster c;
    char path[192], fresh[192];
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5, .agent_edges = true});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    snprintf(path, sizeof path, "%s/edge", c.dir);
    snprintf(fresh, sizeof fresh, "%s/edge.new", c.dir);
    FILE *f = fopen(fresh, "we");
    ck_assert_ptr_nonnull(f);
    fprintf(f, "agent gpu2: PREPARE --FLIPPED--> EPLB_RESHUFFLE\"\nrole=new\n%d\n%d\n", SIGKILL, (int)c.coordinator);
    fclose(f);
    ck_assert_int_eq(rename(fresh, path), 0);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "3", NULL});
    ck_assert_int_eq(cluster_wait(&c.coordinator, 10000), 128 + SIGKILL);
    ck_assert_int_eq(cluster_coordinator_start(&c), 0);
    ck_assert_msg(ended(&c, &scale, "scale", 20000) == 0, "%s", ctl_out);
    CTL(&c, 0, "history", "--phases");
    CTL_SAYS("the coordinator restarted meanwhile");
    CTL_SAYS("FILL");
    CTL(&c, 0, "verify");
    CTL_SAYS("96 expert slots"); /* 3 ranks x 8 slots x 4 layers: none is empty */
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* An engine that lives and does not answer: by a deadline the operation goes on without it, or is aborted. */
START_TEST(engines_that_never_answer_cost_a_deadline)
{
    struct cluster c;
    static const char *const deadlines[] = {"--stage-ms", "1000", "--drain-ms", "1000", NULL};
    itest_start(&c, with((struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5}, deadlines));
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    cluster_signal(&c.engine[2], SIGTERM);
    ck_assert_int_ge(cluster_wait(&c.engine[2], 10000), 0);
    c.options.engine_args[0] = "--mute";
    c.options.engine_args[1] = "prepare";
    cluster_engine_start(&c, 2);
    ck_assert_int_eq(cluster_wait_agents(&c, 3, 10000), 0);
    CTL(&c, 6, "scale", "--to", "3");
    CTL_SAYS("gpu2 in ENGINE_PREPARE by its deadline"); /* the others waited for it in their mesh */
    ck_assert_int_eq(itest_ranks(&c), 2);

    cluster_signal(&c.engine[2], SIGTERM);
    ck_assert_int_ge(cluster_wait(&c.engine[2], 10000), 0);
    c.options.engine_args[1] = "drain";
    cluster_engine_start(&c, 2);
    ck_assert_int_eq(cluster_wait_agents(&c, 3, 10000), 0);
    CTL(&c, 0, "scale", "--to", "3");
    CTL(&c, 0, "drain", "gpu2");
    CTL_SAYS("gpu2: safe to terminate");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* One that goes away in the middle of an operation aborts it; its agent is joined again as soon as another has come. */
START_TEST(an_engine_that_detaches_in_an_operation_may_attach_again)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 3, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    kill(c.agent[2], SIGSTOP);
    pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", "3", NULL});
    itest_wait_status(&c, "phase ALLOCATE", 5000);
    cluster_signal(&c.engine[2], SIGTERM);
    ck_assert_int_ge(cluster_wait(&c.engine[2], 10000), 0);
    kill(c.agent[2], SIGCONT);
    ck_assert_msg(ended(&c, &scale, "scale", 10000) == 6, "%s", ctl_out);
    CTL_SAYS("gpu2");
    cluster_engine_start(&c, 2);
    CTL(&c, 0, "scale", "--to", "3", "--wait-for-agents=20");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Engine i, with other arguments: as a spare, or with its rank repaired away. */
static void replace_engine(struct cluster *c, int i, const char *mute)
{
    cluster_signal(&c->engine[i], SIGTERM);
    ck_assert_int_ge(cluster_wait(&c->engine[i], 10000), 0);
    c->options.engine_args[0] = mute ? "--mute" : NULL;
    c->options.engine_args[1] = mute;
    cluster_engine_start(c, i);
    ck_assert_int_eq(cluster_wait_agents(c, c->options.agents, 20000), 0);
}

/* The same by policy: of a new rank, of one that serves and has copies elsewhere, and of one that leaves. */
START_TEST(by_policy_an_operation_goes_on_without_an_engine_or_is_aborted)
{
    struct cluster c;
    itest_start(&c, (struct cluster_options){.agents = 4,
                                             .loaders = 4,
                                             .step_ms = 5,
                                             .coordinator_args = {"--slots", "16", "--lead-ms", "100", "--stage-ms",
                                                                  "1000", "--drain-ms", "1000", "--on-prepare-timeout",
                                                                  "continue", NULL}});
    replace_engine(&c, 1, "prepare-again");
    replace_engine(&c, 3, "prepare");
    CTL(&c, 0, "scale", "--to", "2");
    itest_feed(&c, "4");
    CTL(&c, 6, "scale", "--to", "4", "--on-engine-timeout", "abort");
    CTL_SAYS("no answer from gpu1, gpu3 in ENGINE_PREPARE by its deadline");
    ck_assert_int_eq(itest_ranks(&c), 2);
    /* gpu1 has the weights and its requests, and leaves; gpu3 never comes */
    CTL(&c, 0, "scale", "--to", "4");
    CTL_SAYS("without gpu1, gpu3, whose engine did not prepare");
    CTL(&c, 0, "status");
    CTL_SAYS("2 ranks");
    ck_assert(strstr(ctl_out, "2 spare agents") != NULL);
    CTL(&c, 0, "verify");
    replace_engine(&c, 1, NULL); /* the agents are as they were: another engine attaches */
    replace_engine(&c, 3, "drain");
    CTL(&c, 0, "scale", "--to", "4");
    ck_assert_int_eq(itest_ranks(&c), 4);
    CTL(&c, 6, "drain", "gpu3", "--on-engine-timeout", "abort");
    CTL_SAYS("agent gpu3: DRAIN: the engine is not drained by the deadline");
    ck_assert_int_eq(itest_ranks(&c), 4);
    CTL(&c, 0, "drain", "gpu3");
    CTL_SAYS("gpu3: safe to terminate");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_test(t, the_fill_after_a_commit_outlives_the_coordinator);
    tcase_add_test(t, engines_that_never_answer_cost_a_deadline);
    tcase_add_test(t, by_policy_an_operation_goes_on_without_an_engine_or_is_aborted);
    tcase_add_test(t, an_engine_that_detaches_in_an_operation_may_attach_again);
    tcase_add_test(t, paused_operations_stand_still_and_go_on);
    tcase_add_test(t, a_drain_says_that_the_agent_is_safe_to_terminate);
    tcase_add_test(t, a_rank_that_is_stopped_in_an_operation_aborts_it_and_is_drained);
    tcase_add_test(t, a_rank_that_cannot_be_drained_stops_after_its_limit);
    tcase_add_test(t, a_view_that_is_lost_can_be_given_up_and_starts_anew);
    tcase_add_test(t, by_policy_a_repaired_view_gets_its_strength_back);
    tcase_add_test(t, by_policy_a_lost_view_starts_anew_from_the_checkpoint);
    tcase_add_test(t, an_engine_that_hangs_in_a_step_is_cut_off_and_may_attach_again);
}

int main(void)
{
    return suite_main("upkeep", add, 120);
}
