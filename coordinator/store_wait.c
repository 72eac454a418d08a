/* Waits of the store: for all of some keys, with a deadline.  Pure; the loop thread.
 *
 *   kept, sleeping on the first missing key --key comes, others missing--> sleeping on another
 *                                           --key comes, all are there---> over, code 0
 *                                           --deadline-------------------> over, ERR_TIMEOUT
 *   over --store_next_wake--> told and forgotten
 *
 * A key counts only while it is there: one that came and was deleted again is missing. */
#include <string.h>

#include <stdlib.h>

#include <utlist.h>

#include "coordinator/store_internal.h"

static const char *wait_missing(const struct store *s, const struct wait *wait)
{
    for (size_t i = 0; i < wait->n; i++)
        if (!store_find(s, wait->keys[i]))
            return wait->keys[i];
    return NULL;
}

static int wait_sleep(struct store *s, struct wait *wait, const char *key)
{
    struct block *block = NULL;
    HASH_FIND_STR(s->blocks, key, block);
    if (!block) {
        size_t len = strlen(key);
        block = calloc(1, sizeof *block + len + 1);
        if (!block)
            return ERR_NOMEM;
        memcpy(block->key, key, len + 1);
        HASH_ADD_KEYPTR(hh, s->blocks, block->key, len, block);
        if (!block->hh.tbl) {
            free(block);
            return ERR_NOMEM;
        }
    }
    wait->block = block;
    DL_APPEND(block->waits, wait);
    return 0;
}

static void wait_unblock(struct store *s, struct wait *wait)
{
    struct block *block = wait->block;
    DL_DELETE(block->waits, wait);
    wait->block = NULL;
    if (!block->waits) {
        HASH_DEL(s->blocks, block);
        free(block);
    }
}

static void wait_end(struct store *s, struct wait *wait, int code)
{
    wait->code = code;
    DL_APPEND(s->over, wait);
}

static void wait_forget(struct store *s, struct wait *wait)
{
    if (wait->block)
        wait_unblock(s, wait);
    else
        DL_DELETE(s->over, wait);
    HASH_DEL(s->waits, wait);
    s->used -= wait->cost;
    free(wait);
}

void store_waits_free(struct store *s)
{
    struct wait *wait, *next;
    HASH_ITER(hh, s->waits, wait, next)
    wait_forget(s, wait);
}

void store_waits_key_came(struct store *s, const char *key)
{
    struct block *block = NULL;
    HASH_FIND_STR(s->blocks, key, block);
    if (!block)
        return;
    HASH_DEL(s->blocks, block);
    struct wait *wait, *next;
    DL_FOREACH_SAFE(block->waits, wait, next)
    {
        DL_DELETE(block->waits, wait);
        wait->block = NULL;
        const char *missing = wait_missing(s, wait);
        /* Without the memory to sleep on, it ends at once rather than never. */
        int code = missing ? wait_sleep(s, wait, missing) : 0;
        if (!missing || code < 0)
            wait_end(s, wait, code);
    }
    free(block);
}

static struct wait *wait_new(uint64_t id, const char *const *keys, size_t n, uint64_t deadline_ns)
{
    size_t size = sizeof(struct wait) + n * sizeof(char *);
    for (size_t i = 0; i < n; i++)
        size += strlen(keys[i]) + 1;
    struct wait *wait = calloc(1, size);
    if (!wait)
        return NULL;
    wait->id = id;
    wait->deadline_ns = deadline_ns;
    wait->cost = size + sizeof(struct block) + STORE_KEY_MAX + 1; /* with a block of its own */
    wait->n = n;
    char *text = (char *)&wait->keys[n];
    for (size_t i = 0; i < n; i++) {
        size_t len = strlen(keys[i]) + 1;
        memcpy(text, keys[i], len);
        wait->keys[i] = text;
        text += len;
    }
    return wait;
}

int store_wait(struct store *s, uint64_t id, const char *const *keys, size_t n, uint64_t deadline_ns, struct err *err)
{
    struct wait *wait = NULL;
    HASH_FIND(hh, s->waits, &id, sizeof id, wait);
    if (wait)
        return err_set(err, ERR_CONFLICT, "wait %llu is there already", (unsigned long long)id);
    for (size_t i = 0; i < n; i++) {
        int rc = store_key_check(keys[i], err);
        if (rc < 0)
            return rc;
    }
    if (store_check(s, keys, n))
        return 0;

    wait = wait_new(id, keys, n, deadline_ns);
    if (!wait)
        return err_set(err, ERR_NOMEM, "no memory to wait for %zu keys", n);
    int rc = store_budget_take(s, 0, wait->cost, err);
    if (rc < 0) {
        free(wait);
        return err_wrap(err, "cannot wait for %zu keys", n);
    }
    HASH_ADD(hh, s->waits, id, sizeof wait->id, wait);
    if (!wait->hh.tbl)
        goto give_back;
    if (wait_sleep(s, wait, wait_missing(s, wait)) < 0)
        goto remove;
    if (deadline_ns < s->deadline_ns)
        s->deadline_ns = deadline_ns;
    return 1;

remove:
    HASH_DEL(s->waits, wait);
give_back:
    s->used -= wait->cost;
    free(wait);
    return err_set(err, ERR_NOMEM, "no memory to wait for %zu keys", n);
}

void store_wait_cancel(struct store *s, uint64_t id)
{
    struct wait *wait = NULL;
    HASH_FIND(hh, s->waits, &id, sizeof id, wait);
    if (wait)
        wait_forget(s, wait);
}

/* The sleeping wait with the first deadline, NULL for none; brings s->deadline_ns up to date. */
static struct wait *wait_first(struct store *s)
{
    struct wait *first = NULL, *wait, *next;
    HASH_ITER(hh, s->waits, wait, next)
    if (wait->block && wait->deadline_ns != UINT64_MAX && (!first || wait->deadline_ns < first->deadline_ns))
        first = wait;
    s->deadline_ns = first ? first->deadline_ns : UINT64_MAX;
    return first;
}

bool store_next_wake(struct store *s, uint64_t now_ns, struct store_wake *ret_wake)
{
    if (!s->over && s->deadline_ns <= now_ns) {
        struct wait *late = wait_first(s);
        if (late && late->deadline_ns <= now_ns) {
            wait_unblock(s, late);
            wait_end(s, late, ERR_TIMEOUT);
        }
    }
    struct wait *wait = s->over;
    if (!wait)
        return false;
    struct store_wake wake = {.id = wait->id, .code = wait->code};
    const char *missing = wait->code < 0 ? wait_missing(s, wait) : NULL;
    if (missing)
        memcpy(wake.missing, missing, strlen(missing) + 1);
    wait_forget(s, wait);
    *ret_wake = wake;
    return true;
}

/* May be early (the wait that it belonged to has ended since): then store_next_wake finds nothing and corrects it. */
uint64_t store_deadline(const struct store *s)
{
    return s->over ? 0 : s->deadline_ns;
}
