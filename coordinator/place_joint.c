/* The joint search.  See place_joint.h; pure.
 *
 * Candidates: from the rank that weighs most to some of the lightest, for each expert there: relocate, exchange, a
 * further replica in room or in place of a redundant one; and mute.  The change of the objective is computed for the
 * ranks that a candidate touches only. */
#include "coordinator/place_joint.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define STEPS_MAX  400
#define PATIENCE   32 /* steps without a new best */
#define COLD       8
#define SLOTS_MANY 16  /* with more, half as many cold ranks */
#define FREE_COST  0.2 /* what costs nothing is weighed as so much of an arrival */

struct joint {
    struct place *p;
    const struct place_joint *goal;
    double *load;  /* [samples][ranks], in means of the sample */
    double *scale; /* [samples]: to means; 0 = no load */
    double *total; /* [ranks]: its part of the objective */
    uint64_t work;
};

enum joint_kind { JOINT_NONE = 0, JOINT_RELOCATE, JOINT_EXCHANGE, JOINT_ADD, JOINT_REPLACE, JOINT_MUTE };

struct joint_change {
    enum joint_kind kind;
    uint32_t from, to, x, z;
    double value; /* of the objective per cost; below 0 */
};

static double power8(double x)
{
    double x2 = x * x, x4 = x2 * x2;
    return x4 * x4;
}

static double joint_weight(const struct joint *j, uint32_t k, uint32_t e)
{
    return j->goal->weight[(size_t)k * j->p->experts + e] * j->scale[k];
}

static void joint_loads(struct joint *j)
{
    const struct place *p = j->p;
    memset(j->load, 0, (size_t)j->goal->samples * p->ranks * sizeof *j->load);
    memset(j->total, 0, p->ranks * sizeof *j->total);
    for (uint32_t k = 0; k < j->goal->samples; k++) {
        double *load = j->load + (size_t)k * p->ranks;
        for (uint32_t r = 0; r < p->ranks; r++) {
            const uint16_t *item = p->item + (size_t)r * p->slots;
            for (uint32_t i = 0; i < p->items[r]; i++)
                load[r] += joint_weight(j, k, item[i]) / p->count[item[i]];
            j->total[r] += power8(load[r]);
        }
    }
}

static double joint_mean_balance(const struct joint *j)
{
    double sum = 0;
    uint32_t n = 0;
    for (uint32_t k = 0; k < j->goal->samples; k++) {
        double max = 0;
        for (uint32_t r = 0; r < j->p->ranks; r++)
            max = fmax(max, j->load[(size_t)k * j->p->ranks + r]);
        n += j->scale[k] > 0;
        sum += j->scale[k] > 0 && max > 0 ? 1 / max : 0;
    }
    return n ? sum / n : 1;
}

/* ---- changes of the objective ---- */

/* How a candidate changes what rank r carries of x and z: before and after, replicas of each. */
struct joint_delta {
    uint32_t x, z;
    bool two;                  /* z counts */
    uint32_t x_count, z_count; /* replicas afterwards */
};

static double rank_change(struct joint *j, uint32_t r, const struct joint_delta *d, bool x_after, bool z_after)
{
    const struct place *p = j->p;
    bool x_now = place_on(p, r, d->x), z_now = d->two && place_on(p, r, d->z);
    double x_part = (x_after ? 1.0 / d->x_count : 0) - (x_now ? 1.0 / p->count[d->x] : 0);
    double z_part = d->two ? (z_after ? 1.0 / d->z_count : 0) - (z_now ? 1.0 / p->count[d->z] : 0) : 0;
    double change = -j->total[r];
    j->work += j->goal->samples;
    for (uint32_t k = 0; k < j->goal->samples; k++) {
        double load = j->load[(size_t)k * p->ranks + r] + x_part * joint_weight(j, k, d->x);
        if (d->two)
            load += z_part * joint_weight(j, k, d->z);
        change += power8(load);
    }
    return change;
}

