/* Faults at random moments, with the real daemons, under load.
 *
 *     itest_chaos [--seed N] [--seconds S] [--keep]      (or EEP_CHAOS_SEED, EEP_CHAOS_SECONDS)
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
 * In the first half of the time two ranks hold one copy of every expert between them, so only ranks that join or leave
 * lose an agent (an engine may die anywhere: its agent keeps the weights); in the second half every expert has a copy
 * to spare on three ranks, and any one agent may die.  The first seed is printed; a seed decides every choice, but not
 * how the machine schedules. */
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

#include "tests/harness/cluster.h"

#define AGENTS       4
#define LEASE_MS     800
#define HEAL_MS      45000 /* from the fault until the cluster is whole again */
#define OPERATION_MS 30000 /* an operation ends within this, whatever happens */

struct chaos {
    struct cluster c;
    uint64_t random;
    bool keep, robust; /* robust: any one agent may die */
    unsigned rounds, done, aborted, refused;
    char story[512]; /* what this round does */
    char out[65536];
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

__attribute__((format(printf, 2, 3), noreturn)) static void chaos_fail(struct chaos *x, const char *fmt, ...)
{
    va_list ap;
    printf("FAILED in round %u: %s\n  ", x->rounds, x->story);
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    printf("\n  status: ");
    fflush(stdout);
    (void)cluster_ctl(&x->c, x->out, sizeof x->out, "status", NULL);
    printf("%s\n  logs: %s\n", x->out, x->c.dir);
    fflush(stdout);
    (void)cluster_stop(&x->c, true);
    exit(1);
}

/* ---- looking ---- */

struct look {
    unsigned ranks, attached;
    bool running, degraded, all_connected;
    int rank[AGENTS]; /* of gpu0.., -1 = none */
};

static bool chaos_look(struct chaos *x, struct look *ret)
{
    *ret = (struct look){.all_connected = true};
    memset(ret->rank, -1, sizeof ret->rank);
    if (cluster_ctl(&x->c, x->out, sizeof x->out, "-o", "json", "status", NULL) != 0)
        return false;
    json_t *s = json_loads(x->out, JSON_DISABLE_EOF_CHECK, NULL);
    json_t *view = json_object_get(s, "view"), *agent;
    ret->ranks = (unsigned)json_array_size(json_object_get(view, "members"));
    ret->running = json_is_true(json_object_get(s, "op_running"));
    ret->degraded = json_string_length(json_object_get(view, "degraded")) > 0;
    json_decref(s);
    if (cluster_ctl(&x->c, x->out, sizeof x->out, "-o", "json", "agents", NULL) != 0)
        return false;
    s = json_loads(x->out, JSON_DISABLE_EOF_CHECK, NULL);
    size_t i;
    json_array_foreach(json_object_get(s, "agents"), i, agent)
    {
        const char *id = json_string_value(json_object_get(json_object_get(agent, "member"), "id"));
        int n = id && strncmp(id, "gpu", 3) == 0 ? atoi(id + 3) : -1;
        if (n < 0 || n >= AGENTS)
            continue;
        bool there = json_is_true(json_object_get(agent, "connected"));
        ret->rank[n] = (int)json_integer_value(json_object_get(agent, "rank"));
        ret->all_connected &= there;
        ret->attached += there && json_is_true(json_object_get(agent, "engine"));
    }
    json_decref(s);
    return true;
}

static long chaos_completed(struct chaos *x)
{
    char *text = cluster_read(&x->c, "feeder.json");
    json_t *o = text ? json_loads(text, 0, NULL) : NULL;
    long n = o ? (long)json_integer_value(json_object_get(o, "completed")) : -1;
    json_decref(o);
    free(text);
    return n;
}

/* ---- the supervisor ---- */

/* Starts again what has ended.  Whom a fault has killed is known as ended already (pid 0): a daemon that ends by itself
 * is a mistake, and so is an engine that does not end by its own will. */
static void chaos_supervise(struct chaos *x)
{
    struct cluster *c = &x->c;
    int status = cluster_wait(&c->coordinator, 0);
    if (status >= 0)
        chaos_fail(x, "the coordinator has ended with status %d", status);
    if (!c->coordinator && cluster_coordinator_start(c) < 0)
        chaos_fail(x, "the coordinator does not start again");
    for (int i = 0; i < AGENTS; i++) {
        status = cluster_wait(&c->agent[i], 0);
        if (status >= 0)
            chaos_fail(x, "agent %d has ended with status %d", i, status);
        status = cluster_wait(&c->engine[i], 0);
        if (status > 1)
            chaos_fail(x, "engine %d has ended with status %d", i, status);
        if (!c->agent[i])
            cluster_agent_start(c, i);
        if (!c->engine[i])
            cluster_engine_start(c, i);
    }
}

/* What a sanitizer has found is in the logs. */
static void chaos_read_logs(struct chaos *x)
{
    static const char *const signs[] = {"Sanitizer", "runtime error", "Assertion"};
    char name[32];
    for (int i = 0; i <= 2 * AGENTS; i++) {
        snprintf(name, sizeof name,
                 i == 2 * AGENTS ? "coordinator.log"
                 : i % 2         ? "engine-%d.log"
                                 : "agent-%d.log",
                 i / 2);
        char *text = cluster_read(&x->c, name);
        for (size_t k = 0; text && k < sizeof signs / sizeof signs[0]; k++)
            if (strstr(text, signs[k]))
                chaos_fail(x, "%s has \"%s\"", name, signs[k]);
        free(text);
    }
}

/* Until every agent is there with its engine, no operation runs and every expert is served. */
static void chaos_heal(struct chaos *x)
{
    uint64_t end = cluster_now_ms() + HEAL_MS;
    struct look look = {0};
    for (;;) {
        chaos_supervise(x);
        if (chaos_look(x, &look) && look.attached == AGENTS && look.all_connected && !look.running && !look.degraded)
            return;
        if (cluster_now_ms() > end)
            chaos_fail(x, "not whole again after %d ms: %u ranks, %u engines attached, %s%s", HEAL_MS, look.ranks,
                       look.attached, look.running ? "an operation runs, " : "", look.degraded ? "degraded" : "");
        cluster_sleep_ms(100);
    }
}

/* Runs `eepctl scale --to` to its end, while the supervisor does its work.  Its exit code; what it said is in x->out.
 */
static int chaos_scale_once(struct chaos *x, const char *to)
{
    int code = -1;
    pid_t scale =
        cluster_ctl_start(&x->c, "again", (const char *[]){"scale", "--to", to, "--wait-for-agents=10", NULL});
    for (uint64_t end = cluster_now_ms() + OPERATION_MS; scale > 0 && cluster_now_ms() < end; chaos_supervise(x))
        code = cluster_wait(&scale, 100);
    char *text = cluster_read(&x->c, "again.log");
    snprintf(x->out, sizeof x->out, "%s", text ? text : "");
    free(text);
    if (scale > 0) {
        cluster_signal(&scale, SIGKILL);
        chaos_fail(x, "scale --to %s afterwards has not ended after %d ms", to, OPERATION_MS);
    }
    return code;
}

/* The command of an operator who tries again while a repair is under way, or the coordinator is not back yet. */
static void chaos_scale(struct chaos *x, const char *to)
{
    uint64_t end = cluster_now_ms() + HEAL_MS;
    int code;
    while ((code = chaos_scale_once(x, to)) != 0) {
        if ((code != 7 && code != 3) || cluster_now_ms() > end)
            chaos_fail(x, "scale --to %s afterwards: exit %d: %s", to, code, x->out);
        cluster_sleep_ms(200);
    }
}

static void chaos_progress(struct chaos *x)
{
    long before = chaos_completed(x);
    for (uint64_t end = cluster_now_ms() + 20000; cluster_now_ms() < end; cluster_sleep_ms(50))
        if (chaos_completed(x) > before)
            return;
    chaos_fail(x, "no request completes any more (%ld so far)", before);
}

/* ---- faults ---- */

enum victim { VICTIM_AGENT, VICTIM_ENGINE, VICTIM_BOTH };

/* Whom: one of those that join or leave (moving), or one that stays. */
static int chaos_pick(struct chaos *x, const struct look *look, bool up, bool moving)
{
    int candidates[AGENTS], n = 0;
    for (int i = 0; i < AGENTS; i++) {
        bool rank = look->rank[i] >= 0;
        /* without --remove the highest ranks leave */
        bool moves = up ? !rank : rank && look->rank[i] >= (x->robust ? 3 : 2);
        if (moving == moves)
            candidates[n++] = i;
    }
    return n ? candidates[chaos_below(x, (unsigned)n)] : (int)chaos_below(x, AGENTS);
}

static void chaos_round(struct chaos *x)
{
    struct cluster *c = &x->c;
    struct look look;
    const char *small = x->robust ? "3" : "2";
    if (!chaos_look(x, &look))
        chaos_fail(x, "no status");
    bool up = look.ranks < AGENTS, moving = chaos_below(x, 3) != 0, stop = chaos_below(x, 3) == 0;
    enum victim what = (enum victim)chaos_below(x, 3);
    if (!moving && !x->robust && what != VICTIM_ENGINE)
        moving = true; /* an agent that holds the only copy may not die */
    int who = chaos_pick(x, &look, up, moving);
    int delay = (int)chaos_below(x, 3) == 0 ? (int)chaos_below(x, 400) : (int)chaos_below(x, 90);
    bool restart = chaos_below(x, 6) == 0;
    x->story[0] = '\0';
    chaos_say(x, "%s to %s, %s %s%s%sgpu%d after %d ms%s", up ? "up" : "down", up ? "4" : small, stop ? "stop" : "kill",
              what != VICTIM_ENGINE ? "agent " : "", what == VICTIM_BOTH ? "and " : "",
              what != VICTIM_AGENT ? "engine " : "", who, delay, restart ? ", then the coordinator dies too" : "");

    uint64_t began = cluster_now_ms();
    pid_t scale = cluster_ctl_start(c, "scale", (const char *[]){"scale", "--to", up ? "4" : small, NULL});
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
    chaos_supervise(x);

    int code = -1;
    for (uint64_t end = cluster_now_ms() + OPERATION_MS; scale && cluster_now_ms() < end; chaos_supervise(x))
        code = cluster_wait(&scale, 100);
    char *text = cluster_read(c, "scale.log");
    if (scale)
        chaos_fail(x, "the operation has not ended after %d ms: %s", OPERATION_MS, text);
    chaos_say(x, " -> exit %d in %llu ms", code, (unsigned long long)(cluster_now_ms() - began));
    /* the coordinator, or the spare, died before the command had reached it */
    bool late = (code == 3 && restart) || (code == 1 && text && strstr(text, " spare: start more"));
    if (code != 0 && code != 6 && code != 7 && !late)
        chaos_fail(x, "exit %d: %s", code, text);
    free(text);
    x->done += code == 0;
    x->aborted += code == 6;
    x->refused += late || code == 7;

    chaos_heal(x);
    chaos_progress(x);
    if (!chaos_look(x, &look))
        chaos_fail(x, "no status");
    chaos_scale(x, look.ranks == AGENTS ? small : "4");
    if (chaos_below(x, 2))
        chaos_scale(x, look.ranks == AGENTS ? "4" : small);
    if (cluster_ctl(c, x->out, sizeof x->out, "verify", NULL) != 0)
        chaos_fail(x, "verify: %s", x->out);
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
    struct cluster_options o = {.model = "tests/data/qwen3-moe-tiny",
                                .agents = AGENTS,
                                .loaders = x->robust ? 3 : 2,
                                .step_ms = 5,
                                .coordinator_args = {"--slots", x->robust ? "12" : "8", "--lead-ms", "60", "--lease-ms",
                                                     "800", "--heartbeat-ms", "100", "--stage-ms", "3000", "--drain-ms",
                                                     "2000", "--transfer-ms", "3000", NULL}};
    snprintf(x->story, sizeof x->story, "start");
    if (cluster_start(&x->c, &o) < 0 || cluster_all_start(&x->c) < 0 || cluster_wait_agents(&x->c, AGENTS, 30000) < 0)
        chaos_fail(x, "the cluster does not start");
    chaos_scale(x, x->robust ? "3" : "2");
    if (cluster_feeder_start(&x->c, (const char *[]){"--concurrency", "6", "--finish", "60", NULL}) < 0)
        chaos_fail(x, "no feeder");
    for (uint64_t end = cluster_now_ms() + (uint64_t)seconds * 1000; cluster_now_ms() < end;)
        chaos_round(x);
    snprintf(x->story, sizeof x->story, "end");
    chaos_heal(x);
    int code = cluster_feeder_stop(&x->c, 70000);
    char *report = cluster_read(&x->c, "report.json");
    if (code != 0)
        chaos_fail(x, "feeder exit %d: %s", code, report ? report : "no report");
    free(report);
    struct look look;
    if (!chaos_look(x, &look))
        chaos_fail(x, "no status");
    /* what an idle coordinator needs: connections of its agents, journal, epoll, signals, listener */
    int fds = cluster_fds(x->c.coordinator);
    if (fds > 3 + AGENTS + 20)
        chaos_fail(x, "the coordinator has %d open descriptors", fds);
    chaos_read_logs(x);
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
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {{"seed", 's', "N", 0, "of every choice (default: by the clock)", 0},
                                                 {"seconds", 't', "S", 0, "how long (default 70)", 0},
                                                 {"keep", 'k', 0, 0, "keep the logs", 0},
                                                 {"robust", 'r', 0, 0, "only the half in which any agent may die", 0},
                                                 {0}};
    static const struct argp argp = {.options = options, .parser = parse, .doc = "Faults at random moments."};
    const char *seed = getenv("EEP_CHAOS_SEED"), *seconds = getenv("EEP_CHAOS_SECONDS");
    unsigned long long o[4] = {seed ? strtoull(seed, NULL, 0) : cluster_now_ms(),
                               seconds ? strtoull(seconds, NULL, 0) : 70};
    argp_parse(&argp, argc, argv, 0, NULL, o);
    printf("seed %llu, %llu s\n", o[0], o[1]);
    static struct chaos x;
    x.random = o[0];
    x.keep = o[2];
    for (int robust = o[3] ? 1 : 0; robust < 2; robust++) {
        x.robust = robust;
        chaos_run(&x, (int)(o[3] ? o[1] : o[1] / 2));
    }
    printf("%u rounds passed: %u done, %u aborted, %u refused (seed %llu)\n", x.rounds, x.done, x.aborted, x.refused,
           o[0]);
    return 0;
}
