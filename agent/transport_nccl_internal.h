/* What the files of the NCCL transport share: transport_nccl.c (the table, move), transport_nccl_group.c (creating a
 * group), transport_nccl_run.c (groups of operations on the stream), transport_nccl_broadcast.c, and
 * transport_nccl_ending.c (ends and aborts in the background).  Worker thread, except where it says otherwise. */
#ifndef EEP_AGENT_TRANSPORT_NCCL_INTERNAL_H
#define EEP_AGENT_TRANSPORT_NCCL_INTERNAL_H

#include <pthread.h>

#include "agent/cuda_driver.h"
#include "agent/nccl_library.h"
#include "agent/transport.h"
#include "agent/transport_nccl.h"
#include "agent/transport_nccl_control.h"

#define GROUPS_IN_FLIGHT 8u /* at most */

/* What endings in the background use as well; lives until the last of them is over. */
struct nccl_shared {
    struct nccl_library library;
    struct cuda_device *device;
    char version[96];
    pthread_mutex_t lock; /* of all that follows */
    pthread_cond_t ended;
    struct nccl_ending *endings;
    struct nccl_kept *handed; /* by an ending that was asked for what it keeps ... */
    bool answered;            /* ... or it had to let go of it */
    bool hurry;  /* endings wait for no peer any more */
    bool closed; /* the last ending frees this */
};

struct transport_nccl {
    struct transport base; /* first: the pointers are exchanged */
    struct transport *mesh;
    bool mesh_is_theirs;
    struct nccl_shared *shared;
    uint32_t keep_ms;
    struct nccl_tuning tuning;
    struct transport_nccl_counts counts;
};

/* What a group has on the GPU; handed to an ending as a whole. */
struct nccl_gear {
    ncclComm_t comm;
    CUstream stream;
    CUevent events[GROUPS_IN_FLIGHT];
    CUdeviceptr warm; /* [2n] words for the first exchange */
};

/* The parties of a group and their ranks in its communicator, for the next group, which may have the same ones or
 * fewer. */
struct nccl_keep {
    uint64_t key; /* the same for all parties of the communicator, and only for them; 0: not to be kept */
    uint32_t ms;
    uint32_t n;
    struct nccl_party {
        char id[AGENT_ID_MAX];
        uint64_t incarnation;
        uint32_t rank;
    } parties[RANKS_MAX];
};
/* A communicator that its group has ended with, all of whose parties are still there. */
struct nccl_kept {
    struct nccl_keep who;
    struct nccl_gear gear;
    struct control *control; /* closed at a party's end of it: its connections are how the others learn that */
};

struct transport_group {
    struct transport_nccl *nccl;
    struct control *control; /* NULL once broken */
    uint32_t n, self;
    struct nccl_keep who;
    bool broken;     /* an error came: only destroy is left */
    bool gpu_failed; /* ... from NCCL or CUDA: the peers may know more */
    struct nccl_gear gear;
};

/* ---- operations, in groups that are launched together ---- */

struct nccl_op {
    uint8_t *at;
    size_t len;
    uint32_t peer;
    uint32_t batch; /* index of the group; called batch here, since parties are a group already */
    bool send;
};
struct nccl_ops {
    struct nccl_op *v;
    size_t n, cap;
    uint32_t batches;
    struct control_plan *out, *in; /* [parties] */
};
int nccl_ops_init(struct nccl_ops *ops, uint32_t parties, struct err *err) MUST_CHECK;
/* Operations between one pair in one direction must be added in the same order on both sides, with equal batches. */
int nccl_ops_add(struct nccl_ops *ops, const struct nccl_op *op, struct err *err) MUST_CHECK;
void nccl_ops_done(struct nccl_ops *ops);

/* Agrees with the peers on the operations (agree; not when the group is just being made), runs them batch after batch,
 * and waits for the peers to have finished. */
int nccl_run(struct transport_group *group, const char *doing, const struct nccl_ops *ops,
             const struct transport_call *call, uint64_t *ret_bytes, struct err *err) MUST_CHECK;
/* The middle part of it. */
int nccl_run_batches(struct transport_group *group, const struct nccl_ops *ops, const struct transport_call *call,
                     uint64_t *ret_bytes, struct err *err) MUST_CHECK;
/* Takes over what an earlier group has left, if that will do for these parties at all of them: the same communicator, or
 * one shrunk from it.  group->gear.comm stays NULL when a new one has to be made; an error is a party's or the caller's
 * end. */
int nccl_group_inherit(struct transport_group *group, const struct transport_call *call, struct err *err) MUST_CHECK;

/* Waits until the communicator has taken what it was last asked for. */
int nccl_settle(struct transport_group *group, const char *what, const struct transport_call *call,
                struct err *err) MUST_CHECK;
/* Waits until the event has happened. */
int nccl_reach(struct transport_group *group, CUevent event, const struct transport_call *call,
               struct err *err) MUST_CHECK;

/* After an error: names the party that is behind it if one is gone, leaves the others, aborts what is on the GPU and
 * waits (a second or two, see ABORT_LIMIT_MS) until nothing of it can write any more.  Returns rc. */
int nccl_group_fail(struct transport_group *group, int rc, struct err *err);

int nccl_group_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                      uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                      struct err *err);
void nccl_group_destroy(struct transport_group *group);
int nccl_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err);

/* ---- endings ---- */

struct nccl_shared *nccl_shared_new(struct nccl_library library, struct cuda_device *device);
/* Waits a moment for endings; then what is left goes on without us. */
void nccl_shared_close(struct nccl_shared *shared);
/* Ends the gear on a thread of its own.  control: that of a group which is over in order (control_end has been called);
 * it is waited for a while, and freed.  NULL after a failure.  keep: how long, and for whom, it is kept before that, if
 * all parties end in order and stay; or NULL.  One is kept at a time.  Returns at once. */
void nccl_ending_start(struct nccl_shared *shared, const struct nccl_gear *gear, struct control *control,
                       const struct nccl_keep *keep);
/* What is kept, the caller's from now on (nccl_kept_drop or taken apart and freed); NULL: nothing. */
struct nccl_kept *nccl_kept_take(struct nccl_shared *shared);
/* Ends it in the background; takes NULL. */
void nccl_kept_drop(struct nccl_shared *shared, struct nccl_kept *kept);
/* Waits for all endings (failed_only: of groups that failed); false when some are not over in time. */
bool nccl_endings_wait(struct nccl_shared *shared, bool failed_only, uint32_t limit_ms);
/* How many are under way; one that is kept is not. */
unsigned nccl_endings_count(struct nccl_shared *shared);
/* 0, or which ending is over its time.  Never blocks. */
int nccl_endings_check(struct nccl_shared *shared, struct err *err) MUST_CHECK;

#endif
