/* Inside the planner: the shape of a problem, and the steps of plan_make.  Not for others; see planner.h. */
#ifndef EEP_COORDINATOR_PLANNER_WORK_H
#define EEP_COORDINATOR_PLANNER_WORK_H

#include "coordinator/planner.h"

/* Why a slot of the target holds what it holds. */
enum slot_origin {
    SLOT_KEPT = 0, /* as it is now */
    SLOT_COVER,    /* an expert that no survivor had */
    SLOT_QUOTA,    /* a joiner's share, before the commit */
    SLOT_FILL,     /* a replica into a slot that would stay empty */
};

struct planner {
    const struct plan_input *in;
    uint32_t layers, logical, parties, slots;
    uint32_t n_joining, n_leaving, n_final; /* n_final: parties of the view after the commit */
    uint8_t *final;                         /* [parties] */
    struct expert_map *target;
    uint8_t *origin; /* [layers][parties * slots], enum slot_origin */
    uint64_t bound_hard, bound_fill;
};

/* Builds p->target and p->origin, layer by layer, and the bounds. */
int planner_target(struct planner *p, struct err *err) MUST_CHECK;

/* Turns target and origin into rounds of retires and moves, with sources. */
int planner_rounds(const struct planner *p, struct plan **ret_plan, struct err *err) MUST_CHECK;

static inline bool planner_leaves(const struct plan_input *in, uint32_t party)
{
    return in->leaving && in->leaving[party];
}

static inline bool planner_joins(const struct plan_input *in, uint32_t party)
{
    return in->joining && in->joining[party];
}

#endif
