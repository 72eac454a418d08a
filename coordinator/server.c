/* The coordinator's edge: sockets and journal on one side, the pure core on the other.
 *
 *     agents  <-> agent_link.c \                    / journal.c (a thread of its own syncs)
 *                               > server_step, core
 *     eepctl  <-> control*.c   /                    \ log
 *
 * One event at a time is handed to the core; its actions are performed in order before the next one.  Nothing here
 * blocks.  Loop thread. */
#include "coordinator/server_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/address.h"
#include "common/clock.h"
#include "common/daemon.h"
#include "common/topology_wire.h"
#include "common/version.h"
#include "coordinator/store_edge.h"
#include "coordinator/tcpstore.h"

/* Operators and readers: unsent bytes after which no more calls are taken, after which streams cut them off, and how long
 * they may take nothing. */
#define CALLER_PAUSE_BYTES ((size_t)1 << 20)
#define CALLER_CUT_BYTES ((size_t)32 << 20)
#define CALLER_STALL_MS 30000
#define CONNS_MAX 16384
#define REFUSED_LOG_NS (1000 * UINT64_C(1000000))
#define STORE_BYTES_DEFAULT ((size_t)256 << 20)
#define CONNECTIONS_BYTES_DEFAULT ((size_t)512 << 20)

struct session *server_session(struct server *s, uint64_t id)
{
    struct session *session;
    HASH_FIND(hh, s->sessions, &id, sizeof id, session);
    return session;
}

_Noreturn void server_fatal(struct server *s, const struct err *err)
{
    log_event(s->log, LOG_LEVEL_ERROR, "journal-failed", "why=%s", err->text);
    s->config.on_fatal(s->config.user, err);
    abort(); /* on_fatal has ended the process, or must not go on */
}

/* The text is "FROM -> TO reason". */
static void log_phase(struct server *s, const struct coordinator_action *a)
{
    char from[32] = "", to[32] = "", reason[512] = "";
    (void)sscanf(a->text, "%31s -> %31s %511[^\n]", from, to, reason);
    log_event(s->log, LOG_LEVEL_INFO, "phase", "op=%llu epoch=%llu from=%s to=%s why=%s", (unsigned long long)a->op,
              (unsigned long long)a->epoch, from, to, reason);
    server_waiting_begin(s);
}

/* Of the operation that has ended. */
static uint64_t planned_bytes(const struct server *s, uint64_t op)
{
    struct coordinator_status status;
    coordinator_status(s->core, clock_now_ns(), &status);
    return status.last->record.op == op ? status.last->bytes_planned : 0;
}

static void perform(struct server *s, struct coordinator_action *a)
{
    struct err err;
    switch (a->type) {
    case CA_SEND:
        agent_link_send(s, a);
        break;
    case CA_CLOSE:
        agent_link_close(s, a);
        break;
    case CA_JOURNAL: {
        struct durable *durable = a->durable;
        a->durable = NULL; /* the journal's now */
        if (a->parts & DURABLE_HISTORY)
            server_metrics_operation(&s->metrics, &durable->ended, planned_bytes(s, durable->ended.op));
        if (journal_submit(s->journal, a->seq, durable, a->parts, &err) < 0)
            server_fatal(s, &err);
        break;
    }
    case CA_REPLY:
        control_reply(s, a);
        break;
    case CA_PLAN:
        planning_submit(s->planning, a->job);
        a->job = NULL; /* the planner's now */
        break;
    case CA_CHANGED:
        event_active(s->changed, EV_TIMEOUT, 0);
        break;
    case CA_PHASE:
        log_phase(s, a);
        break;
    case CA_LOG:
        log_event(s->log, (enum log_level)a->level, "note", "epoch=%llu op=%llu what=%s",
                  (unsigned long long)a->epoch, (unsigned long long)a->op, a->text);
        if (a->op == 0 && a->level >= (int)LOG_LEVEL_WARN)
            server_waiting_warned(s);
        break;
    }
}

void server_step(struct server *s, struct coordinator_event *event)
{
    /* Performing an action makes no callback, so no event can come while another one is on its way. */
    if (s->stepping)
        abort();
    s->stepping = true;
    event->wall_ms = clock_wall_ms();
    coordinator_step(s->core, clock_now_ns(), event, &s->actions);
    for (size_t i = 0; i < s->actions.n; i++)
        perform(s, &s->actions.v[i]);
    coordinator_actions_clear(&s->actions);
    daemon_timer_set(s->tick, coordinator_deadline(s->core), clock_now_ns());
    s->stepping = false;
}

