/* Moves bytes over all links of a group at once: one poll loop, no thread, no copy between the socket and the slots.
 *
 * A frame is a header of 32 bytes (u32 magic, u32 kind, u64 seq, u64 index, u64 len, little-endian) and its body.  What
 * is sent and expected is the caller's (pump_ops); deadlines, cancellation, lost and stalled peers are here.
 * Worker thread. */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "agent/transport_host_internal.h"
#include "common/clock.h"

#define FRAME_MAGIC    0x45455046u
#define IOV_BATCH      64u
#define LINK_BUDGET    (4u << 20) /* bytes of one system call, and before the next link gets its turn */
#define PROGRESS_BYTES (1u << 20) /* between two calls of progress */

struct pump {
    struct transport_group *group;
    const struct pump_ops *ops;
    void *job;
    const struct transport_call *call;
    struct pollfd *polls;     /* [n + 1]: links, then the cancel descriptor */
    uint64_t moved, reported; /* both directions */
};

/* ---- runs ---- */

int runs_add(struct runs *runs, const struct extent *extents, size_t n, struct err *err)
{
    for (size_t i = 0; i < n; i++) {
        if (extents[i].len == 0)
            continue;
        if (runs->n == runs->cap) {
            size_t cap = runs->cap ? runs->cap * 2 : 16;
            struct run *v = realloc(runs->v, cap * sizeof *v);
            if (!v)
                return err_set(err, ERR_NOMEM, "out of memory");
            runs->v = v;
            runs->cap = cap;
        }
        runs->v[runs->n++] = (struct run){
            .base = (uint8_t *)extents[i].region->base + extents[i].offset,
            .len = extents[i].len,
            .start = runs->total,
        };
        runs->total += extents[i].len;
    }
    return 0;
}

void runs_done(struct runs *runs)
{
    free(runs->v);
    *runs = (struct runs){0};
}

/* ---- flows ---- */

static void flow_place(struct flow *flow, const struct place *place)
{
    const struct runs *runs = place->runs;
    flow->runs = runs;
    flow->left = flow->frame.len;
    /* The last run that starts at or before the offset. */
    size_t low = 0, high = runs->n;
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (runs->v[mid].start <= place->offset)
            low = mid;
        else
            high = mid;
    }
    flow->run = low;
    flow->run_at = runs->n > 0 ? (size_t)(place->offset - runs->v[low].start) : 0;
}

static void frame_write(const struct frame *frame, uint8_t head[FRAME_HEAD_BYTES])
{
    uint32_t words[2] = {htole32(FRAME_MAGIC), htole32((uint32_t)frame->kind)};
    uint64_t longs[3] = {htole64(frame->seq), htole64(frame->index), htole64(frame->len)};
    memcpy(head, words, sizeof words);
    memcpy(head + sizeof words, longs, sizeof longs);
}

static bool frame_read(const uint8_t head[FRAME_HEAD_BYTES], struct frame *ret_frame)
{
    uint32_t words[2];
    uint64_t longs[3];
    memcpy(words, head, sizeof words);
    memcpy(longs, head + sizeof words, sizeof longs);
    uint32_t kind = le32toh(words[1]);
    if (le32toh(words[0]) != FRAME_MAGIC || (kind != FRAME_MOVE && kind != FRAME_CHUNK))
        return false;
    *ret_frame = (struct frame){
        .kind = (enum frame_kind)kind,
        .seq = le64toh(longs[0]),
        .index = le64toh(longs[1]),
        .len = le64toh(longs[2]),
    };
    return true;
}

/* The rest of the flow's frame as vectors: at most IOV_BATCH, and LINK_BUDGET bytes (a send whose receiver keeps up
 * would not return before everything is gone). */
