/* PyTorch's TCPStore against ours, with one client for both that speaks PyTorch's own bytes: PyTorch's client in Python takes
 * longer for a call than either server.  Against them, the same through our own protocol, where a get is one round trip.
 *
 * The generator is one thread with an epoll set; a connection has one call under way, as PyTorch's client has it, and by our
 * own protocol also DEPTH of them.  As PyTorch's client does it, a get is WAIT, its answer, GET, its answer.  Each case runs ROUNDS times, the servers in turn; the medians are shown.
 *
 * usage: bench_tcpstore EEP_TCPSTORE EEP PYTORCH [SECONDS]      addresses: host:port */
#include <fcntl.h>
#include <stdio.h>
#include <sys/epoll.h>

#include "common/clock.h"
#include "common/control_methods.h"
#include "tests/harness/caller.h"
#include "tests/harness/tcpclient.h"

#define KEYS 1000
#define VALUE_BYTES 100
#define ROUNDS 5
#define CONNS_MAX 50
#define DEPTH 16

enum op { OP_GET, OP_ADD, OP_CHECK, OPS };
static const char *const op_names[] = {"get", "add", "check"};

enum answer { ANSWER_BYTE, ANSWER_I64, ANSWER_VALUE, ANSWER_FRAME };
struct step {
    uint8_t *bytes;
    size_t len;
    enum answer answer;
};
struct call {
    struct step steps[2];
    unsigned n;
};
struct conn {
    int fd;
    const struct call *call;
    unsigned step;
    uint8_t in[16384];
    size_t have;
};
#define SIDES 4 /* eep by TCPStore's protocol, by its own, PyTorch, eep by its own with DEPTH calls under way */
struct side {
    const char *address;
    bool tcpstore;
    unsigned depth; /* calls under way on a connection; more than 1: of our own protocol */
    struct call calls[OPS][KEYS];
};

