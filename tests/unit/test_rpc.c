/* Connections: handshakes and refusals, closing at every awkward moment, slow readers, listeners and stale sockets,
 * and the blocking client against a server in another thread. */
#include <check.h>
#include <errno.h>
#include <event2/event.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/address.h"
#include "common/budget.h"
#include "common/control_methods.h"
#include "common/loop.h"
#include "common/rpc.h"
#include "control.pb-c.h"
#include "tests/harness/suite.h"

static char dir[64];
static char unix_address[96];
static const struct rpc_identity server_id = {.cluster = "test", .software = "1.0"};
static const struct rpc_identity agent_id = {
    .role = RPC_ROLE_AGENT, .cluster = "test", .agent = "gpu3", .incarnation = 42, .software = "1.0"};
static const struct rpc_identity reader_id = {.role = RPC_ROLE_READER};

/* One end of a connection, as its user sees it. */
struct end {
    const char *script; /* what to do when: see the handlers */
    struct rpc_conn *conn;
    int hellos, readies, frames, closes;
    int code;
    char why[ERR_TEXT_MAX];
    size_t bytes;
    char last[64];
    struct rpc_identity peer;
};

struct world {
    struct event_base *base;
    struct rpc *rpc;
    struct rpc_listener *listener;
    struct end server, client;
};

static bool script_has(const struct end *end, const char *word)
{
    return end->script && strstr(end->script, word);
}

static int on_hello(void *user, struct rpc_conn *conn, const struct rpc_identity *peer, struct err *err)
{
    struct end *end = user;
    end->hellos++;
    end->peer = *peer;
    ck_assert_int_eq(rpc_conn_send(conn, FRAME_MESSAGE, 0, 0, NULL), ERR_UNREACHABLE); /* too early */
    if (script_has(end, "close-in-hello"))
        rpc_conn_close(conn);
    return script_has(end, "refuse") ? err_set(err, ERR_STALE, "incarnation 42 is evicted") : 0;
}

static void on_ready(void *user, struct rpc_conn *conn)
{
    struct end *end = user;
    end->readies++;
    end->conn = conn;
    if (script_has(end, "close-in-ready"))
        rpc_conn_close(conn);
    if (script_has(end, "say-two")) {
        ck_assert_int_eq(rpc_conn_send_bytes(conn, FRAME_MESSAGE, 0, 0, "one", 3), 0);
        ck_assert_int_eq(rpc_conn_send_bytes(conn, FRAME_MESSAGE, 0, 0, "two", 3), 0);
    }
}

static void on_frame(void *user, struct rpc_conn *conn, const struct frame *frame)
{
    struct end *end = user;
    end->frames++;
    end->bytes += frame->header.length;
    snprintf(end->last, sizeof end->last, "%.*s", (int)(frame->header.length < 60 ? frame->header.length : 60),
             (const char *)frame->payload);
    if (script_has(end, "close-in-frame"))
        rpc_conn_close(conn);
    if (script_has(end, "fail-and-finish")) { /* as when a connection is dropped that an earlier message has broken */
        ck_assert_int_eq(rpc_conn_send_bytes(conn, FRAME_MESSAGE, 0, 0, "", FRAME_LIMIT + 1), ERR_LIMIT);
        rpc_conn_finish(conn, 1000);
    }
    if (script_has(end, "finish-in-frame")) {
        ck_assert_int_eq(rpc_conn_send_bytes(conn, FRAME_MESSAGE, 0, 0, "bye", 3), 0);
        rpc_conn_finish(conn, 1000);
        ck_assert_int_eq(rpc_conn_send_bytes(conn, FRAME_MESSAGE, 0, 0, "more", 4), ERR_UNREACHABLE);
    }
}

static void on_close(void *user, struct rpc_conn *conn, int code, const char *reason)
{
    struct end *end = user;
    end->closes++;
    end->code = code;
    snprintf(end->why, sizeof end->why, "%s", reason);
    rpc_conn_close(conn); /* harmless */
    ck_assert_int_eq(rpc_conn_send(conn, FRAME_MESSAGE, 0, 0, NULL), ERR_UNREACHABLE);
}

static const struct rpc_handlers handlers = {
    .on_hello = on_hello, .on_ready = on_ready, .on_frame = on_frame, .on_close = on_close};

static struct budget *shared_budget; /* of worlds that are opened from now on */

