/* Inside libeep: struct eep, who may touch what, and what the files of this folder offer one another.
 *
 *   attach.c   handshake, errors, answers      receive.c  libeep's thread: messages from the agent
 *   view.c     views and routings              maps.c     the expert map arrays at fixed addresses
 *   regions.c  mapped weights, tensors         seal.c     a layout that the engine produces
 *   step.c     step boundaries                 gate.c     the gate loop, pure
 *   orphan.c   the agent's process is gone and may come back
 *   device*.c  the GPU that the weights lie on
 *
 * Threads.  The stepping thread owns `step`; libeep's own thread owns `reader`, `incoming`, `patience` and the making of a
 * new `sock`.  `send_lock` makes one message at a time go to the agent, and none while it is away.  `lock` protects
 * everything under its heading below, and is never held while a callback runs or a message is sent; a boundary with nothing
 * pending takes neither lock.  What crosses between the two threads at every step is atomic, and described at its word. */
#ifndef EEP_LIBEEP_INTERNAL_H
#define EEP_LIBEEP_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "agent/engine_frame.h"
#include "agent/libeep/device.h"
#include "agent/libeep/eep.h"
#include "agent/libeep/gate.h"
#include "agent/manifest.h"
#include "common/page.h"
#include "engine.pb-c.h"

/* Which expert each physical slot routes to, and how often the slot is among that expert's entries; -1, 0 = nothing.
 * [layers][ranks * slots]; entries lie behind routed, in its allocation. */
struct routing {
    uint64_t version;
    uint32_t layers, logical, ranks, slots;
    int32_t *routed;
    const uint8_t *entries;
};
int routing_from_wire(const Eep__Engine__ExpertMap *wire, struct routing *ret_routing, struct err *err) MUST_CHECK;

/* An eep_view with what it points to. */
struct view_box {
    struct eep_view pub; /* first: eep_view_ref casts */
    atomic_uint refs;
    struct routing routing; /* routed == NULL: the view came without a map */
    struct eep_member members[];
};
int view_from_wire(const Eep__Engine__View *wire, struct view_box **ret_view, struct err *err) MUST_CHECK;
void view_release(struct view_box *view);

struct commit {
    struct commit *next;
    struct view_box *view;
};
struct map_update {
    struct map_update *next;
    struct routing routing;
};

/* The arrays of eep_maps.  One set per shape, kept until the detach, so that addresses stay. */
struct maps_box {
    struct eep_maps pub;
    struct maps_box *next;
    size_t load_bytes;
    struct device_maps *device; /* NULL: host memory */
};

struct mapping {
    void *base; /* a device pointer when the agent's memory is that of a GPU */
    size_t bytes;
};
struct regions {
    struct manifest manifest;
    struct blob *blob; /* the manifest, encoded */
    struct mapping *mappings; /* [manifest.n_regions] */
    struct device *device;    /* whose memory they are; NULL: host memory */
};

/* The stepping thread's own. */
#define STEP_RECENT 64u
struct stepping {
    struct gate_local gate;
    void *stream;                     /* of the present step, or of the boundary before it */
    struct err device;                /* code != 0: what went wrong with the device at this boundary */
    struct view_box *view, *previous; /* NULL: a spare, or left */
    enum page_engine_state state;     /* as the page shows it */
    uint64_t hold_since_ns;           /* 0 = not held */
    uint64_t began_ns;
    uint64_t recent[STEP_RECENT];
    unsigned n_recent;
    uint64_t notified;                /* notify_done that has been rung for */
    uint64_t left_epoch;              /* EEP_STEP_LEFT has been said for it */
    uint64_t broken_view;             /* eep_step_failed was called in it: nothing begins before the next view */
    bool view_changed, map_changed;   /* to be told with the next step */
};

struct eep {
    /* constant after eep_attach */
    int wake_fd, bell_fd, load_fd, revoke_fd, stop_fd;
    struct control_page *page;
    size_t page_bytes;
    struct device *device; /* NULL: the weights are host memory */
    uint32_t max_ranks, moe_layers, logical_experts;
    char *seals;
    char agent[64], *path;
    uint64_t incarnation; /* of the agent; 0: no process of it comes back */
    uint32_t dispatch;
    bool masks;
    uint64_t kv_bytes;
    void (*on_event)(void *user, const struct eep_event *event);
    void *user;
    pthread_t thread;

    struct stepping step;

    struct engine_reader reader;
    struct {
        struct blob *manifest;
        uint32_t total, got;
        int *fds;
    } incoming; /* regions that have not all come yet */
    struct {
        uint32_t orphan_ms, held_ms;
    } patience; /* how long to wait for the agent's next process; 0: not at all */
    bool cut;   /* the agent has cut us off: it is not waited for */

    pthread_mutex_t send_lock;
    struct engine_writer writer; /* under send_lock */
    int sock;                    /* changed under send_lock, by libeep's thread alone; -1: the agent is away */

