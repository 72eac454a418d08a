/* The all-to-all.  Sleeps in poll; sends and receives at once, so that full socket buffers cannot lock two ranks.
 * See mesh.h.  Stepping thread. */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "common/clock.h"
#include "tests/engine/mesh_private.h"

#define MESH_MAGIC     0x4853454du /* "MESH" */
#define MESH_BYTES_MAX ((uint64_t)256 << 20)

const struct mesh_peer *mesh_peers(const struct mesh *mesh)
{
    return mesh->peers;
}

uint32_t mesh_size(const struct mesh *mesh)
{
    return mesh->n;
}

uint32_t mesh_self(const struct mesh *mesh)
{
    return mesh->self;
}

bool mesh_matches(const struct mesh *mesh, const struct mesh_peer *peers, uint32_t n, uint32_t self)
{
    if (mesh->n != n || mesh->self != self)
        return false;
    for (uint32_t r = 0; r < n; r++) {
        if (mesh->peers[r].id != peers[r].id || mesh->peers[r].serving != peers[r].serving)
            return false;
    }
    return true;
}

void *mesh_bytes_add(struct mesh_bytes *b, size_t more)
{
    if (b->len + more > b->cap) {
        size_t cap = b->cap ? b->cap : 4096;
        while (cap < b->len + more)
            cap *= 2;
        uint8_t *data = realloc(b->data, cap);
        if (!data)
            return NULL;
        b->data = data;
        b->cap = cap;
    }
    void *at = b->data + b->len;
    b->len += more;
    return at;
}

void mesh_bytes_done(struct mesh_bytes *b)
{
    free(b->data);
    memset(b, 0, sizeof *b);
}

