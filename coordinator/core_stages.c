/* The stages of an operation: what is asked of whom, and what an answer means.  Part of the coordinator's core; pure.
 *
 * A stage is asked of every party that it concerns; an arrival set counts the answers by agent and incarnation (the
 * "engine count" of the phase), and the operation goes on when it is complete. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

#define MS 1000000ULL

static bool operation_concerns(const struct coordinator *c, enum op_stage stage, uint32_t i)
{
    const struct op_record *r = &c->durable.open;
    bool joins = i >= r->n_old, leaves = !r->stays[i];
    switch (stage) {
    case STAGE_ALLOCATE:
        return joins;
    case STAGE_GROUP_ID:
        return i == 0;
    case STAGE_KV:
        return !leaves;
    case STAGE_ENGINE_PREPARE: /* who leaves because it has not: so that it knows */
        return !leaves || c->op.without[i];
    case STAGE_DRAIN:
    case STAGE_LET_GO:
        return leaves;
    case STAGE_GRACE: /* those whose slots this round overwrites, and that serve */
        for (uint32_t k = 0; k < c->op.plan->n_moves; k++)
            if (c->op.plan->moves[k].round == c->op.round && c->op.plan->moves[k].dst == i)
                return members_rank(c, c->op.peer[i]) >= 0;
        return false;
    case STAGE_RELOAD:
        return reload_concerns(c, i);
    default:
        return true;
    }
}

void operation_ask(struct coordinator *c, enum op_stage stage, uint32_t i)
{
    struct operation *op = &c->op;
    struct msg *m = core_send(c, op->peer[i], MSG_STAGE);
    if (!m)
        return;
    struct msg_stage *s = &m->stage;
    s->op = c->durable.open.op;
    s->stage = stage;
    s->round = stage == STAGE_FILL || stage == STAGE_GRACE ? op->round : 0;
    s->attempt = op->stage_attempt;
    bool moves = stage == STAGE_WEIGHTS || stage == STAGE_FILL || stage == STAGE_RELOAD;
    s->deadline_ms = stage == STAGE_DRAIN ? c->config.drain_ms : moves ? c->config.transfer_ms : c->config.stage_ms;
    s->strict = stage == STAGE_DRAIN && op->on_drain == ENGINE_ABORT && !op->without[i];
    switch (stage) {
    case STAGE_ALLOCATE:
        s->load = c->durable.open.kind == OP_START;
        s->map = expert_map_ref(op->load_map);
        break;
    case STAGE_GROUP:
        s->blob = blob_ref(op->group_id);
        break;
    case STAGE_MAPPING:
        s->plan = plan_ref(op->plan);
        s->plan_digest = expert_map_digest(op->plan->target);
        break;
    case STAGE_ENGINE_PREPARE:
        s->view = view_ref(op->proposed);
        break;
    case STAGE_FILL:
        s->bandwidth = c->durable.open.kind == OP_REBALANCE ? (uint64_t)op->mib_s << 20 : 0;
        break;
    case STAGE_RELOAD:
        reload_ask(c, i, s);
        break;
    case STAGE_GRACE:
        s->step = op->stage_step;
        if (c->bug == COORDINATOR_BUG_GRACE_BY_OWN_ACK)
            for (size_t k = 0; k < c->map_acks.n; k++)
                if (c->map_acks.v[k].id == op->peer[i])
                    s->step = c->map_acks.v[k].value;
        break;
    default:
        break;
    }
}

/* What a stage is, in the words of the log. */
static const char *stage_purpose(enum op_stage stage)
{
    switch (stage) {
    case STAGE_ALLOCATE: return "memory for the weights";
    case STAGE_GROUP_ID: return "an id for the standby group";
    case STAGE_GROUP: return "the standby group";
    case STAGE_MAPPING: return "map and plan are checked";
    case STAGE_WEIGHTS: return "weights move to the new ranks";
    case STAGE_KV: return "bytes for the KV cache";
    case STAGE_GRACE: return "the last steps that read the retired slots";
    case STAGE_FILL: return "experts move";
    case STAGE_DRAIN: return "requests end or are handed back";
    case STAGE_ENGINE_PREPARE: return "engines prepare the next view";
    case STAGE_LET_GO: return "leavers let go of weights and communicators";
    case STAGE_RELOAD: return "experts without a copy are read again";
    case STAGE_MAX: break;
    }
    return "?";
}

