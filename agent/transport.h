/* Transports move bytes between the agents of an operation: a table of functions, one file a backend
 * (transport_host.c: sockets; transport_nccl.c and transport_cuda_peer.c: GPUs; transport_auto.c: two as one).
 *
 * A group is created over the parties of one operation and used for its transfers only.  All parties call the same
 * functions with the same plan, in the same order; each does its own part.  Worker thread; every call may block up to
 * its deadline and ends early when `cancel` says so (polled, and `cancel_fd` becomes readable).  After any error the
 * group is good for `destroy` only, which never waits for a peer. */
#ifndef EEP_AGENT_TRANSPORT_H
#define EEP_AGENT_TRANSPORT_H

#include "agent/weights.h"

struct transport_group;

struct transport_call {
    uint64_t deadline_ns;   /* monotonic; read again after every progress, which may have moved it */
    int cancel_fd;          /* readable = give up with ERR_ABORTED; -1 = none */
    void (*progress)(void *user, uint64_t bytes_received); /* every few MiB sent or received; may be NULL */
    /* move: bytes [offset, offset + len) of items[item].to[extent] have come and are not written again, so that they can
     * be digested while they are in the cache.  In order for each item; offset is a multiple of 8, and so is len but at
     * the extent's end.  Not for local copies; a backend need not call it at all.  May be NULL. */
    void (*arrived)(void *user, size_t item, uint32_t extent, size_t offset, size_t len);
    void *user;
};

/* What a party has to do with a broadcast. */
enum { TRANSPORT_WANTS = 0, TRANSPORT_HAS = 1, TRANSPORT_ABSENT = 2 /* neither: it calls, too, and nothing happens */ };

/* What one call moves: for every item the same (src, dst) on both sides, so the k-th item between a pair of parties
 * is the same one for both.  Items with src == dst are local copies. */
struct transfer {
    uint32_t src, dst;            /* parties */
    struct extent from[SLOT_EXTENTS_MAX]; /* valid on src */
    struct extent to[SLOT_EXTENTS_MAX];   /* valid on dst */
    uint32_t n;
};

struct transport {
    const char *name; /* "host" */
    /* A secret that the parties share: blob to be carried by the coordinator, never logged. */
    int (*group_id)(struct transport *self, struct blob **ret_id, struct err *err);
    /* Creates and warms the group (every pair connected). Names the party that did not come. */
    int (*group_create)(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n, uint32_t self_party,
                        const struct transport_call *call, struct transport_group **ret_group, struct err *err);
    /* Moves all items, batched, in parallel over all peers; *ret_bytes received by this party. */
    int (*move)(struct transport_group *group, const struct transfer *items, size_t n, const struct transport_call *call,
                uint64_t *ret_bytes, struct err *err);
    /* The same bytes (extents, valid on every party) from those that have[party] to those that want them, pipelined and
     * spread over all senders and receivers. */
    int (*broadcast)(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                     const struct transport_call *call, uint64_t *ret_bytes, struct err *err);
    void (*destroy)(struct transport_group *group); /* takes NULL */
    /* 0, or why this process had better be restarted: something that was given up does not end (an NCCL abort past its
     * limit).  Never blocks.  NULL: nothing can hang. */
    int (*health)(struct transport *self, struct err *err);
    void (*close)(struct transport *self);
};

/* For group_id: so many random bytes (at most 64). */
int transport_secret(size_t bytes, struct blob **ret_id, struct err *err) MUST_CHECK;

/* listen_fd: the listener for data connections of the host transport (see eep-agent); owned by the transport afterwards. */
struct transport *transport_host_open(int listen_fd, struct err *err);

#endif
