/* Placement: from the present map to a target map and the moves that lead there.  Pure, deterministic functions. */
#ifndef EEP_COORDINATOR_PLANNER_H
#define EEP_COORDINATOR_PLANNER_H

#include "common/topology.h"

/* Parties are the old view's ranks in order, then the joiners. */
struct plan_input {
    const struct expert_map *now; /* over parties; a joiner's slots are empty.  Its version is not used. */
    const uint8_t *leaving;       /* [parties]; NULL = nobody */
    const uint8_t *joining;       /* [parties]; NULL = nobody */
    const uint32_t *node;         /* [parties]; NULL = all on one node */
    const double *load;           /* [layers][logical]; NULL or all zero = spread evenly */
    /* Beside it: samples whose balances are to be good one by one; load is their mean then. */
    const double *samples; /* [n_samples][layers][logical] */
    uint32_t n_samples;    /* 0 = none */
};

/* How the elastic planner trades; plan_options_default gives what stands behind each. */
struct plan_options {
    double target_balance; /* mean load of a rank over the highest, wanted at the commit; 0.98 */
    double lambda;         /* balance of one layer that an arrival must buy, the same for all layers; 0 */
    double cross_cost;     /* of an arrival from another node, in arrivals from the own one; 4 */
    double dip;            /* of the time of a step, while replicas are retired; 0.02 */
    bool joiners_only;     /* before the commit of a scale-up nothing arrives at ranks that serve */
    bool fill;             /* fill empty slots after the commit; true */
    bool uneven;           /* replicas of an expert may have more entries than others; true */
};
void plan_options_default(struct plan_options *ret_options);

/* The elastic planner: as few arrivals as reach the target balance, then the fill of what is still empty.  Options
 * NULL: the defaults.  ERR_LIMIT when the experts do not fit. */
int plan_make(const struct plan_input *in, const struct plan_options *options, struct plan **ret_plan,
              struct err *err) MUST_CHECK;

/* The same for a window: with four samples or more, jointly for all of them when that holds out better than their mean on
 * samples left aside.  The plan says which, and its balances by sample. */
int plan_make_window(const struct plan_input *in, const struct plan_options *options, struct plan **ret_plan,
                     struct err *err) MUST_CHECK;

/* Where a cold start puts the experts: every one at least once, replicas spread evenly.  held and live are set. */
int plan_initial(uint32_t layers, uint32_t logical, uint32_t ranks, uint32_t slots, struct expert_map **ret_map,
                 struct err *err) MUST_CHECK;

/* Walks the plan round by round: coverage by live replicas on serving ranks at every moment, no slot written while
 * live, sources held and verified, no slot written twice in a round, the end equals the target, the counts are right,
 * and while nobody leaves no layer has a higher load on a rank than now. */
int plan_validate(const struct plan_input *in, const struct plan *plan, struct err *err) MUST_CHECK;

/* The map over parties once `rounds_done` rounds have been completed and activated, with what the commit
 * (rounds_done = rounds_before) or the end changes in what is routed to.  Entries are those of the commit and of the
 * target there, else an expert whose replicas have changed since has one entry for each.  Leavers keep what they have; joiners' filled
 * slots are live, which counts from the commit on (before it a joiner is no rank).  Select the members' rows with
 * expert_map_select.  The version is that of in->now.  NULL when out of memory. */
struct expert_map *plan_map_after(const struct plan_input *in, const struct plan *plan, uint32_t rounds_done);

/* The map announced at the start of `round`: the rounds before it are activated, its retires are no longer live, and
 * the slots that it writes hold nothing.  NULL when out of memory. */
struct expert_map *plan_map_during(const struct plan_input *in, const struct plan *plan, uint32_t round);

/* After a death: promotes dormant copies where an expert lost its last live replica, in place (map is the caller's
 * own copy, not shared).  Returns the number of (layer, expert) pairs that have no copy at all. */
uint64_t plan_cover_from_dormant(struct expert_map *map);

#endif
