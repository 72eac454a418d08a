/* Messages between coordinator and agent, as plain structs: what the two pure cores and the simulator speak.
 * proto/agent.proto is the same on the wire; common/msg_wire.c converts.
 *
 * Pointers inside a message are references that the message owns (msg_done drops them).
 *
 * Rules of a connection: it is FIFO; the agent's first message is HELLO; the coordinator sends nothing on a
 * connection before it has processed that HELLO, and WELCOME is the first thing it sends.
 *
 * One operation, as messages (scale up; -> is coordinator to agent):
 *
 *   -> OP_BEGIN            to every party: role, parties, model           agents enter their machines
 *   -> STAGE ALLOCATE      to new parties            <- STAGE_DONE        = NEW_CORE_ENGINES_INIT_READY
 *   -> STAGE GROUP_ID      to one party              <- STAGE_DONE(blob)
 *   -> NOTIFY INIT_READY   to existing parties
 *   -> STAGE GROUP         to all parties            <- STAGE_DONE        standby group is warm
 *   -> STAGE MAPPING       to all parties: the plan  <- STAGE_DONE        = WEIGHTS_INIT_READY (from the new ones)
 *   -> NOTIFY WEIGHTS_INIT_READY to existing parties
 *   -> STAGE WEIGHTS       to all parties            <- STAGE_DONE        dense + round 0, verified by digest
 *   -> STAGE KV            to members of the target  <- STAGE_DONE(value = bytes for KV cache, NO_LIMIT if unknown)
 *   -> STAGE ENGINE_PREPARE to members of the target <- STAGE_DONE        the engine answered `prepared`
 *   -> PREPARE             to old and new members    <- PROMISE | REFUSE
 *   (journal: COMMIT)
 *   -> GO                  to old and new members    <- FLIPPED
 *   -> NOTIFY RECONFIGURE_FINISHED, DISMISS
 *   per round after the commit (scale down: before it, and with the leavers' DRAIN beside it):
 *     -> MAP               to serving members        <- MAP_ACK           activates the last round, retires this one
 *     -> STAGE GRACE(T)    to holders of retired     <- STAGE_DONE        engine has completed step T-1
 *     -> STAGE FILL(round) to all parties            <- STAGE_DONE        moved and verified
 *   -> OP_END                                         the machines reach COMPLETE
 * Any time before the decision: -> OP_ABORT (and ABORT for an open epoch); the machines reach ABORTED.
 *
 * A repeated command (same op, stage, round, attempt) repeats the same answer; it does not repeat the work.
 */
#ifndef EEP_COMMON_MSG_H
#define EEP_COMMON_MSG_H

#include "common/topology.h"

enum msg_type {
    /* agent to coordinator */
    MSG_HELLO = 1,
    MSG_HEARTBEAT,
    MSG_ENGINE,     /* the engine attached, changed its endpoint, detached or died */
    MSG_STAGE_DONE,
    MSG_PROGRESS,
    MSG_PROMISE,
    MSG_REFUSE,
    MSG_FLIPPED,
    MSG_MAP_ACK,
    MSG_VERIFIED,
    MSG_LEAVE,      /* SIGTERM of an agent: asks to be drained */
    MSG_LOAD,       /* tokens per slot of a window */
    /* coordinator to agent */
    MSG_WELCOME = 32,
    MSG_EVICTED,    /* this incarnation is out: revoke and detach the engine, drop the weights, start anew */
    MSG_OP_BEGIN,
    MSG_STAGE,
    MSG_NOTIFY,
    MSG_OP_END,
    MSG_OP_ABORT,
    MSG_PREPARE,
    MSG_GO,
    MSG_ABORT,
    MSG_DISMISS,
    MSG_MAP,
    MSG_VERIFY,
};

enum op_kind { OP_START = 1, OP_SCALE_UP, OP_SCALE_DOWN, OP_REPAIR, OP_REBALANCE };
/* OP_START is the cold start: every party is new and loads from the checkpoint, or its engine seals.  OP_REBALANCE
 * keeps the members: GROUP_ID, GROUP, MAPPING, the rounds, OP_END; every party is ROLE_REMAINING. */

enum op_role { ROLE_EXISTING = 1, ROLE_NEW, ROLE_REMAINING, ROLE_REMOVING };

