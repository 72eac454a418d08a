/* The invariants, each checked where the thing that could break it happens.  (Numbers: the promises of the design.)
 *
 *   2  an epoch is durable before PREPARE names it, a map version before MAP does; neither is ever used twice
 *   4  no step number is begun in two views; no step is begun in a view that is not durably decided, before its first
 *      step, by a non-member, or in an old view at or past the first step of the next
 *   4  no GO before its decision is durable, no ABORT of a decided epoch, no decision of an aborted one
 *   4  no step at or above the promised one is begun until GO or ABORT; a leaver begins no step at or above S
 *   4  with replicated routing all ranks of a step use one map
 *   5  a step's map routes to slots only that really hold the expert, on a rank of that view, and covers every expert;
 *      a slot is not overwritten while a step that may read it is not completed
 *   5  every expert that was covered stays covered, unless a rank was lost or the view was given up
 *   2  nobody is put out of a view that is given up before that is durable
 *   6  the old view serves after an abort; the next operation is accepted (scenario.c)
 *   3  after the last fault everything comes to rest: nobody is held, nobody is in doubt, all agree, requests are done
 * Single thread. */
#include "tests/sim/sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct sim_commit *check_commit(const struct sim *s, uint64_t epoch)
{
    for (size_t i = s->n_commits; i-- > 0;)
        if (s->commits[i].epoch == epoch)
            return &s->commits[i];
    return NULL;
}

struct sim_step *check_step(struct sim *s, uint64_t step)
{
    return &s->steps[((step >> 16) & 3) * (SIM_STEPS / 4) + step % (SIM_STEPS / 4)]; /* a repair jumps by 65536 */
}

static int rank_in(const struct view *view, const struct sim_agent *a)
{
    for (uint32_t i = 0; i < view->n; i++)
        if (view->members[i].incarnation == a->incarnation)
            return (int)i;
    return -1;
}

/* A step in this view does not count any more: a repair has replaced it, and told who is left to leave it. */
bool check_void(const struct sim *s, const struct sim_agent *a, uint64_t view)
{
    if (!agent_lives(a))
        return true;
    for (size_t i = s->n_commits; i-- > 0 && s->commits[i].epoch > view;)
        if (s->commits[i].kind == FLIP_RESET || s->commits[i].start)
            return true;
    return false;
}

/* Who has not heard of it may begin one more step, which nobody meets him in; steps are counted anew. */
bool check_given_up(const struct sim *s, uint64_t view)
{
    for (size_t i = s->n_commits; i-- > 0 && s->commits[i].epoch > view;)
        if (s->commits[i].start)
            return true;
    return false;
}

/* A step is computed by all of its ranks.  This one is through with every step that it has begun, has promised, and begins
 * none: whoever waits for it in a step (it may take itself for a rank still) has what it was to read here, or never will. */
static bool reads_nothing(const struct sim_agent *a)
{
    const struct sim_engine *e = &a->engine;

    if (e->pc == ENGINE_NONE)
        return true;
    for (uint32_t k = 0; k < e->n_begun; k++)
        if (e->begun[k].step > atomic_load(&a->page.done))
            return false;
    return a->promised && (a->limit <= e->local.next || e->local.view <= atomic_load(&a->page.revoked));
}

/* ---- what the coordinator does ---- */

