/* The key-value store in memory: values.  Pure: no clock, no sockets; the loop thread.
 *
 * Keys are found by a hash and listed by a tree (store_index.c).  A value is a shared block of bytes, so that the history
 * of changes (store_history.c) costs no copy.  The budget counts keys, values, what we keep beside them, and waits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/store_internal.h"

#define HISTORY_BYTES_MAX ((size_t)16 << 20)

struct store *store_new(const struct store_config *config)
{
    struct store *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    size_t history = config->history_bytes ? config->history_bytes : config->budget_bytes / 16;
    if (!config->history_bytes && history > HISTORY_BYTES_MAX)
        history = HISTORY_BYTES_MAX;
    s->budget = config->budget_bytes;
    s->batches = config->batches;
    s->batch.number = 1;
    s->history_first = 1;
    if (store_history_open(s, history) < 0) {
        free(s);
        return NULL;
    }
    return s;
}

void store_free(struct store *s)
{
    if (!s)
        return;
    store_waits_free(s);
    store_queues_clear(s, "");
    store_leases_free(s);
    struct entry *entry, *next;
    HASH_ITER(hh, s->entries, entry, next) {
        HASH_DEL(s->entries, entry);
        blob_unref(entry->value);
        free(entry);
    }
    store_history_free(s);
    store_requests_free(s);
    store_batch_done(&s->batch);
    deadlines_done(&s->deadlines);
    deadlines_done(&s->lease_deadlines);
    free(s);
}

/* ---- what the files share ---- */

int store_key_check(const char *key, bool ephemeral, struct err *err)
{
    size_t max = ephemeral ? STORE_KEY_MAX : STORE_KEY_DURABLE_MAX, len = strnlen(key, max + 1);
    if (len == 0)
        return err_set(err, ERR_INVALID, "a key must not be empty");
    if (len > max)
        return err_set(err, ERR_INVALID, "key \"%.40s...\" is longer than %zu bytes, the limit of %s", key, max,
                       ephemeral ? "keys" : "durable keys (ephemeral ones may be longer)");
    return 0;
}

int store_budget_take(struct store *s, size_t give_back, size_t take, struct err *err)
{
    size_t rest = s->used > give_back ? s->used - give_back : 0;
    if (take > s->budget || rest > s->budget - take)
        return err_set(err, ERR_LIMIT,
                       "the store is full: %zu of %zu bytes are in use and %zu more are needed; delete keys or raise "
                       "its budget (--store-mib)",
                       s->used, s->budget, take - (take > give_back ? give_back : take));
    s->used = rest + take;
    return 0;
}

struct entry *store_find(const struct store *s, const char *key)
{
    struct entry *entry = NULL;
    HASH_FIND_STR(s->entries, key, entry);
    return entry;
}

bool store_present(const struct store *s, const char *key)
{
    return store_find(s, key) || (s->queues && store_queue_length(s, key));
}

uint64_t store_revision(const struct store *s)
{
    return s->revision;
}

size_t store_used(const struct store *s)
{
    return s->used;
}

size_t store_budget(const struct store *s)
{
    return s->budget;
}

/* ---- entries ---- */

static size_t entry_cost(size_t key_len, size_t len)
{
    return sizeof(struct entry) + key_len + 1 + sizeof(struct blob) + len;
}

static void entry_value(const struct entry *entry, struct store_value *ret_value)
{
    *ret_value = (struct store_value){.data = entry->value->data,
                                      .len = entry->value->len,
                                      .revision = entry->revision,
                                      .lease = entry->hold ? entry->hold->lease->id : 0,
                                      .durable = entry->durable,
                                      .batch = entry->batch};
}

/* A new entry in hash and index, taking over the reference. */
static struct entry *entry_new(struct store *s, const char *key, struct blob *value)
{
    size_t len = strlen(key);
    struct entry *entry = calloc(1, sizeof *entry + len + 1);
    if (!entry)
        return NULL;
    memcpy(entry->key, key, len + 1);
    HASH_ADD_KEYPTR(hh, s->entries, entry->key, len, entry);
    if (!entry->hh.tbl) { /* uthash could not grow */
        free(entry);
        return NULL;
    }
    entry->value = value;
    entry->batch = s->deleted_batch; /* a durable one may have been there before */
    store_index_insert(s, entry);
    return entry;
}

