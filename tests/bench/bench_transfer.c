/* The transfer rate of one fill, against a plain copy of the same bytes over one socket with the same digest.
 *
 * Two processes on loopback TCP, alternated:
 *   fill    the shipping worker (agent/worker.h) with host memory and the host transport: WORK_FILL of SLOTS expert
 * slots from party 0 into party 1, each slot verified by its digest plain   send() and recv() of 1 MiB at a time,
 * straight into memory of the same size, each piece digested as it arrives, and the sum compared: what somebody would
 * write who only wants to copy Before every run the receiver spoils its memory, so that bytes left from the run before
 * cannot pass.  At the end the sender spoils one word: a fill that does not notice fails the benchmark.
 *
 * The parent only keeps time; it sleeps in read(2) while the two work. */
#include <argp.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/weights.h"
#include "agent/worker.h"
#include "common/address.h"
#include "common/clock.h"
#include "common/digest.h"

#define LAYERS          4u
#define SLOTS_PER_LAYER 12u
#define SLOTS           (LAYERS * SLOTS_PER_LAYER)
#define PARTS           2u
#define SLOT_BYTES      (8u << 20)
#define TOTAL_BYTES     ((size_t)SLOTS * SLOT_BYTES)
#define PIECE           (1u << 20)
#define SOCKET_BUFFER   (4 << 20)
#define RUNS_MAX        99

static const size_t part_bytes[PARTS] = {5u << 20, 3u << 20};
static const char *const part_names[PARTS] = {"w13", "w2"};

/* What the parent says to a child: one byte.  The child answers with one struct reply. */
enum command { CMD_FILL = 1, CMD_PLAIN, CMD_SPOIL, CMD_SPOIL_ONE, CMD_FILL_BROKEN, CMD_END };
struct reply {
    int code;
    char text[256];
};

struct side {
    uint32_t self; /* 0 sends, 1 receives */
    int command_fd, listen_fd, plain_fd;
    struct member members[2];
    struct model *model;
    struct plan *plan;
    struct blob *group_id;
    uint64_t plain_digest; /* of all the bytes in a row */
    struct worker *worker;
    uint8_t *plain; /* TOTAL_BYTES */
    uint64_t next_id;
};

static void die(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("bench_transfer: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(1);
}

/* ---- the bytes ---- */

/* Word `index` of slot `slot`: any function that differs everywhere. */
static void slot_write(uint64_t slot, size_t first_word, uint8_t *out, size_t len)
{
    for (size_t i = 0; i < len / 8; i++) {
        uint64_t word = digest_mix(slot * 0x100000001b3ULL, first_word + i);
        memcpy(out + i * 8, &word, 8);
    }
}

static void manifest_make(struct manifest *m, struct region *regions, struct tensor *tensors)
{
    *m = (struct manifest){.producer = "bench",
                           .layers = LAYERS,
                           .logical = SLOTS_PER_LAYER,
                           .slots = SLOTS_PER_LAYER,
                           .n_regions = LAYERS * PARTS,
                           .n_tensors = LAYERS * PARTS,
                           .regions = regions,
                           .tensors = tensors};
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t part = 0; part < PARTS; part++) {
            uint32_t k = layer * PARTS + part;
            struct region *r = &regions[k];
            *r = (struct region){.kind = REGION_EXPERT,
                                 .layer = layer,
                                 .slots = SLOTS_PER_LAYER,
                                 .stride = part_bytes[part],
                                 .slot_bytes = part_bytes[part],
                                 .bytes = part_bytes[part] * SLOTS_PER_LAYER};
            snprintf(r->name, sizeof(r->name), "layers.%u.experts.%s", layer, part_names[part]);
            snprintf(r->part, sizeof(r->part), "%s", part_names[part]);
            struct tensor *t = &tensors[k];
            *t = (struct tensor){.region = k, .dtype = "U8", .dims = 1, .shape = {part_bytes[part]}};
            snprintf(t->name, sizeof(t->name), "%s", r->name);
        }
}

