/* The figures that the elastic planner has to reach, and that every load is carried to near its ceiling. */
#include <check.h>

#include "tests/harness/suite.h"
#include "tests/placement/cases.h"

#define LAYERS 16

static struct plan *plan_of(struct placement_case *c, const struct plan_options *options)
{
    struct plan *plan = NULL;
    struct err err = {0};
    ck_assert_msg(plan_make_window(&c->in, options, &plan, &err) == 0, "%s", err.text);
    ck_assert_msg(plan_validate(&c->in, plan, &err) == 0, "%s", err.text);
    return plan;
}

/* Means over layers and seeds, which differ from the figures' own: hence ten percent, and one arrival.  With even
 * shares, then with uneven ones. */
START_TEST(figures)
{
    size_t shape = (size_t)_i % CASE_SHAPES;
    const struct case_shape *s = &case_shapes[shape];
    struct plan_options options;
    plan_options_default(&options);
    options.uneven = (size_t)_i >= CASE_SHAPES;
    double before = 0, total = 0, hard = 0, fill = 0, commit = 0, after = 0, n = 3;
    for (uint64_t seed = 1; seed <= (uint64_t)n; seed++) {
        struct placement_case c;
        case_init(&c, s, LAYERS, CASE_LOGNORMAL, false, seed * 1000 + shape);
        struct plan *plan = plan_of(&c, &options);
        bool commits = s->from != s->to;
        total += (double)(plan->arrivals_before + plan->arrivals_after) / (LAYERS * n);
        before +=
            (double)(commits ? plan->arrivals_before : plan->arrivals_before + plan->arrivals_after) / (LAYERS * n);
        hard += (double)plan->bound_hard / (LAYERS * n);
        fill += (double)plan->bound_fill / (LAYERS * n);
        commit += plan->balance_at_commit / n;
        after += plan->balance_after / n;
        plan_unref(plan);
        case_done(&c);
    }
    printf("%s shares, %3u experts, %2u -> %2u, %2u slots: %5.1f arrivals (%5.1f), %5.1f in all, balance %.4f, then "
           "%.4f\n",
           options.uneven ? "uneven" : "even", s->experts, s->from, s->to, s->slots, before, s->arrivals, total, commit,
           after);
    ck_assert_msg(before <= 1.1 * s->arrivals + 0.5, "%.2f arrivals, not %.1f", before, s->arrivals);
    ck_assert_msg(fabs(hard - s->hard) <= 0.1 * s->hard, "hard bound %.2f, not %.1f", hard, s->hard);
    ck_assert_msg(total <= 1.1 * s->full + 0.5 || s->full == 0, "%.2f arrivals in all, not %.1f", total, s->full);
    ck_assert_msg(fabs(fill - s->full) <= 0.1 * s->full || s->full == 0, "fill bound %.2f, not %.1f", fill, s->full);
    if (s->from > s->to) /* what was borrowed on the way has its entries again when the commit comes */
        ck_assert_msg(after - commit < 0.002, "balance %.4f at the commit, %.4f at the end", commit, after);
    ck_assert_msg(commit >= 0.965, "balance %.4f at the commit", commit);
    double reached = options.uneven ? s->balance - 0.001 : 0.978 * s->balance;
    ck_assert_msg(after >= reached, "balance %.4f at the end, not %.3f", after, s->balance);
}
END_TEST

/* What even shares need arrivals for, or cannot reach at all, uneven ones reach for nothing: every rank has one heavy
 * expert of its own beside pairs that it shares with the next one. */
