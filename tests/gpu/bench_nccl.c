/* Rounds over the nccl transport as a ratio to plain grouped ncclSend and ncclRecv of the same bytes between as many
 * processes in the same run; times of communicators; and what they take of the GPU's memory.
 *
 *     bench_nccl [--ranks N] [--slots N] [--slot-bytes N] [--gpus]
 *
 * Each rank (4) sends its slots (64 of 9437184 bytes) to the next one.  --gpus: rank i uses GPU i; otherwise all share
 * the first.  The floor is one group of all sends and receives on a communicator of its own, waited for by the stream;
 * floor and round take turns.  An observer looks at the memory of GPU 0.  77 without a GPU or NCCL. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/gpu_share.h"
#include "agent/memory.h"
#include "agent/nccl_library.h"
#include "agent/transport_nccl.h"
#include "common/address.h"
#include "common/clock.h"
#include "tests/gpu/bench.h"

struct options {
    uint32_t ranks, slots;
    size_t slot;
    bool gpus;
    int listeners[BENCH_PARTIES_MAX];
    struct member members[BENCH_PARTIES_MAX];
};

struct party {
    const struct options *o;
    struct bench_stage *stage;
    uint32_t self;
    char gpu[12];
    struct memory_backend *memory;
    struct transport *transport;
    struct memory_region a, b;
    struct transfer *items;
    /* the floor's */
    struct nccl_library nccl;
    struct cuda_device *device;
    ncclComm_t comm;
    CUstream stream;
};

/* ---- meetings with the observer ---- */

/* The observer reads free memory while all others wait between two meetings. */
static uint64_t observed(struct bench_stage *stage, struct cuda_device *device)
{
    bench_meet(stage);
    uint64_t bytes = device ? bench_free(device) : 0;
    bench_meet(stage);
    return bytes;
}

/* ---- the floor ---- */

static void floor_check(struct party *p, ncclResult_t result, const char *what)
{
    struct err err = {0};
    bench_must(nccl_check(&p->nccl, p->comm, result, &err, "%s", what), "floor", &err);
}

static void floor_settle(struct party *p, const char *what)
{
    ncclResult_t state = ncclInProgress;
    while (state == ncclInProgress)
        floor_check(p, p->nccl.ncclCommGetAsyncError(p->comm, &state), what);
    floor_check(p, state, what);
}

static void floor_open(struct party *p)
{
    struct err err = {0};
    ncclUniqueId id;
    struct blob *mine = NULL;
    bench_must(nccl_library_load(&p->nccl, &err), "floor", &err);
    bench_must(cuda_device_open(p->gpu, &p->device, &err), "floor", &err);
    bench_must(cuda_check(&p->device->driver, p->device->driver.cuStreamCreate(&p->stream, CU_STREAM_NON_BLOCKING),
                          &err, "make a stream"),
               "floor", &err);
    if (p->self == 0) {
        floor_check(p, p->nccl.ncclGetUniqueId(&id), "make an id");
        mine = blob_new(&id, sizeof id);
    }
    struct blob *shared = bench_share(p->stage, p->self == 0, mine);
    memcpy(&id, shared->data, sizeof id);
    blob_unref(shared);
    blob_unref(mine);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    uint64_t begin = clock_now_ns();
    ncclResult_t result = p->nccl.ncclCommInitRankConfig(&p->comm, (int)p->o->ranks, id, (int)p->self, &config);
    if (result != ncclInProgress)
        floor_check(p, result, "make a communicator");
    floor_settle(p, "make a communicator");
    uint64_t ns = bench_longest(p->stage, p->self, clock_now_ns() - begin);
    if (p->self == 0)
        bench_figure((double)ns / 1e6, "ms", "nccl.%u.init_rank_alone", p->o->ranks);
}

