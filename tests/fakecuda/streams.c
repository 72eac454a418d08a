/* Streams: a thread and a queue each; events, and who waits for whom.
 *
 * Every operation has a mark that says when it has ended; waiting for a stream is waiting for the mark of its last one.
 * A stream that was created without CU_STREAM_NON_BLOCKING and the context's own stream (NULL) wait for each other, as
 * CUDA has it. */
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "tests/fakecuda/fakecuda.h"

struct CUstream_st {
    CUstream next;
    CUcontext context;
    pthread_t thread;
    unsigned flags;
    bool ends; /* destroyed: the thread ends when the queue is empty */
    struct fake_op *first, **last;
    struct fake_mark *tail; /* of the last operation; NULL: none yet */
    uint64_t random;
};
struct CUevent_st {
    CUevent next;
    CUcontext context;
    unsigned flags;
    struct fake_mark *mark; /* NULL: never recorded */
};

static CUstream streams;
static CUstream ended;  /* whose threads have nothing left to do but to be joined */
static unsigned ending; /* destroyed ones that still work */
static CUevent events;

/* ---- marks; with the lock ---- */

static struct fake_mark *mark_ref(struct fake_mark *mark)
{
    if (mark)
        mark->refs++;
    return mark;
}

static void mark_unref(struct fake_mark *mark)
{
    if (mark && --mark->refs == 0)
        free(mark);
}

static bool mark_done(const struct fake_mark *mark)
{
    return !mark || mark->done;
}

/* Takes a reference meanwhile; what it belongs to may go. */
static void mark_wait(struct fake_mark *mark)
{
    mark_ref(mark);
    while (!mark_done(mark))
        pthread_cond_wait(&fake.changed, &fake.lock);
    mark_unref(mark);
}

/* ---- operations ---- */

struct fake_op *fake_op_new(CUresult (*run)(struct fake_op *op, int device))
{
    struct fake_op *op = calloc(1, sizeof *op);
    struct fake_mark *mark = calloc(1, sizeof *mark);
    if (!op || !mark)
        fake_abort("out of memory");
    mark->refs = 1;
    op->run = run;
    op->mark = mark;
    return op;
}

static void op_free(struct fake_op *op)
{
    mark_unref(op->mark);
    mark_unref(op->wait);
    free(op->owned);
    free(op);
}

static CUresult op_wait(struct fake_op *op, int device)
{
    (void)device;
    fake_lock();
    mark_wait(op->wait);
    fake_unlock();
    return CUDA_SUCCESS;
}

static CUresult op_nothing(struct fake_op *op, int device)
{
    (void)op;
    (void)device;
    return CUDA_SUCCESS;
}

static void op_delay(CUstream s)
{
    if (fake.delay_us == 0)
        return;
    s->random ^= s->random << 13;
    s->random ^= s->random >> 7;
    s->random ^= s->random << 17;
    usleep((unsigned)(s->random % (fake.delay_us + 1u)));
}

/* Runs one operation; the lock is let go meanwhile. */
static void op_run(CUstream s, struct fake_op *op)
{
    CUresult rc = fake.sticky;
    const int device = s->context->device;
    fake_unlock();
    if (rc == CUDA_SUCCESS) {
        op_delay(s);
        rc = op->fail != CUDA_SUCCESS ? op->fail : op->run(op, device);
    }
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    fake_lock();
    if (rc != CUDA_SUCCESS && fake.sticky == CUDA_SUCCESS)
        fake.sticky = rc; /* whatever fails on the device is the end of its context */
    op->mark->ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    op->mark->done = true;
    op_free(op);
    pthread_cond_broadcast(&fake.changed);
}

static void *stream_run(void *arg)
{
    CUstream s = arg;
    fake_lock();
    for (;;) {
        while (!s->first && !s->ends)
            pthread_cond_wait(&fake.changed, &fake.lock);
        struct fake_op *op = s->first;
        if (!op)
            break;
        s->first = op->next;
        if (!s->first)
            s->last = &s->first;
        op_run(s, op);
    }
    mark_unref(s->tail);
    s->next = ended;
    ended = s;
    ending--;
    pthread_cond_broadcast(&fake.changed);
    fake_unlock();
    return NULL;
}

/* ---- streams ---- */

/* Joins the threads that are over.  Left alone they would end while the process does, under a leak checker's eyes. */
static void streams_join(void)
{
    while (ended) {
        CUstream s = ended;
        ended = s->next;
        fake_unlock();
        pthread_join(s->thread, NULL);
        free(s);
        fake_lock();
    }
}

