/* The view, watched on the coordinator's control socket; connected again when it is lost.  Requests go on meanwhile:
 * the last view that was seen stays good until a newer one comes.  Loop thread. */
#include <stdio.h>
#include <string.h>

#include "common/control_methods.h"
#include "common/version.h"
#include "control.pb-c.h"
#include "common/clock.h"
#include "tests/feeder/feeder.h"

#define RECONNECT_MS 200
#define WATCH_CALL   1

static void on_ready(void *user, struct rpc_conn *conn)
{
    struct feeder *f = user;
    Pb__Empty empty = PB__EMPTY__INIT;
    f->watching = rpc_conn_send(conn, FRAME_CALL, CONTROL_WATCH_VIEW, WATCH_CALL, &empty.base) == 0;
}

static void view_take(struct feeder *f, const Pb__ViewStatus *view)
{
    const char *endpoints[RANKS_MAX];
    bool serving[RANKS_MAX], draining[RANKS_MAX];
    size_t n = view->n_members < RANKS_MAX ? view->n_members : RANKS_MAX;
    f->ranks = 0;
    for (size_t i = 0; i < n; i++) {
        endpoints[i] = view->members[i]->endpoint;
        serving[i] = view->members[i]->serving;
        draining[i] = view->members[i]->draining;
        f->ranks += serving[i];
    }
    f->figures.views += view->epoch != f->epoch;
    f->epoch = view->epoch;
    targets_update(f, endpoints, serving, draining, n);
    jobs_pump(f);
}

static void watch_drop(struct feeder *f)
{
    if (f->conn)
        rpc_conn_close(f->conn);
    f->conn = NULL;
    f->watching = false;
    f->reconnect_ms = clock_now_ms() + RECONNECT_MS;
}

static void on_frame(void *user, struct rpc_conn *conn, const struct frame *frame)
{
    struct feeder *f = user;
    (void)conn;
    ProtobufCMessage *m;
    if (frame->header.call != WATCH_CALL || frame->header.kind != FRAME_STREAM ||
        rpc_unpack(&pb__view_status__descriptor, frame->payload, frame->header.length, 0, &m, NULL)) {
        f->figures.watch_losses++;
        watch_drop(f);
        return;
    }
    view_take(f, (const Pb__ViewStatus *)(const void *)m);
    rpc_unpack_free(m);
}

static void on_close(void *user, struct rpc_conn *conn, int code, const char *reason)
{
    struct feeder *f = user;
    (void)conn;
    if (f->watching || code == ERR_DENIED || code == ERR_PROTOCOL || code == ERR_CONFLICT) {
        f->figures.watch_losses++;
        fprintf(stderr, "eep-feeder: the watch was lost: %s\n", reason);
    }
    f->conn = NULL;
    f->watching = false;
    f->reconnect_ms = clock_now_ms() + RECONNECT_MS;
}

static int watch_connect(struct feeder *f, struct err *err)
{
    static const struct rpc_handlers handlers = {.on_ready = on_ready, .on_frame = on_frame, .on_close = on_close};
    struct rpc_identity self = {.role = RPC_ROLE_READER, .software = EEP_SOFTWARE};
    snprintf(self.cluster, sizeof self.cluster, "%s", f->options.cluster);
    snprintf(self.agent, sizeof self.agent, "eep-feeder");
    struct rpc_options o = {.handlers = &handlers, .user = f, .self = &self};
    return rpc_connect(f->rpc, f->options.coordinator, &o, &f->conn, err);
}

int watch_open(struct feeder *f, struct err *err)
{
    f->rpc = rpc_new(f->base);
    return f->rpc ? watch_connect(f, err) : err_set(err, ERR_NOMEM, "out of memory");
}

void watch_tick(struct feeder *f)
{
    struct err err;
    if (!f->conn && clock_now_ms() >= f->reconnect_ms && watch_connect(f, &err)) {
        f->reconnect_ms = clock_now_ms() + RECONNECT_MS;
        fprintf(stderr, "eep-feeder: %s\n", err.text);
    }
}
