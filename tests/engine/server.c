/* The engine's listener.  See server.h.
 *
 * The server's thread owns every connection and all of libevent; what crosses is the queue of requests (in), the list
 * of replies (out), and the word of refusal, under one lock. */
#include "tests/engine/server.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <event2/thread.h>
#include <jansson.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/address.h"
#include "common/loop.h"

#define LINE_MAX_BYTES (1u << 20)
#define TOKENS_MAX     (1u << 16)

struct server_conn {
    atomic_uint refs; /* the list's, and one per request */
    atomic_bool closed;
    struct server *server;
    struct bufferevent *bev; /* NULL when closed; server's thread */
    struct server_conn *next, **at;
};
struct reply {
    struct reply *next;
    struct server_conn *conn;
    char *line;
};
struct server {
    struct server_options options;
    struct event_base *base;
    struct evconnlistener *listener;
    struct event *flush, *quit, *term, *interrupt;
    pthread_t thread;
    bool started;
    char address[ADDRESS_TEXT_MAX];
    struct server_conn *conns;
    pthread_mutex_t lock;
    /* under lock */
    const char *refuse;
    struct request *queue, **queue_tail;
    struct reply *replies, **replies_tail;
};

/* ---- connections ---- */

static void conn_unref(struct server_conn *c)
{
    if (atomic_fetch_sub(&c->refs, 1) == 1)
        free(c);
}

static void conn_close(struct server_conn *c)
{
    if (atomic_exchange(&c->closed, true))
        return;
    bufferevent_free(c->bev);
    c->bev = NULL;
    *c->at = c->next;
    if (c->next)
        c->next->at = c->at;
    conn_unref(c);
}

static bool prompt_read(const json_t *prompt, struct request *r)
{
    size_t i;
    json_t *v;
    json_array_foreach(prompt, i, v)
    {
        if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
            return false;
        r->prompt[i] = (int32_t)json_integer_value(v);
    }
    return true;
}

static struct request *request_parse(const json_t *o)
{
    const char *id = json_string_value(json_object_get(o, "id"));
    const json_t *prompt = json_object_get(o, "prompt"), *max = json_object_get(o, "max_tokens");
    size_t n = json_array_size(prompt);
    if (!id || strlen(id) >= sizeof((struct request *)0)->id || n == 0 || n > TOKENS_MAX || !json_is_integer(max) ||
        json_integer_value(max) < 1 || json_integer_value(max) > TOKENS_MAX)
        return NULL;
    struct request *r = calloc(1, sizeof *r + n * sizeof *r->prompt);
    if (!r)
        return NULL;
    strcpy(r->id, id);
    r->n_prompt = (uint32_t)n;
    r->max_tokens = (uint32_t)json_integer_value(max);
    if (!prompt_read(prompt, r)) {
        free(r);
        return NULL;
    }
    return r;
}

static void conn_request(struct server_conn *c, struct request *r)
{
    struct server *s = c->server;
    r->conn = c;
    atomic_fetch_add(&c->refs, 1);
    pthread_mutex_lock(&s->lock);
    const char *why = s->refuse;
    if (!why) {
        *s->queue_tail = r;
        s->queue_tail = &r->next;
    }
    pthread_mutex_unlock(&s->lock);
    if (!why) {
        s->options.on_request(s->options.user);
        return;
    }
    request_refuse(s, r, why);
    server_flush(s);
}

/* Gives the descriptor to the lot; the connection is none of ours any more. */
static void conn_greeting(struct server_conn *c, const char *line)
{
    struct mesh_lot *lot = c->server->options.lot;
    int fd = dup(bufferevent_getfd(c->bev));
    bool clean = evbuffer_get_length(bufferevent_get_input(c->bev)) == 0;
    conn_close(c);
    if (fd >= 0 && !(clean && mesh_lot_greet(lot, line, c->server->options.own_id, fd)))
        close(fd);
}

static void conn_line(struct server_conn *c, const char *line)
{
    json_t *o = json_loads(line, 0, NULL);
    if (json_object_get(o, "mesh")) {
        conn_greeting(c, line);
    } else {
        struct request *r = request_parse(o);
        if (r)
            conn_request(c, r);
        else
            conn_close(c); /* a client that speaks something else */
    }
    json_decref(o);
}

