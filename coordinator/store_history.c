/* Changes of late, for those who watch: a ring, bounded in number and bytes.  Pure; the loop thread. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/store_internal.h"

#define CHANGES_MAX 65536

int store_history_open(struct store *s, size_t bytes)
{
    s->history_bytes = bytes;
    s->changes_cap = 256;
    s->changes = calloc(s->changes_cap, sizeof *s->changes);
    return s->changes ? 0 : ERR_NOMEM;
}

static struct change *change_at(const struct store *s, size_t i)
{
    return &s->changes[(s->changes_at + i) % s->changes_cap];
}

static size_t change_bytes(const struct change *c)
{
    return sizeof *c + strlen(c->key) + 1 + (c->value ? c->value->len : 0);
}

static void change_forget(struct store *s)
{
    struct change *c = change_at(s, 0);
    s->history_first = c->revision + 1;
    s->history_used -= change_bytes(c);
    blob_unref(c->value);
    free(c->key);
    s->changes_at = (s->changes_at + 1) % s->changes_cap;
    s->changes_n--;
}

void store_history_free(struct store *s)
{
    while (s->changes_n)
        change_forget(s);
    free(s->changes);
}

/* Room for one more; false: there is none (no memory). */
static bool grow(struct store *s)
{
    if (s->changes_n < s->changes_cap)
        return true;
    if (s->changes_cap >= CHANGES_MAX)
        return false;
    struct change *bigger = calloc(2 * s->changes_cap, sizeof *bigger);
    if (!bigger)
        return false;
    for (size_t i = 0; i < s->changes_n; i++)
        bigger[i] = *change_at(s, i);
    free(s->changes);
    s->changes = bigger;
    s->changes_at = 0;
    s->changes_cap *= 2;
    return true;
}

void store_history_add(struct store *s, const char *key, struct blob *value)
{
    struct change c = {.revision = s->revision, .value = value, .key = strdup(key)};
    if (!c.key) { /* a gap: nothing before it can be watched from any more */
        while (s->changes_n)
            change_forget(s);
        s->history_first = s->revision + 1;
        return;
    }
    if (value)
        blob_ref(value);
    if (!grow(s))
        change_forget(s);
    s->history_used += change_bytes(&c);
    *change_at(s, s->changes_n) = c;
    s->changes_n++;
    while (s->changes_n > 1 && s->history_used > s->history_bytes)
        change_forget(s);
}

uint64_t store_history_first(const struct store *s)
{
    return s->history_first;
}

bool store_history_next(const struct store *s, const char *prefix, uint64_t from, struct store_change *ret_change)
{
    size_t low = 0, high = s->changes_n, len = strlen(prefix);
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (change_at(s, middle)->revision < from)
            low = middle + 1;
        else
            high = middle;
    }
    while (low < s->changes_n && strncmp(change_at(s, low)->key, prefix, len) != 0)
        low++;
    if (low == s->changes_n)
        return false;
    const struct change *c = change_at(s, low);
    *ret_change = (struct store_change){.revision = c->revision, .key = c->key};
    if (c->value) {
        ret_change->data = c->value->data;
        ret_change->len = c->value->len;
    }
    return true;
}
