/* The transport over GPU memory: agents of one host map each other's regions, and the receiver copies.  No
 * communicator, no kernels of ours: copies only, by the copy engines where the GPUs differ.
 *
 * A group's parties find each other by abstract unix sockets named after the first half of the group id; the second
 * half is the secret by which the mesh of transport_host_mesh.c lets them in, and only processes of the same user are
 * taken.  Messages: transport_cuda_peer_link.c.  Copies: transport_cuda_peer_copy.c.  Worker thread. */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent/transport_cuda_peer_internal.h"
#include "agent/transport_gpu.h"
#include "common/clock.h"

#define NAME_BYTES    16u /* of the group id: not secret */
#define PEER_ID_BYTES (NAME_BYTES + GROUP_ID_BYTES)
#define LOOK_NS       20000                /* between two looks at copies in flight */
#define SLACK_NS      1000ul               /* of the sleep between them; 50000 is usual, a tenth of a small round */
#define CHUNK_BYTES   ((uint64_t)16 << 20) /* of a broadcast: from one sender each */

static int peer_group_id(struct transport *self, struct blob **ret_id, struct err *err)
{
    (void)self;
    return transport_secret(PEER_ID_BYTES, ret_id, err);
}

/* ---- one call: messages and copies until nothing is due any more ---- */

struct call_job {
    struct peer_group *g;
    const struct transport_call *call;
    /* what an offer's bytes are copied to; NULL in group_create */
    int (*offered)(struct call_job *job, uint32_t peer, const struct offer_run *runs, struct err *err);
    const struct extent **to; /* [parties] where the bytes of each go, in the plan's order */
    const uint8_t *have;      /* a broadcast: who sends; else NULL */
};

static int take_hello(struct peer_group *g, uint32_t peer, const struct note_head *head, struct err *err)
{
    const struct cuda_device *device = g->transport->device;
    uint64_t words[2] = {htole64(head->a), htole64(head->b)};
    unsigned char uuid[16];
    int index;
    bool reaches;
    memcpy(uuid, words, sizeof words);
    g->links[peer].want_hello = false;
    int rc = peer_gpu_reach(device, uuid, &index, &reaches, err);
    if (rc == 0 && index < 0)
        return err_set(err, ERR_UNSUPPORTED, "the GPU of party %s is not visible here; see CUDA_VISIBLE_DEVICES",
                       g->base.links[peer].name);
    if (rc == 0 && !reaches)
        rc = err_set(err, ERR_UNSUPPORTED, "GPU %d cannot reach GPU %d of party %s; use another transport",
                     device->gpu.index, index, g->base.links[peer].name);
    return rc;
}

static int take_offer(struct call_job *job, uint32_t peer, const struct note_head *head, const uint8_t *body,
                      struct err *err)
{
    struct peer_group *g = job->g;
    struct peer_link *link = &g->links[peer];
    const char *name = g->base.links[peer].name;
    if (head->a != link->expected)
        return err_set(err, ERR_PROTOCOL, "party %s sends %llu bytes where the plan has %llu; the plans differ", name,
                       (unsigned long long)head->a, (unsigned long long)link->expected);
    size_t n = (size_t)head->len / sizeof(struct offer_run);
    struct offer_run *runs = calloc(n + 1, sizeof *runs);
    if (!runs)
        return err_set(err, ERR_NOMEM, "out of memory");
    uint64_t total = 0;
    int rc = 0;
    for (size_t i = 0; i < n && rc == 0; i++) {
        memcpy(&runs[i], body + i * sizeof *runs, sizeof *runs);
        runs[i] = (struct offer_run){le64toh(runs[i].region), le64toh(runs[i].offset), le64toh(runs[i].len)};
        const struct offer_run *r = &runs[i];
        if (r->region >= link->n_mapped || r->offset > link->mapped[r->region].mapped ||
            r->len > link->mapped[r->region].mapped - r->offset || r->len > link->expected - total)
            rc = err_set(err, ERR_PROTOCOL, "party %s offers bytes outside of its memory", name);
        else
            total += r->len;
    }
    if (rc == 0 && total != link->expected)
        rc = err_set(err, ERR_PROTOCOL, "party %s offers %llu bytes but lists %llu", name, (unsigned long long)head->a,
                     (unsigned long long)total);
    if (rc == 0)
        rc = job->offered(job, peer, runs, err);
    free(runs);
    link->want_offer = false;
    return rc;
}

