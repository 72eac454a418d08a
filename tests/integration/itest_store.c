/* The store of the real coordinator under faults: every edge of its file, kill -9 under concurrent clients with the
 * recorded history checked for linearizability, and an ugly network. */
#include <check.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "common/clock.h"
#include "common/control_methods.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/caller.h"
#include "tests/harness/daemon.h"
#include "tests/harness/linear.h"
#include "tests/harness/tcpclient.h"

static struct daemon_process d;
static char socket_address[128];

static void setup(void)
{
    signal(SIGPIPE, SIG_IGN);
    daemon_process_init(&d);
    snprintf(socket_address, sizeof socket_address, "unix:%s/sock", d.dir);
    d.extra[0] = "--listen"; /* an address that stays the same over restarts */
    d.extra[1] = socket_address;
}

static void teardown(void)
{
    daemon_process_done(&d);
}

static char *log_text(void)
{
    static char text[65536];
    char path[80];
    snprintf(path, sizeof path, "%s/log", d.dir);
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    text[n] = '\0';
    if (f)
        fclose(f);
    return text;
}

static void start(void)
{
    ck_assert_msg(daemon_process_start(&d), "the coordinator did not start: %s", log_text());
}

static struct rpc_client *client_open(int timeout_ms)
{
    struct rpc_identity self = {.role = RPC_ROLE_OPERATOR};
    struct rpc_client *client = NULL;
    return rpc_client_connect(socket_address, &self, &pb__control__descriptor, timeout_ms, &client, NULL) == 0 ? client
                                                                                                           : NULL;
}

static int kv_set(struct rpc_client *c, const char *key, const void *data, size_t len)
{
    Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    request.key = (char *)key;
    request.value.data = (uint8_t *)data;
    request.value.len = len;
    int rc = rpc_client_call(c, CONTROL_KV_SET, &request.base, 10000, &reply, NULL);
    rpc_unpack_free(reply);
    return rc;
}

/* 1: *ret_value; 0: missing. */
static int kv_get(struct rpc_client *c, const char *key, uint32_t *ret_value)
{
    Pb__KvGetRequest request = PB__KV_GET_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    request.key = (char *)key;
    int rc = rpc_client_call(c, CONTROL_KV_GET, &request.base, 10000, &reply, NULL);
    if (rc == 0) {
        const ProtobufCBinaryData *value = &((Pb__KvValue *)reply)->value;
        *ret_value = 0;
        memcpy(ret_value, value->data, value->len < 4 ? value->len : 4);
        rpc_unpack_free(reply);
    }
    return rc == 0 ? 1 : rc == ERR_NOTFOUND ? 0 : rc;
}

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

/* ---- linearizability over kill -9 ---- */

#define CLIENTS 4
#define LKEYS 3
#define OPS_EACH 700

struct recorder {
    pthread_t thread;
    unsigned number;
    struct linear_op ops[LKEYS][OPS_EACH];
    size_t n[LKEYS];
    uint32_t seen[LKEYS];
};
static _Atomic bool stop_clients;
static _Atomic uint32_t next_value;

static uint32_t mix(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(*state >> 33);
}

/* All keys of the history in one call: each key's part is a change of its own in that key's history. */
static bool operate_on_all(struct rpc_client *c, struct recorder *r)
{
    Pb__KvMultiSetRequest request = PB__KV_MULTI_SET_REQUEST__INIT;
    Pb__KvSetRequest sets[LKEYS], *pointers[LKEYS];
    char keys[LKEYS][8];
    struct linear_op op = {.kind = LINEAR_SET, .value = ++next_value, .begin_ns = clock_now_ns(), .end_ns = UINT64_MAX};
    ProtobufCMessage *reply = NULL;
    for (unsigned k = 0; k < LKEYS; k++) {
        snprintf(keys[k], sizeof keys[k], "l%u", k);
        sets[k] = (Pb__KvSetRequest)PB__KV_SET_REQUEST__INIT;
        sets[k].key = keys[k];
        sets[k].value.data = (uint8_t *)&op.value;
        sets[k].value.len = 4;
        pointers[k] = &sets[k];
    }
    request.sets = pointers;
    request.n_sets = LKEYS;
    op.known = rpc_client_call(c, CONTROL_KV_MULTI_SET, &request.base, 10000, &reply, NULL) == 0;
    rpc_unpack_free(reply);
    if (op.known)
        op.end_ns = clock_now_ns();
    for (unsigned k = 0; k < LKEYS; k++)
        r->ops[k][r->n[k]++] = op;
    return op.known;
}

static bool any_full(const struct recorder *r)
{
    for (unsigned k = 0; k < LKEYS; k++)
        if (r->n[k] == OPS_EACH)
            return true;
    return false;
}

