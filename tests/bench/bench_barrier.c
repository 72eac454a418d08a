/* Barriers and connections of the store: how long the release of a barrier takes after its last arrival, a storm of
 * joins, and what a connection and a key cost in memory.
 *
 * Members are connections of their own, in PROCESSES processes; one message each way.  Times are of CLOCK_MONOTONIC, which
 * all processes share: the release of a round is the last "released" of any member, less the moment at which the last
 * arrival was sent. */
#include <fcntl.h>
#include <stdio.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "common/clock.h"
#include "common/control_methods.h"
#include "tests/harness/caller.h"
#include "tests/harness/daemon.h"

#define PROCESSES 4
#define ROUNDS 15

/* In shared memory. */
struct shared {
    _Atomic unsigned ready, arrived, go, done;
    _Atomic uint64_t last_ns; /* the last release of this round */
};

static uint8_t *arrival(unsigned round, unsigned member, unsigned size, size_t *ret_len)
{
    char name[32], text[16];
    Pb__BarrierRequest request = PB__BARRIER_REQUEST__INIT;
    snprintf(name, sizeof name, "bench/%u/%u", size, round);
    snprintf(text, sizeof text, "%u", member);
    request.name = name;
    request.size = size;
    request.member = text;
    request.deadline_ms = 60000;
    return caller_frame(FRAME_CALL, CONTROL_BARRIER_ARRIVE, round + 1, &request.base, ret_len);
}

static void die(const char *what)
{
    fprintf(stderr, "bench_barrier: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void arrive(int fd, unsigned round, unsigned member, unsigned size)
{
    size_t len;
    uint8_t *frame = arrival(round, member, size, &len);
    if (send(fd, frame, len, MSG_NOSIGNAL) != (ssize_t)len)
        die("send");
    free(frame);
}

/* Reads one small reply from each of n connections. */
static void released_all(int epoll, const int *fds, unsigned n)
{
    (void)fds;
    for (unsigned have = 0; have < n;) {
        struct epoll_event events[256];
        int got = epoll_wait(epoll, events, 256, 60000);
        if (got <= 0)
            die("no release");
        for (int i = 0; i < got; i++) {
            uint8_t bytes[512];
            ssize_t len = recv(events[i].data.fd, bytes, sizeof bytes, 0);
            struct frame frame;
            size_t size;
            if (len < FRAME_HEADER_BYTES || frame_parse(bytes, (size_t)len, FRAME_LIMIT, &frame, &size, NULL) != 1 ||
                frame.header.kind != FRAME_REPLY)
                die("an answer that is no release");
            have++;
        }
    }
}

static void latest(_Atomic uint64_t *last, uint64_t now)
{
    uint64_t before = *last;
    while (now > before && !atomic_compare_exchange_weak(last, &before, now))
        ;
}

/* A process with the members first .. first + n - 1; the very last member of all waits for `go`. */
static void member_process(const char *address, struct shared *s, unsigned first, unsigned n, unsigned size,
                           unsigned rounds)
{
    int *fds = calloc(n, sizeof *fds), epoll = epoll_create1(0);
    for (unsigned i = 0; i < n; i++) {
        fds[i] = caller_connect(address);
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fds[i]};
        if (fds[i] < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &e) < 0)
            die("connect");
    }
    bool has_last = first + n == size;
    for (unsigned round = 0; round < rounds; round++) {
        for (unsigned i = 0; i < n - has_last; i++)
            arrive(fds[i], round, first + i, size);
        s->arrived++;
        if (has_last) {
            while (s->go <= round)
                usleep(200);
            s->last_ns = 0;
            arrive(fds[n - 1], round, size - 1, size);
        }
        released_all(epoll, fds, n);
        latest(&s->last_ns, clock_now_ns());
        s->done++;
    }
    exit(0);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static struct shared *shared_new(void)
{
    struct shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (s == MAP_FAILED)
        die("mmap");
    return s;
}

static void processes_start(const char *address, struct shared *s, unsigned size, unsigned rounds, pid_t *pids)
{
    fflush(stdout); /* or every child says it again */
    for (unsigned p = 0; p < PROCESSES; p++) {
        unsigned first = size * p / PROCESSES, next = size * (p + 1) / PROCESSES;
        pids[p] = fork();
        if (pids[p] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            member_process(address, s, first, next - first, size, rounds);
        }
    }
}

static void processes_end(const pid_t *pids)
{
    for (unsigned p = 0; p < PROCESSES; p++) {
        int status;
        if (waitpid(pids[p], &status, 0) != pids[p] || status != 0)
            die("a process of members failed");
    }
}

static void bench_release(const char *address, unsigned size)
{
    struct shared *s = shared_new();
    pid_t pids[PROCESSES];
    double ms[ROUNDS];
    processes_start(address, s, size, ROUNDS, pids);
    for (unsigned round = 0; round < ROUNDS; round++) {
        while (s->arrived < PROCESSES * (round + 1))
            usleep(500);
        usleep(30000); /* the arrivals are there */
        uint64_t begin = clock_now_ns();
        s->go = round + 1;
        while (s->done < PROCESSES * (round + 1))
            usleep(500);
        ms[round] = (double)(s->last_ns - begin) / 1e6;
    }
    processes_end(pids);
    munmap(s, sizeof *s);
    qsort(ms, ROUNDS, sizeof *ms, by_value);
    printf("| barrier of %u members in %d processes, last arrival to last release: median, longest of %d | %.2f, %.2f ms |\n", size,
           PROCESSES, ROUNDS, ms[ROUNDS / 2], ms[ROUNDS - 1]);
    fflush(stdout);
}

static void bench_storm(const char *address, unsigned size)
{
    struct shared *s = shared_new();
    pid_t pids[PROCESSES];
    s->go = 1;
    uint64_t begin = clock_now_ns();
    processes_start(address, s, size, 1, pids);
    processes_end(pids);
    printf("| %u connections with handshake, then one barrier of all: from the first connect to the last release | %.0f ms |\n",
           size, (double)(clock_now_ns() - begin) / 1e6);
    munmap(s, sizeof *s);
    fflush(stdout);
}

/* ---- memory ---- */

static double rss_bytes(pid_t pid)
{
    char path[64];
    long pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)pid);
    FILE *f = fopen(path, "r");
    if (!f || fscanf(f, "%*d %ld", &pages) != 1)
        die("statm");
    fclose(f);
    return (double)pages * (double)sysconf(_SC_PAGESIZE);
}

