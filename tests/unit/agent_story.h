/* Tells the agent's core a story and writes down what it does, one action a line.
 *
 * A test feeds events and asserts the text of the trace: it reads as the protocol.  The page is a real one; its stores
 * are performed in order, and an action that wants the page read again is answered at once, as the daemon does.
 * Included by one test program each; one thread. */
#ifndef EEP_TESTS_AGENT_STORY_H
#define EEP_TESTS_AGENT_STORY_H

#include <check.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/core.h"
#include "tests/harness/suite.h"

#define STORY_MS 1000000ULL
#define STORY_TRACE 16384
#define ME_INCARNATION 77

struct story {
    struct agent_core *core;
    struct control_page page;
    uint64_t now;
    uint64_t overtake;      /* the engine announces this step right after the next store to the gate; 0 = it does not */
    bool logs;              /* also trace what is logged */
    uint64_t last_work;     /* id of the last work handed out */
    struct agent_actions actions[4];
    unsigned depth;
    size_t len;
    char trace[STORY_TRACE];
};

static inline void story_say(struct story *s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static inline void story_say(struct story *s, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(s->trace + s->len, sizeof(s->trace) - s->len, fmt, args);
    va_end(args);
    ck_assert(n >= 0 && s->len + (size_t)n + 1 < sizeof(s->trace));
    s->len += (size_t)n;
    s->trace[s->len++] = '\n';
    s->trace[s->len] = '\0';
}

static inline const char *story_engine(uint32_t engine)
{
    static const char *const names[] = {"joiner", "detached", "idle", "running"};
    return names[engine];
}

static inline void story_hello(struct story *s, const struct msg_hello *h)
{
    char promise[96] = "";
    if (h->promised_epoch)
        snprintf(promise, sizeof(promise), " promised %" PRIu64 " limit %" PRIu64, h->promised_epoch, h->limit);
    story_say(s, "send HELLO op %" PRIu64 " applied %" PRIu64 "%s next %" PRIu64 " map %" PRIu64 " %s%s", h->op,
              h->applied_epoch, promise, h->next, h->map_version, story_engine(h->engine),
              h->dispatch ? " attached" : "");
}

static inline void story_stage_done(struct story *s, const struct msg_stage_done *d)
{
    char more[96] = "";
    if (d->value)
        snprintf(more, sizeof(more), d->value == NO_LIMIT ? " value no limit" : " value %" PRIu64, d->value);
    else if (d->bytes)
        snprintf(more, sizeof(more), " bytes %" PRIu64, d->bytes);
    story_say(s, "send STAGE_DONE %s round %u%s%s%s%s%s%s", op_stage_name((enum op_stage)d->stage), d->round,
              d->code ? " " : "", d->code ? err_code_name(d->code) : "", d->text[0] ? ": " : "", d->text, more,
              d->blob    ? " with id"
              : d->model ? " with model"
                         : "");
}

static inline void story_send(struct story *s, const struct msg *m)
{
    switch (m->type) {
    case MSG_HELLO: story_hello(s, &m->hello); return;
    case MSG_STAGE_DONE: story_stage_done(s, &m->stage_done); return;
    case MSG_PROMISE:
        ck_assert_uint_eq(m->promise.incarnation, ME_INCARNATION);
        story_say(s, "send PROMISE %" PRIu64 " limit %" PRIu64 " next %" PRIu64 " wave %" PRIu64 " %s",
                  m->promise.epoch, m->promise.limit, m->promise.next, m->promise.wave,
                  story_engine(m->promise.engine));
        return;
    case MSG_REFUSE: story_say(s, "send REFUSE %" PRIu64 ": %s", m->refuse.epoch, m->refuse.why); return;
    case MSG_FLIPPED:
        story_say(s, "send FLIPPED %" PRIu64 " held %" PRIu64 " ns", m->flipped.epoch, m->flipped.hold_ns);
        return;
    case MSG_MAP_ACK:
        story_say(s, "send MAP_ACK %" PRIu64 " from step %" PRIu64, m->map_ack.version, m->map_ack.step);
        return;
    case MSG_ENGINE:
        if (m->engine.attached && m->engine.torn_epoch)
            story_say(s, "send ENGINE attached %s epoch %" PRIu64 " is torn: %s", m->engine.endpoint,
                      m->engine.torn_epoch, m->engine.why);
        else
            story_say(s, "send ENGINE %s%s", m->engine.attached ? "attached " : "gone: ",
                      m->engine.attached ? m->engine.endpoint : m->engine.why);
        return;
    case MSG_PROGRESS: story_say(s, "send PROGRESS %" PRIu64, m->progress.bytes); return;
    case MSG_VERIFIED:
        story_say(s, "send VERIFIED %" PRIu64 " slots %" PRIu64 " bad %" PRIu64 " %s", m->verified.request,
                  m->verified.slots, m->verified.bad, m->verified.text);
        return;
    default: story_say(s, "send %s", msg_type_name(m->type)); return;
    }
}

static inline const char *story_work(enum work_kind kind)
{
    static const char *const names[] = {"?",       "ALLOCATE", "LOAD",          "GROUP_ID", "GROUP",
                                        "WEIGHTS", "FILL",     "GROUP_DESTROY", "RELEASE",  "VERIFY", "RELOAD"};
    return names[kind];
}

static inline void story_page(struct story *s, const struct agent_action *a)
{
    char value[32];
    snprintf(value, sizeof(value), a->value == GATE_OPEN ? "open" : "%" PRIu64, a->value);
    story_say(s, "page %s = %s", page_word_name(a->word), value);
    page_store(&s->page, a->word, a->value);
    if (a->word == PAGE_GATE && s->overtake) {
        s->page.intent = s->overtake;
        s->overtake = 0;
    }
}

static inline void story_action(struct story *s, const struct agent_action *a)
{
    switch (a->type) {
    case AA_SEND: story_send(s, &a->msg); return;
    case AA_PAGE: story_page(s, a); return;
    case AA_WAKE: story_say(s, "wake"); return;
    case AA_WORK:
        s->last_work = a->work.id;
        if (a->work.kind == WORK_WEIGHTS)
            story_say(s, "work WEIGHTS self %u of %u, dense from the first %u", a->work.self, a->work.n,
                      a->work.dense_from);
        else if (a->work.kind == WORK_FILL)
            story_say(s, "work FILL round %u", a->work.round);
        else
            story_say(s, "work %s", story_work(a->work.kind));
        return;
    case AA_WORK_CANCEL: story_say(s, "cancel work of op %" PRIu64, a->op); return;
    case AA_ENGINE_PREPARE:
        story_say(s, "engine: prepare op %" PRIu64 " attempt %" PRIu64 " within %" PRIu64 " ms", a->op, a->attempt, a->value);
        return;
    case AA_ENGINE_COMMIT:
        story_say(s, "engine: commit view %" PRIu64 " at step %" PRIu64 ", rank %d, map %" PRIu64, a->view->epoch,
                  a->value, view_rank(a->view, "me"), a->view->map->version);
        return;
    case AA_ENGINE_ABORT: story_say(s, "engine: abort op %" PRIu64, a->op); return;
    case AA_ENGINE_MAP: story_say(s, "engine: map %" PRIu64, a->map->version); return;
    case AA_ENGINE_DRAIN: story_say(s, "engine: drain within %" PRIu64 " ms", a->value); return;
    case AA_ENGINE_REVOKE: story_say(s, "engine: revoke %" PRIu64, a->epoch); return;
    case AA_ENGINE_REGIONS: story_say(s, "engine: regions"); return;
    case AA_ENGINE_RELEASE: story_say(s, "engine: release"); return;
    case AA_ENGINE_LOAD: story_say(s, "engine: load as party %u", a->self); return;
    case AA_ENGINE_DETACH: story_say(s, "engine: detach, %s", a->text); return;
    case AA_ENGINE_LEASE: return; /* no part of the story */
    case AA_ENGINE_RESUME: story_say(s, "engine: resumed in view %" PRIu64, a->epoch); return;
    case AA_PEER_WAVE: story_say(s, "peers: wave in view %" PRIu64 " from step %" PRIu64, a->epoch, a->value); return;
    case AA_TRANSITION:
        story_say(s, "%s: %s --%s--> %s", op_role_name(a->role), machine_state_name(a->from),
                  machine_event_name(a->event), machine_state_name(a->to));
        return;
    case AA_LOG:
        if (s->logs)
            story_say(s, "log: %s", a->text);
        return;
    case AA_RECONNECT: story_say(s, "reconnect"); return;
    case AA_EXIT: story_say(s, "exit %" PRIu64, a->value); return;
    }
}

/* ---- events ---- */

static inline void story_event(struct story *s, struct agent_event *event)
{
    struct agent_actions *actions = &s->actions[s->depth++];
    ck_assert_uint_lt(s->depth, 4);
    memset(&event->page, 0, sizeof(event->page));
    page_read(&s->page, &event->page);
    agent_core_step(s->core, s->now, event, actions);
    for (size_t i = 0; i < actions->n; i++) {
        bool look = actions->v[i].want_page;
        story_action(s, &actions->v[i]);
        if (look) {
            struct agent_event again = {.type = AE_PAGE};
            story_event(s, &again);
        }
    }
    agent_actions_clear(actions);
    s->depth--;
}

static inline void story_happens(struct story *s, enum agent_event_type type)
{
    struct agent_event event = {.type = type};
    story_event(s, &event);
}

/* Takes over what the message owns. */
static inline void story_told(struct story *s, struct msg *m)
{
    struct agent_event event = {.type = AE_MSG, .msg = m};
    story_event(s, &event);
    msg_done(m);
}

static inline void story_work_done(struct story *s, int code, const char *text)
{
    struct agent_event event = {
        .type = AE_WORK_DONE, .work_id = s->last_work, .code = code, .text = text, .bytes = 100};
    story_event(s, &event);
}

static inline void story_attach(struct story *s)
{
    struct agent_event event = {.type = AE_ENGINE_ATTACHED, .dispatch = DISPATCH_SOURCE_ROUTED, .endpoint = "tcp:1",
                                .kv_bytes = 4096};
    s->page.engine_state = PAGE_ENGINE_IDLE;
    story_event(s, &event);
}

static inline void story_detach(struct story *s)
{
    struct agent_event event = {.type = AE_ENGINE_DETACHED, .text = "killed"};
    story_event(s, &event);
}

static inline void story_prepared(struct story *s, uint64_t op, uint64_t attempt)
{
    struct agent_event event = {.type = AE_ENGINE_PREPARED, .op = op, .attempt = attempt};
    story_event(s, &event);
}

static inline void story_passes(struct story *s, uint64_t ms)
{
    s->now += ms * STORY_MS;
    story_happens(s, AE_TICK);
}

/* The trace since the last time, which must be exactly this. */
static inline void story_expect(struct story *s, const char *text)
{
    ck_assert_msg(strcmp(s->trace, text) == 0, "\n--- expected\n%s--- happened\n%s", text, s->trace);
    s->len = 0;
    s->trace[0] = '\0';
}

static inline void story_forget(struct story *s)
{
    s->len = 0;
    s->trace[0] = '\0';
}

/* ---- things ---- */

static inline struct member *story_members(uint32_t n, uint32_t me)
{
    struct member *v = calloc(n, sizeof(*v));
    for (uint32_t i = 0; i < n; i++) {
        snprintf(v[i].id, sizeof(v[i].id), "gpu%u", i);
        v[i].incarnation = 100 + i;
        v[i].serving = true;
    }
    if (me < n) {
        snprintf(v[me].id, sizeof(v[me].id), "me");
        v[me].incarnation = ME_INCARNATION;
    }
    return v;
}

#define NOT_IN_IT UINT32_MAX
/* A view of n ranks, this agent at rank me, one layer, 2 experts, 2 slots. */
static inline struct view *story_view(uint64_t epoch, uint32_t n, uint32_t me, uint64_t version)
{
    struct view *view = view_new(n);
    struct member *members = story_members(n, me);
    memcpy(view->members, members, n * sizeof(*members));
    free(members);
    view->epoch = epoch;
    view->map = expert_map_new(1, 2, n, 2);
    view->map->version = version;
    return view;
}

/* Before a story begins: its agent has a checkpoint. */
static bool story_can_load;

static inline struct story *story_new(void)
{
    struct story *s = calloc(1, sizeof(*s));
    struct agent_config config = {.id = "me", .incarnation = ME_INCARNATION, .slots = 2, .lead_steps_min = 2, .can_load = story_can_load,
                                  .step_limit_ns = 5000 * STORY_MS};
    s->now = 1000 * STORY_MS;
    s->core = agent_core_new(&config, s->now);
    page_init(&s->page);
    return s;
}

static inline void story_free(struct story *s)
{
    agent_core_free(s->core);
    for (size_t i = 0; i < 4; i++)
        agent_actions_done(&s->actions[i]);
    free(s);
}

/* ---- what the coordinator says ---- */

static inline void story_link(struct story *s)
{
    struct msg m = {.type = MSG_WELCOME, .welcome = {.heartbeat_ms = 500, .indoubt_ms = 30000, .lease_ms = 3000}};
    story_happens(s, AE_LINK_UP);
    story_told(s, &m);
}

static inline void story_op_begin(struct story *s, uint64_t op, enum op_kind kind, enum op_role role, uint32_t n,
                                  uint32_t n_old, uint32_t self)
{
    struct msg m = {.type = MSG_OP_BEGIN,
                    .op_begin = {.op = op, .kind = kind, .role = role, .n = n, .n_old = n_old, .self = self}};
    m.op_begin.parties = story_members(n, self);
    m.op_begin.model = kind == OP_START ? NULL : model_new(1, 2, 2, 0);
    story_told(s, &m);
}

static inline struct plan *story_plan(uint32_t parties)
{
    struct plan *plan = plan_new(parties, 0, 0);
    if (!plan->target)
        plan->target = expert_map_new(1, 2, parties, 2);
    return plan;
}

static inline struct msg story_stage_msg(uint64_t op, enum op_stage stage, uint64_t attempt)
{
    struct msg m = {.type = MSG_STAGE, .stage = {.op = op, .stage = stage, .attempt = attempt, .deadline_ms = 1000}};
    return m;
}

static inline void story_stage(struct story *s, uint64_t op, enum op_stage stage, uint64_t attempt)
{
    struct msg m = story_stage_msg(op, stage, attempt);
    if (stage == STAGE_GROUP)
        m.stage.blob = blob_new("id", 2);
    if (stage == STAGE_ENGINE_PREPARE)
        m.stage.view = story_view(0, 3, 0, 1);
    story_told(s, &m);
}

static inline void story_mapping(struct story *s, uint64_t op, uint32_t parties)
{
    struct msg m = story_stage_msg(op, STAGE_MAPPING, 1);
    m.stage.plan = story_plan(parties);
    m.stage.plan_digest = expert_map_digest(m.stage.plan->target);
    story_told(s, &m);
}

static inline void story_prepare(struct story *s, uint64_t epoch, uint64_t op, enum flip_kind kind, uint32_t lead_ms)
{
    struct msg m = {.type = MSG_PREPARE, .prepare = {.epoch = epoch, .op = op, .kind = kind, .lead_ms = lead_ms}};
    story_told(s, &m);
}

static inline void story_go(struct story *s, uint64_t op, enum flip_kind kind, uint64_t step, uint64_t wave,
                            struct view *view)
{
    struct msg m = {.type = MSG_GO,
                    .go = {.epoch = view->epoch, .op = op, .step = step, .wave = wave, .kind = kind, .view = view}};
    story_told(s, &m);
}

static inline void story_abort(struct story *s, uint64_t epoch)
{
    struct msg m = {.type = MSG_ABORT, .abort = {.epoch = epoch}};
    story_told(s, &m);
}

static inline void story_op(struct story *s, enum msg_type type, uint64_t op, uint64_t epoch)
{
    struct msg m = {.type = type, .op_end = {.op = op, .epoch = epoch}};
    story_told(s, &m);
}

static inline void story_notify(struct story *s, uint64_t op, enum notify_type what)
{
    struct msg m = {.type = MSG_NOTIFY, .notify = {.op = op, .what = what}};
    story_told(s, &m);
}

static inline void story_map(struct story *s, uint64_t epoch, uint64_t op, uint32_t ranks, uint64_t version)
{
    struct msg m = {.type = MSG_MAP, .map = {.epoch = epoch, .op = op, .map = expert_map_new(1, 2, ranks, 2)}};
    m.map.map->version = version;
    story_told(s, &m);
}

/* ---- what the engine does, as gate.c would ---- */

static inline void engine_runs(struct story *s, uint64_t step)
{
    s->page.intent = step;
    s->page.done = step - 1;
    s->page.engine_state = PAGE_ENGINE_RUNNING;
}

static inline void engine_idles(struct story *s, uint64_t after)
{
    s->page.intent = s->page.done = after;
    s->page.engine_state = PAGE_ENGINE_IDLE;
}

static inline void engine_held(struct story *s)
{
    s->page.done = s->page.gate - 1;
    s->page.intent = s->page.gate - 1;
    s->page.engine_state = PAGE_ENGINE_HELD;
}

static inline void engine_flips(struct story *s)
{
    engine_runs(s, s->page.flip_step);
    s->page.cur_view = s->page.flip_view;
}

/* ---- chapters that many stories begin with ---- */

/* Rank 0 of view 1 (n ranks), serving, engine idle after step 10.  It came there by a cold start, operation 1. */
static inline struct story *story_serving(uint32_t n)
{
    struct story *s = story_new();
    story_link(s);
    story_attach(s);
    story_op_begin(s, 1, OP_SCALE_UP, ROLE_NEW, n + 1, 1, n);
    story_stage(s, 1, STAGE_ALLOCATE, 1);
    story_work_done(s, 0, NULL);
    story_stage(s, 1, STAGE_KV, 1);
    story_stage(s, 1, STAGE_ENGINE_PREPARE, 1);
    story_prepared(s, 1, 1);
    story_prepare(s, 1, 1, FLIP_VIEW, 250);
    story_go(s, 1, FLIP_VIEW, 1, 1, story_view(1, n, 0, 1));
    engine_flips(s);
    story_happens(s, AE_BELL);
    story_op(s, MSG_OP_END, 1, 0);
    engine_idles(s, 10);
    story_forget(s);
    struct agent_status status;
    agent_core_status(s->core, &status);
    ck_assert_uint_eq(status.applied_epoch, 1);
    ck_assert_int_eq(status.state, MS_COMPLETE);
    return s;
}

/* An operation of which the engine has prepared the proposed view; roles that need no more than that. */
static inline void story_prepares(struct story *s, uint64_t op)
{
    story_op_begin(s, op, OP_SCALE_DOWN, ROLE_REMAINING, 3, 3, 0);
    story_stage(s, op, STAGE_ENGINE_PREPARE, 1);
    story_prepared(s, op, 1);
    story_forget(s);
}

static inline int story_run(const char *name, TCase *const *cases, size_t n)
{
    Suite *suite = suite_create(name);
    for (size_t i = 0; i < n; i++)
        suite_add_tcase(suite, cases[i]);
    return suite_run(suite);
}

#endif
