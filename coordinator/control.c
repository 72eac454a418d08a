/* The control service: finds the call in its table, checks who may make it, and keeps what is not answered yet.
 *
 * Calls that change the topology are events of the core, answered by CA_REPLY.  Loop thread. */
#include "coordinator/server_internal.h"

#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "common/clock.h"
#include "common/topology_wire.h"

#define CALLS_MAX 4096 /* open at once on one connection */

typedef void handler(struct session *session, const struct frame *frame, const ProtobufCMessage *request);

/* ---- calls ---- */

void frame_reply(struct session *session, const struct frame *frame, const ProtobufCMessage *reply)
{
    (void)rpc_conn_send(session->conn, FRAME_REPLY, frame->header.method, frame->header.call, reply);
}

void frame_fail(struct session *session, const struct frame *frame, int code, const char *text)
{
    (void)rpc_conn_send_error(session->conn, frame->header.method, frame->header.call, code, text);
}

struct call *call_new(struct session *session, const struct frame *frame, enum call_kind kind)
{
    struct server *s = session->server;
    struct call *call = session->n_calls < CALLS_MAX ? calloc(1, sizeof *call) : NULL;
    if (!call) {
        frame_fail(session, frame, session->n_calls < CALLS_MAX ? ERR_NOMEM : ERR_LIMIT,
                   session->n_calls < CALLS_MAX ? "the coordinator is out of memory"
                                                : "4096 calls of this connection are open already");
        return NULL;
    }
    session->n_calls++;
    call->bytes = sizeof *call + frame->header.length; /* names that it waits for, ... */
    rpc_conn_hold(session->conn, call->bytes, 0);
    call->session = session;
    call->request = ++s->next_request;
    call->id = frame->header.call;
    call->method = (enum control_method)frame->header.method;
    call->kind = kind;
    DL_APPEND(session->calls, call);
    HASH_ADD(hh, s->calls, request, sizeof call->request, call);
    return call;
}

struct call *call_find(struct server *s, uint64_t request)
{
    struct call *call;
    HASH_FIND(hh, s->calls, &request, sizeof request, call);
    return call;
}

void call_free(struct call *call)
{
    HASH_DEL(call->session->server->calls, call);
    DL_DELETE(call->session->calls, call);
    call->session->n_calls--;
    rpc_conn_hold(call->session->conn, 0, call->bytes);
    free(call->key);
    free(call);
}

void call_reply(struct call *call, const ProtobufCMessage *reply)
{
    (void)rpc_conn_send(call->session->conn, FRAME_REPLY, (uint16_t)call->method, call->id, reply);
    call_free(call);
}

void call_fail(struct call *call, int code, const char *text)
{
    (void)rpc_conn_send_error(call->session->conn, (uint16_t)call->method, call->id, code, text);
    call_free(call);
}

void control_closed(struct session *session)
{
    struct call *call, *next;
    DL_FOREACH_SAFE(session->calls, call, next) {
        if (call->kind == CALL_WAIT || call->kind == CALL_BARRIER || call->kind == CALL_WATCH_KEYS)
            store_edge_cancel(call);
        call_free(call); /* an operation goes on without the one who asked for it */
    }
}

/* ---- changing the topology ---- */

static uint32_t ranks_without(const struct server *s, size_t n_remove)
{
    struct coordinator_status status;
    coordinator_status(s->core, 0, &status);
    uint32_t n = status.view ? status.view->n : 0;
    return n > n_remove ? n - (uint32_t)n_remove : 0;
}

/* The newest operation that ended under a key: the core itself remembers only the last one. */
struct key_search {
    const char *key;
    struct op_record known;
    bool found;
};

static bool key_search_record(void *user, const struct op_record *record)
{
    struct key_search *search = user;
    if (strcmp(record->key, search->key) != 0)
        return true;
    search->found = op_record_copy(&search->known, record) == 0;
    return false;
}

