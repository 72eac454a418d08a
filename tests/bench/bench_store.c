/* The store against Redis: rates and latencies, both servers up in one run, the same load generator for both.
 *
 * The generator is one thread with an epoll set; a connection has `depth` requests under way.  Requests are made before
 * the clock starts, over KEYS keys with values of VALUE_BYTES.  Each case runs ROUNDS times, the servers in turn; the
 * medians are shown.  Without redis-server the eep side alone is measured, and it is said.
 *
 * usage: bench_store [--seconds S] [--million] [--durable] [--only TEXT]   TEXT: in the name of a case */
#include <fcntl.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/stat.h>

#include "common/clock.h"
#include "common/control_methods.h"
#include "tests/harness/caller.h"
#include "tests/harness/daemon.h"

#define KEYS 10000
#define VALUE_BYTES 100
#define ROUNDS 3
#define DEPTH_MAX 16
#define LATENCY_MAX_US 200000

enum op { OP_SET, OP_GET, OP_ADD };
static const char *const op_names[] = {"set", "get", "add"};

struct request {
    uint8_t *bytes;
    size_t len;
};
struct conn {
    int fd;
    unsigned under_way;
    uint64_t sent_ns[DEPTH_MAX], first, last; /* a ring: answers come in order */
    uint8_t in[65536];
    size_t have;
};
struct side {
    bool redis;
    char address[128];
    pid_t pid;
};
struct result {
    double rate, p50_us, p99_us, cpu_us; /* cpu_us: the server's processor time for each request, all its threads */
};

/* ---- requests and answers ---- */

/* Keys of the durable cases are others: a counter stays what it was made. */
static struct request request_eep(enum op op, unsigned key, bool ephemeral)
{
    char name[32], value[VALUE_BYTES];
    struct request r;
    memset(value, 'v', sizeof value);
    snprintf(name, sizeof name, ephemeral ? "%s:%u" : "%s-d:%u", op == OP_ADD ? "counter" : "key", key);
    Pb__KvSetRequest set = PB__KV_SET_REQUEST__INIT;
    Pb__KvGetRequest get = PB__KV_GET_REQUEST__INIT;
    Pb__KvAddRequest add = PB__KV_ADD_REQUEST__INIT;
    if (op == OP_SET) {
        set.key = name;
        set.value.data = (uint8_t *)value;
        set.value.len = sizeof value;
        set.has_ephemeral = set.ephemeral = ephemeral;
        r.bytes = caller_frame(FRAME_CALL, CONTROL_KV_SET, 1, &set.base, &r.len);
    } else if (op == OP_GET) {
        get.key = name;
        r.bytes = caller_frame(FRAME_CALL, CONTROL_KV_GET, 1, &get.base, &r.len);
    } else {
        add.key = name;
        add.amount = 1;
        add.has_ephemeral = add.ephemeral = ephemeral;
        r.bytes = caller_frame(FRAME_CALL, CONTROL_KV_ADD, 1, &add.base, &r.len);
    }
    return r;
}

static struct request request_redis(enum op op, unsigned key)
{
    char name[32], value[VALUE_BYTES + 1], text[512];
    memset(value, 'v', VALUE_BYTES);
    value[VALUE_BYTES] = '\0';
    snprintf(name, sizeof name, op == OP_ADD ? "counter:%u" : "key:%u", key);
    int n = op == OP_SET ? snprintf(text, sizeof text, "*3\r\n$3\r\nSET\r\n$%zu\r\n%s\r\n$%d\r\n%s\r\n", strlen(name), name,
                                    VALUE_BYTES, value)
                         : snprintf(text, sizeof text, "*2\r\n$%d\r\n%s\r\n$%zu\r\n%s\r\n", 3 + (op == OP_ADD),
                                    op == OP_GET ? "GET" : "INCR", strlen(name), name);
    struct request r = {.bytes = malloc((size_t)n), .len = (size_t)n};
    memcpy(r.bytes, text, (size_t)n);
    return r;
}