/* Asks everybody whom the stage concerns; operation_next follows when all have answered. */
void operation_stage(struct coordinator *c, enum op_phase phase, enum op_stage stage)
{
    struct operation *op = &c->op;
    char names[160], why[256];
    arrivals_reset(&op->stage);
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        if (operation_concerns(c, stage, i) &&
            arrivals_expect(&op->stage, op->peer[i], c->durable.open.parties[i].incarnation) < 0)
            abort();
    core_names(c, &op->stage, names, sizeof(names));
    snprintf(why, sizeof(why), "%s: %s%s", stage_purpose(stage), names[0] ? "awaits " : "nobody is concerned", names);
    operation_phase(c, phase, why);
    op->stage_kind = stage;
    op->stage_attempt++;
    bool moves = stage == STAGE_WEIGHTS || stage == STAGE_FILL || stage == STAGE_ALLOCATE || stage == STAGE_RELOAD;
    op->deadline_ns = c->now_ns + (moves ? c->config.transfer_ms : c->config.stage_ms) * MS;
    for (uint32_t i = 0; i < c->durable.open.n; i++) {
        op->bytes_done += op->progress[i];
        op->progress[i] = 0;
    }
    for (uint32_t i = 0; i < c->durable.open.n && stage != STAGE_LET_GO; i++)
        if (operation_concerns(c, stage, i))
            operation_ask(c, stage, i);
    if (arrivals_complete(&op->stage))
        operation_next(c);
}

void operation_notify(struct coordinator *c, enum notify_type what)
{
    bool init = what == NOTIFY_NEW_CORE_ENGINES_INIT_READY || what == NOTIFY_NEW_CORE_ENGINES_WEIGHTS_INIT_READY;
    uint32_t n = init ? c->durable.open.n_old : c->durable.open.n;
    for (uint32_t i = 0; i < n; i++) {
        struct msg *m = core_send(c, c->op.peer[i], MSG_NOTIFY);
        if (!m)
            continue;
        m->notify.op = c->durable.open.op;
        m->notify.what = what;
    }
    if (init)
        core_log(c, CORE_INFO, "%s: %zu engines counted", notify_name(what), c->op.stage.n);
}

void operation_stage_done(struct coordinator *c, uint32_t peer, const struct msg_stage_done *d)
{
    struct operation *op = &c->op;
    struct op_record *r = &c->durable.open;
    int party = operation_party(c, peer);
    if (d->stage == STAGE_LET_GO && d->code == 0)
        c->peers[peer].holds = false;
    if (party < 0 || d->op != r->op)
        return;
    const char *id = c->peers[peer].member.id;
    if (d->code < 0 && d->stage == STAGE_RELOAD) {
        if (op->phase == PHASE_RELOAD && d->attempt == op->stage_attempt)
            reload_failed(c, peer, d->code, d->text);
        return;
    }
    if (d->code < 0 && !op->decided && !silent_holds(c, d, id)) {
        operation_abort(c, "agent %s: %s: %.180s", id, op_stage_name(d->stage), d->text);
        return;
    }
    if (d->code < 0 && op->decided && d->stage != STAGE_LET_GO) {
        core_log(c, CORE_ERROR, "agent %s: %s of operation %llu: %s", id, op_stage_name(d->stage),
                 (unsigned long long)r->op, d->text);
        snprintf(op->why, sizeof(op->why), "committed; the fill after the commit is incomplete: agent %s: %.120s", id,
                 d->text);
        operation_end(c, OUTCOME_DONE, op->why);
        return;
    }
    if (d->stage == STAGE_DRAIN) {
        arrivals_add(&op->drained, peer, c->peers[peer].member.incarnation, 0);
        if (op->phase == PHASE_DRAIN && arrivals_complete(&op->drained))
            operation_next(c);
        return;
    }
    if (d->stage != op->stage_kind || (d->stage != STAGE_LET_GO && d->attempt != op->stage_attempt) ||
        arrivals_add(&op->stage, peer, c->peers[peer].member.incarnation, d->value) != ARRIVAL_COUNTED)
        return;
    op->progress[party] = d->bytes;
    c->changed = true;
    if (d->stage == STAGE_GROUP_ID && d->blob) {
        blob_unref(op->group_id);
        op->group_id = blob_ref(d->blob);
    }
    if (d->stage == STAGE_ALLOCATE && d->model) {
        struct err err = {0};
        if (!c->durable.model || !c->view) {
            /* a cold start: the first one to report sets the model, the others must agree */
            if (c->op.stage.missing + 1 == c->op.stage.n) {
                model_unref(c->durable.model);
                c->durable.model = model_ref(d->model);
            } else if (model_merge(c->durable.model, d->model, &err) < 0) {
                operation_abort(c, "agent %s has loaded something else: %.300s; all need the same --checkpoint", id,
                                err.text);
                return;
            }
        }
    }
    if (arrivals_complete(&op->stage))
        operation_next(c);
}

