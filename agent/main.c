/* eep-agent: options, signals, systemd, and the life of incarnations.
 *
 * One process, one service at a time (service.h).  An evicted incarnation is closed and a new one opened, after a pause
 * that grows while evictions follow each other closely.  SIGTERM and SIGINT ask the coordinator to drain this agent
 * first; a second one, or --stop-after, ends at once. */
#include <argp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/engine_process.h"
#include "agent/gpu_share.h"
#include "agent/keep.h"
#include "agent/service.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/loop.h"
#include "common/metrics_http.h"
#include "common/options.h"
#include "common/tls.h"

#define LAST_WORDS_MS 100 /* between the core's exit and closing its connections */
#define RESTART_FIRST_MS 200
#define RESTART_LAST_MS 5000
#define STEADY_NS (60 * UINT64_C(1000000000))

struct options {
    struct service_config service;
    const char *engine_command, *port_file, *metrics;
    struct tls_files tls;
    struct tls_credentials credentials;
    char engine_socket[512], memory[128];
    enum log_level level;
    enum log_format format;
    uint32_t stop_after_ms;
};

enum { KEY_ID = 256, KEY_COORDINATOR, KEY_LISTEN, KEY_ADVERTISE, KEY_DATA_LISTEN, KEY_ENGINE_SOCKET,
       KEY_CHECKPOINT, KEY_SLOTS, KEY_NODE, KEY_MEMORY, KEY_TRANSPORT, KEY_CLUSTER, KEY_LEVEL, KEY_ENGINE_COMMAND,
       KEY_INSECURE, KEY_PORT_FILE, KEY_STOP_AFTER, KEY_TRANSFER, KEY_STUCK, KEY_LIST_GPUS, KEY_SHARED_GPU,
       KEY_STEP_LIMIT, KEY_TLS_CERT, KEY_TLS_KEY, KEY_TLS_CA, KEY_FORMAT, KEY_DATA_INSECURE,
       KEY_METRICS };

