/* What the tests of libeep share: one agent, one engine, and the core's part of a commit, played by the test.
 *
 * Included by one test program. */
#ifndef EEP_TESTS_ENGINE_PLAYER_H
#define EEP_TESTS_ENGINE_PLAYER_H

#include "engine_harness.h"
#include "tests/harness/suite.h"

static struct agent agent;
static struct records said; /* by libeep */
static struct eep *eep;
static char dir[] = "/tmp/eep-test-XXXXXX";
static char path[64];

static inline struct eep_options options_make(void)
{
    return (struct eep_options){.socket = path,
                                .endpoint = "unix:/engine-0",
                                .dispatch = EEP_DISPATCH_SOURCE_ROUTED,
                                .kv_bytes = 777,
                                .max_ranks = 8,
                                .on_event = engine_on_event,
                                .user = &said};
}

static inline void attach(void)
{
    struct eep_options o = options_make();
    int rc = eep_attach(&o, &eep);
    ck_assert_msg(rc == 0, "%s", eep_last_error());
    records_expect(&agent.events, AE_ENGINE_ATTACHED);
}

static inline void setup(void)
{
    strcpy(dir, "/tmp/eep-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/engine", dir);
    records_init(&said);
    eep = NULL;
    agent_start(&agent, path);
}

static inline void teardown(void)
{
    eep_detach(eep);
    agent_stop(&agent);
    rmdir(dir);
}

/* ---- the core's part of a commit, in the order that the protocol asks for ---- */

static inline void send_commit(struct view *view, uint64_t step)
{
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_COMMIT, .view = view, .epoch = view->epoch, .value = step});
}

struct flip {
    uint64_t epoch, step, next_step;
    bool leaver;
};

static inline void perform(struct agent *a, enum page_word word, uint64_t value)
{
    engine_socket_perform(a->socket, &(struct agent_action){.type = AA_PAGE, .word = word, .value = value});
}

static inline void write_flip_on_loop(struct agent *a, void *arg)
{
    const struct flip *f = arg;
    if (f->next_step)
        perform(a, PAGE_NEXT_STEP, f->next_step);
    perform(a, PAGE_FLIP_WAVE, f->epoch * 10);
    perform(a, PAGE_FLIP_STEP, f->step);
    perform(a, PAGE_FLIP_VIEW, f->epoch);
    perform(a, PAGE_RUN_TO, f->leaver ? f->step : f->step + 1);
    perform(a, PAGE_GATE, f->leaver ? f->step : GATE_OPEN);
    engine_socket_perform(a->socket, &(struct agent_action){.type = AA_WAKE});
}

static inline void write_flip(struct flip f)
{
    agent_run(&agent, write_flip_on_loop, &f);
}

static inline void go(uint64_t epoch, uint32_t n, int self, uint64_t version, unsigned shift, uint64_t step)
{
    struct view *view = view_make(epoch, n, self, version, shift);
    send_commit(view, step);
    view_unref(view);
    write_flip((struct flip){.epoch = epoch, .step = step, .leaver = self < 0});
}

static inline void join(void)
{
    agent_store(&agent, PAGE_NEXT_STEP, 1);
    go(1, 2, 0, 1, 0, 1);
}

static inline void allocate(struct agent *a, void *parts)
{
    struct work work = {.id = 7, .kind = WORK_ALLOCATE, .model = model_make(*(uint32_t *)parts)};
    worker_submit(a->worker, &work);
}

static inline void give_regions(uint32_t parts)
{
    agent_run(&agent, allocate, &parts);
    struct record done = records_expect(&agent.events, AE_WORK_DONE);
    ck_assert_msg(done.code == 0, "%s", done.text);
    agent_do(&agent, (struct agent_action){.type = AA_ENGINE_REGIONS});
    records_expect(&said, EEP_EVENT_REGIONS);
}

static inline struct eep_step begin(bool has_work, int timeout_ms, int expected)
{
    struct eep_step step = {.step = UINT64_MAX};
    int rc = eep_step_begin(eep, NULL, has_work, timeout_ms, &step);
    ck_assert_msg(rc == expected, "step_begin: %d instead of %d (%s)", rc, expected, rc < 0 ? eep_last_error() : "");
    return step;
}

static inline void end(bool any_work)
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

static inline void *beginner_main(void *user)
{
    struct beginner *b = user;
    b->rc = eep_step_begin(eep, NULL, b->has_work, b->timeout_ms, &b->step);
    return NULL;
}

static inline void beginner_start(struct beginner *b, bool has_work, int timeout_ms)
{
    *b = (struct beginner){.has_work = has_work, .timeout_ms = timeout_ms};
    ck_assert_int_eq(pthread_create(&b->thread, NULL, beginner_main, b), 0);
}

static inline void beginner_join(struct beginner *b, int expected)
{
    pthread_join(b->thread, NULL);
    ck_assert_int_eq(b->rc, expected);
}

static inline bool readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) == 1;
}

static inline TCase *group(Suite *suite, const char *name)
{
    TCase *tc = tcase_create(name);
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    suite_add_tcase(suite, tc);
    return tc;
}

#endif
