/* What the files of the transport made of two share: transport_auto.c and transport_auto_broadcast.c.  Worker thread.
 */
#ifndef EEP_AGENT_TRANSPORT_AUTO_INTERNAL_H
#define EEP_AGENT_TRANSPORT_AUTO_INTERNAL_H

#include "agent/transport_auto.h"

struct transport_auto {
    struct transport base; /* first: the pointers are exchanged */
    struct transport_auto_options options;
    struct transport *far; /* NULL until it is needed */
};

/* Handed out as a struct transport_group, which each transport has one of its own of. */
struct auto_group {
    struct transport_auto *t;
    uint32_t n, self, islands;
    uint32_t island[RANKS_MAX];   /* of each party */
    uint32_t place[RANKS_MAX];    /* of each party in its island */
    struct transport_group *near; /* of our island; NULL after an error */
    struct transport_group *far;  /* of all; NULL with one island */
};

/* One call of near or far as a part of the caller's: progress counts on, items have their numbers in the whole. */
struct auto_step {
    struct transport_call call;
    const struct transport_call *outer;
    uint64_t before; /* bytes */
    const size_t *index;
};
void auto_step_init(struct auto_step *s, const struct transport_call *outer, uint64_t before, const size_t *index);

void auto_group_drop(struct auto_group *g);
int auto_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err);

#endif
