/* Transports between processes: a contract suite over a table of transports, each with the memory that it moves.
 *
 * The parties are forked before any of them opens its memory, because a GPU's context does not survive a fork; each
 * plays its part of the test and reports through shared memory.  What arrived is compared by digests with a model that
 * every party keeps in host memory.  Without a GPU, or the CUDA driver of tests/fakecuda in its place, only the host
 * transport is tested, and the suite says so.  With several GPUs, party i uses GPU i modulo their number. */
#include <check.h>
#include <dirent.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/gpu.h"
#include "agent/transport_gpu.h"
#include "agent/transport_nccl.h"
#include "common/address.h"
#include "common/clock.h"
#include "common/digest.h"
#include "tests/harness/suite.h"
#include "tests/unit/transport_standin.h"

#define PARTIES_MAX 8
#define ID_MAX      256
#define MS          1000000ull

/* ---- backends ---- */

struct backend {
    const char *name;
    bool on_gpu;
    struct transport *(*open)(const char *device, const char *address, struct err *err);
};

static struct transport *host_open(const char *device, const char *address, struct err *err)
{
    char actual[ADDRESS_TEXT_MAX];
    int fd;
    (void)device;
    return address_listen(address, 0600, &fd, actual, err) < 0 ? NULL : transport_host_open(fd, err);
}

static struct transport *cuda_peer_open(const char *device, const char *address, struct err *err)
{
    (void)address;
    return transport_cuda_peer_open(device, err);
}

/* Falls back to single copies where the driver has no batches. */
static struct transport *batched_open(const char *device, const char *address, struct err *err)
{
    (void)address;
    struct transport *t = transport_cuda_peer_open(device, err);
    if (t)
        (void)transport_cuda_peer_tune(
            t, &(struct peer_tuning){
                   .streams = 2, .batched = true, .in_flight = 3, .batch_bytes = 40000, .chunk_bytes = 12345 * 8});
    return t;
}

static int n_backends, n_gpus;
static bool gpus_shared;   /* by the parties of the present test */
static uint32_t keep_ms;   /* communicators */
static bool gpus_are_fake; /* tests/fakecuda */

static struct transport *nccl_open(const char *device, const char *address, struct err *err)
{
    char actual[ADDRESS_TEXT_MAX];
    struct transport_nccl_options options = {.gpu = device, .shared_gpu = gpus_shared, .keep_ms = keep_ms};
    return address_listen(address, 0600, &options.listen_fd, actual, err) < 0 ? NULL
                                                                              : transport_nccl_open(&options, err);
}

/* In a world of two hosts, on which the parties sit by turns; one transport a process. */
static uint32_t party_self;
static struct transport *standin_open(const char *device, const char *address, struct err *err)
{
    static struct standins standins;
    char actual[ADDRESS_TEXT_MAX];
    int fd;
    (void)device;
    return address_listen(address, 0600, &fd, actual, err) < 0 ? NULL
                                                               : standins_open(&standins, party_self % 2, fd, err);
}

static struct transport *auto_open(const char *device, const char *address, struct err *err)
{
    char actual[ADDRESS_TEXT_MAX];
    int fd;
    return address_listen(address, 0600, &fd, actual, err) < 0 ? NULL : transport_gpu_auto_open(device, fd, err);
}

/* The first ones without a GPU, then cuda_peer, then nccl; the last two are only tested for what is special in them. */
static const struct backend backends[] = {
    {"host", false, host_open}, {"auto over sockets", false, standin_open},   {"cuda_peer", true, cuda_peer_open},
    {"nccl", true, nccl_open},  {"cuda_peer in batches", true, batched_open}, {"auto", true, auto_open},
};
enum { WITHOUT_GPU = 2, WITHOUT_NCCL = 3, WITH_NCCL = 4, NCCL = 3, BATCHED = 4, AUTO = 5 };

/* How many GPUs a child sees: the driver must not be used before the forks. */
static int gpus_count(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct gpu gpus[PARTIES_MAX];
        struct err err = {0};
        size_t n = 0;
        if (gpu_list(gpus, PARTIES_MAX, &n, &err) < 0)
            printf("transports between GPUs are not tested: %s\n", err.text);
        fflush(NULL);
        _exit((int)n + (n > 0 && strcmp(gpus[0].name, "Fake GPU") == 0 ? 100 : 0));
    }
    int status = 0, n = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    gpus_are_fake = n >= 100;
    return n % 100;
}

