/* Engines: libeep's gate on the real control page, one atomic step at a time; a step completes only when all serving
 * members of its view have begun the same number in the same view (it contains an all-to-all); waves, requests, drain,
 * revoke, death.  Single thread. */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <string.h>

static struct sim_event *tell(struct sim *s, struct sim_agent *a, uint64_t delay, enum agent_event_type call)
{
    struct sim_event *e = sim_push(s, delay, SE_AGENT_CALL, a->index, a->life);

    e->call = call;
    e->engine_life = a->engine.life;
    return e;
}

static void plan_turn(struct sim *s, struct sim_agent *a, uint64_t delay)
{
    sim_push(s, delay, SE_ENGINE, a->index, a->engine.life)->x = ++a->engine.turn;
}

static struct view *view_known(const struct sim_engine *e, uint64_t epoch)
{
    for (size_t i = 0; i < sizeof e->views / sizeof *e->views; i++)
        if (e->views[i] && e->views[i]->epoch == epoch)
            return e->views[i];
    return NULL;
}

static void forget_step(struct sim_engine *e, uint32_t i)
{
    expert_map_unref(e->begun[i].map);
    memmove(&e->begun[i], &e->begun[i + 1], (--e->n_begun - i) * sizeof *e->begun);
}

void engine_forget(struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;

    while (e->n_begun > 0)
        forget_step(e, 0);
    for (size_t i = 0; i < sizeof e->views / sizeof *e->views; i++) {
        view_unref(e->views[i]);
        e->views[i] = NULL;
    }
    expert_map_unref(e->map);
    expert_map_unref(e->pending);
    e->map = e->pending = NULL;
    e->pc = ENGINE_NONE;
    e->life++;
    e->requests = e->revoked = e->step = e->device_at = e->broken = e->busy_until = 0;
    e->draining = e->wake = e->release_asked = e->launching = e->orphan = false;
    e->wave_view = e->wave_step = 0;
    memset(&e->local, 0, sizeof e->local);
}

void engine_attach(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;

    if (e->pc != ENGINE_NONE)
        return;
    if (e->said) { /* the agent has not noticed yet that the last one is gone */
        sim_push(s, MS, SE_ATTACH, a->index, a->life);
        return;
    }
    engine_forget(a);
    e->said = true;
    e->mute_at = s->calm || !sim_chance(s, s->p_mute) ? 0 : s->now + (sim_chance(s, 300) ? 0 : sim_between(s, 0, 4000 * MS));
    tell(s, a, sim_between(s, 10 * US, 500 * US), AE_ENGINE_ATTACHED);
}

void engine_attached(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;

    gate_attach(&a->page, &e->local);
    atomic_store(&a->page.step_ns_min, s->step_ns);
    e->pc = ENGINE_BOUNDARY;
    plan_turn(s, a, sim_between(s, US, 100 * US));
}

static void sleep_now(struct sim *s, struct sim_agent *a)
{
    a->engine.pc = ENGINE_SLEEPING;
    agent_ring(s, a);
    if (a->engine.wake) {
        a->engine.wake = false;
        plan_turn(s, a, US);
    }
}

void engine_wake(struct sim *s, struct sim_agent *a)
{
    if (a->engine.pc == ENGINE_SLEEPING)
        plan_turn(s, a, sim_between(s, US, sim_chance(s, 20) ? 3 * MS : 50 * US));
    else
        a->engine.wake = true;
}

void engine_request(struct sim *s, struct sim_agent *a, uint64_t steps)
{
    a->engine.requests += steps;
    engine_wake(s, a);
}

/* Would a router send requests here?  It watches the committed view. */
bool engine_takes_requests(struct sim *s, const struct sim_agent *a)
{
    const struct view *view = s->coordinator.disk.view;
    const struct sim_engine *e = &a->engine;

    if (!view || !agent_lives(a) || e->pc == ENGINE_NONE || e->draining || e->release_asked || e->local.view != view->epoch)
        return false;
    for (uint32_t i = 0; i < view->n; i++)
        if (agent_is(a, &view->members[i]))
            return view->members[i].serving;
    return false;
}

