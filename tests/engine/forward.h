/* One forward pass over the tokens of a step, with the mixture-of-experts part left to the caller.
 * Stepping thread; keeps nothing between calls. */
#ifndef EEP_TESTS_ENGINE_FORWARD_H
#define EEP_TESTS_ENGINE_FORWARD_H

#include "tests/engine/compute.h"

/* For every token i: ret_y[i] = sum over its experts of weight * expert(h[i]).  h and ret_y are [n][hidden].
 * Called once per layer, also with n == 0: the other ranks count on this one. */
typedef int forward_moe_fn(void *user, uint32_t layer, uint32_t n, const float *h, float *ret_y);

/* Writes keys and values from each token's position on and nothing else that lasts, so that a step that failed is
 * simply run again.  Returns what `moe` returned when that is not 0. */
int forward_run(struct compute *compute, const struct forward_token *tokens, uint32_t n, forward_moe_fn *moe,
                void *user, struct err *err) MUST_CHECK;

#endif
