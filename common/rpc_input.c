/* Event-driven connections: what comes, frame by frame.  Without TLS the socket is read directly, into one buffer of
 * all connections; frames that are whole are handed on from there.  One loop thread. */
#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/util.h>
#include <sys/socket.h>

#include "common/rpc_parts.h"

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
void rpc_conn_hear(struct rpc_conn *conn, bool on)
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
        rpc_conn_hear(conn, false);
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
void rpc_conn_input(struct rpc_conn *conn)
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
            rpc_conn_input(conn);
        budget_keep(rpc->budget);
    }
}

void rpc_on_tls_read(struct bufferevent *bev, void *arg)
{
    struct rpc_conn *conn = arg;
    struct evbuffer *input = bufferevent_get_input(bev);
    if (conn->state == RPC_FINISHING)
        evbuffer_drain(input, evbuffer_get_length(input)); /* what comes is thrown away */
    else if (evbuffer_add_buffer(conn->in, input) < 0)
        rpc_conn_fail(conn, ERR_NOMEM, "no memory for what %s sends", conn->name);
    else
        rpc_conn_input(conn);
    budget_keep(conn->rpc->budget);
}

/* The connection is there: listen to it. */
int rpc_conn_listen(struct rpc_conn *conn)
{
    conn->readable = event_new(conn->rpc->base, bufferevent_getfd(conn->bev), EV_READ | EV_PERSIST, on_readable, conn);
    return conn->readable && event_add(conn->readable, NULL) == 0 ? 0 : ERR_NOMEM;
}
