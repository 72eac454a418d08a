/* Deaths in the middle of what GPU transports do, with the real daemons under load: an agent is killed or stopped while
 * a group is created, while weights move, while a group ends.  The others must give up, the old view serves on, the
 * next operation works; a GPU that is lost ends its agent, with status 75 and one line in its log.
 *
 * Runs on GPUs and on the drivers of tests/fakecuda and tests/fakenccl.  EEP_FAULTS=all: every transport, signal and
 * place, as tests/gpu/faults.sh asks for; otherwise a few.  MODEL: another checkpoint.  Prints how long the operation
 * took to end after the signal.  77 without a GPU. */
#include "tests/integration/itest.h"

#include <sys/wait.h>

#define VICTIM 2
#define TRIES  8     /* an operation may be through before the signal is */
#define END_MS 30000 /* for the operation to end after the signal */

enum place { CREATING, MOVING, ENDING };
static const struct fault {
    const char *transport;
    int signal;
    enum place place;
    bool always; /* also in the short form */
} faults[] = {
    {"cuda_peer", SIGKILL, CREATING, false}, {"cuda_peer", SIGSTOP, CREATING, false},
    {"cuda_peer", SIGKILL, MOVING, true},    {"cuda_peer", SIGSTOP, MOVING, false},
    {"cuda_peer", SIGKILL, ENDING, false},   {"cuda_peer", SIGSTOP, ENDING, false},
    {"nccl", SIGKILL, CREATING, true},       {"nccl", SIGSTOP, CREATING, false},
    {"nccl", SIGKILL, MOVING, false},        {"nccl", SIGSTOP, MOVING, true},
    {"nccl", SIGKILL, ENDING, false},        {"nccl", SIGSTOP, ENDING, true},
};
enum { FAULTS = sizeof faults / sizeof faults[0] };
static const char *const place_names[] = {"creating", "moving", "ending"};
/* of an existing rank's machine, logged when the agents are asked for it */
static const char *const place_marks[] = {"--> CREATE_STANDBY_GROUPS", "--> TRANSFER_WEIGHTS", "--> COMPLETE"};

static void start(struct cluster *c, const char *transport)
{
    const char *model = getenv("MODEL");
    itest_start(c,
                (struct cluster_options){
                    .agents = 3, .loaders = 2, .step_ms = 5, .model = model, .memory = "cuda", .transport = transport});
    CTL(c, 0, "scale", "--to", "2");
}

static size_t marks(struct cluster *c, const char *log, const char *mark)
{
    char *text = cluster_read(c, log);
    size_t n = 0;
    for (const char *at = text; at && (at = strstr(at, mark)); at++)
        n++;
    free(text);
    return n;
}

