/* Waits of the store: for all of some keys or for a value of a queue, with a deadline.  Pure; the loop thread.
 *
 *   kept, sleeping on the first missing key --key comes, others missing--> sleeping on another
 *                                           --key comes, all are there---> over, code 0
 *                                           --deadline-------------------> over, ERR_TIMEOUT
 *   over --store_next_wake--> told and forgotten
 *
 * A key counts only while it is there: one that came and was deleted again is missing. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "coordinator/store_internal.h"

static const char *wait_missing(const struct store *s, const struct wait *wait)
{
    for (size_t i = 0; i < wait->n; i++)
        if (!store_present(s, wait->keys[i]))
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

void store_wait_end(struct store *s, struct wait *wait, int code)
{
    deadlines_remove(&s->deadlines, &wait->deadline);
    wait->code = code;
    DL_APPEND(s->over, wait);
}

static void wait_forget(struct store *s, struct wait *wait)
{
    if (wait->block)
        wait_unblock(s, wait);
    else if (wait->queue)
        store_queue_unwait(s, wait);
    else
        DL_DELETE(s->over, wait);
    deadlines_remove(&s->deadlines, &wait->deadline);
    HASH_DEL(s->waits, wait);
    s->used -= wait->cost;
    blob_unref(wait->value);
    free(wait);
}

void store_waits_free(struct store *s)
{
    struct wait *wait, *next;
    HASH_ITER(hh, s->waits, wait, next)
        wait_forget(s, wait);
}

/* Looks again; true: it is over. */
static bool wait_again(struct store *s, struct wait *wait)
{
    wait->block = NULL;
    const char *missing = wait_missing(s, wait);
    /* Without the memory to sleep on, it ends at once rather than never. */
    int code = missing ? wait_sleep(s, wait, missing) : 0;
    if (missing && code == 0)
        return false;
    store_wait_end(s, wait, code);
    return true;
}

void store_waits_key_came(struct store *s, const char *key)
{
    struct block *block = NULL;
    if (!s->blocks)
        return;
    HASH_FIND_STR(s->blocks, key, block);
    if (!block)
        return;
    HASH_DEL(s->blocks, block);
    struct wait *wait, *next;
    DL_FOREACH_SAFE(block->waits, wait, next) {
        DL_DELETE(block->waits, wait);
        (void)wait_again(s, wait);
    }
    free(block);
}

void store_waits_value_came(struct store *s, const char *name)
{
    struct block *block = NULL;
    HASH_FIND_STR(s->blocks, name, block);
    while (block && block->waits) {
        struct wait *wait = block->waits;
        bool last = !wait->next;
        wait_unblock(s, wait); /* frees the block with its last one */
        if (wait_again(s, wait) || last)
            break;
    }
}

struct wait *store_wait_new(uint64_t id, const char *const *keys, size_t n)
{
    size_t size = sizeof(struct wait) + n * sizeof(char *), longest = 0;
    for (size_t i = 0; i < n; i++) {
        size_t len = strlen(keys[i]) + 1;
        size += len;
        longest = len > longest ? len : longest;
    }
    struct wait *wait = calloc(1, size);
    if (!wait)
        return NULL;
    wait->id = id;
    wait->cost = size + sizeof(struct block) + longest; /* with a block of its own */
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

int store_wait_keep(struct store *s, struct wait *wait, uint64_t deadline_ns, struct err *err)
{
    struct wait *other = NULL;
    HASH_FIND(hh, s->waits, &wait->id, sizeof wait->id, other);
    int rc = other ? err_set(err, ERR_CONFLICT, "wait %llu is there already", (unsigned long long)wait->id)
                   : store_budget_take(s, 0, wait->cost, err);
    if (rc < 0) {
        free(wait);
        return err_wrap(err, "cannot wait");
    }
    HASH_ADD(hh, s->waits, id, sizeof wait->id, wait);
    if (wait->hh.tbl && deadlines_set(&s->deadlines, &wait->deadline, deadline_ns) == 0)
        return 0;
    if (wait->hh.tbl)
        HASH_DEL(s->waits, wait);
    s->used -= wait->cost;
    free(wait);
    return err_set(err, ERR_NOMEM, "no memory to wait");
}

int store_wait(struct store *s, uint64_t id, const char *const *keys, size_t n, uint64_t deadline_ns, struct err *err)
{
    struct wait *wait = NULL;
    HASH_FIND(hh, s->waits, &id, sizeof id, wait);
    if (wait)
        return err_set(err, ERR_CONFLICT, "wait %llu is there already", (unsigned long long)id);
    for (size_t i = 0; i < n; i++) {
        int rc = store_key_check(keys[i], true, err);
        if (rc < 0)
            return rc;
    }
    if (store_check(s, keys, n))
        return 0;
    wait = store_wait_new(id, keys, n);
    if (!wait)
        return err_set(err, ERR_NOMEM, "no memory to wait for %zu keys", n);
    int rc = store_wait_keep(s, wait, deadline_ns, err);
    if (rc < 0)
        return rc;
    if (wait_sleep(s, wait, wait_missing(s, wait)) < 0) {
        DL_APPEND(s->over, wait); /* so that it can be forgotten */
        wait_forget(s, wait);
        return err_set(err, ERR_NOMEM, "no memory to wait for %zu keys", n);
    }
    return 1;
}

void store_wait_cancel(struct store *s, uint64_t id)
{
    struct wait *wait = NULL;
    HASH_FIND(hh, s->waits, &id, sizeof id, wait);
    if (!wait)
        return;
    if (wait->value)
        store_queue_give_back(s, wait);
    wait_forget(s, wait);
}

static struct wait *wait_of(struct deadline *deadline)
{
    return (struct wait *)((char *)deadline - offsetof(struct wait, deadline));
}

bool store_next_wake(struct store *s, uint64_t now_ns, struct store_wake *ret_wake)
{
    store_leases_expire(s, now_ns);
    if (!s->over && deadlines_next_ns(&s->deadlines) <= now_ns) {
        struct wait *late = wait_of(deadlines_first(&s->deadlines));
        if (late->block)
            wait_unblock(s, late);
        else
            store_queue_unwait(s, late);
        store_wait_end(s, late, ERR_TIMEOUT);
    }
    struct wait *wait = s->over;
    if (!wait)
        return false;
    ret_wake->id = wait->id;
    ret_wake->code = wait->code;
    ret_wake->data = NULL;
    ret_wake->len = 0;
    ret_wake->left = wait->left;
    const char *missing = wait->code == 0 ? NULL : wait->pop ? wait->keys[0] : wait_missing(s, wait);
    snprintf(ret_wake->missing, sizeof ret_wake->missing, "%s", missing ? missing : "");
    if (wait->value) {
        ret_wake->len = wait->value->len;
        ret_wake->data = malloc(wait->value->len + 1);
        if (ret_wake->data)
            memcpy(ret_wake->data, wait->value->data, wait->value->len);
        else
            ret_wake->code = ERR_NOMEM;
    }
    wait_forget(s, wait);
    return true;
}

uint64_t store_deadline(const struct store *s)
{
    uint64_t wait = deadlines_next_ns(&s->deadlines), lease = deadlines_next_ns(&s->lease_deadlines);
    return s->over ? 0 : wait < lease ? wait : lease;
}