/* Bytes of the first answer; 0: not all of it is there. */
static size_t answer_bytes(bool redis, const uint8_t *in, size_t have)
{
    if (!redis) {
        struct frame frame;
        size_t size;
        int rc = have >= FRAME_HEADER_BYTES ? frame_parse(in, have, FRAME_LIMIT, &frame, &size, NULL) : 0;
        if (rc < 0 || (rc == 1 && frame.header.kind != FRAME_REPLY)) {
            fprintf(stderr, "an answer that is no reply: kind %d\n", rc < 0 ? rc : frame.header.kind);
            exit(1);
        }
        return rc == 1 ? size : 0;
    }
    const uint8_t *end = memchr(in, '\n', have);
    if (!end)
        return 0;
    size_t line = (size_t)(end - in) + 1;
    if (in[0] == '-') {
        fprintf(stderr, "redis: %.*s\n", (int)line, (const char *)in);
        exit(1);
    }
    long len = in[0] == '$' ? atol((const char *)in + 1) : -1;
    size_t all = in[0] == '$' && len >= 0 ? line + (size_t)len + 2 : line;
    return all <= have ? all : 0;
}

/* ---- the load ---- */

/* Processor time that a process has used, in nanoseconds. */
static uint64_t cpu_ns(pid_t pid)
{
    clockid_t clock;
    struct timespec t = {0};
    if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &t) != 0)
        return 0;
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint32_t seed = 12345;
static uint32_t random_u32(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    return seed ^= seed << 5;
}

static void conn_send(struct conn *c, const struct request *requests, unsigned n_requests, unsigned n)
{
    uint8_t out[DEPTH_MAX * 512];
    size_t len = 0;
    for (unsigned i = 0; i < n; i++) {
        const struct request *r = &requests[random_u32() % n_requests];
        memcpy(out + len, r->bytes, r->len);
        len += r->len;
    }
    uint64_t now = clock_now_ns();
    for (unsigned i = 0; i < n; i++)
        c->sent_ns[c->last++ % DEPTH_MAX] = now;
    c->under_way += n;
    if (send(c->fd, out, len, MSG_NOSIGNAL) != (ssize_t)len) {
        perror("send");
        exit(1);
    }
}

static unsigned *latencies; /* by microsecond */

/* Answers that have come; how many. */
static unsigned conn_receive(struct conn *c, bool redis)
{
    ssize_t n = recv(c->fd, c->in + c->have, sizeof c->in - c->have, 0);
    if (n <= 0) {
        if (n < 0 && errno == EAGAIN)
            return 0;
        perror("recv");
        exit(1);
    }
    c->have += (size_t)n;
    size_t at = 0, size;
    unsigned answers = 0;
    uint64_t now = clock_now_ns();
    while (at < c->have && (size = answer_bytes(redis, c->in + at, c->have - at))) {
        uint64_t us = (now - c->sent_ns[c->first++ % DEPTH_MAX]) / 1000;
        latencies[us < LATENCY_MAX_US ? us : LATENCY_MAX_US]++;
        at += size;
        answers++;
    }
    memmove(c->in, c->in + at, c->have - at);
    c->have -= at;
    c->under_way -= answers;
    return answers;
}

static double percentile(uint64_t total, double share)
{
    uint64_t want = (uint64_t)((double)total * share), seen = 0;
    for (unsigned us = 0; us <= LATENCY_MAX_US; us++)
        if ((seen += latencies[us]) > want)
            return us;
    return LATENCY_MAX_US;
}