void operation_progress(struct coordinator *c, uint32_t peer, const struct msg_progress *p)
{
    int party = operation_party(c, peer);
    if (party < 0 || p->op != c->durable.open.op)
        return;
    /* A rebalance nobody waits for: what does not get on is given up, whoever says that he lives. */
    bool stuck = c->durable.open.kind == OP_REBALANCE && p->bytes <= c->op.progress[party];
    c->op.progress[party] = p->bytes;
    if (p->total) {
        c->op.bytes_planned += p->total - c->op.expected[party];
        c->op.expected[party] = p->total;
    }
    if (!stuck && c->op.deadline_ns &&
        (c->op.phase == PHASE_WEIGHTS || c->op.phase == PHASE_FILL || c->op.phase == PHASE_ALLOCATE ||
         c->op.phase == PHASE_RELOAD))
        c->op.deadline_ns = c->now_ns + c->config.transfer_ms * MS;
    c->changed = true;
}

/* An agent is back: what it missed of the operation is said again. */
void operation_hello(struct coordinator *c, uint32_t peer, const struct msg_hello *hello)
{
    const struct op_record *r = &c->durable.open;
    bool same = c->op.phase != PHASE_NONE && hello->op == r->op;
    if (hello->op && !same) {
        bool done = hello->op == c->durable.commit.op || (hello->op == c->last.record.op && c->last.record.outcome == OUTCOME_DONE);
        struct msg *m = core_send(c, peer, done ? MSG_OP_END : MSG_OP_ABORT);
        m->op_end.op = hello->op;
        snprintf(m->op_end.why, sizeof(m->op_end.why), "operation %llu has ended", (unsigned long long)hello->op);
    }
    int party = operation_party(c, peer);
    if (party < 0 && same && c->op.announced) { /* the operation went on without it, and it has not heard of that */
        struct msg *m = core_send(c, peer, MSG_OP_ABORT);
        m->op_end.op = hello->op;
        snprintf(m->op_end.why, sizeof(m->op_end.why), "the operation goes on without it");
    }
    if (party < 0 || !c->op.announced)
        return;
    /* Who comes back without an operation that is decided, or being so (a re-adopted agent), has its part in the commit,
     * and none in what follows: it cannot be entered in the middle. */
    if (!same && !c->op.decided && c->commit.state != COMMIT_DECIDING)
        operation_announce(c, (uint32_t)party);
    if ((c->op.phase == PHASE_GRACE || c->op.phase == PHASE_FILL || c->op.phase == PHASE_RELOAD) && !arrivals_has(&c->op.stage, peer) &&
        operation_concerns(c, c->op.stage_kind, (uint32_t)party))
        operation_ask(c, c->op.stage_kind, (uint32_t)party);
}
