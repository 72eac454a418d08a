/* Promise and go: how a view (or, for replicated dispatch, a map) changes between the same two steps on all ranks.
 * Part of the coordinator's core; pure.  The protocol is that of docs/protocol.md.
 *
 *            epoch durable, PREPARE           all PROMISED            COMMIT durable, GO        all FLIPPED
 *   IDLE --------------------------> PREPARING -----------> DECIDING ------------------> GOING -----------> IDLE
 *                                        | deadline, REFUSE, loss       (nothing may        | deadline: RESET; in a RESET
 *                                        v                               abort here)        v the silent rank is lost
 *                                    ABORT, a new epoch or given up
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define MS 1000000ULL
#define RESET_AHEAD 65536 /* steps: more than any engine launches before it has to wait for a peer */

const char *commit_state_name(enum commit_state state)
{
    static const char *const names[] = {"IDLE", "PREPARING", "DECIDING", "GOING"};
    return names[state];
}

void commit_done(struct commit *commit)
{
    view_unref(commit->target);
    commit->target = NULL;
    arrivals_reset(&commit->promised);
    arrivals_reset(&commit->flipped);
    commit->state = COMMIT_IDLE;
    commit->epoch = 0;
}

/* Who takes part: every party of the operation; in a map change only those who are ranks now. */
static bool commit_takes_part(const struct coordinator *c, uint32_t party)
{
    return c->commit.kind != FLIP_MAP || members_rank(c, c->op.peer[party]) >= 0;
}

/* Who is asked to promise: everybody who takes part. */
static bool commit_asks(const struct coordinator *c, uint32_t party)
{
    return commit_takes_part(c, party) &&
           !(c->bug == COORDINATOR_BUG_LEAVER_NOT_ASKED && !c->durable.open.stays[party]);
}

static void commit_send_prepare(struct coordinator *c, uint32_t peer)
{
    struct msg *m = core_send(c, peer, MSG_PREPARE);
    if (!m)
        return;
    m->prepare.epoch = c->commit.epoch;
    m->prepare.op = c->durable.open.op;
    m->prepare.kind = c->commit.kind;
    m->prepare.lead_ms = c->commit.lead_ms;
}

static void commit_send_go(struct coordinator *c, uint32_t peer)
{
    const struct commit_record *r = &c->durable.commit;
    struct msg *m = core_send(c, peer, MSG_GO);
    if (!m)
        return;
    m->go.epoch = r->epoch;
    m->go.op = r->op;
    m->go.step = r->step;
    m->go.wave = r->wave;
    m->go.kind = r->kind;
    m->go.view = view_ref(r->view);
}

static void commit_go(struct coordinator *c)
{
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        if (commit_takes_part(c, i))
            commit_send_go(c, c->op.peer[i]);
}

static void commit_send_dismiss(struct coordinator *c, uint32_t peer)
{
    struct msg *m = core_send(c, peer, MSG_DISMISS);
    if (!m)
        return;
    m->op_end.op = c->durable.commit.op;
    m->op_end.epoch = c->durable.commit.epoch;
}

static void commit_send_abort(struct coordinator *c, uint32_t peer, uint64_t epoch)
{
    struct msg *m = core_send(c, peer, MSG_ABORT);
    if (m)
        m->abort.epoch = epoch;
}

/* Nobody has promised yet. */
static void commit_expect_promises(struct coordinator *c)
{
    struct commit *k = &c->commit;
    k->state = COMMIT_PREPARING;
    k->durable = false;
    k->min_next = UINT64_MAX;
    k->max_wave = 0;
    k->any_old = k->any_running = k->any_detached = false;
    k->deadline_ns = UINT64_MAX;
    arrivals_reset(&k->promised);
    for (uint32_t i = 0; i < c->durable.open.n; i++) {
        uint32_t p = c->op.peer[i];
        if (commit_asks(c, i) && arrivals_expect(&k->promised, p, c->peers[p].member.incarnation) < 0)
            abort();
    }
}

