/* The same bytes to many, as chains of receivers.
 *
 * The bytes are cut into chunks.  Chunk c starts at sender c mod S and goes along a chain of all R receivers:
 *
 *     sender k -> receiver a(k) -> a(k)+1 -> ... -> a(k)-1     (mod R), with a(k) = k * R / S
 *
 * so each sender sends every byte at most once, each receiver takes every byte once and passes on what is not for the
 * last of a chain, and all links work at the same time: a chunk is passed on as soon as it is there.  One sender and
 * seven receivers need hardly longer than one and one.  Worker thread. */
#include <stdlib.h>

#include "agent/transport_host_internal.h"

#define CHUNK_MAX     (1u << 20)
#define CHUNK_MIN     (64u << 10)
#define CHUNKS_WANTED 64u /* a small broadcast is cut finer, so that its chain is filled as well */

struct broadcast_job {
    struct transport_group *group;
    struct runs runs;
    uint64_t chunk_bytes, chunks;
    uint32_t *senders, *receivers; /* parties */
    uint32_t n_senders, n_receivers;
    uint32_t place;     /* ours, in the one list or the other */
    bool sends;         /* ours is `senders` */
    uint64_t next;      /* sender: the chunk to send next */
    uint64_t *expected; /* receiver: [parties] chunks that are still to come from each */
    uint8_t *got;       /* receiver: [chunks] */
    uint64_t *forward;  /* receiver: chunks to pass on, in the order of their arrival */
    uint64_t forward_n, forward_at;
};

static uint32_t chain_start(const struct broadcast_job *j, uint64_t chain)
{
    return (uint32_t)(chain * j->n_receivers / j->n_senders);
}

/* The position of receiver i in a chain: 0 = it gets the bytes from the sender. */
static uint32_t chain_position(const struct broadcast_job *j, uint64_t chain, uint32_t i)
{
    return (i + j->n_receivers - chain_start(j, chain)) % j->n_receivers;
}

/* The party from which receiver i gets this chunk. */
static uint32_t chunk_source(const struct broadcast_job *j, uint64_t chunk, uint32_t i)
{
    uint64_t chain = chunk % j->n_senders;
    if (chain_position(j, chain, i) == 0)
        return j->senders[chain];
    return j->receivers[(i + j->n_receivers - 1) % j->n_receivers];
}

static uint64_t chunk_len(const struct broadcast_job *j, uint64_t chunk)
{
    uint64_t left = j->runs.total - chunk * j->chunk_bytes;
    return left < j->chunk_bytes ? left : j->chunk_bytes;
}

/* ---- what the pump asks ---- */

static bool broadcast_wants_in(void *job, uint32_t peer)
{
    const struct broadcast_job *j = job;
    return !j->sends && j->expected[peer] > 0;
}

static bool broadcast_next_out(void *job, uint32_t peer, struct frame *ret_frame, struct place *ret_place)
{
    struct broadcast_job *j = job;
    uint64_t chunk;
    if (j->sends) {
        if (j->next >= j->chunks || j->receivers[chain_start(j, j->place)] != peer)
            return false;
        chunk = j->next;
        j->next += j->n_senders;
    } else {
        if (j->forward_at == j->forward_n || j->receivers[(j->place + 1) % j->n_receivers] != peer)
            return false;
        chunk = j->forward[j->forward_at++];
    }
    *ret_frame = (struct frame){.kind = FRAME_CHUNK, .seq = j->group->seq, .index = chunk, .len = chunk_len(j, chunk)};
    *ret_place = (struct place){.runs = &j->runs, .offset = chunk * j->chunk_bytes};
    return true;
}

static int broadcast_begin_in(void *job, uint32_t peer, const struct frame *frame, struct place *ret_place,
                              struct err *err)
{
    struct broadcast_job *j = job;
    uint64_t chunk = frame->index;
    if (frame->kind != FRAME_CHUNK || chunk >= j->chunks || frame->len != chunk_len(j, chunk) || j->got[chunk] ||
        chunk_source(j, chunk, j->place) != peer)
        return err_set(err, ERR_PROTOCOL, "party %s broadcasts chunk %llu of %llu bytes, which is not its to send",
                       j->group->links[peer].name, (unsigned long long)chunk, (unsigned long long)frame->len);
    *ret_place = (struct place){.runs = &j->runs, .offset = chunk * j->chunk_bytes};
    return 0;
}

static void broadcast_end_in(void *job, uint32_t peer, const struct frame *frame)
{
    struct broadcast_job *j = job;
    j->got[frame->index] = 1;
    j->expected[peer]--;
    if (chain_position(j, frame->index % j->n_senders, j->place) + 1 < j->n_receivers)
        j->forward[j->forward_n++] = frame->index;
}

static const struct pump_ops broadcast_ops = {
    .wants_in = broadcast_wants_in,
    .next_out = broadcast_next_out,
    .begin_in = broadcast_begin_in,
    .end_in = broadcast_end_in,
};

/* ---- set-up ---- */

static int broadcast_plan(struct broadcast_job *j, const uint8_t *have, struct err *err)
{
    const struct transport_group *group = j->group;
    j->senders = calloc(group->n, sizeof *j->senders);
    j->receivers = calloc(group->n, sizeof *j->receivers);
    j->expected = calloc(group->n, sizeof *j->expected);
    if (!j->senders || !j->receivers || !j->expected)
        return err_set(err, ERR_NOMEM, "out of memory");
    j->sends = have[group->self] != TRANSPORT_WANTS; /* one that has no part sends nothing */
    for (uint32_t i = 0; i < group->n; i++) {
        if (i == group->self)
            j->place = j->sends ? j->n_senders : j->n_receivers;
        if (have[i] == TRANSPORT_HAS)
            j->senders[j->n_senders++] = i;
        else if (have[i] == TRANSPORT_WANTS)
            j->receivers[j->n_receivers++] = i;
    }
    if (j->n_senders == 0)
        return err_set(err, ERR_INVALID, "no party has the bytes that are to be broadcast");
    j->chunk_bytes = j->runs.total / CHUNKS_WANTED;
    j->chunk_bytes = j->chunk_bytes < CHUNK_MIN ? CHUNK_MIN : j->chunk_bytes > CHUNK_MAX ? CHUNK_MAX : j->chunk_bytes;
    j->chunks = j->n_receivers == 0 || have[group->self] == TRANSPORT_ABSENT
                    ? 0
                    : (j->runs.total + j->chunk_bytes - 1) / j->chunk_bytes;
    j->next = j->place;
    if (j->sends)
        return 0;
    j->got = calloc(j->chunks + 1, sizeof *j->got);
    j->forward = calloc(j->chunks + 1, sizeof *j->forward);
    if (!j->got || !j->forward)
        return err_set(err, ERR_NOMEM, "out of memory");
    for (uint64_t chunk = 0; chunk < j->chunks; chunk++)
        j->expected[chunk_source(j, chunk, j->place)]++;
    return 0;
}

int host_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    if (group->broken)
        return err_set(err, ERR_INVALID, "the group failed before; it cannot be used again");
    struct broadcast_job job = {.group = group};
    group->seq++;
    group->received = 0;
    int rc = runs_add(&job.runs, extents, n, err);
    if (rc == 0)
        rc = broadcast_plan(&job, have, err);
    if (rc == 0)
        rc = pump_run(group, &broadcast_ops, &job, call, err);
    runs_done(&job.runs);
    free(job.senders);
    free(job.receivers);
    free(job.expected);
    free(job.got);
    free(job.forward);
    if (rc < 0)
        group->broken = true;
    else
        *ret_bytes = group->received;
    return rc;
}
