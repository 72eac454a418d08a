/* Weights outlive the agent: kill -9 of agents under eep-keeper while they serve, with the real daemons under load.  No view
 * changes, no engine stops, and every token is right. */
#include <signal.h>
#include <sys/wait.h>

#include "tests/integration/itest.h"

#define BACK_MS 10000

static unsigned long long view_epoch(struct cluster *c)
{
    unsigned long long epoch = 0;
    if (cluster_ctl(c, ctl_out, sizeof(ctl_out), "-o", "json", "status", NULL) == 0) {
        json_t *root = json_loads(ctl_out, JSON_DISABLE_EOF_CHECK, NULL);
        epoch = (unsigned long long)json_integer_value(json_object_get(json_object_get(root, "view"), "epoch"));
        json_decref(root);
    }
    ck_assert_msg(epoch > 0, "no view: %s", ctl_out);
    return epoch;
}

/* How often this stands in a log of the cluster. */
static int count(const struct cluster *c, const char *log, const char *text)
{
    int n = 0;
    char *all = cluster_read(c, log);
    for (const char *at = all; at && (at = strstr(at, text)); at += strlen(text))
        n++;
    free(all);
    return n;
}

static int readoptions(const struct cluster *c, int i)
{
    char log[32];
    snprintf(log, sizeof(log), "agent-%d.log", i);
    return count(c, log, "re-adopted: epoch");
}

static int started(const struct cluster *c, int i)
{
    char log[32];
    snprintf(log, sizeof(log), "agent-%d.log", i);
    return count(c, log, "event=incarnation");
}

static void wait_until(struct cluster *c, int i, int (*figure)(const struct cluster *, int), int at_least, const char *what)
{
    uint64_t end = cluster_now_ms() + BACK_MS;
    while (figure(c, i) < at_least) {
        ck_assert_msg(cluster_now_ms() < end, "gpu%d: %s; logs in %s", i, what, c->dir);
        cluster_sleep_ms(5);
    }
}

static pid_t agent_pid(struct cluster *c, int i)
{
    pid_t pid;
    uint64_t end = cluster_now_ms() + BACK_MS;
    while ((pid = cluster_agent_pid(c, i)) <= 0) {
        ck_assert_msg(cluster_now_ms() < end, "the keeper of gpu%d has no child; logs in %s", i, c->dir);
        cluster_sleep_ms(2);
    }
    return pid;
}

/* kill -9; back as the same incarnation.  Returns how long that took. */
static uint64_t lose(struct cluster *c, int i)
{
    int before = readoptions(c, i);
    uint64_t began = cluster_now_ms();
    kill(agent_pid(c, i), SIGKILL);
    wait_until(c, i, readoptions, before + 1, "was not re-adopted");
    return cluster_now_ms() - began;
}

static void serve(struct cluster *c, struct cluster_options o)
{
    o.keeper = true;
    itest_start(c, o);
}

static pid_t engines[CLUSTER_AGENTS_MAX];

static void engines_note(const struct cluster *c)
{
    memcpy(engines, c->engine, sizeof(engines));
}

