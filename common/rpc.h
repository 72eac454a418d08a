/* Connections that carry frames: handshake, messages, calls and streams.
 *
 * Two users: event-driven ones (daemons: struct rpc, rpc_listener, rpc_conn over libevent; one loop thread) and
 * blocking ones (eepctl and small tools: struct rpc_client).  What the messages mean is not known here.
 *
 * Lifetime: a connection that is closed (by either side, by rpc_conn_close, by an error) is freed after the loop
 * turn, so a pointer to it stays valid until the callback that is running returns.  After on_close has returned, or
 * after rpc_conn_close, it must not be used again.  No callback is ever made from inside rpc_conn_send,
 * rpc_conn_close, rpc_connect or rpc_listen. */
#ifndef EEP_COMMON_RPC_H
#define EEP_COMMON_RPC_H

#include <event2/event.h>
#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"
#include "common/frame.h"
#include "common/tls.h"

#define RPC_PROTOCOL_VERSION 1
#define RPC_NAME_MAX         64          /* cluster and agent names, with the terminating NUL */
#define RPC_HANDSHAKE_MS     5000        /* from accept (or the start of a connect) to the end of the handshake */
#define RPC_OUTPUT_LIMIT     (96u << 20) /* unsent bytes after which a connection is cut off; default */

enum rpc_role { RPC_ROLE_AGENT = 1, RPC_ROLE_OPERATOR, RPC_ROLE_READER, RPC_ROLE_PEER }; /* = Role in common.proto */
const char *rpc_role_name(enum rpc_role role);                                           /* "agent" */

/* What one end says about itself in the handshake. */
struct rpc_identity {
    enum rpc_role role;          /* of the connecting end; an acceptor has none */
    char cluster[RPC_NAME_MAX];  /* "" is allowed for operators and readers only */
    char agent[RPC_NAME_MAX];    /* AGENT, PEER: id */
    uint64_t incarnation;        /* AGENT, PEER: not 0 */
    char software[RPC_NAME_MAX]; /* version of the program */
};

/* ---- event-driven ---- */

struct rpc; /* all connections of one loop */
struct rpc_listener;
struct rpc_conn;

struct rpc *rpc_new(struct event_base *base); /* NULL when out of memory; base is borrowed */
/* Memory for what is received and not handed on yet, and for what is not sent yet, of all connections together: beyond
 * it the connection with the most is cut off (ERR_LIMIT).  Borrowed for the life of rpc; before any connection.  One
 * frame more may be there for a moment. */
struct budget;
void rpc_budget_set(struct rpc *rpc, struct budget *budget);
void rpc_free(struct rpc *rpc);               /* closes every listener and connection, without callbacks; takes NULL */

struct rpc_handlers {
    /* Accepting end, before HelloReply: negative refuses, and the sentence in err is sent to the peer.  NULL: everyone
     * who has the right cluster and protocol version.  The connection is not to be used yet. */
    int (*on_hello)(void *user, struct rpc_conn *conn, const struct rpc_identity *peer, struct err *err);
    /* The handshake is done; from now on frames may be sent.  Accepting end: set per-connection state here. */
    void (*on_ready)(void *user, struct rpc_conn *conn);
    /* A frame has come; everything in it is borrowed.  HANDSHAKE never gets here. */
    void (*on_frame)(void *user, struct rpc_conn *conn, const struct frame *frame);
    /* Lost, refused, timed out, or cut off as too slow: once per connection that had on_ready, and once for every
     * rpc_connect; not after rpc_conn_close.  code is ERR_*; reason a sentence.  The last callback. */
    void (*on_close)(void *user, struct rpc_conn *conn, int code, const char *reason);
    /* Accepting end: a connection has ended before on_ready: refused, or its peer speaks something else.  May come
     * often, from anyone who reaches the port.  NULL = nobody asks. */
    void (*on_refused)(void *user, const char *name, int code, const char *reason);
};

