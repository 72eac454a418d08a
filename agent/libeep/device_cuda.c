/* Opening the agent's GPU in the engine's process, mapping its memory, and the expert maps on the device.
 * See device.h for threads and contexts. */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "agent/libeep/device_internal.h"

int device_enter(const struct device *d, CUcontext *ret_before, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    CUcontext before = NULL;
    (void)cu->cuCtxGetCurrent(&before);
    int rc = before == d->gpu->context ? 0 : cuda_device_use(d->gpu, err);
    if (rc == 0)
        *ret_before = before;
    return rc;
}

void device_leave(const struct device *d, CUcontext before)
{
    if (before != d->gpu->context)
        (void)d->gpu->driver.cuCtxSetCurrent(before);
}

/* ---- open and close ---- */

/* cuda_device_open leaves its context current. */
static int gpu_open(const char *uuid, struct cuda_device **ret_gpu, struct err *err)
{
    struct cuda_driver cu;
    CUcontext before = NULL;
    int rc = cuda_driver_load(&cu, err);
    if (rc == 0) {
        (void)cu.cuCtxGetCurrent(&before);
        rc = cuda_device_open(uuid, ret_gpu, err);
        (void)cu.cuCtxSetCurrent(before);
        cuda_driver_unload(&cu);
    }
    if (rc == ERR_NOTFOUND)
        return err_set(err, rc,
                       "the agent's weights lie on GPU %s, which this process does not see: its CUDA_VISIBLE_DEVICES must "
                       "not hide it",
                       uuid);
    return rc ? err_wrap(err, "the agent's weights lie on GPU %s", uuid) : 0;
}

/* The word that the stream writes.  Without it, host functions do. */
static void done_register(struct device *d)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    int can = 0;
    CUdeviceptr at = 0;
    if (cu->cuDeviceGetAttribute(&can, CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, d->gpu->device) !=
            CUDA_SUCCESS ||
        !can)
        return;
    if (cu->cuMemHostRegister(d->page, d->page_bytes, CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP) !=
        CUDA_SUCCESS)
        return;
    d->page_registered = true;
    if (cu->cuMemHostGetDevicePointer(&at, d->page, 0) == CUDA_SUCCESS)
        d->done = at + offsetof(struct control_page, done);
}

static int steps_make(struct device *d, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    int rc = cuda_check(cu, cu->cuStreamCreate(&d->stream, CU_STREAM_NON_BLOCKING), err, "create a stream");
    for (unsigned i = 0; i < DEVICE_STEPS_AHEAD && rc == 0; i++) {
        d->steps[i].device = d;
        rc = cuda_check(cu, cu->cuEventCreate(&d->steps[i].began, CU_EVENT_DEFAULT), err, "create an event");
        if (rc == 0)
            rc = cuda_check(cu, cu->cuEventCreate(&d->steps[i].ended, CU_EVENT_DEFAULT), err, "create an event");
    }
    return rc;
}

int device_open(const char *gpu, struct control_page *page, size_t page_bytes, struct device **ret_device,
                struct err *err)
{
    CUcontext before;
    struct device *d = calloc(1, sizeof *d);
    if (!d)
        return err_set(err, ERR_NOMEM, "out of memory");
    int rc = gpu_open(gpu, &d->gpu, err);
    if (rc) {
        free(d);
        return rc;
    }
    d->page = page;
    d->page_bytes = page_bytes;
    pthread_mutex_init(&d->lock, NULL);
    void *elapsed = dlsym(d->gpu->driver.library, "cuEventElapsedTime");
    if (!elapsed)
        elapsed = dlsym(d->gpu->driver.library, "cuEventElapsedTime_v2");
    memcpy(&d->elapsed, &elapsed, sizeof elapsed);
    rc = device_enter(d, &before, err);
    if (rc == 0) {
        rc = cuda_granularity(d->gpu, &d->granularity, err);
        if (rc == 0)
            rc = steps_make(d, err);
        if (rc == 0)
            done_register(d);
        device_leave(d, before);
    }
    if (rc) {
        device_close(d);
        return rc;
    }
    *ret_device = d;
    return 0;
}

