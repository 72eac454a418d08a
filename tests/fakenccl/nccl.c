/* An NCCL on sockets, for tests on the CUDA driver of tests/fakecuda: only what agent/nccl_library.h looks
 * up, and ncclBroadcast, which benchmarks compare with.
 *
 * Built as fakecuda/libnccl.so.2 of the build folder, beside the driver that it needs.  It behaves like the real one in
 * what the transport has to cope with: communicators are made in the background and for ever if a rank does not come,
 * transfers are operations of a stream that hang when their peer does, and end with ncclRemoteError when it is dead; an
 * abort gets out of everything.  Two ranks on one GPU must have different NCCL_HOSTIDs.
 *
 * A communicator's ranks listen at abstract unix sockets named after the unique id; the higher rank of a pair connects.
 * A group of sends and receives becomes: copies to pinned host memory, one host function that runs all sockets, copies
 * back.
 *
 * Environment: FAKENCCL_SHRINK=fail: ncclCommShrink fails; =half: it fails at odd ranks only; =none: there is no shrink
 * (it answers ncclInvalidUsage).  Any thread, but one communicator is used by one thread at a time. */
#include <cuda.h>
#include <errno.h>
#include <fcntl.h>
#include <nccl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define RANKS   64
#define POLL_MS 5 /* between two looks whether there is an abort */

struct hello {
    int rank;
    char host[64];
    CUuuid gpu;
};

struct ncclComm {
    int n, rank;
    char name[80]; /* "fakenccl-<id>" */
    struct hello self;
    int fds[RANKS]; /* -1: self, or not there yet */
    pthread_t init;
    atomic_int state; /* ncclResult_t */
    atomic_bool abort;
    unsigned children;
    struct launch *launches;
    CUstream stream; /* of the last launch */
    char last[128];
};

/* ---- making a communicator ---- */

static struct sockaddr_un rank_name(const struct ncclComm *c, int rank, socklen_t *ret_len)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int n = snprintf(a.sun_path + 1, sizeof a.sun_path - 1, "%s-%d", c->name, rank);
    *ret_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
    return a;
}

static void comm_end(struct ncclComm *c, ncclResult_t result, const char *why)
{
    snprintf(c->last, sizeof c->last, "%s", why);
    atomic_store(&c->state, result);
}

/* All of it, or false: the other end closed, or abort. */
static bool all_io(struct ncclComm *c, int fd, void *data, size_t len, bool out)
{
    for (size_t at = 0; at < len && !atomic_load(&c->abort);) {
        struct pollfd p = {.fd = fd, .events = out ? POLLOUT : POLLIN};
        if (poll(&p, 1, POLL_MS) <= 0)
            continue;
        ssize_t n = out ? send(fd, (char *)data + at, len - at, MSG_NOSIGNAL | MSG_DONTWAIT)
                        : recv(fd, (char *)data + at, len - at, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
            return false;
        at += n > 0 ? (size_t)n : 0;
    }
    return !atomic_load(&c->abort);
}

static bool pair_greet(struct ncclComm *c, int fd)
{
    struct hello other;
    if (!all_io(c, fd, &c->self, sizeof c->self, true) || !all_io(c, fd, &other, sizeof other, false) ||
        other.rank < 0 || other.rank >= c->n || c->fds[other.rank] >= 0) {
        close(fd);
        return false;
    }
    c->fds[other.rank] = fd;
    if (strcmp(other.host, c->self.host) == 0 && memcmp(&other.gpu, &c->self.gpu, sizeof other.gpu) == 0)
        comm_end(c, ncclInvalidUsage, "Duplicate GPU detected : two ranks on one device");
    return true;
}

static void *comm_init(void *arg)
{
    struct ncclComm *c = arg;
    socklen_t len;
    struct sockaddr_un a = rank_name(c, c->rank, &len);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), up = 1;
    if (listener < 0 || bind(listener, (struct sockaddr *)&a, len) < 0 || listen(listener, RANKS) < 0)
        comm_end(c, ncclSystemError, "cannot listen");
    for (int peer = 0; peer < c->rank; peer++) {
        a = rank_name(c, peer, &len);
        while (!atomic_load(&c->abort) && atomic_load(&c->state) == ncclInProgress) {
            int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (connect(fd, (struct sockaddr *)&a, len) == 0) {
                up += pair_greet(c, fd);
                break;
            }
            close(fd);
            poll(NULL, 0, 1);
        }
    }
    while (up < c->n && !atomic_load(&c->abort) && atomic_load(&c->state) == ncclInProgress) {
        struct pollfd p = {.fd = listener, .events = POLLIN};
        int fd = poll(&p, 1, POLL_MS) > 0 ? accept4(listener, NULL, NULL, SOCK_CLOEXEC) : -1;
        up += fd >= 0 && pair_greet(c, fd);
    }
    if (listener >= 0)
        close(listener);
    if (up == c->n && atomic_load(&c->state) == ncclInProgress)
        atomic_store(&c->state, ncclSuccess);
    return NULL;
}

