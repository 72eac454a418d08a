/* libeep against a real engine socket: the test plays the agent's core and the engine.
 *
 *   test_libeep                        the tests
 *   test_libeep probe-agent SOCKET     an agent that puts its engine into a view of one rank, until its stdin closes
 *   test_libeep probe-attach SOCKET    an engine that attaches and sleeps
 *   test_libeep probe-engine SOCKET N  an engine that runs N steps (tests/integration/steps_no_syscall.sh) */
#include "engine_harness.h"

#include <spawn.h>

static struct agent agent;
static struct records said; /* by libeep */
static struct eep *eep;
static char dir[] = "/tmp/eep-test-XXXXXX";
static char path[64];

static struct eep_options options_make(void)
{
    return (struct eep_options){.socket = path,
                                .endpoint = "unix:/engine-0",
                                .dispatch = EEP_DISPATCH_SOURCE_ROUTED,
                                .kv_bytes = 777,
                                .max_ranks = 8,
                                .on_event = engine_on_event,
                                .user = &said};
}

static void attach(void)
{
    struct eep_options o = options_make();
    int rc = eep_attach(&o, &eep);
    ck_assert_msg(rc == 0, "%s", eep_last_error());
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
}

static void setup(void)
{
    strcpy(dir, "/tmp/eep-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/engine", dir);
    records_init(&said);
    eep = NULL;
    agent_start(&agent, path);
}

static void teardown(void)
{
    eep_detach(eep);
    agent_stop(&agent);
    rmdir(dir);
}

/* ---- the core's part of a commit, in the order that the protocol asks for ---- */

static void send_commit(struct view *view, uint64_t step)
{
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_COMMIT, .view = view, .epoch = view->epoch, .value = step});
}

static void write_flip(uint64_t epoch, uint64_t step, bool leaver)
{
    agent_store(&agent, PAGE_FLIP_WAVE, epoch * 10);
    agent_store(&agent, PAGE_FLIP_STEP, step);
    agent_store(&agent, PAGE_FLIP_VIEW, epoch);
    agent_store(&agent, PAGE_RUN_TO, leaver ? step : step + 1);
    agent_store(&agent, PAGE_GATE, leaver ? step : GATE_OPEN);
    agent_wake(&agent);
}

static void go(uint64_t epoch, uint32_t n, int self, uint64_t version, unsigned shift, uint64_t step)
{
    struct view *view = view_make(epoch, n, self, version, shift);
    send_commit(view, step);
    view_unref(view);
    write_flip(epoch, step, self < 0);
}

static void join(void)
{
    agent_store(&agent, PAGE_NEXT_STEP, 1);
    go(1, 2, 0, 1, 0, 1);
}

static void allocate(struct agent *a, void *parts)
{
    struct work work = {.id = 7, .kind = WORK_ALLOCATE, .model = model_make(*(uint32_t *)parts)};
    worker_submit(a->worker, &work);
}

static void give_regions(uint32_t parts)
{
    agent_run(&agent, allocate, &parts);
    struct record done = records_expect(&agent.events, AE_WORK_DONE);
    ck_assert_msg(done.code == 0, "%s", done.text);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
}

static struct eep_step begin(bool has_work, int timeout_ms, int expected)
{
    struct eep_step step = {.step = UINT64_MAX};
    int rc = eep_step_begin(eep, NULL, has_work, timeout_ms, &step);
    ck_assert_msg(rc == expected, "step_begin: %d instead of %d (%s)", rc, expected, rc < 0 ? eep_last_error() : "");
    return step;
}

static void end(bool any_work)
{
    ck_assert_int_eq(eep_step_end(eep, NULL, any_work), 0);
}

/* ---- a second thread that begins one step ---- */

struct beginner {
    pthread_t thread;
    bool has_work;
    int timeout_ms, rc;
    struct eep_step step;
};

static void *beginner_main(void *user)
{
    struct beginner *b = user;
    b->rc = eep_step_begin(eep, NULL, b->has_work, b->timeout_ms, &b->step);
    return NULL;
}

