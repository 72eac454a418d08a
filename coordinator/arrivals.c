/* Arrival sets: who has arrived at a phase, by rank and incarnation.  Pure; the loop thread.
 *
 * Sets are small (ranks of a view), so members are found by a walk. */
#include "coordinator/arrivals.h"

#include <stdlib.h>
#include <string.h>

#include "common/err.h"

void arrivals_init(struct arrivals *set)
{
    memset(set, 0, sizeof *set);
}

void arrivals_done(struct arrivals *set)
{
    free(set->v);
    arrivals_init(set);
}

void arrivals_reset(struct arrivals *set)
{
    set->n = 0;
    set->missing = 0;
}

static struct arrival *arrivals_find(const struct arrivals *set, uint32_t id)
{
    for (size_t i = 0; i < set->n; i++)
        if (set->v[i].id == id)
            return &set->v[i];
    return NULL;
}

/* A second expectation of the same id with another incarnation replaces the first: the old process is gone, and
 * what it brought does not count for the new one. */
int arrivals_expect(struct arrivals *set, uint32_t id, uint64_t incarnation)
{
    struct arrival *known = arrivals_find(set, id);
    if (known) {
        if (known->incarnation == incarnation)
            return 0;
        set->missing += known->arrived;
        *known = (struct arrival){.id = id, .incarnation = incarnation};
        return 0;
    }
    if (set->n == set->cap) {
        size_t cap = set->cap ? 2 * set->cap : 8;
        struct arrival *v = realloc(set->v, cap * sizeof *v);
        if (!v)
            return ERR_NOMEM;
        set->v = v;
        set->cap = cap;
    }
    set->v[set->n++] = (struct arrival){.id = id, .incarnation = incarnation};
    set->missing++;
    return 0;
}

enum arrival_result arrivals_add(struct arrivals *set, uint32_t id, uint64_t incarnation, uint64_t value)
{
    struct arrival *known = arrivals_find(set, id);
    if (!known || known->incarnation != incarnation)
        return ARRIVAL_STRANGER;
    if (known->arrived)
        return ARRIVAL_AGAIN;
    known->arrived = true;
    known->value = value;
    set->missing--;
    return ARRIVAL_COUNTED;
}

bool arrivals_complete(const struct arrivals *set)
{
    return set->missing == 0;
}

bool arrivals_has(const struct arrivals *set, uint32_t id)
{
    const struct arrival *known = arrivals_find(set, id);
    return known && known->arrived;
}

uint64_t arrivals_max(const struct arrivals *set)
{
    uint64_t max = 0;
    for (size_t i = 0; i < set->n; i++)
        if (set->v[i].arrived && set->v[i].value > max)
            max = set->v[i].value;
    return max;
}

uint64_t arrivals_min(const struct arrivals *set)
{
    uint64_t min = UINT64_MAX;
    for (size_t i = 0; i < set->n; i++)
        if (set->v[i].arrived && set->v[i].value < min)
            min = set->v[i].value;
    return min;
}
