/* eep-make-checkpoint: writes a Hugging Face folder with the names, dtypes and shapes of a real mixture-of-experts
 * model, for tests and figures of loading at real size.  The weights are pseudo-random: reproducible, finite, and
 * different for every tensor and place, so that a mix-up shows; a tensor's bytes follow from its name and the seed
 * alone.
 *
 * It needs nothing but libc.  Threads fill blocks of the shards in order; the main thread shows progress and waits for
 * signals.  The index is written last, so that a folder without it was not finished. */
#include <argp.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/digest.h"
#include "common/options.h"
#include "tests/gpu/checkpoint_models.h"

#define BLOCK_BYTES ((size_t)4 << 20) /* what a thread makes and writes at once; each has one such buffer */
#define THREADS_MAX 64u
#define TICK_MS     500

struct options {
    const char *dir, *model;
    struct model_cut cut;
    uint64_t seed, shard_bytes;
    unsigned threads;
    bool list, quiet, sparse;
};

struct shard {
    char name[48];                /* of the file */
    size_t first, n;              /* tensors */
    uint64_t header_bytes, bytes; /* bytes: of the whole file */
    int fd;
};

struct block {
    uint32_t shard;
    size_t tensor;
    uint64_t from, at; /* in the tensor, in the file */
};

struct maker {
    struct options o;
    struct model_list list;
    struct shard *shards;
    uint32_t n_shards;
    struct block *blocks;
    size_t n_blocks;
    atomic_size_t next;
    atomic_ullong written;
    atomic_bool stop;
    atomic_int failed; /* errno of the first write that failed */
    atomic_uint running;
    bool made_dir;
};

/* ---- content ---- */

/* Bits of a word of 8 bytes that are cleared and set, so that every number in it is finite and normal or zero. */
static void masks_of(const char *dtype, uint64_t *ret_keep, uint64_t *ret_set)
{
    if (strcmp(dtype, "BF16") == 0) /* 2^-15 to 2, of both signs */
        *ret_keep = 0x87ff87ff87ff87ffu, *ret_set = 0x3800380038003800u;
    else if (strcmp(dtype, "F32") == 0) /* 2^-15 to 2^-7, positive: as scales are */
        *ret_keep = 0x03ffffff03ffffffu, *ret_set = 0x3800000038000000u;
    else /* F8_E4M3, whose NaN is S.1111.111: below 2, of both signs */
        *ret_keep = 0xbfbfbfbfbfbfbfbfu, *ret_set = 0;
}

/* Bytes [from, from + len) of a tensor; from is a multiple of 64. */
static void content_fill(uint64_t seed, const struct model_tensor *t, uint64_t from, uint8_t *ret_bytes, size_t len)
{
    static const uint64_t odd[8] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u,
                                    0xa0761d6478bd642fu, 0xe7037ed1a0b428dbu, 0x8ebc6af09c88c6e3u, 0x589965cc75374cc3u};
    uint64_t keep, set, name = digest_mix(digest_bytes(t->name, strlen(t->name), 0), seed);
    masks_of(t->dtype, &keep, &set);
    for (size_t at = 0; at < len; at += 64) {
        uint64_t line[8], x = digest_mix(name, (from + at) / 64);
        for (int k = 0; k < 8; k++) {
            uint64_t y = (x + (uint64_t)k) * odd[k];
            line[k] = ((y ^ y >> 32) & keep) | set;
        }
        memcpy(ret_bytes + at, line, len - at < 64 ? len - at : 64);
    }
}

/* ---- the plan ---- */

static void *must_alloc(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p) {
        fprintf(stderr, "eep-make-checkpoint: out of memory\n");
        exit(1);
    }
    return p;
}

static const char *shape_text(const struct model_tensor *t, const char *between, char text[100])
{
    int n = 0;
    for (uint32_t d = 0; d < t->dims; d++)
        n += snprintf(text + n, (size_t)(100 - n), "%s%llu", d ? between : "", (unsigned long long)t->shape[d]);
    return text;
}

/* The header of a shard, to file if there is one; returns its length, without the eight bytes before it. */
static uint64_t header_write(const struct maker *m, const struct shard *s, FILE *file)
{
    uint64_t at = 0, len = 0;
    char text[320];
    for (size_t i = 0; i <= s->n; i++) {
        const struct model_tensor *t = &m->list.tensors[s->first + i];
        int n;
        if (i == s->n) {
            n = snprintf(text, sizeof text, "%s\"__metadata__\":{\"format\":\"pt\"}}", i ? "," : "{");
        } else {
            char shape[100];
            n = snprintf(text, sizeof text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%llu,%llu]}",
                         i ? "," : "{", t->name, t->dtype, shape_text(t, ",", shape), (unsigned long long)at,
                         (unsigned long long)(at + t->bytes));
            at += t->bytes;
        }
        if (file)
            fwrite(text, 1, (size_t)n, file);
        len += (uint64_t)n;
    }
    for (; len % 8 != 0; len++) /* the tensors begin at a multiple of 8 */
        if (file)
            fputc(' ', file);
    return len;
}