static uint64_t floor_run(struct party *p)
{
    const uint32_t n = p->o->ranks;
    const int next = (int)((p->self + 1) % n), before = (int)((p->self + n - 1) % n);
    struct err err = {0};
    bench_must(cuda_device_use(p->device, &err), "floor", &err);
    bench_meet(p->stage);
    uint64_t begin = clock_now_ns();
    floor_check(p, p->nccl.ncclGroupStart(), "begin a group");
    for (uint32_t i = 0; i < p->o->slots; i++) {
        char *from = (char *)p->a.base + i * p->o->slot, *to = (char *)p->b.base + i * p->o->slot;
        floor_check(p, p->nccl.ncclSend(from, p->o->slot, ncclUint8, next, p->comm, (cudaStream_t)p->stream), "send");
        floor_check(p, p->nccl.ncclRecv(to, p->o->slot, ncclUint8, before, p->comm, (cudaStream_t)p->stream),
                    "receive");
    }
    ncclResult_t result = p->nccl.ncclGroupEnd();
    if (result != ncclInProgress)
        floor_check(p, result, "launch a group");
    floor_settle(p, "launch a group");
    bench_must(cuda_check(&p->device->driver, p->device->driver.cuStreamSynchronize(p->stream), &err, "wait"), "floor",
               &err);
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}

static void floor_close(struct party *p)
{
    struct err err = {0};
    bench_must(cuda_device_use(p->device, &err), "floor", &err);
    uint64_t begin = clock_now_ns();
    p->nccl.ncclCommAbort(p->comm);
    uint64_t ns = bench_longest(p->stage, p->self, clock_now_ns() - begin);
    if (p->self == 0)
        bench_figure((double)ns / 1e6, "ms", "nccl.%u.abort", p->o->ranks);
    p->device->driver.cuStreamDestroy(p->stream);
    cuda_device_close(p->device);
}

/* ---- the transport ---- */

/* A group of the first n parties; the others only meet.  The longest time that making it took. */
static uint64_t group_make(struct party *p, uint32_t n, struct transport_group **ret_group)
{
    struct err err = {0};
    struct blob *mine = NULL;
    if (p->self == 0)
        bench_must(p->transport->group_id(p->transport, &mine, &err), "id", &err);
    struct blob *id = bench_share(p->stage, p->self == 0, mine);
    struct transport_call call = {.deadline_ns = clock_now_ns() + 120000000000u, .cancel_fd = -1};
    uint64_t begin = clock_now_ns();
    *ret_group = NULL;
    if (p->self < n)
        bench_must(p->transport->group_create(p->transport, id, p->o->members, n, p->self, &call, ret_group, &err),
                   "group", &err);
    uint64_t ns = clock_now_ns() - begin;
    blob_unref(mine);
    blob_unref(id);
    return bench_longest(p->stage, p->self, p->self < n ? ns : 0);
}

static void group_end(struct party *p, struct transport_group *group, const char *name)
{
    uint64_t begin = clock_now_ns();
    p->transport->destroy(group);
    uint64_t ns = bench_longest(p->stage, p->self, clock_now_ns() - begin);
    if (p->self == 0 && name)
        bench_figure((double)ns / 1e6, "ms", "nccl.%u.%s", p->o->ranks, name);
    struct timespec settle = {.tv_nsec = 400000000}; /* the rest of it is in the background */
    nanosleep(&settle, NULL);
}

static uint64_t move_run(struct party *p, struct transport_group *group)
{
    struct err err = {0};
    struct transport_call call = {.deadline_ns = clock_now_ns() + 120000000000u, .cancel_fd = -1};
    uint64_t bytes;
    bench_meet(p->stage);
    uint64_t begin = clock_now_ns();
    bench_must(p->transport->move(group, p->items, 2 * p->o->slots, &call, &bytes, &err), "move", &err);
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}

static void items_make(struct party *p)
{
    const uint32_t n = p->o->ranks, slots = p->o->slots;
    p->items = calloc(2 * slots, sizeof *p->items);
    for (uint32_t i = 0; i < slots; i++) {
        p->items[i] = (struct transfer){.src = p->self, .dst = (p->self + 1) % n, .n = 1};
        p->items[i].from[0] = (struct extent){&p->a, i * p->o->slot, p->o->slot};
        p->items[slots + i] = (struct transfer){.src = (p->self + n - 1) % n, .dst = p->self, .n = 1};
        p->items[slots + i].to[0] = (struct extent){&p->b, i * p->o->slot, p->o->slot};
    }
}

