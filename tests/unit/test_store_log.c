/* The log of the store's changes: generations in turn, what a kill and a power failure leave of it, damage at every
 * byte, growth; and a store's disk whose process ends in the midst of generations. */
#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "coordinator/mdb_file.h"
#include "coordinator/store_disk.h"
#include "coordinator/store_log.h"
#include "tests/harness/suite.h"

static char dir[64];
static struct store *source; /* makes batches */
static unsigned flushes;     /* of any file */
static unsigned flushed_writes;

static void folder_empty(void)
{
    char command[96];
    snprintf(command, sizeof command, "rm -rf '%s'/*", dir);
    ck_assert_int_eq(system(command), 0);
}

static void setup(void)
{
    strcpy(dir, "/tmp/eep-log-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    source = store_new(&(struct store_config){.budget_bytes = (size_t)8 << 20, .batches = true});
}

static void teardown(void)
{
    folder_empty();
    rmdir(dir);
    store_free(source);
}

/* In place of libc's. */
int fdatasync(int fd)
{
    __atomic_add_fetch(&flushes, 1, __ATOMIC_SEQ_CST);
    return (int)syscall(SYS_fdatasync, fd);
}

ssize_t pwrite(int fd, const void *data, size_t len, off_t at)
{
    if (fcntl(fd, F_GETFL) & O_DSYNC)
        __atomic_add_fetch(&flushed_writes, 1, __ATOMIC_SEQ_CST);
    return (ssize_t)syscall(SYS_pwrite64, fd, data, len, at);
}

/* ---- writing and reading ---- */

static struct store_changes *change_new(const char *key, const void *value, size_t len)
{
    struct store_changes *c = calloc(1, sizeof *c);
    const struct store_put put = {.key = key, .data = value, .len = len};
    ck_assert_int_eq(store_set(source, &put, NULL, NULL), 0);
    store_batch_take(source, &c->batch);
    c->prev = c;
    return c;
}

static void append_bytes(struct store_log *log, const char *key, const void *value, size_t len, uint64_t applied)
{
    struct err err = {0};
    struct store_changes *c = change_new(key, value, len);
    ck_assert_msg(store_log_write(log, c, applied, &err) == 0, "%s", err.text);
    store_changes_free(c);
}

static void append(struct store_log *log, const char *key, const char *value)
{
    append_bytes(log, key, value, strlen(value), 0);
}

static struct store_log *log_open(bool sync)
{
    struct store_log *log;
    struct err err = {0};
    ck_assert_msg(store_log_open(dir, sync, &log, &err) == 0, "%s", err.text);
    return log;
}

/* What a part says, "KEY=VALUE " for each change. */
static const char *told(struct store_log *log, struct store_log_part part, size_t bytes, int *ret_rc, struct err *err)
{
    static char text[4096];
    struct store_changes *list;
    uint64_t revision = 0;
    size_t len = 0;
    text[0] = '\0';
    while ((*ret_rc = store_log_read(log, &part, bytes, &list, err)) == 0 && list) {
        for (const struct store_changes *c = list; c; c = c->next) {
            struct store_op op;
            size_t at = 0;
            while (store_batch_next(&c->batch, &at, &op)) {
                len += (size_t)snprintf(text + len, sizeof text - len, "%.*s=%.*s ", (int)op.key_len, op.key,
                                        (int)op.len, (const char *)op.data);
                ck_assert_uint_gt(op.revision, revision);
                revision = op.revision;
            }
            ck_assert_uint_eq(c->batch.last_revision, revision);
        }
        store_changes_free(list);
    }
    return text;
}

/* Of the log that is there. */
static const char *recovered(int *ret_rc, struct err *err)
{
    struct store_log *log = log_open(true);
    const char *text = told(log, store_log_turn(log), 1 << 20, ret_rc, err);
    store_log_close(log);
    return text;
}

static void drop_all(struct store_log *log, uint64_t applied)
{
    while (store_log_droppable(log, applied))
        ck_assert_int_eq(store_log_write(log, NULL, applied, NULL), 0);
}

START_TEST(generations_in_turn)
{
    struct err err = {0};
    int rc;
    struct store_log *log = log_open(true);
    ck_assert_uint_eq(store_log_bytes(log), 0);
    append(log, "a", "1");
    append(log, "b", "");
    ck_assert_uint_gt(store_log_bytes(log), 2 * STORE_OP_HEAD);
    struct store_log_part first = store_log_turn(log);
    ck_assert_uint_eq(store_log_bytes(log), 0);
    append(log, "c", "3");
    ck_assert_str_eq(told(log, first, 1 << 20, &rc, &err), "a=1 b= ");
    ck_assert_str_eq(told(log, first, 1, &rc, &err), "a=1 b= "); /* one by one */
    ck_assert_int_eq(rc, 0);
    struct store_log_part second = store_log_turn(log);
    ck_assert_uint_eq(second.first, first.end);
    ck_assert_str_eq(told(log, second, 1 << 20, &rc, &err), "c=3 ");

    /* applied: its entries go with the next commit, and are there no more */
    ck_assert(!store_log_droppable(log, first.first) && store_log_droppable(log, first.end));
    append_bytes(log, "d", "4", 1, first.end);
    ck_assert(!store_log_droppable(log, first.end));
    (void)told(log, first, 1 << 20, &rc, &err);
    ck_assert_int_eq(rc, ERR_CORRUPT);
    ck_assert_msg(strstr(err.text, "entry 1 of the log is missing") != NULL, "%s", err.text);
    store_log_close(log);
    ck_assert_str_eq(recovered(&rc, &err), "c=3 d=4 ");
    ck_assert_int_eq(store_log_remove(dir, &err), 0);
    ck_assert_str_eq(recovered(&rc, &err), "");
    ck_assert_int_eq(rc, 0);
}
END_TEST

/* Batches that wait together share a transaction: one flush for their pages, and a write that is flushed by itself for
 * the page that makes them valid. */
START_TEST(flushes_of_a_commit)
{
    for (int sync = 0; sync < 2; sync++) {
        struct store_log *log = log_open(sync);
        struct store_changes *list = change_new("a", "1", 1), *more = change_new("b", "2", 1);
        list->next = list->prev = more;
        more->prev = list;
        unsigned before = flushes, before_valid = flushed_writes;
        ck_assert_int_eq(store_log_write(log, list, 0, NULL), 0);
        ck_assert_uint_eq(flushes - before, sync ? 1 : 0);
        ck_assert_uint_eq(flushed_writes - before_valid, sync ? 1 : 0);
        store_changes_free(list);
        store_log_close(log);
    }
}
END_TEST

/* ---- power failures and damage ---- */

static int file_open(void)
{
    char path[128];
    snprintf(path, sizeof path, "%s/" STORE_LOG_FILE, dir);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    ck_assert_int_ge(fd, 0);
    return fd;
}

static size_t file_size(int fd)
{
    struct stat st;
    ck_assert_int_eq(fstat(fd, &st), 0);
    return (size_t)st.st_size;
}

/* A power failure in the midst of a commit: the pages that make commits valid are those of before.  Nothing of the
 * commit is there, all before it is; also when it has dropped entries. */
START_TEST(half_a_commit)
{
    struct err err = {0};
    int rc;
    uint8_t pages[2 * 4096];
    struct store_log *log = log_open(true);
    int fd = file_open();
    append(log, "a", "1");
    struct store_log_part part = store_log_turn(log);
    append(log, "b", "2");
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(pread(fd, pages, sizeof pages, 0), sizeof pages);
        char value[2] = {(char)('3' + i), 0};
        append_bytes(log, "next", value, 1, i == 2 ? part.end : 0);
        store_log_close(log);
        ck_assert_int_eq(pwrite(fd, pages, sizeof pages, 0), sizeof pages);
        ck_assert_str_eq(recovered(&rc, &err), "a=1 b=2 ");
        ck_assert_int_eq(rc, 0);
        log = log_open(true);
    }
    store_log_close(log);
    close(fd);
}
END_TEST

