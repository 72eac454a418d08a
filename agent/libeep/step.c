/* Step boundaries: the gate loop of gate.c with everything around it that waits, tells and measures.
 *
 *            +------------------------------------------------------------+
 *            v                                                            |
 *   apply a pending map -> where are we? -> announce -> check -> RUN      |
 *                              |   |            |         |               |
 *                     spare / idle |          IDLE      HELD              |
 *                              |  LEFT          |         |               |
 *                              +---------> wait for the wake descriptor --+
 *
 * The stepping thread runs all of this.  With nothing pending a boundary reads and writes the control page and the
 * clock (which is no system call), and nothing else: no lock, no descriptor.  Every system call that is made is
 * counted, in the page and in eep_stats. */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "agent/libeep/internal.h"
#include "common/clock.h"

/* This thread is the only writer of these. */
static void add(_Atomic uint64_t *word, uint64_t n)
{
    atomic_store(word, atomic_load(word) + n);
}

static void count_syscall(struct eep *eep)
{
    add(&eep->page->boundary_syscalls, 1);
    add(&eep->boundary_syscalls, 1);
}

static void ring_bell(struct eep *eep)
{
    uint64_t one = 1;
    count_syscall(eep);
    ssize_t wrote = write(eep->bell_fd, &one, sizeof one); /* a full counter rings as well */
    (void)wrote;
}

static void boundary_lock(struct eep *eep)
{
    if (pthread_mutex_trylock(&eep->lock) != 0) {
        count_syscall(eep); /* libeep's thread has it: we may sleep */
        pthread_mutex_lock(&eep->lock);
    }
}

static void boundary_wait(struct eep *eep)
{
    count_syscall(eep);
    pthread_cond_wait(&eep->cond, &eep->lock);
}

/* ---- maps ---- */

static void map_use(struct eep *eep, const struct routing *routing)
{
    struct stepping *s = &eep->step;
    struct maps_box *maps = atomic_load(&eep->maps);
    if (!routing->routed || !maps || !maps_fit(maps, routing))
        return; /* without weights there are no maps */
    maps_write(maps, routing);
    if (maps_write_device(eep, maps, s->stream, &s->device))
        return; /* not applied: this boundary ends with that error */
    gate_map_applied(eep->page, &s->gate, routing->version);
    s->map_changed = true;
}

/* A map whose message is still on its way is applied at a later boundary: nobody waits for it here. */
static void map_apply_pending(struct eep *eep)
{
    uint64_t version;
    if (!eep->step.view || !gate_map_pending(eep->page, &eep->step.gate, &version))
        return;
    boundary_lock(eep);
    struct map_update *update = update_take(eep, version);
    pthread_mutex_unlock(&eep->lock);
    if (update && update->routing.version > eep->step.gate.map) {
        map_use(eep, &update->routing);
        ring_bell(eep);
    }
    update_free(update);
}

/* ---- views ---- */

/* With replicated dispatch a new map is a new epoch, too; the engine's communicators stay what they are. */
static bool view_same_ranks(const struct eep_view *a, const struct eep_view *b)
{
    if (a->n != b->n || a->rank != b->rank)
        return false;
    for (uint32_t i = 0; i < a->n; i++)
        if (strcmp(a->members[i].agent, b->members[i].agent) != 0 ||
            strcmp(a->members[i].endpoint, b->members[i].endpoint) != 0 ||
            a->members[i].serving != b->members[i].serving)
            return false;
    return true;
}

static void view_use(struct eep *eep, struct view_box *view)
{
    struct stepping *s = &eep->step;
    bool revoked = s->view && (s->broken_view || s->view->pub.epoch <= atomic_load(&eep->page->revoked));
    if (!s->view || revoked || !view_same_ranks(&s->view->pub, &view->pub))
        s->view_changed = true;
    view_release(s->previous); /* it was to be valid until the next view has been used */
    s->previous = s->view;
    s->view = view;
    s->broken_view = 0;
    map_use(eep, &view->routing);
    boundary_lock(eep);
    if (atomic_load(&eep->page->revoked) < view->pub.epoch && !atomic_load(&eep->dead)) {
        uint64_t count;
        count_syscall(eep);
        ssize_t got = read(eep->revoke_fd, &count, sizeof count); /* not readable when nothing was revoked */
        (void)got;
    }
    pthread_mutex_unlock(&eep->lock);
}

