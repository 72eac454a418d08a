/* TCPStore's ports: listeners, connections, namespaces that empty themselves.  Loop thread.
 *
 * Connections read and write their sockets directly: answers to what one read brought leave in one write, and an idle
 * connection holds no buffers.  One that does not take its answers is read from no more, and after a while cut off. */
#include <arpa/inet.h>
#include <errno.h>
#include <event2/event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utlist.h>

#include "common/daemon.h"
#include "common/topology_wire.h"
#include "coordinator/tcpstore_internal.h"

#define CONNS_MAX 16384
#define VALIDATE_MS 5000     /* from accept to VALIDATE */
#define READ_BYTES 16384     /* at least so much room for a read */
#define READS_MAX 16         /* in a row, before others get their turn */
#define IN_BYTES_MAX ((size_t)256 << 20) /* of commands being received, on all connections */
#define UNSENT_PAUSE (1u << 20)
#define STALL_S 30           /* a client that takes nothing for so long is cut off */
#define ACCEPT_PAUSE_MS 100

/* ---- connections ---- */

static void conn_in_free(struct tcpconn *conn)
{
    struct tcpstore *t = conn->space->t;
    t->in_bytes -= conn->cap;
    budget_add(&conn->held, 0, conn->cap);
    if (conn->cap == READ_BYTES && !t->spare)
        t->spare = conn->in; /* for the next one to read: nearly every command comes and goes in one piece */
    else
        free(conn->in);
    conn->in = NULL;
    conn->cap = 0;
}

static void conn_free(struct tcpconn *conn)
{
    struct tcpspace *space = conn->space;
    conn_in_free(conn);
    budget_leave(&conn->held);
    tcpstore_wait_end(conn);
    HASH_DEL(space->t->conns, conn);
    if (conn->valid && --space->conns == 0)
        daemon_timer_in(space->grace, space->t->grace_ms);
    if (conn->readable)
        event_free(conn->readable);
    if (conn->writable)
        event_free(conn->writable);
    if (conn->out)
        evbuffer_free(conn->out);
    close(conn->fd);
    free(conn);
}

static void conn_cut(struct tcpconn *conn, const struct err *err)
{
    log_event(conn->space->t->edge->server->log, LOG_LEVEL_WARN, "tcpstore-cut-off", "peer=%s namespace=%s why=%s",
              conn->peer, conn->space->name, err->text);
    conn_free(conn);
}

/* The others need its memory.  What is being carried out may still use it, so that its end comes from the loop. */
static void conn_over(void *user, size_t bytes)
{
    struct tcpconn *conn = user;
    struct tcpstore *t = conn->space->t;
    struct err err;
    err_set(&err, ERR_LIMIT, "it holds %zu bytes, the most of all connections, which may hold %zu", bytes,
            t->edge->server->held.limit);
    log_event(t->edge->server->log, LOG_LEVEL_WARN, "tcpstore-cut-off", "peer=%s namespace=%s why=%s", conn->peer,
              conn->space->name, err.text);
    conn->cut = true;
    evbuffer_drain(conn->out, SIZE_MAX);
    if (conn != t->serving) {
        conn->have = 0;
        conn_in_free(conn);
    }
    event_active(conn->readable, EV_READ, 0);
}

static void on_out(struct evbuffer *buffer, const struct evbuffer_cb_info *info, void *user)
{
    (void)buffer;
    struct tcpconn *conn = user;
    budget_add(&conn->held, info->n_added, info->n_deleted);
}

/* Sends what it can.  false: the connection is broken (and not freed). */
static bool conn_flush(struct tcpconn *conn)
{
    while (evbuffer_get_length(conn->out) > 0) {
        if (evbuffer_write(conn->out, conn->fd) < 0) {
            if (errno == EAGAIN || errno == EINTR)
                break;
            return false;
        }
    }
    size_t unsent = evbuffer_get_length(conn->out);
    if (unsent) {
        const struct timeval stall = {.tv_sec = STALL_S};
        event_add(conn->writable, &stall);
    }
    bool pause = unsent > UNSENT_PAUSE;
    if (pause && !conn->paused)
        event_del(conn->readable);
    conn->paused = pause;
    return true;
}

