/* libeep: what an inference engine links to take part in elastic expert parallelism.
 *
 * The agent of this GPU owns the weights; the engine maps them without a copy, learns which expert lies where, and
 * passes step boundaries.  A step boundary with nothing pending makes no system call.
 *
 * Memory: the weights lie where the agent keeps them, in host memory or on one GPU.  What holds pointers to them says
 * which, in a field `device`: -1 = host, else the CUDA device ordinal in this process, and then they are device pointers
 * in the primary context of that device.  libeep loads libcuda at run time, uses that primary context, creates none of
 * its own, and leaves the calling thread's current context as it was.
 *
 * Streams: `void *stream` is a CUstream or cudaStream_t of that device, NULL with weights on the host.  eep_step_end
 * with a stream says that all work of the step has been launched; the device says when it is complete, so step n + 1 may
 * be begun and launched while n runs, up to 64 steps.  Work on other streams must be joined into this one before
 * eep_step_end; when the stream is another one than the last step's, libeep orders the two.  NULL on a GPU means that
 * the caller waits itself: all work of the step is complete when eep_step_end is called.  (The default stream is
 * CU_STREAM_LEGACY or CU_STREAM_PER_THREAD here.)  Boundaries lie outside of graph capture.
 *
 * Threads: eep_step_begin, eep_step_end, eep_step_failed and reading the maps belong to one thread, the stepping
 * thread.  Everything else may be called from any thread.  libeep runs one thread of its own, which talks to the agent
 * and calls `on_event`; the callback must not block for long and must not call eep_detach.
 *
 * An agent's process that dies is no event: the engine goes on in its view, and is taken up again by the next process.  What
 * is answered meanwhile (eep_prepared, eep_drained) returns 0 and is dropped, since its operation is aborted.
 *
 * Errors: functions return 0 or a negative code (see eep_strerror) and leave a sentence in eep_last_error(). */
#ifndef EEP_H
#define EEP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EEP_VERSION_MAJOR 0
#define EEP_VERSION_MINOR 1
#define EEP_API __attribute__((visibility("default")))

struct eep;

/* How the engine's dispatch reads the expert map.
 * SOURCE_ROUTED: the sending rank maps logical to physical; ranks may use different maps for a moment.
 * REPLICATED: each rank recomputes the routing of all tokens; all maps agree in every step. */
enum eep_dispatch { EEP_DISPATCH_SOURCE_ROUTED = 1, EEP_DISPATCH_REPLICATED = 2 };

enum eep_event_kind {
    EEP_EVENT_REGIONS = 1, /* the weights are allocated and mapped: eep_model_get, eep_tensor_get, eep_maps_get work
                              from now on; contents are valid only in slots that the maps of a committed view name */
    EEP_EVENT_LOAD,        /* cold start of an engine that seals its own layout: allocate, fill load_map's slots, eep_seal */
    EEP_EVENT_PREPARE,     /* build communicators for `view` in the background; answer eep_prepared(op, attempt) within
                              deadline_ms, with an error if a peer has not come: who says nothing is the one to blame */
    EEP_EVENT_ABORT,       /* drop what was prepared for `op` */
    EEP_EVENT_DRAIN,       /* finish or hand back requests within deadline_ms; answer eep_drained */
    EEP_EVENT_REVOKE,      /* a member of the view is gone: abort the communicators, leave the step, call eep_step_failed.
                              With streams: abort them from the callback or a thread of your own, since the stepping
                              thread may stand in eep_step_begin while an older step hangs on the device */
    EEP_EVENT_RELEASE,     /* this rank has left: stop using the regions, answer eep_released; they are unmapped then */
    EEP_EVENT_DETACHED,    /* the agent is gone for good or has cut us off: only eep_detach is left */
};

struct eep_member {
    const char *agent;    /* agent id */
    const char *endpoint; /* the engine's own word, opaque to eep */
    bool serving, draining;
};
/* The topology of an epoch.  Immutable; valid until the next view has been used for a step, or eep_view_ref'd. */
struct eep_view {
    uint64_t epoch; /* 0 while proposed (PREPARE) */
    uint32_t n;     /* ranks */
    int32_t rank;   /* ours; -1 when this rank leaves */
    uint64_t kv_bytes;
    const struct eep_member *members; /* [n] */
    /* physical_to_logical_map of this view when it was made, [layers][n * slots_per_rank]; -1 = nothing routed */
    const int32_t *physical_to_logical_map;
};
EEP_API const struct eep_view *eep_view_ref(const struct eep_view *view);
EEP_API void eep_view_unref(const struct eep_view *view);