static void check_prepare(struct sim *s, const struct msg_prepare *p)
{
    if (p->epoch > s->coordinator.disk.epoch)
        sim_fail(s, "promise 2: PREPARE of e%" PRIu64 " before that epoch is durable (e%" PRIu64 " is)", p->epoch,
                 s->coordinator.disk.epoch);
    if (check_commit(s, p->epoch))
        sim_fail(s, "promise 4: PREPARE of e%" PRIu64 ", which is decided", p->epoch);
    if (p->epoch < s->max_prepared)
        sim_fail(s, "promise 2: PREPARE of e%" PRIu64 " after e%" PRIu64, p->epoch, s->max_prepared);
    if (p->epoch == s->max_prepared && p->op != s->prepared_op)
        sim_fail(s, "promise 2: e%" PRIu64 " is used by operations %" PRIu64 " and %" PRIu64, p->epoch, s->prepared_op,
                 p->op);
    for (uint32_t i = 0; i < 64; i++)
        if (s->aborted[i] == p->epoch)
            sim_fail(s, "promise 2: PREPARE of e%" PRIu64 ", which was aborted", p->epoch);
    if (p->kind == FLIP_RESET && p->epoch > s->max_prepared) {
        uint64_t *before = &s->reset_times[s->resets++ % SIM_RESETS];
        if (*before && s->now - *before < SIM_RESETS_NS)
            sim_fail(s, "promise 3: %d repairs in %" PRIu64 " ms: they go round in circles", SIM_RESETS,
                     (s->now - *before) / MS);
        *before = s->now;
    }
    if (p->kind == FLIP_RESET && !s->faulty && s->fault_at == 0)
        sim_fail(s, "promise 6: a repair (e%" PRIu64 ") though nothing has failed", p->epoch);
    s->max_prepared = p->epoch;
    s->prepared_op = p->op;
    s->prepared_kind = p->kind;
}

static void check_abort(struct sim *s, const struct sim_agent *to, uint64_t epoch)
{
    if (check_commit(s, epoch)) {
        /* A decision is kept until it has been taken, the agent was evicted, or its view was given up: then it may as well
         * forget it. */
        bool given_up = !s->coordinator.disk.view || check_given_up(s, epoch);
        if (!given_up && (rank_in(s->commits[s->n_commits - 1].view, to) >= 0 || !check_void(s, to, epoch)))
            sim_fail(s, "promise 4: ABORT of e%" PRIu64 " to a%02u, which is decided", epoch, to->index);
        return;
    }
    for (uint32_t i = 0; i < 64; i++)
        if (s->aborted[i] == epoch)
            return;
    s->aborted[s->n_aborted++ % 64] = epoch;
}

static void check_map(struct sim *s, const struct expert_map *map)
{
    uint64_t digest = expert_map_digest(map);

    if (map->version > s->coordinator.disk.map_version)
        sim_fail(s, "promise 2: MAP of version %" PRIu64 " before it is durable", map->version);
    if (map->version == s->max_map && digest != s->max_map_digest)
        sim_fail(s, "promise 2: map version %" PRIu64 " names two maps", map->version);
    if (map->version > s->max_map) {
        s->max_map = map->version;
        s->max_map_digest = digest;
    }
}

/* True: the view is given up, and there is nothing to be said against it. */
static bool check_giving_up(struct sim *s, const struct sim_agent *to)
{
    struct coordinator_status status;

    coordinator_status(s->coordinator.core, s->now, &status);
    if (status.view)
        return false;
    if (s->coordinator.disk.view && rank_in(s->coordinator.disk.view, to) >= 0)
        sim_fail(s, "promise 2: a%02u is put out of e%" PRIu64 " before it is durable that this view is given up", to->index,
                 s->coordinator.disk.view->epoch);
    return true;
}

void check_coordinator_sends(struct sim *s, uint64_t conn, const struct msg *msg)
{
    const struct sim_commit *commit;

    switch (msg->type) {
    case MSG_PREPARE: check_prepare(s, &msg->prepare); return;
    case MSG_GO:
        commit = check_commit(s, msg->go.epoch);
        if (!commit)
            sim_fail(s, "promise 4: GO of e%" PRIu64 " before its decision is durable", msg->go.epoch);
        else if (commit->step != msg->go.step)
            sim_fail(s, "promise 4: GO of e%" PRIu64 " with step %" PRIu64 ", decided was %" PRIu64, msg->go.epoch,
                     msg->go.step, commit->step);
        return;
    case MSG_ABORT: check_abort(s, &s->agents[s->conns[conn - 1].agent], msg->abort.epoch); return;
    case MSG_MAP: check_map(s, msg->map.map); return;
    case MSG_EVICTED:
        if (check_giving_up(s, &s->agents[s->conns[conn - 1].agent]))
            return;
        /* by policy the view does not wait for who might come back with it */
        if (s->config.on_lost_experts == LOST_HOLD && check_last_copy(s, &s->agents[s->conns[conn - 1].agent], false))
            sim_fail(s, "promise 5: a%02u is evicted with the last copy of an expert: %s", s->conns[conn - 1].agent,
                     msg->evicted.why);
        if (!s->faulty)
            sim_fail(s, "promise 3: a%02u is evicted though nothing has failed: %s", s->conns[conn - 1].agent,
                     msg->evicted.why);
        return;
    default: return;
    }
}

