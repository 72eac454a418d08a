/* The planner: random operations one after the other, each plan passed through plan_validate and its maps through
 * expert_map_validate; the scale sequences that the product shows; plans with a planted mistake, all refused. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "coordinator/planner.h"
#include "tests/harness/suite.h"

#define PARTIES_MAX 40

static uint64_t seed_next(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

static uint32_t below(uint64_t *state, uint32_t n)
{
    return (uint32_t)(seed_next(state) % n);
}

/* An operation on a map over ranks: the parties, and who of them leaves or joins. */
struct scene {
    struct expert_map *now;
    uint8_t leaving[PARTIES_MAX], joining[PARTIES_MAX];
    uint32_t node[PARTIES_MAX];
    double *load;
    struct plan_input in;
};

/* `map` over the old ranks gets `joiners` empty parties behind it. */
static void scene_init(struct scene *s, const struct expert_map *map, const uint8_t *leaving, uint32_t joiners)
{
    int32_t from[PARTIES_MAX];
    memset(s, 0, sizeof *s);
    for (uint32_t i = 0; i < map->ranks + joiners; i++) {
        from[i] = i < map->ranks ? (int32_t)i : -1;
        s->joining[i] = i >= map->ranks;
        s->leaving[i] = leaving && i < map->ranks && leaving[i];
    }
    s->now = expert_map_select(map, from, map->ranks + joiners);
    ck_assert_ptr_nonnull(s->now);
    s->in = (struct plan_input){.now = s->now, .leaving = s->leaving, .joining = s->joining};
}

static void scene_done(struct scene *s)
{
    expert_map_unref(s->now);
    free(s->load);
}

/* The map of the view after the operation. */
static struct expert_map *scene_result(const struct scene *s, const struct expert_map *over_parties)
{
    int32_t from[PARTIES_MAX];
    uint32_t n = 0;
    for (uint32_t i = 0; i < s->now->ranks; i++)
        if (!s->leaving[i])
            from[n++] = (int32_t)i;
    struct expert_map *map = expert_map_select(over_parties, from, n);
    ck_assert_ptr_nonnull(map);
    return map;
}

static struct plan *must_plan(const struct scene *s)
{
    struct err err = {0};
    struct plan *plan = NULL;
    ck_assert_msg(plan_make(&s->in, NULL, &plan, &err) == 0, "%s", err.text);
    ck_assert_msg(plan_validate(&s->in, plan, &err) == 0, "%s", err.text);
    return plan;
}

static struct expert_map *must_initial(uint32_t layers, uint32_t logical, uint32_t ranks, uint32_t slots)
{
    struct err err = {0};
    struct expert_map *map = NULL;
    ck_assert_msg(plan_initial(layers, logical, ranks, slots, &map, &err) == 0, "%s", err.text);
    ck_assert_msg(expert_map_validate(map, NULL, &err) == 0, "%s", err.text);
    return map;
}

static uint32_t held_on(const struct expert_map *map, uint32_t layer, uint32_t rank, int32_t expert)
{
    uint32_t n = 0;
    for (uint32_t slot = 0; slot < map->slots; slot++)
        n += map->held[expert_map_at(map, layer, rank, slot)] == expert;
    return n;
}

static uint32_t distinct_on(const struct expert_map *map, uint32_t layer, uint32_t rank)
{
    uint32_t n = 0;
    for (uint32_t e = 0; e < map->logical; e++)
        n += held_on(map, layer, rank, (int32_t)e) > 0;
    return n;
}

/* (layer, expert) pairs that no survivor holds. */
static uint64_t lost_by_hand(const struct scene *s)
{
    uint64_t lost = 0;
    for (uint32_t layer = 0; layer < s->now->layers; layer++) {
        for (uint32_t e = 0; e < s->now->logical; e++) {
            bool kept = false;
            for (uint32_t party = 0; party < s->now->ranks && !kept; party++)
                kept = !s->leaving[party] && held_on(s->now, layer, party, (int32_t)e) > 0;
            lost += !kept;
        }
    }
    return lost;
}

