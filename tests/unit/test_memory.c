/* Memory backends and the weights that lie in them: a contract suite over a table of backends, GPU memory among them
 * where there is a GPU, or the driver of tests/fakecuda.  Bytes are compared by their digests, which is all that every
 * backend can read. */
#include <check.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/memory.h"
#include "agent/weights.h"
#include "common/digest.h"
#include "tests/harness/suite.h"

static const char *const backends[] = {"host", "cuda"};
#define HOST 1 /* the first ones: without GPU memory */
static int n_backends = HOST;

/* In a child: a process that has used the driver cannot fork tests that use it. */
static bool cuda_present(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct err err = {0};
        struct memory_backend *m = memory_open("cuda", &err);
        if (!m)
            printf("memory on a GPU is not tested: %s\n", err.text);
        fflush(NULL);
        _exit(m ? 0 : 1);
    }
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

static struct memory_backend *backend_open(int i)
{
    struct err err = {0};
    struct memory_backend *m = memory_open(backends[i], &err);
    ck_assert_msg(m != NULL, "%s", err.text);
    return m;
}

/* The region holds these bytes there. */
static bool holds(struct memory_backend *m, const struct memory_region *r, size_t offset, const void *bytes, size_t len)
{
    uint64_t digest = 0;
    struct err err = {0};
    ck_assert_msg(m->digest(m, r, offset, len, 0, &digest, &err) == 0, "%s", err.text);
    return digest == digest_bytes(bytes, len, 0);
}

START_TEST(unknown_names_are_refused)
{
    struct err err = {0};
    ck_assert_ptr_null(memory_open("disk", &err));
    ck_assert_int_eq(err.code, ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(err.text, "\"disk\""));
    ck_assert_ptr_null(memory_open("host:1", &err));
    ck_assert_int_eq(err.code, ERR_INVALID);
    ck_assert_ptr_null(memory_open("cud", &err));
    ck_assert_int_eq(err.code, ERR_INVALID);
    ck_assert_ptr_null(memory_open("cuda:no-gpu", &err)); /* no backend, no driver, or no such GPU */
    ck_assert(err.code == ERR_UNSUPPORTED || err.code == ERR_INVALID || err.code == ERR_NOTFOUND);
    ck_assert_msg(strstr(err.text, "\"cuda\"") != NULL, "%s", err.text);
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
    static const uint8_t zeros[5000];
    ck_assert(holds(m, &r, 0, zeros, 5000));
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
    ck_assert(holds(m, &a, 100, "hello", 5));
    ck_assert(holds(m, &b, 100, "hello", 5));
    ck_assert_int_eq(m->write(m, &b, 200, "back", 4, &err), 0);
    ck_assert(holds(m, &b, 200, "back", 4));
    ck_assert(holds(m, &a, 200, "back", 4));
    char text[5] = "";
    ck_assert_int_eq(m->read(m, &a, 200, text, 4, &err), 0);
    ck_assert_str_eq(text, "back");
    ck_assert_int_eq(m->read(m, &a, 8190, text, 4, &err), ERR_INVALID);
    m->release(m, &a);
    ck_assert(holds(m, &b, 100, "hello", 5));
    m->release(m, &b);
    m->close(m);
}
END_TEST

/* ---- another process ---- */

static void descriptor_send(int socket, int fd)
{
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {0};
    struct msghdr msg = {.msg_iov = &(struct iovec){"x", 1}, .msg_iovlen = 1};
    msg.msg_control = control;
    msg.msg_controllen = sizeof control;
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    *c = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    ck_assert_int_eq(sendmsg(socket, &msg, 0), 1);
}

static int descriptor_receive(int socket)
{
    char byte;
    int fd = -1;
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fd)];
    struct msghdr msg = {.msg_iov = &(struct iovec){&byte, 1}, .msg_iovlen = 1};
    msg.msg_control = control;
    msg.msg_controllen = sizeof control;
    if (recvmsg(socket, &msg, 0) != 1 || !CMSG_FIRSTHDR(&msg))
        return -1;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof fd);
    return fd;
}

