/* Messages of an agent to the coordinator, on the wire.  Pure, any thread. */
#include <stdlib.h>
#include <string.h>

#include "common/msg_wire_parts.h"
#include "common/topology_wire.h"

/* ---- out ---- */

static Pb__AgentHello *hello_to_pb(const struct msg_hello *m, bool *ok)
{
    Pb__AgentHello *pb = pb_new(&pb__agent_hello__descriptor);
    if (!pb)
        return NULL;
    pb->id = msg_text(m->id, ok);
    pb->incarnation = m->incarnation;
    pb->address = msg_text(m->address, ok);
    pb->data_address = msg_text(m->data_address, ok);
    pb->node = m->node;
    pb->slots = m->slots;
    pb->can_load = m->can_load;
    pb->has_masks = pb->masks = m->masks;
    pb->layers = m->layers;
    pb->logical = m->logical;
    pb->op = m->op;
    pb->applied_epoch = m->applied_epoch;
    pb->promised_epoch = m->promised_epoch;
    pb->limit = m->limit;
    pb->next = m->next;
    pb->wave = m->wave;
    pb->engine = (Pb__EngineAtPromise)m->engine;
    pb->map_version = m->map_version;
    pb->dispatch = (Pb__Dispatch)m->dispatch;
    pb->endpoint = msg_text(m->endpoint, ok);
    return pb;
}

static Pb__EngineState *engine_to_pb(const struct msg_engine *m, bool *ok)
{
    Pb__EngineState *pb = pb_new(&pb__engine_state__descriptor);
    if (!pb)
        return NULL;
    pb->attached = m->attached;
    pb->dispatch = (Pb__Dispatch)m->dispatch;
    pb->can_load = m->can_load;
    pb->has_masks = pb->masks = m->masks;
    pb->layers = m->layers;
    pb->logical = m->logical;
    pb->endpoint = msg_text(m->endpoint, ok);
    pb->why = msg_text(m->why, ok);
    pb->has_torn_epoch = m->torn_epoch != 0;
    pb->torn_epoch = m->torn_epoch;
    return pb;
}

static Pb__StageDone *stage_done_to_pb(const struct msg_stage_done *m, bool *ok)
{
    Pb__StageDone *pb = pb_new(&pb__stage_done__descriptor);
    if (!pb)
        return NULL;
    pb->op = m->op;
    pb->stage = (Pb__Stage)m->stage;
    pb->round = m->round;
    pb->attempt = m->attempt;
    pb->code = m->code;
    pb->text = msg_text(m->text, ok);
    pb->bytes = m->bytes;
    pb->value = m->value;
    if (!msg_blob_to_bytes(m->blob, &pb->has_blob, &pb->blob))
        *ok = false;
    if (m->model && !(pb->model = model_to_pb(m->model)))
        *ok = false;
    return pb;
}