struct eep_event {
    enum eep_event_kind kind;
    uint64_t op, attempt, epoch;
    uint32_t deadline_ms;
    const struct eep_view *view; /* PREPARE: borrowed, eep_view_ref to keep */
    /* LOAD: logical expert per slot, [layers][slots]; -1 = leave empty.  Borrowed.  The engine knows layers and experts of
       its model; slots_per_rank is given here. */
    const int32_t *load_map;
    uint32_t load_layers, load_slots;
    const char *text;
};

struct eep_options {
    const char *socket;        /* the agent's engine socket; NULL = $EEP_SOCKET */
    const char *endpoint;      /* published in the view; how routers and peers reach this engine */
    enum eep_dispatch dispatch;
    uint64_t kv_bytes;         /* available for KV cache; UINT64_MAX = not profiled */
    uint32_t max_ranks;        /* map arrays are shaped for this many; 0 = 64 */
    uint32_t moe_layers, logical_experts; /* a sealing engine's model; 0 otherwise (known from the manifest) */
    const char *seals;         /* NULL: use the layout of the checkpoint loader; else the name of this engine's own layout */
    void (*on_event)(void *user, const struct eep_event *event);
    void *user;
    /* The engine serves on without masked experts: those whose logical_replica_count is 0 in a committed map, because
     * every rank that had them is gone and they are still being read from the checkpoint.  Its router must leave them
     * out, and choose among the others.  false: such a view is held until it has every expert. */
    bool masks;
};

/* Attaches to the agent.  Blocks until the handshake is done (at most 5 s). */
EEP_API int eep_attach(const struct eep_options *options, struct eep **ret_eep);
/* Says goodbye, unmaps everything, joins libeep's thread.  Takes NULL.  On a GPU it first waits for the steps that were
 * launched, at most 5 s; if they still run then, what they may use stays mapped until the process ends. */
EEP_API void eep_detach(struct eep *eep);
EEP_API const char *eep_strerror(int code);
EEP_API const char *eep_last_error(void); /* of this thread */
/* Where the weights lie: -1 = host memory, else the CUDA device ordinal.  Constant from eep_attach on. */
EEP_API int eep_device(struct eep *eep);

/* ---- weights ---- */
struct eep_model {
    uint32_t layers, logical, slots; /* MoE layers, experts per layer, slots per rank */
    int device;                      /* as eep_device */
    const char *config;              /* the model's description (config.json) or NULL */
    const char *producer;
};
EEP_API int eep_model_get(struct eep *eep, struct eep_model *ret_model); /* after EEP_EVENT_REGIONS */

struct eep_tensor {
    void *data;          /* fixed address for as long as the regions live */
    int device;          /* -1: host memory; else `data` is a pointer of this device */
    const char *dtype;   /* as in safetensors */
    uint32_t dims;
    uint64_t shape[6];   /* expert parts: [slots, ...] */
    uint64_t stride;     /* expert parts: bytes from slot to slot; dense: 0 */
};
/* By name; an expert part is "layers.<moe layer>.experts.<part>". */
EEP_API int eep_tensor_get(struct eep *eep, const char *name, struct eep_tensor *ret_tensor);

/* Producing a layout (between EEP_EVENT_LOAD and eep_seal).  Regions are memory of the agent.  eep_region_alloc and
 * eep_seal block until the agent has answered, one call at a time; not from the event callback.  On a GPU (eep_device)
 * *ret_data is a device pointer, and what the engine copies there must be complete before eep_seal. */
struct eep_region_spec {
    const char *name;
    bool expert;
    uint64_t bytes;                     /* dense */
    uint32_t layer; const char *part;   /* expert: MoE layer, and which part */
    uint32_t slots; uint64_t stride, slot_bytes;
    /* one tensor that spans the region (expert: one slot of it); more with eep_tensor_add */
    const char *dtype; uint32_t dims; uint64_t shape[6];
};
EEP_API int eep_region_alloc(struct eep *eep, const struct eep_region_spec *spec, void **ret_data);
EEP_API int eep_tensor_add(struct eep *eep, const char *region, const char *name, uint64_t offset, const char *dtype,
                           uint32_t dims, const uint64_t *shape);
/* All regions are filled: the agent takes digests of all of it, which takes as long as reading it once.  A layout whose
 * transform of one expert depends on other experts must not be sealed.  config may be NULL. */
