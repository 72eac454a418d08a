/* The manifest: its rules, its canonical encoding, and what damaged bytes do to the decoder. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent/manifest.h"
#include "tests/harness/suite.h"

/* Two layers of two parts, a dense region with two tensors. */
static void manifest_make(struct manifest *ret_m)
{
    struct manifest m = {.producer = "test", .layers = 2, .logical = 8, .slots = 4, .n_regions = 5, .n_tensors = 6};
    m.regions = calloc(m.n_regions, sizeof *m.regions);
    m.tensors = calloc(m.n_tensors, sizeof *m.tensors);
    m.config = strdup("{\"hidden_size\": 8}");
    m.regions[0] = (struct region){.kind = REGION_DENSE, .name = "dense", .bytes = 512, .dense_group = 3};
    m.tensors[0] = (struct tensor){.name = "embed", .dtype = "BF16", .dims = 2, .shape = {4, 8}};
    m.tensors[1] = (struct tensor){.name = "norm", .offset = 256, .dtype = "F32", .dims = 1, .shape = {64}};
    for (uint32_t i = 0; i < 4; i++) {
        struct region *r = &m.regions[1 + i];
        *r = (struct region){.kind = REGION_EXPERT, .layer = i / 2, .slots = 4};
        snprintf(r->part, sizeof r->part, "%s", i % 2 ? "w2" : "w13");
        snprintf(r->name, sizeof r->name, "layers.%u.experts.%s", i / 2, r->part);
        r->slot_bytes = i % 2 ? 64 : 128;
        r->stride = r->slot_bytes + 64;
        r->bytes = r->stride * 4;
        struct tensor *t = &m.tensors[2 + i];
        *t = (struct tensor){.region = 1 + i, .dtype = "F16", .dims = 2, .shape = {i % 2 ? 4 : 8, 8}};
        memcpy(t->name, r->name, sizeof r->name);
    }
    *ret_m = m;
}

static struct blob *encoded(const struct manifest *m)
{
    struct blob *blob;
    struct err err = {0};
    ck_assert_msg(manifest_encode(m, &blob, &err) == 0, "%s", err.text);
    return blob;
}

START_TEST(what_is_encoded_comes_back)
{
    struct manifest m, back;
    struct err err = {0};
    manifest_make(&m);
    struct blob *blob = encoded(&m);
    ck_assert_msg(manifest_decode(blob, &back, &err) == 0, "%s", err.text);
    ck_assert_str_eq(back.producer, "test");
    ck_assert_uint_eq(back.layers, 2);
    ck_assert_uint_eq(back.logical, 8);
    ck_assert_uint_eq(back.slots, 4);
    ck_assert_uint_eq(back.n_regions, 5);
    ck_assert_uint_eq(back.n_tensors, 6);
    ck_assert_mem_eq(back.regions, m.regions, 5 * sizeof *m.regions);
    ck_assert_mem_eq(back.tensors, m.tensors, 6 * sizeof *m.tensors);
    ck_assert_str_eq(back.config, m.config);
    ck_assert_uint_eq(manifest_expert_bytes(&back), 192);
    ck_assert_uint_eq(manifest_dense_bytes(&back), 512);

    struct blob *again = encoded(&back);
    ck_assert_uint_eq(again->len, blob->len);
    ck_assert_mem_eq(again->data, blob->data, blob->len);
    ck_assert_uint_eq(manifest_digest(again), manifest_digest(blob));
    blob_unref(again);
    blob_unref(blob);
    manifest_done(&back);
    manifest_done(&m);
}
END_TEST

START_TEST(no_config_is_not_an_empty_one)
{
    struct manifest m, back;
    manifest_make(&m);
    m.config[0] = '\0';
    struct blob *empty = encoded(&m);
    free(m.config);
    m.config = NULL;
    struct blob *none = encoded(&m);
    ck_assert_uint_ne(manifest_digest(empty), manifest_digest(none));
    ck_assert_int_eq(manifest_decode(empty, &back, NULL), 0);
    ck_assert_str_eq(back.config, "");
    manifest_done(&back);
    ck_assert_int_eq(manifest_decode(none, &back, NULL), 0);
    ck_assert_ptr_null(back.config);
    manifest_done(&back);
    blob_unref(empty);
    blob_unref(none);
    manifest_done(&m);
}
END_TEST