/* None has ended, none has been repaired around: no step failed, no view was revoked. */
static void engines_same(const struct cluster *c)
{
    for (int i = 0; i < c->options.agents; i++) {
        char log[32];
        siginfo_t ended = {0};
        snprintf(log, sizeof(log), "engine-%d.log", i);
        ck_assert_msg(waitid(P_PID, (id_t)engines[i], &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && ended.si_pid == 0,
                      "engine %d has ended; logs in %s", i, c->dir);
        ck_assert_msg(count(c, log, "event=revoke") == 0 && count(c, log, "event=step-failed") == 0,
                      "engine %d was taken out of its step; logs in %s", i, c->dir);
    }
}

/* The longest time between two tokens of one request, of all that the feeder saw. */
static double longest_gap_ms(const struct cluster *c)
{
    char *text = cluster_read(c, "report.json");
    json_t *r = text ? json_loads(text, 0, NULL) : NULL;
    double gap = json_number_value(json_object_get(r, "longest_gap_ms"));
    json_decref(r);
    free(text);
    return gap;
}

START_TEST(every_rank_may_lose_its_agent_while_it_serves)
{
    struct cluster c;
    serve(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 5, .dispatch = _i ? "replicated" : "source"});
    CTL(&c, 0, "scale", "--to", "3");
    engines_note(&c);
    unsigned long long epoch = view_epoch(&c);
    itest_feed(&c, "6");
    cluster_sleep_ms(400);
    for (int i = 0; i < 3; i++) {
        printf("serving, rank %d: re-adopted %llu ms after kill -9\n", i, (unsigned long long)lose(&c, i));
        cluster_sleep_ms(200);
    }
    printf("serving, rank 0 again: %llu ms, and at once again: %llu ms\n", (unsigned long long)lose(&c, 0),
           (unsigned long long)lose(&c, 0));
    ck_assert_int_eq(itest_fed(&c) > 0, 1);
    printf("longest gap between two tokens of a request: %.0f ms\n", longest_gap_ms(&c));
    printf("idle, rank 1: re-adopted after %llu ms\n", (unsigned long long)lose(&c, 1));
    ck_assert_uint_eq(view_epoch(&c), epoch);
    engines_same(&c);
    /* all at once, and what was idle serves again */
    int before[3];
    for (int i = 0; i < 3; i++) {
        before[i] = readoptions(&c, i);
        kill(agent_pid(&c, i), SIGKILL);
    }
    itest_feed(&c, "4"); /* waves begin while the agents are away */
    for (int i = 0; i < 3; i++)
        wait_until(&c, i, readoptions, before[i] + 1, "was not re-adopted");
    cluster_wait_agents(&c, 3, BACK_MS);
    cluster_sleep_ms(300);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_uint_eq(view_epoch(&c), epoch);
    engines_same(&c);
    itest_feed(&c, "4");
    CTL(&c, 0, "scale", "--to", "2");
    CTL(&c, 0, "scale", "--to", "3");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* SIGSTOP first: the agent is silent for a while, and dies then. */
START_TEST(an_agent_that_was_stopped_first)
{
    struct cluster c;
    serve(&c, (struct cluster_options){.agents = 2, .loaders = 2, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "2");
    engines_note(&c);
    unsigned long long epoch = view_epoch(&c);
    itest_feed(&c, "4");
    cluster_sleep_ms(200);
    kill(agent_pid(&c, 1), SIGSTOP);
    cluster_sleep_ms(300);
    printf("stopped for 300 ms, then killed: re-adopted after %llu ms\n", (unsigned long long)lose(&c, 1));
    cluster_sleep_ms(300);
    itest_fed(&c);
    ck_assert_uint_eq(view_epoch(&c), epoch);
    engines_same(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* In the middle of an operation, at moments spread over it: it is aborted, or goes on if it was decided; the next one works. */
START_TEST(an_agent_that_dies_in_the_middle_of_an_operation)
{
    static const int after_ms[] = {5, 30, 60, 100, 150};
    struct cluster c;
    serve(&c, (struct cluster_options){.agents = 4, .loaders = 3, .step_ms = 4});
    CTL(&c, 0, "scale", "--to", "3");
    itest_feed(&c, "6");
    cluster_sleep_ms(200);
    int aborted = 0, done = 0;
    const int n = sizeof(after_ms) / sizeof(after_ms[0]);
    for (int k = 0; k < 2 * n || (aborted == 0 && k < 8 * n); k++) {
        const char *to = itest_ranks(&c) == 3 ? (k % 2 ? "2" : "4") : "3";
        int victim = k % 2; /* gpu0 and gpu1 are ranks of every view here */
        int before = readoptions(&c, victim);
        pid_t scale = cluster_ctl_start(&c, "scale", (const char *[]){"scale", "--to", to, NULL});
        cluster_sleep_ms(after_ms[k / 2 % n]);
        kill(agent_pid(&c, victim), SIGKILL);
        int code = cluster_wait(&scale, 40000);
        char *said = cluster_read(&c, "scale.log");
        ck_assert_msg(code == 0 || code == 6, "scale to %s ended with %d: %s; logs in %s", to, code, said, c.dir);
        free(said);
        aborted += code == 6;
        done += code == 0;
        wait_until(&c, victim, readoptions, before + 1, "was not re-adopted");
        ck_assert_int_eq(cluster_wait_agents(&c, 4, BACK_MS), 0);
        if (itest_ranks(&c) != 3)
            CTL(&c, 0, "scale", "--to", "3");
        CTL(&c, 0, "verify");
    }
    printf("killed in the middle of %d operations: %d aborted, %d done\n", aborted + done, aborted, done);
    ck_assert_int_ge(aborted, 1);
    itest_fed(&c);
    for (int i = 0; i < 4; i++) {
        char log[32];
        snprintf(log, sizeof(log), "engine-%d.log", i);
        ck_assert_msg(count(&c, log, "event=step-failed") == 0, "engine %d failed a step; logs in %s", i, c.dir);
    }
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Descriptors do not pile up, in the agent and in its keeper. */
START_TEST(ten_deaths_leave_nothing_behind)
{
    struct cluster c;
    int fds[2][2] = {{0}};
    serve(&c, (struct cluster_options){.agents = 3, .loaders = 3, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "3");
    itest_feed(&c, "4");
    for (int k = 0; k < 9; k++) {
        lose(&c, 0);
        cluster_wait_agents(&c, 3, BACK_MS);
        cluster_sleep_ms(300);
        int at = k == 0 ? 0 : 1;
        fds[at][0] = cluster_fds(c.agent[0]);
        fds[at][1] = cluster_fds(agent_pid(&c, 0));
    }
    itest_fed(&c);
    ck_assert_msg(fds[1][0] <= fds[0][0], "keeper: %d descriptors after one death, %d after nine", fds[0][0], fds[1][0]);
    ck_assert_msg(fds[1][1] <= fds[0][1], "agent: %d descriptors after one death, %d after nine", fds[0][1], fds[1][1]);
    /* a rank that leaves takes its regions out of the keeper */
    int with = cluster_fds(c.agent[2]);
    CTL(&c, 0, "scale", "--to", "2", "--remove", "gpu2");
    cluster_sleep_ms(200);
    ck_assert_msg(cluster_fds(c.agent[2]) < with, "the keeper of a spare holds %d descriptors, a rank's %d",
                  cluster_fds(c.agent[2]), with);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* The weights of another one in its place: what the agent finds is not what it held.  With two copies of everything
 * elsewhere the rank is repaired away, like any that is lost. */
START_TEST(what_is_not_whole_is_not_readopted)
{
    struct cluster c;
    serve(&c, (struct cluster_options){.agents = 4, .loaders = 4, .step_ms = 5});
    CTL(&c, 0, "scale", "--to", "4");
    itest_feed(&c, "6");
    cluster_sleep_ms(300);
    /* The byte is turned while the process is stopped, so that no step of its engine reads it. */
    pid_t engine = c.engine[1], agent = agent_pid(&c, 1);
    kill(engine, SIGKILL);
    kill(agent, SIGSTOP);
    char command[256];
    const char *memory = getenv("EEP_TEST_MEMORY");
    const char *what = _i                                       ? "eep-record"
                       : memory && strcmp(memory, "cuda") == 0 ? "fakecuda:" /* the driver of the tests, see tests/fakecuda */
                                                               : "layers.0.experts";
    snprintf(command, sizeof(command), "n=0; for f in /proc/%d/fd/*; do case $(readlink $f) in *memfd:%s*) "
             "printf '\\377\\1\\2' | dd of=$f bs=1 seek=%d count=3 conv=notrunc status=none && n=1;; esac; done; [ $n = 1 ]",
             agent, what, _i ? 4096 + 16 : 1);
    ck_assert_msg(system(command) == 0, "nothing was turned over: %s", command);
    int before = started(&c, 1);
    kill(agent, SIGKILL);
    wait_until(&c, 1, started, before + 1, "did not start again");
    char *log = cluster_read(&c, "agent-1.log");
    ck_assert_msg(strstr(log, "event=not-re-adopted") && strstr(log, _i ? "checksum" : "not what it was"), "%s", log);
    free(log);
    ck_assert_int_eq(readoptions(&c, 1), 0);
    itest_wait_ranks(&c, 3, 20000);
    cluster_sleep_ms(500); /* the repair ends */
    (void)cluster_wait(&c.engine[1], 5000);
    cluster_engine_start(&c, 1);
    CTL(&c, 0, "scale", "--to", "4", "--wait-for-agents=20");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static void add(TCase *t)
{
    tcase_add_loop_test(t, every_rank_may_lose_its_agent_while_it_serves, 0, 2);
    tcase_add_test(t, an_agent_that_was_stopped_first);
    tcase_add_test(t, an_agent_that_dies_in_the_middle_of_an_operation);
    tcase_add_test(t, ten_deaths_leave_nothing_behind);
    /* The weights can be turned over where they are a file: not in the memory of a real GPU. */
    const char *memory = getenv("EEP_TEST_MEMORY");
    bool gpu = memory && strcmp(memory, "cuda") == 0 && !getenv("FAKECUDA_STATE");
    tcase_add_loop_test(t, what_is_not_whole_is_not_readopted, gpu ? 1 : 0, 2);
}

int main(void)
{
    return suite_main("re-adoption", add, 240);
}
