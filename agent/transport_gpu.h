/* The transports whose weights lie in GPU memory; each is a stub where the build found no headers for it.
 *
 * device: as in memory_open's "cuda:DEVICE", the GPU that the regions to be moved lie on; "" for the first. */
#ifndef EEP_AGENT_TRANSPORT_GPU_H
#define EEP_AGENT_TRANSPORT_GPU_H

#include "agent/transport.h"

/* Between agents of one host whose GPUs reach each other: the receiver maps the sender's regions and copies.  Regions
 * must outlive the group. */
struct transport *transport_cuda_peer_open(const char *device, struct err *err);

/* How copies are given to the driver, for benchmarks; set when it is open.  False when this driver has no batches. */
struct peer_tuning {
    unsigned streams; /* 1 to 8 that take turns */
    bool batched;     /* one call (cuMemcpyBatchAsync, CUDA 12.8) for many copies */
};
bool transport_cuda_peer_tune(struct transport *transport, const struct peer_tuning *tuning);

#endif
