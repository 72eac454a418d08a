/* Event-driven connections with TLS: its handshake, its events, and how a certificate is refused so that the other end
 * hears why.  One loop thread. */
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/bufferevent_ssl.h>
#include <event2/util.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/daemon.h"
#include "common/rpc_parts.h"

#define REFUSED_LINGER_MS 1000

int rpc_conn_secure(struct rpc_conn *conn, int fd)
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
    bufferevent_setcb(bev, rpc_on_tls_read, rpc_on_write, rpc_on_event, conn);
    bufferevent_setwatermark(bev, EV_READ, 0, FRAME_LIMIT_HANDSHAKE + FRAME_HEADER_BYTES);
    return rpc_conn_count(conn) < 0 || bufferevent_enable(bev, EV_READ | EV_WRITE) < 0 ? ERR_NOMEM : 0;
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

void rpc_on_tls_event(struct rpc_conn *conn, short what)
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
