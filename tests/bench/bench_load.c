/* Figures of loading a checkpoint, each beside floors measured in the same run on the same files, which are read once
 * before so that they are in the page cache:
 *
 *   plain read, one thread     pread of all files into one buffer of 4 MiB, as dd does
 *   plain read, N threads      the same by as many threads as the loader has, each with such a buffer
 *   read into the memory       host: the same into newly allocated regions, all that is left out is the digest
 *   plain copy to the GPU      cuda: pinned buffers of 4 MiB into the regions, nothing is read
 *   load                       the shipping loader into newly allocated regions, digests taken, every expert
 *
 * The memory above the weights is the growth of the peak of the resident memory during a load, without the regions. */
#include <argp.h>
#include <fcntl.h>
#include <glob.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent/checkpoint.h"
#include "agent/checkpoint_readers.h"
#include "common/clock.h"
#include "common/options.h"

#define BLOCK_BYTES MEMORY_STAGE_BYTES
#define RUNS_MAX    50u

struct options {
    const char *dir, *memory;
    unsigned readers, runs;
};

struct file {
    int fd;
    uint64_t bytes;
};

struct bench {
    struct options o;
    struct memory_backend *memory;
    struct checkpoint *c;
    struct model *model;
    struct expert_map *map;
    struct file *files;
    size_t n_files;
    uint64_t file_bytes, weight_bytes;
};

static void fail(const char *what, const struct err *err)
{
    fprintf(stderr, "bench_load: %s: %s\n", what, err->text);
    exit(1);
}

/* ---- plain reading ---- */

struct plain {
    const struct bench *b;
    atomic_ullong next;   /* over all files, in blocks */
    struct weights *into; /* or NULL: into a buffer of the thread's own */
};

/* Where block i of all files lies; false after the last. */
static bool block_find(const struct bench *b, uint64_t i, int *ret_fd, uint64_t *ret_at, size_t *ret_len)
{
    for (size_t k = 0; k < b->n_files; k++) {
        uint64_t blocks = (b->files[k].bytes + BLOCK_BYTES - 1) / BLOCK_BYTES;
        if (i < blocks) {
            uint64_t left = b->files[k].bytes - i * BLOCK_BYTES;
            *ret_fd = b->files[k].fd;
            *ret_at = i * BLOCK_BYTES;
            *ret_len = left < BLOCK_BYTES ? (size_t)left : BLOCK_BYTES;
            return true;
        }
        i -= blocks;
    }
    return false;
}

/* Place i * BLOCK_BYTES in the regions, one after the other; NULL where none has room for a whole block. */
static uint8_t *region_place(struct weights *w, uint64_t i)
{
    for (uint32_t r = 0; r < w->manifest.n_regions; r++) {
        uint64_t blocks = w->regions[r].mapped / BLOCK_BYTES;
        if (i < blocks)
            return (uint8_t *)w->regions[r].base + i * BLOCK_BYTES;
        i -= blocks;
    }
    return NULL;
}

static void *plain_main(void *user)
{
    struct plain *p = user;
    uint8_t *own = malloc(BLOCK_BYTES);
    for (;;) {
        int fd;
        uint64_t i = atomic_fetch_add(&p->next, 1), at;
        size_t len;
        if (!own || !block_find(p->b, i, &fd, &at, &len))
            break;
        uint8_t *to = p->into ? region_place(p->into, i) : NULL;
        if (pread(fd, to ? to : own, len, (off_t)at) != (ssize_t)len) {
            fprintf(stderr, "bench_load: a file cannot be read\n");
            exit(1);
        }
    }
    free(own);
    return NULL;
}

/* Seconds. */
static double plain_read(const struct bench *b, unsigned n, struct weights *into)
{
    struct plain p = {.b = b, .into = into};
    pthread_t threads[READERS_MAX];
    uint64_t began = clock_now_ns();
    for (unsigned i = 1; i < n; i++)
        if (pthread_create(&threads[i], NULL, plain_main, &p) != 0) {
            fprintf(stderr, "bench_load: cannot start a thread\n");
            exit(1);
        }
    plain_main(&p);
    for (unsigned i = 1; i < n; i++)
        pthread_join(threads[i], NULL);
    return (double)(clock_now_ns() - began) / 1e9;
}

/* ---- regions ---- */

static struct weights *allocate(const struct bench *b)
{
    struct err err = {0};
    struct weights *w;
    if (weights_allocate(b->memory, b->model, &w, &err) < 0)
        fail("memory", &err);
    return w;
}

static double read_into_memory(const struct bench *b)
{
    struct weights *w = allocate(b);
    double seconds = plain_read(b, b->o.readers, w);
    weights_free(w);
    return seconds;
}