/* Each breaks one rule of a good manifest. */
static void break_name(struct manifest *m)
{
    m->regions[1].name[0] = '\0';
}
static void break_same_name(struct manifest *m)
{
    strcpy(m->regions[2].name, m->regions[1].name);
}
static void break_unterminated(struct manifest *m)
{
    memset(m->regions[0].name, 'x', sizeof m->regions[0].name);
}
static void break_same_tensor(struct manifest *m)
{
    strcpy(m->tensors[1].name, "embed");
}
static void break_kind(struct manifest *m)
{
    m->regions[0].kind = (enum region_kind)7;
}
static void break_empty_dense(struct manifest *m)
{
    m->regions[0].bytes = 0;
}
static void break_layer(struct manifest *m)
{
    m->regions[4].layer = 2;
}
static void break_same_part(struct manifest *m)
{
    strcpy(m->regions[2].part, "w13");
}
static void break_other_part(struct manifest *m)
{
    strcpy(m->regions[4].part, "w3");
}
static void break_slots(struct manifest *m)
{
    m->regions[1].slots = 3;
}
static void break_stride(struct manifest *m)
{
    m->regions[1].stride = m->regions[1].slot_bytes - 1;
}
static void break_bytes(struct manifest *m)
{
    m->regions[1].bytes++;
}
static void break_overflow(struct manifest *m)
{
    m->regions[1].stride = UINT64_MAX / 4 + 1;
    m->regions[1].bytes = 0;
}
static void break_sum(struct manifest *m)
{
    m->regions[0].bytes = UINT64_MAX - 1;
}
static void break_missing(struct manifest *m)
{
    m->n_regions--, m->n_tensors--;
}
static void break_region_index(struct manifest *m)
{
    m->tensors[0].region = 5;
}
static void break_dtype(struct manifest *m)
{
    strcpy(m->tensors[0].dtype, "BF15");
}
static void break_dims(struct manifest *m)
{
    m->tensors[0].dims = TENSOR_DIMS_MAX + 1;
}
static void break_shape(struct manifest *m)
{
    m->tensors[1].shape[0]++;
}
static void break_shape_overflow(struct manifest *m)
{
    m->tensors[0].shape[0] = m->tensors[0].shape[1] = UINT64_MAX / 2;
}
static void break_offset(struct manifest *m)
{
    m->tensors[0].offset = UINT64_MAX;
}
static void break_slot_range(struct manifest *m)
{
    m->tensors[3].offset = 2;
} /* inside the stride, outside the slot */
static void break_producer(struct manifest *m)
{
    m->producer[0] = '\0';
}
static void break_zero(struct manifest *m)
{
    m->slots = 0;
}
static void break_layers(struct manifest *m)
{
    m->layers = 3;
}

static void (*const breaks[])(struct manifest *) = {
    break_name,         break_same_name,  break_unterminated, break_same_tensor, break_kind,
    break_empty_dense,  break_layer,      break_same_part,    break_other_part,  break_slots,
    break_stride,       break_bytes,      break_overflow,     break_sum,         break_missing,
    break_region_index, break_dtype,      break_dims,         break_shape,       break_shape_overflow,
    break_offset,       break_slot_range, break_producer,     break_zero,        break_layers,
};
#define BREAKS ((int)(sizeof breaks / sizeof breaks[0]))

START_TEST(every_rule_is_checked)
{
    struct manifest m;
    struct blob *blob;
    struct err err = {0};
    manifest_make(&m);
    ck_assert_int_eq(manifest_validate(&m, &err), 0);
    breaks[_i](&m);
    ck_assert_int_eq(manifest_validate(&m, &err), ERR_INVALID);
    ck_assert_int_eq(strncmp(err.text, "manifest: ", 10), 0);
    ck_assert_int_eq(manifest_encode(&m, &blob, &err), ERR_INVALID);
    manifest_done(&m);
}
END_TEST

