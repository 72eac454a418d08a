/* Figures of the GPU backend on this machine, each beside the floor that it can be compared with: copying from host
 * memory, the digest, and moves between two processes by cuda_peer, against a plain copy inside the GPU.
 *
 *     bench_gpu [SLOTS [SLOT_BYTES [GPU]]]   (default 256 slots of 9437184 bytes, in three extents each; GPU: index of
 *                                             the receiver's, default 0 like the sender's)
 *
 * Without a GPU it says so and ends well. */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/gpu.h"
#include "agent/transport_gpu.h"
#include "common/clock.h"

#define PARTIES 2u
#define ROUNDS  5

struct stage {
    pthread_barrier_t barrier;
    size_t id_len;
    uint8_t id[256];
};

static void must(int rc, const char *what, const struct err *err)
{
    if (rc >= 0)
        return;
    fprintf(stderr, "bench_gpu: %s: %s\n", what, err->text);
    kill(0, SIGTERM);
    _exit(1);
}

static double rate(uint64_t bytes, uint64_t ns)
{
    return (double)bytes / (double)ns; /* bytes a ns = GB/s */
}

/* The best of some repetitions, in GB/s; the first one apart. */
struct best {
    double first, rate;
};
static void best_take(struct best *b, double value)
{
    if (b->first == 0)
        b->first = value;
    else if (value > b->rate)
        b->rate = value;
}

static void memory_figures(struct memory_backend *m, struct memory_region *a, struct memory_region *b, size_t slot)
{
    struct err err = {0};
    struct best write = {0}, copy = {0}, digest = {0}, slots = {0};
    size_t half = a->bytes / 2;
    uint8_t *host = malloc(256u << 20);
    size_t host_bytes = half < 256u << 20 ? half : 256u << 20;
    uint64_t value;
    memset(host, 3, 256u << 20);
    for (int k = 0; k < ROUNDS; k++) {
        uint64_t t0 = clock_now_ns();
        must(m->write(m, a, 0, host, host_bytes, &err), "write", &err);
        must(m->digest(m, a, 0, 8, 0, &value, &err), "digest", &err);
        uint64_t t1 = clock_now_ns();
        must(m->copy(m, b, 0, a, 0, a->bytes, &err), "copy", &err);
        uint64_t t2 = clock_now_ns();
        must(m->digest(m, a, 0, a->bytes, 0, &value, &err), "digest", &err);
        uint64_t t3 = clock_now_ns();
        for (size_t at = 0; at + slot <= a->bytes; at += slot)
            must(m->digest(m, a, at, slot, 0, &value, &err), "digest", &err);
        uint64_t t4 = clock_now_ns();
        best_take(&write, rate(host_bytes, t1 - t0));
        best_take(&copy, rate(a->bytes, t2 - t1));
        best_take(&digest, rate(a->bytes, t3 - t2));
        best_take(&slots, rate(a->bytes / slot * slot, t4 - t3));
    }
    free(host);
    printf("host memory to GPU through pinned buffers   %8.1f GB/s\n", write.rate);
    printf("plain copy inside the GPU                   %8.1f GB/s (bytes copied)\n", copy.rate);
    printf("digest of all bytes at once                 %8.1f GB/s (bytes read)\n", digest.rate);
    printf("digest slot by slot (%zu bytes)          %8.1f GB/s\n", slot, slots.rate);
}

