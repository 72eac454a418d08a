/* The local search over the sets of one layer.  Pure, deterministic.  Not for others; see planner.h. */
#ifndef EEP_COORDINATOR_PLACE_SEARCH_H
#define EEP_COORDINATOR_PLACE_SEARCH_H

#include "coordinator/place.h"

/* How a shift looks for its change. */
struct place_style {
    uint32_t hot, cold; /* from so many of the hottest ranks to so many of the coldest */
    double piece;       /* relocates replicas of at most this part of the mean load */
    double leave;       /* prefers what leaves the source with this part of the mean */
    bool polish;        /* polishes between shifts: fewer arrivals for more time */
    bool wide;          /* polishing looks at more of the cold ranks: slower */
    bool swap;          /* polishing may also replace what arrives: slower */
};

/* While the hottest rank strictly improves and no arrival is added: mute, unmute, relocate or exchange, the change with
 * the lowest new maximum.  Ends when no load is above `limit`. */
void place_polish(struct place *p, double limit);

/* Polish and shift by gain per cost until no load is above `limit`; stops for want of a change that gains, or when
 * there are `arrivals_max` arrivals.  Leaves the best state met: a load within the limit with the fewest arrivals, else
 * the lowest maximum; with lambda > 0 the last one in which the arrivals had bought so much balance each.
 * Returns its place_peak. */
double place_shift(struct place *p, const struct place_style *style, double limit, uint32_t arrivals_max, double lambda);

/* Takes back arrivals that turn out not to be needed for `limit`. */
void place_prune(struct place *p, double limit);

/* Experts on no rank, heaviest first, to where phi is lowest: held copies first, then free places, then in place of a
 * redundant replica. */
void place_cover(struct place *p);

#endif