/* Requests go to some other engine of the view. */
static void hand_back(struct sim *s, struct sim_agent *a)
{
    struct view *view = s->coordinator.disk.view;
    uint64_t requests = a->engine.requests;

    a->engine.requests = 0;
    for (uint32_t i = 0; requests > 0 && view && i < view->n; i++) {
        struct sim_agent *b = agent_of(s, &view->members[i]);
        if (b && b != a && engine_takes_requests(s, b)) {
            engine_request(s, b, requests);
            return;
        }
    }
}

static uint32_t serving(const struct view *view)
{
    uint32_t n = 0;

    for (uint32_t i = 0; i < view->n; i++)
        n += view->members[i].serving;
    return n;
}

static void device_ends(struct sim *s, struct sim_agent *a, uint64_t step, uint64_t takes)
{
    struct sim_engine *e = &a->engine;
    uint64_t at = s->now + takes;

    if (at < e->device_at)
        at = e->device_at;
    e->device_at = at;
    sim_push(s, at - s->now, SE_DEVICE_DONE, a->index, e->life)->x = step;
}

/* Steps that this engine has launched and that some peer has not come to. */
static uint32_t unmet(struct sim *s, const struct sim_engine *e)
{
    uint32_t n = 0;

    for (uint32_t k = 0; k < e->n_begun; k++)
        n += e->begun[k].launched && check_step(s, e->begun[k].step)->step == e->begun[k].step &&
             !check_step(s, e->begun[k].step)->met;
    return n;
}

static void met_behind(struct sim *s, struct sim_agent *a, const struct sim_step *step)
{
    for (uint32_t k = 0; k < a->engine.n_begun; k++)
        if (a->engine.begun[k].launched && a->engine.begun[k].step == step->step &&
            a->engine.begun[k].view == step->view)
            device_ends(s, a, step->step, s->step_ns);
}

/* Two engines that cannot talk to each other: the step fails on both. */
static bool pair_fails(struct sim *s, const struct view *view)
{
    uint32_t found = 0;

    if (s->calm || !sim_chance(s, s->p_pair))
        return false;
    for (uint32_t i = 0; i < view->n; i++) {
        struct sim_agent *b = agent_of(s, &view->members[i]);
        found += b && (b->index == s->pair[0] || b->index == s->pair[1]) && b->engine.pc == ENGINE_IN_STEP;
    }
    if (found < 2)
        return false;
    for (uint32_t i = 0; i < 2; i++)
        engine_fails(s, &s->agents[s->pair[i]]);
    return true;
}

/* All have come: the step runs and ends on each rank in its own time. */
static void meet(struct sim *s, const struct view *view, struct sim_step *step)
{
    if (pair_fails(s, view))
        return;
    step->met = true;
    for (uint32_t i = 0; i < view->n; i++) {
        struct sim_agent *b = agent_of(s, &view->members[i]);
        struct sim_event *e;
        if (b)
            met_behind(s, b, step);
        if (!b || b->engine.pc != ENGINE_IN_STEP || b->engine.step != step->step || b->engine.launching)
            continue;
        e = sim_push(s, s->step_ns + sim_between(s, 0, s->step_ns / 4), SE_STEP_END, b->index, b->engine.life);
        e->x = step->step;
    }
}

static void begin(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;
    struct view *view = view_known(e, e->local.view);
    struct sim_step *step;

    e->step = e->local.next;
    e->pc = ENGINE_IN_STEP;
    sim_note(s, "a%02u engine BEGINS step %" PRIu64 " in view e%" PRIu64 "%s%s", a->index, e->step, e->local.view,
             e->flip ? ", its first" : "", e->wave_start ? ", starting a wave" : "");
    if (!view) {
        sim_fail(s, "a%02u begins step %" PRIu64 " in view e%" PRIu64 ", of which it was not told", a->index, e->step,
                 e->local.view);
        return;
    }
    if (e->flip) {
        expert_map_unref(e->map);
        e->map = expert_map_ref(view->map);
        gate_map_applied(&a->page, &e->local, view->map->version);
        agent_ring(s, a);
    }
    if (!e->map)
        e->map = expert_map_ref(view->map);
    if (e->n_begun == SIM_BEGUN)
        forget_step(e, 0);
    e->begun[e->n_begun++] =
        (struct sim_begun){.step = e->step, .view = e->local.view, .map = expert_map_ref(e->map)};
    check_begin(s, a);
    if (s->failed)
        return;
    a->last_begun = e->step;
    if (e->wave_start) {
        e->wave_view = e->local.view;
        e->wave_step = e->step;
        tell(s, a, sim_between(s, 2 * US, 200 * US), AE_ENGINE_WAVE)->x = e->step;
    }
    if (check_given_up(s, e->local.view))
        return; /* its peers are gone: it is in this step until its agent hears of it */
    step = check_step(s, e->step);
    step->begun++;
    step->any_work |= e->requests > 1;
    /* More work to come, whatever the peers have: the next step need not wait for what they say. */
    e->launching = e->requests > 1 && unmet(s, e) < s->ahead;
    if (e->launching)
        sim_push(s, sim_between(s, US, 100 * US), SE_STEP_END, a->index, e->life)->x = e->step;
    if (step->begun == serving(view))
        meet(s, view, step);
    if (e->local.view <= e->revoked) /* told while it was on its way in */
        sim_push(s, US, SE_REVOKE, a->index, e->life);
}

