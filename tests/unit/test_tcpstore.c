/* TCPStore's protocol: the parser over every cut of every command, and the served port with a client that speaks the same
 * bytes as PyTorch's. */
#include <check.h>
#include <errno.h>
#include <event2/thread.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>

#include "common/loop.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "coordinator/server.h"
#include "coordinator/tcpstore.h"
#include "tests/harness/suite.h"
#include "tests/harness/tcpclient.h"

/* ---- the parser ---- */

static void build(struct tcpclient *c, unsigned query)
{
    static const char *const fields[] = {"4", "kv", "kvv", "k", "k8", "*k", "*k", "", "k", "kv", "*k", "*kv", "", "4",
                                         "kv", "k", "k", "", "k8"};
    tcpclient_begin(c, (uint8_t)query);
    const char *f = fields[query];
    int repeat = 1;
    if (*f == '*') {
        tcpclient_u64(c, 3);
        repeat = 3;
        f++;
    }
    for (int i = 0; i < repeat; i++)
        for (const char *g = f; *g; g++) {
            if (*g == '4')
                tcpclient_put(c, "\xce\xf7\x85\x3c", 4);
            else if (*g == '8')
                tcpclient_u64(c, 7);
            else
                tcpclient_text(c, *g == 'k' ? "key" : "the value");
        }
}

START_TEST(every_cut)
{
    for (unsigned query = 0; query < TCPSTORE_QUERIES; query++) {
        struct tcpclient c = {0};
        build(&c, query);
        struct tcpstore_scan pieces = {0};
        size_t need = 0;
        for (size_t len = 0; len <= c.len; len++) {
            uint8_t *exact = malloc(len ? len : 1); /* so that a sanitizer sees a read beyond it */
            memcpy(exact, c.out, len);
            struct tcpstore_scan whole = {0};
            int rc = tcpstore_scan(&whole, exact, len, &need, NULL);
            ck_assert_int_eq(rc, len == c.len);
            ck_assert(rc == 1 || (need > len && need <= c.len));
            ck_assert_int_eq(tcpstore_scan(&pieces, exact, len, &need, NULL), rc); /* resumed at every byte */
            free(exact);
        }
        ck_assert_uint_eq(pieces.at, c.len);
        free(c.out);
    }
}
END_TEST

START_TEST(nonsense_is_refused)
{
    struct tcpstore_scan scan = {0};
    struct err err = {0};
    size_t need;
    uint8_t bytes[64] = {TCPSTORE_QUERIES};
    ck_assert_int_eq(tcpstore_scan(&scan, bytes, 1, &need, &err), ERR_PROTOCOL);
    struct {
        uint8_t query;
        uint64_t number;
    } over[] = {{TCPSTORE_GET, TCPSTORE_KEY_MAX + 1}, {TCPSTORE_WAIT, TCPSTORE_KEYS_MAX + 1}, {TCPSTORE_SET, UINT64_MAX}};
    for (size_t i = 0; i < 3; i++) {
        bytes[0] = over[i].query;
        memcpy(bytes + 1, &over[i].number, 8);
        scan = (struct tcpstore_scan){0};
        ck_assert_int_eq(tcpstore_scan(&scan, bytes, 9, &need, &err), ERR_LIMIT); /* before anything is allocated */
    }
}
END_TEST

START_TEST(listen_addresses)
{
    char address[64], name[64];
    struct err err;
    ck_assert_int_eq(tcpstore_listen_parse("127.0.0.1:29500/job.1", address, 64, name, 64, &err), 0);
    ck_assert_str_eq(address, "127.0.0.1:29500");
    ck_assert_str_eq(name, "job.1");
    ck_assert_int_eq(tcpstore_listen_parse("[::1]:1", address, 64, name, 64, &err), 0);
    ck_assert_str_eq(name, "");
    static const char *const bad[] = {"unix:/tmp/x", "127.0.0.1:1/", "127.0.0.1:1/a b", "nonsense", ""};
    for (size_t i = 0; i < 5; i++)
        ck_assert_msg(tcpstore_listen_parse(bad[i], address, 64, name, 64, &err) == ERR_INVALID, "%s", bad[i]);
}
END_TEST

/* ---- the port ---- */

static char dir[64], port[128], other_port[128];
static struct event_base *base;
static struct server *server;
static struct event *stop;
static pthread_t thread;

