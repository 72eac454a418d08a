/* The planner's outside: plan_make and the maps of a plan, the cold start, and promotion after a death.  Pure.
 * The target is built in planner_target.c, the rounds in planner_rounds.c, and checked in planner_validate.c. */
#include "coordinator/planner.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

#include "coordinator/planner_work.h"

static int planner_check_load(const struct plan_input *in, struct err *err)
{
    size_t n = (size_t)in->now->layers * in->now->logical;
    for (size_t i = 0; in->load && i < n; i++)
        if (!isfinite(in->load[i]) || in->load[i] < 0)
            return err_set(err, ERR_INVALID, "load of expert %zu of layer %zu is %g: it must be a number >= 0",
                           i % in->now->logical, i / in->now->logical, in->load[i]);
    return 0;
}

static int planner_check_map(const struct plan_input *in, struct err *err)
{
    const struct expert_map *now = in->now;
    for (uint32_t layer = 0; layer < now->layers; layer++) {
        for (uint32_t party = 0; party < now->ranks; party++) {
            for (uint32_t slot = 0; slot < now->slots; slot++) {
                size_t at = expert_map_at(now, layer, party, slot);
                int32_t e = now->held[at];
                if (e < -1 || (e >= 0 && (uint32_t)e >= now->logical) || (now->live[at] && e < 0))
                    return err_set(err, ERR_INVALID, "layer %u party %u slot %u holds expert %d, of %u", layer, party,
                                   slot, e, now->logical);
                if (e >= 0 && planner_joins(in, party))
                    return err_set(err, ERR_INVALID, "party %u joins but holds expert %d of layer %u already", party, e,
                                   layer);
            }
        }
    }
    return 0;
}

static int planner_init(struct planner *p, const struct plan_input *in, struct err *err)
{
    const struct expert_map *now = in->now;
    *p = (struct planner){
        .in = in, .layers = now->layers, .logical = now->logical, .parties = now->ranks, .slots = now->slots};
    if (!now->layers || !now->logical || !now->ranks || !now->slots || now->slots > UINT16_MAX)
        return err_set(err, ERR_INVALID, "cannot plan %u layers of %u experts on %u parties of %u slots", now->layers,
                       now->logical, now->ranks, now->slots);
    p->final = calloc(p->parties, 1);
    p->origin = calloc((size_t)p->layers * p->parties * p->slots, 1);
    p->target = expert_map_new(p->layers, p->logical, p->parties, p->slots);
    if (!p->final || !p->origin || !p->target)
        return err_set(err, ERR_NOMEM, "no memory to plan %u layers of %u parties", p->layers, p->parties);
    for (uint32_t party = 0; party < p->parties; party++) {
        bool leaves = planner_leaves(in, party), joins = planner_joins(in, party);
        if (leaves && joins)
            return err_set(err, ERR_INVALID, "party %u both joins and leaves", party);
        p->final[party] = !leaves;
        p->n_leaving += leaves;
        p->n_joining += joins;
        p->n_final += !leaves;
    }
    if (p->n_final == 0)
        return err_set(err, ERR_INVALID, "all %u parties leave: nobody is left to hold the experts", p->parties);
    if ((uint64_t)p->n_final * p->slots < p->logical)
        return err_set(err, ERR_LIMIT,
                       "%u experts do not fit on %u ranks of %u slots: keep more ranks or raise slots_per_rank",
                       p->logical, p->n_final, p->slots);
    return 0;
}

int plan_make(const struct plan_input *in, struct plan **ret_plan, struct err *err)
{
    struct planner p;
    int rc = planner_init(&p, in, err);
    if (rc == 0)
        rc = planner_check_map(in, err);
    if (rc == 0)
        rc = planner_check_load(in, err);
    if (rc == 0)
        rc = planner_target(&p, err);
    if (rc == 0)
        rc = planner_rounds(&p, ret_plan, err);
    expert_map_unref(p.target);
    free(p.origin);
    free(p.final);
    return rc;
}

/* Slot p of all slots holds expert p mod experts: replica counts differ by at most one, and since a rank takes no
 * more slots than there are experts, none lies twice on it. */