/* ---- events of the loop ---- */

static void on_tick(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct coordinator_event event = {.type = CE_TICK};
    server_step(user, &event);
}

static void on_planned(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct server *s = user;
    for (struct plan_job *job; (job = planning_completed(s->planning));) {
        struct coordinator_event event = {.type = CE_PLANNED, .job = job};
        server_step(s, &event);
        plan_job_free(job);
    }
}

static void on_changed(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    control_serve_watchers(user);
}

static void on_journal(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct server *s = user;
    struct err err;
    uint64_t seq;
    int code;
    while (journal_completed(s->journal, &seq, &code, &err)) {
        if (code < 0)
            server_fatal(s, &err);
        metrics_observe(&s->metrics.journal, (double)journal_took_ns(s->journal) / 1e9);
        struct coordinator_event event = {.type = CE_JOURNALED, .seq = seq};
        server_step(s, &event);
    }
}

/* ---- connections ---- */

/* Two agents that were given one id must not push each other out for ever: the first one stays, and the other is told.
 * A restarted agent finds its former connection closed; one whose host vanished, after its lease. */
static int check_agent_alone(const struct server *s, const struct rpc_identity *peer, struct err *err)
{
    const struct session *session, *next;
    HASH_ITER(hh, s->sessions, session, next) {
        const struct rpc_identity *other = rpc_conn_peer(session->conn);
        if (session->role == RPC_ROLE_AGENT && strcmp(other->agent, peer->agent) == 0 &&
            other->incarnation != peer->incarnation)
            return err_set(err, ERR_CONFLICT, "an %s is connected already: every agent needs an --id of its own",
                           rpc_conn_name(session->conn));
    }
    return 0;
}

static int on_hello(void *user, struct rpc_conn *conn, const struct rpc_identity *peer, struct err *err)
{
    (void)conn;
    switch (peer->role) {
    case RPC_ROLE_AGENT:
        if (!name_valid(peer->agent) || !peer->incarnation)
            return err_set(err, ERR_INVALID, "an agent needs an id of [A-Za-z0-9._-] and an incarnation");
        return check_agent_alone(user, peer, err);
    case RPC_ROLE_OPERATOR:
    case RPC_ROLE_READER:
        return 0;
    default:
        return err_set(err, ERR_DENIED, "this is a coordinator: it takes agents, operators and readers, no %s",
                       rpc_role_name(peer->role));
    }
}

static void on_ready(void *user, struct rpc_conn *conn)
{
    struct server *s = user;
    struct session *session = calloc(1, sizeof *session);
    if (!session) {
        rpc_conn_close(conn);
        return;
    }
    session->server = s;
    session->conn = conn;
    session->id = rpc_conn_id(conn);
    session->role = rpc_conn_peer(conn)->role;
    if (session->role != RPC_ROLE_AGENT)
        rpc_conn_limit(conn, CALLER_PAUSE_BYTES, CALLER_CUT_BYTES, CALLER_STALL_MS);
    HASH_ADD(hh, s->sessions, id, sizeof session->id, session);
    rpc_conn_set_user(conn, session);
    log_event(s->log, LOG_LEVEL_DEBUG, "connected", /* an agent's HELLO is what counts: the core logs it */
              "conn=%llu peer=%s software=%s", (unsigned long long)session->id, rpc_conn_name(conn),
              rpc_conn_peer(conn)->software);
}

static void on_frame(void *user, struct rpc_conn *conn, const struct frame *frame)
{
    (void)conn;
    struct session *session = user;
    if (session->role == RPC_ROLE_AGENT)
        agent_link_frame(session, frame);
    else
        control_frame(session, frame);
}

static void session_free(struct session *session)
{
    control_closed(session);
    HASH_DEL(session->server->sessions, session);
    free(session);
}

static void on_close(void *user, struct rpc_conn *conn, int code, const char *reason)
{
    struct session *session = user;
    struct server *s = session->server;
    if (code == ERR_LIMIT)
        log_event(s->log, LOG_LEVEL_WARN, "cut-off", "conn=%llu peer=%s why=%s", (unsigned long long)session->id,
                  rpc_conn_name(conn), reason);
    else
        log_event(s->log, session->role == RPC_ROLE_AGENT ? LOG_LEVEL_INFO : LOG_LEVEL_DEBUG, "disconnected",
                  "conn=%llu peer=%s code=%s why=%s", (unsigned long long)session->id, rpc_conn_name(conn),
                  err_code_name(code), reason);
    HASH_DEL(s->sessions, session); /* the core finds it no more, whatever it does about the loss */
    control_closed(session);
    if (session->role == RPC_ROLE_AGENT)
        agent_link_closed(session);
    free(session);
}

