/* libeep over weights in GPU memory, with an engine that launches on a stream and runs ahead: on a GPU, or on the driver
 * of tests/fakecuda.  The test plays the engine and hands to the agent's core (agent_story.h) what the page shows.
 *
 * The last step's work is "slow" by a kernel that spins, and reads what it reads behind it. */
#ifndef HAVE_CUDA
#include <stdio.h>

int main(void)
{
    puts("skipped: this build has no cuda.h");
    return 77;
}
#else
#include "agent_story.h"
#include "engine_player.h"

#include "agent/cuda_driver.h"
#include "agent/libeep/device.h"
#include "agent/libeep/gate.h"
#include "tests/engine/kernels.h"

#define SLOW_MS 250u

static struct cuda_device *gpu;
static const struct cuda_driver *cu;
static CUstream stream;
static CUmodule module;
static CUfunction spin;
static uint8_t *pinned; /* 4 KiB, where copies from the device go */

static void ok(CUresult result)
{
    struct err err = {.text = ""};
    int rc = cuda_check(cu, result, &err, "play the engine");
    ck_assert_msg(rc == 0, "%s", err.text);
}

static void gpu_setup(void)
{
    struct err err = {.text = ""};
    agent_memory = "cuda";
    setup();
    ck_assert_msg(cuda_device_open("0", &gpu, &err) == 0, "%s", err.text);
    cu = &gpu->driver;
    ok(cu->cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    ok(cu->cuModuleLoadData(&module, kernels_image()));
    ok(cu->cuModuleGetFunction(&spin, module, "spin_kernel"));
    ok(cu->cuMemHostAlloc((void **)&pinned, 4096, 0));
    memset(pinned, 0, 4096);
}

static void gpu_teardown(void)
{
    eep_detach(eep);
    eep = NULL;
    ok(cu->cuStreamSynchronize(stream));
    ok(cu->cuMemFreeHost(pinned));
    ok(cu->cuModuleUnload(module));
    ok(cu->cuStreamDestroy(stream));
    cuda_device_close(gpu);
    teardown();
}

/* A stream that cannot write host memory by itself: host functions do (the fake driver refuses to pin the page). */
static void host_function_setup(void)
{
    setenv("FAKECUDA_FAIL", "cuMemHostRegister:1:801", 1);
    gpu_setup();
}

/* ---- the engine ---- */

static void launch_spin(unsigned ms)
{
    struct spin_args args = {(uint64_t)ms * 1000000};
    void *params[] = {&args};
    ok(cu->cuLaunchKernel(spin, 1, 1, 1, 32, 1, 1, 0, stream, params, NULL));
}

static void launch_read(void *to, const void *from, size_t bytes)
{
    ok(cu->cuMemcpyDtoHAsync(to, (CUdeviceptr)(uintptr_t)from, bytes, stream));
}

static void device_write(void *to, const void *from, size_t bytes)
{
    memcpy(pinned + 2048, from, bytes);
    ok(cu->cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)to, pinned + 2048, bytes, stream));
    ok(cu->cuStreamSynchronize(stream));
}

static struct eep_step begin_on(void *at, bool has_work, int timeout_ms, int expected)
{
    struct eep_step step = {.step = UINT64_MAX};
    int rc = eep_step_begin(eep, at, has_work, timeout_ms, &step);
    ck_assert_msg(rc == expected, "step_begin: %d instead of %d (%s)", rc, expected, rc < 0 ? eep_last_error() : "");
    return step;
}

static void end_on(void *at, bool any_work)
{
    ck_assert_msg(eep_step_end(eep, at, any_work) == 0, "%s", eep_last_error());
}

static uint64_t done(void)
{
    return atomic_load(&agent.page->done);
}

static void wait_done(uint64_t step)
{
    for (int i = 0; i < WAIT_S * 1000 && done() < step; i++)
        sleep_ms(1);
    ck_assert_uint_ge(done(), step);
}

