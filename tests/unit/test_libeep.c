/* Attaching to a real engine socket, and weights: the test plays the agent's core and the engine.
 *
 *   test_libeep                        the tests
 *   test_libeep probe-agent SOCKET     an agent that puts its engine into a view of one rank, until its stdin closes
 *   test_libeep probe-attach SOCKET    an engine that attaches and sleeps
 *   test_libeep probe-engine SOCKET N  an engine that runs N steps (tests/integration/steps_no_syscall.sh) */
#include "engine_player.h"

#include <spawn.h>

/* ---- attaching ---- */

START_TEST(attach_says_who_and_a_second_is_refused)
{
    struct eep_options o = options_make();
    ck_assert_int_eq(eep_attach(&o, &eep), 0);
    struct record r = records_expect(&agent.events, AE_ENGINE_ATTACHED);
    ck_assert_str_eq(r.endpoint, "unix:/engine-0");
    ck_assert_uint_eq(r.dispatch, DISPATCH_SOURCE_ROUTED);
    ck_assert_uint_eq(r.bytes, 777);
    ck_assert(!r.seals);

    struct eep *second = NULL;
    ck_assert_int_eq(eep_attach(&o, &second), ERR_CONFLICT);
    ck_assert_ptr_null(second);
    ck_assert_ptr_nonnull(strstr(eep_last_error(), "another engine"));
    ck_assert_ptr_nonnull(strstr(eep_last_error(), "gpu0"));
    records_expect_none(&agent.events, 20);

    ck_assert_int_eq(eep_set_endpoint(eep, "tcp:elsewhere"), 0);
    ck_assert_str_eq(records_expect(&agent.events, AE_ENGINE_ENDPOINT).endpoint, "tcp:elsewhere");

    eep_detach(eep);
    eep = NULL;
    ck_assert_ptr_nonnull(strstr(records_expect(&agent.events, AE_ENGINE_DETACHED).text, "goodbye"));
    ck_assert_uint_eq(atomic_load(&agent.page->engine_state), PAGE_ENGINE_NONE);
    attach();
}
END_TEST

START_TEST(attach_without_an_agent_says_so)
{
    struct eep_options o = options_make();
    o.socket = "/nonexistent/engine";
    ck_assert_int_eq(eep_attach(&o, &eep), ERR_UNREACHABLE);
    ck_assert_ptr_nonnull(strstr(eep_last_error(), "/nonexistent/engine"));
    o = options_make();
    o.dispatch = 0;
    ck_assert_int_eq(eep_attach(&o, &eep), ERR_INVALID);
    ck_assert_ptr_null(eep);
}
END_TEST

START_TEST(a_killed_engine_is_noticed)
{
    char *argv[] = {"test_libeep", "probe-attach", path, NULL};
    pid_t pid;
    ck_assert_int_eq(posix_spawn(&pid, "/proc/self/exe", NULL, NULL, argv, environ), 0);
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    struct eep_options o = options_make(); /* at once: the agent notices that the old one is gone */
    ck_assert_msg(eep_attach(&o, &eep) == 0, "%s", eep_last_error());
    ck_assert_ptr_nonnull(strstr(records_expect(&agent.events, AE_ENGINE_DETACHED).text, "process ended"));
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
}
END_TEST

static int raw_connect(void)
{
    struct sockaddr_un {
        sa_family_t family;
        char path[108];
    } a = {.family = AF_UNIX};
    strcpy(a.path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    return fd;
}

/* Each of these ends the connection, raises nothing (it never attached), and leaves the socket fit for the next. */
START_TEST(nonsense_ends_the_connection)
{
    static const struct {
        unsigned char bytes[12];
        size_t len;
    } cases[] = {
        {{0xff, 0xff, 0xff, 0xff, 0, 1, 0, 0}, 8},             /* longer than allowed */
        {{0, 0, 0, 1, 0, 2, 0, 0, 0}, 9},                      /* the other direction's type */
        {{0, 0, 0, 0, 0, 1, 0, 3}, 8},                         /* descriptors that did not come */
        {{0, 0, 0, 2, 0, 1, 0, 0, 0xff, 0xff}, 10},            /* no message */
        {{0, 0, 0, 2, 0, 1, 0, 0, 0x1a, 0x00}, 10},            /* `drained` before `attach` */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int fd = raw_connect();
        ck_assert_int_eq(write(fd, cases[i].bytes, cases[i].len), (ssize_t)cases[i].len);
        struct pollfd p = {.fd = fd, .events = POLLIN};
        char c;
        ck_assert_int_eq(poll(&p, 1, WAIT_S * 1000), 1);
        ck_assert_msg(read(fd, &c, 1) <= 0, "case %zu was answered", i);
        close(fd);
    }
    records_expect_none(&agent.events, 10);
    attach();
}
END_TEST

START_TEST(cut_off_ends_a_hold)
{
    attach();
    join();
    begin(true, -1, EEP_STEP_RUN);
    end(true);
    agent_store(&agent, PAGE_GATE, 2);
    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_DETACH, .text = "in doubt for too long"});
    beginner_join(&b, ERR_UNREACHABLE);
    ck_assert_ptr_nonnull(strstr(records_expect(&said, EEP_EVENT_DETACHED).text, "in doubt for too long"));
    ck_assert_ptr_nonnull(strstr(records_expect(&agent.events, AE_ENGINE_DETACHED).text, "cut off"));
    ck_assert(readable(eep_revoke_fd(eep)));
    ck_assert_int_eq(eep_drained(eep), ERR_UNREACHABLE);
}
END_TEST

