/* Every fault at every edge of every state machine, with the real daemons, under load.
 *
 *     itest_matrix [--all | --only TEXT] [--keep]
 *
 * A cell is (operation, role, state, event, victim, fault): a scale, drain or rebalance runs, and at the very moment at
 * which the agent of that role makes that transition, the victim - that agent, its engine, or the coordinator - is
 * killed (SIGKILL), or stopped (SIGSTOP) for twice the lease.  The edges to ABORTED are cells like the others: the
 * agent is stopped as it enters the state, `eepctl abort` is given, and the fault comes when it goes on and rolls back.
 * The cells are made from the transition tables (agent/machines.c).  A cell whose transition never comes fails, unless
 * it is listed below as one that these operations do not have.
 *
 * After each cell: the command has ended, with 0 or 6 (with 6 it has named the agent and the phase, if that was killed
 * before the decision); everybody is there again; requests are answered; every byte is right; the next scale is done.
 * At the end: every request has been answered with the reference's tokens, no daemon ended by itself, none is left, and
 * descriptors and memory are what they were.  Without --all a sample is taken, the same every time. */
#include <argp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/harness/supervisor.h"
#include "tests/integration/matrix_cells.h"

#define LEASE_MS 800
#define TRIES    12
#define SAMPLE   37 /* without --all: one cell in so many */

/* What was seen, for the table at the end. */
struct figures {
    unsigned n, done;
    unsigned ended_ms[CELLS_MAX], whole_ms[CELLS_MAX];
};

struct matrix {
    struct cluster c;
    struct supervisor s;
    struct cells cells;
    unsigned ran, done, aborted, missing, rotate;
    bool keep;
    enum world world;
    struct figures figures[VICTIMS][2];
    char story[256];
    int coordinator_fds;
    long coordinator_rss;
};

static void matrix_failed(void *user, const char *text) __attribute__((noreturn));
static void matrix_failed(void *user, const char *text)
{
    struct matrix *x = user;
    printf("FAILED: %s\n  %s\n  status: ", x->story, text);
    fflush(stdout);
    (void)cluster_ctl(&x->c, x->s.out, sizeof x->s.out, "status", NULL);
    printf("%s\n  logs: %s\n", x->s.out, x->c.dir);
    fflush(stdout);
    (void)cluster_stop(&x->c, true);
    exit(1);
}

/* ---- one cell ---- */

/* Ranks before the operation, and after it. */
static unsigned cell_before(const struct cell *e)
{
    bool up = e->role == ROLE_EXISTING || e->role == ROLE_NEW;
    bool full = !up && !(e->kind == KIND_DRAIN && e->world == WORLD_TIGHT); /* there a drain of four moves nothing */
    return full ? AGENTS : e->world == WORLD_ROOMY || !up ? 3 : 2;
}

static unsigned cell_after_ranks(const struct cell *e)
{
    bool up = e->role == ROLE_EXISTING || e->role == ROLE_NEW;
    return e->kind == KIND_REBALANCE ? AGENTS
           : e->kind == KIND_DRAIN   ? cell_before(e) - 1
           : up                      ? AGENTS
           : e->world == WORLD_ROOMY ? 3
                                     : 2;
}

/* Who plays the part: ranks in turn, the first one included.  *ret_leavers: those who shall go in a scale-down. */
static int cell_actor(struct matrix *x, const struct cell *e, const struct look *look, int ret_leavers[2])
{
    unsigned n = look->ranks;
    int rank = (int)(x->rotate++ % n), actor = -1, k = 0, leave = (int)n - (int)cell_after_ranks(e);
    for (int i = 0; i < AGENTS; i++)
        if (e->role == ROLE_NEW ? look->rank[i] < 0 : look->rank[i] == rank)
            actor = i;
    if (actor < 0)
        matrix_failed(x, "nobody can play the part");
    if (e->role == ROLE_REMOVING)
        ret_leavers[k++] = actor;
    for (int i = AGENTS - 1; i >= 0 && k < leave; i--)
        if (i != actor && look->rank[i] >= 0)
            ret_leavers[k++] = i;
    return actor;
}

