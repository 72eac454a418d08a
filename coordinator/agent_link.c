/* Agents' connections and the core's messages: bytes to CE_MSG, CA_SEND to bytes.
 *
 * What is malformed never reaches the core: the connection is dropped with a sentence, and the agent comes again.
 * Loop thread. */
#include "coordinator/server_internal.h"

#include <stdlib.h>
#include <string.h>

#include "common/msg_wire.h"

static void drop(struct session *session, const char *why)
{
    struct coordinator_action close = {.type = CA_CLOSE, .conn = session->id};
    struct server *s = session->server;
    snprintf(close.text, sizeof close.text, "%s", why);
    bool known = session->hello;
    uint64_t conn = session->id;
    agent_link_close(s, &close);
    if (known) {
        struct coordinator_event event = {.type = CE_DISCONNECTED, .conn = conn};
        server_step(s, &event);
    }
}

/* The first message must be HELLO, of the agent that the handshake named. */
static bool first_is_right(const struct session *session, const struct msg *msg)
{
    const struct rpc_identity *peer = rpc_conn_peer(session->conn);
    return msg->type == MSG_HELLO && strcmp(msg->hello.id, peer->agent) == 0 &&
           msg->hello.incarnation == peer->incarnation;
}

void agent_link_frame(struct session *session, const struct frame *frame)
{
    struct server *s = session->server;
    struct msg msg;
    struct err err;
    if (frame->header.kind != FRAME_MESSAGE) {
        drop(session, "an agent sends messages only");
        return;
    }
    if (msg_unpack_up(frame->payload, frame->header.length, 0, &msg, &err) < 0) {
        drop(session, err.text);
        return;
    }
    if (session->hello == (msg.type == MSG_HELLO) || (!session->hello && !first_is_right(session, &msg))) {
        msg_done(&msg);
        drop(session, session->hello ? "HELLO comes once"
                                     : "the first message must be HELLO with the handshake's id and incarnation");
        return;
    }
    session->hello = true;
    if (log_wants(s->log, LOG_LEVEL_DEBUG) && msg.type != MSG_HEARTBEAT)
        log_event(s->log, LOG_LEVEL_DEBUG, "received", "agent=%s message=%s", rpc_conn_peer(session->conn)->agent,
                  msg_type_name(msg.type));
    struct coordinator_event event = {.type = CE_MSG, .conn = session->id, .msg = &msg};
    server_step(s, &event);
    msg_done(&msg);
}

void agent_link_closed(struct session *session)
{
    if (!session->hello)
        return; /* the core has never heard of it */
    struct coordinator_event event = {.type = CE_DISCONNECTED, .conn = session->id};
    server_step(session->server, &event);
}

void agent_link_send(struct server *s, const struct coordinator_action *action)
{
    struct session *session = server_session(s, action->conn);
    if (!session)
        return; /* gone; the core hears of it, or has */
    uint8_t *data;
    size_t len;
    struct err err;
    if (msg_pack(&action->msg, &data, &len, &err) < 0) {
        log_event(s->log, LOG_LEVEL_ERROR, "pack-failed", "agent=%s message=%s why=%s",
                  rpc_conn_peer(session->conn)->agent, msg_type_name(action->msg.type), err.text);
        return; /* the operation's deadline names the agent */
    }
    log_event(s->log, LOG_LEVEL_DEBUG, "sent", "agent=%s message=%s", rpc_conn_peer(session->conn)->agent,
              msg_type_name(action->msg.type));
    (void)rpc_conn_send_bytes(session->conn, FRAME_MESSAGE, 0, 0, data, len); /* failures come as on_close */
    free(data);
}