/* Anyone who reaches the port can make these: one line in a while, with how many there were. */
static void on_refused(void *user, const char *name, int code, const char *reason)
{
    struct server *s = user;
    uint64_t now_ns = clock_now_ns();
    s->refused++;
    s->metrics.refused++;
    if (s->refused_ns && now_ns - s->refused_ns < REFUSED_LOG_NS)
        return;
    log_event(s->log, LOG_LEVEL_WARN, "connection-refused", "peer=%s code=%s count=%llu why=%s", name, err_code_name(code),
              (unsigned long long)s->refused, reason);
    s->refused_ns = now_ns;
    s->refused = 0;
}

static const struct rpc_handlers handlers = {.on_hello = on_hello, .on_ready = on_ready, .on_frame = on_frame,
                                             .on_close = on_close, .on_refused = on_refused};

void agent_link_close(struct server *s, const struct coordinator_action *action)
{
    struct session *session = server_session(s, action->conn);
    if (!session)
        return;
    log_event(s->log, LOG_LEVEL_WARN, "dropped", "conn=%llu peer=%s why=%s", (unsigned long long)session->id,
              rpc_conn_name(session->conn), action->text);
    rpc_conn_finish(session->conn, 1000); /* what was sent before, EVICTED for one, shall arrive */
    session_free(session);
}

/* ---- opening, closing ---- */

int server_check(const struct server_config *config, struct err *err)
{
    if (!config->n_listen)
        return err_set(err, ERR_INVALID, "no address to listen on");
    for (size_t i = 0; i < config->n_listen; i++) {
        struct address address;
        int rc = address_parse(config->listen[i], &address, err);
        if (rc < 0)
            return rc;
        if (!config->tls && !config->insecure && !daemon_address_is_local(config->listen[i]))
            return err_set(err, ERR_DENIED,
                           "will not listen on %s: connections are neither encrypted nor authenticated; give --tls-cert, "
                           "--tls-key and --tls-ca, or use a unix socket or the loopback, or --insecure in a network that "
                           "you trust",
                           config->listen[i]);
    }
    for (size_t i = 0; i < config->n_tcpstore; i++) {
        char address[ADDRESS_TEXT_MAX], name[ADDRESS_TEXT_MAX];
        int rc = tcpstore_listen_parse(config->tcpstore[i], address, sizeof address, name, sizeof name, err);
        if (rc < 0)
            return rc;
        if (!config->tcpstore_insecure && !daemon_address_is_local(address))
            return err_set(err, ERR_DENIED,
                           "will not listen for TCPStore on %s: its protocol has no authentication, everyone who reaches "
                           "the port can read and change the keys; use the loopback, or --tcpstore-insecure in a network "
                           "that you trust", address);
    }
    if (!name_valid(config->cluster))
        return err_set(err, ERR_INVALID, "the cluster's name '%s' must be 1 to %d of [A-Za-z0-9._-]", config->cluster,
                       AGENT_ID_MAX - 1);
    return 0;
}

static int open_core(struct server *s, struct err *err)
{
    struct durable durable;
    bool found;
    int rc = journal_open(s->config.state, s->config.cluster, &s->journal, err);
    if (rc < 0 || (rc = journal_load(s->journal, &durable, &found, err)) < 0)
        return rc;
    s->core = coordinator_new(&s->config.core, found ? &durable : NULL, clock_now_ns());
    if (found)
        log_event(s->log, LOG_LEVEL_INFO, "recovered", "epoch=%llu map_version=%llu ranks=%u op=%llu",
                  (unsigned long long)durable.epoch, (unsigned long long)durable.map_version,
                  durable.view ? durable.view->n : 0, (unsigned long long)durable.open.op);
    else
        log_event(s->log, LOG_LEVEL_INFO, "new-cluster", "state=%s", s->config.state);
    durable_done(&durable);
    return s->core ? 0 : err_set(err, ERR_NOMEM, "out of memory");
}