static void cell_arm(struct matrix *x, const struct cell *e, int actor)
{
    char path[192], new_path[192];
    pid_t pid = e->victim == VICTIM_AGENT    ? x->c.agent[actor]
                : e->victim == VICTIM_ENGINE ? x->c.engine[actor]
                                             : x->c.coordinator;
    snprintf(path, sizeof path, "%s/edge", x->c.dir);
    snprintf(new_path, sizeof new_path, "%s/edge.new", x->c.dir);
    FILE *f = fopen(new_path, "we");
    if (!f)
        matrix_failed(x, "the file for the edge cannot be written");
    fprintf(f, "agent gpu%d: %s --%s--> %s\"\nrole=%s\n%d\n%d\n", actor, machine_state_name(e->from),
            machine_event_name(e->event), machine_state_name(e->to), role_name(e->role), e->stop ? SIGSTOP : SIGKILL,
            (int)pid);
    fclose(f);
    if (rename(new_path, path) != 0)
        matrix_failed(x, "the file for the edge cannot be put in place");
}

static bool cell_fired(struct matrix *x)
{
    char path[192];
    snprintf(path, sizeof path, "%s/edge.fired", x->c.dir);
    return unlink(path) == 0;
}

static void cell_disarm(struct matrix *x)
{
    char path[192];
    snprintf(path, sizeof path, "%s/edge", x->c.dir);
    unlink(path);
}

/* The victim is known as ended, or goes on after a while. */
static void cell_after(struct matrix *x, const struct cell *e, int actor)
{
    pid_t *pid = e->victim == VICTIM_AGENT    ? &x->c.agent[actor]
                 : e->victim == VICTIM_ENGINE ? &x->c.engine[actor]
                                              : &x->c.coordinator;
    if (!e->stop) {
        (void)cluster_wait(pid, 5000);
        return;
    }
    cluster_sleep_ms(2 * LEASE_MS);
    kill(*pid, SIGCONT);
}

/* "... in GROUP: ..." */
static bool names_a_phase(const char *text)
{
    static const char *const phases[] = {"PENDING", "ALLOCATE", "GROUP_ID", "GROUP", "MAPPING",        "WEIGHTS", "KV",
                                         "RETIRE",  "GRACE",    "FILL",     "DRAIN", "ENGINE_PREPARE", "PROMISE"};
    char word[32];
    for (size_t i = 0; i < sizeof phases / sizeof phases[0]; i++) {
        snprintf(word, sizeof word, " in %s", phases[i]);
        if (strstr(text, word))
            return true;
        snprintf(word, sizeof word, ": %s: ", phases[i]); /* what the agent itself has answered */
        if (strstr(text, word))
            return true;
    }
    return false;
}

static void cell_check_exit(struct matrix *x, const struct cell *e, int actor, int code)
{
    char id[16];
    snprintf(id, sizeof id, "gpu%d", actor);
    if (code != 0 && code != 6)
        supervisor_fail(&x->s, "exit %d: %.1500s", code, x->s.out);
    x->done += code == 0;
    x->aborted += code == 6;
    bool dies = e->event == ME_ABORT || e->victim == VICTIM_AGENT || (e->victim == VICTIM_ENGINE && !e->stop);
    if (!cell_undecided(e) || !dies)
        return;
    if (code != 6)
        supervisor_fail(&x->s, "exit %d before the decision: %.1500s", code, x->s.out);
    if (e->event == ME_ABORT && !strstr(x->s.out, "aborted by the operator"))
        supervisor_fail(&x->s, "it does not say who aborted it: %.1500s", x->s.out);
    if (e->event != ME_ABORT && e->victim == VICTIM_AGENT && !(strstr(x->s.out, id) && names_a_phase(x->s.out)))
        supervisor_fail(&x->s, "the one who died, or the phase, is not named: %.1500s", x->s.out);
}

