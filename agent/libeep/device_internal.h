/* Inside the device part of libeep: device_cuda.c (opening, memory, maps) and device_steps.c (steps). */
#ifndef EEP_LIBEEP_DEVICE_INTERNAL_H
#define EEP_LIBEEP_DEVICE_INTERNAL_H

#include <pthread.h>

#include "agent/cuda_driver.h"
#include "agent/libeep/device.h"

/* One of the last steps, by their order. */
struct device_step {
    struct device *device;
    CUevent began, ended;
    bool closed; /* `ended` is in the stream */
    uint64_t step;
};

struct device {
    struct cuda_device *gpu;
    struct control_page *page;
    size_t page_bytes;
    size_t granularity;
    CUdeviceptr done; /* the page's word, as the device sees it; 0: host functions write it */
    bool page_registered;
    CUstream stream; /* for what the engine gives none */
    /* Not in every driver under the name that this cuda.h gives it; NULL: durations are not known. */
    CUresult (*elapsed)(float *, CUevent, CUevent);

    pthread_mutex_t lock;
    /* under lock */
    struct device_step steps[DEVICE_STEPS_AHEAD];
    unsigned begun, seen; /* steps since the start; seen <= begun: known to have ended, and timed */
    uint64_t ns[DEVICE_STEPS_AHEAD]; /* of those not told yet */
    unsigned n_ns;
    bool busy; /* device_drain gave up */
    CUstream last; /* of the latest step */
};

/* Makes the primary context current; what was current comes back by device_leave. */
int device_enter(const struct device *d, CUcontext *ret_before, struct err *err) MUST_CHECK;
void device_leave(const struct device *d, CUcontext before);
/* `stream` goes on after what the steps before have in another one.  Context current, lock not held. */
int device_stream_join(struct device *d, CUstream stream, struct err *err) MUST_CHECK;

struct device_maps {
    CUdeviceptr at, load;
    size_t bytes, load_bytes;
    size_t replicas_at, count_at; /* offsets of the second and third array */
    struct device_stage {
        uint8_t *data; /* pinned; [bytes] */
        CUevent busy;  /* passed when it may be written again */
    } stages[2];
    unsigned next_stage;
    void *registered; /* the shared counters, pinned; NULL: the driver refused */
};

#endif
