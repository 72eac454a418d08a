/* Moves by cuda_peer and digests, each as a ratio to a plain copy of the same bytes in the same run, and what a process
 * takes of the GPU's memory.
 *
 *     bench_peer [SLOTS [SLOT_BYTES [GPU]]]   (256 slots of 9437184 bytes; GPU: index of the receiver's, 0 like the
 *                                              sender's)
 *
 * Two parties, the sender on GPU 0, and an observer that looks at the receiver's memory.  The floor of a move is one
 * copy of all its bytes by the receiver alone, from memory of GPU 0 that it maps; floor and move take turns.  Each way
 * of giving copies to the driver is measured.  77 without a GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/gpu_share.h"
#include "agent/memory.h"
#include "agent/transport_gpu.h"
#include "common/clock.h"
#include "tests/gpu/bench.h"

struct options {
    uint32_t slots;
    size_t slot;
    char sender[24], receiver[24]; /* "cuda:0" */
};

struct party {
    const struct options *o;
    struct bench_stage *stage;
    uint32_t self;
    struct memory_backend *memory;
    struct transport *transport;
    struct memory_region a, b; /* read from, written to */
    struct transfer *items;
};

static const struct {
    const char *name;
    struct peer_tuning tuning;
} ways[] = {
    {"single_1", {.streams = 1, .batched = false}}, {"single_4", {.streams = 4, .batched = false}},
    {"single_8", {.streams = 8, .batched = false}}, {"batch_1", {.streams = 1, .batched = true}},
    {"batch_4", {.streams = 4, .batched = true}},   {"batch_8", {.streams = 8, .batched = true}},
};

static double gbps(uint64_t bytes, uint64_t ns)
{
    return (double)bytes / (double)ns;
}

/* ---- floors ---- */

struct floor {
    struct cuda_device *device;
    struct memory_backend *source;
    struct memory_region region;
    CUdeviceptr at;
    CUstream stream;
};

/* Memory of the sender's GPU, mapped for the receiver's: what any copy between the two reads. */
static void floor_open(struct floor *f, const struct party *p)
{
    struct err err = {0};
    bench_must(cuda_device_open(p->o->receiver + 5, &f->device, &err), "floor", &err);
    f->source = memory_open(p->o->sender, &err);
    bench_must(f->source ? 0 : -1, "floor", &err);
    bench_must(f->source->alloc(f->source, "floor", p->o->slots * p->o->slot, &f->region, &err), "floor", &err);
    bench_must(cuda_device_use(f->device, &err), "floor", &err);
    bench_must(cuda_import(f->device, f->region.fd, f->region.mapped, false, &f->at, &err), "floor", &err);
    bench_must(cuda_check(&f->device->driver, f->device->driver.cuStreamCreate(&f->stream, CU_STREAM_NON_BLOCKING),
                          &err, "make a stream"),
               "floor", &err);
}

static uint64_t floor_run(struct floor *f, const struct party *p)
{
    const struct cuda_driver *cu = &f->device->driver;
    struct err err = {0};
    bench_must(cuda_device_use(f->device, &err), "floor", &err);
    uint64_t begin = clock_now_ns();
    CUresult rc = cu->cuMemcpyDtoDAsync((CUdeviceptr)(uintptr_t)p->b.base, f->at, p->b.bytes, f->stream);
    if (rc == CUDA_SUCCESS)
        rc = cu->cuStreamSynchronize(f->stream);
    uint64_t ns = clock_now_ns() - begin;
    bench_must(cuda_check(cu, rc, &err, "copy"), "floor", &err);
    return ns;
}

static void floor_close(struct floor *f)
{
    struct err err = {0};
    bench_must(cuda_device_use(f->device, &err), "floor", &err);
    cuda_unmap(f->device, f->at, f->region.mapped);
    f->device->driver.cuStreamDestroy(f->stream);
    f->source->release(f->source, &f->region);
    f->source->close(f->source);
    cuda_device_close(f->device);
}

/* ---- moves ---- */

static void items_make(struct party *p)
{
    uint32_t n = p->o->slots;
    size_t slot = p->o->slot, third = slot / 24 * 8;
    p->items = calloc(n, sizeof *p->items);
    for (uint32_t i = 0; i < n; i++) {
        size_t place = (size_t)(i * 7u % n) * slot, at = 0;
        p->items[i] = (struct transfer){.src = 0, .dst = 1, .n = 3};
        for (int k = 0; k < 3; k++) {
            size_t len = k < 2 ? third : slot - at;
            p->items[i].from[k] = (struct extent){&p->a, i * slot + at, len};
            p->items[i].to[k] = (struct extent){&p->b, place + at, len};
            at += len;
        }
    }
}

