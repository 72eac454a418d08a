/* The store between the loop, the disk and its users: batches, answers that are held, wake-ups.  Loop thread.
 *
 *   a call --> changes the store (its batch) --> its answer is held --\
 *   end of the loop turn: the batch goes to the disk's writer          >--> on disk: held answers and watchers are told
 *   the next turns go on meanwhile ------------------------------------/
 *
 * Nobody is told what the disk could still forget: an answer is held also when it only *reads* a change that is on its
 * way. */
#include "coordinator/store_edge.h"

#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "common/clock.h"
#include "common/daemon.h"
#include "coordinator/tcpstore.h"

uint64_t edge_deadline(uint32_t ms)
{
    return clock_now_ns() + (uint64_t)ms * 1000000;
}

/* ---- answers ---- */

uint64_t edge_everything(const struct store_edge *edge)
{
    if (!edge->disk)
        return 0;
    return store_batch_any(edge->store) ? store_batch_open(edge->store) : store_batch_open(edge->store) - 1;
}

uint64_t edge_visible(const struct store_edge *edge)
{
    uint64_t first = edge->disk_first, open = store_batch_first(edge->store);
    if (open < first)
        first = open;
    return first == UINT64_MAX ? store_revision(edge->store) : first - 1;
}

static void hold(struct session *session, enum frame_kind kind, uint16_t method, uint64_t call, uint64_t batch,
                 const ProtobufCMessage *message)
{
    struct store_edge *edge = session->server->edge;
    size_t len = protobuf_c_message_get_packed_size(message);
    struct held *held = len + edge->held_bytes <= EDGE_HELD_MAX || len < 4096 ? malloc(sizeof *held + len) : NULL;
    if (!held) {
        (void)rpc_conn_send_error(session->conn, method, call, ERR_LIMIT,
                                  "the disk is slower than the answers that wait for it; ask again");
        return;
    }
    *held = (struct held){.batch = batch, .session = session->id, .call = call, .kind = kind, .method = method,
                          .len = len, .since_ns = clock_now_ns()};
    protobuf_c_message_pack(message, held->payload);
    edge->held_bytes += len;
    DL_APPEND(edge->held, held);
}

static bool must_wait(const struct store_edge *edge, uint64_t batch)
{
    return edge->disk && batch > edge->disk_done;
}

void edge_reply(struct session *session, uint16_t method, uint64_t call, uint64_t batch, const ProtobufCMessage *reply)
{
    if (must_wait(session->server->edge, batch))
        hold(session, FRAME_REPLY, method, call, batch, reply);
    else
        (void)rpc_conn_send(session->conn, FRAME_REPLY, method, call, reply);
}

void edge_fail(struct session *session, uint16_t method, uint64_t call, uint64_t batch, const struct err *err)
{
    if (!must_wait(session->server->edge, batch)) {
        (void)rpc_conn_send_error(session->conn, method, call, err->code, err->text);
        return;
    }
    Pb__Error error = PB__ERROR__INIT;
    error.code = err->code;
    error.text = (char *)err->text;
    hold(session, FRAME_ERROR, method, call, batch, &error.base);
}

void edge_call_reply(struct call *call, uint64_t batch, const ProtobufCMessage *reply)
{
    edge_reply(call->session, (uint16_t)call->method, call->id, batch, reply);
    call_free(call);
}

static void held_tell(struct store_edge *edge)
{
    struct held *held, *next;
    DL_FOREACH_SAFE(edge->held, held, next) {
        if (held->batch > edge->disk_done)
            continue;
        struct session *session = server_session(edge->server, held->session);
        if (session)
            (void)rpc_conn_send_bytes(session->conn, held->kind, held->method, held->call, held->payload, held->len);
        metrics_observe(&edge->server->metrics.disk_wait, (double)(clock_now_ns() - held->since_ns) / 1e9);
        DL_DELETE(edge->held, held);
        edge->held_bytes -= held->len;
        free(held);
    }
}

int edge_may_write(const struct store_edge *edge, struct err *err)
{
    size_t waiting = edge->disk ? store_disk_waiting_bytes(edge->disk) : 0;
    return waiting <= EDGE_DISK_WAITING_MAX
               ? 0
               : err_set(err, ERR_LIMIT, "the disk is slower than the writes: %zu bytes wait for it; try again", waiting);
}

/* ---- waking those who wait ---- */

static uint64_t next_deadline(const struct store_edge *edge)
{
    uint64_t store = store_deadline(edge->store), barrier = barriers_deadline(edge->barriers);
    return store < barrier ? store : barrier;
}