/* Sends what the socket takes.  False: the connection is gone. */
static bool link_send(struct mesh_link *l, const struct mesh_bytes *out)
{
    size_t total = sizeof l->tx + out->len;
    while (l->sent < total) {
        struct iovec v[2];
        struct msghdr m = {.msg_iov = v};
        if (l->sent < sizeof l->tx)
            v[m.msg_iovlen++] = (struct iovec){(uint8_t *)&l->tx + l->sent, sizeof l->tx - l->sent};
        size_t body = l->sent > sizeof l->tx ? l->sent - sizeof l->tx : 0;
        if (body < out->len)
            v[m.msg_iovlen++] = (struct iovec){out->data + body, out->len - body};
        ssize_t n = sendmsg(l->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN || errno == EWOULDBLOCK;
        l->sent += (size_t)n;
    }
    return true;
}

static int stamp_check(const struct mesh_header *h, const struct mesh_stamp *s, uint32_t rank, struct err *err)
{
    if (h->magic != MESH_MAGIC || h->bytes > MESH_BYTES_MAX)
        return err_set(err, ERR_PROTOCOL, "rank %u sent something that is no message of a mesh", rank);
    if (h->stamp.epoch != s->epoch || h->stamp.step != s->step || h->stamp.layer != s->layer ||
        h->stamp.phase != s->phase)
        return err_set(err, ERR_PROTOCOL,
                       "rank %u is in epoch %" PRIu64 " step %" PRIu64 " layer %u phase %u, this rank in epoch %" PRIu64
                       " step %" PRIu64 " layer %u phase %u",
                       rank, h->stamp.epoch, h->stamp.step, h->stamp.layer, h->stamp.phase, s->epoch, s->step, s->layer,
                       s->phase);
    return 0;
}

/* Receives what is there.  ERR_UNREACHABLE: the connection is gone. */
static int link_receive(struct mesh_link *l, const struct mesh_stamp *stamp, uint32_t rank, struct mesh_bytes *in,
                        struct err *err)
{
    for (;;) {
        bool header = l->received < sizeof l->rx;
        size_t body = header ? 0 : l->received - sizeof l->rx;
        if (!header && body == l->rx.bytes)
            return 0;
        void *to = header ? (uint8_t *)&l->rx + l->received : in->data + body;
        size_t room = header ? sizeof l->rx - l->received : l->rx.bytes - body;
        ssize_t n = recv(l->fd, to, room, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (n <= 0)
            return ERR_UNREACHABLE;
        l->received += (size_t)n;
        if (l->received != sizeof l->rx)
            continue;
        int rc = stamp_check(&l->rx, stamp, rank, err);
        if (rc)
            return rc;
        in->len = 0;
        if (l->rx.bytes && !mesh_bytes_add(in, l->rx.bytes))
            return err_set(err, ERR_NOMEM, "out of memory for %" PRIu64 " bytes of rank %u", l->rx.bytes, rank);
    }
}

static bool link_received(const struct mesh_link *l)
{
    return l->received >= sizeof l->rx && l->received - sizeof l->rx == l->rx.bytes;
}

struct exchange {
    struct mesh *mesh;
    const struct mesh_stamp *stamp;
    const struct mesh_wait *wait;
    struct mesh_bytes *out, *in;
    uint64_t deadline_ms;
    bool stopping;
};

/* One turn over all links: *ret_open counts those that are not through. */
static int exchange_turn(struct exchange *x, struct pollfd *polls, uint32_t *ret_open, struct err *err)
{
    uint32_t open = 0;
    for (uint32_t r = 0; r < x->mesh->n; r++) {
        struct mesh_link *l = &x->mesh->link[r];
        polls[r] = (struct pollfd){.fd = -1};
        if (l->fd < 0)
            continue;
        if (!l->broken && !link_send(l, &x->out[r]))
            l->broken = true; /* what it sent before may still be there to read */
        int rc = link_received(l) ? 0 : link_receive(l, x->stamp, r, &x->in[r], err);
        if (rc == ERR_UNREACHABLE)
            l->broken = true;
        else if (rc)
            return rc;
        bool sent = l->sent == sizeof l->tx + x->out[r].len;
        if (sent && link_received(l))
            continue;
        open++;
        if (!l->broken)
            polls[r] =
                (struct pollfd){.fd = l->fd, .events = (short)((sent ? 0 : POLLOUT) | (link_received(l) ? 0 : POLLIN))};
    }
    *ret_open = open;
    return 0;
}

static int exchange_timeout(const struct exchange *x, struct err *err)
{
    for (uint32_t r = 0; r < x->mesh->n; r++) {
        const struct mesh_link *l = &x->mesh->link[r];
        if (l->fd >= 0 && !link_received(l))
            return err_set(err, x->stopping ? ERR_ABORTED : ERR_TIMEOUT,
                           "rank %u (%s) %s in step %" PRIu64 " layer %u, and no revoke came", r,
                           x->mesh->peers[r].address, l->broken ? "closed its connection" : "is silent", x->stamp->step,
                           x->stamp->layer);
    }
    return err_set(err, ERR_TIMEOUT, "a peer does not take what step %" PRIu64 " sends it", x->stamp->step);
}

static int exchange_loop(struct exchange *x, struct pollfd *polls, struct err *err)
{
    uint32_t n = x->mesh->n, open;
    for (;;) {
        int rc = exchange_turn(x, polls, &open, err);
        if (rc || open == 0)
            return rc;
        uint64_t now = clock_now_ms();
        if (now >= x->deadline_ms)
            return exchange_timeout(x, err);
        polls[n] = (struct pollfd){.fd = x->wait->revoke_fd, .events = POLLIN};
        polls[n + 1] = (struct pollfd){.fd = x->stopping ? -1 : x->wait->stop_fd, .events = POLLIN};
        if (poll(polls, n + 2, (int)(x->deadline_ms - now)) < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "poll: %s", strerror(errno));
        if (polls[n].revents & POLLIN)
            return err_set(err, ERR_ABORTED, "revoked in step %" PRIu64 " layer %u", x->stamp->step, x->stamp->layer);
        if (polls[n + 1].revents & POLLIN) {
            x->stopping = true;
            x->deadline_ms = x->deadline_ms < now + 1000 ? x->deadline_ms : now + 1000;
        }
    }
}

int mesh_exchange(struct mesh *mesh, const struct mesh_stamp *stamp, const struct mesh_wait *wait, uint32_t *flags,
                  struct mesh_bytes *out, struct mesh_bytes *in, struct err *err)
{
    struct pollfd polls[mesh->n + 2];
    struct exchange x = {mesh, stamp, wait, out, in, clock_now_ms() + wait->limit_ms, false};
    for (uint32_t r = 0; r < mesh->n; r++) {
        struct mesh_link *l = &mesh->link[r];
        memset(&l->tx, 0, sizeof l->tx);
        l->tx.magic = MESH_MAGIC;
        l->tx.flags = *flags;
        l->tx.stamp = *stamp;
        l->tx.bytes = out[r].len;
        l->sent = l->received = 0;
        if (l->fd < 0)
            in[r].len = 0;
    }
    int rc = exchange_loop(&x, polls, err);
    if (rc)
        return rc;
    struct mesh_bytes own = in[mesh->self];
    in[mesh->self] = out[mesh->self];
    out[mesh->self] = own;
    for (uint32_t r = 0; r < mesh->n; r++) {
        if (mesh->link[r].fd >= 0)
            *flags |= mesh->link[r].rx.flags;
    }
    return 0;
}