static void plan_shards(struct maker *m)
{
    const struct model_list *l = &m->list;
    m->shards = must_alloc(l->n, sizeof *m->shards);
    for (size_t i = 0; i < l->n; i++) {
        struct shard *s = m->n_shards ? &m->shards[m->n_shards - 1] : NULL;
        if (!s || s->bytes + l->tensors[i].bytes > m->o.shard_bytes) {
            s = &m->shards[m->n_shards++];
            s->first = i, s->fd = -1;
        }
        s->n++;
        s->bytes += l->tensors[i].bytes;
    }
    for (uint32_t k = 0; k < m->n_shards; k++) {
        struct shard *s = &m->shards[k];
        snprintf(s->name, sizeof s->name, "model-%05u-of-%05u.safetensors", k + 1, m->n_shards);
        s->header_bytes = header_write(m, s, NULL);
        s->bytes += 8 + s->header_bytes;
    }
}

static void plan_blocks(struct maker *m)
{
    const struct model_list *l = &m->list;
    m->blocks = must_alloc(l->n + (size_t)(l->bytes / BLOCK_BYTES), sizeof *m->blocks);
    for (uint32_t k = 0; k < m->n_shards; k++) {
        const struct shard *s = &m->shards[k];
        uint64_t at = 8 + s->header_bytes;
        for (size_t i = s->first; i < s->first + s->n; i++) {
            for (uint64_t from = 0; from < l->tensors[i].bytes; from += BLOCK_BYTES)
                m->blocks[m->n_blocks++] = (struct block){k, i, from, at + from};
            at += l->tensors[i].bytes;
        }
    }
}

/* ---- files ---- */

static FILE *file_open(const struct maker *m, const char *name)
{
    char path[4400];
    snprintf(path, sizeof path, "%s/%s", m->o.dir, name);
    return fopen(path, "wx");
}

/* 0 or an errno; the file is closed. */
static int file_close(FILE *f)
{
    int rc = ferror(f) ? EIO : 0;
    errno = 0;
    if (fflush(f) != 0)
        rc = errno;
    if (fclose(f) != 0 && rc == 0)
        rc = errno;
    return rc;
}

static int index_write(const struct maker *m)
{
    FILE *f = file_open(m, "model.safetensors.index.json");
    if (!f)
        return errno;
    fprintf(f, "{\n  \"metadata\": {\"total_size\": %llu},\n  \"weight_map\": {\n", (unsigned long long)m->list.bytes);
    for (uint32_t k = 0; k < m->n_shards; k++)
        for (size_t i = 0; i < m->shards[k].n; i++)
            fprintf(f, "    \"%s\": \"%s\"%s\n", m->list.tensors[m->shards[k].first + i].name, m->shards[k].name,
                    m->shards[k].first + i + 1 < m->list.n ? "," : "");
    fprintf(f, "  }\n}\n");
    return file_close(f);
}

static int config_write(const struct maker *m)
{
    FILE *f = file_open(m, "config.json");
    if (!f)
        return errno;
    model_config_write(m->o.model, &m->list.cut, f);
    return file_close(f);
}

/* Creates a shard at its full size, with its header. */
static int shard_create(struct maker *m, struct shard *s)
{
    FILE *f = file_open(m, s->name);
    if (!f)
        return errno;
    for (int i = 0; i < 8; i++)
        fputc((int)(s->header_bytes >> 8 * i & 0xff), f);
    header_write(m, s, f);
    int rc = fflush(f) != 0 ? errno : 0;
    if (rc == 0 && ftruncate(fileno(f), (off_t)s->bytes) != 0)
        rc = errno;
    s->fd = rc == 0 ? fcntl(fileno(f), F_DUPFD_CLOEXEC, 0) : -1;
    if (rc == 0 && s->fd < 0)
        rc = errno;
    fclose(f);
    return rc;
}

static void files_remove(const struct maker *m)
{
    char path[4400];
    static const char *const others[] = {"model.safetensors.index.json", "config.json"};
    for (uint32_t k = 0; k < m->n_shards; k++) {
        snprintf(path, sizeof path, "%s/%s", m->o.dir, m->shards[k].name);
        unlink(path);
    }
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", m->o.dir, others[i]);
        unlink(path);
    }
    if (m->made_dir)
        rmdir(m->o.dir);
}

