/* See bench_plain.h. */
#include "tests/gpu/bench_plain.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "agent/memory.h"
#include "common/clock.h"

#define WINDOW_BYTES (UINT64_C(256) << 20) /* read again and again: another process's weights leave little room */

static void check_cuda(struct plain *p, CUresult result, const char *what)
{
    struct err err = {0};
    bench_must(cuda_check(&p->device->driver, result, &err, "%s", what), "plain operation", &err);
}

static void check_nccl(struct plain *p, ncclComm_t comm, ncclResult_t result, const char *what)
{
    struct err err = {0};
    bench_must(nccl_check(&p->nccl, comm, result, &err, "%s", what), "plain operation", &err);
}

static void settle(struct plain *p, ncclComm_t comm, const char *what)
{
    ncclResult_t state = ncclInProgress;
    while (state == ncclInProgress)
        check_nccl(p, comm, p->nccl.ncclCommGetAsyncError(comm, &state), what);
    check_nccl(p, comm, state, what);
}

static void use(struct plain *p)
{
    struct err err = {0};
    bench_must(cuda_device_use(p->device, &err), "plain operation", &err);
}

void plain_open(struct plain *p, struct bench_stage *stage, uint32_t self, const char *gpu)
{
    struct err err = {0};
    *p = (struct plain){.stage = stage, .self = self};
    bench_must(nccl_library_load(&p->nccl, &err), "NCCL", &err);
    void *symbol = dlsym(p->nccl.handle, "ncclBroadcast");
    memcpy(&p->broadcast, &symbol, sizeof symbol); /* C has no cast from an object to a function */
    bench_must(symbol ? 0 : err_set(&err, ERR_UNSUPPORTED, "libnccl has no ncclBroadcast"), "NCCL", &err);
    bench_must(cuda_device_open(gpu, &p->device, &err), "GPU", &err);
    for (uint32_t i = 0; i < BENCH_PARTIES_MAX; i++)
        check_cuda(p, p->device->driver.cuStreamCreate(&p->streams[i], CU_STREAM_NON_BLOCKING), "make a stream");
}

void plain_close(struct plain *p)
{
    use(p);
    for (uint32_t i = 0; i < BENCH_PARTIES_MAX; i++)
        p->device->driver.cuStreamDestroy(p->streams[i]);
    for (uint32_t i = 0; i < BENCH_PARTIES_MAX; i++) {
        struct plain_window *w = &p->windows[i];
        if (!w->memory)
            continue;
        cuda_unmap(p->device, w->at, w->region.mapped);
        w->memory->release(w->memory, &w->region);
        w->memory->close(w->memory);
    }
    cuda_device_close(p->device);
}

/* ---- NCCL ---- */

uint64_t plain_communicator(struct plain *p, const uint32_t *ranks, uint32_t n, ncclComm_t *ret_comm)
{
    ncclUniqueId id;
    struct blob *mine = NULL;
    uint32_t rank = 0;
    while (rank < n && ranks[rank] != p->self)
        rank++;
    use(p);
    if (rank == 0) {
        check_nccl(p, NULL, p->nccl.ncclGetUniqueId(&id), "make an id");
        mine = blob_new(&id, sizeof id);
    }
    struct blob *shared = bench_share(p->stage, rank == 0, mine);
    memcpy(&id, shared->data, sizeof id);
    blob_unref(shared);
    blob_unref(mine);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    *ret_comm = NULL;
    uint64_t begin = clock_now_ns();
    if (rank < n) {
        check_nccl(p, NULL, p->nccl.ncclCommInitRankConfig(ret_comm, (int)n, id, (int)rank, &config),
                   "make a communicator");
        settle(p, *ret_comm, "make a communicator");
    }
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}

uint64_t plain_abort(struct plain *p, ncclComm_t comm)
{
    use(p);
    uint64_t begin = clock_now_ns();
    if (comm)
        p->nccl.ncclCommAbort(comm);
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}

static void send_or_receive(struct plain *p, ncclComm_t comm, bool send, void *at, uint64_t len, uint32_t peer)
{
    cudaStream_t stream = (cudaStream_t)p->streams[0];
    check_nccl(p, comm,
               send ? p->nccl.ncclSend(at, len, ncclUint8, (int)peer, comm, stream)
                    : p->nccl.ncclRecv(at, len, ncclUint8, (int)peer, comm, stream),
               send ? "send" : "receive");
}

static void group_end(struct plain *p, ncclComm_t comm)
{
    check_nccl(p, comm, p->nccl.ncclGroupEnd(), "launch a group");
    settle(p, comm, "launch a group");
}

