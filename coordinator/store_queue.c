/* Queues of the store: values in order, handed to one taker each.  Ephemeral.  Pure; the loop thread. */
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "coordinator/store_internal.h"

static struct queue *queue_find(const struct store *s, const char *name)
{
    struct queue *queue = NULL;
    HASH_FIND_STR(s->queues, name, queue);
    return queue;
}

static size_t queue_cost(const char *name)
{
    return sizeof(struct queue) + strlen(name) + 1;
}

static size_t item_cost(size_t len)
{
    return sizeof(struct item) + sizeof(struct blob) + len;
}

/* The queue of this name, made if need be. */
static int queue_of(struct store *s, const char *name, struct queue **ret_queue, struct err *err)
{
    struct queue *queue = queue_find(s, name);
    if (!queue) {
        int rc = store_budget_take(s, 0, queue_cost(name), err);
        if (rc < 0)
            return err_wrap(err, "cannot make queue \"%.100s\"", name);
        size_t len = strlen(name);
        queue = calloc(1, sizeof *queue + len + 1);
        if (queue) {
            memcpy(queue->name, name, len + 1);
            HASH_ADD_KEYPTR(hh, s->queues, queue->name, len, queue);
        }
        if (!queue || !queue->hh.tbl) {
            free(queue);
            s->used -= queue_cost(name);
            return err_set(err, ERR_NOMEM, "no memory for queue \"%.100s\"", name);
        }
    }
    *ret_queue = queue;
    return 0;
}

static void queue_settle(struct store *s, struct queue *queue)
{
    if (queue->n || queue->pops)
        return;
    HASH_DEL(s->queues, queue);
    s->used -= queue_cost(queue->name);
    free(queue);
}

static struct blob *item_take(struct store *s, struct queue *queue, struct item *item)
{
    struct blob *value = item->value;
    DL_DELETE(queue->items, item);
    queue->n--;
    s->used -= item_cost(value->len);
    free(item);
    return value;
}

int store_queue_push(struct store *s, const char *name, const void *data, size_t len, uint32_t max_length,
                     uint64_t *ret_length, struct err *err)
{
    uint32_t max = max_length && max_length < STORE_QUEUE_MAX ? max_length : STORE_QUEUE_MAX;
    int rc = store_key_check(name, true, err);
    if (rc < 0)
        return rc;
    if (len > STORE_VALUE_MAX)
        return err_set(err, ERR_LIMIT, "a value of %zu bytes for queue \"%.100s\"; at most %u are allowed", len, name,
                       STORE_VALUE_MAX);
    uint64_t length = store_queue_length(s, name);
    if (length >= max)
        return err_set(err, ERR_LIMIT, "queue \"%.100s\" is full: %llu values", name, (unsigned long long)length);
    rc = store_budget_take(s, 0, item_cost(len), err);
    if (rc < 0)
        return err_wrap(err, "cannot push to queue \"%.100s\"", name);
    struct queue *queue;
    rc = queue_of(s, name, &queue, err);
    if (rc < 0) {
        s->used -= item_cost(len);
        return rc;
    }
    struct item *item = calloc(1, sizeof *item);
    struct blob *value = blob_new(data, len);
    if (!item || !value) {
        free(item);
        blob_unref(value);
        s->used -= item_cost(len);
        queue_settle(s, queue);
        return err_set(err, ERR_NOMEM, "no memory for a value of queue \"%.100s\"", name);
    }
    item->value = value;
    DL_APPEND(queue->items, item);
    if (ret_length)
        *ret_length = queue->n + 1;
    queue->n++;
    if (queue->pops) {
        struct wait *first = queue->pops;
        DL_DELETE(queue->pops, first);
        first->queue = NULL;
        first->value = item_take(s, queue, queue->items);
        first->left = queue->n;
        store_wait_end(s, first, 0);
        queue_settle(s, queue);
    } else {
        store_waits_value_came(s, name);
    }
    return 0;
}

int store_queue_pop(struct store *s, uint64_t id, const char *name, uint64_t deadline_ns, void **ret_data,
                    size_t *ret_len, uint64_t *ret_left, struct err *err)
{
    int rc = store_key_check(name, true, err);
    if (rc < 0)
        return rc;
    struct queue *queue = queue_find(s, name);
    if (queue && queue->n) {
        void *data = malloc(queue->items->value->len + 1);
        if (!data)
            return err_set(err, ERR_NOMEM, "no memory for a value of queue \"%.100s\"", name);
        struct blob *value = item_take(s, queue, queue->items);
        memcpy(data, value->data, value->len);
        *ret_data = data;
        *ret_len = value->len;
        *ret_left = queue->n;
        blob_unref(value);
        queue_settle(s, queue);
        return 0;
    }
    if (!deadline_ns)
        return err_set(err, ERR_NOTFOUND, "queue \"%.100s\" is empty", name);
    rc = queue_of(s, name, &queue, err);
    if (rc < 0)
        return rc;
    struct wait *wait = store_wait_new(id, &name, 1);
    if (!wait) {
        queue_settle(s, queue);
        return err_set(err, ERR_NOMEM, "no memory to wait for queue \"%.100s\"", name);
    }
    wait->pop = true;
    rc = store_wait_keep(s, wait, deadline_ns, err);
    if (rc < 0) {
        queue_settle(s, queue);
        return rc;
    }
    wait->queue = queue;
    DL_APPEND(queue->pops, wait);
    return 1;
}

void store_queue_unwait(struct store *s, struct wait *wait)
{
    struct queue *queue = wait->queue;
    DL_DELETE(queue->pops, wait);
    wait->queue = NULL;
    queue_settle(s, queue);
}

/* Nobody can be waiting for it: it would have got a later value, and that one is behind this one now. */
void store_queue_give_back(struct store *s, struct wait *wait)
{
    struct queue *queue;
    struct item *item = calloc(1, sizeof *item);
    if (!item || queue_of(s, wait->keys[0], &queue, NULL) < 0) {
        free(item); /* no room for it: as if it had been told, and lost on the way */
        blob_unref(wait->value);
        wait->value = NULL;
        return;
    }
    item->value = wait->value;
    wait->value = NULL;
    s->used += item_cost(item->value->len);
    DL_PREPEND(queue->items, item);
    queue->n++;
    if (queue->pops) { /* someone came to wait in between */
        struct wait *first = queue->pops;
        DL_DELETE(queue->pops, first);
        first->queue = NULL;
        first->value = item_take(s, queue, queue->items);
        first->left = queue->n;
        store_wait_end(s, first, 0);
        queue_settle(s, queue);
    } else {
        store_waits_value_came(s, wait->keys[0]);
    }
}

uint64_t store_queue_length(const struct store *s, const char *name)
{
    const struct queue *queue = queue_find(s, name);
    return queue ? queue->n : 0;
}

void store_queues_clear(struct store *s, const char *prefix)
{
    size_t len = strlen(prefix);
    struct queue *queue, *next;
    HASH_ITER(hh, s->queues, queue, next) {
        if (strncmp(queue->name, prefix, len) != 0)
            continue;
        while (queue->items)
            blob_unref(item_take(s, queue, queue->items));
        queue_settle(s, queue);
    }
}
