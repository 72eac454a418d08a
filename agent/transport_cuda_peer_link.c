/* Messages and descriptors between the agents of a group, over the unix sockets of its mesh.
 *
 * A message is a head of 48 bytes (u32 magic, u32 kind, u64 seq, a, b, c, len, little-endian) and its body.  A
 * descriptor goes with the first byte of its message; heads are read alone, so that each comes with its own.  Worker
 * thread. */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent/transport_cuda_peer_internal.h"

#define NOTE_MAGIC 0x50504545u
#define BODY_MAX   ((uint64_t)256 << 20) /* ten million runs */

static void head_write(const struct note_head *head, uint8_t bytes[NOTE_HEAD_BYTES])
{
    uint32_t words[2] = {htole32(NOTE_MAGIC), htole32((uint32_t)head->kind)};
    uint64_t longs[5] = {htole64(head->seq), htole64(head->a), htole64(head->b), 0, htole64(head->len)};
    memcpy(bytes, words, sizeof words);
    memcpy(bytes + sizeof words, longs, sizeof longs);
}

static bool head_read(const uint8_t bytes[NOTE_HEAD_BYTES], struct note_head *ret_head)
{
    uint32_t words[2];
    uint64_t longs[5];
    memcpy(words, bytes, sizeof words);
    memcpy(longs, bytes + sizeof words, sizeof longs);
    uint32_t kind = le32toh(words[1]);
    uint64_t len = le64toh(longs[4]);
    if (le32toh(words[0]) != NOTE_MAGIC || kind < NOTE_HELLO || kind > NOTE_TAKEN || len > BODY_MAX)
        return false;
    *ret_head = (struct note_head){
        .kind = (enum note_kind)kind,
        .seq = le64toh(longs[0]),
        .a = le64toh(longs[1]),
        .b = le64toh(longs[2]),
        .len = len,
    };
    return true;
}

/* ---- out ---- */

int peer_note(struct peer_group *g, uint32_t peer, const struct note_head *head, const void *body, int fd,
              struct err *err)
{
    struct peer_link *link = &g->links[peer];
    struct note *note = malloc(sizeof *note + NOTE_HEAD_BYTES + (size_t)head->len);
    if (!note)
        return err_set(err, ERR_NOMEM, "out of memory");
    *note = (struct note){.fd = fd, .len = NOTE_HEAD_BYTES + (size_t)head->len};
    head_write(head, note->bytes);
    if (head->len > 0)
        memcpy(note->bytes + NOTE_HEAD_BYTES, body, (size_t)head->len);
    if (!link->notes)
        link->notes_end = &link->notes;
    *link->notes_end = note;
    link->notes_end = &note->next;
    return 0;
}

static int link_lost(const struct peer_group *g, uint32_t peer, int error, struct err *err)
{
    return err_set(err, ERR_UNREACHABLE, "party %s is gone in the middle of a transfer: %s", g->base.links[peer].name,
                   error ? strerror(error) : "it closed the connection");
}

int peer_link_send(struct peer_group *g, uint32_t peer, struct err *err)
{
    struct peer_link *link = &g->links[peer];
    while (link->notes) {
        struct note *note = link->notes;
        struct iovec iov = {note->bytes + note->at, note->len - note->at};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
        _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
        if (note->fd >= 0 && note->at == 0) {
            msg.msg_control = control;
            msg.msg_controllen = sizeof control;
            struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
            *c = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
            memcpy(CMSG_DATA(c), &note->fd, sizeof(int));
        }
        ssize_t sent = sendmsg(g->base.links[peer].fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        /* ETOOMANYREFS: too many descriptors are on their way; the other side takes them off. */
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ETOOMANYREFS))
            return 0;
        if (sent < 0)
            return link_lost(g, peer, errno, err);
        note->at += (size_t)sent;
        if (note->at < note->len)
            continue;
        link->notes = note->next;
        free(note);
    }
    return 0;
}

/* ---- in ---- */

bool peer_link_waits(const struct peer_link *link)
{
    return link->want_hello || link->want_offer || link->want_taken;
}

