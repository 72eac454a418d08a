/* Every message that comes from a peer, one by one: filled in every field by its descriptor, it is the same after the
 * way there; cut at every byte, or changed, it is taken or refused with a sentence, within the budget of memory. */
#include <check.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#include "common/msg_wire.h"
#include "common/rpc.h"
#include "tests/fuzz/messages.h"
#include "tests/harness/suite.h"

#define DEPTH_MAX 4
#define CHANGES   400

/* ---- bytes of a message in which every field is set, written by its descriptor alone ---- */

struct bytes {
    uint8_t data[65536];
    size_t len;
};

static void put_varint(struct bytes *b, uint64_t value)
{
    for (; value >= 0x80; value >>= 7)
        b->data[b->len++] = (uint8_t)(value | 0x80);
    b->data[b->len++] = (uint8_t)value;
}

static void put_fixed(struct bytes *b, size_t len)
{
    for (size_t i = 0; i < len; i++)
        b->data[b->len++] = (uint8_t)(i + 1);
}

static void put_message(struct bytes *b, const ProtobufCMessageDescriptor *type, unsigned depth);

static void put_nested(struct bytes *b, const ProtobufCMessageDescriptor *type, unsigned depth)
{
    struct bytes *inner = calloc(1, sizeof *inner);
    put_message(inner, type, depth + 1);
    put_varint(b, inner->len);
    ck_assert_uint_lt(b->len + inner->len, sizeof b->data);
    memcpy(b->data + b->len, inner->data, inner->len);
    b->len += inner->len;
    free(inner);
}

static void put_field(struct bytes *b, const ProtobufCFieldDescriptor *field, unsigned depth)
{
    unsigned wire = 0;
    switch (field->type) {
    case PROTOBUF_C_TYPE_FIXED32:
    case PROTOBUF_C_TYPE_SFIXED32:
    case PROTOBUF_C_TYPE_FLOAT:
        wire = 5;
        break;
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        wire = 1;
        break;
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_BYTES:
    case PROTOBUF_C_TYPE_MESSAGE:
        wire = 2;
        break;
    default:
        break;
    }
    put_varint(b, (uint64_t)field->id << 3 | wire);
    if (wire == 5 || wire == 1) {
        put_fixed(b, wire == 5 ? 4 : 8);
    } else if (field->type == PROTOBUF_C_TYPE_MESSAGE) {
        put_nested(b, field->descriptor, depth);
    } else if (wire == 2) {
        put_varint(b, 3);
        memcpy(b->data + b->len, "abc", 3);
        b->len += 3;
    } else if (field->type == PROTOBUF_C_TYPE_ENUM) {
        put_varint(b, (uint64_t)((const ProtobufCEnumDescriptor *)field->descriptor)->values[0].value);
    } else {
        put_varint(b, field->type == PROTOBUF_C_TYPE_BOOL ? 1 : 100 + field->id);
    }
}

static void put_message(struct bytes *b, const ProtobufCMessageDescriptor *type, unsigned depth)
{
    for (unsigned i = 0; i < type->n_fields; i++) {
        const ProtobufCFieldDescriptor *field = &type->fields[i];
        bool needed = field->label == PROTOBUF_C_LABEL_REQUIRED,
             deep = field->type == PROTOBUF_C_TYPE_MESSAGE && depth >= DEPTH_MAX;
        for (int n = deep ? needed : field->label == PROTOBUF_C_LABEL_REPEATED ? 2 : 1; n > 0; n--)
            put_field(b, field, depth);
    }
}

/* ---- what becomes of them ---- */

/* true: it was taken. */
static bool unpacks(const ProtobufCMessageDescriptor *type, const uint8_t *data, size_t len,
                    ProtobufCMessage **ret_message)
{
    struct err err = {0};
    uint8_t *exact = malloc(len ? len : 1); /* so that a sanitizer sees a read beyond it */
    memcpy(exact, data, len);
    struct mallinfo2 before = mallinfo2();
    int rc = rpc_unpack(type, exact, len, 0, ret_message, &err);
    struct mallinfo2 after = mallinfo2();
    /* A sanitizer's allocator says 0 here.  Each piece may cost 32 bytes beside itself. */
    if (after.uordblks > before.uordblks)
        ck_assert_msg(after.uordblks - before.uordblks <= 4 * rpc_budget(len), "%s: %zu bytes cost %zu", type->name,
                      len, after.uordblks - before.uordblks);
    ck_assert_msg(rc == 0 || err.text[0], "%s: refused without a word", type->name);
    free(exact);
    return rc == 0;
}

static void convert(const ProtobufCMessageDescriptor *type, const uint8_t *data, size_t len)
{
    struct msg msg;
    struct err err;
    if ((type == &pb__agent_up__descriptor && msg_unpack_up(data, len, 0, &msg, &err) == 0) ||
        (type == &pb__agent_down__descriptor && msg_unpack_down(data, len, 0, &msg, &err) == 0))
        msg_done(&msg);
}

START_TEST(there_and_back_and_cut_anywhere)
{
    const ProtobufCMessageDescriptor *type = messages_at((unsigned)_i);
    struct bytes *whole = calloc(1, sizeof *whole);
    ProtobufCMessage *message = NULL;
    put_message(whole, type, 0);
    ck_assert_msg(unpacks(type, whole->data, whole->len, &message), "%s", type->name);
    size_t len = protobuf_c_message_get_packed_size(message);
    uint8_t *again = malloc(len + 1);
    ck_assert_uint_eq(protobuf_c_message_pack(message, again), len);
    ProtobufCMessage *second = NULL;
    ck_assert(unpacks(type, again, len, &second));
    uint8_t *third = malloc(len + 1);
    ck_assert_uint_eq(protobuf_c_message_get_packed_size(second), len);
    ck_assert_uint_eq(protobuf_c_message_pack(second, third), len);
    ck_assert_mem_eq(again, third, len);
    rpc_unpack_free(message);
    rpc_unpack_free(second);
    for (size_t cut = 0; cut < whole->len; cut++) {
        if (unpacks(type, whole->data, cut, &message))
            rpc_unpack_free(message);
        convert(type, whole->data, cut);
    }
    free(again);
    free(third);
    free(whole);
}
END_TEST

START_TEST(changed_anywhere)
{
    const ProtobufCMessageDescriptor *type = messages_at((unsigned)_i);
    struct bytes *whole = calloc(1, sizeof *whole);
    uint64_t state = 5 + (uint64_t)_i;
    put_message(whole, type, 0);
    for (int change = 0; change < CHANGES && whole->len; change++) {
        uint8_t kept[4];
        size_t at[4];
        ProtobufCMessage *message;
        for (int i = 0; i < 4; i++) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            at[i] = (size_t)(state >> 33) % whole->len;
            kept[i] = whole->data[at[i]];
            whole->data[at[i]] = (uint8_t)(state >> 24);
        }
        if (unpacks(type, whole->data, whole->len, &message))
            rpc_unpack_free(message);
        convert(type, whole->data, whole->len);
        for (int i = 4; i-- > 0;)
            whole->data[at[i]] = kept[i];
    }
    free(whole);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("messages");
    TCase *tc = tcase_create("each");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, there_and_back_and_cut_anywhere, 0, (int)messages_count());
    tcase_add_loop_test(tc, changed_anywhere, 0, (int)messages_count());
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