/* Every map that would be announced covers every expert, on the ranks that serve then. */
static void check_maps(const struct scene *s, const struct plan *plan)
{
    struct err err = {0};
    uint8_t before[PARTIES_MAX], after[PARTIES_MAX];
    for (uint32_t i = 0; i < s->now->ranks; i++) {
        before[i] = !s->joining[i];
        after[i] = !s->leaving[i];
    }
    uint32_t rounds = plan->rounds_before + plan->rounds_after;
    for (uint32_t round = 0; round <= rounds; round++) {
        struct expert_map *map = plan_map_after(&s->in, plan, round);
        ck_assert_ptr_nonnull(map);
        if (round < plan->rounds_before)
            ck_assert_msg(expert_map_validate(map, before, &err) == 0, "after %u: %s", round, err.text);
        if (round >= plan->rounds_before)
            ck_assert_msg(expert_map_validate(map, after, &err) == 0, "after %u, committed: %s", round, err.text);
        if (round == rounds) {
            struct expert_map *end = scene_result(s, map), *target = scene_result(s, plan->target);
            ck_assert_uint_eq(expert_map_digest(end), expert_map_digest(target));
            expert_map_unref(end);
            expert_map_unref(target);
        }
        expert_map_unref(map);
        if (round == rounds)
            break;
        map = plan_map_during(&s->in, plan, round);
        ck_assert_ptr_nonnull(map);
        ck_assert_msg(expert_map_validate(map, round < plan->rounds_before ? before : after, &err) == 0,
                      "during %u: %s", round, err.text);
        for (uint32_t i = 0; i < plan->n_moves; i++) {
            const struct move *m = &plan->moves[i];
            if (m->round != round)
                continue;
            ck_assert_int_eq(map->held[expert_map_at(map, m->layer, m->dst, m->dst_slot)], -1);
            ck_assert_int_eq(map->held[expert_map_at(map, m->layer, m->src, m->src_slot)], (int32_t)m->expert);
        }
        expert_map_unref(map);
    }
}

/* Slots are full or their rank holds everything; counts are right; nothing is twice on a rank that routes to it. */
static void check_quality(const struct scene *s, const struct plan *plan)
{
    const struct expert_map *now = s->now, *target = plan->target;
    uint64_t arrivals = 0;
    for (uint32_t i = 0; i < plan->n_moves; i++)
        arrivals += plan->moves[i].src != plan->moves[i].dst;
    ck_assert_uint_eq(plan->arrivals_before + plan->arrivals_after, arrivals);
    ck_assert_uint_eq(plan->bound_hard, lost_by_hand(s));
    ck_assert_uint_le(plan->bound_hard, plan->bound_fill);
    ck_assert(plan->balance_after <= plan->balance_ceiling + 1e-6);
    for (uint32_t layer = 0; layer < now->layers; layer++)
        for (uint32_t party = 0; party < now->ranks; party++)
            if (!s->leaving[party] && held_on(target, layer, party, -1) > 0)
                ck_assert_uint_eq(distinct_on(target, layer, party), now->logical);
}

/* No sender could be relieved by another holder that is as near and sends at least two moves less in the round. */
static void check_level(const struct scene *s, const struct plan *plan)
{
    for (uint32_t round = 0; round < plan->rounds_before + plan->rounds_after; round++) {
        uint32_t sent[PARTIES_MAX] = {0};
        struct expert_map *map = plan_map_during(&s->in, plan, round);
        for (uint32_t i = 0; i < plan->n_moves; i++)
            sent[plan->moves[i].src] += plan->moves[i].round == round;
        for (uint32_t i = 0; i < plan->n_moves; i++) {
            const struct move *m = &plan->moves[i];
            for (uint32_t party = 0; party < s->now->ranks && m->round == round; party++) {
                if (s->in.node && s->node[party] != s->node[m->dst] && s->node[m->src] == s->node[m->dst])
                    continue; /* farther */
                if (held_on(map, m->layer, party, (int32_t)m->expert) == 0 ||
                    (s->leaving[party] && round >= plan->rounds_before))
                    continue;
                if (s->in.node && s->node[m->src] != s->node[m->dst])
                    ck_assert_uint_ne(s->node[party], s->node[m->dst]); /* a nearer one was there */
                ck_assert_uint_ge(sent[party] + 1, sent[m->src]);
            }
        }
        expert_map_unref(map);
    }
}

