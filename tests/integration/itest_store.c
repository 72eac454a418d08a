/* The store of the real coordinator: every edge of its files, and damage to them. */
#include <fcntl.h>
#include <sys/stat.h>

#include "tests/integration/itest_store.h"

/* ---- every edge of the file ---- */

#define EDGE_WRITES 30

static void preload_fault(const char *fault)
{
    static char library[256];
    const char *bin = getenv("EEP_BIN");
    setenv("EEP_FAULT", fault, 1);
    snprintf(library, sizeof library, "%s/tests/fault_disk.so", bin && *bin ? bin : "build");
    d.preload = library;
}

static void no_fault(void)
{
    unsetenv("EEP_FAULT");
    d.preload = NULL;
}

/* How many sets, one after another, are acknowledged. */
static uint32_t set_until_it_fails(void)
{
    char key[16];
    uint32_t acked = 0;
    struct rpc_client *c = client_open(5000);
    for (uint32_t i = 1; c && i <= EDGE_WRITES; i++) {
        snprintf(key, sizeof key, "k%u", i);
        if (kv_set(c, key, &i, sizeof i) < 0)
            break;
        acked = i;
    }
    rpc_client_free(c);
    return acked;
}

/* It ends by itself: killed, or because it cannot write. */
static void expect_end(const char *fault, const char *what)
{
    int status = 0;
    for (int i = 0; i < 500 && waitpid(d.pid, &status, WNOHANG) == 0; i++)
        usleep(10000);
    bool killed = strncmp(what, "kill", 4) == 0 || strcmp(what, "torn") == 0;
    ck_assert_msg(killed ? WIFSIGNALED(status) : WIFEXITED(status) && WEXITSTATUS(status) == 1, "%s: status %x, %s",
                  fault, status, log_text());
    d.pid = 0;
}

/* Everything that was acknowledged is there after a start, and it goes on. */
static void expect_kept(const char *fault, uint32_t acked)
{
    start();
    struct rpc_client *c = client_open(5000);
    char key[16], path[96];
    ck_assert_ptr_nonnull(c);
    for (uint32_t i = 1; i <= acked; i++) {
        uint32_t value;
        snprintf(key, sizeof key, "k%u", i);
        ck_assert_msg(kv_get(c, key, &value) == 1 && value == i, "%s: key %s of %u acknowledged is lost", fault, key, acked);
    }
    uint32_t one = 1;
    ck_assert_int_eq(kv_set(c, "after", &one, sizeof one), 0);
    rpc_client_free(c);
    daemon_process_stop(&d, SIGTERM);
    snprintf(path, sizeof path, "rm -rf '%s/state'", d.dir);
    ck_assert_int_eq(system(path), 0);
}

/* file: it may be hit while it opens it, at a write, or at its end. */
static void edge(const char *file, const char *call, unsigned n, const char *what)
{
    char fault[64];
    snprintf(fault, sizeof fault, "%s:%s:%u:%s", file, call, n, what);
    preload_fault(fault);
    uint32_t acked = daemon_process_start(&d) ? set_until_it_fails() : 0;
    no_fault();
    if (acked < EDGE_WRITES && d.pid > 0)
        expect_end(fault, what);
    daemon_process_stop(&d, n % 2 ? SIGKILL : SIGTERM); /* at its end the log goes into the file */
    expect_kept(fault, acked);
}

/* The log that a killed process left goes into the file at the next start, which is hit, and is made anew. */
static bool edge_of_recovery(const char *file, const char *call, unsigned n, const char *what)
{
    char fault[64];
    start();
    uint32_t acked = set_until_it_fails();
    ck_assert_uint_eq(acked, EDGE_WRITES);
    daemon_process_stop(&d, SIGKILL);
    snprintf(fault, sizeof fault, "state/%s:%s:%u:%s", file, call, n, what);
    preload_fault(fault);
    bool through = daemon_process_start(&d);
    no_fault();
    daemon_process_stop(&d, SIGKILL);
    expect_kept(fault, acked);
    return !through;
}