/* ---- threads ---- */

static int block_write(const struct maker *m, const struct block *b, uint8_t *buffer)
{
    const struct model_tensor *t = &m->list.tensors[b->tensor];
    size_t len = t->bytes - b->from < BLOCK_BYTES ? (size_t)(t->bytes - b->from) : BLOCK_BYTES;
    content_fill(m->o.seed, t, b->from, buffer, len);
    for (size_t done = 0; done < len;) {
        ssize_t n = pwrite(m->shards[b->shard].fd, buffer + done, len - done, (off_t)(b->at + done));
        if (n > 0)
            done += (size_t)n;
        else if (n < 0 && errno != EINTR)
            return errno;
    }
    return 0;
}

static void *writer_main(void *user)
{
    struct maker *m = user;
    uint8_t *buffer = malloc(BLOCK_BYTES);
    int rc = buffer ? 0 : ENOMEM;
    while (rc == 0 && !atomic_load(&m->stop)) {
        size_t i = atomic_fetch_add(&m->next, 1);
        if (i >= m->n_blocks)
            break;
        const struct model_tensor *t = &m->list.tensors[m->blocks[i].tensor];
        rc = block_write(m, &m->blocks[i], buffer);
        uint64_t left = t->bytes - m->blocks[i].from;
        atomic_fetch_add(&m->written, left < BLOCK_BYTES ? left : BLOCK_BYTES);
    }
    if (rc) {
        int none = 0;
        atomic_compare_exchange_strong(&m->failed, &none, rc);
        atomic_store(&m->stop, true);
    }
    free(buffer);
    atomic_fetch_sub(&m->running, 1);
    return NULL;
}

static void progress_show(const struct maker *m, uint64_t began_ns, bool last)
{
    if (m->o.quiet || !isatty(STDERR_FILENO))
        return;
    double bytes = (double)atomic_load(&m->written), seconds = (double)(clock_now_ns() - began_ns) / 1e9;
    fprintf(stderr, "\r%.1f of %.1f GB, %.1f GB/s %s", bytes / 1e9, (double)m->list.bytes / 1e9, bytes / 1e9 / seconds,
            last ? "\n" : "");
}

