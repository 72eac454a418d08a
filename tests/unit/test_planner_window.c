/* Plans over a window of samples: jointly where that holds out better on samples that the planner has not seen, by the
 * mean where there is only noise. */
#include <check.h>

#include "coordinator/load.h"
#include "tests/harness/suite.h"
#include "tests/placement/cases.h"

#define LAYERS  6u
#define SAMPLES 16u
#define UNSEEN  16u
#define TOPICS  6u

struct window {
    struct placement_case c;
    double *samples; /* [SAMPLES + UNSEEN][LAYERS][experts]; c.in sees the first SAMPLES */
    uint32_t experts;
};

/* Each topic has hot experts of its own; a sample mixes them in proportions of its own. */
static void window_fill(struct window *w, bool topics, uint64_t seed)
{
    uint64_t rng = seed;
    size_t cells = (size_t)LAYERS * w->experts;
    double *topic = calloc(TOPICS * cells, sizeof *topic);
    ck_assert(topic != NULL);
    for (size_t i = 0; i < TOPICS * cells; i++)
        topic[i] = exp(1.2 * case_normal(&rng));
    for (uint32_t k = 0; k < SAMPLES + UNSEEN; k++) {
        double part[TOPICS];
        for (uint32_t t = 0; t < TOPICS; t++)
            part[t] = -log(case_uniform(&rng)) * -log(case_uniform(&rng));
        for (size_t i = 0; i < cells; i++) {
            double x = 0;
            for (uint32_t t = 0; t < TOPICS; t++)
                x += topics ? part[t] * topic[t * cells + i] : topic[t * cells + i] / TOPICS;
            w->samples[k * cells + i] = topics ? x : x * exp(0.5 * case_normal(&rng));
        }
    }
    free(topic);
}

static void window_init(struct window *w, const struct case_shape *s, bool topics, uint64_t seed)
{
    size_t cells = (size_t)LAYERS * s->experts;
    case_init(&w->c, s, LAYERS, CASE_LOGNORMAL, false, seed);
    w->experts = s->experts;
    w->samples = calloc((SAMPLES + UNSEEN) * cells, sizeof *w->samples);
    ck_assert(w->samples != NULL);
    window_fill(w, topics, seed);
    for (size_t i = 0; i < cells; i++) {
        w->c.load[i] = 0;
        for (uint32_t k = 0; k < SAMPLES; k++)
            w->c.load[i] += w->samples[k * cells + i] / SAMPLES;
    }
    w->c.in.load = w->c.load;
    w->c.in.samples = w->samples;
    w->c.in.n_samples = SAMPLES;
}

static void window_done(struct window *w)
{
    free(w->samples);
    case_done(&w->c);
}

struct result {
    double unseen; /* mean balance of the samples that were not shown */
    double arrivals;
    bool joint;
};

static struct result result_of(struct window *w, bool window)
{
    struct plan *plan = NULL;
    struct err err = {0};
    struct plan_input in = w->c.in;
    if (!window)
        in.n_samples = 0;
    ck_assert_msg(plan_make_window(&in, NULL, &plan, &err) == 0, "%s", err.text);
    ck_assert_msg(plan_validate(&in, plan, &err) == 0, "%s", err.text);
    struct result r = {.joint = plan->joint,
                       .arrivals = (double)(plan->arrivals_before + plan->arrivals_after) / LAYERS};
    for (uint32_t k = SAMPLES; k < SAMPLES + UNSEEN; k++)
        r.unseen += load_balance(plan->target, w->samples + k * (size_t)LAYERS * w->experts) / UNSEEN;
    plan_unref(plan);
    return r;
}

static const struct case_shape shapes[] = {{256, 8, 8, 36, 0, 0, 0, 0}, {256, 32, 32, 9, 0, 0, 0, 0}};

START_TEST(topics_that_mix_are_planned_jointly)
{
    struct window w;
    window_init(&w, &shapes[_i], true, 11 + (uint64_t)_i);
    struct result mean = result_of(&w, false), joint = result_of(&w, true);
    printf("%u ranks, topics: unseen samples %.4f by the mean (%.1f arrivals a layer), %.4f jointly (%.1f)\n",
           shapes[_i].to, mean.unseen, mean.arrivals, joint.unseen, joint.arrivals);
    ck_assert(joint.joint && !mean.joint);
    ck_assert_double_gt(joint.unseen, mean.unseen + 0.01);
    window_done(&w);
}
END_TEST

START_TEST(noise_is_not_learnt)
{
    struct window w;
    window_init(&w, &shapes[_i], false, 21 + (uint64_t)_i);
    struct result mean = result_of(&w, false), window = result_of(&w, true);
    printf("%u ranks, noise: unseen samples %.4f by the mean, %.4f as decided (%s)\n", shapes[_i].to, mean.unseen,
           window.unseen, window.joint ? "jointly" : "by the mean");
    ck_assert_double_ge(window.unseen, mean.unseen - 0.002);
    window_done(&w);
}
END_TEST

START_TEST(few_samples_are_planned_by_their_mean)
{
    struct window w;
    window_init(&w, &shapes[0], true, 31);
    w.c.in.n_samples = 3;
    struct plan *plan = NULL;
    struct err err = {0};
    ck_assert_int_eq(plan_make_window(&w.c.in, NULL, &plan, &err), 0);
    ck_assert(!plan->joint);
    ck_assert_double_gt(plan->samples_after, plan->samples_before);
    ck_assert_double_le(plan->samples_after, 1);
    plan_unref(plan);
    window_done(&w);
}
END_TEST

/* Ranks that serve are written to only in rounds that retire first: before the commit of a scale-up there are none. */
START_TEST(before_the_commit_only_joiners_receive)
{
    struct plan_options options;
    plan_options_default(&options);
    options.joiners_only = true;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        struct window w;
        struct plan *plan = NULL;
        struct err err = {0};
        window_init(&w, &(struct case_shape){12, 3, 4, 5, 0, 0, 0, 0}, true, seed);
        ck_assert_int_eq(plan_make(&w.c.in, &options, &plan, &err), 0);
        for (uint32_t i = 0; i < plan->n_moves; i++)
            ck_assert_msg(plan->moves[i].round >= plan->rounds_before || w.c.joining[plan->moves[i].dst],
                          "seed %llu: party %u serves, and receives", (unsigned long long)seed, plan->moves[i].dst);
        plan_unref(plan);
        window_done(&w);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("planner window");
    TCase *t = tcase_create("window");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, topics_that_mix_are_planned_jointly, 0, 2);
    tcase_add_loop_test(t, noise_is_not_learnt, 0, 2);
    tcase_add_test(t, before_the_commit_only_joiners_receive);
    tcase_add_test(t, few_samples_are_planned_by_their_mean);
    suite_add_tcase(s, t);
    return suite_run(s);
}