/* Waits for one more of them in the log of gpu0, or until the operation is over (NULL: for the mark alone). */
static bool mark_wait(struct cluster *c, const char *mark, size_t before, const pid_t *scale)
{
    for (uint64_t end = cluster_now_ms() + END_MS; cluster_now_ms() < end;) {
        if (marks(c, "agent-0.log", mark) > before)
            return true;
        siginfo_t info = {0};
        if (scale && waitid(P_PID, (id_t)*scale, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid)
            return marks(c, "agent-0.log", mark) > before;
        usleep(200);
    }
    return false;
}

/* The victim as a new process with a new engine. */
static void victim_renew(struct cluster *c)
{
    if (c->agent[VICTIM] > 0) {
        kill(c->agent[VICTIM], SIGCONT);
        cluster_signal(&c->agent[VICTIM], SIGKILL);
    }
    cluster_signal(&c->engine[VICTIM], SIGKILL);
    ck_assert_int_eq(cluster_agent_start(c, VICTIM), 0);
    ck_assert_int_eq(cluster_engine_start(c, VICTIM), 0);
    ck_assert_int_eq(cluster_wait_agents(c, 3, 60000), 0);
}

/* One attempt; false when the operation was through before. */
static bool hit(struct cluster *c, const struct fault *f)
{
    const char *to = f->place == ENDING ? "2" : "3", *mark = place_marks[f->place];
    if (f->place == ENDING)
        CTL(c, 0, "scale", "--to", "3", "--wait-for-agents=30");
    size_t before = marks(c, "agent-0.log", mark);
    pid_t scale = cluster_ctl_start(c, "scale", (const char *[]){"scale", "--to", to, NULL});
    ck_assert_msg(mark_wait(c, mark, before, f->place == ENDING ? NULL : &scale), "never \"%s\", logs in %s", mark, c->dir);
    uint64_t begin = cluster_now_ms();
    if (f->signal == SIGKILL)
        cluster_signal(&c->agent[VICTIM], SIGKILL);
    else
        kill(c->agent[VICTIM], SIGSTOP);
    int code = cluster_wait(&scale, END_MS);
    if (f->place != ENDING && code == 0) {
        if (f->signal == SIGSTOP)
            kill(c->agent[VICTIM], SIGCONT);
        return false;
    }
    ck_assert_msg(code == 6 || (f->place == ENDING && code == 0), "exit %d, logs in %s", code, c->dir);
    printf("%s, %s while %s: the operation ended with %d after %d ms\n", f->transport,
           f->signal == SIGKILL ? "SIGKILL" : "SIGSTOP", place_names[f->place], code, (int)(cluster_now_ms() - begin));
    fflush(stdout);
    return true;
}

static void back_to_two(struct cluster *c)
{
    victim_renew(c);
    if (itest_ranks(c) == 3)
        CTL(c, 0, "scale", "--to", "2");
}

START_TEST(the_others_go_on)
{
    const struct fault *f = &faults[_i];
    struct cluster c;
    start(&c, f->transport);
    itest_feed(&c, "6");
    bool done = false;
    for (int k = 0; k < TRIES && !done; k++) {
        done = hit(&c, f);
        if (!done)
            back_to_two(&c);
    }
    ck_assert_msg(done, "%s was over %d times before the signal", place_names[f->place], TRIES);
    ck_assert_int_eq(itest_ranks(&c), 2);
    CTL(&c, 0, "verify");
    victim_renew(&c);
    CTL(&c, 0, "scale", "--to", "3", "--wait-for-agents=30");
    ck_assert_int_eq(itest_ranks(&c), 3);
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* The joiner's GPU is lost in the middle of its copies (the driver is made to fail: only the stand-in can be). */
START_TEST(a_lost_gpu_ends_its_agent_and_nothing_else)
{
    struct cluster c;
    start(&c, "cuda_peer");
    itest_feed(&c, "6");
    cluster_signal(&c.agent[VICTIM], SIGKILL);
    setenv("FAKECUDA_FAIL", "cuMemcpyBatchAsync:1:700:late,cuMemcpyDtoDAsync:1:700:late", 1);
    ck_assert_int_eq(cluster_agent_start(&c, VICTIM), 0);
    unsetenv("FAKECUDA_FAIL");
    cluster_signal(&c.engine[VICTIM], SIGKILL);
    ck_assert_int_eq(cluster_engine_start(&c, VICTIM), 0);
    ck_assert_int_eq(cluster_wait_agents(&c, 3, 30000), 0);
    CTL(&c, 6, "scale", "--to", "3");
    CTL_SAYS("ILLEGAL_ADDRESS");
    ck_assert_int_eq(cluster_wait(&c.agent[VICTIM], 5000), 75);
    ck_assert_uint_eq(marks(&c, "agent-2.log", "event=fatal"), 1);
    ck_assert_uint_eq(marks(&c, "agent-2.log", "event=work-failed"), 1);
    ck_assert_int_eq(itest_ranks(&c), 2);
    victim_renew(&c);
    CTL(&c, 0, "scale", "--to", "3", "--wait-for-agents=30");
    CTL(&c, 0, "verify");
    itest_fed(&c);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

/* Agents that do not share their GPU do not start beside one that has it. */
START_TEST(a_second_agent_on_a_gpu_is_refused)
{
    struct cluster c;
    char command[768], said[2048];
    start(&c, "cuda_peer"); /* they share */
    snprintf(command, sizeof command,
             "exec %s/eep-agent --id another --memory cuda:0 --coordinator %s --engine-socket %s/x.sock 2>&1", c.bin,
             c.address, c.dir);
    FILE *p = popen(command, "r");
    size_t n = fread(said, 1, sizeof said - 1, p);
    said[n] = '\0';
    int status = pclose(p);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 1, "%s", said);
    ck_assert_msg(strstr(said, "used by another agent") && strstr(said, "--shared-gpu"), "%s", said);
    ck_assert_int_eq(cluster_stop(&c, false), 0);
}
END_TEST

static bool gpus_fake;

static void add(TCase *t)
{
    const char *which = getenv("EEP_FAULTS");
    for (int i = 0; i < FAULTS; i++)
        if (faults[i].always || (which && strcmp(which, "all") == 0))
            tcase_add_loop_test(t, the_others_go_on, i, i + 1);
    tcase_add_test(t, a_second_agent_on_a_gpu_is_refused);
    if (gpus_fake)
        tcase_add_test(t, a_lost_gpu_ends_its_agent_and_nothing_else);
}

int main(void)
{
    char line[512], command[512];
    const char *bin = getenv("EEP_BIN");
    snprintf(command, sizeof command, "%s/eep-agent --list-gpus 2>/dev/null", bin ? bin : "build");
    FILE *p = popen(command, "r");
    bool any = p && fgets(line, sizeof line, p);
    if (p)
        pclose(p);
    if (!any) {
        puts("no GPU, nor a driver that stands in for one");
        return 77;
    }
    gpus_fake = strstr(line, "Fake GPU") != NULL;
    return suite_main("faults of GPU transports", add, 240);
}