static ncclResult_t comm_new(int n, int rank, const char *name, const struct hello *who, ncclComm_t *ret_comm)
{
    struct ncclComm *c = calloc(1, sizeof *c);
    if (!c || n > RANKS || rank < 0 || rank >= n) {
        free(c);
        return ncclInvalidArgument;
    }
    c->n = n;
    c->rank = rank;
    c->self = *who;
    c->self.rank = rank;
    snprintf(c->name, sizeof c->name, "%s", name);
    for (int i = 0; i < RANKS; i++)
        c->fds[i] = -1;
    atomic_store(&c->state, ncclInProgress);
    if (pthread_create(&c->init, NULL, comm_init, c) != 0) {
        free(c);
        return ncclSystemError;
    }
    *ret_comm = c;
    return ncclInProgress;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *uniqueId)
{
    memset(uniqueId, 0, sizeof *uniqueId);
    return getrandom(uniqueId, 16, 0) == 16 ? ncclSuccess : ncclSystemError;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int nranks, ncclUniqueId commId, int rank, ncclConfig_t *config)
{
    struct hello who = {0};
    const char *host = getenv("NCCL_HOSTID");
    char name[80] = "fakenccl-";
    CUdevice device;
    (void)config;
    if (cuCtxGetDevice(&device) != CUDA_SUCCESS || cuDeviceGetUuid(&who.gpu, device) != CUDA_SUCCESS)
        return ncclUnhandledCudaError;
    snprintf(who.host, sizeof who.host, "%s", host ? host : "here");
    for (int i = 0; i < 16; i++)
        snprintf(name + strlen(name), sizeof name - strlen(name), "%02x", (unsigned char)commId.internal[i]);
    return comm_new(nranks, rank, name, &who, comm);
}

ncclResult_t ncclCommShrink(ncclComm_t comm, int *excludeRanksList, int excludeRanksCount, ncclComm_t *newcomm,
                            ncclConfig_t *config, int shrinkFlags)
{
    const char *how = getenv("FAKENCCL_SHRINK");
    char name[80];
    int rank = comm->rank;
    (void)config, (void)shrinkFlags;
    *newcomm = NULL;
    if (how && strcmp(how, "none") == 0)
        return ncclInvalidUsage;
    if (how && (strcmp(how, "fail") == 0 || comm->rank % 2 == 1))
        return ncclInternalError;
    for (int i = 0; i < excludeRanksCount; i++)
        rank -= excludeRanksList[i] < comm->rank;
    snprintf(name, sizeof name, "%.60s.%u", comm->name, ++comm->children);
    return comm_new(comm->n - excludeRanksCount, rank, name, &comm->self, newcomm);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *asyncError)
{
    *asyncError = (ncclResult_t)atomic_load(&comm->state);
    return ncclSuccess;
}

/* ---- sends and receives ---- */

struct op {
    bool send;
    int peer;
    CUdeviceptr at;
    size_t len, done;
    char *stage; /* pinned */
};
struct launch {
    struct launch *next;
    struct ncclComm *comm;
    struct op *ops;
    size_t n;
    CUevent over;
};

static _Thread_local struct {
    int depth;
    struct ncclComm *comm;
    CUstream stream;
    struct op *ops;
    size_t n;
} group;

/* The first operation of each pair and direction that is not done; the others follow in order. */
static size_t launch_poll(struct launch *l, struct pollfd *polls, struct op **ops)
{
    size_t k = 0;
    for (int peer = 0; peer < l->comm->n; peer++)
        for (int send = 0; send < 2; send++)
            for (size_t i = 0; i < l->n; i++) {
                struct op *op = &l->ops[i];
                if (op->peer != peer || op->send != (send == 1) || op->done == op->len)
                    continue;
                ops[k] = op;
                polls[k++] = (struct pollfd){.fd = l->comm->fds[peer], .events = send ? POLLOUT : POLLIN};
                break;
            }
    return k;
}

static void launch_run(void *user)
{
    struct launch *l = user;
    struct pollfd polls[2 * RANKS];
    struct op *ops[2 * RANKS];
    size_t n;
    while ((n = launch_poll(l, polls, ops)) > 0 && !atomic_load(&l->comm->abort) &&
           atomic_load(&l->comm->state) == ncclSuccess) {
        if (poll(polls, n, POLL_MS) <= 0)
            continue;
        for (size_t i = 0; i < n; i++) {
            if (polls[i].revents == 0)
                continue;
            struct op *op = ops[i];
            char *at = op->stage + op->done;
            ssize_t got = op->send ? send(polls[i].fd, at, op->len - op->done, MSG_NOSIGNAL | MSG_DONTWAIT)
                                   : recv(polls[i].fd, at, op->len - op->done, MSG_DONTWAIT);
            if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
                comm_end(l->comm, ncclRemoteError, "Connection closed by remote peer");
            op->done += got > 0 ? (size_t)got : 0;
        }
    }
}

