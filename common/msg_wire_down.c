/* Messages of the coordinator to an agent, on the wire.  Pure, any thread. */
#include <stdlib.h>
#include <string.h>

#include "common/msg_wire_parts.h"
#include "common/topology_wire.h"

/* ---- out ---- */

static Pb__Welcome *welcome_to_pb(const struct msg_welcome *m, bool *ok)
{
    Pb__Welcome *pb = pb_new(&pb__welcome__descriptor);
    if (!pb)
        return NULL;
    pb->lease_ms = m->lease_ms;
    pb->heartbeat_ms = m->heartbeat_ms;
    pb->indoubt_ms = m->indoubt_ms;
    pb->member = m->member;
    pb->has_load_window_ms = m->load_window_ms != 0;
    pb->load_window_ms = m->load_window_ms;
    if (m->view && !(pb->view = view_to_pb(m->view)))
        *ok = false;
    return pb;
}

static Pb__OpBegin *op_begin_to_pb(const struct msg_op_begin *m, bool *ok)
{
    Pb__OpBegin *pb = pb_new(&pb__op_begin__descriptor);
    if (!pb)
        return NULL;
    pb->op = m->op;
    pb->kind = (Pb__OpKind)m->kind;
    pb->role = (Pb__OpRole)m->role;
    pb->self = m->self;
    pb->n_old = m->n_old;
    if (members_to_pb(m->parties, m->n, &pb->parties, &pb->n_parties) < 0 ||
        (m->model && !(pb->model = model_to_pb(m->model))))
        *ok = false;
    return pb;
}

static Pb__StageStart *stage_to_pb(const struct msg_stage *m, bool *ok)
{
    Pb__StageStart *pb = pb_new(&pb__stage_start__descriptor);
    if (!pb)
        return NULL;
    pb->op = m->op;
    pb->stage = (Pb__Stage)m->stage;
    pb->round = m->round;
    pb->attempt = m->attempt;
    pb->step = m->step;
    pb->deadline_ms = m->deadline_ms;
    pb->load = m->load;
    pb->has_strict = pb->strict = m->strict;
    pb->plan_digest = m->plan_digest;
    pb->has_bandwidth = m->bandwidth != 0;
    pb->bandwidth = m->bandwidth;
    pb->has_n_holders = m->n_holders != 0;
    pb->n_holders = m->n_holders;
    if (members_to_pb(m->sources, m->n_sources, &pb->sources, &pb->n_sources) < 0)
        *ok = false;
    if ((m->map && !(pb->map = expert_map_to_pb(m->map))) || (m->plan && !(pb->plan = plan_to_pb(m->plan))) ||
        (m->view && !(pb->view = view_to_pb(m->view))) || !msg_blob_to_bytes(m->blob, &pb->has_blob, &pb->blob))
        *ok = false;
    return pb;
}

static Pb__OpEnd *op_end_to_pb(const struct msg_op_end *m, bool *ok)
{
    Pb__OpEnd *pb = pb_new(&pb__op_end__descriptor);
    if (!pb)
        return NULL;
    pb->op = m->op;
    pb->epoch = m->epoch;
    pb->why = msg_text(m->why, ok);
    return pb;
}