static void conn_read(struct bufferevent *bev, void *user)
{
    struct server_conn *c = user;
    atomic_fetch_add(&c->refs, 1); /* past its closing */
    while (!atomic_load(&c->closed)) {
        struct evbuffer *in = bufferevent_get_input(bev);
        char *line = evbuffer_readln(in, NULL, EVBUFFER_EOL_LF);
        if (line)
            conn_line(c, line);
        else if (evbuffer_get_length(in) > LINE_MAX_BYTES)
            conn_close(c);
        free(line);
        if (!line)
            break;
    }
    conn_unref(c);
}

static void conn_event(struct bufferevent *bev, short what, void *user)
{
    (void)bev;
    if (what & (BEV_EVENT_EOF | BEV_EVENT_ERROR))
        conn_close(user);
}

static void on_accept(struct evconnlistener *listener, evutil_socket_t fd, struct sockaddr *addr, int len, void *user)
{
    (void)listener, (void)addr, (void)len;
    struct server *s = user;
    struct server_conn *c = calloc(1, sizeof *c);
    struct bufferevent *bev = c ? bufferevent_socket_new(s->base, fd, BEV_OPT_CLOSE_ON_FREE) : NULL;
    if (!bev) {
        free(c);
        close(fd);
        return;
    }
    address_tune(fd);
    *c = (struct server_conn){.server = s, .bev = bev, .next = s->conns, .at = &s->conns};
    atomic_init(&c->refs, 1);
    if (s->conns)
        s->conns->at = &c->next;
    s->conns = c;
    bufferevent_setcb(bev, conn_read, NULL, conn_event, c);
    bufferevent_enable(bev, EV_READ | EV_WRITE);
}

/* ---- the thread ---- */

static void on_flush(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct server *s = user;
    pthread_mutex_lock(&s->lock);
    struct reply *r = s->replies, *next;
    s->replies = NULL;
    s->replies_tail = &s->replies;
    pthread_mutex_unlock(&s->lock);
    for (; r; r = next) {
        next = r->next;
        if (!atomic_load(&r->conn->closed)) {
            bufferevent_write(r->conn->bev, r->line, strlen(r->line));
            bufferevent_write(r->conn->bev, "\n", 1);
        }
        conn_unref(r->conn);
        free(r->line);
        free(r);
    }
}

static void on_quit(evutil_socket_t fd, short what, void *user)
{
    struct server *s = user;
    on_flush(fd, what, user);
    /* One try without blocking for what is queued: these are short lines. */
    for (struct server_conn *c = s->conns; c; c = c->next) {
        struct evbuffer *out = bufferevent_get_output(c->bev);
        evbuffer_unfreeze(out, 1);
        if (evbuffer_get_length(out))
            (void)evbuffer_write(out, bufferevent_getfd(c->bev));
        evbuffer_freeze(out, 1);
    }
    event_base_loopbreak(s->base);
}

static void on_signal(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct server *s = user;
    s->options.on_signal(s->options.user);
}

static void *server_main(void *user)
{
    struct server *s = user;
    event_base_dispatch(s->base);
    return NULL;
}

static bool server_signals(struct server *s)
{
    if (!s->options.on_signal)
        return true;
    s->term = evsignal_new(s->base, SIGTERM, on_signal, s);
    s->interrupt = evsignal_new(s->base, SIGINT, on_signal, s);
    return s->term && s->interrupt && event_add(s->term, NULL) == 0 && event_add(s->interrupt, NULL) == 0;
}

static int server_events(struct server *s, int fd, struct err *err)
{
    s->base = event_base_new();
    if (s->base) {
        s->listener = evconnlistener_new(s->base, on_accept, s, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, -1, fd);
        s->flush = event_new(s->base, -1, 0, on_flush, s);
        s->quit = event_new(s->base, -1, 0, on_quit, s);
    }
    if (!s->listener)
        close(fd);
    if (!s->listener || !s->flush || !s->quit || !server_signals(s))
        return err_set(err, ERR_NOMEM, "out of memory for the event loop");
    int rc = pthread_create(&s->thread, NULL, server_main, s);
    if (rc)
        return err_set(err, ERR_NOMEM, "cannot start the server's thread: %s", strerror(rc));
    s->started = true;
    return 0;
}

