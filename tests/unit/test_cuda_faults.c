/* Errors of the CUDA driver under the agent's worker: two workers load, join and verify over GPU memory while one call
 * of the driver fails, on the driver of tests/fakecuda.  Whichever call it is, somebody says so in a sentence with what
 * could not be done, nobody hangs or crashes, and after an error that the process gets over nothing is left behind.
 *
 * Each story runs in a process of its own.  Not tested on a real driver, where errors cannot be asked for. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef HAVE_CUDA
int main(void)
{
    puts("a build without cuda.h has no driver that can be made to fail");
    return 77;
}
#else
#include <dlfcn.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/cuda_driver.h"
#include "agent/transport_gpu.h"
#include "agent/weights.h"
#include "agent/worker.h"
#include "tests/harness/suite.h"

#define LAYERS  4u
#define EXPERTS 16u

/* How a story ended, and what was said. */
enum ending { NO_FAULT = 1, REPORTED, CLEAN_UP_ONLY, UNREPORTED, WRONG, LEAK };
struct outcome {
    enum ending ending;
    char text[1024]; /* of the failures, one a line */
};

struct story {
    struct worker *workers[2];
    struct member members[2];
    char checkpoint[256];
    uint64_t next_id;
    bool failed, named; /* something; with the error of CUDA */
    const char *expected;
    struct outcome *outcome;
};

static void said(struct story *s, int code, const char *text)
{
    size_t len = strlen(s->outcome->text);
    snprintf(s->outcome->text + len, sizeof s->outcome->text - len, "%d %s\n", code, text);
    s->failed = true;
    s->named |= strstr(text, "cannot ") && (strstr(text, s->expected) || strstr(text, " are free"));
}

/* ---- work ---- */

static struct work work_new(struct story *s, enum work_kind kind, uint32_t self)
{
    struct work work = {.id = ++s->next_id, .kind = kind, .op = 1, .self = self};
    work.n = 2;
    work.parties = malloc(sizeof s->members);
    memcpy(work.parties, s->members, sizeof s->members);
    return work;
}

/* A worker that does not end is the end of the story, by the alarm. */
static struct worker_result result_wait(struct story *s, uint32_t i)
{
    struct worker_result result;
    for (;;)
        if (!worker_next_result(s->workers[i], &result))
            poll(&(struct pollfd){.fd = worker_fd(s->workers[i]), .events = POLLIN}, 1, -1);
        else if (!result.progress && !result.fatal)
            break;
    if (result.code < 0)
        said(s, result.code, result.text);
    return result;
}

static struct worker_result do_one(struct story *s, uint32_t i, struct work work)
{
    worker_submit(s->workers[i], &work);
    return result_wait(s, i);
}

static void let_go(struct story *s, uint32_t i, enum work_kind kind)
{
    struct worker_result r = do_one(s, i, work_new(s, kind, i));
    worker_result_done(&r);
}

/* Waits for both workers.  One that failed leaves the group, as the end of its operation would make it: the other need
 * not wait for it. */
static void both_wait(struct story *s)
{
    bool done[2] = {false, false};
    while (!done[0] || !done[1]) {
        struct pollfd p[2];
        for (uint32_t i = 0; i < 2; i++)
            p[i] = (struct pollfd){.fd = done[i] ? -1 : worker_fd(s->workers[i]), .events = POLLIN};
        poll(p, 2, -1);
        for (uint32_t i = 0; i < 2; i++) {
            struct worker_result r;
            if (done[i] || !worker_next_result(s->workers[i], &r) || r.progress)
                continue;
            done[i] = true;
            if (r.code < 0) {
                said(s, r.code, r.text);
                let_go(s, i, WORK_GROUP_DESTROY);
            }
            worker_result_done(&r);
        }
    }
}

/* ---- the story ---- */

static bool workers_open(struct story *s)
{
    const char *data = getenv("EEP_TEST_DATA");
    snprintf(s->checkpoint, sizeof s->checkpoint, "%s/qwen3-moe-tiny", data ? data : "tests/data");
    for (uint32_t i = 0; i < 2; i++) {
        struct err err = {0};
        struct worker_config config = {.checkpoint = i == 0 ? s->checkpoint : NULL, .transfer_timeout_ms = 10000};
        snprintf(s->members[i].id, sizeof s->members[i].id, "gpu%u", i);
        config.memory = memory_open("cuda", &err);
        config.transport = config.memory ? transport_cuda_peer_open("", &err) : NULL;
        if (config.transport && worker_start(&config, &s->workers[i], &err) == 0)
            continue;
        said(s, err.code, err.text);
        if (config.transport)
            config.transport->close(config.transport);
        if (config.memory)
            config.memory->close(config.memory);
        return false;
    }
    return true;
}

