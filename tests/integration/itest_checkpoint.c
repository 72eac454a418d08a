/* Checkpoints of real shapes: eep-make-checkpoint writes them, the shipping loader loads them, into host memory and,
 * where there is a GPU (or the driver of tests/fakecuda), into its memory.  And what the instrument does when it
 * cannot. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/checkpoint.h"
#include "common/clock.h"
#include "tests/harness/folder.h"
#include "tests/harness/suite.h"

#define QWEN "--model", "qwen3-30b-a3b", "--layers", "2", "--experts", "3", "--vocabulary", "100", "--shard-mib", "32"
#define DEEPSEEK                                                                                                       \
    "--model", "deepseek-v3", "--layers", "1", "--dense-layers", "0", "--experts", "2", "--vocabulary", "100"

static char folder[64], output[4096]; /* a temporary folder; what the last run said */

static void setup(void)
{
    folder_make("made", folder);
}

static void teardown(void)
{
    folder_remove(folder);
}

static bool is_there(const char *name)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

/* ---- the program ---- */

static rlim_t file_limit = RLIM_INFINITY;

static pid_t make_start(const char *name, const char *const *args, int *ret_pipe)
{
    const char *argv[24] = {"eep-make-checkpoint"}, *bin = getenv("EEP_BIN");
    char path[256], dir[128];
    int n = 1, pipes[2];
    snprintf(path, sizeof path, "%s/tests/eep-make-checkpoint", bin ? bin : "build");
    snprintf(dir, sizeof dir, "%s/%s", folder, name);
    while (*args)
        argv[n++] = *args++;
    if (*name)
        argv[n++] = dir;
    ck_assert_int_eq(pipe2(pipes, O_CLOEXEC), 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipes[1], STDOUT_FILENO);
        dup2(pipes[1], STDERR_FILENO);
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){file_limit, file_limit});
        execv(path, (char *const *)argv);
        _exit(127);
    }
    ck_assert_int_gt(child, 0);
    close(pipes[1]);
    *ret_pipe = pipes[0];
    return child;
}

/* Its exit status; everything that it said is in output. */
static int make_wait(pid_t child, int from)
{
    size_t len = 0;
    ssize_t got;
    int status;
    char rest[4096];
    while ((got = read(from, rest, sizeof rest)) > 0) { /* the end of a long output counts */
        size_t keep = len + (size_t)got < sizeof output ? len : 0;
        memcpy(output + keep, rest, (size_t)got < sizeof output - 1 ? (size_t)got : sizeof output - 1);
        len = keep + ((size_t)got < sizeof output - 1 ? (size_t)got : sizeof output - 1);
    }
    output[len] = '\0';
    close(from);
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int make_run(const char *name, const char *const *args)
{
    int from;
    pid_t child = make_start(name, args, &from);
    return make_wait(child, from);
}
#define MAKE(name, ...) make_run(name, (const char *const[]){__VA_ARGS__, NULL})
#define SAYS(text)      ck_assert_msg(strstr(output, text) != NULL, "not said: \"%s\", but: %s", text, output)

/* ---- loading ---- */

struct loaded {
    struct memory_backend *memory;
    struct checkpoint *c;
    struct manifest manifest;
    struct model *model;
    struct weights *w;
    struct expert_map *map;
};

/* Expert e of every layer into slot e; the digests of what the memory then holds are those that the loader took. */
static void load(struct loaded *l, const char *name, const char *memory)
{
    struct err err = {0};
    char dir[128];
    snprintf(dir, sizeof dir, "%s/%s", folder, name);
    l->memory = memory_open(memory, &err);
    ck_assert_msg(l->memory != NULL, "%s", err.text);
    ck_assert_msg(checkpoint_open(dir, &l->c, &err) == 0, "%s", err.text);
    uint32_t slots = checkpoint_experts(l->c);
    ck_assert_msg(checkpoint_manifest(l->c, slots, &l->manifest, &err) == 0, "%s", err.text);
    ck_assert_msg(manifest_model(&l->manifest, &l->model, &err) == 0, "%s", err.text);
    ck_assert_msg(weights_allocate(l->memory, l->model, &l->w, &err) == 0, "%s", err.text);
    l->map = expert_map_new(l->manifest.layers, l->manifest.logical, 1, slots);
    for (uint32_t layer = 0; layer < l->manifest.layers; layer++)
        for (uint32_t e = 0; e < slots; e++)
            l->map->held[expert_map_at(l->map, layer, 0, e)] = (int32_t)e;
    ck_assert_msg(checkpoint_load(l->c, l->w, l->map, 0, NULL, NULL, &err) == 0, "%s", err.text);
    for (uint32_t layer = 0; layer < l->manifest.layers; layer++)
        for (uint32_t e = 0; e < slots; e++)
            ck_assert_msg(weights_slot_verify(l->w, layer, e, e, &err) == 0, "%s", err.text);
    uint64_t dense;
    ck_assert_int_eq(weights_dense_digest(l->w, 0, &dense, &err), 0);
    ck_assert_uint_eq(dense, l->model->dense_digest[0]);
}

static void loaded_done(struct loaded *l)
{
    expert_map_unref(l->map);
    weights_free(l->w);
    model_unref(l->model);
    manifest_done(&l->manifest);
    checkpoint_close(l->c);
    l->memory->close(l->memory);
}

static size_t digests_equal(const struct loaded *a, const struct loaded *b)
{
    size_t n = (size_t)a->model->layers * a->model->logical,
           same = a->model->dense_digest[0] == b->model->dense_digest[0];
    for (size_t i = 0; i < n; i++)
        same += a->model->expert_digest[i] == b->model->expert_digest[i];
    return same;
}

static void experts_differ(const struct loaded *l)
{
    size_t n = (size_t)l->model->layers * l->model->logical;
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < i; k++)
            ck_assert_uint_ne(l->model->expert_digest[i], l->model->expert_digest[k]);
}

