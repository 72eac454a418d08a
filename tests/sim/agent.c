/* The agents' processes: the shipping core, its control page and its actions, crash and restart.  Actions are performed
 * one at a time, and the engine may move between any two page writes.  Single thread. */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sim_agent *agent_of(struct sim *s, const struct member *member)
{
    unsigned long i = strtoul(member->id + 1, NULL, 10);

    return i < s->n ? &s->agents[i] : NULL;
}

bool agent_is(const struct sim_agent *a, const struct member *member)
{
    return a && a->up && a->incarnation == member->incarnation;
}

static void reschedule(struct sim *s, struct sim_agent *a)
{
    uint64_t at = agent_core_deadline(a->core);

    a->ticks++;
    a->spins = at <= sim_clock(s, a) ? a->spins + 1 : 0;
    if (a->spins > 100)
        sim_fail(s, "a%02u wants AE_TICK at %" PRIu64 " ns again and again: it would spin", a->index, at);
    if (at != UINT64_MAX)
        sim_push(s, sim_clock_delay(s, a, at), SE_AGENT_TICK, a->index, a->life)->x = a->ticks;
}

static void peer_wave(struct sim *s, struct sim_agent *a, const struct agent_action *action)
{
    struct agent_status status;

    agent_core_status(a->core, &status);
    for (uint32_t i = 0; status.view && i < status.view->n; i++) {
        struct sim_agent *b = agent_of(s, &status.view->members[i]);
        struct sim_event *e;

        if (b == a || !agent_is(b, &status.view->members[i]))
            continue;
        e = sim_push(s, sim_between(s, s->delay_min, s->delay_max), SE_PEER_WAVE, b->index, b->life);
        e->call = AE_PEER_WAVE;
        e->epoch = action->epoch;
        e->x = action->value;
    }
}

static void drop_connection(struct sim *s, struct sim_agent *a)
{
    if (!a->conn)
        return;
    s->conns[a->conn - 1].at_agent = false;
    network_break(s, a->conn, false);
    a->conn = 0;
}

static void perform(struct sim *s, struct sim_agent *a, struct agent_action *action);

static void store(struct sim *s, struct sim_agent *a, const struct agent_action *action)
{
    while (sim_chance(s, s->p_interleave) && engine_interleave(s, a))
        ;
    if (action->word == PAGE_GATE)
        check_gate_store(s, a, action->value);
    sim_note(s, "a%02u page %s = %" PRId64, a->index, page_word_name(action->word), (int64_t)action->value);
    page_store(&a->page, action->word, action->value);
    while (sim_chance(s, s->p_interleave) && engine_interleave(s, a))
        ;
    if (action->want_page) {
        struct agent_event event = {.type = AE_PAGE};
        agent_event(s, a, &event);
    }
}

static void send(struct sim *s, struct sim_agent *a, const struct agent_action *action)
{
    char text[200];

    if (s->recording && action->msg.type != MSG_HEARTBEAT) {
        network_describe(&action->msg, text, sizeof text);
        sim_note(s, "a%02u -> %s%s", a->index, text, a->conn ? "" : " (not connected)");
    }
    check_agent_sends(s, a, &action->msg);
    network_to_coordinator(s, a, &action->msg);
    scenario_target(s, &action->msg);
}