START_TEST(every_edge_of_the_file)
{
    static const struct {
        const char *call, *what;
    } edges[] = {{"write", "kill-before"}, {"write", "kill-after"}, {"write", "short"}, {"write", "torn"},
                 {"write", "enospc"},      {"write", "eio"},        {"sync", "kill-before"}, {"sync", "kill-after"},
                 {"sync", "eio"}};
    static const unsigned at[] = {1, 2, 3, 4, 5, 6, 8, 11, 15, 20, 28};
    for (size_t k = 0; k < sizeof at / sizeof *at; k++)
        edge("store.log", edges[_i].call, at[k], edges[_i].what);
    for (unsigned n = 1; n <= 8; n++)
        edge("store.mdb", edges[_i].call, n, edges[_i].what);
    unsigned hits = 0;
    for (unsigned n = 1; n <= 4; n++)
        hits += edge_of_recovery("store.mdb", edges[_i].call, n, edges[_i].what);
    ck_assert_uint_ge(hits, 2);
    ck_assert(edge_of_recovery("store.log", edges[_i].call, 1, edges[_i].what));
}
END_TEST

/* How many sets, one after another, are acknowledged when the n-th flush of a new log does not end.  -1: it does not
 * start. */
static int acknowledged_with_flushes(unsigned n)
{
    char fault[64], key[16], path[96];
    snprintf(fault, sizeof fault, "state/store.log:sync:%u:stall", n);
    preload_fault(fault);
    bool started = daemon_process_start(&d);
    struct rpc_client *c = started ? client_open(5000) : NULL;
    int acked = started ? 0 : -1;
    for (uint32_t i = 0; c && i < 10; i++, acked++) {
        Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
        ProtobufCMessage *reply = NULL;
        snprintf(key, sizeof key, "k%u", i);
        set.key = key;
        set.value.data = (uint8_t *)&i;
        set.value.len = sizeof i;
        if (rpc_client_call(c, CONTROL_KV_SET, &set.base, 2000, &reply, NULL) < 0)
            break;
        rpc_unpack_free(reply);
    }
    rpc_client_free(c);
    no_fault();
    daemon_process_stop(&d, SIGKILL);
    snprintf(path, sizeof path, "rm -rf '%s/state'", d.dir);
    ck_assert_int_eq(system(path), 0);
    return acked;
}

/* A set is acknowledged after the flush of its commit, not before.  One flush more is that of the making. */
START_TEST(acknowledged_after_the_flush)
{
    ck_assert_int_eq(acknowledged_with_flushes(2), 0);
    ck_assert_int_eq(acknowledged_with_flushes(3), 1);
}
END_TEST

/* ---- damage ---- */

static void file_path(char path[96])
{
    snprintf(path, 96, "%s/state/store.mdb", d.dir);
}