/* 0 when it sees "hello" and has answered. */
static int other_process(int socket, int backend)
{
    struct err err = {0};
    struct memory_region r;
    int fd = descriptor_receive(socket);
    struct memory_backend *m = memory_open(backends[backend], &err);
    if (!m || m->adopt(m, fd, 3u << 20, &r, &err) < 0)
        return 1;
    if (!holds(m, &r, (3u << 20) - 5, "hello", 5))
        return 2;
    if (m->write(m, &r, 7, "and back", 8, &err) < 0 || !holds(m, &r, 7, "and back", 8))
        return 3;
    return 0; /* without a clean end, as when it is killed */
}

START_TEST(another_process_sees_the_memory)
{
    int sockets[2], status = -1;
    struct memory_region r;
    struct err err = {0};
    ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), 0);
    pid_t child = fork();
    if (child == 0)
        _exit(other_process(sockets[1], _i));
    struct memory_backend *m = backend_open(_i);
    ck_assert_int_eq(m->alloc(m, "shared", 3u << 20, &r, &err), 0);
    ck_assert_int_eq(m->write(m, &r, (3u << 20) - 5, "hello", 5, &err), 0);
    ck_assert(holds(m, &r, (3u << 20) - 5, "hello", 5));
    descriptor_send(sockets[0], r.fd);
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert_int_eq(status, 0);
    ck_assert(holds(m, &r, 7, "and back", 8));
    ck_assert(holds(m, &r, (3u << 20) - 5, "hello", 5));
    m->release(m, &r);
    m->close(m);
}
END_TEST

START_TEST(what_is_no_memory_is_not_adopted)
{
    struct memory_backend *m = backend_open(_i);
    struct memory_region r, a;
    struct err err = {0};
    int pipes[2];
    ck_assert_int_eq(pipe(pipes), 0);
    ck_assert_int_eq(m->adopt(m, pipes[0], 100, &r, &err), ERR_INVALID);
    ck_assert_int_eq(close(pipes[0]), 0); /* still ours */
    close(pipes[1]);
    ck_assert_int_eq(m->alloc(m, "small", 4096, &a, &err), 0);
    int fd = dup(a.fd);
    ck_assert_int_lt(m->adopt(m, fd, (size_t)1 << 30, &r, &err), 0);
    ck_assert_int_eq(close(fd), 0);
    ck_assert_int_eq(m->write(m, &a, 0, "fine", 4, &err), 0); /* nothing is broken by it */
    ck_assert(holds(m, &a, 0, "fine", 4));
    m->release(m, &a);
    m->close(m);
}
END_TEST

/* Many writes in a row, as loading does, then digests of runs that begin and end anywhere. */
START_TEST(digests_of_any_place_and_length)
{
    const size_t bytes = (40u << 20) + 13;
    struct memory_backend *m = backend_open(_i);
    struct memory_region r;
    struct err err = {0};
    uint64_t state = 88172645463325252u;
    uint8_t *data = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        data[i] = (uint8_t)(state >> 32);
    }
    ck_assert_int_eq(m->alloc(m, "many", bytes, &r, &err), 0);
    for (size_t at = 0, len; at < bytes; at += len) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        len = 1 + state % (3u << 20);
        len = len < bytes - at ? len : bytes - at;
        uint8_t *piece = malloc(len);
        memcpy(piece, data + at, len);
        ck_assert_int_eq(m->write(m, &r, at, piece, len, &err), 0);
        memset(piece, 0xee, len); /* ours again at once */
        free(piece);
    }
    ck_assert(holds(m, &r, 0, data, bytes));
    for (int k = 0; k < 300; k++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        size_t offset = k < 40 ? (size_t)k : state % bytes, most = bytes - offset;
        size_t len = k % 3 == 0 ? state / 7 % 50 : state / 7 % (k % 3 == 1 ? 70000 : 2u << 20);
        len = len < most ? len : most;
        uint64_t first = state % 1000, digest = 0;
        ck_assert_msg(m->digest(m, &r, offset, len, first, &digest, &err) == 0, "%s", err.text);
        ck_assert_msg(digest == digest_bytes(data + offset, len, first), "%zu bytes at %zu", len, offset);
    }
    free(data);
    m->release(m, &r);
    m->close(m);
}
END_TEST

/* As the loader does it: threads fill what is lent, the pieces go in another order. */
static void *stage_fill(void *user)
{
    struct memory_stage *stage = user;
    for (size_t i = 0; i < stage->len; i++)
        ((uint8_t *)stage->data)[i] = (uint8_t)((stage->offset + i) * 2654435761u >> 13);
    return NULL;
}