static uint64_t move_run(struct party *p, struct transport_group *group)
{
    struct err err = {0};
    struct transport_call call = {.deadline_ns = clock_now_ns() + 60000000000u, .cancel_fd = -1};
    uint64_t bytes;
    bench_meet(p->stage);
    uint64_t begin = clock_now_ns();
    bench_must(p->transport->move(group, p->items, p->o->slots, &call, &bytes, &err), "move", &err);
    return clock_now_ns() - begin;
}

static void moves(struct party *p, struct transport_group *group, struct floor *f)
{
    const uint64_t bytes = (uint64_t)p->o->slots * p->o->slot;
    const char *where = strcmp(p->o->sender, p->o->receiver) == 0 ? "same_gpu" : "two_gpus";
    for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++) {
        struct bench_times move = {0}, copy = {0};
        bool there = transport_cuda_peer_tune(p->transport, &ways[w].tuning);
        if (!there)
            continue; /* both parties have the same driver */
        for (int k = 0; k < BENCH_ROUNDS; k++) {
            bench_meet(p->stage);
            if (p->self == 1)
                bench_take(&copy, floor_run(f, p));
            uint64_t ns = move_run(p, group);
            if (k > 0) /* regions are mapped in the first one */
                bench_take(&move, ns);
        }
        if (p->self == 0)
            continue;
        bench_figure(gbps(bytes, bench_best(&copy)), "GB/s", "peer.%s.%zu.%s.floor", where, p->o->slot, ways[w].name);
        bench_figure(gbps(bytes, bench_best(&move)), "GB/s", "peer.%s.%zu.%s", where, p->o->slot, ways[w].name);
        bench_figure(gbps(bytes, bench_median(&move)), "GB/s", "peer.%s.%zu.%s.median", where, p->o->slot,
                     ways[w].name);
    }
}

/* ---- digests ---- */

static void digests(struct party *p, struct floor *f)
{
    struct memory_backend *m = p->memory;
    struct bench_times all = {0}, many = {0}, single = {0}, copy = {0};
    struct memory_range *ranges = calloc(p->o->slots, sizeof *ranges);
    uint64_t *sums = calloc(p->o->slots, sizeof *sums), sum, bytes = p->b.bytes;
    struct err err = {0};
    for (uint32_t i = 0; i < p->o->slots; i++)
        ranges[i] = (struct memory_range){&p->b, i * p->o->slot, p->o->slot, 0};
    for (int k = 0; k < BENCH_ROUNDS; k++) {
        uint64_t t0 = clock_now_ns();
        bench_must(m->digest(m, &p->b, 0, p->b.bytes, 0, &sum, &err), "digest", &err);
        uint64_t t1 = clock_now_ns();
        bench_must(m->digests(m, ranges, p->o->slots, sums, &err), "digests", &err);
        uint64_t t2 = clock_now_ns();
        for (uint32_t i = 0; i < p->o->slots; i++)
            bench_must(m->digest(m, &p->b, ranges[i].offset, ranges[i].len, 0, &sum, &err), "digest", &err);
        uint64_t t3 = clock_now_ns();
        bench_take(&all, t1 - t0);
        bench_take(&many, t2 - t1);
        bench_take(&single, t3 - t2);
        bench_take(&copy, floor_run(f, p));
    }
    free(ranges);
    free(sums);
    bench_figure(2 * gbps(bytes, bench_best(&copy)), "GB/s", "digest.%zu.floor", p->o->slot); /* read and written */
    bench_figure(gbps(bytes, bench_best(&all)), "GB/s", "digest.%zu.all_at_once", p->o->slot);
    bench_figure(gbps(bytes, bench_best(&many)), "GB/s", "digest.%zu.slots_in_one_go", p->o->slot);
    bench_figure(gbps(bytes, bench_best(&single)), "GB/s", "digest.%zu.slot_by_slot", p->o->slot);
}

/* ---- parties ---- */

static void party_regions(struct party *p)
{
    struct err err = {0};
    const char *name = p->self == 0 ? p->o->sender : p->o->receiver;
    bench_meet(p->stage); /* the observer has looked at what is free without us */
    p->memory = memory_open(name, &err);
    bench_must(p->memory ? 0 : -1, "memory", &err);
    bench_meet(p->stage);
    bench_meet(p->stage); /* the observer looks between two meetings */
    bench_must(p->memory->alloc(p->memory, "a", p->o->slots * p->o->slot, &p->a, &err), "alloc", &err);
    bench_must(p->memory->alloc(p->memory, "b", p->o->slots * p->o->slot, &p->b, &err), "alloc", &err);
    bench_meet(p->stage);
    bench_meet(p->stage);
    items_make(p);
}

