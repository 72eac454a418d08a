/* The coordinator's core: membership, operations, promise and go, views and maps, as a function of (state, event)
 * that appends actions.  No sockets, clocks, threads or protobuf; eep-coordinator's loop drives it, and so does the
 * simulator.
 *
 * The protocol is that of docs/protocol.md.  States of the commit: IDLE, PREPARING, DECIDING, GOING.
 *
 * Durability: an action CA_JOURNAL carries a copy of the durable state and which parts of it changed.  Writes are
 * performed in order and answered by CE_JOURNALED with the same sequence number; whatever must not be seen before it
 * is durable (PREPARE of an epoch, GO, a map flip, the acknowledgement of an operation) is sent only after that.
 * On a write error the process ends and recovers from the file: there is no event for it. */
#ifndef EEP_COORDINATOR_CORE_H
#define EEP_COORDINATOR_CORE_H

#include "common/msg.h"
#include "coordinator/durable.h"
#include "coordinator/load.h"
#include "coordinator/plan_job.h"

struct coordinator;

/* What an operation does when an engine does not answer by a deadline. */
enum engine_policy { ENGINE_AS_CONFIGURED = 0, ENGINE_ABORT, ENGINE_CONTINUE };

/* What becomes of a view whose experts are on nobody's memory any more. */
enum lost_policy { LOST_HOLD = 0, LOST_MASK };

struct coordinator_config {
    uint32_t lease_ms;         /* an agent that is gone longer is lost; 3000 */
    uint32_t heartbeat_ms;     /* 500 */
    uint32_t lead_ms;          /* longest first lead, and that of the first commit; doubled at every retry; 250 */
    uint32_t lead_min_ms;      /* the first lead follows what commits take, not below this; 40 */
    uint32_t promise_attempts; /* 1 + 5 retries */
    uint32_t flipped_ms;       /* 10000 */
    uint32_t indoubt_ms;       /* 30000 */
    uint32_t stage_ms;         /* deadline of a stage without transfer; 30000 */
    uint32_t transfer_ms;      /* deadline of a stage that moves bytes, restarted by progress; 60000 */
    uint32_t drain_ms;         /* 30000 */
    enum engine_policy on_prepare_timeout; /* an engine that does not prepare: ABORT */
    enum engine_policy on_drain_timeout;   /* one that is not drained: CONTINUE, without what it has not finished */
    uint32_t slots;            /* slots_per_rank; 0 = ceil(experts / min_ranks) */
    uint32_t min_ranks;        /* 2 */
    double commit_balance;     /* balance wanted at a commit: plan_options.target_balance; 0.98 */
    uint32_t scale_back;       /* 1: after a repair, scale back to the former number of ranks as spares are there; 0 */
    uint32_t reload_after_ms;  /* experts that lost their last copy are read again: at once when nobody is left who has
                                  them, and after this when their agent lacks only an engine; 10000; 0 = never */
    enum lost_policy on_lost_experts; /* HOLD: engines are held until then.  MASK: at once, without them, where engines can */
    uint32_t restart_after_ms; /* a view with lost experts, whose ranks have all ended, is given up after this, and
                                  started anew from the checkpoint; 0 = only when an operator says so */
    bool even_split;          /* the engines cannot have a slot in a map more than once: plan_options.uneven; false */
    double cross_cost, lambda, dip; /* the rest of plan_options, see there; 4, 0, 0.02 */
    uint32_t load_window_ms;   /* agents report the load this often; 5000 */
    uint32_t load_horizon_ms;  /* it is kept for so long, in so many samples; 300000, 16 */
    uint32_t load_samples;
    /* rebalance without being asked: off unless rebalance_below > 0; see core_balance.c */
    double rebalance_below;        /* balance; 0 */
    uint32_t rebalance_after_ms;   /* once it has been lower for so long; 60000 */
    uint32_t rebalance_every_ms;   /* at most so often; 600000 */
    uint32_t rebalance_horizon_ms; /* what it gains is counted for so long; 1800000 */
    uint32_t rebalance_mib_s;      /* MiB per second into a rank, of every rebalance; 0 = no limit; 0 */
};
void coordinator_config_default(struct coordinator_config *ret_config);

