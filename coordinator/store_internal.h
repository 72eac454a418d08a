/* Inside the store: entries, waits, and what store.c and store_wait.c ask of each other.  Not for others. */
#ifndef EEP_COORDINATOR_STORE_INTERNAL_H
#define EEP_COORDINATOR_STORE_INTERNAL_H

/* Out of memory is told by hh.tbl == NULL after an addition, not by exit(). */
#define HASH_NONFATAL_OOM        1
#define uthash_nonfatal_oom(elt) ((void)(elt))
#include <uthash.h>

#include "coordinator/store.h"

struct entry {
    UT_hash_handle hh; /* by key */
    void *data;        /* owned; never NULL */
    size_t len;
    uint64_t revision;
    size_t index; /* place in store.order */
    char key[];
};

struct block;

/* A wait sleeps on the first of its keys that is missing; when that one comes, it looks again from the start. */
struct wait {
    UT_hash_handle hh; /* by id */
    uint64_t id, deadline_ns;
    struct block *block;      /* what it sleeps on; NULL once it is over */
    struct wait *prev, *next; /* in block->waits, or in store.over */
    int code;                 /* how it ended */
    size_t cost;              /* taken from the budget */
    size_t n;
    const char *keys[]; /* [n], into the same allocation */
};

/* All waits that sleep on one missing key. */
struct block {
    UT_hash_handle hh; /* by key */
    struct wait *waits;
    char key[];
};

struct store {
    size_t budget, used;
    uint64_t revision;
    struct entry *entries; /* hash */
    struct entry **order;  /* [n] of cap: every entry; by key unless `unordered` */
    size_t n, cap;
    bool unordered;
    struct wait *waits;   /* hash: all, also those that are over and not yet told */
    struct block *blocks; /* hash */
    struct wait *over;    /* list, oldest first */
    uint64_t deadline_ns; /* not after the first deadline of a sleeping wait; UINT64_MAX = none */
};

struct entry *store_find(const struct store *s, const char *key);
int store_key_check(const char *key, struct err *err) MUST_CHECK;
/* Gives back and takes in one go; ERR_LIMIT changes nothing. */
int store_budget_take(struct store *s, size_t give_back, size_t take, struct err *err) MUST_CHECK;
void store_waits_key_came(struct store *s, const char *key);
void store_waits_free(struct store *s);

#endif
