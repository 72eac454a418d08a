/* Engines: who may get requests, and the connections to them.  Loop thread.
 *
 * A target outlives the view that named it until its connection ends with nothing outstanding. */
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "common/address.h"
#include "common/clock.h"
#include "tests/feeder/feeder.h"

#define LINE_MAX_BYTES   (1u << 20)
#define LOST_BACK_OFF_MS 100

struct link { /* argument of the callbacks */
    struct feeder *feeder;
    struct target *target;
};

static void target_disconnect(struct target *t)
{
    if (!t->bev)
        return;
    void *link;
    bufferevent_getcb(t->bev, NULL, NULL, NULL, &link);
    bufferevent_free(t->bev);
    t->bev = NULL;
    free(link);
}

static void target_lost(struct feeder *f, struct target *t)
{
    target_disconnect(t);
    target_back_off(t, LOST_BACK_OFF_MS);
    jobs_lost(f, t);
}

static void on_read(struct bufferevent *bev, void *user)
{
    struct feeder *f = ((struct link *)user)->feeder;
    struct target *t = ((struct link *)user)->target;
    char *line;
    while (t->bev == bev && (line = evbuffer_readln(bufferevent_get_input(bev), NULL, EVBUFFER_EOL_LF))) {
        jobs_line(f, t, line);
        free(line);
    }
    if (t->bev == bev && evbuffer_get_length(bufferevent_get_input(bev)) > LINE_MAX_BYTES)
        target_lost(f, t);
    jobs_pump(f);
}

static void on_event(struct bufferevent *bev, short what, void *user)
{
    struct link link = *(struct link *)user;
    if (!(what & (BEV_EVENT_EOF | BEV_EVENT_ERROR)))
        return;
    on_read(bev, user); /* the last lines may have come with the end */
    if (link.target->bev == bev)
        target_lost(link.feeder, link.target);
    jobs_pump(link.feeder);
}

static int target_connect(struct feeder *f, struct target *t)
{
    struct address a;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    if (address_parse(t->address, &a, NULL) || a.is_unix || getaddrinfo(a.host, a.port, &hints, &found) != 0)
        return ERR_INVALID;
    struct link *link = malloc(sizeof *link);
    struct bufferevent *bev =
        link ? bufferevent_socket_new(f->base, -1, BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS) : NULL;
    int rc = ERR_NOMEM;
    if (bev) {
        *link = (struct link){f, t};
        bufferevent_setcb(bev, on_read, NULL, on_event, link);
        bufferevent_enable(bev, EV_READ | EV_WRITE);
        rc = bufferevent_socket_connect(bev, found->ai_addr, (int)found->ai_addrlen) == 0 ? 0 : ERR_UNREACHABLE;
    }
    freeaddrinfo(found);
    if (rc == 0) {
        t->bev = bev;
        return 0;
    }
    if (bev)
        bufferevent_free(bev);
    free(link);
    return rc;
}

static void target_drop(struct feeder *f, uint32_t i)
{
    target_disconnect(f->targets[i]);
    free(f->targets[i]);
    f->targets[i] = f->targets[--f->n_targets];
}

static struct target *target_find(struct feeder *f, const char *endpoint)
{
    for (uint32_t i = 0; i < f->n_targets; i++) {
        if (strcmp(f->targets[i]->endpoint, endpoint) == 0)
            return f->targets[i];
    }
    const char *request = strstr(endpoint, "request=");
    if (!request || f->n_targets == TARGETS_MAX)
        return NULL;
    struct target *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    snprintf(t->endpoint, sizeof t->endpoint, "%s", endpoint);
    snprintf(t->address, sizeof t->address, "%.*s", (int)strcspn(request + 8, " "), request + 8);
    f->targets[f->n_targets++] = t;
    return t;
}

void targets_update(struct feeder *f, const char *const *endpoints, const bool *serving, const bool *draining, size_t n)
{
    for (uint32_t i = 0; i < f->n_targets; i++)
        f->targets[i]->in_view = false;
    for (size_t i = 0; i < n; i++) {
        struct target *t = *endpoints[i] ? target_find(f, endpoints[i]) : NULL;
        if (!t)
            continue;
        t->in_view = true;
        t->serving = serving[i];
        t->draining = draining[i];
    }
    for (uint32_t i = f->n_targets; i-- > 0;) {
        if (!f->targets[i]->in_view && f->targets[i]->outstanding == 0)
            target_drop(f, i);
    }
}

struct target *target_pick(struct feeder *f)
{
    struct target *best = NULL;
    uint64_t now = clock_now_ms();
    for (uint32_t i = 0; i < f->n_targets; i++) {
        struct target *t = f->targets[i];
        if (!t->in_view || !t->serving || t->draining || now < t->not_before_ms)
            continue;
        if (!best || t->outstanding < best->outstanding ||
            (t->outstanding == best->outstanding && t->last_used < best->last_used))
            best = t;
    }
    if (best && !best->bev && target_connect(f, best)) {
        target_back_off(best, LOST_BACK_OFF_MS);
        return NULL;
    }
    if (best)
        best->last_used = ++f->uses;
    return best;
}

int target_send(struct target *t, const char *line)
{
    return bufferevent_write(t->bev, line, strlen(line)) || bufferevent_write(t->bev, "\n", 1) ? ERR_NOMEM : 0;
}

void target_back_off(struct target *t, uint64_t ms)
{
    t->not_before_ms = clock_now_ms() + ms;
}

void targets_free(struct feeder *f)
{
    while (f->n_targets)
        target_drop(f, 0);
}
