/* The state record's encoded form.  See record.h.  Pure, any thread. */
#include "agent/record.h"

#include <stdlib.h>
#include <string.h>

#include "common/msg.h"
#include "common/rpc.h"
#include "common/topology_wire.h"
#include "record.pb-c.h"

#define RECORD_FORMAT 1u

void agent_record_done(struct agent_record *record)
{
    view_unref(record->view);
    view_unref(record->before);
    expert_map_unref(record->map);
    model_unref(record->model);
    memset(record, 0, sizeof *record);
}

void agent_record_copy(struct agent_record *ret_copy, const struct agent_record *record)
{
    memcpy(ret_copy, record, sizeof *ret_copy); /* padding included: records are compared byte by byte */
    view_ref(record->view);
    view_ref(record->before);
    expert_map_ref(record->map);
    model_ref(record->model);
}

/* ---- encode ---- */

static int pack(const ProtobufCMessage *message, uint8_t **ret_data, size_t *ret_len, struct err *err)
{
    size_t len = protobuf_c_message_get_packed_size(message);
    uint8_t *data = malloc(len ? len : 1);
    if (!data)
        return err_set(err, ERR_NOMEM, "no memory for a part of the state record (%zu bytes)", len);
    *ret_len = protobuf_c_message_pack(message, data);
    *ret_data = data;
    return 0;
}

static int figures_encode(const struct agent_record *r, uint8_t **ret_data, size_t *ret_len, struct err *err)
{
    Pb__RecordPromise promise = PB__RECORD_PROMISE__INIT;
    Pb__RecordFlip flip = PB__RECORD_FLIP__INIT;
    Pb__Record pb = PB__RECORD__INIT;
    pb.format = RECORD_FORMAT;
    pb.incarnation = r->incarnation;
    pb.id = (char *)(uintptr_t)r->id; /* protobuf-c does not say const; packing only reads */
    pb.held = r->held;
    pb.engine = r->engine;
    pb.lease_ms = r->lease_ms;
    pb.heartbeat_ms = r->heartbeat_ms;
    pb.indoubt_ms = r->indoubt_ms;
    pb.seen_epoch = r->seen_epoch;
    pb.applied_epoch = r->applied_epoch;
    pb.flipped_epoch = r->flipped_epoch;
    pb.flipped_hold_ns = r->flipped_hold_ns;
    pb.map_rank = r->map_rank;
    pb.map_step = r->map_step;
    pb.map_unacked = r->map_unacked;
    pb.map_flip = r->map_flip;
    pb.run_to = r->run_to;
    pb.revoked = r->revoked;
    pb.attachment = r->attachment;
    pb.op = r->op;
    pb.torn_epoch = r->torn_epoch;
    pb.why = (char *)(uintptr_t)r->why;
    if (r->promise.epoch) {
        promise.epoch = r->promise.epoch;
        promise.limit = r->promise.limit;
        promise.next = r->promise.next;
        promise.wave = r->promise.wave;
        promise.kind = r->promise.kind;
        promise.engine = r->promise.engine;
        pb.promise = &promise;
    }
    if (r->flip.epoch) {
        flip.epoch = r->flip.epoch;
        flip.step = r->flip.step;
        flip.wave = r->flip.wave;
        flip.next_step = r->flip.next_step;
        flip.op = r->flip.op;
        flip.kind = r->flip.kind;
        flip.leaver = r->flip.leaver;
        pb.flip = &flip;
    }
    return pack(&pb.base, ret_data, ret_len, err);
}

/* Takes the message over. */
static int noun_encode(void *pb, uint8_t **ret_data, size_t *ret_len, struct err *err)
{
    if (!pb)
        return err_set(err, ERR_NOMEM, "no memory for a part of the state record");
    int rc = pack(pb, ret_data, ret_len, err);
    pb_free(pb);
    return rc;
}

int agent_record_encode(const struct agent_record *r, enum record_part part, uint8_t **ret_data, size_t *ret_len,
                        struct err *err)
{
    *ret_data = NULL;
    *ret_len = 0;
    switch (part) {
    case RECORD_FIGURES: return figures_encode(r, ret_data, ret_len, err);
    case RECORD_VIEW: return r->view ? noun_encode(view_to_pb(r->view), ret_data, ret_len, err) : 0;
    case RECORD_BEFORE: return r->before ? noun_encode(view_to_pb(r->before), ret_data, ret_len, err) : 0;
    case RECORD_MAP: return r->map ? noun_encode(expert_map_to_pb(r->map), ret_data, ret_len, err) : 0;
    case RECORD_MODEL: return r->model ? noun_encode(model_to_pb(r->model), ret_data, ret_len, err) : 0;
    case RECORD_PARTS: break;
    }
    return err_set(err, ERR_INVALID, "the state record has no part %d", (int)part);
}

/* ---- decode ---- */