/* A new epoch for the present target: durable before anybody hears of it. */
static void commit_attempt(struct coordinator *c)
{
    struct commit *k = &c->commit;
    commit_expect_promises(c);
    k->epoch = c->durable.epoch + 1;
    if (c->bug == COORDINATOR_BUG_EPOCH_REUSED) {
        commit_epoch_durable(c, k->epoch);
        return;
    }
    c->durable.epoch = k->epoch;
    c->durable.open.epoch = k->epoch;
    c->durable.open.flip = k->kind;
    core_journal(c, DURABLE_META | DURABLE_OP, CONT_EPOCH);
}

/* The lead hides a commit from the engines, and delays the switch by as much: several times what commits took of late. */
static uint32_t commit_lead(const struct coordinator *c)
{
    uint64_t lead = 8 * c->commit_ns / MS;
    if (lead < c->config.lead_min_ms)
        lead = c->config.lead_min_ms;
    return c->commit_ns && lead < c->config.lead_ms ? (uint32_t)lead : c->config.lead_ms;
}

void commit_start(struct coordinator *c, enum flip_kind kind, struct view *target)
{
    struct commit *k = &c->commit;
    assert(k->state == COMMIT_IDLE || (kind == FLIP_RESET && k->state != COMMIT_DECIDING));
    view_unref(k->target);
    k->target = target;
    k->kind = kind;
    k->lead_ms = commit_lead(c);
    k->attempt = 1;
    commit_attempt(c);
}

void commit_epoch_durable(struct coordinator *c, uint64_t epoch)
{
    struct commit *k = &c->commit;
    if (k->state != COMMIT_PREPARING || k->epoch != epoch || k->durable)
        return;
    k->durable = true;
    k->prepared_ns = c->now_ns;
    /* ABORT must come before any engine is held: the lead less two steps.  Steps are not known here; a quarter of the
     * lead is more than two of them whenever the lead is more than eight. */
    k->deadline_ns = c->now_ns + (k->kind == FLIP_RESET ? c->config.flipped_ms * MS : k->lead_ms * MS * 3 / 4);
    char names[160];
    core_names(c, &k->promised, names, sizeof(names));
    core_log(c, CORE_INFO, "PREPARE epoch %llu: lead %u ms, attempt %u; awaits promises of %s", (unsigned long long)epoch,
             k->lead_ms, k->attempt, names);
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        if (commit_asks(c, i))
            commit_send_prepare(c, c->op.peer[i]);
}

static void commit_withdraw(struct coordinator *c)
{
    /* An epoch that is not durable yet has been told to nobody, and may be used again after a crash. */
    for (uint32_t i = 0; c->commit.epoch && c->commit.durable && i < c->durable.open.n; i++)
        if (commit_takes_part(c, i))
            commit_send_abort(c, c->op.peer[i], c->commit.epoch);
    c->commit.epoch = 0;
    arrivals_reset(&c->commit.promised);
}

void commit_cancel(struct coordinator *c, const char *why)
{
    bool planted = c->bug == COORDINATOR_BUG_ABORT_WHILE_DECIDING && c->commit.state == COMMIT_DECIDING;
    if (c->commit.state != COMMIT_PREPARING && !planted)
        return;
    core_log(c, CORE_INFO, "epoch %llu is withdrawn: %s", (unsigned long long)c->commit.epoch, why);
    commit_withdraw(c);
    commit_done(&c->commit);
}

static void commit_retry(struct coordinator *c, const char *why)
{
    struct commit *k = &c->commit;
    if (k->attempt >= c->config.promise_attempts) {
        commit_cancel(c, why);
        operation_commit_failed(c, why);
        return;
    }
    core_log(c, CORE_WARN, "epoch %llu is withdrawn (%s); attempt %u follows with a lead of %u ms",
             (unsigned long long)k->epoch, why, k->attempt + 1, k->lead_ms * 2);
    commit_withdraw(c);
    k->attempt++;
    k->lead_ms *= 2;
    commit_attempt(c);
}

/* ---- promises ---- */

