/* Steps on the engine's stream: their order, their end, and how long they took.  See device.h.
 *
 * A ring of the last steps, two events each.  It bounds how far an engine runs ahead of its GPU, and so how many steps
 * an agent that was not asked in a repair may be in front of the others. */
#include <time.h>

#include "agent/libeep/device_internal.h"
#include "agent/libeep/gate.h"

/* Under lock, context current: what has ended since the last look. */
static void steps_look(struct device *d)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    while (d->seen != d->begun) {
        struct device_step *s = &d->steps[d->seen % DEVICE_STEPS_AHEAD];
        if (!s->closed || cu->cuEventQuery(s->ended) == CUDA_ERROR_NOT_READY)
            return; /* anything else: it has ended, or the context is at its end */
        float ms;
        if (d->elapsed && d->elapsed(&ms, s->began, s->ended) == CUDA_SUCCESS && d->n_ns < DEVICE_STEPS_AHEAD)
            d->ns[d->n_ns++] = (uint64_t)((double)ms * 1e6) + 1;
        s->closed = false;
        d->seen++;
    }
}

bool device_step_room(struct device *d)
{
    CUcontext before;
    pthread_mutex_lock(&d->lock);
    bool room = d->begun - d->seen < DEVICE_STEPS_AHEAD;
    if (!room && device_enter(d, &before, NULL) == 0) {
        steps_look(d);
        room = d->begun - d->seen < DEVICE_STEPS_AHEAD;
        device_leave(d, before);
    }
    pthread_mutex_unlock(&d->lock);
    return room;
}

bool device_step_ns(struct device *d, uint64_t *ret_ns)
{
    CUcontext before;
    pthread_mutex_lock(&d->lock);
    if (d->n_ns == 0 && d->seen != d->begun && device_enter(d, &before, NULL) == 0) {
        steps_look(d);
        device_leave(d, before);
    }
    bool any = d->n_ns > 0;
    if (any)
        *ret_ns = d->ns[--d->n_ns];
    pthread_mutex_unlock(&d->lock);
    return any;
}

int device_stream_join(struct device *d, CUstream stream, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    int rc = 0;
    pthread_mutex_lock(&d->lock);
    if (d->begun > 0 && stream != d->last) {
        const struct device_step *s = &d->steps[(d->begun - 1) % DEVICE_STEPS_AHEAD];
        rc = cuda_check(cu, cu->cuStreamWaitEvent(stream, s->ended, 0), err, "order two streams");
    }
    if (rc == 0)
        d->last = stream;
    pthread_mutex_unlock(&d->lock);
    return rc;
}

int device_step_begin(struct device *d, void *stream, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    CUcontext before;
    CUstream at = stream ? stream : d->stream;
    int rc = device_enter(d, &before, err);
    if (rc)
        return rc;
    rc = device_stream_join(d, at, err);
    pthread_mutex_lock(&d->lock);
    struct device_step *s = &d->steps[d->begun % DEVICE_STEPS_AHEAD];
    if (rc == 0)
        rc = cuda_check(cu, cu->cuEventRecord(s->began, at), err, "mark the begin of a step");
    if (rc == 0) {
        s->closed = false;
        d->begun++;
    }
    pthread_mutex_unlock(&d->lock);
    device_leave(d, before);
    return rc;
}

int device_step_end(struct device *d, struct device_maps *m, const struct eep_maps *maps, void *stream, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    CUcontext before;
    int rc = device_enter(d, &before, err);
    if (rc)
        return rc;
    rc = device_stream_join(d, stream ? stream : d->stream, err);
    if (rc == 0 && m)
        rc = cuda_check(cu,
                        cu->cuMemcpyDtoHAsync(maps->expert_load, m->load, m->load_bytes, stream ? stream : d->stream),
                        err, "copy the load counters from the GPU");
    if (rc == 0 && !stream)
        rc = cuda_check(cu, cu->cuStreamSynchronize(d->stream), err, "end a step");
    device_leave(d, before);
    return rc;
}

/* On a thread of the driver, which must not call CUDA. */
static void CUDA_CB on_done(void *user)
{
    struct device_step *s = user;
    gate_done(s->device->page, s->step);
}

/* The end of step `s` in the stream: first the word, then the event, which says that the word is there. */
static int done_enqueue(struct device *d, CUstream stream, struct device_step *s, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    CUresult result = d->done ? cu->cuStreamWriteValue64(stream, d->done, s->step, CU_STREAM_WRITE_VALUE_DEFAULT)
                              : cu->cuLaunchHostFunc(stream, on_done, s);
    int rc = cuda_check(cu, result, err, "have the stream tell the end of step %llu", (unsigned long long)s->step);
    return rc ? rc : cuda_check(cu, cu->cuEventRecord(s->ended, stream), err, "mark the end of a step");
}

int device_step_done(struct device *d, void *stream, uint64_t step, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    CUcontext before;
    int rc = device_enter(d, &before, err);
    if (rc == 0) {
        struct device_step *s = &d->steps[(d->begun - 1) % DEVICE_STEPS_AHEAD];
        s->step = step;
        rc = stream ? done_enqueue(d, stream, s, err)
                    : cuda_check(cu, cu->cuEventRecord(s->ended, d->stream), err, "mark the end of a step");
        pthread_mutex_lock(&d->lock);
        s->closed = true;
        pthread_mutex_unlock(&d->lock);
        device_leave(d, before);
    }
    if (rc || !stream)
        gate_done(d->page, step);
    return rc;
}

bool device_drain(struct device *d, int limit_ms)
{
    CUcontext before;
    bool idle = false;
    for (int waited = 0;; waited++) {
        pthread_mutex_lock(&d->lock);
        if (device_enter(d, &before, NULL) == 0) {
            steps_look(d);
            device_leave(d, before);
        }
        idle = d->seen == d->begun || (d->begun - d->seen == 1 && !d->steps[d->seen % DEVICE_STEPS_AHEAD].closed);
        d->busy = !idle;
        pthread_mutex_unlock(&d->lock);
        if (idle || waited >= limit_ms)
            return idle;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}
