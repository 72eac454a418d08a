/* The control service, leases and queues of the store.  Loop thread. */
#include "common/clock.h"
#include "coordinator/store_edge.h"

static void lease_reply(struct session *session, const struct frame *frame, int rc, uint64_t lease, uint32_t ttl_ms,
                        const struct err *err)
{
    Pb__LeaseReply done = PB__LEASE_REPLY__INIT;
    done.lease = lease;
    done.ttl_ms = ttl_ms;
    if (rc < 0)
        frame_fail(session, frame, err->code, err->text);
    else
        frame_reply(session, frame, &done.base);
    edge_changed(session->server->edge); /* the next deadline is another */
}

void control_lease_grant(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    uint32_t ttl_ms = ((const Pb__LeaseGrantRequest *)message)->ttl_ms;
    uint64_t lease = 0;
    struct err err;
    int rc = store_lease_grant(session->server->edge->store, ttl_ms, clock_now_ns(), &lease, &err);
    lease_reply(session, frame, rc, lease, ttl_ms, &err);
}

void control_lease_keep(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    uint64_t lease = ((const Pb__LeaseRequest *)message)->lease;
    uint32_t ttl_ms = 0;
    struct err err;
    int rc = store_lease_keep(session->server->edge->store, lease, clock_now_ns(), &ttl_ms, &err);
    lease_reply(session, frame, rc, lease, ttl_ms, &err);
}

void control_lease_end(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    Pb__Empty done = PB__EMPTY__INIT;
    struct err err;
    if (store_lease_end(session->server->edge->store, ((const Pb__LeaseRequest *)message)->lease, &err) < 0)
        frame_fail(session, frame, err.code, err.text);
    else
        frame_reply(session, frame, &done.base);
    edge_changed(session->server->edge);
}

/* ---- queues ---- */

void control_queue_push(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__QueuePushRequest *request = (const Pb__QueuePushRequest *)message;
    Pb__QueueLengthReply done = PB__QUEUE_LENGTH_REPLY__INIT;
    struct err err;
    if (store_queue_push(session->server->edge->store, request->queue, request->value.data, request->value.len,
                         request->max_length, &done.length, &err) < 0)
        frame_fail(session, frame, err.code, err.text);
    else
        frame_reply(session, frame, &done.base);
    edge_changed(session->server->edge);
}

static void value_fill(Pb__QueueValue *ret_value, void *data, size_t len, uint64_t left)
{
    pb__queue_value__init(ret_value);
    ret_value->value.data = data;
    ret_value->value.len = len;
    ret_value->left = left;
}

void control_queue_pop(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__QueuePopRequest *request = (const Pb__QueuePopRequest *)message;
    struct store_edge *edge = session->server->edge;
    struct err err;
    void *data = NULL;
    size_t len;
    uint64_t left;
    struct call *call = call_new(session, frame, CALL_WAIT);
    if (!call)
        return;
    int rc = store_queue_pop(edge->store, call->request, request->queue,
                             request->wait_ms ? edge_deadline(request->wait_ms) : 0, &data, &len, &left, &err);
    if (rc < 0) {
        call_fail(call, err.code, err.text);
    } else if (rc == 0) {
        Pb__QueueValue value;
        value_fill(&value, data, len, left);
        call_reply(call, &value.base);
        free(data);
    }
    edge_changed(edge);
}

void control_queue_woken(struct call *call, struct store_wake *wake)
{
    if (wake->code < 0) {
        struct err err;
        err_set(&err, wake->code, wake->code == ERR_TIMEOUT ? "queue '%s' got no value by the deadline"
                                                            : "no memory for the value of queue '%s'", wake->missing);
        call_fail(call, err.code, err.text);
        return;
    }
    Pb__QueueValue value;
    value_fill(&value, wake->data, wake->len, wake->left);
    call_reply(call, &value.base);
}

void control_queue_length(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    Pb__QueueLengthReply done = PB__QUEUE_LENGTH_REPLY__INIT;
    done.length = store_queue_length(session->server->edge->store, ((const Pb__QueueLengthRequest *)message)->queue);
    frame_reply(session, frame, &done.base);
}