START_TEST(uneven_reaches_what_even_cannot)
{
    struct expert_map *now = expert_map_new(1, 8, 4, 3);
    ck_assert_ptr_nonnull(now);
    for (uint32_t r = 0; r < 4; r++) {
        const int32_t held[3] = {(int32_t)r, (int32_t)(4 + r), (int32_t)(4 + (r + 3) % 4)};
        for (uint32_t slot = 0; slot < 3; slot++) {
            now->held[expert_map_at(now, 0, r, slot)] = held[slot];
            now->live[expert_map_at(now, 0, r, slot)] = 1;
        }
    }
    const double load[8] = {40, 22, 30, 28, 20, 20, 20, 20};
    struct plan_input in = {.now = now, .load = load};
    for (int uneven = 0; uneven < 2; uneven++) {
        struct plan_options options;
        struct plan *plan = NULL;
        struct err err = {0};
        plan_options_default(&options);
        options.uneven = uneven;
        options.lambda = 0.9; /* nothing is moved for this */
        ck_assert_msg(plan_make(&in, &options, &plan, &err) == 0, "%s", err.text);
        ck_assert_msg(plan_validate(&in, plan, &err) == 0, "%s", err.text);
        ck_assert_uint_eq(plan->n_moves, 0);
        if (uneven)
            ck_assert_msg(plan->balance_after > 0.995, "%g", plan->balance_after);
        else
            ck_assert_msg(plan->balance_after < 0.97, "%g", plan->balance_after);
        struct expert_map *end = plan_map_after(&in, plan, plan->rounds_before + plan->rounds_after);
        ck_assert_uint_eq(expert_map_digest(end), expert_map_digest(plan->target)); /* entries and all */
        bool repeats = false;
        for (int i = 0; i < 12; i++)
            repeats |= end->live[i] > 1;
        ck_assert(repeats == uneven);
        if (uneven) { /* from there nothing is to be gained, also without load nothing is moved */
            struct plan_input then = {.now = end, .load = load};
            struct plan *again = NULL;
            ck_assert_int_eq(plan_make(&then, NULL, &again, &err), 0);
            ck_assert_int_eq(plan_validate(&then, again, &err), 0);
            ck_assert(again->balance_before > 0.995);
            ck_assert_uint_eq(again->n_moves, 0);
            plan_unref(again);
        }
        expert_map_unref(end);
        plan_unref(plan);
    }
    expert_map_unref(now);
}
END_TEST

/* Zipf, a fifth of the load on one expert, none at all, and leavers out of the middle. */
START_TEST(other_loads)
{
    for (size_t i = 0; i < CASE_SHAPES; i++) {
        struct placement_case c;
        case_init(&c, &case_shapes[i], 6, (enum case_load)_i, true, 77 + i);
        struct plan *plan = plan_of(&c, NULL);
        double reached = plan->balance_after / plan->balance_ceiling, idle = _i == CASE_ZERO ? 0.88 : 0.93;
        ck_assert_msg(reached >= idle, "shape %zu: %.4f of %.4f", i, plan->balance_after, plan->balance_ceiling);
        ck_assert(plan->balance_after <= plan->balance_ceiling + 1e-9);
        plan_unref(plan);
        case_done(&c);
    }
}
END_TEST

/* The higher the price of an arrival, the fewer of them, and the less balance. */
START_TEST(lambda_trades)
{
    double lambdas[] = {0, 0.0005, 0.002, 0.01, 0.2}, balance = 2;
    uint64_t arrivals = UINT64_MAX;
    for (size_t i = 0; i < sizeof lambdas / sizeof lambdas[0]; i++) {
        struct placement_case c;
        struct plan_options options;
        case_init(&c, &(struct case_shape){256, 32, 32, 9, 0, 0, 0, 0}, 8, CASE_LOGNORMAL, false, 5);
        plan_options_default(&options);
        options.lambda = lambdas[i];
        struct plan *plan = plan_of(&c, &options);
        ck_assert_uint_le(plan->arrivals_after, arrivals);
        ck_assert(plan->balance_after <= balance + 0.005);
        arrivals = plan->arrivals_after;
        balance = plan->balance_after;
        plan_unref(plan);
        case_done(&c);
    }
    ck_assert_uint_eq(arrivals, 0); /* nothing buys a fifth of the balance here */
}
END_TEST

