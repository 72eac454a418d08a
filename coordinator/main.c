/* eep-coordinator: options, signals, systemd.  What it does is in server.c and core.c. */
#include <argp.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "common/daemon.h"
#include "common/loop.h"
#include "common/metrics_http.h"
#include "common/options.h"
#include "common/tls.h"
#include "common/version.h"
#include "coordinator/server.h"

#define LISTEN_MAX 16

struct options {
    const char *listen[LISTEN_MAX];
    size_t n_listen;
    int listen_fd[LISTEN_MAX]; /* systemd's sockets, -1 = to be made */
    bool insecure;
    struct tls_files tls;
    struct tls_credentials credentials;
    const char *tcpstore[LISTEN_MAX];
    size_t n_tcpstore;
    bool tcpstore_insecure;
    uint32_t stuck_ms, tcpstore_grace_ms, store_mib, connections_mib;
    enum store_durability durability;
    const char *state, *cluster, *port_file, *metrics;
    enum log_level level;
    enum log_format format;
    struct coordinator_config core;
};

enum { KEY_LISTEN = 256, KEY_STATE, KEY_CLUSTER, KEY_INSECURE, KEY_PORT_FILE, KEY_LEVEL,
       KEY_TCPSTORE, KEY_TCPSTORE_INSECURE, KEY_TCPSTORE_GRACE, KEY_STORE_MIB, KEY_CONNECTIONS_MIB, KEY_STUCK, KEY_DURABILITY,
       KEY_COMMIT_BALANCE, KEY_REBALANCE_BELOW, KEY_CROSS_COST, KEY_LAMBDA, KEY_DIP, KEY_EVEN_SPLIT, KEY_FOREGROUND,
       KEY_SCALE_BACK, KEY_ON_PREPARE, KEY_ON_DRAIN, KEY_ON_LOST, KEY_TLS_CERT, KEY_TLS_KEY,
       KEY_TLS_CA, KEY_FORMAT, KEY_METRICS, KEY_NUMBER };

/* Numbers of the core: option, field, range. */
static const struct number {
    const char *name, *unit, *help;
    size_t offset;
    unsigned min, max;
} numbers[] = {
#define NUMBER(name, unit, field, min, max, help) {name, unit, help, offsetof(struct coordinator_config, field), min, max}
    NUMBER("lease-ms", "MS", lease_ms, 50, 3600000, "an agent that is away longer is lost (3000)"),
    NUMBER("heartbeat-ms", "MS", heartbeat_ms, 10, 600000, "agents say that they live this often (500)"),
    NUMBER("lead-ms", "MS", lead_ms, 1, 60000, "how far ahead a commit is promised at the first try (250)"),
    NUMBER("drain-ms", "MS", drain_ms, 1, 86400000, "how long a leaving engine may finish its requests (30000)"),
    NUMBER("stage-ms", "MS", stage_ms, 100, 86400000, "deadline of a stage that moves no bytes (30000)"),
    NUMBER("transfer-ms", "MS", transfer_ms, 100, 86400000, "a transfer without progress ends after this (60000)"),
    NUMBER("reload-after-ms", "MS", reload_after_ms, 0, 86400000,
           "experts that lost their last copy are read again by the ranks that are left, from memory or checkpoint: at once when "
           "nobody is left who has them, after this when the agent that has them lacks only an engine (10000; 0: never)"),
    NUMBER("restart-after-ms", "MS", restart_after_ms, 0, 86400000,
           "when experts are lost and every agent that held them has ended, give the view up after this and start anew "
           "from the checkpoint by itself (0: wait for `eepctl restart`)"),
    NUMBER("load-window-ms", "MS", load_window_ms, 10, 3600000, "agents report the load of their experts this often (5000)"),
    NUMBER("load-horizon-ms", "MS", load_horizon_ms, 100, 604800000, "the load is kept for so long (300000)"),
    NUMBER("load-samples", "N", load_samples, 1, LOAD_SAMPLES_MAX, "in so many samples (16)"),
    NUMBER("rebalance-after-ms", "MS", rebalance_after_ms, 0, 604800000,
           "with --rebalance-below: once it has been lower for so long (60000)"),
    NUMBER("rebalance-every-ms", "MS", rebalance_every_ms, 0, 604800000, "at most so often (600000)"),
    NUMBER("rebalance-horizon-ms", "MS", rebalance_horizon_ms, 1000, 604800000,
           "what it gains is counted for so long, against what moving costs (1800000)"),
    NUMBER("rebalance-mib-s", "MIB", rebalance_mib_s, 0, 1u << 24,
           "a rebalance moves at most so many MiB per second into a rank (0: no limit)"),
    NUMBER("slots", "N", slots, 0, 65536, "expert slots per rank and layer (0: as many as --min-ranks ranks need)"),
    NUMBER("min-ranks", "N", min_ranks, 1, 256, "the smallest number of ranks that shall hold all experts (2)"),
#undef NUMBER
};
#define N_NUMBERS (sizeof numbers / sizeof numbers[0])

