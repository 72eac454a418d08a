/* Event-driven connections: making, ending and freeing them.  Input: rpc_input.c; output: rpc_output.c; TLS:
 * rpc_secure.c; handshakes: rpc_handshake.c; listeners: rpc_listener.c.  One loop thread.
 *
 * A connection goes through
 *
 *     CONNECTING --> (SECURING, with TLS) --> SHAKING --> READY --> FAILING --> DEAD
 *                                                             \--> FINISHING --/
 *
 * Whatever ends it only marks it; the deferred event of struct rpc tells the user and frees, so that nobody up the
 * stack holds a pointer to a freed connection. */
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/dns.h>
#include <event2/util.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#include "common/address.h"
#include "common/daemon.h"
#include "common/rpc_parts.h"

static void conn_free(struct rpc_conn *conn)
{
    if (conn->dirty)
        DL_DELETE2(conn->rpc->dirty, conn, dirty_prev, dirty_next);
    if (conn->listener)
        conn->listener->n_conns--;
    rpc_conn_uncount(conn);
    budget_leave(&conn->held);
    if (conn->readable)
        event_free(conn->readable);
    if (conn->in)
        evbuffer_free(conn->in);
    if (conn->bev)
        bufferevent_free(conn->bev);
    if (conn->timer)
        event_free(conn->timer);
    free(conn);
}

static void conn_move(struct rpc_conn *conn, struct rpc_conn **from, struct rpc_conn **to)
{
    DL_DELETE(*from, conn);
    DL_APPEND(*to, conn);
    event_active(conn->rpc->deferred, 0, 0);
}

static void conn_silence(struct rpc_conn *conn)
{
    if (conn->bev) {
        bufferevent_setcb(conn->bev, NULL, NULL, NULL, NULL);
        bufferevent_disable(conn->bev, EV_READ | EV_WRITE);
    }
    if (conn->readable)
        event_del(conn->readable);
    event_del(conn->timer);
}

void rpc_conn_fail(struct rpc_conn *conn, int code, const char *fmt, ...)
{
    if (conn->state == RPC_FINISHING) {
        rpc_conn_close(conn);
        return;
    }
    if (conn->state >= RPC_FAILING)
        return;
    va_list args;
    va_start(args, fmt);
    vsnprintf(conn->why, sizeof conn->why, fmt, args);
    va_end(args);
    conn->why_code = code;
    conn->state = RPC_FAILING;
    conn_silence(conn);
    conn_move(conn, &conn->rpc->conns, &conn->rpc->failing);
}

void rpc_conn_close(struct rpc_conn *conn)
{
    if (conn->state == RPC_DEAD)
        return;
    struct rpc_conn **from = conn->state == RPC_FAILING ? &conn->rpc->failing : &conn->rpc->conns;
    conn->state = RPC_DEAD;
    conn_silence(conn);
    conn_move(conn, from, &conn->rpc->dead);
}

/* ---- the budget of all connections ---- */

static void on_held(struct evbuffer *buffer, const struct evbuffer_cb_info *info, void *arg)
{
    (void)buffer;
    struct rpc_conn *conn = arg;
    budget_add(&conn->held, info->n_added, info->n_deleted);
}

/* The others need its memory: what it holds goes now, but for the frame that is being looked at. */
static void conn_cut(void *user, size_t bytes)
{
    struct rpc_conn *conn = user;
    struct evbuffer *output = bufferevent_get_output(conn->bev);
    rpc_conn_fail(conn, ERR_LIMIT, "%s is cut off: it holds %zu bytes, the most of all connections, which may hold %zu",
                  conn->name, bytes, conn->rpc->budget->limit);
    evbuffer_unfreeze(output, 1);
    evbuffer_drain(output, SIZE_MAX);
    if (conn != conn->rpc->reads)
        evbuffer_drain(conn->in, SIZE_MAX);
}

/* Counts what its buffers hold from now on. */
int rpc_conn_count(struct rpc_conn *conn)
{
    struct evbuffer *buffers[] = {bufferevent_get_input(conn->bev), bufferevent_get_output(conn->bev)};
    for (size_t i = 0; conn->held.budget && i < sizeof buffers / sizeof buffers[0]; i++) {
        if (!evbuffer_add_cb(buffers[i], on_held, conn))
            return ERR_NOMEM;
    }
    return 0;
}

void rpc_conn_hold(struct rpc_conn *conn, size_t more, size_t less)
{
    budget_add(&conn->held, more, less);
}

void rpc_budget_set(struct rpc *rpc, struct budget *budget)
{
    rpc->budget = budget;
}

/* Tells users of connections that have failed, then frees what is dead.  Runs from the loop with nothing of ours up
 * the stack. */
