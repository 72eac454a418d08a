/* The control service, keys and barriers: calls of the store, and those that wait.
 *
 * Waits end by a change, by their deadline or with their connection; one timer serves all deadlines.  Loop thread. */
#include "coordinator/server_internal.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/daemon.h"

#define WAIT_KEYS_MAX 1024
#define LIST_MAX 1000
#define LIST_BYTES_MAX (16u << 20) /* of values in one reply */

static uint64_t deadline_after(uint32_t ms)
{
    return clock_now_ns() + (uint64_t)ms * 1000000;
}

/* ---- waking those who wait ---- */

static void wait_ended(struct server *s, const struct store_wake *wake)
{
    struct call *call = call_find(s, wake->id);
    if (!call)
        return;
    struct err err;
    if (wake->code < 0) {
        err_set(&err, ERR_TIMEOUT, "key '%s' did not appear by the deadline", wake->missing);
        call_fail(call, err.code, err.text);
    } else if (call->method == CONTROL_KV_GET) {
        struct store_value value;
        Pb__KvValue reply = PB__KV_VALUE__INIT;
        if (store_get(s->store, call->key, &value, &err) < 0) { /* deleted again in the same turn */
            call_fail(call, err.code, err.text);
            return;
        }
        reply.value.data = (uint8_t *)value.data;
        reply.value.len = value.len;
        reply.revision = value.revision;
        call_reply(call, &reply.base);
    } else {
        Pb__Empty reply = PB__EMPTY__INIT;
        call_reply(call, &reply.base);
    }
}

/* After every call, and at deadlines. */
static void serve_waits(struct server *s)
{
    struct store_wake wake;
    struct barrier_wake released;
    uint64_t now = clock_now_ns();
    while (store_next_wake(s->store, now, &wake))
        wait_ended(s, &wake);
    while (barriers_next_wake(s->barriers, now, &released)) {
        struct call *call = call_find(s, released.request);
        Pb__Empty reply = PB__EMPTY__INIT;
        if (call && released.code < 0)
            call_fail(call, released.code, released.text);
        else if (call)
            call_reply(call, &reply.base);
    }
    uint64_t deadline = store_deadline(s->store), barrier = barriers_deadline(s->barriers);
    daemon_timer_set(s->store_tick, barrier < deadline ? barrier : deadline, now);
}

static void on_store_tick(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what;
    serve_waits(user);
}

int control_store_open(struct server *s, struct err *err)
{
    s->store = store_new(s->config.store_bytes);
    s->barriers = barriers_new();
    s->store_tick = event_new(s->base, -1, 0, on_store_tick, s);
    if (!s->store || !s->barriers || !s->store_tick)
        return err_set(err, ERR_NOMEM, "out of memory");
    return 0;
}

void control_store_close(struct server *s)
{
    if (s->store_tick)
        event_free(s->store_tick);
    barriers_free(s->barriers);
    if (s->store)
        store_free(s->store);
}

void control_store_cancel(struct call *call)
{
    struct server *s = call->session->server;
    if (call->kind == CALL_WAIT)
        store_wait_cancel(s->store, call->request);
    else
        barriers_cancel(s->barriers, call->request);
}

/* ---- keys ---- */

void control_kv_set(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvSetRequest *request = (const Pb__KvSetRequest *)message;
    struct server *s = session->server;
    Pb__KvSetReply reply = PB__KV_SET_REPLY__INIT;
    struct err err;
    if (store_set(s->store, request->key, request->value.data, request->value.len, &reply.revision, &err) < 0)
        frame_fail(session, frame, err.code, err.text);
    else
        frame_reply(session, frame, &reply.base);
    serve_waits(s);
}

/* Keeps a call until all keys are there.  true: it waits (or has been answered with an error). */
static bool wait_keep(struct session *session, const struct frame *frame, const char *const *keys, size_t n,
                      uint32_t wait_ms, const char *get_key)
{
    struct server *s = session->server;
    struct err err;
    struct call *call = call_new(session, frame, CALL_WAIT);
    if (!call)
        return true;
    if (get_key && !(call->key = strdup(get_key))) {
        call_fail(call, ERR_NOMEM, "the coordinator is out of memory");
        return true;
    }
    int rc = store_wait(s->store, call->request, keys, n, deadline_after(wait_ms), &err);
    if (rc < 0) {
        call_fail(call, err.code, err.text);
        return true;
    }
    if (rc == 0)
        call_free(call); /* all there: the caller answers */
    return rc == 1;
}

void control_kv_get(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvGetRequest *request = (const Pb__KvGetRequest *)message;
    struct server *s = session->server;
    struct store_value value;
    struct err err;
    int rc = store_get(s->store, request->key, &value, &err);
    if (rc == ERR_NOTFOUND && request->wait_ms) {
        const char *key = request->key;
        (void)wait_keep(session, frame, &key, 1, request->wait_ms, key);
    } else if (rc < 0) {
        frame_fail(session, frame, err.code, err.text);
    } else {
        Pb__KvValue reply = PB__KV_VALUE__INIT;
        reply.value.data = (uint8_t *)value.data;
        reply.value.len = value.len;
        reply.revision = value.revision;
        frame_reply(session, frame, &reply.base);
    }
    serve_waits(s);
}

