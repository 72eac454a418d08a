/* What the files of bench_several share: bench_several.c (parties, what moves, modes), bench_sweep.c (groupings). */
#ifndef EEP_TESTS_GPU_BENCH_SEVERAL_H
#define EEP_TESTS_GPU_BENCH_SEVERAL_H

#include "agent/memory.h"
#include "agent/transport_gpu.h"
#include "agent/transport_nccl.h"
#include "tests/gpu/bench_plain.h"

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

enum { PEER, NCCL, TRANSPORTS };
extern const char *const transport_names[TRANSPORTS];

struct options {
    const char *mode;
    uint32_t ranks, senders, slots, gpus;
    uint64_t slot, dense;
    int rounds;
    int listeners[BENCH_PARTIES_MAX];
    struct member members[BENCH_PARTIES_MAX];
    uint64_t *sums; /* shared: [senders][slots], the digests of what is sent */
};

struct party {
    const struct options *o;
    struct bench_stage *stage;
    uint32_t self;
    char gpu[12];
    struct memory_backend *memory;
    struct memory_region region; /* the weights: what a sender has, what a receiver gets */
    struct transport *transports[TRANSPORTS];
    struct transport_group *groups[TRANSPORTS];
    struct transfer *items; /* [receivers * slots] */
    uint32_t turn;          /* places change with each move, so that none is right because of the one before */
    struct plain plain;
    ncclComm_t all, cast; /* of all ranks; of the first sender and the receivers */
};

struct sample {
    const char *transport, *plain_name;
    uint64_t bytes;
    struct bench_times ours, plain, copies;
};

/* One kind of measurement of one transport, by turns with its plain operations; the first turn warms up.  copies: plain
 * copies as well. */
struct sample bench_sample_take(struct party *p, int which, bool dense, bool copies);
/* As JSON, by party 0: seconds, GB/s into a receiver, ratios.  more: further pairs of it, each after ", ". */
void bench_sample_print(const struct party *p, const char *name, const struct sample *s, const char *more);

/* Other groupings than agents use, one thing changed at a time, and printed; what agents use comes first, and is set
 * again at the end. */
void bench_sweep_peer(struct party *p, bool dense);
void bench_sweep_nccl(struct party *p, bool dense);

#endif