EEP_API int eep_seal(struct eep *eep, const char *config);

/* ---- answers to events; they block only while the agent does not read (at most 5 s) ---- */
EEP_API int eep_prepared(struct eep *eep, uint64_t op, uint64_t attempt, int code, const char *why); /* code 0 = yes */
EEP_API int eep_drained(struct eep *eep);
EEP_API int eep_released(struct eep *eep); /* waits for launched steps (at most 5 s), unmaps the regions */
/* A changed endpoint. */
EEP_API int eep_set_endpoint(struct eep *eep, const char *endpoint);

/* ---- maps ---- */
/* Fixed addresses for the life of the attachment; rewritten at boundaries only.  Empty entries are -1.
 *
 * An engine sends a token to one of the first logical_replica_count entries of its expert, each equally likely.  A slot
 * may stand among them more than once: it is to get so many times the share.  So the count is of entries, at least that
 * of the replicas; max_replicas is max_ranks, or 64 where that is more.  Every slot comes once before any comes twice.
 * With 0 entries the expert is masked (eep_options.masks). */
struct eep_maps {
    uint32_t layers, logical, slots, max_ranks, max_replicas;
    uint64_t version;
    int32_t *physical_to_logical_map; /* [layers][max_ranks * slots]; rank r's slot s is r * slots + s */
    int32_t *logical_to_physical_map; /* [layers][logical][max_replicas] */
    int32_t *logical_replica_count;   /* [layers][logical]: entries in use */
    uint64_t *expert_load;            /* [layers][slots]: the engine adds tokens it computed; read by the agent */

    /* On a GPU (device >= 0; NULL otherwise) the same on the device, at fixed addresses, so that captured graphs stay
       valid.  Rewritten in the order of the stream that eep_step_begin is given, before the work of that step; the
       arrays above change at once, while older steps may still run.  Kernels add to device_expert_load, and the host's
       counters are overwritten with it in the order of the stream at eep_step_end. */
    int device;
    int32_t *device_physical_to_logical_map, *device_logical_to_physical_map, *device_logical_replica_count;
    uint64_t *device_expert_load;
};
EEP_API const struct eep_maps *eep_maps_get(struct eep *eep); /* NULL before EEP_EVENT_REGIONS */

/* ---- steps ---- */
enum eep_step_result {
    EEP_STEP_RUN = 1,  /* run step `step` now, in `view` */
    EEP_STEP_IDLE = 2, /* nothing to run within timeout_ms, or woken by eep_wake: look for requests and call again */
    EEP_STEP_LEFT = 3, /* this rank is not in the view any more; EEP_EVENT_RELEASE follows or has come */
};
struct eep_step {
    uint64_t step, wave;
    const struct eep_view *view; /* borrowed, valid during the step */
    bool view_changed;           /* first step in it: switch to the prepared communicators now (commit) */
    bool map_changed;
    uint64_t held_ns;            /* how long this boundary held the engine; 0 = not at all */
};
/* Begins the next step, or says that there is none.  has_work: this engine has requests to run.  timeout_ms: how long to
 * wait when idle; 0 = do not wait, -1 = until woken.  stream: see the head of this file; map updates go to it. */
EEP_API int eep_step_begin(struct eep *eep, void *stream, bool has_work, int timeout_ms, struct eep_step *ret_step);
/* The step is complete, or with a stream: launched.  any_work: some rank of the view still has requests (the engines agree on it inside the step). */
EEP_API int eep_step_end(struct eep *eep, void *stream, bool any_work);
/* The step failed: its all-to-all lost a member.  Its requests are retried in a later step; the number is not used
 * again.  With a stream, what was launched of it counts until the stream has come to this point: the communicators must
 * have been aborted, or that never is. */
EEP_API int eep_step_failed(struct eep *eep);
/* Ends a wait in eep_step_begin.  Any thread; async-signal-safe. */
EEP_API void eep_wake(struct eep *eep);
/* Readable while the current view is revoked. */
EEP_API int eep_revoke_fd(struct eep *eep);
EEP_API bool eep_revoked(struct eep *eep);

/* ---- figures ---- */
struct eep_stats {
    uint64_t steps, flips, holds, longest_hold_ns, boundary_syscalls;
    uint64_t hold_histogram[40]; /* bucket i: [2^i, 2^(i+1)) ns */
};
EEP_API void eep_stats_get(struct eep *eep, struct eep_stats *ret_stats);

#ifdef __cplusplus
}
#endif
#endif
