/* Links between the agents of a view: they carry the start of a wave to the other members.  And the calls of any agent
 * that reads experts here (expert_read.h).  Loop thread.
 *
 * Every agent listens, and connects to each other member of its applied view; links are kept across views while the
 * member is the same incarnation.  A wave for a peer that is not connected waits until it is, or until the view is
 * another one; after a reconnect the last wave of the view is said again, which changes nothing if it had arrived. */
#ifndef EEP_AGENT_PEER_LINK_H
#define EEP_AGENT_PEER_LINK_H

#include "agent/expert_read.h"
#include "common/log.h"
#include "common/rpc.h"
#include "common/topology.h"

struct peer_links;

struct peer_links_config {
    struct event_base *base;
    struct rpc *rpc;
    struct log *log;
    const struct tls *tls;           /* borrowed; NULL = not encrypted */
    const char *listen;
    int listen_fd;                   /* a socket that listens there already, ours from then on; -1 = make one */
    const struct rpc_identity *self; /* role PEER; copied */
    void (*on_wave)(void *user, uint64_t epoch, uint64_t step);
    /* Answer it with peer_links_answer, once, also when `read` is refused; the caller may be gone by then. */
    void (*on_read)(void *user, uint64_t id, const struct expert_read *read);
    void *user;
};

int peer_links_open(const struct peer_links_config *config, struct peer_links **ret_links, struct err *err) MUST_CHECK;
void peer_links_close(struct peer_links *links); /* takes NULL */
int peer_links_fd(const struct peer_links *links); /* the listening socket, borrowed: to be kept */
const char *peer_links_address(const struct peer_links *links); /* with its real port */
/* The applied view (NULL = none): connects to its other members, lets go of the rest. */
void peer_links_view(struct peer_links *links, struct view *view);
/* Tells every other member of the view. */
void peer_links_wave(struct peer_links *links, uint64_t epoch, uint64_t step);

/* Answers the read `id`: code 0 with its bytes, or ERR_* with a sentence. */
void peer_links_answer(struct peer_links *links, uint64_t id, int code, const char *text, const struct blob *data);

#endif
