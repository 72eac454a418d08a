/* The agent's core: a function of (state, event) that appends actions.  No sockets, clocks, threads, CUDA or
 * protobuf inside; the loop thread of eep-agent drives it, and so does the simulator.
 *
 * It keeps: the connection to the coordinator (up, welcomed, lease), the applied view and map, the operation
 * in progress and its machine, the promise that is outstanding, the flip that is not applied yet, and what it
 * has asked the worker and the engine to do.  It never touches the control page: an event carries a snapshot,
 * and writes to the page are actions in an order that matters.
 *
 * A core can be saved and restored: a process that dies is followed by one that goes on as the same incarnation.
 *
 * The protocol is that of docs/protocol.md. */
#ifndef EEP_AGENT_CORE_H
#define EEP_AGENT_CORE_H

#include "agent/machines.h"
#include "agent/record.h"
#include "common/msg.h"
#include "common/page.h"

struct agent_core;

struct agent_config {
    char id[AGENT_ID_MAX];
    uint64_t incarnation;
    char address[ADDRESS_MAX], data_address[ADDRESS_MAX];
    uint32_t node;
    uint32_t slots;
    bool can_load;             /* a checkpoint is configured (an attached engine that seals can load too) */
    uint32_t layers, logical;  /* shape of that checkpoint (MoE layers, experts per layer); 0 = none */
    uint32_t lead_steps_min;   /* K is at least this; 2 */
    uint64_t step_limit_ns;    /* how long RESET waits for an engine to leave its step before it is detached; 5 s */
    uint64_t hang_ns;          /* a step that takes longer is given up, by a RESET of the view; 0 = none is */
};

/* What the worker thread does for the core.  Each is answered by AE_WORK_DONE with the same id. */
enum work_kind {
    WORK_ALLOCATE = 1, /* model: allocate regions for its manifest */
    WORK_LOAD,         /* map, self: read the manifest and the experts of `held` at party self from the checkpoint */
    WORK_GROUP_ID,     /* make a unique id (result blob) */
    WORK_GROUP,        /* blob, parties, self: create and warm the group */
    WORK_WEIGHTS,      /* plan, parties, self: dense to joiners, moves of round 0; verify what arrived */
    WORK_FILL,         /* plan, round: moves of that round; verify what arrived */
    WORK_GROUP_DESTROY,
    WORK_RELEASE,      /* free the regions (leaver, aborted joiner, evicted) */
    WORK_VERIFY,       /* map, rank: every held slot and dense region against the digests */
    WORK_RELOAD,       /* model, map, self, sources, load: read the experts of `held` at party self, from where they
                          are, into regions that are there; verify */
};

struct work {
    uint64_t id;
    enum work_kind kind;
    uint64_t op;
    uint32_t round, self, n;
    uint64_t bandwidth;      /* FILL: bytes per second into a rank; 0 = no limit */
    uint32_t dense_from;     /* WEIGHTS: parties < dense_from hold the dense weights already (senders) */
    struct member *parties;  /* [n], owned */
    struct member *sources;  /* RELOAD: [n_sources], owned; the first n_holders have weights, the others a checkpoint */
    uint32_t n_sources, n_holders;
    bool load;               /* RELOAD: from this agent's own checkpoint, too */
    struct model *model;     /* references, or NULL */
    struct plan *plan;
    struct expert_map *map;
    struct blob *blob;
};
void work_done(struct work *work);
const char *work_kind_name(enum work_kind kind); /* "WEIGHTS" */

