/* Fuzz target: framing.  However a stream is cut, its frames are the same, none is longer than the limit, and nothing
 * beyond the bytes at hand is read. */
#include <stdlib.h>
#include <string.h>

#include "common/frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t limits[] = {FRAME_LIMIT_HANDSHAKE, FRAME_LIMIT};
    for (size_t l = 0; l < 2; l++) {
        size_t at = 0;
        struct frame frame;
        size_t need;
        int rc;
        while ((rc = frame_parse(data + at, size - at, limits[l], &frame, &need, NULL)) == 1) {
            if (frame.header.length > limits[l] || need != FRAME_HEADER_BYTES + (size_t)frame.header.length ||
                need > size - at || frame.payload != data + at + FRAME_HEADER_BYTES)
                abort();
            uint8_t again[FRAME_HEADER_BYTES];
            frame_header_put(again, &frame.header);
            if (memcmp(again, data + at, sizeof again) != 0)
                abort(); /* a header has one form */
            at += need;
        }
        if (rc == 0 && need <= size - at)
            abort(); /* it had what it asked for */
    }
    return 0;
}