static int take_note(void *user, uint32_t peer, const struct note_head *head, const uint8_t *body, struct err *err)
{
    struct call_job *job = user;
    struct peer_link *link = &job->g->links[peer];
    switch (head->kind) {
    case NOTE_HELLO:
        return take_hello(job->g, peer, head, err);
    case NOTE_OFFER:
        return take_offer(job, peer, head, body, err);
    default:
        break;
    }
    link->want_taken = head->b == 0;
    if (job->call->progress)
        job->call->progress(job->call->user, job->g->base.received);
    return 0;
}

/* Tells the source what has been copied; nothing for copies inside this party's own memory. */
static int tell_taken(struct peer_group *g, uint32_t peer, struct err *err)
{
    struct peer_link *link = &g->links[peer];
    const struct note_head head = {
        .kind = NOTE_TAKEN,
        .seq = g->base.seq,
        .a = link->taken,
        .b = link->taken == link->to_take,
    };
    return peer == g->base.self ? 0 : peer_note(g, peer, &head, NULL, -1, err);
}

static int call_copies(struct call_job *job, struct err *err)
{
    struct peer_group *g = job->g;
    struct batch batch;
    int rc;
    while ((rc = peer_copies_finish(g, &batch, err)) > 0) {
        g->links[batch.peer].taken += batch.bytes;
        if (batch.peer != g->base.self)
            g->base.received += batch.bytes;
        rc = tell_taken(g, batch.peer, err);
        if (rc < 0)
            return rc;
        if (job->call->progress)
            job->call->progress(job->call->user, g->base.received);
    }
    return rc < 0 ? rc : peer_copies_start(g, err);
}

/* Fills in what each link waits for; false when nothing is due any more. */
static bool call_wants(const struct peer_group *g, struct pollfd *polls)
{
    bool any = g->n_batches > 0;
    for (uint32_t i = 0; i < g->base.n; i++) {
        const struct peer_link *link = &g->links[i];
        polls[i] = (struct pollfd){.fd = -1};
        if (peer_link_waits(link))
            polls[i].events |= POLLIN;
        if (link->notes)
            polls[i].events |= POLLOUT;
        if (polls[i].events == 0)
            continue;
        polls[i].fd = g->base.links[i].fd;
        any = true;
    }
    return any;
}

static int call_late(const struct peer_group *g, struct err *err)
{
    char names[256] = "";
    size_t len = 0;
    for (uint32_t i = 0; i < g->base.n && len < sizeof names - AGENT_ID_MAX - 16; i++) {
        const struct peer_link *link = &g->links[i];
        if (peer_link_waits(link) || link->notes)
            len +=
                (size_t)snprintf(names + len, sizeof names - len, "%s%s (%s)", len ? ", " : "", g->base.links[i].name,
                                 link->want_hello || link->want_offer ? "sends nothing" : "takes nothing");
    }
    return err_set(err, ERR_TIMEOUT, "a transfer stalled after %llu bytes received; waiting for %s",
                   (unsigned long long)g->base.received, len ? names : "copies on the GPU");
}

static int call_links(struct call_job *job, const struct pollfd *polls, struct err *err)
{
    struct peer_group *g = job->g;
    int rc = 0;
    for (uint32_t i = 0; i < g->base.n && rc == 0; i++) {
        if (polls[i].revents == 0)
            continue;
        if (polls[i].events & POLLIN)
            rc = peer_link_receive(g, i, take_note, job, err);
        if (rc == 0 && (polls[i].events & POLLOUT))
            rc = peer_link_send(g, i, err);
    }
    return rc;
}