static void beginner_start(struct beginner *b, bool has_work, int timeout_ms)
{
    *b = (struct beginner){.has_work = has_work, .timeout_ms = timeout_ms};
    ck_assert_int_eq(pthread_create(&b->thread, NULL, beginner_main, b), 0);
}

static void beginner_join(struct beginner *b, int expected)
{
    pthread_join(b->thread, NULL);
    ck_assert_int_eq(b->rc, expected);
}

static bool readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) == 1;
}

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
    ck_assert_str_eq(records_expect(&agent.events, AE_ENGINE_ATTACHED).endpoint, "tcp:elsewhere");

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
    begin(true, 0, EEP_STEP_RUN);
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

/* ---- views ---- */

START_TEST(prepare_commit_and_flip_at_the_step)
{
    attach();
    give_regions(2);
    begin(true, 0, EEP_STEP_IDLE); /* a spare runs nothing, whatever it has */
    ck_assert_uint_eq(atomic_load(&agent.page->intent), 0);

    struct view *proposed = view_make(0, 3, 1, 2, 1);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_PREPARE, .view = proposed, .op = 5, .attempt = 2});
    view_unref(proposed);
    struct record p = records_expect(&said, EEP_EVENT_PREPARE);
    ck_assert_uint_eq(p.op, 5);
    ck_assert_int_eq(p.view->rank, 1);
    ck_assert_uint_eq(p.view->n, 3);
    ck_assert_uint_eq(p.view->kv_bytes, 1234);
    ck_assert_str_eq(p.view->members[2].endpoint, "unix:/engine-2");
    eep_view_unref(p.view);
    ck_assert_int_eq(eep_prepared(eep, p.op, p.attempt, ERR_IO, "no room"), 0);
    struct record r = records_expect(&agent.events, AE_ENGINE_PREPARED);
    ck_assert_uint_eq(r.op, 5);
    ck_assert_uint_eq(r.attempt, 2);
    ck_assert_int_eq(r.code, ERR_IO);
    ck_assert_str_eq(r.text, "no room");

    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    ck_assert_uint_eq(s.step, 1);
    ck_assert(s.view_changed && s.map_changed);
    ck_assert_uint_eq(s.view->epoch, 1);
    ck_assert_uint_eq(s.wave, 10);
    ck_assert_uint_eq(s.held_ns, 0);
    end(true);

    go(2, 3, 1, 2, 1, 4);
    const struct eep_view *old = s.view;
    for (uint64_t n = 2; n < 4; n++) {
        s = begin(true, 0, EEP_STEP_RUN);
        ck_assert_uint_eq(s.step, n);
        ck_assert_uint_eq(s.view->epoch, 1);
        ck_assert(!s.view_changed);
        end(true);
    }
    unsigned bells = agent_bells(&agent);
    s = begin(true, 0, EEP_STEP_RUN);
    ck_assert_uint_eq(s.step, 4);
    ck_assert(s.view_changed);
    ck_assert_uint_eq(s.view->epoch, 2);
    ck_assert_int_eq(s.view->rank, 1);
    ck_assert_uint_eq(old->epoch, 1); /* valid until the next view has been used */
    ck_assert_uint_eq(atomic_load(&agent.page->cur_view), 2);
    ck_assert_uint_eq(atomic_load(&agent.page->last_hold_ns), 0);
    ck_assert_uint_eq(eep_maps_get(eep)->version, 2);
    agent_expect_bell(&agent, bells);
    end(false);
    struct eep_stats stats;
    eep_stats_get(eep, &stats);
    ck_assert_uint_eq(stats.flips, 2);
    ck_assert_uint_eq(stats.steps, 4);
    ck_assert_uint_eq(stats.holds, 0);
}
END_TEST