static pid_t cell_start(struct matrix *x, const struct cell *e, int actor, const int leavers[2])
{
    char to[8], leaver[2][16], id[16];
    const char *args[] = {"scale", "--to", to, NULL, leaver[0], NULL, leaver[1], NULL};
    snprintf(to, sizeof to, "%u", cell_after_ranks(e));
    snprintf(id, sizeof id, "gpu%d", actor);
    if (e->kind == KIND_REBALANCE)
        return cluster_ctl_start(&x->c, "op", (const char *[]){"rebalance", NULL});
    if (e->kind == KIND_DRAIN)
        return cluster_ctl_start(&x->c, "op", (const char *[]){"drain", id, NULL});
    for (int i = 0; i < 2 && leavers[i] >= 0; i++) {
        args[3 + 2 * i] = "--remove";
        snprintf(leaver[i], sizeof leaver[i], "gpu%d", leavers[i]);
    }
    return cluster_ctl_start(&x->c, "op", args);
}

/* Until the armed edge is passed; false: it was not.  *code: of the command, if it has ended. */
static bool cell_await(struct matrix *x, pid_t *op, int *code)
{
    bool fired = false;
    for (uint64_t end = cluster_now_ms() + 10000; !(fired = cell_fired(x)) && cluster_now_ms() < end && *code < 0;)
        *code = cluster_wait(op, 2);
    fired = fired || cell_fired(x);
    cell_disarm(x);
    return fired || cell_fired(x); /* between the look and the removal */
}

/* A rank that waits for the new ones is kept there by a new one that stands still. */
static int cell_holder(const struct cell *e, const struct look *look)
{
    int holder = -1;
    for (int i = 0; e->from == MS_WAIT_NEW_CORE_ENGINES_INIT && i < AGENTS; i++)
        if (look->rank[i] < 0)
            holder = i;
    return holder;
}

/* The agent is stopped in the state, the operation is aborted, and the fault is set for when it goes on and hears of
 * it.  False: it has not come to that state, or messages that were under way have taken it further. */
static bool cell_abort(struct matrix *x, const struct cell *e, const struct look *look, int actor, const int leavers[2],
                       pid_t *op, int *code)
{
    struct cell entry = cell_entry(e);
    int holder = cell_holder(e, look);
    if (holder >= 0)
        kill(x->c.agent[holder], SIGSTOP);
    cell_arm(x, &entry, actor);
    *op = cell_start(x, e, actor, leavers);
    bool fired = cell_await(x, op, code);
    if (fired) {
        int aborted = cluster_ctl(&x->c, x->s.out, sizeof x->s.out, "abort", NULL);
        if (aborted != 0)
            supervisor_fail(&x->s, "eepctl abort: exit %d: %.1500s", aborted, x->s.out);
        cell_arm(x, e, actor);
        kill(x->c.agent[actor], SIGCONT);
        fired = false;
        for (uint64_t end = cluster_now_ms() + 1000; !fired && cluster_now_ms() < end; cluster_sleep_ms(1))
            fired = cell_fired(x);
        cell_disarm(x);
        fired = fired || cell_fired(x);
    }
    if (holder >= 0)
        kill(x->c.agent[holder], SIGCONT);
    return fired;
}