static void check_same(const struct plan *a, const struct plan *b)
{
    ck_assert_uint_eq(a->n_moves, b->n_moves);
    ck_assert_uint_eq(a->n_retires, b->n_retires);
    for (uint32_t i = 0; i < a->n_moves; i++)
        ck_assert(memcmp(&a->moves[i], &b->moves[i], sizeof a->moves[i]) == 0);
    for (uint32_t i = 0; i < a->n_retires; i++)
        ck_assert(memcmp(&a->retires[i], &b->retires[i], sizeof a->retires[i]) == 0);
    ck_assert_uint_eq(expert_map_digest(a->target), expert_map_digest(b->target));
}

/* Makes some replicas dormant and some slots empty, while every expert keeps a live replica. */
static void disturb(struct expert_map *map, uint64_t *rng)
{
    for (uint32_t layer = 0; layer < map->layers; layer++) {
        for (uint32_t i = 0; i < map->ranks * map->slots; i++) {
            size_t at = expert_map_at(map, layer, i / map->slots, i % map->slots);
            uint32_t what = below(rng, 8);
            if (what > 1 || !map->live[at] || expert_map_live_count(map, layer, map->held[at], NULL) < 2)
                continue;
            map->live[at] = 0;
            if (what == 1)
                map->held[at] = -1;
        }
    }
}

static void random_scene(struct scene *s, const struct expert_map *map, uint64_t *rng)
{
    uint8_t leaving[PARTIES_MAX] = {0};
    uint32_t kind = below(rng, 8), joiners = 0;
    if (kind < 3 || kind == 6)
        joiners = 1 + below(rng, 5);
    if (kind >= 3 && kind < 7)
        for (uint32_t i = 0; i < map->ranks; i++)
            leaving[i] = below(rng, 3) == 0;
    if (map->ranks + joiners > PARTIES_MAX)
        joiners = 0;
    scene_init(s, map, leaving, joiners);
    if (below(rng, 2)) {
        for (uint32_t i = 0; i < s->now->ranks; i++)
            s->node[i] = i / 3;
        s->in.node = s->node;
    }
    uint32_t load = below(rng, 4);
    if (load) {
        size_t n = (size_t)map->layers * map->logical;
        s->load = calloc(n, sizeof *s->load);
        for (size_t i = 0; i < n && load > 1; i++)
            s->load[i] = load == 2 ? (double)below(rng, 100) : 1e6 / (double)(1 + i % map->logical);
        s->in.load = s->load;
    }
}

START_TEST(random_operations)
{
    uint64_t rng = 1000 + (uint64_t)_i;
    uint32_t layers = 1 + below(&rng, 4), ranks = 1 + below(&rng, 6), logical = 1 + below(&rng, 20);
    uint32_t slots = (logical + ranks - 1) / ranks + below(&rng, 4);
    struct expert_map *map = must_initial(layers, logical, ranks, slots);
    for (int op = 0; op < 12; op++) {
        struct scene s;
        struct err err = {0};
        struct plan *plan = NULL, *again = NULL;
        disturb(map, &rng);
        random_scene(&s, map, &rng);
        uint32_t n_final = 0;
        for (uint32_t i = 0; i < s.now->ranks; i++)
            n_final += !s.leaving[i];
        int rc = plan_make(&s.in, NULL, &plan, &err);
        if (n_final == 0 || n_final * slots < logical) {
            ck_assert_int_eq(rc, n_final ? ERR_LIMIT : ERR_INVALID);
            ck_assert_ptr_null(plan);
            scene_done(&s);
            continue;
        }
        ck_assert_msg(rc == 0, "seed %d op %d: %s", _i, op, err.text);
        ck_assert_msg(plan_validate(&s.in, plan, &err) == 0, "seed %d op %d: %s", _i, op, err.text);
        check_maps(&s, plan);
        check_level(&s, plan);
        ck_assert_uint_eq(plan->bound_hard, lost_by_hand(&s));
        check_quality(&s, plan);
        ck_assert_int_eq(plan_make(&s.in, NULL, &again, NULL), 0);
        check_same(plan, again);
        expert_map_unref(map);
        map = scene_result(&s, plan->target);
        plan_unref(plan);
        plan_unref(again);
        scene_done(&s);
    }
    expert_map_unref(map);
}
END_TEST

