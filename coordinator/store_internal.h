/* Inside coordinator/store*.c: entries, waits, queues, and what the files ask of each other.  Not for others. */
#ifndef EEP_COORDINATOR_STORE_INTERNAL_H
#define EEP_COORDINATOR_STORE_INTERNAL_H

/* Out of memory is told by hh.tbl == NULL after an addition, not by exit(). */
#define HASH_NONFATAL_OOM        1
#define uthash_nonfatal_oom(elt) ((void)(elt))
/* Eight bytes at a time: uthash's own goes byte by byte, and every call of the store looks up a key. */
#define HASH_FUNCTION(key, len, hash) ((hash) = store_hash(key, len))
#include <uthash.h>
/* Growing at chains of 6 instead of 10: what a look-up costs is the memory that its chain is in, and each link of it is
 * somewhere else. */
#undef HASH_BKT_CAPACITY_THRESH
#define HASH_BKT_CAPACITY_THRESH 6U

#include "common/deadlines.h"
#include "common/digest.h"
#include "common/topology.h"
#include "coordinator/store.h"

static inline unsigned store_hash(const void *key, size_t len)
{
    uint64_t digest = digest_bytes(key, len, 0);
    return (unsigned)(digest ^ digest >> 32);
}

struct hold;

struct entry {
    UT_hash_handle hh; /* by key */
    struct blob *value; /* a reference; never NULL */
    uint64_t revision;
    uint64_t batch;             /* the last batch that this key's state went into; 0 = none */
    struct hold *hold;          /* NULL = no lease */
    struct entry *left, *right; /* store_index.c */
    uint32_t under;             /* entries in this subtree */
    bool durable;
    char key[];
};

/* A key's place in its lease. */
struct hold {
    struct entry *entry;
    struct lease *lease;
    struct hold *prev, *next;
};

struct lease {
    UT_hash_handle hh; /* by id */
    uint64_t id;
    uint32_t ttl_ms;
    struct deadline deadline;
    struct hold *holds;
};

struct block;
struct queue;

/* A wait for keys sleeps on the first of them that is missing; when that one comes, it looks again from the start.
 * A pop waits in its queue. */
struct wait {
    UT_hash_handle hh; /* by id */
    uint64_t id;
    struct deadline deadline;
    struct block *block;      /* what it sleeps on */
    struct queue *queue;      /* of a pop that waits */
    struct wait *prev, *next; /* in block->waits, queue->pops, or in store.over (neither) */
    int code;                 /* how it ended */
    struct blob *value;       /* of a pop that has ended */
    uint64_t left;
    size_t cost;              /* taken from the budget */
    bool pop;
    size_t n;
    const char *keys[]; /* [n], into the same allocation */
};

/* All waits that sleep on one missing key. */
struct block {
    UT_hash_handle hh; /* by key */
    struct wait *waits;
    char key[];
};

struct item {
    struct blob *value;
    struct item *prev, *next;
};
/* Exists while it has values or someone who waits for one. */
struct queue {
    UT_hash_handle hh; /* by name */
    struct item *items;
    uint64_t n;
    struct wait *pops;
    char name[];
};

/* What was answered to an addition with an id. */
struct request {
    UT_hash_handle hh; /* by id */
    struct request *prev, *next; /* oldest first */
    uint64_t revision;
    int64_t amount, value;
    bool durable;
    uint64_t key_digest;
    char id[];
};

struct change {
    uint64_t revision;
    struct blob *value; /* a reference; NULL: deleted */
    char *key;          /* owned */
};

struct store {
    size_t budget, used;
    bool batches;
    uint64_t revision;
    struct entry *entries; /* hash */
    struct entry *index;   /* the same, in order */
    struct queue *queues;  /* hash */
    struct lease *leases;  /* hash */
    struct deadlines lease_deadlines;
    struct request *requests, *requests_old; /* hash and list */

    struct wait *waits;   /* hash: all, also those that are over and not yet told */
    struct block *blocks; /* hash */
    struct wait *over;    /* list, oldest first */
    struct deadlines deadlines;

    struct change *changes; /* ring */
    size_t changes_cap, changes_at, changes_n;
    size_t history_bytes, history_used;
    uint64_t history_first;

    struct store_batch batch;
    uint64_t deleted_batch; /* the last batch that took a durable key away */
    uint64_t changed_batch; /* of the entry that was changed last */
};

struct entry *store_find(const struct store *s, const char *key);
bool store_present(const struct store *s, const char *key);
/* Gives back and takes in one go; ERR_LIMIT changes nothing. */
int store_budget_take(struct store *s, size_t give_back, size_t take, struct err *err) MUST_CHECK;
/* Takes an entry away, with everything that follows from it. */
void store_entry_remove(struct store *s, struct entry *entry);

/* store_index.c */
void store_index_insert(struct store *s, struct entry *entry);
void store_index_remove(struct store *s, struct entry *entry);

/* store_wait.c */
void store_waits_key_came(struct store *s, const char *key);
/* Someone who waits for the key of a queue that got a value; one value wakes one. */
void store_waits_value_came(struct store *s, const char *name);
void store_waits_free(struct store *s);
struct wait *store_wait_new(uint64_t id, const char *const *keys, size_t n);
/* Into the store, with its deadline and its cost; on failure it is freed. */
int store_wait_keep(struct store *s, struct wait *wait, uint64_t deadline_ns, struct err *err) MUST_CHECK;
void store_wait_end(struct store *s, struct wait *wait, int code);

/* store_queue.c */
void store_queue_unwait(struct store *s, struct wait *wait);
void store_queue_give_back(struct store *s, struct wait *wait);
void store_queues_clear(struct store *s, const char *prefix); /* "" = all */

/* store_lease.c */
void store_lease_hold(struct store *s, struct entry *entry, struct lease *lease); /* NULL: lets go */
struct lease *store_lease_find(const struct store *s, uint64_t id);
void store_leases_expire(struct store *s, uint64_t now_ns);
void store_leases_free(struct store *s);

/* store_history.c */
int store_history_open(struct store *s, size_t bytes) MUST_CHECK;
void store_history_add(struct store *s, const char *key, struct blob *value); /* at s->revision */
void store_history_free(struct store *s);

/* store_batch.c */
void store_batch_add(struct store *s, enum store_op_kind kind, const char *key, const void *data, size_t len,
               uint64_t revision);
void store_request_remember(struct store *s, const char *id, const char *key, int64_t amount, int64_t value, bool durable);
struct request *store_request_find(const struct store *s, const char *id);
uint64_t store_request_key_digest(const char *key);
void store_requests_free(struct store *s);

#endif
