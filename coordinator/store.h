/* The key-value store, in memory: values with revisions, counters, queues, leases, waits with deadlines, and the
 * changes of late for those who watch.  Pure: time comes in; wake-ups and batches for the disk go out.
 *
 * Keys are byte strings without NUL, in byte order.  Missing is not the same as empty.  A key is durable (its changes
 * come out in batches, for coordinator/store_disk.h) or ephemeral (never in a batch).  Sentences name the limit that was
 * hit; a call that fails changes nothing. */
#ifndef EEP_COORDINATOR_STORE_H
#define EEP_COORDINATOR_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define STORE_KEY_MAX 8192       /* of ephemeral keys and queues */
#define STORE_KEY_DURABLE_MAX 480 /* LMDB takes 511 */
#define STORE_VALUE_MAX (8u << 20)
#define STORE_KEYS_MAX 1024      /* of one wait, multi get or multi set; TCPStore: 131072 */
#define STORE_REQUEST_MAX 128    /* bytes of a request id */
#define STORE_REQUESTS_KEPT 65536
#define STORE_QUEUE_MAX 65536    /* values in one queue, when its user sets no lower bound */
#define STORE_LEASE_MS_MIN 100
#define STORE_LEASE_MS_MAX 86400000u

struct store;

struct store_config {
    size_t budget_bytes; /* for everything but the history: keys, values, queues, waits, leases */
    size_t history_bytes; /* for changes of late; 0 = a sixteenth of the budget, at most 16 MiB */
    bool batches;        /* changes of durable keys go out in batches; else they are kept in memory only */
};
struct store *store_new(const struct store_config *config); /* NULL when out of memory */
void store_free(struct store *store);                       /* takes NULL */

/* ---- values ---- */

struct store_value {
    const void *data; /* borrowed until the next call */
    size_t len;
    uint64_t revision; /* of the last change of this key; revisions count all changes of the store */
    uint64_t lease;    /* 0 = none */
    bool durable;
    uint64_t batch;    /* this state may be told when this batch is on disk; 0 = at once */
};
struct store_put {
    const char *key;
    const void *data;
    size_t len;
    bool ephemeral;
    uint64_t lease; /* 0 = none; a key with a lease is ephemeral */
};

int store_key_check(const char *key, bool ephemeral, struct err *err) MUST_CHECK;
int store_set(struct store *s, const struct store_put *put, uint64_t *ret_revision, struct err *err) MUST_CHECK;
/* All or nothing, in one batch.  *ret_revision: of the last one. */
int store_set_all(struct store *s, const struct store_put *puts, size_t n, uint64_t *ret_revision,
                  struct err *err) MUST_CHECK;
/* What the last successful set, add, append or swap has made may be told when this batch is on disk; 0 = at once. */
uint64_t store_changed_batch(const struct store *s);
/* ERR_NOTFOUND, and then *ret_batch (when given) is the batch after which "missing" may be told. */
int store_get(const struct store *s, const char *key, struct store_value *ret_value, uint64_t *ret_batch,
              struct err *err) MUST_CHECK;
/* Present: there is a key, or a queue that is not empty. */
bool store_check(const struct store *s, const char *const *keys, size_t n);
/* Adds to a counter (its value is the decimal text; a missing key is 0).  Overflow and a value that is no number are
 * ERR_INVALID.  request ("" = none): an id under which a repetition gets the first answer and adds nothing; with
 * another key or amount it is ERR_CONFLICT. */
int store_add(struct store *s, const char *key, int64_t amount, bool ephemeral, const char *request,
              int64_t *ret_value, uint64_t *ret_revision, struct err *err) MUST_CHECK;
/* expected NULL: the key must be missing.  *ret_swapped tells; *ret_value is what is there afterwards (data NULL:
 * nothing). */
int store_cas(struct store *s, const struct store_put *put, const void *expected, size_t expected_len,
              bool *ret_swapped, struct store_value *ret_value, struct err *err) MUST_CHECK;
/* Appends to a value; a missing key is empty. */
int store_append(struct store *s, const struct store_put *put, struct err *err) MUST_CHECK;
int store_delete(struct store *s, const char *key, struct err *err) MUST_CHECK; /* ERR_NOTFOUND */
/* Keys and queues with this prefix go; ephemeral ones only.  Returns how many. */
size_t store_clear(struct store *s, const char *prefix);

/* Keys with this prefix, in byte order, after `after` (NULL = from the first), at most max; false from the callback
 * stops.  It must not change the store.  Returns how many it was called with. */
size_t store_list(const struct store *s, const char *prefix, const char *after, size_t max,
                  bool (*each)(void *user, const char *key, const struct store_value *value), void *user);
size_t store_count(const struct store *s, const char *prefix); /* log n */
uint64_t store_revision(const struct store *s);
size_t store_used(const struct store *s);   /* bytes of the budget */
size_t store_budget(const struct store *s);