static struct eep_tensor tensor(const char *name)
{
    struct eep_tensor t;
    ck_assert_msg(eep_tensor_get(eep, name, &t) == 0, "%s", eep_last_error());
    return t;
}

static void serve(void)
{
    attach();
    give_regions(1);
    join();
}

/* ---- memory ---- */

START_TEST(the_agents_regions_are_mapped)
{
    CUcontext before = NULL, after = NULL;
    struct eep_model model;
    ok(cu->cuCtxSetCurrent(NULL));
    attach();
    ok(cu->cuCtxGetCurrent(&before));
    ck_assert_ptr_null(before); /* as the caller left it */
    ok(cu->cuCtxSetCurrent(gpu->context));
    ck_assert_int_eq(eep_device(eep), 0);
    give_regions(2);
    ck_assert_int_eq(eep_model_get(eep, &model), 0);
    ck_assert_int_eq(model.device, 0);
    struct eep_tensor t = tensor("layers.1.experts.p1");
    ck_assert_int_eq(t.device, 0);
    device_write((char *)t.data + t.stride, "an expert", 10);
    ok(cu->cuCtxGetCurrent(&after));
    ck_assert_ptr_eq(after, gpu->context);

    eep_detach(eep); /* the bytes are the agent's */
    eep = NULL;
    records_expect(&agent.events, AE_ENGINE_DETACHED);
    attach();
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
    t = tensor("layers.1.experts.p1");
    launch_read(pinned, (char *)t.data + t.stride, 10);
    ok(cu->cuStreamSynchronize(stream));
    ck_assert_str_eq((char *)pinned, "an expert");
}
END_TEST

/* The engine lays out its own weights in the agent's GPU memory, and the agent takes their digests. */
START_TEST(a_layout_of_its_own_is_sealed)
{
    struct eep_options o = options_make();
    void *data;
    o.seals = "test";
    o.moe_layers = 1;
    o.logical_experts = 2;
    ck_assert_msg(eep_attach(&o, &eep) == 0, "%s", eep_last_error());
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
    struct expert_map *map = expert_map_new(1, 2, 1, 2);
    map->held[0] = 0;
    map->held[1] = 1;
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_LOAD, .map = map});
    records_expect(&said, EEP_EVENT_LOAD);
    struct eep_region_spec spec = {.expert = true, .layer = 0, .part = "w", .slots = 2, .stride = 64, .slot_bytes = 64,
                                   .dtype = "F32", .dims = 1, .shape = {16}};
    ck_assert_msg(eep_region_alloc(eep, &spec, &data) == 0, "%s", eep_last_error());
    device_write(data, "01234567890123456789012345678901234567890123456789012345678901234567890123456789", 81);
    ck_assert_msg(eep_seal(eep, NULL) == 0, "%s", eep_last_error());
    struct record sealed = records_expect(&agent.events, AE_ENGINE_SEALED);
    ck_assert_msg(sealed.code == 0, "%s", sealed.text);
    ck_assert_int_eq(sealed.load_map[0], 1); /* a digest that is not 0 */
    ck_assert_ptr_eq(tensor("layers.0.experts.w").data, data);
    expert_map_unref(map);
}
END_TEST

/* In a process of its own, which sees no GPU of the agent's. */
static int attach_elsewhere(const char *at)
{
    struct eep_options o = {.socket = at, .dispatch = EEP_DISPATCH_SOURCE_ROUTED, .on_event = engine_on_event,
                            .user = &said};
    records_init(&said);
    int rc = eep_attach(&o, &eep);
    printf("%d %s\n", rc, rc ? eep_last_error() : "");
    return 0;
}

/* This program again, as an engine; what it says at first. */
static FILE *engine_elsewhere(const char *environment, const char *how, char line[512])
{
    char command[512], self[256] = "";
    ck_assert_int_gt(readlink("/proc/self/exe", self, sizeof self - 1), 0);
    snprintf(command, sizeof command, "%s exec '%s' %s '%s'", environment, self, how, path);
    FILE *f = popen(command, "r");
    ck_assert_ptr_nonnull(f);
    ck_assert_ptr_nonnull(fgets(line, 512, f));
    return f;
}

