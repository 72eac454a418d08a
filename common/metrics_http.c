/* Metrics over libevent's evhttp: see metrics_http.h.
 *
 * evhttp itself bounds neither the number of connections nor their life, so each one's bufferevent is made here and
 * kept referenced: one that evhttp has freed has no callbacks any more, and one that lives too long is shut down. */
#include "common/metrics_http.h"

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/http.h>
#include <event2/listener.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/address.h"
#include "common/clock.h"
#include "common/daemon.h"

#define REQUEST_MAX 4096
#define SWEEP_MS    250

struct conn {
    struct bufferevent *bev; /* NULL = free */
    uint64_t since_ns;
};

struct metrics_http {
    struct metrics_http_config config;
    char address[ADDRESS_TEXT_MAX];
    struct evhttp *http;
    struct evconnlistener *listener; /* http's */
    struct event *sweep;             /* armed while the slots are taken, or one is open */
    struct conn conns[METRICS_CONNS_MAX];
};

/* ---- connections ---- */

static bool is_freed(struct bufferevent *bev)
{
    bufferevent_data_cb read_cb, write_cb;
    bufferevent_event_cb event_cb;
    bufferevent_getcb(bev, &read_cb, &write_cb, &event_cb, NULL);
    return !event_cb;
}

/* Lets go of those that have ended, ends those whose time is over; how many are left. */
static size_t sweep(struct metrics_http *h)
{
    size_t n = 0;
    uint64_t now = clock_now_ns();
    for (size_t i = 0; i < METRICS_CONNS_MAX; i++) {
        struct conn *c = &h->conns[i];
        if (c->bev && is_freed(c->bev)) {
            bufferevent_decref(c->bev);
            c->bev = NULL;
        }
        if (c->bev && now - c->since_ns > METRICS_CONN_MS * UINT64_C(1000000))
            shutdown(bufferevent_getfd(c->bev), SHUT_RDWR); /* evhttp reads its end */
        n += c->bev != NULL;
    }
    return n;
}

static void on_sweep(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct metrics_http *h = user;
    size_t n = sweep(h);
    if (n < METRICS_CONNS_MAX)
        evconnlistener_enable(h->listener);
    if (n)
        daemon_timer_in(h->sweep, SWEEP_MS);
}

/* evhttp has accepted a connection. */
static struct bufferevent *on_accepted(struct event_base *base, void *user)
{
    struct metrics_http *h = user;
    size_t n = sweep(h), i = 0;
    /* its descriptor is closed with the last reference, so that no event of it is left when the number is used again */
    struct bufferevent *bev = bufferevent_socket_new(base, -1, BEV_OPT_CLOSE_ON_FREE);
    while (i < METRICS_CONNS_MAX && h->conns[i].bev)
        i++;
    if (!bev || i == METRICS_CONNS_MAX)
        return bev;
    bufferevent_incref(bev);
    h->conns[i] = (struct conn){.bev = bev, .since_ns = clock_now_ns()};
    if (n + 1 == METRICS_CONNS_MAX)
        evconnlistener_disable(h->listener);
    daemon_timer_in(h->sweep, SWEEP_MS);
    return bev;
}

/* ---- requests ---- */

static void answer(struct evhttp_request *request, int code, const char *reason, const char *text, size_t len)
{
    struct evbuffer *body = evbuffer_new();
    struct evkeyvalq *headers = evhttp_request_get_output_headers(request);
    if (!body || evbuffer_add(body, text, len) != 0 ||
        evhttp_add_header(headers, "Content-Type", "text/plain; version=0.0.4; charset=utf-8") != 0 ||
        evhttp_add_header(headers, "Connection", "close") != 0)
        evhttp_send_error(request, HTTP_INTERNAL, NULL);
    else
        evhttp_send_reply(request, code, reason, body);
    if (body)
        evbuffer_free(body);
}

