/* Clock, event heap, generator and story of the simulator; one run from a seed.  Single thread. */
#include "tests/sim/sim.h"

#include <assert.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RING 60

uint64_t sim_random(struct sim *s)
{
    uint64_t z = s->random += 0x9E3779B97F4A7C15ull;

    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

uint64_t sim_between(struct sim *s, uint64_t low, uint64_t high)
{
    return low + sim_random(s) % (high - low + 1);
}

bool sim_chance(struct sim *s, uint32_t per_mille)
{
    return per_mille > 0 && sim_random(s) % 1000 < per_mille;
}

/* ---- the heap of events: by time, then by order of creation ---- */

static bool before(const struct sim_event *a, const struct sim_event *b)
{
    return a->at < b->at || (a->at == b->at && a->seq < b->seq);
}

static void heap_swap(struct sim_event *a, struct sim_event *b)
{
    struct sim_event t = *a;

    *a = *b;
    *b = t;
}

struct sim_event *sim_push(struct sim *s, uint64_t delay, enum sim_event_kind kind, uint32_t agent, uint64_t life)
{
    static struct sim_event lost; /* only to write into when out of memory: the run has failed then */
    size_t i = s->n_heap;

    if (s->n_heap == s->cap_heap) {
        size_t cap = s->cap_heap ? s->cap_heap * 2 : 256;
        struct sim_event *heap = realloc(s->heap, cap * sizeof *heap);
        if (!heap) {
            sim_fail(s, "out of memory");
            return &lost;
        }
        s->heap = heap;
        s->cap_heap = cap;
    }
    s->heap[i] = (struct sim_event){.at = s->now + delay, .seq = s->seq++, .kind = kind, .agent = agent, .life = life};
    s->n_heap++;
    while (i > 0 && before(&s->heap[i], &s->heap[(i - 1) / 2])) {
        heap_swap(&s->heap[i], &s->heap[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    return &s->heap[i];
}

static struct sim_event heap_pop(struct sim *s)
{
    struct sim_event first = s->heap[0];
    size_t i = 0;

    s->heap[0] = s->heap[--s->n_heap];
    for (;;) {
        size_t left = 2 * i + 1, right = left + 1, least = i;
        if (left < s->n_heap && before(&s->heap[left], &s->heap[least]))
            least = left;
        if (right < s->n_heap && before(&s->heap[right], &s->heap[least]))
            least = right;
        if (least == i)
            return first;
        heap_swap(&s->heap[i], &s->heap[least]);
        i = least;
    }
}

static void event_done(struct sim_event *e)
{
    if (e->msg) {
        msg_done(e->msg);
        free(e->msg);
    }
}

/* ---- the story ---- */

static void note_line(struct sim *s, const char *text)
{
    if (s->options->verbose)
        printf("%11.4f ms  %s\n", (double)s->now / 1e6, text);
    snprintf(s->ring[s->n_notes++ % RING], sizeof s->ring[0], "%6" PRIu64 " %11.4f ms  %.240s", s->n_events,
             (double)s->now / 1e6, text);
}

void sim_note(struct sim *s, const char *fmt, ...)
{
    char text[512];
    va_list args;

    if (!s->recording)
        return;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    note_line(s, text);
}

void sim_fail(struct sim *s, const char *fmt, ...)
{
    va_list args;

    if (s->failed)
        return;
    s->failed = true;
    va_start(args, fmt);
    vsnprintf(s->violation, sizeof s->violation, fmt, args);
    va_end(args);
    if (s->recording)
        note_line(s, s->violation);
}

void sim_print_story(const struct sim *s)
{
    uint64_t first = s->n_notes > RING ? s->n_notes - RING : 0;

    for (uint64_t i = first; i < s->n_notes; i++)
        printf("    %s\n", s->ring[i % RING]);
}

/* ---- the agents' clocks ---- */

uint64_t sim_clock(const struct sim *s, const struct sim_agent *a)
{
    return a->clock_offset + (uint64_t)((int64_t)s->now + (int64_t)s->now * a->clock_ppm / 1000000);
}

uint64_t sim_clock_delay(const struct sim *s, const struct sim_agent *a, uint64_t at)
{
    uint64_t now = sim_clock(s, a);

    return at > now ? (at - now) * 1000000 / (uint64_t)(1000000 + a->clock_ppm) + 1 : 1;
}

/* ---- one run ---- */

/* A stopped process does nothing; what comes for it waits, in order. */
static uint64_t paused_until(const struct sim *s, const struct sim_event *e)
{
    switch (e->kind) {
    case SE_TO_COORDINATOR:
    case SE_CUT_COORDINATOR:
    case SE_COORDINATOR_TICK:
    case SE_DURABLE:
    case SE_PLANNED:
    case SE_OPERATOR: return s->coordinator.paused_until;
    case SE_TO_AGENT:
    case SE_CUT_AGENT:
    case SE_CONNECT:
    case SE_AGENT_TICK:
    case SE_AGENT_CALL:
    case SE_PEER_WAVE:
    case SE_BELL:
    case SE_WORK_END:
    case SE_MOVE_BEGIN:
    case SE_MOVE_END: return s->agents[e->agent].paused_until;
    default: return 0;
    }
}

static void dispatch(struct sim *s, struct sim_event *e)
{
    struct sim_agent *a = &s->agents[e->agent];
    uint64_t until = paused_until(s, e);

    if (until > s->now) {
        struct sim_event *later = sim_push(s, until - s->now, e->kind, e->agent, e->life);
        uint64_t at = later->at, seq = later->seq;
        *later = *e;
        later->at = at;
        later->seq = seq;
        e->msg = NULL;
        return;
    }
    switch (e->kind) {
    case SE_TO_COORDINATOR:
    case SE_TO_AGENT:
    case SE_CUT_COORDINATOR:
    case SE_CUT_AGENT: network_arrived(s, e); return;
    case SE_CONNECT:
        if (a->up && a->life == e->life)
            network_connect(s, a);
        return;
    case SE_COORDINATOR_TICK: process_tick(s, e); return;
    case SE_DURABLE: process_durable(s, e); return;
    case SE_PLANNED: process_planned(s, e); return;
    case SE_COORDINATOR_CRASH:
        if (s->coordinator.up && !s->calm)
            process_crash(s, e->x);
        return;
    case SE_COORDINATOR_RESTART:
        if (!s->coordinator.up)
            process_start(s);
        return;
    case SE_AGENT_TICK: agent_tick(s, e); return;
    case SE_AGENT_CALL:
    case SE_PEER_WAVE:
    case SE_BELL: agent_call(s, e); return;
    case SE_AGENT_RESTART:
        if (!a->up && a->life == e->life)
            agent_start(s, a);
        return;
    case SE_AGENT_CRASH:
        if (a->up && a->life == e->life && !s->calm && (s->careless || !check_last_copy(s, a, true)))
            agent_crash(s, a, e->x);
        return;
    case SE_AGENT_LOSE:
        if (a->up && a->life == e->life && !s->calm)
            agent_lose(s, a, e->x);
        return;
    case SE_WORK_END:
    case SE_MOVE_BEGIN:
    case SE_MOVE_END: worker_event(s, e); return;
    case SE_ENGINE:
    case SE_STEP_END:
    case SE_DEVICE_DONE:
    case SE_REVOKE:
    case SE_ENGINE_DEATH:
    case SE_ENGINE_FAILS:
    case SE_ATTACH:
    case SE_DRAIN_DEADLINE:
    case SE_RESUME:
    case SE_ORPHAN: engine_event(s, e); return;
    case SE_OPERATOR:
    case SE_FAULT:
    case SE_REQUEST:
    case SE_PROBE: scenario_event(s, e); return;
    case SE_LOAD: load_report(s); return;
    }
    assert(0 && "unknown event");
}

bool sim_run(const struct sim_options *options, uint64_t seed, bool record, struct sim *ret_sim)
{
    struct sim *s = ret_sim;

    memset(s, 0, sizeof *s);
    s->options = options;
    s->seed = seed;
    s->random = seed * 0xD1342543DE82EF95ull + 1;
    s->recording = record;
    if (record)
        s->ring = calloc(RING, sizeof *s->ring);
    s->steps = calloc(SIM_STEPS, sizeof *s->steps);
    s->now = 1000 * MS;
    scenario_start(s);
    while (!s->failed && !s->ended && s->n_heap > 0) {
        struct sim_event e = heap_pop(s);
        s->now = e.at;
        s->n_events++;
        dispatch(s, &e);
        event_done(&e);
    }
    return !s->failed;
}

void sim_done(struct sim *s)
{
    for (uint32_t i = 0; i < s->n; i++)
        agent_done(s, &s->agents[i]);
    process_done(s);
    for (size_t i = 0; i < s->n_heap; i++)
        event_done(&s->heap[i]);
    for (size_t i = 0; i < s->n_commits; i++)
        view_unref(s->commits[i].view);
    model_unref(s->model);
    free(s->heap);
    free(s->agents);
    free(s->conns);
    free(s->commits);
    free(s->covered);
    free(s->steps);
    free(s->ring);
    memset(s, 0, sizeof *s);
}
