/* eep-feeder: options, and when to stop.  See feeder.h.  A test instrument. */
#include <argp.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/loop.h"
#include "tests/feeder/feeder.h"

#define TICK_MS   20
#define STATUS_MS 200

enum {
    KEY_COORDINATOR = 256,
    KEY_CLUSTER,
    KEY_DATA,
    KEY_CONCURRENCY,
    KEY_REQUESTS,
    KEY_DURATION,
    KEY_TOKENS,
    KEY_DRIFT,
    KEY_UNTIL,
    KEY_REPORT,
    KEY_STATUS,
    KEY_FINISH
};

static const struct argp_option option_table[] = {
    {"coordinator", KEY_COORDINATOR, "ADDRESS", 0, "the coordinator's control socket: host:port or unix:/path", 0},
    {"cluster", KEY_CLUSTER, "NAME", 0, "refuse a coordinator of another cluster", 0},
    {"data", KEY_DATA, "DIR", 0, "folder with reference.safetensors: prompts, and the tokens expected", 0},
    {"concurrency", KEY_CONCURRENCY, "N", 0, "requests in flight (default 8)", 0},
    {"requests", KEY_REQUESTS, "N", 0, "stop after so many", 0},
    {"duration", KEY_DURATION, "S", 0, "stop issuing after so many seconds", 0},
    {"until-file", KEY_UNTIL, "PATH", 0, "stop issuing when this file exists", 0},
    {"max-tokens", KEY_TOKENS, "N", 0, "tokens per request (default: all that the reference knows)", 0},
    {"drift", KEY_DRIFT, "S", 0, "a quarter of the prompts only, another one every so many seconds: skewed load", 0},
    {"report", KEY_REPORT, "FILE", 0, "write the summary here (default: standard output)", 0},
    {"status", KEY_STATUS, "FILE", 0, "rewrite this file with the counts every 200 ms", 0},
    {"finish", KEY_FINISH, "S", 0, "how long requests in flight may take after the end (default 60)", 0},
    {0},
};

static uint64_t number(struct argp_state *state, const char *text, double scale, double max)
{
    char *end;
    errno = 0;
    double v = strtod(text, &end);
    if (errno || end == text || *end || !(v > 0) || v > max)
        argp_error(state, "'%s' is not a number above 0 and up to %.0f", text, max);
    return (uint64_t)(v * scale);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct feeder_options *o = state->input;
    switch (key) {
    case KEY_COORDINATOR:
        o->coordinator = arg;
        return 0;
    case KEY_CLUSTER:
        o->cluster = arg;
        return 0;
    case KEY_DATA:
        o->data = arg;
        return 0;
    case KEY_CONCURRENCY:
        o->concurrency = (uint32_t)number(state, arg, 1, 100000);
        return 0;
    case KEY_REQUESTS:
        o->requests = number(state, arg, 1, 1e15);
        return 0;
    case KEY_DURATION:
        o->duration_ms = number(state, arg, 1000, 1e9);
        return 0;
    case KEY_UNTIL:
        o->until_file = arg;
        return 0;
    case KEY_DRIFT:
        o->drift_ms = number(state, arg, 1000, 1e9);
        return 0;
    case KEY_TOKENS:
        o->max_tokens = (uint32_t)number(state, arg, 1, 65536);
        return 0;
    case KEY_REPORT:
        o->report = arg;
        return 0;
    case KEY_STATUS:
        o->status = arg;
        return 0;
    case KEY_FINISH:
        o->finish_ms = (uint32_t)number(state, arg, 1000, 1e6);
        return 0;
    case ARGP_KEY_END:
        if (!o->coordinator || !o->data)
            argp_error(state, "--coordinator and --data are needed");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void stop_issuing(struct feeder *f, uint64_t now)
{
    if (f->stopped_ns == 0)
        f->stopped_ns = now;
}

static void on_signal(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    stop_issuing(user, clock_now_ns());
}

static void on_tick(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct feeder *f = user;
    const struct feeder_options *o = &f->options;
    uint64_t now = clock_now_ns();
    if ((o->duration_ms && now - f->began_ns >= o->duration_ms * 1000000) ||
        (o->requests && f->figures.issued >= o->requests) || (o->until_file && access(o->until_file, F_OK) == 0))
        stop_issuing(f, now);
    watch_tick(f);
    jobs_pump(f);
    if (clock_now_ms() >= f->status_ms) {
        f->status_ms = clock_now_ms() + STATUS_MS;
        status_write(f);
    }
    /* a signal may have come after `now` was read */
    bool late = f->stopped_ns && now > f->stopped_ns && now - f->stopped_ns >= (uint64_t)o->finish_ms * 1000000;
    if (f->stopped_ns && (jobs_active(f) == 0 || late))
        event_base_loopbreak(f->base);
}

static int feeder_open(struct feeder *f, struct err *err)
{
    int rc = jobs_open(f, err);
    if (rc)
        return rc;
    if (f->options.max_tokens == 0)
        f->options.max_tokens = f->greedy_tokens;
    f->base = event_base_new();
    if (!f->base)
        return err_set(err, ERR_NOMEM, "out of memory for the event loop");
    f->tick = event_new(f->base, -1, EV_PERSIST, on_tick, f);
    f->term = evsignal_new(f->base, SIGTERM, on_signal, f);
    f->interrupt = evsignal_new(f->base, SIGINT, on_signal, f);
    struct timeval every = {.tv_usec = TICK_MS * 1000};
    if (!f->tick || !f->term || !f->interrupt || event_add(f->tick, &every) || event_add(f->term, NULL) ||
        event_add(f->interrupt, NULL))
        return err_set(err, ERR_NOMEM, "out of memory for timers");
    return watch_open(f, err);
}

static void feeder_close(struct feeder *f)
{
    rpc_free(f->rpc);
    targets_free(f);
    jobs_close(f);
    figures_done(&f->figures);
    if (f->tick)
        event_free(f->tick);
    if (f->term)
        event_free(f->term);
    if (f->interrupt)
        event_free(f->interrupt);
    loop_free(f->base);
}

int main(int argc, char **argv)
{
    static const struct argp argp = {.options = option_table,
                                     .parser = parse,
                                     .doc = "Sends requests to the engines of an eep cluster and checks every token.\v"
                                            "Exit status: 0 when every request issued completed with exactly the "
                                            "reference's tokens; 1 otherwise; 2 usage."};
    static struct feeder f = {.options = {.cluster = "", .concurrency = 8, .finish_ms = 60000}};
    struct err err = {0};
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, 0, NULL, &f.options);
    signal(SIGPIPE, SIG_IGN);
    f.began_ns = clock_now_ns();
    int rc = feeder_open(&f, &err);
    if (rc == 0) {
        event_base_dispatch(f.base);
        const struct figures *g = &f.figures;
        f.exit_code = g->issued > 0 && g->completed == g->issued && g->wrong == 0 && g->failed == 0 ? 0 : 1;
        status_write(&f);
        rc = report_write(&f, &err);
    }
    if (rc)
        fprintf(stderr, "eep-feeder: %s\n", err.text);
    feeder_close(&f);
    return rc ? 1 : f.exit_code;
}
