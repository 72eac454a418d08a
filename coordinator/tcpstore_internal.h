/* Inside coordinator/tcpstore*.c: connections and namespaces.  Loop thread. */
#ifndef EEP_COORDINATOR_TCPSTORE_INTERNAL_H
#define EEP_COORDINATOR_TCPSTORE_INTERNAL_H

#include <event2/buffer.h>
#include <event2/listener.h>
#include <uthash.h>

#include "common/address.h"
#include "coordinator/tcpstore.h"
#include "coordinator/tcpstore_parse.h"

#define TCPSTORE_NAMESPACE_MAX 64

/* Shared by the listeners that name it. */
struct tcpspace {
    struct tcpstore *t;
    char name[TCPSTORE_NAMESPACE_MAX];
    char prefix[TCPSTORE_NAMESPACE_MAX + 16]; /* of its keys: "tcpstore/NAME/" */
    unsigned conns;                           /* that have said VALIDATE */
    struct event *grace;
    struct tcpspace *prev, *next;
};

struct tcplisten {
    struct tcpspace *space;
    struct evconnlistener *ev;
    char address[ADDRESS_TEXT_MAX];
};

struct tcpconn {
    UT_hash_handle hh; /* by id */
    uint64_t id;
    struct tcpspace *space;
    int fd;
    struct event *readable, *writable;
    uint8_t *in; /* [cap], `have` bytes in it; NULL when idle */
    size_t have, cap;
    struct tcpstore_scan scan;
    struct evbuffer *out;
    bool valid;   /* has said VALIDATE */
    bool waiting; /* for keys */
    bool corked;  /* answers are collected */
    bool cut;     /* the others needed its memory: its end is scheduled */
    struct budget_holder held; /* bytes of `in` and `out` */
    bool paused;  /* it does not read its answers: nothing more is read from it */
    char *barrier; /* key of the barrier that it waits at */
    char peer[ADDRESS_TEXT_MAX];
};

struct tcpstore {
    struct store_edge *edge;
    uint32_t grace_ms;
    struct tcpspace *spaces;
    struct tcplisten *listeners;
    size_t n;
    struct event *pause; /* accepting again after descriptors had run out */
    struct tcpconn *conns;
    uint64_t last_id;
    const struct tcpconn *serving; /* its commands are being carried out, from its `in` */
    size_t in_bytes; /* of all conns' `in` */
    uint8_t *spare;  /* an `in` of the usual size that nobody uses now; or NULL */
};

void tcpconn_send(struct tcpconn *conn, const void *data, size_t len);
/* ---- tcpstore_commands.c ---- */
/* Carries out a complete command.  Negative: the connection is to be cut off, and why. */
int tcpstore_run(struct tcpconn *conn, const uint8_t *command, size_t len, struct err *err) MUST_CHECK;
void tcpstore_wait_end(struct tcpconn *conn); /* of keys or at a barrier, without an answer */

#endif