static void launch_free(struct launch *l)
{
    for (size_t i = 0; i < l->n; i++)
        if (l->ops[i].stage)
            cuMemFreeHost(l->ops[i].stage);
    if (l->over)
        cuEventDestroy(l->over);
    free(l->ops);
    free(l);
}

static void launches_reap(struct ncclComm *c, bool all)
{
    for (struct launch **at = &c->launches; *at;) {
        struct launch *l = *at;
        if (!all && cuEventQuery(l->over) == CUDA_ERROR_NOT_READY) {
            at = &l->next;
            continue;
        }
        *at = l->next;
        launch_free(l);
    }
}

static bool launch_queue(struct launch *l, CUstream stream)
{
    bool well = cuEventCreate(&l->over, CU_EVENT_DISABLE_TIMING) == CUDA_SUCCESS;
    for (size_t i = 0; i < l->n && well; i++) {
        struct op *op = &l->ops[i];
        well = cuMemHostAlloc((void **)&op->stage, op->len, 0) == CUDA_SUCCESS;
        if (well && op->send)
            well = cuMemcpyDtoHAsync(op->stage, op->at, op->len, stream) == CUDA_SUCCESS;
    }
    well = well && cuLaunchHostFunc(stream, launch_run, l) == CUDA_SUCCESS;
    for (size_t i = 0; i < l->n && well; i++)
        if (!l->ops[i].send)
            well = cuMemcpyHtoDAsync(l->ops[i].at, l->ops[i].stage, l->ops[i].len, stream) == CUDA_SUCCESS;
    return well && cuEventRecord(l->over, stream) == CUDA_SUCCESS;
}

/* nccl.h declares them without prototypes */
ncclResult_t ncclGroupStart(void);
ncclResult_t ncclGroupEnd(void);

ncclResult_t ncclGroupStart(void)
{
    group.depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void)
{
    if (--group.depth > 0 || group.n == 0)
        return ncclSuccess;
    struct launch *l = calloc(1, sizeof *l);
    if (!l)
        abort();
    struct ncclComm *c = group.comm;
    *l = (struct launch){.next = c->launches, .comm = c, .ops = group.ops, .n = group.n};
    launches_reap(c, false);
    l->next = c->launches;
    c->launches = l;
    c->stream = group.stream;
    group.ops = NULL;
    group.n = 0;
    return launch_queue(l, c->stream) ? ncclSuccess : ncclUnhandledCudaError;
}

static ncclResult_t op_add(struct ncclComm *c, const void *at, size_t len, int peer, bool send, cudaStream_t stream)
{
    struct op *ops = realloc(group.ops, (group.n + 1) * sizeof *ops);
    if (!ops)
        abort();
    group.ops = ops;
    if (group.depth == 0 || peer < 0 || peer >= c->n || peer == c->rank)
        return ncclInvalidUsage;
    group.comm = c;
    group.stream = (CUstream)stream;
    if (len > 0)
        ops[group.n++] = (struct op){.send = send, .peer = peer, .at = (CUdeviceptr)(uintptr_t)at, .len = len};
    return ncclSuccess;
}

ncclResult_t ncclSend(const void *sendbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    (void)datatype; /* bytes */
    return op_add(comm, sendbuff, count, peer, true, stream);
}

ncclResult_t ncclRecv(void *recvbuff, size_t count, ncclDataType_t datatype, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    (void)datatype;
    return op_add(comm, recvbuff, count, peer, false, stream);
}

/* From the root to each of the others; in place there. */
ncclResult_t ncclBroadcast(const void *sendbuff, void *recvbuff, size_t count, ncclDataType_t datatype, int root,
                           ncclComm_t comm, cudaStream_t stream)
{
    ncclResult_t result = ncclGroupStart();
    if (comm->rank != root)
        result = ncclRecv(recvbuff, count, datatype, root, comm, stream);
    else if (sendbuff != recvbuff)
        result = ncclInvalidArgument;
    for (int i = 0; i < comm->n && comm->rank == root && result == ncclSuccess; i++)
        if (i != root)
            result = ncclSend(sendbuff, count, datatype, i, comm, stream);
    ncclResult_t end = ncclGroupEnd();
    return result == ncclSuccess ? end : result;
}

/* ---- the rest ---- */

ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    atomic_store(&comm->abort, true);
    pthread_join(comm->init, NULL);
    if (comm->launches)
        cuStreamSynchronize(comm->stream);
    launches_reap(comm, true);
    for (int i = 0; i < comm->n; i++)
        if (comm->fds[i] >= 0)
            close(comm->fds[i]);
    free(comm);
    return ncclSuccess;
}

ncclResult_t ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    return result == ncclRemoteError    ? "remote process exited or there was a network error"
           : result == ncclInvalidUsage ? "invalid usage"
                                        : "internal error";
}

const char *ncclGetLastError(ncclComm_t comm)
{
    return comm ? comm->last : "";
}