START_TEST(an_engine_that_sees_other_gpus_is_told_so)
{
    char line[512] = "";
    pclose(engine_elsewhere("CUDA_VISIBLE_DEVICES=", "--attach", line));
    ck_assert_msg(strstr(line, "the agent's weights lie on GPU GPU-") != NULL, "%s", line);
    ck_assert_msg(atoi(line) == ERR_NOTFOUND || atoi(line) == ERR_UNSUPPORTED, "%s", line);
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
    records_expect(&agent.events, AE_ENGINE_DETACHED);
}
END_TEST

/* Its connection is lost, its process is not: its stream could still write to the page. */
static int attach_and_desert(const char *at)
{
    attach_elsewhere(at);
    printf("%ld\n", (long)getpid());
    fflush(stdout);
    for (int fd = 3; fd < 256; fd++)
        shutdown(fd, SHUT_RDWR);
    sleep(60);
    return 0;
}

START_TEST(no_engine_while_its_predecessor_lives)
{
    char line[512] = "";
    FILE *f = engine_elsewhere("", "--desert", line);
    ck_assert_int_eq(atoi(line), 0);
    ck_assert_ptr_nonnull(fgets(line, sizeof line, f));
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
    records_expect(&agent.events, AE_ENGINE_DETACHED);
    struct eep_options o = options_make();
    ck_assert_int_eq(eep_attach(&o, &eep), ERR_CONFLICT);
    ck_assert_msg(strstr(eep_last_error(), "has not ended") != NULL, "%s", eep_last_error());
    ck_assert_int_eq(kill((pid_t)atol(line), SIGKILL), 0);
    pclose(f);
    attach();
}
END_TEST

/* ---- steps ---- */

START_TEST(done_comes_in_stream_order)
{
    serve();
    uint64_t began = clock_now_ms();
    for (uint64_t n = 1; n <= 3; n++) {
        ck_assert_uint_eq(begin_on(stream, true, -1, EEP_STEP_RUN).step, n);
        launch_spin(n == 1 ? SLOW_MS : 1);
        end_on(stream, true);
    }
    ck_assert_uint_lt(clock_now_ms() - began, SLOW_MS); /* nobody waited for the device */
    ck_assert_uint_eq(atomic_load(&agent.page->launched), 3);
    ck_assert_uint_eq(done(), 0);
    wait_done(3); /* though no boundary is passed */
    ck_assert_uint_ge(clock_now_ms() - began, SLOW_MS);

    agent_store(&agent, PAGE_NOTIFY_DONE, 4);
    unsigned bells = agent_bells(&agent);
    begin_on(stream, true, -1, EEP_STEP_RUN);
    end_on(stream, true);
    wait_done(4);
    begin_on(stream, true, -1, EEP_STEP_RUN);
    agent_expect_bell(&agent, bells);
    end_on(stream, false);
    wait_done(5);
    begin_on(stream, false, 0, EEP_STEP_IDLE);
    /* On the device: the shortest of them is one that spins for 1 ms, or one with nothing to do. */
    ck_assert_uint_lt(atomic_load(&agent.page->step_ns_min), SLOW_MS * 1000000u);
}
END_TEST

START_TEST(durations_are_those_of_the_device)
{
    serve();
    for (uint64_t n = 1; n <= 6; n++) {
        begin_on(stream, true, -1, EEP_STEP_RUN);
        launch_spin(20);
        end_on(stream, true);
    }
    wait_done(6);
    begin_on(stream, true, -1, EEP_STEP_RUN); /* what has ended is known at the next boundary */
    ck_assert_uint_ge(atomic_load(&agent.page->step_ns_min), 19000000);
    end_on(stream, false);
}
END_TEST

