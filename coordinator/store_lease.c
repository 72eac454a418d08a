/* Leases of the store: keys that go when their owner is not heard of any more.  Pure; the loop thread. */
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "coordinator/store_internal.h"

#define LEASES_MAX 65536

struct lease *store_lease_find(const struct store *s, uint64_t id)
{
    struct lease *lease = NULL;
    if (id)
        HASH_FIND(hh, s->leases, &id, sizeof id, lease);
    return lease;
}

void store_lease_hold(struct store *s, struct entry *entry, struct lease *lease)
{
    struct hold *hold = entry->hold;
    if (hold && hold->lease == lease)
        return;
    if (hold) {
        DL_DELETE(hold->lease->holds, hold);
        s->used -= sizeof *hold;
        free(hold);
        entry->hold = NULL;
    }
    if (!lease)
        return;
    hold = calloc(1, sizeof *hold);
    if (!hold)
        abort(); /* a key must not outlive its lease */
    hold->entry = entry;
    hold->lease = lease;
    DL_APPEND(lease->holds, hold);
    s->used += sizeof *hold;
    entry->hold = hold;
}

int store_lease_grant(struct store *s, uint32_t ttl_ms, uint64_t now_ns, uint64_t *ret_lease, struct err *err)
{
    if (ttl_ms < STORE_LEASE_MS_MIN || ttl_ms > STORE_LEASE_MS_MAX)
        return err_set(err, ERR_INVALID, "a lease takes %d to %u ms, not %u", STORE_LEASE_MS_MIN, STORE_LEASE_MS_MAX,
                       ttl_ms);
    if (HASH_COUNT(s->leases) >= LEASES_MAX)
        return err_set(err, ERR_LIMIT, "%d leases are in use already", LEASES_MAX);
    int rc = store_budget_take(s, 0, sizeof(struct lease), err);
    if (rc < 0)
        return err_wrap(err, "cannot grant a lease");
    struct lease *lease = calloc(1, sizeof *lease);
    if (lease) {
        lease->id = s->revision + 1; /* as unique as revisions are, also across restarts */
        lease->ttl_ms = ttl_ms;
        HASH_ADD(hh, s->leases, id, sizeof lease->id, lease);
        if (lease->hh.tbl && deadlines_set(&s->lease_deadlines, &lease->deadline, now_ns + ttl_ms * 1000000ull) == 0) {
            s->revision++;
            *ret_lease = lease->id;
            return 0;
        }
        if (lease->hh.tbl)
            HASH_DEL(s->leases, lease);
        free(lease);
    }
    s->used -= sizeof(struct lease);
    return err_set(err, ERR_NOMEM, "no memory for a lease");
}

static int lease_missing(uint64_t id, struct err *err)
{
    return err_set(err, ERR_NOTFOUND, "there is no lease %llu: it has ended, or the coordinator was restarted",
                   (unsigned long long)id);
}

int store_lease_keep(struct store *s, uint64_t id, uint64_t now_ns, uint32_t *ret_ttl_ms, struct err *err)
{
    struct lease *lease = store_lease_find(s, id);
    if (!lease || lease->deadline.ns <= now_ns)
        return lease_missing(id, err);
    *ret_ttl_ms = lease->ttl_ms;
    return deadlines_set(&s->lease_deadlines, &lease->deadline, now_ns + lease->ttl_ms * 1000000ull);
}

static void lease_end(struct store *s, struct lease *lease)
{
    while (lease->holds)
        store_entry_remove(s, lease->holds->entry);
    deadlines_remove(&s->lease_deadlines, &lease->deadline);
    HASH_DEL(s->leases, lease);
    s->used -= sizeof *lease;
    free(lease);
}

int store_lease_end(struct store *s, uint64_t id, struct err *err)
{
    struct lease *lease = store_lease_find(s, id);
    if (!lease)
        return lease_missing(id, err);
    lease_end(s, lease);
    return 0;
}

static struct lease *lease_of(struct deadline *deadline)
{
    return (struct lease *)((char *)deadline - offsetof(struct lease, deadline));
}

void store_leases_expire(struct store *s, uint64_t now_ns)
{
    while (deadlines_next_ns(&s->lease_deadlines) <= now_ns)
        lease_end(s, lease_of(deadlines_first(&s->lease_deadlines)));
}

/* Their keys are freed by store_free. */
void store_leases_free(struct store *s)
{
    struct lease *lease, *next;
    HASH_ITER(hh, s->leases, lease, next) {
        struct hold *hold, *next_hold;
        DL_FOREACH_SAFE(lease->holds, hold, next_hold) {
            hold->entry->hold = NULL;
            free(hold);
        }
        HASH_DEL(s->leases, lease);
        free(lease);
    }
}