/* All regions from pinned buffers, which nobody fills. */
static double plain_copy(const struct bench *b)
{
    struct memory_backend *m = b->memory;
    struct weights *w = allocate(b);
    struct memory_stage stage;
    struct err err = {0};
    uint64_t digest;
    struct memory_stage lent[MEMORY_STAGES];
    for (unsigned i = 0; i < MEMORY_STAGES; i++) /* pin them all before the clock runs */
        if (m->stage_take(m, &w->regions[0], 0, 1, &lent[i], &err) < 0)
            fail("stages", &err);
    for (unsigned i = 0; i < MEMORY_STAGES; i++)
        if (m->stage_write(m, &lent[i], &err) < 0)
            fail("stages", &err);
    uint64_t began = clock_now_ns();
    for (uint32_t r = 0; r < w->manifest.n_regions; r++)
        for (size_t at = 0; at < w->regions[r].bytes; at += BLOCK_BYTES) {
            size_t len = w->regions[r].bytes - at < BLOCK_BYTES ? w->regions[r].bytes - at : BLOCK_BYTES;
            if (m->stage_take(m, &w->regions[r], at, len, &stage, &err) < 0 || m->stage_write(m, &stage, &err) < 0)
                fail("copy", &err);
        }
    if (m->digest(m, &w->regions[0], 0, 8, 0, &digest, &err) < 0) /* when it is all there */
        fail("copy", &err);
    double seconds = (double)(clock_now_ns() - began) / 1e9;
    m->stages_free(m);
    weights_free(w);
    return seconds;
}

/* ---- the loader ---- */

static uint64_t status_kib(const char *key)
{
    FILE *f = fopen("/proc/self/status", "re");
    char line[256];
    unsigned long long kib = 0;
    size_t len = strlen(key);
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, key, len) == 0 && sscanf(line + len, ": %llu", &kib) == 1)
            break;
    if (f)
        fclose(f);
    return kib;
}

/* From here on VmHWM counts anew. */
static void peak_reset(void)
{
    FILE *f = fopen("/proc/self/clear_refs", "we");
    if (f) {
        fputs("5", f);
        fclose(f);
    }
}

static double load(const struct bench *b, uint64_t *ret_above)
{
    struct weights *w = allocate(b);
    struct err err = {0};
    peak_reset();
    uint64_t before = status_kib("VmRSS"), shared = status_kib("RssShmem");
    uint64_t began = clock_now_ns();
    if (checkpoint_load(b->c, w, b->map, 0, NULL, NULL, &err) < 0)
        fail("load", &err);
    double seconds = (double)(clock_now_ns() - began) / 1e9;
    uint64_t grown = status_kib("VmHWM") - before, regions = status_kib("RssShmem") - shared;
    *ret_above = b->memory->in_place ? (grown > regions ? grown - regions : 0) * 1024 : grown * 1024;
    weights_free(w);
    return seconds;
}

/* ---- all of it ---- */

static void files_open(struct bench *b)
{
    char pattern[4200];
    glob_t found = {0};
    snprintf(pattern, sizeof pattern, "%s/*.safetensors", b->o.dir);
    if (glob(pattern, 0, NULL, &found) != 0) {
        fprintf(stderr, "bench_load: %s: has no *.safetensors\n", b->o.dir);
        exit(1);
    }
    b->files = calloc(found.gl_pathc, sizeof *b->files);
    for (size_t i = 0; b->files && i < found.gl_pathc; i++) {
        struct stat st;
        int fd = open(found.gl_pathv[i], O_RDONLY | O_CLOEXEC);
        if (fd < 0 || fstat(fd, &st) < 0) {
            perror(found.gl_pathv[i]);
            exit(1);
        }
        b->files[b->n_files++] = (struct file){fd, (uint64_t)st.st_size};
        b->file_bytes += (uint64_t)st.st_size;
    }
    globfree(&found);
}

static void bench_open(struct bench *b)
{
    struct err err = {0};
    struct manifest m;
    files_open(b);
    b->memory = memory_open(b->o.memory, &err);
    if (!b->memory)
        fail("memory", &err);
    if (checkpoint_open(b->o.dir, &b->c, &err) < 0 || checkpoint_manifest(b->c, checkpoint_experts(b->c), &m, &err) < 0)
        fail("checkpoint", &err);
    checkpoint_readers_set(b->c, b->o.readers);
    b->map = expert_map_new(m.layers, m.logical, 1, m.slots);
    if (!b->map || manifest_model(&m, &b->model, &err) < 0)
        fail("checkpoint", &err);
    for (uint32_t layer = 0; layer < m.layers; layer++)
        for (uint32_t e = 0; e < m.logical; e++)
            b->map->held[expert_map_at(b->map, layer, 0, e)] = (int32_t)e;
    b->weight_bytes = b->model->dense_bytes + b->model->expert_bytes * m.layers * m.logical;
    printf("%s: %u layers of %u experts of %llu bytes, dense %llu bytes, %.2f GB in all; memory \"%s\", %u threads "
           "read\n\n",
           b->o.dir, m.layers, m.logical, (unsigned long long)b->model->expert_bytes,
           (unsigned long long)b->model->dense_bytes, (double)b->weight_bytes / 1e9, b->o.memory, b->o.readers);
    manifest_done(&m);
}