/* Party 0 holds expert e in slot e; party 1 has or gets the first half of the slots. */
static struct expert_map *map_make(bool joined)
{
    struct expert_map *map = expert_map_new(LAYERS, EXPERTS, 2, EXPERTS);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t e = 0; e < EXPERTS; e++) {
            map->held[expert_map_at(map, layer, 0, e)] = (int32_t)e;
            if (joined && e < EXPERTS / 2)
                map->held[expert_map_at(map, layer, 1, e)] = (int32_t)e;
        }
    return map;
}

static struct plan *plan_make(void)
{
    struct plan *plan = plan_new(2, LAYERS * EXPERTS / 2, 0);
    uint32_t n = 0;
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t e = 0; e < EXPERTS / 2; e++)
            plan->moves[n++] = (struct move){.layer = layer, .expert = e, .src_slot = e, .dst = 1, .dst_slot = e};
    return plan;
}

static void verify(struct story *s, uint32_t i, struct model *model)
{
    struct work work = work_new(s, WORK_VERIFY, i);
    work.map = map_make(true);
    work.model = model_ref(model);
    struct worker_result r = do_one(s, i, work);
    if (r.code == 0 && strstr(r.text, "cannot ")) /* an error of the GPU is no finding about the weights */
        said(s, 0, r.text), s->outcome->ending = WRONG;
    worker_result_done(&r);
}

static void join(struct story *s, struct model *model)
{
    struct plan *plan = plan_make();
    struct worker_result id = do_one(s, 0, work_new(s, WORK_GROUP_ID, 0));
    for (uint32_t i = 0; i < 2 && id.blob; i++) {
        struct work work = work_new(s, WORK_GROUP, i);
        work.blob = blob_ref(id.blob);
        worker_submit(s->workers[i], &work);
    }
    if (id.blob)
        both_wait(s);
    worker_result_done(&id);
    const bool grouped = !s->failed;
    for (uint32_t i = 0; i < 2 && grouped; i++) {
        struct work work = work_new(s, WORK_WEIGHTS, i);
        work.plan = plan_ref(plan);
        work.model = model_ref(model);
        work.dense_from = 1;
        worker_submit(s->workers[i], &work);
    }
    if (grouped)
        both_wait(s);
    plan_unref(plan);
}

static void serve(struct story *s)
{
    struct work work = work_new(s, WORK_LOAD, 0);
    work.map = map_make(false);
    struct worker_result loaded = do_one(s, 0, work);
    if (!s->failed) {
        work = work_new(s, WORK_ALLOCATE, 1);
        work.model = model_ref(loaded.model);
        struct worker_result r = do_one(s, 1, work);
        worker_result_done(&r);
    }
    if (!s->failed)
        join(s, loaded.model);
    for (uint32_t i = 0; i < 2 && loaded.model && worker_weights(s->workers[i]); i++)
        verify(s, i, loaded.model);
    worker_result_done(&loaded);
}

/* Whether no error that lasts has come: asked of the driver on host memory, since the next call of it may be the one
 * that is to fail. */
static bool driver_works(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    CUresult (*sticky)(void) = lib ? (CUresult(*)(void))(uintptr_t)dlsym(lib, "fakecuda_sticky") : NULL;
    bool works = sticky && sticky() == CUDA_SUCCESS;
    if (lib)
        dlclose(lib);
    return works;
}

static bool memory_is_free(void)
{
    struct cuda_device *device;
    size_t available = 0, total = 1;
    if (cuda_device_open("", &device, NULL) < 0)
        return false;
    bool ok = device->driver.cuMemGetInfo(&available, &total) == CUDA_SUCCESS && available == total;
    cuda_device_close(device);
    return ok;
}

static void story_run(struct story *s, bool lasts)
{
    bool opened = workers_open(s);
    if (opened)
        serve(s);
    bool unreported = lasts && !s->failed && !driver_works();
    for (uint32_t i = 0; i < 2 && opened; i++) { /* letting go works in any case */
        bool failed = s->failed;
        s->failed = false;
        let_go(s, i, WORK_GROUP_DESTROY);
        let_go(s, i, WORK_RELEASE);
        if (s->failed)
            s->outcome->ending = WRONG;
        s->failed |= failed;
    }
    for (uint32_t i = 0; i < 2; i++)
        worker_stop(s->workers[i]);
    if (s->outcome->ending == WRONG)
        return;
    if (s->failed)
        s->outcome->ending = s->named ? REPORTED : WRONG;
    else
        s->outcome->ending = unreported ? UNREPORTED : lasts && !driver_works() ? CLEAN_UP_ONLY : NO_FAULT;
    if (!lasts && !memory_is_free())
        s->outcome->ending = LEAK;
}