enum agent_event_type {
    AE_LINK_UP = 1, /* connected to the coordinator: HELLO goes out */
    AE_LINK_DOWN,
    AE_MSG,         /* msg (borrowed) */
    AE_TICK,        /* a deadline of agent_core_deadline may have passed */
    AE_PAGE,        /* the answer to an action with want_page */
    AE_BELL,        /* the engine rang: it flipped, applied a map, reached notify_done, became idle or was held */
    AE_WORK_DONE,
    AE_WORK_PROGRESS, /* value = bytes received so far; bytes = how many there will be, 0 = not known */
    AE_ENGINE_ATTACHED,
    AE_ENGINE_DETACHED, /* text = why; the engine process ended or said goodbye */
    AE_ENGINE_PREPARED, /* op, attempt; code != 0: it could not */
    AE_ENGINE_DRAINED,
    AE_ENGINE_SEALED,   /* model: layout and digests of the regions that the engine filled (cold start) */
    AE_ENGINE_LEFT_STEP,/* the engine is out of step `value`: after a revoke, or (epoch != 0) it failed in view `epoch` */
    AE_ENGINE_RELEASED, /* the engine has unmapped the regions (answer to AA_ENGINE_RELEASE; implied by a detach) */
    AE_ENGINE_WAVE,     /* the engine starts a wave with step `value` */
    AE_PEER_WAVE,       /* a peer agent's engine, in view `epoch`, starts a wave with step `value` */
    AE_ENGINE_ENDPOINT, /* endpoint: the attached engine is reached elsewhere from now on */
    AE_ENGINE_RESUMED,  /* after a re-adoption: the engine of before is back; epoch = the view it is in, value = its map;
                           regions, and the fields of ATTACHED */
    AE_STOP,            /* SIGTERM */
};

struct agent_event {
    enum agent_event_type type;
    struct page_snapshot page; /* valid in every event */
    const struct msg *msg;
    uint64_t work_id, op, attempt, value, epoch, bytes;
    uint64_t bad;            /* AE_WORK_DONE of a WORK_VERIFY: mismatches (value = slots checked) */
    int code;
    const char *text;        /* borrowed; may be NULL */
    struct blob *blob;       /* borrowed */
    struct model *model;     /* borrowed */
    /* AE_ENGINE_ATTACHED (AE_ENGINE_ENDPOINT: endpoint) */
    uint32_t dispatch;
    const char *endpoint;
    uint64_t kv_bytes;       /* NO_LIMIT = not profiled */
    bool seals;              /* it brings its own layout and fills it itself */
    bool masks;              /* it serves on without experts that the map does not have */
    uint32_t layers, logical;/* of a sealing engine's model; HELLO and MSG_ENGINE report them */
    bool regions;            /* AE_ENGINE_RESUMED: it has the weights mapped */
};

enum agent_action_type {
    AA_SEND = 1,      /* msg to the coordinator */
    AA_PAGE,          /* store `value` in `word`; with want_page, come back with AE_PAGE before anything else */
    AA_WAKE,          /* wake the engine (eventfd) */
    AA_WORK,          /* hand to the worker (FIFO) */
    AA_WORK_CANCEL,   /* stop what the worker is doing; it answers ERR_ABORTED for everything of operation op */
    AA_ENGINE_PREPARE,/* view, op, attempt, value = ms: build communicators for it, answer prepared by then */
    AA_ENGINE_COMMIT, /* view, step: it is decided; sent before the page words that make it visible */
    AA_ENGINE_ABORT,  /* op: drop what was prepared */
    AA_ENGINE_MAP,    /* map (for this agent's rank), sent before PAGE_MAP_PENDING */
    AA_ENGINE_DRAIN,  /* value = deadline in ms */
    AA_ENGINE_REVOKE, /* epoch, text: leave the step, the communicators are void */
    AA_ENGINE_REGIONS,/* the weights are allocated: give the engine their descriptors */
    AA_ENGINE_RELEASE,/* stop using the regions, unmap, answer released */
    AA_ENGINE_LOAD,   /* map, self: cold start of a sealing engine: allocate, fill, seal */
    AA_ENGINE_DETACH, /* text: cut it off */
    AA_ENGINE_LEASE,  /* should we die: how long it may wait to be re-adopted, value = ms; epoch = ms while it is held */
    AA_ENGINE_RESUME, /* the answer to AE_ENGINE_RESUMED: it is ours again, before anything else is said to it */
    AA_PEER_WAVE,     /* tell the members of the applied view: epoch, value = step */
    AA_TRANSITION,    /* role, from, to, event, op, epoch: for the log, and for tests */
    AA_LOG,           /* level, text, epoch in use, op (0 = none) */
    AA_RECONNECT,     /* drop the connection to the coordinator and connect again (illegal message, lease) */
    AA_EXIT,          /* value = exit status: evicted (restart me as a new incarnation), or stop complete */
};

struct agent_action {
    enum agent_action_type type;
    struct msg msg;
    enum page_word word;
    bool want_page;
    uint64_t value, epoch, op, attempt;
    uint32_t self;
    struct work work;
    struct view *view;
    struct expert_map *map;
    enum op_role role;
    enum machine_state from, to;
    enum machine_event event;
    int level;
    char text[256];
};