static void commit_decide(struct coordinator *c)
{
    struct commit *k = &c->commit;
    struct durable *d = &c->durable;
    if (k->kind != FLIP_RESET && k->any_detached && k->any_running) {
        commit_retry(c, "a rank has no engine while another is at work, so no common step would ever come");
        return;
    }
    k->step = arrivals_max(&k->promised);
    if (c->bug == COORDINATOR_BUG_MIN_OF_PROMISES) {
        k->step = UINT64_MAX;
        for (size_t i = 0; i < k->promised.n; i++)
            if (k->promised.v[i].value && k->promised.v[i].value < k->step)
                k->step = k->promised.v[i].value;
        if (k->step == UINT64_MAX)
            k->step = 0;
    }
    if (k->kind == FLIP_RESET && c->bug != COORDINATOR_BUG_RESET_AT_MAX) {
        /* Who is not asked may live, and be ahead: a joiner in its first step, which the others have not come to, or an
         * engine that launches steps without waiting for its peers. */
        if (k->step < d->commit.step)
            k->step = d->commit.step;
        k->step += c->bug == COORDINATOR_BUG_RESET_BARELY_AHEAD ? 1 : RESET_AHEAD;
    }
    if (k->step == 0)
        k->step = 1; /* a cold start: steps count from 1, 0 is "none yet" */
    uint64_t next = k->any_old && k->min_next < k->step ? k->min_next : k->step;
    k->wave = k->max_wave + (k->step - next) + 1;

    struct view *view = view_copy(k->target);
    struct expert_map *map = view ? expert_map_copy(view->map) : NULL;
    struct commit_record r = {.epoch = k->epoch,
                              .op = d->open.op,
                              .step = k->step,
                              .wave = k->wave,
                              .kind = k->kind,
                              .view = view,
                              .n_old = c->view ? c->view->n : 0};
    r.old = calloc(r.n_old + 1, sizeof(*r.old));
    if (!map || !r.old)
        abort();
    if (r.n_old)
        memcpy(r.old, c->view->members, r.n_old * sizeof(*r.old));
    view->epoch = k->epoch;
    for (uint32_t i = 0; i < view->n; i++) {
        struct member *m = &view->members[i];
        uint32_t p = members_find(c, m->id);
        m->draining = false;
        /* Who has promised has said before which engine it has: it may have attached since the target was made. */
        if (p != NOBODY && c->peers[p].member.incarnation == m->incarnation && c->peers[p].engine)
            memcpy(m->endpoint, c->peers[p].member.endpoint, sizeof(m->endpoint));
    }
    map->version = ++d->map_version;
    expert_map_unref(view->map);
    view->map = map;
    commit_record_done(&d->commit);
    d->commit = r;
    view_unref(d->view);
    d->view = view_ref(view);
    if (d->epoch < k->epoch)
        d->epoch = k->epoch;
    k->state = COMMIT_DECIDING;
    if (k->kind != FLIP_MAP)
        operation_phase(c, PHASE_DECIDE, "every promise is in");
    unsigned model = d->open.kind == OP_START ? DURABLE_MODEL : 0; /* it never changes afterwards */
    core_journal(c, DURABLE_META | DURABLE_VIEW | DURABLE_OP | DURABLE_COMMIT | model, CONT_DECIDED);
    if (c->bug == COORDINATOR_BUG_GO_BEFORE_DURABLE)
        commit_go(c);
}

void commit_promise(struct coordinator *c, uint32_t peer, const struct msg_promise *promise)
{
    struct commit *k = &c->commit;
    if (k->state != COMMIT_PREPARING || !k->durable || promise->epoch != k->epoch)
        return;
    uint64_t incarnation = promise->incarnation;
    if (c->bug == COORDINATOR_BUG_INCARNATION_IGNORED)
        for (size_t i = 0; i < k->promised.n; i++)
            if (k->promised.v[i].id == peer)
                incarnation = k->promised.v[i].incarnation;
    if (arrivals_add(&k->promised, peer, incarnation, promise->limit) != ARRIVAL_COUNTED)
        return;
    core_log(c, CORE_INFO, "agent %s promises for epoch %llu to begin no step from %llu on (its next is %llu)",
             c->peers[peer].member.id, (unsigned long long)k->epoch, (unsigned long long)promise->limit,
             (unsigned long long)promise->next);
    if (promise->engine != PROMISE_JOINER) {
        k->any_old = true;
        k->any_running |= promise->engine == PROMISE_RUNNING;
        k->any_detached |= promise->engine == PROMISE_DETACHED;
        if (promise->next < k->min_next)
            k->min_next = promise->next;
        if (promise->wave > k->max_wave)
            k->max_wave = promise->wave;
    }
    if (arrivals_complete(&k->promised) && !reload_promised(c))
        commit_decide(c);
}

