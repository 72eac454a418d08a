/* The demo: a served mixture-of-experts model goes 2 -> 4 -> 3 -> 2 -> 4 ranks under load, and nobody notices.
 *
 * Starts a cluster on loopback (tests/harness), feeds requests, runs `eepctl scale`, shows what happens while it
 * happens, and ends with a report.  Exit 0 only if every request completed with exactly the reference's tokens, every
 * scale operation succeeded, every slot verified, and every process ended cleanly. */
#include <argp.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/control_methods.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/cluster.h"

#define STEPS_MAX 8

struct demo {
    struct cluster cluster;
    const char *model, *layout, *dispatch;
    int step_ms, concurrency, settle_ms;
    bool keep, tty;
    struct rpc_client *client;
    int lines; /* of the live view that are on the screen */
    struct result {
        char title[64];
        Pb__StatusReply *status;
        int exit_code;
        double seconds;
    } results[STEPS_MAX];
    int n_results;
};

static volatile sig_atomic_t interrupted;

static void on_signal(int signal)
{
    interrupted = signal;
}

static Pb__StatusReply *demo_status(struct demo *d)
{
    struct rpc_identity self = {.role = RPC_ROLE_READER, .software = "eep-demo"};
    struct err err = {0};
    ProtobufCMessage *reply = NULL;
    Pb__Empty empty = PB__EMPTY__INIT;
    if (!d->client &&
        rpc_client_connect(d->cluster.address, &self, &pb__control__descriptor, 2000, &d->client, &err) < 0)
        return NULL;
    if (rpc_client_call(d->client, CONTROL_STATUS, &empty.base, 2000, &reply, &err) < 0) {
        rpc_client_free(d->client);
        d->client = NULL;
        return NULL;
    }
    return (Pb__StatusReply *)reply;
}

static json_t *demo_json(struct demo *d, const char *name)
{
    char *text = cluster_read(&d->cluster, name);
    json_t *root = text ? json_loads(text, 0, NULL) : NULL;
    free(text);
    return root;
}

static double number(const json_t *root, const char *key)
{
    return json_number_value(json_object_get(root, key));
}

static const char *megabytes(uint64_t bytes, char *text, size_t size)
{
    snprintf(text, size, "%.2f MB", (double)bytes / 1e6);
    return text;
}

/* ---- the live view ---- */

static void demo_clear(struct demo *d)
{
    for (; d->tty && d->lines > 0; d->lines--)
        printf("\033[A\033[2K");
    d->lines = 0;
}

static void demo_show(struct demo *d, const char *title)
{
    static uint64_t last_plain;
    char a[32], b[32], ranks[256] = "";
    Pb__StatusReply *s = demo_status(d);
    json_t *feeder = demo_json(d, "feeder.json");
    if (!d->tty && cluster_now_ms() - last_plain < 1000)
        goto out;
    last_plain = cluster_now_ms();
    demo_clear(d);
    for (size_t i = 0; s && i < s->view->n_members && strlen(ranks) < sizeof(ranks) - 80; i++)
        snprintf(ranks + strlen(ranks), sizeof(ranks) - strlen(ranks), " %s%s", s->view->members[i]->id,
                 s->view->members[i]->draining ? "(leaving)" : "");
    const Pb__Operation *op = s && s->op_running ? s->op : NULL;
    if (op)
        printf("  %-34s %-15s %s of %s%s%s\n", title, op->phase, megabytes(op->bytes_done, a, sizeof(a)),
               megabytes(op->bytes_planned, b, sizeof(b)), op->awaited[0] ? "  awaits " : "", op->awaited);
    else
        printf("  %-34s serving\n", title);
    printf("  epoch %-3llu map %-4llu ranks:%s\n", s ? (unsigned long long)s->view->epoch : 0ULL,
           s ? (unsigned long long)s->view->map_version : 0ULL, ranks);
    printf("  requests: %.0f issued, %.0f completed, %.0f wrong; longest gap between two tokens %.1f ms\n",
           number(feeder, "issued"), number(feeder, "completed"), number(feeder, "wrong"),
           number(feeder, "longest_gap_ms"));
    d->lines = 3;
    fflush(stdout);
out:
    json_decref(feeder);
    rpc_unpack_free((ProtobufCMessage *)s);
}

static int demo_pause(struct demo *d, const char *title, int ms)
{
    uint64_t end = cluster_now_ms() + (uint64_t)ms;
    while (cluster_now_ms() < end && !interrupted) {
        demo_show(d, title);
        cluster_sleep_ms(100);
    }
    demo_clear(d);
    return interrupted ? -1 : 0;
}

/* ---- the steps ---- */

