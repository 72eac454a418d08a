/* Promise and go, the agent's side.  Part of the agent's core; pure.  The protocol is that of docs/protocol.md.
 *
 *                PREPARE           intent < gate          GO                 engine begins S in the new view
 *   nothing -----------> FENCE_GATE ------------> promised ----> flip pending ------------------------> FLIPPED
 *                          | RESET   ^               | ABORT                  (leaver: is at boundary S)
 *                          v         | out of step   v
 *                        FENCE_LEAVE-+             nothing
 *
 * The order of the page's words matters; what the engine relies on:
 *   gate is written, then intent is read; a promise is given only when intent < gate
 *   next_step, flip_wave, flip_step before flip_view, flip_view before run_to, run_to before gate
 *   revoked before flip_view is taken back */
#include <stdio.h>
#include <string.h>

#include "agent/core_internal.h"

#define U(x) ((unsigned long long)(x))

struct view *agent_commit_view_now(const struct agent_core *core)
{
    return core->flip.epoch ? core->before : core->view;
}

static bool commit_engine_idle(const struct agent_core *core)
{
    return core->page.engine_state == PAGE_ENGINE_IDLE || core->page.engine_state == PAGE_ENGINE_NONE;
}

/* A spare has nothing at stake; a leaver has, until it has let go. */
enum promise_engine agent_commit_engine(const struct agent_core *core)
{
    if (!core->view && !core->before)
        return PROMISE_JOINER;
    if (!core->engine.attached)
        return PROMISE_DETACHED;
    return commit_engine_idle(core) ? PROMISE_IDLE : PROMISE_RUNNING;
}

static const char *commit_kind_name(enum flip_kind kind)
{
    return kind == FLIP_VIEW ? "view" : kind == FLIP_MAP ? "map" : "RESET";
}

/* ---- promise ---- */

static void commit_send_promise(struct agent_core *core)
{
    struct msg *m = acore_send(core, MSG_PROMISE);
    if (!m)
        return;
    m->promise.epoch = core->promise.epoch;
    m->promise.incarnation = core->config.incarnation;
    m->promise.limit = core->promise.limit;
    m->promise.next = core->promise.next;
    m->promise.wave = core->promise.wave;
    m->promise.engine = core->promise.engine;
}

static void commit_refuse(struct agent_core *core, uint64_t epoch, const char *why)
{
    acore_log(core, AGENT_LOG_WARN, "refuses epoch %llu: %s", U(epoch), why);
    struct msg *m = acore_send(core, MSG_REFUSE);
    if (!m)
        return;
    m->refuse.epoch = epoch;
    snprintf(m->refuse.why, sizeof(m->refuse.why), "%s", why);
}

static void commit_promise(struct agent_core *core, enum promise_engine engine, uint64_t limit)
{
    struct core_promise *p = &core->promise;
    bool joiner = engine == PROMISE_JOINER;
    p->epoch = core->fence.epoch;
    p->kind = core->fence.kind;
    p->engine = engine;
    p->limit = limit;
    p->next = joiner ? 0 : core->page.intent + 1;
    p->wave = joiner ? 0 : core->page.wave;
    core->fence.state = FENCE_NONE;
    core->fence.epoch = 0;
    acore_log(core, AGENT_LOG_INFO, "PROMISE epoch %llu op %llu: no step from %llu on is begun (%s, next step %llu)",
              U(p->epoch), U(core->op.op), U(limit),
              joiner                       ? "joiner"
              : engine == PROMISE_DETACHED ? "no engine"
              : engine == PROMISE_IDLE     ? "idle"
                                           : "at work",
              U(p->next));
    commit_send_promise(core);
}

static uint64_t commit_lead_steps(const struct agent_core *core, uint32_t lead_ms)
{
    uint64_t k = core->config.lead_steps_min ? core->config.lead_steps_min : 2;
    uint64_t step_ns = core->page.step_ns_min;
    if (step_ns) {
        uint64_t steps = (lead_ms * CORE_MS + step_ns - 1) / step_ns;
        k = steps > k ? steps : k;
    }
    return k < CORE_LEAD_STEPS_MAX ? k : CORE_LEAD_STEPS_MAX;
}