static double parse_number(struct argp_state *state, const char *what, const char *arg, double min, double max)
{
    char *end;
    double number = strtod(arg, &end);
    if (*end || end == arg || !(number >= min && number <= max))
        options_error(state, "%s is '%s': it must be a number from %g to %g", what, arg, min, max);
    return number;
}

static double parse_balance(struct argp_state *state, const char *what, const char *arg)
{
    double balance = parse_number(state, what, arg, 0, 1);
    if (balance <= 0)
        options_error(state, "%s is '%s': it must be a number above 0 and at most 1", what, arg);
    return balance;
}

static enum engine_policy parse_policy(struct argp_state *state, const char *what, const char *arg)
{
    if (strcmp(arg, "abort") != 0 && strcmp(arg, "continue") != 0)
        options_error(state, "%s is '%s': it must be abort or continue", what, arg);
    return strcmp(arg, "continue") == 0 ? ENGINE_CONTINUE : ENGINE_ABORT;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    switch (key) {
    case KEY_LISTEN:
        if (o->n_listen == LISTEN_MAX)
            return options_error(state, "at most %d addresses to listen on", LISTEN_MAX);
        o->listen[o->n_listen++] = arg;
        return 0;
    case KEY_TCPSTORE:
        if (o->n_tcpstore == LISTEN_MAX)
            return options_error(state, "at most %d addresses to listen on for TCPStore", LISTEN_MAX);
        o->tcpstore[o->n_tcpstore++] = arg;
        return 0;
    case KEY_TCPSTORE_INSECURE: o->tcpstore_insecure = true; return 0;
    case KEY_TCPSTORE_GRACE:
        o->tcpstore_grace_ms = (uint32_t)options_number(state, "--tcpstore-grace-ms", arg, 1, 86400000);
        return 0;
    case KEY_STORE_MIB:
        o->store_mib = (uint32_t)options_number(state, "--store-mib", arg, 1, 1 << 20);
        return 0;
    case KEY_STUCK: o->stuck_ms = (uint32_t)options_number(state, "--stuck-ms", arg, 0, 86400000); return 0;
    case KEY_CONNECTIONS_MIB:
        o->connections_mib = (uint32_t)options_number(state, "--connections-mib", arg, 16, 1 << 20);
        return 0;
    case KEY_DURABILITY:
        if (store_durability_parse(arg, &o->durability) < 0)
            return options_error(state, "unknown durability '%s': use fsync, os or none", arg);
        return 0;
    case KEY_STATE:
        if (!*arg)
            return options_error(state, "--state needs the name of a folder");
        o->state = arg;
        return 0;
    case KEY_CLUSTER: o->cluster = arg; return 0;
    case KEY_INSECURE: o->insecure = true; return 0;
    case KEY_TLS_CERT: o->tls.cert = arg; return 0;
    case KEY_TLS_KEY: o->tls.key = arg; return 0;
    case KEY_TLS_CA: o->tls.ca = arg; return 0;
    case KEY_PORT_FILE: o->port_file = arg; return 0;
    case KEY_METRICS: o->metrics = arg; return 0;
    case KEY_FOREGROUND: return 0;
    case KEY_SCALE_BACK: o->core.scale_back = 1; return 0;
    case KEY_ON_PREPARE: o->core.on_prepare_timeout = parse_policy(state, "--on-prepare-timeout", arg); return 0;
    case KEY_ON_LOST:
        if (strcmp(arg, "hold") != 0 && strcmp(arg, "mask") != 0)
            options_error(state, "--on-lost-experts is '%s': it must be hold or mask", arg);
        o->core.on_lost_experts = strcmp(arg, "mask") == 0 ? LOST_MASK : LOST_HOLD;
        return 0;
    case KEY_ON_DRAIN: o->core.on_drain_timeout = parse_policy(state, "--on-drain-timeout", arg); return 0;
    case KEY_COMMIT_BALANCE: o->core.commit_balance = parse_balance(state, "--commit-balance", arg); return 0;
    case KEY_CROSS_COST: o->core.cross_cost = parse_number(state, "--cross-cost", arg, 1, 1000); return 0;
    case KEY_LAMBDA: o->core.lambda = parse_number(state, "--lambda", arg, 0, 0.999); return 0;
    case KEY_DIP: o->core.dip = parse_number(state, "--dip", arg, 0.0001, 1); return 0;
    case KEY_EVEN_SPLIT: o->core.even_split = true; return 0;
    case KEY_REBALANCE_BELOW: o->core.rebalance_below = parse_balance(state, "--rebalance-below", arg); return 0;
    case KEY_FORMAT:
        if (log_format_parse(arg, &o->format) < 0)
            return options_error(state, "unknown log format '%s': use auto, logfmt or json", arg);
        return 0;
    case KEY_LEVEL:
        if (log_level_parse(arg, &o->level) < 0)
            return options_error(state, "unknown log level '%s': use debug, info, warn or error", arg);
        return 0;
    case ARGP_KEY_ARG:
        return options_error(state, "unexpected argument '%s'", arg);
    default:
        break;
    }
    if (key < KEY_NUMBER || key >= KEY_NUMBER + (int)N_NUMBERS)
        return options_help(key, state);
    const struct number *n = &numbers[key - KEY_NUMBER];
    char what[32];
    snprintf(what, sizeof what, "--%s", n->name);
    *(uint32_t *)((char *)&o->core + n->offset) = (uint32_t)options_number(state, what, arg, n->min, n->max);
    return 0;
}

