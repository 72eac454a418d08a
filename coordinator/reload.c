#include "coordinator/reload.h"

#include <stdlib.h>

/* One layer being planned. */
struct layer {
    const struct expert_map *map;
    const struct reload_means *means;
    uint32_t layer;
    uint32_t *live;          /* [logical] live copies that are left */
    struct expert_map *load; /* slots that are taken already */
    uint32_t *reads;         /* [ranks], over all layers */
};

/* How good a slot is to overwrite, less is better; 0 = it may not be.  Empty, dormant, then the most replicated. */
static uint64_t slot_cost(const struct layer *l, uint32_t rank, uint32_t slot)
{
    size_t at = expert_map_at(l->map, l->layer, rank, slot);
    int32_t held = l->map->held[at];
    if (l->load->held[at] >= 0)
        return 0;
    if (held < 0)
        return 1;
    if (!l->map->live[at])
        return 2;
    uint32_t copies = l->live[held];
    return copies > 1 ? UINT32_MAX - copies : 0;
}

static bool layer_place(struct layer *l, const uint8_t *ranks, uint32_t expert)
{
    const struct expert_map *map = l->map;
    uint64_t best = UINT64_MAX;
    uint32_t best_rank = 0, best_slot = 0;
    for (uint32_t rank = 0; rank < map->ranks; rank++)
        for (uint32_t slot = 0; (!ranks || ranks[rank]) && slot < map->slots; slot++) {
            uint64_t cost = slot_cost(l, rank, slot);
            if (cost && (cost < best || (cost == best && l->reads[rank] < l->reads[best_rank]))) {
                best = cost;
                best_rank = rank;
                best_slot = slot;
            }
        }
    if (best == UINT64_MAX)
        return false;
    size_t at = expert_map_at(map, l->layer, best_rank, best_slot);
    if (map->held[at] >= 0 && map->live[at])
        l->live[map->held[at]]--;
    l->load->held[at] = (int32_t)expert;
    l->reads[best_rank]++;
    return true;
}

static bool expert_place(struct layer *l, uint32_t expert)
{
    const struct reload_means *m = l->means;
    if (m->copied && m->copied[(size_t)l->layer * l->map->logical + expert])
        return layer_place(l, NULL, expert);
    return layer_place(l, m->can_load, expert) || (m->others_load && layer_place(l, NULL, expert));
}

int reload_plan(const struct expert_map *map, const struct reload_means *means, struct expert_map **ret_load,
                uint64_t *ret_placed, uint64_t *ret_unplaced)
{
    struct layer l = {.map = map,
                      .means = means,
                      .live = calloc(map->logical + 1, sizeof(*l.live)),
                      .load = expert_map_new(map->layers, map->logical, map->ranks, map->slots),
                      .reads = calloc(map->ranks + 1, sizeof(*l.reads))};
    *ret_placed = *ret_unplaced = 0;
    for (; l.live && l.load && l.reads && l.layer < map->layers; l.layer++) {
        for (uint32_t e = 0; e < map->logical; e++)
            l.live[e] = expert_map_live_count(map, l.layer, (int32_t)e, NULL);
        for (uint32_t e = 0; e < map->logical; e++)
            if (!l.live[e])
                ++*(expert_place(&l, e) ? ret_placed : ret_unplaced);
    }
    bool complete = l.live && l.load && l.reads;
    free(l.live);
    free(l.reads);
    if (!complete) {
        expert_map_unref(l.load);
        return ERR_NOMEM;
    }
    *ret_load = l.load;
    return 0;
}

void reload_void(struct expert_map *map, const struct expert_map *load, const int32_t *to)
{
    for (uint32_t layer = 0; layer < map->layers; layer++)
        for (uint32_t rank = 0; rank < map->ranks; rank++)
            for (uint32_t slot = 0; to[rank] >= 0 && slot < map->slots; slot++)
                if (load->held[expert_map_at(load, layer, (uint32_t)to[rank], slot)] >= 0) {
                    size_t at = expert_map_at(map, layer, rank, slot);
                    map->held[at] = -1;
                    map->live[at] = 0;
                }
}

void reload_apply(struct expert_map *map, const struct expert_map *load)
{
    size_t n = (size_t)map->layers * map->ranks * map->slots;
    for (size_t at = 0; at < n; at++)
        if (load->held[at] >= 0) {
            map->held[at] = load->held[at];
            map->live[at] = 1;
        }
}