/* Notes for the disk what has become of a key that is or was durable. */
static void entry_batch(struct store *s, struct entry *entry, bool was_durable)
{
    if (!s->batches || (!was_durable && !entry->durable))
        return;
    if (entry->durable)
        store_batch_add(s, STORE_OP_PUT, entry->key, entry->value->data, entry->value->len, entry->revision);
    else
        store_batch_add(s, STORE_OP_DELETE, entry->key, NULL, 0, entry->revision);
    entry->batch = s->batch.number;
}

/* What can fail has been done: the value's memory is there and paid for, the lease exists.  entry: what is there. */
static int put_apply(struct store *s, const struct store_put *put, struct entry *entry, struct blob *value)
{
    bool created = !entry, was_durable = entry && entry->durable;
    if (created) {
        entry = entry_new(s, put->key, value);
        if (!entry)
            return ERR_NOMEM;
    } else {
        blob_unref(entry->value);
        entry->value = value;
    }
    if (entry->hold || put->lease)
        store_lease_hold(s, entry, store_lease_find(s, put->lease));
    entry->durable = !put->ephemeral;
    entry->revision = ++s->revision;
    entry_batch(s, entry, was_durable);
    s->changed_batch = entry->batch;
    store_history_add(s, entry->key, entry->value);
    if (created)
        store_waits_key_came(s, entry->key);
    return 0;
}

static int put_check(struct store *s, const struct store_put *put, struct err *err)
{
    int rc = store_key_check(put->key, put->ephemeral, err);
    if (rc < 0)
        return rc;
    if (put->len > STORE_VALUE_MAX)
        return err_set(err, ERR_LIMIT, "the value of \"%.100s\" has %zu bytes; at most %u are allowed", put->key,
                       put->len, STORE_VALUE_MAX);
    if (put->lease && !put->ephemeral)
        return err_set(err, ERR_INVALID, "\"%.100s\": a key with a lease must be ephemeral: leases do not outlive the "
                       "coordinator", put->key);
    if (put->lease && !store_lease_find(s, put->lease))
        return err_set(err, ERR_NOTFOUND, "\"%.100s\": there is no lease %llu (any more)", put->key,
                       (unsigned long long)put->lease);
    return 0;
}

static int no_memory(size_t bytes, struct err *err)
{
    return err_set(err, ERR_NOMEM, "the coordinator has no memory for %zu bytes", bytes);
}

/* One key, checked; entry: what is there, NULL = nothing. */
static int put_one(struct store *s, const struct store_put *put, struct entry *entry, struct err *err)
{
    size_t key_len = strlen(put->key), before = entry ? entry_cost(key_len, entry->value->len) : 0;
    size_t after = entry_cost(key_len, put->len);
    int rc = store_budget_take(s, before, after, err);
    if (rc < 0)
        return err_wrap(err, "cannot set \"%.100s\"", put->key);
    struct blob *value = blob_new(put->data, put->len);
    if (value && put_apply(s, put, entry, value) == 0)
        return 0;
    blob_unref(value);
    s->used = s->used + before - after;
    return no_memory(after, err);
}

int store_set(struct store *s, const struct store_put *put, uint64_t *ret_revision, struct err *err)
{
    int rc = put_check(s, put, err);
    if (rc == 0)
        rc = put_one(s, put, store_find(s, put->key), err);
    if (rc == 0 && ret_revision)
        *ret_revision = s->revision;
    return rc;
}

/* What the values cost that are there, and those that shall be. */
static int puts_check(struct store *s, const struct store_put *puts, size_t n, size_t *ret_before, size_t *ret_after,
                      struct err *err)
{
    *ret_before = *ret_after = 0;
    for (size_t i = 0; i < n; i++) {
        int rc = put_check(s, &puts[i], err);
        if (rc < 0)
            return rc;
        const struct entry *entry = store_find(s, puts[i].key);
        size_t key_len = strlen(puts[i].key);
        *ret_before += entry ? entry_cost(key_len, entry->value->len) : 0;
        *ret_after += entry_cost(key_len, puts[i].len);
    }
    return 0;
}

