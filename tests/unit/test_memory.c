/* Memory backends and the weights that lie in them: a contract suite over a table of backends. */
#include <check.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/memory.h"
#include "agent/weights.h"
#include "common/digest.h"

static const char *const backends[] = {"host"};
#define BACKENDS ((int)(sizeof backends / sizeof backends[0]))

static struct memory_backend *backend_open(int i)
{
    struct err err = {0};
    struct memory_backend *m = memory_open(backends[i], &err);
    ck_assert_msg(m != NULL, "%s", err.text);
    return m;
}

START_TEST(unknown_names_are_refused)
{
    struct err err = {0};
    ck_assert_ptr_null(memory_open("disk", &err));
    ck_assert_int_eq(err.code, ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "\"disk\""));
    ck_assert_ptr_null(memory_open("cuda", &err));
    ck_assert_int_eq(err.code, ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err.text, "not in this build"));
}
END_TEST

START_TEST(memory_is_zeroed_sized_and_closed_on_exec)
{
    struct memory_backend *m = backend_open(_i);
    struct memory_region r;
    struct err err = {0};
    ck_assert_int_eq(m->alloc(m, "a", 5000, &r, &err), 0);
    ck_assert_uint_eq(r.bytes, 5000);
    ck_assert_uint_ge(r.mapped, 5000);
    ck_assert_uint_eq(r.mapped % 4096, 0);
    ck_assert_int_eq(fcntl(r.fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    for (size_t i = 0; i < 5000; i++)
        ck_assert_uint_eq(((uint8_t *)r.base)[i], 0);
    int fd = r.fd;
    m->release(m, &r);
    ck_assert_int_eq(fcntl(fd, F_GETFD), -1);
    m->release(m, &r); /* again: nothing */
    m->close(m);
}
END_TEST

START_TEST(exported_memory_is_the_same_memory)
{
    struct memory_backend *m = backend_open(_i);
    struct memory_region a, b;
    struct err err = {0};
    ck_assert_int_eq(m->alloc(m, "a", 8192, &a, &err), 0);
    ck_assert_int_eq(m->write(m, &a, 100, "hello", 5, &err), 0);
    ck_assert_int_eq(m->adopt(m, dup(a.fd), 8192, &b, &err), 0);
    ck_assert_int_eq(memcmp((char *)b.base + 100, "hello", 5), 0);
    memcpy((char *)b.base + 200, "back", 4);
    ck_assert_int_eq(memcmp((char *)a.base + 200, "back", 4), 0);
    m->release(m, &a);
    ck_assert_int_eq(memcmp((char *)b.base + 100, "hello", 5), 0);
    m->release(m, &b);
    m->close(m);
}
END_TEST

START_TEST(nobody_can_cut_the_memory)
{
    struct memory_backend *m = backend_open(_i);
    struct memory_region r;
    struct err err = {0};
    ck_assert_int_eq(m->alloc(m, "a", 8192, &r, &err), 0);
    ck_assert_int_eq(ftruncate(r.fd, 0), -1);
    ck_assert_int_eq(ftruncate(r.fd, 1 << 20), -1);
    m->release(m, &r);

    /* A memfd that somebody else made is sealed when it is adopted ... */
    int fd = memfd_create("other", MFD_ALLOW_SEALING);
    ck_assert_int_eq(ftruncate(fd, 10000), 0);
    ck_assert_int_eq(m->adopt(m, fd, 10000, &r, &err), 0);
    ck_assert_int_eq(ftruncate(fd, 0), -1);
    ck_assert_int_eq(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    m->release(m, &r);

    /* ... and one that is too small, or cannot be sealed, is refused and stays the caller's. */
    fd = memfd_create("small", MFD_ALLOW_SEALING);
    ck_assert_int_eq(ftruncate(fd, 99), 0);
    ck_assert_int_eq(m->adopt(m, fd, 100, &r, &err), ERR_INVALID);
    ck_assert_int_eq(close(fd), 0);
    fd = memfd_create("unsealable", 0);
    ck_assert_int_eq(ftruncate(fd, 100), 0);
    ck_assert_int_eq(m->adopt(m, fd, 100, &r, &err), ERR_INVALID);
    ck_assert_int_eq(close(fd), 0);
    int pipes[2];
    ck_assert_int_eq(pipe(pipes), 0);
    ck_assert_int_eq(m->adopt(m, pipes[0], 100, &r, &err), ERR_INVALID);
    close(pipes[0]);
    close(pipes[1]);
    m->close(m);
}
END_TEST

START_TEST(ranges_are_checked)
{
    struct memory_backend *m = backend_open(_i);
    struct memory_region r;
    struct err err = {0};
    uint64_t digest = 77;
    ck_assert_int_eq(m->alloc(m, "a", 100, &r, &err), 0);
    ck_assert_int_eq(m->write(m, &r, 96, "12345", 5, &err), ERR_INVALID);
    ck_assert_int_eq(m->write(m, &r, SIZE_MAX, "12345", 5, &err), ERR_INVALID);
    ck_assert_int_eq(m->digest(m, &r, 0, 101, 0, &digest, &err), ERR_INVALID);
    ck_assert_int_eq(m->copy(m, &r, 50, &r, 60, 41, &err), ERR_INVALID);
    ck_assert_uint_eq(digest, 77); /* untouched on failure */
    ck_assert_int_eq(m->alloc(m, "nothing", 0, &r, &err), ERR_INVALID);
    ck_assert_int_eq(m->alloc(m, "far too much", (size_t)1 << 60, &r, &err), ERR_NOMEM);
    ck_assert_ptr_nonnull(strstr(err.text, "far too much"));
    ck_assert_ptr_nonnull(strstr(err.text, "1152921504606846976"));
    m->release(m, &r);
    m->close(m);
}
END_TEST

START_TEST(copies_and_digests_agree_with_the_bytes)
{
    struct memory_backend *m = backend_open(_i);
    struct memory_region a, b;
    struct err err = {0};
    uint8_t bytes[1000];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)(i * 37 + 11);
    ck_assert_int_eq(m->alloc(m, "a", 4096, &a, &err), 0);
    ck_assert_int_eq(m->alloc(m, "b", 4096, &b, &err), 0);
    ck_assert_int_eq(m->write(m, &a, 8, bytes, sizeof bytes, &err), 0);
    ck_assert_int_eq(m->copy(m, &b, 104, &a, 8, sizeof bytes, &err), 0);
    uint64_t x = 0, y = 1;
    ck_assert_int_eq(m->digest(m, &a, 8, sizeof bytes, 5, &x, &err), 0);
    ck_assert_int_eq(m->digest(m, &b, 104, sizeof bytes, 5, &y, &err), 0);
    ck_assert_uint_eq(x, y);
    ck_assert_uint_eq(x, digest_bytes(bytes, sizeof bytes, 5));
    m->release(m, &a);
    m->release(m, &b);
    m->close(m);
}
END_TEST

/* ---- weights: one dense region, two layers of two parts, three slots with padding between ---- */

static struct model *small_model(void)
{
    struct region regions[] = {
        {.kind = REGION_DENSE, .name = "dense", .bytes = 1000},
        {.kind = REGION_EXPERT,
         .name = "l0a",
         .layer = 0,
         .part = "a",
         .slots = 3,
         .stride = 128,
         .slot_bytes = 100,
         .bytes = 384},
        {.kind = REGION_EXPERT,
         .name = "l0b",
         .layer = 0,
         .part = "b",
         .slots = 3,
         .stride = 64,
         .slot_bytes = 64,
         .bytes = 192},
        {.kind = REGION_EXPERT,
         .name = "l1a",
         .layer = 1,
         .part = "a",
         .slots = 3,
         .stride = 128,
         .slot_bytes = 100,
         .bytes = 384},
        {.kind = REGION_EXPERT,
         .name = "l1b",
         .layer = 1,
         .part = "b",
         .slots = 3,
         .stride = 64,
         .slot_bytes = 64,
         .bytes = 192},
    };
    struct manifest m = {.producer = "test", .layers = 2, .logical = 4, .slots = 3, .n_regions = 5, .regions = regions};
    struct model *model;
    struct err err = {0};
    ck_assert_msg(manifest_model(&m, &model, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(model->expert_bytes, 164);
    ck_assert_uint_eq(model->dense_bytes, 1000);
    ck_assert_uint_eq(model->n_dense, 1);
    return model;
}

START_TEST(slots_are_the_ranges_of_all_parts)
{
    struct memory_backend *m = backend_open(_i);
    struct model *model = small_model();
    struct weights *w;
    struct err err = {0};
    ck_assert_msg(weights_allocate(m, model, &w, &err) == 0, "%s", err.text);
    struct extent e[SLOT_EXTENTS_MAX];
    ck_assert_uint_eq(weights_slot(w, 1, 2, e, SLOT_EXTENTS_MAX), 2);
    ck_assert_ptr_eq(e[0].region, &w->regions[3]);
    ck_assert_uint_eq(e[0].offset, 256);
    ck_assert_uint_eq(e[0].len, 100);
    ck_assert_ptr_eq(e[1].region, &w->regions[4]);
    ck_assert_uint_eq(e[1].offset, 128);
    ck_assert_uint_eq(weights_slot(w, 1, 3, e, SLOT_EXTENTS_MAX), 0);
    ck_assert_uint_eq(weights_slot(w, 2, 0, e, SLOT_EXTENTS_MAX), 0);
    ck_assert_uint_eq(weights_slot(w, 1, 0, e, 1), 1);
    ck_assert_uint_eq(weights_dense(w, e, SLOT_EXTENTS_MAX), 1);
    ck_assert_uint_eq(e[0].len, 1000);
    weights_free(w);
    model_unref(model);
    m->close(m);
}
END_TEST

START_TEST(a_slot_is_verified_by_its_own_bytes_only)
{
    struct memory_backend *m = backend_open(_i);
    struct model *model = small_model();
    struct weights *w;
    struct err err = {0};
    ck_assert_int_eq(weights_allocate(m, model, &w, &err), 0);
    uint8_t a[100], b[64];
    memset(a, 3, sizeof a);
    memset(b, 4, sizeof b);
    struct extent e[SLOT_EXTENTS_MAX];
    weights_slot(w, 0, 1, e, SLOT_EXTENTS_MAX);
    ck_assert_int_eq(m->write(m, e[0].region, e[0].offset, a, sizeof a, &err), 0);
    ck_assert_int_eq(m->write(m, e[1].region, e[1].offset, b, sizeof b, &err), 0);

    uint64_t digest = 0;
    ck_assert_int_eq(weights_slot_digest(w, 0, 1, &digest, &err), 0);
    /* words go on across the parts: 100 bytes are 13 of them */
    ck_assert_uint_eq(digest, digest_bytes(a, sizeof a, 0) + digest_bytes(b, sizeof b, 13));

    ck_assert_int_eq(weights_slot_verify(w, 0, 1, 2, &err), ERR_CORRUPT); /* no digest known */
    model->expert_digest[2] = digest;
    ck_assert_int_eq(weights_slot_verify(w, 0, 1, 2, &err), 0);
    ck_assert_int_eq(weights_slot_verify(w, 0, 0, 2, &err), ERR_CORRUPT);
    ck_assert_ptr_nonnull(strstr(err.text, "layer 0 slot 0 does not hold expert 2"));
    ck_assert_int_eq(m->write(m, e[0].region, e[0].offset + sizeof a, "pad", 3, &err), 0); /* between slots */
    ck_assert_int_eq(weights_slot_verify(w, 0, 1, 2, &err), 0);
    ((uint8_t *)e[1].region->base)[e[1].offset + 63] ^= 1;
    ck_assert_int_eq(weights_slot_verify(w, 0, 1, 2, &err), ERR_CORRUPT);
    ck_assert_int_eq(weights_slot_verify(w, 0, 1, 4, &err), ERR_INVALID);
    ck_assert_int_eq(weights_slot_verify(w, 2, 1, 0, &err), ERR_INVALID);
    weights_free(w);
    model_unref(model);
    m->close(m);
}
END_TEST

START_TEST(a_model_that_contradicts_its_manifest_is_refused)
{
    struct memory_backend *m = backend_open(_i);
    struct model *good = small_model();
    struct weights *w;
    struct err err = {0};
    struct model *bad = model_new(2, 5, 3, 1);
    bad->manifest = blob_ref(good->manifest);
    bad->manifest_digest = good->manifest_digest;
    ck_assert_int_eq(weights_allocate(m, bad, &w, &err), ERR_CORRUPT);
    model_unref(bad);
    good->manifest_digest++;
    ck_assert_int_eq(weights_allocate(m, good, &w, &err), ERR_CORRUPT);
    model_unref(good);
    m->close(m);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("memory");
    TCase *t = tcase_create("contract");
    tcase_add_test(t, unknown_names_are_refused);
    tcase_add_loop_test(t, memory_is_zeroed_sized_and_closed_on_exec, 0, BACKENDS);
    tcase_add_loop_test(t, exported_memory_is_the_same_memory, 0, BACKENDS);
    tcase_add_loop_test(t, nobody_can_cut_the_memory, 0, BACKENDS);
    tcase_add_loop_test(t, ranges_are_checked, 0, BACKENDS);
    tcase_add_loop_test(t, copies_and_digests_agree_with_the_bytes, 0, BACKENDS);
    tcase_add_loop_test(t, slots_are_the_ranges_of_all_parts, 0, BACKENDS);
    tcase_add_loop_test(t, a_slot_is_verified_by_its_own_bytes_only, 0, BACKENDS);
    tcase_add_loop_test(t, a_model_that_contradicts_its_manifest_is_refused, 0, BACKENDS);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
