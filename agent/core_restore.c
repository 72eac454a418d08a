/* The state record: saved after every step, restored by the process that follows.  Part of the agent's core; pure.
 *
 *   restored --engine back (RESUMED), or given up, or there was none--> the page is made to show what the record says
 *            --> HELLO goes out: to the coordinator it is a reconnect of the same incarnation
 *
 * The record is written before the actions of its step are performed, so it may know of words of the page, of messages
 * and of work that never came to be.  Words are written again, in the order that the engine relies on; messages are said
 * again where the protocol says them again after a HELLO; work is lost, and with it the operation that it was for.  What
 * was begun and not promised (a fence) is dropped: nobody was told of it. */
#include <stdio.h>
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

/* A rank, or a leaver that still has its part in the steps below S.  Joiners hold nothing that others count on. */
static bool save_worth(const struct agent_core *core)
{
    return core->weights && core->release.state == RELEASE_NONE && core->map && core->model &&
           (core->view || core->before);
}

void agent_core_save(const struct agent_core *core, struct agent_record *ret_record)
{
    struct agent_record *r = ret_record;
    memset(r, 0, sizeof(*r));
    r->incarnation = core->config.incarnation;
    memcpy(r->id, core->config.id, strlen(core->config.id));
    r->held = save_worth(core);
    if (!r->held)
        return;
    r->engine = core->engine.attached;
    r->lease_ms = core->lease_ms;
    r->heartbeat_ms = core->heartbeat_ms;
    r->indoubt_ms = core->indoubt_ms;
    /* A PREPARE that is not answered is asked again, with the same epoch if it is a repair's. */
    r->seen_epoch = core->fence.epoch && core->fence.epoch == core->seen_epoch ? core->seen_epoch - 1 : core->seen_epoch;
    r->applied_epoch = core->applied_epoch;
    r->flipped_epoch = core->flipped_epoch;
    r->flipped_hold_ns = core->flipped_hold_ns;
    r->map_rank = core->map_rank;
    r->map_step = core->map_step;
    r->map_unacked = core->map_unacked;
    r->map_flip = core->map_flip;
    const struct core_promise *p = &core->promise;
    r->promise.epoch = p->epoch;
    r->promise.limit = p->limit;
    r->promise.next = p->next;
    r->promise.wave = p->wave;
    r->promise.kind = p->kind;
    r->promise.engine = p->engine;
    const struct core_flip *f = &core->flip;
    r->flip.epoch = f->epoch;
    r->flip.step = f->step;
    r->flip.wave = f->wave;
    r->flip.next_step = f->next_step;
    r->flip.op = f->op;
    r->flip.kind = f->kind;
    r->flip.leaver = f->leaver;
    r->run_to = core->run_to;
    r->revoked = core->revoked;
    r->attachment = core->attachment;
    r->op = agent_operation_running(core) && !core->op.decided ? core->op.op : core->left_op;
    r->torn_epoch = core->engine.torn_epoch;
    memcpy(r->why, core->engine.why, strlen(core->engine.why));
    r->view = core->view;
    r->before = core->before;
    r->map = core->map;
    r->model = core->model;
}

struct agent_core *agent_core_restore(const struct agent_config *config, const struct agent_record *r, uint64_t now_ns)
{
    struct agent_core *core = agent_core_new(config, now_ns);
    core->config.incarnation = r->incarnation;
    core->lease_ms = r->lease_ms;
    core->heartbeat_ms = r->heartbeat_ms ? r->heartbeat_ms : core->heartbeat_ms;
    core->indoubt_ms = r->indoubt_ms ? r->indoubt_ms : core->indoubt_ms;
    core->seen_epoch = r->seen_epoch;
    core->applied_epoch = r->applied_epoch;
    core->flipped_epoch = r->flipped_epoch;
    core->flipped_hold_ns = r->flipped_hold_ns;
    core->view = view_ref(r->view);
    core->before = view_ref(r->before);
    core->map = expert_map_ref(r->map);
    core->model = model_ref(r->model);
    core->map_rank = r->map_rank;
    core->map_step = r->map_step;
    core->map_unacked = r->map_unacked;
    core->map_flip = r->map_flip;
    core->promise = (struct core_promise){.epoch = r->promise.epoch,
                                          .kind = (enum flip_kind)r->promise.kind,
                                          .engine = (enum promise_engine)r->promise.engine,
                                          .limit = r->promise.limit,
                                          .next = r->promise.next,
                                          .wave = r->promise.wave};
    core->flip = (struct core_flip){.epoch = r->flip.epoch,
                                    .kind = (enum flip_kind)r->flip.kind,
                                    .step = r->flip.step,
                                    .wave = r->flip.wave,
                                    .next_step = r->flip.next_step,
                                    .op = r->flip.op,
                                    .leaver = r->flip.leaver};
    core->run_to = r->run_to;
    core->revoked = r->revoked;
    core->attachment = r->attachment;
    core->weights = core->weights_touched = true;
    core->engine.attached = r->engine;
    core->engine.torn_epoch = r->torn_epoch;
    memcpy(core->engine.why, r->why, sizeof(core->engine.why));
    core->left_op = r->op;
    core->restored = true;
    if (r->engine) {
        uint64_t lease_ns = r->lease_ms * CORE_MS;
        core->resume_ns = now_ns + (lease_ns && lease_ns / 2 < CORE_RESUME_NS ? lease_ns / 2 : CORE_RESUME_NS);
    }
    return core;
}