/* Whether a child can open the NCCL transport; beside the driver of tests/fakecuda that is the one of tests/fakenccl.
 */
static bool nccl_there(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct err err = {0};
        struct transport *t = transport_nccl_open(&(struct transport_nccl_options){.listen_fd = -1, .gpu = ""}, &err);
        printf("%s%s\n", t ? "" : "NCCL is not tested: ", t ? transport_nccl_version(t) : err.text);
        fflush(NULL);
        _exit(t != NULL);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

/* ---- parties ---- */

struct party;
struct stage {
    pthread_barrier_t barrier;
    size_t id_len;
    uint8_t id[ID_MAX];
    char failure[PARTIES_MAX][512];
};
struct party {
    const struct backend *backend;
    struct stage *stage;
    uint32_t self, n;
    struct member members[PARTIES_MAX];
    struct memory_backend *memory;
    struct transport *transport;
    struct transport_group *group;
    struct memory_region region;
    struct blob *id;
    int cancel_fd;
    uint64_t timeout_ms, progress, progress_calls;
    struct err err;
};

/* As ck_assert, in a party. */
#define must(p, condition, ...)                                                                                        \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            party_fail(p, __LINE__, #condition, __VA_ARGS__);                                                          \
    } while (0)
__attribute__((format(printf, 4, 5))) static void party_fail(struct party *p, int line, const char *what,
                                                             const char *fmt, ...)
{
    char text[300];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    snprintf(p->stage->failure[p->self], sizeof p->stage->failure[0], "line %d: %s: %s", line, what, text);
    kill(0, SIGUSR1); /* the others may wait at a barrier for ever */
    _exit(1);
}

static void together(struct party *p)
{
    pthread_barrier_wait(&p->stage->barrier);
}

static void party_progress(void *user, uint64_t bytes)
{
    struct party *p = user;
    p->progress = bytes;
    p->progress_calls++;
}

static struct transport_call party_call(struct party *p)
{
    return (struct transport_call){.deadline_ns = clock_now_ns() + p->timeout_ms * MS,
                                   .cancel_fd = p->cancel_fd,
                                   .progress = party_progress,
                                   .user = p};
}

static int group_create(struct party *p)
{
    struct transport_call call = party_call(p);
    return p->transport->group_create(p->transport, p->id, p->members, p->n, p->self, &call, &p->group, &p->err);
}

static void id_share(struct party *p)
{
    if (p->self == 0) {
        struct blob *id;
        must(p, p->transport->group_id(p->transport, &id, &p->err) == 0, "%s", p->err.text);
        must(p, id->len <= ID_MAX, "%zu", id->len);
        memcpy(p->stage->id, id->data, id->len);
        p->stage->id_len = id->len;
        blob_unref(id);
    }
    together(p);
    blob_unref(p->id);
    p->id = blob_new(p->stage->id, p->stage->id_len);
    together(p);
}

static void regroup(struct party *p)
{
    p->transport->destroy(p->group);
    p->group = NULL;
    id_share(p);
    must(p, group_create(p) == 0, "%s", p->err.text);
}

static int move(struct party *p, const struct transfer *items, size_t n, uint64_t *ret_bytes)
{
    struct transport_call call = party_call(p);
    return p->transport->move(p->group, items, n, &call, ret_bytes, &p->err);
}

static void party_open(struct party *p)
{
    char device[24], memory[32] = "host";
    snprintf(device, sizeof device, "%u", n_gpus ? p->self % (unsigned)n_gpus : 0);
    if (p->backend->on_gpu)
        snprintf(memory, sizeof memory, "cuda:%s", device);
    p->memory = memory_open(memory, &p->err);
    must(p, p->memory != NULL, "%s", p->err.text);
    party_self = p->self;
    p->transport = p->backend->open(device, p->members[p->self].data_address, &p->err);
    must(p, p->transport != NULL, "%s", p->err.text);
    p->cancel_fd = eventfd(0, EFD_CLOEXEC);
    p->timeout_ms = 20000;
}