static void bench_memory(const struct daemon_process *d)
{
    enum { CONNS = 4000, KEYS = 1000000, VALUE = 100 };
    static int fds[CONNS];
    double before = rss_bytes(d->pid);
    for (int i = 0; i < CONNS; i++)
        if ((fds[i] = caller_connect(d->address)) < 0)
            die("connect");
    printf("| memory of an idle connection (resident, of %d) | %.0f bytes |\n", CONNS, (rss_bytes(d->pid) - before) / CONNS);
    for (int i = 0; i < CONNS; i++)
        close(fds[i]);
    before = rss_bytes(d->pid);
    struct rpc_client *client;
    struct rpc_identity self = {.role = RPC_ROLE_OPERATOR};
    if (rpc_client_connect(d->address, &self, &pb__control__descriptor, 5000, &client, NULL) < 0)
        die("connect");
    static Pb__KvSetRequest sets[1000], *pointers[1000];
    static char names[1000][24], value[VALUE];
    for (int i = 0; i < KEYS; i += 1000) {
        Pb__KvMultiSetRequest all = PB__KV_MULTI_SET_REQUEST__INIT;
        for (int k = 0; k < 1000; k++) {
            pb__kv_set_request__init(&sets[k]);
            snprintf(names[k], sizeof names[k], "memory:%07d", i + k);
            sets[k].key = names[k];
            sets[k].value.data = (uint8_t *)value;
            sets[k].value.len = VALUE;
            sets[k].has_ephemeral = sets[k].ephemeral = 1;
            pointers[k] = &sets[k];
        }
        all.n_sets = 1000;
        all.sets = pointers;
        ProtobufCMessage *reply;
        if (rpc_client_call(client, CONTROL_KV_MULTI_SET, &all.base, 20000, &reply, NULL) < 0)
            die("multi set");
        rpc_unpack_free(reply);
    }
    printf("| memory of a key of 14 bytes with a value of %d (resident, of %d) | %.0f bytes |\n", VALUE, KEYS,
           (rss_bytes(d->pid) - before) / KEYS);
    rpc_client_free(client);
}

int main(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    struct daemon_process d;
    daemon_process_init(&d);
    d.extra[0] = "--store-mib";
    d.extra[1] = "1024";
    if (!daemon_process_start(&d)) {
        fprintf(stderr, "eep-coordinator does not start\n");
        return 1;
    }
    printf("| what | measured |\n|---|---|\n");
    bench_memory(&d);
    bench_release(d.address, 64);
    bench_release(d.address, 1024);
    bench_storm(d.address, 4096);
    daemon_process_done(&d);
    return 0;
}