enum coordinator_event_type {
    CE_MSG = 1,      /* conn, msg (borrowed); the first one of a conn is HELLO */
    CE_DISCONNECTED, /* conn */
    CE_JOURNALED,    /* seq */
    CE_TICK,
    /* from operators; answered by CA_REPLY with the same request */
    CE_SCALE,        /* request, scale */
    CE_ABORT,        /* request: abort the running operation (op 0 = whichever) */
    CE_VERIFY,       /* request */
    CE_PAUSE,        /* request, yes (pause or resume), text (why; may be NULL) */
    CE_PLANNED,      /* job: what a CA_PLAN asked for, run; borrowed, but its plan and input may be taken out of it */
    CE_RESTART,      /* request, yes (even a view that serves): give the view up, so that a cold start may follow */
};

struct scale_request {
    uint32_t target;            /* ranks wanted */
    char key[OP_KEY_MAX];       /* idempotency key; "" = none */
    uint32_t n_remove;
    const char *const *remove;  /* agents that shall leave; borrowed */
    bool dry_run;               /* plan only */
    uint32_t wait_agents_ms;    /* wait this long for spare agents; 0 = refuse at once */
    uint32_t timeout_ms;        /* of the whole operation before its decision; 0 = none but the stages' own */
    bool drain;                 /* `remove` shall serve no more: done already if none of them does */
    bool unattended;            /* by the coordinator itself */
    bool rebalance;             /* the same ranks, the experts placed anew: target, remove, wait_agents_ms mean nothing */
    bool automatic;             /* rebalance: nobody has asked for it */
    enum engine_policy on_engine_timeout; /* for both, in the place of the configured ones */
    uint32_t mib_s;             /* rebalance: MiB per second into a rank; 0 = as configured */
};

struct coordinator_event {
    enum coordinator_event_type type;
    uint64_t conn, seq, request, op;
    const struct msg *msg;
    const struct scale_request *scale;
    bool yes;
    const char *text;
    struct plan_job *job;
    const struct op_record *known; /* CE_SCALE with a key: the newest ended operation of that key in the journal's
                                      history, or NULL; borrowed */
    uint64_t wall_ms; /* wall clock, for records that people read */
};

enum coordinator_action_type {
    CA_SEND = 1, /* conn, msg */
    CA_CLOSE,    /* conn, text: drop this connection */
    CA_JOURNAL,  /* seq, parts, durable */
    CA_REPLY,    /* request, code, text, op, outcome, plan (dry run); to CE_VERIFY also msg: VERIFIED, the sums */
    CA_PLAN,     /* job: to be run by plan_job_run and given back by CE_PLANNED, whenever; owned, take it out of the action */
    CA_CHANGED,  /* status or view changed: tell watchers */
    CA_PHASE,    /* op, epoch, text "INIT -> STANDBY reason": a transition, for the log */
    CA_LOG,      /* level, text */
};

enum core_log_level { CORE_DEBUG = 0, CORE_INFO, CORE_WARN, CORE_ERROR };

struct coordinator_action {
    enum coordinator_action_type type;
    uint64_t conn, seq, request, op, epoch;
    struct msg msg;
    unsigned parts;
    struct durable *durable; /* owned copy */
    int code, level;
    uint32_t outcome;
    struct plan *plan;       /* reference, or NULL */
    struct plan_job *job;
    char text[512];
};
struct coordinator_actions {
    struct coordinator_action *v;
    size_t n, cap;
};
void coordinator_actions_clear(struct coordinator_actions *actions);
void coordinator_actions_done(struct coordinator_actions *actions);

/* recovered: what the journal held, or NULL for a new cluster (borrowed). */
struct coordinator *coordinator_new(const struct coordinator_config *config, const struct durable *recovered,
                                    uint64_t now_ns);
void coordinator_free(struct coordinator *core);
void coordinator_step(struct coordinator *core, uint64_t now_ns, const struct coordinator_event *event,
                      struct coordinator_actions *out);
uint64_t coordinator_deadline(const struct coordinator *core); /* next CE_TICK wanted; UINT64_MAX = never */