static const struct argp_option fixed[] = {
    {"listen", KEY_LISTEN, "ADDR", OPTIONS_REPEATABLE,
     "listen here: unix:/path or host:port, port 0 picks one (repeatable; "
     "default unix:/run/eep/coordinator.sock)", 0},
    {"insecure", KEY_INSECURE, 0, 0, "allow TCP addresses other than the loopback, without encryption", 0},
    {"tls-cert", KEY_TLS_CERT, "FILE", OPTIONS_RELOADABLE, "certificate (PEM) of this coordinator: TCP speaks TLS 1.3 only", 0},
    {"tls-key", KEY_TLS_KEY, "FILE", OPTIONS_RELOADABLE, "its key (PEM)", 0},
    {"tls-ca", KEY_TLS_CA, "FILE", OPTIONS_RELOADABLE, "the CA (PEM) that all certificates of the cluster are signed by", 0},
    {"port-file", KEY_PORT_FILE, "FILE", 0, "write the addresses with their real ports there, one a line", 0},
    {"metrics-listen", KEY_METRICS, "ADDR", 0,
     "serve GET /metrics (Prometheus) and GET /healthz on host:port or unix:/path (default: not)", 0},
    {"state", KEY_STATE, "DIR", 0, "folder of the journal (default /var/lib/eep)", 0},
    {"cluster", KEY_CLUSTER, "NAME", 0, "only agents of this cluster are taken (default eep)", 0},
    {"durability", KEY_DURABILITY, "MODE", 0,
     "what an acknowledged write of a durable key survives: fsync (a power failure; default), os (the end of the "
     "coordinator) or none", 0},
    {"store-mib", KEY_STORE_MIB, "MIB", 0, "memory for the key-value store (256)", 0},
    {"stuck-ms", KEY_STUCK, "MS", 0,
     "under systemd: a write of the journal or the store takes so long: the watchdog is not fed any more (0: always fed; 60000)",
     0},
    {"connections-mib", KEY_CONNECTIONS_MIB, "MIB", 0,
     "memory for what all connections together receive and have not sent: beyond it the connection with the most is cut "
     "off (512)", 0},
    {"tcpstore-listen", KEY_TCPSTORE, "ADDR", OPTIONS_REPEATABLE,
     "serve the protocol of PyTorch's TCPStore on host:port[/namespace] (repeatable); keys of a namespace go when its last "
     "connection has closed (default namespace: the port)", 0},
    {"tcpstore-insecure", KEY_TCPSTORE_INSECURE, 0, 0,
     "allow that beyond the loopback: its protocol has no authentication", 0},
    {"tcpstore-grace-ms", KEY_TCPSTORE_GRACE, "MS", 0,
     "a namespace without connections is emptied after this (1000)", 0},
    {"log-format", KEY_FORMAT, "FORMAT", 0,
     "auto (default: systemd's journal where stderr leads there, else logfmt), logfmt or json", 0},
    {"log-level", KEY_LEVEL, "LEVEL", OPTIONS_RELOADABLE, "debug, info (default), warn or error", 0},
    {"commit-balance", KEY_COMMIT_BALANCE, "B", 0,
     "a change of ranks commits when the mean load of a rank over the highest would be B; what is still empty is "
     "filled afterwards (0.98)", 0},
    {"on-prepare-timeout", KEY_ON_PREPARE, "abort|continue", 0,
     "when an engine has not prepared the next view by --stage-ms: roll back (default), or go on without it", 0},
    {"on-drain-timeout", KEY_ON_DRAIN, "abort|continue", 0,
     "when a leaving engine is not drained by --drain-ms: roll back, or go on without what it has not finished (default)", 0},
    {"on-lost-experts", KEY_ON_LOST, "hold|mask", 0,
     "while experts that nobody has in memory are read again: hold the engines (default), or serve on without these experts, "
     "if every engine can", 0},
    {"scale-back", KEY_SCALE_BACK, 0, 0,
     "after a repair, scale back by itself to the ranks that were asked for, as soon as agents are spare", 0},
    {"cross-cost", KEY_CROSS_COST, "X", 0,
     "what an expert that comes from another node costs a plan, in ones from the own node (4)", 0},
    {"lambda", KEY_LAMBDA, "L", 0,
     "balance of a layer that an expert's arrival must buy, one price for all layers (0: whatever reaches the target)", 0},
    {"dip", KEY_DIP, "D", 0, "part of a step that replicas which are being replaced may cost (0.02)", 0},
    {"even-split", KEY_EVEN_SPLIT, 0, 0,
     "all replicas of an expert get the same share of its tokens: for engines whose maps cannot have a slot more than "
     "once", 0},
    {"rebalance-below", KEY_REBALANCE_BELOW, "B", 0,
     "rebalance without being asked when the mean load of a rank over the highest stays below B, if it is worth the "
     "bytes (default: never)", 0},
    {"foreground", KEY_FOREGROUND, 0, OPTIONS_COMMAND_LINE, "stay in the foreground (always so)", 0},
    OPTIONS_CONFIG(0),
    OPTIONS_HELP(-1),
};
#define N_FIXED (sizeof fixed / sizeof fixed[0])