/* Plays the story while this call fails with this code. */
static enum ending play(const char *function, unsigned nth, CUresult code, const char *expected, bool late,
                        struct outcome *shared)
{
    char failure[96];
    int status = 0;
    snprintf(failure, sizeof failure, "%s:%u:%d%s", function, nth, (int)code, late ? ":late" : "");
    *shared = (struct outcome){.ending = 0};
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct story s = {.expected = expected, .outcome = shared};
        setenv("FAKECUDA_FAIL", failure, 1);
        unsetenv("FAKECUDA_DELAY_US"); /* what is asked for is enough */
        unsetenv("FAKECUDA_STATE");
        alarm(60);
        story_run(&s, late || cuda_is_sticky(code));
        exit(0);
    }
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert_msg(status == 0, "%s: ended with status %x after:\n%s", failure, (unsigned)status, shared->text);
    ck_assert_msg(shared->ending == NO_FAULT || shared->ending == REPORTED || shared->ending == CLEAN_UP_ONLY,
                  "%s: ending %d\n%s", failure, (int)shared->ending, shared->text);
    return shared->ending;
}

static struct outcome *outcome_new(void)
{
    struct outcome *o = mmap(NULL, sizeof *o, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(o, MAP_FAILED);
    return o;
}

/* Every call at the beginning, then ever fewer of them, until the story is over before the failure comes. */
static unsigned sweep(bool late)
{
    struct outcome *o = outcome_new();
    unsigned reported = 0, nth = 1;
    enum ending ending;
    for (; (ending = play("*", nth, CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", late, o)) != NO_FAULT;
         nth += 1 + nth / 12)
        reported += ending == REPORTED;
    ck_assert_uint_gt(nth, 100);
    munmap(o, sizeof *o);
    return reported;
}

START_TEST(an_error_that_lasts_is_reported_at_any_call)
{
    ck_assert_uint_gt(sweep(false), 30);
}
END_TEST

START_TEST(an_error_of_queued_work_is_reported)
{
    ck_assert_uint_gt(sweep(true), 20);
}
END_TEST

static const char *const fallible[] = {
    "cuDevicePrimaryCtxRetain",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemAddressReserve",
    "cuMemMap",
    "cuMemSetAccess",
    "cuStreamCreate",
    "cuEventCreate",
    "cuMemHostAlloc",
    "cuMemAlloc",
    "cuModuleLoadData",
    "cuMemImportFromShareableHandle",
};

START_TEST(an_error_that_passes_leaves_nothing_behind)
{
    struct outcome *o = outcome_new();
    unsigned nth = 1;
    for (; play(fallible[_i], nth, CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", false, o) != NO_FAULT;
         nth += 1 + nth / 4)
        ck_assert_int_eq(o->ending, REPORTED);
    ck_assert_msg(nth > 1 || strncmp(fallible[_i], "cuMemAlloc", 10) == 0 || strncmp(fallible[_i], "cuModule", 8) == 0,
                  "%s is never called", fallible[_i]); /* these two are for the kernel, which nvcc compiles */
    munmap(o, sizeof *o);
}
END_TEST

/* In a child: whether what LD_LIBRARY_PATH has is the driver on host memory. */
static bool fake_present(void)
{
    int status = 1;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        struct gpu gpu = {0};
        size_t n = 0;
        _exit(gpu_list(&gpu, 1, &n, NULL) < 0 || strcmp(gpu.name, "Fake GPU") != 0);
    }
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

int main(void)
{
    if (!fake_present()) {
        puts("LD_LIBRARY_PATH does not name the driver of tests/fakecuda");
        return 77;
    }
    Suite *s = suite_create("errors of the CUDA driver");
    TCase *t = tcase_create("faults");
    tcase_add_test(t, an_error_that_lasts_is_reported_at_any_call);
    tcase_add_test(t, an_error_of_queued_work_is_reported);
    tcase_add_loop_test(t, an_error_that_passes_leaves_nothing_behind, 0, (int)(sizeof fallible / sizeof fallible[0]));
    tcase_set_timeout(t, 300);
    suite_add_tcase(s, t);
    return suite_run(s);
}
#endif
