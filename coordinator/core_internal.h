/* Inside the coordinator's core: its state, and what its files call in one another.  Not for anybody else. */
#ifndef EEP_COORDINATOR_CORE_INTERNAL_H
#define EEP_COORDINATOR_CORE_INTERNAL_H

#include "coordinator/arrivals.h"
#include "coordinator/core.h"

/* An agent that has said HELLO, or that the journal names as a member.  Its index never changes. */
struct peer {
    struct member member;       /* id, incarnation, addresses, endpoint of the engine */
    uint64_t conn;              /* 0 = not connected */
    uint64_t heard_ns;          /* connected: last message; else: when it went away */
    bool gone;                  /* its lease ended, or a newer incarnation came: nothing is expected of it */
    bool holds;                 /* its HELLO named a view, and it has not let go since */
    bool silent;                /* it took no part in a repair: the next one does without it, if it can */
    bool outcast;               /* of a view that is given up: it hears of it when that is durable */
    bool evicted;               /* this incarnation was put out of a view: it may only come back as another */
    uint64_t zombie;            /* the incarnation that was evicted last, which has been said; 0 = none */
    bool leaves;                /* it is being stopped, and asks to be drained before */
    bool engine;                /* an engine is attached */
    bool can_load;
    bool masks;                 /* its engine serves on without experts that the map does not have */
    uint32_t dispatch, slots, layers, logical;
    uint64_t applied_epoch, map_version; /* as of its HELLO */
    uint64_t reload_ns;         /* it reads no experts again before this: it has failed to; 0 = it may */
    uint64_t lend_ns;           /* no other agent reads experts from it before this: one has failed to; 0 = it may */
};

enum commit_state { COMMIT_IDLE, COMMIT_PREPARING, COMMIT_DECIDING, COMMIT_GOING };

/* One attempt to change the view (or, for replicated dispatch, the map). */
struct commit {
    enum commit_state state;
    enum flip_kind kind;
    bool durable;               /* PREPARING: the epoch is in the journal, PREPARE has been sent */
    uint64_t epoch, step, wave;
    uint32_t lead_ms, attempt;
    uint64_t deadline_ns;
    struct view *target;        /* epoch 0 until the decision */
    struct arrivals promised;   /* value: limit */
    struct arrivals flipped;    /* value: hold_ns */
    uint64_t prepared_ns;       /* when PREPARE went out */
    uint64_t min_next, max_wave;
    bool any_old, any_running, any_detached;
};

enum op_phase {
    PHASE_NONE = 0,
    PHASE_OPEN,      /* being written to the journal */
    PHASE_PENDING,   /* waits for spare agents, or for an earlier map change to settle */
    PHASE_ALLOCATE,
    PHASE_GROUP_ID,
    PHASE_GROUP,
    PHASE_PLAN,      /* the planner is at work, elsewhere */
    PHASE_MAPPING,
    PHASE_WEIGHTS,
    PHASE_KV,
    PHASE_RETIRE,    /* a map change is announced */
    PHASE_GRACE,
    PHASE_FILL,
    PHASE_DRAIN,
    PHASE_ENGINE_PREPARE,
    PHASE_PROMISE,
    PHASE_RELOAD,    /* repair: lost experts are read again */
    PHASE_DECIDE,
    PHASE_GO,
    PHASE_LET_GO,
    PHASE_FINISH,
    PHASES
};

#define NOBODY UINT32_MAX
#define PHASE_TIMES 32

