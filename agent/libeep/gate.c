/* The gate loop of the engine's step boundary.  See gate.h for the loop as a whole.
 *
 * Pure: it touches the page and the caller's struct, and neither waits nor wakes.  Runs on the engine's stepping
 * thread (gate_done: wherever the device reports the end of a step). */
#include "agent/libeep/gate.h"

/* Every load and store is sequentially consistent: the proof of the promise needs that either the agent sees our
 * intent or we see its gate. */
static uint64_t get(_Atomic uint64_t *word)
{
    return atomic_load(word);
}

static void put(_Atomic uint64_t *word, uint64_t value)
{
    atomic_store(word, value);
}

void gate_attach(struct control_page *page, struct gate_local *local)
{
    *local = (struct gate_local){
        .next = get(&page->intent) + 1,
        .view = get(&page->cur_view),
        .wave = get(&page->wave),
    };
    /* Whatever the last engine had on the device died with it. */
    put(&page->launched, get(&page->intent));
    put(&page->done, get(&page->intent));
    put(&page->running, 0);
    put(&page->engine_state, PAGE_ENGINE_IDLE);
}

static void gate_catch_up(struct control_page *page, struct gate_local *local)
{
    uint64_t at_least = get(&page->next_step);

    if (local->next < at_least)
        local->next = at_least;
    if (local->next == 0)
        local->next = 1;
}

enum gate_verdict gate_announce(struct control_page *page, struct gate_local *local, bool has_work)
{
    /* flip_view before next_step: who sees the flip sees the step it starts with. */
    bool in_view = local->view || get(&page->flip_view);

    gate_catch_up(page, local);
    if (!in_view || !(local->running || has_work || local->next < get(&page->run_to))) {
        put(&page->running, 0);
        put(&page->engine_state, PAGE_ENGINE_IDLE);
        return GATE_IDLE;
    }
    put(&page->intent, local->next);
    return GATE_RUN;
}

static enum gate_verdict gate_hold(struct control_page *page, const struct gate_local *local)
{
    put(&page->intent, local->next - 1);
    put(&page->engine_state, PAGE_ENGINE_HELD);
    return GATE_HELD;
}

enum gate_verdict gate_check(struct control_page *page, struct gate_local *local, bool *ret_flip, bool *ret_wave_start)
{
    uint64_t view, flip_view, n;
    bool flip, wave_start;

    for (;;) {
        n = local->next;
        if (n >= get(&page->gate))
            return gate_hold(page, local);
        /* A repair may have opened the gate since we announced n: steps below its first one are not to be run.  Its
         * next_step was written before the gate, so that it is seen here. */
        if (get(&page->next_step) <= n)
            break;
        gate_catch_up(page, local);
        put(&page->intent, local->next);
    }

    /* flip_view is written last, so it is read first. */
    flip_view = get(&page->flip_view);
    flip = flip_view > local->view && n >= get(&page->flip_step);
    view = flip ? flip_view : local->view;
    /* Read after flip_view: a flip that was taken back leaves us in a view that is seen to be revoked. */
    if (view == 0 || view <= get(&page->revoked))
        return gate_hold(page, local);

    wave_start = !flip && !local->running && n >= get(&page->run_to);
    if (flip) {
        local->view = flip_view;
        local->wave = get(&page->flip_wave);
        put(&page->wave, local->wave);
        put(&page->flips, get(&page->flips) + 1);
    }
    local->running = true;
    put(&page->running, 1);
    put(&page->engine_state, PAGE_ENGINE_RUNNING);
    /* Last: who sees the new view here may take the flip for done. */
    put(&page->cur_view, view);
    *ret_flip = flip;
    *ret_wave_start = wave_start;
    return GATE_RUN;
}

void gate_launched(struct control_page *page, struct gate_local *local, bool any_work)
{
    put(&page->launched, local->next);
    local->next++;
    local->running = any_work;
    if (!any_work)
        put(&page->wave, ++local->wave);
}

void gate_done(struct control_page *page, uint64_t step)
{
    if (get(&page->done) < step)
        put(&page->done, step);
}

void gate_complete(struct control_page *page, struct gate_local *local, bool any_work)
{
    uint64_t step = local->next;

    gate_launched(page, local, any_work);
    gate_done(page, step);
}

void gate_left(struct control_page *page, struct gate_local *local)
{
    /* Requests are retried by a later wave, which the repair starts. */
    put(&page->launched, local->next);
    local->next++;
    local->running = false;
    put(&page->running, 0);
}

void gate_fail(struct control_page *page, struct gate_local *local)
{
    uint64_t step = local->next;

    gate_left(page, local);
    /* Nothing of the step is on the device any more: for those who wait for its end, this is it. */
    gate_done(page, step);
}

bool gate_map_pending(struct control_page *page, const struct gate_local *local, uint64_t *ret_version)
{
    uint64_t version = get(&page->map_pending);

    if (version <= local->map)
        return false;
    *ret_version = version;
    return true;
}

void gate_map_applied(struct control_page *page, struct gate_local *local, uint64_t version)
{
    local->map = version;
    put(&page->map_applied_step, local->next);
    put(&page->map_applied, version);
}