static const struct argp_option option_table[] = {
    {"id", KEY_ID, "NAME", 0, "name of this agent, unique in the cluster (required)", 0},
    {"coordinator", KEY_COORDINATOR, "ADDR", 0, "unix:/path or host:port (default unix:/run/eep/coordinator.sock)", 0},
    {"cluster", KEY_CLUSTER, "NAME", 0, "name of the cluster (default eep)", 0},
    {"node", KEY_NODE, "N", 0, "number of this host: agents of one host have the same (default 0)", 0},
    {0, 0, 0, 0, "Model:", 1},
    {"checkpoint", KEY_CHECKPOINT, "DIR", 0,
     "Hugging Face folder to load from in a cold start; an agent without one joins a model that serves, or has an "
     "engine that brings its own layout", 1},
    {"slots", KEY_SLOTS, "N", 0, "expert slots per layer that fit here (default 0: as the coordinator says)", 1},
    {"memory", KEY_MEMORY, "NAME", 0,
     "where the weights lie: host (default), cuda (the first GPU), cuda:INDEX, cuda:GPU-UUID, or cuda:id (the GPU whose index "
     "or UUID is --id)", 1},
    {"transport", KEY_TRANSPORT, "NAME", 0,
     "how weights move: host (default); with --memory cuda: auto (default: copies between GPUs of one host that reach "
     "each other, NCCL for the others), cuda_peer (copies only), or nccl", 1},
    {"shared-gpu", KEY_SHARED_GPU, 0, 0,
     "for development and tests: let several agents, each with this option, use one GPU; without it a second agent on "
     "a GPU is refused", 1},
    {"stuck-ms", KEY_STUCK, "MS", 0,
     "under systemd: what loads and moves weights has shown no progress for so long: the watchdog is not fed any more (0: always "
     "fed; 300000)", 1},
    {"transfer-ms", KEY_TRANSFER, "MS", 0, "a transfer without progress ends after this (60000)", 1},
    {0, 0, 0, 0, "Engine:", 2},
    {"engine-socket", KEY_ENGINE_SOCKET, "PATH", 0, "where the engine attaches (default /run/eep/agent-NAME.sock)", 2},
    {"engine-command", KEY_ENGINE_COMMAND, "COMMAND", 0,
     "start this engine by the shell with $EEP_SOCKET set, start it again when it ends, stop it with the agent", 2},
    {"step-limit-ms", KEY_STEP_LIMIT, "MS", 0,
     "a step that takes longer has hung: the ranks leave it, and an engine that does not is cut off (120000; 0: never)", 2},
    {0, 0, 0, 0, "Network:", 3},
    {"listen", KEY_LISTEN, "HOST:PORT", 0, "for other agents (default 127.0.0.1:0; port 0 picks one)", 3},
    {"data-listen", KEY_DATA_LISTEN, "HOST:PORT", 0, "for weights (default 127.0.0.1:0)", 3},
    {"advertise", KEY_ADVERTISE, "HOST", 0, "the host by which other agents reach this one", 3},
    {"insecure", KEY_INSECURE, 0, 0, "allow addresses other than the loopback, without encryption", 3},
    {"tls-cert", KEY_TLS_CERT, "FILE", OPTIONS_RELOADABLE,
     "certificate (PEM) of this agent: the coordinator's address and --listen speak TLS 1.3 only, unless they are unix "
     "sockets", 3},
    {"tls-key", KEY_TLS_KEY, "FILE", OPTIONS_RELOADABLE, "its key (PEM)", 3},
    {"tls-ca", KEY_TLS_CA, "FILE", OPTIONS_RELOADABLE, "the CA (PEM) that all certificates of the cluster are signed by", 3},
    {"data-insecure", KEY_DATA_INSECURE, 0, 0,
     "allow --data-listen beyond the loopback: weights are never encrypted", 3},
    {"port-file", KEY_PORT_FILE, "FILE", 0, "write both addresses with their real ports there, one a line", 3},
    {"metrics-listen", KEY_METRICS, "ADDR", 0,
     "serve GET /metrics (Prometheus) and GET /healthz on host:port or unix:/path (default: not)", 3},
    {0, 0, 0, 0, "Process:", 4},
    {"stop-after", KEY_STOP_AFTER, "MS", 0, "how long SIGTERM waits for a drain (30000)", 4},
    {"log-format", KEY_FORMAT, "FORMAT", 0,
     "auto (default: systemd's journal where stderr leads there, else logfmt), logfmt or json", 4},
    {"log-level", KEY_LEVEL, "LEVEL", OPTIONS_RELOADABLE, "debug, info (default), warn or error", 4},
    {"list-gpus", KEY_LIST_GPUS, 0, OPTIONS_COMMAND_LINE, "list the GPUs by index, UUID, name and memory, and end", -1},
    OPTIONS_CONFIG(4),
    OPTIONS_HELP(-1),
    {0},
};

static uint32_t number(struct argp_state *state, const char *what, const char *text, uint32_t max)
{
    return (uint32_t)options_number(state, what, text, 0, max);
}

/* An option that is given with an empty value is a script's mistake. */
static const char *text(struct argp_state *state, const char *what, const char *value)
{
    if (!*value)
        options_error(state, "%s must not be empty", what);
    return value;
}

#define GPUS_MAX 64