void tcpconn_send(struct tcpconn *conn, const void *data, size_t len)
{
    if (conn->cut)
        return;
    bool first = evbuffer_get_length(conn->out) == 0;
    if (len && evbuffer_add(conn->out, data, len) < 0)
        abort(); /* half an answer cannot be sent */
    budget_keep(&conn->space->t->edge->server->held);
    if (conn->cut)
        return;
    if (first && !conn->corked)
        event_active(conn->writable, EV_WRITE, 0);
}

/* Room for the command that is being received, and for a read. */
static bool conn_room(struct tcpconn *conn, size_t need)
{
    size_t want = need > conn->have + READ_BYTES ? need : conn->have + READ_BYTES;
    if (want <= conn->cap)
        return true;
    if (conn->cap && want < 2 * conn->cap) /* twice, so that a long command in many pieces costs its length once */
        want = 2 * conn->cap;
    struct tcpstore *t = conn->space->t;
    uint8_t *in = NULL;
    if (!conn->cap && want == READ_BYTES && t->spare) {
        in = t->spare;
        t->spare = NULL;
    } else if (t->in_bytes - conn->cap + want <= IN_BYTES_MAX) {
        in = realloc(conn->in, want);
    }
    if (!in)
        return false;
    t->in_bytes += want - conn->cap;
    budget_add(&conn->held, want, conn->cap);
    conn->in = in;
    conn->cap = want;
    budget_keep(&t->edge->server->held);
    return true;
}

/* Carries out what is complete; *ret_need: bytes that the next command needs.  1: its answers have to go first, then
 * there may be more. */
static int conn_commands(struct tcpconn *conn, size_t *ret_need, struct err *err)
{
    size_t done = 0;
    int rc = 1;
    while (!conn->cut && evbuffer_get_length(conn->out) <= UNSENT_PAUSE &&
           (rc = tcpstore_scan(&conn->scan, conn->in + done, conn->have - done, ret_need, err)) == 1) {
        size_t len = conn->scan.at;
        conn->scan = (struct tcpstore_scan){0};
        rc = tcpstore_run(conn, conn->in + done, len, err);
        if (rc < 0)
            break;
        done += len;
        rc = 1;
    }
    conn->have -= done;
    if (done)
        memmove(conn->in, conn->in + done, conn->have);
    if (conn->have == 0)
        conn_in_free(conn);
    return rc;
}

/* Commands that are here, and their answers.  false: the connection is gone. */
static bool conn_serve(struct tcpconn *conn, size_t *ret_need)
{
    struct err err;
    bool valid = conn->valid, whole;
    int rc;
    do {
        conn->corked = true;
        rc = conn_commands(conn, ret_need, &err);
        conn->corked = false;
        whole = conn_flush(conn);
    } while (rc == 1 && whole && !conn->paused && !conn->cut);
    if (!valid && conn->valid) {
        event_remove_timer(conn->readable); /* the deadline of VALIDATE */
    }
    struct store_edge *edge = conn->space->t->edge;
    if (rc < 0)
        conn_cut(conn, &err);
    else if (!whole)
        conn_free(conn);
    edge_changed(edge);
    return rc >= 0 && whole;
}

static void conn_read(struct tcpconn *conn, int fd, short what)
{
    size_t need = 0;
    struct err err;
    if (conn->cut) {
        struct store_edge *edge = conn->space->t->edge;
        conn_free(conn);
        edge_changed(edge);
        return;
    }
    if (what & EV_TIMEOUT) {
        err_set(&err, ERR_TIMEOUT, "it said no VALIDATE within %d ms", VALIDATE_MS);
        conn_cut(conn, &err);
        return;
    }
    for (int i = 0; i < READS_MAX; i++) {
        if (!conn_room(conn, need)) {
            err_set(&err, ERR_NOMEM, "no memory for a command of %zu bytes (%zu are being received)", need,
                    conn->space->t->in_bytes);
            conn_cut(conn, &err);
            return;
        }
        if (conn->cut)
            return;
        size_t room = conn->cap - conn->have;
        ssize_t n = recv(fd, conn->in + conn->have, room, 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
            if (conn->have == 0)
                conn_in_free(conn);
            return;
        }
        if (n <= 0) {
            struct store_edge *edge = conn->space->t->edge;
            conn_free(conn);
            edge_changed(edge);
            return;
        }
        conn->have += (size_t)n;
        if (!conn_serve(conn, &need) || conn->paused || (size_t)n < room)
            return;
    }
}