START_TEST(a_view_beyond_max_ranks_is_declined)
{
    attach();
    struct view *view = view_make(0, 9, 0, 1, 0);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_PREPARE, .view = view, .op = 5, .attempt = 1});
    view_unref(view);
    struct record r = records_expect(&agent.events, AE_ENGINE_PREPARED);
    ck_assert_int_eq(r.code, ERR_LIMIT);
    records_expect_none(&said, 10);
}
END_TEST

/* The page can be faster than the message: the engine waits for the view that it has switched to. */
START_TEST(a_flip_waits_for_its_view)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    write_flip(2, 2, false);
    struct beginner b;
    beginner_start(&b, true, -1);
    sleep_ms(30);
    struct view *view = view_make(2, 2, 0, 2, 1);
    send_commit(view, 2);
    view_unref(view);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.view->epoch, 2);
    ck_assert_uint_ge(b.step.held_ns, 20000000);
    end(false);
}
END_TEST

START_TEST(a_map_only_flip_keeps_the_communicators)
{
    attach();
    give_regions(1);
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    go(2, 2, 0, 2, 1, 2);
    struct eep_step s = begin(true, 0, EEP_STEP_RUN);
    ck_assert_uint_eq(s.view->epoch, 2);
    ck_assert(s.map_changed && !s.view_changed);
    end(false);
}
END_TEST

/* ---- the gate ---- */

START_TEST(a_hold_is_waited_out_and_measured)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    agent_store(&agent, PAGE_GATE, 3);
    begin(true, 0, EEP_STEP_RUN); /* step 2 is below the gate */
    end(true);
    unsigned bells = agent_bells(&agent);
    struct beginner b;
    beginner_start(&b, true, 0);
    agent_expect_bell(&agent, bells);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    ck_assert_uint_eq(atomic_load(&agent.page->intent), 2);
    sleep_ms(20);
    uint64_t syscalls = atomic_load(&agent.page->boundary_syscalls);
    sleep_ms(60);
    ck_assert_uint_eq(atomic_load(&agent.page->boundary_syscalls), syscalls); /* it sleeps, it does not spin */
    go(2, 3, 2, 2, 0, 3);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 3);
    ck_assert(b.step.view_changed);
    ck_assert_uint_ge(b.step.held_ns, 60000000);
    ck_assert_uint_eq(atomic_load(&agent.page->last_hold_ns), b.step.held_ns);
    ck_assert_uint_eq(atomic_load(&agent.page->holds), 1);
    struct eep_stats stats;
    eep_stats_get(eep, &stats);
    ck_assert_uint_eq(stats.holds, 1);
    ck_assert_uint_eq(stats.longest_hold_ns, b.step.held_ns);
    unsigned bucket = 0;
    while (b.step.held_ns >> (bucket + 1))
        bucket++;
    ck_assert_uint_eq(stats.hold_histogram[bucket], 1);
    end(false);
}
END_TEST

START_TEST(an_aborted_promise_lets_the_engine_go_on)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    agent_store(&agent, PAGE_GATE, 2);
    struct beginner b;
    beginner_start(&b, true, 0);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    eep_wake(eep); /* an engine that must look at something else gets out, and is still held when it comes back */
    beginner_join(&b, EEP_STEP_IDLE);
    beginner_start(&b, true, 0);
    sleep_ms(20);
    agent_store(&agent, PAGE_GATE, GATE_OPEN);
    agent_wake(&agent);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.view->epoch, 1);
    ck_assert_uint_ge(b.step.held_ns, 20000000);
    end(false);
}
END_TEST