/* ---- what is durable ---- */

static void commit_append(struct sim *s, const struct commit_record *c)
{
    if (s->n_commits > 0 && c->epoch < s->commits[s->n_commits - 1].epoch)
        sim_fail(s, "promise 2: e%" PRIu64 " is decided after e%" PRIu64, c->epoch, s->commits[s->n_commits - 1].epoch);
    for (uint32_t i = 0; i < 64; i++)
        if (s->aborted[i] == c->epoch)
            sim_fail(s, "promise 4: e%" PRIu64 " is decided after it was aborted", c->epoch);
    if (s->n_commits == s->cap_commits) {
        size_t cap = s->cap_commits ? s->cap_commits * 2 : 16;
        struct sim_commit *commits = realloc(s->commits, cap * sizeof *commits);
        if (!commits) {
            sim_fail(s, "out of memory");
            return;
        }
        s->commits = commits;
        s->cap_commits = cap;
    }
    bool start = s->coordinator.disk.open.kind == OP_START;
    if (start && s->n_commits > 0)
        memset(s->steps, 0, SIM_STEPS * sizeof *s->steps);
    s->commits[s->n_commits++] = (struct sim_commit){c->epoch, c->step, c->kind, start, view_ref(c->view)};
    s->flips++;
    s->masked += expert_map_missing(c->view->map) > 0;
    sim_note(s, "DECIDED e%" PRIu64 " from step %" PRIu64 ", %u ranks", c->epoch, c->step, c->view->n);
}

static bool really_holds(struct sim *s, const struct member *member, uint32_t layer, uint32_t slot, int32_t expert)
{
    struct sim_agent *b = agent_of(s, member);

    return agent_is(b, member) && b->content[(size_t)layer * s->slots + slot] == expert;
}

static bool covered(struct sim *s, const struct view *view, uint32_t layer, int32_t expert)
{
    const struct expert_map *map = view->map;
    bool dormant = false;

    for (uint32_t r = 0; r < view->n; r++)
        for (uint32_t slot = 0; slot < map->slots; slot++) {
            size_t at = expert_map_at(map, layer, r, slot);
            if (map->held[at] != expert || !view->members[r].serving)
                continue;
            if (map->live[at])
                return true;
            dormant |= really_holds(s, &view->members[r], layer, slot, expert);
        }
    if (dormant)
        sim_fail(s, "promise 5: expert %d of layer %u is not routed to, though a replica exists (e%" PRIu64
                 ", map %" PRIu64 ")", expert, layer, view->epoch, map->version);
    return false;
}

static void check_coverage(struct sim *s)
{
    const struct view *view = s->coordinator.disk.view;

    if (!view) { /* given up */
        memset(s->covered, 0, (size_t)s->layers * s->logical);
        s->given_up++;
        return;
    }
    if (!view->map)
        return;
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t e = 0; e < s->logical; e++) {
            uint8_t *was = &s->covered[(size_t)l * s->logical + e], now = covered(s, view, l, (int32_t)e);
            if (*was && !now && s->losses == s->losses_covered && s->config.on_lost_experts == LOST_HOLD)
                sim_fail(s, "promise 5: expert %u of layer %u has lost its last live replica (e%" PRIu64
                         ", map %" PRIu64 ")", e, l, view->epoch, view->map->version);
            *was = now;
        }
    s->losses_covered = s->losses;
}