/* The ranks that have x or z now, but for two that were counted already. */
static double others_change(struct joint *j, const struct joint_delta *d, uint32_t a, uint32_t b)
{
    const struct place *p = j->p;
    double change = 0;
    for (uint32_t word = 0; word < p->words; word++) {
        uint64_t bits = p->on[(size_t)d->x * p->words + word];
        if (d->two)
            bits |= p->on[(size_t)d->z * p->words + word];
        for (; bits; bits &= bits - 1) {
            uint32_t r = word * 64 + (uint32_t)__builtin_ctzll(bits);
            if (r != a && r != b)
                change += rank_change(j, r, d, place_on(p, r, d->x), d->two && place_on(p, r, d->z));
        }
    }
    return change;
}

static bool kept_unique(const struct place *p, uint32_t rank, uint32_t e)
{
    return p->count[e] == 1 && place_tier(p, rank, e) == TIER_HELD;
}

static void joint_offer(const struct joint *j, struct joint_change *best, struct joint_change c, double change,
                        double cost)
{
    if (change >= -1e-9 || cost >= PLACE_NEVER / 2 || (j->goal->held_only && cost > 0))
        return;
    c.value = change / (cost > FREE_COST ? cost : FREE_COST);
    if (c.value < best->value)
        *best = c;
}

/* What one rank pays for taking `comes` in place of `goes`.  Where nothing may arrive an arrival that has taken the
 * last room gives that back, to the same rank only. */
static double swap_cost(const struct place *p, uint32_t rank, uint32_t comes, uint32_t goes)
{
    return place_cost(p, rank, comes) - place_cost(p, rank, goes);
}

/* The refund of an arrival that goes elsewhere. */
static double leave_refund(const struct place *p, uint32_t rank, uint32_t goes)
{
    double refund = place_cost(p, rank, goes);
    return refund >= PLACE_NEVER / 2 ? refund - p->crowd : refund;
}

static void joint_pair(struct joint *j, uint32_t from, uint32_t to, uint32_t x, struct joint_change *best)
{
    const struct place *p = j->p;
    if (place_on(p, to, x))
        return;
    double cost = place_cost(p, to, x);
    bool stays = p->rigid && kept_unique(p, from, x);
    if (!place_full(p, to)) {
        struct joint_delta d = {.x = x, .x_count = p->count[x]};
        if (!stays)
            joint_offer(j, best, (struct joint_change){JOINT_RELOCATE, from, to, x, 0, 0},
                        rank_change(j, from, &d, false, false) + rank_change(j, to, &d, true, false),
                        cost - leave_refund(p, from, x));
        d.x_count++;
        joint_offer(j, best, (struct joint_change){JOINT_ADD, from, to, x, 0, 0},
                    rank_change(j, to, &d, true, false) + others_change(j, &d, to, to), cost);
    }
    const uint16_t *item = p->item + (size_t)to * p->slots;
    for (uint32_t i = 0; i < p->items[to]; i++) {
        uint32_t z = item[i];
        double here = swap_cost(p, to, x, z), there = swap_cost(p, from, z, x);
        struct joint_delta d = {.x = x, .z = z, .two = true, .x_count = p->count[x], .z_count = p->count[z]};
        if (here < PLACE_NEVER / 2 && there < PLACE_NEVER / 2 && !place_on(p, from, z) &&
            !(kept_unique(p, from, x) && kept_unique(p, to, z)) &&
            !(p->rigid && (kept_unique(p, from, x) || kept_unique(p, to, z))))
            joint_offer(j, best, (struct joint_change){JOINT_EXCHANGE, from, to, x, z, 0},
                        rank_change(j, from, &d, false, true) + rank_change(j, to, &d, true, false), here + there);
        if (p->count[z] < 2)
            continue;
        d.x_count++;
        d.z_count--;
        joint_offer(j, best, (struct joint_change){JOINT_REPLACE, from, to, x, z, 0},
                    rank_change(j, to, &d, true, false) + others_change(j, &d, to, to), here);
    }
}

/* ---- the search ---- */

static uint32_t joint_hottest(const struct joint *j)
{
    uint32_t hot = 0;
    for (uint32_t r = 1; r < j->p->ranks; r++)
        if (j->total[r] > j->total[hot])
            hot = r;
    return hot;
}

static uint32_t joint_coldest(const struct joint *j, uint32_t hot, uint32_t *ret_cold)
{
    uint32_t n = 0, cold = j->p->slots > SLOTS_MANY ? COLD / 2 : COLD;
    for (uint32_t r = 0; r < j->p->ranks; r++) {
        uint32_t at = n;
        if (r == hot)
            continue;
        while (at > 0 && j->total[r] < j->total[ret_cold[at - 1]])
            at--;
        if (at >= cold)
            continue;
        n += n < cold;
        memmove(ret_cold + at + 1, ret_cold + at, (n - at - 1) * sizeof *ret_cold);
        ret_cold[at] = r;
    }
    return n;
}