/* The model with the digests of all experts (expert e of a layer lies in slot e), and the digest of all bytes. */
static struct model *model_make(uint64_t *ret_plain_digest)
{
    struct manifest m;
    struct region regions[LAYERS * PARTS];
    struct tensor tensors[LAYERS * PARTS];
    struct model *model;
    struct err err = {0};
    manifest_make(&m, regions, tensors);
    if (manifest_model(&m, &model, &err) < 0)
        die("%s", err.text);
    uint8_t *slot = malloc(SLOT_BYTES);
    if (!slot)
        die("out of memory");
    *ret_plain_digest = 0;
    for (uint32_t i = 0; i < SLOTS; i++) {
        slot_write(i, 0, slot, SLOT_BYTES); /* parts in a row, words counted on: as weights_slot_digest does */
        model->expert_digest[i] = digest_bytes(slot, SLOT_BYTES, 0);
        *ret_plain_digest += digest_bytes(slot, SLOT_BYTES, (uint64_t)i * (SLOT_BYTES / 8));
    }
    free(slot);
    return model;
}

static struct plan *plan_make(void)
{
    struct plan *plan = plan_new(2, SLOTS, 0);
    if (!plan)
        die("out of memory");
    for (uint32_t i = 0; i < SLOTS; i++) {
        uint32_t e = i % SLOTS_PER_LAYER;
        plan->moves[i] = (struct move){.layer = i / SLOTS_PER_LAYER,
                                       .expert = e,
                                       .src = 0,
                                       .src_slot = e,
                                       .dst = 1,
                                       .dst_slot = SLOTS_PER_LAYER - 1 - e};
    }
    return plan;
}

static uint8_t *part_at(const struct side *s, uint32_t layer, uint32_t slot, uint32_t part)
{
    const struct weights *w = worker_weights(s->worker);
    if (!w)
        die("the worker has no weights");
    return (uint8_t *)w->regions[layer * PARTS + part].base + slot * part_bytes[part];
}

/* ---- the worker's side ---- */

static int worker_do(struct side *s, struct work work, char text[256])
{
    work.id = ++s->next_id;
    work.op = 1;
    work.self = s->self;
    worker_submit(s->worker, &work);
    for (;;) {
        struct worker_result r;
        if (!worker_next_result(s->worker, &r)) {
            struct pollfd p = {.fd = worker_fd(s->worker), .events = POLLIN};
            (void)poll(&p, 1, -1);
            continue;
        }
        bool end = !r.progress && r.id == work.id;
        int code = r.code;
        snprintf(text, 256, "%s", r.text);
        worker_result_done(&r);
        if (end)
            return code;
    }
}

static struct member *parties(const struct side *s)
{
    struct member *copy = malloc(sizeof(s->members));
    if (!copy)
        die("out of memory");
    memcpy(copy, s->members, sizeof(s->members));
    return copy;
}

static int side_fill(struct side *s, char text[256])
{
    struct work work = {
        .kind = WORK_FILL, .n = 2, .parties = parties(s), .plan = plan_ref(s->plan), .model = model_ref(s->model)};
    return worker_do(s, work, text);
}

static void side_worker_open(struct side *s)
{
    struct err err = {0};
    char text[256];
    struct worker_config config = {.memory = memory_open("host", &err),
                                   .transport = transport_host_open(s->listen_fd, &err),
                                   .transfer_timeout_ms = 60000};
    if (!config.memory || !config.transport || worker_start(&config, &s->worker, &err) < 0)
        die("%s", err.text);
    if (worker_do(s, (struct work){.kind = WORK_ALLOCATE, .model = model_ref(s->model)}, text) < 0)
        die("%s", text);
    for (uint32_t i = 0; i < SLOTS && s->self == 0; i++)
        for (uint32_t part = 0, at = 0; part < PARTS; at += (uint32_t)part_bytes[part++])
            slot_write(i, at / 8, part_at(s, i / SLOTS_PER_LAYER, i % SLOTS_PER_LAYER, part), part_bytes[part]);
    struct work group = {.kind = WORK_GROUP, .n = 2, .parties = parties(s), .blob = blob_ref(s->group_id)};
    if (worker_do(s, group, text) < 0)
        die("%s", text);
}