void commit_reloaded(struct coordinator *c)
{
    if (c->commit.state == COMMIT_PREPARING && c->commit.durable && arrivals_complete(&c->commit.promised))
        commit_decide(c);
}

void commit_refuse(struct coordinator *c, uint32_t peer, const struct msg_refuse *refuse)
{
    struct commit *k = &c->commit;
    if (k->state != COMMIT_PREPARING || refuse->epoch != k->epoch)
        return;
    core_log(c, CORE_WARN, "agent %s refuses epoch %llu: %s", c->peers[peer].member.id,
             (unsigned long long)k->epoch, refuse->why);
    if (k->kind == FLIP_RESET) {
        c->peers[peer].silent = true; /* the repair starts anew, without it if it can */
        members_lost(c, peer, refuse->why);
        return;
    }
    /* The others need not wait for the deadline; the next attempt does, so that attempts are not burnt in a row. */
    commit_withdraw(c);
}

/* ---- the decision is durable ---- */

static void commit_check_flipped(struct coordinator *c)
{
    struct commit *k = &c->commit;
    if (k->state != COMMIT_GOING)
        return;
    for (size_t i = 0; i < k->flipped.n; i++) {
        const struct arrival *a = &k->flipped.v[i];
        if (a->arrived)
            continue;
        const struct peer *p = &c->peers[a->id];
        /* a rank of the new view that is gone is the repair's business: the flip is not settled without it */
        if (!p->gone || members_rank(c, a->id) >= 0)
            return;
    }
    enum flip_kind kind = k->kind;
    uint64_t epoch = k->epoch;
    uint64_t hold = arrivals_max(&k->flipped);
    if (hold > c->durable.open.hold_ns_max)
        c->durable.open.hold_ns_max = hold;
    c->durable.commit.settled = true;
    core_journal(c, DURABLE_COMMIT, CONT_NONE);
    core_log(c, CORE_INFO, "epoch %llu is serving on every rank since step %llu; longest hold %llu us",
             (unsigned long long)epoch, (unsigned long long)k->step, (unsigned long long)(hold / 1000));
    commit_done(k);
    if (kind == FLIP_MAP) {
        rounds_flipped(c);
        return;
    }
    operation_notify(c, NOTIFY_RECONFIGURE_FINISHED);
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        commit_send_dismiss(c, c->op.peer[i]);
    operation_settled(c);
}

static void commit_enter_going(struct coordinator *c)
{
    struct commit *k = &c->commit;
    k->state = COMMIT_GOING;
    /* S lies a lead ahead by the fastest steps of late; the ones to come may be slower. */
    k->deadline_ns = c->now_ns + c->config.flipped_ms * MS + (k->kind != FLIP_RESET ? 4 * k->lead_ms * MS : 0);
    arrivals_reset(&k->flipped);
    for (uint32_t i = 0; i < c->durable.open.n; i++) {
        uint32_t p = c->op.peer[i];
        if (commit_takes_part(c, i) && arrivals_expect(&k->flipped, p, c->durable.open.parties[i].incarnation) < 0)
            abort();
    }
}

void commit_decided(struct coordinator *c, uint64_t epoch)
{
    struct commit *k = &c->commit;
    if (k->state != COMMIT_DECIDING || k->epoch != epoch)
        return; /* only a planted mistake comes here */
    uint64_t took = c->now_ns - k->prepared_ns + 1;
    if (k->kind != FLIP_RESET)
        c->commit_ns = took > c->commit_ns * 3 / 4 ? took : c->commit_ns * 3 / 4;
    view_unref(c->view);
    c->view = view_ref(c->durable.view);
    c->changed = true;
    core_log(c, CORE_INFO, "epoch %llu is decided: step %llu, wave %llu, %u ranks, map %llu",
             (unsigned long long)epoch, (unsigned long long)k->step, (unsigned long long)k->wave, c->view->n,
             (unsigned long long)c->view->map->version);
    if (k->kind != FLIP_MAP)
        operation_committed(c);
    commit_enter_going(c);
    commit_go(c);
    commit_check_flipped(c);
}