static void party_open(struct party *p)
{
    struct err err = {0};
    char name[24];
    snprintf(p->gpu, sizeof p->gpu, "%u", p->o->gpus ? p->self : 0);
    snprintf(name, sizeof name, "cuda:%s", p->gpu);
    if (!p->o->gpus)
        bench_must(gpu_share_host_id(&err), "NCCL_HOSTID", &err);
    bench_meet(p->stage); /* the observer has looked at what is free without us */
    p->memory = memory_open(name, &err);
    bench_must(p->memory ? 0 : -1, "memory", &err);
    p->transport = transport_nccl_open(
        &(struct transport_nccl_options){.listen_fd = p->o->listeners[p->self], .gpu = p->gpu, .keep_ms = 20000}, &err);
    bench_must(p->transport ? 0 : -1, "transport", &err);
    (void)observed(p->stage, NULL);
    bench_must(p->memory->alloc(p->memory, "a", p->o->slots * p->o->slot, &p->a, &err), "alloc", &err);
    bench_must(p->memory->alloc(p->memory, "b", p->o->slots * p->o->slot, &p->b, &err), "alloc", &err);
    (void)observed(p->stage, NULL);
    items_make(p);
}

static void figures_of_rounds(struct party *p, struct transport_group *group)
{
    struct bench_times round = {0}, floor = {0};
    for (int k = 0; k < BENCH_ROUNDS; k++) {
        uint64_t f = floor_run(p), r = move_run(p, group);
        if (k > 0) {
            bench_take(&floor, f);
            bench_take(&round, r);
        }
    }
    if (p->self != 0)
        return;
    double bytes = (double)p->o->slots * (double)p->o->slot;
    bench_figure(bytes / (double)bench_median(&floor), "GB/s", "nccl.%u.round.floor", p->o->ranks);
    bench_figure(bytes / (double)bench_median(&round), "GB/s", "nccl.%u.round", p->o->ranks);
    bench_figure(bytes / (double)bench_best(&round), "GB/s", "nccl.%u.round.best", p->o->ranks);
}

/* Made, used again, shrunk: each with its first exchange between all pairs. */
static void figures_of_groups(struct party *p)
{
    const uint32_t n = p->o->ranks;
    struct transport_group *group;
    uint64_t ns = group_make(p, n, &group);
    if (p->self == 0)
        bench_figure((double)ns / 1e6, "ms", "nccl.%u.group_made", n);
    (void)observed(p->stage, NULL);
    (void)move_run(p, group);
    (void)observed(p->stage, NULL);
    floor_open(p);
    figures_of_rounds(p, group);
    floor_close(p);
    group_end(p, group, "group_left");
    ns = group_make(p, n, &group);
    if (p->self == 0)
        bench_figure((double)ns / 1e6, "ms", "nccl.%u.group_reused", n);
    group_end(p, group, NULL);
    if (n < 3)
        return; /* nothing smaller that is a communicator */
    ns = group_make(p, n - 1, &group);
    struct transport_nccl_counts counts = transport_nccl_counts(p->transport);
    if (p->self == 0)
        bench_figure((double)ns / 1e6, "ms", "nccl.%u.group_%s_by_one", n, counts.shrunk ? "shrunk" : "made_anew");
    group_end(p, group, NULL);
}

static void party_play(struct party *p)
{
    party_open(p);
    figures_of_groups(p);
    uint64_t begin = clock_now_ns();
    p->transport->close(p->transport);
    uint64_t ns = bench_longest(p->stage, p->self, clock_now_ns() - begin);
    if (p->self == 0)
        bench_figure((double)ns / 1e6, "ms", "nccl.%u.closed", p->o->ranks);
    (void)observed(p->stage, NULL);
    free(p->items);
    p->memory->release(p->memory, &p->a);
    p->memory->release(p->memory, &p->b);
    p->memory->close(p->memory);
}

/* ---- the observer ---- */

/* Every meeting of the parties that is not an observation of its own. */
static void meet_times(struct bench_stage *stage, int n)
{
    for (int i = 0; i < n; i++)
        bench_meet(stage);
}

