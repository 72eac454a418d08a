/* The copies of the transport over GPU memory: batches of asynchronous copies over a few streams.  Worker thread. */
#include <stdlib.h>

#include "agent/transport_cuda_peer_internal.h"

#define NEIGHBOURS_MAX ((size_t)64 << 20) /* a longer copy gains nothing, and is cut again */

int peer_copies_add(struct copies *copies, CUdeviceptr dst, CUdeviceptr src, size_t len, struct err *err)
{
    struct copy *last = copies->n > copies->at ? &copies->v[copies->n - 1] : NULL;
    if (len == 0)
        return 0;
    if (last && last->dst + last->len == dst && last->src + last->len == src && last->len < NEIGHBOURS_MAX) {
        last->len += len; /* neighbours on both sides */
        return 0;
    }
    if (copies->n == copies->cap) {
        size_t cap = copies->cap ? copies->cap * 2 : 64;
        struct copy *v = realloc(copies->v, cap * sizeof *v);
        if (!v)
            return err_set(err, ERR_NOMEM, "out of memory");
        copies->v = v;
        copies->cap = cap;
    }
    copies->v[copies->n++] = (struct copy){dst, src, len};
    return 0;
}

/* One batch of this party's copies.  A large copy is cut, so that none keeps the others waiting for long. */
static int batch_start(struct peer_group *g, uint32_t peer, struct err *err)
{
    const struct cuda_driver *cu = &g->transport->device->driver;
    struct copies *copies = &g->links[peer].copies;
    struct batch *batch = &g->batches[(g->first_batch + g->n_batches) % PEER_BATCHES];
    const struct peer_tuning *tuning = &g->transport->tuning;
    CUstream stream = g->streams[g->started % tuning->streams];
    CUdeviceptr dsts[PEER_BATCH_COPIES], srcs[PEER_BATCH_COPIES];
    size_t sizes[PEER_BATCH_COPIES], n = 0;
    batch->peer = peer;
    batch->bytes = 0;
    for (; n < PEER_BATCH_COPIES && batch->bytes < tuning->batch_bytes && copies->at < copies->n; n++) {
        struct copy *copy = &copies->v[copies->at];
        size_t len = copy->len < tuning->batch_bytes ? copy->len : (size_t)tuning->batch_bytes;
        dsts[n] = copy->dst;
        srcs[n] = copy->src;
        sizes[n] = len;
        batch->bytes += len;
        copy->dst += len;
        copy->src += len;
        copy->len -= len;
        copies->at += copy->len == 0;
    }
    int rc = cuda_copies(cu, dsts, srcs, sizes, n, tuning->batched, stream, err);
    if (rc < 0)
        return err_wrap(err, "from party %s", g->base.links[peer].name);
    rc = cuda_check(cu, cu->cuEventRecord(batch->done, stream), err, "mark the end of a batch");
    if (rc == 0) {
        g->n_batches++;
        g->started++;
    }
    return rc;
}

int peer_copies_start(struct peer_group *g, struct err *err)
{
    uint32_t idle = 0;
    while (g->n_batches < g->transport->tuning.in_flight && idle < g->base.n) {
        uint32_t peer = g->turn;
        g->turn = (g->turn + 1) % g->base.n;
        if (g->links[peer].copies.at == g->links[peer].copies.n) {
            idle++;
            continue;
        }
        idle = 0;
        int rc = batch_start(g, peer, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int peer_copies_finish(struct peer_group *g, struct batch *ret_batch, struct err *err)
{
    const struct cuda_driver *cu = &g->transport->device->driver;
    if (g->n_batches == 0)
        return 0;
    struct batch *batch = &g->batches[g->first_batch];
    CUresult result = cu->cuEventQuery(batch->done);
    if (result == CUDA_ERROR_NOT_READY)
        return 0;
    int rc = cuda_check(cu, result, err, "copy %llu bytes from party %s", (unsigned long long)batch->bytes,
                        g->base.links[batch->peer].name);
    if (rc < 0)
        return rc;
    *ret_batch = *batch;
    g->first_batch = (g->first_batch + 1) % PEER_BATCHES;
    g->n_batches--;
    return 1;
}

void peer_copies_drop(struct peer_group *g)
{
    const struct cuda_driver *cu = &g->transport->device->driver;
    for (unsigned i = 0; i < PEER_STREAMS && cuda_health(NULL) == 0; i++)
        if (g->streams[i])
            (void)cu->cuStreamSynchronize(g->streams[i]);
    g->n_batches = 0;
    for (uint32_t i = 0; i < g->base.n; i++)
        g->links[i].copies.n = g->links[i].copies.at = 0;
}
