/* The control service, keys: sets, reads, counters, lists, waits.  Loop thread. */
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "coordinator/store_edge.h"

#define LIST_MAX 1000
#define REPLY_BYTES_MAX (16u << 20) /* of values in one reply */

static void reply(struct session *session, const struct frame *frame, uint64_t batch, const ProtobufCMessage *message)
{
    edge_reply(session, frame->header.method, frame->header.call, batch, message);
}

static void fail(struct session *session, const struct frame *frame, uint64_t batch, const struct err *err)
{
    edge_fail(session, frame->header.method, frame->header.call, batch, err);
}

/* Keys of TCPStore's namespaces are ephemeral, whoever sets them: that port waits for no disk. */
static bool is_ephemeral(const char *key, bool asked)
{
    return asked || strncmp(key, EDGE_TCPSTORE_PREFIX, sizeof EDGE_TCPSTORE_PREFIX - 1) == 0;
}

static struct store_put put_of(const char *key, const ProtobufCBinaryData *value, bool ephemeral, uint64_t lease)
{
    return (struct store_put){.key = key, .data = value->data, .len = value->len,
                              .ephemeral = is_ephemeral(key, ephemeral), .lease = lease};
}

static void value_to_pb(const struct store_value *value, Pb__KvValue *ret_pb)
{
    pb__kv_value__init(ret_pb);
    ret_pb->value.data = (uint8_t *)value->data;
    ret_pb->value.len = value->len;
    ret_pb->revision = value->revision;
    ret_pb->has_ephemeral = ret_pb->ephemeral = !value->durable;
    ret_pb->has_lease = value->lease != 0;
    ret_pb->lease = value->lease;
}

/* ---- changing ---- */

