/* The demo: a served mixture-of-experts model goes 2 -> 4 -> 3 -> 2 -> 4 ranks under load, and nobody notices.
 *
 * Starts a cluster on loopback (tests/harness), feeds requests, runs `eepctl scale`, shows what happens while it
 * happens, and ends with a report.  Exit 0 only if every request completed with exactly the reference's tokens, every
 * scale operation succeeded, every slot verified, and every process ended cleanly. */
#include <argp.h>
#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/control_methods.h"
#include "tests/demo/demo.h"

#define START_MS 30000 /* for all agents and engines; on a GPU each begins with a context */
#define OTHER_START_MS 180000 /* engines of another kind, which may have much to import first */

static volatile sig_atomic_t interrupted;

static void on_signal(int signal)
{
    interrupted = signal;
}

Pb__StatusReply *demo_status(struct demo *d)
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

json_t *demo_json(struct demo *d, const char *name)
{
    char *text = cluster_read(&d->cluster, name);
    json_t *root = text ? json_loads(text, 0, NULL) : NULL;
    free(text);
    return root;
}

double demo_number(const json_t *root, const char *key)
{
    return json_number_value(json_object_get(root, key));
}

const char *demo_megabytes(uint64_t bytes, char *text, size_t size)
{
    snprintf(text, size, "%.2f MB", (double)bytes / 1e6);
    return text;
}

/* ---- the steps ---- */

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

/* Room for one more. */
static struct result *demo_result(struct demo *d)
{
    if (d->n_results == d->room) {
        int room = d->room ? 2 * d->room : 16;
        struct result *grown = realloc(d->results, (size_t)room * sizeof(*grown));
        if (!grown)
            return NULL;
        d->results = grown;
        d->room = room;
    }
    struct result *r = &d->results[d->n_results++];
    memset(r, 0, sizeof(*r));
    return r;
}

static int demo_verify(struct demo *d, bool say)
{
    char out[1024];
    unsigned long long slots = 0;
    int code = cluster_ctl(&d->cluster, out, sizeof(out), "verify", NULL);
    if (interrupted)
        return -1;
    if (say || code != 0)
        printf("  eepctl verify: %s%s", out, strchr(out, '\n') ? "" : "\n");
    if (sscanf(out, "%llu", &slots) == 1)
        d->verified += slots;
    return code;
}