/* ---- weights ---- */

static uint32_t region_named(const struct weights *w, const char *name)
{
    for (uint32_t i = 0; i < w->manifest.n_regions; i++)
        if (strcmp(w->manifest.regions[i].name, name) == 0)
            return i;
    ck_abort_msg("no region %s", name);
}

START_TEST(regions_are_the_agents_bytes)
{
    attach();
    struct eep_model model;
    struct eep_tensor t;
    ck_assert_int_eq(eep_model_get(eep, &model), ERR_NOTFOUND);
    ck_assert_ptr_null(eep_maps_get(eep));
    give_regions(16);
    ck_assert_int_eq(eep_model_get(eep, &model), 0);
    ck_assert_uint_eq(model.layers, LAYERS);
    ck_assert_uint_eq(model.slots, SLOTS);
    ck_assert_str_eq(model.config, "{\"hidden\": 8}");
    ck_assert_int_eq(eep_tensor_get(eep, "no such tensor", &t), ERR_NOTFOUND);

    const struct weights *w = worker_weights(agent.worker);
    ck_assert_int_eq(eep_tensor_get(eep, "layers.1.experts.p15", &t), 0);
    ck_assert_uint_eq(t.dims, 2);
    ck_assert_uint_eq(t.shape[0], SLOTS);
    ck_assert_uint_eq(t.shape[1], 50);
    ck_assert_uint_eq(t.stride, 256);
    ck_assert_str_eq(t.dtype, "F32");
    uint32_t at = region_named(w, "layers.1.experts.p15");
    ck_assert_ptr_ne(t.data, w->regions[at].base); /* two mappings ... */
    strcpy((char *)w->regions[at].base + 2 * 256, "third slot");
    ck_assert_str_eq((char *)t.data + 2 * t.stride, "third slot"); /* ... of the same bytes */
    ck_assert_int_eq(eep_tensor_get(eep, "dense", &t), 0);
    strcpy(t.data, "from the engine");
    ck_assert_str_eq(w->regions[region_named(w, "dense")].base, "from the engine");

    const struct eep_maps *maps = eep_maps_get(eep);
    uint32_t layers, slots;
    maps->expert_load[1 * SLOTS + 2] = 99;
    ck_assert_uint_eq(engine_socket_load(agent.socket, &layers, &slots)[1 * SLOTS + 2], 99);
    ck_assert_uint_eq(layers, LAYERS);
    ck_assert_uint_eq(slots, SLOTS);
}
END_TEST

/* More regions than descriptors fit into one message. */
static void allocate_many(struct agent *a, void *arg)
{
    (void)arg;
    struct manifest m = {.producer = "test", .layers = 225, .logical = 1, .slots = 1};
    for (uint32_t layer = 0; layer < m.layers; layer++) {
        struct region r = {.kind = REGION_EXPERT, .bytes = 64, .layer = layer, .slots = 1, .stride = 64, .slot_bytes = 64};
        strcpy(r.part, "w");
        snprintf(r.name, sizeof r.name, "layers.%u.experts.w", layer);
        region_put(&m, &r, "U8", 64);
    }
    struct model *model = model_new(m.layers, 1, 1, 0);
    ck_assert_int_eq(manifest_encode(&m, &model->manifest, NULL), 0);
    model->manifest_digest = manifest_digest(model->manifest);
    model->expert_bytes = 64;
    manifest_done(&m);
    struct work work = {.id = 7, .kind = WORK_ALLOCATE, .model = model};
    worker_submit(a->worker, &work);
}

