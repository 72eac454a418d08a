/* Inside the planner: the shape of a problem, and the steps of plan_make.  Not for others; see planner.h.
 *
 *   planner_target   per layer: the sets at the commit and at the end, put into slots
 *   planner_steps    per layer: the order of writes, in rounds of that layer's own
 *   planner_rounds   all layers together: rounds within the dip, sources, the plan */
#ifndef EEP_COORDINATOR_PLANNER_WORK_H
#define EEP_COORDINATOR_PLANNER_WORK_H

#include "coordinator/place_joint.h"
#include "coordinator/place_solve.h"
#include "coordinator/planner.h"
#include "coordinator/split.h"

enum planner_phase { PHASE_BEFORE = 0, PHASE_AFTER, PLAN_PHASES };
enum step_kind { STEP_RETIRE = 0, STEP_WAKE, STEP_MOVE };

/* One thing that happens to a slot.  round: of the layer, in its phase; the number of rounds of the layer = at the end
 * of the phase. */
struct step {
    enum step_kind kind;
    enum planner_phase phase;
    uint32_t layer, party, slot, round;
    uint32_t expert, dormant; /* STEP_MOVE */
};

struct layer_rounds {
    uint32_t n[PLAN_PHASES];
    size_t first[PLAN_PHASES]; /* into planner.dips */
    double peak[PLAN_PHASES];  /* highest load, against which the phase's dips are measured */
};

struct planner {
    const struct plan_input *in;
    struct plan_options options;
    uint32_t layers, logical, parties, slots;
    uint32_t n_joining, n_leaving, n_final; /* n_final: parties of the view after the commit */
    uint8_t *final;                         /* [parties] */
    uint32_t *party_of;                     /* [n_final]: of a final rank */
    struct expert_map *commit, *target;
    double *weight; /* [logical] of the layer at hand: all 1 without load */
    double *samples; /* [n_samples][logical] of the layer at hand; NULL without */
    bool loaded;     /* the layer at hand has a load */
    double peak_max; /* that the layer may have at most */
    struct place place;
    struct split split;
    struct step *steps;
    size_t n_steps, cap_steps;
    double *dips;
    size_t n_dips, cap_dips;
    struct layer_rounds *rounds; /* [layers] */
    uint64_t bound_hard, bound_fill, bound_balance;
    double balance_before, balance_at_commit, balance_after, balance_ceiling; /* sums over layers */
};

int planner_target(struct planner *p, struct err *err) MUST_CHECK;

/* Appends the steps of one layer from the present map by way of commit to target.  ERR_CONFLICT when there is no order:
 * unique experts that wait for one another's slots, and nothing to borrow. */
int planner_steps(struct planner *p, uint32_t layer, struct err *err) MUST_CHECK;

int planner_rounds(const struct planner *p, struct plan **ret_plan, struct err *err) MUST_CHECK;

/* The highest load on a rank of the parties in `which`, and their mean, as the layer's slots are routed to. */
double planner_peak(const struct planner *p, const int32_t *held, const uint8_t *live, const uint8_t *which,
                    double *ret_mean);

static inline bool planner_leaves(const struct plan_input *in, uint32_t party)
{
    return in->leaving && in->leaving[party];
}

static inline bool planner_joins(const struct plan_input *in, uint32_t party)
{
    return in->joining && in->joining[party];
}

#endif