/* One step of a sequence; returns the map of the new view and frees the old one. */
static struct expert_map *scale(struct expert_map *map, const uint8_t *leaving, uint32_t joiners,
                                struct plan **ret_plan)
{
    struct scene s;
    scene_init(&s, map, leaving, joiners);
    struct plan *plan = must_plan(&s);
    check_maps(&s, plan);
    struct expert_map *next = scene_result(&s, plan->target);
    struct err err = {0};
    ck_assert_msg(expert_map_validate(next, NULL, &err) == 0, "%s", err.text);
    scene_done(&s);
    expert_map_unref(map);
    *ret_plan = plan;
    return next;
}

/* The demo: 2 -> 4 -> 3 (a middle rank leaves) -> 2 -> 4. */
START_TEST(demo_sequence)
{
    struct plan *plan;
    struct expert_map *map = must_initial(3, 8, 2, 4);
    map = scale(map, NULL, 2, &plan);
    ck_assert_uint_eq(plan->rounds_before, 1);
    ck_assert_uint_eq(plan->rounds_after, 1);
    ck_assert_uint_eq(plan->bound_hard, 0);
    ck_assert_uint_eq(plan->arrivals_before, 3 * 2 * 2); /* ceil(8 / 4) for each joiner and layer */
    ck_assert_uint_eq(plan->arrivals_after, 3 * 2 * 2);
    ck_assert(plan->balance_at_commit >= 0.98);
    ck_assert(plan->balance_after >= 0.98);
    plan_unref(plan);

    map = scale(map, (const uint8_t[]){0, 1, 0, 0}, 0, &plan);
    ck_assert_uint_eq(plan->rounds_after, 0);
    ck_assert_uint_eq(plan->bound_hard, 0); /* every expert had two copies on different ranks */
    ck_assert_uint_eq(plan->n_moves, 0);
    ck_assert_uint_eq(map->ranks, 3);
    plan_unref(plan);

    map = scale(map, (const uint8_t[]){1, 0, 0}, 0, &plan);
    ck_assert_uint_eq(plan->n_moves, plan->bound_hard);
    ck_assert_uint_eq(plan->arrivals_after, 0);
    for (uint32_t layer = 0; layer < 3; layer++)
        for (int32_t e = 0; e < 8; e++)
            ck_assert_uint_eq(expert_map_live_count(map, layer, e, NULL), 1);
    plan_unref(plan);

    map = scale(map, NULL, 2, &plan);
    ck_assert_uint_eq(plan->arrivals_before + plan->arrivals_after, plan->bound_fill);
    ck_assert_uint_eq(plan->bound_fill, 3 * 2 * 4);
    plan_unref(plan);
    expert_map_unref(map);
}
END_TEST

/* A scale-down in which unique experts must move over redundant replicas, hitless, at the bound. */
START_TEST(scale_down_at_the_bound)
{
    struct plan *plan;
    struct expert_map *map = must_initial(2, 10, 4, 5); /* each expert twice */
    for (uint32_t layer = 0; layer < 2; layer++) {
        /* ranks 1 and 3 hold the same experts, 0 and 2 too: take both of one kind away */
        ck_assert_int_eq(map->held[expert_map_at(map, layer, 0, 0)], map->held[expert_map_at(map, layer, 2, 0)]);
    }
    map = scale(map, (const uint8_t[]){0, 1, 0, 1}, 0, &plan);
    ck_assert_uint_eq(plan->bound_hard, 10);
    ck_assert_uint_eq(plan->n_moves, 10);
    ck_assert_uint_eq(plan->n_retires, 10);
    /* both layers at once: more than the dip on ranks that are unloaded compared with what the commit brings */
    ck_assert_uint_eq(plan->rounds_before, 1);
    /* two leavers with the same experts share the sending */
    uint32_t sent[4] = {0};
    for (uint32_t i = 0; i < plan->n_moves; i++)
        sent[plan->moves[i].src]++;
    ck_assert_uint_eq(sent[1], 5);
    ck_assert_uint_eq(sent[3], 5);
    plan_unref(plan);
    expert_map_unref(map);
}
END_TEST

/* Few layers, of which each dips by more than the budget allows: from 4 ranks to 2 no step takes as long meanwhile as every
 * step will, so that one round is enough, and every round more would wait for a step. */