START_TEST(idle_waves_and_wake_ups)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(false);
    begin(false, 0, EEP_STEP_IDLE);
    uint64_t before = now_ns();
    begin(false, 30, EEP_STEP_IDLE);
    ck_assert_uint_ge(now_ns() - before, 29000000);
    ck_assert_uint_eq(atomic_load(&agent.page->engine_state), PAGE_ENGINE_IDLE);

    struct beginner b;
    beginner_start(&b, false, -1);
    sleep_ms(10);
    agent_wake(&agent); /* nothing to do: it goes on waiting */
    sleep_ms(10);
    eep_wake(eep);
    beginner_join(&b, EEP_STEP_IDLE);
    records_expect_none(&agent.events, 10);

    struct eep_step s = begin(true, 0, EEP_STEP_RUN); /* starts a wave */
    struct record r = records_expect(&agent.events, AE_ENGINE_WAVE);
    ck_assert_uint_eq(r.value, s.step);
    ck_assert_uint_eq(r.epoch, 1);
    end(false);

    beginner_start(&b, false, -1); /* a peer's wave: run_to is raised */
    sleep_ms(10);
    agent_store(&agent, PAGE_RUN_TO, s.step + 2);
    agent_wake(&agent);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, s.step + 1);
    ck_assert_uint_eq(b.step.held_ns, 0);
    end(false);
    records_expect_none(&agent.events, 10);
}
END_TEST

START_TEST(a_done_step_rings_when_asked_to)
{
    attach();
    join();
    agent_store(&agent, PAGE_NOTIFY_DONE, 3);
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    begin(true, 0, EEP_STEP_RUN);
    end(true);
    unsigned bells = agent_bells(&agent);
    begin(true, 0, EEP_STEP_RUN);
    end(true);
    agent_expect_bell(&agent, bells);
    bells = agent_bells(&agent);
    begin(true, 0, EEP_STEP_RUN);
    end(true);
    sleep_ms(20);
    ck_assert_uint_eq(agent_bells(&agent), bells); /* once */
    ck_assert_uint_gt(atomic_load(&agent.page->step_ns_min), 0);
}
END_TEST

/* ---- maps ---- */

static void send_map(uint64_t version, unsigned shift)
{
    struct view *view = view_make(1, 2, 0, version, shift);
    view->map->live[expert_map_at(view->map, 1, 1, 3)] = 0; /* a dormant slot */
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_MAP, .map = view->map});
    view_unref(view);
    agent_store(&agent, PAGE_MAP_PENDING, version);
    agent_wake(&agent);
}

START_TEST(maps_are_rewritten_in_place_at_boundaries)
{
    attach();
    give_regions(1);
    join();
    const struct eep_maps *maps = eep_maps_get(eep);
    const int32_t *physical = maps->physical_to_logical_map;
    begin(false, -1, EEP_STEP_RUN);
    ck_assert_uint_eq(maps->version, 1);
    ck_assert_int_eq(physical[0], 0);
    ck_assert_int_eq(physical[2 * SLOTS], -1); /* beyond the ranks of the view */
    send_map(2, 1);
    sleep_ms(10);
    ck_assert_int_eq(physical[0], 0); /* not inside a step */
    end(true);
    unsigned bells = agent_bells(&agent);
    struct eep_step s = begin(true, 0, EEP_STEP_RUN);
    ck_assert(s.map_changed && !s.view_changed);
    ck_assert_uint_eq(s.step, 2);
    ck_assert_int_eq(physical[0], 1);
    ck_assert_ptr_eq(eep_maps_get(eep)->physical_to_logical_map, physical);
    ck_assert_int_eq(physical[maps->max_ranks * SLOTS + SLOTS + 3], -1);
    /* expert 1 of layer 0: slot 0 of both ranks; expert 0 of layer 1: the dormant replica does not count */
    ck_assert_int_eq(maps->logical_replica_count[1], 2);
    ck_assert_int_eq(maps->logical_to_physical_map[1 * maps->max_replicas], 0);
    ck_assert_int_eq(maps->logical_to_physical_map[1 * maps->max_replicas + 1], SLOTS);
    ck_assert_int_eq(maps->logical_to_physical_map[1 * maps->max_replicas + 2], -1);
    ck_assert_int_eq(maps->logical_replica_count[LOGICAL + 0], 1);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied), 2);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied_step), 2);
    agent_expect_bell(&agent, bells);
    end(false);
    s = begin(false, 0, EEP_STEP_IDLE);

    struct beginner b; /* also while it sleeps */
    beginner_start(&b, false, -1);
    sleep_ms(10);
    bells = agent_bells(&agent);
    send_map(3, 2);
    agent_expect_bell(&agent, bells);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied), 3);
    ck_assert_uint_eq(atomic_load(&agent.page->map_applied_step), 3);
    eep_wake(eep);
    beginner_join(&b, EEP_STEP_IDLE);
    s = begin(true, 0, EEP_STEP_RUN);
    ck_assert(s.map_changed);
    end(false);
}
END_TEST

