/* Frames: the fixed header before every message on a connection.  Pure, any thread.
 *
 *     offset 0  u32 magic     "EEP1"
 *            4  u32 length    bytes of payload after the header
 *            8  u16 kind      enum frame_kind
 *           10  u16 method    CALL, REPLY, STREAM, END, ERROR: which call of the service; else 0
 *           12  u32 reserved  0
 *           16  u64 call      id that the caller chose, non-zero; 0 for HANDSHAKE and MESSAGE
 *
 * Everything little-endian.  The length is checked against a limit before anything is allocated. */
#ifndef EEP_COMMON_FRAME_H
#define EEP_COMMON_FRAME_H

#include <stddef.h>
#include <stdint.h>

#include "common/err.h"

#define FRAME_MAGIC 0x31504545u /* "EEP1" */
#define FRAME_HEADER_BYTES 24
#define FRAME_LIMIT_HANDSHAKE 4096u /* before the handshake is done */
#define FRAME_LIMIT (64u << 20)     /* after it */

enum frame_kind {
    FRAME_HANDSHAKE = 1,
    FRAME_CALL,
    FRAME_REPLY,   /* ends the call */
    FRAME_STREAM,  /* one of several replies */
    FRAME_END,     /* ends a stream; no payload */
    FRAME_ERROR,   /* ends the call (call 0: the handshake); payload Error */
    FRAME_MESSAGE, /* belongs to no call */
};

struct frame_header {
    uint32_t length;
    uint16_t kind, method;
    uint64_t call;
};

void frame_header_put(uint8_t out[FRAME_HEADER_BYTES], const struct frame_header *header);

/* Looks at the first len bytes of a stream.
 * 1: *ret_header is valid (len >= FRAME_HEADER_BYTES).  0: more bytes are needed.
 * ERR_PROTOCOL: this is no frame, known as soon as the bytes at hand tell.  ERR_LIMIT: longer than limit. */
int frame_header_get(const uint8_t *data, size_t len, uint32_t limit, struct frame_header *ret_header,
                     struct err *err) MUST_CHECK;

struct frame {
    struct frame_header header;
    const uint8_t *payload; /* header.length bytes, borrowed */
};

/* One frame from the first len bytes of a stream.
 * 1: a frame; *ret_size bytes belong to it.  0: more bytes are needed, *ret_size in all as far as is known now.
 * Negative as above. */
int frame_parse(const uint8_t *data, size_t len, uint32_t limit, struct frame *ret_frame, size_t *ret_size,
                struct err *err) MUST_CHECK;

const char *frame_kind_name(unsigned kind); /* "call" */

#endif
