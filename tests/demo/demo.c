/* The demo: a served mixture-of-experts model goes 2 -> 4 -> 3 -> 2 -> 4 ranks under load, and nobody notices.
 *
 * Starts a cluster on loopback (tests/harness), feeds requests, runs `eepctl scale`, shows what happens while it
 * happens, and ends with a report.  Exit 0 only if every request completed with exactly the reference's tokens, every
 * scale operation succeeded, every slot verified, and every process ended cleanly. */
#include <argp.h>
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
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
    char bin[256]; /* folder of the programs */
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

static size_t demo_width(const struct demo *d)
{
    struct winsize size = {0};
    if (!d->tty || ioctl(1, TIOCGWINSZ, &size) < 0 || size.ws_col == 0)
        return 100;
    return size.ws_col;
}

/* A line of the view.  On a terminal it is cut, not wrapped: what is drawn again goes up by lines of the screen. */
static void __attribute__((format(printf, 2, 3))) demo_line(struct demo *d, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    size_t width = demo_width(d);
    if (d->tty && width < sizeof(text))
        text[width - 1] = '\0';
    printf("%s\n", text);
    d->lines++;
}

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
        demo_line(d, "  %-26s %-15s %s of %s%s%s", title, op->phase, megabytes(op->bytes_done, a, sizeof(a)),
                  megabytes(op->bytes_planned, b, sizeof(b)), op->awaited[0] ? "  awaits " : "", op->awaited);
    else
        demo_line(d, "  %-26s serving", title);
    demo_line(d, "  epoch %-3llu map %-4llu ranks:%s", s ? (unsigned long long)s->view->epoch : 0ULL,
              s ? (unsigned long long)s->view->map_version : 0ULL, ranks);
    demo_line(d, "  requests: %.0f issued, %.0f done, %.0f wrong; longest gap between tokens %.1f ms",
              number(feeder, "issued"), number(feeder, "completed"), number(feeder, "wrong"),
              number(feeder, "longest_gap_ms"));
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
    printf("  %-26s %s in %.2f s\n", title, code == 0 ? "done" : "FAILED", r->seconds);
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
    if (interrupted)
        return -1;
    printf("  eepctl verify: %s%s", out, strchr(out, '\n') ? "" : "\n");
    return code;
}

