/* Faults at random moments, with the real daemons, under load.
 *
 *     itest_chaos [--seed N] [--seconds S] [--agents N] [--keep]      (or EEP_CHAOS_SEED, EEP_CHAOS_SECONDS)
 *
 * A round starts a scale operation, waits a random while, and kills (SIGKILL) or stops (SIGSTOP, past the lease) an
 * agent, an engine, or both: one that joins, one that leaves, one that stays; sometimes the coordinator as well.  Then
 * what died is started again and what was stopped goes on, as a supervisor would do it.  After every round:
 *   - the operation has ended, as done or as aborted and rolled back, by its deadlines;
 *   - the next `eepctl scale` to the other size works, and `eepctl verify` finds every byte right;
 *   - requests go on being completed.
 * At any time: no daemon ends by itself.  At the end: every request that was issued has completed with the reference's
 * tokens; the coordinator has no descriptors beyond what its agents need; every process stops cleanly, none is left.
 *
 * In the first half of the time half of the ranks hold one copy of every expert between them, so only ranks that join
 * or leave lose an agent (an engine may die anywhere: its agent keeps the weights); in the second half every expert has
 * a copy to spare on three ranks as a rule, and any one agent may die.  Where the last copy of an expert dies
 * nevertheless (an operation that was cut short has left slots empty), the coordinator gives the view up after a while
 * and starts anew. The first seed is printed; a seed decides every choice, but not how the machine schedules. */
#include <argp.h>
#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/harness/supervisor.h"

#define LEASE_MS     800
#define HEAL_MS      45000 /* from the fault until the cluster is whole again */
#define MEMORY_MORE  (24 << 20)
#define OPERATION_MS 30000 /* an operation ends within this, whatever happens */

struct chaos {
    struct cluster c;
    struct supervisor s;
    uint64_t random;
    bool keep, robust;   /* robust: any one agent may die */
    int agents, small;   /* ranks: all of them, and fewer */
    char all[8], few[8]; /* the same, as text */
    long memory;         /* of the coordinator and the agents, once it has settled */
    unsigned rounds, done, aborted, refused;
    char story[512]; /* what this round does */
};