START_TEST(it_runs_ahead_for_so_long)
{
    serve();
    begin_on(stream, true, -1, EEP_STEP_RUN);
    launch_spin(SLOW_MS);
    end_on(stream, true);
    for (unsigned n = 2; n <= DEVICE_STEPS_AHEAD; n++) {
        begin_on(stream, true, -1, EEP_STEP_RUN);
        end_on(stream, true);
    }
    ck_assert_uint_eq(done(), 0);
    begin_on(stream, true, -1, EEP_STEP_RUN); /* the ring is full: after the first has ended */
    ck_assert_uint_ge(done(), 1);
    end_on(stream, false);
    wait_done(DEVICE_STEPS_AHEAD + 1);
}
END_TEST

START_TEST(two_streams_are_ordered)
{
    CUstream other;
    serve();
    ok(cu->cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
    begin_on(stream, true, -1, EEP_STEP_RUN);
    launch_spin(SLOW_MS);
    end_on(stream, true);
    begin_on(other, true, -1, EEP_STEP_RUN);
    end_on(other, true);
    sleep_ms(30);
    ck_assert_uint_eq(done(), 0); /* 2 is not told before 1 */
    wait_done(2);
    begin_on(NULL, true, -1, EEP_STEP_RUN); /* without one: complete when it is ended */
    end_on(NULL, false);
    ck_assert_uint_eq(done(), 3);
    ok(cu->cuStreamDestroy(other));
}
END_TEST

START_TEST(a_failed_step_counts_until_the_device_has_left_it)
{
    serve();
    begin_on(stream, true, -1, EEP_STEP_RUN);
    launch_spin(SLOW_MS);
    ck_assert_int_eq(eep_step_failed(eep), 0);
    records_expect(&agent.events, AE_ENGINE_LEFT_STEP);
    ck_assert_uint_eq(atomic_load(&agent.page->launched), 1);
    ck_assert_uint_eq(done(), 0);
    wait_done(1);
}
END_TEST

START_TEST(detaching_waits_for_what_was_launched)
{
    serve();
    begin_on(stream, true, -1, EEP_STEP_RUN);
    launch_spin(SLOW_MS);
    launch_read(pinned, tensor("dense").data, 64); /* it would fail if the region were gone */
    end_on(stream, false);
    eep_detach(eep);
    eep = NULL;
    ck_assert_uint_eq(done(), 1);
    records_expect(&agent.events, AE_ENGINE_DETACHED);
    ok(cu->cuStreamSynchronize(stream));
}
END_TEST

/* ---- maps ---- */

static void send_map(uint64_t version, unsigned shift)
{
    struct view *view = view_make(1, 2, 0, version, shift);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_MAP, .map = view->map});
    view_unref(view);
    agent_store(&agent, PAGE_MAP_PENDING, version);
    agent_wake(&agent);
}

START_TEST(maps_change_in_stream_order)
{
    serve();
    const struct eep_maps *maps = eep_maps_get(eep);
    ck_assert_int_eq(maps->device, 0);
    const int32_t *at = maps->device_physical_to_logical_map;
    const int32_t *seen = (const int32_t *)(const void *)pinned;
    for (unsigned v = 1; v <= 6; v++) { /* more than there are pinned buffers, all while the first step runs */
        if (v > 1)
            send_map(v, v - 1);
        while (!begin_on(stream, true, -1, EEP_STEP_RUN).map_changed) { /* its message is on its way */
            end_on(stream, true);
            sleep_ms(1);
        }
        if (v == 1)
            launch_spin(SLOW_MS);
        launch_read(pinned + v * 64, at, 4 * sizeof(int32_t));
        launch_read(pinned + v * 64 + 16, maps->device_logical_replica_count, sizeof(int32_t));
        launch_read(pinned + v * 64 + 20, maps->device_logical_to_physical_map, 2 * sizeof(int32_t));
        end_on(stream, true);
        ck_assert_ptr_eq(maps->device_physical_to_logical_map, at);
    }
    ok(cu->cuStreamSynchronize(stream));
    for (unsigned v = 1; v <= 6; v++) {
        const int32_t *s = seen + v * 16;
        for (unsigned slot = 0; slot < SLOTS; slot++)
            ck_assert_int_eq(s[slot], (int)((slot + v - 1) % LOGICAL));
        ck_assert_int_eq(s[4], 2);
        unsigned slot = (LOGICAL - (v - 1) % LOGICAL) % LOGICAL; /* of expert 0 */
        ck_assert_int_eq(s[5], (int)slot);
        ck_assert_int_eq(s[6], (int)(SLOTS + slot));
    }
}
END_TEST