/* No number of a region is NaN or infinite: its bits under `exponent` are never all ones. */
static void numbers_finite(const struct loaded *l, const char *dtype, size_t size, uint32_t exponent)
{
    size_t looked = 0;
    for (uint32_t i = 0; i < l->manifest.n_tensors; i++) {
        const struct tensor *t = &l->manifest.tensors[i];
        const uint8_t *at = (const uint8_t *)l->w->regions[t->region].base + t->offset;
        uint64_t n = t->shape[0] * (t->dims > 1 ? t->shape[1] : 1);
        if (strcmp(t->dtype, dtype) != 0)
            continue;
        for (uint64_t k = 0; k < n; k++) {
            uint32_t bits = 0;
            memcpy(&bits, at + k * size, size);
            if ((bits & exponent) == exponent)
                ck_abort_msg("%s: number %llu is not finite", t->name, (unsigned long long)k);
        }
        looked++;
    }
    ck_assert_uint_gt(looked, 0);
}

START_TEST(the_lists_are_those_of_the_published_checkpoints)
{
    ck_assert_int_eq(MAKE("", "--model", "qwen3-30b-a3b", "--list"), 0);
    SAYS("18867 tensors, 61064245248 bytes; an expert has 9437184,");
    ck_assert_int_eq(MAKE("", "--model", "deepseek-v3", "--list"), 0);
    SAYS("90427 tensors, 673150611808 bytes; an expert has 44050944,");
}
END_TEST

START_TEST(qwen_is_made_and_loaded)
{
    struct loaded a, b;
    ck_assert_msg(MAKE("a", QWEN) == 0, "%s", output);
    SAYS("an expert has 9437184 bytes, the dense weights 76362752;");
    load(&a, "a", "host");
    ck_assert_uint_eq(checkpoint_layers(a.c), 2);
    ck_assert_uint_eq(checkpoint_experts(a.c), 3);
    ck_assert_uint_eq(a.model->expert_bytes, 9437184);
    ck_assert_uint_eq(a.model->dense_bytes, 76362752);
    ck_assert(is_there("a/model-00002-of-00005.safetensors"));
    experts_differ(&a);
    numbers_finite(&a, "BF16", 2, 0x7f80);

    /* Again by another number of threads and in larger files: the same.  With another seed: nothing is. */
    ck_assert_int_eq(MAKE("b", QWEN, "--shard-mib", "4096", "--threads", "3"), 0);
    load(&b, "b", "host");
    ck_assert_uint_eq(digests_equal(&a, &b), 7);
    loaded_done(&b);
    char second[128];
    snprintf(second, sizeof second, "%s/b", folder);
    folder_remove(second);
    ck_assert_int_eq(MAKE("b", QWEN, "--seed", "1"), 0);
    load(&b, "b", "host");
    ck_assert_uint_eq(digests_equal(&a, &b), 0);
    loaded_done(&b);
    loaded_done(&a);
}
END_TEST

START_TEST(deepseek_is_made_and_loaded)
{
    struct loaded l;
    ck_assert_msg(MAKE("a", DEEPSEEK) == 0, "%s", output);
    SAYS("an expert has 44050944 bytes");
    load(&l, "a", "host");
    ck_assert_uint_eq(checkpoint_layers(l.c), 1);
    ck_assert_uint_eq(checkpoint_experts(l.c), 2);
    ck_assert_uint_eq(l.model->expert_bytes, 3 * 2048 * 7168 + 3 * 16 * 56 * 4);
    experts_differ(&l);
    numbers_finite(&l, "F8_E4M3", 1, 0x7f);
    numbers_finite(&l, "F32", 4, 0x7f800000);
    loaded_done(&l);
}
END_TEST

START_TEST(a_gpu_gets_the_same_bytes)
{
    struct loaded host, gpu;
    ck_assert_msg(MAKE("a", DEEPSEEK) == 0, "%s", output);
    load(&host, "a", "host");
    load(&gpu, "a", "cuda");
    ck_assert_uint_eq(digests_equal(&host, &gpu), 3);
    loaded_done(&host);
    loaded_done(&gpu);
}
END_TEST

static bool cancel_at(void *user, uint64_t bytes)
{
    return bytes >= *(uint64_t *)user;
}