START_TEST(any_change_changes_the_digest)
{
    struct manifest m;
    manifest_make(&m);
    struct blob *blob = encoded(&m);
    strcpy(m.producer, "other"); /* two producers never match by chance */
    struct blob *other = encoded(&m);
    ck_assert_uint_ne(manifest_digest(blob), manifest_digest(other));
    blob_unref(blob);
    blob_unref(other);
    manifest_done(&m);
}
END_TEST

START_TEST(truncated_and_padded_bytes_are_refused)
{
    struct manifest m, back;
    struct err err = {0};
    manifest_make(&m);
    struct blob *blob = encoded(&m);
    uint8_t *copy = malloc(blob->len + 1);
    memcpy(copy, blob->data, blob->len);
    copy[blob->len] = 0;
    for (size_t len = 0; len <= blob->len + 1; len++) {
        struct blob *cut = blob_new(copy, len);
        int rc = manifest_decode(cut, &back, &err);
        ck_assert_int_eq(rc, len == blob->len ? 0 : ERR_CORRUPT);
        if (rc == 0)
            manifest_done(&back);
        blob_unref(cut);
    }
    free(copy);
    blob_unref(blob);
    manifest_done(&m);
}
END_TEST

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Whatever still decodes after a mutation must be valid, and encode to exactly the bytes it came from. */
START_TEST(mutations_are_refused_or_canonical)
{
    struct manifest m, back;
    manifest_make(&m);
    struct blob *blob = encoded(&m);
    uint64_t state = 0x9e3779b97f4a7c15ULL ^ (unsigned)_i;
    unsigned refused = 0, accepted = 0;
    for (int round = 0; round < 20000; round++) {
        struct blob *bad = blob_new(blob->data, blob->len);
        for (uint64_t n = 1 + random_next(&state) % 4; n > 0; n--) {
            size_t at = random_next(&state) % bad->len;
            switch (random_next(&state) % 3) {
            case 0:
                bad->data[at] ^= (uint8_t)(1u << random_next(&state) % 8);
                break;
            case 1:
                bad->data[at] = (uint8_t)random_next(&state);
                break;
            case 2:
                memset(bad->data + at, random_next(&state) % 2 ? 0xff : 0, bad->len - at < 8 ? bad->len - at : 8);
                break;
            }
        }
        struct err err = {0};
        int rc = manifest_decode(bad, &back, &err);
        if (rc == 0) {
            accepted++;
            struct blob *again = encoded(&back);
            ck_assert_uint_eq(again->len, bad->len);
            ck_assert_mem_eq(again->data, bad->data, bad->len);
            blob_unref(again);
            manifest_done(&back);
        } else {
            refused++;
            ck_assert_int_eq(rc, ERR_CORRUPT);
            ck_assert_str_ne(err.text, "");
        }
        blob_unref(bad);
    }
    ck_assert_uint_gt(refused, 1000);
    ck_assert_uint_gt(accepted, 100); /* letters of names may change */
    blob_unref(blob);
    manifest_done(&m);
}
END_TEST

START_TEST(a_small_blob_cannot_ask_for_much)
{
    struct manifest m, back;
    manifest_make(&m);
    struct blob *blob = encoded(&m);
    /* producer "test": magic 7, version 1, string 5, three numbers 12; then the count of regions */
    memset(blob->data + 25, 0xff, 4);
    ck_assert_int_eq(manifest_decode(blob, &back, NULL), ERR_CORRUPT);
    blob_unref(blob);
    manifest_done(&m);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("manifest");
    TCase *t = tcase_create("manifest");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, what_is_encoded_comes_back);
    tcase_add_test(t, no_config_is_not_an_empty_one);
    tcase_add_loop_test(t, every_rule_is_checked, 0, BREAKS);
    tcase_add_test(t, any_change_changes_the_digest);
    tcase_add_test(t, truncated_and_padded_bytes_are_refused);
    tcase_add_loop_test(t, mutations_are_refused_or_canonical, 0, 3);
    tcase_add_test(t, a_small_blob_cannot_ask_for_much);
    suite_add_tcase(s, t);
    return suite_run(s);
}