static int list_gpus(void)
{
    struct gpu gpus[GPUS_MAX];
    size_t n = 0;
    struct err err = {0};
    if (gpu_list(gpus, GPUS_MAX, &n, &err) < 0) {
        fprintf(stderr, "eep-agent: %s\n", err.text);
        return 1;
    }
    for (size_t i = 0; i < n && i < GPUS_MAX; i++)
        printf("%d  %s  %s  %.1f GiB%s\n", gpus[i].index, gpus[i].uuid, gpus[i].name,
               (double)gpus[i].bytes / (1024.0 * 1024.0 * 1024.0),
               gpus[i].exports ? "" : "  (its memory cannot be shared: not usable)");
    return 0;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    struct service_config *s = &o->service;
    switch (key) {
    case KEY_ID: s->id = arg; return 0;
    case KEY_COORDINATOR: s->coordinator = arg; return 0;
    case KEY_CLUSTER: s->cluster = arg; return 0;
    case KEY_NODE: s->node = number(state, "--node", arg, UINT32_MAX); return 0;
    case KEY_CHECKPOINT: s->checkpoint = text(state, "--checkpoint", arg); return 0;
    case KEY_SLOTS: s->slots = number(state, "--slots", arg, 65536); return 0;
    case KEY_MEMORY: s->memory = arg; return 0;
    case KEY_TRANSPORT: s->transport = arg; return 0;
    case KEY_STUCK: s->stuck_ms = (uint32_t)options_number(state, "--stuck-ms", arg, 0, 86400000); return 0;
    case KEY_TRANSFER:
        s->transfer_timeout_ms = (uint32_t)options_number(state, "--transfer-ms", arg, 100, 86400000);
        return 0;
    case KEY_STEP_LIMIT: s->step_limit_ms = number(state, "--step-limit-ms", arg, 86400000); return 0;
    case KEY_ENGINE_SOCKET: s->engine_socket = text(state, "--engine-socket", arg); return 0;
    case KEY_ENGINE_COMMAND: o->engine_command = text(state, "--engine-command", arg); return 0;
    case KEY_LISTEN: s->listen = arg; return 0;
    case KEY_DATA_LISTEN: s->data_listen = arg; return 0;
    case KEY_ADVERTISE: s->advertise = text(state, "--advertise", arg); return 0;
    case KEY_INSECURE: s->insecure = true; return 0;
    case KEY_DATA_INSECURE: s->data_insecure = true; return 0;
    case KEY_TLS_CERT: o->tls.cert = arg; return 0;
    case KEY_TLS_KEY: o->tls.key = arg; return 0;
    case KEY_TLS_CA: o->tls.ca = arg; return 0;
    case KEY_SHARED_GPU: s->shared_gpu = true; return 0;
    case KEY_PORT_FILE: o->port_file = arg; return 0;
    case KEY_METRICS: o->metrics = arg; return 0;
    case KEY_STOP_AFTER: o->stop_after_ms = number(state, "--stop-after", arg, 86400000); return 0;
    case KEY_FORMAT:
        if (log_format_parse(arg, &o->format) < 0)
            return options_error(state, "unknown log format '%s': use auto, logfmt or json", arg);
        return 0;
    case KEY_LEVEL:
        if (log_level_parse(arg, &o->level) < 0)
            return options_error(state, "unknown log level '%s': use debug, info, warn or error", arg);
        return 0;
    case KEY_LIST_GPUS: exit(list_gpus());
    case ARGP_KEY_ARG:
        return options_error(state, "unexpected argument '%s'", arg);
    case ARGP_KEY_END:
        if (!s->id)
            return options_error(state, "--id NAME is required");
        return 0;
    default:
        return options_help(key, state);
    }
}

enum phase {
    RUNNING,  /* a service is open */
    CLOSING,  /* its core has ended; the last words go out */
    PAUSING,  /* evicted; the next incarnation comes soon */
    STOPPING, /* the engine process is being stopped */
};

struct process {
    const struct options *options;
    const struct options_program *program;
    struct options_sources *sources;
    struct event_base *base;
    struct log *log;
    enum phase phase;
    bool stop;           /* asked to */
    enum agent_exit why;
    struct service *service;
    struct engine_process *engine;
    struct keep *keep;
    struct event *turn;  /* what comes next in this phase */
    struct event *stop_after, *status, *day, *signals[4];
    struct tls *tls;
    struct service_metrics counts;
    struct metrics_http *metrics;
    bool stuck;          /* said in the log */
    bool ready;          /* systemd has been told */
    uint64_t opened_ns;
    unsigned restart_ms;
};

static void on_exit_asked(void *user, enum agent_exit value)
{
    struct process *p = user;
    p->phase = CLOSING;
    p->why = value;
    daemon_timer_in(p->turn, LAST_WORDS_MS); /* not from inside the service */
}

/* From now on this agent can be given work. */
static void on_welcome(void *user)
{
    struct process *p = user;
    if (!p->ready)
        daemon_notify("READY=1");
    p->ready = true;
}