START_TEST(damaged_files_are_refused)
{
    char path[96], key[32], *value = malloc(3000);
    start();
    struct rpc_client *c = client_open(5000);
    for (int i = 0; i < 300; i++) {
        snprintf(key, sizeof key, "damaged/%03d", i);
        memset(value, 'a' + i % 26, 3000);
        ck_assert_int_eq(kv_set(c, key, value, 200 + (size_t)i * 9), 0);
    }
    rpc_client_free(c);
    daemon_process_stop(&d, SIGTERM);
    file_path(path);
    int fd = open(path, O_RDWR);
    struct stat st;
    ck_assert_int_eq(fstat(fd, &st), 0);
    size_t size = (size_t)st.st_size;
    uint8_t *whole = malloc(size);
    ck_assert_int_eq(pread(fd, whole, size, 0), (ssize_t)size);

    /* one byte of one value, wherever pages have it: its key is named */
    uint8_t flipped;
    size_t place;
    snprintf(key, sizeof key, "kdamaged/150");
    for (uint8_t *at = whole; (at = memmem(at, size - (size_t)(at - whole), key, strlen(key))); at++) {
        place = (size_t)(at - whole) + strlen(key) + 24 + 50; /* after the record's header */
        flipped = whole[place] ^ 0x10;
        ck_assert_int_eq(pwrite(fd, &flipped, 1, (off_t)place), 1);
    }
    ck_assert(!daemon_process_start(&d));
    ck_assert_msg(strstr(log_text(), "damaged/150") && strstr(log_text(), "checksum"), "%s", log_text());
    ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);

    /* a torn tail */
    ck_assert_int_eq(ftruncate(fd, (off_t)(size / 2)), 0);
    ck_assert(!daemon_process_start(&d));
    ck_assert_msg(strstr(log_text(), "cut off") || strstr(log_text(), "damaged:"), "%s", log_text());
    ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);

    /* any byte anywhere: it is refused with a sentence or served, never a crash */
    uint64_t state = 77;
    for (int i = 0; i < 40; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        place = (size_t)(state >> 20) % (i < 20 ? size : 5 * 4096);
        flipped = whole[place] ^ (uint8_t)(1u << i % 8);
        ck_assert_int_eq(pwrite(fd, &flipped, 1, (off_t)place), 1);
        pid_t child = 0;
        if (daemon_process_start(&d))
            child = d.pid;
        int status = daemon_process_stop(&d, SIGTERM);
        ck_assert_msg(!child || (WIFEXITED(status) && WEXITSTATUS(status) == 0), "byte %zu: status %x", place, status);
        ck_assert_ptr_null(strstr(log_text(), "Assertion"));
        ck_assert_int_eq(ftruncate(fd, 0), 0);
        ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);
    }
    start();
    c = client_open(5000);
    ck_assert_ptr_nonnull(c);
    rpc_client_free(c);
    close(fd);
    free(whole);
    free(value);
}
END_TEST

/* A bit of a change that was acknowledged and is in the log alone: refused, and its key is named. */
START_TEST(damaged_log)
{
    char path[96];
    uint32_t value;
    preload_fault("state/store.mdb:sync:4:stall"); /* a start needs three; the log never comes into the file */
    start();
    no_fault();
    struct rpc_client *c = client_open(5000);
    ck_assert_int_eq(kv_set(c, "logged/1", "one-value", 9), 0);
    ck_assert_int_eq(kv_set(c, "logged/2", "two-value", 9), 0);
    rpc_client_free(c);
    daemon_process_stop(&d, SIGKILL);
    snprintf(path, sizeof path, "%s/state/store.log.mdb", d.dir);
    int fd = open(path, O_RDWR);
    struct stat st;
    ck_assert_int_eq(fstat(fd, &st), 0);
    size_t size = (size_t)st.st_size;
    uint8_t *whole = malloc(size);
    ck_assert_int_eq(pread(fd, whole, size, 0), (ssize_t)size);
    for (uint8_t *at = whole; (at = memmem(at, size - (size_t)(at - whole), "two-value", 9)); at++)
        ck_assert_int_eq(pwrite(fd, "X", 1, at - whole), 1);
    ck_assert(!daemon_process_start(&d));
    ck_assert_msg(strstr(log_text(), "whose first key is 'logged/2'") != NULL, "%s", log_text());
    ck_assert_int_eq(pwrite(fd, whole, size, 0), (ssize_t)size);
    close(fd);
    free(whole);
    start();
    c = client_open(5000);
    ck_assert_int_eq(kv_get(c, "logged/1", &value), 1);
    ck_assert_int_eq(memcmp(&value, "one-", 4), 0);
    ck_assert_int_eq(kv_get(c, "logged/2", &value), 1);
    rpc_client_free(c);
}
END_TEST

static void add(TCase *tc)
{
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, every_edge_of_the_file, 0, 9);
    tcase_add_test(tc, acknowledged_after_the_flush);
    tcase_add_test(tc, damaged_files_are_refused);
    tcase_add_test(tc, damaged_log);
}

int main(void)
{
    return suite_main("store", add, 180);
}