static int figures_fill(const Pb__Record *pb, struct agent_record *r, struct err *err)
{
    if (pb->format != RECORD_FORMAT)
        return err_set(err, ERR_UNSUPPORTED, "it has format %u, this agent writes %u", pb->format, RECORD_FORMAT);
    r->incarnation = pb->incarnation;
    r->held = pb->held != 0;
    r->engine = pb->engine != 0;
    r->lease_ms = pb->lease_ms;
    r->heartbeat_ms = pb->heartbeat_ms;
    r->indoubt_ms = pb->indoubt_ms;
    r->seen_epoch = pb->seen_epoch;
    r->applied_epoch = pb->applied_epoch;
    r->flipped_epoch = pb->flipped_epoch;
    r->flipped_hold_ns = pb->flipped_hold_ns;
    r->map_rank = pb->map_rank;
    r->map_step = pb->map_step;
    r->map_unacked = pb->map_unacked;
    r->map_flip = pb->map_flip;
    r->run_to = pb->run_to;
    r->revoked = pb->revoked;
    r->attachment = pb->attachment;
    r->op = pb->op;
    r->torn_epoch = pb->torn_epoch;
    if (pb->promise) {
        r->promise.epoch = pb->promise->epoch;
        r->promise.limit = pb->promise->limit;
        r->promise.next = pb->promise->next;
        r->promise.wave = pb->promise->wave;
        r->promise.kind = pb->promise->kind;
        r->promise.engine = pb->promise->engine;
    }
    if (pb->flip) {
        r->flip.epoch = pb->flip->epoch;
        r->flip.step = pb->flip->step;
        r->flip.wave = pb->flip->wave;
        r->flip.next_step = pb->flip->next_step;
        r->flip.op = pb->flip->op;
        r->flip.kind = pb->flip->kind;
        r->flip.leaver = pb->flip->leaver != 0;
    }
    int rc = pb_string(pb->id, r->id, sizeof r->id, "an agent's id", err);
    return rc < 0 ? rc : pb_string(pb->why, r->why, sizeof r->why, "a reason", err);
}

static int part_unpack(const ProtobufCMessageDescriptor *type, const struct record_bytes *part,
                       ProtobufCMessage **ret_message, struct err *err)
{
    return rpc_unpack(type, part->data, part->len, (64u << 10) + 64 * part->len, ret_message, err);
}

static int view_decode(const struct record_bytes *part, struct view **ret_view, struct err *err)
{
    ProtobufCMessage *message;
    int rc = part->len ? part_unpack(&pb__view__descriptor, part, &message, err) : 1;
    if (rc == 0) {
        rc = view_from_pb((const Pb__View *)message, ret_view, err);
        rpc_unpack_free(message);
    }
    return rc < 0 ? rc : 0;
}

static int map_decode(const struct record_bytes *part, struct expert_map **ret_map, struct err *err)
{
    ProtobufCMessage *message;
    int rc = part->len ? part_unpack(&pb__expert_map__descriptor, part, &message, err) : 1;
    if (rc == 0) {
        rc = expert_map_from_pb((const Pb__ExpertMap *)message, ret_map, err);
        rpc_unpack_free(message);
    }
    return rc < 0 ? rc : 0;
}

static int model_decode(const struct record_bytes *part, struct model **ret_model, struct err *err)
{
    ProtobufCMessage *message;
    int rc = part->len ? part_unpack(&pb__model__descriptor, part, &message, err) : 1;
    if (rc == 0) {
        rc = model_from_pb((const Pb__Model *)message, ret_model, err);
        rpc_unpack_free(message);
    }
    return rc < 0 ? rc : 0;
}

/* What the core counts on. */
static const char *record_objection(const struct agent_record *r)
{
    const struct expert_map *map = r->map;
    if (!name_valid(r->id) || !r->incarnation)
        return "it names no agent or no incarnation";
    if (!r->held)
        return NULL;
    if (!map || !r->model)
        return "it has no map or no model";
    if ((!r->view && !r->before) || (r->view && !r->view->map) || (r->before && !r->before->map))
        return "it has no view, or a view without a map";
    if (map->layers != r->model->layers || map->logical != r->model->logical || map->slots != r->model->slots ||
        r->map_rank >= map->ranks)
        return "its map does not fit its model";
    if (r->view && (r->view->epoch != r->applied_epoch || r->view->n != map->ranks ||
                    view_rank(r->view, r->id) != (int)r->map_rank))
        return "its view is not that of its epoch, map and rank";
    if (r->flip.epoch && (r->flip.epoch != r->applied_epoch || r->flip.leaver != !r->view))
        return "its flip is not that of its epoch";
    if (r->promise.epoch && (r->promise.epoch <= r->applied_epoch || r->promise.kind < FLIP_VIEW ||
                             r->promise.kind > FLIP_RESET || r->promise.engine > PROMISE_RUNNING))
        return "its promise is none that is outstanding";
    if (r->promise.epoch > r->seen_epoch || r->applied_epoch > r->seen_epoch)
        return "its epochs do not add up";
    return NULL;
}

int agent_record_decode(const struct record_bytes parts[RECORD_PARTS], struct agent_record *ret_record, struct err *err)
{
    struct agent_record r;
    ProtobufCMessage *figures;
    memset(&r, 0, sizeof r);
    int rc = part_unpack(&pb__record__descriptor, &parts[RECORD_FIGURES], &figures, err);
    if (rc == 0) {
        rc = figures_fill((const Pb__Record *)figures, &r, err);
        rpc_unpack_free(figures);
    }
    if (rc == 0)
        rc = view_decode(&parts[RECORD_VIEW], &r.view, err);
    if (rc == 0)
        rc = view_decode(&parts[RECORD_BEFORE], &r.before, err);
    if (rc == 0)
        rc = map_decode(&parts[RECORD_MAP], &r.map, err);
    if (rc == 0)
        rc = model_decode(&parts[RECORD_MODEL], &r.model, err);
    const char *objection = rc == 0 ? record_objection(&r) : NULL;
    if (objection)
        rc = err_set(err, ERR_CORRUPT, "%s", objection);
    if (rc < 0) {
        agent_record_done(&r);
        return rc;
    }
    memcpy(ret_record, &r, sizeof r);
    return 0;
}
