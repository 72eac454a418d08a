/* The agents' workers: one piece of work at a time, in order, each taking its time; transfers need both sides, and the
 * content of every slot is kept, so that a mix-up shows.  Single thread. */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define TRANSFER_TIMEOUT (3000 * MS)

static void start(struct sim *s, struct sim_agent *a);

static int32_t *slot_of(struct sim *s, struct sim_agent *a, uint32_t layer, uint32_t slot)
{
    return &a->content[(size_t)layer * s->slots + slot];
}

static void work_free(struct work *w)
{
    work_done(w);
    free(w);
}

static void end_in(struct sim *s, struct sim_agent *a, uint64_t delay, int code)
{
    struct sim_event *e = sim_push(s, delay, SE_WORK_END, a->index, a->life);

    e->x = a->work_life;
    e->code = code;
}

static bool same_transfer(const struct sim_agent *a, const struct work *w)
{
    return a->working && a->queue[0]->op == w->op && a->queue[0]->kind == w->kind && a->queue[0]->round == w->round;
}

/* The agent that is party i of this work, if it is alive and at the same work. */
static struct sim_agent *partner(struct sim *s, const struct work *w, uint32_t i)
{
    struct sim_agent *b = i < w->n ? agent_of(s, &w->parties[i]) : NULL;

    return b && agent_is(b, &w->parties[i]) && same_transfer(b, w) ? b : NULL;
}

static void start_group(struct sim *s, struct sim_agent *a, struct work *w)
{
    end_in(s, a, TRANSFER_TIMEOUT, ERR_TIMEOUT);
    for (uint32_t i = 0; i < w->n; i++)
        if (!partner(s, w, i))
            return;
    for (uint32_t i = 0; i < w->n; i++)
        end_in(s, partner(s, w, i), sim_between(s, 100 * US, s->transfer_max), 0);
}

static bool has_moves(const struct work *w)
{
    return w->plan && (w->kind == WORK_FILL || w->plan->rounds_before > 0);
}

static void start_transfer(struct sim *s, struct sim_agent *a, struct work *w)
{
    a->moves_left = 0;
    if (w->kind == WORK_WEIGHTS && w->self >= w->dense_from) {
        bool source = w->dense_from == 0;
        for (uint32_t i = 0; i < w->dense_from; i++)
            source |= agent_is(agent_of(s, &w->parties[i]), &w->parties[i]) && agent_of(s, &w->parties[i])->dense;
        a->dense = source;
    }
    for (uint32_t i = 0; has_moves(w) && i < w->plan->n_moves; i++) {
        struct move *m = &w->plan->moves[i];
        struct sim_agent *other, *dst;
        struct sim_event *e;

        if (m->round != w->round || (m->src != w->self && m->dst != w->self))
            continue;
        a->moves_left++;
        other = m->src == m->dst ? a : partner(s, w, m->src == w->self ? m->dst : m->src);
        if (!other)
            continue; /* it will start the move when it comes here */
        dst = m->dst == w->self ? a : other;
        e = sim_push(s, sim_between(s, 10 * US, s->transfer_max), SE_MOVE_BEGIN, dst->index, dst->life);
        e->x = dst->work_life;
        e->y = i;
    }
    if (a->moves_left == 0)
        end_in(s, a, sim_between(s, 10 * US, s->transfer_max), 0);
    else
        end_in(s, a, TRANSFER_TIMEOUT, ERR_TIMEOUT);
}

/* The slots are garbage while they are written. */
static void reload_write(struct sim *s, struct sim_agent *a, const struct work *w, bool done)
{
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t slot = 0; slot < s->slots; slot++) {
            int32_t expert = w->map->held[expert_map_at(w->map, l, w->self, slot)];
            if (expert < 0)
                continue;
            check_destroy(s, a, l, slot, "reload");
            *slot_of(s, a, l, slot) = done ? expert : SIM_GARBAGE;
        }
}

static void reload_begin(struct sim *s, struct sim_agent *a, const struct work *w)
{
    reload_write(s, a, w, false);
    end_in(s, a, sim_between(s, MS, 200 * MS), a->corrupt > 0 ? ERR_CORRUPT : 0);
    if (a->corrupt > 0)
        a->corrupt--;
}

/* Its weights hold the expert: what it says by its core's map must be what lies there. */
static bool source_lends(struct sim *s, struct sim_agent *b, const struct work *w, uint32_t layer, int32_t expert)
{
    int32_t slot = b->core ? agent_core_slot(b->core, w->model->manifest_digest, layer, (uint32_t)expert) : -1;

    if (slot >= 0 && *slot_of(s, b, layer, (uint32_t)slot) != expert)
        sim_fail(s, "promise 5: a%02u was to be read expert %d of layer %u from slot %d, which holds %d", b->index, expert,
                 layer, slot, *slot_of(s, b, layer, (uint32_t)slot));
    return slot >= 0;
}

