/* The key-value store in memory.  Pure: no clock, no sockets; the loop thread.  Waits are in store_wait.c.
 *
 * Keys are found by a hash; for listing, an array of all entries is put in order when it is needed and a key has come
 * or gone since.  The budget counts keys, values, what we keep beside them, and waits. */
#include <string.h>

#include <stdio.h>
#include <stdlib.h>

#include "coordinator/store_internal.h"

struct store *store_new(size_t budget_bytes)
{
    struct store *s = calloc(1, sizeof *s);
    if (s)
        *s = (struct store){.budget = budget_bytes, .deadline_ns = UINT64_MAX};
    return s;
}

void store_free(struct store *s)
{
    if (!s)
        return;
    store_waits_free(s);
    for (size_t i = 0; i < s->n; i++) {
        HASH_DEL(s->entries, s->order[i]);
        free(s->order[i]->data);
        free(s->order[i]);
    }
    free(s->order);
    free(s);
}

int store_key_check(const char *key, struct err *err)
{
    size_t len = strnlen(key, STORE_KEY_MAX + 1);
    if (len == 0)
        return err_set(err, ERR_INVALID, "a key must not be empty");
    if (len > STORE_KEY_MAX)
        return err_set(err, ERR_INVALID, "key \"%.40s...\" is longer than %d bytes", key, STORE_KEY_MAX);
    return 0;
}

int store_budget_take(struct store *s, size_t give_back, size_t take, struct err *err)
{
    size_t rest = s->used - give_back;
    if (take > s->budget || rest > s->budget - take)
        return err_set(err, ERR_LIMIT,
                       "the store is full: %zu of %zu bytes are in use and %zu more are needed; delete keys or raise "
                       "its budget",
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

static size_t entry_cost(size_t key_len, size_t len)
{
    return sizeof(struct entry) + sizeof(struct entry *) + key_len + 1 + len;
}

static void entry_value(const struct entry *entry, struct store_value *ret_value)
{
    *ret_value = (struct store_value){.data = entry->data, .len = entry->len, .revision = entry->revision};
}

/* A new entry, in the hash and in the array, with this value (taken over on success). */
static struct entry *entry_new(struct store *s, const char *key, void *data, size_t len)
{
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 64;
        struct entry **order = realloc(s->order, cap * sizeof *order);
        if (!order)
            return NULL;
        s->order = order;
        s->cap = cap;
    }
    size_t key_len = strlen(key);
    struct entry *entry = calloc(1, sizeof *entry + key_len + 1);
    if (!entry)
        return NULL;
    memcpy(entry->key, key, key_len + 1);
    HASH_ADD_KEYPTR(hh, s->entries, entry->key, key_len, entry);
    if (!entry->hh.tbl) { /* uthash could not grow */
        free(entry);
        return NULL;
    }
    entry->data = data;
    entry->len = len;
    entry->index = s->n;
    s->order[s->n++] = entry;
    s->unordered = true;
    return entry;
}

int store_set(struct store *s, const char *key, const void *data, size_t len, uint64_t *ret_revision, struct err *err)
{
    int rc = store_key_check(key, err);
    if (rc < 0)
        return rc;
    if (len > STORE_VALUE_MAX)
        return err_set(err, ERR_LIMIT, "the value of \"%s\" has %zu bytes; at most %u are allowed", key, len,
                       STORE_VALUE_MAX);
    struct entry *entry = store_find(s, key);
    size_t before = entry ? entry_cost(strlen(key), entry->len) : 0, after = entry_cost(strlen(key), len);
    rc = store_budget_take(s, before, after, err);
    if (rc < 0)
        return err_wrap(err, "cannot set \"%s\"", key);
    void *copy = malloc(len ? len : 1); /* before the old one goes: data may be borrowed from it */
    if (!copy)
        goto give_back;
    if (len)
        memcpy(copy, data, len);
    bool created = !entry;
    if (created) {
        entry = entry_new(s, key, copy, len);
        if (!entry)
            goto free_copy;
    } else {
        free(entry->data);
        entry->data = copy;
        entry->len = len;
    }
    entry->revision = ++s->revision;
    if (ret_revision)
        *ret_revision = entry->revision;
    if (created)
        store_waits_key_came(s, entry->key);
    return 0;

free_copy:
    free(copy);
give_back:
    s->used = s->used - after + before;
    return err_set(err, ERR_NOMEM, "no memory for \"%s\" of %zu bytes", key, len);
}

int store_get(struct store *s, const char *key, struct store_value *ret_value, struct err *err)
{
    const struct entry *entry = store_find(s, key);
    if (!entry)
        return err_set(err, ERR_NOTFOUND, "there is no key \"%.*s\"", STORE_KEY_MAX, key);
    entry_value(entry, ret_value);
    return 0;
}

bool store_check(struct store *s, const char *const *keys, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!store_find(s, keys[i]))
            return false;
    return true;
}

