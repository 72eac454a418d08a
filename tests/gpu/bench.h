/* What the benchmarks of GPU transports share: parties that are processes, forked before CUDA is used, a stage on which
 * they meet, and figures as lines "figure NAME VALUE UNIT" that bench.sh makes a table of. */
#ifndef EEP_TESTS_GPU_BENCH_H
#define EEP_TESTS_GPU_BENCH_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "agent/cuda_driver.h"
#include "agent/transport.h"

#define BENCH_PARTIES_MAX 8u
#define BENCH_ROUNDS      9
#define BENCH_SKIPPED     77

struct bench_stage {
    pthread_barrier_t barrier; /* of the parties and the observer, if there is one */
    uint32_t parties;
    size_t blob_len;
    uint8_t blob[256];
    uint64_t ns[BENCH_PARTIES_MAX];
};

/* The middle and the best of some times, in ns. */
struct bench_times {
    uint64_t v[64];
    int n;
};
void bench_take(struct bench_times *times, uint64_t ns);
uint64_t bench_best(const struct bench_times *times);
uint64_t bench_median(const struct bench_times *times);

/* A failure ends the whole benchmark. */
void bench_must(int rc, const char *what, const struct err *err);
void bench_figure(double value, const char *unit, const char *name_format, ...) __attribute__((format(printf, 3, 4)));

void bench_meet(struct bench_stage *stage);
/* Meets, and gives the longest of the parties' times to all of them. */
uint64_t bench_longest(struct bench_stage *stage, uint32_t self, uint64_t ns);
/* Bytes from party `from` to the others, as a blob; the caller's reference. */
struct blob *bench_share(struct bench_stage *stage, bool from, struct blob *blob);

/* How many GPUs there are, asked in a child. */
int bench_gpus(void);
/* Forks n parties and, if it is wanted, an observer (self == n), who all run `play` and end; the number of those that
 * failed. */
int bench_run(uint32_t n, bool observer, void (*play)(struct bench_stage *stage, uint32_t self, void *user), void *user);

/* The observer's part: free memory of a GPU in bytes. */
uint64_t bench_free(const struct cuda_device *device);

#endif
