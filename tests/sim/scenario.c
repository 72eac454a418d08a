/* What a seed means: sizes, delays, the operator's commands, requests, faults, and at the end the quiet in which
 * everything must come to rest and one more operation must succeed.  Single thread. */
#include "coordinator/reload.h"
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QUIET_BOUND (240 * 1000 * MS) /* virtual time within which everything rests after the last fault */

static void size_world(struct sim *s)
{
    uint64_t share = sim_between(s, 0, 999);
    uint32_t low = 2, high = 4, min;

    if (share >= 995) {
        low = 32;
        high = 64;
    } else if (share >= 970) {
        low = 9;
        high = 24;
    } else if (share >= 700) {
        low = 4;
        high = 8;
    }
    if (low < s->options->agents_min || high > s->options->agents_max) {
        low = s->options->agents_min;
        high = s->options->agents_max;
    }
    s->n = (uint32_t)sim_between(s, low, high);
    min = s->n / 4 > 2 ? s->n / 4 : s->n < 2 ? s->n : 2;
    s->layers = (uint32_t)sim_between(s, 1, s->n > 8 ? 2 : 3);
    s->logical = (uint32_t)sim_between(s, 4, s->n > 8 || sim_chance(s, 300) ? 32 : 12);
    s->slots = (s->logical + min - 1) / min + (uint32_t)sim_between(s, 0, 2);
    if (sim_chance(s, 500)) /* room for a second copy of everything */
        s->slots += (s->logical + min - 1) / min;
    s->first_ranks = (uint32_t)sim_between(s, min, s->n);
    coordinator_config_default(&s->config);
    s->config.min_ranks = min;
    s->config.slots = s->slots;
}

static void time_world(struct sim *s)
{
    static const uint32_t leads[] = {4, 10, 30, 250};
    bool fast = s->n <= 4 && sim_chance(s, 600);

    s->delay_min = 20 * US;
    s->delay_max = fast ? 300 * US : sim_between(s, 300 * US, 5 * MS);
    s->disk_max = sim_chance(s, 300) ? 30 * MS : 10 * MS;
    s->step_ns = sim_between(s, 200 * US, fast ? 2 * MS : 20 * MS);
    s->transfer_max = sim_between(s, 500 * US, 10 * MS);
    s->run_ahead = sim_chance(s, 500);
    s->dispatch = sim_chance(s, 250) ? DISPATCH_REPLICATED : DISPATCH_SOURCE_ROUTED;
    s->quick_attach = sim_chance(s, 500) ? 5 * MS : 300 * MS;
    s->p_interleave = sim_chance(s, 700) ? 200 : 20;
    s->ahead = sim_chance(s, 400) ? (uint32_t)sim_between(s, 1, 4) : 0;
    s->wire = sim_chance(s, 200);
    s->drift = sim_chance(s, 300);
    s->config.lead_ms = leads[sim_between(s, 0, 3)];
    s->config.lease_ms = sim_chance(s, 500) ? 300 : 3000;
    s->config.heartbeat_ms = s->config.lease_ms / 6;
    s->config.flipped_ms = sim_chance(s, 500) ? 1000 : 10000;
    s->config.indoubt_ms = sim_chance(s, 500) ? 1000 : 30000;
    s->config.stage_ms = 5000;
    s->config.transfer_ms = 6000;
    s->config.drain_ms = 500;
    s->config.reload_after_ms = sim_chance(s, 100) ? 0 : (uint32_t)sim_between(s, 1, 2000);
    s->config.on_lost_experts = sim_chance(s, 300) ? LOST_MASK : LOST_HOLD;
}