int store_set_all(struct store *s, const struct store_put *puts, size_t n, uint64_t *ret_revision, struct err *err)
{
    size_t before, after, made = 0;
    int rc = puts_check(s, puts, n, &before, &after, err);
    if (rc < 0)
        return rc;
    if ((rc = store_budget_take(s, before, after, err)) < 0)
        return n == 1 ? err_wrap(err, "cannot set \"%.100s\"", puts[0].key) : err_wrap(err, "cannot set %zu keys", n);
    s->used = s->used + before - after; /* a key may be named twice: the account is settled key by key below */
    struct blob **values = calloc(n + 1, sizeof *values);
    while (values && made < n && (values[made] = blob_new(puts[made].data, puts[made].len)))
        made++;
    if (!values || made < n) {
        while (made > 0)
            blob_unref(values[--made]);
        free(values);
        return no_memory(after, err);
    }
    for (size_t i = 0; i < n; i++) {
        struct entry *entry = store_find(s, puts[i].key);
        size_t key_len = strlen(puts[i].key);
        s->used -= entry ? entry_cost(key_len, entry->value->len) : 0;
        s->used += entry_cost(key_len, puts[i].len);
        if (put_apply(s, &puts[i], entry, values[i]) < 0)
            abort(); /* a few hundred bytes could not be had in the midst of an atomic change */
    }
    free(values);
    if (ret_revision)
        *ret_revision = s->revision;
    return 0;
}

uint64_t store_changed_batch(const struct store *s)
{
    return s->changed_batch;
}

int store_get(const struct store *s, const char *key, struct store_value *ret_value, uint64_t *ret_batch,
              struct err *err)
{
    const struct entry *entry = store_find(s, key);
    if (ret_batch)
        *ret_batch = entry ? entry->batch : s->deleted_batch;
    if (!entry)
        return err_set(err, ERR_NOTFOUND, "there is no key \"%.200s\"", key);
    entry_value(entry, ret_value);
    return 0;
}

bool store_check(const struct store *s, const char *const *keys, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!store_present(s, keys[i]))
            return false;
    return true;
}

/* ---- counters ---- */

/* Decimal digits with at most a minus before them, nothing else. */
static bool counter_parse(const struct blob *blob, int64_t *ret_value)
{
    const char *text = (const char *)blob->data;
    bool negative = blob->len > 0 && text[0] == '-';
    int64_t value = 0;
    if (blob->len == (negative ? 1u : 0u))
        return false;
    for (size_t i = negative; i < blob->len; i++) {
        if (text[i] < '0' || text[i] > '9')
            return false;
        int64_t digit = text[i] - '0';
        if (__builtin_mul_overflow(value, (int64_t)10, &value) ||
            __builtin_add_overflow(value, negative ? -digit : digit, &value))
            return false;
    }
    *ret_value = value;
    return true;
}

#define COUNTER_TEXT_MAX 20 /* of -9223372036854775808 */

/* The decimal text, at the end of text; its length.  (Ten times as fast as snprintf.) */
static size_t counter_text(int64_t value, char text[COUNTER_TEXT_MAX])
{
    uint64_t rest = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    size_t len = 0;
    do {
        text[COUNTER_TEXT_MAX - ++len] = (char)('0' + rest % 10);
        rest /= 10;
    } while (rest);
    if (value < 0)
        text[COUNTER_TEXT_MAX - ++len] = '-';
    return len;
}

/* 1: this id was answered before.  0: it is new. */
static int add_again(const struct store *s, const char *key, int64_t amount, const char *id, int64_t *ret_value,
                     struct err *err)
{
    if (strnlen(id, STORE_REQUEST_MAX + 1) > STORE_REQUEST_MAX)
        return err_set(err, ERR_INVALID, "a request id has at most %d bytes", STORE_REQUEST_MAX);
    const struct request *known = store_request_find(s, id);
    if (!known)
        return 0;
    if (known->amount != amount || known->key_digest != store_request_key_digest(key))
        return err_set(err, ERR_CONFLICT, "request id \"%s\" was used before, for another addition", id);
    if (ret_value)
        *ret_value = known->value;
    return 1;
}