START_TEST(load_counters_come_to_the_agent)
{
    uint32_t layers, slots;
    uint64_t tokens[LAYERS * SLOTS] = {0};
    serve();
    begin_on(stream, true, -1, EEP_STEP_RUN);
    tokens[5] = 77;
    device_write(eep_maps_get(eep)->device_expert_load, tokens, sizeof tokens);
    end_on(stream, false);
    wait_done(1);
    ck_assert_uint_eq(engine_socket_load(agent.socket, &layers, &slots)[5], 77);
    eep_detach(eep);
    eep = NULL;
    records_expect(&agent.events, AE_ENGINE_DETACHED);
    attach(); /* another engine counts on from there */
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
    launch_read(pinned, eep_maps_get(eep)->device_expert_load, sizeof tokens);
    ok(cu->cuStreamSynchronize(stream));
    ck_assert_mem_eq(pinned, tokens, sizeof tokens);
}
END_TEST

/* ---- the grace of a retired slot ---- */

/* What the page shows, for the core. */
static void story_looks(struct story *s, enum agent_event_type event)
{
    s->page.intent = atomic_load(&agent.page->intent);
    s->page.done = done();
    s->page.cur_view = atomic_load(&agent.page->cur_view);
    s->page.engine_state = atomic_load(&agent.page->engine_state);
    s->page.map_applied_step = atomic_load(&agent.page->map_applied_step);
    s->page.map_applied = atomic_load(&agent.page->map_applied);
    story_happens(s, event);
}

static bool story_said(struct story *s, const char *text)
{
    bool yes = strstr(s->trace, text) != NULL;
    if (yes)
        story_forget(s);
    return yes;
}

/* Slot 0 is read at the end of each step before the map that retires it; the engine is two steps ahead of the device.
 * The core says when the slot may be filled, and it is filled at once.  Returns how many steps read the new bytes.
 *
 * planted: the mistake of saying that a step is complete when it has been launched. */
static unsigned steps_that_read_the_fill(bool planted)
{
    serve();
    struct eep_tensor slot = tensor("layers.0.experts.p0");
    struct story *s = story_serving(2);
    device_write(slot.data, "old", 4);
    story_op_begin(s, 2, OP_SCALE_DOWN, ROLE_REMAINING, 2, 2, 0);
    bool retired = false;
    uint64_t n = 0;
    char ack[64];
    while (!retired) {
        n++;
        if (n == 3) { /* the map that retires slot 0; mostly it is applied at the beginning of step 3 */
            story_map(s, 1, 2, 2, 2);
            send_map(2, 1);
            sleep_ms(10);
        }
        retired = begin_on(stream, true, -1, EEP_STEP_RUN).map_changed && n > 1;
        if (n < 3)
            launch_spin(SLOW_MS);
        if (!retired)
            launch_read(pinned + n * 4, slot.data, 4);
        end_on(stream, true);
        if (planted)
            gate_done(agent.page, n);
        ck_assert_uint_lt(n, 400);
    }
    ck_assert(planted || done() == 0); /* two steps ahead, at least */
    snprintf(ack, sizeof ack, "send MAP_ACK 2 from step %" PRIu64, n);
    story_looks(s, AE_BELL);
    ck_assert_msg(story_said(s, ack), "%s", s->trace);
    struct msg m = story_stage_msg(2, STAGE_GRACE, 1);
    m.stage.step = n;
    story_told(s, &m);
    for (int i = 0; i < WAIT_S * 1000 && !story_said(s, "send STAGE_DONE GRACE"); i++) {
        sleep_ms(1);
        s->now += STORY_MS;
        story_looks(s, AE_TICK);
    }
    uint64_t at = done();
    CUstream filler; /* another process, really: it waits for nothing but the core's word */
    ok(cu->cuStreamCreate(&filler, CU_STREAM_NON_BLOCKING));
    memcpy(pinned + 2048, "new", 4);
    ok(cu->cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)slot.data, pinned + 2048, 4, filler));
    ok(cu->cuStreamSynchronize(filler));
    ok(cu->cuStreamDestroy(filler));
    ok(cu->cuStreamSynchronize(stream));
    ck_assert(planted || at >= n - 1);
    story_free(s);
    unsigned wrong = 0;
    for (uint64_t i = 1; i < n; i++)
        wrong += strcmp((char *)pinned + i * 4, "old") != 0;
    return wrong;
}

