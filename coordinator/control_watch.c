/* The control service: watching keys.  A watch is a place in the store's history of changes, so that a client that reads
 * slowly costs no memory; when the history has gone on without it, it is told so.  Loop thread. */
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "common/daemon.h"
#include "coordinator/store_edge.h"

#define CHANGES_MAX 256             /* in one message */
#define CHANGES_BYTES_MAX (1u << 20)
#define UNSENT_MAX (1u << 20)       /* nothing is added above that; the client reads first */
#define LAG_MS 10

static void watch_end(struct call *watch, int code, const char *text)
{
    control_watch_closed(watch);
    call_fail(watch, code, text);
}

/* One message: what there is from watch->watch_next on, up to `visible`.  false: nothing (more). */
static bool watch_send(struct store_edge *edge, struct call *watch, uint64_t visible, bool even_if_empty)
{
    Pb__KvChange changes[CHANGES_MAX], *pointers[CHANGES_MAX];
    Pb__KvChanges message = PB__KV_CHANGES__INIT;
    struct store_change change;
    size_t bytes = 0, n = 0;
    uint64_t next = watch->watch_next;
    while (n < CHANGES_MAX && bytes < CHANGES_BYTES_MAX &&
           store_history_next(edge->store, watch->key, next, &change) && change.revision <= visible) {
        Pb__KvChange *c = &changes[n];
        pb__kv_change__init(c);
        c->key = (char *)change.key;
        c->revision = change.revision;
        c->deleted = !change.data;
        if (watch->watch_values && change.data) {
            c->has_value = 1;
            c->value.data = (uint8_t *)change.data;
            c->value.len = change.len;
        }
        bytes += strlen(change.key) + (c->has_value ? change.len : 0);
        next = change.revision + 1;
        pointers[n++] = c;
    }
    bool full = n == CHANGES_MAX || bytes >= CHANGES_BYTES_MAX;
    if (!full && next <= visible)
        next = visible + 1; /* what is between does not concern it */
    watch->watch_next = next;
    if (!n && !even_if_empty)
        return false;
    message.n_changes = n;
    message.changes = pointers;
    message.next = next;
    (void)rpc_conn_send(watch->session->conn, FRAME_STREAM, (uint16_t)watch->method, watch->id, &message.base);
    return full;
}

static bool watch_serve(struct store_edge *edge, struct call *watch)
{
    if (watch->watch_next < store_history_first(edge->store)) {
        struct err err;
        err_set(&err, ERR_STALE, "compacted: changes before revision %llu are no longer remembered; list '%.100s' again "
                "and watch from there", (unsigned long long)store_history_first(edge->store), watch->key);
        watch_end(watch, err.code, err.text);
        return false;
    }
    uint64_t visible = edge_visible(edge);
    bool more = true;
    while (more && rpc_conn_unsent(watch->session->conn) < UNSENT_MAX)
        more = watch_send(edge, watch, visible, false);
    return more;
}

void control_watch_serve(struct store_edge *edge)
{
    struct call *watch, *next;
    bool lag = false;
    for (watch = edge->watches; watch; watch = next) {
        next = watch->watch_list_next;
        lag = watch_serve(edge, watch) || lag;
    }
    if (lag && !event_pending(edge->lag, EV_TIMEOUT, NULL))
        daemon_timer_in(edge->lag, LAG_MS);
}

void control_watch_closed(struct call *watch)
{
    DL_DELETE2(watch->session->server->edge->watches, watch, watch_list_prev, watch_list_next);
}

void control_kv_watch(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvWatchRequest *request = (const Pb__KvWatchRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct call *watch = call_new(session, frame, CALL_WATCH_KEYS);
    if (!watch)
        return;
    watch->key = strdup(request->prefix);
    watch->watch_values = request->values;
    watch->watch_next = request->from ? request->from : edge_visible(edge) + 1;
    DL_APPEND2(edge->watches, watch, watch_list_prev, watch_list_next);
    if (!watch->key) {
        watch_end(watch, ERR_NOMEM, "the coordinator is out of memory");
        return;
    }
    if (watch->watch_next >= store_history_first(edge->store))
        (void)watch_send(edge, watch, edge_visible(edge), true);
    control_watch_serve(edge);
}
