/* Frames with descriptors: see engine_frame.h.
 *
 * The kernel attaches descriptors to the bytes of one sendmsg, and never delivers the descriptors of two sends in one
 * recvmsg.  So the descriptors of a frame are here at the latest when its bytes are, in the order of the frames: a
 * queue of them, and a count in the header, is all it takes, however the bytes were cut. */
#include "agent/engine_frame.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/rpc.h"

#define HEADER_BYTES 8u
#define READ_BYTES (64u << 10)
#define RECV_FDS 253u /* SCM_MAX_FD of the kernel */
#define KEEP_BYTES (1u << 20)

struct engine_out {
    struct engine_out *next;
    unsigned n_fds; /* not sent yet */
    int fds[ENGINE_FRAME_FDS_MAX];
    size_t len, sent;
    uint8_t data[];
};

static void close_all(int *fds, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
        fds[i] = -1;
    }
}

void engine_frame_done(struct engine_frame *frame)
{
    close_all(frame->fds, frame->n_fds);
    frame->n_fds = 0;
}

int engine_frame_take(struct engine_frame *frame, unsigned i)
{
    if (i >= frame->n_fds)
        return -1;
    int fd = frame->fds[i];
    frame->fds[i] = -1;
    return fd;
}

/* ---- receiving ---- */

void engine_reader_done(struct engine_reader *r)
{
    close_all(r->fds, r->n_fds);
    free(r->buf);
    memset(r, 0, sizeof *r);
}

/* Room for `room` more bytes behind the unread ones. */
static int reader_reserve(struct engine_reader *r, size_t room, struct err *err)
{
    if (r->start == r->end) {
        r->start = r->end = 0;
        if (r->cap > KEEP_BYTES && room <= KEEP_BYTES) {
            free(r->buf);
            r->buf = NULL;
            r->cap = 0;
        }
    }
    if (r->cap - r->end >= room)
        return 0;
    if (r->start > 0) {
        memmove(r->buf, r->buf + r->start, r->end - r->start);
        r->end -= r->start;
        r->start = 0;
    }
    if (r->cap - r->end >= room)
        return 0;
    size_t cap = r->end + room;
    uint8_t *buf = realloc(r->buf, cap);
    if (!buf)
        return err_set(err, ERR_NOMEM, "no memory for a message of %zu bytes", cap);
    r->buf = buf;
    r->cap = cap;
    return 0;
}

/* The lengths in the header at the start of the unread bytes.  false: not there yet. */
static bool reader_header(const struct engine_reader *r, uint32_t *ret_len, unsigned *ret_type, unsigned *ret_fds)
{
    if (r->end - r->start < HEADER_BYTES)
        return false;
    uint32_t len;
    uint16_t half[2];
    memcpy(&len, r->buf + r->start, sizeof len);
    memcpy(half, r->buf + r->start + 4, sizeof half);
    *ret_len = ntohl(len);
    *ret_type = ntohs(half[0]);
    *ret_fds = ntohs(half[1]);
    return true;
}

static int reader_take_fds(struct engine_reader *r, struct msghdr *msg, struct err *err)
{
    int rc = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (r->n_fds < sizeof r->fds / sizeof r->fds[0]) {
                r->fds[r->n_fds++] = fd;
            } else {
                close(fd);
                rc = ERR_PROTOCOL;
            }
        }
    }
    if (msg->msg_flags & MSG_CTRUNC)
        return err_set(err, ERR_NOMEM, "descriptors were lost on the engine socket: is RLIMIT_NOFILE large enough?");
    return rc ? err_set(err, rc, "the peer sends descriptors that no message claims") : 0;
}

int engine_reader_fill(struct engine_reader *r, int sock, struct err *err)
{
    size_t room = READ_BYTES;
    uint32_t len;
    unsigned type, n_fds;
    if (reader_header(r, &len, &type, &n_fds)) {
        if (len > ENGINE_FRAME_BYTES_MAX)
            return err_set(err, ERR_PROTOCOL, "a message of %u bytes; the limit is %u", len, ENGINE_FRAME_BYTES_MAX);
        size_t whole = HEADER_BYTES + (size_t)len;
        if (whole > r->end - r->start)
            room = whole - (r->end - r->start);
    }
    int rc = reader_reserve(r, room, err);
    if (rc)
        return rc;

    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(RECV_FDS * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = r->buf + r->end, .iov_len = r->cap - r->end};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                         .msg_controllen = sizeof control.bytes};
    ssize_t got;
    do
        got = recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return 0;
    if (got == 0 || (got < 0 && errno == ECONNRESET))
        return err_set(err, ERR_UNREACHABLE, "connection closed");
    if (got < 0)
        return err_set(err, ERR_IO, "read error: %s", strerror(errno));
    rc = reader_take_fds(r, &msg, err);
    if (rc)
        return rc;
    r->end += (size_t)got;
    return 1;
}