/* The operation that is running; its durable half is durable.open. */
struct operation {
    enum op_phase phase;
    uint64_t phase_since_ns, started_ns, deadline_ns, timeout_ns, wait_ns;
    uint32_t *peer;             /* [record.n] peer index of each party */
    bool decided;               /* its FLIP_VIEW (or RESET) is committed: it can only go forward */
    bool announced;             /* OP_BEGIN has been sent */
    struct arrivals stage;      /* who owes a STAGE_DONE; value */
    enum op_stage stage_kind;
    uint64_t stage_attempt, stage_step;
    struct arrivals drained;    /* leavers that owe DRAIN */
    struct blob *group_id;
    uint64_t plan_seq;          /* PLAN: of the job that is awaited */
    struct plan *plan;
    struct plan_input in;       /* arrays owned, map referenced */
    struct view *proposed;
    uint32_t round;             /* next round to run */
    uint32_t mib_s;             /* rebalance: into a rank; 0 = no limit */
    bool automatic;
    uint64_t accept;            /* request that waits to hear that the operation is accepted; 0 = none */
    uint64_t *progress;         /* [n] bytes of the running stage */
    uint64_t *expected;         /* [n] how many there will be, where only the agent knows; counted into bytes_planned */
    uint64_t bytes_done, bytes_planned;
    struct expert_map *load_map;/* cold start */
    struct expert_map *reload;  /* repair: what is read again, by the parties; NULL = every expert has a copy */
    uint64_t masked;            /* repair: so many experts the new view will serve without */
    uint64_t reloads, copied;   /* how many experts that is; so many of them lie in the memory of sources */
    uint32_t *source;           /* [n_sources] peer index of who they are read from; the first n_holders hold weights */
    uint32_t n_sources, n_holders;
    bool reloaded;              /* and it has been */
    bool waits_for_agents;      /* PENDING until enough spares are there */
    bool unattended;            /* nobody asked for it: a scale back, or the drain of an agent that stops */
    enum engine_policy on_prepare, on_drain;
    bool without[RANKS_MAX];    /* [n] existing ranks that leave because their engine does not prepare */
    uint32_t left_out;          /* so many ranks are missing in the end, these and new ones */
    char held[256];             /* ENGINE_PREPARE: an engine's failure that may be another one's fault */
    bool dropped;               /* the operator aborts it */
    bool resumed;               /* RETIRE after a restart: the map in use is acknowledged once more, then the round begins */
    uint64_t halted_ns;         /* since when it stands still because operations are paused; 0 = it does not */
    char why[256];              /* what will be said at the end */
    struct { enum op_phase phase; uint64_t ns; } times[PHASE_TIMES];
    uint32_t n_times;
};

/* What is to happen when a journal write is durable. */
enum continuation { CONT_NONE, CONT_OPENED, CONT_EPOCH, CONT_DECIDED, CONT_MAP, CONT_PAUSED, CONT_RESTARTED };
struct pending_write {
    uint64_t seq, op, epoch;
    enum continuation what;
    struct pending_write *next;
};

struct coordinator {
    struct coordinator_config config;
    struct durable durable;     /* as last handed to the journal */
    struct view *view;          /* committed and durable; what everybody is told */
    struct peer *peers;
    size_t n_peers, cap_peers;
    struct commit commit;
    struct operation op;        /* phase NONE: no operation */
    struct op_info last;        /* how the last one ended (record deep copied) */
    struct arrivals map_acks;   /* who has not applied map_announced yet; value: s_i */
    uint64_t map_announced;
    uint64_t commit_ns;         /* how long commits take here: the slowest of late, from PREPARE to GO; 0 = none yet */
    uint64_t grace_step;        /* no slot that was ever retired is read by a step >= this: max of all s_i and S */
    bool torn;                  /* a rank of the view or its engine died: only a RESET gets the others out of their step */
    uint64_t torn_epoch;        /* the view in which a step failed last, or was left by an engine that is back */
    uint64_t retried_ns, retry_ns; /* when a torn step was retried last; when the next may be */
    uint32_t retries;           /* in a row */
    bool recovering;            /* the first step settles what the journal left open */
    uint64_t seq;
    struct pending_write *writes, **writes_end;
    struct { uint64_t request, id; struct arrivals missing; uint64_t slots, dense, bytes, bad, deadline_ns; char text[256]; } verify;
    uint64_t last_verify;
    struct load_history load;
    /* The policy: next look; low since; last one began (0 = never); it waits for a plan, to see whether it is worth it. */
    struct { uint64_t next_ns, below_ns, began_ns; bool planning; } balance;
    uint64_t plan_seq;          /* of the last job */
    uint64_t now_ns, wall_ms;
    char degraded[256];
    uint64_t torn_ns;           /* when `torn` became true last */
    uint64_t short_ns;          /* since when there are fewer ranks than wanted, by a fault; 0 = there are not */
    struct { struct expert_map *map; uint64_t count, unplaced, since_ns, next_ns; bool stuck; } mask; /* core_mask.c; of the view's map */
    uint64_t unwhole_ns;        /* since when the ranks that are left lack experts; 0 = they do not */
    uint64_t lost_ns;           /* since when nobody is left who could complete the view again; 0 = somebody is */
    uint64_t leave_ns;          /* no drain of an agent that stops begins before */
    uint64_t back_ns, back_wait_ns; /* the last attempt to get back to full strength, and how long until the next */
    uint64_t pause_request, restart_request; /* to be answered when it is durable */
    uint32_t restart_evicted;
    uint32_t restarts;          /* views that are given up, which the journal does not have yet */
    bool changed;
    enum coordinator_bug bug;
    struct coordinator_actions *out; /* during a step */
};

