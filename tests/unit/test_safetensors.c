/* The safetensors reader: the fixtures, and files that break one rule each. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent/safetensors.h"
#include "tests/harness/suite.h"

static char path[64];

static void setup(void)
{
    strcpy(path, "/tmp/eep-safetensors-XXXXXX");
    int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
}

static void teardown(void)
{
    unlink(path);
}

/* A file with this header (and its true length, unless told otherwise) and this many bytes of data. */
static void file_write(const char *header, uint64_t header_len, size_t data)
{
    FILE *f = fopen(path, "w");
    for (int i = 0; i < 8; i++)
        fputc((int)(header_len >> (8 * i) & 0xff), f);
    fputs(header, f);
    for (size_t i = 0; i < data; i++)
        fputc((int)(i & 0xff), f);
    fclose(f);
}

START_TEST(a_good_file_is_read)
{
    const char *header = "{\"__metadata__\":{\"format\":\"pt\"},"
                         "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[4,28]},"
                         "\"a\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]},"
                         "\"none\":{\"dtype\":\"I64\",\"shape\":[0,7],\"data_offsets\":[4,4]},"
                         "\"one\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[28,29]}}   ";
    file_write(header, strlen(header), 29);
    struct safetensors *file;
    struct err err = {0};
    ck_assert_msg(safetensors_open(path, &file, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(safetensors_count(file), 4);
    ck_assert_str_eq(safetensors_at(file, 0)->name, "a");
    ck_assert_str_eq(safetensors_at(file, 3)->name, "one");
    const struct safetensors_tensor *t = safetensors_find(file, "b");
    ck_assert_ptr_nonnull(t);
    ck_assert_str_eq(t->dtype, "F32");
    ck_assert_uint_eq(t->dims, 2);
    ck_assert_uint_eq(t->shape[1], 3);
    ck_assert_uint_eq(t->bytes, 24);
    for (uint8_t i = 0; i < 24; i++)
        ck_assert_uint_eq(t->data[i], i + 4);
    uint8_t some[10] = {0};
    ck_assert_int_eq(safetensors_read(t, 14, some, 10, &err), 0);
    ck_assert_mem_eq(some, t->data + 14, 10);
    ck_assert_int_eq(truncate(path, 8 + (off_t)strlen(header) + 20), 0);
    ck_assert_int_eq(safetensors_read(t, 14, some, 10, &err), ERR_IO);
    ck_assert_msg(strstr(err.text, path) && strstr(err.text, "\"b\"") && strstr(err.text, "became shorter"), "%s",
                  err.text);
    ck_assert_ptr_null(safetensors_find(file, "c"));
    ck_assert_ptr_null(safetensors_find(file, "__metadata__"));
    safetensors_close(file);
}
END_TEST

#define T(name, dtype, shape, from, to)                                                                                \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}"

static const struct {
    const char *header;
    int64_t header_len; /* -1: the true one */
    size_t data;
    int code;
    const char *says;
} bad[] = {
    {"", 100000001, 0, ERR_LIMIT, "over the limit"},
    {"", INT64_MAX, 0, ERR_LIMIT, "over the limit"},
    {"{}", 3, 0, ERR_INVALID, "truncated"},
    {"{", -1, 0, ERR_INVALID, "no valid JSON"},
    {"", -1, 0, ERR_INVALID, "no valid JSON"},
    {"[]", -1, 0, ERR_INVALID, "no JSON object"},
    {"{} x", -1, 0, ERR_INVALID, "no valid JSON"},
    {"{" T("a", "U8", "[1]", 0, 1) "," T("a", "U8", "[1]", 0, 1) "}", -1, 1, ERR_INVALID, "duplicate"},
    {"{" T("a", "U9", "[1]", 0, 1) "}", -1, 1, ERR_UNSUPPORTED, "tensor \"a\" has unknown dtype \"U9\""},
    {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", -1, 1, ERR_UNSUPPORTED, "unknown dtype"},
    {"{\"a\":[]}", -1, 0, ERR_UNSUPPORTED, "unknown dtype"},
    {"{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", -1, 1, ERR_INVALID, "has no shape"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", -1, 1, ERR_INVALID, "has no data_offsets"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", -1, 1, ERR_INVALID, "has no data_offsets"},
    {"{" T("a", "U8", "[1]", 1, 0) "}", -1, 1, ERR_INVALID, "has no data_offsets"},
    {"{" T("a", "U8", "[1]", -1, 0) "}", -1, 1, ERR_INVALID, "has no data_offsets"},
    {"{" T("a", "U8", "[-1]", 0, 1) "}", -1, 1, ERR_INVALID, "dimension 0 of tensor \"a\" is no size"},
    {"{" T("a", "U8", "[1.0]", 0, 1) "}", -1, 1, ERR_INVALID, "dimension 0 of tensor \"a\" is no size"},
    {"{" T("a", "U8", "[1,1,1,1,1,1,1]", 0, 1) "}", -1, 1, ERR_LIMIT, "7 dimensions"},
    {"{" T("a", "F32", "[4611686018427387904,4]", 0, 0) "}", -1, 0, ERR_INVALID, "out of bounds"},
    {"{" T("a", "F4", "[3]", 0, 1) "}", -1, 1, ERR_INVALID, "out of bounds"},
    {"{" T("a", "F32", "[2]", 0, 7) "}", -1, 7, ERR_INVALID, "8 bytes by shape and dtype, but a range of 7"},
    {"{" T("a", "U8", "[5]", 0, 5) "}", -1, 4, ERR_INVALID, "truncated"},
    {"{" T("a", "U8", "[2]", 0, 2) "," T("b", "U8", "[2]", 1, 3) "}", -1, 3, ERR_INVALID,
     "\"a\" and \"b\" overlap at byte 1"},
    {"{" T("a", "U8", "[2]", 0, 2) "," T("b", "U8", "[2]", 0, 2) "}", -1, 2, ERR_INVALID, "overlap"},
    {"{" T("a", "U8", "[2]", 0, 2) "," T("b", "U8", "[2]", 3, 5) "}", -1, 5, ERR_INVALID,
     "1 bytes before tensor \"b\""},
    {"{" T("a", "U8", "[2]", 0, 2) "}", -1, 3, ERR_INVALID, "1 bytes after the last tensor"},
    {"{" T("\xc3\x28", "U8", "[2]", 0, 2) "}", -1, 2, ERR_INVALID, "unable to decode byte 0xc3"},
    {"{" T("a\\nb\\u001b[2J", "U9", "[2]", 0, 2) "}", -1, 2, ERR_UNSUPPORTED, "tensor \"a?b?[2J\" has unknown dtype"},
    {"{" T("a", "U8", "[1]", 18446744073709551616, 1) "}", -1, 1, ERR_INVALID, "no valid JSON"},
};

START_TEST(a_bad_file_gets_one_sentence)
{
    struct safetensors *file;
    struct err err = {0};
    const char *header = bad[_i].header;
    file_write(header, bad[_i].header_len < 0 ? strlen(header) : (uint64_t)bad[_i].header_len, bad[_i].data);
    int rc = safetensors_open(path, &file, &err);
    ck_assert_msg(rc == bad[_i].code, "case %d: %d %s", _i, rc, err.text);
    ck_assert_msg(strstr(err.text, bad[_i].says) != NULL, "case %d: %s", _i, err.text);
    ck_assert_int_eq(strncmp(err.text, path, strlen(path)), 0); /* it names the file */
    ck_assert_ptr_null(strchr(err.text, '\n'));
}
END_TEST

START_TEST(what_is_no_file_is_refused)
{
    struct safetensors *file;
    struct err err = {0};
    ck_assert_int_eq(safetensors_open("/nonexistent/x", &file, &err), ERR_NOTFOUND);
    ck_assert_int_eq(safetensors_open("/tmp", &file, &err), ERR_INVALID);
    ck_assert_int_eq(truncate(path, 7), 0);
    ck_assert_int_eq(safetensors_open(path, &file, &err), ERR_INVALID);
}
END_TEST

static const char *data_dir(void)
{
    const char *dir = getenv("EEP_TEST_DATA");
    return dir ? dir : "tests/data";
}

/* Every prefix of a real file, in strides, is refused: none crashes and none is taken for whole. */
START_TEST(a_truncated_checkpoint_is_refused)
{
    char name[256];
    snprintf(name, sizeof name, "%s/qwen3-moe-tiny/model.safetensors", data_dir());
    FILE *f = fopen(name, "r");
    ck_assert_ptr_nonnull(f);
    static char bytes[4 << 20];
    size_t len = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    for (size_t cut = 0; cut < len; cut += cut < 100 ? 1 : 40009) {
        struct safetensors *file;
        struct err err = {0};
        f = fopen(path, "w");
        fwrite(bytes, 1, cut, f);
        fclose(f);
        int rc = safetensors_open(path, &file, &err);
        ck_assert_msg(rc == ERR_INVALID, "cut at %zu: %d %s", cut, rc, err.text);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("safetensors");
    TCase *t = tcase_create("safetensors");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, a_good_file_is_read);
    tcase_add_loop_test(t, a_bad_file_gets_one_sentence, 0, (int)(sizeof bad / sizeof bad[0]));
    tcase_add_test(t, what_is_no_file_is_refused);
    tcase_add_test(t, a_truncated_checkpoint_is_refused);
    suite_add_tcase(s, t);
    return suite_run(s);
}
