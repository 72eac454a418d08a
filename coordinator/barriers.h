/* Named barriers for users of the store: `size` members arrive under one name, and are released together.
 *
 * Everyone waits under a request id of its own and has a deadline of its own.  At the deadline, or when the waiter is
 * cancelled (its connection is gone), its arrival is withdrawn: an arrival never outlives the one who waits for it.  A
 * member that arrives twice (a retry) waits twice and counts once.  A name is free again as soon as it is released or
 * nobody waits.  Pure: time comes in, wake-ups go out. */
#ifndef EEP_COORDINATOR_BARRIERS_H
#define EEP_COORDINATOR_BARRIERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define BARRIER_NAME_MAX 480
#define BARRIER_SIZE_MAX 4096
#define BARRIER_MEMBER_MAX 128

struct barriers;
struct barriers *barriers_new(void);
void barriers_free(struct barriers *b); /* takes NULL */

/* `member` arrives at `name` and waits under `request` until the deadline.  The answer comes by barriers_next_wake,
 * perhaps at once.  ERR_INVALID: a bad name, size or member.  ERR_CONFLICT: others wait with another size.  ERR_LIMIT:
 * too many barriers. */
int barriers_arrive(struct barriers *b, uint64_t request, const char *name, uint32_t size, const char *member,
                    uint64_t deadline_ns, struct err *err) MUST_CHECK;
void barriers_cancel(struct barriers *b, uint64_t request);

/* Who has to be answered: code 0, or ERR_TIMEOUT with how many of how many are missing and who is there. */
struct barrier_wake {
    uint64_t request;
    int code;
    char text[ERR_TEXT_MAX];
};
bool barriers_next_wake(struct barriers *b, uint64_t now_ns, struct barrier_wake *ret_wake);
uint64_t barriers_deadline(const struct barriers *b); /* UINT64_MAX = none */
size_t barriers_count(const struct barriers *b);      /* names in use */

#endif