static bool bug(const struct sim *s, enum sim_bug which)
{
    return s->options->sim_bug == which;
}

static bool flip_due(struct sim_agent *a)
{
    uint64_t next = a->engine.local.next, at_least = atomic_load(&a->page.next_step);

    return atomic_load(&a->page.flip_view) > a->engine.local.view &&
           (next > at_least ? next : at_least) >= atomic_load(&a->page.flip_step);
}

static void stale(struct sim *s, struct sim_agent *a)
{
    engine_death(s, a, "its agent has given it up", true);
}

static void boundary(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;
    uint64_t version, gate = atomic_load(&a->page.gate);
    enum gate_verdict verdict;
    bool can_work = e->local.view && view_known(e, e->local.view) && e->map;

    e->pc = ENGINE_BOUNDARY;
    if (gate_stale(&a->page, &e->local)) {
        stale(s, a);
        return;
    }
    if (e->release_asked && atomic_load(&a->page.done) >= atomic_load(&a->page.launched)) {
        e->release_asked = false;
        tell(s, a, sim_between(s, 10 * US, MS), AE_ENGINE_RELEASED);
    }
    if (e->broken && e->broken == e->local.view && !flip_due(a)) {
        bool wants = e->requests > 0 || e->local.running || e->local.next < atomic_load(&a->page.run_to);
        atomic_store(&a->page.engine_state, wants ? PAGE_ENGINE_HELD : PAGE_ENGINE_IDLE);
        sleep_now(s, a);
        return;
    }
    if (gate_map_pending(&a->page, &e->local, &version) && e->pending && e->pending->version >= version) {
        expert_map_unref(e->map);
        e->map = expert_map_ref(e->pending);
        gate_map_applied(&a->page, &e->local, e->map->version);
        sim_note(s, "a%02u engine applies map %" PRIu64 " from step %" PRIu64, a->index, e->map->version,
                 e->local.next);
        agent_ring(s, a);
    }
    if (bug(s, SIM_BUG_FIRST_STEP_NOT_FORCED) && atomic_load(&a->page.flip_view) > e->local.view && !e->requests &&
        !e->local.running) { /* waits for work in the new view */
        sleep_now(s, a);
        return;
    }
    verdict = gate_announce(&a->page, &e->local, e->requests > 0 && can_work);
    if (verdict == GATE_STALE) {
        stale(s, a);
        return;
    }
    if (verdict == GATE_IDLE) {
        sleep_now(s, a);
        return;
    }
    if (bug(s, SIM_BUG_GATE_BEFORE_INTENT) && e->local.next >= gate) {
        atomic_store(&a->page.engine_state, PAGE_ENGINE_HELD);
        sleep_now(s, a);
        return;
    }
    e->pc = ENGINE_ANNOUNCED;
    plan_turn(s, a, sim_chance(s, 50) ? sim_between(s, 0, 3 * MS) : sim_between(s, 0, 10 * US));
}