void scenario_start(struct sim *s)
{
    size_world(s);
    time_world(s);
    s->faulty = s->options->faults && sim_chance(s, 700);
    s->config.scale_back = s->faulty && sim_chance(s, 300);
    if (s->faulty) {
        s->p_duplicate = sim_chance(s, 300) ? 200 : 0;
        s->p_target = sim_chance(s, 600) ? 60 : 0;
        s->p_zombie = 500;
        s->careless = sim_chance(s, 150);
        s->pair[0] = (uint32_t)sim_between(s, 0, s->n - 1);
        s->pair[1] = (s->pair[0] + 1) % s->n;
        s->p_pair = sim_chance(s, 900) ? 0 : sim_chance(s, 500) ? 1000 : 50;
    }
    s->restarts = s->faulty && sim_chance(s, 250);
    if (s->restarts && sim_chance(s, 500))
        s->config.restart_after_ms = 2000;
    s->careless |= s->restarts && sim_chance(s, 500);
    if (s->faulty && sim_chance(s, 300)) {
        s->p_mute = 300;
        s->prepare_blocks = sim_chance(s, 200);
        s->config.on_prepare_timeout = sim_chance(s, 700) ? ENGINE_CONTINUE : ENGINE_ABORT;
        s->config.on_drain_timeout = sim_chance(s, 500) ? ENGINE_CONTINUE : ENGINE_ABORT;
    }
    s->ops_left = (uint32_t)sim_between(s, 2, s->n > 8 ? 3 : 7);
    load_start(s);
    s->agents = calloc(s->n, sizeof *s->agents);
    s->covered = calloc((size_t)s->layers * s->logical, 1);
    if (!s->agents || !s->covered) {
        s->n = 0;
        sim_fail(s, "out of memory");
        return;
    }
    sim_note(s, "seed %" PRIu64 ": %u agents, %u layers, %u experts, %u slots, first %u ranks, step %" PRIu64
             " us, lead %u ms, lease %u ms, %s%s, ahead %u, %s%s", s->seed, s->n, s->layers, s->logical, s->slots,
             s->first_ranks, s->step_ns / US, s->config.lead_ms, s->config.lease_ms,
             s->dispatch == DISPATCH_REPLICATED ? "replicated" : "source-routed", s->run_ahead ? ", runs ahead" : "",
             s->ahead, s->p_pair ? "a broken pair, " : "", s->faulty ? "faults" : "no faults");
    process_start(s);
    for (uint32_t i = 0; i < s->n; i++) {
        s->agents[i].index = i;
        agent_start(s, &s->agents[i]);
    }
    sim_push(s, 60 * MS, SE_OPERATOR, 0, 0);
    sim_push(s, 100 * MS, SE_REQUEST, 0, 0);
    if (s->faulty)
        sim_push(s, sim_between(s, 50 * MS, 1000 * MS), SE_FAULT, 0, 0);
}

/* ---- the operator ---- */

static void ask(struct sim *s, uint32_t target, const char *key, uint32_t n_remove, const char *const *remove)
{
    struct scale_request scale = {.target = target, .n_remove = n_remove, .remove = remove};
    struct coordinator_event event = {.type = CE_SCALE, .request = ++s->request, .scale = &scale};

    event.wall_ms = s->now / MS;
    snprintf(scale.key, sizeof scale.key, "%s", key);
    if (sim_chance(s, 200))
        scale.wait_agents_ms = 500;
    if (s->p_mute && sim_chance(s, 300))
        scale.on_engine_timeout = sim_chance(s, 600) ? ENGINE_CONTINUE : ENGINE_ABORT;
    sim_note(s, "OPERATOR scale to %u%s%s%s%s, request %" PRIu64, target, *key ? " key " : "", key,
             n_remove ? " without " : "", n_remove ? remove[0] : "", s->request);
    s->last_target = target;
    if (*key && s->n_asked < 32) {
        int k = -1;
        for (uint32_t i = 0; i < s->n_keys; i++)
            if (strcmp(s->keys[i].key, key) == 0)
                k = (int)i;
        if (k < 0 && s->n_keys < SIM_KEYS) {
            k = (int)s->n_keys++;
            snprintf(s->keys[k].key, sizeof s->keys[k].key, "%s", key);
        }
        s->asked[s->n_asked].request = s->request;
        s->asked[s->n_asked++].key = k;
    }
    for (uint32_t i = 0; *key && i < s->n_history; i++)
        if (strcmp(s->history[i].key, key) == 0)
            event.known = &s->history[i];
    process_event(s, &event);
}

