/* The planner's outside: plan_make and the maps of a plan, the cold start, and promotion after a death.  Pure.
 * The target is built in planner_target.c, its order in planner_steps.c, the rounds in planner_rounds.c, and all of it
 * is checked in planner_validate.c. */
#include "coordinator/planner.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

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

void plan_options_default(struct plan_options *ret_options)
{
    *ret_options =
        (struct plan_options){.target_balance = 0.98, .cross_cost = 4, .dip = 0.02, .fill = true, .uneven = true};
}

static int planner_check_options(const struct plan_options *o, struct err *err)
{
    if (!(o->target_balance > 0 && o->target_balance <= 1))
        return err_set(err, ERR_INVALID, "the target balance is %g: it must be above 0 and at most 1",
                       o->target_balance);
    if (!(o->lambda >= 0 && o->lambda < 1))
        return err_set(err, ERR_INVALID, "lambda is %g: it must be at least 0 and below 1", o->lambda);
    if (!(o->cross_cost >= 1 && o->cross_cost <= 1000))
        return err_set(err, ERR_INVALID, "an arrival from another node costs %g: it must be 1 to 1000", o->cross_cost);
    if (!(o->dip > 0 && o->dip <= 1))
        return err_set(err, ERR_INVALID, "the dip is %g: it must be above 0 and at most 1", o->dip);
    return 0;
}

static int planner_parties(struct planner *p, const struct plan_input *in, struct err *err)
{
    for (uint32_t party = 0; party < p->parties; party++) {
        bool leaves = planner_leaves(in, party), joins = planner_joins(in, party);
        if (leaves && joins)
            return err_set(err, ERR_INVALID, "party %u both joins and leaves", party);
        p->final[party] = !leaves;
        p->n_leaving += leaves;
        p->n_joining += joins;
        if (!leaves)
            p->party_of[p->n_final++] = party;
    }
    if (p->n_final == 0)
        return err_set(err, ERR_INVALID, "all %u parties leave: nobody is left to hold the experts", p->parties);
    if ((uint64_t)p->n_final * p->slots < p->logical)
        return err_set(err, ERR_LIMIT,
                       "%u experts do not fit on %u ranks of %u slots: keep more ranks or raise slots_per_rank",
                       p->logical, p->n_final, p->slots);
    return 0;
}

static int planner_init(struct planner *p, const struct plan_input *in, const struct plan_options *options,
                        struct err *err)
{
    const struct expert_map *now = in->now;
    *p = (struct planner){
        .in = in, .layers = now->layers, .logical = now->logical, .parties = now->ranks, .slots = now->slots};
    plan_options_default(&p->options);
    if (options)
        p->options = *options;
    if (!now->layers || !now->logical || !now->ranks || !now->slots || now->slots > UINT16_MAX ||
        now->logical > UINT16_MAX || now->ranks > UINT16_MAX)
        return err_set(err, ERR_INVALID, "cannot plan %u layers of %u experts on %u parties of %u slots", now->layers,
                       now->logical, now->ranks, now->slots);
    int rc = planner_check_options(&p->options, err);
    if (rc < 0)
        return rc;
    p->final = calloc(p->parties, 1);
    p->party_of = calloc(p->parties, sizeof *p->party_of);
    p->weight = calloc(p->logical, sizeof *p->weight);
    p->rounds = calloc(p->layers, sizeof *p->rounds);
    p->commit = expert_map_new(p->layers, p->logical, p->parties, p->slots);
    p->target = expert_map_new(p->layers, p->logical, p->parties, p->slots);
    if (!p->final || !p->party_of || !p->weight || !p->rounds || !p->commit || !p->target)
        return err_set(err, ERR_NOMEM, "no memory to plan %u layers of %u parties", p->layers, p->parties);
    rc = planner_parties(p, in, err);
    if (in->n_samples && !(p->samples = calloc((size_t)in->n_samples * p->logical, sizeof *p->samples)))
        return err_set(err, ERR_NOMEM, "no memory for %u samples of load", in->n_samples);
    return rc < 0 ? rc : place_init(&p->place, p->n_final, p->slots, p->logical, p->options.cross_cost, err);
}

