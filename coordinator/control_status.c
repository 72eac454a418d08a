/* The control service, looking: status, agents, operations, and the watches of an operation and of the view.
 *
 * Messages point into the core's status and are packed at once.  Watchers are served once per loop turn; one that
 * reads slowly skips states, never the last one.  Loop thread. */
#include "coordinator/server_internal.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/daemon.h"
#include "common/topology_wire.h"
#include "common/version.h"
#include "coordinator/durable_wire.h"

#define WATCH_UNSENT_MAX (256u << 10) /* a watcher with more is served later */
#define WATCH_LATER_MS 100

/* ---- structs to messages, without copies ---- */

static void member_point(const struct member *m, Pb__Member *pb)
{
    pb__member__init(pb);
    pb->id = (char *)m->id;
    pb->incarnation = m->incarnation;
    pb->address = (char *)m->address;
    pb->data_address = (char *)m->data_address;
    pb->endpoint = (char *)m->endpoint;
    pb->node = m->node;
    pb->serving = m->serving;
    pb->draining = m->draining;
}

struct view_message {
    Pb__ViewStatus pb;
    Pb__Member members[RANKS_MAX];
    Pb__Member *pointers[RANKS_MAX];
};

static void view_point(const struct coordinator_status *status, struct view_message *m)
{
    pb__view_status__init(&m->pb);
    m->pb.degraded = (char *)status->degraded;
    m->pb.kv_bytes = NO_LIMIT;
    const struct view *view = status->view;
    if (!view)
        return;
    m->pb.epoch = view->epoch;
    m->pb.map_version = view->map ? view->map->version : 0;
    m->pb.kv_bytes = view->kv_bytes;
    m->pb.manifest_digest = view->manifest_digest;
    m->pb.n_members = view->n;
    m->pb.members = m->pointers;
    for (uint32_t r = 0; r < view->n; r++) {
        member_point(&view->members[r], &m->members[r]);
        m->pointers[r] = &m->members[r];
    }
}

void control_plan_summary(const struct server *s, const struct plan *plan, Pb__PlanSummary *pb)
{
    struct coordinator_status status;
    coordinator_status(s->core, clock_now_ns(), &status);
    pb__plan_summary__init(pb);
    pb->moves = plan->n_moves;
    for (uint32_t i = 0; i < plan->n_moves; i++)
        pb->local_copies += plan->moves[i].src == plan->moves[i].dst;
    pb->rounds_before = plan->rounds_before;
    pb->rounds_after = plan->rounds_after;
    pb->arrivals_before = plan->arrivals_before;
    pb->arrivals_after = plan->arrivals_after;
    pb->bound_hard = plan->bound_hard;
    pb->bound_fill = plan->bound_fill;
    pb->expert_bytes = status.model ? status.model->expert_bytes : 0;
    pb->dense_bytes = status.model ? status.model->dense_bytes : 0;
    pb->has_balance_before = pb->has_balance_at_commit = pb->has_balance_after = pb->has_balance_ceiling = 1;
    pb->balance_before = plan->balance_before;
    pb->balance_at_commit = plan->balance_at_commit;
    pb->balance_after = plan->balance_after;
    pb->balance_ceiling = plan->balance_ceiling;
    pb->has_samples_before = pb->has_samples_after = pb->has_joint = plan->samples_before > 0;
    pb->samples_before = plan->samples_before;
    pb->samples_after = plan->samples_after;
    pb->joint = plan->joint;
}

#define PHASES_MAX 32
struct operation_message {
    Pb__Operation pb;
    Pb__PlanSummary plan;
    Pb__PhaseTime phases[PHASES_MAX];
    Pb__PhaseTime *phase_pointers[PHASES_MAX];
    char *parties[RANKS_MAX];
};

