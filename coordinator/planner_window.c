/* Planning over a window of samples.  Pure.
 *
 * With correlated load (experts that are hot together) the joint search holds out better on samples that it has not
 * seen; with independent noise it learns the noise.  So both are tried on every second sample of some layers
 * and compared on the other samples, and the winner plans for all. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/load.h"
#include "coordinator/planner.h"

#define TRIAL_LAYERS  8     /* on so many layers it is decided */
#define SAMPLES_MIN   4     /* below that nothing can be left aside */
#define HELD_OUT_GAIN 0.002 /* of balance, by which the joint search must be better */

/* The map of the ranks after the commit.  NULL: no memory. */
static struct expert_map *final_ranks(const struct plan_input *in, const struct expert_map *over, bool after)
{
    int32_t from[RANKS_MAX];
    uint32_t n = 0;
    for (uint32_t party = 0; party < over->ranks && n < RANKS_MAX; party++) {
        bool absent = after ? in->leaving && in->leaving[party] : in->joining && in->joining[party];
        if (!absent)
            from[n++] = (int32_t)party;
    }
    return expert_map_select(over, from, n);
}

/* Mean over the samples of the balance of the map; 0: no memory. */
static double samples_balance(const struct plan_input *in, const struct expert_map *over, bool after)
{
    struct expert_map *map = final_ranks(in, over, after);
    size_t cells = (size_t)in->now->layers * in->now->logical;
    double sum = 0;
    for (uint32_t k = 0; map && k < in->n_samples; k++)
        sum += load_balance(map, in->samples + k * cells);
    expert_map_unref(map);
    return sum / in->n_samples;
}

/* What the decision is tried on: some of the layers, and of those all samples, the even ones (to plan for) first. */
struct trial {
    struct plan_input in; /* the even samples */
    uint32_t n_odd;
    struct expert_map *now;
    double *samples, *mean; /* [even, then odd][layers][logical]; of the even ones */
};

static void trial_done(struct trial *t)
{
    expert_map_unref(t->now);
    free(t->samples);
    free(t->mean);
}

static void trial_layer(struct trial *t, const struct plan_input *in, uint32_t to, uint32_t from)
{
    const struct expert_map *now = in->now;
    uint32_t n_even = t->in.n_samples, e = now->logical;
    size_t slots = (size_t)now->ranks * now->slots;
    memcpy(t->now->held + to * slots, now->held + from * slots, slots * sizeof *now->held);
    memcpy(t->now->live + to * slots, now->live + from * slots, slots);
    for (uint32_t k = 0; k < in->n_samples; k++) {
        uint32_t at = k % 2 ? n_even + k / 2 : k / 2;
        double *sample = t->samples + ((size_t)at * t->now->layers + to) * e;
        memcpy(sample, in->samples + ((size_t)k * now->layers + from) * e, e * sizeof *sample);
        for (uint32_t i = 0; k % 2 == 0 && i < e; i++)
            t->mean[(size_t)to * e + i] += sample[i] / n_even;
    }
}

static bool trial_init(struct trial *t, const struct plan_input *in)
{
    const struct expert_map *now = in->now;
    uint32_t stride = (now->layers + TRIAL_LAYERS - 1) / TRIAL_LAYERS, layers = (now->layers + stride - 1) / stride;
    size_t cells = (size_t)layers * now->logical;
    *t = (struct trial){.in = *in,
                        .n_odd = in->n_samples / 2,
                        .now = expert_map_new(layers, now->logical, now->ranks, now->slots),
                        .samples = malloc(in->n_samples * cells * sizeof *t->samples),
                        .mean = calloc(cells, sizeof *t->mean)};
    if (!t->now || !t->samples || !t->mean)
        return false;
    t->in.now = t->now;
    t->in.load = t->mean;
    t->in.samples = t->samples;
    t->in.n_samples = in->n_samples - t->n_odd;
    for (uint32_t layer = 0; layer < layers; layer++)
        trial_layer(t, in, layer, layer * stride);
    return true;
}

static int held_out(const struct trial *t, const struct plan_options *options, bool joint, double *ret_balance,
                    struct err *err)
{
    struct plan_input train = t->in, odd = t->in;
    struct plan *plan = NULL;
    odd.samples += (size_t)t->in.n_samples * t->now->layers * t->now->logical;
    odd.n_samples = t->n_odd;
    if (!joint)
        train.n_samples = 0;
    int rc = plan_make(&train, options, &plan, err);
    if (rc == 0)
        *ret_balance = samples_balance(&odd, plan->target, true);
    plan_unref(plan);
    return rc;
}

static int window_decide(const struct plan_input *in, const struct plan_options *options, bool *ret_joint,
                         struct err *err)
{
    struct trial t;
    double by_mean = 0, by_all = 0;
    int rc = trial_init(&t, in) ? 0 : err_set(err, ERR_NOMEM, "no memory for %u samples of load", in->n_samples);
    if (rc == 0)
        rc = held_out(&t, options, false, &by_mean, err);
    if (rc == 0)
        rc = held_out(&t, options, true, &by_all, err);
    trial_done(&t);
    *ret_joint = rc == 0 && by_all > by_mean + HELD_OUT_GAIN;
    return rc;
}

int plan_make_window(const struct plan_input *in, const struct plan_options *options, struct plan **ret_plan,
                     struct err *err)
{
    struct plan_input chosen = *in;
    bool joint = false;
    int rc = in->n_samples >= SAMPLES_MIN ? window_decide(in, options, &joint, err) : 0;
    if (!joint)
        chosen.n_samples = 0;
    if (rc == 0)
        rc = plan_make(&chosen, options, ret_plan, err);
    if (rc < 0 || in->n_samples < 2)
        return rc;
    (*ret_plan)->joint = joint;
    (*ret_plan)->samples_before = samples_balance(in, in->now, false);
    (*ret_plan)->samples_after = samples_balance(in, (*ret_plan)->target, true);
    return 0;
}