/* ---- the plain side ---- */

static int plain_send(struct side *s, char text[256])
{
    for (size_t sent = 0; sent < TOTAL_BYTES;) {
        size_t len = TOTAL_BYTES - sent < PIECE ? TOTAL_BYTES - sent : PIECE;
        ssize_t got = send(s->plain_fd, s->plain + sent, len, MSG_NOSIGNAL);
        if (got < 0 && errno != EINTR) {
            snprintf(text, 256, "send: %s", strerror(errno));
            return -1;
        }
        sent += got > 0 ? (size_t)got : 0;
    }
    return 0;
}

static int plain_receive(struct side *s, char text[256])
{
    uint64_t digest = 0;
    size_t digested = 0;
    for (size_t received = 0; received < TOTAL_BYTES;) {
        size_t len = TOTAL_BYTES - received < PIECE ? TOTAL_BYTES - received : PIECE;
        ssize_t got = recv(s->plain_fd, s->plain + received, len, 0);
        if (got == 0 || (got < 0 && errno != EINTR)) {
            snprintf(text, 256, "recv: %s", got ? strerror(errno) : "end of file");
            return -1;
        }
        received += got > 0 ? (size_t)got : 0;
        size_t whole = received / 8 * 8; /* pieces of a digest begin at words */
        digest += digest_bytes(s->plain + digested, whole - digested, digested / 8);
        digested = whole;
    }
    if (digest != s->plain_digest) {
        snprintf(text, 256, "the plain copy arrived broken");
        return -1;
    }
    return 0;
}

/* Memory as a program would have it: anonymous, touched before. */
static void side_plain_open(struct side *s)
{
    void *base = mmap(NULL, TOTAL_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        die("cannot map %zu bytes: %s", TOTAL_BYTES, strerror(errno));
    s->plain = base;
    memset(s->plain, 0x55, TOTAL_BYTES);
    for (uint32_t i = 0; i < SLOTS && s->self == 0; i++)
        slot_write(i, 0, s->plain + (size_t)i * SLOT_BYTES, SLOT_BYTES);
}

/* ---- a child ---- */

/* One word of every page. */
static void side_spoil(struct side *s)
{
    for (uint32_t i = 0; i < SLOTS; i++)
        for (uint32_t part = 0; part < PARTS; part++) {
            uint8_t *p = part_at(s, i / SLOTS_PER_LAYER, i % SLOTS_PER_LAYER, part);
            for (size_t at = 0; at < part_bytes[part]; at += 4096)
                p[at] ^= 0x5a;
        }
    for (size_t at = 0; at < TOTAL_BYTES; at += 4096)
        s->plain[at] ^= 0x5a;
}

static struct reply side_command(struct side *s, uint8_t command)
{
    struct reply r = {0};
    switch (command) {
    case CMD_FILL:
        r.code = side_fill(s, r.text);
        break;
    case CMD_FILL_BROKEN:
        r.code = side_fill(s, r.text);
        if (s->self == 1)
            r.code = r.code == ERR_CORRUPT ? 0 : -1;
        break;
    case CMD_PLAIN:
        r.code = s->self == 0 ? plain_send(s, r.text) : plain_receive(s, r.text);
        break;
    case CMD_SPOIL:
        if (s->self == 1)
            side_spoil(s);
        break;
    case CMD_SPOIL_ONE:
        if (s->self == 0)
            part_at(s, LAYERS / 2, SLOTS_PER_LAYER / 2, 1)[part_bytes[1] / 2] ^= 1;
        break;
    default:
        r.code = -1;
    }
    return r;
}

static void side_run(struct side *s)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    side_worker_open(s);
    side_plain_open(s);
    struct reply ready = {0};
    uint8_t command;
    if (write(s->command_fd, &ready, sizeof(ready)) != (ssize_t)sizeof(ready))
        exit(1);
    while (read(s->command_fd, &command, 1) == 1 && command != CMD_END) {
        struct reply r = side_command(s, command);
        if (write(s->command_fd, &r, sizeof(r)) != (ssize_t)sizeof(r))
            exit(1);
    }
    worker_stop(s->worker);
    munmap(s->plain, TOTAL_BYTES);
    model_unref(s->model);
    plan_unref(s->plan);
    blob_unref(s->group_id);
    close(s->plain_fd);
    exit(0);
}