static struct result load(const struct side *side, const struct request *requests, unsigned n_requests, unsigned n_conns,
                          unsigned depth, double seconds, uint64_t count)
{
    struct conn *conns = calloc(n_conns, sizeof *conns);
    int epoll = epoll_create1(0);
    memset(latencies, 0, (LATENCY_MAX_US + 1) * sizeof *latencies);
    for (unsigned i = 0; i < n_conns; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &conns[i]};
        conns[i].fd = side->redis ? -1 : caller_connect(side->address);
        if (side->redis && address_connect(side->address, 5000, &conns[i].fd, NULL) < 0)
            conns[i].fd = -1;
        if (conns[i].fd < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, conns[i].fd, &e) < 0) {
            fprintf(stderr, "cannot connect to %s\n", side->address);
            exit(1);
        }
    }
    uint64_t begin = clock_now_ns(), end = begin + (uint64_t)(seconds * 1e9), answers = 0, now = begin;
    uint64_t cpu = cpu_ns(side->pid);
    for (unsigned i = 0; i < n_conns; i++)
        conn_send(&conns[i], requests, n_requests, depth);
    while (count ? answers < count : now < end) {
        struct epoll_event events[64];
        int n = epoll_wait(epoll, events, 64, 5000);
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;
            unsigned got = conn_receive(c, side->redis);
            answers += got;
            if (c->under_way == 0)
                conn_send(c, requests, n_requests, depth);
        }
        now = clock_now_ns();
        if (n <= 0) {
            fprintf(stderr, "no answer for five seconds\n");
            exit(1);
        }
    }
    cpu = cpu_ns(side->pid) - cpu;
    for (unsigned i = 0; i < n_conns; i++)
        close(conns[i].fd);
    close(epoll);
    free(conns);
    return (struct result){(double)answers * 1e9 / (double)(now - begin), percentile(answers, 0.5),
                           percentile(answers, 0.99), (double)cpu / 1e3 / (double)answers};
}

/* ---- redis ---- */

struct redis {
    pid_t pid;
    struct side side;
};

static bool redis_start(struct redis *r, const char *dir, int port, bool durable)
{
    char number[16], folder[96];
    snprintf(number, sizeof number, "%d", port);
    snprintf(folder, sizeof folder, "%s/redis%d", dir, durable);
    mkdir(folder, 0700);
    r->pid = fork();
    if (r->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int null = open("/dev/null", O_WRONLY);
        dup2(null, 1);
        dup2(null, 2);
        execlp("redis-server", "redis-server", "--port", number, "--bind", "127.0.0.1", "--save", "", "--dir", folder,
               "--appendonly", durable ? "yes" : "no", "--appendfsync", "always", "--daemonize", "no", NULL);
        _exit(127);
    }
    r->side.redis = true;
    r->side.pid = r->pid;
    snprintf(r->side.address, sizeof r->side.address, "127.0.0.1:%d", port);
    for (int i = 0; i < 300; i++) {
        int fd, status;
        if (waitpid(r->pid, &status, WNOHANG) == r->pid)
            break;
        if (address_connect(r->side.address, 100, &fd, NULL) == 0) {
            close(fd);
            return true;
        }
        usleep(10000);
    }
    r->pid = 0;
    return false;
}

static void redis_stop(struct redis *r)
{
    if (r->pid > 0) {
        kill(r->pid, SIGKILL);
        waitpid(r->pid, NULL, 0);
    }
}

/* ---- cases ---- */

static int by_rate(const void *a, const void *b)
{
    double x = ((const struct result *)a)->rate, y = ((const struct result *)b)->rate;
    return x < y ? -1 : x > y;
}

static struct request *requests_make(bool redis, enum op op, unsigned n, bool ephemeral)
{
    struct request *requests = calloc(n, sizeof *requests);
    for (unsigned i = 0; i < n; i++)
        requests[i] = redis ? request_redis(op, i) : request_eep(op, i, ephemeral);
    return requests;
}

static void requests_free(struct request *requests, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        free(requests[i].bytes);
    free(requests);
}

static const char *only = "";

