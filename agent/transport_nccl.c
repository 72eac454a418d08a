/* The NCCL transport: the table of functions, and move().  Worker thread.
 *
 * All items of a move, of all layers, go into few groups of ncclSend and ncclRecv, straight from slot to slot.  How
 * items are spread over the groups follows from each pair's own list alone (see pair_batch), so that both ends agree
 * without seeing the whole plan. */
#include "agent/transport_nccl.h"

#include <malloc.h>
#include <stdlib.h>

#include "agent/gpu_share.h"
#include "agent/transport_nccl_internal.h"

#define GROUP_ID_BYTES  32
#define BATCH_BYTES_MIN (4u << 20) /* of one pair and direction: small moves report progress as well */
#define BATCH_PARTS     4u

/* What agents use; large moves become groups that a deadline outlives, and the GPU never waits for the next launch. */
static const struct nccl_tuning as_agents = {
    .group_ops = 1024,
    .in_flight = 4,
    .group_bytes = UINT64_C(128) << 20,
    .op_bytes = UINT64_C(128) << 20,
    .chunk_bytes = 32u << 20,
};

static int nccl_group_id(struct transport *self, struct blob **ret_id, struct err *err)
{
    (void)self;
    return transport_secret(GROUP_ID_BYTES, ret_id, err);
}

/* ---- move ---- */

/* One pair and direction, while its operations are put into batches. */
struct pair {
    uint64_t total, limit; /* bytes of all batches, and of one */
    uint64_t bytes;        /* in the batch that is being filled */
    uint32_t ops, batch;
};
struct mover {
    struct transport_group *group;
    const struct nccl_tuning *tuning;
    struct pair *out, *in; /* [n] */
    uint32_t pair_ops;     /* operations of a pair and direction in one batch */
    struct nccl_ops ops;
};

static uint64_t extents_bytes(const struct extent *extents, uint32_t n)
{
    uint64_t bytes = 0;
    for (uint32_t k = 0; k < n; k++)
        bytes += extents[k].len;
    return bytes;
}

static uint32_t pair_batch(const struct mover *m, struct pair *pair, size_t len)
{
    if (pair->ops == m->pair_ops || (pair->ops > 0 && pair->bytes + len > pair->limit)) {
        pair->batch++;
        pair->ops = 0;
        pair->bytes = 0;
    }
    pair->ops++;
    pair->bytes += len;
    return pair->batch;
}

static int move_extents(struct mover *m, uint32_t peer, bool send, const struct extent *extents, uint32_t n,
                        struct err *err)
{
    struct pair *pair = send ? &m->out[peer] : &m->in[peer];
    const uint64_t limit = pair->limit < m->tuning->op_bytes ? pair->limit : m->tuning->op_bytes;
    for (uint32_t k = 0; k < n; k++) {
        uint8_t *base = (uint8_t *)extents[k].region->base + extents[k].offset;
        for (size_t at = 0; at < extents[k].len;) {
            size_t len = extents[k].len - at < limit ? extents[k].len - at : (size_t)limit;
            struct nccl_op op = {base + at, len, peer, pair_batch(m, pair, len), send};
            int rc = nccl_ops_add(&m->ops, &op, err);
            if (rc < 0)
                return rc;
            at += len;
        }
    }
    return 0;
}