struct rpc_options {
    const struct rpc_handlers *handlers; /* borrowed for the life of listener and connections */
    void *user;                          /* of the handlers */
    const struct rpc_identity *self;     /* copied */
    size_t output_limit;                 /* per connection; 0 = RPC_OUTPUT_LIMIT */
    unsigned unix_mode;                  /* permissions of unix sockets of a listener; 0 = by umask */
    unsigned max_conns;                  /* of a listener, the next ones are closed at once; 0 = 4096 */
    const struct tls *tls; /* borrowed; TCP connections are encrypted, and prove who they are; NULL = not */
    const char *tls_peer;  /* of a connector with tls: the acceptor's certificate must be
                              eep://CLUSTER/THIS; copied; NULL = "coordinator" */
    const int *fds;        /* of a listener: sockets that listen on its addresses already (address_listen,
                              address_adopt), its own from then on, also on failure; -1 or NULL = make
                              them */
    bool fds_lent;         /* of fds: others listen there too, so they are only closed at the end: never shut
                              down, their files stay */
};

/* A unix socket takes root, our own user, and members of the group of its file (ERR_DENIED in the handshake).
 * Listens on every address ("host:port", ":port", "[v6]:port", "unix:/path"); all or none. */
int rpc_listen(struct rpc *rpc, const char *const *addresses, size_t n, const struct rpc_options *options,
               struct rpc_listener **ret_listener, struct err *err) MUST_CHECK;
/* i-th address with its real port; NULL when there is none. */
const char *rpc_listener_address(const struct rpc_listener *listener, size_t i);
int rpc_listener_fd(const struct rpc_listener *listener, size_t i); /* borrowed; -1 when there is none */
/* Stops accepting and removes socket files; connections past their handshake live on.  Takes NULL. */
void rpc_listener_close(struct rpc_listener *listener);

/* Starts a connection; on_ready or on_close follows from the loop.  Negative only for an address that is none, or no
 * memory. */
int rpc_connect(struct rpc *rpc, const char *address, const struct rpc_options *options, struct rpc_conn **ret_conn,
                struct err *err) MUST_CHECK;

/* Of an accepted connection whose peer makes calls: while more than pause_bytes are unsent, nothing more is read from
 * it (no frame is handed on); with more than cut_bytes, or when the peer has taken nothing for stall_ms, it is cut off.
 * Without this there is only options.output_limit. */
void rpc_conn_limit(struct rpc_conn *conn, size_t pause_bytes, size_t cut_bytes, unsigned stall_ms);
void rpc_conn_set_user(struct rpc_conn *conn, void *user); /* replaces options.user for this connection */
uint64_t rpc_conn_id(const struct rpc_conn *conn);         /* unique in this struct rpc, from 1; never reused */
const struct rpc_identity *rpc_conn_peer(const struct rpc_conn *conn); /* what the other end said; role 0 = acceptor */
const char *rpc_conn_name(const struct rpc_conn *conn);                /* "agent gpu3 127.0.0.1:4242", for logs */
/* What its user keeps for it counts in the budget, too. */
void rpc_conn_hold(struct rpc_conn *conn, size_t more, size_t less);
size_t rpc_conn_unsent(const struct rpc_conn *conn);                   /* bytes in the output buffer */

/* Queues one frame; msg NULL = no payload.  0, or ERR_UNREACHABLE when the connection is closing, ERR_LIMIT when the
 * frame is too long or the peer too slow, ERR_NOMEM.  After the latter two the connection is closed and on_close
 * follows from the loop, so a caller that has nothing else to do may ignore the result. */
int rpc_conn_send(struct rpc_conn *conn, enum frame_kind kind, uint16_t method, uint64_t call,
                  const ProtobufCMessage *msg);
int rpc_conn_send_bytes(struct rpc_conn *conn, enum frame_kind kind, uint16_t method, uint64_t call, const void *data,
                        size_t len);