/* False: the transition has not come; who leaves, and which experts are where, decides that. */
static bool cell_try(struct matrix *x, const struct cell *e)
{
    char ranks[8];
    struct look look;
    int leavers[2] = {-1, -1}, code = -1;
    cell_text(e, x->story, sizeof x->story);
    snprintf(ranks, sizeof ranks, "%u", cell_before(e));
    supervisor_scale(&x->s, ranks);
    supervisor_heal(&x->s);
    if (!supervisor_look(&x->s, &look) || look.ranks != cell_before(e))
        matrix_failed(x, "not the ranks to begin with");
    if (e->world == WORLD_SKEWED && !(e->event == ME_END && e->from == MS_PREPARE))
        cluster_sleep_ms(400); /* a load that the placement does not fit is counted; without, the second try has nothing to move */
    int actor = cell_actor(x, e, &look, leavers);
    pid_t op = 0;
    (void)cell_fired(x);
    bool fired;
    if (e->event == ME_ABORT) {
        fired = cell_abort(x, e, &look, actor, leavers, &op, &code);
    } else {
        cell_arm(x, e, actor);
        op = cell_start(x, e, actor, leavers);
        fired = cell_await(x, &op, &code);
    }
    uint64_t fault = cluster_now_ms();
    if (!fired) {
        (void)supervisor_wait(&x->s, &op, "op");
        return false;
    }
    cell_after(x, e, actor);
    int late = supervisor_wait(&x->s, &op, "op");
    code = code < 0 ? late : code;
    uint64_t ended = cluster_now_ms();
    cell_check_exit(x, e, actor, code);
    supervisor_heal(&x->s);
    uint64_t whole = cluster_now_ms();
    supervisor_progress(&x->s);
    if (cluster_ctl(&x->c, x->s.out, sizeof x->s.out, "verify", NULL) != 0)
        supervisor_fail(&x->s, "verify: %.1500s", x->s.out);
    printf("%-118s exit %d after %5llu ms, whole after %5llu ms\n", x->story, code, (unsigned long long)(ended - fault),
           (unsigned long long)(whole - fault));
    fflush(stdout);
    struct figures *g = &x->figures[e->victim][e->stop];
    g->ended_ms[g->n] = (unsigned)(ended - fault);
    g->whole_ms[g->n++] = (unsigned)(whole - fault);
    g->done += code == 0;
    x->ran++;
    return true;
}

static void cell_run(struct matrix *x, const struct cell *e)
{
    for (int i = 0; i < TRIES; i++)
        if (cell_try(x, e))
            return;
    printf("%-118s MISSING: this transition never came\n", x->story);
    x->missing++;
}

/* ---- a run ---- */

static void matrix_start(struct matrix *x)
{
    memset(&x->c, 0, sizeof x->c);
    struct cluster_options o = {.model = "tests/data/qwen3-moe-tiny",
                                .agents = AGENTS,
                                .loaders = 4,
                                .step_ms = 5,
                                .agent_edges = true,
                                .coordinator_args = {"--slots",
                                                     x->world == WORLD_ROOMY ? "16" : "8",
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
                                                     "100",
                                                     "--load-horizon-ms",
                                                     "1000",
                                                     "--load-samples",
                                                     "4",
                                                     NULL}};
    const char *const even[] = {"--concurrency", "6", "--finish", "60", NULL};
    const char *const skewed[] = {"--concurrency", "6", "--finish", "60", "--drift", "1", NULL};
    snprintf(x->story, sizeof x->story, "start");
    if (cluster_start(&x->c, &o) < 0 || cluster_all_start(&x->c) < 0 || cluster_wait_agents(&x->c, AGENTS, 30000) < 0)
        matrix_failed(x, "the cluster does not start");
    supervisor_scale(&x->s, x->world == WORLD_ROOMY ? "3" : "2");
    if (cluster_feeder_start(&x->c, x->world == WORLD_SKEWED ? skewed : even) < 0)
        matrix_failed(x, "no feeder");
    x->coordinator_fds = cluster_fds(x->c.coordinator);
    x->coordinator_rss = cluster_rss(x->c.coordinator);
}