#define LENT 12
START_TEST(stages_are_filled_by_other_threads)
{
    const size_t bytes = 3 * LENT * MEMORY_STAGE_BYTES + 12345;
    struct memory_backend *m = backend_open(_i);
    struct memory_region r;
    struct err err = {0};
    struct memory_stage stages[LENT], all = {.len = bytes, .data = malloc(bytes)};
    ck_assert_int_eq(m->alloc(m, "staged", bytes, &r, &err), 0);
    stage_fill(&all);
    for (size_t at = 0; at < bytes;) {
        pthread_t threads[LENT];
        int n = 0;
        for (; n < LENT && at < bytes; n++) {
            size_t len = bytes - at < MEMORY_STAGE_BYTES ? bytes - at : MEMORY_STAGE_BYTES;
            ck_assert_msg(m->stage_take(m, &r, at, len, &stages[n], &err) == 0, "%s", err.text);
            ck_assert_int_eq(pthread_create(&threads[n], NULL, stage_fill, &stages[n]), 0);
            at += len;
        }
        for (int i = n - 1; i >= 0; i--) {
            ck_assert_int_eq(pthread_join(threads[i], NULL), 0);
            ck_assert_msg(m->stage_write(m, &stages[i], &err) == 0, "%s", err.text);
        }
    }
    ck_assert(holds(m, &r, 0, all.data, bytes));
    free(all.data);
    m->release(m, &r);
    m->close(m);
}
END_TEST

