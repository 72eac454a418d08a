/* Inside common/rpc*.c: what the files of the event-driven connections share.  One loop thread. */
#ifndef EEP_COMMON_RPC_PARTS_H
#define EEP_COMMON_RPC_PARTS_H

#include <event2/listener.h>
#include <uthash.h>
#include <utlist.h>

#include "common.pb-c.h"
#include "common/address.h"
#include "common/budget.h"
#include "common/rpc.h"

#define RPC_READ_BYTES (64u << 10)

enum rpc_state {
    RPC_CONNECTING, /* no connection yet */
    RPC_SECURING,   /* TLS's own handshake */
    RPC_SHAKING,    /* the other end's half of the handshake is awaited */
    RPC_READY,
    RPC_FINISHING, /* the user has let go; queued output is still sent */
    RPC_FAILING,   /* lost; the user is not told yet */
    RPC_DEAD,      /* to be freed after the loop turn */
};

struct rpc_conn {
    struct rpc *rpc;
    struct rpc_listener *listener; /* counts it; NULL for connectors and after the listener has closed */
    const struct rpc_handlers *handlers;
    void *user;
    struct rpc_identity self, peer;
    uint64_t id;
    enum rpc_state state;
    bool connector;
    bool owed_close;                  /* the user knows this connection and must be told of its end */
    size_t output_limit, pause_bytes; /* pause_bytes 0 = never */
    bool dirty;                       /* in rpc->dirty: has output to be sent at the end of the loop turn */
    bool paused;                      /* nothing is read until its output has been taken */
    struct rpc_conn *dirty_prev, *dirty_next;
    struct bufferevent *bev; /* connects, and waits for writability; it reads and writes only with TLS */
    struct event *readable;  /* NULL until there is a connection, and with TLS */
    const struct tls *tls;   /* it is to be encrypted; NULL = not */
    SSL *ssl;                /* the bev's; NULL before and without */
    char tls_peer[RPC_NAME_MAX + 16];
    struct rpc_source *source; /* while it is not through its handshake; NULL = not counted */
    struct evbuffer *in;       /* what was read and is no whole frame yet, or waits while it is paused */
    struct budget_holder held; /* bytes in `in` and in the buffers of bev */
    struct event *timer;       /* of the handshake, or of lingering */
    int why_code;
    char why[ERR_TEXT_MAX];
    char name[64 + RPC_NAME_MAX + ADDRESS_TEXT_MAX];
    struct rpc_conn *prev, *next; /* in one of the lists of struct rpc, by state */
};

struct rpc {
    struct event_base *base;
    struct evdns_base *dns; /* made when first needed */
    struct event *deferred; /* tells users, frees connections */
    struct event *flush;    /* sends what the loop turn has left in output buffers */
    struct rpc_conn *dirty;
    uint8_t *scratch; /* [RPC_READ_BYTES]: what one read brings; frames that are whole are handed on from here */
    uint64_t last_id;
    struct rpc_conn *conns, *failing, *dead;
    struct rpc_listener *listeners;
    struct rpc_source *sources;
    struct budget *budget;        /* of connections that are made from now on; NULL = none */
    const struct rpc_conn *reads; /* frames in its `in` are being handed on */
};

struct rpc_socket {
    struct evconnlistener *ev;
    int fd;
    bool lent;
    char given[ADDRESS_TEXT_MAX], actual[ADDRESS_TEXT_MAX];
};

/* An address with accepted connections that are not through their handshakes. */
struct rpc_source {
    char host[64];
    unsigned n;
    UT_hash_handle hh; /* rpc.sources by host */
};

struct rpc_listener {
    struct rpc *rpc;
    struct rpc_options options;
    struct rpc_identity self;
    unsigned n_conns;
    struct event *pause; /* accepting again after descriptors had run out */
    size_t n;
    struct rpc_socket *sockets;
    struct rpc_listener *prev, *next;
};

/* bev on fd (-1: not connected yet), in rpc->conns, its handshake timer running.  NULL when out of memory; fd stays
 * the caller's then. */
struct rpc_conn *rpc_conn_new(struct rpc *rpc, const struct rpc_options *options, int fd, enum rpc_state state);
/* It is through its handshake, or gone: its address may have another one. */
void rpc_conn_uncount(struct rpc_conn *conn);
void rpc_conn_fail(struct rpc_conn *conn, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* As rpc_conn_send, in any state that has a connection. */
int rpc_conn_put(struct rpc_conn *conn, enum frame_kind kind, uint16_t method, uint64_t call,
                 const ProtobufCMessage *msg);
/* Counts in the budget what the buffers of its bev hold from now on. */
int rpc_conn_count(struct rpc_conn *conn) MUST_CHECK;
void rpc_on_event(struct bufferevent *bev, short what, void *arg); /* arg: the connection, as below */

/* ---- input (rpc_input.c) ---- */

int rpc_conn_listen(struct rpc_conn *conn) MUST_CHECK; /* it is connected, without TLS: its socket is read */
void rpc_conn_hear(struct rpc_conn *conn, bool on);    /* whether its socket is read */
void rpc_conn_input(struct rpc_conn *conn);            /* hands on the frames in conn->in */
void rpc_on_tls_read(struct bufferevent *bev, void *arg);

/* ---- output (rpc_output.c) ---- */

void rpc_on_write(struct bufferevent *bev, void *arg);        /* all output is with the kernel */
void rpc_on_flush(evutil_socket_t fd, short what, void *arg); /* arg: struct rpc */

/* ---- TLS (rpc_secure.c) ---- */

/* Puts TLS on a connected socket, in place of the plain bufferevent if there is one.  fd stays the caller's on failure.
 */
int rpc_conn_secure(struct rpc_conn *conn, int fd) MUST_CHECK;
void rpc_on_tls_event(struct rpc_conn *conn, short what);

/* ---- handshake (rpc_handshake.c) ---- */

void rpc_handshake_start(struct rpc_conn *conn); /* connector: sends Hello */
void rpc_handshake_frame(struct rpc_conn *conn, const struct frame *frame);
/* The other end's certificate says that it is what it says; always without TLS.  what: "agent/gpu3", of the cluster. */
int rpc_tls_check(const SSL *ssl, const char *cluster, const char *what, struct err *err) MUST_CHECK;
/* Shared with the blocking client.  hello_fill borrows the strings of self. */
void rpc_hello_fill(Pb__Hello *ret_hello, const struct rpc_identity *self);
/* The acceptor's answer: HelloReply, or the error that it carries. */
int rpc_hello_answer(const struct frame *frame, const struct rpc_identity *self, struct rpc_identity *ret_peer,
                     struct err *err) MUST_CHECK;

#endif