/* One operation, recorded.  false: the connection is gone. */
static bool operate(struct rpc_client *c, struct recorder *r, unsigned k, uint32_t dice)
{
    char key[8];
    struct linear_op op = {.value = ++next_value, .begin_ns = clock_now_ns(), .end_ns = UINT64_MAX};
    ProtobufCMessage *reply = NULL;
    int rc;
    snprintf(key, sizeof key, "l%u", k);
    if (dice < 30) {
        op.kind = LINEAR_SET;
        rc = kv_set(c, key, &op.value, 4);
    } else if (dice < 70) {
        op.kind = LINEAR_GET;
        rc = kv_get(c, key, &op.value);
        if (rc == 0)
            op.value = LINEAR_MISSING;
        rc = rc < 0 ? rc : 0;
        r->seen[k] = rc == 0 ? op.value : r->seen[k];
    } else if (dice < 95) {
        Pb__KvCasRequest request = PB__KV_CAS_REQUEST__INIT;
        op.kind = LINEAR_CAS;
        op.expected = r->seen[k];
        request.key = key;
        request.has_expected = op.expected != LINEAR_MISSING;
        request.expected.data = (uint8_t *)&op.expected;
        request.expected.len = 4;
        request.value.data = (uint8_t *)&op.value;
        request.value.len = 4;
        rc = rpc_client_call(c, CONTROL_KV_CAS, &request.base, 10000, &reply, NULL);
        if (rc == 0) {
            const Pb__KvCasReply *done = (const Pb__KvCasReply *)reply;
            op.swapped = done->swapped;
            if (!done->swapped && done->has_value)
                memcpy(&op.seen, done->value.data, 4);
            r->seen[k] = done->swapped ? op.value : op.seen;
        }
    } else {
        Pb__KvDeleteRequest request = PB__KV_DELETE_REQUEST__INIT;
        op.kind = LINEAR_DELETE;
        request.key = key;
        rc = rpc_client_call(c, CONTROL_KV_DELETE, &request.base, 10000, &reply, NULL);
        if (rc == ERR_NOTFOUND) { /* as good as a read of "missing" */
            op.kind = LINEAR_GET;
            op.value = LINEAR_MISSING;
            rc = 0;
        }
    }
    rpc_unpack_free(reply);
    op.known = rc == 0;
    if (op.known)
        op.end_ns = clock_now_ns();
    r->ops[k][r->n[k]++] = op;
    return rc == 0;
}

static void *recorder_main(void *arg)
{
    struct recorder *r = arg;
    uint64_t state = 99 + r->number;
    struct rpc_client *c = NULL;
    while (!stop_clients) {
        if (!c && !(c = client_open(200))) {
            usleep(2000);
            continue;
        }
        unsigned k = mix(&state) % LKEYS;
        if (any_full(r))
            break;
        if (mix(&state) % 12 == 0 ? !operate_on_all(c, r) : !operate(c, r, k, mix(&state) % 100)) {
            rpc_client_free(c);
            c = NULL;
        }
        if (mix(&state) % 4 == 0)
            usleep(mix(&state) % 3000);
    }
    rpc_client_free(c);
    return NULL;
}

/* The checker itself must see what is wrong. */
START_TEST(checker_finds_mistakes)
{
    struct linear_op good[] = {{.kind = LINEAR_SET, .value = 1, .known = true, .begin_ns = 1, .end_ns = 5},
                               {.kind = LINEAR_GET, .value = 0, .known = true, .begin_ns = 2, .end_ns = 3},
                               {.kind = LINEAR_SET, .value = 2, .begin_ns = 4, .end_ns = UINT64_MAX},
                               {.kind = LINEAR_GET, .value = 2, .known = true, .begin_ns = 8, .end_ns = 9}};
    ck_assert_int_eq(linear_check(good, 4), 1);
    struct linear_op lost[] = {{.kind = LINEAR_SET, .value = 1, .known = true, .begin_ns = 1, .end_ns = 2},
                               {.kind = LINEAR_GET, .value = 0, .known = true, .begin_ns = 3, .end_ns = 4}};
    ck_assert_int_eq(linear_check(lost, 2), 0);
    struct linear_op back[] = {{.kind = LINEAR_SET, .value = 1, .begin_ns = 1, .end_ns = UINT64_MAX},
                               {.kind = LINEAR_GET, .value = 1, .known = true, .begin_ns = 3, .end_ns = 4},
                               {.kind = LINEAR_GET, .value = 0, .known = true, .begin_ns = 5, .end_ns = 6}};
    ck_assert_int_eq(linear_check(back, 3), 0);
    struct linear_op twice[] = {
        {.kind = LINEAR_CAS, .value = 1, .swapped = true, .known = true, .begin_ns = 1, .end_ns = 9},
        {.kind = LINEAR_CAS, .value = 2, .swapped = true, .known = true, .begin_ns = 2, .end_ns = 8}};
    ck_assert_int_eq(linear_check(twice, 2), 0);
    struct linear_op appended[] = {
        {.kind = LINEAR_SET, .value = 1, .known = true, .begin_ns = 1, .end_ns = 2},
        {.kind = LINEAR_APPEND, .value = 2, .known = true, .begin_ns = 3, .end_ns = 4},
        {.kind = LINEAR_GET, .value = linear_append(1, 2), .known = true, .begin_ns = 5, .end_ns = 6}};
    ck_assert_int_eq(linear_check(appended, 3), 1);
    appended[2].value = linear_append(linear_append(1, 2), 2); /* twice */
    ck_assert_int_eq(linear_check(appended, 3), 0);
    struct linear_op sums[] = {
        {.kind = LINEAR_ADD, .amount = 2, .value = 2, .known = true, .begin_ns = 1, .end_ns = 9},
        {.kind = LINEAR_ADD, .amount = 3, .value = 5, .known = true, .begin_ns = 2, .end_ns = 8}};
    ck_assert_int_eq(linear_check(sums, 2), 1);
    sums[1].value = 3; /* one of them is lost */
    ck_assert_int_eq(linear_check(sums, 2), 0);
}
END_TEST

