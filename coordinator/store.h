/* The key-value store, in memory: values with revisions, waits with deadlines.  Pure: time comes in, wake-ups go out.
 * Missing is not the same as empty. */
#ifndef EEP_COORDINATOR_STORE_H
#define EEP_COORDINATOR_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define STORE_KEY_MAX 480
#define STORE_VALUE_MAX (8u << 20)

struct store;
struct store_value {
    const void *data; /* borrowed until the next call */
    size_t len;
    uint64_t revision; /* of the last change of this key; revisions count all changes of the store, from 1 */
};

struct store *store_new(size_t budget_bytes); /* total memory for keys and values */
void store_free(struct store *store);
int store_set(struct store *s, const char *key, const void *data, size_t len, uint64_t *ret_revision, struct err *err) MUST_CHECK;
int store_get(struct store *s, const char *key, struct store_value *ret_value, struct err *err) MUST_CHECK; /* ERR_NOTFOUND */
bool store_check(struct store *s, const char *const *keys, size_t n); /* all present */
/* Adds to a counter (decimal text; a missing key is 0).  Overflow and a value that is no number are ERR_INVALID. */
int store_add(struct store *s, const char *key, int64_t amount, int64_t *ret_value, struct err *err) MUST_CHECK;
/* expected NULL: the key must be missing.  *ret_swapped tells; *ret_value is what is there afterwards. */
int store_cas(struct store *s, const char *key, const void *expected, size_t expected_len, const void *data, size_t len,
              bool *ret_swapped, struct store_value *ret_value, struct err *err) MUST_CHECK;
int store_delete(struct store *s, const char *key, struct err *err) MUST_CHECK; /* ERR_NOTFOUND */
/* Keys with this prefix, in byte order, after `after` (NULL = from the first), at most max.  The callback must not change the store. */
size_t store_list(struct store *s, const char *prefix, const char *after, size_t max,
                  void (*each)(void *user, const char *key, const struct store_value *value), void *user);

/* A wait for all of `keys`.  Done at once (returns 0, no wait kept) or kept under `id` until a change completes it,
 * its deadline passes or it is cancelled.  Returns 1 when kept. */
int store_wait(struct store *s, uint64_t id, const char *const *keys, size_t n, uint64_t deadline_ns, struct err *err) MUST_CHECK;
void store_wait_cancel(struct store *s, uint64_t id);
/* Ends of waits since the last call: completed by a change, or expired at `now`.  code 0 or ERR_TIMEOUT; `missing`
 * names the first key that is not there. */
struct store_wake { uint64_t id; int code; char missing[STORE_KEY_MAX + 1]; };
bool store_next_wake(struct store *s, uint64_t now_ns, struct store_wake *ret_wake);
uint64_t store_deadline(const struct store *s); /* UINT64_MAX = none */

#endif