static void serve_waits(struct store_edge *edge)
{
    if (next_deadline(edge) == edge->tick_ns)
        return; /* nothing has ended: the usual case, and without looking at the clock */
    struct store_wake wake;
    struct barrier_wake released;
    struct call *call;
    uint64_t now = clock_now_ns();
    while (store_next_wake(edge->store, now, &wake)) {
        if (wake.id & EDGE_TCPSTORE)
            tcpstore_woken(edge->tcpstore, wake.id & ~EDGE_TCPSTORE, wake.code);
        else if ((call = call_find(edge->server, wake.id)) && call->method == CONTROL_QUEUE_POP)
            control_queue_woken(call, &wake);
        else if (call)
            control_kv_woken(call, &wake);
        free(wake.data);
    }
    while (barriers_next_wake(edge->barriers, now, &released))
        if ((call = call_find(edge->server, released.request)))
            control_barrier_woken(call, &released);
    edge->tick_ns = next_deadline(edge);
    daemon_timer_set(edge->tick, edge->tick_ns, now);
}

static void turn_arm(struct store_edge *edge)
{
    if (edge->turn_set)
        return;
    edge->turn_set = true;
    event_active(edge->turn, EV_TIMEOUT, 0);
}

void edge_changed(struct store_edge *edge)
{
    serve_waits(edge);
    if (edge->disk ? store_batch_any(edge->store) || edge->watches : edge->watches != NULL)
        turn_arm(edge);
}

/* ---- events ---- */

static void on_tick(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    ((struct store_edge *)user)->tick_ns = 0; /* it is due, whatever it was armed for */
    edge_changed(user);
}

/* Once per loop turn, after the calls that came in it. */
static void on_turn(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct store_edge *edge = user;
    edge->turn_set = false;
    if (store_batch_any(edge->store)) {
        struct store_batch batch;
        struct err err;
        store_batch_take(edge->store, &batch);
        if (batch.first_revision < edge->disk_first)
            edge->disk_first = batch.first_revision;
        if (store_disk_submit(edge->disk, &batch, &err) < 0)
            server_fatal(edge->server, &err);
    }
    control_watch_serve(edge);
}

static void on_disk(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    struct store_edge *edge = user;
    struct err err;
    if (store_disk_done(edge->disk, &edge->disk_done, &edge->disk_first, &err) < 0)
        server_fatal(edge->server, &err);
    held_tell(edge);
    control_watch_serve(edge);
}

/* A watcher that reads slowly is looked after again. */
static void on_lag(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    control_watch_serve(user);
}

/* ---- opening, closing ---- */

int store_edge_open(struct server *s, struct err *err)
{
    const struct store_config config = {.budget_bytes = s->config.store_bytes,
                                        .batches = s->config.durability != STORE_NONE};
    struct store_edge *edge = calloc(1, sizeof *edge);
    if (!edge)
        return err_set(err, ERR_NOMEM, "out of memory");
    s->edge = edge;
    edge->server = s;
    edge->disk_first = edge->tick_ns = UINT64_MAX;
    edge->store = store_new(&config);
    edge->barriers = barriers_new();
    edge->tick = event_new(s->base, -1, 0, on_tick, edge);
    edge->turn = event_new(s->base, -1, 0, on_turn, edge);
    edge->lag = event_new(s->base, -1, 0, on_lag, edge);
    if (!edge->store || !edge->barriers || !edge->tick || !edge->turn || !edge->lag)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = store_disk_open(s->config.state, s->config.durability, edge->store, &edge->disk, err);
    if (rc < 0)
        return rc;
    if (edge->disk) {
        edge->disk_event = event_new(s->base, store_disk_fd(edge->disk), EV_READ | EV_PERSIST, on_disk, edge);
        if (!edge->disk_event || event_add(edge->disk_event, NULL) != 0)
            return err_set(err, ERR_NOMEM, "out of memory");
    }
    return tcpstore_open(edge, s->config.tcpstore, s->config.n_tcpstore, s->config.tcpstore_grace_ms, &edge->tcpstore,
                         err);
}

void store_edge_close(struct server *s)
{
    struct store_edge *edge = s->edge;
    if (!edge)
        return;
    tcpstore_close(edge->tcpstore);
    struct held *held, *next;
    DL_FOREACH_SAFE(edge->held, held, next)
        free(held);
    struct event *events[] = {edge->tick, edge->turn, edge->disk_event, edge->lag};
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i])
            event_free(events[i]);
    if (edge->disk && edge->store && store_batch_any(edge->store)) {
        struct store_batch batch; /* changes of this turn; nobody was told of them, but they were asked for */
        store_batch_take(edge->store, &batch);
        (void)!store_disk_submit(edge->disk, &batch, NULL);
    }
    store_disk_close(edge->disk);
    barriers_free(edge->barriers);
    store_free(edge->store);
    free(edge);
    s->edge = NULL;
}

void store_edge_cancel(struct call *call)
{
    struct store_edge *edge = call->session->server->edge;
    if (call->kind == CALL_WAIT)
        store_wait_cancel(edge->store, call->request);
    else if (call->kind == CALL_WATCH_KEYS)
        control_watch_closed(call);
    else
        barriers_cancel(edge->barriers, call->request);
    edge_changed(edge); /* a value may have gone back to its queue, for another who waits */
}
