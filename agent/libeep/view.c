/* Views and routings: from the wire, shared by reference count, and the lists of what is decided but not in use yet.
 * Any thread; the lists under the lock of struct eep. */
#include <stdlib.h>
#include <string.h>

#include "agent/libeep/internal.h"
#include "common/topology.h"

int routing_from_wire(const Eep__Engine__ExpertMap *wire, struct routing *ret_routing, struct err *err)
{
    if (wire->ranks == 0 || wire->ranks > RANKS_MAX || wire->slots == 0 || wire->layers == 0 || wire->logical == 0 ||
        wire->logical > INT32_MAX)
        return err_set(err, ERR_PROTOCOL, "an expert map of %u layers, %u experts, %u ranks, %u slots", wire->layers,
                       wire->logical, wire->ranks, wire->slots);
    uint64_t cells;
    if (__builtin_mul_overflow((uint64_t)wire->layers * wire->ranks, (uint64_t)wire->slots, &cells) ||
        cells != wire->n_routed)
        return err_set(err, ERR_PROTOCOL, "an expert map with %zu entries, not layers x ranks x slots", wire->n_routed);
    for (size_t i = 0; i < wire->n_routed; i++)
        if (wire->routed[i] < -1 || wire->routed[i] >= (int32_t)wire->logical)
            return err_set(err, ERR_PROTOCOL, "an expert map that names expert %d of %u", wire->routed[i], wire->logical);
    if (wire->has_entries && wire->entries.len != cells)
        return err_set(err, ERR_PROTOCOL, "an expert map with entries of %zu slots, not %zu", wire->entries.len,
                       wire->n_routed);
    int32_t *routed = malloc(wire->n_routed * (sizeof *routed + 1));
    if (!routed)
        return err_set(err, ERR_NOMEM, "no memory for an expert map");
    memcpy(routed, wire->routed, wire->n_routed * sizeof *routed);
    uint8_t *entries = (uint8_t *)(routed + wire->n_routed);
    for (size_t i = 0; i < wire->n_routed; i++)
        entries[i] = routed[i] < 0 ? 0 : wire->has_entries && wire->entries.data[i] ? wire->entries.data[i] : 1;
    *ret_routing = (struct routing){.version = wire->version,
                                    .layers = wire->layers,
                                    .logical = wire->logical,
                                    .ranks = wire->ranks,
                                    .slots = wire->slots,
                                    .routed = routed,
                                    .entries = entries};
    return 0;
}

void view_release(struct view_box *view)
{
    if (!view || atomic_fetch_sub(&view->refs, 1) != 1)
        return;
    for (uint32_t i = 0; i < view->pub.n; i++) {
        free((char *)(uintptr_t)view->members[i].agent); /* ours, const only for the engine */
        free((char *)(uintptr_t)view->members[i].endpoint);
    }
    free(view->routing.routed);
    free(view);
}

int view_from_wire(const Eep__Engine__View *wire, struct view_box **ret_view, struct err *err)
{
    size_t n = wire->n_members;
    if (n == 0 || n > RANKS_MAX || wire->rank < -1 || wire->rank >= (int32_t)n)
        return err_set(err, ERR_PROTOCOL, "a view of %zu ranks in which we are rank %d", n, wire->rank);
    if (wire->map && wire->map->ranks != n)
        return err_set(err, ERR_PROTOCOL, "a view of %zu ranks with a map of %u", n, wire->map->ranks);
    struct view_box *view = calloc(1, sizeof *view + n * sizeof view->members[0]);
    if (!view)
        return err_set(err, ERR_NOMEM, "no memory for a view");
    atomic_init(&view->refs, 1);
    view->pub.epoch = wire->epoch;
    view->pub.n = (uint32_t)n;
    view->pub.rank = wire->rank;
    view->pub.kv_bytes = wire->kv_bytes;
    view->pub.members = view->members;
    for (size_t i = 0; i < n; i++) {
        const Eep__Engine__Member *m = wire->members[i];
        view->members[i].agent = strdup(m->id);
        view->members[i].endpoint = strdup(m->endpoint ? m->endpoint : "");
        view->members[i].serving = m->serving;
        view->members[i].draining = m->draining;
        if (!view->members[i].agent || !view->members[i].endpoint) {
            view_release(view);
            return err_set(err, ERR_NOMEM, "no memory for a view");
        }
    }
    if (wire->map) {
        int rc = routing_from_wire(wire->map, &view->routing, err);
        if (rc) {
            view_release(view);
            return rc;
        }
        view->pub.physical_to_logical_map = view->routing.routed;
    }
    *ret_view = view;
    return 0;
}

const struct eep_view *eep_view_ref(const struct eep_view *view)
{
    if (view)
        atomic_fetch_add(&((struct view_box *)(uintptr_t)view)->refs, 1);
    return view;
}

void eep_view_unref(const struct eep_view *view)
{
    view_release((struct view_box *)(uintptr_t)view);
}

/* ---- decided, not in use yet ---- */

void commit_add(struct eep *eep, struct commit *commit)
{
    struct commit **at = &eep->commits;
    while (*at && (*at)->view->pub.epoch < commit->view->pub.epoch)
        at = &(*at)->next;
    if (*at && (*at)->view->pub.epoch == commit->view->pub.epoch) {
        view_release(commit->view); /* GO is repeated after a reconnection */
        free(commit);
        return;
    }
    commit->next = *at;
    *at = commit;
}

struct view_box *commit_take(struct eep *eep, uint64_t epoch)
{
    bool here = false;
    for (struct commit *c = eep->commits; c; c = c->next)
        here = here || c->view->pub.epoch == epoch;
    if (!here)
        return NULL;
    struct view_box *view = NULL;
    while (eep->commits && eep->commits->view->pub.epoch <= epoch) {
        struct commit *c = eep->commits;
        eep->commits = c->next;
        if (c->view->pub.epoch == epoch)
            view = c->view;
        else
            view_release(c->view);
        free(c);
    }
    return view;
}

bool commit_rank(struct eep *eep, uint64_t epoch, int32_t *ret_rank)
{
    for (struct commit *c = eep->commits; c; c = c->next)
        if (c->view->pub.epoch == epoch) {
            *ret_rank = c->view->pub.rank;
            return true;
        }
    return false;
}

void update_free(struct map_update *update)
{
    if (!update)
        return;
    free(update->routing.routed);
    free(update);
}

void update_add(struct eep *eep, struct map_update *update)
{
    struct map_update **at = &eep->updates;
    while (*at && (*at)->routing.version < update->routing.version)
        at = &(*at)->next;
    if (*at && (*at)->routing.version == update->routing.version) {
        update_free(update);
        return;
    }
    update->next = *at;
    *at = update;
}

struct map_update *update_take(struct eep *eep, uint64_t limit)
{
    struct map_update *newest = NULL;
    while (eep->updates && eep->updates->routing.version <= limit) {
        update_free(newest);
        newest = eep->updates;
        eep->updates = newest->next;
    }
    return newest;
}