START_TEST(histories_are_linearizable)
{
    static struct recorder recorders[CLIENTS];
    memset(recorders, 0, sizeof recorders);
    stop_clients = false;
    start();
    for (unsigned i = 0; i < CLIENTS; i++) {
        recorders[i].number = i + 10 * (unsigned)_i;
        pthread_create(&recorders[i].thread, NULL, recorder_main, &recorders[i]);
    }
    for (int kill_number = 0; kill_number < 6; kill_number++) {
        usleep(100000 + (useconds_t)(kill_number * 37013 % 90000));
        daemon_process_stop(&d, SIGKILL);
        start();
    }
    usleep(100000);
    stop_clients = true;
    size_t answered = 0;
    for (unsigned i = 0; i < CLIENTS; i++)
        pthread_join(recorders[i].thread, NULL);
    static struct linear_op all[CLIENTS * OPS_EACH];
    for (unsigned k = 0; k < LKEYS; k++) {
        size_t n = 0;
        for (unsigned i = 0; i < CLIENTS; i++)
            for (size_t o = 0; o < recorders[i].n[k]; o++) {
                all[n++] = recorders[i].ops[k][o];
                answered += recorders[i].ops[k][o].known;
            }
        ck_assert_msg(linear_check(all, n) == 1, "the history of key l%u, %zu operations, is not linearizable", k, n);
    }
    ck_assert_uint_gt(answered, 200);
}
END_TEST

/* ---- TCPStore's clients beside native ones, their connections cut ---- */

#define BOTH_CLIENTS 3 /* of each protocol */
#define BOTH_OPS 150
#define BOTH_KEYS 3 /* two of words, one counter */
#define BOTH_COUNTER 2

struct both_client {
    pthread_t thread;
    uint64_t state;
    bool native;
    struct rpc_client *rpc;
    struct tcpclient tcp;
    struct linear_op ops[BOTH_KEYS][BOTH_OPS];
    size_t n[BOTH_KEYS];
    uint32_t seen[BOTH_KEYS];
};

static uint32_t words_of(const void *data, size_t len)
{
    uint32_t value = LINEAR_MISSING, word;
    for (size_t i = 0; i + 4 <= len; i += 4) {
        memcpy(&word, (const char *)data + i, 4);
        value = linear_append(value, word);
    }
    return value;
}

/* Sends the command of `op`, which may never be answered. */
static void both_send(struct both_client *b, const char *key, const struct linear_op *op)
{
    static const uint8_t queries[] = {[LINEAR_SET] = TCPSTORE_SET, [LINEAR_GET] = TCPSTORE_GET,
                                      [LINEAR_CAS] = TCPSTORE_COMPARE_SET, [LINEAR_DELETE] = TCPSTORE_DELETE_KEY,
                                      [LINEAR_APPEND] = TCPSTORE_APPEND, [LINEAR_ADD] = TCPSTORE_ADD};
    tcpclient_begin(&b->tcp, queries[op->kind]);
    tcpclient_text(&b->tcp, key);
    if (op->kind == LINEAR_CAS)
        tcpclient_bytes(&b->tcp, &op->expected, op->expected == LINEAR_MISSING ? 0 : 4);
    if (op->kind == LINEAR_SET || op->kind == LINEAR_APPEND || op->kind == LINEAR_CAS)
        tcpclient_bytes(&b->tcp, &op->value, 4);
    if (op->kind == LINEAR_ADD)
        tcpclient_u64(&b->tcp, op->amount);
    tcpclient_flush(&b->tcp);
}