int plan_make(const struct plan_input *in, const struct plan_options *options, struct plan **ret_plan, struct err *err)
{
    struct planner p;
    int rc = planner_init(&p, in, options, err);
    if (rc == 0)
        rc = planner_check_map(in, err);
    if (rc == 0)
        rc = planner_check_load(in, err);
    if (rc == 0)
        rc = planner_target(&p, err);
    if (rc == 0)
        rc = planner_rounds(&p, ret_plan, err);
    place_done(&p.place);
    split_done(&p.split);
    expert_map_unref(p.commit);
    expert_map_unref(p.target);
    free(p.final);
    free(p.party_of);
    free(p.weight);
    free(p.samples);
    free(p.rounds);
    free(p.steps);
    free(p.dips);
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

/* What stops and starts being routed to at the start of a round. */
static void map_flip(struct expert_map *map, const struct plan *plan, uint32_t round)
{
    for (uint32_t i = 0; i < plan->n_wakes; i++) {
        const struct retire *r = &plan->wakes[i];
        if (r->round == round)
            map->live[expert_map_at(map, r->layer, r->party, r->slot)] = 1;
    }
    for (uint32_t i = 0; i < plan->n_retires; i++) {
        const struct retire *r = &plan->retires[i];
        if (r->round == round)
            map->live[expert_map_at(map, r->layer, r->party, r->slot)] = 0;
    }
}

static void map_write(struct expert_map *map, const struct plan *plan, uint32_t round, bool finished)
{
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const struct move *move = &plan->moves[i];
        if (move->round != round)
            continue;
        size_t at = expert_map_at(map, move->layer, move->dst, move->dst_slot);
        map->held[at] = finished ? (int32_t)move->expert : -1;
        map->live[at] = finished && !move->dormant;
    }
}

/* Entries of one layer, [cells]: as in `like` for an expert whose replicas are the same there, else one for each; on
 * parties that are not absent.  differs is scratch, [logical]. */
static void layer_entries(const struct expert_map *map, uint32_t layer, const struct expert_map *like,
                          const uint8_t *absent, uint8_t *differs)
{
    size_t first = expert_map_at(map, layer, 0, 0), cells = (size_t)map->ranks * map->slots;
    const int32_t *held = map->held + first, *was_held = like->held + first;
    const uint8_t *was = like->live + first;
    uint8_t *live = map->live + first;
    memset(differs, 0, map->logical);
    for (size_t i = 0; i < cells; i++) {
        if ((absent && absent[i / map->slots]) || (!live[i] == !was[i] && held[i] == was_held[i]))
            continue;
        if (live[i])
            differs[held[i]] = 1;
        if (was[i])
            differs[was_held[i]] = 1;
    }
    for (size_t i = 0; i < cells; i++)
        if (live[i])
            live[i] = differs[held[i]] || !was[i] ? 1 : was[i];
}

/* Before the commit the entries are those of now, then those of the commit, at last those of the target. */
static bool map_entries(struct expert_map *map, const struct plan_input *in, const struct plan *plan,
                        uint32_t rounds_done, bool end)
{
    const struct expert_map *like = in->now;
    const uint8_t *absent = in->joining;
    if (end) {
        like = plan->target;
        absent = in->leaving;
    } else if (rounds_done >= plan->rounds_before && plan->at_commit) {
        like = plan->at_commit;
        absent = in->leaving;
    }
    uint8_t *differs = malloc(map->logical);
    for (uint32_t layer = 0; differs && layer < map->layers; layer++)
        layer_entries(map, layer, like, absent, differs);
    free(differs);
    return differs != NULL;
}

/* The same without entries. */
static struct expert_map *map_after(const struct plan_input *in, const struct plan *plan, uint32_t rounds_done)
{
    struct expert_map *map = expert_map_copy(in->now);
    if (!map)
        return NULL;
    for (uint32_t round = 0; round < rounds_done; round++) {
        map_flip(map, plan, round);
        map_write(map, plan, round, true);
    }
    if (rounds_done == plan->rounds_before || rounds_done == plan->rounds_before + plan->rounds_after)
        map_flip(map, plan, rounds_done);
    return map;
}

static struct expert_map *map_finish(struct expert_map *map, const struct plan_input *in, const struct plan *plan,
                                     uint32_t rounds_done, bool end)
{
    if (map && !map_entries(map, in, plan, rounds_done, end)) {
        expert_map_unref(map);
        return NULL;
    }
    return map;
}

struct expert_map *plan_map_after(const struct plan_input *in, const struct plan *plan, uint32_t rounds_done)
{
    return map_finish(map_after(in, plan, rounds_done), in, plan, rounds_done,
                      rounds_done == plan->rounds_before + plan->rounds_after);
}

struct expert_map *plan_map_during(const struct plan_input *in, const struct plan *plan, uint32_t round)
{
    struct expert_map *map = map_after(in, plan, round);
    if (map) {
        map_flip(map, plan, round);
        map_write(map, plan, round, false);
    }
    return map_finish(map, in, plan, round, false);
}

/* ---- after a death ---- */

/* Experts of one layer without a live copy: the first dormant copy on the rank with the fewest live slots. */
static uint64_t layer_cover_from_dormant(struct expert_map *map, uint32_t layer, int64_t *live_on)
{
    uint64_t missing = 0;
    for (uint32_t rank = 0; rank < map->ranks; rank++) {
        live_on[rank] = 0;
        for (uint32_t slot = 0; slot < map->slots; slot++)
            live_on[rank] += map->live[expert_map_at(map, layer, rank, slot)] > 0;
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
