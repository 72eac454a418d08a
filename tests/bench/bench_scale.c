/* What scaling costs the requests that are being served: real daemons, engines whose step sleeps, up and down again.
 *
 * An unscaled run first (on 2 ranks, then on 4), to compare; then --cycles times 2 -> 4 -> 2 under the same load. Every
 * figure of an operation is the coordinator's own, by the control call Status; holds of single engines are in the
 * agents' logs, written at every flip from what libeep measured; gaps between tokens are the feeder's.
 *
 * Prints tables in markdown.  Exit 0 only if every operation succeeded, every request completed with exactly the
 * reference's tokens, everything verified and every process ended cleanly; figures that miss their expectation do not
 * fail it. */
#include <argp.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/control_methods.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/cluster.h"

#define CYCLES_MAX   200
#define SAMPLES_MAX  4096
#define PHASES_SHOWN 32
#define RANKS_LOW    2
#define RANKS_HIGH   4

struct samples {
    double v[SAMPLES_MAX];
    int n;
};

/* All operations in one direction. */
struct direction {
    struct samples seen, total, control, without_drain, without_go, without_steps, go, drain;
    struct {
        char name[32];
        struct samples ms;
    } phases[PHASES_SHOWN];
    int n_phases;
    uint64_t moved, bound;
    int moving; /* operations with a bound above 0 */
};

struct bench {
    struct cluster cluster;
    const char *model;
    int cycles, lead_ms, step_ms, concurrency, unscaled_s, settle_ms;
    bool keep;
    struct rpc_client *client;
    struct direction up, down;
    struct samples op_holds; /* [operations] the longest hold of an engine */
    struct samples holds;    /* [engines that flipped] ms, those above 0 */
    int flips, engine_flips; /* operations; engines times operations */
};

static volatile sig_atomic_t interrupted;

static void on_signal(int signal)
{
    interrupted = signal;
}

/* ---- samples ---- */