static void record_point(const struct op_record *r, struct operation_message *m)
{
    pb__operation__init(&m->pb);
    m->pb.op = r->op;
    m->pb.kind = (Pb__OpKind)r->kind;
    m->pb.outcome = (Pb__OpOutcome)r->outcome;
    m->pb.target = r->target;
    m->pb.key = (char *)r->key;
    m->pb.why = (char *)r->why;
    m->pb.epoch = r->epoch;
    m->pb.phase = (char *)"";
    m->pb.awaited = (char *)"";
    m->pb.started_ms = r->started_ms;
    m->pb.ended_ms = r->ended_ms;
    m->pb.hold_ns_max = r->hold_ns_max;
    m->pb.bytes_done = r->bytes;
    m->pb.bytes_planned = r->bytes;
    m->pb.phases = m->phase_pointers;
    for (uint32_t i = 0; i < r->n_phases && i < PHASES_MAX; i++) {
        pb__phase_time__init(&m->phases[i]);
        m->phases[i].phase = (char *)r->phases[i].phase;
        m->phases[i].ns = r->phases[i].ns;
        m->phase_pointers[i] = &m->phases[i];
        m->pb.n_phases++;
    }
    m->pb.n_parties = r->n;
    m->pb.parties = m->parties;
    for (uint32_t i = 0; i < r->n; i++)
        m->parties[i] = r->parties[i].id;
}

static void operation_point(const struct server *s, const struct op_info *op, struct operation_message *m)
{
    uint64_t now = clock_now_ns();
    record_point(&op->record, m);
    m->pb.phase = (char *)(op->phase ? op->phase : "");
    m->pb.round = op->round;
    m->pb.rounds = op->rounds;
    m->pb.bytes_done = op->bytes_done;
    m->pb.bytes_planned = op->bytes_planned;
    m->pb.awaited = (char *)op->awaited;
    m->pb.phase_age_ms = now > op->phase_since_ns ? (now - op->phase_since_ns) / 1000000 : 0;
    if (op->deadline_ns && op->deadline_ns != UINT64_MAX) {
        m->pb.has_deadline_in_ms = 1;
        m->pb.deadline_in_ms = op->deadline_ns > now ? (op->deadline_ns - now) / 1000000 : 0;
    }
    m->pb.n_phases = 0; /* of one that runs: up to now */
    for (uint32_t i = 0; i < op->n_phases && i < PHASES_MAX; i++) {
        pb__phase_time__init(&m->phases[i]);
        m->phases[i].phase = (char *)op->phases[i].phase;
        m->phases[i].ns = op->phases[i].ns;
        m->phase_pointers[i] = &m->phases[i];
        m->pb.n_phases++;
    }
    if (op->plan) {
        control_plan_summary(s, op->plan, &m->plan);
        m->pb.plan = &m->plan;
    }
}

/* ---- calls answered at once ---- */

void control_version(struct session *session, const struct frame *frame, const ProtobufCMessage *request)
{
    (void)request;
    Pb__VersionReply reply = PB__VERSION_REPLY__INIT;
    reply.software = (char *)EEP_SOFTWARE;
    reply.protocol = RPC_PROTOCOL_VERSION;
    reply.cluster = (char *)session->server->config.cluster;
    frame_reply(session, frame, &reply.base);
}

void control_status(struct session *session, const struct frame *frame, const ProtobufCMessage *request)
{
    (void)request;
    struct server *s = session->server;
    struct coordinator_status status;
    struct view_message view;
    struct operation_message op;
    Pb__StatusReply reply = PB__STATUS_REPLY__INIT;
    coordinator_status(s->core, clock_now_ns(), &status);
    view_point(&status, &view);
    reply.cluster = (char *)s->config.cluster;
    reply.software = (char *)EEP_SOFTWARE;
    reply.view = &view.pb;
    reply.epoch = status.epoch;
    reply.map_version = status.map_version;
    reply.commit_state = (char *)status.commit_state;
    reply.agents = (uint32_t)status.n_agents;
    struct agent_info agent;
    for (size_t i = 0; coordinator_agent(s->core, clock_now_ns(), i, &agent); i++)
        reply.spares += agent.state == MEMBER_SPARE && agent.connected;
    reply.op_running = status.op_running;
    if (status.op.record.op) {
        operation_point(s, &status.op, &op);
        reply.op = &op.pb;
    }
    reply.has_wanted = status.wanted != 0;
    reply.wanted = status.wanted;
    if (status.paused) {
        reply.paused = (char *)status.paused_why;
        reply.has_paused_ms = 1;
        reply.paused_ms = status.paused_ms;
    }
    if (status.degraded[0] && status.degraded_since_ns) {
        reply.has_degraded_for_ms = 1;
        reply.degraded_for_ms = (clock_now_ns() - status.degraded_since_ns) / 1000000;
        reply.degraded_awaits = status.missing;
        if (status.gives_up_ns) {
            reply.has_gives_up_in_ms = 1;
            reply.gives_up_in_ms = status.gives_up_ns > clock_now_ns() ? (status.gives_up_ns - clock_now_ns()) / 1000000 : 0;
        }
    }
    if (status.model) {
        reply.has_layers = reply.has_logical = reply.has_slots = 1;
        reply.layers = status.model->layers;
        reply.logical = status.model->logical;
        reply.slots = status.model->slots;
    }
    frame_reply(session, frame, &reply.base);
}