static void party_close(struct party *p)
{
    p->transport->destroy(p->group);
    if (p->region.base)
        p->memory->release(p->memory, &p->region);
    p->transport->close(p->transport);
    p->memory->close(p->memory);
    blob_unref(p->id);
    close(p->cancel_fd);
}

/* Plays `play` in n processes; they have their memory, their transport and an id, but no group. */
static void troupe(int backend, uint32_t n, void (*play)(struct party *))
{
    struct stage *stage = mmap(NULL, sizeof *stage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(stage, MAP_FAILED);
    pthread_barrierattr_t attributes;
    pthread_barrierattr_init(&attributes);
    pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&stage->barrier, &attributes, n);
    struct party p = {.backend = &backends[backend], .stage = stage, .n = n};
    gpus_shared = (int)n > n_gpus;
    for (uint32_t i = 0; i < n; i++) {
        snprintf(p.members[i].id, sizeof p.members[i].id, "gpu%u", i);
        snprintf(p.members[i].data_address, sizeof p.members[i].data_address, "unix:/tmp/eep-test-transport-%d-%u",
                 (int)getpid(), i);
        p.members[i].incarnation = 1000 + i;
    }
    pid_t children[PARTIES_MAX];
    signal(SIGUSR1, SIG_IGN);
    for (p.self = 0; p.self < n; p.self++) {
        children[p.self] = fork();
        ck_assert_int_ge(children[p.self], 0);
        if (children[p.self] > 0)
            continue;
        signal(SIGUSR1, SIG_DFL);
        party_open(&p);
        id_share(&p);
        play(&p);
        party_close(&p);
        _exit(0);
    }
    int bad = 0;
    for (uint32_t i = 0; i < n; i++) {
        int status = 0;
        ck_assert_int_eq(waitpid(children[i], &status, 0), children[i]);
        bad |= status != 0 && !(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        unlink(p.members[i].data_address + strlen(ADDRESS_UNIX));
    }
    for (uint32_t i = 0; i < n; i++)
        ck_assert_msg(!stage->failure[i][0], "%s, party %u: %s", p.backend->name, i, stage->failure[i]);
    ck_assert_msg(!bad, "%s: a party ended badly", p.backend->name);
    munmap(stage, sizeof *stage);
}

/* ---- bytes ---- */

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint32_t below(uint64_t *state, uint32_t n)
{
    return (uint32_t)(next(state) >> 11) % n;
}

static void fill(uint8_t *data, size_t bytes, uint64_t seed)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15ull | 1;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = next(&state);
        memcpy(data + i, &word, bytes - i < 8 ? bytes - i : 8);
    }
}

static void region_alloc(struct party *p, size_t bytes)
{
    must(p, p->memory->alloc(p->memory, "test", bytes, &p->region, &p->err) == 0, "%s", p->err.text);
}

static bool region_holds(struct party *p, const uint8_t *data, size_t offset, size_t len)
{
    uint64_t digest = 0;
    must(p, p->memory->digest(p->memory, &p->region, offset, len, 0, &digest, &p->err) == 0, "%s", p->err.text);
    return digest == digest_bytes(data + offset, len, 0);
}

/* The bytes are there for others as well when this returns. */
static void region_write(struct party *p, const uint8_t *data, size_t bytes)
{
    must(p, p->memory->write(p->memory, &p->region, 0, data, bytes, &p->err) == 0, "%s", p->err.text);
    must(p, region_holds(p, data, 0, bytes), "what was written");
}

/* ---- moves ---- */

#define SLOTS 12

/* A random round: read from the lower half of slots, written to the upper half; odd sizes, two extents, local copies.
 */