static void add(struct samples *s, double v)
{
    if (s->n < SAMPLES_MAX)
        s->v[s->n++] = v;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The value that a share q of the samples does not exceed; 0 without any. */
static double quantile(struct samples *s, double q)
{
    if (s->n == 0)
        return 0;
    qsort(s->v, (size_t)s->n, sizeof(s->v[0]), by_value);
    int i = (int)(q * (s->n - 1) + 0.999999);
    return s->v[i < s->n ? i : s->n - 1];
}

static double number(const json_t *root, const char *key)
{
    return json_number_value(json_object_get(root, key));
}

/* ---- one operation ---- */

static Pb__StatusReply *bench_status(struct bench *b)
{
    struct rpc_identity self = {.role = RPC_ROLE_READER, .software = "bench_scale"};
    struct err err = {0};
    ProtobufCMessage *reply = NULL;
    Pb__Empty empty = PB__EMPTY__INIT;
    if ((!b->client &&
         rpc_client_connect(b->cluster.address, &self, &pb__control__descriptor, 5000, &b->client, &err) < 0) ||
        rpc_client_call(b->client, CONTROL_STATUS, &empty.base, 5000, &reply, &err) < 0) {
        fprintf(stderr, "status: %s\n", err.text);
        return NULL;
    }
    return (Pb__StatusReply *)reply;
}

static void direction_phase(struct direction *d, const char *name, double ms)
{
    int i = 0;
    while (i < d->n_phases && strcmp(d->phases[i].name, name) != 0)
        i++;
    if (i == PHASES_SHOWN)
        return;
    if (i == d->n_phases)
        snprintf(d->phases[d->n_phases++].name, sizeof(d->phases[0].name), "%s", name);
    add(&d->phases[i].ms, ms);
}

static bool is_one_of(const char *name, const char *const *list)
{
    for (; *list; list++)
        if (strcmp(name, *list) == 0)
            return true;
    return false;
}

static void direction_add(struct direction *d, const Pb__Operation *op, uint64_t joiners)
{
    static const char *const transfer[] = {"WEIGHTS", "FILL", "ALLOCATE", NULL};
    static const char *const go[] = {"GO", NULL}, *const drain[] = {"DRAIN", NULL},
                             *const steps[] = {"RETIRE", "GRACE", NULL};
    double total = 0, control = 0, in_go = 0, in_drain = 0, in_steps = 0;
    for (size_t i = 0; i < op->n_phases; i++) {
        double ms = (double)op->phases[i]->ns / 1e6;
        direction_phase(d, op->phases[i]->phase, ms);
        total += ms;
        control += is_one_of(op->phases[i]->phase, transfer) ? 0 : ms;
        in_go += is_one_of(op->phases[i]->phase, go) ? ms : 0;
        in_drain += is_one_of(op->phases[i]->phase, drain) ? ms : 0;
        in_steps += is_one_of(op->phases[i]->phase, steps) ? ms : 0;
    }
    add(&d->total, total);
    add(&d->control, control);
    add(&d->go, in_go);
    add(&d->drain, in_drain);
    add(&d->without_drain, control - in_drain);
    add(&d->without_go, control - in_drain - in_go);
    add(&d->without_steps, control - in_drain - in_go - in_steps);
    const Pb__PlanSummary *p = op->plan;
    uint64_t least = joiners ? p->bound_fill : p->bound_hard;
    uint64_t bound = least * p->expert_bytes + joiners * p->dense_bytes;
    d->moved += op->bytes_done;
    d->bound += bound;
    d->moving += bound > 0;
}

/* Runs eepctl scale and waits.  leavers: two ranks of the present view, or NULL. */
static int bench_ctl(struct bench *b, int to, const int *leavers, char *out, size_t size)
{
    char target[16];
    snprintf(target, sizeof(target), "%d", to);
    if (!leavers)
        return cluster_ctl(&b->cluster, out, size, "scale", "--to", target, NULL);
    Pb__StatusReply *s = bench_status(b);
    if (!s || s->view->n_members != RANKS_HIGH) {
        snprintf(out, size, "the view does not have %d ranks", RANKS_HIGH);
        rpc_unpack_free((ProtobufCMessage *)s);
        return -1;
    }
    int code = cluster_ctl(&b->cluster, out, size, "scale", "--to", target, "--remove",
                           s->view->members[leavers[0]]->id, "--remove", s->view->members[leavers[1]]->id, NULL);
    rpc_unpack_free((ProtobufCMessage *)s);
    return code;
}

/* counted: into the figures. */
static int bench_scale(struct bench *b, int from, int to, const int *leavers, bool counted)
{
    char out[2048];
    uint64_t begin = clock_now_ns();
    int code = bench_ctl(b, to, leavers, out, sizeof(out));
    double ms = (double)(clock_now_ns() - begin) / 1e6;
    if (code != 0) {
        fprintf(stderr, "eepctl scale --to %d exited with %d: %s\n", to, code, out);
        return -1;
    }
    if (!counted)
        return 0;
    Pb__StatusReply *s = bench_status(b);
    if (!s || !s->op || !s->op->plan || s->op_running) {
        fprintf(stderr, "no figures of the scale to %d\n", to);
        rpc_unpack_free((ProtobufCMessage *)s);
        return -1;
    }
    struct direction *d = to > from ? &b->up : &b->down;
    direction_add(d, s->op, to > from ? (uint64_t)(to - from) : 0);
    add(&d->seen, ms);
    add(&b->op_holds, (double)s->op->hold_ns_max / 1e6);
    b->flips++;
    rpc_unpack_free((ProtobufCMessage *)s);
    return 0;
}

/* ---- the run ---- */

static json_t *bench_report(struct bench *b)
{
    char *text = cluster_read(&b->cluster, "report.json");
    json_t *root = text ? json_loads(text, 0, NULL) : NULL;
    free(text);
    return root;
}

static int bench_feed(struct bench *b, const char *seconds)
{
    char concurrency[16];
    const char *args[] = {"--concurrency", concurrency, seconds ? "--duration" : NULL, seconds, NULL};
    snprintf(concurrency, sizeof(concurrency), "%d", b->concurrency);
    return cluster_feeder_start(&b->cluster, args);
}

/* A served run without a change of ranks; the feeder's report, or NULL. */
static json_t *bench_unscaled(struct bench *b)
{
    char seconds[16];
    snprintf(seconds, sizeof(seconds), "%d", b->unscaled_s);
    if (bench_feed(b, seconds) < 0 || cluster_feeder_wait(&b->cluster, b->unscaled_s * 1000 + 60000) != 0) {
        fprintf(stderr, "the unscaled run failed\n");
        return NULL;
    }
    return bench_report(b);
}

/* "FLIPPED epoch 12 op 7: the new view is in use since step 345; held 0 us" of every agent, from the `skip`th on. */
static void bench_holds(struct bench *b, const int *skip, int *ret_count)
{
    for (int i = 0; i < RANKS_HIGH; i++) {
        char name[32];
        snprintf(name, sizeof(name), "agent-%d.log", i);
        char *text = cluster_read(&b->cluster, name);
        int n = 0;
        for (const char *at = text; at && (at = strstr(at, "FLIPPED epoch ")); at++) {
            const char *held = strstr(at, "held "), *end = strchr(at, '\n');
            if (!held || (end && held > end) || strncmp(held, "held ", 5) != 0)
                continue;
            unsigned long us = strtoul(held + 5, NULL, 10);
            if (n++ < skip[i] || ret_count)
                continue;
            b->engine_flips++;
            if (us > 0)
                add(&b->holds, (double)us / 1e3);
        }
        if (ret_count)
            ret_count[i] = n;
        free(text);
    }
}

static int bench_cycles(struct bench *b, json_t **ret_report)
{
    /* Every pair of ranks leaves in its turn; the two that are left may hold the same experts, so that some must move.
     */
    static const int leavers[][2] = {{2, 3}, {0, 2}, {0, 1}, {1, 3}, {0, 3}, {1, 2}};
    int before[RANKS_HIGH] = {0};
    bench_holds(b, before, before);
    if (bench_feed(b, NULL) < 0)
        return -1;
    cluster_sleep_ms(1000);
    for (int i = 0; i < b->cycles; i++) {
        if (interrupted || bench_scale(b, RANKS_LOW, RANKS_HIGH, NULL, true) < 0)
            return -1;
        cluster_sleep_ms(b->settle_ms);
        if (interrupted || bench_scale(b, RANKS_HIGH, RANKS_LOW, leavers[i % 6], true) < 0)
            return -1;
        cluster_sleep_ms(b->settle_ms);
    }
    int code = cluster_feeder_stop(&b->cluster, 60000);
    *ret_report = bench_report(b);
    bench_holds(b, before, NULL);
    if (code != 0)
        fprintf(stderr, "the feeder exited with %d\n", code);
    return code == 0 && *ret_report ? 0 : -1;
}

static int bench_run(struct bench *b, json_t **ret_low, json_t **ret_high, json_t **ret_report)
{
    char lead[16], out[2048];
    struct cluster_options o = {.model = b->model,
                                .agents = RANKS_HIGH,
                                .loaders = RANKS_LOW,
                                .step_ms = b->step_ms,
                                .coordinator_args = {"--slots", "8", "--lead-ms", lead, NULL}};
    snprintf(lead, sizeof(lead), "%d", b->lead_ms);
    if (cluster_start(&b->cluster, &o) < 0 || cluster_all_start(&b->cluster) < 0)
        return -1;
    if (cluster_wait_agents(&b->cluster, RANKS_HIGH, 20000) < 0) {
        fprintf(stderr, "the agents and engines did not come up within 20 s\n");
        return -1;
    }
    /* the first time up and down warms everything, without load and without being counted */
    if (bench_scale(b, 0, RANKS_LOW, NULL, false) < 0 || !(*ret_low = bench_unscaled(b)) ||
        bench_scale(b, RANKS_LOW, RANKS_HIGH, NULL, false) < 0 || !(*ret_high = bench_unscaled(b)) ||
        bench_scale(b, RANKS_HIGH, RANKS_LOW, NULL, false) < 0 || bench_cycles(b, ret_report) < 0)
        return -1;
    if (cluster_ctl(&b->cluster, out, sizeof(out), "verify", NULL) != 0) {
        fprintf(stderr, "eepctl verify: %s\n", out);
        return -1;
    }
    return 0;
}

/* ---- the tables ---- */

static const char *met(bool yes)
{
    return yes ? "yes" : "**no**";
}

static void table_pauses(struct bench *b, const json_t *low, const json_t *high, const json_t *report)
{
    int free_flips = 0;
    for (int i = 0; i < b->op_holds.n; i++)
        free_flips += b->op_holds.v[i] <= 0;
    double share = b->flips ? 100.0 * free_flips / b->flips : 0;
    double longest = number(report, "longest_gap_ms");
    double low_gap = number(low, "longest_gap_ms"), high_gap = number(high, "longest_gap_ms");
    double unscaled = low_gap > high_gap ? low_gap : high_gap;
    printf("| what requests see | measured | expected | met |\n|---|---|---|---|\n");
    printf("| flips at which no engine was held | %d of %d (%.1f %%) | 99 %% | %s |\n", free_flips, b->flips, share,
           met(share >= 99));
    printf("| the same by engine | %d of %d | | |\n", b->engine_flips - b->holds.n, b->engine_flips);
    if (b->holds.n)
        printf("| holds above 0: median, p99, longest | %.3f, %.3f, %.3f ms | p99 under 2 ms | %s |\n",
               quantile(&b->holds, 0.5), quantile(&b->holds, 0.99), quantile(&b->holds, 1),
               met(quantile(&b->holds, 0.99) < 2));
    else
        printf("| holds above 0: median, p99, longest | none | p99 under 2 ms | yes |\n");
    printf("| pause over all flips (longest of each): median, p99, longest | %.3f, %.3f, %.3f ms | | |\n",
           quantile(&b->op_holds, 0.5), quantile(&b->op_holds, 0.99), quantile(&b->op_holds, 1));
    printf("| longest gap between two tokens: scaled | %.1f ms | | |\n", longest);
    printf("| the same unscaled, on 2 and on 4 ranks | %.1f and %.1f ms | | |\n", low_gap, high_gap);
    printf("| the first of the longer of the two | %.0f %% | | |\n", unscaled > 0 ? 100 * longest / unscaled : 0);
    printf("| gaps: median, p99: scaled | %.1f, %.1f ms | | |\n", number(report, "median_gap_ms"),
           number(report, "p99_gap_ms"));
    printf("| the same unscaled on 2, on 4 ranks | %.1f, %.1f and %.1f, %.1f ms | | |\n", number(low, "median_gap_ms"),
           number(low, "p99_gap_ms"), number(high, "median_gap_ms"), number(high, "p99_gap_ms"));
    printf("| requests: completed of issued; wrong tokens | %.0f of %.0f; %.0f | all; 0 | %s |\n",
           number(report, "completed"), number(report, "issued"), number(report, "wrong"),
           met(number(report, "completed") >= number(report, "issued") && number(report, "wrong") <= 0));
}

static void row(const char *name, struct samples *up, struct samples *down)
{
    printf("| %s | %.1f | %.1f | %.1f | %.1f |\n", name, quantile(up, 0.5), quantile(up, 1), quantile(down, 0.5),
           quantile(down, 1));
}

static struct samples *direction_find(struct direction *d, const char *name)
{
    static struct samples none;
    for (int i = 0; i < d->n_phases; i++)
        if (strcmp(d->phases[i].name, name) == 0)
            return &d->phases[i].ms;
    return &none;
}

static void table_times(struct bench *b)
{
    printf("\n| time of an operation, ms | up median | up max | down median | down max |\n|---|---|---|---|---|\n");
    row("`eepctl scale`, start to exit", &b->up.seen, &b->down.seen);
    row("all phases", &b->up.total, &b->down.total);
    row("control plane (all but WEIGHTS, FILL, ALLOCATE)", &b->up.control, &b->down.control);
    row("of which DRAIN: until the leaving engines have no request", &b->up.drain, &b->down.drain);
    row("of which GO: until every engine has reached step S", &b->up.go, &b->down.go);
    row("**control plane without DRAIN** (expected: under 100)", &b->up.without_drain, &b->down.without_drain);
    row("**control plane without DRAIN and GO** (expected: under 100)", &b->up.without_go, &b->down.without_go);
    row("the same without RETIRE and GRACE: no wait for a step at all", &b->up.without_steps, &b->down.without_steps);
    for (int i = 0; i < b->up.n_phases; i++)
        row(b->up.phases[i].name, &b->up.phases[i].ms, direction_find(&b->down, b->up.phases[i].name));
    for (int i = 0; i < b->down.n_phases; i++)
        if (direction_find(&b->up, b->down.phases[i].name)->n == 0)
            row(b->down.phases[i].name, direction_find(&b->up, b->down.phases[i].name), &b->down.phases[i].ms);
}

static void table_bytes(const struct bench *b)
{
    printf("\n| bytes moved | operations | of them bound above 0 | moved | bound | moved of bound |\n"
           "|---|---|---|---|---|---|\n");
    const struct direction *d[] = {&b->up, &b->down};
    for (int i = 0; i < 2; i++) {
        char share[32] = "-";
        if (d[i]->bound)
            snprintf(share, sizeof(share), "%.1f %%", 100.0 * (double)d[i]->moved / (double)d[i]->bound);
        printf("| %s | %d | %d | %.2f MB | %.2f MB | %s |\n",
               i ? "down, against the hard bound" : "up, against the fill bound (dense weights included)",
               d[i]->total.n, d[i]->moving, (double)d[i]->moved / 1e6, (double)d[i]->bound / 1e6, share);
    }
}

/* ---- options ---- */

enum { KEY_LEAD = 256, KEY_KEEP };

static const struct argp_option options[] = {
    {"model", 'm', "DIR", 0, "checkpoint with its reference.safetensors (default tests/data/qwen3-moe-tiny)", 0},
    {"cycles", 'n', "N", 0, "2 -> 4 -> 2 so many times (default 10)", 0},
    {"lead-ms", KEY_LEAD, "MS", 0, "longest lead of a first try (default 250, as the coordinator's)", 0},
    {"step-ms", 's', "MS", 0, "an engine step sleeps at least to this (default 20)", 0},
    {"concurrency", 'c', "N", 0, "requests in flight (default 12)", 0},
    {"unscaled", 'u', "S", 0, "seconds of each unscaled run (default 10)", 0},
    {"settle-ms", 't', "MS", 0, "time to serve between two operations (default 500)", 0},
    {"keep", KEY_KEEP, NULL, 0, "keep the folder with logs and state, and say where it is", 0},
    {0},
};

static int positive(struct argp_state *state, const char *text, int max)
{
    char *end;
    long v = strtol(text, &end, 10);
    if (end == text || *end || v < 1 || v > max)
        argp_error(state, "'%s' is not a whole number from 1 to %d", text, max);
    return (int)v;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct bench *b = state->input;
    switch (key) {
    case 'm':
        b->model = arg;
        break;
    case 'n':
        b->cycles = positive(state, arg, CYCLES_MAX);
        break;
    case KEY_LEAD:
        b->lead_ms = positive(state, arg, 60000);
        break;
    case 's':
        b->step_ms = positive(state, arg, 10000);
        break;
    case 'c':
        b->concurrency = positive(state, arg, 1000);
        break;
    case 'u':
        b->unscaled_s = positive(state, arg, 3600);
        break;
    case 't':
        b->settle_ms = positive(state, arg, 60000);
        break;
    case KEY_KEEP:
        b->keep = true;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

int main(int argc, char **argv)
{
    static const struct argp argp = {options, parse, NULL, "What scaling 2 -> 4 -> 2 ranks costs requests in flight.",
                                     NULL,    NULL,  NULL};
    static struct bench b = {.model = "tests/data/qwen3-moe-tiny",
                             .cycles = 10,
                             .lead_ms = 250,
                             .step_ms = 20,
                             .concurrency = 12,
                             .unscaled_s = 10,
                             .settle_ms = 500};
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, 0, NULL, &b);
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);

    json_t *low = NULL, *high = NULL, *report = NULL;
    bool good = bench_run(&b, &low, &high, &report) == 0;
    if (good) {
        printf("%d cycles %d -> %d -> %d, lead at most %d ms, steps of %d ms that sleep, %d requests in flight\n\n",
               b.cycles, RANKS_LOW, RANKS_HIGH, RANKS_LOW, b.lead_ms, b.step_ms, b.concurrency);
        table_pauses(&b, low, high, report);
        table_times(&b);
        table_bytes(&b);
        fflush(stdout);
    }
    rpc_client_free(b.client);
    char dir[128];
    snprintf(dir, sizeof(dir), "%s", b.cluster.dir);
    good = cluster_stop(&b.cluster, b.keep) == 0 && good;
    if (b.keep)
        fprintf(stderr, "logs and state are in %s\n", dir);
    json_decref(low);
    json_decref(high);
    json_decref(report);
    return good ? 0 : 1;
}
