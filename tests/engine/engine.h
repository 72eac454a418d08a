/* The reference engine: what of it is shared between its files.
 *
 *   main.c     options            engine.c   the stepping thread: life cycle, steps
 *   events.c   what libeep says   views.c    meshes: prepared, adopted, repaired
 *   server.c   requests           batch.c    sequences
 *   dispatch.c, mesh_*.c          forward.c, compute_*.c, decoder.c, kernels.cu
 *   durations.c                   layout.c, source.c
 *
 * Threads: the stepping thread (main) owns everything that is not said to be under `lock`; libeep's thread calls
 * events.c; the server's thread calls on_request and on_signal; a builder thread per prepared view. */
#ifndef EEP_TESTS_ENGINE_ENGINE_H
#define EEP_TESTS_ENGINE_ENGINE_H

#include <pthread.h>

#include "common/log.h"
#include "tests/engine/batch.h"
#include "tests/engine/dispatch.h"
#include "tests/engine/durations.h"
#include "tests/engine/source.h"

struct engine_options {
    const char *socket, *listen, *advertise, *checkpoint;
    bool fused;
    enum eep_dispatch dispatch;
    uint32_t step_ms, busy_us, stall_ms, attach_ms;
    bool no_masks;
    bool mute_prepare, mute_prepare_again, mute_drain; /* never answered; again: but for the first time */
    uint32_t max_batch, prefill;
    uint64_t kv_bytes;
    enum log_level log_level;
};

/* A mesh that is being built, or waits to be adopted. */
struct prepare;

struct engine {
    struct engine_options options;
    struct log *log;
    uint64_t id; /* random, of this process */
    int stop_fd; /* readable: end */
    struct eep *eep;
    struct server *server;
    struct mesh_lot *lot;
    struct source source; /* of a sealing engine; config NULL otherwise */

    struct decoder decoder;
    bool bound; /* decoder has tensors */
    struct compute *compute; /* while bound */
    struct durations durations; /* of steps */
    struct dispatch dispatch;
    struct batch batch;
    struct mesh *mesh;
    uint64_t mesh_epoch; /* of the view that it was built for or kept in */
    int32_t rank;       /* in the view in use; -1 = in none */
    bool view_draining; /* the view says that we drain */
    bool drained_said;
    bool asked_to_prepare; /* once at least; of the thread that events come on */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    /* under lock */
    uint64_t void_epoch; /* views up to this one are revoked: their meshes are used no more */
    struct eep *sleeper; /* what the server's thread wakes; NULL until attached, and again before detaching */
    struct prepare *prepare;
    bool regions, load, release, detached, stop, draining, drain_new;
    uint64_t drain_until_ms;
    int32_t *load_map; /* owned */
    uint32_t load_layers, load_slots;
    char why[256]; /* detached */
};
/* Runs until stopped: 0; or until it cannot go on: 1, logged. */
int engine_run(const struct engine_options *options);

/* events.c */
void engine_event(void *user, const struct eep_event *event);
void engine_request(void *user);
void engine_signal(void *user);

/* views.c */
void prepare_start(struct engine *e, const struct eep_event *event); /* libeep's thread */
void prepare_drop(struct engine *e, uint64_t op, bool silent);       /* op 0 = any; silent: no answer is owed */
void prepare_finish(struct engine *e);                               /* drops it and joins the builder */
/* The mesh for the view of this step, in e->mesh.  ERR_ABORTED: revoked meanwhile, or stopping. */
int engine_switch(struct engine *e, const struct eep_step *step, struct err *err) MUST_CHECK;

#endif
