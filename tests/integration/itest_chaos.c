/* Faults at random moments, with the real daemons, under a load that drifts.
 *
 *     itest_chaos [--seed N] [--seconds S] [--agents N] [--keep]      (or EEP_CHAOS_SEED, EEP_CHAOS_SECONDS)
 *
 * A round starts a scale, a drain or a rebalance, waits a random while, and kills (SIGKILL) or stops (SIGSTOP, past the
 * lease) an agent, an engine, or both: one that joins, one that leaves, one that stays; sometimes the coordinator as
 * well.  Sometimes the operator aborts the operation then, or pauses operations for a while.  Then what died is started
 * again and what was stopped goes on, as a supervisor would do it.  After every round:
 *   - the operation has ended, as done or as aborted and rolled back, by its deadlines;
 *   - the next `eepctl scale` to the other size works, and `eepctl verify` finds every byte right;
 *   - requests go on being completed.
 * At any time: no daemon ends by itself.  At the end: every request that was issued has completed with the reference's
 * tokens; the coordinator and one agent, who are spared kill -9 for so long, have the memory and the descriptors that
 * they had before; every process stops cleanly, none is left.
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
#define VETERAN      0         /* the agent that is never killed */
#define SPEAK_MS     60000     /* a line of figures */
#define HEAL_MS      45000     /* from the fault until the cluster is whole again */
#define MEMORY_MORE  (8 << 20) /* bytes that a process may have gained in the last third of the time */
#define FDS_MORE     8         /* and as many as a rank has more than a spare: two for each other agent */
#define OPERATION_MS 30000     /* an operation ends within this, whatever happens */

enum kind { KIND_UP, KIND_DOWN, KIND_DRAIN, KIND_REBALANCE };
static const char *const kind_names[] = {"up", "down", "drain", "rebalance"};

/* The most that was seen of a process, in the middle third of the time and in the last. */
struct watched {
    pid_t pid;
    uint64_t since_ms;
    long rss[3];
    int fds[3];
};