int store_add(struct store *s, const char *key, int64_t amount, bool ephemeral, const char *request,
              int64_t *ret_value, uint64_t *ret_revision, struct err *err)
{
    int rc = request[0] ? add_again(s, key, amount, request, ret_value, err) : 0;
    if (rc != 0) {
        if (rc > 0 && ret_revision)
            *ret_revision = s->revision;
        return rc < 0 ? rc : 0;
    }
    int64_t value = 0;
    struct entry *entry = store_find(s, key);
    if (entry && !counter_parse(entry->value, &value))
        return err_set(err, ERR_INVALID, "cannot add to \"%.100s\": its value is not a decimal number of 64 bits", key);
    if (__builtin_add_overflow(value, amount, &value))
        return err_set(err, ERR_INVALID, "cannot add %lld to \"%.100s\": its value would overflow 64 bits",
                       (long long)amount, key);
    char text[COUNTER_TEXT_MAX];
    size_t len = counter_text(value, text);
    struct store_put put = {.key = key, .data = text + sizeof text - len, .len = len, .ephemeral = ephemeral};
    if (entry) { /* a counter stays what it is */
        put.ephemeral = !entry->durable;
        put.lease = entry->hold ? entry->hold->lease->id : 0;
    }
    rc = put_check(s, &put, err);
    if (rc < 0 || (rc = put_one(s, &put, entry, err)) < 0)
        return rc;
    if (ret_revision)
        *ret_revision = s->revision;
    if (request[0])
        store_request_remember(s, request, key, amount, value, !put.ephemeral);
    if (ret_value)
        *ret_value = value;
    return 0;
}

/* ---- compare and set, append ---- */

int store_cas(struct store *s, const struct store_put *put, const void *expected, size_t expected_len,
              bool *ret_swapped, struct store_value *ret_value, struct err *err)
{
    int rc = store_key_check(put->key, put->ephemeral, err);
    if (rc < 0)
        return rc;
    struct entry *entry = store_find(s, put->key);
    bool swap = expected ? entry && entry->value->len == expected_len &&
                               (expected_len == 0 || memcmp(entry->value->data, expected, expected_len) == 0)
                         : entry == NULL;
    if (swap) {
        rc = store_set(s, put, NULL, err);
        if (rc < 0)
            return rc;
        entry = store_find(s, put->key);
    }
    *ret_swapped = swap;
    if (ret_value)
        *ret_value = (struct store_value){.batch = s->deleted_batch};
    if (ret_value && entry)
        entry_value(entry, ret_value);
    return 0;
}

int store_append(struct store *s, const struct store_put *put, struct err *err)
{
    const struct entry *entry = store_find(s, put->key);
    if (!entry)
        return store_set(s, put, NULL, err);
    size_t old = entry->value->len;
    if (put->len > STORE_VALUE_MAX || old + put->len > STORE_VALUE_MAX)
        return err_set(err, ERR_LIMIT, "the value of \"%.100s\" would have %zu bytes; at most %u are allowed", put->key,
                       old + put->len, STORE_VALUE_MAX);
    uint8_t *both = malloc(old + put->len + 1);
    if (!both)
        return err_set(err, ERR_NOMEM, "the coordinator has no memory for %zu bytes", old + put->len);
    memcpy(both, entry->value->data, old);
    if (put->len)
        memcpy(both + old, put->data, put->len);
    struct store_put whole = *put;
    whole.data = both;
    whole.len = old + put->len;
    int rc = store_set(s, &whole, NULL, err);
    free(both);
    return rc;
}

/* ---- deleting ---- */

void store_entry_remove(struct store *s, struct entry *entry)
{
    HASH_DEL(s->entries, entry);
    store_index_remove(s, entry);
    store_lease_hold(s, entry, NULL);
    s->used -= entry_cost(strlen(entry->key), entry->value->len);
    s->revision++;
    if (entry->durable && s->batches) {
        store_batch_add(s, STORE_OP_DELETE, entry->key, NULL, 0, s->revision);
        s->deleted_batch = s->batch.number;
    }
    store_history_add(s, entry->key, NULL);
    blob_unref(entry->value);
    free(entry);
}

int store_delete(struct store *s, const char *key, struct err *err)
{
    struct entry *entry = store_find(s, key);
    if (!entry)
        return err_set(err, ERR_NOTFOUND, "there is no key \"%.200s\"", key);
    store_entry_remove(s, entry);
    return 0;
}

static bool clear_each(void *user, const char *key, const struct store_value *value)
{
    if (!value->durable)
        *(const char **)user = key;
    return value->durable; /* on to the first that may go */
}

size_t store_clear(struct store *s, const char *prefix)
{
    size_t n = 0;
    for (;; n++) {
        const char *first = NULL;
        store_list(s, prefix, NULL, SIZE_MAX, clear_each, &first);
        struct entry *entry = first ? store_find(s, first) : NULL;
        if (!entry)
            break;
        store_entry_remove(s, entry);
    }
    store_queues_clear(s, prefix);
    return n;
}