enum op_stage {
    STAGE_ALLOCATE = 1, /* memory for the manifest; in a cold start also load (or have the engine seal) */
    STAGE_GROUP_ID,     /* make the group's unique id; secret, never logged */
    STAGE_GROUP,        /* create and warm the group over the parties, in the background */
    STAGE_MAPPING,      /* take and check target map and plan */
    STAGE_WEIGHTS,      /* dense to the joiners, and round 0 */
    STAGE_KV,           /* how many bytes the engine has for KV cache */
    STAGE_ENGINE_PREPARE, /* the engine builds its communicators for the proposed view */
    STAGE_DRAIN,        /* the leaver's engine finishes or hands back its requests */
    STAGE_GRACE,        /* wait until the engine has completed step `step` - 1 */
    STAGE_FILL,         /* the moves of one round */
    STAGE_LET_GO,       /* answered after DISMISS: a leaver has released everything = SHUTDOWN_COMPLETE */
    STAGE_RELOAD,       /* repair, all promised: read the experts of `map` again, from where they are, verify them */
    STAGE_MAX
};

enum notify_type {
    NOTIFY_NEW_CORE_ENGINES_INIT_READY = 1,
    NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY,
    NOTIFY_RECONFIGURE_FINISHED,
    NOTIFY_SHUTDOWN_COMPLETE,
};

/* How the engine's dispatch reads the map. */
enum dispatch_kind { DISPATCH_NONE = 0, DISPATCH_SOURCE_ROUTED, DISPATCH_REPLICATED };

enum flip_kind {
    FLIP_VIEW = 1, /* membership changes */
    FLIP_MAP,      /* same members, another map: replicated dispatch */
    FLIP_RESET,    /* repair: only the survivors promise, engines leave their step */
};

/* What the engine was doing when its agent promised. */
enum promise_engine { PROMISE_JOINER = 0, PROMISE_DETACHED, PROMISE_IDLE, PROMISE_RUNNING };

struct msg_hello {
    char id[AGENT_ID_MAX];
    uint64_t incarnation;
    char address[ADDRESS_MAX], data_address[ADDRESS_MAX];
    uint32_t node;
    uint32_t slots;          /* expert slots per layer that it has room for; 0 = as the cluster says */
    bool can_load;           /* it has a checkpoint, or its engine seals: fit for a cold start */
    uint32_t layers, logical;/* can_load: the shape of what it would load (MoE layers, experts per layer) */
    uint64_t op;             /* operation it is in, 0 = none: one that the coordinator does not know is aborted */
    uint64_t applied_epoch;  /* last epoch whose GO it took; 0 = none (a spare) */
    uint64_t promised_epoch; /* 0 = none outstanding */
    uint64_t limit, next, wave;
    uint32_t engine;         /* enum promise_engine */
    uint64_t map_version;
    uint32_t dispatch;       /* enum dispatch_kind of the attached engine; DISPATCH_NONE = no engine */
    bool masks;              /* it serves on without experts that a map does not have */
    char endpoint[ENDPOINT_MAX];
};
struct msg_engine {
    bool attached;
    uint32_t dispatch;
    bool can_load;            /* as in HELLO, which an attached sealing engine changes */
    uint32_t layers, logical;
    char endpoint[ENDPOINT_MAX];
    char why[128]; /* of a detach, or of a torn step */
    uint64_t torn_epoch; /* a step of this view failed or lost its engine, which is back: 0 = none */
    bool masks;          /* as in HELLO */
};
struct msg_stage_done {
    uint64_t op;
    uint32_t stage, round;
    uint64_t attempt;
    int code;            /* 0 or ERR_* */
    char text[256];      /* the sentence when code < 0 */
    uint64_t bytes;      /* received by this agent in this stage */
    uint64_t value;      /* KV: bytes available */
    struct blob *blob;   /* GROUP_ID */
    struct model *model; /* ALLOCATE in a cold start: manifest and the digests of what was loaded */
};
struct msg_progress {
    uint64_t op, bytes; /* bytes received or loaded so far in the running stage */
    uint64_t total;     /* bytes that there will be; 0: the coordinator knows better */
};
struct msg_promise {
    uint64_t epoch, incarnation, limit, next, wave;
    uint32_t engine;
};
struct msg_refuse {
    uint64_t epoch;
    char why[128];
};
struct msg_flipped {
    uint64_t epoch, hold_ns;
};
struct msg_map_ack {
    uint64_t version, step; /* the first step that uses it */
};
struct msg_verify { /* VERIFY: request only */
    uint64_t request;
};
struct msg_verified {
    uint64_t request;
    uint64_t slots, dense, bytes; /* checked */
    uint64_t bad;
    char text[256]; /* the first mismatch */
};

