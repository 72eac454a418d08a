/* Fuzz target: every message that comes from a peer, by the unpacking that production uses.  The first byte chooses the
 * message.  Memory stays within the budget, whatever the bytes ask for; what was unpacked packs again. */
#include <malloc.h>
#include <stdlib.h>

#include "common/msg_wire.h"
#include "common/rpc.h"
#include "tests/fuzz/messages.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const ProtobufCMessageDescriptor *message_of(uint8_t choice)
{
    return messages_at(choice % messages_count());
}

/* What the cores make of an agent's or the coordinator's message. */
static void converted(const ProtobufCMessageDescriptor *type, const uint8_t *data, size_t size)
{
    struct msg msg;
    struct err err;
    if ((type == &pb__agent_up__descriptor && msg_unpack_up(data, size, 0, &msg, &err) == 0) ||
        (type == &pb__agent_down__descriptor && msg_unpack_down(data, size, 0, &msg, &err) == 0))
        msg_done(&msg);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    converted(message_of(data[0]), data + 1, size - 1);
    ProtobufCMessage *message;
    struct err err;
    size_t budget = rpc_budget(size - 1);
    struct mallinfo2 before = mallinfo2();
    if (rpc_unpack(message_of(data[0]), data + 1, size - 1, 0, &message, &err) < 0)
        return 0;
    struct mallinfo2 after = mallinfo2();
    /* A sanitizer's allocator says 0 here; then its own limit counts.  Each piece may cost 32 bytes beside itself. */
    if (after.uordblks > before.uordblks && after.uordblks - before.uordblks > 4 * budget)
        abort();
    size_t packed = protobuf_c_message_get_packed_size(message);
    uint8_t *again = malloc(packed + 1);
    if (again && protobuf_c_message_pack(message, again) != packed)
        abort();
    free(again);
    rpc_unpack_free(message);
    return 0;
}
