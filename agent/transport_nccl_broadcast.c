/* The same bytes to many over NCCL: the chains of the host transport (transport_host_broadcast.c), in steps.
 *
 * The bytes are cut into chunks.  Chunk c starts at sender c mod S and goes along a chain of all R receivers that
 * begins at receiver a(k) = k * R / S for sender k.  In step t, position p of a chain receives the chain's chunk t - p
 * while it passes on chunk t - p - 1, which it got the step before; a step is one batch of NCCL operations, and both
 * ends of a link have the same chunk in the same step.  Worker thread. */
#include <stdlib.h>

#include "agent/transport_nccl_internal.h"

#define CHUNK_MIN    (1u << 20)
#define CHUNK_PIECES 256u /* operations that one chunk may become */
#define FILL_PARTS   8u   /* chunks of a chain for each receiver, so that filling and draining it costs an eighth */

struct piece {
    uint8_t *at;
    size_t len;
};

struct cast {
    uint32_t senders[RANKS_MAX], receivers[RANKS_MAX];
    uint32_t n_senders, n_receivers;
    uint32_t place; /* ours, in the one list or the other */
    bool sends;
    struct piece *pieces;
    size_t *chunks; /* [n_chunks + 1] into pieces */
    uint64_t n_chunks;
    struct nccl_ops ops;
};

static int cast_parties(struct cast *c, const struct transport_group *group, const uint8_t *have, struct err *err)
{
    c->sends = have[group->self] == TRANSPORT_HAS;
    for (uint32_t i = 0; i < group->n; i++) {
        if (i == group->self)
            c->place = c->sends ? c->n_senders : c->n_receivers;
        if (have[i] == TRANSPORT_HAS)
            c->senders[c->n_senders++] = i;
        else if (have[i] == TRANSPORT_WANTS)
            c->receivers[c->n_receivers++] = i;
    }
    return c->n_senders > 0 ? 0 : err_set(err, ERR_INVALID, "no party has the bytes that are to be broadcast");
}

/* Cuts the bytes into chunks, and those at the borders of extents into pieces: the same way on every party. */
static int cast_cut(struct cast *c, const struct extent *extents, size_t n, uint64_t most, struct err *err)
{
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += extents[i].len;
    uint64_t size = total / c->n_senders / ((uint64_t)FILL_PARTS * c->n_receivers);
    size = size < CHUNK_MIN ? CHUNK_MIN : size / 4096 * 4096;
    size = size > most ? most : size;
    size_t max = n + (size_t)(total / size) + 1;
    c->pieces = calloc(max, sizeof *c->pieces);
    c->chunks = calloc(max + 1, sizeof *c->chunks);
    if (!c->pieces || !c->chunks)
        return err_set(err, ERR_NOMEM, "out of memory");
    size_t pieces = 0;
    uint64_t room = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t *base = (uint8_t *)extents[i].region->base + extents[i].offset;
        for (size_t at = 0; at < extents[i].len;) {
            if (room == 0 || pieces - c->chunks[c->n_chunks - 1] == CHUNK_PIECES) {
                c->chunks[c->n_chunks++] = pieces;
                room = size;
            }
            size_t len = extents[i].len - at < room ? extents[i].len - at : (size_t)room;
            c->pieces[pieces++] = (struct piece){base + at, len};
            at += len;
            room -= len;
        }
    }
    c->chunks[c->n_chunks] = pieces;
    return 0;
}

static int cast_add(struct cast *c, uint64_t chunk, uint32_t peer, uint32_t step, bool send, struct err *err)
{
    int rc = 0;
    for (size_t i = c->chunks[chunk]; i < c->chunks[chunk + 1] && rc == 0; i++)
        rc = nccl_ops_add(&c->ops, &(struct nccl_op){c->pieces[i].at, c->pieces[i].len, peer, step, send}, err);
    return rc;
}

/* Our part in the step of one chain. */
static int cast_step(struct cast *c, uint32_t chain, uint64_t step, struct err *err)
{
    uint32_t receivers = c->n_receivers, senders = c->n_senders;
    uint32_t start = (uint32_t)((uint64_t)chain * receivers / senders);
    uint64_t length = c->n_chunks > chain ? (c->n_chunks - chain - 1) / senders + 1 : 0;
    if (c->sends)
        return c->place == chain && step < length
                   ? cast_add(c, chain + step * senders, c->receivers[start], (uint32_t)step, true, err)
                   : 0;
    uint32_t position = (c->place + receivers - start) % receivers;
    int rc = 0;
    if (step >= position && step - position < length) {
        uint32_t from = position == 0 ? c->senders[chain] : c->receivers[(c->place + receivers - 1) % receivers];
        rc = cast_add(c, chain + (step - position) * senders, from, (uint32_t)step, false, err);
    }
    if (rc == 0 && position + 1 < receivers && step >= position + 1u && step - position - 1 < length)
        rc = cast_add(c, chain + (step - position - 1) * senders, c->receivers[(c->place + 1) % receivers],
                      (uint32_t)step, true, err);
    return rc;
}

static int cast_plan(struct cast *c, const struct transport_group *group, const struct extent *extents, size_t n,
                     const uint8_t *have, struct err *err)
{
    int rc = nccl_ops_init(&c->ops, group->n, err);
    if (rc == 0)
        rc = cast_parties(c, group, have, err);
    if (rc < 0 || c->n_receivers == 0 || have[group->self] == TRANSPORT_ABSENT)
        return rc;
    rc = cast_cut(c, extents, n, group->nccl->tuning.chunk_bytes, err);
    uint64_t steps = (c->n_chunks + c->n_senders - 1) / c->n_senders + c->n_receivers - 1;
    for (uint64_t step = 0; step < steps && rc == 0; step++)
        for (uint32_t chain = 0; chain < c->n_senders && rc == 0; chain++)
            rc = cast_step(c, chain, step, err);
    return rc;
}

int nccl_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    if (group->broken)
        return err_set(err, ERR_INVALID, "the group failed before; it cannot be used again");
    struct cast *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NOMEM, "out of memory");
    uint64_t received = 0;
    int rc = cuda_device_use(group->nccl->shared->device, err);
    if (rc == 0)
        rc = cast_plan(c, group, extents, n, have, err);
    if (rc == 0)
        rc = nccl_run(group, "a broadcast", &c->ops, call, &received, err);
    nccl_ops_done(&c->ops);
    free(c->pieces);
    free(c->chunks);
    free(c);
    if (rc < 0)
        return nccl_group_fail(group, rc, err);
    *ret_bytes = received;
    return 0;
}
