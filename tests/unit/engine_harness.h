/* A real engine socket on a loop thread of its own, with a real worker behind it, and the test in the place of the
 * agent's core: it posts actions and takes events in order.  Beside it a recorder of what libeep calls back.
 *
 * Included by one test program. */
#ifndef EEP_TESTS_ENGINE_HARNESS_H
#define EEP_TESTS_ENGINE_HARNESS_H

#include <check.h>
#include <event2/thread.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent/engine_socket_internal.h"
#include "agent/libeep/eep.h"
#include "agent/manifest.h"
#include "agent/weights.h"
#include "common/clock.h"
#include "common/loop.h"

#define WAIT_S 5
#define QUEUE 256u

static inline void sleep_ms(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

/* ---- a queue of records that one thread fills and the test empties ---- */

struct record {
    int kind;
    uint64_t op, attempt, value, epoch, bytes;
    int code;
    char text[256], endpoint[ENDPOINT_MAX];
    uint32_t n, dispatch, layers, logical;
    bool seals;
    const struct eep_view *view; /* a reference, in PREPARE */
    int32_t load_map[64];
};

struct records {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    struct record v[QUEUE];
    unsigned head, tail;
    unsigned bells;
};

static inline void records_init(struct records *r)
{
    memset(r, 0, sizeof *r);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->cond, NULL);
}

static inline void records_put(struct records *r, const struct record *record)
{
    pthread_mutex_lock(&r->lock);
    if (r->tail - r->head < QUEUE)
        r->v[r->tail++ % QUEUE] = *record;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

/* The next record must be of this kind, within WAIT_S. */
static inline struct record records_expect(struct records *r, int kind)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_S;
    pthread_mutex_lock(&r->lock);
    int rc = 0;
    while (r->head == r->tail && rc == 0)
        rc = pthread_cond_timedwait(&r->cond, &r->lock, &until);
    struct record got = {.kind = -1};
    if (r->head != r->tail)
        got = r->v[r->head++ % QUEUE];
    pthread_mutex_unlock(&r->lock);
    ck_assert_msg(got.kind == kind, "expected event %d, got %d (%s)", kind, got.kind, got.text);
    return got;
}

static inline void records_expect_none(struct records *r, long within_ms)
{
    sleep_ms(within_ms);
    pthread_mutex_lock(&r->lock);
    int kind = r->head == r->tail ? -1 : r->v[r->head % QUEUE].kind;
    pthread_mutex_unlock(&r->lock);
    ck_assert_msg(kind == -1, "unexpected event %d", kind);
}

/* ---- the agent ---- */

static const char *agent_memory = "host"; /* of the next agent_start */

struct agent {
    struct event_base *base;
    pthread_t thread;
    struct engine_socket *socket;
    struct worker *worker;
    struct event *worker_event, *keep;
    struct control_page *page;
    struct records events;
    char path[108];
    uint64_t incarnation; /* 0: nobody comes after it */
};

static inline void agent_on_event(void *user, struct agent_event *e)
{
    struct agent *agent = user;
    if (e->type == AE_BELL) {
        pthread_mutex_lock(&agent->events.lock);
        agent->events.bells++;
        pthread_cond_broadcast(&agent->events.cond);
        pthread_mutex_unlock(&agent->events.lock);
        return;
    }
    struct record r = {.kind = (int)e->type, .op = e->op, .attempt = e->attempt, .value = e->value, .epoch = e->epoch,
                       .bytes = e->kv_bytes, .code = e->code, .dispatch = e->dispatch, .seals = e->seals,
                       .layers = e->layers, .logical = e->logical};
    if (e->text)
        snprintf(r.text, sizeof r.text, "%s", e->text);
    if (e->endpoint)
        snprintf(r.endpoint, sizeof r.endpoint, "%s", e->endpoint);
    records_put(&agent->events, &r);
}

static inline void agent_on_worker(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    struct agent *agent = user;
    struct worker_result result;
    while (worker_next_result(agent->worker, &result)) {
        struct record r = {.kind = result.kind == WORK_LOAD && result.id == 0 ? (int)AE_ENGINE_SEALED : (int)AE_WORK_DONE,
                           .code = result.code};
        snprintf(r.text, sizeof r.text, "%s", result.text);
        if (r.kind == AE_ENGINE_SEALED) {
            engine_socket_sealed(agent->socket, result.code, result.text);
            r.value = result.model ? result.model->manifest_digest : 0;
            for (uint32_t i = 0; result.model && i < result.model->logical && i < 64; i++)
                r.load_map[i] = result.model->expert_digest[i] != 0;
        }
        if (!result.progress)
            records_put(&agent->events, &r);
        worker_result_done(&result);
    }
}