/* ---- the parent ---- */

/* A connected pair over loopback TCP, blocking, with the socket buffers that `buffer` asks for (0: the kernel's). */
static void plain_connect(int fds[2], int buffer)
{
    struct err err = {0};
    char at[ADDRESS_TEXT_MAX];
    int listener;
    if (address_listen("127.0.0.1:0", 0, &listener, at, &err) < 0 || address_connect(at, 5000, &fds[0], &err) < 0)
        die("%s", err.text);
    struct pollfd p = {.fd = listener, .events = POLLIN};
    if (poll(&p, 1, 5000) != 1 || (fds[1] = accept(listener, NULL, NULL)) < 0)
        die("no plain connection");
    close(listener);
    for (int i = 0; i < 2; i++) {
        if (fcntl(fds[i], F_SETFL, fcntl(fds[i], F_GETFL) & ~O_NONBLOCK) < 0)
            die("fcntl: %s", strerror(errno));
        address_tune(fds[i]);
        if (buffer && (setsockopt(fds[i], SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer)) < 0 ||
                       setsockopt(fds[i], SOL_SOCKET, SO_RCVBUF, &buffer, sizeof(buffer)) < 0))
            die("setsockopt: %s", strerror(errno));
    }
}

struct bench {
    int runs, buffer;
    pid_t pid[2];
    int fd[2]; /* command sockets */
};

static void bench_start(struct bench *b)
{
    struct side side = {.group_id = NULL};
    struct err err = {0};
    uint8_t id[32];
    int listeners[2], plain[2], commands[2][2];
    side.model = model_make(&side.plain_digest);
    side.plan = plan_make();
    for (size_t i = 0; i < sizeof(id); i++)
        id[i] = (uint8_t)(i * 7 + 1);
    side.group_id = blob_new(id, sizeof(id));
    for (uint32_t i = 0; i < 2; i++) {
        side.members[i] = (struct member){.incarnation = 1 + i};
        snprintf(side.members[i].id, sizeof(side.members[i].id), "party%u", i);
        if (address_listen("127.0.0.1:0", 0, &listeners[i], side.members[i].data_address, &err) < 0)
            die("%s", err.text);
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, commands[i]) < 0)
            die("socketpair: %s", strerror(errno));
    }
    plain_connect(plain, b->buffer);
    for (uint32_t i = 0; i < 2; i++) {
        b->pid[i] = fork();
        if (b->pid[i] < 0)
            die("fork: %s", strerror(errno));
        if (b->pid[i] == 0) {
            side.self = i;
            side.command_fd = commands[i][1];
            side.listen_fd = listeners[i];
            side.plain_fd = plain[i];
            for (uint32_t k = 0; k < 2; k++)
                close(commands[k][0]);
            close(commands[1 - i][1]);
            close(listeners[1 - i]);
            close(plain[1 - i]);
            side_run(&side);
        }
        b->fd[i] = commands[i][0];
    }
    for (uint32_t i = 0; i < 2; i++) {
        close(commands[i][1]);
        close(listeners[i]);
        close(plain[i]);
    }
    model_unref(side.model);
    plan_unref(side.plan);
    blob_unref(side.group_id);
}

