/* The groupings that bench_several tries.  See bench_several.h. */
#include <stdio.h>

#include "tests/gpu/bench_several.h"

/* One thing changed at a time; the first is as agents have it. */
static const struct nccl_tuning nccl_tunings[] = {
    {0},
    {.group_bytes = 16 << 20},
    {.group_bytes = 32 << 20},
    {.group_bytes = 64 << 20},
    {.group_bytes = 256 << 20},
    {.group_bytes = 512 << 20},
    {.in_flight = 1},
    {.in_flight = 2},
    {.in_flight = 8},
    {.group_ops = 64},
    {.group_ops = 256},
    {.group_ops = 4096},
    {.op_bytes = 1 << 20},
    {.op_bytes = 4 << 20},
    {.group_bytes = 512 << 20, .in_flight = 8},
    {.group_bytes = 32 << 20, .in_flight = 8},
};
static const struct nccl_tuning nccl_casts[] = {
    {0},
    {.chunk_bytes = 4 << 20},
    {.chunk_bytes = 8 << 20},
    {.chunk_bytes = 16 << 20},
    {.chunk_bytes = 64 << 20},
    {.in_flight = 2},
    {.in_flight = 8},
    {.chunk_bytes = 8 << 20, .in_flight = 8},
};
static const struct peer_tuning peer_tunings[] = {
    {.streams = 4, .batched = true},
    {.streams = 4, .batched = false},
    {.streams = 1, .batched = true},
    {.streams = 2, .batched = true},
    {.streams = 8, .batched = true},
    {.streams = 4, .batched = true, .in_flight = 1},
    {.streams = 4, .batched = true, .in_flight = 4},
    {.streams = 4, .batched = true, .in_flight = 8},
    {.streams = 4, .batched = true, .in_flight = 48},
    {.streams = 4, .batched = true, .batch_bytes = 16 << 20},
    {.streams = 4, .batched = true, .batch_bytes = 32 << 20},
    {.streams = 4, .batched = true, .batch_bytes = 256 << 20},
    {.streams = 8, .batched = true, .in_flight = 48},
};
static const struct peer_tuning peer_casts[] = {
    {.streams = 4, .batched = true},
    {.streams = 4, .batched = true, .chunk_bytes = 4 << 20},
    {.streams = 4, .batched = true, .chunk_bytes = 32 << 20},
    {.streams = 4, .batched = true, .chunk_bytes = 64 << 20},
    {.streams = 8, .batched = true},
    {.streams = 4, .batched = true, .in_flight = 8},
};

void bench_sweep_nccl(struct party *p, bool dense)
{
    const struct nccl_tuning *all = dense ? nccl_casts : nccl_tunings;
    for (size_t i = 0; i < (dense ? COUNT(nccl_casts) : COUNT(nccl_tunings)); i++) {
        char more[256];
        (void)transport_nccl_tune(p->transports[NCCL], &all[i]);
        struct nccl_tuning t = transport_nccl_tuned(p->transports[NCCL]);
        struct sample s = bench_sample_take(p, NCCL, dense, false);
        snprintf(more, sizeof more,
                 ", \"default\": %s, \"group_ops\": %u, \"group_bytes\": %llu, \"op_bytes\": %llu, \"in_flight\": %u, "
                 "\"chunk_bytes\": %llu",
                 i == 0 ? "true" : "false", t.group_ops, (unsigned long long)t.group_bytes,
                 (unsigned long long)t.op_bytes, t.in_flight, (unsigned long long)t.chunk_bytes);
        bench_sample_print(p, dense ? "sweep.dense" : "sweep.round", &s, more);
    }
    (void)transport_nccl_tune(p->transports[NCCL], &all[0]);
}

void bench_sweep_peer(struct party *p, bool dense)
{
    const struct peer_tuning shipped = transport_cuda_peer_tuned(p->transports[PEER]);
    const struct peer_tuning *all = dense ? peer_casts : peer_tunings;
    for (size_t i = 0; i < (dense ? COUNT(peer_casts) : COUNT(peer_tunings)); i++) {
        char more[256];
        if (!transport_cuda_peer_tune(p->transports[PEER], i == 0 ? &shipped : &all[i]))
            continue; /* no batches: all parties have the same driver */
        struct peer_tuning t = transport_cuda_peer_tuned(p->transports[PEER]);
        struct sample s = bench_sample_take(p, PEER, dense, false);
        snprintf(more, sizeof more,
                 ", \"default\": %s, \"streams\": %u, \"batched\": %s, \"in_flight\": %u, \"group_bytes\": %llu, "
                 "\"chunk_bytes\": %llu",
                 i == 0 ? "true" : "false", t.streams, t.batched ? "true" : "false", t.in_flight,
                 (unsigned long long)t.batch_bytes, (unsigned long long)t.chunk_bytes);
        bench_sample_print(p, dense ? "sweep.dense" : "sweep.round", &s, more);
    }
    (void)transport_cuda_peer_tune(p->transports[PEER], &shipped);
}