static int open_service(struct process *p, struct err *err)
{
    struct service_config config = p->options->service;
    config.base = p->base;
    config.log = p->log;
    config.metrics = &p->counts;
    config.keep = p->keep;
    config.tls = p->tls;
    config.on_exit = on_exit_asked;
    config.on_welcome = on_welcome;
    config.user = p;
    int rc = service_open(&config, &p->service, err);
    if (rc < 0)
        return rc;
    p->phase = RUNNING;
    p->opened_ns = clock_now_ns();
    const char *addresses[] = {service_address(p->service), service_data_address(p->service)};
    return p->options->port_file ? daemon_write_addresses(p->options->port_file, addresses, 2, err) : 0;
}

/* After a re-adoption the engine of the last process may be there still. */
static bool engine_wanted(void *user)
{
    const struct process *p = user;
    return !p->service || !service_has_engine(p->service);
}

static void on_engine_stopped(void *user)
{
    struct process *p = user;
    event_base_loopbreak(p->base);
}

static void end(struct process *p)
{
    p->phase = STOPPING;
    event_del(p->turn);
    service_close(p->service);
    p->service = NULL;
    if (p->engine)
        engine_process_stop(p->engine, on_engine_stopped, p);
    else
        event_base_loopbreak(p->base);
}

static void pause_before_restart(struct process *p, const char *why)
{
    p->phase = PAUSING;
    if (clock_now_ns() - p->opened_ns >= STEADY_NS)
        p->restart_ms = RESTART_FIRST_MS;
    log_event(p->log, LOG_LEVEL_WARN, "restarting", "in_ms=%u why=%s", p->restart_ms, why);
    daemon_retry_in(p->turn, &p->restart_ms, RESTART_LAST_MS);
}

static void on_turn(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct process *p = user;
    struct err err;
    if (p->phase == CLOSING && p->why == AGENT_EXIT_READOPT)
        _exit(AGENT_EXIT_READOPT); /* closing would wait for a GPU that does not answer */
    if (p->phase == CLOSING && (p->stop || p->why == AGENT_EXIT_STOPPED)) {
        end(p);
    } else if (p->phase == CLOSING) {
        service_close(p->service);
        p->service = NULL;
        pause_before_restart(p, "this incarnation was evicted");
    } else if (p->phase == PAUSING && open_service(p, &err) < 0) {
        log_event(p->log, LOG_LEVEL_ERROR, "not-restarted", "why=%s", err.text);
        service_close(p->service);
        p->service = NULL;
        pause_before_restart(p, "it could not begin anew");
    }
}

static void on_stop(evutil_socket_t signal_number, short what, void *user)
{
    (void)what;
    struct process *p = user;
    bool again = p->stop;
    p->stop = true;
    if (signal_number > 0)
        log_event(p->log, LOG_LEVEL_INFO, "stopping", "signal=%s", strsignal((int)signal_number));
    if (!again) {
        daemon_notify("STOPPING=1");
        daemon_timer_in(p->stop_after, p->options->stop_after_ms);
    }
    if (p->phase == RUNNING)
        service_stop(p->service);
    else if (p->phase == PAUSING)
        end(p);
}

static void on_stop_after(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    struct process *p = user;
    if (p->phase != RUNNING)
        return;
    log_event(p->log, LOG_LEVEL_WARN, "stopping-undrained", "waited_ms=%u", p->options->stop_after_ms);
    on_stop(-1, what, p);
}

static void options_default(struct options *ret_options)
{
    *ret_options = (struct options){
        .level = LOG_LEVEL_INFO,
        .stop_after_ms = 30000,
        .service = {.cluster = "eep", .coordinator = "unix:/run/eep/coordinator.sock", .listen = "127.0.0.1:0",
                    .data_listen = "127.0.0.1:0", .memory = "host", .transfer_timeout_ms = 60000, .stuck_ms = 300000, .step_limit_ms = 120000},
    };
}

/* What is marked OPTIONS_RELOADABLE is taken over; a file with a mistake changes nothing. */
static void reload(struct process *p)
{
    struct options o;
    struct options_sources *sources = NULL;
    struct err err;
    char *restart = NULL;
    options_default(&o);
    int rc = options_reload(p->program, p->sources, &o, &sources, &restart, &err);
    if (rc == 0)
        rc = tls_take_credentials(&o.tls, &o.credentials, &err);
    daemon_reloaded(p->log, p->tls, &o.tls, o.level, rc, restart, &err);
    free(restart);
    options_free(sources);
}