static int call_loop(struct call_job *job, struct pollfd *polls, struct err *err)
{
    struct peer_group *g = job->g;
    const uint32_t n = g->base.n;
    for (;;) {
        int rc = call_copies(job, err);
        if (rc < 0 || !call_wants(g, polls))
            return rc;
        polls[n] = (struct pollfd){.fd = job->call->cancel_fd, .events = POLLIN};
        /* Copies do not wake us: look again soon.  The deadline is read again, progress may have moved it. */
        int ms = host_poll_ms(job->call->deadline_ns);
        struct timespec wait = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
        if (g->n_batches > 0)
            wait = (struct timespec){.tv_nsec = LOOK_NS};
        int got = ppoll(polls, n + 1u, &wait, NULL);
        if (got < 0 && errno != EINTR)
            return err_set(err, ERR_IO, "cannot wait for the parties: %s", strerror(errno));
        if (got > 0 && polls[n].revents != 0)
            return err_set(err, ERR_ABORTED, "the transfer was cancelled");
        if (got > 0 && (rc = call_links(job, polls, err)) < 0)
            return rc;
        if (got <= 0 && clock_now_ns() >= job->call->deadline_ns)
            return call_late(g, err);
    }
}

static int call_run(struct call_job *job, struct err *err)
{
    struct pollfd *polls = calloc(job->g->base.n + 1u, sizeof *polls);
    (void)prctl(PR_SET_TIMERSLACK, SLACK_NS); /* of this thread; where it fails, ends are noticed later */
    int rc = polls ? call_loop(job, polls, err) : err_set(err, ERR_NOMEM, "out of memory");
    free(polls);
    if (rc < 0)
        peer_copies_drop(job->g); /* nothing may write into slots that are the caller's again */
    return rc;
}

/* ---- offers and what is made of them ---- */

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
    uint64_t total = g->links[peer].expected, at = 0;
    uint32_t senders = 0, place = 0;
    struct cursor theirs = {0}, ours = {0};
    for (uint32_t i = 0; i < g->base.n; i++) {
        if (i == peer)
            place = senders;
        senders += job->have[i] == TRANSPORT_HAS;
    }
    for (uint64_t chunk = 0; chunk * CHUNK_BYTES < total; chunk++) {
        if ((chunk + g->base.self) % senders != place)
            continue;
        uint64_t from = chunk * CHUNK_BYTES, to = from + CHUNK_BYTES < total ? from + CHUNK_BYTES : total;
        int rc = offer_copy(job, peer, runs, &theirs, &ours, &at, from, to, err);
        if (rc < 0)
            return rc;
    }
    return g->links[peer].to_take == 0 ? tell_taken(job->g, peer, err) : 0;
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
    return rc < 0 ? rc : call_run(job, err);
}

static int peer_move(struct transport_group *group, const struct transfer *items, size_t n,
                     const struct transport_call *call, uint64_t *ret_bytes, struct err *err)
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
    return rc < 0 ? rc : call_run(job, err);
}