static Pb__Promise *promise_to_pb(const struct msg_promise *m)
{
    Pb__Promise *pb = pb_new(&pb__promise__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = m->epoch;
    pb->incarnation = m->incarnation;
    pb->limit = m->limit;
    pb->next = m->next;
    pb->wave = m->wave;
    pb->engine = (Pb__EngineAtPromise)m->engine;
    return pb;
}

static Pb__Verified *verified_to_pb(const struct msg_verified *m, bool *ok)
{
    Pb__Verified *pb = pb_new(&pb__verified__descriptor);
    if (!pb)
        return NULL;
    pb->request = m->request;
    pb->slots = m->slots;
    pb->dense = m->dense;
    pb->bytes = m->bytes;
    pb->bad = m->bad;
    pb->text = msg_text(m->text, ok);
    return pb;
}

static Pb__Refuse *refuse_to_pb(const struct msg_refuse *m, bool *ok)
{
    Pb__Refuse *pb = pb_new(&pb__refuse__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = m->epoch;
    pb->why = msg_text(m->why, ok);
    return pb;
}

static Pb__Progress *progress_to_pb(const struct msg_progress *m)
{
    Pb__Progress *pb = pb_new(&pb__progress__descriptor);
    if (!pb)
        return NULL;
    pb->op = m->op;
    pb->bytes = m->bytes;
    pb->has_total = m->total != 0;
    pb->total = m->total;
    return pb;
}

static Pb__Flipped *flipped_to_pb(const struct msg_flipped *m)
{
    Pb__Flipped *pb = pb_new(&pb__flipped__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = m->epoch;
    pb->hold_ns = m->hold_ns;
    return pb;
}

static Pb__MapAck *map_ack_to_pb(const struct msg_map_ack *m)
{
    Pb__MapAck *pb = pb_new(&pb__map_ack__descriptor);
    if (!pb)
        return NULL;
    pb->version = m->version;
    pb->step = m->step;
    return pb;
}

static Pb__Load *load_to_pb(const struct msg_load *m, bool *ok)
{
    Pb__Load *pb = pb_new(&pb__load__descriptor);
    if (!pb)
        return NULL;
    pb->epoch = m->epoch;
    pb->map_version = m->map_version;
    pb->layers = m->layers;
    pb->slots = m->slots;
    pb->window_ms = m->window_ms;
    size_t n = (size_t)m->layers * m->slots;
    pb->tokens = n ? malloc(n * sizeof *pb->tokens) : NULL;
    if (pb->tokens)
        memcpy(pb->tokens, m->tokens, n * sizeof *pb->tokens);
    else if (n)
        *ok = false;
    pb->n_tokens = pb->tokens ? n : 0;
    return pb;
}

/* All bodies are pointers in one union: any of them tells whether there was memory. */
Pb__AgentUp *msg_to_up(const struct msg *msg)
{
    Pb__AgentUp *up = pb_new(&pb__agent_up__descriptor);
    if (!up)
        return NULL;
    bool ok = true;
    switch (msg->type) {
    case MSG_HELLO:
        up->body_case = PB__AGENT_UP__BODY_HELLO;
        ok = (up->hello = hello_to_pb(&msg->hello, &ok)) && ok;
        break;
    case MSG_HEARTBEAT:
        up->body_case = PB__AGENT_UP__BODY_HEARTBEAT;
        ok = (up->heartbeat = pb_new(&pb__empty__descriptor)) != NULL;
        break;
    case MSG_ENGINE:
        up->body_case = PB__AGENT_UP__BODY_ENGINE;
        ok = (up->engine = engine_to_pb(&msg->engine, &ok)) && ok;
        break;
    case MSG_STAGE_DONE:
        up->body_case = PB__AGENT_UP__BODY_STAGE_DONE;
        ok = (up->stage_done = stage_done_to_pb(&msg->stage_done, &ok)) && ok;
        break;
    case MSG_PROGRESS:
        up->body_case = PB__AGENT_UP__BODY_PROGRESS;
        ok = (up->progress = progress_to_pb(&msg->progress)) != NULL;
        break;
    case MSG_PROMISE:
        up->body_case = PB__AGENT_UP__BODY_PROMISE;
        ok = (up->promise = promise_to_pb(&msg->promise)) != NULL;
        break;
    case MSG_REFUSE:
        up->body_case = PB__AGENT_UP__BODY_REFUSE;
        ok = (up->refuse = refuse_to_pb(&msg->refuse, &ok)) && ok;
        break;
    case MSG_FLIPPED:
        up->body_case = PB__AGENT_UP__BODY_FLIPPED;
        ok = (up->flipped = flipped_to_pb(&msg->flipped)) != NULL;
        break;
    case MSG_MAP_ACK:
        up->body_case = PB__AGENT_UP__BODY_MAP_ACK;
        ok = (up->map_ack = map_ack_to_pb(&msg->map_ack)) != NULL;
        break;
    case MSG_VERIFIED:
        up->body_case = PB__AGENT_UP__BODY_VERIFIED;
        ok = (up->verified = verified_to_pb(&msg->verified, &ok)) && ok;
        break;
    case MSG_LEAVE:
        up->body_case = PB__AGENT_UP__BODY_LEAVE;
        ok = (up->leave = pb_new(&pb__empty__descriptor)) != NULL;
        break;
    case MSG_LOAD:
        up->body_case = PB__AGENT_UP__BODY_LOAD;
        ok = (up->load = load_to_pb(&msg->load, &ok)) && ok;
        break;
    default:
        ok = false;
    }
    if (!ok) {
        pb_free(up);
        return NULL;
    }
    return up;
}

/* ---- in ---- */

static int hello_from_pb(const Pb__AgentHello *pb, struct msg_hello *m, struct err *err)
{
    if (!name_valid(pb->id))
        return err_set(err, ERR_PROTOCOL, "the id is none: 1 to %d of letters, digits, '.', '_', '-'",
                       AGENT_ID_MAX - 1);
    if (pb->incarnation == 0)
        return err_set(err, ERR_PROTOCOL, "incarnation 0");
    strcpy(m->id, pb->id);
    m->incarnation = pb->incarnation;
    int rc;
    if ((rc = pb_string(pb->address, m->address, sizeof m->address, "address", err)) < 0 ||
        (rc = pb_string(pb->data_address, m->data_address, sizeof m->data_address, "data address", err)) < 0 ||
        (rc = pb_string(pb->endpoint, m->endpoint, sizeof m->endpoint, "endpoint", err)) < 0)
        return rc;
    m->node = pb->node;
    m->slots = pb->slots;
    m->can_load = pb->can_load;
    m->masks = pb->has_masks && pb->masks;
    m->layers = pb->layers;
    m->logical = pb->logical;
    m->op = pb->op;
    m->applied_epoch = pb->applied_epoch;
    m->promised_epoch = pb->promised_epoch;
    m->limit = pb->limit;
    m->next = pb->next;
    m->wave = pb->wave;
    m->engine = (uint32_t)pb->engine;
    m->map_version = pb->map_version;
    m->dispatch = (uint32_t)pb->dispatch;
    return 0;
}

static int engine_from_pb(const Pb__EngineState *pb, struct msg_engine *m, struct err *err)
{
    m->attached = pb->attached;
    m->dispatch = (uint32_t)pb->dispatch;
    m->can_load = pb->can_load;
    m->masks = pb->has_masks && pb->masks;
    m->layers = pb->layers;
    m->logical = pb->logical;
    m->torn_epoch = pb->has_torn_epoch ? pb->torn_epoch : 0;
    int rc = pb_string(pb->endpoint, m->endpoint, sizeof m->endpoint, "endpoint", err);
    return rc < 0 ? rc : pb_string(pb->why, m->why, sizeof m->why, "reason", err);
}

static int stage_done_from_pb(const Pb__StageDone *pb, struct msg_stage_done *m, struct err *err)
{
    if (pb->code > 0 || strcmp(err_code_name(pb->code), "unknown") == 0)
        return err_set(err, ERR_PROTOCOL, "code %d is none", pb->code);
    m->op = pb->op;
    m->stage = (uint32_t)pb->stage;
    m->round = pb->round;
    m->attempt = pb->attempt;
    m->code = pb->code;
    m->bytes = pb->bytes;
    m->value = pb->value;
    int rc = pb_string(pb->text, m->text, sizeof m->text, "text", err);
    if (rc == 0 && pb->has_blob)
        rc = msg_blob_from_bytes(&pb->blob, &m->blob, err);
    if (rc == 0 && pb->model)
        rc = model_from_pb(pb->model, &m->model, err);
    return rc;
}

static int promise_from_pb(const Pb__Promise *pb, struct msg_promise *m, struct err *err)
{
    if (pb->epoch == 0)
        return err_set(err, ERR_PROTOCOL, "epoch 0");
    m->epoch = pb->epoch;
    m->incarnation = pb->incarnation;
    m->limit = pb->limit;
    m->next = pb->next;
    m->wave = pb->wave;
    m->engine = (uint32_t)pb->engine;
    return 0;
}

static int verified_from_pb(const Pb__Verified *pb, struct msg_verified *m, struct err *err)
{
    m->request = pb->request;
    m->slots = pb->slots;
    m->dense = pb->dense;
    m->bytes = pb->bytes;
    m->bad = pb->bad;
    return pb_string(pb->text, m->text, sizeof m->text, "text", err);
}

static int load_from_pb(const Pb__Load *pb, struct msg_load *m, struct err *err)
{
    size_t n = pb->n_tokens;
    if (!n || (uint64_t)pb->layers * pb->slots != n)
        return err_set(err, ERR_PROTOCOL, "%zu token counts for %u layers of %u slots", n, pb->layers, pb->slots);
    m->tokens = malloc(n * sizeof *m->tokens);
    if (!m->tokens)
        return err_set(err, ERR_NOMEM, "out of memory");
    memcpy(m->tokens, pb->tokens, n * sizeof *m->tokens);
    m->epoch = pb->epoch;
    m->map_version = pb->map_version;
    m->layers = pb->layers;
    m->slots = pb->slots;
    m->window_ms = pb->window_ms;
    return 0;
}

int msg_from_up(const Pb__AgentUp *up, struct msg *ret_msg, struct err *err)
{
    switch (up->body_case) {
    case PB__AGENT_UP__BODY_HELLO:
        ret_msg->type = MSG_HELLO;
        return hello_from_pb(up->hello, &ret_msg->hello, err);
    case PB__AGENT_UP__BODY_HEARTBEAT:
        ret_msg->type = MSG_HEARTBEAT;
        return 0;
    case PB__AGENT_UP__BODY_ENGINE:
        ret_msg->type = MSG_ENGINE;
        return engine_from_pb(up->engine, &ret_msg->engine, err);
    case PB__AGENT_UP__BODY_STAGE_DONE:
        ret_msg->type = MSG_STAGE_DONE;
        return stage_done_from_pb(up->stage_done, &ret_msg->stage_done, err);
    case PB__AGENT_UP__BODY_PROGRESS:
        ret_msg->type = MSG_PROGRESS;
        ret_msg->progress = (struct msg_progress){
            .op = up->progress->op, .bytes = up->progress->bytes, .total = up->progress->total};
        return 0;
    case PB__AGENT_UP__BODY_PROMISE:
        ret_msg->type = MSG_PROMISE;
        return promise_from_pb(up->promise, &ret_msg->promise, err);
    case PB__AGENT_UP__BODY_REFUSE:
        ret_msg->type = MSG_REFUSE;
        ret_msg->refuse.epoch = up->refuse->epoch;
        return pb_string(up->refuse->why, ret_msg->refuse.why, sizeof ret_msg->refuse.why, "reason", err);
    case PB__AGENT_UP__BODY_FLIPPED:
        ret_msg->type = MSG_FLIPPED;
        ret_msg->flipped = (struct msg_flipped){.epoch = up->flipped->epoch, .hold_ns = up->flipped->hold_ns};
        return 0;
    case PB__AGENT_UP__BODY_MAP_ACK:
        ret_msg->type = MSG_MAP_ACK;
        ret_msg->map_ack = (struct msg_map_ack){.version = up->map_ack->version, .step = up->map_ack->step};
        return 0;
    case PB__AGENT_UP__BODY_VERIFIED:
        ret_msg->type = MSG_VERIFIED;
        return verified_from_pb(up->verified, &ret_msg->verified, err);
    case PB__AGENT_UP__BODY_LEAVE:
        ret_msg->type = MSG_LEAVE;
        return 0;
    case PB__AGENT_UP__BODY_LOAD:
        ret_msg->type = MSG_LOAD;
        return load_from_pb(up->load, &ret_msg->load, err);
    default:
        return err_set(err, ERR_PROTOCOL, "no body that this version knows");
    }
}
