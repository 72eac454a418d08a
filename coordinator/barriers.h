/* Named barriers for any user of the store: everyone of a group arrives, then all are released.  Pure.
 *
 * Arrivals are a set of members: whoever arrives again counts once, and its earlier call is told to retry.  A member
 * whose call is cancelled (its connection is gone) or expires has not arrived.  A name may be used again at once, for the
 * next round. */
#ifndef EEP_COORDINATOR_BARRIERS_H
#define EEP_COORDINATOR_BARRIERS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define BARRIER_NAME_MAX 480
#define BARRIER_SIZE_MAX 65536
#define BARRIER_MEMBER_MAX 128 /* with the NUL */
#define BARRIERS_MAX 4096      /* names in use */

struct barriers;
struct barriers *barriers_new(void);
void barriers_free(struct barriers *b); /* takes NULL */

struct barrier_arrival {
    uint64_t request; /* the caller's id of this call; unique */
    const char *name;
    uint32_t size;
    const char *member;          /* a rank in decimal, or any name */
    const char *const *expected; /* [n_expected] names of all members, or n_expected 0; all or none of a round's members
                                  * need to say it */
    size_t n_expected;
    uint64_t now_ns, deadline_ns;
};
/* The member waits until the deadline.  The answer comes by barriers_next_wake, perhaps at once.  ERR_INVALID: a bad
 * name, size or member.  ERR_CONFLICT: others wait with another size or other members, or this one is one too many: not
 * among the expected, or a rank not below the size where the others are ranks.  ERR_LIMIT: too many barriers. */
int barriers_arrive(struct barriers *b, const struct barrier_arrival *arrival, struct err *err) MUST_CHECK;
void barriers_cancel(struct barriers *b, uint64_t request);

/* Who has to be answered: code 0: released.  ERR_TIMEOUT: who is missing.  ERR_STALE: the same member has arrived by
 * another call since; if that was not meant, retry. */
struct barrier_wake {
    uint64_t request;
    int code;
    char text[ERR_TEXT_MAX];
    uint64_t round; /* released: counts the releases of all barriers */
};
bool barriers_next_wake(struct barriers *b, uint64_t now_ns, struct barrier_wake *ret_wake);
uint64_t barriers_deadline(const struct barriers *b); /* UINT64_MAX = none */
size_t barriers_count(const struct barriers *b);      /* names in use */

struct barrier_info {
    const char *name; /* all borrowed during the callback */
    uint32_t size, arrived;
    uint64_t since_ns, deadline_ns; /* of the first to arrive; the nearest deadline */
};
/* Barriers that somebody waits at, oldest first; false stops. */
void barriers_list(const struct barriers *b, bool (*each)(void *user, const struct barrier_info *info), void *user);
/* Members of one: who has arrived, then (as far as that is known) who is missing.  ERR_NOTFOUND. */
int barriers_show(const struct barriers *b, const char *name, struct barrier_info *ret_info,
                  bool (*each)(void *user, const char *member, bool arrived), void *user, struct err *err) MUST_CHECK;

#endif