/* Shuts the gate `lead` steps ahead of the snapshot.  It is the last action of its step, so that the next event brings
 * a snapshot taken after the store. */
static void commit_shut_gate(struct agent_core *core, uint64_t lead)
{
    core->fence.limit = core->page.intent + 1 + lead;
    core->fence.state = FENCE_GATE;
    acore_page(core, PAGE_GATE, core->fence.limit);
    core->out->v[core->out->n - 1].want_page = true;
}

static void commit_check_left(struct agent_core *core)
{
    struct core_fence *f = &core->fence;
    if (f->state != FENCE_LEAVE)
        return;
    bool out = f->left || !core->engine.attached || core->page.done >= core->page.intent ||
               core->page.engine_state == PAGE_ENGINE_HELD || commit_engine_idle(core);
    if (!out && core->now_ns >= f->deadline_ns) {
        f->state = FENCE_NONE; /* engine_cut comes back here */
        agent_engine_cut(core, "it did not leave a step that was revoked");
        f->state = FENCE_LEAVE;
        out = true;
    }
    if (!out)
        return;
    commit_promise(core,
                   !core->engine.attached     ? PROMISE_DETACHED
                   : commit_engine_idle(core) ? PROMISE_IDLE
                                              : PROMISE_RUNNING,
                   f->limit);
}

static void commit_gated(struct agent_core *core)
{
    struct core_fence *f = &core->fence;
    if (f->kind == FLIP_RESET) {
        uint64_t limit_ns = core->config.step_limit_ns ? core->config.step_limit_ns : 5000 * CORE_MS;
        f->state = FENCE_LEAVE;
        f->deadline_ns = core->now_ns + limit_ns;
        commit_check_left(core);
        return;
    }
    commit_promise(core, agent_commit_engine(core), f->limit);
}

void agent_commit_event(struct agent_core *core)
{
    if (core->fence.state == FENCE_GATE) {
        if (core->page.intent >= core->fence.limit) {
            commit_shut_gate(core, core->fence.lead_steps);
            return;
        }
        commit_gated(core);
        return;
    }
    commit_check_left(core);
}

void agent_commit_left_step(struct agent_core *core, uint64_t step)
{
    if (core->fence.state == FENCE_LEAVE && step >= core->page.intent)
        core->fence.left = true;
    commit_check_left(core);
}

static const char *commit_objection(const struct agent_core *core, const struct msg_prepare *m)
{
    bool member = acore_member(core), joiner = !member && core->joining;
    if (core->flip.epoch)
        return "the flip of an earlier epoch is not applied yet";
    if (core->promise.epoch || core->fence.epoch)
        return "a promise for another epoch is outstanding";
    if (!member && (!joiner || m->kind != FLIP_VIEW))
        return "this agent is no member of the view";
    if (m->kind != FLIP_VIEW)
        return NULL;
    if (!agent_operation_running(core) || core->op.op != m->op)
        return "this agent is in no such operation";
    if (core->op.role != ROLE_REMOVING && !core->op.prepared)
        return "the engine has not prepared the new view";
    return NULL;
}

/* Repair: whatever was under way is overtaken, the engine leaves its step, and nothing runs until a repair commits. */
static void commit_prepare_reset(struct agent_core *core, const struct msg_prepare *m)
{
    if (agent_operation_running(core) && core->op.op != m->op)
        agent_operation_overtaken(core, m->op, true);
    else if (agent_operation_running(core))
        agent_operation_move(core, ME_ENGINE_PREPARE);
    acore_log(core, AGENT_LOG_WARN, "RESET epoch %llu op %llu: leaves step %llu of epoch %llu", U(m->epoch), U(m->op),
              U(core->page.intent), U(core->applied_epoch));
    memset(&core->promise, 0, sizeof(core->promise));
    agent_restore_drop_op(core);
    agent_engine_revoke(core, "a member of the view is lost");
    /* Should this repair be given up (another rank is lost), and the coordinator forget of it: the view stays torn. */
    core->engine.torn_epoch = core->applied_epoch;
    if (core->engine.attached)
        snprintf(core->engine.why, sizeof(core->engine.why), "its step was revoked for a repair that is not committed");
    if (core->flip.epoch) {
        acore_page(core, PAGE_FLIP_VIEW, core->page.cur_view);
        acore_log(core, AGENT_LOG_WARN, "the flip to epoch %llu is dropped", U(core->flip.epoch));
        memset(&core->flip, 0, sizeof(core->flip));
        view_unref(core->before);
        core->before = NULL;
    }
    acore_act(core, AA_WAKE);
    core->fence.lead_steps = 0;
    commit_shut_gate(core, 0);
}