static void on_deferred(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct rpc *rpc = arg;
    struct rpc_conn *conn;
    while ((conn = rpc->failing)) {
        conn->state = RPC_DEAD;
        DL_DELETE(rpc->failing, conn);
        DL_APPEND(rpc->dead, conn);
        if (conn->owed_close && conn->handlers->on_close)
            conn->handlers->on_close(conn->user, conn, conn->why_code, conn->why);
        else if (!conn->owed_close && conn->handlers->on_refused)
            conn->handlers->on_refused(conn->user, conn->name, conn->why_code, conn->why);
    }
    while ((conn = rpc->dead)) {
        DL_DELETE(rpc->dead, conn);
        conn_free(conn);
    }
}

struct rpc *rpc_new(struct event_base *base)
{
    struct rpc *rpc = calloc(1, sizeof *rpc);
    if (!rpc)
        return NULL;
    rpc->base = base;
    rpc->deferred = event_new(base, -1, 0, on_deferred, rpc);
    rpc->flush = event_new(base, -1, 0, rpc_on_flush, rpc);
    rpc->scratch = malloc(RPC_READ_BYTES);
    if (!rpc->deferred || !rpc->flush || !rpc->scratch) {
        if (rpc->deferred)
            event_free(rpc->deferred);
        if (rpc->flush)
            event_free(rpc->flush);
        free(rpc->scratch);
        free(rpc);
        return NULL;
    }
    return rpc;
}

void rpc_free(struct rpc *rpc)
{
    if (!rpc)
        return;
    while (rpc->listeners)
        rpc_listener_close(rpc->listeners);
    struct rpc_conn **lists[] = {&rpc->conns, &rpc->failing, &rpc->dead};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        while (*lists[i]) {
            struct rpc_conn *conn = *lists[i];
            DL_DELETE(*lists[i], conn);
            conn_free(conn);
        }
    }
    if (rpc->dns)
        evdns_base_free(rpc->dns, 0);
    event_free(rpc->deferred);
    event_free(rpc->flush);
    free(rpc->scratch);
    free(rpc);
}

void rpc_on_event(struct bufferevent *bev, short what, void *arg)
{
    struct rpc_conn *conn = arg;
    int error = EVUTIL_SOCKET_ERROR();
    if (conn->ssl) {
        rpc_on_tls_event(conn, what);
        return;
    }
    if (what & BEV_EVENT_CONNECTED && conn->tls) {
        int fd = bufferevent_getfd(bev);
        address_tune(fd);
        evutil_make_socket_closeonexec(fd);
        if (rpc_conn_secure(conn, fd) < 0)
            rpc_conn_fail(conn, ERR_NOMEM, "no memory for a connection to %s", conn->name);
        return;
    }
    if (what & BEV_EVENT_CONNECTED) {
        bufferevent_disable(bev, EV_WRITE);
        if (rpc_conn_listen(conn) < 0) {
            rpc_conn_fail(conn, ERR_NOMEM, "no memory for a connection to %s", conn->name);
            return;
        }
        address_tune(bufferevent_getfd(bev));
        evutil_make_socket_closeonexec(bufferevent_getfd(bev)); /* libevent leaves it open for children */
        conn->state = RPC_SHAKING;
        rpc_handshake_start(conn);
        return;
    }
    const char *during = conn->state == RPC_SHAKING ? " during the handshake" : "";
    if (conn->state == RPC_CONNECTING) {
        int dns = bufferevent_socket_get_dns_error(bev);
        rpc_conn_fail(conn, ERR_UNREACHABLE, "cannot connect to %s: %s", conn->name,
                      dns ? evutil_gai_strerror(dns) : evutil_socket_error_to_string(error));
    } else if (what & BEV_EVENT_TIMEOUT) {
        rpc_conn_fail(conn, ERR_LIMIT, "%s reads too slowly: cut off, it took nothing of %zu bytes for a while",
                      conn->name, evbuffer_get_length(bufferevent_get_output(bev)));
    } else {
        rpc_conn_fail(conn, ERR_UNREACHABLE, "the connection with %s was lost%s: %s", conn->name, during,
                      evutil_socket_error_to_string(error));
    }
}

static void on_timer(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct rpc_conn *conn = arg;
    if (conn->state == RPC_FINISHING)
        rpc_conn_close(conn);
    else
        rpc_conn_fail(conn, ERR_TIMEOUT, "%s did not finish the handshake within %d ms", conn->name, RPC_HANDSHAKE_MS);
}

/* ---- making connections ---- */