void check_durable(struct sim *s, unsigned parts)
{
    const struct durable *disk = &s->coordinator.disk;

    if ((parts & DURABLE_COMMIT) && disk->commit.epoch && !check_commit(s, disk->commit.epoch))
        commit_append(s, &disk->commit);
    if ((parts & DURABLE_HISTORY) && disk->ended.kind == OP_REPAIR && disk->ended.outcome == OUTCOME_ABORTED)
        sim_fail(s, "promise 3: the repair e%" PRIu64 " is aborted: nobody gets the others out of their step",
                 disk->ended.epoch);
    if (parts & DURABLE_VIEW)
        check_coverage(s);
}

/* ---- what an agent does ---- */

static void check_promise(struct sim *s, struct sim_agent *a, const struct msg_promise *p)
{
    a->promised_reset = p->epoch == s->max_prepared && s->prepared_kind == FLIP_RESET;
    a->promised = p->epoch;
    a->limit = p->engine == PROMISE_JOINER ? 0 : p->limit;
    if (p->engine != PROMISE_JOINER && a->last_begun >= p->limit)
        sim_fail(s, "promise 4: a%02u promises step %" PRIu64 " but step %" PRIu64 " has begun", a->index, p->limit,
                 a->last_begun);
}

static void check_flipped(struct sim *s, struct sim_agent *a, uint64_t epoch)
{
    const struct sim_commit *commit = check_commit(s, epoch);

    if (!commit) {
        sim_fail(s, "promise 4: a%02u has FLIPPED to e%" PRIu64 ", which is not decided", a->index, epoch);
        return;
    }
    if (rank_in(commit->view, a) >= 0 && a->engine.pc != ENGINE_NONE && atomic_load(&a->page.cur_view) < epoch)
        sim_fail(s, "promise 4: a%02u says FLIPPED e%" PRIu64 " in e%" PRIu64, a->index, epoch,
                 (uint64_t)atomic_load(&a->page.cur_view));
}

void check_agent_sends(struct sim *s, struct sim_agent *a, const struct msg *msg)
{
    switch (msg->type) {
    case MSG_PROMISE: check_promise(s, a, &msg->promise); return;
    case MSG_HELLO: /* carries a promise that could not be sent when it was made */
        if (msg->hello.promised_epoch && msg->hello.promised_epoch != a->promised) {
            struct msg_promise p = {.epoch = msg->hello.promised_epoch, .limit = msg->hello.limit,
                                    .engine = msg->hello.engine};
            check_promise(s, a, &p);
        }
        return;
    case MSG_FLIPPED: check_flipped(s, a, msg->flipped.epoch); return;
    case MSG_MAP_ACK:
        if (msg->map_ack.version > a->acked_map) {
            a->acked_map = msg->map_ack.version;
            a->acked_step = msg->map_ack.step;
        }
        return;
    default: return;
    }
}

void check_agent_receives(struct sim *s, struct sim_agent *a, const struct msg *msg)
{
    const struct sim_commit *commit;

    if (msg->type == MSG_ABORT && a->promised == msg->abort.epoch && !a->promised_reset)
        a->promised = 0;
    if (msg->type == MSG_EVICTED || (msg->type == MSG_DISMISS && msg->op_end.epoch > a->promised))
        a->promised = 0; /* what it holds is void: it lets go */
    if (msg->type != MSG_GO)
        return;
    commit = check_commit(s, msg->go.epoch);
    if (commit && commit->kind == FLIP_RESET && msg->go.epoch > a->promised && rank_in(commit->view, a) < 0)
        a->promised = 0; /* a repair that did not ask it */
    if (!commit || a->promised != msg->go.epoch)
        return;
    if (a->limit > 0 && a->last_begun >= msg->go.step)
        sim_fail(s, "promise 4: GO of e%" PRIu64 " from step %" PRIu64 ", but a%02u has begun step %" PRIu64,
                 msg->go.epoch, msg->go.step, a->index, a->last_begun);
    a->promised = 0;
    a->promised_reset = false;
    a->has_left = rank_in(commit->view, a) < 0;
    a->left_at = msg->go.step;
}

void check_gate_store(struct sim *s, struct sim_agent *a, uint64_t value)
{
    if (value == GATE_OPEN && a->promised && a->promised_reset)
        sim_fail(s, "promise 4: a%02u opens its gate though the repair e%" PRIu64 " is not decided", a->index,
                 a->promised);
}