static void on_metrics(struct evhttp_request *request, void *user)
{
    const struct metrics_http *h = user;
    struct metrics_text t = {0};
    metrics_process_write(&t, h->config.daemon);
    h->config.write(h->config.user, &t);
    if (t.broken)
        answer(request, HTTP_INTERNAL, "Internal Server Error", "out of memory\n", strlen("out of memory\n"));
    else
        answer(request, HTTP_OK, "OK", t.text, t.len);
    metrics_text_done(&t);
}

static void on_healthz(struct evhttp_request *request, void *user)
{
    const struct metrics_http *h = user;
    char text[512];
    bool well = h->config.healthy(h->config.user, text, sizeof text - 1);
    strcat(text, "\n");
    answer(request, well ? HTTP_OK : HTTP_SERVUNAVAIL, well ? "OK" : "Service Unavailable", text, strlen(text));
}

static void on_other(struct evhttp_request *request, void *user)
{
    (void)user;
    static const char text[] = "there is GET /metrics and GET /healthz\n";
    answer(request, HTTP_NOTFOUND, "Not Found", text, sizeof text - 1);
}

/* ---- opening, closing ---- */

int metrics_http_check(const char *address, bool insecure, struct err *err)
{
    struct address a;
    int rc = address ? address_parse(address, &a, err) : 0;
    if (rc == 0 && address && !insecure && !daemon_address_is_local(address))
        return err_set(
            err, ERR_DENIED,
            "will not listen for metrics on %s: they are neither encrypted nor authenticated; use the loopback "
            "or a unix socket, or --insecure in a network that you trust",
            address);
    return rc;
}

static int open_http(struct metrics_http *h, int fd, struct err *err)
{
    struct event_base *base = h->config.base;
    h->sweep = event_new(base, -1, 0, on_sweep, h);
    h->http = evhttp_new(base);
    h->listener = evconnlistener_new(base, NULL, NULL, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, 0, fd);
    if (!h->listener)
        close(fd);
    if (!h->sweep || !h->http || !h->listener || !evhttp_bind_listener(h->http, h->listener)) {
        if (h->listener)
            evconnlistener_free(h->listener);
        h->listener = NULL;
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    evhttp_set_bevcb(h->http, on_accepted, h);
    evhttp_set_allowed_methods(h->http, EVHTTP_REQ_GET);
    evhttp_set_max_headers_size(h->http, REQUEST_MAX);
    evhttp_set_max_body_size(h->http, 0);
    evhttp_set_timeout(h->http, METRICS_CONN_MS / 1000);
    evhttp_set_gencb(h->http, on_other, h);
    if (evhttp_set_cb(h->http, "/metrics", on_metrics, h) != 0 ||
        evhttp_set_cb(h->http, "/healthz", on_healthz, h) != 0)
        return err_set(err, ERR_NOMEM, "out of memory");
    return 0;
}

int metrics_http_open(const struct metrics_http_config *config, struct metrics_http **ret_http, struct err *err)
{
    int fd, rc = metrics_http_check(config->address, config->insecure, err);
    if (rc < 0)
        return rc;
    struct metrics_http *h = calloc(1, sizeof *h);
    if (!h)
        return err_set(err, ERR_NOMEM, "out of memory");
    h->config = *config;
    rc = address_listen(config->address, 0660, &fd, h->address, err);
    if (rc < 0)
        (void)err_wrap(err, "metrics");
    else
        rc = open_http(h, fd, err);
    if (rc < 0)
        metrics_http_close(h);
    else
        *ret_http = h;
    return rc;
}

const char *metrics_http_address(const struct metrics_http *h)
{
    return h->address;
}

void metrics_http_close(struct metrics_http *h)
{
    if (!h)
        return;
    if (h->listener && h->http)
        address_unlink(h->address, evconnlistener_get_fd(h->listener));
    if (h->http)
        evhttp_free(h->http); /* and the listener */
    for (size_t i = 0; i < METRICS_CONNS_MAX; i++) {
        if (h->conns[i].bev)
            bufferevent_decref(h->conns[i].bev);
    }
    if (h->sweep)
        event_free(h->sweep);
    free(h);
}