struct msg_load {
    uint64_t epoch, map_version; /* of the whole window */
    uint32_t layers, slots, window_ms;
    uint64_t *tokens; /* [layers][slots] of this rank, owned */
};

struct msg_welcome {
    uint32_t lease_ms, heartbeat_ms, indoubt_ms;
    uint32_t load_window_ms; /* LOAD is wanted this often; 0 = not at all */
    struct view *view; /* the committed one; NULL before the first */
    bool member;       /* this incarnation is in it */
};
struct msg_evicted {
    char why[128];
};
struct msg_op_begin {
    uint64_t op;
    uint32_t kind, role; /* enum op_kind, enum op_role */
    uint32_t n, self;    /* parties, and this agent's place among them */
    uint32_t n_old;      /* parties below this hold the weights already (the old view's ranks); the others join */
    struct member *parties; /* [n], owned */
    struct model *model; /* NULL in a cold start */
};
struct msg_stage {
    uint64_t op;
    uint32_t stage, round;
    uint64_t attempt;    /* ENGINE_PREPARE is repeated with a higher one when the proposed view changes */
    uint64_t step;       /* GRACE: T */
    uint32_t deadline_ms;/* from receipt */
    bool strict;         /* DRAIN: an engine that is not drained by then is an error */
    bool load;           /* ALLOCATE: cold start; RELOAD: this agent's own checkpoint is good for it */
    struct expert_map *map; /* ALLOCATE in a cold start, RELOAD: over parties, what to load (held) */
    struct plan *plan;   /* MAPPING */
    uint64_t plan_digest;/* MAPPING: expert_map_digest(plan->target) */
    struct view *view;   /* ENGINE_PREPARE: proposed, epoch 0 */
    struct blob *blob;   /* GROUP */
    uint64_t bandwidth;  /* FILL: bytes per second that a rank may receive; 0 = no limit */
    /* RELOAD: agents to read experts from, owned; the first n_holders have weights, the others a checkpoint */
    struct member *sources;
    uint32_t n_sources, n_holders;
};
struct msg_notify {
    uint64_t op;
    uint32_t what;
};
struct msg_op_end { /* OP_END, OP_ABORT, DISMISS (epoch) */
    uint64_t op, epoch;
    char why[256];
};
struct msg_prepare {
    uint64_t epoch, op;
    uint32_t kind; /* enum flip_kind */
    uint32_t lead_ms;
};
struct msg_go {
    uint64_t epoch, op, step, wave;
    uint32_t kind;
    struct view *view;
};
struct msg_abort {
    uint64_t epoch;
};
struct msg_map {
    uint64_t epoch, op;
    struct expert_map *map; /* map->version is the new map_version */
};

struct msg {
    enum msg_type type;
    union {
        struct msg_hello hello;
        struct msg_engine engine;
        struct msg_stage_done stage_done;
        struct msg_progress progress;
        struct msg_promise promise;
        struct msg_refuse refuse;
        struct msg_flipped flipped;
        struct msg_map_ack map_ack;
        struct msg_verify verify;
        struct msg_verified verified;
        struct msg_load load;
        struct msg_welcome welcome;
        struct msg_evicted evicted;
        struct msg_op_begin op_begin;
        struct msg_stage stage;
        struct msg_notify notify;
        struct msg_op_end op_end; /* also OP_ABORT and DISMISS */
        struct msg_prepare prepare;
        struct msg_go go;
        struct msg_abort abort;
        struct msg_map map;
    };
};

void msg_done(struct msg *msg);                             /* drops what it owns; leaves it zeroed */
void msg_copy(struct msg *ret_copy, const struct msg *msg); /* takes references, duplicates arrays */
const char *msg_type_name(enum msg_type type);              /* "PREPARE" */
const char *op_kind_name(enum op_kind kind);                /* "scale-up" */
const char *op_role_name(enum op_role role);                /* "existing" */
const char *op_stage_name(enum op_stage stage);             /* "TRANSFER_WEIGHTS"-like: "WEIGHTS" */
const char *notify_name(enum notify_type what);             /* "NEW_CORE_ENGINES_INIT_READY" */

#endif