void commit_flipped(struct coordinator *c, uint32_t peer, const struct msg_flipped *flipped)
{
    struct commit *k = &c->commit;
    if (k->state != COMMIT_GOING || flipped->epoch != k->epoch)
        return;
    if (arrivals_add(&k->flipped, peer, c->peers[peer].member.incarnation, flipped->hold_ns) == ARRIVAL_COUNTED) {
        c->peers[peer].applied_epoch = flipped->epoch;
        c->changed = true;
        core_log(c, CORE_INFO, "agent %s has flipped to epoch %llu; its engine was held %llu us",
                 c->peers[peer].member.id, (unsigned long long)flipped->epoch,
                 (unsigned long long)(flipped->hold_ns / 1000));
    }
    commit_check_flipped(c);
}

/* ---- connections, losses, time ---- */

static bool commit_concerns(const struct commit_record *r, const struct member *m)
{
    return member_find(r->view->members, r->view->n, m) >= 0 || member_find(r->old, r->n_old, m) >= 0;
}

/* The last decision, if it is durable and this agent has a part in it. */
static bool commit_concerned(const struct coordinator *c, uint32_t peer)
{
    const struct commit *k = &c->commit;
    const struct commit_record *r = &c->durable.commit;
    return r->epoch && !(k->state == COMMIT_DECIDING && k->epoch == r->epoch) &&
           commit_concerns(r, &c->peers[peer].member);
}

/* Ends the doubt of an agent that comes back.  Before anything of its operation: an agent that is told of the end of an
 * operation before it has the decision takes itself for a joiner whose operation was aborted, and lets go. */
void commit_hello_decided(struct coordinator *c, uint32_t peer, const struct msg_hello *hello)
{
    const struct commit *k = &c->commit;
    const struct commit_record *r = &c->durable.commit;
    bool open = k->state == COMMIT_PREPARING || k->state == COMMIT_DECIDING;
    bool concerned = commit_concerned(c, peer);
    uint64_t promised = hello->promised_epoch;
    if (promised && !(open && promised == k->epoch)) {
        bool repaired = c->durable.open.kind == OP_REPAIR && c->op.phase != PHASE_NONE && !c->op.decided &&
                        operation_party(c, peer) >= 0;
        /* Nor is one to a repair that was given up, whose end may not be durable: its epoch may go on after a crash. */
        bool given_up = (c->durable.ended.kind == OP_REPAIR && c->durable.ended.epoch == promised) ||
                        (c->torn && members_rank(c, peer) >= 0);
        /* Whatever it has promised: the view has gone on without it. */
        bool left_out = concerned && r->kind == FLIP_RESET && hello->engine != PROMISE_JOINER &&
                        hello->applied_epoch < r->epoch && members_rank(c, peer) < 0;
        if (concerned && (promised == r->epoch || left_out))
            commit_send_go(c, peer);
        else if (!repaired && !given_up) /* a repair supersedes the promise; the last one's end may not be durable */
            commit_send_abort(c, peer, promised);
    } else if (!promised && concerned && hello->applied_epoch < r->epoch && hello->engine != PROMISE_JOINER) {
        commit_send_go(c, peer);
    }
}