static int demo_scale(struct demo *d, const char *title, const char *to, const char *remove)
{
    const char *args[8] = {"scale", "--to", to, NULL};
    if (remove) {
        args[3] = "--remove";
        args[4] = remove;
    }
    struct result *r = &d->results[d->n_results++];
    snprintf(r->title, sizeof(r->title), "%s", title);
    uint64_t begin = cluster_now_ms();
    pid_t pid = cluster_ctl_start(&d->cluster, "scale", args);
    int code = -1;
    while (pid > 0 && !interrupted) {
        code = cluster_wait(&pid, 100);
        if (pid > 0)
            demo_show(d, title);
    }
    if (pid > 0)
        cluster_signal(&pid, SIGKILL);
    demo_clear(d);
    if (interrupted)
        return -1;
    r->seconds = (double)(cluster_now_ms() - begin) / 1000;
    r->exit_code = code;
    r->status = demo_status(d);
    printf("  %-34s %s in %.2f s\n", title, code == 0 ? "done" : "FAILED", r->seconds);
    fflush(stdout);
    if (code != 0) {
        char *text = cluster_read(&d->cluster, "scale.log");
        fprintf(stderr, "eepctl scale exited with %d: %s\n", code, text ? text : "");
        free(text);
    }
    return code == 0 ? 0 : -1;
}

static int demo_feed(struct demo *d, const char *const *extra)
{
    char concurrency[16];
    const char *args[16] = {"--concurrency", concurrency, NULL};
    int n = 2;
    snprintf(concurrency, sizeof(concurrency), "%d", d->concurrency);
    for (int i = 0; extra && extra[i]; i++)
        args[n++] = extra[i];
    args[n] = NULL;
    return cluster_feeder_start(&d->cluster, args);
}

static int demo_verify(struct demo *d)
{
    char out[1024];
    int code = cluster_ctl(&d->cluster, out, sizeof(out), "verify", NULL);
    printf("  eepctl verify: %s%s", out, strchr(out, '\n') ? "" : "\n");
    return code;
}

static int demo_run(struct demo *d, json_t **ret_base, json_t **ret_report, int *ret_feeder)
{
    struct cluster *c = &d->cluster;
    struct cluster_options o = {.model = d->model,
                                .agents = 4,
                                .loaders = 2,
                                .layout = d->layout,
                                .dispatch = d->dispatch,
                                .step_ms = d->step_ms,
                                .coordinator_args = {"--slots", "8", NULL}};
    if (cluster_start(c, &o) < 0 || cluster_all_start(c) < 0)
        return -1;
    if (cluster_wait_agents(c, 4, 15000) < 0) {
        fprintf(stderr, "the agents and engines did not come up within 15 s; see %s (run with --keep)\n", c->dir);
        return -1;
    }
    printf("started: a coordinator, 4 agents and their engines; only gpu0 and gpu1 can read the checkpoint\n");
    if (demo_scale(d, "cold start on 2 ranks", "2", NULL) < 0)
        return -1;
    if (demo_feed(d, (const char *[]){"--duration", "4", NULL}) < 0 || demo_pause(d, "unscaled run, to compare", 4200) < 0)
        return -1;
    if (cluster_feeder_wait(c, 30000) != 0) {
        fprintf(stderr, "the unscaled run failed; see feeder.log (run with --keep)\n");
        return -1;
    }
    *ret_base = demo_json(d, "report.json");
    if (demo_feed(d, NULL) < 0 || demo_pause(d, "serving on 2 ranks", d->settle_ms) < 0)
        return -1;
    static const struct {
        const char *title, *to, *remove;
    } steps[] = {{"scale --to 4", "4", NULL},
                 {"scale --to 3 (rank 1 leaves)", "3", "gpu1"},
                 {"scale --to 2", "2", NULL},
                 {"scale --to 4 again", "4", NULL}};
    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++)
        if (demo_scale(d, steps[i].title, steps[i].to, steps[i].remove) < 0 ||
            demo_pause(d, "serving", d->settle_ms) < 0)
            return -1;
    *ret_feeder = cluster_feeder_stop(c, 60000);
    *ret_report = demo_json(d, "report.json");
    return demo_verify(d);
}