static void on_fatal(void *user, const struct err *err)
{
    (void)user;
    fprintf(stderr, "fatal: %s\n", err->text);
    _exit(1);
}
static void on_stop(evutil_socket_t fd, short what, void *user)
{
    (void)fd, (void)what, (void)user;
    event_base_loopbreak(base);
}
static void *serve(void *arg)
{
    (void)arg;
    event_base_loop(base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

static void setup(void)
{
    struct err err;
    char state[80], address[96];
    signal(SIGPIPE, SIG_IGN);
    snprintf(dir, sizeof dir, "/tmp/eep-tcpstore-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(address, sizeof address, "unix:%s/c.sock", dir);
    snprintf(state, sizeof state, "%s/state", dir);
    evthread_use_pthreads();
    base = event_base_new();
    const char *listen[] = {address}, *tcp[] = {"127.0.0.1:0/job", "127.0.0.1:0/other"};
    struct server_config config = {.base = base, .cluster = "c1", .state = state, .listen = listen, .n_listen = 1,
                                   .on_fatal = on_fatal, .tcpstore = tcp, .n_tcpstore = 2, .tcpstore_grace_ms = 100,
                                   .store_bytes = 4 << 20};
    coordinator_config_default(&config.core);
    ck_assert_msg(server_open(&config, &server, &err) == 0, "%s", err.text);
    snprintf(port, sizeof port, "%s", server_tcpstore_address(server, 0));
    snprintf(other_port, sizeof other_port, "%s", server_tcpstore_address(server, 1));
    stop = event_new(base, -1, 0, on_stop, NULL);
    pthread_create(&thread, NULL, serve, NULL);
}

static void teardown(void)
{
    char command[160];
    event_active(stop, EV_TIMEOUT, 0);
    pthread_join(thread, NULL);
    server_close(server);
    event_free(stop);
    loop_free(base);
    libevent_global_shutdown();
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    ck_assert_int_eq(system(command), 0);
}

static void expect_text(char *got, const char *want)
{
    ck_assert_ptr_nonnull(got);
    ck_assert_str_eq(got, want);
    free(got);
}

START_TEST(every_command)
{
    struct tcpclient c, d, e;
    ck_assert(tcpclient_open(&c, port));
    ck_assert(tcpclient_open(&d, port));
    ck_assert(tcpclient_open(&e, other_port));
    tcpclient_set(&c, "k", "v");
    expect_text(tcpclient_get(&d, "k"), "v");
    ck_assert(tcpclient_check(&d, "k"));
    ck_assert(!tcpclient_check(&e, "k")); /* another namespace */
    ck_assert_int_eq(tcpclient_add(&c, "n", 40), 40);
    ck_assert_int_eq(tcpclient_add(&d, "n", 2), 42);
    expect_text(tcpclient_get(&c, "n"), "42");
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_GETNUMKEYS, NULL), 2);
    expect_text(tcpclient_compare_set(&c, "k", "wrong", "x"), "v");
    expect_text(tcpclient_compare_set(&c, "k", "v", "w"), "w");
    expect_text(tcpclient_compare_set(&c, "new", "", "made"), "made"); /* empty is met by missing */
    expect_text(tcpclient_compare_set(&c, "none", "what", "x"), "what"); /* and this is what comes back */
    ck_assert(!tcpclient_check(&c, "none"));
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_DELETE_KEY, "new"), 1);
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_DELETE_KEY, "new"), 0);
    for (int i = 0; i < 2; i++) {
        tcpclient_begin(&c, TCPSTORE_APPEND);
        tcpclient_text(&c, "app");
        tcpclient_text(&c, "ab");
        tcpclient_flush(&c);
    }
    expect_text(tcpclient_get(&c, "app"), "abab");
    tcpclient_begin(&c, TCPSTORE_MULTI_SET);
    tcpclient_u64(&c, 2);
    tcpclient_text(&c, "m1");
    tcpclient_text(&c, "one");
    tcpclient_text(&c, "m2");
    tcpclient_text(&c, "");
    tcpclient_flush(&c);
    tcpclient_begin(&c, TCPSTORE_MULTI_GET);
    tcpclient_u64(&c, 3);
    tcpclient_text(&c, "m1");
    tcpclient_text(&c, "missing");
    tcpclient_text(&c, "m2");
    tcpclient_flush(&c);
    expect_text(tcpclient_value(&c, NULL), "one");
    expect_text(tcpclient_value(&c, NULL), "");
    expect_text(tcpclient_value(&c, NULL), "");
    tcpclient_begin(&c, TCPSTORE_LIST_KEYS);
    tcpclient_flush(&c);
    static const char *const keys[] = {"app", "k", "m1", "m2", "n"};
    ck_assert_int_eq(tcpclient_i64(&c), 5);
    for (int i = 0; i < 5; i++)
        expect_text(tcpclient_value(&c, NULL), keys[i]);
    tcpclient_close(&c);
    tcpclient_close(&d);
    tcpclient_close(&e);
}
END_TEST

