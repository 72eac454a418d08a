/* Load and balance: what the agents report, and the decision to rebalance without being asked.  Part of the
 * coordinator's core; pure.
 *
 * The policy is off unless rebalance_below is set.  It looks once a window while no operation runs:
 *
 *   balance of the mean load < rebalance_below, for rebalance_after_ms, rebalance_every_ms after the last one began
 *       -> a plan; worth it -> an operation like any other
 *
 * Worth it: the time that steps get shorter by, over rebalance_horizon_ms, against what the move costs while it lasts:
 * the dip and BALANCE_MOVE_COST of every step. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define MS                1000000ULL
#define BALANCE_GAIN_MIN  0.01 /* of a step: below this nothing is moved */
#define BALANCE_MOVE_COST 0.05 /* of a step, assumed: what copies take from it */
#define BALANCE_BANDWIDTH 1e9  /* bytes per second into a rank, assumed when no limit is set */

void balance_init(struct coordinator *c)
{
    load_init(&c->load, c->config.load_horizon_ms * MS, c->config.load_samples);
}

void balance_window(struct coordinator *c, uint32_t peer, const struct msg_load *window)
{
    int rank = members_rank(c, peer);
    if (rank < 0 || window->epoch != c->view->epoch || window->map_version != c->view->map->version)
        return; /* counted under another map: the slots meant something else */
    load_add(&c->load, c->view->map, (uint32_t)rank, window, c->now_ns);
}

double *balance_load(const struct coordinator *c)
{
    const struct expert_map *map = c->view ? c->view->map : NULL;
    if (!map || c->load.layers != map->layers || c->load.logical != map->logical)
        return NULL;
    return load_sum(&c->load);
}

/* ---- the policy ---- */

bool balance_worth(const struct coordinator_config *config, const struct plan *plan, uint64_t expert_bytes,
                   char *ret_why, size_t size)
{
    uint64_t into[RANKS_MAX] = {0}, most = 0;
    for (uint32_t i = 0; i < plan->n_moves; i++) {
        const struct move *m = &plan->moves[i];
        if (m->src != m->dst && ++into[m->dst] > most)
            most = into[m->dst];
    }
    double rate = config->rebalance_mib_s ? config->rebalance_mib_s * 1048576.0 : BALANCE_BANDWIDTH;
    double gain = plan->balance_after > 0 ? 1 - plan->balance_before / plan->balance_after : 0;
    double saves = gain * config->rebalance_horizon_ms / 1e3, move_s = (double)(most * expert_bytes) / rate;
    double costs = move_s * (config->dip + BALANCE_MOVE_COST);
    snprintf(ret_why, size,
             "balance %.3f would be %.3f: steps shorter by %.1f%%, %.3g s of steps within the horizon, for %.3g s of "
             "moving that cost %.3g s",
             plan->balance_before, plan->balance_after, 100 * gain, saves, move_s, costs);
    return gain >= BALANCE_GAIN_MIN && saves > costs;
}

static bool balance_quiet(const struct coordinator *c)
{
    return c->view && c->op.phase == PHASE_NONE && !c->torn && !c->durable.paused && c->commit.state == COMMIT_IDLE &&
           arrivals_complete(&c->map_acks);
}

static const struct scale_request rebalance = {.rebalance = true, .automatic = true};

static void balance_try(struct coordinator *c, double balance)
{
    struct err err = {0};
    int rc = setup_scale(c, &rebalance, &err);
    if (rc == 0)
        rc = plan_ask(c, PLAN_POLICY, 0, balance, &err);
    operation_drop(c);
    if (rc < 0)
        core_log(c, CORE_WARN, "balance is %.3f, but there is no rebalance now: %s", balance, err.text);
    else
        c->balance.planning = true;
}

void balance_planned(struct coordinator *c, struct plan_job *job)
{
    char why[256];
    c->balance.planning = false;
    if (!balance_quiet(c) || c->view->epoch != job->epoch || c->view->map->version != job->map_version)
        return; /* something else has happened meanwhile */
    if (job->code < 0) {
        core_log(c, CORE_WARN, "balance is %.3f, but there is no rebalance now: %s", job->balance, job->err.text);
        return;
    }
    bool worth = balance_worth(&c->config, job->plan, job->expert_bytes, why, sizeof(why));
    core_log(c, CORE_INFO, "%s: %s", worth ? "a rebalance begins" : "a rebalance is not worth it", why);
    if (!worth)
        return;
    c->balance.began_ns = c->now_ns;
    operation_scale(c, 0, &rebalance, NULL);
}

void balance_tick(struct coordinator *c)
{
    if (!(c->config.rebalance_below > 0) || c->balance.planning || c->now_ns < c->balance.next_ns)
        return;
    c->balance.next_ns = c->now_ns + c->config.load_window_ms * MS;
    double *load = balance_quiet(c) ? balance_load(c) : NULL;
    double balance = load ? load_balance(c->view->map, load) : 1;
    free(load);
    if (balance >= c->config.rebalance_below) {
        c->balance.below_ns = 0;
        return;
    }
    if (!c->balance.below_ns)
        c->balance.below_ns = c->now_ns;
    if (c->now_ns - c->balance.below_ns < c->config.rebalance_after_ms * MS ||
        (c->balance.began_ns && c->now_ns - c->balance.began_ns < c->config.rebalance_every_ms * MS))
        return;
    c->balance.below_ns = 0; /* whatever comes of it: not again before it has been low for so long */
    balance_try(c, balance);
}

uint64_t balance_deadline(const struct coordinator *c)
{
    return c->config.rebalance_below > 0 && c->view && !c->balance.planning ? c->balance.next_ns : UINT64_MAX;
}

const struct load_history *coordinator_load(const struct coordinator *c)
{
    return &c->load;
}