/* A scale-down may slow steps to what they will take after it, and by the dip beyond: all layers of 4 -> 2 at once,
 * those of 16 -> 15, which would cost more, one after the other unless the budget is large. */
START_TEST(dip_staggers)
{
    static const struct case_shape shapes[] = {{64, 4, 2, 32, 0, 0, 0, 0}, {128, 16, 15, 9, 0, 0, 0, 0}};
    uint32_t rounds[2][2];
    for (int i = 0; i < 4; i++) {
        struct placement_case c;
        struct plan_options options;
        case_init(&c, &shapes[i / 2], 8, CASE_LOGNORMAL, false, 3);
        plan_options_default(&options);
        options.dip = i % 2 ? 1 : 0.02;
        struct plan *plan = plan_of(&c, &options);
        rounds[i / 2][i % 2] = plan->rounds_before;
        plan_unref(plan);
        case_done(&c);
    }
    ck_assert_uint_eq(rounds[0][0], rounds[0][1]);
    ck_assert_uint_gt(rounds[1][0], rounds[1][1]);
}
END_TEST

/* Two nodes: a dear arrival from the other one is avoided where the own one has the expert. */
START_TEST(nodes_cost)
{
    uint32_t node[9] = {0, 0, 0, 0, 1, 1, 1, 1, 1};
    uint64_t crossed[2];
    for (int dear = 0; dear < 2; dear++) {
        struct placement_case c;
        struct plan_options options;
        case_init(&c, &(struct case_shape){128, 8, 9, 20, 0, 0, 0, 0}, 8, CASE_LOGNORMAL, false, 9);
        c.in.node = node;
        plan_options_default(&options);
        options.cross_cost = dear ? 20 : 1;
        options.fill = false;
        struct plan *plan = plan_of(&c, &options);
        crossed[dear] = 0;
        for (uint32_t i = 0; i < plan->n_moves; i++)
            crossed[dear] += node[plan->moves[i].src] != node[plan->moves[i].dst];
        plan_unref(plan);
        case_done(&c);
    }
    ck_assert_uint_lt(crossed[1], crossed[0]);
}
END_TEST

/* ---- brute force ---- */

/* Best balance of one layer over all sets with at most `arrivals` arrivals: every subset of experts on every rank. */
struct brute {
    uint32_t experts, ranks, slots, arrivals;
    const double *weight;
    uint32_t held[3]; /* per rank: what is there */
    uint32_t set[3];
    double best;
    uint32_t fewest; /* arrivals of any covering choice */
};

static void brute_score(struct brute *b)
{
    double load[3] = {0}, peak = 0, total = 0;
    for (uint32_t e = 0; e < b->experts; e++) {
        uint32_t n = 0;
        for (uint32_t r = 0; r < b->ranks; r++)
            n += b->set[r] >> e & 1;
        if (!n)
            return;
        total += b->weight[e];
        for (uint32_t r = 0; r < b->ranks; r++)
            load[r] += b->set[r] >> e & 1 ? b->weight[e] / n : 0;
    }
    uint32_t arrivals = 0;
    for (uint32_t r = 0; r < b->ranks; r++) {
        arrivals += (uint32_t)__builtin_popcount(b->set[r] & ~b->held[r]);
        peak = fmax(peak, load[r]);
    }
    if (arrivals < b->fewest)
        b->fewest = arrivals;
    if (arrivals <= b->arrivals)
        b->best = fmax(b->best, total / b->ranks / peak);
}

static void brute_rank(struct brute *b, uint32_t rank)
{
    if (rank == b->ranks) {
        brute_score(b);
        return;
    }
    for (b->set[rank] = 0; b->set[rank] < 1u << b->experts; b->set[rank]++)
        if ((uint32_t)__builtin_popcount(b->set[rank]) <= b->slots)
            brute_rank(b, rank + 1);
}

