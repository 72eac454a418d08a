/* The operations that transports are measured against, as plain as they can be: a group of ncclSend and ncclRecv,
 * ncclBroadcast, and one copy from each sender at once.  Every call is made by all parties of the stage; times are the
 * longest of all parties', in ns. */
#ifndef EEP_TESTS_GPU_BENCH_PLAIN_H
#define EEP_TESTS_GPU_BENCH_PLAIN_H

#include "agent/nccl_library.h"
#include "tests/gpu/bench.h"

struct plain {
    struct bench_stage *stage;
    uint32_t self;
    struct cuda_device *device;
    CUstream streams[BENCH_PARTIES_MAX];
    struct nccl_library nccl;
    __typeof__(ncclBroadcast) *broadcast;
    /* of plain_copies: a window of memory of each sender's GPU */
    struct plain_window {
        struct memory_backend *memory;
        struct memory_region region;
        CUdeviceptr at;
    } windows[BENCH_PARTIES_MAX];
};

void plain_open(struct plain *p, struct bench_stage *stage, uint32_t self, const char *gpu);
void plain_close(struct plain *p);

/* A communicator of the first n of `ranks` (party numbers, the same list at all parties).  NULL for who is not in it.
 */
uint64_t plain_communicator(struct plain *p, const uint32_t *ranks, uint32_t n, ncclComm_t *ret_comm);
uint64_t plain_abort(struct plain *p, ncclComm_t comm);
/* bytes / senders from each of parties [0, senders) to each of the others, in operations of PLAIN_OP_BYTES, at most
 * PLAIN_GROUP_OPS of all pairs in a group, group after group. */
#define PLAIN_OP_BYTES  4718592u /* the mean of the two parts of an expert of Qwen3-30B-A3B */
#define PLAIN_GROUP_OPS 1024u
uint64_t plain_group(struct plain *p, ncclComm_t comm, uint32_t senders, void *region, uint64_t bytes);
/* One group: 8 bytes between all pairs of n. */
uint64_t plain_exchange(struct plain *p, ncclComm_t comm, uint32_t n, void *region);
/* From rank 0 of the communicator; who has none only meets. */
uint64_t plain_broadcast(struct plain *p, ncclComm_t comm, void *region, uint64_t bytes);
/* Each of parties [senders, ...) copies bytes / senders from each sender's GPU, all at once. */
void plain_windows_open(struct plain *p, uint32_t senders, uint64_t bytes, uint32_t gpus);
uint64_t plain_copies(struct plain *p, uint32_t senders, void *region, uint64_t bytes);

#endif