static void bench_replies(struct bench *b, const char *what)
{
    for (int i = 0; i < 2; i++) {
        struct reply r;
        if (recv(b->fd[i], &r, sizeof(r), MSG_WAITALL) != (ssize_t)sizeof(r))
            die("%s: the %s ended", what, i ? "receiver" : "sender");
        if (r.code < 0)
            die("%s: the %s says: %s", what, i ? "receiver" : "sender", r.text[0] ? r.text : "it went unnoticed");
    }
}

/* Seconds from the first order to the last answer. */
static double bench_command(struct bench *b, enum command command, const char *what)
{
    uint8_t byte = (uint8_t)command;
    uint64_t begin = clock_now_ns();
    for (int i = 1; i >= 0; i--)
        if (write(b->fd[i], &byte, 1) != 1)
            die("%s: %s", what, strerror(errno));
    bench_replies(b, what);
    return (double)(clock_now_ns() - begin) / 1e9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double rate(double seconds)
{
    return (double)TOTAL_BYTES / seconds / 1e6;
}

static void bench_row(const char *name, double *seconds, int n)
{
    qsort(seconds, (size_t)n, sizeof(*seconds), by_value);
    printf("| %s | %.0f MB/s | %.0f to %.0f MB/s |\n", name, rate(seconds[n / 2]), rate(seconds[n - 1]),
           rate(seconds[0]));
}

static void bench_end(struct bench *b)
{
    uint8_t end = CMD_END;
    for (int i = 0; i < 2; i++) {
        int status;
        if (write(b->fd[i], &end, 1) != 1 || waitpid(b->pid[i], &status, 0) != b->pid[i] || status != 0)
            die("the %s did not end well", i ? "receiver" : "sender");
        close(b->fd[i]);
    }
}

static const struct argp_option options[] = {
    {"runs", 'n', "N", 0, "runs of each, alternated; the median counts (default 7)", 0},
    {"buffer", 'b', "BYTES", 0, "socket buffers of the plain copy (default 4 MiB; 0: as the kernel tunes them)", 0},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct bench *b = state->input;
    switch (key) {
    case 'n':
        b->runs = atoi(arg);
        if (b->runs < 1 || b->runs > RUNS_MAX)
            argp_error(state, "--runs takes 1 to %d", RUNS_MAX);
        break;
    case 'b':
        b->buffer = atoi(arg);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

int main(int argc, char **argv)
{
    static const struct argp argp = {options, parse, NULL, "Transfer rate of a fill against a plain socket copy.",
                                     NULL,    NULL,  NULL};
    struct bench b = {.runs = 7, .buffer = SOCKET_BUFFER};
    double fill[RUNS_MAX], plain[RUNS_MAX];
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, 0, NULL, &b);
    signal(SIGPIPE, SIG_IGN);
    bench_start(&b);
    bench_replies(&b, "start");
    for (int i = -1; i < b.runs; i++) { /* the first of each warms up */
        bench_command(&b, CMD_SPOIL, "spoil");
        double seconds = bench_command(&b, CMD_FILL, "fill");
        if (i >= 0)
            fill[i] = seconds;
        bench_command(&b, CMD_SPOIL, "spoil");
        seconds = bench_command(&b, CMD_PLAIN, "plain copy");
        if (i >= 0)
            plain[i] = seconds;
    }
    bench_command(&b, CMD_SPOIL_ONE, "spoil");
    bench_command(&b, CMD_FILL_BROKEN, "a fill of spoiled bytes");
    bench_end(&b);

    printf("%u expert slots of %u MiB in %u parts, %zu MiB in one fill, loopback TCP, %d runs of each, alternated\n\n",
           SLOTS, SLOT_BYTES >> 20, PARTS, TOTAL_BYTES >> 20, b.runs);
    printf("| transfer | median | slowest to fastest |\n|---|---|---|\n");
    bench_row("fill by the worker, verified", fill, b.runs);
    bench_row("plain socket copy, same digest", plain, b.runs);
    printf("| ratio of the medians | %.1f %% | expected: at least 90 %% |\n",
           100 * plain[b.runs / 2] / fill[b.runs / 2]);
    return 0;
}