static void perform(struct sim *s, struct sim_agent *a, struct agent_action *action)
{
    struct work *work;

    switch (action->type) {
    case AA_SEND: send(s, a, action); return;
    case AA_PAGE: store(s, a, action); return;
    case AA_WAKE: engine_wake(s, a); return;
    case AA_WORK:
        work = malloc(sizeof *work);
        if (!work)
            return;
        *work = action->work;
        memset(&action->work, 0, sizeof action->work); /* ours now */
        worker_add(s, a, work);
        return;
    case AA_WORK_CANCEL: worker_stop_op(s, a, action->op); return;
    case AA_PEER_WAVE: peer_wave(s, a, action); return;
    case AA_TRANSITION:
        sim_note(s, "a%02u %s: %s --%s--> %s op %" PRIu64, a->index, op_role_name(action->role),
                 machine_state_name(action->from), machine_event_name(action->event), machine_state_name(action->to),
                 action->op);
        return;
    case AA_LOG: sim_note(s, "a%02u says: %s", a->index, action->text); return;
    case AA_RECONNECT:
        sim_note(s, "a%02u drops its connection: %s", a->index, action->text);
        drop_connection(s, a);
        sim_push(s, sim_between(s, MS, 50 * MS), SE_CONNECT, a->index, a->life);
        return;
    case AA_EXIT:
        sim_note(s, "a%02u exits with %" PRIu64 " %s", a->index, action->value, action->text);
        a->exits = true;
        return;
    default: engine_action(s, a, action); return;
    }
}

void agent_event(struct sim *s, struct sim_agent *a, struct agent_event *event)
{
    struct agent_actions *actions = &a->actions[a->depth];

    if (!a->up || s->failed)
        return;
    if (a->depth + 1 >= sizeof a->actions / sizeof *a->actions) {
        sim_fail(s, "a%02u: AE_PAGE upon AE_PAGE without end", a->index);
        return;
    }
    a->depth++;
    page_read(&a->page, &event->page);
    agent_core_step(a->core, sim_clock(s, a), event, actions);
    for (size_t i = 0; i < actions->n && !s->failed; i++)
        perform(s, a, &actions->v[i]);
    agent_actions_clear(actions);
    a->depth--;
    if (a->depth > 0)
        return;
    if (a->exits)
        agent_crash(s, a, sim_between(s, 1 * MS, 100 * MS));
    else
        reschedule(s, a);
}

void agent_ring(struct sim *s, struct sim_agent *a)
{
    if (a->bell || !a->up)
        return;
    a->bell = true;
    sim_push(s, sim_between(s, 2 * US, sim_chance(s, 30) ? 2 * MS : 50 * US), SE_BELL, a->index, a->life);
}

/* What the engine, the worker or a peer tells the agent. */
void agent_call(struct sim *s, const struct sim_event *e)
{
    struct sim_agent *a = &s->agents[e->agent];
    struct agent_event event = {.type = e->call, .op = e->y, .attempt = e->z, .value = e->x, .epoch = e->epoch,
                                .code = e->code, .text = e->code ? "as simulated" : ""};

    if (!a->up || a->life != e->life)
        return;
    if (e->kind == SE_BELL) {
        event.type = AE_BELL;
        a->bell = false;
        agent_event(s, a, &event);
        return;
    }
    if (e->engine_life && e->engine_life != a->engine.life && e->call != AE_ENGINE_DETACHED)
        return;
    switch (e->call) {
    case AE_ENGINE_ATTACHED:
        event.dispatch = s->dispatch;
        event.endpoint = "engine";
        event.kv_bytes = 1000 + a->index;
        break;
    case AE_ENGINE_DETACHED:
        a->engine.said = false;
        event.text = "engine died";
        break;
    case AE_WORK_DONE:
        event.work_id = e->x;
        event.value = 0;
        break;
    default: break;
    }
    sim_note(s, "a%02u is told: %s value %" PRIu64 " op %" PRIu64 " code %d", a->index,
             e->call == AE_ENGINE_ATTACHED   ? "engine attached"
             : e->call == AE_ENGINE_DETACHED ? "engine detached"
             : e->call == AE_ENGINE_PREPARED ? "engine prepared"
             : e->call == AE_ENGINE_DRAINED  ? "engine drained"
             : e->call == AE_ENGINE_LEFT_STEP ? "engine left its step"
             : e->call == AE_ENGINE_RELEASED ? "engine released"
             : e->call == AE_ENGINE_WAVE     ? "engine starts a wave"
             : e->call == AE_PEER_WAVE       ? "peer starts a wave"
             : e->call == AE_STOP            ? "stop"
                                             : "work done",
             e->x, e->y, e->code);
    agent_event(s, a, &event);
    if (e->call == AE_ENGINE_ATTACHED && a->up)
        engine_attached(s, a);
}