void scenario_reply(struct sim *s, const struct coordinator_action *reply)
{
    for (uint32_t i = 0; i < s->n_asked; i++) {
        struct sim_key *key;
        if (s->asked[i].request != reply->request || s->asked[i].key < 0 || reply->code != 0 || reply->op == 0)
            continue;
        key = &s->keys[s->asked[i].key];
        if (key->op && key->op != reply->op)
            sim_fail(s, "promise 7: key %s names operations %" PRIu64 " and %" PRIu64, key->key, key->op, reply->op);
        key->op = reply->op;
    }
    s->ops_refused += reply->code != 0;
    if (reply->request == s->restart_request && reply->code == 0 && s->coordinator.disk.view)
        sim_fail(s, "promise 2: the view is said to be given up before that is durable");
    if (reply->request != s->final_request)
        return;
    if (s->final_stage == 1) {
        if (reply->code != 0)
            sim_fail(s, "promise 6: the last operation is refused: %s", reply->text);
        s->final_op = reply->op;
        s->final_stage = 2;
    }
}

void scenario_ended(struct sim *s, const struct op_record *record)
{
    s->rebalances += record->kind == OP_REBALANCE && record->outcome == OUTCOME_DONE;
    s->left_out += record->outcome == OUTCOME_DONE && strstr(record->why, "whose engine did not prepare") != NULL;
    if (s->final_stage != 2 || record->op != s->final_op)
        return;
    if (record->outcome != OUTCOME_DONE)
        sim_fail(s, "promise 6: the last operation ends as %u: %s", record->outcome, record->why);
    s->final_stage = 3;
}

static void ask_rebalance(struct sim *s)
{
    struct scale_request rebalance = {.rebalance = true};
    struct coordinator_event event = {
        .type = CE_SCALE, .request = ++s->request, .scale = &rebalance, .wall_ms = s->now / MS};

    sim_note(s, "OPERATOR rebalance, request %" PRIu64, s->request);
    process_event(s, &event);
}

static void pause_operations(struct sim *s, bool pause)
{
    struct coordinator_event event = {.type = CE_PAUSE, .request = ++s->request, .yes = pause, .wall_ms = s->now / MS};

    sim_note(s, "OPERATOR %s, request %" PRIu64, pause ? "pause" : "resume", s->request);
    process_event(s, &event);
}

static void ask_restart(struct sim *s, bool force)
{
    struct coordinator_event event = {.type = CE_RESTART, .request = ++s->request, .yes = force, .wall_ms = s->now / MS};

    s->restart_request = s->request;
    sim_note(s, "OPERATOR restart%s, request %" PRIu64, force ? " by force" : "", s->request);
    process_event(s, &event);
}

static void operate(struct sim *s)
{
    const struct view *view = s->coordinator.disk.view;
    uint32_t now = view ? view->n : 0, target = now, n_remove = 0;
    char key[OP_KEY_MAX] = "", names[4][AGENT_ID_MAX];
    const char *remove[4];

    if (s->ops_left == 0)
        return;
    sim_push(s, sim_between(s, 20 * MS, s->n > 8 ? 500 * MS : 1500 * MS), SE_OPERATOR, 0, 0);
    if (!s->coordinator.up)
        return;
    if (sim_chance(s, 120)) {
        struct coordinator_event event = {.type = CE_ABORT, .request = ++s->request, .wall_ms = s->now / MS};
        sim_note(s, "OPERATOR abort, request %" PRIu64, s->request);
        process_event(s, &event);
        return;
    }
    if (s->coordinator.disk.paused ? sim_chance(s, 600) : sim_chance(s, 60)) {
        pause_operations(s, !s->coordinator.disk.paused);
        return;
    }
    if (s->restarts && view && sim_chance(s, 100)) {
        ask_restart(s, sim_chance(s, 400));
        return;
    }
    if (*s->last_key && sim_chance(s, 150)) {
        ask(s, s->last_target, s->last_key, 0, NULL);
        return;
    }
    if (view && s->load_every && sim_chance(s, 400)) {
        ask_rebalance(s);
        return;
    }
    if (!view)
        target = s->first_ranks;
    else if (s->n > s->config.min_ranks)
        while (target == now)
            target = (uint32_t)sim_between(s, s->config.min_ranks, s->n);
    else
        return;
    if (view && target < now && sim_chance(s, 600)) {
        n_remove = now - target < 4 ? now - target : 1;
        for (uint32_t i = 0; i < n_remove; i++) { /* neighbours, from any rank on, rank 0 included */
            snprintf(names[i], sizeof names[i], "%s", view->members[(s->request + i) % now].id);
            remove[i] = names[i];
        }
    }
    if (sim_chance(s, 500)) {
        snprintf(key, sizeof key, "key-%u", s->ops_left);
        snprintf(s->last_key, sizeof s->last_key, "%s", key);
    }
    s->ops_left--;
    ask(s, target, key, n_remove, n_remove ? remove : NULL);
}

