/* The blocking client: plain sockets, poll, deadlines.  One thread at a time. */
#include <assert.h>
#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utlist.h>

#include "common/address.h"
#include "common/clock.h"
#include "common/rpc_parts.h"

#define CALLS_MAX 16
#define READ_STEP 65536
#define SEND_MS   30000 /* a peer that takes no bytes for so long is gone */

/* A frame that came for a call while another one was asked for. */
struct kept {
    struct frame frame; /* payload follows the struct */
    struct kept *prev, *next;
};

struct open_call {
    uint64_t id; /* 0 = free */
    uint16_t method;
    bool ended; /* it was answered by a plain reply: the next question gets "end" */
};

struct rpc_client {
    int fd;
    SSL *ssl;    /* NULL: not encrypted */
    short wants; /* what to poll for after EAGAIN: TLS may have to read before it can write */
    int broken;  /* ERR_* once the connection is unusable */
    const ProtobufCServiceDescriptor *service;
    struct rpc_identity peer;
    uint64_t last_call;
    struct open_call calls[CALLS_MAX];
    struct kept *kept;
    size_t kept_bytes;
    uint8_t *in; /* bytes used..have are not looked at yet */
    size_t used, have, cap;
};

/* When a wait that starts now ends, by clock_now_ms; UINT64_MAX = never. */
static uint64_t until_of(int timeout_ms)
{
    return timeout_ms < 0 ? UINT64_MAX : clock_now_ms() + (uint64_t)timeout_ms;
}

static int client_poll(struct rpc_client *c, short events, uint64_t until, struct err *err)
{
    for (;;) {
        struct pollfd p = {.fd = c->fd, .events = events};
        int n = poll(&p, 1, clock_left_ms(until));
        if (n > 0)
            return 0;
        if (n == 0)
            return err_set(err, ERR_TIMEOUT, "no answer in time");
        if (errno != EINTR)
            return err_set(err, ERR_IO, "poll: %s", strerror(errno));
    }
}

static int client_break(struct rpc_client *c, int code)
{
    c->broken = code;
    return code;
}

/* send and recv; with TLS too.  -1: errno, or EPROTO with the sentence in err. */
static ssize_t client_io(struct rpc_client *c, void *data, size_t len, bool out, struct err *err)
{
    size_t n = 0;
    c->wants = out ? POLLOUT : POLLIN;
    if (!c->ssl)
        return out ? send(c->fd, data, len, MSG_NOSIGNAL) : recv(c->fd, data, len, 0);
    ERR_clear_error();
    errno = 0;
    if ((out ? SSL_write_ex(c->ssl, data, len, &n) : SSL_read_ex(c->ssl, data, len, &n)) == 1)
        return (ssize_t)n;
    switch (SSL_get_error(c->ssl, 0)) {
    case SSL_ERROR_WANT_READ:
        c->wants = POLLIN;
        errno = EAGAIN;
        return -1;
    case SSL_ERROR_WANT_WRITE:
        c->wants = POLLOUT;
        errno = EAGAIN;
        return -1;
    case SSL_ERROR_ZERO_RETURN:
        return 0;
    case SSL_ERROR_SYSCALL:
        return errno ? -1 : 0;
    default:
        break;
    }
    client_break(c, tls_failure(c->ssl, ERR_peek_last_error(), err));
    errno = EPROTO;
    return -1;
}

/* ---- output ---- */

static int client_write(struct rpc_client *c, const uint8_t *data, size_t len, uint64_t until, struct err *err)
{
    size_t done = 0;
    while (done < len) {
        ssize_t n = client_io(c, (uint8_t *)(uintptr_t)data + done, len - done, true, err); /* sending only reads */
        if (n >= 0) {
            done += (size_t)n;
        } else if (errno == EAGAIN) {
            int rc = client_poll(c, c->wants, until, err);
            if (rc < 0) /* half a frame may be out: nothing can follow it */
                return client_break(c, rc);
        } else if (errno == EPROTO && c->broken) {
            return c->broken;
        } else if (errno != EINTR) {
            return client_break(c, err_set(err, ERR_UNREACHABLE, "the connection was lost: %s", strerror(errno)));
        }
    }
    return 0;
}