/* Maps the region whose descriptor has just come. */
static int link_region(struct peer_group *g, uint32_t peer, struct err *err)
{
    struct peer_link *link = &g->links[peer];
    const struct note_head *head = &link->in;
    int fd = link->in_fd;
    if (fd < 0 || head->a != link->n_mapped || head->b == 0 || head->b > SIZE_MAX / 2)
        return err_set(err, ERR_PROTOCOL, "party %s sent region %llu of %llu bytes without memory or out of turn",
                       g->base.links[peer].name, (unsigned long long)head->a, (unsigned long long)head->b);
    if (link->n_mapped == link->cap_mapped) {
        size_t cap = link->cap_mapped ? link->cap_mapped * 2 : 64;
        struct region_mapped *v = realloc(link->mapped, cap * sizeof *v);
        if (!v)
            return err_set(err, ERR_NOMEM, "out of memory");
        link->mapped = v;
        link->cap_mapped = cap;
    }
    struct region_mapped region = {.mapped = (size_t)head->b};
    int rc = cuda_import(g->transport->device, fd, region.mapped, false, &region.at, err);
    if (rc < 0)
        return err_wrap(err, "a region of party %s", g->base.links[peer].name);
    link->mapped[link->n_mapped++] = region;
    close(fd);
    link->in_fd = -1;
    return 0;
}

/* Some bytes of the head (with the descriptor, if there is one) or of the body; 0 = nothing now. */
static ssize_t link_recv(struct peer_group *g, uint32_t peer, void *data, size_t len, struct err *err)
{
    struct peer_link *link = &g->links[peer];
    struct iovec iov = {data, len};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(g->base.links[peer].fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return 0;
    if (got <= 0)
        return link_lost(g, peer, got < 0 ? errno : 0, err);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS || c->cmsg_len != CMSG_LEN(sizeof(int)))
            continue;
        if (link->in_fd >= 0)
            close(link->in_fd);
        memcpy(&link->in_fd, CMSG_DATA(c), sizeof(int));
    }
    return got;
}

static int link_head(struct peer_group *g, uint32_t peer, struct err *err)
{
    struct peer_link *link = &g->links[peer];
    const char *name = g->base.links[peer].name;
    if (!head_read(link->head, &link->in))
        return err_set(err, ERR_PROTOCOL, "party %s sent something that is no message", name);
    if (link->in.seq != g->base.seq)
        return err_set(err, ERR_PROTOCOL, "party %s is at transfer %llu of the group, this one is %llu", name,
                       (unsigned long long)link->in.seq, (unsigned long long)g->base.seq);
    bool expected = link->in.kind == NOTE_HELLO   ? link->want_hello
                    : link->in.kind == NOTE_TAKEN ? link->want_taken
                                                  : link->want_offer;
    if (!expected)
        return err_set(err, ERR_PROTOCOL, "party %s sent a message of kind %d that is not due; the plans differ", name,
                       (int)link->in.kind);
    free(link->body);
    link->body = malloc((size_t)link->in.len + 1);
    link->body_at = 0;
    return link->body ? 0 : err_set(err, ERR_NOMEM, "out of memory");
}

int peer_link_receive(struct peer_group *g, uint32_t peer,
                      int (*take)(void *job, uint32_t peer, const struct note_head *head, const uint8_t *body,
                                  struct err *err),
                      void *job, struct err *err)
{
    struct peer_link *link = &g->links[peer];
    while (peer_link_waits(link)) { /* what follows belongs to the next call */
        bool in_head = link->head_at < NOTE_HEAD_BYTES;
        size_t left = in_head ? NOTE_HEAD_BYTES - link->head_at : (size_t)link->in.len - link->body_at;
        ssize_t got = left == 0 ? 0
                                : link_recv(g, peer, in_head ? link->head + link->head_at : link->body + link->body_at,
                                            left, err);
        if (got < 0)
            return (int)got;
        if (got == 0 && left > 0)
            return 0;
        int rc = 0;
        if (in_head) {
            link->head_at += (size_t)got;
            rc = link->head_at == NOTE_HEAD_BYTES ? link_head(g, peer, err) : 0;
        } else {
            link->body_at += (size_t)got;
        }
        if (rc < 0)
            return rc;
        if (link->head_at < NOTE_HEAD_BYTES || link->body_at < link->in.len)
            continue;
        link->head_at = 0;
        rc = link->in.kind == NOTE_REGION ? link_region(g, peer, err) : take(job, peer, &link->in, link->body, err);
        if (rc < 0)
            return rc;
    }
    return 0;
}

void peer_link_done(struct peer_group *g, uint32_t peer)
{
    struct peer_link *link = &g->links[peer];
    while (link->notes) {
        struct note *note = link->notes;
        link->notes = note->next;
        free(note);
    }
    for (size_t i = 0; i < link->n_mapped; i++)
        cuda_unmap(g->transport->device, link->mapped[i].at, link->mapped[i].mapped);
    if (link->in_fd >= 0)
        close(link->in_fd);
    free(link->mapped);
    free(link->sent);
    free(link->body);
    free(link->copies.v);
}