static int open_events(struct server *s, struct err *err)
{
    s->tick = event_new(s->base, -1, 0, on_tick, s);
    s->changed = event_new(s->base, -1, 0, on_changed, s);
    s->journal_event = event_new(s->base, journal_fd(s->journal), EV_READ | EV_PERSIST, on_journal, s);
    int rc = planning_new(&s->planning, err);
    if (rc < 0)
        return rc;
    s->planned_event = event_new(s->base, planning_fd(s->planning), EV_READ | EV_PERSIST, on_planned, s);
    s->rpc = rpc_new(s->base);
    if (!s->planned_event || event_add(s->planned_event, NULL) != 0)
        return err_set(err, ERR_NOMEM, "out of memory");
    if (!s->tick || !s->changed || !s->journal_event || !s->rpc || event_add(s->journal_event, NULL) != 0 ||
        server_waiting_open(s) < 0)
        return err_set(err, ERR_NOMEM, "out of memory");
    rpc_budget_set(s->rpc, &s->held);
    return 0;
}

int server_open(const struct server_config *config, struct server **ret_server, struct err *err)
{
    int rc = server_check(config, err);
    if (rc < 0)
        return rc;
    struct server *s = calloc(1, sizeof *s);
    if (!s)
        return err_set(err, ERR_NOMEM, "out of memory");
    s->config = *config;
    s->base = config->base;
    s->log = config->log;
    server_metrics_init(&s->metrics);
    if (!s->config.store_bytes)
        s->config.store_bytes = STORE_BYTES_DEFAULT;
    s->held.limit = config->connections_bytes ? config->connections_bytes : CONNECTIONS_BYTES_DEFAULT;
    struct rpc_identity self = {0};
    snprintf(self.cluster, sizeof self.cluster, "%s", config->cluster);
    snprintf(self.software, sizeof self.software, "eep-coordinator %s", EEP_SOFTWARE);
    const struct rpc_options options = {.handlers = &handlers, .user = s, .self = &self, .unix_mode = 0660,
                                        .max_conns = CONNS_MAX, .fds = config->listen_fds, .fds_lent = true,
                                        .tls = config->tls};

    if ((rc = open_core(s, err)) < 0 || (rc = open_events(s, err)) < 0 || (rc = store_edge_open(s, err)) < 0 ||
        (rc = rpc_listen(s->rpc, config->listen, config->n_listen, &options, &s->listener, err)) < 0) {
        server_close(s);
        return rc;
    }
    daemon_timer_set(s->tick, coordinator_deadline(s->core), clock_now_ns());
    *ret_server = s;
    return 0;
}

static void event_drop(struct event *event)
{
    if (event)
        event_free(event);
}

void server_close(struct server *s)
{
    if (!s)
        return;
    rpc_listener_close(s->listener);
    struct session *session, *next;
    HASH_ITER(hh, s->sessions, session, next) {
        rpc_conn_close(session->conn);
        session_free(session);
    }
    rpc_free(s->rpc);
    store_edge_close(s);
    event_drop(s->tick);
    server_waiting_close(s);
    event_drop(s->changed);
    event_drop(s->journal_event);
    event_drop(s->planned_event);
    planning_free(s->planning); /* waits for a plan that is being made */
    journal_close(s->journal); /* finishes what is queued */
    coordinator_actions_done(&s->actions);
    coordinator_free(s->core);
    free(s->view_packed);
    free(s);
}

const char *server_address(const struct server *s, size_t i)
{
    return rpc_listener_address(s->listener, i);
}

const char *server_tcpstore_address(const struct server *s, size_t i)
{
    return tcpstore_address(s->edge->tcpstore, i);
}

bool server_stuck(struct server *s, char *text, size_t size)
{
    uint64_t now_ns = clock_now_ns(), limit_ns = (uint64_t)s->config.stuck_ms * 1000000;
    uint64_t journal_ns = journal_writing_ns(s->journal, now_ns);
    uint64_t store_ns = s->edge->disk ? store_disk_writing_ns(s->edge->disk, now_ns) : 0;
    if (!limit_ns || (journal_ns <= limit_ns && store_ns <= limit_ns))
        return false;
    snprintf(text, size, "a write of the %s takes %llu s: the disk of the state folder is stuck",
             journal_ns > limit_ns ? "journal" : "store",
             (unsigned long long)(journal_ns > limit_ns ? journal_ns : store_ns) / 1000000000);
    return true;
}

void server_status_text(const struct server *s, char *text, size_t size)
{
    struct coordinator_status status;
    coordinator_status(s->core, clock_now_ns(), &status);
    if (status.op_running)
        snprintf(text, size, "%u ranks, epoch %llu; operation %llu to %u ranks: %s", status.view ? status.view->n : 0,
                 (unsigned long long)status.epoch, (unsigned long long)status.op.record.op, status.op.record.target,
                 status.op.phase);
    else
        snprintf(text, size, "%u ranks, epoch %llu", status.view ? status.view->n : 0,
                 (unsigned long long)status.epoch);
}