static uint64_t chaos_random(struct chaos *x)
{
    x->random += UINT64_C(0x9e3779b97f4a7c15); /* splitmix64 */
    uint64_t z = x->random;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static unsigned chaos_below(struct chaos *x, unsigned n)
{
    return (unsigned)(chaos_random(x) % n);
}

__attribute__((format(printf, 2, 3))) static void chaos_say(struct chaos *x, const char *fmt, ...)
{
    size_t used = strlen(x->story);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(x->story + used, sizeof x->story - used, fmt, ap);
    va_end(ap);
}

static void chaos_failed(void *user, const char *text) __attribute__((noreturn));
static void chaos_failed(void *user, const char *text)
{
    struct chaos *x = user;
    printf("FAILED in round %u: %s\n  %s\n  status: ", x->rounds, x->story, text);
    fflush(stdout);
    (void)cluster_ctl(&x->c, x->s.out, sizeof x->s.out, "status", NULL);
    printf("%s\n  logs: %s\n", x->s.out, x->c.dir);
    fflush(stdout);
    (void)cluster_stop(&x->c, true);
    exit(1);
}

/* ---- faults ---- */

enum victim { VICTIM_AGENT, VICTIM_ENGINE, VICTIM_BOTH };

/* Whom: one of those that join or leave (moving), or one that stays. */
static int chaos_pick(struct chaos *x, const struct look *look, bool up, bool moving)
{
    int candidates[CLUSTER_AGENTS_MAX], n = 0;
    for (int i = 0; i < x->agents; i++) {
        bool rank = look->rank[i] >= 0;
        /* without --remove the highest ranks leave */
        bool moves = up ? !rank : rank && look->rank[i] >= x->small;
        if (moving == moves)
            candidates[n++] = i;
    }
    return n ? candidates[chaos_below(x, (unsigned)n)] : (int)chaos_below(x, (unsigned)x->agents);
}

/* Of any rank, the first one included, with all ranks there. */
static void chaos_drain(struct chaos *x)
{
    char id[16];
    supervisor_scale(&x->s, x->all);
    snprintf(id, sizeof id, "gpu%u", chaos_below(x, (unsigned)x->agents));
    chaos_say(x, ", drained %s", id);
    pid_t drain = cluster_ctl_start(&x->c, "drain", (const char *[]){"drain", id, "--timeout", "20", NULL});
    int code = supervisor_wait(&x->s, &drain, "drain");
    if (code != 0 || !strstr(x->s.out, "safe to terminate"))
        supervisor_fail(&x->s, "drain: exit %d: %.1500s", code, x->s.out);
    supervisor_scale(&x->s, x->few);
}

static void chaos_round(struct chaos *x)
{
    struct cluster *c = &x->c;
    struct look look;
    if (!supervisor_look(&x->s, &look))
        supervisor_fail(&x->s, "no status");
    bool up = look.ranks < (unsigned)x->agents, moving = chaos_below(x, 3) != 0, stop = chaos_below(x, 3) == 0;
    enum victim what = (enum victim)chaos_below(x, 3);
    if (!moving && !x->robust && what != VICTIM_ENGINE)
        moving = true; /* an agent that holds the only copy may not die */
    int who = chaos_pick(x, &look, up, moving);
    int delay = (int)chaos_below(x, 3) == 0 ? (int)chaos_below(x, 400) : (int)chaos_below(x, 90);
    bool restart = chaos_below(x, 6) == 0;
    x->story[0] = '\0';
    chaos_say(x, "%s to %s, %s %s%s%sgpu%d after %d ms%s", up ? "up" : "down", up ? x->all : x->few,
              stop ? "stop" : "kill", what != VICTIM_ENGINE ? "agent " : "", what == VICTIM_BOTH ? "and " : "",
              what != VICTIM_AGENT ? "engine " : "", who, delay, restart ? ", then the coordinator dies too" : "");

    uint64_t began = cluster_now_ms();
    pid_t scale = cluster_ctl_start(c, "scale", (const char *[]){"scale", "--to", up ? x->all : x->few, NULL});
    cluster_sleep_ms(delay);
    if (what != VICTIM_ENGINE)
        cluster_signal(&c->agent[who], stop ? SIGSTOP : SIGKILL);
    if (what != VICTIM_AGENT)
        cluster_signal(&c->engine[who], stop ? SIGSTOP : SIGKILL);
    if (restart)
        cluster_signal(&c->coordinator, SIGKILL);
    cluster_sleep_ms(stop ? LEASE_MS * 2 : (int)chaos_below(x, 300));
    if (stop && what != VICTIM_ENGINE)
        cluster_signal(&c->agent[who], SIGCONT);
    if (stop && what != VICTIM_AGENT)
        cluster_signal(&c->engine[who], SIGCONT);
    supervisor_restart(&x->s);

    int code = supervisor_wait(&x->s, &scale, "scale");
    chaos_say(x, " -> exit %d in %llu ms", code, (unsigned long long)(cluster_now_ms() - began));
    /* the coordinator, or the spare, died before the command had reached it */
    bool late = (code == 3 && restart) || (code == 1 && strstr(x->s.out, " spare: start more"));
    if (code != 0 && code != 6 && code != 7 && !late)
        supervisor_fail(&x->s, "exit %d: %.1500s", code, x->s.out);
    x->done += code == 0;
    x->aborted += code == 6;
    x->refused += late || code == 7;

    supervisor_heal(&x->s);
    supervisor_progress(&x->s);
    if (!supervisor_look(&x->s, &look))
        supervisor_fail(&x->s, "no status");
    bool full = look.ranks == (unsigned)x->agents;
    supervisor_scale(&x->s, full ? x->few : x->all);
    if (chaos_below(x, 2))
        supervisor_scale(&x->s, full ? x->all : x->few);
    if (chaos_below(x, 4) == 0)
        chaos_drain(x);
    if (cluster_ctl(c, x->s.out, sizeof x->s.out, "verify", NULL) != 0)
        supervisor_fail(&x->s, "verify: %.1500s", x->s.out);
    printf("%4u %s, whole after %llu ms\n", x->rounds++, x->story, (unsigned long long)(cluster_now_ms() - began));
    fflush(stdout);
}

/* ---- a run ---- */

static int chaos_children(void)
{
    int n = 0;
    while (waitpid(-1, NULL, WNOHANG) > 0)
        n++;
    return waitpid(-1, NULL, WNOHANG) == 0 ? n + 1 : n;
}

static void chaos_run(struct chaos *x, int seconds)
{
    char slots[8];
    x->small = x->robust ? x->agents * 3 / 4 : x->agents / 2;
    x->memory = 0;
    snprintf(x->all, sizeof x->all, "%d", x->agents);
    snprintf(x->few, sizeof x->few, "%d", x->small);
    snprintf(slots, sizeof slots, "%d", (x->robust ? 36 : 16) / x->small);
    struct cluster_options o = {.model = "tests/data/qwen3-moe-tiny",
                                .agents = x->agents,
                                .loaders = x->small,
                                .step_ms = 5,
                                .coordinator_args = {"--slots", slots, "--lead-ms", "60", "--lease-ms", "800",
                                                     "--heartbeat-ms", "100", "--stage-ms", "3000", "--drain-ms",
                                                     "2000", "--transfer-ms", "3000", "--restart-after-ms", "3000",
                                                     NULL}};
    snprintf(x->story, sizeof x->story, "start");
    if (cluster_start(&x->c, &o) < 0 || cluster_all_start(&x->c) < 0 ||
        cluster_wait_agents(&x->c, x->agents, 30000) < 0)
        supervisor_fail(&x->s, "the cluster does not start");
    supervisor_scale(&x->s, x->few);
    if (cluster_feeder_start(&x->c, (const char *[]){"--concurrency", "6", "--finish", "60", NULL}) < 0)
        supervisor_fail(&x->s, "no feeder");
    uint64_t began = cluster_now_ms(), end = began + (uint64_t)seconds * 1000;
    while (cluster_now_ms() < end) {
        chaos_round(x);
        if (!x->memory && cluster_now_ms() - began > (end - began) / 3)
            x->memory = cluster_rss(x->c.coordinator);
    }
    snprintf(x->story, sizeof x->story, "end");
    supervisor_end(&x->s);
    struct look look;
    if (!supervisor_look(&x->s, &look))
        supervisor_fail(&x->s, "no status");
    /* what an idle coordinator needs: connections of its agents, journal, epoll, signals, listener */
    int fds = cluster_fds(x->c.coordinator);
    if (fds > 3 + x->agents + 20)
        supervisor_fail(&x->s, "the coordinator has %d open descriptors", fds);
    long rss = cluster_rss(x->c.coordinator);
    if (x->memory && rss > x->memory + MEMORY_MORE && !strstr(x->c.bin, "asan"))
        supervisor_fail(&x->s, "the coordinator had %ld bytes of memory after a third of the time, and has %ld",
                        x->memory, rss);
    supervisor_read_logs(&x->s);
    int unclean = cluster_stop(&x->c, x->keep);
    if (unclean != 0 || chaos_children() != 0) {
        printf("FAILED: %d processes did not stop cleanly, or some are left\n", unclean);
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
    case 't':
        o[1] = strtoull(arg, NULL, 0);
        return 0;
    case 'k':
        o[2] = 1;
        return 0;
    case 'r':
        o[3] = 1;
        return 0;
    case 'a':
        o[4] = strtoull(arg, NULL, 0);
        if (o[4] < 4 || o[4] > 8 || o[4] % 4)
            argp_error(state, "--agents must be 4 or 8");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {{"seed", 's', "N", 0, "of every choice (default: by the clock)", 0},
                                                 {"seconds", 't', "S", 0, "how long (default 70)", 0},
                                                 {"agents", 'a', "N", 0, "4 (default) or 8", 0},
                                                 {"keep", 'k', 0, 0, "keep the logs", 0},
                                                 {"robust", 'r', 0, 0, "only the half in which any agent may die", 0},
                                                 {0}};
    static const struct argp argp = {.options = options, .parser = parse, .doc = "Faults at random moments."};
    const char *seed = getenv("EEP_CHAOS_SEED"), *seconds = getenv("EEP_CHAOS_SECONDS");
    unsigned long long o[5] = {seed ? strtoull(seed, NULL, 0) : cluster_now_ms(),
                               seconds ? strtoull(seconds, NULL, 0) : 70, 0, 0, 4};
    argp_parse(&argp, argc, argv, 0, NULL, o);
    printf("seed %llu, %llu s\n", o[0], o[1]);
    static struct chaos x;
    x.s = (struct supervisor){
        .cluster = &x.c, .fail = chaos_failed, .user = &x, .heal_ms = HEAL_MS, .operation_ms = OPERATION_MS};
    x.random = o[0];
    x.keep = o[2];
    x.agents = (int)o[4];
    for (int robust = o[3] ? 1 : 0; robust < 2; robust++) {
        x.robust = robust;
        chaos_run(&x, (int)(o[3] ? o[1] : o[1] / 2));
    }
    printf("%u rounds passed: %u done, %u aborted, %u refused (seed %llu)\n", x.rounds, x.done, x.aborted, x.refused,
           o[0]);
    return 0;
}