START_TEST(scale_down_rounds)
{
    struct plan *plan;
    struct expert_map *map = must_initial(4, 16, 2, 8);
    map = scale(map, NULL, 2, &plan);
    plan_unref(plan);
    for (uint32_t pair = 0; pair < 6; pair++) {
        static const uint8_t leaving[6][4] = {{1, 1, 0, 0}, {1, 0, 1, 0}, {1, 0, 0, 1},
                                              {0, 1, 1, 0}, {0, 1, 0, 1}, {0, 0, 1, 1}};
        struct scene s;
        scene_init(&s, map, leaving[pair], 0);
        plan = must_plan(&s);
        ck_assert_uint_eq(plan->arrivals_before, plan->bound_hard);
        ck_assert_uint_eq(plan->rounds_before, plan->n_moves > 0);
        plan_unref(plan);
        scene_done(&s);
    }
    expert_map_unref(map);
}
END_TEST

START_TEST(dormant_copies_are_promoted)
{
    struct expert_map *map = must_initial(1, 4, 3, 2); /* 0 1 | 2 3 | 0 1 */
    map->live[0] = map->live[1] = 0;
    struct plan *plan;
    map = scale(map, (const uint8_t[]){0, 0, 1}, 0, &plan);
    ck_assert_uint_eq(plan->n_moves, 0);
    ck_assert_uint_eq(plan->rounds_before, 0);
    ck_assert_uint_eq(map->live[0], 1);
    ck_assert_uint_eq(map->live[1], 1);
    plan_unref(plan);
    expert_map_unref(map);
}
END_TEST

START_TEST(does_not_fit)
{
    struct expert_map *map = must_initial(1, 9, 3, 3);
    struct scene s;
    struct err err = {0};
    struct plan *plan = NULL;
    scene_init(&s, map, (const uint8_t[]){0, 0, 1}, 0);
    ck_assert_int_eq(plan_make(&s.in, NULL, &plan, &err), ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(err.text, "do not fit"));
    scene_done(&s);
    scene_init(&s, map, (const uint8_t[]){1, 1, 1}, 0);
    ck_assert_int_eq(plan_make(&s.in, NULL, &plan, &err), ERR_INVALID);
    scene_done(&s);
    map->held[0] = -1; /* the only copy of expert 0 is gone */
    map->live[0] = 0;
    scene_init(&s, map, NULL, 1);
    ck_assert_int_eq(plan_make(&s.in, NULL, &plan, &err), ERR_NOTFOUND);
    ck_assert_ptr_null(plan);
    scene_done(&s);
    expert_map_unref(map);
    ck_assert_int_eq(plan_initial(1, 9, 2, 4, &map, &err), ERR_LIMIT);
}
END_TEST

START_TEST(hot_experts_get_replicas)
{
    struct expert_map *map = must_initial(1, 8, 2, 4);
    struct scene s;
    double load[8] = {1, 1, 1, 50, 1, 1, 50, 1};
    scene_init(&s, map, NULL, 2);
    s.in.load = load;
    struct plan *plan = must_plan(&s);
    ck_assert_uint_ge(expert_map_live_count(plan->target, 0, 3, NULL), 2);
    ck_assert_uint_ge(expert_map_live_count(plan->target, 0, 6, NULL), 2);
    ck_assert(plan->balance_at_commit > 0.98);
    plan_unref(plan);
    memset(load, 0, sizeof load); /* idle: evenly, not all to expert 0 */
    plan = must_plan(&s);
    for (int32_t e = 0; e < 8; e++)
        ck_assert_uint_le(expert_map_live_count(plan->target, 0, e, NULL), 3);
    ck_assert(plan->balance_after > 0.98);
    plan_unref(plan);
    load[2] = -1;
    ck_assert_int_eq(plan_make(&s.in, NULL, &plan, NULL), ERR_INVALID);
    scene_done(&s);
    expert_map_unref(map);
}
END_TEST

START_TEST(sources_are_levelled)
{
    struct expert_map *map = must_initial(4, 32, 4, 16); /* every expert twice */
    struct scene s;
    scene_init(&s, map, NULL, 4);
    struct plan *plan = must_plan(&s);
    uint32_t sent[2][8] = {{0}}, all[2] = {0};
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        sent[plan->moves[i].round >= plan->rounds_before][plan->moves[i].src]++;
        all[plan->moves[i].round >= plan->rounds_before]++;
    }
    ck_assert_uint_eq(all[0] + all[1], 4 * 4 * 16);
    for (uint32_t party = 0; party < 4; party++)
        ck_assert_uint_eq(sent[0][party], all[0] / 4);
    for (uint32_t party = 0; party < 8; party++)
        ck_assert_uint_le(sent[1][party], all[1] / 4 + 1); /* what only the old ranks have, and the rest */
    plan_unref(plan);

    for (uint32_t i = 0; i < 8; i++) /* a copy on each node: nothing crosses */
        s.node[i] = i / 2 % 2;
    s.in.node = s.node;
    plan = must_plan(&s);
    for (uint32_t i = 0; i < plan->n_moves; i++)
        ck_assert_uint_eq(s.node[plan->moves[i].src], s.node[plan->moves[i].dst]);
    plan_unref(plan);
    scene_done(&s);
    expert_map_unref(map);
}
END_TEST

