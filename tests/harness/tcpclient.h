/* A client of TCPStore's protocol, byte for byte what PyTorch's sends: for tests.  Blocking sockets; a failure of the
 * connection is told by tcpclient_ok. */
#ifndef EEP_TESTS_HARNESS_TCPCLIENT_H
#define EEP_TESTS_HARNESS_TCPCLIENT_H

#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/address.h"
#include "coordinator/tcpstore_parse.h"

struct tcpclient {
    int fd;
    bool broken;
    uint8_t *out; /* a command that is being put together */
    size_t len, cap;
};

static inline void tcpclient_put(struct tcpclient *c, const void *data, size_t len)
{
    if (c->len + len > c->cap) {
        c->cap = 2 * (c->len + len);
        c->out = realloc(c->out, c->cap);
    }
    if (len)
        memcpy(c->out + c->len, data, len);
    c->len += len;
}

static inline void tcpclient_begin(struct tcpclient *c, uint8_t query)
{
    c->len = 0;
    tcpclient_put(c, &query, 1);
}

static inline void tcpclient_u64(struct tcpclient *c, uint64_t value)
{
    tcpclient_put(c, &value, 8);
}

static inline void tcpclient_bytes(struct tcpclient *c, const void *data, size_t len)
{
    tcpclient_u64(c, len);
    tcpclient_put(c, data, len);
}

static inline void tcpclient_text(struct tcpclient *c, const char *text)
{
    tcpclient_bytes(c, text, strlen(text));
}

static inline void tcpclient_flush(struct tcpclient *c)
{
    size_t done = 0;
    while (done < c->len && !c->broken) {
        ssize_t n = send(c->fd, c->out + done, c->len - done, MSG_NOSIGNAL);
        if (n > 0)
            done += (size_t)n;
        else
            c->broken = true;
    }
    c->len = 0;
}

static inline void tcpclient_take(struct tcpclient *c, void *data, size_t len)
{
    for (size_t have = 0; have < len && !c->broken;) {
        ssize_t n = recv(c->fd, (char *)data + have, len - have, 0);
        if (n > 0)
            have += (size_t)n;
        else
            c->broken = true;
    }
    if (c->broken)
        memset(data, 0xff, len);
}

static inline int64_t tcpclient_i64(struct tcpclient *c)
{
    int64_t value;
    tcpclient_take(c, &value, 8);
    return value;
}

static inline uint8_t tcpclient_u8(struct tcpclient *c)
{
    uint8_t value;
    tcpclient_take(c, &value, 1);
    return value;
}

/* A value, with a NUL after it; the caller frees it. */
static inline char *tcpclient_value(struct tcpclient *c, size_t *ret_len)
{
    int64_t len = tcpclient_i64(c);
    char *data = len < 0 || c->broken ? NULL : calloc(1, (size_t)len + 1);
    if (data)
        tcpclient_take(c, data, (size_t)len);
    if (ret_len)
        *ret_len = data ? (size_t)len : 0;
    return data;
}

/* Connects and sends VALIDATE and PING, as PyTorch does.  false: it did not work. */
static inline bool tcpclient_open(struct tcpclient *c, const char *address)
{
    uint32_t magic = TCPSTORE_MAGIC, nonce = 4711, back = 0;
    *c = (struct tcpclient){.fd = -1};
    if (address_connect(address, 5000, &c->fd, NULL) < 0)
        return false;
    int flags = 0;
    struct timeval patience = {.tv_sec = 20};
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    flags = fcntl(c->fd, F_GETFL);
    fcntl(c->fd, F_SETFL, flags & ~O_NONBLOCK);
    tcpclient_begin(c, TCPSTORE_VALIDATE);
    tcpclient_put(c, &magic, 4);
    tcpclient_flush(c);
    tcpclient_begin(c, TCPSTORE_PING);
    tcpclient_put(c, &nonce, 4);
    tcpclient_flush(c);
    tcpclient_take(c, &back, 4);
    return !c->broken && back == nonce;
}

static inline void tcpclient_close(struct tcpclient *c)
{
    if (c->fd >= 0)
        close(c->fd);
    free(c->out);
    *c = (struct tcpclient){.fd = -1};
}

/* ---- commands ---- */

static inline void tcpclient_set(struct tcpclient *c, const char *key, const char *value)
{
    tcpclient_begin(c, TCPSTORE_SET);
    tcpclient_text(c, key);
    tcpclient_text(c, value);
    tcpclient_flush(c);
}

static inline void tcpclient_wait_start(struct tcpclient *c, const char *key)
{
    tcpclient_begin(c, TCPSTORE_WAIT);
    tcpclient_u64(c, 1);
    tcpclient_text(c, key);
    tcpclient_flush(c);
}

/* As PyTorch's get: WAIT, then GET. */
static inline char *tcpclient_get(struct tcpclient *c, const char *key)
{
    tcpclient_wait_start(c, key);
    if (tcpclient_u8(c) != 0)
        return NULL;
    tcpclient_begin(c, TCPSTORE_GET);
    tcpclient_text(c, key);
    tcpclient_flush(c);
    return tcpclient_value(c, NULL);
}

static inline int64_t tcpclient_add(struct tcpclient *c, const char *key, int64_t amount)
{
    tcpclient_begin(c, TCPSTORE_ADD);
    tcpclient_text(c, key);
    tcpclient_u64(c, (uint64_t)amount);
    tcpclient_flush(c);
    return tcpclient_i64(c);
}

static inline bool tcpclient_check(struct tcpclient *c, const char *key)
{
    tcpclient_begin(c, TCPSTORE_CHECK);
    tcpclient_u64(c, 1);
    tcpclient_text(c, key);
    tcpclient_flush(c);
    return tcpclient_u8(c) == 0;
}

static inline char *tcpclient_compare_set(struct tcpclient *c, const char *key, const char *expected,
                                          const char *desired)
{
    tcpclient_begin(c, TCPSTORE_COMPARE_SET);
    tcpclient_text(c, key);
    tcpclient_text(c, expected);
    tcpclient_text(c, desired);
    tcpclient_flush(c);
    return tcpclient_value(c, NULL);
}

/* GETNUMKEYS; DELETE_KEY and QUEUE_LEN with a key. */
static inline int64_t tcpclient_number(struct tcpclient *c, uint8_t query, const char *key)
{
    tcpclient_begin(c, query);
    if (key)
        tcpclient_text(c, key);
    tcpclient_flush(c);
    return tcpclient_i64(c);
}

static inline bool tcpclient_readable(struct tcpclient *c, int ms)
{
    struct pollfd p = {.fd = c->fd, .events = POLLIN};
    return poll(&p, 1, ms) == 1;
}

#endif
