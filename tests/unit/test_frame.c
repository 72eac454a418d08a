/* Frame headers and the parser: every split of a stream, every kind of garbage. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "common/frame.h"
#include "tests/harness/suite.h"

static size_t frame_make(uint8_t *out, struct frame_header header, const char *payload)
{
    header.length = (uint32_t)strlen(payload);
    frame_header_put(out, &header);
    memcpy(out + FRAME_HEADER_BYTES, payload, header.length);
    return FRAME_HEADER_BYTES + header.length;
}

START_TEST(layout)
{
    const uint8_t want[FRAME_HEADER_BYTES] = {'E', 'E', 'P', '1', 0x04, 0x03, 0x02, 0x01, 2,    0,    0x0b, 0x0a,
                                              0,   0,   0,   0,   0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11};
    uint8_t got[FRAME_HEADER_BYTES];
    frame_header_put(got, &(struct frame_header){0x01020304, FRAME_CALL, 0x0a0b, 0x1112131415161718});
    ck_assert_mem_eq(got, want, sizeof want);
    struct frame_header header;
    ck_assert_int_eq(frame_header_get(got, sizeof got, FRAME_LIMIT, &header, NULL), 1);
    ck_assert_uint_eq(header.length, 0x01020304);
    ck_assert_uint_eq(header.kind, FRAME_CALL);
    ck_assert_uint_eq(header.method, 0x0a0b);
    ck_assert_uint_eq(header.call, 0x1112131415161718);
}
END_TEST

START_TEST(every_split)
{
    uint8_t stream[256];
    size_t first = frame_make(stream, (struct frame_header){0, FRAME_MESSAGE, 0, 0}, "hello");
    size_t second = frame_make(stream + first, (struct frame_header){0, FRAME_REPLY, 7, 99}, "");
    for (size_t len = 0; len <= first + second; len++) {
        /* An allocation of the exact size, so that the sanitizer sees a read beyond it. */
        uint8_t *data = malloc(len ? len : 1);
        memcpy(data, stream, len);
        struct frame frame;
        size_t size = 0;
        struct err err = {0};
        int rc = frame_parse(data, len, FRAME_LIMIT, &frame, &size, &err);
        ck_assert_int_eq(rc, len >= first);
        if (rc == 0) {
            ck_assert_uint_gt(size, len);
            ck_assert_uint_eq(size, len < FRAME_HEADER_BYTES ? FRAME_HEADER_BYTES : first);
        } else {
            ck_assert_uint_eq(size, first);
            ck_assert_mem_eq(frame.payload, "hello", 5);
            rc = frame_parse(data + first, len - first, FRAME_LIMIT, &frame, &size, &err);
            ck_assert_int_eq(rc, len == first + second);
            if (rc == 1)
                ck_assert_uint_eq(frame.header.call, 99);
        }
        free(data);
    }
}
END_TEST

/* The first byte that differs from any frame ends it; so does a length over the limit, before the rest is there. */
START_TEST(garbage_is_found_early)
{
    struct frame_header header;
    struct err err = {0};
    const uint8_t http[] = "GET / HTTP/1.1\r\n";
    ck_assert_int_eq(frame_header_get(http, 1, FRAME_LIMIT, &header, &err), ERR_PROTOCOL);
    uint8_t data[FRAME_HEADER_BYTES];
    frame_header_put(data, &(struct frame_header){4097, FRAME_MESSAGE, 0, 0});
    ck_assert_int_eq(frame_header_get(data, 7, 4096, &header, &err), 0);
    ck_assert_int_eq(frame_header_get(data, 8, 4096, &header, &err), ERR_LIMIT);
    ck_assert_int_eq(frame_header_get(data, sizeof data, 4096, &header, &err), ERR_LIMIT);
    ck_assert_int_eq(frame_header_get(data, sizeof data, 4097, &header, &err), 1);
    ck_assert_ptr_nonnull(strstr(err.text, "4097"));
}
END_TEST

START_TEST(impossible_headers)
{
    static const struct frame_header bad[] = {
        {0, 0, 0, 0},           {0, 8, 0, 0},          {0, FRAME_CALL, 0, 0},      {0, FRAME_REPLY, 0, 0},
        {0, FRAME_STREAM, 0, 0}, {0, FRAME_END, 0, 0}, {0, FRAME_HANDSHAKE, 0, 1}, {0, FRAME_MESSAGE, 0, 1},
    };
    uint8_t data[FRAME_HEADER_BYTES];
    struct frame_header header;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        frame_header_put(data, &bad[i]);
        ck_assert_int_eq(frame_header_get(data, sizeof data, FRAME_LIMIT, &header, NULL), ERR_PROTOCOL);
    }
    frame_header_put(data, &(struct frame_header){0, FRAME_MESSAGE, 0, 0});
    data[13] = 1;
    ck_assert_int_eq(frame_header_get(data, sizeof data, FRAME_LIMIT, &header, NULL), ERR_PROTOCOL);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("frame");
    TCase *tc = tcase_create("frame");
    tcase_add_test(tc, layout);
    tcase_add_test(tc, every_split);
    tcase_add_test(tc, garbage_is_found_early);
    tcase_add_test(tc, impossible_headers);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
