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

bool agent_lives(const struct sim_agent *a)
{
    return a->up || a->away;
}

bool agent_is(const struct sim_agent *a, const struct member *member)
{
    return a && agent_lives(a) && a->incarnation == member->incarnation;
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

static void wave_to(struct sim *s, const struct sim_agent *a, const struct sim_agent *b)
{
    struct sim_event *e = sim_push(s, sim_between(s, s->delay_min, s->delay_max), SE_PEER_WAVE, b->index, b->life);

    e->call = AE_PEER_WAVE;
    e->epoch = a->wave_epoch;
    e->x = a->wave_step;
}

/* The others connect to a process that is back, and tell it the last wave of the view again. */
static void waves_again(struct sim *s, const struct sim_agent *b)
{
    for (uint32_t i = 0; i < s->n; i++) {
        const struct sim_agent *a = &s->agents[i];
        struct agent_status status;

        if (a == b || !a->up || !a->wave_epoch)
            continue;
        agent_core_status(a->core, &status);
        if (status.view && status.view->epoch == a->wave_epoch && view_rank(status.view, b->record.id) >= 0)
            wave_to(s, a, b);
    }
}

static void peer_wave(struct sim *s, struct sim_agent *a, const struct agent_action *action)
{
    struct agent_status status;

    agent_core_status(a->core, &status);
    a->wave_epoch = action->epoch;
    a->wave_step = action->value;
    for (uint32_t i = 0; status.view && i < status.view->n; i++) {
        struct sim_agent *b = agent_of(s, &status.view->members[i]);

        if (b != a && agent_is(b, &status.view->members[i]))
            wave_to(s, a, b);
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

/* Kept before the actions of the step are performed. */
static void keep(struct sim_agent *a)
{
    struct agent_record record;

    agent_core_save(a->core, &record);
    if (memcmp(&record, &a->record, sizeof record) == 0)
        return;
    agent_record_done(&a->record);
    agent_record_copy(&a->record, &record);
}

/* Does the process die before this action? */
static bool dies_now(struct sim_agent *a)
{
    if (a->die_after > 0 && --a->die_after == 0)
        a->dying = true;
    return a->dying;
}

void agent_event(struct sim *s, struct sim_agent *a, struct agent_event *event)
{
    bool late = s->options->sim_bug == SIM_BUG_RECORD_AFTER_ACTIONS;
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
    if (!late)
        keep(a);
    for (size_t i = 0; i < actions->n && !s->failed && !dies_now(a); i++)
        perform(s, a, &actions->v[i]);
    if (late && !a->dying)
        keep(a);
    agent_actions_clear(actions);
    a->depth--;
    if (a->depth > 0)
        return;
    if (a->dying)
        agent_lose(s, a, sim_chance(s, 700) ? sim_between(s, MS, 100 * MS) : sim_between(s, MS, 2000 * MS));
    else if (a->exits)
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
        event.masks = true;
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

static struct agent_config config_of(struct sim *s, const struct sim_agent *a)
{
    struct agent_config config = {.node = a->index / 4, .slots = s->slots,
                                  .can_load = agent_can_load(s, a), .lead_steps_min = 2,
                                  .step_limit_ns = 5000 * MS,
                                  .hang_ns = 3000 * MS};

    snprintf(config.id, sizeof config.id, "a%02u", a->index);
    snprintf(config.address, sizeof config.address, "host%u:1", a->index);
    snprintf(config.data_address, sizeof config.data_address, "host%u:2", a->index);
    if (config.can_load) {
        config.layers = s->layers;
        config.logical = s->logical;
    }
    return config;
}

/* What the process that follows reads of the record: in some seeds through its bytes. */
static void record_read(struct sim *s, struct sim_agent *a)
{
    struct record_bytes parts[RECORD_PARTS];
    uint8_t *data[RECORD_PARTS];
    struct agent_record read;
    struct err err = {0};
    int rc = 0;

    for (int i = 0; i < RECORD_PARTS; i++) {
        rc = rc ? rc : agent_record_encode(&a->record, (enum record_part)i, &data[i], &parts[i].len, &err);
        parts[i].data = data[i];
    }
    rc = rc ? rc : agent_record_decode(parts, &read, &err);
    if (rc < 0) {
        sim_fail(s, "a%02u: the state record does not survive its bytes: %s", a->index, err.text);
        return;
    }
    for (int i = 0; i < RECORD_PARTS; i++)
        free(data[i]);
    agent_record_done(&a->record);
    a->record = read;
}

/* Every slot of the record's map is what the map says: a fill writes only slots that are void in it. */
static void check_kept(struct sim *s, struct sim_agent *a)
{
    const struct expert_map *map = a->record.map;

    for (uint32_t l = 0; l < map->layers; l++)
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            int32_t expert = map->held[expert_map_at(map, l, a->record.map_rank, slot)];
            int32_t content = a->content[(size_t)l * s->slots + slot];
            if (expert >= 0 && content != expert)
                sim_fail(s, "promise 5: a%02u re-adopts slot %u of layer %u as expert %d, but it holds %d", a->index, slot,
                         l, expert, content);
        }
}

static void readopt(struct sim *s, struct sim_agent *a)
{
    struct agent_config config = config_of(s, a);

    a->away = false;
    a->up = true;
    a->life++;
    a->bell = a->exits = a->stopping = a->dying = false;
    a->paused_until = 0;
    check_kept(s, a);
    if (s->wire)
        record_read(s, a);
    if (s->failed)
        return;
    if (s->options->sim_bug == SIM_BUG_READOPT_NEW_PAGE)
        page_init(&a->page);
    sim_note(s, "a%02u starts again and RE-ADOPTS e%" PRIu64 ", promised e%" PRIu64 ", flip e%" PRIu64, a->index,
             a->record.applied_epoch, a->record.promise.epoch, a->record.flip.epoch);
    a->core = agent_core_restore(&config, &a->record, sim_clock(s, a));
    agent_core_plant(a->core, s->options->agent_bug);
    waves_again(s, a);
    sim_push(s, sim_between(s, 10 * US, 5 * MS), SE_CONNECT, a->index, a->life);
    sim_push(s, sim_between(s, 10 * US, sim_chance(s, 100) ? 300 * MS : 50 * MS),
             a->engine.pc != ENGINE_NONE ? SE_RESUME : SE_ATTACH, a->index,
             a->engine.pc != ENGINE_NONE ? a->engine.life : a->life);
    agent_ring(s, a); /* what the engine rang meanwhile is still in the eventfd */
    reschedule(s, a);
}

void agent_start(struct sim *s, struct sim_agent *a)
{
    struct agent_config config = config_of(s, a);
    size_t n = (size_t)s->layers * s->slots;

    if (a->away && !(sim_chance(s, 30) && (s->careless || !check_last_copy(s, a, true)))) {
        readopt(s, a);
        return;
    }
    if (a->away) {
        sim_note(s, "a%02u cannot be re-adopted", a->index);
        s->losses++;
    }
    a->away = a->dying = false;
    a->die_after = 0;
    a->wave_epoch = a->wave_step = 0;
    agent_record_done(&a->record);
    config.incarnation = sim_random(s) | 1;
    if (a->engine.pc != ENGINE_NONE)
        engine_death(s, a, "its agent is gone", false);
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

/* kill -9 of the process: weights, page, record and listeners are kept elsewhere, and its engine steps on. */
void agent_lose(struct sim *s, struct sim_agent *a, uint64_t restart_in)
{
    a->die_after = 0;
    a->dying = false;
    if (!a->record.held) {
        agent_crash(s, a, restart_in);
        return;
    }
    sim_note(s, "a%02u LOSES ITS PROCESS", a->index);
    s->losses++; /* it may stay away for longer than its lease */
    s->fault_at = s->now;
    drop_connection(s, a);
    worker_clear(a);
    agent_core_free(a->core);
    a->core = NULL;
    a->up = false;
    a->away = true;
    a->bell = false;
    a->paused_until = 0;
    a->life++;
    engine_orphaned(s, a);
    sim_push(s, restart_in, SE_AGENT_RESTART, a->index, a->life);
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
    agent_record_done(&a->record);
    for (size_t i = 0; i < sizeof a->actions / sizeof *a->actions; i++)
        agent_actions_done(&a->actions[i]);
    free(a->content);
}