static void both_answer(struct both_client *b, const char *key, struct linear_op *op)
{
    size_t len = 0;
    if (op->kind == LINEAR_GET || op->kind == LINEAR_CAS) {
        char *data = tcpclient_value(&b->tcp, &len);
        uint32_t got = data ? words_of(data, len) : LINEAR_MISSING;
        free(data);
        if (op->kind == LINEAR_GET)
            op->value = got;
        op->swapped = op->kind == LINEAR_CAS && got == op->value;
        op->seen = got;
        if (op->kind == LINEAR_CAS && got == op->expected && got != op->value)
            op->seen = LINEAR_MISSING; /* of a missing key the expectation comes back: it was not there */
    } else if (op->kind == LINEAR_ADD) {
        op->value = (uint32_t)tcpclient_i64(&b->tcp);
    } else if (op->kind == LINEAR_DELETE) {
        if (tcpclient_i64(&b->tcp) == 0) {
            op->kind = LINEAR_GET;
            op->value = LINEAR_MISSING;
        }
    } else {
        (void)tcpclient_check(&b->tcp, key); /* SET and APPEND have no answer: that of the next command says that they are done */
    }
    op->known = !b->tcp.broken;
}

static void both_tcp(struct both_client *b, const char *key, struct linear_op *op)
{
    both_send(b, key, op);
    if (mix(&b->state) % 50 == 0)
        b->tcp.broken = true; /* cut, with a command under way */
    else
        both_answer(b, key, op);
}

static void both_native(struct both_client *b, const char *key, struct linear_op *op)
{
    char full[64];
    ProtobufCMessage *reply = NULL;
    int rc;
    snprintf(full, sizeof full, "tcpstore/both/%s", key);
    if (op->kind == LINEAR_GET) {
        Pb__KvGetRequest request = PB__KV_GET_REQUEST__INIT;
        request.key = full;
        rc = rpc_client_call(b->rpc, CONTROL_KV_GET, &request.base, 10000, &reply, NULL);
        const Pb__KvValue *value = rc == 0 ? (const Pb__KvValue *)reply : NULL;
        op->value = value ? words_of(value->value.data, value->value.len) : LINEAR_MISSING;
        rc = rc == ERR_NOTFOUND ? 0 : rc;
    } else if (op->kind == LINEAR_ADD) {
        Pb__KvAddRequest request = PB__KV_ADD_REQUEST__INIT;
        request.key = full;
        request.amount = op->amount;
        request.has_ephemeral = request.ephemeral = true;
        rc = rpc_client_call(b->rpc, CONTROL_KV_ADD, &request.base, 10000, &reply, NULL);
        op->value = rc == 0 ? (uint32_t)((const Pb__KvAddReply *)reply)->value : 0;
    } else {
        Pb__KvSetRequest request = PB__KV_SET_REQUEST__INIT;
        op->kind = LINEAR_SET;
        request.key = full;
        request.value.data = (uint8_t *)&op->value;
        request.value.len = 4;
        request.has_ephemeral = request.ephemeral = true;
        rc = rpc_client_call(b->rpc, CONTROL_KV_SET, &request.base, 10000, &reply, NULL);
    }
    rpc_unpack_free(reply);
    ck_assert_msg(rc == 0, "%s: native call %d: %d", key, op->kind, rc);
    op->known = true;
}

static void both_step(struct both_client *b, unsigned k)
{
    static const enum linear_kind kinds[] = {LINEAR_SET, LINEAR_GET, LINEAR_GET,    LINEAR_GET,    LINEAR_CAS,
                                             LINEAR_CAS, LINEAR_APPEND, LINEAR_APPEND, LINEAR_DELETE};
    struct linear_op op = {.kind = kinds[mix(&b->state) % (sizeof kinds / sizeof *kinds)], .value = ++next_value,
                           .expected = b->seen[k], .amount = 1 + mix(&b->state) % 9, .end_ns = UINT64_MAX};
    char key[8];
    snprintf(key, sizeof key, "k%u", k);
    if (k == BOTH_COUNTER)
        op.kind = LINEAR_ADD;
    /* a client can only expect words that it can send: those of one word */
    if (op.kind == LINEAR_CAS && op.expected & 0x80000000u)
        op.kind = LINEAR_SET;
    op.begin_ns = clock_now_ns();
    if (b->native)
        both_native(b, key, &op);
    else
        both_tcp(b, key, &op);
    if (op.known) {
        op.end_ns = clock_now_ns();
        b->seen[k] = op.kind == LINEAR_CAS && !op.swapped ? op.seen : op.kind == LINEAR_GET ? op.value : b->seen[k];
    }
    b->ops[k][b->n[k]++] = op;
}

static void *both_main(void *arg)
{
    struct both_client *b = arg;
    b->tcp.fd = -1;
    for (int i = 0; i < BOTH_OPS; i++) {
        if (b->native && !b->rpc)
            ck_assert_ptr_nonnull(b->rpc = client_open(5000));
        if (!b->native && (b->tcp.fd < 0 || b->tcp.broken)) {
            tcpclient_close(&b->tcp);
            ck_assert(tcpclient_open(&b->tcp, d.tcpstore));
        }
        both_step(b, mix(&b->state) % BOTH_KEYS);
    }
    rpc_client_free(b->rpc);
    tcpclient_close(&b->tcp);
    return NULL;
}