static void die(const char *what)
{
    fprintf(stderr, "bench_tcpstore: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- requests ---- */

static struct step tcp_step(uint8_t query, const char *key, bool counted, bool amount, enum answer answer)
{
    struct tcpclient c = {.fd = -1};
    tcpclient_begin(&c, query);
    if (counted)
        tcpclient_u64(&c, 1);
    tcpclient_text(&c, key);
    if (amount)
        tcpclient_u64(&c, 1);
    return (struct step){c.out, c.len, answer};
}

static struct call tcp_call(enum op op, const char *key)
{
    if (op == OP_GET)
        return (struct call){{tcp_step(TCPSTORE_WAIT, key, true, false, ANSWER_BYTE),
                              tcp_step(TCPSTORE_GET, key, false, false, ANSWER_VALUE)}, 2};
    if (op == OP_ADD)
        return (struct call){{tcp_step(TCPSTORE_ADD, key, false, true, ANSWER_I64)}, 1};
    return (struct call){{tcp_step(TCPSTORE_CHECK, key, true, false, ANSWER_BYTE)}, 1};
}

static struct call own_call(enum op op, char *key)
{
    struct call call = {.n = 1};
    struct step *s = &call.steps[0];
    s->answer = ANSWER_FRAME;
    if (op == OP_GET) {
        Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
        get.key = key;
        get.wait_ms = 60000;
        s->bytes = caller_frame(FRAME_CALL, CONTROL_KV_GET, 1, &get.base, &s->len);
    } else if (op == OP_ADD) {
        Pb__KvAddRequest add = PB__KV_ADD_REQUEST__INIT;
        add.key = key;
        add.amount = 1;
        add.has_ephemeral = add.ephemeral = 1;
        s->bytes = caller_frame(FRAME_CALL, CONTROL_KV_ADD, 1, &add.base, &s->len);
    } else {
        Pb__KvCheckRequest check = PB__KV_CHECK_REQUEST__INIT;
        check.n_keys = 1;
        check.keys = &key;
        s->bytes = caller_frame(FRAME_CALL, CONTROL_KV_CHECK, 1, &check.base, &s->len);
    }
    return call;
}

static void set_own(int fd, char *key, const char *value)
{
    uint8_t answer[512];
    size_t len;
    Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
    set.key = key;
    set.value.data = (uint8_t *)value;
    set.value.len = strlen(value);
    set.has_ephemeral = set.ephemeral = 1;
    uint8_t *frame = caller_frame(FRAME_CALL, CONTROL_KV_SET, 1, &set.base, &len);
    struct pollfd p = {.fd = fd, .events = POLLIN};
    if (send(fd, frame, len, MSG_NOSIGNAL) != (ssize_t)len || poll(&p, 1, 5000) != 1 ||
        recv(fd, answer, sizeof answer, 0) < FRAME_HEADER_BYTES)
        die("set");
    free(frame);
}

/* The requests of a side, and the keys that they get. */
static void side_open(struct side *side, const char *address, bool tcpstore, unsigned depth)
{
    struct tcpclient c = {.fd = -1};
    char value[VALUE_BYTES + 1], key[32];
    side->address = address;
    side->tcpstore = tcpstore;
    side->depth = depth;
    memset(value, 'v', VALUE_BYTES);
    value[VALUE_BYTES] = '\0';
    int fd = tcpstore ? -1 : caller_connect(address);
    if (tcpstore ? !tcpclient_open(&c, address) : fd < 0)
        die(address);
    for (unsigned i = 0; i < KEYS; i++)
        for (enum op op = OP_GET; op < OPS; op++) {
            snprintf(key, sizeof key, "%s:%u", op == OP_ADD ? "bench-counter" : "bench-key", i);
            side->calls[op][i] = tcpstore ? tcp_call(op, key) : own_call(op, key);
            if (op == OP_GET && tcpstore)
                tcpclient_set(&c, key, value);
            else if (op == OP_GET)
                set_own(fd, key, value);
        }
    if (tcpstore && !tcpclient_check(&c, key)) /* sets have no answers; this one has, and comes after them */
        die("set");
    if (tcpstore)
        tcpclient_close(&c);
    else
        close(fd);
}

/* ---- the load ---- */

/* Bytes of the answer; 0: not all of it is there. */
static size_t answer_bytes(enum answer answer, const uint8_t *in, size_t have)
{
    struct frame frame;
    size_t size = answer == ANSWER_BYTE ? 1 : 8;
    uint64_t len;
    if (answer == ANSWER_FRAME) {
        int rc = frame_parse(in, have, FRAME_LIMIT, &frame, &size, NULL);
        if (rc < 0 || (rc == 1 && frame.header.kind != FRAME_REPLY))
            die("an answer that is no reply");
        return rc == 1 ? size : 0;
    }
    if (answer == ANSWER_VALUE && have >= 8) {
        memcpy(&len, in, sizeof len);
        if (len != VALUE_BYTES)
            die("a value that was not set");
        size += VALUE_BYTES;
    }
    return size <= have ? size : 0;
}

static uint32_t seed = 12345;

static void step_send(struct conn *c)
{
    const struct step *s = &c->call->steps[c->step];
    if (send(c->fd, s->bytes, s->len, MSG_NOSIGNAL) != (ssize_t)s->len)
        die("send");
}

static void call_next(struct conn *c, const struct side *side, enum op op)
{
    seed = seed * 1664525 + 1013904223;
    c->call = &side->calls[op][seed / 65536 % KEYS];
    c->step = 0;
    step_send(c);
}

/* Puts a random call, as call `id`, into out; how many bytes. */
static size_t call_put(const struct side *side, enum op op, uint64_t id, uint8_t *out, size_t room)
{
    seed = seed * 1664525 + 1013904223;
    const struct step *s = &side->calls[op][seed / 65536 % KEYS].steps[0];
    struct frame frame;
    size_t size;
    if (s->len > room || frame_parse(s->bytes, s->len, FRAME_LIMIT, &frame, &size, NULL) != 1)
        die("a request that is no frame");
    memcpy(out, s->bytes, s->len);
    frame.header.call = id;
    frame_header_put(out, &frame.header);
    return s->len;
}

static void bytes_send(const struct conn *c, const uint8_t *bytes, size_t len)
{
    if (send(c->fd, bytes, len, MSG_NOSIGNAL) != (ssize_t)len)
        die("send");
}

/* The calls that have ended; as many others are under way. */
static unsigned conn_read_frames(struct conn *c, const struct side *side, enum op op)
{
    uint8_t out[DEPTH * 256];
    size_t at = 0, put = 0, size;
    unsigned ended = 0;
    struct frame frame;
    int rc;
    while ((rc = frame_parse(c->in + at, c->have - at, FRAME_LIMIT, &frame, &size, NULL)) == 1) {
        if (frame.header.kind != FRAME_REPLY)
            die("an answer that is no reply");
        at += size;
        put += call_put(side, op, frame.header.call, out + put, sizeof out - put);
        ended++;
    }
    if (rc < 0)
        die("an answer that is no frame");
    memmove(c->in, c->in + at, c->have - at);
    c->have -= at;
    if (put)
        bytes_send(c, out, put);
    return ended;
}

static void conn_begin(struct conn *c, const struct side *side, enum op op)
{
    uint8_t out[DEPTH * 256];
    size_t put = 0;
    if (side->depth == 1) {
        call_next(c, side, op);
        return;
    }
    for (unsigned i = 1; i <= side->depth; i++)
        put += call_put(side, op, i, out + put, sizeof out - put);
    bytes_send(c, out, put);
}

/* How many calls have ended; the next ones are under way. */
static unsigned conn_read(struct conn *c, const struct side *side, enum op op)
{
    ssize_t n = recv(c->fd, c->in + c->have, sizeof c->in - c->have, 0);
    if (n <= 0)
        die("recv");
    c->have += (size_t)n;
    if (side->depth > 1)
        return conn_read_frames(c, side, op);
    size_t size = answer_bytes(c->call->steps[c->step].answer, c->in, c->have);
    if (!size)
        return 0;
    if (size != c->have)
        die("more came than was asked for");
    c->have = 0;
    if (++c->step < c->call->n) {
        step_send(c);
        return 0;
    }
    call_next(c, side, op);
    return 1;
}

static int conn_open(const struct side *side)
{
    struct tcpclient c;
    if (!side->tcpstore)
        return caller_connect(side->address);
    int fd = tcpclient_open(&c, side->address) ? c.fd : -1;
    free(c.out);
    return fd;
}

static double load(const struct side *side, enum op op, unsigned n_conns, double seconds)
{
    static struct conn conns[CONNS_MAX];
    int epoll = epoll_create1(0);
    uint64_t calls = 0;
    for (unsigned i = 0; i < n_conns; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &conns[i]};
        conns[i] = (struct conn){.fd = conn_open(side)};
        if (conns[i].fd < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, conns[i].fd, &e) < 0)
            die(side->address);
    }
    uint64_t begin = clock_now_ns(), end = begin + (uint64_t)(seconds * 1e9);
    for (unsigned i = 0; i < n_conns; i++)
        conn_begin(&conns[i], side, op);
    while (clock_now_ns() < end) {
        struct epoll_event events[CONNS_MAX];
        int n = epoll_wait(epoll, events, CONNS_MAX, 5000);
        if (n <= 0)
            die("no answer for five seconds");
        for (int i = 0; i < n; i++)
            calls += conn_read(events[i].data.ptr, side, op);
    }
    double rate = (double)calls * 1e9 / (double)(clock_now_ns() - begin);
    for (unsigned i = 0; i < n_conns; i++)
        close(conns[i].fd);
    close(epoll);
    return rate;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
    static struct side sides[SIDES];
    double seconds = argc > 4 ? atof(argv[4]) : 0.5;
    if (argc < 4) {
        fprintf(stderr, "usage: bench_tcpstore EEP_TCPSTORE EEP PYTORCH [SECONDS]\n");
        return 2;
    }
    for (int i = 0; i < SIDES; i++) {
        side_open(&sides[i], argv[i == SIDES - 1 ? 2 : 1 + i], i == 0 || i == 2, i == SIDES - 1 ? DEPTH : 1);
        if (conn_open(&sides[i]) < 0) /* stays: a namespace without connections is emptied after its grace */
            die(sides[i].address);
    }
    printf("| calls a second, client in C | PyTorch's server | eep, the same bytes | ratio | eep, its own protocol | ratio | 16 under way | ratio |\n"
           "|---|---|---|---|---|---|---|---|\n");
    for (unsigned n = 1; n <= CONNS_MAX; n += CONNS_MAX - 1)
        for (enum op op = OP_GET; op < OPS; op++) {
            double rates[SIDES][ROUNDS];
            for (int round = 0; round < ROUNDS; round++)
                for (int s = 0; s < SIDES; s++)
                    rates[s][round] = load(&sides[s], op, n, seconds);
            for (int s = 0; s < SIDES; s++)
                qsort(rates[s], ROUNDS, sizeof *rates[s], by_value);
            double eep = rates[0][ROUNDS / 2], own = rates[1][ROUNDS / 2], torch = rates[2][ROUNDS / 2];
            double many = rates[3][ROUNDS / 2];
            printf("| %s, %u connection%s | %.0f | %.0f | %.2f | %.0f | %.2f | %.0f | %.2f |\n", op_names[op], n, n > 1 ? "s" : "", torch, eep,
                   eep / torch, own, own / torch, many, many / torch);
            fflush(stdout);
        }
    return 0;
}
