/* Event-driven connections: lifetime, input, output.  Handshakes: rpc_handshake.c; listeners: rpc_listener.c.
 * One loop thread.
 *
 * A connection goes through
 *
 *     CONNECTING --> (SECURING, with TLS) --> SHAKING --> READY --> FAILING --> DEAD
 *                                                             \--> FINISHING --/
 *
 * Whatever ends it only marks it; the deferred event of struct rpc tells the user and frees, so that nobody up the
 * stack holds a pointer to a freed connection. */
#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/bufferevent_ssl.h>
#include <event2/dns.h>
#include <event2/util.h>
#include <openssl/ssl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common.pb-c.h"
#include "common/address.h"
#include "common/daemon.h"
#include "common/rpc_parts.h"

#define REFUSED_LINGER_MS 1000
#define SEND_PIECES       16 /* of an output buffer, in one system call */

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
static int conn_count(struct rpc_conn *conn)
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

static void on_flush(evutil_socket_t fd, short what, void *arg);

struct rpc *rpc_new(struct event_base *base)
{
    struct rpc *rpc = calloc(1, sizeof *rpc);
    if (!rpc)
        return NULL;
    rpc->base = base;
    rpc->deferred = event_new(base, -1, 0, on_deferred, rpc);
    rpc->flush = event_new(base, -1, 0, on_flush, rpc);
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

/* ---- input ---- */

static void conn_frame(struct rpc_conn *conn, const struct frame *frame)
{
    if (conn->state == RPC_SHAKING)
        rpc_handshake_frame(conn, frame);
    else if (frame->header.kind == FRAME_HANDSHAKE)
        rpc_conn_fail(conn, ERR_PROTOCOL, "%s sent a second handshake", conn->name);
    else
        conn->handlers->on_frame(conn->user, conn, frame);
}

/* Whether its socket is read. */
static void conn_hear(struct rpc_conn *conn, bool on)
{
    if (conn->ssl && on)
        bufferevent_enable(conn->bev, EV_READ);
    else if (conn->ssl)
        bufferevent_disable(conn->bev, EV_READ);
    else if (on)
        event_add(conn->readable, NULL);
    else
        event_del(conn->readable);
}

/* Its peer has answers to read before it is heard again. */
static bool conn_paused(struct rpc_conn *conn)
{
    if (conn->pause_bytes && evbuffer_get_length(bufferevent_get_output(conn->bev)) > conn->pause_bytes) {
        conn->paused = true;
        conn_hear(conn, false);
    }
    return conn->paused;
}

static bool conn_listens(struct rpc_conn *conn)
{
    return (conn->state == RPC_SHAKING || conn->state == RPC_READY) && !conn_paused(conn);
}

/* Hands on the frames at the start of these bytes; how many bytes they had.  *ret_need: of the next one, as far as is
 * known.  Who does not speak the protocol is found out by its first bytes. */
static size_t conn_frames(struct rpc_conn *conn, const uint8_t *data, size_t len, size_t *ret_need)
{
    size_t at = 0;
    struct err err;
    while (at < len && conn_listens(conn)) {
        struct frame frame;
        uint32_t limit = conn->state == RPC_READY ? FRAME_LIMIT : FRAME_LIMIT_HANDSHAKE;
        int rc = frame_parse(data + at, len - at, limit, &frame, ret_need, &err);
        if (rc < 0)
            rpc_conn_fail(conn, rc, "%s: %s", conn->name, err.text);
        if (rc != 1)
            break;
        conn_frame(conn, &frame);
        at += *ret_need;
    }
    return at;
}

/* Frames in conn->in. */
static void conn_input(struct rpc_conn *conn)
{
    while (conn_listens(conn)) {
        size_t len = evbuffer_get_length(conn->in), need = 0, want = len;
        uint8_t head[FRAME_HEADER_BYTES];
        struct frame_header header;
        if (conn->state == RPC_READY && evbuffer_copyout(conn->in, head, sizeof head) == FRAME_HEADER_BYTES &&
            frame_header_get(head, sizeof head, FRAME_LIMIT, &header, NULL) == 1)
            want = FRAME_HEADER_BYTES + (size_t)header.length;
        if (len < want)
            break; /* only what is whole is moved into one piece */
        const uint8_t *data = len ? evbuffer_pullup(conn->in, (ev_ssize_t)want) : NULL;
        if (len && !data) {
            rpc_conn_fail(conn, ERR_NOMEM, "no memory for a frame of %zu bytes of %s", want, conn->name);
            break;
        }
        conn->rpc->reads = conn;
        size_t done = conn_frames(conn, data, want, &need);
        conn->rpc->reads = NULL;
        evbuffer_drain(conn->in, done);
        if (done == 0)
            break;
    }
}

static void on_readable(evutil_socket_t fd, short what, void *arg)
{
    (void)what;
    struct rpc_conn *conn = arg;
    struct rpc *rpc = conn->rpc;
    ssize_t n = recv(fd, rpc->scratch, RPC_READ_BYTES, 0);
    const char *during = conn->state == RPC_SHAKING ? " during the handshake" : "";
    if (n == 0) {
        rpc_conn_fail(conn, ERR_UNREACHABLE, "%s closed the connection%s", conn->name, during);
    } else if (n < 0) {
        if (errno != EAGAIN && errno != EINTR)
            rpc_conn_fail(conn, ERR_UNREACHABLE, "the connection with %s was lost%s: %s", conn->name, during,
                          evutil_socket_error_to_string(errno));
    } else if (conn->state != RPC_FINISHING) { /* else what comes is thrown away */
        size_t done = 0, need;
        bool fresh = evbuffer_get_length(conn->in) == 0;
        if (fresh)
            done = conn_frames(conn, rpc->scratch, (size_t)n, &need);
        if (conn->state != RPC_SHAKING && conn->state != RPC_READY)
            return;
        if (done < (size_t)n && evbuffer_add(conn->in, rpc->scratch + done, (size_t)n - done) < 0)
            rpc_conn_fail(conn, ERR_NOMEM, "no memory for %zd bytes of %s", n, conn->name);
        else if (!fresh)
            conn_input(conn);
        budget_keep(rpc->budget);
    }
}

static void on_tls_read(struct bufferevent *bev, void *arg)
{
    struct rpc_conn *conn = arg;
    struct evbuffer *input = bufferevent_get_input(bev);
    if (conn->state == RPC_FINISHING)
        evbuffer_drain(input, evbuffer_get_length(input)); /* what comes is thrown away */
    else if (evbuffer_add_buffer(conn->in, input) < 0)
        rpc_conn_fail(conn, ERR_NOMEM, "no memory for what %s sends", conn->name);
    else
        conn_input(conn);
    budget_keep(conn->rpc->budget);
}

/* The connection is there: listen to it. */
static int conn_listen(struct rpc_conn *conn)
{
    conn->readable = event_new(conn->rpc->base, bufferevent_getfd(conn->bev), EV_READ | EV_PERSIST, on_readable, conn);
    return conn->readable && event_add(conn->readable, NULL) == 0 ? 0 : ERR_NOMEM;
}

/* The last bytes are in the kernel.  Wait for the peer's end of file before closing: unread input would turn the close
 * into a reset, which may overtake them. */
static void conn_shut(struct rpc_conn *conn)
{
    if (conn->ssl)
        (void)SSL_shutdown(
            conn->ssl); /* says that nothing more comes; whether it gets there is seen at the end of file */
    shutdown(bufferevent_getfd(conn->bev), SHUT_WR);
}

/* All output is with the kernel. */
static void on_write(struct bufferevent *bev, void *arg)
{
    struct rpc_conn *conn = arg;
    if (evbuffer_get_length(bufferevent_get_output(bev)) > 0)
        return;
    if (!conn->ssl)
        bufferevent_disable(bev, EV_WRITE); /* until a flush cannot send everything at once */
    if (conn->paused && conn->state == RPC_READY) {
        conn->paused = false;
        conn_hear(conn, true);
        conn_input(conn); /* frames that were left lying */
    }
    if (conn->state == RPC_FINISHING)
        conn_shut(conn);
}

/* Sends directly, once per loop turn: replies to what one turn brought leave together, and waiting for writability,
 * with its system calls, is only for what the kernel does not take. */
static void conn_flush(struct rpc_conn *conn)
{
    struct evbuffer *output = bufferevent_get_output(conn->bev);
    int error = 0;
    evbuffer_unfreeze(output, 1); /* bufferevents keep others from taking bytes out */
    while (evbuffer_get_length(output) > 0 && !error) {
        struct evbuffer_iovec pieces[SEND_PIECES];
        int n_pieces = evbuffer_peek(output, -1, NULL, pieces, SEND_PIECES);
        const struct msghdr msg = {.msg_iov = pieces,
                                   .msg_iovlen = (size_t)(n_pieces < SEND_PIECES ? n_pieces : SEND_PIECES)};
        int fd = bufferevent_getfd(conn->bev);
        ssize_t n = n_pieces > 1 ? sendmsg(fd, &msg, MSG_NOSIGNAL)
                                 : send(fd, pieces[0].iov_base, pieces[0].iov_len, MSG_NOSIGNAL);
        if (n < 0)
            error = errno;
        else
            evbuffer_drain(output, (size_t)n);
    }
    evbuffer_freeze(output, 1);
    if (!error)
        on_write(conn->bev, conn);
    else if (error == EAGAIN || error == EINTR)
        bufferevent_enable(conn->bev, EV_WRITE);
    else
        rpc_conn_fail(conn, ERR_UNREACHABLE, "the connection with %s was lost: %s", conn->name,
                      evutil_socket_error_to_string(error));
}

static void on_flush(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    struct rpc *rpc = arg;
    struct rpc_conn *conn, *list = rpc->dirty;
    rpc->dirty = NULL; /* what becomes dirty now has its turn in the next call */
    while ((conn = list)) {
        DL_DELETE2(list, conn, dirty_prev, dirty_next);
        conn->dirty = false;
        if (conn->state == RPC_SHAKING || conn->state == RPC_READY || conn->state == RPC_FINISHING)
            conn_flush(conn);
    }
}

static void conn_dirty(struct rpc_conn *conn)
{
    if (conn->dirty || conn->ssl)
        return; /* with TLS the bufferevent sends */
    conn->dirty = true;
    if (!conn->rpc->dirty)
        event_active(conn->rpc->flush, EV_TIMEOUT, 0);
    DL_APPEND2(conn->rpc->dirty, conn, dirty_prev, dirty_next);
}

static void on_event(struct bufferevent *bev, short what, void *arg);

/* Puts TLS on a connected socket, in place of the plain bufferevent if there is one.  fd stays the caller's on failure.
 */
static int conn_secure(struct rpc_conn *conn, int fd)
{
    SSL *ssl = tls_session(conn->tls, !conn->connector);
    struct bufferevent *bev =
        ssl ? bufferevent_openssl_socket_new(conn->rpc->base, fd, ssl,
                                             conn->connector ? BUFFEREVENT_SSL_CONNECTING : BUFFEREVENT_SSL_ACCEPTING,
                                             BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS)
            : NULL;
    if (!bev) {
        SSL_free(ssl);
        return ERR_NOMEM;
    }
    if (conn->bev) {
        bufferevent_setfd(conn->bev, -1);
        bufferevent_free(conn->bev);
    }
    conn->bev = bev;
    conn->ssl = ssl;
    conn->state = RPC_SECURING;
    bufferevent_openssl_set_allow_dirty_shutdown(bev, 1); /* frames know their ends */
    bufferevent_setcb(bev, on_tls_read, on_write, on_event, conn);
    bufferevent_setwatermark(bev, EV_READ, 0, FRAME_LIMIT_HANDSHAKE + FRAME_HEADER_BYTES);
    return conn_count(conn) < 0 || bufferevent_enable(bev, EV_READ | EV_WRITE) < 0 ? ERR_NOMEM : 0;
}

/* TLS's handshake is done: ours begins. */
static void conn_secured(struct rpc_conn *conn)
{
    conn->state = RPC_SHAKING;
    if (conn->connector)
        rpc_handshake_start(conn);
}

static void on_refused_read(struct bufferevent *bev, void *arg)
{
    (void)arg;
    evbuffer_drain(bufferevent_get_input(bev), SIZE_MAX);
}

static void on_refused_end(struct bufferevent *bev, short what, void *arg)
{
    (void)bev, (void)what;
    rpc_conn_close(arg);
}

/* Its certificate was refused, and TLS has said so; but it may have sent more already, and closing now would turn into
 * a reset that overtakes the alert.  So the socket is read, without TLS, until its peer has gone. */
static bool conn_linger(struct rpc_conn *conn)
{
    int fd = dup(bufferevent_getfd(conn->bev)); /* the other one is closed with its bufferevent */
    struct bufferevent *bev =
        fd >= 0 ? bufferevent_socket_new(conn->rpc->base, fd, BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS) : NULL;
    if (!bev) {
        if (fd >= 0)
            evutil_closesocket(fd);
        return false;
    }
    budget_leave(&conn->held);
    bufferevent_free(conn->bev);
    evutil_make_socket_closeonexec(fd);
    shutdown(fd, SHUT_WR);
    conn->bev = bev;
    conn->ssl = NULL;
    conn->state = RPC_FINISHING;
    bufferevent_setcb(bev, on_refused_read, NULL, on_refused_end, conn);
    bufferevent_disable(bev, EV_WRITE);
    bufferevent_enable(bev, EV_READ);
    daemon_timer_in(conn->timer, REFUSED_LINGER_MS);
    return true;
}

static void tls_refuse(struct rpc_conn *conn, unsigned long ssl_error)
{
    struct err err;
    int code = tls_failure(conn->ssl, ssl_error, &err);
    if (conn->state == RPC_SECURING && !conn->connector && code == ERR_DENIED && conn_linger(conn)) {
        if (conn->handlers->on_refused)
            conn->handlers->on_refused(conn->user, conn->name, code, err.text);
        return;
    }
    rpc_conn_fail(conn, code, "%s: %s", conn->name, err.text);
}

static void tls_event(struct rpc_conn *conn, short what)
{
    int error = EVUTIL_SOCKET_ERROR();
    unsigned long ssl_error = bufferevent_get_openssl_error(conn->bev);
    const char *during = conn->state == RPC_READY ? "" : " during the handshake";
    if (what & BEV_EVENT_CONNECTED) {
        conn_secured(conn);
    } else if (what & BEV_EVENT_EOF) {
        rpc_conn_fail(conn, ERR_UNREACHABLE, "%s closed the connection%s", conn->name, during);
    } else if (what & BEV_EVENT_TIMEOUT) {
        rpc_conn_fail(conn, ERR_LIMIT, "%s reads too slowly: cut off, it took nothing of %zu bytes for a while",
                      conn->name, evbuffer_get_length(bufferevent_get_output(conn->bev)));
    } else if (ssl_error || SSL_get_verify_result(conn->ssl) != X509_V_OK) {
        tls_refuse(conn, ssl_error);
    } else {
        rpc_conn_fail(conn, ERR_UNREACHABLE, "the connection with %s was lost%s: %s", conn->name, during,
                      error ? evutil_socket_error_to_string(error) : "it was cut off");
    }
}

static void on_event(struct bufferevent *bev, short what, void *arg)
{
    struct rpc_conn *conn = arg;
    int error = EVUTIL_SOCKET_ERROR();
    if (conn->ssl) {
        tls_event(conn, what);
        return;
    }
    if (what & BEV_EVENT_CONNECTED && conn->tls) {
        int fd = bufferevent_getfd(bev);
        address_tune(fd);
        evutil_make_socket_closeonexec(fd);
        if (conn_secure(conn, fd) < 0)
            rpc_conn_fail(conn, ERR_NOMEM, "no memory for a connection to %s", conn->name);
        return;
    }
    if (what & BEV_EVENT_CONNECTED) {
        bufferevent_disable(bev, EV_WRITE);
        if (conn_listen(conn) < 0) {
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
        rc = conn_secure(conn, fd);
    } else if (rc == 0) {
        conn->bev = bufferevent_socket_new(rpc->base, fd, BEV_OPT_CLOSE_ON_FREE);
        rc = conn->bev ? conn_count(conn) : ERR_NOMEM;
    }
    /* A connector has to wait for writability first: that is how it learns that it is connected. */
    if (!conn->timer || rc < 0 ||
        (connected && !secure && (bufferevent_disable(conn->bev, EV_WRITE) < 0 || conn_listen(conn) < 0))) {
        if (conn->bev && connected)
            bufferevent_setfd(conn->bev, -1); /* it stays the caller's */
        conn_free(conn);
        return NULL;
    }
    if (!secure)
        bufferevent_setcb(conn->bev, NULL, on_write, on_event, conn);
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

/* ---- output ---- */

/* Room for a frame in the output buffer, its header already written; commit it with conn_commit. */
static int conn_reserve(struct rpc_conn *conn, const struct frame_header *header, size_t len,
                        struct evbuffer_iovec *vec)
{
    struct evbuffer *output = bufferevent_get_output(conn->bev);
    size_t waiting = evbuffer_get_length(output);
    if (len > FRAME_LIMIT) {
        rpc_conn_fail(conn, ERR_LIMIT, "a frame of %zu bytes for %s is over the limit of %u", len, conn->name,
                      FRAME_LIMIT);
        return ERR_LIMIT;
    }
    if (waiting > 0 && waiting + FRAME_HEADER_BYTES + len > conn->output_limit) {
        rpc_conn_fail(conn, ERR_LIMIT, "%s reads too slowly: cut off with %zu bytes waiting", conn->name, waiting);
        return ERR_LIMIT;
    }
    if (evbuffer_reserve_space(output, (ev_ssize_t)(FRAME_HEADER_BYTES + len), vec, 1) != 1) {
        rpc_conn_fail(conn, ERR_NOMEM, "no memory for a frame of %zu bytes for %s", len, conn->name);
        return ERR_NOMEM;
    }
    frame_header_put(vec->iov_base, header);
    vec->iov_len = FRAME_HEADER_BYTES + len;
    return 0;
}

static int conn_commit(struct rpc_conn *conn, struct evbuffer_iovec *vec)
{
    evbuffer_commit_space(bufferevent_get_output(conn->bev), vec, 1);
    budget_keep(conn->rpc->budget);
    if (conn->state >= RPC_FAILING)
        return ERR_LIMIT; /* it was the one with the most */
    conn_dirty(conn);
    return 0;
}

int rpc_conn_put(struct rpc_conn *conn, enum frame_kind kind, uint16_t method, uint64_t call,
                 const ProtobufCMessage *msg)
{
    size_t len = msg ? protobuf_c_message_get_packed_size(msg) : 0;
    struct frame_header header = {(uint32_t)len, (uint16_t)kind, method, call};
    struct evbuffer_iovec vec;
    int rc = conn_reserve(conn, &header, len, &vec);
    if (rc < 0)
        return rc;
    if (msg)
        protobuf_c_message_pack(msg, (uint8_t *)vec.iov_base + FRAME_HEADER_BYTES);
    return conn_commit(conn, &vec);
}

int rpc_conn_send(struct rpc_conn *conn, enum frame_kind kind, uint16_t method, uint64_t call,
                  const ProtobufCMessage *msg)
{
    return conn->state == RPC_READY ? rpc_conn_put(conn, kind, method, call, msg) : ERR_UNREACHABLE;
}

int rpc_conn_send_bytes(struct rpc_conn *conn, enum frame_kind kind, uint16_t method, uint64_t call, const void *data,
                        size_t len)
{
    if (conn->state != RPC_READY)
        return ERR_UNREACHABLE;
    struct frame_header header = {(uint32_t)len, (uint16_t)kind, method, call};
    struct evbuffer_iovec vec;
    int rc = conn_reserve(conn, &header, len, &vec);
    if (rc < 0)
        return rc;
    if (len > 0)
        memcpy((uint8_t *)vec.iov_base + FRAME_HEADER_BYTES, data, len);
    return conn_commit(conn, &vec);
}

int rpc_conn_send_error(struct rpc_conn *conn, uint16_t method, uint64_t call, int code, const char *text)
{
    char copy[ERR_TEXT_MAX]; /* protobuf-c wants a pointer that is not const */
    snprintf(copy, sizeof copy, "%s", text);
    Pb__Error error = PB__ERROR__INIT;
    error.code = code;
    error.text = copy;
    return rpc_conn_send(conn, FRAME_ERROR, method, call, &error.base);
}

void rpc_conn_finish(struct rpc_conn *conn, unsigned linger_ms)
{
    /* FAILING: there is nobody to send to, and the user, who lets go here, must not be told any more. */
    if (conn->state <= RPC_SECURING || conn->state == RPC_FAILING) {
        rpc_conn_close(conn);
        return;
    }
    if (conn->state >= RPC_FINISHING)
        return;
    conn->state = RPC_FINISHING;
    conn->owed_close = false;
    daemon_timer_in(conn->timer, linger_ms);
    if (conn->paused)
        conn_hear(conn, true); /* what comes is thrown away */
    if (evbuffer_get_length(bufferevent_get_output(conn->bev)) == 0)
        conn_shut(conn);
}

/* ---- small things ---- */

void rpc_conn_limit(struct rpc_conn *conn, size_t pause_bytes, size_t cut_bytes, unsigned stall_ms)
{
    const struct timeval stall = {.tv_sec = stall_ms / 1000, .tv_usec = (long)(stall_ms % 1000) * 1000};
    conn->pause_bytes = pause_bytes;
    conn->output_limit = cut_bytes;
    bufferevent_set_timeouts(conn->bev, NULL, &stall);
}

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

size_t rpc_conn_unsent(const struct rpc_conn *conn)
{
    return evbuffer_get_length(bufferevent_get_output(conn->bev));
}
