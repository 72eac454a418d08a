/* Deadlines in order: an intrusive binary heap.  Pure; one thread. */
#include "common/deadlines.h"

#include <stdlib.h>

void deadlines_done(struct deadlines *d)
{
    free(d->v);
    *d = (struct deadlines){0};
}

static void put(struct deadlines *d, size_t i, struct deadline *entry)
{
    d->v[i] = entry;
    entry->place = i + 1;
}

/* Moves an entry from place i to where it belongs. */
static void settle(struct deadlines *d, size_t i, struct deadline *entry)
{
    while (i > 0 && d->v[(i - 1) / 2]->ns > entry->ns) {
        put(d, i, d->v[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    for (;;) {
        size_t child = 2 * i + 1;
        if (child + 1 < d->n && d->v[child + 1]->ns < d->v[child]->ns)
            child++;
        if (child >= d->n || d->v[child]->ns >= entry->ns)
            break;
        put(d, i, d->v[child]);
        i = child;
    }
    put(d, i, entry);
}

int deadlines_set(struct deadlines *d, struct deadline *entry, uint64_t ns)
{
    if (ns == DEADLINE_NEVER) {
        deadlines_remove(d, entry);
        entry->ns = ns;
        return 0;
    }
    if (!entry->place) {
        if (d->n == d->cap) {
            size_t cap = d->cap ? 2 * d->cap : 64;
            struct deadline **v = realloc(d->v, cap * sizeof *v);
            if (!v)
                return ERR_NOMEM;
            d->v = v;
            d->cap = cap;
        }
        entry->place = ++d->n;
    }
    entry->ns = ns;
    settle(d, entry->place - 1, entry);
    return 0;
}

void deadlines_remove(struct deadlines *d, struct deadline *entry)
{
    if (!entry->place)
        return;
    size_t i = entry->place - 1;
    struct deadline *last = d->v[--d->n];
    entry->place = 0;
    if (last != entry)
        settle(d, i, last);
}

struct deadline *deadlines_first(const struct deadlines *d)
{
    return d->n ? d->v[0] : NULL;
}

uint64_t deadlines_next_ns(const struct deadlines *d)
{
    return d->n ? d->v[0]->ns : DEADLINE_NEVER;
}
