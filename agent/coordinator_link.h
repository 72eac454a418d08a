/* The agent's connection to the coordinator: made, lost, made again every 50 ms to 1 s, for ever.  Loop thread.
 * One log line per change of state, not per attempt. */
#ifndef EEP_AGENT_COORDINATOR_LINK_H
#define EEP_AGENT_COORDINATOR_LINK_H

#include "common/log.h"
#include "common/msg.h"
#include "common/rpc.h"

struct coordinator_link;

struct coordinator_link_config {
    struct event_base *base;
    struct rpc *rpc;
    struct log *log;
    const struct tls *tls; /* borrowed; NULL = not encrypted */
    const char *address;
    const struct rpc_identity *self; /* role AGENT; copied */
    void (*on_up)(void *user);
    void (*on_down)(void *user);
    void (*on_msg)(void *user, const struct msg *msg); /* borrowed */
    void *user;
};

/* The first attempt is made at once, and answered from the loop. */
int coordinator_link_new(const struct coordinator_link_config *config, struct coordinator_link **ret_link,
                         struct err *err) MUST_CHECK;
void coordinator_link_free(struct coordinator_link *link); /* takes NULL; no callback */
/* Dropped when there is no connection: whoever counts on an answer says it again after the next HELLO. */
void coordinator_link_send(struct coordinator_link *link, const struct msg *msg);
/* Drops the connection and makes another one.  No on_down. */
void coordinator_link_reconnect(struct coordinator_link *link, const char *why);

#endif