static void on_readable(evutil_socket_t fd, short what, void *user)
{
    struct tcpconn *conn = user;
    struct tcpstore *t = conn->space->t;
    t->serving = conn;
    conn_read(conn, fd, what);
    t->serving = NULL;
}

static void conn_written(struct tcpconn *conn, short what)
{
    bool was_paused = conn->paused;
    struct err err;
    size_t need;
    if (what & EV_TIMEOUT) {
        err_set(&err, ERR_TIMEOUT, "it reads too slowly: nothing was taken for %d s with %zu bytes waiting", STALL_S,
                evbuffer_get_length(conn->out));
        conn_cut(conn, &err);
    } else if (!conn_flush(conn)) {
        conn_free(conn);
    } else if (was_paused && !conn->paused) {
        event_add(conn->readable, NULL);
        (void)conn_serve(conn, &need); /* commands that were left lying */
    }
}

static void on_writable(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    struct tcpconn *conn = user;
    struct tcpstore *t = conn->space->t;
    t->serving = conn;
    if (!conn->cut)
        conn_written(conn, what);
    t->serving = NULL;
}

static void peer_text(const struct sockaddr *sa, char *text, size_t size)
{
    char host[INET6_ADDRSTRLEN] = "";
    if (sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)sa;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
        snprintf(text, size, "%s:%u", host, ntohs(in->sin_port));
    } else if (sa->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const void *)sa;
        inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof host);
        snprintf(text, size, "[%s]:%u", host, ntohs(in6->sin6_port));
    } else {
        snprintf(text, size, "unix");
    }
}

static void on_accept(struct evconnlistener *ev, evutil_socket_t fd, struct sockaddr *sa, int len, void *user)
{
    (void)ev, (void)len;
    struct tcplisten *listener = user;
    struct tcpstore *t = listener->space->t;
    struct tcpconn *conn = HASH_COUNT(t->conns) < CONNS_MAX ? calloc(1, sizeof *conn) : NULL;
    if (!conn) {
        evutil_closesocket(fd);
        return;
    }
    conn->id = ++t->last_id;
    conn->space = listener->space;
    conn->fd = fd;
    peer_text(sa, conn->peer, sizeof conn->peer);
    HASH_ADD(hh, t->conns, id, sizeof conn->id, conn);
    struct event_base *base = t->edge->server->base;
    conn->readable = event_new(base, fd, EV_READ | EV_PERSIST, on_readable, conn);
    conn->writable = event_new(base, fd, EV_WRITE, on_writable, conn);
    conn->out = evbuffer_new();
    budget_join(&t->edge->server->held, &conn->held, conn_over, conn);
    const struct timeval validate = {.tv_sec = VALIDATE_MS / 1000};
    address_tune(fd);
    if (!conn->readable || !conn->writable || !conn->out || !evbuffer_add_cb(conn->out, on_out, conn) || event_add(conn->readable, &validate) < 0)
        conn_free(conn);
}

/* ---- listeners ---- */

static void listeners_enable(struct tcpstore *t, bool on)
{
    for (size_t i = 0; i < t->n; i++) {
        if (on)
            evconnlistener_enable(t->listeners[i].ev);
        else
            evconnlistener_disable(t->listeners[i].ev);
    }
}

static void on_pause_over(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    listeners_enable(user, true);
}

/* Out of descriptors: without a pause the loop would spin, because the connection still waits. */
static void on_accept_error(struct evconnlistener *ev, void *user)
{
    (void)ev;
    struct tcpstore *t = ((struct tcplisten *)user)->space->t;
    listeners_enable(t, false);
    daemon_timer_in(t->pause, ACCEPT_PAUSE_MS);
}

static void on_grace_over(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct tcpspace *space = user;
    struct store_edge *edge = space->t->edge;
    if (space->conns)
        return;
    size_t n = store_clear(edge->store, space->prefix);
    log_event(edge->server->log, LOG_LEVEL_INFO, "tcpstore-emptied", "namespace=%s keys=%zu", space->name, n);
    edge_changed(edge);
}