/* Small instances of every kind: the hard bound is met exactly, and the balance is near the best for the arrivals. */
START_TEST(brute_force)
{
    double sum = 0;
    uint32_t n = 0;
    uint64_t rng = 4242;
    while (n < 60) {
        uint32_t experts = 2 + (uint32_t)(case_random(&rng) % 5), from = 1 + (uint32_t)(case_random(&rng) % 3);
        uint32_t to = 1 + (uint32_t)(case_random(&rng) % 3), slots = 1 + (uint32_t)(case_random(&rng) % 4);
        if ((uint64_t)from * slots < experts || (uint64_t)to * slots < experts || slots > experts)
            continue;
        struct placement_case c;
        case_init(&c, &(struct case_shape){experts, from, to, slots, 0, 0, 0, 0}, 1, CASE_LOGNORMAL, true, rng);
        struct plan_options options;
        plan_options_default(&options);
        options.fill = false;
        options.uneven = false;
        struct plan *plan = plan_of(&c, &options);
        struct brute b = {.experts = experts,
                          .slots = slots,
                          .weight = c.load,
                          .fewest = UINT32_MAX,
                          .arrivals = (uint32_t)(plan->arrivals_before + plan->arrivals_after)};
        for (uint32_t party = 0; party < c.now->ranks; party++) {
            if (c.leaving[party])
                continue;
            for (uint32_t slot = 0; slot < slots; slot++) {
                int32_t e = c.now->held[expert_map_at(c.now, 0, party, slot)];
                b.held[b.ranks] |= e >= 0 ? 1u << e : 0;
            }
            b.ranks++;
        }
        brute_rank(&b, 0);
        ck_assert_uint_eq(plan->bound_hard, b.fewest);
        options.lambda = 0.999; /* nothing is worth an arrival: only what must */
        struct plan *least = plan_of(&c, &options);
        ck_assert_uint_eq(least->arrivals_before + least->arrivals_after, b.fewest);
        sum += plan->balance_after / b.best;
        n++;
        plan_unref(least);
        plan_unref(plan);
        case_done(&c);
    }
    printf("balance over the best for the same arrivals, mean of %u small instances: %.4f\n", n, sum / n);
    ck_assert_msg(sum / n >= 0.99, "%.4f", sum / n);
}
END_TEST

/* ---- random instances ---- */

/* What muting, and a rebalance that was aborted, leave behind: second copies that are dormant or gone. */
static void case_wear(struct placement_case *c, uint64_t *rng)
{
    for (uint32_t layer = 0; layer < c->now->layers; layer++) {
        for (uint32_t i = 0; i < c->now->ranks * c->now->slots; i++) {
            size_t at = (size_t)layer * c->now->ranks * c->now->slots + i;
            if (case_random(rng) % 3 || !c->now->live[at] ||
                expert_map_live_count(c->now, layer, c->now->held[at], NULL) < 2)
                continue;
            if (case_random(rng) % 2) { /* or shares that were right once */
                c->now->live[at] = (uint8_t)(1 + case_random(rng) % 4);
                continue;
            }
            c->now->live[at] = 0;
            if (case_random(rng) % 2)
                c->now->held[at] = -1;
        }
    }
}

/* Samples around the load, one of them idle now and then. */
static double *case_samples(struct placement_case *c, uint32_t n, uint64_t *rng)
{
    size_t cells = (size_t)c->now->layers * c->now->logical;
    double *samples = calloc(n * cells, sizeof *samples);
    ck_assert(samples != NULL);
    for (uint32_t k = 0; k < n; k++) {
        bool idle = case_random(rng) % 8 == 0;
        for (size_t i = 0; i < cells && !idle; i++)
            samples[k * cells + i] = c->load[i] * exp(0.5 * case_normal(rng));
    }
    c->in.samples = samples;
    c->in.n_samples = n;
    return samples;
}

/* As the coordinator plans: for the samples jointly, whether that pays or not, and before the commit of a scale-up only
 * to those who join. */
