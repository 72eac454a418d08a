/* The stepping thread: waits for weights, binds them, runs steps, drains, leaves, ends.  See engine.h.
 *
 *   attach -> [LOAD: fill and seal] -> REGIONS: bind -> steps in a view -> LEFT -> RELEASE -> (REGIONS again, as a
 * spare)
 *
 * A step that fails because its view was revoked costs nothing but time: nothing of it was kept.  Any other failure of
 * a step ends the process with a sentence; the agent sees the engine go, and the others are told. */
#include "common/clock.h"
#include "tests/engine/engine.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "common/rand.h"
#include "tests/engine/layout.h"
#include "tests/engine/mesh_private.h"

#define IDLE_MS 1000

/* ---- weights ---- */

static int tensor_find(void *user, const char *name, struct decoder_tensor *ret_tensor)
{
    struct eep_tensor t;
    int rc = eep_tensor_get(user, name, &t);
    if (rc)
        return rc;
    *ret_tensor = (struct decoder_tensor){.data = t.data, .dtype = t.dtype, .dims = t.dims, .stride = t.stride};
    memcpy(ret_tensor->shape, t.shape, sizeof ret_tensor->shape);
    return 0;
}

/* No sequence is left whose keys lie there. */
static void compute_close(struct engine *e)
{
    if (e->compute)
        e->compute->close(e->compute);
    e->compute = e->batch.compute = e->dispatch.compute = NULL;
}

static int engine_bind(struct engine *e, struct err *err)
{
    struct eep_model model;
    struct decoder decoder;
    int rc = eep_model_get(e->eep, &model);
    if (rc)
        return err_set(err, rc, "no model: %s", eep_last_error());
    rc = decoder_bind(model.config, tensor_find, e->eep, &decoder, err);
    if (rc)
        return rc;
    const struct eep_maps *maps = eep_maps_get(e->eep);
    if (!maps || maps->layers != decoder.config.layers || maps->logical != decoder.config.experts ||
        maps->slots != decoder.slots) {
        decoder_done(&decoder);
        return err_set(err, ERR_CONFLICT, "the expert maps have not the shape of the model");
    }
    compute_close(e);
    decoder_done(&e->decoder);
    e->decoder = decoder;
    rc = model.device < 0 ? compute_host_open(&e->decoder, &e->compute, err)
                          : compute_cuda_open(&e->decoder, model.device, e->options.max_batch, e->options.prefill,
                                            &e->compute, err);
    if (rc)
        return rc;
    e->batch.compute = e->dispatch.compute = e->compute;
    e->dispatch.maps = maps;
    e->bound = true;
    log_event(e->log, LOG_LEVEL_INFO, "bound", "producer=%s layers=%u experts=%u slots=%u compute=%s", model.producer,
              maps->layers, maps->logical, maps->slots, e->compute->name);
    return 0;
}

static int engine_load(struct engine *e, const int32_t *map, uint32_t layers, uint32_t slots, struct err *err)
{
    uint64_t began = clock_now_ms();
    int rc = e->source.config ? layout_seal(e->eep, &e->source, map, layers, slots, err)
                              : err_set(err, ERR_UNSUPPORTED, "asked to load, but no checkpoint was given");
    if (rc == ERR_ABORTED) {
        log_event(e->log, LOG_LEVEL_WARN, "load-aborted", "why=%s", err->text);
        return 0; /* the operation was given up; another one will ask again */
    }
    if (rc)
        return rc;
    log_event(e->log, LOG_LEVEL_INFO, "sealed", "layers=%u slots=%u ms=%" PRIu64, layers, slots, clock_now_ms() - began);
    return engine_bind(e, err);
}

static void engine_unbind(struct engine *e)
{
    batch_hand_back(&e->batch, "leaving");
    mesh_free(e->mesh);
    e->mesh = NULL;
    compute_close(e);
    decoder_done(&e->decoder);
    e->dispatch.maps = NULL;
    e->bound = false;
    e->rank = -1;
}

