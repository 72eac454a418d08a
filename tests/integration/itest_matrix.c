/* Every fault at every edge of every state machine, with the real daemons, under load.
 *
 *     itest_matrix [--all | --only TEXT] [--keep]
 *
 * A cell is (role, state, event, victim, fault): a scale operation runs, and at the very moment at which the agent of
 * that role makes that transition, the victim - that agent, its engine, or the coordinator - is killed (SIGKILL), or
 * stopped (SIGSTOP) for twice the lease.  The cells are made from the transition tables (agent/machines.c).  A cell
 * whose transition never comes fails, unless it is listed below as one that these operations do not have.
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

#include "agent/machines.h"
#include "tests/harness/supervisor.h"

#define AGENTS    4
#define LEASE_MS  800
#define CELLS_MAX 512
#define TRIES     12
#define SAMPLE    23 /* without --all: one cell in so many */

enum victim { VICTIM_AGENT, VICTIM_ENGINE, VICTIM_COORDINATOR, VICTIMS };
static const char *const victim_names[] = {"agent", "engine", "coordinator"};

struct cell {
    enum op_role role;
    enum machine_state from, to;
    enum machine_event event; /* ME_EVENTS: the machine is entered */
    enum victim victim;
    bool stop;  /* SIGSTOP, else SIGKILL */
    bool tight; /* needs ranks so full that experts move before a scale-down */
};

/* Transitions that no operation of this test makes. */
static const struct {
    enum op_role role;
    enum machine_state from;
    enum machine_event event;
    const char *why;
} absent[] = {
    {ROLE_REMAINING, MS_PREPARE, ME_KV_DONE, "a scale-down does not ask for the size of the KV cache"},
    {ROLE_REMAINING, MS_EPLB_RESHUFFLE, ME_KV_DONE, "the same"},
    {ROLE_REMAINING, MS_SWITCH_AND_PREPARE, ME_ENGINE_PREPARE,
     "a second attempt, after an engine that had prepared died"},
    {ROLE_REMAINING, MS_PREPARE, ME_END, "only a rebalance ends without a commit, and none runs here"},
    {ROLE_REMAINING, MS_EPLB_RESHUFFLE, ME_END, "the same"},
    {ROLE_REMOVING, MS_EPLB_RESHUFFLE, ME_END, "only when letting go takes longer than its deadline"},
};

struct matrix {
    struct cluster c;
    struct supervisor s;
    struct cell cells[CELLS_MAX];
    unsigned n, ran, done, aborted, missing, rotate;
    bool keep, tight;
    char story[256];
    int coordinator_fds;
    long coordinator_rss;
};

static const char *role_name(enum op_role role)
{
    static const char *const names[] = {
        [ROLE_EXISTING] = "existing", [ROLE_NEW] = "new", [ROLE_REMAINING] = "remaining", [ROLE_REMOVING] = "removing"};
    return names[role];
}

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

/* ---- the cells ---- */

static bool edge_is_absent(enum op_role role, enum machine_state from, enum machine_event event)
{
    for (size_t i = 0; i < sizeof absent / sizeof absent[0]; i++)
        if (absent[i].why && absent[i].role == role && absent[i].from == from && absent[i].event == event)
            return true;
    return false;
}

static void cells_add(struct matrix *x, enum op_role role, enum machine_state from, enum machine_event event,
                      enum machine_state to)
{
    bool down = role == ROLE_REMAINING || role == ROLE_REMOVING;
    bool tight = down && (event == ME_RESHUFFLE || (from == MS_EPLB_RESHUFFLE && event != ME_LET_GO));
    for (int k = 0; k < 2 * VICTIMS && x->n < CELLS_MAX; k++)
        x->cells[x->n++] = (struct cell){.role = role,
                                         .from = from,
                                         .to = to,
                                         .event = event,
                                         .victim = (enum victim)(k / 2),
                                         .stop = k % 2,
                                         .tight = tight};
}

static void cells_make(struct matrix *x)
{
    for (int role = ROLE_EXISTING; role <= ROLE_REMOVING; role++) {
        cells_add(x, (enum op_role)role, MS_NONE, ME_EVENTS, machine_start((enum op_role)role));
        for (int from = MS_NONE + 1; from < MS_STATES; from++)
            for (int event = 0; event < ME_EVENTS; event++) {
                enum machine_state to =
                    machine_next((enum op_role)role, (enum machine_state)from, (enum machine_event)event);
                if (to == MS_NONE || event == ME_ABORT ||
                    edge_is_absent((enum op_role)role, (enum machine_state)from, (enum machine_event)event))
                    continue;
                cells_add(x, (enum op_role)role, (enum machine_state)from, (enum machine_event)event, to);
            }
    }
}

static void cell_text(const struct cell *e, char *text, size_t size)
{
    snprintf(text, size, "%-9s %s --%s--> %s, %s %s", role_name(e->role), machine_state_name(e->from),
             machine_event_name(e->event), machine_state_name(e->to), e->stop ? "stop" : "kill",
             victim_names[e->victim]);
}

/* Certainly before the decision: the coordinator has not heard yet that every engine is prepared. */
static bool cell_undecided(const struct cell *e)
{
    bool preparing = e->event == ME_ENGINE_PREPARE;
    bool after = e->event == ME_FLIPPED || e->event == ME_LET_GO || e->event == ME_END;
    bool up = e->role == ROLE_EXISTING || e->role == ROLE_NEW;
    return !preparing && !after && !(up && e->from == MS_EPLB_RESHUFFLE) &&
           !(e->role == ROLE_EXISTING && e->from == MS_SWITCH_AND_PREPARE);
}