static void world_open(struct world *w, const char *server, const char *client)
{
    memset(w, 0, sizeof *w);
    w->base = event_base_new();
    w->rpc = rpc_new(w->base);
    rpc_budget_set(w->rpc, shared_budget);
    w->server.script = server;
    w->client.script = client;
    struct rpc_options options = {.handlers = &handlers, .user = &w->server, .self = &server_id};
    const char *addresses[] = {"127.0.0.1:0", unix_address};
    struct err err = {0};
    int rc = rpc_listen(w->rpc, addresses, 2, &options, &w->listener, &err);
    ck_assert_msg(rc == 0, "%s", err.text);
}

static void world_connect(struct world *w, const char *address, const struct rpc_identity *self)
{
    struct rpc_options options = {.handlers = &handlers, .user = &w->client, .self = self};
    ck_assert_int_eq(rpc_connect(w->rpc, address, &options, &w->client.conn, NULL), 0);
}

static void world_close(struct world *w)
{
    rpc_free(w->rpc);
    loop_free(w->base);
    ck_assert_int_ne(access(unix_address + strlen("unix:"), F_OK), 0); /* the socket file is gone */
}

/* Runs the loop until *what is at least `least`, or fails after five seconds. */
static void run_until(struct world *w, const int *what, int least)
{
    for (int i = 0; i < 5000 && *what < least; i++) {
        struct timeval step = {.tv_usec = 1000};
        event_base_loopexit(w->base, &step);
        event_base_dispatch(w->base);
    }
    ck_assert_int_ge(*what, least);
}

static void run_ms(struct world *w, int ms)
{
    struct timeval step = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
    event_base_loopexit(w->base, &step);
    event_base_dispatch(w->base);
}

