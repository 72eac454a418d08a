/* Planning offline: a problem and its plan as JSON.  What the fields mean is in docs/placement.md.  Pure, but for
 * jansson. */
#ifndef EEP_COORDINATOR_PLAN_JSON_H
#define EEP_COORDINATOR_PLAN_JSON_H

#include <jansson.h>

#include "common/err.h"

enum plan_policy { PLAN_EPLB, PLAN_ELASTIC };

/* ERR_INVALID when the input is not what the policy needs, naming the field; ERR_LIMIT when the experts do not fit.
 * The caller releases ret_output. */
int plan_json(enum plan_policy policy, const json_t *input, json_t **ret_output, struct err *err) MUST_CHECK;

#endif