static size_t round_make(struct party *p, uint64_t *state, size_t slot_bytes, struct transfer *items, uint32_t *from,
                         uint32_t *to)
{
    size_t n = 0;
    for (uint32_t dst = 0; dst < p->n; dst++)
        for (uint32_t slot = SLOTS / 2; slot < SLOTS; slot++) {
            if (below(state, 4) == 0)
                continue;
            struct transfer *t = &items[n];
            size_t cut = below(state, (uint32_t)slot_bytes);
            *t = (struct transfer){.src = below(state, p->n), .dst = dst, .n = 2};
            from[n] = below(state, SLOTS / 2);
            to[n] = slot;
            struct extent a[2] = {{&p->region, from[n] * slot_bytes, cut},
                                  {&p->region, from[n] * slot_bytes + cut, slot_bytes - cut}};
            struct extent b[2] = {{&p->region, slot * slot_bytes, cut},
                                  {&p->region, slot * slot_bytes + cut, slot_bytes - cut}};
            if (t->src == p->self)
                memcpy(t->from, a, sizeof a);
            if (t->dst == p->self)
                memcpy(t->to, b, sizeof b);
            n++;
        }
    return n;
}

static void play_rounds(struct party *p, size_t slot_bytes, int rounds)
{
    static struct transfer items[PARTIES_MAX * SLOTS], own[PARTIES_MAX * SLOTS];
    static uint32_t from[PARTIES_MAX * SLOTS], to[PARTIES_MAX * SLOTS];
    const size_t bytes = SLOTS * slot_bytes;
    uint64_t state = 4711 + p->n; /* the same in every party */
    uint8_t *model[PARTIES_MAX];
    for (uint32_t i = 0; i < p->n; i++) {
        model[i] = malloc(bytes);
        fill(model[i], bytes, i + 1);
    }
    region_alloc(p, bytes);
    region_write(p, model[p->self], bytes);
    must(p, group_create(p) == 0, "%s", p->err.text);
    for (int round = 0; round < rounds; round++) {
        size_t n = round_make(p, &state, slot_bytes, items, from, to), n_own = 0;
        uint64_t expected = 0, received = 77;
        for (size_t k = 0; k < n; k++) { /* each knows only its own items */
            const struct transfer *t = &items[k];
            memcpy(model[t->dst] + to[k] * slot_bytes, model[t->src] + from[k] * slot_bytes, slot_bytes);
            expected += t->dst == p->self && t->src != p->self ? slot_bytes : 0;
            if (t->dst == p->self || t->src == p->self)
                own[n_own++] = *t;
        }
        poll(NULL, 0, (int)(p->self * 7 % 11));
        must(p, move(p, own, n_own, &received) == 0, "%s", p->err.text);
        must(p, received == expected, "%llu, not %llu", (unsigned long long)received, (unsigned long long)expected);
        for (uint32_t slot = 0; slot < SLOTS; slot++)
            must(p, region_holds(p, model[p->self], slot * slot_bytes, slot_bytes), "round %d slot %u", round, slot);
    }
    for (uint32_t i = 0; i < p->n; i++)
        free(model[i]);
    together(p); /* regions outlive the group */
}

static void play_small_rounds(struct party *p)
{
    play_rounds(p, 10007, 8);
}

static void play_large_rounds(struct party *p)
{
    play_rounds(p, (3u << 20) + 24, 2);
}

START_TEST(moves_arrive)
{
    for (uint32_t n = 1; n <= 5; n += 2)
        troupe(_i, n, play_small_rounds);
    troupe(_i, 3, play_large_rounds);
}
END_TEST

START_TEST(moves_in_batches_arrive)
{
    troupe(BATCHED, 3, play_small_rounds);
    troupe(BATCHED, 3, play_large_rounds);
}
END_TEST

/* One item from party 0 to 1, in one piece. */
static struct transfer one_item(struct party *p, size_t bytes)
{
    struct transfer t = {.src = 0, .dst = 1, .n = 1};
    t.from[0] = t.to[0] = (struct extent){&p->region, 0, bytes};
    return t;
}

#define MANY ((size_t)192 << 20)

static void play_progress(struct party *p)
{
    uint64_t received;
    region_alloc(p, MANY);
    must(p, group_create(p) == 0, "%s", p->err.text);
    struct transfer t = one_item(p, MANY);
    must(p, move(p, &t, 1, &received) == 0, "%s", p->err.text);
    must(p, received == (p->self == 1 ? MANY : 0), "%llu", (unsigned long long)received);
    must(p, p->progress_calls >= 2, "%llu", (unsigned long long)p->progress_calls); /* a sender lives, too */
    must(p, p->self == 0 ? p->progress == 0 : p->progress > MANY / 2, "%llu", (unsigned long long)p->progress);
    together(p);
}