static void party(struct stage *stage, uint32_t self, uint32_t n_slots, size_t slot, const char *gpu)
{
    struct err err = {0};
    struct member members[PARTIES] = {{.id = "a", .incarnation = 1}, {.id = "b", .incarnation = 2}};
    struct memory_region a, b;
    char name[32];
    snprintf(name, sizeof name, "cuda:%.20s", self == 1 ? gpu : "0");
    struct memory_backend *m = memory_open(name, &err);
    must(m ? 0 : -1, "memory", &err);
    struct transport *t = transport_cuda_peer_open(name + 5, &err);
    must(t ? 0 : -1, "transport", &err);
    must(m->alloc(m, "a", n_slots * slot, &a, &err), "alloc", &err);
    must(m->alloc(m, "b", n_slots * slot, &b, &err), "alloc", &err);
    if (self == 0)
        memory_figures(m, &a, &b, slot);
    struct blob *id;
    if (self == 0) {
        must(t->group_id(t, &id, &err), "id", &err);
        memcpy(stage->id, id->data, stage->id_len = id->len);
    }
    pthread_barrier_wait(&stage->barrier);
    id = blob_new(stage->id, stage->id_len);
    struct transfer *items = calloc(n_slots, sizeof *items);
    for (uint32_t i = 0; i < n_slots; i++) {
        items[i] = (struct transfer){.src = 0, .dst = 1, .n = 3};
        size_t place = (size_t)(i * 7u % n_slots) * slot, third = slot / 24 * 8, at = 0;
        for (int k = 0; k < 3; k++) {
            size_t len = k < 2 ? third : slot - at;
            items[i].from[k] = (struct extent){&a, i * slot + at, len};
            items[i].to[k] = (struct extent){&b, place + at, len};
            at += len;
        }
    }
    struct best move = {0};
    for (int group = 0; group < 2; group++) {
        struct transport_call call = {.deadline_ns = clock_now_ns() + 30000000000u, .cancel_fd = -1};
        struct transport_group *g;
        uint64_t bytes, t0 = clock_now_ns();
        must(t->group_create(t, id, members, PARTIES, self, &call, &g, &err), "group", &err);
        if (self == 1)
            printf("group of two made in                        %8.2f ms\n", (double)(clock_now_ns() - t0) / 1e6);
        for (int k = 0; k < ROUNDS; k++) {
            pthread_barrier_wait(&stage->barrier);
            t0 = clock_now_ns();
            must(t->move(g, items, n_slots, &call, &bytes, &err), "move", &err);
            if (self == 1)
                best_take(&move, rate(bytes, clock_now_ns() - t0));
        }
        pthread_barrier_wait(&stage->barrier);
        t->destroy(g);
    }
    if (self == 1)
        printf("cuda_peer between two processes             %8.1f GB/s (the first round %.1f)\n", move.rate, move.first);
    free(items);
    blob_unref(id);
    m->release(m, &a);
    m->release(m, &b);
    t->close(t);
    m->close(m);
}

/* In a child: the driver must not be used before the parties are forked. */
static int gpus(void)
{
    pid_t child = fork();
    if (child == 0) {
        struct gpu gpu;
        struct err err = {0};
        size_t n = 0;
        if (gpu_list(&gpu, 1, &n, &err) < 0)
            printf("no figures of GPUs: %s\n", err.text);
        else if (n > 0)
            printf("GPU: %s, %.1f GiB\n", gpu.name, (double)gpu.bytes / (1u << 30));
        fflush(NULL);
        _exit((int)n);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

int main(int argc, char **argv)
{
    uint32_t n_slots = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 256;
    size_t slot = argc > 2 ? strtoul(argv[2], NULL, 10) : 9437184;
    if (n_slots == 0 || slot < 24 || slot % 8 != 0) {
        fprintf(stderr, "usage: bench_gpu [SLOTS [SLOT_BYTES [GPU]]]: slots of a multiple of 8 bytes\n");
        return 2;
    }
    if (gpus() == 0)
        return 0;
    struct stage *stage = mmap(NULL, sizeof *stage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (stage == MAP_FAILED)
        return 1;
    pthread_barrierattr_t attributes;
    pthread_barrierattr_init(&attributes);
    pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&stage->barrier, &attributes, PARTIES);
    int failed = 0;
    for (uint32_t i = 0; i < PARTIES; i++)
        if (fork() == 0) {
            party(stage, i, n_slots, slot, argc > 3 ? argv[3] : "0");
            fflush(NULL);
            _exit(0);
        }
    for (uint32_t i = 0; i < PARTIES; i++) {
        int status = 1;
        if (wait(&status) < 0 || status != 0)
            failed = 1;
    }
    return failed;
}
