/* The load of the experts as the agents report it: skewed, and another one every now and then, so that the coordinator
 * has something to rebalance by.  Its own numbers, not those of the generator.  Single thread. */
#include "tests/sim/sim.h"

#include <stdlib.h>

#define DRIFT 40 /* reports after which other experts are hot */

void load_start(struct sim *s)
{
    if (!sim_chance(s, 500))
        return;
    s->load_every = sim_between(s, 20 * MS, 200 * MS);
    s->config.load_horizon_ms = 2000;
    s->config.load_samples = (uint32_t)sim_between(s, 1, 8);
    s->config.load_window_ms = (uint32_t)(s->load_every / MS);
    if (sim_chance(s, 500)) {
        s->config.rebalance_below = 0.97;
        s->config.rebalance_after_ms = (uint32_t)sim_between(s, 0, 300);
        s->config.rebalance_every_ms = (uint32_t)sim_between(s, 100, 1000);
    }
    sim_push(s, s->load_every, SE_LOAD, 0, 0);
}

static uint64_t weight(const struct sim *s, uint32_t layer, int32_t expert)
{
    uint64_t x = (s->seed * 1000003 + s->loads / DRIFT) * 1000003 + layer * 512 + (uint64_t)expert;

    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x ^= x >> 31;
    return 1 + (x % 8 == 0 ? x % 997 : x % 61);
}

static void report_agent(struct sim *s, struct sim_agent *a, const struct view *view, uint32_t rank)
{
    struct msg msg = {.type = MSG_LOAD};
    struct agent_status status;

    agent_core_status(a->core, &status);
    if (!status.welcomed || !status.view)
        return;
    msg.load.epoch = status.view->epoch;
    msg.load.map_version = status.map_version;
    msg.load.layers = s->layers;
    msg.load.slots = s->slots;
    msg.load.window_ms = s->config.load_window_ms;
    msg.load.tokens = calloc((size_t)s->layers * s->slots, sizeof *msg.load.tokens);
    if (!msg.load.tokens)
        abort();
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t slot = 0; slot < s->slots; slot++) {
            size_t at = expert_map_at(view->map, l, rank, slot);
            if (view->map->live[at])
                msg.load.tokens[(size_t)l * s->slots + slot] = weight(s, l, view->map->held[at]);
        }
    network_to_coordinator(s, a, &msg);
    msg_done(&msg);
}

void load_report(struct sim *s)
{
    const struct view *view = s->coordinator.disk.view;

    if (s->calm)
        return;
    sim_push(s, s->load_every, SE_LOAD, 0, 0);
    s->loads++;
    for (uint32_t r = 0; view && r < view->n; r++) {
        struct sim_agent *a = agent_of(s, &view->members[r]);
        if (a && a->up && a->conn && a->paused_until <= s->now)
            report_agent(s, a, view, r);
    }
}
