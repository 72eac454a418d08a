/* Masked experts: a view that serves without the experts that nobody has in memory any more, until they have been read
 * from the checkpoint again.  Part of the coordinator's core; pure.
 *
 * By policy, and only with engines that say they can: such an expert has no replica in the map, and the router of every
 * rank leaves it out.  The repair does not wait for the checkpoint then; what lies in the memory of an agent that does not
 * serve is still copied before the decision (core_reload.c), because with the decision that agent is put out.
 *
 * Afterwards the experts come back like those of a rebalance, in one round, while everybody serves:
 *
 *   OPEN RETIRE GRACE RELOAD RETIRE (the map that routes to them) FINISH */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"
#include "coordinator/reload.h"

#define MS               1000000ULL
#define RESTORE_RETRY_NS (1000 * MS) /* it could not begin, or was aborted */

bool mask_allowed(const struct coordinator *c, const uint32_t *peers, uint32_t n)
{
    bool all = c->config.on_lost_experts == LOST_MASK && c->config.reload_after_ms;
    for (uint32_t i = 0; i < n; i++)
        all &= c->peers[peers[i]].masks;
    return all;
}

/* How many experts of all layers the view serves without. */
uint64_t mask_count(struct coordinator *c)
{
    struct expert_map *map = c->view ? c->view->map : NULL;
    if (map == c->mask.map)
        return c->mask.count;
    expert_map_unref(c->mask.map);
    c->mask.map = expert_map_ref(map);
    c->mask.count = map ? expert_map_missing(map) : 0;
    return c->mask.count;
}

/* Engines or agents of the view that keep an operation from beginning are waited for. */
static bool restore_can_begin(const struct coordinator *c)
{
    return c->op.phase == PHASE_NONE && c->commit.state == COMMIT_IDLE && arrivals_complete(&c->map_acks) &&
           c->config.reload_after_ms && c->now_ns >= c->mask.next_ns;
}

/* One round of moves from nowhere into the slots of `load`, for the maps of the round. */
static struct plan *restore_plan(const struct expert_map *now, const struct expert_map *load, uint64_t n)
{
    int32_t same[RANKS_MAX];
    struct plan *plan = plan_new(now->ranks, (uint32_t)n, 0);
    struct expert_map *target = plan ? expert_map_copy(now) : NULL;
    uint32_t k = 0;
    if (!target)
        abort();
    for (uint32_t r = 0; r < now->ranks; r++)
        same[r] = (int32_t)r;
    reload_void(target, load, same);
    reload_apply(target, load);
    plan->target = target;
    plan->rounds_after = 1;
    for (uint32_t layer = 0; layer < load->layers; layer++)
        for (uint32_t rank = 0; rank < load->ranks; rank++)
            for (uint32_t slot = 0; slot < load->slots; slot++) {
                int32_t expert = load->held[expert_map_at(load, layer, rank, slot)];
                if (expert >= 0)
                    plan->moves[k++] = (struct move){.layer = layer, .expert = (uint32_t)expert, .src = rank,
                                                     .src_slot = slot, .dst = rank, .dst_slot = slot};
            }
    return plan;
}

/* Reads back what has a place; false, with c->degraded saying why, when that is nothing yet. */
static bool restore_begin(struct coordinator *c)
{
    uint32_t peers[RANKS_MAX], n = c->view->n;
    struct expert_map *load;
    struct err err = {0};
    c->mask.next_ns = c->now_ns + RESTORE_RETRY_NS;
    for (uint32_t r = 0; r < n; r++)
        peers[r] = members_find(c, c->view->members[r].id);
    if (setup_restore(c, &err) < 0) {
        operation_drop(c);
        return false;
    }
    if (!reload_place(c, peers, n, c->view->map, RELOAD_WHAT_FITS, &load)) {
        operation_drop(c);
        return false;
    }
    c->op.reload = load;
    c->op.plan = restore_plan(c->view->map, load, c->op.reloads);
    c->op.in = (struct plan_input){.now = expert_map_ref(c->view->map)};
    c->op.bytes_planned = c->op.reloads * c->durable.model->expert_bytes;
    c->op.unattended = true;
    snprintf(c->op.why, sizeof(c->op.why), "%llu masked experts are served again", (unsigned long long)c->op.reloads);
    core_log(c, CORE_WARN, "%llu masked experts are read again %s, while the others are served",
             (unsigned long long)c->op.reloads, reload_from(&c->op));
    operation_open_by_itself(c, n);
    return true;
}

/* The view is sound, but for what it serves without. */
void mask_check(struct coordinator *c)
{
    uint64_t n = mask_count(c);
    char room[80] = "";
    if (!n) {
        c->degraded[0] = '\0';
        c->mask.since_ns = 0;
        return;
    }
    if (!c->mask.since_ns)
        c->mask.since_ns = c->now_ns;
    if (restore_can_begin(c))
        c->mask.stuck = !restore_begin(c);
    bool reads = c->op.reload && c->op.phase != PHASE_NONE;
    if (c->mask.stuck && c->mask.unplaced)
        snprintf(room, sizeof(room), "; there is no room for %llu of them", (unsigned long long)c->mask.unplaced);
    else if (c->mask.stuck)
        snprintf(room, sizeof(room), "; no agent can read them now, `eepctl history` says why");
    snprintf(c->degraded, sizeof(c->degraded), "serves without %llu experts (of all layers), which are masked%s",
             (unsigned long long)n, reads ? " until they have been read again" : room);
}

uint64_t mask_deadline(const struct coordinator *c)
{
    bool waits = c->view && c->mask.count && c->op.phase == PHASE_NONE && c->mask.next_ns > c->now_ns;
    return waits ? c->mask.next_ns : UINT64_MAX;
}
