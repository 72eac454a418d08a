/* Moves and broadcasts of the transport over GPU memory: what is offered to whom, and which copies are made of what is
 * offered.  Worker thread. */
#include <endian.h>
#include <stdlib.h>

#include "agent/transport_cuda_peer_internal.h"

struct list {
    struct extent *v;
    size_t n, cap;
    uint64_t total;
};

static int list_add(struct list *list, const struct extent *extents, size_t n, struct err *err)
{
    for (size_t i = 0; i < n; i++) {
        if (list->n == list->cap) {
            size_t cap = list->cap ? list->cap * 2 : 64;
            struct extent *v = realloc(list->v, cap * sizeof *v);
            if (!v)
                return err_set(err, ERR_NOMEM, "out of memory");
            list->v = v;
            list->cap = cap;
        }
        if (extents[i].len == 0)
            continue;
        list->v[list->n++] = extents[i];
        list->total += extents[i].len;
    }
    return 0;
}

static CUdeviceptr extent_at(const struct extent *e)
{
    return (CUdeviceptr)(uintptr_t)e->region->base + e->offset;
}

/* The number by which the peer knows this region; its descriptor is sent first if it does not. */
static int region_number(struct peer_group *g, uint32_t peer, const struct memory_region *region, uint64_t *ret_number,
                         struct err *err)
{
    struct peer_link *link = &g->links[peer];
    for (size_t i = link->n_sent; i-- > 0;)
        if (link->sent[i].base == region->base && link->sent[i].fd == region->fd) {
            *ret_number = i;
            return 0;
        }
    if (link->n_sent == link->cap_sent) {
        size_t cap = link->cap_sent ? link->cap_sent * 2 : 64;
        struct region_sent *v = realloc(link->sent, cap * sizeof *v);
        if (!v)
            return err_set(err, ERR_NOMEM, "out of memory");
        link->sent = v;
        link->cap_sent = cap;
    }
    const struct note_head head = {.kind = NOTE_REGION, .seq = g->base.seq, .a = link->n_sent, .b = region->mapped};
    int rc = peer_note(g, peer, &head, NULL, region->fd, err);
    if (rc < 0)
        return rc;
    *ret_number = link->n_sent;
    link->sent[link->n_sent++] = (struct region_sent){region->base, region->fd, region->mapped};
    return 0;
}

static int offer(struct peer_group *g, uint32_t peer, const struct list *list, struct err *err)
{
    struct offer_run *runs = calloc(list->n + 1, sizeof *runs);
    const struct memory_region *last = NULL;
    uint64_t number = 0;
    int rc = runs ? 0 : err_set(err, ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < list->n && rc == 0; i++) {
        const struct extent *e = &list->v[i];
        if (e->region != last)
            rc = region_number(g, peer, e->region, &number, err);
        last = e->region;
        runs[i] = (struct offer_run){htole64(number), htole64(e->offset), htole64(e->len)};
    }
    const struct note_head head = {
        .kind = NOTE_OFFER,
        .seq = g->base.seq,
        .a = list->total,
        .len = list->n * sizeof *runs,
    };
    if (rc == 0)
        rc = peer_note(g, peer, &head, runs, -1, err);
    free(runs);
    g->links[peer].want_taken = true;
    return rc;
}

/* A place in a sequence of runs. */
struct cursor {
    size_t run;
    uint64_t at;
};

/* Copies bytes [from, to) of the offer to the same bytes of ours.  The cursors only go forward. */
static int offer_copy(struct call_job *job, uint32_t peer, const struct offer_run *runs, struct cursor *theirs,
                      struct cursor *ours, uint64_t *at, uint64_t from, uint64_t to, struct err *err)
{
    struct peer_link *link = &job->g->links[peer];
    const struct extent *into = job->to[peer];
    while (*at < to) {
        uint64_t len = runs[theirs->run].len - theirs->at, room = into[ours->run].len - ours->at;
        uint64_t edge = *at < from ? from : to;
        len = len < room ? len : room;
        len = len < edge - *at ? len : edge - *at;
        if (*at >= from) {
            const struct offer_run *r = &runs[theirs->run];
            int rc = peer_copies_add(&link->copies, extent_at(&into[ours->run]) + ours->at,
                                     link->mapped[r->region].at + r->offset + theirs->at, (size_t)len, err);
            if (rc < 0)
                return rc;
            link->to_take += len;
        }
        *at += len;
        theirs->at += len;
        ours->at += len;
        if (theirs->at == runs[theirs->run].len)
            *theirs = (struct cursor){.run = theirs->run + 1};
        if (ours->at == into[ours->run].len)
            *ours = (struct cursor){.run = ours->run + 1};
    }
    return 0;
}

static int move_offered(struct call_job *job, uint32_t peer, const struct offer_run *runs, struct err *err)
{
    struct cursor theirs = {0}, ours = {0};
    uint64_t at = 0;
    return offer_copy(job, peer, runs, &theirs, &ours, &at, 0, job->g->links[peer].expected, err);
}

/* Every receiver reads from all senders, each chunk from one of them, and begins with another one than its neighbour:
 * a sender is read by receivers / senders at a time. */
static int broadcast_offered(struct call_job *job, uint32_t peer, const struct offer_run *runs, struct err *err)
{
    const struct peer_group *g = job->g;
    const uint64_t size = g->transport->tuning.chunk_bytes;
    uint64_t total = g->links[peer].expected, at = 0;
    uint32_t senders = 0, place = 0;
    struct cursor theirs = {0}, ours = {0};
    for (uint32_t i = 0; i < g->base.n; i++) {
        if (i == peer)
            place = senders;
        senders += job->have[i] == TRANSPORT_HAS;
    }
    for (uint64_t chunk = 0; chunk * size < total; chunk++) {
        if ((chunk + g->base.self) % senders != place)
            continue;
        uint64_t from = chunk * size, to = from + size < total ? from + size : total;
        int rc = offer_copy(job, peer, runs, &theirs, &ours, &at, from, to, err);
        if (rc < 0)
            return rc;
    }
    return g->links[peer].to_take == 0 ? peer_tell_taken(job->g, peer, err) : 0;
}