static void setup(void)
{
    strcpy(dir, "/tmp/eep-rpc-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(unix_address, sizeof unix_address, "unix:%s/socket", dir);
}

static void teardown(void)
{
    ck_assert_int_eq(rmdir(dir), 0);
}

/* ---- event-driven ---- */

START_TEST(there_and_back)
{
    for (size_t i = 0; i < 2; i++) {
        struct world w;
        world_open(&w, "say-two", "say-two");
        world_connect(&w, rpc_listener_address(w.listener, i), &agent_id);
        run_until(&w, &w.server.frames, 2);
        run_until(&w, &w.client.frames, 2);
        ck_assert_str_eq(w.server.last, "two");
        ck_assert_str_eq(w.client.last, "two");
        ck_assert_int_eq(w.server.peer.role, RPC_ROLE_AGENT);
        ck_assert_str_eq(w.server.peer.agent, "gpu3");
        ck_assert_uint_eq(w.server.peer.incarnation, 42);
        ck_assert_str_eq(rpc_conn_peer(w.client.conn)->cluster, "test");
        ck_assert_int_eq(strncmp(rpc_conn_name(w.server.conn), i ? "agent gpu3 unix" : "agent gpu3 127.0.0.1:", 15), 0);
        ck_assert_uint_ne(rpc_conn_id(w.client.conn), rpc_conn_id(w.server.conn));
        rpc_conn_close(w.client.conn);
        run_until(&w, &w.server.closes, 1);
        ck_assert_int_eq(w.server.code, ERR_UNREACHABLE);
        ck_assert_ptr_nonnull(strstr(w.server.why, "closed the connection"));
        ck_assert_int_eq(w.client.closes, 0);
        ck_assert_ptr_null(rpc_listener_address(w.listener, 2));
        world_close(&w);
    }
}
END_TEST

START_TEST(names_are_resolved)
{
    struct world w;
    world_open(&w, "", "");
    char address[64];
    snprintf(address, sizeof address, "localhost%s", strrchr(rpc_listener_address(w.listener, 0), ':'));
    world_connect(&w, address, &agent_id);
    run_until(&w, &w.client.readies, 1);
    world_close(&w);
}
END_TEST

START_TEST(close_at_awkward_moments)
{
    static const struct {
        const char *server, *client;
        int server_closes, client_closes;
    } cases[] = {
        {"close-in-hello", "", 0, 1},
        {"close-in-ready", "say-two", 0, 1},
        {"close-in-frame", "say-two", 0, 1},
        {"say-two", "close-in-ready", 1, 0},
        {"say-two", "close-in-frame", 1, 0},
        {"finish-in-frame", "say-two", 0, 1},
        {"fail-and-finish", "say-two", 0, 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct world w;
        world_open(&w, cases[i].server, cases[i].client);
        world_connect(&w, unix_address, &agent_id);
        run_until(&w, cases[i].server_closes ? &w.server.closes : &w.client.closes, 1);
        run_ms(&w, 5);
        ck_assert_int_eq(w.server.closes, cases[i].server_closes);
        ck_assert_int_eq(w.client.closes, cases[i].client_closes);
        if (script_has(&w.server, "finish-in-frame"))
            ck_assert_str_eq(w.client.last, "bye"); /* what was queued came before the end */
        if (script_has(&w.server, "in-frame"))
            ck_assert_int_eq(w.server.frames, 1); /* the second of one read is not delivered */
        world_close(&w);
    }
}
END_TEST

START_TEST(refusals)
{
    static const struct {
        struct rpc_identity self;
        int code;
        const char *why;
    } cases[] = {
        {{RPC_ROLE_AGENT, "other", "gpu3", 42, ""}, ERR_CONFLICT, "this is cluster 'test', not 'other'"},
        {{RPC_ROLE_AGENT, "", "gpu3", 42, ""}, ERR_CONFLICT, "not ''"},
        {{RPC_ROLE_AGENT, "test", "", 42, ""}, ERR_PROTOCOL, "id"},
        {{RPC_ROLE_PEER, "test", "a/b", 42, ""}, ERR_PROTOCOL, "id"},
        {{RPC_ROLE_AGENT, "test", "gpu3", 0, ""}, ERR_PROTOCOL, "incarnation"},
        {{9, "test", "gpu3", 42, ""}, ERR_PROTOCOL, "role"},
        {{RPC_ROLE_AGENT, "test", "gpu3", 42, ""}, ERR_STALE, "incarnation 42 is evicted"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct world w;
        world_open(&w, "refuse", "");
        world_connect(&w, rpc_listener_address(w.listener, 0), &cases[i].self);
        run_until(&w, &w.client.closes, 1);
        ck_assert_int_eq(w.client.code, cases[i].code);
        ck_assert_msg(strstr(w.client.why, cases[i].why) != NULL, "'%s' does not say '%s'", w.client.why, cases[i].why);
        ck_assert_int_eq(w.client.readies, 0);
        run_ms(&w, 2);
        ck_assert_int_eq(w.server.readies + w.server.closes, 0);
        world_close(&w);
    }
}
END_TEST

START_TEST(nobody_there)
{
    struct world w;
    world_open(&w, "", "");
    char missing[128];
    snprintf(missing, sizeof missing, "unix:%s/nothing", dir);
    const char *addresses[] = {missing, "127.0.0.1:1"};
    for (int i = 0; i < 2; i++) {
        world_connect(&w, addresses[i], &agent_id);
        ck_assert_int_eq(w.client.closes, i); /* never from inside rpc_connect */
        run_until(&w, &w.client.closes, i + 1);
        ck_assert_int_eq(w.client.code, ERR_UNREACHABLE);
    }
    struct rpc_options options = {.handlers = &handlers, .user = &w.client, .self = &agent_id};
    struct err err = {0};
    ck_assert_int_eq(rpc_connect(w.rpc, "nonsense", &options, &w.client.conn, &err), ERR_INVALID);
    world_close(&w);
}
END_TEST

/* Who is not of our kind is cut off at once; nothing is allocated for what a header promises. */
START_TEST(strangers)
{
    static const uint8_t big[] = {'E', 'E', 'P', '1', 0xff, 0xff, 0xff, 0x00};
    static const struct {
        const void *data;
        size_t len;
    } cases[] = {{"GET", 3}, {big, sizeof big}};
    for (size_t i = 0; i < 2; i++) {
        struct world w;
        world_open(&w, "", "");
        int fd;
        ck_assert_int_eq(address_connect(unix_address, 1000, &fd, NULL), 0);
        ck_assert_int_eq(write(fd, cases[i].data, cases[i].len), (ssize_t)cases[i].len);
        char byte;
        ssize_t n = -1;
        for (int k = 0; k < 1000 && n < 0; k++) {
            run_ms(&w, 1);
            n = read(fd, &byte, 1);
        }
        ck_assert_int_eq(n, 0);
        ck_assert_int_eq(w.server.hellos, 0);
        close(fd);
        world_close(&w);
    }
}
END_TEST

START_TEST(silence_is_cut_off)
{
    struct world w;
    world_open(&w, "", "");
    int fd;
    ck_assert_int_eq(address_connect(unix_address, 1000, &fd, NULL), 0);
    char byte;
    run_ms(&w, RPC_HANDSHAKE_MS - 500);
    ck_assert_int_eq(read(fd, &byte, 1), -1);
    run_ms(&w, 1000);
    ck_assert_int_eq(read(fd, &byte, 1), 0);
    close(fd);
    world_close(&w);
}
END_TEST

START_TEST(big_frames)
{
    struct world w;
    world_open(&w, "", "");
    world_connect(&w, unix_address, &agent_id);
    run_until(&w, &w.client.readies, 1);
    size_t len = 20u << 20;
    char *data = calloc(1, len);
    ck_assert_int_eq(rpc_conn_send_bytes(w.client.conn, FRAME_MESSAGE, 0, 0, data, len), 0);
    ck_assert_int_eq(rpc_conn_send_bytes(w.client.conn, FRAME_MESSAGE, 0, 0, "end", 3), 0);
    run_until(&w, &w.server.frames, 2);
    ck_assert_uint_eq(w.server.bytes, len + 3);
    ck_assert_str_eq(w.server.last, "end");
    ck_assert_int_eq(rpc_conn_send_bytes(w.client.conn, FRAME_MESSAGE, 0, 0, data, (size_t)FRAME_LIMIT + 1), ERR_LIMIT);
    ck_assert_int_eq(w.client.closes, 0);
    run_until(&w, &w.client.closes, 1);
    ck_assert_int_eq(w.client.code, ERR_LIMIT);
    free(data);
    world_close(&w);
}
END_TEST

/* A raw client that shakes hands and then reads nothing: its socket. */
static int deaf_reader(struct world *w, int nth)
{
    int fd;
    ck_assert_int_eq(address_connect(unix_address, 1000, &fd, NULL), 0);
    Pb__Hello hello = PB__HELLO__INIT;
    hello.protocol = RPC_PROTOCOL_VERSION;
    hello.role = PB__ROLE__READER;
    hello.cluster = hello.agent = hello.software = (char *)"";
    uint8_t data[128];
    struct frame_header header = {(uint32_t)pb__hello__pack(&hello, data + FRAME_HEADER_BYTES), FRAME_HANDSHAKE, 0, 0};
    frame_header_put(data, &header);
    ck_assert_int_gt(write(fd, data, FRAME_HEADER_BYTES + header.length), 0);
    run_until(w, &w->server.readies, nth);
    return fd;
}

START_TEST(slow_readers_are_cut_off)
{
    struct world w;
    world_open(&w, "", "");
    int fd = deaf_reader(&w, 1);
    size_t chunk = 8u << 20;
    char *zeros = calloc(1, chunk);
    int rc = 0;
    for (int i = 0; i < 20 && rc == 0; i++)
        rc = rpc_conn_send_bytes(w.server.conn, FRAME_MESSAGE, 0, 0, zeros, chunk);
    ck_assert_int_eq(rc, ERR_LIMIT);
    ck_assert_int_eq(w.server.closes, 0);
    run_until(&w, &w.server.closes, 1);
    ck_assert_int_eq(w.server.code, ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(w.server.why, "too slowly"));
    free(zeros);
    close(fd);
    world_close(&w);
}
END_TEST

/* None of them is beyond its own limit; together they are, and the one with the most goes. */
START_TEST(the_one_with_the_most_is_cut_off)
{
    const size_t chunk = 4u << 20;
    char *zeros = calloc(1, chunk);
    struct budget budget = {.limit = 20u << 20};
    struct world w;
    shared_budget = &budget;
    world_open(&w, "", "");
    int fds[3];
    struct rpc_conn *conns[3];
    for (int i = 0; i < 3; i++) {
        fds[i] = deaf_reader(&w, i + 1);
        conns[i] = w.server.conn;
    }
    static const int to[] = {0, 1, 1, 2}; /* 16 MiB and their headers */
    for (size_t i = 0; i < sizeof to / sizeof to[0]; i++)
        ck_assert_int_eq(rpc_conn_send_bytes(conns[to[i]], FRAME_MESSAGE, 0, 0, zeros, chunk), 0);
    ck_assert_uint_gt(budget.used, 4 * chunk);
    rpc_conn_hold(conns[1], 100, 0);
    ck_assert_int_eq(rpc_conn_send_bytes(conns[0], FRAME_MESSAGE, 0, 0, zeros, chunk), 0);
    /* beyond 20 MiB: not the sender goes, but who holds a little more */
    ck_assert_uint_eq(budget.cuts, 1);
    ck_assert_uint_lt(budget.used, 4 * chunk); /* at once */
    ck_assert_int_eq(rpc_conn_send_bytes(conns[0], FRAME_MESSAGE, 0, 0, zeros, chunk), 0);
    ck_assert_int_eq(rpc_conn_send_bytes(conns[0], FRAME_MESSAGE, 0, 0, zeros, chunk), ERR_LIMIT); /* now the sender */
    ck_assert_uint_eq(budget.cuts, 2);
    run_until(&w, &w.server.closes, 2);
    ck_assert_int_eq(w.server.code, ERR_LIMIT);
    ck_assert_ptr_nonnull(strstr(w.server.why, "the most of all connections"));
    ck_assert_int_eq(rpc_conn_send_bytes(conns[2], FRAME_MESSAGE, 0, 0, "still", 5), 0);
    for (int i = 0; i < 3; i++)
        close(fds[i]);
    free(zeros);
    world_close(&w);
    shared_budget = NULL;
    ck_assert_uint_eq(budget.used, 0);
    ck_assert_ptr_null(budget.holders);
}
END_TEST

START_TEST(another_protocol_version)
{
    struct world w;
    world_open(&w, "", "");
    int fd;
    ck_assert_int_eq(address_connect(unix_address, 1000, &fd, NULL), 0);
    Pb__Hello hello = PB__HELLO__INIT;
    hello.protocol = 2;
    hello.role = PB__ROLE__READER;
    hello.cluster = hello.agent = hello.software = (char *)"";
    uint8_t data[1024];
    struct frame_header header = {(uint32_t)pb__hello__pack(&hello, data + FRAME_HEADER_BYTES), FRAME_HANDSHAKE, 0, 0};
    frame_header_put(data, &header);
    ck_assert_int_gt(write(fd, data, FRAME_HEADER_BYTES + header.length), 0);
    ssize_t n = -1;
    for (int k = 0; k < 1000 && n < 0; k++) {
        run_ms(&w, 1);
        n = read(fd, data, sizeof data);
    }
    struct frame frame;
    size_t size;
    ck_assert_int_eq(frame_parse(data, (size_t)n, FRAME_LIMIT, &frame, &size, NULL), 1);
    ck_assert_int_eq(frame.header.kind, FRAME_ERROR);
    struct err err;
    ck_assert_int_eq(rpc_error_of(frame.payload, frame.header.length, &err), ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(err.text, "version 2"));
    close(fd);
    world_close(&w);
}
END_TEST

/* ---- addresses ---- */

START_TEST(stale_live_and_foreign_files)
{
    const char *path = unix_address + strlen("unix:");
    char actual[ADDRESS_TEXT_MAX];
    struct err err = {0};
    struct stat st;
    int first, second;
    ck_assert_int_eq(address_listen(unix_address, 0600, &first, actual, &err), 0);
    ck_assert_str_eq(actual, unix_address);
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_uint_eq(st.st_mode & 0777, 0600);
    ck_assert_int_eq(address_listen(unix_address, 0, &second, actual, &err), ERR_CONFLICT);
    ck_assert_ptr_nonnull(strstr(err.text, "in use"));
    close(first); /* as kill -9 would: the file stays */
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_int_eq(address_listen(unix_address, 0, &second, actual, &err), 0);
    /* The file was taken by somebody else meanwhile: it stays theirs. */
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(address_listen(unix_address, 0, &first, actual, &err), 0);
    address_unlink(unix_address, second);
    close(second);
    ck_assert_int_eq(stat(path, &st), 0);
    address_unlink(unix_address, first);
    close(first);
    ck_assert_int_eq(stat(path, &st), -1);

    FILE *file = fopen(path, "w");
    fclose(file);
    ck_assert_int_eq(address_listen(unix_address, 0, &first, actual, &err), ERR_CONFLICT);
    ck_assert_ptr_nonnull(strstr(err.text, "no socket"));
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(address_listen("127.0.0.1:0", 0, &first, actual, &err), 0);
    ck_assert_int_eq(address_listen(actual, 0, &second, actual, &err), ERR_CONFLICT);
    close(first);
}
END_TEST

START_TEST(address_texts)
{
    static const struct {
        const char *text, *host, *port;
    } good[] = {
        {"127.0.0.1:80", "127.0.0.1", "80"}, {"[::1]:7000", "::1", "7000"}, {":0", "", "0"},
        {"node-1.example:65535", "node-1.example", "65535"},
    };
    static const char *const bad[] = {"",     "host",   "host:",  "host:x",  "host:65536", "host:-1",  "host:1x",
                                      "::1:80", "[::1:80", "unix:", "host: 80", "[]x:1"};
    struct address a;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        ck_assert_int_eq(address_parse(good[i].text, &a, NULL), 0);
        ck_assert_str_eq(a.host, good[i].host);
        ck_assert_str_eq(a.port, good[i].port);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        ck_assert_msg(address_parse(bad[i], &a, NULL) == ERR_INVALID, "'%s'", bad[i]);
    char longer[200];
    memset(longer, 'a', sizeof longer);
    memcpy(longer, "unix:/", 6);
    longer[114] = '\0';
    ck_assert_int_eq(address_parse(longer, &a, NULL), ERR_INVALID);
    longer[112] = '\0';
    ck_assert_int_eq(address_parse(longer, &a, NULL), 0);
    ck_assert(a.is_unix);
}
END_TEST

/* ---- the blocking client ---- */

/* Answers Version at once, KvGet never (but a late reply after the next call), Abort with an error, WatchView with
 * three views and the end, KvAdd only after a second one came. */
static void serve(void *user, struct rpc_conn *conn, const struct frame *frame)
{
    struct world *w = user;
    struct err err = {0};
    ProtobufCMessage *request;
    uint64_t call = frame->header.call;
    uint16_t method = frame->header.method;
    static uint64_t late; /* one world at a time */
    ck_assert_int_eq(frame->header.kind, FRAME_CALL);
    ck_assert_uint_lt(method, CONTROL_METHODS);
    if (rpc_unpack(pb__control__descriptor.methods[method].input, frame->payload, frame->header.length, 0, &request,
                   &err) < 0) {
        rpc_conn_send_error(conn, method, call, err.code, err.text);
        return;
    }
    Pb__VersionReply version = PB__VERSION_REPLY__INIT;
    version.software = (char *)"1.2.3";
    version.cluster = (char *)"test";
    Pb__ViewStatus view = PB__VIEW_STATUS__INIT;
    view.degraded = (char *)"";
    Pb__KvValue value = PB__KV_VALUE__INIT;
    switch (method) {
    case CONTROL_VERSION:
        if (late)
            rpc_conn_send(conn, FRAME_REPLY, CONTROL_KV_GET, late, &value.base);
        late = 0;
        rpc_conn_send(conn, FRAME_REPLY, method, call, &version.base);
        break;
    case CONTROL_KV_GET:
        late = call;
        break;
    case CONTROL_ABORT:
        rpc_conn_send_error(conn, method, call, ERR_NOTFOUND, "no operation is running");
        break;
    case CONTROL_WATCH_VIEW:
        for (view.epoch = 1; view.epoch <= 3; view.epoch++)
            rpc_conn_send(conn, FRAME_STREAM, method, call, &view.base);
        rpc_conn_send(conn, FRAME_END, method, call, NULL);
        break;
    case CONTROL_STATUS:
        rpc_conn_close(conn);
        event_base_loopexit(w->base, NULL);
        break;
    default:
        rpc_conn_send_error(conn, method, call, ERR_UNSUPPORTED, "not here");
    }
    rpc_unpack_free(request);
}

static void *serve_main(void *arg)
{
    struct world *w = arg;
    event_base_loop(w->base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

static void server_start(struct world *w, pthread_t *ret_thread)
{
    static const struct rpc_handlers serving = {.on_frame = serve};
    memset(w, 0, sizeof *w);
    w->base = event_base_new();
    w->rpc = rpc_new(w->base);
    struct rpc_options options = {.handlers = &serving, .user = w, .self = &server_id};
    const char *addresses[] = {unix_address};
    ck_assert_int_eq(rpc_listen(w->rpc, addresses, 1, &options, &w->listener, NULL), 0);
    ck_assert_int_eq(pthread_create(ret_thread, NULL, serve_main, w), 0);
}

START_TEST(blocking_client)
{
    struct world w;
    pthread_t thread;
    server_start(&w, &thread);
    struct rpc_client *c;
    struct err err = {0};
    ck_assert_int_eq(rpc_client_connect(unix_address, &reader_id, &pb__control__descriptor, 2000, &c, &err), 0);
    ck_assert_str_eq(rpc_client_peer(c)->cluster, "test");

    Pb__Empty empty = PB__EMPTY__INIT;
    ProtobufCMessage *reply;
    ck_assert_int_eq(rpc_client_call(c, CONTROL_VERSION, &empty.base, 2000, &reply, &err), 0);
    ck_assert_str_eq(((Pb__VersionReply *)reply)->software, "1.2.3");
    rpc_unpack_free(reply);

    Pb__AbortRequest abort_request = PB__ABORT_REQUEST__INIT;
    ck_assert_int_eq(rpc_client_call(c, CONTROL_ABORT, &abort_request.base, 2000, &reply, &err), ERR_NOTFOUND);
    ck_assert_str_eq(err.text, "no operation is running");

    /* A late answer is dropped; a stream waits while other calls are made. */
    Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
    get.key = (char *)"k";
    ck_assert_int_eq(rpc_client_call(c, CONTROL_KV_GET, &get.base, 30, &reply, &err), ERR_TIMEOUT);
    uint64_t watch;
    ck_assert_int_eq(rpc_client_start(c, CONTROL_WATCH_VIEW, &empty.base, &watch, &err), 0);
    ck_assert_int_eq(rpc_client_call(c, CONTROL_VERSION, &empty.base, 2000, &reply, &err), 0);
    rpc_unpack_free(reply);
    for (uint64_t epoch = 1; epoch <= 3; epoch++) {
        ck_assert_int_eq(rpc_client_next(c, watch, 2000, &reply, &err), 1);
        ck_assert_uint_eq(((Pb__ViewStatus *)reply)->epoch, epoch);
        rpc_unpack_free(reply);
    }
    ck_assert_int_eq(rpc_client_next(c, watch, 2000, &reply, &err), 0);
    ck_assert_int_eq(rpc_client_next(c, watch, 2000, &reply, &err), ERR_NOTFOUND);

    /* Without waiting, until the descriptor says so. */
    uint64_t call;
    int rc;
    ck_assert_int_eq(rpc_client_start(c, CONTROL_VERSION, &empty.base, &call, &err), 0);
    while ((rc = rpc_client_next(c, call, 0, &reply, &err)) == ERR_TIMEOUT) {
        struct pollfd p = {.fd = rpc_client_fd(c), .events = POLLIN};
        ck_assert_int_eq(poll(&p, 1, 2000), 1);
    }
    ck_assert_int_eq(rc, 1);
    rpc_unpack_free(reply);
    ck_assert_int_eq(rpc_client_next(c, call, 0, &reply, &err), 0);

    ck_assert_int_eq(rpc_client_call(c, CONTROL_STATUS, &empty.base, 2000, &reply, &err), ERR_UNREACHABLE);
    ck_assert_int_eq(rpc_client_call(c, CONTROL_STATUS, &empty.base, 2000, &reply, &err), ERR_UNREACHABLE);
    rpc_client_free(c);
    pthread_join(thread, NULL);
    world_close(&w);

    ck_assert_int_eq(rpc_client_connect(unix_address, &reader_id, &pb__control__descriptor, 200, &c, &err),
                     ERR_UNREACHABLE);
    struct rpc_identity stranger = reader_id;
    strcpy(stranger.cluster, "other");
    server_start(&w, &thread);
    ck_assert_int_eq(rpc_client_connect(unix_address, &stranger, &pb__control__descriptor, 2000, &c, &err),
                     ERR_CONFLICT);
    ck_assert_ptr_nonnull(strstr(err.text, "this is cluster 'test'"));
    ck_assert_int_eq(rpc_client_connect(unix_address, &reader_id, &pb__control__descriptor, 2000, &c, &err), 0);
    ck_assert_int_eq(rpc_client_call(c, CONTROL_STATUS, &empty.base, 2000, &reply, &err), ERR_UNREACHABLE);
    rpc_client_free(c);
    pthread_join(thread, NULL);
    world_close(&w);
}
END_TEST

/* A listener that accepts nothing: the deadline holds. */
/* Small and large messages in turn: what fits is in the scratch, what does not is malloc'ed and freed (ASan looks). */
START_TEST(unpacking_into_scratch)
{
    static struct rpc_scratch scratch;
    static const size_t sizes[] = {10, 100000, 0, 3000, 4096, 50};
    uint8_t *value = malloc(100000), *packed = malloc(110000);
    memset(value, 'v', 100000);
    for (size_t i = 0; i < 2 * sizeof sizes / sizeof *sizes; i++) {
        Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
        ProtobufCMessage *message;
        struct err err = {0};
        set.key = (char *)"key";
        set.value.data = value;
        set.value.len = sizes[i % (sizeof sizes / sizeof *sizes)];
        size_t len = pb__kv_set_request__pack(&set, packed);
        ck_assert_int_eq(rpc_unpack_scratch(&scratch, set.base.descriptor, packed, len - 1, &message, &err),
                         ERR_PROTOCOL);
        ck_assert_int_eq(rpc_unpack_scratch(&scratch, set.base.descriptor, packed, len, &message, &err), 0);
        const Pb__KvSetRequest *got = (const Pb__KvSetRequest *)message;
        ck_assert_str_eq(got->key, "key");
        ck_assert_uint_eq(got->value.len, set.value.len);
        if (set.value.len)
            ck_assert_int_eq(memcmp(got->value.data, value, set.value.len), 0);
        ck_assert((const uint8_t *)got->key > scratch.bytes &&
                  (const uint8_t *)got->key < scratch.bytes + sizeof scratch.bytes);
        rpc_scratch_free(&scratch, message);
        ck_assert_uint_eq(scratch.used, 0);
    }
    free(value);
    free(packed);
}
END_TEST

/* Its peer takes nothing for a while: cut off by the stall alone, far below any limit in bytes; one that takes a little
 * now and then lives. */
START_TEST(stalled_readers_are_cut_off)
{
    for (int reads = 0; reads < 2; reads++) {
        struct world w;
        world_open(&w, "", "");
        int fd, small = 4096;
        ck_assert_int_eq(address_connect(unix_address, 1000, &fd, NULL), 0);
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        Pb__Hello hello = PB__HELLO__INIT;
        hello.protocol = RPC_PROTOCOL_VERSION;
        hello.role = PB__ROLE__READER;
        hello.cluster = hello.agent = hello.software = (char *)"";
        uint8_t data[128];
        struct frame_header header = {(uint32_t)pb__hello__pack(&hello, data + FRAME_HEADER_BYTES), FRAME_HANDSHAKE, 0,
                                      0};
        frame_header_put(data, &header);
        ck_assert_int_gt(write(fd, data, FRAME_HEADER_BYTES + header.length), 0);
        run_until(&w, &w.server.readies, 1);
        rpc_conn_limit(w.server.conn, 1u << 20, 32u << 20, 500);
        size_t bytes = 4u << 20;
        char *zeros = calloc(1, bytes);
        ck_assert_int_eq(rpc_conn_send_bytes(w.server.conn, FRAME_MESSAGE, 0, 0, zeros, bytes), 0);
        for (int i = 0; reads && i < 15; i++) { /* three times as long as it may stall */
            size_t want = 200000;
            run_ms(&w, 100);
            for (ssize_t n = 1; want > 0 && n > 0; want -= n > 0 ? (size_t)n : 0) {
                n = recv(fd, zeros, want, MSG_DONTWAIT);
                run_ms(&w, 1);
            }
        }
        ck_assert_int_eq(w.server.closes, 0);
        run_until(&w, &w.server.closes, 1);
        ck_assert_int_eq(w.server.code, ERR_LIMIT);
        ck_assert_msg(strstr(w.server.why, "too slowly"), "%s", w.server.why);
        free(zeros);
        close(fd);
        world_close(&w);
    }
}
END_TEST

START_TEST(client_deadline)
{
    int fd;
    char actual[ADDRESS_TEXT_MAX];
    struct err err = {0};
    struct rpc_client *c;
    ck_assert_int_eq(address_listen(unix_address, 0, &fd, actual, &err), 0);
    ck_assert_int_eq(rpc_client_connect(unix_address, &reader_id, &pb__control__descriptor, 50, &c, &err), ERR_TIMEOUT);
    address_unlink(unix_address, fd);
    close(fd);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("rpc");
    TCase *tc = tcase_create("rpc");
    tcase_set_timeout(tc, 30);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, there_and_back);
    tcase_add_test(tc, names_are_resolved);
    tcase_add_test(tc, close_at_awkward_moments);
    tcase_add_test(tc, refusals);
    tcase_add_test(tc, nobody_there);
    tcase_add_test(tc, strangers);
    tcase_add_test(tc, silence_is_cut_off);
    tcase_add_test(tc, big_frames);
    tcase_add_test(tc, slow_readers_are_cut_off);
    tcase_add_test(tc, the_one_with_the_most_is_cut_off);
    tcase_add_test(tc, another_protocol_version);
    tcase_add_test(tc, stale_live_and_foreign_files);
    tcase_add_test(tc, address_texts);
    tcase_add_test(tc, blocking_client);
    tcase_add_test(tc, client_deadline);
    tcase_add_test(tc, unpacking_into_scratch);
    tcase_add_test(tc, stalled_readers_are_cut_off);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