/* The end of a group of operations, and the time since begin. */
static uint64_t launch(struct plain *p, ncclComm_t comm, uint64_t begin)
{
    if (comm) {
        group_end(p, comm);
        check_cuda(p, p->device->driver.cuStreamSynchronize(p->streams[0]), "wait for a group");
    }
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}

static uint64_t start(struct plain *p, ncclComm_t comm)
{
    use(p);
    bench_meet(p->stage);
    uint64_t begin = clock_now_ns();
    if (comm)
        check_nccl(p, comm, p->nccl.ncclGroupStart(), "begin a group");
    return begin;
}

uint64_t plain_group(struct plain *p, ncclComm_t comm, uint32_t senders, void *region, uint64_t bytes)
{
    const uint64_t part = bytes / senders / 8 * 8;
    uint64_t begin = start(p, comm);
    uint32_t pairs = senders * (p->stage->parties - senders), ops = 0;
    for (uint64_t at = 0; at < part; at += PLAIN_OP_BYTES) {
        const uint64_t len = part - at < PLAIN_OP_BYTES ? part - at : PLAIN_OP_BYTES;
        if (ops + pairs > PLAIN_GROUP_OPS && ops > 0) {
            group_end(p, comm);
            check_nccl(p, comm, p->nccl.ncclGroupStart(), "begin a group");
            ops = 0;
        }
        ops += pairs;
        for (uint32_t i = 0; i < senders; i++)
            for (uint32_t r = senders; r < p->stage->parties; r++)
                if (i == p->self || r == p->self)
                    send_or_receive(p, comm, i == p->self, (char *)region + i * part + at, len, i == p->self ? r : i);
    }
    return launch(p, comm, begin);
}

uint64_t plain_exchange(struct plain *p, ncclComm_t comm, uint32_t n, void *region)
{
    uint64_t begin = start(p, comm);
    for (uint32_t i = 0; i < n && p->self < n; i++)
        if (i != p->self) {
            send_or_receive(p, comm, true, (char *)region, 8, i);
            send_or_receive(p, comm, false, (char *)region + 8 + (size_t)8 * i, 8, i);
        }
    return launch(p, comm, begin);
}

uint64_t plain_broadcast(struct plain *p, ncclComm_t comm, void *region, uint64_t bytes)
{
    uint64_t begin = start(p, comm);
    if (comm)
        check_nccl(p, comm, p->broadcast(region, region, bytes, ncclUint8, 0, comm, (cudaStream_t)p->streams[0]),
                   "broadcast");
    return launch(p, comm, begin);
}

/* ---- copies ---- */

void plain_windows_open(struct plain *p, uint32_t senders, uint64_t bytes, uint32_t gpus)
{
    struct err err = {0};
    const uint64_t part = bytes / senders;
    for (uint32_t i = 0; i < senders && p->self >= senders; i++) {
        struct plain_window *w = &p->windows[i];
        char name[24];
        snprintf(name, sizeof name, "cuda:%u", i % gpus);
        w->memory = memory_open(name, &err);
        bench_must(w->memory ? 0 : -1, "a sender's GPU", &err);
        bench_must(w->memory->alloc(w->memory, "window", part < WINDOW_BYTES ? part : WINDOW_BYTES, &w->region, &err),
                   "a sender's GPU", &err);
        use(p);
        bench_must(cuda_import(p->device, w->region.fd, w->region.mapped, false, &w->at, &err), "a sender's GPU", &err);
    }
    bench_meet(p->stage);
}

uint64_t plain_copies(struct plain *p, uint32_t senders, void *region, uint64_t bytes)
{
    const struct cuda_driver *cu = &p->device->driver;
    const uint64_t part = bytes / senders / 8 * 8;
    use(p);
    bench_meet(p->stage);
    uint64_t begin = clock_now_ns();
    for (uint64_t at = 0; at < part && p->self >= senders;) {
        const uint64_t window = p->windows[0].region.bytes, len = part - at < window ? part - at : window;
        for (uint32_t i = 0; i < senders; i++)
            check_cuda(p,
                       cu->cuMemcpyDtoDAsync((CUdeviceptr)(uintptr_t)region + i * part + at, p->windows[i].at, len,
                                             p->streams[i]),
                       "copy");
        at += len;
    }
    for (uint32_t i = 0; i < senders && p->self >= senders; i++)
        check_cuda(p, cu->cuStreamSynchronize(p->streams[i]), "wait for copies");
    return bench_longest(p->stage, p->self, clock_now_ns() - begin);
}
