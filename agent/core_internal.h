/* Inside the agent's core: its state, and what its files call in one another.  Not for anybody else.
 *
 *   core.c            the step function, the link to the coordinator, deadlines
 *   core_out.c        actions: how they are appended, and what they own
 *   core_commit.c     prepare, promise, go, abort, flipped, reset
 *   core_operation.c  the machine of an operation: begin, end, abort, overtaken
 *   core_stage.c      the stages that the coordinator commands, and their answers
 *   core_grace.c      steps that may still read what will be overwritten; lost experts
 *   core_work.c       what the worker does: submission, completion, progress
 *   core_release.c    letting go: dismissed leavers, aborted joiners, evicted agents
 *   core_engine.c     what the engine says, waves, maps inside a view
 *   core_restore.c    the state record: saved, restored, the engine's return
 *
 * Memory: allocations are small; when one fails the process ends, which the protocol treats like any other crash. */
#ifndef EEP_AGENT_CORE_INTERNAL_H
#define EEP_AGENT_CORE_INTERNAL_H

#include "agent/core.h"

#define CORE_MS 1000000ULL /* ns */
#define CORE_NEVER UINT64_MAX
#define CORE_PAGE_TICK_NS (20 * CORE_MS)     /* looks at the page even if a bell was missed */
#define CORE_PROGRESS_NS (50 * CORE_MS)      /* at most one MSG_PROGRESS in this time */
#define CORE_RELEASE_NS (5000 * CORE_MS)     /* how long an engine may take to let go of the regions */
#define CORE_DOUBT_TICK_NS (1000 * CORE_MS)
#define CORE_LEAD_STEPS_MAX 10000
#define CORE_RESUME_NS (2000 * CORE_MS)      /* how long a re-adopting agent waits for its engine; at most half the lease */

/* The operation in progress, or the last one (then its machine is in a final state). */
enum stage_state { STAGE_DEFERRED, STAGE_RUNNING, STAGE_FINISHED };
struct core_stage {
    enum op_stage stage;
    uint32_t round;
    uint64_t attempt;
    enum stage_state state;
    uint64_t step;           /* GRACE: T */
    uint64_t deadline_ns;    /* DRAIN */
    bool strict;             /* DRAIN: it is an error to be late */
    bool load;               /* ALLOCATE: cold start; RELOAD: the own checkpoint is good for it */
    struct expert_map *map;  /* ALLOCATE, RELOAD: what to load */
    struct plan *plan;       /* WEIGHTS, FILL: whose moves */
    struct member *sources;  /* RELOAD: [n_sources] */
    uint32_t n_sources, n_holders;
    struct msg answer;       /* FINISHED: MSG_STAGE_DONE */
    struct core_stage *next; /* older ones */
};
struct core_op {
    uint64_t op; /* 0 = none yet */
    enum op_kind kind;
    enum op_role role;
    uint32_t n, n_old, self;
    struct member *parties;
    struct plan *plan;
    enum machine_state state;
    bool decided;            /* its GO was taken: it can only go forward */
    bool ended;              /* the coordinator has ended it before the machine could: it ends after its flip */
    bool prepared;           /* the attached engine answered `prepared` to prepare_attempt */
    uint64_t prepare_attempt;
    unsigned notified;       /* bit per notify_type */
    uint64_t progress_ns;    /* when the last PROGRESS was sent */
    struct core_stage *stages;
};

/* A PREPARE that is not answered yet. */
enum fence_state {
    FENCE_NONE,
    FENCE_GATE,  /* the gate is written: is the engine's intent still below it? */
    FENCE_LEAVE, /* RESET: waiting for the engine to leave its step */
};
struct core_fence {
    enum fence_state state;
    enum flip_kind kind;
    uint64_t epoch, limit, lead_steps, deadline_ns;
    bool left; /* the engine said that it is out of its step */
};

/* The promise that is outstanding: the engine begins no step >= limit until GO or ABORT of this epoch. */
struct core_promise {
    uint64_t epoch; /* 0 = none */
    enum flip_kind kind;
    enum promise_engine engine;
    uint64_t limit, next, wave;
};

/* The flip whose GO was taken and which the engine has not made yet. */
struct core_flip {
    uint64_t epoch; /* 0 = none */
    enum flip_kind kind;
    uint64_t step, op, wave;
    uint64_t next_step; /* as written to the page; 0 = it was not */
    bool leaver;
};

struct core_engine {
    bool attached, seals, masks;
    uint32_t dispatch, layers, logical;
    char endpoint[ENDPOINT_MAX];
    uint64_t kv_bytes;
    uint64_t torn_epoch; /* the view in which one was lost or failed last: told until that view is replaced */
    bool changed_unsaid; /* it changed after HELLO */
    char why[128];       /* of the last loss or failure */
};

/* The step that the engine is in, as it was seen last. */
struct core_watch {
    uint64_t intent, done, since_ns;
    bool inside, said;
};