static int client_send(struct rpc_client *c, enum frame_kind kind, uint16_t method, uint64_t call,
                       const ProtobufCMessage *msg, uint64_t until, struct err *err)
{
    size_t len = protobuf_c_message_get_packed_size(msg);
    if (len > FRAME_LIMIT)
        return err_set(err, ERR_LIMIT, "a request of %zu bytes is over the limit of %u", len, FRAME_LIMIT);
    uint8_t *data = malloc(FRAME_HEADER_BYTES + len);
    if (!data)
        return err_set(err, ERR_NOMEM, "no memory for a request of %zu bytes", len);
    struct frame_header header = {(uint32_t)len, (uint16_t)kind, method, call};
    frame_header_put(data, &header);
    protobuf_c_message_pack(msg, data + FRAME_HEADER_BYTES);
    int rc = client_write(c, data, FRAME_HEADER_BYTES + len, until, err);
    free(data);
    return rc;
}

/* ---- input ---- */

/* Room for `size` bytes from `used` on, and some to read ahead. */
static int client_room(struct rpc_client *c, size_t size, struct err *err)
{
    if (c->used > 0) {
        memmove(c->in, c->in + c->used, c->have - c->used);
        c->have -= c->used;
        c->used = 0;
    }
    if (c->cap >= size + READ_STEP)
        return 0;
    uint8_t *in = realloc(c->in, size + READ_STEP);
    if (!in)
        return client_break(c, err_set(err, ERR_NOMEM, "no memory for a frame of %zu bytes", size));
    c->in = in;
    c->cap = size + READ_STEP;
    return 0;
}

/* The next frame; its payload is borrowed until the next read. */
static int client_read(struct rpc_client *c, uint32_t limit, uint64_t until, struct frame *ret_frame, struct err *err)
{
    if (c->broken)
        return err_set(err, c->broken, "the connection is broken");
    for (;;) {
        static const uint8_t none[1];
        size_t size;
        int rc = frame_parse(c->in ? c->in + c->used : none, c->have - c->used, limit, ret_frame, &size, err);
        if (rc < 0)
            return client_break(c, rc);
        if (rc == 1) {
            c->used += size;
            return 0;
        }
        rc = client_room(c, size, err);
        if (rc < 0)
            return rc;
        ssize_t n = client_io(c, c->in + c->have, c->cap - c->have, false, err);
        if (n > 0) {
            c->have += (size_t)n;
        } else if (n == 0) {
            return client_break(c, err_set(err, ERR_UNREACHABLE, "the other end closed the connection"));
        } else if (errno == EAGAIN) {
            rc = client_poll(c, c->wants, until, err);
            if (rc < 0)
                return rc;
        } else if (errno == EPROTO && c->broken) {
            return c->broken;
        } else if (errno != EINTR) {
            return client_break(c, err_set(err, ERR_UNREACHABLE, "the connection was lost: %s", strerror(errno)));
        }
    }
}

/* ---- connecting ---- */

static int client_handshake(struct rpc_client *c, const struct rpc_identity *self, const char *acceptor, uint64_t until,
                            struct err *err)
{
    Pb__Hello hello;
    rpc_hello_fill(&hello, self);
    int rc = client_send(c, FRAME_HANDSHAKE, 0, 0, &hello.base, until, err);
    struct frame frame;
    if (rc == 0)
        rc = client_read(c, FRAME_LIMIT_HANDSHAKE, until, &frame, err);
    if (rc == 0)
        rc = rpc_hello_answer(&frame, self, &c->peer, err);
    if (rc == 0)
        rc = rpc_tls_check(c->ssl, c->peer.cluster, acceptor, err);
    return rc;
}

