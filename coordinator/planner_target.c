/* The target map, layer by layer: the sets of place_solve and place_fill, put into slots.  Pure.
 *
 * What a rank holds and keeps stays in its slot.  What arrives takes an empty slot, else that of a second copy on the
 * same rank, else one that the rank no longer routes to: first what is held elsewhere the most.  The rest stays
 * dormant.
 *
 * A layer that cannot be made better, or whose moves have no order, keeps what it has, save for what must be covered.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/planner_work.h"

/* Candidates looked at by further starts of a layer: some tenths of a millisecond. */
#define WORK_LAYER 15000

double planner_peak(const struct planner *p, const int32_t *held, const uint8_t *live, const uint8_t *which,
                    double *ret_mean)
{
    uint32_t count[p->logical]; /* at most UINT16_MAX: 256 KiB */
    memset(count, 0, sizeof count);
    size_t cells = (size_t)p->parties * p->slots;
    for (size_t i = 0; i < cells; i++)
        if (live[i] && which[i / p->slots])
            count[held[i]] += live[i];
    double peak = 0, total = 0;
    uint32_t ranks = 0;
    for (uint32_t party = 0; party < p->parties; party++) {
        double load = 0;
        if (!which[party])
            continue;
        ranks++;
        for (size_t i = (size_t)party * p->slots; i < (size_t)(party + 1) * p->slots; i++)
            if (live[i])
                load += p->weight[held[i]] * live[i] / count[held[i]];
        total += load;
        peak = fmax(peak, load);
    }
    if (ret_mean)
        *ret_mean = total / ranks;
    return peak;
}

/* Shares of the layer at hand; also wakes what is dormant and mutes what gets nothing. */
static void layer_split(struct planner *p, const int32_t *held, uint8_t *live)
{
    const struct split_map map = {.parties = p->parties,
                                  .slots = p->slots,
                                  .experts = p->logical,
                                  .held = held,
                                  .live = live,
                                  .which = p->final,
                                  .weight = p->in->n_samples ? p->samples : p->weight,
                                  .samples = p->in->n_samples ? p->in->n_samples : 1,
                                  .wake = true};
    if (p->options.uneven && p->loaded && split_map(&p->split, &map) < 0)
        p->place.broken = true;
}

static double balance_of(double mean, double peak)
{
    return peak > 0 ? mean / peak : 1;
}

/* Loads of the layer; all ones when nothing is known, so that idle layers are spread evenly.  Is anything known? */
static bool layer_weights(struct planner *p, uint32_t layer)
{
    const double *load = p->in->load ? p->in->load + (size_t)layer * p->logical : NULL;
    double sum = 0;
    for (uint32_t e = 0; load && e < p->logical; e++)
        sum += load[e];
    for (uint32_t e = 0; e < p->logical; e++)
        p->weight[e] = sum > 0 ? load[e] : 1;
    for (uint32_t k = 0; k < p->in->n_samples; k++)
        memcpy(p->samples + (size_t)k * p->logical, p->in->samples + ((size_t)k * p->layers + layer) * p->logical,
               p->logical * sizeof *p->samples);
    return sum > 0;
}

static int32_t *row_of(const struct planner *p, int32_t *cells, uint32_t layer)
{
    return cells + (size_t)layer * p->parties * p->slots;
}

static uint8_t *live_of(const struct planner *p, uint8_t *cells, uint32_t layer)
{
    return cells + (size_t)layer * p->parties * p->slots;
}

/* What each final rank holds of the layer, and what is near: `gone` parties are no source any more. */
static void layer_tiers(struct planner *p, const int32_t *held, const uint8_t *gone)
{
    struct place *place = &p->place;
    const uint32_t *node = p->in->node;
    if (!node)
        memset(place->tier, TIER_NODE, (size_t)p->logical * p->n_final);
    for (uint32_t party = 0; node && party < p->parties; party++) {
        for (uint32_t slot = 0; slot < p->slots && !(gone && gone[party]); slot++) {
            int32_t e = held[(size_t)party * p->slots + slot];
            for (uint32_t r = 0; e >= 0 && r < p->n_final; r++)
                if (node[p->party_of[r]] == node[party])
                    place->tier[(size_t)e * p->n_final + r] = TIER_NODE;
        }
    }
    for (uint32_t r = 0; r < p->n_final; r++) {
        const int32_t *at = held + (size_t)p->party_of[r] * p->slots;
        for (uint32_t slot = 0; slot < p->slots; slot++) {
            if (at[slot] >= 0)
                place_hold(place, r, (uint32_t)at[slot]);
            else
                place->room[r]++;
        }
    }
}