enum place {
    PLACE_VIEW,    /* in a view, or about to enter one: ask the gate */
    PLACE_REVOKED, /* in a view that is void: wait for the next one */
    PLACE_SPARE,   /* in no view, or idle before one that is not here yet */
    PLACE_LEFT,    /* the view that is due does not have us */
};

/* The epoch of a flip that is due at our next step, or 0. */
static uint64_t flip_due(struct eep *eep)
{
    const struct gate_local *gate = &eep->step.gate;
    uint64_t epoch = atomic_load(&eep->page->flip_view);
    if (epoch <= gate->view)
        return 0;
    uint64_t joined = atomic_load(&eep->page->next_step);
    uint64_t next = gate->next > joined ? gate->next : joined;
    return next >= atomic_load(&eep->page->flip_step) ? epoch : 0;
}

/* An engine that was attached anew is in the view that its predecessor ran in, once the agent has sent it. */
static bool view_adopt(struct eep *eep)
{
    struct stepping *s = &eep->step;
    int32_t rank;
    struct view_box *view = NULL;
    if (s->gate.view == 0 || s->left_epoch > s->gate.view)
        return false;
    boundary_lock(eep);
    if (commit_rank(eep, s->gate.view, &rank) && rank >= 0)
        view = commit_take(eep, s->gate.view);
    pthread_mutex_unlock(&eep->lock);
    if (view)
        view_use(eep, view);
    return view != NULL;
}

static enum place place_find(struct eep *eep, bool has_work)
{
    struct stepping *s = &eep->step;
    uint64_t due = flip_due(eep);
    int32_t rank = 0;
    bool known = false;
    if (due) {
        boundary_lock(eep);
        known = commit_rank(eep, due, &rank);
        pthread_mutex_unlock(&eep->lock);
    }
    /* A flip that we know nothing of yet.  Who has nothing to run sleeps until its view is here, which is no hold; who
     * has goes on, because the gate of a leaver is shut. */
    if (due && !known && !has_work && !s->gate.running)
        return PLACE_SPARE;
    if (known && rank < 0)
        return s->left_epoch == due ? PLACE_SPARE : PLACE_LEFT;
    if (!s->view && !(known && rank >= 0) && !view_adopt(eep))
        return PLACE_SPARE;
    if (s->view && s->broken_view == s->gate.view && due <= s->broken_view)
        return PLACE_REVOKED;
    return PLACE_VIEW;
}

static int leave(struct eep *eep, struct eep_step *ret_step)
{
    struct stepping *s = &eep->step;
    s->left_epoch = atomic_load(&eep->page->flip_view);
    view_release(s->previous);
    s->previous = s->view;
    s->view = NULL;
    s->hold_since_ns = 0;
    s->gate.running = false;
    atomic_store(&eep->page->running, 0);
    s->state = PAGE_ENGINE_IDLE;
    atomic_store(&eep->page->engine_state, PAGE_ENGINE_IDLE);
    ring_bell(eep);
    *ret_step = (struct eep_step){.step = s->gate.next, .wave = s->gate.wave,
                                  .view = s->previous ? &s->previous->pub : NULL};
    return EEP_STEP_LEFT;
}

/* ---- waiting ---- */

/* The page shows where we are before we look whether the agent wants to hear of it: it writes first and reads then. */
static void state_show(struct eep *eep, enum page_engine_state state)
{
    struct stepping *s = &eep->step;
    bool news = s->state != state;
    s->state = state;
    if (atomic_load(&eep->page->engine_state) != (uint64_t)state)
        atomic_store(&eep->page->engine_state, state);
    if (news && (atomic_load(&eep->page->gate) != GATE_OPEN || atomic_load(&eep->page->notify_done) != 0 ||
                 s->broken_view || (s->gate.view && atomic_load(&eep->page->revoked) >= s->gate.view)))
        ring_bell(eep);
}

