/* The worker's thread, its queue and its results.  What it does is in worker_jobs.c.
 *
 * Functions of worker.h run on the loop thread, worker_main on the worker's own. */
#include "agent/worker.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "agent/weights.h"
#include "agent/worker_internal.h"
#include "common/clock.h"

#define TRANSFER_TIMEOUT_MS 60000u
#define LEND_MAX            16 /* reads between two looks of a reload */
#define HEALTH_S            5 /* between two looks while there is nothing to do */

static void bell_ring(int fd)
{
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void bell_clear(int fd)
{
    uint64_t count;
    while (read(fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

/* ---- results ---- */

/* With the lock held. */
static void result_push(struct worker *w, const struct worker_result *result)
{
    struct result_node *node = malloc(sizeof *node);
    if (!node)
        abort(); /* a completion must not be lost: the core would wait for it for ever */
    *node = (struct result_node){.result = *result};
    *w->results_last = node;
    w->results_last = &node->next;
    bell_ring(w->result_fd);
}

void worker_progress(struct worker *w, const struct job *job, uint64_t bytes, uint64_t total)
{
    struct worker_result result = {
        .id = job->work.id, .kind = job->work.kind, .bytes = bytes, .value = total, .progress = true};
    worker_sign(w, 0);
    pthread_mutex_lock(&w->lock);
    struct result_node *unread = w->results;
    while (unread && !(unread->result.progress && unread->result.id == job->work.id))
        unread = unread->next;
    if (unread)
        unread->result.bytes = bytes;
    else
        result_push(w, &result);
    pthread_mutex_unlock(&w->lock);
}

bool worker_next_result(struct worker *w, struct worker_result *ret_result)
{
    pthread_mutex_lock(&w->lock);
    bell_clear(w->result_fd);
    struct result_node *node = w->results;
    if (node) {
        w->results = node->next;
        if (!w->results)
            w->results_last = &w->results;
        else
            bell_ring(w->result_fd); /* for a caller that takes one at a time */
    }
    pthread_mutex_unlock(&w->lock);
    if (!node)
        return false;
    *ret_result = node->result;
    free(node);
    return true;
}

void worker_result_done(struct worker_result *result)
{
    blob_unref(result->blob);
    model_unref(result->model);
    *result = (struct worker_result){0};
}

int worker_fd(const struct worker *w)
{
    return w->result_fd;
}

/* ---- the queue ---- */

static void job_free(struct job *job)
{
    work_done(&job->work);
    blob_unref(job->manifest);
    free(job);
}

static void job_queue(struct worker *w, struct job *job)
{
    pthread_mutex_lock(&w->lock);
    *w->last = job;
    w->last = &job->next;
    pthread_cond_signal(&w->wanted);
    pthread_mutex_unlock(&w->lock);
}

static struct job *job_new(enum job_kind kind)
{
    struct job *job = calloc(1, sizeof *job);
    if (!job)
        abort(); /* as in result_push */
    job->kind = kind;
    return job;
}

void worker_submit(struct worker *w, const struct work *work)
{
    struct job *job = job_new(JOB_WORK);
    job->work = *work;
    job_queue(w, job);
}

void worker_expert_read(struct worker *w, uint64_t id, const struct expert_read *read, int32_t slot)
{
    struct job *job = job_new(JOB_EXPERT_READ);
    job->work.id = id;
    job->read = *read;
    job->slot = slot;
    job_queue(w, job);
}

void worker_cancel(struct worker *w, uint64_t op)
{
    pthread_mutex_lock(&w->lock);
    for (struct job *job = w->first; job; job = job->next)
        if (job->kind == JOB_WORK && job->work.op == op)
            job->cancelled = true;
    if (w->current && w->current->kind == JOB_WORK && w->current->work.op == op) {
        w->current->cancelled = true;
        bell_ring(w->cancel_fd);
    }
    pthread_mutex_unlock(&w->lock);
}

void worker_sign(struct worker *w, uint64_t call_ns)
{
    uint64_t now_ns = clock_now_ns(), from_ns = call_ns > now_ns ? call_ns : now_ns;
    atomic_store(&w->sign_ns, now_ns);
    atomic_store(&w->due_ns, w->config.stuck_ms ? from_ns + (uint64_t)w->config.stuck_ms * 1000000u : 0);
}

bool worker_stuck(struct worker *w, char *text, size_t size)
{
    uint64_t now_ns = clock_now_ns(), due_ns = atomic_load(&w->due_ns), sign_ns = atomic_load(&w->sign_ns);
    if (!due_ns || now_ns <= due_ns)
        return false;
    static const char *const kinds[] = {
        [JOB_REGION_ALLOC] = "REGION_ALLOC", [JOB_ADOPT] = "ADOPT", [JOB_SEAL] = "SEAL", [JOB_SEAL_DISCARD] = "SEAL_DISCARD",
        [JOB_EXPERT_READ] = "EXPERT_READ"};
    pthread_mutex_lock(&w->lock);
    const struct job *job = w->current;
    const char *what = !job ? "the look at memory and transport" : job->kind == JOB_WORK ? work_kind_name(job->work.kind) : kinds[job->kind];
    unsigned long long op = job ? job->work.op : 0;
    pthread_mutex_unlock(&w->lock);
    snprintf(text, size, "the worker's thread has shown no progress for %llu s in %s of operation %llu",
             (unsigned long long)(now_ns - sign_ns) / 1000000000u, what, op);
    return true;
}

bool worker_cancelled(struct worker *w)
{
    worker_sign(w, 0);
    pthread_mutex_lock(&w->lock);
    bool cancelled = w->current && w->current->cancelled;
    pthread_mutex_unlock(&w->lock);
    return cancelled;
}

/* ---- the thread ---- */

/* Waits for a job; false when the worker stops.  NULL for a look at the health of what works in the background. */
static bool job_take(struct worker *w, struct job **ret_job)
{
    bool looks = w->config.transport && w->config.transport->health && !w->fatal;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += HEALTH_S;
    pthread_mutex_lock(&w->lock);
    int late = 0;
    while (!w->first && !w->stopping && late == 0)
        late = looks ? pthread_cond_timedwait(&w->wanted, &w->lock, &until) : pthread_cond_wait(&w->wanted, &w->lock);
    bool stopping = w->stopping;
    struct job *job = stopping ? NULL : w->first;
    if (job) {
        w->first = job->next;
        if (!w->first)
            w->last = &w->first;
        job->next = NULL;
        w->current = job;
        worker_sign(w, 0);
    }
    pthread_mutex_unlock(&w->lock);
    *ret_job = job;
    return !stopping;
}

static void job_end(struct worker *w, struct job *job, const struct worker_result *result)
{
    pthread_mutex_lock(&w->lock);
    w->current = NULL;
    bell_clear(w->cancel_fd);
    bool keep = job->kind == JOB_REGION_ALLOC || job->kind == JOB_ADOPT; /* the caller's */
    if (keep) {
        job->answered = true;
        pthread_cond_broadcast(&w->answered);
    } else if (job->kind != JOB_SEAL_DISCARD) {
        result_push(w, result);
    }
    pthread_mutex_unlock(&w->lock);
    if (!keep)
        job_free(job);
}

/* Tells once that memory or transport are beyond help; what failed because of it has been answered before. */
static void worker_health(struct worker *w)
{
    struct memory_backend *memory = w->config.memory;
    struct transport *transport = w->config.transport;
    struct err err = {0};
    int rc = memory && memory->health ? memory->health(memory, &err) : 0;
    if (rc == 0 && transport && transport->health)
        rc = transport->health(transport, &err);
    if (rc == 0 || w->fatal)
        return;
    struct worker_result result = {.fatal = true, .code = rc};
    snprintf(result.text, sizeof result.text, "%.*s", (int)sizeof result.text - 1, err.text);
    w->fatal = true;
    pthread_mutex_lock(&w->lock);
    result_push(w, &result);
    pthread_mutex_unlock(&w->lock);
}

static struct worker_result job_do(struct worker *w, struct job *job)
{
    struct worker_result result = {
        .id = job->work.id,
        .kind = job->kind == JOB_SEAL ? WORK_LOAD : job->work.kind,
        .op = job->work.op,
        .round = job->work.round,
        .expert = job->kind == JOB_EXPERT_READ,
    };
    uint64_t began_ns = clock_now_ns();
    worker_job_run(w, job, &result);
    result.ns = clock_now_ns() - began_ns;
    return result;
}

/* The first read that is queued for another agent; NULL: none is. */
static struct job *job_take_read(struct worker *w)
{
    pthread_mutex_lock(&w->lock);
    struct job **at = &w->first;
    while (*at && (*at)->kind != JOB_EXPERT_READ)
        at = &(*at)->next;
    struct job *job = *at;
    if (job)
        *at = job->next;
    if (job && !job->next)
        w->last = at;
    pthread_mutex_unlock(&w->lock);
    return job;
}

void worker_lend(struct worker *w)
{
    struct job *job;
    for (int i = 0; i < LEND_MAX && (job = job_take_read(w)); i++) {
        struct worker_result result = job_do(w, job);
        pthread_mutex_lock(&w->lock);
        result_push(w, &result);
        pthread_mutex_unlock(&w->lock);
        job_free(job);
    }
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    for (struct job *job; job_take(w, &job);) {
        if (!job) {
            worker_sign(w, 0);
            worker_health(w);
            atomic_store(&w->due_ns, 0);
            continue;
        }
        struct worker_result result = job_do(w, job);
        worker_sign(w, 0);
        job_end(w, job, &result);
        worker_health(w);
        atomic_store(&w->due_ns, 0);
    }
    return NULL;
}

/* ---- weights ---- */

const struct weights *worker_weights(struct worker *w)
{
    pthread_mutex_lock(&w->lock);
    const struct weights *weights = w->weights;
    pthread_mutex_unlock(&w->lock);
    return weights;
}

const char *worker_gpu(const struct worker *w)
{
    return w->config.memory->gpu;
}

void worker_weights_set(struct worker *w, struct weights *weights)
{
    if (w->config.on_weights)
        w->config.on_weights(w->config.user, weights);
    pthread_mutex_lock(&w->lock);
    w->weights = weights;
    pthread_mutex_unlock(&w->lock);
}

int worker_region_alloc(struct worker *w, const struct region *region, struct memory_region *ret_region,
                        struct err *err)
{
    struct job job = {.kind = JOB_REGION_ALLOC, .region = region, .ret_region = ret_region};
    return worker_call(w, &job, err);
}

int worker_call(struct worker *w, struct job *job, struct err *err)
{
    job_queue(w, job);
    pthread_mutex_lock(&w->lock);
    while (!job->answered)
        pthread_cond_wait(&w->answered, &w->lock);
    pthread_mutex_unlock(&w->lock);
    return job->code < 0 ? err_set(err, job->code, "%s", job->err.text) : 0;
}

void worker_seal(struct worker *w, uint64_t id, const struct manifest *manifest, const struct expert_map *map,
                 uint32_t self)
{
    struct job *job = job_new(JOB_SEAL);
    job->work.id = id;
    job->work.self = self;
    job->code = manifest_encode(manifest, &job->manifest, &job->err);
    /* The loop may let go of its map before the worker comes to this. */
    job->work.map = expert_map_copy(map);
    if (!job->work.map)
        job->code = err_set(&job->err, ERR_NOMEM, "out of memory");
    job_queue(w, job);
}

void worker_seal_discard(struct worker *w)
{
    job_queue(w, job_new(JOB_SEAL_DISCARD));
}

/* ---- start and stop ---- */

int worker_start(const struct worker_config *config, struct worker **ret_worker, struct err *err)
{
    struct worker *w = calloc(1, sizeof *w);
    if (!w)
        return err_set(err, ERR_NOMEM, "out of memory");
    w->config = *config;
    if (w->config.transfer_timeout_ms == 0)
        w->config.transfer_timeout_ms = TRANSFER_TIMEOUT_MS;
    w->last = &w->first;
    w->results_last = &w->results;
    w->cancel_fd = -1;
    pthread_mutex_init(&w->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&w->wanted, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_cond_init(&w->answered, NULL);
    int rc;
    w->result_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->result_fd >= 0)
        w->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->result_fd < 0 || w->cancel_fd < 0) {
        rc = err_set(err, ERR_NOMEM, "cannot create the worker's descriptors: %s", strerror(errno));
        goto free_worker;
    }
    rc = pthread_create(&w->thread, NULL, worker_main, w);
    if (rc != 0) {
        rc = err_set(err, ERR_NOMEM, "cannot start the worker thread: %s", strerror(rc));
        goto free_worker;
    }
    *ret_worker = w;
    return 0;
free_worker: /* memory and transport stay the caller's */
    if (w->result_fd >= 0)
        close(w->result_fd);
    if (w->cancel_fd >= 0)
        close(w->cancel_fd);
    free(w);
    return rc;
}

void worker_stop(struct worker *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->stopping = true;
    if (w->current) {
        w->current->cancelled = true;
        bell_ring(w->cancel_fd);
    }
    pthread_cond_signal(&w->wanted);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);

    while (w->first) {
        struct job *job = w->first;
        w->first = job->next;
        job_free(job);
    }
    struct worker_result result;
    while (worker_next_result(w, &result))
        worker_result_done(&result);
    if (w->config.transport) {
        w->config.transport->destroy(w->group);
        w->config.transport->close(w->config.transport);
    }
    weights_free(w->weights);
    worker_sealing_free(w);
    worker_lent_close(w);
    if (w->config.memory)
        w->config.memory->close(w->config.memory);
    close(w->result_fd);
    close(w->cancel_fd);
    pthread_cond_destroy(&w->answered);
    pthread_cond_destroy(&w->wanted);
    pthread_mutex_destroy(&w->lock);
    free(w);
}