/* ---- between steps ---- */

struct noted {
    bool regions, load, release, detached, stop, draining;
    uint64_t drain_until_ms;
    int32_t *load_map;
    uint32_t load_layers, load_slots;
};

static void noted_take(struct engine *e, struct noted *ret)
{
    pthread_mutex_lock(&e->lock);
    *ret = (struct noted){e->regions,  e->load,           e->release,  e->detached,    e->stop,
                          e->draining, e->drain_until_ms, e->load_map, e->load_layers, e->load_slots};
    e->regions = e->load = e->release = false;
    e->load_map = NULL;
    if (e->drain_new || !e->draining)
        e->drained_said = false;
    e->drain_new = false;
    pthread_mutex_unlock(&e->lock);
}

static void engine_drain(struct engine *e, const struct noted *n)
{
    if (e->drained_said || e->options.mute_drain)
        return;
    if (e->batch.n > 0 && clock_now_ms() < n->drain_until_ms)
        return;
    log_event(e->log, LOG_LEVEL_INFO, "drained", "handed_back=%u", e->batch.n);
    batch_hand_back(&e->batch, "draining");
    eep_drained(e->eep);
    e->drained_said = true;
}

static void engine_admit(struct engine *e, const struct noted *n)
{
    const char *refuse = e->rank < 0 ? "starting" : n->draining || e->view_draining ? "draining" : NULL;
    server_refuse(e->server, refuse);
    if (refuse) {
        for (struct request *r; (r = server_take(e->server));)
            request_refuse(e->server, r, refuse);
        server_flush(e->server);
    }
    if (n->draining)
        engine_drain(e, n);
    else if (!refuse)
        batch_admit(&e->batch, &e->decoder.config);
}

/* Does what was noted.  0; ERR_ABORTED: stop; anything else: cannot go on. */
static int engine_notes(struct engine *e, struct err *err)
{
    struct noted n;
    int rc = 0;
    noted_take(e, &n);
    if (n.stop)
        rc = ERR_ABORTED;
    else if (n.detached)
        rc = err_set(err, ERR_UNREACHABLE, "detached: %s", e->why);
    if (rc == 0 && n.release) {
        engine_unbind(e);
        eep_released(e->eep);
    }
    if (rc == 0 && n.load)
        rc = engine_load(e, n.load_map, n.load_layers, n.load_slots, err);
    if (rc == 0 && n.regions)
        rc = engine_bind(e, err);
    free(n.load_map);
    if (rc == 0)
        engine_admit(e, &n);
    return rc;
}

static void engine_wait(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    while (!e->regions && !e->load && !e->release && !e->detached && !e->stop && !e->drain_new)
        pthread_cond_wait(&e->changed, &e->lock);
    pthread_mutex_unlock(&e->lock);
}

/* ---- steps ---- */

static void sleep_until(const struct timespec *began, uint32_t ms)
{
    struct timespec until = *began;
    until.tv_sec += ms / 1000;
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        ;
}

static int engine_forward(struct engine *e, const struct eep_step *step, bool *ret_any, struct err *err)
{
    struct dispatch *d = &e->dispatch;
    bool more = false;
    if (step->view_changed || !e->mesh) {
        int rc = engine_switch(e, step, err);
        if (rc)
            return rc;
    }
    uint64_t kv = step->view->kv_bytes;
    e->batch.kv_budget = kv < e->options.kv_bytes ? kv : e->options.kv_bytes;
    e->view_draining = step->view->members[step->view->rank].draining;
    int rc = batch_plan(&e->batch, &more, err);
    if (rc)
        return rc;
    d->mesh = e->mesh;
    d->mode = e->options.dispatch;
    d->wait = (struct mesh_wait){eep_revoke_fd(e->eep), e->stop_fd, e->options.stall_ms};
    d->epoch = step->view->epoch;
    d->step = step->step;
    d->flags = more ? DISPATCH_ANY_WORK : 0;
    d->err = err;
    if (e->options.busy_us && (rc = e->compute->busy(e->compute, e->options.busy_us, err)))
        return rc;
    rc = forward_run(e->compute, e->batch.tokens, e->batch.n_tokens, dispatch_moe, d, err);
    *ret_any = (d->flags & DISPATCH_ANY_WORK) != 0;
    return rc;
}