/* Status, borrowed pointers valid until the next step. */
enum member_state { MEMBER_SPARE = 1, MEMBER_SERVING, MEMBER_JOINING, MEMBER_LEAVING, MEMBER_LOST };
struct agent_info {
    struct member member;
    enum member_state state;
    int rank;              /* in the committed view, or -1 */
    bool connected, engine;
    uint64_t lease_left_ms;
    uint64_t applied_epoch;
};
struct op_info {
    struct op_record record;  /* shallow: parties borrowed */
    const char *phase;        /* "WEIGHTS" */
    uint32_t round, rounds;
    uint64_t bytes_done, bytes_planned;
    uint64_t phase_since_ns, deadline_ns;
    char awaited[256];        /* ids of those who are missing, comma separated */
    const struct plan *plan;
    struct { const char *phase; uint64_t ns; } phases[32]; /* time spent, in order */
    uint32_t n_phases;
};
struct coordinator_status {
    const struct view *view;  /* NULL before the first */
    const struct model *model;
    uint64_t epoch, map_version;
    const char *commit_state; /* "IDLE" */
    size_t n_agents;
    bool op_running;
    struct op_info op;        /* the running operation, or the last one that ended (record.op 0 = none) */
    const struct op_info *last; /* the one that ended last (record.op 0 = none), also while the next one runs */
    char degraded[256];       /* "" or why the view does not serve everything */
    uint64_t degraded_since_ns;
    uint64_t masked;          /* so many experts, over all layers, are served without */
    char missing[256];        /* whom a degraded view waits for: "gpu1 (lost)" */
    uint64_t gives_up_ns;     /* when it is given up by itself; 0 = it is not */
    uint32_t wanted;          /* ranks that an operator has asked for last; 0 = none yet */
    bool paused;
    const char *paused_why;
    uint64_t paused_ms;       /* wall clock */
};
void coordinator_status(const struct coordinator *core, uint64_t now_ns, struct coordinator_status *ret_status);
bool coordinator_agent(const struct coordinator *core, uint64_t now_ns, size_t i, struct agent_info *ret_info);

/* What the agents have reported, borrowed until the next step. */
const struct load_history *coordinator_load(const struct coordinator *core);
/* Is a rebalance worth its bytes by the policy of core_balance.c?  Says why, either way. */
bool balance_worth(const struct coordinator_config *config, const struct plan *plan, uint64_t expert_bytes,
                   char *ret_why, size_t size);

/* Mistakes that the simulator plants; 0 in production. */
enum coordinator_bug {
    COORDINATOR_BUG_NONE = 0,
    COORDINATOR_BUG_GO_BEFORE_DURABLE,
    COORDINATOR_BUG_MIN_OF_PROMISES,
    COORDINATOR_BUG_ABORT_WHILE_DECIDING,
    COORDINATOR_BUG_LEAVER_NOT_ASKED,
    COORDINATOR_BUG_INCARNATION_IGNORED,  /* a new incarnation counts on the old one's promise */
    COORDINATOR_BUG_EPOCH_REUSED,         /* the epoch is not durable before PREPARE */
    COORDINATOR_BUG_RESET_AT_MAX,         /* S = max(L): an engine that was not asked may be there already */
    COORDINATOR_BUG_RESET_BARELY_AHEAD,   /* S = max(L) + 1: not enough when engines launch ahead of their peers */
    COORDINATOR_BUG_RESET_ABORTED_AFTER_RESTART,
    COORDINATOR_BUG_RETIRE_UNCOVERED,     /* retires the last live replica */
    COORDINATOR_BUG_GRACE_BY_OWN_ACK,     /* T = the holder's s_i instead of the maximum */
    COORDINATOR_BUG_FILL_WITHOUT_GRACE,
    COORDINATOR_BUG_RELOAD_UNAWAITED,     /* decides before the lost experts have been read */
    COORDINATOR_BUG_MASKED_UNREAD,        /* routes to masked experts before they have been read */
    COORDINATOR_BUG_RELOAD_VOID_FORGOTTEN,/* what is overwritten is not void in the journal */
    COORDINATOR_BUG_WITHOUT_UNCOVERED,    /* goes on without an engine that has the only copy of an expert */
    COORDINATOR_BUG_EVICTED_BEFORE_DURABLE, /* the ranks of a view that is given up hear of it before the journal has it */
    COORDINATOR_BUG_COUNT_BY_ID,          /* the count of a stage takes a new incarnation for the one that has answered */
};
void coordinator_plant(struct coordinator *core, enum coordinator_bug bug);

#endif