START_TEST(regions_come_in_several_messages)
{
    attach();
    agent_run(&agent, allocate_many, NULL);
    ck_assert_int_eq(records_expect(&agent.events, AE_WORK_DONE).code, 0);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
    const struct weights *w = worker_weights(agent.worker);
    for (uint32_t i = 0; i < 225; i++) {
        struct eep_tensor t;
        snprintf(w->regions[i].base, 64, "region %u", i);
        ck_assert_int_eq(eep_tensor_get(eep, w->manifest.tensors[i].name, &t), 0);
        ck_assert_str_eq(t.data, w->regions[w->manifest.tensors[i].region].base);
    }
}
END_TEST

/* ---- a layout of the engine's own ---- */

static void attach_sealing(void)
{
    struct eep_options o = options_make();
    o.seals = "fused-transposed";
    o.moe_layers = LAYERS;
    o.logical_experts = LOGICAL;
    ck_assert_int_eq(eep_attach(&o, &eep), 0);
    struct record r = records_expect(&agent.events, AE_ENGINE_ATTACHED);
    ck_assert(r.seals);
    ck_assert_uint_eq(r.layers, LAYERS);
    ck_assert_uint_eq(r.logical, LOGICAL);
}

static void ask_to_load(uint32_t self)
{
    struct view *view = view_make(1, 2, 0, 1, 0);
    view->map->held[expert_map_at(view->map, 0, self, 3)] = -1;
    view->map->live[expert_map_at(view->map, 0, self, 3)] = 0;
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_LOAD, .map = view->map, .self = self, .op = 1});
    view_unref(view);
}

static char *expert_region(uint32_t layer)
{
    struct eep_region_spec spec = {.expert = true, .layer = layer, .part = "fused", .slots = SLOTS, .stride = 128,
                                   .slot_bytes = 96, .dtype = "F32", .dims = 2, .shape = {3, 8}};
    void *data = NULL;
    int rc = eep_region_alloc(eep, &spec, &data);
    ck_assert_msg(rc == 0, "%s", eep_last_error());
    return data;
}

START_TEST(an_engine_seals_its_own_layout)
{
    attach_sealing();
    void *dense = NULL;
    struct eep_region_spec spec = {.name = "dense", .bytes = 512};
    ck_assert_int_eq(eep_region_alloc(eep, &spec, &dense), ERR_INVALID); /* nobody asked */
    ask_to_load(1);
    struct record r = records_expect(&said, EEP_EVENT_LOAD);
    ck_assert_uint_eq(r.n, SLOTS);
    ck_assert_uint_eq(r.layers, LAYERS);
    ck_assert_int_eq(r.load_map[2], 2);
    ck_assert_int_eq(r.load_map[3], -1);

    ck_assert_int_eq(eep_region_alloc(eep, &spec, &dense), 0);
    ck_assert_int_eq(eep_region_alloc(eep, &spec, &dense), ERR_CONFLICT); /* the agent refuses the same name */
    uint64_t shape[] = {2, 4};
    ck_assert_int_eq(eep_tensor_add(eep, "dense", "embed", 64, "F32", 2, shape), 0);
    ck_assert_int_eq(eep_tensor_add(eep, "nowhere", "x", 0, "F32", 2, shape), ERR_NOTFOUND);
    char *layer0 = expert_region(0);
    ck_assert_int_lt(eep_seal(eep, NULL), 0); /* layer 1 is missing */
    char *layer1 = expert_region(1);
    memset(dense, 1, 512);
    for (unsigned s = 0; s < SLOTS; s++) {
        memset(layer0 + 128 * s, 16 + (int)s, 96);
        memset(layer1 + 128 * s, 32 + (int)s, 96);
    }
    int rc = eep_seal(eep, "{\"layout\": 1}");
    ck_assert_msg(rc == 0, "%s", eep_last_error());
    struct record sealed = records_expect(&agent.events, AE_ENGINE_SEALED);
    ck_assert_msg(sealed.code == 0, "%s", sealed.text);
    ck_assert_uint_ne(sealed.value, 0);
    ck_assert_int_eq(sealed.load_map[0], 1); /* expert 0 of layer 0 has a digest */
    ck_assert_int_eq(sealed.load_map[3], 0); /* expert 3 was not loaded here */

    struct eep_tensor t;
    ck_assert_int_eq(eep_tensor_get(eep, "embed", &t), 0);
    ck_assert_ptr_eq(t.data, (char *)dense + 64);
    ck_assert_int_eq(eep_tensor_get(eep, "layers.1.experts.fused", &t), 0);
    ck_assert_ptr_eq(t.data, layer1);
    ck_assert_uint_eq(t.dims, 3);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
    ck_assert_int_eq(eep_tensor_get(eep, "layers.1.experts.fused", &t), 0);
    ck_assert_ptr_eq(t.data, layer1); /* still where the engine put it */
    const struct weights *w = worker_weights(agent.worker);
    ck_assert_str_eq(w->manifest.producer, "fused-transposed");
    ck_assert_int_eq(((char *)w->regions[region_named(w, "layers.1.experts.fused")].base)[128], 33);
    struct eep_model model;
    ck_assert_int_eq(eep_model_get(eep, &model), 0);
    ck_assert_str_eq(model.config, "{\"layout\": 1}");
}
END_TEST

