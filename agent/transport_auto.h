/* A transport made of two: `near` between parties that reach each other by it, `far` between all others; both serve one
 * operation.  For GPUs near is cuda_peer and far is nccl (transport_gpu.h: transport_gpu_auto_open). */
#ifndef EEP_AGENT_TRANSPORT_AUTO_H
#define EEP_AGENT_TRANSPORT_AUTO_H

#include "agent/transport.h"

#define TRANSPORT_CARD_BYTES 80u

struct transport_auto_options {
    struct transport *near;
    struct transport *mesh; /* a host transport, over which all parties meet first */
    /* Opens the far transport, when a group needs it for the first time.  Its group ids are random bytes, as many as a
     * host transport's. */
    struct transport *(*far_open)(void *user, struct err *err);
    /* What tells other parties whether they reach this one by near, and whether this one reaches whose card that is. */
    int (*card)(void *user, uint8_t ret_card[TRANSPORT_CARD_BYTES], struct err *err);
    bool (*reaches)(void *user, const uint8_t card[TRANSPORT_CARD_BYTES]);
    void (*done)(void *user); /* when the transport is closed; may be NULL */
    void *user;
};

/* Owns near and mesh once it is open. */
struct transport *transport_auto_open(const struct transport_auto_options *options, struct err *err);

#endif