/* ---- one cell ---- */

/* Who plays the part: ranks in turn, the first one included.  *ret_leavers: those who shall go in a scale-down. */
static int cell_actor(struct matrix *x, const struct cell *e, const struct look *look, int ret_leavers[2])
{
    unsigned small = x->tight ? 2 : 3, n = look->ranks;
    int rank = (int)(x->rotate++ % n), actor = -1, k = 0;
    for (int i = 0; i < AGENTS; i++)
        if (e->role == ROLE_NEW ? look->rank[i] < 0 : look->rank[i] == rank)
            actor = i;
    if (actor < 0)
        matrix_failed(x, "nobody can play the part");
    if (e->role == ROLE_REMOVING)
        ret_leavers[k++] = actor;
    for (int i = AGENTS - 1; i >= 0 && k < AGENTS - (int)small; i--)
        if (i != actor)
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

static void cell_check_exit(struct matrix *x, const struct cell *e, int actor, int code)
{
    char id[16];
    snprintf(id, sizeof id, "gpu%d", actor);
    if (code != 0 && code != 6)
        supervisor_fail(&x->s, "exit %d: %.1500s", code, x->s.out);
    x->done += code == 0;
    x->aborted += code == 6;
    bool dies = e->victim == VICTIM_AGENT || (e->victim == VICTIM_ENGINE && !e->stop);
    if (!cell_undecided(e) || !dies)
        return;
    if (code != 6)
        supervisor_fail(&x->s, "exit %d before the decision: %.1500s", code, x->s.out);
    if (e->victim == VICTIM_AGENT && !strstr(x->s.out, id))
        supervisor_fail(&x->s, "the one who died is not named: %.1500s", x->s.out);
}

/* False: the transition has not come; who leaves, and which experts are where, decides that. */
static bool cell_try(struct matrix *x, const struct cell *e)
{
    bool up = e->role == ROLE_EXISTING || e->role == ROLE_NEW, fired = false;
    const char *small = x->tight ? "2" : "3";
    struct look look;
    int leavers[2] = {-1, -1};
    char leaver[2][16];
    cell_text(e, x->story, sizeof x->story);
    supervisor_scale(&x->s, up ? small : "4");
    supervisor_heal(&x->s);
    if (!supervisor_look(&x->s, &look) || look.ranks != (up ? (unsigned)atoi(small) : 4))
        matrix_failed(x, "not the ranks to begin with");
    int actor = cell_actor(x, e, &look, leavers);
    const char *args[] = {"scale", "--to", up ? "4" : small, NULL, leaver[0], NULL, leaver[1], NULL};
    for (int i = 0; !up && i < 2 && leavers[i] >= 0; i++) {
        args[3 + 2 * i] = "--remove";
        snprintf(leaver[i], sizeof leaver[i], "gpu%d", leavers[i]);
    }
    (void)cell_fired(x);
    cell_arm(x, e, actor);
    uint64_t began = cluster_now_ms(), fault = 0;
    pid_t scale = cluster_ctl_start(&x->c, "scale", args);
    int code = -1;
    while (!(fired = cell_fired(x)) && cluster_now_ms() - began < 10000 && (code = cluster_wait(&scale, 2)) < 0)
        ;
    fired = fired || cell_fired(x);
    fault = cluster_now_ms();
    cell_disarm(x);
    if (!fired) {
        (void)supervisor_wait(&x->s, &scale, "scale");
        return false;
    }
    cell_after(x, e, actor);
    int late = supervisor_wait(&x->s, &scale, "scale");
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
                                .coordinator_args = {"--slots", x->tight ? "8" : "16", "--lead-ms", "60", "--lease-ms",
                                                     "800", "--heartbeat-ms", "100", "--stage-ms", "3000", "--drain-ms",
                                                     "2000", "--transfer-ms", "3000", "--restart-after-ms", "3000",
                                                     NULL}};
    snprintf(x->story, sizeof x->story, "start");
    if (cluster_start(&x->c, &o) < 0 || cluster_all_start(&x->c) < 0 || cluster_wait_agents(&x->c, AGENTS, 30000) < 0)
        matrix_failed(x, "the cluster does not start");
    supervisor_scale(&x->s, x->tight ? "2" : "3");
    if (cluster_feeder_start(&x->c, (const char *[]){"--concurrency", "6", "--finish", "60", NULL}) < 0)
        matrix_failed(x, "no feeder");
    x->coordinator_fds = cluster_fds(x->c.coordinator);
    x->coordinator_rss = cluster_rss(x->c.coordinator);
}

static void matrix_end(struct matrix *x)
{
    snprintf(x->story, sizeof x->story, "end");
    supervisor_scale(&x->s, x->tight ? "2" : "3");
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
    cells_make(&x);
    for (int tight = 0; tight < 2; tight++) {
        bool any = false;
        x.tight = tight;
        for (unsigned i = 0; i < x.n; i++) {
            char text[256];
            cell_text(&x.cells[i], text, sizeof text);
            bool wanted = choice.only ? strstr(text, choice.only) != NULL : choice.all || i % SAMPLE == 7;
            if (!wanted || x.cells[i].tight != x.tight)
                continue;
            if (!any)
                matrix_start(&x);
            any = true;
            cell_run(&x, &x.cells[i]);
        }
        if (any)
            matrix_end(&x);
    }
    printf("%u of %u cells passed: %u done, %u aborted, %u missing\n", x.ran, x.n, x.done, x.aborted, x.missing);
    return x.ran == 0 || x.missing > 0;
}