void engine_turn(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;
    uint64_t gate = atomic_load(&a->page.gate);
    enum gate_verdict verdict;
    bool bypass;

    if (s->now < e->busy_until && !s->calm) {
        plan_turn(s, a, MS);
        return;
    }
    e->turn++; /* a planned one is void now */
    if (e->pc == ENGINE_SLEEPING)
        e->wake = false;
    if (e->pc == ENGINE_SLEEPING || e->pc == ENGINE_BOUNDARY) {
        boundary(s, a);
        return;
    }
    if (e->pc != ENGINE_ANNOUNCED)
        return;
    bypass = (bug(s, SIM_BUG_WAVE_BYPASSES_GATE) && !e->local.running &&
              e->local.next < atomic_load(&a->page.run_to)) ||
             bug(s, SIM_BUG_GATE_BEFORE_INTENT);
    if (bypass)
        atomic_store(&a->page.gate, GATE_OPEN);
    verdict = gate_check(&a->page, &e->local, &e->flip, &e->wave_start);
    if (bypass)
        atomic_store(&a->page.gate, gate);
    if (verdict == GATE_RUN) {
        begin(s, a);
        return;
    }
    if (verdict == GATE_STALE) {
        stale(s, a);
        return;
    }
    sim_note(s, "a%02u engine is held before step %" PRIu64, a->index, e->local.next);
    sleep_now(s, a);
}

/* The engine moves between two actions of its agent: what it was about to do, or a request that comes just now. */
bool engine_interleave(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;
    enum engine_pc before = e->pc;

    if (e->pc == ENGINE_SLEEPING && !s->calm && engine_takes_requests(s, a) && sim_chance(s, 300))
        e->requests += sim_between(s, 1, 3);
    if (e->pc == ENGINE_NONE || e->pc == ENGINE_IN_STEP)
        return false;
    engine_turn(s, a);
    return e->pc != before && !s->failed;
}

static bool mute(const struct sim *s, const struct sim_agent *a)
{
    return a->engine.mute_at && s->now >= a->engine.mute_at;
}

static void drained(struct sim *s, struct sim_agent *a)
{
    if (a->engine.draining && a->engine.requests == 0 && !mute(s, a))
        tell(s, a, sim_between(s, 10 * US, MS), AE_ENGINE_DRAINED);
}

static void device_done(struct sim *s, struct sim_agent *a, uint64_t step)
{
    uint64_t notify = atomic_load(&a->page.notify_done);

    gate_done(&a->page, step);
    if (notify && step >= notify)
        agent_ring(s, a);
    if (a->engine.release_asked && a->engine.pc == ENGINE_SLEEPING)
        plan_turn(s, a, US);
}

static void step_end(struct sim *s, struct sim_agent *a, uint64_t number)
{
    struct sim_engine *e = &a->engine;
    struct sim_step *step = check_step(s, number);

    if (e->pc != ENGINE_IN_STEP || e->step != number)
        return;
    if (e->requests > 0 && --e->requests == 0)
        drained(s, a);
    gate_launched(&a->page, &e->local, e->launching || step->any_work);
    e->pc = ENGINE_BOUNDARY;
    e->begun[e->n_begun - 1].launched = e->launching;
    if (e->launching) {
        e->launching = false;
        if (step->step == number && step->met)
            device_ends(s, a, number, s->step_ns);
    } else if (s->run_ahead) {
        device_ends(s, a, number, sim_between(s, 0, s->step_ns));
    } else {
        device_done(s, a, number);
    }
    plan_turn(s, a, sim_between(s, 0, 20 * US));
}

/* A rank that leaves its steps before all have come takes its part back. */
static void leave_steps(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;

    for (uint32_t k = 0; k < e->n_begun; k++) {
        struct sim_step *step = check_step(s, e->begun[k].step);
        if (step->step == e->begun[k].step && step->view == e->begun[k].view && !step->met)
            step->begun--;
    }
    while (e->n_begun > 0)
        forget_step(e, 0);
}

/* Out of everything that is launched, and not by an order of the agent. */
bool engine_fails(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;
    struct sim_event *told;

    if (e->pc != ENGINE_IN_STEP)
        return false;
    sim_note(s, "a%02u engine's step %" PRIu64 " FAILS", a->index, e->step);
    s->fault_at = s->now;
    leave_steps(s, a);
    gate_fail(&a->page, &e->local);
    e->launching = false;
    e->pc = ENGINE_BOUNDARY;
    e->broken = e->local.view;
    plan_turn(s, a, sim_between(s, 0, 50 * US));
    if (!a->up)
        return true;
    told = tell(s, a, sim_between(s, 10 * US, 500 * US), AE_ENGINE_LEFT_STEP);
    told->x = e->step;
    told->epoch = e->local.view;
    return true;
}

