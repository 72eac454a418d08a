/* SIGTERM at any moment: agents in all states of all machines, and those that have no operation, end by themselves.
 *
 *     itest_stop [--seed N] [--rounds N] [--agents N]
 *
 * A round: a cluster of its own, under load, on a machine whose processors are busy; an operation begins, and at a
 * random moment one agent is asked to stop, as systemd would do it (one SIGTERM).  It ends with 0, drained or not,
 * within its
 * --stop-after.  Then everybody is stopped at some moment of another operation.  Nobody may need SIGKILL, and the
 * requests of those who go on are answered. */
#include <argp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/harness/supervisor.h"

#define HOGS          3
#define STOP_AFTER_MS 6000
#define STOPPED_MS    (STOP_AFTER_MS + 4000)

struct stop {
    struct cluster c;
    struct supervisor s;
    uint64_t random;
    unsigned rounds, agents;
    pid_t hogs[HOGS];
    char story[512];
};

static unsigned stop_below(struct stop *x, unsigned n)
{
    x->random += UINT64_C(0x9e3779b97f4a7c15); /* splitmix64 */
    uint64_t z = x->random;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (unsigned)((z ^ (z >> 31)) % n);
}

static void stop_failed(void *user, const char *text) __attribute__((noreturn));
static void stop_failed(void *user, const char *text)
{
    struct stop *x = user;
    printf("FAILED: %s\n  %s\n  logs: %s\n", x->story, text, x->c.dir);
    fflush(stdout);
    (void)cluster_stop(&x->c, true);
    exit(1);
}

static void stop_hogs(struct stop *x, bool start)
{
    for (int i = 0; i < HOGS; i++) {
        if (!start) {
            cluster_signal(&x->hogs[i], SIGKILL);
            continue;
        }
        x->hogs[i] = fork();
        if (x->hogs[i] == 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (volatile unsigned n = 0;; n++)
                ;
        }
    }
}

/* While they start: whoever has no handler yet is ended by the signal itself. */
static void stop_early(struct stop *x)
{
    for (unsigned i = 0; i < x->agents; i++)
        cluster_signal(&x->c.engine[i], SIGKILL);
    for (unsigned i = 0; i < x->agents; i++)
        kill(x->c.agent[i], SIGTERM);
    for (unsigned i = 0; i < x->agents; i++) {
        int status = cluster_wait(&x->c.agent[i], STOPPED_MS);
        if (status != 0 && status != 128 + SIGTERM)
            supervisor_fail(&x->s, "an agent that starts %s (%d)",
                            status < 0 ? "does not end" : "ended with another status than 0", status);
    }
}

/* Begins one of the operations that there are; "" for none. */
static pid_t stop_operation(struct stop *x, char *ret_what, size_t size)
{
    char n[16], id[16];
    unsigned kind = stop_below(x, 5);
    snprintf(n, sizeof n, "%u", 2 + stop_below(x, x->agents - 1));
    snprintf(id, sizeof id, "gpu%u", stop_below(x, x->agents));
    snprintf(ret_what, size, "%s", kind == 3 ? "rebalance" : kind == 4 ? id : kind == 0 ? "nothing" : n);
    switch (kind) {
    case 0:
        return 0;
    case 3:
        return cluster_ctl_start(&x->c, "op", (const char *[]){"rebalance", NULL});
    case 4:
        return cluster_ctl_start(&x->c, "op", (const char *[]){"drain", id, "--timeout", "20", NULL});
    default:
        return cluster_ctl_start(&x->c, "op", (const char *[]){"scale", "--to", n, NULL});
    }
}

static void stop_one(struct stop *x)
{
    struct cluster *c = &x->c;
    char what[32];
    unsigned who = stop_below(x, x->agents), delay = stop_below(x, 300);
    pid_t op = stop_operation(x, what, sizeof what);
    snprintf(x->story, sizeof x->story, "%s, gpu%u is stopped after %u ms", what, who, delay);
    cluster_sleep_ms((int)delay);
    uint64_t began = cluster_now_ms();
    kill(c->agent[who], SIGTERM);
    int status = cluster_wait(&c->agent[who], STOPPED_MS);
    size_t used = strlen(x->story);
    snprintf(x->story + used, sizeof x->story - used, ": ended after %llu ms",
             (unsigned long long)(cluster_now_ms() - began));
    if (status != 0)
        supervisor_fail(&x->s, "it %s (%d)", status < 0 ? "does not end" : "ended with another status than 0", status);
    cluster_signal(&c->engine[who], SIGKILL);
    if (op > 0) {
        int code = supervisor_wait(&x->s, &op, "op"); /* starts it again */
        if (code != 0 && code != 6 && code != 7 && code != 1)
            supervisor_fail(&x->s, "the operation ended with %d: %.1500s", code, x->s.out);
    }
    supervisor_heal(&x->s);
    supervisor_progress(&x->s);
}