static void compare(const char *what, const struct side *eep, const struct side *redis, enum op op, bool durable,
                    unsigned conns, unsigned depth, double seconds, unsigned n_keys)
{
    struct result results[2][ROUNDS];
    char name[80];
    snprintf(name, sizeof name, "%s %s, %u conn, depth %u", what, op_names[op], conns, depth);
    if (!strstr(name, only))
        return;
    struct request *ours = requests_make(false, op, n_keys, !durable);
    struct request *theirs = redis ? requests_make(true, op, n_keys, false) : NULL;
    for (int round = 0; round < ROUNDS; round++) {
        results[0][round] = load(eep, ours, n_keys, conns, depth, seconds, 0);
        if (redis)
            results[1][round] = load(redis, theirs, n_keys, conns, depth, seconds, 0);
    }
    qsort(results[0], ROUNDS, sizeof results[0][0], by_rate);
    const struct result *a = &results[0][ROUNDS / 2], *b = NULL;
    if (redis) {
        qsort(results[1], ROUNDS, sizeof results[1][0], by_rate);
        b = &results[1][ROUNDS / 2];
    }
    printf("| %s | %.0f | %.0f | %.0f | %.2f |", name, a->rate, a->p50_us, a->p99_us, a->cpu_us);
    if (b)
        printf(" %.0f | %.0f | %.0f | %.2f | %.2f |\n", b->rate, b->p50_us, b->p99_us, b->cpu_us, a->rate / b->rate);
    else
        printf(" - | - | - | - | - |\n");
    fflush(stdout);
    requests_free(ours, n_keys);
    if (theirs)
        requests_free(theirs, n_keys);
}

/* So that reads find the keys (nearly all of them). */
static void fill(const struct side *side, unsigned n_keys)
{
    struct request *all = requests_make(side->redis, OP_SET, n_keys, true);
    load(side, all, n_keys, 8, DEPTH_MAX, 0, n_keys * 12);
    requests_free(all, n_keys);
}

int main(int argc, char **argv)
{
    double seconds = 1.0;
    bool million = false, only_durable = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seconds") == 0 && i + 1 < argc)
            seconds = atof(argv[++i]);
        else if (strcmp(argv[i], "--million") == 0)
            million = true;
        else if (strcmp(argv[i], "--durable") == 0)
            only_durable = true;
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc)
            only = argv[++i];
        else {
            fprintf(stderr, "usage: bench_store [--seconds S] [--million] [--durable] [--only TEXT]\n");
            return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    latencies = calloc(LATENCY_MAX_US + 1, sizeof *latencies);
    struct daemon_process d;
    daemon_process_init(&d);
    d.extra[0] = "--store-mib";
    d.extra[1] = "2048";
    struct redis memory = {0}, durable = {0};
    int port = 20000 + (int)(getpid() % 20000);
    bool have = redis_start(&memory, d.dir, port, false) && redis_start(&durable, d.dir, port + 1, true);
    if (!daemon_process_start(&d)) {
        fprintf(stderr, "eep-coordinator does not start\n");
        return 1;
    }
    struct side eep = {.pid = d.pid};
    snprintf(eep.address, sizeof eep.address, "%s", d.address);
    printf(have ? "Values of %d bytes, %d keys; requests a second, microseconds (processor: of the server, for each "
                  "request), medians of %d rounds.\n\n"
                : "redis-server is not here (apt-get install redis-server): eep alone.  Values of %d bytes, %d keys, medians "
                  "of %d rounds.\n\n", VALUE_BYTES, KEYS, ROUNDS);
    printf("| case | eep /s | p50 | p99 | processor | redis /s | p50 | p99 | processor | ratio |\n"
           "|---|---|---|---|---|---|---|---|---|---|\n");
    fill(&eep, KEYS);
    if (have)
        fill(&memory.side, KEYS);
    static const unsigned shapes[][2] = {{1, 1}, {50, 1}, {1, 16}, {50, 16}};
    for (size_t s = 0; s < 4 && !only_durable; s++)
        for (int op = OP_SET; op <= OP_ADD; op++)
            compare("memory", &eep, have ? &memory.side : NULL, (enum op)op, false, shapes[s][0], shapes[s][1], seconds, KEYS);
    for (size_t s = 0; s < 2; s++)
        for (int op = OP_SET; op <= OP_ADD; op += 2)
            compare("durable", &eep, have ? &durable.side : NULL, (enum op)op, true, shapes[s][0], 1, seconds, KEYS);
    if (million)
        compare("durable, 1,000,000 keys,", &eep, have ? &durable.side : NULL, OP_SET, true, 50, 1, 4 * seconds, 1000000);
    redis_stop(&memory);
    redis_stop(&durable);
    daemon_process_done(&d);
    free(latencies);
    return 0;
}