    pthread_mutex_t lock;
    pthread_cond_t cond; /* a commit, an answer, or the end has come */
    /* under lock */
    char dead_why[256];
    char *endpoint;
    uint64_t losses;             /* how often the agent's process was lost: its answers are, with it */
    struct commit *commits;      /* decided, not switched to yet; ascending epochs */
    struct map_update *updates;  /* ascending versions */
    struct regions *regions;     /* mapped and complete */
    struct maps_box *all_maps;
    struct regions *building;    /* between LOAD and seal */
    bool building_void;          /* another LOAD came: it goes when the engine allocates anew */
    struct blob *sealing;        /* its manifest, while the agent seals it */
    uint32_t load_slots;
    bool waiting;                /* region_alloc or seal is waiting for its answer */
    bool answered;
    int answer_code, answer_fd;
    char answer_text[256];
    /* end of lock */

    _Atomic(struct maps_box *) maps; /* of the present regions, or NULL */
    atomic_bool dead;
    atomic_bool leaving;             /* eep_detach has begun: the end of the connection is no news */
    atomic_bool in_step;             /* set before the gate is read, cleared when the step is left */
    atomic_bool user_wake;           /* eep_wake since it was last answered */
    atomic_bool left_owed;           /* a revoke waits for left_step; who takes it sends it */
    atomic_bool orphan;              /* the agent is away: what is sent is dropped, and said again if it still counts */
    /* What is said again to an agent that is back, if its view is still in use; epoch last. */
    _Atomic uint64_t view_epoch;     /* in use; 0 = none */
    _Atomic uint64_t wave_step, wave_view;
    _Atomic uint64_t failed_step, failed_view;

    /* figures of this attachment; written by the stepping thread */
    _Atomic uint64_t steps, flips, holds, longest_hold_ns, boundary_syscalls;
    _Atomic uint64_t hold_histogram[PAGE_HISTOGRAM];
};

#define DRAIN_MS 5000 /* for steps that were launched, before what they use goes */

/* ---- attach.c ---- */
int eep_fail(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3))); /* sets eep_last_error */
int eep_fail_err(const struct err *err);
int eep_fail_dead(struct eep *eep);
/* Sends one message; any thread, none of the locks held. */
int link_send(struct eep *eep, Eep__Engine__EngineUp *up, struct err *err);
/* The same with send_lock held, also while the agent is away. */
int link_send_locked(struct eep *eep, Eep__Engine__EngineUp *up, struct err *err);
/* A connection to the agent's socket that does not wait for room in its queue. */
int link_open(const char *path, int *ret_sock, struct err *err);
/* What the engine is; borrows from eep, under lock. */
void attach_fill(const struct eep *eep, Eep__Engine__Attach *ret_body);

/* ---- orphan.c; libeep's thread ---- */
/* The connection has ended (why: *err).  0: the agent is back, and what may have got lost is said; else the end: *err says
 * of what, ERR_ABORTED = eep_detach was called. */
int orphan_wait(struct eep *eep, struct err *err);

/* ---- receive.c ---- */
void *receive_main(void *eep);
void wake_stepping(struct eep *eep);
/* Tells the agent that no step of the revoked view runs any more, if nobody has told it yet. */
bool left_step_claim(struct eep *eep);
void left_step_send(struct eep *eep, uint64_t step, uint64_t failed_view); /* 0: it did not fail by itself */
void wave_send(struct eep *eep, uint64_t view, uint64_t step);
void incoming_drop(struct eep *eep);

/* ---- view.c; under lock ---- */
void commit_add(struct eep *eep, struct commit *commit);
/* The view of `epoch`, to which nothing is owed any more (older commits are dropped); NULL: not here. */
struct view_box *commit_take(struct eep *eep, uint64_t epoch);
/* Our rank in the committed view; false: not here. */
bool commit_rank(struct eep *eep, uint64_t epoch, int32_t *ret_rank);
void update_add(struct eep *eep, struct map_update *update);
/* The newest update with a version <= limit, and drops older ones; NULL: none. */
struct map_update *update_take(struct eep *eep, uint64_t limit);
void update_free(struct map_update *update);

/* ---- maps.c ---- */
/* Makes the arrays for the shape of `manifest` the current ones; libeep's thread or the sealing one, under lock. */
int maps_install(struct eep *eep, const struct manifest *manifest, struct err *err) MUST_CHECK;
bool maps_fit(const struct maps_box *maps, const struct routing *routing);
/* Rewrites the arrays in place; stepping thread. */
void maps_write(struct maps_box *maps, const struct routing *routing);
/* The device's copies, in the order of the stream; nothing on the host. */
int maps_write_device(struct eep *eep, struct maps_box *maps, void *stream, struct err *err) MUST_CHECK;
void maps_free_all(struct eep *eep);

/* ---- seal.c; under lock ---- */
/* The agent has sealed: what was built becomes the weights of this rank. */
int seal_finish(struct eep *eep, struct err *err) MUST_CHECK;

/* ---- regions.c; under lock ---- */
int region_map(struct device *device, int fd, size_t bytes, const char *name, struct mapping *ret_mapping,
               struct err *err) MUST_CHECK;
void region_unmap(struct device *device, struct mapping *mapping);
void regions_free(struct regions *regions);
/* Takes fds over (closes them). */
int regions_install(struct eep *eep, struct blob *manifest, const int *fds, uint32_t n, struct err *err) MUST_CHECK;

#endif