/* An ERROR frame for a call. */
int rpc_conn_send_error(struct rpc_conn *conn, uint16_t method, uint64_t call, int code, const char *text);
/* Drops the connection now, with what is unsent.  No further callback. */
void rpc_conn_close(struct rpc_conn *conn);
/* Sends what is queued (at most linger_ms), then closes.  No further callback. */
void rpc_conn_finish(struct rpc_conn *conn, unsigned linger_ms);

/* ---- unpacking with a budget ---- */

/* Memory that the unpacked form of a frame may take: a multiple of its length, not more. */
size_t rpc_budget(size_t len);
/* ERR_PROTOCOL: not such a message, or it asks for more than budget (0 = rpc_budget(len)).  Free with rpc_unpack_free.
 */
int rpc_unpack(const ProtobufCMessageDescriptor *type, const uint8_t *data, size_t len, size_t budget,
               ProtobufCMessage **ret_msg, struct err *err) MUST_CHECK;
void rpc_unpack_free(ProtobufCMessage *msg); /* takes NULL */
/* The same, the unpacked form in memory that is used again: no allocation for a small message.  One message at a time;
 * it ends with rpc_scratch_free, not with rpc_unpack_free. */
struct rpc_scratch {
    size_t used;  /* 0 = free */
    bool spilled; /* a part is malloc'ed */
    _Alignas(16) uint8_t bytes[4096];
};
int rpc_unpack_scratch(struct rpc_scratch *scratch, const ProtobufCMessageDescriptor *type, const uint8_t *data,
                       size_t len, ProtobufCMessage **ret_msg, struct err *err) MUST_CHECK;
void rpc_scratch_free(struct rpc_scratch *scratch, ProtobufCMessage *msg);
/* The error that an ERROR frame carries, set in err; returns its code (ERR_PROTOCOL when it is unreadable). */
int rpc_error_of(const uint8_t *data, size_t len, struct err *err);

/* ---- blocking client ----
 * One thread at a time.  Several calls may be open: a stream, and plain calls beside it.  Types of requests and
 * replies come from the service's descriptor (pb__control__descriptor) and are asserted. */

struct rpc_client;

/* ERR_UNREACHABLE, ERR_TIMEOUT, or what the acceptor refused it with. */
int rpc_client_connect(const char *address, const struct rpc_identity *self, const ProtobufCServiceDescriptor *service,
                       int timeout_ms, struct rpc_client **ret_client, struct err *err) MUST_CHECK;
/* The same with TLS when the address is one of TCP; tls is needed only during the call.  acceptor: who its certificate must
 * say it is, "coordinator" or "agent/ID". */
int rpc_client_connect_tls(const char *address, const struct rpc_identity *self,
                           const ProtobufCServiceDescriptor *service, const struct tls *tls, const char *acceptor,
                           int timeout_ms, struct rpc_client **ret_client, struct err *err) MUST_CHECK;
void rpc_client_free(struct rpc_client *client); /* takes NULL */
const struct rpc_identity *rpc_client_peer(const struct rpc_client *client);
/* Readable when rpc_client_next may have something.  Poll it only after rpc_client_next with timeout 0 has said
 * ERR_TIMEOUT: frames that were read ahead do not show in it. */
int rpc_client_fd(const struct rpc_client *client);

/* One call, one reply (free it with rpc_unpack_free).  timeout_ms -1 = none.  After ERR_TIMEOUT the call is forgotten.
 */
int rpc_client_call(struct rpc_client *client, unsigned method, const ProtobufCMessage *request, int timeout_ms,
                    ProtobufCMessage **ret_reply, struct err *err) MUST_CHECK;
/* Starts a call whose replies are fetched one by one. */
int rpc_client_start(struct rpc_client *client, unsigned method, const ProtobufCMessage *request, uint64_t *ret_call,
                     struct err *err) MUST_CHECK;
/* 1: a reply.  0: the stream has ended (a plain reply counts as one reply and then the end).
 * ERR_TIMEOUT: nothing yet, ask again.  Other codes: the call has failed. */
int rpc_client_next(struct rpc_client *client, uint64_t call, int timeout_ms, ProtobufCMessage **ret_reply,
                    struct err *err) MUST_CHECK;

#endif
