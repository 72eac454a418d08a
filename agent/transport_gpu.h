/* The transports whose weights lie in GPU memory; each is a stub where the build found no headers for it.
 *
 * device: as in memory_open's "cuda:DEVICE", the GPU that the regions to be moved lie on; "" for the first. */
#ifndef EEP_AGENT_TRANSPORT_GPU_H
#define EEP_AGENT_TRANSPORT_GPU_H

#include "agent/transport.h"
#include "agent/transport_auto.h"

/* Between agents of one host whose GPUs reach each other: the receiver maps the sender's regions and copies.  Regions
 * must outlive the group. */
struct transport *transport_cuda_peer_open(const char *device, struct err *err);

/* cuda_peer between GPUs of one host that reach each other, nccl between all others; see transport_auto.h.  NCCL is not
 * even loaded before parties meet that need it. */
struct transport *transport_gpu_auto_open(const char *device, int listen_fd, struct err *err);

/* What another cuda_peer must know to tell whether it reaches this one; and that. */
int transport_cuda_peer_card(struct transport *transport, uint8_t ret_card[TRANSPORT_CARD_BYTES], struct err *err) MUST_CHECK;
bool transport_cuda_peer_reaches(struct transport *transport, const uint8_t card[TRANSPORT_CARD_BYTES]);

/* How copies are given to the driver, for benchmarks; set when it is open.  False when this driver has no batches, or
 * more is asked for than there is room for. */
struct peer_tuning {
    unsigned streams;     /* 1 to 8 that take turns */
    bool batched;         /* one call (cuMemcpyBatchAsync, CUDA 12.8) for many copies */
    unsigned in_flight;   /* batches, up to 48; 0: as agents use */
    uint64_t batch_bytes; /* of one batch, and of one copy in it, at most; 0: as agents use */
    uint64_t chunk_bytes; /* of a broadcast, from one sender each, the same at all parties; 0: as agents use */
};
/* What is used now; without another tuning, what agents use. */
struct peer_tuning transport_cuda_peer_tuned(const struct transport *transport);
bool transport_cuda_peer_tune(struct transport *transport, const struct peer_tuning *tuning);

#endif