static void wait_for_wake(struct eep *eep, int timeout_ms)
{
    struct pollfd p = {.fd = eep->wake_fd, .events = POLLIN};
    count_syscall(eep);
    if (poll(&p, 1, timeout_ms) > 0) {
        uint64_t count;
        count_syscall(eep);
        ssize_t got = read(eep->wake_fd, &count, sizeof count);
        (void)got; /* somebody else may have read it: we look again anyway */
    }
}

static void hold_begin(struct eep *eep)
{
    if (!eep->step.hold_since_ns)
        eep->step.hold_since_ns = clock_now_ns();
    state_show(eep, PAGE_ENGINE_HELD);
}

static uint64_t hold_end(struct eep *eep, uint64_t now)
{
    struct stepping *s = &eep->step;
    if (!s->hold_since_ns)
        return 0;
    uint64_t held = now > s->hold_since_ns ? now - s->hold_since_ns : 1;
    unsigned bucket = 63u - (unsigned)__builtin_clzll(held);
    if (bucket >= PAGE_HISTOGRAM)
        bucket = PAGE_HISTOGRAM - 1;
    s->hold_since_ns = 0;
    add(&eep->page->hold_histogram[bucket], 1);
    add(&eep->page->holds, 1);
    add(&eep->hold_histogram[bucket], 1);
    add(&eep->holds, 1);
    if (held > atomic_load(&eep->longest_hold_ns))
        atomic_store(&eep->longest_hold_ns, held);
    return held;
}

/* What is left of timeout_ms; *deadline is set at the first idle wait. */
static int idle_left(int timeout_ms, uint64_t *deadline_ns)
{
    if (timeout_ms <= 0)
        return timeout_ms;
    uint64_t now = clock_now_ns();
    if (!*deadline_ns)
        *deadline_ns = now + (uint64_t)timeout_ms * 1000000u;
    uint64_t left = *deadline_ns > now ? (*deadline_ns - now + 999999u) / 1000000u : 0;
    return left > INT_MAX ? INT_MAX : (int)left;
}

/* ---- what is known of the steps before ---- */

static void duration_add(struct eep *eep, uint64_t ns)
{
    struct stepping *s = &eep->step;
    s->recent[s->n_recent++ % STEP_RECENT] = ns;
    unsigned n = s->n_recent < STEP_RECENT ? s->n_recent : STEP_RECENT;
    uint64_t least = s->recent[0];
    for (unsigned i = 1; i < n; i++)
        if (s->recent[i] < least)
            least = s->recent[i];
    atomic_store(&eep->page->step_ns_min, least ? least : 1);
}

static void notify_if_done(struct eep *eep, uint64_t done)
{
    uint64_t wanted = atomic_load(&eep->page->notify_done);
    if (wanted != 0 && done >= wanted && eep->step.notified != wanted) {
        eep->step.notified = wanted;
        ring_bell(eep);
    }
}

/* What has become known of steps that went to the device: at every boundary. */
static void device_boundary(struct eep *eep)
{
    uint64_t ns;
    while (device_step_ns(eep->device, &ns))
        duration_add(eep, ns);
    notify_if_done(eep, atomic_load(&eep->page->done));
}

/* ---- begin ---- */

static void wave_tell(struct eep *eep)
{
    Eep__Engine__Wave body = EEP__ENGINE__WAVE__INIT;
    body.epoch = eep->step.gate.view;
    body.step = eep->step.gate.next;
    Eep__Engine__EngineUp up = EEP__ENGINE__ENGINE_UP__INIT;
    up.body_case = EEP__ENGINE__ENGINE_UP__BODY_WAVE;
    up.wave = &body;
    struct err err;
    count_syscall(eep);
    int rc = link_send(eep, &up, &err); /* if that fails, the next boundary says why */
    (void)rc;
}