/* ---- what an engine does ---- */

static void check_view(struct sim *s, struct sim_agent *a)
{
    uint64_t n = a->engine.step, epoch = a->engine.local.view;
    const struct sim_commit *commit = check_commit(s, epoch);
    int rank = commit ? rank_in(commit->view, a) : -1;

    if (!commit)
        sim_fail(s, "promise 4: a%02u begins step %" PRIu64 " in e%" PRIu64 ", whose decision is not durable", a->index,
                 n, epoch);
    else if (rank < 0)
        sim_fail(s, "promise 4: a%02u begins step %" PRIu64 " in e%" PRIu64 " without being in it", a->index, n, epoch);
    else if (!commit->view->members[rank].serving)
        sim_fail(s, "promise 4: a%02u begins step %" PRIu64 " in e%" PRIu64 ", where it does not serve", a->index, n,
                 epoch);
    else if (n < commit->step)
        sim_fail(s, "promise 4: a%02u begins step %" PRIu64 " in e%" PRIu64 ", which begins with %" PRIu64, a->index, n,
                 epoch, commit->step);
    for (size_t i = s->n_commits; !s->failed && !check_given_up(s, epoch) && i-- > 0 && s->commits[i].epoch > epoch;) {
        const struct sim_commit *next = &s->commits[i];
        if (n >= next->step && (next->kind != FLIP_RESET || rank_in(next->view, a) >= 0) && agent_lives(a))
            sim_fail(s, "promise 4: a%02u begins step %" PRIu64 " in e%" PRIu64 ", but e%" PRIu64
                     " begins with %" PRIu64, a->index, n, epoch, next->epoch, next->step);
    }
}

static void check_routes(struct sim *s, struct sim_agent *a, const struct view *view)
{
    const struct expert_map *map = a->engine.map;
    uint64_t routed = 0;

    if (map->ranks != view->n) {
        sim_fail(s, "promise 4: a%02u uses a map of %u ranks in a view of %u", a->index, map->ranks, view->n);
        return;
    }
    for (uint32_t l = 0; l < map->layers; l++)
        for (uint32_t r = 0; r < map->ranks; r++) {
            struct sim_agent *b = agent_of(s, &view->members[r]);
            if (!agent_is(b, &view->members[r]))
                continue; /* the step will not complete */
            if (reads_nothing(b)) {
                routed++;
                continue;
            }
            for (uint32_t slot = 0; slot < map->slots; slot++) {
                size_t at = expert_map_at(map, l, r, slot);
                int32_t content = b->content[(size_t)l * s->slots + slot];
                if (!map->live[at])
                    continue;
                routed++;
                if (content != map->held[at]) {
                    sim_fail(s, "promise 5: step %" PRIu64 " of a%02u (map %" PRIu64 ") routes expert %d of layer %u "
                             "to a%02u slot %u, which holds %d", a->engine.step, a->index, map->version, map->held[at],
                             l, b->index, slot, content);
                    return;
                }
            }
        }
    if (routed == 0)
        sim_fail(s, "promise 5: the map of a%02u routes to nothing", a->index);
}

static void check_number(struct sim *s, struct sim_agent *a)
{
    struct sim_step *step = check_step(s, a->engine.step);
    const struct expert_map *map = a->engine.map;

    if (step->step != a->engine.step) {
        *step = (struct sim_step){.step = a->engine.step, .view = a->engine.local.view, .version = map->version};
        if (s->dispatch == DISPATCH_REPLICATED)
            step->digest = expert_map_digest(map);
        return;
    }
    if (step->view != a->engine.local.view)
        sim_fail(s, "promise 4: step %" PRIu64 " is begun in e%" PRIu64 " and, by a%02u, in e%" PRIu64, step->step,
                 step->view, a->index, a->engine.local.view);
    else if (s->dispatch == DISPATCH_REPLICATED && step->digest != expert_map_digest(map))
        sim_fail(s, "promise 4: step %" PRIu64 " uses map %" PRIu64 " and, on a%02u, map %" PRIu64, step->step,
                 step->version, a->index, map->version);
}