static void bench_close(struct bench *b)
{
    for (size_t i = 0; i < b->n_files; i++)
        close(b->files[i].fd);
    free(b->files);
    expert_map_unref(b->map);
    model_unref(b->model);
    checkpoint_close(b->c);
    b->memory->close(b->memory);
}

static int compare(const void *x, const void *y)
{
    const double *a = x, *b = y;
    return (*a > *b) - (*a < *b);
}

/* A line of the table, by the median; ratio of the load to it. */
static void line_print(const char *what, double *seconds, unsigned n, uint64_t bytes, double load_rate)
{
    double gb = (double)bytes / 1e9;
    qsort(seconds, n, sizeof *seconds, compare);
    double rate = gb / seconds[n / 2];
    printf("| %s | %.2f | %.2f to %.2f | ", what, rate, gb / seconds[n - 1], gb / seconds[0]);
    if (load_rate > 0)
        printf("%.0f %% |\n", 100 * load_rate / rate);
    else
        printf("|\n");
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    switch (key) {
    case 'm':
        o->memory = arg;
        return 0;
    case 'r':
        o->readers = (unsigned)options_number(state, "--readers", arg, 1, READERS_MAX);
        return 0;
    case 'n':
        o->runs = (unsigned)options_number(state, "--runs", arg, 1, RUNS_MAX);
        return 0;
    case ARGP_KEY_ARG:
        if (o->dir)
            argp_error(state, "one folder, not also '%s'", arg);
        o->dir = arg;
        return 0;
    case ARGP_KEY_END:
        if (!o->dir)
            argp_error(state, "name the checkpoint folder");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"memory", 'm', "NAME", 0, "host (default), cuda, cuda:INDEX", 0},
        {"readers", 'r', "N", 0, "threads that read, 1 to 8 (default: as the loader chooses)", 0},
        {"runs", 'n', "N", 0, "of each, alternating; the table has medians (5)", 0},
        {0},
    };
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .args_doc = "DIR",
        .doc = "The rate of the checkpoint loader beside plain reads of the same files and, for a GPU, a plain copy.",
    };
    static double one[RUNS_MAX], many[RUNS_MAX], floor_[RUNS_MAX], loads[RUNS_MAX];
    static struct bench b = {.o = {.memory = "host", .runs = 5}};
    uint64_t above = 0, most = 0;
    argp_err_exit_status = 2;
    argp_parse(&argp, argc, argv, 0, NULL, &b.o);
    if (b.o.readers == 0)
        b.o.readers = readers_default();
    bench_open(&b);
    (void)plain_read(&b, b.o.readers, NULL); /* into the page cache */
    for (unsigned i = 0; i < b.o.runs; i++) {
        one[i] = plain_read(&b, 1, NULL);
        many[i] = plain_read(&b, b.o.readers, NULL);
        floor_[i] = b.memory->in_place ? read_into_memory(&b) : plain_copy(&b);
        loads[i] = load(&b, &above);
        most = above > most ? above : most;
    }
    qsort(loads, b.o.runs, sizeof *loads, compare);
    double rate = (double)b.weight_bytes / 1e9 / loads[b.o.runs / 2];
    char what[64];
    printf("| median of %u | GB/s | slowest to fastest | load against it |\n|---|---|---|---|\n", b.o.runs);
    line_print("plain read, one thread", one, b.o.runs, b.file_bytes, rate);
    snprintf(what, sizeof what, "plain read, %u threads", b.o.readers);
    line_print(what, many, b.o.runs, b.file_bytes, rate);
    line_print(b.memory->in_place ? "the same into newly allocated memory" : "plain copy to the GPU from pinned memory",
               floor_, b.o.runs, b.memory->in_place ? b.file_bytes : b.weight_bytes, rate);
    line_print("**load, digests taken**", loads, b.o.runs, b.weight_bytes, 0);
    printf("\npeak of resident memory above the weights during a load: %.1f MiB\n", (double)most / (1 << 20));
    bench_close(&b);
    return 0;
}