/* The fixed ones, then the numbers; all zero is the end. */
static void options_table(struct argp_option ret_table[N_FIXED + N_NUMBERS + 2])
{
    memset(ret_table, 0, (N_FIXED + N_NUMBERS + 2) * sizeof *ret_table);
    memcpy(ret_table, fixed, sizeof fixed);
    ret_table[N_FIXED] = (struct argp_option){.doc = "Times and sizes:", .group = 1};
    for (size_t i = 0; i < N_NUMBERS; i++)
        ret_table[N_FIXED + 1 + i] = (struct argp_option){.name = numbers[i].name, .key = KEY_NUMBER + (int)i,
                                                          .arg = numbers[i].unit, .doc = numbers[i].help, .group = 1};
}

static void options_default(struct options *ret_options)
{
    *ret_options = (struct options){.state = "/var/lib/eep", .cluster = "eep", .level = LOG_LEVEL_INFO, .stuck_ms = 60000};
    coordinator_config_default(&ret_options->core);
}

/* Sockets of systemd are addresses to listen on, named by an option or not. */
static int options_take_sockets(struct options *o, struct daemon_socket *sockets, size_t n, struct err *err)
{
    for (size_t i = 0; i < LISTEN_MAX; i++)
        o->listen_fd[i] = -1;
    for (size_t s = 0; s < n; s++) {
        size_t at = 0;
        while (at < o->n_listen && strcmp(o->listen[at], sockets[s].address) != 0)
            at++;
        if (!sockets[s].address[0])
            return err_set(err, ERR_INVALID, "descriptor %d, given by systemd, is no socket of TCP or of a unix path",
                           sockets[s].fd);
        if (at == LISTEN_MAX)
            return err_set(err, ERR_INVALID, "at most %d addresses to listen on, those of systemd included", LISTEN_MAX);
        if (at == o->n_listen)
            o->listen[o->n_listen++] = sockets[s].address;
        o->listen_fd[at] = sockets[s].fd;
    }
    return 0;
}