static inline void *agent_main(void *user)
{
    struct agent *agent = user;
    event_base_loop(agent->base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

static inline int data_listener(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    ck_assert_int_eq(listen(fd, 1), 0);
    return fd;
}

static inline void agent_socket_open(struct agent *agent, const struct engine_socket_fds *kept)
{
    struct err err = {.text = ""};
    struct engine_socket_config sc = {.base = agent->base, .path = agent->path, .agent_id = "gpu0", .kept = kept,
                                      .incarnation = agent->incarnation, .worker = agent->worker,
                                      .on_event = agent_on_event, .user = agent};
    ck_assert_msg(engine_socket_open(&sc, &agent->socket, &err) == 0, "%s", err.text);
    agent->page = engine_socket_page(agent->socket);
}

static inline void agent_start(struct agent *agent, const char *path)
{
    struct err err = {.text = ""};
    memset(agent, 0, sizeof *agent);
    records_init(&agent->events);
    snprintf(agent->path, sizeof agent->path, "%s", path);
    evthread_use_pthreads();
    agent->base = event_base_new();
    struct worker_config wc = {.memory = memory_open(agent_memory, &err), .transport = transport_host_open(data_listener(), &err)};
    ck_assert_msg(wc.memory && wc.transport, "%s", err.text);
    ck_assert_msg(worker_start(&wc, &agent->worker, &err) == 0, "%s", err.text);
    agent->incarnation = 7;
    agent_socket_open(agent, NULL);
    agent->worker_event = event_new(agent->base, worker_fd(agent->worker), EV_READ | EV_PERSIST, agent_on_worker, agent);
    event_add(agent->worker_event, NULL);
    ck_assert_int_eq(pthread_create(&agent->thread, NULL, agent_main, agent), 0);
}

/* Runs fn(arg) on the loop and waits for it. */
struct agent_call {
    void (*fn)(struct agent *agent, void *arg);
    struct agent *agent;
    void *arg;
    bool done;
};

static inline void agent_call_run(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    struct agent_call *call = user;
    call->fn(call->agent, call->arg);
    pthread_mutex_lock(&call->agent->events.lock);
    call->done = true;
    pthread_cond_broadcast(&call->agent->events.cond);
    pthread_mutex_unlock(&call->agent->events.lock);
}

static inline void agent_run(struct agent *agent, void (*fn)(struct agent *, void *), void *arg)
{
    struct agent_call call = {.fn = fn, .agent = agent, .arg = arg};
    struct timeval now = {0, 0};
    ck_assert_int_eq(event_base_once(agent->base, -1, EV_TIMEOUT, agent_call_run, &call, &now), 0);
    pthread_mutex_lock(&agent->events.lock);
    while (!call.done)
        pthread_cond_wait(&agent->events.cond, &agent->events.lock);
    pthread_mutex_unlock(&agent->events.lock);
}

static inline void agent_break(struct agent *agent, void *arg)
{
    (void)arg;
    event_base_loopbreak(agent->base);
}

static inline void agent_stop(struct agent *agent)
{
    agent_run(agent, agent_break, NULL);
    pthread_join(agent->thread, NULL);
    engine_socket_close(agent->socket);
    event_free(agent->worker_event);
    worker_stop(agent->worker);
    loop_free(agent->base);
    ck_assert_int_ne(access(agent->path, F_OK), 0);
}

/* The process dies: its connection ends without a word; page, eventfds and counters are kept. */
static inline void agent_lose_on_loop(struct agent *agent, void *arg)
{
    struct engine_socket_fds *kept = arg, fds = engine_socket_fds(agent->socket);
    *kept = (struct engine_socket_fds){
        .listen = -1, .page = dup(fds.page), .wake = dup(fds.wake), .bell = dup(fds.bell), .load = dup(fds.load)};
    if (agent->socket->conn)
        agent->socket->conn->attached = false; /* no last word */
    engine_socket_close(agent->socket);
    agent->socket = NULL;
}

static inline struct engine_socket_fds agent_lose(struct agent *agent)
{
    struct engine_socket_fds kept;
    agent_run(agent, agent_lose_on_loop, &kept);
    return kept;
}

static inline void agent_return_on_loop(struct agent *agent, void *arg)
{
    agent_socket_open(agent, arg);
}

/* And the next one takes its place. */
static inline void agent_return(struct agent *agent, struct engine_socket_fds *kept)
{
    agent_run(agent, agent_return_on_loop, kept);
}

static inline void agent_perform_on_loop(struct agent *agent, void *arg)
{
    engine_socket_perform(agent->socket, arg);
}

static inline void agent_do(struct agent *agent, struct agent_action action)
{
    agent_run(agent, agent_perform_on_loop, &action);
}

static inline void agent_store(struct agent *agent, enum page_word word, uint64_t value)
{
    agent_do(agent, (struct agent_action){.type = AA_PAGE, .word = word, .value = value});
}

static inline void agent_wake(struct agent *agent)
{
    agent_do(agent, (struct agent_action){.type = AA_WAKE});
}

static inline unsigned agent_bells(struct agent *agent)
{
    pthread_mutex_lock(&agent->events.lock);
    unsigned bells = agent->events.bells;
    pthread_mutex_unlock(&agent->events.lock);
    return bells;
}

/* Waits until the engine has rung more than `before` times. */
static inline void agent_expect_bell(struct agent *agent, unsigned before)
{
    for (int i = 0; i < WAIT_S * 200 && agent_bells(agent) <= before; i++)
        sleep_ms(5);
    ck_assert_uint_gt(agent_bells(agent), before);
}

static inline void agent_expect_state(struct agent *agent, enum page_engine_state state)
{
    for (int i = 0; i < WAIT_S * 200 && atomic_load(&agent->page->engine_state) != (uint64_t)state; i++)
        sleep_ms(5);
    ck_assert_uint_eq(atomic_load(&agent->page->engine_state), state);
}

/* ---- what libeep says ---- */

static inline void engine_on_event(void *user, const struct eep_event *e)
{
    struct record r = {.kind = (int)e->kind, .op = e->op, .attempt = e->attempt, .epoch = e->epoch,
                       .value = e->deadline_ms, .layers = e->load_layers, .n = e->load_slots};
    if (e->text)
        snprintf(r.text, sizeof r.text, "%s", e->text);
    if (e->view)
        r.view = eep_view_ref(e->view);
    if (e->load_map)
        memcpy(r.load_map, e->load_map, (size_t)e->load_layers * e->load_slots * sizeof(int32_t));
    records_put(user, &r);
}

/* ---- views and models ---- */

#define LAYERS 2u
#define LOGICAL 4u
#define SLOTS 4u

/* n ranks; "gpu0" (the agent under test) is rank `self`, or not in it.  Slot s of every rank routes to expert
 * (s + shift) % LOGICAL in every layer. */
static inline struct view *view_make(uint64_t epoch, uint32_t n, int self, uint64_t version, unsigned shift)
{
    struct view *view = view_new(n);
    view->epoch = epoch;
    view->kv_bytes = 1234;
    for (uint32_t i = 0; i < n; i++) {
        snprintf(view->members[i].id, sizeof view->members[i].id, "%s%u", (int)i == self ? "gpu" : "other",
                 (int)i == self ? 0 : i);
        snprintf(view->members[i].endpoint, sizeof view->members[i].endpoint, "unix:/engine-%u", i);
        view->members[i].serving = true;
    }
    view->map = expert_map_new(LAYERS, LOGICAL, n, SLOTS);
    view->map->version = version;
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t r = 0; r < n; r++)
            for (uint32_t s = 0; s < SLOTS; s++) {
                view->map->held[expert_map_at(view->map, layer, r, s)] = (int32_t)((s + shift) % LOGICAL);
                view->map->live[expert_map_at(view->map, layer, r, s)] = 1;
            }
    return view;
}

static inline void region_put(struct manifest *m, const struct region *region, const char *dtype, uint64_t items)
{
    m->regions = realloc(m->regions, (m->n_regions + 1u) * sizeof *m->regions);
    m->tensors = realloc(m->tensors, (m->n_tensors + 1u) * sizeof *m->tensors);
    m->regions[m->n_regions] = *region;
    struct tensor t = {.region = m->n_regions, .dims = 1, .shape = {items}};
    snprintf(t.name, sizeof t.name, "%s", region->name);
    snprintf(t.dtype, sizeof t.dtype, "%s", dtype);
    m->tensors[m->n_tensors++] = t;
    m->n_regions++;
}

/* A dense region and `parts` parts per layer. */
static inline struct model *model_make(uint32_t parts)
{
    struct manifest m = {.producer = "test", .layers = LAYERS, .logical = LOGICAL, .slots = SLOTS};
    struct err err = {.text = ""};
    m.config = strdup("{\"hidden\": 8}");
    struct region dense = {.kind = REGION_DENSE, .name = "dense", .bytes = 4096};
    region_put(&m, &dense, "F32", 1024);
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        for (uint32_t p = 0; p < parts; p++) {
            struct region r = {.kind = REGION_EXPERT, .bytes = SLOTS * 256, .layer = layer, .slots = SLOTS, .stride = 256,
                               .slot_bytes = 200};
            snprintf(r.part, sizeof r.part, "p%u", p);
            snprintf(r.name, sizeof r.name, "layers.%u.experts.p%u", layer, p);
            region_put(&m, &r, "F32", 50);
        }
    struct model *model = model_new(LAYERS, LOGICAL, SLOTS, 1);
    ck_assert_msg(manifest_encode(&m, &model->manifest, &err) == 0, "%s", err.text);
    model->manifest_digest = manifest_digest(model->manifest);
    model->expert_bytes = manifest_expert_bytes(&m);
    model->dense_bytes = manifest_dense_bytes(&m);
    manifest_done(&m);
    return model;
}

#endif