static int engine_step(struct engine *e, const struct eep_step *step, struct err *err)
{
    struct timespec began, ended;
    bool any = false;
    clock_gettime(CLOCK_MONOTONIC, &began);
    if (step->held_ns)
        log_event(e->log, LOG_LEVEL_INFO, "held", "step=%" PRIu64 " us=%" PRIu64, step->step, step->held_ns / 1000);
    int rc = engine_forward(e, step, &any, err);
    if (rc == 0) {
        sleep_until(&began, e->options.step_ms);
        rc = eep_step_end(e->eep, e->compute->stream, any);
        if (rc)
            return err_set(err, rc, "step %" PRIu64 " did not end: %s", step->step, eep_last_error());
        clock_gettime(CLOCK_MONOTONIC, &ended);
        durations_add(&e->durations, (uint64_t)(ended.tv_sec - began.tv_sec) * 1000000000u +
                                         (uint64_t)(ended.tv_nsec - began.tv_nsec));
        batch_advance(&e->batch, &e->decoder.config);
        return 0;
    }
    if (!eep_revoked(e->eep) || rc == ERR_CORRUPT || rc == ERR_PROTOCOL) /* those two are no peer's death */
        return rc;
    log_event(e->log, LOG_LEVEL_WARN, "step-failed", "step=%" PRIu64 " why=%s", step->step, err->text);
    mesh_free(e->mesh);
    e->mesh = NULL;
    eep_step_failed(e->eep);
    return 0;
}

static int engine_turn(struct engine *e, struct err *err)
{
    struct eep_step step;
    int rc = engine_notes(e, err);
    if (rc)
        return rc;
    if (!e->bound) {
        engine_wait(e);
        return 0;
    }
    rc = eep_step_begin(e->eep, e->compute->stream, batch_has_work(&e->batch), IDLE_MS, &step);
    if (rc < 0)
        return err_set(err, rc, "no step was begun: %s", eep_last_error());
    if (rc == EEP_STEP_RUN)
        return engine_step(e, &step, err);
    if (rc == EEP_STEP_LEFT) {
        log_event(e->log, LOG_LEVEL_INFO, "left", "rank=%d handed_back=%u", e->rank, e->batch.n);
        batch_hand_back(&e->batch, "leaving");
        mesh_free(e->mesh);
        e->mesh = NULL;
        e->rank = -1;
    }
    return 0;
}

/* ---- life ---- */

static int engine_attach(struct engine *e, struct err *err)
{
    const char *address = server_address(e->server);
    const char *port = strrchr(address, ':');
    char at[160], endpoint[ENDPOINT_MAX];
    if (e->options.advertise)
        snprintf(at, sizeof at, "%s%s", e->options.advertise, port ? port : "");
    else
        snprintf(at, sizeof at, "%s", address);
    int len = snprintf(endpoint, sizeof endpoint, "request=%s mesh=%s id=%" PRIx64, at, at, e->id);
    if (len < 0 || (size_t)len >= sizeof endpoint)
        return err_set(err, ERR_LIMIT, "the endpoint is longer than %zu bytes", sizeof endpoint - 1);
    struct eep_options o = {.socket = e->options.socket,
                            .endpoint = endpoint,
                            .masks = !e->options.no_masks,
                            .dispatch = e->options.dispatch,
                            .kv_bytes = e->options.kv_bytes,
                            .on_event = engine_event,
                            .user = e};
    if (e->source.config) {
        o.seals = LAYOUT_FUSED;
        o.moe_layers = e->source.shape.layers;
        o.logical_experts = e->source.shape.experts;
    }
    uint64_t deadline_ms = clock_now_ms() + e->options.attach_ms;
    for (;;) {
        /* Straight into place: events may come before this returns. */
        int rc = eep_attach(&o, &e->eep);
        if (rc == 0)
            break;
        pthread_mutex_lock(&e->lock);
        bool stop = e->stop;
        pthread_mutex_unlock(&e->lock);
        if (stop || clock_now_ms() >= deadline_ms)
            return err_set(err, stop ? ERR_ABORTED : rc, "cannot attach: %s", eep_last_error());
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    }
    pthread_mutex_lock(&e->lock);
    e->sleeper = e->eep;
    pthread_mutex_unlock(&e->lock);
    log_event(e->log, LOG_LEVEL_INFO, "attached", "socket=%s endpoint=%s", e->options.socket, endpoint);
    return 0;
}

