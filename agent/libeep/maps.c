/* The expert map arrays that the engine reads: shaped for max_ranks, at addresses that never change, rewritten in place
 * by the stepping thread at boundaries.  Installed by libeep's thread (or the sealing one) before the engine hears of
 * its regions. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "agent/libeep/internal.h"
#include "common/topology.h"

static size_t physical_cells(const struct eep_maps *m)
{
    return (size_t)m->layers * m->max_ranks * m->slots;
}

static size_t replica_cells(const struct eep_maps *m)
{
    return (size_t)m->layers * m->logical * m->max_replicas;
}

static void maps_clear(struct eep_maps *m)
{
    memset(m->physical_to_logical_map, 0xff, physical_cells(m) * sizeof(int32_t));
    memset(m->logical_to_physical_map, 0xff, replica_cells(m) * sizeof(int32_t));
    memset(m->logical_replica_count, 0, (size_t)m->layers * m->logical * sizeof(int32_t));
    m->version = 0;
}

static void maps_free(struct device *device, struct maps_box *box)
{
    device_maps_free(device, box->device); /* first: it has the counters pinned */
    if (box->pub.expert_load)
        munmap(box->pub.expert_load, box->load_bytes);
    free(box->pub.physical_to_logical_map);
    free(box->pub.logical_to_physical_map);
    free(box->pub.logical_replica_count);
    free(box);
}

/* The agent sizes the counters before it hands out the regions. */
static int load_map(struct eep *eep, struct maps_box *box, struct err *err)
{
    struct stat st;
    box->load_bytes = (size_t)box->pub.layers * box->pub.slots * sizeof(uint64_t);
    if (fstat(eep->load_fd, &st) < 0 || (uint64_t)st.st_size < box->load_bytes)
        return err_set(err, ERR_PROTOCOL, "the agent's load counters are smaller than layers x slots");
    void *base = mmap(NULL, box->load_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, eep->load_fd, 0);
    if (base == MAP_FAILED)
        return err_set(err, ERR_IO, "cannot map the load counters: %s", strerror(errno));
    box->pub.expert_load = base;
    return 0;
}

static int maps_make(struct eep *eep, const struct manifest *manifest, struct maps_box **ret_box, struct err *err)
{
    struct maps_box *box = calloc(1, sizeof *box);
    if (!box)
        return err_set(err, ERR_NOMEM, "no memory for the expert maps");
    struct eep_maps *m = &box->pub;
    m->layers = manifest->layers;
    m->logical = manifest->logical;
    m->slots = manifest->slots;
    m->max_ranks = eep->max_ranks;
    /* one on every rank (further ones on the same rank add no balance), or the entries of an uneven split */
    m->max_replicas = eep->max_ranks > ENTRIES_MAX ? eep->max_ranks : ENTRIES_MAX;
    m->physical_to_logical_map = malloc(physical_cells(m) * sizeof(int32_t));
    m->logical_to_physical_map = malloc(replica_cells(m) * sizeof(int32_t));
    m->logical_replica_count = malloc((size_t)m->layers * m->logical * sizeof(int32_t));
    int rc = 0;
    if (!m->physical_to_logical_map || !m->logical_to_physical_map || !m->logical_replica_count)
        rc = err_set(err, ERR_NOMEM, "no memory for expert maps of %u layers", m->layers);
    if (!rc)
        rc = load_map(eep, box, err);
    m->device = eep_device(eep);
    if (!rc && eep->device)
        rc = device_maps_new(eep->device, m, &box->device, err);
    if (rc) {
        maps_free(eep->device, box);
        return rc;
    }
    *ret_box = box;
    return 0;
}

int maps_install(struct eep *eep, const struct manifest *manifest, struct err *err)
{
    struct maps_box *box = eep->all_maps;
    while (box && !(box->pub.layers == manifest->layers && box->pub.logical == manifest->logical &&
                    box->pub.slots == manifest->slots))
        box = box->next;
    if (!box) {
        int rc = maps_make(eep, manifest, &box, err);
        if (rc)
            return rc;
        box->next = eep->all_maps;
        eep->all_maps = box;
    }
    maps_clear(&box->pub);
    int rc = maps_write_device(eep, box, NULL, err);
    if (!rc)
        atomic_store(&eep->maps, box);
    return rc;
}

bool maps_fit(const struct maps_box *maps, const struct routing *routing)
{
    const struct eep_maps *m = &maps->pub;
    return routing->layers == m->layers && routing->logical == m->logical && routing->slots == m->slots &&
           routing->ranks <= m->max_ranks;
}

/* The entries of a layer: every replica its first one, then those that have more a second one, and so on, so that an
 * engine which takes them in turn is even with few tokens, too. */
static void layer_entries(struct eep_maps *m, uint32_t layer, const int32_t *routed, const uint8_t *entries, size_t row)
{
    bool more = true;
    for (uint32_t turn = 0; more; turn++) {
        more = false;
        for (size_t p = 0; p < row; p++) {
            if (entries[p] <= turn)
                continue;
            more |= entries[p] > turn + 1;
            size_t expert = (size_t)layer * m->logical + (size_t)routed[p];
            int32_t n = m->logical_replica_count[expert];
            if (n >= (int32_t)m->max_replicas)
                continue;
            m->logical_to_physical_map[expert * m->max_replicas + (size_t)n] = (int32_t)p;
            m->logical_replica_count[expert] = n + 1;
        }
    }
}

void maps_write(struct maps_box *maps, const struct routing *routing)
{
    struct eep_maps *m = &maps->pub;
    size_t row = (size_t)routing->ranks * routing->slots;
    maps_clear(m);
    for (uint32_t layer = 0; layer < m->layers; layer++) {
        const int32_t *from = routing->routed + layer * row;
        memcpy(m->physical_to_logical_map + (size_t)layer * m->max_ranks * m->slots, from, row * sizeof *from);
        layer_entries(m, layer, from, routing->entries + layer * row, row);
    }
    m->version = routing->version;
}

int maps_write_device(struct eep *eep, struct maps_box *maps, void *stream, struct err *err)
{
    return maps->device ? device_maps_write(eep->device, maps->device, &maps->pub, stream, err) : 0;
}

const struct eep_maps *eep_maps_get(struct eep *eep)
{
    struct maps_box *box = atomic_load(&eep->maps);
    return box ? &box->pub : NULL;
}

void maps_free_all(struct eep *eep)
{
    while (eep->all_maps) {
        struct maps_box *box = eep->all_maps;
        eep->all_maps = box->next;
        maps_free(eep->device, box);
    }
    atomic_store(&eep->maps, NULL);
}
