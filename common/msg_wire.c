/* Messages between coordinator and agent: from and to the payload of a frame.  Pure, any thread. */
#include "common/msg_wire.h"

#include <stdlib.h>
#include <string.h>

#include "common/msg_wire_parts.h"
#include "common/rpc.h"
#include "common/topology_wire.h"

/* The numbers on the wire are those of common/msg.h. */
#define SAME(wire, here) _Static_assert((int)(wire) == (int)(here), #wire)
SAME(PB__OP_KIND__START, OP_START);
SAME(PB__OP_KIND__SCALE_UP, OP_SCALE_UP);
SAME(PB__OP_KIND__SCALE_DOWN, OP_SCALE_DOWN);
SAME(PB__OP_KIND__REPAIR, OP_REPAIR);
SAME(PB__OP_KIND__REBALANCE, OP_REBALANCE);
SAME(PB__OP_ROLE__EXISTING, ROLE_EXISTING);
SAME(PB__OP_ROLE__NEW, ROLE_NEW);
SAME(PB__OP_ROLE__REMAINING, ROLE_REMAINING);
SAME(PB__OP_ROLE__REMOVING, ROLE_REMOVING);
SAME(PB__STAGE__ALLOCATE, STAGE_ALLOCATE);
SAME(PB__STAGE__GROUP_ID, STAGE_GROUP_ID);
SAME(PB__STAGE__GROUP, STAGE_GROUP);
SAME(PB__STAGE__MAPPING, STAGE_MAPPING);
SAME(PB__STAGE__WEIGHTS, STAGE_WEIGHTS);
SAME(PB__STAGE__KV, STAGE_KV);
SAME(PB__STAGE__ENGINE_PREPARE, STAGE_ENGINE_PREPARE);
SAME(PB__STAGE__DRAIN, STAGE_DRAIN);
SAME(PB__STAGE__GRACE, STAGE_GRACE);
SAME(PB__STAGE__FILL, STAGE_FILL);
SAME(PB__STAGE__LET_GO, STAGE_LET_GO);
SAME(PB__STAGE__RELOAD, STAGE_RELOAD);
SAME(PB__STAGE__RELOAD + 1, STAGE_MAX);
SAME(PB__NOTIFY_WHAT__NEW_CORE_ENGINES_INIT_READY, NOTIFY_NEW_CORE_ENGINES_INIT_READY);
SAME(PB__NOTIFY_WHAT__NEW_CORE_ENGINES_WEIGHTS_INIT_READY, NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY);
SAME(PB__NOTIFY_WHAT__RECONFIGURE_FINISHED, NOTIFY_RECONFIGURE_FINISHED);
SAME(PB__NOTIFY_WHAT__SHUTDOWN_COMPLETE, NOTIFY_SHUTDOWN_COMPLETE);
SAME(PB__DISPATCH__DISPATCH_NONE, DISPATCH_NONE);
SAME(PB__DISPATCH__DISPATCH_SOURCE_ROUTED, DISPATCH_SOURCE_ROUTED);
SAME(PB__DISPATCH__DISPATCH_REPLICATED, DISPATCH_REPLICATED);
SAME(PB__FLIP_KIND__FLIP_VIEW, FLIP_VIEW);
SAME(PB__FLIP_KIND__FLIP_MAP, FLIP_MAP);
SAME(PB__FLIP_KIND__FLIP_RESET, FLIP_RESET);
SAME(PB__ENGINE_AT_PROMISE__JOINER, PROMISE_JOINER);
SAME(PB__ENGINE_AT_PROMISE__DETACHED, PROMISE_DETACHED);
SAME(PB__ENGINE_AT_PROMISE__ENGINE_IDLE, PROMISE_IDLE);
SAME(PB__ENGINE_AT_PROMISE__ENGINE_RUNNING, PROMISE_RUNNING);

char *msg_text(const char *text, bool *ok)
{
    char *copy = strdup(text);
    if (!copy)
        *ok = false;
    return copy;
}

bool msg_blob_to_bytes(const struct blob *blob, protobuf_c_boolean *ret_has, ProtobufCBinaryData *ret_bytes)
{
    if (!blob)
        return true;
    ret_bytes->data = malloc(blob->len ? blob->len : 1);
    if (!ret_bytes->data)
        return false;
    memcpy(ret_bytes->data, blob->data, blob->len);
    ret_bytes->len = blob->len;
    *ret_has = true;
    return true;
}

int msg_blob_from_bytes(const ProtobufCBinaryData *bytes, struct blob **ret_blob, struct err *err)
{
    if (bytes->len > MSG_BLOB_MAX)
        return err_set(err, ERR_PROTOCOL, "a blob of %zu bytes, over the limit of %d", bytes->len, MSG_BLOB_MAX);
    struct blob *blob = blob_new(bytes->data, bytes->len);
    if (!blob)
        return err_set(err, ERR_NOMEM, "no memory for a blob of %zu bytes", bytes->len);
    *ret_blob = blob;
    return 0;
}

int msg_pack(const struct msg *msg, uint8_t **ret_data, size_t *ret_len, struct err *err)
{
    ProtobufCMessage *pb = msg->type < MSG_WELCOME ? (ProtobufCMessage *)msg_to_up(msg)
                                                   : (ProtobufCMessage *)msg_to_down(msg);
    if (!pb)
        return err_set(err, ERR_NOMEM, "no memory to send %s", msg_type_name(msg->type));
    size_t len = protobuf_c_message_get_packed_size(pb);
    uint8_t *data = malloc(len ? len : 1);
    if (!data) {
        pb_free(pb);
        return err_set(err, ERR_NOMEM, "no memory to send %s of %zu bytes", msg_type_name(msg->type), len);
    }
    protobuf_c_message_pack(pb, data);
    pb_free(pb);
    *ret_data = data;
    *ret_len = len;
    return 0;
}

int msg_unpack_up(const uint8_t *data, size_t len, size_t budget, struct msg *ret_msg, struct err *err)
{
    ProtobufCMessage *pb;
    int rc = rpc_unpack(&pb__agent_up__descriptor, data, len, budget, &pb, err);
    if (rc < 0)
        return rc;
    struct msg msg = {0};
    rc = msg_from_up((const Pb__AgentUp *)pb, &msg, err);
    rpc_unpack_free(pb);
    if (rc < 0) {
        err_wrap(err, "message %s of an agent", msg_type_name(msg.type));
        msg_done(&msg);
        return rc;
    }
    *ret_msg = msg;
    return 0;
}

int msg_unpack_down(const uint8_t *data, size_t len, size_t budget, struct msg *ret_msg, struct err *err)
{
    ProtobufCMessage *pb;
    int rc = rpc_unpack(&pb__agent_down__descriptor, data, len, budget, &pb, err);
    if (rc < 0)
        return rc;
    struct msg msg = {0};
    rc = msg_from_down((const Pb__AgentDown *)pb, &msg, err);
    rpc_unpack_free(pb);
    if (rc < 0) {
        err_wrap(err, "message %s of the coordinator", msg_type_name(msg.type));
        msg_done(&msg);
        return rc;
    }
    *ret_msg = msg;
    return 0;
}
