/* Frames with descriptors on the unix socket between agent and engine; see proto/engine.proto for the format.
 *
 * Mechanism for both ends: the agent's socket is non-blocking and driven by the loop, libeep's is blocking for
 * sending and polled for receiving.  No threads inside; one reader and one writer belong to one thread each (or to a
 * lock of the caller). */
#ifndef EEP_AGENT_ENGINE_FRAME_H
#define EEP_AGENT_ENGINE_FRAME_H

#include <protobuf-c/protobuf-c.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define ENGINE_PROTOCOL 1u
#define ENGINE_FRAME_BYTES_MAX (64u << 20)
#define ENGINE_FRAME_FDS_MAX 200u

enum engine_frame_type { ENGINE_FRAME_UP = 1, ENGINE_FRAME_DOWN = 2 };

struct engine_frame {
    unsigned type; /* enum engine_frame_type */
    size_t len;
    const uint8_t *data; /* borrowed from the reader until its next fill */
    unsigned n_fds;
    int fds[ENGINE_FRAME_FDS_MAX]; /* owned by the receiver of the frame */
};
/* Closes the descriptors that the receiver did not take (took = set to -1). */
void engine_frame_done(struct engine_frame *frame);
/* Takes descriptor i out of the frame; -1 when there is none. */
int engine_frame_take(struct engine_frame *frame, unsigned i);

struct engine_reader {
    uint8_t *buf;
    size_t start, end, cap; /* unread bytes are [start, end) */
    unsigned n_fds;
    int fds[2 * ENGINE_FRAME_FDS_MAX + 256]; /* arrived, not yet claimed by a complete frame */
};
void engine_reader_done(struct engine_reader *r);
/* One recvmsg that does not block.  1: something came; 0: nothing there now; ERR_UNREACHABLE: the peer has closed. */
int engine_reader_fill(struct engine_reader *r, int sock, struct err *err) MUST_CHECK;
/* 1 and a frame, 0 when the next one is not complete yet, ERR_PROTOCOL. */
int engine_reader_next(struct engine_reader *r, unsigned type, struct engine_frame *ret_frame, struct err *err) MUST_CHECK;

struct engine_out;
struct engine_writer {
    struct engine_out *head, **tail; /* zeroed is a valid empty writer */
    size_t bytes;                    /* queued */
};
void engine_writer_done(struct engine_writer *w);
/* Queues a message; duplicates the descriptors. */
int engine_writer_push(struct engine_writer *w, unsigned type, const ProtobufCMessage *message, const int *fds,
                       unsigned n_fds, struct err *err) MUST_CHECK;
/* Sends as much as the socket takes: 1 when the queue is empty, 0 when it is not, ERR_UNREACHABLE, ERR_IO. */
int engine_writer_flush(struct engine_writer *w, int sock, struct err *err) MUST_CHECK;

/* Unpacks with a bound on the memory that a body may ask for, in proportion to its length.  NULL: malformed.
 * Freed by rpc_unpack_free. */
ProtobufCMessage *engine_frame_unpack(const ProtobufCMessageDescriptor *descriptor, const struct engine_frame *frame);

#endif