static void on_hangup(evutil_socket_t signal_number, short what, void *user)
{
    (void)signal_number, (void)what;
    struct process *p = user;
    if (p->ready)
        daemon_notify_reloading();
    reload(p);
    if (p->ready)
        daemon_notify("READY=1");
}

/* systemctl restart: the next process re-adopts what this one holds, so nothing is drained or closed. */
static void on_hand_over(evutil_socket_t signal_number, short what, void *user)
{
    struct process *p = user;
    if (!keep_active(p->keep)) { /* nobody would hold it */
        on_stop(signal_number, what, user);
        return;
    }
    log_event(p->log, LOG_LEVEL_INFO, "handing-over", "exit_status=%d", AGENT_EXIT_READOPT);
    _exit(AGENT_EXIT_READOPT);
}

static void on_status(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct process *p = user;
    char text[256] = "starting again", why[256];
    bool stuck = p->service && service_stuck(p->service, why, sizeof why);
    if (p->service)
        service_status_text(p->service, text, sizeof text);
    daemon_notify_alive(p->log, &p->stuck, stuck ? why : NULL, text);
}

static void on_day(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    const struct process *p = user;
    daemon_log_certificate(p->log, p->tls);
}

static int open_events(struct process *p, struct err *err)
{
    const unsigned every_ms = daemon_alive_ms();
    const struct timeval every = {.tv_sec = every_ms / 1000, .tv_usec = (suseconds_t)(every_ms % 1000) * 1000};
    p->turn = event_new(p->base, -1, 0, on_turn, p);
    p->stop_after = event_new(p->base, -1, 0, on_stop_after, p);
    p->status = event_new(p->base, -1, EV_PERSIST, on_status, p);
    p->day = event_new(p->base, -1, EV_PERSIST, on_day, p);
    p->signals[0] = evsignal_new(p->base, SIGTERM, on_stop, p);
    p->signals[1] = evsignal_new(p->base, SIGINT, on_stop, p);
    p->signals[2] = evsignal_new(p->base, SIGHUP, on_hangup, p);
    p->signals[3] = evsignal_new(p->base, SIGUSR1, on_hand_over, p);
    const struct timeval day = {.tv_sec = 86400};
    bool bad = !p->turn || !p->stop_after || !p->status || !p->day || event_add(p->day, &day) != 0;
    for (size_t i = 0; i < 4; i++)
        bad = bad || !p->signals[i] || event_add(p->signals[i], NULL) != 0;
    if (!bad && getenv("NOTIFY_SOCKET")) /* else nobody reads the status: no wake-ups for it */
        bad = event_add(p->status, &every) != 0;
    return bad ? err_set(err, ERR_NOMEM, "out of memory") : 0;
}

static void metrics_write(void *user, struct metrics_text *t)
{
    const struct process *p = user;
    service_metrics_write(p->service, &p->counts, t);
}

static bool is_healthy(void *user, char *text, size_t size)
{
    const struct process *p = user;
    snprintf(text, size, "starting again");
    if (p->service)
        service_status_text(p->service, text, size);
    return service_is_welcome(p->service);
}

static int open_metrics(struct process *p, struct err *err)
{
    const struct options *o = p->options;
    const struct metrics_http_config config = {.base = p->base, .address = o->metrics, .insecure = o->service.insecure,
                                               .daemon = "eep-agent", .write = metrics_write, .healthy = is_healthy,
                                               .user = p};
    service_metrics_init(&p->counts);
    if (!o->metrics)
        return 0;
    int rc = metrics_http_open(&config, &p->metrics, err);
    if (rc == 0)
        log_event(p->log, LOG_LEVEL_INFO, "listening", "address=%s protocol=metrics", metrics_http_address(p->metrics));
    return rc;
}

static int process_run(struct process *p, struct err *err)
{
    const struct options *o = p->options;
    int rc;
    if ((rc = open_events(p, err)) < 0 || (rc = open_metrics(p, err)) < 0 || (rc = open_service(p, err)) < 0)
        return rc;
    if (o->engine_command &&
        (rc = engine_process_start(p->base, p->log, o->engine_command, o->service.engine_socket, engine_wanted, p,
                                   &p->engine, err)) < 0)
        return rc;
    return event_base_dispatch(p->base) < 0 ? err_set(err, ERR_IO, "the event loop failed") : 0;
}