START_TEST(progress_is_reported_on_both_sides)
{
    troupe(_i, 2, play_progress);
}
END_TEST

static void play_plans_differ(struct party *p)
{
    uint64_t received;
    region_alloc(p, 5000);
    must(p, group_create(p) == 0, "%s", p->err.text);
    struct transfer t = one_item(p, p->self == 0 ? 1000 : 999);
    p->timeout_ms = 3000;
    int rc = move(p, &t, 1, &received);
    if (p->self == 1) {
        must(p, rc == ERR_PROTOCOL, "%d %s", rc, p->err.text);
        must(p, strstr(p->err.text, "gpu0 sends 1000 bytes where the plan has 999"), "%s", p->err.text);
        must(p, move(p, &t, 1, &received) == ERR_INVALID, "again");
        must(p, strstr(p->err.text, "failed before"), "%s", p->err.text);
        p->transport->destroy(p->group);
        p->group = NULL;
    } else if (p->backend->on_gpu) { /* a copy is over only when it is taken; bytes in a socket are gone */
        must(p, rc == ERR_UNREACHABLE && strstr(p->err.text, "gpu1"), "%d %s", rc, p->err.text);
    }
    p->timeout_ms = 20000;
    regroup(p); /* the next group works */
    t = one_item(p, 1000);
    must(p, move(p, &t, 1, &received) == 0, "%s", p->err.text);
    together(p);
}

START_TEST(different_plans_are_noticed)
{
    troupe(_i, 2, play_plans_differ);
}
END_TEST

/* ---- groups ---- */

static void play_absent(struct party *p)
{
    if (p->self != 2) {
        p->timeout_ms = 500;
        int rc = group_create(p);
        must(p, rc == ERR_TIMEOUT, "%d %s", rc, p->err.text);
        must(p, strstr(p->err.text, "gpu2") && !strstr(p->err.text, "gpu1") && !strstr(p->err.text, "gpu0"), "%s",
             p->err.text);
        must(p, p->group == NULL, "a group");
    }
    together(p);
    p->timeout_ms = 20000;
    regroup(p);
    together(p);
}

START_TEST(a_party_that_does_not_come_is_named)
{
    troupe(_i, 4, play_absent);
}
END_TEST

static void play_other_id(struct party *p)
{
    for (uint32_t who = 0; who < 2; who++) {
        p->timeout_ms = 400;
        if (p->self == who)
            p->id->data[p->id->len - 32 + who * 16] ^= 1; /* in the half that it shows to the other */
        int rc = group_create(p);
        must(p, rc < 0 || p->self == who, "it got in");
        p->transport->destroy(p->group);
        p->group = NULL;
        id_share(p);
    }
}

START_TEST(another_group_id_does_not_get_in)
{
    troupe(_i, 2, play_other_id);
}
END_TEST

static void play_cancelled(struct party *p)
{
    uint64_t received, begin = clock_now_ns();
    if (p->self == 0) {
        eventfd_write(p->cancel_fd, 1);
        must(p, group_create(p) == ERR_ABORTED, "%s", p->err.text);
        eventfd_read(p->cancel_fd, &(eventfd_t){0});
    }
    together(p);
    regroup(p);
    region_alloc(p, 1 << 20);
    struct transfer t = one_item(p, 1 << 20);
    together(p);
    if (p->self == 1) { /* the sender is not there yet */
        eventfd_write(p->cancel_fd, 1);
        must(p, move(p, &t, 1, &received) == ERR_ABORTED, "%s", p->err.text);
    }
    must(p, clock_now_ns() - begin < 10000 * MS, "slow");
    together(p);
}

START_TEST(calls_are_cancelled)
{
    troupe(_i, 2, play_cancelled);
}
END_TEST