/* The state from which a layer is solved: what survivors route to. */
static void layer_start(struct planner *p, const int32_t *held, const uint8_t *live, const uint8_t *gone)
{
    place_reset(&p->place, p->weight);
    layer_tiers(p, held, gone);
    for (uint32_t r = 0; r < p->n_final; r++) {
        size_t at = (size_t)p->party_of[r] * p->slots;
        for (uint32_t slot = 0; slot < p->slots; slot++)
            if (live[at + slot] && !place_on(&p->place, r, (uint32_t)held[at + slot]))
                place_add(&p->place, r, (uint32_t)held[at + slot]);
    }
}

static void layer_bounds(struct planner *p)
{
    const struct place *place = &p->place;
    uint64_t hard = 0, fill = 0;
    for (uint32_t e = 0; e < p->logical; e++) {
        const uint8_t *tier = place->tier + (size_t)e * p->n_final;
        hard += memchr(tier, TIER_HELD, p->n_final) == NULL;
    }
    for (uint32_t r = 0; r < p->n_final; r++) {
        uint32_t missing = 0; /* experts that are not on this rank */
        for (uint32_t e = 0; e < p->logical && missing < (uint32_t)place->room[r]; e++)
            missing += place_tier(place, r, e) != TIER_HELD;
        fill += missing < (uint32_t)place->room[r] ? missing : (uint32_t)place->room[r];
    }
    p->bound_hard += hard;
    p->bound_fill += hard > fill ? hard : fill;
    if (p->n_joining)
        p->bound_balance += place_bound_balance(place, p->n_final - p->n_joining, p->options.target_balance);
    else
        p->bound_balance += hard;
    p->balance_ceiling += place_ceiling(place);
}

/* ---- into slots ---- */

struct slotting {
    int32_t *held; /* the rank's slots, as they are and will be */
    uint8_t *live;
    uint8_t *taken;          /* [slots]: keeps what it has */
    const uint32_t *holders; /* [logical] */
};

static uint32_t slot_for_arrival(const struct planner *p, const struct slotting *s, uint32_t rank)
{
    uint32_t best = p->slots, best_rate = 0;
    for (uint32_t slot = 0; slot < p->slots; slot++) {
        if (s->taken[slot])
            continue;
        int32_t e = s->held[slot];
        uint32_t rate = e < 0 ? UINT32_MAX : place_on(&p->place, rank, (uint32_t)e) ? UINT32_MAX - 1 : s->holders[e];
        if (rate > best_rate || best == p->slots) {
            best = slot;
            best_rate = rate;
        }
    }
    return best;
}

/* Turns the sets into slots, from what is held in `held` (changed in place). */
static void layer_slots(struct planner *p, int32_t *held, uint8_t *live, const uint8_t *was_live)
{
    const struct place *place = &p->place;
    uint32_t holders[p->logical];
    uint8_t taken[p->slots], placed[p->logical];
    memset(holders, 0, sizeof holders);
    for (size_t i = 0; i < (size_t)p->parties * p->slots; i++)
        if (held[i] >= 0 && p->final[i / p->slots])
            holders[held[i]]++;
    for (uint32_t r = 0; r < p->n_final; r++) {
        size_t at = (size_t)p->party_of[r] * p->slots;
        struct slotting s = {.held = held + at, .live = live + at, .taken = taken, .holders = holders};
        memset(taken, 0, sizeof taken);
        memset(placed, 0, sizeof placed);
        memset(s.live, 0, p->slots);
        for (int walk = 0; walk < 2; walk++) { /* of two copies the one that is routed to stays */
            for (uint32_t slot = 0; slot < p->slots; slot++) {
                int32_t e = s.held[slot];
                if (e < 0 || placed[e] || !place_on(place, r, (uint32_t)e) || (walk == 0 && !was_live[at + slot]))
                    continue;
                placed[e] = taken[slot] = s.live[slot] = 1;
            }
        }
        for (uint32_t i = 0; i < place->items[r]; i++) {
            uint32_t e = place->item[(size_t)r * p->slots + i];
            if (placed[e])
                continue;
            uint32_t slot = slot_for_arrival(p, &s, r);
            s.held[slot] = (int32_t)e;
            taken[slot] = s.live[slot] = 1;
        }
    }
}