void device_close(struct device *d)
{
    CUcontext before;
    if (!d || d->busy) /* the device may still come to what is here: it goes with the process */
        return;
    const struct cuda_driver *cu = &d->gpu->driver;
    if (device_enter(d, &before, NULL) == 0) {
        for (unsigned i = 0; i < DEVICE_STEPS_AHEAD; i++) {
            if (d->steps[i].began)
                (void)cu->cuEventDestroy(d->steps[i].began);
            if (d->steps[i].ended)
                (void)cu->cuEventDestroy(d->steps[i].ended);
        }
        if (d->stream)
            (void)cu->cuStreamDestroy(d->stream);
        if (d->page_registered)
            (void)cu->cuMemHostUnregister(d->page);
        device_leave(d, before);
    }
    cuda_device_close(d->gpu);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

int device_ordinal(const struct device *d)
{
    return d->gpu->gpu.index;
}

/* ---- memory ---- */

int device_map(struct device *d, int fd, size_t bytes, void **ret_base, size_t *ret_mapped, struct err *err)
{
    CUcontext before;
    CUdeviceptr at = 0;
    size_t mapped = 0;
    if (!cuda_round(d->granularity, bytes, &mapped))
        return err_set(err, ERR_PROTOCOL, "a region of %zu bytes", bytes);
    int rc = device_enter(d, &before, err);
    if (rc)
        return rc;
    rc = cuda_import(d->gpu, fd, mapped, true, &at, err);
    device_leave(d, before);
    if (rc)
        return rc;
    *ret_base = (void *)(uintptr_t)at;
    *ret_mapped = mapped;
    return 0;
}

void device_unmap(struct device *d, void *base, size_t mapped)
{
    CUcontext before;
    if (d->busy || device_enter(d, &before, NULL))
        return;
    cuda_unmap(d->gpu, (CUdeviceptr)(uintptr_t)base, mapped);
    device_leave(d, before);
}

/* ---- maps ---- */

static size_t aligned(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static void maps_layout(const struct eep_maps *maps, struct device_maps *m)
{
    size_t physical = (size_t)maps->layers * maps->max_ranks * maps->slots * sizeof(int32_t);
    size_t replicas = (size_t)maps->layers * maps->logical * maps->max_replicas * sizeof(int32_t);
    m->replicas_at = aligned(physical);
    m->count_at = m->replicas_at + aligned(replicas);
    m->bytes = m->count_at + (size_t)maps->layers * maps->logical * sizeof(int32_t);
    m->load_bytes = (size_t)maps->layers * maps->slots * sizeof(uint64_t);
}

static int maps_allocate(struct device *d, struct device_maps *m, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    int rc = cuda_check(cu, cu->cuMemAlloc(&m->at, m->bytes), err, "allocate the expert maps on the GPU");
    if (rc == 0)
        rc = cuda_check(cu, cu->cuMemAlloc(&m->load, m->load_bytes), err, "allocate the load counters on the GPU");
    for (size_t i = 0; i < sizeof m->stages / sizeof m->stages[0] && rc == 0; i++) {
        rc = cuda_check(cu, cu->cuMemHostAlloc((void **)&m->stages[i].data, m->bytes, CU_MEMHOSTALLOC_PORTABLE), err,
                        "pin %zu bytes of host memory", m->bytes);
        if (rc == 0)
            rc = cuda_check(cu, cu->cuEventCreate(&m->stages[i].busy, CU_EVENT_DISABLE_TIMING), err, "create an event");
    }
    return rc;
}

/* The counters go on where a predecessor left them. */
static int load_begin(struct device *d, struct device_maps *m, const struct eep_maps *maps, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    if (cu->cuMemHostRegister(maps->expert_load, m->load_bytes, CU_MEMHOSTREGISTER_PORTABLE) == CUDA_SUCCESS)
        m->registered = maps->expert_load;
    int rc = cuda_check(cu, cu->cuMemcpyHtoDAsync(m->load, maps->expert_load, m->load_bytes, d->stream), err,
                        "copy the load counters to the GPU");
    return rc ? rc : cuda_check(cu, cu->cuStreamSynchronize(d->stream), err, "copy the load counters to the GPU");
}

int device_maps_new(struct device *d, struct eep_maps *maps, struct device_maps **ret_maps, struct err *err)
{
    CUcontext before;
    struct device_maps *m = calloc(1, sizeof *m);
    if (!m)
        return err_set(err, ERR_NOMEM, "out of memory");
    maps_layout(maps, m);
    int rc = device_enter(d, &before, err);
    if (rc == 0) {
        rc = maps_allocate(d, m, err);
        if (rc == 0)
            rc = load_begin(d, m, maps, err);
        device_leave(d, before);
    }
    if (rc) {
        device_maps_free(d, m);
        return rc;
    }
    maps->device_physical_to_logical_map = (int32_t *)(uintptr_t)m->at;
    maps->device_logical_to_physical_map = (int32_t *)(uintptr_t)(m->at + m->replicas_at);
    maps->device_logical_replica_count = (int32_t *)(uintptr_t)(m->at + m->count_at);
    maps->device_expert_load = (uint64_t *)(uintptr_t)m->load;
    *ret_maps = m;
    return 0;
}

void device_maps_free(struct device *d, struct device_maps *m)
{
    CUcontext before;
    if (!m || d->busy || device_enter(d, &before, NULL))
        return;
    const struct cuda_driver *cu = &d->gpu->driver;
    for (size_t i = 0; i < sizeof m->stages / sizeof m->stages[0]; i++) {
        if (m->stages[i].busy) {
            (void)cu->cuEventSynchronize(m->stages[i].busy);
            (void)cu->cuEventDestroy(m->stages[i].busy);
        }
        if (m->stages[i].data)
            (void)cu->cuMemFreeHost(m->stages[i].data);
    }
    if (m->registered)
        (void)cu->cuMemHostUnregister(m->registered);
    if (m->load)
        (void)cu->cuMemFree(m->load);
    if (m->at)
        (void)cu->cuMemFree(m->at);
    device_leave(d, before);
    free(m);
}

static int maps_enqueue(struct device *d, struct device_maps *m, const struct eep_maps *maps, CUstream stream,
                        struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    struct device_stage *stage = &m->stages[m->next_stage++ % 2];
    /* The copy from it two maps ago is done, as a rule, and this is no wait. */
    int rc = cuda_check(cu, cu->cuEventSynchronize(stage->busy), err, "wait for a copy of the expert maps");
    if (rc)
        return rc;
    memcpy(stage->data, maps->physical_to_logical_map,
           (size_t)maps->layers * maps->max_ranks * maps->slots * sizeof(int32_t));
    memcpy(stage->data + m->replicas_at, maps->logical_to_physical_map,
           (size_t)maps->layers * maps->logical * maps->max_replicas * sizeof(int32_t));
    memcpy(stage->data + m->count_at, maps->logical_replica_count, m->bytes - m->count_at);
    rc = cuda_check(cu, cu->cuMemcpyHtoDAsync(m->at, stage->data, m->bytes, stream), err,
                    "copy the expert maps to the GPU");
    return rc ? rc : cuda_check(cu, cu->cuEventRecord(stage->busy, stream), err, "mark a copy of the expert maps");
}

int device_maps_write(struct device *d, struct device_maps *m, const struct eep_maps *maps, void *stream, struct err *err)
{
    const struct cuda_driver *cu = &d->gpu->driver;
    CUcontext before;
    int rc = device_enter(d, &before, err);
    if (rc)
        return rc;
    rc = device_stream_join(d, stream ? stream : d->stream, err);
    if (rc == 0)
        rc = maps_enqueue(d, m, maps, stream ? stream : d->stream, err);
    if (rc == 0 && !stream)
        rc = cuda_check(cu, cu->cuStreamSynchronize(d->stream), err, "copy the expert maps to the GPU");
    device_leave(d, before);
    return rc;
}
