/* Inside plan_json: the input, read and checked.  Pure, but for jansson.  Not for others; see plan_json.h.
 *
 * Ranks have two numberings here: the old one (the present view's ranks, then the joiners as they are numbered) and
 * that of the target (stayers in old order, then joiners in the given order).  Parties, the planner's own, are the old
 * ranks, then the joiners in the given order. */
#ifndef EEP_COORDINATOR_PLAN_JSON_PROBLEM_H
#define EEP_COORDINATOR_PLAN_JSON_PROBLEM_H

#include "coordinator/plan_json.h"
#include "coordinator/planner.h"

struct problem {
    enum plan_policy policy;
    uint32_t layers, logical, physical, groups, nodes, gpus, samples;
    double *load;   /* [layers][logical]: the mean of the samples */
    double *sample; /* [samples][layers][logical] */
    uint32_t old, slots, n_join, parties;
    uint64_t expert_bytes;
    struct expert_map *now; /* over parties; NULL without `current` */
    uint8_t *leaving, *joining;
    uint32_t *node;
    uint32_t *number; /* [parties]: in the old numbering */
    uint32_t *party;  /* [gpus]: of a target rank */
    struct plan_options options;
};

/* `p` has the policy; problem_done also after a failure. */
int problem_read(struct problem *p, const json_t *input, struct err *err) MUST_CHECK;
void problem_done(struct problem *p);

#endif