/* One bit of any byte of an entry, wherever pages have it: refused, with its number, and its key where that is whole.
 */
START_TEST(flipped_byte)
{
    struct err err = {0};
    int rc;
    struct store_log *log = log_open(true);
    append(log, "first", "one");
    append(log, "second", "two");
    append(log, "third", "three");
    store_log_close(log);
    int fd = file_open();
    size_t size = file_size(fd), head = 24 + STORE_OP_HEAD, len = head + strlen("secondtwo");
    uint8_t *whole = malloc(size);
    ck_assert_int_eq(pread(fd, whole, size, 0), (ssize_t)size);
    for (size_t place = 0; place < len; place++) {
        unsigned copies = 0;
        for (uint8_t *at = whole; (at = memmem(at, size - (size_t)(at - whole), "secondtwo", 9)); at++, copies++) {
            const uint8_t *byte = at - head + place;
            uint8_t flipped = *byte ^ (uint8_t)(1u << place % 8);
            ck_assert_int_eq(pwrite(fd, &flipped, 1, byte - whole), 1);
        }
        ck_assert_uint_gt(copies, 0);
        ck_assert_str_eq(recovered(&rc, &err), "");
        ck_assert_msg(rc == ERR_CORRUPT && strstr(err.text, "entry 2 ") && strstr(err.text, "checksum"), "byte %zu: %s",
                      place, err.text);
        if (place < 24 || place >= head + strlen("second"))
            ck_assert_msg(strstr(err.text, "'second'") != NULL, "byte %zu: %s", place, err.text);
        ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);
    }
    ck_assert_str_eq(recovered(&rc, &err), "first=one second=two third=three ");
    close(fd);
    free(whole);
}
END_TEST