/* ---- revoke ---- */

static void do_revoke(uint64_t epoch)
{
    agent_store(&agent, PAGE_REVOKED, epoch);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REVOKE, .epoch = epoch, .text = "gpu1 is lost"});
    agent_wake(&agent);
    agent_store(&agent, PAGE_GATE, atomic_load(&agent.page->intent) + 1);
}

static void repair(uint64_t epoch, uint64_t step)
{
    struct view *view = view_make(epoch, 1, 0, epoch, 0);
    send_commit(view, step);
    view_unref(view);
    agent_store(&agent, PAGE_NEXT_STEP, step);
    write_flip(epoch, step, false);
}

START_TEST(revoked_inside_a_step)
{
    attach();
    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    ck_assert(!eep_revoked(eep) && !readable(eep_revoke_fd(eep)));
    do_revoke(1);
    struct record r = records_expect(&said, EEP_EVENT_REVOKE);
    ck_assert_uint_eq(r.epoch, 1);
    ck_assert_str_eq(r.text, "gpu1 is lost");
    ck_assert(eep_revoked(eep) && readable(eep_revoke_fd(eep)));
    records_expect_none(&agent.events, 20); /* it is still inside */
    ck_assert_int_eq(eep_step_failed(eep), 0);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, s.step);

    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    sleep_ms(20);
    repair(2, 9);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 9);
    ck_assert_uint_eq(b.step.view->epoch, 2);
    ck_assert(b.step.view_changed);
    ck_assert_uint_ge(b.step.held_ns, 20000000);
    ck_assert(!eep_revoked(eep) && !readable(eep_revoke_fd(eep)));
    end(false);
    records_expect_none(&agent.events, 10);
}
END_TEST

/* The engine's own connections broke before the agent knew: it waits for the repair all the same. */
START_TEST(a_failed_step_waits_for_the_next_view)
{
    attach();
    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    ck_assert_int_eq(eep_step_failed(eep), 0);
    ck_assert_int_eq(eep_step_failed(eep), ERR_INVALID);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, s.step);
    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    do_revoke(1);
    records_expect(&agent.events, AE_ENGINE_LEFT_STEP); /* said once more, for the revoke */
    records_expect(&said, EEP_EVENT_REVOKE);
    repair(2, 5);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 5);
    end(false);
}
END_TEST

START_TEST(revoked_while_idle_or_held)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(false);
    struct beginner b;
    beginner_start(&b, false, -1);
    agent_expect_state(&agent, PAGE_ENGINE_IDLE);
    do_revoke(1);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, 1);
    records_expect(&said, EEP_EVENT_REVOKE);
    repair(2, 3);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.held_ns, 0); /* it had nothing to run */
    end(true);

    agent_store(&agent, PAGE_GATE, 4);
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    do_revoke(2);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, 3);
    repair(3, 6);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 6);
    ck_assert_uint_gt(b.step.held_ns, 0);
    end(false);
}
END_TEST

/* A step that completes although it was revoked counts as left. */
START_TEST(revoked_step_that_ends_well)
{
    attach();
    join();
    struct eep_step s = begin(false, -1, EEP_STEP_RUN);
    do_revoke(1);
    records_expect(&said, EEP_EVENT_REVOKE);
    end(true);
    ck_assert_uint_eq(records_expect(&agent.events, AE_ENGINE_LEFT_STEP).value, s.step);
    (void)s;
}
END_TEST

/* ---- leaving ---- */