/* TLS on the connected socket; its handshake is made by the first write. */
static int client_secure(struct rpc_client *c, const struct tls *tls, struct err *err)
{
    c->ssl = tls_session(tls, false);
    return c->ssl && SSL_set_fd(c->ssl, c->fd) == 1 ? 0 : err_set(err, ERR_NOMEM, "no memory for a connection");
}

static bool address_is_unix(const char *text)
{
    struct address a;
    return address_parse(text, &a, NULL) == 0 && a.is_unix;
}

int rpc_client_connect(const char *address, const struct rpc_identity *self, const ProtobufCServiceDescriptor *service,
                       int timeout_ms, struct rpc_client **ret_client, struct err *err)
{
    return rpc_client_connect_tls(address, self, service, NULL, "coordinator", timeout_ms, ret_client, err);
}

int rpc_client_connect_tls(const char *address, const struct rpc_identity *self,
                           const ProtobufCServiceDescriptor *service, const struct tls *tls, const char *acceptor,
                           int timeout_ms, struct rpc_client **ret_client, struct err *err)
{
    uint64_t until = until_of(timeout_ms);
    struct rpc_client *c = calloc(1, sizeof *c);
    if (!c)
        return err_set(err, ERR_NOMEM, "no memory for a connection");
    c->service = service;
    c->fd = -1;
    int rc = address_connect(address, timeout_ms, &c->fd, err);
    if (rc == 0 && tls && !address_is_unix(address))
        rc = client_secure(c, tls, err);
    if (rc == 0) {
        rc = client_handshake(c, self, acceptor, until, err);
        if (rc < 0)
            err_wrap(err, "%s", address);
    }
    if (rc < 0) {
        rpc_client_free(c);
        return rc;
    }
    *ret_client = c;
    return 0;
}

void rpc_client_free(struct rpc_client *c)
{
    if (!c)
        return;
    struct kept *kept, *next;
    DL_FOREACH_SAFE(c->kept, kept, next) free(kept);
    SSL_free(c->ssl);
    if (c->fd >= 0)
        close(c->fd);
    free(c->in);
    free(c);
}

const struct rpc_identity *rpc_client_peer(const struct rpc_client *c)
{
    return &c->peer;
}

int rpc_client_fd(const struct rpc_client *c)
{
    return c->fd;
}

/* ---- calls ---- */

static struct open_call *client_call_of(struct rpc_client *c, uint64_t id)
{
    for (size_t i = 0; i < CALLS_MAX; i++)
        if (c->calls[i].id == id)
            return &c->calls[i];
    return NULL;
}

/* The call is over for us: what still comes for it is dropped. */
static void client_forget(struct rpc_client *c, struct open_call *call)
{
    struct kept *kept, *next;
    DL_FOREACH_SAFE(c->kept, kept, next)
    {
        if (kept->frame.header.call != call->id)
            continue;
        DL_DELETE(c->kept, kept);
        c->kept_bytes -= kept->frame.header.length;
        free(kept);
    }
    *call = (struct open_call){0};
}

static int client_keep(struct rpc_client *c, const struct frame *frame, struct err *err)
{
    if (c->kept_bytes + frame->header.length > FRAME_LIMIT)
        return client_break(c, err_set(err, ERR_LIMIT, "too many replies that nobody asks for"));
    struct kept *kept = malloc(sizeof *kept + frame->header.length);
    if (!kept)
        return client_break(c, err_set(err, ERR_NOMEM, "no memory for a reply"));
    kept->frame = *frame;
    kept->frame.payload = (const uint8_t *)(kept + 1);
    memcpy(kept + 1, frame->payload, frame->header.length);
    c->kept_bytes += frame->header.length;
    DL_APPEND(c->kept, kept);
    return 0;
}

