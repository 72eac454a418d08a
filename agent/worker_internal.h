/* What the files of the worker share: worker.c (thread, queue, results), worker_jobs.c (what is done),
 * worker_transfer.c, worker_verify.c and worker_seal.c.
 *
 * Locking: `lock` guards the queue, the results, `current` and its flag, and the pointer `weights`.  Everything else
 * belongs to the worker thread once it runs. */
#ifndef EEP_AGENT_WORKER_INTERNAL_H
#define EEP_AGENT_WORKER_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "agent/weights.h"
#include "agent/worker.h"

enum job_kind { JOB_WORK, JOB_REGION_ALLOC, JOB_ADOPT, JOB_SEAL, JOB_SEAL_DISCARD, JOB_EXPERT_READ };

struct job {
    struct job *next;
    enum job_kind kind;
    bool cancelled;
    struct work work;      /* WORK; SEAL: id, map and self */
    struct blob *manifest; /* SEAL: encoded */
    struct expert_read read; /* EXPERT_READ, and of which slot; -1: of the checkpoint */
    int32_t slot;
    /* REGION_ALLOC, ADOPT (work: model, map, self): on the caller's stack, who waits */
    const struct region *region;
    struct memory_region *ret_region;
    int *fds;
    size_t n_fds;
    uint64_t bytes;
    bool answered;
    int code;
    struct err err; /* also what went wrong before a SEAL was queued */
};

struct result_node {
    struct result_node *next;
    struct worker_result result;
};

/* A region that an engine has asked for and not sealed yet. */
struct sealing {
    struct region region;
    struct memory_region memory;
};

struct worker {
    struct worker_config config;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wanted;   /* a job was queued */
    pthread_cond_t answered; /* a REGION_ALLOC or an ADOPT is done */
    struct job *first, **last;
    struct result_node *results, **results_last;
    int result_fd, cancel_fd;
    bool stopping;
    bool fatal; /* told; the worker's */
    struct job *current;
    _Atomic uint64_t sign_ns, due_ns; /* when the thread has shown itself last, until when it has to again; 0: it rests */
    struct weights *weights;

    struct transport_group *group;
    uint32_t group_n, group_self;
    struct sealing *sealing;
    size_t n_sealing;

    /* What experts are read from for others, as long as they ask. */
    struct checkpoint *lent;
    uint64_t lent_manifest; /* with so many slots */
    uint32_t lent_slots;
};

/* Does one job; fills in code, text and figures of *ret_result (id and kind are set). */
void worker_job_run(struct worker *w, struct job *job, struct worker_result *ret_result);
/* The thread goes on; call_ns: a call that it begins now ends by then at the latest, 0 = none. */
void worker_sign(struct worker *w, uint64_t call_ns);
/* True when the present job is to be given up.  A sign, too. */
bool worker_cancelled(struct worker *w);
/* Queues a progress result, or raises the one that nobody has read yet.  total: bytes that there will be, 0 = not known. */
void worker_progress(struct worker *w, const struct job *job, uint64_t bytes, uint64_t total);
void worker_weights_set(struct worker *w, struct weights *weights);

/* Gives the weights the digests that the operation's model knows beyond ours; ERR_CONFLICT for another manifest. */
int worker_model_update(struct worker *w, struct model *model, struct err *err) MUST_CHECK;
int worker_cancelled_check(struct worker *w, struct err *err) MUST_CHECK; /* ERR_ABORTED */

/* worker_verify.c.  found: rc is 0, or the mismatch that err tells of; what it returns ends the verification if it is
 * not 0. */
struct slot_claim {
    struct weights_place place;
    uint32_t expert; /* that should lie there */
    uint32_t from;   /* the caller's own */
};
int worker_slots_verify(struct worker *w, const struct slot_claim *claims, size_t n,
                        int (*found)(void *user, const struct slot_claim *claim, int rc, struct err *err), void *user,
                        struct err *err) MUST_CHECK;
int worker_dense_verify(struct worker *w, int (*found)(void *user, int rc, struct err *err), void *user,
                        struct err *err) MUST_CHECK;
int worker_job_verify(struct worker *w, const struct job *job, struct worker_result *ret_result,
                      struct err *err) MUST_CHECK;

/* In the middle of a reload: does reads for other agents that are queued, a few.  Two agents that read from each other
 * would wait for each other, and a third for all that an agent reads for itself. */
void worker_lend(struct worker *w);

/* worker_reload.c */
int worker_job_reload(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err) MUST_CHECK;
int worker_job_expert_read(struct worker *w, const struct job *job, struct worker_result *ret_result, struct err *err) MUST_CHECK;
void worker_lent_close(struct worker *w);

/* worker_transfer.c */
int worker_job_group(struct worker *w, const struct job *job, struct err *err) MUST_CHECK;
void worker_group_drop(struct worker *w);
int worker_job_fill(struct worker *w, const struct job *job, struct worker_result *ret_result,
                    struct err *err) MUST_CHECK;

/* worker_adopt.c */
int worker_job_adopt(struct worker *w, struct job *job, struct err *err) MUST_CHECK;
/* Queues a job on the caller's stack and waits for it. */
int worker_call(struct worker *w, struct job *job, struct err *err) MUST_CHECK;

/* worker_seal.c */
int worker_job_region_alloc(struct worker *w, const struct job *job, struct err *err) MUST_CHECK;
int worker_job_seal(struct worker *w, const struct job *job, struct worker_result *ret_result,
                    struct err *err) MUST_CHECK;
void worker_sealing_free(struct worker *w);

#endif