START_TEST(waits_and_cancels)
{
    struct tcpclient c, d;
    ck_assert(tcpclient_open(&c, port));
    ck_assert(tcpclient_open(&d, port));
    tcpclient_wait_start(&c, "late");
    ck_assert(!tcpclient_readable(&c, 50));
    tcpclient_set(&d, "late", "1");
    ck_assert_uint_eq(tcpclient_u8(&c), 0); /* STOP_WAITING */
    tcpclient_wait_start(&c, "never");
    tcpclient_begin(&c, TCPSTORE_CANCEL_WAIT);
    tcpclient_flush(&c);
    ck_assert_uint_eq(tcpclient_u8(&c), 1); /* WAIT_CANCELED */
    tcpclient_set(&d, "never", "1");
    ck_assert(!tcpclient_readable(&c, 50)); /* nobody waits for it any more */
    ck_assert(tcpclient_check(&c, "never"));
    /* A wait for none is over at once. */
    tcpclient_begin(&c, TCPSTORE_WAIT);
    tcpclient_u64(&c, 0);
    tcpclient_flush(&c);
    ck_assert_uint_eq(tcpclient_u8(&c), 0);
    /* Who dies while it waits hurts nobody. */
    tcpclient_wait_start(&c, "x");
    tcpclient_close(&c);
    tcpclient_set(&d, "x", "1");
    expect_text(tcpclient_get(&d, "x"), "1");
    tcpclient_close(&d);
}
END_TEST

START_TEST(queues_and_barriers)
{
    struct tcpclient c, d;
    ck_assert(tcpclient_open(&c, port));
    ck_assert(tcpclient_open(&d, port));
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_QUEUE_POP, "q"), 0);
    tcpclient_wait_start(&c, "q");
    tcpclient_begin(&d, TCPSTORE_QUEUE_PUSH);
    tcpclient_text(&d, "q");
    tcpclient_text(&d, "item");
    tcpclient_flush(&d);
    ck_assert_uint_eq(tcpclient_u8(&c), 0);
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_QUEUE_LEN, "q"), 1);
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_QUEUE_POP, "q"), 1);
    expect_text(tcpclient_value(&c, NULL), "item");
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_QUEUE_LEN, "q"), 0);
    struct tcpclient *both[] = {&c, &d};
    for (int i = 0; i < 2; i++) {
        tcpclient_begin(both[i], TCPSTORE_BARRIER);
        tcpclient_text(both[i], "b");
        tcpclient_u64(both[i], 2);
        if (i == 1)
            ck_assert(!tcpclient_readable(&c, 50));
        tcpclient_flush(both[i]);
    }
    ck_assert_uint_eq(tcpclient_u8(&c), 0);
    ck_assert_uint_eq(tcpclient_u8(&d), 0);
    tcpclient_close(&c);
    tcpclient_close(&d);
}
END_TEST

static void send_keys(struct tcpclient *c, uint8_t query, const char *first, const char *second)
{
    tcpclient_begin(c, query);
    tcpclient_u64(c, 2);
    tcpclient_text(c, first);
    tcpclient_text(c, second);
    tcpclient_flush(c);
}

static void send_barrier(struct tcpclient *c, const char *key)
{
    tcpclient_begin(c, TCPSTORE_BARRIER);
    tcpclient_text(c, key);
    tcpclient_u64(c, 2);
    tcpclient_flush(c);
}