/* What no option can tell alone. */
static int options_complete(struct options *o, struct err *err)
{
    if (!o->n_listen)
        o->listen[o->n_listen++] = "unix:/run/eep/coordinator.sock";
    if (o->core.lease_ms < 2 * o->core.heartbeat_ms)
        return err_set(err, ERR_INVALID, "--lease-ms %u must be at least twice --heartbeat-ms %u, or agents are lost "
                       "between two heartbeats", o->core.lease_ms, o->core.heartbeat_ms);
    return tls_take_credentials(&o->tls, &o->credentials, err);
}

static const char about[] =
    "Coordinates an eep cluster: keeps the view, decides every change of topology, hosts the key-value store.  One per "
    "cluster; serving engines go on without it.\v"
    "Examples:\n"
    "  eep-coordinator --state /var/lib/eep --listen 127.0.0.1:7420\n"
    "  eep-coordinator --config /etc/eep/coordinator.conf --check-config\n"
    "\n"
    "SIGTERM and SIGINT stop it; agents and engines serve on.  SIGHUP reads the configuration files again.  Exit status: 0 "
    "stopped, 1 failed, 2 usage.";

/* Every connection is a descriptor: as many as we are allowed. */
static void raise_descriptors(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit); /* with fewer, listeners pause when they run out */
    }
}

struct process {
    const struct options_program *program;
    struct options_sources *sources;
    struct event_base *base;
    struct log *log;
    struct tls *tls;
    struct server *server;
    struct metrics_http *metrics;
    bool stuck; /* said */
};