/* Local copies go first, and in order: what is sent afterwards may be what they wrote. */
static int move_local(const struct transport_group *group, const struct transfer *item, struct err *err)
{
    const struct cuda_driver *cu = &group->nccl->shared->device->driver;
    for (uint32_t k = 0; k < item->n; k++) {
        if (item->from[k].len != item->to[k].len)
            return err_set(err, ERR_INVALID, "a local copy has %zu bytes on one side and %zu on the other",
                           item->from[k].len, item->to[k].len);
        if (item->from[k].len == 0)
            continue;
        CUdeviceptr to = (CUdeviceptr)(uintptr_t)item->to[k].region->base + item->to[k].offset;
        CUdeviceptr from = (CUdeviceptr)(uintptr_t)item->from[k].region->base + item->from[k].offset;
        int rc = cuda_check(cu, cu->cuMemcpyDtoDAsync(to, from, item->from[k].len, group->gear.stream), err,
                            "copy %zu bytes on the GPU", item->from[k].len);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int move_check(const struct transport_group *group, const struct transfer *items, size_t n, struct err *err)
{
    for (size_t i = 0; i < n; i++)
        if (items[i].src >= group->n || items[i].dst >= group->n || items[i].n > SLOT_EXTENTS_MAX)
            return err_set(err, ERR_INVALID, "item %zu of a transfer is between parties %u and %u of %u", i,
                           items[i].src, items[i].dst, group->n);
    return 0;
}

static void move_limits(struct mover *m, const struct transfer *items, size_t n)
{
    uint32_t parties = m->group->n, self = m->group->self;
    for (size_t i = 0; i < n; i++) {
        if (items[i].src == self && items[i].dst != self)
            m->out[items[i].dst].total += extents_bytes(items[i].from, items[i].n);
        else if (items[i].dst == self && items[i].src != self)
            m->in[items[i].src].total += extents_bytes(items[i].to, items[i].n);
    }
    for (uint32_t i = 0; i < 2 * parties; i++) {
        struct pair *pair = i < parties ? &m->out[i] : &m->in[i - parties];
        pair->limit = pair->total / BATCH_PARTS;
        pair->limit = pair->limit < BATCH_BYTES_MIN ? BATCH_BYTES_MIN : (pair->limit + 4095) / 4096 * 4096;
        pair->limit = pair->limit < m->tuning->group_bytes ? pair->limit : m->tuning->group_bytes;
    }
    m->pair_ops = parties > 1 ? m->tuning->group_ops / (2 * (parties - 1)) : m->tuning->group_ops;
    m->pair_ops = m->pair_ops > 0 ? m->pair_ops : 1;
}

static int move_plan(struct mover *m, const struct transfer *items, size_t n, struct err *err)
{
    struct transport_group *group = m->group;
    uint32_t self = group->self;
    int rc = move_check(group, items, n, err);
    if (rc < 0)
        return rc;
    move_limits(m, items, n);
    for (size_t i = 0; i < n && rc == 0; i++) {
        const struct transfer *t = &items[i];
        if (t->src == self && t->dst == self)
            rc = move_local(group, t, err);
        else if (t->src == self)
            rc = move_extents(m, t->dst, true, t->from, t->n, err);
        else if (t->dst == self)
            rc = move_extents(m, t->src, false, t->to, t->n, err);
    }
    return rc;
}

/* Waits for what is on the stream besides batches: local copies. */
static int move_drain(struct transport_group *group, const struct transport_call *call, struct err *err)
{
    const struct cuda_driver *cu = &group->nccl->shared->device->driver;
    int rc =
        cuda_check(cu, cu->cuEventRecord(group->gear.events[0], group->gear.stream), err, "mark the end of a move");
    return rc == 0 ? nccl_reach(group, group->gear.events[0], call, err) : rc;
}

static int nccl_move(struct transport_group *group, const struct transfer *items, size_t n,
                     const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    if (group->broken)
        return err_set(err, ERR_INVALID, "the group failed before; it cannot be used again");
    struct mover m = {
        .group = group,
        .tuning = &group->nccl->tuning,
        .out = calloc(group->n, sizeof *m.out),
        .in = calloc(group->n, sizeof *m.in),
    };
    uint64_t received = 0;
    int rc = m.out && m.in ? nccl_ops_init(&m.ops, group->n, err) : err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0)
        rc = cuda_device_use(group->nccl->shared->device, err);
    if (rc == 0)
        rc = move_plan(&m, items, n, err);
    if (rc == 0)
        rc = nccl_run(group, "a move of weights", &m.ops, call, &received, err);
    if (rc == 0)
        rc = move_drain(group, call, err);
    nccl_ops_done(&m.ops);
    free(m.out);
    free(m.in);
    if (rc < 0)
        return nccl_group_fail(group, rc, err);
    *ret_bytes = received;
    return 0;
}

/* ---- the table ---- */

static int nccl_health(struct transport *self, struct err *err)
{
    int rc = cuda_health(err);
    return rc < 0 ? rc : nccl_endings_check(((struct transport_nccl *)self)->shared, err);
}

static void nccl_close(struct transport *self)
{
    struct transport_nccl *nccl = (struct transport_nccl *)self;
    if (!nccl->mesh_is_theirs)
        nccl->mesh->close(nccl->mesh);
    nccl_shared_close(nccl->shared);
    free(nccl);
}

const char *transport_nccl_version(const struct transport *transport)
{
    return ((const struct transport_nccl *)transport)->shared->version;
}

bool transport_nccl_tune(struct transport *transport, const struct nccl_tuning *tuning)
{
    struct transport_nccl *nccl = (struct transport_nccl *)transport;
    if (tuning->in_flight > GROUPS_IN_FLIGHT)
        return false;
    nccl->tuning = (struct nccl_tuning){
        .group_ops = tuning->group_ops ? tuning->group_ops : as_agents.group_ops,
        .in_flight = tuning->in_flight ? tuning->in_flight : as_agents.in_flight,
        .group_bytes = tuning->group_bytes ? tuning->group_bytes : as_agents.group_bytes,
        .op_bytes = tuning->op_bytes ? tuning->op_bytes : as_agents.op_bytes,
        .chunk_bytes = tuning->chunk_bytes ? tuning->chunk_bytes : as_agents.chunk_bytes,
    };
    return true;
}

struct nccl_tuning transport_nccl_tuned(const struct transport *transport)
{
    return ((const struct transport_nccl *)transport)->tuning;
}

struct transport_nccl_counts transport_nccl_counts(const struct transport *transport)
{
    const struct transport_nccl *nccl = (const struct transport_nccl *)transport;
    struct transport_nccl_counts counts = nccl->counts;
    counts.ending = nccl_endings_count(nccl->shared);
    return counts;
}

static int nccl_parts(struct transport_nccl *nccl, const struct transport_nccl_options *options, struct err *err)
{
    struct nccl_library library;
    struct cuda_device *device;
    int rc = options->shared_gpu ? gpu_share_host_id(err) : 0;
    if (rc == 0)
        rc = nccl_library_load(&library, err);
    if (rc == 0)
        rc = cuda_device_open(options->gpu, &device, err);
    if (rc < 0)
        return rc;
    nccl->shared = nccl_shared_new(library, device);
    if (!nccl->shared) {
        cuda_device_close(device);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    nccl->keep_ms = options->keep_ms;
    nccl->tuning = as_agents;
    nccl->mesh_is_theirs = options->mesh != NULL;
    nccl->mesh = options->mesh ? options->mesh : transport_host_open(options->listen_fd, err);
    if (!nccl->mesh) {
        nccl_shared_close(nccl->shared);
        return ERR_NOMEM;
    }
    return 0;
}

struct transport *transport_nccl_open(const struct transport_nccl_options *options, struct err *err)
{
    struct transport_nccl *nccl = calloc(1, sizeof *nccl);
    if (!nccl) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    /* Every communicator starts threads that soon end; the arenas that malloc makes for them are never given back, and
     * a process that scales often grows by 8 to 18 MiB each time (seen).  One arena for all does not grow. */
    mallopt(M_ARENA_MAX, 1);
    /* NCCL has host buffers of 32 MiB.  malloc takes the first one that is freed as a sign to keep such blocks in its
     * heap from then on, and the process is 30 to 70 MiB larger at one time than at another (seen).  Unless told: */
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    if (nccl_parts(nccl, options, err) < 0) {
        free(nccl);
        return NULL;
    }
    nccl->base = (struct transport){
        .name = "nccl",
        .group_id = nccl_group_id,
        .group_create = nccl_group_create,
        .move = nccl_move,
        .broadcast = nccl_broadcast,
        .destroy = nccl_group_destroy,
        .health = nccl_health,
        .close = nccl_close,
    };
    return &nccl->base;
}