/* ---- mistakes that plan_validate must find ---- */

static struct plan *plan_duplicate(const struct plan *from)
{
    struct plan *plan = plan_new(from->parties, from->n_moves, from->n_retires);
    plan->target = expert_map_copy(from->target);
    memcpy(plan->moves, from->moves, from->n_moves * sizeof *from->moves);
    memcpy(plan->retires, from->retires, from->n_retires * sizeof *from->retires);
    plan->rounds_before = from->rounds_before;
    plan->rounds_after = from->rounds_after;
    plan->bound_hard = from->bound_hard;
    plan->bound_fill = from->bound_fill;
    plan->n_wakes = from->n_wakes;
    plan->wakes = calloc(from->n_wakes + 1, sizeof *plan->wakes);
    memcpy(plan->wakes, from->wakes, from->n_wakes * sizeof *plan->wakes);
    plan->arrivals_before = from->arrivals_before;
    plan->arrivals_after = from->arrivals_after;
    return plan;
}

enum mistake {
    WRONG_SOURCE_SLOT,
    WRONG_EXPERT,
    MOVE_DROPPED,
    RETIRE_DROPPED,
    RETIRE_TWICE,
    RETIRE_LAST,
    WRITE_TO_LEAVER,
    WRITE_TWICE,
    READ_WHILE_WRITTEN,
    TARGET_LOSES_EXPERT,
    TARGET_ROUTES_TO_LEAVER,
    TARGET_DUPLICATE,
    TARGET_MUTED,
    ROUND_OUT_OF_RANGE,
    ROUNDS_UNSORTED,
    COUNT_WRONG,
    COMMIT_TOO_EARLY,
    SLOT_OUT_OF_RANGE,
    BOUND_WRONG,
    MISTAKES
};

static const char *const mistake_text[MISTAKES] = {
    [WRONG_SOURCE_SLOT] = "which holds",
    [WRONG_EXPERT] = "arrives",
    [MOVE_DROPPED] = "no live replica after the commit",
    [RETIRE_DROPPED] = "while it is live",
    [RETIRE_TWICE] = "not live",
    [RETIRE_LAST] = "last live replica",
    [WRITE_TO_LEAVER] = "which leaves",
    [WRITE_TWICE] = "twice",
    [READ_WHILE_WRITTEN] = "while it is written",
    [TARGET_LOSES_EXPERT] = "no live replica",
    [TARGET_ROUTES_TO_LEAVER] = "which leaves",
    [TARGET_DUPLICATE] = "copies of expert",
    [TARGET_MUTED] = "ends with",
    [ROUND_OUT_OF_RANGE] = "out of range",
    [ROUNDS_UNSORTED] = "comes after",
    [COUNT_WRONG] = "arrivals",
    [COMMIT_TOO_EARLY] = "no live replica after the commit",
    [SLOT_OUT_OF_RANGE] = "out of range",
    [BOUND_WRONG] = "bound",
};

