/* The store of the real coordinator on an ugly network: bytes one by one, resets, slow readers, a network that swallows
 * everything, and no descriptors left. */
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/resource.h>

#include "common/clock.h"
#include "tests/harness/caller.h"
#include "tests/harness/tcpclient.h"
#include "tests/integration/itest_store.h"

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

static void add(TCase *tc)
{
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, ugly_network);
    tcase_add_test(tc, reset_before_the_acknowledgement);
    tcase_add_test(tc, slow_reader);
    tcase_add_test(tc, many_slow_readers);
    tcase_add_test(tc, blackhole);
    tcase_add_test(tc, tcpstore_beyond_the_loopback);
    tcase_add_test(tc, out_of_descriptors);
}

int main(void)
{
    return suite_main("store_network", add, 180);
}