void agent_commit_prepare(struct agent_core *core, const struct msg_prepare *m)
{
    struct core_fence *f = &core->fence;
    if (core->promise.epoch == m->epoch) {
        commit_send_promise(core);
        return;
    }
    if (f->epoch == m->epoch || m->epoch <= core->applied_epoch)
        return; /* being worked on; or decided long ago */
    if (m->kind < FLIP_VIEW || m->kind > FLIP_RESET) {
        acore_illegal(core, "PREPARE of epoch %llu with unknown kind %u", U(m->epoch), m->kind);
        return;
    }
    if (m->epoch <= core->seen_epoch) {
        commit_refuse(core, m->epoch, "the epoch is stale");
        return;
    }
    core->seen_epoch = m->epoch;
    const char *objection = m->kind == FLIP_RESET
                                ? (acore_member(core) ? NULL : "this agent is no member of the view")
                                : commit_objection(core, m);
    if (objection) {
        commit_refuse(core, m->epoch, objection);
        return;
    }
    memset(f, 0, sizeof(*f));
    f->epoch = m->epoch;
    f->kind = (enum flip_kind)m->kind;
    if (f->kind == FLIP_RESET) {
        commit_prepare_reset(core, m);
    } else if (!acore_member(core)) {
        commit_promise(core, PROMISE_JOINER, 0);
        return;
    } else {
        f->lead_steps = commit_lead_steps(core, m->lead_ms);
        bool quiet = commit_engine_idle(core) || !core->engine.attached;
        commit_shut_gate(core, quiet ? 0 : f->lead_steps);
    }
    if (core->bug == AGENT_BUG_NO_REREAD) {
        core->out->v[core->out->n - 1].want_page = false;
        commit_gated(core);
    }
}

void agent_commit_abort(struct agent_core *core, const struct msg_abort *m)
{
    if (m->epoch && m->epoch == core->applied_epoch) {
        acore_illegal(core, "ABORT for epoch %llu, whose GO was taken", U(m->epoch));
        return;
    }
    if (core->seen_epoch < m->epoch)
        core->seen_epoch = m->epoch;
    bool fenced = core->fence.epoch == m->epoch, promised = core->promise.epoch == m->epoch;
    if (!m->epoch || (!fenced && !promised))
        return;
    enum flip_kind kind = fenced ? core->fence.kind : core->promise.kind;
    /* After a RESET the view is torn: the gate stays shut until a repair commits. */
    bool gated = (fenced || core->promise.engine != PROMISE_JOINER) && kind != FLIP_RESET;
    memset(fenced ? (void *)&core->fence : (void *)&core->promise, 0,
           fenced ? sizeof(core->fence) : sizeof(core->promise));
    acore_log(core, AGENT_LOG_INFO, "ABORT epoch %llu op %llu: %s", U(m->epoch), U(core->op.op),
              kind == FLIP_RESET ? "the gate stays shut until a repair commits" : "serves on as before");
    if (gated) {
        acore_page(core, PAGE_GATE, GATE_OPEN);
        acore_act(core, AA_WAKE);
    }
    agent_operation_unpromised(core);
    agent_restore_drop_op(core);
}

/* ---- go ---- */

/* The view with the map as it is now, which MAP may have changed since the view was made. */
static struct view *commit_view_with_map(const struct agent_core *core)
{
    struct view *view = core->view ? view_copy(core->view) : NULL;
    if (!view || !core->map)
        return view;
    expert_map_unref(view->map);
    view->map = expert_map_ref(core->map);
    return view;
}