static void revoke(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;

    if (e->pc == ENGINE_NONE)
        return;
    if (e->pc == ENGINE_ANNOUNCED)
        engine_turn(s, a);
    if (s->failed)
        return;
    if (e->pc == ENGINE_IN_STEP && e->local.view <= e->revoked) {
        sim_note(s, "a%02u engine leaves step %" PRIu64, a->index, e->step);
        leave_steps(s, a);
        e->launching = false;
        gate_fail(&a->page, &e->local);
        e->pc = ENGINE_BOUNDARY;
        plan_turn(s, a, sim_between(s, 0, 50 * US));
    }
    if (e->pc != ENGINE_IN_STEP && e->local.view <= e->revoked && e->n_begun > 0) {
        leave_steps(s, a); /* launched, and waiting for peers that will not come */
        if (e->local.next > 0)
            gate_done(&a->page, e->local.next - 1);
    }
    if (e->pc != ENGINE_IN_STEP)
        tell(s, a, sim_between(s, 10 * US, 500 * US), AE_ENGINE_LEFT_STEP)->x = e->local.next - 1;
}

void engine_death(struct sim *s, struct sim_agent *a, const char *why, bool tell_agent)
{
    struct sim_engine *e = &a->engine;
    bool said = e->said; /* else its agent has no connection to it, and is told nothing */

    sim_note(s, "a%02u engine DIES%s: %s", a->index, e->pc == ENGINE_IN_STEP ? " in its step" : "", why);
    s->losses++;
    s->fault_at = s->now;
    leave_steps(s, a);
    hand_back(s, a);
    if (tell_agent && said && a->up)
        tell(s, a, sim_between(s, 10 * US, 2 * MS), AE_ENGINE_DETACHED);
    engine_forget(a);
    if (tell_agent && a->up)
        sim_push(s, sim_between(s, MS, s->quick_attach), SE_ATTACH, a->index, a->life);
}

/* It builds its part of what all engines of the view build together. */
static void prepare(struct sim *s, struct sim_agent *a, const struct agent_action *action)
{
    struct sim_event *e;
    bool alone = false;

    for (uint32_t i = 0; i < action->view->n; i++) {
        struct sim_agent *b = agent_of(s, &action->view->members[i]);
        alone |= b && b != a && mute(s, b);
    }
    if (mute(s, a) || (alone && s->prepare_blocks))
        return;
    e = tell(s, a, alone ? action->value * MS : sim_between(s, 100 * US, 20 * MS), AE_ENGINE_PREPARED);
    e->y = action->op;
    e->z = action->attempt;
    if (alone)
        e->code = ERR_TIMEOUT;
    if (s->faulty && !s->calm && sim_chance(s, 20))
        e->code = ERR_IO;
}

void engine_action(struct sim *s, struct sim_agent *a, struct agent_action *action)
{
    struct sim_engine *e = &a->engine;

    if (action->type == AA_ENGINE_DETACH && e->said) {
        sim_note(s, "a%02u cuts its engine off: %s", a->index, action->text);
        /* It may run on for a moment. */
        sim_push(s, sim_between(s, US, 3 * MS), SE_ENGINE_DEATH, a->index, e->life);
        return;
    }
    if (!e->said)
        return;
    switch (action->type) {
    case AA_ENGINE_PREPARE: prepare(s, a, action); return;
    case AA_ENGINE_RESUME: e->orphan = false; return;
    case AA_ENGINE_COMMIT:
        if (view_known(e, action->view->epoch))
            return; /* said again */
        view_unref(e->views[2]);
        e->views[2] = e->views[1];
        e->views[1] = e->views[0];
        e->views[0] = view_ref(action->view);
        if (!e->map && action->view->epoch == atomic_load(&a->page.cur_view))
            e->map = expert_map_ref(action->view->map);
        return;
    case AA_ENGINE_MAP:
        expert_map_unref(e->pending);
        e->pending = expert_map_ref(action->map);
        return;
    case AA_ENGINE_DRAIN:
        e->draining = true;
        sim_push(s, sim_clock_delay(s, a, sim_clock(s, a) + action->value * MS), SE_DRAIN_DEADLINE, a->index, e->life);
        drained(s, a);
        return;
    case AA_ENGINE_ABORT: e->draining = false; return;
    case AA_ENGINE_REVOKE:
        sim_note(s, "a%02u revokes e%" PRIu64 ": %s", a->index, action->epoch, action->text);
        if (e->revoked < action->epoch)
            e->revoked = action->epoch;
        sim_push(s, sim_between(s, 20 * US, 2 * MS), SE_REVOKE, a->index, e->life);
        return;
    case AA_ENGINE_RELEASE:
        if (check_void(s, a, e->local.view) || e->local.view == 0)
            hand_back(s, a); /* it was put out, or never served */
        if (e->requests > 0)
            sim_fail(s, "promise 8: a%02u leaves with requests in flight", a->index);
        e->draining = false;
        e->release_asked = true;
        engine_wake(s, a);
        return;
    default: return;
    }
}