void agent_tick(struct sim *s, const struct sim_event *e)
{
    struct sim_agent *a = &s->agents[e->agent];
    struct agent_event event = {.type = AE_TICK};

    if (a->up && a->life == e->life && a->ticks == e->x)
        agent_event(s, a, &event);
}

void agent_start(struct sim *s, struct sim_agent *a)
{
    struct agent_config config = {.incarnation = sim_random(s) | 1, .node = a->index / 4, .slots = s->slots,
                                  .can_load = a->index <= s->first_ranks || a->index % 2, .lead_steps_min = 2,
                                  .step_limit_ns = 5000 * MS};
    size_t n = (size_t)s->layers * s->slots;

    if (a->engine.pc != ENGINE_NONE)
        engine_death(s, a, "its agent is gone", false);
    snprintf(config.id, sizeof config.id, "a%02u", a->index);
    snprintf(config.address, sizeof config.address, "host%u:1", a->index);
    snprintf(config.data_address, sizeof config.data_address, "host%u:2", a->index);
    if (config.can_load) {
        config.layers = s->layers;
        config.logical = s->logical;
    }
    a->up = true;
    a->life++;
    a->incarnation = config.incarnation;
    a->bell = a->exits = a->stopping = false;
    a->promised = a->limit = a->left_at = a->acked_map = a->acked_step = a->last_begun = 0;
    a->promised_reset = a->has_left = false;
    a->corrupt = a->fail = 0;
    a->paused_until = 0;
    a->dense = false;
    engine_forget(a);
    a->engine.said = false;
    page_init(&a->page);
    if (!a->content)
        a->content = calloc(n, sizeof *a->content);
    for (size_t i = 0; a->content && i < n; i++)
        a->content[i] = -1;
    a->clock_offset = s->drift ? sim_between(s, 0, 1000000 * MS) : 0;
    a->clock_ppm = s->drift ? (int64_t)sim_between(s, 0, 100000) - 50000 : 0;
    a->core = agent_core_new(&config, sim_clock(s, a));
    if (!a->core || !a->content) {
        sim_fail(s, "agent_core_new failed");
        return;
    }
    agent_core_plant(a->core, s->options->agent_bug);
    sim_note(s, "a%02u starts, incarnation %" PRIx64, a->index, a->incarnation);
    sim_push(s, sim_between(s, 10 * US, 5 * MS), SE_CONNECT, a->index, a->life);
    sim_push(s, sim_between(s, 10 * US, 20 * MS), SE_ATTACH, a->index, a->life);
    reschedule(s, a);
}

void agent_crash(struct sim *s, struct sim_agent *a, uint64_t restart_in)
{
    sim_note(s, "a%02u %s", a->index, a->exits ? "has exited" : "CRASHES");
    s->losses++;
    s->fault_at = s->now;
    drop_connection(s, a);
    worker_clear(a);
    agent_core_free(a->core);
    a->core = NULL;
    a->up = false;
    a->paused_until = 0;
    a->life++;
    /* Its engine finds out a little later; until then it runs on. */
    if (a->engine.pc != ENGINE_NONE && sim_chance(s, s->p_zombie))
        sim_push(s, sim_between(s, 0, 30 * MS), SE_ENGINE_DEATH, a->index, a->engine.life)->y = 1;
    else if (a->engine.pc != ENGINE_NONE)
        engine_death(s, a, "its agent is gone", false);
    sim_push(s, restart_in, SE_AGENT_RESTART, a->index, a->life);
}

void agent_done(struct sim *s, struct sim_agent *a)
{
    (void)s;
    worker_clear(a);
    engine_forget(a);
    agent_core_free(a->core);
    for (size_t i = 0; i < sizeof a->actions / sizeof *a->actions; i++)
        agent_actions_done(&a->actions[i]);
    free(a->content);
}