START_TEST(leave_release_and_join_again)
{
    attach();
    give_regions(2);
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_DRAIN, .value = 1500});
    ck_assert_uint_eq(records_expect(&said, EEP_EVENT_DRAIN).value, 1500);
    ck_assert_int_eq(eep_drained(eep), 0);
    records_expect(&agent.events, AE_ENGINE_DRAINED);

    agent_store(&agent, PAGE_GATE, 3);
    go(2, 1, -1, 2, 0, 3);
    ck_assert_uint_eq(begin(true, 0, EEP_STEP_RUN).step, 2);
    end(true);
    unsigned bells = agent_bells(&agent);
    begin(true, 0, EEP_STEP_LEFT);
    agent_expect_bell(&agent, bells);
    ck_assert_uint_eq(atomic_load(&agent.page->engine_state), PAGE_ENGINE_IDLE);
    begin(true, 0, EEP_STEP_IDLE); /* said once; a spare now */

    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_RELEASE});
    records_expect(&said, EEP_EVENT_RELEASE);
    ck_assert_int_eq(eep_released(eep), 0);
    records_expect(&agent.events, AE_ENGINE_RELEASED);
    struct eep_tensor t;
    ck_assert_int_eq(eep_tensor_get(eep, "dense", &t), ERR_NOTFOUND);
    ck_assert_ptr_null(eep_maps_get(eep));

    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS}); /* the agent has them still */
    records_expect(&said, EEP_EVENT_REGIONS);
    ck_assert_int_eq(eep_tensor_get(eep, "dense", &t), 0);
    ck_assert_int_eq(eep_maps_get(eep)->physical_to_logical_map[0], -1);
    agent_store(&agent, PAGE_NEXT_STEP, 20);
    struct beginner b;
    beginner_start(&b, false, -1);
    go(3, 2, 1, 3, 1, 20);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 20);
    ck_assert_uint_eq(b.step.view->epoch, 3);
    ck_assert(b.step.view_changed);
    ck_assert_int_eq(eep_maps_get(eep)->physical_to_logical_map[0], 1);
    end(false);
}
END_TEST

/* ---- a new process in the old one's place ---- */