void commit_hello(struct coordinator *c, uint32_t peer, const struct msg_hello *hello)
{
    struct commit *k = &c->commit;
    const struct commit_record *r = &c->durable.commit;
    bool concerned = commit_concerned(c, peer);
    uint64_t promised = hello->promised_epoch;
    if (promised && promised == k->epoch && k->state == COMMIT_PREPARING) {
        struct msg_promise p = {.epoch = promised,
                                .incarnation = hello->incarnation,
                                .limit = hello->limit,
                                .next = hello->next,
                                .wave = hello->wave,
                                .engine = hello->engine};
        commit_promise(c, peer, &p);
    }
    if (concerned && r->settled && hello->engine != PROMISE_JOINER && members_rank(c, peer) < 0)
        commit_send_dismiss(c, peer); /* a leaver that missed it */
    int party = operation_party(c, peer);
    if (k->state == COMMIT_PREPARING && k->durable && k->epoch && promised != k->epoch && party >= 0 &&
        commit_takes_part(c, (uint32_t)party) && !arrivals_has(&k->promised, peer))
        commit_send_prepare(c, peer);
}

void commit_peer_gone(struct coordinator *c, uint32_t peer, const char *why)
{
    struct commit *k = &c->commit;
    int party = operation_party(c, peer);
    if (k->state == COMMIT_GOING)
        commit_check_flipped(c);
    if (k->state != COMMIT_PREPARING || k->kind != FLIP_MAP || party < 0 || !c->op.decided)
        return; /* the operation aborts by itself; a RESET waits for the lease */
    char text[192];
    snprintf(text, sizeof(text), "agent %s: %s", c->peers[peer].member.id, why);
    commit_cancel(c, text);
    operation_commit_failed(c, text);
}

void commit_tick(struct coordinator *c)
{
    struct commit *k = &c->commit;
    char names[128], text[256];
    bool late = c->now_ns >= k->deadline_ns;
    if (k->state == COMMIT_DECIDING && late && c->bug == COORDINATOR_BUG_ABORT_WHILE_DECIDING) {
        operation_abort(c, "planted: deadline while deciding");
        return;
    }
    if (!late || (k->state != COMMIT_PREPARING && k->state != COMMIT_GOING))
        return;
    if (k->state == COMMIT_PREPARING && k->kind != FLIP_RESET) {
        core_names(c, &k->promised, names, sizeof(names));
        if (k->epoch)
            snprintf(text, sizeof(text), "no promise from %s within %u ms", names, k->lead_ms * 3 / 4);
        else
            snprintf(text, sizeof(text), "an agent refused");
        commit_retry(c, text);
        return;
    }
    /* GOING, or the promises of a RESET: those who are silent are out. */
    bool going = k->state == COMMIT_GOING;
    struct arrivals *set = going ? &k->flipped : &k->promised;
    snprintf(text, sizeof(text), "no %s for epoch %llu within %u ms", going ? "FLIPPED" : "PROMISE",
             (unsigned long long)k->epoch, c->config.flipped_ms);
    k->deadline_ns = c->now_ns + c->config.flipped_ms * MS;
    if (going && k->kind != FLIP_RESET) {
        /* Who hangs in a step below S, and who only waits there for another, is not known here.  A RESET takes everybody
         * out, and an engine that does not come out of its step is found by its own agent. */
        core_names(c, set, names, sizeof(names));
        core_log(c, CORE_ERROR, "%s: %s", names, text);
        c->torn = true;
        return;
    }
    uint32_t silent[RANKS_MAX], n = 0;
    for (size_t i = 0; i < set->n && n < RANKS_MAX; i++)
        if (!set->v[i].arrived && !c->peers[set->v[i].id].gone)
            silent[n++] = set->v[i].id;
    for (uint32_t i = 0; i < n; i++) { /* evicted by the next repair, unless they hold the only copy of an expert */
        c->peers[silent[i]].silent = true;
        members_lost(c, silent[i], text);
    }
}

void commit_recover(struct coordinator *c)
{
    struct commit *k = &c->commit;
    const struct commit_record *r = &c->durable.commit;
    k->kind = r->kind;
    k->epoch = r->epoch;
    k->step = r->step;
    k->wave = r->wave;
    k->target = view_ref(r->view);
    commit_enter_going(c);
}

void commit_resume(struct coordinator *c, struct view *target)
{
    struct commit *k = &c->commit;
    k->target = target;
    k->kind = FLIP_RESET;
    k->lead_ms = c->config.lead_ms;
    k->attempt = 1;
    commit_expect_promises(c);
    k->epoch = c->durable.open.epoch;
    commit_epoch_durable(c, k->epoch);
}