static Pb__Prepare *prepare_to_pb(const struct msg_prepare *m)
{
    Pb__Prepare *pb = pb_new(&pb__prepare__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = m->epoch;
    pb->op = m->op;
    pb->kind = (Pb__FlipKind)m->kind;
    pb->lead_ms = m->lead_ms;
    return pb;
}

static Pb__Go *go_to_pb(const struct msg_go *m, bool *ok)
{
    Pb__Go *pb = pb_new(&pb__go__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = m->epoch;
    pb->op = m->op;
    pb->step = m->step;
    pb->wave = m->wave;
    pb->kind = (Pb__FlipKind)m->kind;
    if (m->view && !(pb->view = view_to_pb(m->view)))
        *ok = false;
    return pb;
}

static Pb__MapFlip *map_to_pb(const struct msg_map *m, bool *ok)
{
    Pb__MapFlip *pb = pb_new(&pb__map_flip__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = m->epoch;
    pb->op = m->op;
    if (!(pb->map = expert_map_to_pb(m->map)))
        *ok = false;
    return pb;
}

static Pb__Evicted *evicted_to_pb(const struct msg_evicted *m, bool *ok)
{
    Pb__Evicted *pb = pb_new(&pb__evicted__descriptor);
    if (pb)
        pb->why = msg_text(m->why, ok);
    return pb;
}

static Pb__Notify *notify_to_pb(const struct msg_notify *m)
{
    Pb__Notify *pb = pb_new(&pb__notify__descriptor);
    if (!pb)
        return NULL;
    pb->op = m->op;
    pb->what = (Pb__NotifyWhat)m->what;
    return pb;
}

static Pb__AbortEpoch *abort_to_pb(const struct msg_abort *m)
{
    Pb__AbortEpoch *pb = pb_new(&pb__abort_epoch__descriptor);
    if (pb)
        pb->epoch = m->epoch;
    return pb;
}

static Pb__Verify *verify_to_pb(const struct msg_verify *m)
{
    Pb__Verify *pb = pb_new(&pb__verify__descriptor);
    if (pb)
        pb->request = m->request;
    return pb;
}

Pb__AgentDown *msg_to_down(const struct msg *msg)
{
    Pb__AgentDown *down = pb_new(&pb__agent_down__descriptor);
    if (!down)
        return NULL;
    bool ok = true;
    switch (msg->type) {
    case MSG_WELCOME:
        down->body_case = PB__AGENT_DOWN__BODY_WELCOME;
        ok = (down->welcome = welcome_to_pb(&msg->welcome, &ok)) && ok;
        break;
    case MSG_EVICTED:
        down->body_case = PB__AGENT_DOWN__BODY_EVICTED;
        ok = (down->evicted = evicted_to_pb(&msg->evicted, &ok)) && ok;
        break;
    case MSG_OP_BEGIN:
        down->body_case = PB__AGENT_DOWN__BODY_OP_BEGIN;
        ok = (down->op_begin = op_begin_to_pb(&msg->op_begin, &ok)) && ok;
        break;
    case MSG_STAGE:
        down->body_case = PB__AGENT_DOWN__BODY_STAGE;
        ok = (down->stage = stage_to_pb(&msg->stage, &ok)) && ok;
        break;
    case MSG_NOTIFY:
        down->body_case = PB__AGENT_DOWN__BODY_NOTIFY;
        ok = (down->notify = notify_to_pb(&msg->notify)) != NULL;
        break;
    case MSG_OP_END:
        down->body_case = PB__AGENT_DOWN__BODY_OP_END;
        ok = (down->op_end = op_end_to_pb(&msg->op_end, &ok)) && ok;
        break;
    case MSG_OP_ABORT:
        down->body_case = PB__AGENT_DOWN__BODY_OP_ABORT;
        ok = (down->op_abort = op_end_to_pb(&msg->op_end, &ok)) && ok;
        break;
    case MSG_PREPARE:
        down->body_case = PB__AGENT_DOWN__BODY_PREPARE;
        ok = (down->prepare = prepare_to_pb(&msg->prepare)) != NULL;
        break;
    case MSG_GO:
        down->body_case = PB__AGENT_DOWN__BODY_GO;
        ok = (down->go = go_to_pb(&msg->go, &ok)) && ok;
        break;
    case MSG_ABORT:
        down->body_case = PB__AGENT_DOWN__BODY_ABORT;
        ok = (down->abort = abort_to_pb(&msg->abort)) != NULL;
        break;
    case MSG_DISMISS:
        down->body_case = PB__AGENT_DOWN__BODY_DISMISS;
        ok = (down->dismiss = op_end_to_pb(&msg->op_end, &ok)) && ok;
        break;
    case MSG_MAP:
        down->body_case = PB__AGENT_DOWN__BODY_MAP;
        ok = (down->map = map_to_pb(&msg->map, &ok)) && ok;
        break;
    case MSG_VERIFY:
        down->body_case = PB__AGENT_DOWN__BODY_VERIFY;
        ok = (down->verify = verify_to_pb(&msg->verify)) != NULL;
        break;
    default:
        ok = false;
    }
    if (!ok) {
        pb_free(down);
        return NULL;
    }
    return down;
}

/* ---- in ---- */

static int welcome_from_pb(const Pb__Welcome *pb, struct msg_welcome *m, struct err *err)
{
    m->lease_ms = pb->lease_ms;
    m->heartbeat_ms = pb->heartbeat_ms;
    m->indoubt_ms = pb->indoubt_ms;
    m->member = pb->member;
    m->load_window_ms = pb->has_load_window_ms ? pb->load_window_ms : 0;
    if (pb->member && !pb->view)
        return err_set(err, ERR_PROTOCOL, "a member of no view");
    return pb->view ? view_from_pb(pb->view, &m->view, err) : 0;
}

static int op_begin_from_pb(const Pb__OpBegin *pb, struct msg_op_begin *m, struct err *err)
{
    if (pb->self >= pb->n_parties || pb->n_old > pb->n_parties)
        return err_set(err, ERR_PROTOCOL, "party %u, %u of them old, of %zu", pb->self, pb->n_old, pb->n_parties);
    m->op = pb->op;
    m->kind = (uint32_t)pb->kind;
    m->role = (uint32_t)pb->role;
    m->self = pb->self;
    m->n_old = pb->n_old;
    int rc = members_from_pb(pb->parties, pb->n_parties, &m->parties, err);
    if (rc < 0)
        return rc;
    m->n = (uint32_t)pb->n_parties;
    return pb->model ? model_from_pb(pb->model, &m->model, err) : 0;
}

/* What a stage cannot be without. */
static int stage_check(const Pb__StageStart *pb, struct err *err)
{
    const char *lacks = NULL;
    if (pb->stage == PB__STAGE__ALLOCATE && pb->load && !pb->map)
        lacks = "map";
    if (pb->stage == PB__STAGE__GROUP && !pb->has_blob)
        lacks = "id";
    if (pb->stage == PB__STAGE__MAPPING && !pb->plan)
        lacks = "plan";
    if (pb->stage == PB__STAGE__ENGINE_PREPARE && !pb->view)
        lacks = "view";
    if (pb->stage == PB__STAGE__RELOAD && !pb->map)
        lacks = "map";
    if (lacks)
        return err_set(err, ERR_PROTOCOL, "stage %s without its %s", op_stage_name((enum op_stage)pb->stage), lacks);
    return 0;
}

static int stage_from_pb(const Pb__StageStart *pb, struct msg_stage *m, struct err *err)
{
    int rc = stage_check(pb, err);
    if (rc < 0)
        return rc;
    m->op = pb->op;
    m->stage = (uint32_t)pb->stage;
    m->round = pb->round;
    m->attempt = pb->attempt;
    m->step = pb->step;
    m->deadline_ms = pb->deadline_ms;
    m->load = pb->load;
    m->strict = pb->has_strict && pb->strict;
    m->plan_digest = pb->plan_digest;
    m->bandwidth = pb->has_bandwidth ? pb->bandwidth : 0;
    m->n_holders = pb->has_n_holders ? pb->n_holders : 0;
    if (m->n_holders > pb->n_sources)
        return err_set(err, ERR_PROTOCOL, "%u holders of %zu sources", m->n_holders, pb->n_sources);
    rc = members_from_pb(pb->sources, pb->n_sources, &m->sources, err);
    if (rc == 0)
        m->n_sources = (uint32_t)pb->n_sources;
    if (rc == 0 && pb->map)
        rc = expert_map_from_pb(pb->map, &m->map, err);
    if (rc == 0 && pb->plan)
        rc = plan_from_pb(pb->plan, &m->plan, err);
    if (rc == 0 && pb->view)
        rc = view_from_pb(pb->view, &m->view, err);
    if (rc == 0 && pb->has_blob)
        rc = msg_blob_from_bytes(&pb->blob, &m->blob, err);
    return rc;
}

static int op_end_from_pb(const Pb__OpEnd *pb, struct msg_op_end *m, struct err *err)
{
    m->op = pb->op;
    m->epoch = pb->epoch;
    return pb_string(pb->why, m->why, sizeof m->why, "reason", err);
}

static int prepare_from_pb(const Pb__Prepare *pb, struct msg_prepare *m, struct err *err)
{
    if (pb->epoch == 0 || pb->kind == PB__FLIP_KIND__FLIP_NONE)
        return err_set(err, ERR_PROTOCOL, "epoch %llu, flip kind %d", (unsigned long long)pb->epoch, pb->kind);
    m->epoch = pb->epoch;
    m->op = pb->op;
    m->kind = (uint32_t)pb->kind;
    m->lead_ms = pb->lead_ms;
    return 0;
}

static int go_from_pb(const Pb__Go *pb, struct msg_go *m, struct err *err)
{
    if (pb->epoch == 0 || pb->kind == PB__FLIP_KIND__FLIP_NONE)
        return err_set(err, ERR_PROTOCOL, "epoch %llu, flip kind %d", (unsigned long long)pb->epoch, pb->kind);
    if (!pb->view)
        return err_set(err, ERR_PROTOCOL, "epoch %llu without its view", (unsigned long long)pb->epoch);
    m->epoch = pb->epoch;
    m->op = pb->op;
    m->step = pb->step;
    m->wave = pb->wave;
    m->kind = (uint32_t)pb->kind;
    return view_from_pb(pb->view, &m->view, err);
}

int msg_from_down(const Pb__AgentDown *down, struct msg *ret_msg, struct err *err)
{
    switch (down->body_case) {
    case PB__AGENT_DOWN__BODY_WELCOME:
        ret_msg->type = MSG_WELCOME;
        return welcome_from_pb(down->welcome, &ret_msg->welcome, err);
    case PB__AGENT_DOWN__BODY_EVICTED:
        ret_msg->type = MSG_EVICTED;
        return pb_string(down->evicted->why, ret_msg->evicted.why, sizeof ret_msg->evicted.why, "reason", err);
    case PB__AGENT_DOWN__BODY_OP_BEGIN:
        ret_msg->type = MSG_OP_BEGIN;
        return op_begin_from_pb(down->op_begin, &ret_msg->op_begin, err);
    case PB__AGENT_DOWN__BODY_STAGE:
        ret_msg->type = MSG_STAGE;
        return stage_from_pb(down->stage, &ret_msg->stage, err);
    case PB__AGENT_DOWN__BODY_NOTIFY:
        ret_msg->type = MSG_NOTIFY;
        ret_msg->notify = (struct msg_notify){.op = down->notify->op, .what = (uint32_t)down->notify->what};
        return 0;
    case PB__AGENT_DOWN__BODY_OP_END:
        ret_msg->type = MSG_OP_END;
        return op_end_from_pb(down->op_end, &ret_msg->op_end, err);
    case PB__AGENT_DOWN__BODY_OP_ABORT:
        ret_msg->type = MSG_OP_ABORT;
        return op_end_from_pb(down->op_abort, &ret_msg->op_end, err);
    case PB__AGENT_DOWN__BODY_PREPARE:
        ret_msg->type = MSG_PREPARE;
        return prepare_from_pb(down->prepare, &ret_msg->prepare, err);
    case PB__AGENT_DOWN__BODY_GO:
        ret_msg->type = MSG_GO;
        return go_from_pb(down->go, &ret_msg->go, err);
    case PB__AGENT_DOWN__BODY_ABORT:
        ret_msg->type = MSG_ABORT;
        ret_msg->abort.epoch = down->abort->epoch;
        return 0;
    case PB__AGENT_DOWN__BODY_DISMISS:
        ret_msg->type = MSG_DISMISS;
        return op_end_from_pb(down->dismiss, &ret_msg->op_end, err);
    case PB__AGENT_DOWN__BODY_MAP:
        ret_msg->type = MSG_MAP;
        ret_msg->map.epoch = down->map->epoch;
        ret_msg->map.op = down->map->op;
        return expert_map_from_pb(down->map->map, &ret_msg->map.map, err);
    case PB__AGENT_DOWN__BODY_VERIFY:
        ret_msg->type = MSG_VERIFY;
        ret_msg->verify.request = down->verify->request;
        return 0;
    default:
        return err_set(err, ERR_PROTOCOL, "no body that this version knows");
    }
}