int engine_reader_next(struct engine_reader *r, unsigned type, struct engine_frame *ret_frame, struct err *err)
{
    uint32_t len;
    unsigned got_type, n_fds;
    if (!reader_header(r, &len, &got_type, &n_fds))
        return 0;
    if (len > ENGINE_FRAME_BYTES_MAX)
        return err_set(err, ERR_PROTOCOL, "a message of %u bytes; the limit is %u", len, ENGINE_FRAME_BYTES_MAX);
    if (got_type != type)
        return err_set(err, ERR_PROTOCOL, "a message of type %u where type %u is spoken", got_type, type);
    if (n_fds > ENGINE_FRAME_FDS_MAX)
        return err_set(err, ERR_PROTOCOL, "a message with %u descriptors; the limit is %u", n_fds, ENGINE_FRAME_FDS_MAX);
    if (r->end - r->start < HEADER_BYTES + (size_t)len)
        return 0;
    if (n_fds > r->n_fds)
        return err_set(err, ERR_PROTOCOL, "a message says %u descriptors, %u came", n_fds, r->n_fds);
    ret_frame->type = got_type;
    ret_frame->len = len;
    ret_frame->data = r->buf + r->start + HEADER_BYTES;
    ret_frame->n_fds = n_fds;
    if (n_fds > 0) {
        memcpy(ret_frame->fds, r->fds, n_fds * sizeof(int));
        r->n_fds -= n_fds;
        memmove(r->fds, r->fds + n_fds, r->n_fds * sizeof(int));
    }
    r->start += HEADER_BYTES + (size_t)len;
    return 1;
}

/* ---- sending ---- */

static void out_free(struct engine_out *out)
{
    close_all(out->fds, out->n_fds);
    free(out);
}

void engine_writer_done(struct engine_writer *w)
{
    while (w->head) {
        struct engine_out *next = w->head->next;
        out_free(w->head);
        w->head = next;
    }
    memset(w, 0, sizeof *w);
}

int engine_writer_push(struct engine_writer *w, unsigned type, const ProtobufCMessage *message, const int *fds,
                       unsigned n_fds, struct err *err)
{
    size_t len = protobuf_c_message_get_packed_size(message);
    if (len > ENGINE_FRAME_BYTES_MAX || n_fds > ENGINE_FRAME_FDS_MAX)
        return err_set(err, ERR_LIMIT, "a message of %zu bytes and %u descriptors; the limits are %u and %u", len,
                       n_fds, ENGINE_FRAME_BYTES_MAX, ENGINE_FRAME_FDS_MAX);
    struct engine_out *out = malloc(sizeof *out + HEADER_BYTES + len);
    if (!out)
        return err_set(err, ERR_NOMEM, "no memory for a message of %zu bytes", len);
    memset(out, 0, sizeof *out);
    for (unsigned i = 0; i < n_fds; i++) {
        out->fds[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 0);
        if (out->fds[i] < 0) {
            int saved = errno;
            out_free(out);
            return err_set(err, ERR_NOMEM, "cannot duplicate a descriptor: %s", strerror(saved));
        }
        out->n_fds = i + 1;
    }
    uint32_t be_len = htonl((uint32_t)len);
    uint16_t half[2] = {htons((uint16_t)type), htons((uint16_t)n_fds)};
    memcpy(out->data, &be_len, sizeof be_len);
    memcpy(out->data + 4, half, sizeof half);
    protobuf_c_message_pack(message, out->data + HEADER_BYTES);
    out->len = HEADER_BYTES + len;
    if (!w->tail || !w->head)
        w->tail = &w->head;
    *w->tail = out;
    w->tail = &out->next;
    w->bytes += out->len;
    return 0;
}

static ssize_t out_send(struct engine_out *out, int sock)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(ENGINE_FRAME_FDS_MAX * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = out->data + out->sent, .iov_len = out->len - out->sent};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (out->n_fds > 0) {
        memset(&control, 0, sizeof control);
        msg.msg_control = control.bytes;
        msg.msg_controllen = CMSG_SPACE(out->n_fds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(out->n_fds * sizeof(int));
        memcpy(CMSG_DATA(c), out->fds, out->n_fds * sizeof(int));
    }
    ssize_t sent;
    do
        sent = sendmsg(sock, &msg, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent > 0) {
        out->sent += (size_t)sent;
        close_all(out->fds, out->n_fds); /* they went with the first byte */
        out->n_fds = 0;
    }
    return sent;
}

int engine_writer_flush(struct engine_writer *w, int sock, struct err *err)
{
    while (w->head) {
        struct engine_out *out = w->head;
        ssize_t sent = out_send(out, sock);
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return 0;
        if (sent < 0 && (errno == EPIPE || errno == ECONNRESET))
            return err_set(err, ERR_UNREACHABLE, "connection closed");
        if (sent < 0)
            return err_set(err, ERR_IO, "write error: %s", strerror(errno));
        if (out->sent == out->len) {
            w->head = out->next;
            w->bytes -= out->len;
            out_free(out);
        }
    }
    return 1;
}

ProtobufCMessage *engine_frame_unpack(const ProtobufCMessageDescriptor *descriptor, const struct engine_frame *frame)
{
    /* A packed integer of one byte becomes four, and an empty sub-message of two bytes a struct of a hundred. */
    size_t budget = (64u << 10) + 64 * frame->len;
    ProtobufCMessage *message;
    return rpc_unpack(descriptor, frame->data, frame->len, budget, &message, NULL) < 0 ? NULL : message;
}