/* core.c */
struct coordinator_action *core_act(struct coordinator *c, enum coordinator_action_type type);
void core_log(struct coordinator *c, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
void core_reply(struct coordinator *c, uint64_t request, int code, uint64_t op, uint32_t outcome, struct plan *plan,
                const char *fmt, ...) __attribute__((format(printf, 7, 8)));
/* Hands the durable state to the journal; `what` happens when it is durable. */
void core_journal(struct coordinator *c, unsigned parts, enum continuation what);
struct msg *core_send(struct coordinator *c, uint32_t peer, enum msg_type type); /* NULL when not connected */
void core_names(const struct coordinator *c, const struct arrivals *set, char *ret_text, size_t size);

/* core_balance.c */
void balance_init(struct coordinator *c);
void balance_window(struct coordinator *c, uint32_t peer, const struct msg_load *window);
double *balance_load(const struct coordinator *c); /* [layers][logical]; the caller frees it; NULL = nothing is known */
void balance_tick(struct coordinator *c);
void balance_planned(struct coordinator *c, struct plan_job *job);
uint64_t balance_deadline(const struct coordinator *c);

/* core_verify.c */
void verify_start(struct coordinator *c, uint64_t request);
void verify_result(struct coordinator *c, uint32_t peer, const struct msg_verified *v);
void verify_check(struct coordinator *c); /* who went away, whose time is up */

/* core_members.c */
uint32_t members_find(const struct coordinator *c, const char *id);
uint32_t members_by_conn(const struct coordinator *c, uint64_t conn);
int members_recover(struct coordinator *c, const struct view *view) MUST_CHECK;
void members_hello(struct coordinator *c, uint64_t conn, const struct msg_hello *hello);
void members_engine(struct coordinator *c, uint32_t peer, const struct msg_engine *engine);
void members_disconnected(struct coordinator *c, uint32_t peer);
void members_evict(struct coordinator *c, uint32_t peer, const char *why);
void members_lost(struct coordinator *c, uint32_t peer, const char *why);
void members_tick(struct coordinator *c);
uint64_t members_deadline(const struct coordinator *c);
/* Is this peer a rank of the committed view, with this incarnation? */
int members_rank(const struct coordinator *c, uint32_t peer);
/* Spare agents fit to join, best first; returns how many (at most max). */
uint32_t members_spares(const struct coordinator *c, bool cold, uint32_t *ret_peers, uint32_t max);

/* core_commit.c */
void commit_start(struct coordinator *c, enum flip_kind kind, struct view *target); /* takes the reference */
void commit_promise(struct coordinator *c, uint32_t peer, const struct msg_promise *promise);
void commit_refuse(struct coordinator *c, uint32_t peer, const struct msg_refuse *refuse);
void commit_flipped(struct coordinator *c, uint32_t peer, const struct msg_flipped *flipped);
void commit_epoch_durable(struct coordinator *c, uint64_t epoch);
void commit_decided(struct coordinator *c, uint64_t epoch);
void commit_hello_decided(struct coordinator *c, uint32_t peer, const struct msg_hello *hello); /* first */
void commit_hello(struct coordinator *c, uint32_t peer, const struct msg_hello *hello);
void commit_peer_gone(struct coordinator *c, uint32_t peer, const char *why); /* disconnected or lost */
void commit_cancel(struct coordinator *c, const char *why); /* PREPARING only: ABORT to everybody */
void commit_recover(struct coordinator *c);
void commit_reloaded(struct coordinator *c); /* the decision need not wait any longer */
void commit_resume(struct coordinator *c, struct view *target); /* a RESET whose epoch the journal has */
void commit_tick(struct coordinator *c);
void commit_done(struct commit *commit);
const char *commit_state_name(enum commit_state state);

/* core_operation.c, core_stages.c, core_phases.c, core_recover.c: the life of an operation */
void operation_scale(struct coordinator *c, uint64_t request, const struct scale_request *scale,
                     const struct op_record *known);
void operation_drop(struct coordinator *c); /* one that was set up and is not to be */
void operation_abort_request(struct coordinator *c, uint64_t request, uint64_t op);
void operation_open_by_itself(struct coordinator *c, uint32_t ranks);
void operation_opened(struct coordinator *c, uint64_t op);
void operation_abort(struct coordinator *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void operation_end(struct coordinator *c, enum op_outcome outcome, const char *why);
void operation_stage_done(struct coordinator *c, uint32_t peer, const struct msg_stage_done *done);
void operation_progress(struct coordinator *c, uint32_t peer, const struct msg_progress *progress);
void operation_hello(struct coordinator *c, uint32_t peer, const struct msg_hello *hello);
void operation_peer_gone(struct coordinator *c, uint32_t peer, const char *why);
void operation_peer_ready(struct coordinator *c); /* a spare came, or a map settled */
void operation_tick(struct coordinator *c);
void operation_phase(struct coordinator *c, enum op_phase phase, const char *why);
void operation_ask(struct coordinator *c, enum op_stage stage, uint32_t party);
void operation_announce(struct coordinator *c, uint32_t party); /* OP_BEGIN */
void operation_draining(struct coordinator *c, bool draining); /* marks the leavers in the view that routers watch */
void operation_notify(struct coordinator *c, enum notify_type what); /* the counts to the old ranks, the rest to all */
void operation_stage(struct coordinator *c, enum op_phase phase, enum op_stage stage);
void operation_rounds_done(struct coordinator *c);
void operation_next(struct coordinator *c); /* the running phase is complete: on to the next one */
void operation_recover(struct coordinator *c);
void operation_clear(struct coordinator *c);
const struct arrivals *operation_awaited(const struct coordinator *c); /* who the running phase waits for */
int operation_party(const struct coordinator *c, uint32_t peer); /* -1: none */
const char *op_phase_name(enum op_phase phase);
/* What the commit tells the operation. */
void operation_committed(struct coordinator *c); /* decided and durable */
void operation_settled(struct coordinator *c);   /* everybody has flipped */
void operation_commit_failed(struct coordinator *c, const char *why);

/* core_setup.c: who takes part, what moves */
int setup_scale(struct coordinator *c, const struct scale_request *scale, struct err *err) MUST_CHECK;
bool setup_fault(const struct coordinator *c, uint32_t rank); /* this rank of the view is gone or has no engine */
int setup_repair(struct coordinator *c, const uint32_t *peers, uint32_t n) MUST_CHECK;
int setup_restore(struct coordinator *c, struct err *err) MUST_CHECK; /* of masked experts */
struct view *setup_target(struct coordinator *c); /* the proposed view of the operation, epoch 0 */

/* core_plan.c: plans, which others make */
/* For what setup_scale has set up; what it says is copied, so that it may be dropped. */
int plan_ask(struct coordinator *c, enum plan_purpose purpose, uint64_t request, double balance, struct err *err) MUST_CHECK;
void plan_operation(struct coordinator *c); /* PHASE_PLAN: operation_next when it is there, or an abort */
void plan_arrived(struct coordinator *c, struct plan_job *job);

/* core_silent.c: engines that do not answer */
void silent_policy(struct coordinator *c, enum engine_policy asked); /* what the operation's says, or the configured one */
bool silent_holds(struct coordinator *c, const struct msg_stage_done *done, const char *id); /* no reason to abort yet */
bool silent_spares(const struct coordinator *c, uint32_t peer); /* that its engine is gone does not end the operation */
void silent_settle(struct coordinator *c, bool late); /* not every engine has prepared: abort, or go on without some */

/* core_rounds.c: map changes inside a view */
void rounds_run(struct coordinator *c);  /* starts round op.round, or ends this side of the commit */
void rounds_next(struct coordinator *c); /* RETIRE, GRACE or FILL is complete */
void rounds_map_durable(struct coordinator *c);
void rounds_map_ack(struct coordinator *c, uint32_t peer, const struct msg_map_ack *ack);
void rounds_hello(struct coordinator *c, uint32_t peer);
void rounds_recover(struct coordinator *c);
void rounds_peer_gone(struct coordinator *c, uint32_t peer);
void rounds_flipped(struct coordinator *c);   /* a FLIP_MAP has settled */

/* core_repair.c: what a death does */
void repair_check(struct coordinator *c);
void repair_torn(struct coordinator *c, uint32_t peer, const struct msg_engine *engine); /* a step failed there */
bool repair_waits(const struct coordinator *c); /* for retry_ns */
void repair_missing(const struct coordinator *c, char *ret_text, size_t size); /* "gpu1 (lost), gpu2 (no engine)" */
void repair_resume(struct coordinator *c);
void repair_committed(struct coordinator *c); /* those who are not in the view any more are put out */

/* core_reload.c: experts that lost their last copy */
/* What reload_place does with experts that it has no source or no slot for. */
enum reload_extent {
    RELOAD_ALL,       /* nothing is placed then */
    RELOAD_COPIES,    /* only those in memory are read; the others are masked, if somebody has the checkpoint */
    RELOAD_WHAT_FITS, /* the others wait */
};
bool reload_place(struct coordinator *c, const uint32_t *peers, uint32_t n, const struct expert_map *left,
                  enum reload_extent extent, struct expert_map **ret_load);
const char *reload_from(const struct operation *op);
bool reload_begin(struct coordinator *c, const uint32_t *peers, uint32_t n, const struct expert_map *left);
void reload_say(struct coordinator *c);
void reload_opened(struct coordinator *c);
bool reload_promised(struct coordinator *c);
bool reload_concerns(const struct coordinator *c, uint32_t party);
void reload_ask(const struct coordinator *c, uint32_t party, struct msg_stage *s);
void reload_done(struct coordinator *c);
void reload_failed(struct coordinator *c, uint32_t peer, int code, const char *text);
void reload_late(struct coordinator *c);
uint64_t reload_deadline(const struct coordinator *c);

/* core_upkeep.c: pauses, agents that stop, back to full strength, giving a view up */
void upkeep_pause(struct coordinator *c, uint64_t request, bool pause, const char *why);
void upkeep_paused(struct coordinator *c); /* it is durable */
bool upkeep_halts(struct coordinator *c);  /* the operation may not go on, because operations are paused */
void upkeep_leave(struct coordinator *c, uint32_t peer);
void upkeep_ended(struct coordinator *c, const struct op_record *ended);
void upkeep_report(struct coordinator *c, char *text, size_t size); /* adds how long a fault lasted */
void upkeep_restart(struct coordinator *c, uint64_t request, bool force);
void upkeep_restarted(struct coordinator *c); /* it is durable: the ranks hear of it */
bool upkeep_gives_up(const struct coordinator *c); /* it is not yet */
void upkeep_check(struct coordinator *c);
uint64_t upkeep_deadline(const struct coordinator *c);

/* core_mask.c */
bool mask_allowed(const struct coordinator *c, const uint32_t *peers, uint32_t n);
uint64_t mask_count(struct coordinator *c);
void mask_check(struct coordinator *c);
uint64_t mask_deadline(const struct coordinator *c);

#endif
