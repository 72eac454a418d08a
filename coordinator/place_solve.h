/* One layer of the elastic planner, from what the ranks hold to the sets at the commit and after the fill.  Pure,
 * deterministic.  Not for others; see planner.h. */
#ifndef EEP_COORDINATOR_PLACE_SOLVE_H
#define EEP_COORDINATOR_PLACE_SOLVE_H

#include "coordinator/place_search.h"

struct place_goal {
    double balance;        /* wanted, or the ceiling where that is lower */
    double peak_max;       /* and no higher load than this; INFINITY = any */
    double lambda;         /* balance that an arrival must buy, at least */
    uint32_t arrivals_max; /* beyond those that cover what is lost */
    uint64_t work;         /* spent on further starts while it lasts */
};

/* The highest balance that any placement of these weights on ranks * slots can have. */
double place_ceiling(const struct place *p);
/* Fewest arrivals after which `survivors` ranks of the final ones can be within mean / balance of load. */
uint32_t place_bound_balance(const struct place *p, uint32_t survivors, double balance);

/* Sets and tiers are those of the present map on the final ranks.  Afterwards the sets are those of the commit. */
void place_solve(struct place *p, const struct place_goal *goal);
/* From the sets of the commit, whose arrivals count as held from then on, to those of the end: arrivals into what is
 * still empty, where they help, and into the rest. */
void place_fill(struct place *p);

#endif