struct agent_message {
    struct agent_info info;
    Pb__Agent pb;
    Pb__Member member;
};

void control_agents(struct session *session, const struct frame *frame, const ProtobufCMessage *request)
{
    (void)request;
    struct server *s = session->server;
    struct coordinator_status status;
    coordinator_status(s->core, clock_now_ns(), &status);
    struct agent_message *all = calloc(status.n_agents + 1, sizeof *all);
    Pb__Agent **pointers = calloc(status.n_agents + 1, sizeof *pointers);
    Pb__AgentsReply reply = PB__AGENTS_REPLY__INIT;
    if (!all || !pointers) {
        frame_fail(session, frame, ERR_NOMEM, "the coordinator is out of memory");
    } else {
        for (size_t i = 0; i < status.n_agents && coordinator_agent(s->core, clock_now_ns(), i, &all[i].info); i++) {
            const struct agent_info *info = &all[i].info;
            Pb__Agent *pb = &all[i].pb;
            pb__agent__init(pb);
            member_point(&info->member, &all[i].member);
            pb->member = &all[i].member;
            pb->state = (Pb__AgentState)info->state;
            pb->rank = info->rank;
            pb->connected = info->connected;
            pb->engine = info->engine;
            pb->lease_left_ms = info->lease_left_ms;
            pb->applied_epoch = info->applied_epoch;
            pointers[reply.n_agents++] = pb;
        }
        reply.agents = pointers;
        frame_reply(session, frame, &reply.base);
    }
    free(pointers);
    free(all);
}

struct history {
    Pb__OpRecord *records[JOURNAL_HISTORY_MAX];
    size_t n;
};

static bool history_take(void *user, const struct op_record *record)
{
    struct history *h = user;
    Pb__OpRecord *pb = op_record_to_pb(record);
    if (pb)
        h->records[h->n++] = pb;
    return pb && h->n < JOURNAL_HISTORY_MAX;
}

void control_operations(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__OperationsRequest *request = (const Pb__OperationsRequest *)message;
    struct history *h = calloc(1, sizeof *h);
    struct err err;
    if (!h) {
        frame_fail(session, frame, ERR_NOMEM, "the coordinator is out of memory");
        return;
    }
    unsigned max = request->max && request->max < JOURNAL_HISTORY_MAX ? request->max : JOURNAL_HISTORY_MAX;
    if (journal_history(session->server->journal, max, history_take, h, &err) < 0) {
        frame_fail(session, frame, err.code, err.text);
    } else {
        Pb__OperationsReply reply = PB__OPERATIONS_REPLY__INIT;
        reply.n_operations = h->n;
        reply.operations = h->records;
        frame_reply(session, frame, &reply.base);
    }
    for (size_t i = 0; i < h->n; i++)
        pb_free(h->records[i]);
    free(h);
}

/* ---- watching an operation ---- */

struct search {
    uint64_t op;
    struct operation_message *message;
    struct op_record copy;
    uint64_t newest; /* that the journal has */
    bool found;
};

static bool search_record(void *user, const struct op_record *record)
{
    struct search *search = user;
    if (record->op > search->newest)
        search->newest = record->op;
    if (record->op != search->op)
        return record->op > search->op; /* newest first */
    search->found = op_record_copy(&search->copy, record) == 0;
    return false;
}

static void stream_send(struct call *call, const ProtobufCMessage *message)
{
    (void)rpc_conn_send(call->session->conn, FRAME_STREAM, (uint16_t)call->method, call->id, message);
}

static void stream_end(struct call *call)
{
    (void)rpc_conn_send(call->session->conn, FRAME_END, (uint16_t)call->method, call->id, NULL);
    call_free(call);
}

