/* Fuzz target: every message that comes from a peer, by the unpacking that production uses.  The first byte chooses the
 * message.  Memory stays within the budget, whatever the bytes ask for; what was unpacked packs again. */
#include <malloc.h>
#include <stdlib.h>

#include "agent.pb-c.h"
#include "common.pb-c.h"
#include "common/msg_wire.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "engine.pb-c.h"
#include "journal.pb-c.h"
#include "peer.pb-c.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const ProtobufCMessageDescriptor *const others[] = {
    &pb__hello__descriptor,        &pb__hello_reply__descriptor,   &pb__error__descriptor,
    &pb__agent_up__descriptor,     &pb__agent_down__descriptor,    &pb__peer_message__descriptor,
    &pb__journal_meta__descriptor, &pb__journal_commit__descriptor, &pb__view__descriptor,
    &pb__op_record__descriptor,    &pb__model__descriptor,         &pb__plan__descriptor,
    &eep__engine__engine_up__descriptor,    &eep__engine__engine_down__descriptor,
    &pb__read_expert_request__descriptor, &pb__read_expert_reply__descriptor,
};
#define N_OTHERS (sizeof others / sizeof *others)

static const ProtobufCMessageDescriptor *message_of(uint8_t choice)
{
    unsigned n = pb__control__descriptor.n_methods;
    unsigned k = choice % ((unsigned)N_OTHERS + 2 * n);
    if (k < N_OTHERS)
        return others[k];
    k -= (unsigned)N_OTHERS;
    return k % 2 ? pb__control__descriptor.methods[k / 2].output : pb__control__descriptor.methods[k / 2].input;
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