/* Out of memory, from the own checkpoint, or from another agent's. */
static bool reload_reads(struct sim *s, struct sim_agent *a, const struct work *w, uint32_t layer, int32_t expert)
{
    for (uint32_t i = 0; i < w->n_holders; i++) {
        struct sim_agent *b = agent_of(s, &w->sources[i]);
        if (b && agent_is(b, &w->sources[i]) && b->up && source_lends(s, b, w, layer, expert)) {
            s->copies++;
            return true;
        }
    }
    if (w->load)
        return agent_can_load(s, a);
    for (uint32_t i = 0; i < w->n_sources; i++) {
        struct sim_agent *b = agent_of(s, &w->sources[i]);
        if (b && agent_is(b, &w->sources[i]) && b->up && agent_can_load(s, b)) {
            s->lends++;
            return true;
        }
    }
    return false;
}

static bool reload_end(struct sim *s, struct sim_agent *a, const struct work *w)
{
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t slot = 0; slot < s->slots; slot++) {
            int32_t expert = w->map->held[expert_map_at(w->map, l, w->self, slot)];
            if (expert >= 0 && !reload_reads(s, a, w, l, expert))
                return false;
        }
    reload_write(s, a, w, true);
    s->reloads++;
    return true;
}

static void start(struct sim *s, struct sim_agent *a)
{
    struct work *w;
    uint64_t soon = sim_between(s, 10 * US, 2 * MS);

    if (a->working || a->n_queue == 0)
        return;
    w = a->queue[0];
    a->working = true;
    a->work_life++;
    a->work_code = 0;
    if (a->fail > 0 && w->kind != WORK_RELEASE && w->kind != WORK_GROUP_DESTROY) {
        a->fail--;
        end_in(s, a, soon, ERR_IO);
        return;
    }
    switch (w->kind) {
    case WORK_GROUP: start_group(s, a, w); return;
    case WORK_WEIGHTS:
    case WORK_FILL: start_transfer(s, a, w); return;
    case WORK_LOAD: end_in(s, a, sim_between(s, MS, 20 * MS), 0); return;
    case WORK_RELOAD: reload_begin(s, a, w); return;
    default: end_in(s, a, soon, 0);
    }
}

void worker_add(struct sim *s, struct sim_agent *a, struct work *work)
{
    if (a->n_queue == sizeof a->queue / sizeof *a->queue) {
        sim_fail(s, "a%02u has %u pieces of work queued", a->index, a->n_queue);
        work_free(work);
        return;
    }
    sim_note(s, "a%02u work %" PRIu64 " kind %d op %" PRIu64 " round %u", a->index, work->id, work->kind, work->op,
             work->round);
    a->queue[a->n_queue++] = work;
    start(s, a);
}

static struct work *take(struct sim_agent *a, uint32_t i)
{
    struct work *w = a->queue[i];

    memmove(a->queue + i, a->queue + i + 1, (--a->n_queue - i) * sizeof *a->queue);
    return w;
}

void worker_stop_op(struct sim *s, struct sim_agent *a, uint64_t op)
{
    for (uint32_t i = a->n_queue; i-- > (a->working ? 1u : 0u);) {
        struct work *w = a->queue[i];
        struct sim_event *e;
        if (w->op != op || w->kind == WORK_RELEASE || w->kind == WORK_GROUP_DESTROY)
            continue;
        e = sim_push(s, sim_between(s, US, MS), SE_AGENT_CALL, a->index, a->life);
        e->call = AE_WORK_DONE;
        e->x = w->id;
        e->code = ERR_ABORTED;
        work_free(take(a, i));
    }
    if (a->working && a->queue[0]->op == op && a->queue[0]->kind != WORK_RELEASE &&
        a->queue[0]->kind != WORK_GROUP_DESTROY) {
        a->work_life++; /* its moves stop where they are */
        end_in(s, a, sim_between(s, US, MS), ERR_ABORTED);
    }
}

/* Model with the digests of what this rank loaded. */
static struct model *loaded(struct sim *s, struct sim_agent *a, const struct work *w)
{
    struct model *m = model_new(s->layers, s->logical, s->slots, 1);

    if (!m)
        return NULL;
    m->manifest = blob_new("simulated", 9);
    m->manifest_digest = 99;
    m->expert_bytes = 1000;
    m->dense_bytes = 5000;
    m->dense_digest[0] = 7;
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t slot = 0; slot < s->slots; slot++) {
            int32_t expert = w->map->held[expert_map_at(w->map, l, w->self, slot)];
            *slot_of(s, a, l, slot) = expert;
            if (expert >= 0)
                m->expert_digest[(size_t)l * s->logical + (size_t)expert] = 1 + (uint64_t)expert + 1000ull * l;
        }
    a->dense = true;
    return m;
}