START_TEST(histories_of_both_protocols_are_linearizable)
{
    static struct both_client clients[2 * BOTH_CLIENTS];
    static struct linear_op all[2 * BOTH_CLIENTS * BOTH_OPS];
    struct tcpclient keeper; /* while it is connected the namespace stays */
    size_t unanswered = 0;
    memset(clients, 0, sizeof clients);
    const char *extra[] = {"--tcpstore-listen", "127.0.0.1:0/both"};
    memcpy(d.extra, extra, sizeof extra);
    start();
    strcpy(socket_address, d.address);
    ck_assert(tcpclient_open(&keeper, d.tcpstore));
    for (unsigned i = 0; i < 2 * BOTH_CLIENTS; i++) {
        clients[i].native = i % 2;
        clients[i].state = 7 + i + 100 * (unsigned)_i;
        pthread_create(&clients[i].thread, NULL, both_main, &clients[i]);
    }
    for (unsigned i = 0; i < 2 * BOTH_CLIENTS; i++)
        pthread_join(clients[i].thread, NULL);
    for (unsigned k = 0; k < BOTH_KEYS; k++) {
        size_t n = 0;
        for (unsigned i = 0; i < 2 * BOTH_CLIENTS; i++)
            for (size_t o = 0; o < clients[i].n[k]; o++) {
                unanswered += !clients[i].ops[k][o].known;
                all[n++] = clients[i].ops[k][o];
            }
        int rc = linear_check(all, n);
        ck_assert_msg(rc == 1, "the history of key k%u, %zu operations: %s", k, n, rc ? "given up" : "not linearizable");
    }
    ck_assert_uint_gt(unanswered, 0);
    tcpclient_close(&keeper);
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
}
END_TEST

/* ---- additions that are retried until they are answered count once ---- */

#define ADDS_EACH 60

static _Atomic uint32_t add_results[CLIENTS * ADDS_EACH + 1];

static void *adder_main(void *arg)
{
    unsigned number = *(unsigned *)arg;
    struct rpc_client *c = NULL;
    for (unsigned i = 0; i < ADDS_EACH;) {
        char id[32];
        Pb__KvAddRequest request = PB__KV_ADD_REQUEST__INIT;
        ProtobufCMessage *reply = NULL;
        if (!c && !(c = client_open(200))) {
            usleep(2000);
            continue;
        }
        snprintf(id, sizeof id, "add-%u-%u", number, i);
        request.key = (char *)"sum";
        request.amount = 1;
        request.request = id;
        if (rpc_client_call(c, CONTROL_KV_ADD, &request.base, 10000, &reply, NULL) < 0) {
            rpc_client_free(c);
            c = NULL;
            continue; /* the same id again */
        }
        int64_t value = ((Pb__KvAddReply *)reply)->value;
        rpc_unpack_free(reply);
        if (value >= 1 && value <= CLIENTS * ADDS_EACH)
            add_results[value]++;
        usleep(4000);
        i++;
    }
    rpc_client_free(c);
    return NULL;
}

