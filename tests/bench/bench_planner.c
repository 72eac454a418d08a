/* The planners: how long they take, and what a plan costs against the figures, EPLB from scratch and vLLM's policy.
 *
 * vLLM's policy, from its public description: EPLB from scratch, after which an expert that a GPU has already is not
 * sent to it again, wherever its slot was.  With --points, lines for the plot: case policy arrivals balance, per layer.
 */
#include <time.h>

#include "tests/placement/cases.h"

static double cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static struct plan *plan_of(struct placement_case *c, const struct plan_options *options)
{
    struct plan *plan = NULL;
    struct err err = {0};
    if (plan_make(&c->in, options, &plan, &err) < 0 || plan_validate(&c->in, plan, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    return plan;
}

/* EPLB for the target: slots that would be sent, the same by vLLM's policy, and the balance. */
struct scratch {
    double sent, arrivals, balance;
};

static struct scratch from_scratch(const struct placement_case *c, const struct case_shape *s, uint32_t layers)
{
    uint32_t physical = s->to * s->slots;
    size_t n = (size_t)layers * s->experts;
    float *load = calloc(n, sizeof *load);
    int32_t *phy2log = calloc((size_t)layers * physical, sizeof *phy2log);
    uint32_t *logcnt = calloc(n, sizeof *logcnt);
    struct scratch sum = {0};
    for (size_t i = 0; i < n; i++)
        load[i] = (float)c->load[i];
    struct err err = {0};
    if (eplb_place(&(struct eplb_input){layers, s->experts, physical, 1, 1, s->to, load}, phy2log, logcnt, &err) < 0)
        exit(1);
    for (uint32_t layer = 0; layer < layers; layer++) {
        double peak = 0, total = 0;
        for (uint32_t rank = 0; rank < s->to; rank++) {
            uint8_t *have = calloc(s->experts, 1);
            double mine = 0;
            for (uint32_t slot = 0; slot < s->slots; slot++) {
                int32_t is = c->now->held[expert_map_at(c->now, layer, rank, slot)];
                if (rank < s->from && is >= 0)
                    have[is] = 1;
            }
            for (uint32_t slot = 0; slot < s->slots; slot++) {
                int32_t e = phy2log[(size_t)layer * physical + rank * s->slots + slot];
                int32_t is = c->now->held[expert_map_at(c->now, layer, rank, slot)];
                sum.sent += (rank >= s->from || is != e) / (double)layers;
                sum.arrivals += !have[e] / (double)layers;
                have[e] = 1;
                mine +=
                    c->load[(size_t)layer * s->experts + (size_t)e] / logcnt[(size_t)layer * s->experts + (size_t)e];
            }
            peak = fmax(peak, mine);
            total += mine;
            free(have);
        }
        sum.balance += total / s->to / peak / layers;
    }
    free(load);
    free(phy2log);
    free(logcnt);
    return sum;
}

/* Arrivals before the commit, and in all where there is none; of a layer. */
static double arrivals_to_target(const struct plan *plan, const struct case_shape *s, uint32_t layers)
{
    return (double)(plan->arrivals_before + (s->from == s->to ? plan->arrivals_after : 0)) / layers;
}

static void table(uint32_t layers)
{
    printf("Per layer, mean of %u layers, log-normal load, drift 0.3; in brackets the figures to reach.\n\n", layers);
    printf(
        "| experts, ranks, slots | arrivals to 0.98 | balance then | in all | fill bound | balance at the end | even "
        "shares: arrivals to 0.98 | balance then | in all | at the end | vLLM's policy | EPLB from scratch |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (size_t i = 0; i < CASE_SHAPES; i++) {
        const struct case_shape *s = &case_shapes[i];
        struct placement_case c;
        case_init(&c, s, layers, CASE_LOGNORMAL, false, 1000 + i);
        struct plan_options options;
        plan_options_default(&options);
        struct plan *plan = plan_of(&c, &options);
        options.uneven = false;
        struct plan *even = plan_of(&c, &options);
        struct scratch scratch = from_scratch(&c, s, layers);
        printf("| %u, %u->%u, %u | %.1f (%g) | %.3f | %.1f (%g) | %.1f | %.4f (%g) | %.1f | %.3f | %.1f | %.4f | %.1f "
               "(%.3f) | %.1f |\n",
               s->experts, s->from, s->to, s->slots, arrivals_to_target(plan, s, layers), s->arrivals,
               plan->balance_at_commit, (double)(plan->arrivals_before + plan->arrivals_after) / layers, s->full,
               (double)plan->bound_fill / layers, plan->balance_after, s->balance, arrivals_to_target(even, s, layers),
               even->balance_at_commit, (double)(even->arrivals_before + even->arrivals_after) / layers,
               even->balance_after, scratch.arrivals, scratch.balance, scratch.sent);
        plan_unref(plan);
        plan_unref(even);
        case_done(&c);
    }
}

/* The best of several runs: what else runs here only adds. */
static void speed(const char *name, const struct case_shape *s, uint32_t layers, bool uneven, double wanted_ms)
{
    struct placement_case c;
    struct plan_options options;
    plan_options_default(&options);
    options.uneven = uneven;
    case_init(&c, s, layers, CASE_LOGNORMAL, false, 7);
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        double start = cpu_ms();
        struct plan *plan = NULL;
        struct err err = {0};
        if (plan_make(&c.in, &options, &plan, &err) < 0)
            exit(1);
        best = fmin(best, cpu_ms() - start);
        plan_unref(plan);
    }
    printf("| %s%s | %u x %u, %u slots on %u -> %u ranks | %.1f ms | %g ms |\n", name, uneven ? "" : ", even shares",
           layers, s->experts, s->to * s->slots, s->from, s->to, best, wanted_ms);
    case_done(&c);
}

static void speed_eplb(void)
{
    struct placement_case c;
    const struct case_shape s = {256, 32, 32, 9, 0, 0, 0, 0};
    uint32_t layers = 58;
    case_init(&c, &s, layers, CASE_LOGNORMAL, false, 7);
    int32_t *phy2log = calloc((size_t)layers * 288, sizeof *phy2log);
    uint32_t *logcnt = calloc((size_t)layers * 256, sizeof *logcnt);
    double best = 1e9;
    struct err err = {0};
    for (int i = 0; i < 9; i++) {
        double start = cpu_ms();
        if (eplb_place(&(struct eplb_input){layers, 256, 288, 1, 1, 32, c.before}, phy2log, logcnt, &err) < 0)
            exit(1);
        best = fmin(best, cpu_ms() - start);
    }
    printf("| eplb | 58 x 256, 288 slots on 32 ranks | %.2f ms | 2 ms |\n", best);
    free(phy2log);
    free(logcnt);
    case_done(&c);
}

/* Ours for several targets, the others' one point each. */
static void points(void)
{
    static const struct case_shape shapes[] = {{256, 4, 8, 64, 0, 0, 0, 0},  {256, 16, 24, 18, 0, 0, 0, 0},
                                               {256, 32, 32, 9, 0, 0, 0, 0}, {256, 8, 8, 36, 0, 0, 0, 0},
                                               {128, 16, 15, 9, 0, 0, 0, 0}, {384, 64, 96, 7, 0, 0, 0, 0}};
    static const double lambdas[] = {0.5,   0.1,   0.05,  0.03,  0.02,  0.015, 0.01,
                                     0.007, 0.005, 0.003, 0.002, 0.001, 0.0005};
    uint32_t layers = 16;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        const struct case_shape *s = &shapes[i];
        struct placement_case c;
        case_init(&c, s, layers, CASE_LOGNORMAL, false, 31 + i);
        for (size_t k = 0; k < 2 * sizeof lambdas / sizeof lambdas[0]; k++) {
            struct plan_options options;
            plan_options_default(&options);
            options.fill = false;
            options.target_balance = 0.995;
            options.lambda = lambdas[k / 2];
            options.uneven = k % 2;
            struct plan *plan = plan_of(&c, &options);
            printf("%u-%u-%u-%u %s %.2f %.4f\n", s->experts, s->from, s->to, s->slots,
                   options.uneven ? "uneven" : "even", (double)(plan->arrivals_before + plan->arrivals_after) / layers,
                   plan->balance_after);
            plan_unref(plan);
        }
        struct scratch scratch = from_scratch(&c, s, layers);
        printf("%u-%u-%u-%u eplb %.2f %.4f\n", s->experts, s->from, s->to, s->slots, scratch.sent, scratch.balance);
        printf("%u-%u-%u-%u vllm %.2f %.4f\n", s->experts, s->from, s->to, s->slots, scratch.arrivals, scratch.balance);
        case_done(&c);
    }
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--points") == 0) {
        points();
        return 0;
    }
    printf("One core, processor time.\n\n| planner | size | time | wanted |\n|---|---|---|---|\n");
    speed_eplb();
    for (int uneven = 1; uneven >= 0; uneven--) {
        speed("elastic, rebalance", &(struct case_shape){256, 32, 32, 9, 0, 0, 0, 0}, 58, uneven, 35);
        speed("elastic, half the layers", &(struct case_shape){256, 32, 32, 9, 0, 0, 0, 0}, 29, uneven, 17.5);
        speed("elastic, scale-up", &(struct case_shape){256, 24, 32, 12, 0, 0, 0, 0}, 58, uneven, 0);
        speed("elastic, rebalance", &(struct case_shape){512, 256, 256, 4, 0, 0, 0, 0}, 94, uneven, 250);
    }
    printf("\n");
    table(58);
    return 0;
}