/* Cancelled while pieces are being read and copied; then the same memory is loaded whole. */
START_TEST(a_cancelled_load_can_be_repeated)
{
    struct loaded l;
    struct err err = {0};
    ck_assert_msg(MAKE("a", QWEN) == 0, "%s", output);
    load(&l, "a", "cuda");
    uint64_t dense = l.model->dense_digest[0], expert = l.model->expert_digest[5];
    for (uint64_t at = 1; at < 130000000; at += 31000001) {
        ck_assert_int_eq(checkpoint_load(l.c, l.w, l.map, 0, cancel_at, &at, &err), ERR_ABORTED);
        ck_assert_ptr_nonnull(strstr(err.text, "loading was cancelled after"));
    }
    l.model->dense_digest[0] = l.model->expert_digest[5] = 0;
    ck_assert_msg(checkpoint_load(l.c, l.w, l.map, 0, NULL, NULL, &err) == 0, "%s", err.text);
    ck_assert_uint_eq(l.model->dense_digest[0], dense);
    ck_assert_uint_eq(l.model->expert_digest[5], expert);
    loaded_done(&l);
}
END_TEST

/* ---- what goes wrong ---- */

START_TEST(wrong_use_gets_a_sentence)
{
    ck_assert_int_eq(MAKE("a", "--layers", "2"), 2);
    SAYS("--model is required");
    ck_assert_int_eq(MAKE("a", "--model", "gpt"), 2);
    SAYS("no model is called 'gpt'; there are qwen3-30b-a3b, deepseek-v3,");
    ck_assert_int_eq(MAKE("a", "--model", "deepseek-v3", "--layers", "3"), 2);
    SAYS("of 3 layers the first 3 are dense");
    ck_assert_int_eq(MAKE("a", "--model", "qwen3-30b-a3b", "--layers", "0"), 2);
    ck_assert_int_eq(MAKE("", "--model", "qwen3-30b-a3b"), 2);
    SAYS("name the folder");
    ck_assert_int_eq(MAKE("a/b", QWEN), 1);
    SAYS("No such file or directory");
    ck_assert_int_eq(MAKE(".", "--model", "deepseek-v3", "--layers", "1000"), 1);
    SAYS("GB free");
    char path[128];
    snprintf(path, sizeof path, "%s/taken", folder);
    ck_assert_int_eq(mkdir(path, 0700), 0);
    snprintf(path, sizeof path, "%s/taken/file", folder);
    close(open(path, O_CREAT | O_WRONLY, 0600));
    ck_assert_int_eq(MAKE("taken", QWEN), 1);
    SAYS("is no empty folder");
    ck_assert(is_there("taken/file"));
}
END_TEST

/* A write that fails in the middle, as on a disk that another program has filled. */
START_TEST(a_failed_write_leaves_nothing)
{
    file_limit = 20 << 20;
    ck_assert_int_eq(MAKE("a", QWEN), 1);
    file_limit = RLIM_INFINITY;
    SAYS("File too large; what was written has been removed");
    ck_assert(!is_there("a"));
}
END_TEST

START_TEST(ctrl_c_leaves_nothing)
{
    int from;
    const char *const args[] = {"--model", "deepseek-v3", "--layers", "4", "--experts", "8", "--threads", "1", NULL};
    pid_t child = make_start("a", args, &from);
    for (int i = 0; i < 500 && !is_there("a/model-00001-of-00002.safetensors"); i++)
        usleep(10000);
    usleep(50000);
    ck_assert_int_eq(kill(child, SIGINT), 0);
    ck_assert_int_eq(make_wait(child, from), 130);
    SAYS("interrupted; what was written has been removed");
    ck_assert(!is_there("a"));
}
END_TEST

static bool cuda_present(void)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct err err = {0};
        struct memory_backend *m = memory_open("cuda", &err);
        if (!m)
            printf("loading into GPU memory is not tested: %s\n", err.text);
        fflush(NULL);
        _exit(m ? 0 : 1);
    }
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

int main(void)
{
    bool cuda = cuda_present();
    Suite *s = suite_create("made checkpoints");
    TCase *t = tcase_create("made checkpoints");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 120);
    tcase_add_test(t, the_lists_are_those_of_the_published_checkpoints);
    tcase_add_test(t, qwen_is_made_and_loaded);
    tcase_add_test(t, deepseek_is_made_and_loaded);
    tcase_add_test(t, wrong_use_gets_a_sentence);
    tcase_add_test(t, a_failed_write_leaves_nothing);
    tcase_add_test(t, ctrl_c_leaves_nothing);
    suite_add_tcase(s, t);
    if (cuda) {
        TCase *gpu = tcase_create("GPU memory"); /* tests/gpu/sanitize.sh runs it alone */
        tcase_add_checked_fixture(gpu, setup, teardown);
        tcase_set_timeout(gpu, 400);
        tcase_add_test(gpu, a_gpu_gets_the_same_bytes);
        tcase_add_test(gpu, a_cancelled_load_can_be_repeated);
        suite_add_tcase(s, gpu);
    }
    return suite_run(s);
}