static void on_stop(evutil_socket_t signal_number, short what, void *user)
{
    (void)what;
    struct process *p = user;
    log_event(p->log, LOG_LEVEL_INFO, "stopping", "signal=%s", strsignal((int)signal_number));
    daemon_notify("STOPPING=1");
    event_base_loopbreak(p->base);
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
        rc = options_complete(&o, &err);
    daemon_reloaded(p->log, p->tls, &o.tls, o.level, rc, restart, &err);
    free(restart);
    options_free(sources);
}

static void on_hangup(evutil_socket_t signal_number, short what, void *user)
{
    (void)signal_number, (void)what;
    daemon_notify_reloading();
    reload(user);
    daemon_notify("READY=1");
}

static void on_day(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    const struct process *p = user;
    daemon_log_certificate(p->log, p->tls);
}

static void on_status(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct process *p = user;
    char text[256], why[256];
    server_status_text(p->server, text, sizeof text);
    daemon_notify_alive(p->log, &p->stuck, server_stuck(p->server, why, sizeof why) ? why : NULL, text);
}

static void metrics_write(void *user, struct metrics_text *t)
{
    server_metrics_write(((struct process *)user)->server, t);
}

/* The loop turns; how the cluster stands is what `eepctl health` says. */
static bool is_healthy(void *user, char *text, size_t size)
{
    server_status_text(((struct process *)user)->server, text, size);
    return true;
}

static int open_metrics(struct process *p, const struct options *o, struct err *err)
{
    const struct metrics_http_config config = {.base = p->base, .address = o->metrics, .insecure = o->insecure,
                                               .daemon = "eep-coordinator", .write = metrics_write,
                                               .healthy = is_healthy, .user = p};
    return o->metrics ? metrics_http_open(&config, &p->metrics, err) : 0;
}

static void on_fatal(void *user, const struct err *err)
{
    (void)user, (void)err; /* logged; what is not durable must not be acted on, so nothing is tidied up */
    _exit(1);
}

static int announce(const struct process *p, const struct options *o, struct err *err)
{
    const char *addresses[2 * LISTEN_MAX]; /* TCPStore's come last */
    size_t n = 0;
    for (; n < LISTEN_MAX && (addresses[n] = server_address(p->server, n)); n++)
        log_event(p->log, LOG_LEVEL_INFO, "listening", "address=%s", addresses[n]);
    for (size_t i = 0; n < 2 * LISTEN_MAX && (addresses[n] = server_tcpstore_address(p->server, i)); i++, n++)
        log_event(p->log, LOG_LEVEL_INFO, "listening", "address=%s protocol=tcpstore", addresses[n]);
    if (p->metrics)
        log_event(p->log, LOG_LEVEL_INFO, "listening", "address=%s protocol=metrics", metrics_http_address(p->metrics));
    return o->port_file ? daemon_write_addresses(o->port_file, addresses, n, err) : 0;
}

static struct server_config server_config_of(struct process *p, const struct options *o)
{
    return (struct server_config){
        .base = p->base, .log = p->log, .cluster = o->cluster, .state = o->state, .listen = o->listen,
        .n_listen = o->n_listen, .listen_fds = o->listen_fd, .tls = p->tls, .insecure = o->insecure, .core = o->core, .on_fatal = on_fatal, .user = p,
        .store_bytes = (size_t)o->store_mib << 20, .connections_bytes = (size_t)o->connections_mib << 20, .durability = o->durability, .tcpstore = o->tcpstore,
        .n_tcpstore = o->n_tcpstore, .stuck_ms = o->stuck_ms, .tcpstore_insecure = o->tcpstore_insecure,
        .tcpstore_grace_ms = o->tcpstore_grace_ms,
    };
}

