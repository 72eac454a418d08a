/* The handshake of connections: Hello, and HelloReply or Error.  Loop thread (the parts for both clients: any). */
#include <event2/bufferevent.h>
#include <stdio.h>
#include <string.h>

#include "common/peer_cred.h"
#include "common/rpc_parts.h"
#include "common/topology_wire.h"

#define REFUSAL_LINGER_MS 1000

_Static_assert((int)RPC_ROLE_AGENT == (int)PB__ROLE__AGENT && (int)RPC_ROLE_OPERATOR == (int)PB__ROLE__OPERATOR &&
                   (int)RPC_ROLE_READER == (int)PB__ROLE__READER && (int)RPC_ROLE_PEER == (int)PB__ROLE__PEER,
               "roles are those of common.proto");
_Static_assert(RPC_NAME_MAX == AGENT_ID_MAX, "names are as long as agent ids");

void rpc_hello_fill(Pb__Hello *ret_hello, const struct rpc_identity *self)
{
    pb__hello__init(ret_hello);
    ret_hello->protocol = RPC_PROTOCOL_VERSION;
    ret_hello->role = (Pb__Role)self->role;
    ret_hello->cluster = (char *)self->cluster;
    ret_hello->agent = (char *)self->agent;
    ret_hello->incarnation = self->incarnation;
    ret_hello->software = (char *)self->software;
}

int rpc_tls_check(const SSL *ssl, const char *cluster, const char *what, struct err *err)
{
    char uri[sizeof "eep://" + 2 * RPC_NAME_MAX + 16];
    snprintf(uri, sizeof uri, "eep://%.*s/%.*s", RPC_NAME_MAX, cluster, RPC_NAME_MAX + 8, what);
    return !ssl || tls_is(ssl, uri) ? 0
                                    : err_set(err, ERR_DENIED,
                                              "its certificate does not say that it is %s: it needs "
                                              "this URI in its subjectAltName",
                                              uri);
}

/* ---- connecting end ---- */

void rpc_handshake_start(struct rpc_conn *conn)
{
    Pb__Hello hello;
    rpc_hello_fill(&hello, &conn->self);
    rpc_conn_put(conn, FRAME_HANDSHAKE, 0, 0, &hello.base); /* a failure has closed the connection */
}

static int reply_check(const Pb__HelloReply *reply, const struct rpc_identity *self, struct rpc_identity *ret_peer,
                       struct err *err)
{
    if (reply->protocol != RPC_PROTOCOL_VERSION)
        return err_set(err, ERR_UNSUPPORTED, "it speaks protocol version %u, we speak %d", reply->protocol,
                       RPC_PROTOCOL_VERSION);
    if (self->cluster[0] && strcmp(self->cluster, reply->cluster) != 0)
        return err_set(err, ERR_CONFLICT, "it belongs to cluster '%.64s', we to '%s'", reply->cluster, self->cluster);
    struct rpc_identity peer = {0};
    int rc = pb_string(reply->cluster, peer.cluster, sizeof peer.cluster, "cluster name", err);
    if (rc == 0)
        rc = pb_string(reply->software, peer.software, sizeof peer.software, "software version", err);
    if (rc == 0)
        *ret_peer = peer;
    return rc;
}

int rpc_hello_answer(const struct frame *frame, const struct rpc_identity *self, struct rpc_identity *ret_peer,
                     struct err *err)
{
    if (frame->header.kind == FRAME_ERROR) {
        int rc = rpc_error_of(frame->payload, frame->header.length, err);
        err_wrap(err, "refused");
        return rc;
    }
    if (frame->header.kind != FRAME_HANDSHAKE)
        return err_set(err, ERR_PROTOCOL, "a %s frame instead of the handshake", frame_kind_name(frame->header.kind));
    ProtobufCMessage *msg;
    int rc = rpc_unpack(&pb__hello_reply__descriptor, frame->payload, frame->header.length, 0, &msg, err);
    if (rc < 0)
        return rc;
    rc = reply_check((const Pb__HelloReply *)msg, self, ret_peer, err);
    rpc_unpack_free(msg);
    return rc;
}

/* ---- accepting end ---- */

static int hello_check(const Pb__Hello *hello, const struct rpc_identity *self, struct rpc_identity *ret_peer,
                       struct err *err)
{
    if (hello->protocol != RPC_PROTOCOL_VERSION)
        return err_set(err, ERR_UNSUPPORTED, "protocol version %u is not spoken here, but %d", hello->protocol,
                       RPC_PROTOCOL_VERSION);
    struct rpc_identity peer = {.role = (enum rpc_role)hello->role, .incarnation = hello->incarnation};
    int rc;
    if ((rc = pb_string(hello->cluster, peer.cluster, sizeof peer.cluster, "cluster name", err)) < 0 ||
        (rc = pb_string(hello->agent, peer.agent, sizeof peer.agent, "agent id", err)) < 0 ||
        (rc = pb_string(hello->software, peer.software, sizeof peer.software, "software version", err)) < 0)
        return rc;
    bool agent = peer.role == RPC_ROLE_AGENT || peer.role == RPC_ROLE_PEER;
    if ((agent || peer.cluster[0]) && strcmp(peer.cluster, self->cluster) != 0)
        return err_set(err, ERR_CONFLICT, "this is cluster '%s', not '%s'", self->cluster, peer.cluster);
    if (agent && !name_valid(peer.agent))
        return err_set(err, ERR_PROTOCOL, "an agent's id has 1 to %d of letters, digits, '.', '_', '-'",
                       RPC_NAME_MAX - 1);
    if (agent && peer.incarnation == 0)
        return err_set(err, ERR_PROTOCOL, "agent %s has incarnation 0", peer.agent);
    *ret_peer = peer;
    return 0;
}