static void party_play(struct party *p)
{
    struct err err = {0};
    struct member members[] = {{.id = "a", .incarnation = 1}, {.id = "b", .incarnation = 2}};
    struct floor floor = {0};
    struct transport_group *group;
    struct blob *id = NULL;
    party_regions(p);
    p->transport = transport_cuda_peer_open((p->self == 0 ? p->o->sender : p->o->receiver) + 5, &err);
    bench_must(p->transport ? 0 : -1, "transport", &err);
    if (p->self == 0)
        bench_must(p->transport->group_id(p->transport, &id, &err), "id", &err);
    struct blob *shared = bench_share(p->stage, p->self == 0, id);
    struct transport_call call = {.deadline_ns = clock_now_ns() + 30000000000u, .cancel_fd = -1};
    uint64_t begin = clock_now_ns();
    bench_must(p->transport->group_create(p->transport, shared, members, 2, p->self, &call, &group, &err), "group",
               &err);
    if (p->self == 1)
        bench_figure((double)(clock_now_ns() - begin) / 1e6, "ms", "peer.group_created");
    (void)move_run(p, group); /* maps the regions */
    bench_meet(p->stage);
    bench_meet(p->stage);
    if (p->self == 1)
        floor_open(&floor, p);
    moves(p, group, &floor);
    bench_meet(p->stage);
    p->transport->destroy(group);
    if (p->self == 1) {
        digests(p, &floor);
        floor_close(&floor);
    }
    bench_meet(p->stage);
    blob_unref(id);
    blob_unref(shared);
    free(p->items);
    p->memory->release(p->memory, &p->a);
    p->memory->release(p->memory, &p->b);
    p->transport->close(p->transport);
    p->memory->close(p->memory);
}

/* Free memory of the receiver's GPU at the meetings of the others. */
static void observer_play(struct bench_stage *stage, const struct options *o)
{
    struct err err = {0};
    struct cuda_device *device;
    bool same = strcmp(o->sender, o->receiver) == 0;
    double n = same ? 2 : 1, mb = 1e6;
    bench_must(cuda_device_open(o->receiver + 5, &device, &err), "observer", &err);
    uint64_t free_0 = bench_free(device);
    bench_meet(stage);
    bench_meet(stage);
    uint64_t free_1 = bench_free(device);
    bench_meet(stage);
    bench_meet(stage);
    uint64_t free_2 = bench_free(device);
    bench_meet(stage);
    blob_unref(bench_share(stage, false, NULL));
    bench_meet(stage); /* the first move */
    bench_meet(stage);
    uint64_t free_3 = bench_free(device);
    bench_meet(stage);
    double weights = 2.0 * n * (double)o->slots * (double)o->slot;
    bench_figure(((double)free_0 - (double)free_1) / n / mb, "MB", "memory.context_and_backend_a_process");
    bench_figure(((double)free_1 - (double)free_2 - weights) / mb, "MB", "memory.ours_above_the_weights");
    bench_figure(((double)free_2 - (double)free_3) / n / mb, "MB", "memory.peer_group_a_process");
    for (size_t w = 0; w < sizeof ways / sizeof ways[0]; w++) {
        struct transport *probe = transport_cuda_peer_open(o->receiver + 5, &err);
        bench_must(probe ? 0 : -1, "observer", &err);
        bool there = transport_cuda_peer_tune(probe, &ways[w].tuning);
        probe->close(probe);
        for (int k = 0; k < 2 * BENCH_ROUNDS && there; k++)
            bench_meet(stage);
    }
    bench_meet(stage);
    bench_meet(stage);
    cuda_device_close(device);
}

static void play(struct bench_stage *stage, uint32_t self, void *user)
{
    struct party p = {.o = user, .stage = stage, .self = self};
    if (self == 2)
        observer_play(stage, user);
    else
        party_play(&p);
}

int main(int argc, char **argv)
{
    struct options o = {
        .slots = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 256,
        .slot = argc > 2 ? strtoul(argv[2], NULL, 10) : 9437184,
        .sender = "cuda:0",
    };
    snprintf(o.receiver, sizeof o.receiver, "cuda:%.10s", argc > 3 ? argv[3] : "0");
    if (o.slots == 0 || o.slot < 24 || o.slot % 8 != 0) {
        fprintf(stderr, "usage: bench_peer [SLOTS [SLOT_BYTES [GPU]]]: slots of a multiple of 8 bytes\n");
        return 2;
    }
    if (bench_gpus() == 0)
        return BENCH_SKIPPED;
    return bench_run(2, true, play, &o) != 0;
}
