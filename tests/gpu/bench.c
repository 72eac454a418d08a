/* See bench.h. */
#include "tests/gpu/bench.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

void bench_take(struct bench_times *times, uint64_t ns)
{
    if (times->n < (int)(sizeof times->v / sizeof times->v[0]))
        times->v[times->n++] = ns;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

uint64_t bench_median(const struct bench_times *times)
{
    struct bench_times sorted = *times;
    qsort(sorted.v, (size_t)sorted.n, sizeof sorted.v[0], compare);
    return sorted.n ? sorted.v[sorted.n / 2] : 0;
}

uint64_t bench_best(const struct bench_times *times)
{
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < times->n; i++)
        best = times->v[i] < best ? times->v[i] : best;
    return best;
}

void bench_must(int rc, const char *what, const struct err *err)
{
    if (rc >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, err->text);
    fflush(NULL);
    kill(0, SIGTERM); /* the others would wait for ever */
    _exit(1);
}

void bench_figure(double value, const char *unit, const char *name_format, ...)
{
    char name[128];
    va_list args;
    va_start(args, name_format);
    vsnprintf(name, sizeof name, name_format, args);
    va_end(args);
    printf("figure %s %.4g %s\n", name, value, unit);
    fflush(stdout);
}

void bench_meet(struct bench_stage *stage)
{
    pthread_barrier_wait(&stage->barrier);
}

uint64_t bench_longest(struct bench_stage *stage, uint32_t self, uint64_t ns)
{
    if (self < stage->parties)
        stage->ns[self] = ns;
    bench_meet(stage);
    uint64_t longest = 0;
    for (uint32_t i = 0; i < stage->parties; i++)
        longest = stage->ns[i] > longest ? stage->ns[i] : longest;
    bench_meet(stage); /* before anybody writes again */
    return longest;
}

struct blob *bench_share(struct bench_stage *stage, bool from, struct blob *blob)
{
    if (from) {
        stage->blob_len = blob->len;
        memcpy(stage->blob, blob->data, blob->len);
    }
    bench_meet(stage);
    struct blob *copy = blob_new(stage->blob, stage->blob_len);
    bench_meet(stage);
    return copy;
}

int bench_gpus(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct gpu gpu = {0};
        struct err err = {0};
        size_t n = 0;
        if (gpu_list(&gpu, 1, &n, &err) < 0)
            printf("no figures of GPUs: %s\n", err.text);
        else if (n > 0)
            printf("# %s, %.1f GiB, %zu of them\n", gpu.name, (double)gpu.bytes / (1u << 30), n);
        fflush(NULL);
        _exit((int)n);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

int bench_run(uint32_t n, bool observer, void (*play)(struct bench_stage *stage, uint32_t self, void *user), void *user)
{
    struct bench_stage *stage = mmap(NULL, sizeof *stage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (stage == MAP_FAILED)
        return 1;
    pthread_barrierattr_t attributes;
    pthread_barrierattr_init(&attributes);
    pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    const uint32_t all = n + observer;
    pthread_barrier_init(&stage->barrier, &attributes, all);
    stage->parties = n;
    fflush(NULL);
    for (uint32_t i = 0; i < all; i++)
        if (fork() == 0) {
            play(stage, i, user);
            fflush(NULL);
            _exit(0);
        }
    int failed = 0;
    for (uint32_t i = 0; i < all; i++) {
        int status = 1;
        failed += wait(&status) < 0 || status != 0;
    }
    munmap(stage, sizeof *stage);
    return failed;
}

uint64_t bench_free(const struct cuda_device *device)
{
    size_t available = 0, total = 0;
    struct err err = {0};
    bench_must(cuda_device_use(device, &err), "the observer", &err);
    bench_must(cuda_check(&device->driver, device->driver.cuMemGetInfo(&available, &total), &err, "ask for memory"),
               "the observer", &err);
    return available;
}
