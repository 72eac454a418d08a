/* The public DeepSeek EPLB algorithm: a balanced placement from scratch.  Pure, deterministic.
 *
 * Same output as the public code on the same input: arithmetic is float32, ties go to the lower index.  One deviation:
 * a layer without any load is placed as if all experts had the same, where the public code gives every spare replica to
 * expert 0. */
#ifndef EEP_COORDINATOR_PLANNER_EPLB_H
#define EEP_COORDINATOR_PLANNER_EPLB_H

#include <stdint.h>

#include "common/err.h"

struct eplb_input {
    uint32_t layers, logical, physical;
    uint32_t groups, nodes, gpus; /* groups that do not divide by nodes: placed globally, as one group on one node */
    const float *load;            /* [layers][logical], finite and >= 0 */
};

/* Fills phy2log [layers][physical] and logcnt [layers][logical], which the caller provides.  ERR_INVALID, naming the
 * two sizes, when physical does not divide by gpus, logical by groups, or gpus by nodes; ERR_LIMIT when physical is
 * below logical.  The outputs are untouched on failure. */
int eplb_place(const struct eplb_input *in, int32_t *ret_phy2log, uint32_t *ret_logcnt, struct err *err) MUST_CHECK;

#endif