static int engine_open(struct engine *e, struct err *err)
{
    int rc = rand_u64(&e->id, err);
    if (rc)
        return rc;
    e->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    e->lot = mesh_lot_new();
    e->log = log_new("eep-engine", "", e->options.log_level, -1);
    if (e->stop_fd < 0 || !e->lot)
        return err_set(err, ERR_NOMEM, "out of memory or descriptors");
    if (e->options.fused && e->options.checkpoint && (rc = source_open(e->options.checkpoint, &e->source, err)))
        return rc;
    struct server_options o = {.listen = e->options.listen,
                               .lot = e->lot,
                               .own_id = e->id,
                               .on_request = engine_request,
                               .on_signal = engine_signal,
                               .user = e};
    return server_open(&o, &e->server, err);
}

static void engine_close(struct engine *e)
{
    if (e->eep) {
        struct eep_stats s;
        eep_stats_get(e->eep, &s);
        log_event(e->log, LOG_LEVEL_INFO, "end",
                  "steps=%" PRIu64 " flips=%" PRIu64 " holds=%" PRIu64 " longest_hold_us=%" PRIu64
                  " step_p50_us=%" PRIu64 " step_p99_us=%" PRIu64 " step_max_us=%" PRIu64,
                  s.steps, s.flips, s.holds, s.longest_hold_ns / 1000, durations_percentile(&e->durations, 0.5) / 1000,
                  durations_percentile(&e->durations, 0.99) / 1000, e->durations.max_ns / 1000);
    }
    if (e->server)
        batch_hand_back(&e->batch, "ending");
    prepare_finish(e);
    pthread_mutex_lock(&e->lock);
    e->sleeper = NULL;
    pthread_mutex_unlock(&e->lock);
    server_close(e->server);
    eep_detach(e->eep);
    batch_done(&e->batch);
    mesh_free(e->mesh);
    dispatch_done(&e->dispatch);
    compute_close(e);
    decoder_done(&e->decoder);
    source_done(&e->source);
    mesh_lot_free(e->lot);
    free(e->load_map);
    if (e->stop_fd >= 0)
        close(e->stop_fd);
    log_free(e->log);
    pthread_cond_destroy(&e->changed);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

int engine_run(const struct engine_options *options)
{
    struct engine *e = calloc(1, sizeof *e);
    struct err err = {0};
    if (!e) {
        fputs("eep-engine: out of memory\n", stderr);
        return 1;
    }
    e->options = *options;
    e->stop_fd = -1;
    e->rank = -1;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->changed, NULL);
    int rc = engine_open(e, &err);
    e->batch = (struct batch){
        .server = e->server, .max = options->max_batch, .prefill = options->prefill, .kv_budget = options->kv_bytes};
    if (rc == 0)
        rc = engine_attach(e, &err);
    while (rc == 0)
        rc = engine_turn(e, &err);
    bool stopped;
    pthread_mutex_lock(&e->lock);
    stopped = e->stop;
    pthread_mutex_unlock(&e->lock);
    if (!stopped)
        log_event(e->log, LOG_LEVEL_ERROR, "failed", "why=%s", err.text);
    engine_close(e);
    return stopped ? 0 : 1;
}