/* The gate has let a flip pass: its view was sent before the page said so, and may have to be waited for. */
static bool flip_take(struct eep *eep)
{
    struct view_box *view;
    boundary_lock(eep);
    while (!(view = commit_take(eep, eep->step.gate.view)) && !atomic_load(&eep->dead)) {
        if (!eep->step.hold_since_ns)
            eep->step.hold_since_ns = clock_now_ns();
        boundary_wait(eep);
    }
    pthread_mutex_unlock(&eep->lock);
    if (!view)
        return false;
    view_use(eep, view);
    add(&eep->flips, 1);
    return true;
}

static int begun(struct eep *eep, bool flip, bool wave_start, struct eep_step *ret_step)
{
    struct stepping *s = &eep->step;
    bool taken = !flip || flip_take(eep);
    if (taken && eep->device && !s->device.code && device_step_begin(eep->device, s->stream, &s->device))
        taken = false;
    if (!taken || s->device.code) {
        gate_fail(eep->page, &s->gate);
        atomic_store(&eep->in_step, false);
        return s->device.code ? eep_fail_err(&s->device) : eep_fail_dead(eep);
    }
    s->state = PAGE_ENGINE_RUNNING;
    s->began_ns = clock_now_ns();
    uint64_t held = hold_end(eep, s->began_ns);
    if (flip) {
        atomic_store(&eep->page->last_hold_ns, held);
        ring_bell(eep);
    }
    if (wave_start)
        wave_tell(eep);
    *ret_step = (struct eep_step){.step = s->gate.next,
                                  .wave = s->gate.wave,
                                  .view = &s->view->pub,
                                  .view_changed = s->view_changed,
                                  .map_changed = s->map_changed,
                                  .held_ns = held};
    s->view_changed = s->map_changed = false;
    return EEP_STEP_RUN;
}

/* One pass by the gate.  in_step is up before the gate is read, so that a revoke finds us on either side of it. */
static enum gate_verdict gate_pass(struct eep *eep, bool has_work, bool *ret_flip, bool *ret_wave_start)
{
    struct stepping *s = &eep->step;
    atomic_store(&eep->in_step, true);
    enum gate_verdict verdict = gate_announce(eep->page, &s->gate, has_work);
    if (verdict == GATE_RUN) {
        if (flip_due(eep)) /* whoever sees the new view in the page shall find its hold there */
            atomic_store(&eep->page->last_hold_ns, s->hold_since_ns ? clock_now_ns() - s->hold_since_ns : 0);
        verdict = gate_check(eep->page, &s->gate, ret_flip, ret_wave_start);
    }
    if (verdict != GATE_RUN) {
        atomic_store(&eep->in_step, false);
        if (left_step_claim(eep)) {
            count_syscall(eep);
            left_step_send(eep, atomic_load(&eep->page->intent), 0);
        }
    }
    return verdict;
}

static bool wants_step(struct eep *eep, bool has_work)
{
    const struct gate_local *gate = &eep->step.gate;
    return has_work || gate->running || gate->next < atomic_load(&eep->page->run_to);
}

