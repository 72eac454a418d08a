/* Event-driven connections: what is sent, its limits, and the last of it.  One loop thread. */
#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/util.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "common/daemon.h"
#include "common/rpc_parts.h"

#define SEND_PIECES 16 /* of an output buffer, in one system call */

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
void rpc_on_write(struct bufferevent *bev, void *arg)
{
    struct rpc_conn *conn = arg;
    if (evbuffer_get_length(bufferevent_get_output(bev)) > 0)
        return;
    if (!conn->ssl)
        bufferevent_disable(bev, EV_WRITE); /* until a flush cannot send everything at once */
    if (conn->paused && conn->state == RPC_READY) {
        conn->paused = false;
        rpc_conn_hear(conn, true);
        rpc_conn_input(conn); /* frames that were left lying */
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
        rpc_on_write(conn->bev, conn);
    else if (error == EAGAIN || error == EINTR)
        bufferevent_enable(conn->bev, EV_WRITE);
    else
        rpc_conn_fail(conn, ERR_UNREACHABLE, "the connection with %s was lost: %s", conn->name,
                      evutil_socket_error_to_string(error));
}

void rpc_on_flush(evutil_socket_t fd, short what, void *arg)
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
        rpc_conn_hear(conn, true); /* what comes is thrown away */
    if (evbuffer_get_length(bufferevent_get_output(conn->bev)) == 0)
        conn_shut(conn);
}

void rpc_conn_limit(struct rpc_conn *conn, size_t pause_bytes, size_t cut_bytes, unsigned stall_ms)
{
    const struct timeval stall = {.tv_sec = stall_ms / 1000, .tv_usec = (long)(stall_ms % 1000) * 1000};
    conn->pause_bytes = pause_bytes;
    conn->output_limit = cut_bytes;
    bufferevent_set_timeouts(conn->bev, NULL, &stall);
}

size_t rpc_conn_unsent(const struct rpc_conn *conn)
{
    return evbuffer_get_length(bufferevent_get_output(conn->bev));
}