int plan_initial(uint32_t layers, uint32_t logical, uint32_t ranks, uint32_t slots, struct expert_map **ret_map,
                 struct err *err)
{
    if (!layers || !logical || !ranks || !slots || logical > INT32_MAX)
        return err_set(err, ERR_INVALID, "cannot place %u layers of %u experts on %u ranks of %u slots", layers,
                       logical, ranks, slots);
    if ((uint64_t)ranks * slots < logical)
        return err_set(err, ERR_LIMIT,
                       "%u experts do not fit on %u ranks of %u slots: start more ranks or raise slots_per_rank",
                       logical, ranks, slots);
    struct expert_map *map = expert_map_new(layers, logical, ranks, slots);
    if (!map)
        return err_set(err, ERR_NOMEM, "no memory for an expert map of %u layers, %u ranks, %u slots", layers, ranks,
                       slots);
    uint32_t used = slots < logical ? slots : logical;
    for (uint32_t layer = 0; layer < layers; layer++) {
        for (uint32_t rank = 0; rank < ranks; rank++) {
            for (uint32_t slot = 0; slot < used; slot++) {
                size_t at = expert_map_at(map, layer, rank, slot);
                map->held[at] = (int32_t)(((uint64_t)rank * used + slot) % logical);
                map->live[at] = 1;
            }
        }
    }
    *ret_map = map;
    return 0;
}

/* ---- maps of a plan ---- */

static void map_apply_round(struct expert_map *map, const struct plan *plan, uint32_t round, bool finished)
{
    for (uint32_t i = 0; i < plan->n_retires; i++) {
        const struct retire *retire = &plan->retires[i];
        if (retire->round == round)
            map->live[expert_map_at(map, retire->layer, retire->party, retire->slot)] = 0;
    }
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const struct move *move = &plan->moves[i];
        if (move->round != round)
            continue;
        size_t at = expert_map_at(map, move->layer, move->dst, move->dst_slot);
        map->held[at] = finished ? (int32_t)move->expert : -1;
        /* A slot that a later round overwrites is not in the target with this expert: it stays dormant. */
        map->live[at] = finished && plan->target->held[at] == map->held[at] && plan->target->live[at];
    }
}

struct expert_map *plan_map_after(const struct plan_input *in, const struct plan *plan, uint32_t rounds_done)
{
    struct expert_map *map = expert_map_copy(in->now);
    if (!map)
        return NULL;
    /* Promotion: what is held already where the target wants it live.  A slot that a round writes or retires differs
     * from the target until then, or was live anyway. */
    size_t cells = (size_t)map->layers * map->ranks * map->slots;
    for (size_t i = 0; i < cells; i++)
        if (map->held[i] >= 0 && map->held[i] == plan->target->held[i] && plan->target->live[i])
            map->live[i] = 1;
    for (uint32_t round = 0; round < rounds_done; round++)
        map_apply_round(map, plan, round, true);
    return map;
}

struct expert_map *plan_map_during(const struct plan_input *in, const struct plan *plan, uint32_t round)
{
    struct expert_map *map = plan_map_after(in, plan, round);
    if (map)
        map_apply_round(map, plan, round, false);
    return map;
}

/* ---- after a death ---- */

/* Experts of one layer without a live copy: the first dormant copy on the rank with the fewest live slots. */
static uint64_t layer_cover_from_dormant(struct expert_map *map, uint32_t layer, int64_t *live_on)
{
    uint64_t missing = 0;
    for (uint32_t rank = 0; rank < map->ranks; rank++) {
        live_on[rank] = 0;
        for (uint32_t slot = 0; slot < map->slots; slot++)
            live_on[rank] += map->live[expert_map_at(map, layer, rank, slot)];
    }
    for (uint32_t expert = 0; expert < map->logical; expert++) {
        if (expert_map_live_count(map, layer, (int32_t)expert, NULL))
            continue;
        size_t best = SIZE_MAX;
        uint32_t best_rank = 0;
        for (uint32_t rank = 0; rank < map->ranks; rank++) {
            for (uint32_t slot = 0; slot < map->slots; slot++) {
                size_t at = expert_map_at(map, layer, rank, slot);
                if (map->held[at] == (int32_t)expert && (best == SIZE_MAX || live_on[rank] < live_on[best_rank])) {
                    best = at;
                    best_rank = rank;
                }
            }
        }
        if (best == SIZE_MAX) {
            missing++;
            continue;
        }
        map->live[best] = 1;
        live_on[best_rank]++;
    }
    return missing;
}

uint64_t plan_cover_from_dormant(struct expert_map *map)
{
    int64_t live_on[RANKS_MAX];
    uint64_t missing = 0;
    assert(map->ranks <= RANKS_MAX);
    for (uint32_t layer = 0; layer < map->layers; layer++)
        missing += layer_cover_from_dormant(map, layer, live_on);
    return missing;
}