START_TEST(a_slot_is_filled_when_the_device_has_read_it)
{
    ck_assert_uint_eq(steps_that_read_the_fill(false), 0);
}
END_TEST

START_TEST(planted_complete_when_launched)
{
    ck_assert_uint_gt(steps_that_read_the_fill(true), 0);
}
END_TEST

/* ---- */

static void add_steps(TCase *tc)
{
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, done_comes_in_stream_order);
    tcase_add_test(tc, it_runs_ahead_for_so_long);
    tcase_add_test(tc, two_streams_are_ordered);
    tcase_add_test(tc, a_failed_step_counts_until_the_device_has_left_it);
    tcase_add_test(tc, detaching_waits_for_what_was_launched);
    tcase_add_test(tc, a_slot_is_filled_when_the_device_has_read_it);
}

int main(int argc, char **argv)
{
    struct gpu first;
    size_t n = 0;
    struct err err = {.text = ""};
    if (argc == 3 && strcmp(argv[1], "--attach") == 0)
        return attach_elsewhere(argv[2]);
    if (argc == 3 && strcmp(argv[1], "--desert") == 0)
        return attach_and_desert(argv[2]);
    /* In a process of its own: neither driver nor context survives the forks of the tests. */
    pid_t pid = fork();
    if (pid == 0)
        _exit(gpu_list(&first, 1, &n, &err) < 0 || n == 0 ? 1 : 0);
    int status = 1;
    waitpid(pid, &status, 0);
    if (status != 0 || !kernels_image()) {
        puts(status ? "skipped: there is no GPU here" : "skipped: this build has no kernels (nvcc)");
        return 77;
    }
    Suite *suite = suite_create("libeep on a GPU");
    TCase *tc = tcase_create("memory, maps");
    tcase_add_checked_fixture(tc, gpu_setup, gpu_teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, the_agents_regions_are_mapped);
    tcase_add_test(tc, a_layout_of_its_own_is_sealed);
    tcase_add_test(tc, an_engine_that_sees_other_gpus_is_told_so);
    tcase_add_test(tc, no_engine_while_its_predecessor_lives);
    tcase_add_test(tc, maps_change_in_stream_order);
    tcase_add_test(tc, load_counters_come_to_the_agent);
    suite_add_tcase(suite, tc);
    tc = tcase_create("steps");
    tcase_add_checked_fixture(tc, gpu_setup, gpu_teardown);
    add_steps(tc);
    tcase_add_test(tc, durations_are_those_of_the_device);
    tcase_add_test(tc, planted_complete_when_launched);
    suite_add_tcase(suite, tc);
    tc = tcase_create("steps whose end a host function tells");
    tcase_add_checked_fixture(tc, host_function_setup, gpu_teardown);
    add_steps(tc);
    suite_add_tcase(suite, tc);
    return suite_run(suite);
}
#endif