/* core->view, before, map: from GO on the new ones, with the old view kept until the engine has flipped. */
static void commit_adopt_view(struct agent_core *core, struct view *view, bool leaver)
{
    view_unref(core->before);
    core->before = commit_view_with_map(core);
    view_unref(core->view);
    core->view = leaver ? NULL : view_ref(view);
    if (leaver)
        return; /* the map stays: the weights are there until DISMISS */
    expert_map_unref(core->map);
    core->map = expert_map_ref(view->map);
    core->map_rank = (uint32_t)view_rank(view, core->config.id);
    core->map_unacked = 0;
    core->map_flip = view->map->version;
    core->joining = false;
}

static void commit_write_flip(struct agent_core *core, const struct msg_go *m, bool joiner, bool leaver)
{
    uint64_t run_to = leaver ? m->step : m->step + 1;
    uint64_t gate = leaver ? m->step : GATE_OPEN;
    bool next_boundary = core->bug == AGENT_BUG_GO_NEXT_BOUNDARY && !joiner;
    if (core->bug == AGENT_BUG_GATE_BEFORE_FLIP)
        acore_page(core, PAGE_GATE, gate);
    if (core->flip.next_step)
        acore_page(core, PAGE_NEXT_STEP, core->flip.next_step);
    acore_page(core, PAGE_FLIP_WAVE, m->wave);
    acore_page(core, PAGE_FLIP_STEP, next_boundary ? core->page.intent + 1 : m->step);
    acore_page(core, PAGE_FLIP_VIEW, m->epoch);
    if (run_to > core->run_to && core->bug != AGENT_BUG_RUN_TO_NOT_RAISED) {
        core->run_to = run_to;
        acore_page(core, PAGE_RUN_TO, run_to);
    }
    if (core->bug != AGENT_BUG_GATE_BEFORE_FLIP)
        acore_page(core, PAGE_GATE, gate);
    acore_act(core, AA_WAKE);
}

static const char *commit_go_objection(const struct agent_core *core, const struct msg_go *m, int rank)
{
    if (core->promise.epoch != m->epoch)
        return "it was not promised";
    if (m->step < core->promise.limit)
        return "its step is below the promise";
    if (!m->view || m->view->epoch != m->epoch || !m->view->map || m->view->map->ranks != m->view->n)
        return "its view is not of that epoch";
    if (rank < 0 && !acore_member(core))
        return "this agent is neither in the old view nor in the new one";
    if (rank >= 0 && m->view->members[rank].incarnation != core->config.incarnation)
        return "its view names another incarnation of this agent";
    if (!acore_member(core) && !core->joining)
        return "this agent is not joining";
    if (m->step == UINT64_MAX || m->kind != core->promise.kind)
        return "it is not the kind of flip that was promised";
    return NULL;
}

void agent_commit_go(struct agent_core *core, const struct msg_go *m)
{
    if (m->epoch <= core->applied_epoch) {
        if (core->bug == AGENT_BUG_DUPLICATE_GO_OPENS_GATE)
            acore_page(core, PAGE_GATE, GATE_OPEN);
        if (m->epoch == core->flipped_epoch)
            agent_commit_repeat_flipped(core);
        return;
    }
    int rank = view_rank(m->view, core->config.id);
    if (m->kind == FLIP_RESET && rank < 0 && acore_member(core) && core->promise.epoch != m->epoch) {
        /* A repair that did not ask us, since we were out of reach: the view has gone on, and nothing here counts. */
        struct msg_op_end out = {.op = m->op, .epoch = m->epoch};
        agent_release_dismiss(core, &out);
        return;
    }
    const char *objection = commit_go_objection(core, m, rank);
    if (objection) {
        acore_illegal(core, "GO of epoch %llu at step %llu: %s", U(m->epoch), U(m->step), objection);
        return;
    }
    bool joiner = !acore_member(core), leaver = rank < 0;
    acore_log(core, AGENT_LOG_INFO, "GO epoch %llu op %llu: %s flip at step %llu, wave %llu, %s of %u ranks",
              U(m->epoch), U(m->op), commit_kind_name((enum flip_kind)m->kind), U(m->step), U(m->wave),
              leaver   ? "leaves the view"
              : joiner ? "joins the view"
                       : "stays in the view",
              m->view->n);
    commit_adopt_view(core, m->view, leaver);
    if (!leaver)
        core->map_step = m->step;
    memset(&core->promise, 0, sizeof(core->promise));
    core->applied_epoch = m->epoch;
    if (core->seen_epoch < m->epoch)
        core->seen_epoch = m->epoch;
    core->left_op = 0;
    core->flip = (struct core_flip){.epoch = m->epoch,
                                    .kind = (enum flip_kind)m->kind,
                                    .step = m->step,
                                    .wave = m->wave,
                                    .next_step = joiner || m->kind == FLIP_RESET ? m->step : 0,
                                    .op = m->op,
                                    .leaver = leaver};
    if (agent_operation_running(core) && core->op.op == m->op) {
        core->op.decided |= m->kind != FLIP_MAP;
        if (m->kind == FLIP_MAP && agent_operation_may(core, ME_RESHUFFLE))
            agent_operation_move(core, ME_RESHUFFLE);
    }
    struct agent_action *a = acore_act(core, AA_ENGINE_COMMIT);
    a->view = view_ref(m->view);
    a->value = m->step;
    a->epoch = m->epoch;
    a->op = m->op;
    commit_write_flip(core, m, joiner, leaver);
}