static void process_done(struct process *p)
{
    struct event *events[] = {p->turn, p->stop_after, p->status, p->day, p->signals[0], p->signals[1], p->signals[2],
                              p->signals[3]};
    daemon_signals_hold(); /* libevent gives them their default back */
    metrics_http_close(p->metrics);
    service_close(p->service);
    engine_process_free(p->engine);
    keep_close(p->keep);
    for (size_t i = 0; i < sizeof events / sizeof events[0]; i++) {
        if (events[i])
            event_free(events[i]);
    }
    loop_free(p->base);
}

int main(int argc, char **argv)
{
    const struct argp argp = {
        .options = option_table,
        .parser = parse,
        .doc = "Owns the weights of one rank of an eep cluster, and moves them when the topology changes.  One per "
               "GPU.\v"
               "Examples:\n"
               "  eep-agent --id gpu0 --checkpoint /models/qwen3\n"
               "  eep-agent --id gpu1 --engine-command 'my-engine --port 8001'\n"
               "  eep-agent --config /etc/eep/agent.conf --config=-/etc/eep/agent-gpu2.conf --id gpu2\n"
               "\n"
               "SIGTERM asks to be drained first, a second one does not.  SIGHUP reads the configuration files again.  SIGUSR1 "
               "ends the process at once for a next one that re-adopts (systemctl restart).  Under systemd or eep-keeper the next process "
               "re-adopts what one that dies has held: engines serve on.  Exit status: 0 stopped, 1 failed, 2 usage, 75 "
               "the GPU is lost to this process: start it again.",
    };
    const struct options_program program = {.argp = &argp, .section = "agent"};
    struct options o;
    struct process p = {.options = &o, .program = &program, .restart_ms = RESTART_FIRST_MS};
    struct err err = {0};
    bool check;
    options_default(&o);
    options_parse(&program, argc, argv, &o, &p.sources, &check);
    if (!o.service.engine_socket) {
        snprintf(o.engine_socket, sizeof o.engine_socket, "/run/eep/agent-%s.sock", o.service.id);
        o.service.engine_socket = o.engine_socket;
    }
    if (strcmp(o.service.memory, "cuda:id") == 0) {
        snprintf(o.memory, sizeof o.memory, "cuda:%s", o.service.id);
        o.service.memory = o.memory;
    }
    int rc = tls_take_credentials(&o.tls, &o.credentials, &err);
    if (rc == 0)
        rc = tls_open(&o.tls, &p.tls, &err);
    o.service.tls = p.tls;
    if (rc == 0 && check)
        rc = service_check(&o.service, &err);
    if (rc == 0)
        rc = metrics_http_check(o.metrics, o.service.insecure, &err);
    if (rc < 0 || check) {
        tls_free(p.tls);
        options_free(p.sources);
        return options_checked("eep-agent", rc, &err);
    }
    signal(SIGPIPE, SIG_IGN);
    if (o.service.shared_gpu && gpu_share_host_id(&err) < 0) { /* while there are no threads */
        fprintf(stderr, "eep-agent: %s\n", err.text);
        return 1;
    }
    p.keep = keep_open();
    p.base = event_base_new();
    p.log = log_new("eep-agent", o.service.id, o.level, -1);
    log_format_set(p.log, o.format, LOG_JOURNAL_SOCKET);
    daemon_log_certificate(p.log, p.tls);
    rc = p.base && p.log && p.keep ? process_run(&p, &err) : err_set(&err, ERR_NOMEM, "out of memory");
    process_done(&p);
    if (rc == 0)
        log_event(p.log, LOG_LEVEL_INFO, "stopped", "why=%s", "asked to");
    else if (isatty(2)) /* once: a sentence for a person, an event for a collector of logs */
        fprintf(stderr, "eep-agent: %s\n", err.text);
    else
        log_event(p.log, LOG_LEVEL_ERROR, "failed", "code=%s why=%s", err_code_name(err.code), err.text);
    log_free(p.log);
    options_free(p.sources);
    tls_free(p.tls);
    if (rc < 0)
        return err.code == ERR_INVALID || err.code == ERR_DENIED ? 2 : 1;
    return 0;
}