static int peer_broadcast(struct transport_group *group, const struct extent *extents, size_t n, const uint8_t *have,
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

/* ---- groups ---- */

static void peer_group_destroy(struct transport_group *group)
{
    if (!group)
        return;
    struct peer_group *g = (struct peer_group *)group;
    const struct cuda_driver *cu = &g->transport->device->driver;
    bool usable = cuda_device_use(g->transport->device, NULL) == 0; /* else there is nothing that could still run */
    if (usable)
        peer_copies_drop(g);
    for (uint32_t i = 0; i < g->base.n; i++)
        peer_link_done(g, i);
    for (unsigned i = 0; i < PEER_BATCHES && usable; i++)
        if (g->batches[i].done)
            (void)cu->cuEventDestroy(g->batches[i].done);
    for (unsigned i = 0; i < PEER_STREAMS && usable; i++)
        if (g->streams[i])
            (void)cu->cuStreamDestroy(g->streams[i]);
    for (uint32_t i = 0; i < g->base.n; i++)
        if (g->base.links[i].fd >= 0)
            close(g->base.links[i].fd);
    free(g->base.links);
    free(g->links);
    free(g);
}

/* "unix:@eep-<hex of the id's first half>-<party>" */
static void party_address(const struct blob *id, uint32_t party, char address[ADDRESS_MAX])
{
    size_t at = (size_t)snprintf(address, ADDRESS_MAX, "unix:@eep-");
    for (size_t i = 0; i < NAME_BYTES; i++)
        at += (size_t)snprintf(address + at, ADDRESS_MAX - at, "%02x", id->data[i]);
    snprintf(address + at, ADDRESS_MAX - at, "-%u", party);
}

static int party_listen(const char *address, int *ret_fd, struct err *err)
{
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    memcpy(un.sun_path + 1, address + strlen("unix:@"), strlen(address) - strlen("unix:@"));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_set(err, ERR_NOMEM, "cannot make a socket: %s", strerror(errno));
    if (bind(fd, (const struct sockaddr *)&un, sizeof un) < 0 || listen(fd, (int)GUESTS_MAX) < 0) {
        int rc = err_set(err, ERR_CONFLICT, "cannot listen for the other parties of a group: %s", strerror(errno));
        close(fd);
        return rc;
    }
    *ret_fd = fd;
    return 0;
}

/* Anybody on this host can connect to an abstract name: the other end must be ours as well. */
static int group_peers_check(const struct transport_group *mesh, struct err *err)
{
    for (uint32_t i = 0; i < mesh->n; i++) {
        struct ucred cred;
        if (i == mesh->self)
            continue;
        if (getsockopt(mesh->links[i].fd, SOL_SOCKET, SO_PEERCRED, &cred, &(socklen_t){sizeof cred}) < 0)
            return err_set(err, ERR_IO, "cannot tell who party %s is: %s", mesh->links[i].name, strerror(errno));
        if (cred.uid != geteuid() && cred.uid != 0)
            return err_set(err, ERR_DENIED, "party %s is a process of another user (%u)", mesh->links[i].name,
                           (unsigned)cred.uid);
    }
    return 0;
}

/* The sockets of the group, as the host transport connects them. */
static int group_connect(const struct blob *id, const struct member *parties, uint32_t n, uint32_t self,
                         const struct transport_call *call, struct transport_group **ret_mesh, struct err *err)
{
    struct member *here = calloc(n, sizeof *here);
    struct transport_host *host = calloc(1, sizeof *host);
    struct blob *secret = blob_new(id->data + NAME_BYTES, GROUP_ID_BYTES);
    struct transport_group *mesh = NULL;
    int rc = 0;
    if (!here || !host || !secret) {
        rc = err_set(err, ERR_NOMEM, "out of memory");
        goto out;
    }
    for (uint32_t i = 0; i < n; i++) {
        here[i] = parties[i];
        party_address(id, i, here[i].data_address);
    }
    rc = party_listen(here[self].data_address, &host->listen_fd, err);
    if (rc < 0)
        goto out;
    rc = host_group_create(&host->base, secret, here, n, self, call, &mesh, err);
    host_guests_sweep(host, true);
    close(host->listen_fd);
    if (rc < 0)
        goto out;
    mesh->host = NULL;
    rc = group_peers_check(mesh, err);
    if (rc < 0)
        host_group_destroy(mesh);
    else
        *ret_mesh = mesh;
out:
    if (secret)
        blob_unref(secret);
    free(host);
    free(here);
    return rc;
}

static int group_gpu(struct peer_group *g, struct err *err)
{
    const struct cuda_driver *cu = &g->transport->device->driver;
    int rc = cuda_device_use(g->transport->device, err);
    for (unsigned i = 0; i < PEER_STREAMS && rc == 0; i++)
        rc = cuda_check(cu, cu->cuStreamCreate(&g->streams[i], CU_STREAM_NON_BLOCKING), err, "create a stream");
    for (unsigned i = 0; i < PEER_BATCHES && rc == 0; i++)
        rc = cuda_check(cu, cu->cuEventCreate(&g->batches[i].done, CU_EVENT_DISABLE_TIMING), err, "create an event");
    return rc;
}

static int group_hello(struct peer_group *g, const struct transport_call *call, struct err *err)
{
    const struct cuda_device *device = g->transport->device;
    struct call_job job = {.g = g, .call = call};
    CUuuid uuid;
    uint64_t words[2];
    int rc = cuda_check(&device->driver, device->driver.cuDeviceGetUuid(&uuid, device->device), err,
                        "ask GPU %d for its UUID", device->gpu.index);
    memcpy(words, uuid.bytes, sizeof words);
    const struct note_head head = {.kind = NOTE_HELLO, .a = le64toh(words[0]), .b = le64toh(words[1])};
    for (uint32_t i = 0; i < g->base.n && rc == 0; i++) {
        if (i == g->base.self)
            continue;
        g->links[i].want_hello = true;
        rc = peer_note(g, i, &head, NULL, -1, err);
    }
    return rc < 0 ? rc : call_run(&job, err);
}

static int peer_group_create(struct transport *self, const struct blob *id, const struct member *parties, uint32_t n,
                             uint32_t self_party, const struct transport_call *call, struct transport_group **ret_group,
                             struct err *err)
{
    struct transport_group *mesh = NULL;
    if (!id || id->len != PEER_ID_BYTES)
        return err_set(err, ERR_INVALID, "a group id has %u bytes", PEER_ID_BYTES);
    if (n == 0 || n > RANKS_MAX || self_party >= n)
        return err_set(err, ERR_INVALID, "a group cannot have %u parties, of which this is %u", n, self_party);
    for (uint32_t i = 0; i < n; i++)
        if (parties[i].node != parties[self_party].node)
            return err_set(err, ERR_UNSUPPORTED,
                           "party %s is on another host (node %u, this is %u), where transport cuda_peer does not "
                           "reach; use another one",
                           parties[i].id, parties[i].node, parties[self_party].node);
    int rc = group_connect(id, parties, n, self_party, call, &mesh, err);
    if (rc < 0)
        return rc;
    struct peer_group *g = calloc(1, sizeof *g);
    struct peer_link *links = calloc(n, sizeof *links);
    if (!g || !links) {
        free(g);
        free(links);
        host_group_destroy(mesh);
        return err_set(err, ERR_NOMEM, "out of memory");
    }
    g->base = *mesh; /* its sockets are ours now */
    free(mesh);
    g->transport = (struct transport_cuda_peer *)self;
    g->links = links;
    for (uint32_t i = 0; i < n; i++)
        links[i].in_fd = -1;
    rc = group_gpu(g, err);
    if (rc == 0)
        rc = group_hello(g, call, err);
    if (rc < 0)
        peer_group_destroy(&g->base);
    else
        *ret_group = &g->base;
    return rc;
}

/* ---- the table ---- */

static int peer_health(struct transport *self, struct err *err)
{
    (void)self;
    return cuda_health(err);
}

static void peer_close(struct transport *self)
{
    cuda_device_close(((struct transport_cuda_peer *)self)->device);
    free(self);
}

bool transport_cuda_peer_tune(struct transport *transport, const struct peer_tuning *tuning)
{
    struct transport_cuda_peer *t = (struct transport_cuda_peer *)transport;
    if (tuning->streams == 0 || tuning->streams > PEER_STREAMS ||
        (tuning->batched && !cuda_copies_batched(&t->device->driver)))
        return false;
    t->tuning = *tuning;
    return true;
}

struct transport *transport_cuda_peer_open(const char *device, struct err *err)
{
    struct transport_cuda_peer *t = calloc(1, sizeof *t);
    if (!t) {
        err_set(err, ERR_NOMEM, "out of memory");
        return NULL;
    }
    if (cuda_device_open(device, &t->device, err) < 0) {
        err_wrap(err, "transport \"cuda_peer\"");
        free(t);
        return NULL;
    }
    t->tuning = (struct peer_tuning){.streams = 4, .batched = cuda_copies_batched(&t->device->driver)};
    t->base = (struct transport){
        .name = "cuda_peer",
        .group_id = peer_group_id,
        .group_create = peer_group_create,
        .move = peer_move,
        .broadcast = peer_broadcast,
        .destroy = peer_group_destroy,
        .health = peer_health,
        .close = peer_close,
    };
    return &t->base;
}
