/* Unpacking messages of peers: with a budget of memory, and without values that this version does not know.
 * Pure, any thread. */
#include <stdlib.h>
#include <string.h>

#include "common.pb-c.h"
#include "common/rpc.h"

struct budget {
    size_t left;
    bool exceeded;
    struct rpc_scratch *scratch; /* NULL = malloc only */
};

/* Counts what is asked for, not what is in use: unpacking frees little on its way. */
static void *budget_alloc(void *user, size_t size)
{
    struct budget *budget = user;
    if (size > budget->left) {
        budget->exceeded = true;
        return NULL;
    }
    budget->left -= size;
    struct rpc_scratch *scratch = budget->scratch;
    if (!scratch)
        return malloc(size);
    size_t aligned = (size + 15) & ~(size_t)15;
    if (aligned > sizeof scratch->bytes - scratch->used) {
        scratch->spilled = true;
        return malloc(size);
    }
    void *data = scratch->bytes + scratch->used;
    scratch->used += aligned;
    return data;
}

static void budget_free(void *user, void *data)
{
    const struct rpc_scratch *scratch = ((struct budget *)user)->scratch;
    const uint8_t *at = data;
    if (!scratch || at < scratch->bytes || at >= scratch->bytes + sizeof scratch->bytes)
        free(data);
}

static ProtobufCAllocator allocator_of(struct budget *budget)
{
    return (ProtobufCAllocator){.alloc = budget_alloc, .free = budget_free, .allocator_data = budget};
}

size_t rpc_budget(size_t len)
{
    size_t wide = (64u << 10) + 32 * len, narrow = (64u << 20) + 4 * len;
    return wide < narrow ? wide : narrow;
}

/* proto2 enums arrive as any number.  Depth is bounded: no message contains itself. */
static const char *unknown_enum(const ProtobufCMessage *msg)
{
    for (unsigned i = 0; i < msg->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &msg->descriptor->fields[i];
        const char *base = (const char *)msg + field->offset;
        const char *quantifier = (const char *)msg + field->quantifier_offset;
        if (field->type != PROTOBUF_C_TYPE_ENUM && field->type != PROTOBUF_C_TYPE_MESSAGE)
            continue;
        size_t n = 1, stride = field->type == PROTOBUF_C_TYPE_ENUM ? sizeof(int) : sizeof(void *);
        if (field->label == PROTOBUF_C_LABEL_REPEATED) {
            n = *(const size_t *)(const void *)quantifier;
            base = *(const char *const *)(const void *)base;
        } else if (field->flags & PROTOBUF_C_FIELD_FLAG_ONEOF) {
            n = *(const uint32_t *)(const void *)quantifier == field->id;
        } else if (field->label == PROTOBUF_C_LABEL_OPTIONAL && field->type == PROTOBUF_C_TYPE_ENUM) {
            n = *(const protobuf_c_boolean *)quantifier != 0;
        }
        for (size_t k = 0; k < n; k++, base += stride) {
            if (field->type == PROTOBUF_C_TYPE_ENUM) {
                if (!protobuf_c_enum_descriptor_get_value(field->descriptor, *(const int *)(const void *)base))
                    return field->name;
                continue;
            }
            const ProtobufCMessage *child = *(const ProtobufCMessage *const *)(const void *)base;
            const char *name = child ? unknown_enum(child) : NULL;
            if (name)
                return name;
        }
    }
    return NULL;
}

static int unpack(struct budget *budget, const ProtobufCMessageDescriptor *type, const uint8_t *data, size_t len,
                  ProtobufCMessage **ret_msg, struct err *err)
{
    ProtobufCAllocator allocator = allocator_of(budget);
    ProtobufCMessage *msg = protobuf_c_message_unpack(type, &allocator, len, data);
    if (!msg && budget->exceeded)
        return err_set(err, ERR_PROTOCOL, "a message %s of %zu bytes asks for more memory than its length warrants",
                       type->short_name, len);
    if (!msg)
        return err_set(err, ERR_PROTOCOL, "%zu bytes are no message %s", len, type->short_name);
    const char *field = unknown_enum(msg);
    if (field) {
        protobuf_c_message_free_unpacked(msg, &allocator);
        return err_set(err, ERR_PROTOCOL, "a message %s has an unknown value in its field %s", type->short_name,
                       field);
    }
    *ret_msg = msg;
    return 0;
}

int rpc_unpack(const ProtobufCMessageDescriptor *type, const uint8_t *data, size_t len, size_t budget,
               ProtobufCMessage **ret_msg, struct err *err)
{
    struct budget state = {.left = budget ? budget : rpc_budget(len)};
    return unpack(&state, type, data, len, ret_msg, err);
}

int rpc_unpack_scratch(struct rpc_scratch *scratch, const ProtobufCMessageDescriptor *type, const uint8_t *data,
                       size_t len, ProtobufCMessage **ret_msg, struct err *err)
{
    struct budget state = {.left = rpc_budget(len), .scratch = scratch};
    scratch->used = 0;
    scratch->spilled = false;
    int rc = unpack(&state, type, data, len, ret_msg, err);
    if (rc < 0)
        scratch->used = 0; /* what had spilled is freed */
    return rc;
}

void rpc_scratch_free(struct rpc_scratch *scratch, ProtobufCMessage *msg)
{
    struct budget state = {.scratch = scratch};
    ProtobufCAllocator allocator = allocator_of(&state);
    if (scratch->spilled)
        protobuf_c_message_free_unpacked(msg, &allocator);
    scratch->used = 0;
}

void rpc_unpack_free(ProtobufCMessage *msg)
{
    if (msg)
        protobuf_c_message_free_unpacked(msg, NULL); /* without a scratch, budget_alloc is malloc */
}

int rpc_error_of(const uint8_t *data, size_t len, struct err *err)
{
    ProtobufCMessage *msg;
    int rc = rpc_unpack(&pb__error__descriptor, data, len, 0, &msg, err);
    if (rc < 0)
        return rc;
    const Pb__Error *error = (const Pb__Error *)msg;
    bool known = error->code < 0 && strcmp(err_code_name(error->code), "unknown") != 0;
    rc = err_set(err, known ? error->code : ERR_PROTOCOL, "%.*s", ERR_TEXT_MAX - 1, error->text);
    rpc_unpack_free(msg);
    return rc;
}

const char *rpc_role_name(enum rpc_role role)
{
    switch (role) {
    case RPC_ROLE_AGENT: return "agent";
    case RPC_ROLE_OPERATOR: return "operator";
    case RPC_ROLE_READER: return "reader";
    case RPC_ROLE_PEER: return "peer";
    }
    return "unknown";
}