int tcpstore_listen_parse(const char *text, char *ret_address, size_t address_size, char *ret_namespace,
                          size_t namespace_size, struct err *err)
{
    const char *slash = strncmp(text, ADDRESS_UNIX, strlen(ADDRESS_UNIX)) == 0 ? NULL : strrchr(text, '/');
    size_t len = slash ? (size_t)(slash - text) : strlen(text);
    struct address address;
    if (len >= address_size)
        return err_set(err, ERR_INVALID, "the address '%.60s...' is too long", text);
    memcpy(ret_address, text, len);
    ret_address[len] = '\0';
    int rc = address_parse(ret_address, &address, err);
    if (rc < 0)
        return rc;
    if (address.is_unix)
        return err_set(err, ERR_INVALID, "TCPStore's clients cannot connect to %s: give host:port", text);
    snprintf(ret_namespace, namespace_size, "%s", slash ? slash + 1 : "");
    if (slash && (!name_valid(slash + 1) || strlen(slash + 1) >= namespace_size))
        return err_set(err, ERR_INVALID, "the namespace in '%s' must be 1 to %zu of [A-Za-z0-9._-]", text,
                       namespace_size - 1);
    return 0;
}

static struct tcpspace *space_of(struct tcpstore *t, const char *name)
{
    struct tcpspace *space;
    DL_FOREACH(t->spaces, space)
        if (strcmp(space->name, name) == 0)
            return space;
    space = calloc(1, sizeof *space);
    if (!space)
        return NULL;
    space->t = t;
    snprintf(space->name, sizeof space->name, "%s", name);
    snprintf(space->prefix, sizeof space->prefix, EDGE_TCPSTORE_PREFIX "%s/", name);
    space->grace = event_new(t->edge->server->base, -1, 0, on_grace_over, space);
    DL_APPEND(t->spaces, space);
    return space->grace ? space : NULL;
}

static int listen_on(struct tcpstore *t, const char *text, struct err *err)
{
    struct tcplisten *l = &t->listeners[t->n];
    char address[ADDRESS_TEXT_MAX], name[TCPSTORE_NAMESPACE_MAX];
    int fd, rc = tcpstore_listen_parse(text, address, sizeof address, name, sizeof name, err);
    if (rc < 0 || (rc = address_listen(address, 0, &fd, l->address, err)) < 0)
        return rc;
    if (!name[0])
        snprintf(name, sizeof name, "%s", strrchr(l->address, ':') + 1);
    l->space = space_of(t, name);
    if (l->space)
        l->ev = evconnlistener_new(t->edge->server->base, on_accept, l, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC,
                                   0, fd);
    if (!l->ev) {
        close(fd);
        return err_set(err, ERR_NOMEM, "no memory to listen on %s", text);
    }
    evconnlistener_set_error_cb(l->ev, on_accept_error);
    t->n++;
    return 0;
}

int tcpstore_open(struct store_edge *edge, const char *const *listen_on_these, size_t n, uint32_t grace_ms,
                  struct tcpstore **ret_tcpstore, struct err *err)
{
    *ret_tcpstore = NULL;
    if (!n)
        return 0;
    struct tcpstore *t = calloc(1, sizeof *t);
    if (!t)
        return err_set(err, ERR_NOMEM, "out of memory");
    t->edge = edge;
    t->grace_ms = grace_ms ? grace_ms : TCPSTORE_GRACE_MS;
    t->listeners = calloc(n, sizeof *t->listeners);
    t->pause = event_new(edge->server->base, -1, 0, on_pause_over, t);
    int rc = t->listeners && t->pause ? 0 : err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; rc == 0 && i < n; i++)
        rc = listen_on(t, listen_on_these[i], err);
    if (rc < 0) {
        tcpstore_close(t);
        return rc;
    }
    *ret_tcpstore = t;
    return 0;
}

void tcpstore_close(struct tcpstore *t)
{
    if (!t)
        return;
    for (size_t i = 0; i < t->n; i++)
        evconnlistener_free(t->listeners[i].ev);
    struct tcpconn *conn, *next;
    HASH_ITER(hh, t->conns, conn, next)
        conn_free(conn);
    struct tcpspace *space, *next_space;
    DL_FOREACH_SAFE(t->spaces, space, next_space) {
        if (space->grace)
            event_free(space->grace);
        free(space);
    }
    if (t->pause)
        event_free(t->pause);
    free(t->spare);
    free(t->listeners);
    free(t);
}

const char *tcpstore_address(const struct tcpstore *t, size_t i)
{
    return t && i < t->n ? t->listeners[i].address : NULL;
}