static CUresult stream_new(CUcontext context, unsigned flags, CUstream *ret_stream)
{
    CUstream s = calloc(1, sizeof *s);
    sigset_t all, before;
    if (!s)
        return CUDA_ERROR_OUT_OF_MEMORY;
    s->context = context;
    s->flags = flags;
    s->last = &s->first;
    s->random = (uintptr_t)s | 1;
    streams_join();
    sigfillset(&all); /* signals are the program's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&s->thread, NULL, stream_run, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) {
        free(s);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    s->next = streams;
    streams = s;
    *ret_stream = s;
    return CUDA_SUCCESS;
}

/* The thread ends when it has done what is queued. */
static void stream_end(CUstream s)
{
    CUstream *at = &streams;
    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    s->ends = true;
    ending++;
    pthread_cond_broadcast(&fake.changed);
}

/* A stream that exists, or the current context's own. */
static CUresult stream_find(CUstream *stream)
{
    CUcontext context = fake_current();
    if (*stream && *stream != CU_STREAM_LEGACY) {
        CUstream s = streams;
        while (s && s != *stream)
            s = s->next;
        return s ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    }
    CUresult rc = context->null_stream ? CUDA_SUCCESS : stream_new(context, 0, &context->null_stream);
    *stream = context->null_stream;
    return rc;
}

void fake_streams_end(CUcontext context)
{
    if (context->null_stream)
        stream_end(context->null_stream);
    context->null_stream = NULL;
    while (ending > 0)
        pthread_cond_wait(&fake.changed, &fake.lock);
    streams_join();
}

void fake_streams_join(void)
{
    fake_lock();
    while (ending > 0 && fake.sticky != CUDA_SUCCESS) /* nothing runs any more */
        pthread_cond_wait(&fake.changed, &fake.lock);
    streams_join();
    fake_unlock();
}

void fake_context_settle(CUcontext context)
{
    for (CUstream s = streams; s;) {
        if (s->context != context || mark_done(s->tail)) {
            s = s->next;
            continue;
        }
        mark_wait(s->tail);
        s = streams; /* the list may be another now */
    }
}

static void queue_add(CUstream s, struct fake_op *op)
{
    *s->last = op;
    s->last = &op->next;
    mark_unref(s->tail);
    s->tail = mark_ref(op->mark);
}

static void queue_wait(CUstream s, struct fake_mark *mark)
{
    if (mark_done(mark))
        return;
    struct fake_op *op = fake_op_new(op_wait);
    op->wait = mark_ref(mark);
    queue_add(s, op);
}

/* With the lock. */
static void enqueue(CUstream s, struct fake_op *op)
{
    CUstream null = s->context->null_stream;
    if (s == null) {
        for (CUstream other = streams; other; other = other->next)
            if (other != s && other->context == s->context && !(other->flags & CU_STREAM_NON_BLOCKING))
                queue_wait(s, other->tail);
    } else if (null && !(s->flags & CU_STREAM_NON_BLOCKING)) {
        queue_wait(s, null->tail);
    }
    queue_add(s, op);
    pthread_cond_broadcast(&fake.changed);
}

CUresult fake_enqueue(CUstream stream, struct fake_op *op, bool wait)
{
    op->fail = fake_late();
    fake_lock();
    CUresult rc = stream_find(&stream);
    if (rc == CUDA_SUCCESS && stream->context != fake_current())
        rc = CUDA_ERROR_INVALID_HANDLE;
    if (rc != CUDA_SUCCESS) {
        op_free(op);
    } else {
        struct fake_mark *mark = mark_ref(op->mark);
        enqueue(stream, op);
        if (wait) {
            mark_wait(mark);
            rc = fake.sticky;
        }
        mark_unref(mark);
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuStreamCreate(CUstream *phStream, unsigned int Flags)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    if ((Flags & ~(unsigned)CU_STREAM_NON_BLOCKING) != 0)
        return CUDA_ERROR_INVALID_VALUE;
    fake_lock();
    rc = stream_new(fake_current(), Flags, phStream);
    if (rc == CUDA_SUCCESS)
        fake_current()->things++;
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuStreamDestroy(CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    CUstream s = streams;
    while (s && (s != hStream || s == s->context->null_stream))
        s = s->next;
    if (!s) {
        rc = CUDA_ERROR_INVALID_HANDLE;
    } else {
        s->context->things--;
        stream_end(s);
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuStreamSynchronize(CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    rc = stream_find(&hStream);
    if (rc == CUDA_SUCCESS) {
        mark_wait(hStream->tail);
        rc = fake.sticky;
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuStreamQuery(CUstream hStream)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    rc = stream_find(&hStream);
    if (rc == CUDA_SUCCESS && !mark_done(hStream->tail))
        rc = CUDA_ERROR_NOT_READY;
    fake_unlock();
    return rc;
}

/* ---- events ---- */

static bool event_there(CUevent event)
{
    CUevent e = events;
    while (e && e != event)
        e = e->next;
    return e != NULL;
}

/* Begins a call about an event: with the lock and CUDA_SUCCESS, or neither. */
static CUresult event_enter(const char *function, CUevent event)
{
    CUresult rc = fake_enter(function, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    fake_lock();
    if (event_there(event))
        return CUDA_SUCCESS;
    fake_unlock();
    return CUDA_ERROR_INVALID_HANDLE;
}

CUresult CUDAAPI cuEventCreate(CUevent *phEvent, unsigned int Flags)
{
    CUresult rc = fake_enter(__func__, FAKE_CONTEXT);
    if (rc != CUDA_SUCCESS)
        return rc;
    if ((Flags & ~7u) != 0 || ((Flags & CU_EVENT_INTERPROCESS) && !(Flags & CU_EVENT_DISABLE_TIMING)))
        return CUDA_ERROR_INVALID_VALUE;
    CUevent e = calloc(1, sizeof *e);
    if (!e)
        return CUDA_ERROR_OUT_OF_MEMORY;
    fake_lock();
    *e = (struct CUevent_st){.next = events, .context = fake_current(), .flags = Flags};
    events = e;
    e->context->things++;
    fake_unlock();
    *phEvent = e;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuEventDestroy(CUevent hEvent)
{
    CUresult rc = event_enter(__func__, hEvent);
    if (rc != CUDA_SUCCESS)
        return rc;
    CUevent *at = &events;
    while (*at != hEvent)
        at = &(*at)->next;
    *at = hEvent->next;
    hEvent->context->things--;
    mark_unref(hEvent->mark);
    fake_unlock();
    free(hEvent);
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuEventRecord(CUevent hEvent, CUstream hStream)
{
    CUresult rc = event_enter(__func__, hEvent);
    if (rc != CUDA_SUCCESS)
        return rc;
    rc = stream_find(&hStream);
    if (rc == CUDA_SUCCESS && hStream->context != hEvent->context)
        rc = CUDA_ERROR_INVALID_HANDLE;
    if (rc == CUDA_SUCCESS) {
        struct fake_op *op = fake_op_new(op_nothing);
        op->fail = fake_late();
        mark_unref(hEvent->mark);
        hEvent->mark = mark_ref(op->mark);
        enqueue(hStream, op);
    }
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuEventQuery(CUevent hEvent)
{
    CUresult rc = event_enter(__func__, hEvent);
    if (rc != CUDA_SUCCESS)
        return rc;
    rc = mark_done(hEvent->mark) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuEventSynchronize(CUevent hEvent)
{
    CUresult rc = event_enter(__func__, hEvent);
    if (rc != CUDA_SUCCESS)
        return rc;
    mark_wait(hEvent->mark);
    rc = fake.sticky;
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuEventElapsedTime(float *pMilliseconds, CUevent hStart, CUevent hEnd)
{
    CUresult rc = event_enter(__func__, hStart);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!event_there(hEnd) || !hStart->mark || !hEnd->mark || ((hStart->flags | hEnd->flags) & CU_EVENT_DISABLE_TIMING))
        rc = CUDA_ERROR_INVALID_HANDLE;
    else if (!hStart->mark->done || !hEnd->mark->done)
        rc = CUDA_ERROR_NOT_READY;
    else
        *pMilliseconds = (float)((double)(int64_t)(hEnd->mark->ns - hStart->mark->ns) / 1e6);
    fake_unlock();
    return rc;
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream hStream, CUevent hEvent, unsigned int Flags)
{
    CUresult rc = event_enter(__func__, hEvent);
    if (rc != CUDA_SUCCESS)
        return rc;
    rc = Flags != 0 ? CUDA_ERROR_INVALID_VALUE : stream_find(&hStream);
    if (rc == CUDA_SUCCESS) {
        struct fake_op *op = fake_op_new(op_wait);
        op->wait = mark_ref(hEvent->mark); /* as it is now: a later record does not matter */
        op->fail = fake_late();
        enqueue(hStream, op);
    }
    fake_unlock();
    return rc;
}
