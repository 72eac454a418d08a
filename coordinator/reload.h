/* Experts that have lost their last copy: which agent reads which of them again, into which slot.  Pure. */
#ifndef EEP_COORDINATOR_RELOAD_H
#define EEP_COORDINATOR_RELOAD_H

#include "common/topology.h"

/* Where the bytes can come from. */
struct reload_means {
    const uint8_t *can_load; /* [ranks] the rank has the checkpoint itself */
    bool others_load;        /* somebody has it who can be read from */
    const uint8_t *copied;   /* [layers][logical] the expert lies in the memory of somebody who can be read from; NULL: none */
};

/* map: over the ranks that are left, after plan_cover_from_dormant.
 *
 * An expert without a live copy goes to an empty slot, else over a dormant copy, else over a live one whose expert has
 * another (of the expert with the most); among those to the rank that reads least so far, the lowest rank and slot first.
 * Never over the last copy of anything.  One that nobody has in memory goes to a rank with the checkpoint as long as one
 * of those has a slot for it.
 *
 * *ret_load: held[layer][rank * slots + slot] = the expert to be read into that slot, else -1 (live is 0); it has as many
 * entries as *ret_placed.  *ret_unplaced experts found no slot.  ERR_NOMEM. */
int reload_plan(const struct expert_map *map, const struct reload_means *means, struct expert_map **ret_load,
                uint64_t *ret_placed, uint64_t *ret_unplaced) MUST_CHECK;
/* What is going to be overwritten is held no more: in `map`, whose rank i is rank to[i] of `load` (-1: none). */
void reload_void(struct expert_map *map, const struct expert_map *load, const int32_t *to);
/* What has been read is held, and routed to. */
void reload_apply(struct expert_map *map, const struct expert_map *load);

#endif
