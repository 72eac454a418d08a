/* Reading experts from other agents, for the repair of a view: a blocking client of `service Peer` (proto/peer.proto).
 * Worker thread.  The other side: peer_link.h takes the calls, worker_expert_read does them. */
#ifndef EEP_AGENT_EXPERT_READ_H
#define EEP_AGENT_EXPERT_READ_H

#include <stdbool.h>
#include <stdint.h>

#include "common/rpc.h"
#include "common/topology.h"

#define EXPERT_READ_MAX ((uint32_t)4 << 20) /* bytes of one call */

/* Bytes [offset, offset + length) of an expert as a slot holds them, part after part. */
struct expert_read {
    uint64_t manifest; /* digest; of so many slots per rank */
    uint32_t slots, layer, expert;
    uint64_t offset;
    uint32_t length;  /* 1 to EXPERT_READ_MAX */
    bool memory_only; /* not from the checkpoint */
};

struct expert_sources_config {
    const struct rpc_identity *self; /* role PEER */
    const struct tls *tls;           /* NULL: not encrypted */
    const struct member *members;    /* [n] who may be asked; borrowed */
    uint32_t n;
    unsigned timeout_ms; /* of a connection, and of a call */
    bool (*cancelled)(void *user); /* looked at every 100 ms, less often while connecting; it may do reads for others */
    void *user;
};
struct expert_sources;
/* Connects to nobody yet.  ERR_NOMEM. */
int expert_sources_open(const struct expert_sources_config *config, struct expert_sources **ret_sources, struct err *err) MUST_CHECK;
void expert_sources_close(struct expert_sources *s); /* takes NULL */
/* Asks member i; at most EXPERT_READS_AHEAD are to be under way.  Blocks for a connection. */
#define EXPERT_READS_AHEAD 4u
int expert_sources_begin(struct expert_sources *s, uint32_t i, const struct expert_read *read, uint64_t *ret_call, struct err *err) MUST_CHECK;
/* The answer to the oldest of them.  Blocks.  ERR_NOTFOUND: it does not have it; ERR_ABORTED: cancelled.  A member that cannot
 * be reached, or does not answer in time, is not asked again: the same error at once, also for what is under way. */
int expert_sources_end(struct expert_sources *s, uint32_t i, uint64_t call, const struct expert_read *read, void *ret_data, struct err *err) MUST_CHECK;

#endif