static void release(struct sim *s, struct sim_agent *a)
{
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t slot = 0; slot < s->slots; slot++) {
            check_destroy(s, a, l, slot, "release");
            *slot_of(s, a, l, slot) = -1;
        }
    a->dense = false;
}

static uint64_t verify(struct sim *s, struct sim_agent *a, const struct work *w, uint64_t *ret_bad)
{
    uint64_t checked = 0;

    for (uint32_t l = 0; w->map && l < s->layers; l++)
        for (uint32_t slot = 0; slot < s->slots; slot++) {
            int32_t expert = w->map->held[expert_map_at(w->map, l, w->self, slot)];
            if (expert < 0)
                continue;
            checked++;
            *ret_bad += expert != *slot_of(s, a, l, slot);
        }
    return checked;
}

static void ended(struct sim *s, struct sim_agent *a, int code)
{
    struct work *w = take(a, 0);
    struct agent_event event = {.type = AE_WORK_DONE, .work_id = w->id, .op = w->op, .code = code,
                                .text = code ? err_code_name(code) : ""};
    struct blob *blob = NULL;
    struct model *model = NULL;
    uint64_t bad = 0;

    a->working = false;
    a->work_life++;
    if (code == 0) {
        switch (w->kind) {
        case WORK_GROUP_ID: event.blob = blob = blob_new("id", 2); break;
        case WORK_LOAD: event.model = model = loaded(s, a, w); break;
        case WORK_RELEASE: release(s, a); break;
        case WORK_RELOAD:
            if (!reload_end(s, a, w)) {
                event.code = ERR_UNREACHABLE;
                event.text = "nobody has it";
            }
            break;
        case WORK_VERIFY:
            event.value = verify(s, a, w, &bad);
            if (bad)
                event.code = ERR_CORRUPT;
            break;
        default: event.bytes = 1000;
        }
    }
    sim_note(s, "a%02u work %" PRIu64 " kind %d of op %" PRIu64 " ends: code %d", a->index, w->id, w->kind, w->op,
             event.code);
    agent_event(s, a, &event);
    blob_unref(blob);
    model_unref(model);
    work_free(w);
    if (a->up)
        start(s, a);
}

static void move_begin(struct sim *s, struct sim_agent *a, const struct sim_event *e)
{
    struct work *w = a->queue[0];
    struct move *m = &w->plan->moves[e->y];
    struct sim_event *end;

    check_destroy(s, a, m->layer, m->dst_slot, "fill");
    sim_note(s, "a%02u layer %u slot %u is being written: expert %u", a->index, m->layer, m->dst_slot, m->expert);
    *slot_of(s, a, m->layer, m->dst_slot) = SIM_GARBAGE;
    end = sim_push(s, sim_between(s, 10 * US, s->transfer_max), SE_MOVE_END, a->index, a->life);
    end->x = e->x;
    end->y = e->y;
}

static void move_count(struct sim *s, struct sim_agent *a)
{
    if (--a->moves_left == 0)
        end_in(s, a, sim_between(s, 10 * US, 500 * US), a->work_code);
}

static void move_end(struct sim *s, struct sim_agent *a, const struct sim_event *e)
{
    struct work *w = a->queue[0];
    struct move *m = &w->plan->moves[e->y];
    struct sim_agent *src = m->src == m->dst ? a : partner(s, w, m->src);
    int32_t content;

    if (!src)
        return; /* it is gone: the slot stays half written until the time-out */
    content = *slot_of(s, src, m->layer, m->src_slot);
    if (content != (int32_t)m->expert)
        sim_fail(s, "promise 5: a%02u was to send expert %u of layer %u from slot %u, which holds %d", src->index,
                 m->expert, m->layer, m->src_slot, content);
    if (a->corrupt > 0) {
        a->corrupt--;
        content = SIM_GARBAGE;
        a->work_code = ERR_CORRUPT; /* the digest does not match */
        sim_note(s, "a%02u layer %u slot %u: corrupted on the way", a->index, m->layer, m->dst_slot);
    }
    *slot_of(s, a, m->layer, m->dst_slot) = content;
    move_count(s, a);
    if (src != a)
        move_count(s, src);
}

void worker_event(struct sim *s, const struct sim_event *e)
{
    struct sim_agent *a = &s->agents[e->agent];

    if (!a->up || a->life != e->life || !a->working || a->work_life != e->x)
        return;
    switch (e->kind) {
    case SE_WORK_END: ended(s, a, e->code); return;
    case SE_MOVE_BEGIN: move_begin(s, a, e); return;
    default: move_end(s, a, e);
    }
}

void worker_clear(struct sim_agent *a)
{
    while (a->n_queue > 0)
        work_free(take(a, 0));
    a->working = false;
    a->work_life++;
}
