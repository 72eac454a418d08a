/* Deadlines in order: an intrusive binary heap.  The first one is found at once, adding and removing cost log n.
 * Pure; one thread. */
#ifndef EEP_COMMON_DEADLINES_H
#define EEP_COMMON_DEADLINES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define DEADLINE_NEVER UINT64_MAX

/* Embedded in what has a deadline; zeroed it is in no heap. */
struct deadline {
    uint64_t ns;
    size_t place; /* index in the heap + 1; 0 = not in it */
};
struct deadlines {
    struct deadline **v;
    size_t n, cap;
};

void deadlines_done(struct deadlines *d); /* the entries are the caller's */
/* Puts it in, or moves it when it is in already.  DEADLINE_NEVER takes it out.  0 or ERR_NOMEM (then it is not in). */
int deadlines_set(struct deadlines *d, struct deadline *entry, uint64_t ns) MUST_CHECK;
void deadlines_remove(struct deadlines *d, struct deadline *entry); /* nothing when it is not in */
struct deadline *deadlines_first(const struct deadlines *d);        /* NULL = none */
uint64_t deadlines_next_ns(const struct deadlines *d);              /* DEADLINE_NEVER = none */

#endif
