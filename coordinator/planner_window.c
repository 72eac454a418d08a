/* Planning over a window of samples.  Pure.
 *
 * With correlated load (experts that are hot together) the joint search holds out better on samples that it has not
 * seen; with independent noise it learns the noise.  So both are tried on every second sample, compared on the others,
 * and the winner plans for all. */
#include <stdlib.h>
#include <string.h>

#include "coordinator/load.h"
#include "coordinator/planner.h"

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

/* Mean over samples first, first + stride, ... of the balance of the map; 0: no memory. */
static double samples_balance(const struct plan_input *in, const struct expert_map *over, bool after, uint32_t first,
                              uint32_t stride)
{
    struct expert_map *map = final_ranks(in, over, after);
    size_t cells = (size_t)in->now->layers * in->now->logical;
    double sum = 0;
    uint32_t n = 0;
    for (uint32_t k = first; map && k < in->n_samples; k += stride, n++)
        sum += load_balance(map, in->samples + k * cells);
    expert_map_unref(map);
    return n ? sum / n : 0;
}

/* Every second sample, and their mean. */
static bool half_make(const struct plan_input *in, struct plan_input *ret_half, double **ret_samples, double **ret_mean)
{
    size_t cells = (size_t)in->now->layers * in->now->logical;
    uint32_t n = (in->n_samples + 1) / 2;
    double *samples = malloc(n * cells * sizeof *samples), *mean = calloc(cells, sizeof *mean);
    if (!samples || !mean) {
        free(samples);
        free(mean);
        return false;
    }
    for (uint32_t k = 0; k < n; k++) {
        memcpy(samples + k * cells, in->samples + 2 * k * cells, cells * sizeof *samples);
        for (size_t i = 0; i < cells; i++)
            mean[i] += samples[k * cells + i] / n;
    }
    *ret_half = *in;
    ret_half->load = mean;
    ret_half->samples = samples;
    ret_half->n_samples = n;
    *ret_samples = samples;
    *ret_mean = mean;
    return true;
}

static int held_out(const struct plan_input *in, const struct plan_input *half, const struct plan_options *options,
                    bool joint, double *ret_balance, struct err *err)
{
    struct plan_input train = *half;
    struct plan *plan = NULL;
    if (!joint)
        train.n_samples = 0;
    int rc = plan_make(&train, options, &plan, err);
    if (rc == 0)
        *ret_balance = samples_balance(in, plan->target, true, 1, 2);
    plan_unref(plan);
    return rc;
}

static int window_decide(const struct plan_input *in, const struct plan_options *options, bool *ret_joint,
                         struct err *err)
{
    struct plan_input half;
    double *samples, *mean, by_mean = 0, by_all = 0;
    if (!half_make(in, &half, &samples, &mean))
        return err_set(err, ERR_NOMEM, "no memory for %u samples of load", in->n_samples);
    int rc = held_out(in, &half, options, false, &by_mean, err);
    if (rc == 0)
        rc = held_out(in, &half, options, true, &by_all, err);
    free(samples);
    free(mean);
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
    (*ret_plan)->samples_before = samples_balance(in, in->now, false, 0, 1);
    (*ret_plan)->samples_after = samples_balance(in, (*ret_plan)->target, true, 0, 1);
    return 0;
}
