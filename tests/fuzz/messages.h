/* Every message that comes from a peer or from the disk, for the fuzz target and for the test of each. */
#ifndef EEP_TESTS_FUZZ_MESSAGES_H
#define EEP_TESTS_FUZZ_MESSAGES_H

#include <protobuf-c/protobuf-c.h>

#include "agent.pb-c.h"
#include "common.pb-c.h"
#include "control.pb-c.h"
#include "engine.pb-c.h"
#include "journal.pb-c.h"
#include "peer.pb-c.h"
#include "record.pb-c.h"

static const ProtobufCMessageDescriptor *const messages_others[] = {
    &pb__hello__descriptor,
    &pb__hello_reply__descriptor,
    &pb__error__descriptor,
    &pb__agent_up__descriptor,
    &pb__agent_down__descriptor,
    &pb__peer_message__descriptor,
    &pb__journal_meta__descriptor,
    &pb__journal_commit__descriptor,
    &pb__view__descriptor,
    &pb__op_record__descriptor,
    &pb__model__descriptor,
    &pb__plan__descriptor,
    &eep__engine__engine_up__descriptor,
    &eep__engine__engine_down__descriptor,
};
#define MESSAGES_OTHERS ((unsigned)(sizeof messages_others / sizeof *messages_others))

/* Behind the calls of the service Control, so that theirs keep the numbers that the corpus has; a new call moves these. */
static const ProtobufCMessageDescriptor *const messages_late[] = {
    &pb__read_expert_request__descriptor,
    &pb__read_expert_reply__descriptor,
    &pb__record__descriptor,
};
#define MESSAGES_LATE ((unsigned)(sizeof messages_late / sizeof *messages_late))

static inline unsigned messages_count(void)
{
    return MESSAGES_OTHERS + 2 * pb__control__descriptor.n_methods + MESSAGES_LATE;
}

static inline const ProtobufCMessageDescriptor *messages_at(unsigned k)
{
    unsigned calls = 2 * pb__control__descriptor.n_methods;
    if (k < MESSAGES_OTHERS)
        return messages_others[k];
    k -= MESSAGES_OTHERS;
    if (k >= calls)
        return messages_late[k - calls];
    return k % 2 ? pb__control__descriptor.methods[k / 2].output : pb__control__descriptor.methods[k / 2].input;
}

#endif