/* What it has said of itself, its certificate says too.  An operator may look, too. */
static int hello_proven(const struct rpc_conn *conn, struct err *err)
{
    char what[RPC_NAME_MAX + 16];
    const struct rpc_identity *peer = &conn->peer;
    if (peer->role == RPC_ROLE_READER && rpc_tls_check(conn->ssl, conn->self.cluster, "operator", NULL) == 0)
        return 0;
    if (peer->role == RPC_ROLE_AGENT || peer->role == RPC_ROLE_PEER)
        snprintf(what, sizeof what, "agent/%s", peer->agent);
    else
        snprintf(what, sizeof what, "%s", peer->role == RPC_ROLE_OPERATOR ? "operator" : "reader");
    return rpc_tls_check(conn->ssl, conn->self.cluster, what, err);
}

static int hello_accept(struct rpc_conn *conn, const struct frame *frame, struct err *err)
{
    if (frame->header.kind != FRAME_HANDSHAKE)
        return err_set(err, ERR_PROTOCOL, "a %s frame before the handshake", frame_kind_name(frame->header.kind));
    ProtobufCMessage *msg;
    int rc = rpc_unpack(&pb__hello__descriptor, frame->payload, frame->header.length, 0, &msg, err);
    if (rc < 0)
        return rc;
    rc = hello_check((const Pb__Hello *)msg, &conn->self, &conn->peer, err);
    rpc_unpack_free(msg);
    if (rc == 0)
        rc = hello_proven(conn, err);
    if (rc == 0)
        rc = peer_cred_check(bufferevent_getfd(conn->bev), err);
    if (rc < 0)
        return rc;
    char from[ADDRESS_TEXT_MAX];
    snprintf(from, sizeof from, "%.*s", (int)sizeof from - 1, conn->name);
    snprintf(conn->name, sizeof conn->name, "%s%s%s %s", rpc_role_name(conn->peer.role), conn->peer.agent[0] ? " " : "",
             conn->peer.agent, from);
    return conn->handlers->on_hello ? conn->handlers->on_hello(conn->user, conn, &conn->peer, err) : 0;
}

static void handshake_done(struct rpc_conn *conn)
{
    event_del(conn->timer);
    rpc_conn_uncount(conn);
    if (conn->ssl)
        bufferevent_setwatermark(conn->bev, EV_READ, 0, RPC_READ_BYTES);
    conn->state = RPC_READY;
    conn->owed_close = true;
    if (conn->handlers->on_ready)
        conn->handlers->on_ready(conn->user, conn);
}

static void accept_hello(struct rpc_conn *conn, const struct frame *frame)
{
    struct err err = {0};
    int rc = hello_accept(conn, frame, &err);
    if (conn->state != RPC_SHAKING)
        return; /* on_hello has closed it */
    if (rc < 0) {
        if (conn->handlers->on_refused)
            conn->handlers->on_refused(conn->user, conn->name, rc, err.text);
        Pb__Error error = PB__ERROR__INIT;
        error.code = rc;
        error.text = err.text;
        if (rpc_conn_put(conn, FRAME_ERROR, 0, 0, &error.base) == 0)
            rpc_conn_finish(conn, REFUSAL_LINGER_MS);
        return;
    }
    Pb__HelloReply reply = PB__HELLO_REPLY__INIT;
    reply.protocol = RPC_PROTOCOL_VERSION;
    reply.cluster = conn->self.cluster;
    reply.software = conn->self.software;
    if (rpc_conn_put(conn, FRAME_HANDSHAKE, 0, 0, &reply.base) == 0)
        handshake_done(conn);
}

void rpc_handshake_frame(struct rpc_conn *conn, const struct frame *frame)
{
    if (!conn->connector) {
        accept_hello(conn, frame);
        return;
    }
    struct err err = {0};
    int rc = rpc_hello_answer(frame, &conn->self, &conn->peer, &err);
    if (rc == 0)
        rc = rpc_tls_check(conn->ssl, conn->peer.cluster, conn->tls_peer, &err);
    if (rc < 0)
        rpc_conn_fail(conn, rc, "%s: %s", conn->name, err.text);
    else
        handshake_done(conn);
}
