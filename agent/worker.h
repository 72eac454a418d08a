/* The worker thread: does what blocks (memory, loading, transfers, digests), one piece of work at a time, in order.
 *
 * The loop thread hands work over and gets completions back through a descriptor that libevent watches; nothing else
 * crosses.  A cancel stops the present piece of that operation and every queued one (ERR_ABORTED). */
#ifndef EEP_AGENT_WORKER_H
#define EEP_AGENT_WORKER_H

#include "agent/core.h"
#include "agent/expert_read.h"
#include "agent/manifest.h"
#include "agent/memory.h"
#include "agent/transport.h"

struct worker;
struct weights;

struct worker_config {
    struct memory_backend *memory;  /* the worker's, once it has started */
    struct transport *transport;    /* likewise */
    const char *checkpoint;         /* folder, or NULL; borrowed for the life of the worker */
    const struct rpc_identity *peer;/* what it says of itself to agents that it reads from; complete before any work */
    const struct tls *tls;          /* for these connections; NULL: not encrypted */
    uint32_t slots;                 /* 0: as the map says */
    uint32_t stuck_ms;              /* worker_stuck after so long without a sign of progress; 0: never */
    uint32_t transfer_timeout_ms;   /* no progress for so long ends a transfer; 60000 */
    /* The weights that this rank holds have become these (NULL: none); worker thread, before anybody is told.  Or NULL. */
    void (*on_weights)(void *user, const struct weights *weights);
    void *user;
};

struct worker_result {
    uint64_t id;
    enum work_kind kind;
    int code;
    char text[256];
    uint64_t bytes;      /* received / loaded / checked */
    uint64_t value;      /* VERIFY: slots checked; progress of LOAD: bytes that there will be */
    uint64_t bad;        /* VERIFY */
    struct blob *blob;   /* GROUP_ID; owned by the receiver */
    struct model *model; /* LOAD: manifest and digests */
    bool progress;       /* not an end: bytes so far */
    bool expert;         /* no work's result: that of worker_expert_read `id`, with blob */
    bool fatal;          /* no work's result: this process cannot go on with its GPU or transport, `text` says why.  End
                          * it with status 75, so that it is started again and takes its weights over.  Comes once */
    uint64_t op, ns;     /* the operation it was for; how long it took, without waiting in the queue */
    uint32_t round;
};

int worker_start(const struct worker_config *config, struct worker **ret_worker, struct err *err) MUST_CHECK;
/* Takes ownership of what `work` references. */
void worker_submit(struct worker *w, const struct work *work);
void worker_cancel(struct worker *w, uint64_t op);
/* For another agent: reads from this slot of the weights, or with -1 from the checkpoint.  The result has `expert`. */
void worker_expert_read(struct worker *w, uint64_t id, const struct expert_read *read, int32_t slot);
int worker_fd(const struct worker *w); /* readable when results wait */
bool worker_next_result(struct worker *w, struct worker_result *ret_result);
void worker_result_done(struct worker_result *result);
/* Cancels everything, joins, releases memory and transport. */
void worker_stop(struct worker *w);

/* Whether its thread is stuck: it shows no progress (bytes, a slot, the end of a call that has a deadline) for stuck_ms.
 * Fills in a sentence.  Any thread. */
bool worker_stuck(struct worker *w, char *text, size_t size);

/* For the engine socket (loop thread): the manifest and the regions' descriptors of the weights that are allocated now,
 * or NULL.  Valid until the next WORK_RELEASE is submitted.  Read manifest and regions only: `model` is the worker's. */
const struct weights *worker_weights(struct worker *w);
/* UUID of the GPU that the regions lie on, or NULL: host memory.  Constant. */
const char *worker_gpu(const struct worker *w);

/* Weights of the last process (loop thread, before anything is submitted; blocks while all of it is read): adopts the
 * regions, one descriptor each in the order of the manifest, and compares every held slot of rank `self` of the map and every
 * dense region with the model's digests.  Takes the descriptors over, also on failure.  *ret_bytes: read. */
int worker_adopt(struct worker *w, struct model *model, int *fds, size_t n, struct expert_map *map, uint32_t self,
                 uint64_t *ret_bytes, struct err *err) MUST_CHECK;

/* An engine that lays out its own weights (cold start): allocate one region now (blocks briefly; the worker is idle for
 * the operation meanwhile), and seal: take digests and make the model; the result comes as kind WORK_LOAD with `id`. */
int worker_region_alloc(struct worker *w, const struct region *region, struct memory_region *ret_region, struct err *err) MUST_CHECK;
void worker_seal(struct worker *w, uint64_t id, const struct manifest *manifest, const struct expert_map *map, uint32_t self);
void worker_seal_discard(struct worker *w); /* the engine died before sealing: free its regions */

#endif