/* An operation that is neither running nor the last one: from the journal. */
static void watch_past(struct server *s, struct call *call, uint64_t newest)
{
    struct err err;
    struct operation_message m;
    char text[96];
    struct search search = {.op = call->op};
    if (journal_history(s->journal, JOURNAL_HISTORY_MAX, search_record, &search, &err) < 0) {
        call_fail(call, err.code, err.text);
    } else if (!search.found && call->op > search.newest && call->op < newest) {
        daemon_timer_in(s->changed, WATCH_LATER_MS); /* its end is on its way to the journal, and a repair follows */
    } else if (!search.found) {
        snprintf(text, sizeof text, "there is no operation %llu; `eepctl history` lists those that ended",
                 (unsigned long long)call->op);
        call_fail(call, ERR_NOTFOUND, call->op ? text : "no operation has run yet");
    } else {
        record_point(&search.copy, &m);
        stream_send(call, &m.pb.base);
        stream_end(call);
        op_record_done(&search.copy);
    }
}

static void watch_operation_serve(struct server *s, struct call *call, const struct coordinator_status *status)
{
    struct operation_message m;
    if (!call->op)
        call->op = status->op.record.op;
    bool runs = status->op_running && status->op.record.op == call->op;
    if (!call->op || (!runs && status->last->record.op != call->op)) {
        watch_past(s, call, status->op.record.op);
        return;
    }
    operation_point(s, runs ? &status->op : status->last, &m);
    if (runs)
        m.pb.outcome = PB__OP_OUTCOME__RUNNING;
    stream_send(call, &m.pb.base);
    if (!runs)
        stream_end(call);
}

void control_watch_operation(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    const Pb__WatchOperationRequest *request = (const Pb__WatchOperationRequest *)message;
    struct coordinator_status status;
    struct call *call = call_new(session, frame, CALL_WATCH_OP);
    if (!call)
        return;
    call->op = request->op;
    coordinator_status(session->server->core, clock_now_ns(), &status);
    watch_operation_serve(session->server, call, &status);
}

/* ---- watching the view ---- */

/* Packs the view anew; a version goes up when it differs from what was sent before. */
static void view_refresh(struct server *s, const struct coordinator_status *status)
{
    struct view_message view;
    view_point(status, &view);
    size_t len = protobuf_c_message_get_packed_size(&view.pb.base);
    uint8_t *data = malloc(len ? len : 1);
    if (!data)
        return;
    protobuf_c_message_pack(&view.pb.base, data);
    if (s->view_packed && len == s->view_packed_len && memcmp(data, s->view_packed, len) == 0) {
        free(data);
        return;
    }
    free(s->view_packed);
    s->view_packed = data;
    s->view_packed_len = len;
    s->view_version++;
}

static void watch_view_serve(struct server *s, struct call *call)
{
    if (call->seen == s->view_version || !s->view_packed)
        return;
    call->seen = s->view_version;
    (void)rpc_conn_send_bytes(call->session->conn, FRAME_STREAM, (uint16_t)call->method, call->id, s->view_packed,
                              s->view_packed_len);
}

void control_watch_view(struct session *session, const struct frame *frame, const ProtobufCMessage *message)
{
    (void)message;
    struct server *s = session->server;
    struct coordinator_status status;
    struct call *call = call_new(session, frame, CALL_WATCH_VIEW);
    if (!call)
        return;
    coordinator_status(s->core, clock_now_ns(), &status);
    view_refresh(s, &status);
    watch_view_serve(s, call);
}

void control_serve_watchers(struct server *s)
{
    struct coordinator_status status;
    struct call *call, *next;
    bool later = false, refreshed = false;
    coordinator_status(s->core, clock_now_ns(), &status);
    HASH_ITER(hh, s->calls, call, next) {
        if (call->kind != CALL_WATCH_OP && call->kind != CALL_WATCH_VIEW)
            continue;
        if (rpc_conn_unsent(call->session->conn) > WATCH_UNSENT_MAX) {
            later = true;
            continue;
        }
        if (call->kind == CALL_WATCH_OP) {
            watch_operation_serve(s, call, &status);
            continue;
        }
        if (!refreshed)
            view_refresh(s, &status);
        refreshed = true;
        watch_view_serve(s, call);
    }
    if (later)
        daemon_timer_in(s->changed, WATCH_LATER_MS);
}