/* ---- requests ---- */

static void request(struct sim *s)
{
    const struct view *view = s->coordinator.disk.view;

    if (s->calm)
        return;
    sim_push(s, sim_between(s, s->step_ns, 20 * s->step_ns + 20 * MS), SE_REQUEST, 0, 0);
    if (!view)
        return;
    for (uint32_t tries = 0; tries < 3; tries++) {
        struct sim_agent *a = agent_of(s, &view->members[sim_random(s) % view->n]);
        if (!a || !engine_takes_requests(s, a))
            continue;
        engine_request(s, a, sim_between(s, 1, 12));
        s->n_requests++;
        return;
    }
}

/* ---- faults ---- */

static uint64_t outage(struct sim *s)
{
    uint64_t kind = sim_between(s, 0, 9);

    return kind < 5 ? sim_between(s, MS, 20 * MS) : kind < 9 ? sim_between(s, 20 * MS, 800 * MS)
                                                              : sim_between(s, 1000 * MS, 6000 * MS);
}

/* The weights of this agent may go: most seeds are careful with the last copy of an expert, so that the view lives on
 * and is seen to come to rest. */
static bool expendable(struct sim *s, const struct sim_agent *a)
{
    return s->careless || !check_last_copy(s, a, true);
}

static void pause_process(struct sim *s, struct sim_agent *a)
{
    uint64_t lease = s->config.lease_ms * MS;
    uint64_t until = s->now + (sim_chance(s, 500) ? sim_between(s, MS, 100 * MS) : sim_between(s, lease / 2, 3 * lease));

    if (sim_chance(s, 250)) {
        sim_note(s, "COORDINATOR is stopped for %" PRIu64 " ms", (until - s->now) / MS);
        if (s->coordinator.paused_until < until)
            s->coordinator.paused_until = until;
    } else if (a->up && a->paused_until < until) {
        sim_note(s, "a%02u is stopped for %" PRIu64 " ms", a->index, (until - s->now) / MS);
        a->paused_until = until;
        s->losses++;
    }
}

static void fault_of_an_engine(struct sim *s, struct sim_agent *a)
{
    if (a->engine.pc == ENGINE_NONE)
        return;
    if (sim_chance(s, 500)) {
        engine_death(s, a, "as simulated", true);
        return;
    }
    if (sim_chance(s, 200)) {
        a->engine.busy_until = s->now + sim_between(s, 10 * MS, 3 * s->config.flipped_ms * MS);
        sim_note(s, "a%02u engine's stepping thread is busy for %" PRIu64 " ms", a->index,
                 (a->engine.busy_until - s->now) / MS);
        s->losses++;
        return;
    }
    engine_fails(s, a);
    for (uint32_t i = 0; i < s->n; i++) /* the others notice it, or do not */
        if (sim_chance(s, 300))
            engine_fails(s, &s->agents[i]);
}

/* The process dies, at once or before one of its next actions; what it holds is kept, and the next one re-adopts it. */
static void lose(struct sim *s, struct sim_agent *a)
{
    if (!a->up || a->stopping)
        return;
    if (sim_chance(s, 500))
        agent_lose(s, a, outage(s));
    else
        a->die_after = (uint32_t)sim_between(s, 1, 12);
}