static void play_stall(struct party *p)
{
    uint64_t received;
    region_alloc(p, 64u << 20);
    struct transfer t = one_item(p, 64u << 20);
    for (uint32_t who = 0; who < 2; who++) {
        p->timeout_ms = 20000;
        regroup(p);
        p->timeout_ms = 400;
        if (p->self != who) {
            int rc = move(p, &t, 1, &received);
            must(p, rc == ERR_TIMEOUT, "%d %s", rc, p->err.text);
            must(p, strstr(p->err.text, p->members[who].id), "%s", p->err.text);
            must(p, strstr(p->err.text, who == 0 ? "sends nothing" : "takes nothing"), "%s", p->err.text);
        }
        together(p);
    }
}

START_TEST(a_party_that_stalls_is_named)
{
    troupe(_i, 2, play_stall);
}
END_TEST

/* Party 2 is killed; whoever has to do with it learns so, the others do not. */
static void play_killed(struct party *p, bool sends)
{
    uint64_t received;
    region_alloc(p, 64u << 20);
    must(p, group_create(p) == 0, "%s", p->err.text);
    struct transfer t = one_item(p, 64u << 20);
    t.src = sends ? 2 : 0;
    t.dst = sends ? 0 : 2;
    together(p);
    if (p->self == 2) {
        poll(NULL, 0, 100);
        kill(getpid(), SIGKILL);
    }
    uint64_t begin = clock_now_ns();
    int rc = move(p, &t, p->self == 0, &received);
    if (p->self == 0) {
        must(p, rc == ERR_UNREACHABLE, "%d %s", rc, p->err.text);
        must(p, strstr(p->err.text, "gpu2"), "%s", p->err.text);
    } else {
        must(p, rc == 0, "%s", p->err.text); /* it had no part in it */
    }
    must(p, clock_now_ns() - begin < 10000 * MS, "slow");
}

static void play_killed_source(struct party *p)
{
    play_killed(p, true);
}

static void play_killed_receiver(struct party *p)
{
    play_killed(p, false);
}

START_TEST(a_party_that_is_killed_is_named)
{
    troupe(_i, 3, play_killed_source);
    troupe(_i, 3, play_killed_receiver);
}
END_TEST

static size_t descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    size_t n = 0;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void play_groups(struct party *p)
{
    uint64_t received;
    size_t before = 0;
    region_alloc(p, 100000);
    struct transfer t = one_item(p, 100000);
    for (int round = 0; round < 6; round++) {
        regroup(p);
        must(p, move(p, &t, p->self < 2, &received) == 0, "%s", p->err.text);
        if (round == 1)
            before = descriptors();
    }
    for (int i = 0; i < 500 && descriptors() > before; i++) /* groups may end in the background */
        poll(NULL, 0, 20);
    must(p, descriptors() <= before, "%zu, not %zu", descriptors(), before);
    together(p);
}

START_TEST(groups_leave_no_descriptor_behind)
{
    troupe(_i, 3, play_groups);
}
END_TEST

/* ---- broadcasts ---- */

static void play_broadcasts(struct party *p)
{
    static const size_t sizes[] = {0, 1, 100, 65537, (40u << 20) + 12345};
    const size_t most = (40u << 20) + 20000;
    uint64_t state = 99;
    uint8_t *data = malloc(most);
    region_alloc(p, most);
    must(p, group_create(p) == 0, "%s", p->err.text);
    for (size_t k = 0; k < sizeof sizes / sizeof sizes[0]; k++)
        for (uint32_t mask = 1; mask < 1u << p->n; mask += 1 + below(&state, 3)) {
            size_t bytes = sizes[k], a = bytes / 3, b = bytes / 2;
            uint8_t have[PARTIES_MAX];
            uint64_t received = 77;
            for (uint32_t i = 0; i < p->n; i++)
                have[i] = mask >> i & 1 ? TRANSPORT_HAS : TRANSPORT_WANTS;
            uint32_t absent = mask / 2 % p->n;
            if (mask % 3 == 0 && mask != 1u << absent)
                have[absent] = TRANSPORT_ABSENT;
            fill(data, most, have[p->self] == TRANSPORT_HAS ? 7000 + mask : p->self);
            region_write(p, data, most);
            /* with gaps, in another order than they lie in memory */
            const struct extent extents[] = {
                {&p->region, b + 20, bytes - b}, {&p->region, 0, a}, {&p->region, a + 10, b - a}};
            uint8_t *sent = malloc(most);
            fill(sent, most, 7000 + mask);
            for (int e = 0; e < 3 && have[p->self] != TRANSPORT_ABSENT; e++)
                memcpy(data + extents[e].offset, sent + extents[e].offset, extents[e].len);
            free(sent);
            together(p); /* nobody writes while another still reads */
            struct transport_call call = party_call(p);
            must(p, p->transport->broadcast(p->group, extents, 3, have, &call, &received, &p->err) == 0, "%s",
                 p->err.text);
            must(p, received == (have[p->self] == TRANSPORT_WANTS ? bytes : 0), "%llu of %zu",
                 (unsigned long long)received, bytes);
            must(p, region_holds(p, data, 0, most), "%zu bytes, mask %x", bytes, mask);
            together(p);
        }
    free(data);
    uint8_t nobody[PARTIES_MAX] = {0};
    struct transport_call call = party_call(p);
    must(p, p->transport->broadcast(p->group, NULL, 0, nobody, &call, &(uint64_t){0}, &p->err) == ERR_INVALID,
         "nobody has it");
}