START_TEST(attached_again_the_gate_still_holds)
{
    attach();
    give_regions(1);
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(false);
    agent_store(&agent, PAGE_GATE, 2);
    eep_detach(eep);
    records_expect(&agent.events, AE_ENGINE_DETACHED);
    attach();
    ck_assert_uint_eq(atomic_load(&agent.page->gate), 2);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
    begin(true, 0, EEP_STEP_IDLE); /* no view yet */
    struct view *view = view_make(1, 2, 0, 1, 0);
    send_commit(view, 1);
    view_unref(view);
    struct beginner b;
    beginner_start(&b, true, -1);
    agent_expect_state(&agent, PAGE_ENGINE_HELD);
    agent_store(&agent, PAGE_GATE, GATE_OPEN);
    agent_wake(&agent);
    beginner_join(&b, EEP_STEP_RUN);
    ck_assert_uint_eq(b.step.step, 2);
    ck_assert(b.step.view_changed && b.step.map_changed);
    ck_assert_uint_gt(b.step.held_ns, 0);
    end(false);
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

/* ---- no system call ---- */

START_TEST(a_boundary_with_nothing_pending_makes_no_system_call)
{
    attach();
    join();
    begin(false, -1, EEP_STEP_RUN);
    end(true);
    struct eep_stats before, after;
    eep_stats_get(eep, &before);
    for (int i = 0; i < 10000; i++) {
        begin(true, 0, EEP_STEP_RUN);
        end(true);
    }
    eep_stats_get(eep, &after);
    ck_assert_uint_eq(after.steps - before.steps, 10000);
    ck_assert_uint_eq(after.boundary_syscalls, before.boundary_syscalls);
    ck_assert_uint_gt(before.boundary_syscalls, 0); /* the counter counts: the flip rang the bell */
}
END_TEST

/* ---- many maps, flips and revokes against a running engine: for the thread sanitizer ---- */

static atomic_bool storm_over;

static void *storm_main(void *user)
{
    uint64_t *steps = user;
    struct eep_step s;
    while (!atomic_load(&storm_over)) {
        int rc = eep_step_begin(eep, NULL, true, 10, &s);
        if (rc != EEP_STEP_RUN)
            continue;
        (*steps)++;
        if (s.view->n == 0 || eep_maps_get(eep)->physical_to_logical_map[0] < 0)
            abort();
        if (eep_revoked(eep))
            eep_step_failed(eep);
        else
            eep_step_end(eep, NULL, true);
    }
    return NULL;
}

START_TEST(a_storm_of_changes)
{
    attach();
    give_regions(1);
    join();
    pthread_t thread;
    uint64_t steps = 0, version = 1;
    atomic_store(&storm_over, false);
    ck_assert_int_eq(pthread_create(&thread, NULL, storm_main, &steps), 0);
    for (int i = 0; i < 1000 && atomic_load(&agent.page->cur_view) != 1; i++)
        sleep_ms(1);
    for (uint64_t epoch = 2; epoch < 30; epoch++) { /* one flip at a time */
        version++;
        send_map(version, (unsigned)version);
        if (epoch % 3 == 0) {
            uint64_t old = atomic_load(&agent.page->cur_view);
            do_revoke(old);
            for (int i = 0; i < 1000 && atomic_load(&agent.page->done) < atomic_load(&agent.page->intent); i++)
                sleep_ms(1);
            agent_store(&agent, PAGE_NEXT_STEP, atomic_load(&agent.page->intent) + 5);
        }
        version++;
        go(epoch, 2, 0, version, (unsigned)version, atomic_load(&agent.page->intent) + 5);
        for (int i = 0; i < 2000 && atomic_load(&agent.page->cur_view) != epoch; i++)
            sleep_ms(1);
        ck_assert_uint_eq(atomic_load(&agent.page->cur_view), epoch);
    }
    atomic_store(&storm_over, true);
    eep_wake(eep);
    pthread_join(thread, NULL);
    ck_assert_uint_gt(steps, 30);
}
END_TEST

/* ---- probe ---- */

static int probe_agent(const char *socket_path)
{
    records_init(&said);
    agent_start(&agent, socket_path);
    printf("ready\n");
    fflush(stdout);
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
    join();
    char c;
    while (read(0, &c, 1) > 0)
        ;
    agent_stop(&agent);
    return 0;
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

static TCase *group(Suite *suite, const char *name)
{
    TCase *tc = tcase_create(name);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    suite_add_tcase(suite, tc);
    return tc;
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
    tc = group(suite, "views");
    tcase_add_test(tc, prepare_commit_and_flip_at_the_step);
    tcase_add_test(tc, a_view_beyond_max_ranks_is_declined);
    tcase_add_test(tc, a_flip_waits_for_its_view);
    tcase_add_test(tc, a_map_only_flip_keeps_the_communicators);
    tcase_add_test(tc, leave_release_and_join_again);
    tcase_add_test(tc, attached_again_the_gate_still_holds);
    tc = group(suite, "steps");
    tcase_add_test(tc, a_hold_is_waited_out_and_measured);
    tcase_add_test(tc, an_aborted_promise_lets_the_engine_go_on);
    tcase_add_test(tc, idle_waves_and_wake_ups);
    tcase_add_test(tc, a_done_step_rings_when_asked_to);
    tcase_add_test(tc, maps_are_rewritten_in_place_at_boundaries);
    tcase_add_test(tc, a_boundary_with_nothing_pending_makes_no_system_call);
    tcase_add_test(tc, a_storm_of_changes);
    tc = group(suite, "revoke");
    tcase_add_test(tc, revoked_inside_a_step);
    tcase_add_test(tc, a_failed_step_waits_for_the_next_view);
    tcase_add_test(tc, revoked_while_idle_or_held);
    tcase_add_test(tc, revoked_step_that_ends_well);

    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}