/* What the fill brings without routing to it lies in slots that are still empty. */
static void layer_dormant(struct planner *p, int32_t *held)
{
    uint8_t here[p->logical];
    for (uint32_t r = 0; r < p->n_final; r++) {
        int32_t *slot = held + (size_t)p->party_of[r] * p->slots, *end = slot + p->slots;
        memset(here, 0, sizeof here);
        for (const int32_t *at = slot; at < end; at++)
            if (*at >= 0)
                here[*at] = 1;
        for (uint32_t e = 0; e < p->logical; e++) {
            if (here[e] || place_tier(&p->place, r, e) != TIER_HELD)
                continue;
            while (slot < end && *slot >= 0)
                slot++;
            if (slot == end)
                break;
            *slot = (int32_t)e;
        }
    }
}

/* ---- one layer ---- */

static void layer_leavers(const struct planner *p, uint32_t layer, struct expert_map *map)
{
    const struct expert_map *now = p->in->now;
    for (uint32_t party = 0; party < p->parties; party++) {
        if (p->final[party])
            continue;
        for (uint32_t slot = 0; slot < p->slots; slot++) {
            map->held[expert_map_at(now, layer, party, slot)] = -1;
            map->live[expert_map_at(now, layer, party, slot)] = 0;
        }
    }
}

static void layer_copy(const struct planner *p, uint32_t layer, struct expert_map *to, const struct expert_map *from)
{
    size_t row = (size_t)p->parties * p->slots, at = (size_t)layer * row;
    memcpy(to->held + at, from->held + at, row * sizeof *to->held);
    memcpy(to->live + at, from->live + at, row);
}

/* How freely a layer is planned: the next one when the moves of one have no order. */
enum effort { EFFORT_FULL, EFFORT_RIGID, EFFORT_COVER, EFFORTS };

/* Where something may arrive before the commit of a scale-up, on ranks that serve: slots whose expert is routed to on
 * another one of them as well, or not here.  What a joiner is to take over stays until it serves. */
static void layer_room(struct planner *p, const int32_t *held, const uint8_t *live, bool joiners_only)
{
    uint16_t replicas[p->logical];
    memset(replicas, 0, sizeof replicas);
    for (size_t i = 0; i < (size_t)p->parties * p->slots; i++)
        if (live[i])
            replicas[held[i]]++;
    for (uint32_t r = 0; r < p->n_final; r++) {
        size_t at = (size_t)p->party_of[r] * p->slots;
        if (planner_joins(p->in, p->party_of[r]))
            continue;
        p->place.room[r] = 0;
        for (size_t i = at; i < at + p->slots && !joiners_only; i++) {
            if (live[i] && replicas[held[i]] < 2)
                continue;
            p->place.room[r]++;
            if (live[i])
                replicas[held[i]]--;
        }
    }
}

/* Balance of the samples one by one, as far as an arrival buys so much of it. */
#define SAMPLES_LAMBDA 0.0005
#define SAMPLES_WORK   120000000 /* of a plan, for all its layers: some tenths of a second */

static void layer_joint(struct planner *p, bool held_only)
{
    const struct place_joint goal = {.samples = p->in->n_samples,
                                     .weight = p->samples,
                                     .balance = p->options.target_balance,
                                     .lambda = fmax(p->options.lambda, SAMPLES_LAMBDA),
                                     .peak_max = p->peak_max,
                                     .held_only = held_only,
                                     .work = 1 + SAMPLES_WORK / p->layers};
    if (goal.samples)
        place_joint(&p->place, &goal);
}

static void layer_commit(struct planner *p, uint32_t layer, enum effort effort)
{
    const struct expert_map *now = p->in->now;
    int32_t *held = row_of(p, p->commit->held, layer);
    uint8_t *live = live_of(p, p->commit->live, layer);
    layer_copy(p, layer, p->commit, now);
    layer_start(p, held, live, NULL);
    struct place_goal goal = {.balance = p->options.target_balance,
                              .lambda = p->options.lambda,
                              .arrivals_max = effort == EFFORT_COVER ? 0 : UINT32_MAX,
                              .work = WORK_LAYER,
                              .peak_max = p->peak_max};
    p->place.crowd = 0.5;
    p->place.rigid = effort == EFFORT_RIGID;
    if (p->n_joining && !p->n_leaving) {
        layer_room(p, held, live, p->options.joiners_only || effort != EFFORT_FULL);
        p->place.crowd = PLACE_NEVER;
    }
    place_solve(&p->place, &goal);
    if (effort == EFFORT_FULL || effort == EFFORT_RIGID)
        layer_joint(p, false);
    layer_slots(p, held, live, live_of(p, now->live, layer));
    layer_leavers(p, layer, p->commit);
    if (p->n_joining || p->n_leaving || !p->options.fill)
        layer_split(p, held, live);
}

