/* Engines that do not answer when an operation asks them for something: by policy it is aborted, or goes on without
 * them. Part of the coordinator's core; pure.
 *
 * An engine that waits for a peer in vain says so in time (its event has a deadline, below the stage's), so that who is
 * silent at the end is to blame.  Going on without it, before the commit: the next view has no such rank, if all
 * experts have copies on the others, and those prepare that view.  A new rank is let go as after an abort; an existing
 * one takes part in the commit like a rank that leaves, for which its engine need not do anything but end its steps. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/core_internal.h"

void silent_policy(struct coordinator *c, enum engine_policy asked)
{
    struct operation *op = &c->op;
    op->on_prepare = asked ? asked : c->config.on_prepare_timeout ? c->config.on_prepare_timeout : ENGINE_ABORT;
    op->on_drain = asked ? asked : c->config.on_drain_timeout ? c->config.on_drain_timeout : ENGINE_CONTINUE;
}

/* A failure that may be another engine's fault: the peer that did not come, or its own absence. */
bool silent_holds(struct coordinator *c, const struct msg_stage_done *d, const char *id)
{
    struct operation *op = &c->op;
    bool may = d->code == ERR_TIMEOUT || d->code == ERR_UNREACHABLE ||
               (d->code == ERR_NOTFOUND && op->on_prepare == ENGINE_CONTINUE);
    if (d->stage != STAGE_ENGINE_PREPARE || op->phase != PHASE_ENGINE_PREPARE || !may)
        return false;
    if (d->attempt == op->stage_attempt && !op->held[0])
        snprintf(op->held, sizeof(op->held), "agent %s: %s: %.180s", id, op_stage_name(d->stage), d->text);
    return true;
}

/* A new rank without an engine is no loss to those who serve; it may be back in time, else it is left out. */
bool silent_spares(const struct coordinator *c, uint32_t peer)
{
    int party = operation_party(c, peer);
    return party >= 0 && (uint32_t)party >= c->durable.open.n_old && c->durable.open.kind == OP_SCALE_UP &&
           c->op.on_prepare == ENGINE_CONTINUE && c->op.phase < PHASE_PROMISE && c->peers[peer].conn;
}

/* The proposed view without those; NULL: it cannot be, and *ret_why says so. */
static struct view *silent_view(struct coordinator *c, const bool *out, char *ret_why, size_t size)
{
    const struct view *was = c->op.proposed;
    int32_t from[RANKS_MAX];
    uint32_t n = 0;
    bool same = c->view != NULL;
    for (uint32_t r = 0; r < was->n; r++) {
        uint32_t p = members_find(c, was->members[r].id);
        bool stays = true;
        for (uint32_t i = 0; i < c->durable.open.n; i++)
            stays &= c->op.peer[i] != p || !out[i];
        if (!stays)
            continue;
        from[n++] = (int32_t)r;
        same &= members_rank(c, p) >= 0;
    }
    if (n == 0 || (same && c->view->n == n)) {
        snprintf(ret_why, size, "%s", n ? "without them nothing would change" : "no rank is left");
        return NULL;
    }
    struct view *view = view_new(n);
    struct expert_map *map = expert_map_select(was->map, from, n);
    if (!view || !map)
        abort();
    for (uint32_t r = 0; r < n; r++)
        view->members[r] = was->members[from[r]];
    view->manifest_digest = was->manifest_digest;
    view->kv_bytes = was->kv_bytes;
    view->map = map;
    uint64_t lost = plan_cover_from_dormant(map);
    if (lost && c->bug != COORDINATOR_BUG_WITHOUT_UNCOVERED) {
        snprintf(ret_why, size, "%llu experts (of all layers) have no copy on the %u other ranks",
                 (unsigned long long)lost, n);
        view_unref(view);
        return NULL;
    }
    return view;
}

/* It never was a rank, and is none of the operation any more. */
static void silent_dismiss(struct coordinator *c, uint32_t i, const char *why)
{
    struct op_record *r = &c->durable.open;
    struct operation *op = &c->op;
    struct msg *m = core_send(c, op->peer[i], MSG_OP_ABORT);
    if (m) {
        m->op_end.op = r->op;
        snprintf(m->op_end.why, sizeof(m->op_end.why), "%s", why);
    }
    op->bytes_done += op->progress[i];
    uint32_t after = --r->n - i;
    memmove(r->parties + i, r->parties + i + 1, after * sizeof(*r->parties));
    memmove(r->stays + i, r->stays + i + 1, after * sizeof(*r->stays));
    memmove(op->peer + i, op->peer + i + 1, after * sizeof(*op->peer));
    memmove(op->progress + i, op->progress + i + 1, after * sizeof(*op->progress));
    memmove(op->expected + i, op->expected + i + 1, after * sizeof(*op->expected));
    memmove(op->without + i, op->without + i + 1, after * sizeof(*op->without));
}

static void silent_leave_out(struct coordinator *c, const bool *out, const char *names)
{
    struct operation *op = &c->op;
    char why[160];
    struct view *view = silent_view(c, out, why, sizeof(why));
    if (!view) {
        operation_abort(c, "no answer from %s in %s by its deadline, and %s", names, op_phase_name(op->phase), why);
        return;
    }
    core_log(c, CORE_WARN, "operation %llu goes on without %s, whose engine has not prepared the next view",
             (unsigned long long)c->durable.open.op, names);
    size_t used = strlen(op->why);
    snprintf(op->why + used, sizeof(op->why) - used, "%swithout %s, whose engine did not prepare", used ? "; " : "",
             names);
    for (uint32_t i = c->durable.open.n; i-- > 0;) {
        op->left_out += out[i];
        if (out[i] && i >= c->durable.open.n_old)
            silent_dismiss(c, i, "its engine did not prepare the next view");
        else if (out[i])
            op->without[i] = true;
        if (op->without[i])
            c->durable.open.stays[i] = 0;
    }
    operation_draining(c, true); /* routers send nothing more to those who leave; what they have they may hand back */
    for (uint32_t i = 0; i < c->durable.open.n; i++)
        if (op->without[i])
            operation_ask(c, STAGE_DRAIN, i);
    plan_unref(op->plan); /* over other ranks: nothing is filled after the commit */
    op->plan = NULL;
    view_unref(op->proposed);
    op->proposed = view;
    op->held[0] = '\0';
    operation_stage(c, PHASE_ENGINE_PREPARE, STAGE_ENGINE_PREPARE);
}

/* Everybody has answered and somebody cannot, or the deadline is over. */
void silent_settle(struct coordinator *c, bool late)
{
    struct operation *op = &c->op;
    bool out[RANKS_MAX] = {false}, any = false;
    char names[160] = "";
    for (uint32_t i = 0; i < c->durable.open.n; i++) {
        const struct peer *p = &c->peers[op->peer[i]];
        bool asked = c->durable.open.stays[i] || op->without[i];
        out[i] = asked && ((late && !arrivals_has(&op->stage, op->peer[i])) || !p->engine);
        if (!out[i])
            continue;
        any |= !op->without[i]; /* who leaves anyway, and does not answer even so: no way to go on */
        size_t used = strlen(names);
        snprintf(names + used, sizeof(names) - used, "%s%s", used ? ", " : "", p->member.id);
    }
    if (any && op->on_prepare == ENGINE_CONTINUE)
        silent_leave_out(c, out, names);
    else if (late)
        operation_abort(c, "no answer from %s in %s by its deadline", names, op_phase_name(op->phase));
    else
        operation_abort(c, "%s", op->held);
}