START_TEST(retried_additions_count_once)
{
    pthread_t threads[CLIENTS];
    unsigned numbers[CLIENTS];
    memset(add_results, 0, sizeof add_results);
    start();
    for (unsigned i = 0; i < CLIENTS; i++) {
        numbers[i] = i;
        pthread_create(&threads[i], NULL, adder_main, &numbers[i]);
    }
    for (int i = 0; i < 4; i++) {
        usleep(90000 + (useconds_t)i * 11003);
        daemon_process_stop(&d, SIGKILL);
        start();
    }
    for (unsigned i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    for (unsigned v = 1; v <= CLIENTS * ADDS_EACH; v++)
        ck_assert_msg(add_results[v] == 1, "the sum %u was answered %u times", v, add_results[v]);
}
END_TEST

/* ---- an ugly network ---- */

static int raw_connect(void)
{
    int fd = -1;
    ck_assert_int_eq(address_connect(d.address, 5000, &fd, NULL), 0);
    return fd;
}

static bool serves(void)
{
    struct rpc_client *c = client_open(5000);
    uint32_t one = 1;
    bool ok = c && kv_set(c, "probe", &one, 4) == 0;
    rpc_client_free(c);
    return ok;
}

START_TEST(ugly_network)
{
    start();
    /* byte by byte, header split everywhere */
    size_t hello_len, set_len;
    uint8_t *hello = caller_hello(&hello_len);
    Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
    set.key = (char *)"slow";
    set.value.data = (uint8_t *)"\1\0\0\0";
    set.value.len = 4;
    uint8_t *frame = caller_frame(FRAME_CALL, CONTROL_KV_SET, 1, &set.base, &set_len);
    int fd = raw_connect();
    for (size_t i = 0; i < hello_len; i++, usleep(200))
        ck_assert_int_eq(send(fd, hello + i, 1, MSG_NOSIGNAL), 1);
    for (size_t i = 0; i < set_len; i++, usleep(200))
        ck_assert_int_eq(send(fd, frame + i, 1, MSG_NOSIGNAL), 1);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    ck_assert_int_eq(poll(&p, 1, 5000), 1);
    close(fd);
    /* half-open: connected, and silent; half a frame, and gone */
    int silent[50];
    for (int i = 0; i < 50; i++)
        silent[i] = raw_connect();
    for (size_t cut = 1; cut < set_len; cut += 5) {
        fd = caller_connect(d.address);
        ck_assert_int_ge(fd, 0);
        ck_assert_int_eq(send(fd, frame, cut, MSG_NOSIGNAL), (ssize_t)cut);
        close(fd);
    }
    ck_assert(serves());
    /* reset after the request, before the acknowledgement: it happened or it did not, and nobody else minds */
    for (int i = 0; i < 50; i++) {
        struct linger now = {.l_onoff = 1, .l_linger = 0};
        fd = caller_connect(d.address);
        ck_assert_int_eq(send(fd, frame, set_len, MSG_NOSIGNAL), (ssize_t)set_len);
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        close(fd);
    }
    ck_assert(serves());
    /* mass disconnect */
    static int many[500];
    for (int i = 0; i < 500; i++)
        ck_assert_int_ge(many[i] = caller_connect(d.address), 0);
    for (int i = 0; i < 500; i++)
        close(many[i]);
    ck_assert(serves());
    for (int i = 0; i < 50; i++)
        close(silent[i]);
    free(hello);
    free(frame);
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
}
END_TEST

/* The connection is reset after the commit and before the acknowledgement, again and again: the addition, retried under its
 * id until it is answered, counts once. */
START_TEST(reset_before_the_acknowledgement)
{
    start();
    struct rpc_client *c = client_open(5000);
    ck_assert_ptr_nonnull(c);
    for (int round = 1; round <= 20; round++) {
        char id[16];
        Pb__KvAddRequest add = PB__KV_ADD_REQUEST__INIT;
        snprintf(id, sizeof id, "id-%d", round);
        add.key = (char *)"reset-sum";
        add.amount = 1;
        add.request = id;
        size_t len;
        uint8_t *frame = caller_frame(FRAME_CALL, CONTROL_KV_ADD, 1, &add.base, &len);
        for (int try = 0; try < 3; try++) {
            struct linger now = {.l_onoff = 1, .l_linger = 0};
            int fd = caller_connect(d.address);
            ck_assert_int_ge(fd, 0);
            ck_assert_int_eq(send(fd, frame, len, MSG_NOSIGNAL), (ssize_t)len);
            uint32_t value; /* an answer to another is behind the addition's in the disk's queue: it was committed */
            ck_assert_int_ge(kv_get(c, "reset-sum", &value), 0);
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
            close(fd);
        }
        free(frame);
        ProtobufCMessage *reply = NULL;
        ck_assert_int_eq(rpc_client_call(c, CONTROL_KV_ADD, &add.base, 10000, &reply, NULL), 0);
        ck_assert_int_eq(((Pb__KvAddReply *)reply)->value, round);
        rpc_unpack_free(reply);
    }
    rpc_client_free(c);
}
END_TEST

static size_t resident_bytes(pid_t pid)
{
    char path[64];
    size_t pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
    FILE *f = fopen(path, "r");
    ck_assert(f && fscanf(f, "%*u %zu", &pages) == 1);
    fclose(f);
    return pages * (size_t)sysconf(_SC_PAGESIZE);
}

/* It asks and asks and reads nothing: it is read from no more, little is buffered for it, and others are served.  When it
 * reads at last, every answer is there. */
START_TEST(slow_reader)
{
    enum { CALLS = 3000, VALUE = 100000 };
    start();
    struct rpc_client *c = client_open(5000);
    uint8_t *value = calloc(1, VALUE);
    ck_assert_int_eq(kv_set(c, "big", value, VALUE), 0);
    size_t before = resident_bytes(d.pid), len, sent = 0;
    Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
    get.key = (char *)"big";
    uint8_t *frame = caller_frame(FRAME_CALL, CONTROL_KV_GET, 1, &get.base, &len);
    uint8_t *many = malloc(len * CALLS), *in = malloc(1 << 20);
    for (size_t i = 0; i < CALLS; i++)
        memcpy(many + i * len, frame, len);
    int fd = caller_connect(d.address);
    ck_assert_int_ge(fd, 0);
    for (int idle = 0; sent < len * CALLS && idle < 50;) { /* as much as it and the kernel take */
        ssize_t n = send(fd, many + sent, len * CALLS - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        sent += n > 0 ? (size_t)n : 0;
        idle = n > 0 ? 0 : idle + 1;
        usleep(n > 0 ? 0 : 2000);
    }
    ck_assert(serves());
    usleep(200000);
    ck_assert_uint_lt(resident_bytes(d.pid), before + ((size_t)16 << 20)); /* of 300 MB of answers */
    size_t want = sent / len * (size_t)VALUE, have = 0;
    while (have < want) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        ck_assert_int_eq(poll(&p, 1, 10000), 1);
        ssize_t n = recv(fd, in, 1 << 20, 0);
        ck_assert_int_gt(n, 0);
        have += (size_t)n;
    }
    close(fd);
    rpc_client_free(c);
    free(value);
    free(frame);
    free(many);
    free(in);
}
END_TEST

/* Many that read nothing, over either protocol, and many that send half a command, each within its own limits: together
 * they are kept within the budget, those with the most are cut off, and others are served. */
START_TEST(many_slow_readers)
{
    enum { READERS = 60, GETS = 20, VALUE = 1000000 };
    const size_t budget = (size_t)16 << 20;
    int fds[3 * READERS], n = 0;
    const char *extra[] = {"--connections-mib", "16", "--tcpstore-listen", "127.0.0.1:0"};
    memcpy(d.extra, extra, sizeof extra);
    start();
    strcpy(socket_address, d.address);
    struct rpc_client *c = client_open(5000);
    uint8_t *value = calloc(1, VALUE);
    ck_assert_int_eq(kv_set(c, "big", value, VALUE), 0);
    struct tcpclient tcp;
    ck_assert(tcpclient_open(&tcp, d.tcpstore));
    tcpclient_begin(&tcp, TCPSTORE_SET);
    tcpclient_text(&tcp, "x");
    tcpclient_bytes(&tcp, value, VALUE);
    tcpclient_flush(&tcp);
    size_t before = resident_bytes(d.pid), most = 0, len, half_len;
    Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
    get.key = (char *)"big";
    uint8_t *frame = caller_frame(FRAME_CALL, CONTROL_KV_GET, 1, &get.base, &len);
    Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
    set.key = (char *)"half";
    set.value.data = value;
    set.value.len = VALUE;
    uint8_t *half = caller_frame(FRAME_CALL, CONTROL_KV_SET, 1, &set.base, &half_len);
    for (int i = 0; i < READERS; i++) {
        fds[n] = caller_connect(d.address);
        ck_assert_int_ge(fds[n], 0);
        for (int k = 0; k < GETS; k++)
            (void)!send(fds[n], frame, len, MSG_NOSIGNAL);
        n++;
        fds[n] = caller_connect(d.address);
        ck_assert_int_ge(fds[n], 0);
        size_t at = 0;
        for (int idle = 0; at < half_len - 1 && idle < 200;) {
            ssize_t got = send(fds[n], half + at, half_len - 1 - at, MSG_NOSIGNAL | MSG_DONTWAIT);
            at += got > 0 ? (size_t)got : 0;
            idle = got > 0 ? 0 : idle + 1;
            usleep(got > 0 ? 0 : 1000);
        }
        n++;
        size_t now = resident_bytes(d.pid);
        most = now > most ? now : most;
        if (i % 10 == 0)
            ck_assert(serves());
    }
    for (int i = 0; i < READERS; i++) {
        struct tcpclient deaf;
        ck_assert(tcpclient_open(&deaf, d.tcpstore));
        for (int k = 0; k < GETS; k++) {
            tcpclient_begin(&deaf, TCPSTORE_GET);
            tcpclient_text(&deaf, "x");
            tcpclient_flush(&deaf);
        }
        fds[n++] = deaf.fd;
        free(deaf.out);
        size_t now = resident_bytes(d.pid);
        most = now > most ? now : most;
    }
    usleep(200000);
    ck_assert(serves());
    size_t now = resident_bytes(d.pid);
    most = now > most ? now : most;
    /* without the budget: 60 times 1 MB of halves, and 60 times 2 MB of answers */
    ck_assert_msg(getenv("ASAN_OPTIONS") || most < before + 2 * budget, "%zu bytes before, %zu at most", before, most);
    ck_assert_msg(strstr(log_text(), "event=cut-off") && strstr(log_text(), "the most of all connections"), "%s",
                  log_text());
    ck_assert_msg(strstr(log_text(), "event=tcpstore-cut-off") != NULL, "%s", log_text());
    for (int i = 0; i < n; i++)
        close(fds[i]);
    tcpclient_close(&tcp);
    rpc_client_free(c);
    free(value);
    free(frame);
    free(half);
}
END_TEST

/* ---- a network that swallows everything ---- */

static bool loopback(bool up)
{
    struct ifreq lo = {.ifr_name = "lo", .ifr_flags = (short)(up ? IFF_UP | IFF_RUNNING : 0)};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool ok = fd >= 0 && ioctl(fd, SIOCSIFFLAGS, &lo) == 0;
    if (fd >= 0)
        close(fd);
    return ok;
}

/* A port that everyone may reach, taken with the option that says so, and served. */
START_TEST(tcpstore_beyond_the_loopback)
{
    if (unshare(CLONE_NEWNET) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0) {
        printf("tcpstore_beyond_the_loopback: not tested: no network namespaces here (%s)\n", strerror(errno));
        return;
    }
    ck_assert(loopback(true));
    const char *extra[] = {"--tcpstore-listen", "0.0.0.0:0/job"};
    memcpy(d.extra, extra, sizeof extra);
    ck_assert(!daemon_process_start(&d));
    ck_assert_msg(strstr(log_text(), "will not listen for TCPStore on 0.0.0.0:0: its protocol has no authentication") != NULL,
                  "%s", log_text());
    d.extra[2] = "--tcpstore-insecure";
    start();
    ck_assert_msg(strncmp(d.tcpstore, "0.0.0.0:", 8) == 0, "%s", d.tcpstore);
    struct tcpclient c;
    char address[160];
    snprintf(address, sizeof address, "127.0.0.1:%s", d.tcpstore + 8);
    ck_assert(tcpclient_open(&c, address));
    ck_assert_int_eq(tcpclient_add(&c, "n", 2), 2);
    tcpclient_close(&c);
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
}
END_TEST

static size_t arrived(struct rpc_client *c, const char *barrier)
{
    Pb__BarrierShowRequest request = PB__BARRIER_SHOW_REQUEST__INIT;
    ProtobufCMessage *reply = NULL;
    request.name = (char *)barrier;
    if (rpc_client_call(c, CONTROL_BARRIER_SHOW, &request.base, 5000, &reply, NULL) < 0)
        return 0; /* nobody waits at it */
    size_t n = ((Pb__BarrierInfo *)reply)->arrived;
    rpc_unpack_free(reply);
    return n;
}

/* The network of one that waits at a barrier swallows everything, also the end of its connection.  Others are served, and it
 * does not count as arrived for long. */
START_TEST(blackhole)
{
    if (unshare(CLONE_NEWNET) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0) {
        printf("blackhole: not tested: no network namespaces here (%s)\n", strerror(errno));
        return;
    }
    ck_assert(loopback(true));
    start();
    struct rpc_client *c = client_open(5000); /* by the unix socket */
    Pb__BarrierRequest arrival = PB__BARRIER_REQUEST__INIT;
    arrival.name = (char *)"hole";
    arrival.size = 2;
    arrival.member = (char *)"0";
    arrival.deadline_ms = 600000;
    size_t len;
    uint8_t *frame = caller_frame(FRAME_CALL, CONTROL_BARRIER_ARRIVE, 1, &arrival.base, &len);
    int fd = caller_connect(d.address);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(send(fd, frame, len, MSG_NOSIGNAL), (ssize_t)len);
    for (int i = 0; i < 500 && arrived(c, "hole") == 0; i++)
        usleep(10000);
    ck_assert_uint_eq(arrived(c, "hole"), 1);
    ck_assert(loopback(false));
    close(fd);
    ck_assert(serves());
    int ms = 0;
    for (; ms < 4000 * ADDRESS_PROBE_S && arrived(c, "hole"); ms += 100)
        usleep(100000);
    ck_assert_msg(arrived(c, "hole") == 0, "after %d ms it still counts as arrived", ms);
    ck_assert(serves());
    rpc_client_free(c);
    free(frame);
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
}
END_TEST

/* Out of descriptors: who is connected is served, the others wait until there are some again. */
START_TEST(out_of_descriptors)
{
    struct rlimit limit = {.rlim_cur = 64, .rlim_max = 64}, before;
    getrlimit(RLIMIT_NOFILE, &before);
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){.rlim_cur = 64, .rlim_max = before.rlim_max});
    (void)limit;
    start();
    setrlimit(RLIMIT_NOFILE, &before);
    prlimit(d.pid, RLIMIT_NOFILE, &limit, NULL);
    struct rpc_client *c = client_open(5000);
    ck_assert_ptr_nonnull(c);
    int fds[120];
    for (int i = 0; i < 120; i++)
        fds[i] = raw_connect(); /* the kernel takes them, the coordinator cannot */
    uint32_t one = 1;
    ck_assert_int_eq(kv_set(c, "served", &one, 4), 0);
    for (int i = 0; i < 120; i++)
        close(fds[i]);
    ck_assert(serves());
    rpc_client_free(c);
    ck_assert_int_eq(daemon_process_stop(&d, SIGTERM), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("store");
    TCase *tc = tcase_create("faults");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 180);
    tcase_add_loop_test(tc, every_edge_of_the_file, 0, 9);
    tcase_add_test(tc, acknowledged_after_the_flush);
    tcase_add_test(tc, damaged_files_are_refused);
    tcase_add_test(tc, damaged_log);
    tcase_add_loop_test(tc, histories_are_linearizable, 0, 3);
    tcase_add_test(tc, retried_additions_count_once);
    tcase_add_test(tc, ugly_network);
    tcase_add_test(tc, reset_before_the_acknowledgement);
    tcase_add_test(tc, slow_reader);
    tcase_add_test(tc, many_slow_readers);
    tcase_add_test(tc, blackhole);
    tcase_add_test(tc, out_of_descriptors);
    suite_add_tcase(suite, tc);
    tc = tcase_create("tcpstore");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 180);
    tcase_add_test(tc, checker_finds_mistakes);
    tcase_add_loop_test(tc, histories_of_both_protocols_are_linearizable, 0, 3);
    tcase_add_test(tc, tcpstore_beyond_the_loopback);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