void agent_restore_drop_op(struct agent_core *core)
{
    if (!core->left_op)
        return;
    acore_act(core, AA_ENGINE_ABORT)->op = core->left_op;
    core->left_op = 0;
}

/* The gate as the record has it.  In a view that is revoked it stays as it is: a repair will open it; and so does that
 * of a leaver that has left. */
static void restore_gate(struct agent_core *core)
{
    const struct core_promise *p = &core->promise;
    bool promised = p->epoch && p->engine != PROMISE_JOINER && core->bug != AGENT_BUG_RESTORE_OPENS_GATE;
    if (promised)
        acore_page(core, PAGE_GATE, p->limit);
    else if (core->flip.leaver)
        acore_page(core, PAGE_GATE, core->flip.step);
    else if (core->view && core->revoked != core->applied_epoch)
        acore_page(core, PAGE_GATE, GATE_OPEN);
}

/* In the order of core_commit.c: revoked before flip_view is taken back; the flip before run_to, the gate last.  First
 * of all an engine that is given up: it may live, and must not take what follows for itself. */
static void restore_page(struct agent_core *core, bool resumed)
{
    const struct core_flip *f = &core->flip;
    if (!resumed)
        acore_page(core, PAGE_ATTACHMENT, ++core->attachment);
    if (core->revoked)
        acore_page(core, PAGE_REVOKED, core->revoked);
    if (f->epoch) {
        if (f->next_step)
            acore_page(core, PAGE_NEXT_STEP, f->next_step);
        acore_page(core, PAGE_FLIP_WAVE, f->wave);
        acore_page(core, PAGE_FLIP_STEP, f->step);
        acore_page(core, PAGE_FLIP_VIEW, f->epoch);
    } else if (core->view && core->revoked == core->applied_epoch) {
        acore_page(core, PAGE_FLIP_VIEW, core->page.cur_view);
    }
    if (core->run_to)
        acore_page(core, PAGE_RUN_TO, core->run_to);
    acore_page(core, PAGE_NOTIFY_DONE, 0);
    restore_gate(core);
    acore_act(core, AA_WAKE);
}

static void restore_end(struct agent_core *core, bool resumed, const char *engine)
{
    core->resume_ns = CORE_NEVER;
    core->restored = false;
    if (!core->promise.epoch)
        agent_restore_drop_op(core);
    restore_page(core, resumed);
    acore_log(core, AGENT_LOG_INFO, "re-adopted: epoch %llu, map %llu, rank %u%s, engine %s", U(core->applied_epoch),
              U(core->map->version), core->map_rank, core->view ? "" : " (leaving)", engine);
    acore_hello(core);
}

void agent_restore_resumed(struct agent_core *core, const struct agent_event *event)
{
    if (!core->restored || !core->engine.attached) {
        acore_say(core, AA_ENGINE_DETACH, "its agent has given it up: attach anew");
        return;
    }
    agent_engine_take(core, event);
    struct agent_action *a = acore_act(core, AA_ENGINE_RESUME);
    a->epoch = core->applied_epoch;
    agent_engine_lease(core);
    if (core->revoked && core->revoked == core->applied_epoch) {
        a = acore_act(core, AA_ENGINE_REVOKE);
        a->epoch = core->revoked;
        snprintf(a->text, sizeof(a->text), "revoked before its agent was re-adopted");
    }
    agent_engine_catch_up(core, event->epoch, event->regions);
    restore_end(core, true, "resumed");
}

static void restore_give_up(struct agent_core *core, const char *why)
{
    core->restored = false;
    agent_engine_gone(core, why);
    restore_end(core, false, "lost");
}

void agent_restore_overtaken(struct agent_core *core, const char *why)
{
    if (core->restored && core->engine.attached)
        restore_give_up(core, why);
}

void agent_restore_check(struct agent_core *core)
{
    if (!core->restored)
        return;
    if (!core->engine.attached)
        restore_end(core, false, "none");
    else if (core->now_ns >= core->resume_ns)
        restore_give_up(core, "it did not come back to its re-adopted agent");
}