void check_begin(struct sim *s, struct sim_agent *a)
{
    uint64_t n = a->engine.step;
    const struct sim_commit *commit;

    if (n <= a->last_begun)
        sim_fail(s, "promise 4: a%02u begins step %" PRIu64 " after step %" PRIu64, a->index, n, a->last_begun);
    check_view(s, a);
    if (s->failed)
        return;
    if (a->promised && n >= a->limit)
        sim_fail(s, "promise 4: a%02u begins step %" PRIu64 ", though it promised e%" PRIu64 " not to begin %" PRIu64,
                 a->index, n, a->promised, a->limit);
    if (a->has_left && n >= a->left_at)
        sim_fail(s, "promise 4: a%02u has left with step %" PRIu64 " and begins step %" PRIu64, a->index, a->left_at,
                 n);
    if (!check_given_up(s, a->engine.local.view))
        check_number(s, a);
    if (!agent_lives(a) || s->failed)
        return;
    if (a->acked_map > a->engine.map->version && n >= a->acked_step)
        sim_fail(s, "promise 5: a%02u acknowledged map %" PRIu64 " from step %" PRIu64 " and begins %" PRIu64
                 " with map %" PRIu64, a->index, a->acked_map, a->acked_step, n, a->engine.map->version);
    if (!a->dense)
        sim_fail(s, "promise 5: a%02u begins step %" PRIu64 " without its dense weights", a->index, n);
    commit = check_commit(s, a->engine.local.view);
    if (!check_void(s, a, commit->epoch))
        check_routes(s, a, commit->view);
}

/* A slot of agent a is about to be overwritten or freed.  What may still read it: a step begun by any rank whose map
 * routes there, until the holder has completed that step. */
void check_destroy(struct sim *s, struct sim_agent *a, uint32_t layer, uint32_t slot, const char *by)
{
    uint64_t done = a->engine.pc == ENGINE_NONE ? UINT64_MAX : atomic_load(&a->page.done); /* dead, it reads nothing */
    const struct view *now = s->coordinator.disk.view;
    int rank = now ? rank_in(now, a) : -1;

    if (rank >= 0 && now->members[rank].serving && now->map->live[expert_map_at(now->map, layer, (uint32_t)rank, slot)])
        sim_fail(s, "promise 5: a %s destroys slot %u of layer %u on a%02u, which the committed map routes to", by,
                 slot, layer, a->index);
    for (uint32_t i = 0; i < s->n && !reads_nothing(a); i++) {
        struct sim_engine *e = &s->agents[i].engine;
        for (uint32_t k = 0; k < e->n_begun; k++) {
            const struct sim_begun *b = &e->begun[k];
            const struct sim_commit *commit = check_commit(s, b->view);
            if (b->step <= done || !commit || check_void(s, &s->agents[i], b->view))
                continue;
            rank = rank_in(commit->view, a);
            if (rank >= 0 && (uint32_t)rank < b->map->ranks &&
                b->map->live[expert_map_at(b->map, layer, (uint32_t)rank, slot)])
                sim_fail(s, "promise 5: a %s overwrites slot %u of layer %u on a%02u while step %" PRIu64
                         " of a%02u (map %" PRIu64 ") may read it", by, slot, layer, a->index, b->step, i,
                         b->map->version);
        }
    }
}

/* ---- who may go ---- */

/* One that is out of reach may be put out by a repair that is under way. */
static bool in_reach(const struct sim *s, const struct sim_agent *a)
{
    struct agent_status status;

    if (!a->up || a->stopping || !a->conn || a->paused_until > s->now)
        return false;
    agent_core_status(a->core, &status);
    return status.welcomed;
}

static bool has_other_holder(struct sim *s, const struct sim_agent *a, uint32_t layer, int32_t expert, bool careful)
{
    const struct view *view = s->coordinator.disk.view;

    for (uint32_t r = 0; r < view->n; r++) {
        struct sim_agent *b = agent_of(s, &view->members[r]);
        if (b == a || !agent_is(b, &view->members[r]) || (careful && !in_reach(s, b)))
            continue;
        for (uint32_t slot = 0; slot < s->slots; slot++)
            if (view->map->held[expert_map_at(view->map, layer, r, slot)] == expert)
                return true;
    }
    return false;
}