START_TEST(an_engine_that_dies_before_sealing_leaves_nothing)
{
    attach_sealing();
    ask_to_load(0);
    records_expect(&said, EEP_EVENT_LOAD);
    expert_region(0);
    eep_detach(eep);
    records_expect(&agent.events, AE_ENGINE_DETACHED);
    attach_sealing();
    ask_to_load(0);
    records_expect(&said, EEP_EVENT_LOAD);
    expert_region(0); /* the name is free again */
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_ABORT, .op = 1});
    ck_assert_uint_eq(records_expect(&said, EEP_EVENT_ABORT).op, 1);
    ask_to_load(0);
    records_expect(&said, EEP_EVENT_LOAD);
    expert_region(0);
}
END_TEST

/* ---- probe ---- */

static const char *probe_path;

START_TEST(probe_agent_lives)
{
    records_init(&said);
    agent_start(&agent, probe_path);
    printf("ready\n");
    fflush(stdout);
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
    join();
    char c;
    while (read(0, &c, 1) > 0)
        ;
    agent_stop(&agent);
}
END_TEST

/* The harness asserts, so it lives in a test. */
static int probe_agent(const char *socket_path)
{
    probe_path = socket_path;
    Suite *suite = suite_create("probe");
    TCase *tc = tcase_create("agent");
    tcase_add_test(tc, probe_agent_lives);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_SILENT);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}

static int probe_attach(const char *socket_path)
{
    records_init(&said);
    struct eep_options o = options_make();
    o.socket = socket_path;
    if (eep_attach(&o, &eep))
        return 1;
    for (;;)
        pause(); /* until it is killed */
}

static int probe_engine(const char *socket_path, long steps)
{
    records_init(&said);
    struct eep_options o = options_make();
    struct eep_step s;
    struct eep_stats before, after;
    o.socket = socket_path;
    if (eep_attach(&o, &eep) || eep_step_begin(eep, NULL, false, -1, &s) != EEP_STEP_RUN)
        return 1;
    eep_step_end(eep, NULL, true);
    eep_stats_get(eep, &before);
    for (long i = 0; i < steps; i++)
        if (eep_step_begin(eep, NULL, true, 0, &s) != EEP_STEP_RUN || eep_step_end(eep, NULL, true))
            return 1;
    eep_stats_get(eep, &after);
    eep_detach(eep);
    printf("steps %llu boundary_syscalls %llu\n", (unsigned long long)(after.steps - before.steps),
           (unsigned long long)(after.boundary_syscalls - before.boundary_syscalls));
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "probe-agent") == 0)
        return probe_agent(argv[2]);
    if (argc == 3 && strcmp(argv[1], "probe-attach") == 0)
        return probe_attach(argv[2]);
    if (argc == 4 && strcmp(argv[1], "probe-engine") == 0)
        return probe_engine(argv[2], atol(argv[3]));

    Suite *suite = suite_create("libeep");
    TCase *tc = group(suite, "attach");
    tcase_add_test(tc, attach_says_who_and_a_second_is_refused);
    tcase_add_test(tc, attach_without_an_agent_says_so);
    tcase_add_test(tc, a_killed_engine_is_noticed);
    tcase_add_test(tc, nonsense_ends_the_connection);
    tcase_add_test(tc, cut_off_ends_a_hold);
    tc = group(suite, "weights");
    tcase_add_test(tc, regions_are_the_agents_bytes);
    tcase_add_test(tc, regions_come_in_several_messages);
    tcase_add_test(tc, an_engine_seals_its_own_layout);
    tcase_add_test(tc, an_engine_that_dies_before_sealing_leaves_nothing);
    return suite_run(suite);
}