static int serve(struct process *p, const struct options *o, struct err *err)
{
    const struct server_config config = server_config_of(p, o);
    int rc = server_open(&config, &p->server, err);
    if (rc < 0 || (rc = open_metrics(p, o, err)) < 0)
        return rc;
    struct event *events[] = {
        evsignal_new(p->base, SIGTERM, on_stop, p),
        evsignal_new(p->base, SIGINT, on_stop, p),
        evsignal_new(p->base, SIGHUP, on_hangup, p),
        event_new(p->base, -1, EV_PERSIST, on_day, p),
        event_new(p->base, -1, EV_PERSIST, on_status, p),
    };
    const size_t n = sizeof events / sizeof events[0];
    const unsigned every_ms = daemon_alive_ms();
    const struct timeval every = {.tv_sec = every_ms / 1000, .tv_usec = (suseconds_t)(every_ms % 1000) * 1000};
    const struct timeval day = {.tv_sec = 86400}, *const intervals[] = {NULL, NULL, NULL, &day, &every};
    for (size_t i = 0; i < n; i++) {
        if (i == n - 1 && !getenv("NOTIFY_SOCKET"))
            continue; /* nobody reads the status: no wake-ups for it */
        if (!events[i] || event_add(events[i], intervals[i]) != 0)
            rc = err_set(err, ERR_NOMEM, "out of memory");
    }
    daemon_log_certificate(p->log, p->tls);
    if (rc == 0)
        rc = announce(p, o, err); /* who reads the addresses may also say SIGTERM */
    if (rc == 0) {
        daemon_notify("READY=1");
        if (event_base_dispatch(p->base) < 0)
            rc = err_set(err, ERR_IO, "the event loop failed");
    }
    daemon_signals_hold(); /* libevent gives them their default back */
    for (size_t i = 0; i < n; i++) {
        if (events[i])
            event_free(events[i]);
    }
    return rc;
}

int main(int argc, char **argv)
{
    struct argp_option table[N_FIXED + N_NUMBERS + 2];
    options_table(table);
    const struct argp argp = {.options = table, .parser = parse, .doc = about};
    const struct options_program program = {.argp = &argp, .section = "coordinator"};
    struct process p = {.program = &program};
    struct options o;
    struct err err = {0};
    bool check;
    options_default(&o);
    options_parse(&program, argc, argv, &o, &p.sources, &check);
    struct daemon_socket sockets[LISTEN_MAX];
    int rc = options_take_sockets(&o, sockets, daemon_listen_fds(sockets, LISTEN_MAX), &err);
    if (rc == 0)
        rc = options_complete(&o, &err);
    if (rc == 0)
        rc = tls_open(&o.tls, &p.tls, &err);
    if (rc == 0 && check) {
        const struct server_config config = server_config_of(&p, &o);
        rc = server_check(&config, &err);
    }
    if (rc == 0)
        rc = metrics_http_check(o.metrics, o.insecure, &err);
    if (rc < 0 || check) {
        tls_free(p.tls);
        options_free(p.sources);
        return options_checked("eep-coordinator", rc, &err);
    }
    signal(SIGPIPE, SIG_IGN);
    raise_descriptors();

    p.base = event_base_new();
    p.log = log_new("eep-coordinator", o.cluster, o.level, -1);
    log_format_set(p.log, o.format, LOG_JOURNAL_SOCKET);
    rc = p.base && p.log ? serve(&p, &o, &err) : err_set(&err, ERR_NOMEM, "out of memory");
    if (rc < 0) {
        /* once: a sentence for a person, an event for a collector of logs */
        if (isatty(2))
            fprintf(stderr, "eep-coordinator: %s\n", err.text);
        else
            log_event(p.log, LOG_LEVEL_ERROR, "failed", "code=%s why=%s", err_code_name(err.code), err.text);
    }
    metrics_http_close(p.metrics);
    server_close(p.server);
    if (rc == 0)
        log_event(p.log, LOG_LEVEL_INFO, "stopped", NULL);
    log_free(p.log);
    loop_free(p.base);
    options_free(p.sources);
    tls_free(p.tls);
    if (rc < 0)
        return err.code == ERR_INVALID || err.code == ERR_DENIED ? 2 : 1;
    return 0;
}