/* One operation, and every slot verified after it. */
static int demo_scale(struct demo *d, int from, int to, const char *title, const char *remove)
{
    char number[16];
    const char *args[8] = {"scale", "--to", number, NULL};
    snprintf(number, sizeof(number), "%d", to);
    if (remove) {
        args[3] = "--remove";
        args[4] = remove;
    }
    struct result *r = demo_result(d);
    if (!r)
        return -1;
    r->from = from;
    r->to = to;
    snprintf(r->title, sizeof(r->title), "%s", title);
    uint64_t begin = cluster_now_ms();
    pid_t pid = cluster_ctl_start(&d->cluster, "scale", args);
    int code = -1;
    while (pid > 0 && !interrupted) {
        code = cluster_wait(&pid, 20);
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
    return code == 0 ? demo_verify(d, false) : -1;
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

/* The sequence, as often as asked for.  The first time that one of four leaves, it is gpu1, which read the model. */
static int demo_cycles(struct demo *d)
{
    int ranks = d->sequence[0];
    char title[64];
    for (int cycle = 0; cycle < d->cycles; cycle++) {
        for (int i = 0; i < d->n_sequence; i++) {
            int to = d->sequence[i];
            if (to == ranks)
                continue;
            const char *remove = cycle == 0 && ranks == 4 && to == 3 ? "gpu1" : NULL;
            snprintf(title, sizeof(title), "scale --to %d%s", to, remove ? " (gpu1 leaves)" : "");
            if (demo_scale(d, ranks, to, title, remove) || demo_pause(d, "serving", d->settle_ms) < 0)
                return -1;
            ranks = to;
        }
        resources_take(d, ranks);
        if (d->cycles > 1)
            printf("  cycle %d of %d done\n", cycle + 1, d->cycles);
    }
    return 0;
}

static int demo_run(struct demo *d, json_t **ret_base, json_t **ret_report, int *ret_feeder)
{
    char title[64];
    struct cluster *c = &d->cluster;
    struct cluster_options o = {.bin = d->bin,
                                .model = d->model,
                                .agents = d->agents,
                                .memory = d->memory,
                                .transport = d->transport,
                                .busy_us = d->busy_us,
                                .loaders = 2,
                                .layout = d->layout,
                                .dispatch = d->dispatch,
                                .step_ms = d->step_ms,
                                .interrupted = &interrupted,
                                .coordinator_args = {"--slots", "8", NULL}};
    if (cluster_start(c, &o) < 0 || cluster_all_start(c) < 0)
        return -1;
    int start_ms = getenv("EEP_ENGINE") ? OTHER_START_MS : START_MS;
    if (cluster_wait_agents(c, d->agents, start_ms) < 0) {
        if (!interrupted) {
            fprintf(stderr, "the agents and engines did not come up within %d s; the last line of each log:\n",
                    start_ms / 1000);
            cluster_logs_show(c);
        }
        return -1;
    }
    printf("started: a coordinator, %d agents, %d engines; only gpu0 and gpu1 read the model\n", d->agents, d->agents);
    if (c->gpus)
        printf("weights in GPU memory (%d GPU%s), moved by %s\n", c->gpus, c->gpus > 1 ? "s" : "",
               c->options.transport);
    snprintf(title, sizeof(title), "cold start on %d ranks", d->sequence[0]);
    if (demo_scale(d, 0, d->sequence[0], title, NULL))
        return -1;
    if (demo_feed(d, (const char *[]){"--duration", "4", NULL}) < 0 ||
        demo_pause(d, "unscaled run, to compare", 4200) < 0)
        return -1;
    if (cluster_feeder_wait(c, 30000) != 0) {
        if (!interrupted) {
            fprintf(stderr, "the unscaled run failed; the last line of each log:\n");
            cluster_logs_show(c);
        }
        return -1;
    }
    *ret_base = demo_json(d, "report.json");
    if (demo_feed(d, NULL) < 0 || demo_pause(d, "serving", d->settle_ms) < 0 || demo_cycles(d) < 0)
        return -1;
    *ret_feeder = cluster_feeder_stop(c, 60000);
    *ret_report = demo_json(d, "report.json");
    return demo_verify(d, true);
}

/* ---- options ---- */

enum { OPT_MEMORY = 256, OPT_TRANSPORT, OPT_SEQUENCE, OPT_CYCLES };

static const struct argp_option options[] = {
    {"model", 'm', "DIR", 0, "checkpoint with its reference.safetensors (default tests/data/qwen3-moe-tiny)", 0},
    {"layout", 'l', "loader|fused", 0, "who lays out the weights: the agent's loader, or the engine, which seals them",
     0},
    {"dispatch", 'd', "source|replicated", 0, "how the engines' dispatch reads the map", 0},
    {"step-ms", 's', "MS", 0, "shortest engine step (default 20)", 0},
    {"concurrency", 'c', "N", 0, "requests in flight (default 12)", 0},
    {"busy-us", 'b', "US", 0, "spinning at the beginning of each engine step, where it is computed (default 0)", 0},
    {"memory", OPT_MEMORY, "host|cuda", 0,
     "where the weights lie; on GPUs, the agents share them (default $EEP_TEST_MEMORY, host)", 0},
    {"transport", OPT_TRANSPORT, "NAME", 0,
     "of the agents: host, or with cuda auto, cuda_peer or nccl (default $EEP_TEST_TRANSPORT)", 0},
    {"sequence", OPT_SEQUENCE, "N,N,...", 0, "ranks, one operation after the other (default 2,4,3,2,4)", 0},
    {"cycles", OPT_CYCLES, "N", 0, "the sequence so many times (default 1)", 0},
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

static void sequence_option(struct demo *d, struct argp_state *state, const char *text)
{
    char *copy = strdup(text), *save = NULL;
    d->n_sequence = 0;
    for (char *word = copy ? strtok_r(copy, ",", &save) : NULL; word; word = strtok_r(NULL, ",", &save)) {
        if (d->n_sequence == SEQUENCE_MAX)
            argp_error(state, "--sequence has at most %d numbers", SEQUENCE_MAX);
        d->sequence[d->n_sequence++] = number_option(state, "sequence", word, 2, CLUSTER_AGENTS_MAX);
    }
    free(copy);
    if (d->n_sequence == 0)
        argp_error(state, "--sequence must be numbers of ranks with commas between, not '%s'", text);
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
    case 'b':
        d->busy_us = number_option(state, "busy-us", arg, 0, 10000000);
        break;
    case OPT_MEMORY:
        d->memory = word_option(state, "memory", arg, "host", "cuda");
        break;
    case OPT_TRANSPORT:
        d->transport = arg;
        break;
    case OPT_SEQUENCE:
        sequence_option(d, state, arg);
        break;
    case OPT_CYCLES:
        d->cycles = number_option(state, "cycles", arg, 1, CYCLES_MAX);
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
        fprintf(stderr,
                "eep-demo: cannot read %s/%s: %s; --model names a checkpoint folder with its reference (run "
                "from the root of the source tree for the default)\n",
                d->model, files[i], strerror(errno));
        return -1;
    }
    if (snprintf(path, sizeof(path), "%s/eep-coordinator", d->bin) >= (int)sizeof(path) || access(path, X_OK) != 0) {
        fprintf(stderr,
                "eep-demo: cannot run %s/eep-coordinator: %s; run `make`, or set EEP_BIN to the folder of the "
                "programs\n",
                d->bin, strerror(errno));
        return -1;
    }
    return 0;
}

/* $EEP_BIN, or where this program was built: <bin>/tests/eep-demo. */
static void demo_find_bin(struct demo *d)
{
    const char *env = getenv("EEP_BIN");
    ssize_t n =
        env ? snprintf(d->bin, sizeof(d->bin), "%s", env) : readlink("/proc/self/exe", d->bin, sizeof(d->bin) - 1);
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
        options, parse, NULL, "Scales a served model from 2 to 4 ranks and back under load, on loopback, and reports.",
        NULL,    NULL,  NULL};
    struct demo d = {.model = "tests/data/qwen3-moe-tiny",
                     .step_ms = 20,
                     .concurrency = 12,
                     .settle_ms = 1500,
                     .sequence = {2, 4, 3, 2, 4},
                     .n_sequence = 5,
                     .cycles = 1,
                     .tty = isatty(1) && getenv("TERM") && strcmp(getenv("TERM"), "dumb") != 0};
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, 0, NULL, &d);
    for (int i = 0; i < d.n_sequence; i++)
        d.agents = d.sequence[i] > d.agents ? d.sequence[i] : d.agents;
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
        good = demo_report(&d, base, report, feeder) && resources_report(&d) && good;
    rpc_client_free(d.client);
    int bad = cluster_engines_stop(&d.cluster);
    if (!interrupted && report)
        report_steps(&d);
    char dir[128];
    snprintf(dir, sizeof(dir), "%s", d.cluster.dir);
    bad += cluster_stop(&d.cluster, d.keep);
    if (d.keep)
        printf("\nlogs and state are in %s\n", dir);
    for (int i = 0; i < d.n_results; i++)
        rpc_unpack_free((ProtobufCMessage *)d.results[i].status);
    free(d.results);
    json_decref(base);
    json_decref(report);
    if (interrupted)
        return 128 + (int)interrupted;
    good = good && bad == 0;
    printf("\n%s\n",
           good ? "good: all requests have exactly the reference's tokens; nothing is left behind" : "NOT GOOD");
    return good ? 0 : 1;
}