/* The scene of all mistakes: 10 experts, 4 ranks of 5, two of which leave; 10 moves over 10 retired replicas. */
static void plant(struct plan *plan, enum mistake mistake)
{
    struct expert_map *target = plan->target;
    struct move *first = &plan->moves[0], *second = &plan->moves[1];
    switch (mistake) {
    case WRONG_SOURCE_SLOT:
        first->src_slot = (first->src_slot + 1) % 5;
        break;
    case WRONG_EXPERT:
        first->expert = second->expert;
        break;
    case MOVE_DROPPED:
        plan->n_moves--;
        break;
    case RETIRE_DROPPED:
        plan->n_retires--;
        break;
    case RETIRE_TWICE:
        plan->retires[1] = plan->retires[0];
        break;
    case RETIRE_LAST:
        plan->retires[0].party = plan->retires[0].party == 0 ? 2 : 0; /* the other copy of what is retired too */
        plan->retires[1] =
            (struct retire){.layer = 0, .party = 2 - plan->retires[0].party, .slot = plan->retires[0].slot};
        break;
    case WRITE_TO_LEAVER:
        first->dst = 1;
        break;
    case WRITE_TWICE:
        second->dst = first->dst, second->dst_slot = first->dst_slot;
        break;
    case READ_WHILE_WRITTEN:
        first->src = second->dst, first->src_slot = second->dst_slot;
        break;
    case TARGET_LOSES_EXPERT:
        target->live[expert_map_at(target, first->layer, first->dst, first->dst_slot)] = 0;
        break;
    case TARGET_ROUTES_TO_LEAVER:
        target->held[expert_map_at(target, 0, 1, 0)] = 5;
        target->live[expert_map_at(target, 0, 1, 0)] = 1;
        break;
    case TARGET_DUPLICATE: /* planted by the test */
    case TARGET_MUTED:
    case MISTAKES:
        break;
    case ROUND_OUT_OF_RANGE:
        plan->moves[plan->n_moves - 1].round = 7;
        break;
    case ROUNDS_UNSORTED:
        plan->rounds_before = 2;
        first->round = 1;
        break;
    case COUNT_WRONG:
        plan->arrivals_before++;
        break;
    case COMMIT_TOO_EARLY:
        plan->rounds_after += plan->rounds_before, plan->rounds_before = 0;
        break;
    case SLOT_OUT_OF_RANGE:
        first->dst_slot = 5;
        break;
    case BOUND_WRONG:
        plan->bound_hard = 11, plan->bound_fill = 11;
        break;
    }
}

START_TEST(mistakes_are_found)
{
    enum mistake mistake = (enum mistake)_i;
    struct expert_map *map = must_initial(2, 10, 4, 5);
    struct scene s;
    struct err err = {0};
    scene_init(&s, map, (const uint8_t[]){0, 1, 0, 1}, 0);
    struct plan *good = must_plan(&s);
    if (mistake == TARGET_MUTED || mistake == TARGET_DUPLICATE) { /* these need a target with redundant replicas */
        plan_unref(good);
        scene_done(&s);
        scene_init(&s, map, (const uint8_t[]){0, 0, 0, 0}, 1);
        good = must_plan(&s);
    }
    struct plan *bad = plan_duplicate(good);
    ck_assert_msg(plan_validate(&s.in, bad, &err) == 0, "%s", err.text);
    if (mistake == TARGET_MUTED) /* without a retire that prepares it */
        *(uint8_t *)memchr(bad->target->live, 1, 20) = 0;
    else if (mistake == TARGET_DUPLICATE)
        bad->target->held[expert_map_at(bad->target, 0, 0, 0)] = bad->target->held[expert_map_at(bad->target, 0, 0, 1)];
    else
        plant(bad, mistake);
    ck_assert_int_eq(plan_validate(&s.in, bad, &err), ERR_INVALID);
    ck_assert_msg(strstr(err.text, mistake_text[mistake]), "mistake %d: %s", _i, err.text);
    plan_unref(bad);
    plan_unref(good);
    scene_done(&s);
    expert_map_unref(map);
}
END_TEST

/* Scale up: what must not be read or written when. */
START_TEST(mistakes_of_a_scale_up)
{
    struct expert_map *map = must_initial(1, 8, 2, 4);
    struct scene s;
    struct err err = {0};
    scene_init(&s, map, NULL, 2);
    struct plan *good = must_plan(&s);

    struct plan *bad = plan_duplicate(good); /* a joiner sends what it has not got */
    bad->moves[0].src = 3 - (bad->moves[0].dst == 3);
    bad->moves[0].src_slot = 3;
    ck_assert_int_eq(plan_validate(&s.in, bad, &err), ERR_INVALID);
    plan_unref(bad);

    bad = plan_duplicate(good); /* the second half arrives in the round of the first: fine; twice: not */
    for (uint32_t i = 0; i < bad->n_moves; i++)
        if (bad->moves[i].round == 1 && bad->moves[i].dst == bad->moves[0].dst) {
            bad->moves[i].expert = bad->moves[0].expert;
            bad->moves[i].src = bad->moves[0].src;
            bad->moves[i].src_slot = bad->moves[0].src_slot;
            break;
        }
    ck_assert_int_eq(plan_validate(&s.in, bad, &err), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "arrives"));
    plan_unref(bad);

    bad = plan_duplicate(good); /* overwrites a survivor's live slot */
    bad->moves[0].dst = 1 - bad->moves[0].src;
    ck_assert_int_eq(plan_validate(&s.in, bad, &err), ERR_INVALID);
    plan_unref(bad);
    plan_unref(good);
    scene_done(&s);
    expert_map_unref(map);
}
END_TEST

