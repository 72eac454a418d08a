/* The records of the journal on the wire.  Pure, any thread. */
#include "coordinator/durable_wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/topology_wire.h"

#define SAME(wire, here) _Static_assert((int)(wire) == (int)(here), #wire)
SAME(PB__OP_OUTCOME__RUNNING, OUTCOME_RUNNING);
SAME(PB__OP_OUTCOME__DONE, OUTCOME_DONE);
SAME(PB__OP_OUTCOME__ABORTED, OUTCOME_ABORTED);
SAME(PB__OP_OUTCOME__FAILED, OUTCOME_FAILED);

static int phases_to_pb(const struct op_record *record, Pb__OpRecord *pb)
{
    pb->phases = calloc(record->n_phases + 1, sizeof *pb->phases);
    if (!pb->phases)
        return ERR_NOMEM;
    for (uint32_t i = 0; i < record->n_phases; i++) {
        Pb__PhaseTime *t = pb_new(&pb__phase_time__descriptor);
        if (!t)
            return ERR_NOMEM;
        pb->phases[pb->n_phases++] = t;
        t->ns = record->phases[i].ns;
        t->phase = strdup(record->phases[i].phase);
        if (!t->phase)
            return ERR_NOMEM;
    }
    return 0;
}

Pb__OpRecord *op_record_to_pb(const struct op_record *record)
{
    Pb__OpRecord *pb = pb_new(&pb__op_record__descriptor);
    if (!pb)
        return NULL;
    pb->op = record->op;
    pb->kind = (Pb__OpKind)record->kind;
    pb->outcome = (Pb__OpOutcome)record->outcome;
    pb->target = record->target;
    pb->flip = (Pb__FlipKind)record->flip;
    pb->epoch = record->epoch;
    pb->key = strdup(record->key);
    pb->why = strdup(record->why);
    pb->n_old = record->n_old;
    pb->started_ms = record->started_ms;
    pb->ended_ms = record->ended_ms;
    pb->bytes = record->bytes;
    pb->hold_ns_max = record->hold_ns_max;
    pb->stays.data = calloc(record->n ? record->n : 1, 1);
    if (record->plan) {
        pb->plan = plan_to_pb(record->plan);
        pb->planned_over = expert_map_to_pb(record->planned_over);
        pb->has_round = 1;
        pb->round = record->round;
    }
    if (phases_to_pb(record, pb) < 0 || (record->plan && (!pb->plan || !pb->planned_over))) {
        pb_free(pb);
        return NULL;
    }
    if (!pb->key || !pb->why || !pb->stays.data ||
        members_to_pb(record->parties, record->n, &pb->parties, &pb->n_parties) < 0) {
        pb_free(pb);
        return NULL;
    }
    pb->stays.len = record->n;
    if (record->stays)
        memcpy(pb->stays.data, record->stays, record->n);
    return pb;
}

int op_record_from_pb(const Pb__OpRecord *pb, struct op_record *ret_record, struct err *err)
{
    struct op_record r = {
        .op = pb->op,
        .kind = (uint32_t)pb->kind,
        .outcome = (uint32_t)pb->outcome,
        .target = pb->target,
        .flip = (uint32_t)pb->flip,
        .epoch = pb->epoch,
        .n_old = pb->n_old,
        .started_ms = pb->started_ms,
        .ended_ms = pb->ended_ms,
        .bytes = pb->bytes,
        .hold_ns_max = pb->hold_ns_max,
    };
    if (pb->stays.len != pb->n_parties || pb->n_old > pb->n_parties)
        return err_set(err, ERR_PROTOCOL, "operation %llu: %zu parties, %u of them old, with %zu marks",
                       (unsigned long long)pb->op, pb->n_parties, pb->n_old, pb->stays.len);
    int rc;
    if ((rc = pb_string(pb->key, r.key, sizeof r.key, "an operation's key", err)) < 0 ||
        (rc = pb_string(pb->why, r.why, sizeof r.why, "an operation's reason", err)) < 0 ||
        (rc = members_from_pb(pb->parties, pb->n_parties, &r.parties, err)) < 0)
        return rc;
    for (; r.n_phases < pb->n_phases && r.n_phases < OP_PHASES_MAX; r.n_phases++) {
        const Pb__PhaseTime *t = pb->phases[r.n_phases];
        snprintf(r.phases[r.n_phases].phase, sizeof r.phases[0].phase, "%s", t->phase);
        r.phases[r.n_phases].ns = t->ns;
    }
    r.n = (uint32_t)pb->n_parties;
    if (r.n > 0) {
        r.stays = malloc(r.n);
        if (!r.stays) {
            free(r.parties);
            return err_set(err, ERR_NOMEM, "no memory for an operation of %u parties", r.n);
        }
        for (uint32_t i = 0; i < r.n; i++)
            r.stays[i] = pb->stays.data[i] != 0;
    }
    if (pb->plan && pb->planned_over) {
        r.round = pb->round;
        if ((rc = plan_from_pb(pb->plan, &r.plan, err)) < 0 ||
            (rc = expert_map_from_pb(pb->planned_over, &r.planned_over, err)) < 0) {
            op_record_done(&r);
            return rc;
        }
    }
    *ret_record = r;
    return 0;
}

Pb__JournalCommit *commit_record_to_pb(const struct commit_record *record)
{
    Pb__JournalCommit *pb = pb_new(&pb__journal_commit__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = record->epoch;
    pb->op = record->op;
    pb->step = record->step;
    pb->wave = record->wave;
    pb->kind = (Pb__FlipKind)record->kind;
    pb->settled = record->settled;
    pb->view = view_to_pb(record->view);
    if (!pb->view || members_to_pb(record->old, record->n_old, &pb->old, &pb->n_old) < 0) {
        pb_free(pb);
        return NULL;
    }
    return pb;
}

int commit_record_from_pb(const Pb__JournalCommit *pb, struct commit_record *ret_record, struct err *err)
{
    struct commit_record r = {
        .epoch = pb->epoch,
        .op = pb->op,
        .step = pb->step,
        .wave = pb->wave,
        .kind = (uint32_t)pb->kind,
        .settled = pb->settled,
    };
    if (pb->epoch == 0 || pb->kind == PB__FLIP_KIND__FLIP_NONE)
        return err_set(err, ERR_PROTOCOL, "a decision for epoch %llu of kind %d", (unsigned long long)pb->epoch,
                       pb->kind);
    int rc = view_from_pb(pb->view, &r.view, err);
    if (rc < 0)
        return rc;
    rc = members_from_pb(pb->old, pb->n_old, &r.old, err);
    if (rc < 0) {
        view_unref(r.view);
        return rc;
    }
    r.n_old = (uint32_t)pb->n_old;
    *ret_record = r;
    return 0;
}
