/* A connection that makes calls of service Control without blocking, for load: frames are built by hand, many calls may
 * be under way. */
#ifndef EEP_TESTS_HARNESS_CALLER_H
#define EEP_TESTS_HARNESS_CALLER_H

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.pb-c.h"
#include "common/address.h"
#include "common/frame.h"
#include "common/rpc.h"
#include "control.pb-c.h"

/* A whole frame; malloc'ed. */
static inline uint8_t *caller_frame(enum frame_kind kind, uint16_t method, uint64_t call, const ProtobufCMessage *message,
                                    size_t *ret_len)
{
    size_t len = protobuf_c_message_get_packed_size(message);
    uint8_t *frame = malloc(FRAME_HEADER_BYTES + len);
    struct frame_header header = {(uint32_t)len, (uint16_t)kind, method, call};
    if (!frame)
        abort();
    frame_header_put(frame, &header);
    protobuf_c_message_pack(message, frame + FRAME_HEADER_BYTES);
    *ret_len = FRAME_HEADER_BYTES + len;
    return frame;
}

static inline uint8_t *caller_hello(size_t *ret_len)
{
    Pb__Hello hello = PB__HELLO__INIT;
    hello.protocol = RPC_PROTOCOL_VERSION;
    hello.role = PB__ROLE__OPERATOR;
    hello.cluster = hello.agent = (char *)"";
    hello.software = (char *)"bench";
    return caller_frame(FRAME_HANDSHAKE, 0, 0, &hello.base, ret_len);
}

/* Connected and past the handshake; a non-blocking socket, or -1. */
static inline int caller_connect(const char *address)
{
    int fd;
    size_t len, have = 0;
    if (address_connect(address, 10000, &fd, NULL) < 0)
        return -1;
    uint8_t *hello = caller_hello(&len), reply[4096];
    ssize_t n = send(fd, hello, len, MSG_NOSIGNAL);
    free(hello);
    while (n > 0) {
        struct frame frame;
        size_t size;
        if (frame_parse(reply, have, sizeof reply, &frame, &size, NULL) == 1)
            return frame.header.kind == FRAME_HANDSHAKE ? fd : -1;
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (poll(&p, 1, 10000) != 1)
            break;
        n = recv(fd, reply + have, sizeof reply - have, 0);
        have += n > 0 ? (size_t)n : 0;
    }
    close(fd);
    return -1;
}

#endif
