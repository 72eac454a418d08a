/* Listeners of event-driven connections.  One loop thread. */
#include <arpa/inet.h>
#include <event2/bufferevent.h>
#include <event2/util.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "common/daemon.h"
#include "common/rpc_parts.h"

#define MAX_CONNS_DEFAULT 4096
#define PAUSE_MS          100
#define UNKNOWN_MAX       64 /* with TLS: connections of one address that have not said who they are */

static void peer_text(const struct sockaddr *sa, char *ret_text, size_t size)
{
    char host[INET6_ADDRSTRLEN] = "";
    if (sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)sa;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
        snprintf(ret_text, size, "%s:%u", host, ntohs(in->sin_port));
    } else if (sa->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const void *)sa;
        inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof host);
        snprintf(ret_text, size, "[%s]:%u", host, ntohs(in6->sin6_port));
    } else {
        snprintf(ret_text, size, "unix");
    }
}

/* Counts a connection whose peer is not known yet; false: its address has too many of them. */
static bool source_count(struct rpc_conn *conn, const struct sockaddr *sa)
{
    char host[sizeof conn->source->host] = "";
    struct rpc *rpc = conn->rpc;
    struct rpc_source *source;
    if (sa->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)(const void *)sa)->sin_addr, host, sizeof host);
    else if (sa->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr, host, sizeof host);
    HASH_FIND_STR(rpc->sources, host, source);
    if (source && source->n >= UNKNOWN_MAX)
        return false;
    if (!source) {
        source = calloc(1, sizeof *source);
        if (!source)
            return false;
        memcpy(source->host, host, sizeof host);
        HASH_ADD_STR(rpc->sources, host, source);
    }
    source->n++;
    conn->source = source;
    return true;
}

static void on_accept(struct evconnlistener *ev, evutil_socket_t fd, struct sockaddr *sa, int len, void *arg)
{
    (void)ev;
    (void)len;
    struct rpc_listener *listener = arg;
    unsigned max = listener->options.max_conns ? listener->options.max_conns : MAX_CONNS_DEFAULT;
    if (listener->n_conns >= max) {
        evutil_closesocket(fd);
        return;
    }
    struct rpc_options options = listener->options;
    if (sa->sa_family == AF_UNIX)
        options.tls = NULL;
    struct rpc_conn *conn = rpc_conn_new(listener->rpc, &options, fd, RPC_SHAKING);
    if (!conn) {
        evutil_closesocket(fd);
        return;
    }
    conn->listener = listener;
    listener->n_conns++;
    address_tune(fd);
    address_probe(fd); /* who has vanished must not count as arrived at a barrier, or as a waiter, for hours */
    peer_text(sa, conn->name, sizeof conn->name);
    if (conn->tls && !source_count(conn, sa))
        rpc_conn_close(conn);
}

static void listener_enable(struct rpc_listener *listener, bool on)
{
    for (size_t i = 0; i < listener->n; i++) {
        if (on)
            evconnlistener_enable(listener->sockets[i].ev);
        else
            evconnlistener_disable(listener->sockets[i].ev);
    }
}

static void on_pause_over(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    listener_enable(arg, true);
}

/* Out of descriptors: without a pause the loop would spin, because the connection still waits. */
static void on_accept_error(struct evconnlistener *ev, void *arg)
{
    (void)ev;
    struct rpc_listener *listener = arg;
    listener_enable(listener, false);
    daemon_timer_in(listener->pause, PAUSE_MS);
}

static int listener_open(struct rpc_listener *listener, size_t i, const char *address, struct err *err)
{
    struct rpc_socket *s = &listener->sockets[i];
    int fd = listener->options.fds ? listener->options.fds[i] : -1;
    s->lent = fd >= 0 && listener->options.fds_lent;
    int rc = fd >= 0 ? address_adopt(address, fd, s->actual, err)
                     : address_listen(address, listener->options.unix_mode, &fd, s->actual, err);
    if (rc < 0) {
        if (fd >= 0)
            evutil_closesocket(fd);
        return rc;
    }
    s->ev = evconnlistener_new(listener->rpc->base, on_accept, listener, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC,
                               0, fd);
    if (!s->ev) {
        if (!s->lent)
            address_unlink(address, fd);
        evutil_closesocket(fd);
        return err_set(err, ERR_NOMEM, "no memory to listen on %s", address);
    }
    evconnlistener_set_error_cb(s->ev, on_accept_error);
    s->fd = fd;
    snprintf(s->given, sizeof s->given, "%s", address);
    listener->n = i + 1;
    return 0;
}

int rpc_listen(struct rpc *rpc, const char *const *addresses, size_t n, const struct rpc_options *options,
               struct rpc_listener **ret_listener, struct err *err)
{
    struct rpc_listener *listener = calloc(1, sizeof *listener);
    if (!listener)
        return err_set(err, ERR_NOMEM, "no memory for a listener");
    listener->rpc = rpc;
    listener->self = *options->self;
    listener->options = *options;
    listener->options.self = &listener->self;
    DL_APPEND(rpc->listeners, listener);
    int rc = 0;
    listener->sockets = calloc(n ? n : 1, sizeof *listener->sockets);
    listener->pause = evtimer_new(rpc->base, on_pause_over, listener);
    if (!listener->sockets || !listener->pause)
        rc = err_set(err, ERR_NOMEM, "no memory for a listener");
    for (size_t i = 0; i < n && rc == 0; i++)
        rc = listener_open(listener, i, addresses[i], err);
    listener->options.fds = NULL; /* the caller's array */
    if (rc < 0) {
        rpc_listener_close(listener);
        return rc;
    }
    *ret_listener = listener;
    return 0;
}

const char *rpc_listener_address(const struct rpc_listener *listener, size_t i)
{
    return i < listener->n ? listener->sockets[i].actual : NULL;
}

int rpc_listener_fd(const struct rpc_listener *listener, size_t i)
{
    return i < listener->n ? listener->sockets[i].fd : -1;
}

/* Connections that nobody knows yet end with their listener; the others forget it. */
static void forget(struct rpc_conn *conns, struct rpc_listener *listener)
{
    struct rpc_conn *conn, *next;
    DL_FOREACH_SAFE(conns, conn, next)
    {
        if (conn->listener != listener)
            continue;
        conn->listener = NULL;
        if (conn->state == RPC_SECURING || conn->state == RPC_SHAKING)
            rpc_conn_close(conn);
    }
}

void rpc_listener_close(struct rpc_listener *listener)
{
    if (!listener)
        return;
    struct rpc *rpc = listener->rpc;
    for (size_t i = 0; i < listener->n; i++) {
        if (!listener->sockets[i].lent)
            address_unlink(listener->sockets[i].given, listener->sockets[i].fd);
        evconnlistener_free(listener->sockets[i].ev);
    }
    forget(rpc->conns, listener);
    forget(rpc->failing, listener);
    forget(rpc->dead, listener);
    if (listener->pause)
        event_free(listener->pause);
    DL_DELETE(rpc->listeners, listener);
    free(listener->sockets);
    free(listener);
}