/* Decimal digits with at most a minus before them, nothing else. */
static bool counter_parse(const struct entry *entry, int64_t *ret_value)
{
    const char *text = entry->data;
    bool negative = entry->len > 0 && text[0] == '-';
    int64_t value = 0;
    if (entry->len == (negative ? 1u : 0u))
        return false;
    for (size_t i = negative; i < entry->len; i++) {
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

int store_add(struct store *s, const char *key, int64_t amount, int64_t *ret_value, struct err *err)
{
    int rc = store_key_check(key, err);
    if (rc < 0)
        return rc;
    int64_t value = 0;
    const struct entry *entry = store_find(s, key);
    if (entry && !counter_parse(entry, &value))
        return err_set(err, ERR_INVALID, "cannot add to \"%s\": its value is not a decimal number of 64 bits", key);
    if (__builtin_add_overflow(value, amount, &value))
        return err_set(err, ERR_INVALID, "cannot add %lld to \"%s\": its value would overflow 64 bits",
                       (long long)amount, key);
    char text[24];
    int len = snprintf(text, sizeof text, "%lld", (long long)value);
    rc = store_set(s, key, text, (size_t)len, NULL, err);
    if (rc < 0)
        return rc;
    if (ret_value)
        *ret_value = value;
    return 0;
}

int store_cas(struct store *s, const char *key, const void *expected, size_t expected_len, const void *data, size_t len,
              bool *ret_swapped, struct store_value *ret_value, struct err *err)
{
    int rc = store_key_check(key, err);
    if (rc < 0)
        return rc;
    const struct entry *entry = store_find(s, key);
    bool swap = expected ? entry && entry->len == expected_len &&
                               (expected_len == 0 || memcmp(entry->data, expected, expected_len) == 0)
                         : entry == NULL;
    if (swap) {
        rc = store_set(s, key, data, len, NULL, err);
        if (rc < 0)
            return rc;
        entry = store_find(s, key);
    }
    *ret_swapped = swap;
    if (ret_value)
        *ret_value = (struct store_value){.data = NULL};
    if (ret_value && entry)
        entry_value(entry, ret_value);
    return 0;
}

int store_delete(struct store *s, const char *key, struct err *err)
{
    struct entry *entry = store_find(s, key);
    if (!entry)
        return err_set(err, ERR_NOTFOUND, "there is no key \"%.*s\"", STORE_KEY_MAX, key);
    HASH_DEL(s->entries, entry);
    s->order[entry->index] = s->order[--s->n];
    s->order[entry->index]->index = entry->index;
    s->unordered = true;
    s->used -= entry_cost(strlen(entry->key), entry->len);
    s->revision++;
    free(entry->data);
    free(entry);
    return 0;
}

static int entry_compare(const void *va, const void *vb)
{
    const struct entry *const *a = va, *const *b = vb;
    return strcmp((*a)->key, (*b)->key); /* bytes, unsigned */
}

size_t store_list(struct store *s, const char *prefix, const char *after, size_t max,
                  void (*each)(void *user, const char *key, const struct store_value *value), void *user)
{
    if (s->unordered) {
        qsort(s->order, s->n, sizeof(struct entry *), entry_compare);
        for (size_t i = 0; i < s->n; i++)
            s->order[i]->index = i;
        s->unordered = false;
    }
    size_t low = 0, high = s->n; /* the first key >= prefix and > after */
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const char *key = s->order[middle]->key;
        if (strcmp(key, prefix) < 0 || (after && strcmp(key, after) <= 0))
            low = middle + 1;
        else
            high = middle;
    }
    size_t listed = 0, prefix_len = strlen(prefix);
    for (; low < s->n && listed < max && strncmp(s->order[low]->key, prefix, prefix_len) == 0; low++, listed++) {
        struct store_value value;
        entry_value(s->order[low], &value);
        each(user, s->order[low]->key, &value);
    }
    return listed;
}