START_TEST(broadcasts_reach_everybody)
{
    troupe(_i, 2, play_broadcasts);
    troupe(_i, 4, play_broadcasts);
}
END_TEST

START_TEST(gpus_of_one_host_need_no_nccl)
{
    troupe(AUTO, 3, play_small_rounds);
    troupe(AUTO, 3, play_broadcasts);
}
END_TEST

/* ---- nccl: communicators that serve the next group ---- */

/* A group of these parties, in this order, in which everybody passes its bytes to the next one. */
static void group_of(struct party *p, const uint32_t *who, uint32_t n)
{
    const size_t slot = 70000;
    struct transport_call call = party_call(p);
    struct member members[PARTIES_MAX];
    uint32_t self = UINT32_MAX;
    uint64_t received;
    p->transport->destroy(p->group);
    p->group = NULL;
    for (int i = 0; i < 1000 && transport_nccl_counts(p->transport).ending > 0; i++)
        poll(NULL, 0, 10); /* ends are in the background, and what was not all over is not kept */
    together(p);
    id_share(p);
    for (uint32_t i = 0; i < n; i++) {
        members[i] = p->members[who[i]];
        self = who[i] == p->self ? i : self;
    }
    if (self < n) {
        uint8_t *data = malloc(2 * slot);
        uint32_t before = (self + n - 1) % n;
        struct transfer items[] = {{.src = self, .dst = (self + 1) % n, .n = 1}, {.src = before, .dst = self, .n = 1}};
        items[0].from[0] = (struct extent){&p->region, 0, slot};
        items[1].to[0] = (struct extent){&p->region, slot, slot};
        must(p, p->transport->group_create(p->transport, p->id, members, n, self, &call, &p->group, &p->err) == 0, "%s",
             p->err.text);
        must(p, move(p, items, 2, &received) == 0 && received == slot, "%s", p->err.text);
        fill(data + slot, slot, who[before] + 1);
        must(p, region_holds(p, data, slot, slot), "of party %u", who[before]);
        free(data);
    }
    together(p);
}

/* Two of them could be shrunk: how many are. */
static void next_groups(struct party *p, bool first, bool second)
{
    uint8_t *data = malloc(140000);
    region_alloc(p, 140000);
    fill(data, 70000, p->self + 1);
    memset(data + 70000, 0, 70000);
    region_write(p, data, 140000);
    free(data);
    group_of(p, (const uint32_t[]){0, 1, 2, 3}, 4);
    group_of(p, (const uint32_t[]){0, 1, 2, 3}, 4); /* the same once more */
    group_of(p, (const uint32_t[]){3, 0, 2}, 3);    /* fewer, and in another order */
    group_of(p, (const uint32_t[]){2, 3}, 2);       /* fewer still */
    group_of(p, (const uint32_t[]){0, 1, 2, 3}, 4); /* more: a new one */
    struct transport_nccl_counts counts = transport_nccl_counts(p->transport);
    const bool in_first = p->self != 1, in_second = p->self >= 2;
    unsigned shrunk = (unsigned)((in_first && first) + (in_second && second));
    must(p, counts.reused == 1 && counts.shrunk == shrunk && counts.made == 2u + in_first + in_second - shrunk,
         "%u made, %u reused, %u shrunk", counts.made, counts.reused, counts.shrunk);
    must(p, p->transport->health(p->transport, &p->err) == 0, "%s", p->err.text);
}

