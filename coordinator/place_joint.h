/* Several samples of load jointly: the sets of one layer that hold out best over all of them.  Pure, deterministic. Not
 * for others; see planner.h.
 *
 * A placement that is even for the mean of the samples can be uneven for each of them: two experts that are hot at the
 * same time weigh no more in the mean than two that take turns.  This search begins where the one for the mean ended,
 * and lowers the sum over samples and ranks of the eighth power of the load. */
#ifndef EEP_COORDINATOR_PLACE_JOINT_H
#define EEP_COORDINATOR_PLACE_JOINT_H

#include "coordinator/place.h"

struct place_joint {
    uint32_t samples;
    const double *weight; /* [samples][experts]; a sample without load is left out */
    double balance;       /* mean of the samples' balances that is wanted */
    double lambda;        /* that an arrival must buy of it */
    double peak_max;      /* no higher load than this under the weights of the place */
    bool held_only;       /* no arrivals */
    uint64_t work;        /* loads looked at (a rank under a sample), at most; 0 = any number */
};

/* The best state met: by the mean of the samples' balances, less lambda an arrival.  Never a worse one than at the
 * start. */
void place_joint(struct place *p, const struct place_joint *goal);
/* Mean over samples of the mean load of a rank over the highest. */
double place_joint_balance(const struct place *p, const struct place_joint *goal);

#endif