static void layer_target(struct planner *p, uint32_t layer, enum effort effort)
{
    int32_t *held = row_of(p, p->target->held, layer);
    uint8_t *live = live_of(p, p->target->live, layer);
    layer_copy(p, layer, p->target, p->commit);
    layer_start(p, held, live, p->in->leaving);
    /* Once balanced, only empty slots are filled: to overwrite more would take rounds that dip. */
    double mean, peak = planner_peak(p, held, live, p->final, &mean);
    bool balanced = balance_of(mean, peak) >= p->options.target_balance * (1 - 1e-9);
    p->place.crowd = effort == EFFORT_COVER || balanced ? PLACE_NEVER : 1;
    if (!p->options.fill)
        return;
    place_fill(&p->place);
    layer_joint(p, true);
    layer_slots(p, held, live, live_of(p, p->commit->live, layer));
    layer_dormant(p, held);
    layer_split(p, held, live);
}

/* A layer that nothing improves stays exactly as it is. */
static void layer_stay(struct planner *p, uint32_t layer)
{
    layer_copy(p, layer, p->commit, p->in->now);
    layer_copy(p, layer, p->target, p->in->now);
}

static int layer_plan(struct planner *p, uint32_t layer, struct err *err)
{
    const struct expert_map *now = p->in->now;
    uint8_t serving[p->parties];
    for (uint32_t party = 0; party < p->parties; party++)
        serving[party] = !planner_joins(p->in, party);
    bool loaded = p->loaded = layer_weights(p, layer);
    double mean, peak_now = planner_peak(p, row_of(p, now->held, layer), live_of(p, now->live, layer), serving, &mean);
    p->balance_before += balance_of(mean, peak_now);
    p->place.split = p->options.uneven && loaded && !p->in->n_samples ? &p->split : NULL;
    layer_start(p, row_of(p, now->held, layer), live_of(p, now->live, layer), NULL);
    /* the search knows even shares only: uneven ones that lie behind what there is now come afterwards */
    p->peak_max = p->n_leaving ? INFINITY : fmax(peak_now, p->options.uneven ? place_max(&p->place) : 0);
    layer_bounds(p);
    int rc = ERR_CONFLICT;
    double peak = 0;
    /* bytes are not spent on the balance of a layer that is idle, save on what joiners must get */
    for (int effort = loaded || p->n_joining ? EFFORT_FULL : EFFORT_COVER; effort < EFFORTS && rc == ERR_CONFLICT;
         effort++) {
        layer_commit(p, layer, (enum effort)effort);
        layer_target(p, layer, (enum effort)effort);
        if (!p->n_joining && !p->n_leaving)
            layer_copy(p, layer, p->commit, p->target); /* there is none: all is the end */
        peak = planner_peak(p, row_of(p, p->target->held, layer), live_of(p, p->target->live, layer), p->final, NULL);
        if (p->n_leaving == 0 && peak > peak_now * (1 + 1e-9))
            layer_stay(p, layer);
        rc = planner_steps(p, layer, err);
    }
    if (rc < 0)
        return rc;
    peak = planner_peak(p, row_of(p, p->commit->held, layer), live_of(p, p->commit->live, layer), p->final, &mean);
    p->balance_at_commit += balance_of(mean, peak);
    peak = planner_peak(p, row_of(p, p->target->held, layer), live_of(p, p->target->live, layer), p->final, &mean);
    p->balance_after += balance_of(mean, peak);
    return 0;
}

int planner_target(struct planner *p, struct err *err)
{
    int rc = 0;
    for (uint32_t layer = 0; layer < p->layers && rc == 0; layer++)
        rc = layer_plan(p, layer, err);
    if (rc == 0 && p->place.broken)
        rc = err_set(err, ERR_NOMEM, "no memory to plan %u layers", p->layers);
    return rc;
}
