/* The NCCL transport: large grouped sends and receives between the GPUs of a group (transport_nccl.c; where the build
 * found no nccl.h, transport_nccl_stub.c, which says so). */
#ifndef EEP_AGENT_TRANSPORT_NCCL_H
#define EEP_AGENT_TRANSPORT_NCCL_H

#include "agent/transport.h"

struct transport_nccl_options {
    int listen_fd; /* as for transport_host_open: the parties also talk beside NCCL; owned by the transport once open */
    struct transport *mesh; /* a host transport to use instead, which stays the caller's and outlives this; or NULL */
    const char *gpu; /* as for cuda_device_open: "" = the first, an index, or a UUID; must be the regions' GPU */
    uint32_t keep_ms; /* for how long a communicator that its group has ended with is kept for the next group, which may
                       * have the same parties or fewer: its buffers stay on the GPU meanwhile.  0: not at all */
    bool shared_gpu; /* several agents use this GPU: gives the process a NCCL_HOSTID of its own, unless it has one.
                      * Changes the environment: open before there are other threads, and before any use of NCCL */
};

#define TRANSPORT_NCCL_KEEP_MS 60000u /* what agents use: operations that follow each other */

/* Moves between regions of the "cuda" memory backend of the same GPU.  NULL and a sentence when there is no libnccl,
 * no driver or no such GPU; may block for a second. */
struct transport *transport_nccl_open(const struct transport_nccl_options *options, struct err *err);

/* How moves and broadcasts are grouped, for benchmarks; set when it is open, the same at all parties. */
struct nccl_tuning {
    uint32_t group_ops;   /* operations of one group, all peers and directions together; 0: as agents use */
    uint32_t in_flight;   /* groups, up to 8; 0: as agents use */
    uint64_t group_bytes; /* of one pair and direction in one group, at most; 0: as agents use */
    uint64_t op_bytes;    /* of one operation of a move, at most; 0: as agents use */
    uint64_t chunk_bytes; /* of a broadcast, one step of a chain, at most; 0: as agents use */
};
bool transport_nccl_tune(struct transport *transport, const struct nccl_tuning *tuning);
/* What is used now; without another tuning, what agents use. */
struct nccl_tuning transport_nccl_tuned(const struct transport *transport);

/* "NCCL 2.28.9 with shrink": what the transport found. */
const char *transport_nccl_version(const struct transport *transport);

/* How the communicators of its groups came about, and how many are being ended in the background now (one that is kept
 * is not). */
struct transport_nccl_counts {
    unsigned made, reused, shrunk, ending;
};
struct transport_nccl_counts transport_nccl_counts(const struct transport *transport);

#endif