/* All of the keys, that barrier only, and how many items there were. */
START_TEST(several_at_once)
{
    struct tcpclient c, d;
    ck_assert(tcpclient_open(&c, port));
    ck_assert(tcpclient_open(&d, port));
    tcpclient_set(&d, "a", "1");
    ck_assert(tcpclient_check(&d, "a"));
    send_keys(&c, TCPSTORE_CHECK, "a", "b");
    ck_assert_uint_eq(tcpclient_u8(&c), 1);
    send_keys(&c, TCPSTORE_WAIT, "a", "b");
    ck_assert(!tcpclient_readable(&c, 50));
    tcpclient_set(&d, "b", "1");
    ck_assert_uint_eq(tcpclient_u8(&c), 0);
    send_keys(&c, TCPSTORE_CHECK, "a", "b");
    ck_assert_uint_eq(tcpclient_u8(&c), 0);
    for (int i = 0; i < 2; i++) {
        tcpclient_begin(&c, TCPSTORE_QUEUE_PUSH);
        tcpclient_text(&c, "q");
        tcpclient_text(&c, i ? "second" : "first");
        tcpclient_flush(&c);
    }
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_QUEUE_POP, "q"), 2); /* with the one that it brings */
    expect_text(tcpclient_value(&c, NULL), "first");
    send_barrier(&c, "one");
    ck_assert(!tcpclient_readable(&c, 50));
    send_barrier(&d, "two");
    ck_assert(!tcpclient_readable(&d, 50));
    struct tcpclient e;
    ck_assert(tcpclient_open(&e, port));
    send_barrier(&e, "two");
    ck_assert_uint_eq(tcpclient_u8(&e), 0);
    ck_assert_uint_eq(tcpclient_u8(&d), 0);
    ck_assert(!tcpclient_readable(&c, 50)); /* at another barrier */
    tcpclient_close(&c);
    tcpclient_close(&d);
    tcpclient_close(&e);
}
END_TEST

START_TEST(one_byte_at_a_time)
{
    struct tcpclient c, d;
    ck_assert(tcpclient_open(&c, port));
    ck_assert(tcpclient_open(&d, port));
    tcpclient_begin(&c, TCPSTORE_SET);
    tcpclient_text(&c, "slow");
    tcpclient_text(&c, "value");
    for (size_t i = 0; i < c.len; i++) {
        ck_assert_int_eq(send(c.fd, c.out + i, 1, MSG_NOSIGNAL), 1);
        usleep(500);
    }
    expect_text(tcpclient_get(&d, "slow"), "value");
    tcpclient_close(&c);
    tcpclient_close(&d);
}
END_TEST

/* The deadline of VALIDATE does not come back with later commands. */
START_TEST(idle_connections_live_on)
{
    struct tcpclient c;
    ck_assert(tcpclient_open(&c, port));
    tcpclient_set(&c, "k", "1");
    ck_assert(tcpclient_check(&c, "k"));
    usleep(5500000);
    ck_assert(tcpclient_check(&c, "k"));
    tcpclient_close(&c);
}
END_TEST

/* The same job twice: the second finds nothing of the first. */
START_TEST(a_namespace_empties_itself)
{
    struct tcpclient c, d;
    ck_assert(tcpclient_open(&c, port));
    ck_assert(tcpclient_open(&d, other_port));
    tcpclient_set(&c, "k", "1");
    tcpclient_set(&d, "k", "1");
    tcpclient_close(&c);
    ck_assert(tcpclient_open(&c, port)); /* back within the grace time */
    ck_assert(tcpclient_check(&c, "k"));
    tcpclient_close(&c);
    usleep(300000);
    ck_assert(tcpclient_open(&c, port));
    ck_assert(!tcpclient_check(&c, "k"));
    ck_assert_int_eq(tcpclient_number(&c, TCPSTORE_GETNUMKEYS, NULL), 0);
    ck_assert(tcpclient_check(&d, "k")); /* somebody is still connected there */
    tcpclient_close(&c);
    tcpclient_close(&d);
}
END_TEST

static void is_cut_off(struct tcpclient *c)
{
    uint8_t byte;
    tcpclient_flush(c);
    tcpclient_take(c, &byte, 1);
    ck_assert(c->broken);
    tcpclient_close(c);
}