START_TEST(stages_have_limits_and_can_be_given_up)
{
    struct memory_backend *m = backend_open(_i);
    struct memory_region r;
    struct err err = {0};
    struct memory_stage stage = {.len = 77};
    ck_assert_int_eq(m->alloc(m, "staged", 2 * MEMORY_STAGE_BYTES, &r, &err), 0);
    ck_assert_int_eq(m->stage_take(m, &r, 0, MEMORY_STAGE_BYTES + 1, &stage, &err), ERR_INVALID);
    ck_assert_int_eq(m->stage_take(m, &r, 2 * MEMORY_STAGE_BYTES - 4, 5, &stage, &err), ERR_INVALID);
    ck_assert_uint_eq(stage.len, 77); /* untouched on failure */
    for (int round = 0; round < 2; round++) {
        for (unsigned i = 0; i < MEMORY_STAGES; i++)
            ck_assert_msg(m->stage_take(m, &r, i, 8, &stage, &err) == 0, "%s", err.text);
        if (!m->in_place)
            ck_assert_int_eq(m->stage_take(m, &r, 0, 8, &stage, &err), ERR_LIMIT);
        m->stages_free(m);
    }
    ck_assert_int_eq(m->write(m, &r, 3, "fine", 4, &err), 0);
    ck_assert_int_eq(m->stage_take(m, &r, 7, 4, &stage, &err), 0);
    memcpy(stage.data, "also", 4);
    ck_assert_int_eq(m->stage_write(m, &stage, &err), 0);
    ck_assert(holds(m, &r, 3, "finealso", 8));
    m->stages_free(m);
    m->stages_free(m); /* again: nothing */
    m->release(m, &r);
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

/* More ranges than one launch takes, some of them of many pieces, of no bytes, and at odd places. */
START_TEST(many_digests_at_once_are_those_one_by_one)
{
    enum { BYTES = 12 << 20, RANGES = 20011 };
    struct err err = {0};
    struct memory_backend *m = backend_open(_i);
    struct memory_region r;
    uint8_t *data = malloc(BYTES);
    struct memory_range *ranges = calloc(RANGES, sizeof *ranges);
    uint64_t *digests = calloc(RANGES, sizeof *digests), state = 99;
    for (size_t i = 0; i < BYTES; i++)
        data[i] = (uint8_t)(i * 131 + (i >> 11));
    ck_assert_int_eq(m->alloc(m, "many", BYTES, &r, &err), 0);
    ck_assert_int_eq(m->write(m, &r, 0, data, BYTES, &err), 0);
    for (size_t i = 0; i < RANGES; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        size_t len = i % 1000 == 0 ? BYTES / 2 - 3 : i % 7 == 0 ? 0 : (size_t)(state >> 40) % 3000;
        ranges[i] = (struct memory_range){&r, (size_t)(state >> 33) % (BYTES - len), len, state % 77};
    }
    for (size_t n = RANGES; n > 0; n = n == 1 ? 0 : 1) {
        ck_assert_msg(m->digests(m, ranges, n, digests, &err) == 0, "%s", err.text);
        for (size_t i = 0; i < n; i++)
            ck_assert_msg(digests[i] == digest_bytes(data + ranges[i].offset, ranges[i].len, ranges[i].first_word),
                          "range %zu: %zu bytes at %zu", i, ranges[i].len, ranges[i].offset);
    }
    ranges[5].offset = BYTES + 1;
    ck_assert_int_eq(m->digests(m, ranges, 6, digests, &err), ERR_INVALID);
    ck_assert_int_eq(m->digests(m, ranges, 0, digests, &err), 0);
    m->release(m, &r);
    m->close(m);
    free(data);
    free(ranges);
    free(digests);
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
    ck_assert_int_eq(m->write(m, e[1].region, e[1].offset + 63, "\5", 1, &err), 0); /* one bit of a 4 */
    ck_assert_int_eq(weights_slot_verify(w, 0, 1, 2, &err), ERR_CORRUPT);
    ck_assert_int_eq(weights_slot_verify(w, 0, 1, 4, &err), ERR_INVALID);
    ck_assert_int_eq(weights_slot_verify(w, 2, 1, 0, &err), ERR_INVALID);

    /* the bytes of a slot, across its parts */
    uint8_t got[sizeof a + sizeof b];
    ck_assert_uint_eq(weights_slot_bytes(w, 0), sizeof got);
    ck_assert_int_eq(weights_slot_write(w, 0, 1, 98, "abcd", 4, &err), 0);
    ck_assert_int_eq(weights_slot_read(w, 0, 1, 0, got, sizeof got, &err), 0);
    ck_assert_int_eq(got[97], 3);
    ck_assert_mem_eq(got + 98, "abcd\4", 5);
    ck_assert_int_eq(weights_slot_read(w, 0, 1, 99, got, 2, &err), 0);
    ck_assert_mem_eq(got, "bc", 2);
    ck_assert_int_eq(weights_slot_read(w, 0, 1, 100, got, sizeof b + 1, &err), ERR_INVALID);
    ck_assert_int_eq(weights_slot_read(w, 0, 1, UINT64_MAX, got, 2, &err), ERR_INVALID);
    ck_assert_int_eq(weights_slot_read(w, 0, 9, 0, got, 1, &err), ERR_INVALID);
    ck_assert_int_eq(weights_slot_write(w, 2, 0, 0, got, 1, &err), ERR_INVALID);
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
    if (cuda_present())
        n_backends++;
    Suite *s = suite_create("memory");
    TCase *t = tcase_create("contract");
    tcase_add_test(t, unknown_names_are_refused);
    tcase_add_loop_test(t, memory_is_zeroed_sized_and_closed_on_exec, 0, n_backends);
    tcase_add_loop_test(t, exported_memory_is_the_same_memory, 0, n_backends);
    tcase_add_loop_test(t, nobody_can_cut_the_memory, 0, HOST);
    tcase_add_loop_test(t, another_process_sees_the_memory, 0, n_backends);
    tcase_add_loop_test(t, what_is_no_memory_is_not_adopted, 0, n_backends);
    tcase_add_loop_test(t, digests_of_any_place_and_length, 0, n_backends);
    tcase_add_loop_test(t, many_digests_at_once_are_those_one_by_one, 0, n_backends);
    tcase_add_loop_test(t, stages_are_filled_by_other_threads, 0, n_backends);
    tcase_add_loop_test(t, stages_have_limits_and_can_be_given_up, 0, n_backends);
    tcase_add_loop_test(t, ranges_are_checked, 0, n_backends);
    tcase_add_loop_test(t, copies_and_digests_agree_with_the_bytes, 0, n_backends);
    tcase_add_loop_test(t, slots_are_the_ranges_of_all_parts, 0, n_backends);
    tcase_add_loop_test(t, a_slot_is_verified_by_its_own_bytes_only, 0, n_backends);
    tcase_add_loop_test(t, a_model_that_contradicts_its_manifest_is_refused, 0, n_backends);
    suite_add_tcase(s, t);
    tcase_set_timeout(t, 60);
    return suite_run(s);
}