static void stop_round(struct stop *x)
{
    char what[32], half[16];
    struct cluster_options o = {.model = "tests/data/qwen3-moe-tiny",
                                .agents = (int)x->agents,
                                .loaders = (int)x->agents,
                                .step_ms = 5,
                                .agent_args = {"--stop-after", "6000", NULL},
                                .coordinator_args = {"--slots", "16", "--lead-ms", "60", "--lease-ms", "1500",
                                                     "--heartbeat-ms", "200", "--stage-ms", "3000", "--drain-ms",
                                                     "2000", "--restart-after-ms", "3000", NULL}};
    snprintf(x->story, sizeof x->story, "start");
    if (cluster_start(&x->c, &o) < 0 || cluster_all_start(&x->c) < 0)
        supervisor_fail(&x->s, "the cluster does not start");
    bool early = stop_below(x, 4) == 0;
    if (!early) {
        if (cluster_wait_agents(&x->c, (int)x->agents, 30000) < 0)
            supervisor_fail(&x->s, "not all agents come");
        snprintf(half, sizeof half, "%u", x->agents / 2);
        supervisor_scale(&x->s, half);
        if (cluster_feeder_start(&x->c, (const char *[]){"--concurrency", "6", "--finish", "60", NULL}) < 0)
            supervisor_fail(&x->s, "no feeder");
        stop_one(x);
        supervisor_end(&x->s);
    }
    pid_t op = stop_operation(x, what, sizeof what);
    unsigned delay = stop_below(x, early ? 60 : 300);
    size_t used = strlen(x->story);
    snprintf(x->story + used, sizeof x->story - used, "; %s, all are stopped after %u ms", what, delay);
    cluster_sleep_ms((int)delay);
    uint64_t began = cluster_now_ms();
    if (early)
        stop_early(x);
    supervisor_read_logs(&x->s);
    int unclean = cluster_stop(&x->c, false);
    if (op > 0)
        cluster_signal(&op, SIGKILL);
    printf("%4u %s, ended after %llu ms\n", x->rounds++, x->story, (unsigned long long)(cluster_now_ms() - began));
    fflush(stdout);
    if (unclean) {
        printf("FAILED: %d processes did not stop cleanly\n", unclean);
        exit(1);
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    unsigned long long *o = state->input;
    switch (key) {
    case 's':
        o[0] = strtoull(arg, NULL, 0);
        return 0;
    case 'r':
        o[1] = strtoull(arg, NULL, 0);
        return 0;
    case 'a':
        o[2] = strtoull(arg, NULL, 0);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {{"seed", 's', "N", 0, "of every choice (default: by the clock)", 0},
                                                 {"rounds", 'r', "N", 0, "how many (default 4)", 0},
                                                 {"agents", 'a', "N", 0, "how many (default 4)", 0},
                                                 {0}};
    static const struct argp argp = {.options = options, .parser = parse, .doc = "SIGTERM at random moments."};
    static struct stop x;
    unsigned long long o[3] = {cluster_now_ms(), 4, 4};
    argp_parse(&argp, argc, argv, 0, NULL, o);
    x.random = o[0];
    x.agents = (unsigned)o[2];
    x.s =
        (struct supervisor){.cluster = &x.c, .fail = stop_failed, .user = &x, .heal_ms = 45000, .operation_ms = 30000};
    printf("seed %llu\n", o[0]);
    stop_hogs(&x, true);
    for (unsigned i = 0; i < o[1]; i++)
        stop_round(&x);
    stop_hogs(&x, false);
    printf("%u rounds passed (seed %llu)\n", x.rounds, o[0]);
    return 0;
}