struct chaos {
    struct cluster c;
    struct supervisor s;
    uint64_t random;
    bool keep, robust;   /* robust: any one agent may die */
    int agents, small;   /* ranks: all of them, and fewer */
    char all[8], few[8]; /* the same, as text */
    struct watched coordinator, veteran;
    uint64_t began_ms, end_ms, spoken_ms; /* of this half */
    unsigned rounds, done, aborted, refused, kinds[4];
    long long requests, retried;
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

/* What one round does. */
struct plan {
    enum kind kind;
    enum victim what;
    bool stop, restart; /* stop: not killed; restart: of the coordinator */
    bool abort, pause;  /* what the operator does meanwhile */
    int who, delay;
};

static struct plan chaos_plan(struct chaos *x, const struct look *look)
{
    struct plan p = {.kind = look->ranks < (unsigned)x->agents ? KIND_UP : KIND_DOWN};
    unsigned other = chaos_below(x, 6);
    bool moving = chaos_below(x, 3) != 0, early = cluster_now_ms() < x->began_ms + (x->end_ms - x->began_ms) / 3;
    p.stop = chaos_below(x, 3) == 0;
    p.what = (enum victim)chaos_below(x, 3);
    if (other < 2)
        p.kind = other ? KIND_REBALANCE : KIND_DRAIN;
    if (p.kind >= KIND_DRAIN)
        moving = false;
    if (!moving && !x->robust && p.what != VICTIM_ENGINE) { /* an agent that holds the only copy may not die */
        if (p.kind >= KIND_DRAIN)
            p.what = VICTIM_ENGINE;
        moving = true;
    }
    p.who = chaos_pick(x, look, p.kind == KIND_UP, moving && p.kind < KIND_DRAIN);
    if (p.who == VETERAN && !p.stop)
        p.what = VICTIM_ENGINE;
    p.delay = (int)chaos_below(x, 3) == 0 ? (int)chaos_below(x, 400) : (int)chaos_below(x, 90);
    p.restart = chaos_below(x, 6) == 0 && early;
    p.abort = chaos_below(x, 8) == 0;
    p.pause = chaos_below(x, 8) == 0;
    x->story[0] = '\0';
    chaos_say(x, "%s, %s %s%s%sgpu%d after %d ms%s%s%s", kind_names[p.kind], p.stop ? "stop" : "kill",
              p.what != VICTIM_ENGINE ? "agent " : "", p.what == VICTIM_BOTH ? "and " : "",
              p.what != VICTIM_AGENT ? "engine " : "", p.who, p.delay, p.pause ? ", paused" : "",
              p.abort ? ", aborted" : "", p.restart ? ", then the coordinator dies too" : "");
    return p;
}

static pid_t chaos_start(struct chaos *x, const struct plan *p)
{
    char id[16];
    snprintf(id, sizeof id, "gpu%u", chaos_below(x, (unsigned)x->agents));
    if (p->kind == KIND_REBALANCE)
        return cluster_ctl_start(&x->c, "op", (const char *[]){"rebalance", NULL});
    if (p->kind == KIND_DRAIN)
        return cluster_ctl_start(&x->c, "op", (const char *[]){"drain", id, "--timeout", "20", NULL});
    return cluster_ctl_start(&x->c, "op",
                             (const char *[]){"scale", "--to", p->kind == KIND_UP ? x->all : x->few, NULL});
}

/* A word of the operator; the coordinator may be away just now (3), or see no operation (1), or one past its decision
 * (7). */
static void chaos_word(struct chaos *x, const char *word)
{
    int code = cluster_ctl(&x->c, x->s.out, sizeof x->s.out, word, NULL);
    if (code != 0 && code != 1 && code != 3 && code != 7)
        supervisor_fail(&x->s, "eepctl %s: exit %d: %.1500s", word, code, x->s.out);
}

static void chaos_resume(struct chaos *x)
{
    for (uint64_t end = cluster_now_ms() + HEAL_MS; cluster_now_ms() < end; cluster_sleep_ms(100)) {
        supervisor_restart(&x->s);
        if (cluster_ctl(&x->c, x->s.out, sizeof x->s.out, "resume", NULL) == 0)
            return;
    }
    supervisor_fail(&x->s, "eepctl resume does not get through: %.1500s", x->s.out);
}

static void chaos_faults(struct chaos *x, const struct plan *p)
{
    struct cluster *c = &x->c;
    cluster_sleep_ms(p->delay);
    if (p->what != VICTIM_ENGINE)
        cluster_signal(&c->agent[p->who], p->stop ? SIGSTOP : SIGKILL);
    if (p->what != VICTIM_AGENT)
        cluster_signal(&c->engine[p->who], p->stop ? SIGSTOP : SIGKILL);
    if (p->restart)
        cluster_signal(&c->coordinator, SIGKILL);
    if (p->pause && !p->restart)
        chaos_word(x, "pause");
    if (p->abort && !p->restart)
        chaos_word(x, "abort");
    cluster_sleep_ms(p->stop ? LEASE_MS * 2 : (int)chaos_below(x, 300));
    if (p->stop && p->what != VICTIM_ENGINE)
        cluster_signal(&c->agent[p->who], SIGCONT);
    if (p->stop && p->what != VICTIM_AGENT)
        cluster_signal(&c->engine[p->who], SIGCONT);
    supervisor_restart(&x->s);
    if (p->pause)
        chaos_resume(x);
}

static void chaos_ended(struct chaos *x, const struct plan *p, int code)
{
    /* the coordinator, the spare, or whoever was to be drained, died before the command had reached it */
    bool late =
        (code == 3 && p->restart) || (code == 1 && (strstr(x->s.out, " spare: start more") || p->kind >= KIND_DRAIN));
    if (code != 0 && code != 6 && code != 7 && !late)
        supervisor_fail(&x->s, "exit %d: %.1500s", code, x->s.out);
    x->done += code == 0;
    x->aborted += code == 6;
    x->refused += late || code == 7;
    x->kinds[p->kind] += code == 0;
}

/* ---- what the processes keep ---- */

static void watch_look(const struct chaos *x, struct watched *w, pid_t pid)
{
    uint64_t now = cluster_now_ms(), third = (x->end_ms - x->began_ms) / 3 + 1;
    unsigned part = (unsigned)((now - x->began_ms) / third);
    part = part < 2 ? part : 2;
    if (pid != w->pid)
        *w = (struct watched){.pid = pid, .since_ms = now};
    long rss = cluster_rss(pid);
    int fds = cluster_fds(pid);
    w->rss[part] = rss > w->rss[part] ? rss : w->rss[part];
    w->fds[part] = fds > w->fds[part] ? fds : w->fds[part];
}

static void watch_check(struct chaos *x, const struct watched *w, const char *name)
{
    printf("%s (for %llu s): at most %ld KiB and %d descriptors in the middle third, %ld KiB and %d in the last\n",
           name, (unsigned long long)(cluster_now_ms() - w->since_ms) / 1000, w->rss[1] >> 10, w->fds[1],
           w->rss[2] >> 10, w->fds[2]);
    if (!w->rss[1] || !w->rss[2])
        return; /* too short a run */
    if (w->rss[2] > w->rss[1] + MEMORY_MORE && !CLUSTER_RSS_MEANS_LITTLE)
        supervisor_fail(&x->s, "%s grows: %ld bytes of memory, then %ld", name, w->rss[1], w->rss[2]);
    if (w->fds[2] > w->fds[1] + FDS_MORE + 2 * x->agents)
        supervisor_fail(&x->s, "%s keeps descriptors: %d, then %d", name, w->fds[1], w->fds[2]);
}

static void chaos_speak(struct chaos *x)
{
    if (cluster_now_ms() < x->spoken_ms + SPEAK_MS)
        return;
    x->spoken_ms = cluster_now_ms();
    printf("after %llu s: %u rounds, %u done, %u aborted, %u refused; %ld requests answered; coordinator %ld KiB, %d "
           "descriptors; gpu%d %ld KiB, %d descriptors\n",
           (unsigned long long)(cluster_now_ms() - x->began_ms) / 1000, x->rounds, x->done, x->aborted, x->refused,
           supervisor_completed(&x->s), cluster_rss(x->c.coordinator) >> 10, cluster_fds(x->c.coordinator), VETERAN,
           cluster_rss(x->c.agent[VETERAN]) >> 10, cluster_fds(x->c.agent[VETERAN]));
}

static void chaos_round(struct chaos *x)
{
    struct cluster *c = &x->c;
    struct look look;
    if (!supervisor_look(&x->s, &look))
        supervisor_fail(&x->s, "no status");
    struct plan p = chaos_plan(x, &look);
    uint64_t began = cluster_now_ms();
    pid_t op = chaos_start(x, &p);
    chaos_faults(x, &p);
    int code = supervisor_wait(&x->s, &op, "op");
    chaos_say(x, " -> exit %d in %llu ms", code, (unsigned long long)(cluster_now_ms() - began));
    chaos_ended(x, &p, code);

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
    watch_look(x, &x->coordinator, c->coordinator);
    watch_look(x, &x->veteran, c->agent[VETERAN]);
    chaos_speak(x);
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

/* The feeder has ended well: every request was answered rightly.  Those that a killed rank took with it were sent
 * again. */
static void chaos_requests(struct chaos *x)
{
    char *text = cluster_read(&x->c, "report.json");
    json_t *report = text ? json_loads(text, 0, NULL) : NULL;
    if (!report)
        supervisor_fail(&x->s, "no report of the requests");
    x->requests += json_integer_value(json_object_get(report, "completed"));
    x->retried += json_integer_value(json_object_get(report, "lost"));
    json_decref(report);
    free(text);
}

static void chaos_run(struct chaos *x, int seconds)
{
    char slots[8];
    x->small = x->robust ? x->agents * 3 / 4 : x->agents / 2;
    x->coordinator = x->veteran = (struct watched){0};
    snprintf(x->all, sizeof x->all, "%d", x->agents);
    snprintf(x->few, sizeof x->few, "%d", x->small);
    snprintf(slots, sizeof slots, "%d", (x->robust ? 36 : 16) / x->small);
    struct cluster_options o = {.model = "tests/data/qwen3-moe-tiny",
                                .agents = x->agents,
                                .loaders = x->small,
                                .step_ms = 5,
                                .coordinator_args = {"--slots",
                                                     slots,
                                                     "--lead-ms",
                                                     "60",
                                                     "--lease-ms",
                                                     "800",
                                                     "--heartbeat-ms",
                                                     "100",
                                                     "--stage-ms",
                                                     "3000",
                                                     "--drain-ms",
                                                     "2000",
                                                     "--transfer-ms",
                                                     "3000",
                                                     "--restart-after-ms",
                                                     "3000",
                                                     "--load-window-ms",
                                                     "200",
                                                     "--load-horizon-ms",
                                                     "2000",
                                                     "--load-samples",
                                                     "4",
                                                     NULL}};
    snprintf(x->story, sizeof x->story, "start");
    if (cluster_start(&x->c, &o) < 0 || cluster_all_start(&x->c) < 0 ||
        cluster_wait_agents(&x->c, x->agents, 30000) < 0)
        supervisor_fail(&x->s, "the cluster does not start");
    supervisor_scale(&x->s, x->few);
    if (cluster_feeder_start(&x->c, (const char *[]){"--concurrency", "6", "--finish", "60", "--drift", "2", NULL}) < 0)
        supervisor_fail(&x->s, "no feeder");
    x->began_ms = x->spoken_ms = cluster_now_ms();
    x->end_ms = x->began_ms + (uint64_t)seconds * 1000;
    while (cluster_now_ms() < x->end_ms)
        chaos_round(x);
    snprintf(x->story, sizeof x->story, "end");
    supervisor_end(&x->s);
    struct look look;
    if (!supervisor_look(&x->s, &look))
        supervisor_fail(&x->s, "no status");
    /* what an idle coordinator needs: connections of its agents, journal, epoll, signals, listener */
    int fds = cluster_fds(x->c.coordinator);
    if (fds > 3 + x->agents + 20)
        supervisor_fail(&x->s, "the coordinator has %d open descriptors", fds);
    watch_check(x, &x->coordinator, "the coordinator");
    watch_check(x, &x->veteran, "gpu0");
    chaos_requests(x);
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
    printf("%lld requests, all with the reference's tokens; %lld were lost with a rank and sent again\n", x.requests,
           x.retried);
    printf("%u rounds passed: %u done (%u up, %u down, %u drains, %u rebalances), %u aborted, %u refused (seed %llu)\n",
           x.rounds, x.done, x.kinds[KIND_UP], x.kinds[KIND_DOWN], x.kinds[KIND_DRAIN], x.kinds[KIND_REBALANCE],
           x.aborted, x.refused, o[0]);
    return 0;
}