/* ---- flipped ---- */

void agent_commit_repeat_flipped(struct agent_core *core)
{
    struct msg *m = acore_send(core, MSG_FLIPPED);
    if (!m)
        return;
    m->flipped.epoch = core->flipped_epoch;
    m->flipped.hold_ns = core->flipped_hold_ns;
}

bool agent_commit_flip_done(const struct agent_core *core)
{
    const struct core_flip *f = &core->flip;
    const struct page_snapshot *page = &core->page;
    if (f->leaver)
        return !core->engine.attached || (page->done + 1 >= f->step && page->intent < f->step);
    if (core->bug == AGENT_BUG_EARLY_FLIPPED && page->intent + 1 >= f->step)
        return true;
    return page->cur_view == f->epoch;
}

void agent_commit_check_flip(struct agent_core *core)
{
    struct core_flip f = core->flip;
    if (!f.epoch || !agent_commit_flip_done(core))
        return;
    memset(&core->flip, 0, sizeof(core->flip));
    core->flipped_epoch = f.epoch;
    core->flipped_hold_ns = f.leaver ? 0 : core->page.last_hold_ns;
    if (!f.leaver) {
        view_unref(core->before);
        core->before = NULL;
    }
    acore_log(core, AGENT_LOG_INFO, "FLIPPED epoch %llu op %llu: %s step %llu; held %llu us", U(f.epoch), U(f.op),
              f.leaver ? "out of the view at" : "the new view is in use since", U(f.step),
              U(core->flipped_hold_ns / 1000));
    agent_commit_repeat_flipped(core);
    if (f.kind != FLIP_MAP)
        agent_operation_flipped(core, f.op);
}

/* ---- in doubt ---- */

/* The coordinator is gone, and a promise holds the engine: after a while it is cut off.  It never runs on alone. */
void agent_commit_check_doubt(struct agent_core *core)
{
    bool alone = core->promise.epoch && core->promise.engine != PROMISE_JOINER && !core->welcomed;
    core->doubt_ns = CORE_NEVER;
    if (!alone || !core->engine.attached)
        return;
    uint64_t at = core->alone_since_ns + core->indoubt_ms * CORE_MS;
    if (core->now_ns < at) {
        core->doubt_ns = at;
        return;
    }
    core->doubt_ns = core->now_ns + CORE_DOUBT_TICK_NS; /* not held yet: work may still come */
    if (core->page.engine_state != PAGE_ENGINE_HELD)
        return;
    acore_log(core, AGENT_LOG_ERROR, "in doubt about epoch %llu for %u ms without a coordinator",
              U(core->promise.epoch), core->indoubt_ms);
    if (core->bug == AGENT_BUG_HOLD_TIMES_OUT) {
        memset(&core->promise, 0, sizeof(core->promise));
        acore_page(core, PAGE_GATE, GATE_OPEN);
        acore_act(core, AA_WAKE);
        return;
    }
    agent_engine_cut(core, "held in doubt for too long without a coordinator");
    core->doubt_ns = CORE_NEVER;
}