static size_t flow_vectors(struct flow *flow, bool with_body, struct iovec *ret_iov)
{
    size_t n = 0;
    if (flow->head_at < FRAME_HEAD_BYTES)
        ret_iov[n++] = (struct iovec){flow->head + flow->head_at, FRAME_HEAD_BYTES - flow->head_at};
    uint64_t left = flow->left < LINK_BUDGET ? flow->left : LINK_BUDGET;
    size_t at = flow->run_at;
    for (size_t run = flow->run; with_body && left > 0 && n < IOV_BATCH; run++) {
        const struct run *r = &flow->runs->v[run];
        size_t len = r->len - at;
        if (len > left)
            len = (size_t)left;
        ret_iov[n++] = (struct iovec){r->base + at, len};
        left -= len;
        at = 0;
    }
    return n;
}

/* Takes note of `bytes` sent or received; returns how many of them were body. */
static size_t flow_advance(struct flow *flow, size_t bytes)
{
    size_t head = FRAME_HEAD_BYTES - flow->head_at;
    if (head > bytes)
        head = bytes;
    flow->head_at += head;
    size_t body = bytes - head;
    flow->left -= body;
    for (size_t left = body; left > 0;) {
        size_t room = flow->runs->v[flow->run].len - flow->run_at;
        if (left < room) {
            flow->run_at += left;
            break;
        }
        left -= room;
        flow->run++;
        flow->run_at = 0;
    }
    return body;
}

/* ---- links ---- */

static int link_lost(const struct group_link *link, int error, struct err *err)
{
    return err_set(err, ERR_UNREACHABLE, "party %s is gone in the middle of a transfer: %s", link->name,
                   error ? strerror(error) : "it closed the connection");
}

static bool link_out_ready(struct pump *p, uint32_t peer)
{
    struct flow *out = &p->group->links[peer].out;
    if (out->busy)
        return true;
    struct place place;
    if (!p->ops->next_out(p->job, peer, &out->frame, &place))
        return false;
    out->busy = true;
    out->head_at = 0;
    frame_write(&out->frame, out->head);
    flow_place(out, &place);
    return true;
}