static void fault(struct sim *s)
{
    struct sim_agent *a = &s->agents[sim_random(s) % s->n];
    uint64_t kind = sim_between(s, 0, 139);

    s->fault_at = s->now;
    if (kind < 25) {
        if (s->coordinator.up)
            process_crash(s, outage(s));
    } else if (kind < 40) {
        if (a->conn) {
            sim_note(s, "CONNECTION of a%02u breaks", a->index);
            network_break(s, a->conn, sim_chance(s, 300));
        }
    } else if (kind < 48) {
        a->blocked_until = s->now + s->config.lease_ms * MS / 2 + sim_between(s, 0, s->config.lease_ms * MS);
        sim_note(s, "PARTITION of a%02u", a->index);
        s->losses++;
        if (a->conn)
            network_break(s, a->conn, sim_chance(s, 300));
    } else if (kind < 58) {
        if (a->up && expendable(s, a))
            agent_crash(s, a, outage(s));
    } else if (kind < 80) {
        fault_of_an_engine(s, a);
    } else if (kind < 89) {
        pause_process(s, a);
    } else if (kind < 99) {
        a->corrupt = 1;
    } else if (kind < 107) {
        a->fail = 1;
    } else if (kind >= 115) {
        lose(s, a);
    } else if (a->up && !a->stopping && expendable(s, a)) {
        sim_push(s, 0, SE_AGENT_CALL, a->index, a->life)->call = AE_STOP;
        a->stopping = true;
    }
}

void scenario_target(struct sim *s, const struct msg *msg)
{
    struct sim_agent *a;
    uint64_t soon;

    if (s->p_target == 0 || s->calm ||
        (msg->type != MSG_PREPARE && msg->type != MSG_GO && msg->type != MSG_PROMISE && msg->type != MSG_FLIPPED &&
         msg->type != MSG_MAP && msg->type != MSG_STAGE))
        return;
    if (!sim_chance(s, s->p_target / (s->n > 8 ? 8 : 1)) || (msg->type == MSG_STAGE && !sim_chance(s, 300)))
        return;
    soon = sim_between(s, US, sim_chance(s, 500) ? MS : 12 * MS);
    a = &s->agents[sim_random(s) % s->n];
    switch (sim_between(s, 0, 9)) {
    case 0:
    case 1:
    case 2: sim_push(s, soon, SE_COORDINATOR_CRASH, 0, 0)->x = outage(s); return;
    case 3: sim_push(s, soon, SE_AGENT_CRASH, a->index, a->life)->x = outage(s); return;
    case 4: sim_push(s, soon, SE_ENGINE_DEATH, a->index, a->engine.life); return;
    case 5: sim_push(s, soon, SE_ENGINE_FAILS, a->index, a->engine.life); return;
    case 6:
        pause_process(s, a);
        return;
    case 7: sim_push(s, soon, SE_AGENT_LOSE, a->index, a->life)->x = outage(s); return;
    case 8:
        if (a->up && !a->stopping)
            a->die_after = (uint32_t)sim_between(s, 1, 12);
        return;
    default:
        if (a->conn)
            network_break(s, a->conn, false);
    }
}

/* ---- the end ---- */

static void calm_down(struct sim *s)
{
    s->calm = true;
    s->calm_at = s->now;
    s->p_duplicate = s->p_target = 0;
    for (uint32_t i = 0; i < s->n; i++) {
        s->agents[i].blocked_until = 0;
        s->agents[i].corrupt = s->agents[i].fail = 0;
        s->agents[i].die_after = 0;
        s->agents[i].engine.mute_at = 0;
    }
    sim_note(s, "---- no more faults, requests or commands ----");
}

/* Somebody has the checkpoint, and the ranks that are left have room for what they lack: so it must come back. */
static bool reloadable(struct sim *s, const struct view *view)
{
    int32_t from[RANKS_MAX];
    uint8_t can[RANKS_MAX];
    struct reload_means means = {.can_load = can};
    uint32_t n = 0;
    struct expert_map *load;
    uint64_t placed, unplaced = 1;

    for (uint32_t i = 0; i < s->n; i++)
        means.others_load |= s->agents[i].up && agent_can_load(s, &s->agents[i]);
    for (uint32_t r = 0; r < view->n; r++) {
        struct sim_agent *a = agent_of(s, &view->members[r]);
        if (!agent_is(a, &view->members[r]))
            continue;
        can[n] = agent_can_load(s, a);
        from[n++] = (int32_t)r;
    }
    struct expert_map *left = n ? expert_map_select(view->map, from, n) : NULL;
    if (left && plan_cover_from_dormant(left) && reload_plan(left, &means, &load, &placed, &unplaced) == 0)
        expert_map_unref(load);
    expert_map_unref(left);
    return s->config.reload_after_ms && unplaced == 0;
}

