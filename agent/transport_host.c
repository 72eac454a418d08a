/* The host transport: TCP connections between the agents of a group, bytes straight from slot to slot.
 *
 * Here: the table of functions, and move().  Worker thread. */
#include "agent/transport.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/transport_host_internal.h"
#include "common/clock.h"

int host_poll_ms(uint64_t until_ns)
{
    uint64_t now = clock_now_ns();
    if (until_ns <= now)
        return 0;
    uint64_t ms = (until_ns - now - 1) / 1000000u + 1;
    return ms > 60000 ? 60000 : (int)ms;
}

static int host_group_id(struct transport *self, struct blob **ret_id, struct err *err)
{
    (void)self;
    return transport_secret(GROUP_ID_BYTES, ret_id, err);
}

/* ---- move: one frame a pair and direction, holding all items between the two, in order ---- */

/* Which extent of which item a run of bytes is. */
struct origin {
    size_t item;
    uint32_t extent;
};
struct move_peer {
    struct runs out, in;
    bool sent, received;
    struct origin *origins;   /* [in.n] */
    size_t told_run, told_at; /* up to here `arrived` has been called */
};
struct move_job {
    struct transport_group *group;
    const struct transport_call *call;
    struct move_peer *peers; /* [n] */
};

static bool move_wants_in(void *job, uint32_t peer)
{
    const struct move_peer *p = &((struct move_job *)job)->peers[peer];
    return !p->received && p->in.total > 0;
}

static bool move_next_out(void *job, uint32_t peer, struct frame *ret_frame, struct place *ret_place)
{
    struct move_job *j = job;
    struct move_peer *p = &j->peers[peer];
    if (p->sent || p->out.total == 0)
        return false;
    p->sent = true;
    *ret_frame = (struct frame){.kind = FRAME_MOVE, .seq = j->group->seq, .len = p->out.total};
    *ret_place = (struct place){.runs = &p->out};
    return true;
}

static int move_begin_in(void *job, uint32_t peer, const struct frame *frame, struct place *ret_place, struct err *err)
{
    struct move_job *j = job;
    struct move_peer *p = &j->peers[peer];
    if (frame->kind != FRAME_MOVE || frame->len != p->in.total)
        return err_set(err, ERR_PROTOCOL, "party %s sends %llu bytes where the plan has %llu; the plans differ",
                       j->group->links[peer].name, (unsigned long long)frame->len, (unsigned long long)p->in.total);
    *ret_place = (struct place){.runs = &p->in};
    return 0;
}

/* Tells of what has come, in pieces that lie in one extent and begin at words. */
static void move_took_in(void *job, uint32_t peer, uint64_t end)
{
    struct move_job *j = job;
    struct move_peer *p = &j->peers[peer];
    while (j->call->arrived && p->told_run < p->in.n) {
        const struct run *run = &p->in.v[p->told_run];
        const struct origin *origin = &p->origins[p->told_run];
        uint64_t there = end > run->start ? end - run->start : 0;
        size_t to = there >= run->len ? run->len : (size_t)there / 8 * 8;
        if (to > p->told_at)
            j->call->arrived(j->call->user, origin->item, origin->extent, p->told_at, to - p->told_at);
        p->told_at = to > p->told_at ? to : p->told_at;
        if (to < run->len)
            return;
        p->told_run++;
        p->told_at = 0;
    }
}

static void move_end_in(void *job, uint32_t peer, const struct frame *frame)
{
    (void)frame;
    ((struct move_job *)job)->peers[peer].received = true;
}

static const struct pump_ops move_ops = {
    .wants_in = move_wants_in,
    .next_out = move_next_out,
    .begin_in = move_begin_in,
    .took_in = move_took_in,
    .end_in = move_end_in,
};

static int move_local(const struct transfer *item, struct err *err)
{
    for (uint32_t k = 0; k < item->n; k++) {
        if (item->from[k].len != item->to[k].len)
            return err_set(err, ERR_INVALID, "a local copy has %zu bytes on one side and %zu on the other",
                           item->from[k].len, item->to[k].len);
        memmove((uint8_t *)item->to[k].region->base + item->to[k].offset,
                (const uint8_t *)item->from[k].region->base + item->from[k].offset, item->from[k].len);
    }
    return 0;
}

static int move_expect(struct move_peer *peer, size_t item, const struct transfer *t, struct err *err)
{
    for (uint32_t k = 0; k < t->n; k++) {
        size_t before = peer->in.n;
        int rc = runs_add(&peer->in, &t->to[k], 1, err);
        if (rc < 0)
            return rc;
        if (peer->in.n == before)
            continue; /* no bytes */
        struct origin *origins = realloc(peer->origins, peer->in.cap * sizeof *origins);
        if (!origins)
            return err_set(err, ERR_NOMEM, "out of memory");
        peer->origins = origins;
        origins[before] = (struct origin){.item = item, .extent = k};
    }
    return 0;
}

static int move_sort(struct move_job *job, const struct transfer *items, size_t n, struct err *err)
{
    const struct transport_group *group = job->group;
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        const struct transfer *t = &items[i];
        if (t->src >= group->n || t->dst >= group->n || t->n > SLOT_EXTENTS_MAX)
            return err_set(err, ERR_INVALID, "item %zu of a transfer is between parties %u and %u of %u", i, t->src,
                           t->dst, group->n);
        if (t->src == group->self && t->dst == group->self)
            rc = move_local(t, err);
        else if (t->src == group->self)
            rc = runs_add(&job->peers[t->dst].out, t->from, t->n, err);
        else if (t->dst == group->self)
            rc = move_expect(&job->peers[t->src], i, t, err);
    }
    return rc;
}

static int host_move(struct transport_group *group, const struct transfer *items, size_t n,
                     const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
{
    if (group->broken)
        return err_set(err, ERR_INVALID, "the group failed before; it cannot be used again");
    struct move_job job = {.group = group, .call = call, .peers = calloc(group->n, sizeof *job.peers)};
    if (!job.peers)
        return err_set(err, ERR_NOMEM, "out of memory");
    group->seq++;
    group->received = 0;
    int rc = move_sort(&job, items, n, err);
    if (rc == 0)
        rc = pump_run(group, &move_ops, &job, call, err);
    for (uint32_t i = 0; i < group->n; i++) {
        runs_done(&job.peers[i].out);
        runs_done(&job.peers[i].in);
        free(job.peers[i].origins);
    }
    free(job.peers);
    if (rc < 0)
        group->broken = true;
    else
        *ret_bytes = group->received;
    return rc;
}

/* ---- the table ---- */

static void host_close(struct transport *self)
{
    struct transport_host *host = (struct transport_host *)self;
    host_guests_sweep(host, true);
    close(host->listen_fd);
    free(host);
}

struct transport *transport_host_open(int listen_fd, struct err *err)
{
    struct transport_host *host = calloc(1, sizeof *host);
    if (!host) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    host->listen_fd = listen_fd;
    host->base = (struct transport){
        .name = "host",
        .group_id = host_group_id,
        .group_create = host_group_create,
        .move = host_move,
        .broadcast = host_broadcast,
        .destroy = host_group_destroy,
        .close = host_close,
    };
    return &host->base;
}