static int link_send(struct pump *p, uint32_t peer, struct err *err)
{
    struct group_link *link = &p->group->links[peer];
    for (size_t sent = 0; sent < LINK_BUDGET && link_out_ready(p, peer);) {
        struct iovec iov[IOV_BATCH + 1];
        struct msghdr msg = {.msg_iov = iov, .msg_iovlen = flow_vectors(&link->out, true, iov)};
        ssize_t got = sendmsg(link->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (got < 0) {
            if (errno == EAGAIN || errno == EWOULDBLOCK)
                return 0;
            if (errno == EINTR)
                continue;
            return link_lost(link, errno, err);
        }
        sent += (size_t)got;
        p->moved += flow_advance(&link->out, (size_t)got);
        link->out.busy = link->out.head_at < FRAME_HEAD_BYTES || link->out.left > 0;
    }
    return 0;
}

static int link_begin_in(struct pump *p, uint32_t peer, struct err *err)
{
    struct group_link *link = &p->group->links[peer];
    struct place place = {0};
    if (!frame_read(link->in.head, &link->in.frame))
        return err_set(err, ERR_PROTOCOL, "party %s sent something that is no frame", link->name);
    if (link->in.frame.seq != p->group->seq)
        return err_set(err, ERR_PROTOCOL, "party %s is at transfer %llu of the group, this one is %llu", link->name,
                       (unsigned long long)link->in.frame.seq, (unsigned long long)p->group->seq);
    int rc = p->ops->begin_in(p->job, peer, &link->in.frame, &place, err);
    if (rc == 0)
        flow_place(&link->in, &place);
    return rc;
}

static int link_receive(struct pump *p, uint32_t peer, struct err *err)
{
    struct group_link *link = &p->group->links[peer];
    struct flow *in = &link->in;
    for (size_t received = 0; received < LINK_BUDGET;) {
        if (!in->busy) {
            if (!p->ops->wants_in(p->job, peer))
                return 0; /* what follows belongs to the next call */
            in->busy = true;
            in->head_at = 0;
            in->left = 0;
        }
        struct iovec iov[IOV_BATCH + 1];
        bool head = in->head_at < FRAME_HEAD_BYTES;
        struct msghdr msg = {.msg_iov = iov, .msg_iovlen = flow_vectors(in, !head, iov)};
        ssize_t got = recvmsg(link->fd, &msg, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return link_lost(link, got < 0 ? errno : 0, err);
        received += (size_t)got;
        size_t body = flow_advance(in, (size_t)got);
        p->group->received += body;
        p->moved += body;
        if (in->head_at < FRAME_HEAD_BYTES)
            continue;
        int rc = head ? link_begin_in(p, peer, err) : 0;
        if (rc < 0)
            return rc;
        if (body > 0 && p->ops->took_in)
            p->ops->took_in(p->job, peer, in->frame.len - in->left);
        if (in->left == 0) {
            in->busy = false;
            p->ops->end_in(p->job, peer, &in->frame);
        }
    }
    return 0;
}

/* ---- the loop ---- */

/* Fills in what each link waits for; false when no link waits for anything. */
static bool pump_wants(struct pump *p)
{
    bool any = false;
    for (uint32_t i = 0; i < p->group->n; i++) {
        struct pollfd *poll = &p->polls[i];
        *poll = (struct pollfd){.fd = -1};
        if (i == p->group->self)
            continue;
        if (p->group->links[i].in.busy || p->ops->wants_in(p->job, i))
            poll->events |= POLLIN;
        if (link_out_ready(p, i))
            poll->events |= POLLOUT;
        if (poll->events != 0) {
            poll->fd = p->group->links[i].fd;
            any = true;
        }
    }
    p->polls[p->group->n] = (struct pollfd){.fd = p->call->cancel_fd, .events = POLLIN};
    return any;
}

static int pump_late(struct pump *p, struct err *err)
{
    char names[256] = "";
    size_t len = 0;
    for (uint32_t i = 0; i < p->group->n && len < sizeof names - AGENT_ID_MAX - 16; i++)
        if (p->polls[i].events != 0)
            len +=
                (size_t)snprintf(names + len, sizeof names - len, "%s%s (%s)", len ? ", " : "", p->group->links[i].name,
                                 p->polls[i].events & POLLIN ? "sends nothing" : "takes nothing");
    return err_set(err, ERR_TIMEOUT, "a transfer stalled after %llu bytes received; waiting for %s",
                   (unsigned long long)p->group->received, names);
}

static void pump_progress(struct pump *p)
{
    if (p->call->progress && p->moved - p->reported >= PROGRESS_BYTES) {
        p->reported = p->moved;
        p->call->progress(p->call->user, p->group->received);
    }
}

static int pump_links(struct pump *p, struct err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < p->group->n && rc == 0; i++) {
        short got = p->polls[i].revents, asked = p->polls[i].events;
        if ((asked & POLLIN) && (got & (POLLIN | POLLHUP | POLLERR)))
            rc = link_receive(p, i, err);
        if (rc == 0 && (asked & POLLOUT) && (got & (POLLOUT | POLLHUP | POLLERR)))
            rc = link_send(p, i, err);
        pump_progress(p);
    }
    return rc;
}

int pump_run(struct transport_group *group, const struct pump_ops *ops, void *job, const struct transport_call *call,
             struct err *err)
{
    struct pump p = {.group = group, .ops = ops, .job = job, .call = call};
    p.polls = calloc(group->n + 1u, sizeof *p.polls);
    if (!p.polls)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = 0;
    while (rc == 0 && pump_wants(&p)) {
        /* The deadline is read again each time: a progress callback may have moved it. */
        int got = poll(p.polls, group->n + 1u, host_poll_ms(call->deadline_ns));
        if (got < 0 && errno != EINTR)
            rc = err_set(err, ERR_IO, "cannot wait for the parties: %s", strerror(errno));
        else if (got > 0 && p.polls[group->n].revents != 0)
            rc = err_set(err, ERR_ABORTED, "the transfer was cancelled");
        else if (got > 0)
            rc = pump_links(&p, err);
        else if (clock_now_ns() >= call->deadline_ns)
            rc = pump_late(&p, err);
    }
    free(p.polls);
    return rc;
}
