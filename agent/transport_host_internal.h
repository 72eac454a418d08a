/* What the files of the host transport share: transport_host.c (the table, move), transport_host_broadcast.c,
 * transport_host_mesh.c (connecting a group), transport_host_pump.c (bytes over all links at once).  Worker thread. */
#ifndef EEP_AGENT_TRANSPORT_HOST_INTERNAL_H
#define EEP_AGENT_TRANSPORT_HOST_INTERNAL_H

#include "agent/transport.h"

#define GROUP_ID_BYTES 32
#define GUESTS_MAX     64 /* accepted connections whose group is not known yet */

/* ---- the mesh ---- */

#define HELLO_BYTES  48u
#define ANSWER_BYTES 24u

/* An accepted connection that has not been given to a link. */
struct guest {
    int fd;
    uint64_t since_ns;
    uint8_t hello[HELLO_BYTES];
    size_t got;
};

struct transport_host {
    struct transport base; /* first: the pointers are exchanged */
    int listen_fd;
    struct guest guests[GUESTS_MAX];
    size_t n_guests;
};

/* ---- ranges of memory ---- */

struct run {
    uint8_t *base;
    size_t len;
    uint64_t start; /* sum of the lengths before it */
};
struct runs {
    struct run *v;
    size_t n, cap;
    uint64_t total;
};
int runs_add(struct runs *runs, const struct extent *extents, size_t n, struct err *err) MUST_CHECK;
void runs_done(struct runs *runs);

/* ---- frames: a fixed header, then `len` bytes ---- */

#define FRAME_HEAD_BYTES 32u
enum frame_kind { FRAME_MOVE = 1, FRAME_CHUNK };

struct frame {
    enum frame_kind kind;
    uint64_t seq;   /* which call of the group */
    uint64_t index; /* CHUNK: which one */
    uint64_t len;
};

/* One direction of a link, in the middle of a frame or between two. */
struct flow {
    bool busy;
    uint8_t head[FRAME_HEAD_BYTES];
    size_t head_at;
    struct frame frame;
    const struct runs *runs; /* the body's place, from `run` on */
    size_t run, run_at;
    uint64_t left;
};
/* Where a body lies: `offset` bytes into runs. */
struct place {
    const struct runs *runs;
    uint64_t offset;
};

struct group_link {
    int fd; /* -1: this party itself */
    char name[AGENT_ID_MAX];
    struct flow out, in;
};

struct transport_group {
    struct transport_host *host;
    uint32_t n, self;
    uint64_t seq;
    bool broken;              /* an error came: only destroy is left */
    uint64_t received;        /* body bytes of the present call */
    struct group_link *links; /* [n] */
};

/* What a call wants from the pump.  `job` is the call's own. */
struct pump_ops {
    /* Bytes of this call are still expected from the peer. */
    bool (*wants_in)(void *job, uint32_t peer);
    /* The next frame for the peer, if there is one now. */
    bool (*next_out)(void *job, uint32_t peer, struct frame *ret_frame, struct place *ret_place);
    /* A header came: where does its body go?  An error ends the call. */
    int (*begin_in)(void *job, uint32_t peer, const struct frame *frame, struct place *ret_place, struct err *err);
    /* The frame's body has come up to `end` (an offset in what begin_in gave).  May be NULL. */
    void (*took_in)(void *job, uint32_t peer, uint64_t end);
    /* The body is complete. */
    void (*end_in)(void *job, uint32_t peer, const struct frame *frame);
};
/* Runs until nothing is wanted, sent or expected any more; wraps no context around errors but names the party. */
int pump_run(struct transport_group *group, const struct pump_ops *ops, void *job, const struct transport_call *call,
             struct err *err) MUST_CHECK;

int host_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err);
int host_group_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                      uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                      struct err *err);
void host_group_destroy(struct transport_group *group);
/* Closes guests whose other end is gone (all: every one). */
void host_guests_sweep(struct transport_host *host, bool all);

/* Milliseconds for poll() until `until_ns`: rounded up, 0 when it is past. */
int host_poll_ms(uint64_t until_ns);

#endif