START_TEST(the_impossible_is_cut_off_and_harms_nobody)
{
    struct tcpclient good, c;
    ck_assert(tcpclient_open(&good, port));
    tcpclient_set(&good, "text", "no number");
    for (int i = 0; i < 5; i++) {
        ck_assert(tcpclient_open(&c, port));
        if (i == 0) {
            tcpclient_begin(&c, 200);
        } else if (i == 1) { /* not a counter */
            tcpclient_begin(&c, TCPSTORE_ADD);
            tcpclient_text(&c, "text");
            tcpclient_u64(&c, 1);
        } else if (i == 2) { /* a key with a zero byte */
            tcpclient_begin(&c, TCPSTORE_SET);
            tcpclient_bytes(&c, "a\0b", 3);
            tcpclient_text(&c, "");
        } else if (i == 3) { /* more than the store's budget */
            char *big = calloc(1, 5 << 20);
            tcpclient_begin(&c, TCPSTORE_SET);
            tcpclient_text(&c, "big");
            tcpclient_bytes(&c, big, 5 << 20);
            free(big);
        } else { /* a claim of more than there may be */
            tcpclient_begin(&c, TCPSTORE_GET);
            tcpclient_u64(&c, 1ull << 40);
        }
        is_cut_off(&c);
        ck_assert(tcpclient_check(&good, "text"));
    }
    ck_assert_int_eq(address_connect(port, 1000, &c.fd, NULL), 0); /* no VALIDATE, but something else */
    c.broken = false;
    int flags = fcntl(c.fd, F_GETFL);
    fcntl(c.fd, F_SETFL, flags & ~O_NONBLOCK);
    tcpclient_begin(&c, TCPSTORE_GETNUMKEYS);
    is_cut_off(&c);
    tcpclient_close(&good);
}
END_TEST

/* It asks and asks and reads nothing: it is read from no more, and others are served. */
START_TEST(slow_reader_is_not_buffered_for)
{
    struct tcpclient slow, good;
    ck_assert(tcpclient_open(&good, port));
    ck_assert(tcpclient_open(&slow, port));
    char *big = calloc(1, (1 << 20) + 1);
    memset(big, 'x', 1 << 20);
    tcpclient_set(&good, "big", big);
    ck_assert(tcpclient_check(&good, "big")); /* SET has no answer */
    fcntl(slow.fd, F_SETFL, O_NONBLOCK);
    uint8_t get[9 + 3] = {TCPSTORE_GET, 3, 0, 0, 0, 0, 0, 0, 0, 'b', 'i', 'g'}, many[sizeof get * 1000];
    for (size_t i = 0; i < sizeof many; i++)
        many[i] = get[i % sizeof get];
    size_t asked = 0;
    while (asked < (64u << 20) && send(slow.fd, many, sizeof many, MSG_NOSIGNAL) == sizeof many)
        asked += sizeof many;
    ck_assert_uint_lt(asked, 64u << 20); /* it is not read from any more */
    free(tcpclient_get(&good, "big"));
    ck_assert(!good.broken);
    /* When it reads at last, every answer comes. */
    fcntl(slow.fd, F_SETFL, 0);
    for (int i = 0; i < 20; i++) {
        size_t len;
        char *value = tcpclient_value(&slow, &len);
        ck_assert_msg(len == 1 << 20, "answer %d has %zu bytes, broken %d, errno %s", i, len, slow.broken, strerror(errno));
        free(value);
    }
    free(big);
    tcpclient_close(&slow);
    tcpclient_close(&good);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tcpstore");
    TCase *parser = tcase_create("parser"), *served = tcase_create("served");
    tcase_add_test(parser, every_cut);
    tcase_add_test(parser, nonsense_is_refused);
    tcase_add_test(parser, listen_addresses);
    tcase_add_checked_fixture(served, setup, teardown);
    tcase_set_timeout(served, 60);
    tcase_add_test(served, every_command);
    tcase_add_test(served, waits_and_cancels);
    tcase_add_test(served, queues_and_barriers);
    tcase_add_test(served, several_at_once);
    tcase_add_test(served, one_byte_at_a_time);
    tcase_add_test(served, idle_connections_live_on);
    tcase_add_test(served, a_namespace_empties_itself);
    tcase_add_test(served, the_impossible_is_cut_off_and_harms_nobody);
    tcase_add_test(served, slow_reader_is_not_buffered_for);
    suite_add_tcase(suite, parser);
    suite_add_tcase(suite, served);
    return suite_run(suite);
}