static void observer_play(struct bench_stage *stage, const struct options *o)
{
    enum { SHARE = 2, LONGEST = 2, MAKE = SHARE + LONGEST, MOVE = 1 + LONGEST, FLOOR = 1 + LONGEST, END = LONGEST };
    struct err err = {0};
    struct cuda_device *device;
    const double n = o->gpus ? 1 : o->ranks, mb = 1e6, weights = 2.0 * n * (double)o->slots * (double)o->slot;
    bench_must(cuda_device_open("0", &device, &err), "observer", &err);
    double before = (double)bench_free(device);
    bench_meet(stage);
    double contexts = (double)observed(stage, device);
    double regions = (double)observed(stage, device);
    meet_times(stage, MAKE);
    double made = (double)observed(stage, device);
    meet_times(stage, MOVE);
    double moved = (double)observed(stage, device);
    meet_times(stage, SHARE + LONGEST + BENCH_ROUNDS * (FLOOR + MOVE) + LONGEST); /* floor, rounds */
    meet_times(stage, END + MAKE + END);
    if (o->ranks >= 3)
        meet_times(stage, MAKE + END);
    meet_times(stage, LONGEST);
    double closed = (double)observed(stage, device);
    bench_figure((before - contexts) / n / mb, "MB", "memory.nccl.%u.context_a_process", o->ranks);
    bench_figure((contexts - regions - weights) / mb, "MB", "memory.nccl.%u.ours_above_the_weights", o->ranks);
    bench_figure((regions - made) / n / mb, "MB", "memory.nccl.%u.communicator_a_process", o->ranks);
    bench_figure((made - moved) / n / mb, "MB", "memory.nccl.%u.first_round_a_process", o->ranks);
    bench_figure((regions - closed) / n / mb, "MB", "memory.nccl.%u.left_when_closed_a_process", o->ranks);
    cuda_device_close(device);
}

static void play(struct bench_stage *stage, uint32_t self, void *user)
{
    struct party p = {.o = user, .stage = stage, .self = self};
    if (self == p.o->ranks)
        observer_play(stage, user);
    else
        party_play(&p);
}

static bool options_read(struct options *o, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        unsigned long value = i + 1 < argc ? strtoul(argv[i + 1], NULL, 10) : 0;
        if (strcmp(argv[i], "--gpus") == 0)
            o->gpus = true;
        else if (strcmp(argv[i], "--ranks") == 0 && value >= 2 && value <= BENCH_PARTIES_MAX)
            o->ranks = (uint32_t)value, i++;
        else if (strcmp(argv[i], "--slots") == 0 && value > 0 && value < 100000)
            o->slots = (uint32_t)value, i++;
        else if (strcmp(argv[i], "--slot-bytes") == 0 && value >= 8)
            o->slot = value, i++;
        else
            return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    struct options o = {.ranks = 4, .slots = 64, .slot = 9437184};
    struct nccl_library library;
    struct err err = {0};
    if (!options_read(&o, argc, argv)) {
        fprintf(stderr, "usage: bench_nccl [--ranks 2..%u] [--slots N] [--slot-bytes N] [--gpus]\n", BENCH_PARTIES_MAX);
        return 2;
    }
    if (bench_gpus() == 0)
        return BENCH_SKIPPED;
    if (nccl_library_load(&library, &err) < 0) {
        printf("no figures of NCCL: %s\n", err.text);
        return BENCH_SKIPPED;
    }
    char version[96];
    nccl_library_describe(&library, version, sizeof version);
    printf("# %s, %u ranks%s\n", version, o.ranks, o.gpus ? ", a GPU each" : " on one GPU");
    for (uint32_t i = 0; i < o.ranks; i++) {
        o.members[i].incarnation = i + 1;
        snprintf(o.members[i].id, sizeof o.members[i].id, "gpu%u", i);
        bench_must(address_listen("127.0.0.1:0", 0, &o.listeners[i], o.members[i].data_address, &err), "listen", &err);
    }
    return bench_run(o.ranks, true, play, &o) != 0;
}