int eep_step_begin(struct eep *eep, void *stream, bool has_work, int timeout_ms, struct eep_step *ret_step)
{
    struct stepping *s = &eep->step;
    uint64_t deadline_ns = 0;
    if (stream && !eep->device)
        return eep_fail(ERR_INVALID, "the weights are host memory: a step has no stream there, pass NULL");
    if (atomic_load(&eep->in_step))
        return eep_fail(ERR_INVALID, "the last step was neither ended nor failed");
    s->stream = stream;
    s->device.code = 0;
    for (;;) {
        bool flip = false, wave_start = false;
        enum gate_verdict verdict = GATE_IDLE;
        if (atomic_load(&eep->dead))
            return eep_fail_dead(eep);
        if (eep->device)
            device_boundary(eep);
        map_apply_pending(eep);
        enum place place = place_find(eep, has_work);
        if (s->device.code)
            return eep_fail_err(&s->device);
        if (eep->device && !device_step_room(eep->device) && !eep_revoked(eep)) {
            wait_for_wake(eep, 1); /* far ahead of the device: no step is announced meanwhile */
            continue;
        }
        if (place == PLACE_LEFT)
            return leave(eep, ret_step);
        if (place == PLACE_VIEW)
            verdict = gate_pass(eep, has_work, &flip, &wave_start);
        else if (place == PLACE_REVOKED && wants_step(eep, has_work))
            verdict = GATE_HELD;
        if (verdict == GATE_RUN)
            return begun(eep, flip, wave_start, ret_step);

        int wait_ms = -1;
        if (verdict == GATE_HELD) {
            hold_begin(eep);
        } else {
            s->hold_since_ns = 0;
            state_show(eep, PAGE_ENGINE_IDLE);
            wait_ms = idle_left(timeout_ms, &deadline_ns);
        }
        if (wait_ms == 0 || atomic_exchange(&eep->user_wake, false)) {
            *ret_step = (struct eep_step){.step = s->gate.next, .wave = s->gate.wave,
                                          .view = s->view ? &s->view->pub : NULL};
            return EEP_STEP_IDLE;
        }
        wait_for_wake(eep, wait_ms);
    }
}

/* ---- end ---- */

static void step_left(struct eep *eep, uint64_t step, uint64_t failed_view)
{
    atomic_store(&eep->in_step, false);
    if (left_step_claim(eep) || failed_view) {
        count_syscall(eep);
        left_step_send(eep, step, failed_view);
    }
}

/* With a stream the work is only launched: the device says when it is done. */
static int step_end_on_device(struct eep *eep, void *stream, bool any_work)
{
    struct stepping *s = &eep->step;
    struct maps_box *maps = atomic_load(&eep->maps);
    struct err err;
    uint64_t step = s->gate.next;
    int rc = device_step_end(eep->device, maps ? maps->device : NULL, maps ? &maps->pub : NULL, stream, &err);
    if (rc)
        return eep_fail_err(&err); /* not ended: eep_step_failed may still be called */
    gate_launched(eep->page, &s->gate, any_work);
    rc = device_step_done(eep->device, stream, step, &err);
    return rc ? eep_fail_err(&err) : 0;
}

int eep_step_end(struct eep *eep, void *stream, bool any_work)
{
    if (stream && !eep->device)
        return eep_fail(ERR_INVALID, "the weights are host memory: a step has no stream there, pass NULL");
    if (!atomic_load(&eep->in_step))
        return eep_fail(ERR_INVALID, "no step was begun");
    uint64_t step = eep->step.gate.next;
    if (eep->device) {
        int rc = step_end_on_device(eep, stream, any_work);
        if (rc)
            return rc;
        device_boundary(eep);
    } else {
        duration_add(eep, clock_now_ns() - eep->step.began_ns);
        gate_complete(eep->page, &eep->step.gate, any_work);
        notify_if_done(eep, step);
    }
    add(&eep->steps, 1);
    step_left(eep, step, 0);
    return 0;
}

int eep_step_failed(struct eep *eep)
{
    if (!atomic_load(&eep->in_step))
        return eep_fail(ERR_INVALID, "no step was begun");
    struct stepping *s = &eep->step;
    struct err err = {.code = 0};
    uint64_t step = s->gate.next;
    s->broken_view = s->gate.view;
    if (eep->device) { /* what was launched of it is still there */
        gate_left(eep->page, &s->gate);
        if (device_step_done(eep->device, s->stream, step, &err))
            err.code = 0; /* the next step says so as well */
        notify_if_done(eep, atomic_load(&eep->page->done));
    } else {
        gate_fail(eep->page, &s->gate);
        notify_if_done(eep, step);
    }
    step_left(eep, step, s->broken_view); /* the agent knows whether it was revoked */
    return 0;
}