void control_kv_check(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvCheckRequest *request = (const Pb__KvCheckRequest *)message;
    Pb__KvCheckReply reply = PB__KV_CHECK_REPLY__INIT;
    reply.present = store_check(session->server->store, (const char *const *)request->keys, request->n_keys);
    frame_reply(session, frame, &reply.base);
}

void control_kv_add(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvAddRequest *request = (const Pb__KvAddRequest *)message;
    struct server *s = session->server;
    Pb__KvAddReply reply = PB__KV_ADD_REPLY__INIT;
    struct err err;
    if (store_add(s->store, request->key, request->amount, &reply.value, &err) < 0)
        frame_fail(session, frame, err.code, err.text);
    else
        frame_reply(session, frame, &reply.base);
    serve_waits(s);
}

void control_kv_cas(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvCasRequest *request = (const Pb__KvCasRequest *)message;
    struct server *s = session->server;
    Pb__KvCasReply reply = PB__KV_CAS_REPLY__INIT;
    struct store_value value = {0};
    struct err err;
    bool swapped;
    /* A present but empty value has no bytes: any pointer but NULL will do. */
    const void *expected = !request->has_expected ? NULL : request->expected.len ? request->expected.data : (const void *)"";
    int rc = store_cas(s->store, request->key, expected, request->expected.len, request->value.data,
                       request->value.len, &swapped, &value, &err);
    if (rc < 0) {
        frame_fail(session, frame, err.code, err.text);
    } else {
        reply.swapped = swapped;
        if (value.revision) {
            reply.has_value = 1;
            reply.value.data = (uint8_t *)value.data;
            reply.value.len = value.len;
            reply.has_revision = 1;
            reply.revision = value.revision;
        }
        frame_reply(session, frame, &reply.base);
    }
    serve_waits(s);
}

void control_kv_delete(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvDeleteRequest *request = (const Pb__KvDeleteRequest *)message;
    Pb__Empty reply = PB__EMPTY__INIT;
    struct err err;
    if (store_delete(session->server->store, request->key, &err) < 0)
        frame_fail(session, frame, err.code, err.text);
    else
        frame_reply(session, frame, &reply.base);
    serve_waits(session->server);
}

struct listing {
    Pb__KvEntry entries[LIST_MAX];
    Pb__KvEntry *pointers[LIST_MAX];
    size_t n, bytes;
    bool values, full;
};

static void list_each(void *user, const char *key, const struct store_value *value)
{
    struct listing *l = user;
    if (l->full)
        return;
    if (l->values && l->n && l->bytes + value->len > LIST_BYTES_MAX) {
        l->full = true; /* the client asks for the rest with `after` */
        return;
    }
    Pb__KvEntry *e = &l->entries[l->n];
    pb__kv_entry__init(e);
    e->key = (char *)key;
    e->revision = value->revision;
    e->size = value->len;
    if (l->values) {
        e->has_value = 1;
        e->value.data = (uint8_t *)value->data;
        e->value.len = value->len;
        l->bytes += value->len;
    }
    l->pointers[l->n++] = e;
}

void control_kv_list(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvListRequest *request = (const Pb__KvListRequest *)message;
    struct listing *l = calloc(1, sizeof *l);
    if (!l) {
        frame_fail(session, frame, ERR_NOMEM, "the coordinator is out of memory");
        return;
    }
    l->values = request->values;
    size_t max = request->max && request->max < LIST_MAX ? request->max : LIST_MAX - 1;
    /* One more than wanted tells whether there are more. */
    size_t found = store_list(session->server->store, request->prefix, request->after, max + 1, list_each, l);
    Pb__KvListReply reply = PB__KV_LIST_REPLY__INIT;
    reply.n_entries = l->n < max ? l->n : max;
    reply.entries = l->pointers;
    reply.more = l->full || found > max;
    frame_reply(session, frame, &reply.base);
    free(l);
}

void control_kv_wait(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvWaitRequest *request = (const Pb__KvWaitRequest *)message;
    struct server *s = session->server;
    if (!request->n_keys || request->n_keys > WAIT_KEYS_MAX) {
        frame_fail(session, frame, ERR_INVALID, "a wait takes 1 to 1024 keys");
        return;
    }
    Pb__Empty reply = PB__EMPTY__INIT;
    if (!wait_keep(session, frame, (const char *const *)request->keys, request->n_keys, request->deadline_ms, NULL))
        frame_reply(session, frame, &reply.base);
    serve_waits(s);
}

/* ---- barriers ---- */

void control_barrier_arrive(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__BarrierRequest *request = (const Pb__BarrierRequest *)message;
    struct server *s = session->server;
    struct err err;
    struct call *call = call_new(session, frame, CALL_BARRIER);
    if (!call)
        return;
    if (barriers_arrive(s->barriers, call->request, request->name, request->size, request->member,
                        deadline_after(request->deadline_ms), &err) < 0)
        call_fail(call, err.code, err.text);
    serve_waits(s);
}