static void call_begin(struct peer_group *g)
{
    g->base.seq++;
    g->base.received = 0;
    for (uint32_t i = 0; i < g->base.n; i++) {
        struct peer_link *link = &g->links[i];
        link->want_offer = link->want_taken = false;
        link->expected = link->to_take = link->taken = 0;
        link->copies.n = link->copies.at = 0;
    }
}

static int call_ready(struct peer_group *g, struct err *err)
{
    if (g->base.broken)
        return err_set(err, ERR_INVALID, "the group failed before; it cannot be used again");
    return cuda_device_use(g->transport->device, err);
}

/* ---- move ---- */

static int move_local(struct peer_group *g, const struct transfer *item, struct err *err)
{
    for (uint32_t k = 0; k < item->n; k++) {
        if (item->from[k].len != item->to[k].len)
            return err_set(err, ERR_INVALID, "a local copy has %zu bytes on one side and %zu on the other",
                           item->from[k].len, item->to[k].len);
        int rc = peer_copies_add(&g->links[g->base.self].copies, extent_at(&item->to[k]), extent_at(&item->from[k]),
                                 item->to[k].len, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int move_sort(struct peer_group *g, const struct transfer *items, size_t n, struct list *out, struct list *in,
                     struct err *err)
{
    const uint32_t self = g->base.self;
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        const struct transfer *t = &items[i];
        if (t->src >= g->base.n || t->dst >= g->base.n || t->n > SLOT_EXTENTS_MAX)
            return err_set(err, ERR_INVALID, "item %zu of a transfer is between parties %u and %u of %u", i, t->src,
                           t->dst, g->base.n);
        if (t->src == self && t->dst == self)
            rc = move_local(g, t, err);
        else if (t->src == self)
            rc = list_add(&out[t->dst], t->from, t->n, err);
        else if (t->dst == self)
            rc = list_add(&in[t->src], t->to, t->n, err);
    }
    return rc;
}

static int move_run(struct peer_group *g, const struct transfer *items, size_t n, struct list *out, struct list *in,
                    struct call_job *job, struct err *err)
{
    int rc = move_sort(g, items, n, out, in, err);
    for (uint32_t i = 0; i < g->base.n && rc == 0; i++) {
        job->to[i] = in[i].v;
        g->links[i].expected = in[i].total;
        g->links[i].want_offer = in[i].total > 0;
        if (out[i].total > 0)
            rc = offer(g, i, &out[i], err);
    }
    return rc < 0 ? rc : peer_call_run(job, err);
}

int peer_move(struct transport_group *group, const struct transfer *items, size_t n, const struct transport_call *call,
              uint64_t *ret_bytes, struct err *err)
{
    struct peer_group *g = (struct peer_group *)group;
    int rc = call_ready(g, err);
    if (rc < 0)
        return rc;
    struct list *out = calloc(g->base.n, sizeof *out), *in = calloc(g->base.n, sizeof *in);
    const struct extent **to = calloc(g->base.n, sizeof *to);
    struct call_job job = {.g = g, .call = call, .offered = move_offered, .to = to};
    call_begin(g);
    rc = out && in && to ? move_run(g, items, n, out, in, &job, err) : err_set(err, ERR_NOMEM, "out of memory");
    for (uint32_t i = 0; i < g->base.n; i++) {
        if (out)
            free(out[i].v);
        if (in)
            free(in[i].v);
    }
    free(out);
    free(in);
    free(to);
    if (rc < 0)
        g->base.broken = true;
    else
        *ret_bytes = g->base.received;
    return rc;
}

/* ---- broadcast ---- */

static int broadcast_run(struct peer_group *g, const struct list *list, struct call_job *job, struct err *err)
{
    const uint8_t *have = job->have;
    uint32_t senders = 0;
    int rc = 0;
    for (uint32_t i = 0; i < g->base.n; i++)
        senders += have[i] == TRANSPORT_HAS;
    if (senders == 0)
        return err_set(err, ERR_INVALID, "no party has the bytes that are to be broadcast");
    for (uint32_t i = 0; i < g->base.n && rc == 0; i++) {
        if (i == g->base.self || list->total == 0)
            continue;
        if (have[g->base.self] == TRANSPORT_HAS && have[i] == TRANSPORT_WANTS) {
            rc = offer(g, i, list, err);
        } else if (have[g->base.self] == TRANSPORT_WANTS && have[i] == TRANSPORT_HAS) {
            job->to[i] = list->v;
            g->links[i].expected = list->total;
            g->links[i].want_offer = true;
        }
    }
    return rc < 0 ? rc : peer_call_run(job, err);
}

int peer_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
                   const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    struct peer_group *g = (struct peer_group *)group;
    int rc = call_ready(g, err);
    if (rc < 0)
        return rc;
    struct list list = {0};
    const struct extent **to = calloc(g->base.n, sizeof *to);
    struct call_job job = {.g = g, .call = call, .offered = broadcast_offered, .to = to, .have = have};
    call_begin(g);
    rc = to ? list_add(&list, extents, n, err) : err_set(err, ERR_NOMEM, "out of memory");
    if (rc == 0)
        rc = broadcast_run(g, &list, &job, err);
    free(list.v);
    free(to);
    if (rc < 0)
        g->base.broken = true;
    else
        *ret_bytes = g->base.received;
    return rc;
}