enum release_state { RELEASE_NONE, RELEASE_ENGINE, RELEASE_WORK };
struct core_release {
    enum release_state state;
    bool let_go;          /* a dismissed leaver: answers LET_GO */
    uint64_t op, epoch, work_id, deadline_ns;
};

struct core_work {
    uint64_t id, op, attempt, request; /* request: VERIFY */
    enum work_kind kind;
    enum op_stage stage;
    uint32_t round;
    struct core_work *next;
};

struct agent_core {
    struct agent_config config;
    enum agent_bug bug;
    /* of the present event */
    uint64_t now_ns;
    struct page_snapshot page;
    struct agent_actions *out;

    bool linked, welcomed, stopping;
    uint32_t lease_ms, heartbeat_ms, indoubt_ms; /* lease_ms 0: not told yet */
    uint64_t heartbeat_ns;     /* when the next one is due */
    uint64_t alone_since_ns;   /* when the coordinator was last lost */
    uint64_t doubt_ns;         /* when to look for a held engine again */
    uint64_t page_tick_ns;     /* when to look at the page again; CORE_NEVER = nothing is waited for */

    /* Epochs: seen >= promised > applied, if there is a promise. */
    uint64_t seen_epoch, applied_epoch, flipped_epoch, flipped_hold_ns;
    struct view *view;         /* of applied_epoch, if this agent is a rank of it; NULL: spare, or a leaver */
    struct view *before;       /* the view in use until the pending flip (leaver: until it has let go) */
    struct expert_map *map;    /* in use at rank map_rank; raised by MAP */
    uint32_t map_rank;
    uint64_t map_unacked;      /* version that is to be acknowledged once the engine has applied it */
    uint64_t map_flip;         /* version that came with the view: applied by the flip */
    uint64_t map_step;         /* first step that uses the map */
    struct core_fence fence;
    struct core_promise promise;
    struct core_flip flip;
    uint64_t run_to, notify_done, revoked, attachment; /* as last written to the page */

    struct core_op op;
    bool group;                /* a group may exist */
    bool weights, weights_touched; /* allocated; an allocation was at least begun */
    bool joining;              /* OP_BEGIN made it a new rank, and neither GO nor an abort has come since */
    struct model *model;
    struct core_engine engine;
    struct core_watch watch;
    struct core_release release;
    struct core_work *works;
    uint64_t last_work;

    /* Re-adopted: until the page shows what the record says, and the engine is back (or given up), no HELLO goes out. */
    bool restored;             /* and that is still to come */
    uint64_t resume_ns;        /* when the engine is given up; CORE_NEVER = none is waited for */
    uint64_t left_op;          /* an operation of before, for which the engine may have prepared; 0 = none */
};

