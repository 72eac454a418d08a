/* Inside eep-coordinator's edge: the server's state, and what its files call in one another.  Loop thread. */
#ifndef EEP_COORDINATOR_SERVER_INTERNAL_H
#define EEP_COORDINATOR_SERVER_INTERNAL_H

#include <uthash.h>

#include "common/budget.h"
#include "common/control_methods.h"
#include "common/rpc.h"
#include "coordinator/barriers.h"
#include "coordinator/journal.h"
#include "coordinator/planning.h"
#include "coordinator/server.h"
#include "coordinator/server_metrics.h"
#include "coordinator/store.h"

#include "control.pb-c.h"

/* A connection that is past its handshake. */
struct session {
    struct server *server;
    struct rpc_conn *conn;
    uint64_t id; /* rpc_conn_id */
    enum rpc_role role;
    bool hello;           /* agents: HELLO has been handed to the core */
    struct call *calls;   /* operators: open calls (utlist) */
    size_t n_calls;
    UT_hash_handle hh;    /* server.sessions by id */
};

enum call_kind {
    CALL_CORE,    /* the core answers by CA_REPLY */
    CALL_WAIT,    /* the store answers by a wake-up */
    CALL_BARRIER,
    CALL_WATCH_OP,
    CALL_WATCH_VIEW,
    CALL_WATCH_KEYS,
};

/* A call that is not answered yet, or a stream. */
struct call {
    struct session *session;
    uint64_t request; /* our number for it */
    uint64_t id;      /* the client's number for it */
    enum control_method method;
    enum call_kind kind;
    size_t bytes;     /* counted in the connection's budget */
    uint64_t op;      /* WATCH_OP */
    uint64_t seen;    /* WATCH_VIEW: version that was sent last */
    char *key;        /* KV_GET; prefix of KV_WATCH */
    uint64_t watch_next; /* KV_WATCH: the first revision that has not been sent */
    bool watch_values;
    struct call *watch_list_prev, *watch_list_next; /* store_edge.watches */
    struct call *prev, *next;
    UT_hash_handle hh; /* server.calls by request */
};

struct server {
    struct server_config config;
    struct event_base *base;
    struct log *log;
    struct rpc *rpc;
    struct budget held;            /* of all connections, TCPStore's too */
    struct rpc_listener *listener;
    struct journal *journal;
    struct event *journal_event;
    struct planning *planning;
    struct event *planned_event;
    struct coordinator *core;
    struct coordinator_actions actions;
    bool stepping;                 /* inside coordinator_step's actions */
    struct event *tick;            /* CE_TICK */
    struct event *changed;         /* serves the watchers, once per loop turn */
    struct session *sessions;
    struct call *calls;
    uint64_t next_request;
    uint64_t refused, refused_ns;  /* connections since the last line about them, and when that was */
    /* control_status.c */
    uint8_t *view_packed;          /* what the view's watchers were sent last */
    size_t view_packed_len;
    uint64_t view_version;
    struct store_edge *edge;       /* store_edge.c */
    struct rpc_scratch scratch;    /* of the call that is being carried out */
    struct server_metrics metrics;
    struct {
        struct event *timer;
        uint32_t interval_ms;
        uint64_t since_ns; /* which wait it is */
    } waiting; /* server_waiting.c */
};

/* ---- server_waiting.c ---- */

int server_waiting_open(struct server *s);
/* A phase, or a state that does not serve everything, has begun. */
void server_waiting_begin(struct server *s);
/* Something may have begun; a wait that lasts is not postponed by it. */
void server_waiting_warned(struct server *s);
void server_waiting_close(struct server *s);

/* ---- server.c ---- */
/* Hands one event to the core and performs what comes out. */
void server_step(struct server *server, struct coordinator_event *event);
struct session *server_session(struct server *server, uint64_t id);
/* The disk cannot be written: nothing more is said to anybody. */
_Noreturn void server_fatal(struct server *server, const struct err *err);

/* ---- agent_link.c: agents ---- */
void agent_link_frame(struct session *session, const struct frame *frame);
void agent_link_closed(struct session *session);
void agent_link_send(struct server *server, const struct coordinator_action *action);
void agent_link_close(struct server *server, const struct coordinator_action *action);

/* ---- control.c: operators, routers, tools ---- */
void control_frame(struct session *session, const struct frame *frame);
void control_closed(struct session *session);
void control_reply(struct server *server, const struct coordinator_action *action);

struct call *call_new(struct session *session, const struct frame *frame, enum call_kind kind);
struct call *call_find(struct server *server, uint64_t request);
void call_free(struct call *call);
/* The answer; ends the call. */
void call_reply(struct call *call, const ProtobufCMessage *reply);
void call_fail(struct call *call, int code, const char *text);
/* A call that needs no struct call: answered at once. */
void frame_reply(struct session *session, const struct frame *frame, const ProtobufCMessage *reply);
void frame_fail(struct session *session, const struct frame *frame, int code, const char *text);

/* ---- control_status.c: looking, watching ---- */
void control_version(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_status(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_agents(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_operations(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_watch_operation(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_watch_view(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_serve_watchers(struct server *server);
void control_plan_summary(const struct server *server, const struct plan *plan, Pb__PlanSummary *ret_summary);

/* ---- control_load.c: the load of the experts ---- */
void control_load(struct session *session, const struct frame *frame, const ProtobufCMessage *request);

/* ---- store_edge.c: keys, queues, leases, barriers ---- */
int store_edge_open(struct server *server, struct err *err) MUST_CHECK;
void store_edge_close(struct server *server);
void store_edge_cancel(struct call *call); /* its connection is gone */
void control_kv_set(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_get(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_check(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_add(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_cas(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_delete(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_list(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_wait(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_multi_get(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_multi_set(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_count(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_watch(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_kv_stat(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_lease_grant(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_lease_keep(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_lease_end(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_queue_push(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_queue_pop(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_queue_length(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_barrier_arrive(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_barrier_list(struct session *session, const struct frame *frame, const ProtobufCMessage *request);
void control_barrier_show(struct session *session, const struct frame *frame, const ProtobufCMessage *request);

#endif
