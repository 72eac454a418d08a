/* The frame header: putting it, and taking it apart as early as the bytes at hand allow.  Pure, any thread. */
#include "common/frame.h"

#include <string.h>

static void put(uint8_t *out, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        out[i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get(const uint8_t *in, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)in[i] << (8 * i);
    return value;
}

void frame_header_put(uint8_t out[FRAME_HEADER_BYTES], const struct frame_header *header)
{
    put(out, FRAME_MAGIC, 4);
    put(out + 4, header->length, 4);
    put(out + 8, header->kind, 2);
    put(out + 10, header->method, 2);
    put(out + 12, 0, 4);
    put(out + 16, header->call, 8);
}

static int header_check(const struct frame_header *header, struct err *err)
{
    switch (header->kind) {
    case FRAME_HANDSHAKE:
    case FRAME_MESSAGE:
        if (header->call != 0)
            return err_set(err, ERR_PROTOCOL, "a %s frame with call id %llu", frame_kind_name(header->kind),
                           (unsigned long long)header->call);
        return 0;
    case FRAME_CALL:
    case FRAME_REPLY:
    case FRAME_STREAM:
    case FRAME_END:
        if (header->call == 0)
            return err_set(err, ERR_PROTOCOL, "a %s frame without a call id", frame_kind_name(header->kind));
        return 0;
    case FRAME_ERROR:
        return 0;
    default:
        return err_set(err, ERR_PROTOCOL, "a frame of unknown kind %u", header->kind);
    }
}

int frame_header_get(const uint8_t *data, size_t len, uint32_t limit, struct frame_header *ret_header, struct err *err)
{
    uint8_t magic[4];
    put(magic, FRAME_MAGIC, 4);
    if (memcmp(data, magic, len < 4 ? len : 4) != 0)
        return err_set(err, ERR_PROTOCOL, "the peer does not speak this protocol (no frame header)");
    if (len >= 8 && get(data + 4, 4) > limit)
        return err_set(err, ERR_LIMIT, "a frame of %llu bytes, over the limit of %u",
                       (unsigned long long)get(data + 4, 4), limit);
    if (len < FRAME_HEADER_BYTES)
        return 0;
    if (get(data + 12, 4) != 0)
        return err_set(err, ERR_PROTOCOL, "a frame header whose reserved field is not 0");

    struct frame_header header = {
        .length = (uint32_t)get(data + 4, 4),
        .kind = (uint16_t)get(data + 8, 2),
        .method = (uint16_t)get(data + 10, 2),
        .call = get(data + 16, 8),
    };
    int rc = header_check(&header, err);
    if (rc < 0)
        return rc;
    *ret_header = header;
    return 1;
}

int frame_parse(const uint8_t *data, size_t len, uint32_t limit, struct frame *ret_frame, size_t *ret_size,
                struct err *err)
{
    struct frame_header header;
    int rc = frame_header_get(data, len, limit, &header, err);
    if (rc < 0)
        return rc;
    if (rc == 0) {
        *ret_size = FRAME_HEADER_BYTES;
        return 0;
    }
    *ret_size = FRAME_HEADER_BYTES + (size_t)header.length;
    if (len < *ret_size)
        return 0;
    ret_frame->header = header;
    ret_frame->payload = data + FRAME_HEADER_BYTES;
    return 1;
}

const char *frame_kind_name(unsigned kind)
{
    switch (kind) {
    case FRAME_HANDSHAKE: return "handshake";
    case FRAME_CALL: return "call";
    case FRAME_REPLY: return "reply";
    case FRAME_STREAM: return "stream";
    case FRAME_END: return "end";
    case FRAME_ERROR: return "error";
    case FRAME_MESSAGE: return "message";
    default: return "unknown";
    }
}
