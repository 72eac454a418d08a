/* What the files of the transport over GPU memory share: transport_cuda_peer.c (the table, groups),
 * transport_cuda_peer_moves.c (which bytes go where), transport_cuda_peer_call.c (one call, until nothing is due),
 * transport_cuda_peer_link.c (messages and descriptors between agents), transport_cuda_peer_copy.c (the copies),
 * transport_cuda_peer_reach.c (who can be reached).
 *
 *   source                                            receiver
 *     a descriptor for each region that the other
 *     does not have yet                         --->  maps it
 *     OFFER: which bytes, in the plan's order   --->  copies them straight into its slots, in batches
 *     progress                                  <---  TAKEN: bytes so far, and whether that was all
 *
 * Nothing is sent that the plan does not foresee, so both sides know what to wait for.  Worker thread. */
#ifndef EEP_AGENT_TRANSPORT_CUDA_PEER_INTERNAL_H
#define EEP_AGENT_TRANSPORT_CUDA_PEER_INTERNAL_H

#include "agent/cuda_driver.h"
#include "agent/transport_gpu.h"
#include "agent/transport_host_internal.h"

#define PEER_STREAMS      8u  /* at most; a copy of a few MiB alone does not fill a GPU */
#define PEER_BATCHES      48u /* in flight, at most */
#define PEER_BATCH_COPIES 128u

/* ---- messages ---- */

#define NOTE_HEAD_BYTES 48u
enum note_kind {
    NOTE_HELLO = 1, /* a, b: the UUID of our GPU */
    NOTE_REGION,    /* a: number, counted from 0 on each link; b: bytes mapped; with its descriptor */
    NOTE_OFFER,     /* a: bytes in all; body: struct offer_run */
    NOTE_TAKEN,     /* a: bytes so far; b: 1 = that was all */
};
struct note_head {
    enum note_kind kind;
    uint64_t seq; /* which call of the group */
    uint64_t a, b;
    uint64_t len; /* of the body */
};
struct offer_run {
    uint64_t region, offset, len; /* little-endian in the body */
};
struct note {
    struct note *next;
    int fd; /* -1: none; not owned */
    size_t len, at;
    uint8_t bytes[];
};

/* ---- copies ---- */

struct copy {
    CUdeviceptr dst, src;
    size_t len;
};
struct copies {
    struct copy *v;
    size_t n, cap, at; /* at: the next one to start */
};
struct batch {
    CUevent done;
    uint32_t peer;
    uint64_t bytes;
};

/* ---- links ---- */

struct region_sent {
    const void *base;
    int fd;
    size_t mapped;
};
struct region_mapped {
    CUdeviceptr at;
    size_t mapped;
};

struct peer_link {
    /* out */
    struct note *notes, **notes_end;
    struct region_sent *sent;
    size_t n_sent, cap_sent;
    /* in: the message that is being read */
    uint8_t head[NOTE_HEAD_BYTES];
    size_t head_at, body_at;
    struct note_head in;
    uint8_t *body;
    int in_fd;
    struct region_mapped *mapped;
    size_t n_mapped, cap_mapped;
    /* this call: what is still to come on this link */
    bool want_hello, want_offer, want_taken;
    uint64_t expected; /* bytes that an offer must have */
    uint64_t to_take;  /* bytes of it that we copy */
    uint64_t taken;
    struct copies copies;
};

struct peer_group {
    struct transport_group base; /* first: the pointers are exchanged; its links hold the sockets and names */
    struct transport_cuda_peer *transport;
    struct peer_link *links; /* [base.n] */
    CUstream streams[PEER_STREAMS];
    struct batch batches[PEER_BATCHES];
    unsigned first_batch, n_batches; /* in flight, oldest first */
    unsigned started;                /* batches in all: which stream is next */
    uint32_t turn;                   /* which party's copies are next */
};

struct transport_cuda_peer {
    struct transport base; /* first: the pointers are exchanged */
    struct cuda_device *device;
    struct peer_tuning tuning;
};

/* ---- calls ---- */

struct call_job {
    struct peer_group *g;
    const struct transport_call *call;
    /* what an offer's bytes are copied to; NULL in group_create */
    int (*offered)(struct call_job *job, uint32_t peer, const struct offer_run *runs, struct err *err);
    const struct extent **to; /* [parties] where the bytes of each go, in the plan's order */
    const uint8_t *have;      /* a broadcast: who sends; else NULL */
};
/* Messages and copies until nothing is due any more. */
int peer_call_run(struct call_job *job, struct err *err) MUST_CHECK;
/* Tells the source what has been copied; nothing for copies inside this party's own memory. */
int peer_tell_taken(struct peer_group *g, uint32_t peer, struct err *err) MUST_CHECK;
/* As in agent/transport.h. */
int peer_move(struct transport_group *group, const struct transfer *items, size_t n, const struct transport_call *call,
              uint64_t *ret_bytes, struct err *err) MUST_CHECK;
int peer_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err) MUST_CHECK;

/* Queues a message; body may be NULL.  fd goes with it, and must stay open until the call ends. */
int peer_note(struct peer_group *g, uint32_t peer, const struct note_head *head, const void *body, int fd,
              struct err *err) MUST_CHECK;
/* Sends what can be sent now. */
int peer_link_send(struct peer_group *g, uint32_t peer, struct err *err) MUST_CHECK;
/* Reads what has come, up to what the call waits for; `take` gets each message with its body. */
int peer_link_receive(struct peer_group *g, uint32_t peer,
                      int (*take)(void *job, uint32_t peer, const struct note_head *head, const uint8_t *body,
                                  struct err *err),
                      void *job, struct err *err) MUST_CHECK;
bool peer_link_waits(const struct peer_link *link);
void peer_link_done(struct peer_group *g, uint32_t peer);

/* The GPU of this UUID: its index here (-1: not visible), and whether ours reaches it. */
int peer_gpu_reach(const struct cuda_device *device, const unsigned char uuid[16], int *ret_index, bool *ret_reaches,
                   struct err *err) MUST_CHECK;

int peer_copies_add(struct copies *copies, CUdeviceptr dst, CUdeviceptr src, size_t len, struct err *err) MUST_CHECK;
/* Starts batches while there is something to copy and room for them. */
int peer_copies_start(struct peer_group *g, struct err *err) MUST_CHECK;
/* The oldest batch, if it is done; *ret_batch untouched and 0 when not, 1 when it is. */
int peer_copies_finish(struct peer_group *g, struct batch *ret_batch, struct err *err) MUST_CHECK;
/* Waits for all copies in flight and forgets what was not started: after an error. */
void peer_copies_drop(struct peer_group *g);

#endif
