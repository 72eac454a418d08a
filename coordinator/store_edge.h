/* Inside eep-coordinator's edge: the store and the barriers between the loop, the disk and those who use them.
 *
 *     control_kv.c, control_lease.c, control_watch.c, control_barrier.c   calls of operators
 *     tcpstore*.c                                                         PyTorch's protocol, on ports of its own
 *           \ change the store, then edge_changed
 *     store_edge.c   once per loop turn: the batch of all changes to the disk; answers held until it is there
 *
 * Loop thread. */
#ifndef EEP_COORDINATOR_STORE_EDGE_H
#define EEP_COORDINATOR_STORE_EDGE_H

#include "coordinator/server_internal.h"
#include "coordinator/store_disk.h"

#define EDGE_DISK_WAITING_MAX ((size_t)64 << 20) /* bytes of changes that wait for the disk; then writes are refused */
#define EDGE_HELD_MAX ((size_t)64 << 20)         /* bytes of answers that wait for it */
#define EDGE_TCPSTORE (1ull << 63)               /* in the id of a wait: of a TCPStore connection */
#define EDGE_TCPSTORE_PREFIX "tcpstore/"         /* keys of all their namespaces; always ephemeral */

/* An answer that tells of something that is not on disk yet. */
struct held {
    uint64_t batch, session, call, since_ns;
    enum frame_kind kind;
    uint16_t method;
    size_t len;
    struct held *prev, *next;
    uint8_t payload[];
};

struct store_edge {
    struct server *server;
    struct store *store;
    struct barriers *barriers;
    struct store_disk *disk; /* NULL: nothing is durable */
    uint64_t disk_done;      /* last batch on disk */
    uint64_t disk_first;     /* first revision that is with the disk and not on it; UINT64_MAX = none */
    struct held *held;       /* list */
    size_t held_bytes;
    struct event *tick, *turn, *disk_event, *lag;
    bool turn_set;
    uint64_t tick_ns;        /* what `tick` is armed for; UINT64_MAX = not */
    struct call *watches;    /* control_watch.c: calls, by watch_next */
    struct tcpstore *tcpstore; /* NULL: not listening */
};

/* ---- store_edge.c ---- */
/* After every call that may have changed the store or a barrier. */
void edge_changed(struct store_edge *edge);
/* The batch after which everything that the store shows now may be told. */
uint64_t edge_everything(const struct store_edge *edge);
/* The highest revision that may be told. */
uint64_t edge_visible(const struct store_edge *edge);
/* Answers now, or when the batch is on disk (0: now). */
void edge_reply(struct session *session, uint16_t method, uint64_t call, uint64_t batch, const ProtobufCMessage *reply);
void edge_fail(struct session *session, uint16_t method, uint64_t call, uint64_t batch, const struct err *err);
void edge_call_reply(struct call *call, uint64_t batch, const ProtobufCMessage *reply); /* ends the call */
/* ERR_LIMIT when too much waits for the disk to change a durable key. */
int edge_may_write(const struct store_edge *edge, struct err *err) MUST_CHECK;
/* A monotonic deadline. */
uint64_t edge_deadline(uint32_t ms);

/* ---- control_kv.c, control_lease.c, control_barrier.c: ends of waits ---- */
void control_kv_woken(struct call *call, const struct store_wake *wake);
void control_queue_woken(struct call *call, struct store_wake *wake);
void control_barrier_woken(struct call *call, const struct barrier_wake *wake);
/* ---- control_watch.c ---- */
void control_watch_serve(struct store_edge *edge);
void control_watch_closed(struct call *call);

#endif