START_TEST(cover_from_dormant)
{
    struct expert_map *map = must_initial(2, 4, 2, 4);
    struct err err = {0};
    for (uint32_t slot = 0; slot < 4; slot++) /* rank 1 dormant everywhere, rank 0 lost experts 1 and 2 */
        for (uint32_t layer = 0; layer < 2; layer++)
            map->live[expert_map_at(map, layer, 1, slot)] = 0;
    map->held[expert_map_at(map, 1, 0, 1)] = map->held[expert_map_at(map, 1, 0, 2)] = -1;
    map->live[expert_map_at(map, 1, 0, 1)] = map->live[expert_map_at(map, 1, 0, 2)] = 0;
    ck_assert_int_eq(expert_map_validate(map, NULL, &err), ERR_INVALID);
    ck_assert_uint_eq(plan_cover_from_dormant(map), 0);
    ck_assert_msg(expert_map_validate(map, NULL, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(map->live[expert_map_at(map, 1, 1, 1)], 1);
    ck_assert_uint_eq(map->live[expert_map_at(map, 1, 1, 0)], 0); /* not needed: stays dormant */
    ck_assert_uint_eq(map->live[expert_map_at(map, 0, 1, 1)], 0);
    map->held[expert_map_at(map, 1, 1, 1)] = -1;
    map->live[expert_map_at(map, 1, 1, 1)] = 0;
    ck_assert_uint_eq(plan_cover_from_dormant(map), 1);
    expert_map_unref(map);
}
END_TEST

/* 58 layers of 256 experts, 16 -> 32 parties: well under a second. */
START_TEST(large_is_fast)
{
    struct expert_map *map = must_initial(58, 256, 16, 16);
    struct timespec a, b;
    struct plan *plan;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
    struct scene s;
    scene_init(&s, map, NULL, 16);
    struct err err = {0};
    ck_assert_int_eq(plan_make(&s.in, NULL, &plan, &err), 0);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
    double up = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
    ck_assert_msg(plan_validate(&s.in, plan, &err) == 0, "%s", err.text);
    struct expert_map *big = scene_result(&s, plan->target);
    plan_unref(plan);
    scene_done(&s);

    uint8_t leaving[PARTIES_MAX] = {0};
    for (uint32_t i = 0; i < 32; i += 2)
        leaving[i] = 1;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
    scene_init(&s, big, leaving, 0);
    ck_assert_int_eq(plan_make(&s.in, NULL, &plan, &err), 0);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
    double down = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
    ck_assert_msg(plan_validate(&s.in, plan, &err) == 0, "%s", err.text);
    printf("16 -> 32: %.3f s, 32 -> 16: %.3f s (%u moves)\n", up, down, plan->n_moves);
    ck_assert_msg(up < 3 && down < 3, "%.2f s, %.2f s", up, down); /* generous: sanitizers, a busy machine */
    plan_unref(plan);
    scene_done(&s);
    expert_map_unref(big);
    expert_map_unref(map);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("planner");
    TCase *tc = tcase_create("planner");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, random_operations, 0, 300);
    tcase_add_test(tc, demo_sequence);
    tcase_add_test(tc, scale_down_at_the_bound);
    tcase_add_test(tc, scale_down_rounds);
    tcase_add_test(tc, dormant_copies_are_promoted);
    tcase_add_test(tc, does_not_fit);
    tcase_add_test(tc, hot_experts_get_replicas);
    tcase_add_test(tc, sources_are_levelled);
    tcase_add_loop_test(tc, mistakes_are_found, 0, MISTAKES);
    tcase_add_test(tc, mistakes_of_a_scale_up);
    tcase_add_test(tc, cover_from_dormant);
    tcase_add_test(tc, large_is_fast);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