START_TEST(missing_entry)
{
    struct err err = {0};
    int rc;
    MDB_env *env;
    MDB_dbi dbi;
    MDB_txn *txn;
    uint8_t two[8] = {0, 0, 0, 0, 0, 0, 0, 2};
    MDB_val key = {sizeof two, two};
    struct store_log *log = log_open(false);
    append(log, "a", "1");
    append(log, "b", "2");
    append(log, "c", "3");
    store_log_close(log);
    ck_assert_int_eq(mdb_file_open(dir, STORE_LOG_FILE, 0, &env, &dbi, &err), 0);
    ck_assert_int_eq(mdb_txn_begin(env, NULL, 0, &txn), 0);
    ck_assert_int_eq(mdb_del(txn, dbi, &key, NULL), 0);
    ck_assert_int_eq(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
    ck_assert_str_eq(recovered(&rc, &err), "");
    ck_assert_msg(rc == ERR_CORRUPT && strstr(err.text, "entry 2 of the log is missing"), "%d %s", rc, err.text);
}
END_TEST

/* ---- growth ---- */

/* Rounds of generations, each larger than the map is at first: it grows, and what is dropped is used again. */
START_TEST(growth)
{
    enum { LEN = 700000, ENTRIES = 30, ROUNDS_OF_IT = 6 };
    uint8_t *value = malloc(LEN);
    struct store_log *log = log_open(false);
    int fd = file_open();
    struct store_log_part before = {1, 1};
    size_t size_first = 0;
    for (int round = 0; round < ROUNDS_OF_IT; round++) {
        for (int i = 0; i < ENTRIES; i++) {
            memset(value, round * ENTRIES + i, LEN);
            append_bytes(log, "big", value, LEN - (size_t)i * 5000, before.end);
        }
        drop_all(log, before.end);
        struct store_log_part part = store_log_turn(log), at = part;
        for (int i = 0; i < ENTRIES; i++) {
            struct store_changes *list;
            struct store_op op;
            size_t from = 0;
            ck_assert_int_eq(store_log_read(log, &at, 1, &list, NULL), 0);
            ck_assert(store_batch_next(&list->batch, &from, &op) && op.len == LEN - (size_t)i * 5000);
            const uint8_t *data = op.data;
            ck_assert(data[0] == (uint8_t)(round * ENTRIES + i) && data[op.len - 1] == data[0]);
            store_changes_free(list);
        }
        before = part;
        if (round == 1)
            size_first = file_size(fd);
    }
    ck_assert_uint_gt(size_first, (size_t)16 << 20);
    ck_assert_uint_le(file_size(fd), 2 * size_first);
    store_log_close(log);
    close(fd);
    free(value);
}
END_TEST

/* ---- a disk over several generations ---- */

enum { BIG = 1 << 20, ROUNDS = 90, NAMES = 7 };

static struct store *big_store(void)
{
    return store_new(&(struct store_config){.budget_bytes = (size_t)64 << 20, .history_bytes = 4096, .batches = true});
}

static void submit(struct store_disk *disk, struct store *store)
{
    struct store_batch batch;
    struct err err = {0};
    store_batch_take(store, &batch);
    uint64_t number = batch.number, done = 0, first;
    ck_assert_msg(store_disk_submit(disk, &batch, &err) == 0, "%s", err.text);
    while (done < number) {
        struct pollfd p = {.fd = store_disk_fd(disk), .events = POLLIN};
        ck_assert_int_eq(poll(&p, 1, 60000), 1);
        ck_assert_msg(store_disk_done(disk, &done, &first, &err) == 0, "%s", err.text);
    }
    ck_assert_uint_eq(first, UINT64_MAX);
}

/* Rounds of large values over a few keys; at last one goes. */
static void write_rounds(struct store_disk *disk, struct store *store)
{
    uint8_t *value = calloc(1, BIG);
    char key[16];
    for (int i = 0; i < ROUNDS; i++) {
        snprintf(key, sizeof key, "big/%d", i % NAMES);
        memset(value, i, BIG);
        const struct store_put put = {.key = key, .data = value, .len = BIG};
        ck_assert_int_eq(store_set(store, &put, NULL, NULL), 0);
        submit(disk, store);
    }
    ck_assert_int_eq(store_delete(store, "big/0", NULL), 0);
    submit(disk, store);
    free(value);
}

static void expect_rounds(const struct store *store)
{
    char key[16];
    struct store_value value;
    for (int i = ROUNDS - NAMES; i < ROUNDS; i++) {
        snprintf(key, sizeof key, "big/%d", i % NAMES);
        int rc = store_get(store, key, &value, NULL, NULL);
        if (i % NAMES == 0) {
            ck_assert_int_eq(rc, ERR_NOTFOUND);
            continue;
        }
        ck_assert_int_eq(rc, 0);
        ck_assert_uint_eq(value.len, BIG);
        const uint8_t *data = value.data;
        ck_assert(data[0] == (uint8_t)i && data[BIG - 1] == (uint8_t)i);
    }
}

static bool log_is_there(void)
{
    char path[128];
    snprintf(path, sizeof path, "%s/" STORE_LOG_FILE, dir);
    return access(path, F_OK) == 0;
}

/* 0: the process closes it.  1: it ends as with kill -9. */
START_TEST(generations_of_a_disk)
{
    struct store_disk *disk;
    struct err err = {0};
    pid_t child = fork();
    if (child == 0) {
        struct store *store = big_store();
        if (store_disk_open(dir, STORE_OS, store, &disk, &err) < 0)
            _exit(1);
        uint64_t revision = store_revision(store);
        write_rounds(disk, store);
        if (store_revision(store) != revision + ROUNDS + 1)
            _exit(2);
        if (_i == 0)
            store_disk_close(disk);
        _exit(0);
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert_int_eq(status, 0);
    ck_assert(log_is_there() == (_i == 1));
    struct store *store = big_store();
    ck_assert_msg(store_disk_open(dir, STORE_FSYNC, store, &disk, &err) == 0, "%s", err.text);
    expect_rounds(store);
    ck_assert_uint_gt(store_revision(store), ROUNDS + 1);
    ck_assert(log_is_there()); /* its own */
    store_disk_close(disk);
    ck_assert(!log_is_there());
    store_free(store);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("store-log");
    TCase *tc = tcase_create("log");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, generations_in_turn);
    tcase_add_test(tc, flushes_of_a_commit);
    tcase_add_test(tc, half_a_commit);
    tcase_add_test(tc, flipped_byte);
    tcase_add_test(tc, missing_entry);
    tcase_add_test(tc, growth);
    tcase_add_loop_test(tc, generations_of_a_disk, 0, 2);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