enum agent_log_level { AGENT_LOG_DEBUG = 0, AGENT_LOG_INFO, AGENT_LOG_WARN, AGENT_LOG_ERROR };

/* Values of AA_EXIT. */
enum agent_exit {
    AGENT_EXIT_STOPPED = 0, /* SIGTERM, and nothing is held any more */
    AGENT_EXIT_EVICTED = 3, /* this incarnation is out: start again as a new one */
    AGENT_EXIT_READOPT = 75, /* this process cannot go on, but its weights can: not from the core; also the exit status */
};

/* A growable array of actions that the caller owns.  The caller performs them in order. */
struct agent_actions {
    struct agent_action *v;
    size_t n, cap;
};
void agent_actions_clear(struct agent_actions *actions); /* drops what they own, keeps the array */
void agent_actions_done(struct agent_actions *actions);

struct agent_core *agent_core_new(const struct agent_config *config, uint64_t now_ns);
void agent_core_free(struct agent_core *core);

/* What a restarted process needs to go on as this incarnation; the references are borrowed.  To be kept after every step,
 * before its actions are performed: what an action does must never be more than the record knows. */
void agent_core_save(const struct agent_core *core, struct agent_record *ret_record);
/* A core of the record's incarnation (config->incarnation is ignored) that re-adopts what it held.  The record must be
 * `held`.  The first HELLO waits until the engine has come back (AE_ENGINE_RESUMED), for a short while. */
struct agent_core *agent_core_restore(const struct agent_config *config, const struct agent_record *record,
                                      uint64_t now_ns);

/* One event.  `now_ns` is monotonic.  Appends to out. */
void agent_core_step(struct agent_core *core, uint64_t now_ns, const struct agent_event *event,
                     struct agent_actions *out);
/* When AE_TICK is wanted next; UINT64_MAX = never. */
uint64_t agent_core_deadline(const struct agent_core *core);

/* For status, tests and the simulator. */
struct agent_status {
    enum machine_state state;
    enum op_role role;
    uint64_t op, applied_epoch, promised_epoch, limit, map_version;
    bool linked, welcomed, engine, flip_pending;
    bool resuming;             /* re-adopted, and the engine is not back yet */
    const struct view *view;   /* applied, borrowed; NULL for a spare */
};
void agent_core_status(const struct agent_core *core, struct agent_status *ret_status);

/* What another agent may read here: the slot of this rank that holds the expert, or -1.  manifest: of its weights. */
int32_t agent_core_slot(const struct agent_core *core, uint64_t manifest, uint32_t layer, uint32_t expert);

/* Mistakes that the simulator plants, one at a time, to prove that it finds them.  0 in production: no file
 * outside tests/ sets it. */
enum agent_bug {
    AGENT_BUG_NONE = 0,
    AGENT_BUG_NO_REREAD,          /* gate written, intent not read again */
    AGENT_BUG_GATE_BEFORE_FLIP,   /* GO opens the gate before it writes the flip */
    AGENT_BUG_GO_NEXT_BOUNDARY,   /* GO applied at the next boundary instead of at S */
    AGENT_BUG_ATTACH_CLEARS_GATE, /* re-attachment opens the gate */
    AGENT_BUG_HOLD_TIMES_OUT,     /* a hold that times out and runs on */
    AGENT_BUG_RUN_TO_NOT_RAISED,  /* run_to not raised to S + 1 */
    AGENT_BUG_EARLY_FLIPPED,      /* FLIPPED at boundary S before the flip is applied */
    AGENT_BUG_MAP_ACK_FIRST,      /* the map is acknowledged before the engine has it */
    AGENT_BUG_DUPLICATE_GO_OPENS_GATE,
    AGENT_BUG_NO_GRACE,           /* GRACE answered at once */
    AGENT_BUG_GRACE_BEGUN,        /* GRACE answered when step T has begun, not when T - 1 is completed */
    AGENT_BUG_FAILURE_UNSAID,     /* a step that failed by itself is not reported */
    AGENT_BUG_DIGEST_UNCHECKED,   /* a fill that did not verify is reported as done */
    AGENT_BUG_RESTORE_OPENS_GATE, /* a re-adopting agent opens the gate although it has promised */
};
void agent_core_plant(struct agent_core *core, enum agent_bug bug);

#endif