/* core_out.c */
struct agent_action *acore_act(struct agent_core *core, enum agent_action_type type); /* valid until the next one */
void acore_log(struct agent_core *core, enum agent_log_level level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
struct msg *acore_send(struct agent_core *core, enum msg_type type); /* NULL unless welcomed */
void acore_page(struct agent_core *core, enum page_word word, uint64_t value);
void acore_say(struct agent_core *core, enum agent_action_type type, const char *text); /* an action with a text */
void *acore_alloc(size_t n, size_t size); /* zeroed */

/* core.c */
void acore_hello(struct agent_core *core); /* when the link is up */
bool acore_member(const struct agent_core *core); /* a rank of the applied view */
/* The coordinator sent what the protocol does not allow here: drop it. */
void acore_illegal(struct agent_core *core, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* core_commit.c */
void agent_commit_prepare(struct agent_core *core, const struct msg_prepare *m);
void agent_commit_go(struct agent_core *core, const struct msg_go *m);
void agent_commit_abort(struct agent_core *core, const struct msg_abort *m);
void agent_commit_event(struct agent_core *core);     /* the snapshot is fresh: goes on with the fence */
void agent_commit_left_step(struct agent_core *core, uint64_t step);
bool agent_commit_flip_done(const struct agent_core *core);
void agent_commit_check_flip(struct agent_core *core);
void agent_commit_check_doubt(struct agent_core *core);
void agent_commit_repeat_flipped(struct agent_core *core);
enum promise_engine agent_commit_engine(const struct agent_core *core); /* what HELLO says of the engine */
struct view *agent_commit_view_now(const struct agent_core *core); /* the view in use, borrowed; NULL: none */

/* core_operation.c */
void agent_operation_begin(struct agent_core *core, const struct msg_op_begin *m);
void agent_operation_end(struct agent_core *core, const struct msg_op_end *m);
void agent_operation_abort(struct agent_core *core, const struct msg_op_end *m);
/* By a repair, or another operation.  keep: a joiner keeps its weights, since its GO is under way. */
void agent_operation_overtaken(struct agent_core *core, uint64_t by, bool keep);
void agent_operation_flipped(struct agent_core *core, uint64_t op);
void agent_operation_notify(struct agent_core *core, const struct msg_notify *m);
bool agent_operation_running(const struct agent_core *core);
bool agent_operation_move(struct agent_core *core, enum machine_event event); /* false: illegal, nothing done */
bool agent_operation_may(const struct agent_core *core, enum machine_event event);
void agent_operation_unpromised(struct agent_core *core); /* ABORT of its epoch */
void agent_operation_clear(struct agent_core *core);

/* core_stage.c */
void agent_stage_command(struct agent_core *core, const struct msg_stage *m);
struct core_stage *agent_stage_find(struct agent_core *core, enum op_stage stage, uint32_t round, uint64_t attempt);
/* The stage ends: code 0 or an error with its sentence.  ret_done is open for more fields until it is sent. */
struct msg_stage_done *agent_stage_answer(struct agent_core *core, struct core_stage *s, int code, const char *text);
void agent_stage_answered(struct agent_core *core, struct core_stage *s);
void agent_stage_end(struct agent_core *core, struct core_stage *s, int code, const char *text); /* the two, without more */
void agent_stage_let_go(struct agent_core *core, uint64_t op);
void agent_stage_repeat_let_go(struct agent_core *core);
void agent_stage_allocate(struct agent_core *core, struct core_stage *s); /* also once a release is complete */
void agent_stage_check(struct agent_core *core); /* GRACE, DRAIN's deadline */
void agent_stage_engine_gone(struct agent_core *core);
void agent_stage_grace(struct agent_core *core, struct core_stage *s);
void agent_stage_reload(struct agent_core *core, struct core_stage *s, const struct msg_stage *m);
void agent_grace_check(struct agent_core *core);
void agent_stage_prepared(struct agent_core *core, const struct agent_event *event);
void agent_stage_drained(struct agent_core *core, const char *text);
void agent_stage_sealed(struct agent_core *core, const struct agent_event *event);
void agent_stage_clear(struct agent_core *core);

/* core_work.c */
struct work *agent_work_submit(struct agent_core *core, enum work_kind kind, const struct core_stage *s,
                               uint64_t request);
void agent_work_answer(struct agent_core *core, const struct agent_event *event);
void agent_work_progress(struct agent_core *core, const struct agent_event *event);
void agent_work_verify(struct agent_core *core, uint64_t request);
/* What is under way for `before` is for `s` from now on; false: nothing is. */
bool agent_work_take_over(struct agent_core *core, const struct core_stage *before, const struct core_stage *s);
void agent_work_group_destroy(struct agent_core *core); /* if there may be one */
void agent_work_clear(struct agent_core *core);

/* core_release.c */
void agent_release_dismiss(struct agent_core *core, const struct msg_op_end *m);
void agent_release_begin(struct agent_core *core, bool let_go, uint64_t op, uint64_t epoch);
void agent_release_engine_free(struct agent_core *core); /* the engine has let go, or is gone */
void agent_release_work_done(struct agent_core *core, uint64_t work_id);
void agent_release_check_deadline(struct agent_core *core);
void agent_release_evicted(struct agent_core *core, const char *why);
void agent_release_stop(struct agent_core *core);

/* core_restore.c */
void agent_restore_resumed(struct agent_core *core, const struct agent_event *event);
void agent_restore_check(struct agent_core *core);   /* nothing to wait for (any more) */
void agent_restore_overtaken(struct agent_core *core, const char *why); /* the engine of before is given up */
void agent_restore_drop_op(struct agent_core *core); /* the engine drops what it prepared for the operation of before */

/* core_engine.c */
void agent_engine_lease(struct agent_core *core);                  /* how long the engine may wait for a re-adoption */
void agent_engine_take(struct agent_core *core, const struct agent_event *event); /* what ATTACHED and RESUMED tell of it */
/* What an engine in view `view` must know: the view in use, its map, the flip that is ahead. */
void agent_engine_catch_up(struct agent_core *core, uint64_t view, bool regions);
void agent_engine_attached(struct agent_core *core, const struct agent_event *event);
void agent_engine_moved(struct agent_core *core, const char *endpoint); /* it is reached elsewhere now */
void agent_engine_gone(struct agent_core *core, const char *why);  /* it went away by itself */
void agent_engine_cut(struct agent_core *core, const char *why);   /* we cut it off, steps and all */
void agent_engine_void(struct agent_core *core);                   /* no step is begun in the applied view any more */
void agent_engine_failed(struct agent_core *core, uint64_t view, uint64_t step); /* a step failed without a revoke */
void agent_engine_revoke(struct agent_core *core, const char *why);
void agent_engine_said(struct agent_core *core);                   /* after WELCOME: what HELLO could not say */
void agent_engine_wave(struct agent_core *core, uint64_t step);
void agent_engine_peer_wave(struct agent_core *core, uint64_t epoch, uint64_t step);
void agent_engine_map(struct agent_core *core, const struct msg_map *m);
void agent_engine_check_map(struct agent_core *core);
void agent_engine_watch(struct agent_core *core);                  /* does its step end in time? */

#endif