/* Runs the threads to their end; the number of the signal that stopped them, or 0. */
static int writers_run(struct maker *m, const sigset_t *signals, uint64_t began_ns)
{
    pthread_t threads[THREADS_MAX];
    unsigned n = 0;
    int caught = 0;
    while (n < m->o.threads) {
        atomic_fetch_add(&m->running, 1);
        int rc = pthread_create(&threads[n], NULL, writer_main, m);
        if (rc == 0) {
            n++;
            continue;
        }
        atomic_fetch_sub(&m->running, 1);
        if (n == 0)
            atomic_store(&m->failed, rc);
        break;
    }
    struct timespec tick = {.tv_nsec = 20 * 1000000L};
    for (unsigned ticks = 0; atomic_load(&m->running) > 0; ticks++) {
        int got = sigtimedwait(signals, NULL, &tick);
        if (got > 0) {
            caught = got;
            atomic_store(&m->stop, true);
        }
        if (ticks % (TICK_MS / 20) == 0)
            progress_show(m, began_ns, false);
    }
    for (unsigned i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    progress_show(m, began_ns, true);
    return caught;
}

/* ---- all of it ---- */

static bool folder_empty(const char *path)
{
    DIR *dir = opendir(path);
    const struct dirent *entry = NULL;
    while (dir && (entry = readdir(dir)) && (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0))
        continue;
    if (dir)
        closedir(dir);
    return dir && !entry;
}

/* False when it has said why not. */
static bool folder_make(struct maker *m)
{
    uint64_t need = 0;
    for (uint32_t k = 0; k < m->n_shards; k++)
        need += m->shards[k].bytes;
    m->made_dir = mkdir(m->o.dir, 0777) == 0;
    int failed = m->made_dir ? 0 : errno;
    if (failed && (failed != EEXIST || !folder_empty(m->o.dir))) {
        fprintf(stderr, "eep-make-checkpoint: %s: %s; name a folder that is empty or not there yet\n", m->o.dir,
                failed == EEXIST ? "is no empty folder" : strerror(failed));
        return false;
    }
    struct statvfs fs;
    if (!m->o.sparse && statvfs(m->o.dir, &fs) == 0 && (uint64_t)fs.f_bavail * fs.f_frsize < need) {
        fprintf(stderr,
                "eep-make-checkpoint: %s: needs %.1f GB, but the file system has %.1f GB free; "
                "choose another place, or fewer --layers or --experts\n",
                m->o.dir, (double)need / 1e9, (double)((uint64_t)fs.f_bavail * fs.f_frsize) / 1e9);
        if (m->made_dir)
            rmdir(m->o.dir);
        return false;
    }
    return true;
}

static int checkpoint_write(struct maker *m, const sigset_t *signals)
{
    uint64_t began = clock_now_ns();
    int rc = 0, caught = 0;
    if (!folder_make(m))
        return 1;
    for (uint32_t k = 0; k < m->n_shards && rc == 0; k++)
        rc = shard_create(m, &m->shards[k]);
    if (rc == 0 && !m->o.sparse) {
        caught = writers_run(m, signals, began);
        rc = atomic_load(&m->failed);
    }
    for (uint32_t k = 0; k < m->n_shards; k++)
        if (m->shards[k].fd >= 0 && close(m->shards[k].fd) != 0 && rc == 0)
            rc = errno;
    if (rc == 0 && !caught)
        rc = config_write(m);
    if (rc == 0 && !caught)
        rc = index_write(m);
    if (rc || caught) {
        files_remove(m);
        fprintf(stderr, "eep-make-checkpoint: %s: %s; what was written has been removed\n", m->o.dir,
                rc                 ? strerror(rc)
                : caught == SIGINT ? "interrupted"
                                   : "terminated");
        return caught ? 128 + caught : 1;
    }
    double seconds = (double)(clock_now_ns() - began) / 1e9;
    printf("%s: %s, %u layers (%u with %u experts), %zu tensors, %llu bytes in %u files\n"
           "an expert has %llu bytes, the dense weights %llu; written in %.1f s, %.1f GB/s\n",
           m->o.dir, m->o.model, m->list.cut.layers, m->list.cut.layers - m->list.cut.dense_layers, m->list.cut.experts,
           m->list.n, (unsigned long long)m->list.bytes, m->n_shards, (unsigned long long)m->list.expert_bytes,
           (unsigned long long)m->list.dense_bytes, seconds, (double)m->list.bytes / 1e9 / seconds);
    return 0;
}

static int list_print(const struct model_list *l)
{
    for (size_t i = 0; i < l->n; i++) {
        const struct model_tensor *t = &l->tensors[i];
        char shape[100];
        printf("%s %s [%s] %llu\n", t->name, t->dtype, shape_text(t, ", ", shape), (unsigned long long)t->bytes);
    }
    printf("%zu tensors, %llu bytes; an expert has %llu, the dense weights %llu\n", l->n, (unsigned long long)l->bytes,
           (unsigned long long)l->expert_bytes, (unsigned long long)l->dense_bytes);
    return fflush(stdout) == 0 ? 0 : 1;
}

/* ---- command line ---- */

enum {
    KEY_MODEL = 256,
    KEY_LAYERS,
    KEY_EXPERTS,
    KEY_DENSE,
    KEY_VOCABULARY,
    KEY_SEED,
    KEY_SHARD,
    KEY_THREADS,
    KEY_LIST,
    KEY_MTP,
    KEY_SPARSE
};

static const struct argp_option option_table[] = {
    {"model", KEY_MODEL, "NAME", 0, "qwen3-30b-a3b (61 GB), deepseek-v3 (673 GB) or another, see below; required", 0},
    {"layers", KEY_LAYERS, "N", 0, "only the first N layers", 0},
    {"experts", KEY_EXPERTS, "N", 0, "only N experts in a layer", 0},
    {"dense-layers", KEY_DENSE, "N", 0, "the first N layers have no experts (the model's own; deepseek-v3: 3)", 0},
    {"mtp-layers", KEY_MTP, "N", 0, "layers for multi-token prediction after the others (0; published with some: 1)",
     0},
    {"vocabulary", KEY_VOCABULARY, "N", 0, "only N rows of embedding and head", 0},
    {"seed", KEY_SEED, "N", 0, "another content (0)", 0},
    {"shard-mib", KEY_SHARD, "MIB", 0, "size of a file, but at least one tensor (4096)", 0},
    {"threads", KEY_THREADS, "N", 0, "threads that write (as many as processors)", 0},
    {"quiet", 'q', 0, 0, "no progress (there is none either when standard error is no terminal)", 0},
    {"sparse", KEY_SPARSE, 0, 0, "write the headers, and holes for the weights: full size, next to nothing on disk", 0},
    {"list", KEY_LIST, 0, 0, "print name, dtype, shape and bytes of every tensor, and write nothing", 0},
    OPTIONS_HELP(-1),
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct options *o = state->input;
    switch (key) {
    case KEY_MODEL:
        o->model = arg;
        return 0;
    case KEY_LAYERS:
        o->cut.layers = (uint32_t)options_number(state, "--layers", arg, 1, 1000);
        return 0;
    case KEY_EXPERTS:
        o->cut.experts = (uint32_t)options_number(state, "--experts", arg, 1, 4096);
        return 0;
    case KEY_DENSE:
        o->cut.dense_layers = (uint32_t)options_number(state, "--dense-layers", arg, 0, 1000);
        return 0;
    case KEY_VOCABULARY:
        o->cut.vocabulary = options_number(state, "--vocabulary", arg, 1, 1 << 24);
        return 0;
    case KEY_SEED:
        o->seed = options_number(state, "--seed", arg, 0, UINT64_MAX);
        return 0;
    case KEY_SHARD:
        o->shard_bytes = options_number(state, "--shard-mib", arg, 1, 1 << 20) << 20;
        return 0;
    case KEY_THREADS:
        o->threads = (unsigned)options_number(state, "--threads", arg, 1, THREADS_MAX);
        return 0;
    case KEY_MTP:
        o->cut.mtp_layers = (uint32_t)options_number(state, "--mtp-layers", arg, 0, 100);
        return 0;
    case KEY_SPARSE:
        o->sparse = true;
        return 0;
    case KEY_LIST:
        o->list = true;
        return 0;
    case 'q':
        o->quiet = true;
        return 0;
    case ARGP_KEY_ARG:
        if (o->dir)
            argp_error(state, "one folder, not also '%s'", arg);
        if (!*arg || strlen(arg) > 4096)
            argp_error(state, "the folder's name must have 1 to 4096 bytes");
        o->dir = arg;
        return 0;
    case ARGP_KEY_END:
        if (!o->model)
            argp_error(state, "--model is required, such as qwen3-30b-a3b");
        if (!o->dir == !o->list)
            argp_error(state, "name the folder to write, or give --list");
        return 0;
    default:
        return options_help(key, state);
    }
}

int main(int argc, char **argv)
{
    static const struct argp argp = {
        .options = option_table,
        .parser = parse,
        .args_doc = "DIR",
        .doc = "Writes a checkpoint folder with the names, dtypes and shapes of a real mixture-of-experts model, and "
               "pseudo-random weights that follow from their tensor's name and the seed.\v"
               "DIR must be empty or not there.  After Ctrl-C, or on a full disk, what was written is removed.\n\n"
               "  eep-make-checkpoint --model qwen3-30b-a3b /data/qwen3\n"
               "  eep-make-checkpoint --model deepseek-v3 --layers 4 --experts 32 /dev/shm/deepseek\n"
               "  eep-make-checkpoint --model kimi-k2 --sparse /tmp/kimi\n\n"
               "Models: qwen3-30b-a3b, deepseek-v3, deepseek-v2, kimi-k2, glm-4.5, gpt-oss-120b, mixtral-8x7b,\n"
               "qwen2-57b-a14b, olmoe-1b-7b, minimax-m2, qwen3-vl-30b-a3b.\n\n"
               "Exit status: 0 done, 1 failed, 2 usage, 130 after Ctrl-C.",
    };
    static struct maker m;
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    m.o = (struct options){.shard_bytes = 4096ull << 20, .cut = {.dense_layers = UINT32_MAX}};
    m.o.threads = processors < 1 ? 1 : processors > THREADS_MAX ? THREADS_MAX : (unsigned)processors;
    argp_err_exit_status = 2;
    if (argp_parse(&argp, argc, argv, ARGP_NO_HELP, NULL, &m.o))
        return 2;
    char why[400];
    if (!model_list_make(m.o.model, &m.o.cut, &m.list, why)) {
        fprintf(stderr, "eep-make-checkpoint: %s\n", why);
        return 2;
    }
    int rc;
    if (m.o.list) {
        rc = list_print(&m.list);
    } else {
        sigset_t signals;
        sigemptyset(&signals);
        sigaddset(&signals, SIGINT);
        sigaddset(&signals, SIGTERM);
        pthread_sigmask(SIG_BLOCK, &signals, NULL); /* before the first file: only between them is it looked at */
        plan_shards(&m);
        plan_blocks(&m);
        rc = checkpoint_write(&m, &signals);
    }
    free(m.shards);
    free(m.blocks);
    model_list_done(&m.list);
    return rc;
}