static int demo_run(struct demo *d, json_t **ret_base, json_t **ret_report, int *ret_feeder)
{
    struct cluster *c = &d->cluster;
    struct cluster_options o = {.bin = d->bin,
                                .model = d->model,
                                .agents = 4,
                                .loaders = 2,
                                .layout = d->layout,
                                .dispatch = d->dispatch,
                                .step_ms = d->step_ms,
                                .interrupted = &interrupted,
                                .coordinator_args = {"--slots", "8", NULL}};
    if (cluster_start(c, &o) < 0 || cluster_all_start(c) < 0)
        return -1;
    if (cluster_wait_agents(c, 4, 15000) < 0) {
        if (!interrupted) {
            fprintf(stderr, "the agents and engines did not come up within 15 s; the last line of each log:\n");
            cluster_logs_show(c);
        }
        return -1;
    }
    printf("started: a coordinator, 4 agents, 4 engines; only gpu0 and gpu1 read the model\n");
    if (demo_scale(d, "cold start on 2 ranks", "2", NULL) < 0)
        return -1;
    if (demo_feed(d, (const char *[]){"--duration", "4", NULL}) < 0 || demo_pause(d, "unscaled run, to compare", 4200) < 0)
        return -1;
    if (cluster_feeder_wait(c, 30000) != 0) {
        if (!interrupted) {
            fprintf(stderr, "the unscaled run failed; the last line of each log:\n");
            cluster_logs_show(c);
        }
        return -1;
    }
    *ret_base = demo_json(d, "report.json");
    if (demo_feed(d, NULL) < 0 || demo_pause(d, "serving on 2 ranks", d->settle_ms) < 0)
        return -1;
    static const struct {
        const char *title, *to, *remove;
    } steps[] = {{"scale --to 4", "4", NULL},
                 {"scale --to 3 (gpu1 leaves)", "3", "gpu1"},
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

/* Each operation's phases, on as many lines as the terminal's width needs. */
static void report_phases(const struct demo *d)
{
    size_t width = demo_width(d);
    printf("\n  time of each phase, ms\n");
    for (int i = 0; i < d->n_results; i++) {
        const Pb__Operation *op = d->results[i].status ? d->results[i].status->op : NULL;
        size_t column = (size_t)printf("  %-26s", d->results[i].title);
        for (size_t k = 0; op && k < op->n_phases; k++) {
            char text[64];
            size_t len = (size_t)snprintf(text, sizeof(text), " %s %.1f", op->phases[k]->phase,
                                          (double)op->phases[k]->ns / 1e6);
            if (op->phases[k]->ns < 100000)
                continue;
            if (column + len > width)
                column = (size_t)printf("\n%28s", "") - 1;
            printf("%s", text);
            column += len;
        }
        printf("\n");
    }
}

static void report_operations(struct demo *d)
{
    double holds[STEPS_MAX];
    int n = 0;
    printf("\n  %-26s %-6s %-9s %-9s %-13s %s\n", "operation", " total", "moved", "bound", "arrivals", "pause");
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
        printf("  %-26s %4.2f s %-9s %-9s %-13s %.3f ms\n", d->results[i].title, d->results[i].seconds,
               megabytes(op->bytes_done, moved, sizeof(moved)), bound, arrivals, (double)op->hold_ns_max / 1e6);
        if (i > 0)
            holds[n++] = (double)op->hold_ns_max / 1e6;
    }
    qsort(holds, (size_t)n, sizeof(holds[0]), by_value);
    if (n)
        printf("\n  pause of an engine (held between two steps), over %d scale operations:\n"
               "            longest %.3f ms, median %.3f ms\n",
               n, holds[n - 1], holds[n / 2]);
    report_phases(d);
}

static bool demo_report(struct demo *d, const json_t *base, const json_t *report, int feeder)
{
    double issued = number(report, "issued"), completed = number(report, "completed"), wrong = number(report, "wrong");
    bool good = feeder == 0 && issued > 0 && completed == issued && wrong == 0;
    printf("\nreport\n");
    printf("  requests: %.0f issued, %.0f completed, %.0f token for token equal to the reference;\n"
           "            %.0f moved to another rank\n",
           issued, completed, completed - wrong, number(report, "handed_back") + number(report, "refused") + number(report, "lost"));
    printf("  longest gap between two tokens of one request: %.1f ms while scaling,\n"
           "            %.1f ms unscaled; median %.1f and %.1f ms\n",
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

static int number_option(struct argp_state *state, const char *name, const char *text, int min, int max)
{
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < min || value > max)
        argp_error(state, "--%s must be a whole number from %d to %d, not '%s'", name, min, max, text);
    return (int)value;
}

static const char *word_option(struct argp_state *state, const char *name, const char *text, const char *one,
                               const char *other)
{
    if (strcmp(text, one) != 0 && strcmp(text, other) != 0)
        argp_error(state, "--%s must be %s or %s, not '%s'", name, one, other, text);
    return text;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct demo *d = state->input;
    switch (key) {
    case 'm':
        d->model = arg;
        break;
    case 'l':
        d->layout = word_option(state, "layout", arg, "loader", "fused");
        break;
    case 'd':
        d->dispatch = word_option(state, "dispatch", arg, "source", "replicated");
        break;
    case 's':
        d->step_ms = number_option(state, "step-ms", arg, 0, 10000);
        break;
    case 'c':
        d->concurrency = number_option(state, "concurrency", arg, 1, 1000);
        break;
    case 't':
        d->settle_ms = number_option(state, "settle-ms", arg, 0, 3600000);
        break;
    case 'k':
        d->keep = true;
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", arg);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* Before anything is started: a sentence now instead of a time-out later. */
static int demo_check(struct demo *d)
{
    static const char *const files[] = {"config.json", "reference.safetensors"};
    char path[4096];
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        if (snprintf(path, sizeof(path), "%s/%s", d->model, files[i]) < (int)sizeof(path) && access(path, R_OK) == 0)
            continue;
        fprintf(stderr, "eep-demo: cannot read %s/%s: %s; --model names a checkpoint folder with its reference (run "
                        "from the root of the source tree for the default)\n", d->model, files[i], strerror(errno));
        return -1;
    }
    if (snprintf(path, sizeof(path), "%s/eep-coordinator", d->bin) >= (int)sizeof(path) || access(path, X_OK) != 0) {
        fprintf(stderr, "eep-demo: cannot run %s/eep-coordinator: %s; run `make`, or set EEP_BIN to the folder of the "
                        "programs\n", d->bin, strerror(errno));
        return -1;
    }
    return 0;
}

/* $EEP_BIN, or where this program was built: <bin>/tests/eep-demo. */
static void demo_find_bin(struct demo *d)
{
    const char *env = getenv("EEP_BIN");
    ssize_t n = env ? snprintf(d->bin, sizeof(d->bin), "%s", env) : readlink("/proc/self/exe", d->bin, sizeof(d->bin) - 1);
    if (env || n <= 0)
        return;
    d->bin[n] = '\0';
    for (int i = 0; i < 2; i++) {
        char *slash = strrchr(d->bin, '/');
        if (slash)
            *slash = '\0';
    }
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
    demo_find_bin(&d);
    if (demo_check(&d) < 0)
        return 2;
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
    printf("\n%s\n", good ? "good: all requests have exactly the reference's tokens; nothing is left behind"
                          : "NOT GOOD");
    return good ? 0 : 1;
}
