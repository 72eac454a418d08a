/* Random numbers for names that must never repeat: incarnations, idempotency keys.  From the kernel, not seeded.
 * Edges only: a core gets its random numbers handed in. */
#ifndef EEP_COMMON_RAND_H
#define EEP_COMMON_RAND_H

#include <stdint.h>

#include "common/err.h"

/* A random number that is not 0.  May block only in early boot, before the kernel has gathered entropy. */
int rand_u64(uint64_t *ret_value, struct err *err) MUST_CHECK;

#endif