bool check_last_copy(struct sim *s, const struct sim_agent *a, bool careful)
{
    const struct view *view = s->coordinator.disk.view;
    int rank = view && agent_lives(a) ? rank_in(view, a) : -1;

    if (rank < 0)
        return false;
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t slot = 0; slot < s->slots; slot++) {
            int32_t expert = view->map->held[expert_map_at(view->map, l, (uint32_t)rank, slot)];
            if (expert >= 0 && !has_other_holder(s, a, l, expert, careful))
                return true;
        }
    return false;
}

/* ---- at rest ---- */

static bool is_quiet_agent(const struct view *view, struct sim_agent *a, char *why, size_t size)
{
    struct agent_status status;
    int rank = view ? rank_in(view, a) : -1;

    if (!a->up || a->engine.pc == ENGINE_NONE) {
        snprintf(why, size, "a%02u %s is not back", a->index, a->up ? "'s engine" : "");
        return false;
    }
    agent_core_status(a->core, &status);
    if (!status.welcomed || status.promised_epoch || status.flip_pending) {
        snprintf(why, size, "a%02u is %s e%" PRIu64, a->index, !status.welcomed ? "not welcomed" : "left in doubt of",
                 status.promised_epoch);
        return false;
    }
    if (a->n_queue > 0 || (status.state != MS_NONE && !machine_final(status.state))) {
        snprintf(why, size, "a%02u is still in %s of operation %" PRIu64, a->index, machine_state_name(status.state),
                 status.op);
        return false;
    }
    if (rank < 0)
        return true;
    if (status.applied_epoch != view->epoch || a->engine.local.view != view->epoch) {
        snprintf(why, size, "a%02u serves in e%" PRIu64 " (its agent in e%" PRIu64 "), committed is e%" PRIu64,
                 a->index, a->engine.local.view, status.applied_epoch, view->epoch);
        return false;
    }
    if (a->engine.pc != ENGINE_SLEEPING || a->page.engine_state == PAGE_ENGINE_HELD || a->engine.requests > 0) {
        snprintf(why, size,
                 "a%02u's engine is %s step %" PRIu64 " (gate %" PRId64 ", %" PRIu64 " requested steps left)", a->index,
                 a->page.engine_state == PAGE_ENGINE_HELD ? "held before" : "in or before", a->engine.local.next,
                 (int64_t)a->page.gate, a->engine.requests);
        return false;
    }
    return true;
}

bool check_is_quiet(struct sim *s, char *why, size_t size)
{
    struct coordinator_status status;

    if (!s->coordinator.up || s->coordinator.paused_until > s->now) {
        snprintf(why, size, "the coordinator is not back");
        return false;
    }
    coordinator_status(s->coordinator.core, s->now, &status);
    if (status.degraded[0]) {
        snprintf(why, size, "the view is degraded: %s", status.degraded);
        return false;
    }
    if (status.op_running || strcmp(status.commit_state, "IDLE") != 0) {
        snprintf(why, size, "the coordinator is %s, operation %" PRIu64 " in %s awaits %s", status.commit_state,
                 status.op.record.op, status.op.phase ? status.op.phase : "-", status.op.awaited);
        return false;
    }
    for (uint32_t i = 0; status.view && i < status.view->n; i++)
        if (!agent_is(agent_of(s, &status.view->members[i]), &status.view->members[i])) {
            snprintf(why, size, "the view e%" PRIu64 " names %s, whose incarnation is gone", status.view->epoch,
                     status.view->members[i].id);
            return false;
        }
    for (uint32_t i = 0; i < s->n; i++)
        if (s->agents[i].paused_until > s->now) {
            snprintf(why, size, "a%02u is stopped", i);
            return false;
        }
    for (uint32_t i = 0; i < s->n; i++)
        if (!is_quiet_agent(status.view, &s->agents[i], why, size))
            return false;
    return true;
}