static void joint_apply(struct place *p, const struct joint_change *c)
{
    switch (c->kind) {
    case JOINT_NONE:
        return;
    case JOINT_MUTE:
        place_remove(p, c->from, c->x);
        return;
    case JOINT_ADD:
        place_add(p, c->to, c->x);
        return;
    case JOINT_RELOCATE:
        place_remove(p, c->from, c->x);
        place_add(p, c->to, c->x);
        return;
    case JOINT_REPLACE:
        place_remove(p, c->to, c->z);
        place_add(p, c->to, c->x);
        return;
    case JOINT_EXCHANGE:
        place_remove(p, c->to, c->z);
        place_remove(p, c->from, c->x);
        place_add(p, c->to, c->x);
        place_add(p, c->from, c->z);
        return;
    }
}

static bool joint_step(struct joint *j)
{
    struct place *p = j->p;
    uint32_t hot = joint_hottest(j), cold[COLD + 1], n = joint_coldest(j, hot, cold);
    struct joint_change best = {.value = 0};
    const uint16_t *item = p->item + (size_t)hot * p->slots;
    for (uint32_t i = 0; i < p->items[hot]; i++) {
        uint32_t x = item[i];
        if (p->count[x] > 1) {
            struct joint_delta d = {.x = x, .x_count = p->count[x] - 1u};
            joint_offer(j, &best, (struct joint_change){JOINT_MUTE, hot, 0, x, 0, 0},
                        rank_change(j, hot, &d, false, false) + others_change(j, &d, hot, hot), 0);
        }
        for (uint32_t c = 0; c < n; c++)
            joint_pair(j, hot, cold[c], x, &best);
    }
    joint_apply(p, &best);
    return best.kind != JOINT_NONE;
}

static bool joint_init(struct joint *j, struct place *p, const struct place_joint *goal)
{
    *j = (struct joint){.p = p, .goal = goal};
    j->load = calloc((size_t)goal->samples * p->ranks, sizeof *j->load);
    j->scale = calloc(goal->samples, sizeof *j->scale);
    j->total = calloc(p->ranks, sizeof *j->total);
    for (uint32_t k = 0; j->scale && k < goal->samples; k++) {
        double sum = 0;
        for (uint32_t e = 0; e < p->experts; e++)
            sum += goal->weight[(size_t)k * p->experts + e];
        j->scale[k] = sum > 0 ? p->ranks / sum : 0;
    }
    return j->load && j->scale && j->total;
}

static void joint_done(struct joint *j)
{
    free(j->load);
    free(j->scale);
    free(j->total);
}

double place_joint_balance(const struct place *p, const struct place_joint *goal)
{
    struct joint j;
    double balance = 0;
    if (joint_init(&j, (struct place *)(uintptr_t)p, goal)) {
        joint_loads(&j);
        balance = joint_mean_balance(&j);
    }
    joint_done(&j);
    return balance;
}

void place_joint(struct place *p, const struct place_joint *goal)
{
    struct joint j;
    if (!joint_init(&j, p, goal)) {
        p->broken = true;
        joint_done(&j);
        return;
    }
    joint_loads(&j);
    uint32_t arrivals = p->arrivals;
    double best = joint_mean_balance(&j);
    size_t mark = p->n_log;
    for (uint32_t step = 0, idle = 0; step < STEPS_MAX && idle < PATIENCE && !p->broken; step++, idle++) {
        double balance = joint_mean_balance(&j);
        if (balance >= goal->balance || (goal->work && j.work > goal->work) || !joint_step(&j))
            break;
        joint_loads(&j);
        balance = fmin(joint_mean_balance(&j), goal->balance);
        double score = balance - goal->lambda * ((double)p->arrivals - arrivals);
        if (score <= best + 1e-9 || place_max(p) > goal->peak_max)
            continue;
        best = score;
        mark = p->n_log;
        idle = 0;
    }
    if (!p->broken)
        place_rewind(p, mark);
    joint_done(&j);
}