/* Turns a frame of the call into rpc_client_next's result. */
static int client_take(struct rpc_client *c, struct open_call *call, const struct frame *frame,
                       ProtobufCMessage **ret_reply, struct err *err)
{
    int rc;
    switch (frame->header.kind) {
    case FRAME_REPLY:
    case FRAME_STREAM:
        rc = rpc_unpack(c->service->methods[call->method].output, frame->payload, frame->header.length, 0, ret_reply,
                        err);
        if (rc < 0)
            client_forget(c, call);
        else
            call->ended = frame->header.kind == FRAME_REPLY;
        return rc < 0 ? rc : 1;
    case FRAME_END:
        client_forget(c, call);
        return 0;
    case FRAME_ERROR:
        client_forget(c, call);
        return rpc_error_of(frame->payload, frame->header.length, err);
    default:
        client_forget(c, call);
        return err_set(err, ERR_PROTOCOL, "a %s frame as the answer to a call", frame_kind_name(frame->header.kind));
    }
}

int rpc_client_start(struct rpc_client *c, unsigned method, const ProtobufCMessage *request, uint64_t *ret_call,
                     struct err *err)
{
    assert(method < c->service->n_methods && request->descriptor == c->service->methods[method].input);
    if (c->broken)
        return err_set(err, c->broken, "the connection is broken");
    struct open_call *call = client_call_of(c, 0);
    if (!call)
        return err_set(err, ERR_LIMIT, "more than %d open calls", CALLS_MAX);
    uint64_t id = ++c->last_call;
    int rc = client_send(c, FRAME_CALL, (uint16_t)method, id, request, until_of(SEND_MS), err);
    if (rc < 0)
        return rc;
    *call = (struct open_call){.id = id, .method = (uint16_t)method};
    *ret_call = id;
    return 0;
}

static int client_next(struct rpc_client *c, uint64_t id, uint64_t until, ProtobufCMessage **ret_reply, struct err *err)
{
    struct open_call *call = id ? client_call_of(c, id) : NULL;
    if (!call)
        return err_set(err, ERR_NOTFOUND, "no such call is open");
    if (call->ended) {
        client_forget(c, call);
        return 0;
    }
    struct kept *kept;
    DL_FOREACH(c->kept, kept)
    {
        if (kept->frame.header.call == id) {
            DL_DELETE(c->kept, kept);
            c->kept_bytes -= kept->frame.header.length;
            int rc = client_take(c, call, &kept->frame, ret_reply, err);
            free(kept);
            return rc;
        }
    }
    for (;;) {
        struct frame frame;
        int rc = client_read(c, FRAME_LIMIT, until, &frame, err);
        if (rc < 0)
            return rc;
        if (frame.header.call == id)
            return client_take(c, call, &frame, ret_reply, err);
        /* What belongs to no open call is a late answer to a forgotten one. */
        if (frame.header.call != 0 && client_call_of(c, frame.header.call))
            rc = client_keep(c, &frame, err);
        if (rc < 0)
            return rc;
    }
}

int rpc_client_next(struct rpc_client *c, uint64_t call, int timeout_ms, ProtobufCMessage **ret_reply, struct err *err)
{
    return client_next(c, call, until_of(timeout_ms), ret_reply, err);
}

int rpc_client_call(struct rpc_client *c, unsigned method, const ProtobufCMessage *request, int timeout_ms,
                    ProtobufCMessage **ret_reply, struct err *err)
{
    uint64_t until = until_of(timeout_ms);
    uint64_t id;
    int rc = rpc_client_start(c, method, request, &id, err);
    if (rc < 0)
        return rc;
    rc = client_next(c, id, until, ret_reply, err);
    struct open_call *call = client_call_of(c, id);
    if (call)
        client_forget(c, call);
    if (rc == 0)
        return err_set(err, ERR_PROTOCOL, "%s was answered without a reply", c->service->methods[method].name);
    return rc < 0 ? rc : 0;
}