int server_open(const struct server_options *options, struct server **ret_server, struct err *err)
{
    struct server *s = calloc(1, sizeof *s);
    int fd;
    if (!s)
        return err_set(err, ERR_NOMEM, "out of memory");
    if (evthread_use_pthreads() != 0) {
        free(s);
        return err_set(err, ERR_NOMEM, "libevent has no threads");
    }
    s->options = *options;
    s->refuse = "starting";
    s->queue_tail = &s->queue;
    s->replies_tail = &s->replies;
    pthread_mutex_init(&s->lock, NULL);
    int rc = address_listen(options->listen, 0, &fd, s->address, err);
    if (rc == 0)
        rc = server_events(s, fd, err);
    if (rc) {
        server_close(s);
        return rc;
    }
    *ret_server = s;
    return 0;
}

static void event_free_any(struct event *e)
{
    if (e)
        event_free(e);
}

void server_close(struct server *s)
{
    if (!s)
        return;
    if (s->started) {
        event_active(s->quit, 0, 0);
        pthread_join(s->thread, NULL);
    }
    for (struct request *r; (r = server_take(s));)
        request_free(r);
    while (s->conns)
        conn_close(s->conns);
    if (s->listener)
        evconnlistener_free(s->listener);
    event_free_any(s->flush);
    event_free_any(s->quit);
    event_free_any(s->term);
    event_free_any(s->interrupt);
    loop_free(s->base);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

const char *server_address(const struct server *s)
{
    return s->address;
}

void server_refuse(struct server *s, const char *why)
{
    pthread_mutex_lock(&s->lock);
    s->refuse = why;
    pthread_mutex_unlock(&s->lock);
}

struct request *server_take(struct server *s)
{
    pthread_mutex_lock(&s->lock);
    struct request *r = s->queue;
    if (r) {
        s->queue = r->next;
        if (!s->queue)
            s->queue_tail = &s->queue;
        r->next = NULL;
    }
    pthread_mutex_unlock(&s->lock);
    return r;
}

/* ---- replies ---- */

/* Takes `o` over.  A reply that finds no memory is lost, and so is the request: its client sees no end of it. */
static void reply_add(struct server *s, const struct request *r, json_t *o)
{
    struct reply *reply = calloc(1, sizeof *reply);
    char *line = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    if (!reply || !line) {
        free(reply);
        free(line);
        return;
    }
    atomic_fetch_add(&r->conn->refs, 1);
    *reply = (struct reply){.conn = r->conn, .line = line};
    pthread_mutex_lock(&s->lock);
    *s->replies_tail = reply;
    s->replies_tail = &reply->next;
    pthread_mutex_unlock(&s->lock);
}

void request_token(struct server *s, const struct request *r, int32_t token, uint32_t index)
{
    reply_add(s, r, json_pack("{s:s, s:i, s:i}", "id", r->id, "token", (int)token, "index", (int)index));
}

void request_finish(struct server *s, struct request *r)
{
    reply_add(s, r, json_pack("{s:s, s:b}", "id", r->id, "done", 1));
    request_free(r);
}

void request_hand_back(struct server *s, struct request *r, const int32_t *tokens, uint32_t n)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < n; i++)
        json_array_append_new(list, json_integer(tokens[i]));
    reply_add(s, r, json_pack("{s:s, s:b, s:o}", "id", r->id, "handback", 1, "tokens", list));
    request_free(r);
}

void request_refuse(struct server *s, struct request *r, const char *why)
{
    reply_add(s, r, json_pack("{s:s, s:s}", "id", r->id, "refused", why));
    request_free(r);
}

bool request_gone(const struct request *r)
{
    return atomic_load(&r->conn->closed);
}

void request_free(struct request *r)
{
    if (r->conn)
        conn_unref(r->conn);
    free(r);
}

void server_flush(struct server *s)
{
    event_active(s->flush, 0, 0);
}