/* ---- leases ---- */

/* The lease ends ttl_ms after it was granted or last kept, and takes its keys with it. */
int store_lease_grant(struct store *s, uint32_t ttl_ms, uint64_t now_ns, uint64_t *ret_lease, struct err *err) MUST_CHECK;
int store_lease_keep(struct store *s, uint64_t lease, uint64_t now_ns, uint32_t *ret_ttl_ms, struct err *err) MUST_CHECK;
int store_lease_end(struct store *s, uint64_t lease, struct err *err) MUST_CHECK; /* ERR_NOTFOUND */

/* ---- queues: ephemeral ---- */

/* max_length 0 = STORE_QUEUE_MAX; ERR_LIMIT when it is that long.  *ret_length: with the new value, before anyone
 * who waits takes it. */
int store_queue_push(struct store *s, const char *name, const void *data, size_t len, uint32_t max_length,
                     uint64_t *ret_length, struct err *err) MUST_CHECK;
/* 0: *ret_data is malloc'ed, the caller's.  1: kept under id until a value comes or the deadline passes (deadline 0:
 * ERR_NOTFOUND at once instead).  Who waits longest is served first. */
int store_queue_pop(struct store *s, uint64_t id, const char *name, uint64_t deadline_ns, void **ret_data,
                    size_t *ret_len, uint64_t *ret_left, struct err *err) MUST_CHECK;
uint64_t store_queue_length(const struct store *s, const char *name);

/* ---- waits ---- */

/* A wait for all of `keys`.  Done at once (returns 0, no wait kept) or kept under `id` until a change completes it,
 * its deadline passes or it is cancelled.  Returns 1 when kept. */
int store_wait(struct store *s, uint64_t id, const char *const *keys, size_t n, uint64_t deadline_ns, struct err *err) MUST_CHECK;
/* Also of a pop; a value that was given to it and not told yet goes back to the front of its queue. */
void store_wait_cancel(struct store *s, uint64_t id);
/* Ends of waits since the last call: completed by a change, or expired at `now`.  code 0 or ERR_TIMEOUT; `missing`
 * begins the first key that is not there, or names the queue.  data: of a pop; the caller's, to be freed. */
struct store_wake {
    uint64_t id;
    int code;
    char missing[256];
    void *data;
    size_t len;
    uint64_t left; /* values left in the queue */
};
/* Ends leases that are over as well. */
bool store_next_wake(struct store *s, uint64_t now_ns, struct store_wake *ret_wake);
uint64_t store_deadline(const struct store *s); /* UINT64_MAX = none */

/* ---- changes of late ---- */

struct store_change {
    uint64_t revision;
    const char *key;   /* borrowed until the next change */
    const void *data;  /* NULL: the key is gone */
    size_t len;
};
/* Revisions from here on are remembered. */
uint64_t store_history_first(const struct store *s);
/* The first change with a revision >= from whose key has the prefix; false: none up to now.
 * Changes are in order and without gaps as long as from >= store_history_first. */
bool store_history_next(const struct store *s, const char *prefix, uint64_t from, struct store_change *ret_change);

/* ---- batches for the disk ---- */

enum store_op_kind {
    STORE_OP_PUT = 1,     /* key, value, revision */
    STORE_OP_DELETE,      /* key */
    STORE_OP_REQUEST,     /* key: id of the request; value: what is remembered of it; revision: its age */
    STORE_OP_REQUEST_END, /* key: id */
};
struct store_op {
    enum store_op_kind kind;
    const char *key;
    size_t key_len;
    const void *data;
    size_t len;
    uint64_t revision;
};
/* Changes of one loop turn, to be on disk all or none.  In memory and in the log each is u8 kind, u32 key_len, u32 len,
 * u64 revision, the key, the value. */
#define STORE_OP_HEAD (1 + 4 + 4 + 8)
struct store_batch {
    uint64_t number;
    uint64_t first_revision, last_revision; /* of its changes */
    size_t bytes, n;
    uint8_t *data; /* owned */
    size_t cap;
};
/* The batch that is open now: changes go into it until it is taken.  Numbers count from 1. */
uint64_t store_batch_open(const struct store *s);
bool store_batch_any(const struct store *s);
uint64_t store_batch_first(const struct store *s); /* first revision in the open batch; UINT64_MAX = it is empty */
/* Takes the open batch and opens the next. */
void store_batch_take(struct store *s, struct store_batch *ret_batch);
void store_batch_done(struct store_batch *batch);
/* *at = 0 at first; false at the end. */
bool store_batch_next(const struct store_batch *batch, size_t *at, struct store_op *ret_op);
/* A record of the disk (PUT or REQUEST), before anything else is done with the store. */
int store_load(struct store *s, const struct store_op *op, struct err *err) MUST_CHECK;
/* Revisions go on after this one (or after the highest loaded). */
void store_load_end(struct store *s, uint64_t revision);

#endif