void engine_orphaned(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;

    e->said = false;
    if (e->pc == ENGINE_NONE)
        return;
    e->orphan = true;
    e->orphan_at = s->now;
    sim_push(s, 2 * s->config.lease_ms * MS, SE_ORPHAN, a->index, e->life)->x = ++e->orphans;
}

/* Its agent is back on the socket: what may have got lost is said again. */
static void resume(struct sim *s, struct sim_agent *a)
{
    struct sim_engine *e = &a->engine;
    struct agent_event event = {.type = AE_ENGINE_RESUMED, .dispatch = s->dispatch, .endpoint = "engine",
                                
                                .kv_bytes = 1000 + a->index, .masks = true, .epoch = e->local.view, .value = e->local.map,
                                .regions = true};

    if (!a->up || !e->orphan)
        return;
    if (a->paused_until > s->now) {
        sim_push(s, a->paused_until - s->now, SE_RESUME, a->index, e->life);
        return;
    }
    sim_note(s, "a%02u engine RESUMES in e%" PRIu64, a->index, e->local.view);
    e->said = true;
    agent_event(s, a, &event);
    if (!a->up || e->orphan || s->failed)
        return;
    if (e->broken && e->broken == e->local.view) {
        struct sim_event *told = tell(s, a, sim_between(s, 10 * US, 500 * US), AE_ENGINE_LEFT_STEP);
        told->x = e->step;
        told->epoch = e->broken;
    }
    if (e->wave_view && e->wave_view == e->local.view)
        tell(s, a, sim_between(s, 2 * US, 200 * US), AE_ENGINE_WAVE)->x = e->wave_step;
    drained(s, a);
}

/* Nobody has come back for it. */
static void orphan_ends(struct sim *s, struct sim_agent *a, uint64_t which)
{
    struct sim_engine *e = &a->engine;
    bool held = atomic_load(&a->page.engine_state) == PAGE_ENGINE_HELD;

    if (!e->orphan || e->orphans != which)
        return;
    if (held && s->now < e->orphan_at + s->config.indoubt_ms * MS) {
        sim_push(s, 50 * MS, SE_ORPHAN, a->index, e->life)->x = which;
        return;
    }
    engine_death(s, a, "its agent did not come back", true);
}

void engine_event(struct sim *s, const struct sim_event *ev)
{
    struct sim_agent *a = &s->agents[ev->agent];
    struct sim_engine *e = &a->engine;

    if (ev->kind == SE_ATTACH) {
        if (a->up && a->life == ev->life)
            engine_attach(s, a);
        return;
    }
    if (e->life != ev->life || e->pc == ENGINE_NONE)
        return;
    switch (ev->kind) {
    case SE_ENGINE:
        if (ev->x == e->turn)
            engine_turn(s, a);
        return;
    case SE_STEP_END: step_end(s, a, ev->x); return;
    case SE_DEVICE_DONE: device_done(s, a, ev->x); return;
    case SE_REVOKE: revoke(s, a); return;
    case SE_ENGINE_DEATH:
        if (agent_lives(a) || ev->y)
            engine_death(s, a, "as simulated", true);
        return;
    case SE_ENGINE_FAILS:
        if (!s->calm)
            engine_fails(s, a);
        return;
    case SE_RESUME: resume(s, a); return;
    case SE_ORPHAN: orphan_ends(s, a, ev->x); return;
    case SE_DRAIN_DEADLINE:
        if (e->draining) {
            hand_back(s, a);
            drained(s, a);
        }
        return;
    default: return;
    }
}