static struct plan *joint_plan_of(struct placement_case *c, bool scales_up)
{
    struct plan *plan = NULL;
    struct err err = {0};
    struct plan_options options;
    plan_options_default(&options);
    options.joiners_only = true;
    ck_assert_msg(plan_make(&c->in, &options, &plan, &err) == 0, "%s", err.text);
    ck_assert_msg(plan_validate(&c->in, plan, &err) == 0, "%s", err.text);
    for (uint32_t i = 0; i < plan->n_moves && scales_up; i++)
        ck_assert_msg(plan->moves[i].round >= plan->rounds_before || c->joining[plan->moves[i].dst],
                      "before the commit expert %u of layer %u arrives at party %u, which serves",
                      plan->moves[i].expert, plan->moves[i].layer, plan->moves[i].dst);
    return plan;
}

/* Any mix of leavers and joiners at any size; EEP_PLANS more of them: make plans. */
START_TEST(random_instances)
{
    const char *more = getenv("EEP_PLANS");
    uint64_t rng = 99;
    uint32_t count = more ? (uint32_t)strtoul(more, NULL, 10) : 150;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t ranks = 1 + (uint32_t)(case_random(&rng) % (i % 10 ? 16 : 128));
        uint32_t experts = 1 + (uint32_t)(case_random(&rng) % (i % 10 ? 64 : 512));
        uint32_t layers = 1 + (uint32_t)(case_random(&rng) % (i % 25 ? 4 : 94));
        uint32_t slots = (experts + ranks - 1) / ranks + (uint32_t)(case_random(&rng) % 4);
        if ((uint64_t)layers * experts * ranks > 1000000)
            layers = 1 + (uint32_t)(1000000 / ((uint64_t)experts * ranks));
        struct placement_case c;
        case_init(&c,
                  &(struct case_shape){experts, ranks, ranks + (uint32_t)(case_random(&rng) % 9), slots, 0, 0, 0, 0},
                  layers, (enum case_load)(case_random(&rng) % CASE_LOADS), false, rng);
        uint32_t left = ranks, final = c.now->ranks;
        for (uint32_t party = 0; party < ranks; party++) {
            if (case_random(&rng) % 4 || left == 1 || (uint64_t)(final - 1) * slots < experts)
                continue;
            c.leaving[party] = 1;
            left--;
            final--;
        }
        if (i % 2)
            case_wear(&c, &rng);
        struct plan_options options;
        plan_options_default(&options);
        options.uneven = i % 4 != 0;
        double *samples = i % 3 == 0 ? case_samples(&c, 1 + (uint32_t)(case_random(&rng) % 6), &rng) : NULL;
        struct plan *plan = i % 6 ? plan_of(&c, &options) : joint_plan_of(&c, left == ranks && final > ranks);
        for (uint32_t layer = 0; layer < layers; layer++) {
            for (uint32_t party = 0; party < c.now->ranks; party++) {
                uint8_t *seen = calloc(experts, 1);
                for (uint32_t slot = 0; slot < slots; slot++) {
                    size_t at = expert_map_at(c.now, layer, party, slot);
                    if (!plan->target->live[at])
                        continue;
                    ck_assert_msg(!seen[plan->target->held[at]] || plan->n_moves == 0, "instance %u: twice", i);
                    seen[plan->target->held[at]] = 1;
                    ck_assert_msg(options.uneven || i % 6 == 0 || plan->target->live[at] == 1, "instance %u: entries",
                                  i);
                }
                free(seen);
            }
        }
        plan_unref(plan);
        free(samples);
        case_done(&c);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("planner_figures");
    TCase *tc = tcase_create("figures");
    tcase_set_timeout(tc, 600);
    tcase_add_loop_test(tc, figures, 0, 2 * (int)CASE_SHAPES);
    tcase_add_test(tc, uneven_reaches_what_even_cannot);
    tcase_add_loop_test(tc, other_loads, 0, CASE_LOADS);
    tcase_add_test(tc, lambda_trades);
    tcase_add_test(tc, dip_staggers);
    tcase_add_test(tc, nodes_cost);
    tcase_add_test(tc, brute_force);
    tcase_add_test(tc, random_instances);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