/* ---- the report ---- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report_operations(struct demo *d)
{
    double holds[STEPS_MAX];
    int n = 0;
    printf("\n  operation                           total   moved      bound      arrivals (bound)   longest pause\n");
    for (int i = 0; i < d->n_results; i++) {
        const Pb__StatusReply *s = d->results[i].status;
        const Pb__Operation *op = s ? s->op : NULL;
        if (!op)
            continue;
        const Pb__PlanSummary *p = op->plan;
        char moved[32], bound[32] = "-", arrivals[48] = "-";
        if (p) {
            bool up = op->kind == PB__OP_KIND__SCALE_UP;
            uint64_t least = up ? p->bound_fill : p->bound_hard;
            const Pb__StatusReply *before = i > 0 ? d->results[i - 1].status : NULL;
            uint64_t joiners = up && before ? s->view->n_members - before->view->n_members : 0;
            megabytes(least * p->expert_bytes + joiners * p->dense_bytes, bound, sizeof(bound));
            snprintf(arrivals, sizeof(arrivals), "%llu (%s %llu)",
                     (unsigned long long)(p->arrivals_before + p->arrivals_after), up ? "fill" : "hard",
                     (unsigned long long)least);
        }
        printf("  %-34s %5.2f s  %-10s %-10s %-18s %.3f ms\n", d->results[i].title, d->results[i].seconds,
               megabytes(op->bytes_done, moved, sizeof(moved)), bound, arrivals, (double)op->hold_ns_max / 1e6);
        if (i > 0)
            holds[n++] = (double)op->hold_ns_max / 1e6;
    }
    qsort(holds, (size_t)n, sizeof(holds[0]), by_value);
    if (n)
        printf("\n  pause of an engine (held between two steps), over %d scale operations: longest %.3f ms, median %.3f ms\n",
               n, holds[n - 1], holds[n / 2]);
    printf("\n  time of each phase, ms\n");
    for (int i = 0; i < d->n_results; i++) {
        const Pb__Operation *op = d->results[i].status ? d->results[i].status->op : NULL;
        printf("  %-34s", d->results[i].title);
        for (size_t k = 0; op && k < op->n_phases; k++)
            if (op->phases[k]->ns >= 100000)
                printf(" %s %.1f", op->phases[k]->phase, (double)op->phases[k]->ns / 1e6);
        printf("\n");
    }
}

static bool demo_report(struct demo *d, const json_t *base, const json_t *report, int feeder)
{
    double issued = number(report, "issued"), completed = number(report, "completed"), wrong = number(report, "wrong");
    bool good = feeder == 0 && issued > 0 && completed == issued && wrong == 0;
    printf("\nreport\n");
    printf("  requests: %.0f issued, %.0f completed, %.0f token for token equal to the reference; %.0f moved to "
           "another rank\n",
           issued, completed, completed - wrong, number(report, "handed_back") + number(report, "refused") + number(report, "lost"));
    printf("  longest gap between two tokens of one request: %.1f ms while scaling, %.1f ms unscaled; median %.1f and "
           "%.1f ms\n",
           number(report, "longest_gap_ms"), number(base, "longest_gap_ms"), number(report, "median_gap_ms"),
           number(base, "median_gap_ms"));
    report_operations(d);
    if (!good)
        printf("\n  NOT GOOD: the feeder exited with %d\n", feeder);
    return good;
}

/* ---- options ---- */

static const struct argp_option options[] = {
    {"model", 'm', "DIR", 0, "checkpoint with its reference.safetensors (default tests/data/qwen3-moe-tiny)", 0},
    {"layout", 'l', "loader|fused", 0, "who lays out the weights: the agent's loader, or the engine, which seals them", 0},
    {"dispatch", 'd', "source|replicated", 0, "how the engines' dispatch reads the map", 0},
    {"step-ms", 's', "MS", 0, "shortest engine step (default 20)", 0},
    {"concurrency", 'c', "N", 0, "requests in flight (default 12)", 0},
    {"settle-ms", 't', "MS", 0, "time to serve between two operations (default 1500)", 0},
    {"keep", 'k', NULL, 0, "keep the folder with logs and state, and say where it is", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct demo *d = state->input;
    switch (key) {
    case 'm':
        d->model = arg;
        break;
    case 'l':
        d->layout = arg;
        break;
    case 'd':
        d->dispatch = arg;
        break;
    case 's':
        d->step_ms = atoi(arg);
        break;
    case 'c':
        d->concurrency = atoi(arg);
        break;
    case 't':
        d->settle_ms = atoi(arg);
        break;
    case 'k':
        d->keep = true;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        options, parse, NULL,
        "Scales a served model 2 -> 4 -> 3 -> 2 -> 4 ranks under load, on loopback, and reports.", NULL, NULL, NULL};
    struct demo d = {.model = "tests/data/qwen3-moe-tiny",
                     .step_ms = 20,
                     .concurrency = 12,
                     .settle_ms = 1500,
                     .tty = isatty(1) && getenv("TERM") && strcmp(getenv("TERM"), "dumb") != 0};
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, 0, NULL, &d);
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGINT, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    sigaction(SIGHUP, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);

    json_t *base = NULL, *report = NULL;
    int feeder = -1;
    bool good = demo_run(&d, &base, &report, &feeder) == 0;
    demo_clear(&d);
    if (interrupted)
        printf("interrupted: stopping every process\n");
    else if (report)
        good = demo_report(&d, base, report, feeder) && good;
    rpc_client_free(d.client);
    char dir[128];
    snprintf(dir, sizeof(dir), "%s", d.cluster.dir);
    int bad = cluster_stop(&d.cluster, d.keep);
    if (d.keep)
        printf("\nlogs and state are in %s\n", dir);
    for (int i = 0; i < d.n_results; i++)
        rpc_unpack_free((ProtobufCMessage *)d.results[i].status);
    json_decref(base);
    json_decref(report);
    if (interrupted)
        return 128 + (int)interrupted;
    good = good && bad == 0;
    printf("\n%s\n", good ? "good: every request completed with exactly the reference's tokens, and nothing is left behind"
                          : "NOT GOOD");
    return good ? 0 : 1;
}