static void control_scale(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__ScaleRequest *request = (const Pb__ScaleRequest *)message;
    struct server *s = session->server;
    struct scale_request scale = {
        .target = request->has_target ? request->target : ranks_without(s, request->n_remove),
        .rebalance = request->has_rebalance && request->rebalance,
        .mib_s = request->has_mib_s ? request->mib_s : 0,
        .n_remove = (uint32_t)request->n_remove,
        .remove = (const char *const *)request->remove,
        .dry_run = request->dry_run,
        .wait_agents_ms = request->wait_agents_ms,
        .timeout_ms = request->timeout_ms,
        .drain = request->drain,
        .on_engine_timeout = request->has_on_engine_timeout ? (enum engine_policy)request->on_engine_timeout : 0,
    };
    if (request->n_remove > RANKS_MAX || scale.target > RANKS_MAX) {
        frame_fail(session, frame, ERR_LIMIT, "a view has at most 256 ranks");
        return;
    }
    if (!request->has_target && !request->n_remove && !scale.rebalance) {
        frame_fail(session, frame, ERR_INVALID, "neither a number of ranks nor an agent to remove is given");
        return;
    }
    if (strlen(request->key) >= sizeof scale.key) {
        frame_fail(session, frame, ERR_INVALID, "an operation's key must have less than 128 bytes");
        return;
    }
    memcpy(scale.key, request->key, strlen(request->key) + 1);
    struct key_search search = {.key = scale.key};
    struct err err;
    if (scale.key[0] && journal_history(s->journal, JOURNAL_HISTORY_MAX, key_search_record, &search, &err) < 0) {
        frame_fail(session, frame, err.code, err.text);
        return;
    }
    struct call *call = call_new(session, frame, CALL_CORE);
    if (!call) {
        op_record_done(&search.known);
        return;
    }
    log_event(s->log, LOG_LEVEL_INFO, scale.rebalance ? "rebalance-requested" : "scale-requested", "by=%s target=%u removes=%u key=%s dry_run=%d",
              rpc_conn_name(session->conn), scale.target, scale.n_remove, scale.key, scale.dry_run);
    struct coordinator_event event = {.type = CE_SCALE, .request = call->request, .scale = &scale,
                                      .known = search.found ? &search.known : NULL};
    server_step(s, &event);
    op_record_done(&search.known);
}

static void control_abort(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__AbortRequest *request = (const Pb__AbortRequest *)message;
    struct call *call = call_new(session, frame, CALL_CORE);
    if (!call)
        return;
    log_event(session->server->log, LOG_LEVEL_INFO, "abort-requested", "by=%s op=%llu", rpc_conn_name(session->conn),
              (unsigned long long)request->op);
    struct coordinator_event event = {.type = CE_ABORT, .request = call->request, .op = request->op};
    server_step(session->server, &event);
}

static void control_pause(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__PauseRequest *request = (const Pb__PauseRequest *)message;
    struct call *call = call_new(session, frame, CALL_CORE);
    if (!call)
        return;
    log_event(session->server->log, LOG_LEVEL_INFO, request->pause ? "pause-requested" : "resume-requested", "by=%s why=%s",
              rpc_conn_name(session->conn), request->why);
    struct coordinator_event event = {.type = CE_PAUSE, .request = call->request, .yes = request->pause,
                                      .text = request->why};
    server_step(session->server, &event);
}

static void control_restart(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__RestartRequest *request = (const Pb__RestartRequest *)message;
    struct call *call = call_new(session, frame, CALL_CORE);
    if (!call)
        return;
    log_event(session->server->log, LOG_LEVEL_WARN, "restart-requested", "by=%s force=%d", rpc_conn_name(session->conn),
              request->force);
    struct coordinator_event event = {.type = CE_RESTART, .request = call->request, .yes = request->force};
    server_step(session->server, &event);
}

static void control_verify(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    (void)message;
    struct call *call = call_new(session, frame, CALL_CORE);
    if (!call)
        return;
    struct coordinator_event event = {.type = CE_VERIFY, .request = call->request};
    server_step(session->server, &event);
}

static void scale_reply(struct server *s, struct call *call, const struct coordinator_action *a)
{
    Pb__ScaleReply reply = PB__SCALE_REPLY__INIT;
    Pb__PlanSummary summary;
    struct coordinator_status status;
    char *parties[RANKS_MAX];
    reply.op = a->op;
    reply.outcome = (Pb__OpOutcome)a->outcome;
    reply.text = (char *)a->text;
    coordinator_status(s->core, 0, &status);
    if (a->plan) {
        control_plan_summary(s, a->plan, &summary);
        reply.summary = &summary;
        reply.plan = plan_to_pb(a->plan);
    }
    if (a->op && status.op.record.op == a->op) {
        for (uint32_t i = 0; i < status.op.record.n; i++)
            parties[i] = status.op.record.parties[i].id;
        reply.n_parties = status.op.record.n;
        reply.parties = parties;
    }
    call_reply(call, &reply.base);
    pb_free(reply.plan);
}

static void operation_reply(struct call *call, const struct coordinator_action *a)
{
    Pb__OperationReply reply = PB__OPERATION_REPLY__INIT;
    reply.op = a->op;
    reply.outcome = (Pb__OpOutcome)a->outcome;
    reply.text = (char *)a->text;
    call_reply(call, &reply.base);
}

static void verify_reply(struct call *call, const struct coordinator_action *a)
{
    Pb__VerifyReply reply = PB__VERIFY_REPLY__INIT;
    const struct msg_verified *v = &a->msg.verified;
    reply.slots = v->slots;
    reply.dense = v->dense;
    reply.bytes = v->bytes;
    reply.bad = v->bad;
    reply.text = (char *)a->text;
    call_reply(call, &reply.base);
}

