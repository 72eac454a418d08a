/* What the coordinator must not forget: one struct, written by parts.  Pure data; coordinator/journal.c stores it. */
#ifndef EEP_COORDINATOR_DURABLE_H
#define EEP_COORDINATOR_DURABLE_H

#include "common/msg.h"

enum durable_part {
    DURABLE_META = 1 << 0,   /* counters: epoch, map_version, op; the ranks wanted; the pause */
    DURABLE_VIEW = 1 << 1,   /* the committed view, with its map */
    DURABLE_OP = 1 << 2,     /* the open operation, or none */
    DURABLE_COMMIT = 1 << 3, /* the last decision */
    DURABLE_MODEL = 1 << 4,  /* manifest and digests */
    DURABLE_HISTORY = 1 << 5,/* appends `ended`, once */
    DURABLE_ALL = (1 << 6) - 1
};

enum op_outcome { OUTCOME_RUNNING = 0, OUTCOME_DONE, OUTCOME_ABORTED, OUTCOME_FAILED };

#define OP_KEY_MAX 128 /* the caller's idempotency key */
#define OP_PHASES_MAX 32

struct op_record {
    uint64_t op; /* 0 = none */
    uint32_t kind, outcome, target, flip; /* op_kind, op_outcome, ranks wanted, flip_kind of the open epoch */
    uint64_t epoch;                       /* open epoch, 0 = none */
    char key[OP_KEY_MAX];
    char why[256];
    uint32_t n;              /* parties: the old view's ranks, then the joiners */
    uint32_t n_old;
    struct member *parties;  /* owned */
    uint8_t *stays;          /* [n] member of the target view; owned */
    uint64_t started_ms, ended_ms; /* wall clock, for people */
    uint64_t bytes, hold_ns_max;
    /* What is left to do after the commit of a scale-up, from before its decision on: the plan, the map that it was made
     * over (both by parties), and the round that runs.  NULL: nothing, or it has ended.  References. */
    struct plan *plan;
    struct expert_map *planned_over;
    uint32_t round;
    uint32_t n_phases;
    struct phase_time { char phase[20]; uint64_t ns; } phases[OP_PHASES_MAX]; /* time spent, in order */
};
int op_record_copy(struct op_record *ret_copy, const struct op_record *from) MUST_CHECK;
void op_record_done(struct op_record *record);

struct commit_record {
    uint64_t epoch, op, step, wave; /* epoch 0 = none */
    uint32_t kind;                  /* flip_kind */
    bool settled;                   /* every member has FLIPPED (or was evicted since) */
    struct view *view;
    uint32_t n_old;                 /* members of the view before: leavers must be told as well */
    struct member *old;             /* owned */
};
int commit_record_copy(struct commit_record *ret_copy, const struct commit_record *from) MUST_CHECK;
void commit_record_done(struct commit_record *record);

struct durable {
    uint64_t epoch, map_version, op; /* highest ever used */
    uint32_t wanted;                 /* ranks that an operator asked for last; 0 = none yet */
    bool paused;                     /* no operation begins or goes on; since paused_ms (wall clock) */
    char paused_why[128];
    uint64_t paused_ms;
    struct view *view;
    struct op_record open;
    struct commit_record commit;
    struct model *model;
    struct op_record ended;          /* for DURABLE_HISTORY */
};
int durable_copy(struct durable *ret_copy, const struct durable *from) MUST_CHECK;
void durable_done(struct durable *durable);

#endif