/* Nobody of the committed view is left who could carry it on, or not every expert has a holder that is left, nor can it be
 * read again: the view waits for ranks that will not come back. */
static bool lost(struct sim *s)
{
    const struct view *view = s->coordinator.disk.view;

    if (!view)
        return false;
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t e = 0; e < s->logical; e++) {
            bool held = false;
            for (uint32_t r = 0; r < view->n && !held; r++)
                for (uint32_t slot = 0; slot < s->slots && !held; slot++)
                    held = view->map->held[expert_map_at(view->map, l, r, slot)] == (int32_t)e &&
                           agent_is(agent_of(s, &view->members[r]), &view->members[r]);
            if (!held)
                return !reloadable(s, view);
        }
    return false;
}

static void last_operation(struct sim *s)
{
    const struct view *view = s->coordinator.disk.view;
    uint32_t now = view ? view->n : 0, target = s->n;

    if (!view)
        target = s->first_ranks;
    else if (now == s->n)
        target = s->config.min_ranks;
    if (target == now || lost(s)) {
        s->ended_lost = lost(s);
        s->ended = true;
        return;
    }
    s->final_stage = 1;
    s->final_request = s->request + 1;
    s->calm_at = s->now;
    ask(s, target, "", 0, NULL);
}

/* Probes in a row.  An agent that was told to stop may be drained only at the next attempt, a second later. */
static uint64_t quiet_for(const struct sim *s)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (s->agents[i].up && s->agents[i].stopping)
            return 30;
    return 4;
}

static void probe_calm(struct sim *s)
{
    char why[300];
    bool quiet = check_is_quiet(s, why, sizeof why);

    if (s->coordinator.up && s->coordinator.disk.paused) {
        pause_operations(s, false);
        return;
    }
    if (s->coordinator.up && s->restarts && lost(s) && s->now - s->calm_at > 20 * 1000 * MS) {
        ask_restart(s, false); /* and the last operation is a start */
        s->calm_at = s->now;
        return;
    }

    s->quiet_probes = quiet ? s->quiet_probes + 1 : 0;
    quiet = s->quiet_probes > quiet_for(s); /* what is still under way has arrived */
    if (quiet && s->final_stage == 0) {
        last_operation(s);
    } else if (quiet && s->final_stage == 3) {
        s->ended = true;
    } else if (s->now - s->calm_at > QUIET_BOUND) {
        if (lost(s))
            s->ended = s->ended_lost = true;
        else
            sim_fail(s, "promise 3: no rest %" PRIu64 " s after the last %s: %s", QUIET_BOUND / (1000 * MS),
                     s->final_stage ? "operation" : "fault", why);
    }
}

static void probe(struct sim *s)
{
    sim_push(s, (s->calm && s->now - s->calm_at > 5000 * MS ? 500 : 50) * MS, SE_PROBE, 0, 0);
    if (s->n_events > s->options->max_events * 10 + 1000000)
        sim_fail(s, "promise 3: no rest after %" PRIu64 " events: something goes round in circles", s->n_events);
    if (s->calm)
        probe_calm(s);
    else if (s->ops_left == 0 || s->n_events > s->options->max_events)
        if (sim_chance(s, 100) || s->n_events > s->options->max_events)
            calm_down(s);
}

void scenario_event(struct sim *s, const struct sim_event *e)
{
    switch (e->kind) {
    case SE_OPERATOR:
        if (s->probes++ == 0)
            sim_push(s, 50 * MS, SE_PROBE, 0, 0);
        if (!s->calm)
            operate(s);
        return;
    case SE_REQUEST: request(s); return;
    case SE_FAULT:
        if (s->calm)
            return;
        fault(s);
        sim_push(s, sim_between(s, MS, 1500 * MS), SE_FAULT, 0, 0);
        return;
    default: probe(s);
    }
}