static void matrix_end(struct matrix *x)
{
    snprintf(x->story, sizeof x->story, "end");
    supervisor_scale(&x->s, x->world == WORLD_ROOMY ? "3" : "2");
    supervisor_end(&x->s);
    cluster_sleep_ms(200);
    int fds = cluster_fds(x->c.coordinator);
    if (fds > x->coordinator_fds + 4)
        supervisor_fail(&x->s, "the coordinator had %d descriptors and has %d", x->coordinator_fds, fds);
    supervisor_read_logs(&x->s);
    long rss = cluster_rss(x->c.coordinator);
    if (!strstr(x->c.bin, "asan") && rss > x->coordinator_rss + (64 << 20))
        supervisor_fail(&x->s, "the coordinator had %ld bytes of memory and has %ld", x->coordinator_rss, rss);
    int unclean = cluster_stop(&x->c, x->keep);
    if (unclean != 0 || waitpid(-1, NULL, WNOHANG) >= 0) {
        printf("FAILED: %d processes did not stop cleanly, or some are left\n", unclean);
        exit(1);
    }
}

static int ascending(const void *a, const void *b)
{
    unsigned u = *(const unsigned *)a, v = *(const unsigned *)b;
    return u < v ? -1 : u > v;
}

/* As docs/faults.md has it. */
static void matrix_table(struct matrix *x)
{
    printf("| victim | fault | cells | done | aborted | command ended after (median, longest) | whole again after |\n"
           "|---|---|---|---|---|---|---|\n");
    for (int v = 0; v < VICTIMS; v++)
        for (int stop = 0; stop < 2; stop++) {
            struct figures *g = &x->figures[v][stop];
            qsort(g->ended_ms, g->n, sizeof g->ended_ms[0], ascending);
            qsort(g->whole_ms, g->n, sizeof g->whole_ms[0], ascending);
            if (g->n)
                printf("| %s | %s | %u | %u | %u | %u ms, %u ms | %u ms, %u ms |\n", victim_names[v],
                       stop ? "stopped 1.6 s" : "kill -9", g->n, g->done, g->n - g->done, g->ended_ms[g->n / 2],
                       g->ended_ms[g->n - 1], g->whole_ms[g->n / 2], g->whole_ms[g->n - 1]);
        }
}

struct choice {
    bool all, keep;
    const char *only;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct choice *choice = state->input;
    switch (key) {
    case 'a':
        choice->all = true;
        return 0;
    case 'o':
        choice->only = arg;
        return 0;
    case 'k':
        choice->keep = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {{"all", 'a', 0, 0, "every cell", 0},
                                                 {"only", 'o', "TEXT", 0, "cells whose line has this text", 0},
                                                 {"keep", 'k', 0, 0, "keep the logs", 0},
                                                 {0}};
    static const struct argp argp = {.options = options, .parser = parse, .doc = "Role x state x fault."};
    static struct matrix x;
    struct choice choice = {0};
    argp_parse(&argp, argc, argv, 0, NULL, &choice);
    x.keep = choice.keep;
    x.s = (struct supervisor){
        .cluster = &x.c, .fail = matrix_failed, .user = &x, .heal_ms = 45000, .operation_ms = 30000};
    cells_make(&x.cells);
    for (int world = 0; world < WORLDS; world++) {
        bool any = false;
        x.world = (enum world)world;
        for (unsigned i = 0; i < x.cells.n; i++) {
            char text[256];
            cell_text(&x.cells.v[i], text, sizeof text);
            bool wanted = choice.only ? strstr(text, choice.only) != NULL : choice.all || i % SAMPLE == 7;
            if (!wanted || x.cells.v[i].world != x.world)
                continue;
            if (!any)
                matrix_start(&x);
            any = true;
            cell_run(&x, &x.cells.v[i]);
        }
        if (any)
            matrix_end(&x);
    }
    matrix_table(&x);
    printf("%u of %u cells passed: %u done, %u aborted, %u missing\n", x.ran, x.cells.n, x.done, x.aborted, x.missing);
    return x.ran == 0 || x.missing > 0;
}