void control_kv_set(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvSetRequest *request = (const Pb__KvSetRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct store_put put = put_of(request->key, &request->value, request->ephemeral, request->lease);
    Pb__KvSetReply done = PB__KV_SET_REPLY__INIT;
    struct err err;
    int rc = put.ephemeral ? 0 : edge_may_write(edge, &err);
    if (rc == 0)
        rc = store_set(edge->store, &put, &done.revision, &err);
    if (rc < 0)
        fail(session, frame, 0, &err);
    else
        reply(session, frame, store_changed_batch(edge->store), &done.base);
    edge_changed(edge);
}

void control_kv_multi_set(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvMultiSetRequest *request = (const Pb__KvMultiSetRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct store_put puts[STORE_KEYS_MAX];
    Pb__KvSetReply done = PB__KV_SET_REPLY__INIT;
    struct err err;
    int rc = request->n_sets && request->n_sets <= STORE_KEYS_MAX
                 ? edge_may_write(edge, &err)
                 : err_set(&err, ERR_INVALID, "a multi set takes 1 to %d keys, not %zu", STORE_KEYS_MAX,
                           request->n_sets);
    for (size_t i = 0; rc == 0 && i < request->n_sets; i++) {
        const Pb__KvSetRequest *set = request->sets[i];
        puts[i] = put_of(set->key, &set->value, set->ephemeral, set->lease);
    }
    if (rc == 0)
        rc = store_set_all(edge->store, puts, request->n_sets, &done.revision, &err);
    if (rc < 0)
        fail(session, frame, 0, &err);
    else
        reply(session, frame, edge_everything(edge), &done.base);
    edge_changed(edge);
}

void control_kv_add(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvAddRequest *request = (const Pb__KvAddRequest *)message;
    struct store_edge *edge = session->server->edge;
    Pb__KvAddReply done = PB__KV_ADD_REPLY__INIT;
    struct store_value value = {0};
    struct err err;
    uint64_t batch = 0;
    bool ephemeral = is_ephemeral(request->key, request->ephemeral);
    if (store_get(edge->store, request->key, &value, &batch, NULL) == 0) /* batch: what an error would tell of */
        ephemeral = !value.durable;
    int rc = ephemeral ? 0 : edge_may_write(edge, &err);
    if (rc == 0)
        rc = store_add(edge->store, request->key, request->amount, ephemeral, request->request ? request->request : "",
                       &done.value, &done.revision, &err);
    if (rc < 0) {
        fail(session, frame, batch, &err);
    } else {
        done.has_revision = 1;
        if (!ephemeral || request->request) /* the first answer to this id may still be on its way to the disk */
            batch = edge_everything(edge);
        reply(session, frame, batch, &done.base);
    }
    edge_changed(edge);
}

void control_kv_cas(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvCasRequest *request = (const Pb__KvCasRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct store_put put = put_of(request->key, &request->value, request->ephemeral, request->lease);
    Pb__KvCasReply done = PB__KV_CAS_REPLY__INIT;
    struct store_value value = {0};
    struct err err;
    bool swapped;
    /* A present but empty value has no bytes: any pointer but NULL will do. */
    const void *expected = !request->has_expected ? NULL : request->expected.len ? request->expected.data : (const void *)"";
    int rc = put.ephemeral ? 0 : edge_may_write(edge, &err);
    if (rc == 0)
        rc = store_cas(edge->store, &put, expected, request->expected.len, &swapped, &value, &err);
    if (rc < 0) {
        fail(session, frame, 0, &err);
    } else {
        done.swapped = swapped;
        if (value.data) {
            done.has_value = 1;
            done.value.data = (uint8_t *)value.data;
            done.value.len = value.len;
            done.has_revision = 1;
            done.revision = value.revision;
        }
        reply(session, frame, value.batch, &done.base);
    }
    edge_changed(edge);
}

void control_kv_delete(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvDeleteRequest *request = (const Pb__KvDeleteRequest *)message;
    struct store_edge *edge = session->server->edge;
    Pb__Empty done = PB__EMPTY__INIT;
    struct store_value value;
    struct err err;
    uint64_t batch = 0;
    int rc = store_get(edge->store, request->key, &value, &batch, &err);
    if (rc == 0 && value.durable)
        rc = edge_may_write(edge, &err);
    if (rc == 0)
        rc = store_delete(edge->store, request->key, &err);
    if (rc < 0) {
        fail(session, frame, batch, &err);
    } else {
        uint64_t gone;
        (void)!store_get(edge->store, request->key, &value, &gone, NULL);
        reply(session, frame, gone > batch ? gone : batch, &done.base);
    }
    edge_changed(edge);
}

/* ---- reading ---- */

/* Keeps a call until all keys are there.  true: it waits (or has been answered with an error). */
static bool wait_keep(struct session *session, const struct frame *frame, const char *const *keys, size_t n,
                      uint32_t wait_ms, const char *get_key)
{
    struct store_edge *edge = session->server->edge;
    struct err err;
    struct call *call = call_new(session, frame, CALL_WAIT);
    if (!call)
        return true;
    if (get_key && !(call->key = strdup(get_key))) {
        call_fail(call, ERR_NOMEM, "the coordinator is out of memory");
        return true;
    }
    int rc = store_wait(edge->store, call->request, keys, n, edge_deadline(wait_ms), &err);
    if (rc < 0) {
        call_fail(call, err.code, err.text);
        return true;
    }
    if (rc == 0)
        call_free(call); /* all there: the caller answers */
    return rc == 1;
}

void control_kv_woken(struct call *call, const struct store_wake *wake)
{
    struct store_edge *edge = call->session->server->edge;
    struct err err;
    struct store_value value;
    uint64_t batch = edge_everything(edge);
    if (wake->code == ERR_TIMEOUT) {
        err_set(&err, ERR_TIMEOUT, "key '%s' did not appear by the deadline", wake->missing);
    } else if (wake->code < 0) {
        err_set(&err, wake->code, "the coordinator is out of memory");
    } else if (call->method == CONTROL_KV_GET) {
        if (store_get(edge->store, call->key, &value, &batch, &err) == 0) {
            Pb__KvValue found;
            value_to_pb(&value, &found);
            edge_call_reply(call, batch, &found.base);
            return;
        } /* else deleted again in the same turn, or it is a queue */
    } else {
        Pb__Empty done = PB__EMPTY__INIT;
        edge_call_reply(call, batch, &done.base);
        return;
    }
    edge_fail(call->session, (uint16_t)call->method, call->id, batch, &err);
    call_free(call);
}

void control_kv_get(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvGetRequest *request = (const Pb__KvGetRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct store_value value;
    struct err err;
    uint64_t batch;
    int rc = store_get(edge->store, request->key, &value, &batch, &err);
    if (rc == ERR_NOTFOUND && request->wait_ms) {
        const char *key = request->key;
        if (!wait_keep(session, frame, &key, 1, request->wait_ms, key))
            fail(session, frame, batch, &err); /* a queue of this name is there, a key is not */
        edge_changed(edge); /* a deadline has come */
    } else if (rc < 0) {
        fail(session, frame, batch, &err);
    } else {
        Pb__KvValue found;
        value_to_pb(&value, &found);
        reply(session, frame, batch, &found.base);
    }
}

void control_kv_multi_get(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvMultiGetRequest *request = (const Pb__KvMultiGetRequest *)message;
    struct store_edge *edge = session->server->edge;
    Pb__KvMultiGetReply found = PB__KV_MULTI_GET_REPLY__INIT;
    Pb__KvMaybe *values = NULL, *pointers[STORE_KEYS_MAX];
    struct err err;
    size_t bytes = 0;
    int rc = request->n_keys <= STORE_KEYS_MAX
                 ? 0
                 : err_set(&err, ERR_INVALID, "a multi get takes at most %d keys, not %zu", STORE_KEYS_MAX,
                           request->n_keys);
    if (rc == 0 && !(values = calloc(request->n_keys + 1, sizeof *values)))
        rc = err_set(&err, ERR_NOMEM, "the coordinator is out of memory");
    for (size_t i = 0; rc == 0 && i < request->n_keys; i++) {
        struct store_value value;
        pb__kv_maybe__init(&values[i]);
        pointers[i] = &values[i];
        if (store_get(edge->store, request->keys[i], &value, NULL, NULL) < 0)
            continue;
        values[i].has_value = values[i].has_revision = 1;
        values[i].value.data = (uint8_t *)value.data;
        values[i].value.len = value.len;
        values[i].revision = value.revision;
        bytes += value.len;
        if (bytes > REPLY_BYTES_MAX)
            rc = err_set(&err, ERR_LIMIT, "these keys have more than %u bytes of values: get fewer at once",
                         REPLY_BYTES_MAX);
    }
    if (rc < 0) {
        fail(session, frame, 0, &err);
    } else {
        found.n_values = request->n_keys;
        found.values = pointers;
        found.revision = store_revision(edge->store);
        reply(session, frame, edge_everything(edge), &found.base);
    }
    free(values);
}

void control_kv_check(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvCheckRequest *request = (const Pb__KvCheckRequest *)message;
    struct store_edge *edge = session->server->edge;
    Pb__KvCheckReply found = PB__KV_CHECK_REPLY__INIT;
    found.present = store_check(edge->store, (const char *const *)request->keys, request->n_keys);
    reply(session, frame, edge_everything(edge), &found.base);
}

void control_kv_count(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    struct store_edge *edge = session->server->edge;
    Pb__KvCountReply found = PB__KV_COUNT_REPLY__INIT;
    found.count = store_count(edge->store, ((const Pb__KvCountRequest *)message)->prefix);
    found.revision = store_revision(edge->store);
    reply(session, frame, edge_everything(edge), &found.base);
}

struct listing {
    Pb__KvEntry entries[LIST_MAX];
    Pb__KvEntry *pointers[LIST_MAX];
    size_t n, max, bytes;
    bool values, more;
};

static bool list_each(void *user, const char *key, const struct store_value *value)
{
    struct listing *l = user;
    size_t bytes = strlen(key) + (l->values ? value->len : 0);
    if (l->n == l->max || (l->n && l->bytes + bytes > REPLY_BYTES_MAX)) {
        l->more = true; /* the client asks for the rest with `after` */
        return false;
    }
    Pb__KvEntry *e = &l->entries[l->n];
    pb__kv_entry__init(e);
    e->key = (char *)key;
    e->revision = value->revision;
    e->size = value->len;
    e->has_ephemeral = e->ephemeral = !value->durable;
    e->has_lease = value->lease != 0;
    e->lease = value->lease;
    if (l->values) {
        e->has_value = 1;
        e->value.data = (uint8_t *)value->data;
        e->value.len = value->len;
    }
    l->bytes += bytes;
    l->pointers[l->n++] = e;
    return true;
}

void control_kv_list(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvListRequest *request = (const Pb__KvListRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct listing *l = malloc(sizeof *l);
    if (!l) {
        frame_fail(session, frame, ERR_NOMEM, "the coordinator is out of memory");
        return;
    }
    l->n = l->bytes = 0;
    l->more = false;
    l->values = request->values;
    l->max = request->max && request->max < LIST_MAX ? request->max : LIST_MAX;
    store_list(edge->store, request->prefix, request->after, l->max + 1, list_each, l);
    Pb__KvListReply found = PB__KV_LIST_REPLY__INIT;
    found.n_entries = l->n;
    found.entries = l->pointers;
    found.more = l->more;
    found.has_revision = 1;
    found.revision = store_revision(edge->store);
    reply(session, frame, edge_everything(edge), &found.base);
    free(l);
}

void control_kv_wait(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__KvWaitRequest *request = (const Pb__KvWaitRequest *)message;
    struct store_edge *edge = session->server->edge;
    if (!request->n_keys || request->n_keys > STORE_KEYS_MAX) {
        frame_fail(session, frame, ERR_INVALID, "a wait takes 1 to 1024 keys");
        return;
    }
    Pb__Empty done = PB__EMPTY__INIT;
    if (!wait_keep(session, frame, (const char *const *)request->keys, request->n_keys, request->deadline_ms, NULL))
        reply(session, frame, edge_everything(edge), &done.base);
    edge_changed(edge);
}

void control_kv_stat(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    (void)message;
    struct server *s = session->server;
    static const char *const durability[] = {"fsync", "os", "none"};
    Pb__KvStatReply stat = PB__KV_STAT_REPLY__INIT;
    stat.keys = store_count(s->edge->store, "");
    stat.used_bytes = store_used(s->edge->store);
    stat.budget_bytes = store_budget(s->edge->store);
    stat.revision = store_revision(s->edge->store);
    stat.first_revision = store_history_first(s->edge->store);
    stat.durability = (char *)durability[s->config.durability];
    stat.disk_waiting_bytes = s->edge->disk ? store_disk_waiting_bytes(s->edge->disk) : 0;
    stat.connections = HASH_COUNT(s->sessions);
    frame_reply(session, frame, &stat.base);
}