void control_reply(struct server *s, const struct coordinator_action *a)
{
    struct call *call = call_find(s, a->request);
    if (!call) { /* an agent (LEAVE) or the balance policy asked, or the operator's connection is gone */
        log_event(s->log, a->code < 0 ? LOG_LEVEL_WARN : LOG_LEVEL_DEBUG, a->request ? "unheard" : "own-answered",
                  "op=%llu code=%s what=%s", (unsigned long long)a->op, err_code_name(a->code), a->text);
        return;
    }
    bool differs = call->method == CONTROL_VERIFY && a->code == ERR_CORRUPT; /* an answer, not a failure */
    if (a->code < 0 && !differs) {
        log_event(s->log, LOG_LEVEL_INFO, "refused", "to=%s code=%s why=%s", rpc_conn_name(call->session->conn),
                  err_code_name(a->code), a->text);
        call_fail(call, a->code, a->text);
    } else if (call->method == CONTROL_SCALE) {
        scale_reply(s, call, a);
    } else if (call->method == CONTROL_VERIFY) {
        verify_reply(call, a);
    } else {
        operation_reply(call, a);
    }
}

/* ---- dispatch ---- */

static const struct {
    handler *run;
    bool reader; /* it only looks */
} methods[CONTROL_METHODS] = {
    [CONTROL_VERSION] = {control_version, true},
    [CONTROL_STATUS] = {control_status, true},
    [CONTROL_AGENTS] = {control_agents, true},
    [CONTROL_OPERATIONS] = {control_operations, true},
    [CONTROL_SCALE] = {control_scale, false},
    [CONTROL_ABORT] = {control_abort, false},
    [CONTROL_VERIFY] = {control_verify, false},
    [CONTROL_WATCH_OPERATION] = {control_watch_operation, true},
    [CONTROL_WATCH_VIEW] = {control_watch_view, true},
    [CONTROL_KV_SET] = {control_kv_set, false},
    [CONTROL_KV_GET] = {control_kv_get, true},
    [CONTROL_KV_CHECK] = {control_kv_check, true},
    [CONTROL_KV_ADD] = {control_kv_add, false},
    [CONTROL_KV_CAS] = {control_kv_cas, false},
    [CONTROL_KV_DELETE] = {control_kv_delete, false},
    [CONTROL_KV_LIST] = {control_kv_list, true},
    [CONTROL_KV_WAIT] = {control_kv_wait, true},
    [CONTROL_BARRIER_ARRIVE] = {control_barrier_arrive, false},
    [CONTROL_KV_MULTI_GET] = {control_kv_multi_get, true},
    [CONTROL_KV_MULTI_SET] = {control_kv_multi_set, false},
    [CONTROL_KV_COUNT] = {control_kv_count, true},
    [CONTROL_KV_WATCH] = {control_kv_watch, true},
    [CONTROL_KV_STAT] = {control_kv_stat, true},
    [CONTROL_LEASE_GRANT] = {control_lease_grant, false},
    [CONTROL_LEASE_KEEP] = {control_lease_keep, false},
    [CONTROL_LEASE_END] = {control_lease_end, false},
    [CONTROL_QUEUE_PUSH] = {control_queue_push, false},
    [CONTROL_QUEUE_POP] = {control_queue_pop, false},
    [CONTROL_QUEUE_LENGTH] = {control_queue_length, true},
    [CONTROL_BARRIER_LIST] = {control_barrier_list, true},
    [CONTROL_BARRIER_SHOW] = {control_barrier_show, true},
    [CONTROL_PAUSE] = {control_pause, false},
    [CONTROL_RESTART] = {control_restart, false},
    [CONTROL_LOAD] = {control_load, true},
};

void control_frame(struct session *session, const struct frame *frame)
{
    struct err err;
    ProtobufCMessage *request;
    char text[160];
    if (frame->header.kind != FRAME_CALL || !frame->header.call) {
        frame_fail(session, frame, ERR_PROTOCOL, "an operator makes calls only");
        return;
    }
    if (frame->header.method >= CONTROL_METHODS) {
        frame_fail(session, frame, ERR_UNSUPPORTED, "this coordinator does not know that call: it may be older");
        return;
    }
    const ProtobufCMethodDescriptor *method = &pb__control__descriptor.methods[frame->header.method];
    if (session->role == RPC_ROLE_READER && !methods[frame->header.method].reader) {
        snprintf(text, sizeof text, "a reader may not call %s: connect as an operator", method->name);
        frame_fail(session, frame, ERR_DENIED, text);
        return;
    }
    struct rpc_scratch *scratch = &session->server->scratch;
    if (rpc_unpack_scratch(scratch, method->input, frame->payload, frame->header.length, &request, &err) < 0) {
        frame_fail(session, frame, err.code, err.text);
        return;
    }
    uint64_t begun_ns = clock_now_ns();
    methods[frame->header.method].run(session, frame, request); /* makes no callback: the scratch is its alone */
    server_metrics_call(&session->server->metrics, (enum control_method)frame->header.method, clock_now_ns() - begun_ns);
    rpc_scratch_free(scratch, request);
}