struct rpc_conn *rpc_conn_new(struct rpc *rpc, const struct rpc_options *options, int fd, enum rpc_state state)
{
    struct rpc_conn *conn = calloc(1, sizeof *conn);
    if (!conn)
        return NULL;
    conn->rpc = rpc;
    conn->id = ++rpc->last_id;
    conn->handlers = options->handlers;
    conn->user = options->user;
    conn->self = *options->self;
    conn->output_limit = options->output_limit ? options->output_limit : RPC_OUTPUT_LIMIT;
    conn->state = state;
    conn->tls = options->tls;
    snprintf(conn->tls_peer, sizeof conn->tls_peer, "%s", options->tls_peer ? options->tls_peer : "coordinator");
    conn->timer = evtimer_new(rpc->base, on_timer, conn);
    conn->in = evbuffer_new();
    budget_join(rpc->budget, &conn->held, conn_cut, conn);
    bool connected = state != RPC_CONNECTING, secure = connected && conn->tls;
    int rc = conn->in && (!conn->held.budget || evbuffer_add_cb(conn->in, on_held, conn)) ? 0 : ERR_NOMEM;
    if (rc == 0 && secure) {
        rc = rpc_conn_secure(conn, fd);
    } else if (rc == 0) {
        conn->bev = bufferevent_socket_new(rpc->base, fd, BEV_OPT_CLOSE_ON_FREE);
        rc = conn->bev ? rpc_conn_count(conn) : ERR_NOMEM;
    }
    /* A connector has to wait for writability first: that is how it learns that it is connected. */
    if (!conn->timer || rc < 0 ||
        (connected && !secure && (bufferevent_disable(conn->bev, EV_WRITE) < 0 || rpc_conn_listen(conn) < 0))) {
        if (conn->bev && connected)
            bufferevent_setfd(conn->bev, -1); /* it stays the caller's */
        conn_free(conn);
        return NULL;
    }
    if (!secure)
        bufferevent_setcb(conn->bev, NULL, rpc_on_write, rpc_on_event, conn);
    daemon_timer_in(conn->timer, RPC_HANDSHAKE_MS);
    DL_APPEND(rpc->conns, conn);
    return conn;
}

void rpc_conn_uncount(struct rpc_conn *conn)
{
    struct rpc_source *source = conn->source;
    conn->source = NULL;
    if (source && --source->n == 0) {
        HASH_DEL(conn->rpc->sources, source);
        free(source);
    }
}

/* Names are resolved without blocking the loop. */
static struct evdns_base *rpc_dns(struct rpc *rpc)
{
    if (!rpc->dns)
        rpc->dns = evdns_base_new(rpc->base, EVDNS_BASE_INITIALIZE_NAMESERVERS | EVDNS_BASE_DISABLE_WHEN_INACTIVE);
    if (!rpc->dns) {
        /* No resolv.conf: /etc/hosts is all there is. */
        rpc->dns = evdns_base_new(rpc->base, EVDNS_BASE_DISABLE_WHEN_INACTIVE);
        if (rpc->dns)
            evdns_base_load_hosts(rpc->dns, "/etc/hosts");
    }
    return rpc->dns;
}

static int conn_connect(struct rpc_conn *conn, const struct address *a)
{
    if (a->is_unix) {
        struct sockaddr_un sun = {.sun_family = AF_UNIX};
        snprintf(sun.sun_path, sizeof sun.sun_path, "%.*s", (int)sizeof sun.sun_path - 1, a->host);
        return bufferevent_socket_connect(conn->bev, (struct sockaddr *)&sun, sizeof sun);
    }
    char text[ADDRESS_TEXT_MAX + 16];
    snprintf(text, sizeof text, strchr(a->host, ':') ? "[%s]:%s" : "%s:%s", a->host, a->port);
    struct sockaddr_storage ss;
    int len = sizeof ss;
    if (evutil_parse_sockaddr_port(text, (struct sockaddr *)&ss, &len) == 0)
        return bufferevent_socket_connect(conn->bev, (struct sockaddr *)&ss, len);
    return bufferevent_socket_connect_hostname(conn->bev, rpc_dns(conn->rpc), AF_UNSPEC, a->host, atoi(a->port));
}

int rpc_connect(struct rpc *rpc, const char *address, const struct rpc_options *options, struct rpc_conn **ret_conn,
                struct err *err)
{
    struct address a;
    int rc = address_parse(address, &a, err);
    if (rc < 0)
        return rc;
    struct rpc_options own = *options;
    if (a.is_unix)
        own.tls = NULL;
    struct rpc_conn *conn = rpc_conn_new(rpc, &own, -1, RPC_CONNECTING);
    if (!conn)
        return err_set(err, ERR_NOMEM, "no memory for a connection to %s", address);
    conn->connector = true;
    conn->owed_close = true;
    snprintf(conn->name, sizeof conn->name, "%s", address);
    if (conn_connect(conn, &a) < 0)
        rpc_conn_fail(conn, ERR_UNREACHABLE, "cannot connect to %s: %s", address,
                      evutil_socket_error_to_string(EVUTIL_SOCKET_ERROR()));
    *ret_conn = conn;
    return 0;
}

/* ---- small things ---- */

void rpc_conn_set_user(struct rpc_conn *conn, void *user)
{
    conn->user = user;
}

uint64_t rpc_conn_id(const struct rpc_conn *conn)
{
    return conn->id;
}

const struct rpc_identity *rpc_conn_peer(const struct rpc_conn *conn)
{
    return &conn->peer;
}

const char *rpc_conn_name(const struct rpc_conn *conn)
{
    return conn->name;
}