static void play_next_groups(struct party *p)
{
    next_groups(p, true, true);
}

static void play_no_shrinking(struct party *p)
{
    setenv("FAKENCCL_SHRINK", "fail", 1);
    next_groups(p, false, false);
}

static void play_half_shrinking(struct party *p)
{
    setenv("FAKENCCL_SHRINK", "half", 1); /* at odd ranks: those of the second time are even */
    next_groups(p, false, true);
}

/* With a communicator kept, a party dies: it is not used again. */
static void play_kept_of_a_dead(struct party *p)
{
    region_alloc(p, 140000);
    uint8_t *data = calloc(2, 70000);
    fill(data, 70000, p->self + 1);
    region_write(p, data, 140000);
    free(data);
    group_of(p, (const uint32_t[]){0, 1, 2}, 3);
    p->transport->destroy(p->group);
    p->group = NULL;
    poll(NULL, 0, 150);
    id_share(p);
    if (p->self == 2)
        kill(getpid(), SIGKILL);
    poll(NULL, 0, 500);
    struct transport_call call = party_call(p);
    must(p, p->transport->group_create(p->transport, p->id, p->members, 2, p->self, &call, &p->group, &p->err) == 0,
         "%s", p->err.text);
    struct transport_nccl_counts counts = transport_nccl_counts(p->transport);
    must(p, counts.made == 2 && counts.shrunk == 0, "%u made, %u shrunk", counts.made, counts.shrunk);
}

START_TEST(a_communicator_serves_the_next_group)
{
    keep_ms = 10000;
    troupe(NCCL, 4, play_next_groups);
    troupe(NCCL, 3, play_kept_of_a_dead);
}
END_TEST

START_TEST(what_cannot_be_shrunk_is_made_anew)
{
    keep_ms = 10000;
    troupe(NCCL, 4, play_no_shrinking);
    troupe(NCCL, 4, play_half_shrinking);
}
END_TEST

int main(void)
{
    n_gpus = gpus_count();
    n_backends = n_gpus == 0 ? WITHOUT_GPU : nccl_there() ? WITH_NCCL : WITHOUT_NCCL;
    for (int i = 0; i < n_backends; i++)
        printf("tested: %s\n", backends[i].name);
    Suite *s = suite_create("transport between processes");
    TCase *t = tcase_create("contract");
    tcase_set_timeout(t, 120);
    tcase_add_loop_test(t, moves_arrive, 0, n_backends);
    if (n_gpus > 0)
        tcase_add_test(t, moves_in_batches_arrive), tcase_add_test(t, gpus_of_one_host_need_no_nccl);
    if (n_backends == WITH_NCCL)
        tcase_add_test(t, a_communicator_serves_the_next_group);
    if (n_backends == WITH_NCCL && gpus_are_fake)
        tcase_add_test(t, what_cannot_be_shrunk_is_made_anew);
    tcase_add_loop_test(t, progress_is_reported_on_both_sides, 0, n_backends);
    tcase_add_loop_test(t, different_plans_are_noticed, 0, n_backends);
    tcase_add_loop_test(t, a_party_that_does_not_come_is_named, 0, n_backends);
    tcase_add_loop_test(t, another_group_id_does_not_get_in, 0, n_backends);
    tcase_add_loop_test(t, calls_are_cancelled, 0, n_backends);
    tcase_add_loop_test(t, a_party_that_stalls_is_named, 0, n_backends);
    tcase_add_loop_test(t, a_party_that_is_killed_is_named, 0, n_backends);
    tcase_add_loop_test(t, groups_leave_no_descriptor_behind, 0, n_backends);
    tcase_add_loop_test(t, broadcasts_reach_everybody, 0, n_backends);
    suite_add_tcase(s, t);
    return suite_run(s);
}
